"""Throughput of answering: batches against one by one, and eight clients of the API against one.

    OMP_NUM_THREADS=1 python benchmarks/serving_speed.py --use_cpu --max_new_tokens 64
    python benchmarks/serving_speed.py --base_model Qwen/Qwen3-0.6B --questions 32 --max_new_tokens 64

Compared with what a user would write: a loop of `model.generate` over the questions, and one client that waits for each
answer. Both take turns, question for question, so that other load on the machine meets both. Each ratio is given of the
time on the clock and, on the CPU, of processor time, which a busy machine hardly changes. --random_width W measures a
random Qwen2 of that width with 12 layers and the embedded model's tokenizer (W 640: 74 million parameters).
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from suwen.command_line import run
from suwen.serving import (
    Served,
    add_model_flags,
    add_sampling_flags,
    check_serving_flags,
    generation_settings,
    load_served,
    serving_parser,
)


def sample_questions(count: int) -> list[list[dict]]:
    from suwen.embedded import PROJECT_ROOT
    from suwen.prompts import load_prompts

    prompts = load_prompts(str(PROJECT_ROOT / "data/sft/sample_sharegpt.jsonl"))
    return [prompt.messages for prompt in (prompts * (count // max(len(prompts), 1) + 1))[:count]]


def build_random_model(folder: str, width: int) -> str:
    """A model of random weights, large enough that its own arithmetic counts; returns the folder."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from suwen.embedded import build_embedded_model

    tokenizer = AutoTokenizer.from_pretrained(build_embedded_model())
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=width * 14 // 5,
        num_hidden_layers=12,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64 // 5 or 1,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Clock:
    """Seconds on the clock and of processor time, and tokens, of all calls that it measured."""

    def __init__(self) -> None:
        self.seconds = self.processor = 0.0
        self.tokens = 0

    def measure(self, work: Callable[[], list[list[int]]]) -> list[list[int]]:
        began, processor = time.perf_counter(), time.process_time()
        answers = work()
        self.seconds += time.perf_counter() - began
        self.processor += time.process_time() - processor
        self.tokens += sum(map(len, answers))
        return answers

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def comparison(fast: Clock, slow: Clock, on_cpu: bool) -> str:
    ratio = f"{fast.rate:.0f} against {slow.rate:.0f} tokens/s, {fast.rate / slow.rate:.1f} times"
    work = fast.tokens / fast.processor / (slow.tokens / slow.processor)
    return ratio + (f" ({work:.1f} by processor time)" if on_cpu else "")


def one_by_one(served: Served, prompts: list[list[int]], args: argparse.Namespace) -> list[list[int]]:
    """The loop of the library's own `generate`."""
    import torch

    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=served.model.device)
        output = served.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=args.max_new_tokens,
            do_sample=False,
            eos_token_id=list(served.encoder.stop_token_ids),
            pad_token_id=served.encoder.stop_token_ids[0],
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


def batched(served: Served, prompts: list[list[int]], args: argparse.Namespace) -> list[list[int]]:
    from suwen.generation import generate_batch

    found = generate_batch(served.model, served.encoder, prompts, generation_settings(args))
    return [answer.token_ids for answer in found]


@contextmanager
def serve(served: Served, args: argparse.Namespace) -> Iterator[str]:
    """The API on this machine; gives its address."""
    import uvicorn

    from suwen.api.server import Api, Limits, ServedModel, build_app
    from suwen.batching import Batcher

    batcher = Batcher(served.model, max_batch=args.batch_size)
    api = Api(batcher, {"m": ServedModel(served.encoder)}, generation_settings(args), Limits())
    server = uvicorn.Server(uvicorn.Config(build_app(api, patience=0), port=args.port, log_level="error"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{args.port}/v1/chat/completions"
    finally:
        server.should_exit = True
        thread.join()


def measure_api(
    served: Served, questions: list[list[dict]], prompt: list[int] | None, args: argparse.Namespace, on_cpu: bool
) -> None:
    """Args: prompt: one whose answer begins with a token that is a whole character, as only those are streamed."""
    import httpx
    import torch

    one, eight = Clock(), Clock()
    with serve(served, args) as address, httpx.Client(timeout=600) as client, ThreadPoolExecutor(8) as pool:

        def ask(messages: list[dict]) -> list[int]:
            reply: Any = client.post(address, json={"model": "m", "messages": messages}).json()
            return [0] * reply["usage"]["completion_tokens"]

        list(pool.map(ask, questions[:8]))  # warm, connections too
        for at in range(0, len(questions), 8):
            chosen = questions[at : at + 8]
            eight.measure(lambda chosen=chosen: list(pool.map(ask, chosen)))  # type: ignore[misc]
            one.measure(lambda chosen=chosen: list(map(ask, chosen)))  # type: ignore[misc]
        print(f"API, 8 clients and 1: {comparison(eight, one, on_cpu)}")

        if prompt is None:
            print("first streamed token: no answer begins with a whole character")
            return
        body = {"model": "m", "prompt": prompt, "stream": True, "max_tokens": 16}
        # Each with the time on the clock and of the processor: a machine with other work stretches the former at will
        firsts, prefills = [], []
        for _ in range(9):
            began, processor = time.perf_counter(), time.process_time()
            with client.stream("POST", address.replace("chat/", ""), json=body) as reply:
                next(line for line in reply.iter_lines() if line)
                firsts.append((time.perf_counter() - began, time.process_time() - processor))
            with torch.inference_mode():
                ids = torch.tensor([prompt], device=served.model.device)
                began, processor = time.perf_counter(), time.process_time()
                served.model(ids, logits_to_keep=1).logits.argmax().item()
                prefills.append((time.perf_counter() - began, time.process_time() - processor))
    first, first_work = (1000 * statistics.median(times) for times in zip(*firsts, strict=True))
    prefill, prefill_work = (1000 * statistics.median(times) for times in zip(*prefills, strict=True))
    print(
        f"first streamed token of {len(prompt)} prompt tokens after {first:.1f} ms, one prefill takes {prefill:.1f} ms:"
        f" {first / prefill:.2f} times" + (f" ({first_work / prefill_work:.2f} by processor time)" if on_cpu else "")
    )


def main(argv: list[str] | None = None) -> None:
    parser = serving_parser(__doc__ or "")
    parser.add_argument("--questions", type=int, default=32, help="how many (default: 32)")
    parser.add_argument("--batch_size", type=int, default=8, help="answered together (default: 8)")
    parser.add_argument("--port", type=int, default=8097, help="of the API while it is measured (default: 8097)")
    parser.add_argument("--random_width", type=int, metavar="W", help="measure a random Qwen2 of this width")
    add_model_flags(parser)
    add_sampling_flags(parser)
    args = parser.parse_args(argv)
    check_serving_flags(args)
    with tempfile.TemporaryDirectory() as folder:
        if args.random_width:
            args.base_model = build_random_model(folder, args.random_width)
        served = load_served(args)
    on_cpu = served.model.device.type == "cpu"
    questions = sample_questions(args.questions)
    prompts = [served.encoder.encode_prompt(messages) for messages in questions]
    print(f"{served.model.num_parameters() / 1e6:.0f} million parameters, {args.questions} questions")

    loop, batches, same = Clock(), Clock(), 0
    streamed: list[int] | None = None
    batched(served, prompts[: args.batch_size], args)  # warm
    one_by_one(served, prompts[:1], args)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))  # as inference.py does it
    for at in range(0, len(order), args.batch_size):
        chosen = [prompts[index] for index in order[at : at + args.batch_size]]
        together = batches.measure(lambda chosen=chosen: batched(served, chosen, args))  # type: ignore[misc]
        alone = loop.measure(lambda chosen=chosen: one_by_one(served, chosen, args))  # type: ignore[misc]
        same += sum(a == b for a, b in zip(together, alone, strict=True))
        for prompt, answer in zip(chosen, together, strict=True):
            text = served.encoder.tokenizer.decode(answer[:1], skip_special_tokens=True)
            streamed = prompt if streamed is None and text.strip("\ufffd \n") else streamed
    print(f"batches of {args.batch_size} and one by one: {comparison(batches, loop, on_cpu)}")
    print(f"  {same} of {len(prompts)} answers token for token the same")
    measure_api(served, questions, streamed, args, on_cpu)


if __name__ == "__main__":
    run(main)

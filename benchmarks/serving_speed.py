"""Throughput of answering: batches against one by one, and eight clients of the API against one.

    python benchmarks/serving_speed.py
    python benchmarks/serving_speed.py --base_model Qwen/Qwen3-0.6B --questions 32 --max_new_tokens 64

Each ratio compares tokens a second of the same questions on the same machine. What would be compared with is what a
user would write: a loop of `model.generate` over the questions, and one client that waits for each answer.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from suwen.arguments import run
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

    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    answers: dict[int, list[int]] = {}
    for at in range(0, len(order), args.batch_size):
        chosen = order[at : at + args.batch_size]
        found = generate_batch(served.model, served.encoder, [prompts[i] for i in chosen], generation_settings(args))
        answers.update({index: answer.token_ids for index, answer in zip(chosen, found, strict=True)})
    return [answers[index] for index in range(len(prompts))]


def clients(served: Served, questions: list[list[dict]], args: argparse.Namespace, count: int) -> tuple[float, float]:
    """Tokens a second over all clients, and the seconds to the first piece of a streamed answer."""
    import httpx
    import uvicorn

    from suwen.api.server import Api, Limits, ServedModel, build_app
    from suwen.batching import Batcher

    batcher = Batcher(served.model, max_batch=args.batch_size)
    api = Api(batcher, {"m": ServedModel(served.encoder)}, generation_settings(args), Limits())
    config = uvicorn.Config(build_app(api, patience=0), port=args.port, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    address = f"http://127.0.0.1:{args.port}/v1/chat/completions"

    def ask(messages: list[dict]) -> int:
        reply: Any = httpx.post(address, json={"model": "m", "messages": messages}, timeout=600).json()
        return reply["usage"]["completion_tokens"]

    ask(questions[0])
    started = time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        tokens = sum(pool.map(ask, questions))
    rate = tokens / (time.perf_counter() - started)
    body = {"model": "m", "messages": questions[0], "stream": True}
    firsts = []
    with httpx.Client(timeout=600) as client:  # made before the clock runs: reading certificates takes 100 ms
        client.get(f"http://127.0.0.1:{args.port}/health")
        for _ in range(5):
            started = time.perf_counter()
            with client.stream("POST", address, json=body) as reply:
                lines = (line for line in reply.iter_lines() if '"content": ""' not in line and line)
                next(lines)
                firsts.append(time.perf_counter() - started)
    first = sorted(firsts)[2]  # the median
    server.should_exit = True
    thread.join()
    return rate, first


def main(argv: list[str] | None = None) -> None:
    parser = serving_parser(__doc__ or "")
    parser.add_argument("--questions", type=int, default=32, help="how many (default: 32)")
    parser.add_argument("--batch_size", type=int, default=8, help="answered together (default: 8)")
    parser.add_argument("--port", type=int, default=8097, help="of the API while it is measured (default: 8097)")
    add_model_flags(parser)
    add_sampling_flags(parser)
    args = parser.parse_args(argv)
    check_serving_flags(args)
    served = load_served(args)
    questions = sample_questions(args.questions)
    prompts = [served.encoder.encode_prompt(messages) for messages in questions]

    rates: dict[str, float] = {}
    answers = {}
    for name, work in (("one by one", one_by_one), ("batches", batched)):
        work(served, prompts[: args.batch_size], args)  # warm
        started = time.perf_counter()
        answers[name] = work(served, prompts, args)
        rates[name] = sum(map(len, answers[name])) / (time.perf_counter() - started)
    same = sum(a == b for a, b in zip(answers["one by one"], answers["batches"], strict=True))
    print(
        f"batches of {args.batch_size}: {rates['batches']:.0f} tokens/s, one by one {rates['one by one']:.0f}: "
        f"{rates['batches'] / rates['one by one']:.1f} times; {same} of {len(prompts)} answers token for token the same"
    )
    one, first = clients(served, questions[: args.questions // 2], args, 1)
    eight, _ = clients(served, questions, args, 8)
    print(f"API, 8 clients: {eight:.0f} tokens/s, 1 client {one:.0f}: {eight / one:.1f} times")

    import torch

    with torch.inference_mode():
        ids = torch.tensor([prompts[0]], device=served.model.device)
        started = time.perf_counter()
        served.model(ids, logits_to_keep=1)
        prefill = time.perf_counter() - started
    print(f"first streamed piece after {1000 * first:.0f} ms, one prefill takes {1000 * prefill:.0f} ms")


if __name__ == "__main__":
    run(main)

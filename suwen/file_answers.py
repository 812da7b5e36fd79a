"""Answers to a whole file of questions: by this process, by several processes together, or by an endpoint."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suwen.client import Endpoint, complete_chats, sampling
from suwen.prompts import AnswerFile, Prompt, folder_state, prompts_sha256, run_record
from suwen.serving import Served, generation_settings, say

if TYPE_CHECKING:
    from suwen.generation import Answer
    from suwen.retrieval.search import Hit, KnowledgeBase

RECORDED = "template_name quantization dtype thinking max_new_tokens temperature top_p top_k repetition_penalty seed"
LONGEST_WAIT = datetime.timedelta(days=7)  # of one process for the others


def answers_of(
    served: Served | Endpoint,
    prompts: list[Prompt],
    todo: list[int],
    args: argparse.Namespace,
    knowledge: KnowledgeBase | None = None,
) -> Iterator[tuple[int, Answer, Sequence[Hit]]]:
    """(index, answer, its sources) for the prompts in `todo`, as they come."""
    ask = answers_of_endpoint if isinstance(served, Endpoint) else answers_of_model
    return ask(served, prompts, todo, args, knowledge)  # type: ignore[arg-type]


def answers_of_model(
    served: Served, prompts: list[Prompt], todo: list[int], args: argparse.Namespace, knowledge: KnowledgeBase | None
) -> Iterator[tuple[int, Answer, Sequence[Hit]]]:
    """In batches of like length; see `generate_many`."""
    from suwen.generation import Answer, generate_many
    from suwen.retrieval.grounding import NOT_FOUND, Prepared, prepare

    settings = generation_settings(args)
    prepared: dict[int, Prepared] = {}
    for index in todo:
        prompt = prompts[index]
        try:
            prepared[index] = prepare(
                served.encoder, prompt.messages, served.window, settings.max_new_tokens, knowledge
            )
        except ValueError as error:
            raise ValueError(f"{prompt.where}: {error}") from None
        if dropped := prepared[index].dropped:
            say(f"note: {prompt.where}: oldest turns ({dropped} tokens) left out to fit the model's window")
        if prepared[index].abstained:
            yield index, Answer(NOT_FOUND, "", [], "stop"), ()
    encoded = {index: found.ids for index, found in prepared.items() if not found.abstained}
    for index, answer in generate_many(served.model, served.encoder, encoded, settings, args.batch_size, say):
        yield index, answer, prepared[index].hits


def answers_of_endpoint(
    endpoint: Endpoint,
    prompts: list[Prompt],
    todo: list[int],
    args: argparse.Namespace,
    knowledge: KnowledgeBase | None,
) -> Iterator[tuple[int, Answer, Sequence[Hit]]]:
    """Many at once; an answer's token ids are unknown here, only how many there were."""
    from suwen.generation import Answer
    from suwen.retrieval.grounding import NOT_FOUND, find_passages, with_passages

    hits: dict[int, Sequence[Hit]] = dict.fromkeys(todo, ())
    asked: list[int] = []
    for index in todo:
        if knowledge is not None:
            hits[index] = find_passages(knowledge, prompts[index].messages)
        if knowledge is not None and not hits[index]:
            yield index, Answer(NOT_FOUND, "", [], "stop"), ()
        else:
            asked.append(index)

    def conversation(index: int) -> list[dict]:
        messages = prompts[index].messages
        return with_passages(messages, [hit.passage for hit in hits[index]]) if hits[index] else messages

    settings = sampling(generation_settings(args))
    for place, reply in complete_chats(endpoint, map(conversation, asked), **settings):
        index = asked[place]
        ended: Any = "length" if reply.finish_reason == "length" else "stop"
        yield index, Answer(reply.content, reply.reasoning, [0] * reply.completion_tokens, ended), hits[index]


def answer_file(
    served: Served | Endpoint, prompts: list[Prompt], args: argparse.Namespace, knowledge: KnowledgeBase | None
) -> None:
    """Answer a file of questions into --output_file; started as several processes, each answers its share."""
    if isinstance(served, Endpoint):
        origin: dict[str, Any] = {"endpoint": served.base_url, "model": served.model}
    else:
        origin = {"model": {name: folder_state(name) for name in served.names}, "tokenizer": args.tokenizer_path}
    record = {
        **origin,
        "questions": prompts_sha256(prompts),
        **{name: getattr(args, name) for name in (*RECORDED.split(), "with_prompt")},
    }
    if knowledge is not None:
        record["knowledge"] = [knowledge.record["data"], args.num_passages, args.min_relevance, args.rerank_model]
    path = args.output_file or "predictions.jsonl"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        answer_together(served, prompts, args, knowledge, path, record)
        return
    output = AnswerFile(path, len(prompts), record)
    if output.done:
        say(f"{output.path}: {len(output.done)} of {len(prompts)} questions are answered already")
    write_answers(output, output.missing, served, prompts, args, knowledge)
    finish(output, len(prompts))


def answer_together(
    served: Served | Endpoint,
    prompts: list[Prompt],
    args: argparse.Namespace,
    knowledge: KnowledgeBase | None,
    path: str,
    record: dict[str, Any],
) -> None:
    """Data parallel: each process writes a part beside the file; the first one puts them together.

    On GPUs `accelerate launch` is enough. On CPUs several processes are started by `--multi_gpu --num_processes N`
    before inference.py and `--use_cpu` behind it; accelerate's own `--cpu` starts one, or needs MPI.

    Parts that were left by a run that was cut off are taken in first, of however many processes that was.
    """
    from accelerate import PartialState

    state = PartialState(cpu=args.use_cpu, timeout=LONGEST_WAIT)
    output = None
    if state.is_main_process:
        output = AnswerFile(path, len(prompts), record)
        take_in_parts(output, len(prompts), record)
        if output.done:
            say(f"{output.path}: {len(output.done)} of {len(prompts)} questions are answered already")
    state.wait_for_everyone()
    rows_path = output.path if output else AnswerFile.rows_path(path)
    done = {json.loads(line)["index"] for line in rows_path.read_bytes().splitlines()}
    lengths = {index: sum(len(m["content"]) for m in p.messages) for index, p in enumerate(prompts)}
    missing = sorted(lengths.keys() - done, key=lambda index: (-lengths[index], index))
    part = AnswerFile(part_path(rows_path, state.process_index), len(prompts), record)
    state.wait_for_everyone()  # nobody takes in a part that belongs to this run
    share = missing[state.process_index :: state.num_processes]
    write_answers(part, share, served, prompts, args, knowledge, state.process_index)
    part.stream.close()
    state.wait_for_everyone()
    if output is not None:
        take_in_parts(output, len(prompts), record)
        finish(output, len(prompts))
    state.destroy_process_group()


def part_path(path: Path, process: int) -> Path:
    return path.with_name(f"{path.name}.part-{process}")


def take_in_parts(output: AnswerFile, count: int, record: dict[str, Any]) -> None:
    for path in sorted(output.path.parent.glob(f"{output.path.name}.part-*")):
        if path.name.endswith(".run.json"):
            continue
        part = AnswerFile(path, count, record)  # cuts a half line off, refuses another run's
        part.stream.close()
        rows = [json.loads(line) for line in path.read_bytes().splitlines()]
        output.append([row for row in rows if row["index"] not in output.done])
        path.unlink()
        run_record(path).unlink()


def write_answers(
    output: AnswerFile,
    todo: list[int],
    served: Served | Endpoint,
    prompts: list[Prompt],
    args: argparse.Namespace,
    knowledge: KnowledgeBase | None,
    process: int | None = None,
) -> None:
    from tqdm import tqdm

    started, tokens = time.perf_counter(), 0
    description = f"process {process}" if process is not None else None
    with tqdm(total=len(todo), desc=description, position=process, unit=" questions", disable=not todo) as progress:
        for index, answer, hits in answers_of(served, prompts, todo, args, knowledge):
            tokens += len(answer.token_ids)
            output.append([answer_row(index, prompts[index], answer, hits, args)])
            progress.set_postfix_str(f"{tokens / (time.perf_counter() - started):.0f} tokens/s", refresh=False)
            progress.update()


def finish(output: AnswerFile, count: int) -> None:
    output.finish()
    say(f"{count} answers: {output.table or output.path}")


def answer_row(index: int, prompt: Prompt, answer: Answer, hits: Sequence[Hit], args: argparse.Namespace) -> dict:
    row: dict = {"index": index}
    if args.with_prompt:
        row["prompt"] = prompt.messages[-1]["content"]
        if len(prompt.messages) > 1:
            row["messages"] = prompt.messages
    row["response"] = answer.content
    if answer.reasoning:
        row["reasoning"] = answer.reasoning
    row |= {"finish_reason": answer.finish_reason, "num_tokens": len(answer.token_ids)}
    if args.knowledge_index:
        from suwen.retrieval.grounding import check_citations, source_rows

        citations = check_citations(answer.content, [hit.passage for hit in hits])
        row |= {"sources": source_rows(hits), "citations": vars(citations)}
    return row

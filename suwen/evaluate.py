"""Evaluates one model on tasks: asks, scores, and leaves a record of every item.

An output folder holds records/<task>.<mode>.jsonl (one row an item, complete enough to rebuild every table), run.json
(what was evaluated, with what), results.json and report.html. A run that was cut off goes on where it was; records of
another model, or of other questions, are moved aside and never mixed in.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import hashlib
import json
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from suwen.benchmarks import TASK_SETS, TASKS
from suwen.benchmarks.extraction import VERSION as EXTRACTION_VERSION
from suwen.benchmarks.task import TOO_LONG, Candidates, Item, Items, Record, Task, longest_answer, read_items
from suwen.comparison import compare_folders, summarise_run
from suwen.prompts import AnswerFile, folder_state, run_difference, run_record, set_aside, with_system_prompt
from suwen.readers import find_files, hash_file
from suwen.records import timestamp, versions, write_json
from suwen.report import format_overview, format_pairs, format_results, write_report
from suwen.runs import load_run

if TYPE_CHECKING:
    from suwen.client import Endpoint
    from suwen.serving import Served

OWN_DATA = Path(__file__).resolve().parent.parent / "data" / "evaluation"
FLUSHED_ITEMS = 64


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the answers besides the model and the questions."""

    modes: tuple[str, ...] = ("likelihood", "generate")
    max_samples: int | None = None
    max_new_tokens: int | None = None  # None: each task's own
    batch_size: int = 32
    system_prompt: str = ""


# ------------------------------------------------------------------------------------------------------------- inputs


def parse_tasks(names: str, protocol: str = "suwen", flag: str = "--tasks") -> list[Task]:
    """ "cmexam,huatuo" as tasks; "own" and "injection" stand for sets of them.

    The protocol cmexam_official scores CMExam by the published scorer beside ours.
    """
    wanted = [name for part in names.split(",") if (name := part.strip())]
    wanted = [name for part in wanted for name in TASK_SETS.get(part, (part,))]
    unknown = [name for name in wanted if name not in TASKS]
    if unknown or not wanted:
        found = ", ".join(unknown) or "nothing"
        raise ValueError(
            f"{flag}: found {found}, expected some of {', '.join(TASKS)}, or {' or '.join(TASK_SETS)} for sets of them"
        )
    if protocol == "cmexam_official":
        if "cmexam" not in wanted:
            raise ValueError(f"--protocol cmexam_official: for the task cmexam, found --tasks {names}")
        wanted.append("cmexam_official")
    return [TASKS[name] for name in dict.fromkeys(wanted)]


def parse_data_files(text: str | None, tasks: Sequence[Task]) -> dict[str, list[Path]]:
    """--data_file: one FILE for the only task, or cmexam=FILE,huatuo=FILE."""
    found: dict[str, list[Path]] = {}
    if not text:
        return found
    parts = [text] if Path(text).exists() else text.split(",")
    for part in parts:
        name, equals, path = part.partition("=")
        if Path(part).exists() or not equals:
            if len({task.name.removesuffix("_official") for task in tasks}) > 1:
                raise ValueError(
                    f"--data_file {part}: {len(tasks)} tasks are asked for, expected one (--tasks NAME), or the task "
                    f"of each file, such as {tasks[0].name}={part}; the tasks are {', '.join(t.name for t in tasks)}"
                )
            name, path = tasks[0].name, part
        if name.strip() not in {task.name for task in tasks}:
            raise ValueError(f"--data_file: {name.strip()} is not among the --tasks")
        found.setdefault(name.strip(), []).extend(find_files(path.strip(), "--data_file")[0])
    if "cmexam" in found and "cmexam_official" in {task.name for task in tasks}:
        found.setdefault("cmexam_official", found["cmexam"])
    return found


def find_task_files(
    task: Task, data_dir: str | None, data_files: dict[str, list[Path]], flag: str = "--data_dir"
) -> list[Path]:
    """The files of a task: those named, else those in `data_dir` that fit, else the project's own.

    In `data_dir` (with its folders) a file fits by its name or by a folder named after the task. Of several, those
    with "test" in their path go before "val" and "dev" (or as the task says); "train" is never taken.
    """
    if task.name in data_files:
        return data_files[task.name]
    if data_dir and task.patterns:
        root = Path(data_dir)
        fitting = []
        for file in find_files(data_dir, flag)[0]:
            inside = file.relative_to(root) if root.is_dir() else Path(file.name)
            folders = [part.lower() for part in inside.parts[:-1]]
            named = any(fnmatch.fnmatch(file.name.lower(), pattern) for pattern in task.patterns)
            if (named or task.name in folders) and "train" not in str(inside).lower():
                fitting.append((file, str(inside).lower()))
        for split in task.splits:
            if chosen := [(file, inside) for file, inside in fitting if re.search(rf"(?<![a-z]){split}", inside)]:
                fitting = chosen  # a word of the path: "ceval" is no "val"
                break
        if fitting:
            return [file for file, _ in fitting]
    if task.default_file:
        return [OWN_DATA / task.default_file]
    where = f"found none in {flag} {data_dir}" if data_dir else "none was given"
    by_name = f"--data_file {task.name}=FILE or " if flag == "--data_dir" else ""
    raise ValueError(
        f"--tasks {task.name}: needs a file ({where}), expected {by_name}a file named "
        f"{' or '.join(task.patterns)} in {flag}; {task.source}"
    )


def read_tasks(tasks: Sequence[Task], files: dict[str, list[Path]], settings: Settings) -> dict[str, Items]:
    """Read the items of all tasks, and say what was read and refused."""
    read = {}
    for task in tasks:
        read[task.name] = found = read_items(task, files[task.name], settings.max_samples)
        print(f"{task.name}: {len(found.items):,} items; " + "; ".join(found.notes()), flush=True)
    return read


# ------------------------------------------------------------------------------------------------------------- asking

Answers = Iterator[tuple[int, dict[str, Any]]]
# (messages by index, longest answer) -> (index, {"response", "finish_reason", ...}) as they come
Ask = Callable[[dict[int, list[dict]], int], Answers]


def ask_model(served: Served, batch_size: int) -> Ask:
    """Greedy answers of a local model, by the template that it is served with."""
    from suwen.generation import fit_prompt, generate_many
    from suwen.generation_settings import GenerationSettings

    def ask(conversations: dict[int, list[dict]], max_new_tokens: int) -> Answers:
        encoded: dict[int, list[int]] = {}
        for index, messages in conversations.items():
            try:
                encoded[index] = fit_prompt(served.encoder, messages, served.window, max_new_tokens)[0]
            except ValueError:
                yield index, {"response": "", "finish_reason": TOO_LONG}
        settings = GenerationSettings(max_new_tokens=max_new_tokens)
        for index, answer in generate_many(served.model, served.encoder, encoded, settings, batch_size, tqdm.write):
            row = {"response": answer.content, "finish_reason": answer.finish_reason, "tokens": len(answer.token_ids)}
            yield index, row | ({"reasoning": answer.reasoning} if answer.reasoning else {})

    return ask


def ask_endpoint(endpoint: Endpoint) -> Ask:
    """Answers of a served model at temperature 0."""
    from suwen.client import complete_chats

    def ask(conversations: dict[int, list[dict]], max_new_tokens: int) -> Answers:
        indices = list(conversations)
        sampling: dict[str, Any] = {"max_tokens": max_new_tokens, "temperature": 0}
        for place, reply in complete_chats(endpoint, conversations.values(), **sampling):
            row = {"response": reply.content, "finish_reason": reply.finish_reason, "tokens": reply.completion_tokens}
            yield indices[place], row | ({"reasoning": reply.reasoning} if reply.reasoning else {})

    return ask


def measure(served: Served, task: Task, items: Sequence[Item], todo: Sequence[int]) -> Iterator[tuple[int, Record]]:
    """Records of likelihood mode as they come; nothing but the row at hand is kept.

    Raises:
        ValueError: a text whose likelihood itself is the score, and that does not fit into the model's window.
    """
    from suwen.likelihood import Choice, Scorer, encode_answers, encode_choice

    assert task.candidates and task.choose
    scorer = Scorer(served.model)
    asked: deque[tuple[int, Candidates, Choice]] = deque()  # in the row at hand
    too_long: list[int] = []

    def choices() -> Iterator[Choice]:
        for index in todo:
            candidates = task.candidates(items[index])  # type: ignore[misc]
            if candidates.chat:
                choice = encode_answers(served.encoder, candidates.prefix, candidates.texts)
            else:
                choice = encode_choice(served.encoder.tokenizer, candidates.prefix, candidates.texts)
            longest = len(choice.prefix) + max(map(len, choice.continuations)) - 1
            if served.window and longest > served.window:
                if task.paired != "correct":
                    raise ValueError(
                        f"{items[index].where}: {longest} tokens do not fit into the model's window of "
                        f"{served.window}; leave the item out, or cut its text"
                    )
                too_long.append(index)
                continue
            asked.append((index, candidates, choice))
            yield choice

    for logps in scorer.score(choices()):
        index, candidates, choice = asked.popleft()
        if candidates.by_token:
            logps = [logp / len(ids) for logp, ids in zip(logps, choice.continuations, strict=True)]
        yield index, task.choose(items[index], logps)
    for index in too_long:
        yield index, {"choice": "", "correct": False, "logps": {}, "finish_reason": TOO_LONG}
    if scorer.problem:
        tqdm.write(f"note: {scorer.problem}; every continuation was scored in a row of its own, which takes longer")


# ------------------------------------------------------------------------------------------------------------ running


def static_fields(item: Item) -> Record:
    fields = {"id": item.id, "where": item.where, "question": item.question, "target": item.target}
    return fields | {name: value for name in ("options", "groups") if (value := getattr(item, name))}


def run_mode(
    task: Task, mode: str, items: list[Item], records: Path, identity: dict[str, Any],
    served: Served | None, ask: Ask, settings: Settings,
) -> tuple[int, float]:  # fmt: skip
    """Ask what is not yet answered; returns how many items that were, and the seconds it took."""
    longest = settings.max_new_tokens or longest_answer(task, items)
    identity = identity | {"task": [task.name, task.version], "items": hash_items(items)}
    if mode == "generate":
        identity |= {"max_new_tokens": longest, "system_prompt": settings.system_prompt}
        if task.headline == "accuracy":
            identity["extraction"] = EXTRACTION_VERSION
    path = records / f"{task.name}.{mode}.jsonl"
    if path.exists() and (difference := run_difference(path, identity)):
        print(f"{task.name}, {mode}: earlier records moved to {set_aside([path], records)} ({difference})", flush=True)
    output = AnswerFile(path, len(items), identity, key="id")
    todo = output.missing
    began, rows = time.perf_counter(), []
    if mode == "likelihood":
        assert served is not None
        answers: Any = measure(served, task, items, todo)
    else:
        messages = {
            index: with_system_prompt([{"role": "user", "content": task.ask(items[index])}], settings.system_prompt)
            for index in todo
        }
        answers = ask(messages, longest)
    title = f"{task.name}, {mode}"
    with tqdm(
        total=len(items), initial=len(items) - len(todo), desc=title, unit=" items", disable=None, leave=False
    ) as progress:
        for index, answer in answers:
            record = {"index": index, **static_fields(items[index]), **answer}
            if mode == "generate":
                record |= task.judge(items[index], answer["response"])
                if task.must_end and answer["finish_reason"] != "stop":
                    record["correct"] = False
            rows.append(record)
            if len(rows) == FLUSHED_ITEMS:
                output.append(rows)
                rows = []
            progress.update()
    output.append(rows)
    output.finish()
    return len(todo), time.perf_counter() - began


def hash_items(items: Sequence[Item]) -> str:
    rows = [[item.id, item.target, item.groups, *([item.prompt] if item.prompt else [])] for item in items]
    content = json.dumps(rows, ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", errors="surrogatepass")).hexdigest()


def evaluate(
    tasks: Sequence[Task],
    files: dict[str, list[Path]],
    output_dir: Path,
    settings: Settings,
    model: dict[str, Any],
    served: Served | None,
    ask: Ask,
    read: dict[str, Items],
) -> dict[str, Any]:
    """Evaluate one model and write records, results.json and report.html.

    Args:
        files: of each task.
        model: what identifies the model: weights, template, quantization, or endpoint and name.
        served: None for an endpoint, which has no likelihoods.
        read: the items of each task, by `read_tasks`.

    Returns:
        the content of results.json.
    """
    records = output_dir / "records"
    records.mkdir(parents=True, exist_ok=True)
    remove_others(records, model)
    header: dict[str, Any] = {
        "model": model, "settings": dataclasses.asdict(settings), "versions": versions(), "started_at": timestamp(),
        "tasks": {},
    }  # fmt: skip
    previous = read_header(output_dir)
    if previous.get("model") == model:
        header["tasks"] = previous.get("tasks", {})
    for task in tasks:
        found = read[task.name]
        modes = [mode for mode in task.modes if mode in settings.modes and (served or mode == "generate")]
        if not modes:
            print(f"{task.name}: left out, it has no {' or '.join(settings.modes)} mode here", flush=True)
            continue
        timing = header["tasks"].get(task.name, {}).get("timing", {})
        header["tasks"][task.name] = {
            "version": task.version,
            "files": {str(file): hash_file(file) for file in files[task.name]},
            "own": bool(task.default_file) and files[task.name] == [OWN_DATA / (task.default_file or "")],
            "notes": found.notes(),
            "refused": len(found.refused),
            "timing": timing,
        }
        for mode in modes:
            answered, seconds = run_mode(task, mode, found.items, records, {"model": model}, served, ask, settings)
            if answered:
                timing[mode] = {"answered": answered, "seconds": round(seconds, 2)}
                each = f"{1000 * seconds / answered:.1f} s for 1,000"
                print(f"{task.name}, {mode}: {answered:,} items in {seconds:.1f} s ({each})", flush=True)
        header["finished_at"] = timestamp()
        write_json(output_dir / "run.json", header)
    if not header["tasks"]:
        raise ValueError(f"--tasks {','.join(task.name for task in tasks)}: nothing of it can be asked here")
    run = load_run(output_dir)
    results = summarise_run(run)
    write_json(output_dir / "results.json", results)
    write_report(output_dir / "report.html", [run], [results], None)
    return results


def read_header(output_dir: Path) -> dict[str, Any]:
    try:
        return json.loads((output_dir / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def remove_others(records: Path, model: dict[str, Any]) -> None:
    """Move records of another model aside, so that a folder holds one model."""
    others: list[Path] = []
    for path in sorted(records.glob("*.jsonl")):
        try:
            known = json.loads(run_record(path).read_text(encoding="utf-8")).get("model")
        except (OSError, ValueError):
            known = None
        if known != json.loads(json.dumps(model)):
            others.append(path)
    if others:
        print(f"records of another model moved to {set_aside(others, records)}", flush=True)


# ------------------------------------------------------------------------------------------------------ for the stages


def model_identity(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    kept = ("template_name", "quantization", "dtype", "thinking", "tokenizer_path")
    return {"names": list(names), "weights": {name: folder_state(name) for name in names}} | {
        name: getattr(args, name) for name in kept
    }


def evaluate_stage(
    model_path: str,
    tasks: str,
    output_dir: str | Path,
    earlier: Sequence[str | Path] = (),
    data_dir: str | None = None,
    data_file: str | None = None,
    settings: Settings | None = None,
    served: Served | None = None,
    step: int | None = None,
) -> dict[str, Any]:
    """Evaluate a stage, and compare it with the evaluations of the stage before and of its own steps.

    Args:
        model_path: finished stage, model or LoRA folder.
        tasks: as --tasks.
        output_dir: such as outputs/sft/eval, or outputs/sft/eval/step-500 during a training.
        earlier: evaluation folders to compare with, in their order; those that hold no results are left out.
        served: the model if it is in memory already, as during a training; it must be in evaluation mode.
        step: of a training that goes on: its weights are in memory alone, and an overview is all that is printed.

    Returns:
        {"results": ..., "comparison": ... or None}.
    """
    from suwen.serving import load_served

    settings = settings or Settings()
    chosen = parse_tasks(tasks)
    named = parse_data_files(data_file, chosen)
    files = {task.name: find_task_files(task, data_dir, named) for task in chosen}
    args = argparse.Namespace(
        base_model=model_path, lora_model=None, tokenizer_path=None, template_name="auto", quantization="none",
        dtype="auto", use_cpu=False, gpus=None, thinking="auto",
    )  # fmt: skip
    served = served or load_served(args)
    output = Path(output_dir)
    identity = model_identity(args, served.names)
    if step is not None:  # each time other weights, whatever lies in the folder
        identity |= {"weights": None, "step": step, "asked_at": timestamp()}
    if step is None:
        read = read_tasks(chosen, files, settings)
    else:
        read = {task.name: read_items(task, files[task.name], settings.max_samples) for task in chosen}
    ask = ask_model(served, settings.batch_size)
    results = evaluate(chosen, files, output, settings, identity, served, ask, read)
    if step is None:
        print(format_results(results), flush=True)
    comparison = compare_stage(output, earlier, brief=step is not None)
    if step is not None and comparison is None:
        print(format_overview({"results": [results], "pairs": []}), flush=True)
    return {"results": results, "comparison": comparison}


def compare_stage(output: Path, earlier: Sequence[str | Path], brief: bool = False) -> dict[str, Any] | None:
    """Compare an evaluation with earlier ones, print that, and put it into its report.

    Args:
        earlier: evaluation folders in their order; those that hold no results are left out.
        brief: print the overview alone, without the end against the start.

    Returns:
        as `compare_folders`; None where there is nothing to compare with.
    """
    folders = [folder for folder in earlier if (Path(folder) / "results.json").is_file()]
    if not folders:
        return None
    comparison = compare_folders([*folders, output], output / "comparison.json", output / "report.html")
    # of the way there the overview says enough, and of what this evaluation asked; the last pair is the end against
    # the start
    asked = comparison["results"][-1]["tasks"].keys()
    results = [
        {**result, "tasks": {name: entry for name, entry in result["tasks"].items() if name in asked}}
        for result in comparison["results"]
    ]
    print(format_overview({**comparison, "results": results}), flush=True)
    if not brief:
        print("\n" + format_pairs(comparison["pairs"][-1:]), flush=True)
    return comparison

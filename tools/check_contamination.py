"""Find test items in training data: verbatim, with options reordered, or reworded. Offline, on the CPU.

    python tools/check_contamination.py --tasks exam --train_file_dir data/sft,data/pretrain
    python tools/check_contamination.py --tasks cmexam --data_dir DIR --train_file_dir DIR --evaluation outputs/sft/eval
    python tools/check_contamination.py --tasks cmexam --data_dir DIR --sketch outputs/sft

With --evaluation, a folder that evaluation.py wrote, the scores are also given on clean and on dirty items alone. With
--sketch the data itself is not needed: a training leaves the hashes of its 13-grams beside its weights, in
training_data.sketch. Those of the stages that a stage went on from are looked into as well.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from suwen.command_line import OneLineParser, make_folder, run
from suwen.readers import Refusal, Source, find_encoding, parse_sources, read_records

if TYPE_CHECKING:
    from suwen.benchmarks.task import Item
    from suwen.contamination import Match, SoughtItem

SHOWN = 10


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tasks", default="own", metavar="A,B", help="as in evaluation.py (default: the project's own)"
    )
    parser.add_argument("--data_dir", metavar="DIR", help="the test files, found by name")
    parser.add_argument("--data_file", metavar="FILE", help="the test file of one task, or cmexam=FILE,huatuo=FILE")
    parser.add_argument("--train_file_dir", metavar="A,B", help="training files and folders, of any format")
    parser.add_argument("--sketch", metavar="A,B", help="stages, merged models or sketches, instead of the data")
    parser.add_argument("--evaluation", metavar="DIR", help="an evaluation, for its scores on clean and dirty items")
    parser.add_argument("--output_dir", default="outputs/contamination", metavar="DIR", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if bool(args.train_file_dir) == bool(args.sketch):
        raise ValueError("--train_file_dir and --sketch: give one of them")
    return args


def training_rows(sources: Sequence[Source], counts: Counter[str]) -> Iterator[tuple[str, str]]:
    """Every text of every row, whatever its schema; what cannot be read is counted."""
    from tqdm import tqdm

    from suwen.grams import row_texts

    files = [file for source in sources for file in source.files]
    with tqdm(
        total=sum(file.stat().st_size for file in files), unit="B", unit_scale=True, disable=None, leave=False
    ) as progress:
        for file in files:
            for record in read_records(file, find_encoding(file)):
                if isinstance(record, Refusal):
                    counts[record.reason] += 1
                else:
                    yield record[0], row_texts(record[1])
            progress.update(file.stat().st_size)


def as_sought(item: Item) -> SoughtItem:
    from suwen.contamination import SoughtItem

    letters = item.options and isinstance(item.target, str) and set(item.target) <= item.options.keys()
    answers = [item.options[letter] for letter in item.target] if letters else []
    if not letters and isinstance(item.target, str) and item.target:
        # one answer among others under names of their own, which are not printed with the question; or no others
        answers = [item.options.get(item.target, item.target)]
    return SoughtItem(item.id, item.question, tuple(item.options.values()) if letters else (), tuple(answers))


def find_matches(args: argparse.Namespace, items: Sequence[SoughtItem]) -> list[Match]:
    from suwen.contamination import KINDS, Detector, check_sketch, find_sketches
    from suwen.sketch import load_sketch

    if args.sketch:
        looked = [find_sketches(name.strip()) for name in args.sketch.split(",")]
        found = []
        for file in dict.fromkeys(file for files, _ in looked for file in files):
            sketch = load_sketch(file)
            kept = "all grams" if sketch.complete else f"one gram in {2**64 // (sketch.limit + 1)}"
            print(f"{file}: {sketch.rows:,} rows, {sketch.characters:,} characters, {kept}")
            found.append(check_sketch(items, sketch))
        for line in dict.fromkeys(line for _, lines in looked for line in lines):
            print(f"note: {line}")
        return [min(matches, key=lambda match: KINDS.index(match.kind)) for matches in zip(*found, strict=True)]
    sources = parse_sources(args.train_file_dir)
    detector, refused = Detector(items), Counter[str]()
    size = sum(file.stat().st_size for source in sources for file in source.files)
    began = time.perf_counter()
    detector.scan(training_rows(sources, refused))
    seconds = time.perf_counter() - began
    print(f"searched {detector.rows:,} rows, {size / 1e6:.1f} MB, in {seconds:.1f} s ({size / 1e6 / seconds:.1f} MB/s)")
    for reason, count in sorted(refused.items()):
        print(f"could not be read: {count:,} x {reason}")
    return detector.results()


def clean_scores(folder: str, task: str, dirty: set[str]) -> dict[str, Any]:
    """Mean scores of an evaluation on all, clean and dirty items, by mode."""
    from suwen.benchmarks import TASKS
    from suwen.runs import load_run

    found: dict[str, Any] = {}
    for (name, mode), records in load_run(folder).records.items():
        if name != task:
            continue
        key = TASKS[task].paired
        scale = 100 if key == "correct" else 1
        parts = {
            "all": records,
            "clean": [r for r in records if r["id"] not in dirty],
            "dirty": [r for r in records if r["id"] in dirty],
        }
        found[mode] = {
            part: {"n": len(rows), "score": scale * sum(r[key] for r in rows) / len(rows) if rows else None}
            for part, rows in parts.items()
        }
    return found


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    from suwen import evaluate
    from suwen.contamination import DIRTY, KINDS
    from suwen.records import write_json
    from suwen.tables import table

    make_folder(output := Path(args.output_dir))
    tasks = evaluate.parse_tasks(args.tasks)
    named = evaluate.parse_data_files(args.data_file, tasks)
    files = {task.name: evaluate.find_task_files(task, args.data_dir, named) for task in tasks}
    read = evaluate.read_tasks(tasks, files, evaluate.Settings())
    # One search for all tasks; ids are made unique by the task
    items = {f"{name}\0{item.id}": as_sought(item) for name, found in read.items() for item in found.items}
    matches = dict(zip(items, find_matches(args, [i._replace(id=key) for key, i in items.items()]), strict=True))
    summary: dict[str, Any] = {"searched": args.train_file_dir or args.sketch, "tasks": {}}
    rows = [["task", "items", *KINDS, "dirty"]]
    worst = []
    with open(output / "items.jsonl", "w", encoding="utf-8") as stream:
        for task in tasks:
            found = {item.id: matches[f"{task.name}\0{item.id}"] for item in read[task.name].items}
            questions = {item.id: item.question for item in read[task.name].items}
            kinds = Counter(match.kind for match in found.values())
            dirty = {item for item, match in found.items() if match.kind in DIRTY}
            share = 100 * len(dirty) / len(found)
            counts = [f"{kinds[kind]:,}" for kind in KINDS]
            rows.append([task.name, f"{len(found):,}", *counts, f"{share:.2f} %"])
            entry: dict[str, Any] = {"items": len(found), "kinds": dict(kinds), "dirty_percent": share}
            if args.evaluation:
                entry["scores"] = clean_scores(args.evaluation, task.name, dirty)
            summary["tasks"][task.name] = entry
            for item, match in found.items():
                record = {"task": task.name, "id": item, "question": questions[item], **match._asdict()}
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
                if item in dirty:
                    worst.append((KINDS.index(match.kind), -match.score, task.name, questions[item], match))
    write_json(output / "contamination.json", summary)
    print(table(rows))
    for _, _, name, question, match in sorted(worst, key=lambda entry: entry[:2])[:SHOWN]:
        place = f"{match.where}: {match.excerpt[:50]}" if match.where else "sketch"
        print(f"  {match.kind} {match.score:.2f}  {name}: {question[:50]}  <- {place}")
    for name, entry in summary["tasks"].items():
        for mode, scores in entry.get("scores", {}).items():
            parts = [f"{part} {s['score']:.2f} ({s['n']:,})" for part, s in scores.items() if s["score"] is not None]
            print(f"{name}, {mode}: " + ", ".join(parts))
    print(f"written to {output}: contamination.json, items.jsonl")


if __name__ == "__main__":
    run(main)

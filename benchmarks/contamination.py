"""How many planted test items the search for contamination finds, how many clean ones it accuses, and how fast it is.

    python benchmarks/contamination.py
    python benchmarks/contamination.py --data_file cmexam.csv --train_file_dir books/,qa.jsonl --planted 1000

Items are planted between real training rows: verbatim with other marks, with their options in another order, and
reworded (about every second phrase of a list of synonyms replaced, sentences and options in another order). What is
found in the training rows before anything is planted counts as a false alarm, so give data that does not hold the test
items. Megabytes are those of the files, seconds those of one core.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from suwen.command_line import OneLineParser, run
from suwen.sketch import Sketch, SketchBuilder

ROOT = Path(__file__).resolve().parents[1]
SYNONYMS = (
    ("患者", "病人"), ("下列", "以下"), ("哪项", "哪一项"), ("正确", "对"), ("错误", "不对"), ("主要", "最主要的"),
    ("属于", "归于"), ("首选", "优先选择"), ("最常见", "最多见"), ("治疗", "疗法"), ("应", "应当"), ("可", "可以"),
    ("不", "并不"), ("是", "即为"), ("，", ""), ("的", "之"), ("导致", "引起"), ("出现", "发生"), ("查体", "体格检查"),
    ("诊断", "判断"), ("男", "男性"), ("女", "女性"),
)  # fmt: skip
MARKS = ("{} {}", "({}) {}.", "{}、{};")


def print_item(question: str, options: list[str], mark: str) -> str:
    return question + "\n" + "\n".join(mark.format("ABCDEFGH"[i], text) for i, text in enumerate(options))


def shuffled(options: list[str], rng: random.Random) -> list[str]:
    """In another order, where there is one."""
    found = options
    while found == options and len(set(options)) > 1:
        found = rng.sample(options, len(options))
    return found


def reword(text: str, rng: random.Random, share: float) -> str:
    for old, new in SYNONYMS:
        text = text.replace(old, new) if rng.random() < share else text
    *sentences, last = re.split("(?<=[。；])", text)
    return "".join(rng.sample(sentences, len(sentences))) + last


def sketch_of(rows: list[tuple[str, str]]) -> Sketch:
    builder = SketchBuilder()
    builder.add({"text": text} for _, text in rows)
    return builder.finish()


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_file", metavar="FILE", help="choice questions (default: the project's own exam)")
    parser.add_argument(
        "--train_file_dir", metavar="A,B", default=f"{ROOT}/data/pretrain,{ROOT}/data/sft", help="(default: data/)"
    )
    parser.add_argument("--planted", type=int, default=300, metavar="N", help="of each kind (default: %(default)s)")
    args = parser.parse_args(argv)

    from suwen.benchmarks import TASKS
    from suwen.benchmarks.task import read_items
    from suwen.contamination import DIRTY, Detector, SoughtItem, check_sketch
    from suwen.evaluate import OWN_DATA
    from suwen.grams import row_texts
    from suwen.readers import Refusal, find_encoding, parse_sources, read_records

    file = Path(args.data_file) if args.data_file else OWN_DATA / "exam.csv"
    items = read_items(TASKS["cmexam"], [file]).items
    sought = [
        SoughtItem(item.id, item.question, tuple(item.options.values()), tuple(item.options[x] for x in item.target))
        for item in items
    ]
    files = [file for source in parse_sources(args.train_file_dir) for file in source.files]
    rows = [
        (record[0], row_texts(record[1]))
        for file in files
        for record in read_records(file, find_encoding(file))
        if not isinstance(record, Refusal)
    ]
    size = sum(file.stat().st_size for file in files) / 1e6

    Detector(sought[:1]).scan([("", "预热")])  # makes the table of characters
    core = time.process_time()
    detector = Detector(sought)
    preparing = time.process_time() - core
    began, core = time.perf_counter(), time.process_time()
    detector.scan(rows)
    wall, seconds = time.perf_counter() - began, time.process_time() - core
    found = {item.id: match for item, match in zip(sought, detector.results(), strict=True)}
    accused = [item for item in sought if found[item.id].kind in DIRTY]
    print(f"{len(items):,} items, {len(rows):,} training rows, {size:.1f} MB")
    print(f"clean data: {len(accused)} items accused ({100 * len(accused) / len(items):.2f} %)")
    for item in accused:
        match = found[item.id]
        print(f"  {match.kind} {match.score:.2f}: {item.question[:40]}  <- {match.where}: {match.excerpt[:40]}")
    print(
        f"searched at {size / seconds:.1f} MB/s of a core ({size / wall:.1f} MB/s by the clock), after "
        f"{preparing:.1f} s of preparing the items"
    )
    core = time.process_time()
    sketch = sketch_of(rows)
    print(
        f"sketch made at {size / (time.process_time() - core):.1f} MB/s of a core, {sketch.grams.nbytes / 1e6:.1f} MB"
    )
    wrong = sum(match.kind in DIRTY for match in check_sketch(sought, sketch))
    print(f"clean data, by its sketch: {wrong} items accused ({100 * wrong / len(items):.2f} %)")

    rng = random.Random(0)
    clean = [item for item in sought if found[item.id].kind not in DIRTY]
    for kind in ("verbatim", "options reordered", "reworded"):
        chosen = rng.sample(clean, min(args.planted, len(clean)))
        planted = []
        for item in chosen:
            question, options = item.question, list(item.options)
            if kind != "verbatim":
                options = shuffled(options, rng)
            if kind == "reworded":
                question, options = reword(question, rng, 0.5), [reword(option, rng, 0.4) for option in options]
            planted.append(("planted", print_item(question, options, rng.choice(MARKS))))
        mixed = rng.sample(rows, min(len(rows), 2000)) + planted
        rng.shuffle(mixed)
        detector = Detector(sought)
        detector.scan(mixed)
        kinds = {item.id: match.kind for item, match in zip(sought, detector.results(), strict=True)}
        counts = Counter(kinds[item.id] for item in chosen)
        right = sum(counts[name] for name in DIRTY)
        others = sum(kinds[item.id] in DIRTY for item in clean if item not in chosen)
        told = ", ".join(f"{name} {count}" for name, count in counts.most_common())
        print(
            f"{kind}: {right} of {len(chosen)} found ({100 * right / len(chosen):.1f} %): {told}; {others} others alike"
        )
        judged = [match for match in check_sketch(chosen, sketch_of(mixed)) if match.kind != "unknown"]
        right = sum(match.kind in DIRTY for match in judged)
        print(f"{kind}, by a sketch: {right} of {len(judged)} long enough for one ({100 * right / len(judged):.1f} %)")


if __name__ == "__main__":
    run(main)

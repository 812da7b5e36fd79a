"""How fast are texts cleaned? Megabytes a second of one core, all steps of the chain: reading, HTML and boilerplate,
characters, wrapped lines, splitting, filters, test items, personal data, exact and near-duplicates.

    python benchmarks/cleaning_speed.py
    python benchmarks/cleaning_speed.py --train_file_dir books/,leaflets.jsonl --tests exam.csv
"""

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from suwen.command_line import build_parser, flag, run, split_dataclasses


@dataclass
class SpeedArguments:
    train_file_dir: str = flag("", "files with `text` (articles on an invented graph, made here)")
    tests: str = flag("data/evaluation", "test files, in whose items nothing may be trained")


def main(argv: list[str] | None = None) -> None:
    parsed = build_parser(__doc__ or "", SpeedArguments).parse_args(argv)
    (given,) = split_dataclasses(parsed, SpeedArguments)
    from suwen.cleaning import CleaningReport, CleaningRules, clean_rows
    from suwen.loading import load_rows
    from suwen.mixing import test_questions
    from suwen.near_duplicates import TestItems
    from suwen.readers import parse_sources
    from tools.build_data import main as build

    with tempfile.TemporaryDirectory() as scratch:
        folder = given.train_file_dir
        if not folder:
            build(["--recipe", "fictional", "--size", "400", "--passes", "20", "--output_dir", scratch])
            folder = f"{scratch}/pretrain"
        size = sum(file.stat().st_size for source in parse_sources(folder) for file in source.files) / 1e6
        tests = TestItems(test_questions(parse_sources(given.tests), lambda *_: None))
        report = CleaningReport()
        began = time.process_time()
        kept = sum(1 for _ in clean_rows(load_rows(folder, "text"), CleaningRules(), report, 1, tests))
        seconds = time.process_time() - began
    print(f"{size:.1f} MB, {report.rows_in:,} texts, {kept:,} kept: {size / seconds:.1f} MB/s of a core")


if __name__ == "__main__":
    run(main)

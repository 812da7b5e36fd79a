"""An evaluation folder as it is read back: the header of the run, and the records of every item."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suwen.benchmarks import TASKS
from suwen.benchmarks.task import MODES, Record


@dataclass(frozen=True)
class Run:
    """One evaluation folder."""

    name: str
    folder: Path
    header: dict[str, Any]
    records: dict[tuple[str, str], list[Record]]  # by task and mode


def load_run(folder: str | Path) -> Run:
    """Read an evaluation folder.

    Raises:
        ValueError: there are no records in it, or a row of them cannot be read.
    """
    folder = Path(folder)
    if not (folder / "records").is_dir() and (folder / "eval" / "records").is_dir():
        folder = folder / "eval"  # the stage was named
    records: dict[tuple[str, str], list[Record]] = {}
    for path in sorted((folder / "records").glob("*.jsonl")):
        task, _, mode = path.name.removesuffix(".jsonl").rpartition(".")
        if task not in TASKS or mode not in MODES:
            continue
        rows = []
        with open(path, encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                try:
                    rows.append(json.loads(line))
                except ValueError:
                    raise ValueError(
                        f"{path}, line {number}: not a record; the evaluation was cut off, give its command again"
                    ) from None
        if rows:
            records[task, mode] = rows
    if not records:
        raise ValueError(f"{folder}: found no records, expected the --output_dir of an evaluation")
    try:
        header = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        header = {}
    return Run(name_of(folder), folder, header, records)


def name_of(folder: Path) -> str:
    """outputs/sft/eval is shown as sft."""
    resolved = folder.resolve()
    return resolved.parent.name if resolved.name in ("eval", "evaluation") else resolved.name

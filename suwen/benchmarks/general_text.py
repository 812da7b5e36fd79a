"""The forgetting meter: how well a model still predicts general text. Beside it stand the non-medical questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from suwen.benchmarks.task import Candidates, Item, Record, Row, Task, text_of
from suwen.statistics import bootstrap_interval

VERSION = 1


def parse_text(row: Row) -> list[Item]:
    return [Item(text_of(row, ("text", "content"), "no text"), "")]


def whole_text(item: Item) -> Candidates:
    """The text itself is the only thing to say, behind nothing."""
    return Candidates("", (item.question,), ("text",))


def measure_text(item: Item, logps: Sequence[float]) -> Record:
    return {"characters": len(item.question), "bits": -float(logps[0]) / math.log(2)}


def summarise_text(records: Sequence[Record]) -> dict[str, Any]:
    """Bits per character: unlike perplexity per token it can be compared between tokenizers."""
    rows: np.ndarray = np.array([[record["bits"], record["characters"]] for record in records])
    [(low, high)] = bootstrap_interval(rows, lambda means: means[:, :1] / means[:, 1:])
    bits = rows[:, 0].sum() / rows[:, 1].sum()
    perplexity = {"value": float(2**bits)} | {"low": float(2**low), "high": float(2**high)}
    return {
        "n": len(records),
        "metrics": {
            "bits per character": {"value": float(bits), "low": low, "high": high},
            "perplexity per character": perplexity,
        },
    }


def unasked(item: Item, answer: str = "") -> Any:
    raise AssertionError("this task has no generate mode")


GENERAL_TEXT = Task(
    name="general_text",
    title="General text (forgetting meter)",
    version=VERSION,
    parse=parse_text,
    ask=unasked,
    judge=unasked,
    summarise=summarise_text,
    headline="bits per character",
    paired="bits",
    modes=("likelihood",),
    candidates=whole_text,
    choose=measure_text,
    default_file="general_text.txt",
    patterns=("*general_text*",),
    lower_is_better=True,
    source="own set by default; any file of texts",
)

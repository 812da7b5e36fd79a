"""What a benchmark is: items read from a user's file, a prompt, a target and a metric, all under one version."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from suwen.formats import BadRow
from suwen.readers import Refusal, file_kind, find_encoding, read_records
from suwen.statistics import wilson_interval

MODES = ("likelihood", "generate")
TOO_LONG = "too long for the model's window"  # a finish_reason; such a question counts as answered wrongly

Row = dict[str, Any]
Record = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """One question. `target` is what the task's metric knows: letters, a reference text, a list of terms."""

    question: str
    target: Any
    options: dict[str, str] = field(default_factory=dict)  # letter -> text, for choice questions
    multiple: bool | None = None  # whether several letters may be right; None where the benchmark does not say
    groups: dict[str, str] = field(default_factory=dict)  # annotation -> value, for the breakdown
    prompt: str = ""  # what is asked where that is more than the question: with passages, say
    where: str = ""
    id: str = ""


@dataclass(frozen=True)
class Candidates:
    """What a model may say behind `prefix`; it says the one that it finds likeliest.

    `by_token` divides the log-probability by the number of tokens, for texts of different lengths.
    """

    prefix: str
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    by_token: bool = False
    chat: bool = False  # `prefix` is a user's message, the texts are two whole answers to it


@dataclass(frozen=True)
class PublishedRow:
    """A score that others reported, to stand beside ours; never part of a test, as the protocol is another one."""

    system: str
    scores: dict[str, float]  # percentages
    source: str


@dataclass(frozen=True)
class Task:
    """A benchmark. Raise `version` when prompt, target or metric change: records of two versions are never compared.

    `judge` turns an answer, and `choose` the log-probabilities of the candidates, into the fields of an item's record;
    `summarise` turns the records of one mode into scores. `headline` is the score that stages are compared by; the
    records hold it item by item under `paired`, as true and false or as numbers.
    """

    name: str
    title: str
    version: int
    parse: Callable[[Row], list[Item]]
    ask: Callable[[Item], str]
    judge: Callable[[Item, str], Record]
    summarise: Callable[[Sequence[Record]], dict[str, Any]]
    headline: str
    paired: str = "correct"
    modes: tuple[str, ...] = ("generate",)
    candidates: Callable[[Item], Candidates] | None = None
    choose: Callable[[Item, Sequence[float]], Record] | None = None
    complete: Callable[[list[Item]], list[Item]] = lambda items: items  # what needs all items at once
    default_file: str | None = None  # below data/evaluation, written by this project
    patterns: tuple[str, ...] = ()  # names of the user's files, for --data_dir
    splits: tuple[str, ...] = ("test", "val", "dev")  # of several files, those of the first split that is there
    max_new_tokens: int = 256  # of an answer, or more where `answer_room` says so
    answer_room: int = 0  # tokens beside the values of a list that is asked for, whose longest one has to fit
    must_end: bool = False  # an answer that goes on to the longest one is not right: a text about everything is none
    lower_is_better: bool = False
    published: tuple[PublishedRow, ...] = ()
    source: str = ""  # where the data is to be had, under which licence


TOKENS_A_CHARACTER = 2  # tokenizers with little Chinese need two


def longest_answer(task: Task, items: Sequence[Item]) -> int:
    """Tokens that an answer may have: the task's own, and enough for the longest list of values that is right."""
    if not task.answer_room:
        return task.max_new_tokens
    characters = max((len("、".join(item.target)) for item in items), default=0)
    return max(task.max_new_tokens, task.answer_room + TOKENS_A_CHARACTER * characters)


@dataclass
class Items:
    """The items of a task and what became of the rows that they were read from."""

    items: list[Item]
    files: dict[str, str]  # file -> encoding
    refused: list[Refusal]
    repeated: int  # items whose question and options occurred before

    def notes(self) -> list[str]:
        lines = [f"{file} ({encoding})" for file, encoding in self.files.items()]
        reasons = Counter(refusal.reason for refusal in self.refused)
        lines += [f"refused {count:,} x {reason}" for reason, count in sorted(reasons.items())]
        if self.refused:
            lines.append(f"the first: {self.refused[0].message}")
        return lines + ([f"{self.repeated:,} items occur more than once"] if self.repeated else [])


def item_id(item: Item) -> str:
    """Stable over files, orders and encodings: two runs are paired by it."""
    content = "\0".join([item.question, *item.options.values()])
    return hashlib.sha256(content.encode("utf-8", errors="surrogatepass")).hexdigest()[:16]


def read_items(task: Task, files: Sequence[Path], max_samples: int | None = None) -> Items:
    """Read the items of a task; a row that cannot be used is refused with its reason, never dropped in silence.

    Args:
        max_samples: as many items at most, the same choice each time and whatever the order of the files.

    Raises:
        ValueError: a file that cannot be read, or no usable row in any of them.
    """
    found = Items([], {}, [], 0)
    times: Counter[str] = Counter()
    for file in files:
        encoding = find_encoding(file)
        found.files[str(file)] = encoding.label if encoding else (file_kind(file) or "").lstrip(".")
        for record in read_records(file, encoding):
            if isinstance(record, Refusal):
                found.refused.append(record)
                continue
            where, row = record
            try:
                items = task.parse(row if isinstance(row, dict) else {"text": row})
            except BadRow as error:
                found.refused.append(Refusal(where, error.reason, f"{where}: {error}", row))
                continue
            for item in items:
                identity = item_id(item)
                times[identity] += 1
                if times[identity] > 1:
                    found.repeated += 1
                    identity = f"{identity}#{times[identity]}"
                groups = {**item.groups, **({"file": file.stem} if len(files) > 1 else {})}
                found.items.append(replace(item, where=where, id=identity, groups=groups))
    if not found.items:
        reasons = Counter(refusal.reason for refusal in found.refused)
        raise ValueError(
            f"{', '.join(map(str, files))}: no usable row for the task {task.name} "
            f"({', '.join(f'{count} x {reason}' for reason, count in reasons.items()) or 'no rows'}); "
            f"{found.refused[0].message if found.refused else 'see data/evaluation/README.md for the formats'}"
        )
    found.items = task.complete(found.items)
    if max_samples is not None and len(found.items) > max_samples:
        digests = [hashlib.sha256(item.id.encode()).digest() for item in found.items]
        order = sorted(range(len(digests)), key=digests.__getitem__)
        found.items = [found.items[i] for i in sorted(order[:max_samples])]
    return found


def text_of(row: Row, names: Sequence[str], reason: str) -> str:
    """The text under the first of these names that has any.

    Raises:
        BadRow: none has, for `reason`.
    """
    for name in names:
        value = row.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = f"{value:g}" if isinstance(value, float) or abs(value) < 10**15 else str(value)
        if isinstance(value, str) and value.strip():
            return value.strip()
        if isinstance(value, list) and value:
            value = value[0] if not isinstance(value[0], list) else (value[0][0] if value[0] else "")
            if isinstance(value, str) and value.strip():
                return value.strip()
    raise BadRow(reason, f"found the keys {', '.join(map(str, row))}, expected text under {' or '.join(names)}")


def lower_keys(row: Row) -> Row:
    return {str(key).strip().lower(): value for key, value in row.items() if value is not None}


def rate(successes: int, n: int) -> dict[str, float | int]:
    """A percentage with its Wilson interval."""
    low, high = wilson_interval(successes, n)
    return {"value": 100 * successes / n if n else 0.0, "low": 100 * low, "high": 100 * high, "n": n}

"""What of a graph's facts has gone into a model: the evaluation files of tools/build_data.py.

Groups A (facts in pretraining and SFT), B (in pretraining alone) and C (in neither) are tasks of their own, so that
each is tested by itself: recall in B shows that pretraining, not SFT, carried a fact; recall in C would show a leak.
A model that has seen no question yet shows what it knows by choice and text, in likelihood mode. Tasks of their own
ask the same with passages (those that retrieval finds; the right one among others), from values back to the entities,
and as an exam.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from suwen.benchmarks.choice import parse_choice as parse_exam
from suwen.benchmarks.exams import EXAM
from suwen.benchmarks.facts import add_distractors, judge_fact, parse_fact
from suwen.benchmarks.general_text import measure_text, summarise_text, unasked, whole_text
from suwen.benchmarks.task import Candidates, Item, Record, Row, Task, rate, text_of
from suwen.benchmarks.terms import named, normalise_term
from suwen.formats import BadRow
from suwen.retrieval.grounding import with_passages
from suwen.retrieval.passages import text_passage
from suwen.statistics import bootstrap_interval

VERSION = 1
GROUPS = "ABC"
SOURCE = "tools/build_data.py writes it"
APART = ("retrieved", "open_book", "reverse_recall", "graph_exam")  # sets of their own, not in "injection"
KINDS = ("choice", "recall", "preference", "statements", *APART)


def kind_of(name: str) -> str:
    """Of a task of one group."""
    return name.rpartition("_")[0]


def of_group(parse: Callable[[Row], list[Item]], group: str, row: Row) -> list[Item]:
    """The items of a row of this group; rows without a group belong to A."""
    return parse(row) if row.get("group", "A") == group else []


def groups_of(row: Row) -> dict[str, str]:
    return {name: str(row[name]) for name in ("relation", "fault") if row.get(name)}


# ------------------------------------------------------------------------------------------------------------- choice


def parse_choice(row: Row) -> list[Item]:
    """{"Question": beginning of a statement, "Options": "A ...\\nB ...", "Answer": letter, "Suffix": its end}."""
    stem, answer = text_of(row, ("Question",), "no question"), text_of(row, ("Answer",), "no answer")
    suffix = str(row.get("Suffix", ""))
    options = {line[:1]: line[2:] + suffix for line in text_of(row, ("Options",), "no options").splitlines()}
    if answer not in options:
        raise BadRow("answer not among the options", f"found {answer!r}, expected one of {', '.join(options)}")
    return [Item(stem, answer, options, groups=groups_of(row))]


def endings(item: Item) -> Candidates:
    return Candidates(item.question, tuple(item.options.values()), tuple(item.options))


def choose_ending(item: Item, logps: Sequence[float]) -> Record:
    found = {letter: round(float(logp), 4) for letter, logp in zip(item.options, logps, strict=True)}
    choice = max(found, key=lambda letter: found[letter])
    return {"choice": choice, "correct": choice == item.target, "logps": found}


def summarise_choice(records: Sequence[Record]) -> dict[str, Any]:
    n = len(records)
    chance = sum(1 / len(record["options"]) for record in records) / n
    accuracy = rate(sum(record["correct"] for record in records), n)
    return {"n": n, "metrics": {"accuracy": accuracy}, "floors": {"random choice": 100 * chance}}


# ------------------------------------------------------------------------------------------------------------- recall


def judge_recall(item: Item, answer: str) -> Record:
    """Right where every value is named, and none of the wrong ones that stand beside the item."""
    found = judge_fact(item, answer)
    return found | {"correct": found["correct"] and all(named(v, normalise_term(answer)) for v in item.target)}


def summarise_recall(records: Sequence[Record]) -> dict[str, Any]:
    n = len(records)
    right = sum(record["correct"] for record in records)
    empty = sum(not record["response"].strip() for record in records)
    return {"n": n, "metrics": {"recall": rate(right, n), "wrong answers": rate(n - right - empty, n)}, "empty": empty}


def parse_retrieved(row: Row) -> list[Item]:
    """A row of recall with "passages": [{"title", "text"}], and in "gold" the place of the right one or null."""
    (item,) = parse_fact(row)
    try:
        passages = [text_passage(found["title"], found["text"]) for found in row["passages"]]
        gold = row["gold"]
    except (KeyError, TypeError):
        raise BadRow("no passages", f"found the keys {', '.join(row)}, expected passages and gold") from None
    (message,) = with_passages([{"role": "user", "content": item.question}], passages)
    groups = item.groups | {"right passage": "not found" if gold is None else "found"}
    return [replace(item, prompt=message["content"], groups=groups)]


def parse_graph_exam(row: Row) -> list[Item]:
    """A row in CMExam's form with its relation."""
    item = parse_exam(row)
    return [replace(item, groups=item.groups | groups_of(row))]


# --------------------------------------------------------------------------------------------------------- preference


def parse_preference(row: Row) -> list[Item]:
    """{"question", "chosen", "rejected", "fault"}."""
    answers = {name: text_of(row, (name,), f"no {name} answer") for name in ("chosen", "rejected")}
    return [Item(text_of(row, ("question",), "no question"), "chosen", answers, groups=groups_of(row))]


def answers_of(item: Item) -> Candidates:
    return Candidates(item.question, tuple(item.options.values()), tuple(item.options), chat=True)


def summarise_preference(records: Sequence[Record]) -> dict[str, Any]:
    metrics: dict[str, Any] = {"accuracy": rate(sum(record["correct"] for record in records), len(records))}
    margins = [r["logps"]["chosen"] - r["logps"]["rejected"] for r in records if r["logps"]]
    if margins:
        [(low, high)] = bootstrap_interval(np.array(margins)[:, None])
        metrics["margin in nats"] = {"value": sum(margins) / len(margins), "low": low, "high": high}
    return {"n": len(records), "metrics": metrics}


# --------------------------------------------------------------------------------------------------------------- text


def parse_statement(row: Row) -> list[Item]:
    """The statement that a row of choice.jsonl makes with its right ending."""
    (item,) = parse_choice(row)
    return [Item(item.question + item.options[item.target], "", groups=item.groups)]


def injection_tasks() -> list[Task]:
    tasks = []
    for group in GROUPS:
        common: dict[str, Any] = {"version": VERSION, "source": SOURCE}
        likelihood = common | {"modes": ("likelihood",), "ask": unasked, "judge": unasked}
        tasks.append(Task(
            name=f"choice_{group}", title=f"Facts of group {group}: choice of endings", **likelihood,
            parse=partial(of_group, parse_choice, group), candidates=endings, choose=choose_ending,
            summarise=summarise_choice, headline="accuracy", patterns=("choice.jsonl",),
        ))  # fmt: skip
        for kind, title, parse in (
            ("recall", "recall", parse_fact),
            ("retrieved", "recall with what retrieval finds", parse_retrieved),
            ("open_book", "recall with the right passage among others", parse_retrieved),
            ("reverse_recall", "recall from a value to its entities", parse_fact),
        ):
            tasks.append(Task(
                name=f"{kind}_{group}", title=f"Facts of group {group}: {title}", **common,
                parse=partial(of_group, parse, group), complete=add_distractors,
                ask=lambda item: item.prompt or item.question, judge=judge_recall, summarise=summarise_recall,
                headline="recall", patterns=(f"{kind}.jsonl",), max_new_tokens=32, answer_room=24, must_end=True,
            ))  # fmt: skip
        tasks.append(replace(
            EXAM, name=f"graph_exam_{group}", title=f"Facts of group {group}: exam in CMExam's form", **common,
            parse=partial(of_group, parse_graph_exam, group), default_file=None, patterns=("exam.jsonl",),
        ))  # fmt: skip
        tasks.append(Task(
            name=f"preference_{group}", title=f"Facts of group {group}: right against faulty answers", **likelihood,
            parse=partial(of_group, parse_preference, group), candidates=answers_of, choose=choose_ending,
            summarise=summarise_preference, headline="accuracy", patterns=("preference.jsonl",),
        ))  # fmt: skip
        tasks.append(Task(
            name=f"statements_{group}", title=f"Facts of group {group}: text in held-out wordings", **likelihood,
            parse=partial(of_group, parse_statement, group), candidates=whole_text, choose=measure_text,
            summarise=summarise_text, headline="bits per character", paired="bits", lower_is_better=True,
            patterns=("choice.jsonl",),
        ))  # fmt: skip
    return sorted(tasks, key=lambda task: KINDS.index(kind_of(task.name)))


INJECTION = injection_tasks()

"""Closed-book recall of single facts of a knowledge graph.

In likelihood mode the right answer competes with other answers of the same relation, so that a model that has only read
texts, and never a question, can show what it knows. In generate mode an answer is right when it names the fact and none
of those other answers: one that lists everything knows nothing.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from suwen.benchmarks.task import MODES, Candidates, Item, Record, Row, Task, lower_keys, rate, text_of
from suwen.benchmarks.terms import named, normalise_term, term_list
from suwen.formats import BadRow

VERSION = 1
DISTRACTORS = 3
LETTERS = "ABCD"


def parse_fact(row: Row) -> list[Item]:
    """{"question", "answer" (one wording or a list of them), "relation", "group"}."""
    fields = lower_keys(row)
    question = text_of(fields, ("question", "问", "问题"), "no question")
    answers = term_list(fields.get("answer") or fields.get("answers") or fields.get("答"))
    if not answers:
        raise BadRow("no answer", f"found the keys {', '.join(fields)}, expected answer")
    groups = {name: str(fields[name]) for name in ("relation", "group") if fields.get(name)}
    return [Item(question, answers, groups=groups)]


def add_distractors(items: list[Item]) -> list[Item]:
    """Put three other answers of the same relation beside each right one, drawn by the item's own seed."""
    by_relation: dict[str, dict[str, None]] = defaultdict(dict)
    for item in items:
        by_relation[item.groups.get("relation", "")][item.target[0]] = None
    completed = []
    for item in items:
        right = {normalise_term(answer) for answer in item.target}
        others = [
            other for other in by_relation[item.groups.get("relation", "")]
            if not any(normalise_term(other) in answer or answer in normalise_term(other) for answer in right)
        ]  # fmt: skip
        draw = random.Random(item.id)
        chosen = [item.target[0], *draw.sample(others, min(DISTRACTORS, len(others)))]
        draw.shuffle(chosen)
        completed.append(replace(item, options=dict(zip(LETTERS, chosen, strict=False))))
    return completed


def fact_candidates(item: Item) -> Candidates:
    texts = tuple(item.options.values())
    return Candidates(f"问题：{item.question}\n答案：", texts, texts, by_token=True)


def choose_fact(item: Item, logps: Sequence[float]) -> Record:
    texts = list(item.options.values())
    best = texts[max(range(len(texts)), key=lambda i: logps[i])]
    logps = [round(float(logp), 4) for logp in logps]
    return {"choice": best, "correct": best == item.target[0], "logps": dict(zip(texts, logps, strict=True))}


def judge_fact(item: Item, answer: str) -> Record:
    normal = normalise_term(answer)
    hit = any(named(term, normal) for term in item.target)
    others = [text for text in item.options.values() if text != item.target[0] and named(text, normal)]
    return {"correct": hit and not others, "named": hit, "others": others}


def summarise_facts(records: Sequence[Record]) -> dict[str, Any]:
    n = len(records)
    found: dict[str, Any] = {"metrics": {"recall": rate(sum(r["correct"] for r in records), n)}, "n": n}
    if all("named" in record for record in records):
        listed = sum(record["named"] and bool(record["others"]) for record in records)
        found["metrics"]["named among wrong ones"] = rate(listed, n)
        found["empty"] = sum(not record["response"].strip() for record in records)
    else:
        chance = sum(1 / max(len(record["options"]), 1) for record in records) / n
        found["floors"] = {"random choice": 100 * chance}
    return found


FACTS = Task(
    name="facts", title="Closed-book facts", version=VERSION, parse=parse_fact, complete=add_distractors,
    ask=lambda item: f"{item.question}\n请直接回答，不需要解释。", judge=judge_fact, summarise=summarise_facts,
    headline="recall", modes=MODES, candidates=fact_candidates, choose=choose_fact, default_file="facts.jsonl",
    patterns=("*facts*",), max_new_tokens=64, source="own set by default; any file of question, answer, relation",
)  # fmt: skip

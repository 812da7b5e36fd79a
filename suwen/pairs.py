"""Preference pairs: a right answer from the graph against one with a known fault; and pairs from scored answers.

The rejected answer has the wording of the chosen one wherever the fault is in its content, and its wrong values are
values of other entities: pairs whose rejected side is strange in style or made of random strings teach to avoid the
style, and recall falls while preference accuracy rises (measured; see tests/test_synthesis.py).
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from suwen.formats import BadRow
from suwen.knowledge_graph import Item
from suwen.phrasings import UNSAFE, UNSAFE_DRUG
from suwen.synthesis import (
    Row,
    Source,
    answer_wording,
    assistant,
    excludes_others,
    fill,
    questions_of,
    reading_example,
    reading_prompt,
    rng_of,
    row_of,
    turns,
    wrong_values,
)

# How much worse a fault makes an answer; the margin of its pair.
MARGINS = {
    "unsafe advice": 3.0,
    "wrong value": 2.0,
    "answer to another question": 2.0,
    "own wrong answer": 2.0,
    "one wrong value": 1.5,
    "invented extra": 1.5,
    "omission": 1.0,
    "repetition": 1.0,
}


# What answers a question on one of these may well answer one on another, too
AKIN = (
    {"treatment", "surgery", "drug"},
    {"contraindication", "population_warning", "precaution", "interaction"},
    {"symptom", "complication"},
    {"cause", "population"},
)
ONE_ASKED = re.compile("哪种|哪项|哪一|哪个|最")  # a question for one value, to which a part of the list is an answer


def pair_rows(entity: str, source: Source) -> Iterator[Row]:
    """Pairs for every item of an entity, faults in turn so that all kinds occur about as often as they can."""
    for index, item in enumerate(source.items[entity]):
        rng = rng_of(source.rules.seed, "pair", entity, item.relation)
        faults = possible_faults(item)
        rng.shuffle(faults)
        questions = list(questions_of(item, source, "preference"))
        rng.shuffle(questions)
        for number in range(source.rules.pairs_per_item):
            # half of the pairs get a wrong value and a quarter the answer to another question: these cost recall
            one = "one wrong value" if not item.prose and len(item.values) > 1 else "wrong value"
            kind = ("wrong value", "answer to another question", one, "")[(number + index) % 4]
            kind = kind or faults[number // 4 % len(faults)]
            if kind == "wrong value" and not excludes_others(item):
                kind = "answer to another question"
            pair = faulty_answer(kind, item, source, rng)
            if pair is not None:
                chosen, rejected = pair
                yield _row(fill(question_for(kind, questions, number), item), chosen, rejected, kind, item, source)


def question_for(kind: str, wordings: Sequence[str], number: int) -> str:
    """One of the question wordings; for an omission one that asks for all."""
    if kind == "omission":
        wordings = [wording for wording in wordings if not ONE_ASKED.search(wording)] or wordings
    return wordings[number % len(wordings)]


def possible_faults(item: Item) -> list[str]:
    """Faults beside a wrong answer. Clauses (usage, warnings) are no list to which something could be added."""
    faults = ["repetition", "unsafe advice"]
    if not item.prose and excludes_others(item) and not any("，" in value for value in item.values):
        faults.append("invented extra")
        if len(item.values) >= 3:
            faults.append("omission")
    return faults


def faulty_answer(kind: str, item: Item, source: Source, rng: random.Random) -> tuple[str, str] | None:
    """A right answer and one with the fault; None where no plausible wrong value is at hand."""
    wording = answer_wording(item, source, rng)
    chosen = fill(wording, item)
    values: Sequence[str] = ()  # of the rejected answer, in the same wording
    if not excludes_others(item) and kind in ("wrong value", "one wrong value"):
        return None
    if kind == "wrong value":
        values = _other_prose(item, source, rng) if item.prose else wrong_values(item, source, rng, len(item.values))
    elif kind == "one wrong value":
        place = rng.randrange(len(item.values))
        wrong = wrong_values(item, source, rng, 1)
        values = [*item.values[:place], *wrong, *item.values[place + 1 :]] if wrong else ()
    elif kind == "invented extra":
        extra = wrong_values(item, source, rng, max(1, len(item.values) // 2))
        values = rng.sample([*item.values, *extra], len(item.values) + len(extra)) if extra else ()
    elif kind == "omission":
        values = rng.sample(item.values, max(1, len(item.values) // 3))
    elif kind == "answer to another question":
        others = [
            other
            for other in source.items[item.entity.id]
            if other.relation != item.relation
            and other.prose == item.prose
            and not any({other.relation, item.relation} <= akin for akin in AKIN)
        ]
        values = rng.choice(others).values if others else ()
    elif kind == "repetition":
        return chosen, chosen * rng.randint(3, 4)
    else:
        assert kind == "unsafe advice", kind
        unsafe = UNSAFE_DRUG if item.entity.type == "药品" else UNSAFE
        return chosen, rng.choice(unsafe).replace("{e}", item.entity.name)
    rejected = fill(wording, item, values)
    return (chosen, rejected) if values and rejected != chosen else None


def _other_prose(item: Item, source: Source, rng: random.Random) -> Sequence[str]:
    """What is written under the same relation of another entity of the group; nothing if none was met in 20 draws."""
    group = source.groups[item.entity.id]
    for _ in range(20):
        other = rng.choice(source.others[item.relation])
        if other.prose and other.values != item.values and source.groups[other.entity.id] == group:
            return other.values
    return ()


def _row(question: str, chosen: str, rejected: str, kind: str, item: Item, source: Source) -> Row:
    content = {"prompt": turns(question), "chosen": assistant(chosen), "rejected": assistant(rejected)}
    return row_of("pair", source.groups[item.entity.id], [item], **content, margin=MARGINS[kind], fault=kind)


def reading_pair_rows(source: Source, count: int, groups: str = "AB") -> Iterator[Row]:
    """Reading questions whose rejected answer is a value from another passage: keeps retrieval alive under DPO."""
    heads = [head for head in source.items if source.groups[head] in groups]
    for number in range(count if heads else 0):
        rng = rng_of(source.rules.seed, "reading pair", number)
        passages, told = reading_example(source, rng, heads)
        fact, item = told[0], told[0].item
        prompt = reading_prompt(fact, passages, source, rng)
        rivals = [
            other.item.values
            for other in told
            if other.item.relation == item.relation and other.item.prose == item.prose
        ]
        tempting = [values for values in rivals if not set(values) & set(item.values)]
        wrong = rng.choice(tempting) if tempting else wrong_values(item, source, rng, len(item.values))
        if wrong and not item.prose and excludes_others(item):
            wording = answer_wording(item, source, rng)
            chosen, rejected = (fact.cite(fill(wording, item, values)) for values in (item.values, wrong))
            yield {**_row(prompt, chosen, rejected, "wrong value", item, source), "recipe": "reading pair"}


def own_answer_row(row: Row, answer: str, item: Item, source: Source) -> Row | None:
    """The pair from what a model itself said to a question on an item; None for a right answer and for none."""
    if not answer.strip() or holds_all(answer, item.values):
        return None
    question, chosen = (message["content"] for message in row["messages"])
    pair = _row(question, chosen, answer.strip(), "own wrong answer", item, source)
    return {**pair, "recipe": "own answer"}


def holds_all(answer: str, values: Sequence[str]) -> bool:
    """Whether an answer names every value, blind to white space and full stops."""
    text = "".join(answer.split())
    return all("".join(value.split()).rstrip("。") in text for value in values)


def scored_rows(records: Iterable[tuple[str, Any]], min_gap: float = 1.0) -> Iterator[Row | BadRow]:
    """Pairs from ranked or scored answers: the best one of a prompt against each that is at least `min_gap` worse.

    Args:
        records: (where, row); rows are {"prompt" | "question" | "messages", "responses": [...], "scores": [...]}, or
            {..., "ranked": [best, ..., worst]}, which counts a rank as one point. Rows that are pairs pass through.

    Yields:
        rows for the schema "preference"; a BadRow for a record of no such form.
    """
    for where, record in records:
        if not isinstance(record, dict):
            yield BadRow(
                "wrong schema", f"{where}: found {str(record)[:40]!r}, expected an object with a pair or scores"
            )
            continue
        if "rejected" in record or "response_rejected" in record:
            yield {**record, "recipe": "given pair", "where": where}
            continue
        answers: Any = record.get("responses") or record.get("answers") or record.get("ranked")
        scores: Any = record.get("scores")
        if "ranked" in record and isinstance(answers, list):
            scores = range(0, -len(answers), -1)
        prompt = record.get("prompt") or record.get("question") or record.get("messages")
        texts = isinstance(answers, list) and all(isinstance(answer, str) for answer in answers)
        counted = isinstance(scores, (list, range)) and texts and len(scores) == len(answers)
        if not prompt or not counted:
            found = ", ".join(record)
            yield BadRow("no scored answers", f"{where}: found {found}, expected prompt, responses, scores, or ranked")
            continue
        try:
            ranked = sorted(zip(map(float, scores), answers, strict=True), key=lambda pair: -pair[0])
        except (TypeError, ValueError):
            ranked = []
        if not all(math.isfinite(score) for score, _ in ranked) or not ranked:
            yield BadRow("score is not a number", f"{where}: found {scores!r}, expected numbers")
            continue
        (best, chosen), *rest = ranked
        for score, answer in itertools.islice(rest, 4):
            if best - score >= min_gap and answer.strip() != chosen.strip():
                turn = prompt if isinstance(prompt, list) else turns(prompt)
                row = {"prompt": turn, "chosen": assistant(chosen), "rejected": assistant(answer)}
                yield {**row, "margin": best - score, "recipe": "scored answers", "facts": [], "where": where}

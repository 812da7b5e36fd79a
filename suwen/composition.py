"""Whole data sets: what each recipe makes of a graph and of other people's files, by stage.

Everything is a stream of (stage, row); stages are pretrain, sft, preference and evaluation.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from tqdm import tqdm

from suwen.cleaning import CleaningRules, map_texts, texts_of
from suwen.data_folder import SCHEMAS
from suwen.fact_items import (
    choice_items,
    corpus_rows,
    exam_items,
    open_book_items,
    preference_items,
    recall_items,
    reverse_items,
)
from suwen.formats import BadRow, canonical_rows
from suwen.mixing import Refuse, as_text, document_rows, read_rows, record_rows, records_of, weighted
from suwen.near_duplicates import TestItems, normal_form
from suwen.pairs import own_answer_row, pair_rows, reading_pair_rows, scored_rows
from suwen.parallel import batched, map_in_order
from suwen.personal_data import find_personal_data, mask_personal_data
from suwen.readers import Source as FileSource
from suwen.synthesis import (
    Row,
    Source,
    article_rows,
    dialogue_rows,
    exam_rows,
    question_rows,
    reading_rows,
    replay_rows,
    reverse_rows,
    rng_of,
)

# What is made of a graph. ChiMed has its graphs in pretraining alone, QiZhen's records become instructions alone.
PARTS = {
    "graph": ("pretrain", "sft", "exams", "preference"),
    "fictional": ("pretrain", "sft", "exams", "preference"),
    "chimed": ("pretrain",),
    "qizhen": ("sft",),
}
ENTITIES_AT_ONCE, ROWS_AT_ONCE = 50, 2000


@dataclass(frozen=True)
class Shares:
    """How much of what goes into the mixture."""

    reading: float = 0.2  # reading examples among the rows of SFT and of pairs
    reading_text: float = 0.2  # among those of pretraining
    replay: float = 0.1  # pretraining text among the rows of SFT
    evaluated: int = 300  # entities of each group that evaluation items are made of; the corpus has all


# --------------------------------------------------------------------------------------------------------------- graph


def graph_rows(
    source: Source, reading: Source, parts: tuple[str, ...], shares: Shares, num_proc: int = 1
) -> Iterator[tuple[str, Row]]:
    """Everything that is made of a graph; the number of processes does not change it.

    Args:
        reading: the graph of the reading examples: `source` itself, or a fictional one apart from it.
        parts: of PARTS.
    """
    heads = list(source.items)
    evaluated = _evaluated(source, shares.evaluated)
    chunks = [heads[at : at + ENTITIES_AT_ONCE] for at in range(0, len(heads), ENTITIES_AT_ONCE)]
    counts: Counter[str] = Counter()
    with tqdm(total=len(heads), desc="synthesis", unit=" entities", disable=None, leave=False) as bar:
        for chunk in map_in_order(_entity_rows, chunks, min(num_proc, len(chunks)), source, parts, evaluated):
            counts.update(stage for stage, _ in chunk)
            yield from chunk
            bar.update(ENTITIES_AT_ONCE)
    if "sft" in parts:
        for relation, value in source.heads:
            for row in reverse_rows(relation, value, source):
                counts["sft"] += 1
                yield "sft", row
            if evaluated.issuperset(source.heads[relation, value]):
                yield from (("evaluation", row) for row in reverse_items(relation, value, source))
    number = {stage: _beside(counts[stage], shares.reading) for stage in ("sft", "preference")}
    number["pretrain"] = _beside(counts["pretrain"], shares.reading_text)
    yield from (("pretrain", row) for row in reading_rows(reading, number["pretrain"], "text", "AB"))
    yield from (("sft", row) for row in reading_rows(reading, number["sft"], "messages", "A"))
    yield from (("preference", row) for row in reading_pair_rows(reading, number["preference"], "A"))
    if shares.replay and {"pretrain", "sft"} <= set(parts):
        trained = [head for head in heads if source.groups[head] in "AB"]
        wanted = max(1, _beside(counts["sft"], shares.replay))
        every = max(1, round(source.rules.passes * len(trained) / wanted))
        replays = itertools.chain.from_iterable(replay_rows(head, source) for head in trained)
        yield from (("sft", row) for row in itertools.islice(replays, 0, None, every))


def with_own_answers(
    rows: Iterable[tuple[str, Row]], answers: dict[str, str], source: Source, refuse: Refuse
) -> Iterator[tuple[str, Row]]:
    """All rows, and a pair for every question of SFT that the model answered wrongly; answers are by question."""
    items = {item.facts: item for items in source.items.values() for item in items}
    left = dict(answers)
    for stage, row in rows:
        yield stage, row
        if row["recipe"] == "question" and (answer := left.pop(row["messages"][0]["content"], None)) is not None:
            pair = own_answer_row(row, answer, items[tuple(row["facts"])], source)
            if pair is not None:
                yield "preference", pair
    for question in left:
        refuse("--own_answers", "answer to a question of no row", question)


def without_tests(
    rows: Iterable[tuple[str, Row]], tests: TestItems, leave_out: Callable[[str, Row, str], None]
) -> Iterator[tuple[str, Row]]:
    """The rows whose text holds no test item; evaluation rows pass. `leave_out` takes (stage, row, reason)."""
    for batch in batched(rows, ROWS_AT_ONCE):
        forms = [normal_form("\n".join(texts_of(row))) if stage in SCHEMAS else "" for stage, row in batch]
        held = tests.overlaps(forms) >= CleaningRules.max_test_overlap
        for (stage, row), holds in zip(batch, held.tolist(), strict=True):
            if holds:
                leave_out(stage, row, "holds a test item")
            else:
                yield stage, row


def look_for_personal_data(
    rows: Iterable[tuple[str, Row]], mask: bool, found: Counter[str]
) -> Iterator[tuple[str, Row]]:
    """All rows; personal data in those of training is counted by kind, and replaced if that is asked for."""
    for stage, row in rows:
        if stage in SCHEMAS and (kinds := [item.kind for text in texts_of(row) for item in find_personal_data(text)]):
            found.update(kinds)
            row = map_texts(row, mask_personal_data) if mask else row
        yield stage, row


def _beside(count: int, share: float) -> int:
    """How many rows make up `share` of a whole whose rest is `count`."""
    return round(count * share / (1 - share))


def _evaluated(source: Source, most: int) -> set[str]:
    """A seeded choice of at most `most` entities of each group."""
    heads = sorted(source.items, key=lambda head: rng_of(source.rules.seed, "evaluated", head).random())
    groups = [[head for head in heads if source.groups[head] == group] for group in "ABC"]
    return {head for members in groups for head in members[:most]}


def _entity_rows(
    entities: list[str], source: Source, parts: tuple[str, ...], evaluated: set[str]
) -> list[tuple[str, Row]]:
    """What is made of some entities; runs in a worker. A: everything, B: pretraining, C: the corpus alone."""
    makers: list[tuple[str, str, str, Callable[[str, Source], Iterator[Row]]]] = [
        ("pretrain", "pretrain", "AB", article_rows),
        ("sft", "sft", "A", question_rows),
        ("sft", "sft", "A", dialogue_rows),
        ("exams", "sft", "A", exam_rows),
        ("preference", "preference", "A", pair_rows),
    ]
    rows: list[tuple[str, Row]] = []
    for entity in entities:
        for part, stage, groups, make in makers:
            if part in parts and source.groups[entity] in groups:
                rows += [(stage, row) for row in make(entity, source)]
        items = (
            (recall_items, choice_items, preference_items, open_book_items, exam_items) if entity in evaluated else ()
        )
        rows += [("evaluation", row) for make in (*items, corpus_rows) for row in make(entity, source)]
    return rows


# --------------------------------------------------------------------------------------------------------------- files


def file_rows(recipe: str, sources: dict[str, list[FileSource]], refuse: Refuse, seed: int) -> dict[str, Iterator[Row]]:
    """Rows of other people's files by stage, as the recipe composes them; not cleaned yet.

    Args:
        sources: by kind: text, qa, dialogues, general, exams, preference.
        refuse: called for each row that cannot be used.
    """

    def rows(kind: str, name: str) -> Iterator[Row]:
        for source in sources[kind]:
            found = document_rows if kind == "text" else partial(read_rows, schema="conversation")
            yield from weighted(found(source, recipe=name, refuse=refuse), source.weight, seed)

    def texts(kind: str, name: str) -> Iterator[Row]:
        return ({**as_text(row), "recipe": name} for row in rows(kind, name))

    def records() -> Iterator[Row]:
        for source in sources["dialogues"]:
            yield from weighted(record_rows(source, refuse), source.weight, seed)

    text = rows("text", "text")
    pretrain: Iterable[Row] = text
    sft: tuple[Iterable[Row], ...] = (rows("dialogues", "recorded dialogue"), rows("general", "general"))
    sft += (rows("exams", "exam"),)
    if recipe == "chimed":
        parts = (texts("qa", "qa text"), texts("exams", "exam text"), text, texts("dialogues", "dialogue text"))
        pretrain = itertools.chain(*parts)
    else:
        sft = (rows("qa", "qa"), *sft)
    if recipe == "qizhen":
        sft += (records(),)
    pairs = (row for source in sources["preference"] for row in _pairs(source, refuse, seed))
    return {"pretrain": iter(pretrain), "sft": itertools.chain(*sft), "preference": pairs}


def _pairs(source: FileSource, refuse: Refuse, seed: int) -> Iterator[Row]:
    """Canonical pairs of a file of pairs or of scored answers."""
    for row in scored_rows(records_of(source, refuse)):
        try:
            if isinstance(row, BadRow):
                raise row
            (pair,) = canonical_rows(row, "preference", {}, Counter())
        except BadRow as error:
            refuse(source.path if isinstance(row, BadRow) else row["where"], error.reason, str(error))
            continue
        named = {**pair, "where": row["where"], "recipe": row["recipe"], "facts": []}
        yield from weighted([named], source.weight, seed)


def given_answers(sources: list[FileSource], refuse: Refuse) -> dict[str, str]:
    """What a model said, by question: rows of `inference.py --with_prompt`."""
    answers: dict[str, str] = {}
    for source in sources:
        for where, row in records_of(source, refuse):
            if isinstance(row, dict) and isinstance(row.get("prompt"), str) and isinstance(row.get("response"), str):
                answers[row["prompt"]] = row["response"]
            else:
                refuse(where, "no prompt and response", row)
    return answers

"""Evaluation of what a graph's facts a model knows: recall, likelihood choice, open book and exam items; and leaks.

All wordings are held out from training. Every item names its facts, group and relation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from suwen.cleaning import texts_of
from suwen.near_duplicates import TestItems, normal_form
from suwen.pairs import faulty_answer, possible_faults
from suwen.phrasings import phrasings_of
from suwen.synthesis import (
    LETTERS,
    Row,
    Source,
    document,
    exam_question,
    fill,
    has_options,
    may_be_asked_back,
    rng_of,
    row_of,
    wordings_of,
    wrong_values,
)

MAX_OVERLAP = 0.6  # of an evaluation question's 13-grams in one training row
WORDING_NGRAM = 8
PLACEHOLDER = re.compile(r"\{[ev]\}")
SENTENCE_END = re.compile(r"[。！？\n]")


def recall_items(entity: str, source: Source) -> Iterator[Row]:
    """Closed-book questions in held-out wordings: {"id", "question", "answers"}; right if every answer is named."""
    for item in source.items[entity]:
        if not item.prose:
            for number, wording in enumerate(wordings_of(item).held_out_questions):
                yield _item("recall", number, item, source, question=fill(wording, item), answers=list(item.values))


def reverse_items(relation: str, value: str, source: Source) -> Iterator[Row]:
    """Held-out questions from a value to its entities, where these are few and all of one group."""
    heads = source.heads[relation, value]
    groups = {source.groups[head] for head in heads}
    if len(groups) > 1 or not may_be_asked_back(relation, value, source):
        return
    names = [source.graph.entities[head].name for head in heads]
    facts = [fact for head in heads for item in source.items[head] if item.relation == relation for fact in item.facts]
    for number, wording in enumerate(phrasings_of(relation).held_out_reverse_questions):
        yield {
            "id": f"{heads[0]}.{relation}.reverse.{number}",
            **{"question": wording.replace("{v}", value), "answers": names},
            **{"relation": relation, "group": next(iter(groups)), "recipe": "reverse recall", "facts": facts},
        }


def choice_items(entity: str, source: Source) -> Iterator[Row]:
    """Four ways to end a held-out statement, for a model that has seen no questions; scored by likelihood.

    In CMExam's form with a `Suffix`: the text scored is Question + option + Suffix. Chance is 25 %.
    """
    for item in source.items[entity]:
        if not has_options(item):
            continue
        for number, wording in enumerate(wordings_of(item).held_out_statements):
            rng = rng_of(source.rules.seed, "choice", entity, item.relation, number)
            wrong = wrong_values(item, source, rng, 3)
            if len(wrong) < 3:
                continue
            right = rng.choice(item.values)
            options = [right, *wrong]
            rng.shuffle(options)
            stem, _, suffix = fill(wording, item, ["\0"]).partition("\0")
            lines = "\n".join(f"{letter} {value}" for letter, value in zip(LETTERS, options, strict=False))
            content = {"Question": stem, "Options": lines, "Answer": LETTERS[options.index(right)], "Suffix": suffix}
            yield _item("choice", number, item, source, **content)


def open_book_items(entity: str, source: Source) -> Iterator[Row]:
    """The recall questions with passages on the entity and on others with similar names: a ceiling for any retriever.

    Adds "passages", each with its title and text, and "gold", the place of the right one.
    """
    for row in recall_items(entity, source):
        rng = rng_of(source.rules.seed, "open book", row["id"])
        near = source.alike.get(entity, ())
        shown = [entity, *rng.sample(near, min(source.rules.num_passages - 1, len(near)))]
        rng.shuffle(shown)
        passages = [{"title": found.title, "text": found.text} for found in (document(e, source) for e in shown)]
        name = row["id"].replace(".recall.", ".open_book.")
        yield {**row, "id": name, "recipe": "open book", "passages": passages, "gold": shown.index(entity)}


def exam_items(entity: str, source: Source) -> Iterator[Row]:
    """Choice questions of five options with held-out stems, in CMExam's form."""
    for item in source.items[entity]:
        rng = rng_of(source.rules.seed, "held-out exam", entity, item.relation)
        exam = exam_question(item, source, rng, wordings_of(item).held_out_exam_stems)
        if exam is not None:
            content = {"Question": exam.question, "Options": exam.options, "Answer": exam.answer}
            yield _item("exam", 0, item, source, **content, Explanation=exam.explanation)


def preference_items(entity: str, source: Source) -> Iterator[Row]:
    """A right answer and a faulty one to a held-out question: one with a wrong value, and one with another fault."""
    for item in source.items[entity]:
        if item.prose:
            continue
        rng = rng_of(source.rules.seed, "held-out pair", entity, item.relation)
        questions = wordings_of(item).held_out_questions
        for number, fault in enumerate(("wrong value", rng.choice(possible_faults(item)))):
            if pair := faulty_answer(fault, item, source, rng):
                content = {"question": fill(questions[number % len(questions)], item), "fault": fault}
                yield _item("preference", number, item, source, **content, chosen=pair[0], rejected=pair[1])


def corpus_rows(entity: str, source: Source) -> Iterator[Row]:
    """The entity's document for retrieval: {"id", "title", "content"}; groups A, B and C."""
    found, items = document(entity, source), source.items[entity]
    yield {"id": entity, **row_of("passage", source.groups[entity], items, title=found.title, content=found.text)}


def _item(recipe: str, number: int, item: Any, source: Source, **content: Any) -> Row:
    return {
        "id": f"{item.entity.id}.{item.relation}.{recipe.replace(' ', '_')}.{number}",
        **content,
        **{"relation": item.relation, "group": source.groups[item.entity.id], "recipe": recipe},
        "facts": list(item.facts),
    }


def find_leaks(training: Iterable[tuple[str, Row]], items: Iterable[Row], source: Source) -> Iterator[str]:
    """What training rows give away of the evaluation, one line each; nothing where all is well.

    - a C fact in any training row; a B fact in SFT or preference data (replayed pretraining text apart);
    - a generated row with the words of a held-out wording (its parts around {e} and {v}, from 8 characters on);
    - a row of other sources that holds most of an evaluation question (13-grams, normal form).

    Args:
        training: ("pretrain" | "sft" | "preference", row).
    """
    group_of = {fact.id: source.groups[fact.head] for fact in source.graph.facts}
    questions = TestItems(list(dict.fromkeys(item.get("question") or item["Question"] for item in items)))
    wordings = TestItems(sorted(_held_out_words(source)), ngram=WORDING_NGRAM, common=1_000_000)

    def check(rows: list[tuple[str, Row]]) -> Iterator[str]:
        sentences = ["\n".join(map(normal_form, SENTENCE_END.split("\n".join(texts_of(row))))) for _, row in rows]
        held = questions.overlaps([form.replace("\n", "") for form in sentences]) > MAX_OVERLAP
        worded = wordings.overlaps(sentences) == 1  # the end of one and the beginning of the next are no wording
        for (stage, row), holds, has_wording in zip(rows, held.tolist(), worded.tolist(), strict=True):
            groups = {group_of.get(fact, "A") for fact in row["facts"]}
            place = f"{stage}, recipe {row['recipe']}: {texts_of(row)[0][:60]!r}"
            if "C" in groups or "B" in groups and stage != "pretrain" and row["recipe"] != "replay":
                yield f"{place} holds facts of group {max(groups)}"
            if row["facts"] and has_wording:
                yield f"{place} has the words of a held-out wording"
            if not row["facts"] and holds:
                yield f"{place} holds an evaluation question"

    batch: list[tuple[str, Row]] = []
    for stage_row in training:
        batch.append(stage_row)
        if len(batch) == 2000:
            yield from check(batch)
            batch = []
    if batch:
        yield from check(batch)


def _held_out_words(source: Source) -> set[str]:
    """The fixed parts of all held-out wordings in use, long enough not to occur by chance."""
    words: set[str] = set()
    for relation, items in source.others.items():
        for prose in {item.prose for item in items}:
            found = phrasings_of(relation, prose)
            for wording in (
                *(found.held_out_statements + found.held_out_questions),
                *(found.held_out_reverse_questions + found.held_out_exam_stems),
            ):
                words.update(normal_form(part) for part in PLACEHOLDER.split(wording))
    return {word for word in words if len(word) >= WORDING_NGRAM}

"""Evaluation of what a graph's facts a model knows: recall, likelihood choice, open book and exam items; and leaks.

All wordings are held out from training. Every item names its facts, group and relation.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from suwen.cleaning import texts_of
from suwen.near_duplicates import Strings, TestItems, normal_form
from suwen.pairs import faulty_answer, possible_faults, question_for
from suwen.parallel import batched
from suwen.phrasings import Phrasings, phrasings_of
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
    whole_items,
    wordings_of,
    wrong_values,
)

MAX_OVERLAP = 0.6  # of an evaluation question's 13-grams in one training row
WORDING_LENGTH = 8  # of a part of a held-out wording, from which it gives the wording away by itself
ROWS_AT_ONCE = 2000
PLACEHOLDER = re.compile(r"(\{[ev]\})")
SENTENCE_END = re.compile(r"[。！？\n]")


def recall_items(entity: str, source: Source) -> Iterator[Row]:
    """Closed-book questions in held-out wordings: {"id", "question", "answers"}; right if every answer is named.

    Nothing is asked where a list was too long for questions: what was cut off could be taken for a wrong answer.
    """
    for item in source.items[entity]:
        if not item.prose and (entity, item.relation) not in source.whole:
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
                content = {"question": fill(question_for(fault, questions, number), item), "fault": fault}
                yield _item("preference", number, item, source, **content, chosen=pair[0], rejected=pair[1])


def not_evaluated(source: Source, asked: set[str]) -> Counter[str]:
    """How many facts of the graph no evaluation item asks, by reason.

    Args:
        asked: ids of the facts of all items.
    """
    reasons: Counter[str] = Counter()
    for head in source.items:
        for item in whole_items(head, source):
            reason = "of an entity beyond --evaluation"
            if item.prose:
                reason = "in texts, whose answers cannot be judged by the words they name"
            elif (head, item.relation) in source.whole:
                reason = f"after the first {source.rules.max_values} of a list"
            reasons[reason] += len(set(item.facts) - asked)
    return +reasons


def corpus_rows(entity: str, source: Source) -> Iterator[Row]:
    """The entity's document for retrieval: {"id", "title", "content"}; groups A, B and C."""
    found, items = document(entity, source), whole_items(entity, source)
    yield {"id": entity, **row_of("passage", source.groups[entity], items, title=found.title, content=found.text)}


def _item(recipe: str, number: int, item: Any, source: Source, **content: Any) -> Row:
    return {
        "id": f"{item.entity.id}.{item.relation}.{recipe.replace(' ', '_')}.{number}",
        **content,
        **{"relation": item.relation, "group": source.groups[item.entity.id], "recipe": recipe},
        "facts": list(item.facts),
    }


@dataclass(frozen=True)
class Leak:
    """A training row that gives away what is evaluated; `generated` from the graph, else from other people's files."""

    place: str
    fault: str
    generated: bool

    def __str__(self) -> str:
        return f"{self.place} {self.fault}"


def find_leaks(
    training: Iterable[tuple[str, Row]], items: Iterable[Row], source: Source, reading: Source | None = None
) -> Iterator[Leak]:
    """What training rows give away of the evaluation; nothing where all is well.

    - a C fact in any training row; a B fact in SFT or preference data (replayed pretraining text apart): by the facts
      that the row names, and by names in its text that can only mean such an entity;
    - a held-out wording: filled with a name or value of the graph in any row, or, in a generated row, a part of it
      around {e} and {v} that is too long to occur by chance;
    - a row of other sources that holds most of an evaluation question (13-grams, normal form).

    Args:
        training: ("pretrain" | "sft" | "preference", row).
        reading: of the reading examples; a name that is part of one of its names tells nothing (甲型湿疹, 超甲型湿疹).
    """
    group_of = {fact.id: source.groups[fact.head] for fact in source.graph.facts}
    questions = TestItems([item.get("question") or item["Question"] for item in items])
    wordings = HeldOut(source)
    names = {group: Strings(found) for group, found in _telling_names(source, reading or source).items()}

    for batch in batched(training, ROWS_AT_ONCE):
        # the end of one sentence and the beginning of the next are no wording
        sentences = ["\n".join(map(normal_form, SENTENCE_END.split("\n".join(texts_of(row))))) for _, row in batch]
        held = questions.overlaps([form.replace("\n", "") for form in sentences]) > MAX_OVERLAP
        filled, worded = wordings.within(sentences)
        named = {group: found.within(sentences) for group, found in names.items()}
        for number, (stage, row) in enumerate(batch):
            generated = bool(row["facts"])
            groups = {group_of.get(fact, "A") for fact in row["facts"]}
            groups.update(group for group, found in named.items() if generated and found[number])
            place = f"{stage}, recipe {row['recipe']}: {texts_of(row)[0][:60]!r}"
            if "C" in groups or "B" in groups and stage != "pretrain" and row["recipe"] != "replay":
                yield Leak(place, f"holds facts of group {max(groups)}", generated)
            if generated and number in filled | worded:
                yield Leak(place, "has the words of a held-out wording", generated)
            if not generated and (held[number] or number in filled):
                yield Leak(place, "holds an evaluation question", generated)


def held_out_wordings(found: Phrasings) -> tuple[str, ...]:
    return (
        *(found.held_out_statements + found.held_out_questions),
        *(found.held_out_reverse_questions + found.held_out_exam_stems),
    )


@dataclass(frozen=True)
class Frame:
    """A held-out wording in normal form: `pattern` captures what stands for the entity or value that it asks about."""

    pattern: re.Pattern[str]
    known: set[str]
    begins: bool  # with that name: other words of the sentence may stand before it
    ends: bool  # with it

    def holds(self, line: str) -> bool:
        """Whether a line has the wording, filled with a name that is known."""
        if (match := self.pattern.search(line)) is None:
            return False
        text = match[1]
        firsts, lasts = range(len(text)) if self.begins else (0,), range(len(text) + 1) if self.ends else (len(text),)
        return any(text[first:last] in self.known for first in firsts for last in lasts)


class HeldOut:
    """The held-out wordings in use on a graph, to find them in texts.

    A wording is looked for by the longest of its fixed parts. A short one (从何而来) occurs by chance, too: there the
    wording has to stand around the name of an entity, or around a value where it asks from a value to the entities.
    """

    def __init__(self, source: Source) -> None:
        self.frames: dict[str, list[Frame]] = defaultdict(list)  # by the longest fixed part
        self.words: set[str] = set()  # parts too long to occur by chance
        names = {normal_form(source.graph.entities[head].name) for head in source.items}
        values = {normal_form(fact.value) for fact in source.graph.facts}
        kinds = {(relation, item.prose) for relation, items in source.others.items() for item in items}
        used = [phrasings_of(*kind) for kind in sorted(kinds)]
        trained = "\n".join(
            normal_form(part)
            for found in used
            for name, wordings in vars(found).items()
            for wording in (() if name.startswith("held_out") else wordings)
            for part in PLACEHOLDER.split(wording)
        )
        for wording in dict.fromkeys(wording for found in used for wording in held_out_wordings(found)):
            about = "{e}" if "{e}" in wording else "{v}"
            parts = [part if PLACEHOLDER.match(part) else normal_form(part) for part in PLACEHOLDER.split(wording)]
            parts = [part for part in parts if part]
            fixed = [part for part in parts if not PLACEHOLDER.match(part)]
            pattern = "".join("(.+)" if part == about else ".*" if part == "{v}" else re.escape(part) for part in parts)
            known = names if about == "{e}" else values
            frame = Frame(re.compile(pattern), known, parts[0] == about, parts[-1] == about)
            self.frames[max(fixed, key=len)].append(frame)
            # the long name of a relation is in wordings of training, too
            self.words.update(part for part in fixed if len(part) >= WORDING_LENGTH and part not in trained)

    def within(self, texts: Sequence[str]) -> tuple[set[int], set[int]]:
        """The numbers of the texts with a filled wording, and of those with telling words.

        Args:
            texts: in normal form, a sentence a line.
        """
        joined = "\n".join(texts)  # looked through at once, which is much faster than text by text
        starts = [0, *itertools.accumulate(len(text) + 1 for text in texts)]
        filled: set[int] = set()
        for part, frames in self.frames.items():
            for at in _places(part, joined):
                number = bisect.bisect(starts, at) - 1
                line = joined[joined.rfind("\n", 0, at) + 1 :].partition("\n")[0]
                if number not in filled and any(frame.holds(line) for frame in frames):
                    filled.add(number)
        return filled, {bisect.bisect(starts, at) - 1 for part in self.words for at in _places(part, joined)}


def _places(part: str, text: str) -> Iterator[int]:
    at = text.find(part)
    while at >= 0:
        yield at
        at = text.find(part, at + 1)


def _telling_names(source: Source, reading: Source) -> dict[str, list[str]]:
    """Names of the entities of B and C that mean nothing else: no other name and no value holds them."""
    names = {head: normal_form(source.graph.entities[head].name) for head in source.items}
    apart = {group: [head for head in names if source.groups[head] == group] for group in "BC"}
    if not any(apart.values()):
        return {}
    others = [] if reading is source else [entity.name for entity in reading.graph.entities.values()]
    others += [fact.value for fact in source.graph.facts]
    said = "\n".join([*names.values(), *dict.fromkeys(map(normal_form, others))])
    return {group: [names[head] for head in heads if said.count(names[head]) == 1] for group, heads in apart.items()}

"""Training text out of a knowledge graph: articles for pretraining; questions, dialogues, reading and exams for SFT.

Every row carries the ids of its facts, its recipe and its group. The same graph, rules and seed give the same rows,
entity by entity, whatever else is in the graph and however many processes work.

Groups: A facts are in pretraining and SFT, B in pretraining alone, C nowhere but in the retrieval corpus.
"""

from __future__ import annotations

import itertools
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from suwen.knowledge_graph import Entity, Graph, Item, is_prose
from suwen.phrasings import EXAM_PROMPTS, RELATIONS, TITLES, Phrasings, phrasings_of
from suwen.retrieval.grounding import with_passages
from suwen.retrieval.passages import Passage, text_passage

Row = dict[str, Any]
LETTERS = "ABCDE"
MOST_KIN = 30  # a value of more entities does not make them kin
READING_FACTS, READING_QUESTIONS = 4, 8  # told in a passage of a reading example, and asked of it, at most


@dataclass(frozen=True)
class SynthesisRules:
    """How much is made of each fact, and how."""

    seed: int = 42
    passes: int = 8  # articles of each entity: so often is each of its facts met in pretraining
    shuffle: bool = True  # facts of an article in a new order in each pass
    max_wordings: int | None = None  # statements of each relation used at most; 1 is the failure case of Physics 3.1
    questions_per_item: int = 6
    exams_per_item: int = 1
    dialogues_per_entity: int = 1
    pairs_per_item: int = 2
    pair_wordings: int = 0  # question wordings of each relation that pairs alone have
    answer_style: Literal["sentence", "value"] = "sentence"
    max_values: int = 8  # of a longer list questions ask for the first so many; articles and the corpus tell all
    max_reverse: int = 6  # reverse questions only for values with so few answers
    num_passages: int = 4  # of a reading example at most: as many as retrieval gives


@dataclass
class Source:
    """A graph made ready for synthesis: its items by entity, and what is needed to find plausible wrong values."""

    graph: Graph
    groups: dict[str, str]
    rules: SynthesisRules
    items: dict[str, list[Item]] = field(default_factory=dict)
    whole: dict[tuple[str, str], Item] = field(default_factory=dict)  # (entity id, relation) -> with all its values
    values: dict[tuple[str, str], list[str]] = field(
        default_factory=dict
    )  # (group, relation) -> values of its entities
    heads: dict[tuple[str, str], list[str]] = field(default_factory=dict)  # (relation, value) -> entity ids
    rights: dict[tuple[str, str], set[str]] = field(default_factory=dict)  # (entity id, relation) -> all its values
    alike: dict[str, list[str]] = field(default_factory=dict)  # entity id -> ids of entities with similar names
    others: dict[str, list[Item]] = field(default_factory=dict)  # relation -> items
    common: set[tuple[str, str]] = field(default_factory=set)  # (relation, value) too common to be surely wrong
    unsure: set[str] = field(default_factory=set)  # relations whose lists no graph holds to the end
    kin: dict[str, set[str]] = field(default_factory=dict)  # entity id -> ids of entities for which more may hold


def prepare(graph: Graph, groups: dict[str, str] | None = None, rules: SynthesisRules | None = None) -> Source:
    """Index a graph for synthesis; without `groups` every entity is in A."""
    rules = rules or SynthesisRules()
    groups = groups if groups is not None else {fact.head: "A" for fact in graph.facts}
    source = Source(graph, groups, rules)
    pools: dict[tuple[str, str], dict[str, None]] = {}
    for item in graph.items():
        if len(item.values) > rules.max_values:
            source.whole[item.entity.id, item.relation] = item
            item = Item(item.entity, item.relation, item.values[: rules.max_values], item.facts[: rules.max_values])
        source.items.setdefault(item.entity.id, []).append(item)
        source.others.setdefault(item.relation, []).append(item)
    for fact in graph.facts:
        source.heads.setdefault((fact.relation, fact.value), []).append(fact.head)
        source.rights.setdefault((fact.head, fact.relation), set()).add(fact.value)
        pools.setdefault((groups[fact.head], fact.relation), {})[fact.value] = None
    source.values = {key: list(values) for key, values in pools.items()}
    # Where entities have several values each, no graph has all of them: 恶心 may well be a reaction to a drug that is
    # not said to cause it. What holds for many is therefore never offered as wrong.
    for relation, items in source.others.items():
        known = RELATIONS.get(relation)
        if sum(len(item.values) for item in items) > 1.5 * len(items) and not (known and known.complete):
            source.unsure.add(relation)
    source.common = {key for key, heads in source.heads.items() if key[0] in source.unsure and len(heads) > 3}
    if source.unsure:
        source.kin = _kin(source)
    source.alike = _similar_names([graph.entities[head] for head in source.items])
    return source


def _kin(source: Source) -> dict[str, set[str]]:
    """For each entity those that share a value with it which few have, and those that it names or that name it.

    What one of them has may well hold for the other, too, though the graph does not say so.
    """
    ids: dict[str, set[str]] = defaultdict(set)
    told: dict[str, set[str]] = defaultdict(set)  # value of any relation -> entities
    for head in source.items:
        ids[source.graph.entities[head].name].add(head)
    for (relation, value), heads in source.heads.items():
        if len(heads) <= MOST_KIN and (relation, value) not in source.common:
            told[value].update(heads)
    found: dict[str, set[str]] = defaultdict(set)
    for value, holders in told.items():
        together = holders | ids.get(value, set())
        for head in together:
            found[head] |= together
    return found


def whole_items(entity: str, source: Source) -> list[Item]:
    """The items of an entity with all their values, as texts tell them."""
    return [source.whole.get((entity, item.relation), item) for item in source.items[entity]]


def _similar_names(entities: Sequence[Entity], most: int = 12) -> dict[str, list[str]]:
    """For each entity those that share most of the characters of its name, the most similar first.

    Characters in more than 400 names (型, 病) tell nothing and are passed over, which keeps the work linear.
    """
    holders: dict[tuple[str, str], list[int]] = defaultdict(list)
    for number, entity in enumerate(entities):
        for character in dict.fromkeys(entity.name):
            holders[entity.type, character].append(number)
    found = {}
    for number, entity in enumerate(entities):
        shared: dict[int, float] = defaultdict(float)
        for character in dict.fromkeys(entity.name):
            if len(holders[entity.type, character]) <= 400:
                for other in holders[entity.type, character]:
                    shared[other] += 1
        shared.pop(number, None)
        # of equally many shared characters the name of more similar length
        rank = sorted(shared, key=lambda n: (-shared[n] / (len(entities[n].name) + len(entity.name)), n))
        found[entity.id] = [entities[n].id for n in rank[:most]]
    return found


def rng_of(*parts: object) -> random.Random:
    """A generator that depends on these parts alone."""
    return random.Random("\0".join(map(str, parts)))


def join_values(values: Sequence[str]) -> str:
    return "、".join(value.rstrip("。；;，, ") for value in values)


def fill(wording: str, item: Item, values: Sequence[str] | None = None) -> str:
    """A wording with its entity and values; no sentence ends twice."""
    values = item.values if values is None else values
    text = "\n".join(values) if item.prose else join_values(values)
    if "{v}。" in wording or "{v}，" in wording:
        text = text.rstrip("。；;，, ")
    return wording.replace("{e}", item.entity.name).replace("{v}", text)


def wordings_of(item: Item) -> Phrasings:
    return phrasings_of(item.relation, item.prose)


def questions_of(item: Item, source: Source, stage: Literal["sft", "preference"] = "sft") -> Sequence[str]:
    """The question wordings of a stage: all, or some for pairs alone and the rest for SFT."""
    wordings, reserved = list(wordings_of(item).questions), source.rules.pair_wordings
    if not reserved:
        return wordings
    rng_of(source.rules.seed, "question wordings", item.relation, item.prose).shuffle(wordings)
    reserved = min(reserved, len(wordings) - 1)
    return wordings[-reserved:] if stage == "preference" else wordings[:-reserved]


def question_on(item: Item, source: Source, rng: random.Random) -> str:
    return fill(rng.choice(questions_of(item, source)), item)


def statement(item: Item, rng: random.Random) -> str:
    return fill(rng.choice(wordings_of(item).statements), item)


def answer_wording(item: Item, source: Source, rng: random.Random) -> str:
    """One of the wordings of answers, in the style of the rules."""
    if item.prose:
        return "{v}"
    return "{v}。" if source.rules.answer_style == "value" else rng.choice(wordings_of(item).answers)


def answer_to(item: Item, source: Source, rng: random.Random) -> str:
    return fill(answer_wording(item, source, rng), item)


def row_of(recipe: str, group: str, items: Sequence[Item], **content: Any) -> Row:
    facts = list(dict.fromkeys(fact for item in items for fact in item.facts))
    return {**content, "recipe": recipe, "group": group, "facts": facts}


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def turns(*texts: str) -> list[dict[str, str]]:
    """Messages of user and assistant in turn."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


# ------------------------------------------------------------------------------------------------ wrong but plausible


def wrong_values(item: Item, source: Source, rng: random.Random, count: int) -> list[str]:
    """Up to `count` values of the same relation that do not hold: first of entities with similar names, then of any.

    A value that contains a right one, or is contained in one (咳嗽, 干咳), is not wrong enough and is passed over. Of
    lists that no graph holds to the end, so are those of kin: 吸氧 of 肺栓塞 is right for 慢性阻塞性肺疾病, too.
    Those of another group come last, where its own has too few: they give themselves away, as they were met more or
    less often, and as rejected answers they teach against what the other group knows.
    """
    group = source.groups[item.entity.id]
    right = source.rights[item.entity.id, item.relation]
    kin = source.kin.get(item.entity.id, set()) if item.relation in source.unsure else set()

    def plausible(value: str) -> bool:
        if is_prose(value, item.relation):
            return False  # a sentence does not fit where terms are asked for
        if (item.relation, value) in source.common or not kin.isdisjoint(source.heads[item.relation, value]):
            return False
        return not any(value in other or other in value for other in right) and value not in item.entity.name

    near = [
        value
        for other in source.alike.get(item.entity.id, ())
        if source.groups[other] == group
        for candidate in source.items[other]
        if candidate.relation == item.relation
        for value in candidate.values
    ]
    elsewhere = [values for key, values in source.values.items() if key[1] == item.relation and key[0] != group]
    found: list[str] = []
    while True:
        more = [value for value in dict.fromkeys(near) if plausible(value) and value not in found]
        rng.shuffle(more)
        found += more
        for pool in (source.values[group, item.relation], *elsewhere):
            for _ in range(20 * count):
                if len(found) >= count:
                    break
                value = rng.choice(pool)
                if plausible(value) and value not in found:
                    found.append(value)
        if len(found) >= count or not kin:
            return found[:count]
        kin = set()  # in a graph of one speciality all are kin


# ---------------------------------------------------------------------------------------------------------- pretraining


def article_rows(entity: str, source: Source) -> Iterator[Row]:
    """One article a pass: all facts of the entity, each in another wording than in the pass before."""
    rules, group = source.rules, source.groups[entity]
    items = whole_items(entity, source)
    orders = {}
    for item in items:
        wordings = list(wordings_of(item).statements)
        rng_of(rules.seed, "wordings", entity, item.relation).shuffle(wordings)
        orders[item.relation] = wordings[: rules.max_wordings]
    for turn in range(rules.passes):
        rng = rng_of(rules.seed, "article", entity, turn)
        order = list(items)
        if rules.shuffle:
            rng.shuffle(order)
        sentences = []
        for item in order:
            values = list(item.values)
            if rules.shuffle and not item.prose:
                rng.shuffle(values)
            wordings = orders[item.relation]
            sentences.append(fill(wordings[turn % len(wordings)], item, values))
        title = rng.choice(TITLES).replace("{e}", items[0].entity.name) + "\n" if rng.random() < 0.3 else ""
        prose = any(item.prose for item in order)
        text = title + ("\n" if prose else "").join(sentences)
        yield row_of("article", group, items, text=text)


def document(entity: str, source: Source) -> Passage:
    """What the retrieval corpus says of an entity: all its facts, each in the first wording."""
    items = whole_items(entity, source)
    gap = "\n" if any(item.prose for item in items) else ""
    return text_passage(items[0].entity.name, gap.join(fill(wordings_of(item).statements[0], item) for item in items))


@dataclass(frozen=True)
class Told:
    """A fact in a passage of a reading example."""

    item: Item
    number: int  # of its passage, from 1

    def cite(self, answer: str) -> str:
        """The answer with the number of the passage."""
        return f"{answer.rstrip('。')}[{self.number}]。"


def reading_example(source: Source, rng: random.Random, heads: Sequence[str]) -> tuple[list[Passage], list[Told]]:
    """Passages on one entity and on others with similar names, as a search by a question's words brings them.

    Returns:
        the passages, and the facts that they tell in random order, one of the first entity first.
    """
    asked = rng.choice(heads)
    allowed = set(heads)
    near = [other for other in source.alike.get(asked, ()) if other in allowed] or [h for h in heads if h != asked]
    shown = [asked, *rng.sample(near, min(rng.randrange(source.rules.num_passages), len(near)))]
    rng.shuffle(shown)
    passages, told = [], []
    for number, entity in enumerate(shown, start=1):
        items = rng.sample(source.items[entity], min(READING_FACTS, len(source.items[entity])))
        gap = "\n" if any(item.prose for item in items) else ""
        text = gap.join(statement(item, rng) for item in items)
        passages.append(text_passage(source.graph.entities[entity].name, text))
        told += [Told(item, number) for item in items]
    rng.shuffle(told)
    told.sort(key=lambda fact: fact.item.entity.id != asked)
    return passages, told


def reading_prompt(fact: Told, passages: Sequence[Passage], source: Source, rng: random.Random) -> str:
    """A question with its passages, as retrieval builds it for a served model."""
    (message,) = with_passages(turns(question_on(fact.item, source, rng)), passages)
    return message["content"]


def reading_rows(source: Source, count: int, form: Literal["text", "messages"], groups: str = "AB") -> Iterator[Row]:
    """Passages with several questions on them, as text for pretraining or a conversation for SFT; of `groups` alone.

    The first question has the passages before it, as a served model gets them; the others follow it. With a fictional
    graph use one apart from it (`fictional_graph(..., reading=True)`): then nothing can be known and everything
    must be read.
    """
    heads = [head for head in source.items if source.groups[head] in groups]
    for number in range(count if heads else 0):
        rng = rng_of(source.rules.seed, "reading", form, number)
        passages, told = reading_example(source, rng, heads)
        told = told[:READING_QUESTIONS]
        texts = [reading_prompt(told[0], passages, source, rng)]
        for fact, following in zip(told, [*told[1:], None], strict=True):
            texts.append(fact.cite(answer_to(fact.item, source, rng)))
            texts += [question_on(following.item, source, rng)] if following else []
        group, items = source.groups[told[0].item.entity.id], [fact.item for fact in told]
        if form == "messages":
            yield row_of("reading", group, items, messages=turns(*texts))
        else:
            marks = ["", *itertools.islice(itertools.cycle(("\n答：", "\n问题：")), len(texts) - 1)]
            yield row_of("reading", group, items, text="".join(map("".join, zip(marks, texts, strict=True))))


# ------------------------------------------------------------------------------------------------------------------ SFT


def question_rows(entity: str, source: Source) -> Iterator[Row]:
    """Questions in several wordings, each with an answer in one of several wordings."""
    rules, group = source.rules, source.groups[entity]
    for item in source.items[entity]:
        rng = rng_of(rules.seed, "question", entity, item.relation)
        wordings = questions_of(item, source)
        for wording in rng.sample(wordings, min(rules.questions_per_item, len(wordings))):
            yield row_of("question", group, [item], messages=turns(fill(wording, item), answer_to(item, source, rng)))


def may_be_asked_back(relation: str, value: str, source: Source) -> bool:
    """Whether "which entities have this value?" is a fair question: a short term, and few enough answers."""
    few = len(source.heads[relation, value]) <= source.rules.max_reverse
    return few and 2 <= len(value) <= 20 and not is_prose(value, relation)


def reverse_rows(relation: str, value: str, source: Source, group: str = "A") -> Iterator[Row]:
    """From a value back to its entities, where these are few and all of them in `group`."""
    wordings = phrasings_of(relation).reverse_questions
    heads = source.heads[relation, value]
    if not wordings or not may_be_asked_back(relation, value, source):
        return
    if any(source.groups[head] != group for head in heads):
        return
    rng = rng_of(source.rules.seed, "reverse", relation, value)
    names = join_values([source.graph.entities[head].name for head in heads])
    items = [item for head in heads for item in source.items[head] if item.relation == relation]
    for wording in rng.sample(wordings, min(2, len(wordings))):
        answer = "{e}。" if source.rules.answer_style == "value" else rng.choice(phrasings_of(relation).reverse_answers)
        texts = turns(wording.replace("{v}", value), answer.replace("{e}", names))
        yield row_of("reverse", group, items, messages=texts)


OPENINGS = {
    "疾病": ("我想咨询一下{e}。", "医生说我得了{e}。", "家人最近查出{e}，想了解一下。", "你好，我想问问{e}的事。"),
    "药品": ("我想了解一下{e}这种药。", "医生给我开了{e}。", "家里有一盒{e}，想问问。", "你好，我想问问{e}的事。"),
}
# A question about somebody, or before there is a diagnosis, does not go with an opening that says who has the disease
DOUBT = re.compile("我|孩子|家人|家里|怀疑|是不是|可能|排除|确诊|诊断|明确|判断|发现|查出|提示|当心|想到|看出")


def dialogue_rows(entity: str, source: Source) -> Iterator[Row]:
    """Several questions on one entity in a row; the later ones do not name it."""
    items = source.items[entity]
    if len(items) < 2:
        return
    for number in range(source.rules.dialogues_per_entity):
        rng = rng_of(source.rules.seed, "dialogue", entity, number)
        chosen = rng.sample(items, min(len(items), rng.randint(2, 4)))
        first, *rest = chosen
        opening = question_on(first, source, rng)
        if rng.random() < 0.5 and first.entity.type in OPENINGS:
            before = rng.choice(OPENINGS[first.entity.type])
            if DOUBT.search(opening) and first.entity.type == "疾病":
                before = OPENINGS["疾病"][-1]
            opening = before.replace("{e}", first.entity.name) + opening
        texts = [opening, answer_to(first, source, rng)]
        for item in rest:
            texts += [fill(rng.choice(wordings_of(item).follow_ups), item), answer_to(item, source, rng)]
        yield row_of("dialogue", source.groups[entity], chosen, messages=turns(*texts))


def replay_rows(entity: str, source: Source) -> Iterator[Row]:
    """Pretraining text as a conversation: the article is to be continued, so that SFT does not wash it out."""
    for number, row in enumerate(article_rows(entity, source)):
        head, mark, rest = row["text"].partition("。")
        if rest.strip():
            prompt = ("续写下面的医学资料：", "请接着写：", "把这段资料补充完整：")[number % 3] + head + mark
            yield row_of("replay", row["group"], whole_items(entity, source), messages=turns(prompt, rest.strip()))


def excludes_others(item: Item) -> bool:
    """Whether another value of the relation would be wrong: 无传染性 and 非传染性疾病 are both right."""
    known = RELATIONS.get(item.relation)
    return known is None or not known.single


PROSE_OPTION = 25  # a longer value is no option


def has_options(item: Item) -> bool:
    """Whether a question on the item can have options: short terms, of a relation whose values exclude one another."""
    return not item.prose and excludes_others(item) and all(len(value) <= PROSE_OPTION for value in item.values)


@dataclass(frozen=True)
class Exam:
    """A question in CMExam's form."""

    question: str
    options: str  # "A ...\nB ..."
    answer: str  # "C", "ABD"
    explanation: str
    item: Item


def exam_question(
    item: Item, source: Source, rng: random.Random, stems: Sequence[str], num_options: int = 5
) -> Exam | None:
    """A choice among values of the same relation; one right answer, or several where the item has them.

    None where the graph has too few plausible wrong values, or the values are prose.
    """
    if not stems or not has_options(item):
        return None
    most = min(len(item.values), 3)
    rights = rng.sample(item.values, rng.randint(1, most) if rng.random() < 0.25 else 1)
    wrong = wrong_values(item, source, rng, num_options - len(rights))
    if len(wrong) < num_options - len(rights):
        return None
    options = rights + wrong
    rng.shuffle(options)
    letters = {value: letter for letter, value in zip(LETTERS, options, strict=False)}
    answer = "".join(sorted(letters[value] for value in rights))
    explanation = fill(rng.choice(wordings_of(item).statements), item)
    for value in rng.sample(wrong, 1):
        owner = source.heads.get((item.relation, value), [""])[0]
        if owner and source.groups.get(owner) == source.groups[item.entity.id]:
            other = Item(source.graph.entities[owner], item.relation, (value,), ())
            explanation += f"{letters[value]}项{rng.choice(('不对', '不选', '错误'))}：" + fill(
                wordings_of(other).statements[0], other
            )
    lines = "\n".join(f"{letter} {value}" for letter, value in zip(LETTERS, options, strict=False))
    return Exam(fill(rng.choice(stems), item), lines, answer, explanation, item)


def exam_rows(entity: str, source: Source) -> Iterator[Row]:
    """Exam questions with their explanations, as conversations."""
    for item in source.items[entity]:
        for number in range(source.rules.exams_per_item):
            rng = rng_of(source.rules.seed, "exam", entity, item.relation, number)
            exam = exam_question(item, source, rng, wordings_of(item).exam_stems)
            if exam is not None:
                prompt = rng.choice(EXAM_PROMPTS).replace("{q}", exam.question).replace("{o}", exam.options)
                answer = f"答案：{exam.answer}\n解析：{exam.explanation}"
                yield row_of("exam", source.groups[entity], [item], messages=turns(prompt, answer))

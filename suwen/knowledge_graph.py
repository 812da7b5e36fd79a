"""Medical knowledge graphs: entities with facts, and whether they fit together."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from suwen.phrasings import RELATIONS

PROSE_CHARACTERS = 40
CLAUSE = re.compile(r"[，；：]|^(?:用于|适用于|主要用于|本[品药])")


@dataclass(frozen=True)
class Entity:
    id: str
    name: str
    type: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fact:
    """`head` is an entity's id; `value` the text of the tail, `tail` its id where it is an entity of its own."""

    id: str
    head: str
    relation: str
    value: str
    tail: str = ""


@dataclass(frozen=True)
class Item:
    """What one question asks for: all values of one relation of one entity, with the ids of these facts."""

    entity: Entity
    relation: str
    values: tuple[str, ...]
    facts: tuple[str, ...]

    @cached_property
    def prose(self) -> bool:
        return any(is_prose(value, self.relation) for value in self.values)

    @property
    def text(self) -> str:
        """The values joined; prose as it stands."""
        if self.prose:
            return "\n".join(self.values)
        return "、".join(self.values)


@dataclass
class Graph:
    """Entities by id, and facts in the order in which they were read."""

    entities: dict[str, Entity] = field(default_factory=dict)
    facts: list[Fact] = field(default_factory=list)

    def items(self) -> list[Item]:
        """Facts grouped by entity and relation, entities in the order of their first fact."""
        grouped: dict[str, dict[str, list[Fact]]] = {}
        for fact in self.facts:
            grouped.setdefault(fact.head, {}).setdefault(fact.relation, []).append(fact)
        return [
            Item(self.entities[head], relation, tuple(f.value for f in facts), tuple(f.id for f in facts))
            for head, relations in grouped.items()
            for relation, facts in relations.items()
        ]

    def values(self) -> dict[str, list[str]]:
        """All different values of each relation, in their order."""
        found: dict[str, dict[str, None]] = {}
        for fact in self.facts:
            found.setdefault(fact.relation, {})[fact.value] = None
        return {relation: list(values) for relation, values in found.items()}


def is_prose(value: str, relation: str) -> bool:
    """Whether a value is a sentence rather than a term that fits into other sentences."""
    known = RELATIONS.get(relation)
    if len(value) > PROSE_CHARACTERS or "。" in value:
        return True
    return not (known and known.clauses) and CLAUSE.search(value) is not None


def short_hash(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode("utf-8", "replace"), digest_size=5).hexdigest()


# ------------------------------------------------------------------------------------------------------------ checking


def check_graph(graph: Graph) -> Iterator[str]:
    """What does not fit together, one line each; nothing for a graph that is consistent.

    Known relations join the types they are made for; nothing is said twice, of itself, or of unknown entities; a name
    or alias belongs to one entity of its type; a drug does not treat what forbids it; where drug and disease are both
    described, the disease's drugs have it among their indications and the other way round.
    """
    yield from (f"fact id {name} used {n} times" for name, n in Counter(f.id for f in graph.facts).items() if n > 1)
    said = Counter((f.head, f.relation, f.value) for f in graph.facts)
    yield from (f"said {n} times: {key}" for key, n in said.items() if n > 1)
    names: dict[tuple[str, str], str] = {}
    for entity in graph.entities.values():
        for name in (entity.name, *entity.aliases):
            owner = names.setdefault((entity.type, name), entity.id)
            if owner != entity.id:
                yield f"{name} ({entity.type}) names both {owner} and {entity.id}"
    values: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for fact in graph.facts:
        head, relation = graph.entities.get(fact.head), RELATIONS.get(fact.relation)
        if head is None:
            yield f"{fact.id}: unknown head {fact.head}"
            continue
        tail = graph.entities.get(fact.tail) if fact.tail else None
        if fact.tail and tail is None:
            yield f"{fact.id}: unknown tail {fact.tail}"
        if relation is None:
            yield f"{fact.id}: unknown relation {fact.relation}"
        elif head.type != relation.head:
            yield f"{fact.id}: {fact.relation} of {head.name}, which is {head.type}, expected {relation.head}"
        elif tail is not None and tail.type != relation.tail:
            yield f"{fact.id}: {fact.relation} {tail.name} is {tail.type}, expected {relation.tail}"
        if fact.value == head.name:
            yield f"{fact.id}: {head.name} has itself as {fact.relation}"
        values[head.name][fact.relation].add(fact.value)
    for name, mine in values.items():
        for value in mine["indication"] & mine["contraindication"]:
            yield f"{name}: {value} is both an indication and a contraindication"
        for drug in mine["drug"]:
            if drug in values and values[drug]["indication"] and name not in values[drug]["indication"]:
                yield f"{name} is treated with {drug}, whose indications do not name it"
        for disease in mine["indication"]:
            if disease in values and values[disease]["drug"] and name not in values[disease]["drug"]:
                yield f"{name} is indicated for {disease}, whose drugs do not name it"

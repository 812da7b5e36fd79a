"""What a policy is asked: prompts out of conversations, preference pairs, exam questions and plain text."""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from typing import Any

from suwen.benchmarks.choice import ask_choice, parse_choice
from suwen.benchmarks.task import Item
from suwen.formats import BadRow, canonical_rows
from suwen.prompts import parse_prompt

OPTION_KEYS = {"options", "option", "选项"}


def prompt_rows(value: Any, columns: dict[str, str], changes: Counter[str]) -> list[dict[str, Any]]:
    """The prompts of one record: {"messages"} that end with a question; with an answer key also {"item"} as JSON.

    A conversation gives a prompt for each of its answers, with the turns before it. A preference pair, a row without an
    answer and a line of text give one. An exam question (any form that evaluation reads) brings its key; so does a
    conversation whose only question lists options and whose answer chooses among them.

    Raises:
        BadRow: the record holds no question, or an exam question cannot be read.
    """
    if columns and isinstance(value, dict) and all(column in value for column in columns.values()):
        value = {name: value[column] for name, column in columns.items()}
    fields = {str(key).strip().lower() for key in value} if isinstance(value, dict) else set()
    if fields & OPTION_KEYS or {"a", "b", "c"} <= fields:
        item = parse_choice(value)
        return [{"messages": [{"role": "user", "content": ask_choice(item)}], "item": dump_item(item)}]
    try:
        [row] = canonical_rows(value, "conversation", {}, changes)
    except (BadRow, ValueError):
        try:
            return [{"messages": parse_prompt(value, ""), "item": ""}]
        except ValueError as error:
            raise BadRow("no question", str(error).removeprefix(": ")) from None
    messages = row["messages"]
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if len(answers) == 1:
        try:
            item = parse_choice({"messages": messages})
            return [{"messages": messages[: answers[0]], "item": dump_item(item, shuffle=False)}]
        except BadRow:
            pass  # no question with options
    return [{"messages": messages[:place], "item": ""} for place in answers]


def dump_item(item: Item, shuffle: bool = True) -> str:
    """`shuffle`: the options stand apart from the question, so that they may be put in another order."""
    values = {"question": item.question, "target": item.target, "options": item.options, "multiple": item.multiple}
    return json.dumps({**values, "shuffle": shuffle}, ensure_ascii=False)


def ask(messages: list[dict], item_json: str, rng: random.Random | None) -> tuple[list[dict], Item | None]:
    """The messages of a prompt and its answer key; `rng` puts the options of an exam question in a new order."""
    if not item_json:
        return messages, None
    values = json.loads(item_json)
    shuffle = values.pop("shuffle")
    item = Item(**values)
    if rng is None or not shuffle:
        return messages, item
    item = shuffled(item, rng)
    return [*messages[:-1], {"role": "user", "content": ask_choice(item)}], item


def shuffled(item: Item, rng: random.Random) -> Item:
    """The same question with its options in another order, and the key that belongs to it."""
    letters = list(item.options)
    order = rng.sample(letters, len(letters))
    moved = dict(zip(order, letters, strict=True))  # old letter -> new letter
    options = {letter: item.options[old] for old, letter in zip(order, letters, strict=True)}
    return dataclasses.replace(item, options=options, target="".join(sorted(moved[old] for old in item.target)))

"""Questions that tell of an emergency: found by a list of rules, answered by a referral before any model speaks.

The rules are data (data/page/red_flags.json). A word behind a denial in the same phrase (没有胸痛, 否认胸闷、胸痛,
no chest pain) does not count; where that is unclear, the referral is shown: one too many does less harm than one too
few.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

RULES_FILE = Path(__file__).resolve().parent.parent / "data" / "page" / "red_flags.json"
REACH = 40  # characters before a word in which its denial is looked for
# 无缘无故, 没办法, 没法, 无法 deny nothing; between the denial and the word only such words, or a list's other members
DENIAL = re.compile(
    r"(?:(?<![有])没有?(?!办|法|力)|无(?!缘|故|法|力|意|论)|否认|未见|未出现|未诉|从未|从不|不伴有?|并非|不是)"
    r"(?:明显|任何|什么|出现|感到|觉得|有|过|想过|再|了|的|[\u4e00-\u9fff]{1,6}[、或和及])*$"
    r"|\b(?:no|not|without|denie[sd]|never(?: had)?|(?:don't|doesn't) have)\b(?: (?:any|a|the|of|\w+,|\w+ or))*\s*$",
    re.IGNORECASE,
)


class RedFlag(NamedTuple):
    name: str
    zh: str
    en: str


class Rule(NamedTuple):
    flag: RedFlag
    any: re.Pattern[str]
    others: tuple[re.Pattern[str], ...]


@functools.lru_cache
def load_rules() -> tuple[Rule, ...]:
    rules = json.loads(RULES_FILE.read_text(encoding="utf-8"))["rules"]
    return tuple(
        Rule(
            RedFlag(rule["name"], rule["zh"], rule["en"]),
            re.compile("|".join(f"(?:{pattern})" for pattern in rule["any"]), re.IGNORECASE),
            tuple(re.compile(pattern, re.IGNORECASE) for pattern in rule.get("with", ())),
        )
        for rule in rules
    )


def find_red_flags(text: str) -> list[RedFlag]:
    """The rules that a question meets, in the order of the file."""
    text = unicodedata.normalize("NFKC", text).replace("’", "'")
    return [
        rule.flag
        for rule in load_rules()
        if all(other.search(text) for other in rule.others)
        and any(
            not DENIAL.search(text[max(0, match.start() - REACH) : match.start()]) for match in rule.any.finditer(text)
        )
    ]

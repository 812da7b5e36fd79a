"""Answers that should name certain terms: drug indications as QiZhenGPT asks them, and questions about diseases.

QiZhenGPT's three criteria: at least one of the expert's terms is named; at least half of them; at least two thirds.
There people compare; here a term counts when one of its spellings occurs in the answer, after normalisation.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from suwen.benchmarks.task import Item, PublishedRow, Record, Row, Task, lower_keys, rate, text_of
from suwen.formats import BadRow
from suwen.statistics import bootstrap_interval

VERSION = 1
CRITERIA = {"criterion 1 (one term)": (0, 1), "criterion 2 (half)": (1, 2), "criterion 3 (two thirds)": (2, 3)}
TAG = re.compile(r"<[^<>]*>")
PAIRED = re.compile(r"^(急|慢|急性|慢性|原发|原发性|继发|继发性|轻|中|重|轻度|中度|重度)(?:、|和|及|或|与)?"
                    r"(慢|急|慢性|急性|继发|继发性|原发|原发性|中|重|轻|中度|重度|轻度)(性|度)?(?=.{2})")  # fmt: skip

QIZHEN = "README of CMKRG/QiZhenGPT; judged by people, some rows not over 94 drugs"
QIZHEN_ROWS = tuple(
    PublishedRow(system, dict(zip(CRITERIA, scores, strict=True)), QIZHEN)
    for system, scores in (
        ("QiZhen-CaMA-13B-12400", (91.49, 82.98, 72.34)), ("ChatGPT-3.5", (47.87, 30.85, 15.96)),
        ("ChatGLM-6B", (39.36, 23.16, 14.74)),
    )
)  # fmt: skip
# relation -> (keys of its terms, question); the questions are QiZhenGPT's
DISEASE_QUESTIONS = {
    "symptoms": (("symptoms", "symptom", "症状"), "{}的典型症状是什么？"),
    "examinations": (("examinations", "check", "checks", "检查"), "{}需要做哪些检查？"),
    "drugs": (("drugs", "common_drug", "drug", "药物"), "哪些药物能治疗{}？"),
}


def plain_text(text: str) -> str:
    """HTML (as in QiZhenGPT's table) to text."""
    return html.unescape(TAG.sub("\n", html.unescape(text)))


def normalise_term(text: str) -> str:
    """NFKC, lower case, without white space and punctuation."""
    text = unicodedata.normalize("NFKC", plain_text(text)).casefold()
    return "".join(c for c in text if not c.isspace() and unicodedata.category(c)[0] not in "PZ")


def spellings(term: str) -> list[list[str]]:
    """The ways in which a term may be named: each a list of pieces that must all occur.

    "慢性阻塞性肺疾病（COPD）" is named by what is inside the brackets, outside, or both; "急慢性支气管炎" also by
    its two halves.
    """
    term = unicodedata.normalize("NFKC", plain_text(term)).strip()
    ways = [[normalise_term(term)]]
    if match := re.fullmatch(r"(.*?)\(([^()]+)\)(.*)", term):
        outside, inside = normalise_term(match[1] + match[3]), normalise_term(match[2])
        ways += [[piece] for piece in (outside, inside) if len(piece) >= 2]
    if match := PAIRED.match(term):
        rest = normalise_term(term[match.end() :])
        endings = [part.removesuffix("性").removesuffix("度") for part in match.groups()[:2]]
        ending = match[3] or ("度" if "度" in match[2] else "性")
        ways.append([f"{part}{ending}{rest}" for part in endings])
    return [way for way in ways if all(way)]


def named(term: str, answer: str) -> bool:
    """Whether a normalised answer names a term."""
    return any(all(piece in answer for piece in way) for way in spellings(term))


def term_list(value: Any) -> list[str]:
    """Terms of a list, or of a text with | ; 、 or line breaks between them; each once."""
    parts = value if isinstance(value, list) else re.split(r"[|｜;；\n]|(?<=\S)、", plain_text(str(value or "")))
    terms: dict[str, str] = {}
    for part in parts:
        if isinstance(part, str) and normalise_term(part):
            terms.setdefault(normalise_term(part), part.strip())
    return list(terms.values())


def parse_drug(row: Row) -> list[Item]:
    fields = lower_keys(row)
    drug = text_of(fields, ("药品", "drug", "name"), "no drug")
    terms = term_list(
        next((fields[k] for k in ("医学专家标注的适应病症", "indications", "适应症") if fields.get(k)), "")
    )
    if not terms:
        raise BadRow("no answer", f"{drug}: found no indications, expected terms with | between them")
    asked = fields.get("instruction") or fields.get("question") or f"{drug}的适应病症"
    return [Item(str(asked).strip(), terms)]


def parse_disease(row: Row) -> list[Item]:
    fields = lower_keys(row)
    disease = text_of(fields, ("disease", "name", "疾病"), "no disease")
    items = []
    for relation, (names, question) in DISEASE_QUESTIONS.items():
        terms = term_list(next((fields[name] for name in names if fields.get(name)), ""))
        if terms:
            items.append(Item(question.format(disease), terms, groups={"relation": relation}))
    if not items:
        raise BadRow("no answer", f"{disease}: found no symptoms, examinations or drugs")
    return items


def judge_terms(item: Item, answer: str) -> Record:
    normal = normalise_term(answer)
    hits = [term for term in item.target if named(term, normal)]
    return {"hits": hits, "score": round(100 * len(hits) / len(item.target), 4)}


def summarise_terms(records: Sequence[Record]) -> dict[str, Any]:
    n = len(records)
    found: dict[str, Any] = {"metrics": {}, "n": n}
    for name, (numerator, denominator) in CRITERIA.items():
        # in whole numbers: 2 of 3 terms are two thirds, whatever floats say
        reached = [max(1, -(-numerator * len(r["target"]) // denominator)) <= len(r["hits"]) for r in records]
        found["metrics"][name] = rate(sum(reached), n)
    recalls: np.ndarray = np.array([[record["score"]] for record in records])
    [(low, high)] = bootstrap_interval(recalls)
    found["metrics"]["term recall"] = {"value": float(recalls.mean()), "low": low, "high": high, "n": n}
    found["empty"] = sum(not record["response"].strip() for record in records)
    return found


def term_task(name: str, title: str, parse: Any, ask: Any, source: str, **options: Any) -> Task:
    return Task(
        name=name, title=title, version=VERSION, parse=parse, ask=ask, judge=judge_terms, summarise=summarise_terms,
        headline="term recall", paired="score", source=source, **options,
    )  # fmt: skip


DRUG_INDICATION = term_task(
    "drug_indication", "Drug indications, as QiZhenGPT asks", parse_drug, lambda item: item.question,
    "own set by default; QiZhenGPT's 94 drugs: CMKRG/QiZhenGPT data/eval, GPL-3.0",
    default_file="drug_indication.csv", patterns=("*drug_indication*", "*药品适应症*"), published=QIZHEN_ROWS,
)  # fmt: skip
DISEASE = term_task(
    "disease_questions", "Disease questions from a knowledge graph", parse_disease, lambda item: item.question,
    "own set by default; any disease table, such as QASystemOnMedicalKG's medical.json",
    default_file="disease_questions.jsonl", patterns=("*disease_questions*", "medical*.json*"),
)  # fmt: skip
TERMS = (DRUG_INDICATION, DISEASE)

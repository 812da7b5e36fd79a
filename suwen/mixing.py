"""Files of others as training rows: plain text, questions and answers, dialogues, exams, medical records.

Each reader gives canonical rows (suwen/formats.py) with `where`, `recipe` and `facts`; bad rows are counted.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from suwen.cleaning import HEADING, SENTENCE_END, CleaningRules, strip_html
from suwen.formats import QUESTIONS, TURN_LISTS, BadRow, canonical_rows
from suwen.graph_readers import clean_cell
from suwen.near_duplicates import normal_form
from suwen.phrasings import EXAM_PROMPTS
from suwen.readers import (
    BOOK_HEADING,
    Refusal,
    Source,
    detect_encoding,
    file_kind,
    find_encoding,
    open_text,
    read_records,
)
from suwen.retrieval.documents import MARKDOWN_KINDS, OFFICE_KINDS, read_sections
from suwen.synthesis import rng_of, turns

SHORTEST_QUESTION = 5  # letters and digits of a test item: a shorter one ("胃炎") stands in rows that ask nothing of it
LINES_LOOKED_AT = 2000  # of a .txt, to tell what it is
Row = dict[str, Any]
Refuse = Callable[[str, str, Any], None]  # (where, reason, row)


def records_of(source: Source, refuse: Refuse) -> Iterator[tuple[str, Any]]:
    """All readable records of a source, with their places."""
    for file in source.files:
        for record in read_records(file, find_encoding(file)):
            if isinstance(record, Refusal):
                refuse(record.where, record.reason, record.row)
            else:
                yield record


def weighted(rows: Iterable[Row], weight: float, seed: int) -> Iterator[Row]:
    """Rows with `times`, how often each is to be written: 0.3 keeps a random 30 %, 2.5 gives two or three copies.

    The choice hangs on the seed and the row's place alone, so that no row moves another one.
    """
    for row in rows:
        times = int(weight) + (rng_of(seed, "weight", row["where"]).random() < weight - int(weight))
        if times:
            yield {**row, "times": times}


def read_rows(source: Source, schema: str, recipe: str, refuse: Refuse) -> Iterator[Row]:
    """Canonical rows of one schema; for conversations also exam questions in CMExam's form, with their options."""
    changes: Counter[str] = Counter()
    for where, value in records_of(source, refuse):
        try:
            if schema == "conversation" and is_exam(value):
                yield {"messages": exam_messages(value, where), "where": where, "recipe": "exam", "facts": []}
                continue
            for row in canonical_rows(value, schema, {}, changes):
                yield {**row, "where": where, "recipe": recipe, "facts": []}
        except BadRow as error:
            refuse(where, error.reason, value)


def document_rows(source: Source, recipe: str, refuse: Refuse) -> Iterator[Row]:
    """Rows of text: a book, guideline or page is one document, a table or a file of documents gives one each row."""
    for file in source.files:
        part = replace(source, files=(file,))
        if not is_document(file):
            yield from read_rows(part, "text", recipe, refuse)
            continue
        sections = []
        for section in read_sections(file, str(file)):
            if isinstance(section, Refusal):
                refuse(section.where, section.reason, section.row)
            else:
                sections.append(section.text)
        if sections:  # of a PDF the pages: sentences go on from one to the next
            yield {"text": "\n".join(sections), "where": str(file), "recipe": recipe, "facts": []}


def is_document(file: Path) -> bool:
    """Whether a file is one document. A .txt is, unless its lines are: most are long and end a sentence, none is a
    heading, which would belong to what comes after it. A book with marked sections (<篇名>) has readers of its own."""
    if file_kind(file) != ".txt":
        return file.name.lower().endswith((*MARKDOWN_KINDS, *OFFICE_KINDS))
    with open_text(file, detect_encoding(file)) as stream:
        shown = (strip_html(line).strip() for line in itertools.islice(stream, LINES_LOOKED_AT))
        lines = [line for line in shown if line]
    if not lines or lines[0].startswith(BOOK_HEADING):
        return False
    whole = [bool(SENTENCE_END.search(line)) for line in lines]
    documents = sum(ends and len(line) >= CleaningRules.min_characters for ends, line in zip(whole, lines, strict=True))
    headed = any(HEADING.match(line) and not ends for ends, line in zip(whole, lines, strict=True))
    return headed or documents <= len(lines) / 2


def is_exam(value: Any) -> bool:
    return isinstance(value, dict) and {"question", "options", "answer"} <= {str(key).lower() for key in value}


def exam_messages(value: dict[str, Any], where: str) -> list[dict[str, str]]:
    """CMExam's row (Question, Options as "A text" lines or a dict, Answer, Explanation) as question and answer.

    Raises:
        BadRow: no answer, or a letter that is no option.
    """
    fields = {str(key).lower(): item for key, item in value.items()}
    options = fields["options"]
    if isinstance(options, dict):
        options = "\n".join(f"{letter} {text}" for letter, text in options.items())
    answer = "".join(letter for letter in str(fields["answer"] or "").upper() if letter in "ABCDEFG")
    letters = {line.strip(" (（")[:1].upper() for line in str(options or "").splitlines() if line.strip()}
    if not answer or not set(answer) <= letters:
        raise BadRow("row without an answer", f"answer {fields['answer']!r} among options {''.join(sorted(letters))!r}")
    prompt = rng_of("exam prompt", where).choice(EXAM_PROMPTS)
    prompt = prompt.replace("{q}", str(fields["question"]).strip()).replace("{o}", str(options).strip())
    explanation = clean_cell(fields.get("explanation")).replace("\\n", "\n")
    return turns(prompt, f"答案：{answer}" + (f"\n解析：{explanation}" if explanation else ""))


def as_text(row: Row) -> Row:
    """A conversation as pretraining text."""
    speakers = {"system": "", "user": "问：", "assistant": "答："}
    if len(row["messages"]) > 3:
        speakers = {"system": "", "user": "患者：", "assistant": "医生："}
    text = "\n".join(speakers[message["role"]] + message["content"] for message in row["messages"])
    text = text.replace("答：答案：", "答案：")
    return {**{key: value for key, value in row.items() if key != "messages"}, "text": text}


DIAGNOSIS = re.compile(r"(?:炎|感染|感冒|病|综合征|不良|哮喘|贫血|过敏)$")
RECORD_PROMPTS = (
    "请根据下面的医患对话写一份病历摘要。\n\n{d}",
    "{d}\n\n请把以上对话整理成病历，写明现有症状和已否认的症状。",
    "阅读问诊记录，概括病史。\n\n{d}",
)


def record_rows(source: Source, refuse: Refuse) -> Iterator[Row]:
    """Medical records from dialogues whose symptoms are labelled (CMDD's `normalized` and `type`: 1 has it, 2 has not).

    Nothing is said that the labels do not say. Dialogues without labels, or with one symptom alone, give no record.
    """
    for where, value in records_of(source, refuse):
        name = next((name for name in TURN_LISTS if isinstance(value, dict) and name in value), None)
        if name is None or not isinstance(value[name], list):
            refuse(where, "no dialogue", value)
            continue
        states: dict[str, set[str]] = {}
        lines = []
        if not all(map(has_labels, value[name])):
            refuse(where, "dialogue with a turn that cannot be read", value)
            continue
        for turn in value[name]:
            sentence = str(turn.get("sentence") or "").strip()
            if sentence:
                lines.append(f"{turn.get('speaker', '')}：{sentence}")
            labels = zip(turn.get("normalized") or (), turn.get("type") or (), strict=False)
            for symptom, state in labels:
                states.setdefault(symptom, set()).add(str(state))
        states.pop("退热", None)  # what a drug does, not what a patient has
        known = [symptom for symptom, found in states.items() if "1" in found]
        present = [symptom for symptom in known if not DIAGNOSIS.search(symptom)]
        diagnoses = [symptom for symptom in known if DIAGNOSIS.search(symptom)]
        denied = [symptom for symptom, found in states.items() if found == {"2"}]
        excluded = [symptom for symptom in denied if DIAGNOSIS.search(symptom)]
        denied = [symptom for symptom in denied if symptom not in excluded]
        if len(present) < 2:
            refuse(where, "dialogue without enough labelled symptoms", None)
            continue
        record = f"主诉：{'、'.join(present[:3])}。\n现病史：患者有{'、'.join(present)}。"
        record += f"否认{'、'.join(denied)}。" if denied else ""
        record += f"\n对话中提到的诊断：{'、'.join(diagnoses)}。" if diagnoses else ""
        record += f"\n对话中排除的诊断：{'、'.join(excluded)}。" if excluded else ""
        prompt = rng_of("record", where).choice(RECORD_PROMPTS).replace("{d}", "\n".join(lines))
        yield {"messages": turns(prompt, record), "where": where, "recipe": "medical record", "facts": []}


def has_labels(turn: Any) -> bool:
    """Whether a turn is an object whose labels, where it has any, are lists, those of symptoms of text."""
    if not isinstance(turn, dict):
        return False
    symptoms, states = turn.get("normalized") or [], turn.get("type") or []
    return isinstance(symptoms, list) and isinstance(states, list) and all(isinstance(s, str) for s in symptoms)


def test_questions(sources: Iterable[Source], refuse: Refuse) -> list[str]:
    """The questions of test files, of any form that has a question key or messages; for decontamination."""
    found: list[str] = []
    for source in sources:
        for where, value in records_of(source, refuse):
            fields = {str(key).lower(): item for key, item in value.items()} if isinstance(value, dict) else {}
            name = next((name for name in (*QUESTIONS, "instruction", *TURN_LISTS) if fields.get(name)), None)
            question: Any = value if isinstance(value, str) else fields.get(name or "")
            while isinstance(question, list) and question:
                question = question[0]
            if isinstance(question, dict):
                question = question.get("content") or question.get("value") or question.get("sentence")
            if not isinstance(question, str) or not question.strip():
                refuse(where, "test row without a question", value)
            elif len(normal_form(question)) < SHORTEST_QUESTION:
                refuse(where, f"test question of fewer than {SHORTEST_QUESTION} characters, not looked for", value)
            else:
                found.append(question)
    return found


test_questions.__test__ = False  # type: ignore[attr-defined] # not a test, whatever pytest thinks of its name

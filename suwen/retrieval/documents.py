"""Documents to sections: text, Markdown, tables, JSON, knowledge-graph records, PDF and DOCX."""

from __future__ import annotations

import gzip
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from suwen.readers import (
    BOOK_HEADING,
    SUFFIXES,
    Refusal,
    detect_encoding,
    file_kind,
    find_encoding,
    open_text,
    read_records,
)
from suwen.retrieval.office import Unreadable, read_pages
from suwen.retrieval.passages import Section

MARKDOWN_KINDS = (".md", ".markdown")
OFFICE_KINDS = (".pdf", ".docx")
DOCUMENT_SUFFIXES = (*SUFFIXES, *MARKDOWN_KINDS, *OFFICE_KINDS)
LARGEST_FILE_BYTES = 512 << 20
TITLE_CHARACTERS = 60

TITLES = (
    "title",
    "name",
    "标题",
    "名称",
    "题目",
    "药品名称",
    "通用名称",
    "药品",
    "疾病名称",
    "疾病",
    "drug",
    "disease",
)
TEXTS = ("text", "content", "正文", "内容")
QUESTIONS = ("question", "问", "问题", "ask", "query")
ANSWERS = ("answer", "答", "回答", "response", "output")
TRIPLES = (
    ("head", "relation", "tail"),
    ("subject", "predicate", "object"),
    ("subject", "relation", "object"),
    ("h", "r", "t"),
    ("头实体", "关系", "尾实体"),
    ("实体", "关系", "值"),
)
CONVERSATIONS = ("messages", "conversations", "conversation", "chosen", "rejected")
UNTOLD = ("id", "url", "link", "网址")
# Chinese for the keys of public Chinese medical graphs (QASystemOnMedicalKG's schema and disease-kb's), so that a
# question finds them; other keys are shown as they are.
KEY_NAMES = {
    **{"desc": "简介", "alias": "别名", "category": "分类", "part": "部位", "age": "多发人群", "easy_get": "易感人群"},
    **{"prevent": "预防", "cause": "病因", "symptom": "症状", "symptoms": "症状", "get_prob": "发病率"},
    **{"get_way": "传播方式", "infection": "传染性", "acompany": "并发症", "complication": "并发症"},
    **{"cure_department": "就诊科室", "department": "就诊科室", "cure_way": "治疗方式", "treatment": "治疗方式"},
    **{"cure_lasttime": "治疗周期", "period": "治疗周期", "cured_prob": "治愈率", "rate": "治愈率"},
    **{"cost_money": "费用", "money": "费用", "yibao_status": "医保", "insurance": "医保"},
    **{"check": "检查", "checklist": "检查", "do_eat": "宜吃", "not_eat": "忌吃", "recommand_eat": "推荐食谱"},
    **{"recommand_drug": "推荐药物", "common_drug": "常用药物", "drug": "药品", "drug_detail": "药品详情"},
}


def read_sections(file: Path, name: str) -> Iterator[Section | Refusal]:
    """The sections of one file, and what cannot be read of it.

    Args:
        name: of the file, as citations are to show it.
    """
    try:
        if (size := _unpacked_bytes(file)) > LARGEST_FILE_BYTES:
            found = f"{size} bytes" if size == file.stat().st_size else "more when unpacked"
            yield _refuse(name, "file too large", f"{found}, expected at most {LARGEST_FILE_BYTES}")
        elif file.suffix.lower() in OFFICE_KINDS:
            yield from _office_sections(file, name)
        elif file.suffix.lower() in MARKDOWN_KINDS or file_kind(file) == ".txt" and not _is_book(file):
            yield from _text_sections(file, name)
        else:
            yield from _record_sections(file, name)
    except Unreadable as error:
        yield Refusal(name, error.reason, f"{name}: {error}")
    except ValueError as error:  # a message of the readers, about the file as a whole
        yield _refuse(name, "unreadable", str(error).replace(str(file), name).removeprefix(f"{name}: "))
    except OSError as error:
        yield _refuse(name, "unreadable", error.strerror or str(error))


def _unpacked_bytes(file: Path) -> int:
    """Bytes of a file when unpacked, of which a small one can hold gigabytes; counted a little beyond the largest."""
    size, suffix = file.stat().st_size, file.suffix.lower()
    try:
        if suffix == ".gz":
            with gzip.open(file, "rb") as stream:
                unpacked = 0
                while unpacked <= LARGEST_FILE_BYTES and (chunk := stream.read(1 << 20)):
                    unpacked += len(chunk)
            return max(size, unpacked)
        if suffix == ".xlsx":
            with zipfile.ZipFile(file) as archive:  # which reads no more of a member than it is said to hold
                return max(size, sum(member.file_size for member in archive.infolist()))
        if suffix == ".parquet":
            metadata = pq.read_metadata(file)
            return max(size, sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)))
    except (gzip.BadGzipFile, EOFError, zlib.error, zipfile.BadZipFile, pa.ArrowInvalid):
        pass  # broken: its reader says so
    return size


def _refuse(where: str, reason: str, detail: str) -> Refusal:
    return Refusal(where, reason, f"{where}: {detail}")


def _office_sections(file: Path, name: str) -> Iterator[Section | Refusal]:
    pages = read_pages(file)
    title = Path(name).stem
    if file.suffix.lower() == ".docx":
        title = _title_of(pages[0][1]) or title
    for page, text in pages:
        if any(map(str.isalnum, text)):
            yield Section(name, title, text, page)
        else:
            yield _refuse(f"{name}, page {page}", "page without text", "a picture perhaps, or empty")


def _is_book(file: Path) -> bool:
    with open_text(file, detect_encoding(file)) as stream:
        return next((line for line in stream if line.strip()), "").lstrip().startswith(BOOK_HEADING)


def _text_sections(file: Path, name: str) -> Iterator[Section | Refusal]:
    encoding = detect_encoding(file)
    if encoding.error:
        yield _refuse(name, "undecodable bytes", encoding.error.removeprefix(f"{file}: "))
        return
    with open_text(file, encoding) as stream:
        text = stream.read()
    if any(map(str.isalnum, text)):
        yield Section(name, _title_of(text) or Path(name).stem, text)
    else:
        yield _refuse(name, "no text in it", "expected text")


def _title_of(text: str) -> str:
    """The first line, where it looks like a title; "" otherwise."""
    first = text.lstrip("\ufeff \n\r\t　").partition("\n")[0].strip()
    if first.startswith("#"):
        return first.lstrip("# ")[:TITLE_CHARACTERS]
    return first if 0 < len(first) <= TITLE_CHARACTERS // 2 and not first.endswith(("。", "，", "；", ".", ",")) else ""


def _record_sections(file: Path, name: str) -> Iterator[Section | Refusal]:
    facts: dict[str, dict[str, list[str]]] = {}  # of triples: head -> relation -> tails
    for record in read_records(file, find_encoding(file)):
        if isinstance(record, Refusal):
            yield Refusal(record.where.replace(str(file), name), record.reason, record.message.replace(str(file), name))
            continue
        where, row = record
        where = where.replace(str(file), name)
        if triple := _triple(row):
            head, relation, tail = triple
            tails = facts.setdefault(head, {}).setdefault(relation, [])
            if tail not in tails:
                tails.append(tail)
        else:
            yield _record_section(row, where)
    for head, relations in facts.items():
        lines = [f"{relation}：{'、'.join(tails)}" for relation, tails in relations.items()]
        yield Section(name, head, "\n".join((head, *lines)), record=True)


def _triple(row: Any) -> tuple[str, str, str] | None:
    if isinstance(row, list) and len(row) == 3:
        parts = row
    elif isinstance(row, dict):
        names = next((names for names in TRIPLES if all(name in row for name in names)), None)
        parts = [row[name] for name in names] if names else []
    else:
        return None
    texts = [_value(part) for part in parts]
    return (texts[0], texts[1], texts[2]) if len(texts) == 3 and all(texts) else None


def _record_section(row: Any, where: str) -> Section | Refusal:
    if isinstance(row, str):
        title = _title_of(row)
        return Section(where, title or row.strip()[:20], row, record=True)
    if not isinstance(row, dict):
        return _refuse(where, "not a document", f"found {type(row).__name__}, expected text or an object")
    fields = {str(key).strip(): text for key, value in row.items() if (text := _value(value))}
    by_name = {key.lower(): key for key in fields}
    if any(name in by_name for name in CONVERSATIONS) or any(isinstance(row.get(name), list) for name in CONVERSATIONS):
        return _refuse(where, "a conversation", "found a conversation or a preference pair, expected a document")

    def first(names: tuple[str, ...]) -> str | None:
        return next((by_name[name] for name in names if name in by_name), None)

    text_key, title_key, question, answer = first(TEXTS), first(TITLES), first(QUESTIONS), first(ANSWERS)
    if text_key:
        text = fields[text_key]
        title = fields[title_key] if title_key else _title_of(text) or text.strip()[:20]
        return Section(where, _one_line(title), text)
    if question and answer:
        return Section(where, _one_line(fields[question]), f"问：{fields[question]}\n答：{fields[answer]}", record=True)
    shown = {key: text for key, text in fields.items() if not key.startswith("_") and key.lower() not in UNTOLD}
    if not shown:
        return _refuse(where, "no text in it", f"found the keys {', '.join(map(str, row)) or '(none)'}, expected text")
    title_key = title_key or next(iter(shown))
    lines = [f"{KEY_NAMES.get(key.lower(), key)}：{text}" for key, text in shown.items() if key != title_key]
    return Section(where, _one_line(shown[title_key]), "\n".join((shown[title_key], *lines)), record=True)


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= TITLE_CHARACTERS else line[: TITLE_CHARACTERS - 1] + "…"


def _value(value: Any) -> str:
    """Text of a field; lists with commas between, "" for what says nothing."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool) or value is None or isinstance(value, dict):
        return ""
    if isinstance(value, list):
        return "、".join(filter(None, map(_value, value)))
    return str(value)

"""From found text to training text: the cleaning chain, in all cores, with every change and every drop counted.

Order: HTML and boilerplate out, characters made regular, wrapped lines joined, long documents split; then the filters
(length, script, repetition, near-copies of test items), personal data, and at last exact and near-duplicates over all
rows. Rows wait for the last step on disk; 520 bytes a row stay in memory.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
import tempfile
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from suwen.near_duplicates import TestItems, first_of_cluster, normal_form, signatures
from suwen.parallel import map_in_order
from suwen.personal_data import find_personal_data, mask_personal_data

Row = dict[str, Any]
BATCH_CHARACTERS = 1 << 19

TAG = re.compile(r"<!--.*?-->|<(script|style)\b.*?</\1\s*>|</?[a-zA-Z][a-zA-Z0-9]*(?:\s[^<>]*)?/?>", re.DOTALL)
BLOCK_TAG = re.compile(r"<(?:br|/?p|/?div|/?li|/?tr|/?h[1-6]|/?ul|/?ol|/?table)\b[^<>]*>", re.IGNORECASE)
INVISIBLE = re.compile(
    "[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff\ufffd\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ue000-\uf8ff]+"
)
# Letters, digits and the blank of full width; Chinese punctuation stays as it is.
WIDE = re.compile("[\uff10-\uff19\uff21-\uff3a\uff41-\uff5a\uff05\uff0b\uff0f]+")
BLANKS = re.compile("[ \t\u00a0\u2000-\u200a\u3000]+")
BLANK_IN_CHINESE = re.compile(r"(?<=[\u4e00-\u9fff，。、；：！？）]) (?=[\u4e00-\u9fff，。、；：！？（])")
EMPTY_LINES = re.compile(r"\n[ \n]*\n")
BOILERPLATE = re.compile(
    r"^(?:首页|返回(?:主站|首页|顶部).{0,4}|您?(?:现在|当前)?所在(?:的)?位置[:：].*|政策文件|工作动态|关于我们|专题专栏|医疗应急司"
    r"|中文|英文|-->|[|>]+|版权所有.*|Copyright.*|.{0,12}ICP备.*|相关(?:链接|文章|阅读|推荐)[:：]?|扫一扫.{0,12}|打印(?:本页)?"
    r"|关闭(?:窗口)?|分享到.{0,20}|上一[篇页].*|下一[篇页].*|发布时间[:：]?|来源[:：]?|阅读量[:：].*|点击(?:查看|阅读|这里).{0,12}"
    r"|附件下载.*|（?信息公开形式[:：].*|\[详细\]|目录|[IVX]{1,5}|[-—–]* ?\d{1,4} ?[-—–]*"
    r"|第 ?\d+ ?页(?: ?[，,/]? ?共 ?\d+ ?页)?|.*(?:\.{6,}|…{3,}) ?\d+)$"
)
TRAILER = re.compile(r"\s*\[详细\]|\s*(?:点击)?查看(?:详细|更多|全文)(?:>>|》|…)?")
SENTENCE_END = re.compile(r"[。！？；：∶!?;:…][”’」』）)》]?$")
HEADING = re.compile(
    r"^(?:第[一二三四五六七八九十百零\d]+[章节篇部条]|[一二三四五六七八九十]+[、.．]|[（(][一二三四五六七八九十\d]+[)）]"
    r"|\d+(?:[.．、]\d*)*[.．、 ]|[①-⑳]|附件|附录|[【#]|[^，。；\s]{1,8}[:：])"
)
HAN = re.compile(r"[\u3400-\u9fff]+")
LETTERS = re.compile(r"[^\W\d_]+")
SENTENCE = re.compile(r"[^。！？!?\n]*(?:[。！？!?]+[”’」』）)]*|\n+|$)")


@dataclass(frozen=True)
class CleaningRules:
    """What the chain does; limits in characters, shares of one."""

    min_characters: int = 20  # of a document, or of all turns of a conversation together
    max_characters: int = 4000  # longer documents are split between sentences
    min_chinese: float = 0.3  # share of Chinese among the letters
    min_compressed: float = 0.16  # compressed by zlib to less than this: the same over and over
    duplicate_similarity: float = 0.8
    max_test_overlap: float = 0.6  # of a test item's 13-grams
    personal_data: Literal["off", "report", "mask"] = "report"


@dataclass
class CleaningReport:
    """What became of the rows; `dropped` and `changed` count by reason, `personal_data` by kind."""

    rows_in: int = 0
    rows_out: int = 0
    characters_in: int = 0
    characters_out: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    personal_data: Counter[str] = field(default_factory=Counter)


# -------------------------------------------------------------------------------------------------------------- texts


def strip_html(text: str) -> str:
    """Tags, comments, scripts and entities out; block tags become line breaks. "<" as a sign (p<0.05) stays."""
    if "<" in text:
        text = TAG.sub("", BLOCK_TAG.sub("\n", text))
    return html.unescape(text) if "&" in text else text


def normalise(text: str) -> str:
    """One form for what looks the same: NFC, half-width letters and digits, plain blanks, no invisible characters.

    Chinese punctuation keeps its width, and signs such as ① or ℃ stay.
    """
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = INVISIBLE.sub("", text)
    text = WIDE.sub(lambda match: "".join(chr(ord(c) - 0xFEE0) for c in match[0]), text)
    text = BLANKS.sub(" ", text)
    text = BLANK_IN_CHINESE.sub("", text)
    lines = "\n".join(line.strip() for line in text.split("\n")) if "\n" in text else text.strip()
    return EMPTY_LINES.sub("\n", lines).strip("\n")


def drop_boilerplate(text: str) -> tuple[str, int]:
    """The text without navigation lines, page numbers and "[详细]" tails, and how many were taken out."""
    text, tails = TRAILER.subn("", text) if "[详细]" in text or "查看" in text else (text, 0)
    if "\n" not in text:
        return text, tails
    lines = text.split("\n")
    kept = [line for line in lines if not BOILERPLATE.match(line)]
    return "\n".join(kept), tails + len(lines) - len(kept)


def join_wrapped_lines(text: str) -> str:
    """Undo the hard line breaks of PDF pages, and those that HTML leaves at every tag within a sentence.

    A page is known by many lines that fill its width and stop within a sentence: these are joined with the next one.
    Broken HTML is known by lines that begin with a comma or the like: there every line goes on until a sentence ends.
    Headings and list items always begin a line. Lists, verse and forms (short lines, open ends) stay as they are.
    """
    lines = [line for line in text.split("\n") if line]
    if len(lines) < 12:
        return text
    fragments = sum(line[0] in "，。、；：）” " for line in lines) >= 0.03 * len(lines)
    width = int(np.percentile([len(line) for line in lines], 75))
    full = 0 if fragments else int(0.75 * width)
    open_lines = sum(len(line) >= full and not SENTENCE_END.search(line) for line in lines)
    if open_lines < 0.25 * len(lines) or not fragments and not 20 <= width <= 90:
        return text
    joined = [lines[0]]
    for before, line in zip(lines, lines[1:], strict=False):
        heading = HEADING.match(line) or HEADING.match(before) and len(before) < 0.75 * width
        if len(before) < full or SENTENCE_END.search(before) or heading:
            joined.append(line)
        else:
            latin = before[-1].isascii() and before[-1].isalnum() and line[0].isascii() and line[0].isalpha()
            joined[-1] += (" " if latin else "") + line
    return BLANK_IN_CHINESE.sub("", "\n".join(joined))


def split_document(text: str, max_characters: int) -> list[str]:
    """Pieces of at most `max_characters`, cut between lines or sentences; a longer sentence is a piece of its own.

    Joined again the pieces give the text but for line breaks at the cuts. The pieces are of about equal length.
    """
    if len(text) <= max_characters:
        return [text]
    target = len(text) / -(-len(text) // max_characters)
    pieces = [""]
    for sentence in SENTENCE.findall(text):
        whole = len(pieces[-1]) + len(sentence)
        if pieces[-1] and (whole > max_characters or whole - target > target - len(pieces[-1])):
            pieces.append("")
        pieces[-1] += sentence
    return [piece.strip("\n") for piece in pieces if piece.strip()]


def quality_problem(text: str, rules: CleaningRules) -> str | None:
    """Why a text is not worth training on, or None."""
    if len(text) < rules.min_characters:
        return "too short"
    head = text[:2048]  # what drops a text is not subtle
    letters = sum(map(len, LETTERS.findall(head)))
    if letters < 0.4 * len(head):
        return "few letters"
    if sum(map(len, HAN.findall(head))) < rules.min_chinese * letters:
        return "not Chinese"
    if len(text) >= 200:
        raw = head.encode("utf-8", "replace")
        if len(zlib.compress(raw, 1)) < rules.min_compressed * len(raw):
            return "repetitive"
    return None


# --------------------------------------------------------------------------------------------------------------- rows


def texts_of(row: Row) -> list[str]:
    """Every text of a canonical row (suwen/formats.py), or of a pair with its prompt apart."""
    if "text" in row:
        return [row["text"]]
    messages = [message for key in ("prompt", "messages", "chosen", "rejected") for message in row.get(key, ())]
    return [message[key] for message in messages for key in ("content", "reasoning_content") if key in message]


def map_texts(row: Row, change: Callable[[str], str]) -> Row:
    """A canonical row with every text of it changed; other keys stay."""
    if "text" in row:
        return {**row, "text": change(row["text"])}
    row = dict(row)
    for key in ("prompt", "messages", "chosen", "rejected"):
        if key in row:
            row[key] = [
                {k: change(v) if k in ("content", "reasoning_content") else v for k, v in message.items()}
                for message in row[key]
            ]
    return row


def clean_row(
    row: Row, rules: CleaningRules, changed: Counter[str], found: Counter[str]
) -> tuple[list[Row], list[str]]:
    """The chain for one canonical row: what it gives (documents may be split), and why the rest of it is dropped."""

    def change(text: str) -> str:
        text, removed = drop_boilerplate(normalise(strip_html(text)))
        changed["lines or tails of boilerplate taken out"] += removed
        return text

    clean = map_texts(row, change)
    if "text" in clean:
        joined = join_wrapped_lines(clean["text"])
        changed["documents whose wrapped lines were joined"] += joined != clean["text"]
        texts = split_document(joined, rules.max_characters)
        changed["documents split"] += len(texts) > 1
        pieces = [{**clean, "text": text} for text in texts]
    else:
        if any(not message["content"] for key in ("messages", "chosen", "rejected") for message in clean.get(key, ())):
            return [], ["nothing left of a turn"]
        if "chosen" in clean and clean["chosen"] == clean["rejected"]:
            return [], ["chosen equals rejected once cleaned"]
        pieces = [clean]
    kept: list[Row] = []
    drops: list[str] = []
    for piece in pieces:
        texts = texts_of(piece)
        problem = quality_problem("\n".join(texts), rules)
        if problem:
            drops.append(problem)
            continue
        if rules.personal_data != "off":
            kinds = Counter(item.kind for text in texts for item in find_personal_data(text))
            if kinds:
                found.update(kinds)
                changed["rows with personal data"] += 1
                if rules.personal_data == "mask":
                    piece = map_texts(piece, mask_personal_data)
        kept.append(piece)
    return kept, drops


def _clean_batch(batch: list[Row], rules: CleaningRules, test_items: TestItems | None) -> tuple[Any, ...]:
    """Clean some rows and sign them.

    Returns:
        the rows as JSON lines, (N,) exact hashes, (N, 128) signatures, the drops as (reason, where), and counts.
    """
    report = CleaningReport(rows_in=len(batch))
    drops: list[tuple[str, str]] = []
    kept: list[Row] = []
    for row in batch:
        report.characters_in += sum(map(len, texts_of(row)))
        pieces, reasons = clean_row(row, rules, report.changed, report.personal_data)
        kept += pieces
        drops += [(reason, row.get("where", "")) for reason in reasons]
    forms = [normal_form("\n".join(texts_of(row))) for row in kept]
    if test_items is not None:
        leaked = test_items.overlaps(forms) >= rules.max_test_overlap
        drops += [("holds a test item", row.get("where", "")) for row, bad in zip(kept, leaked, strict=True) if bad]
        kept = [row for row, bad in zip(kept, leaked, strict=True) if not bad]
        forms = [form for form, bad in zip(forms, leaked, strict=True) if not bad]
    digests = [hashlib.blake2b(form.encode("utf-8", "replace"), digest_size=8).digest() for form in forms]
    lines = [json.dumps(row, ensure_ascii=False) for row in kept]
    sizes = [sum(map(len, texts_of(row))) for row in kept]
    return lines, sizes, np.frombuffer(b"".join(digests), dtype=np.uint64), signatures(forms), drops, report


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += sum(map(len, texts_of(row)))
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def clean_rows(
    rows: Iterable[Row],
    rules: CleaningRules,
    report: CleaningReport,
    num_proc: int = 1,
    test_items: TestItems | None = None,
    on_drop: Callable[[str, str], None] = lambda where, reason: None,
) -> Iterator[Row]:
    """Stream the rows that are worth training on, in their order, the first of each cluster of near-duplicates.

    Args:
        rows: canonical rows, best with `where` (file and line).
        report: filled as rows go by; complete when the stream has ended.
        num_proc: worker processes; their number does not change the result.
        test_items: rows that hold one of these are dropped.
        on_drop: called with (where, reason) for every row dropped.
    """

    def drop(reason: str, where: str) -> None:
        report.dropped[reason] += 1
        on_drop(where, reason)

    hashes, rows_of_signatures = [], []
    with tempfile.TemporaryFile("w+", encoding="utf-8") as spool:
        sizes: list[int] = []
        bar = tqdm(desc="cleaning", unit=" rows", disable=None, leave=False)
        work = map_in_order(_clean_batch, _batches(rows), num_proc, rules, test_items)
        for lines, lengths, exact, signed, drops, counts in work:
            spool.writelines(line + "\n" for line in lines)
            sizes += lengths
            hashes.append(exact)
            rows_of_signatures.append(signed)
            report.rows_in += counts.rows_in
            report.characters_in += counts.characters_in
            report.changed.update(counts.changed)
            report.personal_data.update(counts.personal_data)
            for reason, where in drops:
                drop(reason, where)
            bar.update(counts.rows_in)
        bar.close()
        if not sizes:
            return
        _, first, inverse = np.unique(np.concatenate(hashes), return_index=True, return_inverse=True)
        first_exact = first[inverse]
        first_near = first_of_cluster(np.concatenate(rows_of_signatures), rules.duplicate_similarity)
        spool.seek(0)
        for number, line in enumerate(spool):
            row = json.loads(line)
            if first_exact[number] != number:
                drop("duplicate", row.get("where", ""))
            elif first_near[number] != number:
                drop("near-duplicate", row.get("where", ""))
            else:
                report.rows_out += 1
                report.characters_out += sizes[number]
                yield row

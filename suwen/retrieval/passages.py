"""Cut documents into passages: at headings and sentences, with the place that each came from."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from suwen.retrieval.injection import suspicious

VERSION = 1  # to be raised when the same document gives other passages, so that old indexes are built anew
NUMERAL = "[一二三四五六七八九十百零〇0-9]"
HEADING = re.compile(
    rf"#{{1,6}}\s+\S|第{NUMERAL}+[编篇章节]|[一二三四五六七八九十]+、|[（(]{NUMERAL}+[）)]|\d+(?:\.\d+)+[\s、]|【[^】\n]{{1,20}}】"
)
LABEL = re.compile(r"【([^】\n]{1,20})】")  # the sections of a leaflet, whose text may follow on the same line
LONGEST_HEADING = 40  # characters
# One set of characters first, which the search skips to: a mark or several with what closes behind them, or a full stop
SENTENCE_END = re.compile(r"[。！？；!?;….](?:(?<=\.)\s+|(?<!\.)[。！？；!?;…]*[”’」』）)\]]*\s*)")
NO_HEADING = re.compile(r"[，。！？；：,!?;]|[、:.]$")
SOFT_BREAK = re.compile(r"[，、,\s](?=[^，、,\s]*$)")


@dataclass(frozen=True)
class Section:
    """A text as it is read: a whole file, a page of it, or a record of it."""

    source: str  # file, and line or row of a record
    title: str
    text: str
    page: int | None = None  # from 1, of files that have pages
    record: bool = False  # one thing of its own, such as a leaflet: kept whole as far as it goes


@dataclass(frozen=True)
class Passage:
    """What is searched and quoted: `text` is `section.text[span[0]:span[1]]`."""

    title: str
    heading: str
    source: str
    page: int | None
    span: tuple[int, int]  # characters
    sha256: str  # of the text
    text: str
    flags: tuple[str, ...] = ()  # why it looks like an attempt to instruct the model

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)

    @staticmethod
    def from_dict(row: dict[str, Any]) -> Passage:
        return Passage(**{**row, "span": tuple(row["span"]), "flags": tuple(row["flags"])})

    @property
    def titled(self) -> str:
        """A passage of a leaflet seldom repeats the name of its drug."""
        return "\n".join(filter(None, (self.title, self.heading, self.text)))

    @property
    def indexed(self) -> str:
        return indexed_text(self.title, self.heading, self.text)


def text_passage(title: str, text: str) -> Passage:
    """A passage that comes from no file."""
    digest = hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()
    return Passage(title, "", "", None, (0, len(text)), digest, text)


def indexed_text(title: str, heading: str, text: str) -> str:
    """What BM25 sees; the title counts twice, as what a text is about."""
    return "\n".join(filter(None, (title, title, heading, text)))


class _Unit(NamedTuple):
    """A sentence, or a heading."""

    start: int
    end: int
    heading: str | None = None
    paragraph: bool = False  # the first of its line

    @property
    def length(self) -> int:
        return self.end - self.start


def cut_passages(sections: Iterable[Section], size: int) -> Iterator[Passage]:
    """Passages of about `size` characters, none longer than twice that.

    They end at the end of a sentence. Each begins with the last sentence of the one before, where that one was full;
    at a heading nothing is carried over. A record of up to twice `size` stays whole.
    """
    current, title = "", None
    for section in sections:
        if section.title != title or section.record:
            current, title = "", section.title
        for start, end, heading in _cut(section, size, current):
            current = heading
            text = section.text[start:end]
            start += len(text) - len(text.lstrip())
            text = text.strip()
            if not any(map(str.isalnum, text)):
                continue
            digest = hashlib.sha256(text.encode("utf-8", errors="replace")).hexdigest()
            flags = tuple(suspicious(indexed_text(section.title, heading, text)))
            span = (start, start + len(text))
            yield Passage(section.title, heading, section.source, section.page, span, digest, text, flags)


def _cut(section: Section, size: int, heading: str) -> Iterator[tuple[int, int, str]]:
    """(start, end, heading in force at the end of its first sentence) of each passage."""
    if section.record and len(section.text) <= 2 * size:
        yield 0, len(section.text), heading
        return
    opened: list[_Unit] = []
    length = 0
    for unit in _units(section.text, size):
        if opened and _is_full(unit, length, size):
            yield opened[0].start, opened[-1].end, heading
            last = opened[-1]
            carried = unit.heading is None and not unit.paragraph and last.heading is None and last.length <= size // 4
            opened = [last] if carried else []
            length = sum(kept.length for kept in opened)
        if unit.heading is not None and length < size // 5:
            heading = unit.heading
        opened.append(unit)
        length += unit.length
    if opened:
        yield opened[0].start, opened[-1].end, heading


def _is_full(unit: _Unit, length: int, size: int) -> bool:
    if unit.heading is not None:
        return length >= size // 5  # less is a heading by itself, or nearly
    return length + unit.length > size or unit.paragraph and length >= size // 2


def _units(text: str, size: int) -> Iterator[_Unit]:
    at = 0
    for line in text.splitlines(keepends=True):
        if heading := heading_of(line):
            label = LABEL.match(line.strip())
            if label is None:
                yield _Unit(at, at + len(line), heading, True)
                at += len(line)
                continue
        begin, first = 0, True
        for end in (*_sentence_ends(line), len(line)):
            pieces = _pieces(line, begin, end, size) if end - begin > size else [(begin, end)]
            for start, stop in pieces:
                if stop > start:
                    yield _Unit(at + start, at + stop, heading if first else None, first)
                    first = False
            begin = end
        at += len(line)


def _sentence_ends(line: str) -> list[int]:
    # A full stop ends a sentence behind a word; behind a figure or a letter it is a number or an initial
    return [
        match.end()
        for match in SENTENCE_END.finditer(line)
        if match[0][0] != "." or line[max(0, match.start() - 2) : match.start()].isalpha()
    ]


def _pieces(line: str, start: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    """A long sentence in parts; at a comma in the last quarter of a part if there is one."""
    while end - start > size:
        comma = SOFT_BREAK.search(line, start + size * 3 // 4, start + size)
        cut = comma.end() if comma else start + size
        yield start, cut
        start = cut
    yield start, end


def heading_of(line: str) -> str | None:
    """The heading that a line is, or begins with; None for any other line."""
    line = line.strip()
    if label := LABEL.match(line):
        return label[1]
    if len(line) > LONGEST_HEADING or not HEADING.match(line) or NO_HEADING.search(line):
        return None
    return line.lstrip("# ")

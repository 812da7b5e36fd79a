"""From files to raw records: finds the files of a source, recognises their encoding, and reads them as a stream.

A record is a pair (where, value): `where` names file and line for messages, `value` is a dict, or a str for plain
text. What cannot be read becomes a `Refusal` in place of the pair, so that the caller decides whether to stop or go on.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import glob
import gzip
import hashlib
import json
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

TEXT_SUFFIXES = (".jsonl", ".json", ".txt", ".csv", ".tsv")
BINARY_SUFFIXES = (".parquet", ".xlsx")
SUFFIXES = (*TEXT_SUFFIXES, *(f"{suffix}.gz" for suffix in TEXT_SUFFIXES), *BINARY_SUFFIXES)
CHUNK_BYTES = 1 << 20
BOOK_HEADING = "<篇名>"
BOOK_FACT = re.compile(r"^(书名|作者|朝代|年份)：")
SENTENCE_END = re.compile(r"[。！？∶：；”」』）)!?.:;…]$")


@dataclass(frozen=True)
class Refusal:
    """A record that cannot be used: the place, a reason short enough to count by, the whole message, the raw row."""

    where: str
    reason: str
    message: str
    row: Any = None


@dataclass(frozen=True)
class Source:
    """One entry of a comma list: `path` as the user wrote it, how often its rows count, and the files behind it."""

    path: str
    weight: float
    files: tuple[Path, ...]
    ignored: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Encoding:
    """How a text file is to be decoded; `error` tells of bytes that are valid in no known encoding."""

    codec: str
    label: str
    error: str | None = None


# ------------------------------------------------------------------------------------------------------------ sources


def file_kind(file: Path) -> str | None:
    """ ".jsonl", ".json", ".txt", ".csv", ".tsv", ".parquet" or ".xlsx"; None for a file of another kind."""
    name = file.name.lower()
    return next((suffix.removesuffix(".gz") for suffix in SUFFIXES if name.endswith(suffix)), None)


def find_files(path: str, flag: str, suffixes: tuple[str, ...] = SUFFIXES) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """The data files behind a file, a folder (with its sub-folders) or a glob, sorted; and the files passed over.

    Names that begin with a dot are invisible here, as they are to `ls`.
    """

    def is_kind(file: Path) -> bool:
        return file.name.lower().endswith(suffixes)

    root = _expanded(path)
    if "\0" in path:
        raise ValueError(f"{flag}: found {path!r}, expected a path without zero bytes")
    if _exists(path) and root.is_file():
        if not is_kind(root):
            raise ValueError(f"{flag}: {path} is of no known kind, expected one of {' '.join(suffixes)}")
        return (root,), ()
    if _exists(path) and root.is_dir():
        found = [file for file in root.rglob("*") if file.is_file()]
        found = [file for file in found if not any(part.startswith(".") for part in file.relative_to(root).parts)]
    else:
        found = [Path(name) for name in glob.glob(str(root), recursive=True) if Path(name).is_file()]
        if not found:
            raise ValueError(f"{flag}: {path} not found, expected a file, a folder or a pattern such as 'data/*.jsonl'")
    files = tuple(sorted(file for file in found if is_kind(file)))
    if not files:
        raise ValueError(f"{flag}: no data file in {path}, expected files ending in {' '.join(suffixes)}")
    return files, tuple(sorted(set(found) - set(files)))


def parse_sources(sources: str, flag: str = "--train_file_dir", suffixes: tuple[str, ...] = SUFFIXES) -> list[Source]:
    """Take "a:0.3,b" apart: paths with an optional weight (default 1).

    A path that exists as written wins over a reading as path:weight, and the whole string over a comma list.
    """
    parts = [sources] if _exists(sources) else [part.strip() for part in sources.split(",") if part.strip()]
    if not parts:
        raise ValueError(f"{flag}: found {sources!r}, expected files or folders, such as data/a.jsonl:0.5,data/b")
    return [_parse_source(part, flag, suffixes) for part in parts]


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # ~name of no known user: a name like any other
        return Path(path)


def _exists(path: str) -> bool:
    try:
        return _expanded(path).exists()
    except OSError:  # longer than a path may be, for instance a list of many
        return False


def _parse_source(part: str, flag: str, suffixes: tuple[str, ...]) -> Source:
    path, weight = part, 1.0
    if not _exists(part) and ":" in part:
        head, tail = part.rsplit(":", 1)
        try:
            path, weight = head, float(tail)
        except ValueError:
            weight = 0.0 if _exists(head) else 1.0  # without a file before it a colon is a part of the name
        if not 0 < weight < 1e6:
            raise ValueError(f"{flag}: weight of {head} is {tail}, expected a number above 0, such as 0.3 or 2")
    files, ignored = find_files(path, flag, suffixes)
    return Source(path, weight, files, ignored)


def hash_file(file: Path) -> str:
    """sha256 of the bytes as they lie on disk, in hexadecimal."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------- encoding


def _open_bytes(file: Path) -> BinaryIO:
    return gzip.open(file, "rb") if file.name.lower().endswith(".gz") else open(file, "rb")  # type: ignore[return-value]


def open_text(file: Path, encoding: Encoding, newline: str | None = None) -> TextIO:
    # surrogateescape: undecodable bytes stay recognisable, so that the row that holds them can be refused by its line
    opener = gzip.open if file.name.lower().endswith(".gz") else open
    return opener(file, "rt", encoding=encoding.codec, errors="surrogateescape", newline=newline)


def find_encoding(file: Path) -> Encoding | None:
    """How a text file is to be decoded; None for tables in a binary format, which need no telling."""
    return None if file_kind(file) in BINARY_SUFFIXES else detect_encoding(file)


def detect_encoding(file: Path) -> Encoding:
    """Recognise UTF-8 (with or without BOM), UTF-16 with BOM and GB18030, and Windows line ends, over the whole file.

    GB18030 can decode much of what is not GB18030. So a file that is UTF-8 but for a few bytes is called broken UTF-8
    and not read as GB18030: its characters outnumber its errors, while Chinese text in GB18030 is nearly all errors.
    """
    try:
        with _open_bytes(file) as stream:
            head = stream.read(CHUNK_BYTES)
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            error, ends = _first_error(file, "utf-16")
            if error:
                raise ValueError(f"{file}: UTF-16 by its first bytes, but {error}")
            return Encoding("utf-16", f"UTF-16{ends}")
        if b"\0" in head:
            place = head.index(b"\0")
            raise ValueError(
                f"{file}, line {head.count(10, 0, place) + 1}: zero byte at offset {place}, not a text file; "
                "expected UTF-8, UTF-16 with BOM or GB18030"
            )
        codec, label = ("utf-8-sig", "UTF-8 with BOM") if head.startswith(codecs.BOM_UTF8) else ("utf-8", "UTF-8")
        utf8_error, ends = _first_error(file, codec)
        if utf8_error is None:
            return Encoding(codec, label + ends)
        decoded = head.decode(codec, errors="replace")
        invalid = decoded.count("\ufffd")
        valid = len(decoded) - len(decoded.encode("ascii", "ignore")) - invalid
        if valid <= invalid:
            gb_error, ends = _first_error(file, "gb18030")
            if gb_error is None:
                return Encoding("gb18030", f"GB18030{ends}")
            error = f"not UTF-8 ({utf8_error}), nor GB18030 ({gb_error})"
            return Encoding("gb18030", "GB18030 with undecodable bytes", f"{file}: {error}")
        return Encoding(codec, f"{label} with undecodable bytes", f"{file}: {utf8_error}; expected valid UTF-8")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: broken gzip file ({error}), expected one that `gzip -t` accepts") from None
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror or error})") from None


def _first_error(file: Path, codec: str) -> tuple[str | None, str]:
    """The first undecodable place as "line 3: byte 0xff at offset 120" or None; and ", CRLF" if lines end so."""
    decoder = codecs.getincrementaldecoder(codec)()
    offset, lines, ends, last = 0, 1, "", ""
    with _open_bytes(file) as stream:
        while True:
            chunk = stream.read(CHUNK_BYTES)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                lines += error.object[: error.start].count(b"\n")
                # with a BOM codec the failing object may lack the three BOM bytes at its head
                place = offset + len(chunk) - len(error.object) + error.start
                return f"line {lines}: byte 0x{error.object[error.start]:02x} at offset {place}", ends
            except UnicodeError as error:
                return f"offset {offset - pending}: {error}", ends
            if not chunk:
                return None, ends
            offset += len(chunk)
            lines += text.count("\n")
            if not ends and "\r\n" in last + text:
                ends = ", CRLF"
            last = text[-1:]


# ------------------------------------------------------------------------------------------------------------ records


def read_records(file: Path, encoding: Encoding | None) -> Iterator[tuple[str, Any] | Refusal]:
    """All records of one file, in order. `encoding` is None for parquet and xlsx."""
    kind, empty = file_kind(file), True
    if kind == ".parquet":
        records = _read_parquet(file)
    elif kind == ".xlsx":
        records = _read_excel(file)
    else:
        assert encoding is not None
        reader = {".json": _read_json, ".jsonl": _read_json, ".txt": _read_text}.get(kind or "", _read_table)
        records = reader(file, encoding)
    for record in records:
        empty = False
        if encoding is not None and encoding.error and not isinstance(record, Refusal) and not _is_unicode(record[1]):
            yield _undecodable(*record)
        else:
            yield record
    if empty:
        yield Refusal(str(file), "empty file", f"{file}: empty file, expected at least one row")


def _is_unicode(value: Any) -> bool:
    """False if a string holds a lone surrogate: an undecodable byte, or half a character as a JSON escape."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _undecodable(where: str, row: Any) -> Refusal:
    return Refusal(where, "undecodable bytes", f"{where}: bytes in no known encoding, or half a character", row)


def _read_text(file: Path, encoding: Encoding) -> Iterator[tuple[str, Any] | Refusal]:
    """One document a line; a book of the TCM-Ancient-Books kind (first line `<篇名>...`) gives one a section."""
    with open_text(file, encoding) as stream:
        lines = ((number, line.strip()) for number, line in enumerate(stream, start=1))
        first = next(((number, line) for number, line in lines if line), None)
        if first is None:
            return
        if first[1].startswith(BOOK_HEADING):
            yield from _read_book(file, first, lines)
            return
        yield f"{file}, line {first[0]}", first[1]
        yield from ((f"{file}, line {number}", line) for number, line in lines if line)


def _read_book(file: Path, first: tuple[int, str], lines: Iterator[tuple[int, str]]) -> Iterator[tuple[str, Any]]:
    """Sections of a hard-wrapped book: heading, then the body with the line breaks inside its sentences undone.

    A heading without a body (a part or chapter) is put before the next one.
    """
    start, headings, body = first[0], [first[1].removeprefix(BOOK_HEADING).strip()], ""
    wrapped = False  # whether the line before ended within a sentence
    for number, line in lines:
        if line.startswith(BOOK_HEADING):
            if body:
                yield f"{file}, line {start}", "\n".join([*filter(None, headings), body])
                start, headings, body = number, [], ""
            headings.append(line.removeprefix(BOOK_HEADING).strip())
        elif line.startswith("<目录>"):
            continue  # the path of the section in the table of contents; its last part is the heading
        elif line:
            line = line.replace("\\x", "")  # marks of bold type
            if not body:
                body = re.sub(r"^(内容|属性)：", "", line)
            else:
                body += line if wrapped and not BOOK_FACT.match(line) else "\n" + line
        # blank lines end a paragraph
        wrapped = bool(line) and not SENTENCE_END.search(line)
    if body or any(headings):
        yield f"{file}, line {start}", "\n".join(filter(None, [*headings, body]))


def _read_table(file: Path, encoding: Encoding) -> Iterator[tuple[str, Any] | Refusal]:
    """CSV or TSV with a header; cells may hold line breaks."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the limit of 128 kB is shorter than a clinical guideline
    with open_text(file, encoding, newline="") as stream:
        head = stream.readline()
        stream.seek(0)
        delimiter = "\t" if file_kind(file) == ".tsv" else max(",\t;", key=head.count)
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            where = f"{file}, line {reader.line_num + 1}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                message = f"{where}: {error} (read up to line {reader.line_num}), expected quotes in pairs"
                yield Refusal(where, "invalid CSV", message)
                continue
            if cells is None:
                return
            if not any(cells):
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                doubled = {name for name in header if name and header.count(name) > 1}
                if doubled:
                    raise ValueError(f"{where}: column {doubled.pop()!r} twice, expected a header of different names")
                continue
            if len(cells) != len(header):
                message = f"{where}: found {len(cells)} cells, expected {len(header)} as in the header"
                yield Refusal(where, "cells do not match the header", message, cells)
            else:
                yield where, {name: cell.replace("\r\n", "\n") for name, cell in zip(header, cells, strict=True)}


def _read_parquet(file: Path) -> Iterator[tuple[str, Any] | Refusal]:
    import pyarrow.parquet

    try:
        number = 0
        with pyarrow.parquet.ParquetFile(file, memory_map=True) as table:
            for batch in table.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", row
    except Exception as error:  # damaged pages: errors of Arrow, of the system, or of what stands in place of text
        raise ValueError(f"{file}: not a readable parquet file ({first_line(error)[:200]})") from None


def _read_excel(file: Path) -> Iterator[tuple[str, Any] | Refusal]:
    """The first sheet of a workbook, with a header; every cell as text, formulas as their stored values."""
    import openpyxl

    header: list[str] | None = None
    try:
        book = openpyxl.load_workbook(file, read_only=True, data_only=True)
        with contextlib.closing(book):
            for number, cells in enumerate(book.worksheets[0].iter_rows(values_only=True), start=1):
                values = ["" if cell is None else str(cell).replace("\r\n", "\n") for cell in cells]
                if not any(values):
                    continue
                if header is None:
                    header = [name.strip() for name in values]
                    continue
                values += [""] * (len(header) - len(values))
                where = f"{file}, row {number}"
                if any(values[len(header) :]):
                    message = f"{where}: found {len(values)} cells, expected {len(header)} as in the header"
                    yield Refusal(where, "cells do not match the header", message, values)
                    continue
                yield where, {name: value for name, value in zip(header, values, strict=False) if name}
    except Exception as error:  # a damaged file raises whatever zlib, the XML parser or openpyxl come to first
        raise ValueError(f"{file}: not a readable .xlsx workbook ({first_line(error)[:200]})") from None


def first_line(error: BaseException) -> str:
    """Of its message, or the name of its kind where it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


# --------------------------------------------------------------------------------------------------------------- JSON


def _read_json(file: Path, encoding: Encoding) -> Iterator[tuple[str, Any] | Refusal]:
    """JSON Lines, a JSON list of rows, an object of rows or a single row: told apart by content, not by name."""
    with open_text(file, encoding) as stream:
        number, line = 1, stream.readline(CHUNK_BYTES)
        while line and not line.strip():
            number, line = number + 1, stream.readline(CHUNK_BYTES)
        stream.seek(0)
        if line.lstrip().startswith("["):
            yield from _read_json_list(file, stream)
        elif file_kind(file) == ".json" and not _is_json_line(line):
            yield from _read_json_object(file, stream)
        else:
            yield from _read_json_lines(file, stream)


def _is_json_line(line: str) -> bool:
    """Whether a first line is closed in itself: `{...}`, so that the next one is another row."""
    line = line.strip()
    return line.startswith("{") and line.endswith("}") or not line.startswith("{")


def _read_json_lines(file: Path, stream: TextIO) -> Iterator[tuple[str, Any] | Refusal]:
    first: tuple[str, Any] | None = None
    count = 0
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        count += 1
        record: tuple[str, Any] | Refusal
        try:
            record = (where, json.loads(line))
            if "\\u" in line and not _is_unicode(record[1]):
                record = _undecodable(*record)
        except (ValueError, RecursionError) as error:
            record = _invalid_json(where, error, line.rstrip("\n"))
        if count == 1 and isinstance(record, tuple) and file_kind(file) == ".json":
            first = record  # perhaps the only line: an object of rows
            continue
        if first is not None:
            yield first
            first = None
        yield record
    if first is not None:
        yield from _unfold(first[0], first[1])


def _read_json_object(file: Path, stream: TextIO) -> Iterator[tuple[str, Any] | Refusal]:
    """One object over several lines, or several of them one after another."""
    scanner = _JsonScanner(stream)
    values = []
    while scanner.peek():
        where = f"{file}, line {scanner.line}"
        try:
            values.append((where, scanner.value()))
        except (ValueError, RecursionError) as error:
            yield from values
            yield _invalid_json(f"{file}, line {scanner.line}", error, None, rest=True)
            return
        if len(values) == 2:
            yield values.pop(0)
    if scanner.count == 1:
        yield from _unfold(*values[0])
    else:
        yield from values


def _unfold(where: str, value: Any) -> Iterator[tuple[str, Any]]:
    """An object whose values are all rows, or that wraps one list of rows, gives those rows; any other is one row."""
    if isinstance(value, dict) and value and all(isinstance(row, dict) for row in value.values()):
        yield from ((f"{where}, key {key!r}", row) for key, row in value.items())
    elif isinstance(value, dict) and len(value) == 1 and next(iter(value)) in ("data", "rows", "train", "examples"):
        (rows,) = value.values()
        if isinstance(rows, list):
            yield from ((f"{where}, row {number}", row) for number, row in enumerate(rows, start=1))
        else:
            yield where, value
    else:
        yield where, value


def _read_json_list(file: Path, stream: TextIO) -> Iterator[tuple[str, Any] | Refusal]:
    scanner = _JsonScanner(stream)
    scanner.peek()
    scanner.position += 1  # the opening bracket
    row = 0
    try:
        while True:
            following = scanner.peek()
            if following == "]":
                scanner.position += 1
                break
            if row:
                if following != ",":
                    raise json.JSONDecodeError("expected ',' or ']'", "", 0)
                scanner.position += 1
                scanner.peek()
            row += 1
            where = f"{file}, line {scanner.line}, row {row}"
            value = scanner.value()
            yield _undecodable(where, value) if scanner.escaped and not _is_unicode(value) else (where, value)
        if scanner.peek():
            raise json.JSONDecodeError("text after the end of the list", "", 0)
    except (ValueError, RecursionError) as error:
        yield _invalid_json(f"{file}, line {scanner.line}", error, None, rest=True)


def _invalid_json(where: str, error: Exception, row: Any, rest: bool = False) -> Refusal:
    if isinstance(error, json.JSONDecodeError):
        found = error.msg
    else:  # of the two limits that Python's parser has beside the grammar
        found = "nested too deeply" if isinstance(error, RecursionError) else "a number of more than 4,300 digits"
    column = f" at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) and row is not None else ""
    reason = "invalid JSON, rest of the file not read" if rest else "invalid JSON"
    return Refusal(where, reason, f"{where}: invalid JSON ({found}{column}), expected one valid JSON value a row", row)


class _JsonScanner:
    """Values one after another out of a JSON stream of any size; holds no more than the value being read.

    `count` values were read so far; `escaped` tells whether the last one holds a \\u escape.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.buffer, self.position = stream, "", 0
        self.ended, self.count, self.escaped = False, 0, False
        self.decode = json.JSONDecoder().raw_decode
        self._counted, self._lines = 0, 1

    @property
    def line(self) -> int:
        """Line of the current position."""
        self._lines += self.buffer.count("\n", self._counted, self.position)
        self._counted = self.position
        return self._lines

    def peek(self) -> str:
        """Skip white space; the next character, or "" at the end."""
        while True:
            while self.position < len(self.buffer) and self.buffer[self.position] in " \t\r\n":
                self.position += 1
            if self.position < len(self.buffer):
                return self.buffer[self.position]
            if not self._read_more():
                return ""

    def value(self) -> Any:
        """Decode the value at the position; JSONDecodeError leaves the position at the error."""
        while True:
            try:
                value, end = self.decode(self.buffer, self.position)
                if end < len(self.buffer) or self.ended or not self._read_more():
                    self.escaped = self.buffer.find("\\u", self.position, end) >= 0
                    self.position = end
                    self.count += 1
                    return value
            except json.JSONDecodeError as error:
                # near the end of what was read, or an open string: perhaps only cut off
                cut = error.msg.startswith("Unterminated string") or len(self.buffer) - error.pos < 16
                if not (cut and self._read_more()):
                    self.position = min(error.pos, len(self.buffer))
                    raise

    def _read_more(self) -> bool:
        if self.ended:
            return False
        _ = self.line
        self.buffer, kept = self.buffer[self.position :], len(self.buffer) - self.position
        self.position = self._counted = 0
        more = self.stream.read(max(CHUNK_BYTES, kept))  # at least doubled: long values cost linear time
        self.buffer += more
        self.ended = not more
        return not self.ended

"""The text of PDF and DOCX files, read in a process of its own with limits on time and memory.

Such files come from strangers, and a broken or hostile one can keep a parser busy for ever: it must cost one file, not
the program. Run as `python -m suwen.retrieval.office FILE` it prints one JSON list [page, text] a line.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120
MEMORY_BYTES = 4 << 30
CHARACTERS = 20_000_000  # a large textbook has two million


class Unreadable(ValueError):
    """A file that gives no text; `reason` is short enough to count by."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}{': ' if detail else ''}{detail}")
        self.reason = reason


def read_pages(file: Path, seconds: float = SECONDS) -> list[tuple[int | None, str]]:
    """(page from 1, text) of each page of a PDF; (None, text) of a DOCX, headings as Markdown's.

    Raises:
        Unreadable: no text comes out of it.
    """
    command = [sys.executable, "-m", "suwen.retrieval.office", str(file.resolve())]
    try:
        child = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        raise Unreadable("takes too long to read", f"stopped after {seconds:g} s") from None
    lines = child.stdout.decode("utf-8", errors="replace").splitlines()
    if child.returncode == 3 and lines:
        raise Unreadable(*json.loads(lines[-1]))
    if child.returncode != 0:
        last = child.stderr.decode("utf-8", errors="replace").strip().splitlines()[-1:]
        raise Unreadable("broken file", last[0][:200] if last else f"the reader ended with {child.returncode}")
    return [(page, text) for page, text in map(json.loads, lines)]


def _pdf_pages(file: Path) -> Iterator[tuple[int | None, str]]:
    from pypdf import PdfReader

    reader = PdfReader(file)
    if reader.is_encrypted and not reader.decrypt(""):
        raise Unreadable("needs a password")
    written = False
    for number, page in enumerate(reader.pages, start=1):
        text = page.extract_text().strip()
        written = written or any(map(str.isalnum, text))
        yield number, _unwrap(text)
    if not written:
        raise Unreadable("no text in it", "scanned perhaps: it needs text recognition (OCR) first")


def _unwrap(text: str) -> str:
    """Join the lines that a page broke within a sentence; short lines, such as headings, stay by themselves."""
    lines = text.split("\n")
    longest = max(map(len, lines))
    joined = ""
    for line in lines:
        joined += line.rstrip()
        full = len(line) >= 0.75 * longest and len(line) >= 12
        joined += "\r" if full and not re.search(r"[。！？；：!?;:]\s*$", line) else "\n"
    # A line that is full and ends within a sentence goes on in the next one, with a space between Latin words.
    joined = re.sub(r"(?<=[A-Za-z0-9,.])\r(?=[A-Za-z0-9])", " ", joined)
    return joined.replace("\r", "").strip()


def _docx_pages(file: Path) -> Iterator[tuple[int | None, str]]:
    import docx
    from docx.table import Table

    lines = []
    for block in docx.Document(str(file)).iter_inner_content():
        if isinstance(block, Table):
            # A cell that spans several columns is listed once for each
            rows = ([cell.text.strip() for cell in row.cells] for row in block.rows)
            lines += [" | ".join(c for i, c in enumerate(row) if i == 0 or c != row[i - 1]) for row in rows]
        elif block.text.strip():
            style = (block.style.name or "") if block.style is not None else ""
            lines.append(f"# {block.text.strip()}" if style.startswith(("Heading", "Title", "标题")) else block.text)
    if not any(any(map(str.isalnum, line)) for line in lines):
        raise Unreadable("no text in it")
    yield None, "\n".join(lines)


def main() -> None:
    import logging

    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    except (ImportError, ValueError, OSError):
        pass  # a system without such limits: time alone is limited
    logging.disable(logging.CRITICAL)
    file = Path(sys.argv[1])
    characters = 0
    try:
        for page, text in (_pdf_pages if file.suffix.lower() == ".pdf" else _docx_pages)(file):
            characters += len(text)
            if characters > CHARACTERS:
                raise Unreadable("too long", f"more than {CHARACTERS} characters")
            sys.stdout.write(json.dumps([page, text]) + "\n")
    except Unreadable as error:
        sys.stdout.write(json.dumps([error.reason, str(error).removeprefix(error.reason).lstrip(": ")]) + "\n")
        sys.exit(3)
    except MemoryError:
        sys.stdout.write(json.dumps(["needs too much memory", f"more than {MEMORY_BYTES >> 30} GB"]) + "\n")
        sys.exit(3)
    except Exception as error:  # whatever a parser makes of a broken file
        sys.stdout.write(json.dumps(["broken file", f"{type(error).__name__}: {error}"[:200]]) + "\n")
        sys.exit(3)


if __name__ == "__main__":
    main()

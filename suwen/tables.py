"""What a terminal shows: tables, in which a Chinese character takes two columns, counted things, text of models."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line break


def printable(text: str) -> str:
    """Text that somebody else wrote, without what would move the cursor or colour the terminal."""
    return CONTROL.sub("", text)


def counted(number: int, thing: str, many: str = "") -> str:
    """ "1 update", "2 updates"."""
    return f"{number:,} {thing if number == 1 else many or thing + 's'}"


def width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def pad_cells(cells: Sequence[str], right: bool = False) -> list[str]:
    """Cells of one column, padded to the widest; with `right` on their left side."""
    widest = max(map(width, cells), default=0)
    fill = [" " * (widest - width(cell)) for cell in cells]
    return [space + cell if right else cell + space for cell, space in zip(cells, fill, strict=True)]


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns padded to their widest cell; the first `left` ones to the left, all others to the right."""
    columns = zip(*rows, strict=True)
    padded = [pad_cells(column, right=i >= left) for i, column in enumerate(columns)]
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*padded, strict=True))

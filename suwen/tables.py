"""Tables on a terminal, where a Chinese character takes two columns."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence


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

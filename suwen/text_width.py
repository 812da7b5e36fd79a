"""Columns on a terminal, where a Chinese character takes two."""

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

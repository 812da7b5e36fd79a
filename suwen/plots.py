"""Pictures of scores as SVG text, to stand inside a page: no library, no network, sharp at any size."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

ROW, LEFT, RIGHT, TOP, WIDTH = 26, 190, 70, 26, 720
COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#805ad5", "#b83280", "#718096")


class Point(NamedTuple):
    """One score: its label, the series that gives its colour, and its interval (None where there is none)."""

    label: str
    series: int
    value: float
    low: float | None = None
    high: float | None = None


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers from `low` or below to `high` or above, two at least."""
    span = (high - low) or max(abs(low) / 10, 1.0)
    step = 10 ** math.floor(math.log10(span / count))
    step = next(step * factor for factor in (1, 2, 5, 10) if span / (step * factor) <= count)
    first = math.floor(low / step)
    last = max(math.ceil(high / step), first + 1)
    return [round(step * k, 10) for k in range(first, last + 1)]


def score_plot(points: Sequence[Point], floors: dict[str, float], caption: str) -> str:
    """Scores as dots with their intervals, one a line; floors as dashed lines."""
    numbers = [x for p in points for x in (p.value, p.low, p.high) if x is not None] + list(floors.values())
    marks = ticks(min(numbers), max(numbers))
    start, end = marks[0], marks[-1]

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - start) / (end - start)

    bottom = TOP + ROW * len(points)
    height = bottom + 34 + 15 * len(floors)
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img" aria-label="scores with intervals">']
    for mark in marks:
        parts.append(f'<line x1="{x(mark):.1f}" x2="{x(mark):.1f}" y1="{TOP}" y2="{bottom}" class="grid"/>')
        parts.append(f'<text x="{x(mark):.1f}" y="{bottom + 16}" class="tick" text-anchor="middle">{mark:g}</text>')
    parts.append(f'<text x="{LEFT}" y="{TOP - 10}" class="tick">{html.escape(caption)}</text>')
    for i, (name, value) in enumerate(floors.items()):
        place = bottom + 34 + 15 * i
        parts.append(f'<line x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{TOP}" y2="{place - 9}" class="floor"/>')
        side = "end" if x(value) > WIDTH * 0.7 else "start"
        text = f"{html.escape(name)} {value:.1f}"
        parts.append(f'<text x="{x(value):.1f}" y="{place}" class="tick" text-anchor="{side}">{text}</text>')
    for i, point in enumerate(points):
        y, colour = TOP + ROW * (i + 0.5), COLOURS[point.series % len(COLOURS)]
        parts.append(
            f'<text x="{LEFT - 12}" y="{y + 4:.1f}" class="label" text-anchor="end">{html.escape(point.label)}</text>'
        )
        if point.low is not None and point.high is not None:
            line = f'x1="{x(point.low):.1f}" x2="{x(point.high):.1f}" y1="{y:.1f}" y2="{y:.1f}"'
            parts.append(f'<line {line} stroke="{colour}" stroke-width="3" stroke-linecap="round" opacity=".45"/>')
        parts.append(f'<circle cx="{x(point.value):.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>')
        right = x(point.high if point.high is not None else point.value)
        parts.append(f'<text x="{right + 9:.1f}" y="{y + 4:.1f}" class="value">{point.value:.4g}</text>')
    return "\n".join([*parts, "</svg>"])

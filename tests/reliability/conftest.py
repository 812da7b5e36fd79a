"""The table that the suite prints at its end."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import pytest


@dataclass
class Line:
    injected: int = 0
    survived: int = 0
    lost_steps: list[int] = field(default_factory=list)
    damaged_bytes: int = 0
    detected_bytes: int = 0


class Ledger:
    """Faults by kind; a fault counts as survived when all assertions about it hold."""

    def __init__(self) -> None:
        self.lines: dict[str, Line] = defaultdict(Line)

    def add(self, kind: str, lost_steps: int | None = None, damaged_bytes: int = 0, detected_bytes: int = 0) -> None:
        line = self.lines[kind]
        line.survived += 1
        line.damaged_bytes += damaged_bytes
        line.detected_bytes += detected_bytes
        if lost_steps is not None:
            line.lost_steps.append(lost_steps)

    def inject(self, kind: str) -> None:
        self.lines[kind].injected += 1


LEDGER = pytest.StashKey[Ledger]()


def pytest_configure(config):
    config.stash[LEDGER] = Ledger()


@pytest.fixture
def ledger(request) -> Ledger:
    return request.config.stash[LEDGER]


def pytest_terminal_summary(terminalreporter, config):
    lines = config.stash[LEDGER].lines
    if not lines:
        return
    terminalreporter.section("faults")
    head = ("fault", "injected", "survived", "lost steps (mean, most)", "bytes damaged", "detected")
    terminalreporter.write_line("{:<46}{:>9}{:>10}{:>25}{:>15}{:>10}".format(*head))
    for kind, line in lines.items():
        lost = line.lost_steps
        steps = f"{sum(lost) / len(lost):.1f}, {max(lost)}" if lost else "-"
        terminalreporter.write_line(
            f"{kind:<46}{line.injected:>9}{line.survived:>10}{steps:>25}{line.damaged_bytes or '-':>15}"
            f"{line.detected_bytes or '-':>10}"
        )

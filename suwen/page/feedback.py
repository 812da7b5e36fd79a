"""Likes, dislikes and votes: counted, and kept in a file where that was asked for, with personal data masked."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from suwen.personal_data import mask_personal_data
from suwen.records import timestamp
from suwen.statistics import Interval, wilson_interval


class Standing(NamedTuple):
    name: str
    won: int
    voted: int  # votes on comparisons that it took part in, without ties
    interval: Interval  # of won / voted


class Feedback:
    """One per server; threads may share it. Votes in the file count on after a restart.

    Raises:
        ValueError: the file cannot be written, or is not of this program.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = Path(path).expanduser() if path else None
        self.lock = threading.Lock()
        self.won: Counter[str] = Counter()
        self.voted: Counter[str] = Counter()
        self.ties = 0
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+", encoding="utf-8") as stream:
                stream.seek(0)
                for number, line in enumerate(stream, start=1):
                    self._count_line(line, number)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--feedback_file {path}: {error}, expected a file to write to") from None

    def _count_line(self, line: str, number: int) -> None:
        try:
            row = json.loads(line)
            if row["kind"] == "vote":
                self._count(row["best"], row["names"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"--feedback_file {self.path}, line {number}: not of this program; give another") from None

    def _count(self, best: str | None, names: Sequence[str]) -> None:
        if best is None:
            self.ties += 1
            return
        self.won[best] += 1
        self.voted.update(names)

    def rate(self, liked: bool, messages: list[dict], model: dict[str, Any]) -> None:
        """Keep what somebody thinks of the last of these messages."""
        self._write({"kind": "like" if liked else "dislike", "model": model, "messages": messages})

    def vote(self, best: str | None, answers: dict[str, str], question: str, models: list[dict[str, Any]]) -> None:
        """Count a vote on answers, model -> text; `best` is None where none was better."""
        with self.lock:
            self._count(best, list(answers))
        row = {"question": question, "answers": answers, "models": models}
        self._write({"kind": "vote", "best": best, "names": list(answers), **row})

    def standings(self) -> list[Standing]:
        """The best first, by the lower end of its interval."""
        with self.lock:
            counts = [(name, self.won[name], voted) for name, voted in self.voted.items()]
        found = [Standing(name, won, voted, wilson_interval(won, voted)) for name, won, voted in counts]
        return sorted(found, key=lambda standing: -standing.interval.low)

    def _write(self, row: dict[str, Any]) -> None:
        if self.path is None:
            return
        line = json.dumps(masked({"time": timestamp(), "ai_generated": True, **row}), ensure_ascii=False) + "\n"
        with self.lock, open(self.path, "a", encoding="utf-8", errors="replace") as stream:
            stream.write(line)


def masked(value: Any) -> Any:
    """The same structure with personal data masked in what people and models wrote: questions, answers, messages."""

    def mask(inner: Any) -> Any:
        if isinstance(inner, str):
            return mask_personal_data(inner)
        if isinstance(inner, dict):
            return {name: mask(part) for name, part in inner.items()}
        return [mask(part) for part in inner] if isinstance(inner, list) else inner

    written = ("question", "answers", "messages")
    return {name: mask(part) if name in written else part for name, part in value.items()}

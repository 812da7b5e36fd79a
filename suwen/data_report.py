"""What became of every row that a stage read, as a record and as a table for people."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from suwen.tables import width

VALIDATION = " (validation)"  # behind the names of validation files


@dataclass
class Report:
    """What became of every row that was read."""

    files: dict[str, int] = field(default_factory=dict)  # rows read, by file
    encodings: dict[str, str] = field(default_factory=dict)
    refused_by_file: dict[str, int] = field(default_factory=dict)
    rows_read: int = 0
    rows_refused: Counter[str] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)  # what was put right in rows that are used
    keys_left_aside: list[str] = field(default_factory=list)
    rows_left_out: Counter[str] = field(default_factory=Counter)  # by weights and sample limits
    rows_repeated: int = 0
    rows_dropped: Counter[str] = field(default_factory=Counter)  # by the encoder
    rows_encoded: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    validation_rows: int = 0
    validation_tokens: int = 0
    validation_trained_tokens: int = 0
    validation_rows_seen_in_training: int = 0
    notes: list[str] = field(default_factory=list)
    rejected_file: str | None = None
    fingerprint: str = ""  # sha256 of the encoded training rows
    contents: dict[str, str] = field(default_factory=dict)  # sha256 of each file, as this run read it
    seconds: float = 0.0
    from_cache: bool = False

    def to_dict(self) -> dict[str, Any]:
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Report:
        report = cls()
        for name, value in values.items():
            setattr(report, name, Counter(value) if isinstance(getattr(report, name), Counter) else value)
        return report

    def name_as(self, contents: dict[str, str]) -> None:
        """Call the files as this run does: a cache is of their content, which another run may have had elsewhere."""
        if len(contents) == len(self.contents):  # else a file was given twice then or now
            names = dict(zip(self.contents, contents, strict=True))
            names |= {f"{old}{VALIDATION}": f"{new}{VALIDATION}" for old, new in names.items()}
            self.files = {names.get(name, name): rows for name, rows in self.files.items()}
            self.encodings = {names.get(name, name): label for name, label in self.encodings.items()}
            self.refused_by_file = {names.get(name, name): rows for name, rows in self.refused_by_file.items()}
        self.contents = contents

    def lines(self) -> list[str]:
        """A table for people; long lists of files are cut in the middle, the full list is in `to_dict`."""
        names = list(self.files)
        shown = names if len(names) <= 16 else [*names[:12], "", *names[-3:]]
        widest = max(map(width, shown), default=0)
        lines = ["data"]
        for name in shown:
            if not name:
                lines.append(f"  ... {len(names) - 15} more files")
                continue
            refused = self.refused_by_file.get(name, 0)
            tail = f", {refused:,} refused" if refused else ""
            padded = name + " " * (widest - width(name))
            lines.append(f"  {padded}  {self.encodings.get(name, 'binary')}, {self.files[name]:,} rows{tail}")
        lines.append(f"  read {self.rows_read:,} rows, refused {sum(self.rows_refused.values()):,}")
        groups = (("refused", self.rows_refused), ("put right", self.changes), ("not chosen", self.rows_left_out))
        for title, counts in (*groups, ("left out by the encoder", self.rows_dropped)):
            lines += [f"  {title}: {count:,} x {reason}" for reason, count in sorted(counts.items())]
        if self.rows_repeated:
            lines.append(f"  repeated by weights: {self.rows_repeated:,} rows")
        if self.keys_left_aside:
            lines.append(f"  keys left aside: {', '.join(self.keys_left_aside)}")
        lines.append("  " + _tokens_line("training", self.rows_encoded, self.tokens, self.trained_tokens))
        if self.validation_rows:
            tokens = (self.validation_rows, self.validation_tokens, self.validation_trained_tokens)
            lines.append("  " + _tokens_line("validation", *tokens))
        if self.rejected_file:
            lines.append(f"  refused rows are in {self.rejected_file}")
        lines += [f"  warning: {note}" for note in self.notes]
        origin = "taken from the cache, prepared before" if self.from_cache else "prepared"
        seconds = max(self.seconds, 1e-3)
        all_tokens = self.tokens + self.validation_tokens
        speed = f"{self.seconds:.1f} s ({self.rows_read / seconds:,.0f} rows/s, {all_tokens / seconds:,.0f} tokens/s)"
        lines.append(f"  {origin} in {speed}, fingerprint {self.fingerprint[:16]}")
        return lines


def _tokens_line(name: str, rows: int, tokens: int, trained: int) -> str:
    share = f"{trained / tokens:.1%}" if tokens else "0%"
    line = f"{name}: {rows:,} encoded rows, {tokens:,} tokens"
    return line + f", {trained:,} of them trained ({share})" if trained else line  # of prompts none is

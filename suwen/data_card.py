"""The data card: what a built data set is made of, as data_card.json and as a page for people."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from suwen.cleaning import CleaningReport
from suwen.data_folder import RowFile
from suwen.readers import Source, hash_file

KNOWN_LICENCES = re.compile(r"Apache License,\s+Version 2\.0|MIT License|CC0|CC[ -]BY[-A-Z]*(?: \d\.\d)?|GPL-\d\.\d")
LICENCE_FILES = ("LICENSE", "LICENCE", "LICENSE.txt", "LICENSE.md")


def licence_of(path: Path) -> str:
    """What a licence file beside the data or one folder up names, or its first line; "not stated" without one."""
    folder = path if path.is_dir() else path.parent
    for name in (found for place in (folder, folder.parent) for found in (place / name for name in LICENCE_FILES)):
        if name.is_file():
            text = name.read_text("utf-8", "replace")
            known = KNOWN_LICENCES.search(text)
            first = next((line.strip() for line in text.split("\n") if line.strip()), "empty")
            return f"{' '.join(known[0].split()) if known else first} ({name.name})"
    return "not stated"


def source_entry(kind: str, source: Source, licence: str = "") -> dict[str, Any]:
    files = [{"file": file.name, "bytes": file.stat().st_size, "sha256": hash_file(file)} for file in source.files]
    return {
        "kind": kind,
        "path": source.path,
        "weight": source.weight,
        "licence": licence or licence_of(Path(source.path)),
        "files": files,
        "ignored": [str(file) for file in source.ignored],  # of kinds that are not read
    }


def lengths_entry(lengths: Sequence[int]) -> dict[str, int]:
    """Characters of a row: smallest, median, 95th percentile, largest."""
    if not lengths:
        return {"min": 0, "median": 0, "p95": 0, "max": 0}
    values: list[int] = np.percentile(lengths, [0, 50, 95, 100]).astype(int).tolist()
    return dict(zip(("min", "median", "p95", "max"), values, strict=True))


def output_entry(file: RowFile, folder: Path) -> dict[str, Any]:
    return {
        "file": str(file.path.relative_to(folder)),
        "rows": file.rows,
        "duplicates": file.duplicates,
        "characters": file.characters,
        "length": lengths_entry(file.lengths),
        "recipes": dict(sorted(file.recipes.items())),
        "groups": {group: count for group, count in sorted(file.groups.items()) if group},
        "sha256": hash_file(file.path),
    }


def cleaning_entry(report: CleaningReport) -> dict[str, Any]:
    return {
        "rows_in": report.rows_in,
        "rows_out": report.rows_out,
        "characters_in": report.characters_in,
        "characters_out": report.characters_out,
        "dropped": dict(sorted(report.dropped.items())),
        "changed": {name: count for name, count in sorted(report.changed.items()) if count},
        "personal_data": dict(sorted(report.personal_data.items())),
    }


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; numbers with thousands separators."""

    def cell(value: Any) -> str:
        return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|").replace("\n", " ")

    lines = [list(head), ["---"] * len(head), *([cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def counts(values: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in values.items()) or "none"


def render(card: dict[str, Any]) -> str:
    """data_card.md."""
    parts = [
        f"# Data card: {card['recipe']}",
        f"Built by `{card['command']}`, seed {card['seed']}. {card['notice']}",
        "## Sources",
        table(
            ("kind", "path", "weight", "licence", "files", "bytes", "sha256 of the first"),
            (
                (s["kind"], s["path"], s["weight"], s["licence"], len(s["files"]), sum(f["bytes"] for f in s["files"]))
                + (s["files"][0]["sha256"][:16],)
                for s in card["sources"]
            ),
        )
        if card["sources"]
        else "None: the graph is fictional and made from the seed.",
        *(f"Passed over, of no known kind: {', '.join(names)}." for s in card["sources"] if (names := s["ignored"])),
        "## Files",
        table(
            ("file", "rows", "duplicates", "characters", "median", "p95", "recipes", "groups", "sha256"),
            (
                (f["file"], f["rows"], f["duplicates"], f["characters"], f["length"]["median"], f["length"]["p95"])
                + (counts(f["recipes"]), counts(f["groups"]), f["sha256"][:16])
                for f in card["files"]
            ),
        ),
    ]
    if graph := card.get("graph"):
        relations = [(name, *values.values()) for name, values in graph["relations"].items()]
        parts += [
            "## Graph",
            f"{graph['entities']:,} entities, {graph['facts']:,} facts. Inconsistencies: {graph['problems']:,}. "
            f"Left out or put right: {counts(graph['left_out'])}.",
            table(("relation", "facts", "entities", "different values", "training rows"), relations),
            f"Facts that no evaluation asks: {counts(graph['not_evaluated'])}.",
            f"Personal data in rows made of it: {counts(graph['personal_data'])} ({card['personal_data_mode']}).",
        ]
    if card["cleaning"]:
        parts += [
            "## Cleaning",
            table(
                (
                    "stage",
                    "rows in",
                    "rows out",
                    "characters in",
                    "characters out",
                    "dropped",
                    "changed",
                    "personal data",
                ),
                (
                    (stage, c["rows_in"], c["rows_out"], c["characters_in"], c["characters_out"])
                    + (counts(c["dropped"]), counts(c["changed"]), counts(c["personal_data"]))
                    for stage, c in card["cleaning"].items()
                ),
            ),
            f"Personal data: {card['personal_data_mode']}.",
        ]
    refused, left_out = counts(card["refused"]), counts(card["left_out"])
    parts += [
        "## Checks",
        f"Rows refused: {refused}. Generated rows left out: {left_out}. "
        f"Leaks between training and evaluation: {card['leaks']['count']:,}.",
    ]
    if found := card["retrieval"]:
        parts[-1] += (
            f" Retrieval of {found['passages']} passages finds the right one for {found['right_passage_found']:,} of "
            f"{found['questions']:,} questions."
        )
    if card["leaks"]["first"]:
        parts.append("\n".join(f"- {line}" for line in card["leaks"]["first"]))
    return "\n\n".join(parts) + "\n"

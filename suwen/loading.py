"""Files of any known format to canonical rows, checked, with the place of each; refused rows go to a file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from suwen import readers
from suwen.data_report import Report
from suwen.formats import EXPECTED, KNOWN_KEYS, SCHEMAS, BadRow, canonical_rows, parse_columns
from suwen.questions import OPTION_KEYS, prompt_rows
from suwen.readers import Encoding, Refusal, parse_sources


def load_rows(
    sources: str,
    schema: str,
    columns: str | None = None,
    on_bad_rows: str = "error",
    rejected_file: Path | None = None,
    report: Report | None = None,
) -> Iterator[dict[str, Any]]:
    """Stream the canonical rows of all sources, each once (weights are for `prepare_data`), with their `where`.

    Args:
        sources: comma list of files, folders and patterns.
        schema: one of SCHEMAS.
        columns: "prompt=ask,response=answer" for tables whose keys are not known.
        on_bad_rows: "error" stops at the first bad row, "skip" counts it and writes it to `rejected_file`.
        report: filled with what was read and refused.

    Raises:
        ValueError: names file and line of the first bad row, or the source that is missing or empty.
    """
    report = Report() if report is None else report
    files = [file for source in parse_sources(sources) for file in source.files]
    with RejectedRows(rejected_file) as rejected:
        yield from read_files(files, schema, columns, on_bad_rows, rejected, report)


class RejectedRows:
    """rejected_rows.jsonl, made when the first row is refused."""

    def __init__(self, file: Path | None) -> None:
        self.file, self.stream = file, None

    stream: TextIO | None

    def __enter__(self) -> RejectedRows:
        return self

    def __exit__(self, *_: object) -> None:
        if self.stream is not None:
            self.stream.close()

    def write(self, refusal: Refusal) -> None:
        if self.file is None:
            return
        if self.stream is None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            # backslashreplace writes an undecodable byte as a JSON escape
            self.stream = open(self.file, "w", encoding="utf-8", errors="backslashreplace")
        values = {"where": refusal.where, "reason": refusal.reason, "message": refusal.message, "row": refusal.row}
        self.stream.write(json.dumps(values, ensure_ascii=False, default=str) + "\n")


def read_files(
    files: Sequence[Path],
    schema: str,
    columns: str | None,
    on_bad_rows: str,
    rejected: RejectedRows,
    report: Report,
    encodings: dict[Path, Encoding | None] | None = None,
    part: str = "",
) -> Iterator[dict[str, Any]]:
    """Canonical rows of `files`; `encodings` remembers what was detected, for the next pass

    `part` is put after file names in the report.
    """
    if schema not in SCHEMAS:
        raise ValueError(f"schema: found {schema!r}, expected one of {', '.join(SCHEMAS)}")
    mapping = parse_columns(columns)
    encodings = {} if encodings is None else encodings
    mapped, rows = 0, 0
    keys_seen: set[str] = set()
    for file in files:
        if file not in encodings:
            encodings[file] = readers.find_encoding(file)
        encoding, name = encodings[file], f"{file}{part}"
        if encoding is not None:
            if encoding.error and on_bad_rows == "error":
                raise ValueError(encoding.error)
            report.encodings[name] = encoding.label
        report.files.setdefault(name, 0)
        for record in readers.read_records(file, encoding):
            if not (isinstance(record, Refusal) and record.reason == "empty file"):
                report.files[name] += 1
                report.rows_read += 1
            if isinstance(record, Refusal):
                refusal = record
            else:
                where, value = record
                if isinstance(value, dict):
                    keys_seen.update(value)
                    mapped += bool(mapping) and all(column in value for column in mapping.values())
                try:
                    found = (
                        prompt_rows(value, mapping, report.changes)
                        if schema == "prompt"
                        else canonical_rows(value, schema, mapping, report.changes)
                    )
                    for row in found:
                        rows += 1
                        yield {**row, "where": where}
                    continue
                except BadRow as error:
                    refusal = Refusal(where, error.reason, f"{where}: {error}", value)
            if on_bad_rows == "error":
                raise ValueError(refusal.message)
            report.rows_refused[refusal.reason] += 1
            report.refused_by_file[name] = report.refused_by_file.get(name, 0) + 1
            rejected.write(refusal)
    if mapping and not mapped:
        raise ValueError(f"--columns {columns}: no row has these columns; found {', '.join(sorted(keys_seen))}")
    known = set(mapping.values()) if mapping else KNOWN_KEYS
    known = known | OPTION_KEYS if schema == "prompt" else known
    aside = {key for key in keys_seen if key not in known and key.strip().lower() not in known}
    report.keys_left_aside = sorted({*report.keys_left_aside, *aside})
    if not rows:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in report.rows_refused.items())
        places = str(files[0]) + (f" and {len(files) - 1} more files" if len(files) > 1 else "")
        raise ValueError(f"{places}: no usable row ({reasons}), expected {EXPECTED[schema]}")

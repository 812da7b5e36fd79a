"""Questions out of a file, and a file of answers that survives being cut off. Standard library only."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suwen.formats import ANSWERS, ROLES, TURN_LISTS, BadRow, canonical_rows
from suwen.readers import Refusal, file_kind, find_encoding, read_records

EXPECTED = "a prompt: text, or an object with prompt, question, instruction, messages or conversations"
STAND_IN = {"role": "assistant", "content": "-"}


@dataclass(frozen=True)
class Prompt:
    where: str  # "file, line 3"
    messages: list[dict]


def load_prompts(path: str, system_prompt: str = "") -> list[Prompt]:
    """The questions of a file: .jsonl, .json, .csv, .parquet (also .gz), or .txt with a prompt a line.

    Answers in the rows are left out: of a conversation, everything up to the last question is asked.

    Args:
        system_prompt: put before conversations that bring none of their own.

    Raises:
        ValueError: the first row that holds no question, by file and line.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"--data_file: {path} not found, expected a file of questions")
    if file_kind(file) is None:
        raise ValueError(f"--data_file: {path} is of no known kind, expected .jsonl, .json, .csv, .parquet or .txt")
    prompts = []
    for record in read_records(file, find_encoding(file)):
        if isinstance(record, Refusal):
            raise ValueError(record.message)
        where, row = record
        prompts.append(Prompt(where, with_system_prompt(parse_prompt(row, where), system_prompt)))
    return prompts


def with_system_prompt(messages: list[dict], system_prompt: str) -> list[dict]:
    if system_prompt and messages[:1] and messages[0]["role"] != "system":
        return [{"role": "system", "content": system_prompt}, *messages]
    return messages


def parse_prompt(row: Any, where: str) -> list[dict]:
    """Messages that end with a question, out of a row of any shape that training reads; its answer is left out.

    The row is read by the rules of training, with a stand-in where it has no answer, so that one row gives the
    same prompt here and there. A question in several wordings is asked in the first of them.
    """
    if isinstance(row, str):
        return [{"role": "user", "content": row}]
    if not isinstance(row, dict):
        raise ValueError(f"{where}: found {type(row).__name__}, expected {EXPECTED}")
    fields = {str(key).strip().lower(): value for key, value in row.items() if value is not None}
    for key in ("chosen", "rejected", "response_chosen", "response_rejected"):
        fields.pop(key, None)
    name = next((name for name in TURN_LISTS if name in fields), None)
    if name and isinstance(fields[name], list):
        # A system prompt alone is no question: it stays refused as a row without one.
        if fields[name] and isinstance(fields[name][-1], dict):
            fields[name] = [*fields[name], *([STAND_IN] if _speaker(fields[name][-1]) == "user" else [])]
    else:
        answers = [key for key in ANSWERS if key in fields] or ["output"]
        fields |= dict.fromkeys(answers, STAND_IN["content"])
    try:
        messages = canonical_rows(fields, "conversation", {}, Counter())[0]["messages"]
    except BadRow as error:
        if "expected a question and its answer" in str(error):
            raise ValueError(f"{where}: found no question, expected {EXPECTED}") from None
        if "expected a conversation" not in str(error):
            raise ValueError(f"{where}: {error}") from None
        # That message is about rows of training: it names the stand-in, and answers that are not needed here.
        raise ValueError(
            f"{where}: found the keys {', '.join(map(str, row)) or '(none)'}, expected {EXPECTED}"
        ) from None
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] != "user":
        raise ValueError(f"{where}: found no question, expected {EXPECTED}")
    return messages


def _speaker(turn: dict) -> str | None:
    said = next((turn[key] for key in ("role", "from", "speaker") if turn.get(key) is not None), None)
    return ROLES.get(said.strip().lower()) if isinstance(said, str) else None


class AnswerFile:
    """A .jsonl of answers that grows as they come, goes on where it was cut off, and ends in the questions' order.

    Each row has its `index`, the place of its question from 0. What the rows were made with stands beside the file, in
    `<file>.run.json`, so that answers of another model or other questions are never mixed in. For a table, a path that
    ends in .csv, the rows grow in `<path>.jsonl`, and the table is written of them in the end.
    """

    def __init__(self, path: str | Path, count: int, run: dict[str, Any], key: str = "response") -> None:
        """`key`: what every row holds besides its index."""
        self.path, self.count, self.run, self.key = Path(path), count, run, key
        self.table: Path | None = None
        if self.path.suffix.lower() == ".csv":
            self.table, self.path = self.path, self.rows_path(path)
            if self.table.exists() and not self.path.exists():
                raise ValueError(f"--output_file: {self.table} exists and is not of this program; give another one")
        self.record = run_record(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.done = self._read() if self.path.exists() else set()
        self.record.write_text(json.dumps(run, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        self.stream = open(self.path, "a", encoding="utf-8")

    @staticmethod
    def rows_path(path: str | Path) -> Path:
        """Where the rows grow: beside a table, else in the file itself."""
        path = Path(path)
        return path.with_name(path.name + ".jsonl") if path.suffix.lower() == ".csv" else path

    @property
    def missing(self) -> list[int]:
        return [index for index in range(self.count) if index not in self.done]

    def _read(self) -> set[int]:
        """Indices that are answered; a half line at the end is cut away, anything else that is not ours is refused."""
        advice = "give another --output_file, or remove this one"
        if not self.path.is_file():
            raise ValueError(f"--output_file: {self.path} is not a file")
        if difference := run_difference(self.path, self.run):
            raise ValueError(f"--output_file: {self.path} is of another run ({difference}); {advice}")
        done: set[int] = set()
        whole = 0  # bytes up to the end of the last good line
        content = self.path.read_bytes()
        lines = content.splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                index = row["index"]
                if not isinstance(index, int) or self.key not in row:
                    raise ValueError
            except (ValueError, KeyError, TypeError):
                if number == len(lines) and not line.endswith(b"\n"):
                    break  # cut off while it was written
                raise ValueError(
                    f"--output_file: {self.path}, line {number} is not an answer of this program; {advice}"
                ) from None
            if not 0 <= index < self.count:
                raise ValueError(
                    f"--output_file: {self.path}, line {number}: question {index} of {self.count}; {advice}"
                )
            done.add(index)
            whole += len(line)
        if whole < len(content):
            with open(self.path, "r+b") as stream:
                stream.truncate(whole)
        elif content and not content.endswith(b"\n"):
            with open(self.path, "ab") as stream:
                stream.write(b"\n")
        return done

    def append(self, rows: Iterable[dict]) -> None:
        for row in rows:
            self.stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            self.done.add(row["index"])
        self.stream.flush()

    def finish(self) -> None:
        """Put the rows in the order of the questions; the file is whole at every moment."""
        self.stream.close()
        rows: dict[int, bytes] = {}
        for line in self.path.read_bytes().splitlines():
            rows.setdefault(json.loads(line)["index"], line)
        sorted_file = self.path.with_name(f".{self.path.name}.sorted")
        with open(sorted_file, "wb") as stream:
            stream.writelines(rows[index] + b"\n" for index in sorted(rows))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(sorted_file, self.path)
        if self.table is not None:
            self._write_table(self.table, [json.loads(rows[index]) for index in sorted(rows)])

    def _write_table(self, table: Path, rows: list[dict]) -> None:
        """A column a key; with the byte order mark by which spreadsheets know UTF-8. Lists and objects become JSON."""
        names = list(dict.fromkeys(name for row in rows for name in row))
        temporary = table.with_name(f".{table.name}.new")
        with open(temporary, "w", encoding="utf-8-sig", newline="") as stream:
            writer = csv.DictWriter(stream, names)
            writer.writeheader()
            for row in rows:
                writer.writerow(
                    {
                        name: value if isinstance(value, str | int) else json.dumps(value, ensure_ascii=False)
                        for name, value in row.items()
                    }
                )
        os.replace(temporary, table)


def run_record(path: Path) -> Path:
    """The file beside a file of answers that holds what they were made with."""
    return path.with_name(path.name + ".run.json")


def run_difference(path: Path, run: dict[str, Any]) -> str | None:
    """In what the answers in a file were made otherwise than `run` says; None if in nothing, or nothing is known."""
    record = run_record(path)
    if not record.is_file():
        return None
    try:
        recorded = json.loads(record.read_text(encoding="utf-8"))
    except ValueError:
        return None  # the record itself was cut off: its rows are of this very start
    for key in sorted(run.keys() | recorded.keys()):
        if recorded.get(key) != run.get(key):
            found, asked = (_brief(values.get(key)) for values in (recorded, run))
            return f"{key} was {found}, is {asked}"
    return None


def set_aside(paths: Sequence[Path], records: Path) -> Path:
    """Move records, and what they were made with, into a folder of their own; nothing is deleted."""
    number = 1
    while (target := records / f"earlier-{number}").exists():
        number += 1
    target.mkdir()
    for path in paths:
        for file in (path, run_record(path)):
            if file.exists():
                file.rename(target / file.name)
    return target


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def prompts_sha256(prompts: list[Prompt]) -> str:
    text = json.dumps([prompt.messages for prompt in prompts], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


def folder_state(path: str) -> dict[str, list[int]] | None:
    """Size and time of each weight and settings file of a model folder; None for a hub name."""
    if not Path(path).is_dir():
        return None
    patterns = ("*.safetensors", "*config.json", "*.jinja", "tokenizer*")
    files = sorted({file for pattern in patterns for file in Path(path).glob(pattern)})
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}

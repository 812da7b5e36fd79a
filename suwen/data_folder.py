"""A data set on the disk: one file a stage and recipe, what was left out, and everything read back and checked."""

from __future__ import annotations

import csv
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from suwen.benchmarks.choice import parse_choice as parse_exam
from suwen.benchmarks.facts import parse_fact
from suwen.benchmarks.injection import parse_choice as parse_ending
from suwen.benchmarks.injection import parse_preference, parse_retrieved
from suwen.formats import BadRow
from suwen.loading import load_rows
from suwen.readers import Refusal, find_encoding, read_records
from suwen.retrieval.index import build_index
from suwen.retrieval.search import KnowledgeBase
from suwen.synthesis import Row

SCHEMAS = {"pretrain": "text", "sft": "conversation", "preference": "preference"}
PARSERS: dict[str, Callable[[Row], Any]] = {  # of the evaluation files, those of the tasks that ask them
    **dict.fromkeys(("recall", "reverse_recall"), parse_fact),
    **dict.fromkeys(("open_book", "retrieved"), parse_retrieved),
    **{"choice": parse_ending, "preference": parse_preference, "exam": parse_exam},
}
CONTENT_KEYS = (
    "text",
    "messages",
    "prompt",
    "chosen",
    "rejected",
    "question",
    "content",
    "Question",
    "Options",
    "Explanation",
)


def strings_of(row: Row) -> Iterator[str]:
    """The texts of a row as written, whatever its schema."""
    for key in CONTENT_KEYS:
        value = row.get(key)
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            yield from (part["content"] for part in value if isinstance(part, dict) and "content" in part)


class RowFile:
    """A .jsonl of rows that counts what it holds."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows, self.characters, self.duplicates = path, 0, 0, 0
        self._known: set[int] = set()
        self.found = 0  # questions whose right passage stands beside them
        self.lengths: list[int] = []
        self.recipes: Counter[str] = Counter()
        self.groups: Counter[str] = Counter()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.stream = open(path, "w", encoding="utf-8", newline="\n")

    def write(self, row: Row) -> None:
        times = row.get("times", 1)
        line = json.dumps({k: v for k, v in row.items() if k not in ("where", "times")}, ensure_ascii=False)
        self.stream.write((line + "\n") * times)
        self.rows += times
        texts = tuple(strings_of(row))
        length, key = sum(map(len, texts)), hash(texts)
        self.duplicates += key in self._known  # copies by a weight above 1 are wanted
        self._known.add(key)
        self.characters += times * length
        self.lengths += [length] * times
        self.recipes[row["recipe"]] += times
        self.groups[row.get("group", "")] += times


class DataFolder:
    """A data set in the making: one file a stage and recipe, and what was left out, with its reason."""

    def __init__(self, path: Path, on_bad_rows: str) -> None:
        self.path, self.on_bad_rows = path, on_bad_rows
        self.files: dict[str, RowFile] = {}
        self.refused: Counter[str] = Counter()
        self._known: set[int] = set()  # a file that is read for two stages has its bad rows once
        self.left_out: Counter[str] = Counter()  # of what was generated
        self.dropped = open(path / "dropped_rows.jsonl", "w", encoding="utf-8", errors="backslashreplace")

    def __enter__(self) -> DataFolder:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in [self.dropped, *(file.stream for file in self.files.values())]:
            stream.close()

    def write(self, stage: str, row: Row) -> None:
        name = f"{stage}/{row['recipe'].replace(' ', '_')}"
        if name not in self.files:
            self.files[name] = RowFile(self.path / f"{name}.jsonl")
        self.files[name].write(row)

    def refuse(self, where: str, reason: str, row: Any) -> None:
        if self.on_bad_rows == "error":
            raise ValueError(f"{where}: {reason}")
        key = hash((where, reason, repr(row)))
        if key in self._known:
            return
        self._known.add(key)
        self.refused[reason] += 1
        self.note("reading", where, reason, row)

    def leave_out(self, stage: str, row: Row, reason: str) -> None:
        self.left_out[f"{stage}/{row['recipe']}: {reason}"] += 1
        self.note(f"generation of {stage}", row["recipe"], reason, row)

    def note(self, step: str, where: str, reason: str, row: Any = None) -> None:
        values = {"step": step, "where": where, "reason": reason, "row": row}
        self.dropped.write(json.dumps(values, ensure_ascii=False, default=str) + "\n")


def stored_rows(folder: Path, stage: str) -> Iterator[Row]:
    """The rows of a stage as they were written."""
    for file in sorted((folder / stage).glob("*.jsonl")):
        with open(file, encoding="utf-8") as stream:
            yield from map(json.loads, stream)


def validate(folder: Path) -> None:
    """Read everything back with the readers that training, retrieval and evaluation use.

    Raises:
        ValueError: the first row that they refuse.
    """
    sources = [(str(folder / stage), schema) for stage, schema in SCHEMAS.items() if (folder / stage).is_dir()]
    if (folder / "evaluation" / "passage.jsonl").is_file():
        sources.append((str(folder / "evaluation" / "passage.jsonl"), "text"))
    for path, schema in sources:
        for _ in load_rows(path, schema):
            pass
    for name, parse in PARSERS.items():
        file = folder / "evaluation" / f"{name}.jsonl"
        for record in read_records(file, find_encoding(file)) if file.is_file() else ():
            if isinstance(record, Refusal):
                raise ValueError(record.message)
            where, row = record
            try:
                parse(row)
            except BadRow as error:
                raise ValueError(f"{where}: {error}") from None


def write_retrieved(folder: Path, num_passages: int) -> RowFile:
    """Index the corpus, in folder/knowledge, and write the recall questions with the passages that a search finds.

    evaluation/retrieved.jsonl has the form of open_book.jsonl; "gold" is null where the right passage was not found.
    """
    build_index([str(folder / "evaluation" / "passage.jsonl")], str(folder / "knowledge"))
    knowledge = KnowledgeBase(str(folder / "knowledge"))
    by_recipe: dict[str, list[Row]] = defaultdict(list)
    for row in stored_rows(folder, "evaluation"):
        by_recipe[row["recipe"]].append(row)
    titles = {row["id"]: row["title"] for row in by_recipe["passage"]}
    out = RowFile(folder / "evaluation" / "retrieved.jsonl")
    with out.stream:
        for row in tqdm(by_recipe["recall"], desc="retrieval", unit=" questions", disable=None, leave=False):
            hits = [hit.passage for hit in knowledge.search(row["question"], num_passages)]
            title = titles[row["id"].rpartition(".recall.")[0].removesuffix(f".{row['relation']}")]
            right = [hit.title == title and all(answer in hit.text for answer in row["answers"]) for hit in hits]
            passages = [{"title": hit.title, "text": hit.text} for hit in hits]
            name = row["id"].replace(".recall.", ".retrieved.")
            gold = right.index(True) if True in right else None
            out.write({**row, "id": name, "recipe": "retrieved", "passages": passages, "gold": gold})
            out.found += gold is not None
    return out


def write_exam_table(folder: Path) -> None:
    """The exam items once more as CMExam's CSV, with id and group behind its own columns."""
    rows = [row for row in stored_rows(folder, "evaluation") if row["recipe"] == "exam"]
    if rows:
        with open(folder / "evaluation" / "exam.csv", "w", encoding="utf-8", newline="") as stream:
            names = ("Question", "Options", "Answer", "Explanation", "id", "group")
            writer = csv.DictWriter(stream, names, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)

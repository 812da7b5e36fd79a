"""Training data: sources mixed and split, encoded once in all cores, kept on disk by content, memory-mapped.

Two passes over the files, so that memory stays flat however large they are: the first checks every row and remembers a
hash of its prompt, from which the choice of rows and the split follow; the second encodes the chosen rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from suwen import readers
from suwen.cache import find_entry
from suwen.formats import EXPECTED, KNOWN_KEYS, SCHEMAS, BadRow, canonical_rows, parse_columns
from suwen.manifest import publish
from suwen.parallel import (
    BATCH_ROWS,
    OF_SOME_PAIRS,
    ArrowFile,
    Batch,
    available_cores,
    build_batches,
    encode_all,
)
from suwen.questions import OPTION_KEYS, prompt_rows
from suwen.readers import Encoding, Refusal, Source, parse_sources
from suwen.sampling import choose_rows, count_among, keep_on_disk, prompt_hash, thin
from suwen.sketch import FILE as SKETCH_FILE
from suwen.sketch import SketchBuilder, write_sketch
from suwen.tables import width

if TYPE_CHECKING:
    from datasets import Dataset

    from suwen.arguments import DataArguments

__all__ = ["SCHEMAS", "PreparedData", "Report", "load_rows", "prepare_data"]

CODE_VERSION = 3  # part of the cache key: raise it when the same files would give other rows
LARGE_BYTES = 1 << 22  # of files: from here on a second is worth while to have the tokenizer sped up
CACHE_DIR = Path(__file__).resolve().parent.parent / ".cache" / "suwen"


def cache_root(data: DataArguments) -> Path:
    """Where encoded data, and what is computed from it, is kept."""
    return Path(data.cache_dir) if data.cache_dir else CACHE_DIR


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
        lines.append(f"  {origin} in {self.seconds:.1f} s, fingerprint {self.fingerprint[:16]}")
        return lines


def _tokens_line(name: str, rows: int, tokens: int, trained: int) -> str:
    share = f"{trained / tokens:.1%}" if tokens else "0%"
    line = f"{name}: {rows:,} encoded rows, {tokens:,} tokens"
    return line + f", {trained:,} of them trained ({share})" if trained else line  # of prompts none is


@dataclass
class PreparedData:
    train: Dataset
    validation: Dataset | None
    report: Report
    sketch: Path  # of what is trained on, for tools/check_contamination.py (`suwen.sketch`)


# ------------------------------------------------------------------------------------------------------------ reading


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
    with _RejectedRows(rejected_file) as rejected:
        yield from _read_files(files, schema, columns, on_bad_rows, rejected, report)


class _RejectedRows:
    """rejected_rows.jsonl, made when the first row is refused."""

    def __init__(self, file: Path | None) -> None:
        self.file, self.stream = file, None

    stream: TextIO | None

    def __enter__(self) -> _RejectedRows:
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


def _read_files(
    files: Sequence[Path],
    schema: str,
    columns: str | None,
    on_bad_rows: str,
    rejected: _RejectedRows,
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


# -------------------------------------------------------------------------------------------------------- preparation


def prepare_data(data: DataArguments, schema: str, encode: Any, output_dir: str | Path | None) -> PreparedData:
    """Read, check, choose, split and encode the data of a stage, or take the result of an earlier run.

    The cache key is made of the contents of the files, everything that decides which rows are used, and the encoder's
    fingerprint: the same data under another path is found again. One process builds or verifies, the others wait.

    Args:
        schema: one of SCHEMAS.
        encode: canonical row -> (encoded rows, Counter of drop reasons); with `encode.fingerprint`.
        output_dir: rejected_rows.jsonl is put there; None leaves it in the cache.

    Raises:
        ValueError: bad rows (see `load_rows`), or nothing left to train on.
    """
    began = time.time()
    _check_arguments(data)
    train_sources = parse_sources(data.train_file_dir or "", "--train_file_dir")
    validation_sources: list[Source] = []
    if data.validation_file_dir:
        validation_sources = parse_sources(data.validation_file_dir, "--validation_file_dir")
    contents = _hash_files([*train_sources, *validation_sources])
    key = _cache_key(data, schema, encode.fingerprint, train_sources, validation_sources, contents)
    root = cache_root(data)
    folder = root / key[:32]
    with _locked(root, key[:32]):
        cached = find_entry(folder, began)
        if not cached:
            for stale in root.glob(f"{key[:32]}.building.*"):
                shutil.rmtree(stale, ignore_errors=True)  # of a run that was killed
            building = Path(tempfile.mkdtemp(prefix=f"{key[:32]}.building.", dir=root))
            try:
                report = _build(data, schema, encode, train_sources, validation_sources, contents, building)
                report.contents = contents
                if changed := changed_files(contents):
                    raise ValueError(f"{changed[0]}: has changed while it was read; start again")
                (building / "report.json").write_text(json.dumps(report.to_dict(), ensure_ascii=False), "utf-8")
                os.chmod(building, 0o755)
                publish(building, folder, {})
            finally:
                shutil.rmtree(building, ignore_errors=True)
    report = Report.from_dict(json.loads((folder / "report.json").read_text("utf-8")))
    report.name_as(contents)
    report.from_cache = cached
    rejected = folder / "rejected_rows.jsonl"
    if rejected.is_file():
        target = Path(output_dir) / "rejected_rows.jsonl" if output_dir else rejected
        if output_dir and os.environ.get("RANK", "0") == "0":
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(rejected, target)
        report.rejected_file = str(target)
    train = _open(folder / "train.arrow")
    assert train is not None
    return PreparedData(train, _open(folder / "validation.arrow"), report, folder / SKETCH_FILE)


def _check_arguments(data: DataArguments) -> None:
    if not data.train_file_dir:
        raise ValueError("--train_file_dir is missing, expected files or folders, such as data/sft")
    for name in ("max_train_samples", "max_eval_samples", "num_proc"):
        value = getattr(data, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name}: found {value}, expected 1 or more")
    fraction = data.validation_split_fraction
    if fraction is not None and not 0 <= fraction < 1:
        raise ValueError(f"--validation_split_fraction: found {fraction}, expected 0 or a share below 1, such as 0.05")


def _hash_files(sources: Sequence[Source]) -> dict[str, str]:
    return {str(file): readers.hash_file(file) for source in sources for file in source.files}


def changed_files(contents: dict[str, str]) -> list[str]:
    """Files that no longer hold what they did; `contents` is their sha256 by path."""

    def now(path: str) -> str | None:
        try:
            return readers.hash_file(Path(path))
        except OSError:
            return None

    return [path for path, sha256 in contents.items() if now(path) != sha256]


def _cache_key(
    data: DataArguments,
    schema: str,
    encoder_fingerprint: str,
    train: list[Source],
    validation: list[Source],
    hashes: dict[str, str],
) -> str:
    def contents(sources: list[Source]) -> list[Any]:
        files = [[(readers.file_kind(file), hashes[str(file)]) for file in source.files] for source in sources]
        return [[source.weight, found] for source, found in zip(sources, files, strict=True)]

    limits = [data.max_train_samples, data.max_eval_samples, data.validation_split_fraction, data.data_seed]
    settings = [CODE_VERSION, schema, data.columns, data.on_bad_rows, limits, encoder_fingerprint]
    payload = json.dumps([settings, contents(train), contents(validation)])
    return hashlib.sha256(payload.encode()).hexdigest()


class _locked:
    """A lock file for one cache entry; says so when it has to wait."""

    def __init__(self, root: Path, name: str) -> None:
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--cache_dir: {root} cannot be made ({error.strerror})") from None
        self.lock = FileLock(root / f"{name}.lock")

    def __enter__(self) -> None:
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            if os.environ.get("RANK", "0") == "0":
                print("waiting for another process that prepares the same data", file=sys.stderr, flush=True)
            self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()


def _build(
    data: DataArguments,
    schema: str,
    encode: Any,
    train_sources: list[Source],
    validation_sources: list[Source],
    contents: dict[str, str],
    folder: Path,
) -> Report:
    began = time.monotonic()
    report = Report()
    encodings: dict[Path, Encoding | None] = {}
    large = sum(Path(path).stat().st_size for path in contents) >= LARGE_BYTES
    with _RejectedRows(folder / "rejected_rows.jsonl") as rejected, ThreadPoolExecutor(1) as meanwhile:
        sped_up = meanwhile.submit(encode.speed_up) if large else None

        def survey(sources: list[Source], part: str = "") -> tuple[np.ndarray, list[int]]:
            """Check all rows; the hash of each prompt, and the number of rows of each source."""
            counts: list[int] = []

            def hashes() -> Iterator[int]:
                for source in sources:
                    rows = _read_files(
                        source.files, schema, data.columns, data.on_bad_rows, rejected, report, encodings, part
                    )
                    counts.append(0)
                    for row in tqdm(rows, "reading", unit=" rows", disable=None, leave=False):
                        counts[-1] += 1
                        yield prompt_hash(row)
                    if source.ignored:
                        report.notes.append(f"{source.path}: {_names(source.ignored)} passed over, not of a known kind")

            return keep_on_disk(hashes(), folder), counts

        prompts, source_rows = survey(train_sources)
        validation_prompts, validation_rows = survey(validation_sources, VALIDATION)
        if sped_up:
            sped_up.result()  # before workers are forked

    fraction = None if validation_sources else data.validation_split_fraction
    weights = [source.weight for source in train_sources]
    limits = (data.max_train_samples, fraction, data.max_eval_samples)
    times, held = choose_rows(prompts, source_rows, weights, *limits, data.data_seed, report.rows_left_out)
    report.rows_repeated = int(np.maximum(times - 1, 0).sum())
    if fraction and not held.any():
        report.notes.append("no validation rows: too few different prompts to hold any out")
    chosen: np.ndarray = np.ones(0, dtype=bool)
    if validation_sources:
        repeated, _ = choose_rows(
            validation_prompts, validation_rows, [source.weight for source in validation_sources],
            None, None, None, data.data_seed, report.rows_left_out,
        )  # fmt: skip
        chosen = repeated > 0
        if data.max_eval_samples:
            random = np.random.default_rng(data.data_seed)
            thin(chosen, data.max_eval_samples, random, report.rows_left_out, "--max_eval_samples")
        seen = count_among(validation_prompts, chosen, prompts, times > 0)
        report.validation_rows_seen_in_training = seen
        if _same_files(train_sources, validation_sources, contents):
            report.notes.append("the validation files are training files: the validation loss will look too good")
        elif seen:
            report.notes.append(f"the prompts of {seen:,} of {chosen.sum():,} validation rows are in training too")

    total = int((times > 0).sum() + held.sum() + chosen.sum())
    num_proc = min(data.num_proc or available_cores(), -(-total // BATCH_ROWS) or 1)
    sinks = {True: ArrowFile(folder / "train.arrow"), False: ArrowFile(folder / "validation.arrow")}

    def second_pass(sources: list[Source]) -> Iterator[dict[str, Any]]:
        # counts and refused rows were taken in the first pass
        files = [file for source in sources for file in source.files]
        return _read_files(files, schema, data.columns, "skip", _RejectedRows(None), Report(), encodings)

    sketch = SketchBuilder()

    def sketched(batches: Iterator[Batch]) -> Iterator[Batch]:
        for training, rows, repeated in batches:
            if training:
                sketch.add(rows)
            yield training, rows, repeated

    batches = sketched(build_batches(second_pass(train_sources), times, held))
    if validation_sources:
        nothing: np.ndarray = np.zeros(len(chosen), dtype=np.int32)
        batches = itertools.chain(batches, build_batches(second_pass(validation_sources), nothing, chosen))
    encode_all(batches, encode, num_proc, total, sinks, report.rows_dropped)
    for sink in sinks.values():
        sink.close()
    report.rows_encoded, report.tokens, report.trained_tokens = sinks[True].counts
    report.validation_rows, report.validation_tokens, report.validation_trained_tokens = sinks[False].counts
    if not report.rows_encoded:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in report.rows_dropped.items()) or "none chosen"
        raise ValueError(f"--train_file_dir {data.train_file_dir}: no row left to train on ({reasons})")
    write_sketch(folder / SKETCH_FILE, sketch.finish())
    report.fingerprint = sinks[True].digest.hexdigest()
    report.seconds = time.monotonic() - began
    return report


def _names(files: tuple[Path, ...]) -> str:
    return ", ".join(file.name for file in files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")


def _same_files(train: list[Source], validation: list[Source], contents: dict[str, str]) -> bool:
    """Whether a file, or a copy of it, is on both sides."""
    one, other = ({contents[str(file)] for source in part for file in source.files} for part in (train, validation))
    return not one.isdisjoint(other)


def _open(path: Path) -> Dataset | None:
    """Memory-map an Arrow stream; None if there is none."""
    if not path.is_file():
        return None
    from datasets import Dataset

    dataset = Dataset.from_file(str(path))
    names = [name for name in OF_SOME_PAIRS if name in dataset.column_names]
    return dataset.remove_columns([n for n in names if dataset.data.column(n).null_count == len(dataset)])

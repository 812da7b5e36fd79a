"""Training data: sources mixed and split, encoded once in all cores, kept on disk by content, memory-mapped.

Two passes over the rows: the first checks every one and remembers a hash of its prompt, from which the choice of rows
and the split follow; the second encodes the chosen rows. Rows that take much memory are read again for it, so that
memory stays flat however large the files are.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from suwen import readers
from suwen.cache import find_entry
from suwen.data_report import VALIDATION, Report
from suwen.loading import RejectedRows, read_files
from suwen.manifest import publish
from suwen.parallel import (
    BATCH_ROWS,
    MESSAGES,
    OF_SOME_PAIRS,
    ArrowFile,
    Batch,
    available_cores,
    build_batches,
    characters,
    encode_all,
    only_new_garbage,
)
from suwen.readers import Encoding, Source, parse_sources
from suwen.sampling import choose_rows, count_among, keep_on_disk, prompt_hash, thin
from suwen.sketch import FILE as SKETCH_FILE
from suwen.sketch import SketchBuilder, write_sketch

if TYPE_CHECKING:
    from datasets import Dataset

    from suwen.arguments import DataArguments

CODE_VERSION = 4  # part of the cache key: raise it when the same files would give other rows
LARGE_BYTES = 1 << 22  # of files: from here on a second is worth while to have the tokenizer sped up
KEPT_BYTES = 1 << 27  # of rows in memory, from the first pass to the second
CACHE_DIR = Path(__file__).resolve().parent.parent / ".cache" / "suwen"


def cache_root(data: DataArguments) -> Path:
    """Where encoded data, and what is computed from it, is kept."""
    return Path(data.cache_dir) if data.cache_dir else CACHE_DIR


@dataclass
class PreparedData:
    train: Dataset
    validation: Dataset | None
    report: Report
    sketch: Path  # of what is trained on, for tools/check_contamination.py (`suwen.sketch`)


def prepare_data(data: DataArguments, schema: str, encode: Any, output_dir: str | Path | None) -> PreparedData:
    """Read, check, choose, split and encode the data of a stage, or take the result of an earlier run.

    The cache key is made of the contents of the files, everything that decides which rows are used, and the encoder's
    fingerprint: the same data under another path is found again. One process builds or verifies, the others wait.

    Args:
        schema: one of `suwen.formats.SCHEMAS`.
        encode: canonical row -> (encoded rows, Counter of drop reasons); with `encode.fingerprint`.
        output_dir: rejected_rows.jsonl is put there; None leaves it in the cache.

    Raises:
        ValueError: bad rows (see `suwen.loading.load_rows`), or nothing left to train on.
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
    rows = _Rows(data, schema, [*train_sources, *validation_sources])
    large = sum(Path(path).stat().st_size for path in contents) >= LARGE_BYTES
    rejected = RejectedRows(folder / "rejected_rows.jsonl")
    with rejected, ThreadPoolExecutor(1) as meanwhile, only_new_garbage():
        sped_up = meanwhile.submit(encode.speed_up) if large else None
        train = rows.survey(train_sources, rejected, report, folder)
        validation = rows.survey(validation_sources, rejected, report, folder, VALIDATION)
        if sped_up:
            sped_up.result()  # before workers are forked
    times, held = _choose(data, train, validation, report)
    if _same_files(train_sources, validation_sources, contents):
        report.notes.append("the validation files are training files: the validation loss will look too good")
    elif seen := report.validation_rows_seen_in_training:
        report.notes.append(f"the prompts of {seen:,} of {held.sum():,} validation rows are in training too")
    _encode(rows, encode, data.num_proc, times, held, report, folder)
    if not report.rows_encoded:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in report.rows_dropped.items()) or "none chosen"
        raise ValueError(f"--train_file_dir {data.train_file_dir}: no row left to train on ({reasons})")
    report.seconds = time.monotonic() - began
    return report


class _Rows:
    """The canonical rows of these sources, source after source, as often as they are asked for."""

    def __init__(self, data: DataArguments, schema: str, sources: list[Source]) -> None:
        self.data, self.schema, self.sources = data, schema, sources
        self.encodings: dict[Path, Encoding | None] = {}  # what was detected, for the next pass
        self.kept: list[dict[str, Any]] | None = []  # None once they would take more memory than KEPT_BYTES
        self._size = 0

    def survey(
        self, sources: list[Source], rejected: RejectedRows, report: Report, folder: Path, part: str = ""
    ) -> _Survey:
        """The first pass: check all rows, and keep them while they are few."""
        counts: list[int] = []

        def hashes() -> Iterator[int]:
            for source in sources:
                rows = read_files(
                    source.files, self.schema, self.data.columns, self.data.on_bad_rows, rejected, report,
                    self.encodings, part,
                )  # fmt: skip
                counts.append(0)
                for row in tqdm(rows, "reading", unit=" rows", disable=None, leave=False):
                    counts[-1] += 1
                    self._keep(row)
                    yield prompt_hash(row)
                if source.ignored:
                    report.notes.append(f"{source.path}: {_names(source.ignored)} passed over, not of a known kind")

        return _Survey(sources, keep_on_disk(hashes(), folder), counts)

    def _keep(self, row: dict[str, Any]) -> None:
        if self.kept is not None:
            self.kept.append(row)
            messages = sum(len(row.get(name, ())) for name in MESSAGES)
            self._size += 500 + 350 * messages + 2 * characters(row)  # objects; a Chinese character takes two bytes
            if self._size > KEPT_BYTES:
                self.kept = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rows that were surveyed once more; what was counted and refused then is not again."""
        if self.kept is not None:
            yield from self.kept
            return
        for source in self.sources:
            yield from read_files(
                source.files, self.schema, self.data.columns, "skip", RejectedRows(None), Report(), self.encodings
            )


@dataclass
class _Survey:
    """What the first pass has found in the training or the validation sources."""

    sources: list[Source]
    prompts: np.ndarray  # (N,) uint64 hash of the prompt of each row
    rows: list[int]  # of each source

    @property
    def weights(self) -> list[float]:
        return [source.weight for source in self.sources]


def _choose(data: DataArguments, train: _Survey, validation: _Survey, report: Report) -> tuple[np.ndarray, np.ndarray]:
    """How often each row, of training and then of validation sources, is trained on, and which are held out."""
    fraction = None if validation.sources else data.validation_split_fraction
    limits = (data.max_train_samples, fraction, data.max_eval_samples)
    times, held = choose_rows(train.prompts, train.rows, train.weights, *limits, data.data_seed, report.rows_left_out)
    report.rows_repeated = int(np.maximum(times - 1, 0).sum())
    if fraction and not held.any():
        report.notes.append("no validation rows: too few different prompts to hold any out")
    if not validation.sources:
        return times, held
    repeated, _ = choose_rows(
        validation.prompts, validation.rows, validation.weights, None, None, None, data.data_seed, report.rows_left_out
    )
    chosen = repeated > 0
    if data.max_eval_samples:
        random = np.random.default_rng(data.data_seed)
        thin(chosen, data.max_eval_samples, random, report.rows_left_out, "--max_eval_samples")
    report.validation_rows_seen_in_training = count_among(validation.prompts, chosen, train.prompts, times > 0)
    return np.concatenate([times, np.zeros_like(repeated)]), np.concatenate([held, chosen])


def _encode(
    rows: _Rows,
    encode: Any,
    num_proc: int | None,
    times: np.ndarray,
    held: np.ndarray,
    report: Report,
    folder: Path,
) -> None:
    """The second pass: encode the chosen rows in all cores, and sketch those that are trained on."""
    total = int((times > 0).sum() + held.sum())
    num_proc = min(num_proc or available_cores(), -(-total // BATCH_ROWS) or 1)
    sinks = {True: ArrowFile(folder / "train.arrow"), False: ArrowFile(folder / "validation.arrow")}
    sketch = SketchBuilder()

    def batches() -> Iterator[Batch]:
        for training, batch, repeated in build_batches(rows, times, held):
            if training:
                sketch.add(batch)
            yield training, batch, repeated

    encode_all(batches(), encode, num_proc, total, sinks, report.rows_dropped)
    for sink in sinks.values():
        sink.close()
    report.rows_encoded, report.tokens, report.trained_tokens = sinks[True].counts
    report.validation_rows, report.validation_tokens, report.validation_trained_tokens = sinks[False].counts
    report.fingerprint = sinks[True].digest.hexdigest()
    write_sketch(folder / SKETCH_FILE, sketch.finish())


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

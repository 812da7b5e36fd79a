"""Encodes rows in all cores and appends them to Arrow files on disk; no more than a few batches are in memory."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import hashlib
import itertools
import multiprocessing
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from tqdm import tqdm

BATCH_ROWS = 128
BATCH_CHARACTERS = 1 << 18
WRITTEN_BYTES = 1 << 22
MESSAGES = ("messages", "chosen", "rejected")  # lists of a canonical row
OF_SOME_PAIRS = {"margin": pa.float64(), "fault": pa.string()}  # columns that all batches have; dropped if empty

Row = dict[str, Any]
T = TypeVar("T")
Encode = Callable[[Row], tuple[list[Row], Counter[str]]]
Result = tuple[bytes | None, Counter[str], list[int]]
Batch = tuple[bool, list[Row], list[int]]  # for training or for validation, rows, how often each


def _encode_batch(encode: Encode, rows: list[Row], times: list[int]) -> Result:
    """Encode rows, repeat them, and lay them out as an Arrow stream.

    Returns:
        the stream (None if no row is left), drop reasons, and [rows, tokens, trained tokens].
    """
    dropped: Counter[str] = Counter()
    encoded: list[tuple[Row, int]] = []
    for row, count in zip(rows, times, strict=True):
        try:
            parts, reasons = encode(row)
        except ValueError as error:
            raise ValueError(f"{row['where']}: {error}") from error
        encoded += [(part, count) for part in parts]
        dropped.update({reason: number * count for reason, number in reasons.items()})
    # copies of a row are kept apart, as far as the batch allows
    repeated = [part for turn in range(max(times)) for part, count in encoded if count > turn]
    if not repeated:
        return None, dropped, [0, 0, 0]
    table = _to_table(repeated)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes(), dropped, [len(repeated), *_count_tokens(repeated)]


def _to_table(rows: list[Row]) -> pa.Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    if "chosen_ids" in names:
        names = [*(name for name in names if name not in OF_SOME_PAIRS), *OF_SOME_PAIRS]
    columns = {}
    for name in names:
        values: list[Any] = [row.get(name) for row in rows]
        if isinstance(values[0], list):  # of token ids or labels
            flat = np.fromiter(itertools.chain.from_iterable(values), np.int32)
            offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
            columns[name] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))
        else:
            columns[name] = pa.array(values, OF_SOME_PAIRS.get(name))
    return pa.table(columns)


def _count_tokens(rows: list[Row]) -> tuple[int, int]:
    """Tokens, and those that the loss looks at."""
    # Here, so that bad data is answered before transformers is loaded
    from suwen.encoding import IGNORE_INDEX, labels_of

    tokens = trained = 0
    for row in rows:
        if "chosen_ids" in row:
            answers = len(row["chosen_ids"]) + len(row["rejected_ids"])
            tokens, trained = tokens + len(row["prompt_ids"]) + answers, trained + answers
        elif "prompt_ids" in row:  # a prompt alone
            tokens += len(row["prompt_ids"])
        else:
            labels = labels_of(row)
            tokens, trained = tokens + len(row["input_ids"]), trained + len(labels) - labels.count(IGNORE_INDEX)
    return tokens, trained


class ArrowFile:
    """An Arrow stream on disk, appended batch by batch; a few of them together, as a reader keeps a note of each."""

    def __init__(self, path: Path) -> None:
        self.path, self.counts, self.digest = path, [0, 0, 0], hashlib.sha256()
        self.writer: Any = None
        self.schema: pa.Schema | None = None
        self.waiting: list[pa.Table] = []

    def append(self, stream: bytes, counts: list[int]) -> None:
        table = pa.ipc.open_stream(stream).read_all()
        if self.writer is None:
            self.schema, self.writer = table.schema, pa.ipc.new_stream(str(self.path), table.schema)
        assert table.schema == self.schema, "the encoder's rows have changing columns"
        self.waiting.append(table)
        if sum(part.nbytes for part in self.waiting) >= WRITTEN_BYTES:
            self._write()
        self.digest.update(stream)
        self.counts = [a + b for a, b in zip(self.counts, counts, strict=True)]

    def _write(self) -> None:
        self.writer.write_table(pa.concat_tables(self.waiting).combine_chunks())
        self.waiting = []

    def close(self) -> None:
        if self.writer is not None:
            if self.waiting:
                self._write()
            self.writer.close()


def characters(row: Row) -> int:
    """Of the text of a canonical row, or of all its messages (thinking with them) and its answer key."""
    if "text" in row:
        return len(row["text"])
    messages = (message for name in MESSAGES for message in row.get(name, ()))
    return len(row.get("item", "")) + sum(len(text) for message in messages for text in message.values())


def build_batches(rows: Iterable[Row], train_times: np.ndarray, held: np.ndarray) -> Iterator[Batch]:
    """Batches of chosen rows, either all for training (True) or all for validation (False)."""
    open_batches: dict[bool, tuple[list[Row], list[int], list[int]]] = {
        True: ([], [], [0]),
        False: ([], [], [0]),
    }
    for index, row in enumerate(rows):
        count = int(train_times[index]) or int(held[index])
        if not count:
            continue
        training = not held[index]
        batch, times, size = open_batches[training]
        batch.append(row)
        times.append(count)
        size[0] += characters(row) * (1 if "text" in row else 4)
        if len(batch) >= BATCH_ROWS or size[0] >= BATCH_CHARACTERS:
            yield training, batch, times
            open_batches[training] = ([], [], [0])
    for training, (batch, times, _) in open_batches.items():
        if batch:
            yield training, batch, times


def encode_all(
    batches: Iterable[Batch],
    encode: Encode,
    num_proc: int,
    total: int,
    sinks: dict[bool, ArrowFile],
    dropped: Counter[str],
) -> None:
    with tqdm(total=total, desc="encoding", unit=" rows", disable=None, leave=False) as bar:
        for (training, rows), result in map_in_order(_encode_item, batches, num_proc, encode):
            stream, reasons, counts = result
            dropped.update(reasons)
            if stream is not None:
                sinks[training].append(stream, counts)
            bar.update(rows)


def _encode_item(batch: Batch, encode: Encode) -> tuple[tuple[bool, int], Result]:
    training, rows, times = batch
    return (training, len(rows)), _encode_batch(encode, rows, times)


@contextlib.contextmanager
def only_new_garbage() -> Iterator[None]:
    """Garbage collection passes over what is there by now, here and in workers that are forked.

    It would look at every object of the libraries again and again while rows come and go, a sixth of the time.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


_work: tuple[Callable[..., Any], tuple[Any, ...]] | None = None  # of a worker process


def _start_worker(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    global _work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a worker is one core
    _work = function, arguments


def _run_in_worker(item: Any) -> Any:
    assert _work is not None
    function, arguments = _work
    return function(item, *arguments)


def map_in_order(function: Callable[..., Any], items: Iterable[Any], num_proc: int, *arguments: Any) -> Iterator[Any]:
    """`function(item, *arguments)` of every item, in their order, in `num_proc` processes.

    `arguments` reach each worker once, when it is forked; no more than 4 * num_proc items wait in memory.

    Raises:
        ValueError: of the function, or because a worker was killed.
    """
    with only_new_garbage():
        if num_proc == 1:
            yield from (function(item, *arguments) for item in items)
        else:
            yield from _map_in_workers(function, items, num_proc, *arguments)


def _map_in_workers(
    function: Callable[..., Any], items: Iterable[Any], num_proc: int, *arguments: Any
) -> Iterator[Any]:
    # fork: the arguments need no pickling and nothing is imported again; spawned where fork does not exist
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pending: deque[concurrent.futures.Future[Any]] = deque()
    executor = concurrent.futures.ProcessPoolExecutor(num_proc, context, _start_worker, (function, arguments))
    try:
        for item in items:
            pending.append(executor.submit(_run_in_worker, item))
            if len(pending) >= 4 * num_proc:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise ValueError("a preprocessing worker was killed, by want of memory perhaps: lower --num_proc") from None
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def batched(values: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size`, the last one shorter."""
    rest = iter(values)
    while batch := list(itertools.islice(rest, size)):
        yield batch


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""Which rows are trained on and how often, and which are held out: seeded, whole prompts on one side."""

from __future__ import annotations

import array
import hashlib
import itertools
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from suwen.grams import mix

BLOCK_ROWS = 1 << 20


def prompt_hash(row: dict[str, Any]) -> int:
    """64-bit hash of what a row asks: its first user message, or its text; blind to case, width and white space."""
    text = row.get("text")
    if text is None:
        text = next(message["content"] for message in row["messages"] if message["role"] == "user")
    normal = "".join(unicodedata.normalize("NFKC", text).casefold().split())
    return int.from_bytes(hashlib.blake2b(normal.encode("utf-8"), digest_size=8).digest(), "little")


def keep_on_disk(numbers: Iterable[int], folder: Path) -> np.ndarray:
    """(N,) uint64 of these numbers in a file without a name, of which no more is in memory than is looked at."""
    waiting = iter(numbers)
    with tempfile.TemporaryFile(dir=folder) as file:
        while block := array.array("Q", itertools.islice(waiting, BLOCK_ROWS)):
            block.tofile(file)
        file.flush()
        return np.memmap(file, dtype=np.uint64, mode="r") if file.tell() else np.zeros(0, dtype=np.uint64)


def choose_rows(
    prompts: np.ndarray,
    source_rows: list[int],
    weights: list[float],
    max_samples: int | None,
    fraction: float | None,
    max_eval_samples: int | None,
    seed: int,
    left_out: Counter[str],
) -> tuple[np.ndarray, np.ndarray]:
    """How often each row is trained on, and which rows are held out.

    Args:
        prompts: (N,) uint64 hash of the prompt of each row, source after source.
        source_rows: number of rows of each source; their sum is N.
        weights: of each source; 0.3 is a random 30 % of its rows, 2 every row twice, 2.5 both.
        fraction: share of the rows to be held out, None or 0 for none; whole prompts, so that none is on both sides.
        left_out: counts the rows that are not chosen, by reason.

    Returns:
        (N,) int32 counts for training, and (N,) bool for validation.
    """
    random = np.random.default_rng(seed)
    times: np.ndarray = np.zeros(len(prompts), dtype=np.int32)
    start = 0
    for rows, weight in zip(source_rows, weights, strict=True):
        times[start : start + rows] = int(weight)
        extra = round((weight - int(weight)) * rows)
        if weight < 1:
            extra = min(max(extra, 1), rows)  # a source that was named is never left out as a whole
            left_out["weight below 1"] += rows - extra
        if extra:
            times[start + random.permutation(rows)[:extra]] += 1
        start += rows
    held: np.ndarray = np.zeros(len(prompts), dtype=bool)
    if fraction:
        chosen = times > 0
        target = max(1, round(fraction * int(chosen.sum())))
        target = min(target, max_eval_samples or target)
        held = hold_out(prompts, chosen, target, seed)
        times[is_among(prompts, np.unique(prompts[held]))] = 0
        if max_eval_samples:
            thin(held, max_eval_samples, random, left_out, "--max_eval_samples")
    if max_samples and times.sum() > max_samples:
        left_out["--max_train_samples"] += int(times.sum()) - max_samples
        expanded: np.ndarray = np.repeat(np.arange(len(times)), times)
        times = np.bincount(random.permutation(expanded)[:max_samples], minlength=len(times)).astype(np.int32)
    return times, held


def hold_out(prompts: np.ndarray, chosen: np.ndarray, target: int, seed: int) -> np.ndarray:
    """Mark about `target` of the chosen rows, whole prompts together, in the order of a seeded hash of the prompts.

    The order of a prompt does not depend on the other rows, so that adding data moves few rows across the split. Only
    the beginning of that order is in memory: twice as many rows as are held out, more where prompts are passed over.
    """
    ends = [(block.min(), block.max()) for block in _mixed(prompts, chosen, seed)]
    if not ends or min(ends)[0] == (last := max(high for _, high in ends)):
        return np.zeros(len(prompts), dtype=bool)
    share = 2 * target / int(chosen.sum())
    found: list[Any] = []
    while not found:
        bound = np.uint64(min(share * 2.0**64, 2.0**64 - 2048))
        everything = share >= 1
        beginning = [block if everything else block[block < bound] for block in _mixed(prompts, chosen, seed)]
        ordered: np.ndarray = np.sort(np.concatenate(beginning))
        found, enough = _first_prompts(ordered, target, last)
        if everything:
            break
        found, share = found if enough else [], 4 * share
    if found:
        held = is_among(prompts, np.array(found, dtype=np.uint64), seed)
    else:
        unique, counts = np.unique(prompts[chosen], return_counts=True)
        held = is_among(prompts, unique[[np.argmin(counts)]])
    held &= chosen
    return held


def _mixed(prompts: np.ndarray, chosen: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    for start in range(0, len(prompts), BLOCK_ROWS):
        block = prompts[start : start + BLOCK_ROWS][chosen[start : start + BLOCK_ROWS]]
        if len(block):
            yield seeded(block, seed)


def _first_prompts(ordered: np.ndarray, target: int, last: Any) -> tuple[list[Any], bool]:
    """The first of these ascending hashes whose rows are about `target` together, and whether they were enough."""
    found: list[Any] = []
    held = start = 0
    while held < target and start < len(ordered) and ordered[start] != last:  # one prompt at least is for training
        end = int(np.searchsorted(ordered, ordered[start], side="right"))
        if end - start <= max(1, 2 * (target - held)):  # a prompt of very many rows stays in training
            found.append(ordered[start])
            held += end - start
        start = end
    return found, held >= target


def seeded(prompts: np.ndarray, seed: int) -> np.ndarray:
    """Hashes of prompts in the order of this seed."""
    return mix(prompts ^ np.uint64(seed % 2**64))


def is_among(prompts: np.ndarray, values: np.ndarray, seed: int | None = None) -> np.ndarray:
    """Which prompts, or with a seed which of their mixed hashes, are among these ascending values.

    Block by block: numpy's own `isin` takes several times the memory of the prompts.
    """
    found: np.ndarray = np.zeros(len(prompts), dtype=bool)
    if not len(values):
        return found
    for start in range(0, len(prompts), BLOCK_ROWS):
        block = prompts[start : start + BLOCK_ROWS]
        block = block if seed is None else seeded(block, seed)
        places = np.minimum(np.searchsorted(values, block), len(values) - 1)
        found[start : start + BLOCK_ROWS] = values[places] == block
    return found


def count_among(prompts: np.ndarray, chosen: np.ndarray, others: np.ndarray, used: np.ndarray) -> int:
    """How many of the chosen prompts are among those of the others that are used; the chosen ones are in memory."""
    asked = prompts[chosen]
    values, counts = np.unique(asked, return_counts=True)
    seen: np.ndarray = np.zeros(len(values), dtype=bool)
    for start in range(0, len(others) if len(values) else 0, BLOCK_ROWS):
        block = others[start : start + BLOCK_ROWS][used[start : start + BLOCK_ROWS]]
        places = np.minimum(np.searchsorted(values, block), len(values) - 1)
        seen[places[values[places] == block]] = True
    return int(counts[seen].sum())


def thin(mask: np.ndarray, limit: int, random: np.random.Generator, left_out: Counter[str], reason: str) -> None:
    """Keep a random `limit` of the marked rows."""
    marked = np.flatnonzero(mask)
    if len(marked) > limit:
        mask[random.permutation(marked)[limit:]] = False
        left_out[reason] += len(marked) - limit

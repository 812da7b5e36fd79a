"""Which rows are trained on and how often, and which are held out: seeded, whole prompts on one side."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from typing import Any

import numpy as np

BLOCK_ROWS = 1 << 20


def prompt_hash(row: dict[str, Any]) -> int:
    """64-bit hash of what a row asks: its first user message, or its text; blind to case, width and white space."""
    text = row.get("text")
    if text is None:
        text = next(message["content"] for message in row["messages"] if message["role"] == "user")
    normal = "".join(unicodedata.normalize("NFKC", text).casefold().split())
    return int.from_bytes(hashlib.blake2b(normal.encode("utf-8"), digest_size=8).digest(), "little")


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
        times[start + random.permutation(rows)[:extra]] += 1
        start += rows
    held: np.ndarray = np.zeros(len(prompts), dtype=bool)
    if fraction:
        chosen = times > 0
        target = max(1, round(fraction * int(chosen.sum())))
        target = min(target, max_eval_samples or target)
        held[chosen] = hold_out(prompts[chosen], target, seed)
        times[is_among(prompts, np.unique(prompts[held]))] = 0
        if max_eval_samples:
            thin(held, max_eval_samples, random, left_out, "--max_eval_samples")
    if max_samples and times.sum() > max_samples:
        left_out["--max_train_samples"] += int(times.sum()) - max_samples
        expanded: np.ndarray = np.repeat(np.arange(len(times)), times)
        times = np.bincount(random.permutation(expanded)[:max_samples], minlength=len(times)).astype(np.int32)
    return times, held


def hold_out(prompts: np.ndarray, target: int, seed: int) -> np.ndarray:
    """Mark about `target` rows, whole prompts together, in the order of a seeded hash of the prompts.

    The order of a prompt does not depend on the other rows, so that adding data moves few rows across the split.
    """
    ordered = mix(prompts, seed)
    ordered.sort()
    if not len(ordered) or ordered[0] == ordered[-1]:
        return np.zeros(len(prompts), dtype=bool)
    chosen: list[Any] = []
    held = start = 0
    while held < target and ordered[start] != ordered[-1]:  # one prompt at least is for training
        end = int(np.searchsorted(ordered, ordered[start], side="right"))
        if end - start <= max(1, 2 * (target - held)):  # a prompt of very many rows stays in training
            chosen.append(ordered[start])
            held += end - start
        start = end
    if not held:
        unique, counts = np.unique(prompts, return_counts=True)
        return prompts == unique[np.argmin(counts)]
    del ordered
    return is_among(prompts, np.array(chosen, dtype=np.uint64), seed)


def mix(prompts: np.ndarray, seed: int) -> np.ndarray:
    """A seeded one-to-one hash of 64-bit numbers: the finaliser of splitmix64 (Steele et al. 2014), which wraps."""
    mixed = prompts ^ np.uint64(seed % 2**64)
    with np.errstate(over="ignore"):
        mixed ^= mixed >> np.uint64(30)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(27)
        mixed *= np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return mixed


def is_among(prompts: np.ndarray, values: np.ndarray, seed: int | None = None) -> np.ndarray:
    """Which prompts, or with a seed which of their mixed hashes, are among these ascending values.

    Block by block: numpy's own `isin` takes several times the memory of the prompts.
    """
    found: np.ndarray = np.zeros(len(prompts), dtype=bool)
    if not len(values):
        return found
    for start in range(0, len(prompts), BLOCK_ROWS):
        block = prompts[start : start + BLOCK_ROWS]
        block = block if seed is None else mix(block, seed)
        places = np.minimum(np.searchsorted(values, block), len(values) - 1)
        found[start : start + BLOCK_ROWS] = values[places] == block
    return found


def thin(mask: np.ndarray, limit: int, random: np.random.Generator, left_out: Counter[str], reason: str) -> None:
    """Keep a random `limit` of the marked rows."""
    marked = np.flatnonzero(mask)
    if len(marked) > limit:
        mask[random.permutation(marked)[limit:]] = False
        left_out[reason] += len(marked) - limit

"""Which rows are trained on and how often, and which are held out: seeded, whole prompts on one side."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from typing import Any

import numpy as np


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
        chosen = np.flatnonzero(times)
        target = max(1, round(fraction * len(chosen)))
        target = min(target, max_eval_samples or target)
        held[chosen] = hold_out(prompts[chosen], target, seed)
        times[np.isin(prompts, prompts[held])] = 0
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
    unique, inverse, counts = np.unique(prompts, return_inverse=True, return_counts=True)
    if len(unique) < 2:
        return np.zeros(len(prompts), dtype=bool)
    mixed = unique ^ np.uint64(seed % 2**64)
    with np.errstate(over="ignore"):  # the finaliser of splitmix64 (Steele et al. 2014), which wraps around
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    chosen: np.ndarray = np.zeros(len(unique), dtype=bool)
    held = 0
    for prompt in np.argsort(mixed, kind="stable")[:-1]:  # one prompt at least is for training
        if held >= target:
            break
        if counts[prompt] <= max(1, 2 * (target - held)):  # a prompt of very many rows stays in training
            chosen[prompt] = True
            held += counts[prompt]
    if not held:
        chosen[np.argmin(counts)] = True
    return chosen[inverse.reshape(-1)]


def thin(mask: np.ndarray, limit: int, random: np.random.Generator, left_out: Counter[str], reason: str) -> None:
    """Keep a random `limit` of the marked rows."""
    marked = np.flatnonzero(mask)
    if len(marked) > limit:
        mask[random.permutation(marked)[limit:]] = False
        left_out[reason] += len(marked) - limit

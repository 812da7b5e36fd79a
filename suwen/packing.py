"""Rows packed into sequences, whole, so that no computation goes to padding."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def pack_best_fit(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[np.ndarray]:
    """Best-fit decreasing: rows by falling length, each into the fullest pack that still holds it.

    O(n log n) in practice: packs are found by their free space, of which there are at most `capacity` values. Uses at
    most 11/9 of the smallest possible number of packs, plus one (Johnson 1973); a percent more on real lengths.

    Args:
        lengths: tokens of each row, 1 to capacity.
        capacity: tokens in a pack, at most.

    Returns:
        Row numbers of each pack, ascending; packs in the order of their first row. The same input gives the same packs.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) and (sizes.max() > capacity or sizes.min() < 1):
        raise ValueError(f"rows of {sizes.min()} to {sizes.max()} tokens do not fit packs of {capacity}")
    order = np.argsort(-sizes, kind="stable")
    spaces: list[int] = []  # free spaces that packs have, ascending
    packs_with: dict[int, list[int]] = {}
    owner: np.ndarray = np.empty(len(sizes), dtype=np.int64)
    count = 0
    for row, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        at = bisect.bisect_left(spaces, size)
        if at == len(spaces):
            pack, space = count, capacity
            count += 1
        else:
            space = spaces[at]
            pack = packs_with[space].pop()
            if not packs_with[space]:
                del packs_with[space], spaces[at]
        owner[row] = pack
        if left := space - size:
            if left not in packs_with:
                bisect.insort(spaces, left)
                packs_with[left] = []
            packs_with[left].append(pack)
    rows = np.argsort(owner, kind="stable")
    packs = np.split(rows, np.cumsum(np.bincount(owner, minlength=count))[:-1]) if count else []
    return sorted(packs, key=lambda pack: int(pack[0]))


class Packs(torch.utils.data.Dataset):
    """A data set of packs over a data set of rows; an item is the list of its rows."""

    def __init__(self, rows: Any, packs: Sequence[np.ndarray], lengths: np.ndarray) -> None:
        """`lengths`: tokens of each row as it is computed."""
        self.rows, self.packs = rows, packs
        # Attention within rows is quadratic in their length, everything else linear; a token attends to about
        # 1,000 others for the price of one layer's matrices, which is near enough to balance packs over ranks.
        self.costs = np.array([lengths[pack].sum() + (lengths[pack] ** 2).sum() / 2000 for pack in packs])
        self.tokens = int(lengths.sum())

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, number: int) -> list[dict[str, Any]]:
        found = self.rows[self.packs[number].tolist()]  # by column
        names = list(found)
        return [dict(zip(names, values, strict=True)) for values in zip(*found.values(), strict=True)]


class BalancedSampler(torch.utils.data.Sampler):
    """Packs in random order, such that what the ranks compute at the same time costs about the same.

    Packs are sorted by cost and cut into groups of as many as one micro-step computes; groups are shuffled, and packs
    within a group. With one rank and one pack a micro-step that is a plain shuffle.
    """

    def __init__(self, costs: np.ndarray, group: int, seed: int) -> None:
        self.costs, self.group, self.seed, self.epoch = costs, group, seed, 0

    def __len__(self) -> int:
        return len(self.costs)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        generator = np.random.default_rng((self.seed, self.epoch))
        order = generator.permutation(len(self.costs))
        if self.group == 1:
            return iter(order.tolist())
        order = order[np.argsort(self.costs[order], kind="stable")]
        # The incomplete group comes last, as its micro-step does
        rest = len(order) % self.group
        left = generator.choice(len(order), size=rest, replace=False)
        whole: np.ndarray = np.delete(order, left).reshape(-1, self.group)
        mixed = generator.permuted(generator.permutation(whole, axis=0), axis=1)
        return iter([*mixed.flatten().tolist(), *order[left].tolist()])

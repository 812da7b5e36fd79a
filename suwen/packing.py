"""Rows packed into sequences, whole, so that no computation goes to padding."""

from __future__ import annotations

import array
import bisect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

SHORT = 1 / 4  # of a pack: of such rows any selection fills it
CHUNK_ROWS = 1 << 16  # that are Python's integers at a time


class Groups(Sequence[np.ndarray]):
    """Row numbers in groups, kept in two arrays: millions of small ones would take a hundred bytes each."""

    def __init__(self, numbers: np.ndarray, starts: np.ndarray) -> None:
        """`numbers`: (N,) of all groups, one behind another; `starts`: (groups + 1,) where each begins, and N."""
        self.numbers, self.starts = numbers, starts

    @classmethod
    def of(cls, groups: Sequence[np.ndarray]) -> Groups:
        starts = np.concatenate([[0], np.cumsum([len(group) for group in groups], dtype=np.int64)])
        return cls(np.concatenate([*groups, np.zeros(0, dtype=np.int64)]), starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self.numbers[self.starts[number] : self.starts[number + 1]]

    def sums(self, values: np.ndarray) -> np.ndarray:
        """(groups,) sums of (N,) int64 values in the order of `numbers`; no group is empty."""
        return np.add.reduceat(values, self.starts[:-1]) if len(self) else np.zeros(0, dtype=np.int64)


def pack_best_fit(lengths: Sequence[int] | np.ndarray, capacity: int) -> Groups:
    """Each row into the fullest pack that still holds it: long rows by falling length, then short ones in drawn order.

    With all rows by falling length (best-fit decreasing) a pack would hold short rows of one length alone, neighbours
    in their file: questions of one kind on one thing, and a step of training would see nothing else. Measured on pairs
    of 45 tokens in packs of 2,048: the reward model stayed at chance where it learns from mixed packs. Mixing costs at
    most half a percent of space on lengths like real ones (benchmarks/README.md).

    O(n log n) in practice: packs are found by their free space, of which there are at most `capacity` values.

    Args:
        lengths: tokens of each row, 1 to capacity.
        capacity: tokens in a pack, at most.

    Returns:
        Row numbers of each pack, ascending; packs in the order of their first row. The same input gives the same packs.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) and (sizes.max() > capacity or sizes.min() < 1):
        raise ValueError(f"rows of {sizes.min()} to {sizes.max()} tokens do not fit packs of {capacity}")
    order = np.random.default_rng(0).permutation(len(sizes))
    short = sizes[order] <= capacity * SHORT
    long_ones = order[~short]
    order = np.concatenate([long_ones[np.argsort(-sizes[long_ones], kind="stable")], order[short]])
    spaces: list[int] = []  # free spaces that packs have, ascending
    packs_with: dict[int, array.array[int]] = {}
    owner: np.ndarray = np.empty(len(sizes), dtype=np.int64)
    count = 0
    for start in range(0, len(order), CHUNK_ROWS):
        chosen = order[start : start + CHUNK_ROWS]
        owners = []
        for size in sizes[chosen].tolist():
            at = bisect.bisect_left(spaces, size)
            if at == len(spaces):
                pack, space = count, capacity
                count += 1
            else:
                space = spaces[at]
                pack = packs_with[space].pop()
                if not packs_with[space]:
                    del packs_with[space], spaces[at]
            owners.append(pack)
            if left := space - size:
                if left not in packs_with:
                    bisect.insort(spaces, left)
                    packs_with[left] = array.array("q")
                packs_with[left].append(pack)
        owner[chosen] = owners
    del order
    # Numbered anew by their first rows: a stable sort then gives packs in their order, and rows in theirs
    firsts: np.ndarray = np.full(count, len(sizes), dtype=np.int64)
    np.minimum.at(firsts, owner, np.arange(len(owner)))
    rank: np.ndarray = np.empty(count, dtype=np.int64)
    rank[np.argsort(firsts)] = np.arange(count)
    owner = rank[owner]
    starts = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=count))])
    return Groups(np.argsort(owner, kind="stable"), starts)


class Packs(torch.utils.data.Dataset):
    """A data set of packs over a data set of rows; an item is the list of its rows."""

    def __init__(self, rows: Any, packs: Sequence[np.ndarray], lengths: np.ndarray, seconds: float = 0.0) -> None:
        """`lengths`: tokens of each row as it is computed; `seconds`: what the packing took."""
        self.seconds = seconds
        self.rows, self.packs = rows, packs if isinstance(packs, Groups) else Groups.of(packs)
        # Attention within rows is quadratic in their length, everything else linear; a token attends to about
        # 1,000 others for the price of one layer's matrices, which is near enough to balance packs over ranks.
        ordered = lengths[self.packs.numbers]
        self.costs = self.packs.sums(ordered) + self.packs.sums(ordered**2) / 2000
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
            return map(int, order)
        order = order[np.argsort(self.costs[order], kind="stable")]
        # The incomplete group comes last, as its micro-step does
        rest = len(order) % self.group
        left = generator.choice(len(order), size=rest, replace=False)
        whole: np.ndarray = np.delete(order, left).reshape(-1, self.group)
        mixed = generator.permuted(generator.permutation(whole, axis=0), axis=1)
        return map(int, np.concatenate([mixed.flatten(), order[left]]))

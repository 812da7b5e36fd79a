"""Near-duplicates among many texts by MinHash and banding (Leskovec et al., "Mining of Massive Datasets", 3.3-3.4).

Texts are compared by the Jaccard similarity of their sets of character grams. Signatures estimate it, bands of them
find the pairs that are worth a look, and each pair found is compared exactly: no text is called a duplicate by chance.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from suwen.grams import hash_grams, to_codes

GRAM = 5  # characters
PERMUTATIONS = 128
SEED = 0


def gram_set(text: str, gram: int = GRAM) -> np.ndarray:
    """Sorted hashes of the grams of a text; a text shorter than a gram is one gram by itself."""
    codes = to_codes(text)
    return np.unique(hash_grams(codes, min(gram, max(len(codes), 1))))


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Similarity of two sorted sets of hashes; two empty texts are the same."""
    if not len(first) and not len(second):
        return 1.0
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)


def signatures(sets: Iterable[np.ndarray], permutations: int = PERMUTATIONS) -> np.ndarray:
    """(N, permutations) uint32 MinHash signatures: two agree in a place as often as their sets are similar."""
    # multiply-shift hashing (Dietzfelbinger et al. 1997): the upper half of a product modulo 2**64
    rng = np.random.default_rng(SEED)
    factor = rng.integers(0, 2**63, size=permutations, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    offset = rng.integers(0, 2**63, size=permutations, dtype=np.uint64)
    rows: list[np.ndarray] = []
    for grams in sets:
        values = (grams[:, None] * factor + offset) >> np.uint64(32)
        empty: np.ndarray = np.zeros(permutations, dtype=np.uint64)
        rows.append((values.min(axis=0) if len(grams) else empty).astype(np.uint32))
    return np.stack(rows) if rows else np.zeros((0, permutations), dtype=np.uint32)


def choose_bands(threshold: float, permutations: int = PERMUTATIONS) -> int:
    """Rows of a band, as many as still find 99 of 100 pairs at the threshold."""
    fitting = [r for r in range(1, permutations) if 1 - (1 - threshold**r) ** (permutations // r) >= 0.99]
    return max(fitting, default=1)


def near_duplicates(texts: Iterable[str], threshold: float = 0.8, gram: int = GRAM) -> list[int]:
    """For each text the place of the first text of its group; its own where nothing before it is like it.

    Groups are joined through pairs, so a chain of small changes is one group.

    Args:
        threshold: least Jaccard similarity of a pair.
    """
    sets = [gram_set(text, gram) for text in texts]
    rows = choose_bands(threshold)
    found = signatures(sets)
    group = list(range(len(sets)))

    def root(i: int) -> int:
        while group[i] != i:
            group[i] = group[group[i]]
            i = group[i]
        return i

    for band in range(0, PERMUTATIONS - rows + 1, rows):
        buckets: dict[bytes, list[int]] = defaultdict(list)
        for i, key in enumerate(np.ascontiguousarray(found[:, band : band + rows])):
            buckets[key.tobytes()].append(i)
        for members in buckets.values():
            kept = [members[0]]  # one of each group met: copies of a text are compared once
            for i in members[1:]:
                for j in kept:
                    if root(i) == root(j):
                        break
                    if jaccard(sets[i], sets[j]) >= threshold:
                        first, second = sorted((root(i), root(j)))
                        group[second] = first
                        break
                else:
                    kept.append(i)
    return [root(i) for i in range(len(sets))]

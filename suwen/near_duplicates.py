"""Near-duplicates among texts: character n-grams hashed in numpy, MinHash signatures by rensa, LSH bands, union-find.

Similarity is Jaccard's, of the sets of character 5-grams, letters and digits alone (Broder 1997; LSH banding as in
Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", 3.4). Signatures are R-MinHash (rensa, MIT, no pickle).
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

NGRAM = 5
NUM_HASHES = 128
# 16 bands of 8: texts of similarity 0.8 share a band with probability 0.95, of 0.5 with 0.06
NUM_BANDS = 16
SEED = 42
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
NOT_LETTERS = re.compile(r"[\W_]+")

# The signatures are made inside worker processes, one core each; rensa reads this when it is first used.
os.environ.setdefault("RAYON_NUM_THREADS", "1")


def normal_form(text: str) -> str:
    """What is compared: letters and digits alone, one width, one case."""
    return unicodedata.normalize("NFKC", NOT_LETTERS.sub("", text)).casefold()


def hash_ngrams(texts: Sequence[str], size: int) -> tuple[np.ndarray, np.ndarray]:
    """64-bit hashes of all character n-grams of each text.

    Args:
        texts: in normal form. One shorter than `size` counts as a single n-gram, an empty one has none.

    Returns:
        (H,) uint64 hashes, text after text, and (N + 1,) int64 offsets of each text in them.
    """
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    counts = np.where(lengths >= size, lengths - size + 1, (lengths > 0).astype(np.int64))
    padded = np.maximum(lengths, np.where(lengths > 0, size, 0))  # short texts are filled up, so that they hash at all
    joined = "".join(text.ljust(size, "\0") if text else "" for text in texts)
    codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    if not len(codes):
        return np.zeros(0, dtype=np.uint64), offsets
    hashes: np.ndarray = np.zeros(len(codes) - size + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for shift in range(size):
            hashes *= MULTIPLIER
            hashes += codes[shift : shift + len(hashes)]
        hashes ^= hashes >> np.uint64(32)  # mixed, since MinHash looks at the low bits too
        hashes *= np.uint64(0xBF58476D1CE4E5B9)
        hashes ^= hashes >> np.uint64(29)
    # an n-gram that begins in the last size - 1 characters of a text would reach into the next one
    starts = np.concatenate([[0], np.cumsum(padded)])[:-1]
    within = np.repeat(starts - offsets[:-1], counts) + np.arange(offsets[-1])
    return hashes[within], offsets


def signatures(texts: Sequence[str]) -> np.ndarray:
    """(N, NUM_HASHES) uint32 MinHash signatures of texts in normal form; empty texts are alike."""
    from rensa import RMinHash

    hashes, offsets = hash_ngrams(texts, NGRAM)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets.astype(np.uint64), NUM_HASHES, SEED)
    return np.array(matrix.to_rows(), dtype=np.uint32).reshape(len(texts), NUM_HASHES)


def first_of_cluster(rows: np.ndarray, threshold: float = 0.8) -> np.ndarray:
    """For each signature the lowest index in its cluster of near-duplicates: its own where it has none before it.

    Two rows are linked when they share a band and their estimated similarity reaches `threshold` (standard error about
    0.035 at 0.8); clusters are what such links connect. Within a band a row is compared with the first row of the same
    band and with the one before it.

    Args:
        rows: (N, NUM_HASHES) uint32.

    Returns:
        (N,) int64.
    """
    parent = list(range(len(rows)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    width = NUM_HASHES // NUM_BANDS
    with np.errstate(over="ignore"):
        for band in range(NUM_BANDS):
            keys: np.ndarray = np.zeros(len(rows), dtype=np.uint64)
            for column in range(band * width, (band + 1) * width):
                keys = (keys ^ rows[:, column]) * MULTIPLIER
                keys ^= keys >> np.uint64(29)
            order = np.argsort(keys, kind="stable")
            same = keys[order[1:]] == keys[order[:-1]]
            later: np.ndarray = np.flatnonzero(same) + 1
            heads: np.ndarray = np.zeros(len(order), dtype=np.int64)
            heads[1:] = np.where(same, 0, np.arange(1, len(order)))
            heads = np.maximum.accumulate(heads)
            pairs = np.concatenate(
                [np.stack([order[later], order[later - 1]]), np.stack([order[later], order[heads[later]]])], 1
            )
            for start in range(0, pairs.shape[1], 1 << 16):
                a, b = pairs[:, start : start + (1 << 16)]
                alike = (rows[a] == rows[b]).mean(axis=1) >= threshold
                for i, j in zip(a[alike].tolist(), b[alike].tolist(), strict=True):
                    i, j = root(i), root(j)
                    parent[max(i, j)] = min(i, j)
    return np.array([root(index) for index in range(len(rows))], dtype=np.int64)


class Strings:
    """Strings in normal form, to find texts that hold one of them as it stands: a pass for each length among them."""

    def __init__(self, strings: Iterable[str]) -> None:
        by_length: dict[int, list[str]] = defaultdict(list)
        for string in filter(None, dict.fromkeys(strings)):
            by_length[len(string)].append(string)
        self.hashes = {length: np.unique(hash_ngrams(found, length)[0]) for length, found in by_length.items()}

    def within(self, texts: Sequence[str]) -> np.ndarray:
        """(N,) whether each text (in normal form) holds one."""
        found: np.ndarray = np.zeros(len(texts), dtype=bool)
        for length, wanted in self.hashes.items():
            hashes, offsets = hash_ngrams(texts, length)
            hits = np.flatnonzero(np.isin(hashes, wanted))
            found[np.searchsorted(offsets, hits, side="right") - 1] = True
        return found


class TestItems:
    """The n-grams of test items, to find texts that hold one of them; items too short to have any are found as a whole.

    An n-gram in more than `common` items is a turn of phrase ("下列关于...的叙述，正确的是") and does not count.
    """

    __test__ = False  # not a test, whatever pytest thinks of its name

    def __init__(self, items: Sequence[str], ngram: int = 13, common: int = 3) -> None:
        self.ngram = ngram
        forms = list(dict.fromkeys(map(normal_form, items)))
        self.short = Strings(form for form in forms if len(form) < ngram)
        forms = [form for form in forms if len(form) >= ngram]
        hashes, offsets = hash_ngrams(forms, ngram)
        owners: np.ndarray = np.repeat(np.arange(len(forms)), np.diff(offsets))
        hashes, owners = np.unique(np.stack([hashes, owners.astype(np.uint64)]), axis=1)
        _, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
        rare = counts[inverse] <= common
        self.hashes, self.owners = hashes[rare], owners[rare].astype(np.int64)
        self.sizes = np.bincount(self.owners, minlength=len(forms))

    def overlaps(self, texts: Sequence[str]) -> np.ndarray:
        """(N,) the largest share of one test item's n-grams that each text (in normal form) holds, 0 to 1."""
        found: np.ndarray = self.short.within(texts).astype(np.float64)
        if not len(self.hashes):
            return found
        hashes, offsets = hash_ngrams(texts, self.ngram)
        first: Any = np.searchsorted(self.hashes, hashes, side="left")
        last: Any = np.searchsorted(self.hashes, hashes, side="right")
        hits = np.flatnonzero(last > first)
        texts_hit: Any = np.searchsorted(offsets, hits, side="right") - 1
        for number in np.unique(texts_hit):
            inside = hits[texts_hit == number]
            ranges = set(zip(first[inside].tolist(), last[inside].tolist(), strict=True))  # said twice counts once
            owners = np.concatenate([self.owners[start:end] for start, end in ranges])
            held, counts = np.unique(owners, return_counts=True)
            found[number] = max(found[number], (counts / self.sizes[held]).max())
        return found

"""What a training has read, as the hashes of its character 13-grams: test items can be looked for without the data.

All grams are kept, or a fixed share of them where they are many: those with the smallest hashes, as in MinHash for
containment (Broder 1997, "On the resemblance and containment of documents"). A training leaves its sketch beside its
weights; of the text itself nothing can be read from it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from suwen.grams import Codes, hash_grams, row_texts, sorted_unique, to_codes

FILE = "training_data.sketch"  # no *.safetensors, which would be taken for weights
VERSION = 2  # 1 had no SHA-256, and is read without
NGRAM = 13
MOST_GRAMS = 16_000_000  # 64 MB, about 50 MB of Chinese text; of more, every second, fourth, ... gram is kept
WAITING_GRAMS = 2_000_000  # new ones, until they are sorted in
CHUNK_CHARACTERS = 1 << 15  # of text at once: its arrays stay in the processor's cache
BITS = 32  # of a hash on the disk: an unseen gram meets one of 16 million by chance once in 270 times


class Sketch(NamedTuple):
    """The grams of a training set whose hashes are at most `limit`; all of them where that is the largest hash."""

    grams: np.ndarray  # (G,) uint32, sorted: the leading bits of the hashes, below those that `limit` says are 0
    limit: int
    rows: int
    characters: int

    @property
    def complete(self) -> bool:
        return self.limit == 2**64 - 1

    def shares(self, hashes: np.ndarray) -> tuple[int, float]:
        """How many of these grams the sketch would hold if the training had read them, and the share it does hold."""
        asked = leading_bits(hashes[hashes <= self.limit], self.limit)
        if not len(asked) or not len(self.grams):
            return len(asked), 0.0
        places = np.minimum(np.searchsorted(self.grams, asked), len(self.grams) - 1)
        return len(asked), float((self.grams[places] == asked).mean())


def leading_bits(hashes: np.ndarray, limit: int) -> np.ndarray:
    return (hashes >> np.uint64(limit.bit_length() - BITS)).astype(np.uint32)


class SketchBuilder:
    """Takes rows as they come; memory does not grow with their number.

    Args:
        most: grams kept; whenever there are more, the half with the larger hashes is left out.
    """

    def __init__(self, most: int = MOST_GRAMS) -> None:
        self.most, self.limit = most, 2**64 - 1
        self.rows = self.characters = 0
        self._kept: np.ndarray = np.zeros(0, dtype=np.uint64)
        self._waiting: list[np.ndarray] = []
        self._held = 0

    def add(self, rows: Iterable[dict]) -> None:
        """Read canonical rows (`suwen.loading.load_rows`): every text in them, but not their place."""
        texts, size = [], 0
        for row in rows:
            text = row_texts({key: value for key, value in row.items() if key != "where"}).replace("\0", " ")
            texts.append(text)
            size += len(text)
            self.rows, self.characters = self.rows + 1, self.characters + len(text)
            if size >= CHUNK_CHARACTERS:
                self._hash(texts)
                texts, size = [], 0
        if texts:
            self._hash(texts)

    def _hash(self, texts: list[str]) -> None:
        codes = to_codes("\0".join(texts))
        grams = hash_grams(codes, NGRAM)[within_rows(codes)]
        self._waiting.append(grams[grams <= self.limit])
        self._held += len(self._waiting[-1])
        if self._held >= min(WAITING_GRAMS, self.most):
            self._sort_in()

    def _sort_in(self) -> None:
        self._kept = sorted_unique(np.concatenate([self._kept, *self._waiting]))
        self._waiting, self._held = [], 0
        while len(self._kept) > self.most:
            self.limit //= 2
            self._kept = self._kept[: np.searchsorted(self._kept, np.uint64(self.limit), side="right")]

    def finish(self) -> Sketch:
        self._sort_in()
        return Sketch(sorted_unique(leading_bits(self._kept, self.limit)), self.limit, self.rows, self.characters)


def within_rows(codes: Codes) -> np.ndarray:
    """(N - NGRAM + 1,) bool: the grams that do not reach over the 0 between two rows."""
    inside: np.ndarray = np.ones(max(0, len(codes) - NGRAM + 1), dtype=bool)
    over = np.flatnonzero(codes == 0)[:, None] - np.arange(NGRAM)
    inside[over[(over >= 0) & (over < len(inside))]] = False
    return inside


def write_sketch(path: Path, sketch: Sketch) -> None:
    """Write a sketch as a safetensors file, in one step."""
    from safetensors.numpy import save

    values = {"version": VERSION, "ngram": NGRAM, "limit": sketch.limit, "rows": sketch.rows,
              "characters": sketch.characters}  # fmt: skip
    about = {key: str(value) for key, value in values.items()}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_bytes(save({"grams": sketch.grams}, about | {"sha256": _digest(sketch.grams, about)}))
    os.replace(temporary, path)


def _digest(grams: np.ndarray, about: dict[str, str]) -> str:
    """SHA-256 over everything that a sketch says."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    digest.update(np.ascontiguousarray(grams))
    return digest.hexdigest()


def load_sketch(path: Path) -> Sketch:
    """Raises ValueError where the file is none, damaged, or of another version."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            values, grams = file.metadata() or {}, file.get_tensor("grams")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"--sketch {path}: found no sketch ({error}), expected a file that a training wrote") from None
    recorded = values.pop("sha256", None)
    if values.get("version") != "1" and recorded != _digest(grams, values):
        raise ValueError(f"--sketch {path}: does not have its SHA-256, it is damaged; the training's data can be given")
    if values.get("version") not in ("1", str(VERSION)) or values.get("ngram") != str(NGRAM):
        raise ValueError(f"--sketch {path}: of version {values.get('version')}, expected {VERSION}")
    return Sketch(grams, int(values["limit"]), int(values["rows"]), int(values["characters"]))

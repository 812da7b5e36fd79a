"""BM25 over 64-bit terms: postings counted block by block in numpy, stored and searched by bm25s.

bm25s's own indexing goes through Python lists token by token, which took half of the whole time of a build; it offers
its storage of scores for exactly this, so only the counting is ours (tested to give bm25s's own scores).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from suwen.retrieval.terms import TERM_BITS, text_terms

PLACE_BITS = np.uint64(64 - TERM_BITS)
BLOCK_PASSAGES = 1 << int(PLACE_BITS)
K1, B = 1.5, 0.75  # bm25s's defaults, method "lucene"
MOST_QUERY_TERMS = 512  # of a question that is pages long, the rarest


class PostingsBuilder:
    """Collects which term occurs how often in which passage."""

    def __init__(self) -> None:
        self.lengths: list[np.ndarray] = []  # terms of each passage
        self.terms: list[np.ndarray] = []  # (t,) uint64, the different terms of each block
        self.postings: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # place of the term, passage, count
        self.count = 0

    def add(self, texts: list[str]) -> None:
        """Add a block of at most BLOCK_PASSAGES passages."""
        places, terms = text_terms(texts)
        # One sort of term and place in one number orders the block as the finished index is ordered
        keys = np.sort(terms << PLACE_BITS | places.astype(np.uint64))
        firsts = np.flatnonzero(np.diff(keys, prepend=keys[:1] + np.uint64(1)))
        counts = np.diff(firsts, append=len(keys))
        keys = keys[firsts]
        terms = keys >> PLACE_BITS
        new = np.diff(terms, prepend=terms[:1] + np.uint64(1)) != 0
        passages = (keys & np.uint64(BLOCK_PASSAGES - 1)).astype(np.int32) + self.count
        self.lengths.append(np.bincount(places, minlength=len(texts)))
        self.terms.append(terms[new])
        numbers = (np.cumsum(new) - 1).astype(np.int32)
        self.postings.append((numbers, passages.astype(np.int32), counts.astype(np.float32)))
        self.count += len(texts)

    def finish(self) -> tuple[np.ndarray, dict[str, Any]]:
        """(V,) uint64 sorted terms, and the scores as bm25s holds them: a sparse matrix of passages by terms."""
        vocabulary = np.unique(np.concatenate(self.terms))
        columns: list[np.ndarray] = [
            np.searchsorted(vocabulary, terms).astype(np.int32)[places]
            for terms, (places, _, _) in zip(self.terms, self.postings, strict=True)
        ]
        column = np.concatenate(columns)
        passage = np.concatenate([passages for _, passages, _ in self.postings])
        count = np.concatenate([counts for _, _, counts in self.postings])
        del columns
        self.terms, self.postings = [], []  # so that no copy is held while they are sorted
        order = np.argsort(column, kind="stable")  # the blocks follow each other, so passages stay in order
        column, passage, count = column[order], passage[order], count[order]
        frequency = np.bincount(column, minlength=len(vocabulary))
        starts: np.ndarray = np.zeros(len(vocabulary) + 1, dtype=np.int64)
        np.cumsum(frequency, out=starts[1:])
        length = np.concatenate(self.lengths)
        penalty = (K1 * (1 - B + B * length / max(length.mean(), 1))).astype(np.float32)
        scores = inverse_frequency(frequency, self.count).astype(np.float32)[column] * (
            count / (count + penalty[passage])
        )
        return vocabulary, {"data": scores, "indices": passage, "indptr": starts, "num_docs": self.count}


def inverse_frequency(frequency: Any, passages: int) -> Any:
    """Lucene's: ln(1 + (N - n + 0.5) / (n + 0.5)), Kamphuis et al. 2020 (doi:10.1007/978-3-030-45442-5_4)."""
    return np.log(1 + (passages - frequency + 0.5) / (frequency + 0.5))


def save(folder: Path, vocabulary: np.ndarray, scores: dict[str, Any]) -> None:
    import bm25s

    retriever = bm25s.BM25(k1=K1, b=B, method="lucene")
    retriever.vocab_dict, retriever.nonoccurrence_array, retriever.scores = {}, None, scores
    retriever.save(folder)
    np.save(folder / "terms.npy", vocabulary, allow_pickle=False)


class Bm25:
    """A stored index, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        import bm25s

        self.retriever = bm25s.BM25.load(folder, mmap=True, load_vocab=False)
        self.vocabulary = np.load(folder / "terms.npy", mmap_mode="r", allow_pickle=False)
        self.count = int(self.retriever.scores["num_docs"])

    def question_terms(self, question: str) -> tuple[np.ndarray, np.ndarray]:
        """The different terms of a question that the index knows, by number, and the weight (idf) of every term.

        Returns:
            (T,) int64, -1 where no passage has the term; (T,) float64.
        """
        terms = np.unique(text_terms([question])[1])
        if not len(terms) or not len(self.vocabulary):
            return np.full(len(terms), -1), np.ones(len(terms))
        numbers = np.minimum(np.searchsorted(self.vocabulary, terms), len(self.vocabulary) - 1)
        starts = self.retriever.scores["indptr"]
        known = np.asarray(self.vocabulary[numbers]) == terms
        frequency = np.where(known, starts[numbers + 1] - starts[numbers], 0)
        weights = inverse_frequency(frequency, self.count)
        kept = np.argsort(-weights, kind="stable")[:MOST_QUERY_TERMS]
        return np.where(known, numbers, -1)[kept], weights[kept]

    def search(self, numbers: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
        """The best passages for the terms of a question, the best first, ties in the order of the index.

        Returns:
            (K,) passages and (K,) scores above 0, K <= top.
        """
        known = numbers[numbers >= 0]
        if not len(known):
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        scores = self.retriever.get_scores_from_ids(known)
        best = np.argpartition(-scores, top)[:top] if top < len(scores) else np.arange(len(scores))
        best = best[scores[best] > 0]
        best = best[np.lexsort((best, -scores[best]))]
        return best, scores[best]

    def coverage(self, numbers: np.ndarray, weights: np.ndarray, passages: np.ndarray) -> np.ndarray:
        """(K,) share of a question, by the weight of its terms, that each passage contains; 0 to 1."""
        starts, indices = (self.retriever.scores[name] for name in ("indptr", "indices"))
        covered: np.ndarray = np.zeros(len(passages))
        for number, weight in zip(numbers.tolist(), weights.tolist(), strict=True):
            if number < 0:
                continue
            having = indices[starts[number] : starts[number + 1]]
            at = np.minimum(np.searchsorted(having, passages), len(having) - 1)
            covered += weight * (having[at] == passages)
        return covered / max(weights.sum(), 1e-9)

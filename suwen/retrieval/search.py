"""Search an index: BM25, dense where the index has vectors, both fused by rank, reranked where asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from suwen.retrieval.bm25 import Bm25
from suwen.retrieval.dense import Embedder, Reranker
from suwen.retrieval.index import VERSIONS, PassageStore, read_index_file, whole_build
from suwen.retrieval.passages import Passage
from suwen.retrieval.settings import RetrievalSettings
from suwen.retrieval.terms import normalise

CANDIDATES = 50
# Of the best score, for a passage whose title the question names: 布洛芬 before 布洛芬锌, and before mere mentions.
# More of it, and documents that a question names in passing push aside those that answer it (benchmarks/README.md).
TITLE_BONUS = 0.2
RRF_K = 60  # Cormack et al. 2009 (doi:10.1145/1571941.1572114)
# Words of asking, which no passage of an answer needs to contain
ASKING = re.compile(
    r"请问|您好|你好|医生|谢谢|帮忙|告诉我|我想(?:问|知道|了解)(?:一下)?|怎么(?:办|样|回事)|是(?:什么|多少|怎么)|"
    r"有(?:哪些|什么|没有)|哪些|哪种|哪个|什么|如何|怎样|怎么|为什么|是否|多少|可以|应该|需要|[吗呢吧啊呀？?！!。，,]"
)


@dataclass(frozen=True)
class Hit:
    passage: Passage
    score: float  # of the last ranking: comparable within one search only
    # 0 to 1: the share of the question, by the weight of its terms, that the passage contains, put into the upper half
    # where the question names its title; with dense retrieval the cosine of the two if that is more; with a
    # cross-encoder what that says
    relevance: float


class KnowledgeBase:
    """An index opened for search; threads may share it.

    Args:
        folder: what tools/build_index.py wrote.
        settings: how many passages an answer gets, and how relevant they must be.
        embedding_model: another place of the model whose vectors the index holds.
        rerank_model: a cross-encoder's folder.

    Raises:
        ValueError: no finished index, or an embedding model other than the one it was built with.
    """

    def __init__(
        self,
        folder: str,
        settings: RetrievalSettings | None = None,
        embedding_model: str | None = None,
        rerank_model: str | None = None,
    ) -> None:
        self.settings = settings or RetrievalSettings()
        self.record = read_index_file(Path(folder))
        if not VERSIONS.items() <= self.record["settings"].items():
            raise ValueError(
                f"--knowledge_index: {folder} was built by another version of this program; build it again"
            )
        data = whole_build(Path(folder), self.record)
        self.store, self.bm25 = PassageStore(data), Bm25(data)
        self.embedder: Embedder | None = None
        self.vectors: np.ndarray | None = None
        built_with = self.record["embedding"]
        if built_with is not None:
            path = embedding_model or built_with["path"]
            self.embedder = Embedder(path, built_with["question_prefix"], built_with["passage_prefix"])
            if self.embedder.fingerprint["sha256"] != built_with["sha256"]:
                raise ValueError(f"--embedding_model: {path} is not the model that {folder} was built with")
            self.vectors = np.load(data / "embeddings.npy", mmap_mode="r", allow_pickle=False)
        elif embedding_model:
            raise ValueError(f"--embedding_model: {folder} was built without one; build it again with it")
        self.reranker = Reranker(rerank_model) if rerank_model else None

    def __len__(self) -> int:
        return len(self.store)

    def search(self, question: str, top: int = 4, with_flagged: bool = False, named_in: str | None = None) -> list[Hit]:
        """The best passages, the best first; no two with the same text.

        Args:
            with_flagged: also passages that look like instructions to the model.
            named_in: the part of the question whose names count as what it is about; None for all of it.
        """
        named_in = question if named_in is None else named_in
        stripped = ASKING.sub(" ", question)
        numbers, weights = self.bm25.question_terms(stripped if stripped.strip() else question)
        rows, scores = self._lexical(named_in, numbers)
        similar: np.ndarray | None = None
        if self.embedder is not None and self.vectors is not None:
            similar = self.vectors @ self.embedder.question(question)
            nearest = np.argsort(-similar, kind="stable")[:CANDIDATES]
            rows, scores = fuse_ranks([rows, nearest])
        hits: list[tuple[int, float, Passage]] = []
        seen: set[str] = set()
        for row, score in zip(rows.tolist(), scores.tolist(), strict=True):
            passage = self.store[row]
            if passage.sha256 in seen or passage.flags and not with_flagged:
                continue
            seen.add(passage.sha256)
            hits.append((row, score, passage))
            if len(hits) == top and self.reranker is None:
                break
        found = np.array([row for row, _, _ in hits], dtype=np.int64)
        relevance = self.bm25.coverage(numbers, weights, found)
        # What the question names is what it is about, in whatever words it goes on
        relevance = np.where(self._named(named_in, found), (1 + relevance) / 2, relevance)
        if similar is not None:
            relevance = np.maximum(relevance, similar[found])
        if self.reranker is not None and hits:
            relevance = self.reranker.scores(question, [passage.titled for _, _, passage in hits])
            order = np.argsort(-relevance, kind="stable")[:top].tolist()
            hits = [(hits[at][0], float(relevance[at]), hits[at][2]) for at in order]
            relevance = relevance[order]
        shares = np.clip(relevance, 0.0, 1.0).tolist()
        return [Hit(passage, score, share) for (_, score, passage), share in zip(hits, shares, strict=True)]

    def _lexical(self, named_in: str, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(K,) passages by their words, the best first, and (K,) scores."""
        rows, scores = self.bm25.search(numbers, CANDIDATES)
        scores = scores + TITLE_BONUS * scores[:1] * self._named(named_in, rows)
        order = np.argsort(-scores, kind="stable")
        return rows[order], scores[order]

    def _named(self, named_in: str, rows: np.ndarray) -> np.ndarray:
        """(K,) whether a text holds a passage's title."""
        asked = normalise(named_in)
        titles = [normalise(self.store[row].title) for row in rows.tolist()]
        return np.array([len(title) > 1 and title in asked for title in titles], dtype=bool)


def fuse_ranks(rankings: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Reciprocal rank fusion: a passage scores the sum of 1 / (k + rank) over the rankings that hold it, ranks from 1.

    Returns:
        (K,) passages, the best first, and (K,) scores.
    """
    passages = np.unique(np.concatenate(rankings))
    scores: np.ndarray = np.zeros(len(passages))
    for ranking in rankings:
        scores[np.searchsorted(passages, ranking)] += 1 / (RRF_K + 1 + np.arange(len(ranking)))
    order = np.lexsort((passages, -scores))
    return passages[order], scores[order]

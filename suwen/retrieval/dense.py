"""Dense retrieval and reranking by sentence-transformers, from local folders; both are optional."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from suwen.readers import hash_file

INSTALL = "needs sentence-transformers: pip install sentence-transformers==6.2.0"


def _require_folder(path: str, flag: str) -> None:
    if not (Path(path) / "config.json").is_file():
        raise ValueError(f"{flag}: {path} not found, expected a local sentence-transformers folder (with config.json)")
    if any(Path(path).rglob("*.bin")) and not any(Path(path).rglob("*.safetensors")):
        raise ValueError(f"{flag}: {path} holds pickled weights (.bin), expected .safetensors")


def model_fingerprint(path: str) -> str:
    """sha256 over the files that decide what a model gives."""
    files = [
        file for file in sorted(Path(path).rglob("*")) if file.suffix in (".safetensors", ".json", ".txt", ".model")
    ]
    return hashlib.sha256("".join(map(hash_file, files)).encode()).hexdigest()


class Embedder:
    """Unit vectors of questions and passages.

    Args:
        path: a sentence-transformers folder; code in it never runs.
        question_prefix, passage_prefix: what the model was trained with, such as "query: " and "passage: " (E5), or
            "为这个句子生成表示以用于检索相关文章：" for questions (BGE).
    """

    def __init__(self, path: str, question_prefix: str = "", passage_prefix: str = "") -> None:
        _require_folder(path, "--embedding_model")
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise ValueError(f"--embedding_model: {INSTALL}") from None
        self.model: Any = SentenceTransformer(
            path, trust_remote_code=False, local_files_only=True, model_kwargs={"use_safetensors": True}
        )
        self.question_prefix, self.passage_prefix = question_prefix, passage_prefix
        self.dimension = int(self.model.encode(["."], show_progress_bar=False).shape[1])
        self.fingerprint = {
            "path": str(Path(path).resolve()),
            "sha256": model_fingerprint(path),
            "question_prefix": question_prefix,
            "passage_prefix": passage_prefix,
        }

    def _encode(self, texts: list[str], progress: bool) -> np.ndarray:
        return self.model.encode(
            texts, normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=progress
        ).astype(np.float32)

    def passages(self, texts: list[str], progress: bool = False) -> np.ndarray:
        """(N, D)"""
        return self._encode([self.passage_prefix + text for text in texts], progress)

    def question(self, text: str) -> np.ndarray:
        """(D,)"""
        return self._encode([self.question_prefix + text], False)[0]


class Reranker:
    """A cross-encoder: reads question and passage together."""

    def __init__(self, path: str) -> None:
        _require_folder(path, "--rerank_model")
        try:
            from sentence_transformers import CrossEncoder
        except ImportError:
            raise ValueError(f"--rerank_model: {INSTALL}") from None
        self.model: Any = CrossEncoder(
            path, trust_remote_code=False, local_files_only=True, model_kwargs={"use_safetensors": True}
        )

    def scores(self, question: str, texts: list[str]) -> np.ndarray:
        """(N,) 0 to 1 for the usual cross-encoders of one label, whose logit sentence-transformers squashes."""
        return np.asarray(self.model.predict([(question, text) for text in texts], show_progress_bar=False)).reshape(-1)

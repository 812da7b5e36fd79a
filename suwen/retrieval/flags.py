"""The knowledge base's flags of the doors that answer. Imports nothing heavy, so that mistakes are answered at once."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from suwen.retrieval.settings import RetrievalSettings

if TYPE_CHECKING:
    from suwen.retrieval.search import KnowledgeBase


def add_retrieval_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("knowledge base")
    group.add_argument(
        "--knowledge_index", metavar="DIR", help="answer from the documents in it, with sources (tools/build_index.py)"
    )
    group.add_argument(
        "--num_passages",
        type=int,
        default=RetrievalSettings.num_passages,
        metavar="N",
        help=f"passages shown to the model, at most (default: {RetrievalSettings.num_passages})",
    )
    group.add_argument(
        "--min_relevance",
        type=float,
        default=RetrievalSettings.min_relevance,
        metavar="X",
        help="share of the question that a passage must contain, if the question does not name its title, else there is"
        " no answer; 0: any passage will do; with a dense model or a cross-encoder their own scale: choose it on"
        " questions of yours"
        f" (default: {RetrievalSettings.min_relevance})",
    )
    group.add_argument("--embedding_model", metavar="DIR", help="another place of the index's embedding model")
    group.add_argument("--rerank_model", metavar="DIR", help="local cross-encoder that orders the passages found")


def check_retrieval_flags(args: argparse.Namespace) -> None:
    retrieval_settings(args)
    if args.knowledge_index is None:
        for name in ("embedding_model", "rerank_model"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name}: needs --knowledge_index")
    elif not (Path(args.knowledge_index) / "index.json").is_file():
        raise ValueError(
            f"--knowledge_index: found no index in {args.knowledge_index}, expected one that tools/build_index.py made"
        )


def retrieval_settings(args: argparse.Namespace) -> RetrievalSettings:
    return RetrievalSettings(args.num_passages, args.min_relevance)


def load_knowledge(args: argparse.Namespace) -> KnowledgeBase | None:
    """The knowledge base that the flags name, None where they name none."""
    if args.knowledge_index is None:
        return None
    from suwen.retrieval.search import KnowledgeBase

    return KnowledgeBase(args.knowledge_index, retrieval_settings(args), args.embedding_model, args.rerank_model)

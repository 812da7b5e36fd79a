"""Build a knowledge base out of documents, for answers with sources.

    python tools/build_index.py --documents leaflets/ guidelines.pdf --output_dir outputs/knowledge
    python inference.py --interactive --knowledge_index outputs/knowledge

Reads .txt, .md, .csv, .tsv, .json, .jsonl, .parquet, .pdf and .docx; tables and JSON may hold texts, questions with
answers, records of a knowledge graph, or its triples. Text may be UTF-8, UTF-16 or GB18030. The same command again
reads only what has changed. Nothing leaves this machine.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from suwen.command_line import OneLineParser, run


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--documents", nargs="+", required=True, metavar="PATH", help="files, folders or patterns such as 'data/*.pdf'"
    )
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="folder of the index")
    parser.add_argument(
        "--passage_characters", type=int, default=400, metavar="N", help="about so many a passage (default: 400)"
    )
    parser.add_argument(
        "--embedding_model", metavar="DIR", help="local sentence-transformers folder: dense retrieval beside BM25"
    )
    parser.add_argument(
        "--question_prefix", default="", metavar="TEXT", help="what the embedding model expects before a question"
    )
    parser.add_argument("--passage_prefix", default="", metavar="TEXT", help="and before a passage")
    parser.add_argument(
        "--pii",
        choices=("off", "report", "mask"),
        default="off",
        help="personal data (IDs, telephone numbers, names behind labels ...): count it, or mask it (default: off)",
    )
    args = parser.parse_args(argv)
    if not 50 <= args.passage_characters <= 4000:
        raise ValueError(f"--passage_characters: found {args.passage_characters}, expected 50 to 4000")
    if (args.question_prefix or args.passage_prefix) and not args.embedding_model:
        raise ValueError("--question_prefix and --passage_prefix: need --embedding_model")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    from suwen.retrieval.dense import Embedder
    from suwen.retrieval.index import build_index

    embed = None
    if args.embedding_model:
        embed = Embedder(args.embedding_model, args.question_prefix, args.passage_prefix)
    started = time.perf_counter()
    report = build_index(
        args.documents, args.output_dir, args.passage_characters, embed, progress=sys.stderr.isatty(), pii=args.pii
    )
    print("\n".join(report.lines()))
    print(f"{args.output_dir}: built in {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    run(main)

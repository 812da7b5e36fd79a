"""Speed of the knowledge base: building an index, and asking it, on one core.

    OMP_NUM_THREADS=1 python benchmarks/retrieval_speed.py --documents leaflets/ guidelines.jsonl
    OMP_NUM_THREADS=1 python benchmarks/retrieval_speed.py               # on text made of the project's samples

Prints megabytes of UTF-8 text a second from files to a finished index, next to bm25s's own indexing of the same terms,
and the milliseconds of a search at --passages passages.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from suwen.command_line import OneLineParser, run


def sample_documents(folder: Path, megabytes: float) -> list[str]:
    """Files of so much text altogether, sentences of the samples in random order."""
    from suwen.embedded import sample_texts

    sentences = [part + "。" for text in sample_texts() for part in text.split("。") if part.strip()]
    draw = random.Random(0)
    written, number = 0, 0
    while written < megabytes * 1e6:
        text = "\n".join("".join(draw.choices(sentences, k=6)) for _ in range(200))
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
        written, number = written + len(text.encode()), number + 1
    return [str(folder)]


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", nargs="+", help="what to index (default: text made of the samples)")
    parser.add_argument("--passages", type=int, default=100_000, help="of the index that is asked (default: 100000)")
    parser.add_argument("--questions", type=int, default=200, help="searches to measure (default: 200)")
    args = parser.parse_args(argv)

    import bm25s

    from suwen.retrieval import bm25
    from suwen.retrieval.index import PassageStore, build_index
    from suwen.retrieval.search import KnowledgeBase
    from suwen.retrieval.terms import text_terms

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        documents = args.documents
        if not documents:
            (folder / "documents").mkdir()
            documents = sample_documents(folder / "documents", 10)
        text_terms(["预热"])  # jieba's dictionary
        started = time.process_time()
        build_index(documents, str(folder / "index"))
        seconds = time.process_time() - started
        [data] = (folder / "index").glob("passages-*")
        store = PassageStore(data)
        texts = [store[row].indexed for row in range(len(store))]
        megabytes = sum(len(store[row].text.encode()) for row in range(len(store))) / 1e6
        print(f"index: {megabytes / seconds:.1f} MB/s ({megabytes:.1f} MB, {len(store)} passages, {seconds:.1f} s)")

        places, terms = text_terms(texts)
        order = places.argsort(kind="stable")
        numbers = {term: number for number, term in enumerate(sorted(set(terms.tolist())))}
        corpus: list[list[int]] = [[] for _ in texts]
        for place, term in zip(places[order].tolist(), terms[order].tolist(), strict=True):
            corpus[place].append(numbers[term])
        started = time.process_time()
        bm25s.BM25().index((corpus, {str(n): n for n in numbers.values()}), show_progress=False)
        library = time.process_time() - started
        del corpus
        started = time.process_time()
        builder = bm25.PostingsBuilder()
        for at in range(0, len(texts), bm25.BLOCK_PASSAGES):
            builder.add(texts[at : at + bm25.BLOCK_PASSAGES])
        builder.finish()
        ours = time.process_time() - started
        print(
            f"ratio: ours with segmentation {ours:.2f} s, bm25s without it {library:.2f} s: {library / ours:.2f} times"
        )

        draw = random.Random(1)
        many = folder / "many.jsonl"
        with open(many, "w", encoding="utf-8") as stream:
            for _ in range(args.passages):
                passage = store[draw.randrange(len(store))]
                middle = draw.randrange(len(passage.text))
                row = {"名称": passage.title, "说明": passage.text[middle:] + passage.text[:middle]}
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        build_index([str(many)], str(folder / "large"))
        knowledge = KnowledgeBase(str(folder / "large"))
        times, processor = [], []
        for _ in range(args.questions):
            passage = store[draw.randrange(len(store))]
            words = [passage.text[at : at + 12] for at in draw.choices(range(max(1, len(passage.text) - 12)), k=2)]
            question = f"{passage.title}{'，'.join(words)}有哪些？"
            started, cpu = time.perf_counter(), time.process_time()
            knowledge.search(question)
            times.append(1000 * (time.perf_counter() - started))
            processor.append(1000 * (time.process_time() - cpu))
        times.sort()
        print(
            f"search at {len(knowledge)} passages: median {statistics.median(times):.1f} ms, "
            f"95 % below {times[int(0.95 * len(times))]:.1f} ms; "
            f"median of processor time {statistics.median(processor):.1f} ms"
        )


if __name__ == "__main__":
    run(main)

"""Is the leaflet of a drug found among all the passages of an index? Recall of documents on real questions.

    python benchmarks/retrieval_recall.py --leaflets drug.json --questions 药品适应症评测数据集.csv
    python benchmarks/retrieval_recall.py --leaflets drug.json --questions FILE --exam cmexam.csv --others books/

Only questions whose leaflet is known count: QiZhenGPT's drugs (columns 药品, instruction) that have a leaflet of the
same name, salts and forms left aside (盐酸, 片 ...); and choice questions (column Question) that name just one leaflet.
The latter are rough: a drug in the question need not be what it is about, and 维A酸 is found in 异维A酸.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from suwen.command_line import OneLineParser, run

if TYPE_CHECKING:
    from suwen.retrieval.search import KnowledgeBase

DEPTHS = (1, 3, 5, 10)
SALTS = "盐酸|硫酸|磷酸|醋酸|富马酸|马来酸|酒石酸|枸橼酸|甲磺酸|苯磺酸|甲苯磺酸|氢溴酸|琥珀酸"
FORMS = "缓释|控释|肠溶|分散|咀嚼|泡腾|口服|注射液|胶囊|颗粒|乳膏|软膏|凝胶|糖浆|片|丸|散"


class Asked(NamedTuple):
    question: str
    titles: set[str]  # of the leaflets that are right


def bare_name(name: str) -> str:
    """盐酸二甲双胍缓释片 -> 二甲双胍."""
    return re.sub(rf"(?:{FORMS})+$", "", re.sub(rf"^(?:{SALTS})", "", name.strip()))


def read_column(path: str, *names: str) -> list[tuple[str, ...]]:
    with open(path, encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        if missing := set(names) - set(reader.fieldnames or ()):
            raise ValueError(f"{path}: found no column {', '.join(sorted(missing))}")
        return [tuple(row[name] for name in names) for row in reader]


def report(name: str, asked: list[Asked], total: int, knowledge: KnowledgeBase) -> None:
    print(f"{name}: {len(asked)} of {total} have their leaflet in the index")
    ranks: list[int] = []  # of those that were found
    for question, titles in asked:
        hits = knowledge.search(question, max(DEPTHS))
        rank = next((place for place, hit in enumerate(hits, start=1) if hit.passage.title in titles), None)
        ranks += [rank] if rank else []
        if rank is None or rank > 5:
            first = hits[0].passage.title if hits else "nothing"
            print(f"  not among five: {'/'.join(sorted(titles))}, but {first}: {question[:60]}")
    for depth in DEPTHS if asked else ():
        found = sum(rank <= depth for rank in ranks)
        print(f"  recall@{depth}: {found} of {len(asked)}, {found / len(asked):.1%}")
    if asked:
        print(f"  MRR: {sum(1 / rank for rank in ranks) / len(asked):.3f}")


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--leaflets", required=True, help="JSON list of leaflets, the drug's name in the first line")
    parser.add_argument("--questions", required=True, help="CSV with 药品 and instruction")
    parser.add_argument("--exam", help="CSV with Question")
    parser.add_argument("--others", nargs="+", default=[], help="what else the index holds")
    args = parser.parse_args(argv)

    from suwen.retrieval.index import build_index
    from suwen.retrieval.search import KnowledgeBase

    leaflets: dict[str, str] = {}
    for text in json.loads(Path(args.leaflets).read_text(encoding="utf-8")):
        name, _, body = text.strip().partition("\n")
        leaflets.setdefault(name.strip(), body)
    titles: dict[str, set[str]] = {}
    for name in leaflets:
        titles.setdefault(bare_name(name), set()).add(name)
    drugs = read_column(args.questions, "药品", "instruction")
    exam = read_column(args.exam, "Question") if args.exam else []

    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder, "leaflets.jsonl")
        rows = ({"title": name, "content": body} for name, body in leaflets.items())
        records.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        started = time.process_time()
        built = build_index([str(records), *args.others], f"{folder}/index")
        seconds = time.process_time() - started
        print(f"{built.files} files, {built.passages} passages, {seconds:.1f} s of CPU time")
        knowledge = KnowledgeBase(f"{folder}/index")
        known = [Asked(question, titles[bare]) for drug, question in drugs if (bare := bare_name(drug)) in titles]
        report("drugs", known, len(drugs), knowledge)
        if exam:
            longest_first = sorted((re.escape(name) for name in leaflets if len(name) > 2), key=len, reverse=True)
            names = re.compile("|".join(longest_first))
            named = [(stem, set(names.findall(stem))) for (stem,) in exam]
            once = [Asked(stem, found) for stem, found in named if len(found) == 1]
            report("exam questions", once, len(exam), knowledge)


if __name__ == "__main__":
    run(main)

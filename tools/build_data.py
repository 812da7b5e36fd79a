"""Medical knowledge to training data: pretraining text, SFT, preference pairs and evaluation, with a data card.

    python tools/build_data.py                                              # the sample graph in data/kg
    python tools/build_data.py --recipe fictional --size 300 --seed 1       # an invented graph: measures injection
    python tools/build_data.py --graph diseases.csv,leaflets.json --text books/ --qa qa.jsonl:0.5 --pii mask
    python tools/build_data.py --recipe chimed --qa Q --exams E --text T --graph G --dialogues D --general N
    python tools/build_data.py --recipe qizhen --graph G --qa Q --dialogues D

Recipes: graph builds all stages from --graph and mixes the other files in; fictional does so from an invented graph,
in groups A (pretraining and SFT), B (pretraining alone), C (retrieval corpus alone); chimed composes the stages as
Qilin-Med's ChiMed does (QA, exams, text, graphs and dialogues in pretraining; general data, exams and dialogues in
SFT); qizhen makes QiZhen's families of instructions (real QA, drugs, diseases, records from dialogues).
"""

import itertools
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from suwen.arguments import build_parser, flag, run, split_dataclasses

NOTICE = "Sample data for research. No medical advice."
STAGES = {"pretrain": "text", "sft": "conversation", "preference": "preference"}


@dataclass
class SourceArguments:
    recipe: Literal["graph", "fictional", "chimed", "qizhen"] = flag("graph", "what is made of the sources, see above")
    graph: str = flag("", "triples, node and edge tables, disease tables, leaflets (data/kg where no source is given)")
    text: str = flag("", "plain text, books, guidelines")
    qa: str = flag("", "questions and answers")
    dialogues: str = flag("", "dialogues of patients and doctors")
    general: str = flag("", "general instructions and safety prompts")
    exams: str = flag("", "exam questions in CMExam's form, or as conversations")
    preference: str = flag("", "preference pairs, or prompts with responses and scores")
    tests: str = flag("", "test files whose questions must not be in any training row")
    licences: str = flag("", "PATH=LICENCE,...: for the data card, where no licence file lies beside the data")


@dataclass
class BuildArguments:
    output_dir: str = flag("outputs/data", "a new folder, or one of an earlier build, which is replaced")
    size: int = flag(75, "diseases of the fictional graph")
    groups: str = flag("", "shares of the entities, e.g. A:0.4,B:0.4,C:0.2 (the fictional graph's; else all in A)")
    passes: int = flag(8, "articles of each entity: so often is each fact met in pretraining")
    wordings: int | None = flag(None, "statements of each relation at most (all)")
    shuffle: bool = flag(True, "facts of an article in a new order each time")
    questions: int = flag(6, "questions for each relation of an entity")
    pairs: int = flag(2, "preference pairs for each relation of an entity")
    evaluation: int = flag(300, "entities of each group that evaluation items are made of, at most; the corpus has all")
    reading: float = flag(0.2, "share of reading examples, in pretraining and SFT")
    replay: float = flag(0.1, "share of pretraining text replayed in SFT")
    answers: Literal["sentence", "value"] = flag("sentence", "answers as sentences, or the bare values")
    pii: Literal["off", "report", "mask"] = flag("report", "personal data: count it, or replace it too")
    min_chinese: float = flag(0.3, "share of Chinese among the letters of a row of other sources")
    max_characters: int = flag(4000, "longer documents are split between sentences")
    on_bad_rows: Literal["error", "skip"] = flag("skip", "count bad rows and go on, or stop at the first one")
    seed: int = flag(42, "seed of everything that is drawn")
    num_proc: int | None = flag(None, "worker processes (all cores); the result does not depend on it")


class Build:
    """The folder in the making: row files, what was dropped, and the parts of the card."""

    def __init__(self, folder: Path, on_bad_rows: str) -> None:
        from suwen.mixing import RowFile

        self.folder, self.on_bad_rows, self.row_file = folder, on_bad_rows, RowFile
        self.files: dict[str, Any] = {}
        self.refused: Counter[str] = Counter()
        self.dropped = open(folder / "dropped_rows.jsonl", "w", encoding="utf-8", errors="backslashreplace")

    def write(self, stage: str, rows: Iterable[dict[str, Any]]) -> None:
        """Rows to one file a recipe."""
        for row in rows:
            name = f"{stage}/{row['recipe'].replace(' ', '_')}"
            if name not in self.files:
                self.files[name] = self.row_file(self.folder / f"{name}.jsonl")
            self.files[name].write(row)

    def refuse(self, where: str, reason: str, row: Any) -> None:
        if self.on_bad_rows == "error":
            raise ValueError(f"{where}: {reason}")
        self.refused[reason] += 1
        self.note("refused", where, reason, row)

    def note(self, step: str, where: str, reason: str, row: Any = None) -> None:
        values = {"step": step, "where": where, "reason": reason, **({"row": row} if row is not None else {})}
        self.dropped.write(json.dumps(values, ensure_ascii=False, default=str) + "\n")

    def close(self) -> None:
        for file in [*self.files.values(), self.dropped]:
            file.close()


def parse_pairs(text: str, name: str) -> dict[str, str]:
    """ "a=b,c=d" or "a:b,c:d" as a dict."""
    pairs = [part.replace("=", ":", 1).rpartition(":")[::2] for part in text.split(",") if part]
    if any(not key.strip() or not value.strip() for key, value in pairs):
        raise ValueError(f"--{name}: found {text!r}, expected pairs such as A:0.4,B:0.4")
    return {key.strip(): value.strip() for key, value in pairs}


def generated_rows(
    entities: list[str], source: Any, recipes: str, evaluated: set[str]
) -> list[tuple[str, dict[str, Any]]]:
    """(stage, row) for some entities; runs in a worker."""
    from suwen import fact_items, pairs, synthesis

    makers: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
        "pretrain": synthesis.article_rows,
        "question": synthesis.question_rows,
        "dialogue": synthesis.dialogue_rows,
        "exam": synthesis.exam_rows,
        "preference": pairs.pair_rows,
        "recall": fact_items.recall_items,
        "choice": fact_items.choice_items,
        "open_book": fact_items.open_book_items,
        "test_exam": fact_items.exam_items,
        "corpus": fact_items.corpus_rows,
    }
    stages = {
        **dict.fromkeys(("question", "dialogue", "exam"), "sft"),
        "pretrain": "pretrain",
        "preference": "preference",
    }
    rows = []
    for entity in entities:
        group = source.groups[entity]
        for name in recipes.split():
            stage = stages.get(name, "evaluation")
            if stage == "evaluation":
                wanted = name == "corpus" or entity in evaluated
            else:
                wanted = group == "A" or (group == "B" and stage == "pretrain")
            if wanted:
                rows += [(stage, row) for row in makers[name](entity, source)]
    return rows


def evaluated_entities(source: Any, most: int) -> set[str]:
    """A seeded choice of at most `most` entities of each group."""
    from suwen.synthesis import rng_of

    heads = sorted(source.items, key=lambda head: rng_of(source.rules.seed, "evaluated", head).random())
    groups = {group: [head for head in heads if source.groups[head] == group] for group in "ABC"}
    return {head for members in groups.values() for head in members[:most]}


def write_generated(build: Build, source: Any, reading: Any, args: BuildArguments, recipe: str) -> None:
    """Everything that is made of the graph."""
    from tqdm import tqdm

    from suwen import fact_items, pairs, synthesis
    from suwen.parallel import available_cores, map_in_order

    evaluation = "recall choice open_book test_exam corpus"
    recipes = {
        "chimed": f"pretrain {evaluation}",  # ChiMed uses its graphs in pretraining alone
        "qizhen": f"question dialogue {evaluation}",
    }.get(recipe, f"pretrain question dialogue exam preference {evaluation}")
    heads = list(source.items)
    evaluated = evaluated_entities(source, args.evaluation)
    chunks = [heads[at : at + 50] for at in range(0, len(heads), 50)]
    num_proc = min(args.num_proc or available_cores(), len(chunks))
    counts: Counter[str] = Counter()
    with tqdm(total=len(heads), desc="synthesis", unit=" entities", disable=None, leave=False) as bar:
        for rows in map_in_order(generated_rows, chunks, num_proc, source, recipes, evaluated):
            for stage, row in rows:
                counts[stage] += 1
                build.write(stage, [row])
            bar.update(50)
    if "question" in recipes:
        for relation, value in source.heads:
            rows = list(synthesis.reverse_rows(relation, value, source))
            counts["sft"] += len(rows)
            build.write("sft", rows)
            if evaluated.issuperset(source.heads[relation, value]):
                build.write("evaluation", fact_items.reverse_items(relation, value, source))

    def share(of: int, part: float) -> int:
        return round(of * part / (1 - part)) if part else 0

    groups = {"pretrain": "AB", "sft": "A"} if reading is source else {"pretrain": "A", "sft": "A"}
    if "pretrain" in recipes:
        number = share(counts["pretrain"], args.reading)
        build.write("pretrain", synthesis.reading_rows(reading, number, "text", groups["pretrain"]))
    if "question" in recipes:
        number = share(counts["sft"], args.reading)
        build.write("sft", synthesis.reading_rows(reading, number, "messages", groups["sft"]))
    if "preference" in recipes:
        build.write(
            "preference", pairs.reading_pair_rows(reading, share(counts["preference"], args.reading), groups["sft"])
        )
    if {"pretrain", "question"} <= set(recipes.split()):
        trained = [head for head in heads if source.groups[head] in "AB"]
        replays = itertools.chain.from_iterable(synthesis.replay_rows(head, source) for head in trained)
        each = max(1, round(args.passes * len(trained) / max(1, share(counts["sft"], args.replay))))
        build.write("sft", itertools.islice(replays, 0, None, each) if args.replay else ())


def outside_rows(
    recipe: str, sources: dict[str, list[Any]], build: Build, seed: int
) -> dict[str, Iterator[dict[str, Any]]]:
    """Rows of the user's own files by stage, as the recipe composes them."""
    from suwen.formats import BadRow
    from suwen.mixing import as_text, read_rows, record_rows, records_of, weighted
    from suwen.pairs import scored_rows

    def rows(kind: str, schema: str, name: str) -> Iterator[dict[str, Any]]:
        for source in sources[kind]:
            yield from weighted(read_rows(source, schema, name, build.refuse), source.weight, seed)

    def texts(kind: str, name: str) -> Iterator[dict[str, Any]]:
        return (as_text(row) | {"recipe": name} for row in rows(kind, "conversation", name))

    def records() -> Iterator[dict[str, Any]]:
        for source in sources["dialogues"]:
            yield from weighted(record_rows(source, build.refuse), source.weight, seed)

    def preferences() -> Iterator[dict[str, Any]]:
        from suwen.formats import canonical_rows

        for source in sources["preference"]:
            for row in scored_rows(records_of(source, build.refuse)):
                try:
                    if isinstance(row, BadRow):
                        raise row
                    (pair,) = canonical_rows(row, "preference", {}, Counter())
                except BadRow as error:
                    build.refuse(str(source.path), error.reason, str(error))
                    continue
                pair |= {"where": row["where"], "recipe": row["recipe"], "facts": []}
                yield from weighted([pair], source.weight, seed)

    text = rows("text", "text", "text")
    stages = {
        "pretrain": text,
        "sft": itertools.chain(
            rows("qa", "conversation", "qa"),
            rows("dialogues", "conversation", "recorded dialogue"),
            rows("general", "conversation", "general"),
            rows("exams", "conversation", "exam"),
        ),
        "preference": preferences(),
    }
    if recipe == "chimed":
        parts = [texts("qa", "qa text"), texts("exams", "exam text"), text, texts("dialogues", "dialogue text")]
        stages["pretrain"] = itertools.chain(*parts)
        stages["sft"] = itertools.chain(
            rows("general", "conversation", "general"),
            rows("exams", "conversation", "exam"),
            rows("dialogues", "conversation", "recorded dialogue"),
        )
    if recipe == "qizhen":
        stages["sft"] = itertools.chain(stages["sft"], records())
    return stages


def stored_rows(folder: Path, stage: str) -> Iterator[dict[str, Any]]:
    """The rows of a stage as they were written."""
    for file in sorted((folder / stage).glob("*.jsonl")):
        with open(file, encoding="utf-8") as stream:
            yield from map(json.loads, stream)


def validate(folder: Path) -> None:
    """Read every file back with the readers that training uses; the first row that they refuse is an error."""
    from suwen.data import load_rows

    for stage, schema in STAGES.items():
        if (folder / stage).is_dir():
            for _ in load_rows(str(folder / stage), schema):
                pass
    corpus = folder / "evaluation" / "passage.jsonl"
    if corpus.is_file():
        for _ in load_rows(str(corpus), "text"):
            pass


def write_exam_table(folder: Path) -> None:
    """The exam items once more as CMExam's CSV."""
    import csv

    source = folder / "evaluation" / "exam.jsonl"
    if not source.is_file():
        return
    with (
        open(source, encoding="utf-8") as stream,
        open(folder / "evaluation" / "exam.csv", "w", encoding="utf-8", newline="") as out,
    ):
        writer = csv.DictWriter(
            out, ("Question", "Options", "Answer", "Explanation", "id", "group"), extrasaction="ignore"
        )
        writer.writeheader()
        writer.writerows(map(json.loads, stream))


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    parsed = build_parser(__doc__ or "", SourceArguments, BuildArguments).parse_args(words)
    given, args = split_dataclasses(parsed, SourceArguments, BuildArguments)
    folder = checked_folder(Path(args.output_dir))
    kinds = ("graph", "text", "qa", "dialogues", "general", "exams", "preference", "tests")

    from suwen.readers import parse_sources

    if given.recipe == "fictional" and given.graph:
        raise ValueError("--graph: the fictional recipe invents its graph, use --recipe graph for one of yours")
    if given.recipe == "graph" and not any(getattr(given, kind) for kind in kinds[:-1]):
        given.graph = str(Path(__file__).resolve().parents[1] / "data" / "kg")
    sources = {kind: parse_sources(getattr(given, kind), f"--{kind}") if getattr(given, kind) else [] for kind in kinds}
    rules, groups = rules_of(args), {name: float(x) for name, x in parse_pairs(args.groups, "groups").items()}
    licences = parse_pairs(given.licences, "licences")

    from suwen.cleaning import CleaningReport, CleaningRules, clean_rows
    from suwen.data_card import cleaning_entry, output_entry, render, source_entry
    from suwen.fact_items import find_leaks
    from suwen.fictional import assign_groups, fictional_graph
    from suwen.knowledge_graph import check_graph, load_graph
    from suwen.mixing import test_questions
    from suwen.near_duplicates import TestItems
    from suwen.parallel import available_cores
    from suwen.records import write_json
    from suwen.synthesis import prepare

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    build = Build(folder, args.on_bad_rows)
    num_proc = args.num_proc or available_cores()

    # Other people's files: cleaned, and free of test items
    tests = test_questions(sources["tests"], build.refuse)
    cleaning_rules = CleaningRules(
        min_chinese=args.min_chinese, max_characters=args.max_characters, personal_data=args.pii
    )
    cleaning = {}
    for stage, rows in outside_rows(given.recipe, sources, build, args.seed).items():
        report = CleaningReport()
        drop = lambda reason, where, stage=stage: build.note(f"cleaning {stage}", where, reason)  # noqa: E731
        build.write(
            stage, clean_rows(rows, cleaning_rules, report, num_proc, TestItems(tests) if tests else None, drop)
        )
        if report.rows_in:
            cleaning[stage] = cleaning_entry(report)

    # The graph
    left_out: Counter[str] = Counter()
    graph = source = None
    if given.recipe == "fictional":
        graph = fictional_graph(args.size, args.seed)
        source = prepare(graph, assign_groups(graph, args.seed, groups or None), rules)
        reading = prepare(fictional_graph(args.size, args.seed, apart_from=graph), None, rules)
    elif sources["graph"]:
        graph, left_out = load_graph([file for source in sources["graph"] for file in source.files])
        reading = source = prepare(graph, assign_groups(graph, args.seed, groups or {"A": 1.0}), rules)
    if source is not None:
        write_generated(build, source, reading, args, given.recipe)
    build.close()
    if not build.files:
        raise ValueError("no row was made: found no usable source, expected --graph, --text, --qa or another one")

    # Checks and the card
    validate(folder)
    write_exam_table(folder)
    leaks: list[str] = []
    if source is not None:
        training = ((stage, row) for stage in STAGES for row in stored_rows(folder, stage))
        items = [row for row in stored_rows(folder, "evaluation") if row["recipe"] != "passage"]
        leaks = list(find_leaks(training, items, source)) if items else []
    card = {
        "recipe": given.recipe,
        "command": "python tools/build_data.py " + " ".join(words),
        "notice": NOTICE,
        "seed": args.seed,
        "sources": [source_entry(kind, s, licences.get(s.path, "")) for kind in kinds for s in sources[kind]],
        "files": [output_entry(build.files[name], folder) for name in sorted(build.files)],
        "cleaning": cleaning,
        "personal_data_mode": {"off": "not looked for", "report": "counted, left in place", "mask": "masked"}[args.pii],
        "refused": dict(sorted(build.refused.items())),
        "leaks": {"count": len(leaks), "first": leaks[:10]},
    }
    if graph is not None:
        problems = sum(1 for _ in check_graph(graph))
        card["graph"] = graph_entry(graph) | {"left_out": dict(sorted(left_out.items())), "problems": problems}
    write_json(folder / "data_card.json", card)
    page = render(card)
    (folder / "data_card.md").write_text(page, encoding="utf-8")
    print(page)


def checked_folder(folder: Path) -> Path:
    """Only a new or empty folder, or one that an earlier build has made, is written to."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir: {folder} is a file, expected a folder")
    if folder.is_dir() and any(folder.iterdir()):
        ours = {"pretrain", "sft", "preference", "evaluation", "data_card.json", "data_card.md", "dropped_rows.jsonl"}
        others = sorted(path.name for path in folder.iterdir() if path.name not in ours)
        if others:
            raise ValueError(
                f"--output_dir: {folder} holds {others[0]}, expected a new folder or one of an earlier build"
            )
    return folder


def rules_of(args: BuildArguments) -> Any:
    from suwen.synthesis import SynthesisRules

    for name in ("size", "passes", "questions", "pairs", "num_proc", "wordings"):
        value = getattr(args, name)
        if value is not None and value < (1 if name in ("size", "passes", "num_proc", "wordings") else 0):
            raise ValueError(f"--{name}: found {value}, expected 1 or more")
    for name in ("reading", "replay"):
        if not 0 <= getattr(args, name) < 1:
            raise ValueError(f"--{name}: found {getattr(args, name)}, expected a share from 0 to below 1")
    return SynthesisRules(
        seed=args.seed,
        passes=args.passes,
        shuffle=args.shuffle,
        max_wordings=args.wordings,
        questions_per_item=args.questions,
        pairs_per_item=args.pairs,
        answer_style=args.answers,
    )


def graph_entry(graph: Any) -> dict[str, Any]:
    facts: Counter[str] = Counter()
    heads: dict[str, set[str]] = {}
    values = graph.values()
    for fact in graph.facts:
        facts[fact.relation] += 1
        heads.setdefault(fact.relation, set()).add(fact.head)
    relations = {
        name: {"facts": count, "entities": len(heads[name]), "values": len(values[name])}
        for name, count in facts.most_common()
    }
    return {"entities": len(graph.entities), "facts": len(graph.facts), "relations": relations}


if __name__ == "__main__":
    run(main)

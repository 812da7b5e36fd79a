"""Medical knowledge to training data: pretraining text, SFT, preference pairs and evaluation, with a data card.

    python tools/build_data.py                                              # the sample graph in data/kg
    python tools/build_data.py --recipe fictional --size 300 --seed 1       # an invented graph: measures injection
    python tools/build_data.py --graph diseases.csv,leaflets.json --text books/ --qa qa.jsonl:0.5 --pii mask
    python tools/build_data.py --recipe chimed --qa Q --exams E --text T --graph G --dialogues D --general N
    python tools/build_data.py --recipe qizhen --graph G --qa Q --dialogues D
    python tools/build_data.py --recipe reading --size 3000                 # questions on given passages alone
    python tools/build_data.py --own_answers answers.jsonl                  # pairs from a model's own wrong answers

Recipes: graph builds all stages from --graph and mixes the other files in; fictional does so from an invented graph,
in groups A (pretraining and SFT), B (pretraining alone), C (retrieval corpus alone); chimed composes the stages as
Qilin-Med's ChiMed does (QA, exams, text, graphs and dialogues in pretraining; general data, exams and dialogues in
SFT); qizhen makes QiZhen's families of instructions (real QA, drugs, diseases, records from dialogues); reading makes
SFT rows whose answers stand in the passages before them, on invented entities that no fictional graph has.
data/README.md describes the files that come out.
"""

import functools
import math
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from suwen.command_line import build_parser, flag, make_folder, run, split_dataclasses
from suwen.retrieval.settings import RetrievalSettings

NOTICE = "Sample data for research. No medical advice."
KINDS = ("graph", "text", "qa", "dialogues", "general", "exams", "preference", "own_answers", "tests")
MATERIAL = KINDS[:-2]  # what training rows can be made of
READING_ENTITIES = 20  # in the graph of the reading examples, for each one in the fictional graph
READING_ROWS = 4  # of --recipe reading, for each entity
STAGES = ("pretrain", "sft", "preference", "evaluation")
OURS = {*STAGES, "knowledge", "data_card.json", "data_card.md", "dropped_rows.jsonl"}


@dataclass
class SourceArguments:
    recipe: Literal["graph", "fictional", "chimed", "qizhen", "reading"] = flag(
        "graph", "what is made of the sources, see above"
    )
    graph: str = flag("", "triples, node and edge tables, disease tables, leaflets (data/kg where no source is given)")
    text: str = flag("", "books and guidelines (.txt, .md, .pdf, .docx), and tables or lines of documents")
    qa: str = flag("", "questions and answers")
    dialogues: str = flag("", "dialogues of patients and doctors")
    general: str = flag("", "general instructions and safety prompts")
    exams: str = flag("", "exam questions in CMExam's form, or as conversations")
    preference: str = flag("", "preference pairs, or prompts with responses and scores")
    own_answers: str = flag(
        "", "a model's answers to this build's sft/question.jsonl (inference.py --with_prompt): wrong ones make pairs"
    )
    tests: str = flag("", "test files whose questions must not be in any training row, of files or of the graph")
    licences: str = flag("", "PATH=LICENCE,...: for the data card, where no licence file lies beside the data")


@dataclass
class BuildArguments:
    output_dir: str = flag("outputs/data", "a new folder, or one of an earlier build, which is replaced")
    size: int = flag(75, "diseases of the fictional graph")
    groups: str = flag("", "shares of the entities, e.g. A:0.4,B:0.4,C:0.2 (the fictional graph's; else all in A)")
    passes: int = flag(8, "articles of each entity: so often is each fact met in pretraining")
    wordings: int | None = flag(None, "statements of each relation at most (all)")
    shuffle: bool = flag(True, "facts of an article in a new order each time")
    questions: int = flag(6, "questions for each relation of an entity, at most")
    pairs: int = flag(2, "preference pairs for each relation of an entity")
    pair_wordings: int = flag(0, "question wordings of each relation that pairs alone have, as users ask in new ways")
    evaluation: int = flag(300, "entities of each group that evaluation items are made of, at most; the corpus has all")
    reading: float = flag(0.2, "share of reading examples in SFT and pairs")
    reading_text: float | None = flag(None, "share of reading examples in pretraining (as --reading)")
    passages: int = flag(RetrievalSettings.num_passages, "of a question with retrieval; of a reading example, at most")
    replay: float = flag(0.1, "share of pretraining text replayed in SFT")
    answers: Literal["sentence", "value"] = flag("sentence", "answers as sentences, or the bare values")
    pii: Literal["off", "report", "mask"] = flag("report", "personal data: count it, or replace it too")
    min_chinese: float = flag(0.3, "share of Chinese among the letters of a row of other sources")
    max_characters: int = flag(4000, "longer documents are split between sentences")
    on_bad_rows: Literal["error", "skip"] = flag("skip", "count bad rows and go on, or stop at the first one")
    seed: int = flag(42, "seed of everything that is drawn")
    num_proc: int | None = flag(None, "worker processes (all cores); the result does not depend on it")


def check(given: SourceArguments, args: BuildArguments) -> None:
    """Refuse what cannot work, before anything is read or removed."""
    for name, least in (
        ("size", 1),
        ("passes", 1),
        ("wordings", 1),
        ("num_proc", 1),
        ("questions", 0),
        ("pairs", 0),
        ("passages", 1),
        ("pair_wordings", 0),
    ):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name}: found {value}, expected {least} or more")
    if args.reading_text is None:
        args.reading_text = args.reading
    for name in ("reading", "reading_text", "replay"):
        if not 0 <= getattr(args, name) < 1:
            raise ValueError(f"--{name}: found {getattr(args, name)}, expected a share from 0 to below 1")
    if given.recipe in ("fictional", "reading") and given.graph:
        raise ValueError(f"--graph: the {given.recipe} recipe invents its graph, use --recipe graph for one of yours")
    if given.recipe in ("chimed", "qizhen") and not any(getattr(given, kind) for kind in MATERIAL):
        raise ValueError(f"--recipe {given.recipe}: no source given, expected --graph, --qa, --text or another one")
    has_graph = given.recipe == "fictional" or given.graph or not any(getattr(given, kind) for kind in MATERIAL)
    if given.own_answers and (given.recipe in ("chimed", "reading") or not has_graph):
        raise ValueError("--own_answers: no question on a graph is asked, expected --graph, or --recipe fictional")
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir: {folder} is a file, expected a folder")
    others = sorted(path.name for path in folder.iterdir() if path.name not in OURS) if folder.is_dir() else []
    if others:
        raise ValueError(f"--output_dir: {folder} holds {others[0]}, expected a new folder or one of an earlier build")


def check_sources(sources: dict[str, list[Any]], licences: dict[str, str]) -> None:
    """Refuse what would be ignored: weights where nothing is drawn, licences of what is no source."""
    for kind in ("graph", "own_answers", "tests"):
        if weighted := next((source for source in sources[kind] if source.weight != 1), None):
            raise ValueError(
                f"--{kind}: {weighted.path} has the weight {weighted.weight:g}, expected none: all is used"
            )
    paths = [source.path for found in sources.values() for source in found]
    if unknown := next((path for path in licences if path not in paths), None):
        raise ValueError(f"--licences: {unknown} is no source, expected one of {', '.join(paths) or 'none given'}")


def parse_pairs(text: str, name: str, example: str) -> dict[str, str]:
    """ "a=b,c=d" or "a:b,c:d" as a dict."""
    parts = [part.partition("=") if "=" in part else part.rpartition(":") for part in text.split(",") if part]
    pairs = [(key, value) for key, _, value in parts]
    if any(not key.strip() or not value.strip() for key, value in pairs):
        raise ValueError(f"--{name}: found {text!r}, expected {example}")
    return {key.strip(): value.strip() for key, value in pairs}


def parse_groups(text: str) -> dict[str, float]:
    example = "shares of A, B and C that sum to 1, such as A:0.4,B:0.4,C:0.2"
    pairs = parse_pairs(text, "groups", example)
    try:
        shares = {name: float(value) for name, value in pairs.items()}
    except ValueError:
        shares = {}
    if text and not (
        shares.keys() <= set("ABC") and min(shares.values(), default=-1) >= 0 and math.isclose(sum(shares.values()), 1)
    ):
        raise ValueError(f"--groups: found {text!r}, expected {example}")
    return shares


def graph_entry(
    graph: Any, left_out: Counter[str], told: Counter[str], unasked: Counter[str], personal: Counter[str]
) -> dict[str, Any]:
    """The graph's part of the data card.

    Args:
        told: rows of training by relation.
        unasked: facts that no evaluation item asks, by reason.
        personal: personal data in rows made of the graph, by kind.
    """
    from suwen.knowledge_graph import check_graph

    heads: dict[str, set[str]] = {}
    for fact in graph.facts:
        heads.setdefault(fact.relation, set()).add(fact.head)
    values = graph.values()
    facts = Counter(fact.relation for fact in graph.facts)
    return {
        "entities": len({fact.head for fact in graph.facts}),
        "facts": len(graph.facts),
        "relations": {
            name: {"facts": count, "entities": len(heads[name]), "values": len(values[name]), "rows": told[name]}
            for name, count in facts.most_common()
        },
        "left_out": dict(sorted(left_out.items())),
        "not_evaluated": dict(sorted(unasked.items())),
        "personal_data": dict(sorted(personal.items())),
        "problems": sum(1 for _ in check_graph(graph)),
    }


def prepare_graph(
    given: SourceArguments, args: BuildArguments, sources: list[Any], shares: dict[str, float]
) -> tuple[Any, Any, Any, Counter[str], list[tuple[str, str, Any]]]:
    """The graph, its source and that of the reading examples (None without a graph), what reading left out, and the
    rows that it refused, as (where, reason, row)."""
    from suwen.fictional import assign_groups, fictional_graph
    from suwen.graph_readers import load_graph
    from suwen.synthesis import SynthesisRules, prepare

    rules = SynthesisRules(
        seed=args.seed,
        passes=args.passes,
        shuffle=args.shuffle,
        max_wordings=args.wordings,
        questions_per_item=args.questions,
        pairs_per_item=args.pairs,
        pair_wordings=args.pair_wordings,
        answer_style=args.answers,
        num_passages=args.passages,
    )
    if given.recipe == "fictional":
        graph = fictional_graph(args.size, args.seed)
        source = prepare(graph, assign_groups(graph, args.seed, shares or None), rules)
        # so many entities that their facts are not met often enough to be learnt by heart
        other = fictional_graph(READING_ENTITIES * args.size, args.seed, reading=True, values_of=graph)
        return graph, source, prepare(other, None, rules), Counter(), []
    if given.recipe == "reading":
        graph = fictional_graph(args.size, args.seed, reading=True)
        source = prepare(graph, None, rules)
        return graph, source, source, Counter(), []
    if not sources:
        return None, None, None, Counter(), []
    refused: list[tuple[str, str, Any]] = []
    refuse = None if args.on_bad_rows == "error" else lambda *bad: refused.append(bad)
    graph, left_out = load_graph((file for entry in sources for file in entry.files), refuse)
    source = prepare(graph, assign_groups(graph, args.seed, shares or {"A": 1.0}), rules)
    if cut := sum(len(item.values) - rules.max_values for item in source.whole.values()):
        left_out[f"values after the first {rules.max_values} of a list, told in texts and asked in no question"] += cut
    return graph, source, source, left_out, refused


def empty(folder: Path) -> None:
    """Make the folder, without what an earlier build has left in it."""
    make_folder(folder)
    for path in (folder / name for name in OURS):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def add_files(
    out: Any, recipe: str, args: BuildArguments, sources: dict[str, list[Any]], tests: Any, num_proc: int
) -> dict[str, Any]:
    """Write other people's files, cleaned and free of test items; the cleaning's part of the data card."""
    from suwen.cleaning import CleaningReport, CleaningRules, clean_rows
    from suwen.composition import file_rows
    from suwen.data_card import cleaning_entry

    rules = CleaningRules(min_chinese=args.min_chinese, max_characters=args.max_characters, personal_data=args.pii)
    entries = {}
    for stage, rows in file_rows(recipe, sources, out.refuse, args.seed).items():
        report = CleaningReport()
        on_drop = functools.partial(out.note, f"cleaning of {stage}")
        for row in clean_rows(rows, rules, report, num_proc, tests, on_drop):
            out.write(stage, row)
        if report.rows_in:
            entries[stage] = cleaning_entry(report)
    return entries


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    parsed = build_parser(__doc__ or "", SourceArguments, BuildArguments).parse_args(words)
    given, args = split_dataclasses(parsed, SourceArguments, BuildArguments)
    check(given, args)
    shares_of_groups = parse_groups(args.groups)
    licences = parse_pairs(given.licences, "licences", "pairs such as data/books=CC0")

    from suwen.composition import (
        PARTS,
        Shares,
        given_answers,
        graph_rows,
        look_for_personal_data,
        with_own_answers,
        without_tests,
    )
    from suwen.data_card import output_entry, render, source_entry
    from suwen.data_folder import SCHEMAS, DataFolder, stored_rows, validate, write_exam_table, write_retrieved
    from suwen.fact_items import find_leaks, not_evaluated
    from suwen.mixing import test_questions
    from suwen.near_duplicates import TestItems
    from suwen.parallel import available_cores
    from suwen.readers import SUFFIXES, parse_sources
    from suwen.records import write_json
    from suwen.retrieval.documents import DOCUMENT_SUFFIXES
    from suwen.synthesis import reading_rows

    if given.recipe == "graph" and not any(getattr(given, kind) for kind in MATERIAL):
        given.graph = str(Path(__file__).resolve().parents[1] / "data" / "kg")
    paths = {kind: getattr(given, kind) for kind in KINDS}
    kinds = {"text": DOCUMENT_SUFFIXES}  # books come as PDF, DOCX and Markdown, too
    sources = {
        kind: parse_sources(path, f"--{kind}", kinds.get(kind, SUFFIXES)) if path else []
        for kind, path in paths.items()
    }
    check_sources(sources, licences)
    num_proc = args.num_proc or available_cores()

    # The graph first, before an earlier build is removed: its files may be bad
    graph, source, reading, left_out, refused = prepare_graph(given, args, sources["graph"], shares_of_groups)
    folder = Path(args.output_dir)
    empty(folder)
    personal: Counter[str] = Counter()
    with DataFolder(folder, args.on_bad_rows) as out:
        for bad in refused:
            out.refuse(*bad)
        questions = test_questions(sources["tests"], out.refuse)
        tests = TestItems(questions) if questions else None
        cleaning = add_files(out, given.recipe, args, sources, tests, num_proc)
        if source is not None:
            shares = Shares(args.reading, args.reading_text or 0, args.replay, args.evaluation)
            rows: Iterable[tuple[str, Any]]
            if given.recipe == "reading":
                rows = (("sft", row) for row in reading_rows(source, READING_ROWS * args.size, "messages"))
            else:
                rows = graph_rows(source, reading, PARTS[given.recipe], shares, num_proc)
            if given.own_answers:
                rows = with_own_answers(rows, given_answers(sources["own_answers"], out.refuse), source, out.refuse)
            if args.pii != "off":
                rows = look_for_personal_data(rows, args.pii == "mask", personal)
            if tests is not None:
                rows = without_tests(rows, tests, out.leave_out)
            for stage, row in rows:
                out.write(stage, row)
    if not out.files:
        names = ", ".join(filter(None, paths.values()))
        raise ValueError(f"no row was made of {names}; the reasons are in {folder}/dropped_rows.jsonl")

    # The questions with what retrieval finds for them; checks, and the card
    found = {}
    if "evaluation/recall" in out.files:
        retrieved = out.files["evaluation/retrieved"] = write_retrieved(folder, args.passages)
        found = {"passages": args.passages, "questions": retrieved.rows, "right_passage_found": retrieved.found}
    validate(folder)
    write_exam_table(folder)
    leaks: list[Any] = []
    told: Counter[str] = Counter()
    unasked: Counter[str] = Counter()
    if source is not None:
        relations = {fact.id: fact.relation for fact in graph.facts}

        def count(row: dict[str, Any]) -> dict[str, Any]:
            told.update({relations[fact] for fact in row["facts"] if fact in relations})
            return row

        training = ((stage, count(row)) for stage in SCHEMAS for row in stored_rows(folder, stage))
        items = [row for row in stored_rows(folder, "evaluation") if row["recipe"] != "passage"]
        leaks = list(find_leaks(training, items, source, reading))
        if items:  # --recipe reading asks nothing at all
            unasked = not_evaluated(source, {fact for item in items for fact in item["facts"]})
    card = {
        "recipe": given.recipe,
        "command": shlex.join(["python", "tools/build_data.py", *words]),
        "notice": NOTICE,
        "seed": args.seed,
        "sources": [source_entry(kind, s, licences.get(s.path, "")) for kind in KINDS for s in sources[kind]],
        "files": [output_entry(out.files[name], folder) for name in sorted(out.files)],
        "cleaning": cleaning,
        "personal_data_mode": {"off": "not looked for", "report": "counted, left in place", "mask": "masked"}[args.pii],
        "refused": dict(sorted(out.refused.items())),
        "left_out": dict(sorted(out.left_out.items())),
        "retrieval": found,
        "leaks": {
            "count": len(leaks),
            "generated": sum(leak.generated for leak in leaks),
            "first": [str(leak) for leak in leaks[:10]],
        },
    }
    if graph is not None:
        card["graph"] = graph_entry(graph, left_out, told, unasked, personal)
    write_json(folder / "data_card.json", card)
    page = render(card)
    (folder / "data_card.md").write_text(page, encoding="utf-8")
    print(page)
    if given_away := [leak for leak in leaks if leak.generated]:
        raise ValueError(
            f"{folder}: {len(given_away)} rows made of the graph give away what is evaluated, such as {given_away[0]}; "
            "expected none: the scores of the evaluation files would be too high"
        )
    if leaks:
        line = f"{len(leaks)} rows of other files hold an evaluation question, such as {leaks[0]}"
        print(f"warning: {line}", file=sys.stderr)


if __name__ == "__main__":
    run(main)

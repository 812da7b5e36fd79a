"""What a knowledge base is worth, as people read it: a table in the terminal, and one page that needs no network."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from suwen.plots import Point, score_plot
from suwen.report import clip, folded, html_table, interval, p_value, score_cell, tag, told, write_page
from suwen.tables import table

SHOWN_ITEMS = 12
NO_ANSWERS = "no question brings an answer: only retrieval is scored"
Record = dict[str, Any]


def format_retrieval(results: dict[str, Any]) -> str:
    found = results["retrieval"]
    ranks = {name: score for name, score in found.items() if isinstance(score, dict)}
    rows = [["", "%", "95 % interval"]]
    rows += [[name, f"{score['value']:.1f}", interval(score)] for name, score in ranks.items()]
    lines = [f"retrieval of {number_of(results['n'])}", table(rows), f"MRR {found['MRR']:.3f}"]
    if found["given nothing"]:
        lines.append(f"nothing relevant enough for {number_of(found['given nothing'])}: no answer")
    if not results["compared"]:
        return "\n".join([*lines, NO_ANSWERS])
    rows = [["answers", "right %", "95 % interval", "answer in passages %", "citations that hold", "not asked"]]
    for condition, scores in results["answers"].items():
        right, within, citations = (scores[name] for name in ("accuracy", "answer in passages", "citation precision"))
        hold = f"{citations['value']:.1f} % of {citations['n']}" if citations["n"] else "none cited"
        inside = "" if condition == "closed book" else f"{within['value']:.1f}"
        rows.append([condition, f"{right['value']:.1f}", interval(right), inside, hold, str(scores["not asked"])])
    lines += ["", table(rows)]
    rows = [["", "difference", "interval", "p (Holm)", ""]]
    for row in results["compared"]:
        name = f"{row['first']} -> {row['second']}"
        rows.append([name, f"{row['difference']:+.1f}", interval(row), p_value(row["p_holm"]), row["verdict"]])
    lines += ["", table(rows)]
    return "\n".join(lines)


def write_retrieval_report(
    path: Path, results: dict[str, Any], records: Sequence[Record], identity: dict[str, Any]
) -> None:
    """One page: what was found, what the answers gain from it, and the questions where it went wrong."""
    found = results["retrieval"]
    parts = [tag("h1", "Retrieval evaluation"), tag("p", number_of(results["n"]), class_="soft")]
    parts.append(tag("h2", "Is the right document found?"))
    ranks = {name: score for name, score in found.items() if isinstance(score, dict)}
    points = [Point(name, 0, score["value"], score["low"], score["high"]) for name, score in ranks.items()]
    parts.append(score_plot(points, {}, "questions whose document is among the first passages, %"))
    nothing = f"; nothing relevant enough, and so no answer, for {number_of(found['given nothing'])}"
    note = f"mean reciprocal rank {found['MRR']:.3f}{nothing if found['given nothing'] else ''}"
    parts.append(tag("p", note, class_="soft"))
    parts += _answers(results) if results["compared"] else [tag("p", NO_ANSWERS, class_="soft")]
    parts += [tag("h2", "Questions"), *_questions(records, max(int(name.removeprefix("recall@")) for name in ranks))]
    parts.append(folded("what answered", tag("pre", html.escape(json.dumps(identity, ensure_ascii=False, indent=1)))))
    write_page(path, "Retrieval evaluation", parts)


def _answers(results: dict[str, Any]) -> list[str]:
    """How often the answers are right in each condition, and what passages change."""
    parts = [tag("h2", "Are the answers right?")]
    points = [
        Point(condition, i, scores["accuracy"]["value"], scores["accuracy"]["low"], scores["accuracy"]["high"])
        for i, (condition, scores) in enumerate(results["answers"].items())
    ]
    parts.append(score_plot(points, {}, "right answers, %"))
    rows = []
    for condition, scores in results["answers"].items():
        within, citations = scores["answer in passages"], scores["citation precision"]
        hold = score_cell(citations, "%") if citations["n"] else "none cited"
        inside = "" if condition == "closed book" else score_cell(within, "%")
        right = score_cell(scores["accuracy"], "%")
        rows.append([condition, right, inside, hold, f"{citations['n']:,}", f"{scores['not asked']:,}"])
    header = ["", "right", "answer in passages", "citations that hold", "citations", "not asked"]
    parts.append(html_table(header, rows))
    note = (
        "An answer is right that names one of the accepted wordings. “Answer in passages”: for so many questions one "
        "of the passages does, which is as far as reading can get. A citation holds that names a passage of the right "
        "document and is borne out by it. Gold: a passage of the right document; wrong: the best one of another. A "
        "question that was not asked, as nothing relevant was found, counts as not right."
    )
    parts.append(tag("p", note, class_="soft"))
    rows = []
    for row in results["compared"]:
        difference = f"{row['difference']:+.2f}" + tag("div", interval(row), class_="interval")
        changed = f"{row['gained']} gained, {row['lost']} lost"
        name = f"{html.escape(row['first'])} → {html.escape(row['second'])}"
        rows.append(
            [name, difference, changed, p_value(row["p_holm"]), tag("span", row["verdict"], class_=row["verdict"])]
        )
    parts.append(html_table(["", "difference", "questions", "p (Holm)", "verdict"], rows))
    parts.append(tag("p", "Same questions, exact McNemar test with Holm's correction.", class_="soft"))
    return parts


def _questions(records: Sequence[Record], depth: int) -> list[str]:
    """The questions in which something went wrong, by what did."""

    def right(record: Record, condition: str) -> bool:
        return bool(record.get(condition, {}).get("correct"))

    kinds: dict[str, Callable[[Record], bool]] = {
        f"document not among the first {depth} passages": lambda r: r["rank"] is None or r["rank"] > depth,
        "right from the gold passage, wrong from what was found": lambda r: (
            right(r, "gold passage") and not right(r, "retrieved")
        ),
        "right closed book, wrong with passages": lambda r: right(r, "closed book") and not right(r, "retrieved"),
        "wrong from the gold passage": lambda r: "gold passage" in r and not right(r, "gold passage"),
    }
    parts = []
    for title, belongs in kinds.items():
        chosen = [record for record in records if belongs(record)]
        rows = [
            [
                html.escape(clip(record["question"])),
                told(record["answers"]),
                html.escape(record["document"]),
                str(record["rank"] or "-"),
                *(
                    told(record.get(name, {}).get("response", ""))
                    for name in ("closed book", "retrieved", "gold passage")
                ),
            ]
            for record in chosen[:SHOWN_ITEMS]
        ]
        header = ["question", "accepted", "document", "rank", "closed book", "retrieved", "gold passage"]
        shown = f", the first {SHOWN_ITEMS}" if len(chosen) > SHOWN_ITEMS else ""
        if rows:
            content = html_table(header, rows, [0, 1, 2, 4, 5, 6])
            parts.append(folded(f"{title}: {number_of(len(chosen))}{shown}", content))
    return parts or [tag("p", "Nothing went wrong.", class_="soft")]


def number_of(count: int) -> str:
    return f"{count:,} question" + ("s" if count != 1 else "")

"""Results as people read them: tables in the terminal, and one page that needs no network."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from suwen.benchmarks.task import TOO_LONG
from suwen.plots import COLOURS, Point, score_plot
from suwen.runs import Run
from suwen.tables import table

WORST_ITEMS = 12
SHOWN_PUBLISHED = 4
SMALL_CELL = 30  # items below which a rate of the breakdown is shown in grey
SHOWN_CELLS = 12  # of an annotation, the largest
# Scores that are worth a line of the terminal beside the headline
ALSO_SHOWN = {
    "accuracy, several right letters", "weighted F1", "unparsed", "BLEU-1", "BLEU-4", "ROUGE-1", "ROUGE-2",
    "Distinct-2", "criterion 1 (one term)", "criterion 2 (half)", "criterion 3 (two thirds)",
    "named among wrong ones", "wrong answers", "perplexity per character",
}  # fmt: skip
STYLE = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------ numbers


def number(value: float, unit: str = "") -> str:
    return f"{value:.2f}{unit}" if abs(value) < 1000 else f"{value:,.0f}{unit}"


def interval(score: dict[str, Any]) -> str:
    return f"{number(score['low'])} to {number(score['high'])}" if "low" in score else ""


def p_value(p: float) -> str:
    return "<0.0001" if p < 0.0001 else f"{p:.4f}"


def pace(entry: dict[str, Any], mode: str) -> str:
    """Seconds that a thousand items took, of those that were asked when last there was something to ask."""
    timing = entry["data"].get("timing", {}).get(mode)
    return f"{1000 * timing['seconds'] / timing['answered']:.1f}" if timing else ""


def unfinished(results: dict[str, Any], entry: dict[str, Any]) -> list[str]:
    """A line for each mode whose asking was cut off: only one that is whole has its time in the header."""
    cut = [mode for mode in entry["modes"] if results["run"] and mode not in entry["data"].get("timing", {})]
    return [
        f"{mode}: cut off after {entry['modes'][mode]['n']:,} items; its command goes on from there" for mode in cut
    ]


def unit_of(metric: str) -> str:
    return "bits" if metric.startswith("bits") else "" if metric.startswith("perplexity") else "%"


# ----------------------------------------------------------------------------------------------------------- terminal


def format_results(results: dict[str, Any]) -> str:
    """The scores of one model for the terminal."""
    rows = [["task", "mode", "score", "value", "95 % interval", "items", "s for 1,000"]]
    notes = []
    for name, entry in results["tasks"].items():
        for mode, summary in entry["modes"].items():
            headline = {entry["headline"]: summary["metrics"][entry["headline"]]}
            for metric, score in (headline | summary["metrics"]).items():
                if metric != entry["headline"] and metric not in ALSO_SHOWN:
                    continue
                first = metric == entry["headline"]
                shown = number(score["value"], " %" if unit_of(metric) == "%" else "")
                label = (name, mode) if first else ("", "")
                rows.append(
                    [
                        *label,
                        metric,
                        shown,
                        interval(score),
                        f"{summary['n']:,}" if first else "",
                        pace(entry, mode) if first else "",
                    ]
                )
        for mode, summary in entry["modes"].items():
            shown_scores = {m: s for m, s in summary["metrics"].items() if m in {*ALSO_SHOWN, entry["headline"]}}
            signatures = [score["signature"] for score in shown_scores.values() if "signature" in score]
            notes += [f"{name}: {' '.join(signatures)}"] if signatures else []
            if summary.get("too_long"):
                notes.append(f"{name}, {mode}: {summary['too_long']:,} items {TOO_LONG}, counted as wrong")
        notes += [f"{name}, {part}" for part in unfinished(results, entry)]
        floors = next(iter(entry["modes"].values())).get("floors", {})
        if floors:
            notes.append(f"{name}: " + ", ".join(f"{floor} {value:.1f} %" for floor, value in floors.items()))
        if published := [row for row in entry.get("published", ()) if entry["headline"] in row["scores"]]:
            known = [f"{row['system']} {row['scores'][entry['headline']]:.1f}" for row in published[:SHOWN_PUBLISHED]]
            notes.append(f"{name}: published under other protocols: {', '.join(known)} (all in report.html)")
        if disagreement := entry.get("disagreement"):
            share = 100 * disagreement["differ"] / max(disagreement["n"], 1)
            notes.append(f"{name}: the two modes differ in {share:.1f} % of the items ({disagreement['of']})")
        if entry["data"].get("refused"):
            notes.append(f"{name}: {entry['data']['refused']} rows refused, see run.json")
    return "\n".join([f"model: {results['name']}", table(rows, left=3), *notes])


def format_overview(comparison: dict[str, Any]) -> str:
    """A column for each model: the headline of each task, + or - where it is better or worse than the one before."""
    results = comparison["results"]
    verdicts = {
        (pair["second"], row["task"], row["mode"]): {"better": " +", "worse": " -"}.get(row.get("verdict", ""), "  ")
        for pair in comparison["pairs"][: len(results) - 1]
        for row in pair["rows"]
    }
    rows = [["task", "mode", "score", *(f"{result['name']}  " for result in results)]]
    for name, entry, mode in tasks_and_modes(results):
        cells = []
        for result in results:
            summary = result["tasks"].get(name, {}).get("modes", {}).get(mode)
            shown = number(summary["metrics"][entry["headline"]]["value"]) if summary else "-"
            cells.append(shown + verdicts.get((result["name"], name, mode), "  "))
        rows.append([name, mode, entry["headline"], *cells])
    notes = ["+ better, - worse than the column before: same items, p < 0.05 after Holm's correction"]
    for name, _, mode in tasks_and_modes(results):
        counts = item_counts(results, name, mode)
        if len(set(counts)) > 1:
            notes.append(f"{name}, {mode}: " + ", ".join(f"{count:,}" for count in counts) + " items")
    return "\n".join([table(rows, left=3), *notes])


def item_counts(results: Sequence[dict[str, Any]], task: str, mode: str) -> list[int]:
    """Of how many items each score of a row is, of the results that have it."""
    having = [result["tasks"].get(task, {}).get("modes", {}) for result in results]
    return [modes[mode]["n"] for modes in having if mode in modes]


def format_comparison(comparison: dict[str, Any]) -> str:
    """Stages against each other for the terminal."""
    overview = f"{format_overview(comparison)}\n\n" if len(comparison.get("results", ())) > 1 else ""
    return overview + format_pairs(comparison["pairs"])


def format_pairs(pairs: Sequence[dict[str, Any]]) -> str:
    lines = []
    for pair in pairs:
        if not pair["rows"]:
            lines += [f"{pair['first']} -> {pair['second']}: no task in common", ""]
            continue
        rows = [["task", "mode", "score", pair["first"], pair["second"], "difference", "interval", "p (Holm)", ""]]
        for row in pair["rows"]:
            if "problem" in row:
                rows.append([row["task"], row["mode"], row["metric"], "", "", row["problem"], "", "", "not compared"])
                continue
            rows.append([
                row["task"], row["mode"], row["metric"], number(row["first"]), number(row["second"]),
                f"{row['difference']:+.2f}", interval(row), p_value(row["p_holm"]), row["verdict"],
            ])  # fmt: skip
        lines += [f"{pair['first']} -> {pair['second']}", table(rows, left=3)]
        unpaired = sum(row.get("unpaired", 0) for row in pair["rows"])
        lines += [f"{unpaired:,} items are in one of the two only and left out"] if unpaired else []
        lines.append("")
    return "\n".join(lines).rstrip()


# --------------------------------------------------------------------------------------------------------------- page


def tag(name: str, content: str, **attributes: str) -> str:
    given = "".join(f' {key.rstrip("_")}="{html.escape(value)}"' for key, value in attributes.items() if value)
    return f"<{name}{given}>{content}</{name}>"


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: Sequence[int] = ()) -> str:
    """Cells are HTML already."""

    def cells(kind: str, row: Sequence[str]) -> str:
        return "".join(tag(kind, cell, class_="text" if i in text_columns else "") for i, cell in enumerate(row))

    body = "".join(tag("tr", cells("td", row)) for row in rows)
    head = tag("thead", tag("tr", cells("th", [html.escape(cell) for cell in header])))
    return tag("div", tag("table", head + tag("tbody", body)), class_="wide")


def score_cell(score: dict[str, Any] | None, unit: str = "") -> str:
    if score is None:
        return ""
    shown = html.escape(number(score["value"], f" {unit}" if unit == "%" else ""))
    span = tag("div", html.escape(interval(score)), class_="interval") if "low" in score else ""
    return shown + span


def folded(title: str, content: str) -> str:
    return tag("details", tag("summary", html.escape(title)) + content)


def clip(text: str, length: int = 240) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def overview(results: Sequence[dict[str, Any]]) -> str:
    rows = []
    for name, entry, mode in tasks_and_modes(results):
        headline = entry["headline"]
        cells = []
        for result in results:
            summary = result["tasks"].get(name, {}).get("modes", {}).get(mode)
            cells.append(score_cell(summary["metrics"][headline] if summary else None, unit_of(headline)))
        summary = entry["modes"][mode]
        floors = summary.get("floors", {})
        floor = max(floors, key=lambda key: floors[key]) if floors else ""
        counts = dict.fromkeys(f"{n:,}" for n in item_counts(results, name, mode))
        lowest = f"{floors[floor]:.2f} %" + tag("div", html.escape(floor), class_="interval") if floor else ""
        title = html.escape(entry["title"]) + tag("div", html.escape(f"{mode}, {headline}"), class_="interval")
        rows.append([tag("a", title, href=f"#{name}"), *cells, lowest, " / ".join(counts)])
    return html_table(["task", *(result["name"] for result in results), "without knowledge", "items"], rows)


def metric_name(metric: str, summaries: Sequence[dict[str, Any] | None]) -> str:
    """A score's name, with its signature below where it has one."""
    scores = [summary["metrics"][metric] for summary in summaries if summary and metric in summary["metrics"]]
    signature = scores[0].get("signature", "")
    return html.escape(metric) + (tag("div", html.escape(signature), class_="interval") if signature else "")


def tasks_and_modes(results: Sequence[dict[str, Any]]) -> list[tuple[str, dict[str, Any], str]]:
    """Each task and mode that any of the results has, with the entry of the last one that has it."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for result in results:
        for name, entry in result["tasks"].items():
            found |= {(name, mode): entry for mode in entry["modes"]}
    return [(name, entry, mode) for (name, mode), entry in found.items()]


def comparison_section(comparison: dict[str, Any]) -> str:
    parts = []
    for pair in comparison["pairs"]:
        rows = []
        for row in pair["rows"]:
            name = html.escape(row["task"]) + tag(
                "div", html.escape(f"{row['mode']}, {row['metric']}"), class_="interval"
            )
            if "problem" in row:
                rows.append([name, "", "", "", "", "", f"not compared: {html.escape(row['problem'])}"])
                continue
            changed = f"{row['gained']} gained, {row['lost']} lost" if "gained" in row else row["test"]
            note = (
                f"shows {row['smallest']:.1f} points or more" if row["verdict"] == "same" and "smallest" in row else ""
            )
            rows.append([
                name, number(row["first"]), number(row["second"]),
                f"{row['difference']:+.2f}" + tag("div", interval(row), class_="interval"),
                html.escape(changed), p_value(row["p_holm"]),
                tag("span", row["verdict"], class_=row["verdict"]) + tag("div", note, class_="interval"),
            ])  # fmt: skip
        parts.append(tag("h3", f"{html.escape(pair['first'])} → {html.escape(pair['second'])}"))
        if not rows:
            parts.append(tag("p", "no task in common", class_="soft"))
            continue
        header = ["task", pair["first"], pair["second"], "difference", "items", "p (Holm)", "verdict"]
        parts.append(html_table(header, rows))
    note = (
        "Same items, exact McNemar test or paired bootstrap, p-values with Holm's correction over the rows of a table. "
        "“same” means that no difference was shown; beside it the smallest one that a set of this size shows with 80 % "
        "power, if a fifth of the items change sides."
    )
    return "".join(parts) + tag("p", note, class_="soft")


def task_section(name: str, runs: Sequence[Run], results: Sequence[dict[str, Any]]) -> str:
    having = [(run, r["tasks"][name]) for run, r in zip(runs, results, strict=True) if name in r["tasks"]]
    entry = having[-1][1]
    parts = [tag("h2", html.escape(entry["title"]), id=name)]
    cut = [f"{run.name}, {line}" for run, e in having for line in unfinished({"run": run.header}, e)]
    notes = [*cut, *entry["data"].get("notes", []), f"{name} v{entry['version']}; {entry['source']}"]
    parts.append(tag("p", html.escape("; ".join(notes)), class_="soft"))
    modes = list(dict.fromkeys(mode for _, e in having for mode in e["modes"]))
    points = [
        Point(f"{run.name}, {mode}", i, score["value"], score.get("low"), score.get("high"))
        for mode in modes for i, (run, e) in enumerate(having) if mode in e["modes"]
        for score in [e["modes"][mode]["metrics"][e["headline"]]]
    ]  # fmt: skip
    floors = entry["modes"][modes[0]].get("floors", {})
    parts.append(score_plot(points, floors, ", ".join(filter(None, [entry["headline"], unit_of(entry["headline"])]))))
    for mode in modes:
        summaries = [e["modes"].get(mode) for _, e in having]
        metrics = list(dict.fromkeys(metric for s in summaries if s for metric in s["metrics"]))
        rows = [
            [
                metric_name(metric, summaries),
                *(score_cell(s["metrics"].get(metric), unit_of(metric)) if s else "" for s in summaries),
            ]
            for metric in metrics
        ]
        reasons = [s.get("reasons", {}) if s else {} for s in summaries]
        for reason in dict.fromkeys(reason for counts in reasons for reason in counts):
            rows.append(
                [f"answers read as {html.escape(reason)}", *(f"{counts.get(reason, 0):,}" for counts in reasons)]
            )
        for key, title in (
            ("empty", "empty answers"),
            ("cut_off", "answers cut off at their longest"),
            ("too_long", f"{TOO_LONG}, counted as wrong"),
        ):
            if any(s and s.get(key) for s in summaries):
                rows.append([title, *(f"{s.get(key, 0):,}" if s else "" for s in summaries)])
        rows.append(["seconds for 1,000 items", *(pace(e, mode) for _, e in having)])
        parts.append(tag("h3", mode) + html_table(["score", *(run.name for run, _ in having)], rows))
    for run, e in having:
        parts.append(breakdown(run.name, e, modes))
        parts.append(worst_items(run, name, e))
        if "disagreement" in e:
            parts.append(disagreements(run, name, e["disagreement"]))
    if "published" in entry:
        columns = list(dict.fromkeys(key for row in entry["published"] for key in row["scores"]))
        rows = [
            [html.escape(row["system"]), *(number(row["scores"][c]) if c in row["scores"] else "" for c in columns),
             html.escape(row["source"])]
            for row in entry["published"]
        ]  # fmt: skip
        content = tag("p", "Reported by others under another protocol: for orientation, not for tests.", class_="soft")
        content += html_table(["system", *columns, "source"], rows, [len(columns) + 1])
        parts.append(folded("published scores (other protocol)", content))
    return "".join(parts)


def breakdown(name: str, entry: dict[str, Any], modes: Sequence[str]) -> str:
    """Scores by annotation, a column for each mode; small cells in grey."""
    by_mode = {mode: entry["modes"][mode]["groups"] for mode in modes if mode in entry["modes"]}
    parts = []
    for annotation in dict.fromkeys(name for groups in by_mode.values() for name in groups):
        columns = [groups[annotation] for groups in by_mode.values() if annotation in groups]
        cells = columns[0]["cells"]
        rows = []
        for value in list(cells)[:SHOWN_CELLS]:
            shown = [
                html.escape(value),
                *(score_cell(c["cells"].get(value)) for c in columns),
                f"{cells[value]['n']:,}",
            ]
            grey = "small" if cells[value]["small"] else ""
            rows.append([tag("span", cell, class_=grey) if grey else cell for cell in shown])
        rows.append(["mean of values", *(f"{column['macro']:.2f}" for column in columns), ""])
        parts.append(html_table([annotation, *by_mode, "items"], rows))
        if len(cells) > SHOWN_CELLS:
            parts.append(tag("p", f"{len(cells) - SHOWN_CELLS} more values are in results.json", class_="soft"))
    return folded(f"{name} by annotation (grey: fewer than {SMALL_CELL} items)", "".join(parts)) if parts else ""


def item_text(record: dict[str, Any]) -> str:
    options = "".join(f"<br>{letter}. {html.escape(text)}" for letter, text in record.get("options", {}).items())
    return html.escape(clip(record["question"])) + options


def told(value: Any) -> str:
    return html.escape(clip("、".join(value) if isinstance(value, list) else str(value)))


def surest_mistake(record: dict[str, Any]) -> float:
    """How much likelier the model finds its wrong choice than the right one, in nats."""
    logps, target = record["logps"], record["target"]
    right = target[0] if isinstance(target, list) else target
    return logps[record["choice"]] - logps.get(right, min(logps.values()))


def worst_items(run: Run, name: str, entry: dict[str, Any]) -> str:
    parts = []
    for mode in entry["modes"]:
        records = run.records[name, mode]
        if mode == "likelihood" and "logps" in records[0]:
            asked = (r for r in records if not r["correct"] and r["logps"])
            wrong = sorted(asked, key=surest_mistake, reverse=True)[:WORST_ITEMS]
            rows = [[item_text(r), told(r["target"]), told(r["choice"]), f"{surest_mistake(r):.2f}"] for r in wrong]
            header = ["surest mistakes", "right", "chosen", "nats"]
        elif "score" in records[0]:
            wrong = sorted(records, key=lambda r: (r["score"], r["index"]))[:WORST_ITEMS]
            rows = [[item_text(r), told(r["target"]), told(r["response"]), number(r["score"])] for r in wrong]
            header = ["lowest scores", "reference", "answer", "score"]
        elif "correct" in records[0]:
            wrong = [r for r in records if not r["correct"]][:WORST_ITEMS]
            rows = [
                [item_text(r), told(r["target"]), told(r["response"]), html.escape(r.get("reason", ""))] for r in wrong
            ]
            header = ["first mistakes", "right", "answer", "read by"]
        else:
            continue
        if rows:
            parts.append(html_table(header, rows, [0, 1, 2]))
    return folded(f"worst items of {run.name}", "".join(parts)) if parts else ""


def disagreements(run: Run, name: str, counts: dict[str, Any]) -> str:
    written = {record["id"]: record for record in run.records[name, "generate"]}
    rows: list[list[str]] = []
    for record in run.records[name, "likelihood"]:
        other = written.get(record["id"])
        key = "choice" if counts["of"] == "choices" else "correct"
        if other is None or other[key] == record[key] or len(rows) == WORST_ITEMS:
            continue
        rows.append([item_text(record), told(record["target"]), told(record["choice"]), told(other["response"])])
    share = 100 * counts["differ"] / max(counts["n"], 1)
    title = (
        f"{run.name}: the modes differ in {counts['differ']:,} of {counts['n']:,} items ({share:.1f} %, {counts['of']})"
    )
    if not rows:
        return tag("p", html.escape(title))
    return folded(title, html_table(["item", "right", "likeliest", "written"], rows, [0, 1, 2, 3]))


def write_report(
    path: Path, runs: Sequence[Run], results: Sequence[dict[str, Any]], comparison: dict[str, Any] | None
) -> None:
    """One page with everything: overview, comparison, a section for each task. Nothing is loaded from outside."""
    title = " → ".join(run.name for run in runs)
    key = "".join(
        f'<span class="key" style="background:{COLOURS[i % len(COLOURS)]}"></span>{html.escape(run.name)}'
        for i, run in enumerate(runs)
    )
    parts = [tag("h1", f"Evaluation: {html.escape(title)}"), tag("p", key, class_="soft"), overview(results)]
    if comparison and comparison["pairs"]:
        parts += [tag("h2", "Stage against stage"), comparison_section(comparison)]
    for name in dict.fromkeys(name for name, _, _ in tasks_and_modes(results)):
        parts.append(task_section(name, runs, results))
    parts.append(tag("h2", "Runs"))
    for run in runs:
        parts.append(
            folded(str(run.folder), tag("pre", html.escape(json.dumps(run.header, ensure_ascii=False, indent=1))))
        )
    write_page(path, title, parts)


def write_page(path: Path, title: str, parts: Sequence[str]) -> None:
    """A page of these parts, which are HTML already. Nothing is loaded from outside."""
    note = tag("p", "Research output; no score here says that a model may give medical advice.", class_="soft")
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    head = tag("head", head + tag("style", STYLE))
    page = f"<!doctype html>\n{tag('html', head + tag('body', ''.join([*parts, note])), lang='en')}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8", errors="backslashreplace")

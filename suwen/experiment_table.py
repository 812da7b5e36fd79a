"""What each stage of an experiment changed: every model on the same held-out questions, tested item by item.

The folder of a graph, outputs/pipeline/seed-1, holds evaluations of `evaluation.py --tasks injection`: start, pt/eval,
sft/eval, ... Written are comparison.json and report.html for each graph, and for all of them report.html with the plot
stages.png, and results.json: scores, all metrics with their intervals, the tests of what each stage changed, and means.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from suwen.comparison import compare_folders
from suwen.records import write_json
from suwen.report import format_overview, html_table, tag, write_page
from suwen.runs import load_run
from suwen.statistics import compare_correct
from suwen.tables import printable, table

SHOWN_QUESTIONS = 2  # of each group, with the answer of every stage
DRAWN = {
    "choice (likelihood)": "choice_{}", "recall (generation)": "recall_{}", "recall with passages": "retrieved_{}",
}  # fmt: skip


def metrics_of(comparison: dict[str, Any]) -> dict[str, list[dict[str, Any] | None]]:
    """Every metric of each task, with its interval, for each stage; None where a stage was not asked."""
    found = {}
    for name, entry in comparison["results"][-1]["tasks"].items():
        (mode,) = entry["modes"]
        asked = [result["tasks"].get(name) for result in comparison["results"]]
        found[name] = [one["modes"][mode]["metrics"] if one else None for one in asked]
    return found


def scores_of(comparison: dict[str, Any]) -> dict[str, list[float | None]]:
    """The headline of each task, a number for each stage; None where a stage was not asked."""
    headlines = {name: entry["headline"] for name, entry in comparison["results"][-1]["tasks"].items()}
    return {
        name: [metrics[headlines[name]]["value"] if metrics else None for metrics in column]
        for name, column in metrics_of(comparison).items()
    }


def means_of(seeds: Sequence[dict[str, list[float | None]]]) -> dict[str, list[dict[str, float] | None]]:
    """Means over the seeds, with the lowest and the highest one, for each stage; None where no seed was asked."""
    means: dict[str, list[dict[str, float] | None]] = {}
    for name in seeds[0]:
        columns = [
            [score for score in column if score is not None] for column in zip(*(s[name] for s in seeds), strict=True)
        ]
        means[name] = [{"mean": sum(c) / len(c), "lowest": min(c), "highest": max(c)} if c else None for c in columns]
    return means


def mean_table(stages: list[str], means: dict[str, list[dict[str, float] | None]], count: int) -> str:
    rows = [[f"mean of {count} seeds", *stages]]
    for name, columns in means.items():
        rows.append(
            [name, *(f"{c['mean']:.1f} ({c['lowest']:.1f} to {c['highest']:.1f})" if c else "-" for c in columns)]
        )
    return table(rows)


def draw(stages: list[str], seeds: Sequence[dict[str, list[float | None]]], path: Path) -> None:
    """A line for each group over the stages, a faint one for each seed."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = {title: pattern for title, pattern in DRAWN.items() if pattern.format("A") in seeds[0]}
    figure, axes = pyplot.subplots(1, len(drawn), figsize=(4.6 * len(drawn), 3.6), sharey=True, squeeze=False)
    for axis, (title, pattern) in zip(axes[0], drawn.items(), strict=True):
        for group, colour in zip("ABC", ("#2b6cb0", "#c05621", "#718096"), strict=True):
            lines = np.array([scores[pattern.format(group)] for scores in seeds], dtype=float)  # None: not a number
            for line in lines if len(lines) > 1 else []:
                axis.plot(stages, line, color=colour, alpha=0.25, linewidth=1)
            axis.plot(stages, lines.mean(axis=0), color=colour, marker="o", label=f"group {group}")
        axis.set_title(title)
        axis.set_ylim(-3, 103)
        axis.set_ylabel("% of the questions")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def gain_of_retrieval(folders: dict[str, Path]) -> str:
    """What passages change for the last stage, on the questions that it was also asked without; "" if it was not."""
    records = load_run(list(folders.values())[-1]).records
    lines = []
    for group in "ABC":
        closed, opened = (records.get((f"{task}_{group}", "generate")) for task in ("recall", "retrieved"))
        if closed and opened:
            right = {record["question"]: record["correct"] for record in closed}
            change = compare_correct([right[record["question"]] for record in opened], [r["correct"] for r in opened])
            gain, low, high = (100 * value for value in (change.value, change.low, change.high))
            lines.append(f"passages, group {group}: {gain:+.1f} points [{low:+.1f}, {high:+.1f}], p {change.p:.2g}")
    return "\n".join([*lines, ""])


def sample_answers(folders: dict[str, Path]) -> str:
    """A few questions with what each stage answered."""
    runs = {stage: load_run(folder) for stage, folder in folders.items()}
    lines = []
    for group in "ABC":
        task = (f"recall_{group}", "generate")
        for place in range(SHOWN_QUESTIONS if all(task in found.records for found in runs.values()) else 0):
            asked = {stage: run.records[task][place] for stage, run in runs.items()}
            first = next(iter(asked.values()))
            lines.append(f"{group}  {first['question']}  right: {'、'.join(first['target'])}")
            for stage, record in asked.items():
                mark, said = "+" if record["correct"] else " ", printable(" ".join(record["response"].split()))
                lines.append(f"   {mark} {stage}: {said[:60] or '(nothing)'}")
    return "\n".join(lines)


def write_overview(
    output_dir: Path, names: Sequence[str], stages: list[str], means: dict[str, list[dict[str, float] | None]]
) -> Path:
    """The page of the experiment: the plot, the means, and the way to the page of each graph."""

    def cell(score: dict[str, float] | None) -> str:
        if score is None:
            return ""
        spread = tag("div", f"{score['lowest']:.1f} to {score['highest']:.1f}", class_="interval")
        return f"{score['mean']:.1f}" + (spread if len(names) > 1 else "")

    picture = base64.b64encode((output_dir / "stages.png").read_bytes()).decode()
    links = ", ".join(tag("a", html.escape(name), href=f"{name}/report.html") for name in names)
    rows = [[html.escape(name), *map(cell, columns)] for name, columns in means.items()]
    shown = "Mean, lowest and highest of the graphs" if len(names) > 1 else "One graph"
    parts = [
        tag("h1", "What each stage put into the model"),
        f'<img src="data:image/png;base64,{picture}" alt="choice and recall by stage" style="max-width:100%">',
        tag("p", f"{shown}; intervals, tests of each stage against the one before, and answers: {links}."),
        html_table(["task", *stages], rows),
    ]
    page = output_dir / "report.html"
    write_page(page, "Experiment: " + " → ".join(stages), parts)
    return page


def show(output_dir: Path, names: Sequence[str], stages: Sequence[str]) -> None:
    """Compare the evaluations of each graph and print, draw and write what came out.

    Args:
        names: folders of the graphs in output_dir.
        stages: in their order; "start" is the model that the first one went on from.
    """
    seeds, results = [], {}
    for name in names:
        seed = output_dir / name
        folders = {stage: seed / ("start" if stage == "start" else f"{stage}/eval") for stage in stages}
        comparison = compare_folders(list(folders.values()), seed / "comparison.json", seed / "report.html")
        print(f"{seed}\n{format_overview(comparison)}\n{gain_of_retrieval(folders)}")
        seeds.append(scores_of(comparison))
        results[name] = {"stages": list(stages), "scores": seeds[-1]}
        # the tests of each stage against the one before, and of the last one against the start
        results[name] |= {"metrics": metrics_of(comparison), "changes": comparison["pairs"]}
    means = means_of(seeds)
    if len(seeds) > 1:
        print(mean_table(list(stages), means, len(seeds)) + "\n")
    draw(list(stages), seeds, output_dir / "stages.png")
    write_json(output_dir / "results.json", {"stages": list(stages), "means": means, "seeds": results})
    page = write_overview(output_dir, names, list(stages), means)
    print(f"some questions, and what each stage answered ({seed}):\n{sample_answers(folders)}\n")
    print(f"written: {page}, {output_dir / 'results.json'}, {output_dir / 'stages.png'}")

"""From the records of evaluations to their tables: one model's scores, and stages against each other.

Nothing here asks a model: every number is computed from records/*.jsonl, so tables can be rebuilt at any time.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from suwen.benchmarks import TASKS
from suwen.benchmarks.task import MODES, TOO_LONG, Record
from suwen.records import write_json
from suwen.report import SMALL_CELL, write_report
from suwen.runs import Run, load_run
from suwen.statistics import (
    Difference,
    compare_correct,
    compare_scores,
    holm,
    smallest_difference,
    verdict,
    wilson_interval,
)


def table_order(key: tuple[str, str]) -> tuple[int, int]:
    """Of a (task, mode) in every table."""
    return list(TASKS).index(key[0]), MODES.index(key[1])


def summarise_run(run: Run) -> dict[str, Any]:
    """All scores of a run, by task and mode."""
    tasks: dict[str, Any] = {}
    for (name, mode), records in sorted(run.records.items(), key=lambda entry: table_order(entry[0])):
        task = TASKS[name]
        known = run.header.get("tasks", {}).get(name, {})
        entry = tasks.setdefault(
            name,
            {
                "title": task.title, "version": task.version, "headline": task.headline, "source": task.source,
                "lower_is_better": task.lower_is_better, "own": known.get("own", False),
                "data": {key: known[key] for key in ("files", "notes", "refused", "timing") if key in known},
                "modes": {},
            },
        )  # fmt: skip
        summary = task.summarise(records)
        cut = sum(record.get("finish_reason") == "length" for record in records)
        summary |= {"cut_off": cut} if mode == "generate" else {}
        summary["too_long"] = sum(record.get("finish_reason") == TOO_LONG for record in records)
        summary["groups"] = group_scores(records, task.paired)
        entry["modes"][mode] = summary
        if not entry["own"] and task.published:
            entry["published"] = [dataclasses.asdict(row) for row in task.published]
    for name, entry in tasks.items():
        if len(entry["modes"]) == 2:
            entry["disagreement"] = disagreement(*(run.records[name, mode] for mode in MODES))
    return {"name": run.name, "run": run.header, "tasks": tasks}


def group_scores(records: Sequence[Record], paired: str) -> dict[str, Any]:
    """Scores by annotation: {annotation: {"cells": {value: {...}}, "macro": mean over the values}}."""
    cells: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        for annotation, value in record.get("groups", {}).items():
            cells[annotation][value].append(float(record[paired]))
    found: dict[str, Any] = {}
    for annotation, values in sorted(cells.items()):
        shown = {}
        for value, scores in sorted(values.items(), key=lambda entry: (-len(entry[1]), entry[0])):
            mean = float(np.mean(scores))
            cell: dict[str, Any] = {"n": len(scores), "small": len(scores) < SMALL_CELL, "value": mean}
            if paired == "correct":
                low, high = wilson_interval(round(sum(scores)), len(scores))
                cell |= {"value": 100 * mean, "low": 100 * low, "high": 100 * high}
            shown[value] = cell
        found[annotation] = {"cells": shown, "macro": float(np.mean([cell["value"] for cell in shown.values()]))}
    return found


def disagreement(likelihood: Sequence[Record], generated: Sequence[Record]) -> dict[str, Any]:
    """How often the likeliest answer is not the written one, over the items that have both."""
    written = {record["id"]: record for record in generated}
    both = [(record, written[record["id"]]) for record in likelihood if record["id"] in written]
    if not both or "choice" not in both[0][1]:
        return {"n": len(both), "differ": sum(a["correct"] != b["correct"] for a, b in both), "of": "right or wrong"}
    differ = [(a, b) for a, b in both if a["choice"] != b["choice"]]
    return {
        "n": len(both),
        "differ": len(differ),
        "of": "choices",
        "unparsed": sum(not b["choice"] for _, b in differ),
        "only_likelihood_right": sum(a["correct"] for a, _ in differ),
        "only_generate_right": sum(b["correct"] for _, b in differ),
    }


# --------------------------------------------------------------------------------------------------------- comparison


def compare_pair(first: Run, second: Run) -> list[dict[str, Any]]:
    """The second run against the first, on the items that both have; p-values corrected over all tasks and modes."""
    rows = []
    for task_name, mode in sorted(first.records.keys() & second.records.keys(), key=table_order):
        task = TASKS[task_name]
        versions = [run.header.get("tasks", {}).get(task_name, {}).get("version") for run in (first, second)]
        row: dict[str, Any] = {"task": task_name, "mode": mode, "metric": task.headline}
        if None not in versions and versions[0] != versions[1]:
            rows.append({**row, "problem": f"version {versions[0]} against {versions[1]} of the task"})
            continue
        earlier = {record["id"]: record for record in first.records[task_name, mode]}
        pairs = [(earlier[r["id"]], r) for r in second.records[task_name, mode] if r["id"] in earlier]
        if not pairs:
            rows.append({**row, "problem": "no item in common"})
            continue
        unpaired = len(earlier) + len(second.records[task_name, mode]) - 2 * len(pairs)
        a, b = ([pair[i] for pair in pairs] for i in range(2))
        if task.paired == "correct":
            difference = compare_correct([r["correct"] for r in a], [r["correct"] for r in b])
            value, low, high = (100 * x for x in difference[:3])
            difference = Difference(value, low, high, difference.p)
            scores = [100 * float(np.mean([r["correct"] for r in part])) for part in (a, b)]
            row |= {
                "test": "McNemar, exact",
                "gained": sum(y["correct"] and not x["correct"] for x, y in pairs),
                "lost": sum(x["correct"] and not y["correct"] for x, y in pairs),
                "smallest": 100 * smallest_difference(len(pairs)),
            }
        else:
            columns = ("bits", "characters") if task.paired == "bits" else (task.paired,)
            matrices = [np.array([[float(r[column]) for column in columns] for r in part]) for part in (a, b)]
            difference = compare_scores(matrices[0], matrices[1], mean_score)
            scores = [float(mean_score(matrix.mean(axis=0)[None])[0]) for matrix in matrices]
            row |= {"test": "paired bootstrap"}
        row |= {"n": len(pairs), "unpaired": unpaired, "first": scores[0], "second": scores[1]}
        row |= {"difference": difference.value, "low": difference.low, "high": difference.high, "p": difference.p}
        rows.append(row)
    tested = [row for row in rows if "p" in row]
    for row, corrected in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = corrected
        row["verdict"] = verdict(row["difference"], corrected, TASKS[row["task"]].lower_is_better)
    return rows


def mean_score(means: np.ndarray) -> np.ndarray:
    """(R, 1) means of scores, or (R, 2) means of bits and characters, to (R,) scores."""
    return means[:, 0] if means.shape[1] == 1 else means[:, 0] / means[:, 1]


def compare_runs(runs: Sequence[Run]) -> dict[str, Any]:
    """Neighbours against each other, and the last against the first."""
    pairs = list(zip(runs, runs[1:], strict=False))
    if len(runs) > 2:
        pairs.append((runs[0], runs[-1]))
    return {
        "runs": [{"name": run.name, "folder": str(run.folder)} for run in runs],
        "pairs": [
            {"first": first.name, "second": second.name, "rows": compare_pair(first, second)} for first, second in pairs
        ],
    }


def unique_names(runs: Sequence[Run]) -> list[Run]:
    """The same runs, with whole paths as names where the short ones would be the same."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return list(runs)
    return [dataclasses.replace(run, name=str(run.folder)) for run in runs]


def compare_folders(
    folders: Sequence[str | Path], comparison_file: Path | None = None, report_file: Path | None = None
) -> dict[str, Any]:
    """Compare evaluation folders in the order given, and write the comparison where files are named.

    Returns:
        what is written to `comparison_file`: the results of each run, and the pairs.
    """
    runs = unique_names([load_run(folder) for folder in folders])
    results = [summarise_run(run) for run in runs]
    comparison = compare_runs(runs) | {"results": results}
    if comparison_file:
        write_json(comparison_file, comparison)
    if report_file:
        write_report(report_file, runs, results, comparison)
    return comparison

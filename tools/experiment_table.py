"""What each stage of run_pipeline.sh changed: every model on the same held-out questions, tested item by item.

    python tools/experiment_table.py --output_dir outputs/pipeline --seeds 1 2

The folder of a seed, outputs/pipeline/seed-1, holds evaluations of `evaluation.py --tasks injection`: start, pt/eval,
sft/eval, dpo/eval. Written are comparison.json and report.html for each seed, and results.json and stages.png for all.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from suwen.arguments import OneLineParser, run

STAGES = {"start": "start", "pt": "pt/eval", "sft": "sft/eval", "dpo": "dpo/eval"}
SHOWN_QUESTIONS = 2  # of each group, with the answer of every stage
DRAWN = {"choice (likelihood)": "choice_{}", "recall (generation)": "recall_{}"}


def scores_of(comparison: dict[str, Any]) -> dict[str, list[float]]:
    """The headline of each task, a number for each stage."""
    tasks = comparison["results"][-1]["tasks"]
    found = {}
    for name, entry in tasks.items():
        (mode,) = entry["modes"]
        metric = entry["headline"]
        found[name] = [r["tasks"][name]["modes"][mode]["metrics"][metric]["value"] for r in comparison["results"]]
    return found


def mean_table(stages: list[str], seeds: list[dict[str, list[float]]]) -> str:
    """Means over the seeds, with the lowest and the highest one."""
    from suwen.tables import table

    rows = [[f"mean of {len(seeds)} seeds", *stages]]
    for name in seeds[0]:
        columns = list(zip(*(scores[name] for scores in seeds), strict=True))
        rows.append([name, *(f"{sum(c) / len(c):.1f} ({min(c):.1f} to {max(c):.1f})" for c in columns)])
    return table(rows)


def draw(stages: list[str], seeds: list[dict[str, list[float]]], path: Path) -> None:
    """A line for each group over the stages, a faint one for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(DRAWN), figsize=(4.6 * len(DRAWN), 3.6), sharey=True)
    for axis, (title, pattern) in zip(axes, DRAWN.items(), strict=True):
        for group, colour in zip("ABC", ("#2b6cb0", "#c05621", "#718096"), strict=True):
            lines = [scores[name] for scores in seeds if (name := pattern.format(group)) in scores]
            for line in lines if len(lines) > 1 else []:
                axis.plot(stages, line, color=colour, alpha=0.25, linewidth=1)
            if lines:
                means = [sum(column) / len(column) for column in zip(*lines, strict=True)]
                axis.plot(stages, means, color=colour, marker="o", label=f"group {group}")
        axis.set_title(title)
        axis.set_ylim(-3, 103)
        axis.set_ylabel("% of the questions")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def sample_answers(folders: dict[str, Path]) -> str:
    """A few questions with what each stage answered."""
    from suwen.runs import load_run

    runs = {stage: load_run(folder) for stage, folder in folders.items()}
    lines = []
    for group in "ABC":
        task = (f"recall_{group}", "generate")
        for place in range(SHOWN_QUESTIONS if all(task in found.records for found in runs.values()) else 0):
            asked = {stage: run.records[task][place] for stage, run in runs.items()}
            first = next(iter(asked.values()))
            lines.append(f"{group}  {first['question']}  right: {'、'.join(first['target'])}")
            for stage, record in asked.items():
                mark = "+" if record["correct"] else " "
                lines.append(f"   {mark} {stage}: {' '.join(record['response'].split())[:60] or '(nothing)'}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="of run_pipeline.sh")
    parser.add_argument("--seeds", nargs="+", required=True, type=int, metavar="S", help="whose results are shown")
    args = parser.parse_args(argv)

    from suwen.comparison import compare_folders
    from suwen.records import write_json
    from suwen.report import format_overview

    seeds, results = [], {}
    output = Path(args.output_dir)
    for number in args.seeds:
        seed = output / f"seed-{number}"
        folders = {stage: seed / place for stage, place in STAGES.items() if (seed / place / "records").is_dir()}
        if len(folders) < 2:
            raise ValueError(f"{seed}: found {len(folders)} evaluations, expected {', '.join(STAGES.values())}")
        comparison = compare_folders(list(folders.values()), seed / "comparison.json", seed / "report.html")
        print(f"{seed}\n{format_overview(comparison)}\n")
        seeds.append(scores_of(comparison))
        results[seed.name] = {"stages": list(folders), "scores": seeds[-1]}
    stages = list(folders)
    if len({tuple(result["stages"]) for result in results.values()}) > 1:
        raise ValueError("--seeds: found folders with different stages, expected the same in all of them")
    if len(seeds) > 1:
        print(mean_table(stages, seeds) + "\n")
    draw(stages, seeds, output / "stages.png")
    write_json(output / "results.json", {"seeds": results})
    print(f"some questions, and what each stage answered ({seed}):\n{sample_answers(folders)}\n")
    pages = ", ".join(str(output / name / "report.html") for name in results)
    print(f"written: {pages}, {output / 'results.json'}, {output / 'stages.png'}")


if __name__ == "__main__":
    run(main)

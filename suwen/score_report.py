"""What a reward model's scores are worth on held-out pairs: how often, by how much and how surely they are right."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute

from suwen.encoding import IGNORE_INDEX, describe_row
from suwen.progress import main_process, say
from suwen.records import write_json
from suwen.rows import rows_of_pair
from suwen.statistics import wilson_interval
from suwen.tables import table

ALIKE = 0.1  # answers whose lengths differ by at most this share of the longer one count as matched
BINS = 10
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Calibration(NamedTuple):
    """Pairs by how sure the scores are of the answer that they prefer: those of BINS bins from 0.5 to 1 that hold any.

    Attributes:
        confidence, accuracy: means in a bin.
        counts: pairs in a bin.
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    counts: np.ndarray

    @property
    def error(self) -> float:
        """Expected calibration error, Guo et al. 2017 (arXiv:1706.04599), eq. 3: a mean of |accuracy - confidence|."""
        return float(np.abs(self.accuracy - self.confidence) @ self.counts / self.counts.sum())


def calibrate(ahead: np.ndarray) -> Calibration:
    """`ahead` (N,): score of the better answer less that of the worse one; the model's belief is its sigmoid."""
    confidence = 1 / (1 + np.exp(-np.abs(ahead)))
    at = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    _, at, counts = np.unique(at, return_inverse=True, return_counts=True)
    return Calibration(np.bincount(at, confidence) / counts, np.bincount(at, ahead > 0) / counts, counts)


def rate(correct: np.ndarray) -> dict[str, Any]:
    """A share of right decisions with its 95 % interval; `correct` (N,) bool, or 0.5 for a tie."""
    low, high = wilson_interval(round(float(correct.sum())), len(correct))
    return {"pairs": len(correct), "accuracy": float(correct.mean()), "low": low, "high": high}


def by_length(lengths: np.ndarray, longer_wins: bool) -> np.ndarray:
    """What a judge of lengths gets right of (N, 2) better and worse answers: 1, 0, or 0.5 where they are equal."""
    difference = (lengths[:, 0] - lengths[:, 1]) * (1 if longer_wins else -1)
    return (np.sign(difference) + 1) / 2


def build_report(
    scores: np.ndarray, lengths: np.ndarray, faults: list[str | None] | None, longer_wins: bool
) -> dict[str, Any]:
    """Everything about held-out pairs that the picture and the summary show.

    Args:
        scores: (N, 2) of better and worse answers.
        lengths: (N, 2) tokens of them.
        faults: what is wrong with each worse answer, where the data say so.
        longer_wins: whether the better answer is more often the longer one in the training data.
    """
    ahead = scores[:, 0] - scores[:, 1]
    correct, guess = ahead > 0, by_length(lengths, longer_wins)
    matched = np.abs(lengths[:, 0] - lengths[:, 1]) <= ALIKE * lengths.max(1)

    def entry(chosen: np.ndarray) -> dict[str, Any]:
        """Accuracy on some of the pairs, beside that of the lengths alone."""
        return rate(correct[chosen]) | {"margin": float(ahead[chosen].mean()), "by_length": float(guess[chosen].mean())}

    kinds = np.array([fault or "unnamed" for fault in faults] if faults else [], dtype=object)
    calibration = calibrate(ahead)
    return {
        **entry(np.ones(len(ahead), dtype=bool)),
        "length_rule": "the longer answer" if longer_wins else "the shorter answer",
        "length_matched": entry(matched) if matched.any() else None,
        "by_fault": {str(kind): entry(kinds == kind) for kind in sorted(set(kinds))},
        "calibration_error": calibration.error,
        "calibration": {name: values.tolist() for name, values in calibration._asdict().items()},
        "scores": {
            name: {"mean": float(column.mean()), "std": float(column.std())}
            | {f"{q:.0%}": float(value) for q, value in zip(QUANTILES, np.quantile(column, QUANTILES), strict=True)}
            for name, column in (("chosen", scores[:, 0]), ("rejected", scores[:, 1]))
        },
    }


def report_lines(report: dict[str, Any]) -> list[str]:
    """The summary for the terminal."""
    groups = [("all pairs", report)]
    if matched := report["length_matched"]:
        groups.append((f"of equal length (within {ALIKE:.0%})", matched))
    groups += [(f"fault: {name}", entry) for name, entry in report["by_fault"].items()]
    rows = [["held-out pairs", "pairs", "accuracy", "95 % interval", f"by length ({report['length_rule']})", "margin"]]
    for name, entry in groups:
        interval = f"{entry['low']:.1%} to {entry['high']:.1%}"
        shares = [f"{entry['accuracy']:.1%}", interval, f"{entry['by_length']:.1%}"]
        rows.append([name, f"{entry['pairs']:,}", *shares, f"{entry['margin']:.2f}"])
    return [table(rows), f"calibration error {report['calibration_error']:.3f}"]


def draw_report(report: dict[str, Any], scores: np.ndarray, path: Path) -> None:
    """Score distributions, reliability, and accuracy by kind of fault."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = [("all", report), *report["by_fault"].items()]
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13.5, 3.6))
    edges = np.histogram_bin_edges(scores, bins=30)
    for column, name in enumerate(("better answers", "worse answers")):
        left.hist(scores[:, column], bins=edges, alpha=0.6, label=name)
    left.set(title="scores", xlabel="score", ylabel="answers")
    left.legend()
    bins = report["calibration"]
    sizes = 12 + 160 * np.array(bins["counts"]) / max(bins["counts"])
    middle.plot([0.5, 1], [0.5, 1], color="grey", linewidth=1)
    middle.scatter(bins["confidence"], bins["accuracy"], s=sizes)
    middle.set(
        title=f"reliability (calibration error {report['calibration_error']:.3f})",
        xlabel="how sure the scores are",
        ylabel="how often they are right",
        xlim=(0.48, 1.02),
    )
    for row, (_, entry) in enumerate(kinds):
        right.plot([entry["low"], entry["high"]], [row, row], linewidth=3, alpha=0.4, color="C0")
        right.plot(entry["accuracy"], row, "o", color="C0", label="reward model" if not row else None)
        right.plot(entry["by_length"], row, "x", color="C1", label=report["length_rule"] if not row else None)
    right.axvline(0.5, color="grey", linewidth=1)
    right.set(title="accuracy by fault", xlim=(0, 1.03))
    right.set_yticks(range(len(kinds)), [f"{name} ({entry['pairs']})" for name, entry in kinds])
    right.invert_yaxis()
    right.legend(fontsize=8)
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def answer_lengths(rows: Any) -> np.ndarray:
    """(N, 2) tokens of the better and the worse answer of encoded pairs."""
    columns = [pyarrow.compute.list_value_length(rows.data.column(name)) for name in ("chosen_ids", "rejected_ids")]
    return np.stack([column.to_numpy() for column in columns], axis=1)


def write_report(scores: np.ndarray | None, data: Any, output_dir: str) -> None:
    """Write score_report.json and score_report.png, and say the summary; nothing without scores."""
    if scores is None or not main_process():
        return
    trained, held_out = answer_lengths(data.train), data.validation
    longer_wins = bool((trained[:, 0] > trained[:, 1]).mean() >= (trained[:, 0] < trained[:, 1]).mean())
    faults = held_out["fault"][:] if "fault" in held_out.column_names else None
    report = build_report(scores, answer_lengths(held_out), faults, longer_wins)
    write_json(Path(output_dir) / "score_report.json", report)
    draw_report(report, scores, Path(output_dir) / "score_report.png")
    say(*report_lines(report))


def describe_pair(pair: dict[str, Any], tokenizer: Any) -> str:
    """The better answer of a pair behind its prompt, the token that is scored between ⟦ and ⟧."""
    ids = rows_of_pair(pair)[0]["input_ids"]
    return describe_row({"input_ids": ids, "labels": [IGNORE_INDEX] * (len(ids) - 1) + ids[-1:]}, tokenizer)

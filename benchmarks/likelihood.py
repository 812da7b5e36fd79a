"""How much faster the packed likelihood of choice questions is than one question at a time, side by side in one run.

    python benchmarks/likelihood.py --questions 60
    python benchmarks/likelihood.py --base_model MODEL --data_file cmexam.csv --questions 500

One at a time means what a plain loop does: the 31 answers of a question in one padded batch (`batch`), or each answer
in a call of its own (`single`). The runs take turns, so that other load on the machine meets all of them; each pair of
turns gives a ratio, and the median is printed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from suwen.command_line import OneLineParser, run


def single(model: Any, choices: list[Any]) -> list[list[float]]:
    import torch

    scores: list[list[float]] = []
    for choice in choices:
        scores.append([])
        for continuation in choice.continuations:
            ids = torch.tensor([choice.prefix + continuation], device=model.device)
            with torch.inference_mode():
                logps = model(input_ids=ids).logits[0, len(choice.prefix) - 1 : -1].float().log_softmax(-1)
            scores[-1].append(logps.gather(1, ids[0, len(choice.prefix) :, None]).sum().item())
    return scores


def batch(model: Any, choices: list[Any]) -> list[list[float]]:
    from suwen.encoding import IGNORE_INDEX
    from suwen.scoring import score_rows

    scores = []
    for choice in choices:
        rows = [
            {"input_ids": choice.prefix + c, "labels": [IGNORE_INDEX] * len(choice.prefix) + c}
            for c in choice.continuations
        ]
        scores.append([score.logp for score in score_rows(model, rows, len(rows))])
    return scores


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", metavar="PATH", help="(default: the embedded model)")
    parser.add_argument("--data_file", metavar="FILE", help="(default: the project's own exam)")
    parser.add_argument("--questions", type=int, default=40, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--turns", type=int, default=3, metavar="N", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    import torch

    from suwen.benchmarks import TASKS
    from suwen.benchmarks.task import read_items
    from suwen.embedded import build_embedded_model
    from suwen.evaluate import OWN_DATA
    from suwen.likelihood import Scorer, encode_choice
    from suwen.models import load_causal_lm, load_tokenizer

    path = args.base_model or str(build_embedded_model())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_causal_lm(path, device=device).eval(), load_tokenizer(path)
    task = TASKS["cmexam"]
    items = read_items(task, [Path(args.data_file) if args.data_file else OWN_DATA / "exam.csv"], args.questions).items
    assert task.candidates
    asked = [task.candidates(item) for item in items]
    choices = [encode_choice(tokenizer, c.prefix, c.texts) for c in asked]
    scorer = Scorer(model)
    ways: dict[str, Callable[[], Any]] = {
        "packed": lambda: list(scorer.score(choices)),
        "batch": lambda: batch(model, choices),
        "single": lambda: single(model, choices),
    }
    expected = ways["single"]()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for name, way in ways.items():
        off = max(abs(a - b) for x, y in zip(way(), expected, strict=True) for a, b in zip(x, y, strict=True))
        print(f"{name}: largest difference to single {off:.2g} nats")
    for _ in range(args.turns):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - began)
    size = model.num_parameters() / 1e6
    print(f"{len(items)} questions, {size:.1f} million parameters, {device}; {scorer.problem or 'no fallback'}")
    for name, times in seconds.items():
        ratios = [t / packed for t, packed in zip(times, seconds["packed"], strict=True)]
        each = 1000 * statistics.median(times) / len(items)
        print(f"{name:7} {each:8.1f} s for 1,000 questions, {statistics.median(ratios):6.1f} x the time of packed")


if __name__ == "__main__":
    run(main)

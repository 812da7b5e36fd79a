"""Signs that a run of reinforcement learning has gone wrong, found in what it logged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Entry = dict[str, Any]
START = 3  # updates whose mean says how the run began


@dataclass(frozen=True)
class Limits:
    """Where a run is stopped; 0 switches an alarm off.

    Attributes:
        kl: nats an answer between policy and reference, in either direction (an estimate far below zero means that
            the log-probabilities are not of the model that drew the tokens).
        entropy: smallest entropy a token, as a fraction of that at the start, if the score has not risen.
        length: smallest mean length of answers, as a fraction of that at the start.
        repetition: largest rise of the share of repeated 4-grams.
        truncation: largest rise of the share of answers without an end.
        patience: updates (for the held-out reward: evaluations) that a sign must last.
    """

    kl: float = 30.0
    entropy: float = 0.02
    length: float = 0.1
    repetition: float = 0.3
    truncation: float = 0.5
    patience: int = 5


def find_alarm(history: Sequence[Entry], limits: Limits) -> str | None:
    """The reason to stop, in a line; None while all is well.

    Args:
        history: entries of updates (with `kl`) and of evaluations (with `eval_score`), in their order.
    """
    updates = [entry for entry in history if "kl" in entry]
    if not updates:
        return None
    last = updates[-1]
    for name in ("loss", "score", "kl", "entropy", "grad_norm"):
        if name in last and not math.isfinite(last[name]):
            return f"{name} is {last[name]}; lower --learning_rate, or use --bf16 instead of --fp16"
    if len(updates) > START + limits.patience:
        start = {name: mean(updates[:START], name) for name in ("score", *SIGNS)}
        recent = updates[-limits.patience :]
        for name, sign in SIGNS.items():
            if reason := sign(name, start, recent, limits):
                return reason
    return overoptimisation([entry for entry in history if "eval_score" in entry], limits)


def mean(entries: Sequence[Entry], name: str) -> float:
    return sum(entry.get(name, 0.0) for entry in entries) / len(entries)


def kl_sign(name: str, start: Entry, recent: Sequence[Entry], limits: Limits) -> str | None:
    if limits.kl and all(abs(entry[name]) > limits.kl for entry in recent):
        return (
            f"the policy is {recent[-1][name]:.1f} nats an answer away from its reference, more than --alarm_kl "
            f"{limits.kl:g}; lower --learning_rate, raise --kl_coef or set --target_kl"
        )
    return None


def entropy_sign(name: str, start: Entry, recent: Sequence[Entry], limits: Limits) -> str | None:
    low = limits.entropy * start[name]
    if limits.entropy and all(entry[name] < low for entry in recent) and mean(recent, "score") <= start["score"]:
        return (
            f"entropy fell from {start[name]:.3g} to {recent[-1][name]:.3g} nats a token without a gain in score "
            f"(--alarm_entropy {limits.entropy:g}); raise --entropy_coef or --kl_coef, or lower --learning_rate"
        )
    return None


def length_sign(name: str, start: Entry, recent: Sequence[Entry], limits: Limits) -> str | None:
    if limits.length and all(entry[name] < limits.length * start[name] for entry in recent):
        return (
            f"answers shrank from {start[name]:.0f} to {recent[-1][name]:.1f} tokens (--alarm_length "
            f"{limits.length:g}); where short answers are wanted, set it to 0"
        )
    return None


def rising_sign(name: str, start: Entry, recent: Sequence[Entry], limits: Limits) -> str | None:
    limit = getattr(limits, name)
    if limit and all(entry[name] > start[name] + limit for entry in recent):
        what = {"repetition": "repeated 4-grams", "truncation": "answers without an end"}[name]
        advice = {"repetition": "add repetition=1.0 to --reward", "truncation": "raise --missing_eos_penalty"}[name]
        return f"{what} rose from {start[name]:.0%} to {recent[-1][name]:.0%} (--alarm_{name} {limit:g}); {advice}"
    return None


SIGNS = {
    "kl": kl_sign,
    "entropy": entropy_sign,
    "length": length_sign,
    "repetition": rising_sign,
    "truncation": rising_sign,
}


def overoptimisation(evaluations: Sequence[Entry], limits: Limits) -> str | None:
    """The trained reward rises while the held-out one falls: Gao et al. 2023 (arXiv:2210.10760).

    Both are compared with the evaluation at which the held-out reward was best; every one since must show both.
    """
    found = [entry for entry in evaluations if "eval_held_out_reward" in entry]
    if not found:
        return None
    best = max(range(len(found)), key=lambda i: found[i]["eval_held_out_reward"])
    after = found[best + 1 :]
    if len(after) >= limits.patience and all(entry["eval_score"] > found[best]["eval_score"] for entry in after):
        return (
            f"the held-out reward fell from {found[best]['eval_held_out_reward']:.3f} (update {found[best]['step']})"
            f" to {after[-1]['eval_held_out_reward']:.3f} while the trained one rose: it is being exploited; raise "
            "--kl_coef, or train a better reward model"
        )
    return None

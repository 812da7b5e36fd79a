"""What a training shows on the screen: lines of the main process, log lines for people, and what stays off it."""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import ProgressCallback, TrainerCallback


def main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def say(*lines: str) -> None:
    """Print on the main process only."""
    if main_process():
        for line in lines:
            print(line, flush=True)


def quiet_libraries() -> None:
    """Keep the libraries' routine warnings off the screen; errors stay."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    threading.excepthook = _thread_failed
    for name in ("transformers", "trl", "accelerate", "datasets", "peft", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)


_excepthook = threading.excepthook


def _thread_failed(failed: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread hands its failure, such as a full disk, to the training, and need not print it."""
    if type(failed.thread).__name__ != "_AsyncWriterThread":
        _excepthook(failed)


# What a log line shows, in this order; the rest is in TensorBoard and in trainer_state.json.
SHOWN = {
    "loss": "loss", "eval_loss": "held-out loss", "eval_perplexity": "perplexity", "token_accuracy": "accuracy",
    "eval_token_accuracy": "accuracy", "rewards/accuracies": "reward accuracy", "rewards/margins": "margin",
    "eval_rewards/accuracies": "reward accuracy", "eval_rewards/margins": "margin", "accuracy": "accuracy",
    "eval_accuracy": "accuracy", "margin": "margin", "eval_margin": "margin", "log_odds_ratio": "log odds ratio",
    "eval_log_odds_ratio": "log odds ratio", "router_loss": "router loss",
    "grad_norm": "gradient",
    "learning_rate": "rate",
}  # fmt: skip


class StageLines(TrainerCallback):
    """A log line for people instead of the trainer's dictionary."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        parts = [f"{name} {float(logs[key]):.4g}" for key, name in SHOWN.items() if key in (logs or {})]
        if state.is_world_process_zero and parts:
            tqdm.write(f"step {state.global_step}/{state.max_steps}  " + "  ".join(parts), file=sys.stdout)
            sys.stdout.flush()


class StageProgress(StageLines, ProgressCallback):
    """The same beside the trainer's progress bar."""


def closing_lines(record: dict[str, Any], output: Path) -> list[str]:
    """What a stage says at its end."""
    lines = []
    if training := record.get("training"):
        lines.append(
            f"trained {training['steps']} steps, {training['tokens']:,} tokens at "
            f"{training['tokens_per_second']:,.0f} tokens/s; mean loss {training['loss']:.4f}; "
            f"peak memory {record['peak_memory_bytes'] / 1e9:.2f} GB"
        )
    if evaluation := record.get("evaluation"):
        shown = {
            "eval_loss": "loss", "eval_perplexity": "perplexity", "eval_token_accuracy": "token accuracy",
            "eval_rewards/accuracies": "reward accuracy", "eval_rewards/margins": "reward margin",
            "eval_score": "score", "eval_held_out_reward": "held-out reward",
            "eval_accuracy": "accuracy", "eval_margin": "margin", "eval_log_odds_ratio": "log odds ratio",
        }  # fmt: skip
        parts = [f"{name} {evaluation[key]:.4f}" for key, name in shown.items() if key in evaluation]
        lines.append("held out: " + ", ".join(parts))
    return [*lines, f"wrote {output}"]

"""What a run leaves beside the weights: run.json and the picture of its curves."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "deepspeed")
SECRETS = {"token", "password", "key", "secret"}  # parts of the names of flags


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def peak_memory_bytes() -> int:
    """Peak of this process: allocated GPU memory where it has used a GPU, else resident memory."""
    import torch  # here, so that what only writes JSON does not wait for it

    if torch.cuda.is_available() and (allocated := torch.cuda.max_memory_allocated()):
        return allocated
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def is_secret(name: str) -> bool:
    """Whether a flag's value is one: hub_token and api_key are, max_new_tokens and tokenizer_path are not."""
    return bool(SECRETS & set(name.lower().lstrip("-").replace("-", "_").split("_")))


def without_secrets(values: dict[str, Any]) -> dict[str, Any]:
    return {k: hide_password(v) for k, v in values.items() if not is_secret(k) or isinstance(v, (int, float))}


def command_without_secrets(words: list[str]) -> list[str]:
    """A command line as it may be written down: values of secret flags and passwords in addresses as ***."""
    found, hidden = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        if word.startswith("--"):
            hidden = is_secret(name)
            found.append(f"{name}=***" if hidden and equals else hide_password(word))
        else:
            found.append("***" if hidden else hide_password(word))
    return found


def hide_password(value: Any) -> Any:
    return re.sub(r"(://)[^/@\s]+@", r"\1***@", value) if isinstance(value, str) else value


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write in one step, so that a reader never sees half a file, also after a power cut."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, ensure_ascii=False, indent=2, default=str) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def timestamp() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


# Panels of the picture: title, and the log keys drawn in it.
PANELS = (
    ("loss", ("loss", "eval_loss")),
    ("token accuracy", ("token_accuracy", "eval_token_accuracy")),
    ("reward accuracy", ("rewards/accuracies", "eval_rewards/accuracies")),
    ("reward margin", ("rewards/margins", "eval_rewards/margins")),
    ("score", ("score", "eval_score")),
    ("KL to the reference, nats an answer", ("kl",)),
    ("entropy, nats a token", ("entropy",)),
    ("tokens an answer", ("length", "eval_length")),
    ("answers without an end", ("truncation", "eval_truncation")),
    ("clipped tokens", ("clip_fraction",)),
    ("explained variance", ("explained_variance",)),
    ("held-out reward", ("eval_held_out_reward",)),
    ("repetition", ("repetition",)),
    ("pair accuracy", ("accuracy", "eval_accuracy")),
    ("score margin", ("margin", "eval_margin")),
    ("log odds ratio", ("log_odds_ratio", "eval_log_odds_ratio")),
    ("learning rate", ("learning_rate",)),
)
PANELS_A_ROW = 5


def draw_curves(log_history: list[dict[str, Any]], path: Path, title: str, step_name: str = "optimiser step") -> None:
    """Draw what the trainer logged, one panel a quantity; quantities that were not logged have no panel."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if any("rewards/margins" in entry or "eval_rewards/margins" in entry for entry in log_history):
        panels = [panel for panel in PANELS if panel[0] != "token accuracy"]
    else:
        panels = [panel for panel in PANELS if not panel[0].startswith("reward")]
    panels = [panel for panel in panels if any(key in entry for entry in log_history for key in panel[1])]
    if not panels:
        return
    columns = min(len(panels), PANELS_A_ROW)
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(4.2 * columns, 3.4 * lines), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (name, keys) in zip(axes.flat, panels, strict=False):
        for key in keys:
            points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
            if points:
                evaluation = key.startswith("eval_")
                label = "held out" if evaluation else "training"
                marker = "o" if evaluation or len(points) == 1 else ""  # a line of one point is nothing
                axis.plot(*zip(*points, strict=True), marker=marker, label=label, linewidth=1.5)
        axis.set_title(name)
        axis.set_xlabel(step_name)
        axis.grid(alpha=0.3)
        if len(keys) > 1:
            axis.legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)

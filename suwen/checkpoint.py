"""Checkpoints of a run: which one to go on from, and whether it belongs to this run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

WEIGHTS = ("*.safetensors", "global_step*", "pytorch_model_fsdp*", "*/*.distcp")


def is_whole(checkpoint: Path) -> bool:
    """The trainer writes trainer_state.json last, so a checkpoint without a readable one was cut short."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return any(any(checkpoint.glob(pattern)) for pattern in WEIGHTS)


def list_checkpoints(output_dir: Path) -> list[Path]:
    found = [p for p in output_dir.glob("checkpoint-*") if p.is_dir() and p.name.rsplit("-", 1)[-1].isdigit()]
    return sorted(found, key=lambda p: int(p.name.rsplit("-", 1)[-1]))


def checkpoint_step(checkpoint: Path) -> int:
    """Optimiser steps behind a checkpoint."""
    return int(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])


def set_aside(paths: list[Path], output_dir: Path, label: str) -> Path:
    """Move checkpoints out of the way; nothing is deleted."""
    target = output_dir / f"{label}-{time.strftime('%Y%m%d-%H%M%S')}"
    target.mkdir(parents=True, exist_ok=True)
    for path in paths:
        path.rename(target / path.name)
    return target


def find_checkpoint(output_dir: Path, resume: str, writer: bool = True) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from and the lines that say what was found.

    Args:
        resume: auto (newest whole one), never (older ones are set aside), or a checkpoint folder.
        writer: this process may move folders (the main process only).

    Raises:
        ValueError: the folder given is no whole checkpoint.
    """
    if resume not in ("auto", "never"):
        chosen = Path(resume)
        if not is_whole(chosen):
            raise ValueError(
                f"--resume {resume}: found no whole checkpoint there, expected auto, never or a checkpoint-N folder"
            )
        return chosen, [f"going on from {chosen}"]
    checkpoints = list_checkpoints(output_dir)
    lines = []
    if resume == "never":
        if checkpoints and writer:
            moved = set_aside(checkpoints, output_dir, "earlier")
            lines.append(f"--resume never: checkpoints of the earlier run moved to {moved}")
        return None, lines
    broken = [path for path in checkpoints if not is_whole(path)]
    if broken and writer:
        names = ", ".join(path.name for path in broken)
        lines.append(f"cut short, not used: {names} (moved to {set_aside(broken, output_dir, 'incomplete')})")
    whole = [path for path in checkpoints if path not in broken]
    if not whole:
        return None, lines
    return whole[-1], [*lines, f"going on from {whole[-1]}"]


def identity_difference(recorded: dict[str, Any], current: dict[str, Any]) -> str | None:
    """The first argument in which a checkpoint's run differs from this one, as a line; None if there is none."""
    for key in sorted(recorded.keys() | current.keys()):
        if recorded.get(key) != current.get(key):
            return f"{key} was {recorded.get(key)!r}, is {current.get(key)!r}"
    return None

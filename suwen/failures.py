"""Failures of a training that are not its own: memory that is too small, another process that has ended."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from suwen.checkpoint import list_checkpoints
from suwen.memory import Setting, cheaper_settings, plan_memory, shape_of

OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")
PEER_LOST = ("connection closed by peer", "connection reset by peer", "broken pipe", "timed out waiting", "timeout")
ADVICE = 3  # settings that are named


@contextlib.contextmanager
def explained(output_dir: Path, model_config: Any, setting: Setting) -> Iterator[None]:
    """Turn such failures into one line that says what to do.

    Raises:
        ValueError: that line.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or _says(text, OUT_OF_MEMORY):
            raise ValueError(f"out of memory; {memory_advice(model_config, setting)}") from error
        if isinstance(error, torch.distributed.DistError) or (setting.num_gpus > 1 and _says(text, PEER_LOST)):
            whole = list_checkpoints(output_dir)
            last = f"; the same command goes on from {whole[-1]}" if whole else ""
            raise ValueError(
                f"another process of this run has ended or does not answer ({text[:200]}){last}"
            ) from error
        raise


def _says(text: str, signs: tuple[str, ...]) -> bool:
    return any(sign in text.lower() for sign in signs)


def memory_advice(model_config: Any, setting: Setting) -> str:
    """What a step needs by the plan of `suwen.memory`, and the cheapest changes that need less."""
    shape = shape_of(model_config)
    now = plan_memory(shape, setting).total
    half = dataclasses.replace(setting, tokens=setting.tokens // 2)
    shorter = [(f"--max_length {setting.tokens // 2}", plan_memory(shape, half).total)]
    cheaper = [(flags, plan_memory(shape, other).total) for flags, other in cheaper_settings(setting)]
    found = [f"{flags} ({total / 1e9:.2f} GB)" for flags, total in [*cheaper, *shorter] if total < 0.95 * now]
    named = f"lower it by {', or '.join(found[:ADVICE])}" if found else "take a smaller model, or more processes"
    return f"a step needs about {now / 1e9:.2f} GB a process; {named} (see tools/plan_memory.py)"

"""Failures of a training that are not its own: memory that is too small, another process that has ended."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from suwen.checkpoint import list_checkpoints
from suwen.memory import Outlook, out_of_memory_advice

OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")
PEER_LOST = ("connection closed by peer", "connection reset by peer", "broken pipe", "timed out waiting", "timeout")


@contextlib.contextmanager
def explained(output_dir: Path, outlook: Outlook | None, world_size: int) -> Iterator[None]:
    """Turn such failures into one line that says what to do.

    Args:
        outlook: the run as it was planned; None where it could not be.

    Raises:
        ValueError: that line.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or _says(text, OUT_OF_MEMORY):
            advice = out_of_memory_advice(outlook) if outlook else "lower --per_device_train_batch_size or --max_length"
            raise ValueError(f"out of memory; {advice}") from error
        if isinstance(error, torch.distributed.DistError) or (world_size > 1 and _says(text, PEER_LOST)):
            whole = list_checkpoints(output_dir)
            last = f"; the same command goes on from {whole[-1]}" if whole else ""
            raise ValueError(
                f"another process of this run has ended or does not answer ({text[:200]}){last}"
            ) from error
        raise


def _says(text: str, signs: tuple[str, ...]) -> bool:
    return any(sign in text.lower() for sign in signs)

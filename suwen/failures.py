"""Failures of a run that are not its own: memory or a disk too small, a process that has ended, float16."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from suwen.checkpoint import last_whole
from suwen.memory import out_of_memory_advice
from suwen.nonfinite import OVERFLOWS

if TYPE_CHECKING:
    from suwen.arguments import StageArguments

OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")
SCALE_AT_MINIMUM = ("loss scale already at minimum",)  # DeepSpeed's, an exception of no kind
PEER_LOST = ("connection closed by peer", "connection reset by peer", "broken pipe", "timed out waiting", "timeout")
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE}


def explain(error: BaseException, args: StageArguments) -> str | None:
    """One line that says what to do about such a failure; None for all others.

    Args:
        args: of the stage, with its plan where there is one by then.
    """
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    if _says(text, SCALE_AT_MINIMUM):
        return OVERFLOWS
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or _says(text, OUT_OF_MEMORY):
        outlook = args.outlook
        advice = out_of_memory_advice(outlook) if outlook else "lower --per_device_train_batch_size or --max_length"
        return f"out of memory; {advice}"
    output_dir, several = Path(args.run.output_dir), int(os.environ.get("WORLD_SIZE", "1")) > 1
    if isinstance(error, torch.distributed.DistError) or (
        several and isinstance(error, RuntimeError | ConnectionError) and _says(text, PEER_LOST)
    ):
        return f"another process of this run has ended or does not answer ({text[:200]}); {last_whole(output_dir)}"
    if isinstance(error, OSError) and error.errno in DISK:
        what = error.filename or "cached data (--cache_dir), logs (--logging_dir) or records (--output_dir)"
        return f"{what}: could not be written or read ({error.strerror}); {last_whole(output_dir)}"
    return None


def _says(text: str, signs: tuple[str, ...]) -> bool:
    return any(sign in text.lower() for sign in signs)

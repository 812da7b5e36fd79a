"""Going on from a checkpoint with another number of processes than it was written by."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

ENGINES = {"deepspeed": "DeepSpeed", "fsdp": "FSDP", "none": "no engine (one process, or CONFIG=ddp)"}


def engine_in_use() -> str:
    """deepspeed, fsdp or none, by what accelerate's launcher sets."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return "deepspeed"
    return "fsdp" if os.environ.get("ACCELERATE_USE_FSDP") == "true" else "none"


def engine_of(checkpoint: Path) -> str:
    """The engine whose files a checkpoint holds."""
    if any(checkpoint.glob("global_step*")):
        return "deepspeed"
    return "fsdp" if (checkpoint / "optimizer.bin").is_file() else "none"


def fit_processes(checkpoint: Path, recorded: dict[str, Any], current: dict[str, Any], engine: str) -> dict[str, Any]:
    """What a checkpoint's run would have been with the processes of this one; it is then compared as usual.

    Without an engine every process holds the whole state, and FSDP gathers it in a checkpoint, so any number goes on,
    as long as together they take as many sequences at once: then the order of the data is the same too. Only the random
    numbers of dropout are others.

    Args:
        recorded, current: see `suwen.resuming.identity`.
        engine: that of this run, see `engine_in_use`.

    Raises:
        ValueError: the engine cannot, or other sequences would come next; with the way out.
    """
    before = engine_of(checkpoint)
    if before != engine:
        raise ValueError(
            f"{checkpoint}: was written by {ENGINES[before]}, this run uses {ENGINES[engine]}; go on with the same "
            "CONFIG, or give --resume never and the checkpoint's model as --model_name_or_path to start anew from it"
        )
    was, now = recorded.get("world_size"), current.get("world_size")
    if was is None or was == now:
        return recorded
    if engine == "deepspeed":
        raise ValueError(
            f"{checkpoint}: holds parts of {was} processes, which DeepSpeed cannot spread over {now}; go on "
            f"with {was} processes (NUM_PROCESSES), or start anew from its model"
        )
    at_once = was * recorded["per_device_train_batch_size"]
    if at_once != now * current["per_device_train_batch_size"]:
        fitting = f"--per_device_train_batch_size {at_once // now}" if at_once % now == 0 else f"{was} processes"
        raise ValueError(
            f"{checkpoint}: {was} processes took {at_once} sequences at once, {now} would take "
            f"{now * current['per_device_train_batch_size']}; go on with {fitting}"
        )
    kept = ("world_size", "per_device_train_batch_size")
    return recorded | {name: current[name] for name in kept}

"""What a finished run leaves of a model: written aside, moved when it is on the disk, known by size and SHA-256."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from suwen.manifest import find_change, flush, flush_files

# What a finished run leaves of a model or an adapter, and what it says of it
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json")
RESULT = (*WEIGHTS, "run.json")


def publish_result(folder: Path, output_dir: Path) -> dict[str, Any]:
    """Put a result on the disk for good and move it to where it belongs; size and hash of each file by its name."""
    files = flush_files(folder)
    for path in result_weights(output_dir):
        if path.name not in files:  # of an earlier result in other parts
            path.unlink()
    for name in files:
        (output_dir / name).parent.mkdir(exist_ok=True)
        os.replace(folder / name, output_dir / name)
    flush(output_dir)
    return files


def result_weights(output_dir: Path) -> list[Path]:
    """Files of the model or adapter that an output folder holds as its result."""
    return sorted(path for name in WEIGHTS for path in output_dir.glob(name))


def find_result_damage(output_dir: Path, recorded: dict[str, Any]) -> str | None:
    """In what a finished run's result differs from what run.json recorded of its files.

    Weights must have their size and SHA-256. Settings may have been edited by hand: they must be there and not empty.
    """
    files = {name: entry for name, entry in recorded.items() if isinstance(entry, dict)}
    if not files:  # of an earlier version, which recorded no sizes
        return None if any(output_dir.glob(WEIGHTS[0])) else "its weights are missing"
    for name in files:
        path = output_dir / name
        if path.suffix == ".json" and not (path.is_file() and path.stat().st_size):
            return f"{name} is missing or empty"
    return find_change(output_dir, {name: entry for name, entry in files.items() if name.endswith(".safetensors")})

"""What is kept on the disk to be computed once: read as it was written, or named as damaged and made again."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import sys
import time
from pathlib import Path

import numpy as np

from suwen.manifest import MANIFEST, find_change, read_manifest, set_aside


def find_entry(folder: Path, began: float) -> bool:
    """Whether a folder that `suwen.manifest.publish` has put into the cache is there, as it was written.

    Its files are hashed, 1-2 GB a second, by one of the processes that start together; the others, which hold a lock
    for it one after another, believe what was written or verified since they began.

    Args:
        began: when this process began to prepare, in seconds since the epoch; infinite to believe no other.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():  # none, or one of an earlier version, in whose place another can be published
        return False
    if began <= manifest.stat().st_mtime <= time.time():
        return True
    try:
        damage = find_change(folder, read_manifest(folder)["files"])
    except ValueError as error:
        damage = str(error)
    if damage:
        _set_aside(folder, damage)
        return False
    now = time.time()  # of this machine, and not of one whose disk it is
    with contextlib.suppress(PermissionError):  # another user's: each process verifies
        os.utime(manifest, (now, now))
    return True


def write_array(file: Path, array: np.ndarray) -> None:
    """Write an array, its SHA-256 behind it, in one step."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    content = stream.getvalue()
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content + hashlib.sha256(content).digest())
    os.replace(temporary, file)


def read_array(file: Path) -> np.ndarray | None:
    """What `write_array` has written; None where there is none, or a damaged one was set aside."""
    if not file.is_file():
        return None
    content = file.read_bytes()
    size = len(content) - hashlib.sha256().digest_size
    if size < 0 or hashlib.sha256(content[:size]).digest() != content[size:]:
        _set_aside(file, "it does not have its SHA-256")
        return None
    return np.load(io.BytesIO(content), allow_pickle=False)


def _set_aside(entry: Path, damage: str) -> None:
    moved = set_aside([entry], entry.parent, "damaged")
    print(f"{entry}: damaged ({damage}), moved to {moved}; it is made again", file=sys.stderr, flush=True)

"""Folders that are whole or not there: every file with its size and SHA-256 in a manifest, published by one rename."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = "MANIFEST.json"
HASHING_THREADS = 4  # hashlib leaves Python's lock, and one file is flushed while another is hashed


# Writing


def publish(folder: Path, target: Path, about: dict[str, Any]) -> None:
    """Put everything on the disk for good, say in the manifest what it is, and give the folder its name."""
    content = {**about, "files": flush_files(folder)}
    manifest = folder / MANIFEST
    manifest.write_text(
        json.dumps({**content, "manifest_sha256": _digest(content)}, ensure_ascii=False, indent=1) + "\n", "utf-8"
    )
    for path in (manifest, *(p for p in folder.rglob("*") if p.is_dir()), folder):
        flush(path)
    replaced = hide(target) if target.exists() else None
    os.rename(folder, target)
    flush(target.parent)
    if replaced:
        shutil.rmtree(replaced)


def flush_files(folder: Path) -> dict[str, Any]:
    """Size and hash of each file below a folder, all of which are on the disk then."""
    files = files_below(folder)
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        hashes = list(pool.map(_hash_and_flush, files))
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256}
        for path, sha256 in zip(files, hashes, strict=True)
    }


def hide(path: Path) -> Path:
    """A folder that is about to be deleted no longer has the name of a checkpoint."""
    hidden = path.with_name(f".deleting-{path.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    return path.rename(hidden)


def _hash_and_flush(path: Path) -> str:
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    return sha256


def flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # network file systems that cannot flush folders
            raise
    finally:
        os.close(descriptor)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# Reading


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: it is missing, or not as it was written.
    """
    try:
        content = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        known = content.pop("manifest_sha256")
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"{MANIFEST} is damaged") from None
    if _digest(content) != known:
        raise ValueError(f"{MANIFEST} is damaged")
    return content


def find_damage(checkpoint: Path) -> str | None:
    """In what a checkpoint differs from its manifest: the first missing, additional, cut or changed file."""
    if not checkpoint.is_dir():
        return "there is no such folder"
    try:
        recorded = read_manifest(checkpoint)["files"]
    except ValueError as error:
        return str(error)
    found = {path.relative_to(checkpoint).as_posix(): path for path in files_below(checkpoint)}
    del found[MANIFEST]
    for name in sorted(found):
        if name not in recorded or found[name].is_symlink():
            return f"{name} is not in its manifest"
    return find_change(checkpoint, recorded)


def find_change(folder: Path, recorded: dict[str, Any]) -> str | None:
    """The first of the recorded files that is missing, cut or changed."""
    names = sorted(recorded)
    for name in names:
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (size := (folder / name).stat().st_size) != recorded[name]["bytes"]:
            return f"{name} has {size:,} bytes, not {recorded[name]['bytes']:,}"
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        for name, sha256 in zip(names, pool.map(_hash, [folder / name for name in names]), strict=True):
            if sha256 != recorded[name]["sha256"]:
                return f"{name} does not have its SHA-256"
    return None


def _hash(path: Path) -> str | None:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:  # a bad sector is damage like any other
        return None


def set_aside(paths: Sequence[Path], output_dir: Path, label: str) -> Path:
    """Move checkpoints or files out of the way, into a folder of their own; nothing is deleted."""
    name = f"{label}-{time.strftime('%Y%m%d-%H%M%S')}"
    target, number = output_dir / name, 1
    while target.exists():
        number += 1
        target = output_dir / f"{name}-{number}"
    target.mkdir(parents=True)
    for path in paths:
        path.rename(target / path.name)
    return target

"""Checkpoints, whole or not there: written aside, hashed, published by one rename, verified before they are used.

A save goes into `.unfinished/checkpoint-N` in the output folder, which is the same disk. When every rank has written
its part, each file is hashed and flushed to the disk, MANIFEST.json is written, and one rename makes it `checkpoint-N`;
older ones are deleted only then. So a process that is killed at any moment leaves whole checkpoints and perhaps an
unfinished one, never half of one under its final name. All ranks must see the same disk.

Weights are safetensors. Optimizer, schedule and random states are written by the library as pickles and read without
their code (`weights_only`); DeepSpeed reads its state, which holds weights too, with it. So a run goes on only from
below its own output folder, and only after the manifest has verified. That tells damage; it is no signature: who can
write into the output folder of a run under DeepSpeed can make that run execute code.

The result of a run is written the same way; its sizes and hashes are in run.json, which says finished only then.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from suwen.manifest import files_below, find_damage, hide, publish, read_manifest, set_aside
from suwen.results import RESULT

UNFINISHED = ".unfinished"
SPARE_SPACE = 1.05  # of what a checkpoint is expected to take
TORCH_WRITER = (
    "iostream",
    "pytorchstreamwriter",
    "inline_container",
    "cannot be opened",
    "parent directory",
)  # its RuntimeErrors


class Unlike(RuntimeError):
    """What is in a file is not what is in memory."""


# Writing


class Saves:
    """The checkpoints that a run writes: all ranks write and wait, then one of them publishes while they go on.

    Hashing and flushing take as long as writing does; the training does not stand still for them.
    """

    def __init__(self, output_dir: Path, main: bool = True, wait: Callable[[], object] = lambda: None) -> None:
        """
        Args:
            main: this rank makes the folders and publishes them.
            wait: returns when all ranks have called it.
        """
        self.output_dir, self.main, self.wait = output_dir, main, wait
        self.saved_step: int | None = None
        self._publisher = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def save(
        self,
        step: int,
        write: Callable[[Path], None],
        about: dict[str, Any],
        *,
        needed_bytes: int = 0,
        limit: int | None = None,
        keep: Collection[int] = (),
    ) -> None:
        """Write a checkpoint, and begin to publish it; every rank takes part. A step is saved once.

        Args:
            write: fills the folder that it is given with this rank's part.
            about: what the manifest says beside step and files.
            needed_bytes: what the checkpoint is expected to take, if it is more than the last one took.
            limit: so many checkpoints are kept; None for all.
            keep: steps whose checkpoints are kept beside them.

        Raises:
            ValueError: the disk is full, or does not take the files; older checkpoints are untouched.
        """
        if step == self.saved_step:  # at its end, and again at the end of the epoch that a signal has cut short
            return
        folder = self.output_dir / UNFINISHED / f"checkpoint-{step}"
        self.finish()
        with self._explained(step):
            if self.main:
                remove_unfinished(self.output_dir)
                folder.mkdir(parents=True)
                last = list_checkpoints(self.output_dir)[-1:]
                taken = sum(path.stat().st_size for path in files_below(last[0])) if last else 0
                require_space(self.output_dir, max(needed_bytes, taken))
            self.wait()
            write(folder)
            self.wait()
        self.saved_step = step
        if self.main:
            self._pending = self._publisher.submit(self._publish, folder, {"step": step, **about}, limit, keep)

    def finish(self) -> None:
        """Wait until the last checkpoint is published.

        Raises:
            ValueError: the disk did not take it.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _publish(self, folder: Path, about: dict[str, Any], limit: int | None, keep: Collection[int]) -> None:
        with self._explained(about["step"]):
            publish(folder, self.output_dir / folder.name, about)
            shutil.rmtree(folder.parent, ignore_errors=True)
            rotate(self.output_dir, limit, keep)

    def _explained(self, step: int) -> contextlib.AbstractContextManager[None]:
        return explained_writing(self.output_dir, f"step {step}: the checkpoint", self.main)


@contextlib.contextmanager
def explained_writing(output_dir: Path, what: str, main: bool) -> Iterator[None]:
    """Around a save: where the disk does not take it, what was written is removed, and a line says what remains.

    Raises:
        ValueError: that line. A lost peer or memory that is too small is no matter of the disk, and left as it is.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        of_writer = isinstance(error, Unlike) or any(sign in str(error).lower() for sign in TORCH_WRITER)
        if isinstance(error, ConnectionError) or (isinstance(error, RuntimeError) and not of_writer):
            raise
        free = f"{shutil.disk_usage(output_dir).free / 1e9:.2f} GB are free"
        if main:
            shutil.rmtree(output_dir / UNFINISHED, ignore_errors=True)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{what} could not be written ({reason}; {free}); {last_whole(output_dir)}") from error


def last_whole(output_dir: Path) -> str:
    """What a run that has to end can be told of its checkpoints."""
    whole = list_checkpoints(output_dir)
    if not whole:
        return "there is no checkpoint yet"
    return f"the last whole checkpoint is {whole[-1]}, the same command goes on from it"


def require_space(output_dir: Path, needed_bytes: int) -> None:
    """
    Raises:
        OSError: the disk has less room than that.
    """
    free = shutil.disk_usage(output_dir).free
    if free < SPARE_SPACE * needed_bytes:
        raise OSError(errno.ENOSPC, f"needs {needed_bytes / 1e9:.2f} GB on the disk of {output_dir}")


def rotate(output_dir: Path, limit: int | None, keep: Collection[int] = ()) -> None:
    """Delete all but the newest `limit` checkpoints and those of the steps to `keep`; the newest always stays."""
    checkpoints = list_checkpoints(output_dir)
    for path in checkpoints[: -limit if limit and limit > 0 else 0]:
        if named_step(path) not in keep:
            _delete(path)


def remove_unfinished(output_dir: Path) -> list[str]:
    """Delete what a killed process left of a save or of a deletion; the names of the saves."""
    left = sorted(path.name for path in (output_dir / UNFINISHED).glob("checkpoint-*"))
    for path in (output_dir / UNFINISHED, *output_dir.glob(".deleting-*")):
        shutil.rmtree(path, ignore_errors=True)
    return left


def _delete(path: Path) -> None:
    shutil.rmtree(hide(path))


# Reading


def named_step(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[-1])


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Folders that have the name of a checkpoint, by step."""
    found = [p for p in output_dir.glob("checkpoint-*") if p.is_dir() and p.name.rsplit("-", 1)[-1].isdigit()]
    return sorted(found, key=named_step)


def checkpoint_step(checkpoint: Path) -> int:
    """Optimiser steps behind a checkpoint."""
    return int(read_manifest(checkpoint)["step"])


def find_checkpoint(output_dir: Path, resume: str) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, verified, and the lines that say what was found; for one process to call.

    Args:
        resume: auto (newest that verifies; damaged ones before it are set aside), never (all are set aside, and the
            result of the earlier run with them), or a checkpoint folder below `output_dir` (later ones are set aside).

    Raises:
        ValueError: the folder given is no whole checkpoint, or is not of this run's own.
    """
    lines = [f"{name}: its save was cut short, removed" for name in remove_unfinished(output_dir)]
    checkpoints = list_checkpoints(output_dir)
    if resume == "never":
        # weights of both runs would be taken for one model, where only one of them is an adapter
        if earlier := checkpoints + sorted(path for name in RESULT for path in output_dir.glob(name)):
            moved = set_aside(earlier, output_dir, "earlier")
            lines.append(f"--resume never: checkpoints and weights of the earlier run moved to {moved}")
        return None, lines
    if resume == "auto":
        damaged = []
        while checkpoints and (damage := find_damage(checkpoints[-1])):
            damaged.append(checkpoints.pop())
            lines.append(f"{damaged[-1].name}: damaged, not used ({damage})")
        if damaged:
            lines.append(f"damaged checkpoints moved to {set_aside(damaged, output_dir, 'damaged')}")
        chosen = checkpoints[-1] if checkpoints else None
    else:
        chosen = Path(resume)
        if damage := find_damage(chosen):
            raise ValueError(
                f"--resume {resume}: found no whole checkpoint there ({damage}), expected auto, never or a "
                "checkpoint-N folder"
            )
        if not chosen.resolve().is_relative_to(output_dir.resolve()):
            raise ValueError(
                f"--resume {resume}: is not below --output_dir {output_dir}; optimizer states are pickles, which are "
                "read from a run's own folder alone"
            )
        later = [p for p in checkpoints if named_step(p) >= checkpoint_step(chosen) and not p.samefile(chosen)]
        if later:
            lines.append(f"checkpoints that are not behind it moved to {set_aside(later, output_dir, 'later')}")
    return chosen, lines


def identity_difference(recorded: dict[str, Any], current: dict[str, Any]) -> str | None:
    """The arguments in which a checkpoint's run differs from this one, as a line; None if there is none."""
    names = sorted(recorded.keys() | current.keys())
    found = [f"{n} was {recorded.get(n)!r}, is {current.get(n)!r}" for n in names if recorded.get(n) != current.get(n)]
    return "; ".join(found) or None

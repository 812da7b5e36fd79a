"""One run in an output folder at a time; and no waiting for a lock that nobody holds."""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import os
import platform
import sys
import time
from pathlib import Path
from typing import TextIO

LOCK = ".lock"
_held: dict[Path, TextIO] = {}


def hold(output_dir: Path) -> None:
    """Hold an output folder until this process ends, however it ends; held already, it stays held.

    The kernel drops the lock of a dead process, so that there are no stale ones. POSIX record locks and not flock:
    they are not inherited by worker processes, which may outlive a run that is killed, and they work over NFS. A
    process that ends by itself removes the file; one that has opened it meanwhile finds that it holds another's.

    Raises:
        ValueError: another process holds the folder.
    """
    path = (output_dir / LOCK).resolve()
    if path in _held:
        return
    while True:
        file = open(path, "a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                print(f"note: {output_dir} is on a disk without locks ({error.strerror})", file=sys.stderr, flush=True)
                return
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise ValueError(
                f"--output_dir {output_dir}: in use by {owner}; wait for it, or give another --output_dir"
            ) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        file.close()  # removed by its holder between the two lines above
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    _held[path] = file
    atexit.register(_release, path, os.getpid())


def _release(path: Path, holder: int) -> None:
    if os.getpid() == holder:  # not a worker that was forked
        with contextlib.suppress(OSError):
            path.unlink()


def refuse_abandoned_builds(folder: Path) -> None:
    """Look for locks that builds of torch extensions have left.

    DeepSpeed's operators are built when they are first used, by one process while the others wait until its lock file
    is gone (torch.utils.file_baton). Of a build that is killed it stays: every later run would wait without end.

    Args:
        folder: TORCH_EXTENSIONS_DIR, or torch's default.

    Raises:
        ValueError: a lock that no process of this machine has open.
    """
    for lock in sorted(folder.glob("**/lock")):
        if Path("/proc/self/fd").is_dir() and not _is_open(lock):
            raise ValueError(
                f"{lock}: left by a build of DeepSpeed's operators that was killed, a training would wait for it for "
                "ever; remove it, unless another machine is building in this folder"
            )


def _is_open(path: Path) -> bool:
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            if os.readlink(descriptor) == str(path.resolve()):
                return True
    return not path.exists()  # released while we looked

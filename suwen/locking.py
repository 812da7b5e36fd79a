"""One run in an output folder at a time."""

from __future__ import annotations

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
    they are not inherited by worker processes, which may outlive a run that is killed, and they work over NFS.

    Raises:
        ValueError: another process holds the folder.
    """
    path = (output_dir / LOCK).resolve()
    if path in _held:
        return
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
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    _held[path] = file

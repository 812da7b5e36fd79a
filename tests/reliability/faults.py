"""Ways to harm a run from within its process: each is called with the output folder before the stage."""

from __future__ import annotations

import importlib
import os
import resource
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from suwen.checkpoint import Saves

PUBLISHING = ("suwen/checkpoint.py", "suwen/manifest.py")
WATCHED = (
    *PUBLISHING,
    "suwen/trainers.py",
    "transformers/trainer.py",
    "torch/serialization.py",
    "/shutil.py",
)


@dataclass(frozen=True)
class KillInSave:
    """`kill -9` in the save of a step, at the first moment at which so many files are there, or at a call.

    Attributes:
        files: in the unfinished folder; 0 to wait for a call alone.
        call: name of a function of `suwen.checkpoint` or `suwen.manifest`, or of a built-in that it calls.
    """

    step: int
    files: int = 0
    call: str = ""

    def __call__(self, output: Path) -> None:
        aside, target = output / ".unfinished" / f"checkpoint-{self.step}", output / f"checkpoint-{self.step}"

        def look(frame, event, argument) -> None:
            file = frame.f_code.co_filename
            if not file.endswith(WATCHED) or not (aside.exists() or target.exists()):
                return
            if self.call:
                reached = event == "c_call" and argument.__name__ == self.call and file.endswith(PUBLISHING)
                reached |= event == "call" and frame.f_code.co_name == self.call
            else:
                reached = sum(path.is_file() for path in aside.rglob("*")) >= self.files
            if reached:
                os.kill(os.getpid(), signal.SIGKILL)

        whole = Saves.save

        def save(saves: Saves, step: int, *args, **kwargs) -> None:
            if step == self.step:  # not before: a look at every call makes a run several times slower
                sys.setprofile(look)
            whole(saves, step, *args, **kwargs)

        Saves.save = save
        threading.setprofile(look)  # of the thread that publishes, which is not there yet


@dataclass(frozen=True)
class LargestFile:
    """No file may become larger: what a full disk or a quota does to one that is being written."""

    limit_bytes: int

    def __call__(self, output: Path) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit_bytes, self.limit_bytes))


@dataclass(frozen=True)
class FullFrom(LargestFile):
    """The same from the first call of a function on, in the process and its threads.

    Attributes:
        module, function: the place where it is called from, and its name there; a method with its class.
    """

    module: str
    function: str

    def __call__(self, output: Path) -> None:
        owner = importlib.import_module(self.module)
        *names, last = self.function.split(".")
        for name in names:
            owner = getattr(owner, name)
        whole = getattr(owner, last)

        def limited(*args, **kwargs):
            LargestFile.__call__(self, output)
            return whole(*args, **kwargs)

        setattr(owner, last, limited)


def drop_root(output: Path) -> None:
    """Permissions do not hold for root."""
    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)

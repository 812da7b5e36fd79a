"""SIGTERM and SIGINT end a training at its next whole step, with a checkpoint."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from suwen.checkpoint import last_whole
from suwen.progress import main_process, say

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME_SIGNAL_SECONDS = 3.0  # a launcher passes on what its processes have got from the terminal or the scheduler already


class BrokenOff(Exception):
    """A signal came in the middle of `StopSignals.breaking_off`."""


class StopSignals:
    """Notes the first signal while it is entered; a second one ends the process as if it were not entered.

    Attributes:
        received: number of the signal; 0 where none came.
    """

    def __init__(self) -> None:
        self.received = 0
        self._at = 0.0
        self._before: dict[int, Any] = {}
        self._breaks_off = False

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    @contextmanager
    def breaking_off(self) -> Iterator[None]:
        """A signal raises BrokenOff at once, for work beside the training that need not be finished."""
        self._breaks_off = True
        try:
            yield
        finally:
            self._breaks_off = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            if time.monotonic() - self._at > SAME_SIGNAL_SECONDS:
                self._restore()
                os.kill(os.getpid(), number)
            return
        self.received, self._at = number, time.monotonic()
        if main_process():  # not by print, whose buffer may be in use at this moment
            name = signal.Signals(number).name
            os.write(1, f"\n{name}: stopping after this step, with a checkpoint; once more to stop at once\n".encode())
        if self._breaks_off:
            raise BrokenOff("broken off by a signal")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self) -> int:
        """The signal that any rank has received, 0 where none has; every rank takes part."""
        if not torch.distributed.is_initialized():
            return self.received
        received: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(received, self.received)
        return max(received)

    def leave(self, step: int, output_dir: Path) -> None:
        """End the process with the code that shells give for the signal (143, 130), if one came to any rank.

        Every rank takes part: one that left alone would have the others wait for it.
        """
        if received := self.agreed():
            say(f"stopped at step {step} by {signal.Signals(received).name}; {last_whole(output_dir)}")
            raise SystemExit(128 + received)

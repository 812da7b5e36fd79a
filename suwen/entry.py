"""How a stage's script begins, before torch is loaded, and how it ends where something else fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from suwen.arguments import StageArguments, parse_stage_arguments


def stage_main(
    stage: str, description: str | None, defaults: dict[str, Any], own: type | None = None
) -> Callable[[Callable[[StageArguments], None]], Callable[..., None]]:
    """Make a stage's work the main of its script: with its command line parsed, see `parse_stage_arguments`.

    Failures that are not the run's own (`suwen.failures`) become a ValueError, wherever in the work they come.
    """

    def decorate(work: Callable[[StageArguments], None]) -> Callable[..., None]:
        def main(argv: list[str] | None = None) -> None:
            args = parse_stage_arguments(argv, stage, description or "", defaults, own)
            try:
                work(args)
            except ValueError:
                raise
            except Exception as error:  # DeepSpeed raises some of no kind
                from suwen.failures import explain  # loads torch

                if line := explain(error, args):
                    raise ValueError(line) from error
                raise

        return main

    return decorate

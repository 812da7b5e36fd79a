"""Benchmarks that a training asks the model in its hands: every so many steps, and at its end (--eval_tasks)."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from suwen.arguments import RunArguments, StageArguments
from suwen.encoding import ChatEncoder
from suwen.evaluate import Settings, compare_stage, evaluate_stage, find_task_files, parse_tasks
from suwen.generation import model_window
from suwen.interruption import BrokenOff
from suwen.progress import main_process, say
from suwen.readers import first_line
from suwen.rescale import ENGINES
from suwen.serving import THINKING, Served

EVALUATION = Path(__file__).resolve().parents[1] / "evaluation.py"
# By these a process knows that it is one of several; one that is alone must not find them.
LAUNCHED = (
    "ACCELERATE_", "FSDP_", "TORCHELASTIC_", "ROLE_", "GROUP_", "MASTER_", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "RANK",
    "WORLD_SIZE",
)  # fmt: skip


def check_tasks(run: RunArguments, trains: bool, engine: str) -> None:
    """Refuse, before anything is loaded, benchmarks that could not be asked.

    Args:
        engine: of the training, a key of `suwen.rescale.ENGINES`.

    Raises:
        ValueError: unknown tasks, missing files, no training, or steps under an engine that spreads the weights.
    """
    if not run.eval_tasks:
        return
    for task in parse_tasks(run.eval_tasks, flag="--eval_tasks"):
        find_task_files(task, run.eval_data_dir, {}, "--eval_data_dir")
    if not trains:
        raise ValueError(
            "--eval_tasks: asks what a training has made, and --do_train is off; expected "
            "python evaluation.py --base_model MODEL --tasks ..."
        )
    if run.eval_tasks_steps and engine != "none":
        raise ValueError(
            f"--eval_tasks_steps: {ENGINES[engine]} spreads the weights over the processes while it trains; expected "
            "CONFIG=ddp or a single process, or python evaluation.py --base_model OUTPUT/checkpoint-N afterwards"
        )


def steps_asked(output: Path) -> list[Path]:
    """Evaluations of steps, the earliest first."""
    folders = [folder for folder in (output / "eval").glob("step-*") if folder.name[5:].isdigit()]
    return sorted(folders, key=lambda folder: int(folder.name[5:]))


def forget_steps_after(output: Path, step: int) -> None:
    """Remove evaluations of steps that are still to come: of a run that was given up, or went on from earlier."""
    for folder in steps_asked(output):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)


def ask_tasks(trainer: Any, args: StageArguments, start: str, step: int | None = None) -> dict[str, Any]:
    """Ask the model the benchmarks of --eval_tasks, and compare it with its start and with earlier steps.

    Args:
        trainer: holds model and tokenizer, whole; on the main process alone.
        step: of a training that goes on; None at its end. The results are in eval/step-N or in eval.

    Returns:
        results.json.
    """
    run, output = args.run, Path(args.run.output_dir)
    model = trainer.accelerator.unwrap_model(trainer.model)
    served = Served(
        model, ChatEncoder(trainer.processing_class, THINKING[args.data.thinking]), [str(output)], model_window(model)
    )
    before, steps, folder = Path(start) / "eval", steps_asked(output), output / "eval"
    if step is not None:  # the start and the step before say enough on the way
        folder = folder / f"step-{step}"
        steps = [other for other in steps if other != folder][-1:]
    training = model.training
    model.eval()
    try:
        found = evaluate_stage(
            str(output), run.eval_tasks or "", folder, [before, *steps], run.eval_data_dir, None,
            Settings(max_samples=run.eval_task_samples), served, step,
        )  # fmt: skip
    finally:
        model.train(training)
    return found["results"]


def ask_result(trainer: Any, args: StageArguments, start: str) -> None:
    """Ask what a training has made, on the main process, once everything is saved and the processes have parted."""
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        ask_apart(args, start)
    else:
        ask_tasks(trainer, args, start)


def ask_apart(args: StageArguments, start: str) -> None:
    """Ask the saved result in a process of its own: here the engine still holds a share of the weights alone.

    Raises:
        ValueError: evaluation.py failed, with the command that goes on from there.
    """
    run, output = args.run, Path(args.run.output_dir)
    command = [sys.executable, str(EVALUATION), "--base_model", str(output), "--tasks", run.eval_tasks or ""]
    command += ["--output_dir", str(output / "eval")]
    for flag, value in (("--data_dir", run.eval_data_dir), ("--max_samples", run.eval_task_samples)):
        command += [flag, str(value)] if value is not None else []
    environment = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHED)}
    if code := subprocess.run(command, env=environment, check=False).returncode:
        raise ValueError(f"--eval_tasks: the result is saved, asking it ended with code {code}: {shlex.join(command)}")
    compare_stage(output / "eval", [Path(start) / "eval"])


def ask_saved(args: StageArguments, start: str) -> None:
    """The same of a training that has finished before: what it saved is loaded."""
    run, output = args.run, Path(args.run.output_dir)
    settings = Settings(max_samples=run.eval_task_samples)
    earlier = [Path(start) / "eval", *steps_asked(output)]
    evaluate_stage(str(output), run.eval_tasks or "", output / "eval", earlier, run.eval_data_dir, None, settings)


def ask_at_step(trainer: Any, args: StageArguments, start: str, step: int) -> dict[str, float]:
    """`ask_tasks` of the main process while the training goes on, which no mishap here may end.

    Returns:
        what is to be logged: the headline of each task and mode, and the seconds that it took.
    """
    if (Path(args.run.output_dir) / "eval" / f"step-{step}" / "results.json").is_file():
        return {}  # asked before the run was stopped
    began = time.perf_counter()
    tasks: dict[str, Any] = {}
    try:
        with trainer.signals.breaking_off():
            tasks = ask_tasks(trainer, args, start, step)["tasks"]
    except (ValueError, torch.OutOfMemoryError, BrokenOff) as error:
        say(f"step {step}: not asked ({first_line(error)})")
    found = {
        f"eval_{name}_{mode}": summary["metrics"][entry["headline"]]["value"]
        for name, entry in tasks.items()
        for mode, summary in entry["modes"].items()
    }
    return found | {"eval_runtime": time.perf_counter() - began}


class AskTasks(TrainerCallback):
    """Asks every --eval_tasks_steps optimiser steps, after what there is to save of a step has been saved.

    The main process asks while the others wait. Answers are greedy, so that no random number of the training changes.
    """

    def __init__(self, trainer: Any, args: StageArguments, start: str) -> None:
        self.trainer, self.args, self.start = trainer, args, start

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if main_process():
            forget_steps_after(Path(self.args.run.output_dir), state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        steps = self.args.run.eval_tasks_steps
        if not steps or not state.global_step or state.global_step % steps:
            return
        if main_process() and (logs := ask_at_step(self.trainer, self.args, self.start, state.global_step)):
            self.trainer.log(logs)
        self.trainer.accelerator.wait_for_everyone()

"""Stages in processes of their own, one that may be killed or several ranks; their libraries are loaded already."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

SCRIPTS = {
    "pt": "pretraining", "sft": "supervised_finetuning", "dpo": "dpo_training", "orpo": "orpo_training",
    "rm": "reward_modeling", "ppo": "ppo_training",
}  # fmt: skip
CONFIGS = Path(__file__).parents[1] / "configs"

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    "suwen.stage suwen.reinforcement suwen.trainers suwen.models suwen.data suwen.rows suwen.embedded".split()
    + ["torch._dynamo"]
)


def run(stage: str, command: list[str]) -> None:
    importlib.import_module(SCRIPTS[stage]).main(command)


def _in_child(
    stage: str,
    command: list[str],
    log: Path,
    before: Callable[[Path], None] | None,
    output: Path,
    variables: dict[str, str],
) -> None:
    from suwen.command_line import run as run_main

    os.setsid()
    os.environ.update(variables)
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    if before is not None:
        before(output)
    run_main(lambda: run(stage, command))


class Started:
    """A stage in a process of its own, as its script runs it."""

    def __init__(
        self,
        stage: str,
        command: list[str],
        output: Path,
        before: Callable[[Path], None] | None = None,
        variables: dict[str, str] | None = None,
    ) -> None:
        """`before` is called in the process before the stage; `variables` are put into its environment."""
        output.parent.mkdir(parents=True, exist_ok=True)
        variables = variables or {}
        self.log = output.with_name(f"{output.name}{variables.get('RANK', '')}.log")
        self.process = _context.Process(target=_in_child, args=(stage, command, self.log, before, output, variables))
        self.process.start()

    def wait(self, timeout: float = 300.0) -> int:
        """Exit code; minus the signal where one has ended it."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"hangs: {self.text()[-2000:]}")
        return self.process.exitcode

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""


def run_ranks(
    stage: str,
    command: list[str],
    output: Path,
    config: str,
    count: int = 2,
    before: Callable[[Path], None] | None = None,
    code: int = 0,
) -> list[str]:
    """Run a stage in `count` ranks under configs/CONFIG.yaml, as configs/launch.sh does on the CPU; FSDP2 too.

    Args:
        before: called in each rank before the stage, instead of what admits FSDP2 on the CPU.
        code: with which all ranks must end.

    Returns:
        The output of each rank.
    """
    variables = _variables(config, count)
    if "ACCELERATE_USE_DEEPSPEED" in variables:
        command, variables["DS_ACCELERATOR"] = [*command, "--ddp_backend", "gloo"], "cpu"
    else:
        variables["ACCELERATE_USE_CPU"] = "true"
    ranks = [
        Started(stage, command, output, before or _admit_fsdp, variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]
    deadline = time.monotonic() + 400  # DeepSpeed compiles its part for the CPU the first time
    while any(rank.process.is_alive() for rank in ranks):
        if any(rank.process.exitcode not in (None, 0, code) for rank in ranks):
            break
        if time.monotonic() > deadline:
            break
        ranks[0].process.join(0.1)
    codes = [rank.process.exitcode for rank in ranks]
    for rank in ranks:
        rank.process.kill()
        rank.process.join()
    assert codes == [code] * count, "\n".join(f"code {rank.process.exitcode}: {rank.text()[-3000:]}" for rank in ranks)
    return [rank.text() for rank in ranks]


def _variables(config: str, count: int) -> dict[str, str]:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    words = ["--config_file", str(CONFIGS / f"{config}.yaml"), "--num_processes", str(count), "--num_machines", "1"]
    if (engine := CONFIGS / f"{config}.json").is_file():
        words += ["--deepspeed_config_file", str(engine)]
    args, file, _ = _validate_launch_command(launch_command_parser().parse_args([*words, "none.py"]))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(file.deepspeed_config)
    found = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {name: value for name, value in found.items() if os.environ.get(name) != value} | {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }


def _admit_fsdp(output: Path) -> None:
    """Let accelerate use FSDP2 on the CPU; its code for it and torch's run on gloo.

    Its state class (state.py, `elif self.distributed_type in [MULTI_GPU, ...]`) admits accelerators alone, and leaves
    processes on the CPU with DDP.
    """
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    begin = AcceleratorState.__init__

    def admitted(self, *args, fsdp_plugin=None, **kwargs) -> None:
        begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # as accelerate does at its end

    AcceleratorState.__init__ = admitted

"""One of two processes dies, or the launcher is told to end: no hang, a message, and the last checkpoint is whole."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import trials
from processes import run_ranks

from suwen.checkpoint import list_checkpoints, named_step
from suwen.interruption import StopSignals
from suwen.manifest import find_damage
from suwen.trainers import PackedTrainer

pytestmark = [pytest.mark.training, pytest.mark.distributed]
ROOT = Path(__file__).parents[2]


def start(folder: Path, stage: str, *more: str) -> tuple[subprocess.Popen, Path]:
    base, data = trials.build_base(folder / "base"), trials.write_rows(folder / "rows.jsonl", stage)
    command = trials.words(stage, base, data, folder / "out", "--max_steps", "400", "--save_steps", "2", *more)
    launcher = [
        sys.executable,
        str(ROOT / "configs" / "launch.py"),
        "--config_file",
        str(ROOT / "configs" / "ddp.yaml"),
    ]
    launcher += ["--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    launcher += [str(ROOT / f"{trials.SCRIPTS[stage]}.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    log = open(folder / "log", "w")
    process = subprocess.Popen(
        [*launcher, *command], env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    deadline = time.monotonic() + 300
    while not list_checkpoints(folder / "out"):
        assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
        time.sleep(0.05)
    return process, folder / "log"


def ranks(process: subprocess.Popen, script: str) -> dict[str, psutil.Process]:
    """The training processes of a launcher by rank."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        if script in " ".join(child.cmdline()) and "RANK" in (environment := child.environ()):
            found[environment["RANK"]] = child
    return found


def end(process: subprocess.Popen, log: Path, timeout: float) -> int:
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"hangs: {log.read_text()[-3000:]}") from None


@pytest.mark.parametrize("rank", ["1", pytest.param("0", marks=pytest.mark.slow)])
def test_when_one_of_two_ranks_dies_the_other_ends_with_a_message_within_a_minute(rank, tmp_path, ledger):
    ledger.inject("kill -9 of one rank of two")
    process, log = start(tmp_path, "sft")
    ranks(process, "supervised_finetuning.py")[rank].kill()
    code = end(process, log, timeout=60)
    text = log.read_text()
    assert code == 137 and f"the process of rank {rank} ended with code 137" in text, text[-3000:]
    whole = list_checkpoints(tmp_path / "out")
    assert whole and all(find_damage(path) is None for path in whole)
    ledger.add("kill -9 of one rank of two")


def test_a_signal_to_the_launcher_stops_both_ranks_after_the_same_step(tmp_path, ledger):
    ledger.inject("SIGTERM to the launcher of two ranks")
    process, log = start(tmp_path, "sft")
    process.send_signal(signal.SIGTERM)
    code = end(process, log, timeout=90)
    text = log.read_text()
    assert code == 143 and "by SIGTERM; the last whole checkpoint is " in text, text[-3000:]
    newest = list_checkpoints(tmp_path / "out")[-1]
    assert find_damage(newest) is None and f"stopped at step {named_step(newest)} by SIGTERM" in text
    assert sorted(path.name for path in newest.glob("rng_state*")) == ["rng_state_0.pth", "rng_state_1.pth"]
    ledger.add("SIGTERM to the launcher of two ranks", lost_steps=0)


def signal_one_rank_in_its_last_step(output: Path) -> None:
    """In rank 1 alone a SIGTERM comes, when the ranks have already asked one another in the only step."""
    ask = PackedTrainer._get_num_items_in_batch

    def then_signal(trainer, *args):
        found = ask(trainer, *args)
        signal_rank_1()
        return found

    PackedTrainer._get_num_items_in_batch = then_signal


def signal_one_rank_behind_its_training(output: Path) -> None:
    noted = StopSignals.__exit__

    def signal_then_exit(signals, *error):
        signal_rank_1()
        noted(signals, *error)

    StopSignals.__exit__ = signal_then_exit


def signal_rank_1() -> None:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("stage", "when", "flags"),
    [
        ("sft", signal_one_rank_in_its_last_step, ("--save_strategy", "no")),
        ("ppo", signal_one_rank_behind_its_training, ()),
    ],
    ids=["sft, in the last step", "ppo, behind it"],
)
def test_a_signal_that_one_rank_gets_at_the_end_stops_both_with_a_checkpoint(stage, when, flags, tmp_path, ledger):
    ledger.inject("SIGTERM to one rank of two at the end")
    base, data = trials.build_base(tmp_path / "base"), trials.write_rows(tmp_path / "rows.jsonl", stage)
    output = tmp_path / "out"
    command = trials.words(stage, base, data, output, "--max_steps", "1", *flags)
    told, silent = run_ranks(stage, command, output, "ddp", before=when, code=143)
    newest = output / "checkpoint-1"
    assert f"stopped at step 1 by SIGTERM; the last whole checkpoint is {newest}, the same command" in told
    assert "stopped at" not in silent and find_damage(newest) is None
    ledger.add("SIGTERM to one rank of two at the end", lost_steps=0)


def test_two_ranks_agree_on_what_is_damaged_in_the_cache_and_train_as_without_it(tmp_path):
    base, data = trials.build_base(tmp_path / "base"), trials.write_rows(tmp_path / "rows.jsonl", "dpo")
    results = []
    for name in ("whole", "damaged"):
        command = trials.words("dpo", base, data, tmp_path / name, "--max_steps", "1")
        told = "".join(run_ranks("dpo", command, tmp_path / name, "ddp"))
        results.append(trials.weights_sha256(tmp_path / name))
        assert told.count("it is made again") == (2 if name == "damaged" else 0), told
        for file in (*tmp_path.glob("rows.jsonl.cache/*/train.arrow"), *tmp_path.glob("rows.jsonl.cache/*.logps")):
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
    assert results[0] == results[1]

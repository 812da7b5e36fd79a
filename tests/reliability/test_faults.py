"""Faults injected into real runs: each is survived, or ends in one clear line with the last checkpoint whole."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
import trials
from faults import FullFrom, KillInSave, LargestFile, drop_root

from suwen.checkpoint import find_checkpoint, list_checkpoints, named_step
from suwen.manifest import files_below, find_damage

pytestmark = pytest.mark.training
LORA = ("--use_peft", "True", "--lora_dropout", "0.1")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return trials.build_base(tmp_path_factory.mktemp("base"))


class Reference:
    """An uninterrupted run and its command for another folder."""

    def __init__(self, folder: Path, stage: str, base: str, *flags: str) -> None:
        self.stage, self.base, self.flags, self.output = stage, base, flags, folder / "whole"
        self.data = trials.write_rows(folder / "rows.jsonl", stage)
        trials.run(stage, self.words(self.output))
        self.sha256 = trials.weights_sha256(self.output)

    def words(self, output: Path, *more: str) -> list[str]:
        return trials.words(self.stage, self.base, self.data, output, *self.flags, *more)

    def start(self, output: Path, *more: str, before=None) -> trials.Started:
        return trials.Started(self.stage, self.words(output, *more), output, before)

    def finish(self, output: Path, *more: str) -> None:
        """Give the same command again: it must end with the very weights of the uninterrupted run."""
        started = self.start(output, *more)
        assert started.wait() == 0, started.text()[-3000:]
        assert trials.weights_sha256(output) == self.sha256


@pytest.fixture(scope="module")
def sft(base, tmp_path_factory) -> Reference:
    flags = ("--max_steps", "6", "--save_steps", "2", "--save_total_limit", "2", *LORA)
    return Reference(tmp_path_factory.mktemp("sft"), "sft", base, *flags)


def newest_whole(output: Path) -> int:
    """Step of the newest whole checkpoint; all others but unfinished ones must be whole too."""
    checkpoints = list_checkpoints(output)
    assert all(find_damage(path) is None for path in checkpoints)
    return max((named_step(path) for path in checkpoints), default=0)


def wait_for(started: trials.Started, what, timeout: float = 120.0) -> None:
    deadline = time.monotonic() + timeout
    while not what():
        assert time.monotonic() < deadline and started.process.is_alive(), started.text()[-3000:]
        time.sleep(0.002)


def steps_logged(started: trials.Started) -> int:
    steps = [line.split("/")[0].split()[1] for line in started.text().splitlines() if line.startswith("step ")]
    return int(steps[-1]) if steps else 0


# kill -9

INSIDE = [KillInSave(4, files=n) for n in range(1, 13)]
INSIDE += [KillInSave(4, call=c) for c in ("publish", "_digest", "flush", "rename", "rotate", "_delete", "rmtree")]
QUICK = (INSIDE[-5], INSIDE[-3])


@pytest.mark.parametrize(
    "fault",
    [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow, id=f.call or f"file {f.files}") for f in INSIDE],
)
def test_kill_9_inside_the_save(fault, sft, tmp_path, ledger):
    kind = "kill -9 inside the save"
    output = tmp_path / "out"
    ledger.inject(kind)
    started = sft.start(output, "--save_total_limit", "1", before=fault)
    assert started.wait() == -signal.SIGKILL, started.text()[-3000:]
    whole, steps = newest_whole(output), steps_logged(started)
    assert whole in (2, 4)
    sft.finish(output)
    ledger.add(kind, lost_steps=max(4, steps) - whole)


@pytest.mark.parametrize("count", [3, pytest.param(32, marks=pytest.mark.slow)])
def test_kill_9_at_random_moments(count, base, tmp_path, ledger):
    kind = "kill -9 at random moments"
    flags = ("--max_steps", "24", "--save_steps", "1", "--save_total_limit", "2", *LORA)
    reference = Reference(tmp_path, "sft", base, *flags)
    chosen, kills, output = random.Random(count), 0, tmp_path / "out"
    while kills < count:
        step = newest_step(output) + chosen.randint(0, 4)  # 0: before its first step
        started = reference.start(output)
        wait_for(started, lambda started=started: "steps to come" in started.text())
        while started.process.is_alive() and steps_logged(started) < step:
            time.sleep(0.002)
        time.sleep(chosen.uniform(0, 0.1))
        if started.process.exitcode is not None:  # it has ended before: from the start again
            reference.finish(output)
            shutil.rmtree(output)
            continue
        ledger.inject(kind)
        kills += 1
        started.process.kill()
        started.wait()
        ledger.add(kind, lost_steps=max(0, steps_logged(started) - newest_whole(output)))
    reference.finish(output)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pt", "dpo", "orpo", "rm", "ppo"])
def test_kill_9_in_every_stage(stage, base, tmp_path, ledger):
    kind = "kill -9 in every stage"
    reference = Reference(tmp_path, stage, base, "--max_steps", "6", "--save_steps", "1", "--save_total_limit", "2")
    output = tmp_path / "out"
    for step in (2, 4):
        ledger.inject(kind)
        started = reference.start(output)
        wait_for(started, lambda step=step: newest_step(output) >= step)
        started.process.kill()
        started.wait()
        ledger.add(kind, lost_steps=max(0, steps_logged(started) - newest_whole(output)))
    reference.finish(output)


def newest_step(output: Path) -> int:
    return max(map(named_step, list_checkpoints(output)), default=0)


# Signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends_with_its_code(number, code, sft, tmp_path, ledger):
    kind = f"{number.name}"
    output = tmp_path / "out"
    ledger.inject(kind)
    started = sft.start(output)
    wait_for(started, lambda: steps_logged(started) >= 1)
    os.kill(started.process.pid, number)
    assert started.wait() == code, started.text()[-3000:]
    assert f"by {number.name}; the last whole checkpoint is {output}" in started.text()
    assert "Traceback" not in started.text()
    assert newest_whole(output) == steps_logged(started) > 0
    sft.finish(output)
    ledger.add(kind, lost_steps=0)


# Damage on the disk


def flip(path: Path, chosen: random.Random) -> int:
    content = bytearray(path.read_bytes())
    content[chosen.randrange(len(content))] ^= 1 << chosen.randrange(8)
    path.write_bytes(content)
    return 1


def truncate(path: Path, chosen: random.Random) -> int:
    content = path.read_bytes()
    path.write_bytes(content[: chosen.randrange(len(content))])
    return len(content) - path.stat().st_size


def delete(path: Path, chosen: random.Random) -> int:
    size = path.stat().st_size
    path.unlink()
    return size


@pytest.mark.parametrize("damage", [flip, truncate, delete])
def test_every_damaged_file_is_found(damage, sft, tmp_path, ledger):
    kind = f"file of a checkpoint: {damage.__name__}"
    chosen = random.Random(0)
    newest = list_checkpoints(sft.output)[-1]
    for file in files_below(newest):
        shutil.copytree(sft.output, tmp_path / "out")
        ledger.inject(kind)
        size = damage(tmp_path / "out" / newest.name / file.relative_to(newest), chosen)
        found, lines = find_checkpoint(tmp_path / "out", "auto")
        assert found == tmp_path / "out" / "checkpoint-4" and "checkpoint-6: damaged" in lines[0], file.name
        ledger.add(kind, lost_steps=2, damaged_bytes=size, detected_bytes=size)
        shutil.rmtree(tmp_path / "out")


def test_a_run_goes_on_from_before_a_damaged_checkpoint(sft, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(sft.output, output)
    (output / "run.json").unlink()
    flip(output / "checkpoint-6" / "optimizer.pt", random.Random(1))
    started = sft.start(output)
    assert started.wait() == 0 and "checkpoint-6: damaged, not used (optimizer.pt" in started.text()
    assert trials.weights_sha256(output) == sft.sha256 and list(output.glob("damaged-*/checkpoint-6"))


# Disks that do not take it


def test_a_file_that_the_disk_does_not_take_stops_the_run_cleanly(sft, tmp_path, ledger):
    kind = "disk full in the middle of a file"
    output = tmp_path / "out"
    output.mkdir()
    shutil.copytree(sft.output / "checkpoint-4", output / "checkpoint-4")
    sizes = {file.name: file.stat().st_size for file in files_below(output / "checkpoint-4")}
    ledger.inject(kind)
    started = sft.start(output, before=LargestFile(sizes["optimizer.pt"] - 1000))
    assert started.wait() == 2, started.text()[-3000:]
    last = started.text().strip().splitlines()[-1]
    assert "step 6: the checkpoint could not be written" in last and "the last whole checkpoint is" in last
    assert "Traceback" not in started.text() and not (output / ".unfinished").exists()
    assert newest_whole(output) == 4
    sft.finish(output)
    ledger.add(kind, lost_steps=2)


def test_a_result_that_the_disk_does_not_take_leaves_the_last_checkpoint_to_make_it_from(sft, tmp_path, ledger):
    kind = "disk full in the result"
    output = tmp_path / "out"
    ledger.inject(kind)
    started = sft.start(output, before=FullFrom(16_384, "suwen.stage", "save_result"))
    assert started.wait() == 2, started.text()[-3000:]
    last = started.text().strip().splitlines()[-1]
    assert "the result could not be written" in last and f"checkpoint is {output}/checkpoint-6, the same" in last
    assert "Traceback" not in started.text() and not (output / ".unfinished").exists()
    assert newest_whole(output) == 6 and not list(output.glob("*.safetensors"))
    sft.finish(output)
    ledger.add(kind, lost_steps=0)


PLACES = {
    "cached data": (FullFrom(4096, "suwen.data", "_build"), ()),
    "run.json": (FullFrom(4096, "suwen.stage", "describe_run"), ()),
    "TensorBoard": (
        FullFrom(4096, "transformers.integrations.integration_utils", "TensorBoardCallback.on_train_begin"),
        ("--report_to", "tensorboard"),
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_disk_that_is_full_elsewhere_stops_the_run_with_one_line(place, sft, tmp_path, ledger):
    fault, flags = PLACES[place]
    ledger.inject(f"disk full: {place}")
    flags = ("--cache_dir", str(tmp_path / "cache"), *flags)
    started = sft.start(tmp_path / "out", *flags, before=fault)
    assert started.wait() == 2, started.text()[-3000:]
    last = started.text().strip().splitlines()[-1]
    assert re.search(r"could not be written or read \(.*File too large\); there is no checkpoint yet", last)
    assert "Traceback" not in started.text()
    sft.finish(tmp_path / "out", *flags)
    ledger.add(f"disk full: {place}")


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=800k", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("a file system may not be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_stops_the_run_before_it_writes(sft, small_disk, ledger):
    kind = "disk full before a save"
    output = small_disk / "out"
    ledger.inject(kind)
    more = ("--save_steps", "1", "--save_total_limit", "9")
    started = sft.start(output, *more)
    assert started.wait() == 2, started.text()[-3000:]
    last = started.text().strip().splitlines()[-1]
    assert "could not be written" in last and "0.00 GB are free" in last and "Traceback" not in started.text()
    reached = newest_whole(output)
    assert reached >= 1 and f"the last whole checkpoint is {output}/checkpoint-{reached}" in last
    for path in list_checkpoints(output)[:-1]:  # room is made by hand
        shutil.rmtree(path)
    sft.finish(output, "--save_steps", "5", "--save_total_limit", "1")
    ledger.add(kind, lost_steps=1)


def test_a_folder_that_becomes_read_only_stops_the_run_cleanly(sft, ledger):
    kind = "folder becomes read-only"
    folder = Path(tempfile.mkdtemp())  # others can reach it, unlike pytest's own
    try:
        output = folder / "out"
        output.mkdir()
        for name, source in (("base", sft.base), ("cache", f"{sft.data}.cache")):
            shutil.copytree(source, folder / name)
        shutil.copy(sft.data, folder / "rows.jsonl")
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o777)
        command = sft.words(
            output, "--cache_dir", str(folder / "cache"), "--train_file_dir", str(folder / "rows.jsonl")
        )
        command += ["--model_name_or_path", str(folder / "base")]
        ledger.inject(kind)
        started = trials.Started("sft", command, output, drop_root)
        wait_for(started, lambda: newest_step(output) >= 2)
        output.chmod(0o555)
        assert started.wait() == 2, started.text()[-3000:]
        assert "could not be written" in started.text().strip().splitlines()[-1]
        assert newest_whole(output) >= 2
        output.chmod(0o777)
        again = trials.Started("sft", command, output)
        assert again.wait() == 0 and trials.weights_sha256(output) == sft.sha256, again.text()[-3000:]
        ledger.add(kind, lost_steps=2)
    finally:
        shutil.rmtree(folder)


# Two runs, other data


def test_a_second_run_in_the_same_folder_is_refused(sft, tmp_path, ledger):
    kind = "second run in the same folder"
    output = tmp_path / "out"
    started = sft.start(output)
    wait_for(started, lambda: (output / ".lock").is_file() and (output / ".lock").read_text())
    ledger.inject(kind)
    with pytest.raises(ValueError, match=f"in use by process {started.process.pid} on "):
        trials.run("sft", sft.words(output))
    assert started.wait() == 0 and trials.weights_sha256(output) == sft.sha256
    ledger.add(kind)


def test_other_data_is_refused_with_its_file_and_taken_by_force(sft, tmp_path, ledger):
    kind = "data file changed during the run"
    output = tmp_path / "out"
    data = trials.write_rows(tmp_path / "rows.jsonl", "sft")
    command = [word if word != sft.data else data for word in sft.words(output)]
    ledger.inject(kind)
    started = trials.Started("sft", command, output)
    wait_for(started, lambda: newest_step(output) >= 2)
    text = Path(data).read_text(encoding="utf-8")
    Path(data).write_text(text.replace("高血压", "低血压"), encoding="utf-8")
    assert started.wait() == 0
    assert f"note: {data} has changed since this run read it" in started.text()
    assert trials.weights_sha256(output) == sft.sha256, "what it had read is what it trained"
    refused = trials.Started("sft", command, output)
    assert refused.wait() == 2
    last = refused.text().strip().splitlines()[-1]
    assert "is of another run (data was " in last and f"files that differ: {data})" in last and "--resume_force" in last
    ledger.add(kind)
    again = trials.Started("sft", [*command, "--resume_force", "--max_steps", "7"], output)
    assert again.wait() == 0 and "--resume_force: " in again.text(), again.text()[-3000:]
    assert json.loads((output / "run.json").read_text())["training"]["steps"] == 7

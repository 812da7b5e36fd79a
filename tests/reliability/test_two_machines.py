"""Two machines: network namespaces with an address each and a link between them, started by the real launchers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from suwen.checkpoint import list_checkpoints
from suwen.manifest import find_damage

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]


@pytest.fixture
def machines():
    """Two network namespaces with a link: ("ip", "netns", "exec", name) of each, their addresses, and how to cut it."""
    names = [f"suwen{os.getpid()}{side}" for side in "ab"]
    ends = [f"sw{os.getpid()}{side}" for side in "ab"]
    addresses = ["10.213.9.1", "10.213.9.2"]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the command ip (iproute2)")
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        for name, end, address in zip(names, ends, addresses, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", end, "up")
        yield (
            [("ip", "netns", "exec", name) for name in names],
            addresses,
            lambda: ip("-n", names[1], "link", "set", ends[1], "down"),
        )
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine permits no network namespaces with links ({error.stderr.strip()})")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_two_machines_with_different_data_both_say_so(machines, tmp_path):
    namespaces, addresses, _ = machines
    started = []
    for number, namespace in enumerate(namespaces):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "a.jsonl").write_text(json.dumps({"text": f"第{number}份"}), encoding="utf-8")
        words = ["--num_machines", "2", "--machine_rank", str(number), "--main_process_ip", addresses[0]]
        words += ["--command", f"pretraining.py --train_file_dir {folder}"]
        command = [*namespace, sys.executable, str(ROOT / "tools/preflight.py"), *words]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, env=environment, **pipes))
    outputs = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [2, 2]
    for output in outputs:
        line = output.strip().splitlines()[-1]
        assert line.startswith("preflight.py: error: preflight: --train_file_dir: machine 0 has 1 files of ")
        assert "machine 1 has 1 files of " in line and "copy the same files to both" in line


def launch(machines, tmp_path: Path, *words: str) -> list[subprocess.Popen]:
    """run_pt.sh on both machines, a process each, on texts of its own folder; what it says is in log0 and log1."""
    namespaces, addresses, _ = machines
    processes = []
    for number, namespace in enumerate(namespaces):
        folder = tmp_path / f"machine{number}"
        folder.mkdir()
        lines = [f"第{row}条：高血压患者应当低盐饮食，按时服药，定期测量血压。" for row in range(60)]
        (folder / "texts.txt").write_text("\n".join(lines), encoding="utf-8")
        variables = {
            "PYTHON": sys.executable, "SETUP": "skip", "OMP_NUM_THREADS": "1", "NUM_MACHINES": "2",
            "NUM_PROCESSES": "1", "MACHINE_RANK": str(number), "MAIN_PROCESS_IP": addresses[0],
            "MAIN_PROCESS_PORT": "29713",
            "DATA": str(folder), "OUTPUT": str(folder / "out"), "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        command = [*namespace, "sh", str(ROOT / "run_pt.sh"), "--cache_dir", str(folder / "cache"), *words]
        with open(tmp_path / f"log{number}", "w") as log:
            processes.append(subprocess.Popen(command, env=os.environ | variables, stdout=log, stderr=log, cwd=ROOT))
    return processes


def wait_for(condition, seconds: float, processes: list[subprocess.Popen]) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        if all(process.poll() is not None for process in processes):
            return condition()
        time.sleep(0.2)
    return False


def end(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    for process in processes:
        process.wait(60)


@pytest.mark.training
def test_two_machines_train_one_model_over_their_link(machines, tmp_path):
    processes = launch(machines, tmp_path, "--max_steps", "2", "--report_to", "none")
    try:
        ended = wait_for(lambda: all(process.poll() is not None for process in processes), 240, processes)
        logs = [(tmp_path / f"log{number}").read_text() for number in (0, 1)]
        assert ended and [process.returncode for process in processes] == [0, 0], logs[0][-3000:] + logs[1][-3000:]
    finally:
        end(processes)
    record = json.loads((tmp_path / "machine0/out/run.json").read_text())
    assert record["finished"] and record["world_size"] == 2 and record["training"]["steps"] == 2
    assert "2 machines of 1 processes agree" in logs[0] and "by gloo" in logs[0]


@pytest.mark.slow
@pytest.mark.training
def test_a_machine_that_is_cut_off_in_training_ends_the_other_within_a_minute(machines, tmp_path, ledger):
    ledger.inject("link between two machines cut")
    words = ["--max_steps", "100000", "--report_to", "none", "--logging_steps", "1", "--eval_strategy", "no"]
    words += ["--save_steps", "2", "--save_total_limit", "2"]
    processes = launch(machines, tmp_path, *words)
    log = tmp_path / "log0"
    try:
        assert wait_for(lambda: "step 3/" in log.read_text(), 240, processes), log.read_text()[-3000:]
        machines[2]()
        assert wait_for(lambda: all(process.poll() is not None for process in processes), 60, processes)
    finally:
        end(processes)
    assert [process.returncode for process in processes] == [1, 1]
    for number, address in ((0, "10.213.9.2"), (1, "10.213.9.1")):
        text = (tmp_path / f"log{number}").read_text()
        assert f"error: machine {1 - number} (" in text and address in text and "has been silent for 20 s" in text
        assert "Traceback" not in text
    whole = list_checkpoints(tmp_path / "machine0/out")
    assert whole and all(find_damage(path) is None for path in whole)
    ledger.add("link between two machines cut")

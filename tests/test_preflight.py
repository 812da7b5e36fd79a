"""Machines that meet before a training: what differs is named, also who is missing or lost; nobody waits for long."""

import copy
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from suwen import meeting, preflight
from suwen.meeting import Lost, meet

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def together(count: int, work) -> list:
    """`work(machine, meeting)` on `count` machines at once, each a thread; its result, or the Lost that it raised."""
    port = free_port()

    def machine(number: int):
        try:
            joined = meet(count, number, "127.0.0.1", port, f"host{number}", 10)
        except Lost as error:
            return error
        try:
            return work(number, joined)
        except Lost as error:
            return error
        finally:
            joined.close()

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(machine, range(count)))


# Meeting


def test_everyone_gets_the_values_of_all_in_the_order_of_machines():
    def work(number, joined):
        return [joined.exchange(number * 10, 10, "first"), joined.exchange("x" * 300_000 + str(number), 10, "second")]

    for first, second in together(3, work):
        assert first == [0, 10, 20]
        assert [value[-1] for value in second] == ["0", "1", "2"]


def test_a_single_machine_needs_no_network():
    alone = meet(1, 0, "no such host", 0, "here", 0.1)
    assert alone.exchange({"a": 1}, 0.1, "alone") == [{"a": 1}]


def test_a_machine_that_says_nothing_is_named_on_all_others():
    def work(number, joined):
        if number == 1:
            time.sleep(1.5)
            return None
        return joined.exchange(number, 0.5, "comparing")

    first, _, third = together(3, work)
    assert str(first) == str(third) == "machine 1 (host1, 127.0.0.1) gave no answer in time (comparing)"


def test_machines_that_never_came_are_named():
    with pytest.raises(Lost, match="no sign of machine 1, 2 at 127.0.0.1"):
        meet(3, 0, "127.0.0.1", free_port(), "host", 0.3)


def test_machine_0_that_never_came_is_named_with_its_address():
    with pytest.raises(Lost, match="machine 0 cannot be reached at MAIN_PROCESS_IP=127.0.0.1, port .*refused"):
        meet(2, 1, "127.0.0.1", free_port(), "host", 0.3)


def test_an_address_of_another_machine_is_refused_at_once():
    with pytest.raises(Lost, match="192.0.2.7.*machine 0 cannot listen there .*expected an address of this machine"):
        meet(2, 0, "192.0.2.7", free_port(), "host", 60)


def test_two_machines_with_the_same_rank_are_told_so():
    port = free_port()
    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(meet, 3, 0, "127.0.0.1", port, "host0", 10)
        others = [threads.submit(meet, 3, 1, "127.0.0.1", port, f"host{i}", 10) for i in (1, 2)]
        with pytest.raises(
            Lost, match=r"machine 1 \(host[12], 127.0.0.1\): MACHINE_RANK is 1, expected 1 to 2, another"
        ):
            first.result()
        for other in others:
            with pytest.raises(Lost, match="MACHINE_RANK is 1"):
                other.result().exchange(0, 5, "comparing")


def test_strangers_at_the_port_do_not_disturb():
    port = free_port()
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(meet, 2, 0, "127.0.0.1", port, "host0", 10)
        for said in (b"GET / HTTP/1.1\r\n\r\n", b'{"machine": "one"}\n', b"[1]\n", b""):
            for _ in range(50):
                try:
                    stranger = socket.create_connection(("127.0.0.1", port))
                    break
                except OSError:
                    time.sleep(0.05)
            stranger.sendall(said)
            stranger.close()
        second = meet(2, 1, "127.0.0.1", port, "host1", 10)
        found = [
            threads.submit(joined.exchange, number, 5, "x") for number, joined in ((0, first.result()), (1, second))
        ]
        assert [result.result() for result in found] == [[0, 1], [0, 1]]


def watched(work, monkeypatch, lost_seconds: float = 30.0, listen: float = 20.0) -> list[tuple[str, int]]:
    """What machine 0 of two hears within `listen` seconds of machine 1, which does `work(its meeting, heard)`."""
    monkeypatch.setattr(meeting, "LOST_SECONDS", lost_seconds)
    monkeypatch.setattr(meeting, "BEAT_SECONDS", 0.1)
    found: list[tuple[str, int]] = []
    heard = threading.Event()

    def machine(number, joined):
        if number == 1:
            work(joined, heard)
        else:
            joined.watch(lambda problem, code: (found.append((problem, code)), heard.set()))
            heard.wait(listen)

    together(2, machine)
    return found


def test_a_machine_that_falls_silent_is_noticed(monkeypatch):
    [(problem, code)] = watched(lambda joined, heard: heard.wait(20), monkeypatch, lost_seconds=0.5)
    assert problem.startswith("machine 1 (host1, 127.0.0.1) has been silent for") and code == 1


def test_a_machine_whose_connection_breaks_is_noticed(monkeypatch):
    [(problem, _)] = watched(lambda joined, heard: joined.links[0].connection.close(), monkeypatch)
    assert problem == "machine 1 (host1, 127.0.0.1) broke off without a word"


def test_a_machine_that_fails_tells_its_code(monkeypatch):
    assert watched(lambda joined, heard: joined.close("ended with code 2", 2), monkeypatch) == [
        ("machine 1 (host1, 127.0.0.1) ended with code 2", 2)
    ]


def test_a_machine_that_is_done_or_still_works_is_no_problem(monkeypatch):
    assert watched(lambda joined, heard: joined.close(), monkeypatch, listen=1) == []

    def work(joined, heard):
        joined.watch(lambda *_: None)
        heard.wait(1)

    assert watched(work, monkeypatch, listen=1) == []


# Comparing


@pytest.fixture
def facts(tmp_path) -> dict:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text('{"text": "高血压"}\n', encoding="utf-8")
    words = ["pretraining.py", "--train_file_dir", str(tmp_path / "data"), "--seed", "3", "--output_dir", str(tmp_path)]
    return preflight.collect_facts(words, 2)


def test_facts_hold_code_packages_data_and_disk(facts, tmp_path):
    assert {"suwen/trainers.py", "pretraining.py", "configs/zero3.json"} <= facts["code"].keys()
    assert facts["packages"]["torch"].startswith("2.")
    assert facts["data"]["--train_file_dir"]["files"] == 1
    assert facts["data"]["--train_file_dir"]["bytes"] == (tmp_path / "data/a.jsonl").stat().st_size
    assert facts["disk"]["free"] == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    assert preflight.compare_facts([facts, copy.deepcopy(facts)], [0.0, 59.0]) == []


def test_every_difference_is_named_with_the_way_out(facts):
    other = copy.deepcopy(facts)
    other["processes"] = 4
    other["code"]["suwen/trainers.py"] = "0"
    other["packages"]["torch"] = "2.12.0"
    other["data"]["--train_file_dir"] |= {"bytes": 7, "sha256": "abcdefgh"}
    other["command"][4] = "4"
    other["disk"]["free"] = 10
    lines = preflight.compare_facts([facts, facts, other], [0.0, 0.0, -61.0])
    expected = (
        "machine 0 starts 2 processes, machine 2 starts 4",
        "code of machines 0 and 2 differ: suwen/trainers.py;",
        f"packages of machines 0 and 2 differ: torch ({facts['packages']['torch']} and 2.12.0)",
        "--train_file_dir: machine 0 has 1 files of ",
        "the commands of machines 0 and 2 differ: '3' and '4'",
        "the clock of machine 2 is -61 s off",
        "machine 2: 0.00 GB free",
    )
    assert len(lines) == len(expected)
    for line, beginning in zip(lines, expected, strict=True):
        assert line.startswith(beginning)


def test_where_things_lie_may_differ_but_not_what_is_trained():
    def command(*words):
        return preflight.collect_facts(["sft.py", *words], 1)["command"]

    assert command("--output_dir", "a", "--seed", "1") == command("--output_dir", "b", "--seed", "1")
    assert command("--output_dir=a", "--seed", "1") == command("--output_dir=b", "--seed", "1")
    assert command("--output_dir", "a", "--seed", "1") != command("--output_dir", "a", "--seed", "2")
    assert command("--seed=1") != command("--seed=2")
    told = command("--hub_token", "hf_secret")
    assert "hf_secret" not in str(told) and told != command("--hub_token", "hf_other")


def test_the_sampled_hash_sees_every_byte_of_small_files_and_the_sampled_ones_of_large_files(tmp_path):
    file = tmp_path / "f"
    content = bytearray(os.urandom(3000))
    file.write_bytes(content)
    before = preflight.sampled_hash([file])
    content[1234] ^= 1
    file.write_bytes(content)
    assert preflight.sampled_hash([file]) != before
    large = bytearray(preflight.SAMPLES * preflight.SAMPLE_BYTES * 4)
    file.write_bytes(large)
    before = preflight.sampled_hash([file])
    for place in (0, len(large) - 1):  # the first and the last byte are always sampled
        large[place] ^= 1
        file.write_bytes(large)
        assert preflight.sampled_hash([file]) != before
        large[place] ^= 1
    file.write_bytes(large + b"x")
    assert preflight.sampled_hash([file]) != before


def test_the_interface_of_an_address_is_found():
    assert preflight.interface_of("127.0.0.1") == "lo"
    assert preflight.interface_of("192.0.2.200") is None


@pytest.mark.parametrize("text", ["soon", "0", "-3", "nan"])
def test_an_impossible_wait_is_refused(text, monkeypatch):
    monkeypatch.setenv("PREFLIGHT_WAIT", text)
    with pytest.raises(ValueError, match=f"PREFLIGHT_WAIT: found '{text}'"):
        preflight.wait_seconds()


# Processes


@pytest.mark.distributed
def test_two_processes_add_up_what_they_hold():
    command = [sys.executable, str(ROOT / "tools/preflight.py"), "--num_processes", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout
    assert "all-reduce of 4 MiB over 2 processes by gloo" in done.stdout and "passed in" in done.stdout


@pytest.mark.distributed
def test_a_rank_that_cannot_join_is_named_with_its_step(monkeypatch):
    monkeypatch.setattr(preflight, "REDUCE_SECONDS", 6.0)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    found = preflight.reduce_here(f"tcp://127.0.0.1:{free_port()}", range(1, 2), 2)  # rank 0 never comes
    assert found["problem"] == "rank 1, while joining the gloo group of 2 (limit 60 s): not done within 6 s"

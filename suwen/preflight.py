"""Before several processes train together: do they have the same code, packages, data and model, and do they connect?

Called by configs/launch.py and tools/preflight.py, once on each machine. What differs is named within seconds, where
the training would go wrong in silence or wait for half an hour. Each step has its own time limit, and says it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import multiprocessing
import os
import platform
import shutil
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from suwen import all_reduce
from suwen.check_environment import query_gpus, read_pins
from suwen.meeting import Lost, Meeting, meet
from suwen.readers import parse_sources
from suwen.records import SECRETS
from suwen.tables import counted

ROOT = Path(__file__).resolve().parent.parent
WAIT_SECONDS = 300.0  # for the other machines to start; PREFLIGHT_WAIT
COMPARE_SECONDS = 60.0
REDUCE_SECONDS = 120.0  # torch's import included, which a cold network disk makes slow
CLOCK_SECONDS = 60.0
FREE_BYTES = 1 << 30
CODE = ("*.py", "suwen/**/*.py", *(f"configs/*.{kind}" for kind in ("py", "sh", "json", "yaml")), "requirements.txt")
DATA_FLAGS = ("--train_file_dir", "--train_file", "--validation_file_dir", "--validation_file")
MODEL_FLAGS = ("--model_name_or_path", "--tokenizer_name_or_path")
# Flags whose values may differ between machines: what stands in the folders is compared instead
PLACES = {*DATA_FLAGS, *MODEL_FLAGS, "--output_dir", "--cache_dir", "--logging_dir", "--outputs", "--eval_data_dir"}
SAMPLES, SAMPLE_BYTES = 16, 1 << 16


def sampled_hash(files: Sequence[Path]) -> str:
    """sha256 over the sizes and 16 places of 64 KiB of each file: a second for 10 GB. Small files are read whole.

    A change between the places of a large file that keeps its size is not seen; `require_same_data` sees it later.
    """
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(struct.pack("<q", size))
        with open(file, "rb") as stream:
            if size <= SAMPLES * SAMPLE_BYTES:
                digest.update(stream.read())
                continue
            for number in range(SAMPLES):
                stream.seek(number * (size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def values_of(words: Sequence[str], flags: Sequence[str]) -> dict[str, str]:
    """The last value of each of these flags on a command line."""
    found = {}
    for word, following in zip(words, [*words[1:], ""], strict=False):
        name, equals, value = word.partition("=")
        if name in flags:
            found[name] = value if equals else following
    return found


def describe_files(files: Sequence[Path]) -> dict[str, Any]:
    return {
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
        "sha256": sampled_hash(files),
    }


def collect_facts(words: Sequence[str], num_processes: int) -> dict[str, Any]:
    """What this machine would train with.

    Args:
        words: the stage's command line, its script first.
        num_processes: processes on this machine.

    Raises:
        ValueError: data that are not there.
    """
    code = {
        str(file.relative_to(ROOT)): hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        for pattern in CODE
        for file in sorted(ROOT.glob(pattern))
        if file.is_file()
    }
    packages = {"python": platform.python_version()}
    for name, _ in read_pins(ROOT / "requirements.txt"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = "missing"
    data = {
        flag: describe_files([file for source in parse_sources(value, flag) for file in source.files])
        for flag, value in values_of(words, DATA_FLAGS).items()
    }
    model = {
        flag: describe_files(sorted(file for file in Path(value).iterdir() if file.is_file()))
        for flag, value in values_of(words, MODEL_FLAGS).items()
        if Path(value).is_dir()
    }
    output = Path(values_of(words, ("--output_dir",)).get("--output_dir", "outputs")).absolute()
    disk = next(folder for folder in (output, *output.parents) if folder.is_dir())
    command, before = [Path(words[0]).name if words else ""], ""
    for word in words[1:]:
        name = word.partition("=")[0]
        secret = any(part in before.lower() for part in SECRETS)
        word_or_hash = hashlib.sha256(word.encode()).hexdigest()[:8] if secret else word
        command.append(name if name in PLACES else "" if before in PLACES else word_or_hash)
        before = word
    return {
        "processes": num_processes,
        "code": code,
        "packages": packages,
        "data": data,
        "model": model,
        "command": command,
        "disk": {"folder": str(disk), "free": shutil.disk_usage(disk).free},
    }


def compare_facts(facts: Sequence[dict[str, Any]], clocks: Sequence[float]) -> list[str]:
    """A line for each kind of thing in which a machine differs from machine 0, or that it lacks."""
    problems = []
    first = facts[0]
    for number, other in enumerate(facts[1:], start=1):
        if other["processes"] != first["processes"]:
            problems.append(
                f"machine 0 starts {first['processes']} processes, machine {number} starts {other['processes']}; "
                "set NUM_PROCESSES to the same number on all"
            )
        for kind, advice in (
            ("code", "bring both to the same state of the project"),
            ("packages", "install requirements.txt on both"),
        ):
            names = [n for n in sorted({*first[kind], *other[kind]}) if first[kind].get(n) != other[kind].get(n)]
            if names:
                shown = ", ".join(
                    f"{n} ({first[kind].get(n, 'missing')} and {other[kind].get(n, 'missing')})"
                    if kind == "packages"
                    else n
                    for n in names[:4]
                ) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
                problems.append(f"{kind} of machines 0 and {number} differ: {shown}; {advice}")
        for kind in ("data", "model"):
            for flag in sorted({*first[kind], *other[kind]}):
                one, two = first[kind].get(flag), other[kind].get(flag)
                if one != two:
                    problems.append(
                        f"{flag}: machine 0 has {_describe(one)}, machine {number} has {_describe(two)}; copy the same "
                        "files to both, or give a folder that both share"
                    )
        if other["command"] != first["command"]:
            pairs = zip([*first["command"], "nothing"], [*other["command"], "nothing"], strict=False)
            one, two = next((a, b) for a, b in pairs if a != b)
            problems.append(f"the commands of machines 0 and {number} differ: {one!r} and {two!r}")
        if abs(apart := clocks[number] - clocks[0]) > CLOCK_SECONDS:
            problems.append(f"the clock of machine {number} is {apart:+.0f} s off machine 0's; set both by NTP")
    for number, each in enumerate(facts):
        if each["disk"]["free"] < FREE_BYTES:
            free, folder = each["disk"]["free"], each["disk"]["folder"]
            problems.append(f"machine {number}: {free / 1e9:.2f} GB free in {folder}, expected 1 GB at least")
    return problems


def _describe(found: dict[str, Any] | None) -> str:
    if found is None:
        return "none"
    return f"{found['files']} files of {found['bytes']:,} bytes (sha256 {found['sha256'][:8]})"


# ---------------------------------------------------------------------------------------------------------- all-reduce


def interface_of(address: str) -> str | None:
    """The name of the network interface with this IPv4 address; None if there is none (Linux)."""
    try:
        import fcntl
    except ImportError:  # no Unix
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                reply = fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
            except OSError:
                continue  # no address
            if socket.inet_ntoa(reply[20:24]) == address:
                return name
    return None


def choose_interface(meeting: Meeting) -> None:
    """Have gloo use the interface that reaches the other machines.

    By itself it takes the address of the host's own name, which Debian's /etc/hosts gives as 127.0.1.1: the processes
    would wait for one another on their own loopbacks.
    """
    if meeting.local_address and (name := interface_of(meeting.local_address)):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def uses_gpus() -> bool:
    """Whether the processes will be on GPUs; configs/launch.sh sets the variables where there are none."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU") == "true" or os.environ.get("DS_ACCELERATOR") == "cpu"
    return not on_cpu and os.environ.get("CUDA_VISIBLE_DEVICES") != "" and bool(query_gpus())


def reduce_here(init_method: str, ranks: range, world_size: int) -> dict[str, Any]:
    """Start a process for each rank of this machine that takes part in the all-reduce.

    Returns:
        {"problem": line} of the first rank that failed, or {"problem": "", "backend", "bytes", "seconds"} of the
        slowest one.
    """
    problem = ""
    results: list[dict[str, Any]] = []
    # Forked processes find torch loaded; CUDA works in fresh ones only
    gpus = uses_gpus()
    context: Any = multiprocessing.get_context("spawn" if gpus else "fork")
    if not gpus:
        import torch.distributed  # noqa: F401
    until = time.monotonic() + REDUCE_SECONDS
    children = []
    for rank in ranks:
        receiving, sending = context.Pipe(duplex=False)
        place = (init_method, world_size, rank, rank - ranks.start, gpus, sending)
        child = context.Process(target=all_reduce.take_part, args=place, daemon=True)
        child.start()
        sending.close()
        children.append((rank, child, receiving))
    for rank, _, receiving in children:
        last: dict[str, Any] = {"step": "starting Python"}
        try:
            while "done" not in last and "error" not in last:
                if not receiving.poll(max(until - time.monotonic(), 0)):
                    last["error"] = f"not done within {REDUCE_SECONDS:.0f} s"
                    break
                last = receiving.recv()
        except (EOFError, OSError):
            last["error"] = "the process ended"
        if "error" in last:
            problem = f"rank {rank}, while {last['step']}: {last['error']}"
            break
        results.append(last["done"])
    for _, child, _ in children:
        child.join(timeout=0 if problem else 5)
        child.kill()
        child.join()
    if problem:
        return {"problem": problem}
    return {"problem": "", **max(results, key=lambda result: result["seconds"])}


# ---------------------------------------------------------------------------------------------------------- the whole


def preflight(
    words: Sequence[str], num_processes: int, machines: int = 1, machine: int = 0, address: str = "", port: int = 0
) -> Meeting:
    """Meet, compare, all-reduce; prints what was found. The meeting goes on, for `Meeting.watch`.

    Args:
        words: the stage's command line, its script first.
        num_processes: on this machine.
        address, port: of machine 0; unused for a single machine.

    Raises:
        ValueError: one line, the same on every machine.
    """
    began = time.monotonic()
    wait = wait_seconds()
    facts: dict[str, Any] = {}
    problem = ""
    try:
        facts = collect_facts(words, num_processes)
    except (ValueError, OSError) as error:
        problem = f"machine {machine} ({platform.node()}): {error}" if machines > 1 else str(error)
    if problem and machines == 1:
        raise ValueError(problem)
    try:
        meeting = meet(machines, machine, address, port, platform.node(), wait)
    except Lost as error:
        raise ValueError(f"preflight, meeting (limit {wait:.0f} s): {error}") from None
    try:
        found = meeting.exchange({"problem": problem, "facts": facts}, COMPARE_SECONDS, "comparing facts")
        clocks = meeting.exchange(time.time(), COMPARE_SECONDS, "comparing clocks")
    except Lost as error:
        raise ValueError(f"preflight, comparing (limit {COMPARE_SECONDS:.0f} s): {error}") from None
    problems = [each["problem"] for each in found if each["problem"]]
    everyone = [each["facts"] for each in found]
    if problems := problems or compare_facts(everyone, clocks):
        raise ValueError("preflight: " + "; ".join(problems))
    lines = [_summary(everyone, clocks, words)]
    world_size = sum(each["processes"] for each in everyone)
    if world_size > 1:
        lines.append(_reduce(meeting, num_processes, world_size, f"tcp://{address}:{port}"))
    if machine == 0:
        for line in lines:
            print(f"preflight: {line}", file=sys.stderr)
        print(f"preflight: passed in {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    return meeting


def require_same_data(fingerprint: str, device: Any) -> None:
    """Compare the encoded training data of all ranks, which each machine may have prepared by itself.

    Args:
        fingerprint: sha256 in hexadecimal.
        device: of this rank; a process group is there, or the rank is alone.

    Raises:
        ValueError: on every rank, with the first one whose rows differ from rank 0's.
    """
    import torch
    from torch import distributed

    if not distributed.is_initialized():
        return
    own = torch.tensor(list(bytes.fromhex(fingerprint)), dtype=torch.int32, device=device)
    found = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(found, own)
    other = next((rank for rank, values in enumerate(found) if not torch.equal(values, found[0])), None)
    if other is not None:
        raise ValueError(
            f"the encoded training data of ranks 0 and {other} differ, although samples of the files agree; copy the "
            "same data and tokenizer to all machines, or give folders that they share"
        )


def wait_seconds() -> float:
    text = os.environ.get("PREFLIGHT_WAIT", "")
    try:
        seconds = float(text) if text else WAIT_SECONDS
    except ValueError:
        seconds = 0
    if not 0 < seconds < 1e6:
        raise ValueError(f"PREFLIGHT_WAIT: found {text!r}, expected seconds, such as 300")
    return seconds


def _summary(facts: Sequence[dict[str, Any]], clocks: Sequence[float], words: Sequence[str]) -> str:
    free = " and ".join(f"{each['disk']['free'] / 1e9:.0f} GB" for each in facts[:8])
    if len(facts) == 1:
        processes = counted(facts[0]["processes"], "process", "processes")
        return f"1 machine, {processes}, {free} free in {facts[0]['disk']['folder']}"
    data = ", ".join(f"{value['files']} data files" for value in facts[0]["data"].values()) or "data"
    return (
        f"{len(facts)} machines of {facts[0]['processes']} processes agree in {len(facts[0]['code'])} files of code, "
        f"{len(facts[0]['packages'])} packages, {data} and the command; clocks "
        f"within {max(clocks) - min(clocks):.1f} s; {free} free"
    )


def _reduce(meeting: Meeting, num_processes: int, world_size: int, endpoint: str) -> str:
    choose_interface(meeting)
    ranks = range(meeting.machine * num_processes, (meeting.machine + 1) * num_processes)
    with tempfile.TemporaryDirectory() as folder:
        own = reduce_here(endpoint if meeting.links else f"file://{folder}/store", ranks, world_size)
    try:
        results = meeting.exchange(own, REDUCE_SECONDS, "the all-reduce")
    except Lost as error:
        raise ValueError(f"preflight, all-reduce (limit {REDUCE_SECONDS:.0f} s): {error}") from None
    failed = [
        f"machine {number}, {result['problem']}" if meeting.links else result["problem"]
        for number, result in enumerate(results)
        if result["problem"]
    ]
    if failed:
        advice = (
            "; the machines reach each other, but not on the interfaces and ports that the processes choose: see the "
            "firewall between them and set NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME; NCCL_DEBUG=INFO says more"
        )
        raise ValueError(
            f"preflight, all-reduce (limit {REDUCE_SECONDS:.0f} s): {failed[0]}{advice if meeting.links else ''}"
        )
    slowest = max(results, key=lambda result: result["seconds"])
    # What every process sends and receives in a ring: 2 (n-1) / n of the tensor (nccl-tests' bus bandwidth)
    bandwidth = 2 * (world_size - 1) / world_size * slowest["bytes"] / slowest["seconds"]
    return (
        f"all-reduce of {slowest['bytes'] >> 20} MiB over {world_size} processes by {slowest['backend']}: "
        f"{slowest['seconds'] * 1000:.1f} ms, {bandwidth / 1e9:.2f} GB/s"
    )

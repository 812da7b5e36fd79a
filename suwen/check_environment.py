"""Is this Python environment the one that requirements.txt asks for, and does its torch fit the GPUs of this machine?

    python -m suwen.check_environment packages requirements.txt [--stamp FILE]    exit code 0 if every pin is installed
    python -m suwen.check_environment gpus     prints the number of GPUs that torch can use
    python -m suwen.check_environment build    before installing: will torch's default build fit?

The launchers call it before anything is installed, so it needs the standard library only and never imports torch,
except to count GPUs on a machine that has them but no nvidia-smi.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

Version = tuple[int, ...]


class Build(NamedTuple):
    """One of torch's builds: what it asks of driver and cards."""

    cuda: str
    min_driver: Version
    min_capability: Version
    max_capability: Version


# The builds of torch 2.13, newest first: https://github.com/pytorch/pytorch/blob/main/RELEASE.md (CUDA support matrix).
# Lowest drivers by CUDA's minor version compatibility: https://docs.nvidia.com/deploy/cuda-compatibility/
BUILDS = (
    Build("13.0", min_driver=(580, 65), min_capability=(7, 5), max_capability=(12, 1)),
    Build("12.6", min_driver=(525, 60), min_capability=(5, 0), max_capability=(9, 0)),
)
DEFAULT_BUILD = BUILDS[0]  # what PyPI serves for torch==2.13.0


@dataclass(frozen=True)
class Gpu:
    index: str
    uuid: str
    name: str
    driver: Version
    capability: Version | None  # None where nvidia-smi is too old to say


def as_version(text: str) -> Version:
    """Turn "580.65.06" into (580, 65, 6); an empty tuple if there is no number."""
    return tuple(int(number) for number in re.findall(r"\d+", text))


def as_text(version: Version) -> str:
    return ".".join(str(number) for number in version)


# Packages


def read_pins(file: Path) -> list[tuple[str, str]]:
    """Read "name==version" lines, following "-r other.txt", leaving out lines for other Python versions."""
    pins = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        line = line.split("#")[0].strip()
        if not line:
            continue
        if line.startswith("-r "):
            pins += read_pins(file.parent / line[3:].strip())
            continue
        match = re.fullmatch(r"([\w.-]+)==([\w.+!]+)(?:\s*;\s*python_version\s*(<|>=)\s*[\"']([\d.]+)[\"'])?", line)
        if not match:
            raise ValueError(
                f"{file}, line {number}: found {line!r}, expected name==version[; python_version < '3.11']"
            )
        name, version, comparison, limit = match.groups()
        older = bool(limit) and sys.version_info[:2] < as_version(limit)
        if comparison is None or older == (comparison == "<"):
            pins.append((name, version))
    return pins


def unsatisfied(pins: Iterable[tuple[str, str]]) -> list[str]:
    """Name each pin that the active environment does not hold. A local part ("+cpu", "+cu126") is any build's right."""
    problems = []
    for name, version in pins:
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{name}=={version} is missing")
            continue
        if found.split("+")[0] != version:
            problems.append(f"{name} is {found}, expected {version}")
    return problems


def check_packages(files: list[Path], stamp: Path | None) -> int:
    """Return 0 if every pin is installed and, where a stamp is named, it was written for these very files."""
    if stamp and (not stamp.is_file() or stamp.read_text().strip() != fingerprint(files)):
        return 1
    problems = unsatisfied(pin for file in files for pin in read_pins(file))
    if problems:
        shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        print(shown, file=sys.stderr)
    return 1 if problems else 0


def fingerprint(files: list[Path]) -> str:
    return hashlib.sha256(repr([read_pins(file) for file in files]).encode()).hexdigest()


# GPUs


def query_gpus() -> list[Gpu] | None:
    """List the machine's NVIDIA GPUs by nvidia-smi; None where there is no nvidia-smi."""
    fields = ["index", "uuid", "name", "driver_version", "compute_cap"]
    for columns in (fields, fields[:-1]):  # drivers before 510 do not know compute_cap
        command = ["nvidia-smi", f"--query-gpu={','.join(columns)}", "--format=csv,noheader"]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except FileNotFoundError:
            return None
        except (OSError, subprocess.TimeoutExpired):
            break
        if result.returncode == 0:
            rows = [[cell.strip() for cell in line.split(",")] for line in result.stdout.splitlines() if line.strip()]
            return [
                Gpu(row[0], row[1], row[2], as_version(row[3]), as_version(row[4]) or None if len(row) > 4 else None)
                for row in rows
            ]
    return []  # nvidia-smi is there and cannot talk to a driver


def select_visible(gpus: list[Gpu], visible: str | None) -> list[Gpu]:
    """Keep what CUDA_VISIBLE_DEVICES names: indices or (beginnings of) UUIDs; CUDA stops at the first unknown one."""
    if visible is None:
        return gpus
    chosen: list[Gpu] = []
    for entry in (entry.strip() for entry in visible.split(",")):
        if entry.startswith("MIG-"):  # a slice of some card: counts as a device of its own
            found = [Gpu(entry, entry, entry, gpus[0].driver if gpus else (), None)]
        else:
            found = [gpu for gpu in gpus if entry == gpu.index or (len(entry) > 4 and gpu.uuid.startswith(entry))]
        if not found or found[0] in chosen:
            break
        chosen.append(found[0])
    return chosen


def see_one_gpu() -> None:
    """One process trains on one GPU; the library would split each batch over all that it sees (DataParallel)."""
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def misfits(build: Build, gpus: list[Gpu]) -> list[str]:
    """Say what keeps this build of torch from using these GPUs; nothing if it fits."""
    problems = []
    for gpu in {(gpu.name, gpu.driver, gpu.capability): gpu for gpu in gpus}.values():
        if gpu.driver and gpu.driver < build.min_driver:
            problems.append(
                f"driver {as_text(gpu.driver)} is too old for torch's CUDA {build.cuda} build,"
                f" which needs {as_text(build.min_driver)} or newer"
            )
        if gpu.capability and not build.min_capability <= gpu.capability <= build.max_capability:
            problems.append(
                f"{gpu.name} has compute capability {as_text(gpu.capability)}, torch's CUDA {build.cuda} build serves"
                f" {as_text(build.min_capability)} to {as_text(build.max_capability)}"
            )
    return list(dict.fromkeys(problems))


def fitting_index(gpus: list[Gpu]) -> str | None:
    """Name the package index with the newest build of torch that fits these GPUs and their driver."""
    for build in BUILDS:
        if not misfits(build, gpus):
            return f"https://download.pytorch.org/whl/cu{build.cuda.replace('.', '')}"
    return None


def installed_build() -> tuple[str, str | None] | None:
    """Read version and CUDA version (None: a CPU build) of the installed torch from its files."""
    try:
        distribution = importlib.metadata.distribution("torch")
    except importlib.metadata.PackageNotFoundError:
        return None
    text = Path(str(distribution.locate_file("torch/version.py"))).read_text(encoding="utf-8")
    match = re.search(r"^(?:cuda|hip)\b[^=\n]*= *['\"]([\d.]+)", text, re.MULTILINE)
    return distribution.version, match[1] if match else None


def requirements_of(cuda: str) -> Build:
    """Find the row of a build, also of one that is not in the table: its major version decides."""
    for build in BUILDS:
        if build.cuda == cuda:
            return build
    major = as_version(cuda)[0]
    for build in BUILDS:
        if as_version(build.cuda)[0] == major:
            # CUDA 12.8 and later 12.x dropped the oldest cards and learned the newest ones
            older = (7, 0) if major == 12 else build.min_capability
            return Build(cuda, build.min_driver, older, (12, 1))
    return Build(cuda, (), (), (99,))


def print_advice(problems: list[str], gpus: list[Gpu], remedy: str) -> None:
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    index = fitting_index(gpus)
    if index:
        print(f"This build fits: {remedy.format(index=index)}", file=sys.stderr)
    else:
        print("No build of this torch fits: update the driver, or leave out the old cards", file=sys.stderr)
    print("To choose cards, or none (the CPU): CUDA_VISIBLE_DEVICES=0,1 or CUDA_VISIBLE_DEVICES=", file=sys.stderr)


def check_gpus() -> int:
    """Print how many GPUs torch can use; return 2 if there are some and the installed torch cannot use them."""
    build = installed_build()
    gpus = query_gpus()
    if gpus is None or build is None:
        # Other cards than NVIDIA's, or a container without nvidia-smi: torch itself knows, but takes seconds to ask
        if build and build[1] and glob.glob("/dev/nvidia[0-9]*") + glob.glob("/dev/kfd"):
            import torch

            print(torch.cuda.device_count())
        else:
            print(0)
        return 0
    gpus = select_visible(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
    version, cuda = build
    if gpus and cuda is None:
        print(f"warning: torch {version} is a build for the CPU, the GPUs stay idle ({len(gpus)})", file=sys.stderr)
        index = fitting_index(gpus)
        if index:
            print(f"A build that fits: {reinstall(version, index)}", file=sys.stderr)
        gpus = []
    problems = misfits(requirements_of(cuda), gpus) if cuda else []
    if problems:
        print_advice(problems, gpus, reinstall(version, "{index}"))
        if os.environ.get("SETUP") != "skip":  # containers with CUDA's forward compatibility libraries know better
            return 2
    print(len(gpus))
    return 0


def reinstall(version: str, index: str) -> str:
    return f"{sys.executable} -m pip install --force-reinstall --index-url {index} torch=={version.split('+')[0]}"


def check_default_build() -> int:
    """Before gigabytes are downloaded: return 2 if torch's default build would not run on this machine's GPUs."""
    gpus = select_visible(query_gpus() or [], os.environ.get("CUDA_VISIBLE_DEVICES"))
    problems = misfits(DEFAULT_BUILD, gpus)
    if problems:
        print_advice(problems, gpus, "run the same command with TORCH_INDEX_URL={index}")
        return 2
    return 0


def main(argv: list[str] | None = None) -> int:
    command, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if command == "packages":
        split = rest.index("--stamp") if "--stamp" in rest else len(rest)
        return check_packages([Path(item) for item in rest[:split]], Path(rest[split + 1]) if rest[split:] else None)
    if command == "fingerprint":
        print(fingerprint([Path(item) for item in rest]))
        return 0
    if command == "gpus":
        return check_gpus()
    if command == "build":
        return check_default_build()
    print(__doc__)
    return 0 if command in ("-h", "--help") else 2


if __name__ == "__main__":
    sys.exit(main())

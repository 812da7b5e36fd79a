"""The launchers on machines of all kinds: no environment, old drivers, several GPUs, several nodes.

Each test runs the real launchers in a copy of the tree whose stage scripts print what they got. Installed packages and
GPUs are played by files: metadata folders on PYTHONPATH, and an nvidia-smi on PATH.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from suwen.check_environment import Gpu, fitting_index, read_pins, select_visible

ROOT = Path(__file__).parents[1]
STAGE_LAUNCHERS = ("run_pt.sh", "run_sft.sh", "run_dpo.sh", "run_rm.sh", "run_orpo.sh", "run_ppo.sh")
LAUNCHERS = (*STAGE_LAUNCHERS, "run_pipeline.sh", "run_tests.sh")
# sh is dash on Debian and Ubuntu, bash on others
SHELLS = sorted({os.path.realpath(path) for path in map(shutil.which, ("sh", "dash", "bash")) if path})
STUB = """
import json, os, sys
names = ["RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "DS_ACCELERATOR", "ACCELERATE_USE_CPU"]
values = {name: os.environ.get(name) for name in names}
line = json.dumps({"argv": sys.argv[1:], "pid": os.getpid(), **values})
os.write(1, f"{line}\\n".encode())  # at once: two processes write to one pipe
"""


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of the project's launchers with stage scripts that print their arguments, in a folder with a blank."""
    folder = tmp_path / "su wen"
    shutil.copytree(ROOT / "configs", folder / "configs")
    (folder / "suwen").mkdir()
    names = "__init__ all_reduce check_environment command_line meeting old_flags preflight readers records tables"
    for name in names.split():
        shutil.copy(ROOT / "suwen" / f"{name}.py", folder / "suwen")
    (folder / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "experiment.py", folder / "tools")
    for name in (*LAUNCHERS, "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, folder)
    for name in (
        "pretraining",
        "supervised_finetuning",
        "dpo_training",
        "reward_modeling",
        "orpo_training",
        "ppo_training",
    ):
        (folder / f"{name}.py").write_text(STUB)
    return folder


def write_file(file: Path, text: str, executable: bool = False) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    if executable:
        file.chmod(0o755)
    return file


def installed(folder: Path, cuda: str | None = None) -> str:
    """Play an environment that holds requirements.txt, with a torch for this CUDA version; returns its PYTHONPATH."""
    build = "+cpu" if cuda is None else f"+cu{cuda.replace('.', '')}"
    for name, version in read_pins(ROOT / "requirements.txt"):
        version += build if name == "torch" else ""
        file = folder / "packages" / f"{name}-{version}.dist-info" / "METADATA"
        write_file(file, f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    write_file(folder / "packages/torch/version.py", f"cuda: Optional[str] = {cuda!r}\nhip: Optional[str] = None\n")
    return str(folder / "packages")


def nvidia_smi(folder: Path, *gpus: str, old: bool = False) -> str:
    """Play GPUs, each "driver, compute capability"; an old driver does not know the latter. Returns the PATH to use."""
    rows = []
    for index, gpu in enumerate(gpus):
        driver, capability = gpu.split(", ")
        rows.append(f"{index}, GPU-{index}0000000, NVIDIA Card{index}, {driver}" + ("" if old else f", {capability}"))
    refuse = 'case "$*" in *compute_cap*) echo "Field is not valid"; exit 2 ;; esac\n' if old else ""
    write_file(
        folder / "bin/nvidia-smi", f"#!/bin/sh\n{refuse}cat <<'END'\n" + "\n".join(rows) + "\nEND\n", executable=True
    )
    return f"{folder / 'bin'}:/usr/bin:/bin"


def call(tree: Path, *words: str, shell: str = "sh", cwd: Path | None = None, **environment: str):
    bare = {"PATH": "/usr/bin:/bin", "HOME": str(tree), "PYTHON": sys.executable}
    command = [shell, str(tree / words[0]), *words[1:]]
    return subprocess.run(command, cwd=cwd or tree, env=bare | environment, capture_output=True, text=True, timeout=300)


def dry_run(tree: Path, *words: str, **environment: str) -> str:
    result = call(tree, *(words or ["run_sft.sh"]), DRY_RUN="1", **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


# Any shell, any folder


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("name", [*LAUNCHERS, "configs/launch.sh", ".ci/run"])
def test_every_script_parses_in_every_shell(name, shell):
    result = subprocess.run([shell, "-n", str(ROOT / name)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launchers_are_executable(name):
    assert os.access(ROOT / name, os.X_OK)


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("name", STAGE_LAUNCHERS)
def test_help_is_instant_without_any_package(name, shell, tmp_path):
    # -S: no site-packages, so that nothing but the standard library can be imported
    write_file(tmp_path / "bin/python3", f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n', executable=True)
    environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
    started = time.monotonic()
    result = subprocess.run(
        [shell, str(ROOT / name), "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    for word in ("MODEL", "WHEELHOUSE", "CONFIG", "--model_name_or_path", "--num_train_epochs", "--use_peft"):
        assert word in result.stdout
    assert time.monotonic() - started < 10
    assert [file.name for file in tmp_path.iterdir()] == ["bin"]


@pytest.mark.parametrize("name", ["run_pipeline.sh", "run_tests.sh"])
def test_help_of_the_other_scripts_runs_nothing(tree, name):
    result = call(tree, name, "--help")
    assert result.returncode == 0
    assert name in result.stdout


@pytest.mark.parametrize("shell", SHELLS)
def test_flags_arrive_as_given_and_stand_after_the_settings(tree, shell):
    words = ["--num_train_epochs", "7", "--system", 'it\'s 高血压  "x" $HOME *', ""]
    result = call(tree, "run_sft.sh", *words, shell=shell, PYTHONPATH=installed(tree))
    argv = json.loads(result.stdout)["argv"]
    assert argv[-5:] == words
    assert argv.index("--use_peft") < argv.index("--num_train_epochs", len(argv) - 5)


def test_a_dry_run_prints_a_command_that_a_shell_reads_back(tree):
    line = dry_run(tree, "run_sft.sh", "--system", "it's 高血压", PYTHONPATH=installed(tree))
    words = subprocess.run(
        ["sh", "-c", f"printf '%s\\n' {line}"], cwd=tree, capture_output=True, text=True
    ).stdout.splitlines()
    assert words[-2:] == ["--system", "it's 高血压"]


def test_the_variables_become_flags(tree):
    variables = {"MODEL": "my model", "DATA": "a:0.3,b", "VALIDATION_DATA": "v", "OUTPUT": "o"}
    argv = json.loads(call(tree, "run_dpo.sh", PYTHONPATH=installed(tree), **variables).stdout)["argv"]
    flags = dict(zip(argv[::1], argv[1::1], strict=False))
    assert flags["--model_name_or_path"] == "my model"
    assert flags["--train_file_dir"] == "a:0.3,b"
    assert flags["--validation_file_dir"] == "v"
    assert flags["--output_dir"] == "o"


@pytest.mark.parametrize(
    ("name", "data", "output"),
    [
        ("run_pt.sh", "pretrain", "pt"),
        ("run_sft.sh", "sft", "sft"),
        ("run_dpo.sh", "preference", "dpo"),
        ("run_rm.sh", "preference", "rm"),
        ("run_orpo.sh", "preference", "orpo"),
        ("run_ppo.sh", "preference", "ppo"),
    ],
)
def test_without_variables_the_data_of_the_project_and_no_model_is_named(tree, tmp_path, name, data, output):
    argv = json.loads(call(tree, name, cwd=tmp_path, PYTHONPATH=installed(tree)).stdout)["argv"]
    assert argv[argv.index("--train_file_dir") + 1] == str(tree / "data" / data)
    assert argv[argv.index("--output_dir") + 1] == f"outputs/{output}"
    assert "--model_name_or_path" not in argv


def test_data_given_as_a_flag_replaces_the_default(tree):
    for flag in ("--train_file_dir", "--train_file"):
        argv = json.loads(call(tree, "run_sft.sh", flag, "mine", PYTHONPATH=installed(tree)).stdout)["argv"]
        assert [word for word in argv if word.startswith("--train_file")] == [flag]


def test_the_stage_takes_the_launchers_place_so_that_signals_reach_it(tree):
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "PYTHONPATH": installed(tree)}
    process = subprocess.Popen(["sh", str(tree / "run_sft.sh")], env=environment, stdout=subprocess.PIPE, text=True)
    output, _ = process.communicate(timeout=60)
    assert json.loads(output)["pid"] == process.pid


# GPUs and processes


def test_no_gpu_and_one_gpu_run_plain_python(tree):
    packages = installed(tree, "13.0")
    assert "configs/launch.py" not in dry_run(tree, PYTHONPATH=packages)
    one = dry_run(tree, PYTHONPATH=packages, PATH=nvidia_smi(tree, "580.95.05, 8.0"))
    assert "configs/launch.py" not in one


@pytest.mark.parametrize(
    ("visible", "processes"),
    [(None, 4), ("0,2", 2), ("GPU-1000,GPU-3000", 2), ("0,1,9,2", 2), ("3", 1), ("", 0), ("-1", 0)],
)
def test_one_process_for_each_visible_gpu(tree, visible, processes):
    variables = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    path = nvidia_smi(tree, *["580.95.05, 9.0"] * 4)
    result = call(tree, "run_sft.sh", DRY_RUN="1", PYTHONPATH=installed(tree, "13.0"), PATH=path, **variables)
    found = re.search(r"configs/launch.py.*configs/ddp.yaml.* --num_processes (\d+) ", result.stdout)
    assert (int(found[1]) if found else min(processes, 1)) == processes
    assert ("No GPU in use" in result.stderr) == (processes == 0)


def test_more_processes_than_gpus_are_refused(tree):
    path = nvidia_smi(tree, *["580.95.05, 9.0"] * 2)
    result = call(tree, "run_sft.sh", PYTHONPATH=installed(tree, "13.0"), PATH=path, NUM_PROCESSES="3")
    assert result.returncode == 2
    assert "NUM_PROCESSES=3, but 2 GPUs are visible" in result.stderr


@pytest.mark.parametrize("config", ["zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"])
def test_deepspeed_gets_its_file_by_a_path_that_works_from_any_folder(tree, tmp_path, config):
    line = dry_run(tree, PYTHONPATH=installed(tree), NUM_PROCESSES="2", CONFIG=config, cwd=tmp_path)
    assert f"{tree}/configs/{config}.json" in line
    assert "--ddp_backend gloo" in line


def test_fsdp2_runs_on_gpus_and_is_refused_on_the_cpu(tree):
    result = call(tree, "run_sft.sh", PYTHONPATH=installed(tree), NUM_PROCESSES="2", CONFIG="fsdp2")
    assert result.returncode == 2
    assert "CONFIG=fsdp2 needs GPUs: accelerate (state.py) would quietly put DDP in its place" in result.stderr
    path = nvidia_smi(tree, *["580.95.05, 9.0"] * 2)
    line = dry_run(tree, PYTHONPATH=installed(tree, "13.0"), PATH=path, CONFIG="fsdp2")
    assert "fsdp2.yaml" in line
    assert "--ddp_backend" not in line


def test_one_gpu_with_offload_goes_through_the_engine(tree):
    path = nvidia_smi(tree, "580.95.05, 9.0")
    line = dry_run(tree, PYTHONPATH=installed(tree, "13.0"), PATH=path, CONFIG="zero3_offload")
    assert "zero3_offload.yaml' --num_processes 1 " in line


def test_an_unknown_config_names_the_known_ones(tree):
    result = call(tree, "run_sft.sh", PYTHONPATH=installed(tree), NUM_PROCESSES="2", CONFIG="zero4")
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1] == (
        "error: CONFIG: found zero4, expected a file or one of: ddp fsdp2 zero1 zero1_offload zero2 zero2_offload "
        "zero3 zero3_offload"
    )


def test_several_machines_count_all_their_processes(tree):
    variables = {"NUM_MACHINES": "2", "MACHINE_RANK": "1", "MAIN_PROCESS_IP": "10.0.0.1", "MAIN_PROCESS_PORT": "1234"}
    path = nvidia_smi(tree, *["580.95.05, 9.0"] * 4)
    line = dry_run(tree, PYTHONPATH=installed(tree, "13.0"), PATH=path, **variables)
    expected = "--num_processes 8 --num_machines 2 --machine_rank 1 --main_process_ip 10.0.0.1 --main_process_port 1234"
    assert expected in line


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"MACHINE_RANK": "0"}, "NUM_MACHINES=2 needs MAIN_PROCESS_IP"),
        ({"MAIN_PROCESS_IP": "10.0.0.1"}, "NUM_MACHINES=2 needs MACHINE_RANK"),
        ({"MAIN_PROCESS_IP": "10.0.0.1", "MACHINE_RANK": "2"}, "MACHINE_RANK: found 2, expected 0 to 1"),
    ],
)
def test_several_machines_need_an_address_and_a_rank(tree, variables, message):
    result = call(tree, "run_sft.sh", PYTHONPATH=installed(tree), NUM_MACHINES="2", **variables)
    assert result.returncode == 2
    assert message in result.stderr


def test_a_hostfile_says_who_is_who(tree):
    own = os.uname().nodename
    file = write_file(tree / "hostfile", f"# our machines\n10.9.9.9 slots=4\n\n{own} slots=4\n")
    path = nvidia_smi(tree, *["580.95.05, 9.0"] * 4)
    line = dry_run(tree, PYTHONPATH=installed(tree, "13.0"), PATH=path, HOSTFILE=str(file))
    assert "--num_processes 8 --num_machines 2 --machine_rank 1 --main_process_ip 10.9.9.9 " in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=2\nb slots=3\n", "found 3 slots for b, expected 2 as for the first"),
        ("a 8\n", 'found "a 8 ", expected "name slots=GPUs"'),
        ("# none\n", "names no machine"),
        ("192.0.2.1 slots=2\n", "is not in"),
    ],
)
def test_a_hostfile_that_does_not_fit_is_refused(tree, text, message):
    file = write_file(tree / "hostfile", text)
    result = call(tree, "run_sft.sh", PYTHONPATH=installed(tree), HOSTFILE=str(file))
    assert result.returncode == 2
    assert message in result.stderr


def test_slurm_starts_the_launcher_once_a_machine_with_its_rank(tree):
    """`srun` and `scontrol` are played by scripts that do what Slurm documents."""
    for node in (0, 1):
        write_file(tree / "bin/scontrol", "#!/bin/sh\nprintf 'gpu07\\ngpu08\\n'\n", executable=True)
        write_file(tree / "bin/srun", f'#!/bin/sh\nshift\nexport SLURM_NODEID={node}\nexec "$@"\n', executable=True)
        path = nvidia_smi(tree, *["580.95.05, 9.0"] * 2)
        slurm = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "40123"}
        variables = {
            "PATH": path,
            "PYTHONPATH": installed(tree, "13.0"),
            "SLURM_SUBMIT_DIR": str(tree),
            "CONFIG": "zero3",
        }
        line = call(
            tree, "configs/slurm.sh", "run_sft.sh", "--seed", "7", shell="bash", DRY_RUN="1", **slurm, **variables
        )
        assert line.returncode == 0, line.stderr
        expected = f"--num_processes 4 --num_machines 2 --machine_rank {node} --main_process_ip gpu07"
        assert (
            f"{expected} --main_process_port 20123" in line.stdout
            and "zero3.yaml" in line.stdout
            and line.stdout.rstrip().endswith("--seed 7")
        )


@pytest.mark.distributed
def test_two_processes_on_the_cpu_share_its_cores(tree):
    pytest.importorskip("accelerate")
    write_file(tree / "data/sft/rows.jsonl", '{"instruction": "头痛怎么办？", "output": "休息。"}\n')
    result = call(tree, "run_sft.sh", "--seed", "1", NUM_PROCESSES="2", SETUP="skip")
    assert result.returncode == 0, result.stderr
    assert re.search(r"preflight: all-reduce of 4 MiB over 2 processes by gloo: .* GB/s", result.stderr)
    rows = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert sorted((row["RANK"], row["WORLD_SIZE"]) for row in rows) == [("0", "2"), ("1", "2")]
    assert {row["OMP_NUM_THREADS"] for row in rows} == {str(max(1, (os.cpu_count() or 1) // 2))}
    assert all(row["argv"][-2:] == ["--seed", "1"] for row in rows)


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_reads_every_config(file):
    pytest.importorskip("accelerate")
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    assert (config.distributed_type.value == "DEEPSPEED") == file.with_suffix(".json").is_file()
    if config.deepspeed_config:
        assert config.deepspeed_config["deepspeed_config_file"] == f"configs/{file.stem}.json"
        engine = json.loads(file.with_suffix(".json").read_text())
        assert str(engine["zero_optimization"]["stage"]) == file.stem[4]
        assert ("offload_optimizer" in engine["zero_optimization"]) == file.stem.endswith("_offload")
        # These follow the command line; a figure here would contradict it
        for key in ("gradient_accumulation_steps", "gradient_clipping", "train_micro_batch_size_per_gpu"):
            assert engine[key] == "auto"


# Does torch fit the cards?


@pytest.mark.parametrize(
    ("cuda", "gpu", "message", "build"),
    [
        (
            "13.0",
            "535.104.05, 8.0",
            "driver 535.104.5 is too old for torch's CUDA 13.0 build, which needs 580.65",
            "cu126",
        ),
        ("13.0", "580.95.05, 7.0", "compute capability 7.0, torch's CUDA 13.0 build serves 7.5 to 12.1", "cu126"),
        ("12.6", "580.95.05, 12.0", "compute capability 12.0, torch's CUDA 12.6 build serves 5.0 to 9.0", "cu130"),
        ("12.6", "470.57.02, 8.0", "driver 470.57.2 is too old for torch's CUDA 12.6 build", None),
        ("13.0", "580.95.05, 3.5", "compute capability 3.5", None),
    ],
)
def test_a_build_that_cannot_use_the_gpu_stops_and_names_the_one_that_fits(tree, cuda, gpu, message, build):
    result = call(tree, "run_sft.sh", PYTHONPATH=installed(tree, cuda), PATH=nvidia_smi(tree, gpu))
    assert result.returncode == 2
    assert message in result.stderr
    if build:
        command = (
            rf"-m pip install --force-reinstall --index-url https://download.pytorch.org/whl/{build} torch==[\d.]+$"
        )
        assert re.search(command, result.stderr, re.MULTILINE)
    else:
        assert "No build of this torch fits" in result.stderr
    assert "CUDA_VISIBLE_DEVICES=" in result.stderr
    assert not result.stdout


def test_the_cpu_can_be_chosen_where_no_build_fits(tree):
    path = nvidia_smi(tree, "470.57.02, 3.5")
    line = dry_run(tree, PYTHONPATH=installed(tree, "13.0"), PATH=path, CUDA_VISIBLE_DEVICES="")
    assert "supervised_finetuning.py" in line


def test_a_driver_too_old_to_name_capabilities_is_judged_by_its_version(tree):
    path = nvidia_smi(tree, "470.57.02, 8.0", old=True)
    result = call(tree, "run_sft.sh", PYTHONPATH=installed(tree, "13.0"), PATH=path)
    assert result.returncode == 2
    assert "driver 470.57.2 is too old" in result.stderr


def test_a_cpu_build_on_a_gpu_machine_runs_on_the_cpu_and_says_so(tree):
    path = nvidia_smi(tree, *["580.95.05, 9.0"] * 2)
    result = call(tree, "run_sft.sh", DRY_RUN="1", PYTHONPATH=installed(tree), PATH=path)
    assert result.returncode == 0
    assert "is a build for the CPU, the GPUs stay idle (2)" in result.stderr
    assert "whl/cu130 torch==" in result.stderr
    assert "accelerate" not in result.stdout


def test_gigabytes_are_not_downloaded_for_a_card_they_do_not_serve(tree):
    result = call(tree, "run_sft.sh", PATH=nvidia_smi(tree, "535.104.05, 8.0"), PYTHON=bare_python(tree))
    assert result.returncode == 2
    assert "run the same command with TORCH_INDEX_URL=https://download.pytorch.org/whl/cu126" in result.stderr
    assert not (tree / ".venv").exists()


@pytest.mark.parametrize(
    ("driver", "capabilities", "build"),
    [
        ((580, 95), [(8, 0)], "cu130"),
        ((580, 95), [(7, 0), (8, 0)], "cu126"),
        ((550, 54), [(9, 0)], "cu126"),
        ((550, 54), [(10, 0)], None),
        ((580, 95), [(7, 0), (12, 0)], None),
        ((580, 95), [None], "cu130"),
    ],
)
def test_the_newest_build_that_serves_all_cards_is_chosen(driver, capabilities, build):
    gpus = [Gpu(str(i), f"GPU-{i}", f"card {i}", driver, capability) for i, capability in enumerate(capabilities)]
    assert fitting_index(gpus) == (build and f"https://download.pytorch.org/whl/{build}")


def test_slices_of_a_card_count_as_devices():
    gpu = Gpu("0", "GPU-0", "H100", (580, 95), (9, 0))
    assert len(select_visible([gpu], "MIG-aaaa,MIG-bbbb")) == 2


# The environment


def bare_python(tree: Path) -> str:
    """An interpreter without a single package but pip, as on a fresh machine."""
    code = "import sys; sys.path[:] = [p for p in sys.path if 'packages' not in p]\n"
    write_file(tree / "bare/sitecustomize.py", code)
    text = f'#!/bin/sh\nPYTHONPATH="{tree}/bare${{PYTHONPATH:+:$PYTHONPATH}}" exec "{sys.executable}" "$@"\n'
    return str(write_file(tree / "bare/python3", text, executable=True))


def write_wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> None:
    """A real wheel, a few hundred bytes long."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for file, text in (files | {f"{info}/RECORD": record}).items():
            archive.writestr(file, text)


def small_requirements(tree: Path, *lines: str) -> None:
    (tree / "requirements.txt").write_text("\n".join(lines) + "\n")


@pytest.mark.setup
def test_a_bare_machine_gets_its_environment_from_a_wheelhouse_once(tree):
    small_requirements(
        tree, "torch==2.13.0", 'suwentest==1.0; python_version >= "3.11"', 'never==1; python_version < "3.11"'
    )
    write_wheel(tree / "wheels", "torch", "2.13.0", {"torch/version.py": "cuda = None\n", "torch/__init__.py": ""})
    write_wheel(tree / "wheels", "suwentest", "1.0", {"suwentest.py": "value = 1\n"})
    variables = {"PYTHON": bare_python(tree), "WHEELHOUSE": str(tree / "wheels")}

    first = call(tree, "run_sft.sh", **variables)
    assert first.returncode == 0, first.stderr
    assert "torch==2.13.0 is missing; suwentest==1.0 is missing" in first.stderr
    assert "The environment is ready: .venv" in first.stderr
    assert json.loads(first.stdout.splitlines()[-1])["argv"]
    assert not (tree / ".venv.lock").exists()

    del variables["WHEELHOUSE"]
    started = time.monotonic()
    second = call(tree, "run_sft.sh", **variables)
    assert second.returncode == 0, second.stderr
    assert "Installing" not in second.stderr
    assert time.monotonic() - started < 10
    assert f"{tree}/.venv/bin/python" in dry_run(tree, "run_sft.sh", **variables)

    # Another version: what is there is brought up to date
    small_requirements(tree, "torch==2.13.0", "suwentest==1.1")
    write_wheel(tree / "wheels", "suwentest", "1.1", {"suwentest.py": "value = 2\n"})
    third = call(tree, "run_sft.sh", WHEELHOUSE=str(tree / "wheels"), PYTHON=variables["PYTHON"])
    assert third.returncode == 0, third.stderr
    assert ".venv is unfinished or older than requirements.txt" in third.stderr
    assert "Successfully installed suwentest-1.1" in third.stderr


@pytest.mark.setup
def test_torch_comes_from_its_own_index(tree):
    small_requirements(tree, "torch==2.13.0")
    write_wheel(tree / "index/torch", "torch", "2.13.0+cu126", {"torch/version.py": "cuda = '12.6'\n"})
    link = '<a href="torch-2.13.0+cu126-py3-none-any.whl">torch-2.13.0+cu126-py3-none-any.whl</a>'
    write_file(tree / "index/torch/index.html", f"<!DOCTYPE html><html><body>{link}</body></html>")
    # An index that must not be asked: the requirement is met before it is its turn
    variables = {"PIP_INDEX_URL": "http://127.0.0.1:9/none", "PIP_RETRIES": "0", "PIP_CONFIG_FILE": os.devnull}
    index = (tree / "index").as_uri()
    result = call(tree, "run_sft.sh", PYTHON=bare_python(tree), TORCH_INDEX_URL=index, **variables)
    assert result.returncode == 0, result.stderr
    assert "Successfully installed torch-2.13.0+cu126" in result.stderr


@pytest.mark.setup
def test_a_failed_installation_is_said_and_taken_up_again(tree):
    small_requirements(tree, "torch==2.13.0")
    (tree / "wheels").mkdir()
    variables = {"PYTHON": bare_python(tree), "WHEELHOUSE": str(tree / "wheels")}
    result = call(tree, "run_sft.sh", **variables)
    assert result.returncode == 2
    assert "run the same command again to go on" in result.stderr
    assert not (tree / ".venv.lock").exists()
    write_wheel(tree / "wheels", "torch", "2.13.0", {"torch/version.py": "cuda = None\n"})
    assert call(tree, "run_sft.sh", **variables).returncode == 0


@pytest.mark.setup
def test_the_lock_of_a_dead_launcher_is_removed(tree):
    small_requirements(tree, "torch==2.13.0")
    write_wheel(tree / "wheels", "torch", "2.13.0", {"torch/version.py": "cuda = None\n"})
    process = subprocess.Popen(["true"])
    process.wait()
    write_file(tree / ".venv.lock/owner", f"{os.uname().nodename} {process.pid}\n")
    assert call(tree, "run_sft.sh", PYTHON=bare_python(tree), WHEELHOUSE=str(tree / "wheels")).returncode == 0


def test_an_interpreter_that_is_too_old_or_missing_is_refused(tree):
    old = write_file(tree / "old/python3", "#!/bin/sh\nexit 1\n", executable=True)
    for python in (str(old), str(tree / "nowhere")):
        result = call(tree, "run_sft.sh", PYTHON=python)
        assert result.returncode == 2
        assert f"PYTHON={python} does not run or is older than 3.11" in result.stderr


def test_a_newer_interpreter_is_found_beside_an_old_python3(tree):
    write_file(tree / "bin/python3", "#!/bin/sh\nexit 1\n", executable=True)
    write_file(tree / "bin/python", "#!/bin/sh\nexit 1\n", executable=True)
    write_file(tree / "bin/python3.13", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', executable=True)
    line = dry_run(tree, PYTHON="", PATH=f"{tree / 'bin'}:/usr/bin:/bin", PYTHONPATH=installed(tree))
    assert line.startswith("python3.13 ")


def test_the_active_environment_is_used_before_python3(tree):
    write_file(tree / "env/bin/python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', executable=True)
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        line = dry_run(tree, PYTHON="", PYTHONPATH=installed(tree), **{variable: str(tree / "env")})
        assert line.startswith(f"'{tree}/env/bin/python' ")


def test_requirements_are_exact_pins_that_this_python_reads():
    for name in ("requirements.txt", "requirements-dev.txt"):
        pins = read_pins(ROOT / name)
        assert len({package for package, _ in pins}) == len(pins)
    assert dict(read_pins(ROOT / "requirements.txt"))["torch"].count(".") == 2


# run_tests.sh and run_pipeline.sh


def test_run_tests_goes_on_after_a_failure_and_names_every_tool_that_failed(tree):
    text = f"""#!/bin/sh
case "$*" in
    -c*) exec "{sys.executable}" "$@" ;;
    *mypy* | *"ruff check"*) exit 1 ;;
    *pytest*) echo "$@" ;;
esac
"""
    python = write_file(tree / "fake/python", text, executable=True)
    result = call(tree, "run_tests.sh", "--fast", "-k", "merge", PYTHON=str(python), SETUP="skip")
    assert result.returncode == 1
    assert result.stdout.strip().splitlines()[-1] == "FAILED: lint types"
    assert (
        "-m pytest -m not slow and not training and not distributed and not setup and not gpu -k merge" in result.stdout
    )


def test_the_pipeline_sets_up_the_environment_and_starts_the_experiment(tree):
    lines = dry_run(tree, "run_pipeline.sh", "--output_dir", "my outputs", PYTHONPATH=installed(tree)).splitlines()
    (pretraining,) = [line for line in lines if re.search(r"run_pt.sh'? --", line)]
    assert "OUTPUT='my outputs/seed-1/pt'" in pretraining
    assert call(tree, "run_pipeline.sh", "--help").stdout.count("--stages") and lines[-1].startswith("Done in")


def test_the_pipeline_refuses_what_it_does_not_know(tree):
    result = call(tree, "run_pipeline.sh", "--max_steps", "3", PYTHONPATH=installed(tree))
    assert result.returncode == 2 and "--max_steps" in result.stderr and "Traceback" not in result.stderr

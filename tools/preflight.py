"""Before several processes train together: the same code, packages, data and model everywhere, and do they connect?

    python tools/preflight.py --num_processes 4
    python tools/preflight.py --num_processes 8 --num_machines 2 --machine_rank 0 --main_process_ip 10.0.0.1 \\
        --command "supervised_finetuning.py --train_file_dir data/sft"

The second one is started on each machine, with its rank. The launchers do this by themselves.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from suwen.command_line import build_parser, flag, run, split_dataclasses


@dataclass
class PreflightArguments:
    num_processes: int = flag(1, "processes on this machine")
    num_machines: int = flag(1, "machines")
    machine_rank: int = flag(0, "number of this machine, from 0")
    main_process_ip: str = flag("127.0.0.1", "address of machine 0, as the others reach it")
    main_process_port: int = flag(29500, "a free port of machine 0")
    command: str = flag("", "the training to be started: its data, model and folders are compared too")


def main(argv: list[str] | None = None) -> None:
    parser = build_parser(__doc__, PreflightArguments)
    (given,) = split_dataclasses(parser.parse_args(argv), PreflightArguments)
    if given.num_processes < 1 or not 0 <= given.machine_rank < given.num_machines:
        raise ValueError(
            f"--num_processes {given.num_processes} --num_machines {given.num_machines} --machine_rank "
            f"{given.machine_rank}: expected a process at least, and a rank of 0 to {given.num_machines - 1}"
        )
    from suwen.preflight import preflight

    place = (given.main_process_ip, given.main_process_port)
    meeting = preflight(shlex.split(given.command), given.num_processes, given.num_machines, given.machine_rank, *place)
    meeting.close()


if __name__ == "__main__":
    run(main)

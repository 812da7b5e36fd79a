"""`accelerate launch` whose beginning and end are as clear as those of one process.

Before: a preflight (suwen/preflight.py). While it runs: launchers of several machines watch each other, so that none
waits for one that is gone. After: the failed rank's exit code, and no traceback; the rank itself has said what was
wrong, and torch's launcher would add fifty lines about the subprocess.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


FORCE_SECONDS = 20  # for ranks to end by themselves when another machine is lost
SAVE_SECONDS = 120  # and when the launcher is asked to end: they may be writing a checkpoint


def main() -> int:
    import psutil
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    args = launch_command_parser().parse_args()
    meeting = None
    if reason := os.environ.get("PREFLIGHT_SKIP"):
        print(f"preflight left out ({reason}): a machine that is lost will not be noticed", file=sys.stderr)
    else:
        from suwen.preflight import choose_interface, preflight

        machines = args.num_machines or 1
        place = (args.main_process_ip or "127.0.0.1", args.main_process_port or 29500)
        words = [args.training_script, *args.training_script_args]
        try:
            meeting = preflight(words, (args.num_processes or 1) // machines, machines, args.machine_rank or 0, *place)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        choose_interface(meeting)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVE_SECONDS))
    lost: list[int] = []

    def end(problem: str, code: int) -> None:
        print(
            f"error: {problem}: this machine's processes are ended too; the same command on all machines goes on from "
            "the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        lost.append(code or 1)
        ranks = psutil.Process().children(recursive=True)
        os.kill(os.getpid(), signal.SIGTERM)  # torch's launcher asks the ranks to end
        time.sleep(FORCE_SECONDS)
        for rank in ranks:  # they hear no signal while they wait for one that is gone
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.kill()
        time.sleep(FORCE_SECONDS / 2)
        os._exit(lost[0])  # torch's launcher itself hears no signal while it waits for the machine to join

    if meeting is not None:
        meeting.watch(end)
    rank, code, told = 0, 0, False
    try:
        launch_command(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
    except subprocess.CalledProcessError as error:  # a single process
        code = error.returncode
    except SignalException as stopped:
        if lost:
            return lost[0]
        told, code = True, -stopped.sigval
    code = code if code >= 0 else 128 - code
    if code not in (0, 2) and not told:  # the ranks that were told to end have said so
        print(f"error: the process of rank {rank} ended with code {code} (see above)", file=sys.stderr)
    if meeting is not None:
        meeting.close(f"ended with code {code}" if code else "", code)
    return code


if __name__ == "__main__":
    sys.exit(main())

"""`accelerate launch` whose end is as clear as that of one process: the failed rank's exit code, and no traceback.

The rank itself has said what was wrong; torch's launcher would add fifty lines about the subprocess.
"""

import subprocess
import sys


def main() -> int:
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch_command(launch_command_parser().parse_args())
        return 0
    except SignalException as error:  # the ranks were told, and given half a minute to save
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
    except subprocess.CalledProcessError as error:  # a single process
        rank, code = 0, error.returncode
    if code != 2:
        print(f"error: the process of rank {rank} ended with code {code} (see above)", file=sys.stderr)
    return code if code > 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())

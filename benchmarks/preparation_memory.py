"""Does memory stay flat while data are prepared? Peak memory over generated text of several sizes.

    python benchmarks/preparation_memory.py --megabytes 64,256,1024

Each size is written as JSON lines of random characters, which leaves nothing to compress or to find twice, and read,
checked, split, sketched and stored by `prepare_data` in a process of its own. In place of the tokenizer stands a
function of a few tokens, which saves hours and keeps no memory. Prints the rows, the seconds of one core and the peak
of anonymous memory: what is held, without files that are mapped and can be dropped at any time.
"""

import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from suwen.command_line import build_parser, flag, run, split_dataclasses

CHARACTERS = 700  # in a row, three bytes each
FIRST, LAST = 0x4E00, 0x9FA5  # of the common Chinese characters


@dataclass
class SizeArguments:
    megabytes: str = flag("64,256,1024", "sizes of the text")
    folder: str = flag("", "a folder that holds a file of such text: prepare it in this process, and no other")


def write_rows(file: Path, megabytes: int) -> None:
    rng = random.Random(megabytes)
    with open(file, "w", encoding="utf-8") as stream:
        while stream.tell() < megabytes * 1_000_000:
            text = "".join(map(chr, rng.choices(range(FIRST, LAST), k=CHARACTERS)))
            stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise ValueError("/proc/self/status: no RssAnon, expected Linux 4.5 or newer")


class FewTokens:
    fingerprint = "a few tokens"

    def speed_up(self) -> None:
        pass

    def __call__(self, row: dict) -> tuple[list[dict], Counter[str]]:
        return [{"input_ids": [5, 6, 7] * 4}], Counter()


def measure(folder: str) -> None:
    """Prepare the text of a folder in this process."""
    from suwen.arguments import DataArguments
    from suwen.data import prepare_data

    peak = before = anonymous_bytes()

    def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, anonymous_bytes())
            time.sleep(0.02)

    threading.Thread(target=watch, daemon=True).start()
    data = DataArguments(
        train_file_dir=folder, validation_split_fraction=0.01, num_proc=1, cache_dir=str(Path(folder) / "cache")
    )
    began = time.process_time()
    report = prepare_data(data, "text", FewTokens(), None).report
    seconds = time.process_time() - began
    print(f"| {report.rows_read:,} | {seconds:.0f} s | {before / 1e6:.0f} MB | {peak / 1e6:.0f} MB |", flush=True)


def main(argv: list[str] | None = None) -> None:
    parsed = build_parser(__doc__ or "", SizeArguments).parse_args(argv)
    (args,) = split_dataclasses(parsed, SizeArguments)
    if args.folder:
        measure(args.folder)
        return
    try:
        sizes = [int(size) for size in args.megabytes.split(",")]
    except ValueError:
        raise ValueError(f"--megabytes: found {args.megabytes!r}, expected numbers such as 64,256") from None
    print("| text | rows | one core | held before | held at most |\n|---|---:|---:|---:|---:|", flush=True)
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            write_rows(Path(folder) / "text.jsonl", size)
            print(f"| {size:,} MB ", end="", flush=True)
            subprocess.run([sys.executable, __file__, "--folder", folder], check=True)


if __name__ == "__main__":
    run(main)

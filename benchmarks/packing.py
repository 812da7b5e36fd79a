"""How full are packs, and how mixed? Against TRL's best-fit decreasing packing (`trl.pack_dataset`).

    python benchmarks/packing.py --rows 50000

Rows have lengths drawn like questions, dialogues and preference pairs, sorted in their file by kind as files are.
`full`: tokens that are not padding, of packs times their length. `lengths apart`: mean difference between two rows of a
pack, relative to that between two rows of the file; near 0 a pack holds its like alone, near 1 it is a fair draw.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from suwen.command_line import build_parser, flag, run, split_dataclasses
from suwen.packing import pack_best_fit

KINDS = {"questions": (4.6, 0.6), "dialogues": (5.6, 0.8), "pairs": (3.9, 0.15)}  # log-normal: mean, deviation


@dataclass
class PackArguments:
    rows: int = flag(50_000, "of each kind")


def suwen(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    return [lengths[pack] for pack in pack_best_fit(lengths, capacity)]


def trl(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    import datasets
    from trl import pack_dataset

    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_dict({"input_ids": [[0] * length for length in lengths]})
    packed = pack_dataset(rows, capacity, strategy="bfd", map_kwargs={"batch_size": len(lengths)})
    return [np.array(found) for found in packed["seq_lengths"]]


def spread(lengths: np.ndarray) -> float:
    """Mean absolute difference between two different ones."""
    ordered, count = np.sort(lengths), len(lengths)
    return float(2 * (ordered * (2 * np.arange(count) - count + 1)).sum() / (count * (count - 1)))


def main(argv: list[str] | None = None) -> None:
    parsed = build_parser(__doc__ or "", PackArguments).parse_args(argv)
    (args,) = split_dataclasses(parsed, PackArguments)
    print("| rows | packs of | | full | lengths apart | rows/s |\n|---|---:|---|---:|---:|---:|")
    for kind, (mean, deviation) in KINDS.items():
        random = np.random.default_rng(0)
        lengths = np.sort(np.clip(random.lognormal(mean, deviation, args.rows), 16, 1024).astype(np.int64))
        for capacity in (1024, 2048, 4096):
            for pack in (suwen, trl):
                began = time.monotonic()
                packs = pack(lengths, capacity)
                seconds = time.monotonic() - began
                full = lengths.sum() / (len(packs) * capacity)
                mixed = np.mean([spread(found) for found in packs if len(found) > 1]) / spread(lengths)
                cells = (kind, f"{capacity:,}", pack.__name__, f"{full:.2%}", f"{mixed:.2f}")
                print("|", " | ".join(cells), f"| {args.rows / seconds:,.0f} |", flush=True)


if __name__ == "__main__":
    run(main)

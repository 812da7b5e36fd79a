"""How fast do rows become packed tokens? Against `datasets.map` in one process, as training scripts commonly do it.

    python benchmarks/preparation_speed.py --task sft
    python benchmarks/preparation_speed.py --task pt --train_file_dir books/

suwen reads, checks, hashes, splits, renders by the chat template, encodes, sketches (for the search for contamination)
and packs by best fit, in all cores. The other side reads the same files, tokenises the messages (SFT, with labels) or
the texts in batches (PT, joined to blocks of --max_length) by `map` with one process, and does nothing else. Both use
the embedded model's tokenizer and start without a cache; rounds alternate, medians count. Tokens are each side's own.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from suwen.arguments import DataArguments
from suwen.command_line import build_parser, flag, run, split_dataclasses

SCHEMAS = {"sft": "conversation", "pt": "text"}
FOLDERS = {"sft": "sft", "pt": "pretrain"}


@dataclass
class SpeedArguments:
    task: str = flag("sft", "sft or pt")
    train_file_dir: str = flag("", "JSON lines with `messages` or `text` (rows on an invented graph, made here)")
    max_length: int = flag(1024, "tokens in a pack")
    rounds: int = flag(3, "alternating rounds")


def ours(given: SpeedArguments, folder: str, tokenizer: Any, cache: str) -> int:
    from suwen.data import prepare_data
    from suwen.encoding import ChatEncoder
    from suwen.packing import pack_best_fit
    from suwen.rows import ConversationRows, DocumentRows
    from suwen.trainers import row_lengths

    encode: Any = DocumentRows(tokenizer, given.max_length)
    if given.task == "sft":
        encode = ConversationRows(ChatEncoder(tokenizer, None), given.max_length, False)
    data = DataArguments(train_file_dir=folder, validation_split_fraction=0.01, cache_dir=cache)
    prepared = prepare_data(data, SCHEMAS[given.task], encode, None)
    pack_best_fit(row_lengths(prepared.train, ["input_ids"]), given.max_length)
    return prepared.report.tokens + prepared.report.validation_tokens


def by_map(given: SpeedArguments, folder: str, tokenizer: Any, cache: str) -> int:
    import datasets

    datasets.disable_progress_bars()
    files = [str(file) for file in sorted(Path(folder).rglob("*.jsonl"))]
    rows = datasets.load_dataset("json", data_files=files, split="train", cache_dir=cache)

    def conversations(batch: dict[str, list]) -> dict[str, list]:
        made: dict[str, list] = {"input_ids": [], "labels": []}
        for messages in batch["messages"]:
            ids: list[int] = []
            labels: list[int] = []
            for message in messages:
                text = f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n"
                new = tokenizer(text, add_special_tokens=False)["input_ids"]
                ids += new
                labels += new if message["role"] == "assistant" else [-100] * len(new)
            made["input_ids"].append(ids[: given.max_length])
            made["labels"].append(labels[: given.max_length])
        return made

    def blocks(batch: dict[str, list]) -> dict[str, list]:
        joined = [token for ids in batch["input_ids"] for token in ids]
        size = given.max_length
        cut = [joined[at : at + size] for at in range(0, len(joined) // size * size, size)]
        return {"input_ids": cut, "labels": [list(ids) for ids in cut]}

    names = rows.column_names
    if given.task == "sft":
        rows = rows.map(conversations, batched=True, remove_columns=names)
    else:
        rows = rows.map(lambda batch: {"input_ids": tokenizer(batch["text"])["input_ids"]}, batched=True,
                        remove_columns=names)  # fmt: skip
        rows = rows.map(blocks, batched=True)
    return sum(map(len, rows.with_format("arrow")[:]["input_ids"].to_pylist()))


def make_rows(folder: Path, task: str) -> str:
    from tools.build_data import main as build

    build(["--recipe", "fictional", "--size", "2000", "--passes", "20", "--output_dir", str(folder)])
    return str(folder / FOLDERS[task])


def main(argv: list[str] | None = None) -> None:
    parsed = build_parser(__doc__ or "", SpeedArguments).parse_args(argv)
    (given,) = split_dataclasses(parsed, SpeedArguments)
    if given.task not in SCHEMAS:
        raise ValueError(f"--task: found {given.task!r}, expected sft or pt")
    from suwen.embedded import build_embedded_model
    from suwen.models import load_tokenizer

    contenders: dict[str, Callable[..., int]] = {"suwen": ours, "datasets.map, one process": by_map}
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.train_file_dir or make_rows(Path(scratch) / "rows", given.task)
        tokenizer = load_tokenizer(str(build_embedded_model()), "auto")
        for number in range(given.rounds):
            for name, prepare in contenders.items():
                began = time.monotonic()
                tokens = prepare(given, folder, tokenizer, f"{scratch}/{number}-{prepare.__name__}")
                speeds[name].append(tokens / (time.monotonic() - began))
                print(f"round {number + 1}, {name}: {tokens:,} tokens, {speeds[name][-1]:,.0f} a second", flush=True)
    best = statistics.median(speeds["suwen"])
    print("\n| | tokens/s | ratio |\n|---|---|---|")
    for name, found in speeds.items():
        print(f"| {name} | {statistics.median(found):,.0f} | {best / statistics.median(found):.2f} |")


if __name__ == "__main__":
    run(main)

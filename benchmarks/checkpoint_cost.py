"""What a safe checkpoint costs: ours against the plain Trainer's, in one process, turn by turn.

    python benchmarks/checkpoint_cost.py --million_parameters 100 --repeats 7

Both save the same model with AdamW's state to the same disk. The plain one returns when its bytes are in the page
cache; ours also when its weights have been compared, and is hashed, flushed and published while the training goes on.
What the disk still has to write is waited for between turns. Prints the median seconds for which a training stands
still, their ratio, which is what is compared between machines, and the seconds until ours is published.
"""

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from suwen.command_line import build_parser, flag, run, split_dataclasses


@dataclass
class CostArguments:
    million_parameters: int = flag(100, "size of the model")
    repeats: int = flag(7, "saves of each kind")
    folder: str = flag("", "where to save; unset: a temporary folder")


def build(million_parameters: int, folder: Path):
    """(our trainer, the plain one), each with the state of a step behind it."""
    import torch
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

    from suwen.embedded import build_embedded_model
    from suwen.head import add_scoring_head
    from suwen.trainers import LanguageModelTrainer

    layers = max(1, round(million_parameters / 12.6))  # of width 1,024: 4 h^2 of attention, 8 h^2 of MLP
    shape = {"hidden_size": 1024, "intermediate_size": 2730, "num_hidden_layers": layers, "num_attention_heads": 8}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(build_embedded_model())
    config = LlamaConfig(vocab_size=len(tokenizer), **shape)
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 2
    trainers = []
    for name in ("ours", "plain"):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        args = TrainingArguments(
            str(folder / name), max_steps=1, per_device_train_batch_size=1, use_cpu=True, bf16=False, report_to=[],
            save_strategy="no", save_total_limit=1, disable_tqdm=True,
        )  # fmt: skip
        if name == "ours":
            add_scoring_head(model)
            trainer = LanguageModelTrainer(
                model=model, args=args, train_dataset=Dataset.from_list(rows), eval_dataset=None, max_length=16,
                processing_class=tokenizer,
            )  # fmt: skip
        else:
            collate = lambda found: {k: torch.tensor([row[k] for row in found]) for k in found[0]}  # noqa: E731
            trainer = Trainer(model, args, data_collator=collate, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        trainers.append(trainer)
    return trainers


def measure(trainers, repeats: int) -> list[list[float]]:
    """Seconds of each save of both, in turns, and of ours until it is published; the first turn warms the disk."""
    found: list[list[float]] = [[], [], []]
    for repeat in range(repeats + 1):
        for number, trainer in enumerate(trainers):
            trainer.state.global_step = repeat + 1
            os.sync()
            began = time.perf_counter()
            trainer._save_checkpoint(trainer.model, None)
            written = time.perf_counter() - began
            if number == 0:
                trainer.saves.finish()
            if repeat:
                found[number].append(written)
                if number == 0:
                    found[2].append(time.perf_counter() - began)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = build_parser(__doc__.splitlines()[0], CostArguments)
    [given] = split_dataclasses(parser.parse_args(argv), CostArguments)
    folder = Path(tempfile.mkdtemp(dir=given.folder or None))
    try:
        times = measure(build(given.million_parameters, folder), given.repeats)
        newest = max((folder / "ours").glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
        size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    finally:
        shutil.rmtree(folder)
    medians = [statistics.median(seconds) for seconds in times]
    print(
        json.dumps(
            {
                "bytes": size,
                "seconds_ours": round(medians[0], 3),
                "seconds_plain": round(medians[1], 3),
                "ratio": round(medians[0] / medians[1], 2),
                "seconds_until_published": round(medians[2], 3),
            }
        )
    )


if __name__ == "__main__":
    run(main)

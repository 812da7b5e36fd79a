"""What a training does when a loss or a gradient is no number."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from suwen.progress import main_process, say

ROWS_FILE = "nonfinite_rows.jsonl"
SHOWN_ROWS, SHOWN_CHARACTERS = 3, 60
MOST_IN_A_ROW = 10  # steps left out one after another: then it is not the rows
MOST_OVERFLOWS = 40  # one after another, each halving the loss scale: from 2^32, the highest in use, to below 1
OVERFLOWS = "the gradient overflows float16 at every loss scale; lower --learning_rate, or use --bf16 instead of --fp16"


def row_texts(batch: dict[str, Any], tokenizer: Any) -> list[str]:
    """The rows of a batch as text; of pairs, the prompt with the better answer, then the worse answer."""
    ids = batch["input_ids"]
    if "attention_mask" in batch:
        rows = [row[mask.bool()] for row, mask in zip(ids, batch["attention_mask"], strict=True)]
    else:
        rows = ids[0].tensor_split(batch["cu_seq_lens_q"][1:-1].long().cpu())
    return tokenizer.batch_decode([row.tolist() for row in rows])


def require_finite_evaluation(loss: float, step: int) -> None:
    """
    Raises:
        ValueError: the held-out loss is not a number; nothing is saved of such a model.
    """
    if not math.isfinite(loss):
        raise ValueError(
            f"step {step}: the held-out loss is {loss}; lower --learning_rate, or use --bf16 instead of --fp16"
        )


def require_finite_weights(trainer: Any) -> None:
    """Refuse to save weights that hold NaN or infinity; every rank takes part.

    Raises:
        ValueError: on every rank, one of them has found some.
    """
    broken = [
        name
        for name, p in trainer.model.named_parameters()
        if p.requires_grad and not torch.isfinite(getattr(p, "ds_tensor", p.data)).all()  # ZeRO-3's part of it
    ]
    found = trainer.accelerator.gather(torch.tensor([len(broken)], device=trainer.args.device))
    if found.sum() > 0:
        where = broken[0] if broken else "weights on another rank"
        raise ValueError(
            f"{where}: holds NaN or infinity and is not saved; lower --learning_rate, or use --bf16 instead of --fp16"
        )


class NonFinite:
    """Looks at each optimiser step before it is taken, and stops the training or leaves the step out.

    Attributes:
        action: "stop" or "skip".
        skipped: steps left out so far.
    """

    def __init__(self, tokenizer: Any, output_dir: Path, unit: str = "step") -> None:
        """`unit`: what is counted, for messages and the file of rows."""
        self.tokenizer, self.output_dir, self.unit = tokenizer, output_dir, unit
        self.action = "stop"
        self.skipped = self.in_a_row = self.overflows = 0
        self.batches: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def choose(self, action: str, deepspeed: bool) -> None:
        """
        Raises:
            ValueError: the engine cannot leave a step out.
        """
        if action == "skip" and deepspeed:
            raise ValueError("--on_nonfinite skip: DeepSpeed takes a step before its loss is seen; expected stop")
        self.action = action

    def counted(self) -> dict[str, int]:
        """What run.json says of it."""
        return {"skipped_steps": self.skipped} if self.skipped else {}

    def note(self, loss: torch.Tensor, batch: dict[str, Any]) -> None:
        """Remember a micro-batch until the end of its step."""
        self.batches.append((loss.detach(), batch))

    def found(self, norm: Any, step: int, scaled: bool, world_size: int) -> bool:
        """Whether the step is to be left out, as every rank will decide; its rows are named and written down.

        Args:
            norm: of the gradients of all ranks.
            step: the one about to be taken.
            scaled: float16's scaler leaves out steps that are no numbers by itself. It finds its scale by gradients
                that overflow, so that such a step is told only where a loss is no number either.

        Raises:
            ValueError: it is not a number, and the training is to stop.
        """
        batches, self.batches = self.batches, []
        broken = norm is not None and not math.isfinite(float(norm))
        losses = torch.stack([loss for loss, _ in batches])
        bad = [] if losses.isfinite().all() else (~losses.isfinite()).nonzero()[:, 0].tolist()
        if not broken and not bad:
            self.in_a_row = self.overflows = 0
            return False
        rows = [
            {self.unit: step, "loss": str(losses[at].item()), "text": text}
            for at in bad or range(len(batches))
            for text in row_texts(batches[at][1], self.tokenizer)
        ]
        if broken and world_size > 1:  # the gradients are the same on all ranks, so that all are here
            everywhere = gather_object([(bool(bad), rows)])
            guilty = any(own for own, _ in everywhere)
            rows = [row for own, found in everywhere if own or not guilty for row in found]
            bad = bad or [0] * guilty
        self.overflows += broken
        if scaled and broken and not bad:
            if self.overflows == MOST_OVERFLOWS:
                raise ValueError(f"{self.unit} {step}: {OVERFLOWS}")
            return False
        what = f"the loss is {rows[0]['loss']}" if bad else f"the gradient is {float(norm)}"
        line = f"{self.unit} {step}: {what}; {self.write(rows, shared=broken and world_size > 1)}"
        if self.action == "stop":
            raise ValueError(f"{line}; lower --learning_rate, leave --fp16, or go on without them: --on_nonfinite skip")
        self.in_a_row += broken
        self.skipped += broken
        if self.in_a_row == MOST_IN_A_ROW:
            raise ValueError(f"{line}; {MOST_IN_A_ROW} steps one after another were left out: lower --learning_rate")
        say(f"{line}; {'left out' if broken else 'its gradient is finite and used'}")
        return broken

    def write(self, rows: list[dict[str, Any]], shared: bool) -> str:
        """Put rows into a file, by one process where all hold the same, and name the first of them."""
        file = self.output_dir / ROWS_FILE
        if main_process() or not shared:
            with open(file, "a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        shown = ", ".join(repr(row["text"][:SHOWN_CHARACTERS]) for row in rows[:SHOWN_ROWS])
        more = f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
        return f"rows of the batch: {shown}{more}, all in {file}"

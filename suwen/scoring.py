"""How likely a model finds given tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from suwen.encoding import IGNORE_INDEX


class Score(NamedTuple):
    """Summed over the scored tokens of one row."""

    logp: float  # natural logarithm
    tokens: int
    correct: int  # tokens that the model would have said itself


@torch.inference_mode()
def score_rows(model: Any, rows: Sequence[dict[str, list[int]]], batch_size: int = 4, title: str = "") -> list[Score]:
    """Score the tokens whose label is not IGNORE_INDEX, given everything before them in their row.

    Args:
        rows: input_ids and labels, any lengths; batched by length and padded on the right.

    Returns:
        One score a row, in the order given.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    scores: list[Score | None] = [None] * len(rows)
    for at in tqdm(range(0, len(order), batch_size), desc=title, disable=not title, leave=False):
        chosen = order[at : at + batch_size]
        batch = [rows[i] for i in chosen]
        ids = pad([row["input_ids"] for row in batch], 0).to(model.device)
        mask = pad([[1] * len(row["input_ids"]) for row in batch], 0).to(model.device)
        labels = pad([row["labels"] for row in batch], IGNORE_INDEX).to(model.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        labels = labels[:, 1:]
        kept = labels != IGNORE_INDEX
        token_logps = -torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        correct = (logits.argmax(dim=-1) == labels) & kept
        sums = ((token_logps * kept).sum(dim=1).tolist(), kept.sum(dim=1).tolist(), correct.sum(dim=1).tolist())
        for i, *values in zip(chosen, *sums, strict=True):
            scores[i] = Score(*values)
    return [score for score in scores if score is not None]


def pad(rows: Iterable[list[int]], fill: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True, padding_value=fill)

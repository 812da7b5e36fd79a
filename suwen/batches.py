"""From encoded rows to the tensors of a training step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from suwen.encoding import IGNORE_INDEX, labels_of
from suwen.rows import rows_of_pair

Row = dict[str, list[int]]
Batch = dict[str, Any]
PAIR_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


def scored_positions(labels: Sequence[int]) -> list[int]:
    """Positions of a row that predict a trained token: the one before each label that is not IGNORE_INDEX."""
    return [at for at, label in enumerate(labels[1:]) if label != IGNORE_INDEX]


def segments(lengths: Sequence[int], key_lengths: Sequence[int] | None = None) -> Batch:
    """Where the segments of a packed row lie, in the words of transformers' variable-length attention."""
    key_lengths = key_lengths or lengths

    def bounds(sizes: Sequence[int]) -> torch.Tensor:
        return torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0, dtype=torch.int32)

    return {
        "cu_seq_lens_q": bounds(lengths),
        "cu_seq_lens_k": bounds(key_lengths),
        "max_length_q": max(lengths),
        "max_length_k": max(key_lengths),
    }


def pack_rows(rows: Sequence[Row]) -> Batch:
    """Rows one behind another in one row: each its own positions, segment and labels."""
    lengths = [len(row["input_ids"]) for row in rows]
    scored, labels, start = [], [], 0
    for row, length in zip(rows, lengths, strict=True):
        trained = labels_of(row)
        positions = scored_positions(trained)
        scored += [start + at for at in positions]
        labels += [trained[at + 1] for at in positions]
        start += length
    return {
        "input_ids": torch.tensor([list(chain.from_iterable(row["input_ids"] for row in rows))]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "score_at": torch.tensor(scored, dtype=torch.long),
        "score_labels": torch.tensor(labels, dtype=torch.long),
        **segments(lengths),
    }


def pad_rows(rows: Sequence[Row], pad_token_id: int) -> Batch:
    """Rows side by side, padded on the right: for models that cannot keep packed rows apart."""
    ids = pad_sequence([torch.tensor(row["input_ids"]) for row in rows], True, pad_token_id)
    mask = pad_sequence([torch.ones(len(row["input_ids"]), dtype=torch.long) for row in rows], True, 0)
    scored, labels = [], []
    for number, row in enumerate(rows):
        trained = labels_of(row)
        positions = scored_positions(trained)
        scored += [number * ids.shape[1] + at for at in positions]
        labels += [trained[at + 1] for at in positions]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "score_at": torch.tensor(scored, dtype=torch.long),
        "score_labels": torch.tensor(labels, dtype=torch.long),
    }


def collate_rows(packs: Iterable[list[Row]], pad_token_id: int | None = None) -> Batch:
    """A batch of packs of rows; padded instead of packed where a `pad_token_id` is given."""
    rows = list(chain.from_iterable(packs))
    return pack_rows(rows) if pad_token_id is None else pad_rows(rows, pad_token_id)


# Preference pairs


def pack_pairs(pairs: Sequence[dict[str, Any]]) -> Batch:
    """Pairs one behind another, each as [prompt, chosen, rejected] with its prompt computed once.

    [prompt, chosen] is one segment; [rejected] another, whose keys are [prompt, rejected] and whose positions go on
    from the prompt. The first token of both answers is predicted by the last one of the prompt.
    """
    ids: list[int] = []
    positions, lengths, key_lengths, keys, scored, labels, owners = [], [], [], [], [], [], []
    for number, pair in enumerate(pairs):
        prompt, chosen, rejected = pair["prompt_ids"], pair["chosen_ids"], pair["rejected_ids"]
        start, after = len(ids), len(ids) + len(prompt) + len(chosen)
        ids += [*prompt, *chosen, *rejected]
        positions += [torch.arange(len(prompt) + len(chosen)), torch.arange(len(rejected)) + len(prompt)]
        lengths += [len(prompt) + len(chosen), len(rejected)]
        key_lengths += [len(prompt) + len(chosen), len(prompt) + len(rejected)]
        keys += [torch.arange(start, after), torch.arange(start, start + len(prompt))]
        keys += [torch.arange(after, after + len(rejected))]
        last = start + len(prompt) - 1
        scored += [*range(last, last + len(chosen)), last, *range(after, after + len(rejected) - 1)]
        labels += [*chosen, *rejected]
        owners += [2 * number] * len(chosen) + [2 * number + 1] * len(rejected)
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.cat(positions)[None],
        "kv_index": torch.cat(keys),
        "score_at": torch.tensor(scored),
        "score_labels": torch.tensor(labels),
        "owners": torch.tensor(owners),
        **segments(lengths, key_lengths),
    }


def pad_pairs(pairs: Sequence[dict[str, Any]], pad_token_id: int) -> Batch:
    """Both answers of each pair behind their own copy of the prompt, padded on the right."""
    rows = [row for pair in pairs for row in rows_of_pair(pair)]
    owners = [number for number, row in enumerate(rows) for label in row["labels"] if label != IGNORE_INDEX]
    return {**pad_rows(rows, pad_token_id), "owners": torch.tensor(owners)}


def collate_pairs(packs: Iterable[list[dict[str, Any]]], pad_token_id: int | None = None) -> Batch:
    """A batch of packs of pairs, with what was recorded of each pair: reference log-probabilities, if they are there.

    `owners` (N,) says which answer a scored token belongs to: 2 i for the better one of pair i, 2 i + 1 for the other.
    """
    pairs = list(chain.from_iterable(packs))
    batch = pack_pairs(pairs) if pad_token_id is None else pad_pairs(pairs, pad_token_id)
    batch["num_pairs"] = len(pairs)
    if "reference_logps" in pairs[0]:
        batch["reference_logps"] = torch.tensor([pair["reference_logps"] for pair in pairs])  # (pairs, 2)
    return batch


def last_positions(batch: Batch) -> torch.Tensor:
    """Where the rows of a batch end, in the flattened batch; of a packed one, where each of its segments does."""
    if "cu_seq_lens_q" in batch:
        return batch["cu_seq_lens_q"][1:].long() - 1
    mask = batch["attention_mask"]  # padded on the right
    return torch.arange(len(mask)) * mask.shape[1] + mask.sum(1) - 1


def collate_ends(packs: Iterable[list[dict[str, Any]]], pad_token_id: int | None = None) -> Batch:
    """A batch of packs of pairs for a reward model: scored at the last token of each answer, better, worse, better, ...

    `margins` (pairs,) are 0 where a pair has none; `numbers` (pairs,) its place in the data set, -1 if not counted.
    """
    pairs = list(chain.from_iterable(packs))
    batch = pack_pairs(pairs) if pad_token_id is None else pad_pairs(pairs, pad_token_id)
    del batch["score_labels"], batch["owners"]
    batch["score_at"] = last_positions(batch)
    batch["margins"] = torch.tensor([pair.get("margin") or 0.0 for pair in pairs])
    batch["numbers"] = torch.tensor([pair.get("number", -1) for pair in pairs])
    return batch

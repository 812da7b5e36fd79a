"""NEFTune: noise on the embeddings in training (Jain et al. 2023, arXiv:2310.05914), for packed rows.

Each number of a row's embeddings gets uniform noise in (-1, 1) times alpha / sqrt(L d), L being the tokens of the row
and d the width. The library takes for L the length of the whole batch: of ten rows in one sequence each would get a
third of the published noise.
"""

from __future__ import annotations

from typing import Any

import torch


def row_lengths(batch: dict[str, Any]) -> torch.Tensor:
    """Tokens of the row that each position belongs to: (B, T) of a padded batch, (1, T) of a packed one.

    The second answer of a packed pair counts with the prompt that it stands behind.
    """
    if "cu_seq_lens_q" in batch:
        queries, keys = batch["cu_seq_lens_q"].diff(), batch["cu_seq_lens_k"].diff()
        tokens = batch["input_ids"].shape[1]  # else a GPU is asked for their sum
        return keys.repeat_interleave(queries.long(), output_size=tokens)[None]
    mask = batch.get("attention_mask")
    if mask is None:
        return torch.full_like(batch["input_ids"], batch["input_ids"].shape[1])
    return mask.sum(1, keepdim=True).expand_as(mask)


class EmbeddingNoise:
    """A hook on the embedding layer; `rows` must be told before each forward pass in training."""

    def __init__(self, embedding: torch.nn.Module, alpha: float) -> None:
        self.alpha = alpha
        self.lengths: torch.Tensor | None = None
        embedding.register_forward_hook(self._add)

    def rows(self, batch: dict[str, Any]) -> None:
        self.lengths = row_lengths(batch)

    def _add(self, module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if not module.training or self.lengths is None:
            return output
        largest = self.alpha / (self.lengths.to(output.device) * output.shape[-1]).sqrt()
        return output + torch.empty_like(output).uniform_(-1, 1) * largest[..., None].to(output.dtype)

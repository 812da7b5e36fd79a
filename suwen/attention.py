"""Attention over packed sequences without a mask: each segment attends to itself, nothing to another.

`varlen` is registered with transformers' AttentionInterface beside a mask function that builds no mask. A batch says by
`cu_seq_lens_q` and `cu_seq_lens_k` where its segments lie (the names of transformers' flash-attention path). On CUDA in
16 bit they go to torch's own variable-length kernel; elsewhere each segment is one call of
scaled_dot_product_attention, so that no product between segments is ever computed.

`kv_index` lets segments share keys: the keys of the packed row are gathered by it before they are cut into segments. A
preference pair is the row [prompt, chosen, rejected] with two segments, [prompt, chosen] on itself and [rejected] on
[prompt, rejected]: the prompt is computed once. Queries are aligned with the end of their keys (lower right).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "varlen"


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    kv_index: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within segments; without segments the same as sdpa.

    Args:
        query: (1, H, T, D).
        key, value: (1, H_kv, T, D), H_kv divides H.
        sliding_window: keys that a query sees, itself included; None for all.
        cu_seq_lens_q: (S + 1,) int32, where segments of the queries begin, and T.
        cu_seq_lens_k: (S + 1,) int32, the same for the keys, gathered by `kv_index` if that is given.
        kv_index: (K,) rows of key and value, in the order of the segments; None where keys lie as queries do.

    Returns:
        (1, T, H, D) and None, as transformers' attention functions do.
    """
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise NotImplementedError("varlen attention has neither soft capping nor attention sinks")
    if cu_seq_lens_q is None or cu_seq_lens_k is None:
        if attention_mask is None and sliding_window is not None and sliding_window < key.shape[2]:
            attention_mask = window_mask(query.shape[2], key.shape[2], sliding_window, query.device)
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if query.shape[0] != 1:
        raise ValueError(f"a packed batch is one row, found {query.shape[0]}")
    if kv_index is not None:
        key, value = key.index_select(2, kv_index), value.index_select(2, kv_index)
    if not dropout and has_kernel(query):
        from torch.nn.attention.varlen import varlen_attn

        output = varlen_attn(
            *(x[0].transpose(0, 1).contiguous() for x in (query, key, value)),
            cu_seq_lens_q,
            cu_seq_lens_k,
            max_length_q,
            max_length_k,
            scale=scaling,
            window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
            enable_gqa=key.shape[1] != query.shape[1],
        )
        return output[None], None
    starts, key_starts = cu_seq_lens_q.tolist(), cu_seq_lens_k.tolist()
    pieces = []
    for begin, end, key_begin, key_end in zip(starts, starts[1:], key_starts, key_starts[1:], strict=False):
        length, key_length = end - begin, key_end - key_begin
        mask = None
        if key_length != length or (sliding_window is not None and sliding_window < key_length):
            mask = window_mask(length, key_length, sliding_window, query.device)
        pieces.append(
            scaled_dot_product_attention(
                query[:, :, begin:end],
                key[:, :, key_begin:key_end],
                value[:, :, key_begin:key_end],
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=key.shape[1] != query.shape[1],
            )
        )
    return torch.cat(pieces, dim=2).transpose(1, 2), None


def has_kernel(query: torch.Tensor) -> bool:
    """Whether torch's variable-length kernel takes this: 16 bit on a GPU of compute capability 8.0 or newer."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] <= 256
        and torch.cuda.get_device_capability(query.device)[0] >= 8
    )


def window_mask(length: int, key_length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """(length, key_length) of True where a query sees a key; the last query is aligned with the last key."""
    queries = torch.arange(key_length - length, key_length, device=device)[:, None]
    keys = torch.arange(key_length, device=device)[None]
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)


def varlen_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """No mask for whole sequences, packed or not; padding and caches need one, which is sdpa's."""
    if attention_mask is None and q_length == kv_length:
        return None
    return sdpa_mask(
        batch_size, q_length, kv_length, q_offset=q_offset, kv_offset=kv_offset, attention_mask=attention_mask, **kwargs
    )


AttentionInterface.register(NAME, varlen_attention)
AttentionMaskInterface.register(NAME, varlen_mask)

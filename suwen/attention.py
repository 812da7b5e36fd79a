"""Attention over packed sequences without a mask: each segment attends to itself, nothing to another.

`varlen` is registered with transformers' AttentionInterface beside a mask function that builds no mask. A batch says by
`cu_seq_lens_q` and `cu_seq_lens_k` where its segments lie (the names of transformers' flash-attention path). On CUDA in
16 bit they go to torch's own variable-length kernel; elsewhere each segment is computed by itself, by
scaled_dot_product_attention or as two products, so that no product between segments is ever computed.

`kv_index` lets segments share keys: the keys of the packed row are gathered by it before they are cut into segments. A
preference pair is the row [prompt, chosen, rejected] with two segments, [prompt, chosen] on itself and [rejected] on
[prompt, rejected]: the prompt is computed once. Queries are aligned with the end of their keys (lower right).
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "varlen"
SHIFTED = "shifted"
SHORT = 512  # keys of a segment up to which two products are faster than torch's kernel: bfloat16 on a CPU


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
    query, key, value = in_autocast_dtype(query, key, value)
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
    if query.is_cuda and key.shape[1] != query.shape[1]:
        # For older cards and float32 torch has one fast kernel, which knows no key heads that are shared
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    lengths, key_lengths = segment_lengths(cu_seq_lens_q), segment_lengths(cu_seq_lens_k)
    # split, not slices: the gradient of each slice would be a tensor of the whole row's size
    parts = zip(query.split(lengths, 2), key.split(key_lengths, 2), value.split(key_lengths, 2), strict=True)
    pieces = []
    for q, k, v in parts:
        if not dropout and q.dtype == torch.bfloat16 and q.device.type == "cpu" and k.shape[2] <= SHORT:
            pieces.append(short_attention(q, k, v, sliding_window, scaling))
            continue
        mask = None
        if q.shape[2] != k.shape[2] or (sliding_window is not None and sliding_window < k.shape[2]):
            mask = window_mask(q.shape[2], k.shape[2], sliding_window, q.device)
        pieces.append(
            scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=k.shape[1] != q.shape[1],
            )
        )
    return torch.cat(pieces, dim=2).transpose(1, 2), None


def in_autocast_dtype(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in the precision of autocast, where it is on.

    Of float32 weights rotary positions leave queries and keys in float32, values are in 16 bit already; autocast knows
    torch's own attention, not the variable-length kernel, which takes 16 bit alone.
    """
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


@functools.lru_cache(maxsize=8)
def segment_lengths(cu_seq_lens: torch.Tensor) -> list[int]:
    """Lengths of segments. Every layer asks for those of the same tensor, and a GPU answers when it has caught up."""
    return cu_seq_lens.diff().tolist()


def short_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None, scaling: float | None
) -> torch.Tensor:
    """(1, H, L, D) causal attention of one segment as two products over all of its heads, in bfloat16 on a CPU.

    torch's own kernel there multiplies 32 queries at a time, each block a call of its own, which takes two to three
    times as long; both are within the precision of bfloat16 of the exact result.
    """
    heads, length, width = query.shape[1:]
    key_heads, key_length = key.shape[1:3]
    shared = heads // key_heads  # query heads of a key head lie one below the other
    scores = torch.baddbmm(
        causal_bias(length, key_length, window, shared, query.dtype),
        query.reshape(key_heads, shared * length, width),
        key[0].transpose(1, 2),
        alpha=scaling if scaling is not None else width**-0.5,
    )
    return (scores.softmax(-1) @ value[0]).view(1, heads, length, width)


@functools.lru_cache(maxsize=64)
def causal_bias(length: int, key_length: int, window: int | None, shared: int, dtype: torch.dtype) -> torch.Tensor:
    """(shared * length, key_length) of 0 where a query sees a key, else -inf."""
    seen = window_mask(length, key_length, window, torch.device("cpu"))
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf")).repeat(shared, 1)


def shifted_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    group: int,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    kv_index: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Shifted sparse attention in training, else full attention: S2-Attn of LongLoRA (arXiv:2309.12307).

    A token attends to its own group of `group` tokens; in the second half of the heads groups lie half a group further
    on, so that what one layer cannot reach passes through the next. Groups are counted from the beginning of each
    segment and never reach into another; the first half group of the shifted heads is a group of its own, where the
    authors' code, which rolls the sequence, lets the end of a text speak to its beginning.

    Args: as of `varlen_attention`, with `group` even.
    """
    more: dict[str, Any] = {"max_length_q": max_length_q, "max_length_k": max_length_k, "kv_index": kv_index, **kwargs}
    if not module.training:
        more |= {"cu_seq_lens_q": cu_seq_lens_q, "cu_seq_lens_k": cu_seq_lens_k}
        return varlen_attention(module, query, key, value, attention_mask, **more)
    if cu_seq_lens_q is None or kv_index is not None:
        raise NotImplementedError("shifted attention trains packed rows alone, neither padded rows nor pairs")
    heads = query.shape[1]
    if key.shape[1] % 2:  # an odd number of key heads has no half
        key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    halves = zip(*(x.tensor_split(2, dim=1) for x in (query, key, value)), (0, group // 2), strict=True)
    found = []
    for q, k, v, shift in halves:
        bounds = group_bounds(cu_seq_lens_q, group, shift)
        kwargs |= {"max_length_q": group, "max_length_k": group, "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        found.append(varlen_attention(module, q, k, v, None, **kwargs)[0])
    return torch.cat(found, dim=2), None


@functools.lru_cache(maxsize=8)  # every layer asks, as above
def group_bounds(cu_seq_lens: torch.Tensor, group: int, shift: int) -> torch.Tensor:
    """(G + 1,) int32, where groups begin that are counted from `shift` within each segment, and the end of the last."""
    bounds = [0]
    for start, end in itertools.pairwise(cu_seq_lens.tolist()):
        bounds += [*range(start + (shift or group), end, group), end]
    return torch.tensor(bounds, dtype=torch.int32, device=cu_seq_lens.device)


def register_shifted(group: int) -> str:
    """The name under which models find shifted attention in groups of `group` tokens."""
    AttentionInterface.register(SHIFTED, functools.partial(shifted_attention, group=group))
    AttentionMaskInterface.register(SHIFTED, varlen_mask)
    return SHIFTED


def has_kernel(query: torch.Tensor) -> bool:
    """Whether torch's variable-length kernel takes this: 16 bit on a GPU of compute capability 8.0 or newer.

    It pads no heads: their width is a multiple of 8.
    """
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
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

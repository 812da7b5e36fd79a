"""The original forward passes, layer by layer in plain torch, to check conversions against.

Written from the published descriptions of each architecture, and from nothing else in this package: no table, no class
of transformers. A function takes the original's tensors by their original names and gives float32 logits; it reads one
layer at a time, so that a model larger than memory can be checked.

`mask` is (B, T), False on padding. Left-padded rows have positions that start in the padding, as in the originals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, normalize, silu

Config = dict[str, Any]
Tensors = Any  # Mapping[str, Tensor], or what reads them from the disk
Forward = Callable[[Tensors, Config, Tensor, Tensor], Tensor]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + epsilon).sqrt() * weight.float()


def linear(t: Tensors, name: str, x: Tensor) -> Tensor:
    y = x @ t[f"{name}.weight"].float().T
    return y + t[f"{name}.bias"].float() if f"{name}.bias" in t else y


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, heads * d) -> (B, heads, T, d)"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def rope_angles(positions: Tensor, size: int, base: float) -> Tensor:
    """(..., T, size / 2) angle of each pair of numbers."""
    return positions[..., None].float() / base ** (torch.arange(0, size, 2) / size)


def turn_halves(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate the pairs (x_k, x_{k + d/2}), as GPT-NeoX does."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


def turn_neighbours(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate the pairs (x_2k, x_{2k+1}), as the RoPE paper does."""
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1).flatten(-2)


def causal(mask: Tensor) -> Tensor:
    """(B, 1, T, T) True where a query (row) sees a key."""
    length = mask.shape[1]
    return torch.ones(length, length, dtype=torch.bool).tril() & mask[:, None, None, :]


def attend(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """(B, T, heads * d); keys and values are repeated where there are fewer of them."""
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + bias
    scores = scores.masked_fill(~seen, torch.finfo(torch.float32).min)
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


def gated_mlp(t: Tensors, prefix: str, x: Tensor) -> Tensor:
    hidden = silu(linear(t, f"{prefix}.gate_proj", x)) * linear(t, f"{prefix}.up_proj", x)
    return linear(t, f"{prefix}.down_proj", hidden)


def baichuan(t: Tensors, config: Config, ids: Tensor, mask: Tensor) -> Tensor:
    """Baichuan 1 and 2; rotary positions where the config has max_position_embeddings, else ALiBi."""
    heads, epsilon, seen = config["num_attention_heads"], config["rms_norm_eps"], causal(mask)
    size = config["hidden_size"] // heads
    index = torch.arange(ids.shape[1])
    rotary = "max_position_embeddings" in config
    bias: Tensor | float = 0.0 if rotary else press_slopes(heads)[:, None, None] * (index - index[:, None])
    x = t["model.embed_tokens.weight"][ids].float()
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        y = rms_norm(x, t[f"{layer}.input_layernorm.weight"], epsilon)
        q, k, v = (split_heads(part, heads) for part in linear(t, f"{layer}.self_attn.W_pack", y).chunk(3, -1))
        if rotary:
            angle = rope_angles(index, size, 10000.0)
            q, k = turn_halves(q, angle), turn_halves(k, angle)
        x = x + linear(t, f"{layer}.self_attn.o_proj", attend(q, k, v, seen, bias))
        y = rms_norm(x, t[f"{layer}.post_attention_layernorm.weight"], epsilon)
        x = x + gated_mlp(t, f"{layer}.mlp", y)
    x = rms_norm(x, t["model.norm.weight"], epsilon)
    head = t["lm_head.weight"]
    if config["suwen_unit_head"]:  # Baichuan2 keeps the rows of unit length in the precision of its weights
        head = normalize(head.float()).to(head.dtype)
    return x @ head.float().T


def press_slopes(heads: int) -> Tensor:
    """ALiBi's slopes: a geometric series; beyond a power of two every second slope of the longer series is added."""

    def series(n: int) -> list[float]:
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start ** (k + 1) for k in range(n)]

    power = 1 << (heads.bit_length() - 1)
    return torch.tensor((series(power) + series(2 * power)[::2])[:heads])


def internlm2(t: Tensors, config: Config, ids: Tensor, mask: Tensor) -> Tensor:
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    epsilon, seen, size = config["rms_norm_eps"], causal(mask), config["hidden_size"] // heads
    length, base = ids.shape[1], float(config.get("rope_theta") or 10000.0)
    positions = torch.arange(length).float()
    scaling = config.get("rope_scaling") or {"type": "none"}
    if scaling["type"] == "linear":
        positions = positions / scaling["factor"]
    if scaling["type"] == "dynamic" and length > (limit := config["max_position_embeddings"]):
        grown = scaling["factor"] * length / limit - (scaling["factor"] - 1)
        base = base * grown ** (size / (size - 2))
    angle = rope_angles(positions, size, base)
    x = t["model.tok_embeddings.weight"][ids].float()
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        y = linear(t, f"{layer}.attention.wqkv", rms_norm(x, t[f"{layer}.attention_norm.weight"], epsilon))
        y = y.unflatten(-1, (groups, heads // groups + 2, size))
        q = y[..., :-2, :].flatten(2, 3).transpose(1, 2)
        k, v = y[..., -2, :].transpose(1, 2), y[..., -1, :].transpose(1, 2)
        mixed = attend(turn_halves(q, angle), turn_halves(k, angle), v, seen)
        x = x + linear(t, f"{layer}.attention.wo", mixed)
        y = rms_norm(x, t[f"{layer}.ffn_norm.weight"], epsilon)
        gate = silu(linear(t, f"{layer}.feed_forward.w1", y))
        x = x + linear(t, f"{layer}.feed_forward.w2", gate * linear(t, f"{layer}.feed_forward.w3", y))
    return linear(t, "output", rms_norm(x, t["model.norm.weight"], epsilon))


def qwen(t: Tensors, config: Config, ids: Tensor, mask: Tensor) -> Tensor:
    """Qwen 1 up to its training length: beyond it the original rescales positions and queries."""
    names = ("num_attention_heads", "n_head"), ("num_hidden_layers", "n_layer"), ("seq_length", "n_positions")
    heads, layers, limit = (config.get(new) or config[old] for new, old in names)
    assert ids.shape[1] <= limit
    epsilon, seen = config["layer_norm_epsilon"], causal(mask)
    x = t["transformer.wte.weight"][ids].float()
    angle = rope_angles(torch.arange(ids.shape[1]), x.shape[-1] // heads, config.get("rotary_emb_base", 10000))
    for i in range(layers):
        layer = f"transformer.h.{i}"
        y = linear(t, f"{layer}.attn.c_attn", rms_norm(x, t[f"{layer}.ln_1.weight"], epsilon))
        q, k, v = (split_heads(part, heads) for part in y.chunk(3, -1))
        mixed = attend(turn_halves(q, angle), turn_halves(k, angle), v, seen)
        x = x + linear(t, f"{layer}.attn.c_proj", mixed)
        y = rms_norm(x, t[f"{layer}.ln_2.weight"], epsilon)
        hidden = linear(t, f"{layer}.mlp.w1", y) * silu(linear(t, f"{layer}.mlp.w2", y))
        x = x + linear(t, f"{layer}.mlp.c_proj", hidden)
    return linear(t, "lm_head", rms_norm(x, t["transformer.ln_f.weight"], epsilon))


def chatglm2(t: Tensors, config: Config, ids: Tensor, mask: Tensor) -> Tensor:
    """ChatGLM2, ChatGLM3 and GLM-4-9B: the first half of each head is rotated, neighbours as pairs."""
    heads, size = config["num_attention_heads"], config["kv_channels"]
    groups = config["multi_query_group_num"] if config.get("multi_query_attention") else heads
    epsilon, seen = config["layernorm_epsilon"], causal(mask)
    ratio, positions = float(config.get("rope_ratio") or 1), torch.arange(ids.shape[1]).float()
    divides = config["suwen_rope_divides"]
    angle = rope_angles(positions / ratio if divides else positions, size // 2, 1e4 if divides else 1e4 * ratio)

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat((turn_neighbours(first, angle), second), -1)

    x = t["transformer.embedding.word_embeddings.weight"][ids].float()
    for i in range(config["num_layers"]):
        layer = f"transformer.encoder.layers.{i}"
        y = linear(
            t, f"{layer}.self_attention.query_key_value", rms_norm(x, t[f"{layer}.input_layernorm.weight"], epsilon)
        )
        q, k, v = y.split((heads * size, groups * size, groups * size), -1)
        q, k, v = split_heads(q, heads), split_heads(k, groups), split_heads(v, groups)
        x = x + linear(t, f"{layer}.self_attention.dense", attend(turn(q), turn(k), v, seen))
        y = rms_norm(x, t[f"{layer}.post_attention_layernorm.weight"], epsilon)
        gate, up = linear(t, f"{layer}.mlp.dense_h_to_4h", y).chunk(2, -1)
        x = x + linear(t, f"{layer}.mlp.dense_4h_to_h", silu(gate) * up)
    x = rms_norm(x, t["transformer.encoder.final_layernorm.weight"], epsilon)
    return linear(t, "transformer.output_layer", x)


def chatglm(t: Tensors, config: Config, ids: Tensor, mask: Tensor) -> Tensor:
    """ChatGLM-6B, row by row without its padding: mask and positions follow from where [gMASK] and <sop> stand."""
    rows = []
    for row, real in zip(ids, mask, strict=True):
        found = _chatglm_row(t, config, row[real])
        logits = torch.zeros(len(row), found.shape[-1])
        rows.append(logits.masked_scatter(real[:, None], found))
    return torch.stack(rows)


def _chatglm_row(t: Tensors, config: Config, ids: Tensor) -> Tensor:
    heads, length, epsilon = config["num_attention_heads"], len(ids), config["layernorm_epsilon"]
    tokens = ids.tolist()
    start = tokens.index(config["bos_token_id"])
    place = tokens.index(config["gmask_token_id"])
    position = torch.tensor([i if i < start else place for i in range(length)])
    block = torch.tensor([0 if i < start else i - start + 1 for i in range(length)])
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    seen[:, :start] = True
    size = config["hidden_size"] // heads // 2
    frequency = (1.0 / 10000 ** (torch.arange(0, size, 2).float() / size)).half().float()
    angles = [p[:, None].float() * frequency for p in (position, block)]

    def turn(x: Tensor) -> Tensor:
        return torch.cat([turn_halves(part, angle) for part, angle in zip(x.chunk(2, -1), angles, strict=True)], -1)

    def norm(name: str, x: Tensor) -> Tensor:
        return layer_norm(x, x.shape[-1:], t[f"{name}.weight"].float(), t[f"{name}.bias"].float(), epsilon)

    alpha = math.sqrt(2 * 28)
    x = t["transformer.word_embeddings.weight"][ids].float()[None]
    for i in range(config["num_layers"]):
        layer = f"transformer.layers.{i}"
        y = norm(f"{layer}.input_layernorm", x)
        packed = split_heads(linear(t, f"{layer}.attention.query_key_value", y), heads)
        q, k, v = packed.chunk(3, -1)  # each head holds its own query, key and value
        x = y * alpha + linear(t, f"{layer}.attention.dense", attend(turn(q), turn(k), v, seen))
        y = norm(f"{layer}.post_attention_layernorm", x)
        hidden = gelu(linear(t, f"{layer}.mlp.dense_h_to_4h", y), approximate="tanh")
        x = y * alpha + linear(t, f"{layer}.mlp.dense_4h_to_h", hidden)
    return linear(t, "lm_head", norm("transformer.final_layernorm", x))[0]


def llama_like(t: Tensors, config: Config, ids: Tensor, mask: Tensor) -> Tensor:
    """XVERSE, Yi (also with its first norm names), Orion (LayerNorm) and DeepSeek-MoE: one skeleton."""
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    epsilon, seen = config.get("rms_norm_eps", 1e-6), causal(mask)

    def norm(name: str, x: Tensor) -> Tensor:
        if f"{name}.bias" in t:
            return layer_norm(x, x.shape[-1:], t[f"{name}.weight"].float(), t[f"{name}.bias"].float(), epsilon)
        return rms_norm(x, t[f"{name}.weight"], epsilon)

    first, second = (
        ("ln1", "ln2") if "model.layers.0.ln1.weight" in t else ("input_layernorm", "post_attention_layernorm")
    )
    x = t["model.embed_tokens.weight"][ids].float()
    angle = rope_angles(torch.arange(ids.shape[1]), config["hidden_size"] // heads, config.get("rope_theta") or 1e4)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        y = norm(f"{layer}.{first}", x)
        q = split_heads(linear(t, f"{layer}.self_attn.q_proj", y), heads)
        k, v = (split_heads(linear(t, f"{layer}.self_attn.{name}_proj", y), groups) for name in "kv")
        mixed = attend(turn_halves(q, angle), turn_halves(k, angle), v, seen)
        x = x + linear(t, f"{layer}.self_attn.o_proj", mixed)
        y = norm(f"{layer}.{second}", x)
        sparse = f"{layer}.mlp.gate.weight" in t
        x = x + (mixture(t, f"{layer}.mlp", config, y) if sparse else gated_mlp(t, f"{layer}.mlp", y))
    return linear(t, "lm_head", norm("model.norm", x))


def mixture(t: Tensors, prefix: str, config: Config, x: Tensor) -> Tensor:
    """DeepSeek-MoE (Dai et al. 2024, arXiv:2401.06066, eq. 9 to 11): experts that all tokens share, and routed ones."""
    scores = (x @ t[f"{prefix}.gate.weight"].float().T).softmax(-1)
    weights, chosen = scores.topk(config["num_experts_per_tok"], -1)
    if config.get("norm_topk_prob"):
        weights = weights / weights.sum(-1, keepdim=True)
    mixed = gated_mlp(t, f"{prefix}.shared_experts", x)
    for expert in range(config["n_routed_experts"]):
        share = (weights * (chosen == expert)).sum(-1, keepdim=True)
        mixed = mixed + share * gated_mlp(t, f"{prefix}.experts.{expert}", x)
    return mixed


FORWARDS: Mapping[str, Forward] = {
    "baichuan-7b": baichuan, "baichuan2-7b": baichuan, "baichuan-13b": baichuan, "baichuan2-13b": baichuan,
    "internlm2": internlm2, "qwen": qwen, "chatglm2": chatglm2, "chatglm3": chatglm2, "glm4": chatglm2,
    "chatglm": chatglm, "xverse": llama_like, "yi": llama_like, "orion": llama_like, "deepseek-moe": llama_like,
}  # fmt: skip


def original_logits(family: str, t: Tensors, config: Config, ids: Tensor, mask: Tensor) -> Tensor:
    """(B, T, V) float32 logits of the original model.

    Args:
        family: its name in `families`, which also says what a config does not.
        t: the original tensors by name; a mapping, or one that reads from the disk.
        config: content of the original config.json.
        ids: (B, T)
        mask: (B, T) bool, False on padding.
    """
    told = {"suwen_unit_head": family.startswith("baichuan2"), "suwen_rope_divides": family == "chatglm2"}
    return FORWARDS[family](t, config | told, ids, mask)

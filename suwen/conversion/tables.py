"""What becomes of every tensor: tables from name pattern to name pattern.

In a pattern `{i}` stands for a layer's number, `{e}` for an expert's, and `{p}` for weight or bias. Every table is
exact: the converted model computes the original's function. The checks are in tests/test_conversion.py, against the
forward passes in `originals`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from suwen.conversion.configs import Config, deepseek_config, glm_groups

# Buffers that old code saved with the weights; every class computes them anew
DROPPED = (
    "model.layers.{i}.self_attn.rotary_emb.inv_freq",
    "model.layers.{i}.attention.rotary_emb.inv_freq",
    "transformer.layers.{i}.attention.rotary_emb.inv_freq",
    "transformer.rotary_emb.inv_freq",
    "transformer.h.{i}.attn.rotary_emb.inv_freq",
    "transformer.rotary_pos_emb.inv_freq",
    "model.future_mask",
    "model.alibi_mask",
)


# What is done to a tensor on the way. Everything but `unit_rows` is linear in the rows, so that it holds for a bias and
# for the B matrix of a LoRA adapter too.


def thirds(tensor: Tensor, config: Config) -> Sequence[Tensor]:
    """(3n, ...) -> query, key and value, each (n, ...)."""
    return tensor.chunk(3)


def by_group(tensor: Tensor, config: Config) -> Sequence[Tensor]:
    """InternLM2: the rows of each key's group are its queries, then the key, then the value."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    rows = tensor.unflatten(0, (groups, heads // groups + 2, -1))
    return rows[:, :-2].flatten(0, 2), rows[:, -2].flatten(0, 1), rows[:, -1].flatten(0, 1)


def queries_keys_values(tensor: Tensor, config: Config) -> Sequence[Tensor]:
    """ChatGLM2 and later: all queries, then the fewer keys, then the values."""
    keys = config["kv_channels"] * glm_groups(config)
    return tensor.split((config["kv_channels"] * config["num_attention_heads"], keys, keys))


def unit_rows(tensor: Tensor, config: Config) -> Sequence[Tensor]:
    """Baichuan2's head divides every row by its norm before it multiplies (torch.nn.functional.normalize)."""
    return (torch.nn.functional.normalize(tensor.float()).to(tensor.dtype),)


def doubled(tensor: Tensor, config: Config) -> Sequence[Tensor]:
    return (tensor * 2,)


@dataclass(frozen=True)
class Rule:
    """One line of a table: a tensor's name, the names of what it becomes, and how. No target: the tensor is dropped."""

    source: str
    targets: tuple[str, ...]
    change: Callable[[Tensor, Config], Sequence[Tensor]] | None = None

    @property
    def linear(self) -> bool:
        return self.change is not unit_rows


def table(lines: dict[str, Any]) -> tuple[Rule, ...]:
    """Rules from {source: target | (targets, change)}; a name that stands alone as its own target keeps itself."""
    rules = []
    for source, target in lines.items():
        targets, change = target if isinstance(target, tuple) else (target, None)
        rules.append(Rule(source, (targets,) if isinstance(targets, str) else tuple(targets), change))
    return (*rules, *(Rule(name, ()) for name in DROPPED))


def kept(*names: str) -> dict[str, str]:
    return {name: name for name in names}


def projections(prefix: str) -> list[str]:
    return [f"{prefix}.{name}_proj.{{p}}" for name in "qkv"]


LAYER = "model.layers.{i}"
ATTENTION = f"{LAYER}.self_attn"
OUTSIDE = kept("model.embed_tokens.weight", "model.norm.{p}", "lm_head.weight")
GATED_MLP = kept(*(f"{LAYER}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")))
NORMS = kept(f"{LAYER}.input_layernorm.{{p}}", f"{LAYER}.post_attention_layernorm.{{p}}")
SPLIT_ATTENTION = kept(*projections(ATTENTION), f"{ATTENTION}.o_proj.{{p}}")
LLAMA = {**OUTSIDE, **SPLIT_ATTENTION, **GATED_MLP, **NORMS}

BAICHUAN_7B = {
    **OUTSIDE,
    f"{ATTENTION}.W_pack.{{p}}": (projections(ATTENTION), thirds),
    f"{ATTENTION}.o_proj.{{p}}": f"{ATTENTION}.o_proj.{{p}}",
    **GATED_MLP,
    **NORMS,
}
BAICHUAN_13B = {**OUTSIDE, **kept(f"{ATTENTION}.W_pack.{{p}}", f"{ATTENTION}.o_proj.{{p}}"), **GATED_MLP, **NORMS}
UNIT_HEAD = {"lm_head.weight": ("lm_head.weight", unit_rows)}
INTERNLM2 = {
    "model.tok_embeddings.weight": "model.embed_tokens.weight",
    "model.norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    f"{LAYER}.attention.wqkv.{{p}}": (projections(ATTENTION), by_group),
    f"{LAYER}.attention.wo.{{p}}": f"{ATTENTION}.o_proj.{{p}}",
    f"{LAYER}.feed_forward.w1.weight": f"{LAYER}.mlp.gate_proj.weight",
    f"{LAYER}.feed_forward.w3.weight": f"{LAYER}.mlp.up_proj.weight",
    f"{LAYER}.feed_forward.w2.weight": f"{LAYER}.mlp.down_proj.weight",
    f"{LAYER}.attention_norm.weight": f"{LAYER}.input_layernorm.weight",
    f"{LAYER}.ffn_norm.weight": f"{LAYER}.post_attention_layernorm.weight",
}
QWEN = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
    "transformer.h.{i}.ln_1.weight": f"{LAYER}.input_layernorm.weight",
    "transformer.h.{i}.ln_2.weight": f"{LAYER}.post_attention_layernorm.weight",
    "transformer.h.{i}.attn.c_attn.{p}": (projections(ATTENTION), thirds),
    "transformer.h.{i}.attn.c_proj.weight": f"{ATTENTION}.o_proj.weight",
    "transformer.h.{i}.mlp.w1.weight": f"{LAYER}.mlp.up_proj.weight",
    "transformer.h.{i}.mlp.w2.weight": f"{LAYER}.mlp.gate_proj.weight",  # the second one passes through SiLU
    "transformer.h.{i}.mlp.c_proj.weight": f"{LAYER}.mlp.down_proj.weight",
}
GLM_LAYER = "transformer.encoder.layers.{i}"
CHATGLM2 = {
    "transformer.embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "transformer.encoder.final_layernorm.weight": "model.norm.weight",
    "transformer.output_layer.weight": "lm_head.weight",
    f"{GLM_LAYER}.input_layernorm.weight": f"{LAYER}.input_layernorm.weight",
    f"{GLM_LAYER}.post_attention_layernorm.weight": f"{LAYER}.post_attention_layernorm.weight",
    f"{GLM_LAYER}.self_attention.query_key_value.{{p}}": (projections(ATTENTION), queries_keys_values),
    f"{GLM_LAYER}.self_attention.dense.weight": f"{ATTENTION}.o_proj.weight",
    f"{GLM_LAYER}.mlp.dense_h_to_4h.weight": f"{LAYER}.mlp.gate_up_proj.weight",
    f"{GLM_LAYER}.mlp.dense_4h_to_h.weight": f"{LAYER}.mlp.down_proj.weight",
}
CHATGLM = kept(
    "transformer.word_embeddings.weight",
    "transformer.final_layernorm.{p}",
    "lm_head.weight",
    *(f"transformer.layers.{{i}}.{name}.{{p}}" for name in ("input_layernorm", "post_attention_layernorm")),
    *(f"transformer.layers.{{i}}.attention.{name}.{{p}}" for name in ("query_key_value", "dense")),
    *(f"transformer.layers.{{i}}.mlp.{name}.{{p}}" for name in ("dense_h_to_4h", "dense_4h_to_h")),
)
# The first uploads of Yi call the two norms of a layer ln1 and ln2.
YI = LLAMA | {
    f"{LAYER}.ln1.weight": f"{LAYER}.input_layernorm.weight",
    f"{LAYER}.ln2.weight": f"{LAYER}.post_attention_layernorm.weight",
}
# Qwen2-MoE weighs its shared experts by a sigmoid, which a gate of zeros holds at exactly one half (see `additions`),
# so their last matrix is doubled: both are exact in every floating-point format.
EXPERTS = {
    f"{LAYER}.mlp.gate.weight": f"{LAYER}.mlp.gate.weight",
    **kept(*(f"{LAYER}.mlp.experts.{{e}}.{name}_proj.weight" for name in ("gate", "up", "down"))),
    f"{LAYER}.mlp.shared_experts.gate_proj.weight": f"{LAYER}.mlp.shared_expert.gate_proj.weight",
    f"{LAYER}.mlp.shared_experts.up_proj.weight": f"{LAYER}.mlp.shared_expert.up_proj.weight",
    f"{LAYER}.mlp.shared_experts.down_proj.weight": (f"{LAYER}.mlp.shared_expert.down_proj.weight", doubled),
}


def deepseek_gates(config: Config) -> dict[str, Tensor]:
    """The gates of zeros that hold the shared experts of DeepSeek-MoE at one half; see `EXPERTS`."""
    new = deepseek_config(config)
    sparse = set(range(new["num_hidden_layers"])) - set(new["mlp_only_layers"])
    return {
        f"model.layers.{i}.mlp.shared_expert_gate.weight": torch.zeros(1, new["hidden_size"]) for i in sorted(sparse)
    }


def no_additions(config: Config) -> dict[str, Tensor]:
    return {}

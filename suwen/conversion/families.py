"""Which family a checkpoint belongs to, and what becomes of its tensors and its config.

A family is a table from name pattern to name pattern. In a pattern `{i}` stands for a layer's number, `{e}` for an
expert's, and `{p}` for weight or bias. A tensor that the table does not know stops the conversion.

Every table is exact: the converted model computes the original's function. The checks are in tests/test_conversion.py,
against the forward passes in `originals`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

Config = dict[str, Any]
WILDCARDS = {"i": r"\d+", "e": r"\d+", "p": "weight|bias"}
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


# Configs: what the new class is told. Only what is named here is carried over.


def take(config: Config, *names: str, **renamed: str) -> Config:
    """Entries that keep their name, and `new=old` for those that change it; absent ones are left out."""
    pairs = {name: name for name in names} | renamed
    return {new: config[old] for new, old in pairs.items() if config.get(old) is not None}


COMMON = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
          "hidden_act", "initializer_range", "rms_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id",
          "tie_word_embeddings")  # fmt: skip


def rope(config: Config, theta: float = 10000.0, **more: Any) -> Config:
    """RoPE settings as transformers 5 keeps them, with the scaling of the old config if it had one."""
    scaling = {k: v for k, v in (config.get("rope_scaling") or {}).items() if k != "type"}
    kind = (config.get("rope_scaling") or {}).get("type", scaling.pop("rope_type", "default"))
    return {"rope_type": kind, "rope_theta": float(theta), **scaling, **more}


def llama_config(config: Config) -> Config:
    """Baichuan-7B, XVERSE, Yi and LLaMA itself: names are Llama's already."""
    return {
        **take(config, *COMMON, "num_key_value_heads", "max_position_embeddings", "head_dim", "attention_bias"),
        "rope_parameters": rope(config, config.get("rope_theta") or 10000.0),
    }


def baichuan_13b_config(config: Config) -> Config:
    return take(config, *COMMON, "model_max_length")


def internlm2_config(config: Config) -> Config:
    return llama_config(config) | {"attention_bias": bool(config.get("bias"))}


def qwen_config(config: Config) -> Config:
    old = dict(config)
    early = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
             "ffn_hidden_size": "intermediate_size", "n_positions": "seq_length"}  # fmt: skip
    for was, name in early.items():
        old.setdefault(name, config.get(was))
    return {
        **take(old, *(name for name in COMMON if name not in ("intermediate_size", "hidden_act"))),
        "vocab_size": config.get("padded_vocab_size") or config["vocab_size"],
        "intermediate_size": old["intermediate_size"] // 2,
        "num_key_value_heads": old["num_attention_heads"],
        "rms_norm_eps": config.get("layer_norm_epsilon", 1e-6),
        # Beyond seq_length the original rescales positions and queries in a way that no class here has.
        "max_position_embeddings": old.get("seq_length") or 2048,
        "rope_parameters": rope({}, config.get("rotary_emb_base") or 10000.0),
    }


def glm_groups(config: Config) -> int:
    """Key-value heads: ChatGLM2 and later share one among several query heads, where multi_query_attention says so."""
    return config["multi_query_group_num"] if config.get("multi_query_attention") else config["num_attention_heads"]


def chatglm2_config(config: Config, linear: bool = True) -> Config:
    """ChatGLM2 (`linear`) divides positions by rope_ratio; ChatGLM3 and GLM-4 multiply the base by it."""
    ratio = float(config.get("rope_ratio") or 1.0)
    positions = rope({}, 10000.0 if linear else 10000.0 * ratio, partial_rotary_factor=0.5)
    if linear and ratio != 1:
        positions |= {"rope_type": "linear", "factor": ratio}
    ends = config.get("eos_token_id")
    return {
        **take(config, "hidden_size", "num_attention_heads", "initializer_range", "bos_token_id",
               vocab_size="padded_vocab_size", num_hidden_layers="num_layers", intermediate_size="ffn_hidden_size",
               head_dim="kv_channels", rms_norm_eps="layernorm_epsilon", max_position_embeddings="seq_length"),
        "num_key_value_heads": glm_groups(config),
        "attention_bias": bool(config.get("add_qkv_bias") or config.get("add_bias_linear")),
        # Glm's own defaults are ids of GLM-4's vocabulary
        "eos_token_id": 2 if ends is None else ends,
        "pad_token_id": config.get("pad_token_id") or 0,
        "tie_word_embeddings": bool(config.get("tie_word_embeddings")),
        "rope_parameters": positions,
    }  # fmt: skip


def chatglm3_config(config: Config) -> Config:
    return chatglm2_config(config, linear=False)


def chatglm_config(config: Config) -> Config:
    names = ("vocab_size", "hidden_size", "inner_hidden_size", "layernorm_epsilon", "max_sequence_length",
             "bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id", "gmask_token_id")  # fmt: skip
    return take(config, *names, num_hidden_layers="num_layers", num_attention_heads="num_attention_heads")


def orion_config(config: Config) -> Config:
    return {
        **take(config, *(name for name in COMMON if name != "rms_norm_eps"), "max_position_embeddings"),
        "num_key_value_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
        "layer_norm_eps": config.get("rms_norm_eps", 1e-5),
        "use_qkv_bias": False,
        "qk_layernorm": False,
        "use_parallel_residual": False,
        # StableLm would turn a quarter of each head only
        "rope_parameters": rope(config, config.get("rope_theta") or 10000.0, partial_rotary_factor=1.0),
    }


def deepseek_config(config: Config) -> Config:
    layers, dense = config["num_hidden_layers"], config.get("first_k_dense_replace", 0)
    every = config.get("moe_layer_freq", 1)
    return {
        **take(config, *COMMON, "num_key_value_heads", "max_position_embeddings", "num_experts_per_tok",
               "moe_intermediate_size", num_experts="n_routed_experts", router_aux_loss_coef="aux_loss_alpha"),
        "shared_expert_intermediate_size": config["moe_intermediate_size"] * config["n_shared_experts"],
        "norm_topk_prob": bool(config.get("norm_topk_prob")),
        "mlp_only_layers": [i for i in range(layers) if i < dense or i % every],
        "qkv_bias": bool(config.get("attention_bias")),
        "rope_parameters": rope(config, config.get("rope_theta") or 10000.0),
    }  # fmt: skip


def deepseek_gates(config: Config) -> dict[str, Tensor]:
    """The gates of zeros that hold the shared experts of DeepSeek-MoE at one half; see `EXPERTS`."""
    new = deepseek_config(config)
    sparse = set(range(new["num_hidden_layers"])) - set(new["mlp_only_layers"])
    return {
        f"model.layers.{i}.mlp.shared_expert_gate.weight": torch.zeros(1, new["hidden_size"]) for i in sorted(sparse)
    }


def no_additions(config: Config) -> dict[str, Tensor]:
    return {}


@dataclass(frozen=True)
class Family:
    """What becomes of one family.

    Attributes:
        name: value of --family.
        model_type: of the converted config.
        rules: the table; empty means that every tensor keeps its name.
        config: old config -> arguments of the new config class.
        template: the family's chat template in template.py, for tokenizers that bring none.
        required: settings that the table relies on; a config that says otherwise is refused.
        additions: tensors that the new class has and the old one lacks.
    """

    name: str
    model_type: str
    rules: tuple[Rule, ...]
    config: Callable[[Config], Config]
    template: str | None = None
    required: dict[str, Any] = field(default_factory=dict)
    additions: Callable[[Config], dict[str, Tensor]] = no_additions


GLM_REQUIRED = {
    "rmsnorm": True, "apply_residual_connection_post_layernorm": False, "post_layer_norm": True,
    "add_bias_linear": False, "original_rope": True, "pre_seq_len": None, "prefix_projection": False,
}  # fmt: skip
_ALL = [
    Family("baichuan-7b", "llama", table(BAICHUAN_7B), llama_config, "baichuan"),
    Family("baichuan2-7b", "llama", table(BAICHUAN_7B | UNIT_HEAD), llama_config, "baichuan2"),
    Family("baichuan-13b", "baichuan", table(BAICHUAN_13B), baichuan_13b_config, "baichuan"),
    Family("baichuan2-13b", "baichuan", table(BAICHUAN_13B | UNIT_HEAD), baichuan_13b_config, "baichuan2"),
    Family("internlm2", "llama", table(INTERNLM2), internlm2_config, "internlm2"),
    Family("qwen", "qwen2", table(QWEN), qwen_config, "chatml", {"no_bias": True, "rotary_pct": 1.0}),
    Family("chatglm2", "glm", table(CHATGLM2), chatglm2_config, "chatglm2", GLM_REQUIRED),
    Family("chatglm3", "glm", table(CHATGLM2), chatglm3_config, "chatglm3", GLM_REQUIRED),
    Family("glm4", "glm", table(CHATGLM2), chatglm3_config, "glm4", GLM_REQUIRED),
    Family("chatglm", "chatglm", table(CHATGLM), chatglm_config, "chatglm",
           {"position_encoding_2d": True, "pre_seq_len": None, "prefix_projection": False, "quantization_bit": 0}),
    Family("xverse", "llama", table(LLAMA), llama_config, "xverse"),
    Family("yi", "llama", table(YI), llama_config, "yi"),
    Family("orion", "stablelm", table(LLAMA), orion_config, "orion"),
    Family("deepseek-moe", "qwen2_moe", table(LLAMA | EXPERTS), deepseek_config, "deepseek",
           {"scoring_func": "softmax"}, deepseek_gates),
]  # fmt: skip
FAMILIES = {family.name: family for family in _ALL}
NATIVE = Family("native", "", (), lambda config: config)


def recognise(config: Config, code: str = "") -> Family | None:
    """The family of a checkpoint by its config.json; None for one that is not in the tables.

    Args:
        config: content of config.json.
        code: text of the folder's modelling file, which tells ChatGLM2 from ChatGLM3; it is read, never run.

    Raises:
        ValueError: a config of a known family whose members cannot be told apart.
    """
    kind, name = config.get("model_type"), None
    if kind == "baichuan" or str(config.get("architectures")).lower().count("baichuan"):
        name = _recognise_baichuan(config)
    elif kind == "chatglm":
        name = _recognise_chatglm(config, code)
    elif kind in ("Yi", "yi"):
        name = "yi"
    elif kind == "deepseek":
        name = "deepseek-moe"
    elif kind in ("internlm2", "qwen", "xverse", "orion"):
        name = str(kind)
    return FAMILIES[name] if name else None


def _recognise_baichuan(config: Config) -> str:
    size = "7b" if "max_position_embeddings" in config else "13b"
    if config.get("hidden_size") in (4096, 5120) and (size == "7b") != (config["hidden_size"] == 4096):
        raise ValueError(
            f"config.json: a Baichuan of width {config['hidden_size']} "
            f"{'with' if size == '7b' else 'without'} max_position_embeddings; say by --family whether its positions "
            "are rotary (baichuan-7b, baichuan2-7b) or ALiBi (baichuan-13b, baichuan2-13b)"
        )
    generation = {64000: "baichuan", 125696: "baichuan2"}.get(config.get("vocab_size", 0))
    if generation is None:
        raise ValueError(
            f"config.json: a Baichuan with vocab_size {config.get('vocab_size')}, expected 64000 (Baichuan) or 125696 "
            f"(Baichuan2, whose head is normalised); say by --family which it is: baichuan-{size} or baichuan2-{size}"
        )
    return f"{generation}-{size}"


def _recognise_chatglm(config: Config, code: str) -> str:
    if "inner_hidden_size" in config or "position_encoding_2d" in config:
        return "chatglm"
    if config.get("padded_vocab_size", 0) > 100_000:
        return "glm4"
    if config.get("rope_ratio", 1) in (1, None):
        return "chatglm3" if "<|assistant|>" in code else "chatglm2"  # the same function, another template
    if "base * self.rope_ratio" in code:
        return "chatglm3"
    if "/ self.rope_ratio" in code:
        return "chatglm2"
    raise ValueError(
        f"config.json: rope_ratio {config['rope_ratio']} divides the positions in ChatGLM2 and multiplies the base in "
        "ChatGLM3; say by --family which it is: chatglm2 or chatglm3"
    )


def check_settings(family: Family, config: Config) -> None:
    """Refuse settings that the family's table was not made for."""
    for name, expected in family.required.items():
        if name in config and config[name] != expected and (config[name] or expected):
            raise ValueError(f"config.json: {name} is {config[name]!r}, expected {expected!r} for a {family.name}")


def convert_config(family: Family, config: Config) -> Any:
    """The config object of the converted model."""
    from transformers import CONFIG_MAPPING

    import suwen.architectures  # noqa: F401  (registers its classes)

    check_settings(family, config)
    try:
        arguments = family.config(config)
    except KeyError as error:
        raise ValueError(f"config.json: found no {error.args[0]}, expected one in a {family.name} config") from None
    arguments.setdefault("tie_word_embeddings", False)
    return CONFIG_MAPPING[family.model_type](**arguments)


@lru_cache
def _compiled(pattern: str) -> re.Pattern:
    return re.compile("".join(
        f"(?P<{part[1:-1]}>{WILDCARDS[part[1:-1]]})" if part.startswith("{") else re.escape(part)
        for part in re.split(r"(\{\w\})", pattern)
    ))  # fmt: skip


def find_rule(family: Family, name: str) -> tuple[Rule, tuple[str, ...]] | None:
    """The rule for a tensor of the original and the names of what it becomes; None if the table does not know it."""
    if not family.rules:
        dropped = any(_compiled(pattern).fullmatch(name) for pattern in DROPPED)
        return (Rule(name, ()), ()) if dropped else (Rule(name, (name,)), (name,))
    for rule in family.rules:
        if match := _compiled(rule.source).fullmatch(name):
            return rule, tuple(target.format(**match.groupdict()) for target in rule.targets)
    return None


def apply_rule(rule: Rule, tensor: Tensor, config: Config) -> Sequence[Tensor]:
    return rule.change(tensor, config) if rule.change else (tensor,)

"""Old config.json -> arguments of the new config class; only what is named here is carried over."""

from __future__ import annotations

import os
from typing import Any

Config = dict[str, Any]


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


def load_native(path: str | os.PathLike) -> Any:
    """The config of a folder or hub name whose class is the library's own.

    Raises:
        OSError, ValueError, KeyError: there is none, or it does not hold together.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except StrictDataclassError as error:
        raise ValueError(f"config.json: {str(error).splitlines()[-1].strip()}") from None

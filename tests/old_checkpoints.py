"""Tiny random checkpoints in the layouts of models that need code from their folder: config and tensors, no code."""

from __future__ import annotations

import io
import json
from functools import lru_cache
from itertools import islice
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file
from torch import Tensor

from suwen.embedded import sample_texts

WIDTH, INNER, LAYERS, HEADS, VOCABULARY, WINDOW = 96, 160, 2, 4, 320, 64

COMMON = {
    "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "rms_norm_eps": 1e-6, "vocab_size": VOCABULARY, "max_position_embeddings": WINDOW, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False, "auto_map": {"AutoModelForCausalLM": "m.M"},
}  # fmt: skip
ROTARY_FREE = {k: v for k, v in COMMON.items() if k != "max_position_embeddings"} | {"model_max_length": WINDOW}
GLM = {
    "model_type": "chatglm", "hidden_size": WIDTH, "ffn_hidden_size": INNER, "num_layers": LAYERS, "kv_channels": 24,
    "num_attention_heads": HEADS, "multi_query_attention": True, "multi_query_group_num": 2, "add_qkv_bias": True,
    "padded_vocab_size": VOCABULARY, "layernorm_epsilon": 1e-5, "seq_length": WINDOW, "rmsnorm": True,
    "add_bias_linear": False, "post_layer_norm": True, "apply_residual_connection_post_layernorm": False,
    "original_rope": True, "auto_map": {"AutoModel": "m.M"}, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "baichuan-7b": COMMON | {"model_type": "baichuan"},
    "baichuan2-7b": COMMON | {"model_type": "baichuan", "model_max_length": WINDOW},
    "baichuan-13b": ROTARY_FREE | {"model_type": "baichuan", "num_attention_heads": 6},
    "baichuan2-13b": ROTARY_FREE | {"model_type": "baichuan"},
    "internlm2": COMMON | {"model_type": "internlm2", "num_key_value_heads": 2, "bias": False, "rope_theta": 1e6},
    "qwen": {"model_type": "qwen", "hidden_size": WIDTH, "intermediate_size": 2 * INNER, "num_hidden_layers": LAYERS,
             "num_attention_heads": HEADS, "layer_norm_epsilon": 1e-6, "rotary_emb_base": 10000, "seq_length": WINDOW,
             "vocab_size": VOCABULARY, "no_bias": True, "rotary_pct": 1.0, "tie_word_embeddings": False},
    "chatglm2": GLM,
    "chatglm3": GLM | {"rope_ratio": 8},
    "glm4": GLM | {"rope_ratio": 50},
    "chatglm": {"model_type": "chatglm", "hidden_size": WIDTH, "inner_hidden_size": INNER, "num_layers": LAYERS,
                "num_attention_heads": HEADS, "layernorm_epsilon": 1e-5, "max_sequence_length": WINDOW,
                "vocab_size": VOCABULARY, "position_encoding_2d": True, "bos_token_id": 304, "eos_token_id": 305,
                "pad_token_id": 3, "mask_token_id": 300, "gmask_token_id": 301, "auto_map": {"AutoModel": "m.M"}},
    "xverse": COMMON | {"model_type": "xverse"},
    "yi": COMMON | {"model_type": "Yi", "num_key_value_heads": 2, "rope_theta": 5e6},
    "orion": COMMON | {"model_type": "orion", "num_key_value_heads": HEADS, "rms_norm_eps": 1e-5},
    "deepseek-moe": COMMON | {"model_type": "deepseek", "n_routed_experts": 6, "n_shared_experts": 2,
                              "num_experts_per_tok": 3, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
                              "moe_layer_freq": 1, "norm_topk_prob": False, "scoring_func": "softmax",
                              "num_key_value_heads": HEADS, "num_hidden_layers": 3},
}  # fmt: skip

# What tells families apart in their real config, at real sizes
VOCABULARIES = {"baichuan-7b": 64000, "baichuan-13b": 64000, "baichuan2-7b": 125696, "baichuan2-13b": 125696}
RECOGNISED = {
    name: config
    | ({"vocab_size": VOCABULARIES[name]} if name in VOCABULARIES else {})
    | ({"padded_vocab_size": 151552} if name == "glm4" else {})
    for name, config in CONFIGS.items()
}


def shapes(family: str, config: dict) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the original."""
    w, layers = WIDTH, config.get("num_hidden_layers") or config["num_layers"]
    vocabulary = config.get("padded_vocab_size") or config["vocab_size"]
    found: dict[str, tuple[int, ...]] = {}
    if family == "internlm2":
        found = {
            "model.tok_embeddings.weight": (vocabulary, w),
            "model.norm.weight": (w,),
            "output.weight": (vocabulary, w),
        }
        rows = (HEADS + 2 * config["num_key_value_heads"]) * w // HEADS
        for i in range(layers):
            p = f"model.layers.{i}"
            found |= {f"{p}.attention.wqkv.weight": (rows, w), f"{p}.attention.wo.weight": (w, w)}
            found |= {f"{p}.feed_forward.w{n}.weight": (INNER, w) for n in (1, 3)}
            found |= {
                f"{p}.feed_forward.w2.weight": (w, INNER),
                f"{p}.attention_norm.weight": (w,),
                f"{p}.ffn_norm.weight": (w,),
            }
            if config["bias"]:
                found |= {f"{p}.attention.wqkv.bias": (rows,), f"{p}.attention.wo.bias": (w,)}
    elif family == "qwen":
        found = {
            "transformer.wte.weight": (vocabulary, w),
            "transformer.ln_f.weight": (w,),
            "lm_head.weight": (vocabulary, w),
        }
        for i in range(layers):
            p = f"transformer.h.{i}"
            found |= {f"{p}.ln_1.weight": (w,), f"{p}.ln_2.weight": (w,), f"{p}.attn.c_attn.weight": (3 * w, w)}
            found |= {f"{p}.attn.c_attn.bias": (3 * w,), f"{p}.attn.c_proj.weight": (w, w)}
            found |= {
                f"{p}.mlp.w1.weight": (INNER, w),
                f"{p}.mlp.w2.weight": (INNER, w),
                f"{p}.mlp.c_proj.weight": (w, INNER),
            }
    elif family in ("chatglm2", "chatglm3", "glm4"):
        rows = (HEADS + 2 * config["multi_query_group_num"]) * config["kv_channels"]
        tables = ("embedding.word_embeddings", "output_layer")
        found = {f"transformer.{table}.weight": (vocabulary, w) for table in tables}
        found |= {"transformer.encoder.final_layernorm.weight": (w,), "transformer.rotary_pos_emb.inv_freq": (4,)}
        for i in range(layers):
            p = f"transformer.encoder.layers.{i}"
            found |= {f"{p}.{n}.weight": (w,) for n in ("input_layernorm", "post_attention_layernorm")}
            found |= {
                f"{p}.self_attention.query_key_value.weight": (rows, w),
                f"{p}.self_attention.query_key_value.bias": (rows,),
            }
            found |= {f"{p}.self_attention.dense.weight": (w, w), f"{p}.mlp.dense_h_to_4h.weight": (2 * INNER, w)}
            found |= {f"{p}.mlp.dense_4h_to_h.weight": (w, INNER)}
    elif family == "chatglm":
        found = {"transformer.word_embeddings.weight": (vocabulary, w), "lm_head.weight": (vocabulary, w)}
        found |= {f"transformer.final_layernorm.{p}": (w,) for p in ("weight", "bias")}
        for i in range(layers):
            p = f"transformer.layers.{i}"
            found |= {
                f"{p}.{n}.{e}": (w,)
                for n in ("input_layernorm", "post_attention_layernorm")
                for e in ("weight", "bias")
            }
            found[f"{p}.attention.rotary_emb.inv_freq"] = (4,)
            for name, rows, columns in (("attention.query_key_value", 3 * w, w), ("attention.dense", w, w),
                                        ("mlp.dense_h_to_4h", INNER, w), ("mlp.dense_4h_to_h", w, INNER)):  # fmt: skip
                found |= {f"{p}.{name}.weight": (rows, columns), f"{p}.{name}.bias": (rows,)}
    else:
        found = {
            "model.embed_tokens.weight": (vocabulary, w),
            "model.norm.weight": (w,),
            "lm_head.weight": (vocabulary, w),
        }
        first, second = ("ln1", "ln2") if family == "yi" else ("input_layernorm", "post_attention_layernorm")
        keys = w // HEADS * (config.get("num_key_value_heads") or HEADS)
        for i in range(layers):
            p = f"model.layers.{i}"
            found |= {f"{p}.{first}.weight": (w,), f"{p}.{second}.weight": (w,), f"{p}.self_attn.o_proj.weight": (w, w)}
            found[f"{p}.self_attn.rotary_emb.inv_freq"] = (8,)
            if family.startswith("baichuan"):
                found[f"{p}.self_attn.W_pack.weight"] = (3 * w, w)
            else:
                found |= {f"{p}.self_attn.{n}_proj.weight": (w if n == "q" else keys, w) for n in "qkv"}
            if family == "deepseek-moe" and i >= config["first_k_dense_replace"]:
                size = config["moe_intermediate_size"]
                found[f"{p}.mlp.gate.weight"] = (config["n_routed_experts"], w)
                for e in range(config["n_routed_experts"]):
                    found |= gated(f"{p}.mlp.experts.{e}", size)
                found |= gated(f"{p}.mlp.shared_experts", size * config["n_shared_experts"])
            else:
                found |= gated(f"{p}.mlp", INNER)
        if family == "orion":
            found |= {name.replace(".weight", ".bias"): (w,) for name in found if "norm" in name}
    return found


def gated(prefix: str, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.gate_proj.weight": (size, WIDTH), f"{prefix}.up_proj.weight": (size, WIDTH),
            f"{prefix}.down_proj.weight": (WIDTH, size)}  # fmt: skip


def random_tensors(family: str, config: dict, seed: int = 0) -> dict[str, Tensor]:
    """Values large enough that the logits have a spread of about one, and norms and biases that are not neutral."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes(family, config).items():
        value = torch.randn(shape, generator=generator)
        if len(shape) == 2:
            made[name] = value / shape[1] ** 0.5
        else:
            made[name] = value * 0.2 + (name.endswith("weight"))
    return made


def write_original(
    folder: Path, family: str, kind: str = "safetensors", shards: int = 3, dtype=torch.float32, **changes
) -> tuple[dict, dict[str, Tensor]]:
    """A folder as it comes from the hub: config.json, an index and shards; returns the config and the tensors."""
    config = CONFIGS[family] | changes
    tensors = {name: value.to(dtype) for name, value in random_tensors(family, config).items()}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    names, stem = list(tensors), {"bin": "pytorch_model", "safetensors": "model"}[kind]
    weight_map = {}
    for number in range(shards):
        file = f"{stem}-{number + 1:05d}-of-{shards:05d}.{kind}"
        part = {name: tensors[name].contiguous() for name in names[number::shards]}
        weight_map |= dict.fromkeys(part, file)
        if kind == "bin":
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, metadata={"format": "pt"})
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return config, tensors


@lru_cache
def train_sentencepiece(lines: int = 600, **flags) -> bytes:
    """A sentencepiece model of at most 2500 pieces, learnt from the project's samples."""
    flags = {name: ",".join(value) if isinstance(value, tuple) else value for name, value in flags.items()}
    options = {"vocab_size": 2500, "model_type": "bpe", "character_coverage": 0.98, "byte_fallback": True,
               "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "num_threads": 1,
               "minloglevel": 2, "hard_vocab_limit": False, "split_by_unicode_script": False}  # fmt: skip
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line.replace("\n", " ") for line in islice(sample_texts(), lines)),
        model_writer=model,
        **options | flags,
    )
    return model.getvalue()


@lru_cache
def merged_sentencepiece() -> bytes:
    """Pieces of a second model appended with one score to those of `first_sentencepiece`, as Chinese-LLaMA merges."""
    import sentencepiece.sentencepiece_model_pb2 as protocol

    first = protocol.ModelProto.FromString(first_sentencepiece())
    second = protocol.ModelProto.FromString(train_sentencepiece())
    known = {piece.piece for piece in first.pieces}
    for piece in second.pieces:
        if piece.piece not in known and piece.type == 1:
            new = first.pieces.add()
            new.piece, new.score = piece.piece, 0.0
    return first.SerializeToString()


def first_sentencepiece() -> bytes:
    return train_sentencepiece(lines=20, vocab_size=1000)

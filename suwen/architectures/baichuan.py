"""Baichuan-13B and Baichuan2-13B: Llama with ALiBi (Press et al. 2022, arXiv:2108.12409) in place of rotary positions.

Names of tensors and of the model type are the original's, so that a saved folder is one that vLLM's own class for
Baichuan reads too. The 7B models have rotary positions and become plain Llama instead.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel, PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm


class BaichuanConfig(PreTrainedConfig):
    model_type = "baichuan"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 64000
    hidden_size: int = 5120
    intermediate_size: int = 13696
    num_hidden_layers: int = 40
    num_attention_heads: int = 40
    hidden_act: str = "silu"
    model_max_length: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    mlp_bias: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if kwargs.get("max_position_embeddings") is not None:
            raise ValueError(
                "config.json: a Baichuan with max_position_embeddings has rotary positions; convert it to Llama with "
                "tools/convert_checkpoint.py"
            )
        super().__post_init__(**kwargs)

    @property
    def max_position_embeddings(self) -> int:
        """The window, under the name by which every other model has it; in the file its presence means a 7B model."""
        return self.model_max_length


def alibi_slopes(heads: int) -> Tensor:
    """(heads,) slope of each head: 2^(-8k/n) for k = 1..n; beyond a power of two, every second one of the next series.

    Press et al. 2022, section 3, and the authors' code.
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * k / power) for k in range(1, power + 1)]
    slopes += [2 ** (-4 * k / power) for k in range(1, 2 * (heads - power), 2)]
    return torch.tensor(slopes)


class AlibiSlopes(nn.Module):
    """Stands where Llama computes its rotary angles; what it gives reaches every layer as `position_embeddings`."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, hidden: Tensor, position_ids: Tensor) -> Tensor:
        return alibi_slopes(self.heads).to(hidden.device)


def alibi_bias(slopes: Tensor, mask: Tensor | None, queries: int, keys: int, dtype: torch.dtype) -> Tensor:
    """(1 or B, heads, queries, keys) slope times distance, and the lowest number where `mask` hides a key.

    The bias counts back from the query, so that it is small, and exact in half precision, where attention is strong;
    softmax does not see the difference. The last query stands at the last key, which a preallocated cache may not
    have filled: there, too, the difference is one of rounding only.

    Args:
        mask: None (causal), bool with True for what is seen, or additive; (B, 1, queries, keys).
    """
    key = torch.arange(keys, device=slopes.device)
    distance = key - key[keys - queries :, None]
    bias = (slopes[:, None, None] * distance).to(dtype)[None]
    lowest = torch.finfo(dtype).min
    if mask is None:
        return bias.masked_fill(distance > 0, lowest)
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask, lowest)
    return bias.masked_fill(mask < lowest / 2, lowest)


class BaichuanAttention(nn.Module):
    def __init__(self, config: BaichuanConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if self.config._attn_implementation not in ("sdpa", "eager"):
            raise ValueError(
                f"--attn_implementation {self.config._attn_implementation}: would drop the ALiBi positions of this "
                "model, expected sdpa or eager"
            )
        batch, queries, width = hidden_states.shape
        packed = self.W_pack(hidden_states).view(batch, queries, 3, -1, self.head_dim)
        query, key, value = packed.permute(2, 0, 3, 1, 4)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        bias = alibi_bias(position_embeddings, attention_mask, queries, key.shape[2], query.dtype)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, queries, width)), None


class BaichuanLayer(LlamaDecoderLayer):
    def __init__(self, config: BaichuanConfig, layer_idx: int) -> None:
        super(LlamaDecoderLayer, self).__init__()
        self.hidden_size = config.hidden_size
        self.self_attn = BaichuanAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class BaichuanPreTrainedModel(LlamaPreTrainedModel):
    config_class = BaichuanConfig
    _no_split_modules = ["BaichuanLayer"]
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False
    _can_compile_fullgraph = False
    _can_record_outputs = {"hidden_states": BaichuanLayer, "attentions": BaichuanAttention}


class BaichuanModel(BaichuanPreTrainedModel, LlamaModel):
    def __init__(self, config: BaichuanConfig) -> None:
        super(LlamaModel, self).__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([BaichuanLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = AlibiSlopes(config.num_attention_heads)
        self.gradient_checkpointing = False
        self.post_init()


class BaichuanForCausalLM(BaichuanPreTrainedModel, LlamaForCausalLM):
    def __init__(self, config: BaichuanConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)
        self.model = BaichuanModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

"""ChatGLM-6B, the first one: a prefix language model with two-dimensional rotary positions (GLM, Du et al. 2022,
arXiv:2103.10360). No class of transformers holds it; later ChatGLMs are plain decoders and become Glm.

A row is [prompt, [gMASK], <sop>, answer, <eop>]. What stands before <sop> sees itself in both directions. The first
half of each head turns with the position, which counts through the context and then stays at the place of [gMASK]; the
second half with the block position, which is 0 in the context and counts 1, 2, ... from <sop> on. The mask and both
positions are found from the ids, so that any batch with its padding on either side is right; packed rows are not, as
one sequence has one context. A row without <sop>, such as a document, is all answer: nothing in it sees what follows.

Names of tensors are those of the original.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep

ALPHA_LAYERS = 28  # the residual's factor is sqrt(2 * 28) in every model, whatever its number of layers


class ChatGLMConfig(PreTrainedConfig):
    model_type = "chatglm"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"num_layers": "num_hidden_layers", "max_position_embeddings": "max_sequence_length"}

    vocab_size: int = 130528
    hidden_size: int = 4096
    inner_hidden_size: int = 16384
    num_hidden_layers: int = 28
    num_attention_heads: int = 32
    layernorm_epsilon: float = 1e-5
    max_sequence_length: int = 2048
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = 130004
    eos_token_id: int | list[int] | None = 130005
    pad_token_id: int | None = 3
    mask_token_id: int = 130000
    gmask_token_id: int = 130001
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if "padded_vocab_size" in kwargs or "multi_query_attention" in kwargs:
            raise ValueError(
                "config.json: a ChatGLM2 or later, expected the first ChatGLM-6B; convert it to Glm with "
                "tools/convert_checkpoint.py"
            )
        super().__post_init__(**kwargs)


def find_context(ids: Tensor, real: Tensor, config: ChatGLMConfig) -> tuple[Tensor, Tensor]:
    """Where the answers begin.

    Args:
        ids: (B, T) token ids.
        real: (B, T) True where there is no padding.

    Returns:
        (B,) index of <sop>, or of the first token in a row without one; (B,) index of [gMASK], else of [MASK], else of
        the first token.
    """
    first = real.int().argmax(1)
    is_start = (ids == config.bos_token_id) & real
    is_global = (ids == config.gmask_token_id) & real
    is_mask = torch.where(is_global.any(1, keepdim=True), is_global, (ids == config.mask_token_id) & real)
    start, place = (torch.where(found.any(1), found.int().argmax(1), first) for found in (is_start, is_mask))
    return start, place


def prefix_positions(ids: Tensor, real: Tensor, config: ChatGLMConfig) -> Tensor:
    """(B, 2, T) position and block position of every token; 0 on padding to the left."""
    start, place = find_context(ids, real, config)
    index = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    first = real.int().argmax(1, keepdim=True)  # padding on the left does not count
    answer = index >= start[:, None]
    position = torch.where(answer, place[:, None], index) - first
    block = torch.where(answer, index - start[:, None] + 1, 0)
    return torch.stack((position.clamp_min(0), block), dim=1)


def prefix_mask(ids: Tensor, real: Tensor, config: ChatGLMConfig) -> Tensor:
    """(B, 1, T, T) True where a query (row) sees a key: everything before itself, and all of the context."""
    start, _ = find_context(ids, real, config)
    index = torch.arange(ids.shape[1], device=ids.device)
    seen = (index <= index[:, None]) | (index < start[:, None, None])
    return (seen & real[:, None, :])[:, None]


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary embedding of one half of the heads (Su et al. 2021, arXiv:2104.09864).

    Args:
        x: (B, T, heads, d)
        positions: (B, T)
    """
    half = x.shape[-1] // 2
    # The original keeps its frequencies in float16, so that rounding belongs to the model.
    frequency = 10000.0 ** -(torch.arange(half, device=x.device).float() / half)
    angle = positions[..., None].float() * frequency.half().float()
    cos, sin = (torch.cat((f, f), -1)[:, :, None].to(x.dtype) for f in (angle.cos(), angle.sin()))
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


class ChatGLMAttention(nn.Module):
    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.heads = layer_idx, config.num_attention_heads
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, mask: Tensor, positions: Tensor, cache: Cache | None) -> Tensor:
        batch, length, width = hidden.shape
        query, key, value = self.query_key_value(hidden).view(batch, length, self.heads, -1).chunk(3, -1)
        query, key = (
            torch.cat([rotate(half, positions[:, i]) for i, half in enumerate(x.chunk(2, -1))], -1)
            for x in (query, key)
        )
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.dense(mixed.transpose(1, 2).reshape(batch, length, width))


class ChatGLMMLP(nn.Module):
    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(nn.functional.gelu(self.dense_h_to_4h(x), approximate="tanh"))


class ChatGLMLayer(GradientCheckpointingLayer):
    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.attention = ChatGLMAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = ChatGLMMLP(config)

    def forward(self, hidden: Tensor, mask: Tensor, positions: Tensor, cache: Cache | None) -> Tensor:
        alpha = (2 * ALPHA_LAYERS) ** 0.5
        normed = self.input_layernorm(hidden)
        hidden = normed * alpha + self.attention(normed, mask, positions, cache)
        normed = self.post_attention_layernorm(hidden)
        return normed * alpha + self.mlp(normed)


class ChatGLMPreTrainedModel(PreTrainedModel):
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ChatGLMLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True


class ChatGLMModel(ChatGLMPreTrainedModel):
    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([ChatGLMLayer(config, i) for i in range(config.num_hidden_layers)])
        self.final_layernorm = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, T, width).

        Args:
            input_ids: (B, T); behind a cache only the new ones, with the mask and positions of
                `prepare_inputs_for_generation`.
            attention_mask: (B, T), 0 on padding; or (B, 1, T, keys), True for what is seen, with position_ids.
            position_ids: (B, 2, T) for a mask of four dimensions; otherwise both follow from the ids.

        Raises:
            ValueError: embeddings without ids, from which neither mask nor positions follow.
        """
        if input_ids is None:
            raise ValueError("ChatGLM-6B: found embeddings without input_ids, expected ids: the mask follows from them")
        if attention_mask is None or attention_mask.ndim == 2:
            if past_key_values is not None and past_key_values.get_seq_length():
                raise ValueError("ChatGLM-6B: a cache needs the mask and positions of prepare_inputs_for_generation")
            real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
            attention_mask = prefix_mask(input_ids, real, self.config)
            position_ids = prefix_positions(input_ids, real, self.config)
        assert position_ids is not None
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and not self.training:
            past_key_values = DynamicCache(config=self.config)
        hidden = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in self.layers:
            hidden = layer(hidden, attention_mask, position_ids, past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=self.final_layernorm(hidden), past_key_values=past_key_values)

    def get_input_embeddings(self) -> nn.Module:
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.word_embeddings = value


class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), and the loss where `labels` are given; other arguments as in `ChatGLMModel.forward`."""
        outputs = self.transformer(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache)
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, next_sequence_length: int | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        given = kwargs.pop("attention_mask", None)
        kwargs.pop("position_ids", None)
        real = torch.ones_like(input_ids, dtype=torch.bool) if given is None else given.bool()
        new = slice(-next_sequence_length if next_sequence_length else None, None)
        inputs = super().prepare_inputs_for_generation(input_ids, next_sequence_length, **kwargs)
        inputs["attention_mask"] = prefix_mask(input_ids, real, self.config)[:, :, new]
        inputs["position_ids"] = prefix_positions(input_ids, real, self.config)[:, :, new]
        return inputs

"""The head of a language model without its logits: log-probabilities of chosen tokens at chosen positions.

Of T positions and V tokens only the scored positions are projected, some rows of logits at a time, so memory grows with
neither T x V nor the number of scored positions times V.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import ModelOutput

from suwen.experts import RouterWatch

CHUNK_ELEMENTS = 2**23  # logits held at once: 32 MB in float32
# On a GPU more: of a vocabulary of 150,000 that is 220 rows, about as many as it takes for a product to be limited by
# arithmetic and not by reading the weights of the head
GPU_CHUNK_ELEMENTS = 2**25
# On a CPU fewer, which stay in its cache, but rows enough for a product to be worth reading the weights of the head
CPU_CHUNK_ELEMENTS, CPU_CHUNK_ROWS = 2**20, 128


@dataclass
class Scored(ModelOutput):
    """What a model with a scoring head returns when it is called with `score_at` and `score_labels`.

    Attributes:
        logps: (N,) float32, log-probability of each label.
        correct: (N,) bool, whether the label is the likeliest token.
        router_loss: how unevenly experts are used (`suwen.experts`), where that is watched.
    """

    logps: torch.Tensor | None = None
    correct: torch.Tensor | None = None
    router_loss: torch.Tensor | None = None


def add_scoring_head(model: Any, routing: RouterWatch | None = None) -> None:
    """Teach a causal language model to score: `model(..., score_at=(N,), score_labels=(N,))` returns `Scored`.

    `score_at` are positions in the flattened batch (row * T + position), each scored for the token that follows it.
    Without them the forward is the model's own. The call goes through the model's forward, so that DDP, FSDP, ZeRO and
    PEFT see it. Called once, before PEFT wraps the model. `routing` watches the routers of a mixture of experts.
    """
    original = model.forward

    @functools.wraps(type(model).forward)  # the library reads the signature
    def forward(*args: Any, score_at: Any = None, score_labels: Any = None, **kwargs: Any) -> Any:
        if score_at is None:
            return original(*args, **kwargs)
        hidden, router_loss = hidden_states(model, routing, *args, **kwargs)
        logps, correct = score(model, hidden[score_at], score_labels)
        return Scored(logps=logps, correct=correct, router_loss=router_loss)

    model.forward = forward


def hidden_states(
    model: Any, routing: RouterWatch | None, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(B * T, H) last hidden states, and the loss of the routers where they are watched in training."""
    kwargs["use_cache"] = False
    if routing is None or not model.training:
        return model.base_model(*args, **kwargs).last_hidden_state.flatten(0, 1), None
    with routing.watch():
        hidden = model.base_model(*args, **kwargs).last_hidden_state.flatten(0, 1)
    return hidden, routing.loss(kwargs.get("attention_mask"))


def init_reward_head(head: torch.nn.Linear) -> None:
    """Weights from N(0, 1 / (H + 1)), always the same ones, so that first scores are about as large as 1.

    Stiennon et al. 2020 (arXiv:2009.01325), app. B.1.
    """
    weight = head.weight
    if weight.is_meta:  # FSDP: the first rank's weights are sent to the others
        return
    context: Any = nullcontext()
    if is_deepspeed_zero3_enabled():
        import deepspeed

        context = deepspeed.zero.GatheredParameters(weight, modifier_rank=0)
    with context, torch.no_grad():
        if weight.numel():
            values = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
            weight.copy_(values * (weight.shape[1] + 1) ** -0.5)


@dataclass
class Rewarded(ModelOutput):
    """What a reward model returns when it is called with `score_at`: `scores` (N,) float32, and `router_loss`."""

    scores: torch.Tensor | None = None
    router_loss: torch.Tensor | None = None


def add_reward_forward(model: Any, routing: RouterWatch | None = None) -> None:
    """Teach a model with a head of one number to score positions: `model(..., score_at=(N,))` returns `Rewarded`.

    As `add_scoring_head`; the head is computed in its own precision, outside of autocast, at the N positions alone.
    """
    original = model.forward

    @functools.wraps(type(model).forward)  # the library reads the signature
    def forward(*args: Any, score_at: Any = None, score_labels: Any = None, **kwargs: Any) -> Any:
        if score_at is None:
            return original(*args, **kwargs)
        hidden, router_loss = hidden_states(model, routing, *args, **kwargs)
        with torch.autocast(hidden.device.type, enabled=False):
            scores = model.score(hidden[score_at].to(model.score.weight.dtype))[:, 0].float()
        return Rewarded(scores=scores, router_loss=router_loss)

    model.forward = forward


def score(model: Any, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of labels (N,) after the last hidden states (N, H), and whether they are the likeliest."""
    head = model.get_output_embeddings()
    scale, softcap = logit_settings(model.config.get_text_config())
    dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else None
    weight = getattr(head, "weight", None)
    # Any other head (LoRA on it, trained in full beside an adapter, quantised, partitioned) is called as it is
    if type(head) is not torch.nn.Linear or is_deepspeed_zero3_enabled():
        return score_by_module(head, hidden, labels, scale, softcap)
    bias = head.bias
    if isinstance(weight, DTensor):  # FSDP2
        weight, bias = weight.full_tensor(), bias.full_tensor() if bias is not None else None
    with torch.autocast(hidden.device.type, enabled=False):
        return TokenLogps.apply(hidden, weight, bias, labels, scale, softcap, dtype or hidden.dtype)


def logit_settings(config: Any) -> tuple[float, float | None]:
    """Factor on the logits (Cohere, Granite) and soft cap (Gemma 2) that stand between head and softmax."""
    scale = getattr(config, "logit_scale", None) or 1.0
    if divisor := getattr(config, "logits_scaling", None):
        scale = 1 / divisor
    return scale, getattr(config, "final_logit_softcapping", None)


def chunk_rows(vocabulary: int, device: str | None = None) -> int:
    """Rows of logits that are held at once on a type of device; None for a head that is called as it is on a CPU."""
    size = max(1, (GPU_CHUNK_ELEMENTS if device == "cuda" else CHUNK_ELEMENTS) // vocabulary)
    return min(size, max(CPU_CHUNK_ROWS, CPU_CHUNK_ELEMENTS // vocabulary)) if device == "cpu" else size


def chunks(count: int, vocabulary: int, device: str | None = None) -> Iterator[slice]:
    size = chunk_rows(vocabulary, device)
    return (slice(at, at + size) for at in range(0, count, size))


def settle(logits: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    """float32 logits as they enter the softmax."""
    logits = logits.float() * scale if scale != 1.0 else logits.float()
    return softcap * torch.tanh(logits / softcap) if softcap else logits


class TokenLogps(torch.autograd.Function):
    """log softmax(settle(h W^T + b))[label], chunk by chunk.

    The gradient of each log-probability with respect to its hidden state is computed in the forward pass, while the
    chunk's probabilities are there, and scaled in the backward pass. Where the head itself is trained, the
    probabilities are computed again in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        scale: float,
        softcap: float | None,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        matrix = weight.to(dtype)
        offset = bias.to(dtype) if bias is not None else None
        logps = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        correct = torch.empty(len(labels), dtype=torch.bool, device=hidden.device)
        trained = ctx.needs_input_grad[1]
        slopes = torch.empty_like(hidden, dtype=dtype) if ctx.needs_input_grad[0] and not trained else None
        for part in chunks(len(labels), len(weight), hidden.device.type):
            logits = settle(torch.nn.functional.linear(hidden[part].to(dtype), matrix, offset), scale, softcap)
            correct[part] = logits.argmax(1) == labels[part]
            inner = slope_of_settling(logits, scale, softcap)
            torch.log_softmax(logits, 1, out=logits)
            logps[part] = logits.gather(1, labels[part, None])[:, 0]
            if slopes is not None:
                slopes[part] = slope_of_logits(logits, labels[part], inner).to(dtype) @ matrix
            del logits, inner  # before the next chunk's are made
        if trained:
            ctx.save_for_backward(hidden, weight, bias, labels)
        else:
            ctx.save_for_backward(slopes)
        ctx.settings = (scale, softcap, dtype, trained)
        ctx.mark_non_differentiable(correct)
        return logps, correct

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        scale, softcap, dtype, trained = ctx.settings
        if not trained:
            (slopes,) = ctx.saved_tensors
            d_hidden = gradient[:, None] * slopes if slopes is not None else None
            return d_hidden, None, None, None, None, None, None
        hidden, weight, bias, labels = ctx.saved_tensors
        matrix = weight.to(dtype)
        offset = bias.to(dtype) if bias is not None else None
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight)
        d_bias = torch.zeros_like(bias) if bias is not None else None
        for part in chunks(len(labels), len(weight), hidden.device.type):
            rows = hidden[part].to(dtype)
            logits = settle(torch.nn.functional.linear(rows, matrix, offset), scale, softcap)
            inner = slope_of_settling(logits, scale, softcap)
            torch.log_softmax(logits, 1, out=logits)
            slope = slope_of_logits(logits, labels[part], inner).mul_(gradient[part, None]).to(dtype)
            d_hidden[part] = (slope @ matrix).to(hidden.dtype)
            if d_weight.dtype == dtype:
                d_weight.addmm_(slope.T, rows)
            else:
                d_weight += slope.T @ rows
            if d_bias is not None:
                d_bias += slope.sum(0).to(d_bias.dtype)
            del logits, inner, slope
        return d_hidden, d_weight, d_bias, None, None, None, None


def slope_of_settling(logits: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor | float:
    """Gradient of settled logits with respect to the head's own output."""
    return scale * (1 - (logits / softcap) ** 2) if softcap else scale


def slope_of_logits(logps: torch.Tensor, labels: torch.Tensor, inner: torch.Tensor | float) -> torch.Tensor:
    """Gradient (N, V) of each label's log-probability with respect to the head's own output; overwrites `logps`."""
    slope = logps.exp_().neg_()
    slope[torch.arange(len(labels), device=labels.device), labels] += 1
    return slope if isinstance(inner, float) and inner == 1.0 else slope.mul_(inner)


def score_by_module(
    head: torch.nn.Module, hidden: torch.Tensor, labels: torch.Tensor, scale: float, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by calling the head; its logits are made again in the backward pass, chunk by chunk.

    A partitioned head (ZeRO-3) is gathered at each call, which all ranks must make together: there it is one chunk.
    """

    def piece(rows: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = settle(head(rows), scale, softcap)
        found = logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(1)
        return found, (logits.argmax(1) == wanted)

    if is_deepspeed_zero3_enabled():
        return piece(hidden, labels)
    vocabulary = getattr(head, "out_features", None) or 2**17
    parts = chunks(len(labels), vocabulary, "cuda" if hidden.is_cuda else None)
    found = [checkpoint(piece, hidden[part], labels[part], use_reentrant=False) for part in parts]
    found = found or [piece(hidden, labels)]
    return torch.cat([logps for logps, _ in found]), torch.cat([correct for _, correct in found])


def score_actions(
    model: Any, hidden: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0, num_chunks: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of labels (N,) after hidden states (N, H), and the entropy (N,) of what could have been said.

    Both belong to the distribution that was drawn from: logits divided by `temperature`. Both can be differentiated;
    logits are made again in the backward pass, chunk by chunk.

    Args:
        num_chunks: where ranks must call a partitioned head equally often (ZeRO-3), a number they agreed on.
    """
    head = model.get_output_embeddings()
    scale, softcap = logit_settings(model.config.get_text_config())

    def piece(rows: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logps = (settle(head(rows), scale, softcap) / temperature).log_softmax(1)
        return logps.gather(1, wanted[:, None])[:, 0], -(logps.exp() * logps).sum(1)

    num_chunks = num_chunks or count_chunks(model, len(labels))
    pieces = zip(hidden.tensor_split(num_chunks), labels.tensor_split(num_chunks), strict=True)
    found = [checkpoint(piece, *parts, use_reentrant=False) for parts in pieces]
    logps, entropy = (torch.cat(parts) for parts in zip(*found, strict=True))
    return logps, entropy


def count_chunks(model: Any, count: int) -> int:
    """Pieces into which `count` rows of logits are cut, so that none is larger than CHUNK_ELEMENTS."""
    return max(1, -(-count * model.config.get_text_config().vocab_size // CHUNK_ELEMENTS))

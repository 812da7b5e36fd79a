"""LoRA's part of a layer in one step, forward and backward, in the precision of the layer.

PEFT takes several passes for it: the input to float32 and back, a mask of dropout in doubles, the (T, out) product
scaled and then added. On a CPU with fast bfloat16 most of a training step goes there. The arithmetic here is PEFT's but
for the precision of the input of dropout. What is dropped is drawn otherwise: layers that read the same tensor, as the
queries, keys and values of attention do, drop the same elements of it, and of few elements the places are drawn.
"""

from __future__ import annotations

import functools
import math
import weakref
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch.autograd.function import once_differentiable
from transformers.integrations import is_deepspeed_zero3_enabled

# PEFT's layers that are base + scaling * B(A(dropout(x))): over a linear layer, int8, NF4 and two bits
LAYERS = ("Linear", "Linear8bitLt", "Linear4bit", "HqqLoraLinear")
# Up to this chance, and from so many elements on, places to drop take less time and memory than a mask of all elements
MOST_BY_PLACE, FEWEST_BY_PLACE = 0.2, 1000


def fuse_lora(model: Any) -> None:
    """Let the LoRA layers of a model that is to be trained take the short way, wherever it is the same.

    Under ZeRO-3 weights are gathered module by module as PEFT calls them, so there its own way stays.
    """
    if is_deepspeed_zero3_enabled():
        return
    dropout = Dropout()
    for module in model.modules():
        if isinstance(module, LoraLayer) and type(module).__name__ in LAYERS:
            module.forward = functools.partial(forward, module, module.forward, dropout)


def forward(layer: Any, original: Any, shared: Dropout, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """What a layer of LAYERS computes.

    PEFT's own way where it is merged, switched off, has several adapters or a variant such as DoRA, and where torch
    compiles, which fuses those passes itself.
    """
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    plain = len(names) == 1 and not (layer.disable_adapters or layer.merged or args or kwargs or layer.lora_variant)
    if not plain or layer.lora_B[names[0]].bias is not None or torch.compiler.is_compiling():
        return original(x, *args, **kwargs)
    name = names[0]
    dropout = layer.lora_dropout[name]
    p = dropout.p if dropout.training and isinstance(dropout, torch.nn.Dropout) else 0.0
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else a.dtype
    rows, dropped, scale = shared(x, dtype, p)
    return AddLora.apply(layer.base_layer(x), x, rows, dropped, a, b, layer.scaling[name] * scale)


class Dropout:
    """Rows of x with some elements dropped, kept for the next layer that reads the same tensor."""

    def __init__(self) -> None:
        self.last: tuple[Any, ...] = ()

    def __call__(
        self, x: torch.Tensor, dtype: torch.dtype, p: float
    ) -> tuple[torch.Tensor, torch.Tensor | None, float]:
        """
        Args:
            x: (..., in).
            dtype: of the result.
            p: chance of an element to be dropped.

        Returns:
            (rows, in), detached from x; what `draw` dropped, None if p is 0; what to multiply with afterwards.
        """
        if not p:
            return x.detach().flatten(0, -2).to(dtype), None, 1.0
        version = 0 if x.is_inference() else x._version  # which counts changes in place
        key = (version, dtype, p)
        if not self.last or self.last[0]() is not x or self.last[1] != key:
            rows = x.detach().flatten(0, -2).to(dtype, copy=True, memory_format=torch.contiguous_format)
            dropped, kept = draw(rows, p)
            self.last = (weakref.ref(x, self._forget), key, (drop_(rows, dropped), dropped, 1 / kept))
        return self.last[2]

    def _forget(self, _: Any) -> None:
        self.last = ()


class AddLora(torch.autograd.Function):
    """result + scaling * B A dropout(x); Hu et al. 2021 (arXiv:2106.09685), section 4.1."""

    @staticmethod
    def forward(
        ctx: Any,
        result: torch.Tensor,
        x: torch.Tensor,
        rows: torch.Tensor,
        dropped: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """
        Args:
            result: (..., out), of the base layer.
            x: (..., in); only its gradient is computed here.
            rows, dropped: what dropout left of x, and where it dropped.
            a, b: (r, in) and (out, r).
        """
        ctx.types = (x.dtype, a.dtype, b.dtype)
        a, b = a.to(rows.dtype), b.to(rows.dtype)
        ctx.scaling = scaling
        low = rows @ a.t()
        ctx.save_for_backward(rows, dropped, low, a, b)
        found = torch.addmm(result.flatten(0, -2).to(rows.dtype), low, b.t(), alpha=scaling)
        return found.view(result.shape).to(result.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, dropped, low, a, b = ctx.saved_tensors
        into_x, into_a, into_b = ctx.types
        outer = gradient.flatten(0, -2).to(b.dtype)
        inner = (outer @ b) * ctx.scaling
        to_x = None
        if ctx.needs_input_grad[1]:
            to_x = inner @ a
            to_x = to_x if dropped is None else drop_(to_x, dropped)
            to_x = to_x.view(*gradient.shape[:-1], -1).to(into_x)
        to_a, to_b = inner.t() @ rows, (outer.t() @ low) * ctx.scaling
        return gradient, to_x, None, None, to_a.to(into_a), to_b.to(into_b), None


def draw(x: torch.Tensor, p: float) -> tuple[torch.Tensor, float]:
    """Choose the elements of x to drop, each with the chance p, or the nearest that a whole number of draws gives.

    Returns:
        their places in x laid flat, drawn with repetition, or, of many, a mask of what is kept; the chance to be kept.
    """
    count = x.numel()
    if p > MOST_BY_PLACE or count < FEWEST_BY_PLACE:
        kept = torch.empty_like(x, dtype=x.dtype if x.device.type == "cpu" else torch.bool)
        return kept.bernoulli_(1 - p), max(1 - p, 1e-9)
    draws = round(math.log1p(-p) / math.log1p(-1 / count))  # (1 - 1 / count) ** draws = 1 - p
    return torch.randint(count, (draws,), device=x.device), (1 - 1 / count) ** draws


def drop_(x: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
    """Set to 0, in place, what `draw` chose; x is contiguous."""
    if dropped.dtype == torch.int64:
        x.view(-1).index_fill_(0, dropped, 0)
        return x
    return x.mul_(dropped)

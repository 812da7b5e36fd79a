"""LoRA's part of a layer in one step, forward and backward, in the precision of the layer.

PEFT takes several passes for it: the input to float32 and back, a mask of dropout in doubles, the (T, out) product
scaled and then added. On a CPU with fast bfloat16 most of a training step goes there. The arithmetic here is PEFT's but
for the precision of the input of dropout, and the mask is drawn otherwise: layers that read the same tensor, as the
queries, keys and values of attention do, drop the same elements of it.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch.autograd.function import once_differentiable
from transformers.integrations import is_deepspeed_zero3_enabled

# PEFT's layers that are base + scaling * B(A(dropout(x))): over a linear layer, int8, NF4 and two bits
LAYERS = ("Linear", "Linear8bitLt", "Linear4bit", "HqqLoraLinear")
LEVELS = 2**16  # of the chance to be dropped, which is right to 1e-5


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
    rows, mask, scale = shared(x, dtype, p)
    return AddLora.apply(layer.base_layer(x), x, rows, mask, a, b, layer.scaling[name] * scale)


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
            (rows, in), detached from x; the mask of what is kept, None if p is 0; what to multiply with afterwards.
        """
        dropped = min(round(p * LEVELS), LEVELS - 1)
        if not dropped:
            return x.detach().flatten(0, -2).to(dtype), None, 1.0
        version = 0 if x.is_inference() else x._version  # which counts changes in place
        key = (version, dtype, p)
        if not self.last or self.last[0]() is not x or self.last[1] != key:
            rows = x.detach().flatten(0, -2).to(dtype)
            mask = keep_mask(rows, dropped)
            found = (rows * mask, mask, LEVELS / (LEVELS - dropped))
            self.last = (weakref.ref(x, self._forget), key, found)
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
        mask: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """
        Args:
            result: (..., out), of the base layer.
            x: (..., in); only its gradient is computed here.
            rows, mask: what dropout left of x, and where.
            a, b: (r, in) and (out, r).
        """
        ctx.types = (x.dtype, a.dtype, b.dtype)
        a, b = a.to(rows.dtype), b.to(rows.dtype)
        ctx.scaling = scaling
        low = rows @ a.t()
        ctx.save_for_backward(rows, mask, low, a, b)
        found = torch.addmm(result.flatten(0, -2).to(rows.dtype), low, b.t(), alpha=scaling)
        return found.view(result.shape).to(result.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, mask, low, a, b = ctx.saved_tensors
        into_x, into_a, into_b = ctx.types
        outer = gradient.flatten(0, -2).to(b.dtype)
        inner = (outer @ b) * ctx.scaling
        to_x = None
        if ctx.needs_input_grad[1]:
            to_x = inner @ a
            to_x = to_x if mask is None else to_x.mul_(mask)
            to_x = to_x.view(*gradient.shape[:-1], -1).to(into_x)
        to_a, to_b = inner.t() @ rows, (outer.t() @ low) * ctx.scaling
        return gradient, to_x, None, None, to_a.to(into_a), to_b.to(into_b), None


def keep_mask(x: torch.Tensor, dropped: int) -> torch.Tensor:
    """0 where an element of x is dropped, 1 elsewhere, in the shape of x; on a CPU also in its type, which is faster.

    `dropped` of LEVELS elements are, 1 to LEVELS - 1. On a CPU 16 bits an element, from a fast generator that torch's
    seeds, compared by whole-number steps that the processor takes for many elements at once: a fifth of the time of
    `bernoulli_`, which draws doubles.
    """
    if x.device.type != "cpu":
        return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropped / LEVELS)
    count = x.numel()
    generator = np.random.SFC64(torch.randint(2**62, ()).item())
    bits = torch.from_numpy(generator.random_raw(-(-count // 4)).view(np.int16))[:count]
    first_kept = dropped - LEVELS // 2
    return bits.clamp_(first_kept - 1, first_kept).sub_(first_kept - 1).to(x.dtype).view(x.shape)

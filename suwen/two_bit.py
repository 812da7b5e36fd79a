"""Linear layers in two bits, for a frozen base under LoRA: half-quadratic quantisation (HQQ) in plain torch.

Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models": no calibration data; each group of
64 weights has a scale and a zero point, and the zero point is moved so that the error is sparse (an l_p norm, p = 0.7).
Two bits a weight and two 16-bit numbers a group are 2.5 bits a weight.

Ours, because no library does it here: transformers 5.23 refuses HqqConfig (NotImplementedError); optimum-quanto 0.2.7
compiles C++ at its first forward pass and drops adapters when it merges; torchao keeps two bits unpacked at 9.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

GROUP = 64
LEVELS = 3  # the largest code of two bits
ITERATIONS, BETA, KAPPA, NORM = 20, 10.0, 1.01, 0.7  # the authors'


@dataclass
class TwoBitReport:
    """What became of a model: weights in two bits, their bits in all, and their error as a share of their variance."""

    weights: int
    bits: float
    error: float
    left: int  # weights of linear layers that do not divide into groups
    loss_before: float | None = None
    loss_after: float | None = None

    def line(self) -> str:
        text = (
            f"2 bit: {self.weights:,} weights of linear layers at {self.bits:.2f} bits each, error {self.error:.1%} of"
            " their variance"
        )
        if self.left:
            text += f", {self.left:,} left as they were (no multiple of {GROUP})"
        if self.loss_before is not None and self.loss_after is not None:
            text += f"; loss on probe sentences {self.loss_before:.3f} before, {self.loss_after:.3f} after"
        return text


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and zero points of a matrix whose size is a multiple of `GROUP`.

    Returns:
        (G, 16) uint8, four codes in each; (G, 1) scales and (G, 1) zero points in float16, so that a weight is
        (code - zero) * scale.
    """
    groups = weight.detach().float().reshape(-1, GROUP)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    # Of nearly equal weights no smaller a scale than keeps the zero point within float16's exact integers
    largest = torch.maximum(low.abs(), high.abs())
    scale = torch.maximum((high - low) / LEVELS, largest / 1024).clamp(min=2.0**-24).half().float()
    zero = -low / scale
    beta, best = BETA, torch.inf
    kept = zero
    for _ in range(ITERATIONS):
        codes = (groups / scale + zero).round().clamp(0, LEVELS)
        difference = groups - (codes - zero) * scale
        error = difference.abs().mean().item()
        if error >= best:
            break
        best, kept = error, zero
        shrunk = difference.abs() - difference.abs().clamp(min=1e-8).pow(NORM - 1) / beta
        sparse = difference.sign() * shrunk.clamp(min=0)
        zero = (codes - (groups - sparse) / scale).mean(1, keepdim=True)
        beta *= KAPPA
    zero = kept.half().float()
    codes = (groups / scale + zero).round().clamp(0, LEVELS).to(torch.uint8).view(-1, GROUP // 4, 4)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=codes.device)
    return (codes << shifts).sum(2, dtype=torch.uint8), scale.half(), zero.half()


def dequantize(packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """(G, 64) float32 weights."""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=packed.device)
    codes = ((packed[:, :, None] >> shifts) & LEVELS).flatten(1).float()
    return (codes - zero.float()) * scale.float()


class _Product(torch.autograd.Function):
    """x W^T, with W made again in the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: TwoBitLinear) -> torch.Tensor:
        ctx.layer = layer
        return x @ layer.dense().to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ ctx.layer.dense().to(gradient.dtype), None


class TwoBitLinear(torch.nn.Linear):
    """A frozen linear layer whose `weight` holds packed codes; to PEFT a linear layer as any other."""

    def __init__(self, source: torch.nn.Linear) -> None:
        super().__init__(source.in_features, source.out_features, bias=False, device="meta")
        packed, scale, zero = quantize(source.weight)
        self.weight = torch.nn.Parameter(packed, requires_grad=False)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.bias = source.bias

    def dense(self) -> torch.Tensor:
        """(out, in) float32."""
        return dequantize(self.weight, self.scale, self.zero).view(self.out_features, self.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        found = _Product.apply(x, self)
        return found if self.bias is None else found + self.bias.to(found.dtype)


def quantize_model(model: Any, device: str | None = None) -> TwoBitReport:
    """Put every linear layer but the head into two bits, in place, one at a time; the model ends on `device`."""
    heads = {id(head) for head in (model.get_output_embeddings(), getattr(model, "score", None)) if head is not None}
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is torch.nn.Linear and id(child) not in heads
    ]
    weights = left = 0
    bits = squares = variance = 0.0
    for parent, name, child in found:
        if child.weight.numel() % GROUP:
            left += child.weight.numel()
            continue
        child = child.to(device) if device else child
        layer = TwoBitLinear(child)
        original = child.weight.detach().float()
        weights += original.numel()
        bits += 8 * (layer.weight.numel() + 2 * layer.scale.numel() + 2 * layer.zero.numel())
        squares += (layer.dense() - original).square().sum().item()
        variance += original.var(correction=0).item() * original.numel()
        setattr(parent, name, layer)
    if not weights:
        raise ValueError("--quantization 2bit: found no linear layer to put into two bits")
    model.requires_grad_(False)
    if device:
        model.to(device)
    return TwoBitReport(weights, bits / weights, squares / max(variance, 1e-30), left)


def dequantize_model(model: Any) -> Any:
    """The same model with plain linear layers that hold, in float32, what the two bits stand for."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, TwoBitLinear):
                plain = torch.nn.Linear(child.in_features, child.out_features, bias=False, device="meta")
                plain.weight = torch.nn.Parameter(child.dense(), requires_grad=False)
                plain.bias = child.bias
                setattr(parent, name, plain)
    return model

"""Mixtures of experts: how evenly routers use the experts, as a loss; and what engines must know of the experts.

The loss of a layer is N sum_i f_i P_i over its N experts: f_i is the share of tokens sent to expert i, P_i the mean
probability that the router gives it (Fedus et al. 2021, arXiv:2101.03961, eq. 4 to 6, for k experts a token as in
Mixtral). It is k where all experts are used alike, and N for k = 1 where one expert takes all. Layers are averaged;
transformers pools the tokens of all layers instead, where the favourites of different layers cancel out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

DEFAULT_COEFFICIENT = 0.001  # where a config names none: that of Mixtral and Qwen3-MoE


def find_routers(model: Any) -> list[torch.nn.Module]:
    """The modules whose decisions the library would record as router logits; none in a model without experts."""
    recorder = getattr(model.base_model, "_can_record_outputs", None) or {}
    kind = getattr(recorder.get("router_logits"), "target_class", None)
    return [module for module in model.modules() if kind is not None and isinstance(module, kind)]


def stacked_experts(model: Any) -> tuple[int, str]:
    """Number of weights in stacked experts, 3-D tensors that neither 4 bit nor LoRA's `all` reach; their dtype."""
    found = [p for name, p in model.named_parameters() if p.ndim == 3 and ".experts." in name]
    return sum(parameter.numel() for parameter in found), str(found[0].dtype).removeprefix("torch.") if found else ""


class RouterWatch:
    """Notes what the routers of a model decide while a forward pass is watched."""

    def __init__(self, model: Any) -> None:
        self.decisions: list[tuple[torch.nn.Module, torch.Tensor, torch.Tensor]] = []
        self.watching = False
        for router in find_routers(model):
            router.register_forward_hook(self._note)

    def _note(self, router: torch.nn.Module, inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
        if self.watching:  # not in the repetition of a layer by gradient checkpointing
            logits, _, chosen = output
            self.decisions.append((router, logits, chosen))

    @contextmanager
    def watch(self) -> Iterator[None]:
        self.decisions, self.watching = [], True
        try:
            yield
        finally:
            self.watching = False

    def loss(self, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """The mean over layers of what was watched; tokens that `attention_mask` (B, T) leaves out do not count."""
        decisions, self.decisions = self.decisions, []
        kept = attention_mask.flatten().bool() if attention_mask is not None and attention_mask.ndim == 2 else None
        losses = [balance_loss(probabilities(router, logits), chosen, kept) for router, logits, chosen in decisions]
        return torch.stack(losses).mean()


def probabilities(router: torch.nn.Module, logits: torch.Tensor) -> torch.Tensor:
    """(T, N) of a router's logits: softmax, or sigmoids brought to sum 1 where a bias beside them takes part in the
    choice (DeepSeek-V3, arXiv:2412.19437, eq. 19).
    """
    if hasattr(router, "e_score_correction_bias"):
        scores = logits.float().sigmoid()
        return scores / scores.sum(-1, keepdim=True)
    return logits.float().softmax(-1)


def balance_loss(probability: torch.Tensor, chosen: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
    """Loss of one layer, see above.

    Args:
        probability: (T, N).
        chosen: (T, k) experts of each token.
        kept: (T,) bool, tokens that count; None for all.
    """
    if kept is not None:
        probability, chosen = probability[kept], chosen[kept]
    tokens, experts = probability.shape
    # Not torch.bincount, which has a GPU catch up; float32 counts to 2^24
    counts = torch.zeros(experts, device=chosen.device).scatter_add_(
        0, chosen.flatten(), torch.ones(chosen.numel(), device=chosen.device)
    )
    shares = counts.to(probability.dtype) / max(tokens, 1)
    return experts * (shares * probability.mean(0)).sum()


def coefficient(given: float | None, config: Any, use_peft: bool) -> float:
    """Weight of the loss: as given, else the model's own in full training; LoRA leaves routers as they are, so 0."""
    if given is not None:
        return given
    return 0.0 if use_peft else getattr(config, "router_aux_loss_coef", None) or DEFAULT_COEFFICIENT


def mark_leaf_modules(model: Any) -> int:
    """Under ZeRO-3 gather a layer's router and experts together, whichever of them a rank's tokens go to.

    A process whose tokens need other experts would else gather in another order and wait for ever. Returns how many
    modules were marked.
    """
    from deepspeed.utils import set_z3_leaf_module

    routers = {id(router) for router in find_routers(model)}
    blocks = [module for module in model.modules() if routers & {id(child) for child in module.children()}]
    for block in blocks:
        set_z3_leaf_module(block, True)
    return len(blocks)

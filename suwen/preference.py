"""Losses on preference pairs, as pure functions of log-probabilities."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid, softplus

LOSS_TYPES = ("sigmoid", "ipo", "hinge", "robust", "sigmoid_norm")


class PairLogps(NamedTuple):
    """Log-probabilities of the better and the worse answer, summed over their tokens; each (B,)."""

    chosen: torch.Tensor
    rejected: torch.Tensor


def preference_loss(
    policy: PairLogps,
    reference: PairLogps,
    lengths: PairLogps,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Loss of each pair.

    Args:
        policy, reference: log-probabilities under the model in training and under its start.
        lengths: tokens of the answers, stop token included.
        beta: strength of the tie to the reference; for ipo the regularisation tau.
        loss_type: sigmoid: DPO, Rafailov et al. 2023 (arXiv:2305.18290), eq. 7, with label smoothing the conservative
            form of the authors' note. robust: Chowdhury et al. 2024 (arXiv:2403.00409), eq. 12. hinge: SLiC, Zhao et
            al. 2023 (arXiv:2305.10425). ipo: Azar et al. 2023 (arXiv:2310.12036), eq. 17, on log-probabilities averaged
            over tokens, as its authors compute it. sigmoid_norm: length-normalised DPO, Tulu 3 (arXiv:2411.15124),
            eq. 6.
        label_smoothing: share of pairs that may be labelled the wrong way round, 0 to below 0.5.

    Returns:
        (B,) losses.
    """
    chosen, rejected = policy.chosen - reference.chosen, policy.rejected - reference.rejected
    if loss_type in ("ipo", "sigmoid_norm"):
        chosen, rejected = chosen / lengths.chosen, rejected / lengths.rejected
    margin = chosen - rejected
    if loss_type in ("sigmoid", "sigmoid_norm"):
        return -(1 - label_smoothing) * logsigmoid(beta * margin) - label_smoothing * logsigmoid(-beta * margin)
    if loss_type == "robust":
        kept, flipped = logsigmoid(beta * margin), logsigmoid(-beta * margin)
        return (-(1 - label_smoothing) * kept + label_smoothing * flipped) / (1 - 2 * label_smoothing)
    if loss_type == "hinge":
        return torch.relu(1 - beta * margin)
    if loss_type == "ipo":
        return (margin - 1 / (2 * beta)) ** 2
    raise ValueError(f"unknown --loss_type {loss_type!r}; known: {', '.join(LOSS_TYPES)}")


def bradley_terry_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, margin: torch.Tensor | float = 0.0, centering: float = 0.0
) -> torch.Tensor:
    """Loss of a reward model on each pair: -log of the probability that the better answer wins.

    Bradley and Terry 1952, as in Ouyang et al. 2022 (arXiv:2203.02155), eq. 1.

    Args:
        chosen, rejected: (B,) scores of the better and the worse answer.
        margin: (B,) by how much the better answer must be ahead: Llama 2 (arXiv:2307.09288), eq. 2.
        centering: weight of (chosen + rejected)^2, which holds scores around 0 without moving the order: Eisenstein et
            al. 2023 (arXiv:2312.09244), with 0.01.

    Returns:
        (B,) losses.
    """
    return softplus(margin - (chosen - rejected)) + centering * (chosen + rejected) ** 2


def odds_ratio_loss(mean_logps: PairLogps) -> torch.Tensor:
    """ORPO's preference term of each pair: Hong et al. 2024 (arXiv:2403.07691), eq. 7.

    Args:
        mean_logps: log-probabilities averaged over the tokens of the answer.

    Returns:
        (B,) -log sigmoid of the log odds ratio.
    """
    return softplus(-(log_odds(mean_logps.chosen) - log_odds(mean_logps.rejected)))


def log_odds(mean_logps: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) of p = exp(mean_logps), exact where p is near 1."""
    return mean_logps - torch.log(-torch.expm1(mean_logps.clamp(max=-1e-6)))


def sum_by_answer(logps: torch.Tensor, owners: torch.Tensor, num_pairs: int) -> tuple[PairLogps, PairLogps]:
    """Add up the log-probabilities (N,) of scored tokens by the answer that they belong to.

    Args:
        owners: (N,) 2 i for the better answer of pair i, 2 i + 1 for the worse one.

    Returns:
        sums and numbers of tokens, each as PairLogps of (num_pairs,).
    """
    sums = torch.zeros(2 * num_pairs, dtype=logps.dtype, device=logps.device).index_add(0, owners, logps)
    counts = torch.zeros_like(sums).index_add(0, owners, torch.ones_like(logps))
    return PairLogps(*sums.view(-1, 2).unbind(1)), PairLogps(*counts.view(-1, 2).unbind(1))

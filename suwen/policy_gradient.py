"""Policy-gradient arithmetic on tensors of answer tokens: no model, no randomness, no state.

B answers are padded on the right to T tokens; `mask` is 1 on their tokens (stop token included) and 0 on padding.
"""

from __future__ import annotations

import torch

KL_ESTIMATORS = ("k1", "k3")
LARGEST_EXPONENT = 20.0  # exp of a larger difference says nothing but "far away", and would end in infinity


def kl_estimate(logps: torch.Tensor, reference_logps: torch.Tensor, estimator: str = "k1") -> torch.Tensor:
    """Estimate KL(policy || reference) at each token from the token that the policy drew.

    Schulman 2020, "Approximating KL divergence": k1 is log(policy / reference), unbiased and of either sign; k3 is
    r - 1 - log r with r = reference / policy, unbiased, never negative, of less variance.

    Args:
        logps, reference_logps: log-probabilities of the drawn tokens, of the same shape.

    Returns:
        nats a token, in that shape.
    """
    difference = reference_logps - logps
    if estimator == "k1":
        return -difference
    if estimator == "k3":
        return difference.clamp(max=LARGEST_EXPONENT).exp() - 1 - difference
    raise ValueError(f"unknown --kl_estimator {estimator!r}; known: {', '.join(KL_ESTIMATORS)}")


def token_rewards(scores: torch.Tensor, kl: torch.Tensor, mask: torch.Tensor, coefficient: float) -> torch.Tensor:
    """What each token earns: minus the KL penalty, and at the last one the score of the answer.

    Ziegler et al. 2019 (arXiv:1909.08593), eq. 2, spread over the tokens as in Ouyang et al. 2022.

    Args:
        scores: (B,) of whole answers.
        kl: (B, T) estimates, see `kl_estimate`.

    Returns:
        (B, T), 0 on padding. An answer without a token earns nothing.
    """
    rewards = -coefficient * kl * mask
    lengths = mask.sum(1).long()
    rows = torch.arange(len(scores), device=scores.device)[lengths > 0]
    rewards[rows, lengths[rows] - 1] += scores[rows]
    return rewards


def advantages(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float = 1.0, lam: float = 0.95
) -> torch.Tensor:
    """Estimate how much better each token was than the critic expected.

    Generalized advantage estimation, Schulman et al. 2016 (arXiv:1506.02438), eq. 16. An answer ends with its last
    token: nothing is expected after it.

    Args:
        rewards: (B, T) reward of each token, see `token_rewards`.
        values: (B, T) the critic's estimate of the return before each token.

    Returns:
        (B, T) advantages, 0 on padding. Plus `values` they are the returns that the critic is trained on.
    """
    values = values * mask
    found = torch.zeros_like(rewards)
    following_value = following_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        surprise = rewards[:, t] + gamma * following_value - values[:, t]
        following_advantage = (surprise + gamma * lam * following_advantage) * mask[:, t]
        following_value = values[:, t]
        found[:, t] = following_advantage
    return found


def leave_one_out(scores: torch.Tensor) -> torch.Tensor:
    """REINFORCE leave-one-out, Kool et al. 2019 and Ahmadian et al. 2024 (arXiv:2402.14740), eq. 7.

    Args:
        scores: (P, K) of K answers to each of P prompts, K at least 2.

    Returns:
        (P, K), each score less the mean of the other answers to its prompt.
    """
    count = scores.shape[1]
    return (scores - scores.mean(1, keepdim=True)) * count / (count - 1)


def group_relative(scores: torch.Tensor) -> torch.Tensor:
    """GRPO, Shao et al. 2024 (arXiv:2402.03300), section 4.1.2: scores in standard deviations from their prompt's mean.

    Args:
        scores: (P, K), K at least 2.

    Returns:
        (P, K); 0 for a prompt whose answers all score the same.
    """
    return (scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-4)


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (values * mask).sum() / mask.sum().clamp(min=1)


def masked_variance(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Of the population: divided by the number of tokens."""
    return masked_mean((values - masked_mean(values, mask)) ** 2, mask)


def whiten(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Shift and scale to mean 0 and variance 1 over all tokens; 0 on padding, and where all values are the same."""
    centred = (values - masked_mean(values, mask)) * mask
    return centred * torch.rsqrt(masked_variance(values, mask) + 1e-8)


def policy_loss(
    logps: torch.Tensor, old_logps: torch.Tensor, advantages: torch.Tensor, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clipped surrogate loss of each token: Schulman et al. 2017 (arXiv:1707.06347), eq. 7.

    Args:
        logps: under the policy in training; `old_logps` under the policy that drew the tokens.
        clip: how far the ratio of the probabilities may be from 1 and still earn something.

    Returns:
        loss, and whether clipping took the gradient away, both in the shape given.
    """
    ratio = (logps - old_logps).clamp(max=LARGEST_EXPONENT).exp()
    free, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(free, clipped), clipped > free


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared error of the critic, its step away from the old value limited; as in the code of Schulman et al. 2017.

    Returns:
        loss, and whether clipping took the gradient away.
    """
    near = old_values + (values - old_values).clamp(-clip, clip)
    free, clipped = (values - returns) ** 2, (near - returns) ** 2
    return 0.5 * torch.maximum(free, clipped), clipped > free


def adapted_coefficient(coefficient: float, kl: float, target: float) -> float:
    """The next KL coefficient: Ziegler et al. 2019 (arXiv:1909.08593), section 2.2, with their gain of 0.1.

    Args:
        kl: nats an answer that the last step measured; `target` is what it should be.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + 0.1 * error)


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> float:
    """1 - Var(returns - values) / Var(returns): 1 for a perfect critic, 0 for a constant, below for a harmful one."""
    variance = masked_variance(returns, mask).item()
    return 1 - masked_variance(returns - values, mask).item() / variance if variance > 0 else 0.0

"""The arithmetic of PPO, RLOO and GRPO against numbers worked out by hand and slower, obvious ways."""

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from suwen import policy_gradient as pg


def ragged(rows: int = 6, longest: int = 9, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Random rewards and values with a mask of answers of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (rows,), generator=generator)
    lengths[0] = longest
    mask = (torch.arange(longest)[None] < lengths[:, None]).double()
    rewards, values = (torch.randn(rows, longest, generator=generator, dtype=torch.float64) for _ in range(2))
    return rewards * mask, values, mask


def test_generalised_advantages_worked_out_by_hand():
    # gamma 0.5, lambda 0.5; two tokens: delta_1 = 2 - 4 = -2, delta_0 = 1 + 0.5 * 4 - 2 = 1, A_0 = 1 - 0.25 * 2
    found = pg.advantages(
        torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[2.0, 4.0, 9.0]]), torch.tensor([[1.0, 1.0, 0.0]]), 0.5, 0.5
    )
    assert found.tolist() == [[0.5, -2.0, 0.0]]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (0.97, 1.0)])
def test_generalised_advantages_are_the_double_sum_of_their_definition(gamma, lam):
    rewards, values, mask = ragged()
    expected = torch.zeros_like(rewards)
    for row in range(len(rewards)):
        length = int(mask[row].sum())
        state = [values[row, t].item() for t in range(length)] + [0.0]
        surprises = [rewards[row, t].item() + gamma * state[t + 1] - state[t] for t in range(length)]
        for t in range(length):
            expected[row, t] = sum((gamma * lam) ** (k - t) * surprises[k] for k in range(t, length))
    torch.testing.assert_close(pg.advantages(rewards, values, mask, gamma, lam), expected)


def test_lambda_one_is_reward_to_go_minus_value():
    rewards, values, mask = ragged(seed=1)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(pg.advantages(rewards, values, mask, 1.0, 1.0), (to_go - values) * mask)


def test_what_stands_on_padding_changes_nothing():
    rewards, values, mask = ragged(seed=2)
    other = torch.where(mask.bool(), values, torch.full_like(values, 1e6))
    torch.testing.assert_close(pg.advantages(rewards, other, mask), pg.advantages(rewards, values, mask))
    torch.testing.assert_close(pg.whiten(other, mask), pg.whiten(values, mask))
    assert pg.explained_variance(other, rewards, mask) == pytest.approx(pg.explained_variance(values, rewards, mask))


def test_the_score_is_earned_by_the_last_token_and_each_token_pays_for_its_kl():
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    kl = torch.tensor([[1.0, 2.0, 5.0], [0.0, 0.0, -4.0], [3.0, 3.0, 3.0]])
    found = pg.token_rewards(torch.tensor([10.0, 20.0, 30.0]), kl, mask, 0.5)
    assert found.tolist() == [[-0.5, 9.0, 0.0], [0.0, 0.0, 22.0], [0.0, 0.0, 0.0]]


def test_both_estimators_have_the_true_kl_as_their_mean_and_k3_has_less_variance():
    policy, reference = (
        Categorical(logits=torch.tensor(x).double()) for x in ([0.5, -1.0, 0.3, 0.0], [0.0, 0.2, 0.1, -0.4])
    )
    tokens = torch.arange(4)
    logps, others = policy.log_prob(tokens), reference.log_prob(tokens)
    variances = {}
    for estimator in pg.KL_ESTIMATORS:
        values = pg.kl_estimate(logps, others, estimator)
        mean = (policy.probs * values).sum()
        torch.testing.assert_close(mean, kl_divergence(policy, reference))
        variances[estimator] = (policy.probs * (values - mean) ** 2).sum().item()
    assert (pg.kl_estimate(logps, others, "k3") >= 0).all()
    assert variances["k3"] < variances["k1"]


def test_estimators_worked_out_by_hand_and_finite_far_away():
    logps, others = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    assert pg.kl_estimate(logps, others, "k1").item() == pytest.approx(math.log(2))
    assert pg.kl_estimate(logps, others, "k3").item() == pytest.approx(0.5 - 1 + math.log(2))
    assert pg.kl_estimate(torch.tensor([-500.0]), torch.tensor([0.0]), "k3").isfinite().all()
    with pytest.raises(ValueError, match="k2"):
        pg.kl_estimate(logps, others, "k2")


def test_leaving_one_out_compares_each_answer_with_the_others():
    scores = torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 2.0, 6.0]])
    expected = [[s - (sum(row) - s) / (len(row) - 1) for s in row] for row in scores.tolist()]
    torch.testing.assert_close(pg.leave_one_out(scores), torch.tensor(expected))


def test_a_group_of_the_same_score_teaches_nothing():
    found = pg.group_relative(torch.tensor([[2.0, 2.0, 2.0], [0.0, 1.0, 2.0]]))
    assert found[0].tolist() == [0.0, 0.0, 0.0]
    assert found[1].tolist() == pytest.approx([-1.0, 0.0, 1.0], abs=1e-3)


def test_whitened_values_have_mean_0_and_variance_1_over_all_tokens():
    values, _, mask = ragged(seed=3)
    found = pg.whiten(5 + 3 * values, mask)[mask.bool()]
    assert found.mean().item() == pytest.approx(0, abs=1e-6) and found.var(correction=0).item() == pytest.approx(1)
    assert pg.whiten(torch.full_like(values, 7.0), mask).abs().max() < 1e-6


def test_the_policy_loss_worked_out_by_hand():
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1])
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0])
    loss, clipped = pg.policy_loss(ratio.log(), torch.zeros(5), advantages, 0.2)
    assert loss.tolist() == pytest.approx([-1.2, 1.5, -0.5, 0.8, -2.2])
    assert clipped.tolist() == [True, False, False, True, False]


def test_the_first_gradient_is_that_of_plain_policy_gradient():
    logps = torch.tensor([-1.0, -2.0], requires_grad=True)
    advantages = torch.tensor([0.3, -0.7])
    pg.policy_loss(logps, logps.detach(), advantages, 0.2)[0].sum().backward()
    torch.testing.assert_close(logps.grad, -advantages)


def test_clipped_tokens_get_no_gradient():
    logps = torch.tensor([0.5, -0.5], requires_grad=True)
    loss, clipped = pg.policy_loss(logps, torch.zeros(2), torch.tensor([1.0, -1.0]), 0.2)
    loss.sum().backward()
    assert clipped.all() and logps.grad.tolist() == [0.0, 0.0]


def test_the_value_loss_worked_out_by_hand():
    # the value moved from 0 to 1, at most 0.2 of it counts; returns on either side
    loss, clipped = pg.value_loss(torch.tensor([1.0, 1.0]), torch.zeros(2), torch.tensor([2.0, -1.0]), 0.2)
    assert loss.tolist() == pytest.approx([0.5 * 1.8**2, 0.5 * 4.0]) and clipped.tolist() == [True, False]


def reference_losses(logps, old_logps, values, old_values, rewards, mask, gamma, lam, clip, clip_value):
    """PPO written independently: sums over python floats, losses by cases instead of max and clamp."""
    policy, critic, count = 0.0, 0.0, 0
    for i in range(len(rewards)):
        length = int(mask[i].sum())
        advantage, following = [0.0] * length, 0.0
        for t in range(length - 1, -1, -1):
            value_after = old_values[i][t + 1] if t + 1 < length else 0.0
            following = rewards[i][t] + gamma * value_after - old_values[i][t] + gamma * lam * following
            advantage[t] = following
        for t in range(length):
            count += 1
            ratio = math.exp(logps[i][t] - old_logps[i][t])
            outside = (advantage[t] >= 0 and ratio > 1 + clip) or (advantage[t] < 0 and ratio < 1 - clip)
            bound = 1 + clip if advantage[t] >= 0 else 1 - clip
            policy -= (bound if outside else ratio) * advantage[t]
            target = advantage[t] + old_values[i][t]
            near = min(max(values[i][t], old_values[i][t] - clip_value), old_values[i][t] + clip_value)
            critic += 0.5 * max((values[i][t] - target) ** 2, (near - target) ** 2)
    return policy / count, critic / count


@pytest.mark.parametrize("seed", range(5))
def test_the_losses_are_those_of_an_independent_implementation(seed):
    rewards, old_values, mask = ragged(8, 12, seed)
    generator = torch.Generator().manual_seed(100 + seed)
    old_logps = -torch.rand(mask.shape, generator=generator, dtype=torch.float64) * 3
    logps = old_logps + 0.4 * torch.randn(mask.shape, generator=generator, dtype=torch.float64)
    values = old_values + 0.4 * torch.randn(mask.shape, generator=generator, dtype=torch.float64)
    advantages = pg.advantages(rewards, old_values, mask, 0.98, 0.9)
    policy, clipped = pg.policy_loss(logps, old_logps, advantages, 0.2)
    critic, _ = pg.value_loss(values, old_values, advantages + old_values, 0.2)
    lists = [x.tolist() for x in (logps, old_logps, values, old_values, rewards)]
    expected = reference_losses(*lists, mask, 0.98, 0.9, 0.2, 0.2)
    assert 0 < clipped[mask.bool()].double().mean() < 1
    assert pg.masked_mean(policy, mask).item() == pytest.approx(expected[0])
    assert pg.masked_mean(critic, mask).item() == pytest.approx(expected[1])


def test_the_kl_coefficient_follows_the_kl_by_at_most_two_percent():
    assert pg.adapted_coefficient(1.0, 6.6, 6.0) == pytest.approx(1.01)
    assert pg.adapted_coefficient(1.0, 60.0, 6.0) == pytest.approx(1.02)
    assert pg.adapted_coefficient(1.0, -5.0, 6.0) == pytest.approx(0.98)
    assert pg.adapted_coefficient(0.2, 6.0, 6.0) == 0.2


def test_explained_variance_is_1_for_a_perfect_critic_and_0_for_a_constant():
    returns, _, mask = ragged(seed=5)
    assert pg.explained_variance(returns, returns, mask) == 1
    assert pg.explained_variance(torch.ones_like(returns), returns, mask) == pytest.approx(0)
    assert pg.explained_variance(-returns, returns, mask) == pytest.approx(-3)
    assert pg.explained_variance(returns, torch.ones_like(returns), mask) == 0

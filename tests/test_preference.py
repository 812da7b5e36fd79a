"""Preference losses against numbers worked out by hand."""

import math

import pytest
import torch

from suwen.preference import PairLogps, log_odds, odds_ratio_loss, preference_loss, sum_by_answer


def pair(chosen: float, rejected: float) -> PairLogps:
    return PairLogps(torch.tensor([chosen]), torch.tensor([rejected]))


POLICY, REFERENCE, LENGTHS = pair(-2.0, -7.0), pair(-3.0, -4.0), pair(2.0, 4.0)
# Log ratios: 1 and -3, margin 4; a token: 0.5 and -0.75, margin 1.25


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("loss_type", "smoothing", "expected"),
    [
        ("sigmoid", 0.0, -math.log(sigmoid(0.8))),
        ("sigmoid", 0.1, -0.9 * math.log(sigmoid(0.8)) - 0.1 * math.log(sigmoid(-0.8))),
        ("robust", 0.1, (-0.9 * math.log(sigmoid(0.8)) + 0.1 * math.log(sigmoid(-0.8))) / 0.8),
        ("hinge", 0.0, 0.2),
        ("ipo", 0.0, (1.25 - 2.5) ** 2),
        ("sigmoid_norm", 0.0, -math.log(sigmoid(0.25))),
    ],
)
def test_each_loss_is_its_formula(loss_type, smoothing, expected):
    found = preference_loss(POLICY, REFERENCE, LENGTHS, 0.2, loss_type, smoothing)
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_the_loss_of_the_start_is_ln_2():
    assert preference_loss(POLICY, POLICY, LENGTHS).item() == pytest.approx(math.log(2))


def test_odds_ratio_by_hand():
    mean = pair(math.log(0.8), math.log(0.5))  # odds 4 and 1
    assert log_odds(mean.chosen).item() == pytest.approx(math.log(4), rel=1e-5)
    assert odds_ratio_loss(mean).item() == pytest.approx(-math.log(0.8), rel=1e-5)


def test_the_odds_of_a_certain_answer_are_finite():
    mean = torch.tensor([0.0], requires_grad=True)
    log_odds(mean).sum().backward()
    assert torch.isfinite(log_odds(mean)).all() and torch.isfinite(mean.grad).all()


def test_log_probabilities_are_added_up_by_answer():
    sums, counts = sum_by_answer(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0, 1, 1, 3]), 2)
    assert sums.chosen.tolist() == [1.0, 0.0] and sums.rejected.tolist() == [6.0, 8.0]
    assert counts.chosen.tolist() == [1.0, 0.0] and counts.rejected.tolist() == [2.0, 1.0]

"""ORPO: its loss and steps, against the definition and against TRL; and the alarms of preference training."""

import math
from types import SimpleNamespace

import pytest
import torch
from test_training import padded_tokenizer, pairs, scoring_model, settings, train
from tiny import tiny_model, tiny_tokenizer
from trl.experimental.orpo import ORPOTrainer

from suwen.alarms import PreferenceAlarms, repetition
from suwen.arguments import OddsRatioArguments, PreferenceArguments
from suwen.preference import PairLogps, odds_ratio_loss
from suwen.rows import rows_of_pair
from suwen.trainers import OddsRatioTrainer, PairTrainer

pytestmark = pytest.mark.training


def mean_logps(model, pair: dict) -> PairLogps:
    """Of both answers of a pair, the slow way: each row alone, through the logits."""
    found = []
    for row in rows_of_pair(pair):
        labels = torch.tensor(row["labels"])[1:]
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        found.append(-torch.nn.functional.cross_entropy(logits, labels))
    return PairLogps(*found)


@pytest.mark.parametrize("padding", [False, True])
def test_steps_are_those_of_the_definition(tmp_path, padding):
    data, weight = pairs(6), 0.5
    config = settings(tmp_path, max_steps=3, learning_rate=0.5)
    given = OddsRatioArguments(orpo_lambda=weight)
    trainer = train(OddsRatioTrainer, config, data, settings=given, padding=padding)
    found = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    model = tiny_model(tiny_tokenizer()).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for entry in found:
        nll, losses, ratios, right = 0, 0, 0.0, 0
        for pair in data:
            chosen, rejected = mean_logps(model, pair)
            odds = [p / (1 - p) for p in (chosen.exp(), rejected.exp())]
            ratio = torch.log(odds[0] / odds[1])
            losses = losses - chosen - weight * torch.nn.functional.logsigmoid(ratio)
            nll, ratios, right = nll - chosen.item(), ratios + ratio.item(), right + int(ratio > 0)
        (losses / len(data)).backward()
        assert entry["loss"] == pytest.approx((losses / len(data)).item(), rel=1e-4)
        assert entry["nll"] == pytest.approx(nll / len(data), rel=1e-4)
        assert entry["log_odds_ratio"] == pytest.approx(ratios / len(data), rel=1e-3, abs=1e-4)
        assert entry["accuracy"] == right / len(data)
        optimizer.step()
        optimizer.zero_grad()
    for ours, theirs in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_the_odds_ratio_is_trls():
    mean = PairLogps(torch.tensor([-0.3, -1.2, -4.0]), torch.tensor([-0.9, -0.8, -0.01]))
    theirs = ORPOTrainer.odds_ratio_loss(SimpleNamespace(beta=1.0, accelerator=torch.zeros(())), *mean)
    torch.testing.assert_close(odds_ratio_loss(mean), -theirs[0])


# Alarms


def test_repetition_by_hand():
    assert repetition([1, 2, 3]) == 0 and repetition([1, 2, 3, 4, 5]) == 0
    assert repetition([7] * 7) == pytest.approx(3 / 4)  # four 4-grams, all the same
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)


def dpo_trainer(tmp_path, held_out: bool, **options) -> PairTrainer:
    torch.manual_seed(3)
    config = settings(tmp_path, eval_strategy="steps" if held_out else "no", eval_steps=4, **options)
    trainer = PairTrainer(
        model=scoring_model(), settings=PreferenceArguments(), args=config, train_dataset=pairs(8),
        eval_dataset=pairs(4, seed=1) if held_out else None, processing_class=padded_tokenizer(), max_length=64,
    )  # fmt: skip
    trainer.compute_reference(tmp_path / "cache", "")
    return trainer


def with_alarms(trainer: PairTrainer) -> PreferenceAlarms:
    tokenizer = trainer.processing_class
    alarms = PreferenceAlarms(trainer, SimpleNamespace(tokenizer=tokenizer, stop_token_ids=[tokenizer.eos_token_id]))
    trainer.add_callback(alarms)
    return alarms


@pytest.mark.parametrize("held_out", [True, False])
def test_better_answers_that_become_unlikely_raise_one_alarm(tmp_path, capsys, held_out):
    trainer = dpo_trainer(tmp_path, held_out, max_steps=12, learning_rate=20.0)
    alarms = with_alarms(trainer)
    trainer.train()
    history = [e for e in trainer.state.log_history if f"{'eval_' if held_out else ''}logps/chosen_change" in e]
    lowest = min(e[f"{'eval_' if held_out else ''}logps/chosen_change"] for e in history)
    assert lowest < -0.2, "the rate is there to spoil the model"
    assert len([line for line in alarms.raised if line.startswith("the better answers are becoming unlikely")]) == 1
    assert capsys.readouterr().out.count("alarm: the better answers") == 1


def test_a_gentle_training_raises_no_alarm(tmp_path, capsys):
    trainer = dpo_trainer(tmp_path, True, max_steps=4, learning_rate=0.01)
    alarms = with_alarms(trainer)
    trainer.train()
    assert not alarms.raised and "alarm" not in capsys.readouterr().out
    assert sum("repetition" in entry for entry in trainer.state.log_history) == 2  # of the start, and at step 4


def test_the_change_of_better_answers_is_nats_a_token(tmp_path):
    trainer = dpo_trainer(tmp_path, True, max_steps=1, learning_rate=1.0)
    before = [mean_logps(trainer.model, pair).chosen.item() for pair in trainer.eval_dataset.rows]
    trainer.train()
    after = [mean_logps(trainer.model, pair).chosen.item() for pair in trainer.eval_dataset.rows]
    change = sum(b - a for a, b in zip(before, after, strict=True)) / len(before)
    assert trainer.evaluate()["eval_logps/chosen_change"] == pytest.approx(change, abs=1e-4)


def test_answers_that_begin_to_repeat_themselves_raise_an_alarm(tmp_path, capsys):
    trainer = dpo_trainer(tmp_path, True, max_steps=4, learning_rate=0.0)
    alarms = with_alarms(trainer)
    measured = alarms.measure()
    token = 17  # make the model say one token for ever
    with torch.no_grad():
        trainer.model.lm_head.weight.zero_()
        hidden = trainer.model.model(torch.tensor([alarms.prompts[0]])).last_hidden_state[0]
        trainer.model.lm_head.weight[token] = hidden.mean(0)
    trainer.state.log_history[-1]["repetition"] = min(measured, 0.3)
    trainer.evaluate()
    assert math.isclose(trainer.state.log_history[-1]["repetition"], 60 / 61)
    assert len([line for line in alarms.raised if line.startswith("answers repeat themselves")]) == 1
    assert "answers repeat themselves; step 0: 98%" in capsys.readouterr().out

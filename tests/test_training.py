"""What a training step does: packing, accumulation, precision, the first preference loss, evaluation."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from matplotlib.image import imread
from peft import LoraConfig
from test_checkpoint import flip
from tiny import tiny_model, tiny_tokenizer
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer

from suwen import attention
from suwen.arguments import PreferenceArguments
from suwen.head import add_scoring_head
from suwen.models import load_base
from suwen.nonfinite import MOST_IN_A_ROW, MOST_OVERFLOWS, NonFinite
from suwen.probe import packing_problem
from suwen.records import draw_curves
from suwen.rows import rows_of_pair
from suwen.stage import planned_steps
from suwen.trainers import LanguageModelTrainer, PairTrainer

pytestmark = pytest.mark.training
VOCABULARY = 320  # of the tokenizer's 600


def rows(count: int, seed: int = 0, shortest: int = 6, longest: int = 30) -> Dataset:
    """Rows whose first third is a prompt that is not trained."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(shortest, longest, (1,), generator=generator))
        ids = torch.randint(5, VOCABULARY, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    return Dataset.from_list(made)


def pairs(count: int, seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)

    def ids(shortest: int, longest: int) -> list[int]:
        length = int(torch.randint(shortest, longest, (1,), generator=generator))
        return torch.randint(5, VOCABULARY, (length,), generator=generator).tolist()

    return Dataset.from_list(
        [{"prompt_ids": ids(4, 9), "chosen_ids": ids(3, 9), "rejected_ids": ids(3, 9)} for _ in range(count)]
    )


def settings(folder: Path, **given):
    defaults = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": [],
        "per_device_train_batch_size": 8, "gradient_checkpointing": False, "optim": "sgd", "learning_rate": 0.5,
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 1, "save_strategy": "no",
        "logging_steps": 1, "logging_nan_inf_filter": False,
        "per_device_eval_batch_size": 1, "seed": 1, "disable_tqdm": True,
    }  # fmt: skip
    return TrainingArguments(**defaults | given)


def scoring_model(model=None):
    model = model or tiny_model(tiny_tokenizer())
    add_scoring_head(model)
    model.set_attn_implementation(attention.NAME)
    return model


def train(cls, config, dataset, **options):
    torch.manual_seed(3)
    if cls is PairTrainer:
        options.setdefault("settings", PreferenceArguments())
    trainer = cls(
        model=options.pop("model", None) or scoring_model(),
        args=config,
        train_dataset=dataset,
        eval_dataset=options.pop("eval_dataset", None),
        processing_class=padded_tokenizer(),
        max_length=64,
        **options,
    )
    if cls is PairTrainer:
        trainer.compute_reference(Path(config.output_dir) / "cache", "")
    trainer.train()
    return trainer


def padded_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def weights(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten().double() for p in trainer.model.parameters()])


def assert_same_weights(one, other, tolerance: float = 2e-5) -> None:
    start = torch.cat([p.detach().flatten().double() for p in tiny_model(tiny_tokenizer()).parameters()])
    moved = (weights(one) - start).abs().max()
    assert moved > 100 * tolerance, "the step must move the weights for the comparison to mean anything"
    torch.testing.assert_close(weights(one), weights(other), atol=tolerance, rtol=0)


@pytest.mark.parametrize("other", [{"packing": False}, {"padding": True}], ids=["one by one", "padded"])
def test_packed_rows_give_the_step_of_single_rows(tmp_path, other):
    data = rows(8)
    packed = train(LanguageModelTrainer, settings(tmp_path / "a"), data)
    assert len(packed.train_dataset) < len(data)
    single = train(LanguageModelTrainer, settings(tmp_path / "b"), data, **other)
    assert_same_weights(packed, single)
    assert packed.state.log_history[0]["loss"] == pytest.approx(single.state.log_history[0]["loss"], abs=1e-5)


@pytest.mark.parametrize("cls", [LanguageModelTrainer, PairTrainer])
def test_a_batch_of_four_is_four_accumulated_batches_of_one(tmp_path, cls):
    data, rate = (rows(4), 0.5) if cls is LanguageModelTrainer else (pairs(4), 5.0)
    config = settings(tmp_path / "a", per_device_train_batch_size=4, learning_rate=rate)
    batch = train(cls, config, data, packing=False)
    config = settings(tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=4, learning_rate=rate)
    assert_same_weights(batch, train(cls, config, data, packing=False))


def test_twenty_steps_give_the_losses_of_a_plain_loop(tmp_path):
    data = rows(40, seed=4)
    config = settings(
        tmp_path, max_steps=20, per_device_train_batch_size=1, gradient_accumulation_steps=2, optim="adamw_torch",
        learning_rate=3e-3, max_grad_norm=1.0, train_sampling_strategy="sequential", num_train_epochs=1,
    )  # fmt: skip
    trainer = train(LanguageModelTrainer, config, data, packing=False)
    found = [entry["loss"] for entry in trainer.state.log_history if "grad_norm" in entry]

    model = tiny_model(tiny_tokenizer()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    expected = []
    for step in range(20):
        batch = [data[2 * step], data[2 * step + 1]]
        nll, tokens = torch.zeros(()), 0
        for row in batch:
            labels = torch.tensor(row["labels"])[1:]
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            nll = nll + torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            tokens += int((labels != -100).sum())
        (nll / tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append((nll / tokens).item())
    assert found == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < expected[0]


@pytest.mark.parametrize("lora", [True, False])
def test_first_dpo_loss_is_ln_2(tmp_path, lora):
    options = {"peft_config": LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")} if lora else {}
    trainer = train(PairTrainer, settings(tmp_path), pairs(8), **options)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge", "robust", "sigmoid_norm"])
def test_pairs_take_the_steps_of_trl(tmp_path, loss_type, padding):
    data, smoothing = pairs(6), 0.1 if loss_type == "robust" else 0.0  # TRL has it in no other of these
    given = PreferenceArguments(beta=0.3, loss_type=loss_type, label_smoothing=smoothing)
    rate = {"ipo": 0.02, "sigmoid_norm": 2.0}.get(loss_type, 0.5)
    config = settings(tmp_path / "a", max_steps=3, learning_rate=rate)
    ours = train(PairTrainer, config, data, settings=given, padding=padding)

    class Encoded(DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

    torch.manual_seed(3)
    config = DPOConfig(
        **{k: v for k, v in settings(tmp_path / "b", max_steps=3, learning_rate=rate).to_dict().items()
           if k in ("output_dir", "use_cpu", "bf16", "report_to", "per_device_train_batch_size", "optim",
                    "learning_rate", "lr_scheduler_type", "max_grad_norm", "max_steps", "save_strategy",
                    "logging_steps", "seed", "disable_tqdm")},
        gradient_checkpointing=False, beta=0.3, loss_type=[loss_type], label_smoothing=smoothing, max_length=None,
        precompute_ref_log_probs=True,
    )  # fmt: skip
    theirs = Encoded(
        model=tiny_model(tiny_tokenizer()), args=config, train_dataset=data, processing_class=padded_tokenizer()
    )
    theirs.train()
    losses = [[e["loss"] for e in t.state.log_history if "grad_norm" in e] for t in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-4)
    assert_same_weights(ours, theirs, tolerance=2e-5)


def test_a_pair_packed_with_a_shared_prompt_has_the_log_probabilities_of_two_rows(tmp_path):
    data = pairs(5)
    trainer = train(PairTrainer, settings(tmp_path, learning_rate=0.0), data)
    model = tiny_model(tiny_tokenizer())
    for pair in trainer.train_dataset.rows:
        for row, found in zip(rows_of_pair(pair), pair["reference_logps"], strict=True):
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, :-1]
            expected = -torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            assert found == pytest.approx(expected, abs=1e-4)


def test_the_reference_is_read_from_the_disk_the_second_time(tmp_path, monkeypatch):
    first = train(PairTrainer, settings(tmp_path), pairs(6))
    monkeypatch.setattr(PairTrainer, "reference_logps", lambda *_: pytest.fail("computed again"))
    second = train(PairTrainer, settings(tmp_path), pairs(6))
    assert first.train_dataset.rows["reference_logps"] == second.train_dataset.rows["reference_logps"]
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        train(PairTrainer, settings(tmp_path), pairs(6, seed=1))


@pytest.mark.parametrize("cut", [0, 1, 50, 10_000])
def test_a_damaged_reference_is_named_set_aside_and_computed_again(tmp_path, capfd, cut):
    first = train(PairTrainer, settings(tmp_path, max_steps=1), pairs(4))
    [file] = tmp_path.glob("cache/*.logps")
    content = file.read_bytes()
    if cut:
        os.truncate(file, max(len(content) - cut, 0))
    else:
        flip(file, 8 * (len(content) - 40))  # in a number
    again = train(PairTrainer, settings(tmp_path, max_steps=1), pairs(4))
    assert first.train_dataset.rows["reference_logps"] == again.train_dataset.rows["reference_logps"]
    assert f"{file}: damaged (it does not have its SHA-256), moved to " in capfd.readouterr().err
    assert file.read_bytes() == content and len(list(tmp_path.glob("cache/damaged-*/*.logps"))) == 1


def test_the_reference_is_computed_of_pairs_that_max_steps_reaches_alone(tmp_path, monkeypatch):
    few = {"max_steps": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    part = train(PairTrainer, settings(tmp_path / "a", **few), pairs(40))
    unknown = np.isnan(np.array(part.train_dataset.rows["reference_logps"])).any(axis=1)
    assert len(part.train_dataset) > 4
    assert unknown.sum() == 40 - sum(len(part.train_dataset.packs[at]) for at in part.reached_packs()) > 0
    monkeypatch.setattr(PairTrainer, "reached_packs", lambda trainer: range(len(trainer.train_dataset)))
    whole = train(PairTrainer, settings(tmp_path / "b", **few), pairs(40))
    assert not np.isnan(np.array(whole.train_dataset.rows["reference_logps"])).any()
    assert torch.equal(weights(part), weights(whole))


@pytest.mark.parametrize("other", [{"packing": False}, {"padding": True}])
def test_evaluation_averages_over_tokens(tmp_path, other):
    data = rows(7, seed=5, longest=60)
    config = settings(tmp_path, per_device_eval_batch_size=3)
    trainer = train(LanguageModelTrainer, config, rows(4), eval_dataset=data, **other)
    found = trainer.evaluate()
    nll, tokens, correct = 0.0, 0, 0
    for row in data:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            logits = trainer.model(input_ids=ids).logits[0, :-1]
        kept = labels != -100
        nll += torch.nn.functional.cross_entropy(logits[kept], labels[kept], reduction="sum").item()
        correct += int((logits[kept].argmax(-1) == labels[kept]).sum())
        tokens += int(kept.sum())
    assert found["eval_loss"] == pytest.approx(nll / tokens, rel=1e-5)
    assert found["eval_perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)
    assert found["eval_token_accuracy"] == pytest.approx(correct / tokens)


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_quantised_base_trains_its_adapter_in_float32(tmp_path, quantization):
    tiny_model(tiny_tokenizer()).save_pretrained(tmp_path / "base")
    model = scoring_model(load_base(str(tmp_path / "base"), torch.float32, quantization, torch.float32, "cpu"))
    config = settings(tmp_path / "out", max_steps=3, optim="adamw_torch", learning_rate=1e-2)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    trainer = train(LanguageModelTrainer, config, rows(8), model=model, peft_config=lora)
    trained = {p.dtype for p in trainer.model.parameters() if p.requires_grad}
    assert trained == {torch.float32}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
@pytest.mark.parametrize("width", [128, 96])  # whole blocks of NF4 in a row, and not
def test_an_evaluation_leaves_a_quantised_base_as_it_is(tmp_path, quantization, width):
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes)).save_pretrained(tmp_path)
    model = load_base(str(tmp_path), torch.float32, quantization, torch.float32, "cpu")
    given = torch.randn(1, 8, width, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def step():
        logits = model.train()(inputs_embeds=given).logits
        (gradient,) = torch.autograd.grad(logits.square().mean(), given)
        return logits.detach(), gradient

    before = step()
    with torch.no_grad():
        model.eval()(inputs_embeds=given)
    for found, expected in zip(step(), before, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("pairs", [False, True])
def test_the_probe_finds_a_model_that_mixes_rows(tmp_path, pairs):
    torch.manual_seed(0)
    config = settings(tmp_path)
    assert packing_problem(scoring_model(), VOCABULARY, config, pairs) is None
    plain = tiny_model(tiny_tokenizer())
    add_scoring_head(plain)
    # Restarting positions keep rows apart without our attention, but not the two answers of a pair
    assert (packing_problem(plain, VOCABULARY, config, pairs) is not None) == pairs
    bloom = BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4))
    for parameter in bloom.parameters():  # Bloom's initial weights are so small that nothing moves anything
        parameter.data.normal_(std=0.3)
    add_scoring_head(bloom)
    problem = packing_problem(bloom, VOCABULARY, config, pairs)
    assert problem and "move each other's log-probabilities" in problem


def test_a_model_without_rotary_positions_is_packed_too(tmp_path):
    model = scoring_model(GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2)))
    assert packing_problem(model, VOCABULARY, settings(tmp_path)) is None


def test_planned_steps_are_the_steps_taken(tmp_path):
    config = settings(
        tmp_path, max_steps=-1, num_train_epochs=2, per_device_train_batch_size=1, gradient_accumulation_steps=3
    )
    trainer = train(LanguageModelTrainer, config, rows(20))
    assert planned_steps(trainer) == trainer.state.global_step > 2


def test_tokens_are_counted_once_and_without_padding(tmp_path):
    data = rows(9, seed=3)
    total = sum(len(row["input_ids"]) for row in data)
    for name, other in (("packed", {}), ("padded", {"padding": True})):
        config = settings(tmp_path / name, max_steps=-1, num_train_epochs=2, per_device_train_batch_size=2)
        trainer = train(LanguageModelTrainer, config, data, **other)
        assert trainer.state.num_input_tokens_seen == 2 * total


# Steps that are no number


def noted(watch: NonFinite, loss: float) -> NonFinite:
    watch.note(torch.tensor(loss), {"input_ids": torch.tensor([[7, 8, 9]]), "attention_mask": torch.ones(1, 3)})
    return watch


def test_overflows_are_left_to_the_scaler_of_float16_until_they_never_end(tmp_path):
    watch = NonFinite(padded_tokenizer(), tmp_path)
    for step in range(1, MOST_OVERFLOWS):
        assert not noted(watch, 1.0).found(math.inf, step, True, 1)
    assert not noted(watch, 1.0).found(1.0, step, True, 1)  # a scale was found
    for step in range(1, MOST_OVERFLOWS):
        assert not noted(watch, 1.0).found(math.inf, step, True, 1)
    with pytest.raises(ValueError, match=f"step {MOST_OVERFLOWS}: the gradient overflows float16 at every loss scale"):
        noted(watch, 1.0).found(math.inf, MOST_OVERFLOWS, True, 1)
    assert not list(tmp_path.iterdir()) and watch.skipped == 0
    with pytest.raises(ValueError, match="the gradient is inf"):
        noted(watch, 1.0).found(math.inf, 1, False, 1)


def test_a_loss_that_is_no_number_is_left_out_under_the_scaler_too_and_not_for_ever(tmp_path, capsys):
    watch = NonFinite(padded_tokenizer(), tmp_path)
    watch.choose("skip", deepspeed=False)
    for step in range(1, MOST_IN_A_ROW):
        assert noted(watch, math.nan).found(math.nan, step, True, 1)
        assert not noted(watch, 1.0).found(math.inf, step, True, 1)  # an overflow between them is no good step
    assert watch.counted() == {"skipped_steps": MOST_IN_A_ROW - 1}
    printed = capsys.readouterr().out
    assert printed.count("left out") == MOST_IN_A_ROW - 1 and "finite and used" not in printed
    with pytest.raises(ValueError, match=f"{MOST_IN_A_ROW} steps one after another were left out"):
        noted(watch, math.nan).found(math.nan, step, True, 1)


def test_a_step_is_not_left_out_under_deepspeed(tmp_path):
    watch = NonFinite(padded_tokenizer(), tmp_path)
    with pytest.raises(ValueError, match="--on_nonfinite skip: DeepSpeed takes a step before .*; expected stop"):
        watch.choose("skip", deepspeed=True)
    watch.choose("stop", deepspeed=True)
    assert watch.counted() == {}


def test_float16_counts_as_scaled_where_the_engine_scales_and_not_accelerate(tmp_path):
    trainer = train(LanguageModelTrainer, settings(tmp_path), rows(8))
    assert trainer.accelerator.scaler is None  # as under DeepSpeed
    for fp16 in (True, False):
        trainer.args.fp16 = fp16
        noted(trainer.nonfinite, 1.0)
        if fp16:
            assert trainer._get_grad_norm(trainer.model, grad_norm=math.inf) == math.inf
            continue
        with pytest.raises(ValueError, match="the gradient is inf"):
            trainer._get_grad_norm(trainer.model, grad_norm=math.inf)


def test_a_curve_of_one_point_can_be_seen(tmp_path):
    """A short run logs its first step alone."""
    draw_curves([{"step": 1, "learning_rate": 1e-4}], tmp_path / "curves.png", "run")
    blue = np.abs(imread(tmp_path / "curves.png")[..., :3] - np.array([0x1F, 0x77, 0xB4]) / 255).max(axis=-1) < 0.01
    assert blue.sum() > 9

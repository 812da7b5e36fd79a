"""What a training step does: packing, accumulation, precision, the first preference loss, evaluation."""

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import tiny_model, tiny_tokenizer
from transformers import BloomConfig, BloomForCausalLM
from trl import DPOConfig, SFTConfig

from suwen.models import load_base
from suwen.packing import document_influence, packing_problem
from suwen.stage import planned_steps
from suwen.trainers import LanguageModelTrainer, PreferenceTrainer

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


def settings(cls: type, folder: Path, **given):
    defaults = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": [], "max_length": 64,
        "per_device_train_batch_size": 8, "gradient_checkpointing": False, "optim": "sgd", "learning_rate": 0.5,
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 1, "save_strategy": "no",
        "logging_steps": 1,
        "per_device_eval_batch_size": 1, "seed": 1, "disable_tqdm": True,
    }  # fmt: skip
    return cls(**defaults | given)


def train(cls, config, dataset, tokenizer, **options):
    torch.manual_seed(3)
    trainer = cls(
        model=options.pop("model", None) or tiny_model(tiny_tokenizer()),
        args=config,
        train_dataset=dataset,
        processing_class=tokenizer,
        **options,
    )
    trainer.train()
    return trainer


def weights(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten().double() for p in trainer.model.parameters()])


def assert_same_weights(one, other, tolerance: float = 2e-5) -> None:
    start = torch.cat([p.detach().flatten().double() for p in tiny_model(tiny_tokenizer()).parameters()])
    moved = (weights(one) - start).abs().max()
    assert moved > 100 * tolerance, "the step must move the weights for the comparison to mean anything"
    torch.testing.assert_close(weights(one), weights(other), atol=tolerance, rtol=0)


def test_packed_rows_give_the_step_of_single_rows(tmp_path):
    tokenizer, data = tiny_tokenizer(), rows(8)
    packed = train(LanguageModelTrainer, settings(SFTConfig, tmp_path / "a", packing=True), data, tokenizer)
    assert len(packed.train_dataset) < len(data)
    single = train(LanguageModelTrainer, settings(SFTConfig, tmp_path / "b"), data, tokenizer)
    assert_same_weights(packed, single)
    assert packed.state.log_history[0]["loss"] == pytest.approx(single.state.log_history[0]["loss"], abs=1e-5)


def test_a_batch_of_four_is_four_accumulated_batches_of_one(tmp_path):
    tokenizer, data = tiny_tokenizer(), rows(4)
    batch = train(
        LanguageModelTrainer, settings(SFTConfig, tmp_path / "a", per_device_train_batch_size=4), data, tokenizer
    )
    config = settings(SFTConfig, tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert_same_weights(batch, train(LanguageModelTrainer, config, data, tokenizer))


def test_a_batch_of_four_pairs_is_four_accumulated_pairs(tmp_path):
    tokenizer, data = tiny_tokenizer(), pairs(4)
    common = {"max_length": None, "learning_rate": 5.0, "precompute_ref_log_probs": True}
    batch = train(
        PreferenceTrainer, settings(DPOConfig, tmp_path / "a", per_device_train_batch_size=4, **common), data, tokenizer
    )
    config = settings(DPOConfig, tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=4, **common)
    assert_same_weights(batch, train(PreferenceTrainer, config, data, tokenizer))


@pytest.mark.parametrize("lora", [True, False])
def test_first_dpo_loss_is_ln_2(tmp_path, lora):
    config = settings(DPOConfig, tmp_path, max_length=None, precompute_ref_log_probs=not lora)
    options = {"peft_config": LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")} if lora else {}
    trainer = train(PreferenceTrainer, config, pairs(8), tiny_tokenizer(), **options)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert trainer.ref_model is None, "the reference must not be a second model in memory"


def test_evaluation_averages_over_tokens(tmp_path):
    data = rows(7, seed=5, longest=60)
    trainer = train(
        LanguageModelTrainer,
        settings(SFTConfig, tmp_path, per_device_eval_batch_size=3),
        rows(4),
        tiny_tokenizer(),
        eval_dataset=data,
    )
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


def test_packed_and_padded_evaluation_agree(tmp_path):
    tokenizer, data = tiny_tokenizer(), rows(9, seed=2)
    results = []
    for packing in (True, False):
        config = settings(SFTConfig, tmp_path / str(packing), packing=packing, learning_rate=0.0)
        trainer = train(LanguageModelTrainer, config, rows(4), tokenizer, eval_dataset=data)
        results.append(trainer.evaluate())
    assert results[0]["eval_loss"] == pytest.approx(results[1]["eval_loss"], abs=1e-6)


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_quantised_base_trains_its_adapter_in_float32(tmp_path, quantization):
    tiny_model(tiny_tokenizer()).save_pretrained(tmp_path / "base")
    model = load_base(str(tmp_path / "base"), torch.float32, quantization, torch.float32, "cpu")
    config = settings(SFTConfig, tmp_path / "out", packing=True, max_steps=3, optim="adamw_torch", learning_rate=1e-2)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    trainer = train(LanguageModelTrainer, config, rows(8), tiny_tokenizer(), model=model, peft_config=lora)
    trained = {p.dtype for p in trainer.model.parameters() if p.requires_grad}
    assert trained == {torch.float32}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_the_probe_finds_a_model_that_mixes_documents(tmp_path):
    torch.manual_seed(0)
    assert document_influence(tiny_model(tiny_tokenizer()), VOCABULARY) == 0.0
    bloom = BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4))
    for parameter in bloom.parameters():  # Bloom's initial weights are so small that nothing moves anything
        parameter.data.normal_(std=0.3)
    problem = packing_problem(bloom, VOCABULARY, settings(SFTConfig, tmp_path))
    assert problem and "moves the next one's logits" in problem


def test_planned_steps_are_the_steps_taken(tmp_path):
    config = settings(
        SFTConfig,
        tmp_path,
        packing=True,
        max_steps=-1,
        num_train_epochs=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=3,
    )
    torch.manual_seed(3)
    trainer = LanguageModelTrainer(
        model=tiny_model(tiny_tokenizer()), args=config, train_dataset=rows(20), processing_class=tiny_tokenizer()
    )
    planned = planned_steps(trainer)
    trainer.train()
    assert trainer.state.global_step == planned

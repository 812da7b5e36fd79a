"""The same command gives the same result, and a resumed run the bits of an uninterrupted one."""

import shutil
from pathlib import Path

import pytest
import trials

from suwen.checkpoint import list_checkpoints, named_step

pytestmark = pytest.mark.training
LORA = ("--use_peft", "True", "--lora_dropout", "0.1")
SHORT, LONG = (), pytest.mark.slow
CASES = [
    ("pt", ("--num_train_epochs", "3"), SHORT),
    ("sft", (*LORA, "--num_train_epochs", "3"), SHORT),
    ("dpo", LORA, SHORT),
    ("orpo", (), SHORT),
    ("rm", LORA, SHORT),
    ("ppo", LORA, SHORT),
    ("pt", LORA, LONG),
    ("pt", ("--bf16", "True"), LONG),
    ("sft", ("--bf16", "True", *LORA), LONG),
    ("dpo", ("--bf16", "True", *LORA), LONG),
    ("ppo", ("--bf16", "True", *LORA), LONG),
    ("sft", ("--pure_bf16", "True", "--bf16", "True"), LONG),
    ("sft", ("--quantization", "4bit", *LORA), LONG),
    ("dpo", ("--quantization", "8bit", *LORA), LONG),
    ("sft", ("--packing", "False", "--per_device_train_batch_size", "2"), LONG),
    ("sft", ("--neftune_noise_alpha", "5", "--gradient_accumulation_steps", "3"), LONG),
    ("sft", ("--train_sampling_strategy", "sequential", "--lr_scheduler_type", "linear"), LONG),
    ("sft", ("--dataloader_num_workers", "1"), LONG),
    ("sft", ("--logging_steps", "2"), LONG),  # a checkpoint in the middle of what a log line is made of
    ("sft", ("--modules_to_save", "lm_head", *LORA), LONG),
    ("sft", ("--gradient_checkpointing", "True", *LORA), LONG),
    ("sft", ("--optim", "adafactor"), LONG),
    ("sft", ("--validation_split_fraction", "0.2", "--eval_steps", "2", *LORA), LONG),
    ("dpo", ("--loss_type", "ipo"), LONG),
    ("orpo", LORA, LONG),
    ("rm", (), LONG),
    ("ppo", (), LONG),
    ("ppo", ("--algorithm", "grpo", *LORA), LONG),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return trials.build_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize(
    ("stage", "flags"),
    [pytest.param(s, f, marks=m, id=" ".join((s, *f)).replace("--", "")) for s, f, m in CASES],
)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(stage, flags, base, tmp_path, ledger):
    data = trials.write_rows(tmp_path / "rows.jsonl", stage)
    steps = "5"
    flags = ("--max_steps", steps, "--save_steps", "3", *flags)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    ledger.inject("stop and resume, bit for bit")
    trials.run(stage, trials.words(stage, base, data, whole, *flags))
    resumed.mkdir()
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    trials.run(stage, trials.words(stage, base, data, resumed, *flags))
    assert trials.weights_sha256(resumed) == trials.weights_sha256(whole)
    last = last_checkpoint(whole)
    assert trials.history(resumed / last) == trials.history(whole / last)
    assert training_of(resumed) == training_of(whole)
    ledger.add("stop and resume, bit for bit")


@pytest.mark.parametrize("flags", [(), pytest.param(LORA, marks=LONG)], ids=["full", "lora"])
def test_the_best_checkpoint_is_kept_and_its_weights_are_the_result(flags, base, tmp_path):
    data = trials.write_rows(tmp_path / "rows.jsonl", "sft")
    flags = (*flags, "--max_steps", "6", "--eval_steps", "2", "--save_steps", "2", "--save_total_limit", "2")
    flags += ("--validation_split_fraction", "0.2", "--load_best_model_at_end", "True")
    flags += ("--metric_for_best_model", "token_accuracy", "--greater_is_better", "False")  # an early one is best then
    output = tmp_path / "out"
    trials.run("sft", trials.words("sft", base, data, output, *flags))
    best, *_, last = found = list_checkpoints(output)
    assert [named_step(path) for path in found] == [2, 4, 6], "the best one, and two others"
    assert trials.weights_sha256(output) == trials.weights_sha256(best) != trials.weights_sha256(last)


def last_checkpoint(output: Path) -> str:
    return max(output.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1])).name


def training_of(output: Path) -> dict:
    import json

    training = json.loads((output / "run.json").read_text(encoding="utf-8"))["training"]
    return {name: training[name] for name in ("steps", "loss", "tokens")}


@pytest.mark.slow
@pytest.mark.parametrize("stage", list(trials.SCRIPTS))
def test_the_same_command_gives_the_same_result_in_another_process(stage, base, tmp_path):
    data = trials.write_rows(tmp_path / "rows.jsonl", stage)
    hashes = set()
    for name in ("one", "two"):
        started = trials.Started(
            stage, trials.words(stage, base, data, tmp_path / name, "--max_steps", "3"), tmp_path / name
        )
        assert started.wait() == 0, started.text()[-2000:]
        hashes.add(trials.weights_sha256(tmp_path / name))
    assert len(hashes) == 1

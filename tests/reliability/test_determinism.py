"""The same command gives the same result, and a resumed run the bits of an uninterrupted one."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import trials

from suwen.checkpoint import Saves, list_checkpoints, named_step
from suwen.lineage import read_json
from suwen.manifest import find_damage

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
    record, evaluated = read_json(output / "run.json"), [e for e in trials.history(last) if "eval_loss" in e]
    assert record["evaluation"]["eval_loss"] == evaluated[0]["eval_loss"] != evaluated[-1]["eval_loss"]
    assert record["evaluation"]["step"] == 2


BEST = ("--load_best_model_at_end", "True", "--metric_for_best_model", "token_accuracy", "--greater_is_better", "False")
BEST += ("--max_steps", "6", "--eval_steps", "2", "--save_steps", "2", "--validation_split_fraction", "0.2", *LORA)


def test_a_signal_leaves_the_newest_checkpoint_beside_the_best_where_one_is_kept(base, tmp_path, monkeypatch):
    data, output = trials.write_rows(tmp_path / "rows.jsonl", "sft"), tmp_path / "out"
    command = trials.words("sft", base, data, output, *BEST, "--save_total_limit", "1")
    save = Saves.save

    def signalled(saves, step, *args, **options):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)  # noticed after the next step
        save(saves, step, *args, **options)

    monkeypatch.setattr(Saves, "save", signalled)
    with pytest.raises(SystemExit) as end:
        trials.run("sft", command)
    assert end.value.code == 143
    assert [(named_step(path), find_damage(path)) for path in list_checkpoints(output)] == [(2, None), (3, None)]
    monkeypatch.undo()
    trials.run("sft", command)
    record = read_json(output / "run.json")
    assert record["training"]["resumed_from"].endswith("checkpoint-3")
    assert record["training"]["weights_of"] == "checkpoint-2, the best evaluation"
    assert [named_step(path) for path in list_checkpoints(output)] == [2, 6]


@pytest.mark.parametrize("lost", [False, True], ids=["damaged", "gone"])
def test_a_best_checkpoint_that_is_not_whole_is_not_the_result(lost, base, tmp_path, monkeypatch, capsys):
    data, output = trials.write_rows(tmp_path / "rows.jsonl", "sft"), tmp_path / "out"
    save = Saves.save

    def damaging(saves, step, *args, **options):
        save(saves, step, *args, **options)
        saves.finish()
        if step == 4:
            weights = output / "checkpoint-2" / "adapter_model.safetensors"
            content = weights.read_bytes()
            shutil.rmtree(weights.parent) if lost else weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    monkeypatch.setattr(Saves, "save", damaging)
    trials.run("sft", trials.words("sft", base, data, output, *BEST))
    what = "there is no such folder" if lost else "adapter_model.safetensors does not have its SHA-256"
    expected = f"the last step, as the best checkpoint (checkpoint-2) cannot be used: {what}"
    record = read_json(output / "run.json")
    assert record["finished"] and record["training"]["weights_of"] == expected
    assert f"the weights are those of {expected}" in capsys.readouterr().out
    assert trials.weights_sha256(output) == trials.weights_sha256(output / "checkpoint-6")


def test_a_metric_that_is_not_measured_is_one_line(base, tmp_path):
    data = trials.write_rows(tmp_path / "rows.jsonl", "sft")
    flags = ("--max_steps", "2", "--eval_steps", "1", "--save_steps", "1", "--validation_split_fraction", "0.2")
    flags += ("--metric_for_best_model", "bleu")
    with pytest.raises(ValueError, match=r"^--metric_for_best_model: found bleu, expected one of .*token_accuracy"):
        trials.run("sft", trials.words("sft", base, data, tmp_path / "out", *flags))


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

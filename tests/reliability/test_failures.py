"""Losses that are no number, memory that is too small, a peer that is gone: one line that says what to do."""

import json
import math
from pathlib import Path

import pytest
import torch
import trials
from processes import run_ranks
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig

from suwen.checkpoint import list_checkpoints
from suwen.entry import stage_main
from suwen.memory import Outlook, Setting, shape_of
from suwen.nonfinite import ROWS_FILE

pytestmark = pytest.mark.training
LORA = ("--use_peft", "True", "--max_steps", "6", "--save_steps", "1")


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory) -> str:
    """A base for which the token of "@" is no number."""
    folder = tmp_path_factory.mktemp("base")
    trials.build_base(folder)
    [token] = AutoTokenizer.from_pretrained(folder).encode("@", add_special_tokens=False)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = math.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def rows_with(folder: Path, numbers: set[int], stage: str = "sft") -> str:
    file = Path(trials.write_rows(folder / "rows.jsonl", stage))
    lines = file.read_text(encoding="utf-8").splitlines()
    marked = [x.replace("应当怎么办", "@怎么办") if n in numbers else x for n, x in enumerate(lines)]
    file.write_text("\n".join(marked) + "\n", encoding="utf-8")
    return str(file)


def test_a_loss_that_is_no_number_stops_the_run_and_names_its_rows(poisoned, tmp_path, ledger):
    ledger.inject("loss is NaN: stop")
    output = tmp_path / "out"
    command = trials.words("sft", poisoned, rows_with(tmp_path, {7}), output, *LORA, "--num_train_epochs", "1")
    command = [word for word in command if word not in ("--max_steps", "6")]
    with pytest.raises(
        ValueError, match="step \\d+: the loss is nan; rows of the batch: .*--on_nonfinite skip"
    ) as error:
        trials.run("sft", command)
    assert "\n" not in str(error.value)
    rows = [json.loads(line) for line in (output / ROWS_FILE).read_text(encoding="utf-8").splitlines()]
    assert any("7号病人" in row["text"] and "@怎么办" in row["text"] for row in rows) and len(rows) <= 2
    step = rows[0]["step"]
    assert [path.name for path in list_checkpoints(output)][-1:] == [f"checkpoint-{step - 1}"] * (step > 1)
    assert not list(output.glob("*model.safetensors"))
    ledger.add("loss is NaN: stop", lost_steps=0)


def test_a_step_that_is_no_number_can_be_left_out(poisoned, tmp_path, ledger, capsys):
    ledger.inject("loss is NaN: skip")
    output = tmp_path / "out"
    command = trials.words("sft", poisoned, rows_with(tmp_path, {7}), output, *LORA, "--on_nonfinite", "skip")
    command = [word for word in command if word not in ("--max_steps", "6")] + ["--num_train_epochs", "2"]
    trials.run("sft", command)
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert record["finished"] and record["training"]["skipped_steps"] == 2, "once in each epoch"
    assert math.isfinite(record["training"]["loss"])
    assert capsys.readouterr().out.count("left out") == 2
    assert all(tensor.isfinite().all() for tensor in load_file(output / "adapter_model.safetensors").values())
    ledger.add("loss is NaN: skip")


def test_a_pair_that_is_no_number_is_named_and_can_be_left_out(poisoned, tmp_path, capsys):
    output = tmp_path / "out"
    command = trials.words("dpo", poisoned, rows_with(tmp_path, {7}, "dpo"), output, *LORA, "--packing", "False")
    command = [word for word in command if word not in ("--max_steps", "6")] + ["--num_train_epochs", "1"]
    with pytest.raises(ValueError, match="step \\d+: the loss is nan; rows of the batch: .*7号病人"):
        trials.run("dpo", command)
    rows = [json.loads(line) for line in (output / ROWS_FILE).read_text(encoding="utf-8").splitlines()]
    assert [("@" in row["text"], "第7号" in row["text"]) for row in rows][:1] == [(True, True)] and len(rows) <= 2
    trials.run("dpo", [*command, "--on_nonfinite", "skip", "--resume", "never"])
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert record["finished"] and record["training"]["skipped_steps"] == 1
    assert math.isfinite(record["training"]["loss"])
    assert all(tensor.isfinite().all() for tensor in load_file(output / "adapter_model.safetensors").values())


@pytest.mark.distributed
def test_of_two_ranks_both_leave_the_step_out_and_the_rows_of_the_guilty_one_are_named(poisoned, tmp_path):
    output = tmp_path / "out"
    flags = ["--on_nonfinite", "skip", "--packing", "False", "--gradient_accumulation_steps", "1"]
    command = trials.words("sft", poisoned, rows_with(tmp_path, {7}), output, *LORA, *flags)
    command = [word for word in command if word not in ("--max_steps", "6")] + ["--num_train_epochs", "1"]
    first, _ = run_ranks("sft", command, output, "ddp")
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert record["finished"] and record["training"]["skipped_steps"] == 1 and first.count("left out") == 1
    [row] = [json.loads(line) for line in (output / ROWS_FILE).read_text(encoding="utf-8").splitlines()]
    assert "@" in row["text"] and "7号病人" in row["text"]
    assert all(tensor.isfinite().all() for tensor in load_file(output / "adapter_model.safetensors").values())


def test_where_every_step_is_no_number_nothing_moves_and_the_run_ends(poisoned, tmp_path):
    output = tmp_path / "out"
    data = rows_with(tmp_path, set(range(24)))
    flags = [*LORA, "--on_nonfinite", "skip", "--max_steps", "12", "--weight_decay", "0.1"]
    with pytest.raises(ValueError, match="10 steps one after another were left out"):
        trials.run("sft", trials.words("sft", poisoned, data, output, *flags))
    first, last = (load_file(output / f"checkpoint-{n}" / "adapter_model.safetensors") for n in (7, 9))
    assert all(torch.equal(tensor, last[name]) for name, tensor in first.items())


def test_a_held_out_loss_that_is_no_number_stops_the_run_before_its_checkpoint(poisoned, tmp_path, ledger):
    ledger.inject("held-out loss is NaN")
    output, held = tmp_path / "out", tmp_path / "held"
    held.mkdir()
    flags = [*LORA, "--validation_file_dir", rows_with(held, {3}), "--eval_strategy", "steps", "--eval_steps", "2"]
    with pytest.raises(ValueError, match="step 2: the held-out loss is nan; lower --learning_rate"):
        trials.run("sft", trials.words("sft", poisoned, rows_with(tmp_path, set()), output, *flags))
    assert [path.name for path in list_checkpoints(output)] == ["checkpoint-1"]
    ledger.add("held-out loss is NaN", lost_steps=1)


def test_weights_that_are_no_number_are_not_saved_even_where_the_loss_is_one(poisoned, tmp_path, ledger):
    ledger.inject("weights are NaN")
    output = tmp_path / "out"
    command = trials.words("sft", poisoned, rows_with(tmp_path, set()), output, "--max_steps", "4", "--save_steps", "1")
    with pytest.raises(ValueError, match="^model.embed_tokens.weight: holds NaN or infinity and is not saved; lower"):
        trials.run("sft", command)
    assert not list_checkpoints(output) and not list(output.glob("*.safetensors"))
    ledger.add("weights are NaN")


TINY = LlamaConfig(vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
SETTING = Setting(precision="fp32", gradient_checkpointing=False, batch=4, device="cpu")
OUTLOOK = Outlook(shape_of(TINY), SETTING, 1e9, "of main memory")


def test_memory_that_is_too_small_is_answered_by_the_planner(tmp_path, ledger):
    ledger.inject("out of memory")
    with pytest.raises(ValueError, match="out of memory; planned .* of 1.00 GB of main memory") as error:
        stage_of(lambda: torch.empty(1 << 60), tmp_path, OUTLOOK)
    assert "--gradient_checkpointing True needs" in str(error.value) and "\n" not in str(error.value)
    ledger.add("out of memory")


def test_a_loss_scale_of_deepspeed_that_cannot_fall_further_is_one_line(tmp_path):
    scalers = pytest.importorskip("deepspeed.runtime.fp16.loss_scaler")
    scaler = scalers.DynamicLossScaler(1, 1000, min_scale=1, delayed_shift=1, consecutive_hysteresis=False)
    with pytest.raises(ValueError, match="^the gradient overflows float16 at every loss scale; lower --learning_rate"):
        stage_of(lambda: scaler.update_scale(True), tmp_path, OUTLOOK)
    with pytest.raises(KeyError):
        stage_of(lambda: {}["timeout"], tmp_path, OUTLOOK)


def test_other_failures_keep_their_traceback(tmp_path):
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        stage_of(lambda: torch.ones(2, 3) @ torch.ones(2, 3), tmp_path, OUTLOOK)


def test_memory_that_is_too_small_before_there_is_a_plan_is_answered_too(tmp_path):
    with pytest.raises(ValueError, match="out of memory; lower --per_device_train_batch_size or --max_length"):
        stage_of(lambda: torch.empty(1 << 60), tmp_path)


def test_a_lost_peer_is_told_wherever_it_is_missed(tmp_path):
    def fail() -> None:
        raise torch.distributed.DistNetworkError("recvValue failed")

    with pytest.raises(ValueError, match="another process of this run has ended .*; there is no checkpoint yet"):
        stage_of(fail, tmp_path)


def test_a_disk_that_is_full_is_told_wherever_it_is_met(tmp_path):
    def write() -> None:
        with open("/dev/full", "w") as file:
            file.write("x")

    with pytest.raises(ValueError, match="could not be written or read .No space left on device.; there is no check"):
        stage_of(write, tmp_path)
    with pytest.raises(FileNotFoundError):
        stage_of(lambda: open(tmp_path / "nowhere"), tmp_path)


def stage_of(work, output: Path, outlook: Outlook | None = None) -> None:
    """A stage that does this alone."""

    @stage_main("sft", "", {})
    def main(args) -> None:
        args.outlook = outlook
        work()

    main(["--output_dir", str(output)])

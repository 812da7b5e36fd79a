"""More processes, the same model: losses and weights agree over engines, and checkpoints over numbers of processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from processes import run_ranks
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import supervised_finetuning
from suwen.manifest import MANIFEST, publish, read_manifest
from suwen.packing import Packs
from suwen.rescale import engine_of, fit_processes
from suwen.trainers import row_lengths
from template import TEMPLATES

ROOT = Path(__file__).parents[1]
# Plain gradient steps: Adam would turn rounding differences of tiny gradients into whole steps
SAME = ["--optim", "sgd", "--learning_rate", "0.1", "--warmup_steps", "0", "--max_grad_norm", "0", "--packing", "False"]
SAME += ["--train_sampling_strategy", "random", "--logging_steps", "1", "--eval_strategy", "no", "--use_peft", "False"]
SAME += ["--gradient_accumulation_steps", "2", "--report_to", "none"]
SAME += "--lora_rank 16 --lora_alpha 32 --lora_dropout 0.05".split()  # of run_sft.sh: a run is known by them too


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny_tokenizer(special_tokens=["<|im_start|>", "<|im_end|>"], chat_template=TEMPLATES["chatml"].jinja)
    tokenizer.save_pretrained(folder)
    tiny_model(tokenizer).save_pretrained(folder)
    rows = [
        {"instruction": f"第{i}位患者问：血压高怎么办？", "output": f"建议第{i}位" + "多休息，" * (i % 5) + "就医。"}
        for i in range(34)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return folder


LORA, TIED = ("--use_peft", "True"), ("tied",)


@pytest.fixture(scope="module")
def tied(base, tmp_path_factory) -> Path:
    """The same base with one matrix for embedding and head."""
    folder = tmp_path_factory.mktemp("tied")
    shutil.copytree(base, folder, dirs_exist_ok=True)
    model = tiny_model(AutoTokenizer.from_pretrained(folder))
    config = LlamaConfig.from_dict(model.config.to_dict() | {"tie_word_embeddings": True})
    LlamaForCausalLM(config).save_pretrained(folder)
    assert "lm_head.weight" not in weights(folder)
    return folder


def words_for(base: Path, output: Path, *more: str) -> list[str]:
    words = [
        "--model_name_or_path",
        str(base),
        "--train_file_dir",
        str(base / "rows.jsonl"),
        "--output_dir",
        str(output),
    ]
    # float32: without a GPU DeepSpeed has nothing else, and one process alone would take bfloat16 where it is fast
    return [*words, "--cache_dir", str(base / "cache"), "--max_length", "128", "--bf16", "False", *SAME, *more]


def train_alone(base: Path, output: Path, *more: str) -> None:
    supervised_finetuning.main(words_for(base, output, "--per_device_train_batch_size", "4", *more))


def launch(base: Path, output: Path, config: str, *more: str) -> subprocess.CompletedProcess:
    """Two processes by the launcher, as the user starts them."""
    variables = {
        "PYTHON": sys.executable,
        "SETUP": "skip",
        "CONFIG": config,
        "NUM_PROCESSES": "2",
        "OUTPUT": str(output),
    }
    variables |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    words = words_for(base, output, "--per_device_train_batch_size", "2", *more)
    command = ["sh", str(ROOT / "run_sft.sh"), *words]
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=400, cwd=base)


def train_two(base: Path, output: Path, config: str, *more: str) -> str:
    """The same two processes without the launcher; what the first of them says."""
    return run_ranks("sft", words_for(base, output, "--per_device_train_batch_size", "2", *more), output, config)[0]


def losses(output: Path) -> list[float]:
    state = max(output.glob("checkpoint-*/trainer_state.json"), key=lambda file: int(file.parent.name[11:]))
    return [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    [file] = folder.glob("*model.safetensors")
    return load_file(file)


def apart(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    assert one.keys() == two.keys()
    return max((one[name].float() - two[name].float()).abs().max().item() for name in one)


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("alone")
    train_alone(base, output, "--max_steps", "3")
    return output


def require_same_run(output: Path, alone: Path, base: Path) -> None:
    assert losses(output) == pytest.approx(losses(alone), rel=1e-4)
    assert len(losses(alone)) == 3
    assert apart(weights(alone), weights(output)) < 1e-3 * moved(alone, base)


def moved(output: Path, base: Path) -> float:
    """How far training has taken the weights."""
    found = apart(weights(output), {name: value for name, value in weights(base).items() if name in weights(output)})
    assert found > 1e-3
    return found


@pytest.mark.training
@pytest.mark.distributed
def test_two_processes_of_the_launcher_have_the_losses_and_weights_of_one(base, alone, tmp_path):
    result = launch(base, tmp_path, "ddp", "--max_steps", "3")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    require_same_run(tmp_path, alone, base)


def tell_timeout(output: Path) -> None:
    begin = torch.distributed.init_process_group

    def begin_and_tell(*args, **kwargs):
        begin(*args, **kwargs)
        group = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
        print("ranks wait for", group.options._timeout)

    torch.distributed.init_process_group = begin_and_tell


@pytest.mark.training
@pytest.mark.distributed
@pytest.mark.parametrize("config", ["ddp", "zero2"])
def test_ranks_wait_for_the_main_process_as_long_as_they_are_told(config, base, tmp_path):
    for flags, expected in (((), "6:00:00"), (("--ddp_timeout", "4000"), "1:06:40")):
        output = tmp_path / str(len(flags))
        words = words_for(base, output, "--max_steps", "1", *flags)
        for text in run_ranks("sft", words, output, config, before=tell_timeout):
            assert text.count("ranks wait for") == 1 and f"ranks wait for {expected}" in text


@pytest.mark.training
@pytest.mark.distributed
@pytest.mark.parametrize("config", ["zero1", "zero2", "zero3", "fsdp2"])
def test_two_processes_of_every_engine_have_the_losses_and_weights_of_one(config, base, alone, tmp_path):
    train_two(base, tmp_path / "out", config, "--max_steps", "3")
    require_same_run(tmp_path / "out", alone, base)
    files = {path.name for path in (tmp_path / "out" / "checkpoint-3").iterdir()}
    assert engine_of(tmp_path / "out" / "checkpoint-3") == ("fsdp" if config == "fsdp2" else "deepspeed")
    assert "pytorch_model_fsdp.bin" not in files, "weights are safetensors"


@pytest.mark.slow
@pytest.mark.training
@pytest.mark.distributed
@pytest.mark.parametrize("config", ["zero2_offload", "zero3_offload"])
def test_state_in_the_hosts_memory_takes_the_steps_of_one_process(config, base, tmp_path):
    # Adam with numbers that do not blow up the rounding of tiny gradients: DeepSpeed's own, compiled for the host
    adam = ["--optim", "adamw_torch", "--adam_epsilon", "1e-3", "--learning_rate", "1e-2", "--max_steps", "3"]
    train_alone(base, tmp_path / "alone", *adam)
    train_two(base, tmp_path / "out", config, *adam)
    require_same_run(tmp_path / "out", tmp_path / "alone", base)


@pytest.mark.training
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("config", "quantization"),
    [
        ("fsdp2", "4bit"),
        *(
            pytest.param(config, kind, marks=pytest.mark.slow)
            for config in ("ddp", "zero2")
            for kind in ("8bit", "2bit")
        ),
    ],
)
def test_an_adapter_on_a_quantised_base_has_the_losses_of_one_process(config, quantization, base, tmp_path):
    flags = ["--max_steps", "3", *LORA, "--quantization", quantization, "--lora_dropout", "0"]
    train_alone(base, tmp_path / "one", *flags)
    train_two(base, tmp_path / "two", config, *flags)
    assert losses(tmp_path / "two") == pytest.approx(
        losses(tmp_path / "one"), rel=1e-3 if quantization == "8bit" else 1e-4
    )
    assert len(losses(tmp_path / "one")) == 3 and apart(weights(tmp_path / "one"), weights(tmp_path / "two")) < 1e-3


@pytest.mark.training
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ("zero2", ()),
        ("fsdp2", ()),
        *(pytest.param("fsdp2", kind, marks=pytest.mark.slow) for kind in (LORA, TIED)),
        *(pytest.param(*more, marks=pytest.mark.slow) for more in (("zero3", LORA), ("zero2", TIED), ("zero3", TIED))),
    ],
    ids=["zero2", "fsdp2", "fsdp2, LoRA", "fsdp2, tied", "zero3, LoRA", "zero2, tied", "zero3, tied"],
)
def test_a_resumed_run_of_two_processes_has_the_bits_of_an_uninterrupted_one(config, kind, base, tied, tmp_path):
    base = tied if kind == TIED else base
    flags = ["--max_steps", "3", "--save_steps", "2", "--optim", "adamw_torch", "--learning_rate", "1e-3"]
    flags += ["--max_grad_norm", "1", *(LORA if kind == LORA else ())]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train_two(base, whole, config, *flags)
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    text = train_two(base, resumed, config, *flags)
    assert "going on from" in text
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 3
    assert apart(weights(resumed), weights(whole)) == 0


@pytest.mark.slow
@pytest.mark.training
@pytest.mark.distributed
def test_an_engine_that_does_not_take_up_the_adapter_of_a_checkpoint_is_found(base, tmp_path):
    flags = ["--max_steps", "2", "--save_steps", "1", *LORA]
    train_two(base, tmp_path / "whole", "zero3", *flags)
    folder, resumed = tmp_path / "whole" / "checkpoint-1", tmp_path / "resumed"
    tensors = load_file(folder / "adapter_model.safetensors")  # says other than the engine's own files
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    about = {name: value for name, value in read_manifest(folder).items() if name != "files"}
    (folder / MANIFEST).unlink()
    resumed.mkdir()
    publish(folder, resumed / "checkpoint-1", about)
    with pytest.raises(AssertionError, match="was not taken up as it was saved .*--resume never starts anew"):
        train_two(base, resumed, "zero3", *flags)


@pytest.mark.training
@pytest.mark.distributed
def test_a_checkpoint_of_two_processes_goes_on_with_one_and_the_other_way_round(base, alone, tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    flags = ("--max_steps", "3", "--save_steps", "2")
    train_two(base, tmp_path / "of_two", "ddp", *flags)
    shutil.copytree(tmp_path / "of_two" / "checkpoint-2", two / "checkpoint-2")
    train_alone(base, tmp_path / "of_one", *flags)
    shutil.copytree(tmp_path / "of_one" / "checkpoint-2", one / "checkpoint-2")
    train_alone(base, two, *flags)
    train_two(base, one, "ddp", *flags)
    for folder in (two, one):
        record = json.loads((folder / "run.json").read_text())
        assert record["training"]["resumed_from"].endswith("checkpoint-2")
        assert apart(weights(folder), weights(alone)) < 1e-3 * moved(alone, base)


def test_another_number_of_processes_is_refused_with_the_way_out(tmp_path):
    two = {"world_size": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-4}
    whole = tmp_path / "checkpoint-1"
    whole.mkdir()
    one = two | {"world_size": 1, "per_device_train_batch_size": 8}
    assert fit_processes(whole, two, one, "none") == one
    assert fit_processes(whole, one, two, "none") == two
    assert fit_processes(whole, two, two | {"learning_rate": 1}, "none") == two  # compared by the caller
    with pytest.raises(
        ValueError, match="took 8 sequences at once, 1 would take 4; go on with --per_device_train_b.* 8"
    ):
        fit_processes(whole, two, two | {"world_size": 1}, "none")
    with pytest.raises(
        ValueError, match="2 processes took 8 sequences at once, 3 would take 12; go on with 2 processes"
    ):
        fit_processes(whole, two, two | {"world_size": 3}, "none")
    fsdp = tmp_path / "checkpoint-3"
    fsdp.mkdir()
    (fsdp / "optimizer.bin").touch()
    parts = tmp_path / "checkpoint-2"
    (parts / "global_step2").mkdir(parents=True)
    assert engine_of(parts) == "deepspeed"
    assert fit_processes(parts, two, two, "deepspeed") == two
    with pytest.raises(
        ValueError, match="holds parts of 2 processes, which DeepSpeed cannot spread over 1; go on with 2"
    ):
        fit_processes(parts, two, one, "deepspeed")
    assert fit_processes(fsdp, two, one, "fsdp") == one
    with pytest.raises(ValueError, match="written by DeepSpeed, this run uses no engine .*same CONFIG"):
        fit_processes(parts, two, one, "none")


# Large data


def test_lengths_are_read_from_the_offsets_also_of_chosen_and_many_batches():
    made = [{"input_ids": [1] * (i % 7), "chosen_ids": [2] * (i % 3)} for i in range(25_000)]
    rows = Dataset.from_list(made)
    expected = [i % 7 + i % 3 for i in range(25_000)]
    assert row_lengths(rows, ("input_ids", "chosen_ids")).tolist() == expected
    assert row_lengths(rows.select([5, 3, 24_999]), ("input_ids",)).tolist() == [5, 3, 24_999 % 7]
    assert row_lengths(rows.select([]), ("input_ids",)).tolist() == []


@pytest.mark.training
def test_a_resumed_run_does_not_read_what_it_has_trained(base, tmp_path, monkeypatch):
    read: list[int] = []
    whole = Packs.__getitem__
    monkeypatch.setattr(Packs, "__getitem__", lambda packs, number: (read.append(number), whole(packs, number))[1])
    train_alone(base, tmp_path, "--max_steps", "3", "--save_steps", "2")
    first, read[:] = list(read), []
    (tmp_path / "run.json").write_text(
        json.dumps(json.loads((tmp_path / "run.json").read_text()) | {"finished": False})
    )
    shutil.rmtree(tmp_path / "checkpoint-3")  # as if it had been stopped behind its second step
    train_alone(base, tmp_path, "--max_steps", "3", "--save_steps", "2")
    # Two steps of two times four rows; the loader is a batch ahead
    assert read and not set(read) & set(first[:16])

"""What runs on a GPU alone; `pytest -m gpu` on the first machine that has one checks it against the CPU."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_stages import write_data
from tiny import tiny_tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM

import dpo_training
import inference
import merge_peft_adapter
import supervised_finetuning
from benchmarks.memory_plan import Point, measure, predict
from suwen import attention
from suwen.batches import segments
from suwen.models import load_base
from suwen.preflight import reduce_here
from template import TEMPLATES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
ROOT = Path(__file__).parents[1]
AMPERE = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8
HALF = torch.bfloat16 if AMPERE else torch.float16
GPUS = (os.environ.get("TEST_GPUS") or os.environ.get("CUDA_VISIBLE_DEVICES", "")).split(",")
several = pytest.mark.skipif(len(GPUS) < 2, reason="needs two GPUs")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny_tokenizer(special_tokens=["<|im_start|>", "<|im_end|>"], chat_template=TEMPLATES["chatml"].jinja)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return str(folder)


def words(stage: str, model: str, folder: Path, *more: str) -> list[str]:
    folder.mkdir(exist_ok=True)
    data = ["--train_file_dir", write_data(folder, stage), "--cache_dir", str(folder / "cache"), "--num_proc", "1"]
    steps = ["--max_steps", "8", "--logging_steps", "1", "--gradient_accumulation_steps", "2", "--max_length", "256"]
    steps += ["--learning_rate", "2e-3", "--validation_split_fraction", "0.2", "--do_train", "--do_eval"]
    return ["--model_name_or_path", model, "--output_dir", str(folder / stage), *data, *steps, *more]


def read(folder: Path, stage: str, log: str = "loss") -> tuple[dict, list[float]]:
    """run.json, and what was logged at each step."""
    state = json.loads((folder / stage / "checkpoint-8" / "trainer_state.json").read_text())
    return json.loads((folder / stage / "run.json").read_text()), [e[log] for e in state["log_history"] if log in e]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(("width", "key_heads"), [(64, 4), (64, 2), (80, 2), (128, 1), (256, 2), (36, 2)])
@pytest.mark.parametrize(("lengths", "key_lengths"), [([70, 1, 133], [70, 1, 133]), ([12, 130], [140, 161])])
def test_attention_has_the_result_and_gradients_of_float64(lengths, key_lengths, width, key_heads, window, autocast):
    """Shared heads, windows, queries at the end of longer keys (pairs), and widths that the kernel does not take."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, sum(lengths)), (key_heads, sum(key_lengths)), (key_heads, sum(key_lengths)))
    given = [torch.randn(1, heads, length, width, generator=generator).to(HALF) for heads, length in shapes]
    slope = torch.randn(1, sum(lengths), 4, width, generator=generator).to(HALF)

    def results(device, dtype):
        tensors = [tensor.to(device, dtype, copy=True).requires_grad_() for tensor in given]
        places = segments(lengths, key_lengths)
        places = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in places.items()}
        found, _ = attention.varlen_attention(None, *tensors, None, sliding_window=window, **places)
        found.backward(slope.to(device, found.dtype))
        return [found.detach().double().cpu(), *(tensor.grad.double().cpu() for tensor in tensors)]

    exact = results("cpu", torch.float64)
    with torch.autocast("cuda", dtype=HALF, enabled=autocast):
        found = results("cuda", torch.float32 if autocast else HALF)
    for one, two in zip(found, exact, strict=True):
        assert (one - two).norm() < 0.01 * two.norm()


def test_attention_in_float32_is_that_of_the_cpu():
    query, key = torch.randn(1, 4, 90, 64), torch.randn(1, 2, 90, 64)
    places = segments([50, 40])
    expected, _ = attention.varlen_attention(None, query, key, key, None, **places)
    places = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in places.items()}
    found, _ = attention.varlen_attention(None, query.cuda(), key.cuda(), key.cuda(), None, **places)
    torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=1e-4)


PEFT = ("--use_peft", "True")
METHODS = {
    "full": (),
    "pure_bf16": ("--pure_bf16", "True"),
    "lora": PEFT,
    "8bit": (*PEFT, "--quantization", "8bit"),
    "4bit": (*PEFT, "--quantization", "4bit"),
    "2bit": (*PEFT, "--quantization", "2bit"),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_model_learns_is_preferred_merged_and_asked(method, base, tmp_path, monkeypatch, capsys):
    if method == "pure_bf16" and not AMPERE:
        pytest.skip("needs bfloat16")
    kernels = []
    original = attention.has_kernel
    monkeypatch.setattr(attention, "has_kernel", lambda query: kernels.append(original(query)) or kernels[-1])
    supervised_finetuning.main(words("sft", base, tmp_path, *METHODS[method]))
    record, losses = read(tmp_path, "sft")
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    assert record["peak_memory_bytes"] == torch.cuda.max_memory_allocated() > 0
    printed = capsys.readouterr().out
    assert "1 x cuda" in printed and "packing off" not in printed
    assert all(kernels) == AMPERE and kernels

    start = str(tmp_path / "sft") if method in ("full", "pure_bf16", "4bit") else base
    dpo_training.main(words("dpo", start, tmp_path, *METHODS[method], "--learning_rate", "1e-4"))
    _, losses = read(tmp_path, "dpo")
    assert abs(losses[0] - math.log(2)) < 1e-2 and all(map(math.isfinite, losses))

    result = tmp_path / "sft"
    if "--use_peft" in METHODS[method]:
        result = tmp_path / "merged"
        merge_peft_adapter.main(["--lora_model", str(tmp_path / "sft"), "--output_dir", str(result)])
    questions, answers = tmp_path / "questions.txt", tmp_path / "answers.jsonl"
    questions.write_text("高血压怎么办？\n糖尿病有什么症状？\n", encoding="utf-8")
    flags = ["--data_file", str(questions), "--output_file", str(answers), "--max_new_tokens", "8"]
    inference.main(["--base_model", str(result), *flags])
    assert len(answers.read_text(encoding="utf-8").splitlines()) == 2


def test_float32_has_the_losses_and_answers_of_the_cpu(base, tmp_path):
    exact = ["--bf16", "False", "--fp16", "False", "--max_grad_norm", "0", "--optim", "sgd", "--learning_rate", "0.1"]
    supervised_finetuning.main(words("sft", base, tmp_path / "gpu", *exact))
    alone = [sys.executable, str(ROOT / "supervised_finetuning.py"), *words("sft", base, tmp_path / "cpu", *exact)]
    subprocess.run([*alone, "--use_cpu"], check=True, capture_output=True)
    _, found = read(tmp_path / "gpu", "sft")
    _, expected = read(tmp_path / "cpu", "sft")
    assert found == pytest.approx(expected, rel=1e-3)
    ids = torch.arange(5, 37)[None]
    one, two = (load_base(str(tmp_path / "gpu" / "sft"), torch.float32, device=d).eval() for d in ("cuda", "cpu"))
    settings = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(one.generate(ids.cuda(), **settings).cpu(), two.generate(ids, **settings))


@pytest.mark.parametrize("quantization", ["8bit", "4bit", "2bit"])
def test_quantised_weights_are_those_of_the_cpu(quantization, base):
    ids = torch.arange(5, 37)[None]
    one, two = (load_base(base, "auto", quantization, torch.float32, d).eval() for d in ("cuda", "cpu"))
    with torch.no_grad():
        found, expected = one(ids.cuda()).logits.float().cpu(), two(ids).logits.float()
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.skipif(not AMPERE, reason="needs bfloat16")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["full", "lora", "lora8", "lora4"])
def test_the_memory_plan_is_near_what_is_allocated(method, checkpointing):
    point = Point(2048, 5632, 8, 16, 4, 32000, 1024, 2, method, checkpointing, bf16=True, accumulation=2)
    measured = measure(point, "cuda")
    assert predict(point, "cuda") == pytest.approx(measured, rel=0.2)
    longer = dataclasses.replace(point, tokens=2048)  # what grows with the tokens is planned as well
    assert predict(longer, "cuda") == pytest.approx(measure(longer, "cuda"), rel=0.2)


def test_the_preflight_adds_up_over_nccl(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(GPUS))
    found = reduce_here(f"file://{tmp_path}/store", range(len(GPUS)), len(GPUS))
    assert not found["problem"] and found["backend"] == "nccl"


@pytest.mark.parametrize(
    ("config", "processes", "method"),
    [
        pytest.param("zero2_offload", 1, "lora"),
        *(pytest.param(c, 2, "full", marks=several) for c in ("ddp", "zero1", "zero2", "zero3", "fsdp2")),
        pytest.param("ddp", 2, "4bit", marks=several),
        pytest.param("zero2", 2, "4bit", marks=several),
        pytest.param("fsdp2", 2, "4bit", marks=several),
    ],
)
def test_the_launcher_trains_with_every_engine(config, processes, method, base, tmp_path):
    given = words("sft", base, tmp_path, *METHODS[method])
    variables = {"PYTHON": sys.executable, "SETUP": "skip", "CONFIG": config, "NUM_PROCESSES": str(processes)}
    variables["CUDA_VISIBLE_DEVICES"] = ",".join(GPUS[:processes])
    command = ["bash", str(ROOT / "run_sft.sh"), "--use_peft", "False", *given]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "sft" / "run.json").read_text())
    assert record["finished"] and record["world_size"] == processes and math.isfinite(record["evaluation"]["eval_loss"])

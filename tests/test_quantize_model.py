"""Exports in 8 and 4 bits: they load as they are, say what they cost, and are not trained or quantised again."""

import io
import json
from contextlib import redirect_stdout

import pytest
import torch
from transformers import AutoModelForCausalLM

import inference
import supervised_finetuning
from benchmarks.family_matrix import FAMILIES, write_model
from suwen.models import load_base, load_causal_lm
from tools import quantize_model

pytestmark = pytest.mark.training


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("base")
    with redirect_stdout(io.StringIO()):
        write_model(FAMILIES["llama"], folder)
    return str(folder)


def export(base: str, out, *more: str) -> None:
    words = ["--model_name_or_path", base, "--output_dir", str(out), "--max_samples", "8", "--use_cpu"]
    quantize_model.main([*words, *more])


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_an_export_is_smaller_answers_as_the_quantised_model_and_says_what_it_costs(
    quantization, base, tmp_path, capsys
):
    export(base, tmp_path / "out", "--quantization", quantization)
    said = capsys.readouterr().out
    assert "model: before\n" in said and "model: after\n" in said
    record = json.loads((tmp_path / "out" / "quantization.json").read_text())
    for name in ("general_text: perplexity per character", "exam: accuracy"):
        before, after = record["before"][name], record["after"][name]
        assert f"{before:.4g}" in said and f"{after:.4g}" in said
        assert before >= 0 and after >= 0
    assert record["before"] != record["after"]  # rounding moves the perplexity, if only a little
    original = AutoModelForCausalLM.from_pretrained(base)
    assert record["bytes"] < 4 * sum(p.numel() for p in original.parameters())
    ids = torch.arange(5, 37)[None]
    loaded = load_causal_lm(str(tmp_path / "out"), device="cpu").eval()
    assert loaded.config.quantization_config.quant_method.value == "bitsandbytes"
    direct = load_base(base, "auto", quantization, torch.float16, "cpu").eval()
    torch.testing.assert_close(loaded(ids).logits.float(), direct(ids).logits.float(), rtol=1e-3, atol=1e-3)
    questions = tmp_path / "questions.txt"
    questions.write_text("高血压怎么办？\n", encoding="utf-8")
    answers = tmp_path / "answers.jsonl"
    inference.main(
        ["--base_model", str(tmp_path / "out"), "--data_file", str(questions), "--output_file", str(answers)]
        + ["--max_new_tokens", "4", "--use_cpu"]
    )
    assert len(answers.read_text(encoding="utf-8").splitlines()) == 1


def test_an_export_is_neither_quantised_again_nor_trained_nor_overwritten(base, tmp_path):
    out = str(tmp_path / "out")
    export(base, out, "--tasks", "general_text")
    with pytest.raises(ValueError, match="is quantised already, expected the model it was made from"):
        export(out, tmp_path / "again")
    with pytest.raises(ValueError, match="--quantization 8bit: .* is quantised already"):
        load_causal_lm(out, quantization="8bit", device="cpu")
    with pytest.raises(ValueError, match="is a quantised export, for serving"):
        supervised_finetuning.main(
            ["--model_name_or_path", out, "--use_peft", "True", "--train_file_dir", "data/sft", "--use_cpu"]
            + ["--output_dir", str(tmp_path / "sft"), "--max_train_samples", "8", "--num_proc", "1"]
        )
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        export(base, out)


def test_the_texts_and_the_size_of_the_files_are_those_asked_for(base, tmp_path):
    own = tmp_path / "texts"
    own.mkdir()
    (own / "general_text.txt").write_text("山高水长，云淡风轻。\n", encoding="utf-8")
    measured = []
    for name, more in (("own", ["--data_dir", str(own), "--max_shard_size", "0.1MB"]), ("given", [])):
        export(base, tmp_path / name, "--tasks", "general_text", *more)
        measured.append(json.loads((tmp_path / name / "quantization.json").read_text())["before"])
    assert measured[0] != measured[1]
    files = sorted((tmp_path / "own").glob("*.safetensors"))
    assert len(files) > 1 and len(list((tmp_path / "given").glob("*.safetensors"))) == 1
    index = json.loads((tmp_path / "own" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    ids = torch.arange(5, 25)[None]
    one, other = (load_causal_lm(str(tmp_path / name), device="cpu").eval() for name in ("own", "given"))
    assert torch.equal(one(ids).logits, other(ids).logits)


def test_mistakes_are_told_before_the_model_is_loaded(base, tmp_path):
    with pytest.raises(ValueError, match="--output_dir: found nothing"):
        quantize_model.main(["--model_name_or_path", base])
    with pytest.raises(ValueError, match="--tasks huatuo: is not scored by likelihood"):
        export(base, tmp_path / "x", "--tasks", "huatuo")
    with pytest.raises(ValueError, match="--max_shard_size: found 'small', expected a size such as 500MB"):
        export(base, tmp_path / "x", "--max_shard_size", "small")
    with pytest.raises(ValueError, match="invalid choice: '2bit'"):
        export(base, tmp_path / "x", "--quantization", "2bit")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is a LoRA folder; merge it first"):
        export(str(tmp_path / "lora"), tmp_path / "x")
    assert not list(tmp_path.glob(".x*")) and not (tmp_path / "x").exists()

"""Merging adapters: the result is what was trained, and what does not belong together is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import merge_peft_adapter
from suwen.adapters import plan_merge
from suwen.lineage import file_sha256, weights_fingerprint
from suwen.merging import build_probes, merge_adapters
from suwen.models import load_causal_lm, load_config, positions_of, scale_rope
from suwen.serving import load_with_adapters

pytestmark = pytest.mark.training

ROOT = Path(__file__).parents[1]
ROWS = 288  # 259 tokens and padding; bitsandbytes needs multiples of 32


def write_tokenizer(folder: Path, extra: int = 0) -> int:
    """A byte-level tokenizer; `extra` new words on top. Returns its size."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = "{% for m in messages %}<turn>{{ m.content }}{% endfor %}"
    tokenizer.add_tokens([f"新词{i}" for i in range(extra)])
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def write_base(folder: Path, seed=0, hidden=64, layers=2, tied=False, dtype=torch.float32) -> str:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=ROWS, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, tie_word_embeddings=tied, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    write_tokenizer(folder)
    return str(folder)


def train(model, steps: int = 8) -> None:
    """Real optimiser steps towards fixed continuations, so that the adapter changes the logits as a training does."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(259, (4, 32), generator=generator)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def write_adapter(
    base: str, folder: Path, seed=0, steps=0, quantization: str = "none", dtype: str = "auto", rows: int = 0, **lora
) -> str:
    """A LoRA folder as a stage leaves it; without steps its B matrices are random."""
    torch.manual_seed(seed)
    model = load_causal_lm(base, dtype, quantization, "cpu" if quantization != "none" else None)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}
    peft = get_peft_model(model, LoraConfig(**settings))
    if steps:
        train(peft, steps)
    else:
        for name, parameter in peft.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name or "modules_to_save" in name or "delta" in name:
                parameter.data += 0.05 * torch.randn_like(parameter)
    peft.save_pretrained(folder)
    shutil.copytree(base if (Path(base) / "tokenizer.json").is_file() else folder, folder, dirs_exist_ok=True,
                    ignore=lambda _, names: [n for n in names if "token" not in n and "chat" not in n])  # fmt: skip
    (Path(folder) / "run.json").write_text(json.dumps({"arguments": {"quantization": quantization, "dtype": dtype}}))
    return str(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> str:
    return write_adapter(base, tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def quiet():
    return lambda line: None


def logits_of(model) -> torch.Tensor:
    ids = torch.arange(240).reshape(4, 60)
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def load_plain(folder) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def snapshot(folder) -> dict[str, str]:
    return {str(p): file_sha256(p) for p in sorted(Path(folder).rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("quantization", "dtype"),
    [(quantization, dtype) for quantization in ("none", "8bit", "4bit") for dtype in ("float32", "bfloat16")],
)
def test_the_proof_holds_for_adapters_trained_in_every_precision(tmp_path, quiet, quantization, dtype):
    base = write_base(tmp_path / "base", dtype=getattr(torch, dtype))
    adapter = write_adapter(base, tmp_path / "adapter", steps=8, quantization=quantization, dtype=dtype)
    before = snapshot(base) | snapshot(adapter)

    record = merge_adapters(None, [adapter], str(tmp_path / "merged"), device="cpu", log=quiet)

    assert record["proof"]["effect"]["mean"] > 0.05
    assert record["proof"]["error"]["mean"] <= 0.01 * record["proof"]["effect"]["mean"]
    assert snapshot(base) | snapshot(adapter) == before
    merged = load_plain(tmp_path / "merged")
    trained = load_causal_lm(base, dtype, quantization, "cpu" if quantization != "none" else None)
    distance = (logits_of(merged) - logits_of(PeftModel.from_pretrained(trained, adapter).eval())).abs().mean()
    kernel_noise = record["proof"].get("quantized_kernels_adapter", {"mean": 0.03})["mean"]
    assert distance < 2 * kernel_noise + 0.01 * record["proof"]["effect"]["mean"]


def test_a_merged_folder_is_a_plain_model_with_tokenizer_template_and_record(base, adapter, tmp_path, quiet):
    shutil.copytree(adapter, tmp_path / "adapter")
    settings = {"eos_token_id": [257, 258], "temperature": 0.7}  # sampling without do_sample, as old files have it
    (tmp_path / "adapter" / "generation_config.json").write_text(json.dumps(settings))
    out = tmp_path / "new" / "merged"

    merge_adapters(base, [str(tmp_path / "adapter")], str(out), device="cpu", log=quiet)

    on_base = PeftModel.from_pretrained(load_plain(base), adapter).eval()
    torch.testing.assert_close(logits_of(load_plain(out)), logits_of(on_base), atol=2e-5, rtol=0)
    assert AutoTokenizer.from_pretrained(out).chat_template == AutoTokenizer.from_pretrained(base).chat_template
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [257, 258]
    record = json.loads((out / "merge.json").read_text())
    assert record["adapters"][0]["sha256"] == file_sha256(Path(adapter) / "adapter_model.safetensors")
    assert record["base"]["fingerprint"] == weights_fingerprint(base)
    assert not list(out.glob("*.bin")) and not list(out.glob("adapter*"))
    assert [p.name for p in out.parent.iterdir()] == ["merged"]


def test_several_adapters_in_order_equal_merging_one_after_the_other(base, adapter, tmp_path, quiet):
    second = write_adapter(base, tmp_path / "second", seed=5, target_modules=["q_proj", "down_proj"])

    merge_adapters(base, [adapter, second], str(tmp_path / "at-once"), device="cpu", log=quiet)
    merge_adapters(base, [adapter], str(tmp_path / "first"), device="cpu", log=quiet)
    merge_adapters(str(tmp_path / "first"), [second], str(tmp_path / "then"), device="cpu", log=quiet)

    at_once, then = load_plain(tmp_path / "at-once"), load_plain(tmp_path / "then")
    for name, tensor in at_once.state_dict().items():
        torch.testing.assert_close(tensor, then.state_dict()[name], atol=1e-6, rtol=0)
    assert (logits_of(at_once) - logits_of(load_plain(tmp_path / "first"))).abs().mean() > 0.01


def test_an_adapter_on_an_adapter_is_merged_with_what_it_stands_on(base, adapter, tmp_path, quiet):
    upper = write_adapter(adapter, tmp_path / "upper", seed=7)

    record = merge_adapters(None, [upper], str(tmp_path / "merged"), device="cpu", log=quiet)

    assert [entry["path"] for entry in record["adapters"]] == [adapter, upper]
    expected = logits_of(load_causal_lm(upper, "float32").eval())
    torch.testing.assert_close(logits_of(load_plain(tmp_path / "merged")), expected, atol=2e-5, rtol=0)
    with pytest.raises(ValueError, match="was trained on top of the adapter"):
        merge_adapters(base, [upper], str(tmp_path / "without"), device="cpu", log=quiet)
    with pytest.raises(ValueError, match="already merged"):
        merge_adapters(str(tmp_path / "merged"), [upper], str(tmp_path / "twice"), device="cpu", log=quiet)


def test_an_adapter_fits_the_merged_model_of_what_it_stands_on(base, adapter, tmp_path, quiet):
    upper = write_adapter(adapter, tmp_path / "upper", seed=7)
    merge_adapters(None, [adapter], str(tmp_path / "lower"), device="cpu", log=quiet)

    merge_adapters(str(tmp_path / "lower"), [upper], str(tmp_path / "merged"), device="cpu", log=quiet)

    expected = logits_of(load_causal_lm(upper, "float32").eval())
    torch.testing.assert_close(logits_of(load_plain(tmp_path / "merged")), expected, atol=2e-5, rtol=0)


def test_a_weak_adapter_on_a_bfloat16_base_is_kept_in_float32_and_refused_in_bfloat16(tmp_path):
    base = write_base(tmp_path / "base", dtype=torch.bfloat16)
    strong = write_adapter(base, tmp_path / "strong", steps=8)
    weights = Path(strong) / "adapter_model.safetensors"
    save_file({k: v * 0.02 if "lora_B" in k else v for k, v in load_file(weights).items()}, weights)
    lines = []

    record = merge_adapters(base, [strong], str(tmp_path / "auto"), device="cpu", log=lines.append)

    assert record["dtype"] == "float32" and record["proof"]["error_fraction"] < 1e-3
    assert any("on disk in bfloat16" in line and "above 1 %" in line for line in lines)
    assert json.loads((tmp_path / "auto" / "config.json").read_text())["dtype"] == "float32"
    with pytest.raises(ValueError, match="--dtype bfloat16: .* expected at most 1 %; --dtype auto or float32"):
        merge_adapters(base, [strong], str(tmp_path / "bf16"), dtype="bfloat16", device="cpu", log=lines.append)
    assert not (tmp_path / "bf16").exists() and not list(tmp_path.glob(".*unfinished*"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_saved_precision_can_be_chosen(base, tmp_path, quiet, dtype):
    adapter = write_adapter(base, tmp_path / "adapter", steps=8)

    merge_adapters(base, [adapter], str(tmp_path / "merged"), dtype=dtype, device="cpu", log=quiet)

    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {getattr(torch, dtype)}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == getattr(torch, dtype)


def test_a_four_bit_adapter_goes_into_the_dequantised_base_or_the_original_on_request(base, tmp_path, quiet):
    adapter = write_adapter(base, tmp_path / "adapter", steps=8, quantization="4bit", dtype="float32")

    as_trained = merge_adapters(None, [adapter], str(tmp_path / "a"), device="cpu", log=quiet)
    original = merge_adapters(None, [adapter], str(tmp_path / "b"), merge_base="original", device="cpu", log=quiet)

    assert (as_trained["base"]["merged_into"], original["base"]["merged_into"]) == ("dequantized", "original")
    trained = PeftModel.from_pretrained(load_causal_lm(base, "float32", "4bit", "cpu"), adapter).eval()
    near, far = [(logits_of(load_plain(tmp_path / n)) - logits_of(trained)).abs().mean() for n in "ab"]
    assert near < 0.1 * far
    on_original = PeftModel.from_pretrained(load_plain(base), adapter).eval()
    torch.testing.assert_close(logits_of(load_plain(tmp_path / "b")), logits_of(on_original), atol=2e-5, rtol=0)


def test_the_quantisation_of_an_adapter_without_a_run_record_is_given_by_a_flag(base, tmp_path, quiet):
    adapter = write_adapter(base, tmp_path / "adapter", steps=4, quantization="4bit", dtype="float32")
    with pytest.raises(ValueError, match="trained with 4bit"):
        merge_adapters(None, [adapter], str(tmp_path / "x"), quantization="8bit", device="cpu", log=quiet)
    (Path(adapter) / "run.json").unlink()
    record = merge_adapters(None, [adapter], str(tmp_path / "m"), quantization="4bit", device="cpu", log=quiet)
    assert record["base"]["training_quantization"] == "4bit"


@pytest.mark.parametrize(
    "lora",
    [
        {"use_dora": True},
        {"use_rslora": True, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 32}},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    ],
    ids=["dora", "ranks", "full-tables", "tied-tables", "lora-head", "lora-embedding", "one-layer"],
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_kind_of_lora_merges_exactly(tmp_path, quiet, lora, tied):
    base = write_base(tmp_path / "base", tied=tied)
    adapter = write_adapter(base, tmp_path / "adapter", **lora)
    merge_adapters(base, [adapter], str(tmp_path / "merged"), device="cpu", log=quiet)
    expected = logits_of(PeftModel.from_pretrained(load_plain(base), adapter).eval())
    torch.testing.assert_close(logits_of(load_plain(tmp_path / "merged")), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["full", "rows"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("quantization", ["none", "4bit"])
def test_an_enlarged_vocabulary_comes_with_the_adapter(tmp_path, quiet, kind, tied, quantization):
    base = write_base(tmp_path / "base", tied=tied)
    size = write_tokenizer(tmp_path / "adapter", extra=40)
    assert size > ROWS
    new = list(range(259, size))
    tables = {"embed_tokens": new} if tied else {"embed_tokens": new, "lm_head": new}
    lora = {"modules_to_save": ["embed_tokens", "lm_head"]} if kind == "full" else {"trainable_token_indices": tables}
    lora |= {"target_modules": ["q_proj"], "quantization": quantization, "dtype": "float32"}
    adapter = write_adapter(base, tmp_path / "adapter", rows=size, **lora)
    write_tokenizer(Path(adapter), extra=40)

    merge_adapters(base, [adapter], str(tmp_path / "merged"), device="cpu", log=quiet)

    merged, tokenizer = load_plain(tmp_path / "merged"), AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged.get_input_embeddings().weight.shape[0] == size == len(tokenizer)
    assert tokenizer("新词39", add_special_tokens=False)["input_ids"] == [size - 1]
    fresh = load_causal_lm(base, "float32", quantization, "cpu")
    fresh.resize_token_embeddings(size, mean_resizing=False)
    expected = logits_of(PeftModel.from_pretrained(fresh, adapter).eval())
    torch.testing.assert_close(logits_of(merged), expected, atol=1e-3, rtol=0)


def test_a_tokenizer_longer_than_every_embedding_is_explained(base, adapter, tmp_path, quiet):
    shutil.copytree(adapter, tmp_path / "adapter")
    write_tokenizer(tmp_path / "adapter", extra=40)
    with pytest.raises(ValueError, match="299 tokens, the base .* 288 rows .* no adapter carries the missing rows"):
        merge_adapters(base, [str(tmp_path / "adapter")], str(tmp_path / "merged"), device="cpu", log=quiet)


def test_an_adapter_with_another_vocabulary_is_explained(base, tmp_path, quiet):
    lora = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    other = write_adapter(base, tmp_path / "other", rows=256, **lora)
    with pytest.raises(ValueError, match="its .* has 256 rows, the vocabulary of .* has 288"):
        merge_adapters(base, [other], str(tmp_path / "m"), device="cpu", log=quiet)
    larger = write_adapter(base, tmp_path / "larger", rows=320, **lora)
    with pytest.raises(ValueError, match="embedding of 320 rows, the base .* has 288, the tokenizer .* 259 tokens"):
        merge_adapters(base, [larger], str(tmp_path / "m"), device="cpu", log=quiet)


def test_a_padded_vocabulary_is_kept(base, adapter, tmp_path, quiet):
    merge_adapters(base, [adapter], str(tmp_path / "merged"), device="cpu", log=quiet)
    assert load_plain(tmp_path / "merged").get_input_embeddings().weight.shape[0] == ROWS


def test_an_adapter_of_another_base_is_refused(base, adapter, tmp_path, quiet):
    cases = {
        "wider": ({"hidden": 128}, "has shape .*, the base needs"),
        "deeper": ({"layers": 3}, "covers 2 layers, the base has 3"),
        "shallower": ({"layers": 1}, "has no place in the base"),
        "same-shapes": ({"seed": 9}, "whose weights differ"),
    }
    gone = shutil.copytree(adapter, tmp_path / "gone")  # nothing recorded: shapes alone must tell
    config = json.loads((gone / "adapter_config.json").read_text())
    (gone / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "somewhere/else"}))
    for name, (settings, message) in cases.items():
        other = write_base(tmp_path / name, **settings)
        with pytest.raises(ValueError, match="whose weights differ"):
            merge_adapters(other, [adapter], str(tmp_path / "m"), device="cpu", log=quiet)
        if name == "same-shapes":
            links = [{"path": base, "fingerprint": weights_fingerprint(base)}]
            (gone / "run.json").write_text(json.dumps({"lineage": links}))
        with pytest.raises(ValueError, match=message):
            merge_adapters(other, [str(gone)], str(tmp_path / "m"), device="cpu", log=quiet)
    assert not (tmp_path / "m").exists()


def test_an_adapter_without_effect_is_refused(base, adapter, tmp_path, quiet):
    shutil.copytree(adapter, tmp_path / "zero")
    weights = tmp_path / "zero" / "adapter_model.safetensors"
    save_file({k: v * 0 if "lora_B" in k else v for k, v in load_file(weights).items()}, weights)
    with pytest.raises(ValueError, match="has no effect"):
        merge_adapters(base, [str(tmp_path / "zero")], str(tmp_path / "m"), device="cpu", log=quiet)
    trained = load_file(Path(adapter) / weights.name)
    save_file({k: v * 1e-6 if "lora_B" in k else v for k, v in trained.items()}, weights)
    with pytest.raises(ValueError, match="expected at most 1 %"):
        merge_adapters(base, [str(tmp_path / "zero")], str(tmp_path / "m"), device="cpu", log=quiet)
    save_file({k: v * float("nan") for k, v in load_file(weights).items()}, weights)
    with pytest.raises(ValueError, match="NaN"):
        merge_adapters(base, [str(tmp_path / "zero")], str(tmp_path / "m"), device="cpu", log=quiet)
    assert not (tmp_path / "m").exists() and not list(tmp_path.glob(".*unfinished*"))


def test_a_merge_that_changes_the_model_is_refused_by_the_proof(base, adapter, tmp_path, quiet, monkeypatch):
    import suwen.merging as merging

    def spoil(model, folder, dtype, max_shard_size, save=merging.save_weights):
        save(model, folder, dtype, max_shard_size)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.0.mlp.up_proj.weight"][3, 5] += 0.01
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(merging, "save_weights", spoil)
    with pytest.raises(ValueError, match="up_proj.weight read back differs from what was merged"):
        merge_adapters(base, [adapter], str(tmp_path / "m"), device="cpu", log=quiet)
    assert not (tmp_path / "m").exists()


def test_damaged_missing_or_changed_files_give_one_clear_error(base, adapter, tmp_path, quiet):
    def broken(name: str, change) -> str:
        folder = shutil.copytree(adapter, tmp_path / name)
        change(folder)
        return str(folder)

    def truncate(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-100])

    def record_other_hash(folder: Path) -> None:
        (folder / "run.json").write_text(json.dumps({"files": {"adapter_model.safetensors": "0" * 64}}))

    weights = "adapter_model.safetensors"
    cases = [
        (str(tmp_path / "nowhere"), "found no such folder"),
        (base, "found a full model, expected a LoRA folder"),
        (broken("a", lambda f: (f / weights).unlink()), "found no adapter_model.safetensors"),
        (broken("b", lambda f: truncate(f / weights)), "damaged or no safetensors file"),
        (broken("c", lambda f: (f / "adapter_config.json").write_text("{")), "expected a JSON file"),
        (broken("d", lambda f: (f / "adapter_config.json").write_text("{}")), "found no peft_type"),
        (broken("e", record_other_hash), "changed since"),
    ]
    for folder, message in cases:
        with pytest.raises(ValueError, match=message):
            merge_adapters(base, [folder], str(tmp_path / "m"), device="cpu", log=quiet)
    with pytest.raises(ValueError, match="given twice"):
        merge_adapters(base, [adapter, adapter], str(tmp_path / "m"), device="cpu", log=quiet)
    bad_base = shutil.copytree(base, tmp_path / "bad")
    truncate(bad_base / "model.safetensors")
    with pytest.raises(ValueError):
        merge_adapters(str(bad_base), [adapter], str(tmp_path / "m"), device="cpu", log=quiet)
    assert not (tmp_path / "m").exists()


def test_inputs_and_full_folders_are_never_written_to(base, adapter, tmp_path, quiet):
    before = snapshot(base) | snapshot(adapter)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to(base)
    outputs = [base, adapter, f"{base}/inside", f"{adapter}/a/b", str(tmp_path / "full"), str(tmp_path / "link" / "x")]
    for output in outputs:
        with pytest.raises(ValueError, match="--output_dir"):
            merge_adapters(base, [adapter], output, device="cpu", log=quiet)
    assert snapshot(base) | snapshot(adapter) == before
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_weights_are_sharded_by_max_shard_size(base, adapter, tmp_path, quiet):
    merge_adapters(base, [adapter], str(tmp_path / "m"), max_shard_size="200KB", device="cpu", log=quiet)
    shards = sorted((tmp_path / "m").glob("model-*.safetensors"))
    assert len(shards) > 2 and all(shard.stat().st_size < 220_000 for shard in shards)
    assert (tmp_path / "m" / "model.safetensors.index.json").is_file()
    merge_adapters(base, [adapter], str(tmp_path / "one"), device="cpu", log=quiet)
    assert weights_fingerprint(str(tmp_path / "m")) == weights_fingerprint(str(tmp_path / "one"))
    with pytest.raises(ValueError, match="--max_shard_size"):
        merge_adapters(base, [adapter], str(tmp_path / "x"), max_shard_size="huge", device="cpu", log=quiet)


def test_the_rope_scaling_of_the_training_is_part_of_the_merged_model(base, adapter, tmp_path, quiet):
    shutil.copytree(adapter, tmp_path / "adapter")
    config = load_config(base)
    scale_rope(config, "linear", 2 * config.max_position_embeddings)
    (tmp_path / "adapter" / "run.json").write_text(json.dumps({"positions": positions_of(config)}))
    merge_adapters(base, [str(tmp_path / "adapter")], str(tmp_path / "m"), device="cpu", log=quiet)
    merged = load_plain(tmp_path / "m")
    assert positions_of(merged.config) == positions_of(config) and config.rope_parameters["factor"] == 2.0
    served, _ = load_with_adapters(None, [str(tmp_path / "adapter")], "float32", "none", "cpu")
    torch.testing.assert_close(logits_of(served), logits_of(merged), atol=1e-5, rtol=0)


def test_lora_on_one_of_two_tied_tables_parts_them_wherever_it_is_merged(tmp_path):
    base = write_base(tmp_path / "base", tied=True)
    adapter = write_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"])
    expected = logits_of(PeftModel.from_pretrained(load_plain(base), adapter).eval())
    assert (expected - logits_of(load_plain(base))).abs().max() > 0.01
    served, _ = load_with_adapters(None, [adapter], "float32", "none", "cpu")
    for model in (load_causal_lm(adapter), served):
        torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=0)


def test_a_base_on_the_hub_that_is_not_here_yet_is_no_other_base(adapter):
    assert plan_merge("some/model", [adapter]).base == "some/model"


def test_the_probes_are_the_same_in_every_run_and_within_the_vocabulary(base):
    tokenizer, model = AutoTokenizer.from_pretrained(base), load_plain(base)
    first, second = build_probes(tokenizer, model), build_probes(tokenizer, model)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert max(int(ids.max()) for ids in first) == len(tokenizer) - 1


def test_the_command_prints_effect_and_error_and_ends_with_code_2_on_a_mistake(base, adapter, tmp_path, capsys):
    merge_peft_adapter.main(["--lora_model", adapter, "--output_dir", str(tmp_path / "m"), "--use_cpu"])
    shown = capsys.readouterr().out
    assert "effect mean" in shown and "the proof holds" in shown
    command = [sys.executable, str(ROOT / "merge_peft_adapter.py"), "--base_model", base, "--lora_model", "nowhere"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += ["--output_dir", str(tmp_path / "x")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].endswith("found no such folder, expected a LoRA folder")

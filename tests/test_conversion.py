"""Converted checkpoints compute what the originals computed; what the tables do not know is refused."""

import ast
import json
import re
import shlex
import subprocess
import sys
import time
import typing
from pathlib import Path

import pytest
import torch
from old_checkpoints import (
    CONFIGS,
    RECOGNISED,
    first_sentencepiece,
    merged_sentencepiece,
    shapes,
    train_sentencepiece,
    write_original,
)
from safetensors import safe_open
from safetensors.torch import save_file
from sentencepiece import SentencePieceProcessor
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import supervised_finetuning
from suwen.conversion.convert import compare_logits, conversion_command, convert_checkpoint, convert_lora, probe_rows
from suwen.conversion.families import FAMILIES, apply_rule, find_rule, recognise
from suwen.conversion.originals import original_logits
from suwen.conversion.tables import by_group, queries_keys_values, thirds
from suwen.conversion.weights import Shard, find_shards
from suwen.embedded import sample_texts
from suwen.encoding import ChatEncoder
from suwen.lineage import require_model
from suwen.models import load_base, load_causal_lm, load_config, load_tokenizer
from suwen.network import ask_hub
from tools import convert_checkpoint as convert_tool
from tools import plan_memory

pytestmark = pytest.mark.training

ROOT = Path(__file__).parents[1]


def convert(source: Path, target: Path, family_name: str | None = None, **options) -> list[str]:
    """Convert; the tiny vocabularies do not tell the family, so it is said."""
    lines: list[str] = []
    convert_checkpoint(str(source), str(target), family_name, log=lines.append, **options)
    return lines


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


REARRANGED = (None, thirds, by_group, queries_keys_values)  # what is done to a weight, its gradient follows


def fused_projections(tensors: dict) -> list[str]:
    """Names of the original's tensors that hold queries, keys and values in one."""
    return [name for name in tensors if re.search(r"W_pack|wqkv|c_attn|query_key_value", name)]


@pytest.mark.parametrize("family", CONFIGS)
def test_a_converted_model_gives_the_logits_and_gradients_of_the_original(family, tmp_path):
    config, tensors = write_original(tmp_path / "old", family, "bin" if family[0] in "bcq" else "safetensors")
    convert(tmp_path / "old", tmp_path / "new", family)
    model = load(tmp_path / "new")
    ids, mask = probe_rows(model.config)
    for tensor in tensors.values():
        tensor.requires_grad_()

    expected = original_logits(family, tensors, config, ids, mask)
    found = model(input_ids=ids, attention_mask=mask.long()).logits
    assert 0.3 < expected[mask].std(-1).mean() < 30
    torch.testing.assert_close(found[mask], expected[mask], atol=1e-5, rtol=1e-5)

    weight = torch.randn(expected[mask].shape, generator=torch.Generator().manual_seed(1)) / expected.shape[-1] ** 0.5
    (expected[mask] * weight).sum().backward()
    (found[mask] * weight).sum().backward()
    found_gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    compared = set()
    for name, tensor in tensors.items():
        rule, targets = find_rule(FAMILIES[family], name)
        if tensor.grad is None or rule.change not in REARRANGED:
            continue
        parts = apply_rule(rule, tensor.grad, config)
        for target, gradient in zip(targets, parts, strict=True):
            if target in found_gradients:  # experts stand there stacked
                torch.testing.assert_close(found_gradients[target], gradient, atol=1e-4, rtol=1e-4)
                compared.add(name)
    assert set(fused_projections(tensors)) <= compared
    table = next(name for name in tensors if "embed" in name or "wte" in name)
    assert table in compared and tensors[table].grad.abs().max() > 0.1


@pytest.mark.parametrize("family", CONFIGS)
def test_decoding_with_a_cache_gives_the_logits_of_the_whole_row(family, tmp_path):
    config, tensors = write_original(tmp_path / "old", family)
    convert(tmp_path / "old", tmp_path / "new", family)
    model = load(tmp_path / "new")
    ids, mask = probe_rows(model.config)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    written = model.generate(
        ids, attention_mask=mask.long(), output_logits=True, return_dict_in_generate=True, **options
    )
    full_mask = torch.cat([mask, torch.ones(len(ids), 6, dtype=torch.bool)], 1)
    expected = original_logits(family, tensors, config, written.sequences, full_mask)[:, -7:-1]
    torch.testing.assert_close(torch.stack(written.logits, 1), expected, atol=1e-5, rtol=1e-5)


def test_the_names_of_the_families_are_those_of_the_flag():
    from suwen.conversion import FamilyName

    assert list(typing.get_args(FamilyName)) == list(FAMILIES)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_is_recognised_by_its_config_and_told_how_to_convert(family, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old one").mkdir()
    command = conversion_command(RECOGNISED[family], "old one")
    assert command == (
        "python tools/convert_checkpoint.py --model_name_or_path 'old one' --output_dir 'old one-converted'"
    )
    if family != "chatglm3":
        assert recognise(RECOGNISED[family]).name == family


def test_no_conversion_is_asked_of_native_and_of_converted_folders(tmp_path):
    assert conversion_command({"model_type": "llama"}, "x") is None
    for family in ("baichuan2-13b", "chatglm"):
        write_original(tmp_path / family, family)
        convert(tmp_path / family, tmp_path / f"{family}-new", family)
        config = json.loads((tmp_path / f"{family}-new" / "config.json").read_text())
        assert conversion_command(config, "x") is None


def test_what_a_config_does_not_tell_is_asked_for():
    with pytest.raises(ValueError, match="vocab_size 70000.*baichuan-7b or baichuan2-7b"):
        recognise(CONFIGS["baichuan-7b"] | {"vocab_size": 70000})
    with pytest.raises(ValueError, match="rotary .* or ALiBi"):
        recognise(CONFIGS["baichuan-7b"] | {"hidden_size": 5120})
    with pytest.raises(ValueError, match="rope_ratio 8 .*chatglm2 or chatglm3"):
        recognise(CONFIGS["chatglm3"])
    assert recognise(CONFIGS["chatglm3"], "base = base * self.rope_ratio").name == "chatglm3"
    assert recognise(CONFIGS["chatglm3"], "idx = arange(n) / self.rope_ratio").name == "chatglm2"


@pytest.mark.parametrize("scaling", [{"type": "dynamic", "factor": 2.0}, {"type": "linear", "factor": 2.0}])
def test_internlm2_keeps_its_scaled_positions_and_biases(scaling, tmp_path):
    config, tensors = write_original(
        tmp_path / "old", "internlm2", rope_scaling=scaling, bias=True, max_position_embeddings=16
    )
    convert(tmp_path / "old", tmp_path / "new")
    model = load(tmp_path / "new")
    ids = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = original_logits("internlm2", tensors, config, ids, torch.ones_like(ids, dtype=torch.bool))
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_chatglm2_divides_positions_by_its_rope_ratio(tmp_path):
    config, tensors = write_original(tmp_path / "old", "chatglm2", rope_ratio=4)
    convert(tmp_path / "old", tmp_path / "new", "chatglm2")
    ids, mask = probe_rows(load(tmp_path / "new").config)
    expected = original_logits("chatglm2", tensors, config, ids, mask)
    found = load(tmp_path / "new")(input_ids=ids, attention_mask=mask.long()).logits
    torch.testing.assert_close(found[mask], expected[mask], atol=1e-5, rtol=1e-5)
    other = original_logits("chatglm3", tensors, config, ids, mask)
    assert (other - expected)[mask].abs().max() > 0.1


def test_early_qwen_names_in_the_config_are_read(tmp_path):
    early = {"n_embd": 96, "n_layer": 2, "n_head": 4, "ffn_hidden_size": 320, "n_positions": 64, "vocab_size": 300}
    late = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "seq_length")
    kept = {name: value for name, value in CONFIGS["qwen"].items() if name not in late}
    folder = tmp_path / "old"
    write_original(folder, "qwen")
    config = kept | early | {"padded_vocab_size": 320}
    (folder / "config.json").write_text(json.dumps(config))
    assert any("verified" in line for line in convert(folder, tmp_path / "new", verify=True))


def test_bfloat16_stays_bfloat16_and_another_precision_is_written_on_demand(tmp_path):
    write_original(tmp_path / "old", "baichuan2-7b", "bin", dtype=torch.bfloat16)
    for dtype, expected in ((None, torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)):
        target = tmp_path / str(dtype)
        lines = convert(tmp_path / "old", target, "baichuan2-7b", dtype=dtype, verify=True)
        assert "verified against the original forward pass" in lines[-2]
        assert AutoModelForCausalLM.from_pretrained(target).dtype == expected
    head = load(tmp_path / "float32").lm_head.weight
    torch.testing.assert_close(head.norm(dim=1), torch.ones(len(head)), atol=1e-5, rtol=0)


def test_verification_finds_a_wrong_weight(tmp_path):
    config, _ = write_original(tmp_path / "old", "internlm2")
    convert(tmp_path / "old", tmp_path / "new")
    model = load(tmp_path / "new")
    model.model.layers[1].self_attn.k_proj.weight.data[0] *= 1.5
    model.save_pretrained(tmp_path / "new")
    with pytest.raises(ValueError, match="differs from the original"):
        compare_logits(tmp_path / "old", config, FAMILIES["internlm2"], tmp_path / "new", None)


def test_the_written_files_keep_to_the_shard_size_and_the_index_names_them_all(tmp_path):
    write_original(tmp_path / "old", "baichuan-7b", shards=4)
    convert(tmp_path / "old", tmp_path / "new", "baichuan-7b", max_shard_size="0.1MB")
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "new").glob("*.safetensors"))
    assert set(index["weight_map"].values()) == {file.name for file in files} and len(files) > 3
    for file in files:
        with safe_open(file, "pt") as opened:
            sizes = [opened.get_tensor(name).nbytes for name in opened.keys()]
        assert len(sizes) == 1 or sum(sizes) <= 100_000
    config, tensors = write_original(tmp_path / "again", "baichuan-7b")
    ids, mask = probe_rows(load(tmp_path / "new").config)
    found = load(tmp_path / "new")(input_ids=ids, attention_mask=mask.long()).logits
    expected = original_logits("baichuan-7b", tensors, config, ids, mask)
    torch.testing.assert_close(found[mask], expected[mask], atol=1e-5, rtol=1e-5)


def test_memory_holds_about_a_shard_and_not_the_model(tmp_path):
    """Eight shards of 24 MB: the peak beyond the libraries stays below half of the whole."""
    code = """
import json, resource, sys
from pathlib import Path
import torch
from suwen.conversion.families import FAMILIES
from suwen.conversion.weights import convert_weights, plan_weights
folder = Path(sys.argv[1]); (folder / "new").mkdir(parents=True)
for i in range(8):
    torch.save({f"model.layers.{i}.self_attn.W_pack.weight": torch.zeros(3000, 2000)},
               folder / f"pytorch_model-{i + 1:05d}-of-00008.bin")
family, config = FAMILIES["baichuan-7b"], {}
plan = plan_weights(family, config, folder)
def now():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
before, peak = now(), 0
import suwen.conversion.weights as weights
flush = weights.ShardWriter._flush
def watched(self):
    global peak
    peak = max(peak, now()); flush(self)
weights.ShardWriter._flush = watched
convert_weights(family, config, plan, folder / "new", None, 24_000_000, {})
print(peak - before)
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(result.stdout) < 96e6


def test_a_tensor_that_the_table_does_not_know_stops_the_conversion(tmp_path):
    _, tensors = write_original(tmp_path / "old", "xverse", "bin", shards=1)
    torch.save(tensors | {"model.layers.0.extra.weight": torch.ones(2)}, tmp_path / "old" / "pytorch_model.bin")
    (tmp_path / "old" / "pytorch_model.bin.index.json").unlink()
    (tmp_path / "old" / "pytorch_model-00001-of-00001.bin").unlink()
    with pytest.raises(ValueError, match="1 tensors are unknown to the table of xverse, such as model.layers.0.extra"):
        convert(tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".new*"))


def test_incomplete_and_unsafe_checkpoints_are_refused(tmp_path):
    write_original(tmp_path / "old", "yi", "bin")
    next((tmp_path / "old").glob("*00002*")).unlink()
    with pytest.raises(ValueError, match="found no pytorch_model-00002-of-00003.bin"):
        convert(tmp_path / "old", tmp_path / "new")
    (tmp_path / "old" / "pytorch_model.bin.index.json").unlink()
    with pytest.raises(ValueError, match="found 2 weight files, expected 3"):
        find_shards(tmp_path / "old")
    torch.save({"x": Path("runs code")}, tmp_path / "evil.bin")
    with pytest.raises(ValueError, match="holds more than tensors"):
        Shard(tmp_path / "evil.bin")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged"):
        Shard(tmp_path / "broken.safetensors")


def test_a_missing_tensor_and_a_wrong_shape_are_named(tmp_path):
    write_original(tmp_path / "old", "qwen", num_hidden_layers=2)
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    (tmp_path / "old" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match="nothing in the checkpoint becomes model.layers.2"):
        convert(tmp_path / "old", tmp_path / "new")
    (tmp_path / "old" / "config.json").write_text(json.dumps(config | {"intermediate_size": 200}))
    with pytest.raises(ValueError, match=r"shape \[160, 96\], the config asks for \[100, 96\]"):
        convert(tmp_path / "old", tmp_path / "new")
    (tmp_path / "old" / "config.json").write_text(json.dumps(config | {"rotary_pct": 0.5}))
    with pytest.raises(ValueError, match="rotary_pct is 0.5, expected 1.0"):
        convert(tmp_path / "old", tmp_path / "new")


def test_alibi_survives_saving_and_refuses_an_attention_that_would_drop_it(tmp_path):
    write_original(tmp_path / "old", "baichuan-13b")
    convert(tmp_path / "old", tmp_path / "new", "baichuan-13b")
    model = load(tmp_path / "new")
    ids = torch.randint(3, 300, (1, 20), generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=0, rtol=0)
    swapped = ids.clone()
    swapped[0, [3, 4]] = ids[0, [4, 3]]  # without positions, the order of earlier tokens would not matter
    assert (model(ids).logits[0, -1] - model(swapped).logits[0, -1]).abs().max() > 1e-3
    again.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="would drop the ALiBi positions"):
        again(ids)


def test_alibi_rows_that_are_packed_do_not_see_each_other(tmp_path):
    write_original(tmp_path / "old", "baichuan2-13b")
    convert(tmp_path / "old", tmp_path / "new", "baichuan2-13b")
    model = load(tmp_path / "new")
    ids = torch.randint(3, 300, (1, 20), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[*range(8), *range(12)]])
    packed = model(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed[:, 8:], model(ids[:, 8:]).logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed[:, :8], model(ids[:, :8]).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "module", "parts"),
    [
        ("baichuan2-7b", "model.layers.{}.self_attn.W_pack", "qkv"),
        ("internlm2", "model.layers.{}.attention.wqkv", "qkv"),
        ("qwen", "transformer.h.{}.attn.c_attn", "qkv"),
        ("chatglm2", "transformer.encoder.layers.{}.self_attention.query_key_value", "qkv"),
        ("baichuan-13b", "model.layers.{}.self_attn.W_pack", None),
    ],
)
def test_an_adapter_on_fused_projections_becomes_one_on_their_parts(family, module, parts, tmp_path):
    from peft import PeftModel

    config, tensors = write_original(tmp_path / "old", family)
    convert(tmp_path / "old", tmp_path / "base", family)
    generator = torch.Generator().manual_seed(5)
    adapter, rank, alpha = {}, 4, 8
    for i in range(2):
        weight = tensors[f"{module.format(i)}.weight"]
        a = torch.randn(rank, weight.shape[1], generator=generator) / 8
        b = torch.randn(weight.shape[0], rank, generator=generator) / 8
        adapter |= {f"base_model.model.{module.format(i)}.lora_{k}.weight": m for k, m in (("A", a), ("B", b))}
        tensors[f"{module.format(i)}.weight"] = weight + alpha / rank * b @ a
    folder = tmp_path / "lora"
    folder.mkdir()
    torch.save(adapter, folder / "adapter_model.bin")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0,
                "target_modules": [module.rsplit(".", 1)[-1]], "base_model_name_or_path": "old"}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    convert_lora(str(folder), str(tmp_path / "base"), str(tmp_path / "lora-new"), log=lambda line: None)

    written = json.loads((tmp_path / "lora-new" / "adapter_config.json").read_text())
    assert written["target_modules"] == ([f"{p}_proj" for p in sorted(parts)] if parts else ["W_pack"])
    model = PeftModel.from_pretrained(load(tmp_path / "base"), str(tmp_path / "lora-new")).eval()
    ids, mask = probe_rows(model.config)
    found = model(input_ids=ids, attention_mask=mask.long()).logits
    expected = original_logits(family, tensors, config, ids, mask)
    torch.testing.assert_close(found[mask], expected[mask], atol=2e-5, rtol=2e-5)


def test_an_adapter_on_a_normalised_head_is_refused(tmp_path):
    write_original(tmp_path / "old", "baichuan2-7b")
    convert(tmp_path / "old", tmp_path / "base", "baichuan2-7b")
    folder = tmp_path / "lora"
    folder.mkdir()
    torch.save({"base_model.model.lm_head.lora_B.weight": torch.ones(4, 2)}, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "target_modules": ["lm_head"]}))
    with pytest.raises(ValueError, match="normalised in the original"):
        convert_lora(str(folder), str(tmp_path / "base"), str(tmp_path / "new"))


def test_a_converted_folder_loads_without_this_project_and_one_of_its_own_classes_by_one_import(tmp_path):
    families = ("internlm2", "baichuan-13b")
    originals = {family: write_original(tmp_path / family, family) for family in families}
    for family in families:
        convert(tmp_path / family, tmp_path / f"{family}-new", family)
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM
def run(family):
    model = AutoModelForCausalLM.from_pretrained(family + "-new", dtype=torch.float32).eval()
    return model(torch.arange(3, 23)[None]).logits.detach()
plain = run("internlm2")
assert "suwen" not in sys.modules
sys.path.append({str(ROOT)!r})
import suwen.architectures
torch.save({{"internlm2": plain, "baichuan-13b": run("baichuan-13b")}}, "logits.pt")
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    found, ids = torch.load(tmp_path / "logits.pt", weights_only=True), torch.arange(3, 23)[None]
    for family, (config, tensors) in originals.items():
        expected = original_logits(family, tensors, config, ids, torch.ones_like(ids, dtype=torch.bool))
        torch.testing.assert_close(found[family], expected, atol=1e-5, rtol=1e-5)


def test_a_native_checkpoint_in_bin_files_becomes_safetensors(tmp_path):
    config = MistralConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                           num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model = MistralForCausalLM(config).eval()
    config.architectures = ["MistralForCausalLM"]
    config.save_pretrained(tmp_path / "old")
    torch.save(model.state_dict(), tmp_path / "old" / "pytorch_model.bin")
    convert(tmp_path / "old", tmp_path / "new")
    ids = torch.arange(10)[None]
    torch.testing.assert_close(load(tmp_path / "new")(ids).logits, model(ids).logits, atol=0, rtol=0)


def run_command(command: str) -> None:
    """Run what a message tells the user to run, in this process."""
    python, script, *words = shlex.split(command)
    assert (python, script) == ("python", "tools/convert_checkpoint.py")
    convert_tool.main(words)


def write_llama(folder: Path, sentencepiece_model: bytes) -> tuple[dict, dict]:
    """A native LLaMA as it was shared in 2023: weights in .bin, a bare tokenizer.model."""
    config = LlamaConfig(vocab_size=len(read_pieces(sentencepiece_model)), hidden_size=32, intermediate_size=48,
                         num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2,
                         architectures=["LlamaForCausalLM"])  # fmt: skip
    torch.manual_seed(0)
    weights = LlamaForCausalLM(config).state_dict()
    config.save_pretrained(folder)
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    torch.save(weights | buffers, folder / "pytorch_model.bin")
    write_llama_tokenizer(folder, sentencepiece_model)
    return config, weights


def write_llama_tokenizer(folder: Path, sentencepiece_model: bytes) -> None:
    (folder / "tokenizer.model").write_bytes(sentencepiece_model)
    names = {name: {"__type": "AddedToken", "content": token} for name, token in
             (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))}  # fmt: skip
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False} | names
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def read_pieces(model: bytes) -> list[str]:
    processor = SentencePieceProcessor(model_proto=model)
    return [processor.id_to_piece(i) for i in range(processor.get_piece_size())]


def write_old_lora(folder: Path, shapes: dict[str, tuple[int, int]], seed: int, full: dict | None = None) -> dict:
    """A LoRA in the files of PEFT 0.2; returns what it adds to each weight."""
    generator = torch.Generator().manual_seed(seed)
    rank, alpha = 4, 8
    tensors = {f"base_model.model.{name}": value for name, value in (full or {}).items()}
    tensors["base_model.model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    changes = {}
    for name, (rows, columns) in shapes.items():
        a, b = (torch.randn(size, generator=generator) / 6 for size in ((rank, columns), (rows, rank)))
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
        changes[name] = alpha / rank * b @ a
    folder.mkdir()
    torch.save(tensors, folder / "adapter_model.bin")
    modules = sorted({name.split(".")[-2] for name in shapes})
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": float(alpha), "bias": "none",
                "lora_dropout": 0.05, "target_modules": modules, "enable_lora": None, "merge_weights": False,
                "fan_in_fan_out": False, "inference_mode": True, "base_model_name_or_path": "elsewhere/llama-7b-hf",
                "modules_to_save": ["embed_tokens", "lm_head"] if full else None}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return changes


def test_a_native_llama_with_bin_weights_and_a_bare_sentencepiece_model_is_converted_by_the_command_named(tmp_path):
    """Chinese-LLaMA's vocabulary, which transformers' own conversion at loading would cut otherwise."""
    from suwen.models import load_tokenizer

    vocabulary = merged_sentencepiece()
    _, weights = write_llama(tmp_path / "old", vocabulary)
    with pytest.raises(ValueError, match="found tokenizer.model without tokenizer.json.*convert once: ") as refusal:
        load_tokenizer(str(tmp_path / "old"))
    with pytest.raises(ValueError, match="found pytorch_model.bin, expected .*convert once: ") as other:
        require_model(str(tmp_path / "old"))
    command = str(refusal.value).partition("convert once: ")[2]
    assert str(other.value).endswith(command)
    run_command(command)

    tokenizer = load_tokenizer(str(tmp_path / "old-converted"))
    original = SentencePieceProcessor(model_proto=vocabulary)
    for line in list(sample_texts())[600:800]:
        assert tokenizer(line).input_ids == [tokenizer.bos_token_id, *original.encode(line)]
    for name, tensor in load(tmp_path / "old-converted").state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def test_the_route_from_old_llama_files_over_two_adapters_to_a_merged_model(tmp_path, capsys):
    """QiZhen's: LLaMA, the LoRA that enlarges its vocabulary, a medical LoRA; all in .bin files."""
    import merge_peft_adapter
    from suwen.lineage import adapter_shapes
    from suwen.models import load_tokenizer

    config, weights = write_llama(tmp_path / "base", first_sentencepiece())
    attention = {f"model.layers.{i}.self_attn.{part}_proj.weight": (32, 32) for i in range(2) for part in "qkvo"}
    rows = len(read_pieces(merged_sentencepiece()))
    assert rows > config.vocab_size
    generator = torch.Generator().manual_seed(7)
    tables = {
        name: torch.randn(rows, 32, generator=generator) / 5 for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    changes = [
        write_old_lora(tmp_path / "chinese", attention, 1, full=tables),
        write_old_lora(tmp_path / "medical", {name: size for name, size in attention.items() if "q_" in name}, 2),
    ]
    write_llama_tokenizer(tmp_path / "chinese", merged_sentencepiece())

    convert(tmp_path / "base", tmp_path / "base-converted")
    for name in ("chinese", "medical"):
        with pytest.raises(ValueError, match="found adapter_model.bin.*convert once: ") as refusal:
            adapter_shapes(str(tmp_path / name))
        command = str(refusal.value).partition("convert once: ")[2]
        run_command(command.replace("elsewhere/llama-7b-hf", str(tmp_path / "base-converted")))
    adapters = f"{tmp_path / 'chinese-converted'},{tmp_path / 'medical-converted'}"
    merge_peft_adapter.main(["--lora_model", adapters, "--output_dir", str(tmp_path / "merged"), "--use_cpu"])
    assert "the proof holds" in capsys.readouterr().out

    config.vocab_size = rows
    expected = LlamaForCausalLM(config).eval()
    sums = {name: sum((change[name] for change in changes if name in change), weights[name]) for name in weights}
    expected.load_state_dict(sums | tables)
    ids = torch.randint(3, rows, (2, 20), generator=generator)
    torch.testing.assert_close(load(tmp_path / "merged")(ids).logits, expected(ids).logits, atol=1e-5, rtol=1e-5)
    tokenizer, original = (
        load_tokenizer(str(tmp_path / "merged")),
        SentencePieceProcessor(model_proto=merged_sentencepiece()),
    )
    line = "患者出现反复性感染，people with esophagus cancer"
    assert tokenizer(line).input_ids == [tokenizer.bos_token_id, *original.encode(line)]


def test_an_adapter_needs_a_base_that_loads(tmp_path):
    write_original(tmp_path / "old", "internlm2")
    (tmp_path / "lora").mkdir()
    with pytest.raises(ValueError, match="--base_model .*old: found neither the conversion.json"):
        convert_lora(str(tmp_path / "lora"), str(tmp_path / "old"), str(tmp_path / "new"))


@pytest.mark.parametrize(
    "flags", [["--verify", "True"], ["--dtype", "float16"], ["--family", "qwen"], ["--max_shard_size", "1GB"]]
)
def test_flags_for_models_are_refused_with_an_adapter(flags, tmp_path):
    words = ["--model_name_or_path", str(tmp_path), "--base_model", "base", "--output_dir", str(tmp_path / "new")]
    with pytest.raises(ValueError, match=f"{flags[0]}: is for models, found it with --base_model"):
        convert_tool.main([*words, *flags])


def test_a_converted_chat_model_stops_at_its_own_tokens_and_answers_through_the_toolkit(tmp_path):
    model = train_sentencepiece(user_defined_symbols=("<|im_start|>", "<|im_end|>"))
    write_original(tmp_path / "old", "internlm2", "bin", vocab_size=2528)
    (tmp_path / "old" / "tokenizer.model").write_bytes(model)
    settings = {"tokenizer_class": "InternLM2Tokenizer", "auto_map": {"AutoTokenizer": ["x.Y", None]}}
    (tmp_path / "old" / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "old" / "generation_config.json").write_text(json.dumps({"top_p": 0.8, "chat_format": "raw"}))
    convert(tmp_path / "old", tmp_path / "new", verify=True)
    tokenizer = load_tokenizer(str(tmp_path / "new"), "auto")
    encoder = ChatEncoder(tokenizer)
    loaded = load_causal_lm(str(tmp_path / "new")).eval()
    assert set(encoder.stop_token_ids) <= set(loaded.generation_config.eos_token_id)
    assert loaded.generation_config.top_p == 0.8
    prompt = torch.tensor([encoder.encode_prompt([{"role": "user", "content": "发热怎么办？"}])])
    assert loaded.generate(prompt, max_new_tokens=3, min_new_tokens=3).shape[1] == prompt.shape[1] + 3


# Code of a checkpoint

CODE_MAP = {f"Auto{kind}": f"foreign.{kind}" for kind in ("Config", "Model", "ModelForCausalLM")}


def write_foreign(folder: Path, config: dict, settings: dict | None = None) -> Path:
    """A checkpoint with code of its own; the file that the code would leave if it ran."""
    marker = folder / "code_has_run"
    save_file({"w": torch.zeros(1)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "foreign.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    tiny_tokenizer().save_pretrained(folder)
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return marker


def refusal(load, *words: str) -> str:
    with pytest.raises(ValueError) as error:
        load(*words)
    assert "\n" not in str(error.value) and "trust_remote_code" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("config", "settings", "expected"),
    [
        (
            {"model_type": "foreign", "auto_map": CODE_MAP},
            None,
            "model_type 'foreign' needs code .*never runs; .*does not know it",
        ),
        ({"model_type": "vit", "auto_map": CODE_MAP}, None, "model_type 'vit' needs code from its folder, .*"),
        (RECOGNISED["internlm2"] | {"auto_map": CODE_MAP}, None, "needs code .*never runs; convert it: {command}"),
        ({"model_type": "llama"}, {"tokenizer_class": "Own"}, "class 'Own' needs code .*; convert .*: {command}"),
        (
            {"model_type": "llama", "auto_map": CODE_MAP},
            {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["foreign.Own", None]}},
            "class 'Own' needs code from its folder, which never runs; convert the checkpoint: {command}",
        ),
    ],
    ids=["model", "model of another kind", "model of a known family", "tokenizer", "tokenizer with code"],
)
def test_a_stage_refuses_a_folder_that_needs_its_code_in_one_line_and_never_runs_it(
    config, settings, expected, tmp_path, monkeypatch
):
    monkeypatch.setattr("builtins.input", lambda question="": "y")
    folder = tmp_path / "foreign"
    folder.mkdir()
    marker = write_foreign(folder, config, settings)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"instruction": "发热", "output": "就医"}) + "\n")
    words = ["--model_name_or_path", str(folder), "--train_file_dir", str(tmp_path / "rows.jsonl"), "--use_cpu"]
    words += ["--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache"), "--report_to", "none"]
    command = f"python tools/convert_checkpoint.py --model_name_or_path {folder} --output_dir {folder}-converted"
    assert re.search(expected.format(command=re.escape(command)) + "$", refusal(supervised_finetuning.main, words))
    assert not marker.exists()


def test_a_tokenizer_of_a_model_that_is_not_known_asks_nobody_whether_its_code_may_run(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda question="": "y")
    settings = {"auto_map": {"AutoTokenizer": ["foreign.Own", None]}}
    marker = write_foreign(tmp_path, {"model_type": "foreign"}, settings)
    assert f"--output_dir {tmp_path}-converted" in refusal(load_tokenizer, str(tmp_path))
    assert not marker.exists()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Puts a checkpoint where a download would have left it; the network is off."""
    monkeypatch.setattr("builtins.input", lambda question="": "y")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def put(name: str, *content: dict) -> Path:
        folder, commit = tmp_path / f"models--{name.replace('/', '--')}", "0" * 40
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(commit)
        (folder / "snapshots" / commit).mkdir(parents=True)
        return write_foreign(folder / "snapshots" / commit, *content)

    return put


def test_a_hub_name_that_needs_code_is_refused_with_the_way_to_convert_it(hub):
    name = "baichuan-inc/Baichuan2-13B-Chat"
    hub(name, RECOGNISED["baichuan2-13b"])  # its class is one of ours, which would not normalise the head
    command = (
        f"hf download {name} --local-dir models/Baichuan2-13B-Chat && python tools/convert_checkpoint.py "
        "--model_name_or_path models/Baichuan2-13B-Chat --output_dir models/Baichuan2-13B-Chat-converted"
    )
    for load in (load_config, load_causal_lm, lambda name: load_base(name, torch.float32)):
        assert refusal(load, name) == (
            f"model {name!r}: needs code from its folder, which never runs; convert it: {command}"
        )
    marker = hub("who/foreign", {"model_type": "foreign", "auto_map": CODE_MAP})
    assert "model_type 'foreign' needs code" in refusal(load_config, "who/foreign")
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["foreign.Own", None]}}
    other = hub("who/tokenizer", {"model_type": "llama"}, settings)
    assert "hf download who/tokenizer --local-dir models/tokenizer && " in refusal(load_tokenizer, "who/tokenizer")
    assert not marker.exists() and not other.exists()


def test_a_hub_name_that_needs_no_code_is_read_and_one_that_cannot_be_fetched_is_said_to_be(hub):
    hub("who/plain", {"model_type": "llama", "hidden_size": 64})
    assert load_config("who/plain").hidden_size == 64
    assert load_tokenizer("who/plain").eos_token == "</s>"
    assert "couldn't connect" in refusal(load_config, "who/absent")


def test_a_hub_out_of_reach_is_asked_once_and_what_was_downloaded_is_read(hub, monkeypatch, capsys):
    """Its client would try each file six times, half a minute long."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    ask_hub.cache_clear()
    hub("who/plain", {"model_type": "llama", "hidden_size": 64})
    started = time.monotonic()
    assert load_config("who/plain").hidden_size == 64
    assert load_tokenizer("who/plain").eos_token == "</s>"
    assert "couldn't connect" in refusal(load_config, "who/absent")
    assert time.monotonic() - started < 20
    assert capsys.readouterr().out.count("note: http://127.0.0.1:1 cannot be reached ([Errno 111]") == 1


def test_the_memory_plan_of_an_original_on_the_hub_is_that_of_its_converted_model(hub):
    from tools.plan_memory import load_config as config_to_plan

    hub("Qwen/Qwen-7B", RECOGNISED["qwen"])
    assert config_to_plan("Qwen/Qwen-7B").model_type == "qwen2"
    marker = hub("who/foreign", {"model_type": "foreign", "auto_map": CODE_MAP})
    assert "model_type 'foreign' needs code" in refusal(config_to_plan, "who/foreign")
    assert not marker.exists()


def test_every_class_that_could_run_code_of_a_checkpoint_is_told_not_to():
    for file in [*ROOT.glob("*.py"), *ROOT.glob("suwen/**/*.py"), *ROOT.glob("tools/*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr in ("from_pretrained", "from_config") and "Auto" in ast.unparse(node.func):
                given = "trust_remote_code=False" in ast.unparse(node) or any(k.arg is None for k in node.keywords)
                assert given, f"{file}:{node.lineno}"


def test_a_native_checkpoint_whose_tokenizer_needs_code_gets_one_that_needs_none(tmp_path):
    (tmp_path / "old").mkdir()
    config = MistralConfig(vocab_size=600, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                           num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["foreign.Own", None]}, "eos_token": "</s>"}
    marker = write_foreign(tmp_path / "old", config.to_dict(), settings)
    MistralForCausalLM(config).save_pretrained(tmp_path / "old")
    convert(tmp_path / "old", tmp_path / "new")
    text = "高血压患者应当低盐饮食。"
    assert load_tokenizer(str(tmp_path / "new"))(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]
    assert not marker.exists()


def test_every_tensor_of_every_family_has_exactly_one_rule():
    for name, config in CONFIGS.items():
        for tensor in shapes(name, config):
            assert find_rule(FAMILIES[name], tensor) is not None, (name, tensor)
        assert find_rule(FAMILIES[name], "model.layers.x.mlp.gate_proj.weight") is None


def test_the_tool_reads_the_sample_and_keeps_to_the_shard_size(tmp_path, monkeypatch, capsys):
    write_original(tmp_path / "old", "baichuan-7b")
    (tmp_path / "old" / "tokenizer.model").write_bytes(train_sentencepiece())
    sample = tmp_path / "sample.txt"
    sample.write_text("头痛三天，伴恶心。\n无发热。\n咳嗽。\n", encoding="utf-8")
    common = ["--model_name_or_path", str(tmp_path / "old"), "--family", "baichuan-7b"]

    def agreeing(name: str, *more: str) -> int:
        convert_tool.main([*common, "--output_dir", str(tmp_path / name), *more])
        return int(re.search(r"(\d+) lines agree", capsys.readouterr().out)[1])

    plain = agreeing("plain")
    assert agreeing("tried", "--sample_file", str(sample), "--max_shard_size", "0.1MB") == plain + 3
    assert len(list((tmp_path / "plain").glob("*.safetensors"))) == 1
    assert len(list((tmp_path / "tried").glob("*.safetensors"))) > 3
    sample.write_bytes("高血压".encode("gbk"))
    with pytest.raises(ValueError, match="--sample_file .*sample.txt: .* expected UTF-8 text"):
        agreeing("new", "--sample_file", str(sample))


def test_the_tool_answers_mistakes_in_one_line(tmp_path):
    def call(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "tools/convert_checkpoint.py", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    found = call("--model_name_or_path", str(tmp_path / "none"), "--output_dir", str(tmp_path / "new"))
    assert found.returncode == 2 and "found no such folder" in found.stderr and found.stderr.count("\n") == 1
    assert "--verify" in call("--help").stdout


def test_a_config_that_does_not_hold_together_is_one_line(tmp_path):
    settings = {"model_type": "llama", "hidden_size": 33, "num_attention_heads": 4, "vocab_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "model.safetensors").touch()
    for load_it in (load_config, plan_memory.load_config):
        with pytest.raises(ValueError, match=r"config.json: ValueError: The hidden size \(33\)") as error:
            load_it(str(tmp_path))
        assert "\n" not in str(error.value)

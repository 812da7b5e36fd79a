"""Every model family goes through every step; LoRA finds its layers under old names and new."""

import pytest
import torch
from old_checkpoints import write_original
from transformers import AutoModelForCausalLM

from benchmarks.family_matrix import FAMILIES, STEPS, run_family, write_model
from suwen.conversion.convert import convert_checkpoint
from suwen.lora_targets import lora_targets

OFTEN = ("mixtral", "baichuan-13b", "chatglm")  # a native mixture of experts and the two classes of our own


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.training if name in OFTEN else pytest.mark.slow) for name in FAMILIES],
)
def test_a_family_is_pretrained_tuned_quantised_aligned_merged_and_asked(name, tmp_path):
    assert run_family(name, tmp_path) == dict.fromkeys(STEPS, "yes")


def build(name: str, folder):
    write_model(FAMILIES[name], folder)
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"),
        ("glm", "down_proj gate_up_proj k_proj o_proj q_proj v_proj"),
        ("bloom", "dense dense_4h_to_h dense_h_to_4h query_key_value"),
        ("mixtral", "k_proj o_proj q_proj v_proj"),
        ("deepseek_v3", "down_proj gate_proj kv_a_proj_with_mqa kv_b_proj o_proj q_a_proj q_b_proj up_proj"),
        ("baichuan-13b", "W_pack down_proj gate_proj o_proj up_proj"),
        ("chatglm", "dense dense_4h_to_h dense_h_to_4h query_key_value"),
    ],
)
def test_all_means_every_linear_layer_but_the_head(name, expected, tmp_path):
    model = build(name, tmp_path)
    assert lora_targets(model, "all") == lora_targets(model, "all-linear") == expected.split()
    for target in expected.split():
        found = [module for path, module in model.named_modules() if path.rsplit(".", 1)[-1] == target]
        assert found and all(isinstance(module, torch.nn.Linear) for module in found)


@pytest.mark.parametrize(
    ("family", "fused"),
    [("baichuan2-7b", "W_pack"), ("internlm2", "wqkv"), ("qwen", "c_attn"), ("chatglm2", "query_key_value")],
)
def test_the_fused_names_of_old_launchers_mean_their_parts_after_the_conversion(family, fused, tmp_path):
    write_original(tmp_path / "old", family)
    convert_checkpoint(str(tmp_path / "old"), str(tmp_path / "new"), family, log=lambda line: None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert lora_targets(model, f"{fused},o_proj") == ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_a_fused_name_stays_where_the_model_has_it_and_an_unknown_one_is_refused(tmp_path):
    model = build("bloom", tmp_path)
    assert lora_targets(model, "query_key_value") == ["query_key_value"]
    with pytest.raises(ValueError, match="--target_modules: found q_proj, expected names of this model: dense, "):
        lora_targets(model, "q_proj")

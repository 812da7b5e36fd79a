"""Every model family goes through every step; LoRA finds its layers under old names and new."""

import pytest
import torch
from old_checkpoints import train_sentencepiece, write_original
from transformers import AutoModelForCausalLM

import inference
import merge_peft_adapter
import supervised_finetuning
from benchmarks.family_matrix import FAMILIES, STEPS, run_family, write_model
from suwen.conversion.convert import convert_checkpoint
from suwen.lora_targets import lora_targets
from suwen.models import load_tokenizer
from tools import convert_checkpoint as convert_tool
from tools import extend_vocabulary

# Two native mixtures of experts and the two classes of our own
OFTEN = ("mixtral", "deepseek_v3", "baichuan-13b", "chatglm")


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
        ("deepseek_v3", "kv_a_proj_with_mqa kv_b_proj o_proj q_a_proj q_b_proj"),  # see TAKEN_FOR_EXPERTS
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


def test_names_that_peft_takes_for_experts_are_refused(tmp_path):
    model = build("deepseek_v3", tmp_path)
    assert any(name.endswith("shared_experts.down_proj") for name, _ in model.named_modules())
    with pytest.raises(ValueError, match="--target_modules: down_proj are stacked experts to PEFT here, expected some"):
        lora_targets(model, "o_proj,down_proj")


def test_a_fused_name_stays_where_the_model_has_it_and_an_unknown_one_is_refused(tmp_path):
    model = build("bloom", tmp_path)
    assert lora_targets(model, "query_key_value") == ["query_key_value"]
    with pytest.raises(ValueError, match="--target_modules: found q_proj, expected names of this model: dense, "):
        lora_targets(model, "q_proj")


@pytest.mark.slow
def test_an_old_model_is_converted_extended_tuned_in_4_bits_merged_and_chats(tmp_path, capsys):
    symbols = ("<reserved_106>", "<reserved_107>")  # of Baichuan2's template
    model = train_sentencepiece(user_defined_symbols=symbols, add_dummy_prefix=False)
    sizes = {"vocab_size": 2560, "max_position_embeddings": 512, "model_max_length": 512}
    write_original(tmp_path / "old", "baichuan2-7b", "bin", **sizes)
    (tmp_path / "old" / "tokenizer.model").write_bytes(model)
    convert = ["--model_name_or_path", str(tmp_path / "old"), "--family", "baichuan2-7b", "--verify"]
    convert_tool.main([*convert, "--output_dir", str(tmp_path / "converted")])
    text = ["--train_file_dir", "data/pretrain", "--num_new_tokens", "40", "--min_frequency", "3"]
    extend_vocabulary.main(
        ["--model_name_or_path", str(tmp_path / "converted"), "--output_dir", str(tmp_path / "extended"), *text]
    )
    supervised_finetuning.main(
        ["--model_name_or_path", str(tmp_path / "extended"), "--output_dir", str(tmp_path / "sft"), "--use_cpu"]
        + ["--train_file_dir", "data/sft", "--template_name", "baichuan2", "--use_peft", "--quantization", "4bit"]
        + ["--max_steps", "4", "--max_length", "256", "--max_train_samples", "32", "--max_eval_samples", "2"]
        + ["--num_proc", "1", "--report_to", "none", "--save_strategy", "no", "--on_bad_rows", "skip"]
        + ["--cache_dir", str(tmp_path / "cache"), "--bf16", "False"]  # so that what is not trained stays as it is
    )
    merge_peft_adapter.main(["--lora_model", str(tmp_path / "sft"), "--output_dir", str(tmp_path / "merged")])
    questions, answers = tmp_path / "questions.txt", tmp_path / "answers.jsonl"
    questions.write_text("高血压怎么办？\n咳嗽做什么检查？\n", encoding="utf-8")
    inference.main(
        ["--base_model", str(tmp_path / "merged"), "--data_file", str(questions), "--output_file", str(answers)]
        + ["--max_new_tokens", "8", "--use_cpu"]
    )
    assert len(answers.read_text(encoding="utf-8").splitlines()) == 2
    rows = [load_tokenizer(str(tmp_path / name)) for name in ("converted", "extended", "merged")]
    assert len(rows[0]) < len(rows[1]) == len(rows[2])
    assert "<reserved_106>" in rows[2].chat_template
    embedding = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").get_input_embeddings().weight
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "extended").get_input_embeddings().weight
    new = slice(len(rows[0]), len(rows[1]))
    assert (embedding[new] - before[new]).abs().max() > 0  # rows of new words were trained beside the adapter
    assert torch.equal(embedding[:100], before[:100])

"""The command line: our flags, the library's, and the names that older launchers hold."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import evaluation
import inference
from suwen.arguments import (
    OddsRatioArguments,
    PreferenceArguments,
    RewardArguments,
    parse_library_flags,
    parse_stage_arguments,
)
from suwen.command_line import check_output_file
from suwen.old_flags import translate_old_flags
from tools import build_data, build_dialogues, build_index, check_contamination, experiment

ROOT = Path(__file__).parents[1]


def parse(*words: str):
    return parse_stage_arguments(list(words), "sft", "", {})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["--torch_dtype", "bfloat16"], ["--dtype", "bfloat16"]),
        (["--evaluation_strategy=steps"], ["--eval_strategy", "steps"]),
        (["--warmup_ratio", "0.05"], ["--warmup_steps", "0.05"]),
        (["--overwrite_output_dir"], ["--resume", "never"]),
        (["--overwrite_output_dir", "False"], []),
        (["--load_in_4bit", "True"], ["--quantization", "4bit"]),
        (["--load_in_8bit"], ["--quantization", "8bit"]),
        (["--qlora", "True", "--load_in_4bit", "True"], ["--use_peft", "True", "--quantization", "4bit"]),
        (["--max_source_length", "256", "--max_target_length", "256"], ["--max_length", "512"]),
        (["--model_max_length", "512"], ["--max_length", "512"]),
        (["--block_size", "512"], ["--max_length", "512"]),
        (["--group_by_length"], ["--train_sampling_strategy", "group_by_length"]),
        (["--no_cuda"], ["--use_cpu"]),
        (["--resume_from_checkpoint", "True"], ["--resume", "auto"]),
        (["--resume_from_checkpoint", "out/checkpoint-5"], ["--resume", "out/checkpoint-5"]),
        (["--validation_split_percentage", "5"], ["--validation_split_fraction", "0.05"]),
        (["--neft_alpha", "5"], ["--neftune_noise_alpha", "5"]),
        (["--save_safetensors", "True"], []),
        (["--trust_remote_code", "False"], []),
        (["--streaming"], []),
        (["--flash_attn", "False"], []),
    ],
)
def test_an_old_flag_with_the_same_meaning_is_translated(old, new):
    assert translate_old_flags(old) == new


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--trust_remote_code", "True"], "never runs"),
        (["--save_safetensors", "False"], "safetensors"),
        (["--peft_path", "x"], "--model_name_or_path"),
        (["--flash_attn", "True"], "--attn_implementation"),
        (["--qlora", "True"], "--quantization 4bit"),
        (["--max_prompt_length", "5"], "--max_length"),
        (["--fp16_opt_level", "O1"], "--fp16"),
        (["--torch_dtype", "float16", "--dtype", "float32"], "mean the same"),
        (["--max_source_length", "many"], "number of tokens"),
    ],
)
def test_an_old_flag_without_equivalent_is_refused_with_what_to_do(words, expected):
    with pytest.raises(ValueError, match=expected):
        translate_old_flags(words)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--quantization", "3bit"], "--quantization.*3bit"),
        (["--quantization", "gptq"], "^--quantization: found gptq, which is neither trained nor exported.*newer torch"),
        (["--quantization", "awq"], "^--quantization: found awq, .*no longer kept up; expected 8bit or 4bit"),
        (["--quantization=GGUF"], "^--quantization: found GGUF, .*convert_hf_to_gguf"),
        (["--quantization", "4bit"], "--use_peft"),
        (["--packing", "maybe"], "--packing.*maybe.*True or False"),
        (["--max_length", "x"], "--max_length"),
        (["--max_length", "2"], "at least 8"),
        (["--validation_split_fraction", "1.5"], "0 to below 1"),
        (["--num_proc", "0"], "at least 1"),
        (["--lora_rank", "0"], "at least 1"),
        (["--lora_dropout", "1"], "below 1"),
        (["--pure_bf16", "--use_peft"], "--pure_bf16"),
    ],
)
def test_a_wrong_value_is_named_with_its_flag(words, expected):
    with pytest.raises(ValueError, match=expected):
        parse(*words)


def test_switches_work_bare_and_with_a_value():
    assert parse("--use_peft").lora.use_peft
    assert not parse("--packing", "False").data.packing
    assert parse("--use_peft=True").lora.use_peft


@pytest.mark.parametrize(
    ("before", "words", "after"),
    [
        (None, [], "0"),
        ("2,3", [], "2"),
        (None, ["--use_cpu"], ""),
        ("2,3", ["--no_cuda", "True"], ""),
        ("2,3", ["--use_cpu", "False"], "2"),
        ("2,3", ["--use_cpu", "True", "--use_cpu", "False"], "2"),
        ("2,3", ["--use_cpu", "False", "--use_cpu=t"], ""),
    ],
)
def test_one_process_sees_one_gpu_and_on_the_cpu_none(before, words, after, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if before is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    parse(*words)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == after


def test_library_flags_keep_only_what_was_given():
    args = parse("--learning_rate", "1e-3", "--max_steps", "4", "--lora_rank", "4")
    assert args.lora.lora_rank == 4
    assert parse_library_flags(args) == {"learning_rate": 1e-3, "max_steps": 4}


def test_an_unknown_flag_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="'--lerning_rate'; did you mean --learning_rate"):
        parse_library_flags(parse("--lerning_rate", "1"))
    with pytest.raises(ValueError, match="--loss_typ.*did you mean --loss_type"):
        parse_library_flags(parse_stage_arguments(["--loss_typ", "ipo"], "dpo", "", {}, PreferenceArguments))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--per_device_train_batch_size 0", "found 0, expected more than 0"),
        ("--gradient_accumulation_steps 0", "found 0, expected more than 0"),
        ("--num_train_epochs -2", "found -2.0, expected more than 0"),
        ("--num_train_epochs nan", "found nan, expected more than 0"),
        ("--logging_steps 0", "found 0.0, expected more than 0"),
        ("--learning_rate -1", "found -1.0, expected 0 or more"),
        ("--max_grad_norm -1", "found -1.0, expected 0 or more"),
    ],
)
def test_a_number_that_the_library_would_divide_by_is_looked_at(words, expected):
    with pytest.raises(ValueError, match=f"{words.split()[0]}: {expected}"):
        parse_library_flags(parse(*words.split()))


def test_an_abbreviation_is_not_taken_for_a_flag():
    with pytest.raises(ValueError, match="unknown flag"):
        parse_library_flags(parse("--eval_strat", "no"))


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (evaluation, "--max_sample 1"),
        (inference, "--data_fil x"),
        (build_dialogues, "--api_base http://x --model x --coun 3"),
        (build_index, "--documents x --output_dir x --passage_character 9"),
        (experiment, "--exposure 5"),
    ],
)
def test_a_script_answers_half_a_name_with_the_whole_one(script, words):
    flag = words.split()[-2]
    with pytest.raises(ValueError, match=f"unknown flag or value '{flag}'; did you mean {flag}."):
        script.parse_arguments(words.split())


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (evaluation, "--base_model x --tasks facts --output_dir"),
        (evaluation, "--compare x --output_dir"),
        (inference, "--base_model x --data_file data/evaluation/facts.jsonl --output_file"),
        (build_data, "--output_dir"),
        (build_dialogues, "--api_base http://127.0.0.1:1/v1 --model x --output_file"),
        (build_index, "--documents README.md --output_dir"),
        (check_contamination, "--tasks facts --train_file_dir data/sft --output_dir"),
        (experiment, "--output_dir"),
    ],
)
def test_what_cannot_be_written_is_told_before_the_work(script, words, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"^--output_(dir|file) {tmp_path}/file/out: cannot be written to"):
        script.main([*words.split(), f"{tmp_path}/file/out" + ("/a.jsonl" if words.endswith("file") else "")])


def test_a_folder_is_no_file_of_answers(tmp_path):
    with pytest.raises(ValueError, match=f"--output_file {tmp_path}: found a folder, expected a file"):
        check_output_file(tmp_path)


def test_a_bare_switch_means_yes():
    assert parse_library_flags(parse("--bf16", "--do_train", "--tf32", "False")) == {
        "bf16": True,
        "do_train": True,
        "tf32": False,
    }


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--beta", "0"], "--beta: found 0.0, expected a positive"),
        (["--label_smoothing", "0.5"], "--label_smoothing: found 0.5"),
        (["--label_smoothing", "0.1", "--loss_type", "ipo"], "has no meaning for --loss_type ipo"),
        (["--sft_weight", "-1"], "--sft_weight: found -1.0"),
        (["--loss_type", "kto"], "--loss_type: invalid choice"),
        (["--loss_weights", "1"], "--sft_weight"),
    ],
)
def test_preference_settings_that_cannot_be_are_refused(words, expected):
    with pytest.raises(ValueError, match=expected):
        parse_stage_arguments(words, "dpo", "", {}, PreferenceArguments)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--centering", "-1"], "--centering: found -1.0, expected 0 or more"),
        (["--margin_scale", "nan"], "--margin_scale: found nan"),
    ],
)
def test_reward_settings_that_cannot_be_are_refused(words, expected):
    with pytest.raises(ValueError, match=expected):
        parse_stage_arguments(words, "rm", "", {}, RewardArguments)


def test_the_weight_of_the_odds_ratio_is_known_by_its_old_name():
    parsed = parse_stage_arguments(["--orpo_beta", "0.2"], "orpo", "", {}, OddsRatioArguments)
    assert parsed.own.orpo_lambda == 0.2
    with pytest.raises(ValueError, match="--orpo_lambda: found -0.1, expected 0 or more"):
        parse_stage_arguments(["--orpo_lambda", "-0.1"], "orpo", "", {}, OddsRatioArguments)


def test_beta_follows_the_loss_unless_it_is_given():
    assert PreferenceArguments().beta == 0.1
    assert PreferenceArguments(loss_type="sigmoid_norm").beta == 5.0
    assert PreferenceArguments(loss_type="sigmoid_norm", beta=0.3).beta == 0.3


@pytest.mark.parametrize(
    "script",
    [
        "pretraining.py",
        "supervised_finetuning.py",
        "dpo_training.py",
        "reward_modeling.py",
        "orpo_training.py",
        "ppo_training.py",
    ],
)
def test_help_needs_nothing_but_the_standard_library(script):
    began = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", RUN_WITHOUT_PACKAGES, str(ROOT / script)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "--train_file_dir" in result.stdout and "--learning_rate" in result.stdout
    assert time.monotonic() - began < 30


RUN_WITHOUT_PACKAGES = """
import runpy, sys, pathlib
script = sys.argv[1]
sys.path.insert(0, str(pathlib.Path(script).parent))
sys.argv = [script, "--help"]
runpy.run_path(script, run_name="__main__")
"""


def test_no_package_may_fetch_native_code_for_bitsandbytes(tmp_path):
    (tmp_path / "kernels.py").write_text("raise SystemExit('the package was imported')\n")
    code = "import suwen, importlib.util, bitsandbytes; assert importlib.util.find_spec('kernels') is None"
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")

"""A stage's plan before it runs: what a dry run says, what `auto` takes, and where the memory is read from."""

import dataclasses
import itertools
import json
import re
from pathlib import Path

import pytest
from processes import CONFIGS
from test_memory import SHAPE
from test_stages import SCRIPTS as STAGES
from test_stages import arguments, base, run_stage  # noqa: F401  (base is a fixture)
from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig, MixtralConfig

import ppo_training
from suwen import planning
from suwen.architectures.baichuan import BaichuanConfig
from suwen.architectures.chatglm import ChatGLMConfig
from suwen.arguments import parse_library_flags, parse_stage_arguments
from suwen.memory import SAFE_SHARE, Outlook, Setting, out_of_memory_advice, plan_memory, smaller_settings
from suwen.stage import COMMON, begin
from tools import plan_memory as tool

SCRIPTS = {**STAGES, "ppo": ppo_training}


def plan(capacity: float, **changes) -> Outlook:
    return Outlook(SHAPE, Setting(device="cpu", precision="fp32", **changes), capacity, "free")


# A dry run


@pytest.mark.training
@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_dry_run_says_what_the_run_would_be_and_writes_nothing(stage, base, tmp_path, capsys):  # noqa: F811
    words = arguments("sft" if stage == "ppo" else stage, base, tmp_path)
    words[words.index("--output_dir") + 1] = str(tmp_path / "none")
    more = ["--reward", "repetition=1.0", "--max_new_tokens", "8"] if stage == "ppo" else []
    assert SCRIPTS[stage].main([*words, *more, "--dry_run"]) is None
    said = capsys.readouterr().out
    assert "training: " in said and "encoded rows" in said
    assert re.search(r"peak +\d+\.\d+ MB|peak +\d+\.\d+ GB", said)
    assert "updates, each of" in said if stage == "ppo" else "optimiser steps over" in said
    assert said.splitlines()[-1].startswith("dry run: nothing was trained")
    assert not (tmp_path / "none").exists()


@pytest.mark.training
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_the_steps_of_a_dry_run_are_those_that_the_run_takes(stage, base, tmp_path, capsys):  # noqa: F811
    flags = ["--gradient_accumulation_steps", "4", "--num_train_epochs", "1"]
    SCRIPTS[stage].main(arguments(stage, base, tmp_path, *flags, "--dry_run"))
    promised = int(re.search(r"(\d+) optimiser steps over \d+ packed", capsys.readouterr().out)[1])
    assert run_stage(stage, base, tmp_path, *flags)["training"]["steps"] == promised > 1


@pytest.mark.training
def test_auto_recomputes_and_splits_the_step_where_memory_is_short_and_learns_the_same(base, tmp_path, monkeypatch):  # noqa: F811
    flags = ["--per_device_train_batch_size", "auto", "--gradient_accumulation_steps", "4", "--packing", "False"]
    flags += ["--max_steps", "5"]
    found, losses = {}, []
    for capacity in (1e12, 1.0):
        monkeypatch.setattr(planning, "memory_for_us", lambda cpu, size=capacity: (size, "for this test"))
        (folder := tmp_path / str(capacity)).mkdir()
        record = run_stage("sft", base, folder, *flags)
        library = record["arguments"]["library"]
        names = ("gradient_checkpointing", "per_device_train_batch_size", "gradient_accumulation_steps")
        found[capacity] = [library[name] for name in names]
        losses.append(record["evaluation"]["eval_loss"])
    assert found == {1e12: [False, 4, 1], 1.0: [True, 1, 4]}
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # the same rows in a step, drawn in another order


@pytest.mark.training
def test_a_dry_run_refuses_bad_flags_and_goes_on_without_a_plan(base, tmp_path, capsys, monkeypatch):  # noqa: F811
    wrong = ["--use_peft", "True", "--target_modules", "W_pack,nonsense", "--dry_run"]
    with pytest.raises(ValueError, match="--target_modules: found nonsense"):
        STAGES["sft"].main(arguments("sft", base, tmp_path, *wrong))

    def unknown(*args):
        raise AttributeError("hidden_size")

    monkeypatch.setattr(planning, "shape_of", unknown)
    STAGES["sft"].main(arguments("sft", base, tmp_path, "--dry_run", "--max_length", "auto"))
    said = capsys.readouterr().out
    assert "no memory plan: hidden_size" in said and "optimiser steps over" in said


# Every combination of flags

SMALL = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
FAMILIES = {
    "llama": LlamaConfig(**SMALL, intermediate_size=96, max_position_embeddings=64),
    "mixtral": MixtralConfig(**SMALL, intermediate_size=96, max_position_embeddings=64, num_key_value_heads=2,
                             num_local_experts=2),
    "bloom": BloomConfig(**SMALL, seq_length=64),
    "baichuan-13b": BaichuanConfig(**SMALL, intermediate_size=96, model_max_length=64),
    "chatglm-6b": ChatGLMConfig(**SMALL, inner_hidden_size=96, max_sequence_length=64),
}  # fmt: skip
ENGINES = {
    "one GPU": {},
    "ddp": {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(CONFIGS / "zero2.json")},
    "zero3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(CONFIGS / "zero3.json")},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"},
}


@pytest.mark.training
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_combination_of_flags_gives_a_plan_or_one_line_that_names_the_flag(family, engine, tmp_path, monkeypatch):
    """What a stage does before it loads a model, for all of these flags."""
    AutoModelForCausalLM.from_config(FAMILIES[family]).save_pretrained(tmp_path)
    for name, value in ENGINES[engine].items():
        monkeypatch.setenv(name, value)
    rotary = family in ("llama", "mixtral")
    kinds, scalings = ("none", "8bit", "4bit", "2bit"), (None, "linear", "yarn")
    for kind, peft, rope, shift in itertools.product(kinds, (False, True), scalings, (False, True)):
        given = {"--quantization": kind != "none", "--rope_scaling": bool(rope), "--shift_attn": shift}
        words = ["--model_name_or_path", str(tmp_path), "--train_file_dir", "none", "--dry_run", "--bf16", "False"]
        words += ["--max_length", "128" if rope else "64", "--use_peft", str(peft), "--quantization", kind]
        words += [*(["--rope_scaling", rope] if rope else []), "--shift_attn", str(shift)]
        refused = {
            "--quantization": not peft or engine == "zero3" or (engine == "fsdp2" and kind != "4bit"),
            "--rope_scaling": not rotary,
            "--shift_attn": not rotary,
        }
        expected = [name for name in given if given[name] and refused[name]]
        try:
            args = parse_stage_arguments(words, "sft", "", {})
            library = parse_library_flags(args)
            start, precision, _ = begin(args, library)
            values = {**COMMON, "gradient_checkpointing": True, **library}
            found = planning.outlook(args, values, precision, start, cpu=True)
        except ValueError as error:
            assert "\n" not in str(error) and expected and str(error).startswith(expected[0]), (words, error)
        else:
            assert not expected and found.total() > 0, words


# What auto takes


def test_checkpointing_is_chosen_exactly_where_the_plan_without_it_takes_too_much():
    needs = plan(0, gradient_checkpointing=False).total()
    assert planning.choose_checkpointing(plan(needs / SAFE_SHARE * 1.001))[0] is False
    on, line = planning.choose_checkpointing(plan(needs / SAFE_SHARE * 0.999))
    assert on is True and line.startswith("gradient checkpointing on: ") and "planned without it" in line


def test_the_micro_batch_divides_the_step_and_is_the_largest_that_fits():
    assert planning.choose_batch(plan(1e15), 12)[0] == 12
    assert planning.choose_batch(plan(1), 12)[0] == 1
    capacity = plan(0, batch=5, gradient_accumulation_steps=2).total() / SAFE_SHARE
    size, line = planning.choose_batch(plan(capacity), 12)
    assert size == 4 and "auto: 4, accumulated 3 times" in line


def test_the_length_is_the_longest_that_fits_up_to_the_window():
    assert planning.choose_length(plan(1e15), 3000)[0] == 3000
    capacity = plan(0, tokens=1500, gradient_checkpointing=True).total() / SAFE_SHARE
    assert planning.choose_length(plan(capacity), 3000)[0] == 1024


def test_a_word_that_is_no_number_is_refused_and_auto_stays_a_word():
    with pytest.raises(ValueError, match="--max_length: found 'much', expected int value or auto"):
        parse_stage_arguments(["--max_length", "much"], "sft", "", {})
    words = ["--per_device_train_batch_size", "auto", "--gradient_checkpointing", "auto", "--learning_rate", "1e-3"]
    args = parse_stage_arguments([*words, "--max_length", "auto"], "sft", "", {})
    library = parse_library_flags(args)
    assert library == {
        "per_device_train_batch_size": "auto", "gradient_checkpointing": "auto", "learning_rate": 1e-3,
    }  # fmt: skip
    assert args.data.max_length == "auto"
    with pytest.raises(ValueError, match="logging_steps"):
        parse_library_flags(parse_stage_arguments(["--logging_steps", "auto"], "sft", "", {}))


# The memory that there is


def test_limits_of_a_container_and_of_the_groups_above_it_are_read(tmp_path):
    group = tmp_path / "a" / "b"
    group.mkdir(parents=True)
    for folder, limit, used, cached in ((group, "max", 5, 0), (tmp_path / "a", "1000", 700, 300)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 4\nfile {cached}\n")
    own = tmp_path / "cgroup"
    own.write_text("1:name=systemd:/x\n0::/a/b\n")
    assert planning.cgroup_limits(True, str(tmp_path), str(own)) == [1000 - (700 - 300)]
    assert planning.cgroup_limits(False, str(tmp_path), str(own)) == [1000]
    own.write_text("1:name=systemd:/x\n")
    assert planning.cgroup_limits(True, str(tmp_path), str(own)) == []


def test_main_memory_is_what_linux_says_and_processes_share_it(tmp_path, monkeypatch):
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:       2000 kB\nMemFree:  10 kB\nMemAvailable:   1500 kB\n")
    assert planning.main_memory(True, str(file)) == 1500 * 1024
    assert planning.main_memory(False, str(file)) == 2000 * 1024
    assert planning.main_memory(True, str(tmp_path / "none")) > 1e8
    monkeypatch.setattr(planning, "main_memory", lambda free: 900.0 if free else 1200.0)
    monkeypatch.setattr(planning, "cgroup_limits", lambda free: [8000.0])
    assert planning.memory_for_us(cpu=True) == (900, "of main memory free")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert planning.memory_for_us(cpu=True) == (400, "of main memory, a share of 3 processes")


def test_sharding_is_read_from_the_launcher_and_from_a_deepspeed_file(tmp_path, monkeypatch):
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_CONFIG_FILE", "ACCELERATE_USE_FSDP", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert planning.sharding_of({}) == ("none", False, False)
    root = Path(__file__).parents[1] / "configs"
    assert planning.sharding_of({"deepspeed": str(root / "zero2.json")}) == ("zero2", False, False)
    assert planning.sharding_of({"deepspeed": str(root / "zero2_offload.json")}) == ("zero2", True, False)
    assert planning.sharding_of({"deepspeed": str(root / "zero3_offload.json")}) == ("zero3", True, True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert planning.sharding_of({}) == ("fsdp2", False, False)


# Advice


def test_advice_after_running_out_of_memory_names_flags_that_save_what_it_says(tmp_path, capsys):
    outlook = plan(1e8, batch=4, tokens=2048, gradient_accumulation_steps=2, gradient_checkpointing=False)
    before = outlook.total()
    line = out_of_memory_advice(outlook)
    flags, promised, less = re.search(r"; (--.*) needs ([\d.]+) GB, ([\d.]+) GB less$", line).groups()
    assert float(promised) + float(less) == pytest.approx(before / 1e9, abs=0.02)
    assert float(promised) <= 0.9 * before / 1e9 and float(promised) <= SAFE_SHARE * 0.1 + 0.01
    # the same flags, given to the tool, need what was promised
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}
    config = {
        "model_type": "llama",
        "vocab_size": 1000,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        **sizes,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = ["--model_name_or_path", str(tmp_path), "--device", "cpu", "--precision", "fp32"]
    given = ["--max_length", "2048", "--per_device_train_batch_size", "4"]
    tool.main([*model, *given, *flags.split()])
    peak = re.search(r"peak +([\d.]+) (GB|MB)", capsys.readouterr().out)
    assert float(peak[1]) / (1000 if peak[2] == "MB" else 1) == pytest.approx(float(promised), abs=0.011)


def test_there_is_always_advice_and_it_never_grows():
    totals = [
        plan_memory(SHAPE, setting).total for _, setting in smaller_settings(SHAPE, Setting(batch=3, tokens=4096))
    ]
    assert totals[-1] == min(totals)
    assert "take a smaller model" in out_of_memory_advice(plan(1.0))
    for stage in ("pt", "dpo", "rm", "orpo", "ppo"):
        assert "; --" in out_of_memory_advice(plan(1e9, stage=stage, tokens=8192, batch=4))


# The stages


def test_a_reward_model_has_no_vocabulary_in_its_head():
    rm, dpo = (plan_memory(SHAPE, Setting(stage=stage)).parts for stage in ("rm", "dpo"))
    assert rm["weights"] == 4 * (SHAPE.total - SHAPE.head) and dpo["weights"] == 4 * SHAPE.total


def test_reinforcement_learning_holds_a_copy_of_what_is_trained_and_a_cache_for_its_answers():
    setting = Setting(stage="ppo", precision="fp32", device="cpu", generation_batch=64, tokens=512, row_tokens=300)
    full = plan_memory(SHAPE, setting)
    assert full.moment == "drawing of answers"
    assert full.parts["reference"] == full.parts["weights"] == 4 * SHAPE.total
    assert full.parts["cache of keys and values"] == 2 * 4 * 64 * 300 * SHAPE.key_value * 4
    lora = plan_memory(SHAPE, dataclasses.replace(setting, use_peft=True, reward_bytes=123.0)).parts
    assert "reference" not in lora and lora["reward models"] == 123
    goes_on = plan_memory(SHAPE, dataclasses.replace(setting, use_peft=True, new_adapter=False)).parts
    assert goes_on["reference"] == goes_on["adapters"]

"""The stage scripts on a tiny model: what they leave, how they follow one another, what they refuse."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import run_ranks
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import dpo_training
import orpo_training
import pretraining
import reward_modeling
import supervised_finetuning
from suwen.adapters import check_adapter
from suwen.lineage import resolve_lineage
from suwen.models import load_causal_lm, load_config
from template import TEMPLATES

pytestmark = pytest.mark.training
ROOT = Path(__file__).parents[1]
SCRIPTS = {
    "pt": pretraining,
    "sft": supervised_finetuning,
    "dpo": dpo_training,
    "orpo": orpo_training,
    "rm": reward_modeling,
}
QUESTIONS = [
    "高血压怎么办？",
    "糖尿病有什么症状？",
    "发热怎么处理？",
    "咳嗽做什么检查？",
    "头痛挂什么科？",
    "失眠怎么办？",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny_tokenizer(special_tokens=["<|im_start|>", "<|im_end|>"], chat_template=TEMPLATES["chatml"].jinja)
    tokenizer.save_pretrained(folder)
    tiny_model(tokenizer).save_pretrained(folder)
    return str(folder)


def write_data(folder: Path, stage: str, repeat: int = 4) -> str:
    file = folder / f"{stage}.jsonl"
    rows = []
    for number, question in enumerate(QUESTIONS * repeat):
        question = f"{question}（{number}）"
        answer = f"建议您及时就医，由医生判断。编号{number}。"
        if stage == "pt":
            rows.append({"text": f"{question}{answer}患者应当注意休息，按时服药。"})
        elif stage == "sft":
            rows.append({"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]})
        else:
            rows.append(
                {
                    "conversations": [{"from": "human", "value": question}],
                    "chosen": answer,
                    "rejected": f"不用管它{number}。",
                }
            )
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def arguments(stage: str, base: str | None, folder: Path, *more: str) -> list[str]:
    words = [
        "--train_file_dir",
        write_data(folder, stage),
        "--output_dir",
        str(folder / stage),
        "--do_train",
        "--do_eval",
    ]
    words += ["--cache_dir", str(folder / "cache"), "--num_proc", "1", "--bf16", "False", "--max_length", "128"]
    words += [
        "--use_cpu",
        "--validation_split_fraction",
        "0.2",
        "--gradient_accumulation_steps",
        "2",
        "--disable_tqdm",
        "True",
    ]
    words += ["--model_name_or_path", base] if base else []
    return [*words, *more]


def run_stage(stage: str, base: str | None, folder: Path, *more: str) -> dict:
    SCRIPTS[stage].main(arguments(stage, base, folder, *more))
    return json.loads((folder / stage / "run.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("stage", ["pt", "sft", "dpo", "orpo"])
def test_the_minimal_call_leaves_all_that_is_promised(stage, base, tmp_path, capsys):
    record = run_stage(stage, base, tmp_path, "--max_steps", "3")
    out = tmp_path / stage
    assert record["finished"] and record["training"]["steps"] == 3
    assert record["training"]["tokens"] > 0 and record["training"]["tokens_per_second"] > 0
    assert record["peak_memory_bytes"] > 0 and record["versions"]["torch"] == torch.__version__
    assert [link["path"] for link in record["lineage"]] == [base] and len(record["lineage"][0]["fingerprint"]) == 64
    assert len(record["data"]["fingerprint"]) == 64
    assert record["evaluation"]["eval_loss"] > 0
    assert (out / "training_curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((out / "tensorboard").glob("events*"))
    assert load_file(out / "model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(out)
    generation = json.loads((out / "generation_config.json").read_text())
    stops = generation["eos_token_id"]
    if stage == "pt":
        assert stops == tokenizer.eos_token_id
    else:
        assert tokenizer.convert_tokens_to_ids("<|im_end|>") in stops and tokenizer.eos_token_id in stops
    assert tokenizer.chat_template == TEMPLATES["chatml"].jinja
    assert AutoModelForCausalLM.from_pretrained(out).config.use_cache
    printed = capsys.readouterr().out
    assert "3 optimiser steps" in printed and "⟦" in printed and "held out:" in printed


@pytest.mark.parametrize("lora", ["False", "True"])
@pytest.mark.parametrize("stage", SCRIPTS)
def test_every_stage_trains_in_bfloat16(stage, lora, base, tmp_path):
    flags = ["--use_peft", lora, "--max_steps", "2"]
    losses = [
        run_stage(stage, base, tmp_path, *flags, "--bf16", bf16, "--resume", "never")["evaluation"]["eval_loss"]
        for bf16 in ("False", "True")
    ]
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.02)


def test_each_stage_goes_on_from_the_one_before(base, tmp_path, capsys):
    run_stage("pt", base, tmp_path, "--max_steps", "1")
    record = run_stage("sft", None, tmp_path, "--max_steps", "1", "--outputs", str(tmp_path))
    assert record["start"] == str(tmp_path / "pt")
    record = run_stage("dpo", None, tmp_path, "--max_steps", "1", "--outputs", str(tmp_path))
    assert record["start"] == str(tmp_path / "sft")
    assert f"start: {tmp_path / 'sft'} (from the finished sft stage)" in capsys.readouterr().out


def test_a_lora_folder_is_merged_when_the_next_stage_starts_from_it(base, tmp_path):
    lora = ["--use_peft", "--learning_rate", "1e-2", "--max_steps", "2"]
    run_stage("sft", base, tmp_path, *lora)
    record = run_stage("dpo", str(tmp_path / "sft"), tmp_path, *lora, "--logging_steps", "1")
    assert [Path(link["path"]).name for link in record["lineage"]] == [Path(base).name, "sft"]
    assert "sha256" in record["lineage"][1]
    assert resolve_lineage(str(tmp_path / "dpo")) == [base, str(tmp_path / "sft"), str(tmp_path / "dpo")]
    ids = torch.arange(5, 30)[None]
    logits = [
        load_causal_lm(path)(ids).logits.detach() for path in (base, str(tmp_path / "sft"), str(tmp_path / "dpo"))
    ]
    assert (logits[0] - logits[1]).abs().max() > 1e-4 and (logits[1] - logits[2]).abs().max() > 1e-5
    # The start of an adapter must stay what it was.
    weights = tmp_path / "sft" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match="has changed since"):
        resolve_lineage(str(tmp_path / "dpo"))


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_quantised_adapter_goes_on_training_against_a_frozen_copy(quantization, base, tmp_path):
    lora = [
        "--use_peft",
        "--quantization",
        quantization,
        "--learning_rate",
        "1e-2",
        "--max_steps",
        "2",
        "--logging_steps",
        "1",
    ]
    run_stage("sft", base, tmp_path, *lora)
    record = run_stage("dpo", str(tmp_path / "sft"), tmp_path, *lora)
    assert record["trained_dtype"] == ["float32"]
    history = json.loads((tmp_path / "dpo" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    # LLM.int8 has another kernel for inference than for training
    tolerance = 1e-5 if quantization == "4bit" else 1e-4
    first = next(entry["loss"] for entry in history if "loss" in entry)
    assert first == pytest.approx(math.log(2), abs=tolerance), "the reference is the adapter as it was"
    first, second = (load_file(tmp_path / stage / "adapter_model.safetensors") for stage in ("sft", "dpo"))
    assert first.keys() == second.keys()
    assert any((first[key] != second[key]).any() for key in first)
    assert not (tmp_path / "dpo" / "ref").exists()


@pytest.mark.parametrize(
    ("stage", "quantization"),
    [("pt", "8bit"), ("pt", "4bit"), ("pt", "2bit"), ("dpo", "2bit"), ("orpo", "2bit"), ("rm", "2bit")],
)
def test_an_adapter_on_a_quantised_base_learns_in_every_stage(stage, quantization, base, tmp_path):
    lora = ["--use_peft", "--quantization", quantization, "--learning_rate", "1e-2", "--max_steps", "6"]
    record = run_stage(stage, base, tmp_path, *lora, "--eval_on_start", "True")
    assert record["finished"] and record["trained_dtype"] == ["float32"]
    assert record["arguments"]["quantization"] == quantization
    history = json.loads((tmp_path / stage / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert losses[-1] < losses[0]


def test_modules_to_save_are_trained_in_full_and_come_back(base, tmp_path):
    flags = ["--use_peft", "--modules_to_save", "embed_tokens,lm_head", "--learning_rate", "1e-2", "--max_steps", "2"]
    record = run_stage("sft", base, tmp_path, *flags)
    assert record["trained_dtype"] == ["float32"]
    start, trained = (load_causal_lm(path) for path in (base, str(tmp_path / "sft")))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert (start.get_parameter(name) - trained.get_parameter(name)).abs().max() > 1e-4


def test_rope_scaling_is_written_so_that_the_model_comes_back_with_it(base, tmp_path):
    run_stage("sft", base, tmp_path, "--max_steps", "1", "--rope_scaling", "linear", "--max_length", "1024")
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "sft").config
    assert config.rope_parameters["rope_type"] == "linear" and config.rope_parameters["factor"] == 2.0
    assert config.rope_parameters["rope_theta"] and config.max_position_embeddings == 1024


def test_checkpointing_changes_memory_and_nothing_else(base, tmp_path):
    losses = []
    for switch in ("True", "False"):
        folder = tmp_path / switch
        folder.mkdir()
        record = run_stage("sft", base, folder, "--max_steps", "2", "--gradient_checkpointing", switch)
        losses.append(record["training"]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.slow
def test_a_compiled_model_takes_the_same_steps(base, tmp_path):
    flags = ["--max_steps", "2", "--logging_steps", "1", "--use_peft", "True", "--lora_dropout", "0"]
    plain = run_stage("sft", base, tmp_path, *flags)
    run_stage("sft", base, tmp_path, *flags, "--output_dir", str(tmp_path / "compiled"), "--torch_compile")
    record = json.loads((tmp_path / "compiled" / "run.json").read_text(encoding="utf-8"))
    assert record["evaluation"]["eval_loss"] == pytest.approx(plain["evaluation"]["eval_loss"], rel=1e-5)
    weights, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("compiled", "sft"))
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-3)


def test_neftune_adds_noise_in_training_only(base, tmp_path):
    records = []
    for alpha in ([], ["--neftune_noise_alpha", "15"]):
        folder = tmp_path / str(len(alpha))
        folder.mkdir()
        flags = ["--max_steps", "1", "--learning_rate", "0", "--warmup_steps", "0", *alpha]
        records.append(run_stage("sft", base, folder, *flags))
    assert records[0]["training"]["loss"] != records[1]["training"]["loss"]
    assert records[0]["evaluation"]["eval_loss"] == records[1]["evaluation"]["eval_loss"]


def test_pure_bf16_trains_bfloat16_weights(base, tmp_path):
    record = run_stage("sft", base, tmp_path, "--pure_bf16", "--max_steps", "1")
    assert record["trained_dtype"] == ["bfloat16"]


def command(stage: str, *words: str) -> list[str]:
    return [sys.executable, str(ROOT / SCRIPTS[stage].__file__), *words]


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def test_a_checkpoint_of_another_run_is_refused(base, tmp_path):
    run_stage("sft", base, tmp_path, "--max_steps", "2")
    with pytest.raises(ValueError, match="another run \\(learning_rate was .* is 0.5.*--resume never"):
        run_stage("sft", base, tmp_path, "--max_steps", "2", "--learning_rate", "0.5")
    record = run_stage("sft", base, tmp_path, "--max_steps", "2", "--learning_rate", "0.5", "--resume", "never")
    assert record["finished"]
    assert list((tmp_path / "sft").glob("earlier-*/checkpoint-2"))


def test_an_adapter_trained_anew_where_a_model_lay_is_not_mixed_with_it(base, tmp_path):
    whole = run_stage("sft", base, tmp_path, "--max_steps", "1")
    record = run_stage("sft", base, tmp_path, "--max_steps", "1", "--use_peft", "True", "--resume", "never")
    assert record["finished"] and not (tmp_path / "sft" / "model.safetensors").exists()
    (earlier,) = (tmp_path / "sft").glob("earlier-*")
    assert load_file(earlier / "model.safetensors") and json.loads((earlier / "run.json").read_text()) == whole


def test_a_folder_of_another_stage_is_refused_before_the_work(base, tmp_path):
    run_stage("pt", base, tmp_path, "--max_steps", "1")
    with pytest.raises(ValueError, match="--output_dir .*: holds a run of the stage pt, expected one of sft, or none"):
        run_stage("sft", base, tmp_path, "--output_dir", str(tmp_path / "pt"), "--resume", "never")


def test_a_finished_run_is_not_repeated(base, tmp_path, capsys):
    record = run_stage("sft", base, tmp_path, "--max_steps", "2")
    weights = (tmp_path / "sft" / "model.safetensors").stat().st_mtime_ns
    assert run_stage("sft", base, tmp_path, "--max_steps", "2") == record
    assert "has finished already" in capsys.readouterr().out
    assert (tmp_path / "sft" / "model.safetensors").stat().st_mtime_ns == weights


def test_a_run_killed_before_its_result_was_saved_only_saves_it(base, tmp_path):
    flags = ["--max_steps", "3", "--save_steps", "1", "--logging_steps", "1"]
    record = run_stage("sft", base, tmp_path, *flags)
    out = tmp_path / "sft"
    saved = load_file(out / "model.safetensors")
    (out / "model.safetensors").unlink()
    (out / "run.json").write_text(json.dumps({**record, "finished": False}))
    again = run_stage("sft", base, tmp_path, *flags)
    assert again["finished"] and again["training"]["steps"] == 3
    assert again["training"]["tokens"] == record["training"]["tokens"]
    for name, tensor in load_file(out / "model.safetensors").items():
        assert torch.equal(tensor, saved[name])


def test_a_finished_run_whose_result_is_not_whole_makes_it_again_from_its_last_checkpoint(base, tmp_path, capsys):
    flags = ["--max_steps", "2", "--use_peft", "True", "--eval_strategy", "no"]
    record, out = run_stage("sft", base, tmp_path, *flags), tmp_path / "sft"
    weights = out / "adapter_model.safetensors"
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "# LoRA adapter by supervised fine-tuning" in card and "Information Needed" not in card
    assert f"`{record['data']['fingerprint']}`" in card and f"goes on from | `{record['start']}`" in card
    whole = weights.read_bytes()
    for what, damage in (
        ("adapter_model.safetensors is missing", weights.unlink),
        (f"adapter_model.safetensors has 9 bytes, not {len(whole):,}", lambda: weights.write_bytes(whole[:9])),
    ):
        damage()
        again = run_stage("sft", base, tmp_path, *flags)
        said = capsys.readouterr().out
        assert f"has finished, but {what}: its result is made again, from {out / 'checkpoint-2'}" in said
        assert again["finished"] and again["training"]["resumed_from"] == str(out / "checkpoint-2")
        assert again["files"] == record["files"] and weights.read_bytes() == whole
    assert [file.read_bytes() for file in out.glob("damaged-*/adapter_model.safetensors")] == [whole[:9]]
    run_stage("sft", base, tmp_path, *flags)
    assert "has finished already" in capsys.readouterr().out


def test_a_run_goes_on_from_the_checkpoint_that_is_given(base, tmp_path):
    flags = ["--max_steps", "3", "--save_steps", "1", "--use_peft", "True", "--eval_strategy", "no"]
    record, out = run_stage("sft", base, tmp_path, *flags), tmp_path / "sft"
    given = str(out / "checkpoint-1")
    again = run_stage("sft", base, tmp_path, *flags, "--resume", given)
    assert again["training"]["resumed_from"] == given and again["training"]["steps"] == 3
    assert again["files"] == record["files"], "the very bits"
    assert sorted(path.name for path in out.glob("later-*/*")) == ["checkpoint-2", "checkpoint-3"]


def test_neither_secrets_nor_pickled_arguments_are_left(base, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_fromtheenvironment")
    run_stage("sft", base, tmp_path, "--max_steps", "1", "--hub_token", "hf_fromtheflag", "--use_peft", "True")
    files = [path for path in (tmp_path / "sft").rglob("*") if path.is_file()]
    assert {"run.json", "MANIFEST.json", "trainer_state.json"} <= {path.name for path in files}
    for path in files:
        assert b"hf_fromthe" not in path.read_bytes(), path
        assert path.name != "training_args.bin"


def test_evaluation_alone_leaves_the_record_of_the_training(base, tmp_path):
    record = run_stage("sft", base, tmp_path, "--max_steps", "2")
    words = [w for w in arguments("sft", str(tmp_path / "sft"), tmp_path) if w != "--do_train"]
    supervised_finetuning.main(words)
    assert json.loads((tmp_path / "sft" / "run.json").read_text(encoding="utf-8")) == record
    alone = json.loads((tmp_path / "sft" / "evaluation.json").read_text(encoding="utf-8"))
    assert alone["evaluation"]["eval_loss"] == pytest.approx(record["evaluation"]["eval_loss"], rel=1e-5)


def test_a_run_without_held_out_rows_trains_and_says_so(base, tmp_path, capsys):
    flags = ["--max_steps", "1", "--validation_split_fraction", "0"]
    record = run_stage("sft", base, tmp_path, *flags)
    assert record["finished"] and "evaluation" not in record
    assert "no held-out rows" in capsys.readouterr().out
    words = [w for w in arguments("sft", base, tmp_path, *flags) if w != "--do_train"]
    with pytest.raises(ValueError, match="--do_eval: found no held-out rows"):
        supervised_finetuning.main(words)


def test_the_result_is_asked_the_benchmarks_that_are_named_and_compared_with_its_start(base, tmp_path, capsys):
    flags = ["--max_steps", "1", "--max_length", "256", "--eval_tasks", "facts,exam", "--eval_task_samples", "3"]
    run_stage("pt", base, tmp_path, *flags)
    assert not (tmp_path / "pt" / "eval" / "comparison.json").exists()
    run_stage("sft", str(tmp_path / "pt"), tmp_path, *flags)
    folder = tmp_path / "sft" / "eval"
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert "exam" in json.dumps(results) and "facts" in json.dumps(results)
    assert (folder / "comparison.json").is_file() and (folder / "report.html").is_file()
    assert "exam" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--eval_tasks: found nonesuch"):
        run_stage("sft", base, tmp_path, "--eval_tasks", "nonesuch")


def test_a_run_that_diverges_saves_nothing(base, tmp_path):
    with pytest.raises(ValueError, match="loss is nan|NaN or infinity"):
        run_stage("sft", base, tmp_path, "--max_steps", "4", "--learning_rate", "1e30", "--warmup_steps", "0")
    assert not (tmp_path / "sft" / "model.safetensors").exists()
    assert not json.loads((tmp_path / "sft" / "run.json").read_text(encoding="utf-8"))["finished"]


def test_a_start_that_was_trained_anew_is_another_start(base, tmp_path):
    run_stage("pt", base, tmp_path, "--max_steps", "1")
    start = str(tmp_path / "pt")
    run_stage("sft", start, tmp_path, "--max_steps", "1", "--use_peft")
    run_stage("pt", base, tmp_path, "--max_steps", "2", "--resume", "never")
    with pytest.raises(ValueError, match="weights of the start was .* --resume never"):
        run_stage("sft", start, tmp_path, "--max_steps", "1", "--use_peft")
    with pytest.raises(ValueError, match="its start .* has changed"):
        run_stage("dpo", str(tmp_path / "sft"), tmp_path, "--max_steps", "1")


def test_stretched_positions_follow_an_adapter_through_the_stages(base, tmp_path):
    lora = ["--use_peft", "--max_steps", "1"]
    run_stage("sft", base, tmp_path, *lora, "--rope_scaling", "linear", "--max_length", "1024")
    record = run_stage("dpo", str(tmp_path / "sft"), tmp_path, *lora, "--max_length", "1024")
    for folder in ("sft", "dpo"):
        config = load_config(str(tmp_path / folder))
        assert config.rope_parameters["factor"] == 2.0 and config.max_position_embeddings == 1024
    assert record["positions"]["rope_parameters"]["rope_type"] == "linear"
    with pytest.raises(ValueError, match="stretched already"):
        run_stage("dpo", str(tmp_path / "sft"), tmp_path, *lora, "--rope_scaling", "yarn", "--max_length", "2048")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model_name_or_path", "outputs/none"], "no such folder"),
        (["--train_file_dir", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--template_name", "nonesuch"], "nonesuch"),
        (["--template_name", "llama3"], "<|begin_of_text|>|<|start_header_id|>"),
        (["--max_length", "100000"], "window holds 512"),
        (["--learning_rat", "1"], "did you mean --learning_rate"),
        (["--fp16"], "needs a GPU"),
        (["--use_peft", "--target_modules", "nonesuch"], "found nonesuch, expected names .*q_proj"),
        (["--resume", "nowhere"], "no whole checkpoint"),
        (["--do_train", "False", "--do_eval", "False"], "leaves nothing to do"),
        (["--output_dir", f"{__file__}/out"], "--output_dir .*cannot be written to"),
        (["--validation_split_percentage", "five"], "found five, expected a number"),
        (["--save_only_model"], "--save_only_model: nothing could go on from such a checkpoint"),
        (["--save_on_each_node"], "--save_on_each_node: a checkpoint is one folder"),
        (["--auto_find_batch_size"], "--auto_find_batch_size: repeats rows .*--per_device_train_batch_size auto"),
        (["--ignore_data_skip"], "--ignore_data_skip: a resumed run would train rows again"),
        (["--enable_jit_checkpoint"], "--enable_jit_checkpoint: SIGTERM saves a whole checkpoint already"),
    ],
)
def test_a_mistake_gets_one_line(words, expected, base, tmp_path):
    with pytest.raises(ValueError, match=expected) as error:
        run_stage("sft", base, tmp_path, "--max_steps", "1", *words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("words", [["--model_name_or_path", "outputs/none"], ["--max_length", "100000"], ["--fp16"]])
def test_a_model_or_flag_that_is_refused_makes_no_folder(words, base, tmp_path):
    with pytest.raises(ValueError):
        run_stage("sft", base, tmp_path, *words)
    assert not (tmp_path / "sft").exists()


@pytest.mark.parametrize("gathers", [None, False, "auto"])
def test_an_engine_that_would_save_no_model_is_refused(gathers, base, tmp_path):
    config = json.loads((ROOT / "configs" / "zero3.json").read_text())
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = gathers
    (tmp_path / "mine.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="mine.json: found stage3_gather_.*, expected true as in configs/zero3.json"):
        run_stage("sft", base, tmp_path, "--deepspeed", str(tmp_path / "mine.json"))


def test_a_launcher_that_would_save_no_model_is_refused(base, tmp_path, monkeypatch):
    with monkeypatch.context() as context:
        context.setenv("ACCELERATE_USE_FSDP", "true")
        context.setenv("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
        with pytest.raises(ValueError, match="fsdp_state_dict_type: found SHARDED_STATE_DICT, expected FULL_STATE_"):
            run_stage("sft", base, tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    with pytest.raises(ValueError, match="deepspeed_config: found zero3_save_16bit_model false, expected true"):
        run_stage("sft", base, tmp_path)


def test_weights_that_are_pickles_are_refused(base, tmp_path):
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    for folder, weights in ((model, "pytorch_model.bin"), (adapter, "adapter_model.bin")):
        folder.mkdir()
        torch.save({"a": torch.ones(1)}, folder / weights)
    (model / "config.json").write_bytes((Path(base) / "config.json").read_bytes())
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 1, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": base}))
    with pytest.raises(ValueError, match="found pytorch_model.bin, expected weights as safetensors; convert once"):
        run_stage("sft", str(model), tmp_path)
    with pytest.raises(
        ValueError, match="found adapter_model.bin, expected adapter_model.safetensors, as pickle can run code"
    ):
        load_causal_lm(str(adapter))
    with pytest.raises(ValueError, match="as pickle can run code"):
        check_adapter(str(adapter))


def test_a_mistake_ends_with_code_2_and_no_traceback(base, tmp_path):
    words = arguments("sft", base, tmp_path, "--template_name", "nonesuch")
    result = subprocess.run(command("sft", *words), env=environment(tmp_path), capture_output=True, text=True)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr and "nonesuch" in result.stderr.strip().splitlines()[-1]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("stage", "config"),
    [
        *((stage, "ddp") for stage in ("sft", "dpo", "rm")),
        *(pytest.param(*more, marks=pytest.mark.slow) for more in (("orpo", "ddp"), ("dpo", "zero3"))),
    ],
)
def test_two_processes_take_the_steps_of_one(stage, config, base, tmp_path):
    if config == "zero3":
        pytest.importorskip("deepspeed")
    # Two steps use 16 of the 19 training rows: an uneven last batch would be filled up differently.
    same = "--max_steps 2 --learning_rate 1e-3 --warmup_steps 0 --optim sgd --max_grad_norm 0".split()
    same += ["--packing", "False", "--train_sampling_strategy", "random"] if stage == "sft" else []
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    run_stage(stage, base, one, *same, "--per_device_train_batch_size", "4")
    words = arguments(stage, base, two, *same, "--per_device_train_batch_size", "2")
    run_ranks(stage, [word for word in words if config == "ddp" or word != "--use_cpu"], two / stage, config)
    start = load_file(Path(base) / "model.safetensors")
    first, second = (load_file(folder / stage / "model.safetensors") for folder in (one, two))
    moved = max((first[key] - start[key]).abs().max().item() for key in first.keys() & start.keys())
    apart = max((first[key] - second[key]).abs().max().item() for key in first)
    assert apart < 0.001 * moved
    losses = [json.loads((f / stage / "run.json").read_text())["evaluation"]["eval_loss"] for f in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.distributed
def test_a_mistake_in_two_processes_is_told_once(base, tmp_path):
    words = arguments("sft", base, tmp_path, "--template_name", "nonesuch")
    start = [sys.executable, str(ROOT / "configs" / "launch.py"), "--config_file", str(ROOT / "configs" / "ddp.yaml")]
    start += ["--num_processes", "2", "--num_machines", "1", str(ROOT / SCRIPTS["sft"].__file__)]
    result = subprocess.run([*start, *words], env=environment(tmp_path), capture_output=True, text=True, timeout=240)
    assert result.returncode == 2, result.stderr[-3000:]
    assert result.stderr.count("error: unknown --template_name 'nonesuch'") == 1
    assert "Traceback" not in result.stderr


def test_serving_asks_for_thinking_as_the_training_did(base, tmp_path):
    import argparse

    from suwen.serving import load_served

    folder = tmp_path / "thinking-base"
    tokenizer = tiny_tokenizer(special_tokens=["<|im_start|>", "<|im_end|>"], chat_template=TEMPLATES["qwen3"].jinja)
    tokenizer.save_pretrained(folder)
    tiny_model(tokenizer).save_pretrained(folder)
    record = run_stage("sft", str(folder), tmp_path, "--max_steps", "1")
    assert record["thinking"] == "off", "no answer of the data carries reasoning"
    flags = {"base_model": str(tmp_path / "sft"), "lora_model": None, "tokenizer_path": None, "template_name": "auto"}
    flags |= {"use_cpu": True, "gpus": None, "dtype": "float32", "quantization": "none", "thinking": "auto"}
    served = load_served(argparse.Namespace(**flags))
    prompt = served.encoder.encode_prompt([{"role": "user", "content": QUESTIONS[0]}])
    assert tokenizer.decode(prompt).endswith("<think>\n\n</think>\n\n")

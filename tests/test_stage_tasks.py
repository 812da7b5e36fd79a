"""Benchmarks asked by a training itself: at its steps and its end, without a trace in what is learned."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import run_ranks
from safetensors.torch import load_file
from test_evaluation import write_rows
from test_ppo import run_ppo
from test_stages import arguments, base, run_stage, write_data  # noqa: F401  (base is a fixture)

import supervised_finetuning
from suwen import evaluate
from suwen.arguments import parse_stage_arguments
from suwen.benchmarks import TASKS
from suwen.benchmarks.task import read_items
from suwen.interruption import BrokenOff, StopSignals
from suwen.sketch import FILE, load_sketch
from suwen.stage_tasks import ask_apart, forget_steps_after, steps_asked

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.training
ASKED = ["--eval_tasks", "facts,exam", "--eval_task_samples", "3"]


def records_of(folder):
    return {
        path.name: [json.loads(line) for line in open(path, encoding="utf-8")]
        for path in sorted((folder / "records").glob("*.jsonl"))
    }


def assert_same_answers(one, two):
    assert one.keys() == two.keys() and len(one) == 4
    for name in one:
        for first, second in zip(one[name], two[name], strict=True):
            assert first.get("response") == second.get("response")
            if "logps" in first:
                assert first["logps"] == pytest.approx(second["logps"], abs=1e-3)


def test_a_training_asks_at_its_steps_and_learns_what_it_would_have_learned(base, tmp_path, capsys):  # noqa: F811
    flags = ["--max_steps", "5", "--use_peft", "--lora_dropout", "0.2", "--logging_steps", "1", "--save_steps", "2"]
    flags += ["--save_total_limit", "9", "--learning_rate", "0.01", "--max_length", "256"]
    for name in ("plain", "asked"):
        (tmp_path / name).mkdir()
    plain = run_stage("sft", base, tmp_path / "plain", *flags)
    capsys.readouterr()
    asked = run_stage("sft", base, tmp_path / "asked", *flags, *ASKED, "--eval_tasks_steps", "2")
    printed = capsys.readouterr().out
    out = tmp_path / "asked" / "sft"
    assert asked["training"]["loss"] == plain["training"]["loss"]
    weights = load_file(tmp_path / "plain" / "sft" / "adapter_model.safetensors")
    for name, tensor in load_file(out / "adapter_model.safetensors").items():
        assert torch.equal(tensor, weights[name])

    # the last step is asked as the end
    assert [folder.name for folder in steps_asked(out)] == ["step-2", "step-4"]
    comparison = json.loads((out / "eval" / "comparison.json").read_text(encoding="utf-8"))
    assert [run["name"] for run in comparison["runs"]] == ["step-2", "step-4", "sft"]
    headers = [line.split()[3:] for line in printed.splitlines() if line.startswith("task ")]
    assert ["step-2"] in headers and ["step-2", "step-4"] in headers and ["step-2", "step-4", "sft"] in headers
    state = json.loads((out / "checkpoint-5" / "trainer_state.json").read_text(encoding="utf-8"))
    logged = {entry["step"]: entry for entry in state["log_history"] if "eval_exam_likelihood" in entry}
    assert list(logged) == [2, 4]
    results = json.loads((out / "eval" / "step-4" / "results.json").read_text(encoding="utf-8"))
    metrics = results["tasks"]["exam"]["modes"]["likelihood"]["metrics"]
    assert logged[4]["eval_exam_likelihood"] == metrics["accuracy"]["value"]

    # in memory the answers are those of what is saved
    settings = evaluate.Settings(max_samples=3)
    for saved, folder in ((out / "checkpoint-2", "eval/step-2"), (out, "eval")):
        again = tmp_path / "again" / saved.name
        evaluate.evaluate_stage(str(saved), "facts,exam", again, settings=settings)
        assert_same_answers(records_of(out / folder), records_of(again))


def test_a_training_that_goes_on_asks_what_it_has_not_asked(base, tmp_path):  # noqa: F811
    flags = ["--max_steps", "4", "--save_steps", "2", *ASKED, "--eval_tasks_steps", "2", "--max_length", "256"]
    record = run_stage("sft", base, tmp_path, *flags)
    out = tmp_path / "sft"
    asked = (out / "eval" / "step-2" / "results.json").stat().st_mtime_ns
    (out / "eval" / "step-3").mkdir()  # of a run that was given up
    (out / "run.json").write_text(json.dumps({**record, "finished": False}))
    for name in ("checkpoint-4", "eval/step-2/results.json"):
        target = out / name
        target.unlink() if target.is_file() else shutil.rmtree(target)
    run_stage("sft", base, tmp_path, *flags)
    assert [folder.name for folder in steps_asked(out)] == ["step-2"]  # broken off at step 2, asked again
    again = (out / "eval" / "step-2" / "results.json").stat().st_mtime_ns
    assert again > asked and list((out / "eval" / "step-2" / "records").glob("earlier-1/*.jsonl"))


def test_steps_still_to_come_are_forgotten(tmp_path):
    for name in ("step-2", "step-10", "step-4", "step-x", "records"):
        (tmp_path / "eval" / name).mkdir(parents=True)
    assert [folder.name for folder in steps_asked(tmp_path)] == ["step-2", "step-4", "step-10"]
    forget_steps_after(tmp_path, 4)
    assert sorted(folder.name for folder in (tmp_path / "eval").iterdir()) == ["records", "step-2", "step-4", "step-x"]


def test_questions_that_cannot_be_asked_end_no_training(base, tmp_path, capsys):  # noqa: F811
    data = tmp_path / "data"
    data.mkdir()
    write_rows(data / "general_text.jsonl", [{"text": "血压" * 2000}])
    flags = [
        "--max_steps",
        "3",
        "--eval_tasks",
        "general_text",
        "--eval_data_dir",
        str(data),
        "--eval_tasks_steps",
        "2",
    ]
    with pytest.raises(ValueError, match="do not fit into the model's window"):  # at the end, when all is saved
        run_stage("sft", base, tmp_path, *flags)
    assert "step 2: not asked (" in capsys.readouterr().out
    assert json.loads((tmp_path / "sft" / "run.json").read_text(encoding="utf-8"))["training"]["steps"] == 3
    assert (tmp_path / "sft" / "model.safetensors").is_file()


def test_a_signal_breaks_off_what_is_asked_and_nothing_else():
    signals = StopSignals()
    with signals:
        with pytest.raises(BrokenOff), signals.breaking_off():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        assert signals.received == signal.SIGTERM
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert signals.received == signal.SIGTERM


def test_a_finished_run_is_asked_what_it_was_not(base, tmp_path, capsys):  # noqa: F811
    run_stage("sft", base, tmp_path, "--max_steps", "1", "--max_length", "256")
    run_stage("sft", base, tmp_path, "--max_steps", "1", "--max_length", "256", *ASKED)
    assert "nothing is trained again" in capsys.readouterr().out
    assert len(records_of(tmp_path / "sft" / "eval")["exam.likelihood.jsonl"]) == 3


@pytest.mark.parametrize(
    "flags, engine, expected",
    [
        (["--eval_tasks_steps", "2"], "", "--eval_tasks_steps: needs --eval_tasks"),
        (["--eval_tasks", "exam", "--eval_tasks_steps", "0"], "", "--eval_tasks_steps: found 0"),
        (["--eval_tasks", "nonesuch"], "", "--eval_tasks: found nonesuch"),
        (["--eval_tasks", "cmexam"], "", "--tasks cmexam: needs a file .none was given., expected a file named"),
        (["--eval_tasks", "cmexam", "--eval_data_dir", "nowhere"], "", "--eval_data_dir: nowhere not found"),
        (["--eval_tasks", "exam", "--do_train", "False"], "", "--eval_tasks: asks what a training has made"),
        (["--eval_tasks", "exam", "--eval_tasks_steps", "2"], "FSDP", "--eval_tasks_steps: FSDP spreads the weights"),
        (["--eval_tasks", "exam", "--eval_tasks_steps", "2"], "DEEPSPEED", "--eval_tasks_steps: DeepSpeed spreads"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_loaded(flags, engine, expected, tmp_path, monkeypatch):
    if engine:
        monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    words = [word for word in arguments("sft", "no/model", tmp_path) if word != "--do_train"]
    with pytest.raises(ValueError, match=expected):
        supervised_finetuning.main([*words, *([] if "--do_train" in flags else ["--do_train"]), *flags])


def test_reinforcement_learning_asks_at_its_updates_too(base, tmp_path):  # noqa: F811
    flags = ["--num_mini_batches", "1", "--num_ppo_epochs", "1", "--max_length", "256"]
    plain = run_ppo(base, tmp_path / "plain", *flags)
    asked = run_ppo(base, tmp_path / "asked", *flags, *ASKED, "--eval_tasks_steps", "3")
    assert [folder.name for folder in steps_asked(tmp_path / "asked" / "ppo")] == ["step-3"]
    assert asked["training"]["loss"] == plain["training"]["loss"]
    assert (tmp_path / "asked" / "ppo" / "eval" / "comparison.json").is_file()


@pytest.mark.distributed
def test_of_two_processes_one_asks_and_the_other_waits(base, tmp_path):  # noqa: F811
    words = [*arguments("sft", base, tmp_path, "--max_steps", "3", "--max_length", "256"), *ASKED]
    first, _ = run_ranks("sft", [*words, "--eval_tasks_steps", "1"], tmp_path / "sft", "ddp")
    assert [folder.name for folder in steps_asked(tmp_path / "sft")] == ["step-1", "step-2"]
    assert first.count("exam, likelihood: 3 items") == 3


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["zero2", "fsdp2"])
def test_where_an_engine_spreads_the_weights_the_saved_result_is_asked(engine, base, tmp_path, capsys):  # noqa: F811
    flags = ["--max_steps", "1", "--max_length", "256"]
    evaluate.evaluate_stage(base, "facts,exam", tmp_path / "start" / "eval", settings=evaluate.Settings(max_samples=3))
    shutil.copytree(base, tmp_path / "start", dirs_exist_ok=True)
    words = [*arguments("sft", str(tmp_path / "start"), tmp_path, *flags), *ASKED]
    first, second = run_ranks("sft", words, tmp_path / "sft", engine)
    assert first.count("exam, likelihood: 3 items") == 1 and "exam, likelihood" not in second
    assert "start -> sft" in first  # compared with the model it began from
    again = tmp_path / "again"
    evaluate.evaluate_stage(str(tmp_path / "sft"), "facts,exam", again, settings=evaluate.Settings(max_samples=3))
    assert_same_answers(records_of(tmp_path / "sft" / "eval"), records_of(again))


def test_a_result_that_cannot_be_asked_is_named_with_the_command_that_asks_it(tmp_path):
    words = [*arguments("sft", "no/model", tmp_path), "--eval_tasks", "exam", "--eval_task_samples", "3"]
    with pytest.raises(ValueError, match="--eval_tasks: the result is saved, .* code 2: .*evaluation.py --base_model"):
        ask_apart(parse_stage_arguments(words, "sft", "", {}), "no/model")


def test_a_training_leaves_a_sketch_and_what_leaked_into_it_is_found(base, tmp_path, capsys):  # noqa: F811
    sys.path.insert(0, str(ROOT / "tools"))
    import check_contamination

    items = read_items(TASKS["exam"], [evaluate.OWN_DATA / "exam.csv"]).items
    long = sorted(items, key=lambda item: -len(item.question))
    leaked = long[:8]
    assert len(leaked[-1].question) > 18  # five 13-grams
    file = write_data(tmp_path, "pt")
    with open(file, "a", encoding="utf-8") as stream:
        for item in leaked:
            text = item.question + "\n" + "\n".join(item.options.values())
            stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    words = ["--train_file_dir", file, "--output_dir", str(tmp_path / "pt"), "--model_name_or_path", base, "--use_cpu"]
    words += ["--cache_dir", str(tmp_path / "cache"), "--num_proc", "1", "--max_length", "128", "--max_steps", "1"]
    import pretraining

    pretraining.main([*words, "--validation_split_fraction", "0"])
    sketch = load_sketch(tmp_path / "pt" / FILE)
    assert sketch.rows == 24 + len(leaked)
    run_stage("sft", str(tmp_path / "pt"), tmp_path, "--max_steps", "1")
    held = json.loads((tmp_path / "sft" / "run.json").read_text(encoding="utf-8"))["data"]["validation_rows"]
    assert load_sketch(tmp_path / "sft" / FILE).rows == 24 - held  # held-out rows are not trained on

    capsys.readouterr()
    check_contamination.main(
        ["--tasks", "exam", "--sketch", str(tmp_path / "sft"), "--output_dir", str(tmp_path / "found")]
    )
    printed = capsys.readouterr().out
    assert f"{tmp_path}/sft/{FILE}: {24 - held} rows" in printed and f"{tmp_path}/pt/{FILE}: " in printed
    assert f"note: {base}: has no sketch" in printed
    rows = [json.loads(line) for line in open(tmp_path / "found" / "items.jsonl", encoding="utf-8")]
    kinds = {row["id"]: row["kind"] for row in rows}
    assert len(leaked) >= 3 and {kinds[item.id] for item in leaked} == {"grams"}
    assert "grams" not in {kind for item, kind in kinds.items() if item not in {found.id for found in leaked}}

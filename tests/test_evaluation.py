"""The whole evaluation: oracles and guessers, records, comparison, report, endpoint, flags."""

import json
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from http_server import server
from tiny import tiny_model, tiny_tokenizer

import evaluation
from suwen import evaluate
from suwen.benchmarks import TASK_SETS, TASKS
from suwen.benchmarks.task import TOO_LONG
from suwen.client import Endpoint
from suwen.comparison import compare_runs, summarise_run
from suwen.encoding import ChatEncoder
from suwen.report import format_comparison, format_results
from suwen.runs import Run, load_run
from suwen.serving import Served
from template import TEMPLATES

pytestmark = pytest.mark.training

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer(["<|im_start|>", "<|im_end|>"], chat_template=TEMPLATES["chatml"].jinja)
    tokenizer.pad_token = tokenizer.eos_token
    tiny_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def exam_rows(count=60, seed=0):
    rng = random.Random(seed)
    return [
        {"Question": f"第{i}号血压问题？", "Options": "\n".join(f"{x} 项{i}{x}" for x in "ABCDE"),
         "Answer": "".join(sorted(rng.sample("ABCDE", 2))) if i % 20 == 7 else rng.choice("ABCCD"),
         "Difficulty level": str(i % 3)}
        for i in range(count)
    ]  # fmt: skip


def write_rows(path, rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


def answered_run(name, answers, rows):
    """A run whose generate records come from `answers`: (item) -> text."""
    task = TASKS["cmexam"]
    records = []
    for index, row in enumerate(rows):
        [item] = task.parse(row)
        text = answers(item)
        static = evaluate.static_fields(item) | {"id": str(index)}
        records.append({"index": index, **static, "response": text, **task.judge(item, text)})
    return Run(name, Path(name), {}, {("cmexam", "generate"): records})


def accuracy(run):
    return summarise_run(run)["tasks"]["cmexam"]["modes"]["generate"]["metrics"]["accuracy"]


def test_an_oracle_scores_all_its_shuffled_twin_chance_and_a_constant_the_majority():
    rows = exam_rows(2000)
    rng = random.Random(1)
    key = [row["Answer"] for row in rows]
    shuffled = rng.sample(key, len(key))
    places = {row["Question"]: i for i, row in enumerate(rows)}
    assert accuracy(answered_run("oracle", lambda item: f"答案：{item.target}", rows))["value"] == 100
    twin = accuracy(answered_run("twin", lambda item: f"答案：{shuffled[places[item.question]]}", rows))
    shares = [key.count(x) / len(key) for x in set(key)]
    assert twin["value"] == pytest.approx(100 * sum(share**2 for share in shares), abs=3)  # three standard errors
    constant = answered_run("constant", lambda item: "C", rows)
    assert accuracy(constant)["value"] == pytest.approx(100 * key.count("C") / len(key))
    floors = summarise_run(constant)["tasks"]["cmexam"]["modes"]["generate"]["floors"]
    assert floors["always C"] == pytest.approx(accuracy(constant)["value"])
    assert floors["random set"] == pytest.approx(100 / 31) and floors["random letter"] == pytest.approx(19, abs=0.1)


def test_unanswered_questions_stay_in_the_denominator():
    run = answered_run(
        "half", lambda item: f"答案：{item.target}" if "2" in item.question else "不知道", exam_rows(100)
    )
    summary = summarise_run(run)["tasks"]["cmexam"]["modes"]["generate"]
    assert summary["metrics"]["accuracy"]["value"] == pytest.approx(19)
    assert summary["metrics"]["unparsed"]["value"] == pytest.approx(81)
    assert summary["reasons"] == {"declared": 19, "none": 81}


def test_a_planted_regression_is_called_worse_and_an_identical_model_the_same():
    rows = exam_rows(3000)
    rng = random.Random(2)
    right = [rng.random() < 0.5 for _ in rows]
    lost = set(rng.sample([i for i, r in enumerate(right) if r], 90))
    places = {row["Question"]: i for i, row in enumerate(rows)}

    def run(name, worse):
        def answer(item):
            i = places[item.question]
            return item.target if right[i] and not (worse and i in lost) else "E"

        return answered_run(name, answer, rows)

    [pair] = compare_runs([run("a", False), run("b", True)])["pairs"]
    [row] = pair["rows"]
    assert (
        row["verdict"] == "worse" and row["difference"] == pytest.approx(-3) and (row["gained"], row["lost"]) == (0, 90)
    )
    [pair] = compare_runs([run("a", False), run("a2", False)])["pairs"]
    assert pair["rows"][0]["verdict"] == "same" and pair["rows"][0]["p_holm"] == 1
    assert "worse" in format_comparison(compare_runs([run("a", False), run("b", True)]))


def test_items_without_a_partner_are_left_out_and_counted():
    rows = exam_rows(50)
    first, second = answered_run("a", lambda item: "C", rows), answered_run("b", lambda item: "C", rows[:40])
    [pair] = compare_runs([first, second])["pairs"]
    assert pair["rows"][0]["n"] == 40 and pair["rows"][0]["unpaired"] == 10
    comparison = compare_runs([first, second])
    assert "10 items are in one of the two only" in format_comparison(comparison)
    comparison["results"] = [summarise_run(run) for run in (first, second)]
    assert "cmexam, generate: 50, 40 items" in format_comparison(comparison)


def test_groups_tell_small_cells_apart():
    run = answered_run("a", lambda item: item.target, exam_rows(80))
    groups = summarise_run(run)["tasks"]["cmexam"]["modes"]["generate"]["groups"]["difficulty"]
    assert {value: cell["n"] for value, cell in groups["cells"].items()} == {"0": 27, "1": 27, "2": 26}
    assert all(cell["small"] for cell in groups["cells"].values()) and groups["macro"] == 100


class Page(HTMLParser):
    """What a page loads, and whether its tags are closed."""

    VOID = {"meta", "line", "circle", "br"}

    def __init__(self):
        super().__init__()
        self.open, self.loads = [], []

    def handle_starttag(self, tag, attributes):
        self.loads += [v for k, v in attributes if k in ("src", "href") and v and not v.startswith("#")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_a_model_is_evaluated_on_all_own_tasks_and_the_report_stands_alone(model_folder, tmp_path, capsys):
    out = tmp_path / "one" / "eval"
    command = ["--base_model", str(model_folder), "--max_samples", "3", "--max_new_tokens", "4", "--use_cpu"]
    evaluation.main([*command, "--output_dir", str(out)])
    printed = capsys.readouterr().out
    assert "s for 1,000" in printed and "exam" in printed
    row = next(line for line in printed.splitlines() if line.startswith("exam  ") and " likelihood " in line)
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert set(results["tasks"]) == set(TASK_SETS["own"])
    for name, entry in results["tasks"].items():
        assert set(entry["modes"]) == set(TASKS[name].modes)
        for mode, summary in entry["modes"].items():
            assert summary["n"] == 3 and entry["headline"] in summary["metrics"], (name, mode)
    records = [json.loads(line) for line in open(out / "records" / "exam.likelihood.jsonl", encoding="utf-8")]
    assert [record["index"] for record in records] == [0, 1, 2] and len(records[0]["logps"]) == 31
    assert summarise_run(load_run(out)) == results  # every table from the records
    assert format_results(results).count("likelihood") >= 4
    header = json.loads((out / "run.json").read_text(encoding="utf-8"))
    timing = header["tasks"]["exam"]["timing"]["likelihood"]
    assert timing["answered"] == 3 and row.split()[-1] == f"{1000 * timing['seconds'] / 3:.1f}"
    assert header["model"]["names"] == [str(model_folder)] and "torch" in header["versions"]
    assert len(next(iter(header["tasks"]["exam"]["files"].values()))) == 64

    page = Page()
    page.feed((out / "report.html").read_text(encoding="utf-8"))
    assert not page.open and not page.loads
    assert f"seconds for 1,000 items</td><td>{row.split()[-1]}</td>" in (out / "report.html").read_text("utf-8")

    # a second model, compared from the records alone
    shutil.copytree(out, tmp_path / "two" / "eval")
    evaluation.main(["--compare", str(out), str(tmp_path / "two" / "eval"), "--output_dir", str(tmp_path / "both")])
    printed = capsys.readouterr().out
    overview, pairs = printed.split("one -> two")
    assert "better" not in pairs and "worse" not in pairs and " same\n" in pairs
    assert overview.splitlines()[0].split() == ["task", "mode", "score", "one", "two"] and " + " not in overview[:-100]
    page = Page()
    page.feed((tmp_path / "both" / "comparison.html").read_text(encoding="utf-8"))
    assert not page.open and not page.loads


def served_model(folder):
    from suwen.models import load_causal_lm, load_tokenizer

    tokenizer = load_tokenizer(str(folder), "auto")
    return Served(load_causal_lm(str(folder)).eval(), ChatEncoder(tokenizer), [str(folder)], 512)


def run_cmexam(folder, served, rows, **settings):
    file = write_rows(folder / "cmexam.jsonl", rows)
    tasks, files = [TASKS["cmexam"]], {"cmexam": [file]}
    chosen = evaluate.Settings(max_new_tokens=4, **settings)
    read = evaluate.read_tasks(tasks, files, chosen)
    ask = evaluate.ask_model(served, chosen.batch_size)
    return evaluate.evaluate(tasks, files, folder / "eval", chosen, {"names": served.names}, served, ask, read)


def test_an_evaluation_that_was_cut_off_goes_on_to_the_same_records(model_folder, tmp_path):
    served, rows = served_model(model_folder), exam_rows(12)
    whole = run_cmexam(tmp_path, served, rows, batch_size=4)
    names = ("cmexam.likelihood.jsonl", "cmexam.generate.jsonl")
    expected = [(tmp_path / "eval" / "records" / name).read_bytes() for name in names]
    for name, content in zip(names, expected, strict=True):
        (tmp_path / "eval" / "records" / name).write_bytes(content[: len(content) // 2])
    again = run_cmexam(tmp_path, served, rows, batch_size=3)
    assert [(tmp_path / "eval" / "records" / name).read_bytes() for name in names] == expected
    assert again["tasks"]["cmexam"]["modes"] == whole["tasks"]["cmexam"]["modes"]
    timing = again["run"]["tasks"]["cmexam"]["timing"]
    assert 0 < timing["likelihood"]["answered"] < 12


def test_records_of_other_questions_or_models_are_moved_aside(model_folder, tmp_path, capsys):
    served = served_model(model_folder)
    run_cmexam(tmp_path, served, exam_rows(4))
    run_cmexam(tmp_path, served, exam_rows(5))
    assert "earlier records moved to" in capsys.readouterr().out
    results = run_cmexam(tmp_path, Served(served.model, served.encoder, ["other"], 512), exam_rows(5))
    assert "records of another model moved to" in capsys.readouterr().out
    assert results["tasks"]["cmexam"]["modes"]["generate"]["n"] == 5
    assert len(list((tmp_path / "eval" / "records").glob("earlier-*/*.jsonl"))) == 4


def test_corrected_answers_are_not_scored_by_the_old_key(model_folder, tmp_path):
    served, rows = served_model(model_folder), exam_rows(4)
    run_cmexam(tmp_path, served, rows)
    rows[0]["Answer"] = "E" if rows[0]["Answer"] != "E" else "A"
    run_cmexam(tmp_path, served, rows)
    first = json.loads(open(tmp_path / "eval" / "records" / "cmexam.generate.jsonl", encoding="utf-8").readline())
    assert first["target"] == rows[0]["Answer"]


def test_a_stage_is_compared_with_the_one_before(model_folder, tmp_path, capsys):
    served = served_model(model_folder)
    settings = evaluate.Settings(max_samples=4, max_new_tokens=4)
    first = evaluate.evaluate_stage(
        str(model_folder), "exam,facts", tmp_path / "pt/eval", settings=settings, served=served
    )
    assert first["comparison"] is None
    found = evaluate.evaluate_stage(
        str(model_folder),
        "exam,facts",
        tmp_path / "sft/eval",
        earlier=[tmp_path / "pt/eval"],
        settings=settings,
        served=served,
    )
    assert [row["verdict"] for row in found["comparison"]["pairs"][0]["rows"]] == ["same"] * 4
    assert "pt -> sft" in capsys.readouterr().out
    assert (tmp_path / "sft/eval/comparison.json").is_file()
    earlier = [tmp_path / "pt/eval"]
    other = tmp_path / "dpo/eval"
    evaluate.evaluate_stage(str(model_folder), "general_text", other, earlier, settings=settings, served=served)
    comparison = capsys.readouterr().out.split("written")[-1].split("\ntask")[-1]
    assert "general_text" in comparison and "exam" not in comparison and "pt -> dpo: no task in common" in comparison


def test_an_endpoint_is_evaluated_in_generate_mode(tmp_path, capsys):
    def answer(body, number):
        assert body["temperature"] == 0 and body["max_tokens"] == 256
        letter = re.search(r"第(\d+)号", body["messages"][-1]["content"])
        content = "答案：C" if letter else "?"
        return 200, {}, {"choices": [{"message": {"content": content}, "finish_reason": "stop"}]}

    rows = exam_rows(20)
    file = write_rows(tmp_path / "cmexam.jsonl", rows)
    with server(answer) as (url, seen):
        evaluation.main(
            ["--api_base", url, "--model", "m", "--tasks", "cmexam,general_text",
             "--output_dir", str(tmp_path / "eval"), "--data_file", f"cmexam={file}"]
        )  # fmt: skip
    assert len(seen) == 20
    results = json.loads((tmp_path / "eval" / "results.json").read_text(encoding="utf-8"))
    assert list(results["tasks"]["cmexam"]["modes"]) == ["generate"]
    share = sum(row["Answer"] == "C" for row in rows) / len(rows)
    assert results["tasks"]["cmexam"]["modes"]["generate"]["metrics"]["accuracy"]["value"] == pytest.approx(100 * share)
    assert "general_text: left out" in capsys.readouterr().out
    assert Endpoint(url, "m").url == f"{url}/v1/chat/completions"


def test_files_are_found_by_name_and_split(tmp_path):
    for name in ("cmexam_train.csv", "cmexam_val.csv", "exam/cmexam_test.csv", "cmmlu/dev/anatomy.csv",
                 "cmmlu/test/anatomy.csv", "cmmlu/test/virology.csv", "x.csv", "medqa/questions.jsonl",
                 "sft/cmtmedqa.json", "ceval/val/physician_val.csv", "ceval/test/physician_test.csv"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x", encoding="utf-8")

    def found(task):
        return [str(p.relative_to(tmp_path)) for p in evaluate.find_task_files(TASKS[task], str(tmp_path), {})]

    assert found("cmexam") == ["exam/cmexam_test.csv"]
    assert found("cmmlu") == ["cmmlu/test/anatomy.csv", "cmmlu/test/virology.csv"]
    assert found("medqa") == ["medqa/questions.jsonl"]
    assert found("ceval") == ["ceval/val/physician_val.csv"]  # its test set has no answers
    assert evaluate.find_task_files(TASKS["exam"], str(tmp_path), {}) == [evaluate.OWN_DATA / "exam.csv"]
    with pytest.raises(ValueError, match="--tasks huatuo: needs a file .found none in --data_dir"):
        found("huatuo")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--tasks", "cmexams"], "--tasks: found cmexams"),
        (["--tasks", "cmexam"], "--tasks cmexam: needs a file"),
        (
            ["--tasks", "exam,facts", "--data_file", "x.csv"],
            "2 tasks are asked for, expected one (--tasks NAME), or the task of each file, such as exam=x.csv",
        ),
        (["--tasks", "exam", "--data_file", "facts=x.csv"], "facts is not among the --tasks"),
        (["--tasks", "cmexam", "--data_file", "missing.csv"], "--data_file: missing.csv not found"),
        (["--max_samples", "0"], "--max_samples: found 0"),
        (["--api_base", "http://x"], "needs both"),
        (["--api_base", "http://x", "--model", "m", "--modes", "likelihood"], "no likelihoods"),
        (["--protocol", "cmexam_official"], "--protocol cmexam_official: for the task cmexam"),
        (["--compare", "nowhere"], "nowhere: found no records"),
    ],
)
def test_mistakes_in_flags_are_one_line(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluation.main(flags)


def test_help_answers_before_torch_loads():
    code = ["import sys, evaluation", "try: evaluation.main(['--help'])", "except SystemExit: pass"]
    code.append("assert 'torch' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", "\n".join(code)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--compare" in done.stdout


def test_contamination_is_reported_with_the_scores_of_clean_items(model_folder, tmp_path, capsys):
    sys.path.insert(0, str(ROOT / "tools"))
    import check_contamination

    rows = exam_rows(20)
    for i, row in enumerate(rows):
        row["Question"] = f"患者第{i}次就诊时血压为{120 + i}毫米汞柱，下列处理中最合适的是哪一项"
    run_cmexam(tmp_path, served_model(model_folder), rows)
    leaked = [{"text": f"{row['Question']}\n{row['Options']}"} for row in rows[:5]]
    train = write_rows(tmp_path / "train.jsonl", [*leaked, {"text": "高血压患者应当低盐饮食。"}])
    check_contamination.main(
        ["--tasks", "cmexam", "--data_file", str(tmp_path / "cmexam.jsonl"), "--train_file_dir", str(train),
         "--evaluation", str(tmp_path / "eval"), "--output_dir", str(tmp_path / "found")]
    )  # fmt: skip
    found = json.loads((tmp_path / "found" / "contamination.json").read_text(encoding="utf-8"))["tasks"]["cmexam"]
    assert found["kinds"]["exact"] == 5 and found["dirty_percent"] >= 25
    assert found["scores"]["generate"]["all"]["n"] == 20
    assert "train.jsonl, line 1" in capsys.readouterr().out


def test_a_question_beyond_the_window_is_asked_in_neither_mode_and_counts_as_wrong(model_folder, tmp_path, capsys):
    rows = exam_rows(12)
    rows[4]["Question"] = rows[7]["Question"] = "很长的病史。" * 2000
    data = write_rows(tmp_path / "cmexam.jsonl", rows)
    found = evaluate.evaluate_stage(str(model_folder), "cmexam", tmp_path / "eval", data_file=str(data))["results"]
    printed = capsys.readouterr().out
    for mode, summary in found["tasks"]["cmexam"]["modes"].items():
        records = [json.loads(line) for line in open(tmp_path / "eval" / "records" / f"cmexam.{mode}.jsonl", "rb")]
        unasked = [record for record in records if record.get("finish_reason") == TOO_LONG]
        assert [record["index"] for record in unasked] == [4, 7] and not any(record["correct"] for record in unasked)
        assert summary["n"] == 12 and summary["too_long"] == 2
        assert f"cmexam, {mode}: 2 items too long for the model's window, counted as wrong" in printed
    assert "counted as wrong" in (tmp_path / "eval" / "report.html").read_text(encoding="utf-8")


def test_what_was_cut_off_is_not_shown_as_if_it_were_whole(model_folder, tmp_path):
    results = run_cmexam(tmp_path, served_model(model_folder), exam_rows(4))
    assert "cut off" not in format_results(results)
    del results["tasks"]["cmexam"]["data"]["timing"]["generate"]  # written when the last item is answered
    assert "cmexam, generate: cut off after 4 items" in format_results(results)

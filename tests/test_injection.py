"""Measuring what of a graph's facts a model has taken in: tasks by group, and the table of run_pipeline.sh."""

import base64
import json
import math

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

import evaluation
from suwen import evaluate, experiment_table
from suwen.benchmarks import TASK_SETS, TASKS
from suwen.benchmarks.task import longest_answer, read_items
from suwen.encoding import ChatEncoder
from suwen.fact_items import preference_items
from suwen.fictional import assign_groups, fictional_graph
from suwen.likelihood import Scorer, encode_answers
from suwen.rows import rows_of_pair
from suwen.scoring import score_rows
from suwen.synthesis import prepare
from template import TEMPLATES
from tools import build_data

CHOICE = {
    "Question": "岚型胃炎患者的处方上写着", "Options": "A 泽朗平\nB 维舒定", "Answer": "B", "Suffix": "。",
    "relation": "drug", "group": "B",
}  # fmt: skip


def test_a_row_belongs_to_the_task_of_its_group():
    assert [len(TASKS[f"choice_{group}"].parse(CHOICE)) for group in "ABC"] == [0, 1, 0]
    without = {key: value for key, value in CHOICE.items() if key != "group"}
    assert [len(TASKS[f"choice_{group}"].parse(without)) for group in "ABC"] == [1, 0, 0]
    assert len(TASK_SETS["injection"]) == 12


def test_the_likeliest_ending_of_a_statement_is_the_choice():
    task = TASKS["choice_B"]
    (item,) = task.parse(CHOICE)
    asked = task.candidates(item)
    assert (asked.prefix, asked.texts) == ("岚型胃炎患者的处方上写着", ("泽朗平。", "维舒定。"))
    assert task.choose(item, [-3.0, -2.0])["correct"] and not task.choose(item, [-2.0, -3.0])["correct"]
    record = {"options": item.options, "correct": True}
    assert task.summarise([record])["floors"] == {"random choice": 50}
    (statement,) = TASKS["statements_B"].parse(CHOICE)
    assert statement.question == "岚型胃炎患者的处方上写着维舒定。"


def test_an_ending_that_is_no_option_is_refused():
    with pytest.raises(ValueError, match="found 'C', expected one of A, B"):
        TASKS["choice_B"].parse(CHOICE | {"Answer": "C"})


def test_recall_counts_right_wrong_and_empty_answers():
    task = TASKS["recall_A"]
    rows = [
        {"question": f"{name}吃什么药？", "answers": [drug], "relation": "drug", "group": "A"}
        for name, drug in (("甲", "泽朗平"), ("乙", "维舒定"), ("丙", "铂锐宁"), ("丁", "欣岩灵"))
    ]
    items = task.complete([item for row in rows for item in task.parse(row)])
    answers = ["泽朗平。", "泽朗平。", "", "欣岩灵或泽朗平。"]
    records = [{"response": text} | task.judge(item, text) for item, text in zip(items, answers, strict=True)]
    assert [record["correct"] for record in records] == [True, False, False, False]
    found = task.summarise(records)
    assert found["metrics"]["recall"]["value"] == 25 and found["metrics"]["wrong answers"]["value"] == 50
    assert found["empty"] == 1
    (several,) = task.parse({"question": "甲有哪些表现？", "answers": ["左腕发麻", "舌尖刺痛"]})
    assert [task.judge(several, text)["correct"] for text in ("左腕发麻。", "舌尖刺痛、左腕发麻。")] == [False, True]


def test_preference_items_hold_a_right_and_a_faulty_answer_to_a_held_out_question():
    graph = fictional_graph(12, 3)
    source = prepare(graph, assign_groups(graph, 3))
    rows = [row for head in source.items for row in preference_items(head, source)]
    faults = [row["fault"] for row in rows]
    assert faults.count("wrong value") == len(rows) / 2 == 12 * 4
    held_out = {row["question"] for row in rows}
    for row in rows:
        value = next(fact.value for fact in graph.facts if fact.id == row["facts"][0])
        assert value in row["chosen"] and row["chosen"] != row["rejected"] and row["question"] in held_out
        assert row["fault"] != "wrong value" or value not in row["rejected"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer(["<|im_start|>", "<|im_end|>"], chat_template=TEMPLATES["chatml"].jinja)
    tokenizer.pad_token = tokenizer.eos_token
    tiny_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_two_answers_are_scored_as_they_are_served_and_trained(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    encoder = ChatEncoder(AutoTokenizer.from_pretrained(folder))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    texts = ("泽朗平。", "维舒定，每日三次。")
    choice = encode_answers(encoder, "吃什么药？", texts)
    pair = encoder.encode_pair([{"role": "user", "content": "吃什么药？"}], *texts, None)
    assert choice.continuations == [pair["chosen_ids"], pair["rejected_ids"]]
    assert pair["chosen_ids"][-1] in encoder.stop_token_ids
    (found,) = Scorer(model).score([choice])
    plain = [score.logp for score in score_rows(model, list(rows_of_pair(pair)))]
    assert torch.allclose(torch.tensor(found), torch.tensor(plain), atol=1e-4)


def test_an_answer_that_does_not_end_is_not_right(tmp_path):
    row = {"question": "甲吃什么药？", "answers": ["泽朗平"], "group": "A"}
    task = TASKS["recall_A"]
    items = task.parse(row)
    replies = [{"response": "泽朗平。", "finish_reason": reason} for reason in ("stop", "length")]
    for number, reply in enumerate(replies):
        records = tmp_path / str(number)
        records.mkdir()
        evaluate.run_mode(
            task, "generate", items, records, {}, None, lambda *_, r=reply: iter([(0, r)]), evaluate.Settings()
        )
        (record,) = [json.loads(line) for line in open(records / "recall_A.generate.jsonl", encoding="utf-8")]
        assert record["correct"] is (reply["finish_reason"] == "stop")


def test_retrieved_items_are_asked_with_their_passages_as_a_served_model_is():
    row = {"question": "甲病吃什么药？", "answers": ["泽朗平"], "group": "C", "gold": 1}
    row["passages"] = [{"title": "乙病", "text": "乙病要用维舒定。"}, {"title": "甲病", "text": "甲病要用泽朗平。"}]
    task = TASKS["retrieved_C"]
    (item,) = task.parse(row)
    assert task.ask(item).endswith("[2] 甲病\n甲病要用泽朗平。\n</资料>\n\n问题：甲病吃什么药？")
    assert item.groups["right passage"] == "found"
    (lost,) = task.parse(row | {"gold": None})
    assert lost.groups["right passage"] == "not found"
    assert evaluate.hash_items([item]) != evaluate.hash_items(task.parse(row | {"passages": row["passages"][1:]}))
    with pytest.raises(ValueError, match="expected passages and gold"):
        task.parse({"question": "甲病吃什么药？", "answers": ["泽朗平"], "group": "C"})


def test_every_evaluation_file_of_a_build_is_asked_by_a_named_task(tmp_path):
    flags = ["--recipe", "fictional", "--size", "40", "--num_proc", "1", "--output_dir", str(tmp_path / "data")]
    build_data.main(flags)
    folder = tmp_path / "data" / "evaluation"
    asked = {pattern: task for task in TASKS.values() for pattern in task.patterns if task.name.endswith(("_A", "_B"))}
    for file in folder.glob("*.jsonl"):
        assert file.name in asked or file.name == "passage.jsonl", f"{file.name} is asked by no task"
    for kind in ("open_book", "reverse_recall", "graph_exam"):
        assert TASK_SETS[kind] == tuple(f"{kind}_{group}" for group in "ABC")
        for task in evaluate.parse_tasks(kind):
            items = read_items(task, evaluate.find_task_files(task, str(folder), {})).items
            assert items and all(item.groups["relation"] for item in items)


def test_open_book_asks_with_the_right_passage_and_reverse_recall_names_all_entities():
    row = {"question": "甲病吃什么药？", "answers": ["泽朗平"], "group": "A", "gold": 0}
    row["passages"] = [{"title": "甲病", "text": "甲病要用泽朗平。"}]
    task = TASKS["open_book_A"]
    (item,) = task.parse(row)
    assert "[1] 甲病\n甲病要用泽朗平。" in task.ask(item) and task.judge(item, "泽朗平[1]。")["correct"]
    task = TASKS["reverse_recall_B"]
    row = {"question": "泽朗平是针对哪些病的药？", "answers": ["甲病", "乙病"], "relation": "drug", "group": "B"}
    other = {"question": "维舒定是针对哪些病的药？", "answers": ["丙病"], "relation": "drug", "group": "B"}
    item, _ = task.complete([found for each in (row, other) for found in task.parse(each)])
    answers = ["乙病和甲病。", "甲病。", "甲病、乙病、丙病。"]
    assert [task.judge(item, answer)["correct"] for answer in answers] == [True, False, False]


def test_exam_items_of_a_graph_are_asked_as_cmexam_is():
    row = {"Question": "甲病的用药是", "Options": "A 泽朗平\nB 维舒定\nC 铂锐宁", "Answer": "AC"}
    row |= {"relation": "drug", "group": "C"}
    task, cmexam = TASKS["graph_exam_C"], TASKS["cmexam"]
    (item,) = task.parse(row)
    assert item.target == "AC" and item.groups["relation"] == "drug" and not TASKS["graph_exam_A"].parse(row)
    (same,) = cmexam.parse(row)
    assert task.modes == cmexam.modes and task.candidates(item) == cmexam.candidates(same)
    assert task.ask(item) == cmexam.ask(same)


def test_a_right_answer_always_has_room():
    """A list of examinations, or how a drug is taken, is longer than the answers of a fictional graph."""
    short = {"question": "甲病吃什么药？", "answers": ["泽朗平"], "group": "A"}
    usage = "心绞痛发作时舌下含服0.5毫克，5分钟后可重复，15分钟内含服3次仍不缓解应立即拨打120"
    lists = {"question": "查什么？", "answers": ["诊室血压测量", "动态血压监测", "血肌酐检测", "心电图"], "group": "A"}
    for kind in ("recall", "reverse_recall"):
        task = TASKS[f"{kind}_A"]
        assert longest_answer(task, task.parse(short)) == 32, "as the published tables were made"
        assert longest_answer(task, task.parse(short) + task.parse(lists)) == 24 + 2 * 23
        assert longest_answer(task, task.parse({"question": "怎么用？", "answers": [usage]})) == 24 + 2 * len(usage)
    assert longest_answer(TASKS["medical_qa"], []) == 512


@pytest.mark.training
def test_the_table_of_the_experiment_shows_every_stage(folder, tmp_path, capsys):
    data = tmp_path / "data"
    flags = ["--recipe", "fictional", "--size", "10", "--num_proc", "1", "--answers", "value"]
    build_data.main([*flags, "--output_dir", str(data)])
    seed = tmp_path / "seed-1"
    for place in ("start", "pt/eval"):
        asked = ["--tasks", "injection", "--data_dir", str(data / "evaluation"), "--use_cpu", "--batch_size", "64"]
        evaluation.main(["--base_model", str(folder), *asked, "--output_dir", str(seed / place)])
    capsys.readouterr()
    experiment_table.show(tmp_path, ["seed-1", "seed-1"], ["start", "pt"])
    shown = capsys.readouterr().out
    table = shown.splitlines()[1:14]
    assert table[0].split() == ["task", "mode", "score", "start", "pt"]
    assert [line.split()[0] for line in table[1:]] == list(TASK_SETS["injection"])
    assert "mean of 2 seeds" in shown and "right: " in shown
    page = (tmp_path / "report.html").read_text("utf-8")
    assert 'href="seed-1/report.html"' in page and (tmp_path / "seed-1" / "report.html").is_file()
    assert base64.b64encode((tmp_path / "stages.png").read_bytes()).decode() in page and "recall_B" in page
    written = json.loads((tmp_path / "results.json").read_text("utf-8"))
    found = written["seeds"]["seed-1"]
    assert found["stages"] == ["start", "pt"]
    first, second = found["scores"]["statements_A"]
    assert first == second and 0 < first < 100 and math.isfinite(first)
    assert written["means"]["statements_A"] == [{"mean": first, "lowest": first, "highest": first}] * 2
    recall = found["metrics"]["recall_B"][1]
    assert recall["recall"]["value"] == found["scores"]["recall_B"][1]
    assert all(one["low"] <= one["value"] <= one["high"] for one in (recall["recall"], recall["wrong answers"]))
    (change,) = found["changes"]
    assert change["first"] == "start"
    assert {row["task"]: row["p"] for row in change["rows"]}["recall_B"] == 1, "the same model twice"
    assert (tmp_path / "stages.png").stat().st_size > 5000
    page = (seed / "report.html").read_text("utf-8")
    assert "Facts of group C: recall" in page and "http" not in page.split("<style>")[0]

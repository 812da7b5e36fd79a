"""Reading, asking and scoring of the benchmarks."""

import json
from pathlib import Path

import pytest

from suwen.benchmarks import TASK_SETS, TASKS, cmexam_official
from suwen.benchmarks.choice import (
    choice_candidates,
    letter_sets,
    parse_answer,
    parse_choice,
    parse_options,
    weighted_f1,
)
from suwen.benchmarks.facts import add_distractors, judge_fact
from suwen.benchmarks.task import Item, read_items
from suwen.benchmarks.terms import judge_terms, named, normalise_term, parse_disease, summarise_terms
from suwen.formats import BadRow

OWN_DATA = Path(__file__).parents[1] / "data" / "evaluation"
FOUR = {"A": "原发病", "B": "出血部位", "C": "出血量", "D": "停留时间"}


@pytest.mark.parametrize(
    "options",
    [
        "A 原发病\nB 出血部位\nC 出血量\nD 停留时间",
        "A 原发病\r\nB 出血部位\r\nC 出血量\r\nD 停留时间",
        "A 原发病\\nB 出血部位\\nC 出血量\\nD 停留时间",
        "(A) 原发病.\n(B) 出血部位.\n(C) 出血量.\n(D) 停留时间.",
        "（Ａ）原发病\n（Ｂ）出血部位\n（Ｃ）出血量\n（Ｄ）停留时间",
        "A．原发病 B．出血部位 C．出血量 D．停留时间",
        "A、原发病；B、出血部位；C、出血量；D、停留时间",
        "A 原发病 B 出血部位 C 出血量 D 停留时间",
        {"A": "原发病", "B": "出血部位", "C": "出血量", "D": "停留时间", "E": "", "F": None},
        {"a.": "原发病", "b.": "出血部位", "c.": "出血量", "d.": "停留时间"},
        ["原发病", "出血部位", "出血量", "停留时间"],
    ],
    ids=str,
)
def test_options_are_read_in_every_form(options):
    assert parse_options(options) == FOUR


def test_a_letter_within_an_option_does_not_begin_the_next_one():
    assert parse_options("A. 维生素B缺乏 B. 维生素 C 缺乏 C. DNA 损伤") == {
        "A": "维生素B缺乏",
        "B": "维生素 C 缺乏",
        "C": "DNA 损伤",
    }
    assert parse_options("A 红细胞\nB 白细胞\n其中B细胞最多\nC 血小板")["B"] == "白细胞 其中B细胞最多"


def test_a_question_that_lost_its_first_option_is_still_one():
    item = parse_choice({"question": "含季铵结构的药物", "options": "B 阿托品\nC 东莨菪碱", "answer": "C"})
    assert item.options == {"B": "阿托品", "C": "东莨菪碱"} and letter_sets(item) == ("B", "C", "BC")


@pytest.mark.parametrize(
    "answer, letters",
    [
        ("C", "C"), ("DBA", "ABD"), ("(AC)", "AC"), ("ＡＢＤ", "ABD"), ("A、B", "AB"), ("A, B", "AB"), ("a", "A"),
        (["A", "C"], "AC"), ("答案：C", "C"), ("C.", "C"), ("出血量", "C"), (" B ", "B"), ("A B", "AB"),
    ],
)  # fmt: skip
def test_answers_are_read_in_every_form(answer, letters):
    assert parse_answer(answer, FOUR) == letters


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"question": "甲", "options": FOUR, "answer": ""}, "no answer"),
        ({"question": "甲", "options": FOUR, "answer": None}, "no answer"),
        ({"question": "甲", "options": FOUR}, "no answer"),
        ({"question": "甲", "options": FOUR, "answer": "E"}, "answer not among the options"),
        ({"question": "甲", "options": FOUR, "answer": "不确定"}, "answer not among the options"),
        ({"question": " ", "options": FOUR, "answer": "A"}, "no question"),
        ({"question": "甲", "options": "没有选项", "answer": "A"}, "no options"),
        ({"question": "甲", "answer": "A"}, "no options"),
        ({"question": "甲", "options": FOUR, "answer": "AB", "question_type": "单项选择题"}, "several answers"),
        ({"messages": [{"role": "user", "content": "甲"}]}, "wrong schema"),
    ],
)
def test_rows_that_cannot_be_used_are_refused_with_their_reason(row, reason):
    with pytest.raises(BadRow) as error:
        parse_choice(row)
    assert error.value.reason == reason


def test_published_forms_of_rows():
    cmexam = {
        "Question": "甲？",
        "Options": "A 一\nB 二",
        "Answer": "B",
        "Difficulty level": "3",
        "Disease Group": "nan",
    }
    assert parse_choice(cmexam) == Item("甲？", "B", {"A": "一", "B": "二"}, None, {"difficulty": "3"})
    cmb = {"exam_class": "内科", "question": "甲？", "answer": "AB", "question_type": "多项选择题", "option": FOUR}
    assert parse_choice(cmb).multiple is True
    assert parse_choice(cmb).groups == {"class": "内科", "question type": "多项选择题"}
    cmmlu = {"": "0", "Question": "甲？", "A": "一", "B": "二", "C": "三", "D": "四", "Answer": "D"}
    assert parse_choice(cmmlu, multiple=False).options == {"A": "一", "B": "二", "C": "三", "D": "四"}
    medqa = {"question": "甲？", "answer": "二", "options": {"A": "一", "B": "二"}, "answer_idx": "B"}
    assert parse_choice(medqa).target == "B"
    chat = [{"role": "user", "content": "甲是 A. 一 B. 二 C. 三"}, {"role": "assistant", "content": "AC"}]
    assert parse_choice({"messages": chat}) == Item("甲是", "AC", {"A": "一", "B": "二", "C": "三"})


def test_odd_files_are_read_or_refused_row_by_row(tmp_path):
    rows = 'Question,Options,Answer\r\n甲？,"A 一\r\nB 二",B\r\n乙？,"A 一\r\nB 二",\r\n丙？,"A 一\r\nB 二",ＡＢ\r\n'
    for name, content in (("bom.csv", rows.encode("utf-8-sig")), ("gb.csv", rows.encode("gb18030"))):
        (tmp_path / name).write_bytes(content)
        found = read_items(TASKS["cmexam"], [tmp_path / name])
        assert [(item.question, item.target) for item in found.items] == [("甲？", "B"), ("丙？", "AB")]
        assert [refusal.reason for refusal in found.refused] == ["no answer"]
        assert "line 4" in found.refused[0].where
        assert any("refused 1 x no answer" in note for note in found.notes())


def test_a_workbook_is_read_like_a_table(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (
        ["Question", "Options", "Answer"],
        ["甲？", "A 一\\nB 二", "A"],
        [None, None, None],
        ["乙？", "A 1\\nB 2", "B"],
    ):
        book.active.append(row)
    book.save(tmp_path / "cmexam.xlsx")
    found = read_items(TASKS["cmexam"], [tmp_path / "cmexam.xlsx"])
    assert [(item.options, item.target) for item in found.items] == [
        ({"A": "一", "B": "二"}, "A"),
        ({"A": "1", "B": "2"}, "B"),
    ]
    (tmp_path / "broken.xlsx").write_bytes(b"PK no workbook")
    with pytest.raises(ValueError, match="not a readable .xlsx workbook"):
        read_items(TASKS["cmexam"], [tmp_path / "broken.xlsx"])


def test_a_sample_is_the_same_whatever_the_order_of_the_rows(tmp_path):
    rows = [{"question": f"第{i}题", "options": FOUR, "answer": "A"} for i in range(40)]
    names = []
    for name, order in (("a.jsonl", rows), ("b.jsonl", rows[::-1])):
        (tmp_path / name).write_text("\n".join(json.dumps(row) for row in order), encoding="utf-8")
        names.append({item.question for item in read_items(TASKS["medqa"], [tmp_path / name], 10).items})
    assert names[0] == names[1] and len(names[0]) == 10


def test_items_that_occur_twice_keep_ids_of_their_own(tmp_path):
    row = json.dumps({"question": "甲？", "options": FOUR, "answer": "A"})
    (tmp_path / "a.jsonl").write_text(f"{row}\n{row}\n", encoding="utf-8")
    found = read_items(TASKS["medqa"], [tmp_path / "a.jsonl"])
    assert found.repeated == 1 and found.items[1].id == f"{found.items[0].id}#2"


def test_the_prompt_never_tells_how_many_answers_are_right():
    one, several = (parse_choice({"question": "甲？", "options": FOUR, "answer": answer}) for answer in ("A", "ABD"))
    assert TASKS["cmexam"].ask(one) == TASKS["cmexam"].ask(several)
    assert choice_candidates(one) == choice_candidates(several)


def test_candidates_are_all_sets_of_letters_or_single_ones():
    open_item = Item("甲？", "A", {letter: letter for letter in "ABCDE"})
    assert len(letter_sets(open_item)) == 31 and letter_sets(open_item)[:6] == ("A", "B", "C", "D", "E", "AB")
    assert choice_candidates(open_item).texts[0] == "A\n"
    single = Item("甲？", "A", dict.fromkeys("ABCD", "x"), multiple=False)
    assert choice_candidates(single).texts == ("A", "B", "C", "D")
    assert min(map(len, letter_sets(Item("甲？", "AB", dict.fromkeys("ABC", "x"), multiple=True)))) == 2


def test_weighted_f1_worked_by_hand():
    # A: 1 of 2 found, 1 wrong more -> 2*1/(2+2); B: 0; C: 1 of 1 -> 1; "AB" never chosen
    weighted, macro = weighted_f1(["A", "A", "B", "C", "AB"], ["A", "B", "A", "C", ""])
    assert weighted == pytest.approx((2 * 0.5 + 0 + 1 + 0) / 5)
    assert macro == pytest.approx((0.5 + 0 + 1 + 0 + 0) / 5)  # "" is a class too


def test_terms_are_matched_by_their_spellings():
    for term, answer in (
        ("慢性阻塞性肺疾病（COPD）", "用于copd的维持治疗"),
        ("ＨＩＶ－１感染", "HIV-1 感染"),
        ("急慢性支气管炎", "急性支气管炎和慢性支气管炎"),
        ("急、慢性腹泻", "用于急慢性腹泻"),
        ("<p>痛经</p>", "可治疗痛经。"),
    ):
        assert named(term, normalise_term(answer)), term
    assert not named("急慢性支气管炎", normalise_term("急性支气管炎"))
    assert not named("胃溃疡", normalise_term("胃炎、肠溃疡"))


def test_the_three_criteria_in_whole_numbers():
    def record(hits, terms):
        return {"hits": list("甲" * hits), "target": list("乙" * terms), "score": 100 * hits / terms, "response": "x"}

    records = [record(1, 1), record(1, 2), record(1, 3), record(2, 3), record(0, 3), record(2, 4)]
    found = summarise_terms(records)["metrics"]
    assert [round(found[name]["value"] * 6 / 100) for name in list(found)[:3]] == [5, 4, 2]


def test_the_leaflet_itself_names_every_indication_of_our_own_set():
    task = TASKS["drug_indication"]
    import csv

    with open(OWN_DATA / "drug_indication.csv", encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            [item] = task.parse(row)
            record = judge_terms(item, row["药品适应症"])
            assert record["hits"] == item.target, row["药品"]


def test_a_row_of_a_disease_table_gives_up_to_three_questions():
    row = {"name": "流感", "symptom": ["发热", "咳嗽"], "check": [], "common_drug": "奥司他韦|布洛芬"}
    items = parse_disease(row)
    assert [(item.question, item.target) for item in items] == [
        ("流感的典型症状是什么？", ["发热", "咳嗽"]),
        ("哪些药物能治疗流感？", ["奥司他韦", "布洛芬"]),
    ]


def test_a_fact_is_recalled_only_if_no_wrong_one_is_named_beside_it():
    items = [Item(f"病{i}挂什么科？", [name], groups={"relation": "科室"}, id=str(i)) for i, name in
             enumerate(["心内科", "眼科", "骨科", "皮肤科", "心内科"])]  # fmt: skip
    item = add_distractors(items)[0]
    assert len(item.options) == 4 and list(item.options.values()).count("心内科") == 1
    assert judge_fact(item, "应该挂心内科。")["correct"]
    assert not judge_fact(item, "心内科、眼科、骨科、皮肤科都行")["correct"]
    assert not judge_fact(item, "挂号")["correct"]
    assert add_distractors(items)[0] == item  # drawn by the item's id


@pytest.mark.parametrize("name", TASK_SETS["own"])
def test_our_own_sets_are_read_whole(name):
    task = TASKS[name]
    found = read_items(task, [OWN_DATA / (task.default_file or "")])
    assert not found.refused and not found.repeated and len(found.items) >= 12
    assert all(item.id and item.question for item in found.items)


def test_no_letter_is_right_too_often_in_our_own_exams():
    for name in ("exam", "general_questions"):
        items = read_items(TASKS[name], [OWN_DATA / (TASKS[name].default_file or "")]).items
        assert all(sum(item.target == letter for item in items) <= 0.35 * len(items) for letter in "ABCDE")


def test_the_published_scorer_takes_letters_and_first_words_anywhere():
    options = "A 原发病\nB 出血部位\nC 出血量\nD 停留时间"
    assert cmexam_official.chosen_options(options, "答案: B. \n 解释:CT") == "B"
    assert cmexam_official.chosen_options(options, "应做CT") == "C"  # as published
    assert cmexam_official.chosen_options(options, "取决于出血量\n解释:A错") == "C"
    assert cmexam_official.chosen_options(options, "不知道") == "无答案"
    assert cmexam_official.chosen_options(options, "NA") == "无答案"  # pandas reads a missing value
    assert cmexam_official.explanation_of("答案: B. \n 解释:因为出血") == "因为出血"


def test_the_published_scores_worked_by_hand():
    # sets: answer {甲, 乙}, reference {甲, 乙, 丙}; LCS 2 of 3 words each way as counted
    one, two, longest = cmexam_official.rouge("甲乙甲", "甲乙丙")
    assert one == pytest.approx(2 * (1 * 2 / 3) / (1 + 2 / 3), abs=1e-6)
    assert two == pytest.approx(2 * (0.5 * 0.5) / 1, abs=1e-6)
    assert longest == pytest.approx(2 / 3, abs=1e-6)
    # P = 1, R = 0.1: (P² + R²) P R / (P³ + R³), not 2PR / (P + R)
    assert cmexam_official.rouge("甲", "甲乙丙丁戊己庚辛壬癸")[2] == pytest.approx(0.101 / 1.001, abs=1e-6)
    assert cmexam_official.bleu([list("甲乙丙丁")], [list("甲乙")], 1) == pytest.approx(100 * 2.718281828459045**-1)
    precision, recall, f1 = cmexam_official.weighted_scores(["A", "A", "B"], ["A", "无答案", "A"])
    assert (precision, recall, f1) == pytest.approx(((2 * 0.5 + 0) / 3, (2 * 0.5 + 0) / 3, (2 * 0.5 + 0) / 3))


def test_what_the_published_scorer_cannot_read_is_refused():
    row = {"Question": "甲？", "Options": "A 一\nB.二", "Answer": "A", "Explanation": ""}
    with pytest.raises(BadRow, match="undefined in the published scorer"):
        TASKS["cmexam_official"].parse(row)

"""Training and evaluation rows out of graphs, and the tool that builds whole data sets."""

import csv
import dataclasses
import itertools
import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import openpyxl
import pytest
from papers import write_docx, write_pdf
from test_cleaning import characters

from suwen.data_folder import PARSERS, validate
from suwen.fact_items import (
    PLACEHOLDER,
    choice_items,
    corpus_rows,
    exam_items,
    find_leaks,
    held_out_wordings,
    open_book_items,
    preference_items,
    recall_items,
    reverse_items,
)
from suwen.fictional import assign_groups, fictional_graph
from suwen.formats import BadRow
from suwen.graph_readers import load_graph
from suwen.knowledge_graph import Entity, Fact, Graph
from suwen.loading import load_rows
from suwen.mixing import as_text, exam_messages, record_rows
from suwen.near_duplicates import normal_form
from suwen.pairs import MARGINS, own_answer_row, pair_rows, reading_pair_rows, scored_rows
from suwen.phrasings import GENERIC, PHRASINGS, PROSE, RELATIONS, phrasings_of
from suwen.readers import parse_sources
from suwen.retrieval.documents import read_sections
from suwen.retrieval.grounding import INSTRUCTION
from suwen.synthesis import (
    SynthesisRules,
    article_rows,
    dialogue_rows,
    exam_rows,
    fill,
    prepare,
    question_rows,
    questions_of,
    reading_rows,
    replay_rows,
    reverse_rows,
    wordings_of,
    wrong_values,
)
from tools import build_data, check_contamination

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "build_data.py"


@pytest.fixture(scope="module")
def fictional():
    graph = fictional_graph(75, 1)
    return prepare(graph, assign_groups(graph, 1), SynthesisRules(seed=1))


@pytest.fixture(scope="module")
def reading(fictional):
    return prepare(fictional_graph(75, 1, reading=True, values_of=fictional.graph), None, fictional.rules)


@pytest.fixture(scope="module")
def ours():
    return prepare(load_graph(sorted((ROOT / "data" / "kg").glob("*.csv")))[0])


def heads(source, group):
    return [head for head in source.items if source.groups[head] in group]


def evaluation(source):
    makers = (recall_items, choice_items, open_book_items, exam_items)
    rows = [row for maker in makers for head in source.items for row in maker(head, source)]
    return rows + [row for key in source.heads for row in reverse_items(*key, source)]


def training(source, reading):
    rows = [("pretrain", row) for head in heads(source, "AB") for row in article_rows(head, source)]
    rows += [("sft", row) for head in heads(source, "AB") for row in replay_rows(head, source)]
    makers = (question_rows, dialogue_rows, exam_rows)
    rows += [("sft", row) for maker in makers for head in heads(source, "A") for row in maker(head, source)]
    rows += [("sft", row) for key in source.heads for row in reverse_rows(*key, source)]
    rows += [("pretrain", row) for row in reading_rows(reading, 50, "text", "A")]
    rows += [("sft", row) for row in reading_rows(reading, 50, "messages", "A")]
    rows += [("preference", row) for head in heads(source, "A") for row in pair_rows(head, source)]
    return rows + [("preference", row) for row in reading_pair_rows(reading, 50, "A")]


# ----------------------------------------------------------------------------------------------------------- phrasings


@pytest.mark.parametrize("prose", [False, True], ids=["terms", "prose"])
@pytest.mark.parametrize("name", RELATIONS)
def test_every_relation_has_enough_wordings(name, prose):
    found = phrasings_of(name, prose)
    assert PHRASINGS.keys() <= RELATIONS.keys()
    assert len(found.statements) >= 8 and len(found.questions) >= 6
    assert (
        len(found.held_out_questions) >= 3 and found.held_out_statements and len(found.answers) >= (1 if prose else 3)
    )
    if found.reverse_questions:
        assert len(found.reverse_questions) >= 6 and len(found.held_out_reverse_questions) >= 2


@pytest.mark.parametrize("found", [*PHRASINGS.values(), GENERIC, PROSE], ids=[*PHRASINGS, "generic", "prose"])
def test_wordings_name_what_they_must_and_held_out_ones_are_new(found):
    for wording in found.statements + found.held_out_statements:
        assert "{e}" in wording and wording.count("{v}") == 1
    for wording in found.held_out_statements:
        assert len(wording.split("{v}")[1]) <= 1, "the value ends the statement, so that it can be scored"
    assert all("{e}" in wording and "{v}" not in wording for wording in found.questions + found.held_out_questions)
    assert all("{v}" in wording and "{e}" not in wording for wording in found.reverse_questions)
    for held, trained in (
        (found.held_out_statements, found.statements),
        (found.held_out_questions, found.questions),
        (found.held_out_reverse_questions, found.reverse_questions),
        (found.held_out_exam_stems, found.exam_stems),
    ):
        assert len(set(held + trained)) == len(held + trained)
        frames = {normal_form(PLACEHOLDER.sub("", wording)) for wording in trained}
        assert not frames & {normal_form(PLACEHOLDER.sub("", wording)) for wording in held}


# --------------------------------------------------------------------------------------------------------------- facts


def test_an_article_tells_every_fact_once_and_each_pass_words_it_anew(fictional):
    head = heads(fictional, "A")[0]
    rows = list(article_rows(head, fictional))
    assert len(rows) == fictional.rules.passes
    for row in rows:
        for item in fictional.items[head]:
            assert row["text"].count(item.values[0]) == 1
        assert row["facts"] == [fact for item in fictional.items[head] for fact in item.facts]
    for item in fictional.items[head]:
        frames = {next(w for w in wordings_of(item).statements if fill(w, item) in row["text"]) for row in rows}
        assert len(frames) == len(rows), "eight passes, eight wordings"
    orders = {
        tuple(sorted(range(4), key=lambda n: row["text"].index(fictional.items[head][n].values[0]))) for row in rows
    }
    assert len(orders) > 1, "facts come in shuffled order"


def test_lists_too_long_for_a_question_are_told_whole_in_texts_and_asked_of_nobody(tmp_path):
    facts = [Fact(f"F{number}", "D1", "symptom", f"症状{number:02}") for number in range(12)]
    facts += [Fact("G1", "D1", "department", "内科"), Fact("G2", "D2", "symptom", "发热")]
    source = prepare(Graph({"D1": Entity("D1", "胃炎", "疾病"), "D2": Entity("D2", "肺炎", "疾病")}, facts))
    for row in (*article_rows("D1", source), *replay_rows("D1", source)):
        text = row.get("text") or "".join(message["content"] for message in row["messages"])
        assert all(f"症状{number:02}" in text for number in range(12)) and len(row["facts"]) == 13
    (passage,) = corpus_rows("D1", source)
    assert all(f"症状{number:02}" in passage["content"] for number in range(12)) and len(passage["facts"]) == 13
    assert {row["relation"] for row in recall_items("D1", source)} == {"department"}
    assert {len(row["facts"]) for row in question_rows("D1", source)} == {8, 1}
    lines = "".join(f"胃炎,symptom,症状{number:02}\n" for number in range(12))
    (tmp_path / "g.csv").write_text("head,relation,tail\n" + lines, "utf-8")
    card = build_here(tmp_path / "out", "--graph", str(tmp_path / "g.csv"), "--num_proc", "1")
    left_out = card["graph"]["left_out"]
    assert left_out == {"values after the first 8 of a list, told in texts and asked in no question": 4}


def test_the_failure_case_is_one_wording_in_one_order(fictional):
    rules = dataclasses.replace(fictional.rules, max_wordings=1, shuffle=False)
    source = prepare(fictional.graph, fictional.groups, rules)
    bodies = {row["text"].split("\n")[-1] for row in article_rows(heads(source, "A")[0], source)}
    assert len(bodies) == 1


def test_questions_have_the_right_answer_and_name_their_fact(fictional):
    values = {fact.id: fact.value for fact in fictional.graph.facts}
    for head in heads(fictional, "A")[:10]:
        rows = list(question_rows(head, fictional))
        assert len(rows) == 4 * fictional.rules.questions_per_item
        for row in rows:
            assert all(values[fact] in row["messages"][1]["content"] for fact in row["facts"])
            assert fictional.graph.entities[head].name in row["messages"][0]["content"]


def test_reverse_questions_name_all_entities_or_are_not_asked(fictional):
    asked = 0
    for relation, value in fictional.heads:
        owners = {fact.head for fact in fictional.graph.facts if (fact.relation, fact.value) == (relation, value)}
        for row in reverse_rows(relation, value, fictional):
            asked += 1
            assert {fictional.groups[owner] for owner in owners} == {"A"}
            assert all(fictional.graph.entities[owner].name in row["messages"][1]["content"] for owner in owners)
    assert asked


def test_sentences_are_not_asked_back():
    facts = [Fact("F1", "M1", "indication", "用于咳嗽，痰多。"), Fact("F2", "M1", "indication", "肺炎")]
    source = prepare(Graph({"M1": Entity("M1", "药甲", "药品")}, facts))
    assert not list(reverse_rows("indication", "用于咳嗽，痰多。", source)) and not list(
        reverse_items("indication", "用于咳嗽，痰多。", source)
    )
    assert list(reverse_rows("indication", "肺炎", source)) and list(reverse_items("indication", "肺炎", source))


def test_later_turns_of_a_dialogue_do_not_name_the_entity(ours):
    for head in heads(ours, "A")[:40]:
        for row in dialogue_rows(head, ours):
            users = [m["content"] for m in row["messages"] if m["role"] == "user"]
            name = ours.graph.entities[head].name
            assert len(users) >= 2 and name in users[0] and not any(name in later for later in users[1:])


def test_no_dialogue_begins_with_a_diagnosis_and_then_asks_for_one(ours, fictional):
    for source in (ours, fictional):
        first = [row["messages"][0]["content"] for head in source.items for row in dialogue_rows(head, source)]
        told = [text for text in first if re.match("医生说我得了|家人最近查出", text)]
        assert told and not [
            text for text in told if re.search("孩子|我可能|家里|是不是|怀疑|排除", text.partition("。")[2])
        ]


def test_wrong_values_are_never_right_nor_parts_of_what_is_right(ours):
    for items in ours.items.values():
        for item in items:
            right = {f.value for f in ours.graph.facts if (f.head, f.relation) == (item.entity.id, item.relation)}
            for wrong in wrong_values(item, ours, random.Random(0), 4):
                assert not any(wrong in value or value in wrong for value in right)


def test_wrong_values_are_those_of_the_same_group(fictional):
    for group in "ABC":
        own = {
            (i.relation, value) for head in heads(fictional, group) for i in fictional.items[head] for value in i.values
        }
        for head in heads(fictional, group):
            for item in fictional.items[head]:
                found = wrong_values(item, fictional, random.Random(0), 3)
                assert len(found) == 3
                assert {(item.relation, value) for value in found} <= own


def test_what_many_entities_share_is_never_offered_as_wrong(ours):
    shared = Counter((fact.relation, fact.value) for fact in ours.graph.facts)
    assert shared["adverse_reaction", "恶心"] > 3
    offered = set()
    for head in ours.items:
        for row in exam_items(head, ours):
            wrong = {line[0]: line[2:] for line in row["Options"].split("\n")}
            offered |= {(row["relation"], text) for letter, text in wrong.items() if letter not in row["Answer"]}
    assert ("adverse_reaction", "恶心") not in offered and len(offered) > 300


def test_what_holds_for_kin_is_not_offered_as_wrong_where_lists_have_no_end(ours):
    """避免搔抓 of 湿疹 is right for 荨麻疹, too; no graph says all of it."""
    offered = {}
    for head in ours.items:
        for row in (*exam_items(head, ours), *choice_items(head, ours)):
            texts = [line[2:] for line in row["Options"].split("\n") if line[0] not in row["Answer"]]
            offered.setdefault((ours.graph.entities[head].name, row["relation"]), set()).update(texts)
    assert offered["荨麻疹", "treatment"].isdisjoint(["避免搔抓", "保湿润肤", "外用糖皮质激素"])
    assert offered["慢性阻塞性肺疾病", "treatment"].isdisjoint(["吸氧", "祛痰止咳"])
    assert "窦性心动过缓患者" not in offered["美托洛尔", "contraindication"]
    assert "短期使用镇静催眠药" not in offered["广泛性焦虑障碍", "treatment"]


def test_a_graph_of_one_speciality_has_wrong_values_all_the_same():
    facts = [Fact(f"d{n}", f"e{n}", "department", "心内科") for n in range(6)]
    facts += [
        Fact(f"s{n}{m}", f"e{n}", "symptom", f"{mark}{m}") for n, mark in enumerate("甲乙丙丁戊己") for m in "痛痒"
    ]
    entities = {f"e{n}": Entity(f"e{n}", f"{n}号病", "疾病") for n in range(6)}
    source = prepare(Graph(entities, facts))
    (item,) = (item for item in source.items["e0"] if item.relation == "symptom")
    assert (
        source.kin["e0"] >= {f"e{n}" for n in range(1, 6)} and len(wrong_values(item, source, random.Random(0), 4)) == 4
    )


def test_exam_answers_are_right_and_every_other_option_is_wrong(ours):
    rows = [row for head in ours.items for row in exam_items(head, ours)]
    assert len(rows) > 500 and any(len(row["Answer"]) > 1 for row in rows)
    values = {fact.id: fact.value for fact in ours.graph.facts}
    for row in rows:
        options = {line[0]: line[2:] for line in row["Options"].split("\n")}
        assert list(options) == list("ABCDE") and len(set(options.values())) == 5
        right = {letter for letter, text in options.items() if text in {values[fact] for fact in row["facts"]}}
        assert row["Answer"] == "".join(sorted(right))
        assert all(options[letter] in row["Explanation"] for letter in row["Answer"])
    letters = Counter(row["Answer"] for row in rows if len(row["Answer"]) == 1)
    assert min(letters.values()) > 0.7 * max(letters.values()), "no letter is a good guess"


def test_reading_examples_are_asked_as_retrieval_asks_and_answered_from_the_passage_that_they_cite(reading):
    values = {fact.id: fact.value for fact in reading.graph.facts}
    counts = Counter()
    for row in reading_rows(reading, 100, "messages", "A"):
        prompt, *others = (message["content"] for message in row["messages"])
        passages = re.findall(r"^\[(\d)\] (.*)\n(.*)$", prompt, re.MULTILINE)
        counts[len(passages)] += 1
        assert prompt.startswith(INSTRUCTION) and len(row["facts"]) == len(others[::2]) == min(8, 4 * len(passages))
        for fact, answer in zip(row["facts"], others[::2], strict=True):
            name = reading.graph.entities[fact.split(".")[0]].name
            (cited,) = [number for number, title, text in passages if title == name and values[fact] in text]
            assert answer.endswith(f"[{cited}]。") and values[fact] in answer
        for fact, question in zip(row["facts"][1:], others[1::2], strict=True):
            assert reading.graph.entities[fact.split(".")[0]].name in question
    assert set(counts) == {1, 2, 3, 4} and min(counts.values()) > 10


def test_reading_text_asks_the_same_in_a_row(reading):
    values = {fact.id: fact.value for fact in reading.graph.facts}
    for row in reading_rows(reading, 20, "text", "A"):
        answers = re.findall(r"^答：(.*)$", row["text"], re.MULTILINE)
        assert len(answers) == len(row["facts"]) == row["text"].count("问题：") >= 4
        assert all(values[fact] in answer for fact, answer in zip(row["facts"], answers, strict=True))


def test_pairs_may_have_question_wordings_of_their_own(fictional):
    source = prepare(fictional.graph, fictional.groups, dataclasses.replace(fictional.rules, pair_wordings=3))
    reading = prepare(fictional_graph(30, 1, reading=True, values_of=source.graph), None, source.rules)
    item = source.items[heads(source, "A")[0]][0]
    apart = set(questions_of(item, source, "preference"))
    assert len(apart) == 3 and apart | set(questions_of(item, source)) == set(wordings_of(item).questions)
    rows = [row for stage, row in training(source, reading) if stage != "preference" and "messages" in row]
    asked = [message["content"] for row in rows for message in row["messages"]]
    paired = [row["prompt"][0]["content"] for head in heads(source, "A") for row in pair_rows(head, source)]
    words = [part for wording in apart for part in wording.split("{e}") if len(part) > 5]
    assert not any(part in text for part in words for text in asked)
    assert any(part in text for part in words for text in paired)


def test_groups_keep_apart_and_no_wording_leaks(fictional, reading):
    rows, items = training(fictional, reading), evaluation(fictional)
    assert list(find_leaks(rows, items, fictional, reading)) == []
    texts = "\n".join(json.dumps(row, ensure_ascii=False) for _, row in rows)
    for head in heads(fictional, "C"):
        assert fictional.graph.entities[head].name not in texts
    asked = "\n".join(json.dumps(r, ensure_ascii=False) for s, r in rows if s != "pretrain" and r["recipe"] != "replay")
    for head in heads(fictional, "B"):
        assert fictional.graph.entities[head].name not in asked


def test_planted_leaks_are_found(fictional):
    items = evaluation(fictional)
    a, b, c = (heads(fictional, group)[0] for group in "ABC")
    recall = next(recall_items(a, fictional))
    wording = {"text": recall["question"] + "去看看。", "recipe": "article", "facts": recall["facts"]}
    outside = {"text": "前言。" + recall["question"] + "后记。", "recipe": "text", "facts": []}
    planted = [
        ("pretrain", next(article_rows(c, fictional))),
        ("sft", next(question_rows(b, fictional))),
        ("pretrain", wording),
        ("pretrain", outside),
        ("pretrain", next(article_rows(b, fictional))),  # as it should be
    ]
    leaks = list(find_leaks(planted, items, fictional))
    assert [(leak.fault, leak.generated) for leak in leaks] == [
        ("holds facts of group C", True),
        ("holds facts of group B", True),
        ("has the words of a held-out wording", True),
        ("holds an evaluation question", False),
    ]
    assert str(leaks[0]).startswith("pretrain, recipe article: '") and str(leaks[0]).endswith(
        "' holds facts of group C"
    )


def every_relation(relations):
    """Two diseases or drugs with each relation, one of them in group C; values are terms and, apart, sentences."""
    facts, entities = [], {}
    for number, name in enumerate(relations):
        kind = RELATIONS[name].head if name in RELATIONS else "疾病"
        for group in "AC":
            head = f"{group}{number}"
            entities[head] = Entity(head, f"{group}{number}型湿疹", kind)
            facts += [Fact(f"{head}.1", head, name, f"{group}{number}值")]
            prose = f"{head}p"
            entities[prose] = Entity(prose, f"{group}{number}型癣病", kind)
            facts += [Fact(f"{prose}.1", prose, name, f"这一句话讲的是{group}{number}的情况。")]
    return prepare(Graph(entities, facts), {head: head[0] for head in entities})


def test_every_held_out_wording_is_found_where_it_is_planted():
    source = every_relation([*RELATIONS, "colour", "医保报销的比例和范围"])  # the last two have generic wordings
    planted, fine = [], []
    for items in source.items.values():
        for item in items:
            group = "pretrain", {"recipe": "article", "facts": list(item.facts) if item.entity.id[0] == "A" else []}
            found = wordings_of(item)
            for wording in held_out_wordings(found):
                planted.append((wording, item, group))
            for wording in (*found.statements, *found.questions, *found.reverse_questions, *found.exam_stems):
                fine.append((wording, item, group))
    assert len({wording for wording, *_ in planted}) > 250

    def leaks(wordings):
        rows = []
        for wording, item, (stage, row) in wordings:
            text = wording.replace("{e}", item.entity.name).replace("{v}", item.values[0])
            rows.append((stage, {**row, "text": f"先说一句。{text}\n又说一句。"}))
        return {(leak.place, leak.generated) for leak in find_leaks(rows, [], source)}, rows

    found, rows = leaks(planted)
    places = {(f"{stage}, recipe article: {row['text'][:60]!r}", bool(row["facts"])) for stage, row in rows}
    assert found == places
    assert leaks(fine)[0] == set(), "no wording of training is taken for one that is held out"


def test_a_row_that_names_an_entity_of_another_group_leaks_whatever_its_labels_say(fictional):
    a, b, c = (fictional.graph.entities[heads(fictional, group)[0]].name for group in "ABC")
    row = next(article_rows(heads(fictional, "A")[0], fictional))
    texts = {name: {**row, "text": row["text"] + f"与{name}不同。"} for name in (a, b, c)}
    found = {
        (stage, name): [leak.fault for leak in find_leaks([(stage, texts[name])], [], fictional)]
        for stage in ("pretrain", "sft")
        for name in (a, b, c)
    }
    facts_of = "holds facts of group {}".format
    assert found == {
        ("pretrain", a): [], ("pretrain", b): [], ("pretrain", c): [facts_of("C")],
        ("sft", a): [], ("sft", b): [facts_of("B")], ("sft", c): [facts_of("C")],
    }  # fmt: skip


def test_a_name_that_is_also_a_value_gives_nothing_away():
    facts = [Fact("F1", "D1", "complication", "肺炎"), Fact("F2", "D2", "symptom", "发热")]
    graph = Graph({"D1": Entity("D1", "流感", "疾病"), "D2": Entity("D2", "肺炎", "疾病")}, facts)
    source = prepare(graph, {"D1": "A", "D2": "C"})
    assert not list(find_leaks([("pretrain", row) for row in article_rows("D1", source)], [], source))


def test_the_card_counts_rows_by_relation_duplicates_and_personal_data_of_what_is_made_of_a_graph(tmp_path):
    text = "姓名：王小明，男，因反复上腹疼痛两个月到消化内科就诊，经检查确诊，按时服药后好转。"
    (tmp_path / "g.csv").write_text(f"name,desc,symptom\n甲型胃炎,{text},上腹痛\n乙型胃炎,,腹胀\n", "utf-8")
    words = ("--graph", str(tmp_path / "g.csv"), "--num_proc", "1", "--passes", "16", "--replay", "0", "--reading", "0")
    card = build_here(tmp_path / "out", *words)
    assert card["graph"]["personal_data"]["name"] >= 16
    rows = [
        json.loads(line) for file in (tmp_path / "out").glob("[ps]*/*.jsonl") for line in file.open(encoding="utf-8")
    ]
    facts = {row["facts"][0] for row in rows if row["recipe"] == "question" and "王小明" in str(row)}
    assert card["graph"]["relations"]["definition"]["rows"] == sum(bool(facts & set(row["facts"])) for row in rows)
    articles = [row["text"] for row in rows if row["recipe"] == "article"]
    (entry,) = [file for file in card["files"] if file["file"] == "pretrain/article.jsonl"]
    assert entry["duplicates"] == len(articles) - len(set(articles)) > 0
    masked = build_here(tmp_path / "out", *words, "--pii", "mask")
    assert masked["graph"]["personal_data"] == card["graph"]["personal_data"]
    assert not any("王小明" in file.read_text("utf-8") for file in (tmp_path / "out").glob("[ps]*/*.jsonl"))


def test_the_card_says_which_facts_no_evaluation_asks_and_why(tmp_path):
    """Texts on causes and treatments, as disease tables have them, are told in training and asked in no question."""
    file = tmp_path / "diseases.csv"
    names = "甲乙丙丁戊己"
    symptoms = "、".join(f"{place}痛" for place in "头颈肩胸腹腰膝踝腕肘")
    rows = [
        f"{name}型胃炎,{symptoms if name == '甲' else name + '处发热'},{name}病因复杂。多由受凉引起。" for name in names
    ]
    file.write_text("name,symptom,cause\n" + "\n".join(rows) + "\n", "utf-8")
    words = ("--recipe", "graph", "--graph", str(file), "--num_proc", "1", "--pairs", "0", "--evaluation")
    card = build_here(tmp_path / "all", *words, "300")
    texts = "in texts, whose answers cannot be judged by the words they name"
    assert card["graph"]["not_evaluated"] == {texts: 6, "after the first 8 of a list": 2}
    page = (tmp_path / "all" / "data_card.md").read_text("utf-8")
    assert f"Facts that no evaluation asks: after the first 8 of a list 2, {texts} 6." in page
    few = build_here(tmp_path / "few", *words, "1")["graph"]["not_evaluated"]
    assert few[texts] == 6 and few["of an entity beyond --evaluation"] >= 4


def test_every_evaluation_file_is_read_back_by_the_task_that_asks_it(tmp_path):
    build_here(tmp_path / "out", "--recipe", "fictional", "--size", "12", "--passes", "2", "--num_proc", "1")
    names = {file.stem for file in (tmp_path / "out" / "evaluation").glob("*.jsonl")}
    assert names == {*PARSERS, "passage"}
    for name in PARSERS:
        file = tmp_path / "out" / "evaluation" / f"{name}.jsonl"
        written = file.read_text("utf-8")
        file.write_text(written + '{"id": "x", "recipe": "x"}\n', "utf-8")
        with pytest.raises(ValueError, match=f"{name}.jsonl, line {written.count(chr(10)) + 1}: "):
            validate(tmp_path / "out")
        file.write_text(written, "utf-8")


def test_a_build_that_gives_away_what_it_asks_ends_with_an_error(tmp_path, monkeypatch, capsys):
    text = "患者常问：甲型胃炎是由什么造成的？这要从饮食说起，也要看有没有幽门螺杆菌感染，具体由医生判断。"
    (tmp_path / "g.csv").write_text(f"name,desc,cause\n甲型胃炎,{text},受凉\n乙型胃炎,胃黏膜的炎症。,劳累\n", "utf-8")
    words = ("--graph", str(tmp_path / "g.csv"), "--num_proc", "1", "--passes", "1")
    with pytest.raises(
        ValueError, match=r"rows made of the graph give away what is evaluated, such as pretrain, recipe"
    ):
        build_here(tmp_path / "out", *words)
    card = json.loads((tmp_path / "out" / "data_card.json").read_text("utf-8"))
    assert card["leaks"]["generated"] == card["leaks"]["count"] > 0
    (tmp_path / "g.csv").write_text("name,cause\n甲型胃炎,受凉\n乙型胃炎,劳累\n", "utf-8")
    (tmp_path / "t.txt").write_text(text, "utf-8")
    card = build_here(tmp_path / "out", *words, "--text", str(tmp_path / "t.txt"))
    assert card["leaks"]["count"] == 1 and card["leaks"]["generated"] == 0
    assert "warning: 1 rows of other files hold an evaluation question" in capsys.readouterr().err


def test_the_end_of_a_sentence_and_the_beginning_of_the_next_are_no_held_out_wording(fictional):
    head = heads(fictional, "A")[0]
    row = next(article_rows(head, fictional))
    texts = ("检查单开给昙型湿疹患者的。处方上写着卡巴素。", "检查单开给昙型湿疹患者的处方上写着卡巴素。")
    found = [list(find_leaks([("pretrain", {**row, "text": text})], [], fictional)) for text in texts]
    assert [len(lines) for lines in found] == [0, 1]


def test_evaluation_covers_every_fact_of_a_fictional_graph_and_names_its_group(fictional):
    facts = {fact.id for fact in fictional.graph.facts}
    for maker, number in (
        (recall_items, 4),
        (choice_items, 2),
        (open_book_items, 4),
        (exam_items, 1),
        (corpus_rows, 1),
    ):
        rows = [row for head in fictional.items for row in maker(head, fictional)]
        assert Counter(fact for row in rows for fact in row["facts"]) == dict.fromkeys(facts, number)
        assert len({row["id"] for row in rows}) == len(rows)
        assert all(row["group"] == fictional.groups[row["facts"][0].split(".")[0]] for row in rows)


def test_choice_items_end_a_held_out_statement_with_four_values(fictional):
    values = {fact.id: fact.value for fact in fictional.graph.facts}
    for head in fictional.items:
        for row in choice_items(head, fictional):
            options = {line[0]: line[2:] for line in row["Options"].split("\n")}
            assert list(options) == list("ABCD") and len(set(options.values())) == 4
            assert options[row["Answer"]] == values[row["facts"][0]]
            assert row["Suffix"] == "。" and row["Question"].count(fictional.graph.entities[head].name) == 1


# --------------------------------------------------------------------------------------------------------------- pairs


def test_pairs_differ_in_their_fault_alone(ours):
    rows = [row for head in ours.items for row in pair_rows(head, ours)]
    faults = Counter(row["fault"] for row in rows)
    assert set(faults) == set(MARGINS) - {"own wrong answer"}
    assert faults["wrong value"] + faults["one wrong value"] >= 0.4 * len(rows)
    assert faults["one wrong value"] > 0.1 * len(rows), "most items have several values"
    values = {fact.id: fact.value for fact in ours.graph.facts}
    for row in rows:
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        right = [values[fact] for fact in row["facts"]]
        assert row["margin"] == MARGINS[row["fault"]] and chosen != rejected
        assert all(value in chosen for value in right)
        if row["fault"] == "repetition":
            assert rejected in (chosen * 3, chosen * 4)
        elif row["fault"] == "omission":
            assert 0 < sum(value in rejected for value in right) < len(right)
        elif row["fault"] == "invented extra":
            assert all(value in rejected for value in right) and len(rejected) > len(chosen)
        elif row["fault"] == "one wrong value":
            assert sum(value not in rejected for value in right) == 1 and len(right) > 1
        elif row["fault"] == "wrong value":
            assert not any(value in rejected for value in right)


def test_an_omission_is_no_answer_to_the_question_and_another_answer_is_none(ours):
    """哪种药 is answered by one drug of three; the drugs of a disease are a way to treat it."""
    rows = [row for head in ours.items for row in pair_rows(head, ours)]
    omitted = [row["prompt"][0]["content"] for row in rows if row["fault"] == "omission"]
    omitted += [
        row["question"] for head in ours.items for row in preference_items(head, ours) if row["fault"] == "omission"
    ]
    assert len(omitted) > 100 and not [question for question in omitted if re.search("哪种|哪项|最", question)]
    values = {}
    for fact in ours.graph.facts:
        values.setdefault((fact.head, fact.relation), []).append(fact.value)
    relation = {fact.id: (fact.head, fact.relation) for fact in ours.graph.facts}
    for row in rows:
        head, asked = relation[row["facts"][0]]
        if row["fault"] == "answer to another question" and asked in ("treatment", "population_warning"):
            akin = {"treatment": "drug", "population_warning": "contraindication"}[asked]
            assert "、".join(values.get((head, akin), ["-"])) not in row["rejected"][0]["content"]


def test_a_sentence_is_no_wrong_value_of_a_reading_question_on_a_term():
    entities = {name: Entity(name, f"{name}号扁平疣", "疾病") for name in "甲乙"}
    facts = [Fact("f1", "甲", "prognosis", "98%"), Fact("f2", "乙", "prognosis", "多数可治愈，少数复发。")]
    rows = list(reading_pair_rows(prepare(Graph(entities, facts)), 40))
    assert not [row for row in rows if "多数可治愈" in row["rejected"][0]["content"]]


def test_what_may_be_said_in_other_words_is_no_wrong_value():
    """Of a transmission 非传染性疾病 is as right as 无传染性, and no fault of a pair."""
    texts = ("无传染性", "非传染性疾病", "不传染", "无传染")
    entities = {f"e{n}": Entity(f"e{n}", f"{n}型胃炎", "疾病") for n in range(4)}
    facts = [Fact(f"t{n}", f"e{n}", "transmission", text) for n, text in enumerate(texts)]
    facts += [Fact(f"d{n}", f"e{n}", "department", f"{n}号门诊") for n in range(4)]
    source = prepare(Graph(entities, facts), None, SynthesisRules(pairs_per_item=8))
    rows = [row for head in source.items for row in pair_rows(head, source)] + list(reading_pair_rows(source, 40))
    rows = [row for row in rows if row["facts"][0].startswith("t")]
    assert {row["fault"] for row in rows} == {"answer to another question", "repetition", "unsafe advice"}
    held_out = [row for head in source.items for row in preference_items(head, source)]
    assert not [row for row in held_out if row["relation"] == "transmission" and "extra" in row["fault"]]


def test_examples_are_listed_as_examples(ours):
    """列举几种他汀类药物。 is not answered by 是阿托伐他汀。"""
    rows = [row for key in ours.heads if key[0] == "drug_class" for row in reverse_rows(*key, ours)]
    assert rows and not [row for row in rows if row["messages"][1]["content"].startswith("是")]


def test_relations_with_the_same_value_make_no_pair_of_equals():
    facts = [Fact(f"f{number}", "e", name, "两周") for number, name in enumerate(("course", "treatment"))]
    facts += [Fact(f"g{number}", f"o{number}", "course", f"{number}天") for number in range(4)]
    entities = {key: Entity(key, f"{key}病", "疾病") for key in ("e", "o0", "o1", "o2", "o3")}
    source = prepare(Graph(entities, facts), None, SynthesisRules(pairs_per_item=8))
    rows = list(pair_rows("e", source))
    assert rows and all(row["chosen"] != row["rejected"] for row in rows)
    assert "answer to another question" not in {row["fault"] for row in rows}


def test_rejected_values_are_real_values_of_the_list(fictional, reading):
    """Random strings as rejected values taught a model to avoid real ones: recall fell while pair accuracy rose."""
    rows = [
        row for head in heads(fictional, "A") for row in pair_rows(head, fictional) if row["fault"] == "wrong value"
    ]
    known = set(itertools.chain(*fictional.values.values()))
    assert all(any(value in row["rejected"][0]["content"] for value in known) for row in rows)
    known = set(itertools.chain(*reading.values.values()))
    for row in reading_pair_rows(reading, 50, "A"):
        assert any(value in row["rejected"][0]["content"] for value in known)


def test_own_wrong_answers_become_pairs_and_right_ones_do_not(fictional):
    head = heads(fictional, "A")[0]
    row, item = next(question_rows(head, fictional)), fictional.items[head][0]
    assert own_answer_row(row, row["messages"][1]["content"], item, fictional) is None
    assert own_answer_row(row, "  ", item, fictional) is None
    pair = own_answer_row(row, "不知道去哪里看。", item, fictional)
    assert pair is not None and pair["rejected"][0]["content"] == "不知道去哪里看。"
    assert pair["chosen"] == row["messages"][1:] and pair["facts"] == row["facts"]


def test_a_models_answers_to_the_questions_of_a_build_become_pairs_of_the_next_one(tmp_path):
    words = ("--recipe", "fictional", "--size", "10", "--answers", "value", "--num_proc", "1")
    words += ("--output_dir", str(tmp_path / "out"))
    assert build(*words).returncode == 0
    rows = [json.loads(line) for line in open(tmp_path / "out" / "sft" / "question.jsonl", encoding="utf-8")]
    said = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in rows}
    wrong = list(said)[:3]
    said |= dict.fromkeys(wrong, "不清楚。") | {"哪里看牙？": "口腔科。"}
    answers = tmp_path / "answers.jsonl"
    lines = [json.dumps({"prompt": asked, "response": answer}) + "\n" for asked, answer in said.items()]
    answers.write_text("".join([*lines, "{}\n"]), encoding="utf-8")
    done = build(*words, "--own_answers", str(answers))
    assert done.returncode == 0, done.stderr
    pairs = [json.loads(line) for line in open(tmp_path / "out" / "preference" / "own_answer.jsonl", encoding="utf-8")]
    assert [pair["prompt"][0]["content"] for pair in pairs] == wrong
    card = json.loads((tmp_path / "out" / "data_card.json").read_text(encoding="utf-8"))
    assert card["refused"] == {"answer to a question of no row": 1, "no prompt and response": 1}
    for given in (("--recipe", "reading"), ("--qa", str(answers))):  # no graph whose questions could have been answered
        done = build(*given, "--own_answers", str(answers), "--output_dir", str(tmp_path / "no"))
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--own_answers" in done.stderr


def test_scored_answers_become_pairs_with_the_gap_as_margin():
    records = [
        ("a", {"prompt": "问", "responses": ["好", "差", "中"], "scores": [5, 1, 4.5]}),
        ("b", {"question": "问", "ranked": ["一", "二", "三"]}),
        ("c", {"prompt": "问", "chosen": "甲", "rejected": "乙"}),
        ("d", {"prompt": "问", "responses": ["好", "差"]}),
        ("e", {"prompt": "问", "responses": ["好", "差"], "scores": [1, "x"]}),
        ("f", {"prompt": "问", "responses": ["好", "差"], "scores": 3}),
        ("g", {"prompt": "问", "responses": ["好", "差"], "scores": "31"}),
        ("h", {"prompt": "问", "responses": ["好", "差"], "scores": [1, float("nan")]}),
        ("i", "一行文字"),
        ("j", ["好", "差"]),
    ]
    rows = list(scored_rows(records))
    made = [(r["chosen"][0]["content"], r["rejected"][0]["content"], r["margin"]) for r in rows[:3]]
    assert made == [("好", "差", 4), ("一", "二", 1), ("一", "三", 2)]
    assert rows[3]["recipe"] == "given pair"
    assert [type(row) for row in rows[4:]] == [BadRow] * 7
    assert [str(row).split(": ")[1] for row in rows[4:]] == list("defghij"), "each names its place"


# -------------------------------------------------------------------------------------------------------------- mixing


def test_exam_rows_keep_their_options_and_a_key_without_option_is_refused():
    row = {"Question": "病因是", "Options": "A 甲\nB 乙\nC 丙", "Answer": "AC", "Explanation": "nan"}
    prompt, answer = (message["content"] for message in exam_messages(row, "x"))
    assert "A 甲\nB 乙\nC 丙" in prompt and "病因是" in prompt and answer == "答案：AC"
    with pytest.raises(BadRow, match="row without an answer"):
        exam_messages({**row, "Answer": "D"}, "x")


def test_conversations_as_text_name_their_speakers():
    two = [{"role": "user", "content": "咳嗽"}, {"role": "assistant", "content": "多喝水"}]
    assert as_text({"messages": two, "where": "x"}) == {"text": "问：咳嗽\n答：多喝水", "where": "x"}
    assert as_text({"messages": two * 2})["text"] == "患者：咳嗽\n医生：多喝水\n患者：咳嗽\n医生：多喝水"


def test_a_record_says_what_the_labels_say_and_no_more(tmp_path):
    turns = [
        {"speaker": "患者", "sentence": "咳嗽，鼻塞", "normalized": ["咳嗽", "鼻塞"], "type": ["1", "1"]},
        {"speaker": "医生", "sentence": "发热吗？是支气管炎", "normalized": ["发热", "支气管炎"], "type": ["0", "1"]},
        {"speaker": "患者", "sentence": "不发热", "normalized": ["呕吐"], "type": ["2"]},
    ]
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps({"dialogue-content": turns}) + "\n" + json.dumps({"dialogue-content": turns[2:]}) + "\n")
    refused = []
    (row,) = record_rows(parse_sources(str(file))[0], lambda *place: refused.append(place[1]))
    assert row["messages"][1]["content"] == (
        "主诉：咳嗽、鼻塞。\n现病史：患者有咳嗽、鼻塞。否认呕吐。\n对话中提到的诊断：支气管炎。"
    )
    assert refused == ["dialogue without enough labelled symptoms"]


def test_what_the_patient_has_not_is_denied_and_what_the_doctor_excludes_is_no_symptom(tmp_path):
    turns = [
        {"speaker": "患者", "sentence": "咳嗽，鼻塞", "normalized": ["咳嗽", "鼻塞"], "type": ["1", "1"]},
        {"speaker": "医生", "sentence": "不是肺炎，没有呕吐吧", "normalized": ["肺炎", "呕吐"], "type": ["2", "2"]},
    ]
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps({"dialogue-content": turns}) + "\n")
    (row,) = record_rows(parse_sources(str(file))[0], lambda *place: None)
    assert row["messages"][1]["content"].endswith("否认呕吐。\n对话中排除的诊断：肺炎。")


# ---------------------------------------------------------------------------------------------------------------- tool


def build(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, TOOL, *words], capture_output=True, text=True)


def build_here(folder: Path, *words: str) -> dict:
    """The data card of a build in this process, which is seconds quicker."""
    build_data.main([*words, "--output_dir", str(folder)])
    return json.loads((folder / "data_card.json").read_text("utf-8"))


def test_the_reading_recipe_makes_questions_whose_answers_stand_before_them(tmp_path):
    done = build("--recipe", "reading", "--size", "20", "--answers", "value", "--output_dir", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == ["sft"]
    rows = [json.loads(line) for line in open(tmp_path / "out" / "sft" / "reading.jsonl", encoding="utf-8")]
    assert len(rows) == 80
    for row in rows:
        prompt, *turns = row["messages"]
        answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
        assert len(answers) >= 4
        assert all(re.sub(r"\[\d\]。$", "", answer) in prompt["content"] for answer in answers)


def contents(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("data_card")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_the_same_seed_gives_the_same_bytes_with_any_number_of_processes(tmp_path):
    words = ("--recipe", "fictional", "--size", "60", "--passes", "2", "--seed", "5")
    for name, num_proc in (("one", "1"), ("two", "2")):
        result = build(*words, "--output_dir", str(tmp_path / name), "--num_proc", num_proc)
        assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    card = json.loads((tmp_path / "one" / "data_card.json").read_text("utf-8"))
    assert card["leaks"] == {"count": 0, "generated": 0, "first": []} and card["graph"]["facts"] == 240
    for entry in card["files"]:
        rows = (tmp_path / "one" / entry["file"]).read_text("utf-8").splitlines()
        assert len(rows) == entry["rows"] and sum(entry["groups"].values()) == entry["rows"]
    for stage, schema in (("pretrain", "text"), ("sft", "conversation"), ("preference", "preference")):
        assert sum(1 for _ in load_rows(str(tmp_path / "one" / stage), schema)) > 50
    with open(tmp_path / "one" / "evaluation" / "exam.csv", encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0])[:4] == ["Question", "Options", "Answer", "Explanation"] and len(rows) == 240


def test_the_contamination_check_finds_no_item_of_a_build_in_its_own_training_rows(tmp_path):
    build_here(tmp_path / "out", "--recipe", "fictional", "--size", "12", "--passes", "2", "--num_proc", "1")
    training = ",".join(str(tmp_path / "out" / stage) for stage in ("pretrain", "sft", "preference"))
    words = ["--tasks", "injection", "--data_dir", str(tmp_path / "out" / "evaluation"), "--train_file_dir"]
    check_contamination.main([*words, training, "--output_dir", str(tmp_path / "clean")])
    check_contamination.main([*words, f"{tmp_path}/out/evaluation", "--output_dir", str(tmp_path / "dirty")])
    kinds = {
        name: Counter(json.loads(line)["kind"] for line in (tmp_path / name / "items.jsonl").open(encoding="utf-8"))
        for name in ("clean", "dirty")
    }
    assert kinds["clean"].keys() <= {"clean", "unknown", "near"}, "held-out wordings reword those of training"
    assert kinds["dirty"]["exact"] > kinds["clean"].total() / 2, "what stands there is found"


def test_own_files_are_mixed_in_cleaned_masked_and_freed_of_test_items(tmp_path):
    (tmp_path / "g.csv").write_text(
        "name,symptom,department\n甲型胃炎,上腹痛 反酸,消化内科\n乙型胃炎,腹胀 嗳气,消化内科\n", "utf-8"
    )
    leak = "成人稳定型心绞痛患者首选的口服抗血小板药物应当是下列哪一种"
    texts = [
        "<p>姓名：王小明，男，因反复上腹疼痛两个月到消化内科就诊。</p>",
        f"试题集锦：{leak}，请同学们认真复习。",
        "短",
    ]
    (tmp_path / "t.txt").write_text("\n".join(texts), "utf-8")
    (tmp_path / "q.jsonl").write_text(
        '{"question": "胃痛应该吃什么药比较好？", "answer": "先查明原因，不要自行用药。"}\n{"x": 1}\n', "utf-8"
    )
    (tmp_path / "e.csv").write_text(f'Question,Options,Answer\n{leak},"A 甲\nB 乙",A\n', "utf-8")
    output = tmp_path / "out"
    flags = {"graph": "g.csv", "text": "t.txt", "qa": "q.jsonl:2", "tests": "e.csv"}
    words = [word for name, file in flags.items() for word in (f"--{name}", str(tmp_path / file))]
    result = build(
        *words, "--pii", "mask", "--output_dir", str(output), "--num_proc", "1", "--licences", f"{tmp_path}/t.txt=CC0"
    )
    assert result.returncode == 0, result.stderr
    text = [json.loads(line)["text"] for line in (output / "pretrain" / "text.jsonl").read_text("utf-8").splitlines()]
    assert text == ["姓名：[姓名]，男，因反复上腹疼痛两个月到消化内科就诊。"]
    assert len((output / "sft" / "qa.jsonl").read_text("utf-8").splitlines()) == 2, "weight 2"
    card = json.loads((output / "data_card.json").read_text("utf-8"))
    assert card["cleaning"]["pretrain"]["dropped"] == {"holds a test item": 1, "too short": 1}
    assert card["cleaning"]["pretrain"]["personal_data"] == {"name": 1} and card["refused"] == {"wrong schema": 1}
    assert {s["path"]: s["licence"] for s in card["sources"]}[f"{tmp_path}/t.txt"] == "CC0"
    reasons = [json.loads(line)["reason"] for line in (output / "dropped_rows.jsonl").read_text("utf-8").splitlines()]
    assert sorted(reasons) == ["holds a test item", "too short", "wrong schema"]
    page = (output / "data_card.md").read_text("utf-8")
    assert "holds a test item 1" in page and "No medical advice" in page


def test_no_row_made_of_a_graph_asks_what_a_test_asks(tmp_path):
    (tmp_path / "g.csv").write_text(
        "药品,适应症,禁忌\n" + "".join(f"药{n}片,咳嗽{n} 痰多{n},孕妇{n}\n" for n in "甲乙丙丁"), "utf-8"
    )
    tests = "instruction,医学专家标注的适应病症\n药甲片的适应病症,咳嗽甲\n药乙片的适应病症,咳嗽乙\n药甲片,咳嗽甲\n"
    (tmp_path / "t.csv").write_text(tests, "utf-8")
    words = ("--graph", str(tmp_path / "g.csv"), "--questions", "99", "--num_proc", "1", "--pairs", "12")
    build_here(tmp_path / "all", *words)
    card = build_here(tmp_path / "less", *words, "--tests", str(tmp_path / "t.csv"))

    def holding(folder: str, question: str) -> Counter:
        found = Counter()
        for file in (tmp_path / folder).glob("[ps]*/*.jsonl"):
            rows = file.read_text("utf-8").splitlines()
            found[f"{file.parent.name}/{file.stem}"] += sum(question in row for row in rows)
        return +found

    before = {name: holding("all", f"{name}的适应病症") for name in ("药甲片", "药乙片", "药丙片")}
    assert {"pretrain/article", "sft/question", "preference/pair"} <= before["药甲片"].keys()
    assert not holding("less", "药甲片的适应病症") and not holding("less", "药乙片的适应病症")
    assert holding("less", "药丙片的适应病症")["sft/question"] == before["药丙片"]["sft/question"] > 0
    left_out = card["left_out"]["sft/question: holds a test item"]
    assert left_out == before["药甲片"]["sft/question"] + before["药乙片"]["sft/question"]
    assert card["refused"] == {"test question of fewer than 5 characters, not looked for": 1}
    assert f"sft/question: holds a test item {left_out}" in (tmp_path / "less" / "data_card.md").read_text("utf-8")


def write_lines(path: Path, *rows: object) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def workbook(path: Path, *rows: tuple[str, ...]) -> None:
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.save(path)


def test_workbooks_are_read_as_graph_as_rows_and_as_documents(tmp_path):
    workbook(tmp_path / "g.xlsx", ("name", "symptom"), ("胃炎", "上腹痛"), ("肺炎", "发热"))
    workbook(tmp_path / "q.xlsx", ("question", "answer"), ("胃痛应该吃什么药比较好？", "先查明原因，不要自行用药。"))
    words = ("--graph", str(tmp_path / "g.xlsx"), "--qa", str(tmp_path / "q.xlsx"), "--num_proc", "1")
    card = build_here(tmp_path / "out", *words)
    assert card["graph"]["facts"] == 2
    assert {file["file"]: file["rows"] for file in card["files"]}["sft/qa.jsonl"] == 1
    sections = list(read_sections(tmp_path / "g.xlsx", "g.xlsx"))
    assert [section.title for section in sections] == ["胃炎", "肺炎"]


def test_books_and_guidelines_are_read_as_documents_of_every_kind(tmp_path):
    books = tmp_path / "books"
    books.mkdir()
    chapter = characters(400, 1) + "。"
    lines = ["第一章 定义", *(chapter[at : at + 31] for at in range(0, len(chapter), 31)), "- 12 -"]
    (books / "wrapped.txt").write_text("\n".join(lines), "utf-8")
    (books / "lines.txt").write_text(
        "慢性胃炎是胃黏膜的慢性炎症，多与感染有关。\n发热是常见症状，要先查明原因，再对症处理。\n", "utf-8"
    )
    (books / "page.md").write_text("# 高血压\n\n高血压患者应当低盐饮食，按时服药，定期测量血压。\n", "utf-8")
    write_docx(
        books / "guide.docx", [("Heading 1", "用药指导"), ("Normal", "地高辛中毒的早期表现是恶心和黄视，要立即停药。")]
    )
    write_pdf(
        books / "paper.pdf", ["糖尿病的典型症状是多饮、多食、多尿和体重下降，要定", "期检查眼底，并长期控制血糖。"]
    )
    (books / "old.doc").write_text("x")
    card = build_here(tmp_path / "out", "--text", str(books), "--num_proc", "1")
    rows = map(json.loads, (tmp_path / "out" / "pretrain" / "text.jsonl").read_text("utf-8").splitlines())
    assert [row["text"] for row in rows] == [
        "# 用药指导\n地高辛中毒的早期表现是恶心和黄视，要立即停药。",
        "慢性胃炎是胃黏膜的慢性炎症，多与感染有关。",
        "发热是常见症状，要先查明原因，再对症处理。",
        "# 高血压\n高血压患者应当低盐饮食，按时服药，定期测量血压。",
        "糖尿病的典型症状是多饮、多食、多尿和体重下降，要定\n期检查眼底，并长期控制血糖。",
        f"第一章定义\n{chapter}",
    ]
    assert card["sources"][0]["ignored"] == [str(books / "old.doc")]
    assert f"Passed over, of no known kind: {books}/old.doc." in (tmp_path / "out" / "data_card.md").read_text("utf-8")


def test_ids_with_dots_are_ids_like_others(tmp_path):
    rows = ("head,relation,tail,id\n", "v1.2.胃炎,symptom,上腹痛,f.1\n", "v1.3.肺炎,a.recall.b,发热,f.2\n")
    (tmp_path / "nodes.csv").write_text("id,name,type\nv1.2.胃炎,胃炎,疾病\nv1.3.肺炎,肺炎,疾病\n", "utf-8")
    (tmp_path / "triples.csv").write_text("".join(rows), "utf-8")
    files = f"{tmp_path}/nodes.csv,{tmp_path}/triples.csv"
    card = build_here(tmp_path / "out", "--graph", files, "--num_proc", "1", "--passages", "1")
    assert card["retrieval"]["right_passage_found"] == card["retrieval"]["questions"] > 0


@pytest.mark.parametrize(
    ("recipe", "files"),
    [
        (
            "chimed",
            {"pretrain/article", "pretrain/qa_text", "pretrain/text", "sft/general", "pretrain/reading"}
            | {"pretrain/exam_text", "pretrain/dialogue_text", "sft/exam", "sft/recorded_dialogue"}
            | {"preference/given_pair"},
        ),
        (
            "qizhen",
            {"sft/question", "sft/qa", "sft/dialogue", "sft/general", "pretrain/text", "sft/reverse", "sft/reading"}
            | {"sft/exam", "sft/recorded_dialogue", "sft/medical_record", "preference/given_pair"},
        ),
    ],
)
def test_recipes_compose_the_stages_as_their_models_did(tmp_path, recipe, files):
    qa = tmp_path / "q.jsonl"
    qa.write_text('{"question": "胃痛应该吃什么药比较好？", "answer": "先查明原因，不要自行用药。"}\n', "utf-8")
    general = tmp_path / "n.jsonl"
    general.write_text(
        '{"instruction": "写一句祝福的话送给朋友。", "output": "祝你每天都有好心情，事事顺利。"}\n', "utf-8"
    )
    text = tmp_path / "t.txt"
    text.write_text("慢性胃炎是胃黏膜的慢性炎症，多与幽门螺杆菌感染有关。\n", "utf-8")
    turns = [
        {"speaker": "患者", "sentence": "咳嗽，鼻塞三天了。", "normalized": ["咳嗽", "鼻塞"], "type": ["1", "1"]},
        {"speaker": "医生", "sentence": "多喝水，发热时再来。", "normalized": [], "type": []},
    ]
    write_lines(tmp_path / "d.jsonl", {"dialogue-content": turns})
    write_lines(
        tmp_path / "p.jsonl", {"prompt": "胃痛怎么办？", "chosen": "先查明原因，不要自行用药。", "rejected": "吃药。"}
    )
    (tmp_path / "e.csv").write_text(
        'Question,Options,Answer\n胃炎最常见的病因是下列哪一种,"A 感染\nB 外伤",A\n', "utf-8"
    )
    words = ("--recipe", recipe, "--graph", str(ROOT / "data" / "kg"), "--qa", str(qa), "--general", str(general))
    words += ("--exams", str(tmp_path / "e.csv"), "--dialogues", str(tmp_path / "d.jsonl"))
    words += ("--preference", str(tmp_path / "p.jsonl"))
    result = build(
        *words, "--text", str(text), "--output_dir", str(tmp_path / "out"), "--passes", "1", "--questions", "1"
    )
    assert result.returncode == 0, result.stderr
    made = {str(f.relative_to(tmp_path / "out").with_suffix("")) for f in (tmp_path / "out").rglob("*.jsonl")}
    assert {name for name in made if name.split("/")[0] in ("pretrain", "sft", "preference")} == files


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "qwen"], "invalid choice: 'qwen'"),
        (["--graph", "nowhere.csv"], "--graph: nowhere.csv not found"),
        (["--size", "0", "--recipe", "fictional"], "--size: found 0, expected 1 or more"),
        (["--reading", "1"], "--reading: found 1.0, expected a share from 0 to below 1"),
        (["--groups", "A"], "--groups: found 'A', expected shares of A, B and C"),
        (["--groups", "A:x"], "--groups: found 'A:x', expected shares of A, B and C"),
        (["--groups", "A:0.5"], "--groups: found 'A:0.5', expected shares of A, B and C that sum to 1"),
        (["--graph", f"{ROOT}/data/kg:0.5"], "data/kg has the weight 0.5, expected none: all is used"),
        (["--licences", "data/no=CC0"], "--licences: data/no is no source, expected one of "),
        (["--recipe", "fictional", "--graph", "x"], "--graph: the fictional recipe invents its graph"),
        (["--recipe", "chimed"], "no source given"),
    ],
)
def test_mistakes_are_answered_in_one_line(tmp_path, words, message):
    result = build(*words, "--output_dir", str(tmp_path / "out"))
    assert result.returncode == 2 and message in result.stderr
    assert "Traceback" not in result.stderr and len(result.stderr.strip().split("\n")) == 1
    assert not (tmp_path / "out").exists()


def test_shares_that_sum_to_one_but_for_rounding_are_shares():
    assert 0.7 + 0.2 + 0.1 != 1
    assert build_data.parse_groups("A:0.7,B:0.2,C:0.1") == {"A": 0.7, "B": 0.2, "C": 0.1}


def test_a_licence_may_be_an_address():
    found = build_data.parse_pairs("data/a=https://x.org/licence,data/b:CC0", "licences", "")
    assert found == {"data/a": "https://x.org/licence", "data/b": "CC0"}


def test_odd_rows_of_pairs_and_dialogues_are_counted_or_answered_in_one_line(tmp_path):
    pairs = [
        {"prompt": "胃痛怎么办？", "responses": ["先查明原因，不要自行用药。", "不知道。"], "scores": scores}
        for scores in ([2, 0], 3)
    ]
    odd = ["一行文字", ["好", "差"], {"prompt": "问", "chosen": 3, "rejected": "差"}]
    write_lines(tmp_path / "p.jsonl", *pairs, *odd)
    talks = [["你好"], [{"sentence": "咳嗽", "normalized": [["咳嗽"]], "type": ["1"]}], "x", 3]
    write_lines(tmp_path / "d.jsonl", *({"dialogue-content": turns} for turns in talks), "一行文字")
    words = ("--recipe", "qizhen", "--preference", str(tmp_path / "p.jsonl"), "--dialogues", str(tmp_path / "d.jsonl"))
    card = build_here(tmp_path / "out", *words, "--num_proc", "1", "--min_chinese", "0")
    assert (
        card["refused"]["dialogue with a turn that cannot be read"] == 2 and card["refused"]["no scored answers"] == 1
    )
    assert [file["rows"] for file in card["files"]] == [1]
    with pytest.raises(ValueError, match=r"p\.jsonl"):
        build_here(tmp_path / "out", "--preference", str(tmp_path / "p.jsonl"), "--on_bad_rows", "error")


def test_bad_rows_are_counted_once_though_a_file_is_read_for_two_stages_and_those_of_a_graph_stop_no_build(tmp_path):
    (tmp_path / "g.csv").write_text("head,relation,tail\n胃炎,症状,反酸\n胃炎,症状,\n", "utf-8")
    write_lines(
        tmp_path / "q.jsonl", {"question": "胃痛应该吃什么药比较好？", "answer": "先查明原因，不要自行用药。"}, {"x": 1}
    )
    words = ("--recipe", "chimed", "--graph", str(tmp_path / "g.csv"), "--qa", str(tmp_path / "q.jsonl"))
    words += ("--exams", str(tmp_path / "q.jsonl"), "--num_proc", "1")
    card = build_here(tmp_path / "out", *words)
    assert card["refused"] == {"triple without all its parts": 1, "wrong schema": 1}
    assert card["graph"]["facts"] == 1
    with pytest.raises(ValueError, match=r"g\.csv, line 3: triple without all its parts"):
        build_here(tmp_path / "out", *words, "--on_bad_rows", "error")


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    result = build("--output_dir", str(tmp_path))
    assert result.returncode == 2 and "holds precious.txt" in result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["precious.txt"]


def test_help_needs_no_library():
    code = "import runpy, sys; sys.argv = [sys.argv[1], '--help']; runpy.run_path(sys.argv[0], run_name='__main__')"
    result = subprocess.run([sys.executable, "-S", "-c", code, str(TOOL)], capture_output=True, text=True)
    assert "--recipe" in result.stdout, result.stderr


def test_a_graph_of_one_entity_is_no_reason_to_fail():
    graph = Graph({"D1": Entity("D1", "胃炎", "疾病")}, [Fact("F1", "D1", "symptom", "上腹痛")])
    source = prepare(graph)
    assert len(list(article_rows("D1", source))) == 8 and len(list(question_rows("D1", source))) == 6
    assert (
        not list(exam_rows("D1", source))
        and not list(choice_items("D1", source))
        and not list(dialogue_rows("D1", source))
    )
    assert list(reading_rows(source, 3, "text")) and not list(reading_pair_rows(source, 3))
    assert {row["fault"] for row in pair_rows("D1", source)} <= {"repetition", "unsafe advice"}

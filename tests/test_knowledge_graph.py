"""Graphs: our own, read ones, and fictional ones."""

from collections import Counter
from pathlib import Path

import pytest

from suwen.fictional import PARTS, assign_groups, fictional_graph
from suwen.graph_readers import clean_cell, is_person, load_graph
from suwen.knowledge_graph import Entity, Fact, Graph, Item, check_graph

KG = sorted((Path(__file__).parents[1] / "data" / "kg").glob("*.csv"))


@pytest.fixture(scope="module")
def ours() -> Graph:
    graph, left_out = load_graph(KG)
    assert not left_out, "our own files are read without a remark"
    return graph


def test_our_graph_is_consistent(ours):
    assert list(check_graph(ours)) == []


def test_our_graph_is_as_large_as_promised_and_tells_all_of_every_entity(ours):
    told: dict[str, set[str]] = {}
    for fact in ours.facts:
        told.setdefault(fact.head, set()).add(fact.relation)
    kinds = Counter(ours.entities[head].type for head in told)
    assert kinds["疾病"] >= 60 and kinds["药品"] >= 60 and len(ours.facts) >= 800
    disease = {"department", "symptom", "cause", "examination", "treatment"}
    drug = {"drug_class", "indication", "contraindication", "adverse_reaction", "usage", "population_warning"}
    for head, relations in told.items():
        expected = disease if ours.entities[head].type == "疾病" else drug
        assert expected <= relations, f"{ours.entities[head].name} lacks {expected - relations}"
    assert all(fact.tail for fact in ours.facts), "every value is an entity with an id and a type"


def test_our_values_are_terms_and_clauses_without_stray_punctuation(ours):
    for fact in ours.facts:
        assert fact.value == fact.value.strip(" ，。、；"), fact
        assert len(fact.value) <= 20 or fact.relation in ("usage", "population_warning"), fact


def broken(*facts: Fact, entities: tuple[Entity, ...] = ()) -> list[str]:
    base = (Entity("D1", "胃炎", "疾病"), Entity("M1", "药甲", "药品"), Entity("S1", "咳嗽", "症状"))
    return list(check_graph(Graph({entity.id: entity for entity in (*base, *entities)}, list(facts))))


@pytest.mark.parametrize(
    ("facts", "entities", "words"),
    [
        ([Fact("1", "D1", "symptom", "咳嗽"), Fact("2", "D1", "symptom", "咳嗽")], (), "said 2 times"),
        ([Fact("1", "D1", "symptom", "咳嗽"), Fact("1", "D1", "cause", "受凉")], (), "fact id 1 used 2 times"),
        ([Fact("1", "D9", "symptom", "咳嗽")], (), "unknown head D9"),
        ([Fact("1", "D1", "symptom", "咳嗽", "S9")], (), "unknown tail S9"),
        ([Fact("1", "M1", "symptom", "咳嗽")], (), "which is 药品, expected 疾病"),
        ([Fact("1", "D1", "department", "咳嗽", "S1")], (), "is 症状, expected 科室"),
        ([Fact("1", "D1", "colour", "蓝")], (), "unknown relation colour"),
        ([Fact("1", "D1", "complication", "胃炎")], (), "has itself as complication"),
        ([Fact("1", "D1", "cause", "受凉")], (Entity("D2", "胃病", "疾病", ("胃炎",)),), "names both D1 and D2"),
        (
            [Fact("1", "M1", "indication", "胃炎"), Fact("2", "M1", "contraindication", "胃炎")],
            (),
            "both an indication and a contraindication",
        ),
        (
            [Fact("1", "D1", "drug", "药甲"), Fact("2", "M1", "indication", "肺炎")],
            (),
            "胃炎 is treated with 药甲, whose indications do not name it",
        ),
        (
            [Fact("1", "D1", "drug", "药乙"), Fact("2", "M1", "indication", "胃炎")],
            (),
            "药甲 is indicated for 胃炎, whose drugs do not name it",
        ),
    ],
)
def test_what_does_not_fit_together_is_named(facts, entities, words):
    assert any(words in line for line in broken(*facts, entities=entities))


# ------------------------------------------------------------------------------------------------------------- readers


def read(tmp_path: Path, name: str, text: str, encoding: str = "utf-8") -> tuple[Graph, Counter]:
    file = tmp_path / name
    file.write_bytes(text.encode(encoding))
    return load_graph([file])


def triples(graph: Graph) -> list[tuple[str, str, str]]:
    return [(graph.entities[fact.head].name, fact.relation, fact.value) for fact in graph.facts]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "head,relation,tail\n胃炎,症状,上腹痛\n胃炎,就诊科室,消化内科\n"),
        ("t.tsv", "subject\tpredicate\tobject\n胃炎\tsymptom\t上腹痛\n胃炎\tdepartment\t消化内科\n"),
        (
            "t.jsonl",
            '{"头实体": "胃炎", "关系": "临床表现", "尾实体": "上腹痛"}\n'
            '{"头实体": "胃炎", "关系": "科室", "尾实体": "消化内科"}\n',
        ),
        ("t.csv", "name,symptom,department\n胃炎,上腹痛 [详细],消化内科\n"),
        ("t.json", '[{"_id": {"$oid": "1"}, "name": "胃炎", "symptom": ["上腹痛"], "cure_department": ["消化内科"]}]'),
    ],
)
def test_one_graph_in_five_forms(tmp_path, name, text):
    graph, left_out = read(tmp_path, name, text)
    assert triples(graph) == [("胃炎", "symptom", "上腹痛"), ("胃炎", "department", "消化内科")]
    assert not left_out and list(check_graph(graph)) == []


def test_nodes_and_edges_are_joined_whatever_their_order(tmp_path):
    (tmp_path / "a_edges.csv").write_text("source,type,target\nd1,symptom,s1\n", "utf-8")
    (tmp_path / "b_nodes.csv").write_text(
        "id,name,type,aliases\nd1,胃炎,disease,胃病、胃发炎\ns1,上腹痛,症状,\n", "utf-8"
    )
    graph, _ = load_graph([tmp_path / "a_edges.csv", tmp_path / "b_nodes.csv"])
    assert graph.facts[0].head == "d1" and graph.facts[0].tail == "s1" and graph.facts[0].value == "上腹痛"
    assert graph.entities["d1"] == Entity("d1", "胃炎", "疾病", ("胃病", "胃发炎"))


def test_what_says_that_nothing_is_known_is_no_value(tmp_path):
    cells = ["暂无可参考数据", "暂无相关资料、支持性治疗", "尚不明确。", "无", "暂缺", "不明确", ">>、-", "无力、发热"]
    text = "name,symptom,treatment\n" + "".join(f'病{n},,"{cell}"\n' for n, cell in enumerate(cells))
    graph, _ = read(tmp_path, "disease.csv", text + "病七,无力,\n", "utf-8")
    assert [fact.value for fact in graph.facts] == ["支持性治疗", "无力", "发热", "无力"]


def test_a_term_with_a_full_stop_is_the_same_term_and_a_sentence_keeps_its_own(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text(
        "name,rate,cause\n甲病,98%。,受凉。\n乙病,98%,本病由受凉引起。多见于冬季。\n丙病,98%,多由受凉，劳累引起。\n",
        "utf-8",
    )
    values = {(fact.relation, fact.value) for fact in load_graph([file])[0].facts}
    sentences = {("cause", text) for text in ("受凉。", "本病由受凉引起。多见于冬季。", "多由受凉，劳累引起。")}
    assert values == {("prognosis", "98%"), *sentences}


def test_values_that_end_in_a_bracket_are_cut_off(tmp_path):
    text = "name,cured_prob,cure_lasttime\n甲病,治愈率（,>120天(终身治疗，需\n乙病,治愈率（约80%）,治疗周期3-6月\n"
    graph, left_out = read(tmp_path, "disease.csv", text, "utf-8")
    assert [fact.value for fact in graph.facts] == ["治愈率（约80%）", "3-6月"]
    assert left_out == {"value cut off in the source": 2}


def test_a_gb18030_disease_table_with_the_faults_of_the_public_one(tmp_path):
    text = (
        "name,alias,department,symptom,drug,age,,\n"
        '胃炎,"胃病,胃发炎",消化内科 岁为发病高峰,上腹痛 张永强 反酸 [详细],'
        "药甲片 枸橼酸西地那非... 应该如何用药？,成人，老人,,\n"
        "胃炎,,消化内科,反酸,暂无相关资料,儿童,,\n"
        "淀粉样变病和...,,内科,,,,,\n"
    )
    graph, left_out = read(tmp_path, "disease.csv", text, "gb18030")
    assert triples(graph) == [
        ("胃炎", "department", "消化内科"),
        ("胃炎", "symptom", "上腹痛"),
        ("胃炎", "symptom", "反酸"),
        ("胃炎", "drug", "药甲片"),
        ("胃炎", "population", "成人，老人"),
    ]
    assert left_out == Counter(
        {
            "no department, but an age or time": 1,
            "name of a person among the symptoms": 1,
            "value cut off in the source": 1,
            "question in place of a value": 1,
            "fact given twice": 2,
            "second value where one is expected": 1,
            "row without a whole name": 1,
        }
    )


def test_leaflets_as_text_and_as_html_fields(tmp_path):
    text = "药甲\n药品类型:抗感染药物，抗生素\n别名:甲素；Jia\n适应证:用于肺炎。\n禁忌证:(尚不明确)\n"
    text += "【用法用量】口服，每日3次。\n"
    graph, _ = read(tmp_path, "a.json", '["' + text.replace("\n", "\\n") + '"]')
    assert triples(graph) == [
        ("药甲", "drug_class", "抗感染药物"),
        ("药甲", "drug_class", "抗生素"),
        ("药甲", "indication", "用于肺炎。"),
        ("药甲", "usage", "口服，每日3次"),
    ]
    assert next(iter(graph.entities.values())).aliases == ("甲素", "Jia")
    html = "药品,药品适应症,instruction\n药乙片,<p>本品用于<b>头痛</b>&nbsp;和牙痛</p>,药乙片的适应病症\n"
    graph, _ = read(tmp_path, "b.csv", html)
    assert triples(graph) == [("药乙片", "indication", "本品用于头痛 和牙痛")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2\n", "line 2: no known columns: found the columns a, b, expected triples"),
        ("head,relation,tail\n胃炎,,反酸\n", "found head '胃炎', relation '', tail '反酸', expected all three"),
        ("head,relation,tail\n胃炎,,反酸\n", "bad.csv, line 2: triple without all its parts"),
        (
            "source,type,target\nd1,,s1\n",
            "line 2: edge without all its parts: found 'd1', '', 's1', expected all three",
        ),
        ("id,name,type\nd1,,disease\n", "line 2: node without id or name: found id 'd1', name '', expected both"),
        ("source,type,target\nd1,symptom,s1\n", "line 2: unknown node 'd1', expected an id of a node table"),
    ],
)
def test_a_bad_graph_is_answered_by_file_and_line(tmp_path, text, words):
    with pytest.raises(ValueError, match="bad.csv") as caught:
        read(tmp_path, "bad.csv", text)
    assert words in str(caught.value)


def test_bad_rows_of_a_graph_are_counted_where_that_is_asked(tmp_path):
    (tmp_path / "a.csv").write_text("head,relation,tail\n胃炎,症状,\n胃炎,症状,反酸\n", "utf-8")
    (tmp_path / "b.csv").write_text("source,type,target\nd1,symptom,s1\n", "utf-8")
    (tmp_path / "c.jsonl").write_text('{"x": 1}\n["胃炎", "症状", "反酸"]\n{broken\n', "utf-8")
    refused = []
    graph, _ = load_graph(sorted(tmp_path.iterdir()), lambda where, reason, row: refused.append((where, reason)))
    assert triples(graph) == [("胃炎", "symptom", "反酸")]
    places = (("a.csv, line 2", "triple without all its parts"), ("c.jsonl, line 1", "no known columns"))
    places += (("c.jsonl, line 2", "wrong schema"), ("c.jsonl, line 3", "invalid JSON"))
    places += (("b.csv, line 2", "edge with an unknown node"),)
    assert refused == [(f"{tmp_path}/{where}", reason) for where, reason in places]


def test_files_without_facts_are_named_with_their_first_bad_row(tmp_path):
    (tmp_path / "b.csv").write_text("source,type,target\nd1,symptom,s1\n", "utf-8")
    with pytest.raises(ValueError, match=r"b\.csv: no facts found, .* the first row refused: .*unknown node 'd1'"):
        load_graph((file for file in [tmp_path / "b.csv"]), lambda *bad: None)


def test_tags_written_as_entities_go_and_the_less_than_sign_stays():
    assert clean_cell("&lt;p&gt;用于&lt;b&gt;头痛&lt;/b&gt;&lt;/p&gt;") == "用于头痛"
    assert clean_cell("<i>有效</i>（p&lt;0.05，n&gt;30）") == "有效（p<0.05，n>30）"


def test_the_edges_of_the_public_graph_of_diseases_have_relations_of_ours(tmp_path):
    names = {"has_symptom": "symptom", "need_check": "examination", "no_eat": "food_to_avoid", "do_eat": "food"}
    names |= {"recommand_drug": "drug", "common_drug": "drug", "acompany_with": "complication"}
    names |= {"belongs_to": "department", "cure_department": "department"}
    nodes = [f"v{number},值{number},词" for number in range(len(names))]
    rows = [f"d1,{name},v{number}" for number, name in enumerate(names)]
    nodes += ["d1,胃炎,疾病", "k1,心内科,科室", "k2,内科,科室", "p1,某药厂,药企"]
    (tmp_path / "edges.csv").write_text(
        "\n".join(["source,type,target", *rows, "k1,belongs_to,k2", "p1,drugs_of,v0", ""]), "utf-8"
    )
    (tmp_path / "nodes.csv").write_text("\n".join(["id,name,type", *nodes, ""]), "utf-8")
    graph, left_out = load_graph(sorted(tmp_path.iterdir()))
    assert [fact.relation for fact in graph.facts] == list(names.values())
    assert left_out == {"relation belongs_to left aside": 1, "relation drugs_of left aside": 1}


def test_leaflets_of_several_lines_are_read_from_a_text_file(tmp_path):
    text = "药甲\n\n【适应症】肺炎\n  咽炎\n\n【用法用量】口服，每日3次。\n\n饭后服用。\n\n药乙\n适应证:头痛\n"
    graph, left_out = read(tmp_path, "a.txt", text)
    assert triples(graph) == [
        ("药甲", "indication", "肺炎\n咽炎"),
        ("药甲", "usage", "口服，每日3次。\n饭后服用。"),
        ("药乙", "indication", "头痛"),
    ]
    assert not left_out


def test_people_are_told_from_symptoms():
    assert all(map(is_person, ("张永强", "李佩", "欧阳文华")))
    assert not any(map(is_person, ("黄疸", "白带异常", "高热", "石淋痛", "上腹痛", "全秃", "易激惹")))


def test_prose_is_told_from_terms():
    def item(relation: str, *values: str) -> Item:
        return Item(Entity("M1", "药甲", "药品"), relation, values, ())

    assert not item("indication", "肺炎", "咽炎").prose
    assert item("indication", "用于肺炎。").prose and item("indication", "用于肺炎，咽炎").prose
    assert not item("usage", "每日1次，餐后服用").prose, "its wordings are made for clauses"
    assert item("usage", "每日1次。餐后服用。").prose


# ----------------------------------------------------------------------------------------------------------- fictional


def test_a_fictional_graph_is_made_by_its_seed_alone():
    graph = fictional_graph(75, 1)
    assert graph == fictional_graph(75, 1) and graph != fictional_graph(75, 2)
    assert list(check_graph(graph)) == []
    assert len(graph.entities) == 75 and len(graph.facts) == 300


@pytest.mark.parametrize("size", [1, 7, 75, 5000])
def test_any_size_has_different_names_that_are_like_each_other(size):
    graph = fictional_graph(size, 3)
    names = [entity.name for entity in graph.entities.values()]
    assert len(set(names)) == size
    if size >= 75:
        shared = Counter(part for name in names for part in name.split("型"))
        assert all(min(shared[part] for part in name.split("型")) > 1 for name in names)


def test_values_are_spread_evenly_so_that_no_guess_is_good():
    for relation, values in fictional_graph(75, 1).values().items():
        counts = Counter(fact.value for fact in fictional_graph(75, 1).facts if fact.relation == relation)
        assert len(values) == PARTS[relation][0] and max(counts.values()) - min(counts.values()) <= 1


def test_a_graph_of_reading_examples_has_no_name_of_another_and_half_of_its_values():
    graph = fictional_graph(75, 1)
    reading = fictional_graph(75, 1, reading=True, values_of=graph)
    for other in (graph, fictional_graph(3000, 2)):
        assert not {e.name for e in other.entities.values()} & {e.name for e in reading.entities.values()}
    assert not {f.id for f in graph.facts} & {f.id for f in reading.facts}
    known = graph.values()
    share = sum(fact.value in known[fact.relation] for fact in reading.facts) / len(reading.facts)
    assert 0.4 < share < 0.6


def test_groups_are_shares_of_the_entities():
    graph = fictional_graph(75, 1)
    groups = assign_groups(graph, 1)
    assert Counter(groups.values()) == {"A": 30, "B": 30, "C": 15}
    assert groups == assign_groups(graph, 1) and groups != assign_groups(graph, 2)
    assert set(assign_groups(graph, 1, {"A": 1.0}).values()) == {"A"}
    with pytest.raises(ValueError, match="shares of A, B and C that sum to 1"):
        assign_groups(graph, 1, {"A": 0.5})

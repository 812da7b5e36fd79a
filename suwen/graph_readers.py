"""Graphs out of the tables people have: triples, node and edge tables, disease tables with one row a disease
(QASystemOnMedicalKG's style), and drug leaflets with labelled fields; told apart by their columns, in every file kind
and encoding of suwen/readers.py.
"""

from __future__ import annotations

import html
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from suwen.cleaning import strip_html
from suwen.formats import BadRow
from suwen.knowledge_graph import PROSE_CHARACTERS, Entity, Fact, Graph, is_prose, short_hash
from suwen.personal_data import NAME
from suwen.phrasings import RELATIONS
from suwen.readers import Refusal, detect_encoding, file_kind, find_encoding, open_text, read_records

Refuse = Callable[[str, str, Any], None]  # (where, reason, row)


class GraphBuilder:
    """Collects entities and facts; the same entity or fact from several files is taken once."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.counts: Counter[str] = Counter()  # what was left out or put right, by reason
        self._ids: dict[tuple[str, str], str] = {}  # (type, name) -> id
        self.told: set[tuple[str, str]] = set()  # (entity id, relation) of relations with one value
        self._seen: set[tuple[str, str, str]] = set()

    def entity(self, name: str, kind: str, aliases: Iterable[str] = (), entity_id: str = "") -> str:
        """The id of an entity, which is added if it is new; aliases are joined to those known."""
        key = (kind, name)
        found = self._ids.get(key) or entity_id or f"{kind}-{short_hash(kind, name)}"
        self._ids[key] = found
        old = self.graph.entities.get(found)
        known = old.aliases if old else ()
        names = dict.fromkeys([*known, *(alias for alias in aliases if alias and alias != name)])
        self.graph.entities[found] = Entity(found, name, kind, tuple(names))
        return found

    def fact(self, head: str, relation: str, value: str, tail: str = "", fact_id: str = "") -> None:
        known = RELATIONS.get(relation)
        if known and (known.terms or known.single or known.clauses) and not is_prose(value.rstrip("。"), relation):
            value = value.rstrip("。")  # 98%。 and 98% are one value; 同氢氯噻嗪。 of a contraindication is a sentence
        if (head, relation, value) in self._seen:
            self.counts["fact given twice"] += 1
            return
        self._seen.add((head, relation, value))
        name = fact_id or f"F-{short_hash(self.graph.entities[head].name, relation, value)}"
        self.graph.facts.append(Fact(name, head, relation, value, tail))


TRIPLE_KEYS = (
    ("head", "relation", "tail"),
    ("subject", "predicate", "object"),
    ("s", "p", "o"),
    ("头实体", "关系", "尾实体"),
    ("实体", "关系", "值"),
    ("实体1", "关系", "实体2"),
    ("entity", "attribute", "value"),
)
EDGE_KEYS = (
    (":start_id", ":type", ":end_id"),
    ("source", "type", "target"),
    ("start", "type", "end"),
    ("source", "relation", "target"),
)
NODE_KEYS = ((":id", "name", ":label"), ("id", "name", "type"), ("id", "name", "label"))
NAMES = ("name", "名称", "疾病", "疾病名称", "disease", "药品", "药品名称", "药名", "通用名称", "drug_name", "title")
ALIASES = ("alias", "aliases", "别名", "又名", "商品名", "英文名")
# Column or field names as found -> relation; a column whose name is not here is left aside and named in the counts.
FIELDS = {
    "definition": ("desc", "概述", "简介", "定义", "疾病介绍"),
    "department": ("department", "cure_department", "belongs_to", "科室", "就诊科室", "所属科室"),
    "symptom": ("symptom", "symptoms", "has_symptom", "症状", "临床表现", "典型症状"),
    "cause": ("cause", "病因", "发病原因"),
    "examination": ("check", "checklist", "need_check", "检查", "检查项目"),
    "treatment": ("treatment", "cure_way", "治疗", "治疗方法", "治疗方式"),
    "surgery": ("surgery", "operation", "手术", "手术治疗", "手术方式"),
    "drug": ("drug", "recommand_drug", "common_drug", "常用药物", "药物", "常用药品", "推荐药物"),
    "complication": ("complication", "acompany", "acompany_with", "并发症"),
    "prevention": ("prevent", "prevention", "预防", "预防措施"),
    "food": ("do_eat", "宜吃", "适宜饮食", "宜食"),
    "food_to_avoid": ("not_eat", "no_eat", "忌吃", "饮食禁忌", "忌食"),
    "population": ("easy_get", "age", "易感人群", "多发人群"),
    "transmission": ("get_way", "infection", "传染性", "传播途径"),
    "prognosis": ("cured_prob", "rate", "治愈率", "预后", "治愈情况"),
    "course": ("cure_lasttime", "period", "治疗周期", "疗程"),
    "site": ("part", "部位", "发病部位"),
    "drug_class": ("药品类型", "药物类别", "药物分类", "药品类别"),
    "indication": ("适应证", "适应症", "药品适应症", "适应病症", "主治", "功能主治", "功能主治/适应症"),
    "contraindication": ("禁忌", "禁忌证", "禁忌症"),
    "adverse_reaction": ("不良反应", "副作用"),
    "usage": ("用法用量", "用法", "用法与用量"),
    "population_warning": ("孕妇及哺乳期妇女用药", "儿童用药", "老年用药", "特殊人群用药", "特殊人群"),
    "precaution": ("注意事项",),
    "interaction": ("药物相互作用", "相互作用"),
}
RELATION_OF = {name: relation for relation, names in FIELDS.items() for name in (relation, *names)}
RELATION_OF |= {relation.name: key for key, relation in RELATIONS.items()}
IGNORED_FIELDS = {
    "_id",
    "id",
    "category",
    "yibao_status",
    "insurance",
    "get_prob",
    "cost_money",
    "money",
    "drug_detail",
}
IGNORED_FIELDS |= {"recommand_eat", "剂型", "instruction", "医学专家标注的适应病症", ""}
# Edges of QASystemOnMedicalKG that are no facts on diseases or drugs: makers of drugs, recipes, parts of departments
NOT_TOLD = {("drugs_of", ""), ("recommand_eat", ""), ("belongs_to", "科室")}
LEAFLET_FIELD = re.compile(r"^\s*[【\[]?\s*([\u4e00-\u9fff/]{2,10})\s*[】\]]?\s*[:：】]\s*", re.MULTILINE)
TYPES = {"disease": "疾病", "drug": "药品", "疾病": "疾病", "药品": "药品", "药物": "药品", "medicine": "药品"}
TAG = re.compile(r"<[^<>]{1,200}>")
EMPTY = re.compile(
    r"[-—/\s（）()。.]*(?:尚?不明确|(?:暂无|暂缺|无)(?:可|相关|参考)*(?:资料|数据|信息)?|不详|未知|none|null|nan)?[-—/\s（）()。.]*",
    re.IGNORECASE,
)
# Public disease tables hold names of people among the symptoms: like a name, and without a character that symptoms have
SYMPTOM_CHARACTERS = frozenset(
    "痛肿热咳血尿便疹胀吐晕痒麻酸冷汗渴饥饿瘦胖疲乏力困眠梦惊悸闷喘咯痰鼻咽喉耳目眼口舌唇齿牙头面颈项肩背腰腹胸胃肠肝胆脾肾心肺脑皮肤骨节肌筋脉脚足"
    "手指趾甲发毛斑疱疮溃烂癣瘤块硬软黄红紫黑色灰苔带经孕胎产乳精阴瘫痪萎缩抽搐痉挛颤抖震僵直弱衰竭休克昏迷呆痴狂躁郁焦虑恐慌幻妄失语聋哑盲炎症感染"
    "病毒菌虫疟乱伤寒中缺氧低不异常障碍水气音泪涕脓液无过少食厌欲息吸呼视力动行走睡嗜食腺肛宫囊体压糖脂眩倦急慢瘙疼征环腿弓膜激跌哭脸相圈醒秃痱易全满"
)
NO_DEPARTMENT = re.compile(r"\d|岁|发病")
PERSON = re.compile(rf"{NAME}|[毓所巨][\u4e00-\u9fff]{{1,2}}")
SEPARATORS = re.compile(r"[、，,；;|\t\n]+|(?<=[^\x00-\x7f])\s+|\s+(?=[^\x00-\x7f])")


def clean_cell(value: Any) -> str:
    """The text of a cell: tags and entities out, blanks at the ends cut; "" for what says that nothing is known."""
    if value is None or isinstance(value, dict):
        return ""
    # tags may be written as entities (&lt;p&gt;), where "<" as a sign (p&lt;0.05) has to stay
    text = strip_html(html.unescape(TAG.sub("", str(value))))
    text = text.replace("\u3000", " ").replace("\xa0", " ").replace("[详细]", "").strip()
    return "" if EMPTY.fullmatch(text) or not any(map(str.isalnum, text)) else text


def split_terms(value: Any, counts: Counter[str]) -> list[str]:
    """The terms of a cell; those that the source has cut off ("枸橼酸西地那非...") are left out and counted."""
    parts = value if isinstance(value, list) else SEPARATORS.split(clean_cell(value))
    terms = []
    for part in parts:
        term = clean_cell(part).strip("。；;，,、 ")
        if is_cut_off(term):
            counts["value cut off in the source"] += 1
        elif len(term) > PROSE_CHARACTERS:
            counts["value too long for a term"] += 1
        elif term.endswith(("？", "?")):
            counts["question in place of a value"] += 1
        elif term:
            terms.append(term)
    return list(dict.fromkeys(terms))


def is_cut_off(text: str) -> bool:
    """Whether it ends in dots, or inside a bracket ("典型病例治愈率（")."""
    opened = max(text.rfind("("), text.rfind("（"))
    return text.endswith(("...", "…", "..")) or opened > max(text.rfind(")"), text.rfind("）"))


def is_person(term: str) -> bool:
    return PERSON.fullmatch(term) is not None and SYMPTOM_CHARACTERS.isdisjoint(term)


def load_graph(files: Iterable[Path], refuse: Refuse | None = None) -> tuple[Graph, Counter[str]]:
    """Read and join the graphs of all files.

    Args:
        refuse: called for each row that cannot be used; without it the first one ends the reading.

    Returns:
        the graph, and what was left out or put right, by reason.

    Raises:
        ValueError: a row that cannot be used, or a file that cannot be read, by file and line; no facts at all.
    """
    builder = GraphBuilder()
    edges: list[tuple[str, tuple[str, str, str]]] = []
    nodes: dict[str, str] = {}
    first = ""

    def bad(where: str, reason: str, message: str, row: Any) -> None:
        nonlocal first
        if refuse is None:
            raise ValueError(message)
        first = first or f"; the first row refused: {message}"
        refuse(where, reason, row)

    files = list(files)
    for file in files:
        for record in read_leaflets(file) if file_kind(file) == ".txt" else read_records(file, find_encoding(file)):
            if isinstance(record, Refusal):
                if record.reason == "cells do not match the header":
                    builder.counts[record.reason] += 1
                else:
                    bad(record.where, record.reason, record.message, record.row)
                continue
            where, row = record
            try:
                _read_row(row, where, builder, nodes, edges)
            except BadRow as error:
                bad(where, error.reason, f"{where}: {error}", row)
    for where, (start, relation, end) in edges:
        if missing := [name for name in (start, end) if name not in nodes]:
            message = f"{where}: unknown node {missing[0]!r}, expected an id of a node table"
            bad(where, "edge with an unknown node", message, [start, relation, end])
            continue
        head, tail = (builder.graph.entities[nodes[name]] for name in (start, end))
        _add_fact(head, relation, tail.name, tail.id, "", builder)
    if not builder.graph.facts:
        names = ", ".join(map(str, files))
        raise ValueError(f"{names}: no facts found, expected triples, nodes and edges, or tables{first}")
    return builder.graph, builder.counts


def read_leaflets(file: Path) -> Iterator[tuple[str, str] | Refusal]:
    """The leaflets of a .txt, which may hold several: each begins with a drug's name on a line of its own before a
    field, after a blank line."""
    encoding = detect_encoding(file)
    if encoding.error:
        yield Refusal(str(file), "undecodable bytes", encoding.error)
        return
    with open_text(file, encoding) as stream:
        lines = list(map(str.strip, stream))
    told = [number for number, line in enumerate(lines) if line]
    if not told:
        yield Refusal(str(file), "empty file", f"{file}: empty file, expected leaflets")
        return
    field = [LEAFLET_FIELD.match(line) is not None for line in lines]
    starts = [number for before, number, after in zip(told, told[1:], told[2:], strict=False)
              if number - before > 1 and not field[number] and field[after]]  # fmt: skip
    for start, end in itertools.pairwise([told[0], *starts, len(lines)]):
        yield f"{file}, line {start + 1}", "\n".join(filter(None, lines[start:end]))


def _add_fact(head: Entity, relation: str, value: str, tail: str, fact_id: str, builder: GraphBuilder) -> None:
    """A fact of a triple or edge, with the relation as it was found."""
    if {(relation.lower(), ""), (relation.lower(), head.type)} & NOT_TOLD:
        builder.counts[f"relation {relation} left aside"] += 1
    else:
        builder.fact(head.id, RELATION_OF.get(relation.lower(), relation), value, tail, fact_id)


def _read_row(row: Any, where: str, builder: GraphBuilder, nodes: dict[str, str], edges: list[Any]) -> None:
    if isinstance(row, str):
        _read_leaflet(row, where, builder)
        return
    if not isinstance(row, dict):
        raise BadRow("wrong schema", f"found {row!r:.60}, expected an object")
    fields = {str(key).strip().lower(): value for key, value in row.items()}
    for keys in TRIPLE_KEYS:
        if set(keys) <= fields.keys():
            head, relation, tail = (clean_cell(fields[key]) for key in keys)
            _read_triple(head, relation, tail, fields, builder)
            return
    for keys in EDGE_KEYS:
        if set(keys) <= fields.keys():
            start, relation, end = (clean_cell(fields[key]) for key in keys)
            if not (start and relation and end):
                raise BadRow(
                    "edge without all its parts", f"found {start!r}, {relation!r}, {end!r}, expected all three"
                )
            edges.append((where, (start, relation, end)))
            return
    for keys in NODE_KEYS:
        if set(keys) <= fields.keys():
            key, name, kind = (clean_cell(fields[key]) for key in keys)
            if not (key and name):
                raise BadRow("node without id or name", f"found id {key!r}, name {name!r}, expected both")
            aliases = split_terms(fields.get("aliases", fields.get("alias", "")), builder.counts)
            nodes[key] = builder.entity(name, TYPES.get(kind.lower(), kind), aliases, key)
            return
    column = next((key for key in NAMES if fields.get(key)), None)
    if column is None or not any(key in RELATION_OF for key in fields if key != column):
        found = ", ".join(map(str, row)) or "nothing"
        raise BadRow(
            "no known columns",
            f"found the columns {found}, expected triples (head, relation, tail), nodes (id, name, type), "
            "edges (source, type, target), or one row a disease or drug (name, symptom, ...)",
        )
    _read_table_row(fields, column, builder)


def _read_triple(head: str, relation: str, tail: str, fields: dict[str, Any], builder: GraphBuilder) -> None:
    if not (head and relation and tail):
        found = f"found head {head!r}, relation {relation!r}, tail {tail!r}, expected all three"
        raise BadRow("triple without all its parts", found)
    known = RELATIONS.get(RELATION_OF.get(relation.lower(), relation))
    entities = builder.graph.entities
    if head not in entities:  # a name, not an id of an entity table
        kind = clean_cell(fields.get("head_type")) or (known.head if known else "实体")
        head = builder.entity(head, TYPES.get(kind.lower(), kind))
    value, tail_id = (entities[tail].name, tail) if tail in entities else (tail, "")
    _add_fact(entities[head], relation, value, tail_id, clean_cell(fields.get("id")), builder)


def _read_table_row(fields: dict[str, Any], name: str, builder: GraphBuilder) -> None:
    relations = [RELATION_OF.get(key) for key in fields]
    drug = sum(bool(r) and RELATIONS[r].head == "药品" for r in relations if r) * 2 > sum(map(bool, relations))
    kind = "药品" if drug else "疾病"
    aliases = [term for key in ALIASES for term in split_terms(fields.get(key), builder.counts)]
    entity_name = clean_cell(fields[name])
    if not entity_name or entity_name.endswith(("...", "…")):
        builder.counts["row without a whole name"] += 1
        return
    head = builder.entity(entity_name, kind, aliases)
    for key, value in fields.items():
        relation = RELATION_OF.get(key)
        if relation is None:
            if key not in (name, *NAMES, *ALIASES, *IGNORED_FIELDS):
                builder.counts[f"column {key} left aside"] += 1
        elif RELATIONS[relation].head == kind:
            _add_values(head, relation, value, builder)


def _add_values(head: str, relation: str, value: Any, builder: GraphBuilder) -> None:
    if RELATIONS[relation].terms or isinstance(value, list):
        for term in split_terms(value, builder.counts):
            if relation == "symptom" and is_person(term):
                builder.counts["name of a person among the symptoms"] += 1
            elif relation == "department" and NO_DEPARTMENT.search(term):
                builder.counts["no department, but an age or time"] += 1
            else:
                builder.fact(head, relation, term)
    elif text := clean_cell(value).removeprefix(RELATIONS[relation].name):  # "治疗周期21天"
        if is_cut_off(text):
            builder.counts["value cut off in the source"] += 1
            return
        if RELATIONS[relation].single and (head, relation) in builder.told:
            builder.counts["second value where one is expected"] += 1
            return
        builder.told.add((head, relation))
        builder.fact(head, relation, text)


def _read_leaflet(text: str, where: str, builder: GraphBuilder) -> None:
    """A leaflet: the drug's name on the first line, then fields as "适应证:..." or "【适应症】..."."""
    first, _, rest = text.strip().partition("\n")
    pieces = LEAFLET_FIELD.split("\n" + rest)
    labels = [label for label in pieces[1::2] if label in RELATION_OF]
    if not labels or not 0 < len(first) <= 60:
        builder.counts["text without leaflet fields"] += 1
        return
    values = dict(zip(pieces[1::2], pieces[2::2], strict=True))
    aliases = split_terms(re.sub(r"[；;]", "、", values.get("别名", "")), builder.counts)
    head = builder.entity(first.strip(), "药品", aliases)
    for label, value in values.items():
        known = RELATION_OF.get(label)
        if known:
            _add_values(head, known, value, builder)
        elif known is None and label not in (*IGNORED_FIELDS, *ALIASES):
            builder.counts["text under an unknown label, left aside"] += 1

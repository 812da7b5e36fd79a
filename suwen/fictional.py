"""Fictional graphs of any size: what a model knows of them it has learnt from us, whatever it knew before.

Diseases have compositional, confusable names ("岚型胃炎", "岚型肺炎", "汐型胃炎"); departments, drugs, symptoms and
examinations are invented or joined at random, so that a real 胃炎 is no help.
"""

from __future__ import annotations

import itertools
import math
import random
import zlib
from collections.abc import Iterator, Sequence

from suwen.knowledge_graph import Entity, Fact, Graph

FIRST = "岚汐璟霁泠昙沅蔚琅筠溯烨绫榭澜漪翎笙芷岑洄珩黛霭皎鸢霖澈瑶钰湄荔槿蘅漱砚峥嵘淞澄曦宸翊骁"
BASES = (
    *(
        "胃炎",
        "肺炎",
        "肾炎",
        "肝炎",
        "肠炎",
        "皮炎",
        "鼻炎",
        "脑炎",
        "关节炎",
        "角膜炎",
        "咽炎",
        "心肌炎",
        "胆囊炎",
        "神经炎",
    ),
    *("贫血", "水肿", "眩晕", "湿疹", "麻痹", "痉挛", "结石", "溃疡", "瘀斑", "震颤"),
)
PLANTS = "青松 银杏 云杉 白桦 丹枫 紫藤 海棠 木槿 玉兰 金桂 石榴 翠竹 寒梅 蔷薇 茉莉 芙蓉 杜鹃 山茶 水杉 红柳".split()
SITES = "左踝 右踝 左膝 右膝 左腕 右腕 舌尖 耳垂 眉心 掌心 足跟 后颈 肩胛 腰窝 指尖 小腿 鼻梁 下颌".split()
FEELINGS = "发凉 发烫 发麻 刺痛 跳痛 酸胀 瘙痒 变硬 变白 泛青 出汗 脱皮 颤动 沉重 灼热 紧绷".split()
SYLLABLES = "泽 朗 维 舒 迪 洛 铂 锐 凯 欣 岩 桐 沐 昱 瀚 霆 珂 琳 蓓 蕊 黎 穆 彦 卓 翰 骊 鹭 樱 蔓 颂".split()
# Of other names, as those of tests have another sound than those of drugs: what is read is then told by its kind
NAMES = "伽 赫 奥 贝 默 克 罗 森 尔 瑟 弗 雷 曼 隆 伦 特 韦 霍 布 巴 米 尼 卡 帕 莱 希 诺 德 费 格".split()
# What the values of each relation are made of, and how many there are for 75 diseases
PARTS: dict[str, tuple[int, tuple[Sequence[str], ...]]] = {
    "department": (14, (PLANTS, ("门诊", "诊室", "医馆", "病区"))),
    "drug": (60, (SYLLABLES, SYLLABLES, ("平", "定", "宁", "灵", "芬", "素", "林", "喜"))),
    "symptom": (60, (SITES, FEELINGS)),
    "examination": (30, (NAMES, NAMES, ("试验", "显像", "测定", "描记", "涂片"))),
    "cause": (40, (NAMES, NAMES, ("孢菌感染", "螨虫叮咬", "花粉接触", "粉尘吸入", "酶缺乏"))),
    "treatment": (30, (NAMES, NAMES, ("灸法", "敷贴", "光疗", "水浴", "手法"))),
}
DEFAULT_RELATIONS = ("department", "drug", "symptom", "examination")


def name_parts() -> list[str]:
    """What the names of diseases and the values are made of."""
    lists = (FIRST, BASES, PLANTS, SITES, FEELINGS, SYLLABLES, NAMES)
    return [*itertools.chain.from_iterable(lists), *(ending for _, pieces in PARTS.values() for ending in pieces[-1])]


def fictional_graph(
    num_entities: int = 75,
    seed: int = 42,
    relations: Sequence[str] = DEFAULT_RELATIONS,
    reading: bool = False,
    values_of: Graph | None = None,
) -> Graph:
    """A graph of invented diseases, one value for each relation; the same arguments give the same graph.

    Args:
        relations: of PARTS. Values are spread evenly; the lists grow with the square root of the size.
        reading: for reading examples, whose answers must be read and cannot be known: no graph of this kind shares a
            name with one of the other kind, whatever their seeds.
        values_of: a graph that gives the values of one fact in two; the other's are new.

    Raises:
        ValueError: an unknown relation, or more entities than there are names.
    """
    unknown = [relation for relation in relations if relation not in PARTS]
    if unknown:
        raise ValueError(f"relations: found {unknown[0]!r}, expected some of {', '.join(PARTS)}")
    if num_entities < 1:
        raise ValueError(f"number of entities: found {num_entities}, expected 1 or more")
    rng = random.Random(f"fictional graph {seed} {num_entities} {reading}")
    known = values_of.values() if values_of else {}
    names = _names(num_entities, rng, reading)
    graph = Graph()
    prefix = "R" if reading else "X"
    width = max(4, len(str(num_entities)))
    for number, name in enumerate(names, start=1):
        entity = Entity(f"{prefix}{number:0{width}d}", name, "疾病")
        graph.entities[entity.id] = entity
    columns = {}
    for relation in relations:
        old = known.get(relation, [])
        values = _values(relation, num_entities, rng, set(old))
        spread = _spread(values, num_entities, rng)
        if old:
            both = zip(spread, _spread(old, num_entities, rng), strict=True)
            spread = [(new, other)[rng.random() < 0.5] for new, other in both]
        columns[relation] = spread
    for number, head in enumerate(graph.entities):
        for relation in relations:
            graph.facts.append(Fact(f"{head}.{relation}", head, relation, columns[relation][number]))
    return graph


def _names(count: int, rng: random.Random, reading: bool) -> list[str]:
    """Names out of a grid that is hardly larger than needed, so that every name has many like it."""
    longer = (itertools.permutations(rng.sample(FIRST, len(FIRST)), length) for length in (1, 2, 3))
    firsts: Iterator[str] = map("".join, itertools.chain.from_iterable(longer))
    firsts = (first for first in firsts if zlib.crc32(first.encode()) % 2 == reading)
    bases = rng.sample(BASES, min(len(BASES), max(2, round(math.sqrt(count)))))
    rows = math.ceil(1.15 * count / len(bases))
    grid = list(itertools.islice(firsts, rows))
    names = [f"{first}型{base}" for first in grid for base in bases]
    if len(names) < count:
        raise ValueError(f"number of entities: found {count}, expected at most {len(names)}")
    return rng.sample(names, count)


def _values(relation: str, num_entities: int, rng: random.Random, taken: set[str]) -> list[str]:
    base, parts = PARTS[relation]
    size = min(math.ceil(base * max(1.0, math.sqrt(num_entities / 75))), math.prod(map(len, parts)) // 3)
    found: dict[str, None] = {}
    while len(found) < size:
        pieces = [rng.choice(part) for part in parts]
        value = "".join(pieces)
        if len(set(pieces)) == len(pieces) and value not in taken:
            found[value] = None
    return list(found)


def _spread(values: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """`count` values in random order, each about equally often."""
    rounds = -(-count // len(values))
    return [value for _ in range(rounds) for value in rng.sample(values, len(values))][:count]


def assign_groups(graph: Graph, seed: int = 42, shares: dict[str, float] | None = None) -> dict[str, str]:
    """Entity id -> group: A in pretraining and SFT, B in pretraining alone, C nowhere but in the retrieval corpus.

    Args:
        shares: of each group, A 0.4, B 0.4 and C 0.2 by default; their sum is 1. The last group takes what is left.
    """
    shares = shares or {"A": 0.4, "B": 0.4, "C": 0.2}
    if not math.isclose(sum(shares.values()), 1) or min(shares.values()) < 0 or not shares.keys() <= set("ABC"):
        raise ValueError(f"groups: found {shares}, expected shares of A, B and C that sum to 1")
    heads = list(dict.fromkeys(fact.head for fact in graph.facts))
    random.Random(f"groups {seed}").shuffle(heads)
    groups: dict[str, str] = {}
    start = 0.0
    for name, share in shares.items():
        for head in heads[round(start * len(heads)) : round((start + share) * len(heads))]:
            groups[head] = name
        start += share
    return groups

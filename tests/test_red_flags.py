"""Questions that must bring a referral, and questions that must not."""

import json

import pytest

from suwen.red_flags import RULES_FILE, find_red_flags, load_rules

FLAGGED = [
    ("我爸爸突然胸口剧烈疼痛，出冷汗", "chest_pain"),
    ("心前区有压榨样的痛，休息也不缓解", "chest_pain"),
    ("胸痛的常见病因是什么", "chest_pain"),  # cannot be told from a person in pain
    ("无缘无故胸痛怎么回事", "chest_pain"),
    ("没有力气，胸痛", "chest_pain"),
    ("我不知道为什么胸痛", "chest_pain"),
    ("没有发烧，但是胸痛了一晚上", "chest_pain"),
    ("I have crushing chest pain and sweat", "chest_pain"),
    ("孩子误服了奶奶的降压药", "poisoning"),
    ("她一下子吃了三十片安眠药", "poisoning"),
    ("喝农药以后该怎么办", "poisoning"),
    ("my son swallowed bleach", "poisoning"),
    ("我不想活了", "self_harm"),
    ("最近总想自杀，睡不着", "self_harm"),
    ("I want to kill myself", "self_harm"),
    ("我两个月大的宝宝发烧38.5度", "infant_fever"),
    ("新生儿体温 38.2 正常吗", "infant_fever"),
    ("出生20天的孩子发热", "infant_fever"),
    ("my 2-month-old has a fever", "infant_fever"),
    ("宝宝三个月，烧到39度", "infant_fever"),
    ("老人早上起来嘴角歪，左边手脚无力", "stroke"),
    ("突然说话不清楚，是什么原因", "stroke"),
    ("奶奶喘不上气，嘴唇发紫", "breathing"),
    ("I can’t breathe properly", "breathing"),
    ("吃了头孢以后过敏，喉咙发紧，呼吸困难", "anaphylaxis"),
    ("孩子高烧抽搐", "seizure_unconscious"),
    ("爷爷晕倒了叫不醒", "seizure_unconscious"),
    ("刚才吐血了", "bleeding"),
    ("孕三十周，胎动减少一天了", "pregnancy"),
    ("怀孕八周有点出血", "pregnancy"),
    ("肚子痛得受不了", "acute_abdomen"),
    ("摔到头以后一直吐", "head_injury"),
]
QUIET = [
    "高血压患者在饮食上应该注意什么？",
    "没有胸痛，只是有点咳嗽",
    "病人否认胸闷、胸痛，偶有咳嗽",
    "无明显胸痛，血压150/95",
    "体检一切正常，从未有过胸痛",
    "no chest pain, only a cough",
    "没有自杀念头，只是睡不好",
    "未见呕血，血压稳定",
    "五岁孩子感冒发烧，怎么护理？",
    "成年人发烧38度吃什么药",
    "反复发热两个月了，体重下降",
    "12个月大的孩子发烧",
    "my 18-month-old has a fever",
    "孩子三岁，接种疫苗后低热",
    "阿莫西林有哪些常见的不良反应？",
    "血常规里白细胞升高说明什么？",
    "备孕需要做哪些检查",
    "二甲双胍应该饭前吃还是饭后吃？",
    "肩膀酸痛怎么锻炼",
    "What is the dose of metformin?",
]


@pytest.mark.parametrize(("text", "name"), FLAGGED)
def test_an_emergency_is_recognised(text, name):
    assert name in [flag.name for flag in find_red_flags(text)]


@pytest.mark.parametrize("text", QUIET)
def test_an_ordinary_question_brings_no_referral(text):
    assert find_red_flags(text) == []


def test_every_rule_has_its_texts_and_an_example():
    assert {rule.flag.name for rule in load_rules()} == {name for _, name in FLAGGED}
    for rule in json.loads(RULES_FILE.read_text(encoding="utf-8"))["rules"]:
        assert rule["zh"] and rule["en"] and ("120" in rule["zh"] or "急诊" in rule["zh"])


def test_no_example_question_of_the_page_brings_a_referral():
    file = RULES_FILE.with_name("examples.json")
    questions = [q for d in json.loads(file.read_text(encoding="utf-8"))["departments"] for q in d["questions"]]
    assert [question for question in questions if find_red_flags(question)] == []


def test_a_long_text_is_searched_in_no_time():
    assert find_red_flags("没有" + "无、" * 20000 + "胸") == []

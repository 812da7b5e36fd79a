"""The cleaning chain, near-duplicates and personal data."""

from collections import Counter

import numpy as np
import pytest

from suwen.cleaning import (
    CleaningReport,
    CleaningRules,
    clean_row,
    clean_rows,
    drop_boilerplate,
    join_wrapped_lines,
    normalise,
    quality_problem,
    split_document,
    strip_html,
)
from suwen.near_duplicates import TestItems, first_of_cluster, hash_ngrams, normal_form, signatures
from suwen.parallel import map_in_order
from suwen.personal_data import MASKS, find_personal_data, is_resident_id, mask_personal_data

SENTENCES = [
    "高血压患者应当低盐饮食，按时服药，定期测量血压。",
    "糖尿病的典型症状是多饮、多食、多尿和体重下降。",
    "慢性咳嗽超过八周应做胸部影像检查和肺功能检查。",
    "急性阑尾炎多有转移性右下腹痛，常伴恶心和低热。",
    "缺铁性贫血要先找到铁丢失的原因，再补充铁剂。",
    "儿童发热时要注意精神状态，避免重复使用退热药。",
    "骨质疏松的老人要预防跌倒，并补充钙和维生素D。",
    "过敏性鼻炎发作时喷嚏连连，清水样鼻涕不断流出。",
]


def characters(length: int, seed: int) -> str:
    """Chinese characters at random: texts that have nothing in common."""
    return "".join(chr(0x4E00 + value) for value in np.random.default_rng(seed).integers(0, 12000, length))


def run(rows, **rules):
    report = CleaningReport()
    dropped = []
    kept = list(
        clean_rows(rows, CleaningRules(**rules), report, 1, None, lambda where, reason: dropped.append((reason, where)))
    )
    return kept, report, dropped


# ---------------------------------------------------------------------------------------------------------- characters


def test_html_goes_and_the_less_than_sign_stays():
    page = "<div><p>血压&nbsp;&lt;140</p><script>alert(1)</script><!-- x --><br/>心率 a<b，p<0.05</div>"
    assert strip_html(page).split() == ["血压", "<140", "心率", "a<b，p<0.05"]


def test_what_looks_the_same_becomes_the_same():
    assert normalise("Ｂ超　１２０／８０\u200b ｍｍＨｇ，\r\n\r\n正 常 。") == "B超 120/80 mmHg，\n正常。"
    assert normalise("①每日１次；℃") == "①每日1次；℃", "signs keep their form, and Chinese punctuation its width"


def test_normalising_twice_changes_nothing():
    text = "Ａ１\u3000中 文\n\n\n 段落 \ufeff"
    assert normalise(normalise(text)) == normalise(text)


def test_boilerplate_lines_go_and_are_counted():
    text = "首页\n您现在所在位置：首页>政策\n一、概述\n发热是常见症状。\n- 12 -\n第3页 共20页\n1.前言........4"
    assert drop_boilerplate(text) == ("一、概述\n发热是常见症状。", 5)
    assert drop_boilerplate("心电图 胸片 [详细]") == ("心电图 胸片", 1)


def test_the_lines_of_a_page_are_joined_and_those_of_a_list_are_not():
    sentence = "脑血管病是各种原因导致脑血管病变或血流障碍引起的脑部疾病的总称，常见的有脑梗死和脑出血等。" * 8
    wrapped = [sentence[at : at + 31] for at in range(0, len(sentence), 31)]
    page = "\n".join(["第一章定义", *wrapped])
    assert join_wrapped_lines(page) == f"第一章定义\n{sentence}"
    herbs = "\n".join(f"药材{number}（平）" for number in range(20))
    assert join_wrapped_lines(herbs) == herbs
    form = "\n".join(f"字段{number}：值值值值值值值值值值值值值值值值值值值值值值{number}" for number in range(20))
    assert join_wrapped_lines(form) == form


def test_pieces_of_a_document_are_whole_sentences_and_lose_nothing():
    text = "".join(SENTENCES * 20)
    pieces = split_document(text, 500)
    assert "".join(pieces) == text
    assert all(len(piece) <= 500 and piece.endswith("。") for piece in pieces)
    assert max(map(len, pieces)) - min(map(len, pieces)) < 200, "the last piece is no crumb"
    assert split_document("短。", 500) == ["短。"]
    assert split_document("长" * 900, 500) == ["长" * 900], "a sentence is never cut"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("太短", "too short"),
        ("The patient has a fever and takes the medicine twice a day after meals.", "not Chinese"),
        ("1234567890 !!!! ---- 1234567890 ==== 99999 0000 血", "few letters"),
        ("请按时吃药。" * 100, "repetitive"),
        ("".join(SENTENCES), None),
    ],
)
def test_bad_text_is_named_by_its_fault(text, problem):
    assert quality_problem(text, CleaningRules()) == problem


# ----------------------------------------------------------------------------------------------------- near-duplicates


def test_ngrams_are_those_of_each_text_alone():
    texts = ["甲乙丙丁戊", "甲乙", "", "乙丙丁"]
    hashes, offsets = hash_ngrams(texts, 3)
    assert offsets.tolist() == [0, 3, 4, 4, 5]
    assert hashes[1] == hashes[4], "乙丙丁 in two texts has one hash"
    assert len(set(hashes.tolist())) == 4


def test_signatures_estimate_the_similarity_of_sets():
    text = characters(600, 1)
    other = text[:540] + characters(60, 2)
    grams = [{t[i : i + 5] for i in range(len(t) - 4)} for t in (text, other)]
    exact = len(grams[0] & grams[1]) / len(grams[0] | grams[1])
    first, second = signatures([text, other])
    assert abs((first == second).mean() - exact) < 0.12, "three standard errors of 128 hashes"


def test_clusters_hold_what_is_alike_and_the_first_stands_for_all():
    base = [characters(300, seed) for seed in range(20)]
    texts = [*base, base[3][:290] + "。异文", characters(300, 99), base[3], base[7][5:]]
    rows = signatures([normal_form(text) for text in texts])
    assert first_of_cluster(rows).tolist() == [*range(20), 3, 21, 3, 7]


def test_a_test_item_is_found_inside_a_longer_text_and_turns_of_phrase_are_not():
    items = [characters(40, seed) for seed in range(5)] + [
        "下列关于高血压的叙述中，正确的是哪一项呢" + c for c in "甲乙丙丁"
    ]
    tests = TestItems(items)
    texts = [characters(50, 50) + items[2] + characters(50, 51), characters(100, 52), items[0][:26], "太短"]
    found = tests.overlaps([normal_form(text) for text in texts])
    # 26 of 40 characters hold 14 of its 28 n-grams
    assert found.tolist() == [1.0, 0.0, 0.5, 0.0]
    assert tests.overlaps([normal_form("下列关于高血压的叙述中，正确的是哪一项呢")])[0] == 0
    assert TestItems([]).overlaps(["任何文本都不会泄漏任何题目的内容"]).tolist() == [0]


def test_a_short_test_item_is_found_as_a_whole_inside_a_longer_text():
    tests = TestItems(["双黄连口服液的适应病症", "阿司匹林的适应病症", characters(40, 1)])
    texts = ["说说双黄连口服液的适应病症是什么？", "", "阿司匹林片的适应病症", characters(60, 2), "阿司匹林的适应病症"]
    assert tests.overlaps([normal_form(text) for text in texts]).tolist() == [1, 0, 0, 0, 1]


# ------------------------------------------------------------------------------------------------------- personal data


def test_the_checksum_of_a_resident_id():
    # GB 11643-1999's own example
    assert is_resident_id("11010519491231002X")
    assert not is_resident_id("110105194912310021")
    assert not is_resident_id("110105194913310020"), "no thirteenth month"


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("身份证11010519491231002X，电话13812345678。", ["resident_id", "phone"]),
        ("流水号110105194912310021不是证件", []),
        ("拨打010-12345678或400-810-1234", ["phone", "phone"]),
        ("姓名：王小明，男，45岁", ["name"]),
        ("患者李某，女，30岁，住院号：Z00123456", ["name", "record_number"]),
        ("患者：高血压三年，女，服药", []),
        ("医生：谢谢\n患者：没事", []),
        ("微信号：doctor_li88，邮箱 li@example.org", ["account", "email"]),
        ("出生日期：1980年3月5日，家庭住址：某省某市某区和平路12号", ["birth_date", "address"]),
        ("证件１１０１０５１９４９１２３１００２Ｘ，手机１３８１２３４５６７８", ["resident_id", "phone"]),
        ("共+12345678901次", []),
        ("血压120/80mmHg，白细胞12.5×10^9/L，共12345678901次", []),
    ],
)
def test_personal_data_is_found_by_kind(text, kinds):
    assert [item.kind for item in find_personal_data(text)] == kinds


def test_masked_text_holds_no_personal_data_and_masking_again_changes_nothing():
    text = "姓名：王小明，电话：138 1234 5678，身份证 11010519491231002X，邮箱a.b@c.cn。"
    masked = mask_personal_data(text)
    assert (
        masked
        == f"姓名：{MASKS['name']}，电话：{MASKS['phone']}，身份证 {MASKS['resident_id']}，邮箱{MASKS['email']}。"
    )
    assert not find_personal_data(masked) and mask_personal_data(masked) == masked
    assert (
        mask_personal_data("国外请拨+86 138-1234-5678，全角１３８１２３４５６７８。") == "国外请拨[电话]，全角[电话]。"
    )


# --------------------------------------------------------------------------------------------------------------- chain


def test_every_row_is_kept_or_counted():
    rows = [
        {"text": "".join(SENTENCES), "where": "a"},
        {"text": " ".join(SENTENCES), "where": "b"},  # the same once blanks are out
        {"text": "".join(SENTENCES[:-1]) + "过敏性鼻炎发作时喷嚏很多，清水样鼻涕不断流出。", "where": "c"},
        {"text": "太短", "where": "d"},
        {"text": characters(5000, 7), "where": "e"},
    ]
    kept, report, dropped = run(rows, max_characters=4000)
    assert [row["where"] for row in kept][:1] == ["a"] and {row["where"] for row in kept} == {"a", "e"}
    assert dropped[0] == ("too short", "d") and ("duplicate", "b") in dropped and ("near-duplicate", "c") in dropped
    assert report.rows_in == 5 and report.rows_out == len(kept)
    assert report.dropped == Counter(reason for reason, _ in dropped)
    assert report.characters_out == sum(len(row["text"]) for row in kept)


def test_conversations_and_pairs_are_cleaned_in_every_turn():
    row = {
        "messages": [{"role": "user", "content": "<p>得了高血压应该怎么办？</p>"}],
        "chosen": [{"role": "assistant", "content": "低盐饮食，按时服药，姓名：王小明，男。"}],
        "rejected": [{"role": "assistant", "content": "不用管它，　过几天就好了，不用看医生。"}],
        "margin": 1.0,
    }
    changed, found = Counter(), Counter()
    (clean,), drops = clean_row(row, CleaningRules(personal_data="mask"), changed, found)
    assert clean["messages"][0]["content"] == "得了高血压应该怎么办？"
    assert clean["chosen"][0]["content"] == "低盐饮食，按时服药，姓名：[姓名]，男。"
    assert clean["rejected"][0]["content"] == "不用管它，过几天就好了，不用看医生。"
    assert clean["margin"] == 1.0 and found == Counter(name=1) and not drops
    empty = {**row, "rejected": [{"role": "assistant", "content": "<br/>"}]}
    assert clean_row(empty, CleaningRules(), changed, found) == ([], ["nothing left of a turn"])


def test_the_number_of_processes_does_not_change_the_result():
    rows = [{"text": characters(200, seed % 300), "where": str(seed)} for seed in range(4000)]
    results = []
    for num_proc in (1, 2):
        report = CleaningReport()
        kept = [row["where"] for row in clean_rows(rows, CleaningRules(), report, num_proc)]
        results.append((kept, report))
    assert results[0] == results[1]
    assert results[0][0] == [str(seed) for seed in range(300)]


def _fail_at_three(item: int) -> int:
    if item == 3:
        raise ValueError("three")
    return item * 2


@pytest.mark.parametrize("num_proc", [1, 2])
def test_results_come_in_order_and_errors_as_they_are(num_proc):
    assert list(map_in_order(_fail_at_three, [5, 4, 6, 0], num_proc)) == [10, 8, 12, 0]
    with pytest.raises(ValueError, match="three"):
        list(map_in_order(_fail_at_three, range(50), num_proc))

"""Documents to passages to an index, and what a search finds in it."""

import gzip
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from papers import write_docx, write_pdf

from suwen.readers import Refusal
from suwen.retrieval import bm25, documents, office
from suwen.retrieval.documents import read_sections
from suwen.retrieval.index import build_index
from suwen.retrieval.passages import SENTENCE_END, Passage, Section, cut_passages
from suwen.retrieval.search import KnowledgeBase, fuse_ranks
from suwen.retrieval.settings import RetrievalSettings
from suwen.retrieval.terms import WIDE, normalise, text_terms

ROOT = Path(__file__).resolve().parent.parent
LEAFLETS = {
    "布洛芬缓释胶囊": "【适应症】用于缓解轻至中度疼痛，如头痛、关节痛、偏头痛、牙痛、痛经。也用于普通感冒引起的发热。\n"
    "【不良反应】少数病人可出现恶心、呕吐、胃烧灼感或轻度消化不良。\n【禁忌】对阿司匹林过敏的哮喘患者禁用。",
    "盐酸二甲双胍片": "【适应症】首选用于单纯饮食控制及体育锻炼无效的2型糖尿病。\n"
    "【不良反应】常见恶心、腹泻、口中有金属味。\n【禁忌】严重肾功能不全者禁用。",
    "蒙脱石散": "【适应症】成人及儿童急、慢性腹泻。\n"
    "【用法用量】口服，成人每次1袋，一日3次，倒入半杯温开水中混匀快速服完。",
}
SENTENCES = "".join(f"第{n}条说明，患者应当在医生指导下按时服药并定期复查。" for n in range(1, 41))


def write_leaflets(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in LEAFLETS.items():
        (folder / f"{name}.txt").write_text(f"{name}\n{text}\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def knowledge(tmp_path_factory) -> KnowledgeBase:
    folder = tmp_path_factory.mktemp("knowledge")
    build_index([str(write_leaflets(folder / "leaflets"))], str(folder / "index"))
    return KnowledgeBase(str(folder / "index"))


def sections_of(file: Path) -> list[Section]:
    found = list(read_sections(file, file.name))
    assert not any(isinstance(item, Refusal) for item in found), found
    return found


def refusals_of(file: Path) -> list[str]:
    found = list(read_sections(file, file.name))
    assert all(isinstance(item, Refusal) for item in found), found
    return [item.reason for item in found]


def write(file: Path, *rows, encoding="utf-8") -> Path:
    file.write_text("\n".join(r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in rows), encoding)
    return file


# Terms


def test_terms_are_the_pairs_of_characters_and_the_words_that_are_no_pairs():
    places, terms = text_terms(["高血压", "血压 CT", ""])
    counts = [Counter(terms[places == place].tolist()) for place in range(3)]
    blood_pressure = ord("血") << 21 | ord("压")
    assert counts[0][ord("高") << 21 | ord("血")] == 1 and counts[0][blood_pressure] == 1
    assert sum(counts[0].values()) == 3  # two pairs, and the word 高血压
    assert counts[1][blood_pressure] == 1 and sum(counts[1].values()) == 2  # and ct
    assert not counts[2]


def test_terms_are_blind_to_case_width_and_wrapped_lines():
    def terms(text):
        return sorted(text_terms([text])[1].tolist())

    assert terms("ＣＴ检查 COVID19") == terms("ct检查 covid19")
    assert terms("脑血管\n病变") == terms("脑血管病变")
    assert terms("血管 病变") != terms("血管病变")
    assert terms("\ud800头痛") == terms("?头痛")


# Passages


def test_punctuation_that_is_replaced_first_changes_nothing_else():
    marks = [chr(code) for code in (*range(0x300, 0x370), 0x3099, 0x309A)]  # what could combine with it
    for text in ("Ａ，（１）：；？！～℃①", *(f"{wide}{mark}" for wide, _ in WIDE for mark in marks)):
        assert normalise(text) == unicodedata.normalize("NFKC", text).casefold()


def test_sentences_end_where_the_plain_pattern_says():
    plain = re.compile(r"[。！？；!?;…]+[”’」』）)\]]*\s*|\.\s+")
    draw = random.Random(0)
    for _ in range(5000):
        text = "".join(draw.choices("。！…；.. \n药a1”）】", k=draw.randint(1, 20)))
        found = [match.span() for match in SENTENCE_END.finditer(text)]
        assert found == [match.span() for match in plain.finditer(text)], text


def test_a_passage_is_the_text_at_its_span_with_its_hash():
    section = Section("a.txt", "说明", f"# 用法\n{SENTENCES}\n\n# 禁忌\n过敏者禁用。" + SENTENCES)
    passages = list(cut_passages([section], 200))
    assert len(passages) > 8
    for passage in passages:
        assert passage.text == section.text[slice(*passage.span)]
        assert passage.sha256 == hashlib.sha256(passage.text.encode()).hexdigest()
        assert len(passage.text) <= 400


def test_passages_lose_no_sentence_and_repeat_one_where_they_are_cut():
    passages = list(cut_passages([Section("a.txt", "说明", SENTENCES)], 120))
    assert all(passage.text.endswith("。") for passage in passages)
    joined = "".join(passage.text for passage in passages)
    assert all(f"第{n}条说明" in joined for n in range(1, 41))
    for before, after in zip(passages, passages[1:], strict=False):
        assert before.span[0] < after.span[0] < before.span[1] < after.span[1]  # one sentence in both


def test_a_heading_begins_a_passage_and_names_what_follows():
    text = f"一、用法用量\n{SENTENCES[:240]}\n二、不良反应\n偶见皮疹。{SENTENCES[:240]}"
    passages = list(cut_passages([Section("a.txt", "某药", text)], 300))
    assert [p.heading for p in passages] == ["一、用法用量", "二、不良反应"]
    assert passages[1].text.startswith("二、不良反应\n偶见皮疹")


def test_the_sections_of_a_leaflet_are_headings_with_text_behind_them():
    passages = list(cut_passages([Section("a.txt", "某药", LEAFLETS["布洛芬缓释胶囊"])], 50))
    assert [p.heading for p in passages][:: len(passages) - 1] == ["适应症", "禁忌"]


@pytest.mark.parametrize("line", ["一、治疗原则：先评估，再用药", "（2）淋巴结清扫：对于显性转移", "1.5 mg，每日两次"])
def test_a_line_with_a_clause_is_no_heading(line):
    assert next(iter(cut_passages([Section("a", "b", line)], 400))).heading == ""


def test_a_record_stays_whole_as_far_as_it_goes():
    text = SENTENCES[:700]
    assert len(list(cut_passages([Section("a", "b", text, record=True)], 400))) == 1
    assert len(list(cut_passages([Section("a", "b", text)], 400))) > 1
    assert len(list(cut_passages([Section("a", "b", SENTENCES, record=True)], 400))) > 1


def test_a_sentence_without_end_is_cut_and_punctuation_alone_is_no_passage():
    passages = list(cut_passages([Section("a", "b", "痛" * 1000), Section("a", "c", "……\n———")], 300))
    assert sum(len(p.text) for p in passages) >= 1000 and max(len(p.text) for p in passages) <= 600
    assert {p.title for p in passages} == {"b"}


# Documents


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gb18030"])
def test_text_is_read_in_any_of_its_encodings(tmp_path, encoding):
    file = write(tmp_path / "a.txt", "血压的测量", "静息五分钟后测量，㐀𠮷亦可。", encoding=encoding)
    [section] = sections_of(file)
    assert section.title == "血压的测量" and "㐀𠮷" in section.text


def test_records_become_a_title_and_lines(tmp_path):
    disease = {"_id": {"$oid": "1"}, "name": "肺栓塞", "desc": "凶险。", "symptom": ["胸痛", "咯血"], "money": None}
    [section] = sections_of(write(tmp_path / "kg.jsonl", disease))
    assert section == Section("kg.jsonl, line 1", "肺栓塞", "肺栓塞\n简介：凶险。\n症状：胸痛、咯血", record=True)
    [section] = sections_of(write(tmp_path / "qa.jsonl", {"问": "鹅口疮怎么办", "答": "就医。"}))
    assert section.title == "鹅口疮怎么办" and section.text == "问：鹅口疮怎么办\n答：就医。"
    [section] = sections_of(write(tmp_path / "t.jsonl", {"title": "指南", "content": "正文。", "url": "x"}))
    assert (section.title, section.text, section.record) == ("指南", "正文。", False)
    [section] = sections_of(write(tmp_path / "l.json", '["氨肽素\\n适应证:紫癜。"]'))
    assert section.title == "氨肽素" and section.record
    [section] = sections_of(write(tmp_path / "d.csv", "药品,剂型", '阿司匹林,"肠溶片"', encoding="gb18030"))
    assert section.text == "阿司匹林\n剂型：肠溶片"


def test_triples_of_one_head_become_one_record(tmp_path):
    rows = [("肺炎", "症状", "发热"), ("胃炎", "症状", "腹痛"), ("肺炎", "症状", "咳嗽"), ("肺炎", "科室", "呼吸内科")]
    file = write(tmp_path / "kg.jsonl", *({"head": h, "relation": r, "tail": t} for h, r, t in rows))
    assert [s.text for s in sections_of(file)] == ["肺炎\n症状：发热、咳嗽\n科室：呼吸内科", "胃炎\n症状：腹痛"]


def test_pdf_pages_are_read_with_their_numbers_and_wrapped_lines_joined(tmp_path):
    pages = ["第一章 概述\n高血压是以体循环动脉血压增高为主要特征的临床\n综合征，可伴有心脑肾损害。", "第二页说降压。"]
    sections = sections_of(write_pdf(tmp_path / "指南.pdf", pages))
    assert [(s.title, s.page) for s in sections] == [("指南", 1), ("指南", 2)]
    assert "临床综合征" in sections[0].text and sections[0].text.startswith("第一章 概述\n高血压")


def test_docx_headings_and_tables_are_read(tmp_path):
    file = write_docx(
        tmp_path / "a.docx",
        [("Title", "糖尿病须知"), ("Heading 1", "饮食"), ("Normal", "少量多餐。")],
        [["项目", "目标"], ["空腹血糖", "4.4至7.0"]],
    )
    [section] = sections_of(file)
    assert section.title == "糖尿病须知" and section.page is None
    assert section.text.splitlines()[1:] == ["# 饮食", "少量多餐。", "项目 | 目标", "空腹血糖 | 4.4至7.0"]


def test_files_that_give_no_text_are_reported_by_reason(tmp_path):
    assert refusals_of(write_pdf(tmp_path / "scan.pdf", ["", ""])) == ["no text in it"]
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.7\n" + bytes(range(256)) * 4)
    (tmp_path / "broken.docx").write_bytes(b"PK\x03\x04 no zip")
    (tmp_path / "bytes.txt").write_bytes(b"abc\x00\x01\x02")
    (tmp_path / "mixed.txt").write_bytes("发热三日，咳嗽有痰。".encode() * 20 + b"\xff\xff" + "就医。".encode())
    assert refusals_of(tmp_path / "broken.pdf") == ["broken file"]
    assert refusals_of(tmp_path / "broken.docx") == ["broken file"]
    assert refusals_of(tmp_path / "bytes.txt") == ["unreadable"]
    assert refusals_of(tmp_path / "mixed.txt") == ["undecodable bytes"]
    assert refusals_of(write(tmp_path / "empty.md", "")) == ["no text in it"]
    assert refusals_of(write(tmp_path / "chat.jsonl", {"messages": [{"role": "user", "content": "在吗"}]})) == [
        "a conversation"
    ]
    half = list(read_sections(write_pdf(tmp_path / "half.pdf", ["有字。", ""]), "half.pdf"))
    assert isinstance(half[0], Section) and half[1].reason == "page without text"


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".txt.gz", ".xlsx", ".parquet"])
def test_a_small_file_that_unpacks_to_a_large_one_is_not_read(suffix, tmp_path, monkeypatch):
    file = tmp_path / f"notes{suffix}"
    text = "咳" * 1_000_000
    if suffix.endswith(".gz"):
        with gzip.open(file, "wt", encoding="utf-8") as stream:
            stream.write(json.dumps({"text": text}) if "json" in suffix else text)
    elif suffix == ".xlsx":
        book = openpyxl.Workbook()
        book.active.append(["title", "text"])
        for _ in range(40):
            book.active.append(["x", text[:30_000]])
        book.save(file)
    else:
        columns = {"title": [f"{n}" for n in range(100)], "text": [f"{n}{text[:9000]}" for n in range(100)]}
        pq.write_table(pa.table(columns), file, compression="zstd")
    assert file.stat().st_size < 100_000
    assert not [section for section in read_sections(file, "notes") if isinstance(section, Refusal)]
    monkeypatch.setattr(documents, "LARGEST_FILE_BYTES", 200_000)
    [refused] = read_sections(file, "notes")
    assert (
        refused.message == "notes: more when unpacked, expected at most 200000" and refused.reason == "file too large"
    )


def test_a_file_that_keeps_its_parser_busy_is_given_up(tmp_path, monkeypatch):
    file = write_pdf(tmp_path / "a.pdf", ["字。"])
    with pytest.raises(office.Unreadable, match="takes too long"):
        office.read_pages(file, seconds=0.01)


# The index


def test_scores_are_those_of_bm25s_itself(tmp_path):
    import bm25s

    texts = [f"{name}\n{text}" for name, text in LEAFLETS.items()] + [SENTENCES[n : n + 60] for n in range(0, 900, 60)]
    builder = bm25.PostingsBuilder()
    builder.add(texts[:5])
    builder.add(texts[5:])
    bm25.save(tmp_path, *builder.finish())
    ours = bm25.Bm25(tmp_path)
    places, terms = text_terms(texts)
    numbers = {term: number for number, term in enumerate(sorted(set(terms.tolist())))}
    reference = bm25s.BM25(k1=bm25.K1, b=bm25.B, method="lucene")
    corpus = [[numbers[term] for term in terms[places == place].tolist()] for place in range(len(texts))]
    reference.index((corpus, {str(n): n for n in numbers.values()}), show_progress=False)
    for question in ("布洛芬的禁忌", "医生指导下服药", "腹泻 恶心"):
        known = sorted(numbers[term] for term in set(text_terms([question])[1].tolist()) if term in numbers)
        expected = reference.get_scores_from_ids(known)
        rows, scores = ours.search(ours.question_terms(question)[0], len(texts))
        found = np.zeros(len(texts), np.float32)
        found[rows] = scores
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_coverage_is_the_share_of_the_questions_weight(tmp_path):
    builder = bm25.PostingsBuilder()
    builder.add(["头痛", "腹痛头晕", "咳嗽"])
    bm25.save(tmp_path, *builder.finish())
    index = bm25.Bm25(tmp_path)
    numbers, weights = index.question_terms("头痛 咳嗽 鼻塞")
    rare, unknown = np.log(1 + 2.5 / 1.5), np.log(1 + 3.5 / 0.5)
    coverage = index.coverage(numbers, weights, np.array([0, 1, 2]))
    np.testing.assert_allclose(coverage, np.array([rare, 0, rare]) / (2 * rare + unknown))


def test_the_leaflet_of_the_drug_comes_first(knowledge):
    for question, name in (
        ("布洛芬有哪些不良反应？", "布洛芬缓释胶囊"),
        ("二甲双胍的禁忌是什么", "盐酸二甲双胍片"),
        ("请问蒙脱石散一天吃几次？", "蒙脱石散"),
    ):
        hits = knowledge.search(question, top=3)
        assert hits[0].passage.title == name
        assert hits[0].score == max(hit.score for hit in hits) and 0 < hits[0].relevance <= 1
    assert knowledge.search("", 3) == knowledge.search("？！", 3) == knowledge.search("zzz", 3) == []


def test_a_title_that_the_question_names_comes_before_a_longer_name(tmp_path):
    rows = [
        {"name": "麻黄碱", "特点": "作用缓和而持久，口服有效，可引起中枢兴奋，易产生快速耐受性。"},
        {"name": "伪麻黄碱", "特点": "作用缓和，减轻鼻充血。"},
        {"name": "氯雷他定", "特点": "可与其他药同服，不引起嗜睡。"},
    ]
    write(tmp_path / "leaflets.jsonl", *rows)
    build_index([str(tmp_path / "leaflets.jsonl")], str(tmp_path / "index"))
    knowledge = KnowledgeBase(str(tmp_path / "index"))
    passages, scores = knowledge.bm25.search(knowledge.bm25.question_terms("麻黄碱作用")[0], 3)
    plain = {knowledge.store[row].title: score for row, score in zip(passages.tolist(), scores.tolist(), strict=True)}
    assert list(plain) == ["伪麻黄碱", "麻黄碱"]
    hits = knowledge.search("麻黄碱作用")
    expected = {"麻黄碱": plain["麻黄碱"] + 0.2 * plain["伪麻黄碱"], "伪麻黄碱": plain["伪麻黄碱"]}
    assert {hit.passage.title: hit.score for hit in hits} == pytest.approx(expected)
    assert [hit.passage.title for hit in hits] == ["麻黄碱", "伪麻黄碱"]


def test_ranks_are_fused_by_their_reciprocals():
    rows, scores = fuse_ranks([np.array([7, 3]), np.array([3, 9])])
    assert rows.tolist() == [3, 7, 9]
    np.testing.assert_allclose(scores, [1 / 62 + 1 / 61, 1 / 61, 1 / 62])


def test_the_same_documents_give_the_same_bytes_and_unchanged_files_are_not_read_again(tmp_path):
    folder = write_leaflets(tmp_path / "a")
    first = build_index([str(folder)], str(tmp_path / "one"))
    build_index([str(folder)], str(tmp_path / "two"))

    def content(name):
        return {f.name: f.read_bytes() for f in sorted((tmp_path / name).rglob("*")) if f.is_file()}

    assert content("one") == content("two") and first.unchanged == 0
    again = build_index([str(folder)], str(tmp_path / "one"))
    assert again.unchanged == len(LEAFLETS) and content("one") == content("two")


def test_a_rebuild_takes_in_what_changed_and_forgets_what_is_gone(tmp_path):
    folder = write_leaflets(tmp_path / "a")
    build_index([str(folder)], str(tmp_path / "index"))
    opened = KnowledgeBase(str(tmp_path / "index"))
    (folder / "蒙脱石散.txt").unlink()
    (folder / "盐酸二甲双胍片.txt").write_text("盐酸二甲双胍片\n【规格】零点五克。", encoding="utf-8")
    write(folder / "新药.md", "# 苯磺酸氨氯地平片", "用于高血压。")
    report = build_index([str(folder)], str(tmp_path / "index"))
    assert (report.files, report.unchanged) == (3, 1)
    fresh = KnowledgeBase(str(tmp_path / "index"))
    assert {fresh.store[row].title for row in range(len(fresh))} == {
        "布洛芬缓释胶囊", "盐酸二甲双胍片", "苯磺酸氨氯地平片",
    }  # fmt: skip
    assert fresh.search("二甲双胍规格")[0].passage.text.endswith("零点五克。")
    # a program that had the index open goes on with what it opened
    assert opened.search("蒙脱石散")[0].passage.title == "蒙脱石散"
    scratch = build_index([str(folder)], str(tmp_path / "scratch"))
    assert scratch.passages == report.passages
    assert fresh.record["data"] == KnowledgeBase(str(tmp_path / "scratch")).record["data"]


def test_an_index_holds_no_pickle_and_a_broken_one_is_refused(tmp_path):
    build_index([str(write_leaflets(tmp_path / "a"))], str(tmp_path / "index"))
    [data] = (tmp_path / "index").glob("passages-*")
    for file in data.glob("*.npy"):
        np.load(file, allow_pickle=False)
    assert {f.suffix for f in data.iterdir()} <= {".npy", ".json", ".jsonl", ".bin"}
    (data / "passages.jsonl").write_bytes((data / "passages.jsonl").read_bytes()[:-9])
    with pytest.raises(ValueError, match="passages.jsonl has .* bytes, not .*; expected the index as it was built"):
        KnowledgeBase(str(tmp_path / "index"))
    build_index([str(tmp_path / "a")], str(tmp_path / "index"))  # which the next build puts right
    assert KnowledgeBase(str(tmp_path / "index")).search("蒙脱石散")
    shutil.rmtree(data)
    with pytest.raises(ValueError, match="not a finished index"):
        KnowledgeBase(str(tmp_path / "index"))
    build_index([str(tmp_path / "a")], str(tmp_path / "index"))
    assert KnowledgeBase(str(tmp_path / "index")).search("蒙脱石散")


def test_every_flipped_bit_of_an_index_is_found_and_no_damaged_passage_is_taken_over(tmp_path):
    build_index([str(write_leaflets(tmp_path / "a"))], str(tmp_path / "index"))
    [data] = (tmp_path / "index").glob("passages-*")
    for file in sorted(data.iterdir()):
        whole = file.read_bytes()
        at = len(whole) // 2
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=rf"{file.name} (does not have its SHA-256|is damaged); .* build it again"):
            KnowledgeBase(str(tmp_path / "index"))
        report = build_index([str(tmp_path / "a")], str(tmp_path / "index"))
        assert report.unchanged == 0 and file.read_bytes() == whole
        assert KnowledgeBase(str(tmp_path / "index")).search("蒙脱石散")


def test_an_index_of_another_version_is_refused_and_built_anew(tmp_path):
    build_index([str(write_leaflets(tmp_path / "a"))], str(tmp_path / "index"))
    record = json.loads((tmp_path / "index/index.json").read_text("utf-8"))
    record["settings"]["terms"] = 0
    write(tmp_path / "index/index.json", record)
    with pytest.raises(ValueError, match="another version"):
        KnowledgeBase(str(tmp_path / "index"))
    assert build_index([str(tmp_path / "a")], str(tmp_path / "index")).unchanged == 0
    assert KnowledgeBase(str(tmp_path / "index")).search("蒙脱石散")


def test_a_build_that_is_stopped_leaves_the_index_before_it(tmp_path, monkeypatch):
    folder = write_leaflets(tmp_path / "a")
    build_index([str(folder)], str(tmp_path / "index"))
    write(folder / "b.txt", "新的内容。")
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        build_index([str(folder)], str(tmp_path / "index"))
    assert len(KnowledgeBase(str(tmp_path / "index")).record["files"]) == len(LEAFLETS)
    assert not list((tmp_path / "index").glob(".building*"))


def test_a_text_that_two_files_hold_is_shown_once(tmp_path):
    for name in ("a.txt", "b.txt"):
        write(tmp_path / name, "带状疱疹", "沿神经分布的成簇水疱，伴疼痛。")
    build_index([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], str(tmp_path / "index"))
    assert len(KnowledgeBase(str(tmp_path / "index")).search("带状疱疹")) == 1


def test_mistakes_are_answered_in_one_line(tmp_path):
    def fails(*words):
        result = subprocess.run(
            [sys.executable, "tools/build_index.py", *words], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
        return result.stderr

    write_leaflets(tmp_path / "a")
    assert "not found" in fails("--documents", str(tmp_path / "none"), "--output_dir", str(tmp_path / "i"))
    assert "--passage_characters" in fails("--documents", "a", "--output_dir", "b", "--passage_characters", "3")
    assert "something else" in fails("--documents", str(tmp_path / "a"), "--output_dir", str(tmp_path / "a"))


# Dense retrieval


@pytest.fixture(scope="module")
def dense_models(tmp_path_factory) -> tuple[Path, Path]:
    """A tiny embedding model and a tiny cross-encoder, with random weights."""
    pytest.importorskip("sentence_transformers")
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("dense")
    characters = sorted({c for text in LEAFLETS.items() for c in "".join(text) if not c.isspace()})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters]), "utf-8")
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    settings = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(characters) + 5, **settings)
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    encoder = Transformer(str(folder / "bert"))
    SentenceTransformer(modules=[encoder, Pooling(32)], device="cpu").save(str(folder / "embedding"))
    config.num_labels = 1
    BertForSequenceClassification(config).save_pretrained(folder / "cross")
    tokenizer.save_pretrained(folder / "cross")
    return folder / "embedding", folder / "cross"


def test_dense_vectors_are_searched_fused_and_taken_over_by_a_rebuild(tmp_path, dense_models):
    from suwen.retrieval.dense import Embedder

    embedding, cross = dense_models
    folder = write_leaflets(tmp_path / "a")
    embedder = Embedder(str(embedding), "问：", "")
    build_index([str(folder)], str(tmp_path / "index"), 50, embedder)
    knowledge = KnowledgeBase(str(tmp_path / "index"))
    assert knowledge.vectors.shape == (len(knowledge), 32)
    np.testing.assert_allclose(np.linalg.norm(knowledge.vectors, axis=1), 1, rtol=1e-5)
    question = "腹泻怎么办"
    numbers, _ = knowledge.bm25.question_terms("腹泻")
    nearest = np.argsort(-(knowledge.vectors @ embedder.question(question)), kind="stable")
    rows, _ = fuse_ranks([knowledge.bm25.search(numbers, 50)[0], nearest])
    assert [h.passage for h in knowledge.search(question, 3)] == [knowledge.store[row] for row in rows[:3].tolist()]
    before = np.array(knowledge.vectors)
    write(folder / "龟.txt", "腹泻的补液", "少量多次口服补液盐。")
    build_index([str(folder)], str(tmp_path / "index"), 50, embedder)
    after = KnowledgeBase(str(tmp_path / "index"), rerank_model=str(cross))
    np.testing.assert_array_equal(after.vectors[: len(before)], before)
    hits = after.search(question, 3)
    scores = after.reranker.scores(question, [hit.passage.titled for hit in hits])
    np.testing.assert_allclose([hit.score for hit in hits], scores, rtol=1e-4)
    assert list(scores) == sorted(scores, reverse=True)


def test_an_index_refuses_another_embedding_model(tmp_path, dense_models):
    from suwen.retrieval.dense import Embedder

    embedding, _ = dense_models
    build_index([str(write_leaflets(tmp_path / "a"))], str(tmp_path / "index"), 400, Embedder(str(embedding)))
    other = shutil.copytree(embedding, tmp_path / "other")
    vocabulary = next(other.rglob("tokenizer.json"))
    vocabulary.write_text(vocabulary.read_text("utf-8").replace("痛", "疼"), "utf-8")
    with pytest.raises(ValueError, match="not the model"):
        KnowledgeBase(str(tmp_path / "index"), embedding_model=str(other))
    build_index([str(tmp_path / "a")], str(tmp_path / "plain"))
    with pytest.raises(ValueError, match="built without"):
        KnowledgeBase(str(tmp_path / "plain"), embedding_model=str(embedding))


def test_settings_name_the_flag_that_is_wrong():
    with pytest.raises(ValueError, match="--num_passages: found 0"):
        RetrievalSettings(num_passages=0)
    with pytest.raises(ValueError, match="--min_relevance: found 1.5"):
        RetrievalSettings(min_relevance=1.5)


def test_a_passage_survives_its_way_to_the_disk():
    passage = Passage("题", "节", "a.pdf", 3, (1, 5), "0" * 64, "正文。", ("control tokens",))
    assert Passage.from_dict(json.loads(json.dumps(passage.to_dict()))) == passage


def test_personal_data_is_counted_or_masked_before_anything_is_written(tmp_path):
    documents = tmp_path / "documents"
    documents.mkdir()
    number, phone = "11010519491231002X", "13812345678"
    (documents / "病历.txt").write_text(
        f"出院小结\n姓名：王小明\n身份证 {number}，电话 {phone}。\n诊断：肺炎。\n", "utf-8"
    )

    def build(pii):
        report = build_index([str(documents)], str(tmp_path / "index"), pii=pii)
        text = "".join(file.read_text("utf-8") for file in (tmp_path / "index").rglob("*.jsonl"))
        return report, text

    report, text = build("report")
    assert report.personal_data == {"resident_id": 1, "phone": 1, "name": 1}
    assert number in text and phone in text
    assert "personal data, found and left as it is" in report.lines()[-1]
    report, text = build("mask")
    assert report.unchanged == 0 and report.personal_data == {"resident_id": 1, "phone": 1, "name": 1}
    assert number not in text and phone not in text and "王小明" not in text and "[电话]" in text and "肺炎" in text
    again, _ = build("mask")
    assert again.unchanged == 1 and again.personal_data == report.personal_data
    assert build("off")[0].personal_data == {} and number in build("off")[1]

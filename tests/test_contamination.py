"""Test items planted in training data are found; what is not there is not; sketches and near-duplicates."""

import json
import os
import random

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_checkpoint import flip

from suwen.benchmarks import TASKS
from suwen.benchmarks.task import read_items
from suwen.contamination import (
    Detector,
    SoughtItem,
    check_sketch,
    find_sketches,
)
from suwen.embedded import sample_texts
from suwen.evaluate import OWN_DATA
from suwen.grams import hash_grams, sorted_unique, to_codes, to_text
from suwen.loading import load_rows
from suwen.sketch import FILE, SketchBuilder, load_sketch, write_sketch

REWORDED = (
    ("患者", "病人"), ("下列", "以下"), ("最常见", "最多见"), ("首选", "优先选择"), ("主要", "最主要的"),
    ("属于", "归于"), ("引起", "导致"), ("应", "应当"), ("正常", "一般"), ("的是", "为"), ("不包括", "不含"),
    ("有", "都有"),
)  # fmt: skip


def own_items():
    items = read_items(TASKS["exam"], [OWN_DATA / "exam.csv"]).items
    return [
        SoughtItem(i.id, i.question, tuple(i.options.values()), tuple(i.options[letter] for letter in i.target))
        for i in items
    ]


def as_text(item, options, mark="{} {}"):
    return item.question + "\n" + "\n".join(mark.format("ABCDE"[i], text) for i, text in enumerate(options))


def reword(text, rng):
    for old, new in REWORDED:
        text = text.replace(old, new)
    return rng.choice(["请问，", "考题：", ""]) + text


def kinds(items, rows):
    detector = Detector(items)
    detector.scan((f"row {i}", text) for i, text in enumerate(rows))
    return [match.kind for match in detector.results()]


def noise(rng, count=40):
    return [text for text in rng.sample(sorted(sample_texts()), count) if text]


def test_exact_copies_are_found_whatever_their_width_marks_and_surroundings():
    items, rng = own_items(), random.Random(0)
    wide = str.maketrans({chr(i): chr(i + 0xFEE0) for i in range(0x21, 0x7F)})
    rows = []
    for number, item in enumerate(items):
        text = as_text(item, item.options, rng.choice(["{} {}", "({}) {}.", "{}、{};"]))
        rows.append("前文。" * 200 + (text.translate(wide) if number % 2 else text) + "后文。" * 50)
    assert kinds(items, rows + noise(rng)) == ["exact"] * len(items)


def test_the_shortest_questions_are_found_as_printed_and_else_not_judged():
    item = SoughtItem("1", "脉会是", ("大杼", "绝骨", "太渊", "膈俞"), ("太渊",))
    assert kinds([item], [as_text(item, item.options, "({})、{}")]) == ["exact"]
    assert kinds([item], ["太渊为脉会。"]) == ["unknown"]
    assert kinds([SoughtItem("1", "发热怎么办？")], ["发热怎么办？多喝水。"]) == ["unknown"]


def test_reordered_options_are_found():
    items, rng = own_items(), random.Random(1)
    found = kinds(items, [as_text(item, item.options[::-1]) for item in items] + noise(rng))
    assert found == ["reordered"] * len(items)


def test_reworded_questions_are_found():
    items, rng = own_items(), random.Random(2)
    rows = [as_text(i, [reword(o, rng) for o in rng.sample(i.options, len(i.options))], "{}. {}") for i in items]
    rows = [reword(row, rng) for row in rows]
    changed = [row for row, item in zip(rows, items, strict=True) if item.question not in row]
    found = kinds(items, rows + noise(rng))
    assert len(changed) > 25
    assert sum(kind != "clean" for kind in found) >= 0.8 * len(items)


def test_a_question_with_its_answer_and_no_options_is_found():
    item = SoughtItem("1", "诊断慢性阻塞性肺疾病的必备检查是", ("肺功能检查", "胸部CT", "痰培养"), ("肺功能检查",))
    assert kinds([item], ["问：诊断慢性阻塞性肺疾病的必备检查是？答：肺功能检查。"]) == ["question"]
    assert kinds([item], ["诊断慢性阻塞性肺疾病的必备检查是什么，请参考指南"]) == ["clean"]


def test_texts_on_the_same_subjects_are_clean():
    assert set(kinds(own_items(), sorted(sample_texts()))) == {"clean"}


def test_the_share_of_thirteen_grams_is_that_of_one_row():
    item = SoughtItem("1", "".join(chr(0x4E00 + i) for i in range(30)))  # 18 grams
    detector = Detector([item])
    first, second = item.question[:20], item.question[10:]
    detector.scan([("a", first), ("b", second)])
    [match] = detector.results()
    assert match.grams == pytest.approx(8 / 18, abs=1e-4)  # 20 characters hold 8 grams, the two rows are not added up
    detector.scan([("c", item.question)])
    assert detector.results()[0].grams == 1 and detector.results()[0].where == "c"


def test_hashes_of_grams_depend_on_the_gram_alone():
    codes = to_codes("高血压患者应当低盐饮食按时服药定期测量血压")
    for n in (1, 2, 3, 4, 5, 8, 13):
        whole = hash_grams(codes, n)
        assert len(whole) == len(codes) - n + 1
        for i in (0, 3, len(whole) - 1):
            assert whole[i] == hash_grams(codes[i : i + n], n)[0]
    assert len(np.unique(hash_grams(np.arange(1, 200_000, dtype=np.uint32), 13))) == 200_000 - 13
    assert len(hash_grams(codes[:5], 8)) == 0


def test_sorting_finds_what_numpy_finds_unique():
    for values in ([], [3], [5, 1, 5, 2, 1], [0, 2**64 - 1, 0]):
        hashes = np.array(values, dtype=np.uint64)
        assert np.array_equal(sorted_unique(hashes), np.unique(hashes))


def test_letters_and_digits_are_what_is_compared():
    assert to_text(to_codes("高血压（ＡＢＣ），５㎎/d…①é㎍！")) == "高血压abc5mgd1eμg"
    assert to_text(to_codes("㎎a㎎\0b")) == "mgamg\0b"
    assert len(to_codes("，。 \n")) == 0


def rows_of(texts):
    return [{"text": text, "where": f"row {i}"} for i, text in enumerate(texts)]


def build_sketch(texts, **settings):
    builder = SketchBuilder(**settings)
    builder.add(rows_of(texts))
    return builder.finish()


def test_a_sketch_stands_for_its_data(tmp_path):
    items = own_items()
    rows = [as_text(item, item.options[::-1]) for item in items[:20]] + sorted(sample_texts())
    sketch = build_sketch(rows)
    write_sketch(tmp_path / "sketch.safetensors", sketch)
    again = load_sketch(tmp_path / "sketch.safetensors")
    assert np.array_equal(again.grams, sketch.grams) and again[1:] == sketch[1:]
    assert (again.rows, again.characters) == (len(rows), sum(map(len, rows))) and again.complete
    found = [match.kind for match in check_sketch(items, again)]
    long = [len(to_codes(item.question)) >= 17 for item in items]  # five 13-grams
    assert sum(long[:20]) >= 5
    assert all(kind == "grams" for kind, enough in zip(found[:20], long, strict=False) if enough)
    assert "grams" not in found[20:]


def test_a_sketch_holds_the_grams_of_each_row_and_none_across_two():
    rows = ["高血压患者应当低盐饮食按时服药定期测量血压", "短", "", "糖尿病的典型症状是多饮、多食、多尿和体重下降。"]
    alone = np.concatenate([hash_grams(to_codes(row), 13) for row in rows])
    expected = np.unique(alone >> np.uint64(32)).astype(np.uint32)
    assert np.array_equal(build_sketch(rows).grams, expected)
    in_two = SketchBuilder()
    for row in rows_of(rows):
        in_two.add([row])
    assert np.array_equal(in_two.finish().grams, expected)


def test_a_sketch_is_made_of_the_rows_that_a_stage_trains_on(tmp_path):
    item = own_items()[2]
    file = tmp_path / "train.jsonl"
    row = {"question": item.question + "".join(item.options), "answer": "见书。"}
    file.write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    builder = SketchBuilder()
    builder.add(load_rows(str(file), "conversation"))
    sketch = builder.finish()
    assert sketch.rows == 1 and check_sketch([item], sketch)[0].grams == 1
    where = SoughtItem("2", str(file) + str(file))
    assert check_sketch([where], sketch)[0].grams == 0


def test_a_sketch_of_much_data_keeps_a_fixed_share():
    rng = random.Random(0)
    rows = ["".join(chr(0x4E00 + rng.randrange(20_000)) for _ in range(500)) for _ in range(100)]
    whole, small = build_sketch(rows), build_sketch(rows, most=5_000)
    assert whole.complete and len(whole.grams) == 100 * 488 and 2_000 < len(small.grams) <= 5_000
    assert small.limit == 2**60 - 1  # of 48,800 grams a sixteenth
    hashes = np.concatenate([hash_grams(to_codes(row), 13) for row in rows])
    kept = hashes[hashes <= small.limit] >> np.uint64(28)
    assert np.array_equal(small.grams, np.unique(kept).astype(np.uint32))
    seen = [SoughtItem(str(i), row[100:300]) for i, row in enumerate(rows[:50])]
    found = [match.kind for match in check_sketch(seen, small)]
    assert set(found) <= {"grams", "unknown"} and found.count("grams") > 40  # few of a text's grams may be kept
    unseen = [SoughtItem("x", row[::-1][100:300]) for row in rows[:50]]
    assert {match.kind for match in check_sketch(unseen, small)} <= {"clean", "unknown"}


def test_a_flipped_bit_in_any_byte_of_a_sketch_is_found(tmp_path):
    path = tmp_path / FILE
    write_sketch(path, build_sketch(["患者男性，四十二岁，咳嗽三天。"]))
    for byte in range(path.stat().st_size):
        bit = 8 * byte + byte % 8
        flip(path, bit)
        with pytest.raises(ValueError, match=r"--sketch .*(SHA-256|found no sketch)"):
            load_sketch(path)
        flip(path, bit)
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(ValueError, match="found no sketch"):
        load_sketch(path)


def test_a_sketch_of_the_version_without_a_hash_is_read(tmp_path):
    sketch = build_sketch(["患者男性，四十二岁，咳嗽三天。"])
    values = {"version": 1, "ngram": 13, "limit": sketch.limit, "rows": 1, "characters": sketch.characters}
    save_file({"grams": sketch.grams}, tmp_path / FILE, {key: str(value) for key, value in values.items()})
    assert np.array_equal(load_sketch(tmp_path / FILE).grams, sketch.grams)


def test_a_file_that_is_no_sketch_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="found no sketch"):
        load_sketch(tmp_path / "x")


def stage_folder(path, texts=(), **record):
    path.mkdir()
    if texts:
        write_sketch(path / FILE, build_sketch(texts))
    for name, value in record.items():
        (path / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return str(path)


def test_the_sketches_of_a_model_are_those_of_all_its_trainings(tmp_path):
    base = stage_folder(tmp_path / "base")
    pt = stage_folder(tmp_path / "pt", ["甲" * 20], run={"lineage": [{"path": base}]})
    sft = stage_folder(tmp_path / "sft", ["乙" * 20], run={"lineage": [{"path": base}, {"path": pt}]})
    merged = stage_folder(tmp_path / "merged", merge={"adapters": [{"path": pt}, {"path": sft}]})
    for start in (sft, merged):
        files, unknown = find_sketches(start)
        assert [file.parent.name for file in files] == ["sft", "pt"]
        assert unknown == [f"{base}: has no sketch; what it was trained on is not known"]
    assert find_sketches(f"{sft}/{FILE}") == ([tmp_path / "sft" / FILE], [])
    with pytest.raises(ValueError, match="--sketch .*base: found none"):
        find_sketches(base)
    save_file({"w": np.ones(4, dtype=np.float32)}, tmp_path / "pt" / "model.safetensors")
    (tmp_path / "sft" / "run.json").write_text(json.dumps({"lineage": [{"path": pt, "fingerprint": "another"}]}))
    files, unknown = find_sketches(sft)
    assert len(files) == 1 and "pt: has changed since it was gone on from" in unknown[0]

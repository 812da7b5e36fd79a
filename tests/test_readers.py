"""Files -> raw records -> canonical rows: encodings, formats, and one clear line for every kind of bad input."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from suwen import readers
from suwen.data_report import Report
from suwen.formats import canonical_rows, parse_columns
from suwen.loading import load_rows

USER = {"role": "user", "content": "头痛怎么办？"}
ANSWER = {"role": "assistant", "content": "多休息，必要时就医。"}
PAIR = [USER, ANSWER]


def write(path: Path, content: str | bytes, encoding: str = "utf-8") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return str(path)


def json_lines(*rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def rows_of(path, schema="conversation", **options) -> list[dict]:
    return list(load_rows(str(path), schema, **options))


def texts_of(path, **options) -> list[str]:
    return [row["text"] for row in rows_of(path, "text", **options)]


def messages_of(row: dict, columns: str | None = None) -> list[list[dict]]:
    return [new["messages"] for new in canonical_rows(row, "conversation", parse_columns(columns), Counter())]


def pair_of(row: dict, columns: str | None = None) -> dict:
    (pair,) = canonical_rows(row, "preference", parse_columns(columns), Counter())
    return pair


# ---------------------------------------------------------------------------------------------------------- encodings


@pytest.mark.parametrize(
    "encoding, label",
    [("utf-8", "UTF-8"), ("utf-8-sig", "UTF-8 with BOM"), ("gb18030", "GB18030"), ("utf-16", "UTF-16")],
)
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_every_known_encoding_gives_the_same_text_and_is_reported(tmp_path, encoding, label, ends):
    lines = ["高血压是常见的慢性病。", "糖尿病患者应当控制血糖，𠮷林。"]
    path = write(tmp_path / "a.txt", ends.join(lines), encoding)
    report = Report()
    assert [row["text"] for row in load_rows(path, "text", report=report)] == lines
    assert report.encodings == {path: label + (", CRLF" if ends == "\r\n" else "")}


def test_a_character_cut_by_the_chunk_border_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 4)
    for encoding in ("utf-8", "utf-8-sig", "gb18030", "utf-16"):
        path = write(tmp_path / f"{encoding}.txt", "高血压\n是常见的慢性病", encoding)
        assert texts_of(path) == ["高血压", "是常见的慢性病"]


def test_gzip_is_read_as_the_file_inside(tmp_path):
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(json_lines({"text": "艾滋病"}).encode("gb18030")))
    assert texts_of(path) == ["艾滋病"]
    with pytest.raises(ValueError, match="b.txt.gz: broken gzip file"):
        texts_of(write(tmp_path / "b.txt.gz", b"not gzip"))
    with pytest.raises(ValueError, match="c.txt.gz: broken gzip file"):
        texts_of(write(tmp_path / "c.txt.gz", gzip.compress(b"abc" * 1000)[:-9]))


def test_utf8_with_a_broken_byte_is_not_taken_for_gb18030(tmp_path):
    good = "高血压是常见的慢性病。\n".encode()
    path = write(tmp_path / "a.txt", good + b"\xff\n" + good)
    with pytest.raises(ValueError, match=rf"a.txt: line 2: byte 0xff at offset {len(good)}; expected valid UTF-8"):
        texts_of(path)
    report = Report()
    assert len(texts_of(path, on_bad_rows="skip", report=report)) == 2
    assert report.rows_refused == {"undecodable bytes": 1}


@pytest.mark.parametrize("codec", ["utf-8-sig", "gb18030"])
def test_the_place_of_a_broken_byte_is_counted_from_the_start_of_the_file(tmp_path, monkeypatch, codec):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 1024)
    good = ("高血压是常见的慢性病。\n" * 100).encode(codec)
    path = write(tmp_path / "a.txt", good + b"\xff\xff")
    with pytest.raises(ValueError, match=f"line 101: byte 0xff at offset {len(good)}"):
        texts_of(path)


def test_bytes_in_no_known_encoding_are_refused_with_their_place(tmp_path):
    with pytest.raises(ValueError, match=r"a.txt: not UTF-8 \(line 1.* nor GB18030 \(line 2: byte 0xff at offset 3\)"):
        texts_of(write(tmp_path / "a.txt", b"\xb8\xdf\n\xff\xff"))
    with pytest.raises(ValueError, match="b.txt, line 2: zero byte at offset 5, not a text file"):
        texts_of(write(tmp_path / "b.txt", b"\x89PNG\n\0\0"))


def test_half_a_character_as_a_json_escape_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "\\u9ad8"}\n{"text": "\\ud83d"}\n')
    with pytest.raises(ValueError, match="a.jsonl, line 2: bytes in no known encoding, or half a character"):
        texts_of(path)
    path = write(tmp_path / "a.json", '["\\u9ad8", "\\ud83d"]')
    with pytest.raises(ValueError, match="a.json, line 1, row 2: bytes in no known encoding"):
        texts_of(path)


# --------------------------------------------------------------------------------------------------------- containers


def test_folders_are_read_in_order_with_their_sub_folders_and_formats_may_mix(tmp_path):
    write(tmp_path / "d" / "b" / "2.txt", "二\n\n  三  \n")
    write(tmp_path / "d" / "a.jsonl", json_lines({"text": "一"}))
    write(tmp_path / "d" / ".hidden.txt", "x")
    write(tmp_path / "d" / "notes.md", "x")
    assert texts_of(tmp_path / "d") == ["一", "二", "三"]
    assert texts_of(f"{tmp_path}/d/*.jsonl,{tmp_path}/d/b") == ["一", "二", "三"]
    assert readers.parse_sources(str(tmp_path / "d"))[0].ignored == (tmp_path / "d" / "notes.md",)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("chunk", [3, 50, 1 << 20])
def test_json_lists_are_streamed_whatever_their_layout(tmp_path, monkeypatch, indent, chunk):
    monkeypatch.setattr(readers, "CHUNK_BYTES", chunk)
    items = ["肺炎" * 40, {"text": 'a ] } \\ " ,'}, {"text": "哮喘\n" * 30, "n": [1, [2.5, None, 12345]]}]
    path = write(tmp_path / "a.json", json.dumps(items, ensure_ascii=False, indent=indent))
    assert texts_of(path) == [items[0], items[1]["text"], items[2]["text"]]


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_file_may_hold_lines_an_object_of_rows_or_one_row(tmp_path, indent):
    rows = [{"text": "一"}, {"text": "二"}]
    contents = [
        "\n".join(json.dumps(row, indent=indent) for row in rows),
        json.dumps({"1": rows[0], "2": rows[1]}, indent=indent),
        json.dumps({"data": rows}, indent=indent),
        json.dumps(rows, indent=indent),
    ]
    for content in contents:
        assert texts_of(write(tmp_path / "a.json", content)) == ["一", "二"]
    assert texts_of(write(tmp_path / "a.json", json.dumps(rows[0], indent=indent))) == ["一"]
    assert texts_of(write(tmp_path / "b.jsonl", json.dumps(rows, indent=indent))) == ["一", "二"]


def test_lines_are_named_in_pretty_printed_lists(tmp_path):
    path = write(tmp_path / "a.json", json.dumps([{"text": "一"}, {"text": ""}], indent=2))
    with pytest.raises(ValueError, match="a.json, line 5, row 2: empty text: text is empty"):
        texts_of(path)


def test_tables_may_hold_line_breaks_and_any_of_three_delimiters(tmp_path):
    for number, delimiter in enumerate(",\t;"):
        lines = ['question,answer\r\n"头痛\r\n怎么办？","休息', '""就医"""\r\n咳嗽,喝水\r\n']
        text = delimiter.join(line.replace(",", delimiter) for line in lines)
        first, second = rows_of(write(tmp_path / f"{number}.csv", text, "gb18030"))
        assert [message["content"] for message in first["messages"]] == ["头痛\n怎么办？", f'休息{delimiter}"就医"']
        assert second["where"].endswith(".csv, line 4")
    assert len(rows_of(write(tmp_path / "t.tsv", "问\t答\n头痛, 发热\t休息\n"))) == 1


def test_parquet_is_read_with_its_nulls(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"messages": PAIR, "text": None}, {"messages": [*PAIR, USER, ANSWER], "text": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [row["messages"] for row in rows_of(tmp_path / "a.parquet")] == [row["messages"] for row in rows]
    with pytest.raises(ValueError, match="b.parquet: not a readable parquet file"):
        rows_of(write(tmp_path / "b.parquet", b"PAR1 but not really"))


def test_a_book_gives_one_document_a_section_with_its_wrapped_lines_joined(tmp_path):
    book = (
        "<篇名>小书\n书名：小书\n作者：某人\n\n<目录>卷一\n<篇名>卷一\n\n<目录>卷一\n<篇名>甘草\n"
        "内容：味甘，平，无 \n毒。主五脏六腑。\n坚筋骨。\n\n又名蜜草\n"
    )
    assert texts_of(write(tmp_path / "a.txt", book, "gb18030")) == [
        "小书\n书名：小书\n作者：某人",
        "卷一\n甘草\n味甘，平，无毒。主五脏六腑。\n坚筋骨。\n又名蜜草",
    ]


# ------------------------------------------------------------------------------------------------------- text formats


def test_text_comes_from_text_or_from_title_and_content(tmp_path):
    guide = [{"title": "指南", "content": "正文"}, {"title": "指南", "content": "指南\n正文"}]
    rows = [{"text": "一"}, *guide, {"content": "二"}]
    assert texts_of(write(tmp_path / "a.jsonl", json_lines(*rows))) == ["一", "指南\n正文", "指南\n正文", "二"]


# ----------------------------------------------------------------------------------------------- conversation formats

SYSTEM = {"role": "system", "content": "你是医生。"}
Q, A, S = USER["content"], ANSWER["content"], SYSTEM["content"]


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]}, PAIR),
        ({"conversations": [{"from": "user", "value": Q}, {"from": "assistant", "value": A}], "system": S},
         [SYSTEM, *PAIR]),
        ({"conversations": [{"from": "system", "value": S}, {"from": "human", "value": Q},
                            {"from": "gpt", "value": A}]}, [SYSTEM, *PAIR]),
        ({"conversation": [{"role": "patient", "content": Q}, {"role": "doctor", "content": A}]}, PAIR),
        ({"messages": [SYSTEM, *PAIR]}, [SYSTEM, *PAIR]),
        ({"messages": [{"role": "system", "content": ""}, *PAIR], "system_prompt": ""}, PAIR),
        ({"messages": [SYSTEM, *PAIR], "system": S}, [SYSTEM, *PAIR]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": Q}]}, ANSWER]}, PAIR),
        ({"messages": [USER, {**ANSWER, "reasoning_content": "想"}]}, [USER, {**ANSWER, "reasoning_content": "想"}]),
        ({"instruction": Q, "input": "", "output": A}, PAIR),
        ({"instruction": "请回答", "input": Q, "output": A, "system": S},
         [SYSTEM, {"role": "user", "content": f"请回答\n{Q}"}, ANSWER]),
        ({"instruction": Q, "output": A, "history": [["在吗", "在"]]},
         [{"role": "user", "content": "在吗"}, {"role": "assistant", "content": "在"}, *PAIR]),
        ({"instruction": Q, "output": A, "history": None}, PAIR),
        ({"instruction": f" <user>: 在吗 <bot>: 在 <user>: {Q}", "input": "", "output": A},
         [{"role": "user", "content": "在吗"}, {"role": "assistant", "content": "在"}, *PAIR]),
        ({"instruct": Q, "output": A}, PAIR),
        ({"input": Q, "target": A, "answer_choices": ["x"]}, PAIR),
        ({"question": Q, "answer": A}, PAIR),
        ({"questions": Q, "answers": A}, PAIR),
        ({"questions": [[Q]], "answers": [A]}, PAIR),
        ({"prompt": Q, "completion": A}, PAIR),
        ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, [SYSTEM, *PAIR]),
        ({"department": "内科", "title": "头痛", "ask": Q, "answer": A}, PAIR),
        ({"title": "求助", "ask": Q, "answer": A}, [{"role": "user", "content": f"求助\n{Q}"}, ANSWER]),
        ({"title": Q, "ask": "无", "answer": A}, PAIR),
        ({"问": Q, "答": A}, PAIR),
        ({"Question": Q, "Complex_CoT": "想", "Response": A}, [USER, {**ANSWER, "reasoning_content": "想"}]),
        ({"question": Q, "answer": f"<think>\n想\n</think>\n\n{A}"}, [USER, {**ANSWER, "reasoning_content": "想"}]),
        ({"question": Q, "answer": f"<think>\n\n</think>\n\n{A}"}, PAIR),
    ],
)  # fmt: skip
def test_a_conversation_is_recognised_by_its_keys(row, expected):
    assert messages_of(row) == [expected]


def test_several_wordings_of_a_question_give_a_row_each():
    assert messages_of({"questions": [["甲", "乙"]], "answers": [A]}) == [
        [{"role": "user", "content": wording}, ANSWER] for wording in ("甲", "乙")
    ]


def test_a_recorded_dialogue_takes_turns_from_the_patients_first_word():
    spoken = "医生你好 医生请讲 患者头痛 患者 患者发热 医生多久了？ 患者两天 医生休息 患者谢谢".split(" ")
    row = {"dialogue-content": [{"speaker": words[:2], "sentence": words[2:], "label": "O"} for words in spoken]}
    changes = Counter()
    (new,) = canonical_rows(row, "conversation", {}, changes)
    assert [message["content"] for message in new["messages"]] == ["头痛\n发热", "多久了？", "两天", "休息"]
    assert changes == {
        "empty sentences of dialogues left out": 1,
        "sentences of one speaker joined": 2,
        "first turn of the doctor left out": 1,
        "last user turn without answer left out": 1,
    }


def test_columns_name_the_parts_of_any_other_table(tmp_path):
    assert messages_of({"主诉": Q, "建议": A, "text": "别的"}, "prompt=主诉,response=建议") == [PAIR]
    assert messages_of({"a": Q, "b": A, "c": S}, "prompt=a,response=b,system=c") == [[SYSTEM, *PAIR]]
    assert pair_of({"x": Q, "y": A, "z": "无"}, "prompt=x,chosen=y,rejected=z")["rejected"][0]["content"] == "无"
    assert canonical_rows({"body": "一"}, "text", {"text": "body"}, Counter()) == [{"text": "一"}]
    path = write(tmp_path / "a.csv", f"ask,answer\n{Q},{A}\n")
    with pytest.raises(ValueError, match=r"--columns prompt=aks,response=answer: no row has .* found answer, ask"):
        rows_of(path, columns="prompt=aks,response=answer")
    with pytest.raises(ValueError, match="--columns: found 'foo=bar', expected pairs such as"):
        rows_of(path, columns="foo=bar")


def test_keys_that_are_not_used_are_reported(tmp_path):
    rows = [{"question": Q, "answer": A, "cate": "内科"}, {"Question": Q, "Response": A, "id": 1}]
    report = Report()
    rows_of(write(tmp_path / "a.jsonl", json_lines(*rows)), report=report)
    assert report.keys_left_aside == ["cate", "id"] and "  keys left aside: cate, id" in report.lines()
    rows_of(write(tmp_path / "b.csv", f"ask,answer,c\n{Q},x,{A}\n"), columns="prompt=ask,response=c", report=report)
    assert report.keys_left_aside == ["answer", "cate", "id"]


# ------------------------------------------------------------------------------------------------- preference formats

BAD = {"role": "assistant", "content": "不知道。"}
B = BAD["content"]


@pytest.mark.parametrize(
    "row, prompt",
    [
        ({"conversations": [{"from": "human", "value": Q}], "chosen": A, "rejected": B}, [USER]),
        ({"conversations": [{"from": "human", "value": Q}], "chosen": {"from": "gpt", "value": A},
          "rejected": {"from": "gpt", "value": B}}, [USER]),
        ({"question": Q, "response_chosen": A, "response_rejected": B}, [USER]),
        ({"system": S, "history": [["", ""]], "question": Q, "response_chosen": A, "response_rejected": B},
         [SYSTEM, USER]),
        ({"prompt": Q, "chosen": A, "rejected": B}, [USER]),
        ({"prompt": [SYSTEM, USER], "chosen": [ANSWER], "rejected": [BAD]}, [SYSTEM, USER]),
        ({"prompt": [*PAIR, USER], "chosen": A, "rejected": B}, [*PAIR, USER]),
        ({"prompt": Q, "chosen": [USER, ANSWER], "rejected": [USER, BAD]}, [USER]),
        ({"chosen": [SYSTEM, USER, ANSWER], "rejected": [SYSTEM, USER, BAD]}, [SYSTEM, USER]),
        ({"chosen": [*PAIR, USER, ANSWER], "rejected": [*PAIR, USER, BAD]}, [*PAIR, USER]),
        ({"instruction": "答", "input": Q, "chosen": A, "rejected": B}, [{"role": "user", "content": f"答\n{Q}"}]),
    ],
)  # fmt: skip
def test_a_preference_pair_is_recognised_by_its_keys(row, prompt):
    assert pair_of(row) == {"messages": prompt, "chosen": [ANSWER], "rejected": [BAD]}


def test_the_margin_is_kept_or_taken_from_the_scores():
    assert pair_of({"prompt": Q, "chosen": A, "rejected": B, "chosen_score": 9.0, "rejected_score": 2})["margin"] == 7
    assert pair_of({"prompt": Q, "chosen": A, "rejected": B, "margin": 0.5})["margin"] == 0.5
    assert "margin" not in pair_of({"prompt": Q, "chosen": A, "rejected": B, "chosen_score": 9.0})


# ---------------------------------------------------------------------------------------------------------- bad input

GOOD_LINE = json.dumps({"question": Q, "answer": A}, ensure_ascii=False)


@pytest.mark.parametrize(
    "row, reason, message",
    [
        ('{"question": "头痛"', "invalid JSON", "invalid JSON (Expecting ',' delimiter"),
        ({"question": Q}, "row without an answer", "found keys question, expected a conversation"),
        ({"question": Q, "answer": ""}, "row without an answer", "answer is empty"),
        ({"question": Q, "answer": None}, "row without an answer", "expected a conversation"),
        ({"question": Q, "answer": 3}, "value is not text", "answer is a number"),
        ({"question": " ", "answer": A}, "row without a question", "question is empty"),
        ({"question": Q, "answer": "<think>想</think>"}, "row without an answer", "after </think> is empty"),
        ({"question": Q, "answer": "<think>想"}, "thinking never closed", "<think> without </think>"),
        ({"questions": [Q], "answers": [A, B]}, "several answers", "answers is a list of 2"),
        ({"question": Q, "options": "A 甲", "answer": "A"}, "exam question with options", "the options would be lost"),
        ({"messages": None}, "null value", "messages is null"),
        ({"messages": []}, "empty turn", "messages is an empty list"),
        ({"messages": "头痛"}, "empty turn", "messages is text, expected a list of turns"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "empty turn", "messages, turn 2 is empty"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "empty turn", "messages, turn 2 is null"),
        ({"messages": [USER, {"role": "assistant"}]}, "empty turn", "messages, turn 2 is null"),
        ({"messages": [USER, USER, ANSWER]}, "roles out of order", "message 2 is from 'user', expected 'assistant'"),
        ({"messages": [ANSWER, USER]}, "roles out of order", "message 1 is from 'assistant', expected 'user'"),
        ({"messages": [*PAIR, SYSTEM]}, "roles out of order", "message 3 is from 'system', expected 'user'"),
        ({"messages": [USER]}, "row without an answer", "found turns: 1"),
        ({"messages": [SYSTEM]}, "row without an answer", "found turns: 0"),
        ({"messages": [USER, {"role": "tool", "content": "x"}]}, "unknown role", "turn 2 is from 'tool'"),
        ({"messages": ["头痛"]}, "value is not text", "messages, turn 1 is text, expected an object"),
        ({"instruction": Q, "output": A, "history": [["在吗"]]}, "value is not text", "history turn 1"),
        ({"text": "一"}, "wrong schema", "found keys text, expected a conversation: conversations, messages"),
        ({"prompt": Q, "chosen": A, "rejected": B}, "wrong schema", "found a preference pair"),
        ({}, "wrong schema", "found no keys"),
        (["头痛"], "wrong schema", "found a list"),
        ("null", "wrong schema", "found null"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line_or_skipped_and_counted(tmp_path, row, reason, message):
    line = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)
    path = write(tmp_path / "x.jsonl", f"{GOOD_LINE}\n\n{line}\n{GOOD_LINE}\n")
    with pytest.raises(ValueError) as caught:
        rows_of(path)
    assert str(caught.value).startswith(f"{path}, line 3: {reason}")
    assert message in str(caught.value)
    report, rejected = Report(), tmp_path / "out" / "rejected_rows.jsonl"
    assert len(rows_of(path, on_bad_rows="skip", report=report, rejected_file=rejected)) == 2
    assert report.rows_refused == {reason: 1} and report.rows_read == 3
    (written,) = [json.loads(line) for line in rejected.read_text("utf-8").splitlines()]
    assert written["where"] == f"{path}, line 3" and written["reason"] == reason
    assert written["row"] == (row if not isinstance(row, str) or reason == "invalid JSON" else None)


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"prompt": Q, "chosen": A, "rejected": A + "\n"}, "chosen equals rejected"),
        ({"prompt": Q, "chosen": A, "rejected": ""}, "row without an answer"),
        ({"prompt": Q, "chosen": A}, "row without an answer"),
        ({"prompt": Q, "chosen": A, "rejected": None}, "row without an answer"),
        ({"prompt": "", "chosen": A, "rejected": B}, "row without a question"),
        ({"chosen": A, "rejected": B}, "row without a question"),
        ({"prompt": PAIR, "chosen": A, "rejected": B}, "row without a question"),
        ({"prompt": Q, "chosen": [ANSWER, USER, ANSWER], "rejected": [BAD]}, "roles out of order"),
        ({"prompt": Q, "chosen": 1, "rejected": B}, "value is not text"),
        ({"prompt": Q, "chosen": A, "rejected": B, "score_chosen": 1, "score_rejected": 2}, "chosen scored below"),
        ({"prompt": Q, "chosen": A, "rejected": B, "margin": "big"}, "margin is not a number"),
        ({"question": Q, "answer": A}, "wrong schema"),
        ({"messages": PAIR}, "wrong schema"),
        ({"text": "一"}, "wrong schema"),
    ],
)
def test_a_bad_preference_pair_is_refused(tmp_path, row, reason):
    path = write(tmp_path / "x.jsonl", json_lines(row))
    with pytest.raises(ValueError, match=f"x.jsonl, line 1: {reason}"):
        rows_of(path, "preference")


@pytest.mark.parametrize("row", [{"messages": PAIR}, {"question": Q, "answer": A}, {"chosen": A, "rejected": B}])
def test_other_schemas_are_refused_as_text(tmp_path, row):
    path = write(tmp_path / "x.jsonl", json_lines(row))
    with pytest.raises(ValueError, match="x.jsonl, line 1: wrong schema: found keys .*, expected text: a .txt line"):
        rows_of(path, "text")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", "", "a.txt: empty file, expected at least one row"),
        ("a.jsonl", "\n \n", "a.jsonl: empty file"),
        ("a.json", "[]", "a.json: empty file"),
        ("a.csv", "question,answer\n", "a.csv: empty file"),
        ("a.json", '[{"question": "头痛"},\n {"question" "咳嗽"}]', "a.json, line 1, row 1: row without an answer"),
        ("a.json", '[\n' + GOOD_LINE + ',\n {"question" "咳嗽"}]', "a.json, line 3: invalid JSON (Expecting ':' del"),
        ("a.json", '[\n' + GOOD_LINE + "\n" + GOOD_LINE + "]", "a.json, line 3: invalid JSON (expected ',' or ']')"),
        ("a.json", '[\n' + GOOD_LINE, "a.json, line 2: invalid JSON (expected ',' or ']')"),
        ("a.json", '[' + GOOD_LINE + "]\n" + GOOD_LINE, "a.json, line 2: invalid JSON (text after the end"),
        ("a.json", '{\n"question": "头痛",\n"answer" "休息"}', "a.json, line 3: invalid JSON"),
        ("a.csv", 'question,answer\n头痛,休息,多余\n', "a.csv, line 2: found 3 cells, expected 2 as in the header"),
        ("a.csv", 'question,answer\n头痛,"休息\n咳嗽,喝水\n', "a.csv, line 2: unexpected end of data (read up"),
        ("a.csv", 'question,answer,answer\n', "a.csv, line 1: column 'answer' twice"),
        ("a.csv", 'question,answer\n头痛,\n', "a.csv, line 2: row without an answer: answer is empty"),
        ("a.txt", '头痛\n', "a.txt, line 1: wrong schema: found plain text, expected a conversation"),
    ],
)  # fmt: skip
def test_a_bad_file_gives_one_line_that_names_the_place(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError) as caught:
        rows_of(path)
    assert str(tmp_path / message.split(":")[0].split(",")[0]) in str(caught.value)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_rest_of_a_broken_list_is_reported_as_not_read(tmp_path):
    path = write(tmp_path / "a.json", f"[{GOOD_LINE}, {GOOD_LINE}, oops, {GOOD_LINE}]")
    report = Report()
    assert len(rows_of(path, on_bad_rows="skip", report=report)) == 2
    assert report.rows_refused == {"invalid JSON, rest of the file not read": 1}


def test_a_missing_or_empty_source_is_named_with_its_flag(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="--train_file_dir: .*nowhere not found, expected a file, a folder"):
        rows_of(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="--train_file_dir: no data file in .*empty, expected files ending in .jsonl"):
        rows_of(tmp_path / "empty")
    with pytest.raises(ValueError, match="a.docx is of no known kind"):
        rows_of(write(tmp_path / "a.docx", "x"))
    with pytest.raises(ValueError, match="no usable row .*1 x row without an answer"):
        rows_of(write(tmp_path / "a.jsonl", json_lines({"question": Q})), on_bad_rows="skip")


def test_a_weight_follows_the_last_colon_unless_the_path_exists_so(tmp_path):
    write(tmp_path / "a" / "1.txt", "一")
    write(tmp_path / "b:2" / "1.txt", "一")
    write(tmp_path / "c,d" / "1.txt", "一")
    sources = readers.parse_sources(f"{tmp_path}/a:0.3, {tmp_path}/b:2,{tmp_path}/b:2:0.5")
    assert [(Path(source.path).name, source.weight) for source in sources] == [("a", 0.3), ("b:2", 1.0), ("b:2", 0.5)]
    assert readers.parse_sources(f"{tmp_path}/c,d")[0].weight == 1
    for weight in ("0", "-1", "nan", "abc", ""):
        with pytest.raises(ValueError, match=f"weight of .*a is {weight}, expected a number above 0"):
            readers.parse_sources(f"{tmp_path}/a:{weight}")

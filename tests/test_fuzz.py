"""What strangers can send: files, rows, answers and requests of any shape give a result or a documented error.

Each check is a property over generated input. The normal run draws few examples, the same each time; `-m slow` draws
thousands, new ones each time, and prints how to repeat what it finds.
"""

import asyncio
import csv
import gzip
import io
import json
import math
import re
import signal
import tempfile
from collections import Counter
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import tiny_model, tiny_tokenizer

from suwen import formats, red_flags
from suwen.benchmarks import TASKS
from suwen.benchmarks.extraction import REASONS, extract_choice
from suwen.benchmarks.task import BadRow
from suwen.data_report import Report
from suwen.encoding import IGNORE_INDEX, ChatEncoder
from suwen.formats import SCHEMAS, canonical_rows, parse_columns
from suwen.graph_readers import load_graph
from suwen.knowledge_graph import Graph
from suwen.loading import load_rows
from suwen.personal_data import mask_personal_data
from suwen.prompts import parse_prompt
from suwen.questions import OPTION_KEYS, prompt_rows
from suwen.readers import SUFFIXES, Refusal, find_encoding, parse_sources, read_records
from suwen.retrieval.documents import DOCUMENT_SUFFIXES, OFFICE_KINDS, read_sections
from suwen.retrieval.grounding import check_citations
from suwen.retrieval.passages import Section, cut_passages
from template import TEMPLATES

HANG_SECONDS = 60
CHECKS = []  # (property, its strategies)


@contextmanager
def no_hang():
    """Ends an example that takes a minute."""

    def stop(*_):
        raise TimeoutError(f"no end within {HANG_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANG_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check(*strategies):
    def register(function):
        @wraps(function)
        def timed(*values, **named):
            with no_hang():
                function(*values, **named)

        CHECKS.append((timed, strategies))
        return function

    return register


def draw(function, strategies, **profile) -> None:
    healthy = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    profile = {"deadline": None, "database": None, "suppress_health_check": healthy, **profile}
    settings(**profile)(given(*strategies)(function))()


# What is drawn

WORDS = (
    *("高血压", "患者", "没有胸痛", "答案：C", "故选 AB", "A. 头痛", "\nB. 发热", "选A", "\\boxed{B}", "The answer is"),
    *("<think>", "</think>", "<|im_start|>", "<|im_end|>", "</s>", "<s>", "{{", "%}", "[1]", "[资料1-9]", "<篇名>"),
    *(
        "<目录>",
        "【适应症】",
        "\\n",
        "\\u0041",
        "13812345678",
        "姓名：张三",
        "自杀",
        "\ufeff",
        "\u3000",
        "\x00",
        "\x1c",
    ),
    *("\u2028", "\U0001f600", "ＡＢ", "①", '"', "'", ",", "\t", "9" * 20, "NaN", "1e400", "-", "=", ":", "、", "（"),
    *("(", "#", "\r\n", "\n", " ", "A", "B", "(A)", "null", "true"),
)
text = st.one_of(st.lists(st.sampled_from(WORDS), max_size=12).map("".join), st.text(max_size=40))
broken_text = st.one_of(text, st.text(st.characters(), max_size=10))  # with lone surrogates
KEYS = (
    *formats.KNOWN_KEYS,
    *OPTION_KEYS,
    "role",
    "from",
    "value",
    "speaker",
    "a",
    "b",
    "c",
    "d",
    "answer_idx",
    "explanation",
    "head",
    "relation",
    "tail",
    "source",
    "type",
    "target",
    "id",
    "name",
    "label",
    "symptom",
    "drug",
    "department",
    "alias",
    "facts",
    "statement",
    "group",
    "item",
    "prompt",
    "question_type",
    "fact",
    "object",
    "subject",
    "predicate",
    "reference",
)
number = st.one_of(st.integers(), st.floats(), st.just(10**400))
turn = st.fixed_dictionaries(
    {"role": st.sampled_from(("user", "assistant", "system", "患者", "x"))},
    optional={"content": text, "value": text, "sentence": text, "from": st.sampled_from(("human", "gpt", "patient"))},
)
value = st.recursive(
    st.one_of(st.none(), st.booleans(), number, broken_text),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(turn, max_size=5),
        st.dictionaries(st.one_of(st.sampled_from(KEYS), text), inner, max_size=5),
    ),
    max_leaves=12,
)
row = st.one_of(
    st.dictionaries(st.one_of(st.sampled_from(KEYS), text), value, max_size=6),
    st.fixed_dictionaries({"conversations": st.lists(turn, max_size=6)}),
    st.fixed_dictionaries(
        {"question": text, "answer": st.one_of(text, st.sampled_from("ABCDE"))},
        optional={
            "options": st.one_of(value, st.dictionaries(st.sampled_from("ABCDEFab"), text, max_size=5)),
            "A": text,
        },
    ),
)
encodings = st.sampled_from(("utf-8", "utf-8-sig", "gb18030", "utf-16"))


def to_json(content) -> str:
    return json.dumps(content, ensure_ascii=False)


# Deep nesting, and a number longer than Python takes
HARD = (b'{"text": ' + b"9" * 5000 + b"}", b"[" * 100_000, b'{"a":' * 100_000, b'"' * 5001, b"\x1f\x8b\x08")


@st.composite
def file_bytes(draw):
    """A file of rows in some form and encoding, then perhaps damaged; or bytes of any kind."""
    rows = draw(st.lists(row, max_size=5))
    form = draw(st.sampled_from(("jsonl", "json", "text", "csv", "bytes", "hard")))
    if form == "bytes":
        return draw(st.binary(max_size=300))
    if form == "hard":
        return draw(st.sampled_from(HARD))
    if form == "csv":
        stream = io.StringIO()
        csv.writer(stream).writerows([["question", "answer", "text"], *([draw(text) for _ in range(3)] for _ in rows)])
        content = stream.getvalue()
    elif form == "text":
        content = "\n".join(draw(st.lists(text, max_size=8)))
    else:
        lines = [to_json(item) for item in rows]
        content = "\n".join(lines) if form == "jsonl" else "[" + ",\n".join(lines) + "]"
    data = bytearray(content.encode(draw(encodings), errors="replace"))
    for place, byte in draw(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 255)), max_size=2)):
        if place < len(data):
            data[place] = byte
    return bytes(data[: draw(st.integers(0, len(data)))]) if draw(st.booleans()) else bytes(data)


@contextmanager
def written(data: bytes, suffix: str):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"f{suffix}"
        file.write_bytes(gzip.compress(data) if suffix.endswith(".gz") and not data.startswith(b"\x1f") else data)
        yield file


@cache
def encoder() -> ChatEncoder:
    chatml = TEMPLATES["qwen3"]
    return ChatEncoder(tiny_tokenizer(chatml.special_tokens, chat_template=chatml.jinja))


# Files


@check(file_bytes(), st.sampled_from([suffix for suffix in SUFFIXES if suffix != ".xlsx"]))
def files_give_records_refusals_or_one_error_with_their_name(data, suffix):
    with written(data, suffix) as file:
        try:
            for record in read_records(file, find_encoding(file)):
                assert isinstance(record, Refusal) or len(record) == 2
                where = record.where if isinstance(record, Refusal) else record[0]
                assert where.startswith(str(file))
                assert not isinstance(record, Refusal) or record.message.startswith(where)
        except ValueError as error:
            assert str(file) in str(error) and not isinstance(error, UnicodeError)


@cache
def workbook() -> bytes:
    import openpyxl

    book = openpyxl.Workbook()
    for cells in (["question", "answer"], ["头痛怎么办？", "休息。"], [1, None]):
        book.active.append(cells)
    stream = io.BytesIO()
    book.save(stream)
    return stream.getvalue()


@cache
def parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    stream = io.BytesIO()
    table = pyarrow.table({"question": ["头痛怎么办？"] * 20, "answer": ["休息。"] * 20, "n": [[1, 2]] * 20})
    pyarrow.parquet.write_table(table, stream)
    return stream.getvalue()


damage = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4)


@check(st.sampled_from((".xlsx", ".parquet")), damage, st.floats(0, 1))
def damaged_tables_give_rows_or_one_error_with_their_name(suffix, changes, kept):
    data = bytearray(workbook() if suffix == ".xlsx" else parquet())
    for place, byte in changes:
        data[int(place * len(data))] = byte
    with written(bytes(data[: int(kept * len(data))] if kept < 0.5 else data), suffix) as file:
        try:
            list(read_records(file, find_encoding(file)))
        except ValueError as error:
            assert str(file) in str(error) and not isinstance(error, UnicodeError)


plain = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=20)


@check(st.lists(st.fixed_dictionaries({"question": plain, "answer": plain}), min_size=1, max_size=6), encodings,
       st.sampled_from((".jsonl", ".json", ".csv", ".jsonl.gz", ".parquet")))  # fmt: skip
def what_was_written_is_read(rows, encoding, suffix):
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        stream = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), stream)
        data = stream.getvalue()
    elif suffix == ".csv":
        rows = [{key: "x" + value for key, value in item.items()} for item in rows]
        lines = io.StringIO()
        table = csv.DictWriter(lines, ["question", "answer"])
        table.writeheader()
        table.writerows(rows)
        data = lines.getvalue().encode(encoding)
    else:
        lines = [json.dumps(item, ensure_ascii=False) for item in rows]
        data = ("[" + ",".join(lines) + "]" if suffix == ".json" else "\n".join(lines)).encode(encoding)
    with written(data, suffix) as file:
        assert [value for _, value in read_records(file, find_encoding(file))] == rows


@check(file_bytes(), st.sampled_from(SCHEMAS), st.sampled_from((".jsonl", ".csv", ".txt")))
def every_row_is_used_or_counted(data, schema, suffix):
    with written(data, suffix) as file:
        report = Report()
        try:
            rows = list(load_rows(str(file), schema, on_bad_rows="skip", report=report))
        except ValueError as error:
            assert str(file) in str(error) and not isinstance(error, UnicodeError)
            return
        assert len({row["where"] for row in rows}) + sum(report.rows_refused.values()) == report.rows_read


# Not the machine's own folders, which would be searched through
@check(broken_text.filter(lambda sources: not re.search(r"(^|,)\s*[/~.*?]", sources)))
def sources_are_found_or_refused_with_the_flag(sources):
    try:
        assert parse_sources(sources)
    except ValueError as error:
        assert str(error).startswith("--train_file_dir")


@check(broken_text)
def columns_are_pairs_or_refused_with_the_flag(columns):
    try:
        assert all(isinstance(name, str) for name in parse_columns(columns))
    except ValueError as error:
        assert str(error).startswith("--columns")


# Rows


@check(
    value.flatmap(lambda item: st.one_of(st.just(item), row)), st.sampled_from(("text", "conversation", "preference"))
)
def rows_become_canonical_or_are_refused_with_a_reason(item, schema):
    try:
        rows = canonical_rows(item, schema, {}, Counter())
    except BadRow as error:
        assert 0 < len(error.reason) < 80
        return
    for found in rows:
        if schema == "text":
            assert found["text"].strip()
            continue
        roles = [message["role"] for message in found["messages"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2) + ["user"] * (len(turns) % 2)
        assert all(message["content"].strip() for message in found["messages"])


@check(st.one_of(value, row))
def prompts_are_found_or_refused(item):
    try:
        assert all(found["messages"][-1]["role"] == "user" for found in prompt_rows(item, {}, Counter()))
    except BadRow as error:
        assert error.reason
    try:
        assert parse_prompt(item, "file, line 1")[-1]["role"] == "user"
    except ValueError as error:
        assert str(error).startswith("file, line 1")


@check(st.lists(st.one_of(row, text), min_size=1, max_size=4))
def graphs_are_read_or_refused_with_their_place(rows):
    with written("\n".join(to_json(item) for item in rows).encode(errors="replace"), ".jsonl") as file:
        try:
            graph, _ = load_graph([file])
            assert isinstance(graph, Graph) and all(fact.head in graph.entities for fact in graph.facts)
        except ValueError as error:
            assert str(file) in str(error)


@check(file_bytes(), st.sampled_from([s for s in DOCUMENT_SUFFIXES if s not in OFFICE_KINDS]))
def documents_give_passages_or_refusals_and_never_stop_an_index(data, suffix):
    with written(data, suffix) as file:
        found = list(read_sections(file, "name"))
    sections = [item for item in found if isinstance(item, Section)]
    for item in found:
        assert isinstance(item, Section) or item.where.startswith("name")
    for passage in cut_passages(sections, 50):
        assert 0 < len(passage.text) <= 100


@check(st.one_of(row, st.fixed_dictionaries({"text": text})))
def tasks_parse_rows_or_refuse_them(item):
    for task in TASKS.values():
        try:
            items = task.parse(item)
        except BadRow as error:
            assert error.reason
            continue
        for question in items:
            if "generate" in task.modes:
                assert task.ask(question).strip()


# Answers and questions

OPTIONS = {"A": "头痛", "B": "B超", "C": "维生素C", "D": "CT", "E": ""}


@check(broken_text, st.dictionaries(st.sampled_from("ABCDEFGHIJ"), text, min_size=1, max_size=6))
def extraction_gives_known_letters_and_a_reason(answer, options):
    for known in (options, OPTIONS):
        letters, reason = extract_choice(answer, known)
        assert reason in REASONS and (reason == "none") == (letters == "")
        assert set(letters) <= known.keys() and letters == "".join(sorted(set(letters)))


EXAMPLES = {
    "cmexam_official": {"question": "头痛？", "options": "A 甲\nB 乙", "answer": "A", "explanation": "因为"},
    "exam": {"question": "头痛？", "options": {"A": "甲", "B": "乙"}, "answer": "AB"},
}


@check(broken_text)
def answers_are_judged_whatever_they_are(answer):
    for name, example in EXAMPLES.items():
        task = TASKS[name]
        [item] = task.parse(example)
        record = task.judge(item, answer)
        scores = task.summarise([{**record, "target": item.target, "groups": {}, "options": item.options}])
        assert all(math.isfinite(metric["value"]) for metric in scores["metrics"].values())


@check(broken_text)
def questions_of_any_kind_are_looked_through(question):
    assert isinstance(red_flags.find_red_flags(question), list)
    assert isinstance(mask_personal_data(question), str)
    checked = check_citations(question, [])
    assert checked.cited == ()


UNITS = (
    " ",
    "A ",
    "A、",
    "答案",
    "答案 ",
    "是",
    "选",
    "没有",
    "无、",
    "有、",
    "no ",
    "a, ",
    "(",
    "[1",
    "[1-",
    "[资料",
    "。",
    "<",
    "1",
    "13",
    "1-",
    "A.\n",
    "<think>",
    "\\boxed{",
    "\\text{",
    "《",
    "胸痛",
    "、",
    "和",
    "姓名：",
    "@a.",
    "\t",
    "**",
    "#",
)


@check(
    st.lists(st.sampled_from(UNITS), min_size=1, max_size=4).map("".join),
    st.sampled_from((("", ""), ("答案", "A"), ("[1", "]"), ("A", ""))),
)
def no_pattern_runs_away_on_long_repetitions(unit, around):
    long = around[0] + unit * (8000 // len(unit)) + around[1]
    extract_choice(long, OPTIONS)
    red_flags.find_red_flags(long)
    mask_personal_data(long)
    check_citations(long, [])
    for item in (
        {"text": long},
        {"question": long, "answer": "A"},
        {"question": "x", "options": long, "answer": "A"},
    ):
        for name in ("exam", "facts"):
            try:
                TASKS[name].parse(item)
            except BadRow:
                pass
    for schema in ("text", "conversation"):
        try:
            canonical_rows({"text": long, "instruction": long, "output": long}, schema, {}, Counter())
        except BadRow:
            pass
    list(cut_passages([Section("f", "t", long)], 200))


# Templates and encoding

content = text.filter(str.strip)
conversation = st.builds(
    lambda system, pairs, last: [
        *([{"role": "system", "content": system}] if system else []),
        *(turn for q, a in pairs for turn in ({"role": "user", "content": q}, {"role": "assistant", "content": a})),
        {"role": "user", "content": last},
    ],
    st.one_of(st.none(), content),
    st.lists(st.tuples(content, content), max_size=2),
    content,
)


@cache
def rendered_by(name: str):
    template = TEMPLATES[name]
    return tiny_tokenizer(template.special_tokens, chat_template=template.jinja)


@check(conversation, content, st.sampled_from(sorted(TEMPLATES)))
def a_prompt_begins_the_text_with_its_answer(messages, answer, name):
    tokenizer = rendered_by(name)
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    whole = [*messages, {"role": "assistant", "content": answer}]
    assert tokenizer.apply_chat_template(whole, tokenize=False, enable_thinking=False).startswith(prompt)


@check(conversation, content)
def only_answers_are_trained_and_spelled_tokens_stay_text(messages, answer):
    coder = encoder()
    [start] = coder.tokenizer("<|im_start|>", add_special_tokens=False)["input_ids"]
    whole = [*messages, {"role": "assistant", "content": answer}]
    rows, counts = coder.encode_conversation(whole, 200)
    for found in rows:
        assert 0 < len(found["input_ids"]) == len(found["labels"]) <= 200
        trained = [(a, b) for a, b in zip(found["input_ids"], found["labels"], strict=True) if b != IGNORE_INDEX]
        assert trained and all(a == b for a, b in trained)
        assert start not in [a for a, _ in trained]
    rows, _ = coder.encode_conversation(whole, None)
    assert sum(row["input_ids"].count(start) for row in rows) <= sum(1 for _ in whole) * len(rows)


# The API


@cache
def app():
    from suwen.api.server import Api, Limits, ServedModel, build_app
    from suwen.batching import Batcher
    from suwen.generation_settings import GenerationSettings

    chatml = TEMPLATES["chatml"]
    tokenizer = tiny_tokenizer(chatml.special_tokens, chat_template=chatml.jinja)
    tokenizer.pad_token = tokenizer.eos_token
    batcher = Batcher(tiny_model(tokenizer))
    api = Api(
        batcher,
        {"m": ServedModel(ChatEncoder(tokenizer))},
        GenerationSettings(max_new_tokens=3),
        Limits(answer_tokens=4),
    )
    return build_app(api)


request = st.fixed_dictionaries(
    {"model": st.one_of(st.just("m"), value)},
    optional={
        "messages": st.one_of(
            conversation, st.lists(st.dictionaries(st.sampled_from(("role", "content", "x")), value)), value
        ),
        "prompt": st.one_of(text, st.lists(st.integers(-5, 700), max_size=5), value),
        "max_tokens": st.one_of(st.integers(-1, 5), value),
        "stream": st.one_of(st.booleans(), value),
        "temperature": st.one_of(st.floats(), value),
        "top_p": st.one_of(st.floats(), value),
        "top_k": st.one_of(st.integers(), value),
        "seed": st.one_of(st.integers(), value),
        "stop": value,
        "n": value,
        "repetition_penalty": st.one_of(st.floats(), value),
        "stream_options": value,
        "chat_template_kwargs": value,
        "response_format": value,
        "tools": value,
        "logprobs": value,
        "retrieval": value,
        "max_completion_tokens": value,
    },
)


@check(
    st.sampled_from(("/v1/chat/completions", "/v1/completions")),
    st.one_of(request.map(lambda r: to_json(r).encode(errors="replace")), file_bytes()),
    st.sampled_from(("application/json", "text/plain", "")),
)
def requests_are_answered_or_refused_with_a_message(path, body, kind):
    async def ask():
        transport = httpx.ASGITransport(app())
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=HANG_SECONDS) as client:
            return await client.post(path, content=body, headers={"content-type": kind} if kind else {})

    response = asyncio.run(ask())
    assert response.status_code in (200, 400, 404, 413, 415)
    if response.status_code != 200:
        error = response.json()["error"]
        assert error["message"] and error["code"] == response.status_code
    elif response.headers["content-type"].startswith("text/event-stream"):
        assert response.text.endswith("data: [DONE]\n\n") and '"error"' not in response.text
    else:
        assert response.json()["choices"]


# The two runs

NAMES = [function.__name__ for function, _ in CHECKS]


@pytest.mark.parametrize("number", range(len(CHECKS)), ids=NAMES)
def test_in_short(number):
    draw(*CHECKS[number], max_examples=15, derandomize=True)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CHECKS)), ids=NAMES)
def test_for_minutes(number):
    draw(*CHECKS[number], max_examples=1000, print_blob=True)


# What was found so, by hand


@pytest.mark.parametrize(
    ("suffix", "form"), [(".jsonl", '{"text": %s}'), (".json", '[{"text": %s}]'), (".json", '{"rows": %s}')]
)
def test_a_number_without_end_is_refused_with_its_place(suffix, form):
    with written((form % ("9" * 5000)).encode(), suffix) as file:
        [refusal, *_] = read_records(file, find_encoding(file))
        assert isinstance(refusal, Refusal) and refusal.message.startswith(f"{file}, line 1: invalid JSON (")


def test_a_damaged_workbook_is_named():
    data = bytearray(workbook())
    for place in range(len(data) // 3, len(data) // 2):
        data[place] = 0
    with (
        written(bytes(data), ".xlsx") as file,
        pytest.raises(ValueError, match=r"f\.xlsx: not a readable .xlsx workbook"),
    ):
        list(read_records(file, None))


@pytest.mark.parametrize("source", ["a\0b", "~0", "~nobody-of-this-name/x", "a" * 5000, "a:2," * 3000])
def test_paths_that_cannot_be_are_refused_with_the_flag(source):
    with pytest.raises(ValueError, match="^--train_file_dir: "):
        parse_sources(source)


def test_a_huge_number_in_a_row_is_text_like_any_other():
    item = {"question": 10**400, "options": ["甲", "乙"], "answer": "A"}
    assert TASKS["exam"].parse(item)[0].question == str(10**400)

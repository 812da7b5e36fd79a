"""Mixing, splitting, encoding and caching of training data."""

import functools
import json
import multiprocessing
import os
import tracemalloc
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_checkpoint import flip

from suwen import cache, parallel, sampling
from suwen import data as data_module
from suwen.cache import find_entry
from suwen.data import prepare_data
from suwen.data_report import Report
from suwen.manifest import MANIFEST
from suwen.sampling import choose_rows, count_among, keep_on_disk, prompt_hash
from suwen.sketch import FILE


class Characters:
    """An encoder whose tokens are code points, so that rows can be read back."""

    def __init__(self, fingerprint: str = "1", limit: int = 10**9) -> None:
        self.fingerprint, self.limit, self.calls = fingerprint, limit, 0

    def speed_up(self):
        pass

    def __call__(self, row):
        self.calls += 1
        if "chosen" in row:
            ids = [list(map(ord, row[name][0]["content"])) for name in ("chosen", "rejected")]
            prompt = list(map(ord, row["messages"][-1]["content"]))
            margin = {"margin": row["margin"]} if "margin" in row else {}
            return [{"prompt_ids": prompt, "chosen_ids": ids[0], "rejected_ids": ids[1], **margin}], Counter()
        if "messages" in row:
            question, answer = (list(map(ord, message["content"])) for message in row["messages"][-2:])
            return [{"input_ids": question + answer, "labels": [-100] * len(question) + answer}], Counter()
        if len(row["text"]) > self.limit:
            return [], Counter({"too long": 1})
        return [{"input_ids": list(map(ord, row["text"]))}], Counter()


def decode(dataset, name="input_ids") -> list[str]:
    return ["".join(map(chr, ids)) for ids in dataset[name]]


def write_texts(path: Path, texts) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return str(path)


@pytest.fixture
def prepare(tmp_path):
    """prepare(schema, train, encode=..., **data arguments)"""

    def run(schema, train, encode=None, **settings):
        values = {
            "train_file_dir": str(train), "validation_file_dir": None, "columns": None, "max_train_samples": None,
            "max_eval_samples": None, "validation_split_fraction": None, "on_bad_rows": "error", "num_proc": 1,
            "cache_dir": str(tmp_path / "cache"), "data_seed": 42, **settings,
        }  # fmt: skip
        return prepare_data(SimpleNamespace(**values), schema, encode or Characters(), tmp_path / "out")

    return run


def test_every_row_is_encoded_in_order_and_counted(prepare, tmp_path):
    texts = [f"第{number}篇" for number in range(300)]
    prepared = prepare("text", write_texts(tmp_path / "a.txt", texts))
    assert decode(prepared.train) == texts and prepared.validation is None
    report = prepared.report
    tokens = sum(map(len, texts))
    assert (report.rows_read, report.rows_encoded, report.tokens, report.trained_tokens) == (300, 300, tokens, tokens)
    assert prepared.train.cache_files  # memory-mapped


def test_worker_processes_give_the_rows_of_one_process(prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "BATCH_ROWS", 7)
    source = write_texts(tmp_path / "a.txt", [f"第{number}篇" * 9 for number in range(200)])
    settings = {"validation_split_fraction": 0.1, "max_train_samples": 120}
    alone = prepare("text", source, cache_dir=str(tmp_path / "1"), **settings)
    together = prepare("text", source, num_proc=2, cache_dir=str(tmp_path / "2"), **settings)
    assert decode(alone.train) == decode(together.train)
    assert decode(alone.validation) == decode(together.validation)
    assert alone.report.fingerprint == together.report.fingerprint


def test_thinking_and_answer_keys_count_as_text_that_is_held():
    answer = {"role": "assistant", "content": "乙" * 10, "reasoning_content": "丙" * 1000}
    row = {"messages": [{"role": "user", "content": "甲" * 20}, answer]}
    assert parallel.characters(row) == len("user" + "assistant") + 1030
    assert parallel.characters(row | {"item": "丁" * 50}) == parallel.characters(row) + 50


def test_rows_that_are_read_again_are_those_that_were_kept(prepare, tmp_path, monkeypatch):
    lines = [json.dumps({"text": f"第{number}篇" * 9}, ensure_ascii=False) for number in range(200)]
    train = write_texts(tmp_path / "a.jsonl", [*lines[:90], "{", *lines[90:160]])
    settings = {"validation_file_dir": write_texts(tmp_path / "b.jsonl", lines[150:]), "on_bad_rows": "skip"}
    kept = prepare("text", f"{train}:1.5", cache_dir=str(tmp_path / "1"), **settings)
    monkeypatch.setattr(data_module, "KEPT_BYTES", 9000)  # of these rows some sixteen
    again = prepare("text", f"{train}:1.5", cache_dir=str(tmp_path / "2"), **settings)
    assert decode(kept.train) == decode(again.train) and len(kept.train) == 240
    assert decode(kept.validation) == decode(again.validation) and len(kept.validation) == 50
    assert kept.report.to_dict() | {"seconds": 0} == again.report.to_dict() | {"seconds": 0}


def test_trained_tokens_are_those_with_labels(prepare, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "甲乙丙", "answer": "丁戊"}), encoding="utf-8")
    report = prepare("conversation", tmp_path / "a.jsonl").report
    assert (report.tokens, report.trained_tokens) == (5, 2)


def test_pairs_keep_their_margin_where_any_row_has_one(prepare, tmp_path):
    rows = [{"prompt": f"问{n}", "chosen": "好", "rejected": "不好"} for n in range(3)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    prepared = prepare("preference", path)
    assert prepared.train.column_names == ["prompt_ids", "chosen_ids", "rejected_ids"]
    assert (prepared.report.tokens, prepared.report.trained_tokens) == (15, 9)
    rows[1]["margin"] = 2
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert prepare("preference", path).train["margin"][:] == [None, 2.0, None]


# ------------------------------------------------------------------------------------------------------------ mixing


def test_weights_choose_exactly_their_share_and_the_seed_decides_which(prepare, tmp_path):
    many = write_texts(tmp_path / "a" / "1.txt", [f"甲{number}" for number in range(100)])
    few = write_texts(tmp_path / "b.txt", [f"乙{number}" for number in range(10)])
    sources = f"{many}:0.3,{few}:2.5"
    rows = decode(prepare("text", sources).train)
    counts = Counter(rows)
    assert sum(row[0] == "甲" for row in rows) == 30 and max(counts[row] for row in rows if row[0] == "甲") == 1
    assert sorted(count for row, count in counts.items() if row[0] == "乙") == [2] * 5 + [3] * 5
    assert decode(prepare("text", sources, cache_dir=str(tmp_path / "2")).train) == rows
    assert decode(prepare("text", sources, data_seed=7).train) != rows
    report = prepare("text", sources).report
    assert report.rows_left_out == {"weight below 1": 70} and report.rows_repeated == 15


def test_sample_limits_leave_out_and_say_so(prepare, tmp_path):
    source = write_texts(tmp_path / "a.txt", range(100))
    prepared = prepare("text", source, max_train_samples=20, max_eval_samples=5, validation_split_fraction=0.3)
    assert len(prepared.train) == 20 and len(prepared.validation) == 5
    assert prepared.report.rows_left_out == {"--max_train_samples": 75}
    assert not set(decode(prepared.train)) & set(decode(prepared.validation))


def test_the_split_never_shares_a_prompt_and_is_about_the_share_asked_for(prepare, tmp_path):
    rows = [{"question": f"问题 {n % 70}" if n % 2 else f"问题{n % 70}。"[:-1], "answer": str(n)} for n in range(1000)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    prepared = prepare("conversation", path, validation_split_fraction=0.1)
    prompts = [
        {"".join(chr(i) for i, label in zip(row["input_ids"], row["labels"], strict=True) if label < 0).replace(" ", "")
         for row in part} for part in (prepared.train, prepared.validation)
    ]  # fmt: skip
    assert not prompts[0] & prompts[1]
    assert len(prepared.train) + len(prepared.validation) == 1000
    assert 90 <= len(prepared.validation) <= 110


def test_the_prompt_is_the_first_user_message_blind_to_case_width_and_space():
    def row(*contents):
        roles = ["system", "user", "assistant", "user", "assistant"]
        return {"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]}

    assert prompt_hash(row("s", "Ａbc 头痛？", "x")) == prompt_hash(row("t", "aBC头痛?\n", "y", "z"))
    assert prompt_hash(row("s", "头痛", "x")) != prompt_hash(row("s", "头疼", "x"))


def test_more_data_hardly_moves_the_split():
    def held(count):
        prompts = np.array([prompt_hash({"text": str(number)}) for number in range(count)], dtype=np.uint64)
        return set(np.flatnonzero(choose_rows(prompts, [count], [1.0], None, 0.1, None, 42, Counter())[1]))

    before, after = held(1000), held(1100)
    assert len(before) == 100 and len(after) == 110
    assert len(before & after) >= 80


def test_the_rarest_prompt_is_held_out_where_all_are_frequent():
    prompts = np.array([1] * 50 + [2] * 20 + [3] * 30, dtype=np.uint64)
    times, held = choose_rows(prompts, [100], [1.0], None, 0.05, None, 1, Counter())
    assert set(prompts[held]) == {2} and times.sum() == 80


def test_held_out_rows_are_not_repeated_by_weights():
    prompts = np.arange(40, dtype=np.uint64)
    times, held = choose_rows(prompts, [40], [3.0], None, 0.1, None, 1, Counter())
    assert held.sum() == 4 and set(times[held]) == {0} and set(times[~held]) == {3}


def test_the_split_is_the_beginning_of_the_sorted_order_however_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "BLOCK_ROWS", 64)
    random = np.random.default_rng(5)
    for kinds in (900, 200, 20):
        prompts = keep_on_disk(random.integers(0, kinds, 900, dtype=np.uint64).tolist(), tmp_path)
        held = choose_rows(prompts, [900], [1.0], None, 0.1, None, 7, Counter())[1]
        expected: list[int] = []
        for value in sorted(
            set(prompts.tolist()), key=lambda value: sampling.seeded(np.array([value], np.uint64), 7)[0]
        ):
            rows = np.flatnonzero(prompts == value).tolist()
            if len(expected) < 90 and len(rows) <= max(1, 2 * (90 - len(expected))):
                expected += rows
        assert np.flatnonzero(held).tolist() == sorted(expected)
        assert count_among(prompts, held, prompts, ~held) == 0
        assert count_among(prompts, held, prompts, held) == held.sum()
    assert keep_on_disk([], tmp_path).tolist() == [] and not list(tmp_path.iterdir())


def test_choosing_rows_takes_some_bytes_for_each_however_many_there_are(monkeypatch):
    monkeypatch.setattr(sampling, "BLOCK_ROWS", 1 << 14)

    def peak(count: int) -> int:
        prompts = np.random.default_rng(0).integers(0, 2**63, count, dtype=np.uint64)
        tracemalloc.start()
        choose_rows(prompts, [count], [1.0], None, 0.01, None, 42, Counter())
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    rows = 1 << 18
    assert (peak(2 * rows) - peak(rows)) / rows < 12  # sorting all of them took 33


def test_batches_are_written_together_and_hold_the_same_rows(prepare, tmp_path, monkeypatch):
    source = write_texts(tmp_path / "a.txt", [f"第{i}句。" for i in range(300)])
    monkeypatch.setattr(parallel, "WRITTEN_BYTES", 1)
    apart = prepare("text", source, cache_dir=str(tmp_path / "apart"))
    monkeypatch.undo()
    together = prepare("text", source, cache_dir=str(tmp_path / "together"))
    assert apart.train.to_list() == together.train.to_list() and apart.report.fingerprint == together.report.fingerprint
    assert apart.train.data.column(0).num_chunks > together.train.data.column(0).num_chunks == 1


def test_one_prompt_only_gives_no_validation_and_a_note(prepare, tmp_path):
    prepared = prepare("text", write_texts(tmp_path / "a.txt", ["同"] * 9), validation_split_fraction=0.5)
    assert prepared.validation is None and len(prepared.train) == 9
    assert any("no validation rows" in note for note in prepared.report.notes)


def test_given_validation_files_are_kept_whole_with_a_warning_for_what_training_knows(prepare, tmp_path):
    train = write_texts(tmp_path / "train.txt", ["甲", "乙", "丙"])
    validation = write_texts(tmp_path / "validation.txt", ["乙", "丁"])
    prepared = prepare("text", train, validation_file_dir=validation, validation_split_fraction=0.5)
    assert decode(prepared.validation) == ["乙", "丁"] and len(prepared.train) == 3
    assert prepared.report.validation_rows_seen_in_training == 1
    assert prepared.report.notes == ["the prompts of 1 of 2 validation rows are in training too"]
    same = prepare("text", train, validation_file_dir=str(tmp_path / "*ain.txt"))
    assert same.report.notes == ["the validation files are training files: the validation loss will look too good"]


# ------------------------------------------------------------------------------------------------------------- cache


def test_the_second_run_takes_the_same_rows_from_the_cache_and_says_so(prepare, tmp_path):
    source = write_texts(tmp_path / "a.txt", range(50))
    first, encode = prepare("text", source), Characters()
    second = prepare("text", source, encode)
    assert encode.calls == 0 and decode(second.train) == decode(first.train)
    assert not first.report.from_cache and second.report.from_cache
    assert any("taken from the cache" in line for line in second.report.lines())
    report = Report(seconds=2.0, rows_read=3000, tokens=50_000, validation_tokens=10_000)
    assert "prepared in 2.0 s (1,500 rows/s, 30,000 tokens/s)" in report.lines()[-1]
    assert {**second.report.to_dict(), "from_cache": False} == first.report.to_dict()
    moved = write_texts(tmp_path / "elsewhere" / "b.txt", range(50))
    third = prepare("text", moved).report
    assert third.from_cache and list(third.files) == list(third.encodings) == [str(moved)]  # not where it was then
    assert third.contents == {str(moved): first.report.contents[str(source)]}


@pytest.mark.parametrize(
    "change", [{"data_seed": 1}, {"validation_split_fraction": 0.1}, {"max_train_samples": 9}, {"on_bad_rows": "skip"}]
)
def test_whatever_decides_the_rows_is_in_the_cache_key(prepare, tmp_path, change):
    source = write_texts(tmp_path / "a.txt", range(50))
    prepare("text", source)
    assert not prepare("text", source, **change).report.from_cache
    assert not prepare("text", source, Characters("2")).report.from_cache
    assert not prepare("text", f"{source}:2").report.from_cache
    write_texts(tmp_path / "a.txt", range(51))
    assert not prepare("text", source).report.from_cache


def test_what_a_killed_run_left_is_cleared_and_built_anew(prepare, tmp_path, monkeypatch):
    source = write_texts(tmp_path / "a.txt", range(5))

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data_module.shutil, "rmtree", lambda *_, **__: None)  # a killed run does not tidy up
        patch.setattr(data_module.os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare("text", source)
    assert list((tmp_path / "cache").glob("*.building.*"))
    assert len(prepare("text", source).train) == 5
    assert not list((tmp_path / "cache").glob("*.building.*"))


def _prepare_in_process(run, source, queue):
    queue.put(run("text", source).report.from_cache)


def test_of_several_processes_one_builds_and_the_others_wait(prepare, tmp_path):
    source = write_texts(tmp_path / "a.txt", range(5000))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    target = functools.partial(_prepare_in_process, prepare, source, queue)
    processes = [context.Process(target=target) for _ in range(3)]
    for process in processes:
        process.start()
    assert sorted(queue.get(timeout=60) for _ in processes) == [False, True, True]
    for process in processes:
        process.join()


@pytest.mark.parametrize("name", ["train.arrow", "validation.arrow", FILE, "report.json", MANIFEST])
@pytest.mark.parametrize("change", ["flip", "cut", "remove"])
def test_a_damaged_entry_is_named_set_aside_and_made_again(prepare, tmp_path, capfd, name, change):
    source = write_texts(tmp_path / "a.txt", [f"第{number}篇" for number in range(50)])
    first = prepare("text", source, validation_split_fraction=0.2)
    rows, held = decode(first.train), decode(first.validation)  # before their files are changed below them
    [damaged] = tmp_path.glob(f"cache/*/{name}")
    size = damaged.stat().st_size
    if change == "flip":
        flip(damaged, 4 * size)
    elif change == "cut":
        os.truncate(damaged, size // 2)
    else:
        damaged.unlink()
    again = prepare("text", source, validation_split_fraction=0.2)
    assert not again.report.from_cache and again.report.fingerprint == first.report.fingerprint
    assert decode(again.train) == rows and decode(again.validation) == held
    told = capfd.readouterr().err
    aside = [path.name for path in tmp_path.glob("cache/damaged-*/*")]
    if (name, change) == (MANIFEST, "remove"):  # as an entry of a version without manifests: made anew in its place
        assert not told and not aside
    else:
        assert told.count("\n") == 1 and f"{damaged.parent}: damaged ({name} " in told and "made again" in told
        assert aside == [damaged.parent.name]
    assert prepare("text", source, validation_split_fraction=0.2).report.from_cache


def test_of_processes_that_start_together_one_verifies(prepare, tmp_path, monkeypatch):
    prepare("text", write_texts(tmp_path / "a.txt", range(5)))
    [manifest] = tmp_path.glob(f"cache/*/{MANIFEST}")
    os.utime(manifest, (0, 0))  # prepared long ago
    verified = []
    monkeypatch.setattr(cache, "find_change", lambda folder, files: verified.append(sorted(files)))
    began = manifest.stat().st_mtime + 1
    assert [find_entry(manifest.parent, began) for _ in range(3)] == [True] * 3
    assert verified == [["report.json", "train.arrow", FILE]]
    assert find_entry(manifest.parent, manifest.stat().st_mtime + 1) and len(verified) == 2  # another start


# --------------------------------------------------------------------------------------------------------- bad input


def test_refused_and_dropped_rows_are_counted_and_written_also_from_the_cache(prepare, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "一"}\n{"text": ""}\n{oops\n{"text": "很长很长很长"}\n', encoding="utf-8")
    for _ in range(2):
        report = prepare("text", path, Characters(limit=5), on_bad_rows="skip").report
        assert report.rows_refused == {"empty text": 1, "invalid JSON": 1}
        assert report.rows_dropped == {"too long": 1} and report.rows_encoded == 1
        rejected = tmp_path / "out" / "rejected_rows.jsonl"
        rows = [json.loads(line) for line in rejected.read_text(encoding="utf-8").splitlines()]
        assert [row["where"] for row in rows] == [f"{path}, line 2", f"{path}, line 3"]
        rejected.unlink()
        text = "\n".join(report.lines())
        for words in ("4 rows, 2 refused", "refused: 1 x empty text", "left out by the encoder: 1 x too long", "UTF-8"):
            assert words in text


def test_nothing_is_left_behind_when_a_row_is_bad(prepare, tmp_path):
    with pytest.raises(ValueError, match="a.txt: empty file"):
        prepare("text", write_texts(tmp_path / "a.txt", []))
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_no_row_left_is_an_error_with_the_reasons(prepare, tmp_path):
    with pytest.raises(ValueError, match=r"--train_file_dir .*: no row left to train on \(2 x too long\)"):
        prepare("text", write_texts(tmp_path / "a.txt", ["一一", "二二"]), Characters(limit=1))


class Failing(Characters):
    def __call__(self, row):
        if row["text"] == "137":
            raise ValueError("the template cannot express this")
        if row["text"] == "kill":
            os._exit(9)
        return super().__call__(row)


@pytest.mark.parametrize("num_proc", [1, 2])
def test_an_error_of_the_encoder_names_the_row(prepare, tmp_path, num_proc):
    source = write_texts(tmp_path / "a.txt", range(400))
    with pytest.raises(ValueError, match="a.txt, line 138: the template cannot express this"):
        prepare("text", source, Failing(), num_proc=num_proc)


def test_a_killed_worker_is_an_error_and_not_a_hang(prepare, tmp_path):
    source = write_texts(tmp_path / "a.txt", [*range(1000, 1400), "kill"])
    with pytest.raises(ValueError, match="a preprocessing worker was killed"):
        prepare("text", source, Failing(), num_proc=2)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"train_file_dir": None}, "--train_file_dir is missing"),
        ({"validation_split_fraction": 1.0}, "--validation_split_fraction: found 1.0"),
        ({"max_train_samples": 0}, "--max_train_samples: found 0, expected 1 or more"),
        ({"num_proc": 0}, "--num_proc: found 0"),
        ({"validation_file_dir": "/nowhere"}, "--validation_file_dir: /nowhere not found"),
    ],
)
def test_bad_arguments_are_named(prepare, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        prepare("text", write_texts(tmp_path / "a.txt", ["一"]), **settings)


def test_files_of_other_kinds_in_a_folder_are_mentioned(prepare, tmp_path):
    write_texts(tmp_path / "d" / "a.txt", ["一"])
    write_texts(tmp_path / "d" / "scan.pdf", ["x"])
    prepared = prepare("text", tmp_path / "d")
    assert prepared.report.notes == [f"{tmp_path}/d: scan.pdf passed over, not of a known kind"]


def test_a_long_list_of_files_is_cut_and_chinese_names_are_aligned():
    files = {f"书{number}.txt": 1 for number in range(30)}
    lines = Report(files=files, encodings=dict.fromkeys(files, "UTF-8"), tokens=3).lines()
    assert len(lines) < 25 and "  ... 15 more files" in lines
    assert lines[1] == "  书0.txt   UTF-8, 1 rows" and lines[-4] == "  书29.txt  UTF-8, 1 rows"

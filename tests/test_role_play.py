"""Dialogues played in two roles: who meets whom, what each sees, what is left out, and going on after a stop."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from http_server import server
from test_api import KEY, folders, serving  # noqa: F401 (a fixture)

import supervised_finetuning
from suwen.client import Endpoint, open_client
from suwen.loading import load_rows
from suwen.models import load_tokenizer
from suwen.role_play import (
    CLINICIAN_KEYS,
    GOODBYE,
    OPENING,
    PATIENT_KEYS,
    Pace,
    draw_scenes,
    load_roles,
    play,
)
from tools import build_dialogues

ROOT = Path(__file__).resolve().parent.parent
PATIENTS = load_roles(ROOT / "data/roles/patients.jsonl", PATIENT_KEYS)
CLINICIANS = load_roles(ROOT / "data/roles/clinicians.jsonl", CLINICIAN_KEYS)


def reply(text, finish="stop"):
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return 200, {}, {"choices": [choice], "usage": {"prompt_tokens": 10, "completion_tokens": 2}}


def is_patient(body):
    return body["messages"][0]["content"].startswith("你扮演一位患者")


def talkative(body, number):
    """A patient who thanks after two answers, and a doctor who counts."""
    answers = sum(message["role"] == ("user" if is_patient(body) else "assistant") for message in body["messages"])
    if not is_patient(body):
        return reply(f"医生：第{answers + 1}个回答，{body['seed']}。")
    return reply(f"谢谢。{GOODBYE}" if answers == 3 else f"患者：第{answers}个问题，{body['seed']}？")


def build(url, path, *words):
    command = ["--api_base", url, "--model", "m", "--output_file", str(path), "--rounds", "3", *map(str, words)]
    build_dialogues.main(command)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_seed_roles_are_whole_and_no_two_are_alike():
    assert len(PATIENTS) >= 20 and len(CLINICIANS) >= 4
    for roles in (PATIENTS, CLINICIANS):
        assert len({role["name"] for role in roles}) == len(roles)


def test_every_pair_meets_once_before_any_meets_again_and_more_scenes_keep_the_first():
    pairs = len(PATIENTS) * len(CLINICIANS)
    scenes = draw_scenes(PATIENTS, CLINICIANS, pairs + 5, 4, 1)
    met = [(scene.patient["name"], scene.clinician["name"]) for scene in scenes]
    assert len(set(met[:pairs])) == pairs and [scene.index for scene in scenes] == list(range(pairs + 5))
    assert draw_scenes(PATIENTS, CLINICIANS, 7, 4, 1) == scenes[:7] != draw_scenes(PATIENTS, CLINICIANS, 7, 4, 2)
    assert {scene.rounds for scene in scenes} == {2, 3, 4}


def test_each_role_sees_the_talk_from_its_own_side(tmp_path):
    with server(talkative) as (url, seen):
        rows = build(url, tmp_path / "d.jsonl", "--count", 6, "--concurrency", 1)
    assert [row["index"] for row in rows] == list(range(6))
    for row in rows:
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"] * (len(row["messages"]) // 2)
        assert not any(word in m["content"] for m in row["messages"] for word in (GOODBYE, "患者：", "医生："))
    assert {len(row["messages"]) for row in rows} == {4}, "the patient's goodbye needs no answer"
    first, second, third = (body["messages"] for _, _, body in seen[:3])
    assert [m["role"] for m in first] == ["system", "user"] and first[1]["content"] == OPENING
    assert [m["role"] for m in second] == ["system", "user"] and "只说患者自己的话" not in second[0]["content"]
    assert [m["role"] for m in third] == ["system", "user", "assistant", "user"]
    assert third[2]["content"] == second[1]["content"], "what the patient said is its own turn"


def test_what_comes_out_is_training_data(tmp_path):
    with server(talkative) as (url, _):
        build(url, tmp_path / "d.jsonl", "--count", 3)
    rows = [row for _, row in load_rows(str(tmp_path / "d.jsonl"), "conversation")]
    assert len(rows) == 3


def test_a_talk_that_went_wrong_is_left_out_counted_and_tried_again(tmp_path, capsys):
    def silent_doctor(body, number):
        return talkative(body, number) if is_patient(body) else reply("")

    def endless_doctor(body, number):
        return talkative(body, number) if is_patient(body) else reply("一直说", "length")

    def parrot(body, number):
        return reply("你好")

    path = tmp_path / "d.jsonl"
    with server(silent_doctor) as (url, _):
        for answer, reason in ((silent_doctor, "empty turn"), (endless_doctor, "cut-off turn"), (parrot, "the same")):
            with server(answer) as (other, _):
                assert build(other, tmp_path / f"{reason[:3]}.jsonl", "--count", 4) == []
            assert f"left out: {reason}" in capsys.readouterr().out
    turns = []

    def mended(body, number):
        turns.append(number)
        return talkative(body, number) if len(turns) > 6 else silent_doctor(body, number)

    with server(mended) as (url, _):
        few = build(url, path, "--count", 4, "--concurrency", 1)
        assert 0 < len(few) < 4
        rows = build(url, path, "--count", 4, "--concurrency", 1)
    assert [row["index"] for row in rows] == [0, 1, 2, 3]
    assert all(row in rows for row in few), "what was there is kept"
    assert "are there already" in capsys.readouterr().out


def test_two_good_rounds_stand_when_the_third_goes_wrong(tmp_path):
    def tired(body, number):
        return talkative(body, number) if len(body["messages"]) < 6 else reply("")

    with server(tired) as (url, _):
        rows = build(url, tmp_path / "d.jsonl", "--count", 5)
    assert len(rows) == 5 and {len(row["messages"]) for row in rows} == {4}


def test_tokens_and_their_price_are_counted(tmp_path, capsys):
    with server(talkative) as (url, seen):
        build(url, tmp_path / "d.jsonl", "--count", 2, "--price_input", 1000, "--price_output", 5000)
    calls = len(seen)
    shown = capsys.readouterr().out
    assert f"tokens: {10 * calls:,} read, {2 * calls:,} written; cost {calls * (0.01 + 0.01):.4f}" in shown


def test_requests_keep_their_pace(monkeypatch):
    slept = []
    monkeypatch.setattr("suwen.role_play.time.monotonic", lambda: 100.0)
    monkeypatch.setattr("suwen.role_play.time.sleep", slept.append)
    pace = Pace(120)
    for _ in range(4):
        pace.wait()
    assert slept == pytest.approx([0, 0.5, 1.0, 1.5])
    assert Pace(None).gap == 0


def test_requests_that_are_sent_again_keep_the_pace_as_well():
    waited = []

    class Counted(Pace):
        def wait(self):
            waited.append(1)

    def full_at_first(body, number):
        return talkative(body, number) if number > 3 else (429, {}, {"error": {"message": "too many requests"}})

    with server(full_at_first) as (url, seen):
        endpoint = Endpoint(url, "m", first_wait=0.01)
        (scene,) = draw_scenes(PATIENTS[:1], CLINICIANS[:1], 1, 2, 0)
        with open_client(endpoint) as client:
            assert play(endpoint, client, scene, Counted(None)).messages
    assert len(waited) == len(seen) > 4


def test_an_endpoint_that_refuses_ends_it_with_a_line_and_keeps_what_there_is(tmp_path):
    def closing(body, number):
        return talkative(body, number) if number <= 12 else (401, {}, {"error": {"message": "no such key"}})

    path = tmp_path / "d.jsonl"
    with server(closing) as (url, _), pytest.raises(ValueError, match="HTTP 401: no such key"):
        build(url, path, "--count", 30, "--concurrency", 1)
    assert len(path.read_text(encoding="utf-8").splitlines()) >= 2


def test_roles_without_a_complaint_are_refused_by_line(tmp_path):
    file = tmp_path / "patients.jsonl"
    rows = [PATIENTS[0], {**PATIENTS[1], "complaint": " "}]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(ValueError, match="patients.jsonl, line 2: no complaint, expected an object with name, person"):
        load_roles(file, PATIENT_KEYS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--count", "0"], "--count: found 0, expected 1 or more"),
        (["--requests_per_minute", "0"], "--requests_per_minute: found 0, expected a number above 0"),
        (["--price_input", "1"], "--price_input and --price_output: give both"),
        (["--patients", "none.jsonl"], "--patients: none.jsonl not found"),
    ],
)
def test_flags_that_cannot_work_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        build_dialogues.parse_arguments(["--api_base", "http://127.0.0.1:1/v1", "--model", "m", *words])


@pytest.mark.distributed
def test_our_own_server_plays_both_roles(folders, tmp_path):  # noqa: F811
    """The model is random and its turns are cut off: what counts is that server and tool understand each other."""
    path = tmp_path / "d.jsonl"
    with serving(folders, key=None) as (address, _):
        words = ["--api_base", f"{address}/v1", "--model", "base", "--output_file", path, "--count", 3]
        command = [sys.executable, ROOT / "tools/build_dialogues.py", *words, "--max_new_tokens", 8]
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert re.search(r"d.jsonl: \d dialogues, \d+ turns", result.stdout)
    assert "tokens: " in result.stdout and " 0 written" not in result.stdout


TALKS = {  # by complaint: what patient and clinician say in turn
    "咳嗽三天": ("医生，我咳嗽三天了，有点痰。", "有没有发热？", "没有发热。", "多喝水，一周不好就来检查。"),
    "头痛半天": ("我头痛半天了，看东西怕光。", "以前这样痛过吗？", "以前也痛过。", "先在暗处休息，加重请马上就医。"),
}  # fmt: skip


def scripted(messages):
    """What comes next in the talk that these messages belong to."""
    seen = "".join(message["content"] for message in messages)
    words = next(words for complaint, words in TALKS.items() if complaint in seen or words[0] in seen)
    own = sum(message["role"] == "assistant" for message in messages)
    return words[2 * own + (not is_patient({"messages": messages}))]


@pytest.mark.distributed
@pytest.mark.slow
def test_a_model_that_ends_its_turns_plays_dialogues_on_our_own_server(tmp_path, capsys):
    """The embedded model learns two talks by heart, asked as the tool asks, and then plays both roles."""
    patient = {"person": "患者", "background": "无", "manner": "平和"}
    roles = {
        "patients": [{"name": complaint, "complaint": complaint, **patient} for complaint in TALKS],
        "clinicians": [{"name": "医生", "person": "医生", "manner": "耐心"}],
    }
    words = ["--model", "base", "--rounds", "2", "--temperature", "0", "--max_new_tokens", "48"]
    for name, rows in roles.items():
        (tmp_path / name).mkdir()
        file = tmp_path / name / "roles.jsonl"
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        words += [f"--{name}", str(file)]

    def play_with(url, file, count):
        build_dialogues.main([*words, "--api_base", url, "--output_file", str(file), "--count", str(count)])
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return rows, capsys.readouterr().out

    with server(lambda body, number: reply(scripted(body["messages"]))) as (url, seen):
        expected, _ = play_with(url, tmp_path / "script.jsonl", 2)
    asked = [body["messages"] for _, _, body in seen]
    assert len(asked) == 8 and sorted(row["messages"][0]["content"] for row in expected) == sorted(
        talk[0] for talk in TALKS.values()
    )
    answered = [[*messages, {"role": "assistant", "content": scripted(messages)}] for messages in asked]
    (tmp_path / "train").mkdir()
    with open(tmp_path / "train" / "talks.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in answered)
    supervised_finetuning.main(
        ["--train_file_dir", str(tmp_path / "train"), "--output_dir", str(tmp_path / "base"), "--use_cpu"]
        + ["--use_peft", "False", "--learning_rate", "3e-3", "--max_steps", "60", "--max_length", "512"]
        + ["--validation_split_fraction", "0", "--num_proc", "1", "--report_to", "none", "--save_strategy", "no"]
        + ["--cache_dir", str(tmp_path / "cache"), "--per_device_train_batch_size", "8"]
    )

    file = tmp_path / "played.jsonl"
    with serving({"base": tmp_path / "base"}, "--max_new_tokens", "48", key=None) as (address, _):
        (first,), shown = play_with(f"{address}/v1", file, 1)
        assert first["messages"] == expected[0]["messages"] and first["patient"] in TALKS
        assert f"{file}: 1 dialogues, 4 turns" in shown and "left out" not in shown
        read, written = map(int, re.search(r"tokens: (\d+) read (\d+) written", shown.replace(",", "")).groups())
        tokenizer = load_tokenizer(str(tmp_path / "base"))
        turns = [tokenizer.encode(message["content"]) for message in first["messages"]]
        assert written == sum(map(len, turns)) + 4, "each turn with its end"
        assert read > 4 * 100
        rows, shown = play_with(f"{address}/v1", file, 2)
        assert f"{file}: 1 of 2 dialogues are there already" in shown
    assert [row["messages"] for row in rows] == [row["messages"] for row in expected] and rows[0] == first
    assert len(list(load_rows(str(file), "conversation"))) == 2

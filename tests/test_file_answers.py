"""A file of questions answered by several processes together, and by an endpoint."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from http_server import server
from test_page import make_models

import inference

pytestmark = pytest.mark.training
ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = [f"第{number}个问题：{'咳嗽发热' * (number % 4)}怎么办？" for number in range(11)]


def read_rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def questions(tmp_path) -> Path:
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"prompt": q}) + "\n" for q in QUESTIONS), encoding="utf-8")
    return file


def run_together(processes: int, words: list[str]) -> None:
    """As `accelerate launch` starts them: the same command, with the rank in the environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    started = []
    for rank in range(processes):
        environment = {**os.environ, **{k: str(v) for k, v in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}}
        command = [sys.executable, "inference.py", *words]
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
    for process in started:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors


@pytest.mark.distributed
def test_two_processes_write_what_one_writes_and_take_in_what_was_left(tmp_path, questions):
    make_models(tmp_path)
    words = ["--base_model", tmp_path / "base", "--use_cpu", "--max_new_tokens", "12", "--data_file", questions]
    words = [*map(str, words), "--temperature", "0.7", "--seed", "5"]
    alone, together = tmp_path / "alone.jsonl", tmp_path / "together.jsonl"
    inference.main([*words, "--output_file", str(alone)])
    assert len(read_rows(alone)) == len(QUESTIONS)
    # What a run of three processes that was cut off has left: a whole file of one of them, half a line of another
    lines = alone.read_bytes().splitlines(keepends=True)
    record = alone.with_name(alone.name + ".run.json").read_bytes()
    for part, content in ((0, lines[4] + lines[9]), (2, lines[1] + lines[2][:20])):
        file = together.with_name(f"{together.name}.part-{part}")
        file.write_bytes(content)
        file.with_name(file.name + ".run.json").write_bytes(record)
    run_together(2, [*words, "--output_file", str(together)])
    assert together.read_bytes() == alone.read_bytes()
    assert not list(tmp_path.glob("*.part-*"))


def test_an_endpoint_answers_a_file_many_at_once(tmp_path, questions):
    working, most, lock = 0, 0, threading.Lock()

    def answer(body, number):
        nonlocal working, most
        with lock:
            working, most = working + 1, max(most, working + 1)
        time.sleep(0.05)
        with lock:
            working -= 1
        text = "答：" + body["messages"][-1]["content"]
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        return 200, {}, {"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 5}}

    output = tmp_path / "answers.jsonl"
    with server(answer) as (address, seen):
        words = ["--api_base", address, "--model", "m", "--concurrency", "4", "--data_file", str(questions)]
        words += ["--output_file", str(output), "--max_new_tokens", "9"]
        inference.main(words)
        rows = read_rows(output)
        assert [row["response"] for row in rows] == [f"答：{question}" for question in QUESTIONS]
        assert [row["num_tokens"] for row in rows] == [5] * len(QUESTIONS) and 2 <= most <= 4
        assert {body["max_tokens"] for _, _, body in seen} == {9}
        output.write_bytes(b"".join(output.read_bytes().splitlines(keepends=True)[:6]))
        inference.main(words)  # goes on
        assert len(seen) == len(QUESTIONS) + 5 and [row["index"] for row in read_rows(output)] == list(range(11))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--api_base", "http://127.0.0.1:1"], "also needs --model"),
        (["--api_base", "http://127.0.0.1:1", "--model", "m", "--base_model", "x"], "give one of them"),
        (["--api_base", "http://127.0.0.1:1", "--model", "m", "--concurrency", "0"], "--concurrency: found 0"),
    ],
)
def test_mistakes_in_endpoint_flags_are_named(words, message):
    with pytest.raises(ValueError, match=message):
        inference.parse_arguments(words)

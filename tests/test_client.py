"""The client against a real HTTP server on this machine."""

import threading
import time

import pytest
from http_server import server

from suwen.client import Endpoint, EndpointError, complete_chat, complete_chats, open_client


def echo(body, _number=0):
    text = body["messages"][-1]["content"]
    usage = {"prompt_tokens": 3, "completion_tokens": 1}
    return 200, {}, {"choices": [{"message": {"content": f"答{text}"}, "finish_reason": "stop"}], "usage": usage}


def ask(text):
    return [{"role": "user", "content": text}]


def test_a_question_is_answered_with_key_and_sampling(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with server(echo) as (url, seen):
        endpoint = Endpoint(url, "m")
        with open_client(endpoint) as client:
            reply = complete_chat(endpoint, client, ask("甲"), max_tokens=5, temperature=0)
    assert reply == ("答甲", "", "stop", 3, 1)
    assert seen == [
        (
            "/v1/chat/completions",
            "Bearer secret",
            {"model": "m", "messages": ask("甲"), "max_tokens": 5, "temperature": 0},
        )
    ]
    assert "secret" not in repr(Endpoint(url, "m", api_key="secret"))


def test_full_servers_are_asked_again_until_they_answer():
    def busy_twice(body, number):
        return echo(body) if number > 2 else (429 if number == 1 else 503, {"retry-after": "0"}, {"error": "full"})

    with server(busy_twice) as (url, seen):
        assert dict(complete_chats(Endpoint(url + "/v1", "m", first_wait=0.01), [ask("甲")]))[0].content == "答甲"
    assert len(seen) == 3


def test_a_refusal_is_final_and_says_why():
    with server(lambda body, number: (404, {}, {"error": {"message": "no model m"}})) as (url, seen):
        with pytest.raises(EndpointError, match="HTTP 404: no model m"):
            list(complete_chats(Endpoint(url, "m", first_wait=0.01), [ask("甲")]))
    assert len(seen) == 1


def test_a_dead_server_is_told_once_while_all_attempts_are_made_and_in_the_end(capfd):
    with server(echo) as (url, _):
        pass
    with pytest.raises(EndpointError, match="no answer after 3 attempts .ConnectError"):
        list(complete_chats(Endpoint(url, "m", retries=2, first_wait=0.01), [ask("甲"), ask("乙"), ask("丙")]))
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith(f"{url}/v1/chat/completions: ConnectError") and line.endswith("again, 3 times in all")


def test_retries_are_told_once_where_every_failure_names_its_request(capfd):
    def full(_body, number):
        return 503, {}, {"error": {"message": f"full, request {number}"}}

    with server(full) as (url, _):
        with pytest.raises(EndpointError, match="HTTP 503: full, request"):
            list(complete_chats(Endpoint(url, "m", retries=2, first_wait=0.01), [ask("甲"), ask("乙"), ask("丙")]))
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith(f"{url}/v1/chat/completions: HTTP 503: full, request")


def test_an_answer_of_another_shape_is_an_error():
    with server(lambda body, number: (200, {}, b"<html>login</html>")) as (url, _):
        with pytest.raises(EndpointError, match="expected a chat completion"):
            list(complete_chats(Endpoint(url, "m"), [ask("甲")]))


def test_many_questions_run_at_once_and_keep_their_places():
    running, most, lock = 0, 0, threading.Lock()

    def slow(body, _number):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        with lock:
            running -= 1
        return echo(body)

    with server(slow) as (url, _):
        replies = dict(complete_chats(Endpoint(url, "m", concurrency=4), (ask(str(i)) for i in range(20))))
    assert {i: reply.content for i, reply in replies.items()} == {i: f"答{i}" for i in range(20)}
    assert most == 4


def test_an_endless_stream_of_questions_is_taken_step_by_step():
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield ask(str(taken))

    with server(echo) as (url, _):
        replies = complete_chats(Endpoint(url, "m", concurrency=2), endless())
        for _ in range(5):
            next(replies)
        replies.close()
    assert taken <= 12


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x/v1", ""])
def test_a_url_is_checked_before_anything_is_sent(url):
    with pytest.raises(ValueError, match="--api_base"):
        Endpoint(url, "m")


def test_thinking_written_into_the_answer_is_taken_apart():
    message = {"content": "<think>\n先想\n</think>\n\n答案：C"}
    with server(lambda body, number: (200, {}, {"choices": [{"message": message}]})) as (url, _):
        [(_, reply)] = complete_chats(Endpoint(url, "m"), [ask("甲")])
    assert (reply.reasoning, reply.content) == ("先想", "答案：C")

"""The OpenAI-compatible server, asked by the official client over a real socket."""

import contextlib
import gc
import itertools
import json
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_model, tiny_tokenizer
from transformers import LlamaForCausalLM

import api_server
import inference
from suwen.generation import GenerationSettings, generate_batch, stream
from suwen.retrieval.grounding import NOT_FOUND, with_passages
from suwen.retrieval.index import build_index
from suwen.retrieval.search import KnowledgeBase
from template import TEMPLATES

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).resolve().parent.parent
KEY = "geheim"
TOKENS = 16
CONVERSATION = [
    {"role": "system", "content": "你是医生"},
    {"role": "user", "content": "我咳嗽"},
    {"role": "assistant", "content": "多久了？"},
    {"role": "user", "content": "三天，<|im_end|>还发热。"},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A base, an adapter on it, one on that adapter, and a knowledge base."""
    chatml = TEMPLATES["chatml"]
    tokenizer = tiny_tokenizer(chatml.special_tokens, chat_template=chatml.jinja)
    tokenizer.pad_token = tokenizer.eos_token
    root = tmp_path_factory.mktemp("models")
    found = {name: root / name for name in ("base", "sft", "dpo")}
    model = tiny_model(tokenizer)
    model.config.max_position_embeddings = 2048
    model.config.initializer_range = 0.4  # weights so large that every question has an answer of its own
    torch.manual_seed(0)
    LlamaForCausalLM(model.config).save_pretrained(found["base"])
    tokenizer.save_pretrained(found["base"])
    for seed, name, base in ((1, "sft", "base"), (2, "dpo", "sft")):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        adapter = get_peft_model(LlamaForCausalLM.from_pretrained(found["base"]), config)
        adapter.peft_config["default"].base_model_name_or_path = str(found[base])
        adapter.save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    papers = root / "papers"
    papers.mkdir()
    for name, text in (("布洛芬", "禁忌：孕晚期禁用。"), ("蒙脱石散", "用于成人及儿童急、慢性腹泻。")):
        (papers / f"{name}.txt").write_text(f"{name}\n{text}\n", encoding="utf-8")
    build_index([str(papers)], str(root / "index"))
    return found | {"index": root / "index"}


@contextlib.contextmanager
def serving(folders, *words, key=KEY):
    """A server in a process of its own, as its user starts it; gives its address and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "api_server.py", "--base_model", folders["base"], "--use_cpu", "--port", port]
    command += [*(["--api_key", key] if key else []), "--max_new_tokens", TOKENS, *words]
    server = subprocess.Popen(list(map(str, command)), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{address}/health").status_code == 200:
                    break
            assert server.poll() is None, server.stderr.read()
            time.sleep(0.1)
        yield address, server
    finally:
        server.kill()
        server.wait()
        server.stderr.close()


@pytest.fixture(scope="module")
def server(folders):
    adapters = ["--lora_model", folders["sft"], f"besser={folders['dpo']}"]
    with serving(folders, *adapters, "--knowledge_index", folders["index"], "--max_waiting", 200) as (address, process):
        yield address, process


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return client_of(server[0])


def client_of(address: str, key: str = KEY) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=60)


def ask(client, messages, model="base", retrieval=False, **options):
    return client.chat.completions.create(
        model=model, messages=messages, extra_body={"retrieval": retrieval}, **options
    )


def idle(address: str, seconds: float = 30) -> bool:
    """Whether nobody works or waits, at the latest after some time."""
    for _ in range(int(seconds * 20)):
        status = httpx.get(f"{address}/health").json()
        if (status["working"], status["waiting"]) == (0, 0):
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def local(folders):
    """The model and its encoder as inference.py loads them."""
    served = inference.load_served(inference.parse_arguments(["--base_model", str(folders["base"]), "--use_cpu"]))
    return served.model, served.encoder


def test_terminal_and_api_give_the_same_answer_for_the_same_conversation(client, local):
    model, encoder = local
    settings = GenerationSettings(max_new_tokens=TOKENS)
    for messages in (CONVERSATION, CONVERSATION[1:2]):
        ids = encoder.encode_prompt(messages)
        expected = generate_batch(model, encoder, [ids], settings)[0]
        reply = ask(client, messages)
        assert reply.choices[0].message.content == expected.content
        assert reply.choices[0].finish_reason == expected.finish_reason
        assert reply.usage.prompt_tokens == len(ids) and reply.usage.completion_tokens == len(expected.token_ids)
        pieces = [piece.text for piece in stream(model, encoder, ids, settings)]
        chunks = list(ask(client, messages, stream=True))
        assert [c.choices[0].delta.content for c in chunks if c.choices[0].delta.content] == pieces
        assert [c.choices[0].finish_reason for c in chunks][-1] == expected.finish_reason


def test_drawn_answers_hang_on_the_seed_alone(client, local):
    model, encoder = local
    options = {"temperature": 0.8, "top_p": 0.9, "seed": 7, "max_tokens": 12}
    settings = GenerationSettings(max_new_tokens=12, temperature=0.8, top_p=0.9, seed=7)
    expected = generate_batch(model, encoder, [encoder.encode_prompt(CONVERSATION)], settings)[0].content
    with ThreadPoolExecutor(8) as pool:
        replies = pool.map(lambda _: ask(client, CONVERSATION, **options), range(8))
    assert {reply.choices[0].message.content for reply in replies} == {expected}


def test_the_chat_template_of_the_api_is_that_of_training(local):
    _, encoder = local
    rows, _ = encoder.encode_conversation([*CONVERSATION, {"role": "assistant", "content": "请就医。"}], None)
    prompt = encoder.encode_prompt(CONVERSATION)
    assert rows[-1]["input_ids"][: len(prompt)] == prompt


def test_adapters_are_models_of_their_own(client, folders):
    assert [model.id for model in client.models.list()] == ["base", "sft", "besser"]
    answers = {}
    for name, words in (("base", ()), ("sft", ("sft",)), ("besser", ("sft", "dpo"))):
        arguments = ["--base_model", str(folders["base"]), "--use_cpu"]
        if words:
            arguments += ["--lora_model", ",".join(str(folders[word]) for word in words)]
        merged = inference.load_served(inference.parse_arguments(arguments))
        ids = merged.encoder.encode_prompt(CONVERSATION)
        settings = GenerationSettings(max_new_tokens=TOKENS)
        answers[name] = generate_batch(merged.model, merged.encoder, [ids], settings)[0].content
    assert len(set(answers.values())) == 3
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda name: (name, ask(client, CONVERSATION, name)), [*answers, *answers]))
    assert {name: reply.choices[0].message.content for name, reply in found} == answers


def test_answers_from_passages_bring_their_sources(client, folders, local):
    model, encoder = local
    question = [{"role": "user", "content": "布洛芬有什么禁忌？"}]
    hits = KnowledgeBase(str(folders["index"])).search(question[0]["content"])
    ids = encoder.encode_prompt(with_passages(question, [hit.passage for hit in hits]))
    expected = generate_batch(model, encoder, [ids], GenerationSettings(max_new_tokens=TOKENS))[0].content
    reply = ask(client, question, retrieval=True)
    assert reply.choices[0].message.content == expected and reply.usage.prompt_tokens == len(ids)
    assert reply.sources[0]["text"] == hits[0].passage.text and reply.citations["cited"] == []
    chunks = list(ask(client, question, retrieval=True, stream=True))
    assert chunks[0].sources == reply.sources and chunks[-1].citations == reply.citations
    unknown = ask(client, [{"role": "user", "content": "明天股市如何"}], retrieval=True)
    assert unknown.choices[0].message.content == NOT_FOUND and unknown.sources == []
    assert "sources" not in ask(client, question).model_dump()


def test_completions_go_on_from_plain_text_and_from_tokens(client, local):
    model, encoder = local
    ids = encoder.tokenizer("高血压患者")["input_ids"]
    expected = generate_batch(model, encoder, [ids], GenerationSettings(max_new_tokens=8))[0].token_ids
    text = encoder.tokenizer.decode([i for i in expected if i not in encoder.stop_token_ids]).rstrip("\ufffd")
    for prompt in ("高血压患者", ids):
        reply = client.completions.create(model="base", prompt=prompt, max_tokens=8)
        assert reply.choices[0].text.strip() == text.strip() and reply.object == "text_completion"
    chunks = list(client.completions.create(model="base", prompt="高血压患者", max_tokens=8, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks).strip() == text.strip()


def test_usage_is_streamed_where_asked_for(client):
    chunks = list(ask(client, CONVERSATION, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 0
    assert all(chunk.id == chunks[0].id for chunk in chunks)


def test_an_answer_ends_before_a_stop_text(client):
    whole = ask(client, CONVERSATION).choices[0].message.content
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    for streamed in (False, True):
        reply = ask(client, CONVERSATION, stop=["不会出现的", stop], stream=streamed)
        text = (
            "".join(c.choices[0].delta.content or "" for c in reply) if streamed else reply.choices[0].message.content
        )
        assert text == whole[: whole.index(stop)]


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ({"model": "gpt"}, 404, "model 'gpt' does not exist; known: base, sft, besser"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "assistant", "content": "好"}]}, 400, "last message"),
        ({"messages": [{"role": "tool", "content": "好", "tool_call_id": "1"}]}, 400, "role"),
        ({"messages": [{"role": "user", "content": "咳嗽" * 3000}]}, 400, "the question has"),
        ({"temperature": 3}, 400, "temperature"),
        ({"max_tokens": 100_000}, 400, "expected at most 4096"),
        ({"n": 2}, 400, "n: "),
        ({"logprobs": True}, 400, "logprobs"),
        ({"stop": ["1", "2", "3", "4", "5"]}, 400, "stop"),
        ({"messages": [{"role": "user", "content": "长" * 600_000}]}, 413, "larger than 1048576 bytes"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_the_reason(client, options, status, message):
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, **{"messages": CONVERSATION} | options)
    assert caught.value.status_code == status and message in caught.value.body["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"model": 1}', b"\xff\xfe", b'{"model": "base", "messages": "x"}']
)
def test_broken_requests_are_refused(server, body):
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    reply = httpx.post(f"{server[0]}/v1/chat/completions", content=body, headers=headers)
    assert reply.status_code == 400 and reply.json()["error"]["message"]
    if body in (b"", b"{"):
        assert ("not valid JSON" if body else "required") in reply.json()["error"]["message"]
    bare = httpx.post(f"{server[0]}/v1/chat/completions", content=body, headers={"Authorization": f"Bearer {KEY}"})
    assert bare.status_code == 400
    assert ("expected one, sent as application/json" if body else "required") in bare.json()["error"]["message"]


def test_half_a_character_in_a_message_is_an_answer_or_a_refusal(server):
    body = json.dumps({"model": "base", "messages": [{"role": "user", "content": "\ud800咳嗽"}]})
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    reply = httpx.post(f"{server[0]}/v1/chat/completions", content=body, headers=headers)
    assert reply.status_code in (200, 400)


def test_without_the_key_there_is_only_health(server):
    for key in ("falsch", "x" * 10000, "ключ"):
        with pytest.raises((openai.AuthenticationError, openai.APIConnectionError, UnicodeEncodeError)):
            client_of(server[0], key).models.list()
    assert httpx.get(f"{server[0]}/v1/models").status_code == 401
    assert httpx.get(f"{server[0]}/health").json()["status"] == "ok"
    assert httpx.get(f"{server[0]}/docs", headers={"Authorization": f"Bearer {KEY}"}).status_code == 404


def test_a_client_that_leaves_frees_its_place(server, client):
    chunks = ask(client, CONVERSATION, stream=True, max_tokens=1500)
    next(iter(chunks))
    assert httpx.get(f"{server[0]}/health").json()["working"] == 1
    chunks.close()
    assert idle(server[0])
    with pytest.raises(openai.APITimeoutError):
        ask(client.with_options(timeout=0.3), CONVERSATION, max_tokens=1500)
    assert idle(server[0])


def test_a_full_queue_is_429_and_a_slow_answer_ends(folders):
    limits = ["--max_batch_size", 1, "--max_waiting", 1, "--request_seconds", 4]
    with serving(folders, *limits, key=None) as (address, process):
        client = client_of(address, "egal")

        def patient(_):
            try:
                return ask(client, CONVERSATION, max_tokens=1500) and 200
            except openai.APIStatusError as error:
                return error.status_code

        with ThreadPoolExecutor(6) as pool:
            statuses = list(pool.map(patient, range(6)))
        assert statuses.count(429) >= 3 and set(statuses) <= {200, 429, 504}
        assert idle(address)
        # Ends cleanly, also while it answers
        chunks = iter(ask(client, CONVERSATION, stream=True, max_tokens=1500))
        next(chunks)
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(openai.APIError, httpx.HTTPError):
            list(chunks)
        assert process.wait(30) in (0, -signal.SIGTERM)
        assert "Traceback" not in process.stderr.read()


def test_mistakes_in_flags_are_answered_before_torch_loads():
    for words, message in (
        (["--host", "0.0.0.0"], "add --api_key"),
        (["--max_batch_size", "0"], "--max_batch_size"),
        (["--lora_model", "/nirgends"], "no adapter there"),
        (["--max_new_tokens", "9000"], "--max_answer_tokens"),
        (["--knowledge_index", "/nirgends"], "no index"),
    ):
        with pytest.raises(ValueError, match=message):
            api_server.parse_arguments(words)
    code = "import sys, api_server\ntry: api_server.parse_arguments(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'transformers', 'fastapi', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def memory_bytes(process: subprocess.Popen) -> int:
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.slow
def test_two_hundred_requests_of_twenty_clients_some_rude(server, local):
    """Whatever the others do, everyone gets the answer to the own question, and nothing is left behind."""
    address, process = server
    model, encoder = local
    questions = [f"第{n}个问题：{'咳嗽' * (n % 7)}怎么办？" for n in range(200)]
    settings = GenerationSettings(max_new_tokens=TOKENS)
    prompts = [encoder.encode_prompt([{"role": "user", "content": question}]) for question in questions]
    expected = [answer.content for answer in generate_batch(model, encoder, prompts, settings)]
    assert len(set(expected)) == len(questions)  # else an answer to the wrong client would go unseen

    def refused(status: int, *request, **options) -> None:
        with pytest.raises(openai.APIStatusError) as error:
            ask(*request, **options)
        assert error.value.status_code == status

    def one(number: int) -> str:
        client = client_of(address)
        message = [{"role": "user", "content": questions[number]}]
        kind = random.Random(number).random()
        if kind < 0.2:  # drops out in the middle of a stream
            with ask(client, message, stream=True, max_tokens=500) as chunks:
                seen = [chunk.choices[0].delta.content or "" for chunk in itertools.islice(chunks, number % 5)]
            assert expected[number].startswith("".join(seen))
            return "dropped"
        if kind < 0.3:
            refused(413, client, [{"role": "user", "content": "长" * 500_000}])
            return "oversized"
        if kind < 0.4:
            refused(400, client, message, temperature=99)
            return "invalid"
        if kind < 0.7:
            chunks = ask(client, message, stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        return ask(client, message).choices[0].message.content

    def volley() -> list[str]:
        with ThreadPoolExecutor(20) as pool:
            return list(pool.map(one, range(200)))

    threads = threading.active_count()
    outcomes = volley()
    told = ("dropped", "oversized", "invalid")
    assert {outcome for outcome in outcomes if outcome in told} == set(told)
    for number, outcome in enumerate(outcomes):
        assert outcome in told or outcome == expected[number], (number, outcome)
    assert idle(address) and process.poll() is None
    before = memory_bytes(process)
    volley()
    assert idle(address)
    gc.collect()
    assert memory_bytes(process) < before + (64 << 20)
    assert threading.active_count() == threads

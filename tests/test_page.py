"""The page without a browser: its flags, what it keeps, and the answers it gives over its own protocol."""

import json
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from http_server import server
from papers import write_pdf
from peft import LoraConfig, get_peft_model
from tiny import tiny_model, tiny_tokenizer
from transformers import LlamaForCausalLM

import gradio_demo
import inference
from suwen.chat_models import alone, load_chat_models
from suwen.client import EndpointError
from suwen.generation import generate_batch
from suwen.generation_settings import GenerationSettings
from suwen.page.conversation import drop_unanswered, export_json, export_text, history_messages
from suwen.page.feedback import Feedback
from suwen.page.sources import index_files, sources_html
from suwen.page.texts import TEXTS, reason_text, request_language, text
from suwen.retrieval.index import build_index
from suwen.retrieval.settings import RetrievalSettings
from suwen.serving import load_served
from suwen.statistics import wilson_interval
from template import TEMPLATES

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def make_models(root: Path) -> list[str]:
    """A base, two adapters of it and a knowledge base; the flags that name them."""
    chatml = TEMPLATES["chatml"]
    tokenizer = tiny_tokenizer(chatml.special_tokens, chat_template=chatml.jinja)
    tokenizer.pad_token = tokenizer.eos_token
    config = tiny_model(tokenizer).config
    config.max_position_embeddings = 4096
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    for seed, name in enumerate(("sft", "dpo")):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        adapter = get_peft_model(LlamaForCausalLM.from_pretrained(root / "base"), config)
        adapter.peft_config["default"].base_model_name_or_path = str(root / "base")
        adapter.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    papers = root / "papers"
    papers.mkdir()
    for name, content in (("布洛芬", "禁忌：孕晚期禁用布洛芬。"), ("蒙脱石散", "用于成人及儿童急、慢性腹泻。")):
        (papers / f"{name}.txt").write_text(f"{name}\n{content}\n", encoding="utf-8")
    build_index([str(papers)], str(root / "index"))
    words = ["--base_model", root / "base", "--lora_model", root / "sft", root / "dpo"]
    return list(map(str, [*words, "--knowledge_index", root / "index"]))


def said(role, content, title=None):
    return {
        "role": role,
        "content": [{"type": "text", "text": content}],
        "metadata": {"title": title} if title else None,
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0: anyone who can reach it"),
        (["--host", "example.org"], "--auth user:password"),
        (["--host", "::"], "--auth user:password"),
        (["--auth", "user"], "--auth: expected user:password"),
        (["--port", "70000"], "--port: found 70000"),
        (["--share"], "--share is not available"),
        (["--api_base", "http://127.0.0.1:1", "--base_model", "m"], "--api_base and --base_model"),
        (["--api_base", "http://127.0.0.1:1", "--compare_models", "m"], "--api_base and --compare_models"),
        (["--model", "m"], "needs --api_base"),
        (["--max_batch_size", "0"], "--max_batch_size: found 0"),
    ],
)
def test_the_page_refuses_to_be_open_to_everyone_and_flags_that_do_not_fit(words, message):
    with pytest.raises(ValueError, match=message):
        gradio_demo.parse_arguments(words)


def test_the_page_listens_elsewhere_with_a_log_in():
    assert gradio_demo.parse_arguments(["--host", "0.0.0.0", "--auth", "a:b:c"]).auth == "a:b:c"
    assert gradio_demo.parse_arguments(["--host", "::1"]).auth is None


def test_a_port_in_use_is_said_before_the_model_loads():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port}: Address already in use"):
            gradio_demo.main(["--port", str(port), "--base_model", "never/loaded"])


def test_the_pages_history_becomes_messages_without_what_was_shown_beside_them():
    history = [
        said("user", "咳嗽"),
        said("assistant", "请拨打 120", text("referral", "zh")),
        said("assistant", "想一想", "思考过程"),
        said("assistant", "多喝水"),
        said("user", "没有等到回答"),
        said("user", "发热"),
        {"role": "assistant", "content": "休息"},
        said("user", "没有回答"),
        said("assistant", text("no_answer", "zh")),
        said("user", "停在思考"),
        said("assistant", "想一", text("reasoning", "en")),
    ]
    assert history_messages(history) == [
        {"role": "user", "content": "咳嗽"},
        {"role": "assistant", "content": "多喝水", "reasoning_content": "想一想"},
        {"role": "user", "content": "发热"},
        {"role": "assistant", "content": "休息"},
    ]


def test_roles_alternate_whatever_was_stopped():
    messages = [
        {"role": role, "content": content} for role, content in (("user", "a"), ("assistant", " "), ("user", "b"))
    ]
    assert drop_unanswered(messages) == []


def test_an_export_names_the_model_and_that_a_machine_wrote_it():
    messages = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答", "reasoning_content": "想"}]
    row = json.loads(export_json(messages, {"name": "sft", "weights": "abc"}, {"seed": 1}))
    assert row["ai_generated"] is True and row["model"]["weights"] == "abc" and row["messages"] == messages
    for language, label in (("zh", "人工智能生成"), ("en", "AI-generated")):
        exported = export_text(messages, {"name": "sft", "weights": "abc"}, {}, language)
        assert exported.count(label) >= 2 and "abc" in exported and "答" in exported and "想" in exported


def test_votes_are_counted_with_their_interval_and_survive_a_restart(tmp_path):
    file = str(tmp_path / "feedback.jsonl")
    feedback = Feedback(file)
    models = [{"name": "sft"}, {"name": "dpo"}]
    for _ in range(3):
        feedback.vote("dpo", {"sft": "甲", "dpo": "乙"}, "我的电话 13812345678", models)
    feedback.vote("sft", {"sft": "甲", "dpo": "乙"}, "问", models)
    feedback.vote(None, {"sft": "甲", "dpo": "乙"}, "问", models)
    feedback.rate(True, [{"role": "user", "content": "身份证 11010519491231002X"}], models[0])
    for found in (feedback, Feedback(file)):
        first, second = found.standings()
        assert (first.name, first.won, first.voted) == ("dpo", 3, 4) and first.interval == wilson_interval(3, 4)
        assert (second.name, second.won, second.voted) == ("sft", 1, 4) and found.ties == 1
    kept = Path(file).read_text(encoding="utf-8")
    assert "13812345678" not in kept and "11010519491231002X" not in kept and kept.count("[电话]") == 3
    assert Feedback().standings() == []


def test_a_feedback_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "other.jsonl").write_text("not json\n", encoding="utf-8")
    with pytest.raises(ValueError, match="other.jsonl, line 1: not of this program"):
        Feedback(str(tmp_path / "other.jsonl"))
    with pytest.raises(ValueError, match="--feedback_file"):
        Feedback(str(tmp_path))


def test_files_of_a_session_are_searched_shown_as_text_and_removed(tmp_path):
    leaflet = tmp_path / "华法林.txt"
    leaflet.write_text("华法林钠片\n注意事项：避免大量食用菠菜，<b>慎用</b>。\n", encoding="utf-8")
    documents = index_files([str(leaflet)], str(tmp_path), RetrievalSettings(), "zh")
    hits = documents.knowledge.search("华法林能吃菠菜吗", 3)
    shown = sources_html(hits, "避免大量食用菠菜[1]。另见[7]。", "zh")
    assert "&lt;b&gt;慎用" in shown and "<b>慎用" not in shown
    assert "回答中引用" in shown and "不存在的资料：7" in shown and "相关度" in shown
    folder = Path(documents.folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    documents.remove()
    assert not folder.exists()
    with pytest.raises(ValueError, match="最多 10 个文件"):
        index_files([str(leaflet)] * 11, str(tmp_path), RetrievalSettings(), "zh")
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.4 broken")
    with pytest.raises(ValueError):
        index_files([str(tmp_path / "broken.pdf")], str(tmp_path), RetrievalSettings(), "zh")
    assert not list(tmp_path.glob("documents-*"))


def test_every_text_is_there_in_both_languages_with_the_same_places():
    for zh, en in TEXTS.values():
        assert zh and en and sorted(re.findall(r"\{\d", zh)) == sorted(re.findall(r"\{\d", en))
    assert request_language("auto", "en-US,en;q=0.9") == "en"
    assert request_language("auto", "zh-CN,zh;q=0.9,en;q=0.8") == request_language("auto", "") == "zh"
    assert request_language("zh", "en-US") == "zh"


def test_why_a_file_cannot_be_read_is_said_in_the_language_of_the_page(tmp_path):
    scan = write_pdf(tmp_path / "扫描件.pdf", [""])
    for language, said in (("zh", "扫描件.pdf: 没有文字: 可能是扫描件"), ("en", "no text in it: scanned perhaps")):
        with pytest.raises(ValueError) as error:
            index_files([str(scan)], str(tmp_path), RetrievalSettings(), language)
        told = reason_text(str(error.value), language)
        assert said in told and "--documents" not in told


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("page"))


@pytest.mark.training
def test_page_terminal_and_training_share_prompts_and_greedy_answers(flags):
    """The API stands beside them in test_api.py, against the same `generate_batch`."""
    system, question = {"role": "system", "content": "你是医生。"}, {"role": "user", "content": "咳嗽怎么办？"}
    turns = [question, {"role": "assistant", "content": "多喝水。"}, {"role": "user", "content": "发热呢？"}]
    settings = GenerationSettings(max_new_tokens=24)
    models = load_chat_models(gradio_demo.parse_arguments([*flags, "--use_cpu"]))
    try:
        assert list(models) == ["sft", "base", "dpo"]  # the first adapter answers unless another is chosen
        different = set()
        for name, model in models.items():
            words = ["--base_model", flags[1]] + (
                ["--lora_model", str(Path(flags[1]).parent / name)] * (name != "base")
            )
            served = load_served(inference.parse_arguments([*words, "--use_cpu"]))
            for messages in ([question], [system, *turns]):
                page, terminal = (ask(messages, settings, None) for ask in (model.ask, alone(served)))
                ids = served.encoder.encode_prompt(messages)
                rows, _ = served.encoder.encode_conversation(
                    [*messages, {"role": "assistant", "content": "就医。"}], None
                )
                assert page.prompt_ids == terminal.prompt_ids == ids == rows[-1]["input_ids"][: len(ids)]
                expected = generate_batch(served.model, served.encoder, [ids], settings)[0]
                answers = ["".join(piece for _, piece in reply.pieces) for reply in (page, terminal)]
                assert answers == [expected.content] * 2 and page.tokens == len(expected.token_ids)
                different.add(expected.content)
        assert len(different) == 6
    finally:
        for model in models.values():
            model.close()


@pytest.mark.training
def test_people_who_ask_at_the_same_time_get_their_own_answers_and_stop_their_own(flags):
    models = load_chat_models(gradio_demo.parse_arguments([*flags, "--use_cpu"]))
    settings = GenerationSettings(max_new_tokens=20)
    questions = [f"第{number}个问题：咳嗽？" for number in range(6)]

    def ask(number):
        model = models[("base", "sft", "dpo")[number % 3]]
        return "".join(
            text for _, text in model.ask([{"role": "user", "content": questions[number]}], settings, None).pieces
        )

    try:
        alone_answers = [ask(number) for number in range(6)]
        endless = models["base"].ask([{"role": "user", "content": "长"}], GenerationSettings(max_new_tokens=3000), None)
        next(endless.pieces)
        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(ask, range(6))) == alone_answers
        endless.pieces.close()
        seen = endless.tokens
        assert [ask(number) for number in range(6)] == alone_answers and endless.tokens == seen
    finally:
        for model in models.values():
            model.close()


@pytest.mark.training
def test_an_endpoint_answers_behind_the_page():
    parts = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}]
    parts += [{"choices": [{"delta": {"reasoning_content": "想"}}]}]
    parts += [{"choices": [{"delta": {"content": piece}}]} for piece in ("多喝", "水\u2028。")]
    parts += [{"choices": [], "usage": {"completion_tokens": 7}}]
    stream = "".join(f"data: {json.dumps(part, ensure_ascii=False)}\n\n" for part in parts) + "data: [DONE]\n\n"
    with server(lambda body, number: (200, {"content-type": "text/event-stream"}, stream.encode())) as (address, seen):
        models = load_chat_models(gradio_demo.parse_arguments(["--api_base", address, "--model", "a, b"]))
        assert list(models) == ["a", "b"]
        reply = models["b"].ask([{"role": "user", "content": "咳嗽"}], GenerationSettings(max_new_tokens=9), None)
        assert list(reply.pieces) == [("reasoning", "想"), ("content", "多喝"), ("content", "水\u2028。")]
        assert reply.tokens == 7
        body = seen[0][2]
        assert body["model"] == "b" and body["stream"] is True and body["max_tokens"] == 9 and body["temperature"] == 0


def test_a_refusal_of_the_endpoint_is_told():
    with server(lambda body, number: (429, {}, {"error": {"message": "full"}})) as (address, _):
        models = load_chat_models(gradio_demo.parse_arguments(["--api_base", address, "--model", "a"]))
        reply = models["a"].ask([{"role": "user", "content": "咳嗽"}], GenerationSettings(), None)
        with pytest.raises(EndpointError, match="HTTP 429: full"):
            next(reply.pieces)


@pytest.mark.distributed
def test_the_page_streams_over_turns_stops_and_asks_for_the_log_in(flags, tmp_path):
    gradio_client = pytest.importorskip("gradio_client")
    port = free_port()
    words = [*flags, "--use_cpu", "--port", str(port), "--auth", "doctor:secret:word"]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen([sys.executable, "gradio_demo.py", *words], cwd=ROOT, stdout=log, stderr=log)
    served = load_served(inference.parse_arguments(["--lora_model", str(Path(flags[1]).parent / "sft"), "--use_cpu"]))
    try:
        deadline = time.monotonic() + 180
        while b"page: http" not in (tmp_path / "log").read_bytes():
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.2)
        address = f"http://127.0.0.1:{port}"
        with pytest.raises(Exception, match="(?i)auth|log"):
            gradio_client.Client(address, verbose=False)
        assert httpx.post(f"{address}/gradio_api/upload", content=b"x" * (33 << 20)).status_code == 413
        client = gradio_client.Client(address, auth=("doctor", "secret:word"), verbose=False)

        def ask_page(question, max_new_tokens):
            return client.submit(question, "sft", "你是医生", max_new_tokens, 0, 0.9, 0, 1, "", False, api_name="/chat")

        def expected(messages):
            settings = GenerationSettings(max_new_tokens=24)
            return generate_batch(served.model, served.encoder, [served.encoder.encode_prompt(messages)], settings)[0]

        messages = [{"role": "system", "content": "你是医生"}, {"role": "user", "content": "咳嗽"}]
        first = ask_page("咳嗽", 24).result()[0]
        assert first == expected(messages).content
        messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "发热呢？"}]
        assert ask_page("发热呢？", 24).result()[0] == expected(messages).content
        long = ask_page("头痛", 3900)
        while not long.outputs():
            time.sleep(0.05)
        long.cancel()
        with pytest.raises(Exception, match="请先输入问题|empty"):
            ask_page("  ", 4).result()
    finally:
        process.terminate()
        process.wait(timeout=60)

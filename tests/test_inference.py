"""Answers: batches, streams, stops, files that go on where they were cut off, the terminal."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_model, tiny_tokenizer
from transformers import GenerationConfig, LlamaForCausalLM

import inference
from suwen.chat_models import Reply
from suwen.encoding import ChatEncoder
from suwen.generation import (
    AnswerDecoder,
    Draw,
    GenerationSettings,
    decode_answer,
    fit_prompt,
    generate_batch,
    stream,
)
from suwen.prompts import load_prompts, parse_prompt
from suwen.tables import printable
from template import TEMPLATES

pytestmark = pytest.mark.training

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = (
    "高血压应当注意什么？",
    "咳嗽",
    "What is a fever?",
    "请问医生，我最近咳嗽、发热，应该做哪些检查？",
    "糖尿病",
)
THOUGHTFUL = "<think>\n先想一想 fever。\n</think>\n\n应该多喝水。"


def chatml_tokenizer(added_tokens=()):
    chatml = TEMPLATES["chatml"]
    tokenizer = tiny_tokenizer(chatml.special_tokens, chat_template=chatml.jinja, added_tokens=added_tokens)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def wide_window(tokenizer, seed=0, window=4096) -> LlamaForCausalLM:
    model = tiny_model(tokenizer, seed)
    config = model.config
    config.max_position_embeddings = window
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return chatml_tokenizer()


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return ChatEncoder(tokenizer)


@pytest.fixture(scope="module")
def model(tokenizer):
    return wide_window(tokenizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, folder, tokenizer) -> Path:
    return save_adapter(folder, tmp_path_factory.mktemp("lora") / "adapter", tokenizer)


def save_adapter(base: Path, target: Path, tokenizer, seed: int = 1) -> Path:
    torch.manual_seed(seed)
    settings = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(LlamaForCausalLM.from_pretrained(base), settings).save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def prompts_of(encoder) -> list[list[int]]:
    return [encoder.encode_prompt(user(text)) for text in QUESTIONS]


def joined(pieces, kind="content") -> str:
    return "".join(piece.text for piece in pieces if piece.kind == kind)


# Generation


def test_greedy_answers_are_those_of_a_loop_without_cache_and_padding(model, encoder):
    settings = GenerationSettings(max_new_tokens=12)
    for prompt, answer in zip(
        prompts_of(encoder), generate_batch(model, encoder, prompts_of(encoder), settings), strict=True
    ):
        ids = list(prompt)
        while len(ids) < len(prompt) + 12 and (len(ids) == len(prompt) or ids[-1] not in encoder.stop_token_ids):
            with torch.no_grad():
                ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        assert answer.token_ids == ids[len(prompt) :]


@pytest.mark.parametrize(
    "settings",
    [
        GenerationSettings(max_new_tokens=24),
        GenerationSettings(max_new_tokens=24, repetition_penalty=1.3),
        GenerationSettings(max_new_tokens=24, temperature=0.9, top_p=0.8, top_k=40, seed=5),
    ],
    ids=["greedy", "penalty", "drawn"],
)
def test_a_batch_gives_the_answers_of_one_by_one(model, encoder, settings):
    prompts = prompts_of(encoder)
    seeds = list(range(100, 100 + len(prompts)))
    together = generate_batch(model, encoder, prompts, settings, seeds)
    alone = [generate_batch(model, encoder, [p], settings, [s])[0] for p, s in zip(prompts, seeds, strict=True)]
    assert together == alone
    assert len({tuple(answer.token_ids) for answer in together}) > 1


def test_a_stream_joins_to_the_answer_of_the_batch(model, encoder):
    settings = GenerationSettings(max_new_tokens=60, temperature=1.0, seed=3)
    for prompt in prompts_of(encoder):
        pieces = list(stream(model, encoder, prompt, settings))
        assert joined(pieces) == generate_batch(model, encoder, [prompt], settings)[0].content
        assert len(pieces) > 5


def test_no_seed_gives_another_answer_each_time_and_a_seed_the_same(model, encoder):
    def answer(seed):
        settings = GenerationSettings(max_new_tokens=20, temperature=2.0, top_p=1.0, seed=seed)
        return generate_batch(model, encoder, prompts_of(encoder)[:1], settings)[0].token_ids

    assert answer(1) == answer(1) != answer(2)
    assert answer(None) != answer(None)


def test_top_k_of_one_and_a_tiny_nucleus_are_greedy(model, encoder):
    prompts = prompts_of(encoder)
    greedy = generate_batch(model, encoder, prompts, GenerationSettings(max_new_tokens=10))
    assert greedy == generate_batch(model, encoder, prompts, GenerationSettings(10, temperature=5.0, top_k=1))
    assert greedy == generate_batch(model, encoder, prompts, GenerationSettings(10, temperature=0.5, top_p=1e-9))


def test_draws_follow_the_distribution():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()[None].repeat(4000, 1)
    ids = torch.zeros(4000, 1, dtype=torch.long)
    draw = Draw(GenerationSettings(temperature=1.0, top_p=1.0), ids, torch.ones_like(ids), range(4000))
    counts = torch.bincount(draw(ids, logits).argmax(-1), minlength=4) / 4000
    assert torch.allclose(counts, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.03)


def test_the_penalty_counts_prompt_and_answer_but_not_padding():
    prompt, mask = torch.tensor([[0, 2]]), torch.tensor([[0, 1]])  # token 0 is padding here
    draw = Draw(GenerationSettings(repetition_penalty=2.0), prompt, mask, [0])
    logits = torch.tensor([[1.0, 1.0, 1.0, -1.0]])
    assert draw(prompt, logits).tolist() == [[1.0, 1.0, 0.5, -1.0]]
    assert draw(torch.tensor([[0, 2, 3]]), logits).tolist() == [[1.0, 1.0, 0.5, -2.0]]


def test_settings_in_the_models_folder_do_not_leak_into_answers(model, encoder):
    settings = GenerationSettings(max_new_tokens=12)
    plain = generate_batch(model, encoder, prompts_of(encoder), settings)
    kept = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, top_k=7, top_p=0.3, repetition_penalty=9.0, max_length=4, num_beams=3
    )
    try:
        assert generate_batch(model, encoder, prompts_of(encoder), settings) == plain
    finally:
        model.generation_config = kept


def test_an_answer_ends_at_any_stop_token_and_does_not_show_it(model, tokenizer):
    encoder = ChatEncoder(tokenizer)
    [prompt] = prompts_of(encoder)[:1]
    free = generate_batch(model, encoder, [prompt], GenerationSettings(max_new_tokens=20))[0]
    assert free.finish_reason == "length" and len(free.token_ids) == 20
    place = next(i for i in range(3, 20) if free.token_ids[i] not in free.token_ids[:i])
    encoder.stop_token_ids = [*encoder.stop_token_ids, free.token_ids[place]]
    others = [encoder.encode_prompt(user("咳嗽")), prompt]
    stopped = generate_batch(model, encoder, others, GenerationSettings(max_new_tokens=20))[1]
    assert stopped.token_ids == free.token_ids[: place + 1] and stopped.finish_reason == "stop"
    assert stopped.content == decode_answer(encoder, prompt, free.token_ids[:place]).content
    assert joined(stream(model, encoder, prompt, GenerationSettings(max_new_tokens=20))) == stopped.content


def test_closing_a_stream_stops_the_model(model, encoder):
    pieces = stream(model, encoder, prompts_of(encoder)[0], GenerationSettings(max_new_tokens=3000))
    next(pieces)
    started = time.perf_counter()
    pieces.close()
    assert time.perf_counter() - started < 10
    assert not [thread for thread in threading.enumerate() if thread.name == "generation"]


def test_an_error_of_the_model_reaches_the_reader_of_the_stream(model, encoder):
    with pytest.raises(IndexError):
        list(stream(model, encoder, [10**6], GenerationSettings(max_new_tokens=2)))


# Text


@pytest.mark.parametrize("style", ["byte", "metaspace"])
def test_a_stream_never_shows_half_a_character(style):
    text = "龘血压😀升高 due to 鑫淼焱垚，please 就医。"
    encoder = ChatEncoder(tiny_tokenizer(style=style, chat_template=TEMPLATES["vicuna"].jinja))
    ids = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(text)  # characters are spread over several tokens
    decoder = AnswerDecoder(encoder, [])
    pieces = [piece for token_id in ids for piece in decoder.push(token_id)] + decoder.finish()
    assert "\ufffd" not in joined(pieces)
    assert joined(pieces) == text
    assert len(pieces) > 15


def test_half_a_character_at_the_end_is_dropped(encoder):
    ids = encoder.tokenizer("发热龘", add_special_tokens=False)["input_ids"]
    assert decode_answer(encoder, [], ids[:-1]).content == "发热"


@pytest.mark.parametrize("added", [(), ("<think>", "</think>")], ids=["spelled", "tokens"])
@pytest.mark.parametrize("opened", [False, True])
def test_thinking_is_kept_apart(added, opened):
    encoder = ChatEncoder(chatml_tokenizer(added))
    prompt, answer = "<|im_start|>assistant\n", THOUGHTFUL
    if opened:
        prompt, answer = prompt + "<think>\n", answer.removeprefix("<think>\n")
    prompt_ids, ids = (encoder.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer))
    whole = decode_answer(encoder, prompt_ids, [*ids, encoder.stop_token_ids[0]])
    assert (whole.reasoning, whole.content, whole.finish_reason) == ("先想一想 fever。", "应该多喝水。", "stop")
    cut = decode_answer(encoder, prompt_ids, ids[: len(ids) // 2])
    assert cut.content == "" and whole.reasoning.startswith(cut.reasoning) and cut.finish_reason == "length"


def test_angle_brackets_that_only_look_like_thinking_stay(encoder):
    for text in ("<thin 是瘦的意思", "体温 <37 为正常", "a <think> b"):
        ids = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert decode_answer(encoder, [], ids).content == text


def test_special_tokens_never_show(encoder):
    tokenizer = encoder.tokenizer
    ids = tokenizer("<|im_start|>多喝水<|im_start|>，休息<s>。", add_special_tokens=False)["input_ids"]
    assert decode_answer(encoder, [], ids).content == "多喝水，休息。"


# The model's window


def test_a_long_conversation_loses_its_oldest_turns(encoder):
    messages = [{"role": "system", "content": "你是医生。"}]
    for number in range(20):
        messages += user(f"第{number}个问题：咳嗽怎么办？")
        messages += [{"role": "assistant", "content": f"第{number}个回答：多喝水，注意休息。"}]
    messages += user("还要检查吗？")
    ids, dropped = fit_prompt(encoder, messages, 256, 64)
    text = encoder.tokenizer.decode(ids)
    assert 96 < len(ids) <= 192 and dropped > 0
    assert "你是医生" in text and "第0个问题" not in text and text.count("第19个") == 2 and "还要检查吗" in text
    assert text.endswith("<|im_start|>assistant\n")
    assert fit_prompt(encoder, messages, None, 64)[1] == fit_prompt(encoder, messages, 10**6, 64)[1] == 0


def test_a_question_longer_than_the_window_is_refused(encoder):
    with pytest.raises(ValueError, match="question has .* tokens, expected at most 64"):
        fit_prompt(encoder, user("咳嗽" * 200), 128, 512)


def test_an_answer_ends_where_the_window_does(tokenizer, encoder):
    model = wide_window(tokenizer, window=64)
    prompts = [encoder.encode_prompt(user(text)) for text in ("咳嗽", "高血压应当注意什么，还有糖尿病？")]
    answers = generate_batch(model, encoder, prompts, GenerationSettings(max_new_tokens=500))
    assert [len(p) + len(a.token_ids) for p, a in zip(prompts, answers, strict=True)] == [64, 64]
    with pytest.raises(ValueError, match="leaves no room in the model's window of 64"):
        generate_batch(model, encoder, [[5] * 64], GenerationSettings())


# Questions in files


@pytest.mark.parametrize(
    "row",
    [
        "发热怎么办？",
        {"prompt": "发热怎么办？"},
        {"prompt": [{"role": "user", "content": "发热怎么办？"}], "chosen": "a", "rejected": "b"},
        {"messages": [{"role": "user", "content": "发热怎么办？"}]},
        {"messages": [{"role": "user", "content": "发热怎么办？"}, {"role": "assistant", "content": "多喝水"}]},
        {"conversations": [{"from": "human", "value": "发热怎么办？"}, {"from": "gpt", "value": "多喝水"}]},
        {"instruction": "发热怎么办？", "input": ""},
        {"instruction": "发热怎么办？", "input": None, "output": ""},
        {"question": "发热怎么办？", "answer": None},
        {"Question": "发热怎么办？", "Complex_CoT": "想", "Response": "多喝水"},
        {"questions": [["发热怎么办？", "发热了？"]], "answers": ["多喝水"]},
    ],
)
def test_a_question_is_found_in_rows_of_any_shape(row):
    assert parse_prompt(row, "f.jsonl, line 1") == user("发热怎么办？")


def test_instruction_input_history_and_system_become_one_prompt():
    row = {"instruction": "判断疾病", "input": "咳嗽三天", "history": [["你好", "您好"]], "system": "你是医生"}
    assert [(m["role"], m["content"]) for m in parse_prompt(row, "f")] == [
        ("system", "你是医生"),
        ("user", "你好"),
        ("assistant", "您好"),
        ("user", "判断疾病\n咳嗽三天"),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"foo": 1}, "found the keys foo, expected a prompt"),
        ({"messages": []}, "messages is an empty list"),
        ({"messages": [{"role": "system", "content": "a"}]}, "found no question"),
        ({"messages": [{"role": "oracle", "content": "a"}]}, "'oracle'"),
        ({"prompt": "  "}, "prompt is empty"),
        ({"prompt": 3}, "prompt is a number"),
        (7, "found int"),
    ],
)
def test_a_row_without_a_question_is_refused_by_its_place(tmp_path, row, message):
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"questions.jsonl, line 2.*({message})"):
        load_prompts(str(file))


def test_plain_text_in_gb18030_is_a_prompt_a_line(tmp_path):
    file = tmp_path / "questions.txt"
    file.write_bytes("发热怎么办？\r\n\r\n高血压的饮食注意事项有哪些？\r\n".encode("gb18030"))
    prompts = load_prompts(str(file), system_prompt="你是医生")
    assert [p.messages[-1]["content"] for p in prompts] == ["发热怎么办？", "高血压的饮食注意事项有哪些？"]
    assert all(p.messages[0] == {"role": "system", "content": "你是医生"} for p in prompts)


# The command line: files


def ask(folder, *words) -> None:
    inference.main(["--base_model", str(folder), "--max_new_tokens", "16", "--use_cpu", *map(str, words)])


def read_rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def questions(tmp_path) -> Path:
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"prompt": q}) + "\n" for q in QUESTIONS), encoding="utf-8")
    return file


def test_a_file_of_questions_is_answered_in_its_order(folder, questions, tmp_path, model, encoder):
    output = tmp_path / "deep" / "answers.jsonl"
    ask(folder, "--data_file", questions, "--output_file", output, "--batch_size", 2, "--with_prompt")
    rows = read_rows(output)
    assert [row["index"] for row in rows] == list(range(5))
    assert [row["prompt"] for row in rows] == list(QUESTIONS)
    expected = generate_batch(model, encoder, prompts_of(encoder), GenerationSettings(max_new_tokens=16))
    assert [row["response"] for row in rows] == [answer.content for answer in expected]
    assert all(row["num_tokens"] <= 16 and row["finish_reason"] in ("stop", "length") for row in rows)


def test_a_file_that_was_cut_off_goes_on_to_the_same_answers(folder, questions, tmp_path, capsys):
    words = ("--data_file", questions, "--batch_size", 2, "--temperature", 1, "--seed", 7)
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    ask(folder, *words, "--predictions_file", whole)
    ask(folder, *words, "--predictions_file", cut)
    lines = cut.read_bytes().splitlines(keepends=True)
    cut.write_bytes(lines[4] + lines[1] + lines[2][:-9])  # in the order of finishing, the last one half written
    capsys.readouterr()
    ask(folder, *words, "--predictions_file", cut)
    assert cut.read_bytes() == whole.read_bytes()
    assert "2 of 5 questions are answered already" in capsys.readouterr().err
    ask(folder, *words, "--predictions_file", cut)  # nothing left to do
    assert cut.read_bytes() == whole.read_bytes()


def test_answers_of_another_run_are_never_mixed_or_overwritten(folder, questions, tmp_path):
    output = tmp_path / "answers.jsonl"
    words = ("--data_file", questions, "--output_file", output)
    ask(folder, *words)
    before = output.read_bytes()
    with pytest.raises(ValueError, match="another run .temperature was 0.0, is 1.0.; give another --output_file"):
        ask(folder, *words, "--temperature", 1)
    questions.write_text('{"prompt": "别的问题"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="another run .questions"):
        ask(folder, *words)
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text('{"prompt": "别的"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="foreign.jsonl, line 1 is not an answer of this program"):
        ask(folder, "--data_file", questions, "--output_file", foreign)
    with pytest.raises(ValueError, match="questions.jsonl, line 1 is not an answer"):
        ask(folder, "--data_file", questions, "--output_file", questions)
    assert output.read_bytes() == before
    assert foreign.read_text(encoding="utf-8") == '{"prompt": "别的"}\n'


def test_a_table_holds_the_same_answers_and_is_written_in_the_end(folder, questions, tmp_path):
    import csv

    ask(folder, "--data_file", questions, "--output_file", tmp_path / "a.jsonl")
    ask(folder, "--data_file", questions, "--output_file", tmp_path / "a.csv")
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text("utf-8").splitlines()]
    with open(tmp_path / "a.csv", encoding="utf-8-sig", newline="") as stream:
        assert list(csv.DictReader(stream)) == [{name: str(value) for name, value in row.items()} for row in rows]
    written = (tmp_path / "a.csv").read_bytes()
    ask(folder, "--data_file", questions, "--output_file", tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_bytes() == written
    (tmp_path / "other.csv").write_text("x\n")
    with pytest.raises(ValueError, match="not of this program"):
        ask(folder, "--data_file", questions, "--output_file", tmp_path / "other.csv")


def test_a_question_too_long_for_the_model_is_named_before_any_answer(folder, tmp_path):
    file = tmp_path / "q.txt"
    file.write_text("咳嗽\n" + "咳嗽" * 5000 + "\n", encoding="utf-8")
    output = tmp_path / "a.jsonl"
    with pytest.raises(ValueError, match="q.txt, line 2: the question has .* tokens, expected at most"):
        ask(folder, "--data_file", file, "--output_file", output)


def test_without_a_task_the_examples_are_answered(folder, capsys):
    ask(folder, "--temperature", "0.7", "--seed", 1)
    printed = capsys.readouterr().out
    assert printed.count("问：") == printed.count("答：") == len(inference.EXAMPLES)


# The command line: adapters


def first_answer(capsys, *words) -> str:
    capsys.readouterr()
    inference.main([*map(str, words), "--max_new_tokens", "16", "--use_cpu"])
    return capsys.readouterr().out


def test_an_adapter_finds_its_base_and_answers_as_on_it(folder, adapter, capsys):
    alone = first_answer(capsys, "--base_model", folder)
    on_base = first_answer(capsys, "--base_model", folder, "--lora_model", adapter)
    assert on_base != alone
    assert first_answer(capsys, "--lora_model", adapter) == on_base
    assert first_answer(capsys, "--base_model", adapter) == on_base


def test_adapters_are_put_on_in_order(folder, adapter, tmp_path, tokenizer, capsys):
    merged = tmp_path / "merged"
    from peft import PeftModel

    PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder), adapter).merge_and_unload().save_pretrained(
        merged
    )
    tokenizer.save_pretrained(merged)
    second = save_adapter(merged, tmp_path / "second", tokenizer, seed=2)
    expected = first_answer(capsys, "--lora_model", second)
    # The second one's record names the folder that the first one would be merged into: let it name the adapter.
    settings = json.loads((second / "adapter_config.json").read_text())
    (second / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(adapter)}))
    assert first_answer(capsys, "--base_model", folder, "--lora_model", f"{adapter},{second}") == expected
    with pytest.raises(ValueError, match="trained on top of the adapter"):
        first_answer(capsys, "--base_model", folder, "--lora_model", second)


def test_an_adapter_of_another_base_is_refused(adapter, tmp_path, tokenizer):
    other = tmp_path / "other"
    wide_window(tokenizer, seed=9).save_pretrained(other)
    tokenizer.save_pretrained(other)
    with pytest.raises(ValueError, match="was trained on .* whose weights differ"):
        ask(other, "--lora_model", adapter)


@pytest.mark.parametrize("old", ["--load_in_4bit", "--load_in_8bit"])
def test_quantised_models_answer_with_an_adapter_on_top(folder, adapter, capsys, caplog, old):
    assert first_answer(capsys, "--base_model", folder, "--lora_model", adapter, old).count("答：") == 4
    assert not caplog.records  # a line of bitsandbytes for every product of 8-bit weights


# The command line: mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora_model", "nowhere"], "--lora_model nowhere: found no such folder"),
        (["--gpus", "a"], "--gpus a: expected GPU numbers"),
        (["--gpus", "0", "--use_cpu"], "--gpus and --use_cpu"),
        (["--temperature", "-1"], "--temperature: found -1.0"),
        (["--temperature", "nan"], "--temperature: found nan"),
        (["--top_p", "0"], "--top_p: found 0.0"),
        (["--max_new_tokens", "0"], "--max_new_tokens: found 0"),
        (["--batch_size", "0"], "--batch_size: found 0"),
        (["--template_name", "nothing"], "unknown --template_name 'nothing'"),
        (["--stop_str", "</s>"], "--stop_str is not available"),
        (["--max_length", "9"], "--max_length is not available: use --max_new_tokens"),
        (["--interactive", "--data_file", "x"], "--interactive and --data_file"),
        (["--output_file", "x"], "--output_file: needs --data_file"),
        (["--unknown_flag"], "--unknown_flag"),
    ],
)
def test_mistakes_in_flags_are_named(words, message):
    with pytest.raises(ValueError, match=message):
        inference.parse_arguments(words)


def test_a_tokenizer_larger_than_the_model_is_explained(folder, tmp_path):
    larger = chatml_tokenizer()
    larger.add_tokens(["阿莫西林", "布洛芬"])
    larger.save_pretrained(tmp_path / "larger")
    with pytest.raises(ValueError, match="tokenizer has .* tokens, the model's embedding"):
        ask(folder, "--tokenizer_path", tmp_path / "larger")


@pytest.mark.distributed
def test_a_missing_model_is_one_line_and_exit_code_2():
    ran = subprocess.run(
        [sys.executable, "inference.py", "--base_model", "/no/such/model"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 2
    [line] = [line for line in ran.stderr.splitlines() if line]
    assert line.startswith("inference.py: error: --base_model /no/such/model: found no such folder")


@pytest.mark.parametrize("script", ["inference", "gradio_demo"])
def test_help_and_mistakes_are_answered_before_torch_loads(script):
    code = (
        f"import sys, {script}\n"
        f"for words in (['--help'], ['--bogus'], ['--top_p', '7'], ['--base_model', '/no/such/model']):\n"
        f"    try: {script}.parse_arguments(words)\n"
        f"    except (SystemExit, ValueError): pass\n"
        f"assert not {{'torch', 'transformers', 'gradio'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


# The terminal


def converse(folder, capsys, monkeypatch, lines: list[str], *words) -> str:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    ask(folder, "--interactive", *words)
    return capsys.readouterr().out


def test_a_conversation_goes_on_over_turns_until_it_is_cleared(folder, capsys, monkeypatch, model, encoder):
    printed = converse(folder, capsys, monkeypatch, ["咳嗽", "发热呢？", "/clear", "发热呢？", "/help", "/what"])
    settings = GenerationSettings(max_new_tokens=16)

    def answer(messages):
        return generate_batch(model, encoder, [encoder.encode_prompt(messages)], settings)[0].content

    first = answer(user("咳嗽"))
    second = answer([*user("咳嗽"), {"role": "assistant", "content": first}, *user("发热呢？")])
    third = answer(user("发热呢？"))
    assert second != third
    answers = [part.split("\n")[0] for part in printed.split("答：")[1:]]
    assert answers == [printable(text) for text in (first, second, third)]
    assert "/clear  " in printed and "unknown command /what" in printed


def test_an_empty_answer_is_said_and_forgotten(capsys):
    def nothing(messages, settings, knowledge):
        return Reply(piece for piece in ())

    conversation = inference.Chat(["m"], nothing, inference.parse_arguments(["--interactive"]))
    conversation.ask("咳嗽")
    assert capsys.readouterr().out == "(the model gave no answer)\n" and conversation.turns == []


def test_several_lines_are_one_question(folder, capsys, monkeypatch, model, encoder):
    settings = GenerationSettings(max_new_tokens=16)
    lines = ["我咳嗽，\\", "发热", '"""第一行', "", '第三行"""']
    printed = converse(folder, capsys, monkeypatch, lines, "--single_turn")
    expected = [
        generate_batch(model, encoder, [encoder.encode_prompt(user(text))], settings)[0].content
        for text in ("我咳嗽，\n发热", "第一行\n\n第三行")
    ]
    assert [part.split("\n")[0] for part in printed.split("答：")[1:]] == [printable(text) for text in expected]


def test_the_system_prompt_can_be_set_and_a_conversation_saved(folder, capsys, monkeypatch, tmp_path, model, encoder):
    file = tmp_path / "chat.jsonl"
    lines = [
        f"/save {file}",
        "/system 你是医生",
        "咳嗽",
        f"/save {file}",
        "/save /no/such/folder/x",
        "/system",
        "/save",
    ]
    printed = converse(folder, capsys, monkeypatch, lines)
    assert "nothing to save" in printed and "No such file" in printed and "expected a file" in printed
    [row] = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    system = {"role": "system", "content": "你是医生"}
    answer = generate_batch(
        model, encoder, [encoder.encode_prompt([system, *user("咳嗽")])], GenerationSettings(max_new_tokens=16)
    )[0].content
    assert row["messages"] == [system, *user("咳嗽"), {"role": "assistant", "content": answer}] and row["ai_generated"]


@pytest.fixture(scope="module")
def knowledge_folder(tmp_path_factory) -> Path:
    from suwen.retrieval.index import build_index

    folder = tmp_path_factory.mktemp("knowledge")
    for name, text in (("布洛芬", "禁忌：孕晚期禁用。"), ("蒙脱石散", "用于成人及儿童急、慢性腹泻。")):
        (folder / f"{name}.txt").write_text(f"{name}\n{text}\n", encoding="utf-8")
    build_index([str(folder / "*.txt")], str(folder / "index"))
    return folder / "index"


def test_the_terminal_answers_from_passages_and_shows_them(
    folder, knowledge_folder, capsys, monkeypatch, model, encoder
):
    from suwen.retrieval.grounding import NOT_FOUND, with_passages
    from suwen.retrieval.search import KnowledgeBase

    question = "布洛芬有什么禁忌？"
    printed = converse(
        folder, capsys, monkeypatch, [question, "明天的股市行情", "/retrieve 腹泻", "/retrieve"],
        "--knowledge_index", knowledge_folder, "--single_turn",
    )  # fmt: skip
    [hit] = KnowledgeBase(str(knowledge_folder)).search(question)
    ids = encoder.encode_prompt(with_passages(user(question), [hit.passage]))
    answer = generate_batch(model, encoder, [ids], GenerationSettings(max_new_tokens=16))[0].content
    assert f"答：{printable(answer)}\n资料" in printed and "[1] 布洛芬（布洛芬.txt" in printed
    assert f"答：{NOT_FOUND}" in printed
    assert "[1] 蒙脱石散" in printed and "expected a question" in printed


def test_a_file_of_questions_is_answered_from_passages(folder, knowledge_folder, tmp_path, questions):
    from suwen.retrieval.grounding import NOT_FOUND

    file, output = tmp_path / "q.txt", tmp_path / "a.jsonl"
    file.write_text("布洛芬有什么禁忌？\n明天的股市行情\n", encoding="utf-8")
    ask(folder, "--data_file", file, "--output_file", output, "--knowledge_index", knowledge_folder)
    found, unknown = (json.loads(line) for line in output.read_text("utf-8").splitlines())
    assert found["sources"][0]["text"] == "布洛芬\n禁忌：孕晚期禁用。" and found["citations"]["cited"] == []
    assert unknown["response"] == NOT_FOUND and unknown["sources"] == [] and unknown["num_tokens"] == 0
    with pytest.raises(ValueError, match="another run .knowledge"):
        ask(folder, "--data_file", file, "--output_file", output)


def test_exit_leaves_and_questions_that_do_not_fit_are_told(folder, capsys, monkeypatch):
    printed = converse(folder, capsys, monkeypatch, ["咳嗽" * 5000, "/exit", "咳嗽"], "--system_prompt", "你是医生")
    assert "(the question has" in printed and printed.count("答：") == 1


@pytest.mark.distributed
def test_ctrl_c_stops_the_answer_and_not_the_program(folder):
    words = ["--base_model", str(folder), "--use_cpu", "--interactive", "--max_new_tokens", "3000"]
    process = subprocess.Popen(
        [sys.executable, "-u", "inference.py", *words],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdin and process.stdout
    try:
        process.stdin.write("咳嗽\n".encode())
        process.stdin.flush()
        seen = b""
        while "答：".encode() not in seen or len(seen.split("答：".encode())[1]) < 40:  # the answer is on its way
            byte = process.stdout.read(1)
            assert byte, "the program ended"
            seen += byte
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(b"/exit\n", timeout=60)
        assert b"(stopped)" in rest and process.returncode == 0
    finally:
        process.kill()
        process.wait()

"""Requests that join and leave a running batch."""

import queue
import random
import threading
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_model, tiny_tokenizer

from suwen.batching import Batcher, Busy, Closed, collect
from suwen.encoding import ChatEncoder
from suwen.generation import GenerationSettings, generate_batch
from template import TEMPLATES

pytestmark = pytest.mark.training

QUESTIONS = [f"{'咳嗽发热' * n}应该怎么办？" for n in range(1, 13)]


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    chatml = TEMPLATES["chatml"]
    tokenizer = tiny_tokenizer(chatml.special_tokens, chat_template=chatml.jinja)
    tokenizer.pad_token = tokenizer.eos_token
    return ChatEncoder(tokenizer)


@pytest.fixture(scope="module")
def model(encoder):
    return tiny_model(encoder.tokenizer)


@pytest.fixture
def batcher(model):
    batcher = Batcher(model, max_batch=4, max_waiting=64)
    yield batcher
    batcher.close()


def prompts_of(encoder, questions=QUESTIONS) -> list[list[int]]:
    return [encoder.encode_prompt([{"role": "user", "content": question}]) for question in questions]


def settings_of(number: int) -> GenerationSettings:
    """Of different lengths; every third is drawn, every fourth penalised."""
    return GenerationSettings(
        max_new_tokens=3 + 5 * number % 17,
        temperature=0.9 if number % 3 == 0 else 0.0,
        repetition_penalty=1.2 if number % 4 == 0 else 1.0,
        seed=number,
    )


def alone(model, encoder, prompt, settings) -> list[int]:
    return generate_batch(model, encoder, [prompt], settings)[0].token_ids


def ask_all(batcher, encoder, prompts, delay=0.0, **options) -> list[list[int]]:
    answers: list = [None] * len(prompts)

    def ask(number):
        time.sleep(random.Random(number).random() * delay)
        answers[number] = collect(batcher, prompts[number], settings_of(number), encoder.stop_token_ids, **options)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return answers


@pytest.mark.parametrize("delay", [0.0, 0.05])
def test_everyone_gets_the_tokens_of_being_alone(model, encoder, batcher, delay):
    prompts = prompts_of(encoder)
    expected = [alone(model, encoder, prompt, settings_of(n)) for n, prompt in enumerate(prompts)]
    assert ask_all(batcher, encoder, prompts, delay) == expected
    assert batcher.load() == (0, 0)


def test_a_model_whose_rows_cannot_join_answers_in_whole_batches(model, encoder, batcher):
    batcher.joins = False
    prompts = prompts_of(encoder)
    expected = [alone(model, encoder, prompt, settings_of(n)) for n, prompt in enumerate(prompts)]
    assert ask_all(batcher, encoder, prompts, 0.05) == expected


def test_a_request_joins_while_another_decodes(model, encoder, batcher):
    long, short = prompts_of(encoder)[:2]
    heard: queue.SimpleQueue = queue.SimpleQueue()
    batcher.submit(long, GenerationSettings(max_new_tokens=200), [], heard.put)
    heard.get(timeout=30)
    answer = collect(batcher, short, GenerationSettings(max_new_tokens=5), [])
    assert len(answer) == 5 and batcher.load() == (1, 0)  # the long one is still at work


def test_who_leaves_frees_the_place_and_hears_no_more(encoder, batcher):
    prompts = prompts_of(encoder)
    heard: list[queue.SimpleQueue] = [queue.SimpleQueue() for _ in range(5)]
    settings = GenerationSettings(max_new_tokens=250)
    requests = [batcher.submit(prompts[n], settings, [], heard[n].put) for n in range(5)]
    heard[0].get(timeout=30)
    assert batcher.load() == (4, 1)
    requests[0].cancel()
    assert heard[4].get(timeout=30) is not None  # the one that waited is let in
    for request in requests:
        request.cancel()
    deadline = time.monotonic() + 30
    while batcher.load() != (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert batcher.load() == (0, 0)
    time.sleep(0.05)
    left = heard[1].qsize()
    time.sleep(0.05)
    assert heard[1].qsize() == left < 250


def test_more_than_may_wait_are_refused(model, encoder):
    batcher = Batcher(model, max_batch=1, max_waiting=2)
    try:
        prompt = prompts_of(encoder)[0]
        requests = []
        with pytest.raises(Busy):
            for _ in range(5):
                requests.append(batcher.submit(prompt, GenerationSettings(max_new_tokens=300), [], lambda item: None))
        assert len(requests) in (2, 3)
        requests[-1].cancel()  # one that waits no longer counts
        batcher.submit(prompt, GenerationSettings(max_new_tokens=2), [], lambda item: None)
    finally:
        batcher.close()


def test_an_error_of_the_model_ends_its_requests_and_not_the_others(model, encoder, batcher):
    good, bad = prompts_of(encoder)[0], [10**6]
    heard: queue.SimpleQueue = queue.SimpleQueue()
    batcher.submit(good, GenerationSettings(max_new_tokens=60), [], heard.put)
    heard.get(timeout=30)
    with pytest.raises(IndexError):
        collect(batcher, bad, GenerationSettings(max_new_tokens=5), [])
    rest = [heard.get(timeout=30) for _ in range(60)]
    assert rest[-1] is None and not any(isinstance(item, Exception) for item in rest)


def test_closing_waits_for_those_at_work_and_tells_those_that_are_cut_off(model, encoder):
    prompt = prompts_of(encoder)[0]
    batcher = Batcher(model)
    heard: queue.SimpleQueue = queue.SimpleQueue()
    batcher.submit(prompt, GenerationSettings(max_new_tokens=10), [], heard.put)
    batcher.close(patience=60)
    assert [heard.get(timeout=1) for _ in range(11)][-1] is None and not batcher.thread.is_alive()
    with pytest.raises(Closed):
        collect(batcher, prompt, GenerationSettings(max_new_tokens=1), [])
    batcher = Batcher(model)
    batcher.submit(prompt, GenerationSettings(max_new_tokens=400), [], heard.put)
    heard.get(timeout=30)
    batcher.close()
    items = [heard.get(timeout=1) for _ in range(heard.qsize())]
    assert any(isinstance(item, Closed) for item in items) and not batcher.thread.is_alive()


def test_a_prompt_that_fills_the_window_is_refused(encoder, batcher):
    with pytest.raises(ValueError, match="leaves no room"):
        collect(batcher, [5] * 512, GenerationSettings(), [])
    assert len(collect(batcher, [5] * 510, GenerationSettings(max_new_tokens=50), [])) == 2


def test_each_adapter_gives_its_own_answers_at_the_same_time(encoder):
    model = tiny_model(encoder.tokenizer, seed=3)
    plain = tiny_model(encoder.tokenizer, seed=3)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(1)
    model = get_peft_model(model, config, adapter_name="一")
    model.add_adapter("二", config)
    model.eval()
    prompts = prompts_of(encoder)
    expected: dict = {(): [alone(plain, encoder, p, settings_of(n)) for n, p in enumerate(prompts)]}
    for name in ("一", "二"):
        model.set_adapter(name)
        expected[name,] = [alone(model, encoder, p, settings_of(n)) for n, p in enumerate(prompts)]
    model.base_model.set_adapter(["一", "二"])
    expected["一", "二"] = [alone(model, encoder, p, settings_of(n)) for n, p in enumerate(prompts)]
    assert len({str(answers) for answers in expected.values()}) == 4
    batcher = Batcher(model, max_batch=8)
    found: dict = {}
    try:
        threads = [
            threading.Thread(
                target=lambda name=name: found.update({name: ask_all(batcher, encoder, prompts, 0.05, adapter=name)})
            )
            for name in expected
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        batcher.close()
    assert found == expected

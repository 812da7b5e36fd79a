"""What answers earn, what is asked, and when a run is stopped."""

import json
import math
import random
from collections import Counter

import pytest
from datasets import Dataset

from suwen.alarms import repetition
from suwen.arguments import REWARD_RULES, PolicyArguments, parse_rewards
from suwen.benchmarks.choice import ask_choice
from suwen.benchmarks.task import Item
from suwen.formats import BadRow
from suwen.generation import Answer
from suwen.policy_alarms import Limits, find_alarm
from suwen.questions import ask, prompt_rows, shuffled
from suwen.rewards import (
    RULES,
    Sample,
    Weighted,
    critic_head,
    load_rewards,
    message_of,
    prompt_room,
    require_answer_keys,
)

ITEM = Item("首选哪种药？", "C", {"A": "青霉素", "B": "阿司匹林", "C": "硝酸甘油"}, False)


def sample(content: str, ids=(1, 2, 3), finish: str = "stop", item: Item | None = ITEM, reasoning: str = "") -> Sample:
    return Sample([{"role": "user", "content": "问"}], item, [7], Answer(content, reasoning, list(ids), finish))


def earned(name: str, *samples: Sample, max_new_tokens: int = 100) -> list[float]:
    return RULES[name](samples, max_new_tokens=max_new_tokens)


def test_the_exam_key_is_met_or_not():
    several = Item("哪些？", "AC", {"A": "甲", "B": "乙", "C": "丙"}, True)
    found = earned("exam", sample("答案：C"), sample("答案：A"), sample("硝酸甘油"), sample("不知道"))
    assert found == [1.0, 0.0, 1.0, 0.0]
    assert earned("exam", sample("答案：AC", item=several), sample("答案：A", item=several)) == [1.0, 0.0]
    rules = [Weighted("exam", 1.0, RULES["exam"])]
    with pytest.raises(ValueError, match="found 1 of 2 prompts without an answer key"):
        require_answer_keys(rules, Dataset.from_dict({"item": ["{}", ""]}))
    require_answer_keys(rules, Dataset.from_dict({"item": ["{}"]}), None)


def test_the_form_is_an_end_and_a_declared_choice():
    cases = {
        "declared": sample("答案：A"), "bare": sample("A"), "cut": sample("答案：A", finish="length"),
        "prose": sample("请就医。", item=None), "nothing": sample(" ", item=None),
    }  # fmt: skip
    assert earned("format", *cases.values()) == [1.0, 0.0, 0.0, 1.0, 0.0]


def test_the_length_is_free_up_to_four_fifths_and_costs_one_at_the_limit():
    lengths = (10, 80, 90, 100)
    assert earned("length", *(sample("", range(n)) for n in lengths)) == pytest.approx([0.0, 0.0, -0.5, -1.0])


def test_repeated_four_grams_are_counted_once_seen():
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repetition([5] * 10) == pytest.approx(6 / 7)
    assert repetition([1, 2, 3]) == repetition(range(50)) == 0.0
    assert earned("repetition", sample("", [5] * 10)) == pytest.approx([-6 / 7])


def test_the_language_is_the_share_of_chinese_letters():
    found = earned("language", sample("用CT检查，1次"), sample("Take it."), sample("……"), sample("好", reasoning="ok"))
    assert found == pytest.approx([4 / 6, 0.0, 0.0, 1 / 3])


def test_specifications_are_read_and_refused():
    assert parse_rewards("exam, model:a=b/rm=0.5,repetition=-2") == [
        ("exam", 1.0),
        ("model:a=b/rm", 0.5),
        ("repetition", -2.0),
    ]
    for text, expected in {
        "": "found nothing", "exma": "found 'exma'", "exam=x": "expected a number", "exam,exam=2": "twice",
        "model:=1": "found 'model:'",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=expected):
            parse_rewards(text)
    [rule] = load_rewards("length=0.5", PolicyArguments(max_new_tokens=10), "cpu")
    assert (rule.weight, rule.measure([sample("", range(10))])) == (0.5, [-1.0])


def test_the_command_line_knows_every_rule():
    assert tuple(RULES) == REWARD_RULES


def test_the_critic_begins_with_the_head_that_fits():
    import torch

    rewards = [
        Weighted("exam", 1.0, RULES["exam"]),
        Weighted("model:wide", 1.0, RULES["exam"], torch.ones(8)),
        Weighted("model:rm", 0.5, RULES["exam"], torch.full((4,), 3.0)),
    ]
    assert critic_head(rewards, 4).tolist() == [1.5] * 4 and critic_head(rewards[:2], 4) is None


def test_a_reward_model_reads_the_reasoning_apart():
    assert message_of(sample("答", reasoning="想").answer) == {
        "role": "assistant", "content": "答", "reasoning_content": "想",
    }  # fmt: skip
    assert "reasoning_content" not in message_of(sample("答").answer)


def test_answers_leave_room_for_prompts():
    assert prompt_room(100, 60) == 40
    with pytest.raises(ValueError, match="leaves 4 of --max_length 100"):
        prompt_room(100, 96)


# What is asked


def prompts(value) -> list[dict]:
    return prompt_rows(value, {}, Counter())


def test_each_answer_of_a_conversation_gives_a_prompt_with_the_turns_before_it():
    turns = [
        {"role": role, "content": text}
        for role, text in [("system", "规则"), ("user", "一"), ("assistant", "甲"), ("user", "二"), ("assistant", "乙")]
    ]
    assert prompts({"messages": turns}) == [
        {"messages": turns[:2], "item": ""},
        {"messages": turns[:4], "item": ""},
    ]


def test_pairs_texts_and_questions_without_an_answer_give_one_prompt():
    user = [{"role": "user", "content": "怎么办？"}]
    pair = {"conversations": [{"from": "human", "value": "怎么办？"}], "chosen": "就医", "rejected": "不管"}
    for value in (pair, "怎么办？", {"instruction": "怎么办？"}, {"messages": user}):
        assert prompts(value) == [{"messages": user, "item": ""}]
    with pytest.raises(BadRow):
        prompts({"messages": []})


def test_exam_questions_bring_their_key_in_any_form():
    [row] = prompts({"Question": "首选？", "Options": "A 甲\nB 乙", "Answer": "B"})
    item = json.loads(row["item"])
    assert (item["target"], item["options"]) == ("B", {"A": "甲", "B": "乙"})
    assert row["messages"][0]["content"] == ask_choice(Item("首选？", "B", {"A": "甲", "B": "乙"}))
    turns = [{"role": "user", "content": "首选？\nA 甲\nB 乙"}, {"role": "assistant", "content": "答案：A"}]
    [row] = prompts({"messages": turns})
    assert row["messages"] == turns[:1] and json.loads(row["item"])["target"] == "A"
    with pytest.raises(BadRow, match="answer not among the options"):
        prompts({"Question": "首选？", "Options": "A 甲\nB 乙", "Answer": "D"})


def test_shuffled_options_keep_the_right_text():
    item = Item("哪些？", "AD", dict(zip("ABCDE", "甲乙丙丁戊", strict=True)), True)
    seen = Counter()
    for seed in range(200):
        other = shuffled(item, random.Random(seed))
        assert {other.options[letter] for letter in other.target} == {"甲", "丁"}
        assert sorted(other.options) == list("ABCDE") and sorted(other.options.values()) == sorted("甲乙丙丁戊")
        seen[other.target] += 1
    assert len(seen) == 10 and max(seen.values()) < 50, "no pair of letters is the safe one"


def test_only_questions_that_are_put_by_us_are_put_in_another_order():
    [row] = prompts({"Question": "首选？", "Options": "A 甲\nB 乙\nC 丙", "Answer": "B"})
    texts = {ask(row["messages"], row["item"], random.Random(seed))[0][0]["content"] for seed in range(50)}
    assert len(texts) == 6
    messages, item = ask(row["messages"], row["item"], None)
    assert messages == row["messages"] and item.target == "B"
    turns = [{"role": "user", "content": "首选？\nA 甲\nB 乙"}, {"role": "assistant", "content": "答案：A"}]
    [row] = prompts({"messages": turns})
    assert ask(row["messages"], row["item"], random.Random(1))[0] == turns[:1]


# Alarms


def history(**changes) -> list[dict]:
    """Thirty updates of a healthy run; `changes` are functions of the update's number."""
    healthy = {
        "score": lambda n: 0.3 + 0.01 * n, "kl": lambda n: 0.1 * n, "entropy": lambda n: 2.0 - 0.05 * n,
        "length": lambda n: 60.0 - n, "repetition": lambda n: 0.05, "truncation": lambda n: 0.1,
        "loss": lambda n: 0.0, "grad_norm": lambda n: 1.0,
    }  # fmt: skip
    return [{"step": n} | {name: f(n) for name, f in (healthy | changes).items()} for n in range(1, 31)]


def test_a_healthy_run_goes_on():
    entries = history()
    assert all(find_alarm(entries[:n], Limits()) is None for n in range(len(entries) + 1))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"kl": lambda n: 3.0 * n}, "nats an answer away"),
        ({"kl": lambda n: -3.0 * n}, "nats an answer away"),
        ({"entropy": lambda n: 2.0 if n < 10 else 0.001, "score": lambda n: 0.3}, "entropy fell"),
        ({"length": lambda n: 60.0 if n < 10 else 2.0}, "answers shrank from 60 to 2.0"),
        ({"repetition": lambda n: 0.05 if n < 10 else 0.8}, "repeated 4-grams rose from 5% to 80%"),
        ({"truncation": lambda n: 0.1 if n < 10 else 0.9}, "answers without an end rose"),
        ({"score": lambda n: math.nan if n > 20 else 0.3}, "score is nan"),
        ({"loss": lambda n: math.inf if n > 20 else 0.3}, "loss is inf"),
    ],
)
def test_each_sign_stops_a_run_with_its_reason(changes, expected):
    assert expected in find_alarm(history(**changes), Limits())


def test_a_sign_must_last():
    entries = history(repetition=lambda n: 0.8 if n in (20, 21, 22, 23) else 0.05)
    assert all(find_alarm(entries[:n], Limits()) is None for n in range(len(entries)))
    entries = history(repetition=lambda n: 0.8 if 20 <= n < 25 else 0.05)
    assert [n for n in range(31) if find_alarm(entries[:n], Limits())] == [24]


def test_low_entropy_is_no_sign_where_the_score_has_risen():
    assert find_alarm(history(entropy=lambda n: 2.0 if n < 10 else 0.001), Limits()) is None


def test_an_alarm_can_be_switched_off():
    changes = {"length": lambda n: 60.0 if n < 10 else 2.0, "kl": lambda n: 3.0 * n}
    assert find_alarm(history(**changes), Limits(length=0, kl=0)) is None


def evaluations(scores: list[float], held_out: list[float]) -> list[dict]:
    pairs = zip(scores, held_out, strict=True)
    rows = [{"step": 10 * n, "eval_score": s, "eval_held_out_reward": h} for n, (s, h) in enumerate(pairs)]
    return [*history(), *rows]


def test_a_reward_that_is_exploited_stops_the_run():
    rising, falling = [0.1, 0.3, 0.5, 0.6, 0.7], [0.1, 0.4, 0.3, 0.2, 0.1]
    reason = find_alarm(evaluations(rising, falling), Limits(patience=3))
    assert "held-out reward fell from 0.400 (update 10) to 0.100" in reason
    assert find_alarm(evaluations(rising, falling), Limits(patience=4)) is None
    assert find_alarm(evaluations(rising, rising), Limits(patience=3)) is None
    assert find_alarm(evaluations(falling, falling), Limits(patience=3)) is None, "both fall: no exploitation"

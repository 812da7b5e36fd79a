"""What an answer is worth: rules that anyone can check, and trained reward models, added up with weights.

exam        1 if the chosen letters are those of the answer key, else 0
format      1 if the answer ended by itself, says something, and to an exam question declares its choice ("答案：C")
length      0 up to four fifths of --max_new_tokens, falling to -1 at the limit (soft overlong punishment, DAPO,
            Yu et al. 2025, arXiv:2503.14476, eq. 13, with its share of one fifth)
repetition  minus the share of 4-grams of tokens that occurred before in the answer
language    share of Chinese characters among all letters
model:DIR   score of a reward model, which reads the conversation in its own template, in units of its spread on
            held-out pairs: what a weight, a KL coefficient or a value is worth does not hang on how sure the model is
            (Ziegler et al. 2019, arXiv:1909.08593, section 2.1, bring rewards to variance 1, too)
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from suwen.alarms import repetition
from suwen.arguments import parse_rewards
from suwen.benchmarks.choice import judge_choice
from suwen.benchmarks.task import Item
from suwen.lineage import find_finished_stage

if TYPE_CHECKING:
    from suwen.arguments import PolicyArguments
    from suwen.generation import Answer

OVERLONG = 0.2  # of the limit


@dataclass(frozen=True)
class Sample:
    """One answer to one prompt."""

    messages: list[dict]
    item: Item | None  # the answer key, where there is one
    prompt_ids: list[int]
    answer: Answer


Reward = Callable[[Sequence[Sample]], list[float]]


@dataclass(frozen=True)
class Weighted:
    """A reward as it is logged, what it counts, and how it is measured."""

    name: str
    weight: float
    measure: Reward
    head: Any = None  # (H,) of a reward model


def load_rewards(text: str, settings: PolicyArguments, device: Any, flag: str = "--reward") -> list[Weighted]:
    """The rewards of a specification; reward models are loaded."""
    found = []
    for name, weight in parse_rewards(text, flag):
        if name.startswith("model:"):
            from suwen.reward import load_reward_model

            model = load_reward_model(name.removeprefix("model:"), settings.reward_quantization, str(device))
            found.append(Weighted(name, weight, partial(model_reward, model), model.head / model.spread))
        else:
            found.append(Weighted(name, weight, partial(RULES[name], max_new_tokens=settings.max_new_tokens)))
    return found


def find_rewards(given: str | None, outputs: str) -> str:
    """The specification given, else the finished reward model in `outputs`."""
    if given is None:
        folder = find_finished_stage(outputs, ("rm",))
        if folder is None:
            raise ValueError(
                f"--reward: found no finished reward model in {outputs}, expected run_rm.sh before, or rules such as"
                " exam=1.0,format=0.2"
            )
        return f"model:{folder}=1.0"
    return given


def prompt_room(max_length: int, max_new_tokens: int) -> int:
    """Tokens that a prompt may have so that an answer fits behind it."""
    room = max_length - max_new_tokens
    if room < 8:
        raise ValueError(
            f"--max_new_tokens: found {max_new_tokens}, which leaves {room} of --max_length {max_length} for the prompt"
        )
    return room


def exam_reward(samples: Sequence[Sample], **_: int) -> list[float]:
    return [float(judge_choice(key_of(sample), sample.answer.content)["correct"]) for sample in samples]


def key_of(sample: Sample) -> Item:
    assert sample.item is not None, "see require_answer_keys"
    return sample.item


def require_answer_keys(rewards: Sequence[Weighted], *datasets: Any) -> None:
    """Refuse to score by an answer key where prompts have none, before the first answer is drawn."""
    if any(reward.name == "exam" for reward in rewards):
        for rows in datasets:
            if rows is not None and (without := sum(not item for item in rows["item"])):
                raise ValueError(
                    f"--reward exam: found {without:,} of {len(rows):,} prompts without an answer key, expected exam"
                    " questions alone"
                )


def format_reward(samples: Sequence[Sample], **_: int) -> list[float]:
    def kept(sample: Sample) -> bool:
        if sample.answer.finish_reason != "stop" or not sample.answer.content.strip():
            return False
        return sample.item is None or judge_choice(sample.item, sample.answer.content)["reason"] == "declared"

    return [float(kept(sample)) for sample in samples]


def length_reward(samples: Sequence[Sample], max_new_tokens: int) -> list[float]:
    room = OVERLONG * max_new_tokens
    return [min(0.0, (max_new_tokens - room - len(sample.answer.token_ids)) / room) for sample in samples]


def repetition_reward(samples: Sequence[Sample], **_: int) -> list[float]:
    return [-repetition(sample.answer.token_ids) for sample in samples]


def language_reward(samples: Sequence[Sample], **_: int) -> list[float]:
    def share(text: str) -> float:
        letters = [character for character in text if unicodedata.category(character)[0] == "L"]
        return sum("\u3400" <= letter <= "\u9fff" for letter in letters) / len(letters) if letters else 0.0

    return [share(sample.answer.reasoning + sample.answer.content) for sample in samples]


def model_reward(model, samples: Sequence[Sample]) -> list[float]:
    """Scores of a reward model. It gets text, so its tokenizer and its template may be others than the policy's."""
    found = model.score([[*sample.messages, message_of(sample.answer)] for sample in samples])
    return [score / model.spread for score in found]


def message_of(answer: Answer) -> dict[str, str]:
    message = {"role": "assistant", "content": answer.content}
    return {**message, "reasoning_content": answer.reasoning} if answer.reasoning else message


def critic_head(rewards: Sequence[Weighted], hidden_size: int) -> Any:
    """(H,) of the first reward model whose backbone is as wide as the policy's, in units of the score; else None."""
    heads = (reward.weight * reward.head for reward in rewards if reward.head is not None)
    return next((head for head in heads if len(head) == hidden_size), None)


RULES: dict[str, Callable[..., list[float]]] = {
    "exam": exam_reward,
    "format": format_reward,
    "length": length_reward,
    "repetition": repetition_reward,
    "language": language_reward,
}

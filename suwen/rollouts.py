"""Answers of a policy, what is known of them, and how they look as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from suwen.alarms import repetition
from suwen.encoding import IGNORE_INDEX, ChatEncoder
from suwen.generation import Answer, generate_many
from suwen.generation_settings import GenerationSettings
from suwen.rewards import Sample

SAMPLES_LOGGED = 8  # answers of an update that are written down


@dataclass
class Rollout:
    """Answers of all ranks; those to one prompt stand one behind another. Matrices are (B, T), padded on the right."""

    samples: list[Sample]
    scores: dict[str, torch.Tensor]  # (B,) of each reward, unweighted
    mask: torch.Tensor
    logps: torch.Tensor
    entropy: torch.Tensor
    values: torch.Tensor
    reference_logps: torch.Tensor


def draw_answers(
    model: Any,
    encoder: ChatEncoder,
    prompts: Sequence[list[int]],
    settings: GenerationSettings,
    seeds: Sequence[int],
    batch_size: int,
) -> list[Answer]:
    """One answer to each prompt. It hangs on the prompt and its seed alone, not on what is drawn beside it."""
    keyed = dict(enumerate(prompts))
    found: list[Answer | None] = [None] * len(prompts)
    for place, answer in generate_many(model, encoder, keyed, settings, batch_size, seeds=seeds):
        found[place] = answer
    return [answer for answer in found if answer is not None]


def row_of(sample: Sample) -> dict[str, list[int]]:
    """A sample as a row whose answer is scored."""
    prompt, answer = sample.prompt_ids, sample.answer.token_ids
    return {"input_ids": prompt + answer, "labels": [IGNORE_INDEX] * len(prompt) + answer}


def put_rows(matrix: torch.Tensor, group: list[int], mask: torch.Tensor, flat: torch.Tensor) -> None:
    """Put values of the tokens of a group, one answer behind another, into their rows."""
    if group:
        rows = torch.zeros(len(group), mask.shape[1], device=matrix.device)
        rows[mask[group].bool().to(matrix.device)] = flat.float()
        matrix[group] = rows


def describe_answers(samples: Sequence[Sample]) -> dict[str, float]:
    """Health of a set of answers."""
    count = len(samples)
    return {
        "length": sum(len(sample.answer.token_ids) for sample in samples) / count,
        "truncation": sum(sample.answer.finish_reason != "stop" for sample in samples) / count,
        "repetition": sum(repetition(sample.answer.token_ids) for sample in samples) / count,
        "distinct": len({tuple(sample.answer.token_ids) for sample in samples}) / count,
    }


def describe_samples(rollout: Rollout, scores: torch.Tensor, step: int) -> list[dict[str, Any]]:
    """Some answers of an update as they are written down."""
    kl = ((rollout.logps - rollout.reference_logps) * rollout.mask).sum(1)
    return [
        {
            "step": step,
            "messages": sample.messages,
            "reasoning": sample.answer.reasoning,
            "answer": sample.answer.content,
            "finish_reason": sample.answer.finish_reason,
            "score": round(scores[place].item(), 4),
            "scores": {name: round(values[place].item(), 4) for name, values in rollout.scores.items()},
            "kl": round(kl[place].item(), 4),
        }
        for place, sample in enumerate(rollout.samples[:SAMPLES_LOGGED])
    ]

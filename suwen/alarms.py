"""Signs that preference training spoils a model while its own metrics look good."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from suwen.encoding import ChatEncoder
from suwen.generation import generate_batch, model_window
from suwen.generation_settings import GenerationSettings
from suwen.progress import main_process, say

FALL_LIMIT = 0.2  # nats a token: the better answers' perplexity has grown by 22 %
REPETITION_LIMIT = 0.2  # share of 4-grams, above that of the start
NUM_PROMPTS, NEW_TOKENS = 8, 64


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """Share of an answer's n-grams that stood in it before; 0 for answers shorter than n.

    seq-rep-n of Welleck et al. 2020 (arXiv:1908.04319), section 4.1.
    """
    grams = [tuple(ids[at : at + n]) for at in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


class PreferenceAlarms(TrainerCallback):
    """Says in a plain line when better answers become unlikely, or when answers begin to repeat themselves.

    The first is a known failure of DPO: the margin grows because the worse answer falls faster than the better one, and
    what rises is neither (Pal et al. 2024, arXiv:2402.13228; Razin et al. 2024, arXiv:2410.08847). It is read off the
    log-probabilities that the loss needs anyway, of held-out pairs where there are some. Repetition is measured on
    greedy answers to a few prompts, before the first step and at each evaluation.

    Attributes:
        raised: the lines so far, each alarm once.
    """

    def __init__(self, trainer: Any, encoder: ChatEncoder) -> None:
        self.trainer, self.encoder = trainer, encoder
        self.raised: list[str] = []
        rows = (trainer.eval_dataset or trainer.train_dataset).rows
        window = model_window(trainer.model) or math.inf
        prompts = rows.select(range(min(len(rows), 4 * NUM_PROMPTS)))["prompt_ids"]
        self.prompts = [ids for ids in prompts if len(ids) + NEW_TOKENS <= window][:NUM_PROMPTS]
        self.spread = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled  # weights that no process holds alone

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        evaluated = self.trainer.eval_dataset is not None and args.eval_strategy != "no"
        change = (logs or {}).get(f"{'eval_' if evaluated else ''}logps/chosen_change", 0.0)
        if change < -FALL_LIMIT:
            self.alarm(
                "the better answers are becoming unlikely",
                f"step {state.global_step}: their log-probability has fallen by {-change:.2f} nats a token since the "
                f"start, their perplexity is {math.exp(-change):.1f} times as high; lower --learning_rate, raise "
                "--beta, or add --sft_weight 1",
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not any("repetition" in entry for entry in state.log_history):  # else resumed: the start is known
            self.measure()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        known = [entry["repetition"] for entry in state.log_history if "repetition" in entry]
        if not known or (now := self.measure()) is None:
            return
        if now - known[0] > REPETITION_LIMIT:
            self.alarm(
                "answers repeat themselves",
                f"step {state.global_step}: {now:.0%} of the sequences of four tokens in greedy answers stood there "
                f"before, {known[0]:.0%} at the start; lower --learning_rate, raise --beta, or train for fewer steps",
            )

    def measure(self) -> float | None:
        """Log the mean repetition of greedy answers; the main process answers while the others wait."""
        if self.spread or not self.prompts:
            return None
        found = 0.0
        if main_process():
            model = self.trainer.accelerator.unwrap_model(self.trainer.model)
            training = model.training
            model.eval()
            settings = GenerationSettings(max_new_tokens=NEW_TOKENS, temperature=0.0)
            answers = generate_batch(model, self.encoder, self.prompts, settings)
            model.train(training)
            found = sum(repetition(answer.token_ids) for answer in answers) / len(answers)
        self.trainer.log({"repetition": found})
        return found

    def alarm(self, kind: str, detail: str) -> None:
        if not any(line.startswith(kind) for line in self.raised):
            self.raised.append(f"{kind}; {detail}")
            say(f"alarm: {self.raised[-1]}")

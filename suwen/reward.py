"""A trained reward model, wherever its scores are needed: loaded in one call, it scores whole conversations.

A reward model is a backbone under a head of one number (`...ForSequenceClassification` with one label, the form that
transformers, TRL and vLLM read), in full (`score.weight` among the weights) or as a LoRA folder (`...score.weight` in
its adapter). The score of an answer is the head's value at the answer's stop token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from suwen.batches import last_positions
from suwen.encoding import ChatEncoder
from suwen.generation import model_window
from suwen.head import add_reward_forward
from suwen.lineage import has_reward_head, is_reward_model, read_json
from suwen.models import check_vocabulary, load_causal_lm, load_config, load_tokenizer, without_adapter
from suwen.scoring import pad

THINKING = {"on": True, "off": False}
BATCH_TOKENS = 8192  # computed at once, padding included


@dataclass
class RewardModel:
    """Scores conversations by the tokenizer and the chat template that it was trained with.

    Attributes:
        spread: standard deviation of its scores in its own evaluation, on held-out pairs; 1 where none is known.
    """

    model: Any
    encoder: ChatEncoder
    path: str
    spread: float = 1.0

    @property
    def head(self) -> torch.Tensor:
        """(H,) float32 weights of the head, for a critic that starts from them."""
        return without_adapter(self.model).score.weight.detach()[0].float()

    def encode(self, messages: list[dict]) -> list[int]:
        """Token ids of a conversation, up to the stop token of its last answer; old turns give way to the window.

        Raises:
            ValueError: the last message is no answer, or the last exchange alone does not fit.
        """
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            found = messages[-1]["role"] if messages else "nothing"
            raise ValueError(f"a conversation to be scored ends with {found!r}, expected an assistant's answer")
        window = model_window(self.model)
        encoded = self.encoder.encode_answers(messages[:-1], messages[-1:], window)
        if encoded is None:
            raise ValueError(
                f"{self.path}: question and answer do not fit the reward model's window of {window} tokens"
            )
        prompt_ids, [answer_ids] = encoded
        return prompt_ids + answer_ids

    def score(
        self, conversations: Sequence[list[dict]], batch_tokens: int = BATCH_TOKENS, title: str = ""
    ) -> list[float]:
        """A score for the last answer of each conversation, in the order given; higher is better.

        Batch size and order do not change a score: rows of about the same length are padded behind their end, where
        nothing looks.

        Args:
            conversations: lists of {"role", "content"[, "reasoning_content"]} that end with the assistant's answer.
            batch_tokens: rows times longest row of a batch, at most.
            title: of a progress bar; none without.
        """
        return self.score_rows([self.encode(messages) for messages in conversations], batch_tokens, title)

    @torch.inference_mode()
    def score_rows(self, rows: Sequence[list[int]], batch_tokens: int = BATCH_TOKENS, title: str = "") -> list[float]:
        """The same for token ids; the last one of each row is scored."""
        scores = [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        with tqdm(total=len(rows), desc=title, disable=not title, leave=False) as bar:
            while order:
                size = max(1, batch_tokens // len(rows[order[-1]]))  # the longest first: memory fails at once or never
                chosen, order = order[-size:], order[:-size]
                ids = pad([rows[i] for i in chosen], 0)
                mask = pad([[1] * len(rows[i]) for i in chosen], 0)
                batch = {"input_ids": ids, "attention_mask": mask}
                batch["score_at"] = last_positions(batch)
                found = self.model(**{name: value.to(self.model.device) for name, value in batch.items()}).scores
                for i, value in zip(chosen, found.tolist(), strict=True):
                    scores[i] = value
                bar.update(len(chosen))
        return scores


def load_reward_model(path: str, quantization: str = "none", device: str | None = None) -> RewardModel:
    """A reward model ready to score, from a folder of `run_rm.sh` (full or LoRA) or another one-label classifier.

    Args:
        quantization: none, 8bit, 4bit or 2bit, of the backbone.
        device: cpu, cuda, cuda:N; None for the GPU where there is one.

    Raises:
        ValueError: the folder holds no reward model, or one whose head has several labels.
    """
    config = load_config(path)
    if not is_reward_model(path) and not has_reward_head(config):
        raise ValueError(f"reward model {path!r}: found a model without a head for scores, expected one of run_rm.sh")
    if has_reward_head(config) and config.num_labels != 1:
        raise ValueError(f"reward model {path!r}: found a head for {config.num_labels} labels, expected one score")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    half = "bfloat16" if device != "cpu" and torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    dtype = "float32" if device == "cpu" else half
    model = load_causal_lm(path, dtype, quantization, device, config=config, reward=True).eval()
    add_reward_forward(without_adapter(model))
    without_adapter(model).score.float()  # 16 bits would tell no more than three digits of a score apart
    tokenizer = load_tokenizer(path, "auto")
    check_vocabulary(model, tokenizer)
    record = read_json(Path(path) / "run.json")
    encoder = ChatEncoder(tokenizer, THINKING.get(str(record.get("thinking"))))
    return RewardModel(model, encoder, path, (record.get("evaluation") or {}).get("eval_score_std") or 1.0)

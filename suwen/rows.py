"""From a data row to what a stage trains on: one callable a stage, picklable, with a fingerprint for the cache."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from typing import Any

from suwen.byte_pairs import speed_up
from suwen.encoding import IGNORE_INDEX, ChatEncoder, encode_document

Encoded = tuple[list[dict[str, Any]], Counter]


def fingerprint(tokenizer: Any, **settings: Any) -> str:
    """Hash of everything that decides the ids: the tokenizer's rules, its template, and the encoder's settings."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    content = json.dumps([rules, tokenizer.chat_template, settings], ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def carries_reasoning(messages: list[dict[str, Any]]) -> bool:
    return any(message.get("reasoning_content") for message in messages)


class RowEncoder:
    """What the encoders of all stages share."""

    tokenizer: Any
    fingerprint: str

    def speed_up(self) -> None:
        """To be called before the workers of a large data set are forked."""
        speed_up(self.tokenizer)


class DocumentRows(RowEncoder):
    """Pretraining: every token of a document and its EOS, all trained; longer ones are split, no token is lost."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.fingerprint = fingerprint(tokenizer, kind="document without labels", max_length=max_length)

    def __call__(self, row: dict[str, Any]) -> Encoded:
        ids = encode_document(row["text"], self.tokenizer)
        pieces = [ids[i : i + self.max_length] for i in range(0, len(ids), self.max_length)]
        # A single leftover token has nothing to predict it from within its piece: it joins the piece before.
        if len(pieces) > 1 and len(pieces[-1]) == 1:
            pieces[-1] = [pieces[-2].pop(), *pieces[-1]]
        return [{"input_ids": piece} for piece in pieces], Counter()


class ConversationRows(RowEncoder):
    """SFT: every assistant turn and its stop token."""

    def __init__(self, encoder: ChatEncoder, max_length: int, train_on_inputs: bool) -> None:
        self.encoder, self.tokenizer = encoder, encoder.tokenizer
        self.max_length, self.train_on_inputs = max_length, train_on_inputs
        self.fingerprint = fingerprint(
            encoder.tokenizer,
            kind="conversation with thinking",
            thinking=encoder.thinking,
            max_length=max_length,
            train_on_inputs=train_on_inputs,
        )

    def __call__(self, row: dict[str, Any]) -> Encoded:
        rows, counts = self.encoder.encode_conversation(row["messages"], self.max_length, self.train_on_inputs)
        thinking = carries_reasoning(row["messages"])
        return [{**encoded, "thinking": thinking} for encoded in rows], counts


class PreferenceRows(RowEncoder):
    """Preference stages: the prompt as served, and two answers to it."""

    def __init__(self, encoder: ChatEncoder, max_length: int) -> None:
        self.encoder, self.tokenizer, self.max_length = encoder, encoder.tokenizer, max_length
        self.fingerprint = fingerprint(
            encoder.tokenizer, kind="preference with margin and fault", thinking=encoder.thinking, max_length=max_length
        )

    def __call__(self, row: dict[str, Any]) -> Encoded:
        pair = self.encoder.encode_pair(row["messages"], row["chosen"], row["rejected"], self.max_length)
        if pair is None:
            return [], Counter({"prompt and answer longer than --max_length": 1})
        if pair["chosen_ids"] == pair["rejected_ids"]:
            return [], Counter({"chosen and rejected have the same tokens": 1})
        kept = {name: row.get(name) for name in ("margin", "fault")}
        return [{**pair, "thinking": carries_reasoning(row["chosen"]), **kept}], Counter()


class PromptRows(RowEncoder):
    """Reinforcement learning: a prompt as served, and the answer key where there is one."""

    def __init__(self, encoder: ChatEncoder, max_length: int) -> None:
        """`max_length`: tokens of a prompt; the oldest exchanges are left out of a longer one."""
        self.encoder, self.tokenizer, self.max_length = encoder, encoder.tokenizer, max_length
        self.fingerprint = fingerprint(
            encoder.tokenizer, kind="prompt", thinking=encoder.thinking, max_length=max_length
        )

    def __call__(self, row: dict[str, Any]) -> Encoded:
        try:
            ids = self.encoder.encode_prompt(row["messages"], max_length=self.max_length)
        except ValueError:
            return [], Counter({"question longer than --max_length less --max_new_tokens": 1})
        messages = json.dumps(row["messages"], ensure_ascii=False)
        return [{"prompt_ids": ids, "messages": messages, "item": row["item"]}], Counter()


def rows_of_pair(pair: dict[str, list[int]]) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """The prompt with the better answer, and with the worse one, as rows of ids and labels."""
    prompt = pair["prompt_ids"]
    labels = [IGNORE_INDEX] * len(prompt)
    better, worse = pair["chosen_ids"], pair["rejected_ids"]
    return (
        {"input_ids": prompt + better, "labels": labels + better},
        {"input_ids": prompt + worse, "labels": labels + worse},
    )

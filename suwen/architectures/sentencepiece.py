"""A tokenizer that runs the sentencepiece library itself.

For models whose pieces no other engine cuts alike: vocabularies merged as Chinese-LLaMA's, whose new pieces share one
score, so that among them the leftmost pair wins; and ChatGLM-6B's, which spells line breaks and runs of blanks.
"""

from __future__ import annotations

import re
from typing import Any

from transformers.tokenization_utils_sentencepiece import SentencePieceBackend


class SentencePieceTokenizer(SentencePieceBackend):
    """Ids are those of the sentencepiece model in every case; control tokens are cut out of the text before.

    Args:
        vocab_file: the sentencepiece model.
        prefix_tokens: tokens before every text that is encoded with special tokens.
        spelling: text that is spelt as a piece, such as {"\\n": "<n>"}.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab_file: str,
        prefix_tokens: list[str] | None = None,
        spelling: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.spelling = spelling or {}
        self._spelt = {piece: text for text, piece in self.spelling.items()}
        self.prefix_tokens = prefix_tokens or []
        kwargs["legacy"] = True
        super().__init__(vocab_file=vocab_file, prefix_tokens=self.prefix_tokens, spelling=self.spelling, **kwargs)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return self.sp_model.encode(spell(text, self.spelling), out_type=str)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        parts: list[str] = []
        pieces: list[str] = []
        for token in [*tokens, None]:
            if token is not None and token not in self._added_tokens_encoder:
                pieces.append(token)
                continue
            if pieces:
                parts.append(self.sp_model.decode(pieces))
                pieces = []
            if token is not None:
                parts.append(token)
        return spell("".join(parts), self._spelt)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        before = self.convert_tokens_to_ids(self.prefix_tokens)
        return before + token_ids_0 + (before + token_ids_1 if token_ids_1 else [])


def spell(text: str, spelling: dict[str, str]) -> str:
    """Replace every key by its value, the longest first, each place once."""
    if not spelling:
        return text
    pattern = "|".join(re.escape(key) for key in sorted(spelling, key=len, reverse=True))
    return re.sub(pattern, lambda match: spelling[match[0]], text)

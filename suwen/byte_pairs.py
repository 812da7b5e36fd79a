"""Token ids by tiktoken where they are proven to be the tokenizer's own: three to four times as fast on a core.

Most tokenizers of today are byte-level BPE behind a pattern that cuts the text into words (Qwen 1 to 3.5, Llama 3, the
embedded model): what tiktoken computes, too. Two things could differ, and are checked before the first text.

The words: two engines of regular expressions may read a pattern in other ways, or know other versions of Unicode. Only
syntax that is the same to both and texts made of `KNOWN` characters take this way; each of these is tried in both.

The merges: `tokenizers` joins the pairs on its list, tiktoken any two neighbours that spell a token; both take the
token of the lowest rank next, the first from the left. Say that they have agreed so far, and tiktoken now makes t of
neighbours l and r. No token crosses the ends of this stretch, as tokens are never split, so what was joined inside it
is what is joined, in this order, in the bytes of t alone. If these come out of `tokenizers` as t, which every token is
tried for, then its last step there was to join l and r: this pair is on the list. Ranks agree if the list is in the
order of the ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

# Scripts whose characters have kept their classes since Unicode 3, without those that combine or have another form
# (NFC changes nothing): Latin, Greek, punctuation, signs, kana, Chinese, full width
KNOWN = (
    "\t\n\r\x20-\x7e\xa0-\u02af\u0391-\u03c9\u2010-\u2027\u2030-\u205e\u2070-\u2089\u20a0-\u20ac\u2100-\u2125\u2150-\u2183"
    "\u2190-\u2328\u2460-\u24ea\u2500-\u2595\u25a0-\u25f7\u2600-\u2613\u3000-\u3029\u3030-\u3035\u3041-\u3094\u30a1-\u30fe"
    "\u3220-\u3243\u3280-\u32b0\u3300-\u33dd\u4e00-\u9fa5\uff01-\uff5e\uffe0-\uffe6"
)
_ALL_KNOWN = re.compile(f"[{KNOWN}]*+")
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # of ByteLevel itself
# What Oniguruma, the engine of tokenizers, and Rust's read alike
COMMON_SYNTAX = re.compile(
    r"""(?: \\[pP]\{[A-Z][A-Za-z]*\} | \\[srndSD] | \((?:\?i?:|\?[!=]|(?!\?)) | \{\d+(?:,\d*)?\}(?!\+)
    | \[(?!:) | && | [^\\({\[&] )*""",
    re.VERBOSE,
)
MOST_ADDED = 512  # a longer list takes longer to look for than tiktoken saves

_proven: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, BytePairs | None]] = WeakKeyDictionary()


def speed_up(tokenizer: PreTrainedTokenizerBase) -> bool:
    """From now on let tiktoken encode what it can for this tokenizer; False if it is not of the kind.

    The proof takes a second for a vocabulary of 150,000, so it is for those who encode many texts.
    """
    known = _proven.get(tokenizer)
    if known is None or known[0] != len(tokenizer):
        known = _proven[tokenizer] = len(tokenizer), prove(tokenizer)
    return known[1] is not None


def fast_copy(tokenizer: PreTrainedTokenizerBase) -> BytePairs | None:
    """What `speed_up` made of the tokenizer, if it has not changed since."""
    size, pairs = _proven.get(tokenizer, (0, None))
    return pairs if pairs and size == len(tokenizer) else None


class BytePairs:
    """A byte-level BPE tokenizer in tiktoken's hands.

    Args:
        pattern: what cuts a text into words.
        ranks: tokens as bytes, and their ids.
        added: tokens that are found in the text before anything else, and their ids.
    """

    def __init__(self, pattern: str, ranks: dict[bytes, int], added: dict[str, int]) -> None:
        import tiktoken

        self._words = tiktoken.Encoding("of a tokenizer", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self._added = added
        longest_first = sorted(added, key=len, reverse=True)
        self._cut = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        self._often = lru_cache(maxsize=256)(self._words.encode_ordinary)  # "\n" and the like, between added tokens

    def encode(self, text: str) -> list[int] | None:
        """The ids of a text without any special tokens around it; None: ask the tokenizer itself."""
        if not _ALL_KNOWN.fullmatch(text):
            return None
        ids: list[int] = []
        for number, part in enumerate(self._cut.split(text)):
            if number % 2:
                ids.append(self._added[part])
            elif len(part) > 12:
                ids += self._words.encode_ordinary(part)
            elif part:
                ids += self._often(part)
        return ids


def prove(tokenizer: PreTrainedTokenizerBase) -> BytePairs | None:
    """tiktoken's copy of a tokenizer, if it is of the kind and everything above holds."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    rules = json.loads(backend.to_str())
    pattern, added = find_pattern(rules), find_added(rules)
    if pattern is None or added is None or (ranks := find_ranks(rules["model"], added)) is None:
        return None
    try:
        pairs = BytePairs(pattern, ranks, added)
    except ValueError:  # an expression that tiktoken's engine does not know
        return None
    every = [f"a{c}1 {c}'{c}\n" for c in map(chr, range(0x10000)) if _ALL_KNOWN.fullmatch(c)]
    texts = ["".join(every[at : at + 200]) for at in range(0, len(every), 200)]  # a long one takes twice the time
    expected = backend.encode_batch_fast(texts, add_special_tokens=False)
    same = all(pairs.encode(text) == found.ids for text, found in zip(texts, expected, strict=True))
    return pairs if same else None


def find_pattern(rules: dict[str, Any]) -> str | None:
    """The one expression that cuts a text into words, before their bytes are joined; None if it is done otherwise."""
    if rules["normalizer"] not in (None, {"type": "NFC"}):
        return None
    cutter = rules["pre_tokenizer"] or {}
    *before, last = cutter.get("pretokenizers", [cutter])
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return None
    if not before:
        return GPT2_PATTERN if last["use_regex"] else None
    [split, *more] = before
    if more or last["use_regex"] or split["type"] != "Split" or split["behavior"] != "Isolated" or split["invert"]:
        return None
    pattern = split["pattern"].get("Regex")
    return pattern if pattern and COMMON_SYNTAX.fullmatch(pattern) else None


def find_ranks(model: dict[str, Any], added: Iterable[str]) -> dict[bytes, int] | None:
    """The tokens that merges make, by their bytes; None if tiktoken could join other pairs."""
    from tokenizers.models import BPE
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    odd = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if model["type"] != "BPE" or any(model[name] for name in odd):
        return None
    vocabulary = model["vocab"]
    byte_of = {text: byte for byte, text in bytes_to_unicode().items()}
    merges: list[tuple[str, str]] = [(left, right) for left, right in model["merges"]]
    made = list(dict.fromkeys(left + right for left, right in merges))
    if not byte_of.keys() <= vocabulary.keys() or byte_of.keys() & set(made):
        return None
    ids = [vocabulary[left + right] for left, right in merges]
    if ids != sorted(ids):
        return None
    joined = BPE(vocabulary, merges)
    if any(len(joined.tokenize(token)) != 1 for token in made):
        return None
    if model["ignore_merges"] and vocabulary.keys() - {*byte_of, *made, *added}:
        return None  # words that no merge makes, and that are found all the same
    return {bytes(byte_of[c] for c in token): vocabulary[token] for token in (*byte_of, *made)}


def find_added(rules: dict[str, Any]) -> dict[str, int] | None:
    """The tokens that are cut out of the text first, and their ids; None if one also takes blanks beside it or such."""
    tokens = rules["added_tokens"]
    if len(tokens) > MOST_ADDED or any(token[name] for token in tokens for name in ("lstrip", "rstrip", "single_word")):
        return None
    if len({token["normalized"] for token in tokens}) > 1:
        return None  # these are looked for in two passes
    return {token["content"]: token["id"] for token in tokens}

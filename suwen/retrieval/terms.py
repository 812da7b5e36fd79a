"""Text to search terms: jieba's words, and each pair of Chinese characters that stand side by side.

Words carry meaning; pairs need no dictionary, so a drug that no dictionary knows is found as well. A term is a number
of TERM_BITS bits: a pair is its two code points, a word a hash, so an index needs no vocabulary in memory. (Among a
million words two are expected to share a hash in one index of four thousand.)
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain

import numpy as np

TERM_BITS = 52  # leaves 12 bits of 64 for the place of a passage in its block
VERSION = 1  # to be raised when the same text gives other terms, so that old indexes are built anew
HAN = "\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# PDF and books are wrapped in the middle of a word.
WRAP = re.compile(f"[ \\t]*\\n[ \\t]*(?=[{HAN}])")
# The punctuation of every Chinese text, and what NFKC makes of it. With that replaced, which is quick, most texts are
# in its form already, and it has only to look.
WIDE = tuple((mark, unicodedata.normalize("NFKC", mark)) for mark in "，（）：；？！～")
PAIR = re.compile(f"[{HAN}]{{1,2}}")
WORD_BIT = 1 << (TERM_BITS - 1)


@lru_cache(maxsize=1 << 20)
def _word_number(token: str) -> int:
    """0 for what is no term: punctuation, single characters, and pairs, which are terms anyway."""
    if not token.isalnum() or PAIR.fullmatch(token):
        return 0
    digest = hashlib.blake2b(token.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little") % WORD_BIT | WORD_BIT


@lru_cache(maxsize=1 << 13)  # a block of passages, which are looked at for instructions and then for terms
def normalise(text: str) -> str:
    """Blind to case, width and wrapped lines; half characters (lone surrogates), which jieba refuses, become "?"."""
    text = text.encode("utf-8", errors="replace").decode("utf-8")
    for mark, narrow in WIDE:
        text = text.replace(mark, narrow)
    return WRAP.sub("", unicodedata.normalize("NFKC", text).casefold())


def text_terms(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The terms of several texts.

    Returns:
        (T,) int32 place of the text and (T,) uint64 term, as often as each occurs, in no particular order.
    """
    import rjieba

    texts = [normalise(text) for text in texts]
    tokens = [rjieba.cut_for_search(text) for text in texts]
    order: np.ndarray = np.arange(len(texts), dtype=np.int32)
    words = np.array([*map(_word_number, chain.from_iterable(tokens))], dtype=np.uint64)
    word_places = np.repeat(order, [*map(len, tokens)])[words != 0]
    codes = np.frombuffer("\n".join(texts).encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    places: np.ndarray = np.repeat(order, [len(text) + 1 for text in texts])
    han: np.ndarray = (
        ((codes >= 0x3400) & (codes <= 0x9FFF))
        | ((codes >= 0xF900) & (codes <= 0xFAFF))
        | ((codes >= 0x20000) & (codes <= 0x3FFFF))
    )
    pairs = np.flatnonzero(han[:-1] & han[1:])
    return (
        np.concatenate([word_places, places[pairs]]),
        np.concatenate([words[words != 0], codes[pairs] << np.uint64(21) | codes[pairs + 1]]),
    )

"""Text metrics for Chinese: BLEU-1..4, GLEU, ROUGE-1/2/L and Distinct, on characters or on words.

Each answer is first reduced to counts (`text_counts`), and every score is a function of sums or means of those counts,
so that a bootstrap can resample answers without counting anything twice. No smoothing anywhere: a BLEU without one
matching 4-gram is 0. The scores equal sacrebleu's (tokenize=char, no smoothing), NLTK's corpus_gleu and rouge-score's
where those define them; the tests compare.

Tokens decide more than models do (BLEU-1 of the same answers differs by 15 points between characters and words), so a
score is never printed without its `signature`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

VERSION = 1
ORDERS = 4
TOKENIZERS = ("char", "jieba")
SCORES = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "GLEU", "ROUGE-1", "ROUGE-2", "ROUGE-L")

# Columns of the matrix that text_counts gives
MATCHES, TOTALS = slice(0, ORDERS), slice(ORDERS, 2 * ORDERS)  # n-grams of the candidate: in the reference too, all
LENGTHS = 2 * ORDERS  # candidate, and behind it the reference
GLEU_MATCHES, GLEU_TOTALS = 2 * ORDERS + 2, 2 * ORDERS + 3
ROUGE = 2 * ORDERS + 4  # F1 of ROUGE-1, ROUGE-2, ROUGE-L
COLUMNS = ROUGE + 3


class Overlap(NamedTuple):
    """ROUGE of one pair, as fractions of one."""

    precision: float
    recall: float
    f1: float


def signature(name: str, tokenizer: str) -> str:
    """What has to be known to compare a score: "BLEU-4|tok:char|smooth:none|corpus|v1"."""
    how = {"BLEU": "smooth:none|corpus", "GLEU": "n:1-4|corpus", "ROUGE": "F1|clipped|macro", "Distinct": "corpus"}
    return f"{name}|tok:{tokenizer}|{how[name.split('-')[0]]}|v{VERSION}"


def tokenize(text: str, tokenizer: str = "char") -> list[str]:
    """The tokens of a text, white space left out.

    Args:
        tokenizer: "char": every character is one; "jieba": words (by rjieba, jieba's dictionary and HMM in Rust).
    """
    if tokenizer == "char":
        return [character for character in text if not character.isspace()]
    if tokenizer == "jieba":
        import rjieba

        return [word for word in rjieba.cut(text) if not word.isspace()]
    raise ValueError(f"tokenizer: found {tokenizer!r}, expected one of {', '.join(TOKENIZERS)}")


def ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence; bit-parallel (Hyyrö 2004, "Bit-parallel LCS-length computation")."""
    positions: dict[str, int] = {}
    for i, token in enumerate(first):
        positions[token] = positions.get(token, 0) | 1 << i
    ones = (1 << len(first)) - 1
    row = ones
    for token in second:
        matched = row & positions.get(token, 0)
        row = (row + matched | row - matched) & ones
    return len(first) - row.bit_count()


def overlap(matches: int, candidate_total: int, reference_total: int) -> Overlap:
    precision = matches / candidate_total if candidate_total else 0.0
    recall = matches / reference_total if reference_total else 0.0
    f1 = 2 * precision * recall / (precision + recall) if matches else 0.0
    return Overlap(precision, recall, f1)


def rouge(candidate: Sequence[str], reference: Sequence[str]) -> dict[str, Overlap]:
    """ROUGE-1, ROUGE-2 (clipped counts) and ROUGE-L of one pair of token lists; Lin 2004."""
    scores = {}
    for n in (1, 2):
        left, right = ngrams(candidate, n), ngrams(reference, n)
        scores[f"ROUGE-{n}"] = overlap((left & right).total(), left.total(), right.total())
    common = longest_common_subsequence(candidate, reference)
    scores["ROUGE-L"] = overlap(common, len(candidate), len(reference))
    return scores


def text_counts(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> np.ndarray:
    """(N, COLUMNS) float64 counts, one row for each candidate with its reference, both as tokens."""
    rows: np.ndarray = np.zeros((len(candidates), COLUMNS))
    for row, candidate, reference in zip(rows, candidates, references, strict=True):
        left = [ngrams(candidate, n) for n in range(1, ORDERS + 1)]
        right = [ngrams(reference, n) for n in range(1, ORDERS + 1)]
        shared = [(a & b).total() for a, b in zip(left, right, strict=True)]
        totals, wanted = [a.total() for a in left], [b.total() for b in right]
        row[MATCHES], row[TOTALS] = shared, totals
        row[LENGTHS], row[LENGTHS + 1] = len(candidate), len(reference)
        row[GLEU_MATCHES], row[GLEU_TOTALS] = sum(shared), max(sum(totals), sum(wanted))
        common = longest_common_subsequence(candidate, reference)
        row[ROUGE] = overlap(shared[0], totals[0], wanted[0]).f1
        row[ROUGE + 1] = overlap(shared[1], totals[1], wanted[1]).f1
        row[ROUGE + 2] = overlap(common, len(candidate), len(reference)).f1
    return rows


def text_scores(means: np.ndarray) -> np.ndarray:
    """Scores of a corpus, or of many resampled ones at once.

    Args:
        means: (..., COLUMNS) mean of the rows of `text_counts` over the answers of a corpus.

    Returns:
        (..., len(SCORES)) scores as percentages, in the order of SCORES. BLEU: Papineni et al. 2002, corpus level with
        the brevity penalty; GLEU: Wu et al. 2016 (arXiv:1609.08144), section 4.3.
    """
    means = np.asarray(means, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        precisions = np.where(means[..., TOTALS] > 0, means[..., MATCHES] / means[..., TOTALS], 0.0)
        geometric = np.exp(np.cumsum(np.log(precisions), axis=-1) / np.arange(1, ORDERS + 1))
        candidate, reference = means[..., LENGTHS], means[..., LENGTHS + 1]
        brevity = np.exp(np.minimum(0.0, 1 - reference / np.where(candidate > 0, candidate, np.nan)))
        bleu = np.nan_to_num(geometric * brevity[..., None])
        gleu = np.nan_to_num(means[..., GLEU_MATCHES] / means[..., GLEU_TOTALS])
    return 100 * np.concatenate([bleu, gleu[..., None], means[..., ROUGE:]], axis=-1)


def distinct(candidates: Sequence[Sequence[str]], n: int) -> float:
    """Share of different n-grams among all n-grams of the answers, in percent; Li et al. 2016 (arXiv:1510.03055)."""
    counts: Counter[tuple[str, ...]] = Counter()
    for candidate in candidates:
        counts.update(ngrams(candidate, n))
    return 100 * len(counts) / counts.total() if counts else 0.0

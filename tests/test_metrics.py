"""Text metrics against worked-out numbers and the libraries that define them."""

import random

import numpy as np
import pytest

from suwen import metrics

CANDIDATES = [
    "高血压患者应当低盐饮食，按时服药。",
    "糖尿病的典型症状是多饮、多食、多尿和体重下降",
    "建议您做CT检查，多喝水 注意休息",
    "发热",
]
REFERENCES = [
    "高血压病人要低盐饮食，每天按时服药，定期测量血压。",
    "多饮、多食、多尿、体重下降是糖尿病的典型症状。",
    "建议先做血常规和胸部CT检查，多喝水，注意休息。",
    "发热和咳嗽都应该就医",
]


def corpus(candidates, references, tokenizer="char"):
    left, right = ([metrics.tokenize(text, tokenizer) for text in texts] for texts in (candidates, references))
    counts = metrics.text_counts(left, right)
    return dict(zip(metrics.SCORES, metrics.text_scores(counts.mean(axis=0)), strict=True)), left, right


def random_pairs(count=40):
    rng = random.Random(1)
    words = ["高血压", "患者", "低盐", "饮食", "CT", "检查", "，", "。", "多", "喝水", "头痛", "发热", "B超"]
    return zip(
        *[("".join(rng.choices(words, k=9)), "".join(rng.choices(words, k=11))) for _ in range(count)], strict=True
    )


def test_bleu_of_a_pair_worked_by_hand():
    # "abcd" against "abce": 3 of 4 unigrams, 2 of 3 bigrams, 1 of 2 trigrams; lengths equal, no penalty
    scores, *_ = corpus(["abcd"], ["abce"])
    assert scores["BLEU-1"] == pytest.approx(75)
    assert scores["BLEU-2"] == pytest.approx(100 * (3 / 4 * 2 / 3) ** 0.5)
    assert scores["BLEU-3"] == pytest.approx(100 * (3 / 4 * 2 / 3 * 1 / 2) ** (1 / 3))
    assert scores["BLEU-4"] == 0
    assert scores["ROUGE-1"] == scores["ROUGE-L"] == pytest.approx(75)
    assert scores["GLEU"] == pytest.approx(60)  # 6 shared of 10 n-grams


def test_a_short_answer_pays_the_brevity_penalty():
    scores, *_ = corpus(["ab"], ["abcd"])
    assert scores["BLEU-1"] == pytest.approx(100 * np.exp(-1))


@pytest.mark.parametrize("tokenizer", metrics.TOKENIZERS)
def test_scores_equal_the_libraries_that_define_them(tokenizer):
    sacrebleu = pytest.importorskip("sacrebleu")
    from nltk.translate.bleu_score import corpus_bleu
    from nltk.translate.gleu_score import corpus_gleu
    from rouge_score.rouge_scorer import RougeScorer

    for texts in ((CANDIDATES, REFERENCES), tuple(map(list, random_pairs()))):
        scores, left, right = corpus(*texts, tokenizer)
        for n in range(1, 5):
            joined = [" ".join(tokens) for tokens in left], [[" ".join(tokens) for tokens in right]]
            bleu = sacrebleu.BLEU(tokenize="none", smooth_method="none", max_ngram_order=n, force=True)
            assert scores[f"BLEU-{n}"] == pytest.approx(bleu.corpus_score(*joined).score, abs=1e-9)
            if min(map(len, left)) >= n:  # NLTK counts one n-gram in an answer too short for any, sacrebleu none
                expected = 100 * corpus_bleu([[r] for r in right], left, weights=[1 / n] * n)
                assert scores[f"BLEU-{n}"] == pytest.approx(expected, abs=1e-9)
        assert scores["GLEU"] == pytest.approx(100 * corpus_gleu([[r] for r in right], left), abs=1e-9)

        class Words:
            def tokenize(self, text):
                return text.split("\0")

        names = {"ROUGE-1": "rouge1", "ROUGE-2": "rouge2", "ROUGE-L": "rougeL"}
        scorer = RougeScorer(list(names.values()), tokenizer=Words())
        found = [scorer.score("\0".join(r), "\0".join(c)) for c, r in zip(left, right, strict=True)]
        for ours, theirs in names.items():
            expected = 100 * np.mean([score[theirs].fmeasure for score in found])
            assert scores[ours] == pytest.approx(expected, abs=1e-9)
            for (c, r), score in zip(zip(left, right, strict=True), found, strict=True):
                assert metrics.rouge(c, r)[ours] == pytest.approx(tuple(score[theirs]), abs=1e-12)


def test_characters_are_those_of_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu")
    scores, *_ = corpus(CANDIDATES, REFERENCES)
    theirs = sacrebleu.BLEU(tokenize="char", smooth_method="none").corpus_score(CANDIDATES, [REFERENCES])
    assert scores["BLEU-4"] == pytest.approx(theirs.score, abs=1e-9)


def test_longest_common_subsequence_equals_the_table():
    rng = random.Random(0)
    for _ in range(200):
        first, second = ("".join(rng.choices("abcd", k=rng.randrange(12))) for _ in range(2))
        table = np.zeros((len(first) + 1, len(second) + 1), dtype=int)
        for i, a in enumerate(first):
            for j, b in enumerate(second):
                table[i + 1, j + 1] = table[i, j] + 1 if a == b else max(table[i, j + 1], table[i + 1, j])
        assert metrics.longest_common_subsequence(first, second) == table[-1, -1]


def test_empty_answers_score_zero_and_identical_ones_a_hundred():
    assert all(score == 0 for score in corpus(["", " "], ["高血压患者", ""])[0].values())
    assert all(score == pytest.approx(100) for score in corpus(["高血压患者"], ["高血压患者"])[0].values())


def test_distinct_counts_over_all_answers():
    assert metrics.distinct([list("abab"), list("ab")], 1) == pytest.approx(100 * 2 / 6)
    assert metrics.distinct([list("abab"), list("ab")], 2) == pytest.approx(100 * 2 / 4)
    assert metrics.distinct([[]], 2) == 0


def test_a_signature_names_tokens_and_smoothing():
    assert metrics.signature("BLEU-4", "char") == "BLEU-4|tok:char|smooth:none|corpus|v1"
    with pytest.raises(ValueError, match="expected one of char, jieba"):
        metrics.tokenize("a", "words")

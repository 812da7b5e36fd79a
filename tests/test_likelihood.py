"""Scores of continuations: equal to the obvious way, for models of different kinds, with flat memory."""

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from suwen.likelihood import Choice, Scorer, build_tree, encode_choice, tree_mask

pytestmark = pytest.mark.training

QUESTIONS = [
    "高血压患者的饮食应当",
    "糖尿病的典型症状不包括下列哪一项？多饮、多食、多尿",
    "发热、咳嗽先做什么检查",
    "血压",
]
SETS = ("A\n", "B\n", "C\n", "AB\n", "AC\n", "BC\n", "ABC\n")


def one_by_one(model, choice):
    """Each continuation in a row of its own, from the definition."""
    scores = []
    with torch.no_grad():
        for continuation in choice.continuations:
            ids = choice.prefix + continuation
            logps = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
            at = range(len(choice.prefix), len(ids))
            scores.append(sum(logps[i - 1, ids[i]].item() for i in at))
    return scores


def choices(tokenizer, texts=SETS):
    return [encode_choice(tokenizer, f"问题：{question}\n答案：", texts) for question in QUESTIONS]


def other_model(name, vocabulary):
    torch.manual_seed(0)
    sizes = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 1}
    if name == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, **sizes)).eval()
    if name == "bloom":
        return BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=4, **sizes)).eval()
    return MistralForCausalLM(
        MistralConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            sliding_window=16, **sizes,
        )
    ).eval()  # fmt: skip


@pytest.mark.parametrize("style", ["byte", "metaspace"])
@pytest.mark.parametrize("tokens", [1, 100, 10_000])
def test_scores_equal_those_of_one_by_one(style, tokens):
    tokenizer = tiny_tokenizer(style=style)
    model = tiny_model(tokenizer)
    asked = choices(tokenizer)
    scorer = Scorer(model, tokens)
    found = list(scorer.score(asked))
    assert scorer.problem is None
    for scores, plain, choice in zip(found, scorer.score_plainly(asked), asked, strict=True):
        expected = one_by_one(model, choice)
        assert scores == pytest.approx(expected, abs=1e-4)
        assert plain == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name, uses_trees", [("gpt2", True), ("bloom", False), ("mistral", True)])
def test_any_architecture_is_scored_right_by_trees_or_by_rows(name, uses_trees):
    tokenizer = tiny_tokenizer()
    model = other_model(name, len(tokenizer))
    scorer = Scorer(model, 200)
    asked = choices(tokenizer)
    for scores, choice in zip(scorer.score(asked), asked, strict=True):
        assert scores == pytest.approx(one_by_one(model, choice), abs=1e-4)
    assert (scorer.problem is None) == uses_trees


def test_texts_of_any_length_are_scored():
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer)
    [choice] = [encode_choice(tokenizer, "", ["高血压患者应当低盐饮食，按时服药。"])]
    assert len(choice.prefix) == 1  # BOS
    [[score]] = Scorer(model).score([choice])
    assert score == pytest.approx(one_by_one(model, choice)[0], abs=1e-3)


def test_a_tree_holds_each_shared_token_once():
    tree = build_tree(Choice([7, 8], [[1], [2], [1, 2], [1, 2, 3], [1, 3]]))
    assert tree.ids == [7, 8, 1, 2]
    assert tree.depth == [0, 1, 2, 3]
    assert tree.paths == [[(1, 1)], [(1, 2)], [(1, 1), (2, 2)], [(1, 1), (2, 2), (3, 3)], [(1, 1), (2, 3)]]


def test_all_sets_of_five_letters_cost_31_tokens_with_their_line_end():
    letters = "ABCDE"
    sets = [[i for i in range(5) if number >> i & 1] + [9] for number in range(1, 32)]
    assert len(build_tree(Choice([0], sets)).ids) == 1 + 31
    assert len(build_tree(Choice([0], [s[:-1] for s in sets])).ids) == 1 + 15, letters


def test_a_mask_shows_prefix_and_ancestors_and_nothing_of_other_questions():
    trees = [build_tree(Choice([7, 8], [[1, 5], [2, 5], [1, 2, 5]])), build_tree(Choice([9], [[1]]))]
    assert trees[0].ids == [7, 8, 1, 2, 2]
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],  # A
        [1, 1, 0, 1, 0, 0],  # B
        [1, 1, 1, 0, 1, 0],  # AB
        [0, 0, 0, 0, 0, 1],
    ]
    assert tree_mask(trees).int().tolist() == expected


def test_a_seam_that_merges_goes_into_every_continuation():
    class Merging:  # writes "：A" as one token, as Qwen's vocabulary may
        eos_token_id = 0

        def __call__(self, texts, **_):
            if isinstance(texts, str):
                return {"input_ids": self([texts])["input_ids"][0]}
            words = [text.replace("：A", "#") for text in texts]
            return {"input_ids": [[ord(c) for c in word] for word in words]}

    choice = encode_choice(Merging(), "答案：", ["A", "B"])
    assert choice == Choice([0, *map(ord, "答案")], [[ord("#")], [ord("："), ord("B")]])


def test_rows_are_taken_from_a_stream():
    tokenizer = tiny_tokenizer()
    read = []

    def endless():
        while True:
            read.append(1)
            yield choices(tokenizer)[0]

    scores = Scorer(tiny_model(tokenizer), 150).score(endless())
    for _ in range(5):
        next(scores)
    assert len(read) < 20

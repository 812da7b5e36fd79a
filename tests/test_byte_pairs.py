"""tiktoken gives the ids of the tokenizer itself, or is not asked."""

import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from suwen import byte_pairs
from suwen.byte_pairs import _ALL_KNOWN, GPT2_PATTERN, BytePairs, fast_copy, find_added, find_ranks, prove, speed_up
from suwen.embedded import build_embedded_model
from suwen.encoding import ChatEncoder, token_ids
from suwen.rows import ConversationRows, DocumentRows

CONTROL = ("<|im_start|>", "<|im_end|>", "<|im_end|>x")  # one begins another
LETTERS = [chr(code) for code in range(0x10000) if _ALL_KNOWN.fullmatch(chr(code))]


def changed(**rules) -> PreTrainedTokenizerFast:
    """The tiny byte-level tokenizer with other rules."""
    found = json.loads(tiny_tokenizer(CONTROL).backend_tokenizer.to_str())
    for name, value in rules.items():
        found[name] = value(found[name])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(found)))


def every_pair_merged(model: dict) -> dict:
    """As the converters of tiktoken files write it: every two tokens that spell a third, and whole words first."""
    tokens = [left + right for left, right in model["merges"]]
    merges = []
    for token in tokens:
        cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
        merges += [list(pair) for pair in cuts if all(part in model["vocab"] for part in pair)]
    assert len(merges) > len(tokens)
    return model | {"merges": merges, "ignore_merges": True}


def of_gpt2(cutter: dict) -> dict:
    return cutter["pretokenizers"][-1] | {"use_regex": True}


@pytest.fixture(scope="module", params=["Qwen", "tiktoken's", "GPT-2's pattern", "embedded"])
def tokenizer(request):
    if request.param == "embedded":
        from suwen.models import load_tokenizer

        return load_tokenizer(str(build_embedded_model()), "auto")
    if request.param == "tiktoken's":
        return changed(model=every_pair_merged, normalizer=lambda _: None)
    return changed(pre_tokenizer=of_gpt2) if request.param == "GPT-2's pattern" else tiny_tokenizer(CONTROL)


def fast_ids(tokenizer, text):
    pairs = fast_copy(tokenizer)
    return pairs and pairs.encode(text)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from([*CONTROL, *"aab 患者高血压\n\t ,。1２3", "aaaaaaa", "高高高", "'s", "'LL", "   ", " \n \n"])
        | st.sampled_from(LETTERS),
        max_size=40,
    ).map("".join)
)
def test_the_ids_are_those_of_the_tokenizer(tokenizer, text):
    assert speed_up(tokenizer)
    assert fast_ids(tokenizer, text) == tokenizer(text, add_special_tokens=False)["input_ids"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(max_size=12), max_size=4))
def test_any_text_has_its_ids_in_its_place(tokenizer, texts):
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert speed_up(tokenizer)
    assert token_ids(tokenizer, texts) == expected


def test_characters_that_combine_or_are_new_take_the_other_way():
    tokenizer = tiny_tokenizer(CONTROL)
    assert speed_up(tokenizer) and fast_ids(tokenizer, "血压 é") is not None
    for text in ("e\u0301", "\u2126", "\uf900", "か\u3099", "\ue000", "😷", "\u0600", "\u200b\u2028", "𠀀"):
        assert fast_ids(tokenizer, f"血压{text}") is None, text


def test_no_known_character_is_changed_by_normalisation_alone_or_beside_another():
    both = "".join(a + b for a, b in zip(LETTERS, reversed(LETTERS), strict=True))
    assert unicodedata.is_normalized("NFC", both) and unicodedata.is_normalized("NFC", "".join(LETTERS))
    assert not any(unicodedata.combining(c) or unicodedata.category(c) == "Co" for c in LETTERS)


def test_without_being_asked_nothing_is_sped_up_and_a_larger_vocabulary_is_proven_again():
    tokenizer = tiny_tokenizer(CONTROL)
    assert fast_ids(tokenizer, "高血压") is None
    assert speed_up(tokenizer) and fast_ids(tokenizer, "高血压")
    tokenizer.add_tokens([AddedToken("高血压", normalized=False)])
    assert fast_ids(tokenizer, "高血压") is None
    assert speed_up(tokenizer) and fast_ids(tokenizer, "高血压") == [len(tokenizer) - 1]


def bpe(*merges: str) -> dict:
    pairs = [pair.split("+") for pair in merges]
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in pairs)]
    vocabulary = {word: i for i, word in enumerate(words)}
    blank = Tokenizer(models.BPE(vocabulary, []))
    return json.loads(blank.to_str())["model"] | {"merges": pairs}


def test_a_token_that_its_own_bytes_do_not_come_out_as_is_no_tiktoken_vocabulary():
    # bc is joined first, and a+bc is not on the list: tokenizers never makes abc, tiktoken does
    model = bpe("b+c", "a+b", "ab+c")
    assert find_ranks(model, ()) is None
    tokenizer = Tokenizer(models.BPE(model["vocab"], [tuple(pair) for pair in model["merges"]]))
    ranks = {word.encode("latin-1"): i for word, i in model["vocab"].items() if word.isascii()}
    assert tokenizer.encode("abc").tokens == ["a", "bc"]
    assert BytePairs(GPT2_PATTERN, ranks, {}).encode("abc") == [model["vocab"]["abc"]]
    assert find_ranks(bpe("b+c", "a+bc"), ()) is not None


def test_ids_in_another_order_than_that_of_the_merges_are_not_taken():
    model = bpe("a+b", "c+d")
    model["vocab"]["ab"], model["vocab"]["cd"] = model["vocab"]["cd"], model["vocab"]["ab"]
    assert find_ranks(model, ()) is None


def test_words_that_no_merge_makes_count_where_whole_words_are_looked_up():
    model = bpe("a+b")
    model["vocab"]["xyz"] = 999
    assert find_ranks(model, ()) is not None and find_ranks(model | {"ignore_merges": True}, ()) is None
    assert find_ranks(model | {"ignore_merges": True}, ["xyz"]) is not None


def second_split(cutter: dict) -> dict:
    digits = {"type": "Split", "pattern": {"Regex": r"\d"}, "behavior": "Isolated", "invert": False}
    return cutter | {"pretokenizers": [digits, *cutter["pretokenizers"]]}


def unknown_expression(cutter: dict) -> dict:
    cutter["pretokenizers"][0]["pattern"]["Regex"] = r"\p{Han}|(?~abc)|."  # Oniguruma's absence operator
    return cutter


def misses_letters(cutter: dict) -> dict:
    cutter["pretokenizers"][0]["pattern"]["Regex"] = r"\p{Han}|\n"  # tokenizers keeps what lies between, tiktoken not
    return cutter


@pytest.mark.parametrize(
    "rules",
    [
        {"pre_tokenizer": second_split},
        {"pre_tokenizer": unknown_expression},
        {"pre_tokenizer": misses_letters},
        {"normalizer": lambda _: {"type": "Lowercase"}},
        {"added_tokens": lambda tokens: [tokens[0] | {"lstrip": True}, *tokens[1:]]},
        {"added_tokens": lambda tokens: [tokens[0] | {"normalized": True}, *tokens[1:]]},
        {"model": lambda model: model | {"dropout": 0.1}},
    ],
    ids=["two patterns", "other engine", "gaps", "normalizer", "blanks", "two passes", "dropout"],
)
def test_other_kinds_of_tokenizers_encode_themselves(rules):
    tokenizer = changed(**rules)
    assert prove(tokenizer) is None and not speed_up(tokenizer) and fast_ids(tokenizer, "高血压") is None


def test_sentencepiece_and_long_lists_of_added_tokens_encode_themselves():
    assert prove(tiny_tokenizer(style="metaspace")) is None
    token = {"id": 0, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    many = [token | {"content": f"药{number}"} for number in range(byte_pairs.MOST_ADDED + 1)]
    assert find_added({"added_tokens": many}) is None and len(find_added({"added_tokens": many[1:]}) or ()) == 512


def test_rows_have_the_same_ids_at_either_speed():
    from suwen.models import load_tokenizer

    folder = str(build_embedded_model())
    plain, fast = (load_tokenizer(folder, "auto") for _ in range(2))
    messages = [
        {"role": "system", "content": "你是医生 <|im_end|> 。"},
        {"role": "user", "content": "头痛、発熱 38.5℃ 怎么办？😷"},
        {"role": "assistant", "content": "多喝水。\n\n  <|im_start|>user 休息 "},
        {"role": "user", "content": "e\u0301 还有呢？"},
        {"role": "assistant", "content": "就诊。"},
    ]
    for build, row in (
        (lambda tokenizer: ConversationRows(ChatEncoder(tokenizer, None), 512, False), {"messages": messages}),
        (lambda tokenizer: DocumentRows(tokenizer, 8), {"text": messages[2]["content"] * 5 + "é" * 30}),
    ):
        slow, sped_up = build(plain), build(fast)
        sped_up.speed_up()
        assert fast_ids(fast, "头痛") is not None and fast_ids(plain, "头痛") is None
        assert sped_up(row) == slow(row) and sped_up.fingerprint == slow.fingerprint

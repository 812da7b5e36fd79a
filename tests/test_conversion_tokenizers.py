"""Converted tokenizers cut every line as the library that trained them; what no engine reproduces is refused."""

import base64
import json
import random
import shutil
from collections import Counter
from functools import lru_cache
from pathlib import Path

import pytest
import sentencepiece
from old_checkpoints import merged_sentencepiece
from old_checkpoints import train_sentencepiece as train
from tiny import tiny_tokenizer
from transformers import AutoTokenizer

import suwen.architectures  # noqa: F401  (registers its classes)
from suwen.conversion.families import FAMILIES
from suwen.conversion.sentencepiece import read_proto
from suwen.conversion.tiktoken import is_tiktoken
from suwen.conversion.tokenizer_files import QWEN_CONTROL, first_difference
from suwen.conversion.tokenizers import convert_tokenizer
from suwen.embedded import sample_texts
from suwen.encoding import ChatEncoder, default_beginning, encode_document

pytestmark = pytest.mark.training

TEXT = [line.replace("\n", " ") for line in list(sample_texts())[:600]]
HELD_OUT = list(sample_texts())[600:1200]


def folder_with(tmp_path: Path, model: bytes, name: str = "tokenizer.model", **settings) -> Path:
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / name).write_bytes(model)
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def convert(folder: Path, tmp_path: Path, family: str):
    target = tmp_path / "new"
    target.mkdir()
    summary = convert_tokenizer(folder, target, FAMILIES[family], HELD_OUT)
    return AutoTokenizer.from_pretrained(target), summary


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"add_dummy_prefix": False},
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
        {"model_type": "unigram"},
        {"byte_fallback": False},
        {"user_defined_symbols": ["<reserved_106>", "<reserved_107>", "糖尿病足"], "add_dummy_prefix": False},
    ],
    ids=lambda flags: "-".join(map(str, flags)) or "plain",
)
def test_a_sentencepiece_model_is_cut_alike_whatever_its_flags(flags, tmp_path):
    model = train(**{k: tuple(v) if isinstance(v, list) else v for k, v in flags.items()})
    tokenizer, summary = convert(folder_with(tmp_path, model), tmp_path, "baichuan2-7b")
    assert "lines agree" in summary
    original = sentencepiece.SentencePieceProcessor(model_proto=model)
    for line in HELD_OUT:
        assert tokenizer(line, add_special_tokens=False)["input_ids"] == original.encode(line)
        if original.unk_id() not in original.encode(line):  # what it stood for is lost, its text a matter of taste
            assert tokenizer.decode(original.encode(line)) == original.decode(original.encode(line))
    assert "as a fast tokenizer" in summary
    assert tokenizer.eos_token == "</s>" and tokenizer.eos_token_id == original.eos_id()


def test_a_word_that_the_user_defined_takes_no_blank_behind_it(tmp_path):
    """The fast engine would put the prefix of a text behind such a word too."""
    model = train(user_defined_symbols=("糖尿病足",))
    tokenizer, summary = convert(folder_with(tmp_path, model), tmp_path, "xverse")
    assert "cut by the sentencepiece library itself" in summary
    original = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert tokenizer("预防糖尿病足护理").input_ids == original.encode("预防糖尿病足护理")


def test_a_merged_vocabulary_goes_on_with_the_sentencepiece_library(tmp_path):
    """Its pieces share a score, so that the leftmost pair merges first, which no fast tokenizer can express."""
    model = merged_sentencepiece()
    folder = folder_with(tmp_path, model, tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>")
    tokenizer, summary = convert(folder, tmp_path, "yi")
    assert "cut by the sentencepiece library itself" in summary
    original = sentencepiece.SentencePieceProcessor(model_proto=model)
    for line in [*TEXT, *HELD_OUT]:
        ids = original.encode(line)
        assert tokenizer(line, add_special_tokens=False)["input_ids"] == ids
        assert tokenizer.decode(ids) == original.decode(ids)
    assert tokenizer("发热").input_ids[0] == tokenizer.bos_token_id
    tokenizer.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert type(again) is type(tokenizer)
    assert [again(line).input_ids for line in HELD_OUT] == [tokenizer(line).input_ids for line in HELD_OUT]


def test_a_tokenizer_on_the_library_itself_encodes_conversations(tmp_path):
    folder = folder_with(tmp_path, merged_sentencepiece(), tokenizer_class="LlamaTokenizer")
    tokenizer, _ = convert(folder, tmp_path, "yi")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}" \
        "{% if add_generation_prompt %}assistant: {% endif %}"  # fmt: skip
    encoder = ChatEncoder(tokenizer)
    assert encoder.stop_token_ids == [tokenizer.eos_token_id]
    messages = [{"role": "user", "content": "发热三天怎么办？"}, {"role": "assistant", "content": "请先测量体温。"}]
    prompt = encoder.encode_prompt(messages[:1])
    assert tokenizer.decode(prompt).endswith("assistant:") or tokenizer.decode(prompt).endswith("assistant: ")


def test_chatglm2_gets_its_control_tokens_and_its_prefix(tmp_path):
    model = train()
    size = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
    tokenizer, _ = convert(folder_with(tmp_path, model, tokenizer_class="ChatGLMTokenizer"), tmp_path, "chatglm2")
    control = ["[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"]
    assert tokenizer.convert_tokens_to_ids(control) == list(range(size, size + 5))
    assert tokenizer("发热").input_ids[:2] == [size + 1, size + 3]
    assert tokenizer.pad_token == "<unk>" and "问：" in tokenizer.chat_template


def test_words_that_hold_the_name_of_a_chatglm_token_are_cut_as_sentencepiece_cuts_them(tmp_path):
    text = "people esophagus isopropyl 先写 sop 再写 eop"
    model = train()
    original = sentencepiece.SentencePieceProcessor(model_proto=model)
    size = original.get_piece_size()
    # As the folder of ChatGLM3 names some of its tokens, and its chat template
    added = {
        str(size + i): {"content": token} for i, token in ((1, "[gMASK]"), (3, "sop"), (4, "eop"), (6, "<|user|>"))
    }
    chat = "[gMASK]sop{% for m in messages %}<|{{ m.role }}|>\n {{ m.content }}{% endfor %}" \
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"  # fmt: skip
    folder = folder_with(tmp_path, model, added_tokens_decoder=added, chat_template=chat)
    tokenizer, _ = convert(folder, tmp_path, "chatglm3")
    assert tokenizer(text, add_special_tokens=False).input_ids == original.encode(text)
    assert encode_document(text, tokenizer) == [size + 1, size + 3, *original.encode(text), tokenizer.eos_token_id]
    prompt = ChatEncoder(tokenizer).encode_prompt([{"role": "user", "content": text}])
    assert prompt == [size + 1, size + 3, size + 6, *original.encode(f"\n {text}"), size + 7]
    assert tokenizer.convert_ids_to_tokens([size, size + 2, size + 5]) == ["[MASK]", "[sMASK]", "<|system|>"]


def test_lines_that_spell_control_tokens_are_counted_as_not_compared(tmp_path):
    folder, target = folder_with(tmp_path, train()), tmp_path / "new"
    target.mkdir()
    summary = convert_tokenizer(folder, target, FAMILIES["chatglm2"], ["people", "[gMASK] 发热", "用 <eop> 结束"])
    assert "lines agree; 2 that spell control tokens were not compared" in summary


INTERNLM2_CODE = "def __init__(self, vocab_file, add_bos_token=True, add_eos_token=False): pass"
BAICHUAN_CODE = "def __init__(self, vocab_file, add_bos_token: bool = False): pass"


@pytest.mark.parametrize(
    ("family", "settings", "code", "prefix"),
    [
        ("internlm2", {"tokenizer_class": "InternLM2Tokenizer"}, "", ["<s>"]),
        ("internlm2", {"tokenizer_class": "InternLM2Tokenizer"}, INTERNLM2_CODE, ["<s>"]),
        ("internlm2", {"tokenizer_class": "InternLM2Tokenizer", "add_bos_token": False}, INTERNLM2_CODE, []),
        ("baichuan-13b", {"tokenizer_class": "BaichuanTokenizer"}, BAICHUAN_CODE, []),
        ("baichuan2-7b", {"tokenizer_class": "BaichuanTokenizer", "add_bos_token": False}, INTERNLM2_CODE, []),
        ("yi", {"tokenizer_class": "YiTokenizer", "add_bos_token": False}, "", []),
        ("yi", {"tokenizer_class": "YiTokenizer"}, "", ["<s>"]),
        ("orion", {"tokenizer_class": "OrionTokenizer"}, "", ["<s>"]),
        ("xverse", {}, "", []),
        ("chatglm2", {"tokenizer_class": "ChatGLMTokenizer"}, "", ["[gMASK]", "<sop>"]),
        ("chatglm3", {"tokenizer_class": "ChatGLMTokenizer"}, "", ["[gMASK]", "<sop>"]),
        ("glm4", {"tokenizer_class": "ChatGLM4Tokenizer"}, "", ["[gMASK]", "<sop>"]),
        ("qwen", {"tokenizer_class": "QWenTokenizer"}, "", []),
        ("deepseek-moe", {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True}, "", ["<s>"]),
        ("deepseek-moe", {"tokenizer_class": "LlamaTokenizerFast"}, "", ["<s>"]),
        ("deepseek-moe", {"tokenizer_class": "PreTrainedTokenizerFast"}, "", []),
    ],
)
def test_what_a_tokenizer_puts_before_a_text_by_itself_is_kept(family, settings, code, prefix, tmp_path):
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    if family in ("glm4", "qwen"):
        name = "tokenizer.model" if family == "glm4" else "qwen.tiktoken"
        folder = folder_with(tmp_path, tiktoken_file(byte_ranks()), name, **settings)
    elif family == "deepseek-moe":
        folder = tmp_path / "old"
        tiny_tokenizer().save_pretrained(folder)
        (folder / "tokenizer_config.json").write_text(json.dumps(names | settings))
    else:
        folder = folder_with(tmp_path, train(), **names, **settings)
    (folder / "tokenization_code.py").write_text(code)
    tokenizer, _ = convert(folder, tmp_path, family)
    assert tokenizer.convert_ids_to_tokens(default_beginning(tokenizer)) == prefix
    assert encode_document("发热", tokenizer)[: len(prefix)] == tokenizer.convert_tokens_to_ids(prefix)


def test_a_written_tokenizer_without_its_prefix_is_found_out(tmp_path):
    tokenizer, _ = convert(folder_with(tmp_path, train()), tmp_path, "xverse")
    original = sentencepiece.SentencePieceProcessor(model_proto=train())
    problem = first_difference(tmp_path / "new", ["发热"], original.encode, ["<s>"])
    assert "expected ['<s>']" in problem


def test_chatglm_spells_line_breaks_tabs_and_blanks(tmp_path):
    symbols = ("<n>", "<|tab|>", "<|blank_2|>", "<|blank_3|>", "[MASK]", "[gMASK]", "<sop>", "<eop>")
    model = train(user_defined_symbols=symbols)
    settings = {"bos_token": "<sop>", "eos_token": "<eop>", "pad_token": "<unk>", "num_image_tokens": 0}
    tokenizer, _ = convert(folder_with(tmp_path, model, "ice_text.model", **settings), tmp_path, "chatglm")
    original = sentencepiece.SentencePieceProcessor(model_proto=model)
    text = "第一行\n\t第二   行  完"
    assert tokenizer(text).input_ids == original.encode("第一行<n><|tab|>第二<|blank_3|>行<|blank_2|>完")
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.chat_template and "[gMASK]" in tokenizer.chat_template


def test_early_chatglm_ids_behind_image_tokens_are_refused(tmp_path):
    folder = folder_with(tmp_path, train(), "ice_text.model", num_image_tokens=20000)
    with pytest.raises(ValueError, match="20000 image tokens"):
        convert(folder, tmp_path, "chatglm")


def test_unused_pieces_that_were_named_later_keep_their_ids(tmp_path):
    """InternLM2's chat models call [UNUSED_TOKEN_145] <|im_start|>."""
    model = train(user_defined_symbols=("[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]"))
    original = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = [original.piece_to_id(f"[UNUSED_TOKEN_{i}]") for i in (146, 145)]
    added = {str(i): {"content": token} for i, token in zip(ids, ("<|im_start|>", "<|im_end|>"), strict=True)}
    folder = folder_with(tmp_path, model, added_tokens_decoder=added, eos_token="</s>", bos_token="<s>")
    tokenizer, _ = convert(folder, tmp_path, "internlm2")
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == ids
    found = tokenizer("<|im_start|>发热<|im_end|>", add_special_tokens=False).input_ids
    assert [found[0], found[-1]] == ids
    assert "<|im_start|>" in tokenizer.chat_template


def test_control_tokens_of_sentencepiece_are_single_tokens(tmp_path):
    model = train(user_defined_symbols=("<reserved_106>", "<reserved_107>"))
    tokenizer, _ = convert(folder_with(tmp_path, model), tmp_path, "baichuan2-7b")
    found = tokenizer("<reserved_106>发热<reserved_107>", add_special_tokens=False).input_ids
    assert tokenizer.convert_ids_to_tokens([found[0], found[-1]]) == ["<reserved_106>", "<reserved_107>"]
    assert tokenizer.chat_template, "the chat's control tokens are there, so its template is written"


@lru_cache
def byte_ranks(merges: int = 120) -> list[bytes]:
    """A tiny byte-pair vocabulary in the order of its merges, learnt naively."""
    words = Counter(tuple(bytes([b]) for b in word.encode()) for line in TEXT[:60] for word in line.split("，"))
    tokens = [bytes([b]) for b in range(256)]
    random.Random(0).shuffle(tokens)  # in the real files, ranks of single bytes are not their values
    while len(tokens) < 256 + merges:
        pairs: Counter = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] += count
        (left, right), _ = pairs.most_common(1)[0]
        tokens.append(left + right)
        joined: Counter = Counter()
        for word, count in words.items():
            result, i = [], 0
            while i < len(word):
                step = 2 if word[i : i + 2] == (left, right) else 1
                result.append(b"".join(word[i : i + step]))
                i += step
            joined[tuple(result)] += count
        words = joined
    return tokens


def tiktoken_file(tokens: list[bytes]) -> bytes:
    return b"".join(base64.b64encode(token) + f" {i}\n".encode() for i, token in enumerate(tokens))


def test_qwen_gets_a_fast_tokenizer_that_equals_tiktoken(tmp_path):
    tokens = byte_ranks()
    folder = folder_with(tmp_path, tiktoken_file(tokens), "qwen.tiktoken", tokenizer_class="QWenTokenizer")
    tokenizer, summary = convert(folder, tmp_path, "qwen")
    assert "tiktoken" in summary and "lines agree" in summary
    assert tokenizer.convert_tokens_to_ids(list(QWEN_CONTROL)) == [len(tokens) + i for i in range(208)]
    assert tokenizer.eos_token == "<|endoftext|>" and tokenizer.chat_template
    assert tokenizer.decode(tokenizer("高血压 患者\n").input_ids) == "高血压 患者\n"
    assert tokenizer("12345").input_ids == [tokens.index(b) for b in (b"1", b"2", b"3", b"4", b"5")]


def test_glm4_keeps_a_tiktoken_file_under_the_name_of_a_sentencepiece_model(tmp_path):
    tokens = byte_ranks()
    folder = folder_with(tmp_path, tiktoken_file(tokens), tokenizer_class="ChatGLM4Tokenizer")
    assert is_tiktoken(folder / "tokenizer.model")
    tokenizer, _ = convert(folder, tmp_path, "glm4")
    assert tokenizer.convert_tokens_to_ids("<|user|>") == len(tokens) + 7
    assert "<|user|>" in tokenizer.chat_template


def test_a_damaged_tiktoken_file_is_named_by_its_line(tmp_path):
    content = tiktoken_file(byte_ranks()).splitlines(keepends=True)
    content[4] = b"not a rank\n"
    with pytest.raises(ValueError, match="qwen.tiktoken, line 5"):
        convert(folder_with(tmp_path, b"".join(content), "qwen.tiktoken"), tmp_path, "qwen")


def test_an_unknown_tokenizer_class_without_files_stops(tmp_path):
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "MysteryTokenizer"}))
    with pytest.raises(ValueError, match="'MysteryTokenizer' comes without tokenizer.model"):
        convert(folder, tmp_path, "xverse")


def test_a_folder_without_tokenizer_is_no_mistake(tmp_path):
    (tmp_path / "old").mkdir()
    assert convert_tokenizer(tmp_path / "old", tmp_path, FAMILIES["yi"], []) is None


def test_a_tokenizer_that_nothing_reproduces_is_refused(tmp_path, monkeypatch):
    """The engine is made to cut differently: by ignoring the scores of the pieces."""
    import suwen.conversion.sentencepiece as module
    from suwen.architectures.sentencepiece import SentencePieceTokenizer

    merges = module.merges_by_score
    monkeypatch.setattr(module, "merges_by_score", lambda proto: merges(proto)[::-1])
    monkeypatch.setattr(SentencePieceTokenizer, "_tokenize", lambda self, text, **kwargs: list(text))
    with pytest.raises(ValueError, match="no engine reproduces this tokenizer"):
        convert(folder_with(tmp_path, train()), tmp_path, "orion")


def test_a_complete_tokenizer_json_is_taken_as_it_is(tmp_path):
    tokenizer = tiny_tokenizer(["<|im_start|>", "<|im_end|>"])
    folder = tmp_path / "old"
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "XverseTokenizer"}))
    converted, _ = convert(folder, tmp_path, "yi")
    assert [converted(line).input_ids for line in HELD_OUT] == [tokenizer(line).input_ids for line in HELD_OUT]
    assert converted.get_vocab() == tokenizer.get_vocab()


def test_no_sentencepiece_model_is_named(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\xff\xff\xff")
    with pytest.raises(ValueError, match="no sentencepiece model"):
        read_proto(tmp_path / "tokenizer.model")
    shutil.rmtree(tmp_path)

"""Tiny real tokenizers and models for the tests: built in memory, in milliseconds, without a download."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import lru_cache

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

TEXT = [
    "高血压患者应当低盐饮食，按时服药，定期测量血压。",
    "糖尿病的典型症状是多饮、多食、多尿和体重下降。",
    "请问医生，我最近咳嗽、发热，应该做哪些检查？",
    "建议您先做血常规和胸部X光检查，多喝水，注意休息。",
    "The patient has a fever and a cough. Please take the medicine twice a day after meals.",
    "Question: what is the normal blood pressure?\n\nAnswer: below 120/80 mmHg.\n",
    "user assistant system User Assistant Human Instruction Response think thought final analysis\n\n\n",
]
# The split of Qwen 2 and later, as in their tokenizer.json
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tiny_tokenizer(
    special_tokens: Iterable[str] = (),
    style: str = "byte",
    bos_token: str | None = "<s>",
    eos_token: str = "</s>",
    added_tokens: Iterable[str] = (),
    chat_template: str | None = None,
) -> PreTrainedTokenizerBase:
    """A BPE tokenizer of about 600 tokens.

    Args:
        special_tokens: control tokens, besides BOS and EOS.
        style: "byte" for byte-level BPE as in Qwen and Llama 3, no BOS by itself; "metaspace" for SentencePiece as in
            Llama 2 (legacy): a space before a beginning, also behind special tokens, byte fallback, BOS by itself.
        added_tokens: tokens that are added but not special, such as <think>.
    """
    build = {"byte": _byte_level, "metaspace": _legacy_metaspace}[style]
    tokenizer = Tokenizer.from_str(build(bos_token, eos_token))
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special_tokens])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in added_tokens])
    names = {"bos_token": bos_token, "eos_token": eos_token, "unk_token": "<unk>" if style == "metaspace" else None}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in names.items() if token},
    )


@lru_cache
def _byte_level(bos_token: str | None, eos_token: str) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[token for token in (bos_token, eos_token) if token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer.to_str()


@lru_cache
def _legacy_metaspace(bos_token: str, eos_token: str) -> str:
    to_metaspace = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    # SentencePiece learns no token across a space, which this split sees to; it splits nothing when it encodes
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", bos_token, eos_token], show_progress=False, max_token_length=6
    )
    tokenizer.train_from_iterator([line.replace("\n", " ") for line in TEXT], trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    vocabulary = dict(learned["vocab"])
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = to_metaspace
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", bos_token, eos_token)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos_token} $A", special_tokens=[(bos_token, vocabulary[bos_token])]
    )
    return tokenizer.to_str()


def tiny_model(tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> LlamaForCausalLM:
    """A Llama of two layers and width 32 with random weights, float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).eval()

"""Convert a checkpoint's tokenizer to one that needs no code, and check it line by line against the original library.

A sentencepiece model says itself how it treats blanks, prefixes and unknown bytes; nothing is assumed. Where the fast
engine cannot cut alike (merged vocabularies whose pieces share a score), the sentencepiece library itself goes on doing
it. The tokenizer that is checked is the one that was written, loaded again; a single line that differs refuses it.
"""

from __future__ import annotations

import base64
import random
import shutil
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from suwen.conversion.families import NATIVE, Family
from suwen.conversion.weights import read_json
from template import get_template

Encode = Callable[[str], list[int]]
Decode = Callable[[list[int]], str]
SAMPLE_LINES = 1500
NATIVE_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                "chat_template.jinja", "vocab.json", "merges.txt")  # fmt: skip
ODD_LINES = (
    "", " ", "  ", "　全角 空格　", " 前面有空格", "后面有空格 ", "中  间  有  空  格", "\t制表\t符", "换\n行\n\n两次",
    "回车\r\n", "剂量：0.5 mg/kg，每日３次；ＡＢＣ（全角）ﬁ ½ ① ㎎", "naïve café nai\u0308ve cafe\u0301", "ß ſ İ ı",
    "😀👩‍⚕️🩺", "𠮷野家 㐂 龘", "カタカナ ｶﾀｶﾅ 한국어 العربية עברית हिन्दी", "a\u200bb\u00a0c\ufeffd\u3000e",
    "...!!!？？？——……「」『』", "def f(x):\n    return x ** 2\n", "https://example.org/a?b=c&d=%E4%BD%A0",
    "1234567890 3.14159 1,000,000", "▁ ▁▁a ▁", "I'm you're we'll THEY'VE it's", "\x01\x7f控制符",
    "－1～2°C  ±  ≥  μg", "ＩＣＤ－１０：Ｉ１０.Ｘ００",
)  # fmt: skip
# The text is cut by these patterns before tiktoken merges bytes (Qwen's and GLM-4's published tokenizer code).
TIKTOKEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
GLM_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
GLM4_CONTROL = ("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", *GLM_ROLES, "<|begin_of_image|>",
                "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")  # fmt: skip


@dataclass
class Source:
    """What a folder says of its tokenizer.

    Attributes:
        control: added and control tokens by id, in the order of the ids.
        names: bos_token, eos_token, unk_token and pad_token, those that there are.
        prefix: tokens that the original puts before every text.
        chat_template: its own, if it has one.
        spelling: text that is spelt as a piece (ChatGLM-6B).
    """

    control: dict[int, str]
    names: dict[str, str]
    prefix: list[str]
    chat_template: str | None
    spelling: dict[str, str]


def convert_tokenizer(folder: Path, target: Path, family: Family, lines: list[str]) -> str | None:
    """Write the tokenizer of `folder` into `target`.

    Args:
        lines: text on which it must equal the original, besides those that are always tried.

    Returns:
        What was done, in a line; None if there are no tokenizer files.

    Raises:
        ValueError: an unknown tokenizer class without files that define it, or one that no engine here reproduces.
    """
    model = next(
        (p for p in (folder / n for n in ("tokenizer.model", "ice_text.model", "spiece.model")) if p.is_file()), None
    )
    ranks = next(iter(sorted(folder.glob("*.tiktoken"))), None)
    if model is not None and is_tiktoken(model):
        model, ranks = None, model
    complete = [path for path in (folder / name for name in NATIVE_FILES) if path.is_file()]
    if family is NATIVE and any(path.name in ("tokenizer.json", "vocab.json") for path in complete):
        for path in complete:
            shutil.copyfile(path, target / path.name)
        return "tokenizer: copied as it is"
    if ranks is not None:
        return convert_tiktoken(folder, ranks, target, family, lines)
    if model is not None:
        return convert_sentencepiece(folder, model, target, family, lines)
    if (folder / "tokenizer.json").is_file():
        return copy_fast(folder, target, family)
    settings = read_json(folder / "tokenizer_config.json")
    if settings:
        raise ValueError(
            f"{folder}: tokenizer class {settings.get('tokenizer_class')!r} comes without tokenizer.model, *.tiktoken "
            "or tokenizer.json, expected one of them; take it from the model's page"
        )
    return None


def is_tiktoken(path: Path) -> bool:
    """GLM-4 names a text file of base64 tokens and ranks tokenizer.model."""
    with open(path, "rb") as file:
        first = file.readline(4096).split()
    try:
        return len(first) == 2 and first[1].isdigit() and bool(base64.b64decode(first[0], validate=True))
    except ValueError:
        return False


def read_source(folder: Path, family: Family, pieces: list[str], control: dict[int, str]) -> Source:
    """Collect what the tokenizer's own files say, and what its code says where no file does.

    Args:
        pieces: of the vocabulary, in the order of their ids; a token at its end gets the next id.
        control: control tokens that the vocabulary itself names.
    """
    settings = read_json(folder / "tokenizer_config.json")
    named = {**settings, **read_json(folder / "special_tokens_map.json")}
    names = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = named.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if value:
            names[name] = value
    control = dict(control)
    added = {int(key): value["content"] for key, value in settings.get("added_tokens_decoder", {}).items()}
    added |= {value: key for key, value in read_json(folder / "added_tokens.json").items()}
    control |= added
    place = {piece: i for i, piece in enumerate(pieces)}
    spoken = get_template(family.template).special_tokens if family.template else ()
    control |= {place[token]: token for token in [*names.values(), *spoken] if token in place}
    for token in listed_control(folder, family):
        if token not in place and token not in control.values():
            control[max([len(pieces) - 1, *control]) + 1] = token
    template = settings.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return Source(
        control=dict(sorted(control.items())),
        names=names,
        prefix=settings.get("prefix_tokens") or [],
        chat_template=template if isinstance(template, str) else None,
        spelling=settings.get("spelling") or {},
    )


def listed_control(folder: Path, family: Family) -> tuple[str, ...]:
    """Control tokens that stand in a family's code only."""
    if family.name in ("chatglm2", "chatglm3"):
        code = "".join(path.read_text(encoding="utf-8") for path in folder.glob("tokenization_*.py"))
        roles = GLM_ROLES if family.name == "chatglm3" or GLM_ROLES[1] in code else ()
        return ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *roles)
    return {"qwen": QWEN_CONTROL, "glm4": GLM4_CONTROL}.get(family.name, ())


# sentencepiece


def convert_sentencepiece(folder: Path, model: Path, target: Path, family: Family, lines: list[str]) -> str:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken

    from suwen.architectures.sentencepiece import SentencePieceTokenizer, spell

    proto = read_proto(model)
    pieces = [piece.piece for piece in proto.pieces]
    source = read_source(folder, family, pieces, {i: p.piece for i, p in enumerate(proto.pieces) if p.type == 3})
    for token_id, token in source.control.items():
        if token_id < len(pieces) and pieces[token_id] != token:  # InternLM2 gives unused pieces a name afterwards
            proto.pieces[token_id].piece, proto.pieces[token_id].type = token, 3
    processor = SentencePieceProcessor(model_proto=proto.SerializeToString())
    defaults = {"bos_token": proto.trainer_spec.bos_id, "eos_token": proto.trainer_spec.eos_id,
                "unk_token": proto.trainer_spec.unk_id, "pad_token": proto.trainer_spec.pad_id}  # fmt: skip
    for name, token_id in defaults.items():
        if 0 <= token_id < len(pieces):
            source.names.setdefault(name, pieces[token_id])
    settings = read_json(folder / "tokenizer_config.json")
    if family.name == "chatglm":
        if settings.get("num_image_tokens"):
            raise ValueError(
                f"{folder}: an early upload whose ids start behind {settings['num_image_tokens']} image tokens, "
                "expected the later one with a vocabulary of 130528"
            )
        names = {"\n": "<n>", "\t": "<|tab|>"} | {" " * i: f"<|blank_{i}|>" for i in range(2, 81)}
        source.spelling = {text: piece for text, piece in names.items() if piece in set(pieces)}
    if family.name in ("chatglm2", "chatglm3"):
        source.prefix = ["[gMASK]", "sop"]
        source.names |= {"pad_token": source.names.get("unk_token", pieces[0])}
    elif "prefix_tokens" not in settings and settings.get(
        "add_bos_token", settings.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast")
    ):
        source.prefix = [source.names["bos_token"]]

    def reference(text: str) -> list[int]:
        return processor.encode(spell(text, source.spelling), out_type=int)

    control = set(source.control.values())
    tried = [line for line in [*test_lines(lines), *piece_lines(proto)] if not any(token in line for token in control)]
    problem = "the text is spelt anew before it is cut" if source.spelling else None
    if problem is None:
        save(fast_from_proto(proto, source), target, source, family)
        problem = first_difference(target, tried, reference, processor.decode, processor.unk_id())
        if problem is None:
            (target / "tokenizer.model").write_bytes(proto.SerializeToString())  # for programs that read it instead
            return (
                f"tokenizer: sentencepiece model of {len(pieces)} pieces, as a fast tokenizer; {len(tried)} lines agree"
            )
        for file in target.glob("*token*"):
            file.unlink()
    (target / "tokenizer.model").write_bytes(proto.SerializeToString())
    tokenizer = SentencePieceTokenizer(
        str(target / "tokenizer.model"),
        prefix_tokens=source.prefix,
        spelling=source.spelling,
        **source.names,
    )
    for token_id, token in source.control.items():
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=True)], special_tokens=True)
        if tokenizer.convert_tokens_to_ids(token) != token_id:
            raise ValueError(f"{folder}: token {token!r} should have id {token_id}; ids with gaps are not supported")
    save(tokenizer, target, source, family)
    if again := first_difference(target, tried, reference):
        raise ValueError(f"{folder}: no engine reproduces this tokenizer: {again}")
    return (
        f"tokenizer: sentencepiece model of {len(pieces)} pieces, cut by the sentencepiece library itself, as the fast "
        f"engine does not cut alike ({problem}); {len(tried)} lines agree"
    )


def read_proto(path: Path) -> Any:
    """The sentencepiece model as a protobuf message."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except (DecodeError, OSError) as error:
        raise ValueError(f"{path}: no sentencepiece model ({error})") from None
    if not proto.pieces:
        raise ValueError(f"{path}: a sentencepiece model without pieces")
    return proto


def fast_from_proto(proto: Any, source: Source) -> Any:
    """The fast tokenizer that a sentencepiece model describes, flags and all."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

    flags, kind = proto.normalizer_spec, proto.trainer_spec.model_type
    if kind not in (1, 2):
        raise ValueError(f"tokenizer.model: model type {kind}, expected unigram (1) or BPE (2)")
    unknown = proto.trainer_spec.unk_id
    fallback = proto.trainer_spec.byte_fallback
    if kind == 1:
        scored = [(piece.piece, piece.score) for piece in proto.pieces]
        tokenizer = Tokenizer(models.Unigram(scored, unk_id=unknown, byte_fallback=fallback))
    else:
        vocabulary = {piece.piece: i for i, piece in enumerate(proto.pieces)}
        tokenizer = Tokenizer(
            models.BPE(
                vocabulary,
                merges_by_score(proto),
                unk_token=proto.pieces[unknown].piece,
                fuse_unk=True,
                byte_fallback=fallback,
            )
        )
    steps: list[Any] = [normalizers.Precompiled(flags.precompiled_charsmap)] if flags.precompiled_charsmap else []
    if flags.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if flags.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    steps.append(normalizers.Replace(" ", "▁"))
    tokenizer.normalizer = normalizers.Sequence(steps)
    back = [decoders.Replace("▁", " "), *([decoders.ByteFallback()] if fallback else []), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, *([decoders.Strip(" ", 1, 0)] if flags.add_dummy_prefix else [])])
    # User-defined pieces (type 4) are found in the text before anything is merged.
    user = [AddedToken(p.piece, normalized=False, special=False) for p in proto.pieces if p.type == 4]
    add_control(tokenizer, source, user)
    if source.prefix:
        ids = [(token, tokenizer.token_to_id(token)) for token in source.prefix]
        tokenizer.post_processor = processors.TemplateProcessing(single=[*source.prefix, "$A"], special_tokens=ids)
    return tokenizer


def merges_by_score(proto: Any) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, the highest score first, as sentencepiece merges."""
    score = {piece.piece: piece.score for piece in proto.pieces if piece.type == 1}
    merges = []
    for place, piece in enumerate(score):
        for cut in range(1, len(piece)):
            if piece[:cut] in score and piece[cut:] in score:
                merges.append((-score[piece], place, cut, (piece[:cut], piece[cut:])))
    return [pair for *_, pair in sorted(merges)]


def add_control(tokenizer: Any, source: Source, user: list[Any]) -> None:
    from tokenizers import AddedToken

    tokenizer.add_tokens(user)
    for token_id, token in source.control.items():
        tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        if tokenizer.token_to_id(token) != token_id:
            raise ValueError(
                f"tokenizer: token {token!r} should have id {token_id}, gets {tokenizer.token_to_id(token)}"
            )


# tiktoken


def convert_tiktoken(folder: Path, path: Path, target: Path, family: Family, lines: list[str]) -> str:
    import tiktoken
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    ranks = read_ranks(path)
    text = bytes_to_text()
    pieces = ["".join(text[byte] for byte in token) for token in ranks]
    merges = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            if (left := ranks.get(token[:cut])) is not None and (right := ranks.get(token[cut:])) is not None:
                merges.append((rank, left, right))
    pairs = [(pieces[left], pieces[right]) for _, left, right in sorted(merges)]
    pattern = TIKTOKEN_PATTERN % ("" if family.name == "qwen" else "{1,3}")
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=True))
    if family.name == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    source = read_source(folder, family, pieces, {})
    if not source.control:
        raise ValueError(
            f"{folder}: found no control tokens for {path.name}, expected added_tokens_decoder in its config"
        )
    end = "<|endoftext|>" if "<|endoftext|>" in source.control.values() else next(iter(source.control.values()))
    source.names = {"eos_token": end, "pad_token": end} | source.names
    add_control(tokenizer, source, [])
    save(tokenizer, target, source, family)

    encoding = tiktoken.Encoding("original", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    def reference(line: str) -> list[int]:
        return encoding.encode_ordinary(unicodedata.normalize("NFC", line) if family.name == "qwen" else line)

    tried = [line for line in test_lines(lines) if not any(token in line for token in source.control.values())]
    problem = first_difference(target, tried, reference, encoding.decode)
    if problem:
        raise ValueError(f"{folder}: the converted tokenizer differs from tiktoken: {problem}")
    return f"tokenizer: tiktoken file of {len(ranks)} tokens, as a fast tokenizer; {len(tried)} lines agree"


def read_ranks(path: Path) -> dict[bytes, int]:
    """Tokens of a tiktoken file by their bytes, ranks 0, 1, 2, ..."""
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token)] = int(rank)
        except ValueError:
            raise ValueError(
                f"{path}, line {number}: found {line[:40]!r}, expected a base64 token and its rank"
            ) from None
    if list(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path}: the ranks are not 0, 1, 2, ...")
    return ranks


def bytes_to_text() -> dict[int, str]:
    """The printable character that stands for each byte in byte-level BPE (GPT-2): itself, or one from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


# What is common to all


def copy_fast(folder: Path, target: Path, family: Family) -> str:
    """A tokenizer.json is complete in itself: it is read without the class that the folder names."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises a bare Exception
        raise ValueError(f"{folder / 'tokenizer.json'}: {error}") from None
    by_id = sorted(tokenizer.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])
    added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    source = read_source(folder, family, [piece for piece, _ in by_id], added)
    if "eos_token" not in source.names:
        raise ValueError(f"{folder}: tokenizer_config.json names no eos_token, expected one")
    save(tokenizer, target, source, family)
    return f"tokenizer: tokenizer.json of {tokenizer.get_vocab_size()} tokens, taken as it is"


def save(tokenizer: Any, target: Path, source: Source, family: Family) -> None:
    """Write a tokenizer with its control tokens and its chat template."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from suwen.encoding import apply_template

    if isinstance(tokenizer, Tokenizer):
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **source.names
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if source.chat_template:
        tokenizer.chat_template = source.chat_template
    elif family.template:
        try:
            apply_template(tokenizer, family.template)
        except ValueError:
            pass  # a vocabulary without the chat's control tokens: a base model, which needs no template
    tokenizer.save_pretrained(target)


def test_lines(lines: list[str]) -> list[str]:
    from suwen.embedded import sample_texts

    return [*ODD_LINES, *islice(sample_texts(), SAMPLE_LINES), *lines]


def piece_lines(proto: Any, count: int = 500) -> list[str]:
    """Lines of random pieces: where pieces overlap, a wrong order of merges shows.

    User-defined words stand in lines of their own; names in brackets are control tokens, which no text holds.
    """
    pieces = [piece.piece.replace("▁", " ") for piece in proto.pieces if piece.type == 1]
    draw = random.Random(7)
    words = [piece.piece for piece in proto.pieces if piece.type == 4 and piece.piece[0] not in "<["]
    return ["".join(draw.choices(pieces, k=12)) for _ in range(count)] + [f"用{word}来" for word in words[:count]]


def first_difference(
    target: Path, lines: list[str], reference: Encode, decode: Decode | None = None, unknown: int = -1
) -> str | None:
    """The first line on which the written tokenizer and the reference differ, in words; None if there is none.

    Args:
        decode: of the reference; None compares the ids alone.
        unknown: id of the unknown token, whose text is lost in both.
    """
    from transformers import AutoTokenizer

    import suwen.architectures  # noqa: F401  (registers its classes)

    tokenizer = AutoTokenizer.from_pretrained(target)
    differences = []
    for line in lines:
        expected = reference(line)
        found = tokenizer(line, add_special_tokens=False)["input_ids"]
        if found != expected:
            pairs = enumerate(zip(found, expected, strict=False))
            at = next((i for i, pair in pairs if pair[0] != pair[1]), min(len(found), len(expected)))
            was, became = (tokenizer.convert_ids_to_tokens(ids[at : at + 2]) for ids in (expected, found))
            differences.append(f"{line[:40]!r}: {was} became {became}")
        elif decode and unknown not in expected and (text := tokenizer.decode(found)) != decode(expected):
            differences.append(f"{decode(expected)[:40]!r} is decoded as {text[:40]!r}")
    return f"{len(differences)} of {len(lines)} lines, first {differences[0]}" if differences else None

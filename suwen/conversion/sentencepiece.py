"""Tokenizers that stand on a sentencepiece model: as a fast one where that cuts alike, else on the library itself."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from suwen.conversion.families import Family
from suwen.conversion.tokenizer_files import (
    Source,
    add_control,
    comparable,
    find_prefix,
    first_difference,
    read_source,
    save,
    test_lines,
)
from suwen.conversion.weights import read_json


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
        source.names |= {"pad_token": source.names.get("unk_token", pieces[0])}
    source.prefix = find_prefix(folder, family, source.names) or []

    def reference(text: str) -> list[int]:
        return processor.encode(spell(text, source.spelling), out_type=int)

    tried, agreement = comparable([*test_lines(lines), *piece_lines(proto)], source)
    problem = "the text is spelt anew before it is cut" if source.spelling else None
    if problem is None:
        save(fast_from_proto(proto, source), target, source, family)
        problem = first_difference(target, tried, reference, source.prefix, processor.decode, processor.unk_id())
        if problem is None:
            (target / "tokenizer.model").write_bytes(proto.SerializeToString())  # for programs that read it instead
            return f"tokenizer: sentencepiece model of {len(pieces)} pieces, as a fast tokenizer; {agreement}"
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
    if again := first_difference(target, tried, reference, source.prefix):
        raise ValueError(f"{folder}: no engine reproduces this tokenizer: {again}")
    return (
        f"tokenizer: sentencepiece model of {len(pieces)} pieces, cut by the sentencepiece library itself, as the fast "
        f"engine does not cut alike ({problem}); {agreement}"
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
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

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


def piece_lines(proto: Any, count: int = 500) -> list[str]:
    """Lines of random pieces: where pieces overlap, a wrong order of merges shows.

    User-defined words stand in lines of their own; names in brackets are control tokens, which no text holds.
    """
    pieces = [piece.piece.replace("▁", " ") for piece in proto.pieces if piece.type == 1]
    draw = random.Random(7)
    words = [piece.piece for piece in proto.pieces if piece.type == 4 and piece.piece[0] not in "<["]
    return ["".join(draw.choices(pieces, k=12)) for _ in range(count)] + [f"用{word}来" for word in words[:count]]

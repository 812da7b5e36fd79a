"""Convert a checkpoint's tokenizer to one that needs no code, and check it line by line against the original library.

A sentencepiece model says itself how it treats blanks, prefixes and unknown bytes; nothing is assumed. Where the fast
engine cannot cut alike (merged vocabularies whose pieces share a score), the sentencepiece library itself goes on doing
it. The tokenizer that is checked is the one that was written, loaded again; a single line that differs refuses it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from suwen.conversion.families import NATIVE, Family
from suwen.conversion.sentencepiece import convert_sentencepiece
from suwen.conversion.tiktoken import convert_tiktoken, is_tiktoken
from suwen.conversion.tokenizer_files import find_prefix, read_source, save, set_prefix, unknown_class
from suwen.conversion.weights import read_json

NATIVE_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                "chat_template.jinja", "vocab.json", "merges.txt")  # fmt: skip


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
    settings = read_json(folder / "tokenizer_config.json")
    native = family is NATIVE and unknown_class(settings) is None
    if native and any(path.name in ("tokenizer.json", "vocab.json") for path in complete):
        for path in complete:
            shutil.copyfile(path, target / path.name)
        return "tokenizer: copied as it is"
    if ranks is not None:
        return convert_tiktoken(folder, ranks, target, family, lines)
    if model is not None:
        return convert_sentencepiece(folder, model, target, family, lines)
    if (folder / "tokenizer.json").is_file():
        return copy_fast(folder, target, family)
    if settings:
        raise ValueError(
            f"{folder}: tokenizer class {settings.get('tokenizer_class')!r} comes without tokenizer.model, *.tiktoken "
            "or tokenizer.json, expected one of them; take it from the model's page"
        )
    return None


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
    prefix = find_prefix(folder, family, source.names)
    if prefix is not None:  # the class that the folder names would see to it, whatever tokenizer.json says
        set_prefix(tokenizer, prefix)
    save(tokenizer, target, source, family)
    return f"tokenizer: tokenizer.json of {tokenizer.get_vocab_size()} tokens, taken as it is"

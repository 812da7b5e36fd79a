"""Tokenizers that stand on a tiktoken file: Qwen 1 and GLM-4."""

from __future__ import annotations

import base64
import unicodedata
from pathlib import Path

from suwen.conversion.families import Family
from suwen.conversion.tokenizer_files import (
    add_control,
    comparable,
    find_prefix,
    first_difference,
    read_source,
    save,
    test_lines,
)

# The text is cut by these patterns before tiktoken merges bytes (Qwen's and GLM-4's published tokenizer code).
TIKTOKEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def is_tiktoken(path: Path) -> bool:
    """GLM-4 names a text file of base64 tokens and ranks tokenizer.model."""
    with open(path, "rb") as file:
        first = file.readline(4096).split()
    try:
        return len(first) == 2 and first[1].isdigit() and bool(base64.b64decode(first[0], validate=True))
    except ValueError:
        return False


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
    source.prefix = find_prefix(folder, family, source.names) or []
    add_control(tokenizer, source, [])
    save(tokenizer, target, source, family)

    encoding = tiktoken.Encoding("original", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    def reference(line: str) -> list[int]:
        return encoding.encode_ordinary(unicodedata.normalize("NFC", line) if family.name == "qwen" else line)

    tried, agreement = comparable(test_lines(lines), source)
    problem = first_difference(target, tried, reference, source.prefix, encoding.decode)
    if problem:
        raise ValueError(f"{folder}: the converted tokenizer differs from tiktoken: {problem}")
    return f"tokenizer: tiktoken file of {len(ranks)} tokens, as a fast tokenizer; {agreement}"


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

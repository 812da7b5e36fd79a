"""Extend a model's vocabulary by pieces of its new domain: learn them, add them, give them rows.

Pieces are runs of Chinese characters, learnt by byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909) on the
runs of Chinese characters in the text, so that none crosses a punctuation mark, and ranked by the tokens they save.

Tokenizers that stand on a sentencepiece model get them as pieces with scores below the lowest: all old merges still
come first. (Chinese-LLaMA's merge gives them one score of 0 instead, above all old pieces, which cuts old words anew
and leaves the order among them to the engine.) Byte-level tokenizers get them as added tokens, which are found before
anything is merged; ids of special tokens stay where they are in both.

The row of a new token, in the input embedding and in the head, is the mean of the rows of the tokens that its text was
cut into before, so that the model starts from what it knew.
"""

from __future__ import annotations

import copy
import io
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from suwen.conversion.families import NATIVE
from suwen.conversion.sentencepiece import convert_sentencepiece, read_proto
from suwen.conversion.tiktoken import is_tiktoken
from suwen.lora_targets import VOCABULARY_RECORD
from suwen.models import read_json

HAN_RUN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]+")
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class Piece:
    """A candidate: its text, how often it stands in the text, and the tokens that one occurrence costs today."""

    text: str
    count: int
    cost: int

    @property
    def saved(self) -> int:
        return self.count * (self.cost - 1)


# Learning


def learn_pieces(texts: Sequence[str], vocabulary_size: int, longest: int) -> list[str]:
    """Pieces of one to `longest` Chinese characters, those merged first in front.

    Args:
        vocabulary_size: of the byte-pair model that is learnt, single characters included.

    Raises:
        ValueError: the text holds no Chinese.
    """
    from sentencepiece import SentencePieceTrainer

    runs = [run for text in texts for run in HAN_RUN.findall(text)]
    if not runs:
        raise ValueError("--train_file_dir: found no Chinese characters, of which new pieces could be made")
    characters = len(set("".join(runs)))
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(runs),
        model_writer=model,
        model_type="bpe",
        vocab_size=characters + vocabulary_size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        max_sentencepiece_length=longest,
        add_dummy_prefix=False,
        normalization_rule_name="identity",
        input_sentence_size=5_000_000,
        shuffle_input_sentence=False,
        num_threads=4,
        minloglevel=2,
    )
    from sentencepiece import SentencePieceProcessor

    learnt = SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [learnt.id_to_piece(i) for i in range(learnt.get_piece_size())]
    return [piece for piece in pieces if HAN_RUN.fullmatch(piece)]


def rank_pieces(candidates: Iterable[str], texts: Sequence[str], tokenizer: Any, min_frequency: int) -> list[Piece]:
    """Candidates that save tokens, those that save most first; counted as longest matches from the left.

    A piece that is part of a longer token is left out: as an added token it would be found first and cut that one.
    """
    parts = inner_parts(tokenizer)
    costs = {text: len(sub_tokens(tokenizer, text)) for text in dict.fromkeys(candidates) if text not in parts}
    costs = {text: cost for text, cost in costs.items() if cost > 1}
    longest = max(map(len, costs), default=0)
    counts: Counter[str] = Counter()
    for text in tqdm(texts, desc="counting pieces", unit="text", leave=False):
        for run in HAN_RUN.findall(text):
            at = 0
            while at < len(run):
                sizes = range(min(longest, len(run) - at), 0, -1)
                size = next((n for n in sizes if run[at : at + n] in costs), 0)
                if size:
                    counts[run[at : at + size]] += 1
                at += size or 1
    found = [Piece(text, count, costs[text]) for text, count in counts.items() if count >= min_frequency]
    return sorted(found, key=lambda piece: (-piece.saved, piece.text))


def inner_parts(tokenizer: Any) -> set[str]:
    """Every shorter part of the tokens that are runs of Chinese characters."""
    ids = range(len(tokenizer))
    texts = {text for text in tokenizer.batch_decode([[token_id] for token_id in ids]) if HAN_RUN.fullmatch(text)}
    return {
        text[start:end]
        for text in texts
        for start in range(len(text))
        for end in range(start + 1, len(text) + 1)
        if end - start < len(text)
    }


def sub_tokens(tokenizer: Any, text: str) -> list[int]:
    """Ids of `text` as it is cut in the middle of a line, without what a tokenizer puts before a line's first word."""
    before, both = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in ("\n", "\n" + text))
    if before and both[: len(before)] == before:
        return both[len(before) :]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids[1:] if tokenizer.convert_ids_to_tokens(ids[:1]) == ["▁"] else ids


# Adding


def extend_tokenizer(folder: Path, tokenizer: Any, pieces: list[str], target: Path, lines: list[str]) -> list[str]:
    """Write the tokenizer of `folder` with `pieces` into `target`; returns all new tokens in the order of their ids.

    Args:
        tokenizer: that of `folder`, loaded.
        lines: text on which the new tokenizer must still decode to what was encoded.

    Raises:
        ValueError: a special token would move, or text is no longer decoded as before.
    """
    model = folder / "tokenizer.model"
    if model.is_file() and not is_tiktoken(model):
        new = extend_sentencepiece(folder, model, tokenizer, pieces, target, lines)
    else:
        new = add_tokens(tokenizer, pieces, target)
    check_extended(tokenizer, target, new, lines)
    return new


def extend_sentencepiece(
    folder: Path, model: Path, tokenizer: Any, pieces: list[str], target: Path, lines: list[str]
) -> list[str]:
    """Append pieces to a sentencepiece model, and whatever they are merged from that is no piece yet."""
    from sentencepiece import SentencePieceProcessor

    proto = read_proto(model)
    processor = SentencePieceProcessor(model_proto=proto.SerializeToString())
    known = {piece.piece for piece in proto.pieces}
    for token_id in range(len(proto.pieces), len(tokenizer)):  # added behind the model: pieces now, with the same ids
        token = tokenizer.convert_ids_to_tokens(token_id)
        entry = proto.pieces.add()
        entry.piece, entry.score, entry.type = token, 0.0, 3 if tokenizer.added_tokens_decoder[token_id].special else 4
        known.add(token)
    lowest = min((piece.score for piece in proto.pieces if piece.type == 1), default=0.0)
    new: list[str] = []
    for piece in pieces:
        for text in merge_steps(processor, piece):
            if text not in known:
                known.add(text)
                new.append(text)
    for rank, text in enumerate(new):
        entry = proto.pieces.add()
        entry.piece, entry.score, entry.type = text, lowest - 1 - rank, 1
    settings = read_json(folder / "tokenizer_config.json")
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    prefix = tokenizer("a")["input_ids"][: -len(plain)]
    settings |= {"prefix_tokens": tokenizer.convert_ids_to_tokens(prefix), "chat_template": tokenizer.chat_template}
    with tempfile.TemporaryDirectory() as name:
        source = Path(name)
        (source / "tokenizer.model").write_bytes(proto.SerializeToString())
        (source / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        convert_sentencepiece(source, source / "tokenizer.model", target, NATIVE, lines)
    return new


def merge_steps(processor: Any, piece: str) -> list[str]:
    """The texts that a piece is put together from, left to right, itself last: each merges with the next old token."""
    steps: list[str] = []
    done = ""
    pending = b""
    for token in processor.encode(piece, out_type=str):
        text = token.replace("▁", "")
        if match := BYTE_PIECE.fullmatch(token):  # a character without a piece of its own: it becomes one
            pending += bytes([int(match[1], 16)])
            try:
                text, pending = pending.decode(), b""
            except UnicodeDecodeError:
                continue
            steps.append(text)
        done += text
        if text and done != text:
            steps.append(done)
    return steps if steps and steps[-1] == piece else [*steps, piece]


def add_tokens(tokenizer: Any, pieces: list[str], target: Path) -> list[str]:
    from tokenizers import AddedToken

    known = tokenizer.get_vocab()
    new = [piece for piece in pieces if piece not in known]
    extended = copy.deepcopy(tokenizer)
    extended.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in new])
    extended.save_pretrained(target)
    return new


def check_extended(before: Any, target: Path, new: list[str], lines: list[str]) -> None:
    """Compare the written tokenizer with the one it was made from."""
    from transformers import AutoTokenizer

    after = AutoTokenizer.from_pretrained(target, trust_remote_code=False)
    for token_id, token in before.added_tokens_decoder.items():
        if (moved := after.convert_tokens_to_ids(token.content)) != token_id:
            raise ValueError(f"the special token {token.content} would move from {token_id} to {moved}")
    for line in lines:
        texts = [t.decode(t(line, add_special_tokens=False)["input_ids"]) for t in (before, after)]
        if texts[0] != texts[1]:
            raise ValueError(
                f"with new tokens {line[:40]!r} is decoded as {texts[1][:60]!r}: this tokenizer puts blanks around "
                "added tokens; give a model folder with its sentencepiece file tokenizer.model"
            )
    vocabulary = after.get_vocab()
    if missing := [token for token in new if token not in vocabulary]:
        raise ValueError(f"{len(missing)} new tokens are not in the written tokenizer, such as {missing[0]}")


def count_tokens(tokenizer: Any, texts: Iterable[str]) -> int:
    return sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)


# Rows


@torch.no_grad()
def add_rows(model: Any, before: dict[str, list[int]], ids: dict[str, int]) -> None:
    """Give every new token the mean of the rows of its old tokens, in the input embedding and in an untied head.

    Rows that a padded embedding already has are used; otherwise both tables grow.

    Args:
        before: old ids of each new token's text.
        ids: its new id.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if (needed := 1 + max(ids.values())) > rows:
        model.resize_token_embeddings(needed, mean_resizing=False)
    tables = {
        id(t.weight): t.weight for t in (model.get_input_embeddings(), model.get_output_embeddings()) if t is not None
    }
    for table in tables.values():
        for token, token_id in ids.items():
            table[token_id] = table[before[token]].float().mean(0).to(table.dtype)


def write_record(target: Path, source: str, ids: dict[str, int], report: dict[str, Any]) -> None:
    record = {"source": source, "new_tokens": ids, **report}
    (target / VOCABULARY_RECORD).write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

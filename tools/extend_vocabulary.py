"""Learn words of the domain from text and add them to a model's vocabulary.

    python tools/extend_vocabulary.py --model_name_or_path MODEL --train_file_dir data/pretrain --output_dir NEW

Fewer tokens for the same text: shorter sequences, faster training and answers. The new rows start as the mean of the
old tokens of each word and must be trained: continue with pretraining.py on the new folder; with --use_peft the new
rows are trained beside the adapter. MedicalGPT's build_domain_tokenizer and merge_tokenizers in one step.
"""

import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from suwen.command_line import build_parser, flag, run, split_dataclasses


@dataclass
class VocabularyArguments:
    model_name_or_path: str = flag("", "model folder; a LoRA folder must be merged first")
    train_file_dir: str = flag("", "text to learn from: files or folders, comma-separated")
    output_dir: str = flag("", "new or empty folder")
    validation_file_dir: str | None = flag(None, "text for the report; unset: every twentieth text is held out for it")
    num_new_tokens: int = flag(2000, "pieces to add, at most")
    min_frequency: int = flag(10, "occurrences that a piece needs in the text")
    longest: int = flag(6, "characters in a piece, at most")
    words_file: str | None = flag(
        None, "words to add besides, one a line, or a sentencepiece .model to take pieces from"
    )
    max_characters: int = flag(50_000_000, "text to learn from, at most")


def main(argv: list[str] | None = None) -> None:
    parser = build_parser(__doc__ or "", VocabularyArguments)
    (args,) = split_dataclasses(parser.parse_args(argv), VocabularyArguments)
    for name in ("model_name_or_path", "train_file_dir", "output_dir"):
        if not getattr(args, name):
            raise ValueError(f"--{name}: found nothing, expected {'text' if 'train' in name else 'a folder'}")
    for name, least in (("num_new_tokens", 1), ("min_frequency", 1), ("longest", 2), ("max_characters", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name}: found {getattr(args, name)}, expected at least {least}")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    extend(args)


def read_texts(sources: str, limit: int) -> list[str]:
    """Texts of all sources, `limit` characters at most."""
    from suwen.loading import load_rows

    texts, total = [], 0
    for row in load_rows(sources, "text"):
        if total >= limit:
            print(f"note: text beyond {limit:,} characters is not read (--max_characters)")
            break
        texts.append(row["text"])
        total += len(row["text"])
    return texts


def read_words(path: str | None) -> list[str]:
    from suwen.conversion.sentencepiece import read_proto
    from suwen.vocabulary import HAN_RUN

    if path is None:
        return []
    if path.endswith(".model"):
        try:
            return [piece.piece for piece in read_proto(Path(path)).pieces if HAN_RUN.fullmatch(piece.piece)]
        except ValueError as error:
            raise ValueError(f"--words_file {error}") from None
    try:
        words = Path(path).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--words_file {path}: {error}, expected UTF-8 text, a word a line") from None
    for number, word in enumerate(words, start=1):
        if not HAN_RUN.fullmatch(word):
            raise ValueError(f"--words_file {path}, word {number}: found {word!r}, expected Chinese characters only")
    return words


def extend(args: VocabularyArguments) -> None:
    from suwen import vocabulary
    from suwen.adapters import check_output_dir
    from suwen.conversion.convert import publish
    from suwen.models import is_adapter_dir, load_base, load_tokenizer
    from suwen.vocabulary import count_tokens, sub_tokens

    folder = Path(args.model_name_or_path)
    if not folder.is_dir() or is_adapter_dir(folder):
        raise ValueError(
            f"--model_name_or_path {folder}: expected a folder with a full model; merge a LoRA folder first"
        )
    target = check_output_dir(args.output_dir, [str(folder)])
    texts = read_texts(args.train_file_dir, args.max_characters)
    held_out = read_texts(args.validation_file_dir, args.max_characters) if args.validation_file_dir else texts[::20]
    if not args.validation_file_dir:
        texts = [text for number, text in enumerate(texts) if number % 20]
    tokenizer = load_tokenizer(str(folder))
    words = read_words(args.words_file)
    learnt = vocabulary.learn_pieces(texts, 4 * args.num_new_tokens, args.longest)
    ranked = vocabulary.rank_pieces(learnt, texts, tokenizer, args.min_frequency)[: args.num_new_tokens]
    pieces = list(dict.fromkeys([*(p.text for p in ranked), *(w for w in words if len(sub_tokens(tokenizer, w)) > 1)]))
    if not pieces:
        raise ValueError("found no piece that would save a token; lower --min_frequency or give more text")

    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}-unfinished-", dir=target.parent))
    try:
        tokens_before = count_tokens(tokenizer, held_out)
        new = vocabulary.extend_tokenizer(folder, tokenizer, pieces, unfinished, held_out[:1000])
        cut = {token: sub_tokens(tokenizer, token) for token in new}
        extended = load_tokenizer(str(unfinished))
        tokens_after = count_tokens(extended, held_out)
        ids = {token: extended.convert_tokens_to_ids(token) for token in new}
        model = load_base(str(folder), "auto")
        vocabulary.add_rows(model, cut, ids)
        model.save_pretrained(unfinished)
        single = sum(len(sub_tokens(extended, token)) == 1 for token in pieces)
        characters = sum(map(len, held_out))
        report = {"texts": len(held_out), "characters": characters, "before": tokens_before, "after": tokens_after}
        vocabulary.write_record(unfinished, str(folder), ids, report)
        publish(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(
        f"{len(pieces)} pieces, {single} of them one token now; {len(new)} new tokens, such as {' '.join(pieces[:12])}"
    )
    print(
        f"held-out text: {len(held_out):,} texts, {characters:,} characters: {tokens_before:,} -> {tokens_after:,} "
        f"tokens ({1 - tokens_after / max(tokens_before, 1):.1%} saved), {characters / max(tokens_before, 1):.2f} -> "
        f"{characters / max(tokens_after, 1):.2f} characters a token"
    )
    print(f"wrote {args.output_dir}; the new rows are means of old ones: train them with pretraining.py")


if __name__ == "__main__":
    run(main)

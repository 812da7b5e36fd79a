"""What every script's command line is made of: flags from dataclasses, one line for a mistake, places to write to.

Standard library only, so that `--help` and mistakes are answered before torch loads.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import functools
import os
import re
import sys
import tempfile
import time
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import field
from pathlib import Path
from typing import Any, Literal, NoReturn


def flag(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


NEITHER_TRAINED_NOR_WRITTEN = {
    "gptq": "gptqmodel needs a newer torch than is pinned; expected 8bit or 4bit (in training also 2bit)",
    "awq": "autoawq is no longer kept up; expected 8bit or 4bit (in training also 2bit)",
    "gguf": "its package knows no models; train with 4bit, merge, and give the folder to llama.cpp's "
    "convert_hf_to_gguf.py",
}


class OneLineParser(argparse.ArgumentParser):
    """A parser of whole names alone, whose mistakes are a ValueError of one line instead of a usage page."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        found = re.match(r"argument (--\w*quantization): invalid choice: '(\w+)'", message)
        if found and (reason := NEITHER_TRAINED_NOR_WRITTEN.get(found[2].lower())):
            raise ValueError(f"{found[1]}: found {found[2]}, which is neither trained nor exported here: {reason}")
        if message.startswith("unrecognized arguments: "):
            word = message.split(": ", 1)[1].split()[0]
            raise ValueError(unknown_flag(word, self._option_string_actions))
        raise ValueError(message.removeprefix("argument "))


def unknown_flag(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word.split("=")[0], known, n=1)
    return f"unknown flag or value {word!r}" + (f"; did you mean {near[0]}?" if near else "; see --help")


def parse_bool(text: str) -> bool:
    if text.lower() in {"true", "1", "yes"}:
        return True
    if text.lower() in {"false", "0", "no"}:
        return False
    raise argparse.ArgumentTypeError(f"found {text!r}, expected True or False")


def parse_or_word(kind: type, words: tuple[str, ...], text: str) -> Any:
    """A word as it is, else a value of `kind`."""
    if text in words:
        return text
    try:
        return kind(text)
    except ValueError:
        expected = " or ".join([f"{kind.__name__} value", *words])
        raise argparse.ArgumentTypeError(f"found {text!r}, expected {expected}") from None


def add_dataclass(parser: argparse._ArgumentGroup, cls: type) -> None:
    """Add one flag for each field of a dataclass; types: str, int, float, bool, Literal, each or None, or a word."""
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        hint = hints[item.name]
        words: tuple[str, ...] = ()
        if typing.get_origin(hint) in {typing.Union, types.UnionType}:
            first, *others = (part for part in typing.get_args(hint) if part is not type(None))
            words = tuple(word for part in others for word in typing.get_args(part))
            hint = first
        text = item.metadata.get("help", "").replace("%", "%%")
        options: dict[str, Any] = {"default": item.default, "help": text}
        if hint is bool:
            options |= {"type": parse_bool, "nargs": "?", "const": True, "metavar": "True|False"}
        elif typing.get_origin(hint) is Literal:
            options |= {"choices": typing.get_args(hint)}
        elif words:
            options |= {"type": functools.partial(parse_or_word, hint, words)}
            options["metavar"] = "|".join([hint.__name__.upper(), *words])
        else:
            options |= {"type": hint, "metavar": hint.__name__.upper()}
        if item.default not in (None, ""):
            options["help"] += f" (default: {item.default})"
        parser.add_argument(f"--{item.name}", **options)


def build_parser(description: str, *classes: type) -> OneLineParser:
    parser = OneLineParser(
        usage="%(prog)s [--flag value ...]",
        description=description,
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=34, width=120),
    )
    for cls in classes:
        add_dataclass(parser.add_argument_group(cls.__name__.removesuffix("Arguments").lower()), cls)
    return parser


def split_dataclasses(namespace: argparse.Namespace, *classes: type) -> list[Any]:
    return [cls(**{f.name: getattr(namespace, f.name) for f in dataclasses.fields(cls)}) for cls in classes]


def make_folder(folder: str | Path, flag: str = "--output_dir") -> None:
    """Make it; find out before the work, not after it, that nothing can be written there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{flag} {folder}: cannot be written to ({error.strerror or error})") from None


def check_output_file(path: str | Path, flag: str = "--output_file") -> None:
    """`make_folder` for a file that grows, or will be written, in its folder."""
    make_folder(Path(path).parent, flag)
    if Path(path).is_dir():
        raise ValueError(f"{flag} {path}: found a folder, expected a file")
    if Path(path).exists() and not os.access(path, os.W_OK):
        raise ValueError(f"{flag} {path}: cannot be written to ({os.strerror(errno.EACCES)})")


def run(main: Callable[[], None]) -> NoReturn:
    """Run a script's main: a user's mistake (ValueError) becomes one line on stderr and exit code 2.

    Of several processes that meet the same mistake the first one tells it: the launcher ends the others while they
    wait. A mistake that only another rank meets is told by that one.
    """
    try:
        main()
    except ValueError as error:
        if os.environ.get("SUWEN_TRACEBACK"):
            raise
        if int(os.environ.get("RANK", "0")) > 0:
            time.sleep(5)
        line = " ".join(str(error).split())
        print(f"{os.path.basename(sys.argv[0])}: error: {line}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    sys.exit(0)

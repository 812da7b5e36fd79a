"""What the conversions of tokenizers share: what a folder says of its own, how one is written, how one is checked."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from suwen.conversion.families import Family
from suwen.conversion.weights import read_json
from template import get_template

Encode = Callable[[str], list[int]]
Decode = Callable[[list[int]], str]
SAMPLE_LINES = 1500
ODD_LINES = (
    "", " ", "  ", "　全角 空格　", " 前面有空格", "后面有空格 ", "中  间  有  空  格", "\t制表\t符", "换\n行\n\n两次",
    "回车\r\n", "剂量：0.5 mg/kg，每日３次；ＡＢＣ（全角）ﬁ ½ ① ㎎", "naïve café nai\u0308ve cafe\u0301", "ß ſ İ ı",
    "😀👩‍⚕️🩺", "𠮷野家 㐂 龘", "カタカナ ｶﾀｶﾅ 한국어 العربية עברית हिन्दी", "a\u200bb\u00a0c\ufeffd\u3000e",
    "...!!!？？？——……「」『』", "def f(x):\n    return x ** 2\n", "https://example.org/a?b=c&d=%E4%BD%A0",
    "1234567890 3.14159 1,000,000", "▁ ▁▁a ▁", "I'm you're we'll THEY'VE it's", "\x01\x7f控制符",
    "－1～2°C  ±  ≥  μg", "ＩＣＤ－１０：Ｉ１０.Ｘ００", "people esophagus isopropyl",
)  # fmt: skip
QWEN_CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
# ChatGLM2 and 3 name two control tokens by bare words, which their code never looks for in a text. A tokenizer that is
# not code finds every control token by its name, and would cut "people" and "esophagus" there.
GLM_NAMES = {"sop": "<sop>", "eop": "<eop>"}
GLM_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
# Whose tokenizers put BOS before a text unless their settings say no
BOS_CLASSES = ("llama", "codellama", "mistral", "gemma", "internlm2", "yi", "orion")
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


def unknown_class(settings: dict[str, Any]) -> str | None:
    """The class that a tokenizer_config.json names, where only code from its folder could define it."""
    import transformers

    from suwen import architectures

    name = str(settings.get("tokenizer_class") or "")
    names = (name, f"{name}Fast", name.removesuffix("Fast"))
    known = any(hasattr(room, n) for room in (transformers, architectures) for n in names)
    return name if name and not known else None


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
    named_by_words = family.name in ("chatglm2", "chatglm3")
    control |= {key: GLM_NAMES.get(token, token) if named_by_words else token for key, token in added.items()}
    place = {piece: i for i, piece in enumerate(pieces)}
    spoken = get_template(family.template).special_tokens if family.template else ()
    control |= {place[token]: token for token in [*names.values(), *spoken] if token in place}
    listed = [token for token in listed_control(folder, family) if token not in place]
    for token_id, token in enumerate(listed, start=len(pieces)):
        if token not in control.values():
            control.setdefault(token_id, token)
    template = settings.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if named_by_words and isinstance(template, str):
        template = template.replace("[gMASK]sop", "[gMASK]<sop>")
    return Source(
        control=dict(sorted(control.items())),
        names=names,
        prefix=[],
        chat_template=template if isinstance(template, str) else None,
        spelling=settings.get("spelling") or {},
    )


def listed_control(folder: Path, family: Family) -> tuple[str, ...]:
    """Control tokens that stand in a family's code only."""
    if family.name in ("chatglm2", "chatglm3"):
        code = "".join(path.read_text(encoding="utf-8") for path in folder.glob("tokenization_*.py"))
        roles = GLM_ROLES if family.name == "chatglm3" or GLM_ROLES[1] in code else ()
        return ("[MASK]", "[gMASK]", "[sMASK]", *GLM_NAMES.values(), *roles)
    return {"qwen": QWEN_CONTROL, "glm4": GLM4_CONTROL}.get(family.name, ())


def find_prefix(folder: Path, family: Family, names: dict[str, str]) -> list[str] | None:
    """Tokens that the original puts before every text; None where neither a file nor a class says so.

    Where the settings are silent, the default of the folder's own code counts, which is read and never run.
    """
    settings = read_json(folder / "tokenizer_config.json")
    if "prefix_tokens" in settings:
        return settings["prefix_tokens"]
    if family.name in ("chatglm2", "chatglm3", "glm4"):
        return ["[gMASK]", "<sop>"]
    adds_bos = settings.get("add_bos_token")
    if adds_bos is None:
        code = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("tokenization_*.py")))
        kind = settings.get("tokenizer_class") or read_json(folder / "config.json").get("model_type", "")
        if default := re.search(r"\badd_bos_token(?:\s*:\s*\w+)?\s*=\s*(True|False)", code):
            adds_bos = default[1] == "True"
        elif kind.lower().removesuffix("fast").removesuffix("tokenizer") in BOS_CLASSES:
            adds_bos = True
    if adds_bos is None:
        return None
    return [names["bos_token"]] if adds_bos and "bos_token" in names else []


def set_prefix(tokenizer: Any, prefix: list[str]) -> None:
    from tokenizers import processors

    ids = [(token, tokenizer.token_to_id(token)) for token in prefix]
    tokenizer.post_processor = processors.TemplateProcessing(single=[*prefix, "$A"], special_tokens=ids)


def add_control(tokenizer: Any, source: Source, user: list[Any]) -> None:
    from tokenizers import AddedToken

    tokenizer.add_tokens(user)
    for token_id, token in source.control.items():
        tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        if tokenizer.token_to_id(token) != token_id:
            raise ValueError(
                f"tokenizer: token {token!r} should have id {token_id}, gets {tokenizer.token_to_id(token)}"
            )
    if source.prefix:
        set_prefix(tokenizer, source.prefix)


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


def comparable(lines: list[str], source: Source) -> tuple[list[str], str]:
    """The lines that spell no control token, which the reference would cut as text; and the count of both in words."""
    kept = [line for line in lines if not any(token in line for token in source.control.values())]
    skipped = len(lines) - len(kept)
    told = f"; {skipped} that spell control tokens were not compared" if skipped else ""
    return kept, f"{len(kept)} lines agree{told}"


def first_difference(
    target: Path,
    lines: list[str],
    reference: Encode,
    prefix: list[str],
    decode: Decode | None = None,
    unknown: int = -1,
) -> str | None:
    """The first line on which the written tokenizer and the reference differ, in words; None if there is none.

    Args:
        prefix: tokens that the written one must put before every text.
        decode: of the reference; None compares the ids alone.
        unknown: id of the unknown token, whose text is lost in both.
    """
    from transformers import AutoTokenizer

    import suwen.architectures  # noqa: F401  (registers its classes)

    tokenizer = AutoTokenizer.from_pretrained(target, trust_remote_code=False)
    differences = []
    before = tokenizer.convert_tokens_to_ids(prefix)
    for line in lines:
        expected = reference(line)
        found = tokenizer(line)["input_ids"]
        if found[: len(before)] != before:
            return f"a text begins with {tokenizer.convert_ids_to_tokens(found[: len(before)])}, expected {prefix}"
        found = found[len(before) :]
        if found != expected:
            pairs = enumerate(zip(found, expected, strict=False))
            at = next((i for i, pair in pairs if pair[0] != pair[1]), min(len(found), len(expected)))
            was, became = (tokenizer.convert_ids_to_tokens(ids[at : at + 2]) for ids in (expected, found))
            differences.append(f"{line[:40]!r}: {was} became {became}")
        elif decode and unknown not in expected and (text := tokenizer.decode(found)) != decode(expected):
            differences.append(f"{decode(expected)[:40]!r} is decoded as {text[:40]!r}")
    return f"{len(differences)} of {len(lines)} lines, first {differences[0]}" if differences else None

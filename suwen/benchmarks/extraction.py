"""From what a model wrote to the letters that it chose, with the reason why they were taken.

declared       "答案：C", "故选 ABD", "The answer is (B)": the last declaration with 答案, else with 选
single_letter  nothing but letters ("C.", "A、B、D"), a line that begins "C. text of C", or one letter standing alone
option_text    the text of exactly one option
none           anything else; counts as wrong

The list of patterns is short on purpose: long ones rot. A letter inside a Latin word (CT), before a Chinese character
that is not this option's text (B超) or behind one in a term (维生素C) is never an answer.
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

VERSION = 1
REASONS = ("declared", "single_letter", "option_text", "none")

# Letters with separators between them; which of them are options is checked afterwards.
LETTERS = r"[A-Z](?:\s*[、,;/和与及&]?\s*[A-Z])*"
BRACKETED = rf"[(\[{{<\"'“‘「《【\s]*({LETTERS})"
NEGATED = r"(?<![不非勿未无])"
ANSWER = re.compile(
    rf"(?:{NEGATED}(?:答案|正确选项|正确的选项|正确项)|\b(?:correct\s+)?answer|\boption)"
    rf"(?:\s*(?:应该|应当|应|就|选项|选择|选|是|为|:|is|are|the|option))*\s*{BRACKETED}",
    re.IGNORECASE,
)
CHOSEN = re.compile(
    rf"(?:(?<![不非勿未无可备候被])选(?:择|取|项为|项是|项:|定)?|(?:正确的|应该|应当|应)(?:选项)?(?=是|为|:))"
    rf"\s*(?:答案|:|是|为|的是)*\s*{BRACKETED}"
)
AFFIRMED = re.compile(r"(?<![A-Za-z0-9])([A-Z])(?:选项|项)?(?:是|为)(?:正确|最佳|最合适|对的)")
BOXED = re.compile(r"\\boxed\s*\{(?:\\text\s*\{)?([^{}]*)\}+")
ALONE = re.compile(rf"(?<![A-Za-z0-9\u4e00-\u9fff])({LETTERS})(?![A-Za-z0-9\u4e00-\u9fff+%/-])")
# What may stand behind a chosen letter: an end, punctuation, or a word that speaks about the option
BEHIND = re.compile(r"\s*(?:$|[^\w\s+%/-]|\n|项|选项|是|正确|对|因为|解释|解析|理由)")


class Extraction(NamedTuple):
    letters: str  # sorted, each once; "" where none could be taken
    reason: str


def normalise(text: str) -> str:
    """NFKC (full-width letters and punctuation become ASCII), without Markdown's marks."""
    text = unicodedata.normalize("NFKC", text).replace("**", "").replace("__", "").replace("`", "")
    return BOXED.sub(r"答案:\1 ", text)


def compact(text: str) -> str:
    """Letters, digits and signs of a text: what two spellings of an option have in common."""
    normal = unicodedata.normalize("NFKC", text).casefold()
    return "".join(c for c in normal if not c.isspace() and unicodedata.category(c)[0] != "P")


def extract_choice(answer: str, options: dict[str, str]) -> Extraction:
    """The options that an answer chooses.

    Args:
        answer: without the thinking part.
        options: letter -> text.
    """
    text = normalise(answer).strip()
    for pattern in (ANSWER, CHOSEN, AFFIRMED):
        for match in reversed(list(pattern.finditer(text))):
            if letters := _letters_at(text, match.start(1), match.end(1), options):
                return Extraction(letters, "declared")
    if letters := _bare_letters(text, options):
        return Extraction(letters, "single_letter")
    if letter := _option_text(text, options):
        return Extraction(letter, "option_text")
    return Extraction("", "none")


def _letters_at(text: str, start: int, end: int, options: dict[str, str]) -> str:
    """The letters between two places, if they are options and what follows does not make them part of a term.

    Cut back until both hold, so that "A B超" for the option A with the text "B超" gives A. A word such as CT is never
    cut: what would follow is a letter.
    """
    places = [i for i in range(start, end) if text[i].isascii() and text[i].isalpha()]
    while places:
        tail, chosen = text[places[-1] + 1 :], {text[i].upper() for i in places}
        if chosen <= options.keys():
            if len(chosen) == 1 and _begins_with(tail, options[next(iter(chosen))]):
                return chosen.pop()
            if BEHIND.match(tail) or len(chosen) == 1 and re.match(r"\s+(?![A-Za-z]{2})\S", tail):
                return "".join(sorted(chosen))
        places.pop()
    return ""


def _begins_with(text: str, option: str) -> bool:
    return bool(compact(option)) and compact(text).startswith(compact(option))


def _bare_letters(text: str, options: dict[str, str]) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return ""
    # nothing but letters in the first or last line
    for line in (lines[0], lines[-1]):
        only = re.fullmatch(rf"[(\[\"'「]*\s*({LETTERS})\s*[)\]\"'」.,;:!。]*", line)
        if only and (letters := _known(only[1], options)):
            return letters
    # "C. text of C" or "C text of C"; several such lines choose several options, all of them only repeat the question
    begins = [match for line in lines if (match := re.match(r"[(\[]?([A-Z])[)\]]?\s*[.、:,)]?\s*(.+)", line))]
    chosen = {match[1] for match in begins if match[1] in options and _begins_with(match[2], options[match[1]])}
    if 0 < len(chosen) < len(options):
        return "".join(sorted(chosen))
    found = {letters for match in ALONE.finditer(text) if (letters := _known(match[1], options))}
    return found.pop() if len(found) == 1 else ""


def _known(run: str, options: dict[str, str]) -> str:
    letters = re.findall("[A-Z]", run)
    return "".join(sorted(set(letters))) if letters and all(letter in options for letter in letters) else ""


def _option_text(text: str, options: dict[str, str]) -> str:
    """The one option whose text occurs in the answer; a text inside a longer one that occurs too does not count."""
    whole = compact(text)
    texts = {letter: compact(option) for letter, option in options.items()}
    for letter in sorted((x for x in texts if texts[x]), key=lambda x: -len(texts[x])):
        if texts[letter] in whole:
            others = whole.replace(texts[letter], "\0")
            if not any(texts[x] and texts[x] in others for x in texts if x != letter):
                return letter
            return ""
    return ""

"""Multiple-choice questions: one reader for every way of writing options and answers, prompts, candidates, scores."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

from suwen.benchmarks.extraction import REASONS, extract_choice
from suwen.benchmarks.task import Candidates, Item, Record, Row, lower_keys, rate, text_of
from suwen.formats import BadRow

LETTERS = "ABCDEFGHIJ"
MOST_SUBSETS = 6  # options up to which all subsets are candidates: 63 of them
QUESTIONS = ("question", "题目", "题干", "问题", "query")
OPTIONS = ("options", "option", "选项")
ANSWERS = ("answer_idx", "answer", "答案", "正确答案")
# Annotations by the names of the published files, as they are shown
GROUPS = {
    "disease group": "disease group", "clinical department": "department", "medical discipline": "discipline",
    "area of competency": "competency", "difficulty level": "difficulty", "exam_type": "exam", "exam_class": "class",
    "exam_subject": "subject", "question_type": "question type", "source": "source", "subject": "subject",
    "meta_info": "exam", "category": "category",
}  # fmt: skip
NOT_ANNOTATED = {"", "nan", "none"}
MULTIPLE = {"multiple": True, "multi": True, "多项": True, "多选": True, "single": False, "单项": False, "单选": False}


# ------------------------------------------------------------------------------------------------------------ reading


def parse_options(value: Any) -> dict[str, str]:
    """letter -> text, out of a dictionary, a list, or a text such as "A 甲⏎B 乙", "(A) 甲", "A. 甲 B. 乙".

    Raises:
        BadRow: fewer than two options, or other letters than A to J.
    """
    if isinstance(value, dict):
        found = {_letter(str(key)): _option(text) for key, text in value.items()}
    elif isinstance(value, list):
        found = {letter: _option(text) for letter, text in zip(LETTERS, value, strict=False)}
    elif isinstance(value, str):
        found = split_options(value)[1]
    else:
        raise BadRow("no options", f"options are {type(value).__name__}, expected text, a list or letters with texts")
    found = {letter: text for letter, text in sorted(found.items()) if text}
    if len(found) < 2:
        raise BadRow("no options", f"found {len(found)} options, expected at least two, such as 'A 甲', 'B 乙'")
    if not set(found) <= set(LETTERS):
        raise BadRow("unknown option letters", f"found {', '.join(found)}, expected letters of {LETTERS}")
    if all(text.endswith(".") for text in found.values()):  # as Apollo ends every option
        found = {letter: text[:-1].rstrip() for letter, text in found.items()}
    return found


def _letter(key: str) -> str:
    return unicodedata.normalize("NFKC", key).strip(" .()、:").upper()


def _option(text: Any) -> str:
    return "" if text is None else " ".join(str(text).split())


def split_options(text: str) -> tuple[str, dict[str, str]]:
    """A text that ends with its options: what stands before them, and letter -> text.

    Options at the beginnings of lines come first, then those marked by a sign within a line, then by a blank alone.
    """
    if "\n" not in text:
        text = text.replace("\\n", "\n")  # an xlsx copy of CMExam spells its line breaks
    wide = str.maketrans({chr(ord(letter) + 0xFEE0): letter for letter in LETTERS})
    text = text.translate(wide)
    sign = r"\s*[)）\]】]?\s*[.．、:：,，]?[ \t\u3000\xa0]*"
    ways = (
        r"^[ \t\u3000\xa0]*[(（\[【]?{letter}(?![A-Za-z0-9])" + sign,
        r"(?:^|(?<=[\s;；,，。？?)）:：]))[(（\[【]?{letter}\s*[)）\]】.．、:：]" + sign,
        r"(?:^|(?<=\s)){letter}\s+",
    )
    for way in ways:
        for first in range(2):  # a question of CMExam lost its option A: B to E are still a question
            places: list[tuple[int, int]] = []
            for letter in LETTERS[first:]:
                match = re.compile(way.format(letter=letter), re.MULTILINE).search(text, places[-1][1] if places else 0)
                if match is None:
                    break
                places.append((match.start(), match.end()))
            if len(places) >= 2:
                ends = [start for start, _ in places[1:]] + [len(text)]
                found = zip(LETTERS[first:], places, ends, strict=False)
                options = {letter: _option(text[begin:end]).rstrip(";；") for letter, (_, begin), end in found}
                return text[: places[0][0]].strip(), options
    return text.strip(), {}


def parse_answer(value: Any, options: dict[str, str]) -> str:
    """The right letters, sorted: out of "C", "(ABC)", "ＡＢＤ", "A、B", ["A", "B"], "答案：C" or an option's own text.

    Raises:
        BadRow: no answer, or one that the options do not hold.
    """
    if isinstance(value, list):
        value = "".join(map(str, value))
    if value is None or not str(value).strip() or str(value).strip().lower() == "nan":
        raise BadRow("no answer", "the answer is empty, expected letters such as C or ABD")
    text = unicodedata.normalize("NFKC", str(value)).strip()
    bare = re.sub(r"^(?:正确)?(?:答案|answer)\s*:?\s*", "", text, flags=re.IGNORECASE)
    if re.fullmatch(r"[(\[]?\s*[A-Za-z](?:[\s、,;/和|]*[A-Za-z])*\s*[)\].。]*", bare):
        letters = sorted(set(re.findall("[A-Z]", bare.upper())))
        if not set(letters) <= options.keys():
            raise BadRow("answer not among the options", f"found {text!r}, expected letters of {''.join(options)}")
        return "".join(letters)
    same = [letter for letter, option in options.items() if _option(value) == option]
    if len(same) == 1:
        return same[0]
    raise BadRow("answer not among the options", f"found {text[:60]!r}, expected letters of {''.join(options)}")


def parse_choice(row: Row, multiple: bool | None = None) -> Item:
    """One multiple-choice question out of a row of any of the forms in data/evaluation/README.md.

    Args:
        multiple: whether the benchmark allows several right letters; a question type in the row goes before it.
    """
    fields = lower_keys(row)
    if isinstance(fields.get("messages"), list):
        fields |= _from_messages(fields["messages"])
    question = text_of(fields, QUESTIONS, "no question")
    given: Any = next((fields[name] for name in OPTIONS if fields.get(name)), None)
    if given is None and {"a", "b"} <= fields.keys():
        given = {letter: fields.get(letter.lower()) for letter in LETTERS}
    if given is None:
        question, inline = split_options(question)
        given = inline
        if question == "":
            raise BadRow("no question", "the text is options only, expected a question before them")
    options = parse_options(given)
    answer = next((fields[name] for name in ANSWERS if fields.get(name) not in (None, "")), None)
    target = parse_answer(answer, options)
    kind = str(fields.get("question_type", ""))
    multiple = next((several for word, several in MULTIPLE.items() if word in kind), multiple)
    if multiple is False and len(target) > 1:
        raise BadRow("several answers", f"found {target}, expected one letter in a single-choice question")
    groups: dict[str, str] = {}
    for name, shown in GROUPS.items():
        value = str(fields.get(name, "")).strip()
        if value.lower() not in NOT_ANNOTATED:
            groups.setdefault(shown, value)
    return Item(question, target, options, multiple, groups)


def _from_messages(messages: list[Any]) -> Row:
    """Question and answer of an exam row in chat form, whose options stand in the user's message."""
    said = {turn.get("role"): turn.get("content") for turn in messages if isinstance(turn, dict)}
    if not isinstance(said.get("user"), str) or not isinstance(said.get("assistant"), str):
        raise BadRow("wrong schema", "messages without the text of a user and an assistant")
    return {"question": said["user"], "answer": said["assistant"]}


# ------------------------------------------------------------------------------------------------------------- asking


def listed(item: Item) -> str:
    return "\n".join(f"{letter}. {text}" for letter, text in item.options.items())


def ask_choice(item: Item) -> str:
    """The question as it is put to a served model. It never says more about the answer than the benchmark does."""
    kind = {
        None: "选择题，可能有一个或多个正确选项",
        True: "多项选择题，有两个或更多正确选项",
        False: "单项选择题，只有一个正确选项",
    }[item.multiple]
    return f"下面是一道{kind}。\n\n{item.question}\n{listed(item)}\n\n请以“答案：”开头，写出所选选项的字母。"


def letter_sets(item: Item) -> tuple[str, ...]:
    """What may be answered: single letters where the benchmark says so, else all subsets, shorter ones first."""
    letters = list(item.options)
    if item.multiple is False or len(letters) > MOST_SUBSETS:
        return tuple(letters)
    sizes = range(2 if item.multiple else 1, len(letters) + 1)
    return tuple("".join(chosen) for size in sizes for chosen in itertools.combinations(letters, size))


def choice_candidates(item: Item) -> Candidates:
    """The question as plain text, without a chat template, so that a base model is asked what a chat model is asked.

    Where sets of letters compete, each ends with its line: otherwise "A" would take part in the probability of "AB",
    and a mean over letters would favour long sets, whose last letters are easy to guess.
    """
    labels = letter_sets(item)
    end = "" if all(len(label) == 1 for label in labels) else "\n"
    prefix = f"问题：{item.question}\n{listed(item)}\n答案："
    return Candidates(prefix, tuple(label + end for label in labels), labels)


# ------------------------------------------------------------------------------------------------------------ scoring


def judge_choice(item: Item, answer: str) -> Record:
    letters, reason = extract_choice(answer, item.options)
    return {"choice": letters, "reason": reason, "correct": letters == item.target}


def choose_letters(item: Item, logps: Sequence[float]) -> Record:
    labels = letter_sets(item)
    best = labels[max(range(len(labels)), key=lambda i: logps[i])]
    record: Record = {"choice": best, "correct": best == item.target}
    record["logps"] = {label: round(float(logp), 4) for label, logp in zip(labels, logps, strict=True)}
    return record


def weighted_f1(golds: Sequence[str], choices: Sequence[str]) -> tuple[float, float]:
    """F1 over answer strings as classes: weighted by the gold counts, and the plain mean over classes.

    scikit-learn's precision_recall_fscore_support with zero_division=0; "AB" is a class of its own.
    """
    right = Counter(gold for gold, choice in zip(golds, choices, strict=True) if gold == choice)
    wanted, given = Counter(golds), Counter(choices)
    scores = {label: 2 * right[label] / (wanted[label] + given[label]) for label in wanted | given}
    return sum(scores[label] * count for label, count in wanted.items()) / len(golds), sum(scores.values()) / len(
        scores
    )


def summarise_choice(records: Sequence[Record]) -> dict[str, Any]:
    """Scores of the records of one mode. Unanswered questions stay in every denominator, as wrong."""
    golds, choices = [r["target"] for r in records], [r["choice"] for r in records]
    correct = [r["correct"] for r in records]
    n = len(records)
    found: dict[str, Any] = {"metrics": {"accuracy": rate(sum(correct), n)}, "n": n}
    several = [i for i, gold in enumerate(golds) if len(gold) > 1]
    if 0 < len(several) < n:
        alone = [i for i, gold in enumerate(golds) if len(gold) == 1]
        found["metrics"]["accuracy, one right letter"] = rate(sum(correct[i] for i in alone), len(alone))
        found["metrics"]["accuracy, several right letters"] = rate(sum(correct[i] for i in several), len(several))
    weighted, macro = weighted_f1(golds, choices)
    shared = sum(len(set(gold) & set(choice)) for gold, choice in zip(golds, choices, strict=True))
    letters = sum(map(len, golds)) + sum(map(len, choices))
    found["metrics"] |= {
        "weighted F1": {"value": 100 * weighted},
        "macro F1": {"value": 100 * macro},
        "letter F1": {"value": 200 * shared / letters if letters else 0.0},
    }
    if several or any(len(choice) > 1 for choice in choices):
        too_many = sum(set(gold) < set(choice) for gold, choice in zip(golds, choices, strict=True))
        too_few = sum(set(choice) < set(gold) for gold, choice in zip(golds, choices, strict=True) if choice)
        found["metrics"]["too many letters"], found["metrics"]["too few letters"] = rate(too_many, n), rate(too_few, n)
    if any("reason" in r for r in records):
        reasons = Counter(r["reason"] for r in records)
        found["reasons"] = {reason: reasons[reason] for reason in REASONS if reasons[reason]}
        found["metrics"]["unparsed"] = rate(reasons["none"], n)
    found["floors"] = choice_floors(records)
    found["choices"] = dict(Counter(choices).most_common(8))
    return found


def choice_floors(records: Sequence[Record]) -> dict[str, float]:
    """What needs no knowledge, in percent: one random letter, a random set of letters, always the same letters."""
    n = len(records)
    letter = sum(1 / len(r["options"]) for r in records if len(r["target"]) == 1) / n
    subset = sum(1 / (2 ** len(r["options"]) - 1) for r in records) / n
    (majority, count), *_ = Counter(r["target"] for r in records).most_common(1)
    floors = {"random letter": 100 * letter, "random set": 100 * subset, f"always {majority}": 100 * count / n}
    if all(len(r["target"]) == 1 for r in records):
        del floors["random set"]
    return floors

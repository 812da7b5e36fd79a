"""CMExam by its published scorer (github.com/williamliujl/CMExam, src/evaluation/evaluate_lora_result.py), bit for bit.

Of the repository's four scorers this is the one that runs as published; the ones for ChatGLM, GPT and P-tuning raise
before they score (missing imports, names not defined), so there is nothing to reproduce. What has to be known:

- An option counts as chosen when its letter, or the first word of its text, occurs anywhere in the first line: "CT" is
  C. The first line is read alone only where the answer holds 解释; else all of it is.
- Correct is the whole answer string; "无答案" is a class of its own in the weighted F1.
- ROUGE is over sets of n-grams, and ROUGE-L weighs precision by beta = P / R, not evenly. BLEU is on characters,
  without smoothing.
- Rows with an option that is not "letter blank text" make it raise; they are refused here, and counted. An answer that
  pandas would read as missing ("", "NA", "None", ...) is "无答案".
- It scores files that the authors' fine-tuned models wrote, asked with the prompt below and no chat template. Here the
  same text is put to the served model as a user message: the scorer is theirs, the asking is ours.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from suwen.benchmarks.choice import ANSWERS, OPTIONS, QUESTIONS, parse_choice
from suwen.benchmarks.exams import CMEXAM_ROWS
from suwen.benchmarks.task import Item, Record, Row, Task, lower_keys, rate, text_of
from suwen.formats import BadRow
from suwen.metrics import longest_common_subsequence

NO_ANSWER = "无答案"
# What pandas.read_csv takes for a missing value by default
MISSING = {
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
    "NULL", "NaN", "None", "n/a", "nan", "null",
}  # fmt: skip


def parse_official(row: Row) -> list[Item]:
    """Options, answer and explanation as they stand in the file: nothing is normalised."""
    item = parse_choice(row)
    fields = lower_keys(row)
    options = text_of(fields, OPTIONS, "no options").replace("\\n", "\n")
    for line in options.split("\n"):
        if len(line.split()) < 2:
            raise BadRow("undefined in the published scorer", f"option {line!r}, expected a letter, a blank and text")
    explanation = next((fields[name] for name in ("explanation", "答案解析") if fields.get(name)), "")
    question = text_of(fields, QUESTIONS, "no question")
    target = [text_of(fields, ANSWERS, "no answer"), explanation]
    return [Item(f"问题: {question}, \n 选项: {options}", target, {"options": options}, groups=item.groups)]


def chosen_options(options: str, answer: str) -> str:
    if answer in MISSING:
        return NO_ANSWER
    read = answer.split("\n")[0].strip() if "解释" in answer else answer
    texts = {line.split()[0]: line.split()[1] for line in options.split("\n")}
    return "".join(letter for letter, text in texts.items() if letter in read or text in read) or NO_ANSWER


def explanation_of(answer: str) -> str:
    if answer in MISSING:
        return NO_ANSWER
    return answer.split("解释:")[1].strip() if "解释:" in answer else answer


def judge_official(item: Item, answer: str) -> Record:
    choice = chosen_options(item.options["options"], answer)
    return {"choice": choice, "correct": choice == item.target[0], "explanation": explanation_of(answer)}


def weighted_scores(golds: Sequence[str], choices: Sequence[str]) -> tuple[float, float, float]:
    """Precision, recall and F1 of scikit-learn, average="weighted", answer strings as classes; 0 where undefined."""
    labels = sorted({*golds, *choices})
    wanted, given = Counter(golds), Counter(choices)
    right = Counter(gold for gold, choice in zip(golds, choices, strict=True) if gold == choice)
    columns = [
        (
            right[label] / given[label] if given[label] else 0.0,
            right[label] / wanted[label] if wanted[label] else 0.0,
            2 * right[label] / (wanted[label] + given[label]),
        )
        for label in labels
    ]
    weights = [wanted[label] for label in labels]
    precision, recall, f1 = (float(np.average(column, weights=weights)) for column in zip(*columns, strict=True))
    return precision, recall, f1


def bleu(references: Sequence[Sequence[str]], answers: Sequence[Sequence[str]], order: int) -> float:
    """Corpus BLEU of TensorFlow's NMT example, without smoothing, in percent."""
    matches, possible = [0] * order, [0] * order
    for reference, answer in zip(references, answers, strict=True):
        for n in range(1, order + 1):
            left, right = (Counter(tuple(x[i : i + n]) for i in range(len(x) - n + 1)) for x in (answer, reference))
            matches[n - 1] += (left & right).total()
            possible[n - 1] += max(0, len(answer) - n + 1)
    precisions = [float(m) / p if p > 0 else 0.0 for m, p in zip(matches, possible, strict=True)]
    mean = math.exp(sum((1.0 / order) * math.log(p) for p in precisions)) if min(precisions) > 0 else 0
    length = float(sum(map(len, answers)))
    if not length or not sum(map(len, references)):
        return 0.0
    ratio = length / sum(map(len, references))
    return mean * (1.0 if ratio > 1.0 else math.exp(1 - 1.0 / ratio)) * 100


def rouge(answer: str, reference: str) -> tuple[float, float, float]:
    """F of ROUGE-1, ROUGE-2 and ROUGE-L as in TensorFlow's NMT example, on characters with blanks between them."""
    words = [" ".join(list(text)).split(" ") for text in (answer, reference)]
    scores = []
    for n in (1, 2):
        left, right = ({tuple(x[i : i + n]) for i in range(len(x) - n + 1)} for x in words)
        shared = len(left & right)
        precision = shared / len(left) if left else 0.0
        recall = shared / len(right) if right else 0.0
        scores.append(2.0 * ((precision * recall) / (precision + recall + 1e-8)))
    common = longest_common_subsequence(*words)
    recall, precision = common / len(words[1]), common / len(words[0])
    beta = precision / (recall + 1e-12)
    weighted = (1 + (beta**2)) * recall * precision / (recall + ((beta**2) * precision) + 1e-12)
    return scores[0], scores[1], weighted


def summarise_official(records: Sequence[Record]) -> dict[str, Any]:
    n = len(records)
    golds, choices = [r["target"][0] for r in records], [r["choice"] for r in records]
    precision, recall, f1 = weighted_scores(golds, choices)
    found: dict[str, Any] = {"metrics": {"accuracy": rate(sum(r["correct"] for r in records), n)}, "n": n}
    found["metrics"] |= {"weighted F1": {"value": 100 * f1}, "weighted precision": {"value": 100 * precision}}
    found["metrics"] |= {"weighted recall": {"value": 100 * recall}}
    found["metrics"]["no answer"] = rate(choices.count(NO_ANSWER), n)
    explained = [r for r in records if r["target"][1] not in MISSING]
    if explained:
        pairs = [(r["explanation"], r["target"][1]) for r in explained]
        answers, references = ([list("".join(text.split())) for text in texts] for texts in zip(*pairs, strict=True))
        for order in (1, 4):
            found["metrics"][f"BLEU-{order}"] = {
                "value": bleu(references, answers, order), "signature": f"BLEU-{order}|tok:char|CMExam repository"
            }  # fmt: skip
        columns = zip(*(rouge(answer, reference) for answer, reference in pairs), strict=True)
        for name, column in zip(("ROUGE-1", "ROUGE-2", "ROUGE-L"), columns, strict=True):
            found["metrics"][name] = {
                "value": 100 * float(np.mean(column)),
                "signature": f"{name}|sets|CMExam repository",
            }
    return found


CMEXAM_OFFICIAL = Task(
    name="cmexam_official",
    title="CMExam, published scorer",
    version=1,
    parse=parse_official,
    ask=lambda item: item.question,
    judge=judge_official,
    summarise=summarise_official,
    headline="accuracy",
    patterns=("*cmexam*",),
    published=CMEXAM_ROWS,
    source="github.com/williamliujl/CMExam, src/evaluation/evaluate_lora_result.py",
)

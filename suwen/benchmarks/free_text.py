"""Free answers against a reference text: Huatuo-26M, our own questions, and explanations of exam answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from suwen import metrics
from suwen.benchmarks.choice import listed, parse_choice
from suwen.benchmarks.task import Item, PublishedRow, Record, Row, Task, lower_keys, text_of
from suwen.statistics import bootstrap_interval

VERSION = 1
QUESTIONS = ("questions", "question", "ask", "title", "问", "问题", "prompt", "query", "instruction")
ANSWERS = ("answers", "answer", "output", "response", "答", "回答", "completion")

HUATUO_TABLE = "Huatuo-26M (arXiv:2305.01526), image of table 7; tokens not stated"
HUATUO_ROWS = tuple(
    PublishedRow(system, dict(zip(("BLEU-1", "BLEU-4", "GLEU", "ROUGE-1", "ROUGE-2", "ROUGE-L"), scores, strict=True)),
                 HUATUO_TABLE)
    for system, scores in (
        ("Qwen-7B-Chat + Huatuo-Lite", (27.30, 5.24, 7.82, 29.82, 8.66, 18.63)),
        ("T5 tuned on Huatuo-26M", (26.63, 8.46, 11.38, 33.21, 13.26, 24.85)),
        ("Baichuan2-7B-Chat", (20.73, 3.38, 5.95, 26.75, 6.83, 17.45)),
        ("HuatuoGPT", (20.59, 3.44, 6.83, 28.36, 7.72, 16.15)),
        ("Qwen-7B-Chat", (18.94, 3.11, 6.30, 29.03, 7.36, 18.13)),
        ("ChatGPT", (18.44, 1.13, 4.87, 19.60, 2.82, 12.46)),
        ("GPT2, no tuning", (10.04, 1.62, 3.34, 14.26, 3.42, 12.07)),
    )
) + tuple(
    PublishedRow(system, scores, "Qilin-Med (arXiv:2310.09089), abstract")
    for system, scores in (
        ("Qilin-Med DPO", {"BLEU-1": 16.66, "ROUGE-1": 27.44}), ("Qilin-Med SFT", {"BLEU-1": 12.69, "ROUGE-1": 24.21}),
    )
)  # fmt: skip
CMEXAM_TABLE = "CMExam (arXiv:2306.03030), results table of its repository; ROUGE over sets"
EXPLANATION_ROWS = tuple(
    PublishedRow(system, dict(zip(("BLEU-1", "BLEU-4", "ROUGE-1", "ROUGE-2", "ROUGE-L"), scores, strict=True)),
                 CMEXAM_TABLE)
    for system, scores in (
        ("ChatGLM-CMExam", (31.10, 18.94, 43.94, 31.48, 29.39)), ("LLaMA-CMExam", (29.25, 16.46, 45.88, 26.57, 23.31)),
        ("Huatuo-CMExam", (29.04, 16.72, 43.85, 25.36, 21.72)), ("Vicuna-7B", (20.15, 9.26, 38.43, 16.90, 16.33)),
        ("ChatGLM-6B", (16.51, 5.00, 35.18, 15.73, 17.09)), ("GPT-3.5-turbo", (3.56, 1.49, 33.80, 16.39, 14.83)),
        ("GPT-4", (0.17, 0.06, 29.74, 14.84, 11.51)),
    )
)  # fmt: skip


def parse_question(row: Row) -> list[Item]:
    fields = lower_keys(row)
    question = text_of(fields, QUESTIONS, "no question")
    return [Item(question, text_of(fields, ANSWERS, "no answer"))]


def parse_explanation(row: Row) -> list[Item]:
    item = parse_choice(row)
    explanation = text_of(lower_keys(row), ("explanation", "答案解析", "解析"), "no explanation")
    asked = f"{item.question}\n{listed(item)}\n\n正确答案是{item.target}。请解释为什么。"
    return [Item(asked, explanation, groups=item.groups)]


def judge_text(item: Item, answer: str) -> Record:
    """ROUGE-L on characters is the score of a single answer: BLEU is one of a whole corpus."""
    pair = metrics.tokenize(answer), metrics.tokenize(item.target)
    common = metrics.longest_common_subsequence(*pair)
    return {"score": round(100 * metrics.overlap(common, len(pair[0]), len(pair[1])).f1, 4)}


def summarise_text(records: Sequence[Record]) -> dict[str, Any]:
    """All scores on characters and on words, each with its signature; intervals by bootstrap over the answers."""
    found: dict[str, Any] = {"metrics": {}, "n": len(records)}
    for tokenizer in metrics.TOKENIZERS:
        answers, references = (
            [metrics.tokenize(record[key], tokenizer) for record in records] for key in ("response", "target")
        )
        counts = metrics.text_counts(answers, references)
        values = metrics.text_scores(counts.mean(axis=0))
        intervals = bootstrap_interval(counts, metrics.text_scores) if tokenizer == "char" else []
        for i, name in enumerate(metrics.SCORES):
            score = {"value": float(values[i]), "signature": metrics.signature(name, tokenizer)}
            if intervals:
                score |= {"low": intervals[i].low, "high": intervals[i].high}
            found["metrics"][name if tokenizer == "char" else f"{name} (words)"] = score
        for n in (1, 2):
            name = f"Distinct-{n}"
            found["metrics"][name if tokenizer == "char" else f"{name} (words)"] = {
                "value": metrics.distinct(answers, n), "signature": metrics.signature(name, tokenizer)
            }  # fmt: skip
        if tokenizer == "char":
            lengths = counts.mean(axis=0)[metrics.LENGTHS : metrics.LENGTHS + 2]
            found["lengths"] = {"answer": float(lengths[0]), "reference": float(lengths[1])}
    found["empty"] = sum(not record["response"].strip() for record in records)
    return found


def free_text(name: str, title: str, parse: Any, ask: Any, source: str, **options: Any) -> Task:
    return Task(
        name=name, title=title, version=VERSION, parse=parse, ask=ask, judge=judge_text, summarise=summarise_text,
        headline="ROUGE-L", paired="score", max_new_tokens=512, source=source, **options,
    )  # fmt: skip


HUATUO = free_text(
    "huatuo", "Huatuo-26M questions", parse_question, lambda item: item.question,
    "FreedomIntelligence/huatuo26M-testdatasets; Apache-2.0", patterns=("*huatuo*",), published=HUATUO_ROWS,
)  # fmt: skip
MEDICAL_QA = free_text(
    "medical_qa", "Own medical questions", parse_question, lambda item: item.question, "written for this project",
    default_file="medical_qa.jsonl",
)  # fmt: skip
EXPLANATION = free_text(
    "explanation", "Explanations of CMExam answers", parse_explanation, lambda item: item.question,
    "github.com/williamliujl/CMExam; Apache-2.0 file, README: academic use", patterns=("*cmexam*",),
    published=EXPLANATION_ROWS,
)  # fmt: skip
TEXTS = (HUATUO, MEDICAL_QA, EXPLANATION)

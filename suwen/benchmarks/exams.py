"""Exams: CMExam, CMB, the medical subjects of C-Eval and CMMLU, MedQA, and our own questions in CMExam's form."""

from __future__ import annotations

from typing import Any

from suwen.benchmarks.choice import ask_choice, choice_candidates, choose_letters, judge_choice, parse_choice
from suwen.benchmarks.choice import summarise_choice as summarise
from suwen.benchmarks.task import MODES, PublishedRow, Task

# v2 of a task: raise when prompt, candidates, extraction or metrics change.
VERSION = 1
CEVAL_SUBJECTS = ("basic_medicine", "clinical_medicine", "physician")
CMMLU_SUBJECTS = (
    "anatomy", "clinical_knowledge", "college_medicine", "genetics", "nutrition", "professional_medicine",
    "traditional_chinese_medicine", "virology",
)  # fmt: skip

CMEXAM_TABLE = "CMExam (arXiv:2306.03030), results table of its repository; accuracy and weighted F1 of generated text"
CMEXAM_ROWS = tuple(
    PublishedRow(system, {"accuracy": accuracy, "weighted F1": f1}, CMEXAM_TABLE)
    for system, accuracy, f1 in (
        ("GPT-4", 61.6, 61.7), ("GPT-3.5-turbo", 46.4, 46.1), ("ChatGLM-CMExam", 45.3, 45.2),
        ("RoBERTa-CMExam", 37.1, 36.7), ("Huatuo-CMExam", 28.6, 29.3), ("ChatGLM-6B", 26.3, 25.7),
        ("MedAlpaca-7B", 20.0, 10.7), ("LLaMA-CMExam", 18.3, 20.6), ("Huatuo-7B", 12.9, 7.0),
        ("Vicuna-7B", 5.0, 4.8), ("LLaMA-7B", 0.4, 0.3),
    )
) + tuple(
    PublishedRow(system, {"accuracy": accuracy}, "Qilin-Med (arXiv:2310.09089), abstract")
    for system, accuracy in (
        ("Qilin-Med RAG", 42.8), ("Qilin-Med SFT", 40.0), ("Qilin-Med CPT", 38.4), ("Baichuan-7B", 33.5),
    )
)  # fmt: skip
HUATUO_TABLE = "README of FreedomIntelligence/Huatuo-26M, knowledge benchmarks"


def huatuo_rows(discmed: float, huatuo: float, chatgpt: float) -> tuple[PublishedRow, ...]:
    return tuple(
        PublishedRow(system, {"accuracy": score}, HUATUO_TABLE)
        for system, score in (("ChatGPT", chatgpt), ("DISC-MedLLM", discmed), ("HuatuoGPT", huatuo))
    )


def exam(
    name: str,
    title: str,
    patterns: tuple[str, ...],
    multiple: bool | None,
    source: str,
    published: tuple[PublishedRow, ...] = (),
    default_file: str | None = None,
    **more: Any,
) -> Task:
    return Task(
        name=name,
        title=title,
        version=VERSION,
        parse=lambda row: [parse_choice(row, multiple)],
        ask=ask_choice,
        judge=judge_choice,
        summarise=summarise,
        headline="accuracy",
        modes=MODES,
        candidates=choice_candidates,
        choose=choose_letters,
        default_file=default_file,
        patterns=patterns,
        published=published,
        source=source,
        **more,
    )


EXAM = exam(
    "exam", "Own exam questions in CMExam's form", (), None, "written for this project", default_file="exam.csv"
)
CMEXAM = exam(
    "cmexam",
    "CMExam",
    ("*cmexam*",),
    None,
    "github.com/williamliujl/CMExam; Apache-2.0 file, README: academic use",
    CMEXAM_ROWS,
)
CMB = exam("cmb", "CMB-Exam", ("*cmb*",), None, "FreedomIntelligence/CMB; Apache-2.0", huatuo_rows(37.51, 28.81, 43.26))
CEVAL = exam(
    "ceval",
    "C-Eval, medical subjects",
    tuple(f"{subject}*" for subject in CEVAL_SUBJECTS),
    False,
    "ceval/ceval-exam; CC BY-NC-SA 4.0",
    huatuo_rows(40.07, 36.53, 48.80),
    splits=("val", "dev"),  # its test set has no answers
)
CMMLU = exam(
    "cmmlu",
    "CMMLU, medical subjects",
    tuple(f"{subject}*" for subject in CMMLU_SUBJECTS),
    False,
    "haonan-li/CMMLU; CC BY-NC-SA 4.0",
    huatuo_rows(38.73, 33.23, 50.37),
)
# not CMtMedQA, a set of dialogues
MEDQA = exam("medqa", "MedQA", ("medqa*", "*[!a-z]medqa*"), None, "jind11/MedQA; MIT")
GENERAL_QUESTIONS = exam(
    "general_questions",
    "Non-medical questions (forgetting meter)",
    (),
    False,
    "written for this project",
    default_file="general_questions.csv",
)
EXAMS = (EXAM, CMEXAM, CMB, CEVAL, CMMLU, MEDQA, GENERAL_QUESTIONS)

"""Benchmarks: what is asked, what is right, and how an answer is scored. One small module for each."""

from suwen.benchmarks.cmexam_official import CMEXAM_OFFICIAL
from suwen.benchmarks.exams import EXAMS
from suwen.benchmarks.facts import FACTS
from suwen.benchmarks.free_text import TEXTS
from suwen.benchmarks.general_text import GENERAL_TEXT
from suwen.benchmarks.injection import APART, INJECTION, kind_of
from suwen.benchmarks.terms import TERMS

TASKS = {task.name: task for task in (*EXAMS, CMEXAM_OFFICIAL, *TEXTS, *TERMS, FACTS, *INJECTION, GENERAL_TEXT)}
# Names that stand for several tasks
TASK_SETS = {
    "own": tuple(name for name, task in TASKS.items() if task.default_file),
    "injection": tuple(task.name for task in INJECTION if kind_of(task.name) not in APART),
    **{kind: tuple(task.name for task in INJECTION if kind_of(task.name) == kind) for kind in APART},
}

"""What a knowledge base is worth to a model: is the right document found, and what do answers gain from it?

Each question names its document. It is asked four times: closed book, with the passages that retrieval finds, with a
passage of the right document (an upper bound), and with the best passage of another document (how far does the model
follow what is wrong?). All share the prompt of grounding.py. Answers are kept as they come, in answers/ of the output
folder: an evaluation that was cut off goes on with the questions that are left.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from suwen.benchmarks.task import lower_keys, rate, text_of
from suwen.benchmarks.terms import named, normalise_term, term_list
from suwen.formats import BadRow
from suwen.prompts import AnswerFile, run_difference, set_aside, with_system_prompt
from suwen.readers import Refusal, find_encoding, read_records
from suwen.records import write_json
from suwen.retrieval.grounding import check_citations, find_passages, with_passages
from suwen.retrieval.passages import Passage
from suwen.retrieval.report import write_retrieval_report
from suwen.retrieval.search import CANDIDATES, KnowledgeBase
from suwen.statistics import compare_correct, holm, verdict

DEPTHS = (1, 3, 5, 10)
CONDITIONS = ("closed book", "retrieved", "gold passage", "wrong passage")
COMPARED = (("closed book", "retrieved"), ("retrieved", "gold passage"), ("closed book", "wrong passage"))
DOCUMENT_KEYS = ("document", "title", "文档", "标题")
Ask = Callable[[dict[int, list[dict]], int], Iterator[tuple[int, dict[str, Any]]]]


@dataclass(frozen=True)
class Question:
    text: str
    answers: tuple[str, ...]  # wordings, of which an answer must name one; empty: only retrieval is scored
    document: str  # title of the right document, or its file
    where: str


def read_questions(path: str) -> list[Question]:
    """Rows of {"question", "document" (title or file), "answer" (one wording or a list, may be left out)}.

    Raises:
        ValueError: the first row without a question or a document, by file and line.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"--data_file: found no file {path}, expected questions with their documents")
    questions = []
    for record in read_records(file, find_encoding(file)):
        if isinstance(record, Refusal):
            raise ValueError(record.message)
        where, row = record
        fields = lower_keys(row if isinstance(row, dict) else {})
        try:
            text = text_of(fields, ("question", "问题", "问"), "no question")
            document = text_of(fields, DOCUMENT_KEYS, "no document")
        except BadRow as error:
            raise ValueError(f"{where}: {error}") from None
        answers = term_list(fields.get("answer") or fields.get("answers") or fields.get("答案"))
        questions.append(Question(text, tuple(answers), document, where))
    if not questions:
        raise ValueError(f"--data_file: found no questions in {path}")
    return questions


def names_of(passage: Passage) -> set[str]:
    """What a question may call the document of a passage: its title, or its file with or without folder and ending."""
    file = Path(passage.source.split(", ")[0])
    return {passage.title, passage.source, str(file), file.name, file.stem}


def is_of(passage: Passage, question: Question, right: Passage) -> bool:
    """Whether a passage is of the question's document, or says the same as its passage word for word."""
    return passage.sha256 == right.sha256 or question.document in names_of(passage)


def gold_passages(knowledge: KnowledgeBase, questions: Sequence[Question]) -> list[Passage]:
    """A passage of the right document for each question: one that holds the answer, else the one that fits it best.

    Raises:
        ValueError: the index has no such document.
    """
    wanted: dict[str, list[Passage]] = {question.document: [] for question in questions}
    for row in range(len(knowledge)):
        passage = knowledge.store[row]
        for document in names_of(passage) & wanted.keys():
            wanted[document].append(passage)
    found = []
    for question in questions:
        own = wanted[question.document]
        if not own:
            raise ValueError(f"{question.where}: document {question.document!r} is not in the index")
        pairs = {question.text[at : at + 2] for at in range(len(question.text) - 1)}
        found.append(
            max(
                own,
                key=lambda p, q=question, pairs=pairs: (  # type: ignore[misc]
                    is_named(q.answers, p.text), sum(pair in p.titled for pair in pairs)
                ),
            )
        )  # fmt: skip
    return found


def is_named(answers: Sequence[str], text: str) -> bool:
    return any(named(answer, normalise_term(text)) for answer in answers)


def evaluate_retrieval(
    knowledge: KnowledgeBase,
    questions: Sequence[Question],
    ask: Ask,
    max_new_tokens: int,
    output_dir: Path,
    identity: dict[str, Any],
    system_prompt: str = "",
) -> dict[str, Any]:
    """Score retrieval and the answers of all conditions.

    Writes retrieval.json, retrieval_records.jsonl and report.html.

    Args:
        identity: what answers, as far as answers depend on it; answers of another are moved aside.

    Returns:
        {"retrieval": recall at each depth and MRR, "answers": condition -> accuracy and citations, "compared":
        conditions against each other, none where no question brings an answer}, percentages.
    """
    gold = gold_passages(knowledge, questions)
    records: list[dict[str, Any]] = []
    asked: dict[str, dict[int, list[dict]]] = {condition: {} for condition in CONDITIONS}
    shown: dict[tuple[str, int], list[Passage]] = {}
    for index, (question, right) in enumerate(zip(questions, gold, strict=True)):
        messages = with_system_prompt([{"role": "user", "content": question.text}], system_prompt)
        ranked = [hit.passage for hit in knowledge.search(question.text, CANDIDATES)]
        own = [is_of(passage, question, right) for passage in ranked]
        rank = own.index(True) + 1 if True in own else None
        other = next((passage for passage, is_own in zip(ranked, own, strict=True) if not is_own), None)
        found = [hit.passage for hit in find_passages(knowledge, messages)]
        given = {"closed book": [], "retrieved": found, "gold passage": [right], "wrong passage": [other] * bool(other)}
        record = {"index": index, "question": question.text, "answers": list(question.answers)}
        records.append(record | {"document": question.document, "rank": rank})
        for condition in CONDITIONS:
            passages: list[Passage] = given[condition]  # type: ignore[assignment]
            shown[condition, index] = passages
            if question.answers and (passages or condition == "closed book"):
                asked[condition][index] = with_passages(messages, passages) if passages else messages
    ranks = [record["rank"] for record in records]
    n = len(ranks)
    retrieval: dict[str, Any] = {
        f"recall@{depth}": rate(sum(rank is not None and rank <= depth for rank in ranks), n) for depth in DEPTHS
    }
    retrieval["MRR"] = sum(1 / rank for rank in ranks if rank) / n
    retrieval["given nothing"] = sum(not shown["retrieved", index] for index in range(n))
    answers = {}
    for condition in CONDITIONS:
        replies = collect_answers(condition, asked[condition], ask, max_new_tokens, output_dir / "answers", identity)
        answers[condition] = score_answers(condition, replies, questions, gold, shown, records)
    results = {"n": n, "retrieval": retrieval, "answers": answers, "compared": compare_conditions(records)}
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / "retrieval.json", results)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (output_dir / "retrieval_records.jsonl").write_text(lines, encoding="utf-8")
    write_retrieval_report(output_dir / "report.html", results, records, identity)
    return results


def collect_answers(
    condition: str,
    conversations: dict[int, list[dict]],
    ask: Ask,
    max_new_tokens: int,
    folder: Path,
    identity: dict[str, Any],
) -> dict[int, dict[str, Any]]:
    """The answers of one condition, those that an earlier run left included."""
    asked = hashlib.sha256(json.dumps(sorted(conversations.items())).encode()).hexdigest()
    run = identity | {"conversations": asked, "max_new_tokens": max_new_tokens}
    path = folder / f"{condition.replace(' ', '_')}.jsonl"
    if path.exists() and (difference := run_difference(path, run)):
        print(f"{condition}: earlier answers moved to {set_aside([path], folder)} ({difference})", flush=True)
    # Named by their place among the questions; a condition need not ask all of them
    output = AnswerFile(path, max(conversations, default=-1) + 1, run)
    left = {index: messages for index, messages in conversations.items() if index not in output.done}
    done = len(conversations) - len(left)
    with tqdm(total=len(conversations), initial=done, desc=condition, unit=" questions", leave=False) as progress:
        for index, reply in ask(left, max_new_tokens):
            output.append([{"index": index, **reply}])
            progress.update()
    output.finish()
    return {row.pop("index"): row for row in map(json.loads, path.read_bytes().splitlines())}


def score_answers(
    condition: str,
    replies: dict[int, dict[str, Any]],
    questions: Sequence[Question],
    gold: Sequence[Passage],
    shown: dict[tuple[str, int], list[Passage]],
    records: list[dict[str, Any]],
) -> dict[str, Any]:
    """Accuracy over all questions that have an answer, and what the citations are worth; fills the records."""
    right = cited = precise = broken = 0
    for index, reply in replies.items():
        text, passages = reply["response"], shown[condition, index]
        correct = is_named(questions[index].answers, text)
        citations = check_citations(text, passages)
        good = [
            number
            for number in citations.cited
            if is_of(passages[number - 1], questions[index], gold[index]) and number not in citations.unsupported
        ]
        right, cited, precise = right + correct, cited + len(citations.cited), precise + len(good)
        broken += len(citations.unknown)
        records[index][condition] = {"response": text, "correct": correct, "cited": list(citations.cited)}
    with_answer = sum(bool(question.answers) for question in questions)
    within = sum(any(is_named(questions[index].answers, p.text) for p in shown[condition, index]) for index in replies)
    return {
        "accuracy": rate(right, with_answer),
        "not asked": with_answer - len(replies),  # nothing relevant was found: no answer
        "answer in passages": rate(within, with_answer),
        "citation precision": rate(precise, cited + broken),
    }


def compare_conditions(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What passages change, on the questions that bring an answer; one that was not asked is not right."""
    answered = [record for record in records if record["answers"]]
    rows: list[dict[str, Any]] = []
    for first, second in COMPARED if answered else ():
        a, b = ([bool(record.get(name, {}).get("correct")) for record in answered] for name in (first, second))
        difference = compare_correct(a, b)
        value, low, high = (100 * x for x in difference[:3])
        gained = sum(y and not x for x, y in zip(a, b, strict=True))
        lost = sum(x and not y for x, y in zip(a, b, strict=True))
        rows.append({"first": first, "second": second, "difference": value, "low": low, "high": high})
        rows[-1] |= {"gained": gained, "lost": lost, "p": difference.p}
    for row, corrected in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row |= {"p_holm": corrected, "verdict": verdict(row["difference"], corrected)}
    return rows

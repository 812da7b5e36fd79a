"""Retrieval and answers from passages, scored against numbers that can be counted by hand."""

import json

import pytest
from tiny import tiny_model, tiny_tokenizer

import evaluation
from suwen.retrieval.evaluation import evaluate_retrieval, gold_passages, read_questions
from suwen.retrieval.index import build_index
from suwen.retrieval.report import format_retrieval
from suwen.retrieval.search import KnowledgeBase
from template import TEMPLATES

LEAFLETS = {
    "布洛芬": "布洛芬用于缓解疼痛。孕晚期禁用布洛芬。",
    "蒙脱石散": "蒙脱石散用于成人及儿童急、慢性腹泻。",
    "华法林": "华法林用于防止血栓。服用华法林应少吃菠菜。",
}
ROWS = [
    {"question": "布洛芬何时禁用？", "answer": "孕晚期", "document": "布洛芬"},
    {"question": "蒙脱石散用于什么病？", "answer": ["腹泻"], "document": "蒙脱石散.txt"},
    {"question": "服用华法林应少吃什么？", "answer": "菠菜", "document": "华法林"},
    {
        "question": "孕晚期禁用布洛芬吗？",
        "document": "华法林",
    },  # retrieval finds another: the wrong document on purpose
]


@pytest.fixture
def index(tmp_path):
    papers = tmp_path / "papers"
    papers.mkdir()
    for name, content in LEAFLETS.items():
        (papers / f"{name}.txt").write_text(f"{name}\n{content}\n", encoding="utf-8")
    build_index([str(papers)], str(tmp_path / "index"))
    return str(tmp_path / "index")


@pytest.fixture
def questions(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    return str(file)


def reader(conversations, max_new_tokens):
    """Repeats the first passage and cites it; knows nothing without one."""
    for index, messages in conversations.items():
        _, block, rest = messages[-1]["content"].partition("[1] ")
        yield index, {"response": rest.split("\n</资料>")[0].split("\n[2]")[0] + "[1]" if block else "不知道"}


def test_conditions_stand_side_by_side_and_count_as_by_hand(index, questions, tmp_path):
    knowledge = KnowledgeBase(index)
    asked = read_questions(questions)
    assert [passage.title for passage in gold_passages(knowledge, asked)] == ["布洛芬", "蒙脱石散", "华法林", "华法林"]
    results = evaluate_retrieval(knowledge, asked, reader, 32, tmp_path / "eval", {"model": "reader"})
    assert results["retrieval"]["recall@1"]["value"] == 75  # three of four
    first = json.loads((tmp_path / "eval" / "retrieval_records.jsonl").read_text(encoding="utf-8").splitlines()[3])
    rank = first["rank"]
    assert results["retrieval"]["MRR"] == pytest.approx((3 + (1 / rank if rank else 0)) / 4)
    accuracy = {name: scores["accuracy"]["value"] for name, scores in results["answers"].items()}
    assert accuracy["closed book"] == 0 and accuracy["gold passage"] == accuracy["retrieved"] == 100
    assert accuracy["wrong passage"] == 0
    precision = {name: scores["citation precision"] for name, scores in results["answers"].items()}
    assert precision["gold passage"]["value"] == 100 and precision["gold passage"]["n"] == 3
    assert precision["closed book"]["n"] == 0 and precision["wrong passage"]["value"] == 0
    within = {name: scores["answer in passages"]["value"] for name, scores in results["answers"].items()}
    assert within == {"closed book": 0, "retrieved": 100, "gold passage": 100, "wrong passage": 0}
    changes = [(row["first"], row["second"], row["gained"], row["lost"], row["p"]) for row in results["compared"]]
    assert changes == [  # of three questions; three coins on one side: 2 / 8
        ("closed book", "retrieved", 3, 0, 0.25),
        ("retrieved", "gold passage", 0, 0, 1),
        ("closed book", "wrong passage", 0, 0, 1),
    ]
    assert results["compared"][0]["p_holm"] == 0.75 and results["compared"][0]["verdict"] == "same"
    assert "recall@5" in format_retrieval(results) and "closed book -> retrieved" in format_retrieval(results)
    page = (tmp_path / "eval" / "report.html").read_text(encoding="utf-8")
    assert "closed book → retrieved" in page and "http" not in page


def test_the_page_of_retrieval_shows_what_went_wrong_and_nothing_runs_in_it(index, questions, tmp_path):
    def liar(conversations, max_new_tokens):
        for index, messages in conversations.items():
            yield (
                index,
                {"response": "<script>菠菜</script>" if "</资料>" not in messages[-1]["content"] else "豆腐[9]"},
            )

    results = evaluate_retrieval(KnowledgeBase(index), read_questions(questions), liar, 32, tmp_path, {"model": "liar"})
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "right closed book, wrong with passages: 1 question<" in page and "豆腐[9]" in page
    assert "<script>" not in page and "&lt;script&gt;菠菜" in page
    assert results["answers"]["retrieved"]["citation precision"]["value"] == 0


def test_an_evaluation_that_was_cut_off_asks_only_what_is_left(index, questions, tmp_path, capsys):
    knowledge, asked, folder = KnowledgeBase(index), read_questions(questions), tmp_path / "eval"
    whole = evaluate_retrieval(knowledge, asked, reader, 32, tmp_path / "whole", {"model": "reader"}, "你是药师")
    counts: list[int] = []

    def cut_off(conversations, max_new_tokens):
        for done, answer in enumerate(reader(conversations, max_new_tokens)):
            if len(counts) == 1 and done == 1:
                raise KeyboardInterrupt
            yield answer
        counts.append(len(conversations))

    def counting(conversations, max_new_tokens):
        counts.append(len(conversations))
        assert all(messages[0] == {"role": "system", "content": "你是药师"} for messages in conversations.values())
        return reader(conversations, max_new_tokens)

    with pytest.raises(KeyboardInterrupt):  # closed book is done, and one of the retrieved
        evaluate_retrieval(knowledge, asked, cut_off, 32, folder, {"model": "reader"}, "你是药师")
    with open(folder / "answers" / "retrieved.jsonl", "a", encoding="utf-8") as stream:
        stream.write('{"index": 1, "resp')  # and half a line
    assert counts == [3]
    again = evaluate_retrieval(knowledge, asked, counting, 32, folder, {"model": "reader"}, "你是药师")
    assert counts == [3, 0, 2, 3, 1] and again == whole
    records = "retrieval_records.jsonl"
    assert (folder / records).read_bytes() == (tmp_path / "whole" / records).read_bytes()
    evaluate_retrieval(knowledge, asked, counting, 32, folder, {"model": "another"}, "你是药师")
    assert counts[5:] == [3, 3, 3, 1] and "earlier answers moved to" in capsys.readouterr().out
    assert (folder / "answers" / "earlier-1" / "closed_book.jsonl").is_file()


def test_questions_without_answers_score_retrieval_alone(index, tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question": "布洛芬何时禁用？", "document": "布洛芬"}\n', encoding="utf-8")
    results = evaluate_retrieval(
        KnowledgeBase(index), read_questions(str(file)), reader, 32, tmp_path / "eval", {"model": "reader"}
    )
    assert results["retrieval"]["recall@1"]["value"] == 100 and results["compared"] == []
    for shown in (format_retrieval(results), (tmp_path / "eval" / "report.html").read_text(encoding="utf-8")):
        assert "only retrieval is scored" in shown and "closed book" not in shown


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "问"}, "line 1.*document"),
        ({"document": "布洛芬"}, "line 1.*question"),
        ({"question": "问", "document": "没有这个"}, "'没有这个' is not in the index"),
    ],
)
def test_questions_without_their_document_are_refused(row, message, index, tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        gold_passages(KnowledgeBase(index), read_questions(str(file)))


def test_the_command_needs_questions(index):
    with pytest.raises(ValueError, match="--knowledge_index: needs --data_file"):
        evaluation.parse_arguments(["--knowledge_index", index])


@pytest.mark.training
def test_the_command_evaluates_a_model(index, questions, tmp_path, capsys):
    chatml = TEMPLATES["chatml"]
    tokenizer = tiny_tokenizer(chatml.special_tokens, chat_template=chatml.jinja)
    tokenizer.pad_token = tokenizer.eos_token
    tiny_model(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = ["--base_model", tmp_path / "model", "--use_cpu", "--knowledge_index", index, "--data_file", questions]
    words += ["--output_dir", tmp_path / "eval", "--max_new_tokens", "8"]
    evaluation.main(list(map(str, words)))
    printed = capsys.readouterr().out
    assert "recall@1" in printed and "wrong passage" in printed
    assert json.loads((tmp_path / "eval" / "retrieval.json").read_text(encoding="utf-8"))["n"] == 4

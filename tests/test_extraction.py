"""Which letters an answer chooses, and why."""

import pytest

from suwen.benchmarks.extraction import extract_choice

OPTIONS = {"A": "原发病", "B": "B超检查", "C": "出血量", "D": "在胃内停留时间", "E": "以上均非"}

CASES = [
    # declared
    ("答案：C", "C", "declared"),
    ("答案:ABD", "ABD", "declared"),
    ("**答案：** A、B", "AB", "declared"),
    ("答案是Ｃ。", "C", "declared"),
    ("正确答案为（D）在胃内停留时间", "D", "declared"),
    ("本题的正确选项是 C", "C", "declared"),
    ("因此选C。", "C", "declared"),
    ("故选 B, D", "BD", "declared"),
    ("应选择E", "E", "declared"),
    ("选项A错误，选项B错误，故本题选C", "C", "declared"),
    ("答案：A\n解释：出血部位（B错），CT可见，所以不选C。", "A", "declared"),
    ("先看选项，初步答案是A。再想一想，答案应该是C", "C", "declared"),
    ("答案：C\n因此故选D", "C", "declared"),  # 答案 goes before 选
    ("The correct answer is (C).", "C", "declared"),
    ("Answer: b", "B", "declared"),
    ("$\\boxed{C}$", "C", "declared"),
    ("\\boxed{\\text{AC}}", "AC", "declared"),
    ("答案：DBA", "ABD", "declared"),
    ("答案：A A", "A", "declared"),
    ("答案：A B超检查不能说明", "A", "declared"),
    ("答案：B B超检查", "B", "declared"),
    ("答案：BB超检查", "B", "declared"),
    ("答案：A原发病", "A", "declared"),
    ("正确的是A", "A", "declared"),
    ("C是正确的", "C", "declared"),
    ("答案：A和C", "AC", "declared"),
    # nothing but letters, a line that repeats the option, one letter alone
    ("C", "C", "single_letter"),
    (" c ", "", "none"),
    ("(C)", "C", "single_letter"),
    ("ABD", "ABD", "single_letter"),
    ("A、B、D。", "ABD", "single_letter"),
    ("C. 出血量", "C", "single_letter"),
    ("C 出血量，因为出血多则呕血", "C", "single_letter"),
    ("A. 原发病\nC. 出血量", "AC", "single_letter"),
    ("我认为 C ，理由如下", "C", "single_letter"),
    # the text of one option
    ("取决于出血量的多少", "C", "option_text"),
    ("首先做Ｂ超检查", "B", "option_text"),
    # nothing
    ("", "", "none"),
    ("不知道", "", "none"),
    ("患者应做CT，补充维生素C和维生素D", "", "none"),
    ("答案：CT", "", "none"),
    ("答案：DNA检测", "", "none"),
    ("答案：B超", "", "none"),
    ("答案不是A", "", "none"),
    ("不选A", "", "none"),
    ("原发病或出血量", "", "none"),
    ("A. 原发病\nB. B超检查\nC. 出血量\nD. 在胃内停留时间\nE. 以上均非", "", "none"),
    ("A 或 C", "", "none"),
    ("答案：F", "", "none"),
    ("可选A或B作为备选项C", "", "none"),
]


@pytest.mark.parametrize("answer, letters, reason", CASES, ids=[repr(answer)[:40] for answer, *_ in CASES])
def test_letters_and_their_reason(answer, letters, reason):
    assert extract_choice(answer, OPTIONS) == (letters, reason)


def test_a_longer_option_text_wins_over_the_one_inside_it():
    options = {"A": "肾炎", "B": "慢性肾炎", "C": "肾盂肾炎"}
    assert extract_choice("考虑慢性肾炎", options) == ("B", "option_text")
    assert extract_choice("考虑肾炎", options) == ("A", "option_text")
    assert extract_choice("慢性肾炎，不是肾盂肾炎", options) == ("", "none")


def test_letters_are_checked_against_the_options_of_the_question():
    four = {letter: text for letter, text in OPTIONS.items() if letter != "E"}
    assert extract_choice("答案：E", four) == ("", "none")
    assert extract_choice("E", four) == ("", "none")

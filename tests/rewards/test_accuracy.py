"""Answer accuracy: what counts as the answer, what is equal, and what happens when math-verify hangs."""

import json
import threading
import time

import pytest
from trl.rewards import accuracy_reward as trl_accuracy_reward

from grpo_trl.rewards import AccuracyReward, LengthPenalty, accuracy, final_answer, reasoning_accuracy

GOLD = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nShe sold 48+24 = <<48+24=72>>72 clips.\n#### 72"

RIGHT = [
    "72",
    "#### 72",
    "#### $72",
    "\\boxed{72}",
    "$72",
    "$72$",
    "72.0",
    "**72**",
    "<answer>72</answer>",
    "<answer>\\boxed{72}</answer>",
    "<think>5 + 7 = 12</think> 72.",
    "She sold 72 clips",
    "Ans: 72",
    "So, 72",
    "it's 72",
    "72 km/h",
    "48 in April and 24 in May, so 72",
    "They cost $48 and $24, so $72.",
    "71? No. \\boxed{71} is wrong: \\boxed{72}",
    "#### 1. April\n48\n#### 2. May\n24, so the answer is 72",
    "#### 72\n\nQuestion: next 5",
]
WRONG = [
    "71",
    "#### 71",
    "\\boxed{71}",
    "",
    "I do not know",
    "72 or 71",
    "<think>72</think>",
    "\\boxed{72} \\boxed{71}",
]


def test_gsm8k_answers_in_every_form():
    assert accuracy(RIGHT, answer=[GOLD] * len(RIGHT)) == [1.0] * len(RIGHT)
    assert accuracy(WRONG, answer=[GOLD] * len(WRONG)) == [0.0] * len(WRONG)
    conversational = [[{"role": "assistant", "content": text}] for text in RIGHT + WRONG]
    expected = [1.0] * len(RIGHT) + [0.0] * len(WRONG)
    assert accuracy(conversational, solution=[GOLD] * len(conversational)) == expected


def test_trl_gives_zero_or_raises_where_ours_is_right():
    for text in ("72", "#### 72"):
        assert trl_accuracy_reward([[{"role": "assistant", "content": text}]], ["72"]) == [0.0]
        assert accuracy([[{"role": "assistant", "content": text}]], solution=["72"]) == [1.0]
        with pytest.raises(TypeError):
            trl_accuracy_reward([text], ["72"])
        assert accuracy([text], solution=["72"]) == [1.0]


@pytest.mark.parametrize(
    ("gold", "completion", "expected"),
    [
        ("1,234", "1234", 1.0),
        ("25", "\\boxed{25cm^2}", 1.0),  # letters are units where the gold answer has none
        ("0.5", "<answer>0.5ml</answer>", 1.0),
        ("72", "#### 72USD", 1.0),
        ("12", "\\boxed{12\\,cm}", 1.0),
        ("12", "\\boxed{12 km^2}", 1.0),
        ("100", "\\boxed{\\$100USD}", 1.0),
        ("30", "<answer>$30/hr</answer>", 1.0),
        ("25", "\\boxed{26cm^2}", 0.0),
        ("0.75", "#### 3/4cm", 1.0),
        ("3", "\\boxed{3/4cm}", 0.0),
        ("1024", "\\boxed{2^{10}cm}", 1.0),
        ("2", "\\boxed{2^{10}cm}", 0.0),
        ("100", "\\boxed{10^2cm^2}", 1.0),
        ("5000", "<answer>5*10^3ml</answer>", 1.0),
        ("72", "\\boxed{72mi/h}", 1.0),
        ("1", "\\boxed{1-xy}", 0.0),
        ("1234", "#### $1,234.00", 1.0),
        ("\\frac{1}{3}", "1/3", 1.0),
        ("\\sqrt{2}", "It is $\\sqrt{2}$", 1.0),
        ("\\sqrt{2}", "\\sqrt{3}", 0.0),
        ("2^{10}", "1024", 1.0),
        ("2^{10}", "2", 0.0),
        ("(1, 2)", "\\boxed{(1,2)}", 1.0),
        ("(1, 2)", "\\boxed{(3,2)}", 0.0),
        ("[0, 1)", "\\boxed{(0, 1]}", 0.0),
        ("20%", "0.2", 1.0),
        ("72 dollars", "\\boxed{72}", 1.0),
        ("x+1", "\\boxed{1+x}", 1.0),
        ("-5", "5", 0.0),
        ("5", ".5", 0.0),
        (72, "72", 1.0),
        # a whole number in a column of floats, and one that Python writes with an exponent
        (72.0, "72", 1.0),
        (1e-05, "0.00001", 1.0),
        (1e-05, "\\boxed{e - 5}", 0.0),
        (1e16, "10^{16}", 1.0),
        # matrices and products of letters are formulas
        ("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", "\\boxed{\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}}", 1.0),
        ("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", "\\boxed{4}", 0.0),
        ("3abc - 1", "\\boxed{1}", 0.0),
        ("2xy+3", "\\boxed{3+2xy}", 1.0),
        ("2xy+3", "\\boxed{3}", 0.0),
        ("p - q", "\\boxed{p-q}", 1.0),
        ("x - y", "\\boxed{-y+x}", 1.0),
        ("x - y", "\\boxed{y-x}", 0.0),
        ("Coca-Cola", "coca-cola", 1.0),
        ("Coca-Cola", "Pepsi", 0.0),
        # a minus of typography
        ("-5", "The answer is \u22125.", 1.0),
        ("5", "The answer is \u22125.", 0.0),
        # not mathematical: the same text
        ("Paris", "The answer is Paris.", 1.0),
        ("Paris", "Lyon", 0.0),
        ("B", "(B)", 1.0),
        ("B", "\\boxed{\\textbf{(B)}}", 1.0),
        ("B", "\\boxed{\\mathrm{B}}", 1.0),
        ("B", "\\boxed{\\textbf{(C)}}", 0.0),
        ("A", "The answer is B", 0.0),
        ("blue", "\\boxed{\\text{blue}}", 1.0),
        # lists without spaces are lists, and thousands numbers, in equations too
        ("-2,1", "\\boxed{-2, 1}", 1.0),
        ("-2,1", "\\boxed{1,-2}", 1.0),
        ("-2,1", "\\boxed{-2.1}", 0.0),
        ("0,1", "\\boxed{10\\%}", 0.0),
        ("1,2,3", "\\boxed{1,2}", 0.0),
        ("1,3,5,7,9", "\\boxed{1,3,5,7}", 0.0),
        ("3, 5", "\\boxed{3,5}", 1.0),
        ("1500\\pi", "\\boxed{1,500\\pi}", 1.0),
        ("1500\\pi", "\\boxed{1{,}500\\pi}", 1.0),
        ("1,500", "\\boxed{\\frac{3,000}{2}}", 1.0),
        ("2000", "\\boxed{500+1,500}", 1.0),
        ("2000", "2*1,000", 1.0),
        ("7, 3,125", "\\boxed{7, 3,125}", 1.0),
        ("(3,125)", "\\boxed{3125}", 0.0),
        ("(3,125)", "\\boxed{( 3,125 )}", 1.0),
        ("[0,100)", "\\boxed{[ 0,100 )}", 1.0),
        ("(0,200)", "\\boxed{\\left( 0,200 \\right)}", 1.0),
        ("\\{120,360\\}", "\\boxed{\\left\\{ 120,360 \\right\\}}", 1.0),
        ("\\{1, 100, 200\\}", "\\boxed{\\{1, 100,200\\}}", 1.0),
        ("(0,100)\\cup(200,300)", "\\boxed{( 0,100 ) \\cup ( 200,300 )}", 1.0),
        ("1, 100, 200", "\\boxed{1, 100,200}", 1.0),
        ("10,000", "\\boxed{10000}", 1.0),
        ("1000", "#### x = 1,000", 1.0),
        ("1000", "<answer>$500 * 2 = $1,000</answer>", 1.0),
        ("1000", "#### $2,000 - $1,000 = $1,000", 1.0),
        ("1000", "\\boxed{x = 1{,}000}", 1.0),
        ("1000", "\\boxed{x = 1,001}", 0.0),
        # a number before brackets is a factor
        ("52", "\\boxed{2(26)=52}", 1.0),
        ("52", "<answer>50 + 2(1) = 52</answer>", 1.0),
        ("28", "\\boxed{2(26)}", 0.0),
        ("3", "\\boxed{\\log_2(8)}", 1.0),
        ("\\sin^2(3)", "\\boxed{\\sin^2 3}", 1.0),
        # points, intervals and sets are none of thousands
        ("(3, 125)", "\\boxed{(a,b)=(3,125)}", 1.0),
        ("\\{1, 100\\}", "\\boxed{S = \\{1,100\\}}", 1.0),
        ("[0,360)", "\\boxed{\\theta = [0,360)}", 1.0),
        # signs before blanks and currencies count
        ("5", "\\boxed{- 5}", 0.0),
        ("5", "\\boxed{- $5}", 0.0),
        ("-5", "\\boxed{-$5}", 1.0),
        ("-5", "\\boxed{- 5}", 1.0),
        ("-5", "\\boxed{$- 5$}", 1.0),
        ("-10", "#### -$10", 1.0),
        ("72", "\\boxed{\\text{72 clips}}", 1.0),
        ("72", "\\boxed{\\textbf{73 clips}}", 0.0),
        # letters between the marks of a formula
        ("C", "The answer is $C$.", 1.0),
        ("C", "The answer is \\(C\\).", 1.0),
        ("C", "\\boxed{$D$}", 0.0),
        ("even", "$\\text{even}$", 1.0),
        ("5", "- 5, I think", 0.0),
        ("-5", "- 5, I think", 1.0),
        ("-5", "\\boxed{\\text{-5 apples}}", 1.0),
        ("72", "\\boxed{\\text{$72 dollars}}", 1.0),
        ("72", "\\boxed{\\text{\\$72 dollars}}", 1.0),
        # what stands around a formula
        ("8", "**2^3**", 1.0),
        ("72", "**71 = 72**", 0.0),
        ("x+1", "1+x.", 1.0),
        ("72", "71 = 72.", 0.0),
        ("1,234", "1 234", 1.0),
        ("1234.5", "1 234.5", 1.0),
        ("3,125,7", "\\boxed{x=3,125,7}", 1.0),  # a list
        ("72", "\\boxed{72°}", 1.0),
        ("x=72", "\\boxed{36+36 km/h}", 1.0),
        ("x=72", "\\boxed{72points}", 1.0),
        ("x=72", "48+24\n=72", 1.0),
        # letters of a command, or of a list, are no symbols
        ("\\frac{3}{4}", "\\boxed{3/4cm^2}", 1.0),
        ("1 and 25", "\\boxed{1, 25cm^2}", 1.0),
        # no gold answer
        (None, "72", None),
        ("", "72", None),
    ],
)
def test_equality(gold, completion, expected):
    assert accuracy([completion], answer=[gold]) == [expected]


def test_a_column_may_be_called_self():
    assert accuracy(["72"], answer=["72"], **{"self": [1]}) == [1.0]
    assert reasoning_accuracy(["</think>72"], answer=["72"], **{"self": [1]}) == [1.0]
    assert LengthPenalty(10)(completion_ids=[[1]], **{"self": [1]}) == LengthPenalty(10)(completion_ids=[[1]])


def test_column_answer_is_read_before_solution_row_by_row():
    assert accuracy(["1", "2", "3"], answer=["1", None, None], solution=["9", "2", None]) == [1.0, 1.0, None]
    assert accuracy(["72"]) == [None]


def test_final_answer_takes_the_last_mark():
    assert final_answer("#### 5\n#### 72") == "72"
    assert final_answer("\\boxed{\\frac{1}{2}} trailing") == "\\frac{1}{2}"
    assert final_answer("\\boxed{1} and \\boxed{unfinished") == "1"
    assert final_answer("<answer>1</answer><answer> 2 </answer>") == "2"


def test_runs_in_any_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(accuracy(["0.50", "3"], answer=["1/2", "4"])))
    thread.start()
    thread.join()
    assert results == [[1.0, 0.0]]


def test_a_hanging_answer_counts_as_wrong_and_the_others_are_still_verified(caplog):
    reward = AccuracyReward(timeout=2.5)  # below math-verify's own 3 s, so that the process has to be killed
    try:
        assert reward(["0.50"], answer=["1/2"]) == [1.0]
        first = reward._verify.pid
        start = time.monotonic()
        assert reward(["\\boxed{9^{9^{9^{9}}}}", "7/2"], answer=["72", "3.5"]) == [0.0, 1.0]
        assert time.monotonic() - start < 20
        assert reward._verify.pid != first
        assert "counted as wrong" in caplog.text
    finally:
        reward.close()
    assert reward._verify.pid is None


def test_math_verify_stops_by_itself_without_losing_its_process():
    accuracy(["0.50"], answer=["1/2"])
    pid = accuracy._verify.pid
    assert accuracy(["\\boxed{9^{9^{9^{9}}}}"], answer=["72"]) == [0.0]
    assert accuracy._verify.pid == pid


def test_gsm8k_train_golds_verify_against_their_own_numbers(gsm8k):
    with open(gsm8k) as file:
        golds = [json.loads(line)["answer"] for line, _ in zip(file, range(300), strict=False)]
    numbers = [gold.rsplit("####", 1)[1].strip() for gold in golds]
    assert accuracy([f"So it is {number}." for number in numbers], answer=golds) == [1.0] * len(golds)
    shifted = numbers[1:] + numbers[:1]
    expected = [float(a.replace(",", "") == b.replace(",", "")) for a, b in zip(shifted, numbers, strict=True)]
    assert accuracy([f"So it is {number}." for number in shifted], answer=golds) == expected

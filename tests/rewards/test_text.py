"""What counts as the answer of a text, and that finding it takes linear time."""

import time

import numpy as np
import pytest
import torch

from grpo_trl.rewards import answer_format, exact_match, final_answer, think_format
from grpo_trl.rewards.text import (
    as_messages,
    completion_texts,
    gold_answers,
    normalize_text,
    reasoned_texts,
    stated_answer,
)


@pytest.mark.parametrize("mark", ["$", "\\(", "$a", "\\(a"])
def test_marks_of_formulas_are_found_in_linear_time(mark):
    start = time.perf_counter()
    normalize_text(mark * 50_000)
    assert time.perf_counter() - start < 2


def test_gold_answers_of_columns_that_hold_no_text():
    answers = [torch.tensor(72), np.float64(1.5), float("nan"), torch.tensor(float("nan")), None, 7]
    assert gold_answers(6, answers) == ["72", "1.5", None, None, None, "7"]
    assert gold_answers(1, [[{"role": "assistant", "content": "72"}]]) == ["72"]
    with pytest.raises(ValueError, match=r"got the list \['72', 'seventy-two'\]; give one answer"):
        gold_answers(1, [["72", "seventy-two"]])
    assert gold_answers(3, [" ", None, "1"], ["2", "3", "4"]) == ["2", "3", "1"]


def test_messages_without_a_role_and_parts_that_are_no_text():
    parts = [{"type": "thinking", "text": "hm"}, {"type": "text", "text": "72"}]
    assert completion_texts([[{"content": "72"}], [{"role": "assistant", "content": parts}]]) == ["72", "72"]


def test_all_messages_of_a_completion_are_kept():
    turns = [{"role": "assistant", "content": "2 + 2"}, {"role": "tool", "content": "4"}]
    assert as_messages(["72", turns]) == [[{"role": "assistant", "content": "72"}], turns]


def test_reasoning_that_was_parsed_is_put_back_into_its_tags():
    thought, ended = {"role": "assistant", "reasoning_content": "Why"}, "<think>\nWhy\n</think>\n\n"
    messages = {
        ended + "72": thought | {"content": "72"},
        ended + "73": {"role": "assistant", "thinking": "Why", "content": "73"},
        ended: thought | {"content": None, "tool_calls": [{"function": {"name": "add"}}]},
        "<think>\nWhy\n": thought | {"content": ""},  # cut off
    }
    assert reasoned_texts([[message] for message in messages.values()]) == list(messages)


def test_the_last_statement_of_an_answer_counts():
    assert stated_answer("The answer is 71\nNo. The answer: 72") == "72"
    assert stated_answer("\\boxed{72}, the answer is 71") == "72"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>1</answer> so <answer>2</answer>", "2"),
        ("<answer>1</answer> <answer>unfinished", "1"),
        ("<answer><answer>2</answer></answer>", "2"),
        ("</answer><answer>", "</answer><answer>"),
        ("\\boxed{1} \\fbox{2}", "2"),
        ("\\boxed{1} \\boxed{\\frac{1}{2}} \\boxed{unfinished", "\\frac{1}{2}"),
        ("\\boxed{1 \\boxed{2} 3}", "2"),
        ("} \\boxed{a{b}c} {", "a{b}c"),
        ("<answer>#### 3 \\boxed{4}</answer>", "4"),
        ("#### 5\n#### 72", "72"),
        ("#### 5\nmore\n#### 72\n\nQuestion: the next", "72"),
        ("#### 5 #### 72", "72"),
        ("#### 72\n####", "72"),
        ("#### $1,234.00\nso", "$1,234.00"),
        ("#### 2. Add the clips\nThere are 5", "#### 2. Add the clips\nThere are 5"),
        ("  72  ", "72"),
    ],
)
def test_the_last_mark_counts(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>I guess 72", ""),
        ("<think>24 + 48 = \\boxed{72}", ""),
        ("<think>71</think> 72? <think>hm 72", ""),
        ("<think>71</think>72", "72"),
        ("71</think>72", "72"),  # the template wrote <think> into the prompt
    ],
)
def test_reasoning_that_does_not_end_has_no_answer(text, answer):
    assert final_answer(text) == answer
    assert exact_match([text], answer=["72"]) == [float(answer == "72")]


LENGTH = 200_000
DEGENERATE = [
    "<answer>",
    "</answer><answer>",
    "<think>",
    "</think>",
    "<think></think><answer>",
    "\\boxed{",
    "\\boxed",
    "\\boxed ",
    "\\text{",
    "\\text ",
    "{",
    "}",
    "{}",
    "#### ",
    "####\n",
    "#### 1 ",
    "#### 1\n",
    "#### 1 a b\n",
    " ",
    "\n",
    "1",
    "1 ",
    "1,",
    "answer is ",
    "answer: ",
    "answer ",
    "answer:\n",
    "**",
    "(a",
]


def too_slow(function, text) -> bool:
    """Takes seconds of this process's own time: what is quadratic takes minutes for 200,000 characters."""
    start = time.process_time()
    function(text)
    return time.process_time() - start > 5


@pytest.mark.parametrize("part", DEGENERATE)
@pytest.mark.parametrize("ending", ["", "x y", "\n\n1 x\n", "</answer>", "}", "</think>"])
def test_parsing_is_linear(part, ending):
    text = part * (LENGTH // len(part)) + ending
    assert not too_slow(final_answer, text)
    assert not too_slow(stated_answer, text)
    assert not too_slow(normalize_text, text)
    assert not too_slow(lambda text: answer_format([text]), text)
    assert not too_slow(lambda text: think_format([text]), text)
    assert not too_slow(lambda text: exact_match([text], answer=["72"]), text)

"""Answers with which a policy could earn `accuracy` without knowing the answer, and those that must not suffer."""

import pytest

from grpo_trl.rewards import accuracy

GOLD = "She sold 48+24 = <<48+24=72>>72 clips.\n#### 72"
RIGHT = [
    "+72",
    "\\boxed{+72}",
    "\\boxed{x=72}",
    "\\boxed{x=y=72}",
    "\\boxed{f(2)=72}",
    "\\boxed{\\text{Total}=48+24=72}",
    "\\boxed{\\frac{144}{2}=72}",
    "48+24 = 72 clips",
    "It rose by 20%, so 72",
    "48 and 24, so 72",
    "72 clips in May",
]
WRONG = [
    "<think>I guess 72",
    "<think>48+24=72",
    "\\boxed{71=72}",
    "\\boxed{72=71}",
    "\\boxed{1=2=72}",
    "\\boxed{x=71=72}",
    "\\boxed{\\frac{142}{2}=72}",
    "71 = 72",
    "#### 71=72",
    "#### 48+23 = 72 clips",
    "#### 71 or 72",
    "#### 72 or 71",
    "#### 71, 72",
    "#### 71 and 72",
    "#### 71 or 72 clips",
    "71 or 72",
    "\\boxed{71 \\text{ or } 72}",
]


@pytest.mark.parametrize(("completions", "expected"), [(RIGHT, 1.0), (WRONG, 0.0)])
def test_verdicts(completions, expected):
    rewards = accuracy(completions, answer=[GOLD] * len(completions))
    assert {text: reward for text, reward in zip(completions, rewards, strict=True) if reward != expected} == {}


@pytest.mark.parametrize(
    ("gold", "completion", "expected"),
    [
        # a percentage is both of its readings
        ("20%", "20%", 1.0),
        ("20%", "20", 1.0),
        ("20%", "0.2", 1.0),
        ("20%", "30%", 0.0),
        ("0.2", "20%", 1.0),
        ("24", "24%", 1.0),
        ("24", "So it is 24 percent.", 1.0),
        ("24", "42%", 0.0),
        # lists
        ("1 and 3", "\\boxed{3, 1}", 1.0),
        ("3 or -2", "\\boxed{3 \\text{ or } -2}", 1.0),
        ("3 or -2", "3", 0.0),
        # a decimal may be rounded
        ("3.33", "\\boxed{\\frac{10}{3} = 3.33}", 1.0),
        ("3.4", "\\boxed{\\frac{10}{3} = 3.4}", 0.0),
        ("3.3", "\\boxed{\\frac{10}{3} = 3.3}", 0.0),  # but not to one
        # the gold answer is an equation itself
        ("x=72", "\\boxed{x=72}", 1.0),
        ("x=72", "72", 1.0),
        ("x=72", "\\boxed{71=72}", 0.0),
        ("y=2x+1", "\\boxed{y = 1+2x}", 1.0),
    ],
)
def test_what_the_gold_answer_allows(gold, completion, expected):
    assert accuracy([completion], answer=[gold]) == [expected]

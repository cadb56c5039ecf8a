"""TRL's reward functions by dotted path or as they are, on both data forms."""

import functools
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from trl.rewards import accuracy_reward, get_cosine_scaled_reward, get_soft_overlong_punishment

from grpo_trl.batch import Group, Prompt
from grpo_trl.rewards import RewardScorer, resolve_reward

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["<think>48 + 24</think>\\boxed{72}", "<think>hm</think>\\boxed{71}", "\\boxed{72}"]
EXPECTED = {"accuracy_reward": [1, 0, 1], "reasoning_accuracy_reward": [1, 0, 0], "think_format_reward": [1, 1, 0]}


def group(conversational: bool) -> Group:
    """One prompt and TEXTS, as plain text or as messages."""
    prompt = [{"role": "user", "content": "q"}] if conversational else "q"
    completions = [[{"role": "assistant", "content": text}] if conversational else text for text in TEXTS]
    example = {"prompt": prompt, "solution": "72"}
    return Group(Prompt([1], example, 0), [[1] * 90] * 3, [True] * 3, completions=completions)


@pytest.mark.parametrize("timeout", [None, 60])
def test_by_dotted_path(timeout):
    rewards = [resolve_reward(f"trl.rewards.{name}", max_completion_length=100) for name in EXPECTED]
    scorer = RewardScorer(rewards, timeout=timeout)
    try:
        for conversational in (False, True):
            assert scorer.score([group(conversational)]).T.tolist() == list(EXPECTED.values())
        assert scorer.names == list(EXPECTED)
    finally:
        scorer.close()


def test_a_process_of_its_own_loads_no_torch():
    code = "import pickle, sys; pickle.load(sys.stdin.buffer); print(*(m in sys.modules for m in sys.argv[1:]))"
    rewards = pickle.dumps([resolve_reward(f"trl.rewards.{name}", max_completion_length=100) for name in EXPECTED])
    command = [sys.executable, "-c", code, "trl.rewards", "torch"]
    child = subprocess.run(command, input=rewards, capture_output=True, check=True, cwd=ROOT)
    assert child.stdout.split() == [b"True", b"False"]


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (accuracy_reward, [1, 0, 1]),
        (functools.partial(accuracy_reward, log_extra=None), [1, 0, 1]),
        (get_cosine_scaled_reward(90), [0.5, -0.5, 0.5]),
        (get_soft_overlong_punishment(100, 20), [-0.5] * 3),
    ],
)
def test_as_they_are(reward, expected):
    adapted = resolve_reward(reward, max_completion_length=100)
    rows = {"completion_ids": [[1] * 90] * 3, "solution": ["72"] * 3}
    assert adapted(completions=TEXTS, **rows) == expected


def test_a_wrapper_of_ones_own_gets_what_the_dataset_has():
    @functools.wraps(accuracy_reward)
    def of_text(completions, **kwargs):
        return accuracy_reward([[{"role": "assistant", "content": text}] for text in completions], **kwargs)

    assert of_text.__module__.startswith("trl.rewards")
    assert resolve_reward(of_text, max_completion_length=100) is of_text
    assert RewardScorer([of_text]).score([group(False)])[:, 0].tolist() == [1, 0, 1]


def test_a_column_of_any_name():
    adapted = resolve_reward(accuracy_reward, max_completion_length=100)
    assert adapted(completions=TEXTS, solution=["72"] * 3, self=[1, 2, 3]) == [1, 0, 1]


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("get_soft_overlong_punishment", "use the registered name 'soft_overlong', or pass what it returns"),
        ("get_repetition_penalty_reward", "use the registered name 'repetition', or pass what it returns"),
        ("get_cosine_scaled_reward", r"none itself; pass what it returns, `get_cosine_scaled_reward\(...\)`"),
    ],
)
def test_what_makes_a_reward_function_is_refused(name, remedy):
    with pytest.raises(ValueError, match=rf"trl.rewards.{name} makes a reward function.*{remedy}"):
        resolve_reward(f"trl.rewards.{name}", max_completion_length=100)

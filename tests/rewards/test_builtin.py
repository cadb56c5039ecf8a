"""Format, length and repetition rewards, the registry."""

import functools
import re

import pytest
import trl

from grpo_trl.rewards import (
    REWARDS,
    accuracy,
    answer_format,
    completion_texts,
    exact_match,
    resolve_reward,
    think_format,
)
from grpo_trl.rewards.loading import is_reward_model
from grpo_trl.rewards.registry import TRL_NAMES, reward_name
from grpo_trl.rewards.text import normalize_text
from tests.rewards import reward_functions


def conversational(texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


def test_completion_texts_reads_strings_messages_parts_and_the_last_assistant_turn():
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    tool_turns = [
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "four"},
    ]
    assert completion_texts(["plain", parts, tool_turns, []]) == ["plain", "ab", "four", ""]


THINK = [
    ("<think>\nreason\n</think>\nanswer", 1.0),
    ("<think>reason answer", 0.0),
    ("answer", 0.0),
    ("<think>a<think>b</think>c", 0.0),
    ("x <think>a</think>b", 0.0),
]
ANSWER = [
    ("<think>reason</think><answer>72</answer>", 1.0),
    ("<think>\nreason\n</think>\n\n<answer>\n72\n</answer>\n", 1.0),
    ("<think>reason</think> so <answer>72</answer>", 0.0),
    ("<think>reason</think><answer>72</answer> done", 0.0),
    ("<think>a</think><answer>1</answer><answer>2</answer>", 0.0),
    ("<think>a</think><think>b</think><answer>1</answer>", 0.0),
    ("<think></think><answer>72</answer>", 0.0),
    ("<think>a</think><answer> </answer>", 0.0),
    ("<answer>72</answer>", 0.0),
]


@pytest.mark.parametrize(("reward", "cases"), [(think_format, THINK), (answer_format, ANSWER)])
def test_formats_on_both_data_forms(reward, cases):
    texts, expected = map(list, zip(*cases, strict=True))
    assert reward(texts) == expected
    assert reward(conversational(texts)) == expected


def test_exact_match():
    completions = ["Paris.", "The answer is  paris", "**Paris**", "Lyon", "I say Paris", "x", "x"]
    gold = ["Paris"] * 5 + [None, ""]
    assert exact_match(completions, answer=gold) == [1.0, 1.0, 1.0, 0.0, 0.0, None, None]
    assert exact_match(conversational(completions), solution=gold) == [1.0, 1.0, 1.0, 0.0, 0.0, None, None]
    assert exact_match(["1234"], answer=["1,234"]) == [0.0]


@pytest.mark.parametrize(("left", "right"), [("[0, 1)", "(0, 1]"), ("5!", "5"), (".5", "5"), ("-5", "5")])
def test_normalisation_keeps_what_changes_the_meaning(left, right):
    assert normalize_text(left) != normalize_text(right)


def test_soft_overlong_edges():
    reward = resolve_reward("soft_overlong", max_completion_length=100)  # L = 100, c = 20
    lengths = [0, 79, 80, 81, 90, 99, 100, 101]
    expected = [0.0, 0.0, 0.0, -0.05, -0.5, -0.95, -1.0, -1.0]
    assert reward(completion_ids=[[1] * length for length in lengths]) == expected


def test_soft_overlong_of_a_tiny_length_has_a_cache_of_one_token():
    reward = resolve_reward("soft_overlong", max_completion_length=3)
    assert reward(completion_ids=[[1] * length for length in (2, 3, 4)]) == [0.0, -1.0, -1.0]


def test_repetition():
    reward = resolve_reward("repetition", max_completion_length=8)
    # [5]*6 has four 3-grams, one of them distinct
    assert reward(completion_ids=[[1, 2, 3, 4], [5] * 6, [1]]) == [0.0, -0.75, 0.0]


def test_length():
    reward = resolve_reward("length", max_completion_length=8)
    assert reward(completion_ids=[[], [1] * 2, [1] * 8, [1] * 9]) == [0.0, -0.25, -1.0, -1.0]


@pytest.mark.parametrize("name", sorted(REWARDS))
def test_every_registered_reward_works_under_its_name_on_both_data_forms(name):
    reward = resolve_reward(name, max_completion_length=8)
    assert reward_name(reward) == name
    texts = ["72", "<think>a</think><answer>72</answer>"]
    rows = {"completion_ids": [[1], [1, 2]], "answer": ["72", "72"], "solution": ["72", "72"], "other": [1, 2]}
    rows |= {"trainer_state": None, "log_extra": None, "log_metric": None}
    plain = reward(prompts=["a", "b"], completions=texts, **rows)
    chat = [[{"role": "user", "content": "a"}]] * 2
    assert plain == reward(prompts=chat, completions=conversational(texts), **rows)
    assert len(plain) == 2 and all(isinstance(value, float) for value in plain)


def trls_registry():
    """The names of `reward_funcs` that TRL's own script knows: those in its help."""
    from trl.scripts.grpo import GRPOScriptArguments

    text = GRPOScriptArguments.__dataclass_fields__["reward_funcs"].metadata["help"]
    return set(re.findall(r"`([a-z_]+)`", text))


def test_every_name_of_trls_script_is_a_reward_of_ours():
    assert trls_registry() == set(TRL_NAMES) and set(TRL_NAMES.values()) <= set(REWARDS)
    for name, own in TRL_NAMES.items():
        assert not is_reward_model(name)
        assert reward_name(resolve_reward(name, max_completion_length=8)) == own


TEXTS = [
    r"<think>1/3?</think> \boxed{\frac{1}{3}}",
    r"<think>1/3?</think> \boxed{\frac{1}{2}}",
    r"\boxed{\frac{1}{3}}",
    r"<think>a</think>none",
]


@pytest.mark.parametrize("name", ["accuracy_reward", "reasoning_accuracy_reward", "think_format_reward"])
def test_rewards_under_trls_names_are_trls(name):
    theirs = getattr(trl.rewards, name)(conversational(TEXTS), solution=[r"$\frac{1}{3}$"] * len(TEXTS))
    ours = resolve_reward(name, max_completion_length=8)
    assert ours(completions=TEXTS, solution=[r"$\frac{1}{3}$"] * len(TEXTS)) == theirs
    assert len(set(theirs)) == 2  # not all the same


def test_reasoning_that_never_ends_has_no_answer_where_trl_reads_one():
    texts = [r"<think>so \boxed{\frac{1}{3}} and"]
    gold = {"solution": [r"$\frac{1}{3}$"]}
    assert trl.rewards.accuracy_reward(conversational(texts), **gold) == [1.0]
    assert accuracy(texts, **gold) == [0.0]


def test_soft_overlong_under_trls_name_is_trls_at_the_length_that_it_fixes():
    ids = [[1] * length for length in (0, 1023, 1024, 1025, 1152, 1280, 1281)]
    theirs = trl.rewards.get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256)
    ours = resolve_reward("get_soft_overlong_punishment", max_completion_length=1280)
    assert ours(completion_ids=ids) == theirs(completion_ids=ids)


def test_unfinished_reasoning_is_wrong_and_a_row_without_gold_answer_does_not_apply():
    reward = resolve_reward("reasoning_accuracy", max_completion_length=8)
    texts = ["<think>72", "<think>a</think>72", "72", "<think>a</think>72"]
    assert reward(completions=texts, answer=["72", "72", "72", None]) == [0.0, 1.0, 0.0, None]
    assert reward(completions=conversational(texts), solution=["72", "72", None, None]) == [0.0, 1.0, None, None]


def test_resolve_callable_and_dotted_paths():
    assert resolve_reward(reward_functions.tokens, max_completion_length=8) is reward_functions.tokens
    for path in ("tests.rewards.reward_functions.tokens", "tests.rewards.reward_functions:tokens"):
        assert resolve_reward(path, max_completion_length=8) is reward_functions.tokens


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("acuracy", ["'acuracy'", "accuracy, answer_format", "package.module.function", "RewardModel"]),
        ("org/some.model", ["RewardModel"]),
        ("no_such_module.f", ["no_such_module", "PYTHONPATH"]),
        ("tests.rewards.reward_functions.nothing", ["nothing"]),
        ("tests.rewards.reward_functions.NOT_A_FUNCTION", ["int"]),
        (3, ["int"]),
    ],
)
def test_resolve_refuses_with_a_remedy(spec, words):
    with pytest.raises(ValueError) as error:
        resolve_reward(spec, max_completion_length=8)
    for word in words:
        assert word in str(error.value)


def test_reward_name():
    assert reward_name(functools.partial(functools.partial(reward_functions.tokens, a=1), b=2)) == "tokens"
    assert reward_name(reward_functions.AsyncJudge()) == "AsyncJudge"


@pytest.mark.parametrize("content", ["def f(:", "raise OSError('no judge')", "import sys; sys.exit(3)"])
def test_a_module_that_fails_when_it_is_imported(tmp_path, monkeypatch, content):
    monkeypatch.syspath_prepend(tmp_path)
    name = f"broken_{abs(hash(content))}"
    (tmp_path / f"{name}.py").write_text(content)
    with pytest.raises(ValueError, match=rf"Reward '{name}\.f': its module {name} ends with .*(Syntax|OS|SystemE)"):
        resolve_reward(f"{name}.f", max_completion_length=8)

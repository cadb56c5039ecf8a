"""What the scorer says when a reward of any kind fails, and what it refuses."""

import asyncio
import math
import time

import pytest

from grpo_trl import GRPOConfig
from grpo_trl.batch import Group, Prompt
from grpo_trl.rewards import RewardModel, RewardScorer, check_rewards
from tests import tiny


def group(*completions) -> Group:
    ids = [[1] * max(1, len(completion)) for completion in completions]
    return Group(Prompt([1, 2], {"prompt": "question"}, 0), ids, [True] * len(ids), completions=list(completions))


@pytest.fixture
def score():
    """(reward functions, completions) -> rewards, by a scorer that is closed afterwards."""
    scorers = []

    def score(funcs, *completions, **options):
        scorers.append(RewardScorer(funcs))
        return scorers[-1].score([group(*completions)], **options)

    yield score
    for scorer in scorers:
        scorer.close()


def reward_model(seed=0, **kwargs) -> RewardModel:
    return RewardModel(tiny.tiny_reward_model(seed=seed), tiny.tiny_tokenizer(chat=False, pair=True), **kwargs)


# ---- The first failing row ----


async def judge(prompts, completions, log_metric=None, **kwargs):
    await asyncio.sleep(0.2)
    if log_metric is not None:
        log_metric("asked", len(prompts))
    if "bad" in completions:
        raise KeyError("no such key")
    return [1.0] * len(prompts)


def test_an_async_exception_names_the_first_failing_row(score):
    asked = []
    start = time.monotonic()
    with pytest.raises(
        RuntimeError, match=r"'judge' failed on row 7: KeyError.*'question'; completion: 'bad'"
    ) as error:
        score([judge], *["a"] * 7, "bad", "b", "bad", log_metric=lambda name, value: asked.append(value))
    assert isinstance(error.value.__cause__, KeyError)
    assert asked == []  # neither the call that fails nor the search for the row logs
    assert time.monotonic() - start < 1.2  # rows are tried together: one after the other, eight take 1.6 s


def test_the_search_for_the_row_has_the_time_out_too():
    async def hangs_alone(prompts, **kwargs):
        if len(prompts) > 1:
            raise KeyError("no such key")
        await asyncio.sleep(60)

    scorer = RewardScorer([hangs_alone], timeout=0.2)
    with pytest.raises(RuntimeError, match=r"'hangs_alone' failed on row 0: .*time-out of 0.2 s"):
        scorer.score([group("a", "b")])


def test_an_async_exception_of_no_single_row_says_so(score):
    async def only_together(prompts, **kwargs):
        if len(prompts) > 1:
            raise ArithmeticError("too many")
        return [1.0]

    with pytest.raises(RuntimeError, match=r"'only_together' failed on all rows together.*none of them.*too many"):
        score([only_together], "a", "b")


def test_a_reward_models_exception_names_the_first_failing_row(score):
    reward = reward_model()
    forward = reward.model.forward

    def fails_on_long_rows(input_ids, **kwargs):
        if input_ids.shape[1] > 40:
            raise RuntimeError("out of memory, say")
        return forward(input_ids=input_ids, **kwargs)

    reward.model.forward = fails_on_long_rows
    with pytest.raises(RuntimeError, match=r"'DebertaV2.*' failed on row 1: RuntimeError: out of memory.*'xxx"):
        score([reward], "a", "x" * 50, "b")


# ---- What is refused ----


@pytest.mark.parametrize("output", [{1.0, 2.0}, frozenset([1.0, 2.0]), {1.0: 1, 2.0: 2}])
def test_rewards_without_an_order_are_refused(score, output):
    def unordered(**kwargs):
        return output

    with pytest.raises(ValueError, match=r"'unordered' returned .* expected a list of 2"):
        score([unordered], "a", "b")


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf, "1"])
def test_weights_that_are_no_finite_number_are_refused(tmp_path, weight):
    args = GRPOConfig(str(tmp_path), use_cpu=True, report_to="none")
    args.reward_weights = [1.0, weight]  # GRPOConfig itself refuses it
    with pytest.raises(ValueError, match=r"reward_weights has \[.*\]; expected finite numbers"):
        check_rewards(["length", "repetition"], None, args)
    args.reward_weights = [1.0, 0]
    check_rewards(["length", "repetition"], None, args)
    args.reward_weights = [0.0, 0]
    with pytest.raises(ValueError, match="all 0: no completion would have a reward"):
        check_rewards(["length", "repetition"], None, args)


@pytest.mark.parametrize("wrap", [lambda given: given, lambda given: [given]])
def test_what_is_no_tokenizer_is_refused(tmp_path, wrap):
    args = GRPOConfig(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="reward_processing_classes has a object; expected tokenizers"):
        check_rewards(["length"], wrap(object()), args)


def test_checking_a_reward_does_not_close_it(tmp_path):
    class Client:
        """Opens what it needs when it is made, and is of no use after `close`."""

        is_open = True

        def __call__(self, completions, **kwargs):
            return [0.0] * len(completions)

        def close(self):
            self.is_open = False

    client = Client()
    check_rewards([client], None, GRPOConfig(str(tmp_path), use_cpu=True, report_to="none"))
    assert client.is_open


# ---- Two models of one name ----


def test_metrics_of_two_models_of_one_name_are_apart(score):
    metrics = {}
    short, whole = reward_model(max_length=8), reward_model(seed=1)
    score([short, whole], "abcdefghijkl", "abcdefghijkl", log_metric=metrics.__setitem__)
    name = type(short.model).__name__
    assert metrics == {f"rewards/{name}/truncated": 1.0, f"rewards/{name}_2/truncated": 0.0}
    assert RewardScorer([short, whole]).names == [name, f"{name}_2"]  # once more: the names stay

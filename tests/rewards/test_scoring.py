"""RewardScorer: what reaches the functions, what comes back, how errors and time-outs are told."""

import asyncio
import copy
import functools
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import TrainerState

from grpo_trl.batch import Group, Prompt
from grpo_trl.rewards import RewardScorer, accuracy, isolation
from grpo_trl.rewards.calls import LOGS_SENT
from grpo_trl.rewards.isolation import IsolatedFunction
from tests.rewards import reward_functions as functions

ROOT = Path(__file__).resolve().parent.parent.parent


def group(*completions, **columns):
    example = {"prompt": "question", **columns}
    ids = [[1] * len(completion) for completion in completions]
    return Group(Prompt([1, 2], example, 0), ids, [True] * len(ids), completions=list(completions))


@pytest.fixture
def make_scorer():
    scorers = []

    def make(*funcs, **kwargs):
        scorers.append(RewardScorer(list(funcs), **kwargs))
        return scorers[-1]

    yield make
    for scorer in scorers:
        scorer.close()


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_keyword_arguments_are_trls(make_scorer):
    seen = {}

    def spy(**kwargs):
        seen.update(kwargs)
        return [0.0] * len(kwargs["prompts"])

    state = object()
    first = group("a", "bb", answer="1", level=3, completion="x", completion_ids=[9])
    second = group("c", "d", answer="2", topic="t")
    make_scorer(spy).score([first, second], trainer_state=state)
    assert callable(seen.pop("log_extra")) and callable(seen.pop("log_metric"))
    assert seen == {
        "prompts": ["question"] * 4,
        "completions": ["a", "bb", "c", "d"],
        "completion_ids": [[1], [1, 1], [1], [1]],
        "answer": ["1", "1", "2", "2"],
        "level": [3, 3, None, None],
        "topic": [None, None, "t", "t"],
        "trainer_state": state,
    }


@pytest.mark.parametrize("overlap", [False, True])
def test_a_function_that_changes_what_it_is_given_changes_nothing_else(overlap):
    messages = [{"role": "user", "content": "q"}]
    seen = []

    def judge(prompts, completions, completion_ids, tests, **kwargs):
        for prompt, completion, ids, test in zip(prompts, completions, completion_ids, tests, strict=True):
            prompt.append(completion[0])
            test.append("x")
            completion[0]["content"] = completion[0]["content"].strip()
            ids.pop()
        seen.append([len(values[row]) for values in (prompts, tests, completion_ids) for row in range(2)])
        return [0.0] * len(prompts)

    given = Group(
        Prompt([1], {"prompt": messages, "tests": ["a"]}, 0), [[5, 6], [7, 8, 9]], [True, True],
        completions=[[{"role": "assistant", "content": f" {text} "}] for text in "ab"],
    )  # fmt: skip
    before = copy.deepcopy(given)
    scorer = RewardScorer([judge, judge], overlap=overlap, per_group=True)
    scorer.start(given)
    scorer.score([given])
    scorer.close()
    assert seen == [[2, 2, 2, 2, 1, 2]] * 2
    assert given == replace(before, prompt=given.prompt) and given.prompt == before.prompt


def test_a_batch_scores_like_its_groups(make_scorer):
    scorer = make_scorer(functions.tokens, functions.AsyncJudge(), accuracy)
    groups = [group("7", "8", "14/2", answer="7"), group("x", answer=None)]
    rewards = scorer.score(groups)
    assert rewards.dtype == torch.float64 and rewards.device.type == "cpu"
    expected = torch.tensor([[1.0, 2, 1], [1, 2, 0], [4, 2, 1], [1, 2, math.nan]], dtype=torch.float64)
    torch.testing.assert_close(rewards, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(torch.cat([scorer.score([one]) for one in groups]), rewards, equal_nan=True)
    assert scorer.names == ["tokens", "AsyncJudge", "accuracy"]


def test_names_are_given_or_numbered(make_scorer):
    assert make_scorer(functions.tokens, functions.tokens, functools.partial(functions.tokens)).names == [
        "tokens",
        "tokens_2",
        "tokens_3",
    ]
    assert make_scorer(functions.tokens, names=["n"]).names == ["n"]
    with pytest.raises(ValueError, match="2 names were given for 1"):
        make_scorer(functions.tokens, names=["a", "b"])
    with pytest.raises(ValueError, match="No reward function"):
        make_scorer()
    with pytest.raises(ValueError, match="positive"):
        make_scorer(functions.tokens, timeout=0)


def test_accepted_numbers(make_scorer):
    values = [
        True,
        np.float32(0.5),
        np.int64(2),
        torch.tensor(0.25),
        torch.tensor(2),
        Fraction(1, 2),
        np.bool_(True),
        None,
    ]
    rewards = make_scorer(lambda **_: values).score([group(*"abcdefgh")])[:, 0]
    assert rewards[:-1].tolist() == [1.0, 0.5, 2.0, 0.25, 2.0, 0.5, 1.0] and rewards[-1].isnan()
    for whole in (torch.tensor([1.0, 2.0]), torch.tensor([[1.0], [2.0]]), np.array([1.0, 2.0]), (1.0, 2.0)):
        assert make_scorer(lambda w=whole, **_: w).score([group("a", "b")])[:, 0].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ([1.0], ["1 rewards", "2 were expected"]),
        ([1.0, 2.0, 3.0], ["3 rewards", "2 were expected"]),
        (0.5, ["0.5", "float", "list of 2"]),
        (None, ["None", "list of 2"]),
        ([0.0, math.nan], ["nan", "row 1", "finite"]),
        ([math.inf, 0.0], ["inf", "row 0", "finite"]),
        ([0.0, 1e39], ["1e+39", "row 1", "finite"]),
        ([0.0, 10**400], ["row 1", "finite"]),
        ([0.0, torch.tensor(math.nan)], ["nan", "row 1"]),
        (["3", 0.0], ["'3'", "str", "row 0", "number"]),
        ([0.0, [1.0]], ["[1.0]", "list", "row 1"]),
        ([0.0, 1j], ["1j", "complex", "row 1"]),
    ],
)
def test_bad_outputs_name_function_row_and_value(make_scorer, output, words):
    def bad_output(**kwargs):
        return output

    with pytest.raises(ValueError) as error:
        make_scorer(functions.tokens, bad_output).score([group("a", "b")])
    for word in ["'bad_output'", *words]:
        assert word in str(error.value)


@pytest.mark.parametrize("timeout", [None, 30])
def test_an_exception_names_the_function_and_the_first_failing_row(make_scorer, timeout):
    with pytest.raises(RuntimeError, match=r"'raises_on_bad' failed on row 2: KeyError.*no such key.*'bad'") as error:
        make_scorer(functions.raises_on_bad, timeout=timeout).score([group("a", "b"), group("bad", "bad")])
    assert isinstance(error.value.__cause__, KeyError)
    if timeout:
        assert "raises_on_bad" in "".join(error.value.__cause__.__notes__)


def test_an_exception_of_no_single_row_says_so(make_scorer):
    with pytest.raises(
        RuntimeError, match=r"'raises_on_two' failed on all rows together.*none of them alone"
    ) as error:
        make_scorer(functions.raises_on_two).score([group("a", "b")])
    assert isinstance(error.value.__cause__, ArithmeticError)


def test_a_call_that_fails_logs_nothing(make_scorer):
    metrics = []

    def logs_then_raises(completions, log_metric, **kwargs):
        log_metric("seen", len(completions))
        raise ValueError("broken")

    with pytest.raises(RuntimeError, match="row 0"):
        make_scorer(logs_then_raises).score([group("a", "b")], log_metric=lambda *args: metrics.append(args))
    assert metrics == []


def test_groups_without_texts_and_clashing_columns_are_refused(make_scorer):
    empty = group("a", "b")
    empty.completions = []
    with pytest.raises(ValueError, match=r"2 sampled completions has 0 texts"):
        make_scorer(functions.tokens).score([empty])
    with pytest.raises(ValueError, match=r"\['prompts'\] clash.*rename"):
        make_scorer(functions.tokens).score([group("a", prompts="x")])
    with pytest.raises(ValueError, match="no groups"):
        make_scorer(functions.tokens).score([])


def test_rows_without_any_reward_are_warned_of_once(make_scorer, monkeypatch):
    messages = []
    monkeypatch.setattr("grpo_trl.rewards.scoring.logger.warning", messages.append)
    scorer = make_scorer(lambda completions, **_: [None if c == "none" else 1.0 for c in completions])
    for _ in range(2):
        assert scorer.score([group("a", "none", level=5)]).isnan().flatten().tolist() == [False, True]
    assert len(messages) == 1
    assert "returned None" in messages[0] and "'completions': 'none'" in messages[0] and "'level': 5" in messages[0]


def test_async_functions_run_together(make_scorer):
    scorer = make_scorer(*[functions.async_sleep] * 4)
    start = time.monotonic()
    assert scorer.score([group("a")]).tolist() == [[1.0] * 4]
    assert time.monotonic() - start < 0.9  # one after the other: 1.2 s


def test_async_functions_keep_their_event_loop_and_work_inside_a_running_one(make_scorer):
    loops = []

    async def remembers(prompts, **kwargs):
        loops.append(asyncio.get_running_loop())
        return [1.0] * len(prompts)

    scorer = make_scorer(remembers)

    async def notebook():
        return scorer.score([group("a")])

    scorer.score([group("a")])
    assert asyncio.run(notebook()).tolist() == [[1.0]]
    assert loops[0] is loops[1]
    thread_name = "rewards"
    assert any(thread.name == thread_name for thread in threading.enumerate())
    scorer.close()
    assert not any(thread.name == thread_name for thread in threading.enumerate())


def test_async_errors_and_timeouts(make_scorer):
    async def broken(**kwargs):
        raise LookupError("gone")

    with pytest.raises(RuntimeError, match="'broken' failed on row 0: LookupError: gone") as error:
        make_scorer(broken).score([group("a")])
    assert isinstance(error.value.__cause__, LookupError)
    with pytest.raises(TimeoutError, match=r"'async_forever' took longer than its time-out of 0.2 s"):
        make_scorer(functions.async_forever, timeout=0.2).score([group("a")])
    with pytest.raises(RuntimeError, match="the judge did not answer"):
        make_scorer(functions.async_timeout_of_its_own, timeout=30).score([group("a")])


def test_an_async_functions_generator_is_read_as_a_part_of_it(make_scorer):
    async def inverse(completions, **kwargs):
        return (1 / (text != "b") for text in completions)

    scorer = make_scorer(inverse)
    assert scorer.score([group("a", "c")]).tolist() == [[1.0], [1.0]]
    with pytest.raises(RuntimeError, match="'inverse' failed on row 1: ZeroDivisionError"):
        scorer.score([group("a", "b")])


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError("by another")], ids=repr)
def test_an_async_function_cannot_end_the_event_loop(make_scorer, error):
    async def judge(**kwargs):
        raise error

    async def after(completions, **kwargs):
        return [1.0] * len(completions)

    with pytest.raises(RuntimeError, match=f"'judge' failed on row 0: RuntimeError: {type(error).__name__}"):
        make_scorer(judge).score([group("a")])
    assert make_scorer(after).score([group("a")]).tolist() == [[1.0]]


def test_an_error_without_text_is_named(make_scorer):
    class Wordless(Exception):
        def __str__(self):
            raise RuntimeError("no text")

    def judge(**kwargs):
        raise Wordless

    with pytest.raises(RuntimeError, match=r"'judge' failed on row 0: Wordless .whose text cannot be had"):
        make_scorer(judge).score([group("a")])


def test_with_a_timeout_functions_run_in_one_light_process_of_their_own(make_scorer):
    scorer = make_scorer(functions.process_id, functions.heavy_modules, functions.process_id, timeout=30)
    first, second = scorer.score([group("a")])[0], scorer.score([group("b")])[0]
    assert first.tolist() == second.tolist()
    pids = {int(first[0]), int(first[2])}
    assert len(pids) == 2 and os.getpid() not in pids
    assert first[1] == 0.0  # neither torch nor transformers nor trl
    assert all(is_running(pid) for pid in pids)
    scorer.close()
    assert not any(is_running(pid) for pid in pids)
    assert int(scorer.score([group("a")])[0, 0]) not in pids  # scoring again starts afresh


@pytest.mark.parametrize("state", [TrainerState, SimpleNamespace])
def test_the_state_and_the_logs_cross_the_process(make_scorer, state):
    extra, metrics = [], []
    rewards = make_scorer(functions.logs, timeout=30).score(
        [group("a", "b")],
        trainer_state=state(global_step=7),
        log_extra=lambda *args: extra.append(args),
        log_metric=lambda *args: metrics.append(args),
    )
    assert rewards.tolist() == [[0.5], [0.5]]
    assert extra == [("upper", ["A", "B"])] and metrics == [("step", 7)]


def test_logs_by_keyword_also_of_rows_that_are_tried_again(make_scorer):
    def logs(completions, log_extra, log_metric, **kwargs):
        log_extra(column="upper", values=[text.upper() for text in completions])
        log_metric(name="count", value=len(completions))
        return [1 / (text != "b") for text in completions]

    extra, metrics = [], []
    scorer = make_scorer(logs)
    scorer.score(
        [group("a", "c")],
        log_extra=lambda *args: extra.append(args),
        log_metric=lambda *args: metrics.append(args),
    )
    assert extra == [("upper", ["A", "C"])] and metrics == [("count", 2)]
    with pytest.raises(RuntimeError, match="'logs' failed on row 1: ZeroDivisionError"):
        scorer.score([group("a", "b")])


def test_the_latest_logs_alone_cross_the_process(make_scorer):
    scorer = make_scorer(functions.logs_known, timeout=30)
    for length, expected in ((3, 3), (5000, LOGS_SENT)):
        state = TrainerState(log_history=[{"step": step} for step in range(length)])
        assert scorer.score([group("a")], trainer_state=state).tolist() == [[expected * 10000.0 + length - 1]]
    assert len(state.log_history) == 5000


def test_a_column_that_some_calls_leave_out_is_none_there(make_scorer):
    def sometimes(completions, log_extra, log_metric, **kwargs):
        if "b" in completions:
            log_extra("seen", completions)
            log_metric("seen/b", 1.0)  # no column
        return [0.0] * len(completions)

    extra = []
    make_scorer(sometimes, per_group=True).score(
        [group("a", "c"), group("b", "d"), group("e", "f")],
        log_extra=lambda column, values: extra.extend((column, value) for value in values),
    )
    assert extra == [("seen", value) for value in (None, None, "b", "d", None, None)]


def test_a_column_of_one_function_is_not_filled_up_by_another(make_scorer):
    def tells(completions, log_extra, **kwargs):
        log_extra("text", completions)
        return [0.0] * len(completions)

    def silent(completions, **kwargs):
        return [0.0] * len(completions)

    logs = []
    make_scorer(tells, silent).score([group("a", "b")], log_extra=lambda *column: logs.append(column))
    assert logs == [("text", ["a", "b"])]


def test_columns_of_one_name_are_numbered(make_scorer):
    def tells(completions, log_extra, **kwargs):
        log_extra("text", completions)
        return [0.0] * len(completions)

    def shouts(completions, log_extra, **kwargs):
        log_extra("text", [text.upper() for text in completions])
        return [0.0] * len(completions)

    logs = []
    make_scorer(tells, shouts).score([group("a", "b")], log_extra=lambda *column: logs.append(column))
    assert logs == [("text", ["a", "b"]), ("text_2", ["A", "B"])]


def test_a_column_keeps_its_number(make_scorer):
    def sometimes(completions, log_extra, **kwargs):
        if "a" in completions:
            log_extra("text", completions)
        return [0.0] * len(completions)

    def always(completions, log_extra, **kwargs):
        log_extra("text", [text.upper() for text in completions])
        return [0.0] * len(completions)

    logs, scorer = [], make_scorer(sometimes, always)
    for texts in ("ab", "cd"):
        scorer.score([group(*texts)], log_extra=lambda *column: logs.append(column))
    assert logs == [("text", ["a", "b"]), ("text_2", ["A", "B"]), ("text_2", ["C", "D"])]


@pytest.mark.parametrize("values", [5, "abc", {"a": 1}])
def test_a_column_that_is_no_list_is_named(make_scorer, values):
    def logs(completions, log_extra, **kwargs):
        log_extra("c", values)
        return [0.0] * len(completions)

    with pytest.raises(RuntimeError, match=r"TypeError: log_extra\('c', .*\): expected a list, one value per"):
        make_scorer(logs).score([group("a", "b")])


def test_a_row_with_nothing_but_rewards_of_weight_0_is_said(make_scorer, caplog):
    def nothing(completions, **kwargs):
        return [None] * len(completions)

    make_scorer(nothing, functions.tokens, weights=[1.0, 0.0]).score([group("a", "b")])
    assert "returned None for the following row" in caplog.text


@pytest.mark.parametrize("per_group", [False, True])
def test_a_column_is_what_it_was_when_it_was_logged(make_scorer, per_group):
    seen, logs = [], []

    def fills_one_list(completions, log_extra, **kwargs):
        seen[:] = completions
        log_extra("seen", seen)
        seen.append("later")
        return [0.0] * len(completions)

    scorer = make_scorer(fills_one_list, per_group=per_group)
    scorer.score([group("a"), group("b")], log_extra=lambda column, values: logs.extend(values))
    assert logs == ["a", "b"]


def test_functions_run_without_gradients_also_row_by_row(make_scorer):
    def fails_in_all(completions, **kwargs):
        assert not torch.is_grad_enabled()
        with torch.enable_grad():
            assert (torch.ones(1, requires_grad=True) * 2).requires_grad
        return [1 / (text != "b") for text in completions]

    with pytest.raises(RuntimeError, match="'fails_in_all' failed on row 1: ZeroDivisionError"):
        make_scorer(fails_in_all).score([group("a", "b")])


def test_a_column_named_self_crosses_the_process(make_scorer):
    row = group("a")
    row.prompt.example["self"] = 1
    assert make_scorer(functions.tokens, timeout=30).score([row]).shape == (1, 1)


def test_what_a_function_in_its_own_process_prints_is_there(make_scorer, capfd):
    make_scorer(functions.prints, timeout=30).score([group("a")])
    assert capfd.readouterr().out == "scored 1\n"


def test_a_timeout_kills_and_names_and_the_next_call_works(make_scorer):
    scorer = make_scorer(functions.sleeps_on_slow, timeout=1)
    assert scorer.score([group("a")]).tolist() == [[1.0]]
    pid = scorer._calls[0].pid
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"'sleeps_on_slow' took longer than its time-out of 1 s"):
        scorer.score([group("a", "slow")])
    assert time.monotonic() - start < 10
    assert not is_running(pid)
    assert scorer.score([group("a")]).tolist() == [[1.0]]


def test_a_module_that_takes_too_long_to_import_is_not_told_to_raise_the_timeout(make_scorer, monkeypatch):
    monkeypatch.setattr(isolation, "START_TIMEOUT", 0.001)
    scorer = make_scorer(functions.process_id, timeout=30)
    with pytest.raises(RuntimeError, match=r"'process_id' could not be loaded in its own process within 0.001 s"):
        scorer.score([group("a")])
    assert scorer._calls[0].pid is None


def test_a_timeout_kills_what_the_function_started(make_scorer, tmp_path):
    log_file = str(tmp_path / "pid")
    with pytest.raises(TimeoutError):
        make_scorer(functions.starts_a_process_and_sleeps, timeout=1).score([group("a", log_file=log_file)])
    pid = int(Path(log_file).read_text())
    deadline = time.monotonic() + 5
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(pid)


def test_what_is_no_text_on_the_path_is_left_out(make_scorer, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, Path("/nowhere")])
    assert make_scorer(functions.tokens, timeout=30).score([group("a")]).shape == (1, 1)


@pytest.mark.parametrize("code", [0, 3])
def test_a_dying_process_names_function_row_and_exit_code(make_scorer, code):
    with pytest.raises(RuntimeError, match=rf"'dies_on_die' failed on row 1: .*died \(exit code {code}\)"):
        make_scorer(functions.dies_on_die, timeout=30).score([group("a", f"die{code}", "b")])


def test_sys_exit_in_a_function_is_an_error_not_an_exit(make_scorer):
    for timeout in (30, None):
        with pytest.raises(RuntimeError, match="'exits' failed on row 0: RuntimeError: SystemExit: 2"):
            make_scorer(functions.exits, timeout=timeout).score([group("a")])


def test_functions_that_cannot_be_sent_are_refused_at_once():
    def closure(**kwargs):
        return []

    main_function = lambda **_: []  # noqa: E731
    main_function.__module__ = "__main__"
    for func, word in [
        (lambda **_: [], "<lambda>"),
        (closure, "closure"),
        (main_function, "script that runs"),
        (functools.partial(main_function), "script that runs"),
    ]:
        with pytest.raises(ValueError, match=r"module level.*unset reward_timeout") as error:
            RewardScorer([func], timeout=5)
        assert word in str(error.value)


def test_a_function_whose_module_the_process_cannot_import(make_scorer, tmp_path, monkeypatch):
    (tmp_path / "gone_rewards.py").write_text("def reward(prompts, **kwargs):\n    return [0.0] * len(prompts)\n")
    monkeypatch.syspath_prepend(tmp_path)
    from gone_rewards import reward  # pyright: ignore[reportMissingImports]

    scorer = make_scorer(reward, timeout=5)
    (tmp_path / "gone_rewards.py").unlink()
    for cached in (tmp_path / "__pycache__").glob("*"):
        cached.unlink()
    with pytest.raises(
        RuntimeError, match=r"could not be loaded in its own process: ModuleNotFoundError.*gone_rewards"
    ):
        scorer.score([group("a")])


def test_exempt_rewards_and_async_functions_stay_in_this_process(make_scorer):
    here = []

    class Model:
        in_process = True

        def __call__(self, prompts, **kwargs):
            here.append(os.getpid())
            return [0.0] * len(prompts)

    make_scorer(Model(), functions.AsyncJudge(), timeout=5).score([group("a")])
    assert here == [os.getpid()]


def test_a_generator_is_read_in_its_process():
    call = IsolatedFunction(functions.generator, name="generator", timeout=30)
    assert call(completion_ids=[[1], [1, 2]]) == [1.0, 2.0]
    with pytest.raises(ArithmeticError, match="too long"):
        call(completion_ids=[[1], [1] * 4])
    call.close()


@pytest.mark.parametrize(
    ("func", "error", "text"),
    [
        (functions.raises_on_two, ArithmeticError, "only together"),
        (functions.raises_quota, RuntimeError, "Quota: 9 of 8 requests"),
        (functions.exits, RuntimeError, "SystemExit: 2"),
    ],
)
def test_an_error_crosses_as_itself_if_it_can(func, error, text):
    call = IsolatedFunction(func, name="func", timeout=30)
    with pytest.raises(error, match=text) as raised:
        call(prompts=[1, 2])
    assert func.__name__ in raised.value.__notes__[0]  # with its traceback
    call.close()


def test_a_fork_does_not_end_the_process():
    call = IsolatedFunction(functions.process_id, name="process_id", timeout=30)
    (first,) = call(prompts=[1])
    fork = os.fork()
    if not fork:
        try:
            call._finalizer()  # as at its exit
        finally:
            os._exit(0)
    os.waitpid(fork, 0)
    assert call(prompts=[1]) == [first]
    call.close()


def test_a_fork_starts_a_process_of_its_own():
    """Two that read one connection would take each other's replies."""
    call = IsolatedFunction(functions.process_id, name="process_id", timeout=30)
    (first,) = call(prompts=[1])
    fork = os.fork()
    if not fork:
        code = 1
        try:
            code = int(call(prompts=[1]) == [first])
            call.close()
        finally:
            os._exit(code)
    assert os.waitpid(fork, 0)[1] == 0
    assert call(prompts=[1]) == [first]
    call.close()


def test_a_process_that_is_killed_before_it_reads_is_named_too():
    call = IsolatedFunction(functions.process_id, name="process_id", timeout=30)
    (pid,) = map(int, call(prompts=[1]))
    os.kill(pid, signal.SIGSTOP)
    timer = threading.Timer(0.2, os.kill, (pid, signal.SIGKILL))
    timer.start()
    with pytest.raises(RuntimeError, match=r"'process_id' died \(signal SIGKILL\)"):
        call(prompts=[1])
    assert call.pid is None


def test_threads_share_a_process_one_call_at_a_time():
    call = IsolatedFunction(functions.tokens, name="tokens", timeout=30)
    results = {}

    def work(length):
        (results[length],) = call(completion_ids=[[1] * length])

    threads = [threading.Thread(target=work, args=(length,)) for length in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {length: float(length) for length in range(1, 9)}
    call.close()


@pytest.mark.parametrize("how", ["exit", "exception", "kill"])
def test_no_process_survives_the_interpreter(how, tmp_path):
    """Also without close(), and in a script without a `__main__` guard."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import os, signal
            from grpo_trl.rewards.isolation import IsolatedFunction
            from tests.rewards.reward_functions import process_ids
            call = IsolatedFunction(process_ids, name="process_ids", timeout=30)
            print(*map(int, call(prompts=[1, 2])), flush=True)
            if {how!r} == "exception":
                raise SystemError("stop")
            if {how!r} == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            """
        )
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=60)
    assert run.stdout.count("\n") == 1  # the script ran once: the child did not run it again
    assert {"exit": run.returncode == 0, "exception": run.returncode == 1, "kill": run.returncode == -9}[how]
    pids = [*map(int, run.stdout.split())]  # the child's, and that of what it started
    deadline = time.monotonic() + 5
    while any(map(is_running, pids)) and time.monotonic() < deadline:  # after SIGKILL the child ends by itself
        time.sleep(0.01)
    assert not any(map(is_running, pids))


def test_a_process_that_ended_by_itself_can_be_closed():
    call = IsolatedFunction(functions.process_id, name="process_id", timeout=30)
    os.kill(int(call(prompts=[1])[0]), signal.SIGKILL)
    call._process.wait()
    call.close()
    assert call.pid is None


def test_a_dropped_function_takes_its_process_along():
    call = IsolatedFunction(functions.process_id, name="process_id", timeout=30)
    pid = int(call(prompts=[1])[0])
    assert is_running(pid)
    del call
    assert not is_running(pid)

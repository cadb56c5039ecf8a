"""Scoring beside sampling: the same rewards, in order; what overlaps and what does not; how it is broken off."""

import asyncio
import gc
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from trl.rewards import think_format_reward

from grpo_trl import Group, GRPOTrainer, Prompt
from grpo_trl.metrics import Metrics
from grpo_trl.rewards import AccuracyReward, RewardModel, RewardScorer, event_loop, resolve_reward, scoring
from grpo_trl.worker import Worker
from tests import tiny
from tests.rewards import reward_functions as functions
from tests.rewards.test_scoring import is_running
from tests.test_trainer import logged, trainer

TEXTS = ("7", "14/2", "eight", "it is seven, or nearly so")


def groups_of(number: int) -> list[Group]:
    """Groups of 4 completions of different lengths; the draws are 0, 1, 2, ..."""
    return [
        Group(
            Prompt([1, 2], {"prompt": f"question {draw}" * (1 + draw % 3), "answer": "7"}, draw),
            [[1] * (len(text) + draw) for text in TEXTS],
            [True] * 4,
            completions=[text + "!" * draw for text in TEXTS],
        )
        for draw in range(number)
    ]


@pytest.fixture
def make_scorer():
    scorers = []

    def make(*funcs, per_group=True, overlap=True, **options):
        scorers.append(RewardScorer(list(funcs), per_group=per_group, overlap=overlap, **options))
        return scorers[-1]

    yield make
    for scorer in scorers:
        scorer.close()


def score(scorer, groups, *, finished=None, **options):
    """Starts the groups in the order in which they finish; scores them in their own."""
    for group in finished or groups:
        scorer.start(group)
    return scorer.score(groups, **options)


def reward_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("reward", "models"))]


def assert_threads_end():
    deadline = time.monotonic() + 5
    while reward_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not reward_threads()


def later_ones_first(prompts, completion_ids, **kwargs):
    time.sleep(0.02 * (4 - len(completion_ids[0])))
    return [float(len(ids)) for ids in completion_ids]


async def async_later_ones_first(completion_ids, **kwargs):
    await asyncio.sleep(0.02 * (4 - len(completion_ids[0])))
    return [len(ids) / 3 for ids in completion_ids]


# ---- What comes back ----


@pytest.mark.parametrize("per_group", [False, True])
def test_overlapped_and_sequential_rewards_are_identical(make_scorer, per_group):
    model = RewardModel(tiny.tiny_reward_model(), tiny.tiny_tokenizer(chat=False, pair=True), batch_size=8)
    funcs = (later_ones_first, async_later_ones_first, model, AccuracyReward(), functions.tokens)
    groups = groups_of(4)
    finished = [groups[i] for i in (2, 0, 3, 1)]
    results = [
        score(make_scorer(*funcs, per_group=per_group, overlap=overlap), groups, finished=finished)
        for overlap in (True, False)
    ]
    assert results[0].shape == (16, 5) and results[0][:, 2].unique().numel() == 16
    assert torch.equal(*results)
    torch.testing.assert_close(make_scorer(*funcs).score(groups), results[0])  # without `start`: rounding of the model


def test_logs_come_in_the_order_of_the_groups(make_scorer):
    def logs(completions, log_extra, log_metric, **kwargs):
        log_extra("text", completions)
        log_metric("length", len(completions[0]))
        return [0.0] * len(completions)

    groups, extra, metrics = groups_of(3), [], []
    score(
        make_scorer(logs),
        groups,
        finished=groups[::-1],
        log_extra=lambda column, values: extra.extend(values),
        log_metric=lambda name, value: metrics.append(value),
    )
    assert extra == [text for group in groups for text in group.completions]
    assert metrics == [1, 2, 3]


def test_methods_of_one_object_are_not_called_at_the_same_time(make_scorer):
    class Judge:
        inside = most = 0

        def helpful(self, completions, **kwargs):
            self.inside += 1
            self.most = max(self.most, self.inside)
            time.sleep(0.02)
            self.inside -= 1
            return [0.0] * len(completions)

        def harmless(self, completions, **kwargs):
            return self.helpful(completions)

    judge = Judge()
    score(make_scorer(judge.helpful, judge.harmless, per_group=True), groups_of(4))
    assert judge.most == 1


def test_what_was_started_and_is_not_asked_for_is_left_out(make_scorer):
    groups = groups_of(3)
    scorer = make_scorer(functions.tokens)
    rewards = score(scorer, groups[:2], finished=groups)
    assert rewards.shape == (8, 1)
    assert_threads_end()
    assert score(scorer, groups[2:]).shape == (4, 1)


def test_a_rollout_that_nobody_scored_is_forgotten(make_scorer):
    scorer = make_scorer(functions.tokens, functions.AsyncJudge(), per_group=False)
    for group in groups_of(3):
        scorer.start(group)
    scorer.forget()
    groups = groups_of(1)
    assert score(scorer, groups).tolist() == [[float(len(ids)), 2.0] for ids in groups[0].completion_ids]


# ---- Where functions run ----


def test_which_functions_are_called_when_and_where(make_scorer):
    calls = []

    def function(prompts, **kwargs):
        calls.append((threading.current_thread(), len(prompts), torch.is_grad_enabled()))
        return [0.0] * len(prompts)

    main = threading.main_thread()
    score(make_scorer(function), groups_of(3))
    assert [(count, gradients) for _, count, gradients in calls] == [(4, False)] * 3
    assert main not in {thread for thread, *_ in calls}
    calls.clear()
    score(make_scorer(function, per_group=False), groups_of(3))
    assert calls == [(main, 12, False)]
    calls.clear()
    score(make_scorer(function, overlap=False), groups_of(3))
    assert calls == [(main, 4, False)] * 3


def test_functions_of_trl_stay_in_the_main_thread(make_scorer, monkeypatch):
    """Those that call math-verify use signals."""
    seen = []
    reward = resolve_reward(think_format_reward, max_completion_length=8)
    monkeypatch.setattr(reward, "func", lambda completions, **_: seen.append(threading.current_thread()) or [0.0] * 4)
    score(make_scorer(reward), groups_of(2))
    assert seen == [threading.main_thread()] * 2


def test_models_on_one_device_take_turns_and_get_whole_batches(make_scorer):
    model = RewardModel(tiny.tiny_reward_model(), tiny.tiny_tokenizer(chat=False, pair=True), batch_size=8)
    sizes, running, forward = [], [], model.model.forward

    def watched(**batch):
        running.append(1)
        assert len(running) == 1
        sizes.append(len(batch["input_ids"]))
        result = forward(**batch)
        running.pop()
        return result

    model.model.forward = watched
    rewards = score(make_scorer(model, model, names=["a", "b"]), groups_of(3))
    assert sorted(sizes) == [4, 4, 8, 8]
    torch.testing.assert_close(rewards[:, 0], rewards[:, 1])


def test_sampling_waits_where_scoring_is_far_behind(make_scorer, monkeypatch):
    monkeypatch.setattr(scoring, "UNFINISHED", 2)
    behind, done = [], []

    def slow(prompts, **kwargs):
        time.sleep(0.02)
        done.append(1)
        return [0.0] * len(prompts)

    scorer, groups = make_scorer(slow), groups_of(6)
    for number, group in enumerate(groups, 1):
        scorer.start(group)
        behind.append(number - len(done))
    scorer.score(groups)
    assert max(behind) <= 2 and len(done) == 6
    assert scorer.wait_seconds > 0.04 and scorer.busy_seconds >= 0.12


def test_the_time_that_sampling_waited_is_of_the_scoring(make_scorer, monkeypatch):
    """By a clock that a call moves by 10, once somebody waits for it."""
    now, waits, wait = [0], threading.Semaphore(0), scoring.wait
    monkeypatch.setattr(scoring, "UNFINISHED", 1)
    monkeypatch.setattr(scoring, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(scoring, "wait", lambda *args: waits.release() or wait(*args))

    def slow(prompts, **kwargs):
        waits.acquire(timeout=30)
        now[0] += 10
        return [0.0] * len(prompts)

    scorer, groups = make_scorer(slow), groups_of(3)
    score(scorer, groups[:2])
    assert scorer.wait_seconds == 20  # for the first before the second could begin, then for that
    score(scorer, groups[2:])
    assert scorer.wait_seconds == 10
    scorer.score(groups[:2])  # which `start` was not given: the wait within counts once
    assert scorer.wait_seconds == 20


def test_functions_in_processes_of_their_own_run_beside_each_other(make_scorer, tmp_path):
    """Each returns when the other has begun."""
    scorer = make_scorer(functions.meets_second, functions.meets_first, per_group=False, timeout=30)
    groups = groups_of(1)
    groups[0].prompt.example["folder"] = str(tmp_path)
    assert scorer.score(groups).tolist() == [[1.0, 2.0]] * 4


# ---- The overlap itself ----


class Sleeping(GRPOTrainer):
    """Decoding that takes a fixed time and no processor: a group every `SECONDS`."""

    def rollout(self, prompts):
        for prompt in prompts:
            time.sleep(SECONDS)
            yield Group(prompt, [[40 + prompt.draw % 8, 41]] * 4, [True] * 4)


SECONDS = 0.1
NUMBER = 10


def sleeps(prompts, **kwargs):
    time.sleep(SECONDS / 2)
    return [0.0] * len(prompts)


def test_scoring_hides_behind_decoding(tmp_path):
    """Half of the decoding time, of which only what the last group takes is left."""
    run = trainer(tmp_path, rewards=sleeps, cls=Sleeping, reward_call="group")
    prompts = [run.encode({"prompt": "question"}, draw) for draw in range(NUMBER)]
    decoding, whole = [], []
    for _ in range(3):
        start = time.perf_counter()
        assert len(list(run.rollout(prompts))) == NUMBER
        decoding.append(time.perf_counter() - start)
        start = time.perf_counter()
        run.score(run.sample(prompts), Metrics())
        whole.append(time.perf_counter() - start)
    ratio = (min(whole) - SECONDS / 2) / min(decoding)
    print(f"overlapped / decoding alone, less one group's scoring: {ratio:.3f}; one after the other: 1.45")
    assert ratio <= 1.10
    assert run.scorer.busy_seconds >= NUMBER * SECONDS / 2 > 4 * run.scorer.wait_seconds


def test_both_times_are_logged(tmp_path):
    run = trainer(tmp_path, rewards=sleeps, cls=Sleeping, reward_call="group", max_steps=1)
    run.train()
    (waited,), (busy,) = logged(run, "rollout/scoring_wait_seconds"), logged(run, "scoring/busy_seconds")
    assert 0 < waited < busy and busy >= 2 * SECONDS / 2


# ---- How it is broken off ----


def assert_nothing_is_left(pids=()):
    assert not reward_threads()
    deadline = time.monotonic() + 2
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(is_running, pids))


def test_an_exception_in_a_thread_ends_the_others(make_scorer):
    class Cancelled:
        async def __call__(self, **kwargs):
            try:
                await asyncio.sleep(60)
            finally:
                self.ended = True

    def fails(completions, **kwargs):
        raise KeyError("no such key")

    judge = Cancelled()
    scorer = make_scorer(functions.sleeps_on_slow, judge, fails, names=["slow", "judge", "fails"], timeout=None)
    scorer._calls[0] = scoring.IsolatedFunction(functions.sleeps_on_slow, name="slow", timeout=60)
    groups = groups_of(2)
    groups[1].completions = ["slow"] * 4
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"'fails' failed on row 0: KeyError.*'question 0'; completion: '7'"):
        score(scorer, groups)
    assert time.monotonic() - start < 5
    assert judge.ended
    assert_nothing_is_left()
    assert scorer._calls[0].pid is None


def test_a_reward_that_loops_for_ever_ends_the_run(tmp_path):
    run = trainer(
        tmp_path, rewards=[functions.process_id, functions.loops_for_ever], reward_call="group", reward_timeout=2.0
    )
    score, waited_since = run.scorer.score, []
    run.scorer.score = lambda *args, **options: waited_since.append(time.monotonic()) or score(*args, **options)
    with pytest.raises(
        TimeoutError, match=r"'loops_for_ever' took longer than its time-out of 2 s.*given 4 rows.*Prompt: 'question"
    ):
        run.train()
    seconds = time.monotonic() - waited_since[0]
    print(f"ended {seconds:.2f} s after the rollout, with a time-out of 2 s")
    assert seconds < 4
    assert_nothing_is_left()
    assert all(call.pid is None for call in run.scorer._calls)


def test_no_process_is_started_again_by_a_call_that_goes_on(make_scorer):
    class Restarts(scoring.IsolatedFunction):
        started = 0

        def _start(self):
            self.started += 1
            super()._start()

    accuracy, entered = AccuracyReward(), threading.Event()
    accuracy._verify = process = Restarts(functions.verdict, name="accuracy", timeout=60)
    closed, close = threading.Event(), process.close

    def between_rows(gold, answer):  # closed for the first time while no row is compared
        if process.started and not closed.is_set():
            entered.set()
            closed.wait(10)
        return float(process(gold, answer))

    accuracy._compare = between_rows
    process.close = lambda: (close(), closed.set())

    def fails(completions, **kwargs):
        entered.wait(10)
        raise KeyError("no such key")

    groups = groups_of(1)
    groups[0].completions = [str(number) for number in range(4)]
    with pytest.raises(RuntimeError, match="'fails' failed on row 0"):
        score(make_scorer(accuracy, fails), groups)
    assert process.started > 1 and process.pid is None
    assert_nothing_is_left()


def test_a_call_that_nobody_waits_for_is_not_tried_again_by_rows(make_scorer):
    entered, release, calls = threading.Event(), threading.Event(), []

    def fails(completions, **kwargs):
        calls.append(len(completions))
        entered.set()
        release.wait(30)
        raise KeyError("no such key")

    scorer = make_scorer(fails)
    scorer.start(groups_of(1)[0])
    assert entered.wait(5)
    threading.Timer(0.1, release.set).start()
    scorer.close()
    assert_threads_end()
    assert calls == [4]


def test_an_async_call_that_nobody_waits_for_is_not_tried_again_by_rows(make_scorer):
    entered, calls = threading.Event(), []

    async def judge(completions, **kwargs):
        calls.append(len(completions))
        entered.set()
        await asyncio.sleep(60)

    scorer = make_scorer(judge)
    scorer.start(groups_of(1)[0])
    assert entered.wait(5)
    scorer.forget()
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0.1), scorer._event_loop()).result(5)
    assert calls == [4]


def test_a_close_that_fails_hides_no_error_and_is_awaited_where_it_is_async(make_scorer, monkeypatch):
    messages, closed = [], []
    monkeypatch.setattr(scoring.logger, "warning", messages.append)

    class Judge:
        def __init__(self, name):
            self.__name__ = name

        def __call__(self, completions, **kwargs):
            raise KeyError("the real error")

        def close(self):
            raise OSError("already closed")

    class AsyncJudge(Judge):
        async def __call__(self, completions, **kwargs):
            return [0.0] * len(completions)

        async def close(self):
            closed.append(threading.current_thread().name)

    with pytest.raises(RuntimeError, match="'first' failed on row 0: KeyError: 'the real error'"):
        score(make_scorer(Judge("first"), AsyncJudge("second")), groups_of(1))
    assert messages == ["close() of reward function 'first' failed: OSError: already closed"]
    assert closed == ["rewards"]
    assert_nothing_is_left()


def test_a_thread_that_cannot_begin_gives_its_error(monkeypatch):
    def no_stream(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("grpo_trl.worker._on_cuda", no_stream)
    thread = Worker("models")
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        thread.submit(lambda: 1).result(10)
    thread.finish()
    assert thread.join(5)


def test_an_async_function_that_blocks_is_timed_out_too(make_scorer, monkeypatch):
    monkeypatch.setattr(scoring, "GRACE", 0.2)
    messages, release = [], threading.Event()
    monkeypatch.setattr(event_loop.logger, "warning", messages.append)
    monkeypatch.setattr(
        event_loop, "shutdown_event_loop_in_daemon", lambda _, loop: loop.call_soon_threadsafe(loop.stop)
    )

    async def blocks(completions, **kwargs):
        release.wait(30)
        return [0.0] * len(completions)

    with pytest.raises(TimeoutError, match=r"'blocks' was not back after 0.4 s.*blocks the event loop"):
        score(make_scorer(blocks, timeout=0.1), groups_of(1))
    assert len(messages) == 1 and "cannot be ended" in messages[0]
    release.set()
    assert_threads_end()


def test_the_event_loop_ends_with_its_scorer():
    async def judge(completions, **kwargs):
        return [0.0] * len(completions)

    scorer = RewardScorer([judge], overlap=True)
    score(scorer, groups_of(1))
    loop = scorer._event_loop()
    del scorer
    gc.collect()
    assert loop.is_closed()
    assert_threads_end()


def test_what_a_function_left_on_the_event_loop_may_clean_up(make_scorer):
    tasks, ended = [], []

    async def connection():
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.1)
            ended.append(True)

    async def judge(completions, **kwargs):
        tasks.append(asyncio.create_task(connection()))
        await asyncio.sleep(0)
        return [0.0] * len(completions)

    scorer = make_scorer(judge)
    score(scorer, groups_of(1))
    scorer.close()
    assert ended == [True] and tasks[0].cancelled()


def test_a_reward_that_asks_its_own_trainer_is_refused(tmp_path):
    def asks(prompts, **kwargs):
        run.sample(prompts)

    run = trainer(tmp_path, rewards=asks)
    with pytest.raises(RuntimeError, match=r"'asks' failed on .*cannot sample, score or evaluate with the trainer"):
        run.train()


def test_a_rollout_that_fails_ends_the_scoring(tmp_path):
    pids = []

    class Failing(GRPOTrainer):
        def rollout(self, prompts):
            yield Group(prompts[0], [[40, 41]] * 4, [True] * 4)
            while (pid := self.scorer._calls[0].pid) is None:
                time.sleep(0.01)
            pids.append(pid)
            raise KeyboardInterrupt

    run = trainer(tmp_path, rewards=functions.loops_for_ever, cls=Failing, reward_call="group", reward_timeout=60.0)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert time.monotonic() - start < 10
    assert_nothing_is_left(pids)


def test_ctrl_c_while_scoring_is_waited_for(make_scorer):
    scorer = make_scorer(functions.loops_for_ever, functions.async_forever, timeout=60)
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        score(scorer, groups_of(2))
    timer.join()
    assert time.monotonic() - start < 10
    assert_nothing_is_left()
    assert scorer._calls[0].pid is None


def test_a_function_that_nothing_can_end_is_named(make_scorer, monkeypatch):
    monkeypatch.setattr(scoring, "GRACE", 0.1)
    messages, entered, release = [], threading.Event(), threading.Event()
    monkeypatch.setattr(scoring.logger, "warning", messages.append)

    def stuck(prompts, **kwargs):
        entered.set()
        release.wait(30)
        return [0.0] * len(prompts)

    scorer = make_scorer(stuck)
    scorer.start(groups_of(1)[0])
    assert entered.wait(5)
    scorer.close()
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "reward stuck")  # a program may end
    release.set()
    assert len(messages) == 1 and "'reward stuck' is still in a call" in messages[0]
    assert_threads_end()  # with the call

"""A reference with a device of its own: group by group, beside the sampling."""

import sys
import threading
import time
import weakref
from functools import partial

import pytest
import torch

from grpo_trl import GRPOTrainer
from grpo_trl.batch import Group, Prompt
from grpo_trl.policy import ScoredByGroup
from grpo_trl.worker import GRACE, Worker
from tests.test_trainer import config, dataset, trainer
from tests.tiny import tiny_model, tiny_tokenizer

CPU = torch.device("cpu")


def groups_of(number: int) -> list[Group]:
    """Groups of 2 completions; the draws are 0, 1, 2, ..., and the longest completion has draw + 1 tokens."""
    return [Group(Prompt([1], {}, draw), [[1] * (draw + 1), [1]], [True] * 2) for draw in range(number)]


def draws(group: Group) -> torch.Tensor:
    """Stands for log-probabilities: (2, longest), all of them the draw."""
    return torch.full((2, len(group.completion_ids[0])), float(group.prompt.draw))


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("models")]


@pytest.fixture
def worker():
    worker = Worker("models of a test", CPU)
    yield lambda: worker
    worker.finish()
    assert worker.join(30)


@pytest.mark.parametrize("overlap", [True, False])
def test_rows_are_those_of_the_groups_whichever_came_first(overlap, worker):
    first, second, third = groups_of(3)
    began = time.monotonic()
    with ScoredByGroup(draws, worker if overlap else None) as scored:
        scored.start(second)
        scored.start(first)
        found = scored.per_token_logps([first, second, third], 4)  # the third was never started
    assert time.monotonic() - began < GRACE  # a worker that is left in peace is not waited for
    assert found.dtype == torch.float32
    assert found.tolist() == [[0] * 4] * 2 + [[1, 1, 0, 0]] * 2 + [[2, 2, 2, 0]] * 2


def test_an_error_comes_with_the_next_group_and_with_the_result(worker):
    def fails(group):
        raise KeyError(group.prompt.draw)

    first, second = groups_of(2)
    with ScoredByGroup(fails, worker) as scored:
        scored.start(first)
        with pytest.raises(KeyError, match="0"):
            scored.per_token_logps([first], 2)
        with pytest.raises(KeyError, match="0"):
            scored.start(second)


def test_a_group_that_was_begun_is_kept(worker):
    """Its id stands for it, which another group could get."""
    (group,) = groups_of(1)
    with ScoredByGroup(draws, worker) as scored:
        scored.start(group)
        worker().submit(lambda: None).result(30)  # behind it: the worker has let go of it
        kept = weakref.ref(group)
        del group
        assert kept() is not None


class Slow:
    """Scores a group when it is told to go on."""

    def __init__(self):
        self.begun, self.go_on, self.done = threading.Event(), threading.Event(), []

    def __call__(self, group):
        self.begun.set()
        assert self.go_on.wait(30)
        self.done.append(group.prompt.draw)
        return draws(group)

    def soon(self):
        """When it is in a call, which ends a little later."""
        assert self.begun.wait(30)
        threading.Timer(0.2, self.go_on.set).start()


def test_what_waits_is_dropped_when_the_rollout_fails(worker):
    slow = Slow()
    with pytest.raises(KeyboardInterrupt), ScoredByGroup(slow, worker) as scored:
        for group in groups_of(3):
            scored.start(group)
        slow.soon()
        worker().finish()  # as the rewards do
        raise KeyboardInterrupt
    assert slow.done == [0]
    assert not threads()


def test_a_worker_drops_what_it_has_not_begun():
    slow, worker = Slow(), Worker("models of a test", CPU)
    futures = [worker.submit(partial(slow, group)) for group in groups_of(3)]
    slow.soon()
    worker.drop()
    worker.finish()
    assert worker.join(30)
    assert slow.done == [0] and [future.cancelled() for future in futures] == [False, True, True]


def test_a_worker_makes_no_gradients_and_raises_what_ends_programs(worker):
    assert worker().submit(torch.is_grad_enabled).result(30) is False
    with pytest.raises(SystemExit):
        worker().submit(sys.exit).result(30)
    assert worker().submit(lambda: 1).result(30) == 1


def test_a_worker_that_waits_keeps_no_task(worker):
    task = partial(draws, groups_of(1)[0])
    kept = weakref.ref(task)
    worker().submit(task).result(30)
    del task
    deadline = time.monotonic() + 5
    while kept() is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert kept() is None


def collected(run: GRPOTrainer, own_device: torch.device | None):
    """A batch of four groups, by a trainer whose reference has, or has not, a device of its own."""
    assert run.reference is not None
    run.reference.own_device = own_device
    return next(iter(run.get_train_dataloader()))


@pytest.fixture
def make_run(tmp_path):
    def make(cls=GRPOTrainer, **options):
        options = {"beta": 0.1, "num_iterations": 2, "per_device_train_batch_size": 16} | options
        return trainer(tmp_path, cls=cls, **options)

    return make


def test_overlapped_and_sequential_give_identical_tensors(make_run):
    """Also when another device only begins after the last group; a batch as a whole differs by rounding."""
    overlapped, sequential, whole = (
        collected(make_run(reward_overlap=overlap), own).tensors()
        for overlap, own in ((True, CPU), (False, CPU), (True, None))
    )
    assert overlapped.keys() == sequential.keys() == whole.keys() >= {"ref_per_token_logps", "advantages"}
    for name, values in whole.items():
        assert torch.equal(overlapped[name], sequential[name]), name
        torch.testing.assert_close(overlapped[name], values, rtol=0, atol=1e-5)
    assert whole["ref_per_token_logps"].abs().max() > 1
    assert not threads()


class OneByOne(GRPOTrainer):
    """Its rollout goes on with the next group when the reference has scored the one before."""

    def rollout(self, prompts):
        for number, group in enumerate(super().rollout(prompts)):
            yield group
            deadline = time.monotonic() + 30
            while self.scored <= number and time.monotonic() < deadline:
                time.sleep(0.01)
            assert self.scored == number + 1

    scored = 0

    def _logps_of_reference(self, reference, batch):
        assert threading.current_thread() is not threading.main_thread()
        result = super()._logps_of_reference(reference, batch)
        self.scored += 1
        return result


def test_groups_are_scored_while_others_are_sampled(make_run):
    run = make_run(cls=OneByOne)
    assert collected(run, CPU).ref_per_token_logps is not None
    assert run.scored == 4


@pytest.mark.parametrize("fails", ["rollout", "reward"])
def test_what_fails_beside_it_ends_the_reference_too(make_run, fails):
    """In its pass over the first group, whichever of sampling and scoring breaks off."""
    slow = Slow()

    class Run(GRPOTrainer):
        def rollout(self, prompts):
            yield from super().rollout(prompts)
            if fails == "rollout":
                slow.soon()
                raise KeyError("no such key")

        def _logps_of_reference(self, reference, batch):
            return slow(groups_of(1)[0])

    def reward(completions, **kwargs):
        slow.soon()
        raise KeyError("no such key")

    run = make_run(cls=Run, rewards=reward)
    with pytest.raises((KeyError, RuntimeError), match="no such key"):
        collected(run, CPU)
    assert slow.done == [0]
    assert not threads() and run._by_group is None


def test_memory_that_runs_out_beside_sampling_only_costs_time(make_run, monkeypatch):
    run, plain = make_run(), collected(make_run(), CPU)
    assert run.reference is not None
    backbone, limit, failed = run.reference.model.base_model, run.reference.passes.limit, []
    forward = backbone.forward

    def forward_once_too_large(*args, **kwargs):
        if not failed:
            failed.append(threading.current_thread())
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(*args, **kwargs)

    monkeypatch.setattr(backbone, "forward", forward_once_too_large)
    batch = collected(run, CPU)
    assert failed and failed[0] is not threading.main_thread() and limit.tokens is not None
    torch.testing.assert_close(batch.ref_per_token_logps, plain.ref_per_token_logps, rtol=0, atol=1e-5)


def test_evaluation_and_dynamic_sampling_begin_nothing_early(make_run):
    """Of what evaluation samples the reference is not asked; of what dynamic sampling does, for the batch alone."""
    run = make_run(dynamic_sampling=True, max_steps=1, num_generations_eval=2, per_device_eval_batch_size=4)
    passes = []
    score = run._logps_of_reference
    run._logps_of_reference = lambda reference, batch: passes.append(len(batch)) or score(reference, batch)
    run.reference.own_device = CPU
    run.evaluate(dataset(2))
    assert not passes
    run.train()
    assert passes == [run.args.generation_batch_size]


def test_a_reference_beside_its_policy_has_no_device_of_its_own(tmp_path):
    run = GRPOTrainer(
        tiny_model(), lambda completions, **kwargs: [0.0] * len(completions), config(tmp_path, beta=0.1),
        dataset(2), processing_class=tiny_tokenizer(),
    )  # fmt: skip
    assert run.reference is not None and run.reference.own_device is None

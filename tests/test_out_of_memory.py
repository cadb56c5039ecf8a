"""Memory that runs out in a real run: the work is split, and its results are those of a run that had enough."""

import logging
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from transformers.training_args import OptimizerNames

from grpo_trl import GRPOConfig
from grpo_trl.assembly import policy_limit
from tests.test_trainer_gradients import PROMPTS, FixedRollouts, KeepGradients, assert_equal, reward_by_length
from tests.tiny import tiny_model, tiny_reward_model, tiny_tokenizer


class RunsOut(FixedRollouts):
    """Its memory runs out once, in the `at`-th pass of a kind: update's forward, update's backward, scoring."""

    kind, at = "", 0
    events = 0
    passes = 0

    def get_train_dataloader(self):
        layer = self.model.model.layers[0]  # its backward comes after all others', which have added their gradients
        layer.register_forward_pre_hook(lambda *_: self.count("forward" if torch.is_grad_enabled() else "scoring"))
        layer.register_full_backward_hook(lambda *_: self.count("backward"))
        return super().get_train_dataloader()

    def count(self, kind):
        self.passes += kind == "forward"
        if kind == self.kind:
            self.events += 1
            if self.events == self.at:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def run(path, kind="", at=0, *, cls=RunsOut, reward=reward_by_length):
    model = tiny_model("qwen3")
    optimizer = KeepGradients(model.parameters(), lr=1e-2)
    args = GRPOConfig(
        str(path), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, save_epochs=False,
        plot_metrics=False, lr_scheduler_type="constant", max_steps=2, gradient_checkpointing=False, logging_steps=1,
        max_grad_norm=0.0, beta=0.1, num_iterations=2, gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer = cls(
        model, reward, args, Dataset.from_dict({"prompt": PROMPTS[:4]}), processing_class=tiny_tokenizer(),
        reward_processing_classes=tiny_tokenizer(chat=False, pair=True), optimizers=(optimizer, None),
    )  # fmt: skip
    trainer.kind, trainer.at = kind, at
    trainer.train()
    return trainer, optimizer.kept


@pytest.fixture(scope="module")
def enough(tmp_path_factory):
    """A run of two updates, each of two micro-batches of two groups, with enough memory."""
    return run(tmp_path_factory.mktemp("enough"))


def numbers(trainer):
    varying = ("time", "second", "runtime", "flos")
    return [{k: v for k, v in row.items() if not any(w in k for w in varying)} for row in trainer.state.log_history]


@pytest.mark.parametrize("at", [1, 2])  # the micro-batch of the accumulation
@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_an_update_that_ran_out_of_memory_is_the_same_update(tmp_path, caplog, enough, kind, at):
    with caplog.at_level(logging.WARNING, "grpo_trl"):
        result, gradients = run(tmp_path, kind, at)
    assert result.events > at  # it did run out, and went on
    assert_equal(gradients, enough[1])
    for row, expected in zip(numbers(result), numbers(enough[0]), strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert f"Out of memory in the policy: its passes have at most {result.policy_limit.tokens} tokens" in (
        " ".join(caplog.messages)
    )
    assert enough[0].policy_limit.tokens is None
    # once is enough: both updates are made of two pieces, a group each, per micro-batch
    assert result.passes == at + 2 * 4


@pytest.mark.parametrize(
    ("options", "fixed"),
    [({}, False), ({"top_entropy_quantile": 0.5}, True), ({"optim": "galore_adamw_layerwise"}, True)],
)
def test_what_picks_tokens_or_updates_in_each_pass_is_not_cut(options, fixed):
    args = SimpleNamespace(top_entropy_quantile=1.0, optim="adamw_torch", max_tokens_per_microbatch=None)
    vars(args).update(options)
    args.optim = OptimizerNames(args.optim)
    assert policy_limit(args, SimpleNamespace(distributed_type=DistributedType.NO), None).fixed == fixed


def test_scoring_that_ran_out_of_memory_gives_the_same_log_probabilities(tmp_path, enough):
    result, gradients = run(tmp_path, "scoring", at=2)
    assert result.events > 2 and result.policy_limit.tokens is not None
    assert_equal(gradients, enough[1])


def test_frozen_models_whose_memory_runs_out_score_the_same(tmp_path):
    expected, gradients = run(tmp_path / "enough", reward=tiny_reward_model())

    class Cramped(RunsOut):
        def get_train_dataloader(self):
            (reward,) = self.scorer.reward_funcs
            for model in (self.reference.model, reward.model):
                model.register_forward_pre_hook(refuse_large_passes, with_kwargs=True)
            return super().get_train_dataloader()

    sizes = []

    def refuse_large_passes(module, args, inputs):
        tokens = inputs["input_ids"].numel()
        sizes.append(tokens)
        if tokens > 60:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    result, same = run(tmp_path / "cramped", cls=Cramped, reward=tiny_reward_model())
    assert max(sizes) > 60 and sum(tokens > 60 for tokens in sizes) <= 6
    (reward,) = result.scorer.reward_funcs
    assert reward.limit.tokens and result.reference.passes.limit.tokens and result.policy_limit.tokens is None
    assert_equal(same, gradients, relative=1e-5)  # rewards are rounded, and then divided by how little they differ
    assert numbers(result)[0]["reward"] == pytest.approx(numbers(expected)[0]["reward"], abs=1e-5)


def test_memory_that_one_row_does_not_fit_into_ends_the_run(tmp_path):
    class NoRoom(RunsOut):
        def count(self, kind):
            if kind == "backward":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    with pytest.raises(torch.OutOfMemoryError, match=r"20\.00 MiB"):
        run(tmp_path, cls=NoRoom)

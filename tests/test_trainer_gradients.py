"""The gradient of an optimizer step does not depend on how the step is cut into micro-batches or spread over ranks."""

import pytest
import torch
from datasets import Dataset

from grpo_trl import GRPOConfig, GRPOTrainer
from grpo_trl.batch import Group
from tests.tiny import IM_END, tiny_model, tiny_tokenizer

PROMPTS = [f"question {i}" * (1 + i % 3) for i in range(8)]


class FixedRollouts(GRPOTrainer):
    """Ragged completions that are a function of the draw, and gradients kept at each optimizer step."""

    def rollout(self, prompts):
        for prompt in prompts:
            generator = torch.Generator().manual_seed(prompt.draw)
            completions = []
            for _ in range(self.args.num_generations):
                length = int(torch.randint(1, 12, (1,), generator=generator))
                completions.append([*torch.randint(7, 200, (length,), generator=generator).tolist(), IM_END])
            yield Group(prompt, completions, [len(ids) < 11 for ids in completions])


def reward_by_length(prompts, completions, completion_ids, **kwargs):
    return [len(ids) / 10 + sum(ids) % 7 for ids in completion_ids]


class KeepGradients(torch.optim.SGD):
    """Plain SGD that remembers the gradients of each step."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.kept = []

    def step(self, closure=None):
        grads = [
            p.grad.detach().clone().flatten() for g in self.param_groups for p in g["params"] if p.grad is not None
        ]
        self.kept.append(torch.cat(grads))
        return super().step(closure)


class LeavesOutTruncated(FixedRollouts):
    """Says of each token of a truncated completion that it does not count, as a rollout of one's own can."""

    def rollout(self, prompts):
        for group in super().rollout(prompts):
            rows = zip(group.completion_ids, group.terminated, strict=True)
            group.loss_masks = [[int(terminated)] * len(ids) for ids, terminated in rows]
            yield group


def gradients(tmp_path, num_prompts=4, max_steps=2, cls=FixedRollouts, **config):
    model = tiny_model("qwen3")
    optimizer = KeepGradients(model.parameters(), lr=1e-2)
    options = {"beta": 0.1, "num_iterations": 2, "gradient_checkpointing": False, "max_grad_norm": 0.0} | config
    args = GRPOConfig(
        str(tmp_path), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, save_epochs=False,
        plot_metrics=False, lr_scheduler_type="constant", max_steps=max_steps, **options,
    )  # fmt: skip
    trainer = cls(
        model=model, reward_funcs=reward_by_length, args=args, processing_class=tiny_tokenizer(),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS[:num_prompts]}), optimizers=(optimizer, None),
    )  # fmt: skip
    trainer.train()
    return optimizer.kept


def assert_equal(a, b, relative=1e-6):
    assert len(a) == len(b) > 0
    for step, (x, y) in enumerate(zip(a, b, strict=True)):
        assert x.norm() > 1e-3
        # from the second step on, the weights too differ by rounding (up to 1.2e-6 on the processors tried)
        torch.testing.assert_close(x, y, rtol=0, atol=2e-6 if step else 1e-6)
    assert (a[0] - b[0]).norm() <= relative * a[0].norm()


SHAPES = [(8, 1), (4, 2), (2, 4), (1, 8)]  # per_device_train_batch_size, gradient_accumulation_steps


@pytest.mark.parametrize("weighting", ["token", "sequence", "max_length"])
def test_accumulation_does_not_change_the_gradient(tmp_path, weighting):
    runs = [
        gradients(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps, token_weighting=weighting,
            max_steps=4,
        )
        for size, steps in SHAPES
    ]  # fmt: skip
    for run in runs[1:]:
        assert_equal(runs[0], run)


@pytest.mark.parametrize("weighting", ["token", "sequence"])
def test_masked_truncated_completions_leave_every_denominator(tmp_path, weighting):
    def run(size, steps, **options):
        return gradients(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps, token_weighting=weighting,
            **options,
        )  # fmt: skip

    masked = [run(size, steps, mask_truncated_completions=True) for size, steps in SHAPES]
    for other in masked[1:]:
        assert_equal(masked[0], other)
    assert_equal(masked[0], run(*SHAPES[0], cls=LeavesOutTruncated))
    unmasked = run(*SHAPES[0])
    assert (masked[0][0] - unmasked[0]).norm() > 0.01 * unmasked[0].norm()


def test_an_epoch_that_does_not_divide_evenly(tmp_path):
    """3 prompts in rollouts of 2: the second rollout is completed from the next epoch's order."""
    runs = [
        gradients(tmp_path, num_prompts=3, max_steps=8, per_device_train_batch_size=s, gradient_accumulation_steps=a)
        for s, a in SHAPES[:2]
    ]
    assert_equal(*runs)


def test_rollouts_of_two_optimizer_steps(tmp_path):
    """steps_per_generation = 2 x accumulation: each of the two steps has its own denominators."""
    runs = [
        gradients(
            tmp_path, max_steps=8, per_device_train_batch_size=size, gradient_accumulation_steps=steps,
            steps_per_generation=2 * steps,
        )
        for size, steps in SHAPES[:3]
    ]  # fmt: skip
    for run in runs[1:]:
        assert_equal(runs[0], run)

"""One step of a run, on plain CPU, on two logical devices, and with a planted mistake; writes what came out.

    python -m tests.two_devices_run OUT

The logical devices are registered for a whole process, hence this one.
"""

import sys
import tempfile
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

from grpo_trl import Group, GRPOTrainer, Prompt, RolloutBatch
from grpo_trl.policy import FrozenReference, prepare
from grpo_trl.policy.reference import Passes
from grpo_trl.token_limit import TokenLimit
from tests.logical_devices import CROSSINGS, DeviceMismatch, LogicalDevices
from tests.test_trainer import config, dataset
from tests.tiny import tiny_model, tiny_reward_model, tiny_tokenizer


class LeavesIdsBehind(FrozenReference):
    """Does not move the ids to the reference's device."""

    def per_token_logps(self, batch, temperature):
        batch.to = lambda device: batch
        batch.tokens = lambda: batch
        return super().per_token_logps(batch, temperature)


def split(model: Any) -> Any:
    """As accelerate places it by {"model.embed_tokens": 1, "model.layers": 1, "model.norm": 2, "lm_head": 2}."""
    inner = model.model
    for part, device in (
        *((part, "vgpu:1") for part in (inner.embed_tokens, inner.layers, inner.rotary_emb)),
        *((part, "vgpu:2") for part in (inner.norm, model.lm_head)),
    ):
        for module in part.to(device).modules():
            if any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
                add_hook_to_module(module, AlignDevicesHook(execution_device=torch.device(device)))
    return model


def scores_of_split(kind: str, evaluation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference log-probabilities of a model on one device, and of the same on two."""
    groups = [
        Group(Prompt([10, 11, 12], {}, 0), [[20, 21], [22, 23, 24]], [True, True]),
        Group(Prompt([13, 14], {}, 1), [[30], [32, 33, 34]], [True, True]),
    ]
    batch = RolloutBatch.from_groups(groups, pad_token_id=0)
    model = tiny_model(kind)
    prepare(model)
    model.evaluation = evaluation
    reference = FrozenReference(model, Passes(4, TokenLimit("the reference")))
    expected = reference.per_token_logps(batch, 0.7)
    split(model)
    return expected, reference.per_token_logps(batch, 0.7)


def step(policy: str, frozen: str, reference: type[FrozenReference] = FrozenReference) -> dict[str, Any]:
    """Rollout, scoring, loss and gradient of a trainer with its models on these devices; all results on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        args = config(folder, beta=0.1, ref_device=frozen, reward_device=frozen, num_iterations=2, max_steps=1)
        args.__dict__["_setup_devices"] = torch.device(policy)  # what `args.device` gives
        run = GRPOTrainer(
            tiny_model(), tiny_reward_model(), args, dataset(2), processing_class=tiny_tokenizer(),
            reward_processing_classes=tiny_tokenizer(chat=False, pair=True),
        )  # fmt: skip
        assert isinstance(run.reference, FrozenReference)
        run.reference.__class__ = reference
        where = [run.model, run.reference.model, run.scorer.reward_funcs[0].model]  # pyright: ignore[reportFunctionMemberAccess]
        CROSSINGS.clear()
        batch = next(iter(run.get_train_dataloader()))
        loss = run.training_step(run.model, batch)
        crossings = list(CROSSINGS)
        return {
            "devices": [{str(parameter.device) for parameter in model.parameters()} for model in where],
            "batch": {name: value.cpu() for name, value in batch.tensors().items()},
            "loss": loss.cpu(),
            "gradient": {name: parameter.grad.cpu() for name, parameter in run.model.named_parameters()},
            "metrics": run.metrics.reduce(lambda parts: parts),
            "crossings": crossings,
        }


def planted(reference: type[FrozenReference]) -> str:
    """The error of a run with a mistake in it."""
    try:
        step("vgpu:0", "vgpu:1", reference)
    except DeviceMismatch as error:
        return str(error)
    return "none"


if __name__ == "__main__":
    results: dict[str, Any] = {"cpu": step("cpu", "cpu")}
    with LogicalDevices():
        results |= {"two": step("vgpu:0", "vgpu:1")}
        results |= {LeavesIdsBehind.__name__: planted(LeavesIdsBehind)}
        results["split"] = {way: scores_of_split("qwen3", way) for way in ("packed", "padded", "logits")}
    for result in (results["cpu"], results["two"]):
        result["crossings"] = [vars(crossing) for crossing in result["crossings"]]
    torch.save(results, sys.argv[1])

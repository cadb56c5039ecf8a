"""A small real training run, started on one rank and on two. Writes what must be equal.

Two options are no fields of the config: `resume`, a checkpoint, and `kick`, the step after which rank 1 gets a
SIGTERM.
"""

import json
import os
import signal
import sys

import torch
from datasets import Dataset
from transformers import TrainerCallback

from grpo_trl import GRPOConfig, GRPOTrainer
from grpo_trl.ranks_exit import pause_at_exit
from tests.tiny import tiny_model, tiny_tokenizer


def reward_vowels(prompts, completions, **kwargs):
    return [sum(c in "aeiou" for c in text) + len(text) / 5 for text in completions]


def odd_draws(group, rewards):
    """A filter under which, of two ranks, one has all the luck."""
    return group.prompt.draw % 2 == 1


def main(output: str, per_device_train_batch_size: int, options: dict) -> None:
    torch.set_num_threads(1)
    lora = options.pop("lora", False)
    resume, kick = options.pop("resume", None), options.pop("kick", None)
    defaults = {
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_completion_length": 10, "max_steps": 4,
        "learning_rate": 1e-2, "logging_steps": 1, "beta": 0.1, "num_iterations": 2,
        "max_grad_norm": 0.0,  # clipping would hide gradients that are too large on every rank
        "num_generations_eval": 2, "per_device_eval_batch_size": 4, "eval_strategy": "steps", "eval_steps": 2,
    }  # fmt: skip
    args = GRPOConfig(output, per_device_train_batch_size=per_device_train_batch_size, **(defaults | options))
    peft_config = None
    if lora:
        from peft import LoraConfig

        peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = RecordingTrainer(
        model=tiny_model("qwen3"), reward_funcs=reward_vowels, args=args, processing_class=tiny_tokenizer(),
        train_dataset=Dataset.from_dict({"prompt": [f"question {i}" * (1 + i % 3) for i in range(8)]}),
        eval_dataset=Dataset.from_dict({"prompt": ["a", "bb", "ccc"]}), peft_config=peft_config,
    )  # fmt: skip
    kept = FirstGradient()
    trainer.add_callback(kept)
    if kick is not None and trainer.accelerator.process_index == 1:
        trainer.add_callback(Kick(kick))
    trainer.train(resume_from_checkpoint=resume)
    rank, world_size = trainer.accelerator.process_index, trainer.accelerator.num_processes
    backend = torch.distributed.get_backend() if world_size > 1 else None
    with open(f"{output}/sampled_{rank}.json", "w") as file:
        facts = {"world_size": world_size, "backend": backend, "pauses": pause_at_exit.cache_info().currsize}
        json.dump(facts | {"sampled": trainer.sampled}, file)
    if rank == 0:
        model = trainer.accelerator.unwrap_model(trainer.model)
        weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        torch.save(weights, f"{output}/weights.pt")
        torch.save(trainer.optimizer.state_dict()["state"], f"{output}/optimizer.pt")
        torch.save(kept.gradient, f"{output}/gradient.pt")
        with open(f"{output}/log.json", "w") as file:
            json.dump(trainer.state.log_history, file)
    trainer.end()


class FirstGradient(TrainerCallback):
    """Keeps the gradient of the first optimizer step, as one vector."""

    gradient: torch.Tensor | None = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.gradient is None:
            self.gradient = torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.grad is not None])


class Kick(TrainerCallback):
    """Sends this process a SIGTERM after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


class RecordingTrainer(GRPOTrainer):
    """Keeps every sampled completion by its draw number."""

    sampled: dict[int, list] = {}

    def sample(self, prompts):
        groups = super().sample(prompts)
        if self.sampling is self.train_sampling:
            self.sampled |= {group.prompt.draw: group.completion_ids for group in groups}
        return groups


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]))

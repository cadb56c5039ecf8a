"""A small real training run under the engine of an accelerate config, started by `test_engines.py`. Each rank writes
what it sampled and what it ran on; rank 0 saves the model, the log and the first checkpoint that the run leaves."""

import inspect
import json
import sys
import textwrap
from pathlib import Path

import accelerate.state
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig

from grpo_trl import GRPOConfig, GRPOTrainer
from tests.train_on_ranks import reward_vowels


def let_cpu_ranks_shard() -> None:
    """For FSDP on CPU ranks: accelerate keeps a list of the kinds of ranks that may shard, and the CPU's is not in it,
    though torch's `fully_shard` works there. Adds it to that list, and changes nothing else."""
    source = textwrap.dedent(inspect.getsource(AcceleratorState.__init__))
    listed = "self.distributed_type in [\n            DistributedType.MULTI_GPU,"
    assert source.count(listed) == 1, "accelerate has moved its list; put CPU ranks where it is now"
    source = source.replace(listed, f"{listed} DistributedType.MULTI_CPU,")
    names = dict(vars(accelerate.state))
    exec(source, names)
    AcceleratorState.__init__ = names["__init__"]


class RecordingTrainer(GRPOTrainer):
    """Keeps every sampled completion by its draw number, in the order of the updates."""

    sampled: dict[int, list] = {}

    def sample(self, prompts):
        groups = super().sample(prompts)
        self.sampled |= {group.prompt.draw: group.completion_ids for group in groups}
        return groups


def main(output: str, models: str, world_size: int, options: dict) -> None:
    torch.set_num_threads(1)
    if options.pop("shard_cpu_ranks", False):
        let_cpu_ranks_shard()
    peft_config = None
    if options.pop("lora", False):
        peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    defaults = {
        "report_to": "none", "disable_tqdm": True, "max_completion_length": 10, "max_steps": 3, "logging_steps": 1,
        "learning_rate": 1e-2, "lr_scheduler_type": "constant", "beta": 0.1, "gradient_accumulation_steps": 2,
        "max_grad_norm": 1e4,  # a norm is logged, and no gradient clipped
        "adam_epsilon": 1e-3,  # of gradients near 0 the usual one makes steps of full size: rounding, magnified
        "save_strategy": "steps", "save_steps": 2,
    }  # fmt: skip
    batch = 8 // world_size
    args = GRPOConfig(output, per_device_train_batch_size=batch, **(defaults | options))
    trainer = RecordingTrainer(
        model=f"{models}/policy", reward_funcs=[reward_vowels, f"{models}/reward"], args=args,
        train_dataset=Dataset.from_dict({"prompt": [f"question {i}" * (1 + i % 3) for i in range(12)]}),
        peft_config=peft_config,
    )  # fmt: skip
    trainer.train()
    trainer.save_model(f"{output}/final")
    rank = trainer.accelerator.process_index
    facts = {
        "world_size": trainer.accelerator.num_processes,
        "backend": torch.distributed.get_backend() if torch.distributed.is_initialized() else None,
        "engine": str(trainer.accelerator.distributed_type.value),
        "wrapper": type(trainer.model_wrapped).__name__,
        "zero_stage": getattr(trainer.model_wrapped, "zero_optimization_stage", lambda: None)(),
        "optimizer": type(trainer.optimizer.optimizer).__name__,
        "rollout_engine": type(trainer.engine).__name__,
        "evaluation": trainer.accelerator.unwrap_model(trainer.model).get_base_model().evaluation
        if peft_config
        else trainer.accelerator.unwrap_model(trainer.model).evaluation,
        "sampled": trainer.sampled,
    }
    Path(output, f"rank_{rank}.json").write_text(json.dumps(facts))
    if rank == 0:
        Path(output, "log.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]))

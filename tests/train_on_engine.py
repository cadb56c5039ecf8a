"""A small real training run under the engine of an accelerate config, started by `test_engines.py`. Each rank writes
what it sampled and what it ran on; rank 0 writes the log. Checkpoint and model are those that the trainer saves."""

import inspect
import json
import re
import sys
import textwrap
import time
from pathlib import Path

import accelerate.state
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig
from torch.distributed.tensor import DTensor

from grpo_trl import GRPOConfig, GRPOTrainer
from grpo_trl.policy import head
from grpo_trl.policy.logprobs import causal_lm
from tests.train_on_ranks import reward_vowels


def let_cpu_ranks_shard() -> None:
    """For FSDP on CPU ranks: accelerate keeps a list of the kinds of ranks that may shard, and the CPU's is not in it,
    though torch's `fully_shard` works there. Adds it to that list, and changes nothing else."""
    source = textwrap.dedent(inspect.getsource(AcceleratorState.__init__))
    start_of_list = r"(self\.distributed_type in \[\s+)(DistributedType\.MULTI_GPU,\s+DistributedType\.MULTI_MLU,)"
    source, count = re.subn(start_of_list, r"\1DistributedType.MULTI_CPU, \2", source)
    assert count == 1, "accelerate has moved its list; put CPU ranks where it is now"
    names = dict(vars(accelerate.state))
    exec(source, names)
    AcceleratorState.__init__ = names["__init__"]


def uneven(group, rewards):
    """A filter under which, of two ranks, one has all the luck, and some collections none at all."""
    draw = group.prompt.draw
    return draw % 2 == 1 and not 4 <= draw < 20


def reward_slow_on_rank_1(prompts, completions, **kwargs):
    """Ranks end their rollouts at different times."""
    time.sleep(0.5 * int(torch.distributed.is_initialized() and torch.distributed.get_rank()))
    return reward_vowels(prompts, completions)


class RecordingTrainer(GRPOTrainer):
    """Keeps every sampled completion by its draw number."""

    sampled: dict[int, list] = {}

    def sample(self, prompts):
        groups = super().sample(prompts)
        self.sampled |= {group.prompt.draw: group.completion_ids for group in groups}
        return groups


def main(output: str, models: str, world_size: int, options: dict) -> None:
    torch.set_num_threads(1)
    if options.pop("shard_cpu_ranks"):
        let_cpu_ranks_shard()
    adapter = options.pop("lora")
    peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if adapter else None
    defaults = {
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_completion_length": 10, "max_steps": 3,
        "logging_steps": 1, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "beta": 0.1,
        "gradient_accumulation_steps": 2, "num_iterations": 2, "save_steps": 2,
        "max_grad_norm": 1e4,  # a norm is logged, and no gradient clipped
        "adam_epsilon": 1e-3,  # of gradients near 0 the usual one makes steps of full size: rounding, magnified
    }  # fmt: skip
    if (chunk := options.pop("chunk", None)) is not None:
        head.CHUNK, head.CHUNK_LOGITS = chunk, 0
    args = GRPOConfig(output, per_device_train_batch_size=8 // world_size, **(defaults | options))
    if args.deepspeed_plugin is not None:  # else tiny weights are whole on each rank, as no real ones are
        args.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    trainer = RecordingTrainer(
        model=f"{models}/policy", reward_funcs=[reward_slow_on_rank_1, f"{models}/reward"], args=args,
        train_dataset=Dataset.from_dict({"prompt": [f"question {i}" * (1 + i % 3) for i in range(12)]}),
        peft_config=peft_config,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(f"{output}/final")
    rank = trainer.accelerator.process_index
    Path(output, f"rank_{rank}.json").write_text(json.dumps(facts(trainer) | {"sampled": trainer.sampled}))
    if rank == 0:
        Path(output, "log.json").write_text(json.dumps(trainer.state.log_history))
    trainer.end()


def facts(trainer: RecordingTrainer) -> dict:
    """What this rank really ran on."""
    wrapped, optimizer = trainer.model_wrapped, trainer.optimizer.optimizer
    reference, runner = getattr(trainer.reference, "model", None), getattr(trainer.engine, "runner", None)
    return {
        "world_size": trainer.accelerator.num_processes,
        "backend": torch.distributed.get_backend() if torch.distributed.is_initialized() else None,
        "engine": trainer.accelerator.distributed_type.value,
        "wrapper": type(wrapped).__name__,
        "zero_stage": wrapped.zero_optimization_stage() if hasattr(wrapped, "zero_optimization_stage") else None,
        "optimizer": type(getattr(optimizer, "optimizer", optimizer)).__name__,
        "held": held(trainer.model),
        "held_of_reference": None if reference is None else held(reference),
        "packed": causal_lm(trainer.model).evaluation == "packed",
        "rollouts": type(trainer.engine).__name__,
        "short_decoder": runner is not None and runner.decoder is not None,
    }


def held(model: torch.nn.Module) -> int:
    """Weights on this rank."""

    def local(parameter) -> torch.Tensor:
        return parameter.to_local() if isinstance(parameter, DTensor) else getattr(parameter, "ds_tensor", parameter)

    return sum(local(parameter).numel() for parameter in model.parameters())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]))

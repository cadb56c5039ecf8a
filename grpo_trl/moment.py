"""What a run stopped in the middle of a step goes back to."""

import copy
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .metrics import Metrics
from .prompt_memory import PromptRecord
from .rollouts.dynamic import DynamicSampler

# of the trainer: numbers, and objects that are replaced and not changed
ATTRIBUTES = ("num_tokens", "completions_log", "current_flos", "_sampling_is_exact")


@dataclass
class Moment:
    """What a step changes before its update, as it was at the boundary: references and small copies, no
    synchronisation with the device. Weights and optimizer change in the update only."""

    loader: dict[str, Any]
    metrics: Metrics
    dynamic_sampler: DynamicSampler
    prompt_records: dict[str, PromptRecord]
    attributes: dict[str, Any]
    tr_loss: Tensor
    num_logs: int
    num_input_tokens_seen: int
    rng: dict[str, Any]

    @classmethod
    def of(cls, trainer: Any) -> "Moment":
        """The present one."""
        cuda = torch.cuda.is_available()
        return cls(
            trainer.loader.state_dict(),
            trainer.metrics.copy(),
            copy.copy(trainer.dynamic_sampler),
            dict(trainer.prompt_memory.records),
            {name: getattr(trainer, name) for name in ATTRIBUTES},
            trainer._tr_loss.clone(),
            len(trainer.state.log_history),
            trainer.state.num_input_tokens_seen,
            {
                "python": random.getstate(),
                "numpy": np.random.get_state(),
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state() if cuda else None,
            },
        )

    def put_back(self, trainer: Any) -> None:
        """Makes it the present one."""
        trainer.loader.load_state_dict(self.loader)
        trainer.metrics, trainer.dynamic_sampler = self.metrics, self.dynamic_sampler
        trainer.prompt_memory.records = self.prompt_records
        for name, value in self.attributes.items():
            setattr(trainer, name, value)
        trainer._tr_loss.copy_(self.tr_loss)
        del trainer.state.log_history[self.num_logs :]
        trainer.state.num_input_tokens_seen = self.num_input_tokens_seen
        random.setstate(self.rng["python"])
        np.random.set_state(self.rng["numpy"])
        torch.set_rng_state(self.rng["torch"])
        if self.rng["cuda"] is not None:
            torch.cuda.set_rng_state(self.rng["cuda"])

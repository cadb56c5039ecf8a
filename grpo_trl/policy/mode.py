"""Train and eval mode."""

import contextlib
from collections.abc import Iterator

from torch import nn
from trl.trainer.utils import disable_dropout_in_model

# of Switch Transformers and Mixtral, and of DBRX. PhiMoE's is part of its routing in evaluation too.
ROUTING_NOISE = {"jitter_noise", "input_jitter_noise", "moe_jitter_eps"}


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off, and with it gradient checkpointing, which layers apply in train mode only and which would disable
    the KV cache. Each module's own mode is restored, also after an exception."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def disable_dropout(model: nn.Module) -> None:
    """Every dropout rate to 0: of `nn.Dropout` modules, and of those that layers keep as a number and apply by
    `nn.functional` (attention dropout, layer drop), which TRL's helper leaves on; and the noise that routers of
    experts add in train mode."""
    disable_dropout_in_model(model)
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or "layerdrop" in name or name in ROUTING_NOISE):
                setattr(module, name, 0.0)

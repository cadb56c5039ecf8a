"""Train and eval mode."""

import contextlib
from collections.abc import Iterator

from torch import nn
from trl.trainer.utils import disable_dropout_in_model


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
    `nn.functional` (attention dropout, layer drop), which TRL's helper leaves on."""
    disable_dropout_in_model(model)
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or "layerdrop" in name):
                setattr(module, name, 0.0)

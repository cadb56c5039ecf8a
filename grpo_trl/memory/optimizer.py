"""What optimizers keep, by their names in `TrainingArguments.optim`."""

from collections.abc import Sequence

from torch import nn

# name -> values kept per trained parameter, and bytes of each (None: as the parameter's own)
STATES: dict[str, tuple[int, int | None]] = {
    "adamw_torch": (2, None),
    "adamw_torch_fused": (2, None),
    "adagrad": (1, None),
    "rmsprop": (1, None),
    "sgd": (0, None),
    "paged_adamw_32bit": (2, 4),
    "lion_32bit": (1, 4),
    "paged_lion_32bit": (1, 4),
    # of bitsandbytes, without its scales (a 64th)
    "adamw_bnb_8bit": (2, 1),
    "adamw_8bit": (2, 1),
    "paged_adamw_8bit": (2, 1),
    "lion_8bit": (1, 1),
    "paged_lion_8bit": (1, 1),
}


def is_known(optim: str) -> bool:
    """Whether what an optimizer keeps is in the table; others are taken for AdamW."""
    return optim in STATES


def optimizer_bytes(optim: str, trained: Sequence[nn.Parameter]) -> int:
    """Of the states of these parameters."""
    count, size = STATES.get(optim, STATES["adamw_torch"])
    return sum(count * parameter.numel() * (size or parameter.dtype.itemsize) for parameter in trained)


def step_bytes(optim: str, trained: Sequence[nn.Parameter], device: str) -> int:
    """What a step takes besides. Fused: nothing; `adamw_torch` has a list of all denominators on CUDA (foreach), and
    one at a time on the CPU."""
    if optim != "adamw_torch":
        return 0
    sizes = [parameter.nbytes for parameter in trained]
    return sum(sizes) if device == "cuda" else max(sizes, default=0)

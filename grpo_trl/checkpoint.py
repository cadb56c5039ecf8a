"""What a resumed run needs beyond transformers' own files, per rank: tensors as safetensors, numbers as JSON.

Loading executes no code.
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from .placement import input_device

REFERENCE_NAME = "reference.safetensors"


def save(folder: str, rank: int, state: dict[str, Any]) -> None:
    """Writes a rank's state: `state["loader"]["buffer"]` holds its tensors, everything else is plain numbers."""
    loader = dict(state["loader"])
    buffer = {name: tensor.contiguous().cpu() for name, tensor in loader.pop("buffer").items()}
    numbers, tensors = _files(folder, rank)
    numbers.parent.mkdir(parents=True, exist_ok=True)  # ranks other than 0 may be here first
    save_file(buffer, tensors)
    numbers.write_text(json.dumps({**state, "loader": loader}, indent=2))


def load(folder: str, rank: int) -> dict[str, Any]:
    """What `save` wrote.

    Raises:
        FileNotFoundError: the checkpoint has no state for this rank: it was written by another trainer, with
            save_only_model, or with fewer ranks.
    """
    numbers, tensors = _files(folder, rank)
    if not numbers.exists():
        raise FileNotFoundError(
            f"{numbers} is missing, so this run cannot be resumed from {folder}: the checkpoint was written by "
            "another trainer, with save_only_model=True, or with fewer ranks. Start from its weights instead (model=)."
        )
    state = json.loads(numbers.read_text())
    state["loader"]["buffer"] = load_file(tensors)
    return state


def save_reference(folder: str, model: nn.Module) -> None:
    """Writes a reference that changes during the run (`sync_ref_model`)."""
    save_model(model, str(Path(folder) / REFERENCE_NAME))


def load_reference(folder: str, model: nn.Module) -> None:
    """Restores what `save_reference` wrote."""
    load_model(model, Path(folder) / REFERENCE_NAME, device=str(input_device(model)))


def _files(folder: str, rank: int) -> tuple[Path, Path]:
    return Path(folder) / f"rollout_state_{rank}.json", Path(folder) / f"rollout_buffer_{rank}.safetensors"

"""What of the package `vllm` a trainer needs, where that cannot be installed: the names that TRL imports, over gloo
instead of NCCL, and an `LLM` that holds a real model."""

import contextlib
import importlib
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.rollouts.vllm_server import HOST, Group, complete, load_weights

# what looks for vLLM when it is imported
IMPORTERS = (
    "trl.generation",
    "trl.generation.vllm_client",
    "trl.generation.vllm_generation",
    "grpo_trl.rollouts.vllm_connection",
)


@dataclass
class SamplingParams:
    """The parameters of vLLM's that are sent to it; others are a TypeError, as there."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = 16
    logprobs: int | None = None
    seed: int | None = None
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    structured_outputs: Any = None
    min_tokens: int = 0


class LLM:
    """A copy of a model in this process. Asleep at level 2 it has lost its weights, as vLLM's has."""

    def __init__(self, model: str, **options: Any):
        self.options = options
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self._load))
        driver = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self.llm_engine = SimpleNamespace(model_executor=driver)
        self.awake = {"weights", "kv_cache"}
        self.loaded = 0

    def _load(self, weights: Any) -> None:
        assert "weights" in self.awake
        load_weights(self.model, weights)
        self.loaded += 1

    def generate(self, prompts: list[dict], sampling_params: list[SamplingParams], use_tqdm: bool) -> list[Any]:
        assert self.awake == {"weights", "kv_cache"}
        return [
            SimpleNamespace(
                outputs=[_output(*row) for row in complete(self.model, prompt["prompt_token_ids"], vars(p))]
            )
            for prompt, p in zip(prompts, sampling_params, strict=True)
        ]

    def sleep(self, level: int) -> None:
        assert level == 2
        self.awake = set()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.zero_()

    def wake_up(self, tags: list[str]) -> None:
        self.awake |= set(tags)

    def reset_prefix_cache(self) -> None:
        pass


def _output(ids: list[int], logps: list[float]) -> Any:
    entries = [{token: SimpleNamespace(logprob=logp, rank=1)} for token, logp in zip(ids, logps, strict=True)]
    return SimpleNamespace(token_ids=ids, logprobs=entries)


def _trainer_init(info: dict[str, Any]) -> Group:
    return Group(info["master_address"], info["master_port"], 0, info["world_size"])


def _broadcast_all(iterator: Any, group: Group, src: int, post_iter_func: Any) -> None:
    for item in iterator:
        group.broadcast(post_iter_func(item).detach().contiguous().view(torch.uint8).flatten().clone())


NAMES: dict[str, dict[str, Any]] = {
    "vllm": {"LLM": LLM, "RequestOutput": object, "SamplingParams": SamplingParams},
    "vllm.sampling_params": {"StructuredOutputsParams": SimpleNamespace},
    "vllm.utils": {},
    "vllm.utils.network_utils": {"get_ip": lambda: HOST},
    "vllm.distributed": {},
    "vllm.distributed.weight_transfer": {},
    "vllm.distributed.weight_transfer.nccl_common": {"trainer_init": _trainer_init},
    "vllm.distributed.weight_transfer.packed_tensor": {"packed_nccl_broadcast_producer": _broadcast_all},
}


@contextlib.contextmanager
def installed(folder: Path, version: str = "0.31.0") -> Iterator[None]:
    """For the time of the context `import vllm` finds the stand-in, as an installed package of this version."""
    info = folder / f"vllm-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        for name, members in NAMES.items():
            module = ModuleType(name)
            module.__spec__ = ModuleSpec(name, None, is_package=True)
            module.__path__ = []  # pyright: ignore[reportAttributeAccessIssue]
            vars(module).update(members, __version__=version)
            patch.setitem(sys.modules, name, module)
        for name in IMPORTERS:
            patch.delitem(sys.modules, name, raising=False)
        try:
            yield
        finally:
            for name in IMPORTERS:
                sys.modules.pop(name, None)


def weights_without_cuda(patch: pytest.MonkeyPatch) -> None:
    """TRL refuses devices without NCCL. Told that it has one, it sends over the group that there is: gloo's."""
    client = importlib.import_module("trl.generation.vllm_client").VLLMClient
    real = client.init_communicator
    patch.setattr(client, "init_communicator", lambda self, device: real(self, "cuda"))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return listener.getsockname()[1]

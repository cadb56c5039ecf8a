"""TRL's connection to vLLM, set up from a `GRPOConfig`, and what crosses it.

Imports vLLM, so it is itself imported only where that samples.
"""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import requests
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from trl.distributed import DistributedBackend
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration
from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
from vllm.sampling_params import StructuredOutputsParams  # pyright: ignore[reportMissingImports]

from ..config import GRPOConfig
from .vllm_checks import SERVE, check_server


def connect(args: GRPOConfig) -> VLLMClient:
    """A client of the server, which is waited for and checked.

    Raises:
        ConnectionError: no server after `vllm_server_timeout` seconds.
        ValueError: see `check_server`.
    """
    url = args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"
    _wait_for(url, args.vllm_server_timeout)
    client = VLLMClient(base_url=url)
    check_server(client, args)
    return client


def _wait_for(url: str, seconds: float) -> None:
    """Returns when the server says that it is well. TRL's client waits for ever where something else answers."""
    until = time.monotonic() + seconds
    while (trouble := _trouble(url)) is not None:
        if time.monotonic() >= until:
            raise ConnectionError(
                f"No vLLM server at {url} after {seconds} seconds: {trouble}. Start it with `{SERVE}`, or raise "
                "vllm_server_timeout."
            )
        time.sleep(1)


def _trouble(url: str) -> str | None:
    try:
        status = requests.get(f"{url}/health", timeout=10).status_code
    except requests.RequestException as error:
        return str(error)
    return None if status == 200 else f"/health answers {status}"


class Connection(VLLMGeneration):
    """TRL's `VLLMGeneration`: starts a copy (`llm`) or joins the server's group of ranks (on rank 0), and sends
    weights (`sync_weights`). Of adapters it gets a merged copy."""

    def __init__(self, model: Any, args: GRPOConfig, accelerator: Accelerator, max_concurrent_rows: int | None):
        tensor_parallel = args.vllm_tensor_parallel_size
        rollout = args.completions_per_rank * tensor_parallel
        super().__init__(
            model,
            accelerator,
            None,  # pyright: ignore[reportArgumentType]  # a processor, for images only
            mode=args.vllm_mode,
            server_base_url=args.vllm_server_base_url,
            server_host=args.vllm_server_host,
            server_port=args.vllm_server_port,
            server_timeout=args.vllm_server_timeout,
            group_port=args.vllm_group_port,
            tensor_parallel_size=tensor_parallel,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            max_model_length=args.vllm_max_model_length,
            max_num_seqs=max_concurrent_rows or rollout,
            enable_sleep_mode=args.vllm_enable_sleep_mode,
            model_impl=args.vllm_model_impl,
            trust_remote_code=args.trust_remote_code,
        )

    def _iter_named_params(self) -> Iterator[tuple[str, Tensor]]:
        if not isinstance(self.model, PeftModel):
            yield from super()._iter_named_params()
            return
        # TRL's own merges into the policy and takes the adapters out again, which rounds the frozen weights
        with DistributedBackend(self.accelerator).gather_params(list(self.model.parameters())):
            yield from merged_weights(self.model)


class Adapters:
    """Gives a server the policy's adapter alone, as files in `output_dir/_vllm_adapter`, which it must be able to read
    (`_*` is what a push to the Hub leaves out).

    Each state of the adapter has a name of its own, so that nothing cached for a former one is used.
    """

    def __init__(self, client: VLLMClient, model: PeftModel, args: GRPOConfig, accelerator: Accelerator):
        self.client, self.model, self.accelerator = client, model, accelerator
        self.folder = Path(args.output_dir or ".").resolve() / "_vllm_adapter"
        # the same on all ranks; a server outlives a run, and knows the names of one before
        self.run: str = broadcast_object_list([uuid4().hex[:8]])[0]
        self.name: str | None = None  # of what is loaded
        self.loaded = 0

    def sync_weights(self) -> None:
        """Every rank calls it; rank 0 writes the files and has them loaded.

        Raises:
            ValueError: the server does not load them.
        """
        self.loaded += 1
        former, self.name = self.name, f"policy_{self.run}_{self.loaded}"
        active = str(self.model.active_adapter)
        with DistributedBackend(self.accelerator).gather_params(list(self.model.parameters())):
            if self.accelerator.is_main_process:
                shutil.rmtree(self.folder, ignore_errors=True)
                self.model.save_pretrained(str(self.folder), selected_adapters=[active], save_embedding_layers=False)
        if self.accelerator.is_main_process:
            if former is not None:
                self._post("unload_lora_adapter", {"lora_name": former}, absent_is_fine=True)
            path = self.folder if active == "default" else self.folder / active  # as peft writes it
            self._post("load_lora_adapter", {"lora_name": self.name, "lora_path": str(path)})
        self.client.model = self.name  # what requests ask for

    def _post(self, endpoint: str, request: dict[str, str], *, absent_is_fine: bool = False) -> None:
        response = self.client.session.post(f"{self.client.base_url}/v1/{endpoint}", json=request)
        if response.status_code == 200 or (absent_is_fine and response.status_code == 404):
            return
        raise ValueError(
            f"The vLLM server at {self.client.base_url} refuses {endpoint} {request}: {response.status_code}, "
            f"{response.text}. It must be able to read {self.folder}; started without --enable-lora it is sent merged "
            "weights instead."
        )


def check_params(options: dict[str, Any]) -> None:
    """Raises a ValueError for `generation_kwargs` that vLLM's SamplingParams do not know, which a server ignores."""
    try:
        as_vllm_params(options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"generation_kwargs {options} are no SamplingParams of vLLM: {error}") from error


def as_vllm_params(options: dict[str, Any]) -> SamplingParams:
    """What a server takes as JSON, as objects."""
    structured = options.get("structured_outputs")
    extra = {"structured_outputs": StructuredOutputsParams(**structured)} if structured else {}
    return SamplingParams(**(options | extra))


def merged_weights(model: PeftModel) -> Iterator[tuple[str, Tensor]]:
    """Each weight under its name in the model without adapters, and whole: the active adapters are added to a copy,
    the policy's own stay as they are, bit for bit."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    trained = f".modules_to_save.{model.active_adapter}"
    for full_name, parameter in model.named_parameters():
        if model.prefix in full_name or ".original_module." in full_name:
            continue
        if ".modules_to_save." in full_name and trained not in full_name:
            continue
        name = full_name.removeprefix("base_model.model.").replace(trained, "").replace(".base_layer", "")
        layer_name, is_adapted, own_name = full_name.rpartition(".base_layer.")
        while layer_name.endswith(".base_layer"):  # to the outermost wrapper
            layer_name = layer_name.removesuffix(".base_layer")
        yield name, _merged(layers[layer_name], own_name) if is_adapted else parameter.data


def _merged(layer: Any, name: str) -> Tensor:
    wrappers = [layer]  # one in the other: peft wraps a module once for each of its `target_parameters`
    while isinstance(wrappers[-1].base_layer, BaseTunerLayer):
        wrappers.append(wrappers[-1].base_layer)
    parameters = list(layer.get_base_layer().parameters(recurse=False))
    before = [(parameter.data, parameter.data.clone()) for parameter in parameters]
    for wrapper in wrappers:
        wrapper.merge()
    merged = getattr(layer.get_base_layer(), name).data.clone()
    for wrapper in reversed(wrappers):
        wrapper.unmerge()
    for parameter, (data, saved) in zip(parameters, before, strict=True):
        data.copy_(saved)
        parameter.data = data
    return merged

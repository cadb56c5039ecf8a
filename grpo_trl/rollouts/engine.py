"""The rollout engine: token ids in, groups out. It knows no text, no rewards and no trainer."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from accelerate import Accelerator
from transformers import PreTrainedModel
from transformers.utils import logging

from ..batch import Group, Prompt
from ..config import GRPOConfig
from ..policy.logprobs import is_encoder_decoder, is_packed
from .hf_generate import HFGenerateEngine
from .native import NativeEngine
from .sampling import SamplingParams
from .transformers_cb import TransformersCBEngine
from .vllm import VLLMEngine
from .vllm_checks import check_vllm

logger = logging.get_logger(__name__)


class RolloutEngine(Protocol):
    """What an entry of `ENGINES` must offer. It is built with the unwrapped policy, whose weights it samples from, the
    options of engines in this process, and the run's arguments and accelerator."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_concurrent_rows: int | None = None,
        cache_implementation: str | None = None,
        cuda_graphs: bool = False,
        args: GRPOConfig,
        accelerator: Accelerator,
    ): ...

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Iterator[Group]:
        """Yields one group per prompt, as they finish. Leaves the model's mode and gradients as it found them."""
        ...

    def sync_weights(self, model: PreTrainedModel) -> None:
        """Takes over the policy's current weights; called before a rollout when they may have changed."""
        ...


ENGINES: dict[str, type[RolloutEngine]] = {
    "native": NativeEngine,
    "hf_generate": HFGenerateEngine,
    "vllm": VLLMEngine,
    "transformers_cb": TransformersCBEngine,
}


def make_engine(name: str, model: PreTrainedModel, *, sharded: bool = False, **options: Any) -> RolloutEngine:
    """The engine called `name`, sampling from `model`; `hf_generate` where the native one cannot run the model, or its
    weights stay `sharded` during rollouts.

    Raises:
        ValueError: no such engine, or one that cannot run the model.
    """
    check_engine(name)
    if name in ("vllm", "transformers_cb") and is_encoder_decoder(model):
        raise ValueError(
            f"rollout_engine={name!r} goes on from prompts, and {type(model).__name__} is an encoder-decoder; use "
            "'native' or 'hf_generate', which sample from it by model.generate."
        )
    if name == "native" and sharded:
        logger.warning(
            "Completions are sampled by model.generate, which gathers the weights at every token: "
            "ds3_gather_for_generation=False leaves them in shards."
        )
    if name == "native" and (sharded or not is_packed(model)):  # `policy.prepare` says why
        name = "hf_generate"
    return ENGINES[name](model, **options)


def check_engine(name: str) -> None:
    """Raises a ValueError when there is no engine of this name, or it is not installed."""
    if name not in ENGINES:
        raise ValueError(f"rollout_engine={name!r} is unknown; use one of {', '.join(ENGINES)}.")
    if name == "vllm":
        check_vllm()

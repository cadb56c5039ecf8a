"""What must hold before vLLM samples: that it is there, not too old, set up right, and can be given the policy."""

import importlib.metadata
import importlib.util
from typing import Any

from accelerate import Accelerator
from packaging.version import Version
from peft import LoraConfig, PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from transformers.utils import logging
from trl.distributed import DistributedBackend

from ..config import GRPOConfig
from ..config_vllm import length_problems
from ..policy import LEAVE_THE_BASE
from ..refused import raise_all

logger = logging.get_logger(__name__)

OLDEST, NEWEST = "0.22.0", "0.31.0"  # the versions that trl 1.16 speaks to; as in the extra `vllm`
SERVE = (
    "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs "
    """--weight-transfer-config '{"backend": "nccl"}'"""
)


def check_vllm() -> None:
    """Raises a ValueError when vLLM is not installed here, or too old."""
    engine = "rollout_engine 'vllm' (use_vllm)"
    remedy = f"pip install 'vllm>={OLDEST},<={NEWEST}', or use rollout_engine native"
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(f"{engine} needs vLLM, which is not installed (the client too); {remedy}.")
    version = importlib.metadata.version("vllm")
    if _is_too_old(version):
        raise ValueError(f"{engine} needs vLLM {OLDEST} to {NEWEST}, and {version} is installed; {remedy}.")


def check_server(client: Any, args: GRPOConfig) -> None:
    """Raises a ValueError when the server is too old, cuts completions, or its log-probabilities are not those of what
    it samples."""
    config = client.get_server_info()["model_config"]
    raise_all(length_problems(config["max_model_len"], f"The vLLM server at {client.base_url}", args))
    mode = config["logprobs_mode"]
    if mode != "processed_logprobs":
        raise ValueError(
            f"The vLLM server at {client.base_url} runs with --logprobs-mode {mode}: log-probabilities without "
            f"temperature and truncation, not of what it samples. Start it with `{SERVE}`."
        )
    theirs, ours = client._get(f"{client.base_url}/version")["version"], importlib.metadata.version("vllm")
    if _is_too_old(theirs):
        raise ValueError(f"The vLLM server at {client.base_url} is version {theirs}; use {OLDEST} to {NEWEST}.")
    if theirs != ours:
        logger.warning(f"The vLLM server is version {theirs}, and the trainer has {ours}: weights may not get across.")


def takes_adapters(client: Any, model: Any) -> bool:
    """Whether the server can load the policy's adapter as it is, instead of whole merged weights."""
    config = model.peft_config[str(model.active_adapter)] if isinstance(model, PeftModel) else None
    if not isinstance(config, LoraConfig) or config.use_dora or config.modules_to_save:
        return False  # no adapter, or one of a kind that vLLM does not load
    if config.rank_pattern or config.alpha_pattern:
        return False  # vLLM scales the whole adapter by lora_alpha / r
    if config.init_lora_weights not in LEAVE_THE_BASE or config.bias != "none" or _unmergeable(model):
        return False  # it is not all that differs from the base
    info = client._get(f"{client.base_url}/server_info", params={"config_format": "json"})
    lora = info["vllm_config"].get("lora_config")
    if not lora or not info.get("vllm_env", {}).get("VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        return False
    if config.r > lora["max_lora_rank"]:
        logger.warning(
            f"The vLLM server takes adapters up to rank {lora['max_lora_rank']} and this one has {config.r}: whole "
            "merged weights are sent. Start it with a higher --max-lora-rank to send the adapter alone."
        )
        return False
    return True


def check_ranks(model: Any, accelerator: Accelerator) -> None:
    """Raises a ValueError for adapters in shards that cannot be put together."""
    if isinstance(model, PeftModel) and DistributedBackend(accelerator).is_fsdp:
        raise ValueError("Adapters cannot be gathered from shards of FSDP for vLLM; use DDP or DeepSpeed.")


def check_weights(model: Any, args: GRPOConfig) -> None:
    """Raises a ValueError for a policy whose whole weights vLLM cannot be given."""
    if getattr(model, "is_quantized", False):
        raise ValueError(
            "vLLM cannot be sent the weights of a quantised policy; use rollout_engine native for QLoRA, or a server "
            "that loads adapters (VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, --enable-lora), and LoRA without "
            "rank_pattern, alpha_pattern, DoRA and modules_to_save."
        )
    if isinstance(model, PeftModel) and (reason := _unmergeable(model)):
        raise ValueError(f"vLLM cannot be sent weights with this adapter merged into them: {reason}.")
    if args.vllm_mode == "colocate" and not model.name_or_path:
        raise ValueError("vllm_mode 'colocate' loads the model by its path or id; pass one as `model`, not an object.")


def _unmergeable(model: PeftModel) -> str | None:
    """Why the weights of a policy with its adapter are not those of a model without one."""
    config: Any = model.peft_config[str(model.active_adapter)]
    if config.is_prompt_learning or config.peft_type == PeftType.ADALORA:
        return f"it is of the kind {config.peft_type.value}"
    if getattr(config, "lora_bias", False) or getattr(config, "trainable_token_indices", None):
        return "leave out lora_bias and trainable_token_indices"
    base: Any = model.get_base_model()
    adapted = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    both = (base.get_input_embeddings(), base.get_output_embeddings())
    if base.config.get_text_config().tie_word_embeddings and any(isinstance(layer, adapted) for layer in both):
        return "it changes the embedding or the head, which are one weight in this model; leave both out"
    return None


def _is_too_old(version: str) -> bool:
    return Version(Version(version).base_version) < Version(OLDEST)

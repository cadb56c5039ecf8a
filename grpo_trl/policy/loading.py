"""The policy from what the user passed: a path or a model, with or without an adapter."""

import copy
import os
from typing import TYPE_CHECKING, Any

import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    PeftConfig,
    PeftModel,
    PeftType,
    TaskType,
    get_peft_model,
)
from peft.utils import CONFIG_NAME
from transformers import PreTrainedModel
from transformers.utils import logging
from trl.trainer.utils import create_model_from_path

from ..config import GRPOConfig, mapping
from ..placement import is_fsdp, is_zero3

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

logger = logging.get_logger(__name__)


def load_policy(
    model: str | PreTrainedModel | PeftModel,
    args: GRPOConfig,
    *,
    quantization_config: "BitsAndBytesConfig | None" = None,
    peft_config: PeftConfig | None = None,
) -> PreTrainedModel | PeftModel:
    """Loads a path on the one device of this rank's policy, or takes an instance, and adds the adapter.

    Raises:
        TypeError: what was passed as `peft_config` is none.
        ValueError: a quantisation config twice; prompt tuning; `peft_config` together with a model that already has
            an adapter; a model with nothing to train.
    """
    if peft_config is not None and not isinstance(peft_config, PeftConfig):
        raise TypeError(
            f"peft_config must be a peft.PeftConfig (a LoraConfig, say), got {type(peft_config).__name__}."
        )
    if isinstance(model, str):
        model = _from_path(model, args, quantization_config)
    elif given := [
        name
        for name, value in (
            ("model_init_kwargs", args.model_init_kwargs),
            ("quantization_config", quantization_config),
        )
        if value
    ]:
        logger.warning(
            f"{' and '.join(given)} without effect: the model was passed as an instance, which is taken as it is. "
            "Pass its path to have it loaded with them."
        )
    if getattr(model, "_hf_peft_config_loaded", False):  # private, but all that tells
        raise ValueError(
            "The model has an adapter of transformers' own (model.add_adapter), from whose checkpoints a run could "
            "not be resumed: pass the base model with peft_config, or a PeftModel."
        )
    if args.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise ValueError(
            f"{type(model).__name__} does not support gradient checkpointing, which is on by default; set "
            "gradient_checkpointing=False."
        )
    adapter = peft_config or getattr(model, "active_peft_config", None)
    check_adapter(adapter, args, is_encoder_decoder=model.config.is_encoder_decoder)
    if peft_config is not None:
        model = _add_adapter(model, args, peft_config)
    if isinstance(model, PeftModel) and args.beta and args.ref_model_name_or_path is None:
        _check_biases(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "The model has no trainable parameter. Load its adapter with "
            "`PeftModel.from_pretrained(..., is_trainable=True)`, or pass peft_config."
        )
    if is_quantized(model) and args.device.type == "cpu":
        # bitsandbytes 0.50 repacks 4-bit weights at the first forward in eval mode, for a kernel without backward
        raise ValueError(
            "A policy with quantised weights cannot be trained on the CPU: its gradients would be zero after the "
            "first rollout. Leave quantization_config (load_in_4bit, load_in_8bit) out, or train on a GPU."
        )
    if isinstance(model, PeftModel) and args.gradient_checkpointing:
        # a frozen embedding gives inputs without gradients, and checkpointing would cut the graph there
        model.enable_input_require_grads()
    return model


def check_adapter(config: PeftConfig | None, args: GRPOConfig, *, is_encoder_decoder: bool) -> None:
    """Refuses adapters that would not do what they say: those whose forward puts tokens before those that it is given
    (positions would be others) or acts from a token on (the last one like it, also of a completion), and a prefix with
    gradient checkpointing or an encoder."""
    if config is None:
        return
    if config.is_prompt_learning and config.peft_type != PeftType.PREFIX_TUNING:
        raise ValueError(
            f"The adapter of a {type(config).__name__} adds tokens to the prompt, which is not supported; use LoRA or "
            "prefix tuning."
        )
    if config.is_prompt_learning and is_encoder_decoder:
        raise ValueError("Prefix tuning of an encoder-decoder is not supported, whose masks it would shift; use LoRA.")
    if config.is_prompt_learning and args.gradient_checkpointing:
        raise ValueError(
            "Prefix tuning gives each layer keys and values, which gradient checkpointing would add twice; set "
            "gradient_checkpointing=False."
        )
    if getattr(config, "alora_invocation_tokens", None):
        raise ValueError(
            "aLoRA (alora_invocation_tokens) acts on a part of each row, which is not supported; use LoRA."
        )
    if config.peft_type == PeftType.ADALORA:
        logger.warning("AdaLoRA's rank stays at init_r and orth_reg_weight has no effect: no trainer calls them.")


def _check_biases(model: PeftModel) -> None:
    """Refuses an adapter whose `bias` trains those of the base, which no reference could have as they were."""
    bias = getattr(model.peft_config[str(model.active_adapter)], "bias", "none")
    if bias == "none":
        return
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if any(
        name.endswith(".bias") and not any(own in name for own in (model.prefix, "modules_to_save"))
        for name in trained
    ):
        raise ValueError(
            f"The adapter's bias={bias!r} trains biases of the base model, which stay as they are when the "
            "adapter is off, so the reference of the KL term would move with the policy. Use bias='none', beta=0, or "
            "give ref_model_name_or_path."
        )


def _from_path(path: str, args: GRPOConfig, quantization_config: Any) -> PreTrainedModel | PeftModel:
    """A whole model; or, from a folder with an adapter (what a LoRA run saves), its base with that adapter."""
    options: dict[str, Any] = {"device_map": policy_device_map(args)} | from_pretrained_options(args)
    if quantization_config is not None:
        if options.get("quantization_config") is not None:
            raise ValueError(
                "quantization_config was passed to the trainer and in model_init_kwargs; leave out one of them."
            )
        options["quantization_config"] = quantization_config
    if holds_adapter(path):
        options.setdefault("dtype", torch.float32)  # as TRL's function below
        of_encoder = PeftConfig.from_pretrained(path).task_type == TaskType.SEQ_2_SEQ_LM
        auto_class = AutoPeftModelForSeq2SeqLM if of_encoder else AutoPeftModelForCausalLM
        return auto_class.from_pretrained(path, is_trainable=True, **options)
    return create_model_from_path(path, None, **options)


def holds_adapter(path: str) -> bool:
    """Whether a folder has an adapter of PEFT, as a LoRA run saves it."""
    return os.path.isfile(os.path.join(path, CONFIG_NAME))


def from_pretrained_options(args: GRPOConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained` for the policy and its reference."""
    return {"trust_remote_code": args.trust_remote_code} | mapping(args.model_init_kwargs)


def policy_device_map(args: GRPOConfig) -> dict[str, torch.device] | None:
    """One explicit device, where the default of `from_pretrained` wrappers, "auto", may spread the policy over every
    visible GPU (`model_init_kwargs` can still say so). DeepSpeed and FSDP place the weights themselves."""
    if args.deepspeed_plugin is not None or is_fsdp():
        return None
    return {"": args.device}


def is_quantized(model: PreTrainedModel | PeftModel) -> bool:
    """Whether the base weights are in 4 or 8 bit."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def _add_adapter(model: PreTrainedModel | PeftModel, args: GRPOConfig, peft_config: PeftConfig) -> PeftModel:
    if isinstance(model, PeftModel):
        raise ValueError(
            "peft_config was passed with a model that already has an adapter. Leave peft_config out to train that "
            "adapter, or merge it first (`model.merge_and_unload()`) and pass the merged model with peft_config."
        )
    if model.config.is_encoder_decoder and peft_config.task_type == TaskType.CAUSAL_LM:  # TRL's default
        peft_config = copy.copy(peft_config)
        peft_config.task_type = TaskType.SEQ_2_SEQ_LM  # or nobody could load what is saved
    # ZeRO-3 gathers with one dtype, so adapters stay in that of the base (huggingface/trl#6089)
    keep_dtype = is_zero3(args.deepspeed_plugin) and not is_quantized(model)
    peft_model = get_peft_model(model, peft_config, autocast_adapter_dtype=not keep_dtype)
    if is_quantized(model):
        # QLoRA, arXiv 2305.14314, section 3: adapters in bf16. DoRA's magnitudes stay: their updates would round away
        for name, parameter in peft_model.named_parameters():
            if parameter.requires_grad and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    return peft_model

"""Models from their configurations alone, by the rules by which real ones are loaded: weights on the meta device."""

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from ..config import GRPOConfig, mapping
from ..policy import (
    causal_lm,
    disable_dropout,
    freeze_adapter,
    holds_adapter,
    load_policy,
    needs_frozen_adapter,
    needs_reference_model,
    prepare,
)
from ..policy.loading import from_pretrained_options
from ..policy.reference import reference_options
from ..rewards.model import base_model

META = torch.device("meta")


@dataclass(frozen=True)
class PolicySpec:
    """What the policy is made from: the arguments of `GRPOTrainer` that say so."""

    path: str
    quantization_config: BitsAndBytesConfig | None = None
    peft_config: PeftConfig | None = None


def policy_of(spec: PolicySpec, args: GRPOConfig) -> Any:
    """The policy as `assembly.load_models` makes it, adapter and frozen reference adapter included.

    Raises:
        ValueError, OSError: what `load_policy` raises, and a path without a configuration.
    """
    path, peft_config = spec.path, spec.peft_config
    trained = holds_adapter(path)
    if trained:
        peft_config = PeftConfig.from_pretrained(path)
        peft_config.inference_mode = False  # a saved adapter's is True; the policy's is trained further
        path = str(peft_config.base_model_name_or_path)
    options = from_pretrained_options(args)
    taken = copy.copy(args)
    taken.model_init_kwargs = None  # what they say is done here
    with META:
        model = _from_config(AutoModelForCausalLM, path, options)
        quantization = spec.quantization_config or quantization_of(options, model.config)
        if quantization is not None:
            # what is known of quantised weights by their names; their layers stay plain, and are counted by `weights`
            model.is_loaded_in_4bit, model.is_loaded_in_8bit = quantization.load_in_4bit, quantization.load_in_8bit
        policy = load_policy(model, taken, peft_config=peft_config)
        if isinstance(policy, PeftModel):
            config = policy.peft_config[str(policy.active_adapter)]
            if needs_frozen_adapter(args, config, is_new=not trained):
                freeze_adapter(policy)
    if args.disable_dropout:
        disable_dropout(policy)
    prepare(policy, args.device.type)
    return policy


def reference_of(policy: Any, spec: PolicySpec, args: GRPOConfig) -> Any | None:
    """The frozen model of `load_reference_model`, or None."""
    if not needs_reference_model(args, has_adapter=isinstance(policy, PeftModel)):
        return None
    with META:
        options = reference_options(args, spec.path)
        model = _from_config(AutoModelForCausalLM, args.ref_model_name_or_path or spec.path, options)
    prepare(model)
    return model.requires_grad_(False)


def quantization_of(options: dict[str, Any], config: Any) -> BitsAndBytesConfig | None:
    """How bitsandbytes quantises a model by the arguments of `from_pretrained`, or has quantised it by its config."""
    found = options.get("quantization_config") or getattr(config, "quantization_config", None)
    if isinstance(found, dict):
        ours = found.get("quant_method", "bitsandbytes") == "bitsandbytes"
        return cast(BitsAndBytesConfig, BitsAndBytesConfig.from_dict(found)) if ours else None
    return found if isinstance(found, BitsAndBytesConfig) else None


def unknown_quantization(config: Any) -> str | None:
    """The method by which a checkpoint is quantised, where its sizes are not known here."""
    found = getattr(config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else None
    return None if method in (None, "bitsandbytes") else str(method)


def reward_model_of(path: str, args: GRPOConfig) -> Any:
    """A reward model, in its own dtype unless `reward_model_init_kwargs` name one."""
    options = {"trust_remote_code": args.trust_remote_code} | mapping(args.reward_model_init_kwargs)
    options.setdefault("dtype", options.pop("torch_dtype", "auto"))  # the latter is its former name in transformers
    with META:
        model = _from_config(AutoModelForSequenceClassification, base_model(path), options, num_labels=1)
        if base_model(path) != path:
            model.add_adapter(PeftConfig.from_pretrained(path))  # as `load_adapter` does, whatever its task
    return model.requires_grad_(False)


def _from_config(auto_class: Any, path: str, options: dict[str, Any], **changes: Any) -> Any:
    trust = {"trust_remote_code": options.get("trust_remote_code", False)}
    config = AutoConfig.from_pretrained(path, revision=options.get("revision") or "main", **trust, **changes)
    if config.is_encoder_decoder and auto_class is AutoModelForCausalLM:
        raise ValueError(
            f"{path} is an encoder-decoder, which is not planned. `grpo-trl check` runs it on a few rows."
        )
    dtype = options.get("dtype", "float32")
    if dtype in ("auto", None):
        dtype = getattr(config, "dtype", None) or torch.float32
    if isinstance(dtype, str):
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"{path}: dtype={dtype!r} is unknown; use auto, float32, bfloat16 or float16.")
        dtype = getattr(torch, dtype)
    return auto_class.from_config(config, dtype=dtype, attn_implementation=options.get("attn_implementation"), **trust)


def unique_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Each parameter once, by its first name: tied weights are in memory once."""
    return dict(model.named_parameters())


def weights(model: nn.Module, quantization: BitsAndBytesConfig | None = None) -> dict[str, int]:
    """Bytes of each parameter and buffer, by name."""
    sizes = {name: parameter.nbytes for name, parameter in unique_parameters(model).items()}
    if quantization is not None:
        sizes |= {name: quantized_bytes(p.numel(), p.shape[0], quantization) for name, p in quantized(model).items()}
    return sizes | {name: buffer.nbytes for name, buffer in model.named_buffers()}


def quantized(model: nn.Module) -> dict[str, Tensor]:
    """The weights that bitsandbytes keeps in 4 or 8 bit: of linear layers, but for head and adapters."""
    head = causal_lm(model).get_output_embeddings()
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and not module.weight.requires_grad
        if "lora_" not in name
    }


def quantized_bytes(numel: int, rows: int, quantization: BitsAndBytesConfig) -> int:
    """Of one weight: 4 bit with an fp32 scale per 64 (nested: in 8 bit, with an fp32 scale per 256 of them), or
    8 bit with an fp32 scale per row."""
    if quantization.load_in_8bit:
        return numel + 4 * rows
    blocks = -(-numel // 64)
    scales = blocks + 4 * -(-blocks // 256) if quantization.bnb_4bit_use_double_quant else 4 * blocks
    return numel // 2 + scales

"""From the trainer's `reward_funcs` to reward functions: names, dotted paths, functions and reward models together."""

import math
import os
from collections.abc import Sequence
from numbers import Real
from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedTokenizerBase

from ..config import GRPOConfig, mapping
from ..placement import DeviceMap, refuse_empty, whole_models
from .model import RewardModel, base_model, check_one_label
from .registry import REWARDS, TRL_NAMES, RewardFunction, resolve_reward
from .scoring import RewardScorer

RewardSpec = str | nn.Module | RewardFunction


def check_rewards(specs: Sequence[RewardSpec], processing_classes: Any, args: GRPOConfig) -> None:
    """Everything about the rewards that can be wrong before a model is loaded.

    Raises:
        ValueError: no reward, a name or path that leads to no function, a reward model without a config or with
            several labels, options for reward models where none is loaded, another number of weights or tokenizers
            than rewards, a time-out on a function that no process can import.
    """
    if not specs:
        raise ValueError("reward_funcs is empty; pass at least one function, registered name or reward model.")
    for spec in specs:
        if isinstance(spec, str) and is_reward_model(spec):
            path = base_model(spec)
            config = check_config(path, f"reward model {path!r}", args.reward_model_init_kwargs, args)
            said = "num_labels" in mapping(args.reward_model_init_kwargs)
            if path == spec and not said:  # the base of an adapter is often a causal LM
                check_one_label(config, path)
    if args.reward_model_init_kwargs and not any(map(is_reward_model, specs)):
        raise ValueError(
            "reward_model_init_kwargs has no effect: no reward is a model that is loaded here (a RewardModel of one's "
            "own has its model_init_kwargs); leave it out."
        )
    functions = [
        resolve_reward(spec, max_completion_length=args.max_completion_length)
        for spec in specs
        if not is_reward_model(spec)
    ]
    if functions:
        RewardScorer(functions, timeout=args.reward_timeout)  # its processes start at the first call
    for given in processing_classes if isinstance(processing_classes, Sequence) else [processing_classes]:
        if not isinstance(given, PreTrainedTokenizerBase | None):
            raise ValueError(
                f"reward_processing_classes has a {type(given).__name__}; expected tokenizers (of a processor: its "
                "`tokenizer`), None for functions."
            )
    if isinstance(processing_classes, Sequence) and len(processing_classes) != len(specs):
        raise ValueError(
            f"reward_processing_classes has {len(processing_classes)} entries for {len(specs)} rewards; give one each "
            "(None for functions)."
        )
    if isinstance(processing_classes, PreTrainedTokenizerBase) and sum(map(is_reward_model, specs)) > 1:
        raise ValueError(
            "reward_processing_classes is one tokenizer for several reward models; give a list with one each (None: "
            "the model's own)."
        )
    check_weights(args.reward_weights, len(specs))


def check_config(path: str, what: str, options: Any, args: GRPOConfig) -> Any:
    """The config at `path`, of the `revision` and with the trust that `options` name. Raises ValueError where it
    cannot be loaded."""
    taken = {"revision": "main", "trust_remote_code": args.trust_remote_code}
    taken |= {name: value for name, value in mapping(options).items() if name in taken}
    try:
        return AutoConfig.from_pretrained(path, **taken)
    except (OSError, ValueError) as error:  # of which some do not name the model
        raise ValueError(f"{what} cannot be loaded: {error}") from error


def check_weights(weights: Sequence[float] | None, count: int) -> None:
    """Raises a ValueError unless there is one finite number for each of `count` rewards, or None."""
    if weights is None:
        return
    if len(weights) != count:
        raise ValueError(f"reward_weights has {len(weights)} values for {count} reward functions; give one each.")
    # a weight of NaN would make of every reward one that does not apply, and so leave the function out without a word
    if wrong := [weight for weight in weights if not (isinstance(weight, Real) and math.isfinite(weight))]:
        raise ValueError(f"reward_weights has {wrong}; expected finite numbers (0: the reward is logged only).")
    if not any(weights):
        raise ValueError("reward_weights are all 0: no completion would have a reward.")


def load_rewards(
    specs: Sequence[RewardSpec],
    processing_classes: PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase | None] | None,
    args: GRPOConfig,
    device_map: DeviceMap,
) -> list[RewardFunction]:
    """The reward functions; reward models are loaded on `device_map`."""
    if processing_classes is None or isinstance(processing_classes, PreTrainedTokenizerBase):
        processing_classes = [processing_classes] * len(specs)  # pyright: ignore[reportAssignmentType]
    assert isinstance(processing_classes, Sequence)
    with whole_models(args):
        return [
            _load_model(spec, tokenizer, args, device_map)
            if is_reward_model(spec)
            else resolve_reward(spec, max_completion_length=args.max_completion_length)
            for spec, tokenizer in zip(specs, processing_classes, strict=True)
        ]


def is_reward_model(spec: RewardSpec) -> bool:
    """A classifier (with an adapter or not), an existing folder, or a Hub id (`organisation/name`)."""
    if not isinstance(spec, str):
        return isinstance(spec, nn.Module) and hasattr(getattr(spec, "config", None), "num_labels")
    return spec not in {*REWARDS, *TRL_NAMES} and (os.path.isdir(spec) or "/" in spec)


def _load_model(
    spec: Any, tokenizer: PreTrainedTokenizerBase | None, args: GRPOConfig, device_map: DeviceMap
) -> RewardModel:
    options = mapping(args.reward_model_init_kwargs)
    if isinstance(spec, nn.Module):
        refuse_empty(spec, f"The reward model {type(spec).__name__}")
    return RewardModel(
        spec,
        tokenizer,
        device_map=device_map,
        dtype=options.pop("dtype", None),
        batch_size=args.reward_batch_size,
        max_length=args.reward_max_length,
        input_format=args.reward_input_format,
        trust_remote_code=args.trust_remote_code,
        chat_template_kwargs=mapping(args.chat_template_kwargs),
        model_init_kwargs=options,
    )

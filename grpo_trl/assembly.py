"""What the trainer is put together from: checked arguments, tokenizer, sampling parameters, devices, callbacks."""

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainerCallback
from trl.trainer.utils import get_config_model_id

from .callbacks import EpochExportCallback, LossNoteCallback, MetricsPlotCallback, SyncReferenceCallback
from .config import GRPOConfig, mapping
from .placement import DeviceMap, resolve_device_map
from .prompts import check_prompt_dataset
from .rewards import check_rewards
from .rollouts import EVAL_STREAM, SamplingParams, check_engine

logger = logging.getLogger(__name__)

# each completion is one sample, ended by the EOS tokens of model and tokenizer
UNUSABLE_GENERATION_KWARGS = (
    "num_beams",
    "num_return_sequences",
    "do_sample",
    "max_length",
    "eos_token_id",
    "pad_token_id",
    "return_dict_in_generate",
)


def problems(
    args: GRPOConfig, reward_funcs: list[Any], train_dataset: Any, eval_dataset: Any, refused: dict[str, Any]
) -> list[str]:
    """Everything that can be known to be wrong before a model is loaded."""
    found = [
        f"{name} is a TRL argument that is not available here; override GRPOTrainer.rollout (see docs/rollouts.md)."
        for name, value in refused.items()
        if value is not None
    ]
    eval_datasets = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset} if eval_dataset else {}
    checks: list[Callable[[], Any]] = [
        lambda: check_engine(args.rollout_engine),
        lambda: check_rewards(reward_funcs, args),
        lambda: check_prompt_dataset(train_dataset, where="train_dataset"),
    ]
    for name, dataset in eval_datasets.items():
        checks.append(
            lambda name=name, dataset=dataset: check_prompt_dataset(dataset, where=f"eval_dataset {name}".strip())
        )
    for check in checks:
        try:
            check()
        except (ValueError, TypeError) as error:
            found.append(str(error))
    return found


def load_tokenizer(
    model: Any, args: GRPOConfig, processing_class: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase:
    if processing_class is None:
        path = model if isinstance(model, str) else get_config_model_id(model.config)
        processing_class = AutoTokenizer.from_pretrained(
            path,
            revision=mapping(args.model_init_kwargs).get("revision", "main"),
            trust_remote_code=args.trust_remote_code,
            padding_side="left",
        )
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise TypeError(
            f"processing_class must be a tokenizer (PreTrainedTokenizerBase), got {type(processing_class).__name__}; "
            "multimodal processors are not supported, pass processor.tokenizer."
        )
    if processing_class.pad_token is None:
        processing_class.pad_token = processing_class.eos_token
    return processing_class


def train_sampling(args: GRPOConfig, policy: Any, tokenizer: Any) -> SamplingParams:
    """Training's sampling. Every EOS id that the model declares ends a completion, and the tokenizer's."""
    declared = policy.generation_config.eos_token_id
    declared = [] if declared is None else [declared] if isinstance(declared, int) else declared
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    eos = tuple(dict.fromkeys([*own, *declared]))
    if not eos:
        raise ValueError(
            "Neither the tokenizer nor the model's generation config has an EOS token, so no completion could end; "
            "set tokenizer.eos_token."
        )
    options = mapping(args.generation_kwargs)
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    sampling = {name: options.pop(name, getattr(args, name)) for name in names}
    unusable = [name for name in UNUSABLE_GENERATION_KWARGS if name in options]
    if unusable:
        raise ValueError(
            f"generation_kwargs {', '.join(unusable)} cannot be used: each completion is one sample. Use "
            "num_generations, max_completion_length and temperature instead."
        )
    params = SamplingParams(
        num_generations=args.num_generations,
        max_completion_length=options.pop("max_new_tokens", args.max_completion_length),
        eos_token_ids=eos,
        pad_token_id=tokenizer.pad_token_id,
        seed=args.seed,
        generation_kwargs=options,
        **sampling,
    )
    if params.truncates:
        logger.warning(
            "top_p, top_k, min_p or repetition_penalty truncate the sampling distribution: the log-probabilities "
            "of the update are not those that sampled, and the importance ratio leaves out the kept mass. Set "
            "top_p=1, top_k=0, min_p=None and repetition_penalty=1 for an exact ratio."
        )
    return params


def eval_sampling(args: GRPOConfig, train: SamplingParams) -> SamplingParams:
    """Evaluation's own numbers; without a temperature of its own, that of training."""
    return replace(
        train,
        stream=EVAL_STREAM,
        num_generations=args.num_generations_eval or args.num_generations,
        temperature=train.temperature if args.eval_temperature is None else args.eval_temperature,
        max_completion_length=args.eval_max_completion_length or train.max_completion_length,
    )


def device_map(args: GRPOConfig, device: str | dict | None) -> DeviceMap:
    """`ref_device` or `reward_device`, resolved on this machine."""
    num_local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return resolve_device_map(device, args.device, num_gpus=torch.cuda.device_count(), num_local_ranks=num_local_ranks)


def default_callbacks(trainer: Any, reference_model: nn.Module | None) -> list[TrainerCallback]:
    """What a run shows and leaves behind, as configured."""
    args: GRPOConfig = trainer.args
    callbacks: list[TrainerCallback] = [_EpochOfLoader(trainer), LossNoteCallback()]
    if args.plot_metrics:
        callbacks.append(MetricsPlotCallback())
    if args.save_epochs:
        callbacks.append(EpochExportCallback(trainer))
    if args.sync_ref_model and reference_model is not None:
        mixup, every = args.ref_model_mixup_alpha, args.ref_model_sync_steps
        callbacks.append(SyncReferenceCallback(reference_model, mixup, every))
    return callbacks


class _EpochOfLoader(TrainerCallback):
    """`state.epoch` from the loader's position: transformers counts it from the resume when no batch is skipped."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        loader = self.trainer.loader
        if loader.source.num_prompts is not None:
            state.epoch = loader.position / len(loader)

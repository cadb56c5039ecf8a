"""What the trainer is put together from: its arguments checked, the tokenizer, the sampling parameters."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import get_config_model_id

from .config import GRPOConfig
from .prompts import check_prompt_dataset
from .rewards import check_rewards
from .rollouts import EVAL_STREAM, SamplingParams, check_engine


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
    model: str | PreTrainedModel, args: GRPOConfig, processing_class: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase:
    if processing_class is None:
        path = model if isinstance(model, str) else get_config_model_id(model.config)
        processing_class = AutoTokenizer.from_pretrained(
            path,
            revision=(args.model_init_kwargs or {}).get("revision", "main"),
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


def train_sampling(args: GRPOConfig, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> SamplingParams:
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
    options = dict(args.generation_kwargs or {})
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    sampling = {name: options.pop(name, getattr(args, name)) for name in names}
    unusable = [name for name in ("num_beams", "num_return_sequences", "do_sample", "max_length") if name in options]
    if unusable:
        raise ValueError(
            f"generation_kwargs {', '.join(unusable)} cannot be used: each completion is one sample. Use "
            "num_generations, max_completion_length and temperature instead."
        )
    return SamplingParams(
        num_generations=args.num_generations,
        max_completion_length=options.pop("max_new_tokens", args.max_completion_length),
        eos_token_ids=eos,
        pad_token_id=tokenizer.pad_token_id,
        seed=args.seed,
        generation_kwargs=options,
        **sampling,
    )


def eval_sampling(args: GRPOConfig, train: SamplingParams) -> SamplingParams:
    """Evaluation's own numbers; without a temperature of its own, that of training."""
    return replace(
        train,
        stream=EVAL_STREAM,
        num_generations=args.num_generations_eval or args.num_generations,
        temperature=train.temperature if args.eval_temperature is None else args.eval_temperature,
        max_completion_length=args.eval_max_completion_length or train.max_completion_length,
    )

"""`GRPOConfig`: TRL's names and meanings, this project's defaults, and every check that needs no model."""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any

import torch
from torch.distributed.distributed_c10d import _set_pg_timeout
from transformers import CompileConfig, TrainingArguments

from .algorithm import (
    AGGREGATIONS,
    IMPORTANCE_SAMPLING_LEVELS,
    KL_ESTIMATORS,
    LOSS_TYPES,
    SURROGATES,
    VARIANTS,
    Variant,
)
from .algorithm.advantages import BASELINES, SCALE_REWARDS
from .algorithm.token_weights import TOKEN_WEIGHTINGS
from .config_checks import (
    BATCH_RANGES,
    CHOICES,
    DICT_OR_WORD,
    RANGES,
    combination_problems,
    json_problems,
    optimizer_problems,
    trainer_problems,
    value_problems,
)
from .config_types import about, type_problems
from .config_vllm import (
    VLLMArguments,
    length_problems,
    resolve_vllm,
    vllm_generation_kwargs,
    vllm_kwargs_problems,
)
from .generation_kwargs import AS_IT_IS, generation_problems, is_compile_config
from .generation_kwargs import FIELDS as GENERATION_FIELDS
from .refused import UNUSED, raise_all, refuse, unused

logger = logging.getLogger(__name__)

# The fields that a row of VARIANTS governs: None means "as the row says".
GOVERNED = tuple(f.name for f in fields(Variant) if f.name != "paper")

# What the governed fields may name.
PARTS = {
    "surrogate": SURROGATES,
    "kl_estimator": KL_ESTIMATORS,
    "multi_objective_aggregation": AGGREGATIONS,
    "advantage_baseline": BASELINES,
    "scale_rewards": SCALE_REWARDS,
    "token_weighting": TOKEN_WEIGHTINGS,
    "importance_sampling_level": IMPORTANCE_SAMPLING_LEVELS,
}


def mapping(option: Any) -> dict[str, Any]:
    """A copy of an option that is a dict or None; one that came as JSON text was parsed by TrainingArguments."""
    return dict(option or {})


# Fields that follow from others where they are None
FOLLOWING: dict[str, Callable[["GRPOConfig"], Any]] = {
    "save_on_signal": lambda args: args.save_strategy != "no" and not args.save_only_model,
    "rollout_engine": lambda args: "hf_generate" if args.cache_implementation else "native",
    "steps_per_generation": lambda args: args.gradient_accumulation_steps,
    "dynamic_sampling_max_age": lambda args: args.optimizer_steps_per_rollout,
}


@dataclass
class GRPOConfig(VLLMArguments):
    """Arguments of [`GRPOTrainer`]: those of `transformers.TrainingArguments` and TRL's `GRPOConfig`, and a few more.

    `docs/configuration.md` lists the fields with their effect, and what differs from TRL. Batch sizes count
    completions, as in TRL: `per_device_train_batch_size=8` with `num_generations=4` is two prompts.

    Raises:
        ValueError: one message with every problem found.
    """

    _VALID_DICT_FIELDS = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "ref_model_init_kwargs",
        "reward_model_init_kwargs",
        "generation_kwargs",
        "chat_template_kwargs",
        "liger_kernel_config",
        "ref_device",
        "reward_device",
    ]

    # Defaults that differ from transformers, as in TRL
    learning_rate: float = about("Initial learning rate of AdamW.", 1e-6)
    logging_steps: float = about("Log every X optimizer steps; below 1, a ratio of all steps.", 10)
    gradient_checkpointing: bool = about("Recompute activations in the backward pass: less memory, more time.", True)
    bf16: bool | None = about("bf16 mixed precision. Default: on where a GPU supports it (unless fp16), else off.")
    remove_unused_columns: bool | None = about("Keep only the prompt column. Rewards usually need the others.", False)

    # Model and reference
    model_init_kwargs: dict[str, Any] | str | None = about(
        "Passed to `from_pretrained` when the model is a path or id."
    )
    trust_remote_code: bool = about("Allow model and tokenizer code from the Hub.", False)
    disable_dropout: bool = about("Turn all dropout off, so that the ratio is 1 on the first pass. TRL: False.", True)
    ref_model_name_or_path: str | None = about("Reference policy; default: a frozen copy of the starting policy.")
    ref_model_init_kwargs: dict[str, Any] | str | None = about(
        "Passed to `from_pretrained` of the reference, over model_init_kwargs: a dtype, a quantization_config."
    )
    ref_device: dict | str | None = about(
        "Device of the reference: auto (a spare GPU, else the policy's), same, cpu, cuda:N, or an accelerate map.",
        "auto",
    )
    reward_device: dict | str | None = about("Device of reward models; values as for ref_device.", "auto")
    sync_ref_model: bool = about("Mix the policy into the reference now and then (TR-DPO, arXiv 2404.09656).", False)
    ref_model_mixup_alpha: float = about("Share of the policy in each mix of sync_ref_model.", 0.6)
    ref_model_sync_steps: int = about("Optimizer steps between two mixes of sync_ref_model.", 512)
    ds3_gather_for_generation: bool = about("DeepSpeed ZeRO-3: gather the weights once per rollout.", True)

    # Prompts
    shuffle_dataset: bool = about("Shuffle the prompts, anew in each epoch.", True)
    prompt_format: str = about(
        "auto: text stays text unless system_prompt is set; chat: text is a user message; text.", "auto"
    )
    system_prompt: str | None = about("System message put before each conversation that has none.")
    chat_template_kwargs: dict | str | None = about("Passed to the chat template, e.g. {'enable_thinking': false}.")
    max_prompt_length: int | None = about("Longest prompt in tokens; what happens beyond it: overlong_prompts.")
    overlong_prompts: str = about("drop, truncate (keeps the end), or error.", "drop")
    skip_solved_after: int | None = about(
        "Pass over prompts of which every completion passed (eval_pass_threshold) in so many draws in a row."
    )
    skip_hopeless_after: int | None = about("As skip_solved_after, for prompts of which no completion passed.")

    # Rollouts
    num_generations: int = about("G, completions per prompt (TRL's default: 8).", 4)
    generation_batch_size: int = about("Completions sampled at once over all ranks; or set steps_per_generation.")
    steps_per_generation: int = about("Micro-batches per rollout. Default: gradient_accumulation_steps.")
    max_completion_length: int = about("Longest completion in tokens.", 512)
    temperature: float = about("Sampling temperature; also divides the logits of every log-probability.", 1.0)
    top_p: float = about("Nucleus sampling; below 1 the sampler differs from the trained policy.", 1.0)
    top_k: int = about("Keep the k most likely tokens; 0: all.", 0)
    min_p: float | None = about("Keep tokens at least this likely relative to the most likely one.")
    repetition_penalty: float = about("Penalty on tokens seen before; 1: none.", 1.0)
    generation_kwargs: dict | str | None = about("More arguments of `transformers.GenerationConfig`.")
    cache_implementation: str | None = about("Cache of `model.generate`, e.g. static.")
    rollout_engine: str = about(
        "How completions are sampled: native, hf_generate, vllm or transformers_cb. Default: native, unless "
        "cache_implementation is set."
    )
    max_concurrent_rows: int | None = about(
        "Completions that are decoded at a time. Default: native: what fits into half of the free memory; a vLLM "
        "server: 64 groups; else all."
    )
    cuda_graphs: bool | None = about(
        "Native engine on CUDA: capture decoding steps as graphs; keys and values stay allocated between rollouts. "
        "Default: on CUDA."
    )
    max_tokens_per_microbatch: int | None = about(
        "Run each micro-batch in pieces of at most this many tokens, whole groups where they fit: same gradient, less "
        "memory. Default: in one piece."
    )

    # Rewards
    reward_weights: list[float] | None = about("One weight per reward function. Default: 1 each.")
    reward_call: str = about("batch: one call per collected batch (as TRL); group: one per group.", "batch")
    reward_overlap: bool = about(
        "Score finished groups while others are still sampled: with reward models, accuracy, reasoning_accuracy, "
        "functions with by_row and (without dynamic_sampling) a reference on a device of its own, and with "
        "reward_call='group' all functions but those of trl.rewards.",
        True,
    )
    reward_timeout: float | None = about(
        "Seconds a Python reward function may take; it then runs in a process of its own."
    )
    reward_batch_size: int = about(
        "Forward passes of a reward model have at most the tokens of so many of the longest completions.", 8
    )
    reward_max_length: int | None = about(
        "Longest input of a reward model in tokens. Default: what its tokenizer and its model allow."
    )
    reward_input_format: str = about(
        "Reward model input: auto, pair (question, answer), chat (its template) or text.", "auto"
    )
    reward_model_init_kwargs: dict[str, Any] | str | None = about("Passed to `from_pretrained` of reward models.")

    # Objective: None means "as the variant says"; types are those after __post_init__
    variant: str = about("A row of `grpo_trl.VARIANTS`, e.g. grpo, dapo or gspo.", "grpo")
    loss_type: str | None = about(
        "TRL's shorthand for surrogate + token_weighting: grpo, dapo, dr_grpo, bnpo, cispo, sapo, luspo or vespo."
    )
    num_iterations: int = about("mu, passes over each rollout (TRL's default: 1).", 4)
    surrogate: str = about("The policy term: clip, cispo, sapo or vespo.")
    importance_sampling_level: str = about("token, or sequence (GSPO).")
    epsilon: float = about("Lower clip range: ratios below 1 - epsilon.")
    epsilon_high: float = about("Upper clip range. Default: epsilon. cispo: upper bound of the ratio itself.")
    delta: float | None = about("Upper bound on the ratio for negative advantages (two-sided clip).")
    sapo_temperature_pos: float = about("sapo: temperature of the gate for positive advantages.")
    sapo_temperature_neg: float = about("sapo: the same for negative ones.")
    vespo_k_pos: float = about("vespo: k for positive advantages.")
    vespo_lambda_pos: float = about("vespo: lambda for positive advantages.")
    vespo_k_neg: float = about("vespo: k for negative advantages.")
    vespo_lambda_neg: float = about("vespo: lambda for negative advantages.")
    beta: float = about("Weight of the KL penalty; 0: no reference model is loaded. Default: 0.01 (TRL: 0).")
    kl_estimator: str = about("k1, k2, k3, or k3_ratio, whose gradient is that of the reverse KL.")
    use_bias_correction_kl: bool = about("TRL's name for kl_estimator: true is k3_ratio, false is k3.")
    multi_objective_aggregation: str = about(
        "Several rewards: sum_then_normalize, or normalize_then_sum (each within its group first)."
    )
    advantage_baseline: str = about("group_mean, or leave_one_out (RLOO).")
    scale_rewards: str = about("batch_relative (this project's), group, batch or none.")
    token_weighting: str = about("How tokens are averaged: token, sequence, max_length or sequence_sum.")
    top_entropy_quantile: float = about("Share of tokens, those of highest entropy, that have a policy term.")
    entropy_coef: float = about("Weight of the entropy bonus, the mean entropy per token in nats.")
    mask_truncated_completions: bool = about("Leave truncated completions out of the loss.")
    overlong_penalty: bool = about("Add the reward soft_overlong, which punishes completions near the longest.")
    dynamic_sampling: bool = about("Replace groups without gradient by further prompts (DAPO).")
    dynamic_sampling_max_rounds: int = about("Rounds of drawing per batch, the first included.", 10)
    dynamic_sampling_max_age: int | None = about(
        "Optimizer steps for which surplus groups are kept; 0: not at all. Default: until the next batch."
    )
    dynamic_sampling_tolerance: float = about(
        "A group is dropped when its rewards differ by no more than this share of the largest.", 0.0
    )
    dynamic_sampling_filter: str | None = about(
        "Dotted path of (group, rewards) -> bool: which groups to keep, instead of by their rewards' spread."
    )
    off_policy_mask_threshold: float | None = about(
        "Leave completions with negative advantage out once they drifted by so many nats per token on average."
    )
    sampler_correction: str | None = about(
        "Weigh by policy / sampler probabilities: token_truncate, token_mask, sequence_truncate or sequence_mask."
    )
    sampler_correction_min: float | None = about("Lower bound of these weights.")
    sampler_correction_max: float | None = about("Upper bound of these weights. null: none.", 3.0)

    # Evaluation
    num_generations_eval: int | None = about("Completions per evaluation prompt. Default: num_generations.")
    eval_temperature: float | None = about("Temperature in evaluation; 0: greedy. Default: temperature.")
    eval_max_completion_length: int | None = about("Longest completion in evaluation. Default: max_completion_length.")
    eval_pass_threshold: float = about(
        "A completion passes (pass@k) a reward function when its reward is at least this.", 1.0
    )

    # Outputs
    log_completions: bool = about("Show sampled completions at every log and save them as parquet.", False)
    num_completions_to_print: int | None = about("Completions shown per log. Default: all of the last rollout.")
    log_unique_prompts: bool = about("Log one completion per prompt to trackers.", False)
    log_rollouts: bool = about("Write every rollout, with log-probabilities and rewards, as parquet.", False)
    replay_rollouts: str | None = about("Folder of rollouts that log_rollouts wrote: train on them, sample nothing.")
    save_epochs: bool = about("Write epoch_1/, epoch_2/, ... with weights, config, recipe and script.", True)
    plot_metrics: bool = about("Redraw training_metrics.png at every log.", True)
    save_on_signal: bool = about(
        "At SIGTERM and Ctrl-C save a checkpoint and exit. Default: unless save_strategy is no, or save_only_model."
    )

    def __post_init__(self):
        refused, hints = unused(self, TrainingArguments)  # before transformers changes some of them by itself
        problems = json_problems(self, self._VALID_DICT_FIELDS) + type_problems(self, self._typed())
        problems += trainer_problems(self)
        self.adam_beta1, self.adam_beta2 = float(self.adam_beta1), float(self.adam_beta2)  # torch takes no 0, but 0.0
        for name in ("activation_checkpointing", "activation_checkpointing_kwargs"):
            # what the fields below are called since transformers 5.23, which would warn of every run's default
            if getattr(self, name, False) is None:
                setattr(self, name, getattr(self, name.replace("activation", "gradient")))
        self.bf16_by_default = self.bf16 is None  # then it says what this machine can do, not what was asked for
        if self.bf16 is None:
            able = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
            self.bf16 = able and not self.fp16
        judged = self.load_best_model_at_end or self.save_strategy == "best"
        follows = self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
        if self.metric_for_best_model is None and (judged or follows):
            self.metric_for_best_model = "reward"  # transformers would look for eval_loss, which there is not
        try:
            super().__post_init__()
        except ValueError as error:  # the rest cannot be judged without what it would have set
            raise_all([*problems, *refused, str(error)])
        if follows:  # those schedulers would take a metric for a loss
            mode = "max" if self.greater_is_better else "min"
            self.lr_scheduler_kwargs = {"mode": mode} | mapping(self.lr_scheduler_kwargs)
        if self.world_size > 1 and self.device.type == "cpu":
            # transformers hands ddp_timeout on to GPU ranks only: CPU ranks would wait half an hour whatever it says
            _set_pg_timeout(timedelta(seconds=self.ddp_timeout))
        problems += self._resolve_objective() + resolve_vllm(self) + self._resolve_generation_kwargs()
        self._follow("save_on_signal", "rollout_engine")
        problems += value_problems(self, BATCH_RANGES) or self._resolve_batches()
        problems += value_problems(self, RANGES | CHOICES)
        if not problems:
            self._follow("dynamic_sampling_max_age")
        problems += combination_problems(self) + optimizer_problems(self)
        if self.use_vllm and self.vllm_mode == "colocate":
            problems += length_problems(self.vllm_max_model_length, "vLLM's copy", self)
        if self.use_liger_kernel:  # its forward would take the place of the one that scores completions
            self.liger_kernel_config = {**(self.liger_kernel_config or {}), "fused_linear_cross_entropy": False}
        raise_all(problems + refused)
        if hints and self.process_index == 0:
            logger.warning("Without effect here: %s.", "; ".join(hints))
        by_length = (self.importance_sampling_level, self.token_weighting) == ("sequence", "token")
        if by_length and self.process_index == 0:
            logger.warning(
                "importance_sampling_level='sequence' with token_weighting='token' weighs completions by their "
                "length; GSPO has token_weighting='sequence', as variant='gspo'."
            )

    def __getstate__(self) -> dict[str, Any]:
        """Without the Hub's token: transformers pickles the arguments into folders that it may push."""
        return self.__dict__ | {"hub_token": None}

    def to_dict(self) -> dict[str, Any]:
        """With `generation_kwargs` that JSON knows: trackers write it."""
        values = super().to_dict()
        options = mapping(values["generation_kwargs"])
        if isinstance(config := options.get("compile_config"), CompileConfig):
            values["generation_kwargs"] = options | {"compile_config": config.to_dict()}
        return values

    @property
    def n_gpu(self) -> int:
        """At most one: the policy has one device. With two visible GPUs and no launcher, transformers would otherwise
        wrap it in `nn.DataParallel` and multiply the batch size (huggingface/trl#2842)."""
        return min(1, super().n_gpu)

    @property
    def on_policy(self) -> bool:
        """Whether every update uses completions of the current policy, so that the ratio is 1 by definition."""
        return self.num_iterations == 1 and self.steps_per_generation == self.gradient_accumulation_steps

    @property
    def completions_per_rank(self) -> int:
        """Of one rollout, prompts' copies included."""
        return self.per_device_train_batch_size * self.steps_per_generation

    @property
    def evaluates(self) -> bool:
        """Whether the run asks for evaluation."""
        return self.eval_strategy != "no" or self.eval_on_start

    @property
    def captures_graphs(self) -> bool:
        """Whether the native engine's decoding steps are captured as CUDA graphs."""
        return self.device.type == "cuda" and self.cuda_graphs is not False

    @property
    def optimizer_steps_per_rollout(self) -> int:
        """Updates between two rollouts."""
        return self.steps_per_generation // self.gradient_accumulation_steps * self.num_iterations

    @property
    def row(self) -> dict[str, Any]:
        """What `variant`, `loss_type` and `use_bias_correction_kl` say of the fields that they govern."""
        variant = VARIANTS[self.variant]
        shorthand: dict[str, Any] = dict(LOSS_TYPES.get(self.loss_type or "", {}))
        if self.use_bias_correction_kl is not None:
            shorthand["kl_estimator"] = "k3_ratio" if self.use_bias_correction_kl else "k3"
        row = {name: shorthand.get(name, getattr(variant, name)) for name in GOVERNED}
        bounded = row["surrogate"] if "epsilon_high" in shorthand else variant.surrogate
        if bounded == "cispo" != (self.surrogate or row["surrogate"]):
            row["epsilon_high"] = None  # a bound of the ratio is no clip range
        if row["epsilon_high"] is None:
            row["epsilon_high"] = row["epsilon"] if self.epsilon is None else self.epsilon
        return row

    @property
    def objective(self) -> dict[str, Any]:
        """The resolved row: variant, its paper, and every field that it governs."""
        row = {"variant": self.variant, "paper": VARIANTS[self.variant].paper}
        return row | {name: getattr(self, name) for name in GOVERNED}

    def _follow(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) is None:
                setattr(self, name, FOLLOWING[name](self))

    def _typed(self) -> set[str]:
        """Fields whose types are checked: not those without effect, those that are JSON, and None out of a range."""
        json_fields = {name for name in self._VALID_DICT_FIELDS if name not in DICT_OR_WORD}
        judged = {name for name in (*BATCH_RANGES, *RANGES, *CHOICES) if getattr(self, name) is None}
        unread = UNUSED.keys() - {"dataloader_num_workers", "dataloader_prefetch_factor"}  # transformers compares them
        return {f.name for f in fields(self)} - {*unread, *json_fields, *judged}

    def _resolve_objective(self) -> list[str]:
        """Fills the governed fields: explicit value, else `loss_type`, else the row of `variant`."""
        if self.variant not in VARIANTS:
            return [f"variant={self.variant!r} is unknown; use one of {', '.join(VARIANTS)}."]
        if self.loss_type is not None and self.loss_type not in LOSS_TYPES:
            return [f"loss_type={self.loss_type!r} is not available; use one of {', '.join(LOSS_TYPES)}."]
        if isinstance(self.scale_rewards, bool):
            self.scale_rewards = "group" if self.scale_rewards else "none"
        for name, value in self.row.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        return value_problems(self, PARTS)

    def _resolve_batches(self) -> list[str]:
        """Fills steps_per_generation and generation_batch_size, and checks that collections are whole groups on each
        rank and whole optimizer steps."""
        problems = []
        rank_batch, ranks, accumulation = (
            self.per_device_train_batch_size,
            self.world_size,
            self.gradient_accumulation_steps,
        )
        if self.generation_batch_size is not None and self.steps_per_generation is None:
            self.steps_per_generation, rest = divmod(self.generation_batch_size, rank_batch * ranks)
            if rest:
                return [
                    f"generation_batch_size={self.generation_batch_size} must be a multiple of "
                    f"per_device_train_batch_size x ranks = {rank_batch} x {ranks}; use "
                    f"{rank_batch * ranks * (self.steps_per_generation + 1)}."
                ]
        self._follow("steps_per_generation")
        steps = self.steps_per_generation
        expected = rank_batch * ranks * steps
        if self.generation_batch_size not in (None, expected):
            problems.append(
                f"generation_batch_size={self.generation_batch_size} and steps_per_generation={steps} contradict each "
                f"other (the latter means {expected} completions); set one of them."
            )
        self.generation_batch_size = expected
        if steps % accumulation:
            problems.append(
                f"steps_per_generation={steps} must be a multiple of gradient_accumulation_steps={accumulation}, so "
                f"that a rollout is whole optimizer steps; use {accumulation * (steps // accumulation + 1)}."
            )
        if (rank_batch * steps) % self.num_generations:
            per_rank = rank_batch * steps
            divisors = [g for g in range(2, per_rank + 1) if per_rank % g == 0]
            problems.append(
                f"num_generations={self.num_generations} must divide the {per_rank} completions of a rank's rollout "
                f"(per_device_train_batch_size {rank_batch} x steps_per_generation {steps}), because a group never "
                f"straddles ranks; {f'use one of {divisors}' if divisors else 'raise per_device_train_batch_size'}."
            )
        return problems

    def _resolve_generation_kwargs(self) -> list[str]:
        """`generation_kwargs` override the fields of the same meaning, as in TRL, and so reach the log-probabilities
        and the length rewards too."""
        options = mapping(self.generation_kwargs)
        if isinstance(biases := options.get("sequence_bias"), dict):  # keys that JSON does not know
            options["sequence_bias"] = [[list(ids) if isinstance(ids, tuple) else ids, b] for ids, b in biases.items()]
        options = {name: value for name, value in options.items() if (name, value) not in AS_IT_IS.items()}
        for name, own in GENERATION_FIELDS.items():
            if name in options:
                setattr(self, own, options.pop(name))
        if is_compile_config(compiles := options.get("compile_config")) and isinstance(compiles, dict):
            options["compile_config"] = CompileConfig(**compiles)
        self.generation_kwargs = vllm_generation_kwargs(self) | options or None
        of_fields = type_problems(self, self._typed() & set(GENERATION_FIELDS.values()))
        of_options = vllm_kwargs_problems(self) if self.use_vllm else generation_problems(options)
        return [f"generation_kwargs: {problem}" for problem in of_fields] + of_options


def _accept_trl_options(cls: type) -> None:
    """Lets the constructor take TRL options that we lack: harmless values are dropped, others refused with the remedy.

    They are no fields, so they show up neither in `--help` nor in saved configs.
    """
    dataclass_init = cls.__init__

    @functools.wraps(dataclass_init)
    def __init__(self, *args, **kwargs):
        dataclass_init(self, *args, **refuse(kwargs))

    cls.__init__ = __init__


_accept_trl_options(GRPOConfig)

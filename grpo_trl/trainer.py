"""`GRPOTrainer`: the order of the steps. What a step does is in the modules it calls."""

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import fields
from functools import partial
from inspect import signature
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.utils import logging
from trl.trainer.utils import identity

from .algorithm import SURROGATES, entropy_bonus, policy_loss, top_entropy_mask
from .assembly import (
    chat_options,
    config_for,
    default_callbacks,
    dynamic_sampler,
    eval_sampling,
    load_models,
    load_tokenizer,
    policy_limit,
    prompt_memory,
    reward_scorer,
    reward_specs,
    rollout_engine,
    train_sampling,
    without_overlong,
)
from .batch import Group, Prompt, RolloutBatch
from .callbacks import log_completions
from .collection import CollectingTrainer
from .config import GRPOConfig
from .evaluation import evaluate_sets
from .loader import IndexedPrompts, RolloutLoader, StreamedPrompts
from .metrics import Metrics
from .nonfinite import NonFiniteUpdates
from .policy import (
    Reference,
    evaluation_mode,
    is_encoder_decoder,
    make_reference,
    per_token_logps,
)
from .prompts import beginning, encode_prompt, ending, truncate_prompt
from .refused import raise_all, uncalled
from .rollouts import check_finite, make_replica, weights_for_generation
from .trainer_checks import named_datasets, problems, prompt_problems

logger = logging.get_logger(__name__)

# what `policy_loss` and the surrogates take of the arguments
_TAKEN = {name for function in (policy_loss, *SURROGATES.values()) for name in signature(function).parameters}
LOSS_FIELDS = tuple(field.name for field in fields(GRPOConfig) if field.name in _TAKEN)

RewardFunc = str | PreTrainedModel | Callable[..., Any]


class GRPOTrainer(CollectingTrainer):
    """Group Relative Policy Optimization on `transformers.Trainer`, with TRL's constructor.

    Args:
        model: path or id of a causal LM, a loaded model, or a PEFT model whose adapter is trained further.
        reward_funcs: one or several of: a registered name, a dotted path, a function, an id, path or instance of a
            sequence-classification reward model. See `docs/rewards.md`.
        args: `GRPOConfig` (of this package).
        train_dataset: rows with a `prompt` (text or messages), map-style or streaming; all other columns reach the
            rewards.
        eval_dataset: the same, or a dict of named sets.
        processing_class: the tokenizer. Default: that of the model.
        reward_processing_classes: one tokenizer per reward (None for functions). Default: that of each reward model.
        callbacks, optimizers: as in `transformers.Trainer`.
        quantization_config: for a model that is loaded here (QLoRA).
        peft_config: an adapter to train instead of all weights.
        tools, rollout_func, environment_factory: TRL's; not available. Override `rollout` instead.

    Raises:
        ValueError: one message with all that is wrong with the arguments, before any model is loaded.
        TypeError: `args` of another class.

    To bring your own completions (tools, environments, replay), override [`rollout`][GRPOTrainer.rollout].
    """

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        tools: None = None,
        rollout_func: None = None,
        environment_factory: None = None,
    ):
        model = os.fspath(model) if isinstance(model, os.PathLike) else model
        args = config_for(model, args)
        specs, reward_processing_classes = reward_specs(reward_funcs, reward_processing_classes, args)
        refused = {"tools": tools, "rollout_func": rollout_func, "environment_factory": environment_factory}
        with_adapter = peft_config is not None or isinstance(model, PeftModel)
        datasets = named_datasets(train_dataset, eval_dataset)
        sets = eval_dataset if isinstance(eval_dataset, dict) else ()
        found = problems(model, args, specs, reward_processing_classes, datasets, sets, with_adapter, refused)
        raise_all(found + uncalled(type(self), GRPOTrainer))

        self.processing_class = processing_class = load_tokenizer(model, args, processing_class)
        self.chat_options = chat_options(args)
        raise_all(prompt_problems(datasets, processing_class, self.chat_options, args.remove_unused_columns))
        self._fit = partial(without_overlong, tokenizer=processing_class, chat_options=self.chat_options, args=args)
        train_dataset = self._fit(train_dataset, where="train_dataset")
        eval_dataset = self._fit(eval_dataset, where="eval_dataset")

        policy, reference_model, adapter = load_models(model, args, quantization_config, peft_config)
        self.scorer = reward_scorer(specs, reward_processing_classes, args)
        self.reward_names = self.scorer.names
        self.reward_weights = self.scorer.weights

        # what an encoder reads ends as its tokenizer ends texts
        self._ending = ending(processing_class) if is_encoder_decoder(policy) else []
        self._known_tokens: int | None = getattr(policy.get_input_embeddings(), "num_embeddings", None)
        policy.config.get_text_config().pad_token_id = processing_class.pad_token_id
        policy.generation_config.pad_token_id = processing_class.pad_token_id
        self.train_sampling = train_sampling(args, policy, processing_class)
        self.eval_sampling = eval_sampling(args, self.train_sampling)
        self.sampling = self.train_sampling  # what `rollout` uses; `evaluate` swaps it
        args.ignore_data_skip = True  # a resumed run restores the loader's state instead of skipping batches
        super().__init__(
            model=policy,
            args=args,
            data_collator=identity,  # pyright: ignore[reportArgumentType]
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.reference: Reference | None = None
        if args.beta:
            self.reference = make_reference(
                reference_model,
                lambda: self.model,
                self.accelerator,
                adapter=adapter,
                rows_per_pass=args.per_device_train_batch_size,
                max_tokens=args.max_tokens_per_microbatch,
            )
        self.replica = make_replica(self.model, self.accelerator)
        self.engine = rollout_engine(self.accelerator.unwrap_model(self.model), args, self.accelerator)
        self.policy_limit = policy_limit(args, self.accelerator, self.engine)
        self._vllm_is_of: int | None = None  # the step whose weights vLLM has; engines on the policy itself have none
        self._sampling_is_exact = self._sampling_may_be_exact(own_rollout=type(self).rollout is GRPOTrainer.rollout)
        self.metrics = Metrics()
        self._step_began = time.perf_counter()  # when its micro-batches were asked for
        self._share_of_micro_batch = 1.0  # what `compute_loss` sees of one; see `training_step`
        self.num_tokens = 0
        self.extra_columns = {}
        self.completions_log: list[dict[str, Any]] = []
        self.recipe: dict[str, Any] | None = None  # set by the command line: model, data and reward sections
        self.model.add_model_tags(self._tag_names)
        if self.is_world_process_zero():
            logger.warning("Objective: %s", ", ".join(f"{name} {value}" for name, value in args.objective.items()))
        self.nonfinite_updates = NonFiniteUpdates(self)
        for callback in (self.nonfinite_updates, *default_callbacks(self, reference_model)):
            self.add_callback(callback)

    # ---- Data ----

    def get_train_dataloader(self) -> RolloutLoader:
        """Prompts in, micro-batches out; transformers sees micro-batches only."""
        prompts = StreamedPrompts if isinstance(self.train_dataset, IterableDataset) else IndexedPrompts
        self.metrics, self.num_tokens = Metrics(), 0
        self._vllm_is_of = None
        self._accumulated: list[RolloutBatch] = []
        self.prompt_memory = prompt_memory(self.args)
        # nothing of a run before, whose steps and draws were counted from the same 0
        self.dynamic_sampler = dynamic_sampler(self.args, self.train_sampling, self.accelerator.num_processes)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self.loader = RolloutLoader(
            prompts(self.train_dataset, seed=seed, shuffle=self.args.shuffle_dataset),
            self.encode,
            self.collector,
            self.args,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            all_reduce=self.all_reduce,
            memory=self.prompt_memory,
        )
        return self.loader

    def encode(self, example: dict[str, Any], draw: int) -> Prompt:
        """A dataset row and its draw number -> `Prompt`, truncated to `max_prompt_length` if need be. Its example is
        what the rewards see: with `remove_unused_columns` the prompt alone."""
        ids, prompt = encode_prompt(example, self.processing_class, **self.chat_options)
        if self.args.max_prompt_length is not None:
            begin = beginning(self.processing_class) or [self.processing_class.bos_token_id]  # a template may write it
            ids = truncate_prompt(ids, self.args.max_prompt_length, begin)
        if self._ending and ids[-len(self._ending) :] != self._ending:
            ids = [*ids, *self._ending]
        if self._known_tokens is not None and max(ids) >= self._known_tokens:
            raise ValueError(
                f"The prompt {prompt!r:.200} has the token {max(ids)}, and the model embeds {self._known_tokens} "
                "tokens only: give the model's own tokenizer, or call model.resize_token_embeddings first."
            )
        columns = {} if self.args.remove_unused_columns else example
        return Prompt(ids, {**columns, "prompt": prompt}, draw)

    # ---- Rollout ----

    def rollout(self, prompts: list[Prompt]) -> Iterable[Group]:
        """Samples `self.sampling.num_generations` completions for each prompt.

        **Override this** for tools, environments or replay.

        Must give one `Group` per prompt, in any order. A group needs `completion_ids` (ending with an EOS token unless
        truncated) and `terminated`; `loss_masks` (0: the token was not sampled by the policy, tool output say),
        `sampling_per_token_logps` and `completions` (what the rewards read; default: decoded) are optional.
        """
        with weights_for_generation(self.model_wrapped, self.accelerator, self.args, self.replica) as model:
            if not (self.args.use_vllm and self._vllm_is_of == self.state.global_step):
                self.engine.sync_weights(model)
                self._vllm_is_of = self.state.global_step
            groups = self.engine.generate(prompts, self.sampling)
            yield from groups if self.args.use_vllm else map(check_finite, groups)  # a NaN of vLLM: it gave none

    # ---- Update ----

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of the next optimizer step; where one is due, after a rollout."""
        self._step_began = time.perf_counter()
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: RolloutBatch, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of a micro-batch, in pieces of at most `max_tokens_per_microbatch` tokens, and in
        smaller ones once memory ran out.

        The gradients of the pieces add up to the micro-batch's, because token weights are global; ranks exchange them
        with the last.
        """
        if self.loader.skips_update:
            self.metrics.add("dynamic_sampling/skipped_updates", 1.0)
            # no backward: gradients stay None, so neither weights nor the optimizer's moments move; DeepSpeed's
            # engine, which steps with a backward, does not step
            return torch.zeros((), device=self.args.device)
        if not self._accumulated:
            self._metrics_before = self.metrics.copy()
        self._accumulated.append(inputs)
        todo = [inputs]

        def add_gradients() -> Tensor:
            return [self._add_gradients(model, micro_batch, num_items_in_batch) for micro_batch in todo][-1]

        def restart() -> None:
            # an error in backward leaves half of a gradient, so all micro-batches of the step are done again
            model.zero_grad()
            self.metrics = self._metrics_before.copy()
            todo[:] = self._accumulated

        loss = self.policy_limit.run(add_gradients, partial(self._all_pieces, self._accumulated), restart)
        if self.accelerator.sync_gradients:
            self._accumulated = []
            self.metrics.add("step_time", time.perf_counter() - self._step_began)
        self.nonfinite_updates.add_loss(loss)
        return loss

    def _add_gradients(self, model: nn.Module, micro_batch: RolloutBatch, num_items_in_batch: Any) -> Tensor:
        """Adds those of a micro-batch, piece by piece; its loss."""
        if self.args.dynamic_sampling:
            self.metrics.add("dynamic_sampling/skipped_updates", 0.0)
        parts = self._pieces(micro_batch, self.policy_limit.tokens)
        self._share_of_micro_batch = 1 / len(parts)
        losses = []
        for rows in parts:
            last = rows.stop == len(micro_batch)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                piece: Any = micro_batch.rows(rows)
                losses.append(super().training_step(model, piece, num_items_in_batch))
        return torch.stack(losses).sum()

    def compute_loss(
        self, model: nn.Module, inputs: RolloutBatch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The objective on one micro-batch, averaged by its token weights. Metrics stay on the device."""
        args = self.args
        logps, entropies = per_token_logps(
            model,
            inputs,
            temperature=self.train_sampling.temperature,
            with_entropy=True,
            entropy_gradient=args.entropy_coef != 0,
        )
        assert inputs.advantages is not None and inputs.token_weights is not None and entropies is not None
        corrects, truncates = args.sampler_correction is not None, self.train_sampling.truncates
        policy_mask = None
        if args.top_entropy_quantile < 1:
            policy_mask = top_entropy_mask(
                entropies.detach(), inputs.loss_mask, args.top_entropy_quantile, self._gather_values
            )
        loss, metrics = policy_loss(
            logps,
            old_per_token_logps=inputs.old_per_token_logps,
            ref_per_token_logps=inputs.ref_per_token_logps,
            # those of a truncated distribution differ from the policy's without any drift
            sampling_per_token_logps=inputs.sampling_per_token_logps if corrects or not truncates else None,
            policy_mask=policy_mask,
            advantages=inputs.advantages,
            token_weights=inputs.token_weights,
            loss_mask=inputs.loss_mask,
            **{name: getattr(args, name) for name in LOSS_FIELDS},
        )
        if inputs.mean_weights is not None:
            bonus = entropy_bonus(entropies, inputs.mean_weights, inputs.loss_mask, policy_mask, self.all_reduce)
            loss = loss - args.entropy_coef * bonus
        # the micro-batches of a step, and the pieces of each, add up to its loss, so each counts for a part of it
        part = self._share_of_micro_batch / args.gradient_accumulation_steps
        self.metrics.add("policy_loss", metrics.pop("policy_loss")[0], part)
        self.metrics.add_all(metrics)
        mask = inputs.loss_mask.bool()
        self.metrics.add("entropy", torch.where(mask, entropies.detach(), 0).sum(), mask.sum())
        if self.loader.is_fresh:
            before = {
                "sampling/logp_gap": inputs.sampling_per_token_logps,
                "importance_ratio/first_step_gap": inputs.old_per_token_logps,
            }
            for name, then in before.items():
                if then is not None:
                    known = mask & ~then.isnan()
                    gap = torch.where(known, then - logps.detach(), 0).abs()
                    self.metrics.add(name, gap.sum(), known.sum())
        return loss

    def _gather_values(self, values: Tensor) -> Tensor:
        """Of all ranks, in one tensor: values (n,), another n on each rank. None may be -inf."""
        padded = self.accelerator.pad_across_processes(values, pad_index=-torch.inf)  # pyright: ignore[reportArgumentType]
        gathered = self.accelerator.gather(padded)
        return gathered[gathered > -torch.inf]  # pyright: ignore[reportIndexIssue, reportOperatorIssue, reportReturnType]

    # ---- Evaluation ----

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Samples and scores one or several sets with the evaluation's own sampling parameters.

        Returns `eval_reward`, `eval_rewards/<name>/mean`, `eval_avg@k`, `eval_pass@k`, lengths and truncation; with
        named sets `eval_<name>_reward` and so on, and their mean as `eval_reward`, however many there are. Training
        is not affected: nothing random is shared with it.

        Args:
            eval_dataset: a dataset or several named ones, to which `overlong_prompts` applies too; or the name of one
                of the constructor's. Default: the constructor's.

        Raises:
            ValueError: no dataset, or an unknown name.
        """
        datasets, options = self.eval_dataset, {}
        if isinstance(eval_dataset, str):
            names = list(datasets) if isinstance(datasets, dict) else []
            if eval_dataset not in names:
                raise ValueError(f"evaluate({eval_dataset!r}): the trainer's eval_dataset has the names {names}.")
            datasets = {eval_dataset: datasets[eval_dataset]}
        elif eval_dataset is not None:
            datasets = eval_dataset
            options["fit"] = partial(self._fit, where="evaluate(dataset)")
        self.sampling = self.eval_sampling
        self._vllm_is_of = None  # a callback may have put in other weights, a moving average say
        try:
            with evaluation_mode(self.model):
                metrics = evaluate_sets(self, datasets, metric_key_prefix, **options)
        finally:
            self.sampling = self.train_sampling
            self._vllm_is_of = None
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- Metrics ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics of the steps since the last log, reduced over ranks, to transformers' own."""
        training = "loss" in logs or "train_loss" in logs  # the latter at the end, as in TRL
        if training:
            logs = logs | self.metrics.reduce(gather_object) | {"num_tokens": self.num_tokens}
            if self.is_deepspeed_enabled and self.loader.skips_update and "loss" in logs:
                logs["grad_norm"] = 0.0  # the engine still has that of the update before
        super().log(logs, start_time)
        if training and self.args.log_completions:
            rows = gather_object(self.completions_log)
            self.completions_log = []  # a rollout is shown once, however many passes are made over it
            self.show_completions(rows)

    def show_completions(self, rows: list[dict[str, Any]], mark: str = "") -> None:
        """Prints and saves completions of all ranks; `mark` tells those of an evaluation from those of training."""
        if self.is_world_process_zero():
            log_completions(rows, args=self.args, state=self.state, mark=mark)

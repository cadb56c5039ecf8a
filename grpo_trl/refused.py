"""What TRL and transformers have and this package does not: said with what to do instead, never silently ignored."""

from dataclasses import fields
from typing import Any

_NO_ENTROPY = "remove it: `entropy_coef` stays what it is set to"

# TRL options that this package does not have: name -> (values that change nothing here, what to do instead).
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "router_aux_loss_coef": ((None, 0.0), "remove it: no load-balancing loss is added to the objective"),
    "cast_lm_head_to_fp32": ((False,), "remove it: log-softmax is in fp32; load with dtype float32 for an fp32 head"),
    "pad_to_multiple_of": ((None, "auto"), "remove it: batches are padded to their own longest row"),
    "vllm_importance_sampling_cap": ((None,), "use `vllm_importance_sampling_clip_max`, its new name in TRL"),
    "use_transformers_continuous_batching": ((False,), "use `rollout_engine: transformers_cb`"),
    "transformers_continuous_batching_config": ((None,), "remove it: the cache is sized to each rollout"),
    "use_transformers_paged": ((False,), "use `rollout_engine: transformers_cb`, its new name in TRL"),
    "use_adaptive_entropy": ((False,), _NO_ENTROPY),
    "entropy_coef_min": ((0.0,), _NO_ENTROPY),
    "entropy_coef_max": ((1.0,), _NO_ENTROPY),
    "entropy_coef_delta": ((0.005,), _NO_ENTROPY),
    "entropy_target": ((0.2,), _NO_ENTROPY),
    "max_tool_calling_iterations": ((None,), "override `GRPOTrainer.rollout` to run tools, with `Group.loss_masks`"),
    "log_multimodal": ((True, False), "remove it: prompts and completions are text"),
    "log_completions_hub_repo": ((None,), "push the folder `completions/` of output_dir with huggingface_hub"),
}

_NO_EVAL_LOSS = "remove it: evaluation samples and scores, so there are no predictions and no eval_loss"
_NO_DATALOADER = "prompts are read in this process, as they are needed"

# Fields of `transformers.TrainingArguments` that have no effect here:
# name -> (values that change nothing, whether others are refused (else: one warning), why and what to do instead).
UNUSED: dict[str, tuple[tuple[Any, ...], bool, str]] = {
    # the loss
    "label_smoothing_factor": ((0.0,), True, "remove it: the targets are what was sampled"),
    "average_tokens_across_devices": ((True,), True, "remove it: token weights are counted over all ranks"),
    "neftune_noise_alpha": (
        (None,),
        True,
        "leave it out: its noise is in training and not in sampling, so the importance ratio would be wrong",
    ),
    # batches and their order
    "auto_find_batch_size": (
        (False,),
        True,
        "set it to False and lower per_device_train_batch_size: a batch that shrinks would break up groups",
    ),
    "train_sampling_strategy": (
        ("random",),
        True,
        "set shuffle_dataset: true or false; groups are not sorted by length",
    ),
    "length_column_name": (("length",), False, "groups are not sorted by length"),
    "dataloader_drop_last": ((False,), True, "remove it: the last rollout of an epoch is completed, not dropped"),
    "dataloader_num_workers": ((0,), False, _NO_DATALOADER),
    "dataloader_persistent_workers": ((False,), False, _NO_DATALOADER),
    "dataloader_prefetch_factor": ((None,), False, _NO_DATALOADER),
    "dataloader_multiprocessing_context": ((None,), False, _NO_DATALOADER),
    "dataloader_in_order": ((True, False), False, _NO_DATALOADER),
    "dataloader_pin_memory": ((True, False), False, _NO_DATALOADER),
    "ignore_data_skip": (
        (True, False),
        False,
        "a resumed run always goes on with the prompt that would have come next",
    ),
    "enable_jit_checkpoint": ((False,), True, "remove it: save_on_signal, on by default, does it"),
    # evaluation
    "prediction_loss_only": ((False,), True, _NO_EVAL_LOSS),
    "include_for_metrics": (([],), True, _NO_EVAL_LOSS),
    "batch_eval_metrics": ((False,), True, _NO_EVAL_LOSS),
    "label_names": ((None,), False, "there are no labels"),
    "eval_do_concat_batches": ((True,), False, "there are no predictions to concatenate"),
    "eval_accumulation_steps": ((None,), False, "there are no predictions to accumulate; per_device_eval_batch_size"),
    "eval_use_gather_object": ((False,), False, "results are gathered as objects anyway"),
    "bf16_full_eval": ((False,), True, "remove it: evaluation samples with what is trained; use bf16"),
    "fp16_full_eval": ((False,), True, "remove it: evaluation samples with what is trained; use fp16"),
    # ranks and scripts
    "parallelism_config": (
        (None,),
        True,
        "remove it: ranks are data-parallel; shard with ZeRO or FSDP (accelerate_configs/)",
    ),
    "do_train": ((False,), False, "the script decides"),
    "do_eval": ((False,), False, "eval_strategy decides"),
    "do_predict": ((False,), False, "there is no prediction"),
    "local_rank": ((-1,), False, "the launcher's LOCAL_RANK decides"),
}

# Methods of TRL's GRPOTrainer, and of transformers' Trainer, that nothing calls here: name -> the method to override.
_ROLLOUT = "rollout(prompts), which yields the groups of completions"
_SCORE = "score(groups, metrics), which returns the rewards"
_LOSS = "compute_loss(model, inputs), which has the log-probabilities and the objective"
_LOADER = "get_train_dataloader, which returns a RolloutLoader"
_EVALUATE = "evaluate(eval_dataset), which samples and scores"
UNCALLED: dict[str, str] = {
    "_generate_and_score_completions": "collect(prompts), or its parts: rollout, score, compute_loss",
    "_generate": _ROLLOUT,
    "_generate_single_turn": _ROLLOUT,
    "_tool_call_loop": _ROLLOUT,
    "_get_tool_suffix_ids": _ROLLOUT,
    "_tokenize_prompts": "encode(example, draw), which returns a Prompt",
    "_calculate_rewards": _SCORE,
    "_log_completion_extra": _SCORE,
    "_log_metric": _SCORE,
    "_compute_loss": _LOSS,
    "_get_per_token_logps_and_entropies": _LOSS,
    "get_high_entropy_mask": _LOSS,
    "get_off_policy_mask": _LOSS,
    "get_gamma_weights": _LOSS,
    "_get_dataloader": _LOADER,
    "_get_train_sampler": _LOADER,
    "_set_signature_columns_if_needed": _LOADER,
    "_remove_unused_columns": _LOADER,
    "get_eval_dataloader": _EVALUATE,
    "get_test_dataloader": _EVALUATE,
    "_get_eval_sampler": _EVALUATE,
    "evaluation_loop": _EVALUATE,
    "prediction_step": _EVALUATE,
}


def refuse(options: dict[str, Any]) -> dict[str, Any]:
    """Drops TRL options that change nothing here and raises one ValueError for all that would."""
    problems = []
    kept = {}
    for name, value in options.items():
        if name not in REFUSED:
            kept[name] = value
        elif value not in REFUSED[name][0]:
            problems.append(f"{name}={value!r} is a TRL option that is not available here; {REFUSED[name][1]}.")
    raise_all(problems)
    return kept


def unused(args: Any, cls: type) -> tuple[list[str], list[str]]:
    """What the user set among the fields of `cls` in UNUSED: problems, and what deserves one warning."""
    problems, hints = [], []
    for name in (field.name for field in fields(cls) if field.name in UNUSED):
        harmless, is_problem, why = UNUSED[name]
        value = getattr(args, name)
        if value in harmless:
            continue
        if is_problem:
            problems.append(f"{name}={value!r} is not available here; {why}.")
        else:
            hints.append(f"{name}={value!r} ({why})")
    return problems, hints


def uncalled(cls: type, base: type) -> list[str]:
    """Methods that a subclass `cls` of our trainer `base` overrides in vain, or that were put into `base`."""

    def is_foreign(name: str) -> bool:
        method = getattr(cls, name, None)
        ours = getattr(method, "__module__", "").split(".")[0] in ("grpo_trl", "transformers")
        return method is not None and not (ours and method is getattr(base, name, None))

    return [
        f"{cls.__name__}.{name} would never be called; override {instead} (docs/rollouts.md)."
        for name, instead in UNCALLED.items()
        if is_foreign(name)
    ]


def raise_all(problems: list[str]) -> None:
    """One ValueError that lists every problem, so that none is found only after the previous one is fixed."""
    if problems:
        raise ValueError("\n".join(["GRPO cannot start:", *(f"- {problem}" for problem in problems)]))

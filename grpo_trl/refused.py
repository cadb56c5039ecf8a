"""TRL options that this package does not have: refused with what to do instead, never silently ignored."""

from typing import Any

_NO_VLLM = "remove it: rollouts run in this process; see `rollout_engine`"
_NO_ENTROPY = "remove it: there is no entropy term; raise `temperature` or `epsilon_high` to keep exploration"

# TRL options that this package does not have: name -> (values that change nothing here, what to do instead).
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "router_aux_loss_coef": ((None, 0.0), "remove it: no load-balancing loss is added to the objective"),
    "cast_lm_head_to_fp32": ((False,), "remove it: log-softmax is in fp32; load with dtype float32 for an fp32 head"),
    "pad_to_multiple_of": ((None, "auto"), "remove it: batches are padded to their own longest row"),
    "use_vllm": ((False,), _NO_VLLM),
    "vllm_mode": (("colocate",), _NO_VLLM),
    "vllm_model_impl": (("vllm",), _NO_VLLM),
    "vllm_enable_sleep_mode": ((False,), _NO_VLLM),
    "vllm_structured_outputs_regex": ((None,), _NO_VLLM),
    "vllm_server_base_url": ((None,), _NO_VLLM),
    "vllm_server_host": (("0.0.0.0",), _NO_VLLM),
    "vllm_server_port": ((8000,), _NO_VLLM),
    "vllm_server_timeout": ((240.0,), _NO_VLLM),
    "vllm_group_port": ((51216,), _NO_VLLM),
    "vllm_gpu_memory_utilization": ((0.3,), _NO_VLLM),
    "vllm_max_model_length": ((None,), _NO_VLLM),
    "vllm_tensor_parallel_size": ((1,), _NO_VLLM),
    "vllm_importance_sampling_correction": ((True, False), _NO_VLLM),
    "vllm_importance_sampling_mode": (("sequence_mask",), _NO_VLLM),
    "vllm_importance_sampling_clip_max": ((3.0,), _NO_VLLM),
    "vllm_importance_sampling_clip_min": ((None,), _NO_VLLM),
    "vllm_importance_sampling_cap": ((None,), _NO_VLLM),
    "use_transformers_continuous_batching": ((False,), "remove it; see `rollout_engine`"),
    "transformers_continuous_batching_config": ((None,), "remove it; see `rollout_engine`"),
    "use_transformers_paged": ((False,), "remove it; see `rollout_engine`"),
    "sapo_temperature_neg": ((1.05,), "remove it: use the clipped surrogate (`loss_type: grpo | dapo | dr_grpo`)"),
    "sapo_temperature_pos": ((1.0,), "remove it: use the clipped surrogate (`loss_type: grpo | dapo | dr_grpo`)"),
    "vespo_k_pos": ((2.0,), "remove it: use the clipped surrogate (`loss_type: grpo | dapo | dr_grpo`)"),
    "vespo_lambda_pos": ((3.0,), "remove it: use the clipped surrogate (`loss_type: grpo | dapo | dr_grpo`)"),
    "vespo_k_neg": ((3.0,), "remove it: use the clipped surrogate (`loss_type: grpo | dapo | dr_grpo`)"),
    "vespo_lambda_neg": ((2.0,), "remove it: use the clipped surrogate (`loss_type: grpo | dapo | dr_grpo`)"),
    "multi_objective_aggregation": (("sum_then_normalize",), "remove it: weighted rewards are summed, then scaled"),
    "top_entropy_quantile": ((1.0,), "remove it: every token of a completion counts in the loss"),
    "entropy_coef": ((0.0,), _NO_ENTROPY),
    "use_adaptive_entropy": ((False,), _NO_ENTROPY),
    "entropy_coef_min": ((0.0,), _NO_ENTROPY),
    "entropy_coef_max": ((1.0,), _NO_ENTROPY),
    "entropy_coef_delta": ((0.005,), _NO_ENTROPY),
    "entropy_target": ((0.2,), _NO_ENTROPY),
    "max_tool_calling_iterations": ((None,), "override `GRPOTrainer.rollout` to run tools, with `Group.loss_masks`"),
    "off_policy_mask_threshold": ((None,), "use `delta` to bound the loss of off-policy negative samples"),
    "log_multimodal": ((True, False), "remove it: prompts and completions are text"),
    "log_completions_hub_repo": ((None,), "push the folder `completions/` of output_dir with huggingface_hub"),
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


def raise_all(problems: list[str]) -> None:
    """One ValueError that lists every problem, so that none is found only after the previous one is fixed."""
    if problems:
        raise ValueError("\n".join(["GRPO cannot start:", *(f"- {problem}" for problem in problems)]))

"""`generation_kwargs`: which options of `transformers.GenerationConfig` act here, and why the others are refused.

`model.generate` asks our sampler for each token, after its own logits processors. So what processes logits acts; what
belongs to the sampling, searching or speculating of `generate` itself does not.
"""

import math
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from transformers import CompileConfig

# fields of GRPOConfig that mean the same
FIELDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_completion_length",
    "cache_implementation": "cache_implementation",
}

USABLE = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "cache_config",
    "compile_config",
    "disable_compile",
    "exponential_decay_length_penalty",
    "max_cache_len",
    "min_new_tokens",
    "no_repeat_ngram_size",
    "sequence_bias",
    "suppress_tokens",
    "use_cache",
)

# what happens anyway
AS_IT_IS = {"do_sample": True, "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1}

# why -> names
_REASONS = {
    "each completion is one sample, there are no beams; use num_generations": (
        "num_beams num_beam_groups num_return_sequences diversity_penalty length_penalty early_stopping constraints "
        "force_words_ids low_memory penalty_alpha dola_layers"
    ),
    "transformers' own sampling, of which it is a part, is not used; use temperature, top_p, top_k or min_p": (
        "do_sample typical_p epsilon_cutoff eta_cutoff top_h renormalize_logits watermarking_config"
    ),
    "speculative decoding does not sample what the seed says; leave it out": (
        "use_mtp is_assistant num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold "
        "assistant_early_exit assistant_lookbehind target_lookbehind assistant_ensemble_weight "
        "prompt_lookup_num_tokens max_matching_ngram_size speculation_type"
    ),
    "special tokens are those of tokenizer and model; set them there": (
        "eos_token_id pad_token_id bos_token_id forced_bos_token_id"
    ),
    "a rollout takes token ids only; leave it out": (
        "return_dict_in_generate output_attentions output_hidden_states output_scores output_logits"
    ),
    "it reads the encoder's input, or the padding of prompts, or is the model's; leave it out": (
        "encoder_repetition_penalty encoder_no_repeat_ngram_size decoder_start_token_id"
    ),
    "it counts the prompt; use max_completion_length": "max_length",
    "it counts the prompt and its padding; use min_new_tokens": "min_length",
    "the clock would decide where completions end; use max_completion_length": "max_time",
    "it ends completions without an EOS token, so that they count as truncated; override GRPOTrainer.rollout": (
        "stop_strings"
    ),
    "it changes the prompt's tokens; leave it out": "token_healing",
    "not every model can read a prompt in chunks; set max_concurrent_rows": "prefill_chunk_size",
    "a truncated completion would pass for a finished one; leave it out": "forced_eos_token_id",
    "another distribution than the policy's would be sampled; leave it out": "guidance_scale",
    "it would hide a policy that has diverged; leave it out": "remove_invalid_values",
    "rollout_engine: transformers_cb sizes its cache by itself; leave it out": "continuous_batching_config",
}
REFUSED = {name: reason for reason, names in _REASONS.items() for name in names.split()}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_count, value))


def _is_pair(value: Any, first: Callable[[Any], bool]) -> bool:
    """Of something and a number."""
    is_pair = isinstance(value, list | tuple) and len(value) == 2
    return is_pair and first(value[0]) and isinstance(value[1], int | float) and value[1] < math.inf


def _are_biases(value: Any) -> bool:
    pairs = isinstance(value, list) and bool(value) and all(_is_pair(pair, _are_ids) for pair in value)
    return pairs and all(isinstance(bias, float) for _, bias in value)


def is_compile_config(value: Any) -> bool:
    """One, or its fields."""
    of_fields = isinstance(value, dict) and value.keys() <= CompileConfig().to_dict().keys()
    return isinstance(value, CompileConfig) or of_fields


# name -> (whether a value can be used, what is expected); transformers looks at them in the middle of a rollout
VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("min_new_tokens", "no_repeat_ngram_size", "max_cache_len"),
        (_is_count, "a whole number of at least 0"),
    ),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), (_are_ids, "a list of token ids")),
    "bad_words_ids": (lambda v: isinstance(v, list) and bool(v) and all(map(_are_ids, v)), "a list of lists of ids"),
    "exponential_decay_length_penalty": (lambda v: _is_pair(v, _is_count), "[a number of tokens, a factor]"),
    "sequence_bias": (_are_biases, "a list of [ids, bias], each bias with a point (-5.0)"),
    "compile_config": (is_compile_config, "a transformers.CompileConfig, or a mapping of its fields"),
    **dict.fromkeys(("use_cache", "disable_compile"), (lambda v: isinstance(v, bool), "True or False")),
}


def generation_problems(options: Mapping[str, Any]) -> list[str]:
    """What is wrong with `generation_kwargs` that are not among `FIELDS`: refused, no option at all, or a value that
    cannot be used."""
    names = list(options)
    problems = [
        f"generation_kwargs {name}={options[name]!r:.100}: expected {expected}."
        for name, (is_usable, expected) in VALUES.items()
        if options.get(name) is not None and not is_usable(options[name])
    ]
    if refused := [name for name in names if name in REFUSED]:
        reasons = "; ".join(f"{name}: {REFUSED[name]}" for name in refused)
        problems.append(f"generation_kwargs {', '.join(refused)} cannot be used ({reasons}).")
    known = [*FIELDS, *USABLE]
    for name in names:
        if name not in REFUSED and name not in USABLE:
            close = get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"use one of {', '.join(known)}."
            problems.append(f"generation_kwargs {name} is unknown; {hint}")
    return problems

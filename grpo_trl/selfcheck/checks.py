"""The checks, as rows of `CHECKS`: a name, and a function of the `Trial`. docs/diagnosis.md says what each means."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from ..algorithm import KL_ESTIMATORS
from ..assembly import declared_eos
from ..batch import Prompt
from ..callbacks.run_doctor import SAMPLER_GAP
from ..collection import ROUNDING_GAP
from ..placement import input_device
from ..policy import FrozenReference, causal_lm, evaluation_mode, is_packed, per_token_logps
from ..prompts import encode_prompt
from ..rewards.model_inputs import is_templated
from ..trainer import GRPOTrainer
from .ends import end_of_turn, token_names
from .trial import Trial

# Relative difference of two gradients: in fp32 the order of sums makes some 1e-6, in 16 bit each operation rounds by
# up to 2^-9; denominators that depend on the split make tenths.
GRADIENT_GAP, GRADIENT_GAP_16_BIT = 1e-4, 5e-2
SHOWN = 400  # characters of the prompt's beginning, and of its end


@dataclass(frozen=True)
class Result:
    """What a check found. The remedy says what to do when it failed, and what to look at when it passed."""

    passed: bool
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Check:
    """A row of `CHECKS`."""

    name: str
    test: Callable[[Trial], Result]


def result_of(check: Check, trial: Trial) -> Result:
    """That of one check; an exception is its failure, so that the others are still made."""
    try:
        return check.test(trial)
    except Exception as error:
        return Result(False, f"{type(error).__name__}: {error}", "Put right what the error says: a run would meet it.")


def template(trial: Trial) -> Result:
    """No prompt has two BOS in a row, nor one that its chat template does not write."""
    tokenizer = trial.trainer.processing_class
    bos, ids = tokenizer.bos_token_id, trial.prompts[0].ids
    wrong = [prompt for prompt in trial.prompts if _has_bos_too_many(prompt, trial.trainer)]
    first = f"one BOS ({tokenizer.bos_token})" if ids[0] == bos else "no BOS"
    if wrong:
        ids = wrong[0].ids
        first = f"BOS ({tokenizer.bos_token}) at {', '.join(str(i) for i, x in enumerate(ids) if x == bos)}"
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if len(text) > 2 * SHOWN:
        text = f"{text[:SHOWN]} [...] {text[-SHOWN:]}"
    remedy = (
        f"{len(wrong)} of {len(trial.prompts)} prompts have a BOS too many: take {tokenizer.bos_token} out of the "
        "chat template, or out of the texts of the data, where it stands twice."
    )
    return Result(not wrong, f"{first}, {len(ids)} tokens:\n{text}", remedy if wrong else "")


def _has_bos_too_many(prompt: Prompt, trainer: GRPOTrainer) -> bool:
    tokenizer, ids, written = trainer.processing_class, prompt.ids, prompt.example["prompt"]
    bos = tokenizer.bos_token_id
    if bos is None:
        return False
    if (bos, bos) in pairwise(ids):
        return True
    if isinstance(written, str):  # a template that was applied before may begin each turn with it, or end it
        own = is_templated(written.replace(tokenizer.bos_token, ""))
        return bos in ids[1:] and bos != tokenizer.eos_token_id and not own
    bare = prompt.example | {"prompt": [message | {"content": "a"} for message in written]}
    return ids.count(bos) > encode_prompt(bare, tokenizer, **trainer.chat_options)[0].count(bos)


def ends(trial: Trial) -> Result:
    """A completion can end: what the chat template writes at the end of a turn is among the tokens that end it, which
    are the tokenizer's EOS and those of the generation config."""
    trainer, tokenizer = trial.trainer, trial.trainer.processing_class
    size = causal_lm(trainer.model).get_input_embeddings().weight.shape[0]
    stops, pad = trainer.sampling.eos_token_ids, tokenizer.pad_token_id
    end, whose = end_of_turn(tokenizer, trial.prompts[0], trainer.chat_options["chat_template_kwargs"])
    names = token_names(tokenizer, stops)
    detail = (
        f"a completion ends at {names}; {whose} {token_names(tokenizer, end)}; pad {token_names(tokenizer, [pad])}"
    )
    wanted = [id_ for id_ in dict.fromkeys([*end, *declared_eos(trainer.model)]) if 0 <= id_ < size]
    set_eos = f"set eos_token_id: {wanted} in the model's generation_config.json"
    if outside := [id_ for id_ in (*stops, pad) if not 0 <= id_ < size]:
        what = f"ids {outside} are not among the model's {size} tokens"
        return Result(False, f"{detail}; {what}", f"EOS or pad {what}: {set_eos}, or use the model's own tokenizer.")
    if not set(end) <= set(stops):
        what = f"{whose} {token_names(tokenizer, end)} does not end a completion"
        return Result(False, detail, f"{what[0].upper()}{what[1:]}, which would run on to the longest: {set_eos}.")
    if pad in stops and not _masks_are_lengths(trial):
        return Result(False, f"{detail}; masks leave sampled tokens out", "Give the tokenizer a pad token of its own.")
    return Result(True, f"{detail} (EOS too: masks are carried, none is lost)" if pad in stops else detail)


def _masks_are_lengths(trial: Trial) -> bool:
    lengths = [len(ids) for group in trial.groups for ids in group.completion_ids]
    return trial.batch.completion_mask.sum(1).tolist() == lengths


def sampler(trial: Trial) -> Result:
    """The log-probabilities with which tokens were sampled are those of the update; those of a truncated distribution
    cannot be, which is something to look at."""
    trainer, sampled = trial.trainer, trial.batch.sampling_per_token_logps
    if sampled is None:
        return Result(True, "the rollout gives no log-probabilities")
    truncates = trainer.sampling.truncates
    passed, detail = _compare(trial, sampled, trial.logps, exact=trial.exact and not truncates)
    correction = trainer.args.sampler_correction
    if not passed and correction:
        return Result(True, f"{detail}; corrected by sampler_correction: {correction}")
    remedy = "What is trained is not what sampled: " + (
        "set top_p: 1, top_k: 0, min_p: null, repetition_penalty: 1 and no generation_kwargs"
        if truncates
        else "try rollout_engine: hf_generate (or native) and bf16: false"
    )
    remedy = "" if passed else f"{remedy}; sampler_correction: token_truncate corrects for it."
    return Result(passed or truncates, f"{detail}, with the engine {type(trainer.engine).__name__}", remedy)


def packed(trial: Trial) -> Result:
    """The update's streams of groups give what padded rows give."""
    model, batch = trial.trainer.model, trial.batch
    if not is_packed(model):
        return Result(True, "this model runs on padded rows, each with its whole prompt; the log says why")
    lm, wrapped = causal_lm(model), trial.trainer.model_wrapped
    lm.evaluation = "padded"
    try:
        with torch.no_grad(), trial.trainer.accelerator.autocast(), evaluation_mode(model):
            padded, _ = per_token_logps(wrapped, batch, temperature=trial.trainer.args.temperature)
    finally:
        lm.evaluation = "packed"
    passed, detail = _compare(trial, trial.logps, padded, exact=trial.exact)
    remedy = "This model's tokens see each other in another way in streams of groups: set attn_implementation: eager, "
    return Result(passed, detail, "" if passed else remedy + "which runs it on padded rows.")


def reference(trial: Trial) -> Result:
    """The reference is the policy that training starts from: the first KL is 0."""
    args, policy = trial.trainer.args, trial.trainer.model
    if trial.ref_logps is None:
        return Result(True, "no KL term (beta: 0), so no reference")
    mask = trial.batch.completion_mask.bool()
    log_ratio = (trial.ref_logps - trial.logps)[mask].double()
    kl = float(KL_ESTIMATORS["k3"](log_ratio, torch.ones_like(log_ratio)).mean())
    detail = f"first KL {kl:.2g} nats per token"
    if args.ref_model_name_or_path or args.ref_model_init_kwargs:
        what = "the reference is another model, or loaded otherwise"
        remedy = "" if kl < torch.inf else "Use a reference with the policy's tokens."
        return Result(kl < torch.inf, f"{detail}; {what}", remedy)
    if _same_passes(trial):
        passed, bound = bool((log_ratio == 0).all()), "it must be exactly 0"
    else:
        passed, gap = _compare(trial, trial.ref_logps, trial.logps, exact=trial.exact)
        bound = f"0 but for rounding: {gap}"
    remedy = (
        "The policy without its adapter is not the one that training starts from: leave init_lora_weights at its "
        "default, under which an adapter begins as nothing, and merge no adapter into the weights."
        if isinstance(policy, PeftModel)
        else "The reference's weights are not the policy's: give both the same path, and change neither after loading."
    )
    adapter = getattr(trial.trainer.reference, "adapter", None)
    off = isinstance(policy, PeftModel) and adapter is None
    which = "adapter off = base, " if off else "" if adapter is None else "a frozen copy of the adapter, "
    return Result(passed, f"{which}{detail}; {bound}", "" if passed else remedy)


def _same_passes(trial: Trial) -> bool:
    """Whether reference and policy do the same arithmetic, sum for sum."""
    policy, made = trial.trainer.model, trial.trainer.reference
    adapters = policy.peft_config.values() if isinstance(policy, PeftModel) else ()
    plain = all(isinstance(adapter, LoraConfig) and not adapter.use_dora for adapter in adapters)
    models: list[nn.Module] = [policy, made.model] if isinstance(made, FrozenReference) else [policy]
    together = len({input_device(model) for model in models}) == 1
    return plain and together and all(map(is_packed, models))


def accumulation(trial: Trial) -> Result:
    """The gradient of a step does not depend on how the step is cut."""
    args = trial.trainer.args
    if args.top_entropy_quantile < 1:
        return Result(True, "not compared: top_entropy_quantile picks tokens within each micro-batch")
    whole, parts = trial.gradient(1), trial.gradient(4)
    norm = _norm(whole)
    if trial.trainer.accelerator.scaler is not None and not norm < torch.inf:
        remedy = "fp16 overflowed at the first scale of the loss, which training lowers as long as that happens."
        return Result(True, f"not compared: gradient norm {norm:.3g}", remedy)
    if not 0 < norm < torch.inf:
        remedy = (
            "No finite gradient reaches the trained weights: look for an adapter that is merged or not active, and "
            "for NaN in the model (its dtype, its weights)."
        )
        return Result(False, f"gradient norm {norm:.3g}", remedy)
    gap = _norm(b - a for a, b in zip(whole, parts, strict=True)) / norm
    limit = GRADIENT_GAP if trial.exact else GRADIENT_GAP_16_BIT
    detail = f"1 micro-batch against 4: relative difference {gap:.2g}, at most {limit:g}; gradient norm {norm:.3g}"
    remedy = (
        "The gradient depends on how a step is cut into micro-batches: a loss of your own must add up, weighted by "
        "token_weights, and nothing in the model may depend on its batch (batch statistics, auxiliary losses)."
    )
    return Result(gap <= limit, detail, "" if gap <= limit else remedy)


def _norm(gradient: Iterable[Tensor]) -> float:
    norms = [torch.linalg.vector_norm(part, dtype=torch.float32) for part in gradient]
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def rewards(trial: Trial) -> Result:
    """The rewards can be computed, and tell completions apart."""
    names, per_func, total = trial.trainer.reward_names, trial.rewards_per_func, trial.rewards
    if total.isnan().all():
        what = "every reward with a weight gave None for every completion"
        return Result(False, what, "No completion has a reward: look at the columns that the rewards read.")
    constant = [name for name, column in zip(names, per_func.T, strict=True) if _is_constant(column)]
    terminated = [ended for group in trial.groups for ended in group.terminated]
    detail = f"{len(terminated)} completions of at most {trial.length} tokens, {sum(terminated)} ended; sum "
    detail += f"{float(total.nanmean()):.3g} on average, from {_smallest(total):.3g} to {-_smallest(-total):.3g}"
    looks = []
    if not any(terminated):
        cut = "max_completion_length" if trial.length == trial.full_length else "the length of this test"
        looks.append(f"all completions were cut at {trial.length} tokens ({cut}), so these are unfinished answers")
    if _is_constant(total):
        looks.append("all completions have the same sum, so this batch would teach nothing")
    elif constant:
        looks.append(f"for all completions alike: {', '.join(constant)}")
    look = "; ".join(looks)
    return Result(True, detail, f"{look[:1].upper()}{look[1:]}: read them below." if look else "")


def _is_constant(values: Tensor) -> bool:
    """Whether there is one value, or none."""
    return len(values[~values.isnan()].unique()) < 2


def _smallest(values: Tensor) -> float:
    return float(values[~values.isnan()].min())


def _compare(trial: Trial, ours: Tensor, theirs: Tensor, *, exact: bool) -> tuple[bool, str]:
    """Whether log-probabilities (B, T) agree; in fp32 the largest gap counts, elsewhere the mean."""
    gaps = (ours - theirs).abs()[trial.batch.completion_mask.bool()]
    kind, gap, limit = ("largest", gaps.max(), ROUNDING_GAP) if exact else ("mean", gaps.mean(), SAMPLER_GAP)
    return bool(gap <= limit), f"{kind} gap {float(gap):.2g} nats per token, at most {limit:g}"


CHECKS = (
    Check("template and BOS", template),
    Check("EOS and pad", ends),
    Check("sampler = trainer", sampler),
    Check("packed = padded", packed),
    Check("reference", reference),
    Check("accumulation 1 = 4", accumulation),
    Check("rewards", rewards),
)

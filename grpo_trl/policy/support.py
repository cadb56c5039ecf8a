"""Which models can be run on a stream of groups, and making them able to.

What is known to fail is told by the configuration; everything else is tried once, on a few tokens, against the model's
own logits. So an architecture that nobody thought of is either right or padded.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from ..batch import Group, Prompt, RolloutBatch
from ..placement import input_device, is_fsdp
from .attention import no_mask, use_group_attention
from .head import score_completions
from .logprobs import causal_lm, is_encoder_decoder, per_token_logps
from .mode import evaluation_mode
from .norms import use_short_norms
from .unread import skip_unread

TROUBLE = (TypeError, ValueError, RuntimeError, IndexError, AttributeError)  # what an unusual model may raise


def prepare(model: PreTrainedModel | PeftModel, device_type: str | None = None) -> str | None:
    """Makes `per_token_logps` run a language model on streams of groups. Returns None, or why the model cannot be.

    Then it is padded; and where its head does more than a known product, evaluated by the logits of all positions.
    Changes the model's attention function and forward, which do what they did when called without `layout` and
    `scored`; and its norms on the CPU, which round in another order. `device_type`: of where the model will be, if it
    is not there yet.
    """
    lm = causal_lm(model)
    if getattr(lm, "evaluation", None) == "packed":
        return None
    lm.evaluation = "logits"
    if is_encoder_decoder(lm):
        return "it is an encoder-decoder, whose prompts and completions are read by different layers"
    expected = _trial(lm)
    score_completions(lm)
    if trouble := _try(lm, "padded", expected):
        return f"its head cannot be run on chosen positions ({trouble})"
    if reason := obstacle(model):
        return reason
    attention = lm.config._attn_implementation
    use_group_attention(lm)
    if trouble := _try(lm, "packed", expected):
        lm.set_attn_implementation(attention)
        return f"its tokens see each other in other ways than through attention ({trouble})"
    if trouble := _of_rank_0(None if expected is None else _attends_twice(lm)):
        lm.evaluation = "padded"
        lm.set_attn_implementation(attention)
        return trouble
    if (device_type or input_device(lm).type) == "cpu":
        use_short_norms(lm)
    skip_unread(lm)
    return None


def obstacle(model: PreTrainedModel | PeftModel) -> str | None:
    """Why a model cannot be run on streams of groups, as far as its classes and configuration tell."""
    return next(_obstacles(model), None)


def _obstacles(model: PreTrainedModel | PeftModel) -> Iterator[str]:
    lm = causal_lm(model)
    config = lm.config.get_text_config()
    # private, but the only place where a model class says whether its attention goes through AttentionInterface
    if not type(lm)._can_set_attn_implementation():
        yield "its attention cannot be exchanged"
    if getattr(config, "is_heterogeneous", False):  # Gemma 4; such a config refuses to say the sizes below
        yield "its layers are configured one by one"
    if kinds := sorted(set(getattr(config, "layer_types", None) or []) - {"full_attention"}):
        yield f"it has layers of the kind {', '.join(kinds)}"
    if getattr(config, "sliding_window", None):  # Qwen2-MoE: 0 for none
        yield "its attention has a sliding window"
    if rope := dynamic_rope(config):
        yield f"its positions ({rope} RoPE) depend on the longest row"
    if config.model_type == "diffllama":  # for where a trial has no weights
        yield "its layers attend more than once"
    if config.model_type == "doge":  # constant at first, so that no trial tells
        yield "its masks are learned"
    if _value_size(config) != _key_size(config):
        yield "its values have another size than its keys"
    if any(adapter.is_prompt_learning for adapter in getattr(model, "peft_config", {}).values()):
        yield "its adapter adds tokens to the prompt"
    if lm.config._attn_implementation == "eager":
        yield "attn_implementation='eager' was asked for"


def dynamic_rope(config: Any) -> str | None:
    """The kind of a rotation that depends on the longest row beside a token's own; None: it does not."""
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    return kind if kind in ("dynamic", "longrope") else None


def dynamic_rope_begins(config: Any) -> int | None:
    """The length, in tokens, beyond which that rotation depends on the longest row; None: it never does."""
    if dynamic_rope(config) is None:
        return None
    places = (config.rope_parameters.get("original_max_position_embeddings"), config.max_position_embeddings)
    return getattr(config, "original_max_position_embeddings", None) or next(filter(None, places))


class _Counting:
    """A layout of one causal row that counts how often each layer attends."""

    def __init__(self):
        self.calls: Counter[int] = Counter()

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, dropout: float = 0.0
    ) -> Tensor:
        """See `Layout`."""
        self.calls[getattr(module, "layer_idx", id(module))] += 1
        out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2)


@torch.no_grad()
def _attends_twice(lm: Any) -> str | None:
    """Says so of a model whose layers do (DiffLlama)."""
    ids, layout = torch.arange(2, device=input_device(lm))[None], _Counting()  # their positions too
    with evaluation_mode(lm):
        mask = no_mask(ids.device)
        lm.base_model(input_ids=ids, position_ids=ids, attention_mask=mask, use_cache=False, layout=layout)
    if max(layout.calls.values(), default=0) <= 1:
        return None
    return "its layers attend more than once, and decoding keeps the keys of one attention per layer"


def _key_size(config: Any) -> int | None:
    """With multi-head latent attention (DeepSeek) of a rotated part and another."""
    rotated = getattr(config, "qk_rope_head_dim", None)
    head_dim = getattr(config, "head_dim", None)
    return head_dim if rotated is None else rotated + (getattr(config, "qk_nope_head_dim", None) or 0)


def _value_size(config: Any) -> int | None:
    return getattr(config, "v_head_dim", None) or _key_size(config)


def _try(lm: Any, evaluation: str, expected: Tensor | None) -> str | None:
    """Switches to another evaluation and compares it; switches back and says why when it fails."""
    before, lm.evaluation = lm.evaluation, evaluation
    trouble = _of_rank_0(_trouble(lm, expected))
    if trouble is not None:
        lm.evaluation = before
    return trouble


def _of_rank_0(trouble: str | None) -> str | None:
    """Under FSDP, where no other rank need have weights to try, and all must run the model alike."""
    if not (torch.distributed.is_initialized() and is_fsdp()):
        return trouble
    found = [trouble]
    torch.distributed.broadcast_object_list(found)
    return found[0]


def _trouble(lm: Any, expected: Tensor | None) -> str | None:
    """What is wrong with the log-probabilities of a trial, as the model is evaluated now."""
    if expected is None:
        return None
    try:
        gap = float((_trial(lm) - expected).abs().max())  # pyright: ignore[reportOptionalOperand]
    except TROUBLE as error:
        return f"{type(error).__name__}: {error}"
    return None if gap <= _tolerance(lm) else f"log-probabilities differ by {gap:.2g}"


def _tolerance(lm: Any) -> float:
    """In nats. A wrong mask or position makes differences of order 1, rounding in 16 bit or less up to some 0.1."""
    return 1e-3 if next(lm.parameters()).dtype == torch.float32 else 0.3


@torch.no_grad()
def padding_gap(model: PreTrainedModel | PeftModel) -> float | None:
    """How far, in nats, log-probabilities are from those of a row that the model reads alone, without mask and
    positions, where that is more than rounding; None: it is not, or cannot be tried.

    Raises:
        ValueError: a token of the model sees those after it.
    """
    lm = causal_lm(model)
    # LLM.int8 rounds a token by what is in the others
    if is_encoder_decoder(lm) or is_fsdp() or getattr(lm, "is_quantized", False) or (ours := _trial(lm)) is None:
        return None
    alone, ahead = torch.zeros_like(ours), 0.0
    rows = [(group.prompt.ids, ids) for group in _trial_groups(lm) for ids in group.completion_ids]
    for row, (prompt, ids) in enumerate(rows):
        tokens = torch.tensor([[*prompt, *ids]], device=ours.device)
        otherwise = torch.cat([tokens[:, :-1], tokens[:, :1]], 1)  # but for the last
        try:
            with evaluation_mode(lm):
                logits, changed = (lm(input_ids=x, use_cache=False).logits[0].float() for x in (tokens, otherwise))
        except TROUBLE:
            return None
        ahead = max(ahead, float((logits - changed)[:-1].abs().max()))
        scored = logits[len(prompt) - 1 : -1].log_softmax(-1)
        alone[row, : len(ids)] = scored.gather(1, tokens[0, len(prompt) :, None])[:, 0]
    if ahead > _tolerance(lm):
        raise ValueError(
            f"A token of {type(lm).__name__} sees those after it (they change its logits by {ahead:.2g}), so it "
            "cannot learn to predict them; take another model, or load it as a decoder, where its config has "
            "is_decoder."
        )
    gap = float((ours - alone).abs().max())
    return gap if gap > _tolerance(lm) else None


@torch.no_grad()
def _trial(lm: Any) -> Tensor | None:
    """Log-probabilities of two small groups; None where weights are not all there (ZeRO-3, other ranks of FSDP)."""
    if any(parameter.is_meta or hasattr(parameter, "ds_id") for parameter in lm.parameters()):
        return None
    batch = RolloutBatch.from_groups(_trial_groups(lm), pad_token_id=0).to(input_device(lm))
    with evaluation_mode(lm):
        return per_token_logps(lm, batch)[0]


def _trial_groups(lm: Any) -> list[Group]:
    vocabulary = lm.get_input_embeddings().weight.shape[0]
    ids = [number * 7 % (vocabulary - 1) + 1 for number in range(16)]
    return [
        Group(Prompt(ids[:4], {}, 0), [ids[4:7], ids[7:8]], [True, True]),
        Group(Prompt(ids[8:9], {}, 1), [ids[9:12], ids[12:16]], [True, True]),
    ]

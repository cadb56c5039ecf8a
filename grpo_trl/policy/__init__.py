"""How a language model is loaded and evaluated on what was sampled."""

from .by_group import ScoredByGroup
from .loading import holds_adapter, load_policy
from .logprobs import causal_lm, is_encoder_decoder, is_packed, per_token_logps
from .mode import disable_dropout, evaluation_mode
from .packing import pieces
from .reference import (
    LEAVE_THE_BASE,
    REFERENCE_ADAPTER,
    FrozenReference,
    Reference,
    freeze_adapter,
    load_reference_model,
    make_reference,
    needs_frozen_adapter,
    needs_reference_model,
    whole_parameters,
)
from .support import prepare

__all__ = [
    "LEAVE_THE_BASE",
    "REFERENCE_ADAPTER",
    "FrozenReference",
    "Reference",
    "ScoredByGroup",
    "causal_lm",
    "disable_dropout",
    "evaluation_mode",
    "freeze_adapter",
    "holds_adapter",
    "is_encoder_decoder",
    "is_packed",
    "load_policy",
    "load_reference_model",
    "make_reference",
    "needs_frozen_adapter",
    "needs_reference_model",
    "per_token_logps",
    "pieces",
    "prepare",
    "whole_parameters",
]

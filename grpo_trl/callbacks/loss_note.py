"""One sentence for the user who wonders why the loss is about 0."""

import logging
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

logger = logging.getLogger(__name__)

CENTRED = ("clip", "sapo")  # surrogates in whose value centred advantages cancel
SMALL_LOSS = 1e-2  # below what a change of the policy moves it by, far below any loss of supervised training


class LossNoteCallback(TrainerCallback):
    """Logs `loss_note` at the first log whose loss is small, once, on the main process."""

    def __init__(self):
        self._said = False

    def on_log(self, args, state, control, logs=None, **kwargs):
        note = loss_note(logs or {}) if args.surrogate in CENTRED else None
        if note and not self._said and state.is_world_process_zero:
            logger.warning(note)
            self._said = True


def loss_note(logs: Mapping[str, Any]) -> str | None:
    """What a `loss` of about 0 means (|loss| < 0.01) beside a gradient; None if there is no loss, it is larger, or
    there is no gradient."""
    loss = logs.get("loss")
    if loss is None or not abs(loss) < SMALL_LOSS or logs.get("grad_norm") == 0:
        return None
    return (
        f"loss={loss:.2g} is near 0 by construction: while the ratio is 1, centred advantages cancel in it, though "
        "not in its gradient; watch `reward`, `kl` and `grad_norm` instead (docs/algorithms.md)."
    )

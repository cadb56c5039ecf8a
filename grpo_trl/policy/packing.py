"""From rows of a `RolloutBatch` to the tokens that a model is run on, and back to (B, T).

`pack` puts each prompt into the stream once, followed by its completions; `pad` repeats it; `encode` gives it to an
encoder. All say which positions are scored and with which label, so that one code evaluates them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from ..batch import RolloutBatch
from .attention import GroupLayout, no_mask


@dataclass
class Stream:
    """What a language model is called with, and which of its positions predict a completion token.

    `scored` are the M places, in the flattened (rows x columns) of `inputs["input_ids"]` (of an encoder-decoder:
    `decoder_input_ids`), whose next token is a token of a completion, in the order of `completion_mask`: row by row;
    `labels` (M,) are those tokens.
    """

    inputs: dict[str, Any]
    scored: Tensor | slice
    labels: Tensor
    completion_mask: Tensor  # (B, T) bool

    def rows(self, values: Tensor) -> Tensor:
        """(M,) -> (B, T), 0 outside the completions."""
        mask = self.completion_mask
        values = values.to(mask.device)  # from the head's, where a model is split over devices
        return values.new_zeros(mask.shape).masked_scatter(mask, values)


def pack(batch: RolloutBatch) -> Stream:
    """Of each group `prompt[:-1]` once, then `[prompt[-1]] + completion[:-1]` of each of its rows, whose positions go
    on from the prompt's."""
    ids = torch.cat([batch.prompt_ids, batch.completion_ids], dim=1)
    width = batch.prompt_ids.shape[1]  # prompts end, and completions begin, here
    prompts, completions = batch.prompt_mask.sum(1).tolist(), batch.completion_mask.sum(1).tolist()
    groups = _groups(batch)
    # a part of the stream: row of `ids`, first column, length, first position. Nothing but the prompt is there to be
    # run when all completions of a group are empty, and a stream may not be
    shared = [
        (rows[0], width - prompts[rows[0]], prompts[rows[0]] - any(completions[row] for row in rows), 0)
        for rows in groups
    ]
    branches = [(row, width - 1, completions[row], prompts[row] - 1) for rows in groups for row in rows]
    parts = shared + branches
    places = [row * ids.shape[1] + torch.arange(column, column + length) for row, column, length, _ in parts]
    positions = [torch.arange(position, position + length) for _, _, length, position in parts]
    mask = batch.completion_mask.bool()
    lengths = [length for _, _, length, _ in shared]
    inputs = {
        "input_ids": ids.flatten()[torch.cat(places).to(ids.device)][None],
        "position_ids": torch.cat(positions).to(ids.device)[None],
        "attention_mask": no_mask(ids.device),
        "layout": GroupLayout(lengths, [[completions[row] for row in rows] for rows in groups], unread=sum(lengths)),
    }
    return Stream(inputs, slice(sum(lengths), None), batch.completion_ids[mask], mask)


def pieces(batch: RolloutBatch, max_tokens: int | None, *, packed: bool) -> list[slice]:
    """Neighbouring rows whose streams have at most `max_tokens` tokens each (one row may have more).

    A group stays in one piece where it fits into one; else its rows are dealt out, each piece with the prompt again.
    """
    if max_tokens is None:
        return [slice(0, len(batch))]
    if not packed:
        size = max(1, max_tokens // (batch.prompt_ids.shape[1] + batch.completion_ids.shape[1]))
        return [slice(start, min(start + size, len(batch))) for start in range(0, len(batch), size)]
    prompts, completions = batch.prompt_mask.sum(1).tolist(), batch.completion_mask.sum(1).tolist()
    cuts, tokens = [0], 0
    for rows in _groups(batch):
        shared = prompts[rows[0]] - 1
        whole = shared + sum(completions[row] for row in rows)
        if tokens and tokens + whole > max_tokens:
            cuts.append(rows[0])
            tokens = 0
        if whole <= max_tokens:
            tokens += whole
            continue
        tokens += shared
        for row in rows:
            if row > cuts[-1] and tokens + completions[row] > max_tokens:
                cuts.append(row)
                tokens = shared
            tokens += completions[row]
    return [slice(a, b) for a, b in pairwise([*cuts, len(batch)])]


def num_tokens(batch: RolloutBatch, *, packed: bool) -> int:
    """Of the stream that a model is run on, padding included."""
    if not packed:
        return batch.prompt_ids.numel() + batch.completion_ids.numel()
    prompts = batch.prompt_mask.sum(1).tolist()
    return sum(prompts[rows[0]] - 1 for rows in _groups(batch)) + int(batch.completion_mask.sum())


def _groups(batch: RolloutBatch) -> list[list[int]]:
    """Neighbouring rows with the same prompt."""
    group_ids = batch.group_ids.tolist()
    return [list(rows) for _, rows in groupby(range(len(batch)), key=group_ids.__getitem__)]


def pad(batch: RolloutBatch) -> Stream:
    """Each row with its prompt, as padded as the batch."""
    ids = torch.cat([batch.prompt_ids, batch.completion_ids], dim=1)
    mask = torch.cat([batch.prompt_mask, batch.completion_mask], dim=1)
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        # explicit: left-padded, models with absolute positions would otherwise count the pads (huggingface/trl#6800)
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }
    completion_mask = batch.completion_mask.bool()
    row, column = completion_mask.nonzero(as_tuple=True)
    scored = row * ids.shape[1] + batch.prompt_ids.shape[1] - 1 + column
    return Stream(inputs, scored, batch.completion_ids[completion_mask], completion_mask)


def encode(batch: RolloutBatch, start: Sequence[int]) -> Stream:
    """For an encoder-decoder: each row's prompt to be encoded, its completion to be decoded after `start`."""
    mask = batch.completion_mask.bool()
    before = decoder_inputs(batch, start)
    decoded = torch.cat([before["decoder_input_ids"], batch.completion_ids], dim=1)[:, :-1]
    attended = torch.cat([before["decoder_attention_mask"], batch.completion_mask], dim=1)[:, :-1]
    inputs = encoder_inputs(batch) | {"decoder_input_ids": decoded, "decoder_attention_mask": attended}
    row, column = mask.nonzero(as_tuple=True)
    return Stream(inputs, row * decoded.shape[1] + len(start) - 1 + column, batch.completion_ids[mask], mask)


def decoder_inputs(batch: RolloutBatch, start: Sequence[int]) -> dict[str, Tensor]:
    """What is before each completion. With a mask: some (T5Gemma) would take pad tokens among them for padding."""
    ids = torch.tensor([start] * len(batch), device=batch.prompt_ids.device)
    return {"decoder_input_ids": ids, "decoder_attention_mask": torch.ones_like(ids)}


def encoder_inputs(batch: RolloutBatch) -> dict[str, Tensor]:
    """The prompts padded on the right: an encoder counts its positions (BART) from the first column."""
    order = batch.prompt_mask.argsort(dim=1, descending=True, stable=True)
    return {
        "input_ids": batch.prompt_ids.gather(1, order),
        "attention_mask": batch.prompt_mask.gather(1, order),
    }

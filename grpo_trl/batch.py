"""What flows through a step: `Prompt` -> `Group` (ragged) -> `RolloutBatch` ((B, T), padded).

`RolloutBatch.from_groups` is where ragged becomes padded: prompts left, completions right.
Masks are carried, never guessed from pad ids: a tokenizer whose pad token is its EOS token loses no EOS.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass
class Prompt:
    """One prompt drawn for a rollout.

    `ids` are its tokens (P,), `example` is its dataset row (`prompt` as the user wrote it - text or messages - and
    every other column, all of which reach the rewards), `draw` is the global number of this draw: sampling is a
    function of (seed, draw, row of the group, token), so no two draws share random numbers.
    """

    ids: list[int]
    example: dict[str, Any]
    draw: int


@dataclass
class Group:
    """One prompt and its G completions, ragged: the unit of sampling, scoring and training.

    `completions` holds what rewards and logs read (text, or messages for a conversational prompt); it is filled
    after decoding. `rewards_per_func` is (G, F); NaN means that a reward does not apply to that completion.
    """

    prompt: Prompt
    completion_ids: list[list[int]]  # G lists of token ids, the ending EOS included
    terminated: list[bool]  # G flags: ended with an EOS token (False: truncated)
    sampling_per_token_logps: list[list[float]] | None = None  # G lists, log-probabilities under the sampler
    loss_masks: list[list[int]] | None = None  # G lists of 0/1: 0 keeps a token (tool output, say) out of the loss
    completions: list[Any] = field(default_factory=list)
    rewards_per_func: Tensor | None = None

    def __post_init__(self):
        lengths = [len(ids) for ids in self.completion_ids]
        if len(self.terminated) != len(lengths):
            raise ValueError(f"Group: {len(self.terminated)} `terminated` flags for {len(lengths)} completions.")
        for name in ("sampling_per_token_logps", "loss_masks"):
            rows = getattr(self, name)
            if rows is not None and [len(row) for row in rows] != lengths:
                raise ValueError(
                    f"Group.{name} must have one value per token: got rows of {[len(row) for row in rows]} for "
                    f"completions of {lengths} tokens."
                )

    def __len__(self) -> int:
        return len(self.completion_ids)

    def in_loss(self, *, mask_truncated_completions: bool) -> list[list[int]]:
        """Which tokens count in the loss: G lists of 0/1."""
        masks = self.loss_masks or [[1] * len(ids) for ids in self.completion_ids]
        if not mask_truncated_completions:
            return masks
        return [mask if ended else [0] * len(mask) for mask, ended in zip(masks, self.terminated, strict=True)]


@dataclass
class RolloutBatch:
    """B completions (groups contiguous), padded. T: longest completion, P: longest prompt of these rows.

    `completion_mask` marks the tokens that exist (attention); `loss_mask` those of them that count in the loss: it is
    0 on masked tool output and on truncated completions when these are masked. Fields read like a mapping too
    (`batch["advantages"]`), as in TRL's `inputs`.
    """

    prompt_ids: Tensor  # (B, P) long, padded on the left
    prompt_mask: Tensor  # (B, P) long
    completion_ids: Tensor  # (B, T) long, padded on the right
    completion_mask: Tensor  # (B, T) long
    loss_mask: Tensor  # (B, T) long
    group_ids: Tensor  # (B,) long: rows with the same number have the same prompt
    advantages: Tensor | None = None  # (B,) fp32
    token_weights: Tensor | None = None  # (B, T) fp32
    mean_weights: Tensor | None = None  # (B, T) fp32: those of a mean over tokens, for the entropy bonus
    old_per_token_logps: Tensor | None = None  # (B, T) fp32; None: the update is on-policy
    ref_per_token_logps: Tensor | None = None  # (B, T) fp32; None: no KL term
    sampling_per_token_logps: Tensor | None = None  # (B, T) fp32

    @classmethod
    def from_groups(
        cls, groups: Sequence[Group], *, pad_token_id: int, mask_truncated_completions: bool = False
    ) -> "RolloutBatch":
        """Pads groups of any sizes into one batch on the CPU, rows in the order of the groups."""
        prompts = [group.prompt.ids for group in groups for _ in range(len(group))]
        completions = [ids for group in groups for ids in group.completion_ids]
        loss_masks = [
            mask for group in groups for mask in group.in_loss(mask_truncated_completions=mask_truncated_completions)
        ]
        sampling_logps = None
        if all(group.sampling_per_token_logps is not None for group in groups):
            rows = [logps for group in groups for logps in group.sampling_per_token_logps or []]
            sampling_logps = pad_rows(rows, 0.0)
        return cls(
            prompt_ids=pad_rows(prompts, pad_token_id, side="left"),
            prompt_mask=pad_rows([[1] * len(ids) for ids in prompts], 0, side="left"),
            completion_ids=pad_rows(completions, pad_token_id),
            completion_mask=pad_rows([[1] * len(ids) for ids in completions], 0),
            loss_mask=pad_rows(loss_masks, 0),
            group_ids=torch.tensor([number for number, group in enumerate(groups) for _ in range(len(group))]),
            sampling_per_token_logps=sampling_logps,
        )

    def __len__(self) -> int:
        return len(self.completion_ids)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors()

    def __getitem__(self, name: str) -> Tensor | None:
        return getattr(self, name)

    def __setitem__(self, name: str, value: Tensor | None) -> None:
        if name not in {field.name for field in dataclasses.fields(self)}:
            raise KeyError(f"A RolloutBatch has no field {name!r}.")
        setattr(self, name, value)

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are set, by name."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def to(self, device: torch.device | str) -> "RolloutBatch":
        """Moves every field. Dtypes stay: log-probs, advantages and weights are fp32 on every engine."""
        return RolloutBatch(**{name: value.to(device) for name, value in self.tensors().items()})

    def tokens(self) -> "RolloutBatch":
        """Ids and masks alone: all that a model needs to score the completions."""
        return RolloutBatch(
            self.prompt_ids,
            self.prompt_mask,
            self.completion_ids,
            self.completion_mask,
            self.loss_mask,
            self.group_ids,
        )

    def rows(self, index: slice | list[int]) -> "RolloutBatch":
        """The chosen rows, trimmed to their own longest prompt and completion."""
        chosen = {name: value[index] for name, value in self.tensors().items()}
        prompt_length = max(1, int(chosen["prompt_mask"].sum(1).max()))
        completion_length = max(1, int(chosen["completion_mask"].sum(1).max()))
        for name, value in chosen.items():
            if name.startswith("prompt_"):
                chosen[name] = value[:, -prompt_length:]
            elif value.dim() == 2:
                chosen[name] = value[:, :completion_length]
        return RolloutBatch(**chosen)


def pad_rows(rows: Sequence[Sequence[int | float]], value: int | float, side: str = "right") -> Tensor:
    """Ragged rows -> (B, longest), at least one column wide."""
    dtype = torch.float32 if isinstance(value, float) else torch.long
    tensors = [torch.tensor(row, dtype=dtype) for row in rows]
    padded = pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)
    return padded if padded.shape[1] else padded.new_full((len(rows), 1), value)

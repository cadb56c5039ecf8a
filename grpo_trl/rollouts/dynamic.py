"""Dynamic sampling: draw prompts until the batch is full of groups that teach something (DAPO, arXiv 2503.14476,
section 3.2).

A group whose rewards are all equal has no gradient. It is dropped, and further prompts are drawn, for at most so many
rounds. Groups beyond what is needed are kept for the next batch while their policy is recent enough. Which groups make
a batch depends on the order of their draws alone: not on the number of ranks, nor on which rank was lucky.

Plain callables and no model in here.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from math import ceil, gcd, lcm
from typing import Any

from ..batch import Group, Prompt


@dataclass
class Scored:
    """A group with the reward that is compared, one per completion (NaN: none applies), and when it was sampled."""

    group: Group
    rewards: list[float]
    born: int  # optimizer steps made before
    solved: bool = False  # every completion passed


@dataclass
class Cost:
    """What a batch took, over all ranks. Counts are of groups unless said otherwise."""

    drawn: int = 0
    kept: int = 0  # in the batch, carried ones included
    all_right: int = 0  # not informative and solved, of those drawn
    all_wrong: int = 0  # not informative, not solved
    carried: int = 0  # in the batch, from a former one
    expired: int = 0  # were to be carried and grew too old
    rounds: int = 0
    tokens: int = 0  # of completions sampled
    trained_tokens: int = 0  # of completions in the batch


@dataclass
class DynamicSampler:
    """Fills batches. Its state (`state_dict`) is what a resumed run needs.

    Args:
        is_informative: whether a group has a gradient.
        max_rounds: rounds of drawing per batch; the first is one of them.
        max_age: optimizer steps after which a surplus group is no longer used; 0: none is kept.
        round_size: least number of prompts of a round, over all ranks: what the engine decodes at a time anyway.
    """

    is_informative: Callable[[Scored], bool]
    max_rounds: int
    max_age: int
    round_size: int = 1
    surplus: list[Scored] = field(default_factory=list)  # of this rank
    accepted: float = 0.0  # of late draws, weighted: what the acceptance rate is estimated from
    drawn: float = 0.0

    def fill(
        self,
        wanted: int,
        step: int,
        sample: Callable[[int], list[Scored]],
        gather: Callable[[list[Any]], list[Any]],
        world_size: int,
    ) -> tuple[list[Scored], Cost]:
        """This rank's informative groups, `wanted` over all ranks or fewer, and what they took.

        Args:
            wanted: groups of a batch over all ranks.
            step: optimizer steps made so far.
            sample: draws so many prompts over all ranks and returns this rank's share of them, scored.
            gather: concatenates lists over ranks; every rank calls it equally often.
            world_size: the number of ranks; rounds are multiples of it.
        """
        fresh = [scored for scored in self.surplus if step - scored.born <= self.max_age]
        cost = Cost(expired=sum(gather([len(self.surplus) - len(fresh)])))
        pool, self.surplus = fresh, []
        while (found := sum(gather([len(pool)]))) < wanted and cost.rounds < self.max_rounds:
            new = sample(self._next_round(wanted, wanted - found, world_size))
            verdicts = [self.is_informative(scored) for scored in new]
            informative = [scored for scored, verdict in zip(new, verdicts, strict=True) if verdict]
            pool += informative
            equal = [scored.solved for scored, verdict in zip(new, verdicts, strict=True) if not verdict]
            tokens = sum(len(ids) for scored in new for ids in scored.group.completion_ids)
            seen = gather([(len(new), len(informative), sum(equal), len(equal) - sum(equal), tokens)])
            drawn, accepted, right, wrong, tokens = (sum(column) for column in zip(*seen, strict=True))
            self._learn(drawn, accepted)
            cost.rounds += 1
            cost.drawn, cost.tokens = cost.drawn + drawn, cost.tokens + tokens
            cost.all_right, cost.all_wrong = cost.all_right + right, cost.all_wrong + wrong
        first = set(sorted(gather([scored.group.prompt.draw for scored in pool]))[:wanted])
        chosen = [scored for scored in pool if scored.group.prompt.draw in first]
        if self.max_age:
            self.surplus = [
                scored
                for scored in pool
                if scored.group.prompt.draw not in first and scored.group.sampling_per_token_logps is not None
            ]
        counts = gather(
            [
                (
                    len(chosen),
                    sum(scored.born < step for scored in chosen),
                    sum(len(ids) for scored in chosen for ids in scored.group.completion_ids),
                )
            ]
        )
        cost.kept, cost.carried, cost.trained_tokens = (sum(column) for column in zip(*counts, strict=True))
        return chosen, cost

    def _next_round(self, wanted: int, missing: int, world_size: int) -> int:
        """Prompts to draw: as many as make up for what is missing at the acceptance rate so far, at most fourfold."""
        rate = self.accepted / self.drawn if self.drawn else 1.0
        size = max(self.round_size, min(4 * missing, ceil(missing / max(rate, 1e-6))))
        multiple = lcm(gcd(8, wanted), world_size)  # the same for 1, 2, 4 and 8 ranks
        return ceil(size / multiple) * multiple

    def _learn(self, drawn: int, accepted: int) -> None:
        """The policy learns, so late draws say more than early ones."""
        self.drawn, self.accepted = 0.8 * self.drawn + drawn, 0.8 * self.accepted + accepted

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists. Rows of the dataset are left out: carried groups are scored already."""
        surplus = [
            {"group": asdict(_without_row(scored.group)), "rewards": scored.rewards, "born": scored.born}
            for scored in self.surplus
        ]
        return {"surplus": surplus, "accepted": self.accepted, "drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.accepted, self.drawn, self.surplus = state["accepted"], state["drawn"], []
        for scored in state["surplus"]:
            group = Group(**scored["group"] | {"prompt": Prompt(**scored["group"]["prompt"])})
            self.surplus.append(Scored(group, scored["rewards"], scored["born"]))


def _without_row(group: Group) -> Group:
    return Group(
        Prompt(group.prompt.ids, {}, group.prompt.draw),
        group.completion_ids,
        group.terminated,
        sampling_per_token_logps=group.sampling_per_token_logps,
        loss_masks=group.loss_masks,
    )


def distribute(
    chosen: list[Scored],
    *,
    steps: int,
    rank: int,
    world_size: int,
    gather: Callable[[list[Any]], list[Any]],
) -> list[list[Scored]]:
    """This rank's groups of each optimizer step, whichever rank sampled them.

    A step's groups, and their places in it, are the same for any number of ranks: those in order of their draws, dealt
    out to the steps in turn, and those of a step to the ranks in turn. Of fewer groups than a full batch each step
    gets about as many.

    Args:
        chosen: this rank's groups.
        steps: optimizer steps of the batch.
    """
    owners = dict(gather([(scored.group.prompt.draw, rank) for scored in chosen]))
    targets: dict[int, tuple[int, int]] = {}  # draw -> step, rank
    for step in range(steps):
        for place, draw in enumerate(sorted(owners)[step::steps]):
            targets[draw] = (step, place % world_size)
    leaving = [scored for scored in chosen if targets[scored.group.prompt.draw][1] != rank]
    here = [scored for scored in chosen if targets[scored.group.prompt.draw][1] == rank]
    if any(target != owners[draw] for draw, (_, target) in targets.items()):
        here += [scored for scored in gather(leaving) if targets[scored.group.prompt.draw][1] == rank]
    result: list[list[Scored]] = [[] for _ in range(steps)]
    for scored in sorted(here, key=lambda scored: scored.group.prompt.draw):
        result[targets[scored.group.prompt.draw][0]].append(scored)
    return result


def blank(size: int, pad_token_id: int) -> Group:
    """A group that is in no sum and no count, for the places that no informative group takes."""
    return Group(
        Prompt([pad_token_id], {}, draw=-1),
        [[pad_token_id]] * size,
        [True] * size,
        sampling_per_token_logps=[[0.0]] * size,
        loss_masks=[[0]] * size,
    )

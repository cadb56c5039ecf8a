"""A collection: what is sampled at once, scored, compared, and made ready for the updates on it."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from .algorithm import AGGREGATIONS, combine_rewards, group_advantages, passed
from .batch import Group, Prompt, RolloutBatch
from .hooks import TrainerHooks
from .metrics import Metrics, completion_rows, record_rollout
from .policy import Reference, ScoredByGroup, causal_lm, evaluation_mode, is_packed, per_token_logps, pieces
from .policy.support import dynamic_rope
from .refused import raise_all
from .rewards import RewardScorer
from .rollouts import SamplingParams, decode_completions, dump, ordered_groups
from .rollouts.dynamic import Cost, Scored, blank, distribute
from .token_limit import TokenLimit

logger = get_logger(__name__)  # of accelerate: speaks on the main process only

# Nats between a log-probability as sampled and that of the update, up to which the first stands for the second
ROUNDING_GAP = 1e-4


class CollectingTrainer(TrainerHooks):
    """The half of `GRPOTrainer` that makes batches: `collect` and its parts, in the order in which it calls them."""

    scorer: RewardScorer
    reward_weights: Tensor
    train_sampling: SamplingParams
    sampling: SamplingParams  # of training or evaluation, whichever runs
    rollout: Callable[[list[Prompt]], Iterable[Group]]
    extra_columns: dict[str, list[Any]]
    collected: list[Group]  # of the latest batch, its groups
    policy_limit: TokenLimit  # of the update's passes, and of those before it that must equal them
    _by_group: ScoredByGroup | None = None  # in `collect`, of a reference with a device of its own

    @property
    def collector(self) -> Callable[[Any], RolloutBatch]:
        """What makes a batch of the next prompts, as configured."""
        if self.args.replay_rollouts is not None:
            return self.replay
        collect = self.collect_informative if self.args.dynamic_sampling else self.collect
        return partial(self._dumped, collect) if self.args.log_rollouts else collect

    def collect(self, prompts: list[Prompt]) -> RolloutBatch:
        """Samples, scores and compares the completions of this rank's prompts: everything an update needs."""
        with self._reference_beside_sampling():
            groups, rewards_per_func, compared, _ = self._sample_and_score(prompts)
            batch = self._batch(groups, compared)
            if not self.args.on_policy:
                batch.old_per_token_logps = self._old_per_token_logps(batch)
            self._reference_logps(batch)
        assert batch.advantages is not None
        self._log_completions(groups, rewards_per_func, batch.advantages.tolist())
        return batch

    def collect_informative(self, take: Callable[[int], list[Prompt]]) -> RolloutBatch:
        """`collect` with dynamic sampling: of as many prompts as it takes, the groups that carry a gradient."""
        args, step, size = self.args, self.state.global_step, self.args.num_generations
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        sampled: list[tuple[list[Group], Tensor, dict[str, list[Any]]]] = []

        def sample(count: int) -> list[Scored]:
            groups, rewards_per_func, compared, verdicts = self._sample_and_score(take(count))
            sampled.append((groups, rewards_per_func, {name: [*x] for name, x in self.extra_columns.items()}))
            rows = zip(groups, compared.view(-1, size), verdicts.view(-1, size), strict=True)
            return [Scored(group, row.tolist(), step, bool(seen.nanmean() == 1)) for group, row, seen in rows]

        wanted = args.generation_batch_size // size
        chosen, cost = self.dynamic_sampler.fill(wanted, step, sample, gather_object, world_size)
        steps = args.steps_per_generation // args.gradient_accumulation_steps
        if wanted % (steps * world_size):
            steps = 1  # groups straddle the optimizer steps
        places = wanted // (steps * world_size)
        parts = distribute(chosen, steps=steps, rank=rank, world_size=world_size, gather=gather_object)
        free = Scored(blank(size, self.processing_class.pad_token_id), [math.nan] * size, step)
        batch_of: list[Scored] = []
        for part in parts:
            batch_of += [*part, *repeat(free, places - len(part))]

        batch = self._batch(
            [scored.group for scored in batch_of], torch.tensor([scored.rewards for scored in batch_of]).flatten()
        )
        carried = torch.tensor([scored.born < step for scored in batch_of], device=args.device)
        if not args.on_policy or self.all_reduce(carried.sum()):
            batch.old_per_token_logps = self._old_per_token_logps(batch, carried.repeat_interleave(size))
        self._reference_logps(batch)
        self._record_cost(cost, wanted)
        assert batch.advantages is not None
        draws = [scored.group.prompt.draw for scored in batch_of]
        pairs = list(zip(draws, batch.advantages.view(-1, size).tolist(), strict=True))
        advantages = dict(gather_object(pairs)) if args.log_completions else {}  # of what other ranks sampled too
        groups = [group for part, _, _ in sampled for group in part]
        if groups:
            self.extra_columns = {  # one that a round left out is None there
                name: [value for _, rewards, extra in sampled for value in extra.get(name, [None] * len(rewards))]
                for name in dict.fromkeys(name for _, _, extra in sampled for name in extra)
            }
            of_rows = [x for group in groups for x in advantages.get(group.prompt.draw, [None] * size)]
            self._log_completions(groups, torch.cat([rewards for _, rewards, _ in sampled]), of_rows)
        return batch

    def replay(self, prompts: Any) -> RolloutBatch:
        """`collect` without sampling, scoring and reference: the batch that `log_rollouts` wrote for this collection
        and rank. The metrics of rollouts are those of its groups; advantages are made anew where what they depend on
        is set otherwise now.

        Raises:
            FileNotFoundError, ValueError: there is none, it is of another size, or lacks what this run needs.
        """
        args = self.args
        folder, collection = Path(str(args.replay_rollouts)), self.loader.collection
        dump.check_ranks(folder, collection, self.accelerator.num_processes)
        path = folder / dump.file_name(collection, self.accelerator.process_index)
        rollout = dump.read_rollout(
            path,
            num_generations=args.num_generations,
            pad_token_id=self.processing_class.pad_token_id,
            mask_truncated_completions=args.mask_truncated_completions,
        )
        raise_all(dump.replay_problems(rollout, args, self.reward_names, path))
        if rollout.differs(dump.settings_of(args, self.reward_weights), dump.OF_ADVANTAGES):
            rewards_per_func = torch.cat([group.rewards_per_func for group in rollout.groups])  # pyright: ignore[reportArgumentType, reportCallIssue]
            rollout.rewards = combine_rewards(rewards_per_func, self.reward_weights)
            rollout.batch.advantages = self._advantages(self._compared(rewards_per_func)).cpu()
        sampled = [group.prompt.draw >= 0 for group in rollout.groups]  # not the places that were left empty
        groups = [group for group, real in zip(rollout.groups, sampled, strict=True) if real]
        self._count_tokens(groups)
        if groups:
            real = torch.tensor(sampled).repeat_interleave(args.num_generations)
            rewards_per_func = torch.cat([group.rewards_per_func for group in groups])  # pyright: ignore[reportArgumentType, reportCallIssue]
            rewards, advantages = rollout.rewards[real], rollout.batch.advantages[real]  # pyright: ignore[reportOptionalSubscript]
            record_rollout(self.metrics, groups, rewards_per_func, rewards, advantages, self.reward_names)
            self.extra_columns = {}
            self._log_completions(groups, rewards_per_func, advantages.tolist())
        return rollout.batch.to(args.device)

    def _dumped(self, collect: Callable[[Any], RolloutBatch], prompts: Any) -> RolloutBatch:
        """`collect`, and the batch with its text and rewards into `<output_dir>/rollouts/`."""
        collection, step = self.loader.collection, self.state.global_step
        self.collected = []
        batch = collect(prompts)
        if sum(map(len, self.collected)) != len(batch):
            raise ValueError(
                "log_rollouts=True needs the groups of the batch, and `collect` of this trainer made one without "
                "them; set `self.collected` there (a list of Group), or leave log_rollouts out."
            )
        unknown = torch.full((self.args.num_generations, len(self.reward_names)), math.nan)
        rewards_per_func = torch.cat(
            [unknown if group.rewards_per_func is None else group.rewards_per_func for group in self.collected]
        )
        rewards = combine_rewards(rewards_per_func, self.reward_weights)
        name = dump.file_name(collection, self.accelerator.process_index)
        settings = dump.settings_of(self.args, self.reward_weights)
        rollout = dump.Rollout(self.collected, batch, rewards, self.reward_names, settings)
        path = Path(str(self.args.output_dir)) / dump.FOLDER / name
        dump.write_rollout(path, rollout, step=step, ranks=self.accelerator.num_processes)
        return batch

    def _sample_and_score(self, prompts: list[Prompt]) -> tuple[list[Group], Tensor, Tensor, Tensor]:
        """Groups, the rewards of their completions by each function (B, F), what is compared of them (B,), and which
        of them passed (B,)."""
        groups = self.sample(prompts)
        rewards_per_func = self.score(groups, self.metrics)
        compared = self._compared(rewards_per_func)
        rewards = combine_rewards(rewards_per_func, self.reward_weights)
        for group, rows in zip(groups, rewards_per_func.split(self.args.num_generations), strict=True):
            group.rewards_per_func = rows
        self.metrics.add("rollout/scoring_wait_seconds", self.scorer.wait_seconds)
        self.metrics.add("scoring/busy_seconds", self.scorer.busy_seconds)
        record_rollout(self.metrics, groups, rewards_per_func, rewards, compared, self.reward_names)
        self._count_tokens(groups)
        verdicts = passed(rewards_per_func, self.reward_weights, self.args.eval_pass_threshold)
        self._remember(groups, verdicts)
        return groups, rewards_per_func, compared, verdicts

    def _count_tokens(self, groups: list[Group]) -> None:
        """Over all ranks, each of which must call it, with groups or without."""
        lengths = [len(group.prompt.ids) + len(ids) for group in groups for ids in group.completion_ids]
        # of each rank; the update waits for the one that has most
        mine = torch.tensor([sum(lengths)], device=self.args.device)
        tokens = cast(Tensor, self.accelerator.gather(mine))
        self.num_tokens += int(tokens.sum())
        if len(tokens) > 1 and tokens.any():
            self.metrics.add("rollout/token_imbalance", float(tokens.max() / tokens.double().mean()))

    def sample(self, prompts: list[Prompt]) -> list[Group]:
        """`rollout`, with the groups in the order of the prompts and decoded; refuses an incomplete one. Each group is
        given to the rewards when it is there, and to a reference that has a device of its own."""
        self.scorer.forget()  # a former rollout that nobody scored
        bar = tqdm(
            self._started(self.rollout(prompts)),
            "rollout",
            total=len(prompts),
            leave=False,
            disable=self.args.disable_tqdm or not self.is_world_process_zero(),
        )
        # PeftModel.generate does not pass through the forward that accelerate wraps in autocast
        try:
            with self.accelerator.autocast():
                return ordered_groups(prompts, bar, self.sampling.num_generations)
        except BaseException:
            self.scorer.close()
            raise

    def _started(self, groups: Iterable[Group]) -> Iterator[Group]:
        """The groups, decoded, and their scoring begun."""
        for group in groups:
            group.completions = group.completions or decode_completions(group, self.processing_class)
            if self._by_group is not None:
                self._by_group.start(group)
            self.scorer.start(group, trainer_state=self.state)
            yield group

    def score(self, groups: list[Group], metrics: Metrics) -> Tensor:
        """Rewards of each completion by each function, (B, F); NaN: not applicable. `metrics` gets what they log."""
        self.extra_columns = {}
        return self.scorer.score(
            groups,
            trainer_state=self.state,
            log_extra=lambda column, values: self.extra_columns.setdefault(column, []).extend(values),
            log_metric=metrics.add_number,
        )

    def _batch(self, groups: list[Group], compared: Tensor) -> RolloutBatch:
        """Padded, with advantages, on the policy's device."""
        self.collected = groups
        batch = RolloutBatch.from_groups(
            groups,
            pad_token_id=self.processing_class.pad_token_id,
            mask_truncated_completions=self.args.mask_truncated_completions,
        )
        batch.advantages = self._advantages(compared)
        batch = batch.to(self.args.device)
        if self.args.sampler_correction and batch.sampling_per_token_logps is None:
            raise ValueError(
                f"sampler_correction={self.args.sampler_correction!r} compares with the sampler's log-probabilities, "
                "and the rollout gave none; set Group.sampling_per_token_logps, or leave the option out."
            )
        return batch

    def _compared(self, rewards_per_func: Tensor) -> Tensor:
        """(B, F) -> (B,): what is compared of the rewards."""
        aggregate = AGGREGATIONS[self.args.multi_objective_aggregation]
        return aggregate(rewards_per_func, self.reward_weights, self.args.num_generations)

    def _advantages(self, compared: Tensor) -> Tensor:
        return group_advantages(
            compared.to(self.args.device),
            self.args.num_generations,
            self.args.scale_rewards,
            baseline=self.args.advantage_baseline,
            all_reduce=self.all_reduce,
        )

    def _sampling_may_be_exact(self, *, own_rollout: bool) -> bool | None:
        """Whether log-probabilities of sampling stand for the old ones: those of our own engines in fp32, from the
        distribution that is trained. None: they may, and the first rollout measures whether they do."""
        candidate = (
            own_rollout
            and not self.args.use_vllm
            and not self.sampling.truncates
            and self.args.sampler_correction is None
            and self.accelerator.mixed_precision == "no"
            and self.model.dtype == torch.float32
            and dynamic_rope(causal_lm(self.model).config.get_text_config()) is None  # else one rollout says nothing
        )
        return None if candidate else False

    def _old_per_token_logps(self, batch: RolloutBatch, carried: Tensor | None = None) -> Tensor:
        """Of the policy as it sampled, or those of sampling where they stand for them (`_sampling_is_exact`); always
        so in `carried` rows (B,), which a former policy sampled."""
        sampled = batch.sampling_per_token_logps
        if sampled is not None and self._sampling_is_exact:
            return sampled.clone()

        logps = self._policy_logps(batch)
        if sampled is not None and carried is not None:
            logps = torch.where(carried[:, None] & ~sampled.isnan(), sampled, logps)
        if sampled is None or self._sampling_is_exact is False:
            return logps
        compared = batch.loss_mask.bool()  # nothing of a blank place
        if carried is not None:
            compared &= ~carried[:, None]
        far = (sampled - logps).abs().gt(ROUNDING_GAP) & compared
        # of all ranks: they run the same passes
        number, too_far = self.all_reduce(torch.stack([compared.sum(), far.sum()])).tolist()
        if not number:
            return logps
        self._sampling_is_exact = not too_far
        return self._old_per_token_logps(batch, carried) if self._sampling_is_exact else logps

    def _reference_logps(self, batch: RolloutBatch) -> None:
        if self._by_group is not None:
            began = time.perf_counter()
            logps = self._by_group.per_token_logps(self.collected, batch.completion_ids.shape[1])
            self.metrics.add("rollout/reference_wait_seconds", time.perf_counter() - began)
            batch.ref_per_token_logps = logps.to(self.args.device)
        elif self.reference is not None:
            batch.ref_per_token_logps = self._logps_of_reference(self.reference, batch)

    def _logps_of_reference(self, reference: Reference, batch: RolloutBatch) -> Tensor:
        with self.accelerator.autocast():  # as in the update, so that the first KL is that of equal weights
            return reference.per_token_logps(batch, self.train_sampling.temperature)

    @contextlib.contextmanager
    def _reference_beside_sampling(self) -> Iterator[None]:
        """In here a reference with a device of its own scores each group that is complete, beside the sampling of
        others."""
        reference = self.reference
        if reference is None or (device := reference.own_device) is None:
            yield
            return

        def score(group: Group) -> Tensor:
            batch = RolloutBatch.from_groups([group], pad_token_id=self.processing_class.pad_token_id)
            return self._logps_of_reference(reference, batch)

        worker = partial(self.scorer.worker_on, device) if self.args.reward_overlap else None
        try:
            with ScoredByGroup(score, worker) as self._by_group:
                yield
        finally:
            self._by_group = None

    @torch.no_grad()
    def _policy_logps(self, batch: RolloutBatch) -> Tensor:
        """(B, T) of the policy, in the micro-batches (and their pieces) of the update."""
        size = self.args.per_device_train_batch_size
        starts = range(0, len(batch), size)

        def cut(tokens: int | None) -> list[slice]:
            pieces = [(start, self._pieces(batch.rows(slice(start, start + size)), tokens)) for start in starts]
            return [slice(start + rows.start, start + rows.stop) for start, part in pieces for rows in part]

        def score() -> Tensor:
            result = torch.zeros_like(batch.completion_ids, dtype=torch.float32)
            for rows in cut(self.policy_limit.tokens):
                # autocast as in the update, so that the first ratio is exact; dropout off
                with self.accelerator.autocast(), evaluation_mode(self.model):
                    logps, _ = per_token_logps(
                        self.model, batch.rows(rows), temperature=self.train_sampling.temperature
                    )
                result[rows, : logps.shape[1]] = logps.float()
            return result

        return self.policy_limit.run(score, cut)

    def _pieces(self, micro_batch: RolloutBatch, tokens: int | None) -> list[slice]:
        return pieces(micro_batch, tokens, packed=is_packed(self.model))

    def _all_pieces(self, micro_batches: list[RolloutBatch], tokens: int | None) -> list[list[slice]]:
        return [self._pieces(micro_batch, tokens) for micro_batch in micro_batches]

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks."""
        return self.accelerator.reduce(tensor.to(self.args.device), reduction="sum")  # pyright: ignore[reportReturnType]

    def _log_completions(
        self, groups: list[Group], rewards_per_func: Tensor, advantages: Sequence[float | None]
    ) -> None:
        """Keeps the last rollout for the table. No advantage: a group that dynamic sampling dropped or kept back."""
        if self.args.log_completions:
            self.completions_log = completion_rows(
                groups, rewards_per_func, advantages, self.reward_names, self.extra_columns
            )

    def _remember(self, groups: list[Group], verdicts: Tensor) -> None:
        """Counts a rollout in the prompt memory. verdicts (B,): as of `passed`."""
        by_group = verdicts.view(len(groups), -1).tolist()
        self.prompt_memory.update(groups, by_group, self.state.global_step, gather_object)
        if self.prompt_memory.can_skip:
            skipped, taken = self.loader.passed_over, len(groups) * self.accelerator.num_processes
            self.metrics.add("prompt_memory/skipped_ratio", skipped, skipped + taken)

    def _record_cost(self, cost: Cost, wanted: int) -> None:
        values = asdict(cost)
        tokens, trained = values.pop("tokens"), values.pop("trained_tokens")
        for name, value in values.items():
            self.metrics.add(f"dynamic_sampling/{name}", value)
        self.metrics.add("dynamic_sampling/tokens_per_trained_token", tokens, trained)
        if cost.kept < wanted:
            logger.warning_once(
                f"Dynamic sampling found {cost.kept} informative groups of {wanted} in {cost.rounds} rounds "
                "(dynamic_sampling_max_rounds); updates use those there are. See the metrics dynamic_sampling/*."
            )

"""vLLM as the sampler: a server elsewhere, or a copy on the policy's devices.

`vllm_connection` (TRL's) starts or finds vLLM and sends it the weights. What it is asked for is said here: one request
per prompt, with all its completions and a seed of its own, from the rank that the group belongs to.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from .. import manifest
from ..batch import Group, Prompt
from ..config import GRPOConfig, mapping
from .sampling import SamplingParams
from .vllm_checks import check_ranks, check_vllm, check_weights, takes_adapters

REQUESTS = 64  # at a time from one rank; as many connections as TRL's client keeps


class VLLMEngine:
    """Samples with vLLM, as `args.vllm_...` say.

    Args:
        model: the unwrapped policy, whose weights vLLM gets.
        args: of the run.
        accelerator: of the run. All ranks build the engine together, and call `sync_weights` together.
        max_concurrent_rows: completions that are decoded at a time, in whole groups, for this rank (server) or by this
            copy (colocate). Default: 64 groups; a whole rollout.
        cache_implementation, cuda_graphs: of other engines, without effect here.

    Raises:
        ValueError: vLLM is absent or too old, or cannot be given this policy's weights; a server whose
            log-probabilities are not those of what it samples, or without room for the longest row;
            `generation_kwargs` that vLLM does not know.
        ConnectionError: no server after `vllm_server_timeout` seconds.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        args: GRPOConfig,
        accelerator: Accelerator,
        max_concurrent_rows: int | None = None,
        cache_implementation: str | None = None,
        cuda_graphs: bool = False,
    ):
        check_vllm()
        check_ranks(model, accelerator)
        from .vllm_connection import Adapters, Connection, check_params, connect  # imports vLLM

        check_params(mapping(args.generation_kwargs))
        self.args, self.accelerator, self.max_concurrent_rows = args, accelerator, max_concurrent_rows
        self.client: Any = connect(args) if args.vllm_mode == "server" else None  # else there is a copy
        if self.client is not None and takes_adapters(self.client, model):
            self.connection: Any = Adapters(self.client, model, args, accelerator)  # pyright: ignore[reportArgumentType]
        else:
            check_weights(model, args)
            self.connection = Connection(model, args, accelerator, max_concurrent_rows)
        self.copy_sleeps = args.vllm_enable_sleep_mode and self.client is None
        self.copy_is_asleep = self.copy_sleeps

    def sync_weights(self, model: PreTrainedModel) -> None:
        """Sends the policy's weights with its adapter merged into them, or the adapter alone. Every rank calls it:
        shards are gathered, and none samples meanwhile."""
        self.accelerator.wait_for_everyone()
        with self._or_newest_checkpoint("send weights to"):
            self.connection.sync_weights()
        self.copy_is_asleep = False
        self.accelerator.wait_for_everyone()

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Iterator[Group]:
        """Yields groups as they finish (server), or all at the end (colocate)."""
        if sampling.logits_processors:
            raise ValueError("vLLM cannot run logits_processors of this process; use rollout_engine native.")
        return self._from_server(prompts, sampling) if self.client is not None else self._from_copy(prompts, sampling)

    def _from_server(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Iterator[Group]:
        rows = self.max_concurrent_rows
        workers = max(1, rows // sampling.num_generations) if rows else REQUESTS
        with ThreadPoolExecutor(min(workers, len(prompts))) as pool:
            requests = [pool.submit(self._complete, prompt, sampling) for prompt in prompts]
            try:
                for request in as_completed(requests):
                    with self._or_newest_checkpoint("sample from"):
                        group = request.result()
                    yield group
            finally:
                pool.shutdown(cancel_futures=True)  # after an error the waiting ones are not sent any more

    def _complete(self, prompt: Prompt, sampling: SamplingParams) -> Group:
        options = request_options(sampling, prompt.draw)
        found: Any = self.client.generate([prompt.ids], n=options["n"], generation_kwargs=options)
        return as_group(prompt, found["completion_ids"], found["logprobs"], sampling)

    def _from_copy(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Iterator[Group]:
        from trl.generation.vllm_generation import extract_logprobs

        from .vllm_connection import as_vllm_params

        own, llm = {prompt.draw: prompt for prompt in prompts}, self.connection.llm
        asked = list(prompts)
        if self.args.vllm_tensor_parallel_size > 1:  # the ranks that share a copy ask it for the same
            asked = self._prompts_of_copy(asked)
        if self.copy_sleeps:
            if self.copy_is_asleep:  # which has thrown the weights away
                self.connection.sync_weights()
            llm.wake_up(tags=["kv_cache"])
        params = [as_vllm_params(request_options(sampling, prompt.draw)) for prompt in asked]
        outputs = llm.generate([{"prompt_token_ids": prompt.ids} for prompt in asked], params, use_tqdm=False)
        if self.copy_sleeps:
            llm.sleep(level=2)
            self.copy_is_asleep = True
        for prompt, output in zip(asked, outputs, strict=True):
            if prompt.draw in own:
                ids = [list(completion.token_ids) for completion in output.outputs]
                logprobs, _ = extract_logprobs([output])
                assert logprobs is not None  # they are asked for
                yield as_group(own[prompt.draw], ids, logprobs, sampling)

    def _prompts_of_copy(self, prompts: list[Prompt]) -> list[Prompt]:
        parts: list[Any] = [None] * self.args.vllm_tensor_parallel_size
        bare = [Prompt(prompt.ids, {}, prompt.draw) for prompt in prompts]
        torch.distributed.all_gather_object(parts, bare, group=self.connection.tp_group)
        return [prompt for part in parts for prompt in part]

    @contextmanager
    def _or_newest_checkpoint(self, purpose: str) -> Iterator[None]:
        """Says what a lost server means for the run. TRL's client has by then tried again for about a minute."""
        try:
            yield
        except OSError as error:  # those of `requests` are OSErrors
            if self.client is None:
                raise
            folder = Path(self.args.output_dir or ".")
            complete = [path for path in manifest.checkpoints(folder) if manifest.is_complete(path)]
            found = f"from {complete[-1]} (resume_from_checkpoint)" if complete else f"anew: no checkpoint in {folder}"
            raise ConnectionError(
                f"Could not {purpose} the vLLM server at {self.client.base_url}, after several attempts: {error}. "
                f"Look at its log, start it again, and go on {found}."
            ) from error


def request_options(sampling: SamplingParams, draw: int) -> dict[str, Any]:
    """vLLM's SamplingParams for the completions of one draw.

    vLLM gives completion i the seed + i, and knows no greedy sampling of several completions.
    """
    return {
        "n": sampling.num_distinct,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p or 0.0,
        "repetition_penalty": sampling.repetition_penalty,
        "max_tokens": sampling.max_completion_length,
        "logprobs": 0,  # of the sampled tokens alone
        "seed": sampling.seed_of(draw),
        # the run's own EOS tokens, instead of those that vLLM reads from the model's folder
        "stop_token_ids": list(sampling.eos_token_ids),
        "ignore_eos": True,
        **sampling.generation_kwargs,
    }


def as_group(prompt: Prompt, completion_ids: list[Any], logprobs: list[Any], sampling: SamplingParams) -> Group:
    """Completions and, per token, a list that holds its log-probability (None: NaN) -> `Group`."""
    logps = [[math.nan if token[0] is None else token[0] for token in row] for row in logprobs]
    copies = sampling.num_generations // sampling.num_distinct  # more than 1: greedy
    return Group(
        prompt,
        completion_ids * copies,
        terminated=[_is_terminated(ids, sampling) for ids in completion_ids] * copies,
        sampling_per_token_logps=logps * copies,
    )


def _is_terminated(ids: list[int], sampling: SamplingParams) -> bool:
    """By an EOS token, or, where there are some, by a stop string: it did not reach the limit."""
    if ids and ids[-1] in sampling.eos_token_ids:
        return True
    return bool(sampling.generation_kwargs.get("stop")) and len(ids) < sampling.max_completion_length

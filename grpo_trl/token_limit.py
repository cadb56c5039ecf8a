"""Passes over a model of at most so many tokens, and of fewer once memory ran out."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers.utils import logging

logger = logging.get_logger(__name__)

T = TypeVar("T")
OUT_OF_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
MANY = 2**30  # more tokens than any batch has


class TokenLimit:
    """The most tokens in one pass. Memory that runs out lowers it for good.

    Args:
        tokens: at first; None: no limit.
        what: runs the passes, for the message.
        fixed: work is not cut, because every process has to make the same passes: an error stays an error.
        release: gives up memory that others keep, and says whether there was some. Called before the first cut, once:
            what comes back later finds the work's own memory taken.
    """

    def __init__(
        self,
        what: str,
        tokens: int | None = None,
        *,
        fixed: bool = False,
        release: Callable[[], bool] | None = None,
    ):
        self.what, self.tokens, self.fixed, self.release = what, tokens, fixed, release

    def run(
        self, work: Callable[[], T], cut: Callable[[int | None], list[Any]], restart: Callable[[], None] | None = None
    ) -> T:
        """`work`, again from its start in smaller passes whenever memory runs out.

        Args:
            work: makes the passes of `cut(self.tokens)`; may be called several times.
            cut: the passes for a number of tokens, as anything that can be compared.
            restart: undoes what an attempt that failed left behind.

        Raises:
            RuntimeError: that of `work`, if it is another one or the passes cannot be any smaller.
        """
        while True:
            try:
                return work()
            except RuntimeError as error:
                if self.fixed or not is_out_of_memory(error) or not (self._released() or self._lower(cut)):
                    raise
            # out here the error is gone, and with it the frames that hold the tensors of the attempt
            clear_device_cache(garbage_collection=True)
            if restart is not None:
                restart()

    def _released(self) -> bool:
        release, self.release = self.release, None
        return release is not None and release()

    def _lower(self, cut: Callable[[int | None], list[Any]]) -> bool:
        """Halves the limit until it changes the passes; False where none does."""
        passes, tokens = cut(self.tokens), self.tokens or MANY
        while tokens > 1:
            tokens //= 2
            if cut(tokens) != passes:
                self.tokens = tokens
                logger.warning(f"Out of memory in {self.what}: its passes have at most {tokens} tokens from here on.")
                return True
        return False


def is_out_of_memory(error: BaseException) -> bool:
    """Of any device, the CPU's allocator included, and of libraries that allocate beside torch."""
    of_library = isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)
    return isinstance(error, torch.OutOfMemoryError) or of_library or should_reduce_batch_size(error)  # pyright: ignore[reportArgumentType]


def token_batches(lengths: Sequence[tuple[int, ...]], max_tokens: int) -> list[list[int]]:
    """Numbers of the rows, longest first, in batches of at most `max_tokens` tokens with padding (one row may have
    more).

    lengths: of each row its parts, each of which is padded to the longest of the batch.
    """
    batches: list[list[int]] = []
    widths: tuple[int, ...] = ()
    for row in sorted(range(len(lengths)), key=lambda row: -sum(lengths[row])):
        wider = tuple(map(max, widths, lengths[row]))
        if batches and sum(wider) * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(row)
            widths = wider
        else:
            batches.append([row])
            widths = lengths[row]
    return batches

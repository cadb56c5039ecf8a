"""The end of the event loop on which async reward functions run."""

import asyncio
import contextlib
import threading

from transformers.utils import logging
from trl.trainer.utils import shutdown_event_loop_in_daemon

logger = logging.get_logger(__name__)


def end_event_loop(thread: threading.Thread, loop: asyncio.AbstractEventLoop, timeout: float) -> None:
    """Cancels what runs on it, waits for that at most `timeout` seconds, and ends it."""
    with contextlib.suppress(TimeoutError):  # a coroutine that does not await cannot be cancelled
        asyncio.run_coroutine_threadsafe(_cancel_all(), loop).result(timeout)
    shutdown_event_loop_in_daemon(thread, loop)
    if thread.is_alive():
        logger.warning(
            "An async reward function blocks the event loop and cannot be ended: its thread runs on until it returns "
            "or the program ends."
        )
    else:
        loop.close()


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

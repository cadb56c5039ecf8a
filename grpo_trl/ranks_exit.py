"""The exit of a process that is one of several ranks."""

import atexit
import functools
import time

SECONDS = 0.2


@functools.cache  # registered once, however many trainers there are
def pause_at_exit() -> None:
    """Makes this process sleep before Python is finalized, so that gloo's threads come to an end of their work.

    They drop the tensors of a collective after whoever waited for it has gone on, and need the GIL for that. A thread
    that asks for it while Python is being finalized is unwound through a destructor, and the process aborts
    ("terminate called without an active exception") with everything done and saved. Taking the process group down does
    not help as long as anything refers to it, as DeepSpeed does.

    Source: https://github.com/pytorch/pytorch/issues/190489; here it was `AsyncAllgatherWork`, by its backtrace.
    """
    atexit.register(time.sleep, SECONDS)

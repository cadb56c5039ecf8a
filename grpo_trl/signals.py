"""SIGTERM and Ctrl-C: noted at once, acted upon where the run can stop without losing anything."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

WATCHED = (signal.SIGINT, signal.SIGTERM)


class Interruption(BaseException):
    """A run stops where it is. No `Exception`: a reward function that catches those must not catch this one."""


class Stopped(SystemExit, KeyboardInterrupt):
    """Ctrl-C after a checkpoint was saved: `except KeyboardInterrupt` catches it as it does without one, and a program
    that does not ends without a traceback."""


class SignalWatch:
    """Takes over SIGINT and SIGTERM while it is entered, in the main thread; elsewhere it does nothing.

    A signal raises `Interruption` at once between `allow` and `forbid`, else at the next `allow`. A second Ctrl-C is
    Python's own, so that an impatient user gets out; a second SIGTERM changes nothing.

    Args:
        enabled: whether to watch at all.
    """

    def __init__(self, enabled: bool = True):
        self.enabled = enabled
        self.received: int | None = None
        self._allowed = False
        self._former: dict[int, Any] = {}

    @property
    def active(self) -> bool:
        """Whether signals are watched."""
        return bool(self._former)

    def allow(self) -> None:
        """From here on a signal stops the run at once. Raises Interruption if one came before."""
        self._allowed = self.active
        if self.received is not None and self._allowed:
            raise Interruption

    def forbid(self) -> None:
        """From here on a signal is only noted: weights or files are about to change."""
        self._allowed = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if signum == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.received = signum
        if self._allowed:
            self._allowed = False
            raise Interruption

    def __enter__(self) -> "SignalWatch":
        self.received, self._allowed = None, False
        if self.enabled and threading.current_thread() is threading.main_thread():
            self._former = {signum: signal.signal(signum, self._handle) for signum in WATCHED}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._allowed = False
        for signum, handler in self._former.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        self._former = {}
        if self.received is not None and kind is None:
            signal.raise_signal(self.received)  # it came too late to be acted upon here

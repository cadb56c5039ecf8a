"""A plain function in a process of its own that can be killed: for code that may hang, or that needs signals.

`subprocess` rather than `multiprocessing.get_context("spawn")`: spawn runs the user's main script again in the child
(its imports of torch and transformers; the whole training where the script has no `__main__` guard), and leaves a
resource tracker behind.
"""

import contextlib
import json
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

START_TIMEOUT = 300.0  # seconds to import the function's module; not part of a call's time-out
RECORDED = ("log_extra", "log_metric")  # callbacks of the parent: calls are recorded in the child and replayed
_BOOT = (
    f"import json, sys; sys.path[:] = json.loads(sys.argv[2]); from {__name__} import serve; serve(int(sys.argv[1]))"
)


class RewardTimeoutError(TimeoutError):
    """A reward function took longer than its time-out."""


def read(output: Any) -> Any:
    """A generator runs when it is read: what it raises then is the function's error."""
    return list(output) if isinstance(output, Iterator) else output


def in_words(error: BaseException) -> str:
    """Type and text of an error, also of one that has none to give."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception as second:
        return f"{type(error).__name__} (whose text cannot be had: {type(second).__name__})"


class IsolatedFunction:
    """Calls `func` in a child process, started at the first call and kept for the next ones.

    `func` travels by reference (pickle), arguments and result by value. Calls are serialised; any thread may call.
    In the child it runs in the main thread, so signals work. Functions among the arguments `log_extra` and
    `log_metric` are called here, after the function has returned.

    Args:
        func: importable from a module; not a lambda, a closure or a function of the running script.
        name: what errors call it.
        timeout: seconds per call. On expiry the process and what it started are killed; the next call starts afresh.

    Raises:
        ValueError: on construction, where `func` cannot be sent to another process.
        RewardTimeoutError: the time-out. RuntimeError: the process died, or could not import the function.
        Whatever `func` raises, with the child's traceback as a note.
    """

    def __init__(self, func: Callable[..., Any], *, name: str, timeout: float):
        self.name = name
        self.timeout = timeout
        self._function = _pickle_by_reference(func, name)
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._connection: Connection | None = None
        self._finalizer: weakref.finalize | None = None
        self._owner = 0

    @property
    def pid(self) -> int | None:
        """Process id of the child, None while there is none."""
        return self._process.pid if self._process else None

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        recorded = {key: kwargs.pop(key) for key in RECORDED if callable(kwargs.get(key))}
        request = pickle.dumps((args, kwargs, tuple(recorded)))
        with self._lock:
            if self._process is None or self._owner != os.getpid():
                self._start()
            result, calls = self._exchange(request, self.timeout)
        for key, call_args, call_kwargs in calls:
            recorded[key](*call_args, **call_kwargs)
        return result

    def close(self) -> None:
        """Kills the child, if there is one; a call in another thread then raises. A later call starts a new one."""
        while not self._lock.acquire(timeout=0.05):
            process = self._process  # of the call that holds the lock, which ends with it
            if process is not None and process.poll() is None:
                _kill_session(process)
        try:
            self._kill()
        finally:
            self._lock.release()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        path = [entry for entry in sys.path if isinstance(entry, str)]  # as the import system reads it
        # -u: what the function prints is there when it returns, and does not end with the process
        command = [sys.executable, "-u", "-c", _BOOT, str(theirs.fileno()), json.dumps(path)]
        with theirs:
            # a session of its own: Ctrl-C in a terminal reaches the trainer only, and what the function starts
            # (code under test, say) is killed with it
            process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
            )
        self._process, self._connection, self._owner = process, Connection(ours.detach()), os.getpid()
        # runs at interpreter exit too
        self._finalizer = weakref.finalize(self, _end_process, process, self._connection, self._owner)
        try:
            self._exchange(self._function, START_TIMEOUT)
        except RewardTimeoutError as error:
            raise RuntimeError(
                f"Reward function {self.name!r} could not be loaded in its own process within {START_TIMEOUT:g} s: "
                "importing its module takes too long. Load what it needs at the first call, or unset reward_timeout."
            ) from error
        except Exception as error:
            self._kill()
            raise RuntimeError(
                f"Reward function {self.name!r} could not be loaded in its own process: {type(error).__name__}: "
                f"{error} It must be importable from a module on sys.path; or unset reward_timeout."
            ) from error

    def _exchange(self, request: bytes, timeout: float) -> tuple[Any, list]:
        """One request, one reply. Whatever goes wrong in between, the child is killed: a late reply would be taken
        for that of the next call."""
        assert self._connection is not None and self._process is not None
        try:
            self._connection.send_bytes(request)
            if not self._connection.poll(timeout):
                raise RewardTimeoutError(
                    f"Reward function {self.name!r} took longer than its time-out of {timeout:g} s; its process was "
                    "killed. Raise reward_timeout, or make the function return in time."
                )
            reply = self._connection.recv_bytes()
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            process = self._process
            self._kill()
            raise RuntimeError(
                f"The process of reward function {self.name!r} died ({_exit_reason(process.returncode)}) before it "
                "returned. A SIGKILL is often the system running out of memory."
            ) from error
        except BaseException:
            self._kill()
            raise
        error, value = pickle.loads(reply)
        if error is not None:
            raise error
        return value

    def _kill(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._process = self._connection = self._finalizer = None


def serve(handle: int) -> None:
    """The child's main loop: the function first, then calls. Ends, with what it started, when the parent is gone."""
    connection = Connection(handle)
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(connection, requests), daemon=True).start()
    connection.send_bytes(_reply(load := _Loader(), requests.get()))
    while True:
        connection.send_bytes(_reply(partial(_run, load.func), requests.get()))


class _Loader:
    """Unpickles the function, which imports its module."""

    func: Callable[..., Any]

    def __call__(self, message: bytes) -> tuple[None, list]:
        self.func = pickle.loads(message)
        return None, []


def _run(func: Callable[..., Any], message: bytes) -> tuple[Any, list]:
    """Calls the function. Returns its result and the recorded calls of the parent's callbacks."""
    args, kwargs, recorded = pickle.loads(message)
    calls: list[tuple[str, tuple, dict]] = []

    def record(key: str, *call_args: Any, **call_kwargs: Any) -> None:
        calls.append((key, call_args, call_kwargs))

    return read(func(*args, **kwargs, **{key: partial(record, key) for key in recorded})), calls


def _reply(action: Callable[[bytes], Any], message: bytes) -> bytes:
    """(None, value) or (exception, None), pickled. Nothing a function raises ends the process, SystemExit included."""
    try:
        return pickle.dumps((None, action(message)))
    except BaseException as error:
        return _pickled_error(error, traceback.format_exc())


def _pickled_error(error: BaseException, trace: str) -> bytes:
    note = f"Traceback in the process of the reward function:\n{trace}"
    try:
        if not isinstance(error, Exception):
            raise TypeError("only an Exception is raised again in the parent")
        error.add_note(note)
        reply = pickle.dumps((error, None))
        pickle.loads(reply)  # exceptions with their own __init__ may pickle and then fail to load
    except Exception:
        plain = RuntimeError(in_words(error))
        plain.add_note(note)
        reply = pickle.dumps((plain, None))
    return reply


def _read_requests(connection: Connection, requests: "queue.SimpleQueue[bytes]") -> None:
    try:
        while True:
            requests.put(connection.recv_bytes())
    except (EOFError, OSError):
        os.killpg(0, signal.SIGKILL)


def _end_process(process: subprocess.Popen, connection: Connection, owner: int) -> None:
    connection.close()
    if os.getpid() != owner:  # a fork of the trainer (a data loader's worker) does not own the child
        return
    _kill_session(process)
    process.wait()


def _kill_session(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):  # it had ended by itself and left nothing behind
        os.killpg(process.pid, signal.SIGKILL)


def _exit_reason(returncode: int) -> str:
    return f"exit code {returncode}" if returncode >= 0 else f"signal {signal.Signals(-returncode).name}"


def _pickle_by_reference(func: Callable[..., Any], name: str) -> bytes:
    remedy = "define it at module level in a module of its own, or unset reward_timeout."
    inner: Any = func
    while isinstance(inner, partial):
        inner = inner.func
    owner = inner if hasattr(inner, "__qualname__") else type(inner)
    if getattr(owner, "__module__", None) == "__main__":
        raise ValueError(
            f"Reward function {name!r} is defined in the script that runs (__main__), which its own process cannot "
            f"import; {remedy}"
        )
    try:
        return pickle.dumps(func)
    except Exception as error:  # pickle raises PicklingError, AttributeError or TypeError, by the kind of object
        raise ValueError(f"Reward function {name!r} cannot be sent to its own process ({error}); {remedy}") from error

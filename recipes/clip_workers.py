"""Work on files that came from outside, in processes that may die of it: one that hangs, crashes or takes all memory costs the answer to one request, and a new one goes on.

    this process                         the worker
    request as JSON --> a socket   -->   work(request)        memory limited by the kernel (RLIMIT_DATA), no network where the kernel allows that
    answer, checked <-- as JSON    <--   answer               nothing that comes back is unpickled

A worker that has not answered in time is killed. It dies with this process, even amid its work. Linux only; a script that uses it needs `if __name__ == "__main__":`.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import resource
import signal
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from base_model.bounds import held
from base_model.errors import UserError
from reward.safety.process import PRELOADED, settle

LONGEST_ANSWER = 64 << 20  # bytes
STARTS = 3  # in a row that may fail
NEW_NETWORK, NEW_USER = 0x40000000, 0x10000000  # of unshare(2)

Work = Callable[[Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Lost:
    """Why there is no answer."""

    reason: str


class Worker:
    """A process that answers requests, one after another. Begun when it is first asked, and anew after it was lost.

    make: what gives the work, there; it is pickled on its way. seconds: for one request. memory: bytes beyond what the process holds when the work is made.
    """

    def __init__(self, make: Callable[[], Work], *, seconds: float, memory: int, preload: tuple[str, ...] = ()) -> None:
        self._make, self._seconds, self._memory, self._preload = make, seconds, memory, preload
        self._process: Any = None
        self._wire: Connection | None = None
        self.starts = 0

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any] | Lost:
        """Raises UserError where no process can be begun, or the work cannot be made in it."""
        wire = self._wire or self._begin()
        answer = self._exchange(wire, request, self._seconds)
        if isinstance(answer, Lost):
            self.close()
        return answer

    def close(self) -> None:
        """Ends the process; the next request begins another."""
        if self._process is not None:
            self._process.kill()
            self._process.join(5)
        if self._wire is not None:
            self._wire.close()
        self._process = self._wire = None

    def _begin(self) -> Connection:
        reason = ""
        for _ in range(STARTS):
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([*PRELOADED, *self._preload])
            wire, theirs = context.Pipe()
            self._process, self._wire = context.Process(target=_serve, args=(self._make, self._memory, theirs), name="worker", daemon=True), wire
            self.starts += 1
            try:
                self._process.start()
            finally:
                theirs.close()
            begun = self._exchange(wire, None, 120.0)
            if not isinstance(begun, Lost) and not begun.get("fault"):
                return wire
            reason = begun.reason if isinstance(begun, Lost) else str(begun["fault"])
            self.close()
            if not isinstance(begun, Lost):
                break  # it will not be made a second time either
        raise UserError(f"a worker cannot be begun: {reason}, workers. Mend that, or ask for fewer workers or more --clip-memory")

    def _exchange(self, wire: Connection, request: Mapping[str, Any] | None, seconds: float) -> dict[str, Any] | Lost:
        late, process = threading.Event(), self._process

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            if request is not None:
                wire.send_bytes(json.dumps(request).encode())
            answer = json.loads(wire.recv_bytes(LONGEST_ANSWER))
            return answer if isinstance(answer, dict) else Lost("its worker answered with something else")
        except (EOFError, OSError):
            return Lost(f"its worker was killed after {seconds:g} s" if late.is_set() else self._how_it_ended())
        except (ValueError, RecursionError):
            return Lost("its worker answered with something unreadable")
        finally:
            timer.cancel()

    def _how_it_ended(self) -> str:
        self._process.join(1)
        code = self._process.exitcode
        if code is None:
            return "its worker hung up"
        return f"its worker was killed by {signal.Signals(-code).name}" if code < 0 else f"its worker ended with status {code}"


# In the worker


def _serve(make: Callable[[], Work], memory: int, wire: Connection) -> None:
    _leave_network()
    settle(None, 1)
    try:
        work = make()
        _limit(memory)
    except Exception as error:
        wire.send_bytes(json.dumps({"fault": _told(error)}).encode())
        return
    wire.send_bytes(b"{}")
    with suppress(EOFError, OSError):
        while True:
            answer = work(json.loads(wire.recv_bytes()))
            wire.send_bytes(json.dumps(answer).encode())


def _limit(memory: int) -> None:
    """From here on so many bytes more and no further, for good."""
    if held():
        resource.setrlimit(resource.RLIMIT_DATA, (held() + memory, held() + memory))


def _leave_network() -> None:
    """Into a network of its own, in which there is nothing; where the kernel does not allow it, the process stays where it is."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(NEW_NETWORK):
            libc.unshare(NEW_USER | NEW_NETWORK)


def _told(error: BaseException) -> str:
    return (str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {' '.join(str(error).split())}")[:300]

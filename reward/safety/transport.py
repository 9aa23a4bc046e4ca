"""How a filter is asked, and how long and with how much memory it may answer: in a thread of this process, or in a process of its own (`process.py`).

A transport never raises for what a filter does: it hands back whatever the filter returned, or a `Failure`. Whether that is an answer, the runner decides.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Limits:
    """What one filter may take. All but `seconds` are for a filter in a process of its own."""

    seconds: float = 60.0
    """For one batch."""
    starting: float = 120.0
    """Seconds for its process to begin and the filter to be built there."""
    memory: int | None = None
    """Bytes beyond what its process holds before the filter is built; no limit if None."""
    restarts: int = 3
    """How often in a row its process is started again after it ended without an answer. A good answer sets this back."""

    def __post_init__(self) -> None:
        if not (self.seconds > 0 and self.starting > 0 and self.restarts >= 0 and (self.memory is None or self.memory > 0)):
            raise ValueError(f"limits are above 0, not {self}")


class Request(NamedTuple):
    """What a filter is asked: about prompts, or about clips [B,T,3,H,W] in [0,1] that came from them."""

    prompts: Sequence[str]
    video: Tensor | None = None
    fps: float = math.nan


@dataclass(frozen=True)
class Failure:
    """Why there is no answer."""

    text: str


@dataclass(frozen=True)
class Unreadable:
    """Stands for something in an answer that could not be carried over: no ruling, or no list of rulings."""

    type: str


class Transport(Protocol):
    """The way to one filter."""

    def ask(self, request: Request) -> object:
        """What the filter returned, or a `Failure`; comes back soon after the filter's time is over. The filter gets copies: what it does to them nobody else sees."""
        ...

    def close(self) -> None:
        """Ends what was started for the filter. It may be asked again."""
        ...


def put(each: Any, request: Request) -> object:
    """Asks the filter, here and now."""
    if request.video is None:
        return each.check_prompts(list(request.prompts))
    return each.check_videos(request.video, list(request.prompts), request.fps)


def failure_of(error: BaseException) -> Failure:
    """An error in one line that can be sent, of 200 characters at most."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # an error that cannot even be told
        text = "no message"
    return Failure(f"{type(error).__name__}: {text}"[:200])


class _Call(NamedTuple):
    function: Callable[[], object]
    answer: queue.SimpleQueue[object]  # its own, so that an interrupted wait leaves nothing for the next caller


class InThread:
    """A filter in this process, asked in a daemon thread. Costs nothing, and is for filters that are trusted to come back: one that never gives the interpreter back cannot
    be timed out, and one that takes all memory takes this process with it. After a timeout the thread is left behind; it ends when its call does, and is heard by nobody."""

    def __init__(self, each: Any, limits: Limits) -> None:
        self._filter, self._limits = each, limits
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def ask(self, request: Request) -> object:
        if self._thread is None:
            self._thread = threading.Thread(target=_serve, args=(self._calls,), name=f"safety-{self._filter.id}", daemon=True)
            self._thread.start()
        own = request if request.video is None else request._replace(video=request.video.clone())
        call = _Call(lambda: put(self._filter, own), queue.SimpleQueue())
        self._calls.put(call)
        try:
            return call.answer.get(timeout=self._limits.seconds)
        except queue.Empty:
            self.close()
            return Failure(f"timed out after {self._limits.seconds:g} s")

    def close(self) -> None:
        self._calls.put(None)
        self._calls, self._thread = queue.SimpleQueue(), None

    def __del__(self) -> None:
        self._calls.put(None)


def _serve(calls: queue.SimpleQueue[_Call | None]) -> None:
    while (call := calls.get()) is not None:
        try:
            call.answer.put(call.function())
        except BaseException as error:  # a filter may raise anything, SystemExit included
            call.answer.put(failure_of(error))
        del call

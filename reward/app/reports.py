"""What takes long to work out, worked out beside the requests and kept until something happened since.

A page shows what is there: the newest report, with the time it was made at. Where the log has grown since, a thread makes another one; a request waits for it a moment only, so
that a small store shows what holds now and a large one answers at once. One thread works at a time, and rests ten times as long as it worked, so that labelers do not feel it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar
from weakref import WeakKeyDictionary

from sqlalchemy import func, select

from base_model.errors import UserError
from reward.app.schema import event
from reward.app.store import Store

T = TypeVar("T")
PATIENCE = 0.12  # seconds that a request waits
REST = 10  # times the duration of the last one
BREATH, AFTER = 0.001, 25  # seconds that it sleeps, after so many rows
State = Literal["fresh", "old", "computing", "failed"]


@dataclass(frozen=True)
class Report(Generic[T]):
    """value: None where there is none yet. at: when it was begun. problem: why the last try failed."""

    value: T | None
    state: State
    at: int | None
    problem: str = ""


@dataclass(eq=False)
class _Held:
    seq: int = -1
    value: Any = None
    at: int | None = None
    problem: str = ""
    seconds: float = 0.0
    ended: float = 0.0
    working: threading.Event | None = None


_held: WeakKeyDictionary[Store, dict[Hashable, _Held]] = WeakKeyDictionary()
_lock, _turn = threading.Lock(), threading.Lock()


def report(store: Store, key: Hashable, make: Callable[[], T], *, patience: float = PATIENCE) -> Report[T]:
    """The newest value of `make()` under `key`."""
    with store.reading() as db:
        seq = db.execute(select(func.max(event.c.seq))).scalar() or 0
    with _lock:
        held = _held.setdefault(store, {}).setdefault(key, _Held())
        if held.working is None and held.seq != seq and time.monotonic() - held.ended >= REST * held.seconds:
            held.working = threading.Event()
            threading.Thread(target=_work, args=(held, held.working, seq, store.now(), make), name="rushes-report", daemon=True).start()
        working = held.working
    if working is not None:
        working.wait(patience)
    with _lock:
        fresh = held.seq == seq
        state: State = "failed" if held.problem else "computing" if held.at is None else "fresh" if fresh else "old"
        return Report(held.value, state, held.at, held.problem)


def _work(held: _Held, working: threading.Event, seq: int, at: int, make: Callable[[], Any]) -> None:
    begun = time.monotonic()
    value, problem = held.value, ""
    try:
        with _turn:
            begun = time.monotonic()
            value = make()
    except UserError as error:
        problem = str(error)
    except Exception:
        logging.getLogger(__name__).exception("a report could not be made")
        problem = "this is a bug in rushes; the server's log says more"
    with _lock:
        held.value, held.problem, held.seq, held.working = value, problem, seq, None
        held.at = at if not problem else held.at
        held.ended = time.monotonic()
        held.seconds = held.ended - begun
    working.set()


def gently(rows: Iterable[T]) -> Iterator[T]:
    """The rows, with pauses in which requests run: for long loops of a report."""
    for place, row in enumerate(rows):
        if place % AFTER == 0:
            time.sleep(BREATH)
        yield row

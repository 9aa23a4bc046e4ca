"""What happens although nobody asks for it: leases end, decisions take effect, media that a project keeps no longer go. A thread beside the requests.

Requests do the first two as well, in their own transactions; here they happen in a store that nobody looks at. What fails is logged and tried again, ever more rarely.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import select

from reward.app import choosing, deleting, reviewing
from reward.app.schema import project
from reward.app.store import Store

EVERY = 5.0  # seconds
LONGEST = 300.0  # between two tries after failures
RETENTION = 3600.0
logger = logging.getLogger(__name__)


def projects_of(store: Store) -> list[str]:
    with store.reading() as db:
        return list(db.execute(select(project.c.id).order_by(project.c.id)).scalars())


def come_up_to_date(store: Store) -> int:
    """Ends leases whose time is over and lets decisions take effect that can no longer be undone, in every project; returns how many of both. Nothing due, nothing is locked."""
    done = 0
    with store.reading() as db:
        late = choosing.any_expired(store, db)
    if late:
        with store.writing() as db:
            done += choosing.free_expired(store, db)
    return done + sum(reviewing.catch_up(store, project_id) for project_id in projects_of(store))


def retire_all(store: Store) -> int:
    """Deletes the media that projects keep no longer; returns of how many clips."""
    return sum(deleting.retire(store, project_id) for project_id in projects_of(store))


@contextmanager
def upkeep(store: Store, *, every: float = EVERY, retention: float = RETENTION) -> Iterator[None]:
    """Looks after a store while the block runs: `every` so many seconds, and after media every `retention`."""
    ended = threading.Event()
    thread = threading.Thread(target=_look_after, args=(store, ended, every, retention), name="rushes-upkeep", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _look_after(store: Store, ended: threading.Event, every: float, retention: float) -> None:
    failures, retired = 0, -retention
    while not ended.wait(min(every * 2**failures, max(every, LONGEST))):
        try:
            come_up_to_date(store)
            if time.monotonic() - retired >= retention:
                retire_all(store)
                retired = time.monotonic()
            failures = 0
        except Exception:
            failures = min(failures + 1, 16)
            logger.exception("what the app does by itself failed; it is tried again")

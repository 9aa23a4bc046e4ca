"""What the app does when nobody asks: leases end, decisions take effect, media go; and a failure ends nothing."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import func, select, update

from reward.app import deleting, reviewing, upkeep
from reward.app.deleting import DAY
from reward.app.media import path_of
from reward.app.reviewing import next_reading
from reward.app.schema import assignment, clip, event, item, reading, task
from reward.app.store import Store
from tests.reward.app.conftest import add_clips, add_project
from tests.reward.app.test_labeling import as_labeler, taken, with_tasks
from tests.reward.app.test_reviewing import NEVER, actor, decision, later, queue


def until(found: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def count(store: Store, what: Any, *where: Any) -> int:
    with store.reading() as db:
        return int(db.execute(select(func.count()).select_from(what).where(*where)).scalar_one())


def test_leases_end_and_decisions_take_effect_although_nobody_asks(each_store: Store) -> None:
    store = each_store
    project_id = with_tasks(store)
    ann = as_labeler(store, "ann", project_id)
    lease = taken(store, ann, project_id)
    judged = add_project(store, "judged", reviewing={"second_share": 1.0})
    queue(store, judged, add_clips(store, judged, prompts=("a",), takes=2, verdicts=("review",), files=False))
    ada, bob = actor(store, "ada", "reviewer"), actor(store, "bob", "reviewer")
    first, held = next_reading(store, ada, judged, "review"), next_reading(store, bob, judged, "review")
    assert isinstance(first, str) and isinstance(held, str)
    reviewing.decide(store, ada, first, decision())
    assert upkeep.come_up_to_date(store) == 0, "neither is over"
    later(store, 16)
    assert upkeep.come_up_to_date(store) == 1
    assert count(store, item, item.c.queue == "second", item.c.state == "open") == 1
    later(store, 21 * 60)
    assert upkeep.come_up_to_date(store) == 2 and upkeep.come_up_to_date(store) == 0
    with store.reading() as db:
        assert db.execute(select(assignment.c.state).where(assignment.c.id == lease)).scalar_one() == "expired"
        assert db.execute(select(reading.c.state).where(reading.c.id == held)).scalar_one() == "expired"
    assert count(store, task, task.c.taken > 0) == 0
    assert store.verify_log()["events"] == count(store, event)


def test_where_nothing_is_due_nothing_is_locked(each_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    project_id = with_tasks(each_store)
    taken(each_store, as_labeler(each_store, "ann", project_id), project_id)

    def refuse(*_: Any) -> None:
        raise AssertionError("a write")

    monkeypatch.setattr(Store, "writing", refuse)
    assert upkeep.come_up_to_date(each_store) == 0


def test_media_that_a_project_keeps_no_longer_go_by_themselves(store: Store) -> None:
    keeps, forgets = add_project(store, "keeps"), add_project(store, "forgets", retention_days=7)
    old, new, kept = (add_clips(store, place, prompts=(name,), takes=1)[0] for place, name in ((forgets, "old"), (forgets, "new"), (keeps, "kept")))
    with store.writing() as db:
        db.execute(update(clip).where(clip.c.id.in_((old, kept))).values(state="withdrawn", created_at=store.now() - 8 * DAY))
        db.execute(update(clip).where(clip.c.id == new).values(state="withdrawn"))
    with upkeep.upkeep(store, every=0.01):
        until(lambda: count(store, clip, clip.c.state == "deleted") == 1)
    with store.reading() as db:
        digests = dict(db.execute(select(clip.c.id, clip.c.clip_id)).all())
    assert [path_of(store, digests[each]).exists() for each in (old, new, kept)] == [False, True, True]
    assert upkeep.retire_all(store) == 0
    left = path_of(store, digests[old], "light.jpg")
    left.write_bytes(b"of a deletion that was killed")
    assert upkeep.retire_all(store) == 0 and not left.exists()


def test_a_failure_is_logged_and_the_next_try_succeeds(store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    project_id = add_project(store, **NEVER)
    queue(store, project_id, add_clips(store, project_id, prompts=("a",), takes=1, verdicts=("review",), files=False))
    first = next_reading(store, ada := actor(store, "ada", "reviewer"), project_id, "review")
    assert isinstance(first, str)
    reviewing.decide(store, ada, first, decision())
    later(store, 16)
    settle, failed = reviewing.settle, []

    def fails_at_first(*given: Any) -> int:
        if not failed:
            failed.append(1)
            raise OSError("the disk is full")
        return settle(*given)

    monkeypatch.setattr(reviewing, "settle", fails_at_first)
    with caplog.at_level(logging.ERROR, logger=upkeep.__name__), upkeep.upkeep(store, every=0.01):
        until(lambda: count(store, item, item.c.state == "closed") == 1)
    assert [record.getMessage() for record in caplog.records] == ["what the app does by itself failed; it is tried again"]
    assert "the disk is full" in caplog.text


@pytest.mark.timed
def test_it_ends_with_the_server_and_retires_once_an_hour(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    add_project(store)
    retired: list[str] = []
    looked: list[int] = []
    monkeypatch.setattr(deleting, "retire", lambda store, project_id: retired.append(project_id) or 0)
    monkeypatch.setattr(upkeep, "come_up_to_date", lambda store: looked.append(1) or 0)
    with upkeep.upkeep(store, every=0.005):
        until(lambda: len(looked) > 5)
    ended = len(looked)
    time.sleep(0.05)
    assert len(looked) == ended and len(retired) == 1

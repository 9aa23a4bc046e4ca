"""What somebody tried who wanted to break the app: every case here once succeeded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, select, update

from base_model.errors import UserError
from reward.app import answering, auditing, choosing, importing, labeling, planting, quality, reviewing, security, signing_off
from reward.app.answering import Demonstration, Unsafe
from reward.app.deleting import delete_clip, delete_person, retain
from reward.app.media import path_of
from reward.app.reviewing import next_reading
from reward.app.schema import assignment, clip, event, item, person, prompt, reading, task
from reward.app.security import Denied
from reward.app.store import Store, new_id, open_store
from tests.reward.app.conftest import PASSWORD, Client, add_clips, add_member, add_project
from tests.reward.app.test_importing import ALLOWED, BLOCKED, CHILD, RULING, a_run, clips_of, render
from tests.reward.app.test_labeling import NO_CHECKS, _ids, an_answer, as_labeler, row_of, taken, with_tasks
from tests.reward.app.test_quality import ranking
from tests.reward.app.test_reviewing import NEVER, actor, decision, later, queue, read, settled, state, waiting


def servable(store: Store, clips: list[str]) -> set[str]:
    with store.reading() as db:
        return labeling.servable_of(db, clips)


# Copies that were made worse on purpose


def with_gold(store: Store) -> tuple[str, str, str, Any]:
    """A project with a gold task: its id, the clip, its worse copy, and the lead."""
    project_id = add_project(store, labeling={**NO_CHECKS, "takes": 2})
    add_clips(store, project_id, ("a",), takes=1)
    lead = as_labeler(store, "lead")
    assert planting.make_gold(store, project_id, 1, lead) == 1
    with store.reading() as db:
        source, copy = db.execute(select(task.c.clips).where(task.c.kind == "gold")).scalar_one()
    return project_id, source, copy, lead


@pytest.mark.parametrize("change", [{"state": "withdrawn"}, {"state": "restricted"}, {"state": "deleted"}, {"verdict": "block"}, None])
def test_a_worse_copy_is_shown_to_nobody_once_its_source_may_not_be(each_store: Store, change: dict[str, str] | None) -> None:
    project_id, source, copy, lead = with_gold(each_store)
    assert servable(each_store, [source, copy]) == {source, copy}
    with each_store.writing() as db:
        if change:
            db.execute(update(clip).where(clip.c.id == source).values(**change))
        else:
            reviewing.flag(each_store, db, clip=source, policies=["P05"], source="a_1", by=lead)
    assert servable(each_store, [source, copy]) == set()


def test_who_suspects_a_worse_copy_suspects_the_clip_it_was_made_of(each_store: Store) -> None:
    project_id, source, copy, lead = with_gold(each_store)
    with each_store.writing() as db:
        reviewing.flag(each_store, db, clip=copy, policies=["P04"], source="a_1", by=lead)
    assert state(each_store, source) == "restricted" and servable(each_store, [source, copy]) == set()


def test_the_media_of_worse_copies_go_with_those_of_their_source(store: Store) -> None:
    project_id, source, copy, lead = with_gold(store)
    with store.reading() as db:
        digest = db.execute(select(clip.c.clip_id).where(clip.c.id == copy)).scalar_one()
    assert path_of(store, digest).is_file()
    delete_clip(store, project_id, source, "system")
    assert not path_of(store, digest).exists() and state(store, copy) == "deleted"


def test_worse_copies_are_in_no_audit_no_statistic_and_no_run(store: Store) -> None:
    project_id, source, copy, lead = with_gold(store)
    auditing.draw(store, project_id, lead)
    with store.reading() as db:
        assert db.execute(select(item.c.clip).where(item.c.wave.is_not(None))).scalars().all() == [source]
        assert signing_off.runs_of(db, project_id) == [("test", 1)]
    assert {len(each.by_clip) for each in quality.scores_of(store, project_id).values()} == {1}


def test_a_run_that_is_called_planted_is_a_run_like_any_other(store: Store, tmp_path: Path) -> None:
    project_id = add_project(store, labeling=NO_CHECKS)
    a_run(tmp_path / "run", [ALLOWED, ALLOWED])
    importing.import_run(store, project_id, tmp_path / "run", "planted", "system", render=render)
    lead = as_labeler(store, "lead")
    with store.writing() as db:
        assert labeling.make_tasks(store, db, project_id, lead) == 1

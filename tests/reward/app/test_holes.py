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


# Child safety


def test_a_clip_that_is_restricted_in_one_project_is_so_in_every_project_that_holds_it(each_store: Store, tmp_path: Path) -> None:
    one, two, three = (add_project(each_store, name) for name in ("one", "two", "three"))
    a_run(tmp_path / "run", [ALLOWED])
    for project_id in (one, two):
        importing.import_run(each_store, project_id, tmp_path / "run", "r", "system", render=render)
    kim, lead = actor(each_store, "kim", "child_safety"), as_labeler(each_store, "lead")
    (first,), (second,) = clips_of(each_store, one), clips_of(each_store, two)
    with each_store.writing() as db:
        reviewing.flag(each_store, db, clip=first.id, policies=["P04"], source="a_1", by=lead)
    assert state(each_store, second.id) == "restricted"
    importing.import_run(each_store, three, tmp_path / "run", "r", "system", render=render)
    (third,) = clips_of(each_store, three)
    assert third.state == "restricted"
    for project_id in (one, two, three):
        with each_store.reading() as db:
            assert sum(reviewing.counts(db, kim, project_id).values()) == 1, "the role that may judge it finds it"


def test_what_child_safety_deleted_does_not_come_back_to_labelers_by_another_import(store: Store, tmp_path: Path) -> None:
    one, two = add_project(store, "one"), add_project(store, "two")
    a_run(tmp_path / "run", [ALLOWED])
    importing.import_run(store, one, tmp_path / "run", "r", "system", render=render)
    (first,) = clips_of(store, one)
    with store.writing() as db:
        reviewing.restrict(store, db, first.id, by="x")
    delete_clip(store, one, first.id, "kim", restricted=True, others=False)
    importing.import_run(store, two, tmp_path / "run", "r", "system", render=render)
    assert [row.state for row in clips_of(store, two)] == ["restricted"]


def test_media_of_a_deleted_clip_do_not_come_back_with_the_next_import(store: Store, tmp_path: Path) -> None:
    project_id = add_project(store)
    a_run(tmp_path / "run", [ALLOWED])
    importing.import_run(store, project_id, tmp_path / "run", "r", "system", render=render)
    (row,) = clips_of(store, project_id)
    delete_clip(store, project_id, row.id, "system")
    counts = importing.import_run(store, project_id, tmp_path / "run", "r", "system", render=render)
    assert not list(path_of(store, row.clip_id).parent.glob(f"{row.clip_id}.*"))
    assert counts["already"] == 1 and state(store, row.id) == "deleted"


def test_a_worse_suspicion_after_a_milder_one_is_not_lost(each_store: Store) -> None:
    project_id = with_tasks(each_store, prompts=1)
    ann = as_labeler(each_store, "ann", project_id)
    mine = row_of(each_store, taken(each_store, ann, project_id))
    answering.flag(each_store, ann, mine.id, Unsafe(place=0, policies=("P05",)))
    answering.flag(each_store, ann, mine.id, Unsafe(place=0, policies=("P05",)))
    with each_store.reading() as db:
        assert len(db.execute(select(item.c.id)).all()) == 1
    answering.flag(each_store, ann, mine.id, Unsafe(place=0, policies=("P04",)))
    assert state(each_store, mine.clips[mine.shown_order.index(0)]) == "restricted"


MIXED = {"verdict": "block", "rulings": [{**RULING, "verdict": "review", "policy": "P04", "score": 0.4}, {**RULING, "verdict": "block", "policy": "P05", "score": 0.9}]}


def test_whatever_a_filter_restricts_waits_for_the_child_safety_role(each_store: Store, tmp_path: Path) -> None:
    project_id, kim = add_project(each_store), actor(each_store, "kim", "child_safety")
    a_run(tmp_path / "run", [MIXED])
    importing.import_run(each_store, project_id, tmp_path / "run", "r", "system", render=render)
    assert [row.state for row in clips_of(each_store, project_id)] == ["restricted"]
    with each_store.reading() as db:
        assert sum(reviewing.counts(db, kim, project_id).values()) == 1


@pytest.mark.parametrize(("then", "who", "where"), [(CHILD, "child_safety", "escalation"), ({"verdict": "review", "rulings": [{**RULING, "verdict": "review"}]}, "reviewer", "review")])
def test_a_clip_that_an_audit_knows_is_queued_when_filters_say_something_else(each_store: Store, tmp_path: Path, then: dict[str, Any], who: str, where: str) -> None:
    project_id, one = add_project(each_store, reviewing={"passed_audit": 1}), actor(each_store, "one", who)
    for decisions in ([ALLOWED] * 16, [then] * 16):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        a_run(folder, decisions)
        importing.import_run(each_store, project_id, folder, "r", "system", render=render)
        if decisions[0] is ALLOWED:
            auditing.draw(each_store, project_id, one)
            with each_store.writing() as db:
                drawn = len(db.execute(select(item.c.id).where(item.c.state == "open")).all())
    with each_store.reading() as db:
        told = reviewing.counts(db, one, project_id)
    assert drawn < 16 and told[where] == 16 - drawn


def test_the_page_of_the_log_tells_nobody_but_child_safety_of_what_is_restricted(each_store: Store) -> None:
    project_id = add_project(each_store)
    clips = add_clips(each_store, project_id, takes=1, files=False)
    lead = actor(each_store, "lea", "lead", "auditor")
    with each_store.writing() as db:
        reviewing.flag(each_store, db, clip=clips[0], policies=["P04"], source="a_1", by=lead)
        reviewing.flag(each_store, db, clip=clips[1], policies=["P05"], source="a_1", by=lead)
    kim = actor(each_store, "kim", "child_safety", "lead")
    told, all_of_it = Client(each_store, "lea").get("/api/log"), Client(each_store, "kim").get("/api/log")
    assert "P04" in all_of_it.text and "clip restricted" in all_of_it.text and kim
    for secret in ("P04", "clip restricted", clips[0]):
        assert secret not in told.text, secret
    assert clips[1] in told.text
    for query in ({"kind": "clip restricted"}, {"subject": clips[0]}):
        assert Client(each_store, "lea").get("/api/log", params=query).json()["events"] == []


# Readers


def test_a_flagged_clip_that_is_passed_on_to_a_senior_waits_for_the_senior(each_store: Store) -> None:
    for said in (decision("cannot_tell", escalate=True), decision("not_violating", escalate=True), decision("borderline", escalate=True)):
        project_id = add_project(each_store, said.said, **NEVER)
        (clip_id,) = add_clips(each_store, project_id, (said.said,), takes=1, files=False)
        one, two = actor(each_store, f"one {said.said}", "reviewer"), actor(each_store, f"two {said.said}", "senior")
        with each_store.writing() as db:
            reviewing.flag(each_store, db, clip=clip_id, policies=["P05"], source="a_1", by=two)
        read(each_store, one, project_id, "flagged", said)
        settled(each_store, project_id)
        assert waiting(each_store, project_id) == ["escalation"] and servable(each_store, [clip_id]) == set(), said.said
        sue = actor(each_store, f"sue {said.said}", "senior")
        read(each_store, sue, project_id, "escalation", decision())
        settled(each_store, project_id)
        assert servable(each_store, [clip_id]) == {clip_id}, said.said


def test_a_late_decision_does_not_make_one_reader_two(each_store: Store, tmp_path: Path) -> None:
    project_id = add_project(each_store, **NEVER)
    (clip_id,) = add_clips(each_store, project_id, ("a",), takes=1, files=False)
    ada, bob = actor(each_store, "ada", "reviewer"), actor(each_store, "bob", "reviewer", "senior")
    auditing.draw(each_store, project_id, bob)
    (drawn,) = waiting(each_store, project_id)
    late = next_reading(each_store, ada, project_id, drawn)
    assert isinstance(late, str)
    later(each_store, 3_600)
    with each_store.writing() as db:
        reviewing.expire(each_store, db, project_id)
        reviewing.flag(each_store, db, clip=clip_id, policies=["P05"], source="a_1", by=bob)
    read(each_store, ada, project_id, "flagged", decision())
    with pytest.raises(Denied):
        reviewing.decide(each_store, ada, late, decision())
    settled(each_store, project_id)
    auditing.audit_folder(each_store, project_id, tmp_path / "audit")


def test_who_gave_a_clip_back_is_not_asked_about_it_again(each_store: Store) -> None:
    project_id = add_project(each_store, reviewing={"second_share": 1.0})
    clips = add_clips(each_store, project_id, ("a",), takes=1, verdicts=("review",), files=False)
    queue(each_store, project_id, clips)
    ada, bob = actor(each_store, "ada", "reviewer"), actor(each_store, "bob", "reviewer")
    held = next_reading(each_store, ada, project_id, "review")
    assert isinstance(held, str)
    reviewing.skip(each_store, ada, held, "near")
    read(each_store, bob, project_id, "review", decision())
    settled(each_store, project_id)
    assert waiting(each_store, project_id) == ["second"] and next_reading(each_store, ada, project_id, "review") is None


def test_a_policy_that_is_not_known_does_not_spoil_an_audit_for_ever(store: Store, tmp_path: Path) -> None:
    project_id, lead = add_project(store), actor(store, "lea", "lead")
    a_run(tmp_path / "run", [{"verdict": "block", "rulings": [{**RULING, "verdict": "block", "policy": "P99", "score": 0.9}]}])
    importing.import_run(store, project_id, tmp_path / "run", "r", "system", render=render)
    with pytest.raises(UserError, match="P99"):
        auditing.draw(store, project_id, lead)
    with store.reading() as db:
        assert db.execute(select(item.c.id)).all() == [], "nothing was written that could not be read again"


def test_nobody_waits_for_a_deleted_clip_that_somebody_held(each_store: Store) -> None:
    project_id = add_project(each_store)
    clips = add_clips(each_store, project_id, ("a",), takes=1, verdicts=("review",), files=False)
    queue(each_store, project_id, clips)
    ada = actor(each_store, "ada", "reviewer")
    assert isinstance(next_reading(each_store, ada, project_id, "review"), str)
    delete_clip(each_store, project_id, clips[0], "system")
    later(each_store, 3_600)
    assert next_reading(each_store, ada, project_id, "review") is None
    with each_store.reading() as db:
        assert reviewing.counts(db, ada, project_id) == {}

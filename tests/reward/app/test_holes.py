"""What somebody tried who wanted to break the app: every case here once succeeded."""

from __future__ import annotations

import itertools
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, insert, select, update

from base_model.errors import UserError
from reward.app import answering, auditing, choosing, importing, labeling, planting, quality, reviewing, security, signing_off
from reward.app.answering import Demonstration, Unsafe
from reward.app.deleting import delete_clip, delete_person, retain
from reward.app.media import path_of
from reward.app.reviewing import next_reading
from reward.app.schema import answer, assignment, clip, item, private_text, project, task
from reward.app.security import Denied
from reward.app.store import Store, open_store
from tests.reward.app.browser import opened
from tests.reward.app.conftest import PASSWORD, Client, add_clips, add_member, add_project, serving
from tests.reward.app.test_importing import ALLOWED, BLOCKED, CHILD, RULING, a_run, clips_of, render
from tests.reward.app.test_labeling import NO_CHECKS, _ids, an_answer, as_labeler, row_of, taken, with_tasks
from tests.reward.app.test_quality import ranking
from tests.reward.app.test_reviewing import NEVER, actor, decision, later, queue, read, settled, state, waiting
from tests.reward.app.test_upkeep import until


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
    _project_id, source, copy, lead = with_gold(each_store)
    assert servable(each_store, [source, copy]) == {source, copy}
    with each_store.writing() as db:
        if change:
            db.execute(update(clip).where(clip.c.id == source).values(**change))
        else:
            reviewing.flag(each_store, db, clip=source, policies=["P05"], source="a_1", by=lead)
    assert servable(each_store, [source, copy]) == set()


def test_who_suspects_a_worse_copy_suspects_the_clip_it_was_made_of(each_store: Store) -> None:
    _project_id, source, copy, lead = with_gold(each_store)
    with each_store.writing() as db:
        reviewing.flag(each_store, db, clip=copy, policies=["P04"], source="a_1", by=lead)
    assert state(each_store, source) == "restricted" and servable(each_store, [source, copy]) == set()


def test_the_media_of_worse_copies_go_with_those_of_their_source(store: Store) -> None:
    project_id, source, copy, _lead = with_gold(store)
    with store.reading() as db:
        digest = db.execute(select(clip.c.clip_id).where(clip.c.id == copy)).scalar_one()
    assert path_of(store, digest).is_file()
    delete_clip(store, project_id, source, "system")
    assert not path_of(store, digest).exists() and state(store, copy) == "deleted"


def test_worse_copies_are_in_no_audit_no_statistic_and_no_run(store: Store) -> None:
    project_id, source, _copy, lead = with_gold(store)
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


def test_what_people_overturn_in_a_run_that_is_called_planted_is_learned_from(store: Store, tmp_path: Path) -> None:
    project_id = add_project(store, **NEVER)
    a_run(tmp_path / "run", [ALLOWED])
    importing.import_run(store, project_id, tmp_path / "run", "planted", "system", render=render)
    overturned(store, project_id, "violating", "P05")
    assert auditing.corrections_folder(store, project_id, tmp_path / "corrections") == {"clips": 1, "readings": 2, "gold": 0}


def overturned(store: Store, project_id: str, *said: str) -> None:
    """Somebody flags the newest clip, and two people say of it what the filters did not."""
    lab, newest = actor(store, "lab", "labeler"), clips_of(store, project_id)[-1].id
    with store.writing() as db:
        reviewing.flag(store, db, clip=newest, policies=["P05"], source="a_1", by=lab)
    for login, name in (("ada", "flagged"), ("bob", "flagged" if said[0] == "violating" else "disagreement")):
        read(store, actor(store, login, "reviewer"), project_id, name, decision(*said))
        settled(store, project_id)


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


@pytest.mark.parametrize(
    ("then", "who", "where"), [(CHILD, "child_safety", "escalation"), ({"verdict": "review", "rulings": [{**RULING, "verdict": "review"}]}, "reviewer", "review")]
)
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
    reviewing.skip(each_store, ada, held)
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


@pytest.mark.parametrize("rulings", [[RULING], [RULING, {**RULING, "verdict": "block", "score": 1.0000001}], [{**RULING, "verdict": "error", "score": None}]])
def test_a_clip_that_is_blocked_for_no_policy_stops_no_audit(store: Store, tmp_path: Path, rulings: list[dict[str, Any]]) -> None:
    project_id, lead = add_project(store, **NEVER), actor(store, "lea", "lead")
    a_run(tmp_path / "run", [ALLOWED, BLOCKED, {"verdict": "block", "rulings": rulings}])
    importing.import_run(store, project_id, tmp_path / "run", "r", "system", render=render)
    drawn = auditing.draw(store, project_id, lead)
    assert (drawn["blocked_pool"], drawn["passed_pool"]) == (1, 1)
    overturned(store, project_id, "not_violating")
    told = auditing.audit_folders(store, project_id, tmp_path / "audit")
    assert told["audit"] is not None and told["audit"]["clips"] == 2 and told["corrections"] is None


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


# The log's anchors


def test_a_torn_anchor_of_a_writer_that_was_killed_does_not_spoil_the_next_one(store: Store) -> None:
    add_member(store, "ada", "lead")
    store.close()
    with open(store.anchor, "a") as file:
        file.write('{"seq": 99')
    again = open_store(store.folder)
    add_member(again, "bob", "lead")
    again.close()
    assert again.verify_log()["events"] > 2


def test_a_disk_that_takes_no_anchor_does_not_turn_what_was_written_into_a_failure(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    add_member(store, "ada", "lead")
    store._anchored = (0, -1e9)
    kept, store.folder = store.folder, store.folder / "gone"
    client = Client(store)
    assert client.post("/api/login", json={"login": "ada", "password": PASSWORD}).status_code == 200
    store.folder = kept
    add_member(store, "bob", "lead")
    store.close()
    assert store.verify_log()["anchors"] >= 1


def test_a_full_disk_acknowledges_nothing_and_says_so_in_one_line(store: Store) -> None:
    project_id = add_project(store)
    add_member(store, "ada", "lead")
    client = Client(store, "ada")
    client._transport.raise_server_exceptions = False
    with store.engine.connect() as db:
        pages = db.exec_driver_sql("PRAGMA page_count").scalar()
    from sqlalchemy import event as sa_event

    sa_event.listen(store.engine, "begin", lambda db: db.exec_driver_sql(f"PRAGMA max_page_count={pages}"))
    answers = [client.post("/api/projects", json={"name": f"project {n} {'x' * 150}"}) for n in range(200)]
    failed = [each for each in answers if each.status_code != 200]
    assert failed and {each.status_code for each in failed} == {503} and "again" in failed[0].json()["detail"] and "bug" not in failed[0].text
    with store.reading() as db:
        assert db.exec_driver_sql("SELECT count(*) FROM project").scalar() == 1 + sum(each.status_code == 200 for each in answers)
    assert project_id


# Requests


@pytest.mark.parametrize("spelled", ["ada ", " ada", "\tada", "ADA "])
def test_spaces_around_a_login_give_no_further_tries(store: Store, spelled: str) -> None:
    add_member(store, "ada", "labeler")
    limits = Client(store).app.state.limits  # type: ignore[attr-defined]
    for number in range(10):
        limits.login("ada", f"10.0.0.{number}")
    with pytest.raises(Denied):
        limits.login(spelled, "10.0.1.1")


@pytest.mark.parametrize("value", [float("nan"), "nan", float("inf"), "-inf"])
@pytest.mark.parametrize("field", ["reviewing.second_share", "labeling.mixture.active", "labeling.least_watched"])
def test_what_is_no_number_is_no_setting(store: Store, field: str, value: Any) -> None:
    project_id = add_project(store)
    add_member(store, "lea", "lead")
    client = Client(store, "lea")
    client._transport.raise_server_exceptions = False
    seen = client.get(f"/api/projects/{project_id}/lead/settings").json()["seen"]
    body = json.dumps({"seen": seen, field: value}).encode()
    told = client.post(f"/api/projects/{project_id}/lead/settings", content=body, headers={"content-type": "application/json"})
    assert told.status_code == 422, told.text
    assert client.get(f"/api/projects/{project_id}/lead/settings").status_code == 200


@pytest.mark.parametrize("name", ["watched", "confidence"])
def test_an_answer_with_what_is_no_number_is_refused_and_the_task_stays_open(store: Store, name: str) -> None:
    project_id = with_tasks(store, prompts=1)
    as_labeler(store, "ann", project_id)
    client = Client(store, "ann")
    client._transport.raise_server_exceptions = False
    held = client.post(f"/api/projects/{project_id}/label/next", json={}).json()["assignment_id"]
    good = an_answer(4).model_dump(mode="json")
    bad = {**good, "watched": [float("nan")] * 4} if name == "watched" else {**good, "confidence": float("nan")}
    told = client.post(f"/api/assignments/{held}/answer", content=json.dumps(bad).encode(), headers={"content-type": "application/json"})
    assert told.status_code == 422, told.text
    assert row_of(store, held).state == "open"


def test_a_retention_of_more_days_than_there_are_is_refused(store: Store) -> None:
    project_id = add_project(store)
    add_member(store, "lea", "lead")
    client = Client(store, "lea")
    client._transport.raise_server_exceptions = False
    seen = client.get(f"/api/projects/{project_id}/lead/settings").json()["seen"]
    told = client.post(f"/api/projects/{project_id}/lead/settings", json={"seen": seen, "retention_days": 10**15})
    assert (told.status_code, client.post(f"/api/projects/{project_id}/lead/retain").status_code) == (422, 200)


@pytest.mark.parametrize("name", ["€", "a\r\nx: y", "j_nothing"])
def test_where_a_page_goes_next_cannot_break_an_answer(store: Store, name: str) -> None:
    add_member(store, "ada", "reviewer")
    client = Client(store, "ada")
    client._transport.raise_server_exceptions = False
    from urllib.parse import quote

    told = client.post(f"/api/review/{quote(name)}/settings", json={}, headers={"hx-request": "true"})
    assert told.status_code in (200, 404) and "\n" not in told.headers.get("hx-redirect", "")


def test_the_cookie_is_taken_away_at_logout_also_where_it_is_bound_to_the_host(store: Store) -> None:
    from reward.app.web import AppSettings

    add_member(store, "ada", "labeler")
    client = Client(store, settings=AppSettings(hosts=("127.0.0.1",), secure=True))
    cookie = client.post("/api/login", json={"login": "ada", "password": PASSWORD}).cookies["__Host-rushes"]
    me = security.actor_of_session(store, cookie)
    assert me is not None
    told = client.post("/api/logout", headers={"x-csrf": me.csrf, "cookie": f"__Host-rushes={cookie}"})
    assert "secure" in told.headers["set-cookie"].lower() and "path=/" in told.headers["set-cookie"].lower()


@pytest.mark.parametrize("how", ["roles", "sessions", "password"])
def test_a_token_ends_with_the_sessions_where_somebody_is_shut_out(each_store: Store, how: str) -> None:
    project_id = add_project(each_store)
    ada = add_member(each_store, "ada", "labeler", project_id=project_id)
    add_member(each_store, "lea", "lead")
    client, lead = Client(each_store, "ada"), Client(each_store, "lea")
    bearer = {"authorization": f"Bearer {client.post('/api/account/tokens', json={'name': 'a script'}).json()['token']}"}
    script = Client(each_store)
    assert script.get("/api/", headers=bearer).status_code == 200
    if how == "roles":
        lead.post(f"/api/projects/{project_id}/lead/people/{ada}/roles", json={"roles": ["labeler", "lead"]}).raise_for_status()
    elif how == "sessions":
        lead.post(f"/api/projects/{project_id}/lead/people/{ada}/sessions/end").raise_for_status()
    else:
        client.post("/api/account/password", json={"old": PASSWORD, "new": "another long password"}).raise_for_status()
    assert script.get("/api/", headers=bearer).status_code == 401


# Imports


@pytest.mark.parametrize("digest", ["0x" + "a" * 62, "a_" * 31 + "aa", " " + "a" * 63, "+" + "a" * 63])
def test_what_only_looks_like_a_digest_is_refused(store: Store, tmp_path: Path, digest: str) -> None:
    project_id = add_project(store)
    made = a_run(tmp_path / "run", [ALLOWED])
    lines = (tmp_path / "run" / "clips.jsonl").read_text().replace(made.rows()[0].clip_id, digest)
    (tmp_path / "run" / "clips.jsonl").write_text(lines)
    try:
        counts = importing.import_run(store, project_id, tmp_path / "run", "r", "system", render=render)
    except UserError:
        counts = {"added": 0}
    assert counts["added"] == 0 and clips_of(store, project_id) == []


def test_no_path_of_the_server_is_kept_of_a_file_that_is_gone(store: Store, tmp_path: Path) -> None:
    project_id = add_project(store)
    made = a_run(tmp_path / "run", [ALLOWED])
    made.record_path(made.rows()[0].clip_id).unlink()
    importing.import_run(store, project_id, tmp_path / "run", "r", "system", render=render)
    (row,) = clips_of(store, project_id)
    assert row.verdict == "error" and str(tmp_path) not in json.dumps([row.decision, row.row])


@pytest.mark.parametrize("name", ["clips.jsonl", "metadata.jsonl"])
def test_a_list_of_clips_that_is_a_link_is_not_followed(store: Store, tmp_path: Path, name: str) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "roots" / "inside"
    a_run(outside, [ALLOWED])
    (outside / "metadata.jsonl").write_text(json.dumps({"file_name": "x.mp4", "text": "a secret"}) + "\n")
    inside.mkdir(parents=True)
    (inside / name).symlink_to(outside / name)
    assert importing.folders_below([tmp_path / "roots"]) == []
    with pytest.raises(Denied):
        importing.folder_below([tmp_path / "roots"], "0/inside")


def test_a_file_that_is_swapped_for_a_link_after_the_check_is_not_read(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, outside = tmp_path / "run", tmp_path / "outside"
    (folder / "clips").mkdir(parents=True), outside.mkdir()
    (folder / "clips" / "a.mkv").write_bytes(b"mine"), (outside / "a.mkv").write_bytes(b"not mine")
    opened = os.open

    def swapped(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if (folder / "clips").is_dir() and not (folder / "clips").is_symlink():
            (folder / "clips").rename(folder / "before")
            (folder / "clips").symlink_to(outside)
        return opened(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", swapped)
    with pytest.raises((OSError, ValueError)):
        importing._read(folder, folder / "clips" / "a.mkv")


def test_a_link_that_leads_to_itself_costs_one_row(store: Store, tmp_path: Path) -> None:
    project_id, folder = add_project(store), tmp_path / "run"
    folder.mkdir()
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "a.mp4").write_bytes(b"video")
    rows = [{"file_name": "loop", "text": "a"}, {"file_name": "a.mp4", "text": "b"}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = importing.import_run(store, project_id, folder, "r", "system", render=render)
    assert (counts["added"], counts["refused"]) == (1, 1) and str(tmp_path) not in counts["first_refused"]


def test_what_is_wrong_with_a_folder_is_told_by_the_name_it_is_listed_under(store: Store, tmp_path: Path) -> None:
    project_id = add_project(store)
    (tmp_path / "clips.jsonl").write_text("no row\n")
    importing.begin_import(store, project_id, tmp_path, "0/run", "r", "system", render=render).join()
    job = importing.job_of(store, project_id)
    assert job is not None and job.state == "failed" and "0/run" in job.problem and str(tmp_path) not in job.problem


# What labelers said


def test_all_bad_is_no_way_to_the_prompt_before_the_questions_that_do_not_see_it(each_store: Store) -> None:
    questions = [{"name": "motion", "question": "Which moves best?", "sees_prompt": False}, {"name": "text", "question": "Which fits?"}]
    project_id = with_tasks(each_store, prompts=1, dimensions=questions)
    ann = as_labeler(each_store, "ann", project_id)
    held = taken(each_store, ann, project_id)
    answering.reveal_prompt(each_store, ann, held, {}, True)
    changed = {"motion": (4, 3, 2, 1), "text": (1, 2, 3, 4)}
    with pytest.raises(Denied, match="stays as it was"):
        answering.submit(each_store, ann, held, an_answer(4, ranks=changed))
    answering.submit(each_store, ann, held, an_answer(4, ranks={**changed, "motion": (1, 1, 1, 1)}))


def test_an_example_whose_corrected_caption_was_deleted_is_no_example_of_the_prompt_that_was_wrong(each_store: Store) -> None:
    project_id = add_project(each_store, labeling={**NO_CHECKS, "takes": 2})
    add_clips(each_store, project_id, ("a",), takes=2, files=False)
    ann = as_labeler(each_store, "ann", project_id)
    with each_store.writing() as db:
        labeling.make_demonstrations(each_store, db, project_id, ann)
    held = taken(each_store, ann, project_id, work="demonstration")
    said = Demonstration(id=next(_ids), accepted=(True, False), best=None, caption="something else", watched=(1, 1), watch_ms=(1, 1), lead_time_ms=1)
    answering.demonstrate(each_store, ann, held, said)
    assert [text for text, _ in labeling.demonstrations_of(each_store, project_id)] == ["something else"]
    delete_person(each_store, ann.person_id, "system")
    assert labeling.demonstrations_of(each_store, project_id) == []


def test_a_draft_that_came_after_the_deletion_goes_with_the_next_retention(each_store: Store) -> None:
    project_id = with_tasks(each_store, prompts=1)
    ann = as_labeler(each_store, "ann", project_id)
    held = taken(each_store, ann, project_id)
    delete_person(each_store, ann.person_id, "system")
    answering.save_draft(each_store, ann, held, {"comment": "my own words"})
    retain(each_store, project_id)
    with each_store.reading() as db:
        assert db.execute(select(assignment.c.draft).where(assignment.c.id == held)).scalar_one() is None


def test_pairs_of_one_repeated_task_are_one_observation() -> None:
    said = []
    for n in range(2):
        for again in (False, True):
            said.append(ranking("ann", (1, 2, 3, 4), task=f"t{n}", is_repeat=again, created_at=f"{int(again)}-{n}"))
    (told,) = quality.persons_of(said, {})
    assert told.repeats.value is None and told.repeats.n == 2


def test_answers_to_clips_that_filters_stop_since_are_not_exported(each_store: Store) -> None:
    project_id = with_tasks(each_store, prompts=1)
    ann = as_labeler(each_store, "ann", project_id)
    mine = row_of(each_store, taken(each_store, ann, project_id))
    answering.submit(each_store, ann, mine.id, an_answer(4))
    assert len(list(labeling.events_of(each_store, project_id))) == 1
    with each_store.writing() as db:
        db.execute(update(clip).where(clip.c.id == mine.clips[0]).values(verdict="block"))
    assert list(labeling.events_of(each_store, project_id)) == []


# Two servers, and servers that fail


def test_two_servers_on_one_database_hand_out_no_place_twice_and_write_one_chain(each_store: Store, tmp_path: Path) -> None:
    project_id = with_tasks(each_store, prompts=6, overlap=2)
    url = None if each_store.is_sqlite else each_store.url.render_as_string(hide_password=False)
    folder = each_store.folder if each_store.is_sqlite else tmp_path / "second"
    second = open_store(folder, url, secret=each_store.secret)
    people_ = [as_labeler(each_store, f"ann {n}", project_id) for n in range(8)]
    problems: list[BaseException] = []

    def work(store: Store, who: Any) -> None:
        try:
            for _ in range(3):
                offer = choosing.next_assignment(store, who, project_id)
                if offer.assignment_id:
                    answering.submit(store, who, offer.assignment_id, an_answer(4))
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=((each_store, second)[n % 2], who)) for n, who in enumerate(people_)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    second.close()
    assert not problems
    with each_store.reading() as db:
        answered = db.execute(select(assignment.c.task_id, assignment.c.slot).where(assignment.c.state == "answered")).all()
        counts = db.execute(select(task.c.answered, task.c.taken)).all()
    assert len(answered) == len(set(answered)) == 12 and set(map(tuple, counts)) == {(2, 2)}
    each_store.verify_log()


def test_an_answer_that_was_kept_while_the_proxy_failed_is_sent_again_as_it_was(store: Store, browser: Any) -> None:
    project_id = with_tasks(store, prompts=2, takes=2, least_watched=0.0)
    as_labeler(store, "ann", project_id)
    with serving(store) as address:
        page = opened(browser, address, "ann")
        failed: list[str] = []

        def answer_(route: Any) -> None:
            if failed:
                route.continue_()
            else:
                route.fetch()
                failed.append(route.request.url)
                route.fulfill(status=502, body="bad gateway")

        page.route("**/api/assignments/*/answer", answer_)
        page.goto(f"/projects/{project_id}/label")
        page.get_by_role("button", name="Begin").click()
        page.wait_for_selector("figure.take")
        page.keyboard.press("x")
        page.keyboard.press("Enter")
        page.wait_for_function("() => document.getElementById('wrong').textContent.includes('502')")
        page.wait_for_timeout(50)
        page.keyboard.press("Enter")
        page.wait_for_function("() => document.getElementById('progress').textContent.startsWith('1 answered')")
        page.context.close()
    assert len(failed) == 1
    with store.reading() as db:
        assert db.execute(select(func.count()).select_from(answer)).scalar_one() == 1


def test_what_is_said_after_a_failure_is_what_is_sent_and_not_what_was_said_before(store: Store, browser: Any) -> None:
    project_id = with_tasks(store, prompts=2, takes=2, least_watched=0.0)
    as_labeler(store, "ann", project_id)
    with serving(store) as address:
        page = opened(browser, address, "ann")
        page.goto(f"/projects/{project_id}/label")
        page.get_by_role("button", name="Begin").click()
        for done in ("0", "1"):
            page.wait_for_function("(done) => document.getElementById('progress')?.textContent.startsWith(`${done} answered`)", arg=done)
            page.route("**/api/assignments/*/answer", lambda route: route.abort())
            page.keyboard.press("x")
            page.keyboard.press("Enter")
            page.wait_for_function("() => document.getElementById('wrong').textContent.includes('does not answer')")
            page.unroute("**/api/assignments/*/answer")
            if done == "0":
                page.get_by_text("A remark").click()
                page.get_by_label("For those who run the project").fill("both flicker")
                page.click("#submit:enabled")
            else:
                page.keyboard.press("s")
                page.locator("#ask-skip input").last.check()
                page.get_by_role("button", name="Skip", exact=True).last.click()
                page.wait_for_url("**/label")
        page.context.close()
    with store.reading() as db:
        first, second = db.execute(select(answer.c.body).order_by(answer.c.at)).scalars().all()
        assert db.execute(select(private_text.c.text).where(private_text.c.id == first["comment"])).scalar_one() == "both flicker"
    assert (first["what"], second["what"]) == ("rank", "skip")


# What follows from what


def test_a_task_goes_on_once_a_reviewer_found_its_clip_harmless(each_store: Store) -> None:
    project_id = with_tasks(each_store, prompts=1)
    with each_store.writing() as db:
        db.execute(update(project).where(project.c.id == project_id).values(settings={"labeling": {**NO_CHECKS, "takes": 4}, **NEVER}))
    ann, bob, rae = as_labeler(each_store, "ann", project_id), as_labeler(each_store, "bob", project_id), actor(each_store, "rae", "reviewer")
    answering.flag(each_store, ann, taken(each_store, ann, project_id), Unsafe(place=0, policies=("P05",)))
    assert choosing.next_assignment(each_store, bob, project_id).assignment_id is None
    read(each_store, rae, project_id, "flagged", decision())
    later(each_store, 16)
    assert choosing.next_assignment(each_store, bob, project_id).assignment_id is not None


def test_a_run_is_signed_off_on_what_is_known_and_not_on_an_older_report(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    project_id = add_project(store, **NEVER)
    add_clips(store, project_id, takes=1, files=False)
    lead, rae = actor(store, "lea", "lead"), actor(store, "rae", "reviewer")
    auditing.draw(store, project_id, lead)
    client = Client(store, "lea")
    read(store, rae, project_id, waiting(store, project_id)[0], decision())
    monkeypatch.setattr("reward.app.reports.REST", 1e9)  # as on a server with much to do
    page = f"/api/projects/{project_id}/lead/signoffs"
    until(lambda: client.get(page, params={"run": "test"}).json()["seen"])
    shown = client.get(page, params={"run": "test"}).json()
    assert shown["evidence"]["audit"]["read"] == 0
    settled(store, project_id)
    told = client.post(page, json={"run": "test", "approved": True, "statement": "nothing was found", "seen": shown["seen"]})
    assert told.status_code == 409, told.text


def test_who_was_warned_is_not_told_by_the_reply_which_task_was_a_check(each_store: Store) -> None:
    checks = {"active": 0, "random": 0, "gold": 1, "repeat": 0, "mirrored": 0}
    project_id = add_project(each_store, labeling={**NO_CHECKS, "takes": 2, "mixture": checks, "careless_pause": 1.0})
    clips = add_clips(each_store, project_id, [f"prompt {n}" for n in range(6)], takes=2, files=False)
    ann = as_labeler(each_store, "ann", project_id)
    with each_store.writing() as db:
        for n in range(5):
            row = labeling.task_row(each_store, project_id, f"prompt {n}", clips[2 * n : 2 * n + 2], "gold", wanted=labeling.EVERYBODY, shuffle=0.1 * n, truth={"overall": [1, 2]})
            db.execute(insert(task), row)
    clock = itertools.count(each_store.now())
    each_store.now = lambda: next(clock)
    told = []
    for right in (False, False, False, True, True):
        mine = row_of(each_store, taken(each_store, ann, project_id))
        ranks = tuple(1 + (mine.shown_order.index(place) == int(right)) for place in range(2))
        told.append(answering.submit(each_store, ann, mine.id, an_answer(2, ranks=ranks)).standing)
    assert told == ["fine", "fine", "warned", "fine", "fine"]


def test_what_people_called_violating_stays_away_from_labelers_when_a_newer_filter_allows_it(each_store: Store, tmp_path: Path) -> None:
    project_id, rae = add_project(each_store, **NEVER), actor(each_store, "rae", "reviewer")
    a_run(tmp_path / "one", [BLOCKED])
    importing.import_run(each_store, project_id, tmp_path / "one", "r", "system", render=render)
    auditing.draw(each_store, project_id, rae)
    clip_id = read(each_store, rae, project_id, "blocked", decision("violating", "P05"))
    settled(each_store, project_id)
    a_run(tmp_path / "two", [ALLOWED])
    assert importing.import_run(each_store, project_id, tmp_path / "two", "r", "system", render=render)["ruled_again"] == 1
    assert servable(each_store, [clip_id]) == set() and state(each_store, clip_id) == "withdrawn"


def test_a_clip_that_somebody_says_was_wrongly_found_harmless_waits_for_the_appeal(each_store: Store) -> None:
    project_id = add_project(each_store, **NEVER)
    (clip_id,) = add_clips(each_store, project_id, ("a",), takes=1, files=False)
    rae, sue, tom = actor(each_store, "rae", "reviewer"), actor(each_store, "sue", "senior"), actor(each_store, "tom", "senior")
    auditing.draw(each_store, project_id, sue)
    said = decision()
    read(each_store, rae, project_id, waiting(each_store, project_id)[0], said)
    settled(each_store, project_id)
    assert servable(each_store, [clip_id]) == {clip_id}
    reviewing.appeal(each_store, sue, project_id, said.id, "look at the end")
    assert servable(each_store, [clip_id]) == set()
    read(each_store, tom, project_id, "appeals", decision("cannot_tell", ruling="uphold"))
    settled(each_store, project_id)
    assert servable(each_store, [clip_id]) == {clip_id}


@pytest.mark.parametrize("how", ["roles", "deletion"])
def test_an_invitation_ends_with_the_lead_who_gave_it(each_store: Store, how: str) -> None:
    project_id = add_project(each_store)
    eve = add_member(each_store, "eve", "lead", project_id=project_id)
    add_member(each_store, "lea", "lead")
    gone, lead = Client(each_store, "eve"), Client(each_store, "lea")
    path = f"/api/projects/{project_id}/lead"
    kept = gone.post(f"{path}/invitations", json={"roles": ["lead", "child_safety"]}).json()["link"].rpartition("/")[2]
    other = lead.post(f"{path}/invitations", json={"roles": ["labeler"]}).json()["link"].rpartition("/")[2]
    assert Client(each_store).get(f"/api/join/{kept}").status_code == 200
    if how == "roles":
        lead.post(f"{path}/people/{eve}/roles", json={"roles": ["labeler"]}).raise_for_status()
    else:
        lead.post(f"{path}/people/{eve}/delete", json={"confirm": gone.me.pseudonym}).raise_for_status()
    assert [Client(each_store).get(f"/api/join/{token}").status_code for token in (kept, other)] == [404, 200]


def test_another_import_does_not_restrict_again_what_child_safety_let_go(store: Store, tmp_path: Path) -> None:
    one, two, three = (add_project(store, name, **NEVER) for name in ("one", "two", "three"))
    a_run(tmp_path / "run", [ALLOWED])
    for project_id in (one, two):
        importing.import_run(store, project_id, tmp_path / "run", "r", "system", render=render)
    kim, lead = actor(store, "kim", "child_safety"), as_labeler(store, "lead")
    (first,) = clips_of(store, one)
    with store.writing() as db:
        reviewing.flag(store, db, clip=first.id, policies=["P04"], source="a_1", by=lead)
    read(store, kim, one, "flagged", decision())
    settled(store, one)
    importing.import_run(store, three, tmp_path / "run", "r", "system", render=render)
    assert [clips_of(store, project_id)[0].state for project_id in (one, two, three)] == ["live", "restricted", "restricted"]

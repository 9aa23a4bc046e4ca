"""What is deleted is gone, from every page, export, backup and file; what people answered stays, and the log still verifies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from sqlalchemy import func, insert, select, update

from reward.app import reviewing, security
from reward.app.backup import backup
from reward.app.deleting import DAY, delete_clip, delete_person, retain
from reward.app.media import path_of
from reward.app.schema import (
    answer,
    api_token,
    assignment,
    clip,
    event,
    item,
    membership,
    metadata,
    person,
    person_private,
    private_text,
    project,
    reading,
    session,
    task,
    tombstone,
)
from reward.app.security import Denied
from reward.app.store import Store, new_id
from tests.reward.app.conftest import PASSWORD, Client, add_clips, add_member, add_project

LOGIN, WORDS, DRAFT = "wilhelmina-login", "in my own words: Wilhelmina of Utrecht", "a draft by Wilhelmina"
NAME = LOGIN.title()


def add_answer(store: Store, project_id: str, person_id: str, clips: Sequence[str], *, draft: object = None) -> str:
    """An answer with a comment, behind a task and an assignment of its own."""
    ids = {name: new_id(name[0]) for name in ("task", "assignment", "answer", "comment")}
    now = store.now()
    with store.writing() as db:
        about = {"id": ids["task"], "project_id": project_id, "prompt_id": "p", "clips": list(clips), "kind": "rank", "wanted": 2, "taken": 1, "answered": 1}
        db.execute(insert(task), {**about, "priority": 0.0, "shuffle": 0.5, "state": "open", "created_at": now})
        held = {"id": ids["assignment"], "project_id": project_id, "task_id": ids["task"], "person_id": person_id, "slot": 0, "purpose": "active", "repeat": 0}
        db.execute(insert(assignment), {**held, "shown_order": [0, 1], "issued_at": now, "lease_until": now, "state": "answered", "draft": draft})
        db.execute(insert(private_text), {"id": ids["comment"], "person_id": person_id, "text": WORDS, "created_at": now})
        said = {"id": ids["answer"], "project_id": project_id, "task_id": ids["task"], "assignment_id": ids["assignment"], "person_id": person_id, "version": 1, "at": now}
        db.execute(insert(answer), {**said, "body": {"ranks": {"overall": [1, 2]}, "comment": ids["comment"]}})
    return ids["answer"]


def holders(folder: Path, words: Sequence[str]) -> list[str]:
    """Files of the store that hold one of the words."""
    return [path.name for path in folder.rglob("*") if path.is_file() and any(word.encode() in path.read_bytes() for word in words)]


def test_a_deleted_person_has_no_name_anywhere_and_every_answer_stays(each_store: Store, tmp_path: Path) -> None:
    store, project_id = each_store, add_project(each_store)
    clips = add_clips(store, project_id, takes=2)
    person_id = add_member(store, LOGIN, "labeler", project_id=project_id)
    stays = add_member(store, "lead", "lead", project_id=project_id)
    client, lead = Client(store, LOGIN), Client(store, "lead")
    token = client.post("/api/account/tokens", json={"name": f"the script of {NAME}"}).json()["token"]
    answers = [add_answer(store, project_id, person_id, clips[:2], draft={"comment": DRAFT}) for _ in range(200)]
    if store.is_sqlite:
        assert "app.sqlite3" in holders(store.folder, [NAME]) or "app.sqlite3-wal" in holders(store.folder, [NAME])

    path = f"/api/projects/{project_id}/lead/people/{person_id}/delete"
    assert lead.post(path, json={"confirm": "person-somebody"}).status_code == 422
    answer_ = lead.post(path, json={"confirm": client.me.pseudonym})
    assert (answer_.status_code, answer_.json()["done"]) == (200, f"{client.me.pseudonym} has no name any more")
    assert lead.post(path, json={"confirm": client.me.pseudonym}).status_code == 404

    with store.reading() as db:
        assert db.execute(select(person.c.state, person.c.pseudonym, person.c.settings).where(person.c.id == person_id)).one() == ("deleted", client.me.pseudonym, {})
        assert set(db.execute(select(answer.c.id).where(answer.c.person_id == person_id)).scalars()) == set(answers)
        for table in (person_private, private_text, session, api_token, membership):
            assert not db.execute(select(func.count()).select_from(table).where(table.c.person_id == person_id)).scalar(), table.name
        held = db.execute(select(person_private.c.person_id)).scalars().all()
        everything = json.dumps([[str(row) for row in db.execute(select(table)).all()] for table in metadata.sorted_tables])
        assert [row.ref for row in db.execute(select(tombstone))] == [person_id]
    assert held == [stays] and not [word for word in (LOGIN, NAME, WORDS, DRAFT, "Wilhelmina") if word.casefold() in everything.casefold()]
    assert client.get("/api/account").status_code == 401
    assert security.actor_of_token(store, token) is None
    assert Client(store).post("/api/login", json={"login": LOGIN, "password": PASSWORD}).status_code == 401
    assert store.verify_log()["events"] > 4
    if store.is_sqlite:
        backup(store, tmp_path / "copy")
        assert not holders(store.folder, [LOGIN, NAME, WORDS, DRAFT, "Wilhelmina"]) and not holders(tmp_path / "copy", [LOGIN, NAME, WORDS, DRAFT, "Wilhelmina"])


def test_a_login_is_free_again_and_its_new_holder_is_somebody_else(store: Store) -> None:
    first = add_member(store, LOGIN, "labeler")
    delete_person(store, first, "system")
    assert add_member(store, LOGIN, "labeler") != first


def test_a_reader_that_does_not_end_is_told_of_and_forgetting_again_succeeds(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from reward.app import deleting

    monkeypatch.setattr(deleting, "PATIENCE", 0.05)
    person_id = add_member(store, LOGIN, "labeler")
    with store.reading() as db:
        db.execute(select(person)).all()
        assert not delete_person(store, person_id, "system")
    assert deleting.forget(store) and not holders(store.folder, [LOGIN])


def test_what_a_request_on_its_way_wrote_after_the_deletion_goes_with_the_next_retention(each_store: Store) -> None:
    store, project_id = each_store, add_project(each_store)
    person_id, other = add_member(store, LOGIN, "labeler"), add_member(store, "other", "labeler")
    delete_person(store, person_id, "system")
    with store.writing() as db:
        for who in (person_id, other):
            db.execute(insert(private_text), {"id": new_id("x"), "person_id": who, "text": WORDS, "created_at": 0})
    retain(store, project_id)
    with store.reading() as db:
        assert db.execute(select(private_text.c.person_id)).scalars().all() == [other]


def test_who_leads_one_project_deletes_nobody_of_another(store: Store) -> None:
    home, away = add_project(store, "home"), add_project(store, "away")
    both, far = add_member(store, "both", "labeler", project_id=home), add_member(store, "far", "labeler", project_id=away)
    with store.writing() as db:
        db.execute(insert(membership), {"person_id": both, "project_id": away, "role": "labeler", "since": 0})
        pseudonyms = dict(db.execute(select(person.c.id, person.c.pseudonym)).all())
    for login, role, where in (("lead", "lead", home), ("labeler", "labeler", home), ("all", "lead", "*")):
        add_member(store, login, role, project_id=where)

    def asked(login: str, person_id: str) -> int:
        return Client(store, login).post(f"/api/projects/{home}/lead/people/{person_id}/delete", json={"confirm": pseudonyms[person_id]}).status_code

    assert [asked("labeler", both), asked("lead", far), asked("lead", both), asked("all", far), asked("all", both)] == [404, 404, 403, 404, 200]


def test_a_deleted_clip_has_no_media_and_the_same_clip_of_another_project_keeps_them(each_store: Store) -> None:
    store = each_store
    home, away = add_project(store, "home"), add_project(store, "away")
    (mine, other), (theirs, _) = add_clips(store, home, ["a"], takes=2), add_clips(store, away, ["b"], takes=2)
    with store.writing() as db:
        digests = dict(db.execute(select(clip.c.id, clip.c.clip_id)).all())
        db.execute(update(clip).where(clip.c.id == theirs).values(clip_id=digests[mine]))
    still = path_of(store, digests[mine], "blur.jpg")
    still.write_bytes(b"blurred")
    with pytest.raises(Denied):
        delete_clip(store, away, mine, "system")
    delete_clip(store, home, mine, "system")
    assert still.exists(), "the other project still shows it"
    delete_clip(store, away, theirs, "system")
    assert not list(still.parent.glob(f"{digests[mine]}.*")) and path_of(store, digests[other]).exists()
    with pytest.raises(Denied):
        delete_clip(store, home, mine, "system")
    with store.reading() as db:
        assert dict(db.execute(select(clip.c.id, clip.c.state).where(clip.c.id.in_((mine, theirs, other)))).all()) == {mine: "deleted", theirs: "deleted", other: "live"}
        assert {(row.kind, row.ref) for row in db.execute(select(tombstone))} == {("clip", mine), ("clip", theirs)}
    assert store.verify_log()["events"] > 0


def test_a_restricted_clip_does_not_exist_for_a_lead_and_child_safety_deletes_it_alone(store: Store) -> None:
    project_id = add_project(store)
    live, hidden = add_clips(store, project_id, ["a"], takes=2)
    with store.writing() as db:
        db.execute(update(clip).where(clip.c.id == hidden).values(state="restricted"))
    for role in ("lead", "child_safety", "auditor", "senior"):
        add_member(store, role, role, project_id=project_id)

    def asked(role: str, clip_id: str) -> int:
        return Client(store, role).post(f"/api/projects/{project_id}/lead/clips/{clip_id}/delete", json={"confirm": clip_id}).status_code

    assert [asked("lead", hidden), asked("senior", hidden), asked("auditor", live), asked("child_safety", live)] == [404] * 4
    assert [asked("child_safety", hidden), asked("lead", live)] == [200, 200]


def test_media_of_withdrawn_clips_are_kept_as_long_as_the_project_says_and_no_longer(each_store: Store) -> None:
    store, project_id = each_store, add_project(each_store, retention_days=30)
    old, young, live = add_clips(store, project_id, ["a"], takes=3)
    began = store.now()
    clock = [began]
    store.now = lambda: clock[0]
    for clip_id, day, kind in ((old, 0, "clip withdrawn"), (young, 20, "restriction ended")):  # older versions wrote the second alone where child safety withdrew a clip
        clock[0] = began + day * DAY
        with store.writing() as db:
            db.execute(update(clip).where(clip.c.id == clip_id).values(state="withdrawn"))
            store.log(db, "system", kind, clip_id)
    clock[0] = began + 30 * DAY - 1
    assert retain(store, project_id) == 0
    clock[0] = began + 31 * DAY
    assert (retain(store, project_id), retain(store, project_id)) == (1, 0)
    with store.reading() as db:
        rows = dict(db.execute(select(clip.c.id, clip.c.state)).all())
        files = {row.id: path_of(store, row.clip_id).exists() for row in db.execute(select(clip))}
    assert rows == {old: "deleted", young: "withdrawn", live: "live"} and files == {old: False, young: True, live: True}
    with store.writing() as db:
        db.execute(update(project).values(settings={}))
    clock[0] = began + 10_000 * DAY
    assert retain(store, project_id) == 0, "no number of days means for ever"


def test_a_clip_that_child_safety_found_to_violate_something_else_is_kept_from_that_day_on(each_store: Store) -> None:
    store, project_id = each_store, add_project(each_store, retention_days=30)
    (clip_id,) = add_clips(store, project_id, ["a"], takes=1)
    for login, role in (("lab", "labeler"), ("kim", "child_safety")):
        add_member(store, login, role, project_id=project_id)
    lab, kim, began = Client(store, "lab").me, Client(store, "kim").me, store.now()
    store.now = lambda: began + 40 * DAY
    with store.writing() as db:
        reviewing.flag(store, db, clip=clip_id, policies=("P04",), source="a_1", by=lab)
    reading_id = reviewing.next_reading(store, kim, project_id, "flagged")
    assert isinstance(reading_id, str)
    said = {"id": new_id("w"), "said": "violating", "policies": ["P01"], "rationale": "seen", "policy_version": reviewing.policy_version()}
    reviewing.decide(store, kim, reading_id, reviewing.Decision.model_validate(said))
    store.now = lambda: began + 40 * DAY + 60_000
    reviewing.catch_up(store, project_id)
    assert retain(store, project_id) == 0
    with store.reading() as db:
        told = db.execute(select(event.c.kind, event.c.subject).order_by(event.c.seq.desc()).limit(2)).all()
    assert told == [("clip withdrawn", clip_id), ("restriction ended", clip_id)]
    store.now = lambda: began + 70 * DAY + 60_000
    assert retain(store, project_id) == 1


def test_media_that_a_killed_process_left_behind_are_removed_by_the_next_retention(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from reward.app import deleting

    project_id = add_project(store)
    (clip_id,) = add_clips(store, project_id, ["a"], takes=1)
    monkeypatch.setattr(deleting, "remove_media", lambda store, digests: None)
    delete_clip(store, project_id, clip_id, "system")
    assert list(store.media.glob("*/*"))
    monkeypatch.undo()
    retain(store, project_id)
    assert not list(store.media.glob("*/*"))


def test_what_a_killed_import_wrote_by_half_goes_with_the_clip_and_is_in_no_backup(store: Store, tmp_path: Path) -> None:
    project_id = add_project(store)
    gone, late = add_clips(store, project_id, ["a"], takes=2)
    with store.reading() as db:
        halves = {each.id: path_of(store, each.clip_id).with_name(f".{each.clip_id}.clip.mp4.1234.partial") for each in db.execute(select(clip))}
    for half in halves.values():
        half.write_bytes(b"half of a film")
    assert backup(store, tmp_path / "copy")["media_files"] == 2 and not list((tmp_path / "copy").rglob("*.partial"))
    delete_clip(store, project_id, gone, "system")
    assert [half.exists() for half in (halves[gone], halves[late])] == [False, True]
    delete_clip(store, project_id, late, "system")
    halves[late].write_bytes(b"half of a film")
    retain(store, project_id)
    assert not list(store.media.glob("*/*"))


def test_nobody_is_asked_about_a_deleted_clip_any_more_and_what_was_said_of_it_stands(each_store: Store) -> None:
    store, project_id = each_store, add_project(each_store)
    clips = add_clips(store, project_id, takes=3, prompts=["a horse"], verdicts=("review", "review", "allow"), files=False)
    add_member(store, "rae", "reviewer", project_id=project_id)
    add_member(store, "sam", "senior", project_id=project_id)
    rae, sam = Client(store, "rae"), Client(store, "sam")
    with store.writing() as db:
        reviewing.queue_imported(store, db, project_id, clips)
    read = rae.post(f"/api/review/{project_id}/next", json={"queue": "review"}).json()["done"]
    said = {"id": new_id("w"), "said": "violating", "policies": ["P05"], "rationale": "seen", "policy_version": reviewing.policy_version(), "escalate": True}
    assert rae.post(f"/api/reading/{read}/decide", json=said).status_code == 200
    held = sam.post(f"/api/review/{project_id}/next", json={"queue": "review"}).json()["done"]
    assert sam.post(f"/api/reading/{held}/draft", json={"rationale": WORDS}).status_code == 200
    for each in clips:
        delete_clip(store, project_id, each, "person-lead")
    with store.reading() as db:
        assert set(db.execute(select(item.c.state)).scalars()) == {"closed"}
        assert dict(db.execute(select(reading.c.id, reading.c.state)).all()) == {read: "decided", held: "expired"}
        assert WORDS not in db.execute(select(private_text.c.text)).scalars().all()
        assert reviewing.counts(db, sam.me, project_id) == {}
        assert [each.settled for some in reviewing.standing(db, clips).values() for each in some] == [True]
    now = store.now()
    store.now = lambda: now + 3_600_000
    with store.writing() as db:
        assert reviewing.settle(store, db, project_id) == 0
        assert db.execute(select(func.count()).select_from(item)).scalar_one() == 2, "nothing follows from a decision about what is gone"
    assert sam.post(f"/api/reading/{held}/decide", json={**said, "id": new_id("w")}).status_code == 404
    assert store.verify_log()["events"] > 0

"""Who is asked about what, what follows from an answer, what was seen is written down, and what audits make of it."""

from __future__ import annotations

import itertools
import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, select, update
from sqlalchemy.exc import DBAPIError

from base_model.errors import UserError
from recipes import app, cli
from reward.app import auditing, exposure, reviewing, security
from reward.app.exposure import MINUTE, Look, Rest, minutes, rest_of
from reward.app.reviewing import Decision, Draft, Personal, next_reading, policy_version
from reward.app.schema import clip, event, item, person, prompt, reading, reveal, review, withdrawal
from reward.app.security import Actor, Denied
from reward.app.settings import Reviewing
from reward.app.store import Store
from reward.safety.audit import Audit, Entry, Reading, latest_review, load_audit, review_of, violates
from tests.reward.app.conftest import Client, add_clips, add_member, add_project

_ids = (f"decision-{number:04d}" for number in itertools.count())


def actor(store: Store, login: str, *roles: str, project_id: str = "*") -> Actor:
    """A person who has just logged in."""
    person_id = add_member(store, login, *roles, project_id=project_id)
    with store.writing() as db:
        cookie = security.begin_session(store, db, person_id, "test")
    found = security.actor_of_session(store, cookie)
    assert found is not None
    return found


def decision(said: str = "not_violating", *policies: str, **more: Any) -> Decision:
    return Decision.model_validate({"id": next(_ids), "said": said, "policies": policies, "rationale": "seen", "policy_version": policy_version(), **more})


def later(store: Store, seconds: float) -> None:
    now = store.now()
    store.now = lambda: now + int(1_000 * seconds)


def queue(store: Store, project_id: str, clips: list[str]) -> int:
    with store.writing() as db:
        return reviewing.queue_imported(store, db, project_id, clips)


def settled(store: Store, project_id: str) -> None:
    later(store, 16)
    with store.writing() as db:
        reviewing.settle(store, db, project_id)


def read(store: Store, who: Actor, project_id: str, queue: str, said: Decision) -> str:
    """Takes one of a queue, says something of it, and returns the clip."""
    reading_id = next_reading(store, who, project_id, queue)
    assert isinstance(reading_id, str), reading_id
    reviewing.decide(store, who, reading_id, said)
    with store.reading() as db:
        return str(db.execute(select(reading.c.clip).where(reading.c.id == reading_id)).scalar_one())


def waiting(store: Store, project_id: str) -> list[str]:
    """Queues of what is open."""
    with store.reading() as db:
        return sorted(db.execute(select(item.c.queue).where(item.c.project_id == project_id, item.c.state == "open")).scalars())


def state(store: Store, clip_id: str) -> str:
    with store.reading() as db:
        return str(db.execute(select(clip.c.state).where(clip.c.id == clip_id)).scalar_one())


def kinds(store: Store) -> list[str]:
    with store.reading() as db:
        return list(db.execute(select(event.c.kind).order_by(event.c.seq)).scalars())


NEVER, ALWAYS = {"reviewing": {"second_share": 0.0}}, {"reviewing": {"second_share": 1.0}}


# Queues


def test_an_import_queues_what_the_filters_did_not_decide_and_does_so_once(each_store: Store) -> None:
    project_id = add_project(each_store)
    clips = add_clips(each_store, project_id, takes=1, prompts=("a", "b", "c", "d"), verdicts=("allow", "review", "error", "block"), files=False)
    with each_store.writing() as db:
        held = db.execute(select(clip.c.decision).where(clip.c.id == clips[3])).scalar_one()
        other = {**held["rulings"][0], "verdict": "allow", "filter": "another 1"}
        db.execute(update(clip).where(clip.c.id == clips[3]).values(decision={**held, "rulings": [*held["rulings"], other]}))
    assert queue(each_store, project_id, clips) == 3
    assert waiting(each_store, project_id) == ["disagreement", "errors", "review"]
    assert queue(each_store, project_id, clips) == 0


def test_two_people_never_get_one_item_and_one_person_gets_the_same_twice(each_store: Store) -> None:
    project_id = add_project(each_store)
    queue(each_store, project_id, add_clips(each_store, project_id, takes=3, verdicts=("review",), files=False))
    people = [actor(each_store, f"r{number}", "reviewer") for number in range(6)]
    found: list[Any] = []

    def ask(who: Actor) -> None:
        found.append((who.person_id, next_reading(each_store, who, project_id, "review")))

    threads = [threading.Thread(target=ask, args=(who,)) for who in people for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 18 and len(set(found)) == 6, "a double click gives the reading that is open"
    with each_store.reading() as db:
        items = db.execute(select(reading.c.item_id).where(reading.c.state == "open")).scalars().all()
    assert len(items) == len(set(items)) == 6


def test_a_lease_that_ran_out_goes_to_somebody_else_and_a_late_decision_is_lost_only_then(each_store: Store) -> None:
    project_id = add_project(each_store, **NEVER)
    queue(each_store, project_id, add_clips(each_store, project_id, prompts=("a",), takes=1, verdicts=("review",), files=False))
    ada, bob = actor(each_store, "ada", "reviewer"), actor(each_store, "bob", "reviewer")
    first = next_reading(each_store, ada, project_id, "review")
    assert next_reading(each_store, bob, project_id, "review") is None
    later(each_store, 21 * 60)
    second = next_reading(each_store, bob, project_id, "review")
    assert isinstance(first, str) and isinstance(second, str) and second != first
    with pytest.raises(Denied, match="over"):
        reviewing.decide(each_store, ada, first, decision())
    later(each_store, 21 * 60)
    assert next_reading(each_store, actor(each_store, "cy", "senior"), project_id, "appeals") is None, "frees what is late"
    reviewing.decide(each_store, ada, first, decision())
    with pytest.raises(Denied):
        reviewing.decide(each_store, bob, second, decision())


def test_a_paused_reviewer_is_given_nothing_until_let_back(each_store: Store) -> None:
    project_id = add_project(each_store)
    queue(each_store, project_id, add_clips(each_store, project_id, takes=1, verdicts=("review",), files=False))
    ada = actor(each_store, "ada", "reviewer")
    for state_, given in (("paused", False), ("active", True), ("paused", False)):
        with each_store.writing() as db:
            db.execute(update(person).where(person.c.id == ada.person_id).values(state=state_))
        if given:
            assert isinstance(next_reading(each_store, ada, project_id, "review"), str)
        else:
            with pytest.raises(Denied, match="you are paused") as told:
                next_reading(each_store, ada, project_id, "review")
            assert told.value.status == 403


def test_severe_items_come_at_most_so_many_in_a_row_while_there_are_others(store: Store) -> None:
    """One item a minute: hard, hard, mild, hard, hard, mild ..., and hard ones at the end when no mild one is left."""
    project_id = add_project(store, reviewing={"most_severe_in_a_row": 2, "second_share": 0.0, "exposure_minutes": 10_000})
    clips = add_clips(store, project_id, prompts=("a",), takes=8, verdicts=("review",), files=False)
    with store.writing() as db:
        for number, each in enumerate(clips):
            reviewing.add_item(store, db, project_id, each, "review", {"policies": []}, severity=4 if number < 6 else 1, by="x", place=float(number))
    ada, found = actor(store, "ada", "reviewer"), []
    for _ in clips:
        later(store, 60)
        given = read(store, ada, project_id, "review", decision())
        found.append(clips.index(given) < 6)
    assert found == [True, True, False, True, True, False, True, True]


def test_policies_that_somebody_opted_out_of_are_not_given_to_them(store: Store) -> None:
    project_id = add_project(store)
    queue(store, project_id, add_clips(store, project_id, prompts=("a",), takes=1, verdicts=("review",), files=False))
    ada = actor(store, "ada", "reviewer")
    reviewing.set_personal(store, ada, Personal(without=("P17",)))
    with store.writing() as db:
        cookie = security.begin_session(store, db, ada.person_id, "test")
    opted = security.actor_of_session(store, cookie)
    assert opted is not None
    assert next_reading(store, opted, project_id, "review") is None
    assert isinstance(next_reading(store, ada, project_id, "review"), str)
    with pytest.raises(UserError, match="P99"):
        reviewing.set_personal(store, ada, Personal(without=("P99",)))


# Deciding


def test_a_decision_sent_twice_is_there_once_and_another_one_under_its_id_is_refused(each_store: Store) -> None:
    project_id = add_project(each_store)
    queue(each_store, project_id, add_clips(each_store, project_id, verdicts=("review",), files=False))
    ada, bob = actor(each_store, "ada", "reviewer"), actor(each_store, "bob", "reviewer")
    reading_id, other = next_reading(each_store, ada, project_id, "review"), next_reading(each_store, bob, project_id, "review")
    assert isinstance(reading_id, str) and isinstance(other, str)
    said = decision("violating", "P05", marks=[{"start": 0.1, "end": 0.5}], confidence=4, temporal=True)
    assert {reviewing.decide(each_store, ada, reading_id, said) for _ in range(3)} == {said.id}
    for who, where, changed in ((ada, reading_id, said.model_copy(update={"rationale": "other"})), (bob, other, said)):
        with pytest.raises(Denied) as told:
            reviewing.decide(each_store, who, where, changed)
        assert told.value.status == 409
    with each_store.reading() as db:
        (row,) = db.execute(select(review)).all()
        assert (row.said, row.body["policies"], row.body["severity"], row.body["marks"]) == ("violating", ["P05"], 3, [{"start": 0.1, "end": 0.5}])
        assert row.policy_version == policy_version() and reviewing.text_of(db, row.rationale) == "seen"
        assert "seen" not in json.dumps(row.body) and not any("seen" in body for body in db.execute(select(event.c.body)).scalars())
    with pytest.raises(DBAPIError, match="only added to"), each_store.writing() as db:
        db.execute(update(review).values(said="not_violating"))


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        ({"said": "violating"}, "names the policies"),
        ({"said": "not_violating", "policies": ["P05"]}, "names policies"),
        ({"said": "violating", "policies": ["P05", "P05"]}, "twice"),
        ({"said": "cannot_tell", "rationale": "  "}, "say why"),
        ({"said": "cannot_tell", "rationale": ""}, "at least 1"),
        ({"said": "cannot_tell", "marks": [{"start": 2, "end": 1}]}, "after its start"),
        ({"said": "cannot_tell", "marks": [{"start": math.nan, "end": 1}]}, "finite"),
        ({"said": "safe"}, "Input should be"),
        ({"said": "cannot_tell", "severity": 5}, "less than or equal to 4"),
        ({"said": "cannot_tell", "id": "../../etc"}, "pattern"),
        ({"said": "cannot_tell", "extra": 1}, "Extra"),
    ],
)
def test_a_decision_that_makes_no_sense_is_refused(said: dict[str, Any], wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        Decision.model_validate({"id": "decision-x", "rationale": "seen", "policy_version": policy_version(), **said})


def test_a_decision_under_another_policy_or_with_unknown_codes_is_refused(store: Store) -> None:
    project_id = add_project(store)
    queue(store, project_id, add_clips(store, project_id, verdicts=("review",), files=False))
    ada = actor(store, "ada", "reviewer")
    reading_id = next_reading(store, ada, project_id, "review")
    assert isinstance(reading_id, str)
    with pytest.raises(Denied, match="policy was changed"):
        reviewing.decide(store, ada, reading_id, decision(policy_version="1/1"))
    with pytest.raises(UserError, match="no policy 'P77'"):
        reviewing.decide(store, ada, reading_id, decision("violating", "P77"))
    with pytest.raises(UserError, match="no appeal"):
        reviewing.decide(store, ada, reading_id, decision(ruling="uphold"))


def test_undo_takes_a_decision_back_keeps_it_and_gives_the_draft_again(each_store: Store) -> None:
    project_id = add_project(each_store, **NEVER)
    (clip_id,) = add_clips(each_store, project_id, prompts=("a",), takes=1, files=False)
    ada = actor(each_store, "ada", "reviewer")
    with each_store.writing() as db:
        reviewing.add_item(each_store, db, project_id, clip_id, "flagged", {"policies": ["P05"], "not": []}, severity=3, by="x")
    reading_id = next_reading(each_store, ada, project_id, "flagged")
    assert isinstance(reading_id, str)
    first = reviewing.decide(each_store, ada, reading_id, decision("violating", "P05", temporal=True))
    assert state(each_store, clip_id) == "withdrawn", "from labelers, at once"
    assert reviewing.undo(each_store, ada, first) == reviewing.undo(each_store, ada, first) == reading_id
    assert state(each_store, clip_id) == "live"
    with each_store.reading() as db:
        draft = reviewing.draft_of(db, reviewing.own_reading(db, ada, reading_id))
        assert (draft.said, draft.policies, draft.temporal, draft.rationale) == ("violating", ("P05",), True, "seen")
        assert db.execute(select(withdrawal.c.ref)).scalars().all() == [first]
    second = reviewing.decide(each_store, ada, reading_id, decision())
    with each_store.reading() as db:
        assert db.execute(select(review.c.id, review.c.version).order_by(review.c.version)).all() == [(first, 1), (second, 2)]
    settled(each_store, project_id)
    with pytest.raises(Denied, match="too late"):
        reviewing.undo(each_store, ada, second)
    with pytest.raises(Denied) as told:
        reviewing.undo(each_store, actor(each_store, "eve", "reviewer"), second)
    assert told.value.status == 404
    assert each_store.verify_log()["events"] > 5


def test_a_decision_takes_effect_when_the_time_to_undo_is_over_and_not_before(store: Store) -> None:
    project_id = add_project(store, **ALWAYS)
    queue(store, project_id, add_clips(store, project_id, prompts=("a",), takes=1, verdicts=("review",), files=False))
    ada, bob = actor(store, "ada", "reviewer"), actor(store, "bob", "reviewer")
    now = store.now()
    store.now = lambda: now
    read(store, ada, project_id, "review", decision())
    store.now = lambda: now + 14_999
    assert next_reading(store, bob, project_id, "review") is None
    store.now = lambda: now + 15_000
    assert isinstance(next_reading(store, bob, project_id, "review"), str)


# The second reader


def test_the_second_reader_is_never_the_first_nor_who_imported_and_is_not_told(each_store: Store) -> None:
    project_id = add_project(each_store, **ALWAYS)
    queue(each_store, project_id, add_clips(each_store, project_id, prompts=("a",), takes=1, verdicts=("review",), files=False))
    ada, bob, ira = (actor(each_store, name, "reviewer") for name in ("ada", "bob", "ira"))
    with each_store.writing() as db:
        each_store.log(db, ira.pseudonym, "import began", project_id, {"run": security.sha256("test")})
    read(each_store, ada, project_id, "review", decision())
    settled(each_store, project_id)
    assert waiting(each_store, project_id) == ["second"]
    with each_store.reading() as db:
        assert reviewing.counts(db, bob, project_id) == {"review": 1}, "nobody sees that it is a second one"
    assert next_reading(each_store, ada, project_id, "review") is None
    assert next_reading(each_store, ira, project_id, "review") is None
    reading_id = next_reading(each_store, bob, project_id, "review")
    with each_store.reading() as db:
        row = reviewing.own_reading(db, bob, str(reading_id))
        assert reviewing.shown_queue(row) == "review"


def test_the_share_that_is_read_twice_is_near_what_was_asked_for(store: Store) -> None:
    chosen = sum(reviewing.chosen_for_second(store, f"q_{number}", 0.15) for number in range(4_000))
    assert abs(chosen - 600) < 5 * math.sqrt(4_000 * 0.15 * 0.85)
    assert not reviewing.chosen_for_second(store, "q_1", 0.0) and reviewing.chosen_for_second(store, "q_1", 1.0)


def test_a_passed_clip_that_one_person_calls_violating_is_always_read_twice_and_a_tie_goes_to_a_senior(each_store: Store) -> None:
    project_id = add_project(each_store, **NEVER)
    clips = add_clips(each_store, project_id, prompts=("a",), takes=1, files=False)
    ada, bob, sue = actor(each_store, "ada", "reviewer"), actor(each_store, "bob", "reviewer", "senior"), actor(each_store, "sue", "senior")
    auditing.draw(each_store, project_id, ada)
    (only,) = waiting(each_store, project_id)
    read(each_store, ada, project_id, only, decision("violating", "P05"))
    assert state(each_store, clips[0]) == "withdrawn"
    settled(each_store, project_id)
    assert waiting(each_store, project_id) == ["second"]
    read(each_store, bob, project_id, only, decision())
    settled(each_store, project_id)
    assert waiting(each_store, project_id) == ["escalation"] and state(each_store, clips[0]) == "withdrawn", "as long as it is open"
    assert next_reading(each_store, bob, project_id, "escalation") is None, "he read it"
    read(each_store, sue, project_id, "escalation", decision())
    settled(each_store, project_id)
    assert (waiting(each_store, project_id), state(each_store, clips[0])) == ([], "live")


def test_a_blocked_clip_that_somebody_finds_harmless_is_read_by_another_person(store: Store) -> None:
    project_id = add_project(store, **NEVER)
    add_clips(store, project_id, prompts=("a",), takes=1, verdicts=("block",), files=False)
    ada, bob = actor(store, "ada", "reviewer"), actor(store, "bob", "reviewer")
    auditing.draw(store, project_id, ada)
    read(store, ada, project_id, "blocked", decision())
    settled(store, project_id)
    assert waiting(store, project_id) == ["disagreement"]
    assert next_reading(store, ada, project_id, "disagreement") is None
    read(store, bob, project_id, "disagreement", decision())
    settled(store, project_id)
    assert waiting(store, project_id) == []


# Appeals


def appealed(store: Store, ruling: dict[str, Any]) -> tuple[str, str, Actor]:
    """A blocked clip found violating by Ada, contested by Sue, decided by Tom; returns project, clip and Tom."""
    project_id = add_project(store, **NEVER)
    (clip_id,) = add_clips(store, project_id, prompts=("a",), takes=1, verdicts=("block",), files=False)
    ada, sue, tom = actor(store, "ada", "reviewer", "senior"), actor(store, "sue", "senior"), actor(store, "tom", "senior")
    auditing.draw(store, project_id, ada)
    said = decision("violating", "P17")
    read(store, ada, project_id, "blocked", said)
    with pytest.raises(Denied, match="no effect yet"):
        reviewing.appeal(store, sue, project_id, said.id, "why")
    later(store, 16)
    with pytest.raises(Denied, match="your own"):
        reviewing.appeal(store, ada, project_id, said.id, "why")
    reviewing.appeal(store, sue, project_id, said.id, "it does not flash")
    with pytest.raises(Denied, match="already"):
        reviewing.appeal(store, tom, project_id, said.id, "again")
    for neither in (ada, sue):
        assert next_reading(store, neither, project_id, "appeals") is None
    read(store, tom, project_id, "appeals", decision(**ruling))
    settled(store, project_id)
    return project_id, clip_id, tom


def test_an_appeal_is_overturned_by_a_senior_who_is_neither(each_store: Store, tmp_path: Path) -> None:
    project_id, clip_id, tom = appealed(each_store, {"ruling": "overturn"})
    with each_store.reading() as db:
        reviews = reviewing.standing(db, [clip_id])[clip_id]
    assert reviewing.violates(reviews) is False and [each.final for each in reviews] == [False, True]
    auditing.audit_folder(each_store, project_id, tmp_path / "audit")
    final = [each for each in load_audit(tmp_path / "audit").readings if each.final]
    assert [(each.reader, each.said) for each in final] == [(tom.pseudonym, "not_violating")]


def test_an_upheld_appeal_says_what_the_contested_decision_said(store: Store) -> None:
    _, clip_id, _ = appealed(store, {"ruling": "uphold", "said": "cannot_tell"})
    with store.reading() as db:
        last = reviewing.standing(db, [clip_id])[clip_id][-1]
    assert (last.said, last.policies, last.severity, last.final) == ("violating", ["P17"], 3, True)


def test_a_referred_appeal_is_an_escalation_and_decides_nothing(store: Store) -> None:
    project_id, clip_id, _ = appealed(store, {"ruling": "refer", "said": "cannot_tell"})
    assert waiting(store, project_id) == ["escalation"]
    with store.reading() as db:
        assert [each.final for each in reviewing.standing(db, [clip_id])[clip_id]] == [False]


def test_to_overturn_is_to_say_the_opposite(store: Store) -> None:
    with pytest.raises(UserError, match="the opposite"):
        appealed(store, {"ruling": "overturn", "said": "violating", "policies": ["P17"]})


# Child safety


def restricted_by(store: Store, how: Callable[[Store, str, str, Actor], None]) -> tuple[str, str, Actor, Actor]:
    project_id = add_project(store, **NEVER)
    (clip_id,) = add_clips(store, project_id, prompts=("a",), takes=1, files=False)
    reviewer = actor(store, "ada", "reviewer", "senior", "labeler")
    how(store, project_id, clip_id, reviewer)
    return project_id, clip_id, reviewer, actor(store, "kim", "child_safety")


def _flags(store: Store, project_id: str, clip_id: str, who: Actor) -> None:
    with store.writing() as db:
        reviewing.flag(store, db, clip=clip_id, policies=("P05", "P04"), source="a_1", by=who)


def _decides(store: Store, project_id: str, clip_id: str, who: Actor) -> None:
    with store.writing() as db:
        reviewing.add_item(store, db, project_id, clip_id, "review", {"policies": []}, severity=0, by="x")
    said = decision("borderline", "P04")
    read(store, who, project_id, "review", said)
    with pytest.raises(Denied):
        reviewing.undo(store, who, said.id)


def _suspects(store: Store, project_id: str, clip_id: str, who: Actor) -> None:
    with store.writing() as db:
        reviewing.add_item(store, db, project_id, clip_id, "review", {"policies": []}, severity=0, by="x")
    reading_id = next_reading(store, who, project_id, "review")
    assert isinstance(reading_id, str)
    reviewing.reveal_level(store, who, reading_id, "sharp")
    reviewing.suspect(store, who, reading_id)
    with store.reading() as db, pytest.raises(Denied) as told:
        reviewing.may_send(store, db, who, reading_id, "clip.mp4")
    assert told.value.status == 404, "gone for who reported it, too"


def _imports(store: Store, project_id: str, clip_id: str, who: Actor) -> None:
    ruling = {"verdict": "block", "policy": "P04", "score": 0.9, "reasons": [], "filter": "x 1", "threshold": 0.5, "policy_version": "2"}
    with store.writing() as db:
        db.execute(update(clip).where(clip.c.id == clip_id).values(verdict="block", decision={"verdict": "block", "rulings": [ruling]}))
    queue(store, project_id, [clip_id])


@pytest.mark.parametrize("how", [_flags, _decides, _suspects, _imports])
def test_a_suspected_child_safety_clip_exists_at_once_for_its_role_alone(each_store: Store, how: Callable[[Store, str, str, Actor], None]) -> None:
    project_id, clip_id, reviewer, kim = restricted_by(each_store, how)
    assert state(each_store, clip_id) == "restricted"
    with each_store.reading() as db:
        assert reviewing.counts(db, reviewer, project_id) == {} and sum(reviewing.counts(db, kim, project_id).values()) >= 1
        (name, *_) = reviewing.counts(db, kim, project_id)
    for queue_ in reviewing.QUEUES:
        assert next_reading(each_store, reviewer, project_id, queue_) is None
    assert isinstance(next_reading(each_store, kim, project_id, name), str)
    with pytest.raises(UserError, match="no clip"):
        auditing.draw(each_store, project_id, reviewer)


def test_an_open_reading_ends_when_somebody_else_suspects_child_safety(store: Store) -> None:
    project_id = add_project(store, **NEVER)
    (clip_id,) = add_clips(store, project_id, prompts=("a",), takes=1, verdicts=("review",), files=False)
    queue(store, project_id, [clip_id])
    ada = actor(store, "ada", "reviewer")
    reading_id = next_reading(store, ada, project_id, "review")
    assert isinstance(reading_id, str)
    reviewing.reveal_level(store, ada, reading_id, "sharp")
    _flags(store, project_id, clip_id, actor(store, "lab", "labeler"))
    for attempt in (
        lambda: reviewing.reveal_level(store, ada, reading_id, "light"),
        lambda: reviewing.decide(store, ada, reading_id, decision()),
        lambda: reviewing.suspect(store, ada, reading_id),
    ):
        with pytest.raises(Denied) as told:
            attempt()
        assert told.value.status == 404
    assert next_reading(store, ada, project_id, "review") is None, "and does not stand in the way of the next one"


@pytest.mark.parametrize(
    ("said", "policies", "becomes"),
    [
        ("not_violating", (), "live"),
        ("violating", ("P04",), "restricted"),
        ("violating", ("P01",), "withdrawn"),
        ("cannot_tell", (), "restricted"),
        ("borderline", ("P04",), "restricted"),
    ],
)
def test_only_the_child_safety_role_ends_a_restriction(store: Store, said: str, policies: tuple[str, ...], becomes: str) -> None:
    project_id, clip_id, _, kim = restricted_by(store, _flags)
    read(store, kim, project_id, "flagged", decision(said, *policies))
    assert state(store, clip_id) == "restricted", "not before the time to undo is over"
    settled(store, project_id)
    assert state(store, clip_id) == becomes


def test_what_was_said_before_a_restriction_does_not_end_it(store: Store) -> None:
    project_id = add_project(store, **NEVER)
    (clip_id,) = add_clips(store, project_id, prompts=("a",), takes=1, verdicts=("review",), files=False)
    queue(store, project_id, [clip_id])
    read(store, actor(store, "ada", "reviewer"), project_id, "review", decision())
    _flags(store, project_id, clip_id, actor(store, "lab", "labeler"))
    settled(store, project_id)
    assert state(store, clip_id) == "restricted"


# Flags


def test_a_flag_is_an_item_at_once_once_and_not_for_who_raised_it(each_store: Store) -> None:
    project_id = add_project(each_store, **NEVER)
    (clip_id,) = add_clips(each_store, project_id, prompts=("a",), takes=1, files=False)
    lab = actor(each_store, "lab", "labeler", "reviewer")
    with each_store.writing() as db:
        first = reviewing.flag(each_store, db, clip=clip_id, policies=["P05"], source="a_1", by=lab)
        assert reviewing.flag(each_store, db, clip=clip_id, policies=["P05"], source="a_2", by=lab) == first
        with pytest.raises(UserError, match="no policy"):
            reviewing.flag(each_store, db, clip=clip_id, policies=["P99"], source="a_3", by=lab)
        with pytest.raises(UserError, match="at least one"):
            reviewing.flag(each_store, db, clip=clip_id, policies=[], source="a_3", by=lab)
        with pytest.raises(Denied):
            reviewing.flag(each_store, db, clip="c_other", policies=["P05"], source="a_3", by=lab)
    assert waiting(each_store, project_id) == ["flagged"] and state(each_store, clip_id) == "live"
    assert next_reading(each_store, lab, project_id, "flagged") is None
    read(each_store, actor(each_store, "ada", "reviewer"), project_id, "flagged", decision())
    settled(each_store, project_id)
    with each_store.reading() as db:
        assert db.execute(select(item.c.state).where(item.c.queue == "flagged")).scalars().all() == ["closed"]


def test_a_flagged_clip_that_nobody_can_judge_is_kept_from_labelers_until_a_senior_has_said(store: Store) -> None:
    project_id = add_project(store, **NEVER)
    (clip_id,) = add_clips(store, project_id, prompts=("a",), takes=1, files=False)
    lab = actor(store, "lab", "labeler")
    with store.writing() as db:
        reviewing.flag(store, db, clip=clip_id, policies=["P05"], source="a_1", by=lab)
    read(store, actor(store, "ada", "reviewer"), project_id, "flagged", decision("cannot_tell"))
    settled(store, project_id)
    assert (state(store, clip_id), waiting(store, project_id)) == ("withdrawn", ["second"])
    read(store, actor(store, "bob", "reviewer"), project_id, "flagged", decision())
    settled(store, project_id)
    assert (state(store, clip_id), waiting(store, project_id)) == ("withdrawn", ["escalation"])
    read(store, actor(store, "sue", "senior"), project_id, "escalation", decision())
    settled(store, project_id)
    assert (state(store, clip_id), waiting(store, project_id)) == ("live", [])


# What was seen


def test_nothing_but_the_blurred_poster_is_sent_before_its_reveal_is_written_down(each_store: Store) -> None:
    project_id = add_project(each_store)
    queue(each_store, project_id, add_clips(each_store, project_id, verdicts=("review",), files=False))
    ada, eve = actor(each_store, "ada", "reviewer"), actor(each_store, "eve", "reviewer")
    reading_id = next_reading(each_store, ada, project_id, "review")
    assert isinstance(reading_id, str)

    def status(who: Actor, variant: str) -> int:
        with each_store.reading() as db:
            try:
                return len(reviewing.may_send(each_store, db, who, reading_id, variant))
            except Denied as error:
                return error.status

    assert [status(ada, each) for each in ("blur.jpg", "edges.jpg", "light.jpg", "sheet.jpg", "clip.mp4", "facts.json", "../app.sqlite3")] == [64, 403, 403, 403, 403, 404, 404]
    assert status(eve, "blur.jpg") == 404
    for _ in range(2):
        reviewing.reveal_level(each_store, ada, reading_id, "edges")
    assert [status(ada, each) for each in ("edges.jpg", "light.jpg", "clip.mp4")] == [64, 403, 403]
    with each_store.reading() as db:
        assert len(db.execute(select(reveal)).all()) == 1
    assert kinds(each_store).count("revealed") == 1
    with pytest.raises(Denied):
        reviewing.reveal_level(each_store, eve, reading_id, "sharp")
    later(each_store, 20 * 60 + 1)
    assert status(ada, "blur.jpg") == 409, "a lease that ran out shows nothing"


def test_a_draft_renews_the_lease_and_its_text_lies_where_it_can_be_deleted(each_store: Store) -> None:
    project_id = add_project(each_store)
    queue(each_store, project_id, add_clips(each_store, project_id, verdicts=("review",), files=False))
    ada = actor(each_store, "ada", "reviewer")
    reading_id = next_reading(each_store, ada, project_id, "review")
    assert isinstance(reading_id, str)
    later(each_store, 15 * 60)
    for text in ("halfway", "halfway there"):
        reviewing.save_draft(each_store, ada, reading_id, Draft(said="violating", policies=("P05",), rationale=text))
    later(each_store, 15 * 60)
    assert next_reading(each_store, ada, project_id, "errors") == reading_id
    with each_store.reading() as db:
        assert "halfway" not in json.dumps(db.execute(select(reading.c.draft)).scalar())
        assert reviewing.draft_of(db, reviewing.own_reading(db, ada, reading_id)).rationale == "halfway there"
    reviewing.skip(each_store, ada, reading_id)
    with each_store.reading() as db:
        assert reviewing.text_of(db, reviewing._draft_id(reading_id)) is None
    assert next_reading(each_store, ada, project_id, "review") != reading_id, "what was given back does not come again"


# Exposure

HOUR = 60 * MINUTE
NINE = 20_000 * exposure.DAY + 9 * HOUR


@pytest.mark.parametrize(
    ("looks", "now", "until"),
    [
        ([], 0, None),
        ([(0, 21, 4)], 21, 31),
        ([(0, 21, 2)], 21, None),
        ([(0, 8, 3), (9, 22, 4)], 22, 32),
        ([(0, 8, 3), (19, 32, 4)], 32, None),  # eleven minutes off between them
        ([(0, 21, 4)], 32, None),  # the break is over
        ([(0, 15, 4), (30, 45, 4), (60, 75, 4), (90, 106, 4)], 120, 15 * 60),  # an hour of it today
        ([(-12 * 60, -11 * 60, 4)], 0, None),  # yesterday
    ],
)
def test_breaks_are_due_after_so_many_minutes_of_severe_clips(looks: list[tuple[int, int, int]], now: int, until: int | None) -> None:
    found = [Look(NINE + start * MINUTE, NINE + end * MINUTE, severity) for start, end, severity in looks]
    rest = rest_of(found, NINE + now * MINUTE, Reviewing())
    assert (rest.until - NINE) // MINUTE == until if rest and until is not None else (rest is None) == (until is None)


def test_time_with_severe_clips_counts_from_the_reveal_to_the_decision_and_ends_in_a_break(each_store: Store) -> None:
    project_id = add_project(each_store, reviewing={"break_after_minutes": 3, "second_share": 0.0})
    clips = add_clips(each_store, project_id, prompts=("a",), takes=4, verdicts=("review",), files=False)
    each_store.now = lambda: NINE
    ada = actor(each_store, "ada", "reviewer")
    with each_store.writing() as db:
        for each, severity in zip(clips, (3, 0, 0, 3), strict=True):
            reviewing.add_item(each_store, db, project_id, each, "review", {"policies": []}, severity=severity, by="x", place=float(clips.index(each)))
    for policies, minutes_ in ((("P05",), 2), (("P05",), 1.5), ((), 5)):
        reading_id = next_reading(each_store, ada, project_id, "review")
        if isinstance(reading_id, Rest):
            break
        reviewing.reveal_level(each_store, ada, reading_id, "light")
        later(each_store, 60 * minutes_)
        reviewing.decide(each_store, ada, reading_id, decision("violating" if policies else "not_violating", *policies))
    assert isinstance(reading_id, Rest), "the second one turned out to be severe"
    with each_store.reading() as db:
        assert minutes(exposure.looks_of(db, ada.person_id, NINE, each_store.now())) == 3.5
    later(each_store, 10 * 60)
    assert isinstance(next_reading(each_store, ada, project_id, "review"), str)


def test_leads_see_a_weeks_minutes_of_their_project_and_nothing_of_restricted_clips(each_store: Store) -> None:
    store = each_store
    store.now = lambda: NINE
    project_id, other = add_project(store, **NEVER), add_project(store, "other", **NEVER)
    ada, bob = actor(store, "ada", "reviewer", "child_safety"), actor(store, "bob", "reviewer")
    for place in (project_id, other):
        clips = add_clips(store, place, prompts=("a",), takes=4, verdicts=("review",), files=False)
        with store.writing() as db:
            for each, severity in zip(clips, (3, 0, 4, 4), strict=True):
                reviewing.add_item(store, db, place, each, "review", {"policies": []}, severity=severity, by="x", place=float(clips.index(each)))
    for who, place, said, minutes_ in (
        (ada, project_id, decision(), 2),
        (bob, other, decision(), 3),
        (bob, project_id, decision(), 4),
        (ada, project_id, decision("violating", "P04"), 5),
    ):
        reading_id = next_reading(store, who, place, "review")
        assert isinstance(reading_id, str)
        reviewing.reveal_level(store, who, reading_id, "light")
        later(store, 60 * minutes_)
        reviewing.decide(store, who, reading_id, said)
    with store.reading() as db:
        assert exposure.week_of(db, project_id, store.now()) == {ada.person_id: 2.0, bob.person_id: 0.0}
        assert exposure.week_of(db, other, store.now()) == {bob.person_id: 3.0}
        assert exposure.week_of(db, None, store.now()) == {ada.person_id: 2.0, bob.person_id: 3.0}
        assert minutes(exposure.looks_of(db, ada.person_id, NINE, store.now())) == 7, "one's own are all of them"
    add_member(store, "lea", "lead", project_id=other)
    assert Client(store, "lea").get(f"/api/projects/{other}/lead/people").json()["exposure"] == [{"pseudonym": bob.pseudonym, "minutes": 3.0}]
    later(store, 8 * 24 * 3_600)
    with store.reading() as db:
        assert exposure.week_of(db, None, store.now()) == {}


# Audits


def audited(store: Store, passed: int = 60, blocked: int = 20, **plan: int) -> tuple[str, list[str]]:
    project_id = add_project(store, reviewing={"second_share": 0.0, "blocked_audit": 10, "passed_audit": 30, **plan})
    clips = add_clips(store, project_id, prompts=("a",), takes=passed, files=False)
    clips += add_clips(store, project_id, prompts=("b",), takes=blocked, verdicts=("block",), files=False)
    return project_id, clips


def test_a_wave_has_the_probabilities_of_the_audit_and_the_database_keeps_them(each_store: Store, tmp_path: Path) -> None:
    project_id, _ = audited(each_store)
    lead = actor(each_store, "lead", "lead")
    assert auditing.draw(each_store, project_id, lead) == {"blocked_pool": 20, "passed_pool": 60, "blocked": 10, "random": 4, "stratified": 26}
    with pytest.raises(UserError, match="no clip"):
        auditing.draw(each_store, project_id, lead)
    with pytest.raises(DBAPIError, match="keeps what it was made with"), each_store.writing() as db:
        db.execute(update(item).values(probability=1.0))
    assert auditing.audit_folder(each_store, project_id, tmp_path / "a") == {"clips": 80, "readings": 0, "gold": 0}
    entries = load_audit(tmp_path / "a").entries
    assert {(entry.pool, entry.probability) for entry in entries} == {("blocked", 0.5), ("passed", 0.5)}
    more = add_clips(each_store, project_id, prompts=("c",), takes=5, files=False)
    auditing.draw(each_store, project_id, lead)
    auditing.audit_folder(each_store, project_id, tmp_path / "a")
    assert set(entries) < set(load_audit(tmp_path / "a").entries) and len(more) == 5


def test_too_small_a_budget_is_refused_before_anything_is_written(store: Store) -> None:
    project_id, _ = audited(store, passed_audit=0)
    with pytest.raises(UserError, match="no budget"):
        auditing.draw(store, project_id, actor(store, "lead", "lead"))
    assert waiting(store, project_id) == []


def test_what_reviewers_said_is_what_an_audit_by_hand_would_hold(each_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Truth: of the blocked every third is harmless, of the passed every tenth violates. Readers differ on some; seniors settle those."""
    project_id, clips = audited(each_store, passed=60, blocked=20, blocked_audit=20, passed_audit=60)
    with each_store.writing() as db:
        db.execute(insert(prompt), {"project_id": project_id, "prompt_id": "extra", "text": "x", "lang": "en", "kind": ""})
    lead = actor(each_store, "lead", "lead")
    ada, bob, sue = actor(each_store, "ada", "reviewer"), actor(each_store, "bob", "reviewer"), actor(each_store, "sue", "senior")
    auditing.draw(each_store, project_id, lead)
    with each_store.reading() as db:
        digests = {row.id: row.clip_id for row in db.execute(select(clip.c.id, clip.c.clip_id))}
    truth = {clip_id: (place % 10 == 0 if place < 60 else place % 3 != 0) for place, clip_id in enumerate(clips)}
    said: list[Reading] = []

    def work(who: Actor, queue_: str, wrong: Callable[[str], bool]) -> None:
        while isinstance(reading_id := next_reading(each_store, who, project_id, queue_), str):
            with each_store.reading() as db:
                clip_id = db.execute(select(reading.c.clip).where(reading.c.id == reading_id)).scalar_one()
            bad = truth[clip_id] != wrong(clip_id)
            reviewing.decide(each_store, who, reading_id, decision("violating", "P17") if bad else decision())
            codes = ("P17",) if bad else ()
            final = queue_ == "escalation"
            said.append(
                Reading(clip_id=digests[clip_id], reader=who.pseudonym, said="violating" if bad else "not_violating", policies=codes, final=final, policy_version=policy_version())
            )
        settled(each_store, project_id)

    for queue_ in reviewing.AUDITS:
        work(ada, queue_, lambda clip_id: clips.index(clip_id) in (0, 13, 67))
    for queue_ in (*reviewing.AUDITS, "disagreement"):
        work(bob, queue_, lambda clip_id: False)
    work(sue, "escalation", lambda clip_id: False)
    assert waiting(each_store, project_id) == []
    auditing.audit_folder(each_store, project_id, tmp_path / "audit")
    found = load_audit(tmp_path / "audit")
    assert sorted(found.readings, key=str) == sorted(said, key=str)
    by_hand = Audit(found.entries, tuple(said), ())
    review_ = latest_review(found, "flash 3", "P17")
    assert review_ is not None and review_ == latest_review(by_hand, "flash 3", "P17") == review_of(found, "flash 3", "P17")
    for clip_id, digest in digests.items():
        readings = [each for each in found.readings if each.clip_id == digest]
        assert violates(readings) is (truth[clip_id] if clips.index(clip_id) != 0 else False), "but for the one miss that nobody looked at twice"
    assert cli.main(["safety-report", str(tmp_path / "audit"), "--draws", "200", "--json"]) == 0
    assert "precision" in capsys.readouterr().out


def test_a_folder_of_another_audit_is_not_written_over(store: Store, tmp_path: Path) -> None:
    project_id, _ = audited(store)
    with pytest.raises(UserError, match="no audit was drawn"):
        auditing.audit_folder(store, project_id, tmp_path / "a")
    auditing.draw(store, project_id, actor(store, "lead", "lead"))
    entry = Entry(clip_id="x", pool="passed", score=0.1, filter_version="flash 3", wave=0, band=0, probability=1.0, why="random")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "audit-00000.jsonl").write_text(entry.model_dump_json() + "\n")
    with pytest.raises(UserError, match="another audit"):
        auditing.audit_folder(store, project_id, tmp_path / "a")


def test_gold_looks_like_a_random_audit_and_counts_as_gold(each_store: Store, tmp_path: Path) -> None:
    project_id, clips = audited(each_store)
    lead, ada = actor(each_store, "lead", "lead"), actor(each_store, "ada", "reviewer")
    auditing.plant(each_store, project_id, clips[0], ["P05"], lead)
    auditing.draw(each_store, project_id, lead)
    with pytest.raises(UserError, match="planted"):
        auditing.plant(each_store, project_id, clips[0], [], lead)
    while isinstance(reading_id := next_reading(each_store, ada, project_id, "random"), str):
        reviewing.decide(each_store, ada, reading_id, decision())
    settled(each_store, project_id)
    auditing.audit_folder(each_store, project_id, tmp_path / "a")
    audit = load_audit(tmp_path / "a")
    assert [each.policies for each in audit.gold] == [("P05",)] and len(audit.entries) == 79
    assert sum(each.clip_id == audit.gold[0].clip_id for each in audit.readings) == 1
    assert "second" not in waiting(each_store, project_id) and "disagreement" not in waiting(each_store, project_id)


def test_a_lead_or_a_senior_plants_gold_and_is_not_the_one_who_reads_it(each_store: Store) -> None:
    project_id, clips = audited(each_store, passed=2, blocked=2)
    for role in ("lead", "senior", "reviewer"):
        add_member(each_store, role, role, project_id=project_id)
    lead, sen, rae = (Client(each_store, role) for role in ("lead", "senior", "reviewer"))
    with each_store.reading() as db:
        digest = db.execute(select(clip.c.clip_id).where(clip.c.id == clips[0])).scalar_one()
    path = f"/api/review/{project_id}/gold"
    assert rae.post(path, json={"clip": digest}).status_code == 404
    for body, message in (
        ({"clip": "nothing"}, "no such clip"),
        ({"clip": digest, "policies": "P04"}, "child-safety role alone"),
        ({"clip": digest, "policies": ["P99"]}, "no policy"),
        ({"clip": ""}, "clip"),
    ):
        answer = sen.post(path, json=body)
        assert answer.status_code == 422 and message in answer.json()["detail"], body
    assert sen.post(path, json={"clip": digest, "policies": "P05"}).json()["done"] == "the clip is planted"
    assert "planted" in sen.post(path, json={"clip": clips[0]}).json()["detail"], "a double click plants it once"
    assert lead.post(path, json={"clip": f" {clips[1]} ", "policies": []}).status_code == 200
    with each_store.reading() as db:
        assert [row.why["gold"] for row in db.execute(select(item).order_by(item.c.created_at, item.c.id)) if row.clip == clips[0]] == [["P05"]]
        assert sorted(db.execute(select(item.c.queue)).scalars()) == ["random", "random"]
    taken = sen.post(f"/api/review/{project_id}/next", json={"queue": "random"}).json()["done"]
    with each_store.reading() as db:
        assert db.execute(select(reading.c.clip).where(reading.c.id == taken)).scalar_one() == clips[1], "another's gold, never one's own"
    page = lead.get(f"/review/{project_id}/decisions", headers={"accept": "text/html"}).text
    assert "Plant a clip" in page and 'value="P05"' in page and 'value="P04"' not in page


def test_the_command_writes_the_audit_and_what_was_overturned_beside_it(store: Store, tmp_path: Path) -> None:
    project_id, clips = audited(store)
    lab, ada, bob = actor(store, "lab", "labeler"), actor(store, "ada", "reviewer"), actor(store, "bob", "reviewer")
    auditing.draw(store, project_id, lab)
    with store.reading() as db:
        drawn = set(db.execute(select(item.c.clip).where(item.c.queue.in_(reviewing.AUDITS))).scalars())
    told = app.main(app.Config(action="audit", out=store.folder, project="horses", folder=tmp_path / "a"))
    assert told["audit"]["clips"] == 80 and told["corrections"] is None and not (tmp_path / "a-corrections").exists()
    flagged = next(each for each in clips[:60] if each not in drawn)
    with store.writing() as db:
        reviewing.flag(store, db, clip=flagged, policies=["P05"], source="a", by=lab)
    for who in (ada, bob):
        reading_id = next_reading(store, who, project_id, "flagged")
        assert isinstance(reading_id, str)
        reviewing.decide(store, who, reading_id, decision("violating", "P05"))
        settled(store, project_id)
    told = app.main(app.Config(action="audit", out=store.folder, project=project_id, folder=tmp_path / "a", training=True))
    assert told["corrections"] == {"clips": 1, "readings": 2, "gold": 0}
    with store.reading() as db:
        digest = db.execute(select(clip.c.clip_id).where(clip.c.id == flagged)).scalar_one()
    assert [each.clip_id for each in load_audit(tmp_path / "a-corrections").entries] == [digest]
    assert cli.main(["safety-report", str(tmp_path / "a"), "--out", str(tmp_path / "report")]) == 0
    with store.writing() as db:
        db.execute(update(clip).where(clip.c.id == flagged).values(state="deleted"))
    assert app.main(app.Config(action="audit", out=store.folder, project=project_id, folder=tmp_path / "a"))["corrections"] is None
    assert not list((tmp_path / "a-corrections").glob("audit-*")), "nobody trains on what does not stand any more"
    with pytest.raises(UserError, match="no project 'cats'"):
        app.main(app.Config(action="audit", out=store.folder, project="cats", folder=tmp_path / "a"))


def test_nothing_is_learned_from_a_restricted_clip_and_its_place_in_the_audit_stays(store: Store, tmp_path: Path) -> None:
    project_id, _ = audited(store)
    ada = actor(store, "ada", "reviewer")
    auditing.draw(store, project_id, ada)
    clip_id = read(store, ada, project_id, "random", decision("violating", "P04"))
    with store.reading() as db:
        digest = db.execute(select(clip.c.clip_id).where(clip.c.id == clip_id)).scalar_one()
    auditing.audit_folder(store, project_id, tmp_path / "rates")
    auditing.audit_folder(store, project_id, tmp_path / "training", training=True)
    assert [each.clip_id for each in load_audit(tmp_path / "rates").readings] == [digest]
    assert load_audit(tmp_path / "training").readings == ()
    with pytest.raises(UserError, match="overturned no ruling"):
        auditing.corrections_folder(store, project_id, tmp_path / "corrections")


def test_overturned_rulings_outside_of_audits_are_rows_to_train_on(store: Store, tmp_path: Path) -> None:
    project_id, clips = audited(store, passed=3, blocked=1)
    lab, ada, bob = actor(store, "lab", "labeler"), actor(store, "ada", "reviewer"), actor(store, "bob", "reviewer")
    with store.writing() as db:
        for each in clips[:2]:
            reviewing.flag(store, db, clip=each, policies=["P05"], source="a", by=lab)
    found = read(store, ada, project_id, "flagged", decision("violating", "P05"))
    read(store, ada, project_id, "flagged", decision())
    settled(store, project_id)
    read(store, bob, project_id, "flagged", decision("violating", "P05"))
    settled(store, project_id)
    assert auditing.corrections_folder(store, project_id, tmp_path / "c") == {"clips": 1, "readings": 2, "gold": 0}
    from recipes.safety_train import audited as learned
    from reward.safety.policy import load_policy

    with store.reading() as db:
        digest = db.execute(select(clip.c.clip_id).where(clip.c.id == found)).scalar_one()

    class Row:
        prompt_id, licence = "a", ""

    (row,) = learned(tmp_path / "c", load_policy(), {digest: Row()}, 20.0).values()
    assert (row.clip_id, row.labels["P05"], row.unsafe, row.weight) == (digest, 1.0, 1.0, 1.0)

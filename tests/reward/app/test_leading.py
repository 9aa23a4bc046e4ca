"""Projects, roles, pauses, progress, reports beside requests, and plots."""

from __future__ import annotations

import threading
import time
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import insert, select, update

from base_model.errors import UserError
from reward.app import auditing, labeling, leading, people, plots, quality, reports, signing_off
from reward.app.access import CHILD_SAFETY, LEAD
from reward.app.leading import HOUR, nested, progress_of
from reward.app.schema import clip, event, item, person, withdrawal
from reward.app.security import Actor, Denied, actor_of_session
from reward.app.settings import ProjectSettings
from reward.app.store import Store, new_id
from tests.reward.app.conftest import Client, add_clips, add_member, add_project
from tests.reward.app.seeding import seed_store

SVG = "{http://www.w3.org/2000/svg}"


def logged_in(store: Store, login: str) -> Actor:
    return Client(store, login).me


# Settings


def test_the_form_of_settings_gives_back_the_settings_it_was_made_of() -> None:
    held = ProjectSettings.model_validate({"retention_days": 30, "labeling": {"likert": True, "dimensions": [{"name": "motion", "question": "Smooth?", "sees_prompt": False}]}})
    for each in (held, ProjectSettings()):
        assert ProjectSettings.model_validate(nested({field.name: field.value for field in leading.form_of(each)})) == each


def test_every_setting_is_on_the_form_and_says_what_it_means() -> None:
    fields = {field.name: field for field in leading.form_of(ProjectSettings())}

    def names(model: object, above: str = "") -> set[str]:
        return {each for name, value in vars(model).items() for each in (names(value, f"{above}{name}.") if hasattr(value, "model_dump") else {above + name})}

    assert {name for name in names(ProjectSettings()) if name != "labeling.dimensions"} <= fields.keys()
    assert fields["labeling.takes"].least == 2 and fields["labeling.takes"].most == 6 and "asked" in fields["reviewing.second_share"].help


ANYTHING = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner))


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(max_size=30) | st.sampled_from(("labeling", "labeling.dimensions", "labeling.dimensions.0", "labeling.dimensions.x.name")), ANYTHING, max_size=4))
def test_whatever_is_sent_as_settings_is_taken_or_refused_in_words(given_: dict[str, object]) -> None:
    try:
        ProjectSettings.model_validate(nested(given_))
    except (UserError, ValueError) as error:
        assert str(error)


# People


def test_roles_are_given_and_taken_and_sessions_end_with_them(each_store: Store) -> None:
    project_id = add_project(each_store)
    add_member(each_store, "ada", "lead", project_id=project_id)
    bob = add_member(each_store, "bob", "labeler", project_id=project_id)
    me, other = logged_in(each_store, "ada"), Client(each_store, "bob")
    leading.give_roles(each_store, project_id, bob, ["labeler"], me)
    assert other.get("/api/account").status_code == 200
    leading.give_roles(each_store, project_id, bob, ["reviewer"], me)
    assert other.get("/api/account").status_code == 401
    assert logged_in(each_store, "bob").roles == {project_id: frozenset({"reviewer"})}
    leading.give_roles(each_store, project_id, bob, [], me)
    with pytest.raises(Denied):
        leading.give_roles(each_store, project_id, bob, ["reviewer"], me)


def test_a_lead_neither_stops_leading_nor_takes_the_child_safety_role_alone(store: Store) -> None:
    project_id = add_project(store)
    ada = add_member(store, "ada", "lead", project_id=project_id)
    me = logged_in(store, "ada")
    for roles in (["labeler"], [], [LEAD, CHILD_SAFETY]):
        with pytest.raises(UserError):
            leading.give_roles(store, project_id, ada, roles, me)
    with pytest.raises(UserError, match="no role"):
        leading.give_roles(store, project_id, ada, ["king"], me)
    with pytest.raises(UserError):
        leading.set_paused(store, project_id, ada, True, me)


def test_who_works_elsewhere_too_is_paused_only_by_who_leads_there(each_store: Store) -> None:
    mine, other = add_project(each_store, "mine"), add_project(each_store, "other")
    add_member(each_store, "ada", "lead", project_id=mine)
    add_member(each_store, "top", "lead")
    bob = add_member(each_store, "bob", "labeler", project_id=mine)
    with each_store.writing() as db:
        people.grant(each_store, db, bob, other, ["labeler"], by="system")
    ada, top, session = logged_in(each_store, "ada"), logged_in(each_store, "top"), Client(each_store, "bob")
    for act in (lambda me: leading.set_paused(each_store, mine, bob, True, me), lambda me: leading.end_sessions(each_store, mine, bob, me)):
        with pytest.raises(Denied) as denied:
            act(ada)
        assert denied.value.status == 403
    leading.set_paused(each_store, mine, bob, True, top)
    with each_store.reading() as db:
        assert db.execute(select(person.c.state).where(person.c.id == bob)).scalar() == "paused"
        assert [each.mine for each in leading.members(each_store, db, mine, ada) if each.person_id == bob] == [False]
    assert session.get("/api/account").status_code == 200
    leading.set_paused(each_store, mine, bob, False, top)
    leading.end_sessions(each_store, mine, bob, top)
    assert actor_of_session(each_store, session.cookies["rushes"]) is None


def test_nobody_is_paused_who_was_deleted_or_disabled(store: Store) -> None:
    project_id = add_project(store)
    add_member(store, "ada", "lead", project_id=project_id)
    bob = add_member(store, "bob", "labeler", project_id=project_id)
    me = logged_in(store, "ada")
    with store.writing() as db:
        db.execute(update(person).where(person.c.id == bob).values(state="disabled"))
    leading.set_paused(store, project_id, bob, True, me)
    leading.set_paused(store, project_id, bob, False, me)
    with store.reading() as db:
        assert db.execute(select(person.c.state).where(person.c.id == bob)).scalar() == "disabled"
        assert db.execute(select(event.c.seq).where(event.c.kind.in_(("paused", "unpaused")))).first() is None


# Progress


def test_progress_counts_what_is_there_and_nothing_that_was_taken_back(each_store: Store) -> None:
    seeded = seed_store(each_store, clips=120, answers=60, reviews=20, events=0, people=4, overlap=3, drawn=60)
    told = progress_of(each_store, seeded.project_id)
    (rank,) = told.tasks
    assert sum(told.clips.values()) == 120 and rank.answered == 60 == seeded.answers and sum(told.reviews) == seeded.reviews == 20
    assert rank.an_hour is not None and rank.hours_left == pytest.approx((rank.wanted - 60) / rank.an_hour)
    assert {each.queue for each in told.queues} <= {"blocked", "random"} and sum(each.done for each in told.queues) == 20
    one = sum(told.answers)
    with each_store.writing() as db:
        newest = db.exec_driver_sql("SELECT id, person_id FROM answer ORDER BY at DESC LIMIT 1").one()
        db.execute(insert(withdrawal), {"ref": newest[0], "kind": "answer", "person_id": newest[1], "at": each_store.now()})
    assert sum(progress_of(each_store, seeded.project_id).answers) == one - 1


def test_what_is_restricted_to_child_safety_is_not_even_a_number(each_store: Store) -> None:
    project_id = add_project(each_store)
    hidden, *others = add_clips(each_store, project_id, files=False)
    row = {"project_id": project_id, "queue": "flagged", "why": {}, "severity": 4, "place": 0.0, "wanted": 1, "taken": 0, "state": "open", "created_at": 0}
    with each_store.writing() as db:
        db.execute(update(clip).where(clip.c.id == hidden).values(state="restricted"))
        db.execute(insert(item), [{**row, "id": new_id("q"), "clip": each} for each in (hidden, others[0])])
    told = progress_of(each_store, project_id)
    assert sum(told.clips.values()) == 11 and [(each.queue, each.waiting) for each in told.queues] == [("flagged", 1)]


def test_copies_that_were_made_worse_on_purpose_are_no_clips_of_the_generator(each_store: Store) -> None:
    """They are in no audit of the filters, no run to sign off, no score and no count."""
    project_id = add_project(each_store)
    made = add_clips(each_store, project_id, files=False, verdicts=("allow", "block"))
    add_member(each_store, "ada", "lead", project_id=project_id)
    with each_store.writing() as db:
        db.execute(update(clip).where(clip.c.id.in_(made[:3])).values(run=labeling.PLANTED, made_of=made[3]))
    drawn = auditing.draw(each_store, project_id, Client(each_store, "ada").me)
    scored = {digest for scores in quality.scores_of(each_store, project_id).values() for digest in scores.by_clip}
    with each_store.reading() as db:
        audited = set(db.execute(select(item.c.clip)).scalars())
        runs = signing_off.runs_of(db, project_id)
        digests = set(db.execute(select(clip.c.clip_id).where(clip.c.id.in_(made[3:]))).scalars())
    assert drawn["blocked_pool"] + drawn["passed_pool"] == len(made) - 3 and audited == set(made[3:])
    assert scored == digests and runs == [("test", len(made) - 3)] and sum(progress_of(each_store, project_id).clips.values()) == len(made) - 3


def test_an_empty_project_has_no_pace_and_needs_no_time(store: Store) -> None:
    told = progress_of(store, add_project(store))
    assert told.tasks == [] and told.queues == [] and sum(told.answers) == 0 and len(told.hours) == 48 and told.hours[1] - told.hours[0] == HOUR


# Reports


@pytest.mark.timed
def test_a_report_is_made_once_for_what_happened_and_an_old_one_is_shown_meanwhile(store: Store) -> None:
    made, go = [], threading.Event()

    def slow() -> int:
        go.wait(10)
        made.append(1)
        return len(made)

    first = reports.report(store, "x", slow, patience=0.01)
    assert (first.state, first.value) == ("computing", None)
    go.set()
    assert [reports.report(store, "x", slow, patience=5).value for _ in range(3)] == [1, 1, 1]
    with store.writing() as db:
        store.log(db, "system", "test", "x")
    go.clear()
    deadline = time.monotonic() + 20
    while (told := reports.report(store, "x", slow, patience=0)).state != "old":
        assert time.monotonic() < deadline
    assert told.value == 1
    go.set()
    while (told := reports.report(store, "x", slow, patience=0.1)).state != "fresh":
        assert time.monotonic() < deadline
    assert (told.value, len(made)) == (2, 2)


def test_a_report_that_fails_says_so_and_keeps_the_last_one(store: Store) -> None:
    def wrong() -> int:
        raise UserError("the disk is full")

    assert reports.report(store, "x", lambda: 7, patience=5).value == 7
    with store.writing() as db:
        store.log(db, "system", "test", "x")
    told = reports.report(store, "x", wrong, patience=5)
    while told.state == "old":
        told = reports.report(store, "x", wrong, patience=5)
    assert (told.state, told.value, told.problem) == ("failed", 7, "the disk is full")


# Plots


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=40), st.none() | st.tuples(st.floats(-1, 1), st.floats(0, 1), st.floats(0, 1))), max_size=8))
def test_plots_are_whole_svg_with_title_and_description_whatever_the_labels(rows: list[tuple[str, tuple[float, float, float] | None]]) -> None:
    printable = [("".join(c for c in label if c.isprintable()), value) for label, value in rows]
    whiskers = [plots.Whisker(label, *((value[0], value[0] - value[1], value[0] + value[2]) if value else (None, None, None)), note="<few>") for label, value in printable]
    for drawn in (
        plots.intervals(whiskers, name="a <b>"),
        plots.histogram([0, 3, 10_000], 0.5, name="a & b", other=0.2),
        plots.columns([plots.Line("x", "first", [0, 2.5])], ["<1>", "2"], name="n"),
    ):
        root = ET.fromstring(str(drawn).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))
        assert root.find(f"{SVG}title") is not None and root.find(f"{SVG}desc") is not None and "style=" not in drawn
        for each in root.iter():
            assert all(-2_000 < float(each.get(name, 0)) < 2_000 for name in ("x", "y", "x1", "x2", "y1", "y2", "width", "height"))


def test_a_plot_says_not_measurable_yet_and_draws_no_dot() -> None:
    drawn = plots.intervals([plots.Whisker("recall", None, None, None, "3 reviewed, 30 are needed")], name="Rates")
    assert "not measurable yet" in drawn and "circle" not in drawn and "3 reviewed, 30 are needed" in drawn


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0), (-0.3, 1), (0, 1e6), (0, 0.013), (-1, -1)])
def test_ticks_cover_the_range_with_few_round_numbers(low: float, high: float) -> None:
    found = plots.ticks(low, high)
    assert found[0] <= low and found[-1] >= high - 1e-9 and 2 <= len(found) <= 8

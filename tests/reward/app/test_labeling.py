"""Tasks, leases, answers and checks of labelers, as functions over both stores."""

from __future__ import annotations

import itertools
import random
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, insert, select, update
from sqlalchemy.exc import IntegrityError

from reward.app import answering, attention, choosing, labeling, leading, planting, quality
from reward.app.answering import Answer, Demonstration, Skip, Unsafe
from reward.app.deleting import delete_clip
from reward.app.exporting import export
from reward.app.schema import answer, assignment, clip, event, item, person, private_text, project, task
from reward.app.security import Actor, Denied
from reward.app.store import Store, new_id
from reward.app.upkeep import come_up_to_date
from tests.reward.app.conftest import add_clips, add_member, add_project

NO_CHECKS = {"mixture": {"active": 1, "random": 0, "gold": 0, "repeat": 0, "mirrored": 0}, "practice": 0}
_ids = (f"answer-number-{n:08d}" for n in itertools.count())


def as_labeler(store: Store, login: str, *projects: str) -> Actor:
    """Somebody who may label in every project and agreed to take part."""
    person_id = add_member(store, login, "labeler", "lead")
    with store.reading() as db:
        pseudonym = db.execute(select(person.c.pseudonym).where(person.c.id == person_id)).scalar_one()
    actor = Actor(person_id, pseudonym, login, {"*": frozenset({"labeler", "lead"})}, {}, "", "")
    for project_id in projects:
        attention.consent(store, actor, project_id)
    return actor


def with_tasks(store: Store, *, prompts: int = 3, takes: int = 4, **settings: Any) -> str:
    project_id = add_project(store, labeling={**NO_CHECKS, "takes": takes, **settings})
    add_clips(store, project_id, [f"prompt {n}" for n in range(prompts)], takes=takes, files=False)
    lead = as_labeler(store, "lead")
    with store.writing() as db:
        assert labeling.make_tasks(store, db, project_id, lead) == prompts
    return project_id


def taken(store: Store, actor: Actor, project_id: str, **options: Any) -> str:
    offer = choosing.next_assignment(store, actor, project_id, **options)
    assert offer.assignment_id is not None, offer.reason
    return offer.assignment_id


def row_of(store: Store, assignment_id: str) -> Any:
    with store.reading() as db:
        return db.execute(select(assignment, task.c.kind, task.c.clips, task.c.truth).join(task).where(assignment.c.id == assignment_id)).one()


def an_answer(k: int = 4, *, ranks: tuple[int | None, ...] | dict[str, Any] | None = None, **more: Any) -> Answer:
    given = {
        "ranks": ranks if isinstance(ranks, dict) else {"overall": ranks or tuple(range(1, k + 1))},
        "watched": (1.0,) * k,
        "watch_ms": tuple(1000 + n for n in range(k)),
        "lead_time_ms": 9000,
    }
    return Answer(**{"id": next(_ids), **given, **more})


def answer_all(store: Store, actor: Actor, project_id: str, ranks: Callable[[Any], tuple[int, ...]], most: int = 1000) -> list[Any]:
    """Answers until nothing is left; returns the assignments in order."""
    rows: list[Any] = []
    while len(rows) < most and (offer := choosing.next_assignment(store, actor, project_id)).assignment_id:
        row = row_of(store, offer.assignment_id)
        answering.submit(store, actor, row.id, an_answer(len(row.clips), ranks=ranks(row)))
        rows.append(row)
    return rows


def by_clip(values: dict[str, int]) -> Callable[[Any], tuple[int, ...]]:
    """Ranks by a fixed worth of every clip: a person who is always of one mind."""

    def ranks(row: Any) -> tuple[int, ...]:
        shown = sorted(row.clips, key=lambda each: row.shown_order[row.clips.index(each)])
        order = sorted(shown, key=lambda each: (values.get(each, 99), each))
        return tuple(order.index(each) + 1 for each in shown)

    return ranks


# Tasks


def test_every_servable_clip_comes_into_one_task_of_its_prompt_and_no_other_clip(each_store: Store) -> None:
    project_id = add_project(each_store, labeling={"takes": 3})
    made = add_clips(each_store, project_id, takes=8, verdicts=("allow", "allow", "block", "allow", "review", "error", "allow", "allow"), files=False)
    with each_store.writing() as db:
        db.execute(update(clip).where(clip.c.id == made[0]).values(state="withdrawn"))
        labeling.make_tasks(each_store, db, project_id, lead := as_labeler_inside())
        rows = db.execute(select(task.c.clips, task.c.prompt_id).where(task.c.kind == "rank")).all()
        assert labeling.make_tasks(each_store, db, project_id, lead) == 0
        home = dict(db.execute(select(clip.c.id, clip.c.prompt_id).where(clip.c.verdict == "allow", clip.c.state == "live")).all())
    dealt = [each for row in rows for each in row.clips]
    assert len(dealt) == len(set(dealt)) and set(dealt) <= set(home)
    assert all(home[each] == row.prompt_id for row in rows for each in row.clips)
    assert len(dealt) == len(home) and all(2 <= len(row.clips) <= 3 for row in rows)


def as_labeler_inside() -> Actor:
    return Actor("nobody", "person-x", "x", {}, {}, "", "")


@pytest.mark.parametrize(
    ("n", "size", "least", "sizes"), [(0, 4, 2, []), (1, 4, 2, []), (3, 2, 2, [2]), (5, 4, 2, [3, 2]), (9, 4, 2, [3, 3, 3]), (5, 2, 2, [2, 2]), (1, 4, 1, [1])]
)
def test_groups_are_as_equal_as_they_go(n: int, size: int, least: int, sizes: list[int]) -> None:
    groups = labeling.grouped([str(i) for i in range(n)], size, least)
    assert sorted(map(len, groups), reverse=True) == sizes
    assert len({each for group in groups for each in group}) == sum(sizes)


# Leases


def test_a_lease_never_goes_to_two_people(each_store: Store) -> None:
    project_id = with_tasks(each_store, prompts=50, takes=2, overlap=2, lease_minutes=60)
    people = [as_labeler(each_store, f"labeler {n}", project_id) for n in range(20)]
    failed: list[BaseException] = []

    def work(actor: Actor) -> None:
        rng = random.Random(actor.name)
        try:
            while offer := choosing.next_assignment(each_store, actor, project_id).assignment_id:
                if rng.random() < 0.2:
                    answering.skip(each_store, actor, offer, Skip(id=f"{offer}-skip", reason="undecidable"))
                else:
                    answering.submit(each_store, actor, offer, an_answer(2))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(each,)) for each in people]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not failed
    with each_store.reading() as db:
        held = db.execute(select(assignment.c.task_id, assignment.c.slot, assignment.c.person_id, assignment.c.state)).all()
        tasks = {row.id: row for row in db.execute(select(task)).all()}
        said = Counter(db.execute(select(answer.c.task_id).join(assignment).where(assignment.c.state == "answered")).scalars())
    answered = [row for row in held if row.state == "answered"]
    assert len({(row.task_id, row.slot) for row in answered}) == len(answered)
    assert len({(row.task_id, row.person_id) for row in held}) == len(held)
    assert all((row.taken, row.answered) == (said[row.id], said[row.id]) and row.taken <= 2 for row in tasks.values())
    assert all((row.state == "full") == (row.taken == 2) for row in tasks.values())
    assert len(answered) >= 95, "twenty people leave hardly a slot of a hundred empty"
    assert each_store.verify_log()["events"] > len(held)


def test_the_database_itself_refuses_a_slot_to_a_second_person(each_store: Store) -> None:
    project_id = with_tasks(each_store)
    first, second = (as_labeler(each_store, name, project_id) for name in ("ann", "bob"))
    row = row_of(each_store, taken(each_store, first, project_id))
    stolen = {column.name: getattr(row, column.name) for column in assignment.c} | {"id": new_id("a"), "person_id": second.person_id}
    with pytest.raises(IntegrityError), each_store.writing() as db:
        db.execute(insert(assignment), stolen)


def test_a_person_gets_the_open_lease_again_and_one_more_at_most(each_store: Store) -> None:
    project_id = with_tasks(each_store)
    ann = as_labeler(each_store, "ann", project_id)
    first = taken(each_store, ann, project_id)
    assert taken(each_store, ann, project_id) == first
    ahead = taken(each_store, ann, project_id, besides=first)
    assert ahead != first and taken(each_store, ann, project_id, besides=first) == ahead
    assert row_of(each_store, ahead).task_id != row_of(each_store, first).task_id
    assert taken(each_store, ann, project_id, besides="somewhere else") == first


def test_a_lease_over_its_time_is_freed_and_its_draft_comes_back(each_store: Store) -> None:
    project_id = with_tasks(each_store, prompts=1, overlap=1, lease_minutes=10)
    ann, bob = (as_labeler(each_store, name, project_id) for name in ("ann", "bob"))
    mine = taken(each_store, ann, project_id)
    now = each_store.now()
    answering.save_draft(each_store, ann, mine, {"ranks": {"overall": [1, None]}})
    assert choosing.next_assignment(each_store, bob, project_id).assignment_id is None
    each_store.now = lambda: now + 10 * 60_000 + 5_000
    his = taken(each_store, bob, project_id)
    assert row_of(each_store, mine).state == "expired"
    with pytest.raises(Denied, match="others have taken your place"):
        answering.submit(each_store, ann, mine, an_answer())
    answering.skip(each_store, bob, his, Skip(id=next(_ids), reason="unwilling"))
    assert taken(each_store, ann, project_id) == mine
    assert row_of(each_store, mine).draft["page"] == {"ranks": {"overall": [1, None]}}
    answering.submit(each_store, ann, mine, an_answer())
    with each_store.reading() as db:
        assert db.execute(select(task.c.taken, task.c.answered, task.c.state)).one() == (1, 1, "full")


def test_an_answer_after_the_time_counts_while_nobody_took_the_place(each_store: Store) -> None:
    project_id = with_tasks(each_store, prompts=2, lease_minutes=1)
    ann, bob = (as_labeler(each_store, name, project_id) for name in ("ann", "bob"))
    first, now = taken(each_store, ann, project_id), each_store.now()
    each_store.now = lambda: now + 3_600_000
    taken(each_store, bob, project_id)
    come_up_to_date(each_store)
    assert row_of(each_store, first).state == "expired"
    assert answering.submit(each_store, ann, first, an_answer()).assignment_id == first
    each_store.now = lambda: now - 3_600_000  # a clock that jumps back takes nothing away
    assert taken(each_store, ann, project_id) != first


def test_the_most_worthwhile_comes_first_and_the_random_floor_takes_any(each_store: Store) -> None:
    project_id = with_tasks(each_store, prompts=30, takes=2, overlap=50, mixture={"active": 0.5, "random": 0.5, "gold": 0, "repeat": 0, "mirrored": 0})
    ann = as_labeler(each_store, "ann", project_id)
    with each_store.writing() as db:
        ids = list(db.execute(select(task.c.id)).scalars())
        random.Random(1).shuffle(ids)
        assert labeling.set_priorities(each_store, db, project_id, ids, ann) == 30
    rows = answer_all(each_store, ann, project_id, lambda row: (1, 2), most=20)
    active = [ids.index(row.task_id) for row in rows if row.purpose == "active"]
    drawn = [ids.index(row.task_id) for row in rows if row.purpose == "random"]
    had: set[int] = set()
    for row in rows:
        if row.purpose == "active":
            assert ids.index(row.task_id) == min(set(range(30)) - had)
        had.add(ids.index(row.task_id))
    assert 8 <= len(active) <= 12 and max(drawn) > 20
    assert len(had) == 20, "nobody has a task twice"


def test_repeats_come_later_as_they_were_or_with_places_reversed(each_store: Store) -> None:
    project_id = with_tasks(each_store, prompts=40, takes=3, overlap=1, mixture={"active": 0.6, "random": 0, "gold": 0, "repeat": 0.2, "mirrored": 0.2})
    ann = as_labeler(each_store, "ann", project_id)
    rows = answer_all(each_store, ann, project_id, by_clip({}), most=40)
    first = {row.task_id: place for place, row in enumerate(rows) if not row.repeat}
    again = [(place, row) for place, row in enumerate(rows) if row.repeat]
    assert {row.purpose for _, row in again} == {"repeat", "mirrored"} and len(again) >= 10
    assert len({row.task_id for _, row in again}) == len(again), "a task comes again once"
    for place, row in again:
        before = rows[first[row.task_id]]
        assert place - first[row.task_id] > choosing.APART
        assert row.shown_order == (before.shown_order if row.purpose == "repeat" else [2 - each for each in before.shown_order])
    events = list(labeling.events_of(each_store, project_id))
    assert sum(each.is_repeat for each in events) == len(again)


def test_the_order_on_the_screen_is_drawn_for_each_person(each_store: Store) -> None:
    project_id = with_tasks(each_store, prompts=12, takes=6, overlap=2)
    orders = {}
    for name in ("ann", "bob"):
        orders[name] = {row.task_id: tuple(row.shown_order) for row in answer_all(each_store, as_labeler(each_store, name, project_id), project_id, lambda row: (1, 2, 3, 4, 5, 6))}
    assert orders["ann"].keys() == orders["bob"].keys()
    assert all(sorted(order) == list(range(6)) for order in orders["ann"].values())
    assert sum(orders["ann"][each] == orders["bob"][each] for each in orders["ann"]) <= 2


def test_nobody_is_given_more_than_the_most(store: Store) -> None:
    project_id = with_tasks(store, prompts=5, most=2)
    ann = as_labeler(store, "ann", project_id)
    assert len(answer_all(store, ann, project_id, lambda row: (1, 2, 3, 4))) == 2
    assert "2 tasks" in choosing.next_assignment(store, ann, project_id).reason


def test_there_is_no_task_before_consent_while_paused_or_in_a_closed_project(each_store: Store) -> None:
    project_id = with_tasks(each_store)
    ann = as_labeler(each_store, "ann")
    with pytest.raises(Denied, match="agree"):
        choosing.next_assignment(each_store, ann, project_id)
    attention.consent(each_store, ann, project_id)
    taken(each_store, ann, project_id)
    with each_store.writing() as db:
        db.execute(update(project).values(settings={"consent": "another text", "labeling": NO_CHECKS}))
    with pytest.raises(Denied, match="agree"):
        choosing.next_assignment(each_store, ann, project_id)
    attention.consent(each_store, ann, project_id)
    with each_store.writing() as db:
        db.execute(update(person).where(person.c.id == ann.person_id).values(state="paused"))
    with pytest.raises(Denied, match="paused"):
        choosing.next_assignment(each_store, ann, project_id)
    with each_store.writing() as db:
        db.execute(update(person).values(state="active"))
        db.execute(update(project).values(state="closed"))
    with pytest.raises(Denied, match="nothing here"):
        choosing.next_assignment(each_store, ann, project_id)


# What may be shown


def test_a_task_with_a_clip_that_may_not_be_shown_waits_until_it_may(each_store: Store) -> None:
    project_id = with_tasks(each_store, prompts=1)
    ann = as_labeler(each_store, "ann", project_id)
    with each_store.writing() as db:
        one = db.execute(select(clip.c.id).limit(1)).scalar_one()
        db.execute(update(clip).where(clip.c.id == one).values(state="restricted"))
    assert choosing.next_assignment(each_store, ann, project_id).assignment_id is None
    with each_store.writing() as db:
        assert labeling.make_tasks(each_store, db, project_id, ann) == 0
        db.execute(update(clip).where(clip.c.id == one).values(state="live"))
        assert labeling.make_tasks(each_store, db, project_id, ann) == 1
    taken(each_store, ann, project_id)


def test_a_task_whose_clip_is_deleted_is_closed_and_its_other_clips_are_dealt_anew(each_store: Store) -> None:
    project_id = with_tasks(each_store, prompts=2, overlap=1)
    ann = as_labeler(each_store, "ann", project_id)
    with each_store.reading() as db:
        gone, *others = db.execute(select(task.c.clips).order_by(task.c.id).limit(1)).scalar_one()
    delete_clip(each_store, project_id, gone, "system")
    (told,) = leading.progress_of(each_store, project_id).tasks
    assert (told.tasks, told.wanted, told.answered) == (2, 1, 0)
    with each_store.writing() as db:
        assert labeling.make_tasks(each_store, db, project_id, ann) == 1
    with each_store.reading() as db:
        states = {frozenset(row.clips): row.state for row in db.execute(select(task))}
    assert states[frozenset([gone, *others])] == "closed" and states[frozenset(others)] == "open" and sorted(states.values()) == ["closed", "open", "open"]
    with each_store.writing() as db:  # as a version that closed nothing left it
        db.execute(update(task).where(task.c.state == "closed").values(state="held"))
        assert labeling.make_tasks(each_store, db, project_id, ann) == 0
        assert sorted(db.execute(select(task.c.state)).scalars()) == ["closed", "open", "open"]
    assert len(answer_all(each_store, ann, project_id, lambda row: tuple(range(1, 1 + len(row.clips))))) == 2


def test_skips_and_repeats_are_no_answers_to_what_is_still_wanted(each_store: Store) -> None:
    checks = {"mixture": {"active": 0.5, "random": 0, "gold": 0, "repeat": 0.5, "mirrored": 0}}
    project_id = with_tasks(each_store, prompts=10, overlap=2, **checks)
    ann = as_labeler(each_store, "ann", project_id)
    for _ in range(2):
        answering.skip(each_store, ann, taken(each_store, ann, project_id), Skip(id=next(_ids), reason="language"))
    rows = answer_all(each_store, ann, project_id, lambda row: (1, 2, 3, 4))
    again = sum(row.repeat for row in rows)
    assert again and len(rows) == 8 + again
    progress = leading.progress_of(each_store, project_id)
    (told,) = progress.tasks
    assert (told.answered, told.last_day, sum(progress.answers)) == (8, 8, 8) and told.hours_left == pytest.approx(12 / told.an_hour)
    with each_store.writing() as db:
        db.execute(update(task).where(task.c.answered == 0).values(state="held"))
    (told,) = leading.progress_of(each_store, project_id).tasks
    assert told.hours_left == pytest.approx(8 / told.an_hour), "nobody is given what waits for a clip"


def test_a_lease_without_two_clips_to_show_ends(each_store: Store) -> None:
    project_id = with_tasks(each_store, prompts=2)
    ann = as_labeler(each_store, "ann", project_id)
    mine = taken(each_store, ann, project_id)
    clips = row_of(each_store, mine).clips
    for verdict, number in (("review", 2), ("error", 3)):
        with each_store.writing() as db:
            db.execute(update(clip).where(clip.c.id.in_(clips[:number])).values(verdict=verdict))
        assert (taken(each_store, ann, project_id) == mine) == (number == 2)


@pytest.mark.parametrize("policies", [("P05",), ("P04", "P05")])
def test_a_suspicion_is_in_the_queue_at_once_and_the_task_goes_on_without_the_clip(each_store: Store, policies: tuple[str, ...]) -> None:
    project_id = with_tasks(each_store)
    ann, bob = (as_labeler(each_store, name, project_id) for name in ("ann", "bob"))
    mine = row_of(each_store, taken(each_store, ann, project_id))
    suspected = mine.clips[mine.shown_order.index(2)]
    for _ in range(2):  # a double click
        answering.flag(each_store, ann, mine.id, Unsafe(place=2, policies=policies))
    with each_store.reading() as db:
        assert db.execute(select(item.c.clip, item.c.queue, item.c.source)).all() == [(suspected, "flagged", mine.id)]
        assert db.execute(select(clip.c.state).where(clip.c.id == suspected)).scalar() == ("restricted" if "P04" in policies else "live")
        assert suspected not in labeling.servable_of(db, mine.clips)
    for _ in range(2):
        his = row_of(each_store, taken(each_store, bob, project_id))
        assert suspected not in his.clips
        answering.submit(each_store, bob, his.id, an_answer())
    assert choosing.next_assignment(each_store, bob, project_id).assignment_id is None
    answering.submit(each_store, ann, mine.id, an_answer(ranks=(1, 2, None, 3), watched=(1, 1, 0, 1)))
    with each_store.reading() as db:
        body = db.execute(select(answer.c.body).where(answer.c.assignment_id == mine.id)).scalar_one()
    assert body["unsafe"] == [mine.clips.index(suspected)]
    assert body["ranks"]["overall"] == [(1, 2, None, 3)[place] for place in mine.shown_order]
    assert any(suspected_row(each_store, suspected) in each.clip_ids for each in labeling.events_of(each_store, project_id)) == ("P04" not in policies)


def suspected_row(store: Store, clip_id: str) -> str:
    with store.reading() as db:
        return db.execute(select(clip.c.clip_id).where(clip.c.id == clip_id)).scalar_one()


def test_an_unknown_policy_is_refused_and_nothing_is_kept(store: Store) -> None:
    project_id = with_tasks(store)
    ann = as_labeler(store, "ann", project_id)
    mine = taken(store, ann, project_id)
    given = an_answer(unsafe=(Unsafe(place=0, policies=("P99",)),), ranks=(None, 1, 2, 3))
    for act in (lambda: answering.flag(store, ann, mine, given.unsafe[0]), lambda: answering.submit(store, ann, mine, given)):
        with pytest.raises(Denied, match="no policy P99"):
            act()
    with store.reading() as db:
        assert not db.execute(select(answer)).first() and not db.execute(select(item)).first()


# Answers


def test_an_answer_goes_from_places_to_clips_and_comes_out_as_a_ranking(each_store: Store) -> None:
    project_id = with_tasks(each_store, prompts=1)
    ann = as_labeler(each_store, "ann", project_id)
    mine = row_of(each_store, taken(each_store, ann, project_id))
    given = an_answer(ranks=(2, 1, 2, None), comment="  the horse has five legs  ")
    reply = answering.submit(each_store, ann, mine.id, given)
    (told,) = labeling.events_of(each_store, project_id)
    with each_store.reading() as db:
        digest = dict(db.execute(select(clip.c.id, clip.c.clip_id)).all())
        text = db.execute(select(private_text.c.text, private_text.c.person_id)).one()
        log = " ".join(db.execute(select(event.c.body)).scalars())
    seen = {place: digest[each] for each, place in zip(mine.clips, mine.shown_order, strict=True)}
    assert {each: told.ranks[told.clip_ids.index(seen[place])] for place, each in seen.items()} == {seen[0]: 2, seen[1]: 1, seen[2]: 2, seen[3]: None}
    assert {place: told.watch_ms[told.clip_ids.index(seen[place])] for place in range(4)} == {0: 1000, 1: 1001, 2: 1002, 3: 1003}
    assert [told.clip_ids[told.shown_order.index(place)] for place in range(4)] == [seen[place] for place in range(4)]
    assert (told.annotator_id, told.event_id, told.lead_time_ms, told.is_gold, told.is_repeat) == (ann.pseudonym, f"{reply.answer_id}.overall", 9000, False, False)
    assert text == ("the horse has five legs", ann.person_id) and "five legs" not in log


def test_the_rankings_pass_the_checks_of_the_exchange_format(store: Store, tmp_path: Any) -> None:
    from reward.comparisons import Clip, Prompt, write_comparisons

    for name, takes in (("pairs", 2), ("more", 4)):
        project_id = add_project(store, name, labeling={**NO_CHECKS, "takes": takes, "overlap": 4})
        add_clips(store, project_id, ["prompt"], takes=takes, files=False)
        people = [as_labeler(store, f"{name} {n}", project_id) for n in range(4)]
        with store.writing() as db:
            labeling.make_tasks(store, db, project_id, people[0])
        mine = [taken(store, each, project_id) for each in people]
        answering.submit(store, people[0], mine[0], an_answer(takes))
        answering.submit(store, people[1], mine[1], an_answer(takes, all_bad=True, ranks=None))
        answering.submit(store, people[2], mine[2], an_answer(takes, broken=tuple(range(takes - 1)), ranks=(None,) * takes))
        answering.skip(store, people[3], mine[3], Skip(id=next(_ids), reason="language"))
        events = list(labeling.events_of(store, project_id))
        with store.reading() as db:
            clips = [Clip(**row) for row in db.execute(select(clip.c.row).where(clip.c.project_id == project_id)).scalars()]
        data = write_comparisons(tmp_path / name, events, clips=clips, prompts=[Prompt("prompt", "prompt")])
        assert len(data.events) == 4
        assert [set(each.ranks) for each in events] == [set(range(1, takes + 1)), {1}, {None}, {None}]
        assert [each.flags for each in events] == [(), ("all_bad",), ("broken",), ()] and events[3].skipped_reason == "language"


def test_sending_again_adds_nothing_and_another_answer_under_the_id_is_refused(each_store: Store) -> None:
    project_id = with_tasks(each_store)
    ann, bob = (as_labeler(each_store, name, project_id) for name in ("ann", "bob"))
    mine, given = taken(each_store, ann, project_id), an_answer()
    replies = {answering.submit(each_store, ann, mine, given).model_dump_json() for _ in range(3)}
    assert len(replies) == 1
    for who, which, what in (
        (ann, mine, given.model_copy(update={"lead_time_ms": 1})),
        (bob, taken(each_store, bob, project_id), given),
        (ann, taken(each_store, ann, project_id), given),
        (ann, mine, an_answer()),
    ):
        with pytest.raises(Denied) as denied:
            answering.submit(each_store, who, which, what)
        assert denied.value.status == 409
    with each_store.reading() as db:
        assert db.execute(select(func.count()).select_from(answer)).scalar() == 1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"ranks": {}}, "rank two clips"),
        ({"ranks": {"overall": (1, None, None, None)}}, "rank two clips"),
        ({"ranks": {"overall": (1, 2, 3)}}, "a ranking has 4 ranks"),
        ({"ranks": {"overall": (1, 2, 3, 5)}}, "a ranking has 4 ranks"),
        ({"ranks": {"overall": (1, 2, 3, 4), "beauty": (1, 2, 3, 4)}}, "nobody asks for beauty"),
        ({"watched": (1, 1, 0.5, 1)}, "clip C, 50% was seen, 80% are needed"),
        ({"watched": (1, 1, 1)}, "how much of it was watched"),
        ({"broken": (4,)}, "no place 5"),
    ],
)
def test_what_is_no_answer_to_the_task_is_refused_and_the_task_stays_open(store: Store, change: dict[str, Any], why: str) -> None:
    project_id = with_tasks(store)
    ann = as_labeler(store, "ann", project_id)
    mine = taken(store, ann, project_id)
    with pytest.raises(Denied, match=why):
        answering.submit(store, ann, mine, an_answer(**change))
    assert row_of(store, mine).state == "open"
    answering.submit(store, ann, mine, an_answer())


def test_every_question_is_answered_and_what_does_not_see_the_prompt_comes_before_it(store: Store, tmp_path: Path) -> None:
    dimensions = [{"name": "visual", "question": "Which looks best?", "sees_prompt": False}, {"name": "text", "question": "Which fits?"}]
    project_id = with_tasks(store, dimensions=dimensions, likert=True, confidence=True, takes=2)
    ann = as_labeler(store, "ann", project_id)
    mine = taken(store, ann, project_id)
    good = an_answer(2, ranks={"visual": (1, 2), "text": (2, 1)}, likert=(5, 1), confidence=0.5)

    def refused(given: Answer, why: str) -> None:
        with pytest.raises(Denied, match=why):
            answering.submit(store, ann, mine, given)

    with store.reading() as db:
        labeling_settings = answering.settings_of(db, project_id).labeling
    refused(good, "before the prompt first")
    assert not answering.shows_prompt(row_of(store, mine), labeling_settings)
    with pytest.raises(Denied, match="rank two clips at least: visual"):
        answering.reveal_prompt(store, ann, mine, {}, False)
    answering.reveal_prompt(store, ann, mine, {"visual": (1, 2)}, False)
    answering.save_draft(store, ann, mine, {"x": 1})
    answering.reveal_prompt(store, ann, mine, {"visual": (2, 1)}, False)
    assert answering.shows_prompt(row_of(store, mine), labeling_settings)
    refused(good.model_copy(update={"ranks": {"visual": (2, 1), "text": (2, 1)}}), "stays as it was")
    refused(good.model_copy(update={"ranks": {"visual": (1, 2)}}), "rank two clips at least: text")
    refused(good.model_copy(update={"likert": None}), "rate every clip")
    refused(good.model_copy(update={"confidence": None}), "how sure")
    answering.submit(store, ann, mine, good)
    assert sorted(each.dimension for each in labeling.events_of(store, project_id)) == ["text", "visual"]
    told = quality.people_of(store, project_id)
    assert (told.answers, told.of, [each.answers for each in told.people]) == (1, 1, [1]), "however many questions"
    written = export(store, project_id, "jsonl", tmp_path, by="system")
    assert (written.rows, written.answers) == (2, 1)


def test_the_last_answer_can_be_taken_back_once_and_stays_in_the_store(each_store: Store) -> None:
    project_id = with_tasks(each_store, prompts=3, overlap=1)
    ann = as_labeler(each_store, "ann", project_id)
    clock = itertools.count(each_store.now())
    each_store.now = lambda: next(clock)
    first, second = (answering.submit(each_store, ann, taken(each_store, ann, project_id), an_answer()) for _ in range(2))
    with pytest.raises(Denied, match="only the last"):
        answering.undo(each_store, ann, first.answer_id)
    assert {answering.undo(each_store, ann, second.answer_id) for _ in range(2)} == {second.assignment_id}
    with pytest.raises(Denied, match="nothing here"):
        answering.undo(each_store, as_labeler(each_store, "bob", project_id), first.answer_id)
    assert [each.event_id for each in labeling.events_of(each_store, project_id)] == [f"{first.answer_id}.overall"]
    assert taken(each_store, ann, project_id) == second.assignment_id
    better = answering.submit(each_store, ann, second.assignment_id, an_answer(ranks=(4, 3, 2, 1)))
    with each_store.reading() as db:
        versions = db.execute(select(answer.c.id, answer.c.version).where(answer.c.assignment_id == second.assignment_id).order_by(answer.c.version)).all()
        assert db.execute(select(func.sum(task.c.answered), func.sum(task.c.taken))).one() == (2, 2)
    assert versions == [(second.answer_id, 1), (better.answer_id, 2)]
    each_store.verify_log()


def test_a_skip_leaves_the_slot_to_others_and_can_be_taken_back_while_it_is_free(each_store: Store) -> None:
    project_id = with_tasks(each_store, prompts=1, overlap=1)
    ann, bob = (as_labeler(each_store, name, project_id) for name in ("ann", "bob"))
    clock = itertools.count(each_store.now())
    each_store.now = lambda: next(clock)
    gone = answering.skip(each_store, ann, taken(each_store, ann, project_id), Skip(id=next(_ids), reason="language"))
    assert choosing.next_assignment(each_store, ann, project_id).assignment_id is None
    answering.undo(each_store, ann, gone.answer_id)
    gone = answering.skip(each_store, ann, taken(each_store, ann, project_id), Skip(id=next(_ids), reason="language"))
    taken(each_store, bob, project_id)
    with pytest.raises(Denied, match="taken your place"):
        answering.undo(each_store, ann, gone.answer_id)


# Checks of attention


@pytest.mark.parametrize(
    ("truth", "ranks", "ok"),
    [((1, None, 2), (1, 3, 2), True), ((1, None, 2), (2, 1, 2), False), ((1, None, 2), (3, 1, 2), False), ((1, None, 2), (1, 1, None), False), ((1, None, None), (2, 1, 1), None)],
)
def test_gold_asks_for_the_two_clips_that_are_known_to_differ(truth: tuple[int, ...], ranks: tuple[int, ...], ok: bool | None) -> None:
    assert attention.agrees_with_truth({"overall": truth}, {"overall": ranks}) is ok
    assert attention.agrees_with_truth({"motion": truth}, {"overall": ranks}) is None


def test_a_repeat_may_differ_in_a_third_of_its_pairs() -> None:
    before = {"overall": (1, 2, 3)}
    assert attention.agrees_with_itself(before, {"overall": (2, 1, 3)}) is True
    assert attention.agrees_with_itself(before, {"overall": (2, 3, 1)}) is False
    assert attention.agrees_with_itself(before, {"overall": (1, 1, 1)}) is True
    assert attention.agrees_with_itself({"overall": (1, 1, None)}, before) is None


def checks_of(store: Store, who: Actor) -> list[bool]:
    """Whether each check that somebody was given, practice aside, was passed."""
    with store.reading() as db:
        rows = db.execute(labeling.live_answers().where(answer.c.person_id == who.person_id, task.c.kind != "practice").order_by(answer.c.at)).all()
    return [row.body["ok"] for row in rows if row.body["what"] == "rank" and row.body["ok"] is not None]


def test_who_goes_by_the_place_is_warned_then_paused_and_starts_anew_when_let_back(each_store: Store) -> None:
    project_id = with_tasks(each_store, prompts=60, takes=3, overlap=1, mixture={"active": 0.5, "random": 0, "gold": 0, "repeat": 0, "mirrored": 0.5})
    ann = as_labeler(each_store, "ann", project_id)
    clock = itertools.count(each_store.now())
    each_store.now = lambda: next(clock)
    standings: list[str] = []
    while "paused" not in standings:
        standings.append(answering.submit(each_store, ann, taken(each_store, ann, project_id), an_answer(3)).standing)
    assert list(dict.fromkeys(standings)) == ["fine", "warned", "paused"]
    with pytest.raises(Denied, match="paused"):
        choosing.next_assignment(each_store, ann, project_id)
    assert checks_of(each_store, ann) == [False] * 6
    with each_store.writing() as db:
        db.execute(update(person).where(person.c.id == ann.person_id).values(state="active"))
    assert answering.submit(each_store, ann, taken(each_store, ann, project_id), an_answer(3)).standing == "fine"


def test_people_who_agreed_to_answer_the_wrong_way_round_are_found_by_what_is_known(store: Store) -> None:
    """They agree with each other entirely, and repeats catch none of them; gold pauses all of them, and not who answers honestly."""
    project_id = with_tasks(store, prompts=60, takes=3, overlap=4, mixture={"active": 0.4, "random": 0, "gold": 0.4, "repeat": 0.1, "mirrored": 0.1})
    with store.writing() as db:
        rows = db.execute(select(task.c.id, task.c.clips).order_by(task.c.id)).all()
        known = [row.id for row in rows[:30]]
        db.execute(update(task).where(task.c.id.in_(known)).values(kind="gold", truth={"overall": [1, 2, None]}, wanted=labeling.EVERYBODY))
    worth = {each: place for row in rows for place, each in enumerate(row.clips)}
    reversed_ = by_clip({each: -place for each, place in worth.items()})
    colluders = [as_labeler(store, name, project_id) for name in ("cai", "cem", "cid")]
    for each in colluders:
        with pytest.raises(Denied, match="paused"):
            answer_all(store, each, project_id, reversed_)
        checks = checks_of(store, each)
        assert len(checks) >= 6 and sum(checks) <= len(checks) / 2
    honest = as_labeler(store, "ann", project_id)
    answer_all(store, honest, project_id, by_clip(worth))
    assert all(checks_of(store, honest))
    said = [each for each in labeling.events_of(store, project_id) if each.annotator_id != honest.pseudonym]
    assert {each.gold_ok for each in said if each.is_gold} == {False}, "and what they said is marked for whoever learns from it"


def test_who_is_of_one_mind_passes_mirrored_repeats(store: Store) -> None:
    project_id = with_tasks(store, prompts=30, takes=3, overlap=1, mixture={"active": 0.5, "random": 0, "gold": 0, "repeat": 0, "mirrored": 0.5})
    ann = as_labeler(store, "ann", project_id)
    with store.reading() as db:
        ids = list(db.execute(select(clip.c.id)).scalars())
    answer_all(store, ann, project_id, by_clip({each: place for place, each in enumerate(ids)}))
    checks = checks_of(store, ann)
    assert len(checks) >= 10 and all(checks)
    (habits,) = quality.people_of(store, project_id).people
    assert habits.first_place.value is not None and 0.1 < habits.first_place.value < 0.6


# Gold, practice, demonstrations


def test_gold_is_a_task_with_a_worse_copy_that_may_be_shown_and_whose_order_is_known(store: Store) -> None:
    project_id = add_project(store, labeling={**NO_CHECKS, "takes": 3, "mixture": {"active": 0, "random": 0, "gold": 1, "repeat": 0, "mirrored": 0}})
    own = add_clips(store, project_id, takes=3)
    ann = as_labeler(store, "ann", project_id)
    assert planting.make_gold(store, project_id, 2, ann) == 2
    with store.reading() as db:
        rows = db.execute(select(task).where(task.c.kind == "gold")).all()
        planted = {row.id: row for row in db.execute(select(clip).where(clip.c.run == "planted")).all()}
        assert all(len(labeling.servable_of(db, row.clips)) == 3 for row in rows)
    assert len(planted) == 2 and all(planting.fault_of(row.row) for row in planted.values())
    for row in rows:
        (copy,) = [each for each in row.clips if each in planted]
        good = row.clips[row.truth["overall"].index(1)]
        assert row.truth["overall"][row.clips.index(copy)] == 2 and good in own
        assert planted[copy].row["generator"] == "planted" and planting.path_of(store, planted[copy].clip_id).is_file()
    with store.writing() as db:
        labeling.make_tasks(store, db, project_id, ann)
        dealt = {each for clips in db.execute(select(task.c.clips).where(task.c.kind == "rank")).scalars() for each in clips}
    assert dealt == set(own), "worse copies are ranked as gold alone"
    mine = row_of(store, taken(store, ann, project_id))
    assert mine.purpose == "gold"
    answering.submit(store, ann, mine.id, an_answer(3, ranks=by_clip({each: place for place, each in enumerate(mine.clips)})(mine)))
    (told,) = labeling.events_of(store, project_id)
    assert told.is_gold and told.gold_ok is True


def test_practice_comes_first_and_is_explained(store: Store) -> None:
    project_id = add_project(store, labeling={**NO_CHECKS, "takes": 3, "practice": 2})
    add_clips(store, project_id, takes=3)
    ann = as_labeler(store, "ann", project_id)
    assert planting.make_practice(store, project_id, 1, ann) == 1
    with store.writing() as db:
        labeling.make_tasks(store, db, project_id, ann)
    mine = row_of(store, taken(store, ann, project_id))
    assert mine.purpose == "practice"
    assert choosing.next_assignment(store, ann, project_id, besides=mine.id).assignment_id is None
    reply = answering.submit(store, ann, mine.id, an_answer(3, all_bad=True))
    assert reply.feedback is not None and reply.feedback.right is False
    expected = reply.feedback.expected["overall"]
    assert sorted(expected) == [1, 2, 2] and reply.feedback.notes[expected.index(1)] == "as it was made"
    assert sum(note.endswith("on purpose") for note in reply.feedback.notes) == 2
    with pytest.raises(Denied, match="practice"):
        answering.undo(store, ann, reply.answer_id)
    assert row_of(store, taken(store, ann, project_id)).purpose == "active"
    assert not list(labeling.events_of(store, project_id)), "practice is no ranking"


def test_gold_needs_clips_that_may_be_shown(store: Store) -> None:
    project_id = add_project(store)
    add_clips(store, project_id, verdicts=("block", "review"), files=False)
    from base_model.errors import UserError

    with pytest.raises(UserError, match="Import clips"):
        planting.make_gold(store, project_id, 1, as_labeler(store, "ann"))


def test_demonstrations_are_the_best_or_all_accepted_with_the_corrected_caption(each_store: Store) -> None:
    project_id = add_project(each_store, labeling={**NO_CHECKS, "takes": 3})
    add_clips(each_store, project_id, takes=3, files=False)
    ann = as_labeler(each_store, "ann", project_id)
    with each_store.writing() as db:
        assert labeling.make_demonstrations(each_store, db, project_id, ann) == 3
    watched = {"watched": (1, 1, 1), "watch_ms": (1, 1, 1), "lead_time_ms": 5}
    expected = []
    for best, accepted, caption in ((1, (True, True, False), ""), (None, (True, False, True), "a red disc"), (None, (False, False, False), "")):
        mine = row_of(each_store, taken(each_store, ann, project_id, work="demonstration"))
        for wrong in ({"best": 2, "accepted": (True, True, False)}, {"best": None, "accepted": (True, None, False)}):
            with pytest.raises(Denied):
                answering.demonstrate(each_store, ann, mine.id, Demonstration(id=next(_ids), **wrong, **watched))
        answering.demonstrate(each_store, ann, mine.id, Demonstration(id=next(_ids), best=best, accepted=accepted, caption=caption, **watched))
        chosen = [best] if best is not None else [place for place in range(3) if accepted[place]]
        with each_store.reading() as db:
            prompt_id = db.execute(select(task.c.prompt_id).where(task.c.id == mine.task_id)).scalar_one()
        expected += [(caption or prompt_id, suspected_row(each_store, mine.clips[mine.shown_order.index(place)])) for place in chosen]
    assert sorted(labeling.demonstrations_of(each_store, project_id)) == sorted(expected)
    assert choosing.next_assignment(each_store, ann, project_id, work="demonstration").assignment_id is None
    with each_store.writing() as db:
        db.execute(update(clip).values(state="withdrawn"))
    assert labeling.demonstrations_of(each_store, project_id) == []

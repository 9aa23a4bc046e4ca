"""Who gets which task: leases.

A lease is an assignment in the state "open". It holds one of the slots of its task, which no other person can hold (a unique index says so, too), until it is answered, skipped,
or over its time: what is over is freed by the app's upkeep, and at once by who would else have nothing to do. Nobody chooses a task. Which kind comes next is a walk through the
person's mixture (`reward/asking.py`); within a kind it is the most worthwhile task, or any, and never one that the person has had, but as a repeat. Clips that may not be shown
are looked for at the last moment; a task with one waits in the state "held".
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from sqlalchemy import Connection, Row, Select, bindparam, case, exists, insert, select, update

from reward.app import reviewing
from reward.app.access import LABELER
from reward.app.attention import has_consented
from reward.app.labeling import servable_of
from reward.app.schema import assignment, person, project, task
from reward.app.security import Actor, Denied
from reward.app.settings import Labeling, ProjectSettings, settings_of
from reward.app.store import Store, new_id
from reward.asking import Mix, kind_at

LIVE = ("open", "answered")
PURPOSES = ("active", "random", "gold", "repeat", "mirrored")
AT_ONCE = 2
"""Leases of a person: the task on the screen, and the next one."""
FEW = 8
"""Candidates read at a time."""
APART = Mix().apart
Work = Literal["rank", "demonstration"]

# Statements that every labeler's request needs are built once: building one takes longer than the database does

OWN: Select[Any] = (
    select(assignment, task.c.kind, task.c.clips, task.c.truth, task.c.prompt_id, project.c.settings)
    .join(task, task.c.id == assignment.c.task_id)
    .join(project, project.c.id == assignment.c.project_id)
    .where(assignment.c.id == bindparam("assignment"), assignment.c.person_id == bindparam("person"))
)
ADMITTED: Select[Any] = (
    select(project.c.state.label("project_state"), project.c.settings.label("project_settings"), person.c.state, person.c.settings)
    .select_from(person.join(project, project.c.id == bindparam("project")))
    .where(person.c.id == bindparam("person"))
)
BRIEF = (assignment.c.id, assignment.c.task_id, assignment.c.person_id, assignment.c.slot, assignment.c.purpose, assignment.c.repeat, assignment.c.state)
MINE: Select[Any] = (
    select(*BRIEF, assignment.c.lease_until)
    .where(assignment.c.person_id == bindparam("person"), assignment.c.project_id == bindparam("project"))
    .order_by(assignment.c.issued_at, assignment.c.id)
)
OF_TASK: Select[Any] = select(*BRIEF).where(assignment.c.task_id == bindparam("task"))
EXPIRED: Select[Any] = select(*BRIEF).where(assignment.c.state == "open", assignment.c.lease_until <= bindparam("now"))
CLIPS_OF: Select[Any] = select(task.c.clips).where(task.c.id == bindparam("task"))
TAKE = insert(assignment)
COUNT = update(task).where(task.c.id == bindparam("task")).values(
    taken=task.c.taken + bindparam("more_taken"),
    answered=task.c.answered + bindparam("more_answered"),
    state=case((task.c.state.not_in(("open", "full")), task.c.state), (task.c.taken + bindparam("more_taken") >= task.c.wanted, "full"), else_="open"),
)


def _fresh_tasks() -> Select[Any]:
    had = exists().where(assignment.c.task_id == task.c.id, assignment.c.person_id == bindparam("person"), assignment.c.state != "expired")
    wanted = (task.c.project_id == bindparam("project"), task.c.kind == bindparam("kind"), task.c.state == "open", ~had)
    return select(task.c.id, task.c.clips).where(*wanted).limit(FEW)


MOST_WORTHWHILE = _fresh_tasks().order_by(task.c.priority.desc())
FROM_A_POINT = _fresh_tasks().where(task.c.shuffle >= bindparam("point")).order_by(task.c.shuffle)
UP_TO_A_POINT = _fresh_tasks().where(task.c.shuffle < bindparam("point")).order_by(task.c.shuffle)


class Offer(NamedTuple):
    """The assignment to go on with, or why there is none."""

    assignment_id: str | None
    reason: str


def next_assignment(store: Store, actor: Actor, project_id: str, *, besides: str | None = None, work: Work = "rank") -> Offer:
    """The person's open lease if there is one besides `besides`, else a new one. Raises Denied before consent, while paused, and in a closed project."""
    with store.glancing() as db:
        settings = _admit(db, actor, project_id)
    with store.writing() as db:
        rows = db.execute(MINE, {"person": actor.person_id, "project": project_id}).all()
        if any(row.state == "open" and row.lease_until <= store.now() for row in rows):
            free_expired(store, db)
            rows = db.execute(MINE, {"person": actor.person_id, "project": project_id}).all()
        mine = [row for row in rows if (row.purpose == "demonstration") == (work == "demonstration")]
        leases = _kept(store, db, [row for row in mine if row.state == "open"])
        for row in leases:
            if row.id != besides:
                return Offer(row.id, "")
        if len(leases) >= AT_ONCE:
            raise Denied(409, "finish the tasks that you hold")
        offer = _offer(store, db, actor, project_id, work, mine, bool(leases), settings.labeling)
        if offer.assignment_id is None and free_expired(store, db) + reviewing.settle(store, db, project_id):  # others took too long, or reviewers let go of some clips
            offer = _offer(store, db, actor, project_id, work, mine, bool(leases), settings.labeling)
        return offer


def _offer(store: Store, db: Connection, actor: Actor, project_id: str, work: Work, mine: Sequence[Row[Any]], holds: bool, settings: Labeling) -> Offer:
    """A new lease, or why there is none. mine: assignments of this kind of work. holds: whether one of them is open."""
    if work == "demonstration":
        return _take_any(store, db, actor, project_id, "demonstration", len(mine), settings)
    practised = sum(row.purpose == "practice" and row.state in ("answered", "skipped") for row in mine)
    if practised < settings.practice:
        if holds:
            return Offer(None, "practice goes task by task")
        offer = _take_any(store, db, actor, project_id, "practice", len(mine), settings)
        if offer.assignment_id:
            return offer
    return _take_real(store, db, actor, project_id, [row for row in mine if row.purpose in PURPOSES], settings)


def _admit(db: Connection, actor: Actor, project_id: str) -> ProjectSettings:
    row = db.execute(ADMITTED, {"project": project_id, "person": actor.person_id}).first()
    if row is None or row.project_state != "open":
        raise Denied(404, "there is nothing here")
    settings = ProjectSettings.model_validate(row.project_settings)
    if row.state != "active":
        raise Denied(403, "you are paused. Ask whoever runs your project")
    if not has_consented(row.settings, project_id, settings.consent):
        raise Denied(403, "read what happens with your answers, and agree, first")
    return settings


def _kept(store: Store, db: Connection, leases: Sequence[Row[Any]]) -> list[Row[Any]]:
    """The leases that still make sense: of those with fewer than two clips that may be shown (one, of a demonstration), the task is held and the lease is over."""
    kept = []
    for row in leases:
        clips = db.execute(CLIPS_OF, {"task": row.task_id}).scalar_one()
        if len(servable_of(db, clips)) >= (1 if row.purpose == "demonstration" else 2):
            kept.append(row)
        else:
            _hold_task(store, db, row.task_id)
            expire(store, db, row)
    return kept


def _hold_task(store: Store, db: Connection, task_id: str) -> None:
    if db.execute(update(task).where(task.c.id == task_id, task.c.state.in_(("open", "full"))).values(state="held")).rowcount:
        store.log(db, "system", "task held", task_id)


# Which


def _take_real(store: Store, db: Connection, actor: Actor, project_id: str, mine: Sequence[Row[Any]], settings: Labeling) -> Offer:
    slot = len(mine)
    if slot >= settings.most:
        return Offer(None, f"you have had the {settings.most} tasks that one person is given in this project. Thank you")
    kind = kind_at(Mix(**settings.mixture.model_dump(), most=settings.most), actor.pseudonym, slot, 0)
    rng = random.Random(f"{actor.pseudonym} {project_id} {slot}")
    if kind in ("repeat", "mirrored"):
        again = _again(db, mine, rng)
        if again is not None:
            shown = db.execute(select(assignment.c.shown_order).where(assignment.c.id == again.id)).scalar_one()
            last = len(shown) - 1
            order = shown if kind == "repeat" else [last - place for place in shown]
            return Offer(_lease(store, db, actor, project_id, again.task_id, order, kind, settings, repeat=again.repeat + 1), "")
    elif kind == "gold":
        found = _fresh(store, db, actor, project_id, "gold", rng)
        if found is not None:
            return Offer(_lease(store, db, actor, project_id, found.id, _order(found, rng), kind, settings), "")
    purpose = "random" if kind == "random" or settings.mixture.active == 0 else "active"
    found = _fresh(store, db, actor, project_id, "rank", rng if purpose == "random" else None)
    if found is None:
        return Offer(None, "there is nothing left for you in this project now. Thank you")
    return Offer(_lease(store, db, actor, project_id, found.id, _order(found, rng), purpose, settings), "")


def _take_any(store: Store, db: Connection, actor: Actor, project_id: str, kind: str, slot: int, settings: Labeling) -> Offer:
    rng = random.Random(f"{actor.pseudonym} {project_id} {kind} {slot}")
    found = _fresh(store, db, actor, project_id, kind, rng)
    if found is None:
        return Offer(None, "there is nothing left for you in this project now. Thank you")
    return Offer(_lease(store, db, actor, project_id, found.id, _order(found, rng), kind, settings), "")


def _order(found: Row[Any, Any], rng: random.Random) -> list[int]:
    return rng.sample(range(len(found.clips)), len(found.clips))


def _fresh(store: Store, db: Connection, actor: Actor, project_id: str, kind: str, rng: random.Random | None) -> Row[Any, Any] | None:
    """An open task of a kind that the person has not had, with clips that may be shown: the most worthwhile, or any where a generator is given."""
    asked = {"person": actor.person_id, "project": project_id, "kind": kind, **({} if rng is None else {"point": rng.random()})}
    for part in (MOST_WORTHWHILE,) if rng is None else (FROM_A_POINT, UP_TO_A_POINT):
        while rows := db.execute(part, asked).all():
            for row in rows:
                if len(servable_of(db, row.clips)) == len(row.clips):
                    return row
                _hold_task(store, db, row.id)
    return None


def _again(db: Connection, mine: Sequence[Row[Any]], rng: random.Random) -> Row[Any] | None:
    """An answered task of this person that comes again once, at least `APART` others later; gold is its own check."""
    repeated = {row.task_id for row in mine if row.repeat}
    early = [row for row in mine[: max(0, len(mine) - APART)] if row.purpose in ("active", "random") and row.state == "answered" and row.task_id not in repeated]
    rng.shuffle(early)
    for row in early:
        clips = db.execute(CLIPS_OF, {"task": row.task_id}).scalar_one()
        if len(servable_of(db, clips)) == len(clips):
            return row
    return None


# Leases


def _lease(store: Store, db: Connection, actor: Actor, project_id: str, task_id: str, order: Sequence[int], purpose: str, settings: Labeling, *, repeat: int = 0) -> str:
    now = store.now()
    values = {"purpose": purpose, "shown_order": list(order), "issued_at": now, "lease_until": now + settings.lease_minutes * 60_000, "state": "open"}
    held = db.execute(OF_TASK, {"task": task_id}).all()
    live = {row.slot for row in held if row.repeat == 0 and row.state in LIVE}
    slot = 0 if repeat else next(slot for slot in itertools.count() if slot not in live)  # an open task has one left
    before = next((row.id for row in held if row.person_id == actor.person_id and row.repeat == repeat), None)
    if before:
        db.execute(update(assignment).where(assignment.c.id == before).values(**values, slot=slot))
    assignment_id = before or new_id("a")
    if not before:
        row = {"id": assignment_id, "project_id": project_id, "task_id": task_id, "person_id": actor.person_id, "slot": slot, "repeat": repeat, "draft": None}
        db.execute(TAKE, {**row, **values})
    if not repeat:
        count(db, task_id, taken=1)
    store.log(db, actor.pseudonym, "task taken", assignment_id, {"task": task_id, "purpose": purpose, "order": list(order)})
    return assignment_id


def free_slot(db: Connection, task_id: str) -> int | None:
    """The first slot of a task that nobody holds."""
    wanted = db.execute(select(task.c.wanted).where(task.c.id == task_id)).scalar_one()
    held = set(db.execute(select(assignment.c.slot).where(assignment.c.task_id == task_id, assignment.c.repeat == 0, assignment.c.state.in_(LIVE))).scalars())
    return next((slot for slot in range(wanted) if slot not in held), None)


def count(db: Connection, task_id: str, *, taken: int = 0, answered: int = 0) -> None:
    """Changes the counts of a task, and with them whether it is full."""
    db.execute(COUNT, {"task": task_id, "more_taken": taken, "more_answered": answered})


def expire(store: Store, db: Connection, row: Row[Any]) -> None:
    """Ends a lease; what was written as a draft stays."""
    db.execute(update(assignment).where(assignment.c.id == row.id).values(state="expired"))
    if not row.repeat:
        count(db, row.task_id, taken=-1)
    store.log(db, "system", "lease ended", row.id)


def any_expired(store: Store, db: Connection) -> bool:
    """Whether a lease is over its time."""
    return db.execute(EXPIRED.limit(1), {"now": store.now()}).first() is not None


def free_expired(store: Store, db: Connection) -> int:
    """Ends every lease that is over its time."""
    rows = db.execute(EXPIRED, {"now": store.now()}).all()
    for row in rows:
        expire(store, db, row)
    return len(rows)


def own_assignment(db: Connection, actor: Actor, assignment_id: str) -> Row[Any]:
    """An assignment of who asks, with the kind, clips and prompt of its task, and the settings of its project. Raises Denied, 404, for anything else."""
    row = db.execute(OWN, {"assignment": assignment_id, "person": actor.person_id}).first()
    if row is None or not actor.has(LABELER, row.project_id):
        raise Denied(404, "there is nothing here")
    return row


def renew(store: Store, db: Connection, row: Row[Any]) -> None:
    """Gives a lease its full time again, also one that is over while its slot, or another one, is free. Raises Denied, 409, where it was answered, or others have taken its
    place."""
    if row.state not in ("open", "expired"):
        raise Denied(409, "this task is answered")
    take_back(store, db, row)


def take_back(store: Store, db: Connection, row: Row[Any]) -> None:
    """Opens an assignment of any state again. Raises Denied, 409, where its task has no slot left."""
    slot = row.slot
    if row.state not in LIVE and not row.repeat:
        free = free_slot(db, row.task_id)
        if free is None:
            raise Denied(409, "your time for this task is over, and others have taken your place. Go on with the next one")
        slot = free
        count(db, row.task_id, taken=1)
    if row.state == "answered" and not row.repeat:
        count(db, row.task_id, answered=-1)
    minutes = settings_of(db, row.project_id).labeling.lease_minutes
    db.execute(update(assignment).where(assignment.c.id == row.id).values(state="open", slot=slot, lease_until=store.now() + minutes * 60_000))
    if row.state != "open":
        store.log(db, "system", "lease again", row.id)

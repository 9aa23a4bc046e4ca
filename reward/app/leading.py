"""What leads do with projects and people: make and set up, invite, give roles, pause, and see how far the work is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ValidationError
from sqlalchemy import Connection, and_, case, delete, func, insert, select, update

from base_model.errors import UserError
from reward.app import people, security
from reward.app.access import CHILD_SAFETY, LEAD, ROLES
from reward.app.auditing import UNDRAWN
from reward.app.log import canonical
from reward.app.schema import answer, assignment, clip, invitation, item, membership, person, person_private, project, reading, review, session, task, withdrawal
from reward.app.security import IDLE_MS, SESSION_MS, Actor, Denied, sha256
from reward.app.settings import ProjectSettings
from reward.app.store import Store, new_id

EVERYWHERE = "*"
HOUR = 3_600_000
HOURS = 48  # that throughput is drawn of

# Projects


def project_named(db: Connection, project_id: str) -> Any:
    """The row of a project. Raises Denied where there is none."""
    row = db.execute(select(project).where(project.c.id == project_id)).first()
    if row is None:
        raise Denied(404, "there is nothing here")
    return row


def make_project(store: Store, name: str, by: str) -> str:
    """The id of a new, open project. by: a pseudonym. Raises UserError for a name that is empty or taken."""
    name = name.strip()
    _check_text(name, "name")
    with store.writing() as db:
        _check_free(db, name, "")
        project_id = new_id("j")
        db.execute(insert(project), {"id": project_id, "name": name, "state": "open", "settings": {}, "created_at": store.now()})
        store.log(db, by, "project made", project_id)
    return project_id


def _check_text(text: str, where: str, most: int = 200) -> None:
    if not 1 <= len(text) <= most or not text.isprintable():
        raise UserError(f"a name has 1 to {most} characters that can be seen, {where}. Choose another")


def _check_free(db: Connection, name: str, project_id: str) -> None:
    if db.execute(select(project.c.id).where(project.c.name == name, project.c.id != project_id)).first():
        raise UserError("another project has that name, name. Choose another")


def set_state(store: Store, project_id: str, state: Literal["open", "closed"], by: str) -> None:
    """Closes a project, or opens it again. A closed one is on nobody's list, and keeps everything."""
    with store.writing() as db:
        if project_named(db, project_id).state != state:
            db.execute(update(project).where(project.c.id == project_id).values(state=state))
            store.log(db, by, f"project {state}", project_id)


def version_of(settings: Mapping[str, Any]) -> str:
    """Tells whether settings are still those that somebody saw."""
    return sha256(canonical(dict(settings)))[:16]


def change_settings(store: Store, project_id: str, given: Mapping[str, Any], seen: str, by: str) -> None:
    """Puts settings in place of those whose `version_of` is `seen`. given: nested, or as a form sends it ("labeling.takes").

    Raises UserError that names the first field which is unknown or wrong, and Denied where somebody else changed the settings meanwhile.
    """
    try:
        settings = ProjectSettings.model_validate(nested(given))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]).encode(errors="replace").decode()[:200] or "the settings"
        raise UserError(f"{first['msg'].removeprefix('Value error, ')}, {where}. Nothing was changed") from error
    names = [dimension.name for dimension in settings.labeling.dimensions]
    if not names or len(set(names)) < len(names):
        raise UserError("a project asks one question at least, each under a name of its own, labeling.dimensions. Nothing was changed")
    new = settings.model_dump(mode="json", exclude_defaults=True)
    with store.writing() as db:
        old = project_named(db, project_id).settings
        if version_of(old) != seen:
            raise Denied(409, "somebody changed the settings meanwhile. Load the page again")
        db.execute(update(project).where(project.c.id == project_id).values(settings=new))
        changed = sorted({name for name, _ in _leaves(old) ^ _leaves(new)})
        store.log(db, by, "settings changed", project_id, {"fields": changed, "hash": sha256(canonical(new))})


def _leaves(values: Mapping[str, Any], above: str = "") -> set[tuple[str, str]]:
    """(dotted name, canonical value) of everything that is set."""
    found: set[tuple[str, str]] = set()
    for name, value in values.items():
        found |= _leaves(value, f"{above}{name}.") if isinstance(value, Mapping) else {(above + name, canonical(value))}
    return found


def nested(given: Mapping[str, Any]) -> dict[str, Any]:
    """{"labeling.dimensions.0.name": "overall", ...} as the settings are nested. Rows of a list that were left empty are dropped, and an empty number is none."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        place, *more = reversed(name.split(".", 6))
        inside = found
        for part in reversed(more):
            inside = inside.setdefault(part, {})
            if not isinstance(inside, dict):
                raise UserError(f"the field is given twice, {name}. Nothing was changed")
        inside[place] = None if value == "" and name == "retention_days" else value
    dimensions = found.get("labeling", {}).get("dimensions") if isinstance(found.get("labeling"), dict) else None
    if isinstance(dimensions, dict):
        rows = [dimensions[key] for key in sorted(dimensions, key=lambda key: (len(key), key))]
        found["labeling"]["dimensions"] = [row for row in rows if not isinstance(row, dict) or row.get("name") or row.get("question")]
    return found


class Field(BaseModel):
    """One field of the form of settings."""

    name: str  # dotted
    label: str
    help: str
    kind: Literal["text", "long", "whole", "share", "choice"]
    value: str
    least: float | None = None
    most: float | None = None
    group: str


def form_of(settings: ProjectSettings) -> list[Field]:
    """Every setting with what it means; one row more of questions than there are."""
    return _fields(settings, "")


def _fields(model: BaseModel, above: str) -> list[Field]:
    found: list[Field] = []
    for name, about in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            found += _fields(value, f"{above}{name}.")
        elif name == "dimensions":
            for place, each in enumerate([*value, None]):
                found += _question(each, f"{above}{name}.{place}.")
        else:
            found.append(_field(f"{above}{name}", about, value))
    return found


def _question(dimension: Any, above: str) -> list[Field]:
    group, number = above.rsplit(".", 2)[0], int(above.rsplit(".", 2)[1]) + 1
    told = (dimension.name, dimension.question, dimension.sees_prompt) if dimension else ("", "", True)
    return [
        Field(name=f"{above}name", label=f"Question {number}: name", help="As it stands in the exported rankings. Empty: no question.", kind="text", value=told[0], group=group),
        Field(name=f"{above}question", label=f"Question {number}: text", help="", kind="text", value=told[1], group=group),
        Field(name=f"{above}sees_prompt", label=f"Question {number}: is the prompt shown?", help="Those without come first.", kind="choice", value=_word(told[2]), group=group),
    ]


def _field(name: str, about: Any, value: Any) -> Field:
    bounds = {kind: getattr(each, kind) for each in about.metadata for kind in ("ge", "le") if getattr(each, kind, None) is not None}
    kind: Literal["text", "long", "whole", "share", "choice"]
    if isinstance(value, bool):
        kind = "choice"
    elif isinstance(value, str):
        kind = "text" if name == "guideline_version" else "long"
    else:
        kind = "share" if isinstance(value, float) else "whole"
    label = name.rsplit(".", 1)[-1].replace("_", " ")
    least = bounds.get("ge", 1 if name == "retention_days" else None)
    told = _word(value) if isinstance(value, bool) else "" if value is None else str(value)
    return Field(name=name, label=label, help=about.description or "", kind=kind, value=told, least=least, most=bounds.get("le"), group=name.rpartition(".")[0])


def _word(value: bool) -> str:
    return "true" if value else "false"


# People


class Member(BaseModel):
    person_id: str
    pseudonym: str
    name: str | None
    """None for who only reads."""
    state: str
    roles: list[str]
    everywhere: list[str]
    """Roles held in every project."""
    sessions: int
    mine: bool
    """Whether who asks may pause the person and end the sessions."""


class Invited(BaseModel):
    id: str
    roles: list[str]
    invited_by: str
    created_at: int
    expires_at: int
    state: Literal["open", "used", "revoked", "expired"]
    used_by: str | None


def members(store: Store, db: Connection, project_id: str, me: Actor) -> list[Member]:
    """Who holds a role in a project, by name where who asks leads it."""
    rows = db.execute(
        select(membership.c.person_id, membership.c.project_id, membership.c.role, person.c.pseudonym, person.c.state, person_private.c.name)
        .join(person, person.c.id == membership.c.person_id)
        .outerjoin(person_private, person_private.c.person_id == person.c.id)
        .where(membership.c.project_id.in_((project_id, EVERYWHERE)), person.c.state != "deleted")
        .order_by(person.c.pseudonym, membership.c.role)
    ).all()
    now, leads = store.now(), me.has(LEAD, project_id)
    live = and_(session.c.ended_at.is_(None), session.c.created_at > now - SESSION_MS, session.c.seen_at > now - IDLE_MS)
    people_ids = {row.person_id for row in rows}
    held = select(session.c.person_id, func.count()).where(live, session.c.person_id.in_(people_ids)).group_by(session.c.person_id)
    sessions = {person_id: number for person_id, number in db.execute(held)}
    elsewhere: dict[str, set[str]] = {}
    for person_id, place in db.execute(select(membership.c.person_id, membership.c.project_id).where(membership.c.person_id.in_(people_ids))):
        elsewhere.setdefault(person_id, set()).add(place)
    found: dict[str, Member] = {}
    for row in rows:
        told = found.setdefault(
            row.person_id,
            Member(
                person_id=row.person_id,
                pseudonym=row.pseudonym,
                name=row.name if leads else None,
                state=row.state,
                roles=[],
                everywhere=[],
                sessions=sessions.get(row.person_id, 0),
                mine=all(_leads(me, place) for place in elsewhere[row.person_id]),
            ),
        )
        (told.everywhere if row.project_id == EVERYWHERE else told.roles).append(row.role)
    return list(found.values())


def _leads(me: Actor, project_id: str) -> bool:
    return LEAD in (me.roles.get(EVERYWHERE, frozenset()) if project_id == EVERYWHERE else me.roles_in(project_id))


def invitations(store: Store, db: Connection, project_id: str) -> list[Invited]:
    """Newest first."""
    rows = db.execute(
        select(invitation, person.c.pseudonym)
        .outerjoin(person, person.c.id == invitation.c.used_by)
        .where(invitation.c.project_id == project_id)
        .order_by(invitation.c.created_at.desc(), invitation.c.id)
        .limit(200)
    ).all()
    return [
        Invited(
            id=row.id,
            roles=row.roles,
            invited_by=row.invited_by,
            created_at=row.created_at,
            expires_at=row.expires_at,
            state="used" if row.used_at is not None else "revoked" if row.revoked_at is not None else "expired" if row.expires_at <= store.now() else "open",
            used_by=row.pseudonym,
        )
        for row in rows
    ]


def revoke_invitation(store: Store, project_id: str, invitation_id: str, by: str) -> None:
    """Raises Denied where there is no open invitation of that id in the project."""
    still = (invitation.c.id == invitation_id, invitation.c.project_id == project_id, invitation.c.used_at.is_(None), invitation.c.revoked_at.is_(None))
    with store.writing() as db:
        if not db.execute(update(invitation).where(*still).values(revoked_at=store.now())).rowcount:
            raise Denied(404, "there is nothing here")
        store.log(db, by, "invitation revoked", invitation_id, {"project": project_id})


def give_roles(store: Store, project_id: str, person_id: str, roles: Sequence[str], me: Actor) -> None:
    """The roles that a member holds in a project from now on; none takes the person out of it. Sessions and tokens end where anything changed.

    Raises UserError for an unknown role, where a lead would stop being one, and where somebody would take the child-safety role; Denied for who is no member.
    """
    unknown = sorted(set(roles) - set(ROLES))
    if unknown:
        raise UserError(f"no role {unknown[0]!r}, roles. There are {', '.join(ROLES)}")
    with store.writing() as db:
        pseudonym = _member(db, project_id, person_id)
        held = set(db.execute(select(membership.c.role).where(membership.c.person_id == person_id, membership.c.project_id == project_id)).scalars())
        if person_id == me.person_id and LEAD in held and LEAD not in roles:
            raise UserError("you cannot stop being a lead by yourself, roles. Ask another lead")
        if person_id == me.person_id and CHILD_SAFETY in set(roles) - held:
            raise UserError("nobody takes the child-safety role by oneself, roles. Ask another lead")
        taken = sorted(held - set(roles))
        if taken:
            db.execute(delete(membership).where(membership.c.person_id == person_id, membership.c.project_id == project_id, membership.c.role.in_(taken)))
            store.log(db, me.pseudonym, "roles taken", pseudonym, {"project": project_id, "roles": taken})
            security.shut_out(store, db, person_id)
            if LEAD in taken:
                people.revoke_invitations(store, db, by=pseudonym, project_id=project_id)
        people.grant(store, db, person_id, project_id, roles, by=me.pseudonym)


def _member(db: Connection, project_id: str, person_id: str) -> str:
    """The pseudonym of a member of a project."""
    found = db.execute(
        select(person.c.pseudonym)
        .join(membership, membership.c.person_id == person.c.id)
        .where(person.c.id == person_id, membership.c.project_id == project_id, person.c.state != "deleted")
        .limit(1)
    ).scalar()
    if found is None:
        raise Denied(404, "there is nothing here")
    return found


def _own_member(db: Connection, project_id: str, person_id: str, me: Actor) -> str:
    """The pseudonym of a member whose every project the lead leads."""
    pseudonym = _member(db, project_id, person_id)
    places = db.execute(select(membership.c.project_id).where(membership.c.person_id == person_id)).scalars()
    if not all(_leads(me, place) for place in places):
        raise Denied(403, "this person has roles that you do not give. Ask a lead of every project")
    return pseudonym


def set_paused(store: Store, project_id: str, person_id: str, paused: bool, me: Actor) -> None:
    """Who is paused may look at one's account and gets no work. Raises Denied where somebody else has to decide."""
    if person_id == me.person_id:
        raise UserError("nobody pauses oneself, person. Ask another lead")
    with store.writing() as db:
        pseudonym = _own_member(db, project_id, person_id, me)
        old, new = ("active", "paused") if paused else ("paused", "active")
        if db.execute(update(person).where(person.c.id == person_id, person.c.state == old).values(state=new)).rowcount:
            store.log(db, me.pseudonym, "paused" if paused else "unpaused", pseudonym, {"project": project_id})


def end_sessions(store: Store, project_id: str, person_id: str, me: Actor) -> None:
    """Logs a person out everywhere, API tokens included."""
    with store.writing() as db:
        pseudonym = _own_member(db, project_id, person_id, me)
        security.shut_out(store, db, person_id, but=me.session if person_id == me.person_id else "")
        store.log(db, me.pseudonym, "sessions ended", pseudonym, {"project": project_id})


# How far it is


class TaskKind(BaseModel):
    kind: str
    tasks: int
    wanted: int
    """Answers."""
    answered: int
    last_day: int
    """Answers of the last 24 hours."""
    an_hour: float | None
    """Of the hours of the last 24 in which anybody answered."""
    hours_left: float | None


class Queue(BaseModel):
    queue: str
    waiting: int
    done: int
    last_day: int
    an_hour: float | None
    hours_left: float | None


class Progress(BaseModel):
    clips: dict[str, int]
    """By verdict; what is restricted to child safety is not counted, as on every page."""
    withdrawn: int
    tasks: list[TaskKind]
    queues: list[Queue]
    hours: list[int]
    """Beginnings of the last 48 hours, milliseconds."""
    answers: list[int]
    """In each of them."""
    reviews: list[int]
    at_work: int
    """Assignments that are open."""
    people: int
    """Who answered in the last 24 hours."""


def progress_of(store: Store, project_id: str) -> Progress:
    """Counts of everything in a project. Answers and reviews that were taken back are not counted."""
    now = store.now()
    first = (now // HOUR - HOURS + 1) * HOUR
    hours = [first + place * HOUR for place in range(HOURS)]
    with store.reading() as db:
        clips = db.execute(
            select(clip.c.verdict, clip.c.state, func.count()).where(clip.c.project_id == project_id, clip.c.made_of.is_(None)).group_by(clip.c.verdict, clip.c.state)
        ).all()
        answers = _by_hour(db, answer, task, answer.c.task_id == task.c.id, task.c.kind, project_id, first)
        reviews = _by_hour(db, review, item, review.c.item_id == item.c.id, item.c.queue, project_id, first)
        tasks = [_task_kind(row, answers.get(row.kind, {}), now) for row in _task_counts(db, project_id)]
        queues = [_queue(row, reviews.get(row.queue, {}), now) for row in _queue_counts(db, project_id)]
        at_work = db.execute(select(func.count()).where(assignment.c.state == "open", assignment.c.lease_until > now, assignment.c.project_id == project_id)).scalar_one()
        active = db.execute(select(func.count(func.distinct(answer.c.person_id))).where(answer.c.project_id == project_id, answer.c.at > now - 24 * HOUR)).scalar_one()
    return Progress(
        clips={verdict: sum(row[2] for row in clips if row[0] == verdict and row[1] == "live") for verdict in ("allow", "review", "error", "block")},
        withdrawn=sum(row[2] for row in clips if row[1] == "withdrawn"),
        tasks=tasks,
        queues=queues,
        hours=hours,
        answers=[sum(each.get(hour, 0) for each in answers.values()) for hour in hours],
        reviews=[sum(each.get(hour, 0) for each in reviews.values()) for hour in hours],
        at_work=at_work,
        people=active,
    )


def _task_counts(db: Connection, project_id: str) -> Sequence[Any]:
    """What is left is left of tasks that people are given: not of those that wait for a clip, nor of those that are closed, from which no more is wanted than was answered."""
    given = task.c.state.in_(("open", "full"))
    return db.execute(
        select(
            task.c.kind,
            func.count().label("tasks"),
            func.sum(case((task.c.state == "closed", task.c.answered), else_=task.c.wanted)).label("wanted"),
            func.sum(task.c.answered).label("answered"),
            func.sum(case((and_(given, task.c.wanted > task.c.answered), task.c.wanted - task.c.answered), else_=0)).label("left"),
        )
        .where(task.c.project_id == project_id)
        .group_by(task.c.kind)
        .order_by(task.c.kind)
    ).all()


def _queue_counts(db: Connection, project_id: str) -> Sequence[Any]:
    decided = select(reading.c.id).where(reading.c.item_id == item.c.id, reading.c.state == "decided").exists()
    waiting = case((and_(item.c.state != "closed", ~decided), 1), else_=0)
    return db.execute(
        select(item.c.queue, func.sum(waiting).label("waiting"), func.count().label("items"))
        .join(clip, clip.c.id == item.c.clip)
        .where(item.c.project_id == project_id, item.c.queue != UNDRAWN, clip.c.state != "restricted")
        .group_by(item.c.queue)
        .order_by(item.c.queue)
    ).all()


def _by_hour(db: Connection, said: Any, about: Any, on: Any, kind: Any, project_id: str, first: int) -> dict[str, dict[int, int]]:
    """Kind -> beginning of an hour -> how many. Skips and repeats are no answers: they bring no task nearer to its end."""
    hour = (said.c.at - said.c.at % HOUR).label("hour")
    kept = ~select(withdrawal.c.ref).where(withdrawal.c.ref == said.c.id).exists()
    asked = select(kind, hour, func.count()).select_from(said.join(about, on)).where(said.c.project_id == project_id, said.c.at >= first, kept).group_by(kind, hour)
    if about is item:
        asked = asked.join(clip, clip.c.id == item.c.clip).where(clip.c.state != "restricted")
    else:
        asked = asked.join(assignment, assignment.c.id == answer.c.assignment_id).where(assignment.c.state == "answered", assignment.c.repeat == 0)
    found: dict[str, dict[int, int]] = {}
    for name, when, number in db.execute(asked):
        found.setdefault(name, {})[int(when)] = number
    return found


def _pace(hours: Mapping[int, int], left: int, now: int) -> tuple[int, float | None, float | None]:
    """(number of the last 24 hours, an hour of work, hours of work left)."""
    recent = [number for hour, number in hours.items() if hour > now - 24 * HOUR]
    rate = sum(recent) / len(recent) if recent else None
    return sum(recent), rate, 0.0 if not left else left / rate if rate else None


def _task_kind(row: Any, hours: Mapping[int, int], now: int) -> TaskKind:
    last_day, an_hour, hours_left = _pace(hours, int(row.left), now)
    return TaskKind(kind=row.kind, tasks=row.tasks, wanted=int(row.wanted), answered=int(row.answered), last_day=last_day, an_hour=an_hour, hours_left=hours_left)


def _queue(row: Any, hours: Mapping[int, int], now: int) -> Queue:
    last_day, an_hour, hours_left = _pace(hours, int(row.waiting), now)
    return Queue(queue=row.queue, waiting=int(row.waiting), done=row.items - int(row.waiting), last_day=last_day, an_hour=an_hour, hours_left=hours_left)

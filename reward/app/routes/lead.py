"""The leads' room: projects, people, settings, imports, how far the work is, exports and the log."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import Depends, Query, Request
from markupsafe import Markup
from pydantic import BaseModel, Field
from sqlalchemy import ColumnElement, func, or_, select, union_all

from reward.app import auditing, exposure, importing, labeling, leading, people, planting, plots
from reward.app.access import AUDITOR, CHILD_SAFETY, LEAD, MEANING, StoreOf, may
from reward.app.reports import Report, State, report
from reward.app.reviewing import RESTRICTION
from reward.app.schema import event, item, project, reading, review
from reward.app.security import Actor, Denied
from reward.app.settings import settings_of
from reward.app.store import Store
from reward.app.web import Done, Pages
from reward.safety.policy import load_policy

pages = Pages("lead")
Lead = Annotated[Actor, Depends(may(LEAD))]
Reader = Annotated[Actor, Depends(may(LEAD, AUDITOR))]
Name = Annotated[str, Field(min_length=1, max_length=200)]
EVENTS = 100  # on a page of the log

# What every page of the room says


class Place(BaseModel):
    """The project that a page is of, and what who asks may do in it."""

    id: str
    name: str
    state: str
    roles: list[str]
    leads: bool
    everywhere: bool
    """Whether who asks leads or audits every project."""


class Standing(BaseModel):
    """Of what time the numbers are. state: "old" while newer ones are worked out."""

    state: State
    at: int | None
    problem: str


def place_of(store: Store, project_id: str, me: Actor, *, everywhere: bool = False) -> Place:
    """Raises Denied where there is no such project. everywhere: whether the page is also of all projects together."""
    roles, anywhere = me.roles_in(project_id), me.roles.get(leading.EVERYWHERE, frozenset())
    with store.reading() as db:
        name, state = ("Every project", "open") if everywhere and project_id == leading.EVERYWHERE else leading.project_named(db, project_id)[1:3]
    return Place(id=project_id, name=name, state=state, roles=sorted(roles), leads=LEAD in roles, everywhere=bool(anywhere & {LEAD, AUDITOR}))


def standing(found: Report[Any]) -> Standing:
    return Standing(state=found.state, at=found.at, problem=found.problem)


# Projects


class Listed(BaseModel):
    id: str
    name: str
    state: str
    created_at: int


class Projects(BaseModel):
    projects: list[Listed]
    makes: bool
    """Whether who asks may make projects."""


class NewProject(BaseModel):
    name: Name


@pages.view("/projects", "lead_projects.html")
def projects(me: Reader, store: StoreOf) -> Projects:
    """Projects that who asks leads or audits, closed ones too."""
    with store.reading() as db:
        rows = db.execute(select(project).order_by(project.c.state.desc(), project.c.name)).all()
    mine = [Listed(id=row.id, name=row.name, state=row.state, created_at=row.created_at) for row in rows if me.roles_in(row.id) & {LEAD, AUDITOR}]
    return Projects(projects=mine, makes=me.has(LEAD, leading.EVERYWHERE))


@pages.action("/projects")
def make_project(body: NewProject, me: Lead, store: StoreOf) -> Done:
    """A new project. Only who leads every project makes one."""
    if not me.has(LEAD, leading.EVERYWHERE):
        raise Denied(404, "there is nothing here")
    made = leading.make_project(store, body.name, me.pseudonym)
    return Done(done=made, go=f"/projects/{made}/lead/settings")


class NewState(BaseModel):
    state: Literal["open", "closed"]


@pages.action("/projects/{project_id}/lead/state")
def change_state(project_id: str, body: NewState, me: Lead, store: StoreOf) -> Done:
    """Closes a project or opens it again; nothing is lost."""
    leading.set_state(store, project_id, body.state, me.pseudonym)
    return Done(done=f"the project is {body.state}", go=f"/projects/{project_id}/lead/settings")


# Settings


class Settings(BaseModel):
    place: Place
    fields: list[leading.Field]
    settings: dict[str, Any]
    seen: str


@pages.view("/projects/{project_id}/lead/settings", "lead_settings.html")
def settings(project_id: str, me: Reader, store: StoreOf) -> Settings:
    """Everything that is decided about a project, with what it means."""
    place = place_of(store, project_id, me)
    with store.reading() as db:
        held, stored = settings_of(db, project_id), leading.project_named(db, project_id).settings
    return Settings(place=place, fields=leading.form_of(held), settings=held.model_dump(mode="json"), seen=leading.version_of(stored))


@pages.action("/projects/{project_id}/lead/settings")
def change_settings(project_id: str, body: dict[str, Any], me: Lead, store: StoreOf) -> Done:
    """Puts settings in place of those that were seen: `seen` is what the page gave, the rest are settings, nested or dotted; what is left out has its default."""
    seen = body.pop("seen", "")
    leading.change_settings(store, project_id, body, str(seen), me.pseudonym)
    return Done(done="the settings are changed", go=f"/projects/{project_id}/lead/settings")


# People


class Exposed(BaseModel):
    """How long a member looked at clips of severity 3 and 4 in the last seven days, in this project."""

    pseudonym: str
    minutes: float


class People(BaseModel):
    place: Place
    members: list[leading.Member]
    exposure: list[Exposed]
    """Of members who had anything revealed, most first."""
    invitations: list[leading.Invited]
    roles: dict[str, str]
    me: str


class NewInvitation(BaseModel):
    roles: list[str] | str = []


class MadeInvitation(BaseModel):
    link: str
    """Shown this once."""


class NewRoles(BaseModel):
    roles: list[str] | str = []


@pages.view("/projects/{project_id}/lead/people", "lead_people.html")
def people_page(project_id: str, me: Reader, store: StoreOf) -> People:
    """Members with their roles, and invitations. Names are told to leads only."""
    place = place_of(store, project_id, me, everywhere=True)
    with store.reading() as db:
        members, invited = leading.members(store, db, project_id, me), leading.invitations(store, db, project_id)
        week = exposure.week_of(db, None if project_id == leading.EVERYWHERE else project_id, store.now())
    exposed = [Exposed(pseudonym=each.pseudonym, minutes=round(week[each.person_id], 1)) for each in members if each.person_id in week]
    exposed.sort(key=lambda each: (-each.minutes, each.pseudonym))
    return People(place=place, members=members, exposure=exposed, invitations=invited, roles=MEANING, me=me.person_id)


@pages.action("/projects/{project_id}/lead/invitations")
def invite(project_id: str, body: NewInvitation, request: Request, me: Lead, store: StoreOf) -> MadeInvitation:
    """A link that makes one person a member; it works once and for a week, and is shown this once."""
    place_of(store, project_id, me, everywhere=True)
    with store.writing() as db:
        token = people.invite(store, db, project_id=project_id, roles=_list(body.roles), by=me.pseudonym)
    scheme = "https" if request.app.state.settings.secure else request.url.scheme
    return MadeInvitation(link=f"{scheme}://{request.url.netloc}/join/{token}")


@pages.action("/projects/{project_id}/lead/invitations/{invitation_id}/revoke")
def revoke(project_id: str, invitation_id: str, me: Lead, store: StoreOf) -> Done:
    """Ends an invitation that nobody used yet."""
    leading.revoke_invitation(store, project_id, invitation_id, me.pseudonym)
    return Done(done="the invitation is revoked", go=f"/projects/{project_id}/lead/people")


@pages.action("/projects/{project_id}/lead/people/{person_id}/roles")
def give_roles(project_id: str, person_id: str, body: NewRoles, me: Lead, store: StoreOf) -> Done:
    """The roles a member has in the project from now on; none takes the person out of it."""
    leading.give_roles(store, project_id, person_id, _list(body.roles), me)
    return Done(done="the roles are changed", go=f"/projects/{project_id}/lead/people")


@pages.action("/projects/{project_id}/lead/people/{person_id}/pause")
def pause(project_id: str, person_id: str, me: Lead, store: StoreOf) -> Done:
    """Gives a person no more work until the pause ends."""
    leading.set_paused(store, project_id, person_id, True, me)
    return Done(done="paused", go=f"/projects/{project_id}/lead/people")


@pages.action("/projects/{project_id}/lead/people/{person_id}/unpause")
def unpause(project_id: str, person_id: str, me: Lead, store: StoreOf) -> Done:
    """Ends a pause."""
    leading.set_paused(store, project_id, person_id, False, me)
    return Done(done="not paused any more", go=f"/projects/{project_id}/lead/people")


@pages.action("/projects/{project_id}/lead/people/{person_id}/sessions/end")
def end_sessions(project_id: str, person_id: str, me: Lead, store: StoreOf) -> Done:
    """Logs a person out everywhere."""
    leading.end_sessions(store, project_id, person_id, me)
    return Done(done="the sessions were ended", go=f"/projects/{project_id}/lead/people")


def _list(roles: list[str] | str) -> list[str]:
    """A form sends one checked box as a text."""
    return [roles] if isinstance(roles, str) else roles


# How far it is


class Overview(BaseModel):
    place: Place
    standing: Standing
    progress: leading.Progress | None

    def throughput(self) -> Markup:
        assert self.progress is not None
        labels = [datetime.fromtimestamp(hour / 1000, UTC).strftime("%d %b, %H:00") for hour in self.progress.hours]
        lines = [plots.Line("answers", "first", self.progress.answers), plots.Line("reviews", "second", self.progress.reviews)]
        return plots.columns(lines, labels, name="Answers and reviews an hour, UTC", every=12)

    def verdicts(self) -> Markup:
        assert self.progress is not None
        looks = {"allow": "good", "review": "soft", "error": "grey", "block": "bad"}
        return plots.share_bar([(verdict, looks[verdict], number) for verdict, number in self.progress.clips.items()], name="Clips by verdict")


@pages.view("/projects/{project_id}/lead", "lead_overview.html")
def overview(project_id: str, me: Reader, store: StoreOf) -> Overview:
    """How many clips, tasks and items there are, what was done, how fast, and how much time is left."""
    place = place_of(store, project_id, me)
    found = report(store, ("progress", project_id), lambda: leading.progress_of(store, project_id))
    return Overview(place=place, standing=standing(found), progress=found.value)


class NewTasks(BaseModel):
    kind: Literal["rank", "demonstration", "gold", "practice"] = "rank"
    number: Annotated[int, Field(ge=1, le=50)] = 10
    """Of gold or practice tasks; of the others as many are made as there are clips for."""


@pages.action("/projects/{project_id}/lead/tasks")
def make_tasks(project_id: str, body: NewTasks, me: Lead, store: StoreOf) -> Done:
    """Makes tasks of clips that labelers may be shown."""
    place_of(store, project_id, me)
    if body.kind in ("gold", "practice"):
        made = (planting.make_gold if body.kind == "gold" else planting.make_practice)(store, project_id, body.number, me)
    else:
        with store.writing() as db:
            made = (labeling.make_tasks if body.kind == "rank" else labeling.make_demonstrations)(store, db, project_id, me)
    return Done(done=f"{made} tasks made", go=f"/projects/{project_id}/lead")


@pages.action("/projects/{project_id}/lead/audit")
def draw_audit(project_id: str, me: Lead, store: StoreOf) -> Done:
    """Draws clips for reviewers at random, among those that were in no audit yet."""
    place_of(store, project_id, me)
    auditing.draw(store, project_id, me)
    return Done(done="an audit was drawn", go=f"/projects/{project_id}/lead")


# Import


class Import(BaseModel):
    place: Place
    folders: list[str]
    job: importing.Job | None
    runs: list[tuple[str, int]] | None


class NewImport(BaseModel):
    folder: Annotated[str, Field(max_length=2_000)]
    run: Name


@pages.view("/projects/{project_id}/lead/import", "lead_import.html")
def import_page(project_id: str, request: Request, me: Reader, store: StoreOf) -> Import:
    """Folders that can be imported, and how far the import is."""
    from reward.app.signing_off import runs_of

    place = place_of(store, project_id, me)

    def runs() -> list[tuple[str, int]]:
        with store.reading() as db:
            return runs_of(db, project_id)

    found = report(store, ("runs", project_id), runs)
    folders = importing.folders_below(request.app.state.settings.import_roots) if place.leads else []
    return Import(place=place, folders=folders, job=importing.job_of(store, project_id), runs=found.value)


@pages.action("/projects/{project_id}/lead/import")
def begin_import(project_id: str, body: NewImport, request: Request, me: Lead, store: StoreOf) -> Done:
    """Begins to import a folder of the list; the page tells how far it is. Importing again goes on where it ended."""
    place_of(store, project_id, me)
    folder = importing.folder_below(request.app.state.settings.import_roots, body.folder)
    importing.begin_import(store, project_id, folder, body.folder, body.run, me.pseudonym)
    return Done(done="the import has begun", go=f"/projects/{project_id}/lead/import")


# Exports


class Form(BaseModel):
    format: str
    name: str
    what: str


class Exports(BaseModel):
    place: Place
    forms: list[Form]


FORMS = (
    ("parquet", "Parquet", "A ZIP of the tables that rushes reward-model reads: rankings, clips, prompts and people."),
    ("jsonl", "JSON Lines", "One answer a line."),
    ("videoalign", "VideoAlign CSV", "Pairs with an answer for each dimension."),
    ("label-studio", "Label Studio JSON", "Tasks with their annotations."),
    ("trl", "TRL preferences", "Chosen and rejected, for preference trainers."),
    ("demonstrations", "Demonstrations", "Prompt and clip pairs to fine-tune on."),
)


@pages.view("/projects/{project_id}/lead/exports", "lead_exports.html")
def exports(project_id: str, me: Reader, store: StoreOf) -> Exports:
    """What can be taken out, under pseudonyms."""
    return Exports(place=place_of(store, project_id, me), forms=[Form(format=key, name=name, what=what) for key, name, what in FORMS])


# The log


class Event(BaseModel):
    seq: int
    at: int
    actor: str
    kind: str
    subject: str
    body: str
    hash: str


class Log(BaseModel):
    events: list[Event]
    kinds: list[str]
    kind: str
    actor: str
    subject: str
    length: int | None
    """Of the whole log; None for who does not read all of it."""
    before: int | None
    """Where an older page begins; None at the end."""


@pages.view("/log", "lead_log.html")
def log_page(
    me: Reader,
    store: StoreOf,
    kind: Annotated[str, Query(max_length=40)] = "",
    actor: Annotated[str, Query(max_length=40)] = "",
    subject: Annotated[str, Query(max_length=80)] = "",
    before: Annotated[int | None, Query(ge=1, le=2**53)] = None,
) -> Log:
    """Events, newest first: all of them for who leads or audits every project, for others those about their own projects themselves. What tells of a clip that is or was restricted
    to child safety is told to that role alone."""
    everywhere = bool(me.roles.get(leading.EVERYWHERE, frozenset()) & {LEAD, AUDITOR})
    own = [project_id for project_id, roles in me.roles.items() if roles & {LEAD, AUDITOR}]
    with store.reading() as db:
        length = db.execute(select(func.max(event.c.seq))).scalar() or 0
        top = min(before or length + 1, length + 1)
        chosen = [event.c.seq < top] if everywhere else [event.c.seq < top, event.c.subject.in_(own)]
        if not me.has(CHILD_SAFETY, leading.EVERYWHERE):
            chosen.append(~_about_restricted())
        chosen += [column == wanted for column, wanted in ((event.c.kind, kind), (event.c.actor, actor), (event.c.subject, subject)) if wanted]
        rows = db.execute(select(event).where(*chosen).order_by(event.c.seq.desc()).limit(EVENTS)).all()
        kinds = [kind for kind in _kinds(db) if kind not in RESTRICTION or me.has(CHILD_SAFETY, leading.EVERYWHERE)]
    found = [Event(**{name: getattr(row, name) for name in Event.model_fields}) for row in rows]
    older = found[-1].seq if len(found) == EVENTS else None
    return Log(events=found, kinds=kinds, kind=kind, actor=actor, subject=subject, length=length if everywhere else None, before=older if older != 1 else None)


def _about_restricted() -> ColumnElement[bool]:
    """The condition on `event` for what tells that a clip is, or was, for the child-safety role alone."""
    told = event.alias()
    clips = select(told.c.subject).where(told.c.kind == RESTRICTION[0])
    items, readings, reviews = (select(table.c.id).where(table.c.clip.in_(clips)) for table in (item, reading, review))
    codes = [event.c.body.contains(f'"{rule.code}"', autoescape=True) for rule in load_policy().rules if rule.escalate]
    return or_(event.c.kind.in_(RESTRICTION), event.c.subject.in_(union_all(clips, items, readings, reviews)), *codes)


def _kinds(db: Any) -> list[str]:
    """Every kind of event, one step of the index each."""
    found: list[str] = []
    while True:
        after = db.execute(select(func.min(event.c.kind)).where(event.c.kind > (found[-1] if found else ""))).scalar()
        if after is None:
            return found
        found.append(after)

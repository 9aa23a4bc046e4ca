"""The labelers' room: consent, practice, the screen on which clips are ranked or accepted, and their media.

Nothing here says what kind of check a task is, who or what made a clip, or what others answered: clips are places of an assignment, also in addresses.

A task and its clips are read in the event loop: in threads, these short queries would take turns with the one that writes, and next tasks took twice as long.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, Request, Response
from pydantic import BaseModel, Field
from sqlalchemy import bindparam, case, func, select

from reward.app import answering, attention, choosing
from reward.app.access import LABELER, LEAD, StoreOf, may
from reward.app.answering import SKIP_REASONS, Answer, Demonstration, Skip, Taken, Unsafe
from reward.app.choosing import Work, own_assignment
from reward.app.labeling import make_demonstrations, make_tasks, servable, set_priorities
from reward.app.log import canonical
from reward.app.media import send
from reward.app.planting import make_gold, make_practice
from reward.app.schema import answer, assignment, clip, person, project, prompt, task, withdrawal
from reward.app.security import Actor, Denied
from reward.app.settings import Dimension, ProjectSettings, settings_of
from reward.app.store import Store
from reward.app.web import Done, Pages
from reward.safety.policy import load_policy

pages = Pages("labeler")
Me = Annotated[Actor, Depends(may(LABELER))]
Lead = Annotated[Actor, Depends(may(LEAD))]
DAY = 24 * 3_600_000
MOST_DRAFT = 64 << 10
BOX = (16, 9)
"""Of clips whose size is not known."""

# Statements of what labelers ask for again and again, built once: building one takes longer than the database does

ABOUT = (
    select(project.c.name, prompt.c.text, prompt.c.lang)
    .join(prompt, prompt.c.project_id == project.c.id)
    .where(project.c.id == bindparam("project"), prompt.c.prompt_id == bindparam("prompt"))
)
CLIPS = select(clip.c.id, clip.c.row, servable().label("available")).where(clip.c.id.in_(bindparam("clips", expanding=True)))
FILE = select(clip.c.clip_id).where(clip.c.id == bindparam("clip"), servable())
STANDING = (
    select(func.count(), func.sum(case((answer.c.at >= bindparam("midnight"), 1), else_=0)))
    .select_from(answer.join(assignment, (assignment.c.id == answer.c.assignment_id) & (assignment.c.state == "answered")))
    .where(answer.c.person_id == bindparam("person"), answer.c.project_id == bindparam("project"), ~select(withdrawal.c.ref).where(withdrawal.c.ref == answer.c.id).exists())
)


class Room(BaseModel):
    """What a labeler sees of a project."""

    project_id: str
    project: str
    state: str
    """consent, paused, ready."""
    consent: str
    instructions: str
    guideline_version: str
    done: int
    today: int
    practice_left: int
    left_for_me: int
    has_demonstrations: bool
    warned: bool


class Next(BaseModel):
    """The assignment to go on with, or why there is none."""

    assignment_id: str | None
    reason: str
    go: str


class Asked(BaseModel):
    besides: Annotated[str, Field(max_length=40)] | None = None
    work: Work = "rank"


class Shown(BaseModel):
    """A clip on the screen. It is not available where it may not be shown any more."""

    place: int
    media: str
    available: bool


class PolicySeen(BaseModel):
    code: str
    name: str


class Screen(BaseModel):
    """A task as its labeler sees it."""

    assignment_id: str
    project_id: str
    project: str
    work: Work
    state: str
    practice: bool
    prompt: str | None
    """None until what comes before it is answered."""
    lang: str
    clips: list[Shown]
    box: tuple[int, int]
    fps: float
    dimensions: list[Dimension]
    likert: bool
    confidence: bool
    least_watched: float
    lease_until: int
    draft: dict[str, Any] | None
    instructions: str
    guideline_version: str
    policies: list[PolicySeen]
    skip_reasons: dict[str, str]
    done: int
    today: int


class Draft(BaseModel):
    draft: dict[str, Any]


class Kept(BaseModel):
    lease_until: int


class Before(BaseModel):
    """What is said before the prompt is shown, by place."""

    ranks: dict[str, Annotated[tuple[int | None, ...], Field(max_length=6)]]
    all_bad: bool = False


class Prompted(BaseModel):
    prompt: str


class Order(BaseModel):
    """Tasks, the most worthwhile first."""

    tasks: Annotated[list[Annotated[str, Field(max_length=40)]], Field(max_length=10_000)]


class Number(BaseModel):
    number: Annotated[int, Field(ge=1, le=200)] = 20


@pages.view("/projects/{project_id}/label", "label.html")
def labeling_room(project_id: str, me: Me, store: StoreOf) -> Room:
    """Consent, instructions and one's own progress."""
    with store.reading() as db:
        row = db.execute(select(project).where(project.c.id == project_id, project.c.state == "open")).first()
        if row is None:
            raise Denied(404, "there is nothing here")
        settings = settings_of(db, project_id)
        held = db.execute(select(person.c.state, person.c.settings).where(person.c.id == me.person_id)).one()
        agreed = attention.has_consented(held.settings, project_id, settings.consent)
        counts = {(purpose, state): n for purpose, state, n in db.execute(_mine(me, project_id)).all()}
        practised = sum(counts.get(("practice", state), 0) for state in ("answered", "skipped"))
        there = db.execute(select(func.count()).select_from(task).where(task.c.project_id == project_id, task.c.kind == "practice", task.c.state == "open")).scalar_one()
        given = sum(n for (purpose, _), n in counts.items() if purpose in choosing.PURPOSES)
        more = select(task.c.id).where(task.c.project_id == project_id, task.c.kind == "demonstration", task.c.state == "open").limit(1)
        done, today = _progress(db, store, me, project_id)
        standing = attention.standing_of(attention.checks_of(db, me.person_id, project_id), settings.labeling)
        return Room(
            project_id=project_id,
            project=row.name,
            state="paused" if held.state != "active" else "ready" if agreed else "consent",
            consent=settings.consent,
            instructions=settings.instructions,
            guideline_version=settings.guideline_version,
            done=done,
            today=today,
            practice_left=max(0, min(settings.labeling.practice, there) - practised),
            left_for_me=max(0, settings.labeling.most - given),
            has_demonstrations=db.execute(more).first() is not None,
            warned=standing == "warned",
        )


def _mine(me: Actor, project_id: str) -> Any:
    columns = (assignment.c.purpose, assignment.c.state, func.count())
    return select(*columns).where(assignment.c.person_id == me.person_id, assignment.c.project_id == project_id).group_by(assignment.c.purpose, assignment.c.state)


def _progress(db: Any, store: Store, me: Actor, project_id: str) -> tuple[int, int]:
    """Answers of a person that stand: in all, and since midnight UTC. A skip is none."""
    done, today = db.execute(STANDING, {"person": me.person_id, "project": project_id, "midnight": store.now() // DAY * DAY}).one()
    return done, today or 0


@pages.action("/projects/{project_id}/label/consent")
def agree(project_id: str, me: Me, store: StoreOf) -> Done:
    """Agrees to the text as it stands."""
    with store.reading() as db:
        if db.execute(select(project.c.id).where(project.c.id == project_id)).first() is None:
            raise Denied(404, "there is nothing here")
    attention.consent(store, me, project_id)
    return Done(done="thank you", go=f"/projects/{project_id}/label")


@pages.action("/projects/{project_id}/label/next")
def next_task(project_id: str, body: Asked, me: Me, store: StoreOf) -> Next:
    """The open lease besides one that is on the screen, or a new one."""
    offer = choosing.next_assignment(store, me, project_id, besides=body.besides, work=body.work)
    go = f"/assignments/{offer.assignment_id}" if offer.assignment_id else f"/projects/{project_id}/label"
    return Next(assignment_id=offer.assignment_id, reason=offer.reason, go=go)


@pages.view("/assignments/{assignment_id}", "rank.html")
async def screen(assignment_id: str, me: Me, store: StoreOf) -> Screen:
    """One's own task."""
    with store.glancing() as db:
        row = own_assignment(db, me, assignment_id)
        about = db.execute(ABOUT, {"project": row.project_id, "prompt": row.prompt_id}).one()
        settings = ProjectSettings.model_validate(row.settings)
        clips = db.execute(CLIPS, {"clips": row.clips}).all()
        shown, facts = {each.id for each in clips if each.available}, [each.row for each in clips]
        done, today = _progress(db, store, me, row.project_id)
        places = [(place, answering.clip_at(row, place)) for place in range(len(row.clips))]
        return Screen(
            assignment_id=row.id,
            project_id=row.project_id,
            project=about.name,
            work="demonstration" if row.kind == "demonstration" else "rank",
            state=row.state,
            practice=row.kind == "practice",
            prompt=about.text if answering.shows_prompt(row, settings.labeling) else None,
            lang=about.lang,
            clips=[Shown(place=place, media=f"/media/{row.id}/{place}", available=each in shown) for place, each in places],
            box=_box(facts),
            fps=max([float(each.get("fps") or 0) for each in facts] + [1.0]),
            dimensions=sorted(settings.labeling.dimensions, key=lambda each: each.sees_prompt) if row.kind != "demonstration" else [],
            likert=settings.labeling.likert,
            confidence=settings.labeling.confidence,
            least_watched=settings.labeling.least_watched,
            lease_until=row.lease_until,
            draft=(row.draft or {}).get("page"),
            instructions=settings.instructions,
            guideline_version=settings.guideline_version,
            policies=[PolicySeen(code=rule.code, name=rule.name) for rule in load_policy().rules if rule.code.startswith("P")],
            skip_reasons=SKIP_REASONS,
            done=done,
            today=today,
        )


def _box(facts: Any) -> tuple[int, int]:
    """One box for all clips, of the shape of the widest among them."""
    sizes = [(int(each["width"]), int(each["height"])) for each in facts if each.get("width") and each.get("height")]
    return max(sizes, key=lambda size: size[0] / size[1], default=BOX)


@pages.router.get("/media/{assignment_id}/{place}", include_in_schema=False)
async def media(assignment_id: str, place: int, request: Request, me: Me, store: StoreOf) -> Response:
    """A clip of one's own assignment, while it may be shown."""
    with store.glancing() as db:
        row = own_assignment(db, me, assignment_id)
        digest = db.execute(FILE, {"clip": answering.clip_at(row, place)}).scalar()
        if row.state not in choosing.LIVE or digest is None:
            raise Denied(404, "this clip cannot be shown")
    return send(request, store, digest)


@pages.action("/assignments/{assignment_id}/draft")
def draft(assignment_id: str, body: Draft, me: Me, store: StoreOf) -> Kept:
    """Keeps what is on the page, and the lease."""
    try:
        size = len(canonical(body.draft).encode())
    except ValueError as error:
        raise Denied(422, "this draft holds what is no number") from error
    if size > MOST_DRAFT:
        raise Denied(422, f"a draft has {MOST_DRAFT} bytes at most")
    return Kept(lease_until=answering.save_draft(store, me, assignment_id, body.draft))


@pages.action("/assignments/{assignment_id}/prompt")
def show_prompt(assignment_id: str, body: Before, me: Me, store: StoreOf) -> Prompted:
    """Keeps what was said without the prompt, for good, and shows it."""
    answering.reveal_prompt(store, me, assignment_id, body.ranks, body.all_bad)
    with store.reading() as db:
        row = own_assignment(db, me, assignment_id)
        return Prompted(prompt=db.execute(select(prompt.c.text).where(prompt.c.project_id == row.project_id, prompt.c.prompt_id == row.prompt_id)).scalar_one())


@pages.action("/assignments/{assignment_id}/flag")
def flag(assignment_id: str, body: Unsafe, me: Me, store: StoreOf) -> Done:
    """Sends a clip to the reviewers at once."""
    answering.flag(store, me, assignment_id, body)
    return Done(done="a reviewer will look at it; it is not shown any more")


@pages.action("/assignments/{assignment_id}/answer")
def submit(assignment_id: str, body: Answer, me: Me, store: StoreOf) -> Taken:
    """Answers a ranking task."""
    return answering.submit(store, me, assignment_id, body)


@pages.action("/assignments/{assignment_id}/demonstrate")
def demonstrate(assignment_id: str, body: Demonstration, me: Me, store: StoreOf) -> Taken:
    """Answers a demonstration task."""
    return answering.demonstrate(store, me, assignment_id, body)


@pages.action("/assignments/{assignment_id}/skip")
def skip(assignment_id: str, body: Skip, me: Me, store: StoreOf) -> Taken:
    """Leaves a task to others."""
    return answering.skip(store, me, assignment_id, body)


@pages.action("/answers/{answer_id}/undo")
def undo(answer_id: str, me: Me, store: StoreOf) -> Done:
    """Takes back one's last answer."""
    return Done(done="taken back", go=f"/assignments/{answering.undo(store, me, answer_id)}")


# For leads


@pages.action("/projects/{project_id}/tasks")
def deal(project_id: str, me: Lead, store: StoreOf) -> Done:
    """Groups the clips that are in no ranking task yet."""
    with store.writing() as db:
        made = make_tasks(store, db, _known(db, project_id), me)
    return Done(done=f"{made} tasks")


@pages.action("/projects/{project_id}/tasks/demonstrations")
def deal_demonstrations(project_id: str, me: Lead, store: StoreOf) -> Done:
    """Groups the clips that are in no demonstration task yet."""
    with store.writing() as db:
        made = make_demonstrations(store, db, _known(db, project_id), me)
    return Done(done=f"{made} tasks")


@pages.action("/projects/{project_id}/tasks/gold")
def plant_gold(project_id: str, body: Number, me: Lead, store: StoreOf) -> Done:
    """Plants tasks whose answer is known."""
    with store.reading() as db:
        _known(db, project_id)
    return Done(done=f"{make_gold(store, project_id, body.number, me)} tasks")


@pages.action("/projects/{project_id}/tasks/practice")
def plant_practice(project_id: str, body: Number, me: Lead, store: StoreOf) -> Done:
    """Plants tasks for practice."""
    with store.reading() as db:
        _known(db, project_id)
    return Done(done=f"{make_practice(store, project_id, body.number, me)} tasks")


@pages.action("/projects/{project_id}/tasks/order")
def order_tasks(project_id: str, body: Order, me: Lead, store: StoreOf) -> Done:
    """Puts ranking tasks into an order, as `best_first` of the reward package gives it."""
    with store.writing() as db:
        return Done(done=f"{set_priorities(store, db, _known(db, project_id), body.tasks, me)} tasks in order")


def _known(db: Any, project_id: str) -> str:
    """The id of an open project. Raises Denied, 404."""
    if db.execute(select(project.c.id).where(project.c.id == project_id, project.c.state == "open")).first() is None:
        raise Denied(404, "there is nothing here")
    return project_id

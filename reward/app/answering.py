"""What is done with an answer: drafts, suspicions at once, the answer itself, and taking it back.

People answer by place on the screen, as they see it; places become clips here, by the order that was drawn for them. An answer's id is made by the page, so that sending it again
adds nothing. Nothing is
overwritten: an answer that was taken back stays, and the next one is another version.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Connection, Row, bindparam, insert, or_, select, update

from reward.app import attention, choosing
from reward.app.attention import Standing
from reward.app.choosing import own_assignment
from reward.app.labeling import servable_of
from reward.app.log import canonical
from reward.app.planting import fault_of
from reward.app.schema import answer, assignment, clip, item, private_text, withdrawal
from reward.app.security import Actor, Denied, sha256
from reward.app.settings import Dimension, Labeling, ProjectSettings, settings_of
from reward.app.store import Store, new_id
from reward.app.texts import Written
from reward.safety.policy import load_policy

Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{16,40}$")]
Place = Annotated[int, Field(ge=0, le=5)]
Ms = Annotated[int, Field(ge=0, le=7 * 24 * 3_600_000)]
WatchMs = Annotated[int, Field(ge=0, le=2**31 - 1)]
Share = Annotated[float, Field(ge=0, le=1)]
Rank = Annotated[int, Field(ge=1, le=6)]
SKIP_REASONS = {
    "language": "I do not understand the prompt",
    "undecidable": "I cannot decide",
    "technical": "it does not play here",
    "unwilling": "I would rather not look at this",
}
Reason = Literal["language", "undecidable", "technical", "unwilling"]
APP_VERSION = version("rushes")

# Statements that every answer needs are built once: building one takes longer than the database does

SENT = select(answer).where(or_(answer.c.id == bindparam("answer"), answer.c.assignment_id == bindparam("assignment")))
KEEP = insert(answer)
CLOSE = update(assignment).where(assignment.c.id == bindparam("assignment")).values(state=bindparam("how"))
FLAGGED = select(item.c.clip, item.c.why).where(item.c.clip.in_(bindparam("clips", expanding=True)), item.c.queue == "flagged", item.c.source == bindparam("assignment"))


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Unsafe(_Strict):
    """A clip that somebody suspects."""

    place: Place
    policies: Annotated[tuple[str, ...], Field(min_length=1, max_length=20)]


class Watching(_Strict):
    """How the clips were looked at; lists go by place."""

    id: Id
    watched: Annotated[tuple[Share, ...], Field(max_length=6)]
    """Share of each clip that was on the screen while it played or stood."""
    watch_ms: Annotated[tuple[WatchMs, ...], Field(max_length=6)]
    lead_time_ms: Ms


class Answer(Watching):
    """A ranking, by place on the screen."""

    ranks: dict[str, Annotated[tuple[Rank | None, ...], Field(max_length=6)]] = {}
    """Dimension -> rank of each place; 1 is best, equal ones tie, null is not ranked."""
    all_bad: bool = False
    """None is better than another, and none is good."""
    broken: Annotated[tuple[Place, ...], Field(max_length=6)] = ()
    unsafe: Annotated[tuple[Unsafe, ...], Field(max_length=6)] = ()
    likert: Annotated[tuple[Annotated[int, Field(ge=1, le=5)] | None, ...], Field(max_length=6)] | None = None
    confidence: Share | None = None
    comment: Annotated[Written, Field(max_length=2_000)] = ""


class Demonstration(Watching):
    """Which clips are worth imitating, and what they show."""

    accepted: Annotated[tuple[bool | None, ...], Field(max_length=6)]
    best: Place | None = None
    caption: Written = ""
    """The prompt as it should have been; empty where it is right."""
    unsafe: Annotated[tuple[Unsafe, ...], Field(max_length=6)] = ()


class Skip(_Strict):
    id: Id
    reason: Reason


class Feedback(_Strict):
    """What was expected of a practice task."""

    right: bool | None
    expected: dict[str, list[int | None]]
    notes: list[str]


class Taken(_Strict):
    """An answer that is kept."""

    answer_id: str
    assignment_id: str
    standing: Standing
    feedback: Feedback | None = None


# Drafts and what comes before an answer


def save_draft(store: Store, actor: Actor, assignment_id: str, draft: Mapping[str, Any]) -> int:
    """Keeps what a page holds and gives the lease its full time again; returns until when. Raises Denied where the task is answered or lost."""
    with store.writing() as db:
        row = own_assignment(db, actor, assignment_id)
        choosing.renew(store, db, row)
        kept = {**(row.draft or {}), "page": dict(draft)}
        db.execute(update(assignment).where(assignment.c.id == row.id).values(draft=kept))
        return db.execute(select(assignment.c.lease_until).where(assignment.c.id == row.id)).scalar_one()


def reveal_prompt(store: Store, actor: Actor, assignment_id: str, ranks: Mapping[str, Sequence[int | None]], all_bad: bool) -> None:
    """Writes down the ranks of the dimensions that do not see the prompt; from now on it may be shown, and they stay. Raises Denied where one of them is missing."""
    with store.writing() as db:
        row = own_assignment(db, actor, assignment_id)
        choosing.renew(store, db, row)
        if (row.draft or {}).get("before_prompt") is not None:
            return
        blind = blind_dimensions(settings_of(db, row.project_id).labeling)
        usable = _usable(db, row, ())
        _check_questions([each.name for each in blind], ranks, all_bad, usable, len(row.clips))
        ties = [1 if place in usable else None for place in range(len(row.clips))]
        kept = {name: ties if all_bad else list(ranks.get(name, [])) for name in (each.name for each in blind)}
        db.execute(update(assignment).where(assignment.c.id == row.id).values(draft={**(row.draft or {}), "before_prompt": kept}))
        store.log(db, actor.pseudonym, "prompt shown", row.id, {"before": sha256(canonical(kept))})


def blind_dimensions(settings: Labeling) -> list[Dimension]:
    """Those that are asked before the prompt is shown."""
    return [each for each in settings.dimensions if not each.sees_prompt]


def shows_prompt(row: Row[Any], settings: Labeling) -> bool:
    """Whether an assignment's prompt may be shown now."""
    return row.kind == "demonstration" or not blind_dimensions(settings) or (row.draft or {}).get("before_prompt") is not None


def flag(store: Store, actor: Actor, assignment_id: str, unsafe: Unsafe) -> None:
    """Puts a clip of an open task into the review queue, at once; the task goes on without it."""
    with store.writing() as db:
        row = own_assignment(db, actor, assignment_id)
        choosing.renew(store, db, row)
        _flag(store, db, actor, row, [unsafe])


def _flag(store: Store, db: Connection, actor: Actor, row: Row[Any], unsafe: Sequence[Unsafe]) -> None:
    """Once for each clip of an assignment, and again for what was not said of it before."""
    from reward.app import reviewing

    policy = load_policy()
    for each in unsafe:
        unknown = [code for code in each.policies if code not in policy]
        if unknown:
            raise Denied(422, f"there is no policy {unknown[0][:20]}. Choose from the list")
        clip_id = row.clips[_clip_at(row, each.place)]
        if not set(each.policies) <= flagged_by(db, row).get(reviewing.source_of(db, clip_id), set()):
            reviewing.flag(store, db, clip=clip_id, policies=each.policies, source=row.id, by=actor)


def flagged_by(db: Connection, row: Row[Any]) -> dict[str, set[str]]:
    """The clips that were called unsafe under an assignment, and the policies that were named."""
    found: dict[str, set[str]] = {}
    for clip_id, why in db.execute(FLAGGED, {"clips": row.clips, "assignment": row.id}):
        found.setdefault(clip_id, set()).update(why["policies"])
    return found


# The answer


def submit(store: Store, actor: Actor, assignment_id: str, given: Answer) -> Taken:
    """Keeps an answer. Raises Denied: 404 for another's task, 409 for one that is answered or lost, 422 for what is no answer to it."""

    def body(db: Connection, row: Row[Any], settings: ProjectSettings) -> dict[str, Any]:
        if row.kind == "demonstration":
            raise Denied(422, "this task asks for a demonstration")
        k, labeling = len(row.clips), settings.labeling
        _check_places(k, [*given.broken, *(each.place for each in given.unsafe)])
        usable = _usable(db, row, (*given.broken, *(each.place for each in given.unsafe)))
        unknown = sorted(set(given.ranks) - {each.name for each in labeling.dimensions})
        if unknown:
            raise Denied(422, f"nobody asks for {unknown[0][:40]}")
        _check_questions([each.name for each in labeling.dimensions], given.ranks, given.all_bad, usable, k)
        _check_watched(given, usable, k, labeling)
        before = (row.draft or {}).get("before_prompt")
        if 0 < len(blind_dimensions(labeling)) < len(labeling.dimensions) and before is None and not given.all_bad and len(usable) > 1:
            raise Denied(422, "answer what comes before the prompt first")
        if before is not None and not given.all_bad and any(list(given.ranks.get(name, ())) != ranks for name, ranks in before.items() if ranks):
            raise Denied(422, "what was said before the prompt was shown stays as it was")
        if labeling.likert and (given.likert is None or len(given.likert) != k or any(given.likert[place] is None for place in usable)):
            raise Denied(422, "rate every clip, 1 to 5")
        if labeling.confidence and given.confidence is None:
            raise Denied(422, "say how sure you are")
        ranks = _ranks_by_clip(row, given, [each.name for each in labeling.dimensions], usable)
        rated = given.likert is not None and len(given.likert) == k and None not in given.likert
        return {
            "what": "rank",
            "ranks": ranks,
            "all_bad": given.all_bad,
            "broken": sorted(_clip_at(row, place) for place in set(given.broken)),
            "unsafe": sorted(row.clips.index(each) for each in flagged_by(db, row).keys() | {row.clips[_clip_at(row, each.place)] for each in given.unsafe}),
            "likert": _by_clip(row, given.likert) if rated and given.likert is not None else None,
            "confidence": given.confidence,
            "comment": _keep_text(store, db, actor, given.comment),
            "ok": attention.checked(db, row, ranks),
            **_watching(row, given),
        }

    return _record(store, actor, assignment_id, given, "answered", body)


def demonstrate(store: Store, actor: Actor, assignment_id: str, given: Demonstration) -> Taken:
    """Keeps a demonstration. Raises Denied as `submit` does."""

    def body(db: Connection, row: Row[Any], settings: ProjectSettings) -> dict[str, Any]:
        if row.kind != "demonstration":
            raise Denied(422, "this task asks for a ranking")
        k = len(row.clips)
        _check_places(k, [each.place for each in given.unsafe])
        usable = _usable(db, row, [each.place for each in given.unsafe])
        _check_watched(given, usable, k, settings.labeling)
        if len(given.accepted) != k or any(given.accepted[place] is None for place in usable):
            raise Denied(422, "accept or reject every clip")
        if given.best is not None and (given.best not in usable or not given.accepted[given.best]):
            raise Denied(422, "the best clip is one of those that you accept")
        return {
            "what": "demonstration",
            "accepted": [bool(yes) if row.shown_order[at] in usable else None for at, yes in enumerate(_by_clip(row, given.accepted))],
            "best": None if given.best is None else _clip_at(row, given.best),
            "caption": _keep_text(store, db, actor, given.caption),
            **_watching(row, given),
        }

    return _record(store, actor, assignment_id, given, "answered", body)


def skip(store: Store, actor: Actor, assignment_id: str, given: Skip) -> Taken:
    """Leaves a task to others, with the reason."""
    return _record(store, actor, assignment_id, given, "skipped", lambda _db, _row, _settings: {"what": "skip", "reason": given.reason})


def _record(store: Store, actor: Actor, assignment_id: str, given: Answer | Demonstration | Skip, state: Literal["answered", "skipped"], body: Any) -> Taken:
    asked = sha256(canonical([assignment_id, type(given).__name__, given.model_dump(mode="json")]))
    with store.writing() as db:
        row = own_assignment(db, actor, assignment_id)
        before = db.execute(SENT, {"answer": given.id, "assignment": row.id}).all()
        sent = next((each for each in before if each.id == given.id), None)
        if sent is not None:
            if sent.person_id != actor.person_id or sent.body["asked"] != asked or _withdrawn(db, given.id):
                raise Denied(409, "an answer with this id is there already, and it is another one")
            return _taken(db, actor, sent.id, row, sent.body)
        if row.state != "open":
            choosing.renew(store, db, row)
        settings = ProjectSettings.model_validate(row.settings)
        made = {**body(db, row, settings), "asked": asked, "guideline_version": settings.guideline_version, "app_version": APP_VERSION}
        if not isinstance(given, Skip):
            _flag(store, db, actor, row, given.unsafe)
        last = max((each.version for each in before), default=0)
        ids = {"id": given.id, "project_id": row.project_id, "task_id": row.task_id, "assignment_id": row.id, "person_id": actor.person_id}
        db.execute(KEEP, {**ids, "version": last + 1, "body": made, "at": store.now()})
        db.execute(CLOSE, {"assignment": row.id, "how": state})
        if not row.repeat:
            choosing.count(db, row.task_id, **({"answered": 1} if state == "answered" else {"taken": -1}))
        store.log(db, actor.pseudonym, state, row.id, {"answer": given.id, "version": last + 1, "body": sha256(canonical(made))})
        if row.purpose in attention.CHECKS:
            attention.look_at(store, db, actor, row.project_id)
        return _taken(db, actor, given.id, row, made)


def _taken(db: Connection, actor: Actor, answer_id: str, row: Row[Any], body: Mapping[str, Any]) -> Taken:
    """What the page is told; how somebody stands is said where it has changed, and not after every check: who was warned would learn which tasks are checks."""
    standing: Standing = "fine"
    if row.purpose in attention.CHECKS:
        if body.get("ok") is not None:
            checks, settings = attention.checks_of(db, actor.person_id, row.project_id), settings_of(db, row.project_id).labeling
            now = attention.standing_of(checks, settings)
            standing = now if now != attention.standing_of(checks[1:], settings) else "fine"
        standing = "paused" if attention.is_paused(db, actor.person_id) else standing
    return Taken(answer_id=answer_id, assignment_id=row.id, standing=standing, feedback=_feedback(db, row, body) if row.kind == "practice" and body["what"] == "rank" else None)


def _feedback(db: Connection, row: Row[Any], body: Mapping[str, Any]) -> Feedback:
    """What was expected, by place, and what was done to the clips."""
    rows = dict(db.execute(select(clip.c.id, clip.c.row).where(clip.c.id.in_(row.clips))).all())
    notes = [""] * len(row.clips)
    for at, each in enumerate(row.clips):
        fault = fault_of(rows[each])
        notes[row.shown_order[at]] = f"{fault} on purpose" if fault else "as it was made"
    expected = {name: _by_place(row, ranks) for name, ranks in (row.truth or {}).items()}
    return Feedback(right=body["ok"], expected=expected, notes=notes)


# Taking back


def undo(store: Store, actor: Actor, answer_id: str) -> str:
    """Takes back one's last answer: its task is open again. Returns the assignment. Raises Denied: 404 for another's, 409 where it is not the last one, or the task has no slot
    left."""
    with store.writing() as db:
        sent = db.execute(select(answer).where(answer.c.id == answer_id, answer.c.person_id == actor.person_id)).first()
        if sent is None:
            raise Denied(404, "there is nothing here")
        row = own_assignment(db, actor, sent.assignment_id)
        if _withdrawn(db, answer_id):
            return row.id
        later = select(answer.c.id).outerjoin(withdrawal, withdrawal.c.ref == answer.c.id)
        later = later.where(answer.c.person_id == actor.person_id, answer.c.project_id == sent.project_id, answer.c.at > sent.at, withdrawal.c.ref.is_(None))
        if db.execute(later.limit(1)).first():
            raise Denied(409, "only the last answer can be taken back")
        if row.kind == "practice" and row.state == "answered":
            raise Denied(409, "a practice task is over once its answer was explained")
        choosing.take_back(store, db, row)
        db.execute(insert(withdrawal), {"ref": answer_id, "kind": "answer", "person_id": actor.person_id, "at": store.now()})
        store.log(db, actor.pseudonym, "answer taken back", row.id, {"answer": answer_id})
        return row.id


def _withdrawn(db: Connection, answer_id: str) -> bool:
    return db.execute(select(withdrawal.c.ref).where(withdrawal.c.ref == answer_id)).first() is not None


# Places and clips


def _clip_at(row: Row[Any], place: int) -> int:
    """Which clip of the task is at a place. Raises Denied for a place that is not there."""
    if place >= len(row.clips):
        raise Denied(422, f"there is no place {place + 1} on the screen")
    found: int = row.shown_order.index(place)
    return found


def _by_clip(row: Row[Any], by_place: Sequence[Any]) -> list[Any]:
    return [by_place[place] for place in row.shown_order]


def _by_place(row: Row[Any], by_clip: Sequence[Any]) -> list[Any]:
    return [by_clip[_clip_at(row, place)] for place in range(len(by_clip))]


def clip_at(row: Row[Any], place: int) -> str:
    """The id of the clip at a place. Raises Denied, 404, where there is none."""
    if not 0 <= place < len(row.clips):
        raise Denied(404, "there is nothing here")
    found: str = row.clips[_clip_at(row, place)]
    return found


def _usable(db: Connection, row: Row[Any], without: Sequence[int]) -> list[int]:
    """Places of clips that can be judged: may be shown, and are neither broken nor unsafe."""
    shown = servable_of(db, row.clips)
    return [place for place in range(len(row.clips)) if place not in without and clip_at(row, place) in shown]


def _ranks_by_clip(row: Row[Any], given: Answer, names: Sequence[str], usable: Sequence[int]) -> dict[str, list[int | None]]:
    k = len(row.clips)
    found = {}
    for name in names:
        by_place = [1] * k if given.all_bad else list(given.ranks.get(name, [None] * k))
        found[name] = _by_clip(row, [rank if place in usable else None for place, rank in enumerate(by_place)])
    return found


def _watching(row: Row[Any], given: Watching) -> dict[str, Any]:
    return {"watched": _by_clip(row, given.watched), "watch_ms": _by_clip(row, given.watch_ms), "lead_time_ms": given.lead_time_ms}


def _keep_text(store: Store, db: Connection, actor: Actor, text: str) -> str | None:
    """The id of a text in the table that can be emptied; None for an empty one."""
    text = text.strip()
    if not text:
        return None
    text_id = new_id("x")
    db.execute(insert(private_text), {"id": text_id, "person_id": actor.person_id, "text": text, "created_at": store.now()})
    return text_id


# Checks


def _check_places(k: int, places: Sequence[int]) -> None:
    for place in places:
        if place >= k:
            raise Denied(422, f"there is no place {place + 1} on the screen")


def _check_questions(names: Sequence[str], ranks: Mapping[str, Sequence[int | None]], all_bad: bool, usable: Sequence[int], k: int) -> None:
    if any(len(each) != k or any(rank is not None and not 1 <= rank <= k for rank in each) for each in ranks.values()):
        raise Denied(422, f"a ranking has {k} ranks from 1 to {k}, or null")
    if all_bad or len(usable) < 2:
        return
    for name in names:
        if sum(ranks.get(name, [None] * k)[place] is not None for place in usable) < 2:
            raise Denied(422, f"rank two clips at least: {name}")


def _check_watched(given: Watching, usable: Sequence[int], k: int, settings: Labeling) -> None:
    if len(given.watched) != k or len(given.watch_ms) != k:
        raise Denied(422, f"say of each of {k} clips how much of it was watched")
    short = [place for place in usable if given.watched[place] < settings.least_watched]
    if short:
        raise Denied(422, f"watch every clip first: of clip {'ABCDEF'[short[0]]}, {given.watched[short[0]]:.0%} was seen, {settings.least_watched:.0%} are needed")

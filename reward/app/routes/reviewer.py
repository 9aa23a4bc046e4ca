"""The reviewers' room: queues, one clip at a time, what was decided, and one's own exposure."""

from __future__ import annotations

import json
from typing import Annotated, Any

from fastapi import Depends, Request, Response
from pydantic import BaseModel, Field
from sqlalchemy import Connection, Row, select

from reward.app import auditing, exposure, media, reviewing
from reward.app.access import AUDITOR, LEAD, REVIEWERS, SENIOR, StoreOf, may
from reward.app.exposure import Rest
from reward.app.reviewing import SENIORS, Decision, Draft, Level, Personal, Queue
from reward.app.schema import clip, item, person, project, prompt, reveal, review, withdrawal
from reward.app.security import Actor, Denied
from reward.app.settings import settings_of
from reward.app.store import Store
from reward.app.texts import Written
from reward.app.web import Done, Pages, when
from reward.safety.policy import load_policy

pages = Pages("review")
Reviewer = Annotated[Actor, Depends(may(*REVIEWERS))]
Overseer = Annotated[Actor, Depends(may(SENIOR, LEAD))]
Reader = Annotated[Actor, Depends(may(SENIOR, LEAD, AUDITOR))]
ReviewId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,40}$")]

TITLES = {
    "blocked": ("Blocked, drawn at random", "Was it right to block these?"),
    "random": ("Passed, drawn at random", "What slipped through, with every clip as likely."),
    "stratified": ("Passed, drawn by score", "What slipped through, with doubtful clips more likely."),
    "review": ("For a person to decide", "The filters asked for one."),
    "disagreement": ("Disagreement", "Filters contradict each other, or a filter and a person do."),
    "errors": ("Errors", "No filter could judge these."),
    "flagged": ("Flagged", "A labeler said these are unsafe."),
    "appeals": ("Appeals", "Somebody contests a decision."),
    "escalation": ("Escalation", "Readers differ, or passed these on."),
}
LONGEST_DECISIONS = 100


# What is shown


class PolicyText(BaseModel):
    code: str
    name: str
    severity: int
    counts: str
    not_counts: str
    restricted: bool


class QueueSeen(BaseModel):
    queue: str
    title: str
    about: str
    open: int


class Exposure(BaseModel):
    """What somebody was shown. Minutes are of clips of severity 3 and 4."""

    minutes_today: float
    minutes_a_day: int
    break_after_minutes: int
    looks_today: int
    revealed_week: dict[str, int]
    rest_until: int | None
    rest_why: str


class Room(BaseModel):
    project_id: str
    project: str
    queues: list[QueueSeen]
    exposure: Exposure
    personal: Personal
    policies: list[PolicyText]
    senior: bool
    few_readers: bool


class Earlier(BaseModel):
    """A decision that an appeal or an escalation is about."""

    said: str
    policies: list[str]
    rationale: str


class FilterSaid(BaseModel):
    filter: str
    policy: str
    verdict: str
    score: float | None
    threshold: float
    reasons: list[str]


class Decided(BaseModel):
    """What follows from a decision, and what was hidden before it."""

    review_id: str
    said: str
    policies: list[str]
    undo_until: int | None
    """None where it has taken effect already."""
    why: list[str]
    verdict: str
    filters: list[FilterSaid]


class Screen(BaseModel):
    reading_id: str
    project_id: str
    queue: str
    title: str
    prompt: str
    lang: str
    why: list[str] | None
    """None while it is hidden."""
    earlier: list[Earlier]
    appealed: bool
    lease_until: int
    draft: Draft
    revealed: list[str]
    missing: list[str]
    fps: float | None
    frames: int | None
    seconds: float | None
    width: int | None
    height: int | None
    flashes: bool
    flash_known: bool
    personal: Personal
    policy_version: str
    about: str
    policies: list[PolicyText]
    undo_seconds: int
    restricted: bool
    decided: Decided | None


class DecisionSeen(BaseModel):
    review_id: str
    at: int
    reader: str
    said: str
    policies: list[str]
    severity: int
    queue: str
    verdict: str
    mine: bool
    contested: bool


class Decisions(BaseModel):
    project_id: str
    decisions: list[DecisionSeen]
    may_appeal: bool
    policies: dict[str, str]
    """Of which clips may be planted."""


def policy_texts() -> list[PolicyText]:
    codes = reviewing.guidance()["codes"]
    return [
        PolicyText(code=rule.code, name=rule.name, severity=rule.severity, counts=codes[rule.code]["counts"], not_counts=codes[rule.code]["not"], restricted=rule.escalate)
        for rule in load_policy().rules
    ]


# The room


@pages.view("/review/{project_id}", "review_room.html")
def review_room(project_id: str, me: Reviewer, store: StoreOf) -> Room:
    """Queues with what waits in them, one's exposure and settings."""
    reviewing.catch_up(store, project_id)
    with store.reading() as db:
        name = db.execute(select(project.c.name).where(project.c.id == project_id)).scalar()
        if name is None:
            raise Denied(404, reviewing.NOTHING)
        waiting = reviewing.counts(db, me, project_id)
        found = exposure_of(store, db, me, project_id)
        few = reviewing.reviewers_left(db, project_id) < 2
    queues = [QueueSeen(queue=queue, title=title, about=about, open=waiting.get(queue, 0)) for queue, (title, about) in TITLES.items() if queue not in SENIORS or queue in waiting]
    queues.sort(key=lambda each: not each.open)
    senior = me.has(SENIOR, project_id)
    return Room(
        project_id=project_id,
        project=name,
        queues=queues,
        exposure=found,
        personal=reviewing.personal_of(me),
        policies=policy_texts(),
        senior=senior,
        few_readers=few,
    )


def exposure_of(store: Store, db: Connection, me: Actor, project_id: str) -> Exposure:
    settings, now = settings_of(db, project_id).reviewing, store.now()
    today, week = now - now % exposure.DAY, now - 7 * exposure.DAY
    looks = exposure.looks_of(db, me.person_id, now - exposure.DAY, now)
    rest = exposure.rest_of(looks, now, settings)
    levels = list(db.execute(select(reveal.c.level).where(reveal.c.person_id == me.person_id, reveal.c.at >= week)).scalars())
    since = [look for look in looks if look.start >= today]
    return Exposure(
        minutes_today=round(exposure.minutes(since), 1),
        minutes_a_day=settings.exposure_minutes,
        break_after_minutes=settings.break_after_minutes,
        looks_today=len(since),
        revealed_week={level: levels.count(level) for level in reviewing.LEVELS},
        rest_until=rest.until if rest else None,
        rest_why=rest.why if rest else "",
    )


@pages.action("/review/{project_id}/settings")
def review_settings(project_id: str, body: Personal, me: Reviewer, store: StoreOf) -> Done:
    """How clips are shown to oneself."""
    reviewing.set_personal(store, me, body)
    return Done(done="kept", go=f"/review/{project_id}")


class Asked(BaseModel):
    queue: Queue


@pages.action("/review/{project_id}/next")
def review_next(project_id: str, body: Asked, me: Reviewer, store: StoreOf) -> Done:
    """Takes the next item of a queue, or the one that is open already."""
    found = reviewing.next_reading(store, me, project_id, body.queue)
    if isinstance(found, Rest):
        raise Denied(409, f"{found.why} Until {when(found.until)}.")
    if found is None:
        raise Denied(409, "nothing waits for you in this queue")
    return Done(done=found, go=f"/reading/{found}")


@pages.action("/review/{project_id}/draw")
def review_draw(project_id: str, me: Overseer, store: StoreOf) -> Done:
    """Draws a wave of clips for the audits."""
    drawn = auditing.draw(store, project_id, me)
    told = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in drawn.items())
    return Done(done=told, go=f"/review/{project_id}/decisions")


@pages.view("/review/{project_id}/decisions", "review_decisions.html")
def review_decisions(project_id: str, me: Reader, store: StoreOf) -> Decisions:
    """The newest decisions that have taken effect, without pictures, and of clips that nobody else is asked about any more."""
    reviewing.catch_up(store, project_id)
    waits = item.alias()
    still_read = select(waits.c.id).where(waits.c.clip == review.c.clip, waits.c.state != "closed").exists()  # who saw what the first one said is no blind reader
    with store.reading() as db:
        rows = db.execute(
            select(review, item.c.queue, item.c.why, clip.c.verdict, person.c.pseudonym)
            .join(item, item.c.id == review.c.item_id)
            .join(clip, clip.c.id == review.c.clip)
            .join(person, person.c.id == review.c.person_id)
            .where(review.c.project_id == project_id, item.c.state == "closed", clip.c.state.in_(("live", "withdrawn")), review.c.id.not_in(select(withdrawal.c.ref)), ~still_read)
            .order_by(review.c.at.desc(), review.c.id)
            .limit(LONGEST_DECISIONS)
        ).all()
        contested = set(db.execute(select(item.c.source).where(item.c.project_id == project_id, item.c.queue == "appeals")).scalars())
    found = [
        DecisionSeen(
            review_id=row.id, at=row.at, reader=row.pseudonym, said=row.said, policies=row.body["policies"], severity=row.body["severity"], queue=row.queue, verdict=row.verdict,
            mine=row.person_id == me.person_id, contested=row.id in contested,
        )
        for row in rows
    ]  # fmt: skip
    plantable = {rule.code: rule.name for rule in load_policy().rules if not rule.escalate}
    return Decisions(project_id=project_id, decisions=found, may_appeal=me.has(SENIOR, project_id) or me.has(LEAD, project_id), policies=plantable)


class Gold(BaseModel):
    """A clip whose truth is known."""

    clip: Annotated[str, Field(min_length=1, max_length=64)]
    """Its id, or the digest of its frames."""
    policies: list[str] | str = []
    """What it violates; none where it is harmless."""


@pages.action("/review/{project_id}/gold")
def review_gold(project_id: str, body: Gold, me: Overseer, store: StoreOf) -> Done:
    """Plants a clip whose truth is known among those of the random audit."""
    codes = [body.policies] if isinstance(body.policies, str) else body.policies  # a form sends one checked box as a text
    auditing.plant(store, project_id, body.clip.strip(), codes, me)
    return Done(done="the clip is planted", go=f"/review/{project_id}/decisions")


class Appeal(BaseModel):
    review_id: ReviewId
    reason: Annotated[Written, Field(min_length=1)]


@pages.action("/review/{project_id}/appeal")
def review_appeal(project_id: str, body: Appeal, me: Overseer, store: StoreOf) -> Done:
    """Contests another person's decision."""
    reviewing.appeal(store, me, project_id, body.review_id, body.reason)
    return Done(done="a senior who is neither of you will decide", go=f"/review/{project_id}/decisions")


# One clip


@pages.view("/reading/{reading_id}", "reading.html")
def reading_screen(reading_id: str, me: Reviewer, store: StoreOf) -> Screen:
    """A reading of one's own: the text, what may be seen so far, the policy and the draft."""
    with store.reading() as db:
        row = reviewing.own_reading(db, me, reading_id)
        settings = settings_of(db, row.project_id).reviewing
        text = db.execute(select(prompt.c.text, prompt.c.lang).where(prompt.c.project_id == row.project_id, prompt.c.prompt_id == row.prompt_id)).first()
        done = db.execute(select(review).where(review.c.reading_id == reading_id, review.c.id.not_in(select(withdrawal.c.ref))).order_by(review.c.version.desc()).limit(1)).first()
        shown, draft = sorted(reviewing.revealed(db, reading_id)), reviewing.draft_of(db, row)
        earlier = earlier_of(db, row) if row.queue in SENIORS else []
        decided = decided_of(row, done, settings.undo_seconds) if done is not None and row.state == "decided" else None
    queue = reviewing.shown_queue(row)
    hide = settings.hide_filter and queue in reviewing.AUDITS
    facts, missing = facts_of(store, row.clip_id), missing_of(store, row.clip_id)
    return Screen(
        reading_id=reading_id,
        project_id=row.project_id,
        queue=queue,
        title=TITLES[queue][0] if not hide or decided else "Audit",
        prompt=text.text if text else "",
        lang=text.lang if text else "",
        why=None if hide and decided is None else why_of(row),
        earlier=earlier,
        appealed=row.queue == "appeals",
        lease_until=row.lease_until,
        draft=draft,
        revealed=shown,
        missing=missing,
        **{name: facts.get(name) for name in ("fps", "frames", "seconds", "width", "height")},
        flashes=facts.get("flash", {}).get("verdict") != "allow",
        flash_known="flash" in facts,
        personal=reviewing.personal_of(me),
        policy_version=reviewing.policy_version(),
        about=reviewing.guidance()["about"],
        policies=policy_texts(),
        undo_seconds=settings.undo_seconds,
        restricted=row.clip_state == "restricted",
        decided=decided,
    )


def facts_of(store: Store, clip_id: str) -> dict[str, Any]:
    """What the worker found out about a clip; nothing where that is missing or unreadable, which counts as not checked."""
    try:
        found = json.loads(media.path_of(store, clip_id, "facts.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("flash"), dict) else {}


def missing_of(store: Store, clip_id: str) -> list[str]:
    gone, levels = set(media.missing_of(store, clip_id)), {"blur": ("blur.jpg",), **reviewing.LEVELS}
    return [level for level, variants in levels.items() if gone & set(variants)]


def why_of(row: Row[Any]) -> list[str]:
    """Why a clip is here, in words."""
    codes = ", ".join(row.why.get("policies", [])) or "no policy"
    told = {
        "blocked": f"Drawn at random of what the filters blocked, here for {codes}.",
        "random": "Drawn at random of all that passed the filters.",
        "stratified": "Drawn of what passed the filters, by their score.",
        "review": f"The filters asked for a person under {codes}.",
        "disagreement": f"The filters and people, or the filters among themselves, contradict each other under {codes}.",
        "errors": "No filter could judge it: nobody knows yet what it shows.",
        "flagged": f"A labeler flagged it under {codes}.",
        "appeals": "Somebody contests the decision below.",
        "escalation": f"It was passed on, under {codes}.",
    }
    return [told[reviewing.shown_queue(row)]]


def earlier_of(db: Connection, row: Row[Any]) -> list[Earlier]:
    ids = row.why.get("reviews", [])
    found = db.execute(select(review).where(review.c.id.in_(ids)).order_by(review.c.at)).all()
    told = [Earlier(said=each.said, policies=each.body["policies"], rationale=reviewing.text_of(db, each.rationale) or "(deleted)") for each in found]
    if "reason" in row.why:
        told.append(Earlier(said="contested", policies=[], rationale=reviewing.text_of(db, row.why["reason"]) or "(deleted)"))
    return told


def decided_of(row: Row[Any], done: Row[Any], undo_seconds: int) -> Decided:
    rulings = row.decision.get("rulings", [])
    filters = [FilterSaid(**{**each, "reasons": [str(reason["text"]) for reason in each["reasons"] if isinstance(reason, dict) and "text" in reason]}) for each in rulings]
    undo_until = None if row.item_state == "closed" else done.at + 1_000 * undo_seconds
    return Decided(review_id=done.id, said=done.said, policies=done.body["policies"], undo_until=undo_until, why=why_of(row), verdict=row.verdict, filters=filters)


class Reveal(BaseModel):
    level: Level


@pages.action("/reading/{reading_id}/reveal")
def reading_reveal(reading_id: str, body: Reveal, me: Reviewer, store: StoreOf) -> Done:
    """Writes down that one wants to see more, before any of it is sent."""
    reviewing.reveal_level(store, me, reading_id, body.level)
    return Done(done=body.level)


@pages.router.get("/review-media/{reading_id}/{variant}", response_class=Response, tags=["review"])
def review_media(reading_id: str, variant: str, me: Reviewer, store: StoreOf, request: Request) -> Response:
    """A picture or the clip of one's open reading, as far as it was revealed."""
    with store.reading() as db:
        clip_id = reviewing.may_send(store, db, me, reading_id, variant)
    return media.send(request, store, clip_id, variant)


class Saved(BaseModel):
    lease_until: int


@pages.action("/reading/{reading_id}/draft")
def reading_draft(reading_id: str, body: Draft, me: Reviewer, store: StoreOf) -> Saved:
    """Keeps a draft and renews the lease."""
    reviewing.known_codes(body.policies)
    return Saved(lease_until=reviewing.save_draft(store, me, reading_id, body))


@pages.action("/reading/{reading_id}/decide")
def reading_decide(reading_id: str, body: Decision, me: Reviewer, store: StoreOf) -> Done:
    """Takes a decision in."""
    review_id = reviewing.decide(store, me, reading_id, body)
    return Done(done=review_id, go=f"/reading/{reading_id}")


class Undone(BaseModel):
    review_id: ReviewId


@pages.action("/reading/undo")
def reading_undo(body: Undone, me: Reviewer, store: StoreOf) -> Done:
    """Takes one's last decision back while it has no effect."""
    reading_id = reviewing.undo(store, me, body.review_id)
    return Done(done="undone", go=f"/reading/{reading_id}")


@pages.action("/reading/{reading_id}/skip")
def reading_skip(reading_id: str, me: Reviewer, store: StoreOf) -> Done:
    """Gives the item back, and nobody asks why."""
    project_id = reviewing.skip(store, me, reading_id)
    return Done(done="given back", go=f"/review/{project_id}")


@pages.action("/reading/{reading_id}/suspect")
def reading_suspect(reading_id: str, me: Reviewer, store: StoreOf) -> Done:
    """Suspects P04: the clip is gone for everybody but the child-safety role."""
    project_id = reviewing.suspect(store, me, reading_id)
    return Done(done="restricted", go=f"/review/{project_id}")

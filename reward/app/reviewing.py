"""Safety review: what people are asked to judge, who is asked, and what follows from what they say.

    queue          what is in it                                                        who takes it
    blocked        clips drawn at random of what the filters blocked (`auditing.py`)    reviewers
    random         drawn of what passed, all alike                                      reviewers
    stratified     drawn of what passed, by score                                       reviewers
    review         the filters asked for a person                                       reviewers
    disagreement   filters contradict each other; a blocked clip that somebody found harmless, for another person   reviewers
    errors         no filter could judge it                                             reviewers
    flagged        a labeler said it is unsafe                                          reviewers
    second         read by somebody already; looks like an item of the queue it came from      reviewers, never the first nor who imported the run
    appeals        somebody contests a decision                                         seniors who are neither
    escalation     two readers differ, a reader or a senior passed it on                seniors who have not read it

A clip suspected under a rule with `escalate` (P04) is "restricted" from that moment on: whatever queue it is in, it exists for nobody but the child-safety role.

A decision can be undone for `undo_seconds`. Then it takes effect (`settle`): a second reading, a disagreement, an escalation, a clip that goes back to the labelers. Two things do
not wait: a clip that was allowed and is called violating is withdrawn from labelers at once, and a suspected P04 is restricted at once, for good.
"""

from __future__ import annotations

import hashlib
import heapq
import hmac
import random
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator
from sqlalchemy import ColumnElement, Connection, Row, Select, and_, delete, exists, func, insert, literal, or_, select, update

from base_model.errors import UserError
from reward.app import exposure, labeling, log
from reward.app.access import CHILD_SAFETY, REVIEWER, SENIOR
from reward.app.attention import is_paused
from reward.app.exposure import HARD, MINUTE, Rest
from reward.app.schema import clip, event, item, membership, person, private_text, reading, reveal, review, withdrawal
from reward.app.security import Actor, Denied, sha256
from reward.app.settings import Reviewing, settings_of
from reward.app.store import Store, new_id
from reward.app.texts import Written
from reward.safety.policy import Policy, load_policy

AUDITS = ("blocked", "random", "stratified")
ORDINARY = (*AUDITS, "review", "disagreement", "errors", "flagged")
SENIORS = ("appeals", "escalation")
QUEUES = (*ORDINARY, "second", *SENIORS)
VERDICTS = ("allow", "review", "error", "block")
LEVELS = {"edges": ("edges.jpg",), "sheet": ("sheet.jpg",), "light": ("light.jpg",), "sharp": ("clip.mp4",)}
"""What each level of revealing lets through; `blur.jpg` needs none."""
Said = Literal["violating", "not_violating", "borderline", "cannot_tell"]
Level = Literal["edges", "sheet", "light", "sharp"]
Queue = Literal["blocked", "random", "stratified", "review", "disagreement", "errors", "flagged", "appeals", "escalation"]
NOTHING = "there is nothing here"
RESTRICTION = ("clip restricted", "restriction ended")
"""The kinds of event that tell of it."""
GUIDANCE = Path(__file__).with_name("guidance.yaml")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Mark(_Strict):
    """Where in the clip it is, in seconds."""

    start: Annotated[float, Field(ge=0, le=86_400)]
    end: Annotated[float, Field(ge=0, le=86_400)]

    @model_validator(mode="after")
    def _forwards(self) -> Mark:
        if self.end < self.start:
            raise ValueError("a mark ends at or after its start")
        return self


Codes = Annotated[tuple[Annotated[str, Field(max_length=8)], ...], Field(max_length=32)]


class Decision(_Strict):
    """What a reviewer says of a clip."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{8,40}$")]
    """Chosen by the client: sending it again adds nothing."""
    said: Said
    policies: Codes = ()
    """Codes it violates, or that it is borderline under."""
    severity: Annotated[int, Field(ge=0, le=4)] | None = None
    """None takes the worst of the policies."""
    temporal: bool = False
    """The harm shows only over time (flag T)."""
    marks: Annotated[tuple[Mark, ...], Field(max_length=50)] = ()
    rationale: Annotated[Written, Field(min_length=1)]
    confidence: Annotated[int, Field(ge=1, le=5)] | None = None
    escalate: bool = False
    """A senior should look, too."""
    ruling: Literal["uphold", "overturn", "refer"] | None = None
    """Of an appeal."""
    policy_version: Annotated[str, Field(max_length=32)]
    """The version of the policy that was beside the clip."""

    @model_validator(mode="after")
    def _fits(self) -> Decision:
        if len(set(self.policies)) < len(self.policies):
            raise ValueError("a policy is named twice")
        if self.said == "violating" and not self.policies:
            raise ValueError("a violating clip names the policies it violates")
        if self.said in ("not_violating", "cannot_tell") and self.policies:
            raise ValueError("only what violates, or nearly does, names policies")
        if not self.rationale.strip():
            raise ValueError("say why, in a few words")
        return self


class Personal(_Strict):
    """How somebody wants to be shown clips."""

    start: Literal["blur", "text"] = "blur"
    """What is there at first: the blurred poster, or the text alone."""
    grey: bool = True
    """Whether the clip itself is shown without colour."""
    size: Literal["small", "medium", "large"] = "medium"
    hold: bool = False
    """Whether what was revealed shows only while a key or the button is held."""
    speed: Literal["0.25", "0.5", "1"] = "1"
    keys: bool = True
    """Whether single letters and digits are commands; Esc and Ctrl Enter always are."""
    without: Codes = ()
    """Policies of which no items are given to this person, as far as it is known beforehand."""


def personal_of(actor: Actor) -> Personal:
    return Personal.model_validate(actor.settings.get("reviewing", {}))


def set_personal(store: Store, actor: Actor, wanted: Personal) -> None:
    """Keeps somebody's settings. Raises UserError for an unknown policy."""
    known_codes(wanted.without)
    with store.writing() as db:
        held: dict[str, Any] = db.execute(select(person.c.settings).where(person.c.id == actor.person_id)).scalar_one()
        db.execute(update(person).where(person.c.id == actor.person_id).values(settings={**held, "reviewing": wanted.model_dump(mode="json")}))
        store.log(db, actor.pseudonym, "review settings", actor.pseudonym)


# The policy, as reviewers read it


@cache
def guidance() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(GUIDANCE.read_text(encoding="utf-8"))
    return found


def policy_version() -> str:
    """Of the rules and of what is said about them: "2/1"."""
    return f"{load_policy().version}/{guidance()['version']}"


def known_codes(codes: Collection[str]) -> None:
    """Raises UserError for a code that the policy does not have."""
    unknown = [code for code in codes if code not in load_policy()]
    if unknown:
        raise UserError(f"no policy {unknown[0]!r}, policies. There are {', '.join(rule.code for rule in load_policy().rules)}")


def worst(policy: Policy, codes: Collection[str]) -> int:
    """The severity of the worst of some codes; 0 of none."""
    return max((policy.rule(code).severity for code in codes if code in policy), default=0)


def restricting(codes: Collection[str]) -> bool:
    """Whether one of them is for the child-safety role alone."""
    return any(rule.escalate for rule in load_policy().rules if rule.code in codes)


# Items


def add_item(
    store: Store, db: Connection, project_id: str, clip_id: str, queue: str, why: dict[str, Any], *, severity: int, by: str, place: float | None = None, source: str | None = None
) -> str:
    """Puts a clip into a queue, behind what is there unless a place is given; returns the item's id."""
    row: dict[str, Any] = {"id": new_id("q"), "project_id": project_id, "clip": clip_id, "queue": queue, "why": why, "source": source, "severity": severity}
    row |= {"place": float(store.now()) if place is None else place, "wanted": 1, "taken": 0, "state": "open", "created_at": store.now()}
    db.execute(insert(item), row)
    store.log(db, by, "queued", str(row["id"]), {"clip": clip_id, "queue": queue, "source": source})
    return str(row["id"])


def queue_imported(store: Store, db: Connection, project_id: str, clips: Sequence[str], by: str = "system") -> int:
    """Queues those of the imported clips that the filters did not decide about, or contradict each other about; returns how many. by: a pseudonym.

    A clip that waits in a queue already is passed over, so that an import may be run again. One that a filter stops under a restricting rule is restricted.
    """
    policy, added = load_policy(), 0
    for some in _chunks(list(clips), 500):
        known = _waits(db, some)
        for row in db.execute(select(clip).where(clip.c.id.in_(some), clip.c.project_id == project_id).order_by(clip.c.id)).all():
            rulings: list[dict[str, Any]] = row.decision.get("rulings", [])
            hit = sorted({each["policy"] for each in rulings if each["verdict"] in ("block", "review")} & {rule.code for rule in policy.rules})
            if restricting(hit):
                restrict(store, db, row.id, by=by)
            queue = "disagreement" if contradicted(rulings) else {"review": "review", "error": "errors"}.get(row.verdict)
            if queue is None and (row.state == "restricted" or restricting(hit)):
                queue = "escalation"
            if queue is None or row.id in known:
                continue
            add_item(store, db, project_id, row.id, queue, {"policies": hit}, severity=worst(policy, hit), by=by)
            added += 1
    return added


def contradicted(rulings: Sequence[dict[str, Any]]) -> bool:
    """Whether one filter allows what another one stops, under one policy."""
    said: dict[str, set[bool]] = {}
    for each in rulings:
        if each["verdict"] != "error":
            said.setdefault(each["policy"], set()).add(each["verdict"] == "allow")
    return any(len(each) > 1 for each in said.values())


def flag(store: Store, db: Connection, *, clip: str, policies: Sequence[str], source: str, by: Actor) -> str:
    """Puts a clip at once into the queue of flagged ones and returns the item's id; under P04 it is restricted, too. Inside of a `writing()` transaction.

    Who suspects a copy that was made worse suspects what it was made of.
    Flagged again for nothing new, it is the item that waits already. Raises UserError for no policy or an unknown one.
    """
    known_codes(policies)
    if not policies:
        raise UserError("what is unsafe about it? Name at least one policy, policies")
    table = item.c
    clip = source_of(db, clip)
    project_id = _project_of(db, clip)
    if restricting(policies):
        restrict(store, db, clip, by=by.pseudonym)
    waiting = db.execute(select(item).where(table.clip == clip, table.queue == "flagged", table.state != "closed")).all()
    store.log(db, by.pseudonym, "flagged", clip, {"policies": sorted(policies), "source": source})
    for each in waiting:
        if set(policies) <= set(each.why["policies"]) and by.pseudonym in each.why["not"]:
            return str(each.id)
    why = {"policies": sorted(policies), "not": [by.pseudonym]}
    return add_item(store, db, project_id, clip, "flagged", why, severity=worst(load_policy(), policies), by=by.pseudonym, source=source)


def source_of(db: Connection, clip_id: str) -> str:
    """The clip that a copy was made of, which shows the same; itself where it is no copy."""
    made_of = db.execute(select(clip.c.made_of).where(clip.c.id == clip_id)).scalar()
    return str(made_of or clip_id)


def _project_of(db: Connection, clip_id: str) -> str:
    found = db.execute(select(clip.c.project_id).where(clip.c.id == clip_id)).scalar()
    if found is None:
        raise Denied(404, NOTHING)
    return str(found)


def restrict(store: Store, db: Connection, clip_id: str, *, by: str) -> None:
    """From now on the clip exists for the child-safety role alone, in every project that holds it; in the others it waits there for that role."""
    digest = select(clip.c.clip_id).where(clip.c.id == clip_id).scalar_subquery()
    for row in db.execute(select(clip.c.id, clip.c.project_id).where(clip.c.clip_id == digest, clip.c.state.in_(("live", "withdrawn")))).all():
        restrict_here(store, db, row.id, by=by)
        if row.id != clip_id and not _waits(db, [row.id]):
            codes = [rule.code for rule in load_policy().rules if rule.escalate]
            add_item(store, db, row.project_id, row.id, "escalation", {"policies": codes}, severity=worst(load_policy(), codes), by="system")


def restrict_here(store: Store, db: Connection, clip_id: str, *, by: str) -> None:
    """`restrict` in the clip's own project alone."""
    db.execute(update(clip).where(clip.c.id == clip_id).values(state="restricted"))
    store.log(db, by, RESTRICTION[0], clip_id)


def restricted_digests(db: Connection, digests: Collection[str]) -> set[str]:
    """Those that are restricted in any project, or were when they were deleted."""
    rows = db.execute(select(clip.c.id, clip.c.clip_id, clip.c.state).where(clip.c.clip_id.in_(digests), clip.c.state.in_(("restricted", "deleted")))).all()
    return {row.clip_id for row in rows if row.state == "restricted" or _was_restricted(db, row.id)}


def _was_restricted(db: Connection, clip_id: str) -> bool:
    told = select(event.c.kind).where(event.c.subject == clip_id, event.c.kind.in_(RESTRICTION))
    return db.execute(told.order_by(event.c.seq.desc()).limit(1)).scalar() == RESTRICTION[0]


def _waits(db: Connection, clips: Sequence[str]) -> set[str]:
    """Those of some clips that somebody is to look at."""
    return set(db.execute(select(item.c.clip).where(item.c.clip.in_(clips), item.c.state != "closed")).scalars())


def _chunks(ids: list[str], size: int) -> Iterator[list[str]]:
    return (ids[at : at + size] for at in range(0, len(ids), size))


# Who may see what


def open_queues(actor: Actor, project_id: str) -> tuple[str, ...]:
    """Queues of which somebody sees what is not restricted."""
    roles = actor.roles_in(project_id)
    if SENIOR in roles:
        return QUEUES
    return tuple(each for each in QUEUES if each not in SENIORS) if REVIEWER in roles else ()


def may_see(actor: Actor, project_id: str) -> ColumnElement[bool]:
    """The condition on `clip` and `item` for what exists for somebody."""
    open_to_all = and_(clip.c.state.in_(("live", "withdrawn")), item.c.queue.in_(open_queues(actor, project_id)))
    return or_(open_to_all, clip.c.state == "restricted") if actor.has(CHILD_SAFETY, project_id) else open_to_all


def counts(db: Connection, actor: Actor, project_id: str) -> dict[str, int]:
    """Open items by queue, of those that exist for somebody. A second reading counts where it came from: nobody is told of it."""
    mine, child_safety = open_queues(actor, project_id), actor.has(CHILD_SAFETY, project_id)
    hidden = db.execute(select(clip.c.id).where(clip.c.project_id == project_id, clip.c.verdict.in_(VERDICTS), clip.c.state == "restricted")).scalars().all()
    restricted: Counter[tuple[str, str]] = Counter()
    for some in _chunks(list(hidden), 500):  # few clips are restricted, so they are looked up, and not every item's clip
        restricted.update(_open_by_queue(db, project_id, item.c.clip.in_(some)))
    found: Counter[str] = Counter()
    for (queue, shown_as), number in _open_by_queue(db, project_id).items():
        apart = restricted[queue, shown_as]
        found[shown_as or queue] += (number - apart) * (queue in mine) + apart * child_safety
    return {queue: found[queue] for queue in QUEUES if found[queue]}


def _open_by_queue(db: Connection, project_id: str, *conditions: ColumnElement[bool]) -> dict[tuple[str, str], int]:
    """(queue, what it shows itself as where that is another) -> open items."""
    found: dict[tuple[str, str], int] = {}
    for queues, shown_as in ((tuple(each for each in QUEUES if each != "second"), literal("")), (("second",), item.c.why["queue"].as_string())):
        rows = select(item.c.queue, shown_as.label("shown_as"), func.count()).where(item.c.project_id == project_id, item.c.queue.in_(queues), item.c.state == "open", *conditions)
        found |= {(queue, name): number for queue, name, number in db.execute(rows.group_by(item.c.queue, "shown_as"))}
    return found


def shown_queue(row: Any) -> str:
    """The queue an item shows itself as."""
    return str(row.why["queue"] if row.queue == "second" else row.queue)


def own_reading(db: Connection, actor: Actor, reading_id: str) -> Row[Any]:
    """A reading with its item and clip. Raises Denied, 404, where it is another's or its clip does not exist for who asks."""
    row = db.execute(
        select(
            reading,
            item.c.queue,
            item.c.why,
            item.c.severity,
            item.c.source,
            item.c.place,
            item.c.wave,
            item.c.state.label("item_state"),
            clip.c.state.label("clip_state"),
            clip.c.clip_id,
            clip.c.verdict,
            clip.c.decision,
            clip.c.prompt_id,
            clip.c.run,
        )
        .join(item, item.c.id == reading.c.item_id)
        .join(clip, clip.c.id == reading.c.clip)
        .where(reading.c.id == reading_id, reading.c.person_id == actor.person_id)
    ).first()
    if row is None or db.execute(select(item.c.id).join(clip, clip.c.id == item.c.clip).where(item.c.id == row.item_id, may_see(actor, row.project_id))).first() is None:
        raise Denied(404, NOTHING)
    return row


def held_reading(store: Store, db: Connection, actor: Actor, reading_id: str) -> Row[Any]:
    """`own_reading` that is open and not over. Raises Denied, 409, where it is."""
    row = own_reading(db, actor, reading_id)
    if row.state != "open" or row.lease_until <= store.now():
        raise Denied(409, "this reading is over. Take another one")
    return row


# Taking one


def next_reading(store: Store, actor: Actor, project_id: str, queue: str) -> str | Rest | None:
    """The id of a reading: the one somebody has open in the project, else of the next item of a queue, now theirs for a while. A Rest where a break is due, None where
    nothing is left.

    The second reader of a clip is never the first, nor who imported its run; an appeal goes to neither of two. Raises Denied, 403, while paused.
    """
    with store.writing() as db:
        if is_paused(db, actor.person_id):
            raise Denied(403, "you are paused. Ask whoever runs your project")
        settings = settings_of(db, project_id).reviewing
        expire(store, db, project_id)
        settle(store, db, project_id)
        held = db.execute(
            select(reading.c.id, reading.c.lease_until).where(reading.c.person_id == actor.person_id, reading.c.project_id == project_id, reading.c.state == "open")
        ).first()
        if held is not None:
            row = db.execute(
                select(item.c.id).join(clip, clip.c.id == item.c.clip).join(reading, reading.c.item_id == item.c.id).where(reading.c.id == held.id, may_see(actor, project_id))
            ).first()
            if row is not None:
                return str(held.id)
            give_up(db, held.id, "expired")
        now = store.now()
        rest = exposure.rest_of(exposure.looks_of(db, actor.person_id, now - exposure.DAY, now), now, settings)
        if rest is not None:
            return rest
        chosen = _choose(db, actor, project_id, queue, settings)
        return None if chosen is None else _take(store, db, actor, chosen, settings)


def _choose(db: Connection, actor: Actor, project_id: str, queue: str, settings: Reviewing) -> Row[Any] | None:
    """The first item that may be this person's; a mild one where the last ones were hard and one is there."""
    without = set(personal_of(actor).without)
    rounds = (True, False) if exposure.hard_in_a_row(db, actor.person_id, project_id, settings.most_severe_in_a_row) else (False,)
    for mild in rounds:
        for row in _offers(db, actor, project_id, queue, mild):
            for_another = actor.pseudonym in row.why.get("not", ()) or (row.queue == "second" and row.why["queue"] != queue)
            if not for_another and not without & set(row.why.get("policies", ())):
                return row
    return None


def _offers(db: Connection, actor: Actor, project_id: str, queue: str, mild: bool) -> Iterator[Row[Any]]:
    """Open items of a queue in their order, second readings among them, those of clips left out that this person has read, holds or has given back. mild: no hard ones."""
    both = [_open_items(db, actor, project_id, each, mild) for each in (queue, "second")]
    return heapq.merge(*both, key=lambda row: (row.place, row.id))


def _open_items(db: Connection, actor: Actor, project_id: str, queue: str, mild: bool, page: int = 100) -> Iterator[Row[Any]]:
    theirs = select(reading.c.id).where(reading.c.person_id == actor.person_id)
    had = exists(theirs.where(reading.c.clip == item.c.clip, reading.c.project_id == project_id, reading.c.state != "expired"))
    found = (
        select(item)
        .join(clip, clip.c.id == item.c.clip)
        .where(item.c.project_id == project_id, item.c.queue == queue, item.c.state == "open", may_see(actor, project_id), ~had)
        .order_by(item.c.place, item.c.id)
        .limit(page)
    )
    if mild:
        found = found.where(item.c.severity < HARD)
    after: Row[Any] | None = None
    while True:
        here = found if after is None else found.where(item.c.place >= after.place, or_(item.c.place > after.place, item.c.id > after.id))
        rows = db.execute(here).all()
        yield from rows
        if len(rows) < page:
            return
        after = rows[-1]


def _take(store: Store, db: Connection, actor: Actor, row: Row[Any], settings: Reviewing) -> str:
    now = store.now()
    lease = {"issued_at": now, "lease_until": now + settings.lease_minutes * MINUTE, "state": "open", "slot": 0}
    earlier = db.execute(select(reading.c.id).where(reading.c.item_id == row.id, reading.c.person_id == actor.person_id)).scalar()
    if earlier is None:
        earlier = new_id("r")
        db.execute(insert(reading), {"id": earlier, "project_id": row.project_id, "item_id": row.id, "clip": row.clip, "person_id": actor.person_id, "draft": None, **lease})
    else:
        db.execute(update(reading).where(reading.c.id == earlier).values(**lease))
    db.execute(update(item).where(item.c.id == row.id).values(taken=1, state="full"))
    store.log(db, actor.pseudonym, "reading taken", str(earlier), {"item": row.id})
    return str(earlier)


def give_up(db: Connection, reading_id: str, state: str) -> None:
    """Ends an open reading; its item waits for somebody else."""
    item_id = db.execute(select(reading.c.item_id).where(reading.c.id == reading_id)).scalar_one()
    db.execute(update(reading).where(reading.c.id == reading_id).values(state=state))
    db.execute(update(item).where(item.c.id == item_id, item.c.state == "full").values(taken=0, state="open"))


def expire(store: Store, db: Connection, project_id: str) -> int:
    """Frees what was taken and not decided in time; returns how many readings."""
    late = db.execute(_late(store, project_id)).scalars().all()
    for reading_id in late:
        give_up(db, reading_id, "expired")
        store.log(db, "system", "reading expired", reading_id)
    return len(late)


def _late(store: Store, project_id: str) -> Select[Any]:
    return select(reading.c.id).where(reading.c.state == "open", reading.c.lease_until <= store.now(), reading.c.project_id == project_id)


def skip(store: Store, actor: Actor, reading_id: str) -> str:
    """Gives a reading back, and nobody asks why; the log says no more than that it was given back. Returns the project's id."""
    with store.writing() as db:
        row = own_reading(db, actor, reading_id)
        if row.state == "open":
            give_up(db, reading_id, "skipped")
            forget_draft(db, reading_id)
            store.log(db, actor.pseudonym, "reading given back", reading_id)
    return str(row.project_id)


def suspect(store: Store, actor: Actor, reading_id: str) -> str:
    """P04 is suspected: the clip is restricted and waits for the child-safety role, with nothing more asked of who saw it. Returns the project's id."""
    (code,) = [rule.code for rule in load_policy().rules if rule.escalate][:1]
    with store.writing() as db:
        row = held_reading(store, db, actor, reading_id)
        give_up(db, reading_id, "skipped")
        forget_draft(db, reading_id)
        flag(store, db, clip=row.clip, policies=(code,), source=reading_id, by=actor)
    return str(row.project_id)


# Revealing


def reveal_level(store: Store, actor: Actor, reading_id: str, level: Level) -> None:
    """Writes down that somebody asked to see more; from then on `may_send` lets it through. Asked again, it is the same reveal."""
    with store.writing() as db:
        row = held_reading(store, db, actor, reading_id)
        if level in revealed(db, reading_id):
            return
        values = {"id": new_id("v"), "project_id": row.project_id, "reading_id": reading_id, "person_id": actor.person_id, "level": level}
        db.execute(insert(reveal), {**values, "severity": row.severity, "at": store.now()})
        store.log(db, actor.pseudonym, "revealed", reading_id, {"level": level, "item": row.item_id})


def revealed(db: Connection, reading_id: str) -> set[str]:
    return set(db.execute(select(reveal.c.level).where(reveal.c.reading_id == reading_id)).scalars())


def may_send(store: Store, db: Connection, actor: Actor, reading_id: str, variant: str) -> str:
    """The `clip_id` of which a variant may be sent. Raises Denied: 404 for what is not theirs or unknown, 403 for what was not revealed, 409 for a reading that is over."""
    level = next((level for level, variants in LEVELS.items() if variant in variants), None)
    if variant != "blur.jpg" and level is None:
        raise Denied(404, NOTHING)
    row = held_reading(store, db, actor, reading_id)
    if level is not None and level not in revealed(db, reading_id):
        raise Denied(403, "this was not revealed. Reveal it first")
    return str(row.clip_id)


# Drafts


def _draft_id(reading_id: str) -> str:
    return f"d{reading_id[1:]}"


class Draft(_Strict):
    """What is on the screen so far."""

    said: Said | None = None
    policies: Codes = ()
    severity: Annotated[int, Field(ge=0, le=4)] | None = None
    temporal: bool = False
    marks: Annotated[tuple[Mark, ...], Field(max_length=50)] = ()
    rationale: Written = ""
    confidence: Annotated[int, Field(ge=1, le=5)] | None = None
    escalate: bool = False
    ruling: Literal["uphold", "overturn", "refer"] | None = None


def save_draft(store: Store, actor: Actor, reading_id: str, draft: Draft) -> int:
    """Keeps a draft and renews the lease; returns until when."""
    with store.writing() as db:
        row = held_reading(store, db, actor, reading_id)
        until = store.now() + settings_of(db, row.project_id).reviewing.lease_minutes * MINUTE
        db.execute(update(reading).where(reading.c.id == reading_id).values(draft=draft.model_dump(mode="json", exclude={"rationale"}), lease_until=until))
        forget_text(db, _draft_id(reading_id))
        if draft.rationale:
            db.execute(insert(private_text), {"id": _draft_id(reading_id), "person_id": actor.person_id, "text": draft.rationale, "created_at": store.now()})
    return int(until)


def draft_of(db: Connection, row: Row[Any]) -> Draft:
    if row.draft is None:
        return Draft()
    return Draft.model_validate({**row.draft, "rationale": text_of(db, _draft_id(row.id)) or ""})


def text_of(db: Connection, text_id: str | None) -> str | None:
    """What a person wrote; None where it was deleted."""
    return db.execute(select(private_text.c.text).where(private_text.c.id == text_id)).scalar()


def forget_text(db: Connection, text_id: str) -> None:
    db.execute(delete(private_text).where(private_text.c.id == text_id))


def forget_draft(db: Connection, reading_id: str) -> None:
    db.execute(update(reading).where(reading.c.id == reading_id).values(draft=None))
    forget_text(db, _draft_id(reading_id))


# Deciding


def decide(store: Store, actor: Actor, reading_id: str, said: Decision) -> str:
    """Takes a decision in and returns its id. The same one sent again is answered the same; another one under that id is Denied, 409, and so is a reading that somebody else has.

    A decision that comes after its lease, while nobody else has the item, is taken: it is not lost. Raises UserError for unknown policies and for what does not fit the queue.
    """
    known_codes(said.policies)
    policy, sealed = load_policy(), _sealed(store, said)
    with store.writing() as db:
        if _is_there(db, actor, reading_id, said.id, sealed):
            return said.id
        row = own_reading(db, actor, reading_id)
        if row.state == "expired" and row.item_state == "open" and not _reads(db, actor, row.clip):
            db.execute(update(item).where(item.c.id == row.item_id).values(taken=1, state="full"))
        elif row.state != "open":
            raise Denied(409, "this reading is over, and somebody else may have it. Take another one")
        if said.policy_version != policy_version():
            raise Denied(409, "the policy was changed since this page was loaded. Load it again: your draft is kept")
        body = _body(db, row, said, policy) | {"sealed": sealed, "restricted": row.clip_state == "restricted", "revealed": sorted(revealed(db, reading_id))}
        text_id = new_id("x")
        db.execute(insert(private_text), {"id": text_id, "person_id": actor.person_id, "text": said.rationale, "created_at": store.now()})
        version = 1 + (db.execute(select(func.max(review.c.version)).where(review.c.reading_id == reading_id)).scalar() or 0)
        values = {"id": said.id, "project_id": row.project_id, "item_id": row.item_id, "reading_id": reading_id, "clip": row.clip, "person_id": actor.person_id, "version": version}
        db.execute(insert(review), {**values, "said": body["said"], "body": body, "rationale": text_id, "policy_version": said.policy_version, "at": store.now()})
        db.execute(update(reading).where(reading.c.id == reading_id).values(state="decided"))
        forget_draft(db, reading_id)
        told = {"reading": reading_id, "said": body["said"], "policies": body["policies"], "policy_version": said.policy_version, "sealed": sealed}
        store.log(db, actor.pseudonym, "reviewed", said.id, told)
        if body["said"] == "violating" and row.verdict == "allow":
            withdraw(store, db, row.clip, said.id, by=actor.pseudonym)
        if restricting(body["policies"]) and row.clip_state != "restricted":
            restrict(store, db, row.clip, by=actor.pseudonym)
            add_item(store, db, row.project_id, row.clip, "escalation", {"policies": body["policies"]}, severity=body["severity"], by=actor.pseudonym, source=said.id)
            db.execute(update(item).where(item.c.id == row.item_id).values(state="closed"))
            store.log(db, "system", "review settled", said.id)
    return said.id


def _reads(db: Connection, actor: Actor, clip_id: str) -> bool:
    """Whether somebody has read a clip, or has it to read."""
    theirs = (reading.c.person_id == actor.person_id, reading.c.clip == clip_id, reading.c.state.in_(("open", "decided")))
    return db.execute(select(reading.c.id).where(*theirs).limit(1)).first() is not None


def _is_there(db: Connection, actor: Actor, reading_id: str, review_id: str, sealed: str) -> bool:
    """Whether this very decision is there already. Raises Denied where another one has its id."""
    before = db.execute(select(review.c.person_id, review.c.reading_id, review.c.body).where(review.c.id == review_id)).first()
    if before is None:
        return False
    if (before.person_id, before.reading_id, before.body["sealed"]) != (actor.person_id, reading_id, sealed):
        raise Denied(409, "another decision has this id. Send it under a new one")
    return True


def _sealed(store: Store, said: Decision) -> str:
    """What tells one decision from another without telling what was written."""
    return hmac.new(store.secret, b"decision " + log.canonical(said.model_dump(mode="json")).encode(), hashlib.sha256).hexdigest()


def _body(db: Connection, row: Row[Any], said: Decision, policy: Policy) -> dict[str, Any]:
    """What is kept of a decision, without what is private."""
    body = said.model_dump(mode="json", exclude={"id", "rationale", "policy_version"})
    if (row.queue == "appeals") != (said.ruling is not None):
        raise UserError(
            "an appeal is upheld, overturned or referred, and only an appeal, ruling. Choose one" if row.queue == "appeals" else "this is no appeal, ruling. Leave it out"
        )
    if said.ruling in ("uphold", "overturn"):
        appealed = db.execute(select(review.c.said, review.c.body).where(review.c.id == row.source)).one()
        if said.ruling == "uphold":
            body |= {"said": appealed.said, "policies": appealed.body["policies"], "severity": appealed.body["severity"]}
        elif (appealed.said == "violating") == (said.said == "violating"):
            raise UserError("to overturn is to say the opposite: violating or not, said. Change what you say, or uphold")
    if body["severity"] is None:
        body["severity"] = worst(policy, body["policies"])
    return body


def undo(store: Store, actor: Actor, review_id: str) -> str:
    """Takes one's own decision back while it has no effect; its reading is open again. Returns the reading's id. Undone twice, it is undone."""
    with store.writing() as db:
        row = db.execute(select(review).where(review.c.id == review_id, review.c.person_id == actor.person_id)).first()
        if row is None:
            raise Denied(404, NOTHING)
        held = own_reading(db, actor, row.reading_id)
        if db.execute(select(withdrawal.c.ref).where(withdrawal.c.ref == review_id)).first():
            return str(row.reading_id)
        settings = settings_of(db, row.project_id).reviewing
        if held.item_state == "closed" or held.state != "decided" or store.now() >= row.at + 1_000 * settings.undo_seconds:
            raise Denied(409, "it is too late to undo this: it has taken effect")
        db.execute(insert(withdrawal), {"ref": review_id, "kind": "review", "person_id": actor.person_id, "at": store.now()})
        draft = {name: value for name, value in row.body.items() if name in Draft.model_fields}
        db.execute(update(reading).where(reading.c.id == row.reading_id).values(state="open", lease_until=store.now() + settings.lease_minutes * MINUTE, draft=draft))
        written = text_of(db, row.rationale)
        if written:
            forget_text(db, _draft_id(row.reading_id))
            db.execute(insert(private_text), {"id": _draft_id(row.reading_id), "person_id": actor.person_id, "text": written, "created_at": store.now()})
        store.log(db, actor.pseudonym, "review undone", review_id)
        restate(store, db, row.clip)
    return str(row.reading_id)


# What follows


def catch_up(store: Store, project_id: str) -> int:
    """Lets take effect what time has brought: readings that ran out, decisions that can no longer be undone; returns how many. Nobody has to take a clip for it. Writes only where
    there is any."""
    with store.reading() as db:
        if not any(db.execute(each.limit(1)).first() for each in (_late(store, project_id), _due(store, db, project_id))):
            return 0
    with store.writing() as db:
        return expire(store, db, project_id) + settle(store, db, project_id)


def settle(store: Store, db: Connection, project_id: str) -> int:
    """Lets decisions take effect whose time to undo is over; returns how many did. Tasks that waited for them go on."""
    due = db.execute(_due(store, db, project_id)).all()
    for row in due:
        db.execute(update(item).where(item.c.id == row.item_id).values(state="closed"))
        store.log(db, "system", "review settled", row.id)
        _take_effect(store, db, row)
        restate(store, db, row.clip)
    if due:
        labeling.resume(store, db, project_id, {row.clip for row in due})
    return len(due)


def _due(store: Store, db: Connection, project_id: str) -> Select[Any]:
    """Decisions whose time to undo is over, oldest first."""
    until = store.now() - 1_000 * settings_of(db, project_id).reviewing.undo_seconds
    return (
        select(review, item.c.queue, item.c.why, item.c.severity.label("item_severity"), item.c.source, item.c.wave, clip.c.verdict, clip.c.state.label("clip_state"), clip.c.run)
        .join(item, item.c.id == review.c.item_id)
        .join(reading, reading.c.id == review.c.reading_id)
        .join(clip, clip.c.id == review.c.clip)
        .where(
            item.c.project_id == project_id,
            item.c.queue.in_(QUEUES),
            item.c.state == "full",
            reading.c.state == "decided",
            review.c.at <= until,
            review.c.id.not_in(select(withdrawal.c.ref)),
        )
        .order_by(review.c.at, review.c.id)
    )


def _take_effect(store: Store, db: Connection, row: Row[Any]) -> None:
    if row.clip_state == "restricted":
        if row.body["restricted"]:  # said by the child-safety role, and not by somebody who read it before
            _judge_restricted(store, db, row)
        return
    if "gold" in row.why:
        return
    differs = row.queue in ("second", "disagreement") and row.source is not None and _differs(db, row)
    if row.body["escalate"] or row.body["ruling"] == "refer" or differs:
        if row.verdict == "allow" and (row.queue == "flagged" or row.said != "not_violating"):  # labelers wait for the senior
            withdraw(store, db, row.clip, row.id, by="system")
        if row.queue != "escalation":
            _pass_on(store, db, row, "escalation", {"reviews": [each for each in (row.source, row.id) if each and _is_review(db, each)]})
    elif (row.queue in ORDINARY and row.source is None) or row.queue == "flagged":
        unsure = row.queue == "flagged" and row.said == "cannot_tell"
        if unsure and row.verdict == "allow":  # flagged and not judged: labelers wait until it is
            withdraw(store, db, row.clip, row.id, by="system")
        if unsure or (row.verdict == "allow" and row.said == "violating") or chosen_for_second(store, row.item_id, settings_of(db, row.project_id).reviewing.second_share):
            shown = {**row.why, "queue": row.queue}
            place = row.wave + random.random() if row.wave is not None else None
            _pass_on(store, db, row, "second", shown, place=place)
        elif row.verdict == "block" and row.said == "not_violating":
            _pass_on(store, db, row, "disagreement", {"policies": row.why.get("policies", [])})


def _is_review(db: Connection, ref: str) -> bool:
    return db.execute(select(review.c.id).where(review.c.id == ref)).first() is not None


def _pass_on(store: Store, db: Connection, row: Row[Any], queue: str, why: dict[str, Any], *, place: float | None = None) -> None:
    """Another item of the same clip, for somebody who neither read it nor imported its run."""
    others = sorted({*row.why.get("not", ()), *importers(db, row.project_id, row.run)})
    severity = row.item_severity if queue == "second" else max(row.item_severity, row.body["severity"])
    add_item(store, db, row.project_id, row.clip, queue, {**why, "not": others}, severity=severity, by="system", place=place, source=row.id)


def chosen_for_second(store: Store, item_id: str, share: float) -> bool:
    """Whether an item is among those that a second person reads; nobody can foresee it."""
    drawn = hmac.new(store.secret, b"second " + item_id.encode(), hashlib.sha256).digest()
    return int.from_bytes(drawn[:8]) < share * 2**64


def importers(db: Connection, project_id: str, run: str) -> set[str]:
    """Pseudonyms of those who imported a run, by the log."""
    rows = db.execute(select(event.c.actor, event.c.body).where(event.c.subject == project_id, event.c.kind == "import began")).all()
    return {row.actor for row in rows if sha256(run) in row.body}


def _differs(db: Connection, row: Row[Any]) -> bool:
    """Whether two readers do not agree that a clip violates; who cannot tell does not agree."""
    first = db.execute(select(review.c.said).where(review.c.id == row.source)).scalar()
    return first is not None and ("cannot_tell" in (first, row.said) or (first == "violating") != (row.said == "violating"))


def _judge_restricted(store: Store, db: Connection, row: Row[Any]) -> None:
    """What the child-safety role says: harmless, or violating something else, ends the restriction; anything else keeps it."""
    if row.said == "not_violating" or (row.said == "violating" and not restricting(row.body["policies"])):
        db.execute(update(clip).where(clip.c.id == row.clip).values(state="live"))
        store.log(db, "system", RESTRICTION[1], row.clip, {"review": row.id, "said": row.said})
        if row.said == "violating":
            withdraw(store, db, row.clip, row.id, by="system")
    same = and_(item.c.clip == row.clip, item.c.queue.in_(("escalation", "flagged")), item.c.state == "open")
    db.execute(update(item).where(same).values(state="closed"))


def withdraw(store: Store, db: Connection, clip_id: str, review_id: str, *, by: str) -> None:
    """Takes a live clip from the labelers."""
    if db.execute(update(clip).where(clip.c.id == clip_id, clip.c.state == "live").values(state="withdrawn")).rowcount:
        store.log(db, by, "clip withdrawn", clip_id, {"review": review_id})


def restate(store: Store, db: Connection, clip_id: str) -> None:
    """Gives an allowed clip back to the labelers where a review withdrew it, what stands now does not call it violating, and nobody is asked about it any more."""
    row = db.execute(select(clip.c.state, clip.c.verdict).where(clip.c.id == clip_id)).one()
    if row.verdict != "allow" or row.state not in ("live", "withdrawn"):
        return
    reviews = standing(db, [clip_id]).get(clip_id)
    stands = violates(reviews) if reviews else False
    if row.state == "live" and stands:
        withdraw(store, db, clip_id, "standing", by="system")
    elif row.state == "withdrawn" and stands is False and not _is_asked_about(db, clip_id) and _withdrawn_by_review(db, clip_id):
        db.execute(update(clip).where(clip.c.id == clip_id).values(state="live"))
        store.log(db, "system", "clip live again", clip_id)


def _is_asked_about(db: Connection, clip_id: str) -> bool:
    again = ("second", "disagreement", *SENIORS)
    return db.execute(select(item.c.id).where(item.c.clip == clip_id, item.c.queue.in_(again), item.c.state != "closed")).first() is not None


def _withdrawn_by_review(db: Connection, clip_id: str) -> bool:
    last = db.execute(select(event.c.body).where(event.c.subject == clip_id, event.c.kind == "clip withdrawn").order_by(event.c.seq.desc()).limit(1)).scalar()
    return last is not None and '"review"' in last


class Stands(BaseModel):
    """A review that was not undone."""

    id: str
    clip: str
    reader: str
    said: str
    policies: list[str]
    severity: int
    final: bool
    settled: bool
    policy_version: str
    at: int


def standing(db: Connection, clips: Sequence[str] | None = None, project_id: str | None = None) -> dict[str, list[Stands]]:
    """Reviews by clip, oldest first, without those that were undone and those that referred an appeal. Final: decides between the others; the newest one does."""
    found = (
        select(review, item.c.queue, item.c.state.label("item_state"), person.c.pseudonym)
        .join(item, item.c.id == review.c.item_id)
        .join(person, person.c.id == review.c.person_id)
        .where(review.c.id.not_in(select(withdrawal.c.ref)))
        .order_by(review.c.at, review.c.id)
    )
    found = found.where(review.c.clip.in_(clips)) if clips is not None else found.where(review.c.project_id == project_id)
    by_clip: dict[str, list[Stands]] = {}
    for row in db.execute(found).all():
        if row.body["ruling"] == "refer":
            continue
        final = row.said != "cannot_tell" and (row.queue in SENIORS or row.body["restricted"])
        made = Stands(
            id=row.id, clip=row.clip, reader=row.pseudonym, said=row.said, policies=row.body["policies"] if row.said == "violating" else [], severity=row.body["severity"],
            final=final, settled=row.item_state == "closed", policy_version=row.policy_version, at=row.at,
        )  # fmt: skip
        by_clip.setdefault(row.clip, []).append(made)
    for some in by_clip.values():
        last = max((i for i, each in enumerate(some) if each.final), default=None)
        some[:] = [each.model_copy(update={"final": i == last}) for i, each in enumerate(some)]
    return by_clip


def violates(reviews: Sequence[Stands]) -> bool | None:
    """Whether a clip violates anything, as `reward/safety/audit.py` counts: the final word, else the majority; None where it is even or nobody could tell."""
    able = [each for each in reviews if each.said != "cannot_tell"]
    deciding = [each for each in able if each.final] or able
    votes = [each.said == "violating" for each in deciding]
    return None if 2 * sum(votes) == len(votes) else 2 * sum(votes) > len(votes)


def appeal(store: Store, actor: Actor, project_id: str, review_id: str, reason: str) -> str:
    """Contests another person's decision; returns the item's id. Raises Denied, 404, for a decision that is not in the project or not to be seen, 409 for one's own, one without
    effect yet, and one that was contested before."""
    with store.writing() as db:
        settle(store, db, project_id)
        row = db.execute(
            select(review, item.c.state.label("item_state"), item.c.why, clip.c.run, clip.c.verdict, person.c.pseudonym)
            .join(item, item.c.id == review.c.item_id)
            .join(clip, clip.c.id == review.c.clip)
            .join(person, person.c.id == review.c.person_id)
            .where(review.c.id == review_id, review.c.project_id == project_id, clip.c.state.in_(("live", "withdrawn")), review.c.id.not_in(select(withdrawal.c.ref)))
        ).first()
        if row is None:
            raise Denied(404, NOTHING)
        if row.person_id == actor.person_id:
            raise Denied(409, "your own decision is for another person to contest")
        if row.item_state != "closed":
            raise Denied(409, "this decision has no effect yet. Wait until it cannot be undone")
        if db.execute(select(item.c.id).where(item.c.source == review_id, item.c.queue == "appeals")).first():
            raise Denied(409, "this decision was contested already")
        text_id = new_id("x")
        db.execute(insert(private_text), {"id": text_id, "person_id": actor.person_id, "text": reason, "created_at": store.now()})
        others = sorted({actor.pseudonym, row.pseudonym, *importers(db, project_id, row.run)})
        if row.verdict == "allow":  # labelers wait for whoever decides it
            withdraw(store, db, row.clip, review_id, by=actor.pseudonym)
        why = {"policies": row.body["policies"], "reviews": [review_id], "reason": text_id, "not": others}
        return add_item(store, db, project_id, row.clip, "appeals", why, severity=row.body["severity"], by=actor.pseudonym, source=review_id)


def reviewers_left(db: Connection, project_id: str) -> int:
    """People who may review in a project: with fewer than two there is no second reading."""
    held = select(func.count(func.distinct(membership.c.person_id))).where(membership.c.project_id.in_((project_id, "*")), membership.c.role.in_((REVIEWER, SENIOR)))
    return int(db.execute(held).scalar_one())

"""How long somebody has looked at what is hard to look at, and when a break is due. Computed from what was revealed, on the server: a page cannot forget it.

A look begins when a picture or the clip itself is first revealed in a reading and ends with the decision. It counts as hard where what the item is there for, or what the person
then found, is of severity 3 or 4. Blurred posters are no looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, select

from reward.app.schema import clip, item, reading, reveal, review, withdrawal
from reward.app.settings import Reviewing

MINUTE = 60_000
DAY = 24 * 60 * MINUTE
BREAK = 10 * MINUTE
HARD = 3
LONGEST = 10 * MINUTE  # of one look: who leaves the page open does not look
AFTERWARDS = MINUTE  # of a reading that was given back or ran out, behind its last reveal


@dataclass(frozen=True)
class Look:
    """One reading in which something was revealed; times in milliseconds."""

    start: int
    end: int
    severity: int

    @property
    def hard(self) -> bool:
        return self.severity >= HARD


@dataclass(frozen=True)
class Rest:
    """A break that is due."""

    until: int
    why: str


def looks_of(db: Connection, person_id: str, since: int, now: int) -> list[Look]:
    """What a person looked at, in any project, oldest first."""
    return _looks(db, now, reveal.c.person_id == person_id, reveal.c.at >= since).get(person_id, [])


def week_of(db: Connection, project_id: str | None, now: int) -> dict[str, float]:
    """Person -> minutes of hard looks in the last seven days, in a project or, with None, in all; of whoever had anything revealed.

    Clips that are restricted to child safety are left out: outside of that role nothing tells that there are any.
    """
    where = [reveal.c.at >= now - 7 * DAY, clip.c.state != "restricted", *([reveal.c.project_id == project_id] if project_id is not None else [])]
    return {person_id: minutes(looks) for person_id, looks in _looks(db, now, *where).items()}


def _looks(db: Connection, now: int, *where: ColumnElement[bool]) -> dict[str, list[Look]]:
    """Person -> looks, oldest first."""
    kept = review.c.id.not_in(select(withdrawal.c.ref))
    rows = db.execute(
        select(reveal.c.person_id, reveal.c.reading_id, reveal.c.at, reveal.c.severity, reading.c.state, review.c.at.label("decided_at"), review.c.body)
        .join(reading, reading.c.id == reveal.c.reading_id)
        .join(clip, clip.c.id == reading.c.clip)
        .outerjoin(review, (review.c.reading_id == reading.c.id) & kept)
        .where(*where)
        .order_by(reveal.c.at)
    ).all()
    found: dict[str, dict[str, Look]] = {}
    for row in rows:
        end = row.decided_at or (now if row.state == "open" else row.at + AFTERWARDS)
        severity = max(row.severity, (row.body or {}).get("severity") or 0)
        theirs = found.setdefault(row.person_id, {})
        first = theirs.get(row.reading_id)
        start = first.start if first else row.at
        theirs[row.reading_id] = Look(start, min(max(end, row.at), start + LONGEST), max(severity, first.severity if first else 0))
    return {person_id: sorted(looks.values(), key=lambda look: look.start) for person_id, looks in found.items()}


def minutes(looks: Sequence[Look]) -> float:
    """Of hard looks, all together."""
    return sum(look.end - look.start for look in looks if look.hard) / MINUTE


def rest_of(looks: Sequence[Look], now: int, settings: Reviewing) -> Rest | None:
    """The break that is due, if one is. Days begin at midnight UTC."""
    today = now - now % DAY
    if minutes([look for look in looks if look.start >= today]) >= settings.exposure_minutes:
        return Rest(today + DAY, f"You have looked at hard clips for {settings.exposure_minutes} minutes today. That is enough: go on tomorrow.")
    in_a_row, last = 0, None
    for look in looks:
        if look.hard:
            in_a_row = look.end - look.start + (0 if last is None or look.start - last >= BREAK else in_a_row)
            last = look.end
    if last is not None and in_a_row >= settings.break_after_minutes * MINUTE and now < last + BREAK:
        return Rest(last + BREAK, f"You have looked at hard clips for {settings.break_after_minutes} minutes. Take ten minutes off.")
    return None


def hard_in_a_row(db: Connection, person_id: str, project_id: str, most: int) -> bool:
    """Whether the last `most` items somebody was given were all hard."""
    last = select(item.c.severity).join(reading, reading.c.item_id == item.c.id).where(reading.c.person_id == person_id, reading.c.project_id == project_id)
    found = db.execute(last.order_by(reading.c.issued_at.desc(), reading.c.id).limit(most)).scalars().all()
    return len(found) == most and all(severity >= HARD for severity in found)

"""Whether somebody answers with care: gold and repeats, a gentle warning, then a pause. And whether somebody agreed to take part.

Only what is known counts. A gold task says of two clips which one is worse, because it was made so; a repeat says what the same person said before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, Literal

from sqlalchemy import Connection, func, select, update

from reward.app.labeling import live_answers
from reward.app.schema import answer, assignment, event, person
from reward.app.security import Actor, sha256
from reward.app.settings import Labeling, settings_of
from reward.app.store import Store

WINDOW = 20
"""Checks that count: the last ones."""
LEAST_TO_WARN, LEAST_TO_PAUSE = 3, 6
MOST_TURNED = 1 / 3
"""Share of the pairs of a repeat that may be the other way round."""
PAUSED = "paused for care"
CHECKS = ("gold", "repeat", "mirrored")
Standing = Literal["fine", "warned", "paused"]
Ranks = Sequence[int | None]


def agrees_with_truth(truth: Mapping[str, Ranks], ranks: Mapping[str, Ranks]) -> bool | None:
    """Whether a ranking puts apart, the right way round, every two clips of which the truth knows which is better. None where it knows nothing about what was asked."""
    pairs = [(name, a, b) for name in truth if name in ranks for a, b in _known(truth[name])]
    return all(_before(ranks[name], a, b) for name, a, b in pairs) if pairs else None


def agrees_with_itself(before: Mapping[str, Ranks], after: Mapping[str, Ranks]) -> bool | None:
    """Whether at most `MOST_TURNED` of the pairs that were ranked before are the other way round now. None where nothing was."""
    pairs = [(name, a, b) for name in before if name in after for a, b in _known(before[name])]
    return sum(_before(after[name], b, a) for name, a, b in pairs) <= MOST_TURNED * len(pairs) if pairs else None


def _known(ranks: Ranks) -> list[tuple[int, int]]:
    """(better, worse) of every two that differ."""
    both = [(a, b) for a, b in combinations(range(len(ranks)), 2) if ranks[a] is not None and ranks[b] is not None]
    return [(a, b) if _before(ranks, a, b) else (b, a) for a, b in both if ranks[a] != ranks[b]]


def _before(ranks: Ranks, a: int, b: int) -> bool:
    first, second = ranks[a], ranks[b]
    return first is not None and second is not None and first < second


def checked(db: Connection, row: Any, ranks: Mapping[str, Ranks]) -> bool | None:
    """Whether an answer passes the check that its assignment is; None where it is none."""
    if row.kind in ("gold", "practice"):
        return agrees_with_truth(row.truth or {}, ranks)
    if not row.repeat:
        return None
    first = live_answers().where(answer.c.task_id == row.task_id, answer.c.person_id == row.person_id, assignment.c.repeat == 0)
    before = db.execute(first).first()
    return agrees_with_itself(before.body["ranks"], ranks) if before is not None and before.body["what"] == "rank" else None


def checks_of(db: Connection, person_id: str, project_id: str) -> list[bool]:
    """The last checks of a person, the newest first, since the last pause."""
    pseudonym = select(person.c.pseudonym).where(person.c.id == person_id).scalar_subquery()
    since = db.execute(select(func.max(event.c.at)).where(event.c.subject == pseudonym, event.c.kind == PAUSED)).scalar() or 0
    wanted = live_answers().where(answer.c.person_id == person_id, answer.c.project_id == project_id, answer.c.at > since, assignment.c.purpose.in_(CHECKS))
    found = (row.body.get("ok") for row in db.execute(wanted.order_by(answer.c.at.desc()).limit(2 * WINDOW)))
    return [ok for ok in found if ok is not None][:WINDOW]


def standing_of(checks: Sequence[bool], settings: Labeling) -> Standing:
    """What follows from the checks."""
    failed = checks.count(False) / len(checks) if checks else 0.0
    if len(checks) >= LEAST_TO_PAUSE and failed >= settings.careless_pause:
        return "paused"
    return "warned" if len(checks) >= LEAST_TO_WARN and failed >= settings.careless_warning else "fine"


def look_at(store: Store, db: Connection, actor: Actor, project_id: str) -> Standing:
    """Pauses who fails too many checks."""
    standing = standing_of(checks_of(db, actor.person_id, project_id), settings_of(db, project_id).labeling)
    if standing == "paused":
        db.execute(update(person).where(person.c.id == actor.person_id, person.c.state == "active").values(state="paused"))
        store.log(db, "system", PAUSED, actor.pseudonym, {"project": project_id})
    return standing


def is_paused(db: Connection, person_id: str) -> bool:
    return db.execute(select(person.c.state).where(person.c.id == person_id)).scalar() == "paused"


# Consent


def has_consented(settings: Mapping[str, Any], project_id: str, text: str) -> bool:
    """Whether a person agreed to this very text."""
    return settings.get("consent", {}).get(project_id) == sha256(text)


def consent(store: Store, actor: Actor, project_id: str) -> None:
    """Writes down that a person agreed to the text as it is now."""
    with store.writing() as db:
        text = settings_of(db, project_id).consent
        held = db.execute(select(person.c.settings).where(person.c.id == actor.person_id)).scalar_one()
        if has_consented(held, project_id, text):
            return
        given = {**held, "consent": {**held.get("consent", {}), project_id: sha256(text)}}
        db.execute(update(person).where(person.c.id == actor.person_id).values(settings=given))
        store.log(db, actor.pseudonym, "consented", project_id, {"text": sha256(text)})

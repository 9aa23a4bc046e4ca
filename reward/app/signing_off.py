"""Signing off a run: a lead says, with what was known then, that its model may be used, or may not.

What was known is frozen into the sign-off: counts, rates with their intervals, the filters' versions, and what was still open. Who signs sends the hash of the evidence that was
shown, so that nobody signs what has changed meanwhile. A sign-off is never changed; the next one about the same run stands beside it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from sqlalchemy import Connection, Row, func, insert, select

from base_model.errors import UserError
from reward.app.log import LAST, canonical
from reward.app.quality import Filters
from reward.app.reports import gently
from reward.app.schema import clip, item, reading, signoff, threshold
from reward.app.security import Actor, Denied, sha256
from reward.app.store import Store, new_id
from reward.safety.policy import load_policy

LONGEST = 4_000


class Signoff(BaseModel):
    id: str
    run: str
    approved: bool
    statement: str
    by: str
    at: int
    evidence: dict[str, Any]
    hash: str
    """Of the evidence, as the log holds it."""


def runs_of(db: Connection, project_id: str) -> list[tuple[str, int]]:
    """(run, clips), the newest first. Clips that are restricted to child safety, and worse copies, are not counted."""
    kept = (clip.c.project_id == project_id, clip.c.state != "restricted", clip.c.made_of.is_(None))
    return [
        (run, number)
        for run, number, _ in db.execute(
            select(clip.c.run, func.count(), func.max(clip.c.created_at)).where(*kept).group_by(clip.c.run).order_by(func.max(clip.c.created_at).desc())
        )
    ]


class Counted(BaseModel):
    """What is counted of a run."""

    clips: dict[str, int]
    withdrawn: int
    filters: list[str]
    open: dict[str, Any]


def counts_of(db: Connection, project_id: str, run: str) -> Counted:
    """Clips by verdict, the filters that ruled on them, and what is still open. Raises Denied for a run that has no clips."""
    mine = (clip.c.project_id == project_id, clip.c.run == run, clip.c.state != "restricted", clip.c.made_of.is_(None))
    counted = db.execute(select(clip.c.verdict, clip.c.state, func.count()).where(*mine).group_by(clip.c.verdict, clip.c.state)).all()
    if not counted:
        raise Denied(404, "there is nothing here")
    decided = select(reading.c.id).where(reading.c.item_id == item.c.id, reading.c.state == "decided").exists()
    waiting = db.execute(select(item.c.queue, func.count()).join(clip, clip.c.id == item.c.clip).where(*mine, item.c.state != "closed", ~decided).group_by(item.c.queue)).all()
    proposed = db.execute(select(func.count()).where(threshold.c.project_id == project_id, threshold.c.state == "proposed")).scalar_one()
    return Counted(
        clips={verdict: sum(number for said, _, number in counted if said == verdict) for verdict in ("allow", "review", "error", "block")},
        withdrawn=sum(number for _, state, number in counted if state == "withdrawn"),
        filters=_versions(db, mine),
        open={"items": {queue: number for queue, number in sorted(map(tuple, waiting))}, "proposed thresholds": proposed},
    )


def evidence_of(run: str, counted: Counted, filters: Filters) -> dict[str, Any]:
    """What is known of a run: the rates are those of the versions of the filters that ruled on it."""
    return {
        "run": run,
        **counted.model_dump(),
        "policy_version": load_policy().version,
        "rates": [row.model_dump(mode="json") for row in filters.rows if set(row.filter.split(", ")) <= set(counted.filters)],
        "audit": {"clips": filters.clips, "drawn": filters.drawn, "read": filters.read, "unconfirmed": filters.unconfirmed},
    }


def _versions(db: Connection, mine: Any) -> list[str]:
    found: set[str] = set()
    for (decision,) in gently(db.execution_options(yield_per=200).execute(select(clip.c.decision).where(*mine))):
        found.update(each["filter"] for each in decision.get("rulings", []))
    return sorted(found)


def hash_of(evidence: dict[str, Any]) -> str:
    return sha256(canonical(evidence))


def sign(store: Store, project_id: str, run: str, approved: bool, statement: str, seen: str, filters: Filters, me: Actor) -> str:
    """The id of a new sign-off, or of the last one about the run where it says the very same. seen: hash of the evidence that was shown.

    Raises UserError without a statement, and Denied where the evidence is another by now.
    """
    statement = statement.strip()
    if not 1 <= len(statement) <= LONGEST:
        raise UserError(f"a statement has 1 to {LONGEST} characters, statement. Say what you looked at and why you decide so")
    made = new_id("s")
    with store.reading() as db:
        evidence = evidence_of(run, counts_of(db, project_id, run), filters)
    if hash_of(evidence) != seen:
        raise Denied(409, "what is known of the run has changed. Load the page again, once its numbers are up to date")
    with store.writing() as db:
        before = next(iter(_newest_first(db, project_id, run)), None)
        if before is not None and _says(before) == (approved, statement, me.pseudonym, evidence):
            return str(before.id)  # the button was pressed twice
        last = db.execute(LAST).first()
        frozen = {**evidence, "log": {"seq": last.seq, "hash": last.hash} if last else None}
        row = {"id": made, "project_id": project_id, "run": run, "approved": approved, "evidence": frozen, "statement": statement, "person_id": me.pseudonym, "at": store.now()}
        db.execute(insert(signoff), row)
        told = {"project": project_id, "run": sha256(run), "evidence": hash_of(frozen), "statement": sha256(statement)}
        store.log(db, me.pseudonym, "run approved" if approved else "run refused", made, told)
    return made


def signoffs(db: Connection, project_id: str) -> list[Signoff]:
    """Newest first."""
    return [_signoff(row) for row in _newest_first(db, project_id)]


def _newest_first(db: Connection, project_id: str, run: str | None = None) -> Sequence[Row[Any]]:
    wanted = select(signoff).where(signoff.c.project_id == project_id).order_by(signoff.c.at.desc(), signoff.c.id)
    return db.execute(wanted if run is None else wanted.where(signoff.c.run == run)).all()


def _says(row: Row[Any]) -> tuple[bool, str, str, dict[str, Any]]:
    return row.approved, row.statement, row.person_id, {name: value for name, value in row.evidence.items() if name != "log"}


def _signoff(row: Any) -> Signoff:
    return Signoff(id=row.id, run=row.run, approved=row.approved, statement=row.statement, by=row.person_id, at=row.at, evidence=row.evidence, hash=hash_of(row.evidence))


def write_card(store: Store, signoff_id: str, card_path: Path) -> dict[str, Any]:
    """Adds a sign-off to the card beside an adapter's weights (`x.json`), once, and leaves everything else in it, and the weights, as they are; returns the card.

    Raises UserError for an unknown sign-off and for a card that cannot be read.
    """
    from base_model.checkpoint import atomic_write, read_json

    with store.reading() as db:
        row = db.execute(select(signoff).where(signoff.c.id == signoff_id)).first()
    if row is None:
        raise UserError(f"no sign-off {signoff_id!r}. Give the id that the page of sign-offs shows")
    card, told = read_json(card_path, "the card of the weights"), _signoff(row).model_dump(mode="json")
    told["at"] = datetime.fromtimestamp(row.at / 1000, UTC).isoformat(timespec="seconds")
    before = card.get("signoffs", [])
    if not isinstance(before, list):
        raise UserError(f"`signoffs` is no list in the card, {card_path}. Restore the file")
    if not any(isinstance(each, dict) and each.get("id") == signoff_id for each in before):
        card["signoffs"] = [*before, told]
        atomic_write(card_path, (json.dumps(card, indent=2, sort_keys=True) + "\n").encode())
    return card

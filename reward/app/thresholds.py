"""Another threshold for a filter: proposed by one person with what it would change, approved by another.

The app changes no filter. Approved thresholds are listed for whoever runs the filters (`listed`); what is stored of a clip stays what the filter said when it was made.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel
from sqlalchemy import Connection, insert, select, update

from base_model.errors import UserError
from reward.app.quality import Measured, Scores, measured
from reward.app.schema import threshold
from reward.app.security import Actor, Denied
from reward.app.store import Store, new_id

if TYPE_CHECKING:
    from reward.safety.audit import Audit, Entry
    from reward.safety.measure import Estimate, Group


class Rates(BaseModel):
    precision: Measured
    recall: Measured


class Moved(BaseModel):
    """Clips on the other side of the new threshold."""

    clips: int
    """Of all that the filter judged."""
    audited: int
    """That were drawn and read."""
    violating: int
    """Of them, by what people said."""


class Preview(BaseModel):
    """What another threshold would have changed."""

    filter: str
    policy: str
    old: float
    new: float
    clips: int
    blocked_more: Moved
    blocked_less: Moved
    before: Rates
    after: Rates


def preview_of(audit: Audit | None, scores: Mapping[tuple[str, str], Scores], name: str, policy: str, new: float) -> Preview:
    """Raises UserError for a filter that ruled on nothing under the policy, and for a threshold that is no score or the old one."""
    some = scores.get((name, policy))
    if some is None:
        raise UserError(f"{name!r} never ruled under {policy}, filter. Choose one of those that are listed")
    if not 0 < new <= 1 or new == some.threshold:
        raise UserError("a threshold is above 0, at most 1, and another than now, new. Choose another")
    old, said = some.threshold, _said(audit, policy)
    more, less = ({each for each, score in some.by_clip.items() if low <= score < high} for low, high in ((new, old), (old, new)))
    entries = _entries(audit, name, some)
    return Preview(
        filter=name,
        policy=policy,
        old=old,
        new=new,
        clips=len(some.by_clip),
        blocked_more=_moved(more, said),
        blocked_less=_moved(less, said),
        before=_rates(entries, said, some, policy, old),
        after=_rates(entries, said, some, policy, new),
    )


def _said(audit: Audit | None, policy: str) -> dict[str, bool]:
    """Drawn clips of which people could tell whether they violate the policy."""
    if audit is None:
        return {}
    from reward.safety.audit import by_clip, violates

    readings = by_clip(audit.readings)
    answers = {entry.clip_id: violates(readings.get(entry.clip_id, []), policy) for entry in audit.drawn}
    return {clip_id: answer for clip_id, answer in answers.items() if answer is not None}


def _moved(clips: set[str], said: Mapping[str, bool]) -> Moved:
    audited = clips & said.keys()
    return Moved(clips=len(clips), audited=len(audited), violating=sum(said[each] for each in audited))


def _entries(audit: Audit | None, name: str, some: Scores) -> list[Entry]:
    """What was drawn from, of the newest version that holds the filter."""
    versions = [version for version in (audit.versions if audit else ()) if name in version.split(", ")]
    return [entry for entry in audit.entries if entry.filter_version == versions[-1] and entry.clip_id in some.by_clip] if audit and versions else []


def _rates(entries: Iterable[Entry], said: Mapping[str, bool], some: Scores, policy: str, at: float) -> Rates:
    """Precision of what is blocked for the policy, and recall of all that is blocked, had the threshold been `at`. Probabilities stay those the clips were drawn with."""
    from reward.safety.measure import Cell, Review, group_of, precision, recall

    cells: dict[tuple[str, object], dict[object, list[Entry]]] = defaultdict(lambda: defaultdict(list))
    for entry in entries:
        score = some.by_clip[entry.clip_id]
        here = score >= at or (policy in entry.policies and score < some.threshold)  # or another filter blocked it for the same
        elsewhere = bool(set(entry.policies) - {policy})
        group: tuple[str, object] = ("own", 0) if here else ("other", 0) if elsewhere else ("passed", (entry.pool, entry.band))
        cells[group][entry.stratum].append(entry)
    groups: dict[str, list[Group]] = {"own": [], "other": [], "passed": []}
    for (pool, _), strata in sorted(cells.items(), key=str):
        told = [[said[entry.clip_id] for entry in some_ if entry.why and entry.clip_id in said] for some_ in strata.values()]
        groups[pool].append(group_of([Cell(len(some_), len(answers), (sum(answers),)) for some_, answers in zip(strata.values(), told, strict=True)]))
    blocked, passed = (*groups["own"], *groups["other"]), tuple(groups["passed"])
    return Rates(precision=_told(precision(groups["own"]), groups["own"]), recall=_told(recall(Review(blocked, passed)), (*blocked, *passed)))


def _told(estimate: Estimate, groups: Iterable[Group]) -> Measured:
    return measured(estimate[:3], sum(group.reviewed for group in groups), estimate.note)


# Proposed and decided


class Proposal(BaseModel):
    id: str
    state: Literal["proposed", "approved", "refused"]
    preview: Preview
    proposed_by: str
    proposed_at: int
    decided_by: str | None
    decided_at: int | None


def propose(store: Store, project_id: str, preview: Preview, me: Actor) -> str:
    """The id of a proposal, with what was foreseen. Raises UserError while another one for the same filter and policy waits."""
    made = new_id("h")
    with store.writing() as db:
        same = (threshold.c.project_id == project_id, threshold.c.filter == preview.filter, threshold.c.policy == preview.policy, threshold.c.state == "proposed")
        if db.execute(select(threshold.c.id).where(*same)).first():
            raise UserError(f"another threshold of {preview.filter} under {preview.policy} waits for a decision, filter. Decide that one first")
        row = {
            "id": made, "project_id": project_id, "filter": preview.filter, "policy": preview.policy, "old": preview.old, "new": preview.new,
            "preview": preview.model_dump(mode="json"), "proposed_by": me.pseudonym, "proposed_at": store.now(), "state": "proposed",
        }  # fmt: skip
        db.execute(insert(threshold), row)
        store.log(db, me.pseudonym, "threshold proposed", made, {"project": project_id, "filter": preview.filter, "policy": preview.policy, "old": preview.old, "new": preview.new})
    return made


def decide(store: Store, project_id: str, proposal_id: str, approve: bool, me: Actor) -> None:
    """Approves, which another person than who proposed has to do, or refuses; deciding the same again changes nothing. Raises Denied, 404, 403 or 409."""
    with store.writing() as db:
        row = db.execute(select(threshold).where(threshold.c.id == proposal_id, threshold.c.project_id == project_id)).first()
        if row is None:
            raise Denied(404, "there is nothing here")
        state = "approved" if approve else "refused"
        if row.state == state and row.decided_by == me.pseudonym:
            return
        if row.state != "proposed":
            raise Denied(409, f"this was {row.state} already")
        if approve and row.proposed_by == me.pseudonym:
            raise Denied(403, "who proposed a threshold does not approve it. Ask another lead or a senior reviewer")
        db.execute(update(threshold).where(threshold.c.id == proposal_id).values(state=state, decided_by=me.pseudonym, decided_at=store.now()))
        store.log(db, me.pseudonym, f"threshold {state}", proposal_id, {"project": project_id, "filter": row.filter, "policy": row.policy, "old": row.old, "new": row.new})


def proposals(db: Connection, project_id: str) -> list[Proposal]:
    """Newest first."""
    rows = db.execute(select(threshold).where(threshold.c.project_id == project_id).order_by(threshold.c.proposed_at.desc(), threshold.c.id)).all()
    return [Proposal(**{name: getattr(row, name) for name in Proposal.model_fields}) for row in rows]


def listed(proposals: Iterable[Proposal]) -> list[dict[str, Any]]:
    """The approved thresholds that hold now, one for each filter and policy."""
    newest: dict[tuple[str, str], Proposal] = {}
    for each in sorted((each for each in proposals if each.state == "approved"), key=lambda each: each.decided_at or 0):
        newest[each.preview.filter, each.preview.policy] = each
    return [
        {
            "filter": name,
            "policy": policy,
            "threshold": each.preview.new,
            "was": each.preview.old,
            "proposed_by": each.proposed_by,
            "approved_by": each.decided_by,
            "approved_at": each.decided_at,
        }
        for (name, policy), each in sorted(newest.items())
    ]


def as_yaml(rows: list[dict[str, Any]]) -> str:
    text: str = yaml.safe_dump({"thresholds": rows}, sort_keys=False, allow_unicode=True)
    return text

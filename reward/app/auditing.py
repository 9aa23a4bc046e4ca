"""Audits of the filters: which clips reviewers are asked about by chance, and what they said as files that `rushes safety-report` and `--safety.audit` read.

`draw` makes a wave: every clip that the filters decided about and no wave knows yet gets its probability (`reward/safety/audit.py`), which the database never changes; those that
were drawn go to the queues "blocked", "random" and "stratified", the others stay as "undrawn", for without them nothing can be said of the drawn ones. Restricted clips are not
drawn: nobody is shown one for the sake of a number. One that is restricted later keeps its place, and what the child-safety role said of it counts.
"""

from __future__ import annotations

import hashlib
import hmac
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Select, func, insert, or_, select

from base_model.errors import UserError
from reward.app.reviewing import AUDITS, Stands, known_codes, restricting, settle, standing, violates, worst
from reward.app.schema import clip, item, prompt
from reward.app.security import Actor
from reward.app.settings import settings_of
from reward.app.store import Store, new_id
from reward.safety.policy import load_policy

if TYPE_CHECKING:
    from reward.safety.audit import Entry, Gold, Reading

UNDRAWN = "undrawn"
"""The queue of what an audit could have drawn and did not: nobody waits for it."""
FILE = "audit-00000.jsonl"


def draw(store: Store, project_id: str, by: Actor) -> dict[str, int]:
    """Draws a wave; returns how many clips of each pool it knows and how many of each queue were drawn. Raises UserError where there is
    nothing to draw from, or too small a budget."""
    from reward.safety.audit import Plan, candidate_of
    from reward.safety.audit import draw as drawn_of

    with store.reading() as db:
        settings = settings_of(db, project_id).reviewing
        wave = _next_wave(db, project_id)
        known = select(item.c.clip).where(item.c.project_id == project_id, (item.c.wave.is_not(None)) | (item.c.why["gold"].as_string().is_not(None)))
        rows = db.execute(_decided(project_id).where(clip.c.id.not_in(known))).all()
    candidates = {row.id: candidate for row in rows if (candidate := candidate_of(row.clip_id, row.decision, kind=row.kind)) is not None}
    if not candidates:
        raise UserError("no clip that the filters decided about and no audit knows. Import some first")
    unknown = sorted({code for candidate in candidates.values() for code in candidate.policies if code not in load_policy()})
    if unknown:
        raise UserError(
            f"clips were blocked under {unknown[0]!r}, which the policy does not have: nothing could be said of them. Import them as judged under the policy that is used"
        )
    seed = int.from_bytes(hmac.new(store.secret, b"audit " + project_id.encode(), hashlib.sha256).digest()[:7])
    try:
        entries = drawn_of(list(candidates.values()), Plan(settings.blocked_audit, settings.passed_audit), seed=seed, wave=wave)
    except ValueError as error:
        raise UserError(f"{error}, blocked_audit and passed_audit. Raise them in the project's settings") from error
    ids = {candidate.clip_id: clip_id for clip_id, candidate in candidates.items()}
    items = [_item_of(store, entry, project_id, ids[entry.clip_id]) for entry in entries]
    with store.writing() as db:
        if _next_wave(db, project_id) != wave:
            raise UserError("somebody drew a wave at the same moment. Look at the queues")
        if set(db.execute(known).scalars()) & candidates.keys():
            raise UserError("gold was planted at the same moment. Draw again")
        db.execute(insert(item), items)
        drawn = {queue: sum(row["queue"] == queue for row in items) for queue in AUDITS}
        digest = hashlib.sha256("\n".join(f"{row['clip']} {row['queue']} {row['probability']}" for row in items).encode()).hexdigest()
        store.log(db, by.pseudonym, "audit drawn", project_id, {"wave": wave, **drawn, "known": len(items), "sha256": digest})
    return {"blocked_pool": sum(entry.pool == "blocked" for entry in entries), "passed_pool": sum(entry.pool == "passed" for entry in entries), **drawn}


def _decided(project_id: str) -> Select[Any]:
    """Clips that the filters decided about, with the kind of their prompt. Restricted and deleted ones, and copies that were made worse, are left out."""
    there = (clip.c.project_id == project_id, clip.c.verdict.in_(("allow", "block")), clip.c.state.in_(("live", "withdrawn")), clip.c.made_of.is_(None))
    joined = (prompt.c.project_id == clip.c.project_id) & (prompt.c.prompt_id == clip.c.prompt_id)
    return select(clip.c.id, clip.c.clip_id, clip.c.verdict, clip.c.decision, prompt.c.kind).join(prompt, joined).where(*there)


def _next_wave(db: Connection, project_id: str) -> int:
    last = db.execute(select(func.max(item.c.wave)).where(item.c.project_id == project_id)).scalar()
    return 0 if last is None else int(last) + 1


def _item_of(store: Store, entry: Entry, project_id: str, clip_id: str) -> dict[str, Any]:
    place = hmac.new(store.secret, b"place " + entry.clip_id.encode(), hashlib.sha256).digest()
    candidate = entry.model_dump(mode="json", include={"pool", "score", "filter_version", "policy_version", "policies", "kind"})
    return {
        "id": new_id("q"),
        "project_id": project_id,
        "clip": clip_id,
        "queue": entry.why or UNDRAWN,
        "why": {"policies": list(entry.policies), "candidate": candidate},
        "probability": entry.probability,
        "wave": entry.wave,
        "band": entry.band,
        "source": None,
        "severity": worst(load_policy(), entry.policies),
        "place": entry.wave + int.from_bytes(place[:6]) / 2**48,
        "wanted": int(bool(entry.why)),
        "taken": 0,
        "state": "open" if entry.why else "closed",
        "created_at": store.now(),
    }


def plant(store: Store, project_id: str, clip_id: str, policies: Sequence[str], by: Actor) -> str:
    """Puts a clip whose truth is known among those of the random audit, to learn how often readers err; returns the item's id. clip_id: of the table, or the digest of
    its frames, as clip stores name it. policies: what it violates, none where it is harmless.

    Who planted it does not read it. Raises UserError for a clip of another project, one that an audit drew or that was planted before, and a rule of which the child-safety role
    alone sees clips.
    """
    known_codes(policies)
    if restricting(policies):
        raise UserError("what violates this is for the child-safety role alone, policies. It cannot be planted")
    with store.writing() as db:
        named = or_(clip.c.id == clip_id, clip.c.clip_id == clip_id)
        found = db.execute(select(clip.c.id).where(named, clip.c.project_id == project_id, clip.c.state.in_(("live", "withdrawn")))).scalar()
        if found is None:
            raise UserError(f"no such clip in this project, {clip_id}. Take the id of one that was imported")
        clip_id = found
        taken = (item.c.queue.in_(AUDITS)) & (item.c.clip == clip_id)
        if db.execute(select(item.c.id).where(taken)).first() is not None:
            raise UserError(f"an audit drew this clip, or it was planted, {clip_id}. Gold clips are others than the audited ones")
        place = max(0, _next_wave(db, project_id) - 1) + int.from_bytes(hashlib.sha256(store.secret + clip_id.encode()).digest()[:6]) / 2**48
        row = {
            "id": new_id("q"),
            "project_id": project_id,
            "clip": clip_id,
            "queue": "random",
            "why": {"policies": [], "gold": sorted(policies), "not": [by.pseudonym]},
            "severity": 0,
            "place": place,
        }
        db.execute(insert(item), {**row, "wanted": 1, "taken": 0, "state": "open", "created_at": store.now()})
        store.log(db, by.pseudonym, "gold planted", str(row["id"]), {"clip": clip_id})
    return str(row["id"])


def audit_folder(store: Store, project_id: str, folder: Path, *, training: bool = False) -> dict[str, int]:
    """Writes every entry, reading and gold clip of a project's audits as a folder that `load_audit` reads; returns how many of each. What can still be undone is not in it.

    Written again it is brought up to date. training: for `rushes safety-train`, without what was said of restricted clips, so that nothing is learned from them.
    Raises UserError where no audit was drawn, and where the folder holds another one.
    """
    from reward.safety.audit import Entry, Gold

    with store.writing() as db:
        settle(store, db, project_id)
    with store.reading() as db:
        rows = _audit_items(db, project_id)
        if not any(row.wave is not None for row in rows):
            raise UserError("no audit was drawn in this project. Draw one first")
        said = standing(db, project_id=project_id)
    records: list[Entry | Reading | Gold] = []
    asked: dict[str, tuple[str, bool]] = {}
    for row in rows:
        if row.wave is None:
            records.append(Gold(clip_id=row.clip_id, policies=tuple(row.why["gold"])))
        else:
            why = "" if row.queue == UNDRAWN else row.queue
            records.append(Entry(clip_id=row.clip_id, **row.why["candidate"], wave=row.wave, band=row.band, probability=row.probability, why=why))
        if row.queue != UNDRAWN:
            asked[row.clip] = row.clip_id, row.state == "restricted"
    for clip_id, (digest, restricted) in asked.items():
        if not (training and restricted):
            records += _readings_of(digest, said.get(clip_id, []))
    return _write(folder, records)


def _audit_items(db: Connection, project_id: str) -> Sequence[Any]:
    columns = (item.c.clip, item.c.queue, item.c.why, item.c.wave, item.c.band, item.c.probability, clip.c.clip_id, clip.c.state)
    found = select(*columns).join(clip, clip.c.id == item.c.clip).where(item.c.project_id == project_id)
    found = found.where((item.c.wave.is_not(None)) | (item.c.why["gold"].as_string().is_not(None)))
    return db.execute(found.order_by(item.c.wave, item.c.place, item.c.id)).all()


def _readings_of(digest: str, reviews: Sequence[Stands]) -> list[Reading]:
    from reward.safety.audit import Reading

    return [
        Reading.model_validate(
            {"clip_id": digest, "reader": each.reader, "said": each.said, "policies": tuple(each.policies), "final": each.final, "policy_version": each.policy_version}
        )
        for each in reviews
        if each.settled
    ]


def corrections_folder(store: Store, project_id: str, folder: Path) -> dict[str, int]:
    """Writes the rulings that people overturned outside of audits (appeals, flags, disagreements) as rows for `rushes safety-train --audits '[AUDIT, THIS]'`; returns how many.

    Each counts once: chance had no part in them, so they say nothing about rates. Restricted and deleted clips, drawn ones and gold are left out.
    Raises UserError where there are none.
    """
    records = _corrections(store, project_id)
    if not records:
        raise UserError("people overturned no ruling outside of the audits. There is nothing to write")
    return _write(folder, records, replace=True)


def audit_folders(store: Store, project_id: str, folder: Path, *, training: bool = False) -> dict[str, dict[str, int] | None]:
    """`audit_folder`, and beside it, in `FOLDER-corrections`, `corrections_folder` where there are any; returns how many of each, None where there are none."""
    beside = folder.with_name(f"{folder.name}-corrections")
    told = audit_folder(store, project_id, folder, training=training)
    records = _corrections(store, project_id)
    if not records:
        (beside / FILE).unlink(missing_ok=True)  # of rulings that were overturned once, and are not any more
    return {"audit": told, "corrections": _write(beside, records, replace=True) if records else None}


def _corrections(store: Store, project_id: str) -> list[Entry | Reading | Gold]:
    from reward.safety.audit import Entry, candidate_of

    with store.writing() as db:
        settle(store, db, project_id)
    with store.reading() as db:
        drawn = {row.clip for row in _audit_items(db, project_id) if row.queue != UNDRAWN}
        said = {clip_id: reviews for clip_id, some in standing(db, project_id=project_id).items() if clip_id not in drawn and (reviews := [each for each in some if each.settled])}
        rows = db.execute(_decided(project_id)).all()
    records: list[Entry | Reading | Gold] = []
    for row in rows:
        stands, candidate = violates(said.get(row.id, [])), candidate_of(row.clip_id, row.decision, kind=row.kind)
        if candidate is None or stands is None or stands == (row.verdict == "block"):
            continue
        records.append(Entry(**candidate.model_dump(), wave=0, band=0, probability=1.0, why="blocked" if row.verdict == "block" else "stratified"))
        records += _readings_of(row.clip_id, said[row.id])
    return records


def _write(folder: Path, records: Sequence[Entry | Reading | Gold], *, replace: bool = False) -> dict[str, int]:
    """One file, whole or not at all, checked as whoever reads it will."""
    from base_model.checkpoint import atomic_write
    from reward.safety.audit import load_audit

    content = "".join(record.model_dump_json() + "\n" for record in records).encode()
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / FILE).write_bytes(content)
        audit = load_audit(Path(scratch))
    parts = sorted(folder.glob("audit-*.jsonl")) if folder.is_dir() else []
    if parts and (len(parts) > 1 or parts[0].name != FILE or not (replace or set(load_audit(folder).entries) <= set(audit.entries))):
        raise UserError(f"the folder holds another audit, {folder}. Give a new one")
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / FILE, content)
    return {"clips": len(audit.entries), "readings": len(audit.readings), "gold": len(audit.gold)}

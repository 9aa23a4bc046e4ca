"""What is taken away for good: a person's name, a clip's media. Answers, reviews and the log stay as they are; a tombstone and an event say what went.

A person's name, login and own words lie in `person_private`, `private_text` and drafts, and are deleted there; everything else knows a pseudonym. On SQLite what was deleted is
overwritten (`secure_delete`) and the write-ahead log is emptied, so no file of the store holds the name any more. On PostgreSQL the tables are written anew (VACUUM FULL), but
its write-ahead log and its archives keep old bytes for as long as the server is set to. Backups and exports that were made before are files of yours: delete them, too.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing

from sqlalchemy import Connection, delete, func, insert, null, select, text, update

from reward.app.labeling import close_with_deleted
from reward.app.media import path_of
from reward.app.people import revoke_invitations
from reward.app.reviewing import RESTRICTION, forget_draft, give_up
from reward.app.schema import api_token, assignment, clip, event, item, membership, person, person_private, private_text, reading, session, tombstone
from reward.app.security import HOUR, Denied
from reward.app.settings import settings_of
from reward.app.store import Store, new_id

DAY = 24 * HOUR
NOTHING = "there is nothing here"
PATIENCE = 5.0
"""Seconds that readers have to end before the write-ahead log is left as it is."""


# People


def delete_person(store: Store, person_id: str, by: str) -> bool:
    """Deletes who somebody is; what the person answered stays, under the pseudonym. by: a pseudonym.

    Returns whether the old bytes are gone from the store's files, too: False where a reader did not end in time, and `forget` has to be called again. Raises Denied, 404, for
    nobody, and for somebody who was deleted.
    """
    with store.writing() as db:
        pseudonym = db.execute(select(person.c.pseudonym).where(person.c.id == person_id, person.c.state != "deleted")).scalar()
        if pseudonym is None:
            raise Denied(404, NOTHING)
        for table in (person_private, private_text, session, api_token, membership):
            db.execute(delete(table).where(table.c.person_id == person_id))
        for table in (assignment, reading):
            db.execute(update(table).where(table.c.person_id == person_id, table.c.draft.is_not(None)).values(draft=null()))
        db.execute(update(person).where(person.c.id == person_id).values(state="deleted", settings={}))
        revoke_invitations(store, db, by=pseudonym)
        _bury(store, db, "person", person_id, "asked to be deleted", by)
        store.log(db, by, "person deleted", pseudonym)
    return forget(store)


def forget(store: Store) -> bool:
    """Takes what was deleted out of the store's files; False where a reader held on to it. What a request that was on its way still wrote of a deleted person goes, too."""
    with store.writing() as db:
        gone = select(person.c.id).where(person.c.state == "deleted")
        for table in (private_text, session, api_token):
            db.execute(delete(table).where(table.c.person_id.in_(gone)))
        for table in (assignment, reading):
            db.execute(update(table).where(table.c.person_id.in_(gone), table.c.draft.is_not(None)).values(draft=null()))
    if not store.is_sqlite:
        with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as db:
            for table in (person_private, private_text, session, api_token, assignment, reading):
                db.execute(text(f"VACUUM {'FULL ' if table in (person_private, private_text) else ''}{table.name}"))
        return True
    with closing(sqlite3.connect(str(store.url.database), timeout=PATIENCE)) as db:
        busy, *_ = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    return not busy


# Clips


def delete_clip(store: Store, project_id: str, clip_id: str, by: str, *, restricted: bool = False, others: bool = True) -> None:
    """Deletes the media of a clip, and of the copies that were made of it, for good. clip_id: of the table. restricted, others: whether who asks may delete
    clips that only the child-safety role sees, and all others.

    Media lie by content: where another project holds the same clip, they stay until it is deleted there. Raises Denied, 404, for a clip that is not there, or not for who asks.
    """
    states = [*(["restricted"] if restricted else []), *(["live", "withdrawn"] if others else [])]
    with store.writing() as db:
        found = db.execute(select(clip.c.id, clip.c.clip_id).where(clip.c.id == clip_id, clip.c.project_id == project_id, clip.c.state.in_(states))).first()
        if found is None:
            raise Denied(404, NOTHING)
        gone = _with_copies(db, [clip_id])
        _mark(store, db, list(gone), "asked for", by)
    remove_media(store, list(gone.values()))


def retain(store: Store, project_id: str, by: str = "system") -> int:
    """`retire`, and what earlier deletions of people did not finish; returns how many clips."""
    gone = retire(store, project_id, by)
    forget(store)
    return gone


def retire(store: Store, project_id: str, by: str = "system") -> int:
    """Deletes the media of clips that were withdrawn longer ago than the project keeps them; returns how many. Media that an earlier deletion left, killed on its way, go, too."""
    gone: Sequence[str] = []
    with store.reading() as db:
        days = settings_of(db, project_id).retention_days
    if days is not None:
        since = select(func.max(event.c.at)).where(event.c.subject == clip.c.id, event.c.kind.in_(("clip withdrawn", RESTRICTION[1]))).correlate(clip).scalar_subquery()
        old = func.coalesce(since, clip.c.created_at) <= store.now() - days * DAY
        with store.writing() as db:
            gone = db.execute(select(clip.c.id).where(clip.c.project_id == project_id, clip.c.state == "withdrawn", old)).scalars().all()
            _mark(store, db, list(_with_copies(db, gone)), f"withdrawn more than {days} days ago", by)
    with store.reading() as db:
        digests = db.execute(select(clip.c.clip_id).where(clip.c.project_id == project_id, clip.c.state == "deleted")).scalars().all()
    remove_media(store, sorted(_with_files(store, digests)))
    return len(gone)


def _with_copies(db: Connection, clips: Sequence[str]) -> dict[str, str]:
    """Clips and the worse copies that were made of them: id -> digest of the frames. Copies that were deleted before are left out."""
    found: dict[str, str] = {}
    for clip_id in clips:
        also = (clip.c.made_of == clip_id) & (clip.c.state != "deleted")
        found.update(db.execute(select(clip.c.id, clip.c.clip_id).where((clip.c.id == clip_id) | also)).all())
    return found


def _mark(store: Store, db: Connection, clips: Sequence[str], reason: str, by: str) -> None:
    for clip_id in clips:
        db.execute(update(clip).where(clip.c.id == clip_id).values(state="deleted"))
        _end_reviews(store, db, clip_id)
        _bury(store, db, "clip", clip_id, reason, by)
        store.log(db, by, "clip deleted", clip_id)
    for project_id in db.execute(select(clip.c.project_id).where(clip.c.id.in_(clips)).distinct()).scalars().all():
        close_with_deleted(db, project_id)


def _end_reviews(store: Store, db: Connection, clip_id: str) -> None:
    """Nobody is asked about a clip any more: its items are closed, and readings of it that are open are over, with their drafts. What was decided stands."""
    for reading_id in db.execute(select(reading.c.id).where(reading.c.clip == clip_id, reading.c.state == "open")).scalars().all():
        give_up(db, reading_id, "expired")
        forget_draft(db, reading_id)
        store.log(db, "system", "reading expired", reading_id)
    db.execute(update(item).where(item.c.clip == clip_id, item.c.state != "closed").values(state="closed"))


def _with_files(store: Store, digests: Sequence[str]) -> set[str]:
    """Those of some clips of which any file is there."""
    folders = {path_of(store, digest).parent for digest in digests}
    return set(digests).intersection(file.name.removeprefix(".")[:64] for folder in folders for file in folder.glob("*"))


def remove_media(store: Store, digests: Sequence[str]) -> None:
    """Removes every file of clips that are deleted in all projects, also half-written ones that a killed import left. digests: of their frames."""
    for digest in digests:
        with store.reading() as db:
            held = db.execute(select(clip.c.id).where(clip.c.clip_id == digest, clip.c.state != "deleted").limit(1)).first()
        if held is None:
            folder = path_of(store, digest).parent
            for file in [*folder.glob(f"{digest}.*"), *folder.glob(f".{digest}.*")]:
                file.unlink(missing_ok=True)


def _bury(store: Store, db: Connection, kind: str, ref: str, reason: str, by: str) -> None:
    db.execute(insert(tombstone), {"id": new_id("d"), "kind": kind, "ref": ref, "reason": reason, "by": by, "at": store.now()})

"""The event log: who did what, when, as a chain of hashes, so that nobody changes it unseen.

    hash = sha256(canonical JSON of [seq, at, actor, kind, subject, body, prev]), prev = the hash before, of the first one 64 zeros

It holds pseudonyms, ids and hashes, and nothing that a person wrote: that lies in a table of which rows can be deleted. The chain shows a changed byte, a row taken out and
a changed
order; that the tail was cut off shows against an anchor kept outside of the database, one line {"seq", "hash", "at", "mac"} with an HMAC under the app's secret.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import hmac
import json
import os
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, insert, select

from base_model.errors import UserError
from reward.app.schema import event

FIRST = "0" * 64
LAST = select(event.c.seq, event.c.hash, event.c.at).order_by(event.c.seq.desc()).limit(1)
"""How the log ends."""
ADD = insert(event)
LONGEST_LINE = 1024  # bytes of an anchor, and more


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def digest(seq: int, at: int, actor: str, kind: str, subject: str, body: str, prev: str) -> str:
    return hashlib.sha256(canonical([seq, at, actor, kind, subject, body, prev]).encode()).hexdigest()


def append(db: Connection, *, at: int, actor: str, kind: str, subject: str, body: Mapping[str, Any]) -> str:
    """Adds one event behind the last and returns its hash. The transaction has to be the only one that writes (`Store.writing`)."""
    last = db.execute(LAST).first()
    seq, prev = (last.seq + 1, last.hash) if last else (1, FIRST)
    told = canonical(dict(body))
    made = digest(seq, at, actor, kind, subject, told, prev)
    db.execute(ADD, {"seq": seq, "at": at, "actor": actor, "kind": kind, "subject": subject, "body": told, "prev": prev, "hash": made})
    return made


@dataclass(frozen=True)
class Anchor:
    """How long the log was at a time, and how it ended."""

    seq: int
    hash: str
    at: int

    def line(self, secret: bytes) -> str:
        told = {"seq": self.seq, "hash": self.hash, "at": self.at}
        return canonical({**told, "mac": _mac(told, secret)}) + "\n"


def add_anchor(path: Path, anchor: Anchor, secret: bytes) -> None:
    """Writes an anchor behind the others, whole or not at all. What a writer that was killed left of a line is taken away, so that the next one is a line of its own."""
    line = anchor.line(secret).encode()
    with open(path, "a+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        size = file.seek(0, os.SEEK_END)
        tail = os.pread(file.fileno(), LONGEST_LINE, max(0, size - LONGEST_LINE))
        if b"\n" in tail or size <= LONGEST_LINE:
            size -= len(tail) - tail.rfind(b"\n") - 1
        file.truncate(size)
        if file.write(line) < len(line):
            file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _mac(told: Mapping[str, Any], secret: bytes) -> str:
    return hmac.new(secret, b"anchor " + canonical(dict(told)).encode(), hashlib.sha256).hexdigest()


def read_anchors(path: Path, secret: bytes) -> list[Anchor]:
    """The anchors of a file, oldest first; a torn last line, of a writer that was killed, is passed over. Raises UserError for a line that this secret did not sign."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    found = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
        try:
            row = json.loads(line)
            told = {name: row[name] for name in ("seq", "hash", "at")}
            good = hmac.compare_digest(_mac(told, secret), str(row["mac"]))
        except (ValueError, KeyError, TypeError):
            good = False
        if not good:
            raise UserError(f"anchor {number} was not written by this app, {path}. The file was changed, or the secret is another one: compare with a copy kept elsewhere")
        found.append(Anchor(**told))
    return found


def verify(db: Connection, anchors: list[Anchor]) -> dict[str, Any]:
    """Walks the whole log. Raises UserError naming the first event that is not as it was written, or the anchor that the log does not reach."""
    expected, prev = 1, FIRST
    wanted: dict[int, Anchor] = {}
    for anchor in anchors:
        if wanted.setdefault(anchor.seq, anchor).hash != anchor.hash:
            raise UserError(f"two anchors differ about event {anchor.seq}. The log was written anew: restore the last backup and compare")
    columns = (event.c.seq, event.c.at, event.c.actor, event.c.kind, event.c.subject, event.c.body, event.c.prev, event.c.hash)
    with closing(db.execute(select(*columns).order_by(event.c.seq), execution_options={"yield_per": 5_000})) as rows:
        for row in rows:
            if row.seq != expected:
                raise UserError(f"event {expected} is missing: the log goes on with {row.seq}. Somebody deleted or moved rows: restore the last backup and compare")
            if row.prev != prev or row.hash != digest(row.seq, row.at, row.actor, row.kind, row.subject, row.body, row.prev):
                raise UserError(f"event {row.seq} ({row.kind}) is not as it was written. Somebody changed it: restore the last backup and compare")
            told = wanted.pop(row.seq, None)
            if told is not None and told.hash != row.hash:
                raise UserError(f"event {row.seq} is another one than the anchor says. The log was written anew: restore the last backup and compare")
            expected, prev = row.seq + 1, row.hash
    if wanted:
        longest = max(wanted)
        raise UserError(f"the log ends with event {expected - 1}, an anchor names {longest}. Its end was cut off: restore the last backup and compare")
    return {"events": expected - 1, "head": prev, "anchors": len(anchors)}

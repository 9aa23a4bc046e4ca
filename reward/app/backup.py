"""A copy of the store while it is used, with a manifest that says what is in it.

    folder/app.sqlite3     or database.dump, of PostgreSQL
    folder/anchor.jsonl    the log's anchors
    folder/media/          the same files (hard links where the disk allows it)
    folder/manifest.json   written last: a folder without one is no backup

Anchors first, then the database, then media: so the database holds all that the anchors name, and media all that the database names. The copy's log is verified before it is
called one; PostgreSQL is dumped in the very state whose log was. The secret that signs anchors is left out unless it is asked for: who has both can write the log anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, func, select

from base_model.errors import UserError
from reward.app import log
from reward.app.schema import event
from reward.app.store import Store

SQLITE, DUMP, MANIFEST = "app.sqlite3", "database.dump", "manifest.json"


def backup(store: Store, folder: Path, *, with_secret: bool = False) -> dict[str, Any]:
    """Copies the store into a folder that is not there yet, whole or not at all; returns the manifest. Raises UserError where it cannot, or where the log does not verify."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is already there. Give a backup a folder of its own")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        made = _copy(store, partial, with_secret)
        _write(partial / MANIFEST, (json.dumps(made, indent=2) + "\n").encode())
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write the backup, {folder}: {error.strerror or error}. Give a folder on a disk with room") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return made


def _copy(store: Store, folder: Path, with_secret: bool) -> dict[str, Any]:
    if store.anchor.exists():
        content = store.anchor.read_bytes()
        _write(folder / store.anchor.name, content[: content.rfind(b"\n") + 1])
    anchors = log.read_anchors(folder / store.anchor.name, store.secret)
    at = store.now()
    if store.is_sqlite:
        database = folder / SQLITE
        _copy_sqlite(store, database)
        engine = create_engine(f"sqlite:///{database.absolute()}")
        with engine.connect() as db:
            told = log.verify(db, anchors)
            head = _head(db)
        engine.dispose()
        for side in ("-wal", "-shm"):
            database.with_name(database.name + side).unlink(missing_ok=True)
    else:
        database = folder / DUMP
        with store.reading() as db:
            told = log.verify(db, anchors)
            head = _head(db)
            _dump_postgresql(store, database, db.execute(select(func.pg_export_snapshot())).scalar_one())
    if head is not None:
        with open(folder / store.anchor.name, "ab") as file:
            file.write(head.line(store.secret).encode())
    count, size = _link_media(store.media, folder / store.media.name)
    if with_secret:
        _write(folder / "secret", store.secret.hex().encode())
        (folder / "secret").chmod(0o600)
    with open(database, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "made_at": at,
        "database": database.name,
        "sha256": digest,
        "events": told["events"],
        "head": told["head"],
        "media_files": count,
        "media_bytes": size,
        "with_secret": with_secret,
    }


def _head(db: Any) -> log.Anchor | None:
    row = db.execute(select(event.c.seq, event.c.hash, event.c.at).order_by(event.c.seq.desc()).limit(1)).first()
    return None if row is None else log.Anchor(row.seq, row.hash, row.at)


def _copy_sqlite(store: Store, target: Path) -> None:
    """One state of the database, by SQLite's own backup; who writes meanwhile does not wait."""
    with closing(sqlite3.connect(f"{Path(str(store.url.database)).absolute().as_uri()}?mode=ro", uri=True)) as source, closing(sqlite3.connect(target)) as copy:
        source.backup(copy)
        copy.execute("PRAGMA journal_mode=DELETE")


def _dump_postgresql(store: Store, target: Path, snapshot: str) -> None:
    """One state of the database, by pg_dump: that which an open transaction sees, and gave out as a snapshot."""
    program = pg_dump()
    advice = "Make the copy on a machine that has it: pg_dump --format=custom --file=database.dump URL"
    if program is None:
        raise UserError(f"pg_dump is not installed, which copies PostgreSQL. {advice}")
    url = store.url.set(drivername="postgresql", password=None).render_as_string()
    environment = {**os.environ, **({"PGPASSWORD": str(store.url.password)} if store.url.password else {})}
    words = [program, "--format=custom", "--no-owner", f"--snapshot={snapshot}", f"--file={target}", f"--dbname={url}"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"pg_dump failed: {' '.join(done.stderr.split())[:300]}. Check that its version is the server's")


def pg_dump() -> str | None:
    """The newest pg_dump there is."""
    newest = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_dump"), key=lambda path: path.parts[-3].zfill(4))
    return str(newest[-1]) if newest else shutil.which("pg_dump")


def _link_media(source: Path, target: Path) -> tuple[int, int]:
    """(files, bytes) of the copy. A file that is deleted meanwhile is left out, and so is one that is half written, whose name begins with a dot."""
    count = size = 0
    for file in sorted(path for path in source.glob("*/[!.]*") if path.is_file() and not path.is_symlink()) if source.is_dir() else ():
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            try:
                os.link(file, copy)
            except OSError:
                shutil.copy2(file, copy)
            count, size = count + 1, size + copy.stat().st_size
        except FileNotFoundError:
            continue
    return count, size


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())

"""Where the app keeps what people said: one SQLite file, or PostgreSQL, by the same code.

At any time one transaction writes: on SQLite because it begins IMMEDIATE, on PostgreSQL by an advisory lock. So what a transaction has read does not change before it has
written, two people
never get one lease, and the log is one chain. A transaction is on disk before it is acknowledged (`synchronous=FULL`; PostgreSQL's default). Readers never wait.

    folder/app.sqlite3      the database, unless --database names another
    folder/secret           made at the first start, unless the environment gives one
    folder/anchor.jsonl     the log's length and hash, about once a second (`log.py`)
    folder/media/           clips and what is shown instead of them, by content
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, func, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, OperationalError

from base_model.errors import UserError
from reward.app import log

WRITER = 0x52555348  # key of PostgreSQL's advisory lock
BUSY_SECONDS = 30
ANCHOR_SECONDS = 1.0


def new_id(kind: str) -> str:
    """A random id: 15 bytes, URL-safe, with a letter of what it is the id of."""
    return f"{kind}_{secrets.token_urlsafe(15)}"


def clock_ms() -> int:
    return time.time_ns() // 1_000_000


class Store:
    """An opened store. database: a SQLAlchemy URL, or none for the SQLite file in `folder`. now: milliseconds since 1970."""

    def __init__(self, folder: Path, database: str | None = None, *, secret: bytes | None = None, now: Callable[[], int] = clock_ms) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.now = folder, now
        self.url = make_url(database) if database else make_url(f"sqlite:///{(folder / 'app.sqlite3').absolute()}")
        if self.url.get_backend_name() not in ("sqlite", "postgresql"):
            raise UserError(f"no store for {self.url.get_backend_name()}, --database. Give postgresql+psycopg://..., or nothing for SQLite")
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self.engine = _engine(self.url, self.is_sqlite)
        self._snapshot: dict[str, Any] = {} if self.is_sqlite else {"isolation_level": "REPEATABLE READ"}
        self._glance: dict[str, Any] = {"rushes_glances": True} if self.is_sqlite else {"isolation_level": "AUTOCOMMIT"}
        self.secret = secret or _own_secret(folder)
        self._writer = threading.Lock()
        self._file: os.stat_result | None = None  # of SQLite, as it was first opened
        self._anchored = (0, 0.0)  # length of the log and when

    @property
    def media(self) -> Path:
        return self.folder / "media"

    @property
    def anchor(self) -> Path:
        return self.folder / "anchor.jsonl"

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that sees one state of the store and writes nothing."""
        with self.engine.connect().execution_options(**self._snapshot) as db:
            yield db

    @contextmanager
    def glancing(self) -> Iterator[Connection]:
        """For one short query, or several that need not see one state: without a transaction, which on PostgreSQL costs two journeys more."""
        with self.engine.connect().execution_options(**self._glance) as db:
            yield db

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """The one transaction that writes; on disk when the block is left, undone when it raises."""
        with self._writer, self.engine.connect().execution_options(rushes_writes=True) as db:
            if not self.is_sqlite:
                db.execute(select(func.pg_advisory_xact_lock(WRITER)))
            try:
                yield db
                self._check_file()
            except BaseException:
                db.rollback()
                raise
            db.commit()
            try:
                self._anchor(db)
            except (OSError, DBAPIError):  # what is written is written: who asked for it is told so
                logging.getLogger(__name__).exception("the log could not be anchored, %s. It is tried again with the next write: make room on the disk", self.anchor)

    def _check_file(self) -> None:
        """Raises OperationalError where another file lies in the place of the database, or none: what is written into an opened one that was deleted is found by nobody."""
        if not self.is_sqlite or not self.url.database or self.url.database == ":memory:":
            return
        try:
            now = os.stat(self.url.database)
        except OSError as error:
            raise OperationalError("the database is gone", None, error) from error
        self._file = self._file or now
        if not os.path.samestat(self._file, now):
            raise OperationalError("another database lies in its place", None, FileNotFoundError(self.url.database))

    def log(self, db: Connection, actor: str, kind: str, subject: str, body: Mapping[str, Any] | None = None) -> str:
        """Adds an event to the log in the transaction that it tells of. actor: a pseudonym."""
        return log.append(db, at=self.now(), actor=actor, kind=kind, subject=subject, body=body or {})

    def _anchor(self, db: Connection, *, now: bool = False) -> None:
        if not now and time.monotonic() - self._anchored[1] < ANCHOR_SECONDS:
            return
        last = db.execute(log.LAST).first()
        db.rollback()
        length = last.seq if last else 0
        if last and length > self._anchored[0]:
            log.add_anchor(self.anchor, log.Anchor(last.seq, last.hash, last.at), self.secret)
        self._anchored = (length, time.monotonic())

    def verify_log(self) -> dict[str, Any]:
        """`log.verify` of this store against its anchors."""
        anchors = log.read_anchors(self.anchor, self.secret)
        with self.reading() as db:
            return log.verify(db, anchors)

    def close(self) -> None:
        """Ends all connections. The log is anchored where this process added to it: who only looked at a changed one does not sign it."""
        with self._writer, self.engine.connect() as db:
            if self._anchored[1]:
                self._anchor(db, now=True)
        self.engine.dispose()


def open_store(folder: Path, database: str | None = None, *, secret: bytes | None = None, now: Callable[[], int] = clock_ms) -> Store:
    """Opens a store, made or brought to the newest schema where needed. Raises UserError where it cannot be reached or is of a newer version."""
    from reward.app.migrations import upgrade

    store = Store(folder, database, secret=secret, now=now)
    try:
        upgrade(store.engine)
    except DBAPIError as error:
        raise UserError(
            f"cannot open the store, {store.url.render_as_string(hide_password=True)}: {' '.join(str(error.orig).split())}. Check that the server runs and the database is there"
        ) from error
    return store


def _engine(url: Any, is_sqlite: bool) -> Engine:
    pool: dict[str, Any] = {"pool_size": 16, "max_overflow": 32, "pool_use_lifo": True}  # the connection that was used last has the most at hand
    if not is_sqlite:
        return create_engine(url, **pool, connect_args={"prepare_threshold": 1})
    engine = create_engine(url, **pool, connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False})

    @event.listens_for(engine, "connect")
    def _settings(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # transactions begin where we say so
        cursor = connection.cursor()
        for each in ("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON", "foreign_keys=ON", "cache_size=-65536", "temp_store=MEMORY"):
            cursor.execute(f"PRAGMA {each}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(db: Connection) -> None:
        options = db.get_execution_options()
        if not options.get("rushes_glances"):
            db.exec_driver_sql("BEGIN IMMEDIATE" if options.get("rushes_writes") else "BEGIN")

    return engine


def _own_secret(folder: Path) -> bytes:
    """The secret in the folder, made where there is none; only its owner may read it."""
    path = folder / "secret"
    if not path.exists():
        made = folder / f"secret.{os.getpid()}"
        made.write_text(secrets.token_hex(32))
        made.chmod(0o600)
        try:
            os.link(made, path)
        except FileExistsError:
            pass  # another process was first
        finally:
            made.unlink()
    return bytes.fromhex(path.read_text().strip())


def is_alive(store: Store) -> bool:
    try:
        with store.reading() as db:
            return db.execute(text("SELECT 1")).scalar() == 1
    except DBAPIError:
        return False

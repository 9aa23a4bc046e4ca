"""Who somebody is, and what a request may not do: passwords, sessions, tokens, invitations, forgery, headers, limits. Why each is as it is:

* Passwords: argon2id (pwdlib), verified and renewed when its parameters rise. An unknown login costs as much time as a wrong password, and both get one answer.
* Sessions live in the database, so that they can be ended: at logout, when the password or a role changes, by a lead. The cookie holds 256 random bits, the table their
  hash. A session is made
  anew at every login, so none that was planted before is worth anything. It ends 12 hours after it began and 2 hours after it was last used.
* The cookie is HttpOnly (scripts cannot read it), SameSite=Lax, and behind TLS Secure with the `__Host-` prefix: no other host and no plain connection can set it.
* Forgery: a request that changes something has to come from our own pages (Sec-Fetch-Site and Origin, as Go's net/http checks them) *and* carry the session's token. GET
  changes nothing.
* API tokens go into the Authorization header; a request with one is answered by what the token may, and its cookies are not looked at. They are shown once and kept hashed.
  They end with the sessions when the password or a role changes, and when a lead logs somebody out.
* Invitations work once and for a week; nobody can register without one.
* Content-Security-Policy allows our own files and nothing inline, so text that people wrote cannot run. Pages are not framed, not cached, and tell other sites nothing.
* Hosts: only the names this app is served under are answered, which ends DNS rebinding.
* Limits: logins a minute by account and by address; requests a minute by session. What is over is told to wait (429).
* Bodies: 1 MiB of JSON; files are not uploaded, they are imported from folders that the server's owner named.
* What is not yours does not exist: 404, not 403, so that ids tell nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from pwdlib import PasswordHash
from pwdlib.hashers.argon2 import Argon2Hasher
from sqlalchemy import Connection, Table, bindparam, insert, select, update

from base_model.errors import UserError
from reward.app.schema import api_token, membership, person, person_private, session
from reward.app.store import Store, new_id

HOUR = 3_600_000
SESSION_MS, IDLE_MS = 12 * HOUR, 2 * HOUR
SEEN_EVERY_MS = 60_000  # how often it is written down that a session is used
INVITATION_MS = 7 * 24 * HOUR
SHORTEST_PASSWORD, LONGEST_PASSWORD = 10, 256
BODY_BYTES = 1 << 20
LOGINS = RateLimitItemPerMinute(10)
REQUESTS = 1_200
TOKEN_PREFIX = "rushes_"

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; media-src 'self'; connect-src 'self'; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=(), interest-cohort=()",
    "Cache-Control": "private, no-store",
}
SAFE = frozenset({"GET", "HEAD", "OPTIONS"})


class Denied(Exception):
    """A request that is not answered, with its HTTP status and one line."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Actor:
    """Who asks. roles: project id -> roles there; "*" holds for every project."""

    person_id: str
    pseudonym: str
    name: str
    roles: Mapping[str, frozenset[str]]
    settings: Mapping[str, Any]
    csrf: str  # "" with an API token
    session: str  # hash of the session's id; "" with an API token

    def roles_in(self, project_id: str) -> frozenset[str]:
        return self.roles.get(project_id, frozenset()) | self.roles.get("*", frozenset())

    def has(self, role: str, project_id: str) -> bool:
        return role in self.roles_in(project_id)


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# Passwords


@cache
def hasher() -> PasswordHash:
    return PasswordHash((Argon2Hasher(),))


@cache
def _nobodys_hash() -> str:
    return hasher().hash(secrets.token_urlsafe())


def check_password(text: str) -> str:
    """Raises UserError where a new password is too short or too long."""
    if not SHORTEST_PASSWORD <= len(text) <= LONGEST_PASSWORD:
        raise UserError(f"a password has {SHORTEST_PASSWORD} to {LONGEST_PASSWORD} characters, password. Choose another")
    return text


def login(store: Store, name: str, password: str, client: str) -> tuple[str, Actor]:
    """A new session: the cookie's value and who it is. Raises Denied, with the same words for an unknown login, a wrong password and a disabled person."""
    with store.reading() as db:
        row = db.execute(select(person_private, person.c.pseudonym).join(person).where(person_private.c.login == name.strip().casefold())).first()
    valid, renewed = hasher().verify_and_update(password[:LONGEST_PASSWORD], row.password_hash if row else _nobodys_hash())
    cookie = None
    with store.writing() as db:
        if row is not None and valid and _may_still_log_in(db, row.person_id, row.password_hash, password):
            if renewed:
                db.execute(update(person_private).where(person_private.c.person_id == row.person_id).values(password_hash=renewed))
            cookie = begin_session(store, db, row.person_id, client)
            store.log(db, row.pseudonym, "login", row.pseudonym)
        else:
            store.log(db, row.pseudonym if row else "system", "login refused", row.pseudonym if row else "unknown login")
    actor = actor_of_session(store, cookie) if cookie else None
    if cookie is None or actor is None:
        raise Denied(401, "login or password are wrong")
    return cookie, actor


def _may_still_log_in(db: Connection, person_id: str, verified: str, password: str) -> bool:
    """Whether a person is there, and what was verified is still their password: to verify takes so long that either may have changed. Another log-in may have renewed the hash."""
    active = (person_private.c.person_id == person_id, person.c.state.in_(("active", "paused")))
    held = db.execute(select(person_private.c.password_hash).join(person).where(*active)).scalar()
    return held is not None and (held == verified or hasher().verify(password[:LONGEST_PASSWORD], held))


# Sessions


def begin_session(store: Store, db: Connection, person_id: str, client: str) -> str:
    cookie, now = secrets.token_urlsafe(32), store.now()
    values = {"id_hash": sha256(cookie), "person_id": person_id, "csrf": secrets.token_urlsafe(24), "client": client, "created_at": now, "seen_at": now}
    db.execute(insert(session), values)
    return cookie


def end_sessions(store: Store, db: Connection, person_id: str, *, but: str = "") -> None:
    """Ends a person's sessions, all but one."""
    db.execute(update(session).where(session.c.person_id == person_id, session.c.id_hash != but, session.c.ended_at.is_(None)).values(ended_at=store.now()))


def shut_out(store: Store, db: Connection, person_id: str, *, but: str = "") -> None:
    """Ends a person's sessions, all but one, and API tokens: whoever has got hold of one has nothing any more."""
    end_sessions(store, db, person_id, but=but)
    db.execute(update(api_token).where(api_token.c.person_id == person_id, api_token.c.revoked_at.is_(None)).values(revoked_at=store.now()))


def actor_of_session(store: Store, cookie: str) -> Actor | None:
    now = store.now()
    with store.glancing() as db:
        rows = db.execute(BY_SESSION, {"hash": sha256(cookie)}).all()
    if not rows or rows[0].ended_at is not None:
        return None
    row = rows[0]
    if not (now - SESSION_MS < row.created_at and now - IDLE_MS < row.seen_at):
        return None
    if now - row.seen_at > SEEN_EVERY_MS:
        with store.writing() as db:
            db.execute(update(session).where(session.c.id_hash == row.id_hash).values(seen_at=now))
    return Actor(row.person_id, row.pseudonym, row.name, _roles(rows), row.settings, row.csrf, row.id_hash)


def _who(table: Table) -> Any:
    """What an actor is made of, a row a role, of active and paused people; for a statement built once: every request asks it."""
    columns = (person.c.pseudonym, person.c.settings, person_private.c.name, membership.c.project_id, membership.c.role)
    joined = table.join(person, person.c.id == table.c.person_id).join(person_private, person_private.c.person_id == person.c.id)
    joined = joined.outerjoin(membership, membership.c.person_id == person.c.id)
    return select(table, *columns).select_from(joined).where(person.c.state.in_(("active", "paused")))


BY_SESSION = _who(session).where(session.c.id_hash == bindparam("hash"))
BY_TOKEN = _who(api_token).where(api_token.c.token_hash == bindparam("hash"))


def _roles(rows: Sequence[Any]) -> dict[str, frozenset[str]]:
    found: dict[str, set[str]] = {}
    for row in rows:
        if row.role is not None:
            found.setdefault(row.project_id, set()).add(row.role)
    return {project_id: frozenset(roles) for project_id, roles in found.items()}


# API tokens


def make_token(store: Store, db: Connection, actor: Actor, name: str, days: int) -> str:
    """A token with the rights of its person, shown this once."""
    secret = TOKEN_PREFIX + secrets.token_urlsafe(32)
    now = store.now()
    row = {"id": new_id("k"), "token_hash": sha256(secret), "person_id": actor.person_id, "name": name, "created_at": now, "expires_at": now + days * 24 * HOUR}
    db.execute(insert(api_token), row)
    store.log(db, actor.pseudonym, "token made", str(row["id"]))
    return secret


def actor_of_token(store: Store, secret: str) -> Actor | None:
    with store.glancing() as db:
        rows = db.execute(BY_TOKEN, {"hash": sha256(secret)}).all()
    if not rows or rows[0].revoked_at is not None or rows[0].expires_at <= store.now():
        return None
    return Actor(rows[0].person_id, rows[0].pseudonym, rows[0].name, _roles(rows), rows[0].settings, "", "")


# Requests


def check_origin(method: str, headers: Mapping[str, str], host: str) -> None:
    """Raises Denied where a browser sent a request that changes something from another site's page."""
    if method in SAFE:
        return
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None and site not in ("same-origin", "none"):
        raise Denied(403, "the request comes from another site")
    if origin is not None and _host_of(origin) != host:
        raise Denied(403, "the request comes from another site")


def _host_of(origin: str) -> str | None:
    """None where it is no address."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def check_csrf(actor: Actor, token: str) -> None:
    """Raises Denied where a session's request does not carry its token."""
    if actor.session and not hmac.compare_digest(actor.csrf.encode(), token.encode()):
        raise Denied(403, "the page is out of date. Load it again")


def client_of(store: Store, address: str, agent: str) -> str:
    """What is kept of an address and a browser: enough to see that they changed."""
    return hmac.new(store.secret, json.dumps([address, agent]).encode(), hashlib.sha256).hexdigest()


class RateLimits:
    """Counts in memory: of one process, gone with it."""

    def __init__(self) -> None:
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._minute, self._requests = 0, Counter[str]()

    def login(self, name: str, address: str) -> None:
        """Raises Denied after too many logins of an account, or from an address."""
        by_account, by_address = self._limiter.hit(LOGINS, "account", name.strip().casefold()), self._limiter.hit(LOGINS, "address", address)
        if not (by_account and by_address):
            raise Denied(429, "too many logins. Wait a minute")

    def request(self, key: str) -> None:
        """Raises Denied after too many requests in a minute of the clock. Every request asks this, for which `limits` would start a thread a hundred times a second."""
        minute = int(time.monotonic() // 60)
        if minute != self._minute:
            self._minute, self._requests = minute, Counter()
        self._requests[key] += 1
        if self._requests[key] > REQUESTS:
            raise Denied(429, "too many requests. Wait a minute")

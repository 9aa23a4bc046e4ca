"""People: invited, given roles, paused, deleted."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from sqlalchemy import Connection, insert, select, update

from base_model.errors import UserError
from reward.app import security
from reward.app.access import LEAD, ROLES
from reward.app.schema import invitation, membership, person, person_private
from reward.app.security import INVITATION_MS, Denied, check_password, hasher, sha256
from reward.app.store import Store, new_id


def invite(store: Store, db: Connection, *, project_id: str, roles: Sequence[str], by: str) -> str:
    """A token that makes one person a member. by: a pseudonym. Raises UserError for an unknown role."""
    unknown = [role for role in roles if role not in ROLES]
    if unknown or not roles:
        raise UserError(f"no role {unknown[0] if unknown else 'at all'}, roles. There are {', '.join(ROLES)}")
    token, now = secrets.token_urlsafe(24), store.now()
    row = {
        "id": new_id("i"),
        "token_hash": sha256(token),
        "project_id": project_id,
        "roles": sorted(set(roles)),
        "invited_by": by,
        "created_at": now,
        "expires_at": now + INVITATION_MS,
    }
    db.execute(insert(invitation), row)
    store.log(db, by, "invited", str(row["id"]), {"project": project_id, "roles": row["roles"]})
    return token


def revoke_invitations(store: Store, db: Connection, *, by: str, project_id: str | None = None) -> None:
    """Ends the invitations of a person that nobody used yet, of one project or of all: who does not lead any more has invited nobody. by: the person's pseudonym."""
    open_ = [invitation.c.invited_by == by, invitation.c.used_at.is_(None), invitation.c.revoked_at.is_(None)]
    of = [] if project_id is None else [invitation.c.project_id == project_id]
    db.execute(update(invitation).where(*open_, *of).values(revoked_at=store.now()))


def invited(store: Store, db: Connection, token: str) -> tuple[str, list[str]]:
    """(project, roles) of a token that still works. Raises Denied for any other, in the same words."""
    row = db.execute(select(invitation).where(invitation.c.token_hash == sha256(token))).first()
    if row is None or row.used_at is not None or row.revoked_at is not None or row.expires_at <= store.now():
        raise Denied(404, "this invitation does not work any more. Ask for a new one")
    return row.project_id, list(row.roles)


def join(store: Store, token: str, *, login: str, name: str, password: str, client: str) -> str:
    """Makes a person of an invitation, which is used up; returns the cookie of a first session. Raises UserError for a login that is taken."""
    check_password(password)
    login, name = login.strip().casefold(), name.strip()
    if not (1 <= len(login) <= 200 and 1 <= len(name) <= 200):
        raise UserError("a login and a name have 1 to 200 characters, login. Choose others")
    hashed = hasher().hash(password)
    with store.writing() as db:
        project_id, roles = invited(store, db, token)
        if db.execute(select(person_private.c.person_id).where(person_private.c.login == login)).first():
            raise UserError("that login is taken, login. Choose another")
        person_id = add_person(store, db, login=login, name=name, hashed=hashed)
        grant(store, db, person_id, project_id, roles, by="system")
        db.execute(update(invitation).where(invitation.c.token_hash == sha256(token)).values(used_by=person_id, used_at=store.now()))
        return security.begin_session(store, db, person_id, client)


def add_person(store: Store, db: Connection, *, login: str, name: str, hashed: str) -> str:
    person_id, pseudonym = new_id("p"), f"person-{secrets.token_hex(5)}"
    db.execute(insert(person), {"id": person_id, "pseudonym": pseudonym, "state": "active", "settings": {}, "created_at": store.now()})
    db.execute(insert(person_private), {"person_id": person_id, "login": login, "name": name, "password_hash": hashed})
    store.log(db, pseudonym, "joined", pseudonym)
    return person_id


def grant(store: Store, db: Connection, person_id: str, project_id: str, roles: Sequence[str], *, by: str) -> None:
    """Gives a person roles in a project; sessions and tokens are ended where the person had others."""
    held = set(db.execute(select(membership.c.role).where(membership.c.person_id == person_id, membership.c.project_id == project_id)).scalars())
    for role in sorted(set(roles) - held):
        db.execute(insert(membership), {"person_id": person_id, "project_id": project_id, "role": role, "since": store.now()})
    if set(roles) - held:
        pseudonym = db.execute(select(person.c.pseudonym).where(person.c.id == person_id)).scalar_one()
        store.log(db, by, "roles given", pseudonym, {"project": project_id, "roles": sorted(set(roles) - held)})
        security.shut_out(store, db, person_id)


def first_invitation(store: Store, roles: Sequence[str] = (LEAD,)) -> str | None:
    """A token for the first person, the lead of every project; None once somebody joined. Earlier ones that were not used stop working."""
    with store.writing() as db:
        if db.execute(select(person.c.id).limit(1)).first():
            return None
        db.execute(update(invitation).where(invitation.c.used_at.is_(None)).values(revoked_at=store.now()))
        return invite(store, db, project_id="*", roles=roles, by="system")

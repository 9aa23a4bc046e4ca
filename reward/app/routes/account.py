"""Logging in and out, joining by invitation, one's own settings, sessions and API tokens."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request, Response
from pydantic import BaseModel, Field, SecretStr
from sqlalchemy import select, update

from reward.app import people, security
from reward.app.access import AUDITOR, LEAD, PUBLIC, Anybody, StoreOf, cookie_name
from reward.app.leading import EVERYWHERE
from reward.app.schema import api_token, person_private, project, session
from reward.app.security import Denied, check_password, hasher
from reward.app.web import Done, Pages

pages = Pages("account")
Public = Depends(PUBLIC)
Word = Annotated[str, Field(min_length=1, max_length=200)]


class Empty(BaseModel):
    """A page without data."""


class Login(BaseModel):
    login: Word
    password: SecretStr


class Join(BaseModel):
    login: Word
    name: Word
    password: SecretStr


class Invitation(BaseModel):
    token: str
    project: str
    roles: list[str]


class SessionSeen(BaseModel):
    id: str
    created_at: int
    seen_at: int
    this_one: bool


class TokenSeen(BaseModel):
    id: str
    name: str
    created_at: int
    expires_at: int


class Account(BaseModel):
    name: str
    pseudonym: str
    sessions: list[SessionSeen]
    tokens: list[TokenSeen]


class ProjectSeen(BaseModel):
    id: str
    name: str
    roles: list[str]


class Home(BaseModel):
    name: str
    projects: list[ProjectSeen]
    leads: bool
    """Whether who asks leads or audits any project."""
    makes: bool
    """Whether who asks may make projects."""


def _remember(request: Request, response: Response, cookie: str) -> None:
    secure: bool = request.app.state.settings.secure
    response.set_cookie(cookie_name(request), cookie, max_age=security.SESSION_MS // 1000, httponly=True, samesite="lax", secure=secure, path="/")


async def client(request: Request, store: StoreOf) -> str:
    return security.client_of(store, request.client.host if request.client else "", request.headers.get("user-agent", ""))


Client = Annotated[str, Depends(client)]


@pages.view("/", "home.html")
def home(me: Anybody, store: StoreOf) -> Home:
    """The projects of who asks, with the roles held there."""
    with store.reading() as db:
        rows = db.execute(select(project.c.id, project.c.name).where(project.c.state == "open").order_by(project.c.name)).all()
    found = [ProjectSeen(id=row.id, name=row.name, roles=sorted(me.roles_in(row.id))) for row in rows if me.roles_in(row.id)]
    leads = bool({LEAD, AUDITOR} & frozenset().union(*me.roles.values()))
    return Home(name=me.name, projects=found, leads=leads, makes=me.has(LEAD, EVERYWHERE))


@pages.view("/login", "login.html")
def login_page(_: None = Public) -> Empty:
    """The form."""
    return Empty()


@pages.action("/login")
def login(body: Login, request: Request, response: Response, store: StoreOf, client: Client, _: None = Public) -> Done:
    """Begins a session; its cookie comes with the answer."""
    request.app.state.limits.login(body.login, request.client.host if request.client else "")
    cookie, me = security.login(store, body.login, body.password.get_secret_value(), client)
    _remember(request, response, cookie)
    return Done(done=me.pseudonym, go="/")


@pages.action("/logout")
def logout(me: Anybody, request: Request, response: Response, store: StoreOf) -> Done:
    """Logs out of this browser."""
    with store.writing() as db:
        db.execute(update(session).where(session.c.id_hash == me.session).values(ended_at=store.now()))
        store.log(db, me.pseudonym, "logout", me.pseudonym)
    response.delete_cookie(cookie_name(request), path="/", httponly=True, samesite="lax", secure=request.app.state.settings.secure)
    return Done(done="logged out", go="/login")


@pages.view("/join/{token}", "join.html")
def join_page(token: str, store: StoreOf, _: None = Public) -> Invitation:
    """What an invitation is for."""
    with store.reading() as db:
        project_id, roles = people.invited(store, db, token)
        name = db.execute(select(project.c.name).where(project.c.id == project_id)).scalar() or "every project"
    return Invitation(token=token, project=name, roles=roles)


@pages.action("/join/{token}")
def join(token: str, body: Join, request: Request, response: Response, store: StoreOf, client: Client, _: None = Public) -> Done:
    """Makes an account of an invitation, once, and begins a session."""
    request.app.state.limits.login(token, request.client.host if request.client else "")
    cookie = people.join(store, token, login=body.login, name=body.name, password=body.password.get_secret_value(), client=client)
    _remember(request, response, cookie)
    return Done(done="joined", go="/")


@pages.view("/account", "account.html")
def account(me: Anybody, store: StoreOf) -> Account:
    """One's own sessions and tokens."""
    now = store.now()
    with store.reading() as db:
        open_ = select(session).where(session.c.person_id == me.person_id, session.c.ended_at.is_(None), session.c.created_at > now - security.SESSION_MS)
        sessions = db.execute(open_.order_by(session.c.seen_at.desc())).all()
        tokens = db.execute(select(api_token).where(api_token.c.person_id == me.person_id, api_token.c.revoked_at.is_(None), api_token.c.expires_at > now)).all()
    return Account(
        name=me.name,
        pseudonym=me.pseudonym,
        sessions=[SessionSeen(id=row.id_hash[:16], created_at=row.created_at, seen_at=row.seen_at, this_one=row.id_hash == me.session) for row in sessions],
        tokens=[TokenSeen(id=row.id, name=row.name, created_at=row.created_at, expires_at=row.expires_at) for row in tokens],
    )


class NewPassword(BaseModel):
    old: SecretStr
    new: SecretStr


@pages.action("/account/password")
def change_password(body: NewPassword, me: Anybody, store: StoreOf) -> Done:
    """Sets a new password and ends the other sessions, and API tokens."""
    new = hasher().hash(check_password(body.new.get_secret_value()))
    with store.reading() as db:
        held = db.execute(select(person_private.c.password_hash).where(person_private.c.person_id == me.person_id)).scalar_one()
    if not hasher().verify(body.old.get_secret_value()[: security.LONGEST_PASSWORD], held):
        raise Denied(403, "the old password is wrong")
    with store.writing() as db:
        same = (person_private.c.person_id == me.person_id, person_private.c.password_hash == held)
        if not db.execute(update(person_private).where(*same).values(password_hash=new)).rowcount:
            raise Denied(403, "the old password is wrong")  # it was changed while it was verified
        security.shut_out(store, db, me.person_id, but=me.session)
        store.log(db, me.pseudonym, "password changed", me.pseudonym)
    return Done(done="the password is changed; other sessions and all API tokens were ended", go="/account")


@pages.action("/account/sessions/end")
def end_other_sessions(me: Anybody, store: StoreOf) -> Done:
    """Ends every session but this one."""
    with store.writing() as db:
        security.end_sessions(store, db, me.person_id, but=me.session)
        store.log(db, me.pseudonym, "sessions ended", me.pseudonym)
    return Done(done="other sessions were ended", go="/account")


class NewToken(BaseModel):
    name: Word
    days: Annotated[int, Field(ge=1, le=365)] = 30


class MadeToken(BaseModel):
    token: str


@pages.action("/account/tokens")
def make_token(body: NewToken, me: Anybody, store: StoreOf) -> MadeToken:
    """An API token with one's own rights; it is shown this once."""
    if not me.session:
        raise Denied(403, "a token makes no tokens. Log in")
    with store.writing() as db:
        return MadeToken(token=security.make_token(store, db, me, body.name, body.days))


@pages.action("/account/tokens/{token_id}/revoke")
def revoke_token(token_id: str, me: Anybody, store: StoreOf) -> Done:
    """Ends a token of one's own."""
    with store.writing() as db:
        ended = db.execute(update(api_token).where(api_token.c.id == token_id, api_token.c.person_id == me.person_id).values(revoked_at=store.now())).rowcount
        if not ended:
            raise Denied(404, "there is nothing here")
        store.log(db, me.pseudonym, "token revoked", token_id)
    return Done(done="the token is revoked", go="/account")

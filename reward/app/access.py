"""Which role may do what, and the one dependency that says so.

Every route names its rule: `Annotated[Actor, Depends(may(LABELER))]`. On a path with `{project_id}` the role has to be held in that project; elsewhere in any, and what the
request is about is looked up by who asks (`own_assignment`, `own_reading`), so that another's does not exist. `PUBLIC` routes name that. One that names nothing fails the tests.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, Request

from reward.app.security import Actor, Denied, actor_of_session, actor_of_token, check_csrf
from reward.app.store import Store

LABELER, REVIEWER, SENIOR, CHILD_SAFETY, LEAD, AUDITOR = ROLES = ("labeler", "reviewer", "senior", "child_safety", "lead", "auditor")
ANYBODY = ROLES
"""Whoever has logged in and holds any role."""
REVIEWERS = (REVIEWER, SENIOR, CHILD_SAFETY)
READERS = (LEAD, AUDITOR)
MEANING = {
    LABELER: "ranks clips that the filters allow",
    REVIEWER: "judges what the filters blocked or let pass",
    SENIOR: "reviews, decides appeals, and approves thresholds",
    CHILD_SAFETY: "alone sees what is suspected under P04",
    LEAD: "runs projects, people and exports",
    AUDITOR: "reads everything but media, and changes nothing",
}


def store_of(request: Request) -> Store:
    store: Store = request.app.state.store
    return store


async def _store(request: Request) -> Store:
    return store_of(request)


StoreOf = Annotated[Store, Depends(_store)]


def cookie_name(request: Request) -> str:
    name: str = request.app.state.cookie
    return name


def actor_of(request: Request) -> Actor | None:
    """Who asks, by token or by session; None for nobody. Looked up once a request."""
    if not hasattr(request.state, "actor"):
        request.state.actor = _look_up(request)
    found: Actor | None = request.state.actor
    return found


def _look_up(request: Request) -> Actor | None:
    store = store_of(request)
    given = request.headers.get("authorization", "")
    if given:
        scheme, _, secret = given.partition(" ")
        return actor_of_token(store, secret.strip()) if scheme.lower() == "bearer" else None
    cookie = request.cookies.get(cookie_name(request))
    return actor_of_session(store, cookie) if cookie else None


class May:
    """The rule of a route: who holds one of `roles`, in the project of the path where it has one."""

    def __init__(self, roles: tuple[str, ...]) -> None:
        self.roles = roles

    async def __call__(self, request: Request) -> Actor:
        """Asked in the event loop: a thread for one short query would cost more than the query."""
        actor = actor_of(request)
        if actor is None:
            raise Denied(401, "log in first")
        request.app.state.limits.request(actor.session or actor.person_id)
        if request.method not in ("GET", "HEAD"):
            check_csrf(actor, request.headers.get("x-csrf", ""))
        project_id = request.path_params.get("project_id")
        held = actor.roles_in(project_id) if project_id is not None else frozenset[str]().union(*actor.roles.values())
        if not held & set(self.roles):
            raise Denied(404, "there is nothing here")
        return actor


class Public:
    """The rule of a route that anybody may ask."""

    async def __call__(self) -> None:
        return None


def may(*roles: str) -> May:
    return May(roles)


PUBLIC = Public()
Anybody = Annotated[Actor, Depends(may(*ANYBODY))]


def rule_of(route: Any) -> May | Public | None:
    """The rule that a route names, somewhere among what it depends on; None where it names none."""
    waiting: list[Any] = [route.dependant]
    while waiting:
        each = waiting.pop()
        if isinstance(each.call, May | Public):
            return each.call
        waiting += each.dependencies
    return None

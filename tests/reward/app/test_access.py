"""Who may ask which route: every route x every role x an object of one's own and another's, made from the route table, so that a route without a rule fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from fastapi.routing import APIRoute

from reward.app.access import ROLES, May, Public, rule_of
from reward.app.store import Store
from reward.app.web import HERE, make_app
from tests.reward.app.conftest import Client, add_member, add_project

HIDDEN = (401, 404)


def routes_of(store: Store) -> list[APIRoute]:
    found = [route for route in make_app(store).routes if isinstance(route, APIRoute)]
    assert len(found) > 15
    return found


def test_every_route_names_its_rule(store: Store) -> None:
    without = [route.path for route in routes_of(store) if rule_of(route) is None]
    assert not without, f"routes without a rule: {without}"


def test_a_route_without_a_rule_is_found(store: Store) -> None:
    app = make_app(store)
    app.get("/api/forgotten")(lambda: None)
    assert [route.path for route in app.routes if isinstance(route, APIRoute) and rule_of(route) is None] == ["/api/forgotten"]


def test_what_everybody_may_ask_is_little(store: Store) -> None:
    public = {route.path for route in routes_of(store) if isinstance(rule_of(route), Public)}
    assert public == {"/login", "/api/login", "/join/{token}", "/api/join/{token}", "/static/{digest}/{name}", "/api/health"}


def test_pages_and_their_twins_have_one_rule(store: Store) -> None:
    rules = {(method, route.path): rule_of(route) for route in routes_of(store) for method in route.methods}
    pages = [(path, rule) for (method, path), rule in rules.items() if method == "GET" and f"/api{path}" in {route.path for route in routes_of(store)}]
    assert len(pages) >= 4
    for path, rule in pages:
        twin = rules["GET", f"/api{path}"]
        assert type(rule) is type(twin) and getattr(rule, "roles", None) == getattr(twin, "roles", None), path


def test_nothing_that_changes_something_is_a_get_and_no_state_changes_by_one(store: Store) -> None:
    for route in routes_of(store):
        assert route.methods in ({"GET"}, {"POST"}), route.path
        assert "POST" not in route.methods or route.path.startswith("/api/"), route.path


@dataclass
class World:
    """Two projects with the same things in each, and one person a role, at home in the first."""

    store: Store
    home: str
    away: str
    clients: dict[str, Client]
    ids: dict[str, dict[str, str]] = field(default_factory=dict)  # path parameter -> {"home": id, "away": id}


@pytest.fixture(scope="module")
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, sqlite_template: object) -> World:
    import shutil

    from reward.app.store import open_store

    folder = tmp_path_factory.mktemp("world") / "store"
    shutil.copytree(str(sqlite_template), folder)
    store = open_store(folder)
    request.addfinalizer(store.close)
    home, away = add_project(store, "home"), add_project(store, "away")
    for role in ROLES:
        add_member(store, role, role, project_id=home)
        add_member(store, f"far-{role}", role, project_id=away)
    found = World(store, home, away, {role: Client(store, role) for role in ROLES})
    found.ids = {name: make(found) for name, make in OBJECTS.items()}
    return found


def _projects(world: World) -> dict[str, str]:
    return {"home": world.home, "away": world.away}


def _people(world: World) -> dict[str, str]:
    """People who ask nothing themselves, so that their roles and sessions may end."""
    return {"home": add_member(world.store, "worker", "labeler", project_id=world.home), "away": add_member(world.store, "far-worker", "labeler", project_id=world.away)}


OBJECTS: dict[str, Callable[[World], dict[str, str]]] = {"project_id": _projects, "person_id": _people}
"""For every parameter of a path, one id that belongs to `home` and one that does not. A parameter that is not here fails the matrix."""
FREE = {"invitation_id": "i_none", "proposal_id": "h_none", "token": "no-such-token", "token_id": "k_none", "digest": "0" * 16, "name": "app.css"}
"""Parameters that lead to nothing of a project."""


def test_every_parameter_of_a_path_is_known_to_the_matrix(store: Store) -> None:
    named = {each for route in routes_of(store) for each in route.param_convertors}
    assert named <= OBJECTS.keys() | FREE.keys(), f"say in OBJECTS how to make {named - OBJECTS.keys() - FREE.keys()}"


def ask(client: Client, route: APIRoute, ids: dict[str, dict[str, str]], where: str) -> int:
    path = route.path
    for name in route.param_convertors:
        path = path.replace("{" + name + "}", ids[name][where] if name in ids else FREE[name])
    method = next(iter(route.methods))
    return client.request(method, path, json={} if method == "POST" else None, follow_redirects=False).status_code


def test_nobody_gets_anything_without_a_session(world: World) -> None:
    stranger = Client(world.store)
    for route in routes_of(world.store):
        if isinstance(rule_of(route), May):
            assert ask(stranger, route, world.ids, "home") in (401, 422), route.path


@pytest.mark.parametrize("role", ROLES)
def test_a_role_reaches_what_its_rule_says_and_nothing_else(world: World, role: str) -> None:
    """Inside one's own project: hidden exactly where the rule leaves the role out."""
    checked = 0
    for route in routes_of(world.store):
        rule = rule_of(route)
        if not isinstance(rule, May) or route.path.endswith(("/logout", "/revoke")):
            continue
        status = ask(world.clients[role], route, world.ids, "home")
        if role not in rule.roles:
            assert status in (404, 422), f"{role} got {status} from {route.path}"
        elif set(route.param_convertors) <= {"project_id"}:
            assert status not in (401, 403, 404), f"{role} got {status} from {route.path}"
        checked += 1
    assert checked > 5


@pytest.mark.parametrize("role", ROLES)
def test_another_projects_things_do_not_exist(world: World, role: str) -> None:
    for route in routes_of(world.store):
        if isinstance(rule_of(route), May) and set(route.param_convertors) & set(OBJECTS):
            status = ask(world.clients[role], route, world.ids, "away")
            assert status in (404, 422), f"{role} got {status} from {route.path} of another project"


def test_templates_never_mark_text_as_safe_and_hold_no_script_or_style() -> None:
    files = sorted((HERE / "templates").glob("*.html"))
    assert len(files) >= 6
    for file in files:
        text = file.read_text()
        for forbidden in ("| safe", "|safe", "autoescape false", "<style", " style=", "onclick=", "onload=", "javascript:", "hx-on", "hx-vals='js", "hx-vars"):
            assert forbidden not in text, f"{file.name}: {forbidden}"
        assert all('src="' in each for each in text.split("<script")[1:]), file.name

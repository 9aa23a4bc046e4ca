"""Who may ask which route: every route x every role x an object of one's own and another's, made from the route table, so that a route without a rule fails."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fastapi.routing import APIRoute
from sqlalchemy import insert, select, update

from reward.app import people
from reward.app.access import ROLES, May, Public, rule_of
from reward.app.labeling import make_tasks
from reward.app.media import path_of
from reward.app.reviewing import queue_imported
from reward.app.schema import assignment, clip, invitation, task, threshold
from reward.app.security import sha256
from reward.app.store import Store, new_id, open_store
from reward.app.web import HERE, make_app
from tests.reward.app.conftest import Client, add_clips, add_member, add_project


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
    """Two projects with the same things in each. One person a role is at home in the first and asks; others own things there and elsewhere."""

    store: Store
    home: str
    away: str
    clients: dict[str, Client]
    ids: dict[str, dict[str, str]] = field(default_factory=dict)  # path parameter -> {"home": id, "away": id, and where things are people's own, "others": id}


@pytest.fixture(scope="module")
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path) -> World:
    folder = tmp_path_factory.mktemp("world") / "store"
    shutil.copytree(sqlite_template, folder)
    store = open_store(folder)
    request.addfinalizer(store.close)
    settings = {"labeling": {"practice": 0, "least_watched": 0.0, "overlap": 3}}
    home, away = add_project(store, "home", **settings), add_project(store, "away", **settings)
    for project_id in (home, away):
        add_clips(store, project_id, [f"prompt {number}" for number in range(8)], takes=4, verdicts=("allow", "allow", "review", "allow"))
    for role in ROLES:
        add_member(store, role, role, project_id=home)
    for name, project_id in (("others", home), ("away", away)):
        for role in ("labeler", "reviewer", "lead"):
            add_member(store, f"{name}-{role}", role, project_id=project_id)
    found = World(store, home, away, {role: Client(store, role) for role in ROLES})
    with store.reading() as db:
        for digest in db.execute(select(clip.c.clip_id)).scalars():
            path_of(store, digest, FREE["variant"]).write_bytes(b"blurred")
    for name, project_id in (("others", home), ("away", away)):
        found.clients |= {f"{name}-{role}": Client(store, f"{name}-{role}") for role in ("labeler", "reviewer", "lead")}
        clips = _clips_of(store, project_id)
        with store.writing() as db:
            make_tasks(store, db, project_id, found.clients["lead"].me)
            queue_imported(store, db, project_id, clips)
    found.ids = {name: make(found) for name, make in OBJECTS.items()}
    return found


OWNERS = {"home": "", "others": "others-", "away": "away-"}


def _clips_of(store: Store, project_id: str) -> list[str]:
    with store.reading() as db:
        return list(db.execute(select(clip.c.id).where(clip.c.project_id == project_id).order_by(clip.c.id)).scalars())


def _project(world: World, where: str) -> str:
    return world.away if where == "away" else world.home


def _projects(world: World) -> dict[str, str]:
    return {"home": world.home, "away": world.away}


def _people(world: World) -> dict[str, str]:
    """People who ask nothing themselves, so that their roles and sessions may end."""
    return {where: add_member(world.store, f"worker-{where}", "labeler", project_id=project_id) for where, project_id in _projects(world).items()}


def _clips(world: World) -> dict[str, str]:
    return {where: _clips_of(world.store, project_id)[-1] for where, project_id in _projects(world).items()}


def _invitations(world: World) -> dict[str, str]:
    made = {}
    for where, project_id in _projects(world).items():
        with world.store.writing() as db:
            token = people.invite(world.store, db, project_id=project_id, roles=("labeler",), by="system")
            made[where] = db.execute(select(invitation.c.id).where(invitation.c.token_hash == sha256(token))).scalar_one()
    return made


UNKNOWN = {"n": 0}
PREVIEW = {
    **{"filter": "flash 3", "policy": "P17", "old": 0.5, "new": 0.4, "clips": 8},
    **{name: {"clips": 0, "audited": 0, "violating": 0} for name in ("blocked_more", "blocked_less")},
    **{name: {"precision": UNKNOWN, "recall": UNKNOWN} for name in ("before", "after")},
}


def _proposals(world: World) -> dict[str, str]:
    made = {where: new_id("h") for where in ("home", "away")}
    with world.store.writing() as db:
        for where, project_id in _projects(world).items():
            values = {"filter": "flash 3", "policy": "P17", "old": 0.5, "new": 0.4, "preview": PREVIEW, "proposed_by": "person-x", "proposed_at": 1, "state": "proposed"}
            db.execute(insert(threshold), {"id": made[where], "project_id": project_id, **values})
    return made


def _next_assignment(world: World, where: str, besides: str | None = None) -> str:
    owner, project_id = world.clients[f"{OWNERS[where]}labeler"], _project(world, where)
    owner.post(f"/api/projects/{project_id}/label/consent").raise_for_status()
    assignment_id: str = owner.post(f"/api/projects/{project_id}/label/next", json={"besides": besides}).json()["assignment_id"]
    return assignment_id


def _assignments(world: World) -> dict[str, str]:
    return {where: _next_assignment(world, where) for where in OWNERS}


def _answers(world: World) -> dict[str, str]:
    made = {}
    for where, owner in OWNERS.items():
        assignment_id = _next_assignment(world, where, besides=world.ids.get("assignment_id", {}).get(where))
        client = world.clients[f"{owner}labeler"]
        k = len(client.get(f"/api/assignments/{assignment_id}").json()["clips"])
        made[where] = new_id("z")
        body = {"id": made[where], "ranks": {"overall": [1] * k}, "watched": [1.0] * k, "watch_ms": [9] * k, "lead_time_ms": 9}
        client.post(f"/api/assignments/{assignment_id}/answer", json=body).raise_for_status()
    return made


def _readings(world: World) -> dict[str, str]:
    made = {}
    for where, owner in OWNERS.items():
        answer = world.clients[f"{owner}reviewer"].post(f"/api/review/{_project(world, where)}/next", json={"queue": "review"})
        made[where] = answer.json()["go"].rpartition("/")[2]
    return made


OBJECTS: dict[str, Callable[[World], dict[str, str]]] = {
    "project_id": _projects,
    "person_id": _people,
    "clip_id": _clips,
    "invitation_id": _invitations,
    "proposal_id": _proposals,
    "answer_id": _answers,
    "assignment_id": _assignments,
    "reading_id": _readings,
}
"""For every parameter of a path, an id at home and one that is not; where things are people's own, another's at home, too. A parameter that is not here fails the matrix."""
OWNED = {"assignment_id": "labeler", "answer_id": "labeler", "reading_id": "reviewer"}
FREE = {"token": "no-such-token", "token_id": "k_none", "digest": "0" * 16, "name": "app.css", "format": "jsonl", "place": "0", "variant": "blur.jpg"}
"""Parameters that lead to nothing of a project."""
LAST = ("/logout", "/lead/import", "/roles", "/revoke", "/delete", "/skip", "/state", "/undo", "/sessions/end", "/suspect", "/password")
"""What ends something that other routes still need: asked for by who may not, and by nobody else."""


THREE = {"ranks": {"overall": [1, 2, 3]}, "watched": [1.0] * 3, "watch_ms": [9] * 3, "lead_time_ms": 9}
DECISION = {"said": "not_violating", "rationale": "nothing", "policy_version": "2/1"}
BODIES: dict[str, dict[str, object]] = {
    "/api/assignments/{assignment_id}/draft": {"draft": {}},
    "/api/assignments/{assignment_id}/prompt": {"ranks": {}},
    "/api/assignments/{assignment_id}/flag": {"place": 0, "policies": ["P17"]},
    "/api/assignments/{assignment_id}/answer": {"id": "", **THREE},
    "/api/assignments/{assignment_id}/demonstrate": {"id": "", "accepted": [True] * 3, "watched": [1.0] * 3, "watch_ms": [9] * 3, "lead_time_ms": 9},
    "/api/assignments/{assignment_id}/skip": {"id": "", "reason": "undecidable"},
    "/api/reading/{reading_id}/reveal": {"level": "sheet"},
    "/api/reading/{reading_id}/decide": {"id": "", **DECISION},
    "/api/reading/{reading_id}/suspect": {"id": "", **DECISION},
    "/api/review/{project_id}/next": {"queue": "review"},
    "/api/review/{project_id}/appeal": {"review_id": "v_none", "why": "wrong"},
    "/api/review/{project_id}/gold": {"clip": "none"},
    "/api/projects/{project_id}/lead/thresholds": {"filter": "flash 3", "policy": "P17", "new": 0.4},
    "/api/projects/{project_id}/lead/thresholds/{proposal_id}": {"approve": True, "approved": True},
    "/api/projects/{project_id}/lead/state": {"state": "open"},
    "/api/projects/{project_id}/lead/people/{person_id}/delete": {"confirm": "nobody"},
    "/api/projects/{project_id}/lead/clips/{clip_id}/delete": {"confirm": "nothing"},
    "/api/projects/{project_id}/lead/import": {"folder": "none", "run": "none"},
    "/api/projects/{project_id}/lead/signoffs": {"run": "test", "approved": True, "statement": "seen", "evidence": "none"},
    "/api/projects/{project_id}/tasks/order": {"tasks": []},
}
"""What a route takes that finds nothing in an empty body. It has to be what the route would take of somebody who may: only then 404 says that somebody may not."""


def test_every_parameter_of_a_path_is_known_to_the_matrix(store: Store) -> None:
    named = {each for route in routes_of(store) for each in route.param_convertors}
    assert named == OBJECTS.keys() | FREE.keys(), f"say in OBJECTS how to make {named - OBJECTS.keys() - FREE.keys()}"


def ask(client: Client, route: APIRoute, ids: dict[str, dict[str, str]], where: str) -> int:
    """The status of a route asked for things of `where`, or, of those that are no person's own, of home."""
    path = route.path
    for name in route.param_convertors:
        path = path.replace("{" + name + "}", ids[name].get(where, ids[name]["home"]) if name in ids else FREE[name])
    method = next(iter(route.methods))
    body = BODIES.get(route.path, {})
    body |= {"id": new_id("z")} if "id" in body else {}
    return client.request(method, path, json=body if method == "POST" else None, follow_redirects=False).status_code


def test_nobody_gets_anything_without_a_session(world: World) -> None:
    stranger, asked = Client(world.store), 0
    for route in routes_of(world.store):
        if isinstance(rule_of(route), May):
            assert ask(stranger, route, world.ids, "home") == 401, route.path
            asked += 1
    assert asked > 80


@pytest.mark.parametrize("role", ROLES)
def test_a_role_reaches_what_its_rule_says_and_nothing_else(world: World, role: str) -> None:
    """Inside one's own project: hidden exactly where the rule leaves the role out."""
    allowed = refused = 0
    for route in routes_of(world.store):
        rule = rule_of(route)
        if not isinstance(rule, May):
            continue
        if role not in rule.roles:
            assert ask(world.clients[role], route, world.ids, "home") == 404, f"{role}: {route.path}"
            refused += 1
        elif not route.path.endswith(LAST) and all(OWNED.get(name, role) == role for name in route.param_convertors):
            status = ask(world.clients[role], route, world.ids, "home")
            assert status not in (401, 403, 404), f"{role} got {status} from {route.path}"
            allowed += 1
    assert allowed >= 10 and refused > 20


@pytest.mark.parametrize("role", ROLES)
def test_another_projects_things_do_not_exist(world: World, role: str) -> None:
    asked = 0
    for route in routes_of(world.store):
        if isinstance(rule_of(route), May) and set(route.param_convertors) & set(OBJECTS):
            status = ask(world.clients[role], route, world.ids, "away")
            assert status == 404, f"{role} got {status} from {route.path} of another project"
            asked += 1
    assert asked > 60


@pytest.mark.parametrize("role", ROLES)
def test_what_is_another_persons_at_home_does_not_exist_either(world: World, role: str) -> None:
    asked = 0
    for route in routes_of(world.store):
        if isinstance(rule_of(route), May) and set(route.param_convertors) & set(OWNED):
            assert ask(world.clients[role], route, world.ids, "others") == 404, f"{role}: {route.path}"
            asked += 1
    assert asked > 15


@pytest.mark.parametrize("name", sorted(set(OBJECTS) - set(OWNED) - {"project_id"}))
def test_a_thing_of_another_project_is_not_reached_through_ones_own(world: World, name: str) -> None:
    """The project of the path is one's own, the thing behind it is not."""
    mixed = {**world.ids, name: {"home": world.ids[name]["away"]}}
    routes = [route for route in routes_of(world.store) if name in route.param_convertors]
    assert routes
    for route in routes:
        body = {"confirm": world.ids[name]["away"], "roles": ["labeler"]}
        path = route.path
        for each in route.param_convertors:
            path = path.replace("{" + each + "}", mixed[each]["home"] if each in mixed else FREE[each])
        for role in ("lead", "senior", "child_safety"):
            assert world.clients[role].post(path, json={**BODIES.get(route.path, {}), **body}).status_code == 404, f"{role}: {route.path}"


def test_no_labeler_is_served_what_a_filter_did_not_allow_by_any_route(world: World) -> None:
    """Every address that a labeler may ask gives nothing of clips that were blocked, under review, in error or withdrawn: neither in text nor as bytes."""
    store, me = world.store, world.clients["labeler"]
    hidden = {}
    with store.reading() as db:
        for row in db.execute(select(clip.c.id, clip.c.clip_id).where(clip.c.verdict != "allow")):
            hidden[row.id] = row.clip_id
    assert len(hidden) >= 16
    secrets = {each for pair in hidden.items() for each in pair}
    for route in routes_of(store):
        if "GET" in route.methods and "labeler" in getattr(rule_of(route), "roles", ()):
            path = route.path
            for name in route.param_convertors:
                path = path.replace("{" + name + "}", world.ids[name]["home"] if name in world.ids else FREE[name])
            answer = me.get(path)
            assert not [each for each in secrets if each.encode() in answer.content], path
    mine = world.ids["assignment_id"]["home"]
    with store.writing() as db:
        shown = db.execute(select(task.c.clips).join(assignment).where(assignment.c.id == mine)).scalar_one()
        assert not set(shown) & hidden.keys()
        db.execute(update(clip).where(clip.c.id.in_(shown)).values(verdict="block"))
    try:
        assert [me.get(f"/media/{mine}/{place}").status_code for place in range(len(shown))] == [404] * len(shown)
        assert not any(each["available"] for each in me.get(f"/api/assignments/{mine}").json()["clips"])
    finally:
        with store.writing() as db:
            db.execute(update(clip).where(clip.c.id.in_(shown)).values(verdict="allow"))


def test_templates_never_mark_text_as_safe_and_hold_no_script_or_style() -> None:
    files = sorted((HERE / "templates").glob("*.html"))
    assert len(files) >= 6
    for file in files:
        text = file.read_text()
        for forbidden in ("| safe", "|safe", "autoescape false", "<style", " style=", "onclick=", "onload=", "javascript:", "hx-on", "hx-vals='js", "hx-vars"):
            assert forbidden not in text, f"{file.name}: {forbidden}"
        assert all('src="' in each for each in text.split("<script")[1:]), file.name

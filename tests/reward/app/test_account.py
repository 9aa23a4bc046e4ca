"""Logging in and out, invitations, sessions and tokens, through the app's own routes."""

from __future__ import annotations

import pytest

from reward.app import people, security
from reward.app.store import Store
from tests.reward.app.conftest import PASSWORD, Client, add_member, add_project

JOINING = {"login": "Ada", "name": "Ada L.", "password": PASSWORD}


def test_the_first_invitation_makes_a_lead_and_works_once(each_store: Store) -> None:
    token = people.first_invitation(each_store)
    client = Client(each_store)
    assert client.get(f"/api/join/{token}").json()["roles"] == ["lead"]
    assert client.post(f"/api/join/{token}", json=JOINING).status_code == 200
    assert client.get("/api/").json()["name"] == "Ada L."
    assert Client(each_store).post(f"/api/join/{token}", json={**JOINING, "login": "eve"}).status_code == 404
    assert people.first_invitation(each_store) is None


def test_an_invitation_ends_after_a_week(store: Store) -> None:
    token = people.first_invitation(store)
    now = store.now()
    store.now = lambda: now + security.INVITATION_MS
    assert Client(store).get(f"/api/join/{token}").status_code == 404


@pytest.mark.parametrize(("login", "password"), [("nobody", PASSWORD), ("ada", "wrong password"), ("ada", "")])
def test_what_is_wrong_with_a_login_is_not_told(store: Store, login: str, password: str) -> None:
    add_member(store, "ada", "labeler")
    answer = Client(store).post("/api/login", json={"login": login, "password": password})
    assert (answer.status_code, answer.json()) == (401, {"detail": "login or password are wrong"})


def test_a_session_ends_at_logout_with_a_new_password_and_with_time(store: Store) -> None:
    add_member(store, "ada", "labeler")
    first, second = Client(store, "ada"), Client(store, "ada")
    assert first.cookies["rushes"] != second.cookies["rushes"]
    assert first.post("/api/account/password", json={"old": PASSWORD, "new": "another long password"}).status_code == 200
    assert (first.get("/api/account").status_code, second.get("/api/account").status_code) == (200, 401)
    cookie = first.cookies["rushes"]
    assert first.post("/api/logout").status_code == 200
    assert security.actor_of_session(store, cookie) is None


@pytest.mark.parametrize("late", [security.IDLE_MS, security.SESSION_MS])
def test_a_session_ends_with_time(store: Store, late: int) -> None:
    add_member(store, "ada", "labeler")
    client, now = Client(store, "ada"), store.now()
    store.now = lambda: now + security.IDLE_MS - 1_000
    assert client.get("/api/account").status_code == 200
    store.now = lambda: now + security.IDLE_MS + late
    assert client.get("/api/account").status_code == 401


def test_a_token_has_its_persons_rights_until_it_is_revoked_and_cookies_do_not_count_beside_it(store: Store) -> None:
    add_member(store, "ada", "labeler", project_id=add_project(store))
    client = Client(store, "ada")
    token = client.post("/api/account/tokens", json={"name": "script"}).json()["token"]
    bearer = {"authorization": f"Bearer {token}"}
    script = Client(store)
    assert [each["name"] for each in script.get("/api/", headers=bearer).json()["projects"]] == ["horses"]
    assert script.post("/api/account/tokens", json={"name": "more"}, headers=bearer).status_code == 403
    assert client.get("/api/", headers={"authorization": "Bearer rushes_wrong"}).status_code == 401
    (held,) = client.get("/api/account").json()["tokens"]
    assert client.post(f"/api/account/tokens/{held['id']}/revoke").status_code == 200
    assert script.get("/api/", headers=bearer).status_code == 401


def test_every_page_of_an_account_renders(store: Store) -> None:
    add_member(store, "ada", "lead")
    add_project(store)
    client = Client(store, "ada")
    html = {"accept": "text/html"}
    for path in ("/", "/account", "/login"):
        answer = client.get(path, headers=html)
        assert answer.status_code == 200 and "<main" in answer.text, path
    assert Client(store).get("/account", headers=html, follow_redirects=False).headers["location"] == "/login"

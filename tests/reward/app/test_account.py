"""Logging in and out, invitations, sessions and tokens, through the app's own routes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from sqlalchemy import select, update

from reward.app import people, security
from reward.app.schema import person, person_private, session
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


class Slow:
    """Verifies passwords; during the first time something happens."""

    def __init__(self, meanwhile: Callable[[], None]) -> None:
        self.inner, self.meanwhile = security.hasher(), meanwhile
        self.hash = self.inner.hash

    def verify(self, password: str, hashed: str) -> bool:
        told, meanwhile, self.meanwhile = self.inner.verify(password, hashed), self.meanwhile, lambda: None
        meanwhile()
        return told

    def verify_and_update(self, password: str, hashed: str) -> tuple[bool, str | None]:
        told = self.verify(password, hashed)
        return told, self.hash(password)


@pytest.mark.parametrize("change", ["password", "state"])
def test_what_changes_while_a_password_is_verified_holds_for_the_login(each_store: Store, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    person_id, new = add_member(each_store, "ada", "labeler"), security.hasher().hash("another long password")

    def meanwhile() -> None:
        with each_store.writing() as db:
            if change == "password":
                db.execute(update(person_private).where(person_private.c.person_id == person_id).values(password_hash=new))
                security.shut_out(each_store, db, person_id)
            else:
                db.execute(update(person).where(person.c.id == person_id).values(state="deleted"))

    slow = Slow(meanwhile)
    monkeypatch.setattr(security, "hasher", lambda: slow)
    answer = Client(each_store).post("/api/login", json={"login": "ada", "password": PASSWORD})
    assert (answer.status_code, answer.json()) == (401, {"detail": "login or password are wrong"})
    with each_store.reading() as db:
        assert db.execute(select(session.c.id_hash).where(session.c.ended_at.is_(None))).first() is None
        held = db.execute(select(person_private.c.password_hash).where(person_private.c.person_id == person_id)).scalar_one()
    assert (held == new) == (change == "password"), "the old password does not come back as a new hash"


def test_of_two_logins_at_once_of_which_one_renews_the_hash_both_get_in(each_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    person_id, renewed = add_member(each_store, "ada", "labeler"), security.hasher().hash(PASSWORD)

    def meanwhile() -> None:
        with each_store.writing() as db:
            db.execute(update(person_private).where(person_private.c.person_id == person_id).values(password_hash=renewed))

    slow = Slow(meanwhile)
    monkeypatch.setattr(security, "hasher", lambda: slow)
    assert Client(each_store).post("/api/login", json={"login": "ada", "password": PASSWORD}).status_code == 200


def test_of_two_changes_of_a_password_at_once_the_first_holds(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from reward.app.routes import account

    person_id, new = add_member(store, "ada", "labeler"), security.hasher().hash("another long password")
    client = Client(store, "ada")

    def meanwhile() -> None:
        with store.writing() as db:
            db.execute(update(person_private).where(person_private.c.person_id == person_id).values(password_hash=new))

    slow = Slow(meanwhile)
    monkeypatch.setattr(account, "hasher", lambda: slow)
    assert client.post("/api/account/password", json={"old": PASSWORD, "new": "a password that was stolen"}).status_code == 403
    with store.reading() as db:
        assert db.execute(select(person_private.c.password_hash).where(person_private.c.person_id == person_id)).scalar_one() == new


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

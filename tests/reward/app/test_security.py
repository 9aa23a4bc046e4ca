"""Headers, forgery, hosts, sizes and limits of requests (`reward/app/security.py` says why)."""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import re
import shutil
import statistics
import time
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import select, update
from starlette.testclient import TestClient

from reward.app import people, security, web
from reward.app.schema import event, person, session
from reward.app.security import HEADERS, sha256
from reward.app.store import Store, open_store
from reward.app.web import HERE, HIDDEN, AppSettings, make_app, static_path, visible
from tests.reward.app.conftest import PASSWORD, Client, add_member, add_project
from tests.reward.app.test_access import routes_of

if TYPE_CHECKING:
    from playwright.sync_api import Browser

LOGIN = {"login": "ada", "password": PASSWORD}


def test_every_answer_of_every_route_carries_the_headers(store: Store) -> None:
    add_member(store, "ada", "lead")
    ids = {"project_id": {"home": add_project(store)}}
    client = Client(store, "ada")
    for route in routes_of(store):
        if route.path.endswith("/logout"):
            continue
        path = route.path
        for name in route.param_convertors:
            path = path.replace("{" + name + "}", ids.get(name, {"home": "none"})["home"])
        answer = client.request(next(iter(route.methods)), path, follow_redirects=False)
        for name, value in HEADERS.items():
            assert answer.headers[name] == value, f"{route.path}: {name}"
    assert client.get("/nowhere").headers["x-content-type-options"] == "nosniff"
    assert client.get(static_path("app.css")).headers["cache-control"].endswith("immutable")


def test_answers_that_no_route_gives_carry_the_headers_too(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "is_alive", lambda store: 1 / 0)
    client = TestClient(make_app(store), base_url="http://127.0.0.1", raise_server_exceptions=False)
    bug, foreign = client.get("/api/health"), client.get("/login", headers={"host": "evil.example"})
    assert (bug.status_code, foreign.status_code) == (500, 400)
    for answer in (bug, foreign):
        assert {name: answer.headers[name] for name in HEADERS} == HEADERS


@pytest.mark.parametrize(
    "headers",
    [
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://["},
        {"origin": "http://127.0.0.1.evil.example"},
        {"origin": "http://127.0.0.1:8000"},
    ],
)
def test_what_another_sites_page_sends_changes_nothing(store: Store, headers: dict[str, str]) -> None:
    add_member(store, "ada", "lead")
    client = Client(store, "ada")
    for route in routes_of(store):
        if "POST" in route.methods:
            path = route.path
            for name in route.param_convertors:
                path = path.replace("{" + name + "}", "none")
            answer = client.post(path, json={}, headers=headers)
            assert (answer.status_code, answer.json()["detail"]) == (403, "the request comes from another site"), path
            client = Client(store, "ada") if route.path.endswith("/logout") else client
    assert Client(store).post("/api/login", json=LOGIN, headers=headers).status_code == 403


@pytest.mark.parametrize("token", ["", "wrong"])
def test_a_sessions_request_needs_the_sessions_token(store: Store, token: str) -> None:
    add_member(store, "ada", "lead")
    client = Client(store, "ada")
    assert client.post("/api/account/sessions/end", headers={"x-csrf": token}).status_code == 403
    assert client.post("/api/account/sessions/end").status_code == 200
    other = Client(store, "ada")
    assert client.post("/api/account/sessions/end", headers={"x-csrf": other.me.csrf}).status_code == 403


def test_only_the_names_it_is_served_under_are_answered(store: Store) -> None:
    for host, status in (("127.0.0.1", 200), ("localhost:8012", 200), ("evil.example", 400), ("127.0.0.1.evil.example", 400)):
        assert Client(store).get("/login", headers={"host": host}).status_code == status, host
    assert Client(store, settings=AppSettings(hosts=("rushes.example",))).get("/login", headers={"host": "127.0.0.1"}).status_code == 400


def test_the_cookie_is_out_of_reach_of_scripts_and_behind_tls_bound_to_the_host(store: Store) -> None:
    add_member(store, "ada", "lead")
    plain = Client(store).post("/api/login", json=LOGIN).headers["set-cookie"]
    assert plain.startswith("rushes=") and "HttpOnly" in plain and "SameSite=lax" in plain and "Domain" not in plain
    tls = Client(store, settings=AppSettings(secure=True)).post("/api/login", json=LOGIN).headers["set-cookie"]
    assert tls.startswith("__Host-rushes=") and "Secure" in tls and "Path=/" in tls and "Domain" not in tls


def test_a_cookie_planted_before_the_login_is_worth_nothing_after_it(store: Store) -> None:
    add_member(store, "ada", "lead")
    client = Client(store)
    client.cookies.set("rushes", "planted", domain="127.0.0.1")
    client.post("/api/login", json=LOGIN).raise_for_status()
    assert "planted" not in client.cookies.values() or security.actor_of_session(store, "planted") is None
    with store.reading() as db:
        held = db.execute(select(session.c.id_hash)).scalars().all()
    assert held and security.sha256("planted") not in held and not set(client.cookies.values()) & set(held)


def test_sessions_end_when_roles_change_or_a_person_is_disabled(store: Store) -> None:
    person_id = add_member(store, "ada", "labeler")
    client = Client(store, "ada")
    with store.writing() as db:
        people.grant(store, db, person_id, "*", ("lead",), by="system")
    assert client.get("/api/account").status_code == 401
    client = Client(store, "ada")
    with store.writing() as db:
        db.execute(update(person).where(person.c.id == person_id).values(state="disabled"))
    assert client.get("/api/account").status_code == 401
    assert Client(store).post("/api/login", json=LOGIN).status_code == 401


def test_logins_are_limited_by_account_and_by_address_and_refusals_are_logged(store: Store) -> None:
    add_member(store, "ada", "lead")
    client = Client(store)
    told = [client.post("/api/login", json={"login": "ada", "password": "wrong"}).status_code for _ in range(12)]
    assert told == [401] * 10 + [429] * 2
    assert client.post("/api/login", json=LOGIN).status_code == 429
    assert Client(store).post("/api/login", json=LOGIN).status_code == 200  # another process: limits are counted in memory
    with store.reading() as db:
        assert len(db.execute(select(event.c.seq).where(event.c.kind == "login refused")).all()) == 10


@pytest.mark.timed
def test_an_unknown_login_takes_as_long_as_a_wrong_password(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from pwdlib import PasswordHash
    from pwdlib.hashers.argon2 import Argon2Hasher

    costly = PasswordHash((Argon2Hasher(time_cost=2, memory_cost=8192, parallelism=1),))
    monkeypatch.setattr(security, "hasher", lambda: costly)
    security._nobodys_hash.cache_clear()
    add_member(store, "ada", "lead")

    def seconds(login: str) -> float:
        taken = []
        for _ in range(7):
            began = time.perf_counter()
            with pytest.raises(security.Denied):
                security.login(store, login, "wrong password", "")
            taken.append(time.perf_counter() - began)
        return statistics.median(taken)

    security._nobodys_hash()
    ratio = seconds("nobody") / seconds("ada")
    security._nobodys_hash.cache_clear()
    assert 0.5 < ratio < 2


def test_large_bodies_are_refused_before_they_are_read_whole(store: Store) -> None:
    add_member(store, "ada", "lead")
    client = Client(store, "ada")
    assert client.post("/api/account/tokens", content=b'{"name": "' + b"x" * security.BODY_BYTES + b'"}', headers={"content-type": "application/json"}).status_code == 413
    nested = b"[" * 100_000 + b"]" * 100_000
    assert client.post("/api/account/tokens", content=nested, headers={"content-type": "application/json"}).status_code == 400
    assert client.post("/api/account/tokens", json={"name": "x" * 201}).status_code == 422
    assert client.post("/api/account/tokens", data={"name": "x"}).status_code == 422


DEEP = "[" * 200_000
FORM = "".join(f'--x\r\nContent-Disposition: form-data; name="f{number}"\r\n\r\n1\r\n' for number in range(10_000)) + "--x--\r\n"


@pytest.mark.timed
@pytest.mark.parametrize(
    ("kind", "body"),
    [("multipart/form-data; boundary=x", FORM), ("application/x-www-form-urlencoded", "a=1&" * 200_000), ("application/json", DEEP), ("application/json", '{"a":' * 100_000)],
)
def test_no_route_takes_a_form_apart_and_deep_json_is_refused_at_once(store: Store, kind: str, body: str) -> None:
    add_member(store, "ada", "lead")
    client, began = Client(store, "ada"), time.perf_counter()
    for path in ("/api/login", "/api/projects", "/api/account/tokens"):
        assert client.post(path, content=body, headers={"content-type": kind}).status_code in (400, 415, 422), path
    assert time.perf_counter() - began < 3


CONNECTING = {"httpx", "httpx2", "requests", "aiohttp", "urllib3", "urllib.request", "http.client", "socket", "ftplib", "smtplib", "websockets", "telnetlib"}


def imported(tree: ast.AST) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            found |= {each.value for each in node.args if isinstance(each, ast.Constant)}
    return found


def test_the_app_connects_to_nowhere() -> None:
    """There is no import by address, no webhook and no call home: nothing that could be asked to fetch what only the server reaches."""
    assert imported(ast.parse("from http import client\nimport socket")) & CONNECTING == {"http.client", "socket"}
    files = list(HERE.rglob("*.py"))
    assert len(files) > 30
    assert {str(file): found for file in files if (found := imported(ast.parse(file.read_text())) & CONNECTING)} == {}


VENDORED = {
    "htmx.min.js": "d6fdc75f204e6bdefa99b69bf1e6d4ac69b8a364f77929f45c13476b4000f717",
    "json-enc.min.js": "e1485812d18c44ba70b17b318e1d87895e56631f8b5d4e190ba011c49d363dda",
}
"""sha256 of what others wrote and pages run: htmx.org 2.0.11 and htmx-ext-json-enc 2.0.3, as the npm registry has them."""


def test_what_others_wrote_and_pages_run_is_what_was_looked_at() -> None:
    assert {name: hashlib.sha256((HERE / "static" / name).read_bytes()).hexdigest() for name in VENDORED} == VENDORED


def test_no_secret_is_written_down_or_told(tmp_path: Path, sqlite_template: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither in any file of the store, nor in the log of events, nor in what the server prints: passwords, cookies, tokens and links are kept as hashes."""
    caplog.set_level(logging.DEBUG)
    shutil.copytree(sqlite_template, tmp_path / "store")
    store = open_store(tmp_path / "store")
    try:
        link = people.first_invitation(store)
        assert link is not None
        client = Client(store)
        client.post(f"/api/join/{link}", json={"login": "ada", "name": "Ada", "password": PASSWORD}).raise_for_status()
        actor = security.actor_of_session(store, client.cookies["rushes"])
        assert actor is not None
        client.headers["x-csrf"] = actor.csrf
        token = client.post("/api/account/tokens", json={"name": "nightly"}).json()["token"]
        for login in ("ada", "nobody"):
            client.post("/api/login", json={"login": login, "password": "a wrong password"})
        secrets = [link, PASSWORD, "a wrong password", client.cookies["rushes"], token]
    finally:
        store.close()
    written = b"".join(file.read_bytes() for file in store.folder.rglob("*") if file.is_file() and file.name != "secret")
    assert sha256(link).encode() in written and b"invited" in written, "this looks where things are"
    told = "".join(each.getMessage() for each in caplog.records if not each.name.startswith("httpx")).encode() + json.dumps(client.get("/api/account").json()).encode()
    assert [each for each in [*secrets, store.secret.hex()] if each.encode() in written + told] == [] and store.secret not in written + told


def test_static_files_are_found_by_hash_and_nothing_else_is(store: Store) -> None:
    client = Client(store)
    good = static_path("app.js")
    assert client.get(good).status_code == 200
    digest = good.split("/")[2]
    for path in (
        "0" * 16 + "/app.js",
        f"{digest}/app.css",
        f"{digest}/..%2fweb.py",
        f"{digest}/%2e%2e%2fweb.py",
        f"{digest}//etc/passwd",
        f"{digest}/app.js%00",
        f"{digest}/..\\web.py",
    ):
        assert client.get(f"/static/{path}").status_code == 404, path


def test_text_that_hides_something_is_shown_with_what_it_hides() -> None:
    assert visible("a\u202eb\u200bc\x1b[31m\n\ttag\U000e0041é日本") == "a‹U+202E›b‹U+200B›c‹U+001B›[31m\n\ttag‹U+E0041›é日本"


def test_what_is_shown_as_hidden_is_what_unicode_and_the_browser_call_so(browser: Browser) -> None:
    for code in (0xAD, 0x34F, 0x1160, 0x17B4, 0x180B, 0x2028, 0x3164, 0xFE0F, 0xFFA0, 0xFFF9, 0xE0100):
        assert visible(f"a{chr(code)}b") == f"a‹U+{code:04X}›b"
    (pattern,) = re.findall(r"const HIDDEN = /(.+)/gu;", (web.STATIC / "rank.js").read_text())
    page = browser.new_page()
    asked = "(pattern) => [...Array(0x110000).keys()].filter((c) => (c < 0xd800 || c > 0xdfff) && new RegExp(pattern, 'u').test(String.fromCodePoint(c)))"
    told = {chr(code) for code in page.evaluate(asked, pattern)}
    page.close()
    known = {c for c in told ^ HIDDEN if unicodedata.category(c) != "Cn"}  # not of a Unicode that is newer than this Python's
    assert not known and len(told & HIDDEN) > 4_000

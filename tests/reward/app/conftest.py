"""Stores on SQLite and on a PostgreSQL server of the tests' own, people in every role, and clients that are logged in as them."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from sqlalchemy import create_engine, insert, text
from starlette.testclient import TestClient

from base_model.errors import UserError
from base_model.video.files import mp4_bytes
from recipes.bench._postgres import postgres as server
from recipes.bench._postgres import programs
from reward.app import people, security
from reward.app.media import path_of
from reward.app.schema import clip, project, prompt
from reward.app.store import Store, new_id, open_store
from reward.app.web import AppSettings, make_app

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PASSWORD = "correct horse battery"
STORES = ("sqlite", "postgresql")


@pytest.fixture(scope="session", autouse=True)
def cheap_passwords() -> Iterator[None]:
    """Argon2 with the least it takes: the tests log in hundreds of times."""
    from pwdlib import PasswordHash
    from pwdlib.hashers.argon2 import Argon2Hasher

    kept, cheap = security.hasher, PasswordHash((Argon2Hasher(time_cost=1, memory_cost=8, parallelism=1),))
    patch = pytest.MonkeyPatch()
    for module in (security, people):
        patch.setattr(module, "hasher", lambda: cheap)
    security._nobodys_hash.cache_clear()
    yield
    patch.undo()
    assert security.hasher is kept


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store, to be copied: building the schema takes longer than most tests."""
    folder = tmp_path_factory.mktemp("template")
    open_store(folder).close()
    return folder


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a real server of our own, without a database."""
    try:
        programs()
    except UserError as error:
        pytest.skip(str(error))
    with server(sync=False) as url:
        yield url


@pytest.fixture(scope="session")
def postgres_template(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    _sql(postgres, "CREATE DATABASE template_rushes")
    open_store(tmp_path_factory.mktemp("pg"), postgres.format("template_rushes")).close()
    return "template_rushes"


def _sql(url: str, statement: str) -> None:
    engine = create_engine(url.format("postgres"), isolation_level="AUTOCOMMIT")
    with engine.connect() as db:
        db.execute(text(statement))
    engine.dispose()


_names = (f"test_{number}" for number in itertools.count())


@pytest.fixture
def new_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str], Store]]:
    """Makes empty stores of a kind, "sqlite" or "postgresql"."""
    made: list[Store] = []

    def make(kind: str) -> Store:
        folder = tmp_path / f"store-{len(made)}"
        if kind == "sqlite":
            shutil.copytree(request.getfixturevalue("sqlite_template"), folder)
            made.append(open_store(folder))
        else:
            url, name = request.getfixturevalue("postgres"), next(_names)
            _sql(url, f"CREATE DATABASE {name} TEMPLATE {request.getfixturevalue('postgres_template')}")
            made.append(open_store(folder, url.format(name)))
        return made[-1]

    yield make
    for store in made:
        store.close()


@pytest.fixture
def store(new_store: Callable[[str], Store]) -> Store:
    """An empty store on SQLite."""
    return new_store("sqlite")


@pytest.fixture(params=STORES)
def each_store(request: pytest.FixtureRequest, new_store: Callable[[str], Store]) -> Store:
    """An empty store, on SQLite and on PostgreSQL."""
    return new_store(request.param)


def add_project(store: Store, name: str = "horses", **settings: object) -> str:
    project_id = new_id("j")
    with store.writing() as db:
        db.execute(insert(project), {"id": project_id, "name": name, "state": "open", "settings": settings, "created_at": store.now()})
    return project_id


def add_member(store: Store, login: str, *roles: str, project_id: str = "*") -> str:
    """A person with a password; returns the id."""
    with store.writing() as db:
        person_id = people.add_person(store, db, login=login, name=login.title(), hashed=security.hasher().hash(PASSWORD))
        people.grant(store, db, person_id, project_id, roles, by="system")
    return person_id


class Client(TestClient):
    """A browser without a window: keeps cookies, says where it is, and sends the session's token."""

    def __init__(self, store: Store, login: str | None = None, settings: AppSettings | None = None) -> None:
        super().__init__(make_app(store, settings), base_url="http://127.0.0.1", raise_server_exceptions=True)
        if login is not None:
            self.post("/api/login", json={"login": login, "password": PASSWORD}).raise_for_status()
            actor = security.actor_of_session(store, self.cookies["rushes"])
            assert actor is not None
            self.me = actor
            self.headers["x-csrf"] = actor.csrf


PROMPTS = ("a red circle moves to the left", "a blue bar grows", "a green star stands still")


def add_clips(store: Store, project_id: str, prompts: Sequence[str] = PROMPTS, *, takes: int = 4, verdicts: Sequence[str] = ("allow",), files: bool = True) -> list[str]:
    """Clips of every prompt, with verdicts in turn, and with real files that a browser plays; returns their ids in the order of prompts, then takes."""
    made: list[str] = []
    with store.writing() as db:
        for text_ in prompts:
            db.execute(insert(prompt), {"project_id": project_id, "prompt_id": text_, "text": text_, "lang": "en", "kind": ""})
            for take in range(takes):
                verdict = verdicts[len(made) % len(verdicts)]
                digest = hashlib.sha256(f"{project_id} {text_} {take}".encode()).hexdigest()
                score = {"allow": 0.02, "review": 0.4, "block": 0.9}.get(verdict)
                ruling = {"verdict": verdict, "policy": "P17", "score": score, "reasons": [], "filter": "flash 3", "threshold": 0.5, "policy_version": "2"}
                row = {
                    "clip_id": digest,
                    "path": f"clips/{digest}.mkv",
                    "prompt_id": text_,
                    "generator": "rushes",
                    "seed": take,
                    "width": 128,
                    "height": 128,
                    "fps": 12.0,
                    "num_frames": 13,
                }
                made.append(new_id("c"))
                db.execute(
                    insert(clip),
                    {
                        "id": made[-1], "project_id": project_id, "clip_id": digest, "prompt_id": text_, "run": "test", "row": row, "verdict": verdict, "score": score,
                        "decision": {"verdict": verdict, "rulings": [ruling]}, "state": "live", "created_at": store.now(),
                    },
                )  # fmt: skip
                if files:
                    file = path_of(store, digest)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(film(take))
    return made


@cache
def film(take: int) -> bytes:
    """Thirteen frames of a bar that moves, of another colour for every take, as H.264."""
    frames = np.full((13, 32, 32, 3), 30, np.uint8)
    for t in range(13):
        frames[t, 8:24, 2 * t : 2 * t + 6] = [(220, 40, 40), (40, 200, 60), (60, 90, 230), (230, 210, 50), (200, 60, 200), (60, 200, 210)][take % 6]
    return mp4_bytes(frames, 12.0)


CHROMIUM = next((path for path in map(Path, ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome")) if path.exists()), None)
FLAGS = [
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--mute-audio",
    "--autoplay-policy=no-user-gesture-required",
]


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """Debian's Chromium, which plays H.264."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, *(["--no-sandbox"] if os.getuid() == 0 else [])])
        yield started
        started.close()


@contextmanager
def serving(store: Store, settings: AppSettings | None = None) -> Iterator[str]:
    """The app on a free port of this machine, in a thread; gives its address."""
    import uvicorn

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make_app(store, settings), http="h11", ws="none", lifespan="off", log_level="warning", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def log_in(page: Page, address: str, login: str) -> None:
    page.goto(f"{address}/login")
    page.get_by_label("Login").fill(login)
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Log in").click()
    page.wait_for_url(f"{address}/")


@pytest.fixture
def page_of(browser: Browser) -> Iterator[Callable[[str, str], Page]]:
    """Opens pages that are logged in: page_of(address, login). A page on which a script failed, or the policy of contents was broken, fails the test."""
    faults: list[str] = []
    contexts = []

    def make(address: str, login: str, **options: object) -> Page:
        context = browser.new_context(base_url=address, **options)  # type: ignore[arg-type]
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" and "status of 4" not in message.text else None)
        log_in(page, address, login)
        return page

    yield make
    for context in contexts:
        context.close()
    assert not faults, faults

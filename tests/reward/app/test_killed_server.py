"""The server is killed at random moments while people answer: what was acknowledged is there, once, and the log holds."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from sqlalchemy import select

from recipes.bench._postgres import postgres, programs
from recipes.bench.app import TAKES, Browser, csrf_of, seed_store, served
from reward.app import schema
from reward.app.store import open_store
from tests.reward.app.conftest import STORES

LABELERS = 8


@dataclass
class Told:
    acknowledged: list[str] = field(default_factory=list)
    unknown: set[str] = field(default_factory=set)  # sent, and no answer came before the server was gone


def labeler(browser: Browser, project_id: str, rng: random.Random, told: Told, most: int) -> None:
    """Answers until the server is gone, or enough was acknowledged. What got no answer may be there or not."""
    with contextlib.closing(browser), contextlib.suppress(OSError, http.client.HTTPException):
        while len(told.acknowledged) < most:
            task_id = json.loads(browser.ask(f"/api/projects/{project_id}/label/next", {})[1])["assignment_id"]
            answer_id = f"killed-{rng.getrandbits(64):016x}"
            body = {"id": answer_id, "ranks": {"overall": rng.sample(range(1, TAKES + 1), TAKES)}, "watched": [1.0] * TAKES, "watch_ms": [9] * TAKES, "lead_time_ms": 9}
            told.unknown.add(answer_id)
            status, content = browser.ask(f"/api/assignments/{task_id}/answer", body)
            assert status == 200, content
            told.unknown.discard(answer_id)
            told.acknowledged.append(answer_id)


def until_killed(url: str, kill: Callable[[], None], project_id: str, sessions: list[tuple[str, str]], rng: random.Random, told: Told, most: int) -> None:
    enough = len(told.acknowledged) + rng.randint(5, 40)
    with ThreadPoolExecutor(len(sessions)) as pool:
        work = [pool.submit(labeler, Browser(urlsplit(url).netloc, *session), project_id, random.Random(rng.random()), told, most) for session in sessions]
        while len(told.acknowledged) < enough and not all(each.done() for each in work):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        kill()
        for each in work:
            each.result()


def kill_again_and_again(folder: Path, kind: str, submits: int) -> tuple[Told, int]:
    rng, told, kills = random.Random(0), Told(), 0
    with contextlib.ExitStack() as stack:
        database = stack.enter_context(postgres()).format("postgres") if kind == "postgresql" else None
        store = open_store(folder, database)
        project_id, cookies = seed_store(store, LABELERS, 2 * submits + 10 * LABELERS)
        sessions = [(cookie, csrf_of(store, cookie)) for cookie in cookies]
        store.close()
        while len(told.acknowledged) < submits:
            with served(folder, database) as (url, process):
                until_killed(url, process.kill, project_id, sessions, rng, told, submits)
                process.wait()
            kills += 1
        store = open_store(folder, database)
        with store.reading() as db:
            kept = Counter(db.execute(select(schema.answer.c.id)).scalars())
            answered = db.execute(select(schema.answer.c.assignment_id)).scalars().all()
            slots = db.execute(select(schema.assignment.c.task_id, schema.assignment.c.slot)).all()
            states = Counter(db.execute(select(schema.assignment.c.state)).scalars())
        events = store.verify_log()["events"]
        store.close()
    assert not [each for each in told.acknowledged if kept[each] != 1], "an acknowledged answer is lost, or there twice"
    assert set(kept) <= set(told.acknowledged) | told.unknown and set(kept.values()) == {1}
    assert len(answered) == len(set(answered)) and len(slots) == len(set(slots)), "one lease was answered twice, or given to two"
    assert states["answered"] == len(kept) and events >= len(kept)
    return told, kills


@pytest.fixture
def _server(request: pytest.FixtureRequest) -> None:
    if request.getfixturevalue("kind") == "postgresql":
        request.getfixturevalue("postgres_installed")


@pytest.fixture
def postgres_installed() -> None:
    from base_model.errors import UserError

    try:
        programs()
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("kind", STORES)
def test_nothing_that_was_acknowledged_is_lost_or_doubled_when_the_server_is_killed(tmp_path: Path, kind: str, _server: None) -> None:
    told, kills = kill_again_and_again(tmp_path, kind, 60)
    assert len(told.acknowledged) >= 60 and kills >= 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", STORES)
def test_a_thousand_answers_survive_kills_at_random_moments(tmp_path: Path, kind: str, _server: None) -> None:
    told, kills = kill_again_and_again(tmp_path, kind, 1_000)
    assert len(told.acknowledged) >= 1_000 and kills >= 10

"""From the first schema forward: every row of a store that was filled at 0001 is the same at the newest one, on both databases."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from sqlalchemy import MetaData, delete, insert, inspect, select, text, update
from sqlalchemy.exc import DBAPIError

from base_model.errors import UserError
from reward.app import log, migrations
from reward.app.security import hasher
from reward.app.store import Store, open_store
from tests.reward.app.conftest import PASSWORD, STORES, Client, _sql

FIRST = Path(migrations.__file__).parent / "versions" / "0001_the_first_schema.py"
FROZEN = "3c1b26a7eb7e21729c4795a731def2026f794b5631a7f066bc9b7bfe9fb77997"
NOW = 1_790_000_000_000
UNCHANGING = ("answer", "withdrawal", "review", "reveal", "signoff", "event")
EVIDENCE = {
    **{"run": "first", "clips": {"allow": 2, "review": 0, "error": 0, "block": 0}, "withdrawn": 0, "filters": ["flash 3"], "open": {"items": {}, "proposed thresholds": 0}},
    **{"policy_version": "2", "rates": [], "audit": {"clips": 0, "drawn": 0, "read": 0, "unconfirmed": 0}, "log": None},
}
RULING = {"verdict": "allow", "policy": "P17", "score": 0.02, "reasons": [], "filter": "flash 3", "threshold": 0.5, "policy_version": "2"}


def test_the_first_step_is_never_changed() -> None:
    assert hashlib.sha256(FIRST.read_bytes()).hexdigest() == FROZEN, "stores were made by it: write a step behind it instead"


def rows() -> dict[str, list[dict[str, Any]]]:
    """Rows of every table as they stood at 0001: a person, a project, and a thing of each kind in it."""
    ids = {"project_id": "j1", "person_id": "p1"}
    answer = {
        "guideline_version": "1",
        "app_version": "1",
        "what": "rank",
        "ranks": {"overall": [1, 2]},
        "all_bad": False,
        "ok": None,
        "asked": "",
        "watched": [1.0, 1.0],
        "watch_ms": [900, 900],
        "lead_time_ms": 9_000,
    }
    said = {"said": "not_violating", "policies": [], "severity": 0, "ruling": None, "restricted": False, "escalate": False, "sealed": "0" * 64}
    preview = {"filter": "flash 3", "policy": "P17", "old": 0.5, "new": 0.4, "clips": 2} | {
        **{name: {"clips": 0, "audited": 0, "violating": 0} for name in ("blocked_more", "blocked_less")},
        **{name: {"precision": {"n": 0}, "recall": {"n": 0}} for name in ("before", "after")},
    }
    found: dict[str, list[dict[str, Any]]] = {
        "person": [{"id": "p1", "pseudonym": "person-1", "state": "active", "settings": {"reviewing": {"hold": True}}, "created_at": NOW}],
        "person_private": [{"person_id": "p1", "login": "ada", "name": "Ada „Ž“ 達", "password_hash": hasher().hash(PASSWORD)}],
        "private_text": [{"id": "x1", "person_id": "p1", "text": "first line\nsecond ✓", "created_at": NOW}],
        "project": [{"id": "j1", "name": "horses", "state": "open", "settings": {"labeling": {"takes": 2}}, "created_at": NOW}],
        "membership": [{**ids, "project_id": "*", "role": role, "since": NOW} for role in ("labeler", "reviewer", "lead")],
        "invitation": [
            {"id": "i1", "token_hash": "1" * 64, "project_id": "j1", "roles": ["labeler"], "invited_by": "system", "created_at": NOW, "expires_at": NOW}
            | {"used_by": "p1", "used_at": NOW, "revoked_at": None}
        ],
        "session": [{"id_hash": "2" * 64, "person_id": "p1", "csrf": "c", "client": "3" * 64, "created_at": NOW, "seen_at": NOW, "ended_at": None}],
        "api_token": [{"id": "k1", "token_hash": "4" * 64, "person_id": "p1", "name": "script", "created_at": NOW, "expires_at": NOW, "revoked_at": NOW}],
        "prompt": [{"project_id": "j1", "prompt_id": "a horse", "text": "a horse gallops", "lang": "en", "kind": ""}],
        "clip": [
            {"id": f"c{n}", "project_id": "j1", "clip_id": f"{n:064x}", "prompt_id": "a horse", "run": "first", "row": {"fps": 12.0, "width": 32, "height": 32}, "verdict": "allow"}
            | {"score": 0.02 if n else None, "decision": {"verdict": "allow", "rulings": [RULING]}, "state": "live", "created_at": NOW}
            for n in range(2)
        ],
        "task": [
            {"id": "t1", "project_id": "j1", "prompt_id": "a horse", "clips": ["c0", "c1"], "kind": "rank", "truth": None, "wanted": 2, "taken": 1, "answered": 1}
            | {"priority": 0.1 + 0.2, "shuffle": 1 / 3, "state": "open", "created_at": NOW}
        ],
        "assignment": [
            {"id": "a1", **ids, "task_id": "t1", "slot": 0, "purpose": "active", "repeat": 0, "shown_order": [1, 0], "issued_at": NOW, "lease_until": NOW}
            | {"state": "answered", "draft": {"page": {"ranks": {}}}}
        ],
        "answer": [{"id": f"n{n}", **ids, "task_id": "t1", "assignment_id": "a1", "version": n, "body": answer, "at": NOW} for n in (1, 2)],
        "withdrawal": [{"ref": "n1", "kind": "answer", "person_id": "p1", "at": NOW}],
        "item": [
            {"id": "q1", "project_id": "j1", "clip": "c0", "queue": "random", "why": {"policies": []}, "probability": 0.125, "wave": 0, "band": 1, "source": None, "severity": 0}
            | {"place": 0.5, "wanted": 1, "taken": 1, "state": "closed", "created_at": NOW}
        ],
        "reading": [{"id": "r1", **ids, "item_id": "q1", "clip": "c0", "slot": 0, "issued_at": NOW, "lease_until": NOW, "state": "decided", "draft": None}],
        "review": [
            {"id": "v1", **ids, "item_id": "q1", "reading_id": "r1", "clip": "c0", "version": 1, "said": "not_violating", "body": said, "rationale": "x1", "policy_version": "2/1"}
            | {"at": NOW}
        ],
        "reveal": [{"id": "l1", **ids, "reading_id": "r1", "level": "sharp", "severity": 3, "at": NOW}],
        "threshold": [
            {"id": "h1", "project_id": "j1", "filter": "flash 3", "policy": "P17", "old": 0.5, "new": 0.4, "preview": preview, "proposed_by": "person-1", "proposed_at": NOW}
            | {"decided_by": "person-2", "decided_at": NOW, "state": "refused"}
        ],
        "signoff": [{"id": "s1", "project_id": "j1", "run": "first", "approved": True, "evidence": EVIDENCE, "statement": "looked", "person_id": "person-1", "at": NOW}],
        "tombstone": [{"id": "d1", "kind": "clip", "ref": "c9", "reason": "asked for", "by": "person-1", "at": NOW}],
        "event": [],
    }  # fmt: skip
    prev = log.FIRST
    for seq in range(1, 9):
        body = f'{{"n":{seq}}}'
        prev = log.digest(seq, NOW, "person-1", "answered", f"a{seq}", body, before := prev)
        found["event"].append({"seq": seq, "at": NOW, "actor": "person-1", "kind": "answered", "subject": f"a{seq}", "body": body, "prev": before, "hash": prev})
    return found


@pytest.fixture(params=STORES)
def old_store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A store at 0001 with rows in every table."""
    url = None
    if request.param == "postgresql":
        server, name = request.getfixturevalue("postgres"), f"old_{hashlib.sha256(str(tmp_path).encode()).hexdigest()[:12]}"
        _sql(server, f"CREATE DATABASE {name}")
        url = server.format(name)
    store = Store(tmp_path / "store", url, now=lambda: NOW)
    migrations.upgrade(store.engine, "0001")
    tables = tables_of(store)
    given = rows()
    assert given.keys() == tables.keys(), "a row of every table, and of no other"
    with store.writing() as db:
        for table in tables_in_order(store):
            db.execute(insert(tables[table]), given[table])
    assert all(given[name] for name in given)
    request.addfinalizer(store.engine.dispose)
    return store


def tables_of(store: Store) -> dict[str, Any]:
    """The tables as they are in the database now."""
    found = MetaData()
    found.reflect(store.engine)
    return {name: table for name, table in found.tables.items() if name != "alembic_version"}


def tables_in_order(store: Store) -> list[str]:
    found = MetaData()
    found.reflect(store.engine)
    return [table.name for table in found.sorted_tables if table.name != "alembic_version"]


def contents(store: Store, tables: dict[str, Any]) -> dict[str, list[tuple[Any, ...]]]:
    with store.reading() as db:
        return {name: sorted(map(tuple, db.execute(select(*table.c))), key=repr) for name, table in tables.items()}


def version(store: Store) -> str:
    with store.reading() as db:
        return str(db.execute(text("SELECT version_num FROM alembic_version")).scalar_one())


def test_every_row_of_the_first_schema_is_the_same_at_the_newest(old_store: Store) -> None:
    tables = tables_of(old_store)
    before = contents(old_store, tables)
    assert version(old_store) == "0001" and all(before.values())
    newest = open_store(old_store.folder, str(old_store.url) if old_store.is_sqlite else old_store.url.render_as_string(hide_password=False), now=old_store.now)
    try:
        assert version(newest) > "0001"
        assert contents(newest, tables) == before
        assert newest.verify_log() == {"events": 8, "head": rows()["event"][-1]["hash"], "anchors": newest.verify_log()["anchors"]}
        for name in UNCHANGING:
            for change in (update(tables[name]).values({list(tables[name].c)[-1]: list(tables[name].c)[-1]}), delete(tables[name])):
                with pytest.raises(DBAPIError, match=f"{name} is only added to"), newest.writing() as db:
                    db.execute(change)
        with pytest.raises(DBAPIError, match="item keeps what it was made with"), newest.writing() as db:
            db.execute(update(tables["item"]).values(probability=0.5))
        assert contents(newest, tables) == before
    finally:
        newest.close()


def test_the_app_serves_a_store_that_was_made_at_the_first_schema(old_store: Store) -> None:
    migrations.upgrade(old_store.engine)
    client = Client(old_store, "ada")
    assert client.get("/api/").json()["projects"] == [{"id": "j1", "name": "horses", "roles": ["labeler", "lead", "reviewer"]}]
    for path in ("/projects/j1/lead", "/projects/j1/lead/people", "/projects/j1/label", "/review/j1", "/log?actor=person-1", "/assignments/a1", "/projects/j1/lead/signoffs"):
        answer = client.get(path, headers={"accept": "text/html"})
        assert answer.status_code == 200 and "<main" in answer.text, (path, answer.text)
    assert len(client.get("/api/log?actor=person-1").json()["events"]) > 8
    assert client.get("/api/projects/j1/export/jsonl").text.count('"event_id"') == 1
    assert old_store.verify_log()["events"] > 8


def test_who_opens_an_older_store_is_told_that_there_is_no_way_back(old_store: Store, new_store: Callable[[str], Store], caplog: pytest.LogCaptureFixture) -> None:
    migrations.upgrade(old_store.engine)
    migrations.upgrade(old_store.engine)
    migrations.upgrade(new_store("sqlite").engine)
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == ["the store goes from schema 0001 to 0003"]


def test_the_newest_step_makes_what_the_app_says_its_tables_are(old_store: Store) -> None:
    migrations.upgrade(old_store.engine)
    command.check(migrations.config(old_store.engine))
    names = {each["name"] for table in ("event", "reveal") for each in inspect(old_store.engine).get_indexes(table)}
    assert {"ix_event_actor_seq", "ix_reveal_project_id_at"} <= names


def test_steps_that_lack_a_table_are_found(old_store: Store) -> None:
    """What tells that the check above can fail."""
    from alembic.util import CommandError

    migrations.upgrade(old_store.engine)
    with old_store.writing() as db:
        db.execute(text("DROP INDEX ix_event_actor_seq"))
    with pytest.raises(CommandError, match="ix_event_actor_seq"):
        command.check(migrations.config(old_store.engine))


KILLED = """
import os, signal, sys
from pathlib import Path
from sqlalchemy import event
from reward.app.migrations import upgrade
from reward.app.store import Store
store = Store(Path(sys.argv[1]), sys.argv[2])
@event.listens_for(store.engine, "after_cursor_execute")
def die(connection, cursor, statement, parameters, context, executemany):
    if "ix_reveal_project_id_at" in statement:
        os.kill(os.getpid(), signal.SIGKILL)
upgrade(store.engine)
"""


def test_a_step_that_is_killed_on_the_way_changed_nothing_and_is_done_by_the_next_start(old_store: Store) -> None:
    tables = tables_of(old_store)
    before = contents(old_store, tables)
    old_store.engine.dispose()
    url = old_store.url.render_as_string(hide_password=False)
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(old_store.folder), url], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, check=False
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert version(old_store) == "0001" and contents(old_store, tables) == before
    assert "ix_event_actor_seq" not in {each["name"] for each in inspect(old_store.engine).get_indexes("event")}
    migrations.upgrade(old_store.engine)
    assert version(old_store) == "0003" and contents(old_store, tables) == before


@pytest.mark.parametrize("kind", STORES)
def test_servers_that_start_at_once_bring_an_empty_database_to_one_schema(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'app.sqlite3'}"
    if kind == "postgresql":
        _sql(request.getfixturevalue("postgres"), "CREATE DATABASE two_at_once")
        url = request.getfixturevalue("postgres").format("two_at_once")
    code = "import sys\nfrom pathlib import Path\nfrom reward.app.store import open_store\nopen_store(Path(sys.argv[1]), sys.argv[2]).close()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    started = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), url], env=environment, stderr=subprocess.PIPE) for _ in range(3)]
    for each in started:
        _, said = each.communicate(timeout=60)
        assert each.returncode == 0, said.decode()
    store = open_store(tmp_path, url)
    assert version(store) == "0003"
    store.close()


def test_a_store_of_a_newer_app_is_refused_and_left_alone(new_store: Callable[[str], Store]) -> None:
    store = new_store("sqlite")
    with store.writing() as db:
        db.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(UserError, match="is of schema 9999"):
        migrations.upgrade(store.engine)
    assert version(store) == "9999"


def test_worse_copies_of_an_older_store_know_what_they_were_made_of(old_store: Store) -> None:
    copy = {"generator": "planted", "sampler_json": json.dumps({"fault": "blurred", "of": f"{1:064x}"})}
    given = {"project_id": "j1", "prompt_id": "a horse", "run": "planted", "verdict": "allow", "score": None, "decision": {}, "state": "live", "created_at": NOW}
    with old_store.writing() as db:
        db.execute(insert(tables_of(old_store)["clip"]), [{**given, "id": f"c{n}", "clip_id": f"{n:064x}", "row": row} for n, row in ((8, copy), (9, {}))])
    migrations.upgrade(old_store.engine)
    with old_store.reading() as db:
        assert db.execute(text("SELECT id, made_of FROM clip WHERE run = 'planted' ORDER BY id")).all() == [("c8", "c1"), ("c9", None)]

"""One writer at a time, the chain of the log, and what the database itself refuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from sqlalchemy import delete, func, insert, select, text, update
from sqlalchemy.exc import DBAPIError, OperationalError

from base_model.errors import UserError
from reward.app import log
from reward.app.schema import answer, event, metadata, person, project, signoff
from reward.app.store import Store, new_id, open_store
from tests.reward.app.conftest import add_member, add_project


def test_writers_wait_for_each_other_and_what_was_read_still_holds_when_it_is_written(each_store: Store) -> None:
    """Fifty read-then-write increments in eight threads: none is lost."""
    project_id = add_project(each_store, count=0)

    def add() -> None:
        for _ in range(50):
            with each_store.writing() as db:
                held = db.execute(select(project.c.settings).where(project.c.id == project_id)).scalar_one()["count"]
                db.execute(update(project).where(project.c.id == project_id).values(settings={"count": held + 1}))
                each_store.log(db, "system", "counted", project_id)

    threads = [threading.Thread(target=add) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    with each_store.reading() as db:
        assert db.execute(select(project.c.settings)).scalar_one() == {"count": 400}
    assert each_store.verify_log()["events"] == 400


def test_a_block_that_raises_writes_nothing_and_logs_nothing(each_store: Store) -> None:
    with pytest.raises(ZeroDivisionError), each_store.writing() as db:
        db.execute(insert(project), {"id": new_id("j"), "name": "x", "state": "open", "settings": {}, "created_at": 0})
        each_store.log(db, "system", "made", "x")
        raise ZeroDivisionError
    with each_store.reading() as db:
        assert db.execute(select(func.count()).select_from(project)).scalar() == db.execute(select(func.count()).select_from(event)).scalar() == 0


def test_a_reader_sees_one_state_while_others_write(each_store: Store) -> None:
    add_project(each_store, "first")
    with each_store.reading() as db:
        before = db.execute(select(func.count()).select_from(project)).scalar()
        add_project(each_store, "second")
        assert db.execute(select(func.count()).select_from(project)).scalar() == before == 1


def test_a_glance_sees_what_was_written_since_its_last_query_and_holds_nobody_up(each_store: Store) -> None:
    with each_store.glancing() as db:
        for number in range(3):
            assert db.execute(select(func.count()).select_from(project)).scalar() == number
            add_project(each_store, f"project {number}")


@pytest.mark.parametrize("table", [answer, event, signoff], ids=lambda table: table.name)
@pytest.mark.parametrize("verb", ["UPDATE", "DELETE"])
def test_the_database_itself_refuses_to_change_what_is_only_added_to(each_store: Store, table: object, verb: str) -> None:
    person_id, project_id = add_member(each_store, "ada", "lead"), add_project(each_store)
    rows = {
        "answer": {"id": "a_1", "project_id": project_id, "task_id": "t_1", "assignment_id": "s_1", "person_id": person_id, "version": 1, "body": {}, "at": 1},
        "event": {"seq": 9_999, "at": 1, "actor": "x", "kind": "x", "subject": "x", "body": "{}", "prev": "", "hash": "x"},
        "signoff": {"id": "o_1", "project_id": project_id, "run": "r", "approved": True, "evidence": {}, "statement": "", "person_id": person_id, "at": 1},
    }
    name = table.name  # type: ignore[attr-defined]
    with each_store.engine.connect().execution_options(rushes_writes=True) as db:
        if each_store.is_sqlite:
            db.rollback()
            db.connection.driver_connection.execute("PRAGMA foreign_keys=OFF")  # type: ignore[union-attr]
        else:
            db.execute(text("SET session_replication_role = replica"))
            db.execute(insert(metadata.tables[name]), rows[name])
            db.execute(text("SET session_replication_role = origin"))
        if each_store.is_sqlite:
            db.execute(insert(metadata.tables[name]), rows[name])
        statement = update(metadata.tables[name]).values(at=2) if verb == "UPDATE" else delete(metadata.tables[name])
        with pytest.raises(DBAPIError, match=f"{name} is only added to"):
            db.execute(statement)
        db.rollback()
        if each_store.is_sqlite:
            db.connection.driver_connection.execute("PRAGMA foreign_keys=ON")  # type: ignore[union-attr]


def test_the_anchor_grows_with_the_log_and_a_torn_last_line_is_passed_over(store: Store) -> None:
    add_member(store, "ada", "lead")
    store.close()
    anchors = log.read_anchors(store.anchor, store.secret)
    assert anchors[-1].seq == store.verify_log()["events"]
    with open(store.anchor, "a") as file:
        file.write('{"seq": 99')
    assert log.read_anchors(store.anchor, store.secret) == anchors
    with pytest.raises(UserError, match="not written by this app"):
        log.read_anchors(store.anchor, b"another secret")


def test_the_secret_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    first, second = open_store(tmp_path), open_store(tmp_path)
    assert first.secret == second.secret and len(first.secret) == 32
    assert (tmp_path / "secret").stat().st_mode & 0o77 == 0
    first.close(), second.close()


def test_a_store_of_a_newer_version_is_refused_in_one_line(store: Store) -> None:
    with store.writing() as db:
        db.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(UserError, match="schema 9999, which this version of rushes does not know"):
        open_store(store.folder)


def test_a_database_that_is_not_there_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot open the store") as raised:
        open_store(tmp_path, "postgresql+psycopg://rushes:hidden@/x?host=/nowhere")
    assert "hidden" not in str(raised.value)
    with pytest.raises(UserError, match="no store for mysql"):
        Store(tmp_path, "mysql://x")


KILLED = """
import sys
from pathlib import Path
from reward.app.store import open_store
store = open_store(Path(sys.argv[1]), sys.argv[2] or None)
k = int(sys.argv[3])
while True:
    with store.writing() as db:
        store.log(db, "system", "counted", str(k))
    print(k, flush=True)
    k += 1
"""


def test_what_was_acknowledged_before_a_kill_is_there_and_the_chain_holds(each_store: Store) -> None:
    """Five times: a process writes and says so, and is killed amid it."""
    database = "" if each_store.is_sqlite else each_store.url.render_as_string(hide_password=False)
    acknowledged = -1
    for round_ in range(5):
        process = subprocess.Popen([sys.executable, "-c", KILLED, each_store.folder, database, str(acknowledged + 1)], stdout=subprocess.PIPE, text=True, env={**os.environ})
        assert process.stdout is not None
        for _ in range(20 + 7 * round_):
            acknowledged = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        acknowledged = max([acknowledged, *(int(line) for line in process.communicate()[0].split())])
        with each_store.reading() as db:
            counted = db.execute(select(event.c.subject).order_by(event.c.seq)).scalars().all()
        assert [int(each) for each in counted][: acknowledged + 1] == list(range(acknowledged + 1))
        acknowledged = len(counted) - 1  # at most one more was written, and not yet told
        each_store.verify_log()


@pytest.mark.parametrize("again", [False, True])
def test_nothing_is_acknowledged_once_the_database_was_deleted_or_another_lies_in_its_place(tmp_path: Path, again: bool) -> None:
    store = open_store(tmp_path / "store")
    add_project(store, "first")
    for part in store.folder.glob("app.sqlite3*"):
        part.unlink()
    if again:
        open_store(tmp_path / "store").close()
    with pytest.raises(OperationalError, match="in its place" if again else "is gone"):
        add_project(store, "second")
    store.engine.dispose()


def test_deleted_text_is_overwritten_on_disk(store: Store) -> None:
    person_id = add_member(store, "unmistakable-login", "lead")
    with store.writing() as db:
        db.execute(text("DELETE FROM person_private"))
    with store.engine.connect() as db:
        db.rollback()
        db.connection.driver_connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # type: ignore[union-attr]
    with store.reading() as db:
        assert db.execute(select(person.c.id)).scalar_one() == person_id
    assert b"unmistakable-login" not in (store.folder / "app.sqlite3").read_bytes()

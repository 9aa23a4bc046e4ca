"""A backup of a store in use can be gone on with; and the log tells every way in which somebody changes it behind the app's back."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import create_engine, select, text

from base_model.errors import UserError
from recipes import cli
from reward.app import log
from reward.app.backup import MANIFEST, backup, pg_dump
from reward.app.schema import event, person_private
from reward.app.store import Store, open_store
from tests.reward.app.conftest import add_clips, add_member, add_project
from tests.reward.app.test_upkeep import until


def say(store: Store, count: int) -> None:
    for number in range(count):
        with store.writing() as db:
            store.log(db, "person-1", "said", f"s{number}", {"number": number})


# Backups


def test_a_backup_made_while_people_write_is_one_state_of_the_store_and_can_be_gone_on_with(store: Store, tmp_path: Path) -> None:
    add_member(store, "ada", "lead")
    project_id = add_project(store)
    add_clips(store, project_id, takes=2)
    ended, written = threading.Event(), [0]

    def write() -> None:
        while not ended.is_set():
            say(store, 1)
            written[0] += 1

    thread = threading.Thread(target=write)
    thread.start()
    try:
        until(lambda: written[0] >= 20)
        made = [backup(store, tmp_path / f"copy-{number}") for number in range(3)]
        before = written[0]
        until(lambda: written[0] >= before + 5)
    finally:
        ended.set()
        thread.join()
    assert made[0]["events"] < made[2]["events"] < store.verify_log()["events"]
    for number, manifest in enumerate(made):
        copy = tmp_path / f"copy-{number}"
        assert json.loads((copy / MANIFEST).read_text()) == manifest
        assert not (copy / "secret").exists()
        again = open_store(copy, secret=store.secret)
        told = again.verify_log()
        assert (told["events"], told["head"]) == (manifest["events"], manifest["head"])
        assert {path.relative_to(copy): path.read_bytes() for path in again.media.rglob("*.mp4")} == {
            path.relative_to(store.folder): path.read_bytes() for path in store.media.rglob("*.mp4")
        }
        with again.reading() as db:
            assert db.execute(select(person_private.c.login)).scalars().all() == ["ada"]
        say(again, 3)
        assert again.verify_log()["events"] == manifest["events"] + 3
        again.close()


def test_the_command_makes_a_backup_without_the_secret_says_so_and_verifies_it_with_it(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    say(store, 5)
    monkeypatch.delenv("RUSHES_APP_SECRET", raising=False)
    copy, whole = tmp_path / "copy", tmp_path / "whole"
    assert cli.main(["app", "backup", str(copy), "--out", str(store.folder)]) == 0
    assert "the secret that signs the log is not in the backup" in capsys.readouterr().err
    assert cli.main(["app", "verify-log", "--out", str(copy)]) == 2
    assert "the secret that signed the log's anchors is not in" in capsys.readouterr().err
    assert not (copy / "secret").exists()
    monkeypatch.setenv("RUSHES_APP_SECRET", (store.folder / "secret").read_text())
    assert cli.main(["app", "verify-log", "--out", str(copy), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["events"] == 5
    monkeypatch.delenv("RUSHES_APP_SECRET")
    assert cli.main(["app", "backup", str(whole), "--with_secret", "true", "--out", str(store.folder)]) == 0
    assert (whole / "secret").read_text() == (store.folder / "secret").read_text() and (whole / "secret").stat().st_mode & 0o077 == 0
    assert cli.main(["app", "verify-log", "--out", str(whole)]) == 0


def test_a_backup_overwrites_nothing_leaves_nothing_half_made_and_refuses_a_store_that_was_changed(store: Store, tmp_path: Path) -> None:
    say(store, 5)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("mine")
    with pytest.raises(UserError, match="already there"):
        backup(store, tmp_path / "there")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="already there"):
        backup(store, tmp_path / "file")
    with pytest.raises(UserError, match="cannot write the backup"):
        backup(store, tmp_path / "file" / "copy")
    with closing(sqlite3.connect(store.folder / "app.sqlite3")) as db:
        db.execute("DROP TRIGGER event_delete")
        db.execute("DELETE FROM event WHERE seq = 3")
        db.commit()
    with pytest.raises(UserError, match="event 3 is missing"):
        backup(store, tmp_path / "copy")
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("store")) == ["file", "there"]


def test_a_backup_of_an_empty_store_is_one(store: Store, tmp_path: Path) -> None:
    made = backup(store, tmp_path / "copy")
    assert (made["events"], made["media_files"]) == (0, 0)
    open_store(tmp_path / "copy", secret=store.secret).close()


def test_postgresql_is_dumped_and_comes_back(new_store: Callable[[str], Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, verify = new_store("postgresql"), log.verify
    program = pg_dump()
    if program is None:
        pytest.skip("no pg_dump is installed: apt-get install postgresql-client")
    add_member(store, "ada", "lead")
    monkeypatch.setattr(log, "verify", lambda db, anchors: (verify(db, anchors), say(store, 3))[0])
    made = backup(store, tmp_path / "copy")
    monkeypatch.undo()
    assert made["database"] == "database.dump" and made["events"] == store.verify_log()["events"] - 3, "people went on between the look at the log and the copy"
    name = f"{store.url.database}_again"
    engine = create_engine(store.url.set(database="postgres"), isolation_level="AUTOCOMMIT")
    with engine.connect() as db:
        db.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    target = store.url.set(database=name)
    restore = [str(Path(program).with_name("pg_restore")), "--no-owner", "--exit-on-error", f"--dbname={target.set(drivername='postgresql').render_as_string()}"]
    subprocess.run([*restore, str(tmp_path / "copy" / "database.dump")], check=True, capture_output=True)
    again = open_store(tmp_path / "copy", target.render_as_string(hide_password=False), secret=store.secret)
    assert again.verify_log()["events"] == made["events"]
    say(again, 2)
    assert again.verify_log()["events"] == made["events"] + 2
    again.close()


def test_without_pg_dump_one_line_says_how(new_store: Callable[[str], Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reward.app.backup.pg_dump", lambda: None)
    with pytest.raises(UserError, match=r"pg_dump is not installed.* --format=custom"):
        backup(new_store("postgresql"), tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


# The log: somebody with the database in hand


def disarmed(store: Store, *statements: str) -> None:
    """Runs SQL without the triggers that hold the log, as somebody would who has the file or the database's password."""
    with store.engine.connect() as db:
        for name in ("event_update", "event_delete"):
            db.exec_driver_sql(f"DROP TRIGGER {name}" + ("" if store.is_sqlite else " ON event"))
        for statement in statements:
            db.execute(text(statement))
        db.commit()


def flip(column: str, value: str) -> Callable[[Store], None]:
    return lambda store: disarmed(store, f"UPDATE event SET {column} = {value} WHERE seq = 7")


def rewrite(store: Store) -> None:
    """Changes an event and writes every hash behind it anew: a chain without a flaw."""
    with store.reading() as db:
        rows = db.execute(select(event).order_by(event.c.seq)).all()
    prev, statements = log.FIRST, []
    for row in rows:
        actor = "person-2" if row.seq == 7 else row.actor
        made = log.digest(row.seq, row.at, actor, row.kind, row.subject, row.body, prev)
        statements.append(f"UPDATE event SET actor = '{actor}', prev = '{prev}', hash = '{made}' WHERE seq = {row.seq}")
        prev = made
    disarmed(store, *statements)


TAMPERINGS: dict[str, tuple[Callable[[Store], None], str]] = {
    "a flipped byte of a body": (flip("body", "replace(body, '6', '7')"), r"event 7 \(said\) is not as it was written"),
    "another actor": (flip("actor", "'person-2'"), r"event 7 \(said\) is not as it was written"),
    "another time": (flip("at", "at + 1"), r"event 7 \(said\) is not as it was written"),
    "another hash": (flip("hash", f"'{'a' * 64}'"), r"event 7 \(said\) is not as it was written"),
    "a deletion": (lambda store: disarmed(store, "DELETE FROM event WHERE seq = 7"), r"event 7 is missing: the log goes on with 8"),
    "the first deleted": (lambda store: disarmed(store, "DELETE FROM event WHERE seq = 1"), r"event 1 is missing"),
    "a deletion with the gap closed": (
        lambda store: disarmed(store, "DELETE FROM event WHERE seq = 7", *(f"UPDATE event SET seq = {n - 1} WHERE seq = {n}" for n in range(8, 21))),
        r"event 7 \(said\) is not as it was written",
    ),
    "a reorder": (
        lambda store: disarmed(store, "UPDATE event SET seq = 99 WHERE seq = 7", "UPDATE event SET seq = 7 WHERE seq = 8", "UPDATE event SET seq = 8 WHERE seq = 99"),
        r"event 7 \(said\) is not as it was written",
    ),
    "a cut tail": (lambda store: disarmed(store, "DELETE FROM event WHERE seq > 15"), r"the log ends with event 15, an anchor names 20"),
    "everything deleted": (lambda store: disarmed(store, "DELETE FROM event"), r"the log ends with event 0, an anchor names 20"),
    "the whole chain written anew": (rewrite, r"event 20 is another one than the anchor says"),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_what_somebody_changes_behind_the_apps_back_is_found(each_store: Store, name: str) -> None:
    tamper, message = TAMPERINGS[name]
    say(each_store, 20)
    each_store.close()
    assert each_store.verify_log()["events"] == 20
    tamper(each_store)
    with pytest.raises(UserError, match=message):
        each_store.verify_log()


@pytest.mark.parametrize("name", ["a cut tail", "the whole chain written anew", "a deletion"])
def test_looking_at_a_changed_log_or_going_on_with_it_does_not_make_it_good(store: Store, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    tamper, _ = TAMPERINGS[name]
    say(store, 20)
    store.close()
    tamper(store)
    anchors = store.anchor.read_bytes()
    for _ in range(2):
        assert cli.main(["app", "verify-log", "--out", str(store.folder)]) == 2
        assert store.anchor.read_bytes() == anchors
    say(store, 10)
    store.close()
    with pytest.raises(UserError, match=r"another one than the anchor says|is missing"):
        store.verify_log()


def test_a_byte_that_is_flipped_in_the_file_itself_is_found(store: Store, tmp_path: Path) -> None:
    say(store, 20)
    store.close()
    content = (store.folder / "app.sqlite3").read_bytes()
    place = content.index(b'{"number":13}')
    copy = tmp_path / "copy"
    shutil.copytree(store.folder, copy)
    (copy / "app.sqlite3").write_bytes(content[: place + 10] + b"9" + content[place + 11 :])
    assert cli.main(["app", "verify-log", "--out", str(copy)]) == 2
    assert cli.main(["app", "verify-log", "--out", str(store.folder)]) == 0


def test_an_anchor_that_was_changed_forged_or_signed_by_another_secret_is_found(store: Store) -> None:
    say(store, 20)
    store.close()
    whole = store.anchor.read_text()
    last = log.read_anchors(store.anchor, store.secret)[-1]
    forged = log.Anchor(last.seq, "f" * 64, last.at)
    for lines in (whole.replace(last.hash, "e" * 64), whole + forged.line(b"another secret")):
        store.anchor.write_text(lines)
        with pytest.raises(UserError, match="was not written by this app"):
            store.verify_log()
    store.anchor.write_text(whole + forged.line(store.secret))
    with pytest.raises(UserError, match=f"two anchors differ about event {last.seq}"):
        store.verify_log()

"""Entries in shards: read as they were put, made anew where a file is damaged, never read where they are of something else, by several processes at once."""

import errno
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from base_model import checkpoint
from base_model.errors import UserError
from recipes import shards
from recipes.shards import INDEX, NAME, Shards, entry_key, missing, seal, stamp

ABOUT = {"codec": "c1"}


def key(name: object) -> str:
    return entry_key({"name": name})


def filled(folder: Path, names: str = "abc", about: dict[str, str] = ABOUT) -> Shards:
    """One shard an entry."""
    kept = Shards(folder, about)
    for name in names:
        kept.put(key(name), {"x": torch.full((3, 2), float(ord(name)))})
        kept.flush()
    kept.save_index()
    return kept


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if NAME.fullmatch(path.name))


def file_of(kept: Shards, name: str) -> Path:
    return kept.folder / kept._held[key(name)]


def flip(path: Path) -> None:
    """One bit of the last byte, without a change of size."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def test_entries_come_back_to_the_bit_in_every_type_and_shape(tmp_path: Path) -> None:
    torch.manual_seed(0)
    entries = {
        key(1): {"latents": torch.randn(3, 2, 4, 5)},
        key(2): {"text": torch.randn(4, 6).bfloat16(), "mask": torch.tensor([True, False, True]), "pooled": torch.randn(2)},
        key(3): {"text": torch.zeros(0, 6), "mask": torch.zeros(5, dtype=torch.bool)},
        key(4): {"view": torch.randn(4, 6).T[1:3]},
    }
    kept = Shards(tmp_path, ABOUT)
    for name, entry in entries.items():
        assert name not in kept
        kept.put(name, entry)
    before = {name: kept.get(name) for name in entries}
    kept.flush()
    for found in (before, {name: kept.get(name) for name in entries}, {name: Shards(tmp_path, ABOUT).get(name) for name in entries}):
        for name, entry in entries.items():
            assert found[name].keys() == entry.keys()
            assert all(found[name][part].dtype == value.dtype and torch.equal(found[name][part], value) for part, value in entry.items())
    assert missing(kept, [key(1), key(9), key(9)]) == [key(9)] and len(files(tmp_path)) == 1


def test_many_entries_share_a_shard_and_a_shard_has_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 10 * 4 * 25)
    kept = Shards(tmp_path, ABOUT)
    for k in range(35):
        kept.put(key(k), {"x": torch.full((25,), float(k))})
    kept.flush()
    assert len(files(tmp_path)) == 4
    again = Shards(tmp_path, ABOUT)
    assert [float(again.get(key(k))["x"][0]) for k in range(35)] == list(range(35))


def test_what_was_made_is_written_after_a_minute_at_the_latest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(shards.time, "monotonic", lambda: now)
    kept = Shards(tmp_path, ABOUT)
    for now in (0.0, 30.0, 61.0, 70.0):
        kept.put(key(now), {"x": torch.zeros(1)})
    assert len(files(tmp_path)) == 1 and len(Shards(tmp_path, ABOUT)._held) == 2


def test_entries_of_something_else_are_counted_and_never_read(tmp_path: Path) -> None:
    filled(tmp_path, "ab", {"codec": "old"})
    kept = filled(tmp_path, "a")
    assert kept.stale == 2 and key("b") not in kept and float(kept.get(key("a"))["x"][0, 0]) == ord("a")
    with pytest.raises(KeyError):
        kept.get(key("b"))
    assert Shards(tmp_path, {"codec": "old"}).stale == 1


@pytest.mark.parametrize("damage", [flip, lambda path: path.write_bytes(path.read_bytes()[:-7]), lambda path: path.write_bytes(b"")])
def test_a_damaged_shard_is_named_and_deleted_and_the_others_stay(damage: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SETTLED_NS", 0)  # so that the index is believed
    hurt = file_of(filled(tmp_path), "b")
    damage(hurt)  # type: ignore[operator]
    again = Shards(tmp_path, ABOUT)
    assert again.damaged == [hurt.name] and not hurt.exists()
    assert missing(again, map(key, "abc")) == [key("b")] and float(again.get(key("c"))["x"][0, 0]) == ord("c")
    again.put(key("b"), {"x": torch.full((3, 2), float(ord("b")))})
    again.flush()
    assert hurt.exists() and Shards(tmp_path, ABOUT).damaged == []


def test_a_shard_that_is_damaged_or_deleted_while_it_is_in_use_is_never_read(tmp_path: Path) -> None:
    kept = filled(tmp_path)
    hurt, gone = file_of(kept, "b"), file_of(kept, "c")
    flip(hurt)
    gone.unlink()
    for name, path in (("b", hurt), ("c", gone)):
        with pytest.raises(UserError, match=f"damaged or missing, .*{path.name}.*Run the same command again") as error:
            kept.get(key(name))
        assert "\n" not in str(error.value) and key(name) not in kept
    assert float(kept.get(key("a"))["x"][0, 0]) == ord("a")


def test_files_that_have_not_changed_are_not_hashed_again_but_with_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SETTLED_NS", 0)
    filled(tmp_path)
    hashed: list[str] = []
    look = Shards._hashed
    monkeypatch.setattr(Shards, "_hashed", lambda self, name: (hashed.append(name), look(self, name))[1])
    assert len(Shards(tmp_path, ABOUT)._held) == 3 and not hashed
    assert len(Shards(tmp_path, ABOUT, verify=True)._held) == 3 and len(hashed) == 3
    hashed.clear()
    os.utime(files(tmp_path)[1])
    Shards(tmp_path, ABOUT)
    assert hashed == [files(tmp_path)[1].name]


@pytest.mark.parametrize("content", [None, b"", b"PAR1 nothing PAR1"])
def test_without_an_index_files_are_read_themselves(content: bytes | None, tmp_path: Path) -> None:
    filled(tmp_path)
    (tmp_path / INDEX).unlink()
    if content is not None:
        (tmp_path / INDEX).write_bytes(content)
    assert len(Shards(tmp_path, ABOUT)._held) == 3


def test_an_index_is_not_believed_of_a_file_that_changed_a_moment_ago(tmp_path: Path) -> None:
    """It might change again within one tick of the file system's clock."""
    kept = filled(tmp_path)
    assert kept._index() == {}


def test_a_full_disk_is_known_before_an_entry_is_made_and_what_was_made_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Shards(tmp_path, ABOUT)
    kept.make_room(1000)
    kept.put(key("a"), {"x": torch.zeros(4)})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=shards.ROOM + 1000))
    with pytest.raises(UserError, match=r"the disk is full.*run the same command again"):
        kept.make_room(1000)
    assert key("a") in Shards(tmp_path, ABOUT)


def test_a_disk_that_is_full_while_a_shard_is_written_leaves_what_was_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = filled(tmp_path, "a")

    def full(path: Path, content: bytes) -> None:
        path.write_bytes(content[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_synced", full)
    kept.put(key("b"), {"x": torch.zeros(4)})
    with pytest.raises(UserError, match="the disk is full"):
        kept.flush()
    monkeypatch.undo()
    again = Shards(tmp_path, ABOUT)
    assert missing(again, map(key, "ab")) == [key("b")] and sorted(os.listdir(tmp_path)) == sorted([INDEX, *(path.name for path in files(tmp_path))])


def test_what_killed_processes_left_behind_is_cleaned_up_and_what_others_write_is_not(tmp_path: Path) -> None:
    filled(tmp_path)
    old, new = tmp_path / ".a.safetensors.1.partial", tmp_path / ".b.safetensors.2.partial"
    old.write_bytes(b"x")
    new.write_bytes(b"x")
    os.utime(old, (0, 0))
    (tmp_path / "mine.safetensors").write_bytes(b"x")
    Shards(tmp_path, ABOUT)
    assert not old.exists() and new.exists() and (tmp_path / "mine.safetensors").exists()


def test_more_shards_than_may_be_open_are_read_by_several_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "OPEN_FILES", 2)
    kept, wrong = filled(tmp_path, "abcdef"), list[str]()

    def read() -> None:
        for name in "abcdef" * 20:
            if float(kept.get(key(name))["x"].sum()) != 6 * ord(name):
                wrong.append(name)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(kept._files) == 2


WRITER = """
import sys, torch
from pathlib import Path
from recipes import shards
shards.SHARD_BYTES = 400
kept = shards.Shards(Path(sys.argv[1]), {"codec": "c1"})
for k in range(int(sys.argv[2]), int(sys.argv[3])):
    kept.put(shards.entry_key({"name": k}), {"x": torch.full((10,), float(k))})
kept.flush()
kept.save_index()
"""


def test_several_processes_write_into_one_folder(tmp_path: Path) -> None:
    spans = (("0", "40"), ("20", "60"))
    running = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), *span], env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}) for span in spans]
    assert [process.wait() for process in running] == [0, 0]
    kept = Shards(tmp_path, ABOUT)
    assert kept.damaged == [] and [float(kept.get(key(k))["x"][0]) for k in range(60)] == list(range(60))


def test_a_place_that_cannot_be_written_is_known_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file, not a folder"):
        Shards(tmp_path / "file" / "cache", ABOUT)


def test_a_stamp_changes_with_the_bytes_and_is_believed_later_only_once_the_file_has_settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"1")
    assert seal(path) == ""
    monkeypatch.setattr(shards, "SETTLED_NS", 0)
    first = seal(path)
    assert first and first == stamp(path)
    path.write_bytes(b"22")
    assert stamp(path) != first

"""The table of scores: no row that was added is lost, whatever ends the process, and each is there once."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from base_model.errors import UserError
from base_model.video.curate import MEASURES
from recipes import clip_table
from recipes.clip_table import Table, read_table

ABOUT = {"measures": "1"}


def row(key: int, **more: Any) -> dict[str, Any]:
    return {"key": key, "id": f"clip {key}", "file": f"{key}.mp4", "text": "\u05d7\u05ea\u05d5\u05dc", "error": "", "extra": {"n": key}, **more}


def measured(key: int) -> dict[str, Any]:
    scores = {name: math.nan if name == "motion" else float(key) for name in MEASURES}
    return row(key, scores=scores, hashes=["00" * 16, ""], thumbnails=[base64.b64encode(b"jpeg").decode()], sha256="ab" * 32, bytes=10, width=8, height=6)


def add(table: Table, *keys: int) -> None:
    for key in keys:
        table.add(measured(key))


def killed(folder: Path, about: dict[str, str], *keys: int) -> None:
    """Adds rows and comes to no end: what is on the disk is what a kill leaves."""
    table = Table(folder, about)
    add(table, *keys)
    table.close()


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_table, "ROWS", 4)


def ids(table: Table, keys: list[int]) -> list[str]:
    found: list[str] = table.read(keys)["id"].to_pylist()
    return found


def test_rows_come_back_as_they_went_in_and_in_the_order_that_is_asked_for(tmp_path: Path) -> None:
    table = Table(tmp_path, ABOUT)
    add(table, 5, 2**64 - 1, 3, 9, 1)
    assert ids(table, [1, 2**64 - 1, 5, 5]) == ["clip 1", f"clip {2**64 - 1}", "clip 5", "clip 5"]
    (found,) = table.read([3], without=()).to_pylist()
    assert found["text"] == "\u05d7\u05ea\u05d5\u05dc" and json.loads(found["extra"]) == {"n": 3} and found["thumbnails"] == [b"jpeg"] and found["hashes"] == ["00" * 16, ""]
    assert math.isnan(found["motion"]) and found["cuts"] == 3.0 and found["agreement"] is None and found["faces"] is None
    assert len(list(tmp_path.glob("*.parquet"))) == 2
    with pytest.raises(KeyError):
        table.read([7])


@pytest.mark.parametrize("number", range(1, 10))
def test_what_was_added_before_a_kill_is_there_after_it(number: int, tmp_path: Path) -> None:
    killed(tmp_path, ABOUT, *range(1, number + 1))
    table = Table(tmp_path, ABOUT)
    assert len(table) == number and all(key in table for key in range(1, number + 1)) and number + 1 not in table
    add(table, number + 1)
    assert ids(table, list(range(1, number + 2))) == [f"clip {key}" for key in range(1, number + 2)]
    assert read_table(tmp_path).num_rows == number + 1 and not list(tmp_path.glob("*.jsonl"))


def test_a_line_that_was_cut_off_is_of_a_row_that_is_not_there(tmp_path: Path) -> None:
    killed(tmp_path, ABOUT, 1, 2)
    (journal,) = tmp_path.glob("*.jsonl")
    whole = journal.read_bytes()
    for end in range(len(whole) - 1, 0, -97):
        journal.write_bytes(whole[:end])
        for part in tmp_path.glob("*.parquet"):
            part.unlink()
        table = Table(tmp_path, ABOUT)
        assert 2 not in table and (1 in table) == (whole[:end].count(b"\n") == 2)
        journal.write_bytes(whole)


def test_a_kill_between_a_part_and_the_end_of_its_journal_doubles_nothing(tmp_path: Path) -> None:
    table = Table(tmp_path, ABOUT)
    add(table, 1, 2, 3)
    (journal,) = tmp_path.glob("*.jsonl")
    kept = journal.read_bytes()
    table.flush()
    journal.write_bytes(kept)
    assert len(Table(tmp_path, ABOUT)) == 3 and read_table(tmp_path).num_rows == 3 and not journal.exists()


def test_rows_that_lack_what_is_wanted_now_are_not_there_and_richer_ones_are(tmp_path: Path) -> None:
    poor, rich = Table(tmp_path, ABOUT), {**ABOUT, "safety": "flash 2"}
    add(poor, 1, 2)
    poor.flush()
    table = Table(tmp_path, rich)
    assert 1 not in table
    table.add(measured(1) | {"safety": "allow"})
    table.flush()
    assert table.read([1])["safety"].to_pylist() == ["allow"]
    assert all(key in Table(tmp_path, ABOUT) for key in (1, 2)) and Table(tmp_path, ABOUT).read([1, 2])["safety"].to_pylist() == ["allow", None]
    assert len(Table(tmp_path, {**rich, "safety": "flash 3"})) == len(Table(tmp_path, {"measures": "2"})) == 0


def test_rows_with_an_error_are_found_again_where_that_is_asked_for_and_the_later_counts(tmp_path: Path) -> None:
    table = Table(tmp_path, ABOUT)
    add(table, 1)
    table.add(row(2, error="the connection failed"))
    table.flush()
    assert 2 in Table(tmp_path, ABOUT)
    again = Table(tmp_path, ABOUT, again=True)
    assert 1 in again and 2 not in again
    add(again, 2)
    assert again.read([1, 2])["error"].to_pylist() == ["", ""]


def test_pictures_that_must_not_be_shown_leave_every_part(tmp_path: Path) -> None:
    killed(tmp_path, {**ABOUT, "safety": "other"}, 1, 2)
    table = Table(tmp_path, ABOUT)
    add(table, 3, 4, 5)
    table.forget([2, 4])
    found = read_table(tmp_path)
    assert dict(zip(found["key"].to_pylist(), map(bool, found["thumbnails"].to_pylist()), strict=True)) == {1: True, 2: False, 3: True, 4: False, 5: True}
    assert found["hashes"].to_pylist() == [["00" * 16, ""]] * 5
    assert len(Table(tmp_path, ABOUT)) == 5


def test_a_full_disk_leaves_no_half_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(tmp_path, ABOUT)
    add(table, 1)

    class Full:
        def __init__(self, file: Any) -> None:
            self._file, self._room = file, 20

        def write(self, data: Any) -> int:
            if not self._room:
                raise OSError(28, "No space left on device")
            wrote = int(self._file.write(data[: self._room]))
            self._room -= wrote
            return wrote

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    monkeypatch.setattr(table, "_journal", Full(table._journal))
    with pytest.raises(UserError, match="the disk is full"):
        add(table, 2)
    assert 2 not in table
    table.close()
    after = Table(tmp_path, ABOUT)
    assert 1 in after and 2 not in after and ids(after, [1]) == ["clip 1"]


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    (tmp_path / "00000.parquet").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"a damaged part of the table, .*00000\.parquet.*Delete it"):
        Table(tmp_path, ABOUT)
    with pytest.raises(UserError, match=r"no table of scores, .*nothing\. Make it with rushes curate"):
        read_table(tmp_path / "nothing")


def test_every_measure_has_a_column() -> None:
    names: Mapping[str, Any] = dict.fromkeys(clip_table.schema().names)
    assert set(MEASURES) <= set(names) and len(names) == len(clip_table.schema().names)

"""Rows of manifests: each that is there comes, and what is wrong with one says nothing of the next."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from base_model.errors import UserError
from recipes import manifests
from recipes.manifests import Row, csv_rows, json_array, json_lines, kind_of, parquet_rows


def buffered(content: bytes) -> io.BufferedReader:
    return io.BufferedReader(io.BytesIO(content))  # type: ignore[arg-type]


def test_a_malformed_line_is_a_row_with_an_error_between_its_neighbours() -> None:
    rows = list(json_lines(buffered(b'\xef\xbb\xbf{"id": "a"}\n\nno JSON\n[1]\n' + b"[" * 100_000 + b'\n{"id": "b"}'), "c.jsonl"))
    assert [row.where for row in rows] == [f"line {number} of c.jsonl" for number in (1, 3, 4, 5, 6)]
    assert [row.error for row in rows] == ["", *["not a JSON object"] * 3, ""]
    assert rows[0].values == {"id": "a"} and rows[-1].values == {"id": "b"}


def test_a_line_longer_than_anything_is_passed_over_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "LONGEST_ROW", 1000)
    rows = list(json_lines(buffered(json.dumps({"text": "a" * 5000}).encode() + b'\n{"id": "b"}\n'), "c.jsonl"))
    assert "longer than" in rows[0].error and rows[1].values == {"id": "b"} and len(rows) == 2


@pytest.mark.parametrize("chunk", [7, 64, 1 << 20])
def test_an_array_is_read_object_by_object_whatever_its_pieces(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "CHUNK", chunk)
    values = [{"id": str(k), "text": "\u05e9\u05dc\u05d5\u05dd [},{" * k, "n": [k, {"x": 1.5e3}]} for k in range(20)]
    for indent in (None, 2):
        rows = list(json_array(buffered(json.dumps(values, indent=indent, ensure_ascii=False).encode()), "c.json"))
        assert [row.values for row in rows] == values and not any(row.error for row in rows)
    assert list(json_array(buffered(b" [] "), "c.json")) == []


def test_an_array_that_breaks_off_keeps_what_came_before_and_says_where() -> None:
    rows = list(json_array(buffered(b'[{"id": "a"}, 7, {"id": "b"'), "c.json"))
    assert [(row.values, row.error) for row in rows[:2]] == [({"id": "a"}, ""), ({}, "not a JSON object")]
    assert rows[2] == Row({}, "object 3 of c.json", "not JSON from here on: nothing behind it can be read") and len(rows) == 3


def test_a_json_file_of_lines_is_read_as_lines() -> None:
    assert [row.values for row in json_array(buffered(b'{"id": 1}\n{"id": 2}\n'), "c.json")] == [{"id": 1}, {"id": 2}]


def test_what_a_table_had_not_is_nothing_in_a_csv() -> None:
    rows = list(csv_rows(buffered(b"path,text\na.mp4,NaN\nb.mp4,\nc.mp4,nan\nd.mp4,Nan Goldin\n"), "c.csv"))
    assert [row.values["text"] for row in rows] == [None, None, None, "Nan Goldin"] and not any(row.error for row in rows)


def test_a_ragged_or_badly_quoted_row_is_told_and_the_next_is_read() -> None:
    rows = list(csv_rows(buffered(b'path,text\na.mp4,x,y\nb.mp4\n"c.mp4"d,x\n\ne.mp4,"x, ""y"""\n'), "c.csv"))
    assert [row.error for row in rows[:2]] == ["3 cells where the first line has 2", "1 cells where the first line has 2"]
    assert rows[2].error.startswith("not CSV") and rows[3] == Row({"path": "e.mp4", "text": 'x, "y"'}, "row 4 of c.csv")


def test_a_csv_caption_of_two_million_characters_is_whole() -> None:
    (row,) = csv_rows(buffered(b"path,text\na.mp4," + b"x" * 2_000_000), "c.csv")
    assert len(row.values["text"]) == 2_000_000
    (row,) = csv_rows(buffered(b"path\ttext\na.mp4\tx,y"), "c.tsv")
    assert row.values["text"] == "x,y"


def test_a_csv_without_a_first_line_is_an_error() -> None:
    with pytest.raises(UserError, match=r"no first line with the names of columns, c.csv\. Write one"):
        list(csv_rows(buffered(b""), "c.csv"))


def test_parquet_rows_come_as_they_are_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"path": ["a.mp4", None], "text": pa.array([math.nan, 1.0])}), tmp_path / "c.parquet")
    rows = list(parquet_rows(tmp_path / "c.parquet", "c.parquet"))
    assert rows[0].values["path"] == "a.mp4" and math.isnan(rows[0].values["text"]) and rows[1] == Row({"path": None, "text": 1.0}, "row 2 of c.parquet")
    (tmp_path / "d.parquet").write_bytes(b"PAR1 no table PAR1")
    with pytest.raises(UserError, match=r"not a parquet file that can be read, after row 0, d\.parquet"):
        list(parquet_rows(tmp_path / "d.parquet", "d.parquet"))


def test_manifests_are_known_by_their_endings() -> None:
    names = {"a.jsonl": "lines", "a.NDJSON": "lines", "a.json": "array", "a.csv": "csv", "a.tsv": "csv", "a.parquet": "parquet", "a.txt": None, "a": None}
    assert {name: kind_of(name) for name in names} == names

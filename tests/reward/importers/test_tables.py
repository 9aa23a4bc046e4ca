"""Files that are no tables are refused in one line; the ways a table may be written make no difference."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from base_model.errors import UserError
from reward.importers.formats import FORMATS
from reward.importers.tables import Record, columns, csv_rows, typed_rows

FIXTURES = Path(__file__).parents[1] / "fixtures"
CSV = (FIXTURES / "videogen-rewardbench.csv").read_bytes()
TRL = (FIXTURES / "trl.jsonl").read_bytes()


def read(name: str, content: bytes, folder: Path) -> object:
    path = folder / "labels"
    path.write_bytes(content)
    return FORMATS[name].read(path)


@pytest.mark.parametrize("change", [lambda c: b"\xef\xbb\xbf" + c, lambda c: c.replace(b"\n", b"\r\n"), lambda c: c.replace(b"\n", b"\n\n"), lambda c: c.rstrip(b"\n")])
def test_marks_line_ends_and_empty_lines_make_no_difference(change: object, tmp_path: Path) -> None:
    assert read("videogen-rewardbench", change(CSV), tmp_path) == read("videogen-rewardbench", CSV, tmp_path)  # type: ignore[operator]
    assert read("trl", change(TRL), tmp_path) == read("trl", TRL, tmp_path)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("videoalign", b"", "the file is empty"),
        ("videoalign", b"\n\n", "column MQ is missing"),
        ("videogen-rewardbench", CSV.partition(b"\n")[0], "no rows"),
        ("videogen-rewardbench", CSV.replace("ä".encode(), "ä".encode("latin-1")), "not UTF-8 at byte 3"),
        ("videogen-rewardbench", CSV.replace(b",A_model,", b",path_A,"), "two columns are called 'path_A'"),
        ("videogen-rewardbench", CSV + b"a,b\n", "2 cells where the header has 13, row 5"),
        ("videogen-rewardbench", CSV + b'"open', "not CSV: unexpected end of data"),
        ("videogen-rewardbench", CSV.replace(b'walks."', b'walks."x', 1), "not CSV"),
        ("videogen-rewardbench", CSV.replace(b",same,B,A,24.0", b",similar,B,A,24.0"), "MQ is 'similar', expected one of A, B, same, row 1"),
        ("videogen-rewardbench", CSV.replace(b"24.0,126,", b"24.0,126.5,"), "num_frames_A is '126.5', expected a whole number from 0 to 10000000, row 1"),
        ("videogen-rewardbench", CSV.replace(b"24.0,126,", b"nan,126,"), "fps_A is 'nan', expected a finite number from 0 to 1000, row 1"),
        ("videogen-rewardbench", CSV.replace(b"24.0,126,", b"2_4,126,"), "fps_A is '2_4', expected a finite number"),
        ("videogen-rewardbench", CSV.replace(b"videos/kling_1.mp4", b" "), "path_A is empty, row 3"),
        ("trl", b"", "the file is empty"),
        ("trl", b"[]", "no rows"),
        ("trl", b" \n ", "no rows"),
        ("trl", b"[1]", "1 where a row belongs, row 1"),
        ("trl", b'{"prompt": "p", "prompt": "q", "chosen": "a", "rejected": "b"}', "a key is given twice"),
        ("trl", b'{"prompt": "p", "chosen": "a", "rejected": "\\ud800"}', "rejected is '.ud800', expected whole characters, row 1"),
        ("trl", b"[" * 100_000, "nested too deeply"),
        ("trl", b'{"prompt": ' + b"9" * 5000 + b"}", "not JSON"),
        ("trl", TRL.replace(b"}", b"", 1), "not JSON: .*, row 1"),
        ("trl", gzip.compress(TRL)[:-9], "not a whole gzip file"),
        ("trl", gzip.compress(TRL) + b"x", "not a whole gzip file"),
        ("trl", b"PAR1 is not enough", "not a parquet file"),
        ("trl", TRL.replace("葉".encode(), b"\xe9"), "not UTF-8"),
    ],
)
def test_what_is_no_table_is_refused_in_one_line(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(name, content, tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path / "labels") in str(caught.value)


@pytest.mark.parametrize("name", ["videoalign", "trl"])
def test_a_file_that_cannot_be_opened_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match="cannot read"):
            FORMATS[name].read(path)


def test_line_separators_inside_json_are_no_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text(json.dumps({"a": "x\u2028y\x85z"}, ensure_ascii=False) + "\n")
    assert [record.text("a") for record in typed_rows(path, columns("a"), set())] == ["x\u2028y\x85z"]


def test_columns_that_are_of_no_use_are_not_read_from_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"a": ["x"], "picture": [b"big"], "new": [1]}), tmp_path / "t.parquet")
    unknown: set[str] = set()
    (record,) = typed_rows(tmp_path / "t.parquet", columns("a", "", "picture"), unknown)
    assert record.values == {"a": "x"} and unknown == {"new"}


def test_cells_are_handed_out_as_what_they_must_be() -> None:
    record = Record({"n": 3, "f": 2.5, "yes": True, "t": "x", "none": None, "nan": float("nan"), "big": 10**400, "list": [1]}, "row 1, f")
    assert (record.number("n"), record.whole("n", 0, 9), record.flag("yes"), record.text("t"), record.key("n"), record.several("list")) == (3.0, 3, True, "x", "3", [1])
    assert record.number("nan") is None and record.text("none") == "" and record.flag("none") is None and record.several("none") == []
    for broken in (
        *(lambda: record.number("yes"), lambda: record.number("big"), lambda: record.number("t"), lambda: record.whole("f", 0, 9), lambda: record.whole("n", 0, 2)),
        *(lambda: record.flag("n"), lambda: record.text("n"), lambda: record.key("yes"), lambda: record.key("big"), lambda: record.several("t"), lambda: record.needed("none")),
        *(lambda: record.one_of("t", {"y": 1}), lambda: record.one_of("n", {"3": 1}), lambda: record.part("t", columns("a"), set()), lambda: record.number("n", 4, 5)),
    ):
        with pytest.raises(UserError, match="row 1, f"):
            broken()
    written = Record({"n": "3.0", "e": "", "bad": "١"}, "row 1, f", written=True)
    assert written.whole("n", 0, 9) == 3 and written.number("e") is None
    with pytest.raises(UserError, match="bad is"):
        written.number("bad")


def test_an_empty_column_name_is_reported(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(",a\n0,x\n")
    unknown: set[str] = set()
    assert [record.text("a") for record in csv_rows(tmp_path / "t.csv", columns("a"), unknown)] == ["x"] and unknown == {"(no name)"}

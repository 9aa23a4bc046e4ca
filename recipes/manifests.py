"""Rows of manifests of clips, one at a time: JSON lines, a JSON array, CSV or TSV, parquet. Read by `clip_sources.py`, no command.

A row that cannot be read is a row with an error; the rows behind it go on. What is in memory is a row, of parquet a few.
What it does not know: what columns mean.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

from base_model.errors import UserError
from reward.parquet import batches, open_parquet, rows_of

LONGEST_ROW = 16 << 20  # bytes of a line, characters of a field
ROWS_AT_ONCE = 32  # of a parquet file, which may hold whole clips
CHUNK = 1 << 20
BETWEEN = re.compile(r"[ \t\r\n,]*")
NOTHING = frozenset(("", "nan", "null", "none", "<na>", "n/a"))
"""What stands in a CSV where a table had nothing."""

KINDS = {".jsonl": "lines", ".ndjson": "lines", ".json": "array", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


class Row(NamedTuple):
    """What a row says by its columns, and what is wrong with it."""

    values: Mapping[str, Any]
    where: str  # "line 7 of clips.jsonl"
    error: str = ""


def kind_of(name: str) -> str | None:
    """What kind of manifest a file of that name is; None where it is none."""
    return KINDS.get(Path(name).suffix.lower())


def json_lines(file: BufferedReader, name: str) -> Iterator[Row]:
    """One object a line."""
    number = 0
    while line := file.readline(LONGEST_ROW + 1):
        number += 1
        where = f"line {number} of {name}"
        if len(line) > LONGEST_ROW:
            _skip_line(file, line)
            yield Row({}, where, f"the line is longer than {LONGEST_ROW >> 20} MiB")
        elif line.strip():
            yield json_row(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, where)


def _skip_line(file: BufferedReader, begun: bytes) -> None:
    while begun and not begun.endswith(b"\n"):
        begun = file.readline(CHUNK)


def json_row(line: bytes, where: str) -> Row:
    """An object; bytes that are no UTF-8 are kept as surrogates, for whoever needs the text."""
    try:
        value = json.loads(line.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return Row({}, where, "not a JSON object")
    return _row(value, where)


def _row(value: Any, where: str) -> Row:
    return Row(value, where) if isinstance(value, dict) else Row({}, where, "not a JSON object")


def json_array(file: BufferedReader, name: str) -> Iterator[Row]:
    """The objects of one array; a file that does not begin with one is read as lines. Behind a place that is no JSON nothing can be told: that is a row too."""
    if not file.peek(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from json_lines(file, name)
        return
    with io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        yield from _objects(text, name)


def _objects(text: io.TextIOWrapper, name: str) -> Iterator[Row]:
    decoder, held, begin, number, more = json.JSONDecoder(), text.read(CHUNK), 0, 0, True
    begin = held.index("[") + 1
    while True:
        begin = BETWEEN.match(held, begin).end()  # type: ignore[union-attr]
        if held.startswith("]", begin):
            return
        where = f"object {number + 1} of {name}"
        try:
            value, end = decoder.raw_decode(held, begin)
        except (ValueError, RecursionError):
            value, end = None, 0
        if end and (end < len(held) or not more):
            number, begin = number + 1, end
            yield _row(value, where)
        elif not more or len(held) - begin > LONGEST_ROW:
            yield Row({}, where, "not JSON from here on: nothing behind it can be read")
            return
        else:
            further = text.read(CHUNK)
            held, begin, more = held[begin:] + further, 0, bool(further)


def csv_rows(file: BufferedReader, name: str) -> Iterator[Row]:
    """Rows by the names of the first line; a cell that says nothing (nan, empty) is None. Raises UserError where there is no first line."""
    before = csv.field_size_limit(LONGEST_ROW)  # of all readers of this process
    try:
        with io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
            yield from _records(csv.reader(text, delimiter="\t" if name.lower().endswith(".tsv") else ",", strict=True), name)
    finally:
        csv.field_size_limit(before)


def _records(reader: Any, name: str) -> Iterator[Row]:
    header, number = next(reader, None), 0
    if not header:
        raise UserError(f"no first line with the names of columns, {name}. Write one")
    while True:
        number += 1
        where = f"row {number} of {name}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield Row({}, where, f"not CSV: {error}")
            continue
        if cells is None:
            return
        if not cells:
            number -= 1  # an empty line is no row
            continue
        values = dict(zip(header, (None if cell.strip().lower() in NOTHING else cell for cell in cells), strict=False))
        yield Row(values, where, "" if len(cells) == len(header) else f"{len(cells)} cells where the first line has {len(header)}")


def parquet_rows(path: Path, name: str) -> Iterator[Row]:
    """Raises UserError where it is no parquet file that can be read; behind the rows that could be."""
    import pyarrow as pa

    number = 0
    try:
        with open_parquet(path) as file:
            for batch in batches(file, rows=ROWS_AT_ONCE):
                for values in rows_of(batch):
                    number += 1
                    yield Row(values, f"row {number} of {name}")
    except (OSError, ValueError, ArithmeticError, MemoryError, pa.ArrowException) as error:
        raise UserError(f"not a parquet file that can be read, after row {number}, {name}: {' '.join(str(error).split())[:200]}. Download it again") from error


READERS: Mapping[str, Callable[[BufferedReader, str], Iterator[Row]]] = {"lines": json_lines, "array": json_array, "csv": csv_rows}
"""How a kind of manifest is read from a stream; parquet needs a file."""

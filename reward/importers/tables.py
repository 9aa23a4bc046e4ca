"""Rows out of the files that datasets ship: CSV, and JSON, JSON lines (both also gzipped) or parquet, which are told apart by content.

A row is a `Record`: values that are only handed out as what they must be. Anything else is a UserError of one line that names the column, the row and the
file. Rows are numbered from 1, a header is no row. A value is missing where it is null, not a number, or a blank text.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from base_model.errors import UserError
from reward.parquet import batches, open_parquet, rows_of

T = TypeVar("T")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
ADVICE = "Mend or remove that row"
ROWS_AT_ONCE = 32  # of a parquet file, which may hold whole videos
LONGEST_TEXT = 1_000_000  # characters
MOST_UNPACKED = 1 << 30  # bytes of a gzipped file


class Columns(NamedTuple):
    """The columns a format has. What is in neither set is unknown, and reported."""

    required: frozenset[str]
    optional: frozenset[str] = frozenset()
    unread: frozenset[str] = frozenset()  # known, of no use here


def columns(required: str, optional: str = "", unread: str = "") -> Columns:
    """Columns from names parted by commas: names may hold spaces."""
    return Columns(*(frozenset(name.strip() for name in names.split(",") if name.strip()) for names in (required, optional, unread)))


@dataclass(frozen=True)
class Record:
    """One row, or a part of one."""

    values: Mapping[str, Any]
    place: str  # "row 7, labels.csv"
    prefix: str = ""  # "video_0." for a part
    written: bool = False  # every value is text, as in CSV

    def value(self, name: str) -> Any:
        """Whatever stands there; None where it is missing."""
        value = self.values.get(name)
        blank = isinstance(value, str) and not value.strip()
        return None if blank or (isinstance(value, float) and math.isnan(value)) else value

    def text(self, name: str) -> str:
        """A text, "" where it is missing."""
        value = self.value(name)
        if value is None:
            return ""
        if not isinstance(value, str) or len(value) > LONGEST_TEXT:
            raise self.wrong(name, f"a text of at most {LONGEST_TEXT:,} characters" if isinstance(value, str) else "a text")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise self.wrong(name, "whole characters") from error
        return value

    def needed(self, name: str) -> str:
        """A text that may not be missing."""
        value = self.text(name)
        if not value:
            raise UserError(f"{self.prefix}{name} is empty, {self.place}. {ADVICE}")
        return value

    def key(self, name: str) -> str:
        """A text or whole number that names something, as text; "" where it is missing."""
        value = self.value(name)
        return str(value) if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63 else self.text(name)

    def needed_key(self, name: str) -> str:
        """The same, which may not be missing."""
        return self.key(name) or self.needed(name)

    def number(self, name: str, low: float = -math.inf, high: float = math.inf) -> float | None:
        """A finite number in [low,high]."""
        value = self.value(name)
        if value is None:
            return None
        expected = "a finite number" + (f" from {low:g} to {high:g}" if math.isfinite(low) and math.isfinite(high) else "")
        if self.written:
            if not NUMBER.fullmatch(value):
                raise self.wrong(name, expected)
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300 or not low <= value <= high:
            raise self.wrong(name, expected)
        return float(value)

    def whole(self, name: str, low: int, high: int) -> int | None:
        """A whole number in [low,high], also written 7.0."""
        value = self.number(name)
        if value is not None and (value != int(value) or not low <= value <= high):
            raise self.wrong(name, f"a whole number from {low} to {high}")
        return None if value is None else int(value)

    def flag(self, name: str) -> bool | None:
        """True or false."""
        value = self.value(name)
        if not isinstance(value, bool | None):
            raise self.wrong(name, "true or false")
        return value

    def one_of(self, name: str, meaning: Mapping[str, T]) -> T | None:
        """What a label means."""
        value = self.value(name)
        if value is None:
            return None
        if not isinstance(value, str) or value not in meaning:
            raise self.wrong(name, f"one of {', '.join(meaning)}")
        return meaning[value]

    def moment(self, name: str) -> str:
        """A time as text; parquet has them as such. "" where it is missing."""
        value = self.value(name)
        return value.isoformat() if isinstance(value, datetime) else self.text(name)

    def several(self, name: str) -> list[Any]:
        """A list, empty where it is missing."""
        value = self.value(name)
        if not isinstance(value, list | None):
            raise self.wrong(name, "a list")
        return value or []

    def part(self, name: str, known: Columns, unknown: set[str]) -> Record | None:
        """The mapping under `name`, its own columns checked."""
        value = self.value(name)
        return None if value is None else self.part_of(value, name, known, unknown)

    def part_of(self, value: Any, name: str, known: Columns, unknown: set[str]) -> Record:
        """A mapping found in this row, as a record that says where it stands."""
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise UserError(f"{self.prefix}{name} is {shown(value)}, expected a mapping of columns, {self.place}. {ADVICE}")
        prefix = f"{self.prefix}{name}."
        _check(value, known, unknown, self.place, prefix)
        return Record(value, self.place, prefix)

    def wrong(self, name: str, expected: str) -> UserError:
        """The error for a value that is not what was expected."""
        return UserError(f"{self.prefix}{name} is {shown(self.values.get(name))}, expected {expected}, {self.place}. {ADVICE}")


def csv_rows(path: Path, known: Columns, unknown: set[str]) -> Iterator[Record]:
    """The rows of a CSV file in UTF-8 (a byte order mark and any line ends are fine); names of columns that are not known are added to `unknown`."""
    reader = csv.reader(io.StringIO(_text(_bytes(path), path), newline=""), strict=True)
    try:
        header = next(reader, [])
        _check_header(header, known, unknown, path)
        row = 0
        for cells in reader:
            if not cells:
                continue  # an empty line
            row += 1
            place = f"row {row}, {path}"
            if len(cells) != len(header):
                raise UserError(f"{len(cells)} cells where the header has {len(header)}, {place}. Check the quotes and commas of that row")
            yield Record(dict(zip(header, cells, strict=True)), place, written=True)
    except csv.Error as error:
        raise UserError(f"not CSV: {error}, near line {reader.line_num}, {path}. Check the quotes near that line") from error


def typed_rows(path: Path, known: Columns, unknown: set[str]) -> Iterator[Record]:
    """The rows of a parquet file, a JSON array or JSON lines; names of columns that are not known are added to `unknown`."""
    content = _bytes(path, most=4)
    yield from _parquet_rows(path, known, unknown) if content == b"PAR1" else _json_rows(path, known, unknown)


def _json_rows(path: Path, known: Columns, unknown: set[str]) -> Iterator[Record]:
    content = _bytes(path)
    if content.startswith(b"\x1f\x8b"):
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
                content = file.read(MOST_UNPACKED + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"not a whole gzip file: {error}, {path}. Download it again") from error
        if len(content) > MOST_UNPACKED:
            raise UserError(f"more than {MOST_UNPACKED >> 30} GiB are packed into {path}. Split the file")
    text = _text(content, path)
    if text.lstrip().startswith("["):
        values: Iterator[Any] = iter(_json(text, str(path)))
    else:
        lines = [line for line in text.split("\n") if line.strip()]
        values = (_json(line, f"row {i}, {path}") for i, line in enumerate(lines, 1))
    for row, value in enumerate(values, 1):
        place = f"row {row}, {path}"
        if not isinstance(value, dict):
            raise UserError(f"{shown(value)} where a row belongs, {place}. A row is a mapping of columns to values")
        _check(value, known, unknown, place, "")
        yield Record(value, place)


def _parquet_rows(path: Path, known: Columns, unknown: set[str]) -> Iterator[Record]:
    import pyarrow as pa

    row = 0
    try:
        with open_parquet(path) as file:
            names = file.schema_arrow.names
            _check_header(names, known, unknown, path)
            for batch in batches(file, [name for name in names if name in known.required | known.optional], rows=ROWS_AT_ONCE):
                for values in rows_of(batch):
                    row += 1
                    yield Record(values, f"row {row}, {path}")
    except (OSError, ValueError, ArithmeticError, MemoryError, pa.ArrowException) as error:
        raise UserError(f"not a parquet file that can be read, after row {row}, {path}: {' '.join(str(error).split())[:200]}. Download it again") from error


def _bytes(path: Path, most: int = -1) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read(most)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}. Give the file of labels") from error
    if not content:
        raise UserError(f"the file is empty, {path}. Download or export it again")
    return content


def _text(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 at byte {error.start}, {path}. Save the file as UTF-8") from error


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unrepeated)
    except RecursionError as error:
        raise UserError(f"not JSON that can be read: nested too deeply, {place}. {ADVICE}") from error
    except ValueError as error:
        raise UserError(f"not JSON: {error}, {place}. Export it again") from error


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key is given twice in one object")
    return values


def _check_header(header: list[str], known: Columns, unknown: set[str], path: Path) -> None:
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise UserError(f"two columns are called {shown(repeated[0])}, {path}. Keep one")
    _check(dict.fromkeys(header), known, unknown, str(path), "")


def _check(values: Mapping[str, Any], known: Columns, unknown: set[str], place: str, prefix: str) -> None:
    names = values.keys()
    missing = known.required - names
    if missing:
        raise UserError(f"column {prefix}{min(missing)} is missing, {place}. The columns are: {', '.join(sorted(known.required))}")
    unknown |= {f"{prefix}{name or '(no name)'}".encode(errors="backslashreplace").decode() for name in names - known.required - known.optional - known.unread}


def shown(value: object, most: int = 60) -> str:
    """A value in a message: on one line and not too long."""
    try:
        text = repr(value)
    except RecursionError:
        return f"a {type(value).__name__} nested too deeply"
    return text if len(text) <= most else f"{text[:most]}..."

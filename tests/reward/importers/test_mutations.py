"""Every reader on files that were damaged by chance: it finds the right answers or refuses the file in one line.

Half of the files are changed as parsed rows (values, columns, rows), where `reference.py` says what is right both ways: what it refuses must be refused, and what it
reads must be read alike. The other half is changed as bytes; what a reader accepts there must be what the reference finds in the rows that another parser reads.
"""

from __future__ import annotations

import csv
import io
import json
import random
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from base_model.errors import UserError
from reward.comparisons import write_comparisons
from reward.importers.formats import FORMATS
from reward.importers.reading import Imported
from tests.reward.importers import reference
from tests.reward.importers.reference import Fact, Illegal, Row

FIXTURES = Path(__file__).parents[1] / "fixtures"
PARQUET = ("videofeedback", "visionreward-train", "visionreward-pairs", "genai-bench", "pickapic", "pickapic-rankings", "datapoint-motion", "trl")


def deep(depth: int) -> Any:
    value: Any = "x"
    for i in range(depth):
        value = [value] if i % 2 else {"a": value}
    return value


JUNK: list[Any] = [
    *(None, "", " ", "junk", "A", "B", "same", "tie", "invalid", "video_0", "video1", "left", 0, 1, 2, -1, 7, 4.0, 0.5, 1e308, 10**30, 2**63, float("nan"), float("inf")),
    *(True, False, [], {}, [[]], {"a": {"b": []}}, [None], [0, 1], deep(50), "\ud800", "x" * 5000, "\0", "\u2028", "🐻", "../../etc/passwd", "a\nb", "ＶＱ", "1_0", "١"),
]
JUNK_CELLS = [
    *("", " ", "junk", "A", "B", "same", "invalid", "a", "A ", "nan", "inf", "1e999", "-1", "3", "2.5", "9" * 400, "1_0", "١", '"', 'a"b,c', "x\ny", "\0", "🐻", "True"),
    "./videos/kling_0.mp4",
]


def fixture(name: str) -> Path:
    (path,) = FIXTURES.glob(f"{name}.*")
    return path


def rows_of(content: bytes) -> list[Any]:
    """The rows of JSON or JSON lines by the standard library alone."""
    try:
        text = content.decode("utf-8-sig")
        return json.loads(text) if text.lstrip()[:1] == "[" else [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError) as error:
        raise Illegal("JSON") from error


def parquet_rows(path: Path) -> list[Row]:
    """The rows of a parquet file that may be damaged, column by column: what cannot be read is not there."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, list[Any]] = {}
    for name in pq.read_schema(path).names:
        try:
            columns[name] = pq.read_table(path, columns=[name]).column(0).to_pylist()
        except (OSError, ValueError, pa.ArrowException):
            continue
    whole = {name: values for name, values in columns.items() if len(values) == max(map(len, columns.values()))}
    return [dict(zip(whole, values, strict=True)) for values in zip(*whole.values(), strict=True)]


def facts(imported: Imported) -> Counter[Fact]:
    """The answers a reader found, in the reference's words."""
    path = {clip.clip_id: clip.path for clip in imported.clips}
    prompt = {prompt.prompt_id: prompt.text for prompt in imported.prompts}
    return Counter(
        Fact(
            prompt[e.prompt_id],
            tuple(path[clip_id] for clip_id in e.clip_ids),
            e.dimension,
            e.kind,
            e.choice,
            e.ranks,
            e.likert,
            e.flags,
            e.annotator_id.removeprefix(f"{e.source_dataset}/"),
            e.created_at,
            e.lead_time_ms,
        )
        for e in imported.events
    )


def expected(name: str, path: Path) -> Counter[Fact] | None:
    """What the reference finds in a file; None where it finds it illegal."""
    content = path.read_bytes()
    try:
        rows = parquet_rows(path) if content[:4] == b"PAR1" else reference.csv_rows(content) if name in reference.WRITTEN else rows_of(content)
        return reference.answers(name, rows)
    except Illegal:
        return None


def read(name: str, path: Path) -> Imported | None:
    """What the reader finds; None where it refuses, in one line that names the file."""
    try:
        imported = FORMATS[name].read(path)
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error) and len(str(error)) < 800, str(error)
        str(error).encode()
        return None
    assert len({event.event_id for event in imported.events}) == len(imported.events)
    "".join(imported.unknown_columns).encode()
    return imported


# Changing rows


def spots(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) inside a value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from spots(value[key])


def change_rows(rows: list[Any], rng: random.Random) -> None:
    """One change, in place: a value, a column, or rows."""
    mappings = [value for value in [*rows, *(c[k] for row in rows for c, k in spots(row))] if isinstance(value, dict) and value]
    places = [place for row in rows for place in spots(row)]
    what = rng.choice(["value", "value", "value", "swap", "drop", "rename", "add", "shuffle", "repeat", "remove", "borrow", "column", "row"])
    if what == "value" and places:
        container, key = rng.choice(places)
        container[key] = deepcopy(rng.choice(JUNK))
    elif what == "swap" and places:
        (a, i), (b, j) = rng.choice(places), rng.choice(places)
        a[i], b[j] = deepcopy(b[j]), deepcopy(a[i])
    elif what in ("drop", "rename", "add") and mappings:
        mapping = rng.choice(mappings)
        key = rng.choice(list(mapping))
        if what == "drop":
            del mapping[key]
        else:
            mapping[rng.choice([f"{key} ", key.upper(), key[1:], "", "\ud800", "new"])] = mapping.pop(key) if what == "rename" else rng.choice(JUNK)
    elif what == "shuffle":
        rng.shuffle(rows)
    elif what == "repeat" and rows:
        rows.insert(rng.randrange(len(rows) + 1), deepcopy(rng.choice(rows)))
    elif what == "remove" and rows:
        del rows[rng.randrange(len(rows))]
    elif what == "borrow" and len(mappings) > 1:
        a, b = rng.sample(mappings, 2)
        shared = [key for key in a if key in b]
        if shared:
            key = rng.choice(shared)
            a[key] = deepcopy(b[key])
    elif what == "column":
        key = rng.choice([key for row in rows if isinstance(row, dict) for key in row] or [""])
        for row in rows:
            if isinstance(row, dict) and key in row:
                row[f"{key}_2"] = row.pop(key)
    elif what == "row" and rows:
        rows[rng.randrange(len(rows))] = deepcopy(rng.choice(JUNK))


def change_table(table: list[list[str]], rng: random.Random) -> None:
    """One change of a table of cells whose first line is the header."""
    row, column = rng.randrange(len(table)), rng.randrange(len(table[0]))
    what = rng.choice(["value", "value", "value", "swap", "column", "rename", "shuffle", "repeat", "remove", "borrow", "cells"])
    if what == "value":
        table[row][min(column, len(table[row]) - 1)] = rng.choice(JUNK_CELLS)
    elif what == "swap":
        other = rng.randrange(len(table[0]))
        for line in table if rng.random() < 0.5 else table[:1]:
            line[column], line[other] = line[other], line[column]
    elif what == "column":
        for line in table:
            del line[column]
    elif what == "rename":
        table[0][column] = rng.choice(["new", "", table[0][column].lower(), f"{table[0][column]} ", table[0][0]])
    elif what == "shuffle":
        table[1:] = rng.sample(table[1:], len(table) - 1)
    elif what == "repeat":
        table.append(list(table[row]))
    elif what == "remove" and len(table) > 1:
        del table[row]
    elif what == "borrow":
        table[row][column] = table[rng.randrange(len(table))][column]
    elif what == "cells":
        table[row] = table[row][: rng.randrange(len(table[row]))] if rng.random() < 0.5 else [*table[row], "extra"]


def change_bytes(content: bytes, rng: random.Random) -> bytes:
    """One change of a file's bytes."""
    at, to = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    to = min(to, at + 200)
    what = rng.choice(["flip", "flip", "flip", "cut", "delete", "insert", "repeat", "line", "newlines", "mark", "swap"])
    if what == "flip":
        changed = bytearray(content)
        for _ in range(rng.choice([1, 1, 3, 20])):
            changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if what == "cut":
        return content[:at]
    if what == "delete":
        return content[:at] + content[to:]
    if what == "insert":
        return content[:at] + rng.choice([b"\0", b"\xff", b'"', b",", b"\n", b"{", b"]", "猫".encode(), "é".encode("latin-1"), b"\xed\xa0\x80", rng.randbytes(8)]) + content[at:]
    if what == "repeat":
        return content[:to] + content[at:]
    if what == "line":
        lines = content.split(b"\n")
        lines.insert(rng.randrange(len(lines)), rng.choice(lines))
        return b"\n".join(lines)
    if what == "newlines":
        return content.replace(b"\n", rng.choice([b"\r\n", b"\r", b"\n\n", b""]))
    if what == "mark":
        return b"\xef\xbb\xbf" + content
    return content[:at] + content[to:] + content[at:to]


def changed_rows(name: str, rng: random.Random, folder: Path) -> Path:
    """A file of changed rows."""
    times = rng.choice([1, 1, 1, 2, 3])
    content = fixture(name).read_bytes()
    if name in reference.WRITTEN:
        table = list(csv.reader(io.StringIO(content.decode(), newline="")))
        for _ in range(times):
            if len(table[0]) > 1 and all(len(line) == len(table[0]) for line in table):
                change_table(table, rng)
        path = folder / f"{name}.csv"
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(table)
        return path
    rows = rows_of(content)
    for _ in range(times):
        change_rows(rows, rng)
    if name in PARQUET and rng.random() < 0.5:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
            return folder / f"{name}.parquet"
        except (ValueError, TypeError, AttributeError, OverflowError, pa.ArrowException):
            pass  # rows of a kind that no parquet file can hold
    lines = rng.random() < 0.5 and bool(rows)
    path = folder / f"{name}.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows))
    return path


def check_changed_rows(name: str, seed: int, folder: Path) -> bool:
    """One file of changed rows; whether it was read."""
    path = changed_rows(name, random.Random(f"{name} rows {seed}"), folder)
    want, got = expected(name, path), read(name, path)
    assert (got is None) == (want is None), f"seed {seed}: {'refused' if got is None else 'read'}, {path}"
    assert got is None or facts(got) == want, f"seed {seed}, {path}"
    if got is not None and seed % 25 == 0:
        write_comparisons(folder / f"out-{seed}", got.events, clips=got.clips, prompts=got.prompts, annotators=got.annotators)
    return got is not None


def check_changed_bytes(name: str, seed: int, folder: Path) -> bool:
    """One file of changed bytes; whether it was read."""
    rng = random.Random(f"{name} bytes {seed}")
    path = fixture(name)
    if name in PARQUET and rng.random() < 0.5:
        path = folder / f"whole-{name}.parquet"
        if not path.exists():
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.Table.from_pylist(rows_of(fixture(name).read_bytes())), path)
    damaged = folder / f"damaged-{name}{path.suffix}"
    damaged.write_bytes(change_bytes(path.read_bytes(), rng))
    got = read(name, damaged)
    if got is None:
        return False
    assert facts(got) == expected(name, damaged), f"seed {seed}, {damaged}"
    return True


def survive(name: str, seeds: range, folder: Path) -> None:
    half = len(seeds) // 2
    rows = [check_changed_rows(name, seed, folder) for seed in seeds[:half]]
    raw = [check_changed_bytes(name, seed, folder) for seed in seeds[half:]]
    print(f"{name}: of {len(rows)} files of changed rows {sum(rows)} were read, of {len(raw)} of changed bytes {sum(raw)}")
    assert 0.1 < sum(rows) / len(rows) < 0.95 and sum(raw) < 0.95 * len(raw)


def test_the_reference_reads_every_fixture_as_the_readers_do() -> None:
    assert set(reference.READERS) == set(reference.COLUMNS) == set(FORMATS)
    for name in FORMATS:
        got = read(name, fixture(name))
        assert got is not None and got.events and facts(got) == expected(name, fixture(name)), name


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_is_read_right_or_refused(name: str, tmp_path: Path) -> None:
    survive(name, range(50), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_a_thousand_damaged_files_are_read_right_or_refused(name: str, tmp_path: Path) -> None:
    survive(name, range(1000), tmp_path)

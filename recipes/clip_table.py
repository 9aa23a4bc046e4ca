"""The table of scores of curated clips on disk: what was found of a clip is never lost, and never found out twice.

    folder/00000.parquet       rows that are finished, 256 a part; appear whole
    folder/00001.jsonl         the part that is being filled: a line for every row, written as it is found; its first line says what was measured, and with what

A row is known by its key (`clip_rows.py:Source.key`); where two parts hold one, the later one counts. A part says what its rows were measured with: rows that lack something
that is wanted now, or were found by something else, are not read.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from base_model.checkpoint import atomic_write, disk_errors
from base_model.errors import UserError
from base_model.video.curate import MEASURES
from recipes.clip_rows import Keys

ROWS = 256  # of a part
PART = re.compile(r"(\d{5,})\.(parquet|jsonl)")
ABOUT = b"rushes"
TEXTS = ("id", "source", "file", "sha256", "codec", "container", "text", "licence", "extra", "error", "remarks", "safety")
WHOLE = ("bytes", "width", "height", "faces")
NUMBERS = ("agreement", "aesthetic")
HEAVY = ("thumbnails", "embedding", "extra")
"""Columns that decisions do not need."""


def schema() -> Any:
    """Columns of the table. nan: the clip cannot tell; null: not measured."""
    import pyarrow as pa

    fields = [("key", pa.uint64()), *((name, pa.string()) for name in TEXTS), *((name, pa.int64()) for name in WHOLE)]
    fields += [(name, pa.float64()) for name in (*MEASURES, *NUMBERS)]
    fields += [("hashes", pa.list_(pa.string())), ("thumbnails", pa.list_(pa.binary())), ("safety_reasons", pa.list_(pa.string())), ("embedding", pa.list_(pa.float32()))]
    return pa.schema(fields)


class Table:
    """What was found so far. One process at a time.

    about: what rows are measured with, by what is measured; rows of parts that say otherwise about one of them are not there. again: neither are rows with an error.
    Raises UserError where the folder cannot be written or holds a part that is damaged.
    """

    def __init__(self, folder: Path, about: Mapping[str, str], *, again: bool = False) -> None:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.about = folder, dict(about)
        self._journal: Any = None
        self._rows: list[dict[str, Any]] = []
        for leftover in folder.glob(".*.partial"):
            leftover.unlink()
        self._finish_journals()
        self._parts = [path for path in self._all_parts() if self._is_usable(_about(path))]
        self._next = max((_number(path) for path in self._all_parts()), default=-1) + 1
        self._keys = Keys()
        for path in self._parts:
            for row in _read(path, ["key", "error"]).to_pylist():
                if not (again and row["error"]):
                    self._keys.add(row["key"])

    def __contains__(self, key: int) -> bool:
        return key in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, row: Mapping[str, Any]) -> None:
        """Keeps a row: from here on no kill takes it back. Raises UserError where the disk is full."""
        line = json.dumps(row, ensure_ascii=True).encode() + b"\n"
        path = self.folder / f"{self._next:05d}.jsonl"
        with disk_errors(path):
            if self._journal is None:
                self._journal = open(path, "ab", buffering=0)  # noqa: SIM115
                _append(self._journal, json.dumps(self.about).encode() + b"\n")
            _append(self._journal, line)
        self._rows.append(dict(row))
        self._keys.add(row["key"])
        if len(self._rows) >= ROWS:
            self.flush()

    def flush(self) -> None:
        """Makes a part of the rows in hand. Raises UserError where the disk is full: the rows stay."""
        if not self._rows:
            return
        self._parts.append(self._write(self._next, self._rows, self.about))
        self._journal.close()
        (self.folder / f"{self._next:05d}.jsonl").unlink()
        self._journal, self._rows, self._next = None, [], self._next + 1

    def close(self) -> None:
        """Lets go of the journal; its rows are there when the table is opened again."""
        if self._journal is not None:
            self._journal.close()

    def read(self, keys: Sequence[int], *, without: Sequence[str] = HEAVY) -> Any:
        """The rows of these keys, in their order, as a `pyarrow.Table`. Raises KeyError for one that is not there."""
        import pyarrow as pa

        self.flush()
        columns = [name for name in schema().names if name not in without]
        whole = pa.concat_tables([_read(path, columns) for path in self._parts]) if self._parts else schema().empty_table().select(columns)
        there = whole["key"].to_numpy()
        order = np.argsort(there, kind="stable")
        wanted = np.asarray(keys, np.uint64)
        place = np.searchsorted(there[order], wanted, side="right") - 1  # the last of equal keys
        missing = (place < 0) | (there[order][np.maximum(place, 0)] != wanted) if len(there) else np.ones(len(wanted), bool)
        if missing.any():
            raise KeyError(int(wanted[missing][0]))
        return whole.take(order[place])

    def forget(self, keys: Sequence[int]) -> None:
        """Takes the pictures and what was made of them out of these rows, in all parts, those too that are not read now: for clips that must not be shown."""
        import pyarrow as pa

        gone = Keys()
        for key in keys:
            gone.add(key)
        self.flush()
        for path in self._all_parts() if keys else ():
            light = _read(path, ["key", "thumbnails"])
            if any(key in gone and pictures for key, pictures in zip(light["key"].to_pylist(), light["thumbnails"].to_pylist(), strict=True)):
                rows = [row if row["key"] not in gone else row | {"thumbnails": [], "embedding": None} for row in _read(path, None).to_pylist()]
                self._store(path, pa.Table.from_pylist(rows, _read(path, None).schema), _about(path))

    def _write(self, number: int, rows: Sequence[Mapping[str, Any]], about: Mapping[str, str]) -> Path:
        import pyarrow as pa

        path = self.folder / f"{number:05d}.parquet"
        self._store(path, pa.Table.from_pylist([_unpacked(row) for row in rows], schema()), about)
        return path

    @staticmethod
    def _store(path: Path, table: Any, about: Mapping[str, str]) -> None:
        import pyarrow.parquet as pq

        content = io.BytesIO()
        pq.write_table(table.replace_schema_metadata({ABOUT: json.dumps(dict(about)).encode()}), content, compression="zstd")
        atomic_write(path, content.getvalue())

    def _is_usable(self, about: Mapping[str, str]) -> bool:
        return all(about.get(name) == value for name, value in self.about.items())

    def _all_parts(self) -> list[Path]:
        return sorted((path for path in self.folder.iterdir() if (match := PART.fullmatch(path.name)) and match[2] == "parquet"), key=_number)

    def _finish_journals(self) -> None:
        """Makes parts of what a kill left; a line that was not written to its end is of a row that is found again."""
        for journal in sorted(self.folder.glob("*.jsonl"), key=_number):
            if not journal.with_suffix(".parquet").exists():
                whole = [line for line in journal.read_bytes().split(b"\n")[:-1] if line]
                if len(whole) > 1:
                    self._write(_number(journal), [json.loads(line) for line in whole[1:]], json.loads(whole[0]))
            journal.unlink()


def _number(path: Path) -> int:
    match = PART.fullmatch(path.name)
    return int(match[1]) if match else -1


def _append(file: Any, line: bytes) -> None:
    """All of a line or nothing of it: a full disk leaves no half. Raises OSError."""
    begin, left = os.fstat(file.fileno()).st_size, memoryview(line)
    try:
        while left:
            left = left[file.write(left) :]
    except OSError:
        file.truncate(begin)
        raise


def _unpacked(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the journal as one of the table."""
    flat = {**{name: value for name, value in row.items() if name not in ("scores", "thumbnails", "extra")}, **row.get("scores", {})}
    return flat | {"thumbnails": [base64.b64decode(each) for each in row.get("thumbnails", [])], "extra": json.dumps(row.get("extra", {}), ensure_ascii=False)}


def _read(path: Path, columns: Sequence[str] | None) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        there = pq.read_schema(path).names if columns is not None else []
        table = pq.read_table(path, columns=None if columns is None else [name for name in columns if name in there], partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"a damaged part of the table, {path}: {type(error).__name__}. Delete it: its clips are measured again") from error
    if columns is None:
        return table
    for name in columns:
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(len(table), schema().field(name).type))
    return table.select(columns).cast(pa.schema([schema().field(name) for name in columns]))


def _about(path: Path) -> dict[str, str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        about: dict[str, str] = json.loads((pq.read_schema(path).metadata or {}).get(ABOUT, b"{}"))
        return about
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"a damaged part of the table, {path}: {type(error).__name__}. Delete it: its clips are measured again") from error


def read_table(folder: Path, *, without: Sequence[str] = ()) -> Any:
    """All parts of a table as they lie there, without those columns; rows of clips that have gone from the input among them. For whoever reads decisions beside it, by `key`."""
    import pyarrow as pa

    names = sorted(name for name in os.listdir(folder) if (match := PART.fullmatch(name)) and match[2] == "parquet") if folder.is_dir() else []
    if not names:
        raise UserError(f"no table of scores, {folder}. Make it with rushes curate")
    columns = [name for name in schema().names if name not in without]
    return pa.concat_tables([_read(folder / name, columns) for name in names])

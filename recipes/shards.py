"""Tensors kept by what decides them: millions of entries in files of 64 MiB, mapped into memory when they are read.

    folder/<sha256 of the file>.safetensors    {"<key>/<part>": tensor} of many entries; its metadata say what they are of; never rewritten
    folder/index.parquet                       what was found when each file was last hashed; made again where it is missing

A file's name is the hash of its bytes, so processes write into one folder without asking each other, and a damaged file is known: it is named and deleted, and what it held is
made again. A file is hashed when it is first seen, and again when the file system says that it changed. Files appear whole or not at all; a process that is killed loses what it
had not written yet: at most `SHARD_BYTES`, or what it made in a minute.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
from torch import Tensor

from base_model.checkpoint import atomic_write, check_can_write, check_is_safetensors, weights_bytes
from base_model.errors import UserError

SHARD_BYTES = 64 << 20
MOST_SECONDS = 60.0  # between making an entry and writing it
OPEN_FILES = 1024
ROOM = 1 << 20  # kept free on the disk
LEFT_BEHIND = 3600.0  # seconds after which a half-written file is nobody's
SETTLED_NS = 2_000_000_000  # a file that changed a moment ago may change again within one tick of the file system's clock
NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
INDEX = "index.parquet"
Entry = Mapping[str, Tensor]
"""Parts of an entry by name."""


class Shard(NamedTuple):
    """What is known of a file."""

    stamp: str  # what the file system said of the file when it was hashed or written
    about: str  # what its entries are of, JSON
    keys: tuple[str, ...]
    parts: tuple[str, ...]  # names that parts of its entries have; not every entry has all


class Shards:
    """The entries in `folder` that are of `about`; others are counted and never read.

    about: what all entries depend on beside their keys, such as the encoder. verify: hash every file, whatever the file system says. `damaged` names files that were deleted.
    Raises UserError where the folder cannot be written.
    """

    def __init__(self, folder: Path, about: Mapping[str, str], *, verify: bool = False) -> None:
        check_can_write(folder, "--out")
        self.folder, self.about = folder, json.dumps(dict(about), sort_keys=True)
        self.damaged: list[str] = []
        self._known: dict[str, Shard] = {}
        self._held: dict[str, str] = {}  # key -> file
        self._pending: dict[str, Entry] = {}
        self._pending_bytes, self._since = 0, 0.0
        self._files: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._clean()
        self.look({} if verify else self._index())

    def __contains__(self, key: str) -> bool:
        return key in self._held or key in self._pending

    @property
    def stale(self) -> int:
        """Entries of something else."""
        return sum(len(shard.keys) for shard in self._known.values() if shard.about != self.about)

    def look(self, index: Mapping[str, Shard] | None = None) -> None:
        """Takes note of files that others have written. index: what is believed of a file that has not changed since."""
        if not self.folder.is_dir():
            return
        for name in sorted(entry.name for entry in os.scandir(self.folder) if NAME.fullmatch(entry.name) and entry.name not in self._known):
            believed = (index or {}).get(name)
            shard = believed if believed is not None and believed.stamp == self._stamp(name) else self._hashed(name)
            if shard is not None:
                self._add(name, shard)

    def put(self, key: str, entry: Entry) -> None:
        """Keeps an entry, on disk at the latest with `flush`. Raises UserError where there is no room for it: it is lost, what came before is written."""
        size = sum(part.numel() * part.element_size() for part in entry.values())
        if self._pending and (self._pending_bytes + size > SHARD_BYTES or time.monotonic() - self._since > MOST_SECONDS):
            self.flush()
        if not self._pending:
            self._since = time.monotonic()
        self._pending[key] = {name: part.detach().cpu().contiguous() for name, part in entry.items()}
        self._pending_bytes += size

    def make_room(self, size: int) -> None:
        """Raises UserError where the disk has no room for `size` bytes more; what was put is written first. Asked before an entry is made, so that nothing is made in vain."""
        place = next(place for place in (self.folder.absolute(), *self.folder.absolute().parents) if place.exists())
        if shutil.disk_usage(place).free < self._pending_bytes + size + ROOM:
            self.flush()
            raise UserError(f"the disk is full, while writing into {self.folder}. Free some space, then run the same command again: what was made is kept")

    def flush(self) -> None:
        """Writes what was put. Raises UserError (full disk, no permission): what was kept before stays."""
        if not self._pending:
            return
        tensors = {f"{key}/{name}": part for key, entry in self._pending.items() for name, part in entry.items()}
        content = weights_bytes(tensors, {"about": self.about})
        name = f"{hashlib.sha256(content).hexdigest()}.safetensors"
        keys, parts = tuple(self._pending), _names(tensors)
        atomic_write(self.folder / name, content)
        self._pending, self._pending_bytes = {}, 0
        self._add(name, Shard(self._stamp(name), self.about, keys, parts))

    def get(self, key: str) -> dict[str, Tensor]:
        """The parts of an entry, mapped into memory: not to be changed in place. Raises UserError where its file is damaged or gone; KeyError where there is no such entry."""
        if key in self._pending:
            return dict(self._pending[key])
        name = self._held[key]
        try:
            return self._parts(name, key)
        except (OSError, LookupError, safetensors.SafetensorError, UserError) as error:
            self._drop(name)
            raise UserError(f"damaged or missing, {self.folder / name}. Run the same command again: what it held is made anew") from error

    def save_index(self) -> None:
        """Keeps what is known of the files. A folder that cannot be written goes without."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        settled = [(name, shard) for name, shard in sorted(self._known.items()) if self._stamp(name, settled=True) == shard.stamp]
        rows = [{"file": name, "stamp": shard.stamp, "about": shard.about, "keys": list(shard.keys), "parts": list(shard.parts)} for name, shard in settled]
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows, schema=_schema()), buffer)
        with contextlib.suppress(UserError):
            atomic_write(self.folder / INDEX, buffer.getvalue().to_pybytes())

    # Files

    def _add(self, name: str, shard: Shard) -> None:
        self._known[name] = shard
        if shard.about == self.about:
            self._held.update(dict.fromkeys(shard.keys, name))

    def _index(self) -> dict[str, Shard]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            rows = pq.read_table(self.folder / INDEX).to_pylist()
            return {row["file"]: Shard(row["stamp"], row["about"], tuple(row["keys"]), tuple(row["parts"])) for row in rows}
        except (OSError, KeyError, TypeError, pa.ArrowException):
            return {}

    def _stamp(self, name: str, *, settled: bool = False) -> str:
        try:
            return (seal if settled else stamp)(self.folder / name)
        except OSError:
            return ""

    def _hashed(self, name: str) -> Shard | None:
        """What a whole file says of itself; a damaged one is deleted."""
        path = self.folder / name
        try:
            before = self._stamp(name)
            with open(path, "rb") as file:
                whole = hashlib.file_digest(file, "sha256").hexdigest() == path.stem
            header = _header(path) if whole else None
        except FileNotFoundError:
            return None
        except OSError:
            header = None
        if header is None:
            self._drop(name)
            return None
        about = header.pop("__metadata__", {}).get("about", "")
        return Shard(before, about, tuple(dict.fromkeys(tensor.rpartition("/")[0] for tensor in header)), _names(header))

    def _parts(self, name: str, key: str) -> dict[str, Tensor]:
        file, found = self._open(name), {}
        for part in self._known[name].parts:
            with contextlib.suppress(safetensors.SafetensorError):  # another entry has it
                found[part] = file.get_tensor(f"{key}/{part}")
        if not found:
            raise KeyError(key)
        return found

    def _open(self, name: str) -> Any:
        """The file, mapped into memory. Raises UserError where it changed since it was hashed and is not whole."""
        with self._lock:
            if name in self._files:
                self._files.move_to_end(name)
                return self._files[name]
            if self._stamp(name) != self._known[name].stamp:
                shard = self._hashed(name)
                if shard is None:
                    raise UserError(f"damaged, {self.folder / name}. Run the same command again")
                self._known[name] = shard
            self._files[name] = safetensors.safe_open(self.folder / name, framework="pt", device="cpu")
            while len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)
            return self._files[name]

    def _drop(self, name: str) -> None:
        self.damaged.append(name)
        self._files.pop(name, None)
        shard = self._known.pop(name, None)
        for key in shard.keys if shard else ():
            if self._held.get(key) == name:
                del self._held[key]
        with contextlib.suppress(OSError):
            (self.folder / name).unlink()

    def _clean(self) -> None:
        """Deletes what killed processes left half-written."""
        for path in self.folder.glob(".*.partial"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > LEFT_BEHIND:
                    path.unlink()


def entry_key(told: Mapping[str, object]) -> str:
    """sha256 of what decides an entry."""
    return hashlib.sha256(json.dumps(dict(told), sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _names(tensors: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(tensor.rpartition("/")[2] for tensor in tensors))


def _header(path: Path) -> dict[str, Any] | None:
    try:
        check_is_safetensors(path)
        with open(path, "rb") as file:
            return dict(json.loads(file.read(int.from_bytes(file.read(8), "little"))))
    except UserError:
        return None


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema([("file", pa.string()), ("stamp", pa.string()), ("about", pa.string()), ("keys", pa.list_(pa.string())), ("parts", pa.list_(pa.string()))])


def missing(shards: Shards, keys: Iterable[str]) -> list[str]:
    """Those of the keys that are not kept, each once, in order."""
    return [key for key in dict.fromkeys(keys) if key not in shards]


# What the file system says


def stamp(path: Path) -> str:
    """What the file system says of a file: while it says the same, its bytes need not be hashed again. Raises OSError."""
    told = path.stat()
    return f"{told.st_ino}.{told.st_size}.{told.st_mtime_ns}.{told.st_ctime_ns}"


def seal(path: Path) -> str:
    """Its `stamp`, to be believed another day; empty where the file changed a moment ago, and might again without a sign. Raises OSError."""
    told = path.stat()
    return stamp(path) if time.time_ns() - max(told.st_mtime_ns, told.st_ctime_ns) > SETTLED_NS else ""

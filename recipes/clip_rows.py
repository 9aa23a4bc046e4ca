"""What a row of any input says of a clip: where it is, its caption, licence, source and id, and why it cannot be used.

A row that cannot be used (no clip named, a path that leads out of its folder, a caption that is no UTF-8) is a `Source` with an error. Captions are kept as they are, whatever
their length and direction.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from align.config import Config
from base_model.errors import UserError
from recipes.clip_folder import TABLE, inside, reason_of
from recipes.clip_openers import AtAddress, Held, OnDisk, Opener, Within, is_address
from recipes.manifests import Row

REMOTE = frozenset(("http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "memory"))
"""Where a row's clip may lie. An address that leads back to this machine (`file:`), or through several (`::`), is refused in a row."""
ARCHIVES = frozenset(("zip", "tar", "gzip"))
BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
NAMES: Mapping[str, tuple[str, ...]] = {
    "video": ("file_name", "path", "video", "url"),
    "text": ("text", "caption", "prompt"),
    "licence": ("licence", "license"),
    "source": ("source",),
    "id": ("id",),
}


class Columns(Config):
    """What columns are called, where it is none of the usual names."""

    video: str | None = None
    """Name or address of the clip, or its bytes: `file_name`, `path`, `video` or `url`."""
    text: str | None = None
    """Caption: `text`, `caption` or `prompt`."""
    licence: str | None = None
    """`licence` or `license`."""
    source: str | None = None
    """Where the clip came from: `source`."""
    id: str | None = None
    """What the row is called: `id`; without it by the name of its clip."""


class Input(NamedTuple):
    """What is read."""

    place: str  # a folder, a file, an address, a pattern with `*`, or a dataset on the hub
    columns: Columns = Columns()
    root: Path | None = None  # where names in a manifest begin; its own folder without
    split: str = "train"  # of a dataset


class Source(NamedTuple):
    """A clip that may be looked at, and what is told about it."""

    id: str
    file: str  # path or address; `tar::member` in a tar file
    opener: Opener | None  # None where there is an error
    text: str = ""
    licence: str = ""
    source: str = ""
    extra: Mapping[str, Any] = {}  # what else the row says
    error: str = ""  # why it cannot be used, one line
    remarks: str = ""  # what somebody should know of it
    named: bool = False  # by an id of its own, not after its clip

    @property
    def suffix(self) -> str:
        """Of its file's name, in small letters."""
        suffix = PurePosixPath(re.split("[?#]", self.file)[0] if is_address(self.file) else self.file).suffix.lower()
        return suffix if re.fullmatch(r"\.[a-z0-9]{1,8}", suffix) else ""

    @property
    def key(self) -> int:
        """64 bits of all that decides what is found of it; another where its file or its row has changed."""
        told = [self.id, self.file, _stamp(self.opener), self.text, self.licence, self.source, dict(self.extra), self.error]
        return digest_of(json.dumps(told, sort_keys=True, default=str))


def _stamp(opener: Opener | None) -> str:
    """What says that bytes have changed. Not the inode's time: linking a file changes that."""
    if isinstance(opener, Within):
        return f"{opener.offset}.{opener.size}"
    if isinstance(opener, Held):
        return blake2b(opener.content, digest_size=16).hexdigest()
    with contextlib.suppress(OSError):
        if isinstance(opener, OnDisk):
            told = opener.path.stat()
            return f"{told.st_size}.{told.st_mtime_ns}"
    return ""


def digest_of(text: str) -> int:
    """64 bits of a text, never 0."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") or 1


class Keys:
    """A set of 64-bit numbers other than 0, in 16 to 32 bytes each."""

    def __init__(self, size: int = 1 << 10) -> None:
        self._slots, self._count = np.zeros(size, np.uint64), 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, key: int) -> bool:
        slots = self._slots  # another thread may put larger ones in their place
        return bool(slots[_slot(slots, key)])

    def add(self, key: int) -> bool:
        """Whether it was not there. By one thread at a time."""
        slot = _slot(self._slots, key)
        if self._slots[slot]:
            return False
        self._slots[slot] = key
        self._count += 1
        if 2 * self._count > len(self._slots):
            larger = np.zeros(2 * len(self._slots), np.uint64)
            for each in self._slots[self._slots != 0].tolist():
                larger[_slot(larger, each)] = each
            self._slots = larger
        return True


def _slot(slots: NDArray[np.uint64], key: int) -> int:
    """Where a number is, or would be: the first place from its last bits on that holds it or nothing."""
    mask = len(slots) - 1
    slot = key & mask
    while (there := int(slots[slot])) and there != key:
        slot = (slot + 1) & mask
    return slot


# What a row says


class Place(NamedTuple):
    """Where names in rows begin."""

    folder: Path | None = None
    address: str = ""

    def find(self, name: str) -> tuple[str, Opener]:
        """(file, way to it) of a row's name. Raises UserError where it leads to where it must not."""
        if is_address(name):
            if not _may_be_named(name):
                raise UserError(f"{name!r} is an address that rows must not name, {self}. Use one of {', '.join(sorted(REMOTE))}")
            return name, AtAddress(name)
        if self.folder is not None:
            path = inside(self.folder, name)
            return str(path), OnDisk(path)
        if not self.address:
            raise UserError(f"{name!r} is a name without a place, {self}. Give bytes, or an address")
        if "::" in name or name.startswith("/") or ".." in name.split("/"):
            raise UserError(f"{name!r} lies outside its folder, {self}. Name a clip in it")
        return f"{self.address}/{name}", AtAddress(f"{self.address}/{name}")

    def __str__(self) -> str:
        return str(self.folder / TABLE if self.folder is not None else self.address)


def _may_be_named(address: str) -> bool:
    """Whether a row may name it: it leads to another machine, if need be to a file in an archive there."""
    *packed, last = [part.partition("://")[0].lower() for part in address.split("::")]
    return last in REMOTE and set(packed) <= ARCHIVES


class Said(NamedTuple):
    """What a row says beside where its clip is."""

    text: str
    licence: str
    source: str
    id: str
    extra: Mapping[str, Any]
    error: str
    remarks: str


def said(row: Row, columns: Columns) -> Said:
    """An error is told where the row cannot be used, a remark where somebody should know."""
    found = {wanted: _column(row.values, wanted, columns) for wanted in NAMES}
    text, fault = _text(row.values.get(found["text"]), "caption")
    licence, source, own = (_text(row.values.get(found[wanted]), wanted)[0] for wanted in ("licence", "source", "id"))
    remarks = ["no caption"] if not text.strip() else []
    if controls := sum(character in BIDI for character in text):
        remarks.append(f"{controls} marks of writing direction in the caption")
    extra = {whole_text(str(key)): _plain(value) for key, value in row.values.items() if key not in found.values()}
    return Said(text, licence, source, own, extra, whole_text(row.error or fault), "; ".join(remarks))


def source_of(row: Row, place: Place, columns: Columns, origin: str) -> Source:
    """What a row says as a source. origin: where it came from, if it does not say so itself."""
    told, column = said(row, columns), _column(row.values, "video", columns)
    value = row.values.get(column)
    name, error = _name(value), told.error
    file, opener = name, None
    if not error and column not in row.values:
        error = f"no column for the clip ({', '.join(NAMES['video'])})" if columns.video is None else f"no column {columns.video!r}"
    if not error:
        try:
            file, opener = _opened(value, name, place)
        except UserError as fault:
            error = reason_of(fault, str(place))
    return as_source(told, told.id or whole_text(name) or row.where, file, None if error else opener, origin, error)


def as_source(told: Said, name: str, file: str, opener: Opener | None, origin: str, error: str) -> Source:
    return Source(name, whole_text(file), opener, told.text, told.licence, told.source or origin, told.extra, whole_text(error), told.remarks, bool(told.id))


def _column(values: Mapping[str, Any], wanted: str, columns: Columns) -> str:
    """Which column it is: the one that was named, or the first of the usual ones that says something."""
    given: str | None = getattr(columns, wanted)
    if given is not None:
        return given
    there = [name for name in NAMES[wanted] if name in values]
    return next((name for name in there if not _is_nothing(values[name])), there[0] if there else NAMES[wanted][0])


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value)) or (isinstance(value, str) and not value.strip())


def _text(value: Any, what: str) -> tuple[str, str]:
    """(text, what is wrong with it). Numbers are written out; what is no text at all is empty."""
    if _is_nothing(value):
        return "", ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:g}" if isinstance(value, float) else str(value), ""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    if not isinstance(value, str):
        return "", f"the {what} is no text"
    try:
        value.encode()
    except UnicodeEncodeError:
        return whole_text(value), f"the {what} is not UTF-8"
    return value, ""


def whole_text(text: str) -> str:
    """A text with what is no character written out."""
    return text.encode("utf-8", "backslashreplace").decode()


def _plain(value: Any) -> Any:
    """As JSON says it."""
    if isinstance(value, Mapping):
        return {whole_text(str(key)): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, bool | int | float) or value is None else whole_text(str(value))


def _name(value: Any) -> str:
    """The name in a value that says where a clip is; empty where there is none."""
    if isinstance(value, Mapping):
        value = value.get("path")
    return value.strip() if isinstance(value, str) else ""


def _opened(value: Any, name: str, place: Place) -> tuple[str, Opener]:
    content = value.get("bytes") if isinstance(value, Mapping) else value
    if isinstance(content, bytes):
        return name, Held(content)
    if not name:
        raise UserError(f"the row names no clip, {place}. Name one")
    return place.find(name)

"""Where clips come from: a folder, a manifest, tar files, a dataset, any address that fsspec knows -> a stream of sources, one for every clip or row that is there.

A source is a way to a clip's bytes, taken when the clip is looked at, and what is told about it. A row that cannot be used (no file named, another clip's id, a path that leads out
of its folder, a caption that is no UTF-8) is a source with an error: it is never gone. In memory are one row and some 60 bytes for each that came before.
What it leaves out: nothing is decoded, and captions are kept as they are, whatever their length and direction.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from align.config import Config
from base_model.errors import UserError
from recipes.clip_folder import IMAGES, TABLE, VIDEOS, inside, media_in, reason_of
from recipes.clip_stream import Stream, load_rows
from recipes.manifests import READERS, Row, json_row, kind_of, parquet_rows

TARS = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")
LONGEST_MEMBER = 4 << 30  # bytes of a clip in a tar file that cannot be read anywhere but from its beginning
LONGEST_TEXT = 16 << 20  # bytes of a text beside a clip
REMOTE = frozenset(("http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "memory"))
"""Where a row's clip may lie. An address that leads back to this machine (`file:`), or through several (`::`), is refused in a row."""
ARCHIVES = frozenset(("zip", "tar", "gzip"))
ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*::)*[a-z][a-z0-9+.-]*://", re.IGNORECASE)
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


# Ways to bytes


class Opener(Protocol):
    """A way to a clip's bytes, which costs nothing until it is taken."""

    @property
    def path(self) -> Path | None:
        """The file on this machine that is the clip and nothing else, if there is one."""
        ...

    def open(self) -> BufferedReader:
        """Raises UserError or OSError."""
        ...


@dataclass(frozen=True)
class OnDisk:
    """A file of this machine."""

    path: Path

    def open(self) -> BufferedReader:
        return open(self.path, "rb")


@dataclass(frozen=True)
class AtAddress:
    """What lies at an address."""

    url: str
    path: None = field(default=None, init=False)

    def open(self) -> BufferedReader:
        return open_address(self.url)


@dataclass(frozen=True)
class Within:
    """A part of a tar file that is not packed."""

    tar: str
    offset: int
    size: int
    path: None = field(default=None, init=False)

    def open(self) -> BufferedReader:
        whole = open_place(self.tar)
        whole.seek(self.offset)
        return io.BufferedReader(_Part(whole, self.size))


@dataclass(frozen=True)
class Held:
    """Bytes that a row holds."""

    content: bytes = field(repr=False)
    path: None = field(default=None, init=False)

    def open(self) -> BufferedReader:
        return io.BufferedReader(io.BytesIO(self.content))  # type: ignore[arg-type]


class _Part(io.RawIOBase):
    """So many of a file's next bytes."""

    def __init__(self, file: BufferedReader, size: int) -> None:
        self._file, self._left = file, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        read = self._file.read(min(len(buffer), self._left))
        buffer[: len(read)] = read
        self._left -= len(read)
        return len(read)

    def close(self) -> None:
        self._file.close()
        super().close()


class _Body(io.RawIOBase):
    """An answer's body as it comes."""

    def __init__(self, url: str) -> None:
        self._open = contextlib.ExitStack()
        import httpx2

        from reward.judges.exchange import is_loopback

        client = httpx2.Client(follow_redirects=True, timeout=60, trust_env=not is_loopback(httpx2.URL(url).host))  # a proxy is no way to this machine
        with contextlib.ExitStack() as stack:
            stack.enter_context(client)
            self._parts = stack.enter_context(client.stream("GET", url)).raise_for_status().iter_bytes(1 << 20)
            self._open = stack.pop_all()
        self._held = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._held:
            part = next(self._parts, None)
            if part is None:
                return 0
            self._held = part
        count = min(len(buffer), len(self._held))
        buffer[:count], self._held = self._held[:count], self._held[count:]
        return count

    def close(self) -> None:
        if not self.closed:
            self._open.close()
        super().close()


def is_address(place: str) -> bool:
    """Whether it is no path of this machine but an address, as fsspec writes them."""
    return ADDRESS.match(place) is not None


def open_address(url: str) -> BufferedReader:
    """Its bytes, one after another. Raises UserError."""
    try:
        if url.lower().startswith(("http://", "https://")):
            return io.BufferedReader(_Body(url))
        import fsspec  # type: ignore[import-untyped]

        return io.BufferedReader(fsspec.open(url, "rb").open())
    except Exception as error:  # every file system raises its own
        raise UserError(f"cannot be fetched: {_one_line(error)}, {url}. Check the address and the connection") from error


def open_place(place: str) -> BufferedReader:
    """A file of this machine, or what lies at an address. Raises UserError."""
    if is_address(place):
        return open_address(place)
    try:
        return open(place, "rb")
    except OSError as error:
        raise UserError(f"cannot read {place}: {error.strerror}. Check the path") from error


@contextlib.contextmanager
def on_disk(opener: Opener, folder: Path) -> Iterator[Path]:
    """The clip as a file of this machine, fetched into `folder` as long as it is needed. Raises UserError where it cannot be had."""
    if opener.path is not None:
        yield opener.path
        return
    with tempfile.NamedTemporaryFile(dir=folder, prefix="fetched-") as file:
        fetch(opener, file)
        file.flush()
        yield Path(file.name)


def fetch(opener: Opener, to: Any) -> None:
    """Writes a clip's bytes to an open file. Raises UserError where they cannot be had."""
    try:
        with opener.open() as file:
            while part := file.read(1 << 20):
                to.write(part)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot be fetched: {error.strerror or _one_line(error)}, {opener}. Check the place, and the room on the disk") from error
    except Exception as error:  # every file system raises its own
        raise UserError(f"cannot be fetched: {_one_line(error)}, {opener}. Check the connection") from error


# Sources


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
        return _digest(json.dumps(told, sort_keys=True, default=str))


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


def _digest(text: str) -> int:
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


def sources(given: Input) -> Iterator[Source]:
    """Everything that is there, in an order that does not change while it stays there. Ids are unique: a second row under an id is one with an error.

    A clip that is named by several rows without ids is several sources where their captions differ. Raises UserError where there is nothing of a kind that can be read.
    """
    ids, told = Keys(), Keys()
    for number, source in enumerate(_all(given), 1):
        known, again = not ids.add(_digest(source.id)), not told.add(_digest(json.dumps([source.id, source.text])))
        if known and (source.named or again):
            what = f"the id {source.id!r} stands in an earlier row" if source.named else "an earlier row has the same clip and caption"
            source = source._replace(id=f"{source.id}#{number}", opener=None, error=source.error or what)
            ids.add(_digest(source.id))
        elif known:
            source = source._replace(id=f"{source.id}#{_digest(source.text):016x}")
        yield source


def count(given: Input) -> int | None:
    """How many sources there are, where that can be told without fetching clips."""
    if is_address(given.place) or not _is_here(given.place):
        return None
    total = 0
    for place in _expanded(given.place):
        if kind_of(place) == "parquet":
            total += _parquet_count(Path(place))
        elif place.endswith(TARS[1:]):
            return None
        else:
            total += sum(1 for _ in _all(given._replace(place=place)))
    return total


def _parquet_count(path: Path) -> int:
    import pyarrow.parquet as pq

    try:
        return int(pq.read_metadata(path).num_rows)
    except Exception as error:  # pyarrow raises many
        raise UserError(f"not a parquet file that can be read, {path}: {_one_line(error)}. Download it again") from error


def _is_here(place: str) -> bool:
    return "*" in place or "{" in place or os.path.lexists(place)


def _all(given: Input) -> Iterator[Source]:
    for place in _expanded(given.place):
        yield from _of(given._replace(place=place))


def _expanded(place: str) -> list[str]:
    """The files that a pattern stands for: `*` and, of numbered shards, `{000..041}`."""
    if match := re.search(r"\{(\d+)\.\.(\d+)\}", place):
        first, last = match.groups()
        return [f"{place[: match.start()]}{number:0{len(first)}d}{place[match.end() :]}" for number in range(int(first), int(last) + 1)]
    if "*" not in place:
        return [place]
    import fsspec

    try:
        system, pattern = fsspec.core.url_to_fs(place)
        found = sorted(system.unstrip_protocol(name) if is_address(place) else name for name in system.glob(pattern))
    except Exception as error:  # every file system raises its own
        raise UserError(f"cannot list {place}: {_one_line(error)}. Check the address and the connection") from error
    if not found:
        raise UserError(f"no file is called {place}, input. Check the pattern")
    return found


def _of(given: Input) -> Iterator[Source]:
    """The sources of one place."""
    place = given.place
    if not is_address(place) and Path(place).is_dir():
        return _folder(given)
    if place.endswith(TARS):
        return _tar(given)
    if kind_of(place) is not None:
        return _manifest(given)
    if Path(place).suffix.lower() in VIDEOS | IMAGES:
        return _single(place)
    if is_address(place):
        return _remote_folder(given)
    if os.path.lexists(place) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", place):
        raise UserError(f"nothing here can be read, {place}. Give a folder of clips, a manifest (json, jsonl, csv, parquet), tar files, or a dataset")
    return _dataset(given)


def _single(place: str) -> Iterator[Source]:
    if is_address(place):
        yield Source(place, place, AtAddress(place), source=place)
        return
    if not Path(place).is_file():
        raise UserError(f"no such file, {place}. Check the path")
    yield Source(Path(place).name, place, OnDisk(Path(place)), source=place)


# Rows


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
    extra = {_whole(str(key)): _plain(value) for key, value in row.values.items() if key not in found.values()}
    return Said(text, licence, source, own, extra, _whole(row.error or fault), "; ".join(remarks))


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
    return _source(told, told.id or _whole(name) or row.where, file, None if error else opener, origin, error)


def _source(told: Said, name: str, file: str, opener: Opener | None, origin: str, error: str) -> Source:
    return Source(name, _whole(file), opener, told.text, told.licence, told.source or origin, told.extra, _whole(error), told.remarks, bool(told.id))


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
        return _whole(value), f"the {what} is not UTF-8"
    return value, ""


def _whole(text: str) -> str:
    """A text with what is no character written out."""
    return text.encode("utf-8", "backslashreplace").decode()


def _plain(value: Any) -> Any:
    """As JSON says it."""
    if isinstance(value, Mapping):
        return {_whole(str(key)): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, bool | int | float) or value is None else _whole(str(value))


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


# Manifests


def _manifest(given: Input) -> Iterator[Source]:
    kind, name = kind_of(given.place), PurePosixPath(given.place).name
    place = _place_of(given)
    rows = _manifest_rows(given.place, kind or "", name)
    for number, row in enumerate(rows):
        source = source_of(row, place, given.columns, given.place)
        if not number and kind in ("csv", "parquet") and source.error.startswith("no column"):
            raise UserError(f"{source.error}, {given.place}. It has {', '.join(row.values)}: name one, --columns.video NAME")
        yield source


def _place_of(given: Input) -> Place:
    if given.root is not None:
        return Place(folder=given.root)
    return Place(address=given.place.rpartition("/")[0]) if is_address(given.place) else Place(folder=Path(given.place).parent)


def _manifest_rows(place: str, kind: str, name: str) -> Iterator[Row]:
    if kind != "parquet":
        with open_place(place) as file:
            yield from READERS[kind](file, name)
        return
    with tempfile.TemporaryDirectory() as folder, on_disk(AtAddress(place) if is_address(place) else OnDisk(Path(place)), Path(folder)) as path:
        yield from parquet_rows(path, name)


# Folders


def _folder(given: Input) -> Iterator[Source]:
    """A folder of clips; without any, of the tar or parquet files in it."""
    folder, empty = Path(given.place), True
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        yield from _dataset(given)
        return
    for source in _clips(folder, given):
        empty = False
        yield source
    packed = sorted(str(path) for path in folder.rglob("*") if path.name.endswith((*TARS, ".parquet")) and path.is_file()) if empty else []
    for path in packed:
        yield from _of(given._replace(place=path))
    if empty and not packed:
        raise UserError(f"no clips, {folder}. Give a folder with clips, a {TABLE}, tar or parquet files")


def _clips(folder: Path, given: Input) -> Iterator[Source]:
    """The rows of every table, names beginning in its folder; then the clips that no table names: with the text beside them, or, where there is a table, as rows with an error."""
    tables, known = [path for path in sorted(folder.rglob(TABLE)) if not _hidden(path, folder)], Keys()
    for table in tables:
        with open_place(str(table)) as file:
            for row in READERS["lines"](file, table.relative_to(folder).as_posix()):
                source = source_of(row, Place(folder=given.root or table.parent), given.columns, given.place)
                known.add(_digest(os.path.abspath(source.file)))
                above = table.parent.relative_to(folder).as_posix()
                yield source if source.named or above == "." else source._replace(id=f"{above}/{source.id}")
    for name in media_in(folder):
        if _digest(os.path.abspath(folder / name)) not in known:
            yield _neighbour(folder, name, next((table for table in tables if (folder / name).is_relative_to(table.parent)), None), given.place)


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _neighbour(folder: Path, name: str, table: Path | None, origin: str) -> Source:
    path = folder / name
    values: dict[str, Any] = {"file_name": name}
    error = f"not in {table.relative_to(folder).as_posix()}" if table is not None else ""
    try:
        if (beside := inside(folder, name).with_suffix(".txt")).is_file():
            values["text"] = inside(folder, beside.relative_to(folder).as_posix()).read_bytes()[:LONGEST_TEXT].removeprefix(b"\xef\xbb\xbf").strip()
    except (UserError, OSError) as told:
        error = error or _whole(str(told).partition(",")[0])
    return source_of(Row(values, str(path), error), Place(folder=folder), Columns(), origin)


def _remote_folder(given: Input) -> Iterator[Source]:
    """The clips below an address, with the texts beside them, or the manifest or tar files in it."""
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(given.place)
        names = sorted(system.find(root))
    except Exception as error:  # every file system raises its own
        raise UserError(f"cannot list {given.place}: {_one_line(error)}. Give the address of a manifest, of tar files, or of a folder that can be listed") from error
    addresses = [system.unstrip_protocol(name) for name in names]
    table = next((address for address in addresses if address.endswith(f"/{TABLE}")), None)
    packed = [address for address in addresses if address.endswith(TARS)]
    clips = [address for address in addresses if PurePosixPath(address).suffix.lower() in VIDEOS | IMAGES]
    if table or packed:
        for address in [table] if table else packed:
            yield from _of(given._replace(place=address))
        return
    if not clips:
        raise UserError(f"no clips, {given.place}. Give the address of a folder with clips, a manifest or tar files")
    there, base = set(addresses), given.place.rstrip("/")
    for address in clips:
        values: dict[str, Any] = {"file_name": address}
        if (beside := str(PurePosixPath(address.partition("://")[2]).with_suffix(".txt"))) and f"{address.partition('://')[0]}://{beside}" in there:
            with open_address(f"{address.partition('://')[0]}://{beside}") as file:
                values["text"] = file.read(LONGEST_TEXT).strip()
        yield source_of(Row(values, address), Place(address=base), Columns(), given.place)


# Tar files


def _tar(given: Input) -> Iterator[Source]:
    """Clips of a tar file, each with the json and txt of its name. Names are those of the members up to the first dot, as webdataset has them."""
    try:
        with open_place(given.place) as file:
            plain = given.place.endswith(".tar") and file.seekable()
            with tarfile.open(fileobj=file, mode="r:" if plain else "r|*", tarinfo=_Member) as tar:
                yield from _groups(tar, given, packed=not plain)
    except (tarfile.TarError, EOFError, OSError) as error:
        name = PurePosixPath(given.place).name
        yield Source(f"{name}::end", given.place, None, source=given.place, error=f"the tar file cannot be read to its end: {_one_line(error)}")


class _Member(tarfile.TarInfo):
    """Damage in the middle of a file, which tarfile takes for its end, is an error."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> _Member:
        try:
            return super().frombuf(buf, encoding, errors)
        except (tarfile.TruncatedHeaderError, tarfile.InvalidHeaderError) as error:
            raise tarfile.SubsequentHeaderError(str(error)) from error


def _groups(tar: tarfile.TarFile, given: Input, *, packed: bool) -> Iterator[Source]:
    """The clips of each name; what was read before the file breaks off comes before the error does."""
    key, group, broken = "", dict[str, Any](), None
    members = iter(tar)
    while True:
        try:
            if (member := next(members, None)) is None:
                break
        except (tarfile.TarError, EOFError, OSError) as error:
            broken = error
            break
        tar.members = []  # which it would all keep
        if not member.isfile() or PurePosixPath(member.name).name.startswith("."):
            continue
        head, _, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        own = f"{head}/{stem}" if head else stem
        if own != key:
            yield from _grouped(key, group, given)
            key, group = own, {}
        _take(tar, member, f".{extension.lower()}", group, given.place, packed=packed)
    yield from _grouped(key, group, given)
    if broken is not None:
        raise broken


def _take(tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str, group: dict[str, Any], place: str, *, packed: bool) -> None:
    """Adds what a member says to what is known of its name."""
    ending = f".{extension.rpartition('.')[2]}"
    if ending in VIDEOS | IMAGES:
        if not packed:
            group.setdefault("clips", []).append((member.name, Within(place, member.offset_data, member.size)))
            return
        small = member.size <= LONGEST_MEMBER
        group.setdefault("clips", []).append((member.name, Held(tar.extractfile(member).read()) if small else None))  # type: ignore[union-attr]
    elif ending in (".txt", ".json") and member.size <= LONGEST_TEXT:
        group[ending] = tar.extractfile(member).read()  # type: ignore[union-attr]


def _grouped(key: str, group: Mapping[str, Any], given: Input) -> Iterator[Source]:
    """The clips of one name."""
    name, values, error = PurePosixPath(given.place).name, dict[str, Any](), ""
    if ".json" in group:
        row = json_row(group[".json"], key)
        values, error = dict(row.values), row.error
    if ".txt" in group:
        values["text"] = group[".txt"].removeprefix(b"\xef\xbb\xbf").strip()
    told = said(Row(values, key, error), given.columns)
    for member, opener in group.get("clips", ()):
        fault = told.error or ("" if opener is not None else f"larger than {LONGEST_MEMBER >> 30} GiB in a tar file that is packed")
        yield _source(told, told.id or _whole(f"{name}::{member}"), f"{given.place}::{member}", None if fault else opener, given.place, fault)
    if group and not group.get("clips"):
        yield Source(_whole(f"{name}::{key}"), _whole(f"{given.place}::{key}"), None, source=given.place, error="no clip of that name in the tar file")


# Datasets


def _dataset(given: Input) -> Iterator[Source]:
    """A dataset on the hub, or one that was saved into a folder."""
    folder = Path(given.place)
    rows = _saved(folder, given.split) if folder.is_dir() else load_rows(Stream(path=given.place, split=given.split))
    place = Place(folder=folder) if folder.is_dir() else Place()
    found = iter(rows)
    number = 0
    while True:
        number += 1
        try:
            values = next(found, None)
        except Exception as error:  # datasets and what is under it raise many
            raise UserError(f"cannot read the dataset behind row {number - 1}, {given.place}: {_one_line(error)}. Check the connection, then run the same command again") from error
        if values is None:
            return
        yield source_of(Row(values, f"row {number} of {given.place}"), place, given.columns, given.place)


def _saved(folder: Path, split: str) -> Any:
    from datasets import DatasetDict, Video, load_from_disk

    try:
        rows = load_from_disk(str(folder))
        rows = rows[split] if isinstance(rows, DatasetDict) else rows
        for column in [column for column, feature in rows.features.items() if isinstance(feature, Video)]:
            rows = rows.cast_column(column, Video(decode=False))
    except Exception as error:
        raise UserError(f"cannot open the dataset {folder}: {_one_line(error)}. Save it again, or name another --split") from error
    return rows


def _one_line(error: BaseException) -> str:
    told = str(error).strip().splitlines()
    return told[0][:200] if told else type(error).__name__

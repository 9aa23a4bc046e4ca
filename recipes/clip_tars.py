"""Clips of tar files, as webdataset lays them out: members of one name up to the first dot are one clip (or several) with its json and txt. Also packed ones, and over http."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from recipes.clip_folder import IMAGES, VIDEOS
from recipes.clip_openers import Held, Within, one_line, open_place
from recipes.clip_rows import Input, Source, as_source, said, whole_text
from recipes.manifests import Row, json_row

TARS = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
LONGEST_MEMBER = 1 << 30  # bytes of a clip in a tar file that cannot be read anywhere but from its beginning
LONGEST_TEXT = 16 << 20  # bytes of a text beside a clip
_TAR: Any = tarfile  # with names that typeshed does not know


def tar_sources(given: Input) -> Iterator[Source]:
    """Clips of a tar file, each with the json and txt of its name. Names are those of the members up to the first dot, as webdataset has them."""
    try:
        with open_place(given.place) as file:
            plain = given.place.endswith(".tar") and file.seekable()
            with tarfile.open(fileobj=file, mode="r:" if plain else "r|*", tarinfo=_Member) as tar:
                yield from _groups(tar, given, packed=not plain)
    except (tarfile.TarError, EOFError, OSError) as error:
        name = PurePosixPath(given.place).name
        yield Source(f"{name}::end", given.place, None, source=given.place, error=f"the tar file cannot be read to its end: {one_line(error)}")


class _Member(tarfile.TarInfo):
    """Damage in the middle of a file, which tarfile takes for its end, is an error."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Member:
        try:
            return super().frombuf(buf, encoding, errors)
        except (_TAR.TruncatedHeaderError, _TAR.InvalidHeaderError) as error:
            raise _TAR.SubsequentHeaderError(str(error)) from error


def _groups(tar: Any, given: Input, *, packed: bool) -> Iterator[Source]:
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


def _take(tar: Any, member: tarfile.TarInfo, extension: str, group: dict[str, Any], place: str, *, packed: bool) -> None:
    """Adds what a member says to what is known of its name."""
    ending = f".{extension.rpartition('.')[2]}"
    if ending in VIDEOS | IMAGES:
        if not packed:
            group.setdefault("clips", []).append((member.name, Within(place, member.offset_data, member.size)))
            return
        small = member.size <= LONGEST_MEMBER
        group.setdefault("clips", []).append((member.name, Held(tar.extractfile(member).read()) if small else None))
    elif ending in (".txt", ".json") and member.size <= LONGEST_TEXT:
        group[ending] = tar.extractfile(member).read()


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
        yield as_source(told, told.id or whole_text(f"{name}::{member}"), f"{given.place}::{member}", None if fault else opener, given.place, fault)
    if group and not group.get("clips"):
        yield Source(whole_text(f"{name}::{key}"), whole_text(f"{given.place}::{key}"), None, source=given.place, error="no clip of that name in the tar file")

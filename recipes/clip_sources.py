"""Where clips come from: a folder, a manifest, tar files, a dataset, any address that fsspec knows -> a stream of sources, one for every clip or row that is there.

A source is a way to a clip's bytes, taken when the clip is looked at, and what is told about it; one that cannot be used has an error, and is never gone. In memory are one row and
some 60 bytes for each that came before. Nothing is decoded.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from base_model.errors import UserError
from recipes.clip_folder import IMAGES, TABLE, VIDEOS, inside, media_in
from recipes.clip_openers import AtAddress, OnDisk, is_address, on_disk, one_line, open_address, open_place
from recipes.clip_rows import Columns, Input, Keys, Place, Source, digest_of, source_of, whole_text
from recipes.clip_stream import Stream, load_rows
from recipes.clip_tars import LONGEST_TEXT, TARS, tar_sources
from recipes.manifests import READERS, Row, kind_of, parquet_rows


def sources(given: Input) -> Iterator[Source]:
    """Everything that is there, in an order that does not change while it stays there. Ids are unique: a second row under an id is one with an error.

    A clip that is named by several rows without ids is several sources where their captions differ. Raises UserError where there is nothing of a kind that can be read.
    """
    ids, told = Keys(), Keys()
    for number, source in enumerate(_all(given), 1):
        known, again = not ids.add(digest_of(source.id)), not told.add(digest_of(json.dumps([source.id, source.text])))
        if known and (source.named or again):
            what = f"the id {source.id!r} stands in an earlier row" if source.named else "an earlier row has the same clip and caption"
            source = source._replace(id=f"{source.id}#{number}", opener=None, error=source.error or what)
            ids.add(digest_of(source.id))
        elif known:
            source = source._replace(id=f"{source.id}#{digest_of(source.text):016x}")
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
        raise UserError(f"not a parquet file that can be read, {path}: {one_line(error)}. Download it again") from error


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
    import fsspec  # type: ignore[import-untyped]

    try:
        system, pattern = fsspec.core.url_to_fs(place)
        found = sorted(system.unstrip_protocol(name) if is_address(place) else name for name in system.glob(pattern))
    except Exception as error:  # every file system raises its own
        raise UserError(f"cannot list {place}: {one_line(error)}. Check the address and the connection") from error
    if not found:
        raise UserError(f"no file is called {place}, input. Check the pattern")
    return found


def _of(given: Input) -> Iterator[Source]:
    """The sources of one place."""
    place = given.place
    if not is_address(place) and Path(place).is_dir():
        return _folder(given)
    if place.endswith(TARS):
        return tar_sources(given)
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
                known.add(digest_of(os.path.abspath(source.file)))
                above = table.parent.relative_to(folder).as_posix()
                yield source if source.named or above == "." else source._replace(id=f"{above}/{source.id}")
    for name in media_in(folder):
        if digest_of(os.path.abspath(folder / name)) not in known:
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
        error = error or whole_text(str(told).partition(",")[0])
    return source_of(Row(values, str(path), error), Place(folder=folder), Columns(), origin)


def _remote_folder(given: Input) -> Iterator[Source]:
    """The clips below an address, with the texts beside them, or the manifest or tar files in it."""
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(given.place)
        names = sorted(system.find(root))
    except Exception as error:  # every file system raises its own
        raise UserError(f"cannot list {given.place}: {one_line(error)}. Give the address of a manifest, of tar files, or of a folder that can be listed") from error
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


# Datasets


def _dataset(given: Input) -> Iterator[Source]:
    """A dataset on the hub, or one that was saved into a folder."""
    folder = Path(given.place)
    rows = _saved(folder, given.split) if folder.is_dir() else _of_the_hub(given)
    place = Place(folder=folder) if folder.is_dir() else Place()
    found = iter(rows)
    number = 0
    while True:
        number += 1
        try:
            values = next(found, None)
        except Exception as error:  # datasets and what is under it raise many
            raise UserError(f"cannot read the dataset behind row {number - 1}, {given.place}: {one_line(error)}. Check the connection, then run the same command again") from error
        if values is None:
            return
        yield source_of(Row(values, f"row {number} of {given.place}"), place, given.columns, given.place)


def _of_the_hub(given: Input) -> Any:
    try:
        return load_rows(Stream(path=given.place, split=given.split))
    except UserError as error:
        why = one_line(error.__cause__ or error)
        raise UserError(f"neither a file or folder here nor a dataset, {given.place}: {why}. Check the path; for a dataset on the hub set HF_HUB_OFFLINE=0") from error


def _saved(folder: Path, split: str) -> Any:
    from datasets import DatasetDict, Video, load_from_disk

    try:
        rows = load_from_disk(str(folder))
        rows = rows[split] if isinstance(rows, DatasetDict) else rows
        for column in [column for column, feature in rows.features.items() if isinstance(feature, Video)]:
            rows = rows.cast_column(column, Video(decode=False))
    except Exception as error:
        raise UserError(f"cannot open the dataset {folder}: {one_line(error)}. Save it again, or name another --split") from error
    return rows

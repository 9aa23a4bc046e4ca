"""The folder of clips that were kept, as `rushes encode --clips` and `rushes sft --data` read it: files, and `metadata.jsonl`.

A clip that is a file of this machine is linked (a hard link: readers of such folders follow no symbolic ones), never moved; one in a tar file, at an address or in a row is
written out.
Names end in the beginning of the file's sha256, so the same clip has the same name, and nothing leads out of the folder.
"""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from base_model.checkpoint import atomic_write, disk_errors
from base_model.errors import UserError
from recipes.clip_folder import TABLE
from recipes.clip_openers import Opener, fetch
from recipes.clip_rows import Input
from recipes.clip_scores import SUFFIXES
from recipes.clip_sources import sources

OURS = re.compile(r".*-[0-9a-f]{16}(\.[a-z0-9]+)?")
LONGEST_STEM = 60

Files = Literal["link", "copy"]


def kept_name(row: Mapping[str, Any]) -> str:
    """What the file of a row of the table is called in the folder."""
    name = PurePosixPath(re.split("[?#]", str(row["file"]))[0])
    suffix, known = name.suffix.lower(), SUFFIXES.get(str(row["container"]), ())
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", name.name.removesuffix(name.suffix) or "clip").lstrip(".")[:LONGEST_STEM]
    return f"{stem}-{row['sha256'][:16]}{suffix if suffix in known or not known else known[0]}"


def write_kept(folder: Path, rows: Sequence[Mapping[str, Any]], given: Input, *, files: Files = "link") -> int:
    """Makes the folder hold these rows of the table and no others; returns how many files came new. What is there already is not touched, nor is anything read for it.

    Raises UserError where a file cannot be linked, fetched or written: what came before stays, and so does the old `metadata.jsonl`.
    """
    names = {row["key"]: kept_name(row) for row in rows}
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        there = {entry.name for entry in os.scandir(folder)}
    missing = {key: name for key, name in names.items() if name not in there}
    came = _bring(folder, missing, given, files) if missing else 0
    lines = [json.dumps(_told(row, names[row["key"]]), ensure_ascii=False) + "\n" for row in rows]
    atomic_write(folder / TABLE, "".join(lines).encode())
    for name in there - set(names.values()):
        if OURS.fullmatch(name) or name.startswith("fetched-"):
            (folder / name).unlink()
    return came


def _told(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    extra = json.loads(row["extra"] or "{}")
    return {"file_name": name, "text": row["text"], "licence": row["licence"], "source": row["source"], "id": row["id"], **({"extra": extra} if extra else {})}


def _bring(folder: Path, missing: Mapping[int, str], given: Input, files: Files) -> int:
    came = set[str]()
    for opener, name in _openers(missing, given):
        if name not in came:
            _place(opener, folder / name, files)
            came.add(name)
    if gone := set(missing.values()) - came:
        raise UserError(f"{len(gone)} clips changed since they were measured, the first is {min(gone)}, {given.place}. Run the same command again")
    return len(came)


def _openers(missing: Mapping[int, str], given: Input) -> Iterator[tuple[Opener, str]]:
    left = set(missing)
    for source in sources(given):
        if source.opener is not None and (key := source.key) in left:
            left.discard(key)
            yield source.opener, missing[key]
        if not left:
            return


def _place(opener: Opener, path: Path, files: Files) -> None:
    if opener.path is not None and files == "link":
        try:
            os.link(opener.path.resolve(), path)
        except OSError as error:
            if error.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
                raise UserError(
                    f"cannot link {opener.path} into {path.parent}: {error.strerror}. Give --files copy, or an --out on the same file system: scores are kept"
                ) from error
            raise UserError(f"cannot link {opener.path} into {path.parent}: {error.strerror}. Run the same command again") from error
        return
    with disk_errors(path), tempfile.NamedTemporaryFile(dir=path.parent, prefix="fetched-", delete=False) as file:
        try:
            fetch(opener, file)
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise

"""Files that people look at, by content: `media/ab/abcd....clip.mp4` and what is shown instead of it.

A file's name is made of a clip's digest out of the database, never of what a request says; it is opened below the store's folder without following links. A player is given
one range of
bytes, of at most 4 MiB at a time: it asks for what comes behind. Who asks for several ranges is given the whole file, or its first 4 MiB, so nobody makes the server put
thousands together.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from fastapi import Request
from starlette.responses import Response

from reward.app.security import Denied
from reward.app.store import Store

CLIP = "clip.mp4"
"""The clip itself, as it is played."""
VARIANTS = (CLIP, "blur.jpg", "light.jpg", "edges.jpg", "sheet.jpg", "facts.json")
"""All that is made of a clip (`worker.py`)."""
DIGEST = re.compile(r"[0-9a-f]{64}")
ONE_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
TYPES = {".mp4": "video/mp4", ".jpg": "image/jpeg", ".png": "image/png"}
MOST_BYTES = 4 << 20


def path_of(store: Store, clip_id: str, variant: str = CLIP) -> Path:
    """Where a variant of a clip lies. clip_id: 64 hexadecimal digits."""
    if not DIGEST.fullmatch(clip_id):
        raise ValueError(f"{clip_id!r} is no digest")
    return store.media / clip_id[:2] / f"{clip_id}.{variant}"


def missing_of(store: Store, clip_id: str) -> list[str]:
    """The variants of a clip that are not there."""
    return [variant for variant in VARIANTS if not path_of(store, clip_id, variant).is_file()]


def send(request: Request, store: Store, clip_id: str, variant: str = CLIP) -> Response:
    """The file, or the range of it that is asked for. Raises Denied, 404, where it is not there: a clip that cannot be shown is never taken for one that was seen."""
    path = path_of(store, clip_id, variant)
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            file = os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise Denied(404, "this clip cannot be shown: its file is not there") from error
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise Denied(404, "this clip cannot be shown: its file is not there")
        return _part(file, status.st_size, request.headers.get("range"), TYPES[path.suffix])
    finally:
        os.close(file)


def _part(file: int, size: int, asked: str | None, kind: str) -> Response:
    """A range that is none, or several, is as none: the file from its beginning."""
    found = ONE_RANGE.fullmatch(asked.replace(" ", "")) if asked and len(asked) < 100 else None
    first, last = (found[1], found[2]) if found else ("", "")
    headers = {"Accept-Ranges": "bytes"}
    if not first and not last:
        begin, end = 0, size
    elif first:
        begin, end = int(first), min(size, int(last) + 1) if last else size
    else:
        begin, end = max(0, size - int(last)), size
    if begin >= end and size:
        return Response(status_code=416, headers={**headers, "Content-Range": f"bytes */{size}"})
    end = min(end, begin + MOST_BYTES)
    whole = (begin, end) == (0, size) and not (first or last)
    if not whole:
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
    return Response(os.pread(file, end - begin, begin), 200 if whole else 206, headers=headers, media_type=kind)

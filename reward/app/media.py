"""Files that people look at, by content: `media/ab/abcd....mp4` and what is shown instead of it.

A file's name is made of a clip's digest out of the database, never of what a request says; it is opened below the store's folder without following links. One range of bytes
is served, which is what
players ask for; for several the whole file comes back, so nobody makes the server put thousands together.
"""

from __future__ import annotations

import re
from pathlib import Path

from fastapi import Request
from starlette.responses import FileResponse, Response

from reward.app.security import Denied
from reward.app.store import Store

CLIP = "clip.mp4"
"""The clip itself, as it is played."""
DIGEST = re.compile(r"[0-9a-f]{64}")
TYPES = {".mp4": "video/mp4", ".jpg": "image/jpeg", ".png": "image/png"}


def path_of(store: Store, clip_id: str, variant: str = CLIP) -> Path:
    """Where a variant of a clip lies. clip_id: 64 hexadecimal digits."""
    if not DIGEST.fullmatch(clip_id):
        raise ValueError(f"{clip_id!r} is no digest")
    return store.media / clip_id[:2] / f"{clip_id}.{variant}"


def send(request: Request, store: Store, clip_id: str, variant: str = CLIP) -> Response:
    """The file, or the one range of it that is asked for. Raises Denied, 404, where it is not there: a clip that cannot be shown is never taken for one that was seen."""
    path = path_of(store, clip_id, variant)
    root = store.media.resolve()
    if path.is_symlink() or not path.is_file() or path.resolve().parent.parent != root:
        raise Denied(404, "this clip cannot be shown: its file is not there")
    if "," in request.headers.get("range", ""):
        request.scope["headers"] = [(name, value) for name, value in request.scope["headers"] if name != b"range"]
    return FileResponse(path, media_type=TYPES[path.suffix], headers={"Accept-Ranges": "bytes"}, content_disposition_type="inline")

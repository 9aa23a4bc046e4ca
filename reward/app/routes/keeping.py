"""What leads take out of the app, and what they delete from it."""

from __future__ import annotations

import shutil
import tempfile
import threading
from pathlib import Path
from typing import Annotated

from fastapi import Depends
from starlette.background import BackgroundTask
from starlette.responses import FileResponse

from reward.app import exporting
from reward.app.access import LEAD, READERS, StoreOf, may
from reward.app.security import Actor, Denied
from reward.app.web import Done, Pages
from pydantic import BaseModel

pages = Pages("keeping")
Lead = Annotated[Actor, Depends(may(LEAD))]
Reader = Annotated[Actor, Depends(may(*READERS))]
_one = threading.Lock()
"""One export at a time is made: each reads every answer of a project."""


@pages.router.get("/api/projects/{project_id}/export/{format}", tags=["keeping"], name="api_export")
def export(project_id: str, format: exporting.Format, me: Reader, store: StoreOf, dimension: str | None = None, gold: bool = False) -> FileResponse:
    """What people said, as a file; what was given out is logged by its hash."""
    if not _one.acquire(blocking=False):
        raise Denied(429, "another export is being made. Try again in a moment")
    folder = Path(tempfile.mkdtemp(prefix="rushes-export-"))
    try:
        written = exporting.export(store, project_id, format, folder, by=me.pseudonym, dimension=dimension, gold=gold)
    except BaseException:
        shutil.rmtree(folder)
        raise
    finally:
        _one.release()
    return FileResponse(written.path, filename=written.path.name, headers={"X-SHA256": written.sha256}, background=BackgroundTask(shutil.rmtree, folder))

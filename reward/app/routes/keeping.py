"""What leads take out of the app, and what they delete from it."""

from __future__ import annotations

import shutil
import tempfile
import threading
from pathlib import Path
from typing import Annotated

from fastapi import Depends
from pydantic import BaseModel, Field
from sqlalchemy import select
from starlette.background import BackgroundTask
from starlette.responses import FileResponse

from base_model.errors import UserError
from reward.app import deleting, exporting
from reward.app.access import CHILD_SAFETY, LEAD, READERS, StoreOf, may
from reward.app.schema import membership, person
from reward.app.security import Actor, Denied
from reward.app.web import Done, Pages

pages = Pages("keeping")
Lead = Annotated[Actor, Depends(may(LEAD))]
Deleter = Annotated[Actor, Depends(may(LEAD, CHILD_SAFETY))]
Reader = Annotated[Actor, Depends(may(*READERS))]
_one = threading.Lock()
"""One export at a time is made: each reads every answer of a project."""


@pages.router.get("/api/projects/{project_id}/export/{format}", tags=["keeping"], name="api_export")
def export(project_id: str, format: exporting.Format, me: Reader, store: StoreOf, dimension: str | None = None, gold: bool = False) -> FileResponse:
    """What people said, as a file; what was given out is logged by its hash."""
    if not _one.acquire(blocking=False):
        raise Denied(429, "another export is being made. Try again in a moment")
    try:
        folder = Path(tempfile.mkdtemp(prefix="rushes-export-"))
        try:
            written = exporting.export(store, project_id, format, folder, by=me.pseudonym, dimension=dimension, gold=gold)
        except BaseException:
            shutil.rmtree(folder)
            raise
    finally:
        _one.release()
    return FileResponse(written.path, filename=written.path.name, headers={"X-SHA256": written.sha256}, background=BackgroundTask(shutil.rmtree, folder))


class Deletion(BaseModel):
    confirm: Annotated[str, Field(max_length=100)]
    """The pseudonym of the person, or the id of the clip, once more: so that nobody is deleted by a slip."""


@pages.action("/projects/{project_id}/lead/people/{person_id}/delete")
def delete_person(project_id: str, person_id: str, body: Deletion, me: Lead, store: StoreOf) -> Done:
    """Deletes who somebody is: name, login, own words. Answers stay under the pseudonym."""
    with store.reading() as db:
        pseudonym = db.execute(select(person.c.pseudonym).where(person.c.id == person_id, person.c.state != "deleted")).scalar()
        member_of = set(db.execute(select(membership.c.project_id).where(membership.c.person_id == person_id)).scalars())
    if pseudonym is None or not member_of & {project_id, "*"}:
        raise Denied(404, "there is nothing here")
    if not all(me.has(LEAD, each) for each in member_of):
        raise Denied(403, "this person also works in projects that you do not lead. Ask somebody who leads all of them")
    if body.confirm != pseudonym:
        raise UserError("the pseudonym is not the one of this person, confirm. Write it as it stands on the page")
    gone = deleting.delete_person(store, person_id, me.pseudonym)
    left = "" if gone else ". Old bytes leave the database's log once those who read it now have ended"
    return Done(done=f"{pseudonym} has no name any more{left}", go=f"/projects/{project_id}/lead/people")


@pages.action("/projects/{project_id}/lead/clips/{clip_id}/delete")
def delete_clip(project_id: str, clip_id: str, body: Deletion, me: Deleter, store: StoreOf) -> Done:
    """Deletes the media of a clip for good. One that is restricted can be deleted by the child-safety role alone."""
    restricted, others = me.has(CHILD_SAFETY, project_id), me.has(LEAD, project_id)
    if body.confirm != clip_id:
        raise UserError("the id is not the one of this clip, confirm. Write it as it stands on the page")
    deleting.delete_clip(store, project_id, clip_id, me.pseudonym, restricted=restricted, others=others)
    return Done(done=f"{clip_id} is deleted")


class Kept(BaseModel):
    deleted: int
    """Clips whose media were deleted now."""


@pages.action("/projects/{project_id}/lead/retain")
def retain(project_id: str, me: Lead, store: StoreOf) -> Kept:
    """Deletes the media of clips that were withdrawn longer ago than the project keeps them."""
    return Kept(deleted=deleting.retain(store, project_id, me.pseudonym))

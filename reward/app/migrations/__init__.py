"""Steps from each schema to the next. A step is never changed once it was released; `versions/` holds one file each."""

from __future__ import annotations

import logging
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine

from base_model.errors import UserError

logger = logging.getLogger(__name__)


def config(engine: Engine) -> Config:
    found = Config()
    found.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    found.attributes["engine"] = engine
    return found


def upgrade(engine: Engine, to: str = "head") -> None:
    """Brings a database to a version; an empty one, too. Says so, in the log, of one that is not empty. Raises UserError where it was written by a newer app."""
    chosen = config(engine)
    scripts = ScriptDirectory.from_config(chosen)
    with engine.connect() as db:
        at = MigrationContext.configure(db).get_current_revision()
    if at is not None and at not in {each.revision for each in scripts.walk_revisions()}:
        raise UserError(f"the store is of schema {at}, which this version of rushes does not know. Install the newer version that wrote it")
    wanted = scripts.get_current_head() if to == "head" else to
    if at != wanted:
        if at is not None:
            logger.warning("the store goes from schema %s to %s; the version that wrote it cannot open it any more, but opens a backup that it made before", at, wanted)
        command.upgrade(chosen, to)

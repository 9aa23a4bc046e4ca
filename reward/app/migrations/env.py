"""How alembic runs the steps: all of them in one transaction of the engine it is given, one process after the other. Killed on the way, the database is as it was before."""

from alembic import context
from sqlalchemy import func, select

from reward.app.schema import metadata
from reward.app.store import WRITER

engine = context.config.attributes["engine"]
with engine.connect().execution_options(rushes_writes=True) as db, db.begin():
    if engine.dialect.name == "postgresql":
        db.execute(select(func.pg_advisory_xact_lock(WRITER)))
    context.configure(connection=db, target_metadata=metadata, render_as_batch=True)
    context.run_migrations()

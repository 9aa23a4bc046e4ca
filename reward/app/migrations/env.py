"""How alembic runs the steps: in one transaction of the engine it is given."""

from alembic import context

from reward.app.schema import metadata

engine = context.config.attributes["engine"]
with engine.connect().execution_options(rushes_writes=True) as db:
    context.configure(connection=db, target_metadata=metadata, render_as_batch=True)
    context.run_migrations()
    db.commit()

"""Which clip a copy was made of that was made worse on purpose, and clips by content."""

import json
from contextlib import suppress

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

clip = sa.table(
    "clip",
    sa.column("id", sa.String(40)),
    sa.column("project_id", sa.String(40)),
    sa.column("clip_id", sa.String(64)),
    sa.column("run", sa.String(200)),
    sa.column("row", sa.JSON()),
    sa.column("made_of", sa.String(40)),
)


def upgrade() -> None:
    op.add_column("clip", sa.Column("made_of", sa.String(40)))
    op.create_index(op.f("ix_clip_made_of"), "clip", ["made_of"], unique=False)
    op.create_index(op.f("ix_clip_clip_id"), "clip", ["clip_id"], unique=False)
    db = op.get_bind()
    for copy in db.execute(sa.select(clip).where(clip.c.run == "planted")).all():
        of = None
        with suppress(ValueError, AttributeError):
            of = json.loads(copy.row.get("sampler_json") or "{}").get("of") if copy.row.get("generator") == "planted" else None
        source = sa.select(clip.c.id).where(clip.c.project_id == copy.project_id, clip.c.clip_id == of).scalar_subquery()
        if of:
            db.execute(sa.update(clip).where(clip.c.id == copy.id).values(made_of=source))

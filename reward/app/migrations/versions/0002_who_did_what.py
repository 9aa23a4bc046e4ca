"""Indexes of what somebody did, and of what a project revealed: the log by person, and exposure by project."""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index(op.f("ix_event_actor_seq"), "event", ["actor", "seq"], unique=False)
    op.create_index(op.f("ix_reveal_project_id_at"), "reveal", ["project_id", "at"], unique=False)

"""The tables of the app. What people said is only ever added to: `answer`, `review`, `reveal`, `withdrawal` and `event` refuse changes and deletions in the database itself.

Times are whole milliseconds since 1970, UTC. Ids are random and say nothing; a clip's `clip_id` is the sha256 of its frames, as everywhere, and no page shows it to who judges.
What could name a person is in `person_private` and `private_text` and nowhere else: deleting there deletes the person, and no answer.
"""

from __future__ import annotations

from sqlalchemy import JSON, BigInteger, Boolean, Column, Float, ForeignKey, Index, Integer, MetaData, String, Table, Text, UniqueConstraint, text

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

ID = String(40)

# People

person = Table(
    "person",
    metadata,
    Column("id", ID, primary_key=True),
    Column("pseudonym", ID, nullable=False, unique=True),
    Column("state", String(16), nullable=False),  # active, paused, disabled, deleted
    Column("settings", JSON, nullable=False),  # how media are shown, reminders, policies opted out of
    Column("created_at", BigInteger, nullable=False),
)

person_private = Table(
    "person_private",
    metadata,
    Column("person_id", ID, ForeignKey("person.id"), primary_key=True),
    Column("login", String(200), nullable=False, unique=True),
    Column("name", String(200), nullable=False),
    Column("password_hash", Text, nullable=False),
)

private_text = Table(
    "private_text",
    metadata,
    Column("id", ID, primary_key=True),
    Column("person_id", ID, ForeignKey("person.id"), nullable=False, index=True),
    Column("text", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
)

project = Table(
    "project",
    metadata,
    Column("id", ID, primary_key=True),
    Column("name", String(200), nullable=False, unique=True),
    Column("state", String(16), nullable=False),  # open, closed
    Column("settings", JSON, nullable=False),  # settings.py: ProjectSettings
    Column("created_at", BigInteger, nullable=False),
)

membership = Table(
    "membership",
    metadata,
    Column("person_id", ID, ForeignKey("person.id"), primary_key=True),
    Column("project_id", ID, primary_key=True),  # "*": every project, those to come included
    Column("role", String(16), primary_key=True),
    Column("since", BigInteger, nullable=False),
)

invitation = Table(
    "invitation",
    metadata,
    Column("id", ID, primary_key=True),
    Column("token_hash", String(64), nullable=False, unique=True),
    Column("project_id", ID, nullable=False),
    Column("roles", JSON, nullable=False),
    Column("invited_by", ID, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("used_by", ID),
    Column("used_at", BigInteger),
    Column("revoked_at", BigInteger),
)

session = Table(
    "session",
    metadata,
    Column("id_hash", String(64), primary_key=True),
    Column("person_id", ID, ForeignKey("person.id"), nullable=False, index=True),
    Column("csrf", String(64), nullable=False),
    Column("client", String(64), nullable=False),  # HMAC of address and browser
    Column("created_at", BigInteger, nullable=False),
    Column("seen_at", BigInteger, nullable=False),
    Column("ended_at", BigInteger),
)

api_token = Table(
    "api_token",
    metadata,
    Column("id", ID, primary_key=True),
    Column("token_hash", String(64), nullable=False, unique=True),
    Column("person_id", ID, ForeignKey("person.id"), nullable=False, index=True),
    Column("name", String(200), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("revoked_at", BigInteger),
)

# What is judged

prompt = Table(
    "prompt",
    metadata,
    Column("project_id", ID, ForeignKey("project.id"), primary_key=True),
    Column("prompt_id", String(400), primary_key=True),
    Column("text", Text, nullable=False),
    Column("lang", String(16), nullable=False),
    Column("kind", String(64), nullable=False),  # "benign" where nothing in it asks for what the policies forbid
)

clip = Table(
    "clip",
    metadata,
    Column("id", ID, primary_key=True),
    Column("project_id", ID, ForeignKey("project.id"), nullable=False),
    Column("clip_id", String(64), nullable=False),
    Column("prompt_id", String(400), nullable=False),
    Column("run", String(200), nullable=False),  # the import it came with: a run, a folder
    Column("row", JSON, nullable=False),  # the columns of the label schema (`reward/comparisons.py`, Clip)
    Column("verdict", String(8), nullable=False),  # allow, review, error, block
    Column("score", Float),  # the largest calibrated score of its rulings
    Column("decision", JSON, nullable=False),  # `safety/contract.py: to_json`
    Column("state", String(12), nullable=False),  # live, restricted (child safety only), withdrawn, deleted
    Column("made_of", ID, index=True),  # of a copy that was made worse on purpose: the clip it shows
    Column("created_at", BigInteger, nullable=False),
    UniqueConstraint("project_id", "clip_id"),
    Index(None, "clip_id"),
    Index(None, "project_id", "prompt_id"),
    Index(None, "project_id", "verdict", "state"),
)

# Labeling

task = Table(
    "task",
    metadata,
    Column("id", ID, primary_key=True),
    Column("project_id", ID, ForeignKey("project.id"), nullable=False),
    Column("prompt_id", String(400), nullable=False),
    Column("clips", JSON, nullable=False),  # ids of `clip`
    Column("kind", String(16), nullable=False),  # rank, gold, practice, demonstration
    Column("truth", JSON),  # gold and practice: {dimension: ranks}
    Column("wanted", Integer, nullable=False),  # people who are to answer
    Column("taken", Integer, nullable=False),  # live leases and answers
    Column("answered", Integer, nullable=False),
    Column("priority", Float, nullable=False),  # the most worthwhile first
    Column("shuffle", Float, nullable=False),  # uniform in [0, 1): where the random floor draws from
    Column("state", String(8), nullable=False),  # open, full, held (a clip may not be shown now), closed
    Column("created_at", BigInteger, nullable=False),
    Index(None, "project_id", "kind", "state", "priority"),
    Index(None, "project_id", "kind", "state", "shuffle"),
)

assignment = Table(
    "assignment",
    metadata,
    Column("id", ID, primary_key=True),
    Column("project_id", ID, ForeignKey("project.id"), nullable=False),
    Column("task_id", ID, ForeignKey("task.id"), nullable=False),
    Column("person_id", ID, ForeignKey("person.id"), nullable=False),
    Column("slot", Integer, nullable=False),  # 0 .. wanted - 1: two people never hold one slot of a task
    Column("purpose", String(16), nullable=False),  # active, random, gold, repeat, mirrored, practice, demonstration
    Column("repeat", Integer, nullable=False),  # 0, or which repetition for this person
    Column("shown_order", JSON, nullable=False),  # shown_order[i]: place on the screen of clip i
    Column("issued_at", BigInteger, nullable=False),
    Column("lease_until", BigInteger, nullable=False),
    Column("state", String(10), nullable=False),  # open, answered, skipped, expired
    Column("draft", JSON),
    Index(
        "ix_assignment_slot",
        "task_id",
        "slot",
        unique=True,
        sqlite_where=text("state IN ('open','answered') AND repeat = 0"),
        postgresql_where=text("state IN ('open','answered') AND repeat = 0"),
    ),
    UniqueConstraint("task_id", "person_id", "repeat"),
    Index(None, "person_id", "project_id", "state"),
    Index(None, "state", "lease_until"),
)

answer = Table(
    "answer",
    metadata,
    Column("id", ID, primary_key=True),  # chosen by the client, so that sending it again adds nothing
    Column("project_id", ID, ForeignKey("project.id"), nullable=False),
    Column("task_id", ID, ForeignKey("task.id"), nullable=False, index=True),
    Column("assignment_id", ID, ForeignKey("assignment.id"), nullable=False),
    Column("person_id", ID, ForeignKey("person.id"), nullable=False),
    Column("version", Integer, nullable=False),  # 1, 2, ... : an undone answer stays, the next one is another version
    Column("body", JSON, nullable=False),  # labeling.py: Answer
    Column("at", BigInteger, nullable=False),
    UniqueConstraint("assignment_id", "version"),
    Index(None, "person_id", "project_id", "at"),
    Index(None, "project_id", "at"),
)

withdrawal = Table(
    "withdrawal",
    metadata,
    Column("ref", ID, primary_key=True),  # id of an answer or a review
    Column("kind", String(8), nullable=False),  # answer, review
    Column("person_id", ID, nullable=False),
    Column("at", BigInteger, nullable=False),
)

# Safety review

item = Table(
    "item",
    metadata,
    Column("id", ID, primary_key=True),
    Column("project_id", ID, ForeignKey("project.id"), nullable=False),
    Column("clip", ID, ForeignKey("clip.id"), nullable=False, index=True),
    Column("queue", String(16), nullable=False),  # reviewing.py: QUEUES
    Column("why", JSON, nullable=False),  # never changes
    Column("probability", Float),  # with which an audit drew it; never changes. None where chance had no part in it
    Column("wave", Integer),
    Column("band", Integer),
    Column("source", ID),  # the review, assignment or item that led to it
    Column("severity", Integer, nullable=False),  # of the worst policy it is here for
    Column("place", Float, nullable=False),  # order within the queue
    Column("wanted", Integer, nullable=False),
    Column("taken", Integer, nullable=False),
    Column("state", String(10), nullable=False),  # open, full, closed
    Column("created_at", BigInteger, nullable=False),
    Index(None, "project_id", "queue", "state", "place"),
)

reading = Table(
    "reading",
    metadata,
    Column("id", ID, primary_key=True),
    Column("project_id", ID, ForeignKey("project.id"), nullable=False),
    Column("item_id", ID, ForeignKey("item.id"), nullable=False),
    Column("clip", ID, ForeignKey("clip.id"), nullable=False),
    Column("person_id", ID, ForeignKey("person.id"), nullable=False),
    Column("slot", Integer, nullable=False),
    Column("issued_at", BigInteger, nullable=False),
    Column("lease_until", BigInteger, nullable=False),
    Column("state", String(10), nullable=False),  # open, decided, skipped, expired
    Column("draft", JSON),
    Index("ix_reading_slot", "item_id", "slot", unique=True, sqlite_where=text("state IN ('open','decided')"), postgresql_where=text("state IN ('open','decided')")),
    UniqueConstraint("item_id", "person_id"),
    Index(None, "person_id", "project_id", "state"),
    Index(None, "state", "lease_until"),
)

review = Table(
    "review",
    metadata,
    Column("id", ID, primary_key=True),  # chosen by the client
    Column("project_id", ID, ForeignKey("project.id"), nullable=False),
    Column("item_id", ID, ForeignKey("item.id"), nullable=False, index=True),
    Column("reading_id", ID, ForeignKey("reading.id"), nullable=False),
    Column("clip", ID, ForeignKey("clip.id"), nullable=False, index=True),
    Column("person_id", ID, ForeignKey("person.id"), nullable=False),
    Column("version", Integer, nullable=False),
    Column("said", String(16), nullable=False),  # violating, not_violating, borderline, cannot_tell
    Column("body", JSON, nullable=False),  # reviewing.py: Decision, without what is private
    Column("rationale", ID),  # id of a private_text
    Column("policy_version", String(32), nullable=False),
    Column("at", BigInteger, nullable=False),
    UniqueConstraint("reading_id", "version"),
    Index(None, "project_id", "at"),
)

reveal = Table(
    "reveal",
    metadata,
    Column("id", ID, primary_key=True),
    Column("project_id", ID, ForeignKey("project.id"), nullable=False),
    Column("reading_id", ID, ForeignKey("reading.id"), nullable=False, index=True),
    Column("person_id", ID, ForeignKey("person.id"), nullable=False),
    Column("level", String(8), nullable=False),  # sheet, edges, light, sharp
    Column("severity", Integer, nullable=False),
    Column("at", BigInteger, nullable=False),
    Index(None, "person_id", "at"),
    Index(None, "project_id", "at"),
)

# What leads decide

threshold = Table(
    "threshold",
    metadata,
    Column("id", ID, primary_key=True),
    Column("project_id", ID, ForeignKey("project.id"), nullable=False, index=True),
    Column("filter", String(200), nullable=False),
    Column("policy", String(8), nullable=False),
    Column("old", Float, nullable=False),
    Column("new", Float, nullable=False),
    Column("preview", JSON, nullable=False),
    Column("proposed_by", ID, nullable=False),
    Column("proposed_at", BigInteger, nullable=False),
    Column("decided_by", ID),
    Column("decided_at", BigInteger),
    Column("state", String(10), nullable=False),  # proposed, approved, refused
)

signoff = Table(
    "signoff",
    metadata,
    Column("id", ID, primary_key=True),
    Column("project_id", ID, ForeignKey("project.id"), nullable=False, index=True),
    Column("run", String(200), nullable=False),
    Column("approved", Boolean, nullable=False),
    Column("evidence", JSON, nullable=False),  # what was known then: rates with intervals, counts, filter versions
    Column("statement", Text, nullable=False),
    Column("person_id", ID, nullable=False),
    Column("at", BigInteger, nullable=False),
)

tombstone = Table(
    "tombstone",
    metadata,
    Column("id", ID, primary_key=True),
    Column("kind", String(16), nullable=False),  # person, clip, project
    Column("ref", ID, nullable=False),
    Column("reason", String(200), nullable=False),
    Column("by", ID, nullable=False),
    Column("at", BigInteger, nullable=False),
)

# The log

event = Table(
    "event",
    metadata,
    Column("seq", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=False),
    Column("at", BigInteger, nullable=False),
    Column("actor", ID, nullable=False),  # a pseudonym, or "system"
    Column("kind", String(40), nullable=False),
    Column("subject", String(80), nullable=False),
    Column("body", Text, nullable=False),  # canonical JSON: pseudonyms, ids and hashes
    Column("prev", String(64), nullable=False),
    Column("hash", String(64), nullable=False, unique=True),
    Index(None, "kind", "seq"),
    Index(None, "subject", "seq"),
    Index(None, "actor", "seq"),
)

"""What labelers are asked and what they said: tasks of clips that may be shown, and their answers as rankings and demonstrations.

A task is a prompt and some of its clips. Clips of one prompt are dealt at random, so that no generator or seed has a place of its own. Who gets which task is in `choosing.py`,
what is done with an
answer in `answering.py`, tasks whose answer is known in `planting.py`, whether somebody answers with care in `attention.py`.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence, Set
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import ColumnElement, Connection, FromClause, Row, Select, and_, bindparam, case, exists, insert, or_, select, update

from reward.app.schema import answer, assignment, clip, item, person, private_text, prompt, task, withdrawal
from reward.app.security import Actor
from reward.app.settings import settings_of
from reward.app.store import Store, new_id

if TYPE_CHECKING:
    from reward.comparisons import RankingEvent

PLANTED = "planted"
"""What copies that were made worse on purpose are called where a run is; it says nothing, for a run may be called so, too. `clip.made_of` does."""
EVERYBODY = 1_000_000
"""People who may answer a task whose answer is known."""


def servable() -> ColumnElement[bool]:
    """The condition on `clip` for what labelers may be shown: allowed by every filter, live, and under no open suspicion. A copy that was made worse may be shown while the clip
    it was made of may."""
    source = clip.alias()
    return and_(_may_be_shown(clip), or_(clip.c.made_of.is_(None), exists().where(source.c.id == clip.c.made_of, _may_be_shown(source))))


def _may_be_shown(table: FromClause) -> ColumnElement[bool]:
    flagged = exists().where(item.c.clip == table.c.id, item.c.queue == "flagged", item.c.state != "closed").correlate(table)
    return and_(table.c.verdict == "allow", table.c.state == "live", ~flagged)


SERVABLE_OF = select(clip.c.id).where(clip.c.id.in_(bindparam("clips", expanding=True)), servable())


def servable_of(db: Connection, clips: Sequence[str]) -> set[str]:
    """Those of some clips that may be shown."""
    return set(db.execute(SERVABLE_OF, {"clips": list(clips)}).scalars())


# Tasks


def make_tasks(store: Store, db: Connection, project_id: str, by: Actor) -> int:
    """Groups the servable clips that are in no ranking task yet, prompt by prompt, and lets tasks go on that had to wait for a clip; returns how many tasks there are more."""
    settings = settings_of(db, project_id).labeling
    resumed = resume(store, db, project_id)
    made = _deal(store, db, project_id, "rank", size=settings.takes, least=2, wanted=settings.overlap)
    if made or resumed:
        store.log(db, by.pseudonym, "tasks made", project_id, {"kind": "rank", "made": made, "resumed": resumed})
    return made + resumed


def make_demonstrations(store: Store, db: Connection, project_id: str, by: Actor) -> int:
    """Groups the servable clips that are in no demonstration task yet; one person answers each."""
    made = _deal(store, db, project_id, "demonstration", size=settings_of(db, project_id).labeling.takes, least=1, wanted=1)
    if made:
        store.log(db, by.pseudonym, "tasks made", project_id, {"kind": "demonstration", "made": made})
    return made


def _deal(store: Store, db: Connection, project_id: str, kind: str, *, size: int, least: int, wanted: int) -> int:
    close_with_deleted(db, project_id)  # also what a version before deleted
    shown = (task.c.kind == "demonstration") & (task.c.answered > 0)  # whose answer counts on
    held = select(task.c.clips).where(task.c.project_id == project_id, task.c.kind == kind, (task.c.state != "closed") | shown)
    asked = {each for clips in db.execute(held).scalars() for each in clips}
    free: dict[str, list[str]] = defaultdict(list)
    for row in db.execute(select(clip.c.id, clip.c.prompt_id).where(clip.c.project_id == project_id, clip.c.made_of.is_(None), servable()).order_by(clip.c.id)):
        if row.id not in asked:
            free[row.prompt_id].append(row.id)
    rows = []
    for prompt_id in sorted(free):
        rng = random.Random(f"{project_id} {prompt_id} {len(asked)}")
        rng.shuffle(free[prompt_id])
        rows += [task_row(store, project_id, prompt_id, clips, kind, wanted=wanted, shuffle=rng.random()) for clips in grouped(free[prompt_id], size, least)]
    if rows:
        db.execute(insert(task), rows)
    return len(rows)


def task_row(store: Store, project_id: str, prompt_id: str, clips: Sequence[str], kind: str, *, wanted: int, shuffle: float, truth: Any = None) -> dict[str, Any]:
    return {
        "id": new_id("t"),
        "project_id": project_id,
        "prompt_id": prompt_id,
        "clips": list(clips),
        "kind": kind,
        "truth": truth,
        "wanted": wanted,
        "taken": 0,
        "answered": 0,
        "priority": 0.0,
        "shuffle": shuffle,
        "state": "open",
        "created_at": store.now(),
    }


def grouped(clips: Sequence[str], size: int, least: int) -> list[list[str]]:
    """Groups as equal as they go, of `least` to `size` clips; what is too little for a group is left out."""
    number = -(-len(clips) // size)
    if number and len(clips) // number < least:
        number = len(clips) // least
        clips = clips[: number * size]
    return [list(clips[at::number]) for at in range(number)]


def resume(store: Store, db: Connection, project_id: str, clips: Set[str] | None = None) -> int:
    """Opens the tasks that waited for a clip which may be shown again; returns how many. clips: looks only at tasks of one of these."""
    resumed = 0
    for row in db.execute(select(task.c.id, task.c.clips).where(task.c.project_id == project_id, task.c.state == "held")).all():
        if (clips is None or clips & set(row.clips)) and len(servable_of(db, row.clips)) == len(row.clips):
            db.execute(update(task).where(task.c.id == row.id).values(state=case((task.c.taken >= task.c.wanted, "full"), else_="open")))
            store.log(db, "system", "task resumed", row.id)
            resumed += 1
    return resumed


def close_with_deleted(db: Connection, project_id: str) -> None:
    """Closes the tasks that have a clip which is deleted; their other clips come into new ones. The log says no more than that the clip is deleted, to whom it may."""
    gone = set(db.execute(select(clip.c.id).where(clip.c.project_id == project_id, clip.c.state == "deleted")).scalars())
    for row in db.execute(select(task.c.id, task.c.clips).where(task.c.project_id == project_id, task.c.state != "closed")).all() if gone else ():
        if gone.intersection(row.clips):
            db.execute(update(task).where(task.c.id == row.id).values(state="closed"))


def set_priorities(store: Store, db: Connection, project_id: str, best_first: Sequence[str], by: Actor) -> int:
    """Puts ranking tasks into the order of `reward/selection.py: best_first`: ids, the most worthwhile first. The others come behind them. Returns how many are now in order."""
    db.execute(update(task).where(task.c.project_id == project_id, task.c.kind == "rank").values(priority=0.0))
    rows = [{"of": task_id, "worth": float(len(best_first) - place)} for place, task_id in enumerate(best_first)]
    given = update(task).where(task.c.id == bindparam("of"), task.c.project_id == project_id, task.c.kind == "rank").values(priority=bindparam("worth"))
    changed = sum(db.execute(given, row).rowcount for row in rows)
    store.log(db, by.pseudonym, "tasks put in order", project_id, {"tasks": changed})
    return changed


# Answers


def live_answers() -> Select[Any]:
    """Answers that were not taken back, with their assignment and task."""
    taken_back = exists().where(withdrawal.c.ref == answer.c.id, withdrawal.c.kind == "answer")
    columns = (task.c.kind, task.c.clips, task.c.prompt_id, assignment.c.purpose, assignment.c.repeat, assignment.c.shown_order, person.c.pseudonym)
    joined = answer.join(assignment, assignment.c.id == answer.c.assignment_id).join(task, task.c.id == answer.c.task_id).join(person, person.c.id == answer.c.person_id)
    return select(answer, *columns).select_from(joined).where(~taken_back)


def events_of(store: Store, project_id: str) -> Iterator[RankingEvent]:
    """Every answer about rankings that stands, one row for each of its dimensions. Practice, and tasks with a clip that was withdrawn, restricted, deleted or stopped by a filter
    since, are left out."""
    with store.reading() as db:
        digests = dict(db.execute(select(clip.c.id, clip.c.clip_id).where(clip.c.project_id == project_id, clip.c.state == "live", clip.c.verdict == "allow")).all())
        names = [dimension.name for dimension in settings_of(db, project_id).labeling.dimensions]
        wanted = live_answers().where(answer.c.project_id == project_id, task.c.kind.in_(("rank", "gold"))).order_by(answer.c.at, answer.c.id)
        with db.execution_options(yield_per=2_000).execute(wanted) as found:
            for row in found:
                if all(each in digests for each in row.clips):
                    yield from _events(row, tuple(digests[each] for each in row.clips), names)


def answer_of(event: RankingEvent) -> str:
    """Which answer a row of `events_of` is a part of: an answer has one for each question."""
    return event.event_id.removesuffix(f".{event.dimension}")


def _events(row: Row[Any], digests: tuple[str, ...], names: Sequence[str]) -> Iterator[RankingEvent]:
    from reward.comparisons import RankingEvent

    body, k = row.body, len(digests)
    flags = tuple(word for word, there in (("all_bad", body.get("all_bad")), ("broken", body.get("broken")), ("unsafe", body.get("unsafe"))) if there)
    for name, ranks in (body.get("ranks") or {name: [None] * k for name in names}).items():
        yield RankingEvent(
            event_id=f"{row.id}.{name}",
            task_id=row.task_id,
            prompt_id=row.prompt_id,
            annotator_id=row.pseudonym,
            clip_ids=digests,
            ranks=tuple(ranks),
            dimension=name,
            kind="pair" if k == 2 else "rank",
            choice=_choice(ranks, bool(body.get("all_bad"))) if k == 2 else None,
            likert=tuple(map(float, body.get("likert") or ())),
            confidence=body.get("confidence"),
            is_gold=row.kind == "gold",
            gold_ok=body.get("ok") if row.kind == "gold" else None,
            is_repeat=row.repeat > 0,
            shown_order=tuple(row.shown_order),
            watch_ms=tuple(body.get("watch_ms") or ()),
            lead_time_ms=body.get("lead_time_ms"),
            skipped_reason=body.get("reason"),
            flags=flags,
            guideline_version=body["guideline_version"],
            app_version=body["app_version"],
            created_at=datetime.fromtimestamp(row.at / 1000, UTC).isoformat(timespec="milliseconds"),
        )


def _choice(ranks: Sequence[int | None], all_bad: bool) -> str:
    first, second = ranks
    if first is None or second is None:
        return "invalid"
    return "A" if first < second else "B" if second < first else "both_bad" if all_bad else "tie"


def demonstrations_of(store: Store, project_id: str) -> list[tuple[str, str]]:
    """(prompt or corrected caption, clip_id) of what people found worth imitating: the best of a task, or all that were accepted where none was called best. Only clips that may
    be shown now."""
    with store.reading() as db:
        rows = db.execute(live_answers().where(answer.c.project_id == project_id, task.c.kind == "demonstration").order_by(answer.c.at, answer.c.id)).all()
        texts = dict(db.execute(select(prompt.c.prompt_id, prompt.c.text).where(prompt.c.project_id == project_id)).all())
        digests = dict(db.execute(select(clip.c.id, clip.c.clip_id).where(clip.c.project_id == project_id, servable())).all())
        found: list[tuple[str, str]] = []
        for row in rows:
            body = row.body
            chosen = [body["best"]] if body.get("best") is not None else [at for at, yes in enumerate(body.get("accepted") or ()) if yes]
            caption = body.get("caption") and db.execute(select(private_text.c.text).where(private_text.c.id == body["caption"])).scalar()
            if body.get("caption") and caption is None:
                continue  # deleted with who wrote it; the prompt itself was called wrong
            found += [(caption or texts[row.prompt_id], digests[row.clips[at]]) for at in chosen if row.clips[at] in digests]
    return found

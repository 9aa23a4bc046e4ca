"""Tasks whose answer is known, without limit and for nothing: a clip beside copies of it that were made worse on purpose (`reward/planted.py`).

Gold looks like any other task: takes of one prompt, one of which is a worse copy of another. Practice is plainer, a clip among its worse copies, and its answer is explained.
Faults that show in a still
picture say nothing about a dimension whose name begins with "motion", and those of motion nothing about one that begins with "visual"; neither says anything about the text.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, exists, func, insert, select

from base_model.errors import UserError
from reward.app.labeling import EVERYBODY, PLANTED, servable, servable_of, task_row
from reward.app.media import path_of
from reward.app.schema import clip, task
from reward.app.security import Actor
from reward.app.settings import settings_of
from reward.app.store import Store, new_id

STILL = ("blurred", "gridded", "over-saturated", "noisy")
MOVING = ("shuffled", "frozen")
TRIES = 4


@dataclass(frozen=True)
class Copy:
    """A clip made worse: its row, and the files that show it."""

    row: dict[str, Any]
    files: dict[str, bytes]
    fault: str


def make_gold(store: Store, project_id: str, number: int, by: Actor) -> int:
    """Adds gold tasks of takes of one prompt, one of which is a worse copy; returns how many. Raises UserError where no clip can be used."""
    return _make(store, project_id, number, by, "gold")


def make_practice(store: Store, project_id: str, number: int, by: Actor) -> int:
    """Adds practice tasks: a clip among worse copies of it, each with another fault; returns how many. Raises UserError where no clip can be used."""
    return _make(store, project_id, number, by, "practice")


def _make(store: Store, project_id: str, number: int, by: Actor, kind: Literal["gold", "practice"]) -> int:
    from reward.app import worker

    with store.reading() as db:
        settings = settings_of(db, project_id).labeling
        made_before = db.execute(select(func.count()).select_from(task).where(task.c.project_id == project_id, task.c.kind == kind)).scalar_one()
        sources = _sources(db, project_id, number, random.Random(f"{project_id} {kind} {made_before}"))
    if not sources:
        raise UserError("no clip can be made worse: none may be shown yet. Import clips that the filters allow")
    names = [dimension.name for dimension in settings.dimensions]
    made = 0
    for place, (source, others) in enumerate(sources):
        rng = random.Random(f"{source.clip_id} {kind} {made_before + place}")
        copies = list(_worse(store, source, 1 if kind == "gold" else settings.takes - 1, names, rng))
        if not copies:
            continue
        for copy in copies:
            worker.keep(store, copy.row["clip_id"], copy.files)
        with store.writing() as db:
            made += _add(store, db, project_id, source, copies, others[: settings.takes - 2] if kind == "gold" else (), kind, names, by, rng)
    return made


def _sources(db: Connection, project_id: str, number: int, rng: random.Random) -> list[tuple[Any, list[str]]]:
    """Clips to be made worse, of as many prompts as there are, each with the ids of other takes of its prompt."""
    own = clip.c.made_of.is_(None)
    wanted = select(clip.c.prompt_id).where(clip.c.project_id == project_id, own, servable()).distinct()
    prompts = sorted(db.execute(wanted).scalars())
    rng.shuffle(prompts)
    found = []
    for place in range(number if prompts else 0):
        takes = list(db.execute(select(clip).where(clip.c.project_id == project_id, clip.c.prompt_id == prompts[place % len(prompts)], own, servable()).order_by(clip.c.id)))
        rng.shuffle(takes)
        found.append((takes[0], [row.id for row in takes[1:]]))
    return found


def _worse(store: Store, source: Any, number: int, names: Sequence[str], rng: random.Random) -> Iterator[Copy]:
    """Copies of a clip with different faults, that can be seen and do not flicker."""
    import numpy as np

    from base_model.video.files import from_uint8, mp4_bytes, read_video, to_uint8
    from reward.app import worker
    from reward.planted import FAULTS
    from reward.safety.contract import Verdict
    from reward.safety.policy import load_policy
    from reward.safety.video import FlashFilter

    path = path_of(store, source.clip_id)
    if not path.is_file():
        return
    read = read_video(path)
    video, flashes = from_uint8(read.frames), FlashFilter(load_policy())
    faults = [fault for fault in FAULTS if any(_tells(fault, name) for name in names)] or list(FAULTS)
    rng.shuffle(faults)
    made = 0
    for at in range(TRIES * number):
        if made == number:
            return
        fault = faults[at % len(faults)]
        changed = FAULTS[fault](video, np.random.default_rng(rng.getrandbits(63)))
        frames = to_uint8(changed)
        different = bool((np.abs(frames.astype(np.int16) - read.frames).mean() > 0.5) if frames.shape == read.frames.shape else True)
        (ruling,) = flashes.check_videos(changed[None], [""], read.fps)[0]
        if different and ruling.verdict == Verdict.ALLOW:
            made += 1
            yield Copy(_row(source, frames, fault, ruling), worker.render(mp4_bytes(frames, read.fps)), fault)


def _row(source: Any, frames: Any, fault: str, ruling: Any) -> dict[str, Any]:
    """The row of table `clip` of a worse copy: what was ruled about its source, and that it does not flicker."""
    from base_model.video.files import digest_of
    from reward.safety.contract import Decision, to_json

    digest = digest_of(frames)
    told: Any = to_json(Decision((ruling,)))
    row = {
        **source.row,
        "clip_id": digest,
        "path": "",
        "generator": PLANTED,
        "num_frames": len(frames),
        "sampler_json": json.dumps({"fault": fault, "of": source.clip_id}, sort_keys=True),
    }
    decision = {**source.decision, "rulings": [*source.decision.get("rulings", []), *told["rulings"]]}
    values = {"id": new_id("c"), "project_id": source.project_id, "clip_id": digest, "prompt_id": source.prompt_id, "run": PLANTED, "row": row}
    return {**values, "verdict": "allow", "score": source.score, "decision": decision, "state": "live", "made_of": source.id}


def _add(
    store: Store, db: Connection, project_id: str, source: Any, copies: Sequence[Copy], others: Sequence[str], kind: str, names: Sequence[str], by: Actor, rng: random.Random
) -> int:
    """Adds the clips and their task, unless a clip may not be shown any more or a copy is there already; returns 1 or 0."""
    if len(servable_of(db, [source.id, *others])) < 1 + len(others):
        return 0
    for copy in copies:
        if db.execute(select(exists().where(clip.c.project_id == project_id, clip.c.clip_id == copy.row["clip_id"]))).scalar():
            return 0
    db.execute(insert(clip), [{**copy.row, "created_at": store.now()} for copy in copies])
    clips = [source.id, *(copy.row["id"] for copy in copies), *others]
    truth = {name: _truth(name, [copy.fault for copy in copies], len(others)) for name in names}
    truth = {name: ranks for name, ranks in truth.items() if any(rank == 2 for rank in ranks)}
    row = task_row(store, project_id, source.prompt_id, clips, kind, wanted=EVERYBODY, shuffle=rng.random(), truth=truth)
    db.execute(insert(task), row)
    store.log(db, by.pseudonym, "task planted", row["id"], {"kind": kind, "clips": clips})
    return 1


def _truth(name: str, faults: Sequence[str], others: int) -> list[int | None]:
    """Ranks of the clip, its copies and the other takes in a dimension; None where nothing is known."""
    return [1, *(2 if _tells(fault, name) else None for fault in faults), *([None] * others)]


def _tells(fault: str, name: str) -> bool:
    if name.startswith("motion"):
        return fault in MOVING
    if name.startswith("visual"):
        return fault in STILL
    return not name.startswith("text")


def fault_of(row: Mapping[str, Any]) -> str:
    """What was done to a clip on purpose; empty where nothing was."""
    return str(json.loads(row.get("sampler_json") or "{}").get("fault", "")) if row.get("generator") == PLANTED else ""

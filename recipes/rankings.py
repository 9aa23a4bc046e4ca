"""Who is asked which clip is better: simulated people, at once, or people, in their own time. Shared by recipes, no command.

People are asked by two things: tasks, one JSON object a line (`tasks.jsonl`), and the store of rankings (`reward/comparisons.py`), which knows their clips and prompts and into
which answers go. An answer belongs to the task that shows the same clips, in whatever order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from base_model.checkpoint import atomic_write
from base_model.errors import UserError
from base_model.video.store import ClipRow
from recipes.shapes import labelers
from recipes.shapes.labelers import Labeler
from reward.comparisons import Annotator, Clip, Comparisons, Prompt, RankingEvent, load_comparisons, write_comparisons

TASKS = "tasks.jsonl"


class Task(NamedTuple):
    """Clips of one prompt to be ranked together, in the order in which they are shown."""

    task_id: str
    prompt_id: str
    prompt: str
    clip_ids: tuple[str, ...]


def ruling_of(row: ClipRow) -> dict[str, Any]:
    """What the filters said of a clip: `verdict` and `rulings`. Raises UserError where nothing is there to read."""
    try:
        said = json.loads(row.safety_json)
        return {"verdict": str(said["verdict"]), "rulings": list(said["rulings"])}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"the clip {row.clip_id} carries no verdict of the filters, clips.jsonl. Make the candidates again in another --out") from error


def served(rows: Iterable[ClipRow]) -> list[ClipRow]:
    """The clips that may be shown: those the filters allow."""
    return [row for row in rows if ruling_of(row)["verdict"] == "allow"]


Shares = tuple[float, float, float]
"""Of the prompts: to learn from, to calibrate on, to test on."""


def rank_by_panel(
    folder: Path,
    panel: Sequence[Labeler],
    tasks: Sequence[labelers.Task],
    shown: Sequence[ClipRow],
    prompts: Sequence[Prompt],
    *,
    seed: int,
    overlap: float,
    shares: Shares,
) -> int:
    """Adds a simulated panel's answers to the store of rankings in `folder`; returns how many."""
    events = [RankingEvent.of(row) for row in labelers.collect(panel, tasks, seed=seed, overlap=overlap)]
    earlier = load_comparisons(folder).events if (folder / "clips.parquet").exists() else ()
    names = {person.annotator_id for person in panel}
    said = [{"annotator_id": event.annotator_id} for event in {each.event_id: each for each in (*earlier, *events)}.values() if event.annotator_id in names]
    people = [Annotator.of(row) for row in labelers.annotators(panel, said, pool="simulated")]
    write_comparisons(folder, events, clips=[Clip.of(row) for row in shown], prompts=prompts, annotators=people, shares=shares)
    return len(events)


def ask(folder: Path, out: Path, tasks: Sequence[Task], shown: Sequence[ClipRow], prompts: Sequence[Prompt], *, shares: Shares) -> None:
    """Makes the clips and prompts of the tasks known to the store of rankings in `folder`, which keeps all its answers, and writes the tasks into `out`."""
    asked = {clip_id for task in tasks for clip_id in task.clip_ids}
    write_comparisons(folder, [], clips=[Clip.of(row) for row in shown if row.clip_id in asked], prompts=prompts, shares=shares)
    atomic_write(out / TASKS, "".join(json.dumps(task._asdict(), ensure_ascii=False) + "\n" for task in tasks).encode())


def read_tasks(out: Path) -> list[Task]:
    """What `ask` wrote into `out`. Raises UserError where it is missing or damaged."""
    file = out / TASKS
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
        return [Task(**{**row, "clip_ids": tuple(row["clip_ids"])}) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read what people are asked, {file}: {error}. Restore the file, or begin in another --out") from error


def answers_to(data: Comparisons, tasks: Sequence[Task]) -> dict[str, list[RankingEvent]]:
    """task_id -> the answers about its clips, those of people who skipped it included."""
    of = {frozenset(task.clip_ids): task.task_id for task in tasks}
    found: dict[str, list[RankingEvent]] = {task.task_id: [] for task in tasks}
    for event in data.events:
        if event.kind in ("pair", "rank", "best") and (task_id := of.get(frozenset(event.clip_ids))) is not None:
            found[task_id].append(event)
    return found

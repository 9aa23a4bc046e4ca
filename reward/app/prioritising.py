"""Which ranking tasks come first: those whose answer would tell a reward model the most (`reward/selection.py`, `bald`).

What the model learned is a Gaussian over the weights of its head, and what it sees of a clip are its inputs; both lie in its folder and in the clip store, and no label of the
app is read. Tasks of the walk through a person's mixture that are drawn at random (`choosing.py`) stay random: what a model chose is never all that is known.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import select

from base_model.errors import UserError
from reward.app.labeling import set_priorities
from reward.app.schema import clip, prompt, task
from reward.app.security import Actor
from reward.app.store import Store

if TYPE_CHECKING:
    from torch import Tensor

    from base_model.video.store import ClipStore
    from reward.model import RewardModel
    from reward.selection import Posterior


def prioritise(store: Store, project_id: str, reward: Path, clips: Path, by: Actor, *, dimension: str | None = None, seed: int = 0) -> dict[str, Any]:
    """Puts the open ranking tasks of a project into the order of what they would tell the reward model in a folder; returns how many are in order, and how many are not.

    clips: clip store with the records of the clips. Tasks with a clip that is not in it, or has pixels that are not finite, come behind, in no order. Raises UserError where
    nothing can be put in order.
    """
    from base_model.prompts.text import TextEncoder
    from base_model.video.store import ClipStore
    from reward.model import load_reward_model

    model = load_reward_model(reward, TextEncoder())
    name = _dimension(model, dimension, reward)
    posterior, log_tie = learned(model, name, reward)
    records = ClipStore(clips)
    tasks = _open_tasks(store, project_id)
    if not tasks:
        raise UserError("no ranking task waits for an answer in this project. Import clips first: rushes app import")
    held = {row.clip_id for row in records.rows()}
    known = {task_id: _inputs(model, records, shown) for task_id, shown in tasks.items() if all(digest in held for digest, _ in shown)}
    usable = {task_id: inputs for task_id, inputs in known.items() if inputs is not None}
    if not usable:
        raise UserError(f"none of the clips that wait to be ranked is in {clips}, --clips. Give the clip store that they were imported from")
    order = best_first(posterior, log_tie, usable, seed=seed)
    with store.writing() as db:
        changed = set_priorities(store, db, project_id, order, by)
    return {"tasks": changed, "not_judged": len(tasks) - len(usable), "dimension": name}


def learned(model: RewardModel, name: str, folder: Path) -> tuple[Posterior, Tensor]:
    """What a model knows of the weights of a dimension's head, in calibrated log-odds, for which its tie parameters [K-1] are. Raises UserError where it knows nothing about how
    far it can be believed."""
    from reward.selection import Posterior

    at = model.dims.index(name)
    covariance = model.covariance[at].double()
    if not covariance.diagonal().gt(0).any():
        raise UserError(f"this reward model learned from nobody, so it does not know what it is unsure of, {folder}. Train it on the rankings there are: rushes reward-model")
    temperature = model.temperature[at].double()
    return Posterior(model.head.weight[at].double() / temperature, covariance / temperature**2), model.log_tie[at].detach().double()


def best_first(posterior: Posterior, log_tie: Tensor, usable: Mapping[str, Tensor], *, seed: int) -> list[str]:
    """Tasks [K,d] by id -> ids, the most worthwhile first. Tasks of K clips are compared with each other; each K is spread evenly over the whole."""
    import torch

    from reward.selection import best_first as ordered

    by_size: dict[int, list[str]] = defaultdict(list)
    for task_id in sorted(usable):
        by_size[len(usable[task_id])].append(task_id)
    placed: list[tuple[float, int, str]] = []
    for k, ids in by_size.items():
        features = torch.cat([usable[task_id] for task_id in ids])
        rows = torch.arange(len(features)).reshape(-1, k)
        order = ordered("bald", posterior, features, rows, tie_parameters(log_tie, k), number=len(ids), seed=seed)
        placed += [((place + 0.5) / len(ids), k, ids[row]) for place, row in enumerate(order)]
    return [task_id for _, _, task_id in sorted(placed)]


def tie_parameters(log_tie: Tensor, k: int) -> Tensor:
    """Those of k clips [k-1]; of more clips than the model has ranked each further one is less by 1, as they begin (`recipes/reward_model.py`)."""
    import torch

    more = max(0, k - 1 - len(log_tie))
    return torch.cat([log_tie, log_tie[-1] - torch.arange(1, more + 1)])[: k - 1]


def _dimension(model: RewardModel, wanted: str | None, folder: Path) -> str:
    name = wanted or ("overall" if "overall" in model.dims or len(model.dims) > 1 else model.dims[0])
    if name not in model.dims:
        raise UserError(f"no dimension {name!r} in the reward model, {folder}. Give --dimension: {', '.join(model.dims)}")
    return name


def _open_tasks(store: Store, project_id: str) -> dict[str, list[tuple[str, str]]]:
    """Tasks that wait for an answer -> (digest, text of the prompt) of each of their clips."""
    with store.reading() as db:
        digests = dict(db.execute(select(clip.c.id, clip.c.clip_id).where(clip.c.project_id == project_id)).all())
        texts = dict(db.execute(select(prompt.c.prompt_id, prompt.c.text).where(prompt.c.project_id == project_id)).all())
        rows = db.execute(select(task.c.id, task.c.clips, task.c.prompt_id).where(task.c.project_id == project_id, task.c.kind == "rank", task.c.state == "open")).all()
    return {row.id: [(digests[each], texts[row.prompt_id]) for each in row.clips] for row in rows}


def _inputs(model: RewardModel, records: ClipStore, shown: Sequence[tuple[str, str]]) -> Tensor | None:
    """What the head sees of the clips of a task [K,d]; None where one cannot be judged."""
    import torch

    with torch.no_grad():
        seen = torch.cat([model.standardised(model.inputs(records.load(digest)[None], [text])) for digest, text in shown])
    return seen.double() if torch.isfinite(seen).all() else None

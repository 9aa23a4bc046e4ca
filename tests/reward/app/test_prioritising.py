"""The tasks that would tell a reward model most come first, as whoever labels gets them; compared with the information worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sqlalchemy import select, update

from base_model.errors import UserError
from base_model.prompts.text import TextEncoder
from base_model.video.store import ClipStore, NewClip
from recipes import app
from reward.app import choosing, labeling, prioritising
from reward.app.importing import import_run
from reward.app.media import VARIANTS
from reward.app.schema import assignment, clip, event, task
from reward.app.store import Store
from reward.matcher import Matcher
from reward.model import INPUTS, RewardModel, load_reward_model, save_reward_model
from reward.quality import Quality
from tests.reward.app.conftest import add_project
from tests.reward.app.test_labeling import NO_CHECKS, as_labeler, row_of, taken

RULING = {"verdict": "allow", "policy": "P17", "score": 0.1, "reasons": [], "filter": "flash 3", "threshold": 0.5, "policy_version": "2"}


def model(covariance: float = 1.0, dims: tuple[str, ...] = ("overall",), ties: tuple[float, ...] = (-1.0, -2.0, -3.0)) -> RewardModel:
    """Unsure of all its weights, by different amounts."""
    torch.manual_seed(0)
    made = RewardModel(Matcher(), Quality(), dims, TextEncoder(), most_clips=len(ties) + 1)
    made.input_std.fill_(0.2)
    made.temperature.fill_(2.5)
    made.covariance.copy_(covariance * torch.diag(torch.linspace(0.05, 1.0, len(INPUTS))))
    with torch.no_grad():
        made.log_tie.copy_(torch.tensor(ties))
    return made


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    save_reward_model(folder, model(), {})
    return folder


@pytest.fixture(scope="module")
def takes(tmp_path_factory: pytest.TempPathFactory) -> ClipStore:
    """Eight prompts with two takes, one with three: the further the prompt, the more the takes differ, in brightness and in noise."""
    rng = np.random.default_rng(1)
    new = []
    for place in range(9):
        for take in range(2 + (place == 8)):
            noise = rng.random((5, 3, 16, 24)) * (0.02 + 0.1 * take * place / 8)
            video = torch.tensor(np.clip(0.3 + 0.01 * place + 0.04 * take * (place + 1) + noise, 0, 1), dtype=torch.float32)
            new.append(NewClip(video, f"a red bar moves {place} times", f"p{place}", 10 * place + take, {}, "test", 8.0, safety={"verdict": "allow", "rulings": [RULING]}))
    store = ClipStore(tmp_path_factory.mktemp("takes"))
    store.add_many(new, preview=False)
    return store


def render(content: bytes) -> dict[str, bytes]:
    return {**dict.fromkeys(VARIANTS, b"grey"), "facts.json": json.dumps({"width": 24, "height": 16, "fps": 8.0, "frames": 5, "seconds": 0.625}).encode()}


def ready(store: Store, takes: ClipStore, **settings: Any) -> str:
    project_id = add_project(store, "bars", labeling={**NO_CHECKS, "takes": 3, **settings})
    import_run(store, project_id, takes.folder, "run", "system", render=render)
    with store.writing() as db:
        assert labeling.make_tasks(store, db, project_id, app.system()) == 9
    return project_id


def by_hand(store: Store, project_id: str, takes: ClipStore, folder: Path) -> dict[str, float]:
    """Task -> mutual information of an answer and the weights, in nats, of pairs: by a sum over a fine grid of differences of scores."""
    loaded = load_reward_model(folder, TextEncoder())
    tie = np.exp(-1.0)
    prompts = {row.clip_id: row.prompt for row in takes.rows()}
    found = {}
    with store.reading() as db:
        digests = dict(db.execute(select(clip.c.id, clip.c.clip_id)).all())
        rows = db.execute(select(task.c.id, task.c.clips).where(task.c.project_id == project_id)).all()
    for row in rows:
        if len(row.clips) == 2:
            shown = [digests[each] for each in row.clips]
            with torch.no_grad():
                both = loaded.joint(torch.stack([takes.load(each) for each in shown]), [prompts[each] for each in shown])
            mean, spread = both.difference(torch.tensor([0]), torch.tensor([1]))
            z = np.linspace(-8, 8, 4001)
            d = float(mean) + z * float(spread)
            w = np.exp(-(z**2) / 2) / np.exp(-(z**2) / 2).sum()
            worth = np.stack([np.exp(d / 2), np.exp(-d / 2), np.full_like(d, tie)])
            p = worth / worth.sum(0)
            mixed = (p * w).sum(1)
            found[row.id] = float(-(mixed * np.log(mixed)).sum() + (w * (p * np.log(p)).sum(0)).sum())
    return found


def test_tasks_come_in_the_order_of_what_an_answer_would_tell(each_store: Store, takes: ClipStore, reward: Path) -> None:
    project_id = ready(each_store, takes)
    told = prioritising.prioritise(each_store, project_id, reward, takes.folder, app.system())
    assert told == {"tasks": 9, "not_judged": 0, "dimension": "overall"}
    worth = by_hand(each_store, project_id, takes, reward)
    assert len(worth) == 8 and np.diff(sorted(worth.values())).min() > 1e-5, "no two are alike"
    expected = sorted(worth, key=lambda task_id: -worth[task_id])
    ann, given = as_labeler(each_store, "ann", project_id), []
    for _ in range(9):
        held = row_of(each_store, taken(each_store, ann, project_id))
        given.append(held.task_id)
        with each_store.writing() as db:
            db.execute(update(assignment).where(assignment.c.id == held.id).values(state="skipped"))
    assert [each for each in given if each in worth] == expected
    (of_three,) = set(given) - set(worth)
    assert given.index(of_three) in (3, 4, 5), "tasks of another size are spread over the whole"
    with each_store.reading() as db:
        assert db.execute(select(event.c.body).where(event.c.kind == "tasks put in order")).scalar_one() == '{"tasks":9}'


def test_the_random_floor_stays(store: Store, takes: ClipStore, reward: Path) -> None:
    project_id = ready(store, takes, mixture={"active": 0.5, "random": 0.5, "gold": 0, "repeat": 0, "mirrored": 0})
    prioritising.prioritise(store, project_id, reward, takes.folder, app.system())
    ann, held = as_labeler(store, "ann", project_id), []
    for _ in range(8):
        held.append(row_of(store, taken(store, ann, project_id)))
        with store.writing() as db:
            db.execute(update(assignment).where(assignment.c.id == held[-1].id).values(state="skipped"))
    assert {"active", "random"} == {each.purpose for each in held}
    assert choosing.PURPOSES[:2] == ("active", "random")


def test_what_is_asked_about_already_or_lies_elsewhere_is_left_where_it_is(store: Store, takes: ClipStore, reward: Path, tmp_path: Path) -> None:
    project_id = ready(store, takes)
    with store.writing() as db:
        full, *_ = db.execute(select(task.c.id).order_by(task.c.id)).scalars()
        db.execute(update(task).where(task.c.id == full).values(state="full"))
    assert prioritising.prioritise(store, project_id, reward, takes.folder, app.system())["tasks"] == 8
    with store.reading() as db:
        assert db.execute(select(task.c.priority).where(task.c.id == full)).scalar_one() == 0
    rows = takes.rows()
    part = ClipStore(tmp_path / "part")
    part.add_many([NewClip(takes.load(row.clip_id), row.prompt, row.prompt_id, row.seed, {}, "test", 8.0, safety={}) for row in rows[:6]], preview=False)
    told = prioritising.prioritise(store, project_id, reward, part.folder, app.system())
    assert told["tasks"] + told["not_judged"] == 8 and 2 <= told["tasks"] <= 3


def test_tasks_of_more_clips_than_the_model_has_ranked_have_tie_parameters_too() -> None:
    told = torch.tensor([-1.0, -2.5], dtype=torch.float64)
    assert prioritising.tie_parameters(told, 2).tolist() == [-1.0]
    assert prioritising.tie_parameters(told, 3).tolist() == [-1.0, -2.5]
    assert prioritising.tie_parameters(told, 6).tolist() == [-1.0, -2.5, -3.5, -4.5, -5.5]


def test_who_has_nothing_to_go_by_is_told_so_in_one_line(store: Store, takes: ClipStore, reward: Path, tmp_path: Path) -> None:
    empty = add_project(store, "empty")
    project_id = ready(store, takes)
    save_reward_model(tmp_path / "fresh", model(0.0), {})
    save_reward_model(tmp_path / "two", model(dims=("motion", "text")), {})
    (tmp_path / "no-clips").mkdir()
    for place, folder, clips, dimension, message in (
        (empty, reward, takes.folder, None, "no ranking task waits"),
        (project_id, reward, tmp_path / "no-clips", None, "none of the clips that wait"),
        (project_id, tmp_path / "fresh", takes.folder, None, "learned from nobody"),
        (project_id, reward, takes.folder, "motion", "no dimension 'motion'.* overall"),
        (project_id, tmp_path / "two", takes.folder, None, "no dimension 'overall'.* motion, text"),
        (project_id, tmp_path / "none", takes.folder, None, "no reward model"),
    ):
        with pytest.raises(UserError, match=message):
            prioritising.prioritise(store, place, folder, clips, app.system(), dimension=dimension)
    with store.reading() as db:
        assert set(db.execute(select(task.c.priority)).scalars()) == {0.0}


def test_the_command_puts_them_in_order(store: Store, takes: ClipStore, reward: Path) -> None:
    project_id = ready(store, takes)
    told = app.main(app.Config(action="prioritise", out=store.folder, project="bars", reward=reward, clips=takes.folder))
    assert told["tasks"] == 9
    with store.reading() as db:
        assert sorted(db.execute(select(task.c.priority).where(task.c.project_id == project_id)).scalars()) == list(range(1, 10))
    for lacks, message in (({"reward": None}, "by which reward model"), ({"clips": None}, "where are the clips"), ({"project": "*"}, "no project")):
        with pytest.raises(UserError, match=message):
            app.main(app.Config(**{"action": "prioritise", "out": store.folder, "project": "bars", "reward": reward, "clips": takes.folder, **lacks}))


def test_what_is_known_of_a_score_is_what_the_model_says_of_it(takes: ClipStore, reward: Path) -> None:
    """In calibrated log-odds: those are what the tie parameters are for."""
    loaded = load_reward_model(reward, TextEncoder())
    posterior, log_tie = prioritising.learned(loaded, "overall", reward)
    rows = takes.rows()[:4]
    videos, prompts = torch.stack([takes.load(row.clip_id) for row in rows]), [row.prompt for row in rows]
    with torch.no_grad():
        told = loaded(videos, prompts)
        mean, std = posterior.scores(loaded.standardised(loaded.inputs(videos, prompts)))
    torch.testing.assert_close(mean.float(), told.mean[:, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(std.float(), told.spread[:, 0], atol=1e-4, rtol=1e-4)
    assert log_tie.tolist() == [-1.0, -2.0, -3.0]

"""The calibration bench: its people know what clips are worth to them, its intervals are counted as they are said to be, and it sees which doubt is honest."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from align.config import load
from base_model.prompts.text import TextEncoder
from recipes import cli
from recipes.bench import _pool, calibration
from recipes.bench.calibration import ALL, ALL_LOOK, DIMS, HEAD, MODEL, Doubt, Held, Way, World, held
from recipes.shapes.labelers import REWARD_PANEL, utility
from tests.recipes.test_bench import assert_flat

TOY = ["--train", "24", "--validation", "8", "--test", "12", "--seeds", "[0]", "--sources", "[drawn]"]


def config(*more: str) -> calibration.Config:
    return load(calibration.Config, None, [*TOY, *more])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return calibration.the_world(config(), "drawn", tmp_path_factory.mktemp("pool"))


@pytest.fixture(scope="module")
def learned(world: World) -> calibration.Learned:
    return calibration.learn(config(), world, parts(), TextEncoder(), 0)


def parts() -> list[calibration.Indices]:
    return np.split(np.random.default_rng(0).permutation(44), [24, 32])


def test_the_quick_form_gives_flat_rows_and_the_models_doubt_holds_more_than_that_of_the_heads(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    small = ["--train", "20", "--validation", "6", "--test", "10", "--sources", "[drawn]"]
    assert cli.main(["bench", "calibration", "--quick", *small, "--json", "--write", "--results", str(tmp_path), "--date", "2026-11"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert_flat(rows)
    assert {(row["dimension"], row["score"]) for row in rows if row["part"] == "calibration"} == {(dim, score) for dim in DIMS for score in (HEAD, ALL_LOOK, "5 heads")}
    coverage = {row["method"]: row["coverage"] for row in rows if row["part"] == "coverage" and (row["dimension"], row["slope"]) == (ALL, "within prompts")}
    assert coverage["5 heads"] < coverage["5 heads, clip by clip"] < 0.75 < coverage[MODEL] and coverage["weights"] < coverage[MODEL], coverage
    assert len([row for row in rows if row["part"] == "claims"]) == len(DIMS) + len(DIMS) + 1
    (file,) = tmp_path.iterdir()
    assert "# Calibration and honest intervals" in file.read_text() and "rushes bench calibration --quick" in file.read_text()
    assert "\n2 seeds. `low`" in file.read_text(), "as many as it took"


# The world


def test_what_clips_are_worth_is_the_panels_mean_and_who_is_asked_about_motion_goes_by_it_alone(world: World) -> None:
    overall = np.mean([utility(person, world.perception) for person in REWARD_PANEL], axis=0)
    np.testing.assert_allclose(world.worth("overall"), overall)
    asked = ~np.isnan(world.perception.color)
    seen = np.nansum(world.perception.color * world.perception.motion, axis=1) / asked.sum(1)
    np.testing.assert_allclose(world.worth("motion"), 2 * np.mean([person.motion for person in REWARD_PANEL]) * seen)
    signals = world.perception.signals
    assert np.corrcoef(world.worth("quality"), signals.sharpness)[0, 1] > 0.3 and len(world.worth("quality")) == 4 * 44


def test_answers_are_of_their_prompts_repeat_with_their_seed_and_overlap_where_that_is_asked_for(world: World) -> None:
    prompts = np.array([3, 7, 40])
    events = world.ranked(prompts, "motion", overlap=1.0, seed=1)
    assert {event.prompt_id for event in events} == {world.prompt_ids[p] for p in prompts} and {event.dimension for event in events} == {"motion"}
    assert all(event.clip_ids == world.clip_ids(world.prompt_ids.index(event.prompt_id)) for event in events)
    assert events == world.ranked(prompts, "motion", overlap=1.0, seed=1) != world.ranked(prompts, "motion", overlap=1.0, seed=2)
    people = {p: {event.annotator_id for event in events if event.prompt_id == p} for p in {event.prompt_id for event in events}}
    assert all(len(found) > 1 for found in people.values())
    alone = world.ranked(np.arange(44), "overall", overlap=0.0, seed=1)
    assert len({(event.prompt_id, event.annotator_id) for event in alone}) == 44


def test_pairs_are_those_of_one_prompt_or_of_two() -> None:
    prompts = np.array([5, 2])
    first, second = calibration.pairs_within(prompts)
    assert first.tolist() == [20, 20, 20, 21, 21, 22, 8, 8, 8, 9, 9, 10] and second.tolist() == [21, 22, 23, 22, 23, 23, 9, 10, 11, 10, 11, 11]
    one, other = calibration.pairs_between(prompts)
    assert one.tolist() == [20, 21, 22, 23, 8, 9, 10, 11] and other.tolist() == [8, 9, 10, 11, 20, 21, 22, 23]


def test_both_pools_are_made_once_and_sampled_clips_differ_by_their_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {source: _pool.kept_pool(tmp_path, source, 3, 4) for source in ("drawn", "sampled")}
    assert all(pool["inputs"].shape == (12, 26) and pool["seen"].shape == (12, 11) and torch.isfinite(pool["inputs"]).all() for pool in found.values())
    assert len(found["sampled"]["inputs"].unique(dim=0)) == 12 and not torch.equal(found["sampled"]["inputs"], found["drawn"]["inputs"])
    monkeypatch.setattr(_pool, "make_pool", lambda *_: pytest.fail("it is kept"))
    assert torch.equal(_pool.kept_pool(tmp_path, "sampled", 3, 4)["inputs"], found["sampled"]["inputs"])


# Intervals


def planted(spread: float, slope: float = 2.0, clips: int = 8_000, seed: int = 0) -> tuple[Doubt, np.ndarray[tuple[int, ...], np.dtype[np.float64]]]:
    """Scores whose errors are independent normals of deviation 1, that say their differences have a deviation of root 2 x spread; and what the clips are worth."""
    rng = np.random.default_rng(seed)
    score = 2 * rng.normal(size=clips)
    worth = slope * (score + rng.normal(size=clips)) + 5
    return lambda first, second: (score[first] - score[second], np.full(len(first), 2**0.5 * spread)), worth


@pytest.mark.parametrize(("spread", "coverage"), [(1.0, 0.9), (0.5, 0.589), (1.5, 0.986)])
def test_intervals_hold_as_often_as_the_normal_says(spread: float, coverage: float) -> None:
    doubt, worth = planted(spread)
    prompts = np.arange(2_000)
    for slope in (calibration.slope_within(doubt, worth, prompts), calibration.slope_over_clips(doubt, worth, prompts)):
        assert slope == pytest.approx(2.0, abs=0.04)
        found = held(doubt, worth, slope, *calibration.pairs_within(prompts))
        assert found.inside.mean() == pytest.approx(coverage, abs=0.015) and np.sqrt(np.mean(found.error**2)) == pytest.approx(2**0.5, rel=0.03)


def test_a_prompt_counts_by_the_share_of_its_pairs_and_one_that_was_not_in_the_test_not_at_all() -> None:
    way = Way(MODEL, "within prompts", "within prompts")

    def one(inside: list[float]) -> Held:
        return Held(np.array(inside), np.zeros(len(inside)), np.ones(len(inside)))

    seeds = [{way: (one([1, 1, 0, 0]), np.array([4, 1]))}, {way: (one([1, 1, 1, 0]), np.array([1, 0]))}]
    rows = calibration.coverage_rows("drawn", {"motion": seeds, "overall": seeds}, 5)
    assert [row["dimension"] for row in rows] == [ALL, "motion", "overall"] and all(row["coverage"] == pytest.approx((1 + 0 + 1 + 0.5) / 4) for row in rows)
    assert rows[1]["said"] == 1 and rows[1]["error"] == 0 and rows[0]["said"] is None


def test_a_way_to_doubt_says_what_the_model_says(learned: calibration.Learned) -> None:
    first, second = np.array([0, 5, 9]), np.array([1, 6, 50])
    for r in range(len(DIMS)):
        difference, deviation = calibration.doubts(learned, r)[MODEL](first, second)
        found = learned.model.joint_of(learned.x).difference(torch.from_numpy(first), torch.from_numpy(second))
        temperature = float(learned.model.temperature[r])
        np.testing.assert_allclose(difference / temperature, found.mean[:, r].detach(), atol=1e-5)
        np.testing.assert_allclose(deviation / temperature, found.spread[:, r].detach(), rtol=1e-4)
    assert (learned.model.misfit > 0).all() and (learned.curvature.diagonal(dim1=1, dim2=2) > 0).all() and learned.heads.shape == (5, 176, 3)


# Calibration


def test_people_who_do_not_look_are_what_one_calibration_knows_and_the_other_does_not() -> None:
    rng = np.random.default_rng(0)
    difference = 4 * rng.normal(size=6_000)
    looked = rng.random(6_000) < np.where(rng.random(6_000) < 0.3, 0.5, 1 / (1 + np.exp(-2 * difference)))
    answer = np.where(looked, 1, -1).astype(np.int8)
    plain, aware = (calibration.calibrated(answer, difference, careless=careless)(np.array([0.0, 6.0])) for careless in (False, True))
    np.testing.assert_allclose(aware.sum(1), 1)
    assert aware[1, 0] == pytest.approx(0.85, abs=0.02) and aware[0, 0] == pytest.approx(aware[0, 2]) and plain[1, 0] > 0.9

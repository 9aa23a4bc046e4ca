"""The ranking bench: its people answer as they say they do, its fits find what was put in, and it counts what it says it counts."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from align.config import load
from recipes.bench import rankings
from recipes.bench._people import LOG_TIE, LOG_TIE_CARELESS, PLACE_CARELESS, WORLDS, Answers, World, held_out_answers, labeler_rank, model_rank, training_answers
from recipes.bench.rankings import MEASURES, PLAIN, Fit, Method, Prior
from recipes.shapes.labelers import REWARD_PANEL, rank, rank_by, utility
from reward.labelers import careless, reliability_mixture, with_position
from reward.ranking import davidson_luce, weak_orders
from tests.recipes.shapes.test_labelers import random_tasks
from tests.recipes.test_bench import assert_flat

CARELESS = 5
SMALL = ["--prompts", "20", "--test_prompts", "12", "--seeds", "1", "--features", "3"]


def config(*more: str) -> rankings.Config:
    return load(rankings.Config, None, [*SMALL, *more])


# People


@pytest.mark.parametrize("person", [None, 2, CARELESS])
def test_people_of_the_models_world_answer_as_the_last_method_says(person: int | None) -> None:
    """Frequencies of 3,000 answers on one screen against the likelihood of all 13 rankings of three clips."""
    worth, shown = np.array([0.8, -0.3, 0.1]), [2, 0, 1]
    rng = np.random.default_rng(0)
    found = Counter(tuple(model_rank(worth, person, shown, rng)) for _ in range(3_000))
    orders = weak_orders(3)
    places, scores = torch.tensor(shown).expand(13, 3), torch.from_numpy(worth).expand(13, 3)
    log_tie = torch.tensor(LOG_TIE, dtype=torch.float64)
    if person is None:
        expected = davidson_luce(scores, orders, log_tie)
    else:
        who = REWARD_PANEL[person]
        careful = davidson_luce(with_position(scores, places, torch.tensor(who.position / who.noise).double()), orders, log_tie)
        habit = with_position(torch.zeros_like(scores), places, torch.tensor(PLACE_CARELESS).double())
        blind = careless(orders, torch.full((3,), LOG_TIE_CARELESS).double(), habit)
        expected = reliability_mixture(careful, blind, torch.tensor(1 - who.careless).double().logit())
    counts = np.array([found[tuple(order)] for order in orders.tolist()])
    mean = 3_000 * expected.exp().numpy()
    assert counts.sum() == 3_000 and mean.sum() == pytest.approx(3_000)
    assert ((counts - mean) ** 2 / mean).sum() < 32.9, "chi-squared with 12 degrees of freedom is above this once in a thousand"


def test_simulated_labelers_are_those_who_rank_clips_in_the_demo() -> None:
    task = random_tasks(1)[0]
    for person in REWARD_PANEL:
        direct, by_worth = np.random.default_rng(7), np.random.default_rng(7)
        for _ in range(20):
            assert rank(person, task.perception, [2, 0, 3, 1], direct) == rank_by(person, utility(person, task.perception), [2, 0, 3, 1], by_worth)
    rng = np.random.default_rng(1)
    pairs = [labeler_rank(np.array([1.0, 0.0]), None, [1, 0], rng) for _ in range(4_000)]
    strict = [ranks[0] < ranks[1] for ranks in pairs if ranks[0] != ranks[1]]
    method, values = rankings.ceiling(config(), WORLDS[1])
    one = Answers(torch.tensor([[[1.0], [0.0]]]).double(), torch.tensor([[1, 2]]), torch.full((1, 2), -1), torch.tensor([-1]), torch.tensor([0]))
    expected = rankings.log_prob_given_no_tie(method, values | {"weights": torch.ones(1).double()}, one).exp().item()
    assert expected == pytest.approx(_given_no_tie(1.0, 1.0), abs=1e-9)
    assert np.mean(strict) == pytest.approx(expected, abs=4 * math.sqrt(0.25 / len(strict)))


def _given_no_tie(difference: float, threshold: float) -> float:
    better, worse = (1 / (1 + math.exp(threshold - sign * difference)) for sign in (1, -1))
    return better / (better + worse)


# Answers


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
def test_every_method_gets_the_same_answers_with_two_people_a_screen(world: World) -> None:
    answers, again = (training_answers(world, 60, 3, seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(answers, again, strict=True))
    assert answers.features.shape == (120, 4, 3) and answers.features.dtype == torch.float64
    assert Counter(answers.prompts.tolist()) == dict.fromkeys(range(60), 2)
    assert (answers.people[0::2] != answers.people[1::2]).all() and set(answers.people.tolist()) == set(range(6))
    there = answers.ranks > 0
    assert set(there.sum(-1).tolist()) == {2, 3, 4} and torch.equal(there, answers.shown >= 0)
    assert torch.equal(answers.features[0::2], answers.features[1::2]), "the same screen for both"
    assert all(sorted(places[places >= 0].tolist()) == list(range(n)) for places, n in zip(answers.shown, there.sum(-1).tolist(), strict=True))


def test_the_test_is_the_same_for_all_seeds_and_has_no_ties() -> None:
    cfg = config()
    looks, panel = (held_out_answers(WORLDS[0], cfg.test_prompts, 3, panel=panel) for panel in (False, True))
    assert len(looks.ranks) < 12 * 6 and all((each.ranks.sort(-1).values == torch.tensor([1, 2])).all() for each in (looks, panel))
    assert set(looks.people.tolist()) == {-1} and (looks.shown == -1).all() and (panel.shown >= 0).all() and panel.people.min() >= 0
    assert torch.equal(looks.features, held_out_answers(WORLDS[0], cfg.test_prompts, 3, panel=False).features)


# Methods and fits


def simple(values: dict[str, torch.Tensor], answers: Answers) -> torch.Tensor:
    """Logistic regression on the difference of two clips."""
    return logsigmoid((answers.features[:, 0] - answers.features[:, 1]) @ values["weights"])


def test_a_fit_is_the_top_with_the_intervals_of_its_curvature() -> None:
    features = torch.randn(400, 2, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    difference = features[:, 0, 0] - features[:, 1, 0]
    won = torch.rand(400, generator=torch.Generator().manual_seed(1)) < torch.sigmoid(0.9 * difference)
    features[~won] = features[~won].flip(1)  # the first has won
    answers = Answers(features, torch.tensor([[1, 2]]).expand(400, 2), torch.full((400, 2), -1), torch.full((400,), -1), torch.arange(400))
    found = rankings.fit(Method("logistic", simple, {"weights": Prior(1, 0, 2)}), answers)
    x = features[:, 0, 0] - features[:, 1, 0]
    weight = found.values["weights"].item()
    assert (x * torch.sigmoid(-weight * x)).sum().item() == pytest.approx(weight / 4, abs=1e-5), "slope of the likelihood = slope of the prior"
    p = torch.sigmoid(weight * x)
    error = ((x.square() * p * (1 - p)).sum().item() + 1 / 4) ** -0.5
    assert found.high["weights"].item() - weight == pytest.approx(1.96 * error, rel=1e-5) == weight - found.low["weights"].item()
    assert found.low["weights"].item() < 0.9 < found.high["weights"].item()


def test_profile_ends_are_those_of_the_likelihood_with_the_other_parameter_at_its_best() -> None:
    """Two binomials whose log-odds are a and a + b: 29 of 30 and 18 of 30. The profile of a does not depend on b: its deviance is the first binomial's."""

    def loss(vector: torch.Tensor) -> torch.Tensor:
        logits = torch.stack([vector[0], vector[0] + vector[1]])
        return -(torch.tensor([29.0, 18.0]) * logsigmoid(logits) + torch.tensor([1.0, 12.0]) * logsigmoid(-logits)).sum()

    top = rankings.lowest(loss, torch.zeros(2, dtype=torch.float64))
    assert torch.sigmoid(top[0]).item() == pytest.approx(29 / 30, abs=1e-6)
    low, high = rankings.profile_ends(loss, top, torch.autograd.functional.hessian(loss, top), 0)
    for end in (low, high):
        p = 1 / (1 + math.exp(-end))
        deviance = 2 * (29 * math.log(29 / 30 / p) + math.log(1 / 30 / (1 - p)))
        assert deviance == pytest.approx(1.96**2, rel=0.05)
    wald = 1.96 * (1 / 29 + 1) ** 0.5
    assert high - top[0].item() > 1.3 * wald > 1.3 * (top[0].item() - low), "far from symmetric"


def test_every_method_says_how_a_pair_ends_and_both_ends_are_certain_together() -> None:
    cfg = config()
    panel = held_out_answers(WORLDS[0], cfg.test_prompts, 3, panel=True)
    for method in rankings.methods(cfg):
        values = {name: torch.linspace(-1, 1, prior.size).double() for name, prior in method.priors.items()}
        told = rankings.log_prob_given_no_tie(method, values, panel)
        other = rankings.log_prob_given_no_tie(method, values, panel._replace(ranks=3 - panel.ranks))
        torch.testing.assert_close(told.exp() + other.exp(), torch.ones(len(told)).double(), rtol=0, atol=1e-12)
        alone = rankings.log_prob_given_no_tie(method, rankings.careful(values), panel)
        ends = torch.where(panel.ranks[:, 0] < panel.ranks[:, 1], 1.0, -1.0)
        difference = ends * ((panel.features[:, 0] - panel.features[:, 1]) @ values["weights"])
        threshold = {"Rao-Kupper, k = 5": math.log(5), "Rao-Kupper, k learned": math.log1p(math.exp(-1))}.get(method.name, 0.0)
        expected = [math.log(_given_no_tie(d, threshold)) for d in difference.tolist()]
        np.testing.assert_allclose(alone.numpy(), expected, atol=1e-9, err_msg=method.name)


def test_the_best_scale_only_scales() -> None:
    cfg = config("--test_prompts", "100")
    looks = held_out_answers(WORLDS[0], cfg.test_prompts, 3, panel=False)
    method, values = rankings.ceiling(cfg, WORLDS[0])
    far = values | {"weights": 5 * values["weights"]}
    scaled = rankings.at_best_scale(method, far, looks)["weights"]
    torch.testing.assert_close(scaled / scaled.norm(), values["weights"] / values["weights"].norm(), rtol=0, atol=1e-12)
    assert 0.7 < scaled.norm() / values["weights"].norm() < 1.4

    def nll(weights: torch.Tensor) -> float:
        return -rankings.log_prob_given_no_tie(method, {"weights": weights}, looks).mean().item()

    assert nll(scaled) <= min(nll(0.98 * scaled), nll(1.02 * scaled)) and nll(scaled) < nll(far["weights"])


def test_means_are_over_the_pairs_of_each_prompt() -> None:
    answers = Answers(*(torch.zeros(3),) * 4, torch.tensor([0, 0, 2]))
    found = rankings.by_prompt(torch.tensor([1.0, 2.0, 5.0]), answers, 4)
    assert found[[0, 2]].tolist() == [1.5, 5.0] and np.isnan(found[[1, 3]]).all()


def test_only_who_is_surely_careless_is_named() -> None:
    ends = torch.tensor([0.99, 0.5, 0.1, 0.76, 0.74]).logit()
    assert rankings.named_careless(Fit({}, {}, {"reliability": ends})) == [1, 2, 4]


# The command


def test_the_quick_bench_gives_flat_rows_and_says_what_holds(tmp_path: Path) -> None:
    cfg = config("--quick", "--write", "--results", str(tmp_path), "--date", "2026-11")
    rows = rankings.main(cfg)["rows"]
    assert isinstance(rows, list)
    assert_flat(rows)
    parts = {part: [row for row in rows if row["part"] == part] for part in ("claims", "prediction", "recovery", "people")}
    assert sum(map(len, parts.values())) == len(rows)
    names = [method.name for method in rankings.methods(cfg)]
    for world, measure in itertools.product((world.name for world in WORLDS), MEASURES.values()):
        mine = {row["method"]: row for row in parts["prediction"] if (row["world"], row["measure"]) == (world, measure)}
        assert list(mine) == [*names, *["the true scores"] * (measure != MEASURES["panel_nll"])]
        assert mine[PLAIN]["minus_plain"] is None
        for row in mine.values():
            if row["method"] != PLAIN:
                assert row["low"] <= row["minus_plain"] <= row["high"] and row["minus_plain"] == pytest.approx(row["value"] - mine[PLAIN]["value"], abs=1e-9)
    assert {row["of"] for row in parts["recovery"] if row["parameter"] == "reliability"} == {person.annotator_id for person in REWARD_PANEL}
    assert all(row["low"] <= row["found"] <= row["high"] and row["inside"] in (0, 1) for row in parts["recovery"])
    assert len(parts["people"]) == 12 and len(parts["claims"]) == 10
    text = next(tmp_path.glob("2026-11_*_rankings.md")).read_text()
    assert ("Does not hold: " in text) == any(not row["holds"] for row in parts["claims"]) and "Davidson-Luce + position + reliability" in text

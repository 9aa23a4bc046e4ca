"""Which clips to rank next: the maths against closed forms, brute force and scipy; the tasks of a person against what is promised."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import integrate, optimize
from torch import Tensor

from reward.asking import Candidate, Given, Mix, next_tasks
from reward.ranking import davidson_luce, weak_orders
from reward.selection import (
    METHODS,
    Method,
    Posterior,
    best_first,
    d_optimal,
    expected_information,
    fisher_information,
    laplace_posterior,
    prior,
    ranking_log_probs,
    variance_information,
)

NO_TIES = torch.tensor([-math.inf])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_features(clips: int = 20, d: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(clips, d, generator=generator(seed), dtype=torch.float64)


def some_posterior(d: int = 3, scale: float = 1.0) -> Posterior:
    root = torch.randn(d, d, generator=generator(7), dtype=torch.float64)
    return Posterior(torch.randn(d, generator=generator(8), dtype=torch.float64), scale * (root @ root.T + 0.1 * torch.eye(d)))


# The posterior


def mixed_events() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Features, index, ranks (with ties, and clips not ranked), tie parameters and weights of 12 events of up to three clips."""
    index = torch.randint(20, (12, 3), generator=generator(1))
    ranks = weak_orders(3)[torch.randint(13, (12,), generator=generator(2))]
    ranks[3] = torch.tensor([1, 2, 0])
    ranks[4] = torch.tensor([0, 0, 0])
    return some_features(), index, ranks, torch.tensor([-0.4, -1.3]), torch.rand(12, generator=generator(3)) + 0.2


def test_the_posterior_is_the_maximum_and_the_curvature_that_scipy_and_differences_find() -> None:
    features, index, ranks, log_tie, weight = mixed_events()
    before = Posterior(torch.tensor([0.5, 0.0, -0.2], dtype=torch.float64), torch.diag(torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)))

    def loss(theta: np.ndarray) -> float:
        away = torch.from_numpy(theta) - before.mean
        value = davidson_luce((features @ torch.from_numpy(theta))[index], ranks, log_tie.double())
        return float(-(weight.double() * value).sum() + 0.5 * away @ torch.linalg.inv(before.covariance) @ away)

    found = laplace_posterior(before, features, index, ranks, log_tie, weight=weight)
    expected = optimize.minimize(loss, np.zeros(3), method="BFGS", options={"gtol": 1e-9})
    np.testing.assert_allclose(found.mean, expected.x, atol=1e-6)
    h, eye = 1e-4, np.eye(3)
    at = found.mean.numpy()
    curvature = [[(loss(at + h * (a + b)) - loss(at + h * (a - b)) - loss(at - h * (a - b)) + loss(at - h * (a + b))) / (4 * h * h) for b in eye] for a in eye]
    np.testing.assert_allclose(torch.linalg.inv(found.covariance), curvature, rtol=1e-5)


def test_pairs_without_ties_have_the_curvature_of_logistic_regression() -> None:
    features, index = some_features(), torch.tensor([[0, 1], [2, 3], [4, 5], [1, 4]])
    ranks = torch.tensor([[1, 2], [2, 1], [1, 2], [1, 2]])
    found = laplace_posterior(prior(3, 0.5), features, index, ranks, NO_TIES)
    away = features[index[:, 0]] - features[index[:, 1]]
    p = torch.sigmoid(away @ found.mean)
    torch.testing.assert_close(torch.linalg.inv(found.covariance), 0.5 * torch.eye(3, dtype=torch.float64) + (away.T * p * (1 - p)) @ away, rtol=1e-9, atol=1e-12)
    won = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(away.T @ (won - p), 0.5 * found.mean, rtol=0, atol=1e-7)


def test_without_events_nothing_is_learned_and_with_certain_ones_it_stays_finite() -> None:
    before = some_posterior()
    after = laplace_posterior(before, some_features(), torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2, dtype=torch.long), NO_TIES)
    torch.testing.assert_close(after.mean, before.mean)
    torch.testing.assert_close(after.covariance, before.covariance)
    far = laplace_posterior(prior(3, 1e-6), 1e3 * some_features(), torch.tensor([[0, 1]] * 50), torch.tensor([[1, 2]] * 50), NO_TIES)
    assert torch.isfinite(far.mean).all() and torch.isfinite(far.covariance).all()
    with pytest.raises(ValueError, match="finite"):
        laplace_posterior(before, torch.full((2, 3), math.nan), torch.tensor([[0, 1]]), torch.tensor([[1, 2]]), NO_TIES)
    with pytest.raises(ValueError, match="precision"):
        prior(3, 0.0)


def test_scores_have_the_mean_and_deviation_of_the_weights() -> None:
    posterior, features = some_posterior(), some_features()
    mean, deviation = posterior.scores(features)
    drawn = torch.distributions.MultivariateNormal(posterior.mean, posterior.covariance).sample((200_000,)) @ features.T
    torch.testing.assert_close(drawn.mean(0), mean, rtol=0, atol=0.05)
    torch.testing.assert_close(drawn.std(0), deviation, rtol=0.01, atol=0)


# Every ranking at once


@pytest.mark.parametrize("k", [2, 3, 4])
def test_every_ranking_has_the_probability_that_davidson_luce_gives_it(k: int) -> None:
    scores = torch.randn(5, k, generator=generator(), dtype=torch.float64)
    log_tie = torch.tensor([-0.3, -1.0, -2.0])[: k - 1]
    orders = weak_orders(k)
    found = ranking_log_probs(scores, log_tie)
    expected = torch.stack([davidson_luce(row.expand(len(orders), k), orders, log_tie.double()) for row in scores])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(5, dtype=torch.float64))
    strict = ranking_log_probs(scores, torch.full((k - 1,), -math.inf)).exp()
    assert (strict[:, (orders.max(1).values < k)] == 0).all()
    torch.testing.assert_close(strict.sum(-1), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("k", [2, 3, 4])
def test_fisher_information_is_the_mean_square_of_the_gradient(k: int) -> None:
    scores, log_tie = torch.randn(3, k, generator=generator(), dtype=torch.float64), torch.tensor([-0.3, -1.0, -2.0])[: k - 1]
    orders = weak_orders(k)
    for row, found in zip(scores, fisher_information(scores, log_tie), strict=True):
        every = row.expand(len(orders), k).clone().requires_grad_()
        log_p = davidson_luce(every, orders, log_tie.double())
        (slope,) = torch.autograd.grad(log_p.sum(), every)
        torch.testing.assert_close(found, torch.einsum("y,yk,yl->kl", log_p.exp().detach(), slope, slope), rtol=0, atol=1e-12)


# How much a task tells


def test_bald_of_a_pair_is_the_mutual_information_that_scipy_integrates() -> None:
    posterior, features = some_posterior(scale=0.3), some_features()
    for log_tie, tasks in ((NO_TIES, [[0, 1], [2, 3], [4, 5]]), (torch.tensor([-0.2]), [[6, 7], [8, 9]])):
        found = expected_information(posterior, features, torch.tensor(tasks), log_tie)
        for (a, b), value in zip(tasks, found.tolist(), strict=True):
            away = features[a] - features[b]
            mean, std = float(away @ posterior.mean), math.sqrt(float(away @ posterior.covariance @ away))

            def p_of(z: float, mean: float = mean, std: float = std, log_tie: Tensor = log_tie) -> np.ndarray:
                difference, tie = mean + std * z, math.exp(float(log_tie))
                weights = np.array([math.exp(difference / 2), tie, math.exp(-difference / 2)])
                return weights / weights.sum()

            def mean_of(function, p_of=p_of) -> float:  # type: ignore[no-untyped-def]
                return float(integrate.quad(lambda z: function(p_of(z)) * math.exp(-z * z / 2) / math.sqrt(2 * math.pi), -8, 8, epsabs=1e-10, limit=200)[0])

            def entropy(p: np.ndarray) -> float:
                return float(-(p[p > 0] * np.log(p[p > 0])).sum())

            expected = entropy(np.array([mean_of(lambda p, i=i: p[i]) for i in range(3)])) - mean_of(entropy)
            assert value == pytest.approx(expected, abs=1e-4) and value > 0


@pytest.mark.parametrize("k", [3, 4])
def test_bald_of_a_set_is_that_of_many_draws_of_the_weights(k: int) -> None:
    posterior, features = some_posterior(scale=0.3), some_features()
    tasks, log_tie = torch.stack([torch.randperm(20, generator=generator(i))[:k] for i in range(4)]), torch.tensor([-0.3, -1.0, -2.0])[: k - 1]
    theta = torch.distributions.MultivariateNormal(posterior.mean, posterior.covariance).sample((20_000,))
    for task, found in zip(tasks, expected_information(posterior, features, tasks, log_tie, nodes=2000), strict=True):
        p = ranking_log_probs(theta @ features[task].T, log_tie).exp()  # [S,Y]
        expected = torch.special.entr(p.mean(0)).sum() - torch.special.entr(p).sum(-1).mean()
        assert float(found) == pytest.approx(float(expected), rel=0.03)
    coarse = expected_information(posterior, features, tasks, log_tie)
    torch.testing.assert_close(coarse, expected_information(posterior, features, tasks, log_tie, nodes=8000), rtol=0.02, atol=0)


def test_large_sets_are_drawn_from_a_seed() -> None:
    posterior, features, tasks, log_tie = some_posterior(), some_features(), torch.arange(10).reshape(2, 5), torch.tensor([-1.0, -2.0, -3.0, -4.0])
    first = expected_information(posterior, features, tasks, log_tie)
    assert torch.equal(first, expected_information(posterior, features, tasks, log_tie)) and (first > 0).all()
    torch.testing.assert_close(first, expected_information(posterior, features, tasks, log_tie, seed=1), rtol=0.15, atol=0)


def test_variance_is_the_variance_times_p_times_one_minus_p_and_twice_bald_where_little_is_open() -> None:
    posterior, features, tasks = some_posterior(), some_features(), torch.arange(20).reshape(10, 2)
    away = features[tasks[:, 0]] - features[tasks[:, 1]]
    p, variance = torch.sigmoid(away @ posterior.mean), (away @ posterior.covariance * away).sum(-1)
    torch.testing.assert_close(variance_information(posterior, features, tasks, NO_TIES), variance * p * (1 - p), rtol=1e-9, atol=1e-12)
    sure = Posterior(posterior.mean, 1e-4 * posterior.covariance)
    for k, log_tie in ((2, NO_TIES), (4, torch.tensor([-0.3, -1.0, -2.0]))):
        tasks = torch.arange(20).reshape(-1, k)
        torch.testing.assert_close(expected_information(sure, features, tasks, log_tie), variance_information(sure, features, tasks, log_tie) / 2, rtol=0.01, atol=1e-9)


def test_what_is_known_tells_nothing() -> None:
    known = Posterior(some_posterior().mean, torch.zeros(3, 3, dtype=torch.float64))
    tasks = torch.tensor([[0, 1, 2], [3, 4, 5], [6, 6, 6]])
    assert expected_information(known, some_features(), tasks, torch.tensor([-0.3, -1.0])).abs().max() < 1e-9
    assert variance_information(known, some_features(), tasks, torch.tensor([-0.3, -1.0])).abs().max() < 1e-9
    assert expected_information(some_posterior(), some_features(), tasks, torch.tensor([-0.3, -1.0]))[2].abs() < 1e-9, "three times the same clip"


@pytest.mark.parametrize("k", [2, 3])
def test_a_d_optimal_batch_is_the_greedy_one_of_brute_force(k: int) -> None:
    posterior, features, log_tie = some_posterior(), some_features(), torch.tensor([-0.3, -1.0])[: k - 1]
    tasks = torch.stack([torch.randperm(20, generator=generator(i))[:k] for i in range(12)])
    x = features[tasks]
    fisher = fisher_information(x @ posterior.mean, log_tie)
    precision = torch.linalg.inv(posterior.covariance)
    start, left, expected, gains = torch.logdet(precision), set(range(12)), [], []
    for _ in range(6):
        after = {row: torch.logdet(precision + x[row].T @ fisher[row] @ x[row]) for row in left}
        best = max(after, key=lambda row: float(after[row]))
        gains.append(float(after[best] - torch.logdet(precision)))
        precision = precision + x[best].T @ fisher[best] @ x[best]
        left.remove(best)
        expected.append(best)
    order, found = d_optimal(posterior, features, tasks, log_tie, 6)
    assert order == expected
    np.testing.assert_allclose(found, gains, rtol=1e-8)
    assert float(found.sum()) == pytest.approx(float(torch.logdet(precision) - start), rel=1e-8)
    assert d_optimal(posterior, features, tasks, log_tie, 99)[0][:6] == expected and len(d_optimal(posterior, features, tasks, log_tie, 99)[0]) == 12


def test_a_d_optimal_batch_does_not_ask_the_same_thing_twice_but_the_others_do() -> None:
    features = torch.eye(4, dtype=torch.float64)[[0, 1, 0, 1, 0, 1, 2, 3]] * torch.tensor([2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.9, 1.9])[:, None]
    tasks = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])
    posterior = prior(4, 1.0)
    first = {method: best_first(method, posterior, features, tasks, NO_TIES, number=3, seed=0) for method in METHODS}
    assert first["d_optimal"][0] in (0, 1, 2) and first["d_optimal"][1] == 3
    assert first["variance"][3] == first["bald"][3] == 3


@pytest.mark.parametrize("method", METHODS)
def test_every_task_is_in_the_order_once_and_the_seed_decides_what_is_equal(method: str) -> None:
    posterior, features, tasks = some_posterior(), some_features(), torch.arange(20).reshape(10, 2)

    def order(seed: int, features: Tensor = features) -> list[int]:
        return best_first(method, posterior, features, tasks, NO_TIES, number=4, seed=seed)  # type: ignore[arg-type]

    assert sorted(order(0)) == list(range(10)) and order(0) == order(0)
    assert (order(0)[:4] == order(1)[:4]) == (method != "random")
    assert order(0, torch.zeros_like(features)) != order(1, torch.zeros_like(features))
    assert best_first(method, posterior, features, tasks[:0], NO_TIES, number=4, seed=0) == []  # type: ignore[arg-type]


# Whom to ask what


CANDIDATES = [Candidate(f"p{i}", (f"{i}a", f"{i}b", f"{i}c")) for i in range(400)]
GOLD = [Candidate(f"g{i}", (f"g{i}a", f"g{i}b", f"g{i}c")) for i in range(30)]


def sets(tasks: list[Given]) -> list[frozenset[str]]:
    return [frozenset(task.clip_ids) for task in tasks]


@pytest.mark.parametrize("method", METHODS)
def test_a_clip_that_cannot_be_judged_is_not_the_first_to_be_ranked(method: Method) -> None:
    features, tasks, log_tie = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([[0, 1], [2, 3], [0, 4]]), torch.tensor([-1.0])
    features[4] = float("nan")
    with pytest.raises(ValueError, match="features of clips must be finite"):
        best_first(method, prior(3, 1.0), features, tasks, log_tie, number=1, seed=0)
    with pytest.raises(ValueError, match="tie parameters are finite"):
        best_first(method, prior(3, 1.0), features, tasks[:2], log_tie * torch.nan, number=1, seed=0)
    assert sorted(best_first(method, prior(3, 1.0), features, tasks[:2], log_tie, number=1, seed=0)) == [0, 1]


def test_a_person_gets_the_mix_that_was_asked_for() -> None:
    mix = Mix(active=0.5, random=0.25, gold=0.1, repeat=0.1, mirrored=0.05, most=1000)
    for number in (20, 200):
        found = Counter(task.kind for task in next_tasks("ann", number, CANDIDATES, [], gold=GOLD, mix=mix))
        for kind, share in zip(("active", "random", "gold", "repeat", "mirrored"), mix.shares, strict=True):
            assert abs(found[kind] - share * number) <= 3, (kind, found)  # type: ignore[index]


def test_the_best_candidates_are_given_in_their_order_and_any_others_at_random() -> None:
    tasks = next_tasks("ann", 40, CANDIDATES, [], mix=Mix(0.75, 0.25, 0, 0, 0))
    active, drawn = ([CANDIDATES.index(Candidate(task.prompt_id, task.clip_ids)) for task in tasks if task.kind == kind] for kind in ("active", "random"))
    assert active == sorted(active) and max(active) < 40 and 9 <= len(drawn) <= 11
    assert max(drawn) > 200 and drawn != sorted(drawn)


def test_nobody_gets_a_set_twice_but_as_a_repeat() -> None:
    tasks = next_tasks("ann", 200, CANDIDATES, [], gold=GOLD, mix=Mix(0.4, 0.2, 0.1, 0.2, 0.1, apart=7))
    first: dict[frozenset[str], int] = {}
    again = Counter[frozenset[str]]()
    for place, (task, key) in enumerate(zip(tasks, sets(tasks), strict=True)):
        if task.kind not in ("repeat", "mirrored"):
            assert key not in first
            first[key] = place
            continue
        before = tasks[first[key]]
        again[key] += 1
        assert place - first[key] > 7 and before.kind in ("active", "random") and before.clip_ids == task.clip_ids
        expected = before.shown_order if task.kind == "repeat" else tuple(2 - place for place in before.shown_order)
        assert task.shown_order == expected
    assert max(again.values()) == 1 and sum(again.values()) > 40
    assert {task.shown_order for task in tasks} == set(itertools.permutations(range(3)))


def test_the_same_question_gets_the_same_answer_and_pieces_add_up() -> None:
    mix = Mix(0.4, 0.2, 0.1, 0.2, 0.1)
    whole = next_tasks("ann", 60, CANDIDATES, [], gold=GOLD, mix=mix, seed=3)
    pieces: list[Given] = []
    for _ in range(12):
        pieces += next_tasks("ann", 5, CANDIDATES, pieces, gold=GOLD, mix=mix, seed=3)
    assert pieces == whole == next_tasks("ann", 60, CANDIDATES, [], gold=GOLD, mix=mix, seed=3)
    assert whole != next_tasks("ann", 60, CANDIDATES, [], gold=GOLD, mix=mix, seed=4)
    other = next_tasks("Łukasz 🎬", 60, CANDIDATES, [], gold=GOLD, mix=mix, seed=3)
    assert [task.kind for task in other] != [task.kind for task in whole]


def test_a_candidate_is_given_to_as_many_people_as_wanted() -> None:
    for people in (1, 2):
        given: list[Given] = []
        for person in "abcd":
            given += next_tasks(person, 30, CANDIDATES[:60], given, mix=Mix(0.5, 0.3, 0, 0.2, 0, people=people))
        persons = Counter(clips for _, clips in {(task.person, frozenset(task.clip_ids)) for task in given})
        assert max(persons.values()) == people
        assert len({task.clip_ids for task in given}) <= 60
    tasks = next_tasks("b", 5, CANDIDATES, [Given("a", "p0", ("0c", "0b", "0a"), (0, 1, 2), "active")], mix=Mix(1, 0, 0, 0, 0))
    assert ("0a", "0b", "0c") not in [task.clip_ids for task in tasks], "the same clips in another order are the same task"
    both = [task for person in "ab" for task in next_tasks(person, 30, CANDIDATES, [], gold=GOLD, mix=Mix(0, 0, 1, 0, 0))]
    assert Counter(task.clip_ids for task in both if task.kind == "gold") == Counter(dict.fromkeys([each.clip_ids for each in GOLD], 2)), "gold goes to everybody"


def test_nobody_is_given_more_than_the_most_and_fewer_where_nothing_is_left() -> None:
    mix = Mix(0.8, 0.2, 0, 0, 0, most=12)
    first = next_tasks("ann", 8, CANDIDATES, [], mix=mix)
    assert len(next_tasks("ann", 8, CANDIDATES, first, mix=mix)) == 4
    assert len(next_tasks("ann", 50, CANDIDATES[:6], [], mix=Mix(0.8, 0.2, 0, 0, 0))) == 6
    assert next_tasks("ann", 5, [], []) == [] and next_tasks("ann", 0, CANDIDATES, []) == []


def test_a_kind_with_nothing_to_give_leaves_its_turn_to_a_candidate() -> None:
    tasks = next_tasks("ann", 30, CANDIDATES, [], mix=Mix(0.3, 0.1, 0.6, 0, 0))
    assert len(tasks) == 30 and {task.kind for task in tasks} == {"active", "random"}
    tasks = next_tasks("ann", 30, CANDIDATES, [], mix=Mix(0, 0.4, 0.6, 0, 0))
    assert len(tasks) == 30 and {task.kind for task in tasks} == {"random"}, "who wants nothing chosen gets nothing chosen"
    assert [task.kind for task in next_tasks("ann", 4, CANDIDATES, [], mix=Mix(0.1, 0, 0, 0.9, 0, apart=3))] == ["active"] * 4


@pytest.mark.parametrize("shares", [(0.5, 0.5, 0.5, 0, 0), (1.2, -0.2, 0, 0, 0), (0, 0, 0, 0, 0), (math.nan, 0, 0, 0, 0)])
def test_shares_that_are_no_mix_are_refused(shares: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="add up to 1"):
        Mix(*shares)  # type: ignore[arg-type]

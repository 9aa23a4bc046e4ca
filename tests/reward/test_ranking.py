"""Ranking likelihoods against each other, against choix, and against enumeration."""

from __future__ import annotations

import itertools
import math

import choix
import numpy as np
import pytest
import torch

from reward.ranking import bradley_terry, davidson, davidson_luce, pair_outcomes, plackett_luce, tie_parameter, weak_orders

NO_TIES = torch.tensor([-math.inf] * 3, dtype=torch.float64)


def scores(batch: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def strict_ranks(batch: int, k: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(batch, k, generator=torch.Generator().manual_seed(seed)).argsort(-1).argsort(-1) + 1


def test_davidson_luce_of_two_clips_is_davidson() -> None:
    r = scores(50, 2)
    log_tie = torch.tensor(0.3, dtype=torch.float64)
    expected = davidson(r[:, 0] - r[:, 1], log_tie)  # [50, 3]
    for outcome, ranks in enumerate([(1, 2), (1, 1), (2, 1)]):
        found = davidson_luce(r, torch.tensor(ranks).expand(50, 2), log_tie[None])
        torch.testing.assert_close(found, expected[:, outcome], rtol=0, atol=1e-12)


def test_davidson_without_ties_is_bradley_terry() -> None:
    d = scores(50, 1)[:, 0]
    found = davidson(d, torch.tensor(-math.inf, dtype=torch.float64))
    torch.testing.assert_close(found[:, 0], bradley_terry(d), rtol=0, atol=1e-12)
    assert torch.all(found[:, 1] == -math.inf)


def test_davidson_luce_without_ties_is_plackett_luce_for_partial_rankings_too() -> None:
    r, ranks = scores(60, 4), strict_ranks(60, 4)
    ranks[:20, 2] = 0
    ranks[10:15, 0] = 0
    torch.testing.assert_close(davidson_luce(r, ranks, NO_TIES), plackett_luce(r, ranks), rtol=0, atol=1e-12)


def test_plackett_luce_of_two_clips_is_bradley_terry() -> None:
    r = scores(40, 2)
    found = plackett_luce(r, torch.tensor([1, 2]).expand(40, 2))
    torch.testing.assert_close(found, bradley_terry(r[:, 0] - r[:, 1]), rtol=0, atol=1e-12)


def test_plackett_luce_agrees_with_choix() -> None:
    worths = scores(1, 6)[0]
    generator = np.random.default_rng(3)
    data = [tuple(int(i) for i in generator.permutation(6)[:4]) for _ in range(200)]  # choix: best first
    ranks = torch.tensor([[1, 2, 3, 4]] * len(data))
    ours = plackett_luce(worths[torch.tensor(data)], ranks)
    # choix takes a ranking of a subset to be complete on that subset only
    assert -ours.sum().item() == pytest.approx(_choix_cost(worths.numpy(), data), abs=1e-6)


def _choix_cost(worths: np.ndarray, data: list[tuple[int, ...]]) -> float:
    as_top1 = [(ranking[i], ranking[i + 1 :]) for ranking in data for i in range(len(ranking) - 1)]
    return float(choix.opt.Top1Fcts(as_top1, penalty=0.0).objective(worths))


def test_the_worths_that_maximise_plackett_luce_are_those_of_choix() -> None:
    data = [tuple(int(i) for i in np.random.default_rng(seed).permutation(5)) for seed in range(60)]
    expected = torch.from_numpy(choix.opt_rankings(5, data, alpha=1e-9))
    worths = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([worths], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe")
    ranks = torch.arange(1, 6).expand(len(data), 5)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = -plackett_luce(worths[torch.tensor(data)], ranks).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(worths.detach() - worths.detach().mean(), expected - expected.mean(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_probabilities_of_all_rankings_with_ties_sum_to_one(k: int) -> None:
    orders = weak_orders(k)
    assert len(orders) == {2: 3, 3: 13, 4: 75}[k]
    log_tie = torch.tensor([0.4, -0.7, 0.2], dtype=torch.float64)
    total = davidson_luce(scores(1, k).expand(len(orders), k), orders, log_tie).exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-12)


def test_a_likelihood_written_as_loops_agrees() -> None:
    r, log_tie = scores(1, 4)[0], torch.tensor([0.1, -0.4, -0.9], dtype=torch.float64)

    def worth(clips: tuple[int, ...]) -> float:
        delta = 1.0 if len(clips) == 1 else math.exp(log_tie[len(clips) - 2])
        return delta * math.exp(sum(r[i].item() for i in clips) / len(clips))

    for ranks in weak_orders(4).tolist():
        remaining, expected = list(range(4)), 0.0
        for place in range(1, max(ranks) + 1):
            choice = tuple(i for i in remaining if ranks[i] == place)
            options = itertools.chain.from_iterable(itertools.combinations(remaining, n) for n in range(1, len(remaining) + 1))
            expected += math.log(worth(choice) / sum(worth(option) for option in options))
            remaining = [i for i in remaining if i not in choice]
        assert davidson_luce(r[None], torch.tensor([ranks]), log_tie).item() == pytest.approx(expected, abs=1e-12)


def test_only_the_order_of_ranks_counts_and_clips_may_be_permuted() -> None:
    r = scores(75, 4)
    ranks = weak_orders(4)
    log_tie = torch.tensor([0.4, -0.7, 0.2], dtype=torch.float64)
    found = davidson_luce(r, ranks, log_tie)
    torch.testing.assert_close(davidson_luce(r, 3 * ranks + 2, log_tie), found, rtol=0, atol=0)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(davidson_luce(r[:, order], ranks[:, order], log_tie), found, rtol=0, atol=1e-12)
    torch.testing.assert_close(davidson_luce(r + 5, ranks, log_tie), found, rtol=0, atol=1e-12)


def test_one_tie_parameter_per_event_equals_separate_calls() -> None:
    r, ranks = scores(75, 4), weak_orders(4)
    log_tie = scores(75, 3, seed=4)
    separate = torch.cat([davidson_luce(r[i : i + 1], ranks[i : i + 1], log_tie[i]) for i in range(75)])
    torch.testing.assert_close(davidson_luce(r, ranks, log_tie), separate, rtol=0, atol=1e-12)


def test_gradients_in_scores_and_tie_parameters() -> None:
    ranks = torch.cat([weak_orders(4)[::7], torch.tensor([[1, 0, 2, 2], [0, 0, 1, 2]])])
    r = scores(len(ranks), 4).requires_grad_()
    log_tie = torch.tensor([0.4, -0.7, 0.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: davidson_luce(a, ranks, b), (r, log_tie))
    strict = strict_ranks(8, 4)
    assert torch.autograd.gradcheck(lambda a: plackett_luce(a, strict), (scores(8, 4).requires_grad_(),))


def test_gradients_stay_finite_when_ties_are_forbidden_and_clips_unranked() -> None:
    r = scores(3, 4).requires_grad_()
    davidson_luce(r, torch.tensor([[1, 2, 3, 4], [0, 2, 1, 0], [0, 0, 0, 0]]), NO_TIES).sum().backward()
    assert r.grad is not None and torch.isfinite(r.grad).all() and torch.all(r.grad[2] == 0)


def test_equal_clips_tie_with_the_share_the_tie_parameter_came_from() -> None:
    log_tie = torch.tensor(tie_parameter(0.37), dtype=torch.float64)
    assert davidson(torch.zeros(1, dtype=torch.float64), log_tie)[0, 1].exp().item() == pytest.approx(0.37, abs=1e-12)


def test_plackett_luce_refuses_ties() -> None:
    with pytest.raises(ValueError, match="strict rankings"):
        plackett_luce(scores(1, 3), torch.tensor([[1, 1, 2]]))


def test_pair_outcomes_read_ranks_and_skip_unranked_clips() -> None:
    outcome, known = pair_outcomes(torch.tensor([[1, 3, 3, 0]]))
    assert outcome[known].tolist() == [1, 1, 0]
    assert known.tolist() == [[True, True, False, True, False, False]]

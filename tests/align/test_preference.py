"""DPO by hand, against the papers' own forms, and on a world where the pull of a pair is known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from align.objectives.preference import Pairs, describe_beta, flow_dpo, mean_beta, pair_errors, preference_pairs
from align.objectives.regression import clip_error
from base_model.paths import Path, VariancePreserving, add_noise
from base_model.types import Conditioning, Known
from tests.worlds import PATHS, RECTIFIED, GaussianModel, GaussianWorld, conditions

NAN = float("nan")


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_loss_by_hand_on_two_pairs() -> None:
    """beta 2. Pair one: winner's error falls by 1, loser's rises by 0.5: margin 1.5. Pair two the other way round: margin -1.5."""
    loss = flow_dpo(vector(1, 3.5), vector(2.5, 1), vector(2, 3), vector(2, 2), 2.0)
    margins = [1.5, -1.5]
    assert float(loss.value) == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / 2)
    stats = {name.removeprefix("preference/"): float(value) for name, value in loss.stats.items()}
    assert stats == pytest.approx(
        {"loss": float(loss.value), "accuracy": 0.5, "margin": 0.0, "error_win": 2.25, "error_lose": 1.75, "error_win_change": -0.25, "error_lose_change": -0.25}
    )


def test_the_accuracy_counts_pairs_however_large_their_margin() -> None:
    loss = flow_dpo(vector(0, 1, 0.9), vector(5, 1.1, 1), vector(1, 1, 1), vector(1, 1.2, 1), 2.0)  # margins 5, -0.1, 0.1
    assert float(loss.stats["preference/accuracy"]) == pytest.approx(2 / 3) and float(loss.stats["preference/margin"]) == pytest.approx(5 / 3)


def test_a_beta_below_one_is_no_error() -> None:
    assert float(flow_dpo(vector(0), vector(2), vector(1), vector(1), 0.5).value) == pytest.approx(math.log1p(math.exp(-0.5)))


def test_at_the_reference_the_loss_is_log_two_and_the_accuracy_a_half() -> None:
    error = vector(0.3, 0.7)
    loss = flow_dpo(error, error + 1, error, error + 1, 500.0)
    assert float(loss.value) == pytest.approx(math.log(2)) and float(loss.stats["preference/accuracy"]) == 0.5


def test_the_gradient_is_the_finite_difference_pulls_the_winner_down_and_pushes_the_loser_up() -> None:
    win, lose = vector(0.5, 0.9).requires_grad_(), vector(0.6, 0.4).requires_grad_()
    weight, pair_weight, reference = vector(0.5, 2.0), vector(1, 3), vector(0.4, 0.8).requires_grad_()

    def value(w: Tensor, x: Tensor) -> Tensor:
        return flow_dpo(w, x, reference, vector(0.7, 0.5), 4.0, time_weight=weight, pair_weight=pair_weight).value

    assert torch.autograd.gradcheck(value, (win, lose))
    value(win, lose).backward()
    margins = [-2 * 0.5 * (0.1 + 0.1), -2 * 2 * (0.1 + 0.1)]
    want = [k * p * w * 2 / (1 + math.exp(m)) / 2 for k, p, w, m in zip((1, 1), (1, 3), (0.5, 2.0), margins, strict=True)]
    assert win.grad is not None and win.grad.tolist() == pytest.approx(want)
    assert lose.grad is not None and lose.grad.tolist() == pytest.approx([-g for g in want])
    assert reference.grad is None, "the reference is not trained"


def test_only_the_policys_errors_get_a_gradient() -> None:
    inputs = [vector(0.5, 0.9).requires_grad_() for _ in range(6)]
    loss = flow_dpo(inputs[0], inputs[1], inputs[2], inputs[3], 2.0, time_weight=inputs[4], pair_weight=inputs[5])
    loss.value.backward()
    assert not any(stat.requires_grad for stat in loss.stats.values())
    assert [each.grad is not None for each in inputs] == [True, True, False, False, False, False]


def test_how_hard_a_prompt_is_cancels_a_swap_turns_the_margin_and_order_does_not_matter() -> None:
    e = [vector(0.5, 0.9, 0.1), vector(0.6, 0.4, 0.2), vector(0.4, 0.8, 0.3), vector(0.7, 0.5, 0.5)]
    base = flow_dpo(*e, 4.0)  # type: ignore[arg-type]
    hard = flow_dpo(e[0] + 3, e[1] + 5, e[2] + 3, e[3] + 5, 4.0)
    assert_close(hard.value, base.value)
    swapped = flow_dpo(e[1], e[0], e[3], e[2], 4.0)
    assert_close(swapped.stats["preference/margin"], -base.stats["preference/margin"])
    assert_close(swapped.stats["preference/accuracy"], 1 - base.stats["preference/accuracy"])
    order = torch.tensor([2, 0, 1])
    assert_close(flow_dpo(*(each[order] for each in e), 4.0).value, base.value)  # type: ignore[arg-type]


def test_pairs_that_are_not_valid_do_not_count_even_when_they_are_nan() -> None:
    win = vector(0.5, NAN).requires_grad_()
    loss = flow_dpo(win, vector(0.6, 0.1), vector(0.4, 0.1), vector(0.7, 0.1), 4.0, valid=torch.tensor([True, False]))
    loss.value.backward()
    assert_close(loss.value.detach(), flow_dpo(vector(0.5), vector(0.6), vector(0.4), vector(0.7), 4.0).value)
    assert win.grad is not None and float(win.grad[1]) == 0 and all(stat.isfinite() for stat in loss.stats.values())
    for odd in (0.0, -1.0):
        with pytest.raises(ValueError, match="beta must be positive"):
            flow_dpo(win, win, win, win, odd)


def noised(path: Path, seed: int = 0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    win, lose, eps = (torch.randn(3, 1, 2, 2, 2, generator=g, dtype=torch.float64) for _ in range(3))
    return win, lose, eps, path.t_max * vector(0.2, 0.5, 0.8)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_diffusion_dpo_on_predicted_noise_is_flow_dpo_with_alpha_squared(path: Path) -> None:
    """Equation 14 with T omega = 1, errors of eps: the noise that two velocities imply differs by alpha times their difference."""
    world = GaussianWorld(path)
    policy, reference = GaussianModel(world, 0.3), GaussianModel(GaussianWorld(path, mean=1.0))
    win, lose, eps, t = noised(path)
    total = torch.zeros(3, dtype=torch.float64)
    for x0, sign in ((win, 1), (lose, -1)):
        x_t = add_noise(path, x0, eps, t)
        for model, of in ((policy, 1), (reference, -1)):
            guess = path.split(x_t, model(x_t, t, conditions(3)), t)[1]
            total = total + sign * of * (guess - eps).square().flatten(1).mean(1)
    want = -torch.nn.functional.logsigmoid(-250.0 * total).mean()
    errors = [error.double() for model in (policy, reference) for error in pair_errors(model, win, lose, eps, t, conditions(3))]
    got = flow_dpo(errors[0], errors[1], errors[2], errors[3], 500.0, time_weight=path.alpha(t).square()).value
    assert_close(got, want, atol=0, rtol=1e-4)


def test_both_clips_of_a_pair_meet_the_same_time_noise_and_prompt_in_one_pass() -> None:
    seen: list[tuple[Tensor, Tensor, Conditioning]] = []

    class Spy(GaussianModel):
        def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
            seen.append((x_t, t, cond))
            return super().__call__(x_t, t, cond)

    model = Spy(GaussianWorld())
    win, lose, eps, t = noised(RECTIFIED)
    cond = replace(conditions(3), prompts=("a", "b", "c"))
    error_win, error_lose = pair_errors(model, win, lose, eps, t, cond)
    ((x_t, times, told),) = seen
    assert_close(x_t, torch.cat([add_noise(RECTIFIED, win, eps, t), add_noise(RECTIFIED, lose, eps, t)]))
    assert torch.equal(times, torch.cat([t, t])) and told.prompts == ("a", "b", "c", "a", "b", "c")
    for x0, error in ((win, error_win), (lose, error_lose)):
        u = model(add_noise(RECTIFIED, x0, eps, t), t, cond)
        assert_close(error, clip_error(u, eps - x0))


def test_what_a_visual_prompt_gives_takes_no_part_in_the_errors() -> None:
    model = GaussianModel(GaussianWorld())
    win, lose, eps, t = noised(RECTIFIED)
    mask = torch.zeros(3, 2, 2, 2, dtype=torch.bool)
    mask[:, 0] = True
    told = replace(conditions(3), known=Known(win, mask))
    free = pair_errors(model, win[:, :, 1:], lose[:, :, 1:], eps[:, :, 1:], t, conditions(3))
    assert all(torch.equal(a, b) for a, b in zip(pair_errors(model, win, lose, eps, t, told), free, strict=True))


def test_the_same_noise_for_both_clips_is_what_makes_the_difference_precise() -> None:
    """Two clips that differ by little: with shared noise the difference of their errors varies far less over draws than with noise of their own."""
    model, g = GaussianModel(GaussianWorld(std=0.5), 0.2), torch.Generator().manual_seed(0)
    n = 400
    win, t = torch.randn(n, 1, 1, 2, 2, generator=g, dtype=torch.float64) * 0.5, torch.full((n,), 0.5, dtype=torch.float64)
    lose = win + 0.05
    eps, other = (torch.randn(win.shape, generator=g, dtype=torch.float64) for _ in range(2))
    shared = pair_errors(model, win, lose, eps, t, conditions(n))
    mixed = pair_errors(model, win, win, eps, t, conditions(n))[0] - pair_errors(model, lose, lose, other, t, conditions(n))[0]
    spreads = [float(each.detach().std()) for each in (shared[0] - shared[1], mixed)]
    print(spreads)
    assert spreads[0] < 0.2 * spreads[1]


def test_a_generator_learns_from_pairs_to_make_what_people_chose() -> None:
    """Clips around 0; people choose the larger. Gradient steps on a shift of the velocity move what is generated up (a velocity leads from clip to noise, so the shift falls)."""
    world, g = GaussianWorld(mean=0.0), torch.Generator().manual_seed(0)
    policy, reference = GaussianModel(world), GaussianModel(world)
    optimizer = torch.optim.SGD(policy.network.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        clips = 0.5 * torch.randn(32, 1, 1, 1, 1, generator=g, dtype=torch.float64)
        pairs = preference_pairs(clips.flatten(), 2)
        t, eps = torch.rand(len(pairs.win), generator=g, dtype=torch.float64) * 0.8 + 0.1, torch.randn(len(pairs.win), 1, 1, 1, 1, generator=g, dtype=torch.float64)
        errors = pair_errors(policy, clips[pairs.win], clips[pairs.lose], eps, t, conditions(len(t)))
        with torch.no_grad():
            anchor = pair_errors(reference, clips[pairs.win], clips[pairs.lose], eps, t, conditions(len(t)))
        loss = flow_dpo(*errors, *anchor, 20.0)
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()
        losses.append((float(loss.value.detach()), float(loss.stats["preference/accuracy"])))
    shift = float(policy.network.value.detach())
    print(shift, losses[0], losses[-1])
    assert losses[0] == (pytest.approx(math.log(2)), 0.5) and shift < -0.05
    assert sum(accuracy for _, accuracy in losses[-10:]) / 10 > 0.9 and losses[-1][0] < losses[0][0]


def as_sets(pairs: Pairs) -> dict[tuple[int, int], float]:
    return {(int(i), int(j)): float(w) for i, j, w in zip(*pairs, strict=True)}


def test_the_extremes_of_each_group_make_one_pair_unknown_scores_and_ties_none() -> None:
    score = torch.tensor([1.0, 5.0, 3.0, NAN, 2.0, 2.0, 2.0, 2.0, NAN, 7.0, NAN, NAN])
    assert as_sets(preference_pairs(score, 4)) == {(1, 0): 1.0}
    assert as_sets(preference_pairs(torch.tensor([NAN, 4.0, 6.0]), 3)) == {(2, 1): 1.0}
    assert as_sets(preference_pairs(torch.tensor([-math.inf, 4.0]), 2)) == {(1, 0): 1.0}


def test_a_stored_ranking_makes_all_its_pairs_and_counts_once() -> None:
    rank = torch.tensor([2.0, 1.0, 3.0, 1.0])  # two best
    pairs = preference_pairs(-rank, 4, which="all")
    assert as_sets(pairs) == pytest.approx({(1, 0): 0.2, (3, 0): 0.2, (0, 2): 0.2, (1, 2): 0.2, (3, 2): 0.2})
    assert pairs.win.dtype == torch.long == pairs.lose.dtype
    two = preference_pairs(torch.tensor([1.0, 2.0, 3.0, 9.0, 1.0]), torch.tensor([0, 4, 0, 4, 0]), which="all")
    assert as_sets(two) == pytest.approx({(3, 1): 1.0, (2, 0): 0.5, (2, 4): 0.5})


def test_a_margin_leaves_out_what_is_too_close_to_call() -> None:
    score = torch.tensor([0.0, 1.0, 0.0, 1.5])
    assert as_sets(preference_pairs(score, 2, margin=1.0)) == {(3, 2): 1.0}
    with pytest.raises(ValueError, match="margin must not be negative"):
        preference_pairs(score, 2, margin=-1.0)
    assert len(preference_pairs(torch.zeros(4), 2).win) == 0


def test_order_within_a_group_does_not_matter() -> None:
    g = torch.Generator().manual_seed(0)
    score, order = torch.randn(8, generator=g), torch.tensor([2, 0, 3, 1, 6, 7, 5, 4])
    for which in ("extremes", "all"):
        direct = as_sets(preference_pairs(score, 4, which=which))  # type: ignore[arg-type]
        moved = as_sets(preference_pairs(score[order], 4, which=which))  # type: ignore[arg-type]
        assert {(int(order[i]), int(order[j])): w for (i, j), w in moved.items()} == direct


def test_beta_is_told_with_its_reduction() -> None:
    assert mean_beta(500.0, "mean", 4096) == 500 and mean_beta(1.0, "sum", 4096) == 4096
    assert describe_beta(500.0, "mean", 4096) == "beta 500 on the mean, 0.12207 on the sum of the squared errors of 4096 latent elements"
    assert describe_beta(1.0, "sum", 4096) == "beta 4096 on the mean, 1 on the sum of the squared errors of 4096 latent elements"


def test_a_beta_for_sums_gives_the_same_loss_as_its_beta_for_means() -> None:
    path = VariancePreserving()
    model, reference = GaussianModel(GaussianWorld(path), 0.3), GaussianModel(GaussianWorld(path))
    win, lose, eps, t = noised(path)
    errors = [error.double() for each in (model, reference) for error in pair_errors(each, win, lose, eps, t, conditions(3))]
    elements = win[0].numel()
    summed = -torch.nn.functional.logsigmoid(-1.5 / 2 * elements * (errors[0] - errors[2] - errors[1] + errors[3])).mean()
    assert_close(flow_dpo(errors[0], errors[1], errors[2], errors[3], mean_beta(1.5, "sum", elements)).value, summed)

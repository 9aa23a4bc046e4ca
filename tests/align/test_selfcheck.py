"""Each self-check passes on a sound start and stops an unsound one with one line."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

from align import selfcheck
from align.kernels import Gaussian
from align.selfcheck import equal_ranks, first_ratio, first_residual, first_velocity, fresh_adapter, kl_gradient, known_rewards, reward_spread, rounding
from base_model.errors import GuardStop

NAN = float("nan")


def one_line(stop: pytest.ExceptionInfo[GuardStop]) -> bool:
    return stop.value.exit_status == 3 and "\n" not in str(stop.value) and str(stop.value).startswith("self-check: ")


def test_the_first_ratio_must_be_exactly_one_in_the_same_batches_and_a_millionth_off_in_others() -> None:
    old = torch.tensor([-0.5, 1.25], dtype=torch.float64)
    assert first_ratio(old.clone().requires_grad_(), old, same_batches=True) == 0
    near = old + torch.tensor([0.0, 5e-7], dtype=torch.float64)
    assert first_ratio(near, old, same_batches=False) == pytest.approx(5e-7, rel=1e-5)
    for log_prob, same in ((near, True), (old + 2e-6, False), (old - 2e-6, False), (old * NAN, False), (old * NAN, True)):
        with pytest.raises(GuardStop) as stop:
            first_ratio(log_prob, old, same_batches=same)
        assert one_line(stop)


def test_some_prompt_must_have_different_rewards() -> None:
    assert reward_spread(torch.tensor([1.0, 1.0, 2.0, 4.0]), 2) == pytest.approx(1.0)
    assert reward_spread(torch.tensor([NAN, 1.0, 3.0, NAN, NAN, NAN]), 3) == pytest.approx(1.0)
    assert reward_spread(torch.tensor([1.0, 9.0, 3.0, NAN, 9.0]), torch.tensor([4, 7, 4, 4, 7])) == pytest.approx(1.0)
    for flat in ([1.0, 1.0, 2.0, 2.0], [NAN] * 4, [0.1, NAN, 3.0, NAN]):
        with pytest.raises(GuardStop, match="no prompt has two clips") as stop:
            reward_spread(torch.tensor(flat), 2)
        assert one_line(stop)


def test_the_kl_term_must_reach_the_parameters_although_policy_and_reference_are_equal() -> None:
    """A fresh adapter: b is zero, so the policy is the reference, the plain gradient is zero and only the moved reference tells."""
    a, b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))
    base, std = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), torch.full((2, 1), 0.3)
    policy, reference = Gaussian(base + a * b, std), Gaussian(base, std)
    assert torch.autograd.grad(policy.kl(reference).mean(), b, retain_graph=True)[0].abs().max() == 0
    assert kl_gradient(policy, reference, [a, b]) > 0
    policy.kl(reference).mean().backward()


def test_a_kl_without_gradient_stops_the_run() -> None:
    b = nn.Parameter(torch.zeros(4))
    base, std = torch.zeros(2, 4), torch.full((2, 1), 0.3)
    for policy, reference, parameters in (
        (Gaussian(base, std), Gaussian(base, std), [b]),
        (Gaussian(base + b, std), Gaussian(base, std), [nn.Parameter(torch.zeros(4))]),
        (Gaussian(base + b, std), Gaussian(base + b, std), [b]),
        (Gaussian(base + b, std), Gaussian(base, std), []),
        (Gaussian(base + b, std * 0), Gaussian(base, std * 0), [b]),
    ):
        with pytest.raises(GuardStop) as stop:
            kl_gradient(policy, reference, parameters)
        assert one_line(stop)


def noise(seed: int) -> Tensor:
    return torch.randn(6, 2, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_what_was_sampled_is_a_draw_of_the_replayed_step() -> None:
    """Against the standard errors of mean and variance; whoever samples with another mean or std is found out, whatever log-probability was remembered."""
    mean, std = noise(0), torch.linspace(0.2, 0.7, 6, dtype=torch.float64).reshape(6, 1, 1, 1, 1)
    step = Gaussian(mean, std)
    z = noise(1)
    off = first_residual(step, step.sample(z))
    assert off == pytest.approx(max(abs(float(z.mean())) * z.numel() ** 0.5, abs(float(z.square().mean()) - 1) * (z.numel() / 2) ** 0.5)) and off < 3
    for sampled in (step.sample(1.2 * z), step.sample(0.8 * z), mean + std * (z + 0.15), noise(2), step.sample(z * torch.nan)):
        with pytest.raises(GuardStop, match="residuals") as stop:
            first_residual(step, sampled)
        assert one_line(stop)


def test_the_first_velocity_is_the_remembered_one_and_a_fresh_adapter_changes_nothing() -> None:
    u = noise(0)
    assert first_velocity(u.clone().requires_grad_(), u) == 0 == fresh_adapter(u, u)
    for check, says in ((first_velocity, "velocity is off"), (fresh_adapter, "apart")):
        for other in (u + 1e-9, u * NAN):
            with pytest.raises(GuardStop, match=says) as stop:
                check(other, u)
            assert one_line(stop)


def test_a_gpu_may_round_otherwise_with_a_gradient_and_a_cpu_may_not() -> None:
    assert rounding(torch.device("cpu"), 3.0) == 0 and rounding(torch.device("cuda"), 3.0) == pytest.approx(3e-5)


def test_half_precision_rounds_a_thousand_times_as_far_but_on_a_cpu_not_in_the_same_batch() -> None:
    assert rounding(torch.device("cpu"), 3.0, half=True) == 0 and rounding(torch.device("cuda"), 3.0, half=True) == pytest.approx(0.09)
    old = torch.zeros(2)
    assert first_ratio(old + 5e-4, old, same_batches=False, half=True) == pytest.approx(5e-4, rel=1e-2)
    for off, same_batches, half in ((5e-4, True, True), (2e-3, False, True), (5e-4, False, False)):
        with pytest.raises(GuardStop, match="ratio"):
            first_ratio(old + off, old, same_batches=same_batches, half=half)


@pytest.mark.gpu
def test_on_a_gpu_a_rounding_passes_and_another_network_does_not() -> None:
    u = noise(0).cuda()
    for check in (first_velocity, fresh_adapter):
        assert 0 < check(u + 3e-7, u) < 1e-6
        with pytest.raises(GuardStop, match="allowed"):
            check(1.001 * u, u)


def test_nearly_all_rewards_are_known() -> None:
    reward = torch.ones(40)
    reward[:2] = NAN
    assert known_rewards(reward) == 0.95 and known_rewards(torch.ones(3)) == 1
    reward[2] = float("inf")
    for bad in (reward, torch.full((4,), NAN)):
        with pytest.raises(GuardStop, match="rewards are known") as stop:
            known_rewards(bad)
        assert one_line(stop)


def test_ranks_are_as_far_apart_as_the_norms_that_differ_most() -> None:
    gradients = torch.tensor([[3.0, 4.0], [3.0, 4.0], [3.0, 4.0 + 2e-5]], dtype=torch.float64)
    assert equal_ranks(gradients) == pytest.approx(2e-5 / (4 + 2e-5)) and equal_ranks(gradients[:1]) == 0 and equal_ranks(torch.zeros(2, 3)) == 0
    nothing_on_one = torch.tensor([[1e-4, 40.0, 0.3], [0.0, 40.0, 0.3]], dtype=torch.float64)  # a gradient beside weights and a draw
    for bad in (torch.tensor([[3.0, 4.0], [3.0, 4.1]]), torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [NAN]]), nothing_on_one, nothing_on_one.flip(0)):
        with pytest.raises(GuardStop, match="ranks are") as stop:
            equal_ranks(bad)
        assert one_line(stop)


def test_in_a_rehearsal_nothing_stops_and_everything_is_told_also_in_threads() -> None:
    with selfcheck.rehearsal() as found:
        assert selfcheck.rehearsing()
        thread = threading.Thread(target=lambda: reward_spread(torch.ones(4), 2))
        thread.start()
        thread.join()
        known_rewards(torch.ones(4))
        fresh_adapter(torch.ones(2), torch.zeros(2))
        with pytest.raises(ValueError, match="inside"), selfcheck.rehearsal():
            pass
    assert [(one.name, one.passed) for one in found] == [(selfcheck.SPREAD, False), (selfcheck.KNOWN, True), (selfcheck.ADAPTER, False)]
    assert "1 apart" in found[2].said and "add_lora" in found[2].remedy
    assert not selfcheck.rehearsing()
    with pytest.raises(GuardStop):
        fresh_adapter(torch.ones(2), torch.zeros(2))
    with pytest.raises(RuntimeError), selfcheck.rehearsal():
        raise RuntimeError
    assert not selfcheck.rehearsing()

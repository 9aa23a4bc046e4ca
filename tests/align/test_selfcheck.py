"""Each self-check passes on a sound start and stops an unsound one with one line."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from align.kernels import Gaussian
from align.selfcheck import first_ratio, kl_gradient, reward_spread
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

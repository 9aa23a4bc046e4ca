"""The schedule of the learning rate, and Muon beside AdamW."""

import numpy as np
import pytest
import torch

from align.optimizers import build_optimizer, warmup_cosine
from base_model.errors import UserError


def test_the_schedule_rises_falls_and_follows_a_longer_run_after_a_resume() -> None:
    def rates(steps: int, total: int, state: dict[str, object] | None = None) -> tuple[list[float], dict[str, object]]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = warmup_cosine(optimizer, total, warmup=10)
        if state is not None:
            schedule.load_state_dict(state)
        found = []
        for _ in range(steps):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return found, schedule.state_dict()

    whole, _ = rates(400, 400)
    assert whole[0] == pytest.approx(0.02) and max(whole) == whole[10] == pytest.approx(1.0)
    assert whole[205] == pytest.approx(0.51) and whole == [*sorted(whole[:11]), *sorted(whole[11:], reverse=True)]
    _, state = rates(200, 200)
    longer, _ = rates(200, 400, state)
    np.testing.assert_allclose(longer[1:], whole[201:], rtol=1e-12)


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(3, 6)
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(6, 6)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[0](torch.tanh(self.first(x)))


def steps(network: Small, optimizer: torch.optim.Optimizer, n: int) -> None:
    x = torch.linspace(-1, 1, 12).reshape(4, 3)
    for _ in range(n):
        network(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_muon_moves_the_matrices_of_the_blocks_orthogonally_and_all_else_as_adamw_does() -> None:
    network, twin = Small(), Small()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    steps(network, build_optimizer(network, "muon", lr=1e-2, weight_decay=0.0), 1)
    steps(twin, build_optimizer(twin, "adamw", lr=1e-2, weight_decay=0.0), 1)
    for name, value in network.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]) == (name != "blocks.0.weight"), name
    move = (network.blocks[0].weight.detach() - before["blocks.0.weight"]) / (1e-2 * 0.2 * 6**0.5)  # an update of all singular values near 1, times lr 0.2 sqrt(6)
    singular = torch.linalg.svdvals(move)
    assert singular[0] < 1.3 and singular[2] > 0.6, singular  # four samples: a gradient of rank 4, whose own values lie far apart


def test_muon_goes_on_from_its_state_to_the_bit_and_follows_a_schedule() -> None:
    whole, half = Small(), Small()
    optimizer = build_optimizer(whole, "muon", lr=1e-2)
    steps(whole, optimizer, 6)
    first = build_optimizer(half, "muon", lr=1e-2)
    steps(half, first, 3)
    second = build_optimizer(half, "muon", lr=1e-2)
    second.load_state_dict(first.state_dict())
    schedule = warmup_cosine(second, 100, warmup=10)
    assert [group["lr"] for group in second.param_groups] == pytest.approx([2e-4, 2e-4]), "both parts follow the schedule, after a load too"
    schedule.base_lrs, _ = [1e-2, 1e-2], [group.update(lr=1e-2) for group in second.param_groups]
    steps(half, second, 3)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), half.parameters(), strict=True))


def test_a_network_without_blocks_has_nothing_for_muon() -> None:
    with pytest.raises(UserError, match="Use adamw"):
        build_optimizer(torch.nn.Linear(2, 2), "muon", lr=1e-2)


def test_the_fused_step_is_the_same_to_rounding() -> None:
    plain, fused = Small(), Small()
    for network, together in ((plain, False), (fused, True)):
        steps(network, build_optimizer(network, "adamw", lr=1e-2, fused=together), 20)
    for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-6 and (a - Small().state_dict()[next(n for n, p in plain.named_parameters() if p is a)]).abs().max() > 1e-3

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


def in_float64(network: torch.nn.Module, gradients: list[torch.Tensor], *, lr: float, decay: float) -> list[torch.Tensor]:
    """AdamW written out (Loshchilov & Hutter 2017, algorithm 2) on weights that keep all their digits."""
    found = []
    for k, parameter in enumerate(network.parameters()):
        w, m, v = parameter.detach().double(), torch.zeros(parameter.shape, dtype=torch.float64), torch.zeros(parameter.shape, dtype=torch.float64)
        for step, gradient in enumerate(gradients[k :: sum(1 for _ in network.parameters())], start=1):
            g = gradient.double()
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
            w = w * (1 - lr * decay) - lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        found.append(w)
    return found


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weights_in_bfloat16_move_by_steps_that_are_smaller_than_their_last_digit(name: str) -> None:
    network, lost = Small().bfloat16(), Small().bfloat16()
    before = [parameter.detach().clone() for parameter in network.parameters()]
    optimizer = build_optimizer(network, name, lr=1e-4, weight_decay=0.01)
    plain = torch.optim.AdamW(lost.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(parameter.shape, generator=generator).bfloat16() + 1 for _ in range(40) for parameter in network.parameters()]
    for step in range(40):
        for each in (network, lost):
            for parameter, gradient in zip(each.parameters(), gradients[4 * step :], strict=False):
                parameter.grad = gradient.clone()
        optimizer.step()
        plain.step()
    large = [parameter.abs() > 1 / 16 for parameter in before]
    assert all(torch.equal(a[here], b.detach()[here]) for a, b, here in zip(before, lost.parameters(), large, strict=True)), "without copies nothing moves"
    assert all((a != b.detach())[here].any() for a, b, here in zip(before, network.parameters(), large, strict=True))
    if name == "adamw":
        expected = in_float64(Small().bfloat16(), gradients, lr=1e-4, decay=0.01)
        for (parameter, copy), w in zip(optimizer.copied, expected, strict=True):
            torch.testing.assert_close(copy.double(), w, rtol=4e-6, atol=1e-7)  # 40 steps of float32
            assert torch.equal(parameter, copy.bfloat16()), "weights are the copies, rounded"
    assert all(parameter.grad is None and copy.grad is None for parameter, copy in optimizer.copied), "a gradient that was taken is not kept"


def test_weights_in_bfloat16_and_float32_go_on_from_a_saved_state_to_the_bit() -> None:
    def half() -> Small:
        network = Small()
        network.first.bfloat16()
        return network

    def train(network: Small, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler, begin: int, end: int) -> None:
        for step in range(begin, end):
            generator = torch.Generator().manual_seed(step)
            for parameter in network.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            optimizer.step()
            schedule.step()

    whole, first = half(), half()
    optimizer, half_way = (build_optimizer(network, "adamw", lr=1e-4, fused=True) for network in (whole, first))
    schedule, then = warmup_cosine(optimizer, 8, warmup=2), warmup_cosine(half_way, 8, warmup=2)
    train(whole, optimizer, schedule, 0, 8)
    train(first, half_way, then, 0, 4)
    resumed = half()
    resumed.load_state_dict(first.state_dict())
    again = build_optimizer(resumed, "adamw", lr=1e-4, fused=True)
    later = warmup_cosine(again, 8, warmup=2)
    again.load_state_dict(half_way.state_dict())
    later.load_state_dict(then.state_dict())
    assert len(again.copied) == 2, "the half that is float32 is stepped itself"
    train(resumed, again, later, 4, 8)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpus_fused_step_is_a_cpus(dtype: torch.dtype) -> None:
    found = []
    for device in ("cpu", "cuda"):
        network = Small().to(device, dtype)
        optimizer = build_optimizer(network, "adamw", lr=1e-4, fused=True)
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            for parameter in network.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(device, dtype)
            optimizer.step()
        stepped = [copy for _, copy in optimizer.copied] if dtype != torch.float32 else list(network.parameters())
        found.append([w.detach().cpu() for w in stepped])
    start = [w.to(dtype).float() for w in Small().parameters()]
    assert len(found[0]) == len(start) and all((w - before).abs().max() > 1e-4 for w, before in zip(found[0], start, strict=True)), "four steps of 1e-4"
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)  # four digits of what four steps moved


@pytest.mark.gpu
def test_on_a_gpu_8_bit_states_step_weights_in_half_precision_about_as_whole_ones_do() -> None:
    moved = {}
    for name in ("adamw", "adamw8bit"):
        torch.manual_seed(0)
        network = torch.nn.Linear(128, 64).cuda().bfloat16()  # 8,192 weights: from 4,096 on states have 8 bits
        optimizer = build_optimizer(network, name, lr=1e-4, weight_decay=0.0)
        before = [copy.detach().clone() for _, copy in optimizer.copied]
        for step in range(40):
            torch.manual_seed(step)
            network(torch.randn(16, 128).cuda().bfloat16()).float().square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        moved[name] = (optimizer.copied[0][1] - before[0]).detach()
    assert 0 < float((moved["adamw8bit"] - moved["adamw"]).norm()) < 0.15 * float(moved["adamw"].norm())

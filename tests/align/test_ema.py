"""The average against a loop written by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from align.ema import EMA


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    net[0].bias.requires_grad_(False)
    return net


def walk(net: nn.Module, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g))


@pytest.mark.parametrize("warm_up", [True, False])
def test_the_average_is_the_hand_written_loop(warm_up: bool) -> None:
    net = network()
    ema = EMA(net, 0.99, warm_up=warm_up)
    hand = {name: parameter.detach().double() for name, parameter in net.named_parameters()}
    for n in range(1, 40):
        walk(net, n)
        ema.update()
        d = min(0.99, (1 + n) / (10 + n)) if warm_up else 0.99
        for name, parameter in net.named_parameters():
            hand[name] = d * hand[name] + (1 - d) * parameter.detach().double()
    state = ema.state_dict()
    assert sorted(state) == ["0.weight", "1.bias", "1.weight", "num_updates"] and int(state["num_updates"]) == 39
    for name in ("0.weight", "1.weight", "1.bias"):
        assert_close(state[name].double(), hand[name], atol=1e-4, rtol=1e-5)


def test_swap_shows_the_averages_inside_and_gives_the_parameters_back_also_after_an_error() -> None:
    net = network()
    ema = EMA(net, 0.9)
    walk(net, 1)
    own = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    with pytest.raises(RuntimeError, match="in the middle"), ema.swap():
        assert torch.equal(net[1].weight, ema.state_dict()["1.weight"]) and not torch.equal(net[1].weight, own["1.weight"])
        raise RuntimeError("in the middle")
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, own[name])


def test_the_average_of_half_precision_parameters_is_kept_in_float32() -> None:
    net = network().bfloat16()
    ema = EMA(net, 0.999, warm_up=False)
    before = ema.state_dict()["1.weight"].clone()
    with torch.no_grad():
        net[1].weight.add_(0.5)
    ema.update()
    moved = ema.state_dict()["1.weight"] - before
    assert_close(moved, torch.full_like(moved, 0.0005), atol=5e-6, rtol=0)
    with ema.swap():
        assert net[1].weight.dtype == torch.bfloat16


def test_a_resumed_average_goes_on_bit_for_bit() -> None:
    net = network()
    ema = EMA(net, 0.99)
    for n in range(5):
        walk(net, n)
        ema.update()
    other = EMA(net, 0.99)
    other.load_state_dict({name: tensor.clone() for name, tensor in ema.state_dict().items()})
    for n in range(5):
        walk(net, n)
        ema.update()
        other.update()
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in ema.state_dict().items())
    with pytest.raises(ValueError, match="names differ"):
        other.load_state_dict({"num_updates": torch.tensor(1)})
    with pytest.raises(ValueError, match="no trainable parameter"):
        EMA(network().requires_grad_(False))
    with pytest.raises(ValueError, match="decay"):
        EMA(net, 1.0)

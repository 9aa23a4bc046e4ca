"""Routed tokens: chosen by the seed alone, untouched on their way, back at their places; and without a route nothing changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from base_model.errors import UserError
from base_model.networks.packing import Segments, pack
from base_model.networks.routing import Route, choose_route, middle
from base_model.tiny import build_network
from tests.base_model.test_networks import BOTH, SMALL, SMALL_UVIT, DiT, NetworkName, UViT, clips_and_texts

CONDITIONS = {"dit": 0, "uvit": 4 + 3 + 5 + 4 + 1}  # the U-ViT's time and text tokens, which never skip


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def deep(name: NetworkName) -> DiT | UViT:
    """Five blocks, as if trained: tokens skip 1, 2 and 3."""
    torch.manual_seed(0)
    network = build_network(replace(SMALL, depth=5) if name == "dit" else SMALL_UVIT)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


def run(network: DiT | UViT, route: Route | None, t: Tensor | None = None) -> Tensor:
    clips, texts, levels = clips_and_texts()
    packed = pack(clips, SMALL.patch)
    return network(packed.tokens, packed.positions, packed.segments, levels if t is None else t, torch.cat(texts), Segments(tuple(map(len, texts))), route)


def lengths() -> Segments:
    return pack(clips_and_texts()[0], SMALL.patch).segments


def half_way(seed: int = 0) -> Route:
    return choose_route(lengths(), [0.5, 0.25, 0.5, 0.0], between=(1, 4), generator=seeded(seed))


def test_each_clip_keeps_its_share_in_order_and_at_least_one_token() -> None:
    segments = Segments((40, 10, 3))
    route = choose_route(segments, [0.5, 0.3, 0.99], between=(1, 3), generator=seeded())
    assert route.segments.lengths == (20, 7, 1) and (route.first, route.last) == (1, 3)
    assert torch.equal(route.kept, route.kept.unique(sorted=True))
    assert torch.equal(segments.ids[route.kept], route.segments.ids)
    assert torch.equal(route.kept, choose_route(segments, [0.5, 0.3, 0.99], between=(1, 3), generator=seeded()).kept)
    assert not torch.equal(route.kept, choose_route(segments, [0.5, 0.3, 0.99], between=(1, 3), generator=seeded(1)).kept)


def test_every_token_is_as_likely_to_stay() -> None:
    g, counts = seeded(), torch.zeros(8)
    for _ in range(2000):
        counts[choose_route(Segments((8,)), [0.75], between=(1, 2), generator=g).kept] += 1
    assert (counts / 2000 - 0.25).abs().max() < 4 * (0.25 * 0.75 / 2000) ** 0.5


def test_rates_out_of_range_and_shallow_networks_are_refused() -> None:
    for rates in ([0.5], [0.5, 1.0], [-0.1, 0.5]):
        with pytest.raises(ValueError, match="expected 2 rates in"):
            choose_route(Segments((4, 4)), rates, between=(1, 2), generator=seeded())
    assert [middle(depth) for depth in (3, 4, 5, 12, 28)] == [(1, 2), (1, 3), (1, 4), (3, 9), (7, 21)]
    with pytest.raises(UserError, match="2 blocks has no middle"):
        middle(2)


@BOTH
def test_a_rate_of_zero_is_the_network_without_a_route(name: NetworkName) -> None:
    route = choose_route(lengths(), [0.0] * 4, between=(1, 4), generator=seeded())
    assert torch.equal(run(deep(name), route), run(deep(name), None))


@BOTH
@pytest.mark.parametrize("per_token", [False, True])
def test_routed_tokens_are_neither_read_nor_changed_between_and_stand_at_their_places_after(name: NetworkName, per_token: bool) -> None:
    network, route = deep(name), half_way()
    given: dict[int, Tensor] = {}
    said: dict[int, Tensor] = {}
    for k, block in enumerate(network.blocks):
        block.register_forward_pre_hook(lambda module, inputs, k=k: given.update({k: inputs[0]}))
        block.register_forward_hook(lambda module, inputs, out, k=k: said.update({k: out}))
    run(network, route, lengths().spread(clips_and_texts()[2]) if per_token else None)
    everything, some = lengths().total + CONDITIONS[name], len(route.kept) + CONDITIONS[name]
    assert [len(given[k]) for k in range(5)] == [everything, some, some, some, everything]
    unchanged = (given[4] == said[0]).all(1)
    assert int(unchanged.sum()) == everything - some
    read = torch.autograd.grad(said[3].square().sum(), said[0])[0].abs().amax(1) > 0
    assert torch.equal(read, ~unchanged)
    if name == "dit":
        assert torch.equal(unchanged.logical_not().nonzero()[:, 0], route.kept)
    assert torch.equal(given[4][~unchanged], said[3])


@BOTH
def test_a_route_works_alike_for_one_level_a_clip_and_one_a_token(name: NetworkName) -> None:
    network = deep(name)
    off = run(network, half_way(), lengths().spread(clips_and_texts()[2])) - run(network, half_way())
    assert off.abs().max() < 1e-5


@BOTH
def test_routing_changes_what_is_said_and_all_tokens_say_something(name: NetworkName) -> None:
    network = deep(name)
    routed = run(network, half_way())
    assert routed.shape == (lengths().total, SMALL.token_width)
    moved = (routed - run(network, None)).abs().amax(1)
    last = lengths().offsets[3]  # nobody skips anything in the last clip
    assert (moved[:last] > 1e-4).all() and moved[last:].max() < 1e-5
    skipped = torch.ones(len(routed), dtype=torch.bool)
    skipped[half_way().kept] = False
    assert torch.autograd.grad(routed[skipped].square().sum(), network.tokens_in.weight)[0].abs().max() > 0


def test_a_uvit_refuses_a_route_that_leaves_a_skip_without_its_twin() -> None:
    route = choose_route(lengths(), [0.5] * 4, between=(1, 3), generator=seeded())
    with pytest.raises(ValueError, match="cannot skip blocks 1 to 2 of 5: as many must lie before as after"):
        run(deep("uvit"), route)

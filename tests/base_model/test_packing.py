"""Packs: their FLOPs are those that torch counts, they are filled and balanced without losing a clip, and what is dropped or packed beside a clip does not change it."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from base_model.networks.dit import DiT, DiTConfig
from base_model.networks.packing import (
    Segments,
    balanced_packs,
    first_fit_decreasing,
    forward_flops,
    grid_positions,
    kept_tokens,
    pack,
    patchify,
    take_tokens,
    token_grid,
    unpack,
)
from base_model.tiny import load_tiny

SHAPES = [(8, 4, 8, 8), (8, 1, 6, 4), (8, 4, 8, 8), (8, 1, 8, 8), (8, 3, 4, 12)]
TEXTS = (3, 5, 4, 1, 2)


@cache
def shipped() -> DiT:
    network = load_tiny().network
    assert isinstance(network, DiT)
    return network


def clips_and_texts() -> tuple[list[Tensor], list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(1)
    clips = [torch.randn(shape, generator=generator) for shape in SHAPES]
    texts = [torch.randn(length, shipped().config.text_width, generator=generator) for length in TEXTS]
    return clips, texts, torch.rand(len(clips), generator=generator)


def patches(clip: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [n,c] and positions [n,3] of one clip."""
    patch = shipped().config.patch
    return patchify(clip[None], patch)[0], grid_positions(token_grid(clip.shape, patch))


# FLOPs


@pytest.mark.parametrize(
    ("config", "lengths", "text"),
    [
        (DiTConfig(), (64, 64, 16, 1), 5),
        (DiTConfig(), (30, 30, 30), 7),
        (DiTConfig(channels=4, width=24, depth=3, heads=2, text_width=10, rotary_axes=(4, 4, 4), mlp_ratio=3), (7, 90, 2, 30, 2), 3),
    ],
)
def test_the_flops_of_a_pack_are_those_that_torch_counts(config: DiTConfig, lengths: tuple[int, ...], text: int) -> None:
    dit, segments, texts = DiT(config), Segments(lengths), Segments.equal(len(lengths), text)
    tokens = torch.randn(segments.total, config.token_width, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the fused CPU kernel is not counted
        u = dit(tokens, torch.zeros(segments.total, 3), segments, torch.rand(len(lengths)), torch.randn(texts.total, config.text_width), texts)
    w = config.width
    told = forward_flops(
        lengths, width=w, depth=config.depth, mlp_width=config.mlp_ratio * w, token_width=config.token_width, text_tokens=text, text_width=config.text_width
    )
    assert told == counter.get_total_flops()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        u.sum().backward()
    assert counter.get_total_flops() == pytest.approx(2 * told, rel=2e-3), "a training step is three forward passes"


def test_the_flops_of_wan_are_those_of_its_published_sizes() -> None:
    """Wan2.1-1.3B at 832x480x81: 41.7M weights a layer and token, 30 layers, 32,760 tokens, 12 heads of 128, 512 text tokens."""
    n, d = 32_760, 12 * 128
    by_hand = 30 * (2 * n * (6 * d**2 + 2 * d * 8_960) + 4 * n**2 * d + 4 * n * 512 * d)
    assert forward_flops([n], width=d, depth=30, mlp_width=8_960, text_tokens=512) == pytest.approx(by_hand, rel=2e-3)
    assert by_hand == pytest.approx(2.83e14, rel=2e-3)


def test_the_flops_of_a_pack_are_the_sum_over_its_clips() -> None:
    sizes = {"width": 64, "depth": 3, "mlp_width": 100, "token_width": 5, "text_tokens": 4, "text_width": 9}
    lengths = [3, 50, 7]
    assert forward_flops(lengths, **sizes) == sum(forward_flops([n], **sizes) for n in lengths)
    assert forward_flops([100], **sizes) > forward_flops([50, 50], **sizes), "attention is quadratic in a clip"


# Balanced packs


def test_balanced_packs_keep_every_clip_fill_up_and_cost_the_same() -> None:
    lengths = torch.randint(10, 200, (500,), generator=torch.Generator().manual_seed(5)).tolist()
    costs = [n + n * n / 100 for n in lengths]
    packs = balanced_packs(lengths, costs, 1_000)
    assert sorted(itertools.chain(*packs)) == list(range(500))
    assert all(sum(lengths[i] for i in pack) <= 1_000 for pack in packs)
    assert sum(lengths) / (1_000 * len(packs)) > 0.95

    def spread_of(packs: list[list[int]]) -> float:
        each = [sum(costs[i] for i in pack) for pack in packs]
        return (max(each) - min(each)) / max(each)

    assert spread_of(packs) < 0.1 < 0.5 < spread_of(first_fit_decreasing(lengths, 1_000))
    assert packs == balanced_packs(lengths, costs, 1_000)
    assert all(lengths[a] >= lengths[b] for pack in packs for a, b in itertools.pairwise(pack)), "equal lengths are neighbours"


def test_balanced_packs_go_by_cost_not_by_tokens() -> None:
    assert balanced_packs([10] * 6, [9.0, 1.0, 9.0, 1.0, 1.0, 1.0], 30) == [[0, 3, 4], [1, 2, 5]]


def test_balanced_packs_of_few_clips_are_nearly_the_best_there_are() -> None:
    """Against every way to share them out that fits: Graham's rule is within 4/3 - 1/(3 packs) of the cheapest costliest pack."""
    generator = torch.Generator().manual_seed(6)
    for number in (2, 3):
        for _ in range(10):
            lengths = torch.randint(5, 30, (8,), generator=generator).tolist()
            costs, capacity = [float(n * n) for n in lengths], sum(lengths) // number + 12
            packs = balanced_packs(lengths, costs, capacity)
            shares = [[[i for i in range(8) if where[i] == k] for k in range(number)] for where in itertools.product(range(number), repeat=8)]
            fitting = [share for share in shares if all(sum(lengths[i] for i in part) <= capacity for part in share)]
            best = min(max(sum(costs[i] for i in part) for part in share) for share in fitting)
            assert len(packs) == number and max(sum(costs[i] for i in pack) for pack in packs) <= (4 / 3 - 1 / (3 * number)) * best


def test_balanced_packs_take_more_packs_where_they_must_and_never_drop_a_long_clip() -> None:
    assert balanced_packs([50, 2_000, 40], [50.0, 2_000.0, 40.0], 1_000) == [[1], [0, 2]]
    assert [len(pack) for pack in balanced_packs([600] * 5, [1.0] * 5, 1_000)] == [1] * 5
    lengths = [6, 5, 5, 4, 4, 3, 3]  # first-fit decreasing fills 3 packs of 10 exactly
    assert len(first_fit_decreasing(lengths, 10)) == 3
    packs = balanced_packs(lengths, [float(n**3) for n in lengths], 10)
    assert len(packs) == 4 and sorted(itertools.chain(*packs)) == list(range(7)) and all(sum(lengths[i] for i in pack) <= 10 for pack in packs)


# Token dropping


def test_of_each_clip_its_own_share_of_tokens_is_kept_and_at_least_one() -> None:
    segments, rates = Segments((100, 40, 7, 1)), torch.tensor([0.25, 0.0, 1.0, 0.9])
    kept = kept_tokens(segments, rates, torch.Generator().manual_seed(0))
    assert torch.bincount(segments.ids[kept]).tolist() == [75, 40, 1, 1]
    assert bool((kept.diff() > 0).all()), "in order, each at most once"
    assert torch.equal(kept, kept_tokens(segments, rates, torch.Generator().manual_seed(0)))
    assert not torch.equal(kept, kept_tokens(segments, rates, torch.Generator().manual_seed(1)))
    assert torch.equal(kept_tokens(segments, torch.zeros(4), torch.Generator()), torch.arange(148))


def test_every_token_of_a_clip_is_kept_equally_often() -> None:
    generator, segments = torch.Generator().manual_seed(0), Segments((10, 4))
    counts = sum(torch.bincount(kept_tokens(segments, torch.tensor([0.7, 0.5]), generator), minlength=14) for _ in range(4_000))
    share = torch.as_tensor(counts) / 4_000
    assert (share[:10] - 0.3).abs().max() < 0.03 and (share[10:] - 0.5).abs().max() < 0.03


def test_dropping_tokens_is_running_the_network_on_the_others_only_in_outputs_and_gradients() -> None:
    dit, (clips, texts, t) = shipped(), clips_and_texts()
    packed = pack(clips, dit.config.patch)
    kept = kept_tokens(packed.segments, torch.tensor([0.5, 0.0, 0.3, 0.9, 0.6]), torch.Generator().manual_seed(2))
    few = take_tokens(packed, kept)
    together = dit(few.tokens, few.positions, few.segments, t, torch.cat(texts), Segments(TEXTS))  # [K,c]
    gradients = torch.autograd.grad(together.square().sum(), list(dit.parameters()))

    alone = []
    for k, (clip, text) in enumerate(zip(clips, texts, strict=True)):
        tokens, positions = patches(clip)
        chosen = kept[packed.segments.ids[kept] == k] - packed.segments.offsets[k]
        assert len(chosen) == few.segments.lengths[k]
        alone.append(dit(tokens[chosen], positions[chosen], Segments((len(chosen),)), t[k : k + 1], text, Segments((len(text),))))
    assert (together - torch.cat(alone)).abs().max() < 1e-5
    for a, b in zip(gradients, torch.autograd.grad(torch.cat(alone).square().sum(), list(dit.parameters())), strict=True):
        assert (a - b).abs().max() <= 1e-5 * (1 + b.abs().max())
    whole = dit(packed.tokens, packed.positions, packed.segments, t, torch.cat(texts), Segments(TEXTS))
    assert (whole[kept] - together).abs().max() > 0.01, "context was dropped, so something must change"


def test_a_clip_that_would_keep_nothing_is_refused() -> None:
    packed = pack([torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)], (1, 1, 1))
    with pytest.raises(ValueError, match="segment 1 keeps no token"):
        take_tokens(packed, torch.tensor([0, 2]))


# Images


def test_an_image_in_a_mixed_pack_is_the_image_alone() -> None:
    dit, (clips, texts, t) = shipped(), clips_and_texts()
    packed = pack(clips, dit.config.patch)
    with torch.no_grad():
        together = unpack(dit(packed.tokens, packed.positions, packed.segments, t, torch.cat(texts), Segments(TEXTS)), clips, dit.config.patch)
        for k in (1, 3):
            assert clips[k].shape[1] == 1
            tokens, positions = patches(clips[k])
            alone = dit(tokens, positions, Segments((len(tokens),)), t[k : k + 1], texts[k], Segments((TEXTS[k],)))
            assert (together[k] - unpack(alone, clips[k : k + 1], dit.config.patch)[0]).abs().max() < 1e-5
            assert together[k].abs().max() > 0.1

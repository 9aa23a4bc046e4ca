"""The U-ViT against the paper's blocks written out densely, one clip at a time, in float64; and its levels, skips and sequence."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from base_model.networks.packing import Segments, pack
from base_model.networks.uvit import UViT, UViTConfig, joined
from tests.base_model.test_networks import SMALL_UVIT, clips_and_texts, run_packed, trained_looking


def layer_norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def sinusoids(t: Tensor, width: int) -> Tensor:
    angle = 1000 * t * 10_000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    return torch.cat([angle.cos(), angle.sin()])


def dense_attention(x: Tensor, weights: dict[str, Tensor], name: str, phase: Tensor, heads: int) -> Tensor:
    """One sequence [J,w]; rotary positions as complex numbers e^{i angle}, phase [J,d/2]."""

    def turned(y: Tensor, norm: str) -> Tensor:
        y = y / (y.square().mean(-1, keepdim=True) + torch.finfo(torch.float64).eps).sqrt() * weights[f"{name}.{norm}.weight"]
        half = y.shape[-1] // 2
        z = torch.complex(y[..., :half], y[..., half:]) * phase[:, None]
        return torch.cat([z.real, z.imag], -1)

    w = x.shape[-1]
    q, k, v = (part.reshape(len(x), heads, -1) for part in linear(x, weights, f"{name}.qkv").split(w, -1))
    q, k = turned(q, "q_norm"), turned(k, "k_norm")
    share = (torch.einsum("nhd,mhd->hnm", q, k) / math.sqrt(w // heads)).softmax(-1)
    return linear(torch.einsum("hnm,mhd->nhd", share, v).reshape(len(x), w), weights, f"{name}.out")


def dense_uvit(weights: dict[str, Tensor], config: UViTConfig, tokens: Tensor, positions: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """The paper's figure 1 for one clip, everything in float64: tokens [n,c], positions [n,3], t [], text [m,D] -> [n,c]."""

    def time_token(level: Tensor) -> Tensor:
        hidden = linear(sinusoids(level, config.width), weights, "time_in.0")
        return linear(hidden * hidden.sigmoid(), weights, "time_in.2")

    told = linear(layer_norm(text, weights, "text_in.0"), weights, "text_in.1")
    x = torch.cat([time_token(t)[None], told, linear(tokens, weights, "tokens_in")])
    angles = [positions[:, axis, None] * 100.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width) for axis, width in enumerate(config.rotary_axes)]
    angle = torch.cat(angles, -1)
    angle = torch.cat([torch.zeros(1 + len(text), angle.shape[1], dtype=torch.float64), angle])
    phase = torch.polar(torch.ones_like(angle), angle)

    def block(x: Tensor, k: int) -> Tensor:
        x = x + dense_attention(layer_norm(x, weights, f"blocks.{k}.attention_norm"), weights, f"blocks.{k}.attention", phase, config.heads)
        hidden = linear(layer_norm(x, weights, f"blocks.{k}.mlp_norm"), weights, f"blocks.{k}.mlp_in")
        return x + linear(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))), weights, f"blocks.{k}.mlp_out")

    shallow = []
    half = config.depth // 2
    for k in range(half):
        x = block(x, k)
        shallow.append(x)
    x = block(x, half)
    for k in range(half + 1, config.depth):
        x = block(linear(torch.cat([x, shallow.pop()], -1), weights, f"blocks.{k}.skip"), k)
    return linear(layer_norm(x, weights, "norm_out"), weights, "tokens_out")[1 + len(text) :]


def uvit() -> UViT:
    network = trained_looking("uvit")
    assert isinstance(network, UViT)
    return network


def test_the_packed_uvit_is_the_papers_dense_network_on_every_clip() -> None:
    """Only the tables of angles are in float32 in ours."""
    network = uvit().double()
    clips, texts, t = clips_and_texts()
    packed = pack([clip.double() for clip in clips], SMALL_UVIT.patch)
    text = torch.cat(texts).double()
    with torch.no_grad():
        ours = network(packed.tokens, packed.positions.double(), packed.segments, t, text, Segments(tuple(map(len, texts))))
    weights = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    rows = zip(packed.tokens.split(list(packed.segments.lengths)), packed.positions.double().split(list(packed.segments.lengths)), t.double(), texts, strict=True)
    theirs = torch.cat([dense_uvit(weights, SMALL_UVIT, x, at, level, words.double()) for x, at, level, words in rows])
    off = float((ours - theirs).abs().max() / theirs.abs().max())
    print(off)
    assert off < 1e-6


def test_every_long_skip_carries_something() -> None:
    network = uvit()
    clips, texts, t = clips_and_texts()
    whole = torch.cat([x.flatten() for x in run_packed(network, clips, texts, t)])
    assert [block.skip is not None for block in network.blocks] == [False, False, False, True, True]
    for k in (3, 4):
        kept = network.blocks[k].skip.weight.detach().clone()
        with torch.no_grad():
            network.blocks[k].skip.weight[:, SMALL_UVIT.width :] = 0  # what the shallow twin said
        changed = torch.cat([x.flatten() for x in run_packed(network, clips, texts, t)])
        network.blocks[k].skip.weight.data = kept
        assert (changed - whole).abs().max() > 1e-2


def test_skips_join_the_first_block_with_the_last() -> None:
    """Where a deep block hears its twin alone and adds nothing itself, it repeats what the twin said."""
    network = uvit()
    with torch.no_grad():
        for k in (3, 4):
            block = network.blocks[k]
            block.skip.weight.copy_(torch.cat([torch.zeros(24, 24), torch.eye(24)], 1))
            for linear_ in (block.skip, block.attention.out, block.mlp_out):
                linear_.bias.zero_()
            block.attention.out.weight.zero_()
            block.mlp_out.weight.zero_()
    said: dict[int, Tensor] = {}
    for k, block in enumerate(network.blocks):
        block.register_forward_hook(lambda module, given, out, k=k: said.update({k: out}))
    run_packed(network, *clips_and_texts())
    assert torch.equal(said[3], said[1]) and torch.equal(said[4], said[0])


@pytest.mark.parametrize(("depth", "skips"), [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2), (13, 6)])
def test_a_depth_makes_as_many_deep_blocks_as_shallow_ones(depth: int, skips: int) -> None:
    config = UViTConfig(channels=4, width=24, depth=depth, heads=2, text_width=10, rotary_axes=(4, 4, 4))
    network = UViT(config)
    assert [block.skip is not None for block in network.blocks] == [False] * (depth - skips) + [True] * skips
    assert all(torch.isfinite(x).all() for x in run_packed(network, *clips_and_texts()))


def test_sequences_are_joined_clip_by_clip() -> None:
    time, text, patches = Segments((1, 1)), Segments((2, 1)), Segments((3, 2))
    whole, place = joined(time, text, patches)
    rows = ["t0", "t1", "a0", "b0", "a1", "x0", "y0", "z0", "x1", "y1"]
    order: list[str] = [""] * 10
    for name, at in zip(rows, place.tolist(), strict=True):
        order[at] = name
    assert whole.lengths == (6, 4) and order == ["t0", "a0", "b0", "x0", "y0", "z0", "t1", "a1", "x1", "y1"]


# One noise level a token


def test_a_given_frame_among_noisy_ones_is_told_apart_and_changes_only_its_own_clip() -> None:
    network = uvit()
    clips, texts, t = clips_and_texts()
    packed = pack(clips, SMALL_UVIT.patch)
    levels = packed.segments.spread(t)
    given = levels.clone()
    given[: 2 * 2] = 0  # the first frame of the first clip: 2x2 patches
    text, text_segments = torch.cat(texts), Segments(tuple(map(len, texts)))
    noisy, told = (network(packed.tokens, packed.positions, packed.segments, level, text, text_segments) for level in (levels, given))
    first = packed.segments.lengths[0]
    moved = (told - noisy).abs().amax(1)
    assert (moved[:first] > 1e-3).all() and moved[first:].max() < 1e-5


def test_a_token_hears_its_own_level_as_the_difference_to_the_time_token() -> None:
    """Written out for one clip: the largest level is the time token, and each patch gets embedding(own) - embedding(largest)."""
    network = uvit()
    clips, texts, _ = clips_and_texts()
    packed = pack(clips[:1], SMALL_UVIT.patch)
    level = torch.linspace(0.1, 0.9, len(packed.tokens))
    seen: list[Tensor] = []
    network.blocks[0].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    network(packed.tokens, packed.positions, packed.segments, level, texts[0], Segments((3,)))
    token = [network.time_in(torch.cat([a.cos(), a.sin()])) for a in (1000 * x * 10_000 ** (-torch.arange(12) / 12) for x in level)]
    assert (seen[0][0] - token[-1]).abs().max() < 1e-4
    assert (seen[0][4:] - (network.tokens_in(packed.tokens) + torch.stack(token) - token[-1])).abs().max() < 1e-4

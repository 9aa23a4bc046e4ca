"""The packed DiT and U-ViT: what is packed together does not mix, what is dense is a special case, and they start as nothing."""

import pytest
import torch

from base_model.networks.attention import rotary_table, rotate
from base_model.networks.dit import DiT, DiTConfig
from base_model.networks.packing import Segments, first_fit_decreasing, pack, patchify, token_grid, unpack, unpatchify
from base_model.networks.uvit import UViT, UViTConfig
from base_model.tiny import NetworkName

SMALL = DiTConfig(channels=4, width=24, depth=2, heads=2, text_width=10, rotary_axes=(4, 4, 4))
SMALL_UVIT = UViTConfig(channels=4, width=24, depth=5, heads=2, text_width=10, rotary_axes=(4, 4, 4))
BOTH = pytest.mark.parametrize("name", ["dit", "uvit"])
SHAPES = [(4, 2, 4, 4), (4, 2, 4, 4), (4, 1, 4, 6), (4, 3, 2, 4)]


def fresh(name: NetworkName) -> DiT | UViT:
    torch.manual_seed(0)
    return DiT(SMALL) if name == "dit" else UViT(SMALL_UVIT)


def trained_looking(name: NetworkName) -> DiT | UViT:
    network = fresh(name)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


def clips_and_texts() -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    clips = [torch.randn(shape, generator=generator) for shape in SHAPES]
    texts = [torch.randn(length, 10, generator=generator) for length in (3, 5, 4, 1)]
    return clips, texts, torch.rand(4, generator=generator)


def run_packed(network: DiT | UViT, clips: list[torch.Tensor], texts: list[torch.Tensor], t: torch.Tensor) -> list[torch.Tensor]:
    packed = pack(clips, SMALL.patch)
    out = network(packed.tokens, packed.positions, packed.segments, t, torch.cat(texts), Segments(tuple(len(x) for x in texts)))
    return unpack(out, clips, SMALL.patch)


@BOTH
def test_packed_clips_give_what_separate_clips_give_in_outputs_and_gradients(name: NetworkName) -> None:
    network = trained_looking(name)
    clips, texts, t = clips_and_texts()
    together = run_packed(network, clips, texts, t)
    sum(x.square().sum() for x in together).backward()
    gradients = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    network.zero_grad()
    alone = [run_packed(network, [clip], [text], t[i : i + 1])[0] for i, (clip, text) in enumerate(zip(clips, texts, strict=True))]
    sum(x.square().sum() for x in alone).backward()
    for a, b in zip(together, alone, strict=True):
        assert (a - b).abs().max() < 1e-5
    for a, p in zip(gradients, network.parameters(), strict=True):
        assert p.grad is not None
        assert (a - p.grad).abs().max() <= 1e-5 * (1 + p.grad.abs().max())


@BOTH
def test_one_noise_level_a_token_equals_one_a_segment_where_they_agree(name: NetworkName) -> None:
    network = trained_looking(name)
    clips, texts, t = clips_and_texts()
    packed = pack(clips, SMALL.patch)
    text, segments = torch.cat(texts), Segments(tuple(len(x) for x in texts))
    per_segment = network(packed.tokens, packed.positions, packed.segments, t, text, segments)
    per_token = network(packed.tokens, packed.positions, packed.segments, packed.segments.spread(t), text, segments)
    assert (per_segment - per_token).abs().max() < 1e-5


@BOTH
def test_the_order_of_clips_in_a_pack_does_not_matter(name: NetworkName) -> None:
    network = trained_looking(name)
    clips, texts, t = clips_and_texts()
    order = [2, 0, 3, 1]
    straight = run_packed(network, clips, texts, t)
    shuffled = run_packed(network, [clips[i] for i in order], [texts[i] for i in order], t[order])
    for k, i in enumerate(order):
        assert (shuffled[k] - straight[i]).abs().max() < 1e-5


@BOTH
def test_a_fresh_network_says_zero_and_every_weight_gets_a_gradient_after_one_step(name: NetworkName) -> None:
    network = fresh(name)
    clips, texts, t = clips_and_texts()
    out = run_packed(network, clips, texts, t)
    assert all(x.abs().max() == 0 for x in out)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        sum((x - 1).square().mean() for x in run_packed(network, clips, texts, t)).backward()
        optimizer.step()
    silent = [name for name, p in network.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert silent == []


def test_rotary_scores_depend_on_the_difference_of_positions_only() -> None:
    generator = torch.Generator().manual_seed(4)
    q, k = torch.randn(2, 1, 1, 12, generator=generator)
    here, there = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[2.0, 0.0, 5.0]])
    far = torch.tensor([[7.0, 4.0, 1.0]])

    def score(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((rotate(q, rotary_table(a, (4, 4, 4))) * rotate(k, rotary_table(b, (4, 4, 4)))).sum())

    assert score(here, there) == pytest.approx(score(here + far, there + far), abs=1e-4)
    assert abs(score(here, there) - score(here, there + 1)) > 1e-3


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 1, 3), (1, 1, 1)])
def test_unpatchify_undoes_patchify_and_a_patch_is_a_neighbourhood(patch: tuple[int, int, int]) -> None:
    x = torch.arange(2 * 3 * 4 * 6 * 6, dtype=torch.float32).reshape(2, 3, 4, 6, 6)
    tokens = patchify(x, patch)
    assert torch.equal(unpatchify(tokens, 3, token_grid(x.shape, patch), patch), x)
    first = x[0, :, : patch[0], : patch[1], : patch[2]].flatten()
    assert torch.equal(tokens[0, 0], first)


def test_latents_that_do_not_divide_are_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match="4x5x6 cannot be cut into patches of 1x2x2"):
        token_grid((1, 3, 4, 5, 6), (1, 2, 2))
    with pytest.raises(ValueError, match="empty"):
        pack([], (1, 2, 2))


def test_first_fit_decreasing_keeps_every_clip_and_fills_the_windows() -> None:
    lengths = [int(x) for x in torch.randint(10, 200, (500,), generator=torch.Generator().manual_seed(5))]
    windows = first_fit_decreasing(lengths, 1000)
    assert sorted(i for window in windows for i in window) == list(range(500))
    assert all(sum(lengths[i] for i in window) <= 1000 for window in windows)
    assert sum(lengths) / (1000 * len(windows)) > 0.97
    assert first_fit_decreasing([50, 2000], 1000) == [[1], [0]]


def test_segments_mean_and_spread_agree_with_loops() -> None:
    segments = Segments((2, 2, 3))
    per_token = torch.arange(14, dtype=torch.float32).reshape(7, 2)
    means = torch.stack([per_token[a:b].mean(0) for a, b in ((0, 2), (2, 4), (4, 7))])
    assert torch.allclose(segments.mean(per_token), means)
    assert torch.equal(segments.spread(means), means[torch.tensor([0, 0, 1, 1, 2, 2, 2])])
    assert [tuple(s) for s in segments.stretches] == [(0, 2, 2), (2, 3, 3)]


def test_noise_levels_of_tokens_that_agree_are_the_noise_level_of_their_clip_and_cost_no_more_vectors() -> None:
    torch.manual_seed(0)
    network = DiT(DiTConfig(width=32, depth=2, heads=2, rotary_axes=(4, 6, 6)))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    packed = pack([torch.randn(8, 4, 4, 4), torch.randn(8, 1, 4, 6), torch.randn(8, 4, 4, 4)], network.config.patch)
    text, text_segments, t = torch.randn(9, 384), Segments((3, 4, 2)), torch.tensor([0.9, 0.3, 0.9])
    seen: list[int] = []
    network.blocks[0].modulation.linear.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    whole = network(packed.tokens, packed.positions, packed.segments, t, text, text_segments)
    each = packed.segments.spread(t)
    assert torch.allclose(network(packed.tokens, packed.positions, packed.segments, each, text, text_segments), whole, atol=1e-5)
    each[:3] = 0.0
    network(packed.tokens, packed.positions, packed.segments, each, text, text_segments)
    assert seen == [3, 3, 4], "a vector for each clip and each of its levels, not for each token"


@BOTH
def test_hidden_states_are_those_on_the_way_to_the_velocity_and_packing_does_not_mix_them(name: NetworkName) -> None:
    network = trained_looking(name)
    clips, texts, t = clips_and_texts()
    packed = pack(clips, SMALL.patch)
    text, text_segments = torch.cat(texts), Segments(tuple(len(x) for x in texts))
    depth, seen = network.config.depth, []
    for block in network.blocks:
        block.register_forward_hook(lambda module, inputs, out: seen.append(out))
    velocity = network(packed.tokens, packed.positions, packed.segments, t, text, text_segments)
    after = tuple(range(1, depth + 1))
    before = len(seen)
    states = network.hidden(packed.tokens, packed.positions, packed.segments, t, text, text_segments, after=after)
    assert before == len(seen) - before == depth
    if isinstance(network, DiT):
        for state, hooked in zip(states, seen[:depth], strict=True):
            assert torch.equal(state, hooked)
        _, told, _ = network.embed(packed.tokens, packed.segments, t, text, text_segments)
        out = network.head(states[-1], told, packed.segments)
    else:
        out = network.tokens_out(network.norm_out(states[-1]))
    assert torch.equal(out, velocity)
    alone = pack(clips[2:3], SMALL.patch)
    single = network.hidden(alone.tokens, alone.positions, alone.segments, t[2:3], texts[2], Segments((len(texts[2]),)), after=after)
    first = packed.segments.offsets[2]
    for state, own in zip(states, single, strict=True):
        assert (state[first : first + len(own)] - own).abs().max() < 1e-5


@BOTH
def test_hidden_states_of_the_first_blocks_compute_no_further_block(name: NetworkName) -> None:
    network = trained_looking(name)
    clips, texts, t = clips_and_texts()
    packed = pack(clips, SMALL.patch)
    with torch.no_grad():
        for parameter in network.blocks[1:].parameters():
            parameter.fill_(torch.nan)
    states = network.hidden(*packed, t, torch.cat(texts), Segments(tuple(len(x) for x in texts)), after=(0, 1))
    assert all(torch.isfinite(state).all() for state in states)
    assert torch.equal(states[0], network.tokens_in(packed.tokens)) or name == "uvit"

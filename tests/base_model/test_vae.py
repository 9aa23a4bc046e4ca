"""The video autoencoder: causal, any size, the same in parts as whole, and the shipped one keeps what the judge reads."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from base_model.networks.packing import Patch
from base_model.networks.vae import VAEConfig, VideoVAE, from_patches, in_parts, to_patches, windows
from base_model.tiny import WEIGHTS, LatentCodec, load_codec
from base_model.types import ClipShape
from recipes.shapes.judge import judge
from recipes.shapes.prompts import make_prompts
from recipes.shapes.render import render, sample_scene


def small_vae() -> VideoVAE:
    torch.manual_seed(0)
    return VideoVAE(VAEConfig(channels=4, width=16, encoder_depth=2, decoder_depth=1)).eval()


PATCHES = [(2, 4, 4), (4, 4, 4), (4, 8, 8), (1, 2, 2)]


def vae_of(patch: Patch) -> VideoVAE:
    torch.manual_seed(0)
    return VideoVAE(VAEConfig(channels=4, width=16, encoder_depth=2, decoder_depth=1, time_stride=patch[0], space_stride=patch[1])).eval()


def shipped() -> LatentCodec:
    return load_codec(WEIGHTS / "vae.safetensors")


@torch.no_grad()
@pytest.mark.parametrize("make", [small_vae, lambda: shipped().vae, *(lambda patch=patch: vae_of(patch) for patch in PATCHES)], ids=["random", "shipped", *map(str, PATCHES)])
def test_a_later_frame_never_changes_an_earlier_latent_by_one_bit(make: Callable[[], VideoVAE]) -> None:
    vae, video = make(), torch.rand(1, 13, 3, 16, 16)
    before, _ = vae.encode(video)
    for frame in range(1, 13):
        changed = video.clone()
        changed[:, frame] = 1 - changed[:, frame]
        after, _ = vae.encode(changed)
        untouched = 1 + (frame - 1) // vae.config.time_stride
        assert torch.equal(after[:, :, :untouched], before[:, :, :untouched])
        assert (after[:, :, untouched] - before[:, :, untouched]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("make", [small_vae, lambda: shipped().vae], ids=["random", "shipped"])
def test_the_first_frame_alone_gives_the_first_latent_and_decoding_is_causal_too(make: Callable[[], VideoVAE]) -> None:
    vae, video = make(), torch.rand(2, 9, 3, 16, 24)
    latents, _ = vae.encode(video)
    assert torch.allclose(vae.encode(video[:, :1])[0], latents[:, :, :1], atol=1e-5)
    assert torch.allclose(vae.decode(latents[:, :, :2]), vae.decode(latents)[:, :5], atol=1e-5)
    changed = latents.clone()
    changed[:, :, 2] += 1
    assert torch.equal(vae.decode(changed)[:, :5], vae.decode(latents)[:, :5])


# In parts


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 8])
@pytest.mark.parametrize("patch", PATCHES, ids=str)
def test_a_clip_in_chunks_of_latent_frames_is_the_whole(patch: Patch, chunk: int) -> None:
    vae, video = vae_of(patch), torch.rand(2, 1 + 6 * patch[0], 3, 16, 24)
    parts = vae.split(video, chunk)
    assert [len(part[0]) for part in parts] == [1 + (min(chunk, 7) - 1) * patch[0], *(min(chunk, 7 - k) * patch[0] for k in range(chunk, 7, chunk))]
    moments = vae.encode(video)
    for whole, streamed in zip(moments, map(torch.cat, zip(*vae.encode_stream(parts), strict=True), [2, 2]), strict=True):
        assert (streamed - whole).abs().max() < 1e-5
    made = list(vae.decode_stream(moments[0].split(chunk, dim=2)))
    assert [part.shape for part in made] == [part.shape for part in parts]
    assert (torch.cat(made, dim=1) - vae.decode(moments[0])).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(("chunk", "tile"), [(1, None), (3, None), (None, 3), (None, 12), (None, 20), (2, 5), (1, 1)])
def test_the_shipped_codec_gives_the_whole_for_every_chunk_and_tile(chunk: int | None, tile: int | None) -> None:
    codec, video = shipped(), torch.rand(1, 17, 3, 48, 80, generator=torch.Generator().manual_seed(0))
    if tile == 1:
        video = video[:, :5, :, :32, :32]
    x0 = codec.encode(video)
    assert (codec.encode(video, chunk=chunk, tile=tile) - x0).abs().max() < 1e-5
    assert (codec.decode(x0, chunk=chunk, tile=tile) - codec.decode(x0)).abs().max() < 1e-5


@torch.no_grad()
def test_parts_may_be_uneven_and_come_from_a_generator() -> None:
    codec = shipped()
    x0 = torch.randn(1, 8, 6, 4, 4)
    video = codec.decode(x0)
    made = codec.decode_stream(part for part in x0.split([1, 3, 2], dim=2))
    assert (torch.cat(list(made), dim=1) - video).abs().max() < 1e-5
    latents = codec.encode_stream(part for part in video.split([5, 12, 4], dim=1))
    assert (torch.cat(list(latents), dim=2) - codec.encode(video)).abs().max() < 1e-5


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_tiles_see_exactly_as_far_as_the_network_looks(depth: int) -> None:
    """Measured by the gradient of one latent, and of one cell's pixels: zero beyond the halo, not zero at its edge; one cell less would change the result."""
    torch.manual_seed(0)
    vae = VideoVAE(VAEConfig(channels=4, width=16, encoder_depth=depth, decoder_depth=depth))
    for step, channels, reach in ((vae._encode, 3 * 4 * 4 * 4, depth), (vae._decode, 4, depth + 1)):
        x = torch.randn(1, channels, 1, 13, 13, requires_grad=True)
        y, _ = step(x, ())
        (grad,) = torch.autograd.grad(y[0, :, 0, 6, 6].sum(), x)
        seen = grad[0].abs().sum((0, 1)) > 0  # [13,13]
        assert seen.any(1).nonzero().flatten().tolist() == seen.any(0).nonzero().flatten().tolist() == list(range(6 - reach, 7 + reach))
        with torch.no_grad():
            errors = [float((next(in_parts(step, [x], tile=4, halo=halo)) - y).abs().max()) for halo in (reach, reach - 1)]
        assert errors[0] < 1e-5 < 1e-4 < errors[1]


def test_windows_cover_an_axis_once_and_look_no_farther_than_it_goes() -> None:
    assert windows(10, 4, 2) == [(slice(0, 6), slice(0, 4)), (slice(2, 10), slice(2, 6)), (slice(6, 10), slice(2, 4))]
    for size, tile, halo in [(1, 1, 3), (7, 2, 0), (9, 4, 9), (5, 8, 1)]:
        assert [i for outer, inner in windows(size, tile, halo) for i in list(range(size))[outer][inner]] == list(range(size))


def test_gradients_flow_through_chunks_and_tiles_as_through_the_whole() -> None:
    codec = shipped()
    x0 = torch.randn(1, 8, 4, 8, 8, requires_grad=True)
    weight = torch.randn(1, 13, 3, 32, 32)
    whole, parts = (torch.autograd.grad((codec.decode(x0, chunk=chunk, tile=tile) * weight).sum(), x0)[0] for chunk, tile in ((None, None), (2, 3)))
    assert whole.abs().max() > 1 and (parts - whole).abs().max() < 1e-4


class Live(TorchDispatchMode):
    """Bytes of all tensors alive at once, at most, that were made inside; `given` and views of it do not count."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen = {x.untyped_storage()._cdata for x in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (storage := x.untyped_storage())._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())
        return out

    def _drop(self, which: int, size: int) -> None:
        self.seen.discard(which)
        self.now -= size


@torch.no_grad()
def peak(parts: Iterable[object], *given: Tensor) -> int:
    with Live(*given) as live:
        for part in parts:
            del part
    return live.peak


def test_memory_in_parts_depends_on_the_part_and_not_on_the_length_of_the_clip() -> None:
    vae = small_vae()
    encoding, decoding, whole = [], [], []
    for frames in (33, 129):
        video, latents = torch.rand(1, frames, 3, 16, 16), torch.randn(1, 4, 1 + (frames - 1) // 4, 4, 4)
        encoding.append(peak(vae.encode_stream(vae.split(video, 2)), video))
        decoding.append(peak(vae.decode_stream(latents.split(2, dim=2)), latents))
        whole.append(peak((vae.decode(latents) for _ in range(1)), latents))
    print(f"peak bytes for 33 and 129 frames: encoding {encoding}, decoding {decoding}, decoding whole {whole}")
    assert encoding[0] == encoding[1] and decoding[0] == decoding[1]
    assert whole[1] > 3.5 * whole[0] and whole[1] > 8 * decoding[1]


def test_a_block_keeps_two_frames_in_memory_and_no_more() -> None:
    latents = torch.randn(1, 4, 16, 8, 8)
    stacks = [VideoVAE(VAEConfig(channels=4, width=64, encoder_depth=1, decoder_depth=depth)).eval() for depth in (2, 8)]
    shallow, deep = (peak(stack.decode_stream([latents]), latents) for stack in stacks)
    assert deep - shallow <= 6 * 4 * 64 * 2 * 8 * 8


@torch.no_grad()
def test_the_largest_activation_in_chunks_and_tiles_is_that_of_one_tile_whatever_the_size_and_the_length() -> None:
    vae = small_vae()
    sizes: list[int] = []
    for module in vae.modules():
        module.register_forward_hook(lambda module, given, out: sizes.extend(x.numel() for x in tree_leaves(out)))

    def largest(frames: int, side: int, chunk: int, tile: int | None) -> int:
        sizes.clear()
        list(vae.decode_stream(torch.randn(1, 4, frames, side, side).split(chunk, dim=2), tile=tile))
        return max(sizes)

    values = 3 * 4 * 4 * 4  # of a patch, more than the 16 channels inside
    assert {largest(frames, side, 2, 4) for frames in (4, 9) for side in (12, 24)} == {values * 2 * 8**2}  # four cells and a halo of two
    assert largest(9, 24, 2, None) == values * 2 * 24**2 and largest(9, 24, 9, None) == values * 9 * 24**2


def test_parts_off_the_grid_are_refused() -> None:
    vae, video = small_vae(), torch.rand(1, 9, 3, 16, 16)
    for parts in ([video[:, :4]], [video[:, :5], video[:, 5:8]], [video[..., :15]]):
        with pytest.raises(ValueError, match="cannot be cut into patches of 4x4x4"):
            list(vae.encode_stream(parts))


# Sizes


@pytest.mark.parametrize("patch", PATCHES, ids=str)
def test_every_choice_of_patches_builds_round_trips_and_learns(patch: Patch) -> None:
    vae, video = vae_of(patch), torch.rand(2, 1 + 2 * patch[0], 3, 16, 24)
    latents, _ = vae.encode(video)
    assert latents.shape[1:] == vae.config.latents.shape(ClipShape(1 + 2 * patch[0], 16, 24)) == (4, 3, 16 // patch[1], 24 // patch[1])
    optimizer, errors = torch.optim.Adam(vae.parameters(), lr=3e-3), []
    smooth = torch.rand(2, 1, 3, 1, 1).expand_as(video)
    for _ in range(30):
        error = (vae.decode(vae.encode(smooth)[0]) - smooth).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(float(error.detach()))
    assert errors[-1] < 0.5 * errors[0]


@pytest.mark.parametrize("patch", PATCHES, ids=str)
def test_patches_go_back_to_the_pixels_they_came_from(patch: Patch) -> None:
    video = torch.rand(2, 1 + 2 * patch[0], 3, 16, 24)
    patches = to_patches(video, patch)
    assert torch.allclose(from_patches(patches, patch), video, atol=1e-6)
    corner = video[0, 0, :, : patch[1], : patch[2]] * 2 - 1  # [3,ph,pw]
    assert torch.allclose(patches[0, :, 0, 0, 0].unflatten(0, (3, *patch)), corner[:, None].expand(-1, patch[0], -1, -1))
    assert torch.equal(to_patches(video[:, 1:], patch, first=False), patches[:, :, 1:])


@pytest.mark.parametrize("shape", [(1, 16, 16), (5, 24, 48), (25, 32, 32)])
def test_sizes_and_lengths_come_back_as_they_went_in(shape: tuple[int, int, int]) -> None:
    vae = small_vae()
    clip = ClipShape(*shape)
    latents, log_variance = vae.encode(torch.rand(1, shape[0], 3, shape[1], shape[2]))
    assert latents.shape[1:] == vae.config.latents.shape(clip) == log_variance.shape[1:]
    assert vae.decode(latents).shape == (1, shape[0], 3, shape[1], shape[2])


def test_a_clip_off_the_grid_is_refused_with_its_numbers() -> None:
    with pytest.raises(ValueError, match="12x32x32"):
        VAEConfig().latents.shape(ClipShape(12, 32, 32))


@torch.no_grad()
def test_the_shipped_latents_have_unit_variance_and_the_judge_reads_a_round_trip_as_before() -> None:
    import numpy as np

    codec = shipped()
    prompts = make_prompts(160, seed=5, split="train")
    clip = ClipShape(13, 32, 32)
    video = torch.stack([render(sample_scene(p, np.random.default_rng(i), clip=clip), clip) for i, p in enumerate(prompts)])
    latents = codec.encode(video)
    assert latents.mean().abs() < 0.15
    assert 0.8 < latents.std() < 1.25
    judgements = judge(codec.decode(latents), prompts)
    for attribute in ("shape_right", "colour_right", "motion_right"):
        share = sum(all(getattr(j, attribute)) for j in judgements) / len(judgements)
        assert share >= 0.97, f"{attribute} {share:.3f}"

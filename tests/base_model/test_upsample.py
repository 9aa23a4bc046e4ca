"""Upsampling stages: resampling by hand, noise that is told, and what a fresh stage says checked against a joint Gaussian."""

import math
from pathlib import Path as FilePath

import numpy as np
import pytest
import torch
from torch import Tensor

from base_model.checkpoint import save_weights
from base_model.errors import UserError
from base_model.networks.dit import Beside, DiTConfig
from base_model.networks.packing import Segments, pack, unpack
from base_model.networks.temporal import TemporalDiT
from base_model.networks.upsample import Upsampler, corrupt, expect, random_crop, shrink_space, shrink_time, upsample_space, upsample_time
from base_model.paths import Path, RectifiedFlow, VariancePreserving
from base_model.prompts.text import TextEncoder
from base_model.stages import FrameModel, UpsampleStage, build_upsampler, load_frames, load_stage, save_frames, save_stage, tell_frames
from base_model.tiny import WEIGHTS, build_tiny, load_codec, save_network
from tests.worlds import PATHS

SMALL = DiTConfig(channels=3, patch=(1, 2, 2), width=24, depth=2, heads=2, rotary_axes=(4, 4, 4))
SHAPES = [(3, 3, 4, 4), (3, 1, 4, 6), (3, 5, 2, 4)]


def test_upsampling_in_space_is_bilinear_and_shrinking_takes_means() -> None:
    video = torch.rand(2, 3, 3, 4, 6, dtype=torch.float64)
    large = upsample_space(video)
    assert large.shape == (2, 3, 3, 8, 12)
    y, x = 5, 3  # the centre of large pixel (y, x) lies at (y + 1/2)/2 - 1/2 of the small grid
    fy, fx = (y + 0.5) / 2 - 0.5, (x + 0.5) / 2 - 0.5
    r, c = math.floor(fy), math.floor(fx)
    a, b = fy - r, fx - c
    by_hand = (1 - a) * ((1 - b) * video[..., r, c] + b * video[..., r, c + 1]) + a * ((1 - b) * video[..., r + 1, c] + b * video[..., r + 1, c + 1])
    assert (large[..., y, x] - by_hand).abs().max() < 1e-12
    small = shrink_space(large)
    assert small.shape == video.shape
    assert (small[..., 1, 2] - large[..., 2:4, 4:6].mean((-1, -2))).abs().max() < 1e-12
    with pytest.raises(ValueError, match="3x4 cannot be halved"):
        shrink_space(torch.rand(1, 1, 3, 3, 4))


def test_upsampling_in_time_keeps_every_frame_and_draws_straight_lines_between() -> None:
    video = torch.rand(2, 4, 3, 2, 2)
    large = upsample_time(video)
    assert large.shape[1] == 7 and torch.equal(shrink_time(large), video)
    ramp = torch.arange(9.0).reshape(1, 9, 1, 1, 1).expand(1, 9, 3, 2, 2)
    assert torch.equal(upsample_time(shrink_time(ramp)), ramp)
    assert torch.equal(upsample_time(video[:, :1]), video[:, :1]), "an image has nothing between its frames"
    with pytest.raises(ValueError, match="4 frames cannot be halved"):
        shrink_time(video)


def test_a_corrupted_clip_is_the_path_s_own_at_that_level() -> None:
    low, eps = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64), torch.randn(2, 3, 2, 4, 4, dtype=torch.float64)
    level = torch.tensor([0.0, 0.3], dtype=torch.float64)
    straight, turned = (corrupt(path, low, level, eps) for path in (RectifiedFlow(), VariancePreserving()))
    assert torch.equal(straight[0], low[0]) and torch.equal(turned[0], low[0])
    assert (straight[1] - (0.7 * low[1] + 0.3 * eps[1])).abs().max() < 1e-12
    assert (turned[1] - (math.cos(0.3) * low[1] + math.sin(0.3) * eps[1])).abs().max() < 1e-12


def test_a_crop_is_one_window_of_all_clips_and_every_window_comes_up() -> None:
    place = torch.arange(30.0).reshape(1, 1, 5, 6)
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(200):
        a, b = random_crop([place, -place.expand(3, 2, 5, 6)], 4, generator)
        assert a.shape == (1, 1, 4, 4) and torch.equal(b, -a.expand(3, 2, 4, 4))
        seen.add(float(a[0, 0, 0, 0]))
    assert seen == {6.0 * top + left for top in range(2) for left in range(3)}
    assert torch.equal(random_crop([place], 9, generator)[0], place)


def conditional(path: Path, t: float, level: float, detail: float) -> tuple[float, float, float]:
    """E[u | x_t, told] = a x_t + b told, and the standard deviation of u about it, from the covariance of all that is Gaussian here: low, r, n, eps."""
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    at, lv = torch.tensor(t, dtype=torch.float64), torch.tensor(level, dtype=torch.float64)
    alpha, sigma, alpha_l, sigma_l = (float(f(x)) for x in (at, lv) for f in (path.alpha, path.sigma))
    slope, noise = float(path.velocity(one, zero, at)), float(path.velocity(zero, one, at))
    x_t = np.array([alpha, alpha * detail, 0, sigma])
    told = np.array([alpha_l, 0, sigma_l, 0])
    u = np.array([slope, slope * detail, 0, noise])
    seen = np.stack([x_t, told])
    a, b = np.linalg.solve(seen @ seen.T, seen @ u)
    return float(a), float(b), math.sqrt(u @ u - np.array([a, b]) @ (seen @ u))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_what_is_expected_is_the_conditional_mean_of_a_joint_gaussian(path: Path) -> None:
    detail = 0.2
    for t, level in ((0.9, 0.1), (0.5, 0.4), (0.05, 0.02), (float(path.t_max), 0.3)):
        found = expect(path, torch.tensor([t], dtype=torch.float64), torch.tensor([level], dtype=torch.float64), torch.tensor(detail, dtype=torch.float64))
        a, b, deviation = conditional(path, t, level, detail)
        assert float(found.pull) == pytest.approx(a, abs=1e-9)
        assert float((found.slope - found.pull * found.alpha) * found.centre) == pytest.approx(b, abs=1e-9)
        assert float(found.spread_out) == pytest.approx(deviation, abs=1e-7)


def shaken(network: Upsampler) -> Upsampler:
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network


def run(network: Upsampler, clips: list[Tensor], lows: list[Tensor], t: Tensor, level: Tensor, texts: list[Tensor]) -> list[Tensor]:
    packed, low = pack(clips, SMALL.patch), pack(lows, SMALL.patch)
    out = network(packed.tokens, low.tokens, packed.positions, packed.segments, t, level, torch.cat(texts), Segments(tuple(map(len, texts))))
    return unpack(out, clips, SMALL.patch)


def stage_inputs() -> tuple[list[Tensor], list[Tensor], Tensor, Tensor, list[Tensor]]:
    g = torch.Generator().manual_seed(1)
    clips, lows = ([torch.randn(shape, generator=g) for shape in SHAPES] for _ in range(2))
    return clips, lows, torch.rand(3, generator=g), 0.3 * torch.rand(3, generator=g), [torch.randn(n, 384, generator=g) for n in (2, 4, 3)]


def test_a_fresh_stage_says_what_is_expected() -> None:
    network = build_upsampler(SMALL, apart=False)
    clips, lows, t, level, texts = stage_inputs()
    for k, u in enumerate(run(network, clips, lows, t, level, texts)):
        a, b, _ = conditional(RectifiedFlow(), float(t[k]), float(level[k]), 0.1)
        assert (u - a * clips[k] - b * lows[k]).abs().max() < 1e-4


@pytest.mark.parametrize("apart", [False, True])
def test_a_stage_packs_and_hears_the_small_clip_its_level_and_the_text(apart: bool) -> None:
    network = shaken(build_upsampler(SMALL, apart=apart))
    clips, lows, t, level, texts = stage_inputs()
    together = run(network, clips, lows, t, level, texts)
    for k in range(3):
        alone = run(network, [clips[k]], [lows[k]], t[k : k + 1], level[k : k + 1], [texts[k]])[0]
        assert (together[k] - alone).abs().max() < 1e-5
    nearby = [lows[0].roll(1, dims=3), *lows[1:]]
    other_text = [texts[0].flip(1), *texts[1:]]
    with torch.no_grad():
        for lows_told, texts_told in ((nearby, texts), (lows, other_text)):
            heard = run(network, clips, lows_told, t, level, texts_told)
            assert (heard[0] - together[0]).abs().max() > 1e-3 and (heard[1] - together[1]).abs().max() < 1e-5


class Listener(torch.nn.Module):
    """Keeps what it is told beside its tokens and says nothing."""

    config = SMALL

    def forward(self, tokens: Tensor, *_: object, beside: Beside) -> Tensor:
        self.told = beside
        return torch.zeros_like(tokens)


def test_the_small_clip_stands_beside_its_tokens_and_the_level_of_every_clip_has_an_embedding_of_its_own() -> None:
    listener = Listener()
    network = Upsampler(listener, RectifiedFlow())  # type: ignore[arg-type]
    clips, lows, t, _, texts = stage_inputs()
    heard = []
    for level in (torch.tensor([0.1, 0.1, 0.2]), torch.tensor([0.1, 0.3, 0.2])):
        run(network, clips, lows, t, level, texts)
        heard.append(listener.told)
    assert isinstance(heard[0].clip, Tensor) and isinstance(heard[1].clip, Tensor) and heard[0].clip.shape == (3, 24)
    assert (heard[0].clip[0] - heard[0].clip[1]).abs().max() < 1e-6 < 1e-3 < (heard[0].clip[0] - heard[0].clip[2]).abs().max()
    assert (heard[1].clip - heard[0].clip).abs().amax(1).tolist()[0] == 0 and (heard[1].clip - heard[0].clip).abs().amax(1)[1] > 1e-3
    matrix, bias = network.low_in.weight, network.low_in.bias
    assert isinstance(heard[0].token, Tensor) and (heard[0].token - (pack(lows, SMALL.patch).tokens @ matrix.T + bias)).abs().max() < 1e-5


def test_a_stage_and_a_frame_model_come_back_from_disk_as_they_were(tmp_path: FilePath) -> None:
    for apart in (False, True):
        stage = UpsampleStage(shaken(build_upsampler(SMALL, apart=apart)), "time", TextEncoder())
        stage.network.detail.fill_(0.07)
        save_stage(tmp_path / "stage.safetensors", stage)
        again = load_stage(tmp_path / "stage.safetensors")
        assert again.axis == "time" and isinstance(again.network.network, TemporalDiT) == apart
        assert all(torch.equal(value, again.network.state_dict()[name]) for name, value in stage.network.state_dict().items())
    torch.manual_seed(0)
    tiny = build_tiny(DiTConfig(width=24, depth=1, heads=2, rotary_axes=(4, 4, 4)))
    frames = FrameModel(TemporalDiT(tiny.network), load_codec(WEIGHTS / "vae.safetensors"), tiny.text)
    save_frames(tmp_path / "frames.safetensors", frames)
    again_frames = load_frames(tmp_path / "frames.safetensors")
    assert all(torch.equal(value, again_frames.network.state_dict()[name]) for name, value in frames.network.state_dict().items())
    save_network(tmp_path / "image.safetensors", tiny)
    with pytest.raises(UserError, match="does not hold the weights of this architecture"):
        load_frames(tmp_path / "image.safetensors")
    for metadata in ({}, {"axis": "depth", "attention": "joint"}, {"axis": "space", "attention": "joint"}):
        save_weights(tmp_path / "odd.safetensors", {"a": torch.zeros(1)}, metadata)
        with pytest.raises(UserError, match=r"odd\.safetensors"):
            load_stage(tmp_path / "odd.safetensors")


def test_pixels_become_about_unit_variance_and_come_back() -> None:
    stage = UpsampleStage(build_upsampler(SMALL, apart=False), "space", TextEncoder())
    video = torch.rand(2, 5, 3, 4, 6)
    x0 = stage.encode(video)
    assert x0.shape == (2, 3, 5, 4, 6) and (stage.decode(x0) - video).abs().max() < 1e-6
    with pytest.raises(ValueError, match="needs a small clip"):
        stage(x0, torch.ones(2), stage.encode_text(["a", "b"]))


def test_frames_are_encoded_one_by_one_as_images() -> None:
    tiny = build_tiny(DiTConfig(width=24, depth=1, heads=2, rotary_axes=(4, 4, 4)))
    frames = FrameModel(TemporalDiT(tiny.network), load_codec(WEIGHTS / "vae.safetensors"), tiny.text)
    video = torch.rand(2, 3, 3, 16, 24)
    x0 = frames.encode(video)
    assert x0.shape == (2, 8, 3, 4, 6)
    assert (x0[1, :, 2:3] - frames.codec.encode(video[1:2, 2:3])[0]).abs().max() < 1e-5
    decoded = frames.decode(x0)
    assert decoded.shape == video.shape and (decoded[1, 2] - frames.codec.decode(x0[1:2, :, 2:3])[0, 0]).abs().max() < 1e-5


def test_a_given_frame_has_noise_level_0_and_its_own_value() -> None:
    torch.manual_seed(0)
    tiny = build_tiny(DiTConfig(width=24, depth=1, heads=2, rotary_axes=(4, 4, 4)))
    network = TemporalDiT(tiny.network)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model = FrameModel(network, tiny.codec, tiny.text)
    cond, x_t, values = model.encode_text(["a red circle", "a blue bar"]), torch.randn(2, 8, 3, 4, 4), torch.randn(2, 8, 3, 4, 4)
    known, t = torch.tensor([True, False, True]), torch.tensor([0.8, 0.4])
    told = tell_frames(cond, values, known)
    u = model(x_t, t, told)
    by_hand = torch.where(known[:, None, None], values, x_t)
    tokens, segments = pack(list(by_hand), network.config.patch), Segments(tuple(cond.mask.sum(1).tolist()))
    levels = torch.cat([torch.where(known, 0.0, time).repeat_interleave(4) for time in t])
    expected = unpack(network(tokens.tokens, tokens.positions, tokens.segments, levels, cond.text[cond.mask], segments), list(x_t), network.config.patch)
    assert (u - torch.stack(expected))[:, :, ~known].abs().max() < 1e-5
    assert (x_t - t.view(2, 1, 1, 1, 1) * u - values)[:, :, known].abs().max() < 1e-5, "one whole step leads to what is given"
    junk = torch.where(known[:, None, None], torch.randn_like(x_t), x_t)
    assert torch.equal(model(junk, t, told)[:, :, ~known], u[:, :, ~known]), "what stands in a given frame of the state is not read"
    assert tell_frames(cond, values, torch.zeros(3, dtype=torch.bool)) is cond

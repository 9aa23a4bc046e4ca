"""The bench of the video autoencoder: its floors are what they say they are, its measures have known answers, and it runs at toy size."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from align.config import load
from base_model.errors import UserError
from base_model.networks.vae import VAEConfig, to_patches
from base_model.tiny import WEIGHTS, LatentCodec, load_codec
from base_model.types import ClipShape
from recipes import cli, vae
from recipes.bench import codec as bench
from recipes.shapes.dataset import draw_clips
from reward.features import signal_features

TOY = ["--clips", "8", "--held_out", "4", "--iterations", "2", "--temporal_iterations", "2", "--batch", "2", "--long_frames", "17", "--repeats", "1"]


def shipped() -> LatentCodec:
    return load_codec(WEIGHTS / "vae.safetensors")


# Floors


def test_pca_leaves_what_the_dropped_singular_values_say() -> None:
    """The squared error on its own data is the sum of the squared singular values that were dropped, for first and later patches apart."""
    data, patch, values = draw_clips("messy", 12, seed=0, shape=ClipShape(5, 16, 16)), (4, 4, 4), 8
    video = vae.as_float(torch.stack(data.videos))
    with_all = bench.pca(data, patch, 3 * 4 * 4 * 4)(video)
    assert (with_all - video).abs().max() < 1e-4
    error = ((bench.pca(data, patch, values)(video).double() - video) * 2).square()  # patches are in [-1,1]
    patches = to_patches(video, patch).double().flatten(3)  # [B,P,F,n]
    for frames, f, repeated in ((slice(0, 1), 0, 4), (slice(1, 5), 1, 1)):
        x = patches[:, :, f].transpose(1, 2).flatten(0, 1).numpy()  # [N,P]
        dropped = np.sort(np.linalg.svd(x - x.mean(0), compute_uv=False))[:-values]
        assert float(error[:, frames].sum()) * repeated == pytest.approx(float(np.square(dropped).sum()), rel=0.03)


def test_frames_get_no_fewer_numbers_than_the_video_autoencoder_and_not_many_more() -> None:
    for latents in (2048, 512, 4000):
        channels = bench.frame_channels(latents)
        assert channels * 13 * 4 * 4 >= latents > (channels - 1) * 13 * 4 * 4
    assert bench.frame_channels(2048) * 13 * 4 * 4 < 1.02 * 2048


@torch.no_grad()
def test_frames_alone_are_what_diffusers_itself_gives_and_temporal_parts_begin_as_nothing() -> None:
    image, video = bench.FrameCodec(3).eval().requires_grad_(False), torch.rand(2, 5, 3, 16, 24)  # some processors' kernels, and their rounding, are chosen by what trains
    posterior = image.image.encode(2 * video.flatten(0, 1) - 1).latent_dist
    alone = (image.image.decode(posterior.mean).sample + 1) / 2  # [B T,3,H,W]
    assert torch.allclose(image.reconstruct(video).flatten(0, 1), alone.clamp(0, 1), atol=1e-6)
    for model in (image.blended().requires_grad_(False), image.tuned().requires_grad_(False)):
        assert torch.allclose(model.reconstruct(video), image.reconstruct(video), atol=1e-6)
    one_frame = image.reconstruct(video[:, 2:3])
    assert torch.allclose(one_frame, image.reconstruct(video)[:, 2:3], atol=1e-5)


def test_only_what_was_added_trains_and_it_sees_neighbouring_frames() -> None:
    image = bench.FrameCodec(3)
    before = {name: value.clone() for name, value in image.state_dict().items()}
    data, cfg = draw_clips("messy", 6, seed=0, shape=ClipShape(5, 16, 16)), bench.Config(batch=2)
    for model, trained in ((image.blended(), ("blend.",)), (image.tuned(), ("layers.", "image.decoder.", "image.post_quant_conv."))):
        bench.fit_frames(model, data, cfg, iterations=3, label="toy")
        changed = {name for name, value in model.state_dict().items() if name not in before or not torch.equal(value, before[name])}
        assert changed and all(name.startswith(trained) for name in changed) and any(name.startswith(trained[0]) for name in changed)
        video = torch.rand(1, 5, 3, 16, 16)
        other = video.clone()
        other[:, 3] = 1 - other[:, 3]
        with torch.no_grad():
            assert (model.decode(model.encode(video)[0])[:, 2] - model.decode(model.encode(other)[0])[:, 2]).abs().max() > 1e-7
    assert all(torch.equal(value, before[name]) for name, value in image.state_dict().items())


def test_the_plain_autoencoder_is_the_recipe_without_its_term(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[vae.Config] = []
    fit = vae.fit
    monkeypatch.setattr(vae, "fit", lambda cfg, *more: told.append(cfg) or fit(cfg, *more))
    data = draw_clips("messy", 4, seed=0, shape=ClipShape(5, 16, 16))
    like = LatentCodec(VAEConfig(channels=2, width=8, time_stride=2)).vae
    for kl_coef in (2e-4, 0.0):
        made, _ = bench.fit_video(bench.Config(iterations=1, batch=2), like, data, torch.stack(data.videos), kl_coef=kl_coef)
        assert made.vae.config.patch == (2, 4, 4)
    a, b = (cfg.model_dump() for cfg in told)
    assert {key for key in a if a[key] != b[key]} == {"kl_coef", "out"} and b["kl_coef"] == 0


# Measures


def test_the_frechet_distance_is_that_of_scipy_and_of_shifted_gaussians() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(200, 5)) @ rng.normal(size=(5, 5)), rng.normal(size=(150, 5)) + 1
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b - 2 * scipy.linalg.sqrtm(cov_a @ cov_b).real)
    assert bench.frechet(a, b) == pytest.approx(expected, rel=1e-9)
    assert bench.frechet(a, a + np.array([3, 0, 0, 4, 0])) == pytest.approx(25)
    assert bench.frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_ranks_are_shares_with_ties_counted_half() -> None:
    among = torch.tensor([[1.0, 5.0], [2.0, 5.0], [2.0, 6.0], [4.0, 7.0]])
    assert bench.ranks(torch.tensor([[0.0, 5.0], [2.0, 9.0], [3.0, 6.5]]), among).tolist() == [[0.0, 0.25], [0.5, 1.0], [0.75, 0.75]]
    signals = signal_features(torch.rand(9, 3, 3, 16, 16))
    assert np.allclose(np.sort(bench.ranks(signals, signals), axis=0).mean(0), 0.5)


def test_a_codec_that_keeps_pixels_interpolates_as_pixels_do_and_a_noisy_one_worse() -> None:
    """The identity in place of the network: ends are real clips, midpoints cross-fades."""

    class Kept(LatentCodec):
        def __init__(self, noise: float) -> None:
            super().__init__(VAEConfig(width=8))
            self.noise = noise

        def encode(self, video: torch.Tensor, *, chunk: int | None = None, tile: int | None = None) -> torch.Tensor:
            return video

        def decode(self, x0: torch.Tensor, *, chunk: int | None = None, tile: int | None = None) -> torch.Tensor:
            return (x0 + self.noise * torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)

    held_out, reference = (torch.stack(draw_clips("messy", 24, seed=seed, shape=ClipShape(5, 16, 16)).videos) for seed in (1, 2))
    pixels, ours, noisy = bench.interpolation({"vae": Kept(0.0), "noisy": Kept(0.1)}, held_out, reference, draws=20)
    for key in ("ends_frechet", "midpoints_frechet", "midpoints_low", "midpoints_high"):
        assert pixels[key] == pytest.approx(ours[key])
    assert pixels["farther_than_vae"] == pytest.approx(0) and ours["farther_than_vae"] is None
    assert 0 < noisy["farther_low"] <= noisy["farther_than_vae"] and noisy["ends_frechet"] > ours["ends_frechet"]


def test_reconstruction_says_how_far_the_vae_is_ahead_on_the_same_clips() -> None:
    held_out = torch.full((6, 5, 3, 16, 16), 128, dtype=torch.uint8)
    ways = {name: bench.Way(lambda video, error=error: video + error, 40, 7, 3, 1.0) for name, error in (("vae", 0.01), ("other", 0.1))}
    ours, other = bench.reconstruction(ways, held_out)
    assert ours["psnr_db"] == pytest.approx(40, abs=0.01) and ours["vae_ahead_db"] is None
    assert [other[f"vae_ahead_{key}"] for key in ("db", "low", "high")] == pytest.approx([20] * 3, abs=0.01)
    assert ours["latents_per_pixel"] == pytest.approx(40 / (5 * 16 * 16))


def test_parts_and_tiles_are_smaller_than_the_clip_and_decoded_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = shipped()
    assert bench.sizes(codec, ClipShape(13, 32, 32)) == [(None, None), (1, None)]
    assert bench.sizes(codec, ClipShape(721, 32, 32)) == [(None, None), (1, None), (16, None), (32, None)]
    assert bench.sizes(codec, ClipShape(13, 256, 128)) == [(None, None), (1, None), (None, 16), (1, 16)]
    whole, parts = bench.speed(codec, [ClipShape(13, 32, 32)], repeats=2)
    assert whole["times_slower_than_whole"] is None and parts["times_slower_low"] <= parts["times_slower_than_whole"] <= parts["times_slower_high"]
    assert whole["largest_activation_bytes"] == 4 * 192 * 4 * 8 * 8 and parts["largest_activation_bytes"] == 4 * 128 * 2 * 8 * 8  # patches; two frames that a block remembers
    assert parts["frames_per_second"] == pytest.approx(13 / parts["seconds"])


# The command


def test_the_bench_runs_at_toy_size_in_flat_rows_and_writes_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "LARGE_CLIP", ClipShape(5, 96, 80))
    assert cli.main(["bench", "codec", "--quick", "--json", "--write", "--results", str(tmp_path), "--date", "2026-11", *TOY]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert all(set(row) == set(rows[0]) for row in rows)
    assert all(value is None or isinstance(value, bool | int | float | str) for row in rows for value in row.values())
    assert [(row["part"], row["name"]) for row in rows if row["part"] != "decoding"] == [
        *(("reconstruction", name) for name in ("shipped vae", "vae", "plain autoencoder", "pca", "frames", "frames, blended in time", "frames, decoder tuned")),
        *(("interpolation", name) for name in ("pixels", "shipped vae", "vae", "plain autoencoder")),
    ]
    assert {(row["clip"], row["chunk"], row["tile"]) for row in rows if row["part"] == "decoding"} == {
        *((clip, chunk, None) for clip in ("13x32x32", "17x32x32", "5x96x80") for chunk in (None, 1)),
        *(("5x96x80", chunk, 16) for chunk in (None, 1)),
    }
    sizes = {row["latents_per_clip"] for row in rows if row["part"] == "reconstruction"}
    assert min(sizes) == 2048 and max(sizes) < 1.02 * 2048
    assert all(math.isfinite(row["psnr_db"]) for row in rows if row["part"] == "reconstruction")
    (text,) = (path.read_text() for path in tmp_path.glob("2026-11_*_codec.md"))
    assert all(heading in text for heading in ("## Reconstruction", "## Interpolation", "## Decoding"))
    assert f"rushes bench codec --quick {' '.join(TOY)}\n" in text


def test_quick_shrinks_the_default_and_leaves_smaller_requests_alone() -> None:
    quick = bench.shrunk(load(bench.Config, None, ["--iterations", "3"]))
    assert (quick.iterations, quick.temporal_iterations, quick.clips, quick.long_frames) == (3, 4, 64, 97)


def test_a_long_clip_off_the_grid_is_the_users_error_before_any_work(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "measure", None)
    with pytest.raises(UserError, match="long_frames: 720 frames are not 1 \\+ a multiple of 4"):
        bench.main(load(bench.Config, None, ["--long_frames", "720"]))

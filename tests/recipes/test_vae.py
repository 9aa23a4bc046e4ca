"""`rushes vae`: strides, the plain autoencoder, and what it learns."""

from pathlib import Path

import pytest
import torch

from align.run import read_metrics
from base_model.errors import UserError
from base_model.tiny import load_codec
from recipes import vae
from recipes.shapes.dataset import draw_clips

SMALL = {"clips": 24, "held_out": 4, "batch": 4, "width": 16}


@pytest.mark.parametrize("strides", [(2, 4), (4, 4), (4, 8)], ids=str)
def test_every_choice_of_patches_trains_and_comes_back_with_its_strides(tmp_path: Path, strides: tuple[int, int]) -> None:
    cfg = vae.Config(out=tmp_path / "run", iterations=50, lr=5e-3, time_stride=strides[0], space_stride=strides[1], **SMALL)
    result = vae.main(cfg)
    codec = load_codec(tmp_path / "run" / "vae.safetensors")
    assert codec.vae.config.patch == (strides[0], strides[1], strides[1])
    first, last = read_metrics(tmp_path / "run")
    print(f"held-out PSNR {first['held_out_psnr']:.2f} -> {last['held_out_psnr']:.2f} dB")
    assert last["held_out_psnr"] > first["held_out_psnr"] + 2
    held_out = torch.stack(draw_clips("messy", 4, seed=1_000_003, shape=vae.DEMO_CLIP).videos)
    assert vae.codec_psnr(codec, held_out) == pytest.approx(result["held_out_psnr_db"], abs=0.006)
    assert codec.encode(vae.as_float(held_out)).shape == (4, 8, 1 + 12 // strides[0], 32 // strides[1], 32 // strides[1])


def test_without_the_kullback_leibler_term_the_latents_get_no_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise: list[tuple[int, ...]] = []
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda shape, **more: noise.append(tuple(shape)) or randn(shape, **more))
    for kl_coef, drawn in ((0.0, 0), (2e-4, 2)):
        noise.clear()
        vae.main(vae.Config(out=tmp_path / str(kl_coef), iterations=2, kl_coef=kl_coef, **SMALL))
        assert len(noise) == drawn


@pytest.mark.parametrize(("time_stride", "space_stride"), [(3, 4), (8, 4), (4, 16), (4, 5)])
def test_strides_that_no_native_clip_fits_are_the_users_error_before_any_work(tmp_path: Path, time_stride: int, space_stride: int) -> None:
    with pytest.raises(UserError, match=r"time_stride, space_stride: clip .* does not fit the latent grid"):
        vae.main(vae.Config(out=tmp_path / "run", time_stride=time_stride, space_stride=space_stride))
    assert not (tmp_path / "run").exists()


def test_psnr_is_that_of_a_known_error() -> None:
    videos = torch.full((3, 2, 3, 8, 8), 128, dtype=torch.uint8)
    found = vae.psnr(lambda video: video + torch.tensor([0.1, 0.01, 0.001])[:, None, None, None, None], videos)
    assert torch.allclose(found, torch.tensor([20.0, 40.0, 60.0]), atol=1e-2)


def test_a_batch_is_of_one_size_and_sizes_come_as_often_as_they_are_in_the_data() -> None:
    data = draw_clips("messy", 60, seed=0)
    draw = vae.batches(data, 3)
    shapes = [tuple(draw(torch.Generator().manual_seed(seed)).shape) for seed in range(300)]
    share = sum(tuple(video.shape) == (13, 3, 32, 32) for video in data.videos) / len(data)
    assert sum(shape == (3, 13, 3, 32, 32) for shape in shapes) / 300 == pytest.approx(share, abs=0.08)
    assert torch.equal(draw(torch.Generator().manual_seed(5)), draw(torch.Generator().manual_seed(5)))

"""The adapter of LTX-Video beside diffusers' own pipeline, at toy size and random weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LTXPipeline
from torch import Tensor, nn

from align.kernels import ODE
from align.trajectory import rollout
from base_model.errors import UserError
from base_model.families.ltx import LORA_TARGETS, MLP_TARGETS, LTXVideoModel, load
from base_model.guidance import Guided
from base_model.lora import add_lora, reference
from base_model.types import ClipShape, Conditioning
from tests.base_model.families.tiny_ltx import tiny_pipeline

CPU = torch.device("cpu")
PROMPTS = ["a red circle moves left", "a cat"]
SMALL, LONG = ClipShape(9, 64, 96), ClipShape(17, 32, 64)
SOME_TIMES = torch.tensor([0.25, 0.9])


def adapter(pipeline: Any) -> LTXVideoModel:
    return LTXVideoModel(pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, pipeline.scheduler)


@pytest.fixture
def pipeline() -> Any:
    return tiny_pipeline()


@pytest.fixture
def model(pipeline: Any) -> LTXVideoModel:
    return adapter(pipeline)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ltx")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "ltx")


def noise(model: LTXVideoModel, clip: ClipShape, number: int = 2) -> Tensor:
    return torch.randn(number, *model.latents.shape(clip))


def sampled(pipeline: Any, eps: Tensor, clip: ClipShape, **options: Any) -> Any:
    told = {"height": clip.height, "width": clip.width, "num_frames": clip.frames, "num_inference_steps": 4, "guidance_scale": 1.0}
    return pipeline(PROMPTS[: len(eps)], latents=LTXPipeline._pack_latents(eps), **{**told, **options}).frames


def sampled_latents(pipeline: Any, eps: Tensor, clip: ClipShape, **options: Any) -> Tensor:
    return LTXPipeline._unpack_latents(sampled(pipeline, eps, clip, output_type="latent", **options), *eps.shape[2:])


def rolled(model: Any, inner: LTXVideoModel, eps: Tensor, clip: ClipShape) -> Tensor:
    cond = inner.encode_text(PROMPTS[: len(eps)])
    return rollout(model, ODE(), eps, inner.times(4, clip), cond, noise=torch.Generator(), stochastic=[]).x0


@pytest.mark.parametrize("clip", [SMALL, LONG], ids=str)
@pytest.mark.parametrize("fps", [25, 12])
def test_a_rollout_ends_where_the_pipeline_ends(pipeline: Any, model: LTXVideoModel, clip: ClipShape, fps: int) -> None:
    eps = noise(model, clip)
    ours = rolled(replace(model, fps=fps), model, eps, clip)
    assert (ours - sampled_latents(pipeline, eps, clip, frame_rate=fps)).abs().max() < 1e-4
    assert (ours - eps).abs().max() > 0.1


@pytest.mark.parametrize("clip", [SMALL, LONG], ids=str)
@pytest.mark.parametrize("joined", [False, True])
def test_guidance_in_two_passes_or_one_is_the_pipelines(pipeline: Any, model: LTXVideoModel, clip: ClipShape, joined: bool) -> None:
    eps = noise(model, clip)
    ours = rolled(Guided(model, 4.0, joined=joined), model, eps, clip)
    assert (ours - sampled_latents(pipeline, eps, clip, guidance_scale=4.0)).abs().max() < 1e-4
    assert (ours - rolled(model, model, eps, clip)).abs().max() > 0.01  # the prompt is heard


def test_the_frame_rate_moves_the_velocity(model: LTXVideoModel) -> None:
    x, cond = noise(model, LONG), model.encode_text(PROMPTS)
    assert (model(x, SOME_TIMES, cond) - replace(model, fps=8)(x, SOME_TIMES, cond)).abs().max() > 1e-3


def test_longer_clips_are_sampled_with_more_noise_and_every_grid_ends_in_zero(model: LTXVideoModel) -> None:
    few, many = model.times(6, ClipShape(9, 32, 32)), model.times(6, ClipShape(17, 96, 96))  # 2 and 27 tokens
    assert bool((many[1:5] > few[1:5]).all()) and few[0] == many[0] == 1 and few[-1] == many[-1] == 0
    assert torch.allclose(few[-2], torch.tensor(0.1)) and torch.allclose(many[-2], torch.tensor(0.1))  # `shift_terminal`
    with pytest.raises(ValueError, match="at least 2 steps"):
        model.times(1, SMALL)
    with pytest.raises(ValueError, match="latent grid"):
        model.times(4, ClipShape(8, 32, 32))


class Oracle(nn.Module):
    """Says what LTX should say where the data are x0: eps - x0, as tokens."""

    def __init__(self, network: Any, x0: Tensor, eps: Tensor) -> None:
        super().__init__()
        self.target, self.config, self.dtype = LTXPipeline._pack_latents(eps - x0), network.config, torch.float32

    def forward(self, **told: Any) -> tuple[Tensor]:
        return (self.target,)


def test_an_oracle_leads_the_scheduler_and_our_kernel_to_the_data(pipeline: Any, model: LTXVideoModel) -> None:
    x0, eps = noise(model, SMALL), noise(model, SMALL)
    oracle = Oracle(model.network, x0, eps)
    times = model.times(8, SMALL)
    pipeline.scheduler.set_timesteps(sigmas=times[:-1].tolist(), mu=0.0)
    tokens = LTXPipeline._pack_latents(eps)
    for t in pipeline.scheduler.timesteps:
        tokens = pipeline.scheduler.step(oracle()[0], t, tokens).prev_sample
    assert (LTXPipeline._unpack_latents(tokens, *x0.shape[2:]) - x0).abs().max() < 1e-5
    ours = rollout(replace(model, network=oracle), ODE(), eps, times, model.encode_text(PROMPTS), noise=torch.Generator(), stochastic=[]).x0
    assert (ours - x0).abs().max() < 1e-5


@pytest.mark.parametrize("clip", [SMALL, LONG], ids=str)
def test_latents_are_decoded_as_the_pipeline_decodes_its_own(pipeline: Any, model: LTXVideoModel, clip: ClipShape) -> None:
    eps = noise(model, clip)
    theirs = sampled(pipeline, eps, clip, output_type="pt")
    with torch.no_grad():
        ours = model.decode(sampled_latents(pipeline, eps, clip))
    assert ours.shape == (2, clip.frames, 3, clip.height, clip.width) and float(ours.std()) > 0.05
    assert (ours - theirs).abs().max() < 1e-5


def test_a_decoder_that_is_told_a_time_hears_it_and_draws_the_noise_the_pipeline_draws() -> None:
    pipeline = tiny_pipeline(timed_decoder=True)
    model = replace(adapter(pipeline), decode_time=0.05, decode_noise=0.025)
    eps = noise(model, SMALL, 1)
    x0 = sampled_latents(pipeline, eps, SMALL)
    torch.manual_seed(0)
    theirs = sampled(pipeline, eps, SMALL, output_type="pt", decode_timestep=0.05, decode_noise_scale=0.025)
    with torch.no_grad():
        ours, other = model.decode(x0), replace(model, decode_time=0.5).decode(x0)
        assert (ours - theirs).abs().max() < 1e-5 and (ours - other).abs().max() > 1e-3
        before = torch.get_rng_state()
        assert torch.equal(model.decode(torch.cat([x0, x0]))[1], ours[0]) and torch.equal(torch.get_rng_state(), before)


def test_encode_makes_what_the_pipelines_own_normalisation_makes_and_decode_undoes_it(model: LTXVideoModel) -> None:
    vae, video = model.vae, torch.rand(2, 9, 3, 64, 96)
    with torch.no_grad():
        raw = vae.encode(2 * video.transpose(1, 2) - 1).latent_dist.mode()
        x0 = model.encode(video)
        assert (x0 - LTXPipeline._normalize_latents(raw, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)).abs().max() < 1e-5
        assert x0.shape == (2, *model.latents.shape(SMALL)) and (x0 - raw).abs().max() > 0.1
        assert (model.decode(x0) - ((vae.decode(raw).sample + 1) / 2).clamp(0, 1).transpose(1, 2)).abs().max() < 1e-5


def test_texts_are_encoded_as_the_pipeline_encodes_them(pipeline: Any, model: LTXVideoModel) -> None:
    prompts = [*PROMPTS, "", " ".join(["rain"] * 200)]
    with torch.no_grad():
        text, mask, empty, empty_mask = pipeline.encode_prompt(prompts)
    cond, unprompted = model.encode_text(prompts), model.encode_text([""])
    assert torch.equal(cond.text, text) and torch.equal(cond.mask, mask) and cond.mask.sum(1).tolist() == [6, 3, 1, 128]
    assert torch.allclose(unprompted.text, empty[:1], atol=1e-6) and torch.equal(unprompted.mask, empty_mask[:1]) and not cond.text.requires_grad


def test_what_stands_behind_the_mask_is_not_read(model: LTXVideoModel) -> None:
    cond, x = model.encode_text(PROMPTS), noise(model, SMALL)

    def changed(where: Tensor) -> Conditioning:
        return replace(cond, text=torch.where(where[:, :, None], torch.randn_like(cond.text), cond.text))

    u = model(x, SOME_TIMES, cond)
    assert torch.equal(model(x, SOME_TIMES, changed(~cond.mask)), u)
    assert (model(x, SOME_TIMES, changed(cond.mask)) - u).abs().amax((1, 2, 3, 4)).min() > 1e-3


def test_a_saved_pipeline_is_read_and_gives_the_same_velocities(model: LTXVideoModel, saved: Path) -> None:
    again, x = load(str(saved), device=CPU, dtype=torch.float32), noise(model, SMALL)
    theirs = again(x, SOME_TIMES, again.encode_text(PROMPTS))
    assert torch.equal(theirs, model(x, SOME_TIMES, model.encode_text(PROMPTS))) and theirs.dtype is torch.float32
    assert torch.equal(again.times(5, LONG), model.times(5, LONG)) and torch.equal(again.decode(x), model.decode(x))
    assert not any(p.requires_grad for part in (again.network, again.vae, again.text_encoder) for p in part.parameters())


def test_weights_in_half_precision_give_velocities_latents_and_clips_in_float32(saved: Path) -> None:
    model = load(str(saved), device=CPU, dtype=torch.bfloat16).to(CPU)
    x, cond = noise(model, SMALL), model.encode_text(PROMPTS)
    video = model.decode(x)
    assert {model(x, SOME_TIMES, cond).dtype, video.dtype, model.encode(video).dtype} == {torch.float32} and cond.text.dtype is torch.bfloat16


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_part_that_is_missing_is_named_in_one_line(copied: Path, part: str) -> None:
    shutil.rmtree(copied / part)
    with pytest.raises(UserError, match=rf"^[^\n]*{part}/[^\n]*$"):
        load(str(copied), device=CPU, dtype=torch.float32)


def test_a_folder_of_another_family_is_refused_in_one_line(copied: Path) -> None:
    file = copied / "transformer" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "_class_name": "MochiTransformer3DModel"}))
    with pytest.raises(UserError, match=r"^[^\n]*holds a MochiTransformer3DModel[^\n]*$"):
        load(str(copied), device=CPU, dtype=torch.float32)
    file.write_text(json.dumps({**config, "patch_size_t": 2}))
    with pytest.raises(UserError, match=r"^[^\n]*patch size 1[^\n]*$"):
        load(str(copied), device=CPU, dtype=torch.float32)


def test_pickled_weights_are_refused_in_one_line(copied: Path, model: LTXVideoModel) -> None:
    weights = copied / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save(model.network.state_dict(), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(UserError, match=r"^[^\n]*transformer/[^\n]*safetensors[^\n]*$"):
        load(str(copied), device=CPU, dtype=torch.float32)


def test_lora_trains_its_adapter_and_nothing_else(model: LTXVideoModel) -> None:
    x, cond = noise(model, SMALL), model.encode_text(PROMPTS)
    before = model(x, SOME_TIMES, cond).detach()
    model.network = add_lora(model.network, rank=2, alpha=2, targets=(*LORA_TARGETS, *MLP_TARGETS))
    assert torch.equal(model(x, SOME_TIMES, cond), before)
    trained = {name: p for name, p in model.network.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * (2 * 4 + 2) and all("lora_" in name for name in trained)
    frozen = {name: p.clone() for name, p in model.network.named_parameters() if name not in trained}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.1)
    for _ in range(2):  # B is zero at first, and so is the gradient of A
        optimizer.zero_grad()
        model(x, SOME_TIMES, cond).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in trained.values())
    assert all(torch.equal(p, frozen[name]) for name, p in model.network.named_parameters() if name in frozen)
    assert (model(x, SOME_TIMES, cond) - before).abs().max() > 1e-3
    with reference(model.network):
        assert torch.equal(model(x, SOME_TIMES, cond), before)


@pytest.mark.parametrize("timed", [False, True])
def test_pixels_have_a_gradient_in_the_latents(timed: bool) -> None:
    model = adapter(tiny_pipeline(timed_decoder=timed))
    x0 = noise(model, SMALL).requires_grad_()
    model.decode(x0)[1].sum().backward()
    assert x0.grad is not None and bool(x0.grad[1].abs().amax(0).gt(0).all()) and not x0.grad[0].any()  # every position of its own clip

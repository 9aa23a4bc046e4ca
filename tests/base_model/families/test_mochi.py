"""The adapter of Mochi beside diffusers' own pipeline, at toy size and random weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule
from torch import Tensor, nn

from align.kernels import ODE
from align.trajectory import rollout
from base_model.errors import UserError
from base_model.families import ltx
from base_model.families.mochi import LORA_TARGETS, MLP_TARGETS, MochiVideoModel, load
from base_model.guidance import Guided
from base_model.lora import add_lora, reference
from base_model.types import ClipShape, Conditioning
from tests.base_model.families.tiny_mochi import tiny_pipeline

# raised by diffusers in the pipelines below: its rotary table asks for an autocast that CPUs do not have
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")

CPU = torch.device("cpu")
PROMPTS = ["a red circle moves left", "a cat"]
SMALL, LONG = ClipShape(7, 32, 48), ClipShape(13, 16, 32)
SOME_TIMES = torch.tensor([0.25, 0.9])


def adapter(pipeline: Any) -> MochiVideoModel:
    zero_empty = pipeline.config.force_zeros_for_empty_prompt
    return MochiVideoModel(pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, pipeline.scheduler, zero_empty=zero_empty)


@pytest.fixture(params=[True, False], ids=["empty prompt zeroed", "empty prompt as it is"])
def either(request: pytest.FixtureRequest) -> Any:
    return tiny_pipeline(zero_empty=request.param)


@pytest.fixture
def pipeline() -> Any:
    return tiny_pipeline()


@pytest.fixture
def model(pipeline: Any) -> MochiVideoModel:
    return adapter(pipeline)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mochi")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "mochi")


def noise(model: MochiVideoModel, clip: ClipShape, number: int = 2) -> Tensor:
    return torch.randn(number, *model.latents.shape(clip))


def sampled(pipeline: Any, eps: Tensor, clip: ClipShape, **options: Any) -> Any:
    told = {"height": clip.height, "width": clip.width, "num_frames": clip.frames, "num_inference_steps": 5, "guidance_scale": 1.0, "output_type": "latent"}
    return pipeline(PROMPTS[: len(eps)], latents=eps, **{**told, **options}).frames


def rolled(model: Any, inner: MochiVideoModel, eps: Tensor, clip: ClipShape) -> Tensor:
    cond = inner.encode_text(PROMPTS[: len(eps)])
    return rollout(model, ODE(), eps, inner.times(5, clip), cond, noise=torch.Generator(), stochastic=[]).x0


@pytest.mark.parametrize("clip", [SMALL, LONG], ids=str)
def test_a_rollout_ends_where_the_pipeline_ends(pipeline: Any, model: MochiVideoModel, clip: ClipShape) -> None:
    eps = noise(model, clip)
    ours = rolled(model, model, eps, clip)
    assert (ours - sampled(pipeline, eps, clip)).abs().max() < 1e-4
    assert (ours - eps).abs().max() > 0.1


@pytest.mark.parametrize("clip", [SMALL, LONG], ids=str)
@pytest.mark.parametrize("joined", [False, True])
def test_guidance_in_two_passes_or_one_is_the_pipelines(either: Any, clip: ClipShape, joined: bool) -> None:
    model = adapter(either)
    eps = noise(model, clip)
    ours = rolled(Guided(model, 4.5, joined=joined), model, eps, clip)
    assert (ours - sampled(either, eps, clip, guidance_scale=4.5)).abs().max() < 1e-4
    assert (ours - rolled(model, model, eps, clip)).abs().max() > 0.01  # the prompt is heard


def test_guidance_is_computed_in_float32_from_velocities_in_half_precision(saved: Path) -> None:
    model = load(str(saved), device=CPU, dtype=torch.bfloat16)
    x, cond, empty = noise(model, SMALL), model.encode_text(PROMPTS), model.encode_text(["", ""])
    u, v = model(x, SOME_TIMES, cond), model(x, SOME_TIMES, empty)
    assert torch.equal(Guided(model, 4.5)(x, SOME_TIMES, cond), v + 4.5 * (u - v))
    assert torch.equal(u, u.bfloat16().float()) and not torch.equal(v + 4.5 * (u - v), (v + 4.5 * (u - v)).bfloat16().float())


@pytest.mark.parametrize("steps", [2, 5, 28, 64])
def test_the_grid_is_the_pipelines_linear_quadratic_one(model: MochiVideoModel, steps: int) -> None:
    assert torch.allclose(model.times(steps, SMALL), torch.tensor([*linear_quadratic_schedule(steps, 0.025), 0.0]), atol=1e-6)
    assert model.times(steps, SMALL)[0] == 1 and model.times(steps, SMALL)[-1] == 0


def test_a_grid_that_cannot_be_is_refused(model: MochiVideoModel) -> None:
    with pytest.raises(ValueError, match="at least 2 steps"):
        model.times(1, SMALL)
    with pytest.raises(ValueError, match="latent grid"):
        model.times(4, ClipShape(8, 32, 32))
    with pytest.raises(ValueError, match="multiple of 16"):
        model.times(4, ClipShape(7, 32, 40))


class Oracle(nn.Module):
    """Says what Mochi should say where the data are x0: x0 - eps; and keeps what time it was told."""

    def __init__(self, network: Any, x0: Tensor, eps: Tensor) -> None:
        super().__init__()
        self.target, self.config, self.dtype, self.told = x0 - eps, network.config, torch.float32, list[Tensor]()

    def forward(self, *, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        self.told.append(timestep)
        return (self.target,)


def test_an_oracle_leads_the_scheduler_and_our_kernel_to_the_data_at_the_same_times(pipeline: Any, model: MochiVideoModel) -> None:
    x0, eps = noise(model, SMALL), noise(model, SMALL)
    oracle = Oracle(model.network, x0, eps)
    pipeline.scheduler.set_timesteps(sigmas=linear_quadratic_schedule(8, 0.025))
    x = eps
    for t in pipeline.scheduler.timesteps:
        x = pipeline.scheduler.step(oracle(timestep=t.expand(2))[0], t, x).prev_sample
    assert (x - x0).abs().max() < 1e-5
    ours = rollout(replace(model, network=oracle), ODE(), eps, model.times(8, SMALL), model.encode_text(PROMPTS), noise=torch.Generator(), stochastic=[]).x0
    assert (ours - x0).abs().max() < 1e-5
    told = torch.stack(oracle.told)
    assert torch.allclose(told[:8], told[8:], atol=1e-3) and float(told[0].max()) == 0 and bool((told[1:8] > told[:7]).all())  # of 1000


@pytest.mark.parametrize("clip", [SMALL, LONG], ids=str)
def test_latents_are_decoded_as_the_pipeline_decodes_its_own(pipeline: Any, model: MochiVideoModel, clip: ClipShape) -> None:
    eps = noise(model, clip)
    theirs = sampled(pipeline, eps, clip, output_type="pt")
    with torch.no_grad():
        ours = model.decode(sampled(pipeline, eps, clip))
    assert ours.shape == (2, clip.frames, 3, clip.height, clip.width) and float(ours.std()) > 0.02
    assert (ours - theirs).abs().max() < 1e-5


def test_decode_undoes_the_normalisation_of_encode(model: MochiVideoModel) -> None:
    vae, video = model.vae, torch.rand(2, 7, 3, 32, 48)
    mean, std = (torch.tensor(values).view(1, 12, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad():
        raw = vae.encode(2 * video.transpose(1, 2) - 1).latent_dist.mode()
        x0 = model.encode(video)
        assert x0.shape == (2, *model.latents.shape(SMALL)) and (x0 * std / 0.7 + mean - raw).abs().max() < 1e-5
        assert (x0 - raw).abs().max() > 0.01
        assert (model.decode(x0) - ((vae.decode(raw).sample + 1) / 2).clamp(0, 1).transpose(1, 2)).abs().max() < 1e-5


def test_texts_are_encoded_as_the_pipeline_encodes_them(either: Any) -> None:
    model, prompts = adapter(either), [*PROMPTS, " ".join(["rain"] * 300)]
    with torch.no_grad():
        text, mask, empty, empty_mask = either.encode_prompt(prompts)
    cond, unprompted = model.encode_text(prompts), model.encode_text(["", "", ""])
    assert torch.equal(cond.text, text) and torch.equal(cond.mask, mask) and cond.mask.sum(1).tolist() == [6, 3, 256]
    assert torch.equal(unprompted.text, empty) and torch.equal(unprompted.mask, empty_mask) and bool(unprompted.mask.any()) is not model.zero_empty
    assert not cond.text.requires_grad


def test_an_empty_prompt_beside_others_changes_none_of_them(model: MochiVideoModel) -> None:
    mixed, apart = model.encode_text([PROMPTS[0], "", PROMPTS[1], ""]), model.encode_text(PROMPTS)
    assert torch.allclose(mixed.text[[0, 2]], apart.text, atol=1e-6) and torch.equal(mixed.mask[[0, 2]], apart.mask) and not mixed.mask[[1, 3]].any()


def test_what_stands_behind_the_mask_is_not_read(model: MochiVideoModel) -> None:
    cond, x = model.encode_text(PROMPTS), noise(model, SMALL)

    def changed(where: Tensor) -> Conditioning:
        return replace(cond, text=torch.where(where[:, :, None], torch.randn_like(cond.text), cond.text))

    u = model(x, SOME_TIMES, cond)
    assert torch.equal(model(x, SOME_TIMES, changed(~cond.mask)), u)
    assert (model(x, SOME_TIMES, changed(cond.mask)) - u).abs().amax((1, 2, 3, 4)).min() > 1e-3


def test_a_saved_pipeline_is_read_and_gives_the_same_velocities(model: MochiVideoModel, saved: Path) -> None:
    again, x = load(str(saved), device=CPU, dtype=torch.float32), noise(model, SMALL)
    theirs = again(x, SOME_TIMES, again.encode_text([PROMPTS[0], ""]))
    assert torch.equal(theirs, model(x, SOME_TIMES, model.encode_text([PROMPTS[0], ""]))) and theirs.dtype is torch.float32
    assert torch.equal(again.times(5, LONG), model.times(5, LONG))
    model.vae.requires_grad_(False)  # as in what is read: by that some processors' kernels, and their rounding, are chosen
    assert torch.equal(again.decode(x), model.decode(x))
    assert not any(p.requires_grad for part in (again.network, again.vae, again.text_encoder) for p in part.parameters())


@pytest.mark.parametrize("zero_empty", [True, False])
def test_a_checkpoint_says_what_its_empty_prompt_is(copied: Path, zero_empty: bool) -> None:
    index = json.loads((copied / "model_index.json").read_text())
    (copied / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": zero_empty}))
    assert load(str(copied), device=CPU, dtype=torch.float32).zero_empty is zero_empty


def test_weights_in_half_precision_give_velocities_latents_and_clips_in_float32(saved: Path) -> None:
    model = load(str(saved), device=CPU, dtype=torch.bfloat16).to(CPU)
    x, cond = noise(model, LONG, 1), model.encode_text(PROMPTS[:1])
    video = model.decode(x)
    assert {model(x, SOME_TIMES[:1], cond).dtype, video.dtype, model.encode(video).dtype} == {torch.float32} and cond.text.dtype is torch.bfloat16


@pytest.mark.parametrize("part", ["transformer/", "vae/", "text_encoder/", "tokenizer/", "scheduler/", "model_index.json"])
def test_a_part_that_is_missing_is_named_in_one_line(copied: Path, part: str) -> None:
    shutil.rmtree(copied / part) if part.endswith("/") else (copied / part).unlink()
    with pytest.raises(UserError, match=rf"^[^\n]*{part}[^\n]*$"):
        load(str(copied), device=CPU, dtype=torch.float32)


def test_mochi_is_not_read_as_ltx_nor_another_vae_as_mochis(copied: Path) -> None:
    with pytest.raises(UserError, match=r"^[^\n]*holds a MochiTransformer3DModel, no LTXVideoTransformer3DModel[^\n]*$"):
        ltx.load(str(copied), device=CPU, dtype=torch.float32)
    file = copied / "vae" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "_class_name": "AutoencoderKLWan"}))
    with pytest.raises(UserError, match=r"^[^\n]*holds a AutoencoderKLWan[^\n]*$"):
        load(str(copied), device=CPU, dtype=torch.float32)


def test_pickled_weights_are_refused_in_one_line(copied: Path, model: MochiVideoModel) -> None:
    weights = copied / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save(model.network.state_dict(), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(UserError, match=r"^[^\n]*transformer/[^\n]*safetensors[^\n]*$"):
        load(str(copied), device=CPU, dtype=torch.float32)


def test_lora_trains_its_adapter_and_nothing_else(model: MochiVideoModel) -> None:
    x, cond = noise(model, SMALL), model.encode_text(PROMPTS)
    before = model(x, SOME_TIMES, cond).detach()
    model.network = add_lora(model.network, rank=2, alpha=2, targets=(*LORA_TARGETS, *MLP_TARGETS))
    assert torch.equal(model(x, SOME_TIMES, cond), before)
    trained = {name: p for name, p in model.network.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * ((7 + 4) + (6 + 2)) and all("lora_" in name and "transformer_blocks" in name for name in trained)  # the last block makes no text
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


def test_pixels_have_a_gradient_in_the_latents(model: MochiVideoModel) -> None:
    x0 = noise(model, SMALL).requires_grad_()
    model.decode(x0)[1].sum().backward()
    assert x0.grad is not None and bool(x0.grad[1].abs().amax(0).gt(0).all()) and not x0.grad[0].any()  # every position of its own clip

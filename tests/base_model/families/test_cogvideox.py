"""The adapter of CogVideoX beside diffusers' own pipeline and schedulers, at toy size and random weights: 2B, 5B and 1.5."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from align.kernels import ODE
from align.trajectory import rollout
from base_model.errors import UserError
from base_model.families.cogvideox import LORA_TARGETS, MLP_TARGETS, CogVideoXVideoModel, load
from base_model.guidance import Guided
from base_model.lora import add_lora, reference
from base_model.paths import VariancePreserving
from base_model.types import ClipShape
from tests.base_model.families.tiny_cogvideox import SCHEDULER, Kind, tiny_pipeline

KINDS: tuple[Kind, ...] = ("2b", "5b", "1.5")
PROMPTS = ["a red circle moves slowly over the sea", "blue"]
CPU = torch.device("cpu")


class Saved(NamedTuple):
    pipeline: Any
    folder: Path

    def load(self) -> CogVideoXVideoModel:
        return load(str(self.folder), device=CPU, dtype=torch.float32)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Saved]:
    made = {kind: Saved(tiny_pipeline(kind), tmp_path_factory.mktemp("cogvideox")) for kind in KINDS}
    for pipeline, folder in made.values():
        pipeline.save_pretrained(folder)
    return made


def as_theirs(x: Tensor, kind: Kind) -> Tensor:
    """Our latents [B,C,F,H,W] as the pipeline's [B,F,C,H,W]; written out for 1.5, whose positions are two latent frames."""
    if kind != "1.5":
        return x.permute(0, 2, 1, 3, 4)
    return torch.stack([part for f in range(x.shape[2]) for part in (x[:, :4, f], x[:, 4:, f])], dim=1)


def sampled(model: Any, noise: Tensor, times: Tensor, prompts: list[str] = PROMPTS) -> Tensor:
    return rollout(model, ODE(), noise, times, model.encode_text(prompts), noise=torch.Generator(), stochastic=[]).x0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", [ClipShape(9, 32, 48), ClipShape(17, 48, 16)], ids=str)
@pytest.mark.parametrize(("scale", "joined"), [(1.0, False), (6.0, False), (6.0, True)])
def test_sampling_gives_the_pipelines_latents(saved: dict[Kind, Saved], kind: Kind, clip: ClipShape, scale: float, joined: bool) -> None:
    pipeline, model = saved[kind].pipeline, saved[kind].load()
    noise = torch.randn(2, *model.latents.shape(clip))
    theirs = pipeline(
        PROMPTS,
        height=clip.height,
        width=clip.width,
        num_frames=clip.frames,
        num_inference_steps=4,
        guidance_scale=scale,
        latents=as_theirs(noise, kind),
        max_sequence_length=12,
        output_type="latent",
    ).frames
    ours = sampled(Guided(model, scale, joined=joined), noise, model.times(4, clip))
    assert float((as_theirs(ours, kind) - theirs).abs().max()) < 1e-4 < float(theirs.std())


@pytest.mark.parametrize("kind", KINDS)
def test_an_oracle_recovers_its_clip_through_the_schedulers_step_and_through_our_kernel(saved: dict[Kind, Saved], kind: Kind) -> None:
    model, clip = saved[kind].load(), ClipShape(9, 32, 32)
    x0, eps = torch.randn(2, 2, *model.latents.shape(clip))
    scheduler, config = model.scheduler, model.network.config

    class Oracle(nn.Module):
        dtype = torch.float32

        def __init__(self) -> None:
            super().__init__()
            self.config = config

        def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, image_rotary_emb: Any, return_dict: bool) -> tuple[Tensor]:
            return (scheduler.get_velocity(as_theirs(x0, kind), as_theirs(eps, kind), timestep),)

    cond = model.encode_text(PROMPTS)
    model.network = Oracle()
    scheduler.set_timesteps(5)
    x = as_theirs(eps, kind)
    for step in scheduler.timesteps:
        x = scheduler.step(model.network(x, step, cond.text, None, False)[0], step, x).prev_sample
    assert torch.allclose(x, as_theirs(x0, kind), atol=1e-5)
    ours = rollout(model, ODE(), eps, model.times(5, clip), cond, noise=torch.Generator(), stochastic=[]).x0
    assert torch.allclose(ours, x0, atol=1e-5)
    t = model.angles[[400, 990]]
    assert torch.allclose(model(eps, t, cond), VariancePreserving().velocity(x0, eps, t), atol=1e-6)


@pytest.mark.parametrize("kind", ["2b", "5b"])
def test_the_network_is_told_the_training_step_nearest_to_t(saved: dict[Kind, Saved], kind: Kind) -> None:
    model, told = saved[kind].load(), []
    network = model.network
    network.register_forward_pre_hook(lambda _, args, kwargs: told.append(kwargs["timestep"]), with_kwargs=True)
    angles, cond = model.angles, model.encode_text(["blue"])
    assert len(angles) == 1000 and bool((angles.diff() > 0).all())
    assert angles[-1] == torch.tensor(math.pi / 2) and torch.allclose(torch.cos(angles).square(), model.scheduler.alphas_cumprod.float(), atol=1e-6)
    every = cond.repeat(1000)
    with torch.no_grad():
        for t in (angles, (angles[:-1] + angles.diff() * 0.49), (angles[:-1] + angles.diff() * 0.51)):
            model(torch.zeros(len(t), 4, 1, 2, 2), t, every[: len(t)])
        model(torch.zeros(2, 4, 1, 2, 2), torch.tensor(0.0), every[:2])
    assert [steps.dtype for steps in told] == [torch.long] * 4
    assert torch.equal(told[0], torch.arange(1000)) and torch.equal(told[1], torch.arange(999)) and torch.equal(told[2], torch.arange(1, 1000)) and told[3].tolist() == [0, 0]


def test_the_grid_is_the_samplers_and_a_count_that_is_none_is_refused(saved: dict[Kind, Saved]) -> None:
    model, clip = saved["2b"].load(), ClipShape(9, 32, 32)
    assert torch.equal(model.times(4, clip), torch.tensor([*model.angles[[999, 749, 499, 249]], 0.0]))
    assert len(model.times(1000, clip)) == 1001
    for steps in (0, 1001):
        with pytest.raises(ValueError, match="between 1 and 1000"):
            model.times(steps, clip)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_the_pipelines_and_their_padding_is_heard(saved: dict[Kind, Saved], kind: Kind) -> None:
    pipeline, model = saved[kind].pipeline, saved[kind].load()
    long = "the sea " * 20
    cond, empty = model.encode_text([*PROMPTS, long]), model.encode_text(["", "", ""])
    with torch.no_grad():
        theirs, without = pipeline.encode_prompt([*PROMPTS, long], max_sequence_length=12)
    assert torch.equal(cond.text, theirs) and torch.equal(empty.text, without)
    assert cond.text.shape == (3, 12, 16) and cond.mask.shape == (3, 12) and bool(cond.mask.all()) and cond.pooled is None and not cond.text.requires_grad
    cond = cond[:2]
    other = replace(cond, text=cond.text.clone())
    other.text[1, -1] += 1  # padding behind "blue"
    x, t = torch.randn(2, *model.latents.shape(ClipShape(9, 32, 32))), torch.tensor(1.0)
    with torch.no_grad():
        moved = (model(x, t, cond) - model(x, t, other)).abs().amax((1, 2, 3, 4))
    assert moved[0] == 0 and moved[1] > 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_normalised_as_by_the_pipeline(saved: dict[Kind, Saved], kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, model, clip = saved[kind].pipeline, saved[kind].load(), ClipShape(9, 16, 32)
    x0, video = torch.randn(2, *model.latents.shape(clip)), torch.rand(2, 9, 3, 16, 32)
    latents = as_theirs(x0, kind)[:, 1 if kind == "1.5" else 0 :]
    with torch.no_grad():
        theirs = pipeline.video_processor.postprocess_video(pipeline.decode_latents(latents), output_type="pt")
        assert theirs.shape == (2, 9, 3, 16, 32) and torch.allclose(model.decode(x0), theirs, atol=1e-5)
        found = model.encode(video)
        raw = pipeline.vae.encode(pipeline.video_processor.preprocess_video(list(video)))[0].mode()  # [B,C,F,H,W]
    assert found.shape == x0.shape
    frames = as_theirs(found, kind)
    assert torch.allclose(frames[:, -3:], pipeline.vae.config.scaling_factor * raw.transpose(1, 2), atol=1e-5)
    if kind == "1.5":
        assert torch.equal(frames[:, 0], frames[:, 1])
    given: list[Tensor] = []
    monkeypatch.setattr(model.vae, "decode", lambda z, return_dict: given.append(z) or (torch.zeros(1, 3, 9, 16, 32),))
    model.decode(found)
    assert torch.allclose(torch.cat(given), raw, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_has_a_gradient_in_every_latent_that_is_shown(saved: dict[Kind, Saved], kind: Kind) -> None:
    model, clip = saved[kind].load(), ClipShape(9, 16, 16)
    x0 = torch.randn(1, *model.latents.shape(clip), requires_grad=True)
    model.decode(x0).square().sum().backward()
    assert x0.grad is not None
    moved = as_theirs(x0.grad, kind).abs().amax((0, 3, 4))  # [F,C]
    assert bool((moved[-3:] > 0).all()) and (kind != "1.5" or bool((moved[0] == 0).all()))


def test_latents_follow_the_configuration_and_sizes_off_the_grid_are_refused(saved: dict[Kind, Saved]) -> None:
    for kind in KINDS:
        spec = saved[kind].load().latents
        assert (spec.channels, spec.time_stride, spec.space_stride) == ((8, 8, 8) if kind == "1.5" else (4, 4, 8))
    model = saved["1.5"].load()
    with pytest.raises(ValueError, match="multiple of 8"):
        model.latents.shape(ClipShape(13, 32, 32))
    cond = model.encode_text(["blue"])
    assert model(torch.randn(1, 8, 1, 6, 8), torch.tensor(1.0), cond).shape == (1, 8, 1, 6, 8)
    with pytest.raises(UserError, match="larger than the 6x8"):
        model(torch.randn(1, 8, 1, 8, 8), torch.tensor(1.0), cond)
    model = saved["2b"].load()
    with pytest.raises(UserError, match="patches of 2"):
        model(torch.randn(1, 4, 1, 3, 4), torch.tensor(1.0), model.encode_text(["blue"]))


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_train_alone_and_switch_off(saved: dict[Kind, Saved], kind: Kind) -> None:
    model = saved[kind].load()
    x, t, cond = torch.randn(2, *model.latents.shape(ClipShape(9, 32, 32))), torch.tensor([0.4, 1.2]), model.encode_text(PROMPTS)
    with torch.no_grad():
        before = model(x, t, cond)
    network = add_lora(model.network, rank=2, alpha=2, targets=LORA_TARGETS + MLP_TARGETS)
    model.network = network
    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * (len(LORA_TARGETS) + len(MLP_TARGETS)) and all("lora_" in name for name in trained)  # A and B of each in both layers
    optimizer = torch.optim.SGD(trained.values(), lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(x, t, cond).square().mean().backward()
        optimizer.step()
    assert all(parameter.grad is not None and float(parameter.grad.abs().max()) > 0 for parameter in trained.values())
    with torch.no_grad():
        assert not torch.allclose(model(x, t, cond), before, atol=1e-5)
        with reference(network):
            assert torch.equal(model(x, t, cond), before)
    assert model.latents == saved[kind].load().latents


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_pipeline_is_loaded_frozen_with_the_same_velocities(saved: dict[Kind, Saved], kind: Kind) -> None:
    pipeline, model = saved[kind].pipeline, saved[kind].load()
    whole = CogVideoXVideoModel(pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, pipeline.scheduler)
    x, t = torch.randn(2, *model.latents.shape(ClipShape(9, 32, 32))), torch.tensor([0.4, 1.2])
    with torch.no_grad():
        u = model(x, t, model.encode_text(PROMPTS))
        assert torch.equal(u, whole(x, t, whole.encode_text(PROMPTS)))
    parts = (model.network, model.vae, model.text_encoder)
    assert not any(parameter.requires_grad for part in parts for parameter in part.parameters()) and not any(part.training for part in parts)
    assert u.dtype is torch.float32 and model.device == CPU and model.to(CPU) is model


def test_velocities_of_half_precision_weights_are_float32(saved: dict[Kind, Saved]) -> None:
    model = load(str(saved["5b"].folder), device=CPU, dtype=torch.bfloat16)
    assert model.network.dtype is torch.bfloat16
    with torch.no_grad():
        u = model(torch.randn(1, *model.latents.shape(ClipShape(9, 32, 32))), torch.tensor(0.4), model.encode_text(["blue"]))
    assert u.dtype is torch.float32


def test_the_scheduler_of_5b_is_read_too(saved: dict[Kind, Saved], tmp_path: Path) -> None:
    from diffusers import CogVideoXDPMScheduler

    folder = Path(shutil.copytree(saved["5b"].folder, tmp_path / "copy"))
    CogVideoXDPMScheduler(**SCHEDULER, snr_shift_scale=1.0).save_pretrained(folder / "scheduler")
    read = load(str(folder), device=CPU, dtype=torch.float32)
    assert torch.equal(read.times(7, ClipShape(9, 32, 32)), saved["5b"].load().times(7, ClipShape(9, 32, 32)))


def refusal(folder: Path) -> str:
    """The line that `load` says of a folder."""
    with pytest.raises(UserError) as told:
        load(str(folder), device=CPU, dtype=torch.float32)
    assert "\n" not in str(told.value)
    return str(told.value)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_part_that_is_missing_is_named(saved: dict[Kind, Saved], part: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved["2b"].folder, tmp_path / "copy"))
    shutil.rmtree(folder / part)
    assert f"holds no {part}/" in refusal(folder)


def test_what_is_no_cogvideox_is_refused(saved: dict[Kind, Saved], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved["2b"].folder, tmp_path / "copy"))

    def told(file: Path, **changed: Any) -> str:
        before = file.read_text()
        file.write_text(json.dumps({**json.loads(before), **changed}))
        line = refusal(folder)
        file.write_text(before)
        return line

    assert "LTXVideoTransformer3DModel" in told(folder / "transformer" / "config.json", _class_name="LTXVideoTransformer3DModel")
    assert "UMT5EncoderModel" in told(folder / "text_encoder" / "config.json", architectures=["UMT5EncoderModel"])
    assert "epsilon" in told(folder / "scheduler" / "scheduler_config.json", prediction_type="epsilon")


def test_a_model_of_images_to_video_is_refused(saved: dict[Kind, Saved], tmp_path: Path) -> None:
    from diffusers import CogVideoXTransformer3DModel

    folder = Path(shutil.copytree(saved["2b"].folder, tmp_path / "copy"))
    CogVideoXTransformer3DModel.from_config({**saved["2b"].pipeline.transformer.config, "in_channels": 8}).save_pretrained(folder / "transformer")
    assert "images to video" in refusal(folder)


@pytest.mark.parametrize(("part", "name"), [("transformer", "diffusion_pytorch_model"), ("text_encoder", "pytorch_model")])
def test_pickled_weights_are_not_opened(saved: dict[Kind, Saved], part: str, name: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved["2b"].folder, tmp_path / "copy"))
    (weights,) = (folder / part).glob("*.safetensors")
    weights.rename(weights.with_name(f"{name}.bin"))
    assert "safetensors" in refusal(folder)

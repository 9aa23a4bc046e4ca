"""The adapter of HunyuanVideo beside diffusers' own pipeline and scheduler, at toy size and random weights, distilled and not."""

from __future__ import annotations

import json
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
from base_model.families.hunyuan_video import LORA_TARGETS, MLP_TARGETS, HunyuanVideoModel, load
from base_model.guidance import Guided
from base_model.lora import add_lora, reference
from base_model.paths import RectifiedFlow
from base_model.times import sampling_times
from base_model.types import ClipShape
from tests.base_model.families.tiny_hunyuan_video import before_the_prompt, tiny_pipeline

PROMPTS = ["a red circle moves slowly over the sea", "blue"]
CPU, CLIP = torch.device("cpu"), ClipShape(9, 32, 48)


class Saved(NamedTuple):
    pipeline: Any
    folder: Path

    def load(self, dtype: torch.dtype = torch.float32) -> HunyuanVideoModel:
        return load(str(self.folder), device=CPU, dtype=dtype)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Saved]:
    """By whether it is distilled."""
    made = {distilled: Saved(tiny_pipeline(distilled=distilled), tmp_path_factory.mktemp("hunyuan_video")) for distilled in (True, False)}
    for pipeline, folder in made.values():
        pipeline.save_pretrained(folder)
    return made


@pytest.mark.parametrize("clip", [CLIP, ClipShape(5, 48, 16)], ids=str)
@pytest.mark.parametrize(
    ("distilled", "guidance", "scale", "joined"),
    [(True, 6.0, 1.0, False), (True, 1.0, 1.0, False), (True, 6.0, 4.0, False), (False, 6.0, 1.0, False), (False, 6.0, 4.0, False), (False, 6.0, 4.0, True)],
)
def test_sampling_gives_the_pipelines_latents(saved: dict[bool, Saved], clip: ClipShape, distilled: bool, guidance: float, scale: float, joined: bool) -> None:
    pipeline, model = saved[distilled].pipeline, replace(saved[distilled].load(), guidance=guidance)
    noise = torch.randn(2, *model.latents.shape(clip))
    theirs = pipeline(
        PROMPTS,
        negative_prompt=["", ""],
        height=clip.height,
        width=clip.width,
        num_frames=clip.frames,
        num_inference_steps=4,
        guidance_scale=guidance,
        true_cfg_scale=scale,
        latents=noise,
        output_type="latent",
    ).frames
    guided = Guided(model, scale, joined=joined)
    ours = rollout(guided, ODE(), noise, model.times(4, clip), guided.encode_text(PROMPTS), noise=torch.Generator(), stochastic=[]).x0
    assert float((ours - theirs).abs().max()) < 1e-4 < float(theirs.std())


def test_only_a_distilled_network_hears_the_guidance(saved: dict[bool, Saved]) -> None:
    for distilled in (True, False):
        model = saved[distilled].load()
        x, t, cond = torch.randn(2, *model.latents.shape(CLIP)), torch.tensor([0.9, 0.3]), model.encode_text(PROMPTS)
        with torch.no_grad():
            moved = (model(x, t, cond) - replace(model, guidance=1.0)(x, t, cond)).abs().amax((1, 2, 3, 4))
        assert bool((moved > 1e-5).all() if distilled else (moved == 0).all())


def test_an_oracle_recovers_its_clip_through_the_schedulers_step_and_through_our_kernel(saved: dict[bool, Saved]) -> None:
    model = saved[True].load()
    x0, eps = torch.randn(2, 2, *model.latents.shape(CLIP))
    scheduler, config = model.scheduler, model.network.config

    class Oracle(nn.Module):
        """Whose clip is x0: it reads the noise off what it is shown and the time it is told, of 1000."""

        dtype = torch.float32

        def __init__(self) -> None:
            super().__init__()
            self.config = config

        def forward(self, hidden_states: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
            return ((hidden_states - x0) / (timestep.reshape(-1, 1, 1, 1, 1) / 1000),)

    cond = model.encode_text(PROMPTS)
    model.network = Oracle()
    scheduler.set_timesteps(5)
    first, x = scheduler.timesteps[:1], eps
    for step in scheduler.timesteps:
        x = scheduler.step(model.network(x, step)[0], step, x).prev_sample
    assert torch.allclose(x, x0, atol=1e-5)
    noisy = scheduler.scale_noise(x0, first * 0 + scheduler.timesteps[2], eps)  # x_t as the scheduler makes it
    assert torch.allclose(model(noisy, scheduler.sigmas[2], cond), RectifiedFlow().velocity(x0, eps, scheduler.sigmas[2]), atol=1e-5)
    ours = rollout(model, ODE(), eps, model.times(5, CLIP), cond, noise=torch.Generator(), stochastic=[]).x0
    assert torch.allclose(ours, x0, atol=1e-5)


def test_the_grid_is_uniform_and_shifted_as_the_scheduler_says(saved: dict[bool, Saved]) -> None:
    model = saved[True].load()
    for steps in (1, 4, 50):
        assert torch.allclose(model.times(steps, CLIP), sampling_times(model.path, steps, shift=7.0), atol=1e-6) and model.times(steps, CLIP)[-1] == 0
    with pytest.raises(ValueError, match="positive"):
        model.times(0, CLIP)


def test_texts_are_the_pipelines_without_the_template(saved: dict[bool, Saved]) -> None:
    pipeline, model = saved[True].pipeline, saved[True].load()
    prompts = [*PROMPTS, "", "the sea " * 300]
    cond = model.encode_text(prompts)
    with torch.no_grad():
        text, pooled, mask = pipeline.encode_prompt(prompts)
    assert cond.pooled is not None and cond.pooled.shape == (4, 8) and not cond.text.requires_grad
    assert torch.equal(cond.text, text) and torch.equal(cond.pooled, pooled) and torch.equal(cond.mask, mask.bool())
    ids = model.tokenizer([before_the_prompt(), before_the_prompt() + "blue<|eot_id|>"]).input_ids
    assert cond.text.shape == (4, 256, 16) and len(ids[0]) == 95  # what is dropped is the template, whole and alone
    assert cond.mask.sum(1).tolist()[1:] == [len(ids[1]) - 95, 1, 256]  # an empty prompt leaves <|eot_id|>


def test_the_words_of_llama_3_are_read_as_they_were_saved(saved: dict[bool, Saved]) -> None:
    pipeline, model = saved[True].pipeline, saved[True].load()
    assert model.tokenizer("The main objects\n\nof the video").input_ids == pipeline.tokenizer("The main objects\n\nof the video").input_ids
    model.tokenizer.padding_side = "left"
    assert torch.equal(model.encode_text(PROMPTS).mask, saved[True].load().encode_text(PROMPTS).mask)


@pytest.mark.parametrize("distilled", [True, False])
def test_what_stands_behind_the_mask_changes_nothing(saved: dict[bool, Saved], distilled: bool) -> None:
    model = saved[distilled].load()
    x, t, cond = torch.randn(2, *model.latents.shape(CLIP)), torch.tensor([0.9, 0.3]), model.encode_text(PROMPTS)
    noise = torch.randn(cond.text.shape)
    behind, before = (replace(cond, text=torch.where(mask[..., None], noise, cond.text)) for mask in (~cond.mask, cond.mask))
    with torch.no_grad():
        u = model(x, t, cond)
        assert torch.equal(model(x, t, behind), u)
        assert bool(((model(x, t, before) - u).abs().amax((1, 2, 3, 4)) > 1e-5).all())
        assert cond.pooled is not None
        assert bool(((model(x, t, replace(cond, pooled=cond.pooled.flip(0))) - u).abs().amax((1, 2, 3, 4)) > 1e-5).all())
    with pytest.raises(UserError, match="pooled"):
        model(x, t, replace(cond, pooled=None))


def test_latents_are_normalised_as_by_the_pipeline(saved: dict[bool, Saved], monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, model = saved[True].pipeline, saved[True].load()
    x0, video = torch.randn(2, *model.latents.shape(CLIP)), torch.rand(2, 9, 3, 32, 48)
    assert (model.latents.channels, model.latents.time_stride, model.latents.space_stride) == (4, 4, 8)

    def kept(*_: Any) -> dict[str, Tensor]:
        return {"latents": x0}

    theirs = pipeline(PROMPTS, height=32, width=48, num_frames=9, num_inference_steps=1, callback_on_step_end=kept, output_type="pt").frames  # its decode of x0
    with torch.no_grad():
        assert theirs.shape == video.shape and torch.allclose(model.decode(x0), theirs, atol=1e-5)
        found = model.encode(video)
        raw = pipeline.vae.encode(pipeline.video_processor.preprocess_video(list(video)))[0].mode()
    assert found.shape == x0.shape and torch.allclose(found, pipeline.vae.config.scaling_factor * raw, atol=1e-5)
    given: list[Tensor] = []
    monkeypatch.setattr(model.vae, "decode", lambda z, return_dict: given.append(z) or (torch.zeros(1, 3, 9, 32, 48),))
    model.decode(found)
    assert torch.allclose(torch.cat(given), raw, atol=1e-6)


def test_decoding_has_a_gradient_in_every_latent(saved: dict[bool, Saved]) -> None:
    model = saved[True].load()
    x0 = torch.randn(1, *model.latents.shape(ClipShape(9, 16, 16)), requires_grad=True)
    model.decode(x0).square().sum().backward()
    assert x0.grad is not None and bool((x0.grad.abs().amax((0, 3, 4)) > 0).all())


@pytest.mark.parametrize("distilled", [True, False])
def test_adapters_train_alone_and_switch_off(saved: dict[bool, Saved], distilled: bool) -> None:
    model = saved[distilled].load()
    x, t, cond = torch.randn(2, *model.latents.shape(CLIP)), torch.tensor([0.9, 0.3]), model.encode_text(PROMPTS)
    with torch.no_grad():
        before = model(x, t, cond)
    network = add_lora(model.network, rank=2, alpha=2, targets=LORA_TARGETS + MLP_TARGETS)
    model.network = network
    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    for target in LORA_TARGETS + MLP_TARGETS:
        assert any(f".{target}.lora_A" in name for name in trained), target
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


@pytest.mark.parametrize("distilled", [True, False])
def test_a_saved_pipeline_is_loaded_frozen_with_the_same_velocities(saved: dict[bool, Saved], distilled: bool) -> None:
    p, model = saved[distilled].pipeline, saved[distilled].load()
    whole = HunyuanVideoModel(p.transformer, p.vae, p.text_encoder, p.tokenizer, p.text_encoder_2, p.tokenizer_2, p.scheduler)
    x, t = torch.randn(2, *model.latents.shape(CLIP)), torch.tensor([0.9, 0.3])
    with torch.no_grad():
        u = model(x, t, model.encode_text(PROMPTS))
        assert torch.equal(u, whole(x, t, whole.encode_text(PROMPTS)))
    parts = (model.network, model.vae, model.text_encoder, model.pooled_encoder)
    assert not any(parameter.requires_grad for part in parts for parameter in part.parameters()) and not any(part.training for part in parts)
    assert u.dtype is torch.float32 and model.device == CPU and model.to(CPU) is model


def test_velocities_of_half_precision_weights_are_float32(saved: dict[bool, Saved]) -> None:
    model = saved[True].load(torch.bfloat16)
    assert model.network.dtype is torch.bfloat16
    with torch.no_grad():
        u = model(torch.randn(1, *model.latents.shape(CLIP)), torch.tensor(0.4), model.encode_text(["blue"]))
    assert u.dtype is torch.float32


def test_sizes_of_half_a_patch_are_refused(saved: dict[bool, Saved]) -> None:
    model = saved[True].load()
    with pytest.raises(UserError, match="patches of 2"):
        model(torch.randn(1, 4, 1, 3, 4), torch.tensor(1.0), model.encode_text(["blue"]))


def refusal(folder: Path) -> str:
    """The line that `load` says of a folder."""
    with pytest.raises(UserError) as told:
        load(str(folder), device=CPU, dtype=torch.float32)
    assert "\n" not in str(told.value)
    return str(told.value)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler"])
def test_a_part_that_is_missing_is_named(saved: dict[bool, Saved], part: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved[True].folder, tmp_path / "copy"))
    shutil.rmtree(folder / part)
    assert f"holds no {part}/" in refusal(folder)


def test_what_is_no_hunyuan_video_of_text_to_video_is_refused(saved: dict[bool, Saved], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved[True].folder, tmp_path / "copy"))

    def told(file: Path, **changed: Any) -> str:
        before = file.read_text()
        file.write_text(json.dumps({**json.loads(before), **changed}))
        line = refusal(folder)
        file.write_text(before)
        return line

    assert "CogVideoXTransformer3DModel" in told(folder / "transformer" / "config.json", _class_name="CogVideoXTransformer3DModel")
    assert "T5EncoderModel" in told(folder / "text_encoder" / "config.json", architectures=["T5EncoderModel"])
    assert "images to video" in told(folder / "transformer" / "config.json", image_condition_type="token_replace")


@pytest.mark.parametrize(("part", "name"), [("transformer", "diffusion_pytorch_model"), ("text_encoder", "pytorch_model"), ("text_encoder_2", "pytorch_model")])
def test_pickled_weights_are_not_opened(saved: dict[bool, Saved], part: str, name: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved[True].folder, tmp_path / "copy"))
    (weights,) = (folder / part).glob("*.safetensors")
    weights.rename(weights.with_name(f"{name}.bin"))
    assert "safetensors" in refusal(folder)

"""Clips from an image: Wan 2.1 and A14B image to video, and TI2V 5B with and without one, beside diffusers' pipelines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from align.kernels import ODE
from align.trajectory import rollout
from base_model.errors import UserError
from base_model.families.loading import load_family
from base_model.families.wan import LORA_TARGETS, WanVideoModel
from base_model.families.wan_image import WanImageVideoModel
from base_model.guidance import Guided
from base_model.lora import add_lora
from base_model.prompts.conditions import Canvas, blank, give_frames
from base_model.types import ClipShape, Conditioning
from tests.base_model.families import tiny_wan
from tests.base_model.families.test_wan import CPU, PROMPTS, noise, ours, theirs

CLIPS = [ClipShape(5, 32, 64), ClipShape(9, 64, 32)]
PIPELINES: dict[str, Callable[[], Any]] = {"2.1": tiny_wan.image_to_video, "2.2 A14B": tiny_wan.image_a14b, "2.2 TI2V": lambda: tiny_wan.ti2v(image=True)}


class World:
    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.pipeline, self.folder = name, PIPELINES[name](), folder
        self.pipeline.save_pretrained(folder)

    def model(self) -> WanVideoModel:
        found: WanVideoModel = load_family(str(self.folder), device=CPU, dtype=torch.float32)
        assert isinstance(found, WanImageVideoModel) == (self.name != "2.2 TI2V")
        return found

    def sample(self, model: WanVideoModel, x: Tensor, clip: ClipShape, scale: float) -> Tensor:
        """Texts are given as states: without ftfy this pipeline of diffusers encodes none."""
        cond, empty = model.encode_text(PROMPTS), model.encode_text([""] * 2)
        size = {"height": clip.height, "width": clip.width, "num_frames": clip.frames}
        texts = {"prompt_embeds": cond.text, "negative_prompt_embeds": empty.text}
        found: Tensor = self.pipeline(picture(clip), **texts, **size, num_inference_steps=4, guidance_scale=scale, latents=x, output_type="latent").frames
        return found


def picture(clip: ClipShape) -> Image.Image:
    return Image.fromarray(np.random.default_rng(clip.width).integers(0, 256, (clip.height, clip.width, 3), dtype=np.uint8))


def canvas(clip: ClipShape) -> Canvas:
    return give_frames(clip, {0: torch.from_numpy(np.array(picture(clip))).permute(2, 0, 1)[None] / 255})


def told(model: WanVideoModel, clip: ClipShape) -> Conditioning:
    return model.with_canvases(model.encode_text(PROMPTS), [canvas(clip)] * 2)


@pytest.fixture(scope="module", params=PIPELINES)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(request.param, tmp_path_factory.mktemp("wan"))


@pytest.mark.parametrize("clip", CLIPS, ids=str)
@pytest.mark.parametrize(("scale", "joined"), [(1.0, False), (5.0, False), (5.0, True)])
def test_a_rollout_from_an_image_ends_in_the_latents_of_the_pipeline(world: World, clip: ClipShape, scale: float, joined: bool) -> None:
    model = world.model()
    x, cond = noise(model, clip), told(model, clip)
    found = rollout(Guided(model, scale, joined=joined), ODE(), x, model.times(4, clip), cond, noise=torch.Generator()).x0
    wanted = world.sample(model, x, clip, scale)
    assert (found - wanted).abs().max() < 1e-4 and (wanted - x).abs().mean() > 0.5


def test_another_image_makes_another_clip(world: World) -> None:
    model, clip = world.model(), CLIPS[0]
    x, t, cond = noise(model, clip), torch.tensor([0.3, 0.8]), told(model, clip)
    other = model.with_canvases(model.encode_text(PROMPTS), [canvas(clip), give_frames(clip, {0: torch.zeros(1, 3, clip.height, clip.width)})])
    later = (model(x, t, cond) - model(x, t, other))[:, :, 1:].abs().amax((1, 2, 3, 4))
    assert later[0] < 1e-5 and later[1] > 1e-2


def test_an_adapter_trains_on_clips_from_an_image(world: World) -> None:
    model, clip = world.model(), CLIPS[0]
    model.network = add_lora(model.network, rank=2, alpha=2, targets=LORA_TARGETS)
    x, t, cond = noise(model, clip), torch.tensor([0.95, 0.4]), told(model, clip)
    trained = {name: p for name, p in model.network.named_parameters() if p.requires_grad}
    assert any("add_k_proj" in name for name in trained) == (world.name == "2.1")
    with torch.no_grad():
        for parameter in trained.values():
            parameter.normal_(std=0.1)
    model(x, t, cond).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in trained.values())


def test_the_image_encoder_is_called_as_the_pipeline_calls_it() -> None:
    pipeline, clip = tiny_wan.image_to_video(), CLIPS[0]
    from base_model.families.wan_image import ImageStates

    frame = canvas(clip).video[0]
    states = ImageStates(pipeline.image_processor, pipeline.image_encoder)(torch.stack([frame, 1 - frame]))
    assert torch.allclose(states[:1], pipeline.encode_image(picture(clip), CPU), atol=1e-5) and states.shape == (2, 5, 16)


def test_an_image_to_video_model_asks_for_an_image_and_for_whole_frames(tmp_path: Path) -> None:
    model, clip = World("2.1", tmp_path).model(), CLIPS[0]
    x, t, cond = noise(model, clip), torch.tensor([0.3, 0.8]), model.encode_text(PROMPTS)
    assert isinstance(model, WanImageVideoModel)
    for missing in (cond, replace(told(model, clip), image=None)):
        with pytest.raises(UserError, match="makes clips from an image, and none is told"):
            model(x, t, missing)
    first = canvas(clip)
    hole, tail = first.given.clone(), first.given.clone()
    hole[0, :16, :16] = False
    tail[-1] = True
    for given in (blank(clip).given, hole, tail):
        with pytest.raises(UserError, match="Give the whole first frame"):
            model.with_canvases(cond[:1], [Canvas(first.video, given)])
    video = torch.rand(5, 3, 32, 64)
    known = model.with_canvases(cond[:1], [Canvas(video, torch.ones(5, 32, 64, dtype=torch.bool))]).known
    assert known is not None and known.mask.all() and torch.allclose(known.values, model.encode(video[None]), atol=1e-5)


def test_ti2v_makes_clips_from_text_alone_as_its_pipeline_does(tmp_path: Path) -> None:
    pipeline, clip = tiny_wan.ti2v(image=False), CLIPS[1]
    pipeline.save_pretrained(tmp_path)
    model: WanVideoModel = load_family(str(tmp_path), device=CPU, dtype=torch.float32)
    assert model.latents.shape(clip) == (48, 3, 4, 2)
    x = noise(model, clip)
    for scale in (1.0, 5.0):
        assert (ours(Guided(model, scale), model.times(4, clip), x) - theirs(pipeline, x, clip, scale)).abs().max() < 1e-4
    with torch.no_grad():
        video = model.decode(theirs(pipeline, x, clip, 1.0))
    assert (video - theirs(pipeline, x, clip, 1.0, output_type="pt")).abs().max() < 1e-5


def test_ti2v_keeps_what_it_is_given_and_tells_its_tokens_time_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, clip = World("2.2 TI2V", tmp_path).model(), CLIPS[1]
    x, cond = noise(model, clip), told(model, clip)
    assert cond.known is not None and cond.image is None
    assert torch.allclose(cond.known.values[:, :, :1], model.encode(canvas(clip).video[None, :1]), atol=1e-5)  # no latent sees a later frame
    end = rollout(model, ODE(), x, model.times(4, clip), cond, noise=torch.Generator()).x0
    assert torch.allclose(end[:, :, 0], cond.known.values[:, :, 0], atol=1e-5)

    heard: list[Tensor] = []
    forward = model.network.forward
    monkeypatch.setattr(model.network, "forward", lambda **said: heard.append(said["timestep"]) or forward(**said))
    model(x, torch.tensor([0.5, 0.25]), cond)
    assert heard[0].reshape(2, 3, -1)[:, :, 0].tolist() == [[0, 500, 500], [0, 250, 250]] and heard[0].shape == (2, 6)


def test_image_states_follow_the_rows_of_their_texts() -> None:
    one = Conditioning(("a", "b"), torch.randn(2, 4, 3), torch.ones(2, 4, dtype=torch.bool), image=torch.arange(6.0).reshape(2, 3, 1))
    assert one.repeat(2).image[:, 0, 0].tolist() == [0, 0, 3, 3] and one[[1]].image[0, 0, 0] == 3  # type: ignore[index]
    assert one.followed_by(one[:1]).image.shape == (3, 3, 1) and one.to(CPU).image is not None  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="cannot be one batch"):
        one.followed_by(replace(one, image=None))


def test_another_wan_is_refused_by_its_channels(tmp_path: Path) -> None:
    pipeline = tiny_wan.text_to_video()
    pipeline.transformer = tiny_wan.transformer(in_channels=32)
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="takes 32 channels where 16 or, from an image, 36 are known"):
        load_family(str(tmp_path), device=CPU, dtype=torch.float32)

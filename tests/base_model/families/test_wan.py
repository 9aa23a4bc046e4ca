"""The adapter of Wan beside diffusers' own pipelines, at toy size and random weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from align.kernels import ODE
from align.trajectory import rollout
from base_model.errors import UserError
from base_model.families.wan import LORA_TARGETS, MLP_TARGETS, WanVideoModel, load
from base_model.families.wan_random import random_transformer, random_vae
from base_model.guidance import Guided
from base_model.lora import add_lora, reference
from base_model.types import ClipShape, Conditioning, VideoModel
from tests.base_model.families import tiny_wan

CPU = torch.device("cpu")
PROMPTS = ["a red ball", "A blue &amp; cube  rolls to the left slowly"]
CLIPS = [ClipShape(9, 32, 48), ClipShape(5, 64, 32)]


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return tiny_wan.text_to_video()


@pytest.fixture(scope="module")
def folder(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("wan")
    pipeline.save_pretrained(place)
    return place


@pytest.fixture
def model(folder: Path) -> WanVideoModel:
    return load(str(folder), device=CPU, dtype=torch.float32)


def noise(model: VideoModel, clip: ClipShape, number: int = 2) -> Tensor:
    return torch.randn(number, *model.latents.shape(clip), generator=torch.Generator().manual_seed(clip.width))


def theirs(pipeline: Any, x: Tensor, clip: ClipShape, scale: float, **how: Any) -> Tensor:
    size = {"height": clip.height, "width": clip.width, "num_frames": clip.frames}
    found: Tensor = pipeline(prompt=PROMPTS, **size, num_inference_steps=4, guidance_scale=scale, latents=x, **{"output_type": "latent", **how}).frames
    return found


def ours(model: VideoModel, times: Tensor, x: Tensor) -> Tensor:
    return rollout(model, ODE(), x, times, model.encode_text(PROMPTS), noise=torch.Generator()).x0


@pytest.mark.parametrize("clip", CLIPS, ids=str)
@pytest.mark.parametrize(("scale", "joined"), [(1.0, False), (5.0, False), (5.0, True)])
def test_a_rollout_ends_in_the_latents_of_the_pipeline(pipeline: Any, model: WanVideoModel, clip: ClipShape, scale: float, joined: bool) -> None:
    x = noise(model, clip)
    found, wanted = ours(Guided(model, scale, joined=joined), model.times(4, clip), x), theirs(pipeline, x, clip, scale)
    assert (found - wanted).abs().max() < 1e-4 and (wanted - x).abs().mean() > 0.5
    assert scale == 1 or (found - ours(model, model.times(4, clip), x)).abs().max() > 0.01


def test_the_network_is_told_a_thousand_t(model: WanVideoModel) -> None:
    cond, x, t = model.encode_text(PROMPTS), noise(model, CLIPS[0]), torch.tensor([0.25, 0.9])
    wanted = model.network(hidden_states=x, timestep=torch.tensor([250.0, 900.0]), encoder_hidden_states=cond.text).sample
    assert torch.equal(model(x, t, cond), wanted) and torch.equal(model(x, t[:1], cond)[0], model(x, t[:1].expand(2), cond)[0])


@pytest.mark.parametrize("scheduler", ["euler", "unipc"])
def test_an_oracle_recovers_the_data_through_the_scheduler_and_through_our_kernel(scheduler: str) -> None:
    x0, eps = torch.randn(2, 2, 16, 2, 4, 4)

    def oracle(**told: Any) -> tuple[Tensor]:
        return ((eps - x0).expand_as(told["hidden_states"]),)

    network: Any = oracle
    network.dtype, network.config = torch.float32, SimpleNamespace(patch_size=(1, 2, 2))
    model = WanVideoModel(network, scheduler=tiny_wan.euler() if scheduler == "euler" else tiny_wan.unipc())
    cond = Conditioning(("a", "b"), torch.randn(2, 4, 16), torch.ones(2, 4, dtype=torch.bool))
    times = model.times(8, CLIPS[0])
    assert times[0] == 1 and times[-1] == 0 and times.shape == (9,)
    assert (rollout(model, ODE(), eps, times, cond, noise=torch.Generator()).x0 - x0).abs().max() < 1e-5

    x = eps
    model.scheduler.set_timesteps(8)
    for t in model.scheduler.timesteps:
        x = model.scheduler.step(oracle(hidden_states=x)[0], t, x).prev_sample
    assert (x - x0).abs().max() < 1e-5


@pytest.mark.parametrize("shift", [3.0, 5.0])
def test_the_grid_is_the_schedulers(shift: float) -> None:
    for scheduler in (tiny_wan.euler(shift), tiny_wan.unipc(shift)):
        times = WanVideoModel(None, scheduler=scheduler).times(10, CLIPS[0])
        scheduler.set_timesteps(10)
        assert torch.allclose(times, scheduler.sigmas, atol=2e-6) and bool((times.diff() < 0).all())
        assert torch.allclose(1000 * times[:-1], scheduler.timesteps.float(), atol=1)  # UniPC tells the network whole numbers


def test_a_grid_is_not_changed_by_another_and_changes_no_other(model: WanVideoModel) -> None:
    model.scheduler.set_timesteps(7)
    assert len(model.times(3, CLIPS[0])) == 4 and len(model.scheduler.timesteps) == 7


def test_decoding_is_the_pipelines(pipeline: Any, model: WanVideoModel) -> None:
    x = noise(model, CLIPS[0])
    wanted = theirs(pipeline, x, CLIPS[0], 1.0, output_type="pt")
    with torch.no_grad():
        found = model.decode(theirs(pipeline, x, CLIPS[0], 1.0))
    assert wanted.shape == (2, 9, 3, 32, 48) and (found - wanted).abs().max() < 1e-5 and wanted.std() > 0.01


def test_encoding_is_normalised_as_the_config_says_and_decoding_undoes_it(model: WanVideoModel) -> None:
    video = torch.rand(2, 5, 3, 16, 16)
    with torch.no_grad():
        raw = model.vae.encode(2 * video.transpose(1, 2) - 1).latent_dist.mode()
        x0 = model.encode(video)
    config = model.vae.config
    for channel, (mean, std) in enumerate(zip(config.latents_mean, config.latents_std, strict=True)):
        assert torch.allclose(x0[:, channel], (raw[:, channel] - mean) / std, atol=1e-6)
    assert x0.shape == (2, *model.latents.shape(ClipShape(5, 16, 16)))

    seen: list[Tensor] = []
    model.vae = SimpleNamespace(config=config, dtype=torch.float32, decode=lambda z, return_dict: seen.append(z) or (torch.zeros(1, 3, 5, 16, 16),))
    assert model.decode(x0).shape == video.shape and torch.allclose(torch.cat(seen), raw, atol=1e-6)


def test_texts_are_the_pipelines_and_what_stands_behind_them_changes_nothing(pipeline: Any, model: WanVideoModel) -> None:
    cond = model.encode_text([*PROMPTS, ""])
    wanted, _ = pipeline.encode_prompt([*PROMPTS, ""], do_classifier_free_guidance=False, max_sequence_length=512)
    assert torch.allclose(cond.text, wanted, atol=1e-5) and cond.mask.sum(1).tolist() == [4, 12, 1]
    assert torch.equal(cond.text[0, :3], model.encode_text(["a   red ball "]).text[0, :3])

    x, t = noise(model, CLIPS[1], 3), torch.tensor([0.3, 0.6, 0.9])
    other = Conditioning(cond.prompts, cond.text.where(cond.mask[..., None], 7.0), cond.mask)
    assert torch.equal(model(x, t, cond), model(x, t, other))
    moved = Conditioning(cond.prompts, cond.text + 1, cond.mask)
    assert (model(x, t, cond) - model(x, t, moved)).abs().max() > 1e-2


def test_a_saved_pipeline_comes_back_with_the_same_velocities(pipeline: Any, model: WanVideoModel) -> None:
    direct = WanVideoModel(pipeline.transformer, pipeline.vae, scheduler=pipeline.scheduler)
    x, t, cond = noise(model, CLIPS[0]), torch.tensor([0.2, 0.7]), model.encode_text(PROMPTS)
    assert torch.equal(model(x, t, cond), direct(x, t, cond))
    assert not any(p.requires_grad for part in (model.network, model.vae, model.encoder) for p in part.parameters()) and model.device == CPU  # type: ignore[union-attr]
    assert model.to(CPU) is model


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part_is_said_in_one_line(folder: Path, tmp_path: Path, part: str) -> None:
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    shutil.rmtree(broken / part)
    with pytest.raises(UserError, match=rf"holds no {part}/"):
        load(str(broken), device=CPU, dtype=torch.float32)


def test_a_pickled_checkpoint_another_family_and_an_unknown_sampler_are_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    def refused(change: Any, match: str) -> None:
        shutil.rmtree(tmp_path / "broken", ignore_errors=True)
        broken = Path(shutil.copytree(folder, tmp_path / "broken"))
        change(broken)
        with pytest.raises(UserError, match=match) as raised:
            load(str(broken), device=CPU, dtype=torch.float32)
        assert "\n" not in str(raised.value)

    def pickle(place: Path) -> None:
        (place / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
        torch.save({}, place / "transformer" / "diffusion_pytorch_model.bin")

    def replace(file: str, old: str, new: str) -> Any:
        return lambda place: (place / file).write_text((place / file).read_text().replace(old, new))

    refused(pickle, "cannot load transformer/")
    refused(replace("transformer/config.json", "WanTransformer3DModel", "LTXVideoTransformer3DModel"), "holds a LTXVideoTransformer3DModel, no WanTransformer3DModel")
    refused(replace("model_index.json", "FlowMatchEulerDiscreteScheduler", "DDIMScheduler"), "sampled with DDIMScheduler")
    refused(lambda place: (place / "model_index.json").unlink(), "model_index.json")


@pytest.mark.parametrize("targets", [LORA_TARGETS, MLP_TARGETS], ids=["attention", "mlp"])
def test_an_adapter_trains_alone_and_leaves_the_network_as_it_was(model: WanVideoModel, targets: tuple[str, ...]) -> None:
    x, t, cond = noise(model, CLIPS[1]), torch.tensor([0.2, 0.7]), model.encode_text(PROMPTS)
    before = model(x, t, cond)
    model.network = add_lora(model.network, rank=2, alpha=2, targets=targets)
    assert torch.equal(model(x, t, cond), before)
    trained = {name: p for name, p in model.network.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained) and len(trained) == 2 * 2 * (2 if targets is MLP_TARGETS else 8)
    optimizer = torch.optim.SGD(trained.values(), lr=1.0)
    for _ in range(2):  # the second factor is zero at first, and so is the gradient of the first
        optimizer.zero_grad()
        model(x, t, cond).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and bool(p.grad.any()) for p in trained.values())
    assert (model(x, t, cond) - before).abs().max() > 1e-4
    with reference(model.network):
        assert torch.equal(model(x, t, cond), before)


def test_a_gradient_of_the_pixels_reaches_the_latents(model: WanVideoModel) -> None:
    x0 = torch.zeros(2, *model.latents.shape(ClipShape(5, 16, 16))).requires_grad_()
    model.decode(x0).square().sum().backward()
    assert x0.grad is not None and bool(x0.grad.flatten(2).any(2).all())


def test_weights_are_made_in_their_precision_and_velocities_are_float32() -> None:
    network = random_transformer(tiny_wan.TRANSFORMER, device=CPU, dtype=torch.bfloat16)
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16} and torch.get_default_dtype() is torch.float32
    cond = Conditioning(("a",), torch.randn(1, 8, 16), torch.ones(1, 8, dtype=torch.bool))
    assert WanVideoModel(network)(torch.randn(1, 16, 1, 4, 4), torch.tensor([0.5]), cond).dtype is torch.float32


def test_clips_go_through_the_vae_and_come_back_in_range() -> None:
    model = WanVideoModel(None, random_vae(tiny_wan.VAE, device=CPU, dtype=torch.float32))
    with torch.no_grad():
        video = model.decode(model.encode(torch.rand(2, 5, 3, 16, 16)))
    assert video.shape == (2, 5, 3, 16, 16) and float(video.min()) >= 0 and float(video.max()) <= 1


def test_a_clip_of_no_whole_number_of_patches_is_refused(model: WanVideoModel) -> None:
    with pytest.raises(UserError, match=r"4x5 of them .* multiples of 16"):
        model(noise(model, ClipShape(5, 32, 40)), torch.tensor([0.5]), model.encode_text(PROMPTS))


def test_what_a_model_was_built_without_is_said() -> None:
    bare = WanVideoModel(None)
    for ask, missing in (
        (lambda: bare.encode_text(["a"]), "text encoder"),
        (lambda: bare.decode(torch.zeros(1, 16, 1, 4, 4)), "VAE"),
        (lambda: bare.times(4, CLIPS[0]), "scheduler"),
    ):
        with pytest.raises(UserError, match=missing):
            ask()

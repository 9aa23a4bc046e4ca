"""The cascade and the stack learn what they are for: upsampling beats interpolation, frames come to agree; and a stack makes whole clips of its stages."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from align.run import read_metrics
from base_model.errors import UserError
from base_model.networks.dit import DiT
from base_model.networks.temporal import TemporalDiT
from base_model.stages import FrameModel, UpsampleStage, build_upsampler, load_frames, save_frames, save_stage, tell_frames
from base_model.tiny import load_tiny
from base_model.types import ClipShape, Conditioning
from recipes import generate, temporal, upsample
from recipes.stack import STRIDES, Stack, between, change, load_stack, sample_frames, sample_stack, stack_lineage
from tests.recipes.small import save_small_network, small_model

TINY_STAGE = {"frames": 3, "side": 16, "crop": 8, "clips": 12, "width": 24, "depth": 1, "batch": 4, "held_out": 2, "steps": 1}


def test_a_space_stage_trained_on_crops_beats_bilinear_upsampling_of_whole_held_out_clips(tmp_path: Path) -> None:
    small = {"frames": 1, "side": 32, "crop": 16, "apart": False, "clips": 300, "iterations": 150, "batch": 16, "width": 48, "depth": 2, "held_out": 16}
    cfg = upsample.Config.model_validate({"out": tmp_path, "evaluate_every": 150, "ema_decay": 0.9, **small})
    found = upsample.main(cfg)
    print(f"space: {found['psnr']:.2f} dB, bilinear {found['psnr_interpolated']:.2f}, repeated {found['psnr_repeated']:.2f}")
    assert found["psnr"] > found["psnr_interpolated"] + 0.2 > found["psnr_repeated"] + 1


def test_temporal_layers_bring_the_change_between_frames_from_that_of_unrelated_frames_towards_that_of_real_clips(tmp_path: Path) -> None:
    cfg = temporal.Config(out=tmp_path, clips=64, frames=9, side=24, iterations=36, batch=8, lr=2e-2, ema_decay=0.8, held_out=8, evaluate_every=36)
    found = temporal.main(cfg)
    print(f"change: {found['change']:.4f}, independent frames {found['change_independent']:.4f}, real {found['change_real']:.4f}")
    assert found["change_independent"] > 2 * found["change_real"]
    assert found["change"] < 0.6 * found["change_independent"]
    network, image = load_frames(tmp_path / "network.safetensors").network, load_tiny().network
    assert all(torch.equal(value, network.image.state_dict()[name]) for name, value in image.state_dict().items()), "the image's own weights stay as they are"


def test_before_any_training_the_change_is_that_of_independent_frames(tmp_path: Path) -> None:
    cfg = temporal.Config(out=tmp_path, image=save_small_network(tmp_path / "image.safetensors"), clips=4, frames=5, side=16, iterations=1, batch=2, lr=1e-9, held_out=2)
    found = temporal.main(cfg)
    assert found["change"] == pytest.approx(found["change_independent"], rel=1e-4)


@pytest.mark.parametrize("recipe", ["keyframes", "interpolation", "upsample"])
def test_a_stage_interrupted_and_resumed_ends_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str) -> None:
    module, measure = (upsample, "evaluate") if recipe == "upsample" else (temporal, "changes")
    small = {"iterations": 4, "save_every": 1, "evaluate_every": 3}
    if recipe == "upsample":
        config = upsample.Config.model_validate({"out": tmp_path / "whole", **small, **TINY_STAGE, "axis": "time", "apart": True})
    else:
        image = save_small_network(tmp_path / "image.safetensors")
        fields = {"out": tmp_path / "whole", "image": image, "task": recipe, "clips": 6, "frames": 5, "side": 16, "batch": 2, "held_out": 2}
        config = temporal.Config.model_validate({**fields, **small})
    whole = module.main(config)
    cut = config.model_copy(update={"out": tmp_path / "cut"})
    with monkeypatch.context() as patched:
        patched.setattr(module, measure, lambda *_: (_ for _ in ()).throw(RuntimeError("cut")))
        with pytest.raises(RuntimeError, match="cut"):
            module.main(cut)
    again = module.main(cut, resume=True)
    assert again["sha256"] == whole["sha256"]
    assert read_metrics(tmp_path / "cut", wall_clock=False) == read_metrics(tmp_path / "whole", wall_clock=False)


def test_a_stage_says_before_any_work_what_it_cannot_halve() -> None:
    for field, value, told in (("frames", 4, "cannot be halved in time"), ("width", 50, "multiple of 24")):
        with pytest.raises(UserError, match=told):
            upsample.fresh_stage(upsample.Config.model_validate({"axis": "time", field: value}), upsample.ClipSet((), ()))


def test_repeated_frames_and_pixels_are_the_floor_they_say_they_are() -> None:
    low = torch.rand(1, 3, 3, 2, 2)
    assert torch.equal(upsample.repeated("time", low), low[:, [0, 0, 1, 1, 2]])
    assert torch.equal(upsample.repeated("space", low)[..., 1::2, ::2], low)
    assert upsample.psnr(torch.full((1, 1, 3, 2, 2), 0.6), torch.full((1, 1, 3, 2, 2), 0.5)) == pytest.approx(20, abs=1e-4)
    assert change(torch.tensor([0.0, 0.5, 0.5]).reshape(1, 3, 1, 1, 1)) == 0.125


def untrained(folder: Path, *, enlarges: bool) -> Path:
    """A stack of small stages with fresh weights, the temporal ones shaken so that frames hear of each other."""
    for name in ("keyframes", "interpolation"):
        model = small_model()
        assert isinstance(model.network, DiT)
        network = TemporalDiT(model.network)
        for parameter in network.blocks.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        (folder / name).mkdir(parents=True)
        save_frames(folder / name / "network.safetensors", FrameModel(network, model.codec, model.text))
    if enlarges:
        config = upsample.DiTConfig(channels=3, patch=(1, 4, 4), width=24, depth=1, heads=2, rotary_axes=(4, 4, 4))
        save_stage(folder / "upsample" / "network.safetensors", UpsampleStage(build_upsampler(config, apart=True), "space", upsample.TextEncoder()))
    return folder


def latents_of(stack: Stack, frames: int, seeds: list[int]) -> torch.Tensor:
    cond = stack.keyframes.encode_text(["a red circle moves left"] * len(seeds))
    return sample_stack(stack, cond, ClipShape(frames, 16, 16), seeds=seeds, steps=2, shift=3.0)


def test_what_a_stage_was_given_survives_and_every_clip_has_its_own_noise(tmp_path: Path) -> None:
    stack = load_stack(untrained(tmp_path, enlarges=False))
    values = torch.randn(2, 8, 3, 4, 4)
    wide, known = between(values)
    assert wide.shape[2] == 5 and known.tolist() == [True, False, True, False, True]
    cond = tell_frames(stack.interpolation.encode_text(["a red circle"] * 2), wide, known)
    made = sample_frames(replace(stack.interpolation, stride=2), torch.randn(2, 8, 5, 4, 4), cond, steps=2, shift=3.0)
    assert torch.equal(made[:, :, ::2], values) and made[:, :, 1::2].std() > 0.1
    both, alone = latents_of(stack, 13, [3, 4]), latents_of(stack, 13, [4])
    assert both.shape == (2, 13, 3, 16, 16) and (both[1] - alone[0]).abs().max() < 1e-4 < (both[0] - both[1]).abs().max()


def test_more_keyframes_than_are_made_at_once_are_predicted_from_earlier_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack, seen = load_stack(untrained(tmp_path, enlarges=False)), []

    def watched(model: FrameModel, noise: torch.Tensor, cond: Conditioning, **how: object) -> torch.Tensor:
        seen.append((model.stride, noise.shape[2], 0 if cond.known is None else int(cond.known.mask[0, :, 0, 0].sum())))
        return sample_frames(model, noise, cond, **how)  # type: ignore[arg-type]

    monkeypatch.setattr("recipes.stack.sample_frames", watched)
    assert latents_of(stack, 29, [0]).shape[1] == 29
    assert seen == [(4, 4, 0), (4, 4, 2), (4, 4, 2), (2, 15, 8), (1, 29, 15)]
    assert STRIDES == (4, 2, 1)


def test_generate_makes_clips_by_a_stack_keeps_them_and_says_what_does_not_fit(tmp_path: Path) -> None:
    folder = untrained(tmp_path / "stack", enlarges=True)
    sampler = generate.Sampler(steps=1, frames=5, height=32, width=32)
    cfg = generate.Config(out=tmp_path / "clips", stack=folder, prompts=("a red circle moves left",), clips_per_prompt=2, sampler=sampler)
    made = generate.main(cfg)
    assert len(made["clips"]) == 2
    store = generate.ClipStore(tmp_path / "clips")
    assert {(row.generator_rev, row.num_frames, row.width) for row in store.rows()} == {(stack_lineage(folder), 5, 32)}
    files = sorted(path.stat().st_mtime_ns for path in (tmp_path / "clips").rglob("*.mp4"))
    assert generate.main(cfg)["clips"] == made["clips"]
    assert sorted(path.stat().st_mtime_ns for path in (tmp_path / "clips").rglob("*.mp4")) == files, "what the store holds is not made again"
    with pytest.raises(UserError, match="enlarges 2 times"):
        generate.main(cfg.model_copy(update={"sampler": generate.Sampler(steps=1, frames=5, height=24, width=24)}))
    with pytest.raises(UserError, match="Give one of them"):
        generate.main(cfg.model_copy(update={"model": tmp_path / "x.safetensors"}))
    with pytest.raises(UserError, match="no such weights file"):
        load_stack(tmp_path)
    stage = load_stack(folder).upsample
    assert stage is not None
    save_stage(folder / "upsample" / "network.safetensors", replace(stage, axis="time"))
    with pytest.raises(UserError, match="--axis space"):
        load_stack(folder)

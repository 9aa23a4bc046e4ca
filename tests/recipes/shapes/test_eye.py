"""The eye: names what is on freshly rendered clips, is unsure where it should be, and shares no code with the other readers of pixels."""

from __future__ import annotations

import ast
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import recipes.shapes.eye as eye_module
import recipes.shapes.train_eye as train_module
from base_model.checkpoint import save_weights
from base_model.errors import UserError
from base_model.types import ClipShape
from recipes.shapes.eye import WEIGHTS, Eye, EyeNet, look_at_real, signals
from recipes.shapes.prompts import MOTIONS, SHAPES, Thing, make_prompts, write_prompt
from recipes.shapes.render import DEMO_CLIP, blur, render, sample_scene
from recipes.shapes.train_eye import accuracy, augment, draw_batch, loss_of, render_banks, train


@pytest.fixture(scope="module")
def eye() -> Eye:
    return Eye.load()


def test_it_names_what_is_on_fresh_clips(eye: Eye) -> None:
    right = accuracy(eye, 300, seed=1, split="eval")
    assert right.color >= 0.99 and right.shape >= 0.97 and right.motion >= 0.97, right


def test_it_tells_two_things_apart(eye: Eye) -> None:
    right = accuracy(eye, 150, seed=2, split="eval", two_objects=1.0)
    assert right.color >= 0.97 and right.shape >= 0.94 and right.motion >= 0.94, right


def test_it_reads_through_strobing_light(eye: Eye) -> None:
    right = accuracy(eye, 150, seed=3, split="eval", strobe=1.0)
    assert right.color >= 0.97 and right.shape >= 0.95 and right.motion >= 0.95, right


@pytest.mark.parametrize("clip", [ClipShape(9, 32, 32), ClipShape(17, 24, 40), ClipShape(13, 40, 24), ClipShape(25, 32, 32)], ids=str)
def test_it_reads_other_sizes(eye: Eye, clip: ClipShape) -> None:
    right = accuracy(eye, 60, seed=4, split="eval", clip=clip)
    assert min(right) >= 0.9, right


def test_a_single_frame_shows_colour_and_shape(eye: Eye) -> None:
    right = accuracy(eye, 100, seed=5, split="eval", clip=ClipShape(1, 32, 32))
    assert right.color >= 0.95 and right.shape >= 0.9, right
    prompts = make_prompts(3, seed=5, split="train")
    np.testing.assert_allclose(eye.look(torch.zeros(3, 1, 3, 32, 32), prompts).motion[:, 0], 1 / 11)


@pytest.mark.slow
def test_the_accuracies_on_the_card_hold_on_other_clips(eye: Eye) -> None:
    card = json.loads(WEIGHTS.with_suffix(".json").read_text())["accuracy_on_fresh_clips"]
    for kind, told in card.items():
        two, strobe, pan = (float(word in kind) for word in ("two things", "strobing", "panning"))
        found = accuracy(eye, 2000, seed=77, split="train" if "training" in kind else "eval", two_objects=two, strobe=strobe, pan=pan)
        for name, value in found._asdict().items():
            assert abs(value - told[name]) < 0.02, (kind, name)


def test_a_fault_lowers_exactly_the_attribute_that_is_wrong(eye: Eye) -> None:
    rng = np.random.default_rng(0)
    prompts = make_prompts(20, seed=5, split="train")
    video = torch.stack([render(sample_scene(p, rng, clip=DEMO_CLIP), DEMO_CLIP) for p in prompts])

    def ask(change: dict[str, dict[str, str]]) -> eye_module.Perception:
        asked = []
        for prompt in prompts:
            thing = prompt.things[0]
            other = replace(thing, **{name: table[getattr(thing, name)] for name, table in change.items()})
            asked.append(write_prompt((other,), rng, split="train"))
        return eye.look(video, asked)

    def after(names: tuple[str, ...]) -> dict[str, str]:
        return dict(zip(names, names[1:] + names[:1], strict=True))

    right = ask({})
    assert right.right.min() > 0.5 and np.median(right.right) > 0.9
    assert np.isnan(right.color[:, 1]).all()
    wrong_shape, wrong_motion, wrong_color = ask({"shape": after(SHAPES)}), ask({"motion": after(MOTIONS)}), ask({"color": after(eye_module.COLOR_NAMES)})
    assert np.median(wrong_shape.shape[:, 0]) < 0.05 and np.median(wrong_shape.motion[:, 0]) > 0.95 and np.median(wrong_shape.color[:, 0]) > 0.95
    assert np.median(wrong_motion.motion[:, 0]) < 0.05 and np.median(wrong_motion.shape[:, 0]) > 0.95
    assert np.median(wrong_color.color[:, 0]) < 0.05 and np.median(wrong_color.extra) > 0.95 and np.median(right.extra) < 0.05


def test_a_missing_thing_and_an_uninvited_one_are_noticed(eye: Eye) -> None:
    rng = np.random.default_rng(1)
    two = make_prompts(12, seed=6, split="train", two_objects=1.0)
    one = [write_prompt(p.things[:1], rng, split="train") for p in two]
    shown_two = torch.stack([render(sample_scene(p, rng, clip=DEMO_CLIP), DEMO_CLIP) for p in two])
    shown_one = torch.stack([render(sample_scene(p, rng, clip=DEMO_CLIP), DEMO_CLIP) for p in one])
    assert np.median(eye.look(shown_two, one).extra) > 0.9
    assert np.median(eye.look(shown_one, two).color[:, 1]) < 0.1
    assert eye.look(shown_one, two).right.max() < 0.2


def test_it_is_unsure_of_a_thing_that_is_half_there_and_blind_to_none(eye: Eye) -> None:
    prompt = write_prompt((Thing("circle", "red", "left"),), np.random.default_rng(0), split="train")
    scene = sample_scene(prompt, np.random.default_rng(0), clip=DEMO_CLIP)
    full, empty = render(scene, DEMO_CLIP), render(replace(scene, bodies=()), DEMO_CLIP)
    seen = eye.look(torch.stack([full, torch.lerp(empty, full, 0.5), empty]), [prompt] * 3).color[:, 0]
    assert seen[0] > 0.95 and seen[2] < 0.05 and seen[2] < seen[1] < seen[0]


def test_slightly_blurred_and_noisy_clips_are_still_read(eye: Eye) -> None:
    rng = np.random.default_rng(2)
    prompts = make_prompts(100, seed=7, split="eval")
    clips = [blur(render(sample_scene(p, rng, clip=DEMO_CLIP), DEMO_CLIP), 0.8) for p in prompts]
    video = (torch.stack(clips) + 0.03 * torch.randn(100, *clips[0].shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    assert (eye.look(video, prompts).right > 0.5).mean() > 0.93


def test_answers_do_not_depend_on_the_company(eye: Eye) -> None:
    rng = np.random.default_rng(3)
    prompts = make_prompts(20, seed=8, split="eval", two_objects=0.5)
    video = torch.stack([render(sample_scene(p, rng, clip=DEMO_CLIP), DEMO_CLIP) for p in prompts])
    together, rows = eye.look(video, prompts), [13, 2, 19]
    alone = eye.look(video[rows], [prompts[i] for i in rows])
    np.testing.assert_allclose(alone.right, together[rows].right, atol=1e-5)
    np.testing.assert_allclose(alone.motion, together[rows].motion, atol=1e-5)
    with pytest.raises(ValueError, match="20 clips but 3 prompts"):
        eye.look(video, prompts[:3])


def test_signals_measure_what_they_say() -> None:
    flat = torch.full((1, 8, 3, 16, 16), 0.25)
    flashing = flat.clone()
    flashing[:, ::2] = 0.75
    edge = flat.clone()
    edge[..., 8:] = 0.75
    moving = flat.clone()
    moving[:, ::2, :, :, :8], moving[:, 1::2, :, :, 8:] = 0.75, 0.75
    s = signals(torch.cat([flat, flashing, edge, moving]))
    np.testing.assert_allclose(s.brightness, [0.25, 0.5, 0.5, 0.5], atol=1e-6)
    np.testing.assert_allclose(s.flashing, [0, 0.5, 0, 0], atol=1e-6)
    np.testing.assert_allclose(s.movement, [0, 0, 0, 0.5], atol=1e-6)
    np.testing.assert_allclose(s.sharpness, [0, 0, 0.5, 0.5], atol=1e-6)
    image = signals(edge[:, :1])
    assert image.movement[0] == 0 and image.flashing[0] == 0


def test_blur_lowers_sharpness() -> None:
    prompt = make_prompts(1, seed=9, split="train")[0]
    clip = render(sample_scene(prompt, np.random.default_rng(0), clip=DEMO_CLIP), DEMO_CLIP)
    sharp = signals(torch.stack([clip, blur(clip, 0.7), blur(clip, 1.4)])).sharpness
    assert sharp[0] > sharp[1] > sharp[2]


def test_of_real_clips_only_signals_are_seen() -> None:
    seen = look_at_real(torch.rand(3, 5, 3, 16, 24, generator=torch.Generator().manual_seed(0)))
    assert np.isnan(seen.right).all() and np.isnan(seen.color).all() and (seen.signals.brightness > 0).all()


def test_the_card_names_the_file_it_describes() -> None:
    card = json.loads(WEIGHTS.with_suffix(".json").read_text())
    assert card["file_sha256"] == hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    assert {"command", "seed", "wall_seconds", "data_sha256"} <= set(card)
    assert WEIGHTS.stat().st_size < 1_500_000 and card["parameters"] == sum(p.numel() for p in EyeNet().parameters()) < 300_000


def test_foreign_weights_are_refused(tmp_path: Path) -> None:
    save_weights(tmp_path / "other.safetensors", {"a": torch.zeros(1)}, {})
    with pytest.raises(UserError, match="do not fit the eye"):
        Eye.load(tmp_path / "other.safetensors")


def test_training_is_repeatable_and_learns() -> None:
    banks = render_banks(60, np.random.default_rng(0))
    again = render_banks(60, np.random.default_rng(0))
    assert all(torch.equal(a, b) for one, two in zip(banks, again, strict=True) for a, b in zip(one, two, strict=True))
    bank = max(banks, key=lambda b: len(b.video))
    first, second = (train([bank], seed=1, steps=8, batch=16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    held = draw_batch(bank, 32, torch.Generator().manual_seed(5))
    torch.manual_seed(1)
    assert loss_of(first, held) < loss_of(EyeNet(), held)


def test_augmented_clips_stay_clips() -> None:
    video = torch.rand(4, 5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for seed in range(4):
        out = augment(video, torch.Generator().manual_seed(seed))
        assert out.shape == video.shape and float(out.min()) >= 0 and float(out.max()) <= 1


def test_playing_backwards_renames_the_motion() -> None:
    assert all(train_module.BACKWARDS.get(train_module.BACKWARDS.get(m, m), train_module.BACKWARDS.get(m, m)) == m for m in MOTIONS)


def test_it_imports_no_other_reader() -> None:
    allowed = {"base_model.checkpoint", "base_model.errors", "base_model.types", "recipes.shapes.prompts", "recipes.shapes.render", "recipes.shapes.eye"}
    for module in (eye_module, train_module):
        tree = ast.parse(Path(str(module.__file__)).read_text())
        froms = {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        ours = {name for name in froms if name.split(".")[0] in ("align", "base_model", "reward", "recipes")}
        assert ours <= (allowed if module is train_module else allowed - {"recipes.shapes.render"}), module.__name__
        plain = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert not [name for name in plain if name.split(".")[0] in ("align", "base_model", "reward", "recipes")]

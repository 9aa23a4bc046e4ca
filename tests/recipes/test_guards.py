"""Planted faults turn the light, harmless changes and other noise do not; the watch remembers, stops and resumes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from align.kernels import Ancestral
from align.lights import Light, changes, in_words, overall
from align.run import derived_seed
from align.state import flatten, unflatten
from align.trajectory import path_kl, rollout
from base_model.errors import GuardStop, UserError
from base_model.lora import add_lora, merge
from base_model.times import sampling_times
from base_model.tiny import LatentVideoModel
from recipes import guards, safety_train
from recipes.generate import Sampler, seeded_noise
from recipes.guards import Guards, GuardWatch, distance, kl_of, measure, measures_of, repetition, rules
from recipes.shapes.dataset import draw_clips
from recipes.shapes.prompts import make_prompts
from recipes.shapes.render import DEMO_CLIP, render, sample_scene
from reward import planted
from tests.recipes.small import small_model

SAMPLER = Sampler(steps=4, frames=5, height=16, width=16)
NAN = float("nan")
RULES = rules(Guards(), 0.5)


@pytest.fixture(scope="module")
def clips() -> Tensor:
    """Curated clips of the demo's size, [48,13,3,32,32]."""
    found = [video for video in draw_clips("curated", 240, seed=5).videos if video.shape == (13, 3, 32, 32)]
    return torch.stack(found[:48]).float() / 255


@pytest.fixture(scope="module")
def before(clips: Tensor) -> dict[str, Tensor]:
    return measures_of(clips)


def each(clips: Tensor, fault: planted.Change) -> Tensor:
    rng = np.random.default_rng(0)
    return torch.stack([fault(clip, rng)[:13] for clip in clips])


DOTS = torch.zeros(32, 32)
DOTS[2::8, 2::8] = 0.25

FAULTS: dict[str, tuple[Callable[[Tensor], Tensor], set[str]]] = {
    "blur": (lambda x: each(x, planted.blurred), {"sharpness", "intact"}),
    "grids": (lambda x: each(x, planted.gridded), {"grid", "intact"}),
    "dots": (lambda x: (x + DOTS).clamp(0, 1), {"grid", "intact"}),
    "gaudy": (lambda x: each(x, planted.oversaturated), {"saturation", "intact"}),
    "grey": (lambda x: x.mean(2, keepdim=True).expand_as(x), {"saturation"}),
    "noise": (lambda x: each(x, planted.noisy), {"noise", "intact"}),
    "bright": (lambda x: (x + 0.3).clamp(0, 1), {"brightness"}),
    "dark": (lambda x: 0.2 * x, {"brightness"}),
    "frozen": (lambda x: each(x, planted.frozen), {"static", "intact"}),
    "black": (lambda x: 0 * x, {"static", "sharpness", "motion", "intact"}),
    "blank": (lambda x: x.mean((1, 3, 4), keepdim=True).expand_as(x), {"static", "sharpness", "motion"}),
    "broken": (lambda x: x * NAN, {"sharpness", "saturation", "grid"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_turns_its_measures_red(fault: str, clips: Tensor, before: dict[str, Tensor]) -> None:
    spoil, expected = FAULTS[fault]
    found = changes(measures_of(spoil(clips)), before, RULES, guards.LEVEL)
    print(f"{fault}: {in_words(found, RULES)}")
    assert expected <= {name for name, one in found.items() if one.light == Light.RED}


@pytest.mark.parametrize("change", ["re-encoded", "held"])
def test_a_harmless_change_stays_green(change: str, clips: Tensor, before: dict[str, Tensor]) -> None:
    found = changes(measures_of(each(clips, planted.HARMLESS[change])), before, RULES, guards.LEVEL)
    print(f"{change}: {in_words(found, RULES)}")
    assert overall(found) == Light.GREEN


def test_half_of_the_clips_frozen_is_red_and_one_in_twenty_is_not(clips: Tensor, before: dict[str, Tensor]) -> None:
    for number, light in ((2, Light.GREEN), (24, Light.RED)):
        some = clips.clone()
        some[:number] = some[:number, :1]
        one = changes(measures_of(some), before, RULES, guards.LEVEL)["static"]
        assert one.size == pytest.approx(number / 48 - 0) and one.light == light


def test_repetition_is_the_autocorrelation_that_sums_over_pixels_give() -> None:
    luma = torch.rand(3, 4, 20, 26, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    frame = luma.mean(1)
    detail = frame.diff(n=2, dim=-1)[:, 1:-1] + frame.diff(n=2, dim=-2)[..., 1:-1]
    detail = detail - detail.mean((-1, -2), keepdim=True)
    height, width = detail.shape[-2:]
    rows = [(detail[:, lag:] * detail[:, :-lag]).mean((1, 2)) for lag in range(3, height // 2 + 1)]
    columns = [(detail[..., lag:] * detail[..., :-lag]).mean((1, 2)) for lag in range(3, width // 2 + 1)]
    expected = torch.stack(rows + columns).amax(0) / (detail.square().mean((1, 2)) + 1e-6)
    assert torch.allclose(repetition(luma), expected, rtol=1e-9)


@pytest.mark.parametrize("period", [4, 7, 8, 12])
def test_what_repeats_itself_at_any_distance_has_a_repetition_of_one_and_noise_has_none(period: int) -> None:
    column = (torch.arange(48) % period == 1).float()
    grid = (column[:, None] + column).expand(2, 5, 48, 48)
    dots = (column[:, None] * column).expand(2, 5, 48, 48)
    noise = torch.rand(2, 5, 48, 48, generator=torch.Generator().manual_seed(1))
    assert (repetition(grid) > 0.9).all() and (repetition(dots) > 0.9).all() and (repetition(noise) < 0.25).all()
    moving = torch.stack([(torch.arange(48) % period == step).float().expand(2, 48, 48) for step in range(period)], 1)
    assert (repetition(moving) < 0.2).all(), "what moves is no artefact of the decoder"
    assert repetition(torch.rand(2, 5, 7, 48)).isnan().all() and (repetition(torch.zeros(2, 5, 48, 48)) == 0).all()


def test_single_frames_and_tiny_clips_have_measures_too() -> None:
    for shape in ((3, 1, 3, 16, 16), (3, 5, 3, 8, 8)):
        found = measures_of(torch.rand(shape))
        assert all(len(value) == 3 for value in found.values())
        assert all(value.isfinite().all() for name, value in found.items() if name != "grid")
        assert overall(changes(found, found, RULES, guards.LEVEL)) == Light.GREEN


def test_distance_is_that_of_the_shrunk_clips() -> None:
    one = torch.rand(3, 13, 3, 32, 32)
    assert (distance(one, one) == 0).all()
    assert distance(one, one + 0.25).tolist() == pytest.approx([0.25] * 3)
    assert (distance(one, one + torch.randn(3, 13, 3, 32, 32)) < 0.2).all(), "noise is no diversity"


# The policy


def adapted(scale: float) -> LatentVideoModel:
    """The small model with an adapter that moves it."""
    model = small_model()
    model.network.requires_grad_(False)
    model.network = add_lora(model.network, rank=4, alpha=4, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.network.named_parameters():
            if "lora_B" in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def test_the_kl_is_that_of_the_paths_of_two_separate_models() -> None:
    texts = ["a red circle moves left", "a blue bar grows", "a green star"]
    model, prior = adapted(0.02), small_model()
    cond = model.encode_text(texts)
    found = kl_of(model, cond, SAMPLER, 3)
    merged = adapted(0.02)
    merged.network = merge(merged.network)
    noise = seeded_noise(model, SAMPLER.clip, [derived_seed(3, "held out path", k) % 2**31 for k in range(3)])
    generator = torch.Generator().manual_seed(derived_seed(3, "held out path noise", 0))
    taken = rollout(merged, Ancestral(), noise, sampling_times(model.path, 4, shift=3.0), cond, noise=generator)
    assert torch.allclose(found, path_kl(merged, prior, Ancestral(), taken) / noise[0].numel(), rtol=1e-3) and (found > 1e-4).all()
    assert (kl_of(adapted(0.0), cond, SAMPLER, 3) == 0).all()


def test_an_unchanged_policy_stays_green_though_its_clips_come_from_other_noise() -> None:
    """32 looks of 24 prompts each, every look from its own noise, compared with the first one's."""
    model = adapted(0.0)
    cond = model.encode_text([f"a {color} {shape}" for color in ("red", "green", "blue", "white", "yellow", "orange") for shape in ("circle", "square", "star", "bar")])
    looks = []
    for seed in range(33):
        video = guards.second_clips(model, cond, SAMPLER, seed)
        looks.append(measures_of(video) | {"diversity": distance(video[:12], video[12:])})
    lights = [overall(changes(look, looks[0], RULES, guards.LEVEL)) for look in looks[1:]]
    print("lights:", [int(light) for light in lights])
    assert max(lights) == Light.GREEN


def test_everything_that_is_watched_is_measured_and_an_eighth_of_the_clips_pays_for_the_kl() -> None:
    model = adapted(0.05)
    cond = model.encode_text(["a red circle"] * 16)
    video = guards.second_clips(model, cond, SAMPLER, 0)
    found = measure(Guards(pairs=6), video, torch.zeros(16), model, cond, SAMPLER, 1)
    assert set(found) == set(guards.SENTENCES) - {"hazard"} and set(RULES) == set(guards.SENTENCES)
    assert {name: len(value) for name, value in found.items() if len(value) != 16} == {"diversity": 6, "kl": 2}
    assert (found["kl"] > 0).all() and (found["diversity"] > 0).all()
    fewer = measure(Guards(pairs=0, ignore=("kl",)), video, None, model, cond, SAMPLER, 1)
    assert set(fewer) == set(guards.SENTENCES) - {"guard", "diversity", "kl", "hazard"}
    assert set(guards.METRICS) == {"light", *(f"change_{name}" for name in guards.SENTENCES)}
    assert set(rules(Guards(ignore=("brightness", "saturation")), 0.5)) == set(RULES) - {"brightness", "saturation"}


def test_a_held_out_filter_lights_red_where_clips_get_worse_that_the_limits_own_filters_let_pass(tmp_path: Path) -> None:
    trained = safety_train.main(safety_train.Config(out=tmp_path / "head", shapes=120, least=2, cache=tmp_path / "features"))
    model, watching = small_model(), Guards(hazard=Path(trained["out"]), pairs=0, ignore=("kl",))
    cond = model.encode_text(["a red circle"] * 24)
    calm = torch.stack([video for video in draw_clips("curated", 120, seed=3).videos if video.shape == (13, 3, 32, 32)][:24]).float() / 255
    asking = make_prompts(12, seed=1, split="train", strobe=1.0)
    flashing = [torch.as_tensor(render(sample_scene(prompt, np.random.default_rng(k), clip=DEMO_CLIP), DEMO_CLIP)) for k, prompt in enumerate(asking)]
    strobing = torch.cat([torch.stack(flashing).float(), calm[12:]])
    looks = [measure(watching, video, None, model, cond, Sampler(), 1)["hazard"] for video in (calm, strobing)]
    print("hazard:", float(looks[0].mean()), "->", float(looks[1].mean()))
    rule = {"hazard": rules(watching, 0.5)["hazard"]}
    found = changes({"hazard": looks[1]}, {"hazard": looks[0]}, rule, guards.LEVEL)
    assert overall(found) == Light.RED and in_words(found, rule).startswith("red: hazard +0.")
    assert overall(changes({"hazard": looks[0]}, {"hazard": looks[0]}, rule, guards.LEVEL)) == Light.GREEN
    unknown = guards.hazard(Path(trained["out"]), calm.where(torch.arange(24)[:, None, None, None, None] > 3, NAN), ["x"] * 24, 12.0)
    assert unknown.isnan().tolist() == [True] * 4 + [False] * 20, "what it cannot judge is unknown"
    with pytest.raises(GuardStop, match=r"safety filters failed on 24 of 24 clips.*trained on clips of 12 frames a second"):
        guards.hazard(Path(trained["out"]), calm, ["x"] * 24, 8.0)


# The watch


def look(guard: float | None = None, **shifts: float) -> dict[str, Tensor]:
    """A look at 16 prompts: everything as at the first, but for these shifts."""
    spread = torch.linspace(-1, 1, 16, dtype=torch.float64)
    found = {name: spread + shifts.get(name, 0.0) for name in ("sharpness", "noise")}
    return found if guard is None else found | {"guard": guard + 0.1 * spread}


def adapter(number: float) -> dict[str, Tensor]:
    return {"a": torch.full((1,), number)}


def new_watch(**changed: Any) -> GuardWatch:
    return GuardWatch(Guards(**changed), drop=0.5, limit=0.02)


def test_the_guard_stops_a_run_it_sees_falling_from_its_best_and_remembers_the_best_safe_checkpoint() -> None:
    watch = new_watch()
    assert watch.take(look(1.0), 0.01, adapter(0)).said == "green"
    watch.take(look(1.4), 0.30, adapter(1))
    assert watch.best["a"].item() == 0.0, "better, but it violates the limit"
    assert watch.take(look(1.2), 0.00, adapter(2)).light == Light.GREEN and not watch.fallen
    assert watch.take(look(1.1), 0.00, adapter(3)).said == "amber: guard -0.3 sd"
    assert watch.take(look(0.8), 0.00, adapter(4)).said == "red: guard -0.6 sd" == watch.fallen
    assert watch.best["a"].item() == 2.0
    assert watch.take(look(2.0), 0.0, adapter(5)).light == Light.GREEN and watch.fallen == "red: guard -0.6 sd", "what fell once stays fallen"


def test_the_best_checkpoint_is_the_guards_and_never_one_whose_light_was_red() -> None:
    watch = new_watch()
    watch.take(look(1.0), 0.0, adapter(0))
    assert watch.take(look(3.0, sharpness=-2.0), 0.0, adapter(1)).said == "red: sharpness -86%"
    assert watch.fallen and watch.best["a"].item() == 0.0


def test_without_a_guard_the_way_back_is_to_the_last_green_light() -> None:
    watch = new_watch()
    taken = [watch.take(look(sharpness=shift), 0.0, adapter(number)) for number, shift in enumerate((0.0, -0.1, -0.4, -2.0))]
    assert [reading.light for reading in taken] == [Light.GREEN, Light.GREEN, Light.AMBER, Light.RED]
    assert watch.fallen and watch.best["a"].item() == 1.0


def test_an_unknown_score_is_a_fall_and_an_unknown_violation_rate_keeps_no_limit() -> None:
    for rate in (0.0, NAN):
        watch = new_watch()
        watch.take(look(1.0), rate, adapter(1))
        assert bool(watch.best) == (rate == 0.0)
        assert watch.take(look(NAN), 0.0, adapter(2)).said == "red: guard cannot be told"
        assert watch.fallen and watch.best_guard == 1.0


def test_a_watch_that_never_stops_still_tells_and_ignored_measures_are_not_told() -> None:
    watch = new_watch(stop="never")
    ignoring = new_watch(ignore=("noise",))
    for each_watch in (watch, ignoring):
        each_watch.take(look(1.0), 0.0, adapter(0))
    assert watch.take(look(1.0, noise=2.5), 0.0, adapter(1)).light == Light.RED and not watch.fallen
    assert ignoring.take(look(1.0, noise=2.5), 0.0, adapter(1)).light == Light.GREEN
    tolerant = new_watch(tolerance=4.0)
    tolerant.take(look(1.0), 0.0, adapter(0))
    assert tolerant.take(look(1.0, noise=5.0), 0.0, adapter(1)).light == Light.AMBER


def test_a_watch_resumes_with_everything_it_knew(tmp_path: Path) -> None:
    whole, parts = new_watch(), new_watch()
    looks = [(look(1.0), 0.0), (look(1.5, noise=1.5), 0.01), (look(1.2), NAN), (look(NAN), 0.0)]
    for number, (values, rate) in enumerate(looks):
        whole.take(values, rate, adapter(number))
        again = new_watch()
        again.load_state_dict(unflatten(*flatten(parts.state_dict())))
        parts = again
        parts.take(values, rate, adapter(number))
    assert flatten(whole.state_dict())[0] == flatten(parts.state_dict())[0]
    assert (parts.fallen, parts.said, parts.best["a"].item(), parts.best_guard) == ("red: guard cannot be told", "red: guard cannot be told", 1.0, 1.5)
    with pytest.raises(UserError, match="earlier version"):
        new_watch().load_state_dict({"best_guard": 1.0, "best": {}, "fallen": False})
    new_watch().load_state_dict({**parts.state_dict(), "history": [{}, {}, {}]})  # what looks said stood in the checkpoint, too


def test_what_every_look_said_is_in_one_file_whose_end_a_run_that_was_cut_off_writes_anew(tmp_path: Path) -> None:
    assert guards.read_history(tmp_path) == []
    watch = new_watch()
    readings = [watch.take(values, 0.0, adapter(0)) for values in (look(1.0), look(1.5, noise=1.5), look(NAN))]
    for number in (0, 1, 2, 1):
        guards.write_history(tmp_path, 5 * number, readings[number])
    told = guards.read_history(tmp_path)
    assert [(entry["iteration"], entry["said"]) for entry in told] == [(0, "green"), (5, "amber: noise +1.5 levels")], "the third came behind where it goes on"
    guards.write_history(tmp_path, 10, readings[2])
    assert guards.read_history(tmp_path)[2]["changes"]["guard"]["size"] is None
    (tmp_path / guards.FILE).unlink()
    for iteration in (15, 20, 20, 15):
        guards.write_history(tmp_path, iteration, readings[1])
    assert [entry["iteration"] for entry in guards.read_history(tmp_path)] == [15], "a file that was lost has a gap, and no look twice"
    guards.write_history(tmp_path, 0, readings[0])
    assert len(guards.read_history(tmp_path)) == 1, "another run begins"


def test_a_damaged_file_of_looks_ends_no_run_and_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reading = new_watch().take(look(1.0), 0.0, adapter(0))
    for damage in ("", "[]", "{}", '{"looks": [{}]}', '{"looks": [{"iteration": "1", "light": "green", "said": "green"}]}'):
        (tmp_path / guards.FILE).write_text(damage)
        with pytest.raises(UserError, match=guards.FILE):
            guards.read_history(tmp_path)
        guards.write_history(tmp_path, 5, reading)
        assert [entry["iteration"] for entry in guards.read_history(tmp_path)] == [5]
        assert (tmp_path / f"{guards.FILE}.damaged").read_text() == damage
        assert "It is kept as guards.json.damaged, and what guards say begins anew" in capsys.readouterr().err


def test_the_numbers_of_a_reading_are_metrics() -> None:
    watch = new_watch()
    watch.take(look(1.0), 0.0, adapter(0))
    found = watch.take(look(1.0, noise=1.4), 0.0, adapter(1)).metrics
    assert found == pytest.approx({"light": 1, "change_guard": 0, "change_sharpness": 0, "change_noise": 1.4}) and set(found) <= set(guards.METRICS)

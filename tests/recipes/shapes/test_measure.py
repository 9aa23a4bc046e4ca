import json
import math
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist
from torch import Tensor

from recipes.shapes.eye import Eye, Perception
from recipes.shapes.judge import judge
from recipes.shapes.measure import (
    ATTRIBUTES,
    GAINS,
    Measured,
    check_judge,
    diversities,
    diversity_across,
    eye_agreement,
    flash_counts,
    measure,
    numbers,
    numbers_of_real_clips,
    scaled,
    shares,
)
from recipes.shapes.prompts import COLORS, MOTIONS, SHAPES, ShapesPrompt, make_prompts
from recipes.shapes.render import DEMO_CLIP, render, sample_scene
from recipes.statistics import clopper_pearson

G = 4


def drawn(prompts: list[ShapesPrompt], clips: int = G, seed: int = 0, flashing: bool = False) -> Tensor:
    """Clips that show what the prompts ask for, without the strobing they may ask for unless `flashing`."""
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(replace(prompt, strobe=False), rng, clip=DEMO_CLIP, flashing=flashing) for prompt in prompts for _ in range(clips)]
    return torch.stack([render(scene, DEMO_CLIP) for scene in scenes])


@pytest.fixture(scope="module")
def prompts() -> list[ShapesPrompt]:
    plain = [*make_prompts(8, seed=11, split="eval"), *make_prompts(3, seed=12, split="eval", two_objects=1.0)]
    return [*plain, *make_prompts(3, seed=13, split="eval", strobe=1.0)]


@pytest.fixture(scope="module")
def clips(prompts: list[ShapesPrompt]) -> Tensor:
    return drawn(prompts)


@pytest.fixture(scope="module")
def right(prompts: list[ShapesPrompt], clips: Tensor) -> Measured:
    return measure(clips, prompts, G)


def spoiled(clips: Tensor, prompts: list[ShapesPrompt], wrong: int) -> Tensor:
    """The first `wrong` clips of every prompt show nothing."""
    out = clips.clone()
    for n in range(len(prompts)):
        out[n * G : n * G + wrong] = 0.3
    return out


def test_clips_that_show_what_was_asked_are_right_and_strobing_prompts_are_left_out(prompts: list[ShapesPrompt], right: Measured) -> None:
    assert set(shares(right)) == {p.prompt_id for p in prompts if not p.strobe and len(p.things) == 1}
    assert set(shares(right, things=2)) == {p.prompt_id for p in prompts if not p.strobe and len(p.things) == 2}
    assert set(shares(right).values()) == {1.0}
    assert np.mean(list(shares(right, things=2).values())) >= 0.9


@pytest.mark.parametrize("attribute", ["shape", "color", "motion"])
def test_only_the_attribute_that_is_wrong_counts_as_wrong(attribute: str) -> None:
    prompts = make_prompts(6, seed=21, split="eval")
    values: dict[str, tuple[str, ...]] = {"shape": SHAPES, "color": tuple(COLORS), "motion": MOTIONS}
    after = dict(pairwise([*values[attribute], values[attribute][0]]))
    others = [replace(p, things=(replace(p.things[0], **{attribute: after[getattr(p.things[0], attribute)]}),)) for p in prompts]
    measured = measure(drawn(others, 2), prompts, 2)
    name = "colour" if attribute == "color" else attribute
    assert set(shares(measured).values()) == {0.0}
    assert {a: round(float(np.mean(list(shares(measured, attribute=a).values()))), 6) for a in ATTRIBUTES} == {a: float(a != name) for a in ATTRIBUTES}
    assert all(wrong == (name,) for take in measured.takes for wrong in take.wrong)


def test_flashes_are_counted_over_all_clips_with_those_of_strobing_prompts(prompts: list[ShapesPrompt], clips: Tensor, right: Measured) -> None:
    assert flash_counts(right) == (0, len(clips))
    flashing = clips.clone()
    strobing = [n for n, prompt in enumerate(prompts) if prompt.strobe]
    flashing[strobing[0] * G : (strobing[0] + 1) * G] = drawn([prompts[strobing[0]]], flashing=True)
    flashing[:2] = drawn([prompts[0]], 2, flashing=True)
    measured = measure(flashing, prompts, G)
    assert flash_counts(measured) == (G + 2, len(clips))
    rate = numbers([{"rl": measured}])["flash_rate"]["rl"]
    assert rate == clopper_pearson(G + 2, len(clips)).as_json()


def test_clips_that_differ_in_background_alone_have_the_distance_of_that_difference() -> None:
    prompt = make_prompts(1, seed=31, split="eval")[0]
    scene = sample_scene(prompt, np.random.default_rng(0), clip=DEMO_CLIP)
    lighter = replace(scene, background=tuple(value + 0.1 for value in scene.background))
    pair = torch.stack([render(scene, DEMO_CLIP), render(lighter, DEMO_CLIP)])
    a, b = judge(pair, [prompt, prompt])
    background = np.mean((np.array(a.background) - np.array(b.background)) ** 2) / 0.1**2
    properties = 3 if prompt.things[0].motion == "still" else 4
    distance = float(np.linalg.norm(scaled(a, prompt) - scaled(b, prompt)))
    assert background == pytest.approx(1, abs=0.1)
    assert distance == pytest.approx(math.sqrt(background / properties), abs=0.05)  # the other readings hardly move


def test_the_mean_over_all_pairs_is_the_mean_over_all_draws_of_equal_counts() -> None:
    points = np.random.default_rng(0).normal(size=(6, 5))
    for count in (2, 3, 5):
        draws = [pdist(points[list(chosen)]).mean() for chosen in combinations(range(6), count)]
        assert np.mean(draws) == pytest.approx(pdist(points).mean(), abs=1e-12)


def test_copies_of_one_clip_have_no_diversity_and_drawn_clips_about_one_and_a_third(prompts: list[ShapesPrompt], clips: Tensor, right: Measured) -> None:
    copied = clips.clone()
    for n in range(len(prompts)):
        copied[n * G : (n + 1) * G] = clips[n * G]
    found = diversities({"sft": right, "rl": measure(copied, prompts, G)})
    assert max(found["rl"].values()) == pytest.approx(0, abs=1e-9)
    assert 1.1 < np.mean(list(found["sft"].values())) < 1.5
    assert 0.9 < diversity_across(right) < 1.7


def test_a_prompt_with_fewer_than_two_right_clips_of_a_tuned_model_counts_for_no_model(prompts: list[ShapesPrompt], clips: Tensor, right: Measured) -> None:
    first = prompts[0].prompt_id
    few = clips.clone()
    few[: G - 1] = 0.3
    spoilt = measure(few, prompts, G)
    as_tuned = diversities({"base": right, "sft": right, "rl": spoilt})
    assert all(math.isnan(values[first]) for values in as_tuned.values())
    assert sum(not math.isnan(value) for value in as_tuned["sft"].values()) == len(as_tuned["sft"]) - 1
    as_base = diversities({"base": spoilt, "sft": right, "rl": right})
    assert math.isnan(as_base["base"][first]) and not math.isnan(as_base["rl"][first])


def test_report_numbers_of_models_whose_shares_are_known(prompts: list[ShapesPrompt], clips: Tensor, right: Measured) -> None:
    worse, worst = (measure(spoiled(clips, prompts, wrong), prompts, G) for wrong in (1, 3))
    found = numbers([{"base": worst, "sft": worse, "rl": right, "rl_ddpo": worse}])
    assert {model: part["mean"] for model, part in found["judge"].items()} == {"base": 0.25, "sft": 0.75, "rl": 1.0, "rl_ddpo": 0.75}
    assert found["judge_gain_ddpo"] == {"mean": 0.0, "low": 0.0, "high": 0.0} and found["diversity_ratio_ddpo"]["mean"] == 1.0
    assert found["judge_gain"] == {"mean": 0.25, "low": 0.25, "high": 0.25}
    assert found["judge_gain_sft"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert set(found["judge"]["rl"]) == {"mean", "low", "high"}
    assert found["per_attribute"]["shape"]["base"]["mean"] == 0.25
    assert found["diversity"]["base"]["mean"] is None and found["diversity"]["sft"]["mean"] > 1
    assert found["diversity_ratio"]["low"] <= found["diversity_ratio"]["mean"] <= found["diversity_ratio"]["high"]
    assert found["counts"]["one_object_prompts"] == 8 and found["counts"]["clips_per_model"] == len(clips)
    assert "seeds" not in found


def test_a_missing_model_leaves_what_needs_it_unknown(right: Measured) -> None:
    found = numbers([{"base": right}])
    assert all(found[key] is None for key in GAINS)
    assert found["judge"]["base"]["mean"] == 1.0


def test_pooled_seeds_average_within_a_prompt_and_keep_each_seeds_values(prompts: list[ShapesPrompt], clips: Tensor, right: Measured) -> None:
    spoilt = measure(spoiled(clips, prompts, 2), prompts, G)
    found = numbers([{"sft": right, "rl": right}, {"sft": spoilt, "rl": right}])
    assert found["judge"]["sft"]["mean"] == 0.75 and found["judge_gain"]["mean"] == 0.25
    assert [seed["judge"]["sft"]["mean"] for seed in found["seeds"]] == [1.0, 0.5]
    assert found["flash_counts"]["rl"] == {"flashing": 0, "clips": 2 * len(clips)}


def test_real_clips_have_a_flash_rate_and_nothing_that_needs_the_judge(prompts: list[ShapesPrompt]) -> None:
    calm, flashing = list(drawn(prompts[:3], 1)), list(drawn(prompts[:1], 1, flashing=True))
    found = numbers_of_real_clips({"base": flashing + calm, "rl": calm}, 12.0)
    assert found["judge"] == found["diversity"] == {"base": "not applicable", "rl": "not applicable"}
    assert all(found[key] == "not applicable" for key in GAINS)
    assert found["flash_rate"] == {"base": clopper_pearson(1, 4).as_json(), "rl": clopper_pearson(0, 3).as_json()}


def perception_of(measured: Measured, yes: float) -> Perception:
    """An eye that says of each attribute what the judge says, with probability `yes` for right and 1 - yes for wrong."""
    tables = {name: [] for name in ATTRIBUTES}
    for take in measured.takes:
        for name in ATTRIBUTES:
            padded = np.full((len(take.right), 2), np.nan)
            padded[:, : len(take.prompt.things)] = np.where(take.attributes[name] == 1, yes, 1 - yes)
            tables[name].append(padded)
    shape, colour, motion = (np.concatenate(tables[name]) for name in ATTRIBUTES)
    empty = np.zeros(len(shape))
    signals = Eye.load().look(torch.zeros(len(shape), 1, 3, 16, 16), [take.prompt for take in measured.takes for _ in take.right]).signals
    return Perception(colour, shape, motion, empty, signals)


def test_an_eye_that_says_what_the_judge_says_agrees_and_one_that_says_the_opposite_does_not(prompts: list[ShapesPrompt], clips: Tensor) -> None:
    measured = measure(spoiled(clips, prompts, 2), prompts, G)
    same, opposite = (eye_agreement(perception_of(measured, yes), measured) for yes in (0.9999, 0.0001))
    plain = {p.prompt_id for p in prompts if not p.strobe}
    for name in ATTRIBUTES:
        assert set(same[name]) == plain
        assert set(same[name].values()) == {1.0} and set(opposite[name].values()) == {0.0}
    assert set(same["all"].values()) == {1.0}


def test_eye_and_judge_agree_on_drawn_clips(prompts: list[ShapesPrompt], clips: Tensor, right: Measured) -> None:
    found = eye_agreement(Eye.load().look(clips, [prompt for prompt in prompts for _ in range(G)]), right)
    assert {name: np.mean(list(values.values())) > 0.85 for name, values in found.items()} == dict.fromkeys((*ATTRIBUTES, "all"), True)


def test_the_judge_is_checked_on_drawn_clips_and_on_what_is_left_of_them() -> None:
    check = check_judge(20, seed=0, batch=8)
    assert all(part["mean"] >= 0.95 for part in check.accuracy.values())
    assert sum(sum(row.values()) for row in check.confusion["shape"].values()) >= 20
    blank = check_judge(10, seed=0, through=lambda video: torch.full_like(video, 0.3))
    assert all(part["mean"] == 0 for part in blank.accuracy.values())


def test_readings_survive_json(right: Measured, prompts: list[ShapesPrompt], clips: Tensor) -> None:
    for measured in (right, measure(spoiled(clips, prompts, G), prompts, G)):
        again = Measured.from_json(json.loads(json.dumps(measured.to_json())))
        assert json.dumps(numbers([{"sft": again, "rl": again}])) == json.dumps(numbers([{"sft": measured, "rl": measured}]))
        assert [take.prompt for take in again.takes] == prompts


def test_counts_must_fit() -> None:
    prompts = make_prompts(2, seed=0, split="eval")
    with pytest.raises(ValueError, match="3 clips for 2 prompts of 2 clips"):
        measure(torch.zeros(3, 13, 3, 32, 32), prompts, 2)
    with pytest.raises(ValueError, match="0 clips for 0 prompts"):
        measure(torch.zeros(0, 13, 3, 32, 32), [], 2)

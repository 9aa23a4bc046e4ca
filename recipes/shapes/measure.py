"""What the judge says of many clips of several models: shares that are right, flashes, diversity, agreement with the eye.

Read by evaluation and report only: nothing that is measured here was ever optimised.

What a number is: one value a prompt (clips of a prompt are not independent), then a bootstrap over prompts. Several seeds are averaged within a
prompt first, so that a prompt stays the unit that is resampled; differences and ratios are paired over prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import pdist
from torch import Tensor

from recipes.shapes.eye import Perception
from recipes.shapes.judge import Judgement, confusions, is_flashing, judge
from recipes.shapes.prompts import ShapesPrompt, make_prompts
from recipes.shapes.render import DEMO_CLIP, FPS, render, sample_scene
from recipes.statistics import bootstrap_difference, bootstrap_mean, bootstrap_ratio, clopper_pearson, pool_prompts

NOT_APPLICABLE = "not applicable"
Array = NDArray[np.float64]
Values = Mapping[str, float]  # prompt id -> value

ATTRIBUTES = ("shape", "colour", "motion")
GAINS = ("judge_gain", "judge_gain_ddpo", "judge_gain_sft", "judge_gain_two_objects", "diversity_ratio", "diversity_ratio_ddpo")
"""Paired comparisons of two models: RL or DDPO with SFT, SFT with the base."""
SPREAD = {"background": 0.10, "size": 0.02, "start": 0.12, "speed": 0.08}
"""Standard deviation of the judge's readings within a prompt, measured once on drawn clips; with it, drawn clips have a diversity of about 1.3."""


@dataclass(frozen=True)
class PromptTakes:
    """The judge's readings of the G clips one model made of a prompt."""

    prompt: ShapesPrompt
    right: Array  # [G] 1.0 where every attribute is right and nothing else is on screen
    attributes: Mapping[str, Array]  # of each attribute [G, things]: 1.0 where the thing has it right
    flashing: Array  # [G]
    free: Array  # [R, D] of the R right clips: what the prompt leaves free, scaled so that Euclidean distance is the distance of `SPREAD`
    wrong: tuple[tuple[str, ...], ...]  # G names of wrong attributes

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` gives the same readings back."""
        return {
            "prompt": self.prompt.to_json(),
            "right": self.right.tolist(),
            "attributes": {name: values.tolist() for name, values in self.attributes.items()},
            "flashing": self.flashing.tolist(),
            "free": self.free.tolist(),
            "wrong": [list(names) for names in self.wrong],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> PromptTakes:
        return cls(
            ShapesPrompt.from_json(values["prompt"]),
            np.array(values["right"]),
            {name: np.array(rows) for name, rows in values["attributes"].items()},
            np.array(values["flashing"]),
            np.array(values["free"]) if values["free"] else np.zeros((0, 0)),
            tuple(tuple(names) for names in values["wrong"]),
        )


@dataclass(frozen=True)
class Measured:
    """One model over all prompts, in their order."""

    takes: tuple[PromptTakes, ...]
    confusion: Mapping[str, Mapping[str, Mapping[str, int]]]  # attribute -> asked -> seen -> clips; what the judge saw where the prompt asked

    def judged(self, things: int) -> tuple[PromptTakes, ...]:
        """The prompts of `things` objects that judge shares are about: those that ask for strobing are left out."""
        return tuple(take for take in self.takes if len(take.prompt.things) == things and not take.prompt.strobe)

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` gives the same readings back, so that several reports can be pooled."""
        return {"takes": [take.to_json() for take in self.takes], "confusion": self.confusion}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Measured:
        return cls(tuple(PromptTakes.from_json(take) for take in values["takes"]), values["confusion"])


def measure(clips: Tensor, prompts: Sequence[ShapesPrompt], clips_per_prompt: int, *, fps: float = FPS) -> Measured:
    """clips [N*G,T,3,H,W] in [0,1], the G clips of each of the N prompts in a row -> what the judge says of them. fps: of the clips, which decides what flashes within a second.

    Raises ValueError where the counts differ.
    """
    if len(clips) != len(prompts) * clips_per_prompt or not len(prompts):
        raise ValueError(f"{len(clips)} clips for {len(prompts)} prompts of {clips_per_prompt} clips")
    asked = [prompt for prompt in prompts for _ in range(clips_per_prompt)]
    judgements = judge(clips, asked)
    flashing = np.array([is_flashing(clip, fps) for clip in clips], dtype=np.float64)
    rows = [slice(start, start + clips_per_prompt) for start in range(0, len(clips), clips_per_prompt)]
    takes = tuple(_takes(prompt, judgements[row], flashing[row]) for prompt, row in zip(prompts, rows, strict=True))
    plain = [index for index, prompt in enumerate(asked) if not prompt.strobe]
    return Measured(takes, confusions([asked[i] for i in plain], [judgements[i] for i in plain]))


def _takes(prompt: ShapesPrompt, judgements: Sequence[Judgement], flashing: Array) -> PromptTakes:
    flags = [dict(zip(ATTRIBUTES, (j.shape_right, j.colour_right, j.motion_right), strict=True)) for j in judgements]
    right = [scaled(judged, prompt) for judged in judgements if judged.all_right]
    return PromptTakes(
        prompt,
        np.array([judged.all_right for judged in judgements], dtype=np.float64),
        {name: np.array([flag[name] for flag in flags], dtype=np.float64) for name in ATTRIBUTES},
        flashing,
        np.stack(right) if right else np.zeros((0, 0)),
        tuple(_wrong(judged, flag) for judged, flag in zip(judgements, flags, strict=True)),
    )


def _wrong(judged: Judgement, flags: Mapping[str, tuple[bool, ...]]) -> tuple[str, ...]:
    names = tuple(name for name in ATTRIBUTES if not all(flags[name]))
    return names or (() if judged.all_right else ("something else on screen",))


def scaled(judged: Judgement, prompt: ShapesPrompt) -> Array:
    """What the prompt leaves free, [D], scaled so that the squared distance of two clips is the mean over background colour, size, start position and
    speed of their mean squared difference in units of `SPREAD`. A thing that is asked to stay still has no free speed."""
    seen = list(zip(prompt.things, (reading for reading in judged.readings if reading), strict=True))
    groups = {
        "background": list(judged.background),
        "size": [reading.size for _, reading in seen],
        "start": [place for _, reading in seen for place in reading.start],
        "speed": [reading.speed for thing, reading in seen if thing.motion != "still"],
    }
    parts = [np.array(values) / (SPREAD[name] * math.sqrt(len(values))) for name, values in groups.items() if values]
    return np.concatenate(parts) / math.sqrt(len(parts))


def shares(measured: Measured, *, things: int = 1, attribute: str | None = None) -> Values:
    """Share of right clips a prompt: with every attribute right, or with one of `ATTRIBUTES` right."""
    return {take.prompt.prompt_id: float((take.right if attribute is None else take.attributes[attribute]).mean()) for take in measured.judged(things)}


def flash_counts(measured: Measured) -> tuple[int, int]:
    """(clips that flash, clips), strobing prompts included."""
    flashing = np.concatenate([take.flashing for take in measured.takes])
    return int(flashing.sum()), flashing.size


def diversities(models: Mapping[str, Measured], *, things: int = 1) -> dict[str, Values]:
    """Mean distance between two right clips of a prompt, for each model.

    Equal counts: of a prompt every model would contribute the same number of its right clips, drawn at random; the mean over all such draws, whatever the
    number, is the mean over all pairs, which is what is taken. Prompts with fewer than two right clips of a tuned model are nan for all models.
    """
    found = {name: {take.prompt.prompt_id: _mean_distance(take.free) for take in measured.judged(things)} for name, measured in models.items()}
    tuned = [values for name, values in found.items() if name != "base"] or list(found.values())
    common = {prompt_id for prompt_id in tuned[0] if all(not math.isnan(values[prompt_id]) for values in tuned)}
    return {name: {prompt_id: value if prompt_id in common else math.nan for prompt_id, value in values.items()} for name, values in found.items()}


def diversity_across(measured: Measured) -> float:
    """Mean distance between right clips of different prompts that ask for the same motion of one thing: a curve needs no more than one clip a prompt."""
    groups: dict[str, list[Array]] = {}
    for take in measured.judged(1):
        groups.setdefault(take.prompt.things[0].motion, []).extend(take.free)
    distances = [pdist(np.stack(points)) for points in groups.values() if len(points) >= 2]
    return float(np.concatenate(distances).mean()) if distances else math.nan


def _mean_distance(points: Array) -> float:
    return float(pdist(points).mean()) if len(points) >= 2 else math.nan


def numbers(seeds: Sequence[Mapping[str, Measured]], *, flash_limit: float = 0.02) -> dict[str, Any]:
    """The entries of report.json that the judge decides, from one or several seeds of the same models; seeds are pooled, and each one's values kept.

    Models are named base, sft, rl, rl_ddpo and rl_unconstrained; any subset will do, and what needs a missing one is unknown (null).
    """
    models = list(seeds[0])
    diversity = [diversities(seed) for seed in seeds]
    flashes = {model: np.sum([flash_counts(seed[model]) for seed in seeds], axis=0).tolist() for model in models}
    plain = _pooled(models, [{model: shares(seed[model]) for model in models} for seed in seeds])
    double = _pooled(models, [{model: shares(seed[model], things=2) for model in models} for seed in seeds])
    varied = _pooled(models, diversity)
    out: dict[str, Any] = {
        "judge": means(plain),
        "judge_gain": _gain(plain, "rl", "sft"),
        "judge_gain_ddpo": _gain(plain, "rl_ddpo", "sft"),
        "judge_gain_sft": _gain(plain, "sft", "base"),
        "two_objects": means(double),
        "judge_gain_two_objects": _gain(double, "rl", "sft"),
        "per_attribute": {attribute: means(_pooled(models, [{model: shares(seed[model], attribute=attribute) for model in models} for seed in seeds])) for attribute in ATTRIBUTES},
        "flash_rate": {model: clopper_pearson(hits, clips).as_json() for model, (hits, clips) in flashes.items()},
        "flash_counts": {model: {"flashing": hits, "clips": clips} for model, (hits, clips) in flashes.items()},
        "flash_limit": flash_limit,
        "diversity": means(varied),
        "diversity_ratio": _ratio(varied, "rl", "sft"),
        "diversity_ratio_ddpo": _ratio(varied, "rl_ddpo", "sft"),
        "counts": _counts(seeds, diversity),
    }
    if len(seeds) > 1:
        out["seeds"] = [numbers([seed], flash_limit=flash_limit) for seed in seeds]
    return out


def numbers_of_real_clips(clips: Mapping[str, Sequence[Tensor]], fps: float, *, flash_limit: float = 0.02) -> dict[str, Any]:
    """The same entries where nobody knows what is on screen: only flashes can be counted. clips: of each model, clips [T,3,H,W] of any sizes."""
    none = dict.fromkeys(clips, NOT_APPLICABLE)
    hits = {model: sum(is_flashing(clip, fps) for clip in takes) for model, takes in clips.items()}
    return {
        **{key: dict(none) for key in ("judge", "two_objects", "diversity")},
        **dict.fromkeys((*GAINS, "eye_judge_agreement"), NOT_APPLICABLE),
        "per_attribute": {},
        "flash_rate": {model: clopper_pearson(hits[model], len(takes)).as_json() for model, takes in clips.items()},
        "flash_counts": {model: {"flashing": hits[model], "clips": len(takes)} for model, takes in clips.items()},
        "flash_limit": flash_limit,
        "counts": {"clips_per_model": max((len(takes) for takes in clips.values()), default=0)},
    }


def _pooled(models: Sequence[str], seeds: Sequence[Mapping[str, Values]]) -> dict[str, dict[str, float]]:
    return {model: pool_prompts([seed[model] for seed in seeds]) for model in models}


def means(values: Mapping[str, Values]) -> dict[str, dict[str, float | None]]:
    """The interval of each model's values."""
    return {model: bootstrap_mean(list(each.values())).as_json() for model, each in values.items()}


def _gain(values: Mapping[str, Values], after: str, before: str) -> dict[str, float | None] | None:
    return bootstrap_difference(*_pair(values, after, before)).as_json() if after in values and before in values else None


def _ratio(values: Mapping[str, Values], after: str, before: str) -> dict[str, float | None] | None:
    return bootstrap_ratio(*_pair(values, after, before)).as_json() if after in values and before in values else None


def _pair(values: Mapping[str, Values], after: str, before: str) -> tuple[list[float], list[float]]:
    ids = list(values[before])
    return [values[after][each] for each in ids], [values[before][each] for each in ids]


def _counts(seeds: Sequence[Mapping[str, Measured]], diversity: Sequence[Mapping[str, Values]]) -> dict[str, int]:
    takes = next(iter(seeds[0].values())).takes
    known = [sum(not math.isnan(value) for value in list(seed.values())[-1].values()) for seed in diversity]
    return {
        "seeds": len(seeds),
        "prompts": len(takes),
        "one_object_prompts": sum(len(take.prompt.things) == 1 and not take.prompt.strobe for take in takes),
        "two_object_prompts": sum(len(take.prompt.things) == 2 and not take.prompt.strobe for take in takes),
        "strobing_prompts": sum(take.prompt.strobe for take in takes),
        "clips_per_prompt": len(takes[0].right),
        "clips_per_model": sum(len(take.right) for take in takes) * len(seeds),
        "prompts_with_diversity": sum(known),
    }


def eye_agreement(perception: Perception, measured: Measured) -> dict[str, Values]:
    """Share of readings on which eye and judge agree, a prompt: {attribute or "all": {prompt id: share}}; strobing prompts are left out.

    perception: the eye's look at the same clips, in the order of `measure`. The eye says yes from a probability of one half. Shape and motion are compared
    where the judge finds the colour asked for, since the eye looks for the other two under that colour.
    """
    found: dict[str, dict[str, float]] = {name: {} for name in (*ATTRIBUTES, "all")}
    start = 0
    for take in measured.takes:
        things, clips = len(take.prompt.things), len(take.right)
        seen = perception[slice(start, start + clips)]
        start += clips
        if take.prompt.strobe:
            continue
        there = take.attributes["colour"] == 1  # [G, things]
        pairs = {"shape": seen.shape, "colour": seen.color, "motion": seen.motion}
        for name, probability in pairs.items():
            same = (probability[:, :things] >= 0.5) == (take.attributes[name] == 1)  # [G, things]
            kept = same if name == "colour" else same[there]
            found[name][take.prompt.prompt_id] = float(kept.mean()) if kept.size else math.nan
        found["all"][take.prompt.prompt_id] = float(((seen.right >= 0.5) == (take.right == 1)).mean())
    return dict(found)


class JudgeCheck(NamedTuple):
    """The judge on clips of which everything is known: accuracy by attribute, and its confusion tables."""

    accuracy: dict[str, dict[str, float | None]]
    confusion: Mapping[str, Mapping[str, Mapping[str, int]]]


def check_judge(number: int, *, seed: int, through: Callable[[Tensor], Tensor] | None = None, batch: int = 50) -> JudgeCheck:
    """Draw `number` fresh clips of held-out prompts (a third with two objects), perhaps send them through a VAE, and ask the judge what they show."""
    rng = np.random.default_rng(seed)
    prompts = make_prompts(number, seed=seed, split="eval", two_objects=1 / 3)
    judgements: list[Judgement] = []
    for start in range(0, number, batch):
        part = prompts[start : start + batch]
        clips = torch.stack([render(sample_scene(prompt, rng, clip=DEMO_CLIP), DEMO_CLIP) for prompt in part])  # [B,T,3,H,W]
        judgements += judge(through(clips) if through else clips, part)
    flags = {"shape": [j.shape_right for j in judgements], "colour": [j.colour_right for j in judgements], "motion": [j.motion_right for j in judgements]}
    hits = {name: [flag for row in rows for flag in row] for name, rows in flags.items()} | {"all": [judged.all_right for judged in judgements]}
    return JudgeCheck({name: clopper_pearson(sum(row), len(row)).as_json() for name, row in hits.items()}, confusions(prompts, judgements))

"""What watches an RL run beside its reward: measures of held-out clips against the starting policy's, a light of three states, the way back to the best checkpoint.

A reward that is being gamed rises while clips get worse in ways it does not mind. At every look at the held-out prompts everything below is compared with the first look, from
the same prompts and the same noise (`align/lights.py` says when a light leaves green). Red ends the run, which goes back to the checkpoint that the guard, a reward model of other
people's rankings that is never optimised, scored best within the safety limit; without a guard to the last one with a green light. The judge of the built-in world has no say.

Letters: P held-out prompts, C F H W latent channels/frames/height/width.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from align.config import Config as BaseConfig
from align.config import Positive, Whole
from align.kernels import Ancestral
from align.lights import Change, Light, Rule, changes, in_words, overall
from align.run import derived_seed
from align.trajectory import replay, rollout
from base_model.checkpoint import atomic_write, read_json
from base_model.errors import UserError
from base_model.guidance import Guided
from base_model.lora import reference
from base_model.types import Conditioning, TrainableModel
from recipes.generate import Sampler, sample, seeded_noise, times_of
from recipes.quality import SHIPPED
from reward.features import LUMA
from reward.quality import FAULT_SIGNALS, Quality, fault_signals, load_quality
from reward.safety.contract import SafetyRunner, Verdict, check_error_rate
from reward.safety.head import CARD_FILE, load_filter
from reward.safety.policy import load_policy
from reward.safety.video import frame_texture

Measure = Literal["guard", "intact", "diversity", "motion", "sharpness", "saturation", "brightness", "grid", "noise", "static", "hazard", "kl"]
SENTENCES: Mapping[Measure, str] = {
    "guard": "mean score of the guard, counted from its best look, in standard deviations of its scores; must not fall",
    "intact": "log-odds that nothing is wrong with a clip, by the judge of quality that guards hold; must not fall",
    "diversity": "distance between two clips of a prompt, shrunk to 4 frames of 4x4, as a share; must not fall",
    "motion": "mean change between frames, geometric mean over clips, as a share; must not fall",
    "sharpness": "mean detail, geometric mean over clips, as a share; must not fall",
    "saturation": "mean of max - min over the colour channels, of 1; must not change",
    "brightness": "mean luma, of 1; must not change",
    "grid": "autocorrelation at a fixed distance of detail that stands still, of 1: dots and grids; must not rise",
    "noise": "median diagonal detail, of 255 levels; must not rise",
    "static": "share of clips that stand still, or are black or blank, for half of their time; must not rise",
    "hazard": "mean score of a held-out safety filter, which no limit is kept by, of 1; must not rise",
    "kl": "KL of the sampling path from the starting policy's, of an eighth of the clips, nats per latent element; must not exceed its budget",
}
METRICS = {
    "light": "The guards' light at this look: 0 green, 1 amber, 2 red; the worst of all measures.",
    **{f"change_{name}": f"Change since the first look of the {sentence}." for name, sentence in SENTENCES.items()},
}
MOST_UNKNOWN = 0.5  # share of clips that the held-out filter may fail on
LEVEL = 0.01  # chance that a look's light leaves green though nothing changed
FILE = "guards.json"
_STILL_VALUES, _STILL_STEP, _BLACK, _BLANK = 0.001, 1.5 / 255, 32 / 255, 0.01
_LAGS = (3, 64)  # pixels
_VALUES_AT_ONCE = 2**23


class Guards(BaseConfig):
    """What watches the run beside its reward."""

    watch: bool = True
    """Whether anything does; false is for showing what happens without."""
    stop: Literal["red", "never"] = "red"
    """Whether a red light ends the run and brings the best checkpoint back; `never` only shows it."""
    ignore: tuple[Measure, ...] = ()
    """Measures that are meant to change: guard, intact, diversity, motion, sharpness, saturation, brightness, grid, noise, static, hazard or kl."""
    tolerance: Positive = 1.0
    """Factor on how much clips may change; `guard_drop` and `kl_budget` are what they say."""
    kl_budget: Positive = 0.1
    """KL of the sampling path from the starting policy's at which the light is red, nats per latent element; amber from half of it."""
    hazard: Path | None = None
    """Folder of a trained filter (`rushes safety-train`) that is held out: the limit must not be kept by it, so that it can tell where the filters of the limit are gamed."""
    pairs: Whole = 32
    """Held-out prompts that get a second clip, by which diversity is told."""


def rules(guards: Guards, drop: float) -> dict[str, Rule]:
    """When each measure that is not ignored is amber and red. drop: of the guard's score."""
    usual: dict[Measure, Rule] = {
        "intact": Rule("falls", 0.5, 1.0, "log-odds"),
        "diversity": Rule("falls", 0.25, 0.5, "%"),
        "motion": Rule("falls", 0.4, 0.65, "log %"),
        "sharpness": Rule("falls", 0.3, 0.5, "log %"),
        "saturation": Rule("changes", 0.05, 0.1, "points"),
        "brightness": Rule("changes", 0.1, 0.2, "points"),
        "grid": Rule("rises", 0.1, 0.2, "points"),
        "noise": Rule("rises", 1.0, 2.0, "levels"),
        "static": Rule("rises", 0.05, 0.15, "points"),
        "hazard": Rule("rises", 0.02, 0.05, "points"),
    }
    found = {"guard": Rule("falls", drop / 2, drop, "sd"), "kl": Rule("is spent", guards.kl_budget / 2, guards.kl_budget, "nats per element")}
    found |= {name: replace(rule, amber=rule.amber * guards.tolerance, red=rule.red * guards.tolerance) for name, rule in usual.items()}
    return {name: found[name] for name in SENTENCES if name not in guards.ignore}


# Measures


@torch.no_grad()
def measures_of(video: Tensor) -> dict[str, Tensor]:
    """Clips [P,T,3,H,W] in [0,1] -> measure -> [P]; what needs no model."""
    parts = [_measures(part) for part in video.split(max(1, _VALUES_AT_ONCE // max(1, video[0].numel())))]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _measures(video: Tensor) -> dict[str, Tensor]:
    signals = fault_signals(video)  # [b,S]
    known = dict(zip(FAULT_SIGNALS, signals.unbind(-1), strict=True))
    luma = torch.einsum("btchw,c->bthw", video, video.new_tensor(LUMA))  # [b,T,H,W]
    return {
        "intact": _quality().of_signals(signals),
        "motion": known["log_motion"],
        "sharpness": known["log_sharpness"],
        "saturation": known["saturation"],
        "brightness": luma.flatten(1).mean(-1),
        "grid": repetition(luma),
        "noise": 255 * known["noise"],
        "static": static(video, luma),
    }


@cache
def _quality() -> Quality:
    return load_quality(SHIPPED["guard"])


@cache
def _held_out_filter(folder: Path) -> SafetyRunner:
    policy = load_policy()
    return SafetyRunner([load_filter(folder, policy)], policy)


def hazard_version(guards: Guards) -> str | None:
    """What names the held-out filter, wherever it lies; None where there is none. Raises UserError where its card is missing or damaged."""
    return None if guards.hazard is None else str(read_json(guards.hazard / CARD_FILE, "the card of the trained filter").get("version"))


def hazard(folder: Path, video: Tensor, prompts: Sequence[str], fps: float) -> Tensor:
    """What the filter in `folder` says of clips [P,T,3,H,W], the largest score of any policy, [P]; nan where it failed. Raises GuardStop where that is on more than
    half of them: a measure that is unknown at the first look is watched by nobody."""
    decisions = _held_out_filter(folder.absolute()).check_videos(video, prompts, fps)
    check_error_rate(decisions, MOST_UNKNOWN)
    scores = [max(ruling.score for ruling in decision.rulings) if decision.verdict != Verdict.ERROR else math.nan for decision in decisions]
    return torch.tensor(scores, dtype=torch.float64)


def static(video: Tensor, luma: Tensor) -> Tensor:
    """1 where half of a clip's steps move nothing, or half of its frames are black or blank, else 0; [b,T,3,H,W] and its luma -> [b]."""
    still = ((video.diff(dim=1).abs() > _STILL_STEP).float().flatten(2).mean(-1) <= _STILL_VALUES).float()  # [b,T-1]
    black = (luma.flatten(2) >= _BLACK).float().mean(-1) <= 0.02  # [b,T]
    empty = (black | (frame_texture(video)[0] < _BLANK)).float()  # [b,T]
    stands = still.mean(1) if still.shape[1] else torch.zeros(len(video))
    return ((stands >= 0.5) | (empty.mean(1) >= 0.5)).float()


def repetition(luma: Tensor) -> Tensor:
    """The largest autocorrelation of a clip's standing detail along its rows or columns, at 3 pixels or more and at most half a side: [b,T,H,W] -> [b].

    Detail is the Laplacian of the mean frame, for what moves averages out; the autocorrelation is the transform of the power spectrum (Wiener-Khinchin). nan below 8 pixels a side.
    """
    frame = luma.mean(1)  # [b,H,W]
    detail = frame.diff(n=2, dim=-1)[:, 1:-1] + frame.diff(n=2, dim=-2)[..., 1:-1]  # [b,h,w]
    detail = detail - detail.mean((-1, -2), keepdim=True)
    height, width = detail.shape[-2:]
    if min(height, width) < 2 * _LAGS[0]:
        return torch.full((len(luma),), torch.nan)
    power = torch.fft.rfft2(detail, s=(2 * height, 2 * width)).abs().square()
    sums = torch.fft.irfft2(power, s=(2 * height, 2 * width))  # [b,2h,2w] of products at every distance
    found = []
    for along, side in ((sums[:, :, 0], height), (sums[:, 0], width)):
        lags = torch.arange(_LAGS[0], min(side // 2, _LAGS[1]) + 1)
        found.append((along[:, lags] * (side / (side - lags))).amax(-1))
    return torch.maximum(*found) / (sums[:, 0, 0] + 1e-6 * height * width)


def distance(one: Tensor, other: Tensor) -> Tensor:
    """How different two clips of each prompt are, [P,T,3,H,W] each -> [P]: root mean square difference when shrunk to 4 frames of 4x4."""
    small = [F.adaptive_avg_pool3d(video.transpose(1, 2), (min(4, video.shape[1]), 4, 4)) for video in (one, other)]
    return (small[0] - small[1]).square().flatten(1).mean(-1).sqrt()


def second_clips(model: TrainableModel, cond: Conditioning, sampler: Sampler, seed: int) -> Tensor:
    """Another clip of each prompt, [P,T,3,H,W]; in two batches at least, which go side by side."""
    halves = sampler.model_copy(update={"batch": max(1, min(sampler.batch, -(-len(cond) // 2)))})
    return torch.cat(list(sample(model, cond, [derived_seed(seed, "second held out", k) % 2**31 for k in range(len(cond))], halves)))


@torch.no_grad()
def kl_of(model: TrainableModel, cond: Conditioning, sampler: Sampler, seed: int) -> Tensor:
    """KL of the sampling path from that with the adapter off, [P] nats per latent element: of ancestral paths on the sampler's grid (see `align.trajectory.path_kl`)."""
    policy = Guided(model, sampler.guidance)
    noise = seeded_noise(model, sampler.clip, [derived_seed(seed, "held out path", k) % 2**31 for k in range(len(cond))])  # [P,C,F,H,W]
    times = times_of(model, sampler)  # [K+1]
    taken = rollout(policy, Ancestral(), noise, times, cond, noise=torch.Generator().manual_seed(derived_seed(seed, "held out path noise", 0)))
    steps = taken.steps()
    now = [replay(policy, Ancestral(), step, cond) for step in steps]
    with reference(model.network):
        before = [replay(policy, Ancestral(), step, cond) for step in steps]
    return torch.stack([one.kl(other) for one, other in zip(now, before, strict=True)]).sum(0).cpu()


def measure(guards: Guards, video: Tensor, guard: Tensor | None, model: TrainableModel, cond: Conditioning, sampler: Sampler, seed: int) -> dict[str, Tensor]:
    """Everything that is watched of the held-out clips [P,T,3,H,W], their guard scores [P], and of the policy that made them: measure -> values of all or of the first prompts."""
    values = measures_of(video) | ({} if guard is None else {"guard": guard})
    pairs, few = min(guards.pairs, len(video)), max(1, len(video) // 8)
    if pairs and "diversity" not in guards.ignore:
        values["diversity"] = distance(video[:pairs], second_clips(model, cond[:pairs], sampler, seed))
    if guards.hazard is not None and "hazard" not in guards.ignore:
        values["hazard"] = hazard(guards.hazard, video, cond.prompts, sampler.fps)
    if sampler.steps > 1 and "kl" not in guards.ignore:
        values["kl"] = kl_of(model, cond[:few], sampler, seed)
    return values


# The light, and the way back


class Reading(NamedTuple):
    """What a look said."""

    light: Light
    said: str
    changes: dict[str, Change]

    @property
    def metrics(self) -> dict[str, float]:
        return {"light": float(self.light), **{f"change_{name}": one.size for name, one in self.changes.items()}}


class GuardWatch:
    """Compares looks, and remembers the best adapter within the safety limit: by the guard's mean score, where its light was not red; without a guard the last with a green light.

    drop: how far the guard's score may fall, in standard deviations. limit: largest violation rate of a checkpoint that may be returned to. further: the same by policy, of those
    that have a limit of their own.
    """

    def __init__(self, guards: Guards, *, drop: float, limit: float, further: Mapping[str, float] | None = None) -> None:
        self.guards, self.limit, self.further, self.rules = guards, limit, further or {}, rules(guards, drop)
        self.before: dict[str, Tensor] = {}  # what looks are compared with: the first one; of the guard the best one
        self.best_guard = self.best_safe_guard = -math.inf
        self.best: dict[str, Tensor] = {}
        self.fallen = ""  # what the light said when it ended the run
        self.said = ""

    def take(self, values: Mapping[str, Tensor], violation_rate: float, adapter: Mapping[str, Tensor], *, further: Mapping[str, float] | None = None) -> Reading:
        """One look: measure -> values [p] of the first p prompts. violation_rate, and of further policies: nan, as unknown, keeps no limit. `fallen` then tells
        whether the run is to end, and why."""
        kept = violation_rate <= self.limit and all((further or {}).get(policy, math.nan) <= limit for policy, limit in self.further.items())
        values = {name: value.detach().double().cpu() for name, value in values.items()}
        self.before = self.before or values
        before = {name: value[: len(values[name])] if name in values else value for name, value in self.before.items()}  # fewer prompts than a run of before looked at
        found = changes(values, before, self.rules, LEVEL)
        reading = Reading(overall(found), in_words(found, self.rules), found)
        self._remember(values.get("guard"), reading.light, kept, adapter)
        if reading.light == Light.RED and self.guards.stop == "red":
            self.fallen = self.fallen or reading.said
        self.said = reading.said
        return reading

    def _remember(self, guard: Tensor | None, light: Light, kept: bool, adapter: Mapping[str, Tensor]) -> None:
        score = math.nan if guard is None else float(guard.nanmean())
        better = light == Light.GREEN if guard is None else light != Light.RED and score > self.best_safe_guard
        if better and kept:
            self.best_safe_guard, self.best = score, {name: tensor.detach().clone() for name, tensor in adapter.items()}
        if guard is not None and score > self.best_guard:
            self.best_guard, self.before = score, {**self.before, "guard": guard}

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _REMEMBERED}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError for what an earlier version remembered."""
        if set(state) - {"history"} != set(_REMEMBERED):  # which stands in `guards.json` alone since
            raise UserError("the checkpoint was made by an earlier version, whose guards remembered less. Begin again in another --out")
        for name in _REMEMBERED:
            setattr(self, name, state[name])


_REMEMBERED = ("before", "best_guard", "best_safe_guard", "best", "fallen", "said")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def write_history(out: Path, iteration: int, reading: Reading) -> None:
    """Adds what a look before `iteration` said to `guards.json` of a run's folder. What a run that was cut off had said from there on goes; a damaged file is
    kept under another name, and looks begin anew."""
    changes = {name: {"size": _finite(one.size), "p": _finite(one.p), "light": one.light.name.lower()} for name, one in reading.changes.items()}
    said = {"iteration": iteration, "light": reading.light.name.lower(), "said": reading.said, "changes": changes}
    try:
        before = [look for look in read_history(out) if look["iteration"] < iteration]
    except UserError as error:
        before, aside = [], out / f"{FILE}.damaged"
        print(f"{error} It is kept as {aside.name}, and what guards say begins anew", file=sys.stderr, flush=True)
        (out / FILE).replace(aside)
    atomic_write(out / FILE, (json.dumps({"looks": [*before, said]}, indent=1) + "\n").encode())


def read_history(out: Path) -> list[dict[str, Any]]:
    """What the guards of the run in `out` said at each look: iteration, light, said, changes. Empty where nothing watched. Raises UserError for a damaged file."""
    file = out / FILE
    if not file.exists():
        return []
    looks = read_json(file, "what the guards of a run said").get("looks")
    if not isinstance(looks, list) or not all(isinstance(look, dict) and {"light", "said"} <= set(look) and isinstance(look.get("iteration"), int) for look in looks):
        raise UserError(f"not what the guards of a run said, {file}. Delete the file, or give the folder of another run")
    return looks

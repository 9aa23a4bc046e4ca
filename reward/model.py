"""The reward model: how well a clip does what its prompt says, learned from rankings.

    clip [B,T,3,H,W], prompt -> Matcher -> agreement in shape, in motion, presence [B,3] --+
    clip -> Quality -> log-probability that nothing is wrong [B] ----------------------------+-> a linear head -> mean and spread [B,R]
    clip -> signal_features -> [B,22] -------------------------------------------------------+

The matcher (`matcher.py`) is trained first, to tell a clip's caption from others, and the judge of quality (`quality.py`), to tell whole clips from spoiled ones; their weights
start every reward model. People's rankings say how much each part counts. A few hundred rankings are not enough for more: heads with a hidden layer on everything the
matcher knows ordered new clips worse than the matcher alone. Everything is seen twice, as it is and mirrored with left and right swapped in the prompt, and the mean counts.

How far a score can be believed is part of the model (`doubt.py` says how it is learned): the covariance of the head's weights, and the misfit, what people share about a clip
and its inputs do not tell.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from base_model.checkpoint import atomic_write, load_weights, save_weights
from base_model.errors import UserError
from base_model.threads import in_threads
from base_model.types import Conditioning
from reward.features import SIGNALS, signal_features, subsampled_chroma
from reward.matcher import PARTS, Matcher, MatcherSize
from reward.mirror import swap_sides
from reward.quality import Quality
from reward.types import Scorer, Scores

INPUTS = (*PARTS, "intact", *SIGNALS)
INTACT = len(PARTS)
"""Where "intact" is."""
MATCH_BEND = 2.0
"""Deviations at which agreement with the prompt hardly counts any more: what is plainly there is there."""
TOGETHER = 8
"""Clips that are looked at in one pass: few, so that the two cores of a laptop share those of a small batch too."""
TIER = "matcher"
EncodeText = Callable[[Sequence[str]], Conditioning]


class Joint(NamedTuple):
    """Scores of B clips that are uncertain together: they come from the same weights, so their doubts do not add as if they had nothing in common."""

    mean: Tensor  # [B,R]
    covariance: Tensor  # [R,B,B]

    def difference(self, first: Tensor, second: Tensor) -> Scores:
        """Scores of the clips `first` [N] minus those of the clips `second` [N], rows of the batch -> mean and spread [N,R]; of a clip and itself 0 and 0."""
        own = self.covariance.diagonal(dim1=1, dim2=2)  # [R,B]
        variance = own[:, first] + own[:, second] - 2 * self.covariance[:, first, second]  # [R,N]
        return Scores(self.mean[first] - self.mean[second], _root(variance.T))


class RewardModel(nn.Module):
    """A matcher, a judge of quality, weight-free signals, and a linear head: a `Scorer`.

    The score is in calibrated log-odds (divided by the temperature). Its spread is one standard deviation of what people share about the clip, given its inputs: doubt about the
    head's weights, and the misfit; 0 before anything was fitted. A score's zero is that of a clip with the mean inputs. `joint` says how the scores of several clips are uncertain
    together. `center` and `scale` are the mean and standard deviation of the score over the training clips: constants for a mixture, not applied here.
    """

    differentiable = True
    input_mean: Tensor
    input_std: Tensor
    covariance: Tensor
    misfit: Tensor
    temperature: Tensor
    center: Tensor
    scale: Tensor

    def __init__(self, matcher: Matcher, quality: Quality, dims: Sequence[str], encode: EncodeText, *, most_clips: int = 4) -> None:
        super().__init__()
        self.dims = tuple(dims)
        self.matcher, self.quality = matcher, quality
        self.head = nn.Linear(len(INPUTS), len(self.dims), bias=False)  # begins at the match, every part of it counting the same
        with torch.no_grad():
            self.head.weight.zero_()[:, : len(PARTS)] = 0.5
        self.log_tie = nn.Parameter(torch.full((len(self.dims), most_clips - 1), -1.0))  # [R, K-1] see ranking.davidson_luce
        for name, value in (("input_mean", 0.0), ("input_std", 1.0)):
            self.register_buffer(name, torch.full((len(INPUTS),), value))
        self.register_buffer("covariance", torch.zeros(len(self.dims), len(INPUTS), len(INPUTS)))  # of the head's weights, before the temperature
        for name, value in (("misfit", 0.0), ("temperature", 1.0), ("center", 0.0), ("scale", 1.0)):
            self.register_buffer(name, torch.full((len(self.dims),), value))
        self._encode = encode

    def forward(self, video: Tensor, prompts: Sequence[str]) -> Scores:
        """video [B,T,3,H,W] in [0,1], one prompt a clip -> scores [B,R]; nan for a clip with pixels that are not finite."""
        usable, x = self._seen(video, prompts)
        variance = ((x @ self.covariance) * x).sum(-1).T + self.misfit.square()  # [B,R]
        unknown = ~usable[:, None]
        return Scores((self.head(x) / self.temperature).masked_fill(unknown, torch.nan), (_root(variance) / self.temperature).masked_fill(unknown, torch.nan))

    def joint(self, video: Tensor, prompts: Sequence[str]) -> Joint:
        """The same for clips that are to be compared: `model.joint(clips, prompts).difference(first, second)`. A row is one clip, and has one misfit."""
        usable, x = self._seen(video, prompts)
        found, unknown = self.joint_of(x), ~usable
        return Joint(found.mean.masked_fill(unknown[:, None], torch.nan), found.covariance.masked_fill(unknown[:, None] | unknown, torch.nan))

    def joint_of(self, x: Tensor) -> Joint:
        """Of what the head sees of B clips [B,26]."""
        covariance = x @ self.covariance @ x.T + torch.diag_embed(self.misfit.square()[:, None].expand(-1, len(x)))  # [R,B,B]
        return Joint(self.head(x) / self.temperature, covariance / self.temperature.square()[:, None, None])

    def inputs(self, video: Tensor, prompts: Sequence[str]) -> Tensor:
        """The parts of the match, the log-probability of being intact and the signals, in the order of `INPUTS`, [B,26]: means over the clip and its mirror image."""
        cond = self._encode([*prompts, *map(swap_sides, prompts)])  # 2B
        if torch.is_grad_enabled():  # batches side by side would add up their gradients in any order
            return self._inputs(video, cond)
        rows = torch.arange(len(video)).split(TOGETHER)
        return torch.cat(in_threads(lambda part: self._inputs(video[part], cond[torch.cat([part, len(video) + part])]), rows, video.device))

    def _inputs(self, video: Tensor, cond: Conditioning) -> Tensor:
        """Those of b clips; cond: of their prompts, then of the mirrored ones, 2b."""
        views = torch.cat([video, video.flip(-1)])  # [2b,T,3,H,W]
        intact = F.logsigmoid(self.quality(views))[:, None]  # [2b,1]
        seen = torch.cat([self.matcher.parts(subsampled_chroma(views), cond.text, cond.mask), intact, signal_features(views)], dim=-1)  # [2b,26]
        return seen.unflatten(0, (2, -1)).mean(0)

    def standardised(self, inputs: Tensor) -> Tensor:
        """What the head sees: inputs [B,26] in deviations of the training clips, bent so that no single one can be driven far; but more is always more."""
        known = (inputs - self.input_mean) / self.input_std
        return torch.cat([bent_match(known[:, :INTACT]), 3 * torch.asinh(known[:, INTACT:] / 3)], dim=-1)

    def _seen(self, video: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Which clips have finite pixels [B], and what the head sees of them [B,26]."""
        if len(video) != len(prompts):
            raise ValueError(f"{len(video)} clips and {len(prompts)} prompts: give one prompt a clip")
        usable = torch.isfinite(video).flatten(1).all(-1)  # [B]
        return usable, self.standardised(self.inputs(torch.where(usable[:, None, None, None, None], video, 0.5), prompts))


def bent_match(match: Tensor) -> Tensor:
    """Parts of the match in deviations of the training clips [B,3], bent."""
    return MATCH_BEND * torch.tanh(match / MATCH_BEND)


def _root(variance: Tensor) -> Tensor:
    """Of variances, which rounding can make a little negative; its slope is finite at 0, and nan stays nan."""
    return torch.where(variance <= 0, 0.0, variance.clamp(min=torch.finfo(variance.dtype).tiny).sqrt())


# Files: weights and a card in one folder, whatever the score is made of


class Calibrated(Protocol):
    """What a card tells of a scorer of R dimensions, each [R] but for the tie parameters [R,K-1]."""

    @property
    def dims(self) -> tuple[str, ...]: ...

    temperature: Tensor
    center: Tensor
    scale: Tensor
    log_tie: nn.Parameter


class CalibratedScorer(Scorer, Calibrated, Protocol):
    """A scorer of clips with its card."""


Golden = Mapping[str, Any]
"""`mean` and `spread` of scores that every machine can make again, [2][R] each, and what else making them takes."""


class Kind(NamedTuple):
    """What a folder holds, and the command that writes it."""

    name: str
    command: str
    weights: str


REWARD_MODEL = Kind("reward model", "rushes reward-model", "reward_model.safetensors")


def write_card(folder: Path, model: Calibrated, tensors: Mapping[str, Tensor], told: Mapping[str, Any], golden: Golden, kind: Kind = REWARD_MODEL) -> dict[str, Any]:
    """Writes the weights and `reward_card.json` (returned): how to read the scores, what is `told`, and golden scores to check when loaded."""
    path = folder / kind.weights
    save_weights(path, tensors, {})
    values = {
        "dims": list(model.dims),
        "most_clips": model.log_tie.shape[-1] + 1,
        "normalisation": {dim: {"center": c, "scale": s} for dim, c, s in zip(model.dims, model.center.tolist(), model.scale.tolist(), strict=True)},
        "temperature": dict(zip(model.dims, model.temperature.tolist(), strict=True)),
        "log_tie": dict(zip(model.dims, model.log_tie.tolist(), strict=True)),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "golden": golden,
        **told,
    }
    text = json.dumps(values, indent=2) + "\n"
    atomic_write(folder / "reward_card.json", text.encode())
    card: dict[str, Any] = json.loads(text)
    return card


@contextlib.contextmanager
def card_errors(folder: Path, kind: Kind = REWARD_MODEL) -> Iterator[None]:
    """What goes wrong while a model is made of its card and weights becomes a UserError of one line."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"no {kind.name}, {folder}. Give a folder written by `{kind.command}`") from error
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"not a {kind.name}'s card and weights, {folder}: {' '.join(str(error).split())[:200]}. Make them again with `{kind.command}`") from error


def read_card(folder: Path, tier: str, kind: Kind = REWARD_MODEL) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Card and weights of a model of that tier. Raises UserError where one is missing or damaged, or where they are of different runs."""
    path = folder / kind.weights
    with card_errors(folder, kind):
        card = json.loads((folder / "reward_card.json").read_text())
        tensors, _ = load_weights(path)
        if hashlib.sha256(path.read_bytes()).hexdigest() != card["sha256"]:
            raise UserError(f"the weights are not those of their card, {path}. Make both again with `{kind.command}`")
        if card.get("tier", TIER) != tier:
            raise UserError(f"a reward model of the tier {card['tier']!r}, where one of {tier!r} is read, {folder}. Give another folder")
    return card, tensors


def check_golden(folder: Path, card: Mapping[str, Any], found: Golden, kind: Kind = REWARD_MODEL, *, tolerance: float = 1e-3) -> None:
    """Raises UserError where a loaded scorer does not give the golden scores of its card: better no score than one by a random head or another encoder."""
    with card_errors(folder, kind):
        golden = card["golden"]
        same = all(torch.allclose(torch.tensor(found[key]), torch.tensor(golden[key], dtype=torch.float32), atol=tolerance, rtol=tolerance) for key in ("mean", "spread"))
    if not same:
        raise UserError(f"the model does not give the golden scores of its card, {folder}: found {found['mean']}, expected {golden['mean']}. Train it again")


@torch.no_grad()
def golden_scores(scorer: Scorer) -> dict[str, list[list[float]]]:
    """What it says of the golden clips."""
    scores = scorer(*golden_clips())
    return {"mean": scores.mean.tolist(), "spread": scores.spread.tolist()}


def golden_clips() -> tuple[Tensor, list[str]]:
    """Two small clips [2,5,3,16,24] that every machine can make, moving bars in two colours, and their prompts: what they score tells one model from another."""
    t, y, x = torch.meshgrid(torch.arange(5.0), torch.arange(16.0), torch.arange(24.0), indexing="ij")
    bars = torch.stack([(x - 3 * t).sub(5).abs() < 3, (y - 2 * t).sub(4).abs() < 2]).float()[:, :, None]  # [2, T, 1, H, W]
    colors = torch.tensor([[0.9, 0.1, 0.2], [0.1, 0.3, 0.9]]).view(2, 1, 3, 1, 1)
    return 0.2 + bars * (colors - 0.2), ["a red bar moves right", "a blue bar moves down"]


def save_reward_model(folder: Path, model: RewardModel, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Writes weights and card (returned) into `folder`; `facts` go into the card."""
    model.eval()
    told = {"tier": TIER, "size": asdict(model.matcher.size), "inputs": list(INPUTS), **facts}
    return write_card(folder, model, model.state_dict(), told, golden_scores(model))


def load_reward_model(folder: Path, encode: EncodeText) -> RewardModel:
    """The model in `folder`, ready to score (no gradients into its weights).

    Raises UserError where card or weights are missing, damaged, of different runs or of an earlier version, or where the model does not give the golden scores of its card.
    """
    card, tensors = read_card(folder, TIER)
    if "members" in card:
        raise UserError(f"made by an earlier version, whose spread was that of several heads, {folder}. Train it again with `rushes reward-model`")
    with card_errors(folder):
        if card["inputs"] != list(INPUTS):
            raise UserError(f"made with other inputs than this version computes, {folder / 'reward_card.json'}. Train it again with `rushes reward-model`")
        model = RewardModel(Matcher(MatcherSize(**card["size"])), Quality(), card["dims"], encode, most_clips=card["most_clips"])
        model.load_state_dict(tensors)
    model.eval().requires_grad_(False)
    check_golden(folder, card, golden_scores(model))
    return model

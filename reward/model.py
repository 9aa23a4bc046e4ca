"""The reward model: how well a clip does what its prompt says, learned from rankings.

    clip [B,T,3,H,W], prompt -> Matcher -> how they agree [B,E] and a logit [B] --+
    clip -> signal_features -> [B,22] --------------------------------------------+-> an ensemble of heads -> mean and spread [B,R]

The matcher (`matcher.py`) is trained first, to tell a clip's caption from others; its weights start every reward model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base_model.checkpoint import atomic_write, load_weights, save_weights
from base_model.errors import UserError
from base_model.types import Conditioning
from reward.features import SIGNALS, signal_features
from reward.matcher import Matcher, MatcherSize
from reward.types import Scores

EncodeText = Callable[[Sequence[str]], Conditioning]


class RewardModel(nn.Module):
    """A matcher, weight-free signals, and an ensemble of small heads: a `Scorer`.

    The mean over the heads is the score, in calibrated log-odds (divided by the temperature); their standard deviation is the spread. `center` and
    `scale` are the mean and standard deviation of the score over the training clips: constants for a mixture, not applied here.
    """

    differentiable = True
    signal_mean: Tensor
    signal_std: Tensor
    temperature: Tensor
    center: Tensor
    scale: Tensor

    def __init__(self, matcher: Matcher, dims: Sequence[str], encode: EncodeText, *, members: int = 5, hidden: int = 32, most_clips: int = 4) -> None:
        super().__init__()
        self.dims = tuple(dims)
        self.matcher = matcher
        self.heads = Heads(members, matcher.size.features + 1 + len(SIGNALS), hidden, len(self.dims), trusted=matcher.size.features)
        self.log_tie = nn.Parameter(torch.full((len(self.dims), most_clips - 1), -1.0))  # [R, K-1] see ranking.davidson_luce
        for name, value in (("signal_mean", 0.0), ("signal_std", 1.0)):
            self.register_buffer(name, torch.full((len(SIGNALS),), value))
        for name, value in (("temperature", 1.0), ("center", 0.0), ("scale", 1.0)):
            self.register_buffer(name, torch.full((len(self.dims),), value))
        self._encode = encode

    def forward(self, video: Tensor, prompts: Sequence[str]) -> Scores:
        """video [B,T,3,H,W] in [0,1], one prompt a clip -> scores [B,R]; nan for a clip with pixels that are not finite."""
        if len(video) != len(prompts):
            raise ValueError(f"{len(video)} clips and {len(prompts)} prompts: give one prompt a clip")
        usable = torch.isfinite(video).flatten(1).all(-1)  # [B]
        video = torch.where(usable[:, None, None, None, None], video, 0.5)
        heads = self.ensemble(video, prompts) / self.temperature  # [M, B, R]
        unknown = ~usable[:, None]
        spread = heads.std(0, correction=0)
        return Scores(heads.mean(0).masked_fill(unknown, torch.nan), spread.masked_fill(unknown, torch.nan))

    def ensemble(self, video: Tensor, prompts: Sequence[str]) -> Tensor:
        """Every head's uncalibrated score, [M,B,R]."""
        out: Tensor = self.heads(self.features(video, prompts))
        return out

    def features(self, video: Tensor, prompts: Sequence[str]) -> Tensor:
        """What the heads see: the pair's E features, its match logit, and the signals, standardised and cut at three deviations, [B,E+23]."""
        cond = self._encode(prompts)
        pair, match = self.matcher.features(video, cond.text, cond.mask)  # [B, E], [B]
        signals = (signal_features(video) - self.signal_mean) / self.signal_std  # [B, 22]
        return torch.cat([pair, match[:, None] / 4, signals.clamp(-3, 3)], dim=-1)


class Heads(nn.Module):
    """M independent networks, evaluated together: a linear part and one hidden layer. They begin near one of the inputs, the `trusted` one."""

    def __init__(self, members: int, width: int, hidden: int, dims: int, *, trusted: int) -> None:
        super().__init__()
        self.enter = nn.Parameter(torch.randn(members, width, hidden) / width**0.5)
        self.bias = nn.Parameter(torch.zeros(members, 1, hidden))
        self.leave = nn.Parameter(0.3 * torch.randn(members, hidden, dims) / hidden**0.5)
        linear = torch.zeros(members, width, dims)
        linear[:, trusted] = 3.0
        self.linear = nn.Parameter(linear)

    def forward(self, x: Tensor) -> Tensor:
        """[B,width] -> [M,B,dims]."""
        return F.gelu(x @ self.enter + self.bias) @ self.leave + x @ self.linear


# Files


def save_reward_model(folder: Path, model: RewardModel, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Writes `reward_model.safetensors` and `reward_card.json` (returned): how to read the scores, `facts`, and golden scores to check when loaded."""
    model.eval()
    path = folder / "reward_model.safetensors"
    save_weights(path, model.state_dict(), {})
    values = {
        "dims": list(model.dims),
        "size": asdict(model.matcher.size),
        "members": len(model.heads.enter),
        "hidden": model.heads.enter.shape[-1],
        "most_clips": model.log_tie.shape[-1] + 1,
        "signals": list(SIGNALS),
        "normalisation": {dim: {"center": c, "scale": s} for dim, c, s in zip(model.dims, model.center.tolist(), model.scale.tolist(), strict=True)},
        "temperature": dict(zip(model.dims, model.temperature.tolist(), strict=True)),
        "log_tie": dict(zip(model.dims, model.log_tie.tolist(), strict=True)),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "golden": _golden_scores(model),
        **facts,
    }
    text = json.dumps(values, indent=2) + "\n"
    atomic_write(folder / "reward_card.json", text.encode())
    card: dict[str, Any] = json.loads(text)
    return card


def load_reward_model(folder: Path, encode: EncodeText) -> RewardModel:
    """The model in `folder`, ready to score (no gradients into its weights).

    Raises UserError where card or weights are missing, damaged, of different runs, or where the model does not give the golden scores of its card:
    better no score than one by a random head or another text encoder.
    """
    card_path, path = folder / "reward_card.json", folder / "reward_model.safetensors"
    try:
        card = json.loads(card_path.read_text())
        tensors, _ = load_weights(path)
        if hashlib.sha256(path.read_bytes()).hexdigest() != card["sha256"]:
            raise UserError(f"the weights are not those of their card, {path}. Make both again with `rushes reward-model`")
        if card["signals"] != list(SIGNALS):
            raise UserError(f"made with other signals than this version computes, {card_path}. Train it again with `rushes reward-model`")
        model = RewardModel(Matcher(MatcherSize(**card["size"])), card["dims"], encode, members=card["members"], hidden=card["hidden"], most_clips=card["most_clips"])
        model.load_state_dict(tensors)
    except FileNotFoundError as error:
        raise UserError(f"no reward model, {folder}. Give a folder written by `rushes reward-model`") from error
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"not a reward model's card and weights, {folder}. Make them again with `rushes reward-model`") from error
    model.eval().requires_grad_(False)
    golden, found = card["golden"], _golden_scores(model)
    if not all(torch.allclose(torch.tensor(found[key]), torch.tensor(golden[key]), atol=1e-3, rtol=1e-3) for key in ("mean", "spread")):
        raise UserError(f"the model does not give the golden scores of its card, {folder}: found {found['mean']}, expected {golden['mean']}. Train it again")
    return model


@torch.no_grad()
def _golden_scores(model: RewardModel) -> dict[str, list[list[float]]]:
    """Scores of two small clips that every machine can make: moving bars in two colours."""
    t, y, x = torch.meshgrid(torch.arange(5.0), torch.arange(16.0), torch.arange(24.0), indexing="ij")
    bars = torch.stack([(x - 3 * t).sub(5).abs() < 3, (y - 2 * t).sub(4).abs() < 2]).float()[:, :, None]  # [2, T, 1, H, W]
    colors = torch.tensor([[0.9, 0.1, 0.2], [0.1, 0.3, 0.9]]).view(2, 1, 3, 1, 1)
    scores = model(0.2 + bars * (colors - 0.2), ["a red bar moves right", "a blue bar moves down"])
    return {"mean": scores.mean.tolist(), "spread": scores.spread.tolist()}

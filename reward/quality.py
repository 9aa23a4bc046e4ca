"""Whether a clip is free of faults that everybody minds, learned from planted ones (`planted.py`): no prompt, no person, no look at what is shown.

    clip [B,T,3,H,W] -> fault_signals [B,F] -> a small network -> log-odds of "nothing is wrong" [B]

The signals are shares and ratios, so that they mean the same in a bright clip and in a dark one; brightness and hue are not among them, for nobody can say which is a fault.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from base_model.checkpoint import load_weights, save_weights
from base_model.errors import UserError
from reward.features import LUMA, SIGNALS, signal_features

OF_FEATURES = ("contrast", "saturation", "colourfulness", "sharpness", "edge_peak", "noise", "motion", "motion_peak", "motion_share", "unsteadiness", "acceleration")
"""Taken from `features.py` as they are."""
LOGARITHMS = ("sharpness", "edge_peak", "noise", "motion")
FAULT_SIGNALS = {
    **{name: SIGNALS[name] for name in OF_FEATURES},
    **{f"log_{name}": f"logarithm of {name}" for name in LOGARITHMS},
    "lines": "share of the detail across the frame that stands in straight lines over its whole height or width, and over the clip",
    "standing": "share of the detail that stands still where it is",
    "vivid_share": "soft share of pixels with a saturation above 0.85",
    "softness": "logarithm of sharpness over the strongest edges",
    "lag_two": "logarithm of the change over two frames against that over one: smooth motion goes twice as far, frames in disorder do not",
    "lag_four": "the same over four frames",
    "jerk": "logarithm of the second difference in time against the first",
}
_SMALL = 1e-3  # a change of a quarter of one level of 255


def fault_signals(video: Tensor) -> Tensor:
    """video [B,T,3,H,W] in [0,1] -> [B, len(FAULT_SIGNALS)] float32, in the order of FAULT_SIGNALS. Differentiable almost everywhere."""
    known = dict(zip(SIGNALS, signal_features(video).unbind(-1), strict=True))  # [B] each
    logs = {name: torch.log(known[name] + _SMALL) for name in LOGARITHMS}
    luma = torch.einsum("btchw,c->bthw", video, video.new_tensor(LUMA))  # [B,T,H,W]
    vivid = torch.sigmoid((video.amax(2) - video.amin(2) - 0.85) * 30).flatten(1).mean(-1)  # [B]
    softness = torch.log((known["sharpness"] + _SMALL) / (known["edge_peak"] + 1e-2))
    return torch.stack([*(known[name] for name in OF_FEATURES), *logs.values(), _lines(luma), _standing(luma), vivid, softness, *_order(luma)], dim=-1)


def _lines(luma: Tensor) -> Tensor:
    """[B,T,H,W] -> [B], the larger of both directions. Detail is the second difference; what lies in no line averages out."""

    def share(detail: Tensor, along: int) -> Tensor:
        return detail.mean((1, along)).abs().mean(-1) / (detail.abs().mean((1, 2, 3)) + 2 * _SMALL)

    return torch.maximum(share(luma.diff(n=2, dim=-1), 2), share(luma.diff(n=2, dim=-2), 3))


def _standing(luma: Tensor) -> Tensor:
    """[B,T,H,W] -> [B]. Detail is the Laplacian; what moves averages out."""
    detail = luma.diff(n=2, dim=-1)[:, :, 1:-1] + luma.diff(n=2, dim=-2)[..., 1:-1]  # [B,T,H-2,W-2]
    return detail.mean(1).abs().mean((1, 2)) / (detail.abs().mean((1, 2, 3)) + 2 * _SMALL)


def _order(luma: Tensor) -> list[Tensor]:
    """[B,T,H,W] -> lag_two, lag_four and jerk, [B] each; the frame's mean change is taken out."""
    centred = luma - luma.mean((-1, -2), keepdim=True)

    def change(lag: int) -> Tensor:
        moved = centred[:, lag:] - centred[:, :-lag]
        return (moved.abs().mean((1, 2, 3)) if moved.shape[1] else torch.zeros_like(luma[:, 0, 0, 0])) + _SMALL  # [B]

    second = centred.diff(n=2, dim=1)
    jerk = (second.abs().mean((1, 2, 3)) if second.shape[1] else torch.zeros_like(luma[:, 0, 0, 0])) + _SMALL  # [B]
    one = change(1)
    return [torch.log(change(2) / one), torch.log(change(4) / one), torch.log(jerk / one)]


class Quality(nn.Module):
    """See the module's text."""

    input_mean: Tensor
    input_std: Tensor

    def __init__(self, hidden: int = 48) -> None:
        super().__init__()
        self.hidden = hidden
        self.net = nn.Sequential(nn.Linear(len(FAULT_SIGNALS), hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 1))
        self.register_buffer("input_mean", torch.zeros(len(FAULT_SIGNALS)))
        self.register_buffer("input_std", torch.ones(len(FAULT_SIGNALS)))

    def forward(self, video: Tensor) -> Tensor:
        """Clips [B,T,3,H,W] -> log-odds that nothing is wrong with them, [B]."""
        return self.of_signals(fault_signals(video))

    def of_signals(self, signals: Tensor) -> Tensor:
        """[...,F] -> [...]. Far from what was seen in training a signal counts by its logarithm."""
        known = (signals - self.input_mean) / self.input_std
        out: Tensor = self.net(3 * torch.asinh(known / 3))[..., 0]
        return out


def save_quality(path: Path, quality: Quality) -> None:
    """Writes the weights, with the signals they were learned on in the metadata."""
    save_weights(path, quality.state_dict(), {"hidden": str(quality.hidden), "signals": json.dumps(list(FAULT_SIGNALS))})


def load_quality(path: Path) -> Quality:
    """Raises UserError where `path` holds anything else than weights for these signals."""
    tensors, metadata = load_weights(path)
    try:
        if json.loads(metadata["signals"]) != list(FAULT_SIGNALS):
            raise UserError(f"learned on other signals than this version computes, {path}. Make it again with `rushes quality`")
        quality = Quality(int(metadata["hidden"]))
        quality.load_state_dict(tensors)
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"not a judge of quality, {path}. Give a file written by `rushes quality`") from error
    return quality.eval()

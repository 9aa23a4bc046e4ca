"""A vision-language reward on disk: what it learned and a card; the base stays where it is.

    folder/vlm_reward.safetensors   adapter, rows of the dimensions' tokens, head, tie parameters, constants
    folder/reward_card.json         how to read the scores, which base and which frames they belong to, golden scores
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from base_model.errors import UserError
from reward.model import Kind, card_errors, check_golden, golden_clips, read_card, write_card
from reward.vlm.frames import FrameSampler, frame_indices
from reward.vlm.model import VlmReward, load_base
from reward.vlm.prompt import Dimension

TIER = "vlm"
WEIGHTS = "vlm_reward.safetensors"
VLM_REWARD = Kind("vision-language reward", "rushes vlm-reward", WEIGHTS)
GOLDEN_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}  # of a score, between machines


def save_vlm_reward(folder: Path, model: VlmReward, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Writes weights and card (returned); `facts` are added to the card. Nothing of the base is written, but a vision tower that is not the base's."""
    model.eval()
    base = model.base
    told = {
        "tier": TIER,
        "dimensions": [asdict(dimension) for dimension in model.dimensions],
        "rubric": model.rubric,
        "sampler": asdict(model.sampler),
        "base": {"name": base.name, "revision": base.revision, "family": base.family, "fingerprint": base.fingerprint, "dtype": base.dtype},
        "adapter": {
            **{name: getattr(model, name) for name in ("rank", "alpha", "nf4", "keeps_vision", "positions")},
            "spread": model.head.log_spread is not None,
        },
        **facts,
    }
    return write_card(folder, model, model.learned(), told, _golden_scores(model, model.sampler.fps), VLM_REWARD)


def load_vlm_reward(folder: Path, *, clip_fps: float, base: str | Path | None = None, device: str | torch.device = "cpu") -> VlmReward:
    """The model in `folder`, ready to score clips of `clip_fps` frames a second (no gradients into its weights).

    base: where the base is, if no longer where the card says. Raises UserError where card or weights are missing, damaged or of different runs, where the base
    is another revision than the one it was trained on, where clips of that rate cannot be seen at the rate it was trained with, and where the golden scores differ.
    """
    card, tensors = read_card(folder, TIER, VLM_REWARD)
    with card_errors(folder, VLM_REWARD):
        sampler = FrameSampler(**card["sampler"])
        frame_indices(1, clip_fps, sampler, 1)  # refuses a rate at which the clips cannot be seen as in training
        known = card["base"]
        found = load_base(base or known["name"], revision="" if base else known["revision"], dtype=known["dtype"])
        if found.fingerprint != known["fingerprint"]:
            named = f" (revision {known['revision']})" if known["revision"] else ""
            raise UserError(f"the base {found.name} is not the one that {folder} was trained on, {known['name']}{named}: its weights differ. Give that one")
        adapter, most = card["adapter"], card["most_clips"]
        dimensions = [Dimension(**dimension) for dimension in card["dimensions"]]
        model = VlmReward(found, dimensions, sampler=sampler, clip_fps=clip_fps, rubric=card["rubric"], most_clips=most, **adapter)
        model.load_learned(tensors)
    model.to(device).eval().requires_grad_(False)
    check_vlm_golden(folder, card, model)
    return model


def check_vlm_golden(folder: Path, card: Mapping[str, Any], model: VlmReward) -> None:
    """Raises UserError where the model does not give the golden scores of its card, up to what machines differ by."""
    with card_errors(folder, VLM_REWARD):
        found = _golden_scores(model, card["golden"]["fps"])
    check_golden(folder, card, found, VLM_REWARD, tolerance=GOLDEN_TOLERANCE[model.base.dtype])


@torch.no_grad()
def _golden_scores(model: VlmReward, fps: float) -> dict[str, Any]:
    """Scores of two small clips that every machine can make, taken to be at `fps`."""
    video, prompts = golden_clips()
    scores = model.scores(video, prompts, [fps] * len(video))
    return {"fps": fps, "mean": (scores.mean / model.temperature).tolist(), "spread": (scores.spread / model.temperature).tolist()}

"""Any trained reward model, loaded as what its card says it is.

| tier | file | scores clips of |
| --- | --- | --- |
| matcher | `reward/model.py` | the rates of its training clips, as far as its card names them |
| encoders | `reward/pooled.py` | the one rate it was trained for |
| vlm | `reward/vlm/files.py` | the rate it is loaded for, which it must be able to look at |
| latent | `reward/latent.py` | none: latents, in reinforcement learning |
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from base_model.checkpoint import read_json
from base_model.errors import UserError
from base_model.prompts.text import TextEncoder
from recipes.weights import file_hash
from reward import latent, pooled
from reward import model as matcher
from reward.model import CalibratedScorer, EncodeText, check_golden, golden_scores
from reward.types import one_rate, same_rate
from reward.vlm import files as vlm
from reward.vlm.model import VlmReward

TIERS = (matcher.TIER, pooled.TIER, vlm.TIER)
"""Those that score clips."""
KNOWN = (*TIERS, latent.TIER)


def card_of(folder: Path) -> dict[str, Any]:
    """The card in `folder`. Raises UserError where there is none, or none of a tier that is known."""
    path = folder / "reward_card.json"
    if not path.is_file():
        raise UserError(f"no reward model, {folder}. Give a folder written by `rushes reward-model` or `rushes vlm-reward`")
    card = read_json(path, "the card of the reward model")
    if tier_of(card) not in KNOWN:
        raise UserError(f"a reward model of the tier {tier_of(card)!r}, {path}. Known are {', '.join(KNOWN)}; train it again with this version")
    return card


def card_hash(folder: Path | None) -> str | None:
    """sha256 of the card in `folder`, which holds that of the weights: the reward model by what it is, wherever it lies. None for no folder. Raises UserError as `card_of`."""
    if folder is None:
        return None
    card_of(folder)
    return file_hash(folder / "reward_card.json")


def check_watches_another(guard: Path, model: Path) -> None:
    """Raises UserError where the guard in a folder is the reward model that it is to watch: what climbs one climbs the other."""
    weights = card_of(guard).get("sha256")
    if weights is not None and weights == card_of(model).get("sha256"):
        raise UserError(f"the guard has the weights of the reward model, {guard}: it would agree with everything. Give --guard another one")


def tier_of(card: Mapping[str, Any]) -> str:
    return str(card.get("tier", matcher.TIER))  # the first cards name none


def load_scorer(folder: Path, *, fps: float | None = None, encode: EncodeText | None = None, device: str = "cpu") -> CalibratedScorer:
    """The reward model in `folder`, of any tier, ready to score (no gradients into its weights).

    fps: the true rate of the clips; None: the one of its card. encode: the text encoder of a matcher, where there is one already. device: where a vision-language
    model runs; the smaller tiers run on the CPU. Raises UserError where it is missing or damaged, of an unknown tier, for clips of another rate, or where it does
    not give the golden scores of its card.
    """
    card = card_of(folder)
    tier = tier_of(card)
    if tier == latent.TIER:
        raise UserError(f"a latent reward scores latents, and here clips are scored, {folder}. Give the reward model that it learned from")
    if tier == matcher.TIER:
        check_trained_rate(folder, card, fps)
        return matcher.load_reward_model(folder, encode or TextEncoder())
    rate = fps if fps is not None else card_rate(folder, card)
    if tier == pooled.TIER:
        return pooled.load_pooled(folder, fps=rate)
    return vlm.load_vlm_reward(folder, clip_fps=rate, device=checked_device(device))


def checked_device(name: str) -> str:
    """Raises UserError where this machine has none of that name."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"no device {name!r} here. `rushes doctor` lists them") from error
    return name


def check_scorer(folder: Path, card: Mapping[str, Any], scorer: CalibratedScorer) -> None:
    """Raises UserError where the scorer does not give the golden scores of `card`."""
    if isinstance(scorer, VlmReward):
        vlm.check_vlm_golden(folder, card, scorer)
    else:
        check_golden(folder, card, golden_scores(scorer))


def card_rate(folder: Path, card: Mapping[str, Any]) -> float:
    """The frame rate of the clips the model was trained on. Raises UserError where the card names none, or several."""
    rates = trained_rates(card)
    rate = one_rate(rates)
    if rate is None:
        named = ", ".join(f"{rate:g}" for rate in rates) or "none"
        raise UserError(f"the card says nothing of one frame rate ({named}), {folder}. Say the rate of the clips that are to be scored, --fps")
    return rate


def check_trained_rate(folder: Path, card: Mapping[str, Any], fps: float | None) -> None:
    """Raises UserError where the card names the rates of the training clips and `fps` is none of them."""
    rates = trained_rates(card)
    if fps is not None and rates and not any(same_rate(rate, fps) for rate in rates):
        named = ", ".join(f"{rate:g}" for rate in rates)
        raise UserError(f"the reward model was trained on clips of {named} frames a second, and these have {fps:g}, {folder}. Resample the clips or train it again")


def trained_rates(card: Mapping[str, Any]) -> list[float]:
    rates = card.get("fps")
    return [float(rate) for rate in rates] if isinstance(rates, list) else []

"""Safety filters that a configuration names beside those that need no weights, and which filters ruled on what a run learned from. Shared by recipes, no command."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import model_validator

from align.config import Config as BaseConfig
from base_model.checkpoint import atomic_write
from base_model.errors import UserError
from base_model.video.store import ClipRow
from reward.safety.contract import PromptFilter, VideoFilter
from reward.safety.duplicate import DuplicateFilter, load_blocked
from reward.safety.head import load_filter
from reward.safety.policy import Policy

LINEAGE = "safety.json"


class Filters(BaseConfig):
    """Each is asked about everything, and the worst ruling decides. One that cannot be loaded stops the command."""

    trained: tuple[Path, ...] = ()
    """Folders of trained filters (`rushes safety-train`)."""
    blocked: Path | None = None
    """File of blocked clips (`reward/safety/duplicate.py`): what is nearly one of them is blocked for the same."""
    qwen3guard: str | None = None
    """Folder or hub id of a Qwen3Guard-Gen checkpoint, which reads prompts."""
    shieldgemma: str | None = None
    """Folder or hub id of a ShieldGemma 2 checkpoint, which looks at two frames a second."""
    siglip: str | None = None
    """Folder or hub id of the SigLIP checkpoint under `siglip_head`."""
    siglip_head: Path | None = None
    """Head in the shape of Cosmos' video guard, as safetensors (`reward/safety/guards/siglip.py`)."""

    @model_validator(mode="after")
    def _encoder_and_head_go_together(self) -> Filters:
        if (self.siglip is None) != (self.siglip_head is None):
            raise ValueError("siglip and siglip_head go together: give both or none")
        return self


NONE = Filters()


def load_filters(filters: Filters, policy: Policy) -> list[PromptFilter | VideoFilter]:
    """Raises UserError for each that is not there, not whole or not what it says."""
    found: list[PromptFilter | VideoFilter] = [load_filter(folder, policy) for folder in filters.trained]
    if filters.blocked is not None:
        found.append(_duplicates(filters.blocked, policy))
    if filters.qwen3guard is not None:
        from reward.safety.guards.qwen3guard import Qwen3Guard

        found.append(Qwen3Guard(filters.qwen3guard, policy))
    if filters.shieldgemma is not None:
        from reward.safety.guards.shieldgemma import ShieldGemma2

        found.append(ShieldGemma2(filters.shieldgemma, policy))
    if filters.siglip is not None and filters.siglip_head is not None:
        from reward.safety.guards.siglip import SiglipGuard

        found.append(SiglipGuard(filters.siglip, filters.siglip_head, policy))
    return found


def _duplicates(path: Path, policy: Policy) -> DuplicateFilter:
    try:
        return DuplicateFilter(policy, load_blocked(path))
    except ValueError as error:
        raise UserError(f"cannot use the blocked clips, {path}: {error}. Give another file, or leave it out") from error


# Lineage


def lineage_of_clips(rows: Iterable[ClipRow]) -> list[dict[str, Any]]:
    """Which filters ruled on stored clips, as `SafetyRunner.lineage` tells it, each with the number of clips; clips that carry no verdict are told under an empty name."""
    clips: Counter[tuple[str, str, float, str, tuple[str, ...]]] = Counter()
    for row in {row.clip_id: row for row in rows}.values():
        codes: dict[tuple[str, str, float, str], set[str]] = {}
        for ruling in json.loads(row.safety_json).get("rulings", []):
            name, _, version = str(ruling["filter"]).partition(" ")
            codes.setdefault((name, version, ruling["threshold"], ruling["policy_version"]), set()).add(ruling["policy"])
        clips.update([(*key, tuple(sorted(some))) for key, some in codes.items()] or [("", "", 0.0, "", ())])
    return [
        {"filter": name, "version": version, "threshold": threshold, "policies": list(policies), "policy_version": policy_version, "clips": number}
        for (name, version, threshold, policy_version, policies), number in sorted(clips.items())
    ]


def write_lineage(folder: Path, lineage: list[dict[str, Any]]) -> None:
    """Leaves beside data which filters they passed."""
    atomic_write(folder / LINEAGE, (json.dumps(lineage, indent=1) + "\n").encode())


def read_lineage(folder: Path | None) -> list[dict[str, Any]]:
    """What `write_lineage` left; empty where no filter looked at the data, as far as anybody wrote down."""
    try:
        found: list[dict[str, Any]] = json.loads((folder / LINEAGE).read_text()) if folder is not None and (folder / LINEAGE).exists() else []
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read which filters the data passed, {folder}: {error}. Make the folder again") from error
    return found

"""Weights with a card beside them: what made them, from what, in how long, and their hash."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.config import Config, dump, leaves, path_keys, resolved
from base_model.checkpoint import atomic_write, read_json
from base_model.errors import UserError


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lineage_of(files: Sequence[tuple[str, Path]]) -> str:
    """sha256 of files under their names."""
    told = hashlib.sha256()
    for name, file in files:
        told.update(f"{name} {file_hash(file)}\n".encode())
    return told.hexdigest()


def made_by(recipe: str, cfg: Config) -> dict[str, Any]:
    """The command, for a shell, the configuration without paths, commit and versions: so much every card says."""
    config = {key: value for key, value in leaves(dump(cfg)).items() if key not in path_keys(type(cfg))}
    defaults = leaves(dump(type(cfg)()))
    words = [f" --{key} {shlex.quote(value if isinstance(value, str) else json.dumps(value))}" for key, value in config.items() if value != defaults.get(key)]
    return {**resolved(cfg), "command": f"rushes {recipe}{''.join(words)}", "config": config}


def about_training(*, recipe: str, cfg: Config, data: str, seconds: float, measured: Mapping[str, object], safety: Sequence[Mapping[str, object]]) -> dict[str, Any]:
    """What a card says of how something was made: the command, the configuration without paths, commit and versions, data, time, and what was measured (`write_card`)."""
    return {
        "seed": getattr(cfg, "seed", None),
        "data_sha256": data,
        "wall_seconds": round(seconds, 1),
        "measured": dict(measured),
        "safety": list(safety),
        **made_by(recipe, cfg),
    }


def write_card(
    path: Path,
    save: Callable[[Path], object],
    *,
    recipe: str,
    cfg: Config,
    data: str,
    seconds: float,
    measured: Mapping[str, object],
    safety: Sequence[Mapping[str, object]] = (),
    base: Mapping[str, object] | None = None,
) -> None:
    """Saves weights to `path` with `save` and a card beside them (`x.json` for `x.safetensors`).

    `data` is the hash of the training data, `seconds` the wall time of the training, `safety` the filters that looked at what it learned from, `base` what an adapter goes onto.
    """
    about = about_training(recipe=recipe, cfg=cfg, data=data, seconds=seconds, measured=measured, safety=safety)
    save(path)
    card = {"file": path.name, "sha256": file_hash(path), "bytes": path.stat().st_size, **({} if base is None else {"base": dict(base)}), **about}
    atomic_write(path.with_suffix(".json"), (json.dumps(card, indent=2, sort_keys=True) + "\n").encode())


def read_card(path: Path) -> dict[str, Any]:
    """The card beside the weights at `path`. Raises UserError where it is missing or damaged."""
    file = path.with_suffix(".json")
    card = read_json(file, "the card of the weights")
    if not isinstance(card.get("measured"), dict) or not isinstance(card.get("wall_seconds"), int | float):
        raise UserError(f"not a card of weights, {file}: `measured` or `wall_seconds` is missing. Make the weights again")
    return card

"""Weights with a card beside them: what made them, from what, in how long, and their hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from align.config import Config, dump, leaves, path_keys, resolved


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_card(path: Path, save: Callable[[Path], None], *, recipe: str, cfg: Config, data: str, seconds: float, measured: Mapping[str, object]) -> None:
    """Saves weights to `path` with `save` and a card beside them (`x.json` for `x.safetensors`).

    `data` is the hash of the training data, `seconds` the wall time of the training.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path)
    about = resolved(cfg)
    about["config"] = {key: value for key, value in leaves(dump(cfg)).items() if key not in path_keys(type(cfg))}
    defaults = leaves(dump(type(cfg)()))
    overrides = "".join(f" --{key} {value}" for key, value in about["config"].items() if value != defaults[key])
    card = {
        "file": path.name,
        "sha256": file_hash(path),
        "bytes": path.stat().st_size,
        "command": f"rushes {recipe}{overrides}",
        "seed": getattr(cfg, "seed", None),
        "data_sha256": data,
        "wall_seconds": round(seconds, 1),
        "measured": dict(measured),
        **about,
    }
    path.with_suffix(".json").write_text(json.dumps(card, indent=2, sort_keys=True) + "\n")

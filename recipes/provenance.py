"""Signed copies of a store's clips: what made them, and by which run. Shared by recipes, no command."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import model_validator

from align.config import Config as BaseConfig
from base_model.checkpoint import read_json
from base_model.tiny import WEIGHTS
from base_model.video.files import disk_errors, mp4_bytes, write_atomic
from base_model.video.provenance import Credentials, development_credentials, load_credentials, sign_mp4
from base_model.video.store import ClipRow, ClipStore
from recipes.weights import file_hash


class Export(BaseConfig):
    """Signed copies of the clips that the filters allow, for the world outside (the extra `provenance`)."""

    folder: Path | None = None
    """Folder of the signed mp4s; none exports nothing."""
    certificate: Path | None = None
    """PEM certificate of the signer, those above it behind it. Without one a development certificate is made beside the clip store, which proves nothing."""
    key: Path | None = None
    """PEM key of the certificate, unencrypted. Keep it out of the project's folder; better, sign with a key that never leaves its device."""

    @model_validator(mode="after")
    def _certificate_and_key_go_together(self) -> Export:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key: one needs the other. Give both, or none")
        return self


def credentials_of(cfg: Export, store: Path) -> Credentials:
    """Those that are given, or a development certificate's in the folder of the clip store: what is exported holds no key. Raises UserError where they cannot be used."""
    if cfg.certificate is not None and cfg.key is not None:
        return load_credentials(cfg.certificate, cfg.key)
    return development_credentials(store / "development")


def origin_of(network: Path | None) -> dict[str, Any]:
    """What names a network: its hash and recipe, and of the run it lies in the adapter's hash, the hash of `run.json`, its commit and seed; None where there is none."""
    file = network or WEIGHTS / "dit.safetensors"
    return {"model_sha256": file_hash(file), **_of_run(file)}


def origin_of_family(lineage: str, adapter: Path | None) -> dict[str, Any]:
    """The same for an open family: its lineage, and what its adapter and the run that lies in say."""
    if adapter is None:
        return {"model_sha256": lineage} | dict.fromkeys(("recipe", "adapter_sha256", "run_sha256", "run_commit", "run_seed"))
    return {"model_sha256": lineage} | _of_run(adapter) | {"adapter_sha256": file_hash(adapter)}


def _of_run(file: Path) -> dict[str, Any]:
    card, adapter, run = file.with_suffix(".json"), file.parent / "adapter.safetensors", file.parent / "run.json"
    told = read_json(run, "the description of the run") if run.is_file() else {}
    return {
        "recipe": read_json(card, "the card of a network").get("recipe") if card.is_file() else None,
        "adapter_sha256": file_hash(adapter) if adapter.is_file() else None,
        "run_sha256": file_hash(run) if run.is_file() else None,
        "run_commit": told.get("commit"),
        "run_seed": told.get("seed"),
    }


def export(cfg: Export, store: ClipStore, rows: Sequence[ClipRow], origin: Mapping[str, Any], credentials: Credentials) -> list[Path]:
    """Signs the clips whose verdict is allow; the prompt is not told. Returns their files, named by the clips."""
    assert cfg.folder is not None
    with disk_errors(cfg.folder):
        cfg.folder.mkdir(parents=True, exist_ok=True)
    files = []
    for row in {row.clip_id: row for row in rows if json.loads(row.safety_json).get("verdict") == "allow"}.values():
        generation = {**origin, "clip_id": row.clip_id, "seed": row.seed, "sampler": json.loads(row.sampler_json)}
        file = cfg.folder / f"{row.clip_id}.mp4"
        write_atomic(file, sign_mp4(mp4_bytes(store.load(row.clip_id), row.fps), generation, credentials))
        files.append(file)
    return files

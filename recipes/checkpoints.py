"""A trained open model as a whole checkpoint that diffusers' pipelines and `--model` read. Shared by recipes, no command.

    out/  model_index.json  transformer/ (and transformer_2/)  vae/  text_encoder/  ...  rushes_card.json  README.md

The trained transformers are written anew, in safetensors. Everything else is the base's, by hard links where the file system has them, else copied; weights that are pickled stay
behind. `rushes_card.json` says what made it, with a hash of every file; `README.md` says it in the form of the hub's model cards.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from align.config import Config
from base_model.checkpoint import check_can_write, disk_errors, fsync_folder, read_json, write_synced
from base_model.errors import UserError
from base_model.families.loading import NAMES, network_files
from base_model.families.parts import INDEX, index_file, read_index
from base_model.families.wan_experts import Experts
from base_model.lora import merge
from base_model.quantize import from_nf4
from base_model.types import TrainableModel
from recipes.weights import about_training, file_hash, lineage_of

CARD, README = "rushes_card.json", "README.md"
PICKLED = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5", ".onnx"})
TERMS = ("LICENSE*", "LICENCE*", "NOTICE*")
LICENCE = ("license", "license_name", "license_link")


class Base(NamedTuple):
    """What a model was trained from."""

    name: str  # on the hub, or of its folder
    on_hub: bool
    sha256: str  # of its networks, codec and sampling grid, as `models.py: model_lineage` has it
    licence: dict[str, str]  # as its card says, by the hub's keys; empty where it has no card here

    @property
    def said(self) -> dict[str, object]:
        """For a card."""
        return {"name": self.name, "sha256": self.sha256, "licence": self.licence.get("license_name") or self.licence.get("license")}


def base_of(source: Path) -> Base:
    """A checkpoint that was loaded before. Raises UserError where it is gone."""
    named = NAMES.get(str(source), str(source))
    folder = index_file(named).parent
    local = Path(named).exists()
    metadata = _hub_metadata(folder / README if local else _card_on_hub(named))
    name, on_hub = named, not local
    if local:
        told = metadata.get("base_model") if (folder / CARD).is_file() else None
        name, on_hub = (told, True) if isinstance(told, str) else (folder.resolve().name, False)
    return Base(name, on_hub, lineage_of(network_files(named)), {key: str(metadata[key]) for key in LICENCE if metadata.get(key)})


def _card_on_hub(name: str) -> Path | None:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, README))
    except (OSError, ValueError):
        return None


def _hub_metadata(card: Path | None) -> dict[str, Any]:
    """What stands at the head of a model card; nothing where there is none, or none that can be read."""
    from huggingface_hub.repocard import metadata_load

    try:
        return dict(metadata_load(card) or {}) if card is not None and card.is_file() else {}
    except ValueError:
        return {}


def check_can_save(source: Path, out: Path) -> None:
    """Raises UserError, before the training, where `out` cannot be written or holds something else, or where a part of the base is not on this machine."""
    check_can_write(out)
    if out.exists() and any(out.iterdir()) and not (out / CARD).is_file():
        raise UserError(f"{out} holds something else than a checkpoint of rushes. Choose another folder, or empty that one")
    where = NAMES.get(str(source), str(source))
    folder = index_file(where).parent
    missing = [name for name in _parts(read_index(where)) if not (folder / name).is_dir()]
    if missing:
        raise UserError(
            f"{source} is not whole here: no {missing[0]}/, so it cannot be saved with new weights. Download all of it (HF_HUB_OFFLINE=0), or give a folder that has it"
        )


def save_checkpoint(
    model: TrainableModel,
    source: Path,
    out: Path,
    *,
    recipe: str,
    cfg: Config,
    data: str,
    seconds: float,
    measured: Mapping[str, object],
    safety: Sequence[Mapping[str, object]] = (),
    data_licence: str = "",
) -> Path:
    """Writes `model`, whose network holds what is to be kept (averaged weights), into the folder `out`, whole or not at all; returns it. One made by rushes before is replaced.

    An adapter is merged, and weights in four bits become plain ones, for good. source: what the model was loaded from. data: hash of what it learned from; data_licence: its terms.
    Raises UserError (full disk, a base that is gone, another thing in `out`).
    """
    check_can_save(source, out)
    model.network = _plain(model.network)
    base, where = base_of(source), NAMES.get(str(source), str(source))
    about = about_training(recipe=recipe, cfg=cfg, data=data, seconds=seconds, measured=measured, safety=safety) | {"base": base.said, "data_licence": data_licence or None}
    partial, old = (out.with_name(f".{out.name}.{end}") for end in ("partial", "old"))
    with disk_errors(out):
        if old.exists() and not out.exists():
            old.rename(out)
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            _fill(partial, model.network, index_file(where).parent, read_index(where))
            files = {str(file.relative_to(partial)): file_hash(file) for file in sorted(partial.rglob("*")) if file.is_file()}
            write_synced(partial / README, _readme(out.name, str(read_index(where)["_class_name"]), base, about).encode())
            write_synced(partial / CARD, (json.dumps(about | {"files": files}, indent=2, sort_keys=True) + "\n").encode())
            fsync_folder(partial)
            if out.exists():
                out.rename(old)
            partial.rename(out)
            fsync_folder(out.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return out


def _plain(network: Any) -> nn.Module:
    if hasattr(network, "peft_config"):
        return merge(network)
    from_nf4(network)
    plain: nn.Module = network
    return plain


def _parts(index: Mapping[str, Any]) -> list[str]:
    return sorted(name for name, value in index.items() if isinstance(value, list) and value[1] is not None)


def _fill(folder: Path, network: Any, base: Path, index: Mapping[str, Any]) -> None:
    trained = {"transformer": network.transformer, "transformer_2": network.transformer_2} if isinstance(network, Experts) else {"transformer": network}
    for name, transformer in trained.items():
        _save_network(transformer, folder / name)
    for name in _parts(index):
        if name not in trained:
            _share(base / name, (base / name).rglob("*"), folder / name)
    _share(base, (file for pattern in TERMS for file in base.glob(pattern)), folder)
    write_synced(folder / INDEX, _without_place(index))


def _save_network(network: Any, folder: Path) -> None:
    from safetensors import SafetensorError

    try:
        network.save_pretrained(folder, safe_serialization=True)
    except SafetensorError as error:
        full = "the disk is full, while writing" if "os error 28" in str(error) else "cannot write"
        raise UserError(f"{full} {folder.parent}: {error}. Free some space or choose another folder, then go on with --resume") from error
    config = folder / "config.json"
    write_synced(config, _without_place(read_json(config, "a configuration")))
    for file in folder.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())
    fsync_folder(folder)


def _without_place(config: Mapping[str, Any]) -> bytes:
    """Without the folder it was loaded from, which is nobody's business."""
    return (json.dumps({key: value for key, value in config.items() if key != "_name_or_path"}, indent=2, sort_keys=True) + "\n").encode()


def _share(base: Path, files: Iterable[Path], folder: Path) -> None:
    """The files of `base`, under their names in it, as hard links where the file system has them; the hub's cache keeps links to them, which are followed."""
    for file in files:
        if file.is_dir() or file.suffix in PICKLED or file.name.startswith("."):
            continue
        place = folder / file.relative_to(base)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file.resolve(), place)
        except OSError:  # another file system, or one without links
            shutil.copyfile(file, place)


# The card


def _readme(name: str, pipeline: str, base: Base, about: Mapping[str, Any]) -> str:
    from huggingface_hub import ModelCardData

    task = "image-to-video" if "ImageToVideo" in pipeline else "text-to-video"
    licence, licence_name, licence_link = (base.licence.get(key) for key in LICENCE)
    tags = ["rushes", "diffusers", task, str(about["command"]).split()[1]]
    named = base.name if base.on_hub else None
    data = ModelCardData(base_model=named, library_name="diffusers", pipeline_tag=task, tags=tags, license=licence, license_name=licence_name, license_link=licence_link)
    rows = {
        "Base": f"{base.name}, sha256 `{base.sha256}`",
        "Licence of the base": base.said["licence"] or "not known here: look it up before you share this",
        "Learned from": f"data of sha256 `{about['data_sha256']}`" if about["data_sha256"] else "not told",
        "Licence of the data": about["data_licence"] or "not told",
        "Filters of the data": ", ".join(map(_filter, about["safety"])) or "none told",
        "Command": f"`{about['command']}`",
        "Made in": f"{about['wall_seconds']:g} seconds of training, commit `{about.get('commit')}`",
    }
    measured = "\n".join(f"| {key} | {value:.6g} |" for key, value in about["measured"].items() if isinstance(value, int | float) and not isinstance(value, bool))
    return f"""---
{data.to_yaml()}
---

# {name}

A `{pipeline}` that was trained with rushes from {base.name}.

| | |
| --- | --- |
{chr(10).join(f"| {key} | {value} |" for key, value in rows.items())}

## Measured

| what | value |
| --- | --- |
{measured or "| nothing | |"}

## Use

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{name}")
```

or `rushes generate --model {name}`. `{CARD}` has the configuration, the versions and a hash of every file.
"""


def _filter(entry: Mapping[str, object]) -> str:
    return " ".join(str(entry[key]) for key in ("filter", "version") if entry.get(key) is not None)

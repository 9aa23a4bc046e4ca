"""The model that a recipe is given: the built-in one or one of an open family (`base_model/families/`), loaded, adapted and saved. Everything that tells the two apart is here.

| `--model` | what |
| --- | --- |
| nothing | the shipped base |
| a safetensors file | a network of the built-in model, as `rushes sft` and the recipes of alignment write it |
| a folder | a checkpoint that diffusers saved |
| `wan2.1-1.3b` | a short name of `base_model/families/loading.py` |
| `owner/name` | a checkpoint on the hub; HF_HUB_OFFLINE=0 lets it be downloaded |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial, reduce
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from align.config import Config
from base_model.checkpoint import save_weights
from base_model.errors import UserError
from base_model.families.adapters import load_lora, save_lora
from base_model.families.loading import load_family, network_files
from base_model.families.ltx import LTXVideoModel
from base_model.lora import adapter_state, merge
from base_model.prompts.conditions import Canvas
from base_model.prompts.text import TextEncoder
from base_model.recompute import recompute_blocks
from base_model.threads import side_by_side
from base_model.tiny import WEIGHTS, LatentVideoModel, load_tiny, save_network
from base_model.types import Conditioning, TrainableModel
from recipes.checkpoints import base_of
from recipes.weights import file_hash, lineage_of, write_card

ADAPTER, NETWORK = "adapter.safetensors", "network.safetensors"
PROMPTS_AT_ONCE = 32


@runtime_checkable
class TakesCanvases(Protocol):
    """A model that can be told pixels beside its text."""

    def with_canvases(self, cond: Conditioning, canvases: Sequence[Canvas]) -> Conditioning: ...


def is_built_in(source: Path | None) -> bool:
    """Whether that is the shipped base or a file of a network, and not a checkpoint of a family."""
    return source is None or source.is_file() or source.suffix == ".safetensors"


def load_model(
    source: Path | None, *, device: torch.device, nf4: bool = False, recompute: float = 0.0, adapter: Path | None = None, fps: float | None = None
) -> TrainableModel:
    """The model, its network frozen. A family computes in bfloat16 on a GPU, in float32 on a CPU.

    nf4: attention and mlp of a family's network in four bits. recompute: share of its blocks whose activations are computed again in a backward pass.
    adapter: a LoRA of the family, as diffusers' pipelines read it. fps: frames a second of the clips, for LTX-Video, which is told; None: as it was trained. Raises UserError.
    """
    side_by_side(is_built_in(source))
    if not is_built_in(source):
        family: TrainableModel = load_family(str(source), device=device, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16, nf4=nf4)
        if recompute:
            recompute_blocks(family.network, recompute)
        if adapter is not None:
            load_lora(family, adapter)
        if fps is not None and isinstance(family, LTXVideoModel):
            family.fps = fps
        family.network.requires_grad_(False)
        return family
    if nf4 or recompute:
        raise UserError("nf4 and recompute are for open families, and the built-in model is small enough. Leave them out, or give --model a checkpoint that diffusers saved")
    if adapter is not None:
        raise UserError(f"an adapter goes onto an open family, {adapter}. Give --model the {NETWORK} beside it: the adapter is merged there")
    model = load_tiny(source).to(device)
    model.network.requires_grad_(False)
    return model


def reward_text(model: TrainableModel) -> TextEncoder:
    """The encoder that reward models read prompts with, whatever the model reads them with."""
    return model.text if isinstance(model, LatentVideoModel) else TextEncoder()


def built_in(model: TrainableModel, what: str) -> LatentVideoModel:
    """Raises UserError where the model is of a family, and `what` knows the built-in one only."""
    if not isinstance(model, LatentVideoModel):
        raise UserError(f"{what} works with the built-in model only. Leave it out, or give --model a network of that")
    return model


def encode_prompts(model: TrainableModel, prompts: Sequence[str]) -> Conditioning:
    """`model.encode_text`, so many prompts at once that a large text encoder has room for them."""
    parts = [model.encode_text(prompts[begin : begin + PROMPTS_AT_ONCE]) for begin in range(0, max(1, len(prompts)), PROMPTS_AT_ONCE)]
    return reduce(Conditioning.followed_by, parts)


def with_canvases(model: TrainableModel, cond: Conditioning, canvases: Sequence[Canvas]) -> Conditioning:
    """B texts and B canvases. Raises UserError where the model hears text alone, or not such a canvas."""
    if not isinstance(model, TakesCanvases):
        raise UserError("this model makes clips from text alone, visual. Leave it out, or give another model")
    return model.with_canvases(cond, canvases)


def model_lineage(source: Path | None, adapter: Path | None = None) -> str:
    """sha256 of what makes the clips, which names a model in the store: of the network's file; of a family, of the files of its networks, codec, sampling grid and adapter."""
    if is_built_in(source):
        return file_hash(source or WEIGHTS / "dit.safetensors")
    return lineage_of([*network_files(str(source)), *([] if adapter is None else [("adapter", adapter)])])


def save_policy(
    model: TrainableModel,
    out: Path,
    *,
    source: Path | None,
    recipe: str,
    cfg: Config,
    data: str,
    seconds: float,
    measured: Mapping[str, object],
    safety: Sequence[Mapping[str, object]],
) -> Path:
    """Writes the trained adapter into `out`, and a card beside what can be loaded as a model, which is returned. source: what the model was loaded from.

    Built-in: `adapter.safetensors`, and `network.safetensors` with it merged, which has the card. A family: `adapter.safetensors` alone, as diffusers' pipelines read it, with a
    card that names what it goes onto.
    """
    with_card = partial(write_card, recipe=recipe, cfg=cfg, data=data, seconds=seconds, measured=measured, safety=safety)
    adapter, network = out / ADAPTER, out / NETWORK
    if not isinstance(model, LatentVideoModel):
        assert source is not None, "a family is loaded from somewhere"
        with_card(adapter, lambda path: save_lora(model, path), base=base_of(source).said)
        return adapter
    save_weights(adapter, adapter_state(model.network), {})
    model.network = merge(model.network)
    with_card(network, lambda path: save_network(path, model))
    return network

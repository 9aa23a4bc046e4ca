"""Parts of a diffusers checkpoint, a local folder or a name on the hub, with one line where one cannot be had. Every family reads its own through these."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from base_model.checkpoint import read_json
from base_model.errors import UserError

INDEX = "model_index.json"


def load_part(kind: Any, source: str, part: str, *, device: torch.device, dtype: torch.dtype) -> Any:
    """The network in the subfolder `part` of `source`, of the class `kind` of diffusers or transformers: frozen, in evaluation mode, from safetensors alone.

    Raises UserError where it is not there, not allowed, or of another class.
    """
    with _explained(source, part):
        check_class(Path(source) / part / "config.json", kind)
        loaded = kind.from_pretrained(source, subfolder=part, torch_dtype=dtype, use_safetensors=True)
    return loaded.requires_grad_(False).eval().to(device)


def load_plain(kind_without_weights: Any, source: str, part: str) -> Any:
    """The tokenizer, scheduler or processor in the subfolder `part` of `source`. Raises UserError where it is not there or not allowed."""
    assert not issubclass(kind_without_weights, nn.Module)
    with _explained(source, part):
        return kind_without_weights.from_pretrained(source, subfolder=part)


@contextmanager
def _explained(source: str, part: str) -> Iterator[None]:
    if Path(source).exists() and not (Path(source) / part).is_dir():
        raise UserError(f"{source} holds no {part}/. Give a folder that diffusers saved, or the name of one on the hub")
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {part}/ of {source} ({_first_line(error)}). Check the path or the name; for a gated model, log in and agree to its terms") from error


def index_file(source: str) -> Path:
    """`model_index.json` of a checkpoint, in the folder that its parts lie in. Raises UserError where there is no such checkpoint."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(source) / INDEX if Path(source).exists() else Path(hf_hub_download(source, INDEX))
    except (OSError, ValueError) as error:
        advice = "Give a folder that diffusers saved, or check the name (HF_HUB_OFFLINE=0 lets it be downloaded); for a gated model, log in and agree to its terms"
        raise UserError(f"no checkpoint {source} ({_first_line(error)}). {advice}") from error


def read_index(source: str) -> dict[str, Any]:
    """The class of a checkpoint's pipeline and of every part. Raises UserError where there is none."""
    return read_json(index_file(source), "the index of a diffusers checkpoint")


def check_class(file: Path, kind: Any) -> None:
    """Raises UserError where a configuration is of another class; diffusers would go on with whatever names match."""
    if not file.is_file():
        return
    config = read_json(file, "a configuration")
    named = config.get("_class_name") or (config.get("architectures") or [None])[0]
    if named not in (None, kind.__name__):
        raise UserError(f"{file.parent} holds a {named}, no {kind.__name__}. Give the folder of the family you named, or name the other family")


def _first_line(error: BaseException) -> str:
    told = str(error).strip().splitlines()
    return told[0][:200] if told else type(error).__name__


def encode_clips(vae: Any, video: Tensor) -> Tensor:
    """[B,T,3,H,W] in [0,1] -> latents [B,C,F,H,W] as the VAE makes them, float32, one clip after another."""
    pixels = (2 * video - 1).transpose(1, 2).to(vae.dtype)  # [B,3,T,H,W]
    return torch.cat([vae.encode(clip).latent_dist.mode() for clip in pixels.split(1)]).float()


def decode_clips(vae: Any, latents: Tensor, decode: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Latents [B,C,F,H,W] as the VAE made them -> [B,T,3,H,W] in [0,1], float32, one clip after another: activations of the decoder are large.

    decode: one clip [1,C,F,H,W] -> [1,3,T,H,W] in [-1,1], where the VAE's own call does not do.
    """
    clips = latents.to(vae.dtype).split(1)
    video = torch.cat([vae.decode(clip, return_dict=False)[0] if decode is None else decode(clip) for clip in clips]).float()  # [B,3,T,H,W]
    return ((video + 1) / 2).clamp(0, 1).transpose(1, 2)

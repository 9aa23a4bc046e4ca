"""Parts of a diffusers checkpoint, a local folder or a name on the hub, with one line where one cannot be had. Every family reads its own through `load_part`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from base_model.checkpoint import read_json
from base_model.errors import UserError


def load_part(kind: Any, source: str, part: str, *, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """The part in the subfolder `part` of `source`, of the class `kind` of diffusers or transformers. Networks come frozen, in evaluation mode, from safetensors alone.

    dtype: None for what has no weights (tokenizers, schedulers). Raises UserError where it is not there, not allowed, or of another class.
    """
    found = Path(source) / part
    if Path(source).exists() and not found.is_dir():
        raise UserError(f"{source} holds no {part}/. Give a folder that diffusers saved, or the name of one on the hub")
    if dtype is not None:
        check_class(found / "config.json", kind)
    options: dict[str, Any] = {} if dtype is None else {"torch_dtype": dtype}
    try:
        loaded = kind.from_pretrained(source, subfolder=part, use_safetensors=True, **options)  # which what has no weights ignores
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {part}/ of {source} ({_first_line(error)}). Check the path or the name; for a gated model, log in and agree to its terms") from error
    return loaded if dtype is None else loaded.requires_grad_(False).eval().to(device)


def read_index(source: str) -> dict[str, Any]:
    """`model_index.json` of a checkpoint: the class of its pipeline and of every part. Raises UserError where there is none."""
    from huggingface_hub import hf_hub_download

    name = "model_index.json"
    try:
        file = Path(source) / name if Path(source).exists() else Path(hf_hub_download(source, name))
    except (OSError, ValueError) as error:
        raise UserError(f"no checkpoint {source} ({_first_line(error)}). Give a folder that diffusers saved, or check the name on the hub") from error
    return read_json(file, "the index of a diffusers checkpoint")


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

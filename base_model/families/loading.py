"""A model by the folder or the name of its checkpoint: the family is found from the index that diffusers writes."""

from __future__ import annotations

import difflib
import importlib
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from base_model.errors import UserError
from base_model.families.parts import INDEX, index_file, read_index
from base_model.quantize import to_nf4

MODULES = {
    "WanPipeline": "wan",
    "WanImageToVideoPipeline": "wan",
    "LTXPipeline": "ltx",
    "MochiPipeline": "mochi",
    "CogVideoXPipeline": "cogvideox",
    "HunyuanVideoPipeline": "hunyuan_video",
}
"""Class of the pipeline -> the module here whose `load(source, *, device, dtype)` reads it; imported when it is asked for."""
NAMES = {
    "wan2.1-1.3b": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "wan2.1-14b": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    "wan2.1-i2v-480p": "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
    "wan2.1-i2v-720p": "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
    "wan2.2-5b": "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    "wan2.2-a14b": "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    "wan2.2-i2v-a14b": "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
    "ltx-video": "Lightricks/LTX-Video",
    "mochi-1": "genmo/mochi-1-preview",
    "cogvideox-2b": "zai-org/CogVideoX-2b",
    "cogvideox-5b": "zai-org/CogVideoX-5b",
    "hunyuan-video": "hunyuanvideo-community/HunyuanVideo",
}
"""Short name -> name on the hub."""


def load_family(source: str, *, device: torch.device, dtype: torch.dtype, nf4: bool = False) -> Any:
    """The `VideoModel` of a folder that diffusers saved, of a short name of `NAMES`, or of a name on the hub ("owner/name"). Raises UserError.

    dtype: of the network and the text encoder; bfloat16 on a GPU, float32 on a CPU. nf4: attention and mlp of the network's blocks in four bits; they are read into the
    memory of the CPU and reach the device as such. Embeddings, norms and the last layer stay as they are.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which diffusers imports, and which warns of an optional kernel of 4-bit inference
    where = NAMES.get(source, source)
    if not Path(where).exists() and where.count("/") != 1:
        raise UserError(f"no folder {source}, and no such short name. {_nearest(source, NAMES)}, or give owner/name on the hub")
    named = str(read_index(where).get("_class_name"))
    if named not in MODULES:
        raise UserError(f"{source} holds a {named}, which no family reads. {_nearest(named, MODULES)}")
    module = importlib.import_module(f"base_model.families.{MODULES[named]}")
    model = module.load(where, device=torch.device("cpu") if nf4 else device, dtype=dtype)
    if nf4:
        names = "|".join(map(re.escape, (*module.LORA_TARGETS, *module.MLP_TARGETS)))
        to_nf4(model.network, rf"(?!.*embedder).*blocks\.\d+\.(.*\.)?({names})", device)
        model.to(device)
    return model


def network_files(source: str) -> list[tuple[str, Path]]:
    """Files of a checkpoint that was loaded before, with their names in it: what its networks, its VAE and its sampling grid are read from, and its index. Raises UserError."""
    folder = index_file(NAMES.get(source, source)).parent
    files = [(str(file.relative_to(folder)), file) for part in ("transformer*", "vae", "scheduler") for file in folder.glob(f"{part}/*")]
    return sorted((name, file) for name, file in [*files, (INDEX, folder / INDEX)] if file.suffix in (".json", ".safetensors"))


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    return f"Did you mean {difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]}? There are: {', '.join(known)}"

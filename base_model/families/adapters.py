"""LoRA files that diffusers' pipelines and ComfyUI read, of an adapter that was trained here, and back.

diffusers: keys `transformer.<module>.lora_A.weight`, rank and alpha in the header (`lora_adapter_metadata`). ComfyUI: `diffusion_model.<module>`, by the names of the
original code, alpha beside every pair. Both scale B A by alpha / rank, as peft does.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from base_model.checkpoint import load_weights, save_weights
from base_model.errors import UserError
from base_model.lora import TRAINED, adapter_state, add_lora, load_adapter_state
from base_model.types import VideoModel

HEADER = "lora_adapter_metadata"
PEFT = "base_model.model."
UNREAD = ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias")  # what changes how a LoRA is scaled or computed
EXPERTS = {"transformer.": "high_noise", "transformer_2.": "low_noise"}
"""Names of the parts of a network of two experts, which are diffusers' prefixes too -> what ComfyUI's users call them."""
COMFY: dict[str, tuple[tuple[str, str], ...]] = {
    "WanTransformer3DModel": (
        (".attn1.to_out.0", ".self_attn.o"),
        (".attn2.to_out.0", ".cross_attn.o"),
        (".attn1.to_", ".self_attn."),
        (".attn2.to_", ".cross_attn."),
        (".attn2.add_k_proj", ".cross_attn.k_img"),
        (".attn2.add_v_proj", ".cross_attn.v_img"),
        (".ffn.net.0.proj", ".ffn.0"),
        (".ffn.net.2", ".ffn.2"),
    )
}
"""Class of the transformer -> its names in diffusers and in the original code. Where none fits, ComfyUI has no name for it."""


def save_lora(model: VideoModel, file: Path, *, comfy: bool = False) -> list[Path]:
    """Writes the trained adapter of `model.network` as safetensors; returns the files.

    diffusers: `pipe.load_lora_weights(file)`. Of two experts that reads the first alone; the second, with its alpha, is
    `pipe.transformer_2.load_lora_adapter(file, prefix="transformer_2", use_safetensors=True)`.
    comfy: of two experts each gets a file of its own, <name>_high_noise and <name>_low_noise. Raises UserError where there is no adapter, or no name for a layer of it.
    """
    network: Any = model.network
    if not hasattr(network, "peft_config"):
        raise UserError(f"cannot write {file}: the network has no adapter. Add one (base_model/lora.py) and train it first")
    config = network.peft_config[TRAINED]
    tensors = {_prefixed(key.removeprefix(PEFT)): tensor for key, tensor in adapter_state(network).items()}
    parts = {prefix: [key for key in tensors if key.startswith(prefix)] for prefix in EXPERTS}
    parts = {prefix: keys for prefix, keys in parts.items() if keys}
    if not comfy:
        header: dict[str, Any] = {}
        for prefix, keys in parts.items():
            modules = sorted({_module(key.removeprefix(prefix)) for key in keys})
            header |= {f"{prefix}r": config.r, f"{prefix}lora_alpha": config.lora_alpha, f"{prefix}target_modules": modules}
        save_weights(file, tensors, {"format": "pt", HEADER: json.dumps(header, sort_keys=True)})
        return [file]
    files = []
    for prefix, keys in parts.items():
        renamed = {_comfy_key(network, key, prefix): tensors[key] for key in keys}
        alphas = {f"{_module(key)}.alpha": torch.tensor(float(config.lora_alpha)) for key in renamed}
        files.append(file if len(parts) == 1 else file.with_stem(f"{file.stem}_{EXPERTS[prefix]}"))
        save_weights(files[-1], renamed | alphas, {"format": "pt"})
    return files


def load_lora(model: Any, file: Path) -> None:
    """Puts the adapter of a file that diffusers reads onto `model.network`: a new one, of the file's rank and alpha, or the values alone where such a one is there already.

    Raises UserError, naming the first key that does not fit, for the adapter of another model.
    """
    tensors, metadata = load_weights(file)
    header, network = _header(metadata, file), model.network
    wrapped = hasattr(network, "peft_config")
    base = network.get_base_model() if wrapped else network
    found, ranks, alphas = {}, set(), set()
    for key, tensor in sorted(tensors.items()):
        name = key if _is_pair(base) else key.removeprefix("transformer.")
        layer = _layer(base, _module(name))
        end = re.search(r"\.lora_([AB])\.weight$", key)
        inner = None if layer is None or end is None else layer.in_features if end[1] == "A" else layer.out_features
        if end is None or inner is None or not key.startswith(tuple(EXPERTS)) or tensor.dim() != 2 or tensor.shape[end[1] == "A"] != inner:
            shape = "x".join(map(str, tensor.shape))
            raise UserError(f"{file} is the adapter of another model: {key} ({shape}) does not fit. Give one that was made for this model, in diffusers' format")
        ranks.add(tensor.shape[end[1] == "B"])
        alphas.add(header.get(f"{key.split('.')[0]}.lora_alpha"))
        found[f"{PEFT}{name}"] = tensor
    modules = {_module(key.removeprefix(PEFT)) for key in found}
    if len(ranks) != 1 or len(alphas) != 1 or len(found) != 2 * len(modules):
        raise UserError(
            f"{file} holds {len(ranks)} ranks, {len(alphas)} alphas and {len(found)} tensors of {len(modules)} layers. Give an adapter of one rank, of two tensors a layer"
        )
    (rank,), (alpha,) = ranks, alphas
    alpha = rank if alpha is None else alpha  # what diffusers takes where a file does not say
    if not wrapped:
        network = add_lora(network, rank=rank, alpha=alpha, targets="|".join(map(re.escape, sorted(modules))))
    config, there = network.peft_config[TRAINED], adapter_state(network)
    if found.keys() != there.keys() or (config.r, config.lora_alpha) != (rank, alpha):
        raise UserError(f"{file} (rank {rank}, alpha {alpha}, {len(found)} tensors) is not of the adapter that is there (rank {config.r}, alpha {config.lora_alpha}, {len(there)})")
    load_adapter_state(network, found)
    model.network = network


def _module(key: str) -> str:
    """`blocks.0.attn1.to_q` of `blocks.0.attn1.to_q.lora_A.weight`."""
    return key.rsplit(".lora_", 1)[0]


def _prefixed(name: str) -> str:
    return name if name.startswith(tuple(EXPERTS)) else f"transformer.{name}"


def _is_pair(base: nn.Module) -> bool:
    return all(hasattr(base, prefix.rstrip(".")) for prefix in EXPERTS)


def _layer(base: nn.Module, name: str) -> Any:
    """The linear of that name, without its adapter; None where there is none."""
    try:
        module: Any = base.get_submodule(name)
    except AttributeError:
        return None
    module = getattr(module, "base_layer", module)
    return module if isinstance(module, nn.Linear) else None


def _header(metadata: dict[str, str], file: Path) -> dict[str, Any]:
    try:
        header = dict(json.loads(metadata.get(HEADER, "{}")))
    except ValueError as error:
        raise UserError(f"cannot read the header of {file}: {error}. Make or download the file again") from error
    odd = [key for key, value in header.items() if value and key.split(".")[-1] in UNREAD]
    if odd:
        raise UserError(f"{file} is no plain LoRA: its header says {odd[0]}. Give one of a single rank and alpha, without its variants")
    return header


def _comfy_key(network: Any, key: str, prefix: str) -> str:
    base = network.get_base_model()
    transformer = base.get_submodule(prefix.rstrip(".")) if _is_pair(base) else base
    for old, new in COMFY.get(type(transformer).__name__, ()):
        if old in key:
            return "diffusion_model." + key.removeprefix(prefix).replace(old, new)
    raise UserError(f"ComfyUI's name for {key} of {type(transformer).__name__} is not known here. Save it in diffusers' format, or adapt attention and mlp of {', '.join(COMFY)}")

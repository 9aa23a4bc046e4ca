"""LoRA files that diffusers' pipelines and ComfyUI read, of an adapter that was trained here, and back.

diffusers: keys `transformer.<module>.lora_A.weight`, rank and alpha in the header (`lora_adapter_metadata`). ComfyUI: `diffusion_model.<module>`, by the names of the
original code; its B holds the factor alpha / rank, which not every reader of such a file knows of. Layers that are one there get one pair of the sum of their ranks.
A DoRA has the norms of its outputs' weights too, `lora_magnitude_vector`, by peft's name, which diffusers reads; for ComfyUI it is merged into the network instead.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from base_model.checkpoint import load_weights, save_weights
from base_model.errors import UserError
from base_model.lora import TRAINED, adapter_state, add_lora, load_adapter_state
from base_model.types import VideoModel

HEADER = "lora_adapter_metadata"
FAMILY = "network"
"""Where a file says the class of the transformer: CogVideoX 5B and Mochi have layers of the same names and sizes."""
PEFT = "base_model.model."
UNREAD = ("rank_pattern", "alpha_pattern", "use_rslora", "lora_bias")  # what changes how a LoRA is scaled or computed
EXPERTS = {"transformer.": "high_noise", "transformer_2.": "low_noise"}
"""Names of the parts of a network of two experts, which are diffusers' prefixes too -> what ComfyUI's users call them."""
REFINER, THEIR_REFINER = r"context_embedder\.token_refiner\.refiner_blocks\.(\d+)\.", r"txt_in.individual_token_refiner.blocks.\1."
COMFY: dict[str, tuple[tuple[str, tuple[str, ...], str], ...]] = {
    "WanTransformer3DModel": (
        (r"(blocks\.\d+)\.attn1\.", ("to_q",), r"\1.self_attn.q"),
        (r"(blocks\.\d+)\.attn1\.", ("to_k",), r"\1.self_attn.k"),
        (r"(blocks\.\d+)\.attn1\.", ("to_v",), r"\1.self_attn.v"),
        (r"(blocks\.\d+)\.attn1\.", ("to_out.0",), r"\1.self_attn.o"),
        (r"(blocks\.\d+)\.attn2\.", ("to_q",), r"\1.cross_attn.q"),
        (r"(blocks\.\d+)\.attn2\.", ("to_k",), r"\1.cross_attn.k"),
        (r"(blocks\.\d+)\.attn2\.", ("to_v",), r"\1.cross_attn.v"),
        (r"(blocks\.\d+)\.attn2\.", ("to_out.0",), r"\1.cross_attn.o"),
        (r"(blocks\.\d+)\.attn2\.", ("add_k_proj",), r"\1.cross_attn.k_img"),
        (r"(blocks\.\d+)\.attn2\.", ("add_v_proj",), r"\1.cross_attn.v_img"),
        (r"(blocks\.\d+)\.ffn\.", ("net.0.proj",), r"\1.ffn.0"),
        (r"(blocks\.\d+)\.ffn\.", ("net.2",), r"\1.ffn.2"),
    ),
    "LTXVideoTransformer3DModel": tuple(
        (r"(transformer_blocks\.\d+\.)", (name,), rf"\1{name}")
        for name in (*(f"{attention}.to_{end}" for attention in ("attn1", "attn2") for end in ("q", "k", "v", "out.0")), "ff.net.0.proj", "ff.net.2")
    ),
    "HunyuanVideoTransformer3DModel": (
        (r"transformer_blocks\.(\d+)\.attn\.", ("to_q", "to_k", "to_v"), r"double_blocks.\1.img_attn_qkv"),
        (r"transformer_blocks\.(\d+)\.attn\.", ("to_out.0",), r"double_blocks.\1.img_attn_proj"),
        (r"transformer_blocks\.(\d+)\.attn\.", ("add_q_proj", "add_k_proj", "add_v_proj"), r"double_blocks.\1.txt_attn_qkv"),
        (r"transformer_blocks\.(\d+)\.attn\.", ("to_add_out",), r"double_blocks.\1.txt_attn_proj"),
        (r"transformer_blocks\.(\d+)\.ff\.", ("net.0.proj",), r"double_blocks.\1.img_mlp.fc1"),
        (r"transformer_blocks\.(\d+)\.ff\.", ("net.2",), r"double_blocks.\1.img_mlp.fc2"),
        (r"transformer_blocks\.(\d+)\.ff_context\.", ("net.0.proj",), r"double_blocks.\1.txt_mlp.fc1"),
        (r"transformer_blocks\.(\d+)\.ff_context\.", ("net.2",), r"double_blocks.\1.txt_mlp.fc2"),
        (r"single_transformer_blocks\.(\d+)\.", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), r"single_blocks.\1.linear1"),
        (r"single_transformer_blocks\.(\d+)\.", ("proj_out",), r"single_blocks.\1.linear2"),
        (rf"{REFINER}attn\.", ("to_q", "to_k", "to_v"), rf"{THEIR_REFINER}self_attn_qkv"),
        (rf"{REFINER}attn\.", ("to_out.0",), rf"{THEIR_REFINER}self_attn_proj"),
        (rf"{REFINER}ff\.", ("net.0.proj",), rf"{THEIR_REFINER}mlp.fc1"),
        (rf"{REFINER}ff\.", ("net.2",), rf"{THEIR_REFINER}mlp.fc2"),
    ),
}
"""Class of the transformer -> (start of the name in diffusers, its ends, the name in the original code). Several ends are one layer there, their outputs one behind the other."""


def save_lora(model: VideoModel, file: Path, *, comfy: bool = False) -> list[Path]:
    """Writes the trained adapter of `model.network` as safetensors; returns the files.

    diffusers: `pipe.load_lora_weights(file)`. Of two experts that reads the first alone; the second, with its alpha, is
    `pipe.transformer_2.load_lora_adapter(file, prefix="transformer_2", use_safetensors=True)`.
    comfy: of two experts each gets a file of its own, <name>_high_noise and <name>_low_noise. Raises UserError where there is no adapter, or no name for a layer of it, and
    for a DoRA there.
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
            header |= {f"{prefix}use_dora": True} if config.use_dora else {}
        save_weights(file, tensors, {"format": "pt", FAMILY: _family(network), HEADER: json.dumps(header, sort_keys=True)})
        return [file]
    if config.use_dora:
        raise UserError(f"cannot write {file}: a DoRA is not written for ComfyUI here. Save it in diffusers' format, or merge it and give ComfyUI the network")
    files = []
    for prefix, keys in parts.items():
        base = network.get_base_model()
        transformer = base.get_submodule(prefix.rstrip(".")) if _is_pair(base) else base
        found = _for_comfy(transformer, {key.removeprefix(prefix): tensors[key] for key in keys}, config.lora_alpha / config.r)
        files.append(file if len(parts) == 1 else file.with_stem(f"{file.stem}_{EXPERTS[prefix]}"))
        save_weights(files[-1], found, {"format": "pt"})
    return files


def load_lora(model: Any, file: Path) -> None:
    """Puts the adapter of a file that diffusers reads onto `model.network`: a new one, of the file's rank and alpha, or the values alone where such a one is there already.

    Raises UserError, naming the first key that does not fit, for the adapter of another model.
    """
    tensors, metadata = load_weights(file)
    header, network = _header(metadata, file), model.network
    wrapped = hasattr(network, "peft_config")
    base = network.get_base_model() if wrapped else network
    if metadata.get(FAMILY, family := _family(network)) != family:
        raise UserError(f"{file} is the adapter of another model: of a {metadata[FAMILY]}, and this is a {family}. Give one that was made for this model")
    found, ranks, alphas = {}, set(), set()
    for key, tensor in sorted(tensors.items()):
        name = key if _is_pair(base) else key.removeprefix("transformer.")
        layer = _layer(base, _module(name))
        end = re.search(r"\.lora_(?:([AB])\.weight|magnitude_vector)$", key)
        if layer is None or end is None or not key.startswith(tuple(EXPERTS)) or not _fits(layer, end[1], tensor):
            shape = "x".join(map(str, tensor.shape))
            raise UserError(f"{file} is the adapter of another model: {key} ({shape}) does not fit. Give one that was made for this model, in diffusers' format")
        ranks |= {tensor.shape[end[1] == "B"]} if end[1] else set()
        alphas.add(header.get(f"{key.split('.')[0]}.lora_alpha"))
        found[f"{PEFT}{name}"] = tensor
    modules = {_module(key.removeprefix(PEFT)) for key in found}
    dora = any(name.endswith("use_dora") and value for name, value in header.items()) or any(key.endswith("magnitude_vector") for key in found)
    if len(ranks) != 1 or len(alphas) != 1 or len(found) != (3 if dora else 2) * len(modules):
        wanted = "of three tensors a layer, as a DoRA has" if dora else "of two tensors a layer"
        raise UserError(f"{file} holds {len(ranks)} ranks, {len(alphas)} alphas and {len(found)} tensors of {len(modules)} layers. Give an adapter of one rank, {wanted}")
    (rank,), (alpha,) = ranks, alphas
    alpha = rank if alpha is None else alpha  # what diffusers takes where a file does not say
    if not wrapped:
        network = add_lora(network, rank=rank, alpha=alpha, targets="|".join(map(re.escape, sorted(modules))), dora=dora)
    config, there = network.peft_config[TRAINED], adapter_state(network)
    if found.keys() != there.keys() or (config.r, config.lora_alpha) != (rank, alpha):
        raise UserError(f"{file} (rank {rank}, alpha {alpha}, {len(found)} tensors) is not of the adapter that is there (rank {config.r}, alpha {config.lora_alpha}, {len(there)})")
    load_adapter_state(network, found)
    model.network = network


def _module(key: str) -> str:
    """`blocks.0.attn1.to_q` of `blocks.0.attn1.to_q.lora_A.weight`."""
    return key.rsplit(".lora_", 1)[0]


def _fits(layer: nn.Linear, side: str | None, tensor: Tensor) -> bool:
    """Whether A [r,in], B [out,r] or, where `side` is None, a magnitude [out] is of that layer."""
    if side is None:
        return tensor.shape == (layer.out_features,)
    return tensor.dim() == 2 and tensor.shape[side == "A"] == (layer.in_features if side == "A" else layer.out_features)


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
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"cannot read the header of {file}: {error}. Make or download the file again") from error
    odd = [key for key, value in header.items() if value and key.split(".")[-1] in UNREAD]
    if odd:
        raise UserError(f"{file} is no plain LoRA: its header says {odd[0]}. Give one of a single rank and alpha, without its variants")
    return header


def _for_comfy(transformer: nn.Module, tensors: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Pairs A [r,in] and B [out,r] of layers by diffusers' names -> by ComfyUI's. Of layers that are one there A stands below A and B diagonally behind B."""
    found: dict[str, Tensor] = {}
    for name, modules in dict(_comfy_name(transformer, _module(key)) for key in tensors).items():
        there = [module for module in modules if f"{module}.lora_A.weight" in tensors]
        down = torch.cat([tensors[f"{module}.lora_A.weight"] for module in there])
        ups = [scale * tensors[f"{module}.lora_B.weight"] if module in there else down.new_zeros(_layer(transformer, module).out_features, 0) for module in modules]
        found |= {f"diffusion_model.{name}.lora_A.weight": down, f"diffusion_model.{name}.lora_B.weight": torch.block_diag(*ups)}
    return found


def _comfy_name(transformer: nn.Module, module: str) -> tuple[str, list[str]]:
    """ComfyUI's name of a layer, and diffusers' names of all that are the same layer there. Raises UserError where it has none."""
    family = type(transformer).__name__
    for start, ends, name in COMFY.get(family, ()):
        if match := re.fullmatch(f"({start})({'|'.join(map(re.escape, ends))})", module):
            return re.sub(start, name, match[1]), [match[1] + end for end in ends]
    raise UserError(f"ComfyUI's name for {module} of {family} is not known here. Save it in diffusers' format, or adapt attention and mlp of {', '.join(COMFY)}")


def _family(network: Any) -> str:
    """Class of the transformer; of two experts, of each."""
    base = network.get_base_model() if hasattr(network, "peft_config") else network
    return type(base.transformer if _is_pair(base) else base).__name__

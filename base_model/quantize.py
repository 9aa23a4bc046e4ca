"""Frozen weights in four bits: NF4 (Dettmers et al. 2023, arXiv 2305.14314), on a CPU as on a GPU."""

from __future__ import annotations

import logging
import re
from typing import Any

import torch
from torch import nn

from base_model.errors import UserError

BLOCK = 64  # weights that share a scale


def to_nf4(network: nn.Module, targets: str, device: torch.device | None = None) -> int:
    """Turns every `nn.Linear` whose whole name matches the pattern `targets` into a frozen 4-bit one, in place; returns how many.

    device: where they go, one after another, so that the whole network need never be there in full; None where they are. Computes in the dtype that the weights had. peft
    is told, so that LoRA goes onto the 4-bit layers. Raises ValueError where nothing matches, UserError where rows are no multiple of a block of 64 weights long: on a CPU
    bitsandbytes reads such rows wrongly.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of an optional kernel of 4-bit inference
    import bitsandbytes

    found = [(name, module) for name, module in network.named_modules() if type(module) is nn.Linear and re.fullmatch(targets, name)]
    if not found:
        raise ValueError(f"no linear layer is called {targets}")
    uneven = [name for name, module in found if module.in_features % BLOCK]
    if uneven:
        raise UserError(f"{uneven[0]} has rows that are no multiple of {BLOCK} weights long and cannot be kept in four bits. Leave NF4 off for this model")
    for name, module in found:
        weight, bias = module.weight.data, module.bias
        small = bitsandbytes.nn.Linear4bit(module.in_features, module.out_features, bias is not None, weight.dtype, quant_type="nf4", device="meta")
        small.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
        if bias is not None:
            small.bias = nn.Parameter(bias.data, requires_grad=False)
        small.support_avx512bf16_for_cpu = False  # else the first scoring repacks the weights in bfloat16, in place and not exactly back
        network.set_submodule(name, small.to(device or weight.device))
    network.is_loaded_in_4bit = True  # type: ignore[assignment]  # the mark peft looks for
    return len(found)


def from_nf4(network: nn.Module) -> int:
    """Turns every 4-bit layer back into an `nn.Linear` of the values it holds, in the dtype that it computes in, in place; returns how many. What the rounding took stays lost."""
    found = [(name, module) for name, module in network.named_modules() if is_nf4(module)]
    for name, module in found:
        network.set_submodule(name, dequantized(module))
    vars(network).pop("is_loaded_in_4bit", None)
    return len(found)


def is_nf4(module: nn.Module) -> bool:
    """Whether it is a 4-bit layer, without an adapter of its own."""
    return type(module).__name__ == "Linear4bit" and not hasattr(module, "base_layer")


def dequantized(layer: Any) -> nn.Linear:
    """A plain layer of the values of a 4-bit one, frozen."""
    from bitsandbytes.functional import dequantize_4bit

    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)  # [out,in]
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.data, requires_grad=False)
    return plain

"""Wan's published architectures with random weights: what a step costs can be measured without a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

T2V_1_3B: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "num_layers": 30,
}
"""`WanTransformer3DModel` of Wan2.1-T2V-1.3B; what is not named is the class's own default."""
VAE_2_1: dict[str, Any] = {"base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "temperal_downsample": [False, True, True]}
"""`AutoencoderKLWan` of Wan2.1."""


def random_transformer(config: dict[str, Any], *, device: torch.device, dtype: torch.dtype) -> Any:
    """A frozen `WanTransformer3DModel` with fresh weights, made on the device in its precision."""
    from diffusers import WanTransformer3DModel

    return _made(WanTransformer3DModel, config, device, dtype)


def random_vae(config: dict[str, Any], *, device: torch.device, dtype: torch.dtype) -> Any:
    """A frozen `AutoencoderKLWan` with fresh weights, made on the device in its precision."""
    from diffusers import AutoencoderKLWan

    return _made(AutoencoderKLWan, config, device, dtype)


def _made(kind: Any, config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> nn.Module:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            made: nn.Module = kind(**config)
    finally:
        torch.set_default_dtype(before)
    return made.requires_grad_(False).eval()

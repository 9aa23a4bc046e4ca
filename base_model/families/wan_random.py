"""Wan with random weights: at its published sizes, so that what a step costs can be measured, and a whole checkpoint at toy size, so that commands can be tried."""

from __future__ import annotations

from pathlib import Path
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


# Toy size

TOY_WORDS = ("a", "red", "blue", "ball", "cube", "circle", "rolls", "to", "the", "left", "right", "slowly", "and", "then", "stops")
TOY_TRANSFORMER: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 64,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
TOY_VAE: dict[str, Any] = {"base_dim": 3, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}


def toy_tokenizer() -> Any:
    """T5's own class over a handful of words; what is none of them is unknown."""
    from transformers import T5Tokenizer

    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((f"\u2581{word}", -1.0) for word in TOY_WORDS)], extra_ids=0)


def toy_text_encoder(width: int = 16) -> Any:
    """Wan's kind of text encoder with random weights, one layer of them; its states have `width` numbers a token."""
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(UMT5Config(vocab_size=32, d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=4, relative_attention_num_buckets=8)).eval()


def save_toy(folder: str | Path, *, seed: int = 0) -> None:
    """A text-to-video checkpoint of Wan's own classes, half a megabyte of random weights: whatever takes `wan2.1-1.3b` takes this folder, and runs in seconds on a CPU."""
    torch.manual_seed(seed)
    save_random(folder, TOY_TRANSFORMER, TOY_VAE, device=torch.device("cpu"), dtype=torch.float32)


def save_random(folder: str | Path, transformer: dict[str, Any], vae: dict[str, Any], *, device: torch.device, dtype: torch.dtype) -> None:
    """The same with a transformer and a VAE of any sizes, of which the transformer is kept in `dtype`; texts stay toys."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    text_encoder = toy_text_encoder(transformer["text_dim"])
    parts = random_vae(vae, device=device, dtype=torch.float32), FlowMatchEulerDiscreteScheduler(shift=3.0), random_transformer(transformer, device=device, dtype=dtype)
    WanPipeline(toy_tokenizer(), text_encoder, *parts).save_pretrained(folder)

"""A whole Mochi pipeline of diffusers' own classes, tiny and of random weights, with a tokenizer made of a few words."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel

from tests.base_model.families.tiny_ltx import WIDTH, tiny_t5, tiny_tokenizer


def tiny_pipeline(*, zero_empty: bool = True, wide: bool = False) -> Any:
    """wide: rows of a multiple of 64 weights, also in the MLPs, which are 8/3 as wide."""
    torch.manual_seed(7)
    head = 96 if wide else 8
    inner = {"num_attention_heads": 2, "attention_head_dim": head, "num_layers": 2, "pooled_projection_dim": 2 * head, "time_embed_dim": 16}
    transformer = MochiTransformer3DModel(text_embed_dim=WIDTH, **inner)
    transformer.pos_frequencies.data.normal_()  # zero in a fresh network
    blocks = (32, 32, 32, 32)  # the VAE's norms ask for 32
    vae = AutoencoderKLMochi(encoder_block_out_channels=blocks, decoder_block_out_channels=blocks, layers_per_block=(1, 1, 1, 1, 1), scaling_factor=0.7)
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    pipeline = MochiPipeline(scheduler, vae.eval(), tiny_t5().eval(), tiny_tokenizer(), transformer.eval(), force_zeros_for_empty_prompt=zero_empty)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline

"""A whole LTX-Video pipeline of diffusers' own classes, tiny and of random weights, with a tokenizer made of a few words."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

CHANNELS, WIDTH = 8, 32
WORDS = ("a", "red", "circle", "blue", "cat", "moves", "left", "in", "the", "rain")


def tiny_tokenizer() -> Any:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -2.0) for word in WORDS)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0)


def tiny_t5() -> Any:
    config = T5Config(vocab_size=3 + len(WORDS), d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return T5EncoderModel(config)


def tiny_pipeline(*, timed_decoder: bool = False, wide: bool = False) -> Any:
    """timed_decoder: a VAE whose decoder is told a time and draws noise, as that of 0.9.1. wide: rows of a multiple of 64 weights."""
    torch.manual_seed(7)
    head = 16 if wide else 8
    inner = {"num_attention_heads": 4, "attention_head_dim": head, "cross_attention_dim": 4 * head, "num_layers": 2}
    transformer = LTXVideoTransformer3DModel(in_channels=CHANNELS, out_channels=CHANNELS, caption_channels=WIDTH, **inner)
    timed = {"timestep_conditioning": True, "decoder_inject_noise": (True, True, False, False, False)} if timed_decoder else {}
    vae = AutoencoderKLLTXVideo(
        latent_channels=CHANNELS,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        scaling_factor=0.7,
        **timed,
    )
    vae.latents_mean.normal_()
    vae.latents_std.uniform_(0.5, 2.0)
    for name, parameter in vae.named_parameters():
        if "per_channel_scale" in name:  # of the noise, zero in a fresh decoder
            torch.nn.init.normal_(parameter)
    shifts = {"base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 4, "max_image_seq_len": 16, "shift_terminal": 0.1}
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **shifts)
    pipeline = LTXPipeline(scheduler, vae.eval(), tiny_t5().eval(), tiny_tokenizer(), transformer.eval())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline

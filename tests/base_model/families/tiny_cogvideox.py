"""CogVideoX of a toy's size: diffusers' whole pipeline of real classes with random weights, as `save_pretrained` writes it."""

from __future__ import annotations

from typing import Any, Literal

import torch

Kind = Literal["2b", "5b", "1.5"]
WORDS = ("a", "red", "blue", "circle", "square", "moves", "left", "right", "slowly", "over", "the", "sea")
TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 16,
    "num_layers": 2,
    "sample_width": 8,
    "sample_height": 6,
    "sample_frames": 9,
    "max_text_seq_length": 12,
}
OF_KIND: dict[Kind, dict[str, Any]] = {
    "2b": {},
    "5b": {"use_rotary_positional_embeddings": True},
    "1.5": {"use_rotary_positional_embeddings": True, "patch_size_t": 2, "patch_bias": False},
}
SCHEDULER = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "clip_sample": False, "set_alpha_to_one": True}


def tiny_pipeline(kind: Kind = "2b", *, wide: bool = False) -> Any:
    """A `CogVideoXPipeline` in evaluation mode, float32, with DDIM; clips of 1 + 4 k frames (1.5: 8 k), sides multiples of 16 pixels. wide: rows of a multiple of 64 weights."""
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    torch.manual_seed(0)
    tokenizer = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((f"▁{word}", -1.0) for word in WORDS)], extra_ids=0)
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=1.15258426 if kind == "2b" else 0.7,
    )
    transformer = CogVideoXTransformer3DModel(**TRANSFORMER | OF_KIND[kind] | ({"attention_head_dim": 32} if wide else {}))
    text_encoder = T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    scheduler = CogVideoXDDIMScheduler(**SCHEDULER, snr_shift_scale=3.0 if kind == "2b" else 1.0)
    pipeline = CogVideoXPipeline(tokenizer, text_encoder.eval(), vae.eval(), transformer.eval(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline

"""Whole Wan pipelines of real classes at toy size and random weights, float32 and in evaluation mode."""

from __future__ import annotations

from typing import Any

import torch

WORDS = ["a", "red", "blue", "ball", "cube", "circle", "rolls", "to", "the", "left", "right", "slowly", "and", "then", "stops"]
TRANSFORMER: dict[str, Any] = {
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
VAE: dict[str, Any] = {"base_dim": 3, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}


def tokenizer() -> Any:
    """T5's own class over a handful of words; what is none of them is unknown."""
    from transformers import T5Tokenizer

    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((f"▁{word}", -1.0) for word in WORDS)], extra_ids=0)


def text_encoder() -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(UMT5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4, relative_attention_num_buckets=8)).eval()


def transformer(**changes: Any) -> Any:
    """Its last layer is three times as large as at birth, so that what the network says is seen in what is sampled."""
    from diffusers import WanTransformer3DModel

    network = WanTransformer3DModel(**{**TRANSFORMER, **changes}).eval()
    with torch.no_grad():
        network.proj_out.weight.mul_(3)
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    return network


def euler(shift: float = 3.0) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=shift)


def unipc(shift: float = 3.0) -> Any:
    """What Wan's checkpoints come with."""
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def text_to_video() -> Any:
    from diffusers import AutoencoderKLWan, WanPipeline

    torch.manual_seed(0)
    made = WanPipeline(tokenizer(), text_encoder(), AutoencoderKLWan(**VAE).eval(), euler(), transformer())
    made.set_progress_bar_config(disable=True)
    return made

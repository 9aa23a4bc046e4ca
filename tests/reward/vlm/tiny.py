"""Tiny random Qwen vision-language models and a tokenizer, built from configurations: every class is transformers' own, every weight is random."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from base_model.prompts.vision import FAMILIES
from reward.vlm.frames import FrameSampler
from reward.vlm.model import VlmReward, load_base
from reward.vlm.prompt import Dimension

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
SENTENCES = "You are a helpful assistant. system user Judge this generated video. The prompt it was made for: Rating of overall: look: match: a bright dark clip seconds"
FRAMES = FrameSampler(fps=4.0, min_frames=2, max_frames=16, min_pixels=64, max_pixels=1024)
LOOK, MATCH = Dimension("look", "How does it look?", sees_prompt=False), Dimension("match", "Does it show what was asked for?")


@cache
def tokenizer() -> Any:
    """A byte-level BPE of 320 tokens: it knows every text, and the common words of the rubrics in a few tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator([SENTENCES] * 3, trainers.BpeTrainer(vocab_size=320, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|endoftext|>", eos_token="<|im_end|>")


def tiny_network(family: str, seed: int = 0, width: int = 32) -> Any:
    """Two layers in either tower, patches of 4 pixels, rows for 64 more tokens than the tokenizer has. As `AutoModelForImageTextToText` makes it."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    ids = {name: tokenizer().convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start", "vision_end")}
    text = {"vocab_size": 384, "hidden_size": width, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"rope_scaling": {"rope_type": "default", "mrope_section": [width // 32, width // 32, width // 16]}, "bos_token_id": 1, "eos_token_id": 2}
    vision = {"depth": 2, "hidden_size": width, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    vision |= {
        "qwen2_vl": {"embed_dim": width, "mlp_ratio": 2},
        "qwen2_5_vl": {"intermediate_size": 64, "out_hidden_size": width, "window_size": 16, "fullatt_block_indexes": [1], "tokens_per_second": 2},
        "qwen3_vl": {"intermediate_size": 64, "out_hidden_size": width, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    }[family]
    if family == "qwen3_vl":
        text["head_dim"] = width // 4
    marks = {f"{name}_token_id": ids[key] for name, key in (("image", "image_pad"), ("video", "video_pad"), ("vision_start",) * 2, ("vision_end",) * 2)}
    config = AutoConfig.for_model(family, text_config=text, vision_config=vision, tie_word_embeddings=True, **marks)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = AutoModelForImageTextToText.from_config(config)
        for parameter in network.parameters():  # what starts as 0 or 1 is random too
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return network.eval()


def save_tiny(folder: Path, family: str, seed: int = 0, width: int = 32) -> Path:
    """The model and its tokenizer in a folder, as a user would have them."""
    assert family in FAMILIES
    tiny_network(family, seed, width).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tiny_reward(folder: Path, dimensions: tuple[Dimension, ...] = (LOOK, MATCH), *, seed: int = 0, **options: Any) -> VlmReward:
    """On the base in `folder`, with a head and an adapter that are not zero."""
    model = VlmReward(load_base(folder), dimensions, sampler=FRAMES, clip_fps=8.0, **{"rank": 2, "alpha": 4.0, **options})
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.startswith("head.") or "lora_B" in name:
            parameter.data.normal_(generator=generator, std=0.3)
    return model


def clips(count: int = 3, frames: int = 9, height: int = 16, width: int = 24, seed: int = 1) -> Tensor:
    return torch.rand(count, frames, 3, height, width, generator=torch.Generator().manual_seed(seed))

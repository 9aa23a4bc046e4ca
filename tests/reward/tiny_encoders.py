"""Tiny random checkpoints of every family of encoders, with a tokenizer and a preprocessor's file, saved as transformers saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

FAMILIES = ("clip", "siglip", "xclip", "videomae", "vjepa2")
READS_TEXT = ("clip", "siglip", "xclip")
SIDE, WIDTH, LAYERS = 32, 32, 2
WORDS = ("<pad>", "<s>", "<unk>", "a", "red", "blue", "circle", "bar", "moves", "left", "grows", "bright", "dark", "clip", "</s>")
END = len(WORDS) - 1  # the greatest id, as in the published vocabularies: it is how the text networks find the end
LENGTH = 12
PIXELS = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}


def build(family: str) -> Any:
    """A random network of the family, in eval mode."""
    import transformers as t

    inner: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    text = {**inner, "vocab_size": len(WORDS), "max_position_embeddings": LENGTH, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": END}
    vision = {**inner, "image_size": SIDE, "patch_size": 16}
    torch.manual_seed(FAMILIES.index(family) if family in FAMILIES else len(FAMILIES))
    if family == "clip":
        network: Any = t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    elif family == "siglip":
        network = t.SiglipModel(t.SiglipConfig(text_config={**text, "projection_size": WIDTH}, vision_config=vision))
    elif family == "siglip_vision_model":
        network = t.SiglipVisionModel(t.SiglipVisionConfig(**vision))
    elif family == "xclip":
        mit = {"mit_hidden_size": 24, "mit_intermediate_size": 32, "mit_num_hidden_layers": 1, "mit_num_attention_heads": 2, "num_frames": 4}
        network = t.XCLIPModel(t.XCLIPConfig(text_config=text, vision_config={**vision, **mit}, projection_dim=24, prompt_layers=1, prompt_num_attention_heads=2))
    elif family == "videomae":
        network = t.VideoMAEModel(t.VideoMAEConfig(**vision, num_frames=4, decoder_num_attention_heads=2, decoder_hidden_size=16, decoder_intermediate_size=16))
    else:
        predictor = {"pred_hidden_size": 16, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1, "pred_num_mask_tokens": 1}
        network = t.VJEPA2Model(t.VJEPA2Config(**{**inner, **predictor}, crop_size=SIDE, patch_size=16, frames_per_clip=8, mlp_ratio=1.5))
    with torch.no_grad():
        for parameter in network.parameters():  # fresh ones are nearly constant functions
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


def preprocessor(family: str) -> tuple[str, dict[str, Any]]:
    """Name and values of the preprocessor's file, as the family's own processor has them but for the sizes."""
    square = {"height": SIDE, "width": SIDE}
    if family.startswith("siglip"):
        return "preprocessor_config.json", {**PIXELS, "size": square, "resample": 3}
    if family == "vjepa2":
        return "video_preprocessor_config.json", {**PIXELS, "size": {"shortest_edge": 36}, "do_center_crop": True, "crop_size": square, "resample": 2}
    cut = {**PIXELS, "size": {"shortest_edge": SIDE}, "do_center_crop": True, "crop_size": square}
    return "preprocessor_config.json", {**cut, "resample": 3 if family == "clip" else 2}


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", END)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>").save_pretrained(str(folder))


def save(family: str, folder: Path) -> Path:
    build(family).save_pretrained(str(folder))
    name, values = preprocessor(family)
    (folder / name).write_text(json.dumps(values))
    if family in READS_TEXT:
        save_tokenizer(folder)
    return folder

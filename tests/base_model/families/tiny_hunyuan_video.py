"""HunyuanVideo of a toy's size: diffusers' whole pipeline of real classes with random weights, as `save_pretrained` writes it."""

from __future__ import annotations

import string
from typing import Any

import torch

HEADERS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<pad>"]


def tiny_pipeline(*, distilled: bool = True, wide: bool = False) -> Any:
    """A `HunyuanVideoPipeline` in evaluation mode, float32; clips of 1 + 4 k frames, sides multiples of 16 pixels. distilled: whether it is told its guidance.

    wide: rows of a multiple of 64 weights.
    """
    from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
    from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

    torch.manual_seed(0)
    tokenizer, pooled_tokenizer = llama_tokenizer(), clip_tokenizer()
    llama = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2, pad_token_id=tokenizer.pad_token_id)
    ends = {"bos_token_id": pooled_tokenizer.bos_token_id, "eos_token_id": pooled_tokenizer.eos_token_id, "pad_token_id": pooled_tokenizer.pad_token_id}
    clip = CLIPTextConfig(vocab_size=len(pooled_tokenizer), hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, projection_dim=8, **ends)
    vae = AutoencoderKLHunyuanVideo(latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=32 if wide else 10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(8, 12, 12) if wide else (2, 4, 4),
        guidance_embeds=distilled,
    )
    pipeline = HunyuanVideoPipeline(
        text_encoder=LlamaModel(llama).eval(),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=CLIPTextModel(clip).eval(),
        tokenizer_2=pooled_tokenizer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def before_the_prompt() -> str:
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

    return str(DEFAULT_PROMPT_TEMPLATE["template"]).split("{}")[0]


def llama_tokenizer() -> Any:
    """Byte-level pairs as Llama 3 has them, learned from the template; it begins with so many <|begin_of_text|> that the template has its 95 tokens before the prompt."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=HEADERS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    pairs.train_from_iterator([before_the_prompt()] * 2, trainer)
    missing = 95 - len(pairs.encode(before_the_prompt()).ids)
    pairs.post_processor = processors.TemplateProcessing(single=[HEADERS[0]] * missing + ["$A"], special_tokens=[(HEADERS[0], pairs.token_to_id(HEADERS[0]))])
    return PreTrainedTokenizerFast(tokenizer_object=pairs, bos_token=HEADERS[0], eos_token="<|eot_id|>", pad_token="<pad>", padding_side="right")


def clip_tokenizer() -> Any:
    """CLIP's, one token a letter."""
    from transformers import CLIPTokenizer

    letters = [letter + end for letter in string.ascii_lowercase for end in ("", "</w>")]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}, merges=[])

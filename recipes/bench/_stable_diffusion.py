"""A latent diffusion model of images, of Stable Diffusion's classes and tiny, as a `VideoModel` of clips of one frame: for benches beside trainers that know no other model.

Its UNet predicts eps at whole steps of a table of alphas (`DDIMScheduler`), on the variance-preserving path: step n is the angle atan(sigma / alpha) of its row of the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from base_model.paths import VariancePreserving
from base_model.predictions import convert
from base_model.types import ClipShape, Conditioning, LatentSpec

PIXELS = 64
CLIP = ClipShape(1, PIXELS, PIXELS)
TEXT_TOKENS = 77
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass
class StableDiffusion:
    """Clips of one frame [B,C,1,H,W] for everything outside, images [B,C,H,W] for its networks."""

    network: nn.Module  # UNet2DConditionModel, perhaps wrapped by peft
    vae: Any  # AutoencoderKL
    text_encoder: Any  # CLIPTextModel
    tokenizer: Any
    scheduler: Any  # DDIMScheduler, for its table and its grid
    path: VariancePreserving = field(default_factory=VariancePreserving)
    angles: Tensor = field(init=False)  # [1000] the time t of each whole step, increasing

    def __post_init__(self) -> None:
        alpha_squared = self.scheduler.alphas_cumprod.double()  # [1000]
        self.angles = torch.atan2((1 - alpha_squared).sqrt(), alpha_squared.sqrt()).float()

    @property
    def latents(self) -> LatentSpec:
        return LatentSpec(self.vae.config.latent_channels, 1, 2 ** (len(self.vae.config.block_out_channels) - 1))

    def whole_step(self, t: Tensor) -> Tensor:
        """The row of the table at t [B], int64 [B]: the nearest one, so that rounding does not matter."""
        return (self.angles - t[:, None]).abs().argmin(1)

    def times(self, num_steps: int) -> Tensor:
        """The scheduler's own grid, then 0: [K+1]. trl's last step ends in row 0 of the table instead, with noise, and calls that the data."""
        self.scheduler.set_timesteps(num_steps)
        return torch.cat([self.angles[self.scheduler.timesteps], torch.zeros(1)])

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """x_t [B,C,1,H,W], t [B] -> u [B,C,1,H,W]."""
        eps = self.network(x_t[:, :, 0], self.whole_step(t), cond.text, return_dict=False)[0][:, :, None]  # [B,C,1,H,W]
        return convert(self.path, eps, x_t, t, kind="eps", to="u")

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """All 77 tokens take part, padding included, as in Stable Diffusion."""
        ids = self.tokenizer(list(prompts), return_tensors="pt", padding="max_length", truncation=True, max_length=TEXT_TOKENS).input_ids  # [B,77]
        with torch.no_grad():
            text = self.text_encoder(ids)[0]  # [B,77,32]
        return Conditioning(tuple(prompts), text, torch.ones(text.shape[:2], dtype=torch.bool))

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        latents = self.vae.encode(video[:, 0] * 2 - 1).latent_dist.mean * self.vae.config.scaling_factor  # [B,C,H,W]
        return latents[:, :, None]

    def decode(self, x0: Tensor) -> Tensor:
        pixels = self.vae.decode(x0[:, :, 0] / self.vae.config.scaling_factor, return_dict=False)[0]  # [B,3,64,64]
        return (pixels / 2 + 0.5).clamp(0, 1)[:, None]


def load(folder: Path) -> StableDiffusion:
    """The pipeline that `save_tiny` wrote. Its UNet keeps channels last: on a CPU convolutions of eight images and more are faster that way."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, PreTrainedTokenizerFast

    unet = UNet2DConditionModel.from_pretrained(folder / "unet", use_safetensors=True).to(memory_format=torch.channels_last)
    vae = AutoencoderKL.from_pretrained(folder / "vae", use_safetensors=True).requires_grad_(False)
    text = CLIPTextModel.from_pretrained(folder / "text_encoder", use_safetensors=True).requires_grad_(False)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    return StableDiffusion(unet, vae, text, tokenizer, DDIMScheduler.from_pretrained(folder / "scheduler"))


def save_tiny(folder: Path, prompts: Sequence[str], *, width: int = 32, seed: int = 0) -> None:
    """A pipeline with fresh weights in diffusers' own format: UNet and VAE of `width` and twice as many channels, CLIP text model, a tokenizer of the prompts' words."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", *sorted({word for prompt in prompts for word in prompt.split()})]
    model = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", unk_token="<unk>", model_max_length=TEXT_TOKENS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=PIXELS // 2,
            layers_per_block=2,
            block_out_channels=(width, 2 * width),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
        )
        vae = AutoencoderKL(
            block_out_channels=(width, 2 * width), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, sample_size=PIXELS
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(words),
                hidden_size=32,
                intermediate_size=37,
                num_hidden_layers=5,
                num_attention_heads=4,
                max_position_embeddings=TEXT_TOKENS,
                pad_token_id=0,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    StableDiffusionPipeline(vae, text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False).save_pretrained(folder)

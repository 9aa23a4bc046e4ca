"""Mochi, text to video, behind `VideoModel`: diffusers' transformer and VAE, and T5.

Mochi is trained on the rectified path the other way round: its time runs from 0 at pure noise to 1000 at the data, and it predicts x0 - eps. It is told 1000 (1 - t), and its
answer changes sign.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from base_model.errors import UserError
from base_model.families.parts import decode_clips, encode_clips, load_part, load_plain
from base_model.paths import RectifiedFlow
from base_model.types import ClipShape, Conditioning, LatentSpec

LORA_TARGETS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn1.add_k_proj", "attn1.add_v_proj", "attn1.to_add_out")
"""The linears of the joint attention of clip and text; not the text's queries, which lead nowhere in the last block."""
MLP_TARGETS = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
TEXT_TOKENS = 256
LINEAR_NOISE = 0.025  # how much noise the linear half of the sampling grid takes away


@dataclass
class MochiVideoModel:
    """A `VideoModel`. The network computes in the precision of its weights; velocities come back in float32."""

    network: Any  # MochiTransformer3DModel, or peft's wrapper of it
    vae: Any  # AutoencoderKLMochi
    text_encoder: Any  # T5EncoderModel
    tokenizer: Any  # T5TokenizerFast
    scheduler: Any  # FlowMatchEulerDiscreteScheduler; only its configuration is read
    zero_empty: bool = False  # whether the empty prompt is a text of no tokens: the checkpoint's `force_zeros_for_empty_prompt`

    @property
    def path(self) -> RectifiedFlow:
        return RectifiedFlow()

    @property
    def latents(self) -> LatentSpec:
        return LatentSpec(self.network.config["in_channels"], self.vae.temporal_compression_ratio, self.vae.spatial_compression_ratio)

    @property
    def patch(self) -> tuple[int, int, int]:
        return 1, self.network.config["patch_size"], self.network.config["patch_size"]

    @property
    def lora_targets(self) -> tuple[str, ...]:
        return LORA_TARGETS

    @property
    def mlp_targets(self) -> tuple[str, ...]:
        return MLP_TARGETS

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def to(self, device: torch.device) -> MochiVideoModel:
        for part in (self.network, self.vae, self.text_encoder):
            part.to(device)
        return self

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """x_t [B,C,F,H,W], t [B] -> u [B,C,F,H,W], float32."""
        dtype = self.network.dtype
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "In CPU autocast", UserWarning)  # diffusers asks for a rotary table in float32, and gets it, by an autocast that CPUs do not have
            told: Tensor = self.network(
                hidden_states=x_t.to(dtype),
                encoder_hidden_states=cond.text.to(dtype),
                encoder_attention_mask=cond.mask,
                timestep=1000 * (1 - t.expand(len(x_t))),
                return_dict=False,
            )[0]
        return -told.float()

    def times(self, steps: int, clip: ClipShape) -> Tensor:
        """The grid of the pipeline, [K+1] from 1 to 0: the first half of the steps is linear and takes away 0.025 of the noise, the second is quadratic and goes on as steeply.

        Raises ValueError where the clip does not fall on the grid of patches, or where there is one step only.
        """
        _, _, height, width = self.latents.shape(clip)
        if height % (patch := self.network.config["patch_size"]) or width % patch:
            raise ValueError(f"clip {clip} does not fit the patches of this model: sides must be a multiple of {patch * self.latents.space_stride}")
        if steps < 2:
            raise ValueError(f"this model is sampled in at least 2 steps, got {steps}")
        linear, scheduler = steps // 2, deepcopy(self.scheduler)
        curve = (1 - LINEAR_NOISE * steps / linear) / (steps - linear) ** 2
        k = torch.arange(steps, dtype=torch.float64)  # [K]
        noise = 1 - LINEAR_NOISE * k / linear - curve * (k - linear).clamp_min(0).square()  # [K]
        scheduler.set_timesteps(sigmas=noise.tolist())
        sigmas: Tensor = scheduler.sigmas  # [K+1] from 0 to 1
        return 1 - sigmas

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """T5 states of 256 tokens a prompt, padding masked."""
        tokens = self.tokenizer(list(prompts), padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt").to(self.text_encoder.device)
        ids, mask = tokens.input_ids, tokens.attention_mask.bool()  # [B,L] each
        if self.zero_empty:
            empty = torch.tensor([prompt == "" for prompt in prompts], device=mask.device)[:, None]  # [B,1]
            ids, mask = ids.masked_fill(empty, 0), mask & ~empty
        text = self.text_encoder(ids, attention_mask=mask)[0]  # [B,L,D]
        return Conditioning(tuple(prompts), text.to(self.device), mask.to(self.device))

    def encode(self, video: Tensor) -> Tensor:
        """[B,T,3,H,W] in [0,1] -> latents [B,C,F,H,W] float32, one clip after another."""
        mean, std = self._statistics()
        return (encode_clips(self.vae, video) - mean) / std

    def decode(self, x0: Tensor) -> Tensor:
        """Latents [B,C,F,H,W] -> [B,T,3,H,W] in [0,1], float32, one clip after another: activations of the decoder are large."""
        mean, std = self._statistics()
        return decode_clips(self.vae, x0.float() * std + mean)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel of the VAE's latents, [C,1,1,1]."""
        config = self.vae.config
        mean, std = (torch.tensor(values, device=self.vae.device)[:, None, None, None] for values in (config.latents_mean, config.latents_std))
        return mean, std / config.scaling_factor


def load(source: str, *, device: torch.device, dtype: torch.dtype) -> MochiVideoModel:
    """A checkpoint of Mochi in diffusers' layout. Raises UserError where a part is missing or of another family."""
    from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiTransformer3DModel
    from transformers import T5EncoderModel, T5TokenizerFast

    return MochiVideoModel(
        load_part(MochiTransformer3DModel, source, "transformer", device=device, dtype=dtype),
        vae=load_part(AutoencoderKLMochi, source, "vae", device=device, dtype=dtype),
        text_encoder=load_part(T5EncoderModel, source, "text_encoder", device=device, dtype=dtype),
        tokenizer=load_plain(T5TokenizerFast, source, "tokenizer"),
        scheduler=load_plain(FlowMatchEulerDiscreteScheduler, source, "scheduler"),
        zero_empty=_zeroes_empty_prompts(source),
    )


def _zeroes_empty_prompts(source: str) -> bool:
    """What the checkpoint as a whole says of the empty prompt, which guidance is measured from."""
    from diffusers import MochiPipeline

    try:
        return bool(MochiPipeline.load_config(source).get("force_zeros_for_empty_prompt", False))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read model_index.json of {source}. Give a whole folder that diffusers saved, or the name of one on the hub") from error

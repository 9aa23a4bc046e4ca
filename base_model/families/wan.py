"""Wan 2.1 and 2.2 behind `VideoModel`: diffusers' transformer, VAE, text encoder and sampling grid. Image to video is `wan_image.py`, A14B's network `wan_experts.py`.

Wan is trained on the rectified path and predicts eps - x0, which is our velocity as it stands; only its clock differs: it is told 1000 t. Texts are UMT5 states of
512 tokens, zero behind the end of a prompt, and never masked: the network looks at those zeros too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from base_model.errors import UserError
from base_model.families.parts import decode_clips, encode_clips, load_part, load_plain, read_index
from base_model.paths import RectifiedFlow
from base_model.prompts.conditions import Canvas, encode_known, obey
from base_model.types import ClipShape, Conditioning, LatentSpec

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")
MLP_TARGETS = ("ffn.net.0.proj", "ffn.net.2")
TEXT_TOKENS = 512
SCHEDULERS = ("UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler")
Encoder = Callable[[Sequence[str]], tuple[Tensor, Tensor]]
"""B prompts -> states [B,512,D], zero behind the end of a prompt, and which are of a prompt [B,512]."""
Ask = Callable[[Tensor, Tensor], Tensor]
"""What the network is given [B,C',F,H,W] and times, [B] or one a token [B,n] -> velocity [B,C,F,H,W]."""


class PromptStates(nn.Module):
    """The text encoder as Wan's pipeline calls it."""

    def __init__(self, tokenizer: Any, umt5: Any) -> None:
        super().__init__()
        self.tokenizer, self.umt5 = tokenizer, umt5

    @torch.no_grad()
    def forward(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        clean = [prompt_clean(prompt) for prompt in prompts]
        tokens = self.tokenizer(clean, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt").to(self.umt5.device)
        states, mask = self.umt5(tokens.input_ids, tokens.attention_mask).last_hidden_state, tokens.attention_mask.bool()  # [B,512,D], [B,512]
        return states.where(mask[..., None], 0), mask


@dataclass
class WanVideoModel:
    """A `VideoModel`. The network computes in the precision of its weights; velocities come back in float32.

    What a visual prompt gives (`cond.known`) is told to the network as tokens of time 0: what TI2V 5B was trained on, and a text-to-video checkpoint was not.
    """

    network: Any  # WanTransformer3DModel, two of them (`Experts`), or peft's wrapper of either
    vae: Any = None  # AutoencoderKLWan
    encoder: Encoder | None = None
    scheduler: Any = None  # one of SCHEDULERS; only its grid is used

    @property
    def path(self) -> RectifiedFlow:
        return RectifiedFlow()

    @property
    def latents(self) -> LatentSpec:
        """As the VAE says; Wan2.1's where there is none."""
        if self.vae is None:
            return LatentSpec(channels=16, time_stride=4, space_stride=8)
        config = self.vae.config
        return LatentSpec(config.z_dim, config.scale_factor_temporal, config.scale_factor_spatial)

    @property
    def patch(self) -> tuple[int, int, int]:
        frames, height, width = self.network.config.patch_size
        return frames, height, width

    @property
    def lora_targets(self) -> tuple[str, ...]:
        return LORA_TARGETS

    @property
    def mlp_targets(self) -> tuple[str, ...]:
        return MLP_TARGETS

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def to(self, device: torch.device) -> WanVideoModel:
        """Moves all parts, in place."""
        for part in vars(self).values():
            if isinstance(part, nn.Module):
                part.to(device)
        return self

    def times(self, steps: int, clip: ClipShape) -> Tensor:
        """The scheduler's grid, [steps + 1] from 1 to 0: its shift is the same for every clip."""
        if self.scheduler is None:
            raise UserError("this model was built without a scheduler, which holds its sampling grid. Give it one, or sampling_times(model.path, steps, shift=3.0)")
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        scheduler.set_timesteps(steps)
        return torch.where(scheduler.sigmas > 1 - 1e-5, 1, scheduler.sigmas)  # UniPC begins at 1 - 1e-6, where alpha is rounding noise

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """x_t [B,C,F,H,W], t [B] -> u [B,C,F,H,W], float32; where `cond.known` gives a latent, u leads from x_t straight to it."""
        return self.through(partial(self._velocity, cond=cond), x_t, t.expand(len(x_t)), cond)

    def through(self, ask: Ask, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The velocity where `ask` answers for the network, which knows texts and images: all that a packed pass does clip by clip (`wan_packed.py`)."""
        if cond.known is None:
            return ask(x_t, t)
        return obey(lambda x, times: ask(x, times.reshape(len(x), -1)), self.path, self.network.config.patch_size, x_t, t, cond.known)

    def states(self, cond: Conditioning) -> tuple[Tensor, Tensor | None]:
        """The texts [B,L,D] and images [B,M,E] that the network is told, in the precision they have."""
        text = cond.text.where(cond.mask[..., None], 0)  # [B,L,D]
        if cond.image is not None:
            text = pad(text, (0, 0, 0, TEXT_TOKENS - text.shape[1]))  # [B,512,D]: the network takes what is more for the image
        return text, cond.image

    def _velocity(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """t [B], or one a token [B,n]. Raises UserError for a clip that is no whole number of patches."""
        patch = self.network.config.patch_size
        if any(size % side for size, side in zip(x.shape[2:], patch, strict=True)):
            side = patch[1] * self.latents.space_stride
            raise UserError(f"Wan reads latents in patches, and {x.shape[3]}x{x.shape[4]} of them make no whole number. Give clips whose height and width are multiples of {side}")
        (text, image), dtype = self.states(cond), self.network.dtype
        image = None if image is None else image.to(dtype)
        told = {"hidden_states": x.to(dtype), "timestep": 1000 * t, "encoder_hidden_states": text.to(dtype), "encoder_hidden_states_image": image}
        u: Tensor = self.network(**told, return_dict=False)[0]
        return u.float()

    def with_canvases(self, cond: Conditioning, canvases: Sequence[Canvas]) -> Conditioning:
        """B texts and B canvases, which may give what they like."""
        return replace(cond, known=encode_known(self, canvases, self.network.config.patch_size))

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """Raises UserError where the model was built without an encoder."""
        if self.encoder is None:
            raise UserError("this model was built without a text encoder. Give it one")
        return Conditioning(tuple(prompts), *self.encoder(prompts))

    def encode(self, video: Tensor) -> Tensor:
        """[B,T,3,H,W] in [0,1] -> latents [B,C,F,H,W] float32, one clip after another."""
        vae, (mean, std) = self._vae(), self._statistics(video.device)
        return (encode_clips(vae, video) - mean) / std

    def decode(self, x0: Tensor) -> Tensor:
        """Latents [B,C,F,H,W] -> [B,T,3,H,W] in [0,1], float32, one clip after another: activations of the decoder are large."""
        vae, (mean, std) = self._vae(), self._statistics(x0.device)
        return decode_clips(vae, x0.float() * std + mean)

    def _vae(self) -> Any:
        if self.vae is None:
            raise UserError("this model was built without a VAE: it makes latents, no pixels. Give it one")
        return self.vae

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each latent channel, [C,1,1,1]."""
        config = self._vae().config
        mean, std = (torch.tensor(values, device=device)[:, None, None, None] for values in (config.latents_mean, config.latents_std))
        return mean, std


def load(source: str, *, device: torch.device, dtype: torch.dtype) -> WanVideoModel:
    """A folder that diffusers saved, or a name on the hub. VAE and image encoder come in float32 whatever the dtype, as its authors run them. Raises UserError."""
    import diffusers
    from transformers import CLIPVisionModel, T5TokenizerFast, UMT5EncoderModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from base_model.families.wan_experts import Experts
    from base_model.families.wan_image import ImageStates, WanImageVideoModel

    def part(kind: Any, name: str, dtype: torch.dtype) -> Any:
        return load_part(kind, source, name, device=device, dtype=dtype)

    index = read_index(source)
    parts = {name: value[1] for name, value in index.items() if isinstance(value, list) and value[1] is not None}
    if parts.get("scheduler") not in SCHEDULERS:
        raise UserError(f"{source} is sampled with {parts.get('scheduler')}, whose grid is not known. Give a checkpoint with one of {', '.join(SCHEDULERS)}")
    network, vae = part(diffusers.WanTransformer3DModel, "transformer", dtype), part(diffusers.AutoencoderKLWan, "vae", torch.float32)
    channels, expected = network.config.in_channels, (vae.config.z_dim, 2 * vae.config.z_dim + vae.config.scale_factor_temporal)
    if channels not in expected:
        raise UserError(f"{source} takes {channels} channels where {expected[0]} or, from an image, {expected[1]} are known. Give a text or image to video checkpoint of Wan")
    if "transformer_2" in parts and index.get("boundary_ratio") is not None:
        network = Experts(network, part(diffusers.WanTransformer3DModel, "transformer_2", dtype), index["boundary_ratio"])
    encoder = PromptStates(load_plain(T5TokenizerFast, source, "tokenizer"), part(UMT5EncoderModel, "text_encoder", dtype))
    scheduler = load_plain(getattr(diffusers, parts["scheduler"]), source, "scheduler")
    if channels == expected[0]:
        return WanVideoModel(network, vae, encoder, scheduler)
    eye = ImageStates(load_plain(CLIPImageProcessorPil, source, "image_processor"), part(CLIPVisionModel, "image_encoder", torch.float32)) if "image_encoder" in parts else None
    return WanImageVideoModel(network, vae, encoder, scheduler, eye)

"""The models a clip passes through when one model does not make it alone: frame models (keyframes, interpolation) and upsampling stages.

Each is a `VideoModel`, a stage once it is told what it enlarges: `stage.told(...)`. Letters: B clips, T frames, C H W latent channels, height and width, n tokens of a clip.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path as FilePath

import torch
from torch import Tensor

from base_model.checkpoint import load_weights, save_weights
from base_model.errors import UserError
from base_model.networks.dit import DiT, DiTConfig
from base_model.networks.packing import Segments, grid_positions, patchify, token_grid, unpatchify
from base_model.networks.temporal import TemporalDiT
from base_model.networks.upsample import RESAMPLING, Axis, Upsampler
from base_model.paths import Path, RectifiedFlow
from base_model.prompts.conditions import obey
from base_model.prompts.text import TextEncoder
from base_model.tiny import WEIGHTS, LatentCodec, build_from, load_codec, load_state, packed_text, read_config
from base_model.types import Conditioning, Known, LatentSpec


@dataclass(frozen=True)
class FrameModel:
    """Videos whose frames are encoded one by one, each as an image by the built-in codec: F = T, and any number of frames will do.

    `stride`: frames of the finished clip from one frame of this one to the next. Frames that are given are conditions like any other (`tell_frames`).
    """

    network: TemporalDiT
    codec: LatentCodec
    text: TextEncoder
    path: Path = field(default_factory=RectifiedFlow)
    stride: int = 1

    @property
    def latents(self) -> LatentSpec:
        codec = self.codec.vae.config.latents
        return LatentSpec(codec.channels, 1, codec.space_stride)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def to(self, device: torch.device) -> FrameModel:
        """Moves network and codec."""
        self.network.to(device)
        self.codec.to(device)
        return self

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """x_t [B,C,T,H,W], t [B] -> u [B,C,T,H,W]; where `cond.known` gives a latent, u leads from x_t straight to it."""
        t, velocity = t.expand(len(x_t)), partial(self._velocity, cond=cond)  # [B]
        return velocity(x_t, t) if cond.known is None else obey(velocity, self.path, self.network.config.patch, x_t, t, cond.known)

    def _velocity(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """t: one noise level a clip [B], or one a token [B n]."""
        grid = token_grid(x_t.shape, self.network.config.patch)
        tokens = patchify(x_t, self.network.config.patch)  # [B,n,c]
        positions = grid_positions(grid).to(x_t.device) * x_t.new_tensor([self.stride, 1, 1])  # [n,3]
        segments = Segments.equal(len(x_t), tokens.shape[1])
        u = self.network(tokens.flatten(0, 1), positions.repeat(len(x_t), 1), segments, t, *packed_text(cond))  # [B n,c]
        return unpatchify(u.unflatten(0, (len(x_t), -1)), x_t.shape[1], grid, self.network.config.patch).float()

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        return self.text(prompts).to(self.device)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """[B,T,3,H,W] in [0,1] -> [B,C,T,H,W]."""
        frames = self.codec.encode(video.to(self.device).flatten(0, 1)[:, None])  # [B T,C,1,H,W]
        return frames[:, :, 0].unflatten(0, video.shape[:2]).transpose(1, 2)

    def decode(self, x0: Tensor) -> Tensor:
        frames = self.codec.decode(x0.transpose(1, 2).flatten(0, 1)[:, :, None])  # [B T,1,3,H,W]
        return frames[:, 0].unflatten(0, (len(x0), x0.shape[2]))


def tell_frames(cond: Conditioning, values: Tensor, known: Tensor) -> Conditioning:
    """The same, and the frames `known` [T] of `values` [B,C,T,H,W] are given; none known: as it is."""
    mask = known[None, :, None, None].expand(len(values), *values.shape[2:])  # [B,T,H,W]
    return replace(cond, known=Known(values, mask)) if known.any() else cond


@dataclass(frozen=True)
class UpsampleStage:
    """An `Upsampler` on pixels, scaled to about unit variance: `encode` and `decode` turn the axes and nothing else."""

    network: Upsampler
    axis: Axis
    text: TextEncoder
    low: Tensor | None = None  # [B,3,T,H,W], upsampled and corrupted
    level: Tensor | None = None  # [B]

    latents = LatentSpec(channels=3, time_stride=1, space_stride=1)

    @property
    def path(self) -> Path:
        return self.network.path

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def to(self, device: torch.device) -> UpsampleStage:
        """Moves the network."""
        self.network.to(device)
        return self

    def told(self, low: Tensor, level: Tensor) -> UpsampleStage:
        """The same stage, told the small clips `low` [B,3,T,H,W], upsampled and corrupted to `level` [B]."""
        return replace(self, low=low, level=level)

    def upsample(self, video: Tensor) -> Tensor:
        return RESAMPLING[self.axis].upsample(video)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """x_t [B,3,T,H,W], t [B] -> u [B,3,T,H,W]. Raises ValueError where the stage was not told a small clip."""
        if self.low is None or self.level is None:
            raise ValueError("an upsampling stage needs a small clip: say stage.told(low, level) first")
        patch = self.network.config.patch
        grid = token_grid(x_t.shape, patch)
        tokens, low = patchify(x_t, patch), patchify(self.low, patch)  # [B,n,c] each
        segments = Segments.equal(len(x_t), tokens.shape[1])
        positions = grid_positions(grid).repeat(len(x_t), 1).to(x_t.device)
        u = self.network(tokens.flatten(0, 1), low.flatten(0, 1), positions, segments, t.expand(len(x_t)), self.level, *packed_text(cond))  # [B n,c]
        return unpatchify(u.unflatten(0, (len(x_t), -1)), x_t.shape[1], grid, patch).float()

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        return self.text(prompts).to(self.device)

    def encode(self, video: Tensor) -> Tensor:
        return (video.to(self.device).transpose(1, 2) - 0.5) * 4

    def decode(self, x0: Tensor) -> Tensor:
        return (x0 / 4 + 0.5).transpose(1, 2).clamp(0, 1)


# On disk


def save_frames(path: FilePath, model: FrameModel, metadata: dict[str, str] | None = None) -> None:
    """Writes a video model that `rushes temporal` trained, as safetensors; `load_frames` reads it."""
    save_weights(path, dict(model.network.state_dict()), {"config": json.dumps(asdict(model.network.config)), **(metadata or {})})


def load_frames(path: FilePath, codec: FilePath = WEIGHTS / "vae.safetensors") -> FrameModel:
    """A video model that `rushes temporal` trained. Raises UserError for a file that is missing, damaged, pickled, or of another architecture."""
    tensors, metadata = load_weights(path)
    network = build_from(lambda config: TemporalDiT(DiT(config)), read_config(DiTConfig, path, metadata), path)
    load_state(network, tensors, path)
    return FrameModel(network, load_codec(codec), TextEncoder())


def save_stage(path: FilePath, stage: UpsampleStage, metadata: dict[str, str] | None = None) -> None:
    """Writes a stage that `rushes upsample` trained, as safetensors; `load_stage` reads it."""
    about = {"axis": stage.axis, "attention": "apart" if isinstance(stage.network.network, TemporalDiT) else "joint"}
    save_weights(path, dict(stage.network.state_dict()), {"config": json.dumps(asdict(stage.network.config)), **about, **(metadata or {})})


def load_stage(path: FilePath) -> UpsampleStage:
    """A stage that `rushes upsample` trained. Raises UserError for a file that is missing, damaged, pickled, or of another architecture."""
    tensors, metadata = load_weights(path)
    axis, attention = next((known for known in RESAMPLING if known == metadata.get("axis")), None), metadata.get("attention")
    if axis is None or attention not in ("joint", "apart"):
        raise UserError(f"{path} is no upsampling stage: its metadata name no axis and attention. Use a file written by `rushes upsample`.")
    network = build_from(lambda config: build_upsampler(config, apart=attention == "apart"), read_config(DiTConfig, path, metadata), path)
    load_state(network, tensors, path)
    return UpsampleStage(network, axis, TextEncoder())


def build_upsampler(config: DiTConfig, *, apart: bool) -> Upsampler:
    """Fresh weights. apart: attention in space, then in time; else over the whole clip."""
    return Upsampler(TemporalDiT(DiT(config)) if apart else DiT(config), RectifiedFlow())

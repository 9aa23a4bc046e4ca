"""The built-in video model: MiniLM text, a causal video VAE and a packed DiT or U-ViT on the rectified path. Small enough to train on a CPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path as FilePath
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from base_model.checkpoint import load_weights, save_weights
from base_model.errors import UserError
from base_model.lora import LORA_TARGETS
from base_model.networks.dit import DiT, DiTConfig
from base_model.networks.layers import NetworkConfig
from base_model.networks.packing import Packed, Patch, Segments, grid_positions, patchify, token_grid, unpatchify
from base_model.networks.uvit import UViT, UViTConfig
from base_model.networks.vae import VAEConfig, VideoVAE
from base_model.paths import Path, RectifiedFlow
from base_model.prompts.conditions import Canvas, encode_known, obey
from base_model.prompts.text import TextEncoder
from base_model.times import sampling_times
from base_model.types import ClipShape, Conditioning, LatentSpec

LARGEST = 2**16
SHIFT = 3.0
"""Shift of the sampling grid."""
WEIGHTS = FilePath(__file__).parent / "weights"

NetworkName = Literal["dit", "uvit"]
CONFIGS: dict[NetworkName, type[NetworkConfig]] = {"dit": DiTConfig, "uvit": UViTConfig}
"""The word for a network in configurations and in the metadata of weights, and its architecture."""


def build_network(config: NetworkConfig) -> DiT | UViT:
    """The network of an architecture, with fresh weights. Raises ValueError for sizes that do not fit each other."""
    if isinstance(config, UViTConfig):
        return UViT(config)
    assert isinstance(config, DiTConfig)
    return DiT(config)


class LatentNormaliser(nn.Module):
    """Per-channel mean and standard deviation of the encoder's latents, measured once after VAE training."""

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, 1, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1, 1))


class LatentCodec(nn.Module):
    """VAE and latent statistics: pixels [B,T,3,H,W] in [0,1] <-> latents [B,C,F,H,W] of about unit variance.

    `chunk`: latent frames worked on at a time; `tile`: side of a tile in latent cells. Both bound memory and change nothing else; none means all at once.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.vae = VideoVAE(config)
        self.normaliser = LatentNormaliser(config.channels)

    def encode(self, video: Tensor, *, chunk: int | None = None, tile: int | None = None) -> Tensor:
        """Raises ValueError where the clip does not fall on the latent grid."""
        parts = [video] if chunk is None else self.vae.split(video, chunk)
        return torch.cat(list(self.encode_stream(parts, tile=tile)), dim=2)

    def decode(self, x0: Tensor, *, chunk: int | None = None, tile: int | None = None) -> Tensor:
        """Differentiable."""
        return torch.cat(list(self.decode_stream([x0] if chunk is None else x0.split(chunk, dim=2), tile=tile)), dim=1)

    def encode_stream(self, parts: Iterable[Tensor], *, tile: int | None = None) -> Iterator[Tensor]:
        """Parts of a clip [B,t,3,H,W] -> the latents of each [B,C,f,H,W]. The first part holds 1 + a multiple of `time_stride` frames, the others a multiple."""
        for mean, _ in self.vae.encode_stream(parts, tile=tile):
            yield (mean - self.normaliser.mean) / self.normaliser.std

    def decode_stream(self, parts: Iterable[Tensor], *, tile: int | None = None) -> Iterator[Tensor]:
        """Latents, any number of frames at a time [B,C,f,H,W] -> their frames [B,t,3,H,W]: a clip of any length in the memory of one part."""
        for video in self.vae.decode_stream((part * self.normaliser.std + self.normaliser.mean for part in parts), tile=tile):
            yield video.clamp(0, 1)


@dataclass
class LatentVideoModel:
    """A `VideoModel` made of a denoiser on packed tokens, a codec and a text encoder."""

    network: nn.Module  # DiT or UViT, perhaps wrapped by peft
    codec: LatentCodec
    text: TextEncoder
    config: NetworkConfig
    path: Path = field(default_factory=RectifiedFlow)

    @property
    def latents(self) -> LatentSpec:
        return self.codec.vae.config.latents

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def patch(self) -> Patch:
        return self.config.patch

    @property
    def lora_targets(self) -> tuple[str, ...]:
        return LORA_TARGETS

    @property
    def mlp_targets(self) -> tuple[str, ...]:
        """None: its adapters are on the MLPs anyway."""
        return ()

    def times(self, steps: int, clip: ClipShape) -> Tensor:
        """Uniform, then shifted by `SHIFT`, [steps + 1]; the same for every clip."""
        return sampling_times(self.path, steps, shift=SHIFT)

    def to(self, device: torch.device) -> LatentVideoModel:
        """Moves network and codec; text is encoded on the CPU, its states follow the network."""
        self.network.to(device)
        self.codec.to(device)
        return self

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """x_t [B,C,F,H,W], t [B] -> u [B,C,F,H,W]; where `cond.known` gives a latent, u leads from x_t straight to it."""
        t = t.expand(len(x_t))  # [B]
        velocity = partial(self._velocity, cond=cond)
        return velocity(x_t, t) if cond.known is None else obey(velocity, self.path, self.config.patch, x_t, t, cond.known)

    def _velocity(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """t: one noise level a clip [B], or one a token [B n]."""
        grid = token_grid(x_t.shape, self.config.patch)
        u = self.network(*packed(x_t, self.config.patch), t, *packed_text(cond))  # [B n,c]
        return unpatchify(u.unflatten(0, (len(x_t), -1)), x_t.shape[1], grid, self.config.patch).float()

    def with_canvases(self, cond: Conditioning, canvases: Sequence[Canvas]) -> Conditioning:
        """B texts and B canvases, which may give what they like."""
        return replace(cond, known=encode_known(self, canvases, self.config.patch))

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        return self.text(prompts).to(self.device)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        return self.codec.encode(video.to(self.device))

    def decode(self, x0: Tensor) -> Tensor:
        return self.codec.decode(x0)


def packed(x_t: Tensor, patch: Patch) -> Packed:
    """Latents of B clips of one size [B,C,F,H,W] as one sequence."""
    tokens = patchify(x_t, patch)  # [B,n,c]
    positions = grid_positions(token_grid(x_t.shape, patch)).repeat(len(x_t), 1).to(x_t.device)  # [B n,3]
    return Packed(tokens.flatten(0, 1), positions, Segments.equal(len(x_t), tokens.shape[1]))


def packed_text(cond: Conditioning) -> tuple[Tensor, Segments]:
    """Padded text [B,L,D] -> (text tokens [M,D], one segment a prompt)."""
    return cond.text[cond.mask], Segments(tuple(cond.mask.sum(1).tolist()))


def build_tiny(network: NetworkConfig | None = None, vae: VAEConfig | None = None) -> LatentVideoModel:
    """The architecture with fresh weights: a `DiTConfig` (if none is given) or a `UViTConfig`."""
    network, vae = network or DiTConfig(), vae or VAEConfig()
    return LatentVideoModel(build_network(network), LatentCodec(vae).eval().requires_grad_(False), TextEncoder(), network)


def save_network(path: FilePath, model: LatentVideoModel, metadata: dict[str, str] | None = None) -> None:
    """Writes a network with its configuration, as safetensors; `load_tiny` reads it."""
    word = next(word for word, config in CONFIGS.items() if type(model.config) is config)
    save_weights(path, dict(model.network.state_dict()), {"network": word, "config": json.dumps(asdict(model.config)), **(metadata or {})})


def save_codec(path: FilePath, codec: LatentCodec, metadata: dict[str, str] | None = None) -> None:
    """Writes an autoencoder with its configuration, as safetensors; `load_codec` reads it."""
    save_weights(path, dict(codec.state_dict()), {"config": json.dumps(asdict(codec.vae.config)), **(metadata or {})})


def load_codec(path: FilePath) -> LatentCodec:
    """A frozen autoencoder. Raises UserError for a file that is missing, damaged, pickled, or of another architecture."""
    tensors, metadata = load_weights(path)
    codec = build_from(LatentCodec, read_config(VAEConfig, path, metadata), path)
    load_state(codec, tensors, path)
    return codec.eval().requires_grad_(False)


def load_tiny(network: FilePath | None = None, codec: FilePath | None = None) -> LatentVideoModel:
    """The shipped model, or the same with the network of another checkpoint. Its metadata says which: `network` is a word of `CONFIGS` (older files have none and are DiT).

    Raises UserError for a file that is missing, damaged, pickled, of another architecture, or of a network that is not known.
    """
    network = network or WEIGHTS / "dit.safetensors"
    tensors, metadata = load_weights(network)
    word = metadata.get("network", "dit")
    if word not in CONFIGS:
        raise UserError(f"{network} holds the network {word[:40]!r}, which is not known here: there are {', '.join(CONFIGS)}. Use the version of rushes that wrote it.")
    config = read_config(CONFIGS[word], network, metadata)
    built = build_from(build_network, config, network)
    load_state(built, tensors, network)
    return LatentVideoModel(built, load_codec(codec or WEIGHTS / "vae.safetensors"), TextEncoder(), config)


ConfigType = TypeVar("ConfigType", bound=NetworkConfig | VAEConfig)
Module = TypeVar("Module", bound=nn.Module)


def read_config(cls: type[ConfigType], path: FilePath, metadata: dict[str, str]) -> ConfigType:
    """The architecture in the metadata of a weights file. Raises UserError where there is none, or no sensible one."""
    if "config" not in metadata:
        raise UserError(f"{path} holds no `config` in its metadata, so its architecture is unknown. Use a file written by `rushes pretrain`, `rushes sft` or `rushes vae`.")
    try:
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in dict(json.loads(metadata["config"])).items()}
        config = cls(**values)
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} holds a `config` that cannot be read: {str(error) or 'nested too deeply'}. Make or download the file again.") from error
    odd = [each.name for each in fields(cls) if not _is_size(getattr(config, each.name), each.default)]
    if odd:
        raise UserError(f"{path} holds a `config` that is no architecture: {odd[0]} is {getattr(config, odd[0])!r}. Make or download the file again.")
    return config


def build_from(cls: Callable[[ConfigType], Module], config: ConfigType, path: FilePath) -> Module:
    """`cls(config)`. Raises UserError, which names `path`, where the configuration is no architecture."""
    try:
        return cls(config)
    except (ValueError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{path} holds a `config` that is no architecture: {error}. Make or download the file again.") from error


def _is_size(value: object, like: object) -> bool:
    """A size from 1 to `LARGEST`, or a tuple of as many as in `like`."""
    if isinstance(like, tuple):
        return isinstance(value, tuple) and len(value) == len(like) and all(map(_is_size, value, like))
    return type(value) is int and 1 <= value <= LARGEST


def load_state(module: nn.Module, tensors: dict[str, Tensor], path: FilePath) -> None:
    """Puts tensors into a module. Raises UserError, which names `path`, where they are those of another architecture."""
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{path} does not hold the weights of this architecture: {str(error).splitlines()[-1].strip()} Use a checkpoint of the same model.") from error

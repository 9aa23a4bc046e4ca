"""Small stand-ins of the shipped weights: a denoiser and a reward model with fresh weights, made in a second."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from base_model.networks.dit import DiT, DiTConfig
from base_model.prompts.text import TextEncoder
from base_model.tiny import WEIGHTS, LatentVideoModel, load_codec, save_network
from reward.matcher import Matcher
from reward.model import RewardModel, save_reward_model
from reward.quality import Quality
from reward.types import Scores


def small_model(seed: int = 0) -> LatentVideoModel:
    """A denoiser of 48 channels and two blocks on the shipped autoencoder's latents."""
    torch.manual_seed(seed)
    config = DiTConfig(width=48, depth=2, heads=2, rotary_axes=(8, 8, 8))
    network = DiT(config)
    for parameter in network.tokens_out.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return LatentVideoModel(network, load_codec(WEIGHTS / "vae.safetensors"), TextEncoder(), config)


def save_small_network(path: Path, seed: int = 0) -> Path:
    save_network(path, small_model(seed))
    return path


def save_small_reward_model(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    save_reward_model(folder, RewardModel(Matcher(), Quality(), ("overall",), TextEncoder()), {})
    return folder


class Brightness:
    """A scorer with a known answer: the mean of all pixels."""

    dims = ("overall",)
    differentiable = True

    def __call__(self, video: Tensor, prompts: Sequence[str]) -> Scores:
        mean = video.flatten(1).mean(1)[:, None]  # [B,1]
        return Scores(mean, torch.zeros_like(mean))


def noting_device(seen: list[str], answer: Any) -> Callable[..., Any]:
    """A stand-in for what takes a model first: notes where the model lies, and gives `answer`."""

    def call(model: LatentVideoModel, *more: Any) -> Any:
        seen.append(model.device.type)
        return answer

    return call

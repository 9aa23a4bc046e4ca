"""The recipes that move a policy ask a model for nothing beyond `TrainableModel`, so that any family can take the place of the built-in one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from base_model.lora import LORA_TARGETS
from base_model.paths import Path as ProbabilityPath
from base_model.types import ClipShape, Conditioning, LatentSpec, TrainableModel
from recipes import ddpo, dpo, grpo, nft, ppo, reward_gradient
from recipes.generate import best_device
from tests.recipes.small import run_small, small_model


class Bare:
    """The members of `TrainableModel`, one by one."""

    patch, lora_targets = (1, 2, 2), LORA_TARGETS

    def __init__(self) -> None:
        self._model = small_model().to(best_device())
        self.network: nn.Module = self._model.network

    @property
    def path(self) -> ProbabilityPath:
        return self._model.path

    @property
    def latents(self) -> LatentSpec:
        return self._model.latents

    @property
    def device(self) -> torch.device:
        return self._model.device

    def times(self, steps: int, clip: ClipShape) -> Tensor:
        return torch.linspace(1, 0, steps + 1)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        self._model.network = self.network
        return self._model(x_t, t, cond)

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        return self._model.encode_text(prompts)

    def encode(self, video: Tensor) -> Tensor:
        return self._model.encode(video)

    def decode(self, x0: Tensor) -> Tensor:
        return self._model.decode(x0)


@pytest.mark.parametrize("recipe", [ddpo, grpo, ppo, nft, dpo, reward_gradient], ids=lambda recipe: recipe.__name__.rpartition(".")[2])
def test_a_model_of_the_protocol_alone_is_trained(recipe: Any, tmp_path: Path) -> None:
    model: TrainableModel = Bare()
    rows = run_small(recipe, tmp_path, {"iterations": 2, "prompts": 2, "group_size": 3, "micro_batch": 3}, model=model)
    assert all(row["grad_norm"] > 0 for row in rows)

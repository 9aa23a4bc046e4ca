"""Every recipe of alignment moves every open family, whose adapter diffusers' pipeline then reads: two steps each, on pipelines of real classes, of a toy's size, saved in a folder."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from align.run import latest_checkpoint, read_metrics
from base_model.errors import UserError
from base_model.families.loading import load_family
from base_model.families.wan_experts import Experts
from base_model.types import ClipShape
from base_model.video.store import ClipStore
from recipes import generate, grpo
from recipes.cli import COMMANDS
from recipes.feedback import Feedback, Setting
from recipes.generate import Sampler
from recipes.guards import Guards
from recipes.models import load_model, model_lineage
from recipes.weights import file_hash, read_card
from tests.base_model.families import tiny_cogvideox, tiny_hunyuan_video, tiny_ltx, tiny_mochi, tiny_wan
from tests.recipes.small import save_small_network, save_small_reward_model

CPU = torch.device("cpu")
RECIPES = [name for name, command in COMMANDS.items() if name != "bench" and issubclass(importlib.import_module(command.module).Config, Setting)]
"""Whatever command moves a policy."""


class Family(NamedTuple):
    """A tiny pipeline and the smallest clip it makes with two latent frames."""

    make: Callable[[], Any]
    clip: ClipShape


FAMILIES = {
    "wan": Family(tiny_wan.text_to_video, ClipShape(5, 16, 16)),
    "wan-5b": Family(lambda: tiny_wan.ti2v(image=False), ClipShape(5, 32, 32)),
    "wan-a14b": Family(tiny_wan.a14b, ClipShape(5, 16, 16)),
    "ltx": Family(tiny_ltx.tiny_pipeline, ClipShape(9, 32, 32)),
    "mochi": Family(tiny_mochi.tiny_pipeline, ClipShape(7, 16, 16)),
    "cogvideox-5b": Family(lambda: tiny_cogvideox.tiny_pipeline("5b"), ClipShape(5, 16, 16)),
    "cogvideox-1.5": Family(lambda: tiny_cogvideox.tiny_pipeline("1.5"), ClipShape(9, 16, 16)),
    "hunyuan-video": Family(tiny_hunyuan_video.tiny_pipeline, ClipShape(5, 16, 16)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every family's pipeline by its name, a reward model and a built-in network."""
    folder = tmp_path_factory.mktemp("families")
    for name, family in FAMILIES.items():
        family.make().save_pretrained(folder / name)
    save_small_reward_model(folder / "reward", seed=1)
    save_small_network(folder / "network.safetensors")
    return folder


def sampler_of(clip: ClipShape) -> Sampler:
    return Sampler(steps=2, frames=clip.frames, height=clip.height, width=clip.width)


def align(recipe: str, out: Path, folder: Path, family: str, *, resume: bool = False, clip: ClipShape | None = None, **policy: Any) -> dict[str, Any]:
    """What the command returns after two rollouts."""
    module = importlib.import_module(COMMANDS[recipe].module)
    small = {"iterations": 2, "prompts": 1, "group_size": 2, "micro_batch": 2, "lora_rank": 2, "lr": 1e-2, "evaluate_every": 100, "save_every": 1}
    setting = {"out": out, "model": folder / family, "reward": folder / "reward", "guards": Guards(watch=False), "prompt_pool": 2, "held_out_prompts": 1, "constrained": False}
    cfg = module.Config(**setting, sampler=sampler_of(clip or FAMILIES[family].clip), policy=module.Policy(**{**small, **policy}))
    found: dict[str, Any] = module.main(cfg, resume=resume)
    return found


def test_the_recipes_of_alignment_are_all_here() -> None:
    assert {"ddpo", "grpo", "ppo", "nft", "dpo", "reward-gradient"} <= set(RECIPES)
    assert issubclass(grpo.Config, Feedback)


def said(model: Any, family: str) -> Tensor:
    """The velocity of two noisy clips, [2,C,F,H,W]."""
    x = torch.randn(2, *model.latents.shape(FAMILIES[family].clip), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: Tensor = model(x, torch.tensor([0.95, 0.3]), model.encode_text(["a red circle", "a blue ball rolls"]))
    return found


def with_lora_of_diffusers(folder: Path, file: Path) -> Any:
    """The family's model around the transformers of a pipeline that has read the file by itself."""
    from diffusers import DiffusionPipeline

    model, pipeline = load_family(str(folder), device=CPU, dtype=torch.float32), DiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(str(file))
    if isinstance(model.network, Experts):
        pipeline.transformer_2.load_lora_adapter(str(file), prefix="transformer_2", use_safetensors=True)
        pipeline.transformer = Experts(pipeline.transformer, pipeline.transformer_2, model.network.boundary)
    model.network = pipeline.transformer
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_moves_a_family_and_saves_its_lora(recipe: str, family: str, folder: Path, tmp_path: Path) -> None:
    told = align(recipe, tmp_path, folder, family)
    rows = [row for row in read_metrics(tmp_path) if "grad_norm" in row]
    assert len(rows) == 2 and all(row["grad_norm"] is not None and 0 < row["grad_norm"] < math.inf for row in rows)
    assert all(row["forward_equivalents"] > row["forward_passes"] for row in rows[1:]), "what trains is counted, too"
    file = tmp_path / "adapter.safetensors"
    assert told["weights"] == str(file) and told["sha256"] == file_hash(file) == read_card(file)["sha256"]
    assert not (tmp_path / "network.safetensors").exists(), "nothing is merged"

    adapted, plain = (said(load_model(folder / family, device=CPU, adapter=adapter), family) for adapter in (file, None))
    assert (adapted - plain).abs().max() > 1e-4
    assert (said(with_lora_of_diffusers(folder / family, file), family) - adapted).abs().max() < 1e-5

"""The steps of "How to add a sixth family" in base_model/README.md, taken with a family that does not exist: its clock runs from noise to data, and it predicts x0.

A small network, VAE and text encoder of its own, saved as diffusers saves a checkpoint. This module stands for `base_model/families/mirror.py`.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn.functional import avg_pool3d, interpolate, scaled_dot_product_attention

from align.kernels import ODE
from align.objectives.regression import clip_error, flow_matching
from align.trajectory import rollout
from base_model.errors import UserError
from base_model.families.adapters import load_lora, save_lora
from base_model.families.loading import MODULES, load_family
from base_model.families.parts import load_part
from base_model.guidance import Guided
from base_model.lora import add_lora, reference
from base_model.paths import RectifiedFlow, add_noise
from base_model.predictions import convert
from base_model.times import sampling_times
from base_model.types import ClipShape, Conditioning, LatentSpec, TrainableModel

CPU, CLIP, PROMPTS = torch.device("cpu"), ClipShape(5, 16, 16), ["a red ball", "blue"]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        self.ff = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        seen = torch.cat([x, text], dim=1)  # [B,S+1,width]
        x = x + self.to_out(scaled_dot_product_attention(self.to_q(x), self.to_k(seen), self.to_v(seen)))
        return x + self.ff(x)


class MirrorTransformer(ModelMixin, ConfigMixin):
    """Latents [B,F,H,W,C] and a clock in [0, 1] that is 1 at the data -> clean latents [B,F,H,W,C]."""

    @register_to_config
    def __init__(self, channels: int = 3, width: int = 64) -> None:
        super().__init__()
        self.proj_in, self.clock, self.proj_out = nn.Linear(channels, width), nn.Linear(1, width), nn.Linear(width, channels)
        self.blocks = nn.ModuleList([Block(width) for _ in range(2)])

    def forward(self, latents: Tensor, clock: Tensor, text: Tensor) -> Tensor:
        x = self.proj_in(latents).flatten(1, 3) + self.clock(clock[:, None])[:, None]  # [B,S,width]
        for block in self.blocks:
            x = block(x, text)
        said: Tensor = self.proj_out(x)
        return said.reshape(latents.shape)


class MirrorVAE(ModelMixin, ConfigMixin):
    """Pixels in [-1, 1] averaged over 4x4, times a scale."""

    @register_to_config
    def __init__(self, scale: float = 2.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(scale))


class MirrorText(ModelMixin, ConfigMixin):
    """Bytes -> one state."""

    @register_to_config
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.letters = nn.EmbeddingBag(256, width)


# Steps 1 to 6: base_model/families/mirror.py
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out")
MLP_TARGETS = ("ff.0", "ff.2")


@dataclass
class MirrorVideoModel:
    network: Any  # MirrorTransformer, or peft's wrapper of it
    vae: Any  # MirrorVAE
    text_encoder: Any  # MirrorText

    @property
    def path(self) -> RectifiedFlow:
        return RectifiedFlow()

    @property
    def latents(self) -> LatentSpec:
        return LatentSpec(self.network.config["channels"], time_stride=1, space_stride=4)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def patch(self) -> tuple[int, int, int]:
        return 1, 1, 1

    @property
    def lora_targets(self) -> tuple[str, ...]:
        return LORA_TARGETS

    @property
    def mlp_targets(self) -> tuple[str, ...]:
        return MLP_TARGETS

    def to(self, device: torch.device) -> MirrorVideoModel:
        for part in (self.network, self.vae, self.text_encoder):
            part.to(device)
        return self

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        t, dtype = t.expand(len(x_t)), self.network.dtype
        x0: Tensor = self.network(x_t.movedim(1, -1).to(dtype), (1 - t).to(dtype), cond.text.to(dtype))
        return convert(self.path, x0.float().movedim(-1, 1), x_t, t, kind="x0", to="u")

    def times(self, steps: int, clip: ClipShape) -> Tensor:
        self.latents.shape(clip)
        return sampling_times(self.path, steps, shift=3.0)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        states = [self.text_encoder.letters(torch.tensor([list(prompt.encode()) or [0]])) for prompt in prompts]  # [1,D] each
        text = torch.stack(states)  # [B,1,D]
        return Conditioning(tuple(prompts), text, torch.ones(text.shape[:2], dtype=torch.bool))

    def encode(self, video: Tensor) -> Tensor:
        return avg_pool3d(2 * video.transpose(1, 2) - 1, (1, 4, 4)) * self.vae.factor

    def decode(self, x0: Tensor) -> Tensor:
        pixels = interpolate(x0 / self.vae.factor, scale_factor=(1.0, 4.0, 4.0)).transpose(1, 2)
        return ((pixels + 1) / 2).clamp(0, 1)


def load(source: str, *, device: torch.device, dtype: torch.dtype) -> MirrorVideoModel:
    parts = (("transformer", MirrorTransformer), ("vae", MirrorVAE), ("text_encoder", MirrorText))
    network, vae, text = (load_part(kind, source, name, device=device, dtype=dtype) for name, kind in parts)
    return MirrorVideoModel(network, vae, text)


# Steps 7 and 8: the table, and the tests


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch.manual_seed(0)
    for name, part in (("transformer", MirrorTransformer()), ("vae", MirrorVAE()), ("text_encoder", MirrorText())):
        part.save_pretrained(tmp_path / "mirror" / name)
    (tmp_path / "mirror" / "model_index.json").write_text(json.dumps({"_class_name": "MirrorPipeline"}))
    monkeypatch.setitem(MODULES, "MirrorPipeline", "mirror")
    monkeypatch.setitem(sys.modules, "base_model.families.mirror", sys.modules[__name__])
    return tmp_path / "mirror"


def read(folder: Path, *, nf4: bool = False) -> Any:
    return load_family(str(folder), device=CPU, dtype=torch.float32, nf4=nf4)


def theirs(model: MirrorVideoModel, x: Tensor, times: Tensor) -> Tensor:
    """As its makers would sample it: in their layout, their clock going up, straight from x_t towards the x0 it says."""
    latents, text = x.permute(0, 2, 3, 4, 1), model.encode_text(PROMPTS).text
    clocks = 1 - times
    for now, then in zip(clocks[:-1].tolist(), clocks[1:].tolist(), strict=True):
        said = model.network(latents, torch.full((len(x),), now), text)
        latents = latents + (said - latents) * (then - now) / (1 - now)
    return latents.permute(0, 4, 1, 2, 3)


def sampled(model: Any, x: Tensor, times: Tensor) -> Tensor:
    return rollout(model, ODE(), x, times, model.encode_text(PROMPTS), noise=torch.Generator()).x0


def test_sixty_lines_put_it_behind_the_protocol_and_the_table_finds_it(folder: Path) -> None:
    lines = [*inspect.getsource(MirrorVideoModel).splitlines(), *inspect.getsource(load).splitlines()]
    assert len(lines) <= 60
    model = read(folder)
    protocol: TrainableModel = model
    assert type(protocol) is MirrorVideoModel and not any(p.requires_grad for p in model.network.parameters())
    (folder / "vae" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLWan"}))
    with pytest.raises(UserError, match="holds a AutoencoderKLWan, no MirrorVAE"):
        read(folder)


@torch.no_grad()
def test_a_rollout_ends_where_a_sampler_in_its_own_convention_ends(folder: Path) -> None:
    model = read(folder)
    x, times = torch.randn(2, *model.latents.shape(CLIP)), model.times(6, CLIP)
    found = sampled(model, x, times)
    assert (found - theirs(model, x, times)).abs().max() < 1e-5 and (found - x).abs().max() > 0.1
    video = model.decode(found)
    assert video.shape == (2, 5, 3, 16, 16) and torch.allclose(model.encode(model.decode(model.encode(video))), model.encode(video), atol=1e-5)
    guided = rollout(Guided(model, 3.0), ODE(), x, times, model.encode_text(PROMPTS), noise=torch.Generator()).x0
    assert guided.shape == x.shape and (guided - found).abs().max() > 1e-3


@pytest.mark.parametrize("nf4", [False, True])
def test_a_lora_step_learns_and_its_file_comes_back(folder: Path, tmp_path: Path, nf4: bool) -> None:
    model = read(folder, nf4=nf4)
    generator = torch.Generator().manual_seed(0)
    x0, eps = model.encode(torch.rand(2, 5, 3, 16, 16, generator=generator)), torch.randn(2, *model.latents.shape(CLIP), generator=generator)
    t, cond = torch.tensor([0.8, 0.4]), model.encode_text(PROMPTS)
    x_t, u = add_noise(model.path, x0, eps, t), model.path.velocity(x0, eps, t)
    model.network = add_lora(model.network, rank=4, alpha=8, targets=(*LORA_TARGETS, *MLP_TARGETS))
    trained = {name: p for name, p in model.network.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 6 and all("lora_" in name for name in trained)

    def loss() -> Tensor:
        return flow_matching(clip_error(model(x_t, t, cond), u)).value

    before = loss()
    before.backward()
    torch.optim.SGD(trained.values(), lr=0.1).step()
    after = loss()
    assert float(after.detach()) < float(before.detach())
    with reference(model.network):
        assert torch.equal(loss(), before)

    save_lora(model, tmp_path / "lora.safetensors")
    again = read(folder, nf4=nf4)
    load_lora(again, tmp_path / "lora.safetensors")
    with torch.no_grad():
        assert torch.allclose(again(x_t, t, cond), model(x_t, t, cond), atol=1e-6)
    with pytest.raises(UserError, match=r"ComfyUI's name for blocks\.0\..* of MirrorTransformer is not known"):
        save_lora(model, tmp_path / "comfy.safetensors", comfy=True)

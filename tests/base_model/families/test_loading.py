"""Which family reads a checkpoint: the folder says so."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from base_model.errors import UserError
from base_model.families.adapters import load_lora, save_lora
from base_model.families.loading import MODULES, NAMES, load_family
from base_model.families.wan import LORA_TARGETS, WanVideoModel
from base_model.lora import add_lora
from base_model.prompts.conditions import give_frames
from base_model.types import ClipShape
from tests.base_model.families import tiny_wan

CPU = torch.device("cpu")


def index(folder: Path, named: str) -> str:
    (folder / "model_index.json").write_text(json.dumps({"_class_name": named}))
    return str(folder)


def test_a_saved_pipeline_is_read_by_its_own_family(tmp_path: Path) -> None:
    tiny_wan.text_to_video().save_pretrained(tmp_path)
    model = load_family(str(tmp_path), device=CPU, dtype=torch.float32)
    assert isinstance(model, WanVideoModel) and model.encode_text(["a red ball"]).text.shape == (1, 512, 16)


@pytest.mark.parametrize(("named", "module"), MODULES.items())
def test_every_class_of_pipeline_leads_to_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str, module: str) -> None:
    asked: list[tuple[str, Any]] = []
    stand_in: Any = ModuleType(module)
    stand_in.load = lambda source, *, device, dtype: asked.append((source, dtype))
    monkeypatch.setitem(sys.modules, f"base_model.families.{module}", stand_in)
    load_family(index(tmp_path, named), device=CPU, dtype=torch.bfloat16)
    assert asked == [(str(tmp_path), torch.bfloat16)]


@pytest.mark.parametrize("make", [tiny_wan.text_to_video, tiny_wan.a14b, tiny_wan.image_to_video])
def test_in_four_bits_are_attention_and_mlp_and_nothing_else_and_an_adapter_trains_on_them(tmp_path: Path, make: Any) -> None:
    from bitsandbytes.nn import Linear4bit
    from torch import nn

    make().save_pretrained(tmp_path / "wan")
    full, model = (load_family(str(tmp_path / "wan"), device=CPU, dtype=torch.float32, nf4=nf4) for nf4 in (False, True))
    small = {name for name, module in model.network.named_modules() if isinstance(module, Linear4bit)}
    linears = {name for name, module in full.network.named_modules() if isinstance(module, nn.Linear)}
    assert small == {name for name in linears if "blocks." in name} and len(small) == (2 if make is tiny_wan.a14b else 1) * 2 * (12 if make is tiny_wan.image_to_video else 10)
    assert all(model.network.get_parameter(f"{name}.weight").dtype == torch.float32 for name in linears - small)

    clip = ClipShape(5, 32, 64)
    x, t, cond = torch.randn(2, *model.latents.shape(clip)), torch.tensor([0.95, 0.3]), model.encode_text(["a red ball", "a cube"])
    if make is tiny_wan.image_to_video:
        cond = model.with_canvases(cond, [give_frames(clip, {0: torch.rand(1, 3, 32, 64)})] * 2)
    before = model(x, t, cond)
    assert 1e-3 < (before - full(x, t, cond)).norm() / before.norm() < 0.1

    model.network = add_lora(model.network, rank=2, alpha=2, targets=LORA_TARGETS)
    frozen = {name: p.clone() for name, p in model.network.named_parameters() if not p.requires_grad}
    trained = [p for p in model.network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(x, t, cond).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0] and all(p.grad is not None and bool(p.grad.any()) for p in trained)
    assert all(torch.equal(model.network.get_parameter(name), p) for name, p in frozen.items())

    save_lora(model, tmp_path / "lora.safetensors")
    load_lora(full, tmp_path / "lora.safetensors")
    again = load_family(str(tmp_path / "wan"), device=CPU, dtype=torch.float32, nf4=True)
    load_lora(again, tmp_path / "lora.safetensors")
    with torch.no_grad():
        assert torch.allclose(again(x, t, cond), model(x, t, cond), atol=1e-5) and (full(x, t, cond) - model(x, t, cond)).norm() < 0.1 * before.norm()


def test_short_names_are_names_on_the_hub_of_families_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    assert all(name == name.lower() and hub.count("/") == 1 for name, hub in NAMES.items()) and len(set(NAMES.values())) == len(NAMES)
    assert all(hasattr(diffusers, named) for named in MODULES)
    asked: list[str] = []
    monkeypatch.setattr("base_model.families.loading.read_index", lambda source: asked.append(source) or {"_class_name": "none"})
    with pytest.raises(UserError, match=r"wan2\.1-14b holds a none"):
        load_family("wan2.1-14b", device=CPU, dtype=torch.float32)
    assert asked == ["Wan-AI/Wan2.1-T2V-14B-Diffusers"]


def test_what_is_none_of_them_is_said_with_the_nearest_name(tmp_path: Path) -> None:
    def refused(source: str, match: str) -> None:
        with pytest.raises(UserError, match=match) as raised:
            load_family(source, device=CPU, dtype=torch.float32)
        assert "\n" not in str(raised.value)

    refused("wan2.1-13b", r"no folder wan2.1-13b.* Did you mean wan2.1-1.3b\? There are: wan2.1-1.3b, .*hunyuan-video")
    refused(index(tmp_path, "LTXPipelines"), r"holds a LTXPipelines, .*Did you mean LTXPipeline\? There are: WanPipeline, ")
    (tmp_path / "model_index.json").unlink()
    refused(str(tmp_path), "cannot read the index of a diffusers checkpoint")
    refused("nobody/has-this", "no checkpoint nobody/has-this")

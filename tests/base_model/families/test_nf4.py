"""Every family with attention and MLP in four bits (QLoRA, arXiv 2305.14314): what is kept in full, how far its velocity is, and that an adapter trains on it."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from base_model.errors import UserError
from base_model.families.adapters import load_lora, save_lora
from base_model.families.loading import load_family
from base_model.lora import add_lora, merge
from base_model.prompts.conditions import give_frames
from base_model.types import ClipShape
from tests.base_model.families import tiny_cogvideox, tiny_hunyuan_video, tiny_ltx, tiny_mochi, tiny_wan

CPU = torch.device("cpu")


class Case(NamedTuple):
    make: Callable[[], Any]
    module: str
    clip: ClipShape
    kept: str  # pattern of the linears of its blocks that stay as they are
    number: int  # of the others
    distance: float  # of the velocity, relative, at most


NONE = "(?!)"
CASES = {
    "wan": Case(tiny_wan.text_to_video, "wan", ClipShape(5, 32, 64), NONE, 2 * 10, 0.1),
    "wan 2.2 a14b": Case(tiny_wan.a14b, "wan", ClipShape(5, 32, 64), NONE, 2 * 2 * 10, 0.1),
    "wan from an image": Case(tiny_wan.image_to_video, "wan", ClipShape(5, 32, 64), NONE, 2 * 12, 0.1),
    "ltx": Case(partial(tiny_ltx.tiny_pipeline, wide=True), "ltx", ClipShape(9, 64, 96), NONE, 2 * (2 * 4 + 2), 0.03),
    "mochi": Case(partial(tiny_mochi.tiny_pipeline, wide=True), "mochi", ClipShape(7, 32, 48), r"norm1(_context)?\.linear(_1)?|attn1\.add_q_proj", 6 + 7 + 2 + 4, 0.1),
    "cogvideox 2b": Case(partial(tiny_cogvideox.tiny_pipeline, wide=True), "cogvideox", ClipShape(9, 32, 48), r"norm[12]\.linear", 2 * 6, 0.03),
    "cogvideox 1.5": Case(partial(tiny_cogvideox.tiny_pipeline, "1.5", wide=True), "cogvideox", ClipShape(9, 32, 48), r"norm[12]\.linear", 2 * 6, 0.03),
    "hunyuan_video": Case(partial(tiny_hunyuan_video.tiny_pipeline, wide=True), "hunyuan_video", ClipShape(5, 32, 48), r"norm(1|1_context)?\.linear", 8 + 4 + 5, 0.02),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def test_in_four_bits_are_attention_and_mlp_and_nothing_else_and_an_adapter_trains_on_them(tmp_path: Path, case: Case) -> None:
    from bitsandbytes.nn import Linear4bit

    case.make().save_pretrained(tmp_path / "saved")
    full, model = (load_family(str(tmp_path / "saved"), device=CPU, dtype=torch.float32, nf4=nf4) for nf4 in (False, True))
    small = {name for name, module in model.network.named_modules() if isinstance(module, Linear4bit)}
    linears = {name for name, module in full.network.named_modules() if isinstance(module, nn.Linear)}
    blocks = {name for name in linears if re.search(r"blocks\.\d+\.", name) and "embedder" not in name}
    assert small == {name for name in blocks if not re.search(rf"\.({case.kept})$", name)} and len(small) == case.number
    assert all(model.network.get_parameter(f"{name}.weight").dtype == torch.float32 for name in linears - small)

    x, t, cond = torch.randn(2, *model.latents.shape(case.clip)), torch.tensor([0.95, 0.3]), model.encode_text(["a red ball", "a cube"])
    if hasattr(model, "eye"):
        cond = model.with_canvases(cond, [give_frames(case.clip, {0: torch.rand(1, 3, case.clip.height, case.clip.width)})] * 2)
    with torch.no_grad():
        before, exact = model(x, t, cond), full(x, t, cond)
    distance = float((before - exact).norm() / exact.norm())
    print(f"relative distance of the velocity {distance:.4f}")
    assert 1e-3 < distance < case.distance

    model.network = add_lora(model.network, rank=2, alpha=2, targets=importlib.import_module(f"base_model.families.{case.module}").LORA_TARGETS)
    frozen = {name: p.clone() for name, p in model.network.named_parameters() if not p.requires_grad}
    trained = [p for p in model.network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = model(x, t, cond).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0] and all(p.grad is not None and bool(p.grad.any()) and bool(p.grad.isfinite().all()) for p in trained)
    assert all(torch.equal(model.network.get_parameter(name), p) for name, p in frozen.items())

    save_lora(model, tmp_path / "lora.safetensors")
    load_lora(full, tmp_path / "lora.safetensors")
    again = load_family(str(tmp_path / "saved"), device=CPU, dtype=torch.float32, nf4=True)
    load_lora(again, tmp_path / "lora.safetensors")
    with torch.no_grad():
        assert torch.allclose(again(x, t, cond), model(x, t, cond), atol=1e-5) and (full(x, t, cond) - model(x, t, cond)).norm() < case.distance * exact.norm()


@pytest.mark.parametrize("make", [tiny_ltx.tiny_pipeline, tiny_mochi.tiny_pipeline, tiny_cogvideox.tiny_pipeline, tiny_hunyuan_video.tiny_pipeline])
def test_rows_that_are_no_multiple_of_a_block_are_refused_in_one_line(tmp_path: Path, make: Callable[[], Any]) -> None:
    make().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^\S*blocks\.0\.\S+ has rows that are no multiple of 64[^\n]*$"):
        load_family(str(tmp_path), device=CPU, dtype=torch.float32, nf4=True)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("name", ["wan", "ltx"])
def test_what_was_trained_on_four_bits_merges_into_a_plain_network_that_says_the_same(tmp_path: Path, name: str, dora: bool) -> None:
    case = CASES[name]
    case.make().save_pretrained(tmp_path / "saved")
    model = load_family(str(tmp_path / "saved"), device=CPU, dtype=torch.float32, nf4=True)
    x, t, cond = torch.randn(2, *model.latents.shape(case.clip)), torch.tensor([0.95, 0.3]), model.encode_text(["a red ball", "a cube"])
    fresh = model(x, t, cond)
    model.network = add_lora(model.network, rank=2, alpha=4, targets=model.lora_targets, dora=dora)  # the MLP stays without
    with torch.no_grad():
        for parameter in model.network.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.rand(parameter.shape) / 3)
        wanted = model(x, t, cond)
        model.network = merge(model.network)
        found = model(x, t, cond)
    print(f"adapter {(wanted - fresh).norm() / fresh.norm():.2f}, merged {(found - wanted).norm() / wanted.norm():.1e}")
    assert (wanted - fresh).norm() > 0.1 * fresh.norm() and (found - wanted).norm() < 1e-5 * wanted.norm()
    assert {type(module) for module in model.network.modules() if isinstance(module, nn.Linear)} == {nn.Linear}
    assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in model.network.parameters())
    model.network.save_pretrained(tmp_path / "saved" / "transformer")
    again = load_family(str(tmp_path / "saved"), device=CPU, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(x, t, cond), found)

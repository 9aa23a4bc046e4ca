"""Wan 2.2 A14B: two transformers as one network, beside diffusers' pipeline."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from base_model.errors import UserError
from base_model.families.adapters import load_lora, save_lora
from base_model.families.loading import load_family
from base_model.families.wan import LORA_TARGETS, WanVideoModel, load
from base_model.families.wan_experts import Experts, TwoScales
from base_model.guidance import Guided
from base_model.lora import add_lora, reference
from base_model.recompute import recompute_blocks
from tests.base_model.families import tiny_wan
from tests.base_model.families.test_wan import CLIPS, CPU, PROMPTS, noise, ours, theirs


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return tiny_wan.a14b()


@pytest.fixture(scope="module")
def folder(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("a14b")
    pipeline.save_pretrained(place)
    return place


@pytest.fixture
def model(folder: Path) -> WanVideoModel:
    found: WanVideoModel = load_family(str(folder), device=CPU, dtype=torch.float32)
    assert isinstance(found.network, Experts)
    return found


@pytest.mark.parametrize("clip", CLIPS, ids=str)
@pytest.mark.parametrize(("high", "low", "joined"), [(1.0, 1.0, False), (4.0, 4.0, False), (4.0, 3.0, True), (4.0, 3.0, False)])
def test_a_rollout_ends_in_the_latents_of_the_pipeline_with_a_scale_for_each_expert(pipeline: Any, model: WanVideoModel, clip: Any, high: float, low: float, joined: bool) -> None:
    x, times = noise(model, clip), model.times(4, clip)
    assert (times >= 0.875).sum() in range(1, 4)  # both experts have their say
    wanted = theirs(pipeline, x, clip, high, guidance_scale_2=low)
    found = ours(Guided(model, high if high == low else TwoScales(0.875, high, low), joined=joined), times, x)
    assert (found - wanted).abs().max() < 1e-4
    if high != low:
        assert (found - ours(Guided(model, high), times, x)).abs().max() > 1e-3


def test_every_clip_of_a_batch_goes_to_the_expert_of_its_time(model: WanVideoModel) -> None:
    t, cond = torch.tensor([0.2, 0.875, 0.874, 1.0]), model.encode_text(PROMPTS * 2)
    x = noise(model, CLIPS[1], 4)
    alone = [WanVideoModel(expert) for expert in (model.network.transformer_2, model.network.transformer, model.network.transformer_2, model.network.transformer)]
    found = model(x, t, cond)
    for k, expert in enumerate(alone):
        assert torch.allclose(found[k], expert(x[k : k + 1], t[k : k + 1], cond[k : k + 1])[0], atol=1e-5)
    assert (alone[0](x, t, cond) - alone[1](x, t, cond)).abs().max() > 0.1


def test_where_times_are_of_tokens_the_noisiest_decides(model: WanVideoModel) -> None:
    x, text = noise(model, CLIPS[1]), model.encode_text(PROMPTS).text
    timestep = torch.full((2, 2 * 4 * 2), 100.0)
    timestep[0, 3] = 900
    (found,) = model.network(x, timestep, text)
    for k, expert in enumerate((model.network.transformer, model.network.transformer_2)):
        assert torch.allclose(found[k], expert(x, timestep, text).sample[k], atol=1e-5)


def test_an_adapter_goes_onto_both_and_leaves_both_as_they_were(model: WanVideoModel) -> None:
    x, t, cond = noise(model, CLIPS[1]), torch.tensor([0.95, 0.4]), model.encode_text(PROMPTS)
    before = model(x, t, cond)
    assert recompute_blocks(model.network) == 4
    model.network = add_lora(model.network, rank=2, alpha=2, targets=LORA_TARGETS)
    trained = {name: p for name, p in model.network.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2 * 8 and sum(".transformer_2." in name for name in trained) == 32
    optimizer = torch.optim.SGD(trained.values(), lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(x, t, cond).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and bool(p.grad.any()) for p in trained.values())
    with reference(model.network):
        assert torch.allclose(model(x, t, cond), before, atol=1e-6)
    assert (model(x, t, cond) - before).abs().flatten(1).amax(1).min() > 1e-4


def shaken(model: WanVideoModel) -> WanVideoModel:
    model.network = add_lora(model.network, rank=2, alpha=4, targets=LORA_TARGETS)
    with torch.no_grad():
        for name, parameter in model.network.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model


def test_one_file_holds_the_adapters_of_both_and_the_pipeline_reads_them(folder: Path, model: WanVideoModel, tmp_path: Path) -> None:
    pipeline, file, clip = tiny_wan.a14b(), tmp_path / "lora.safetensors", CLIPS[1]
    x, times = noise(model, clip), model.times(4, clip)
    before = ours(model, times, x)
    save_lora(shaken(model), file)
    pipeline.load_lora_weights(str(file))
    half = theirs(pipeline, x, clip, 1.0)
    pipeline.transformer_2.load_lora_adapter(str(file), prefix="transformer_2", use_safetensors=True)
    wanted, found = theirs(pipeline, x, clip, 1.0), ours(model, times, x)
    assert (found - wanted).abs().max() < 1e-5 and (half - wanted).abs().max() > 1e-2 and (found - before).abs().max() > 1e-2

    again = load(str(folder), device=CPU, dtype=torch.float32)
    load_lora(again, file)
    assert torch.equal(ours(again, times, x), found)


def test_comfyui_gets_a_file_for_each_expert(model: WanVideoModel, tmp_path: Path) -> None:
    pipeline, clip = tiny_wan.a14b(), CLIPS[1]
    high, low = save_lora(shaken(model), tmp_path / "lora.safetensors", comfy=True)
    assert (high.name, low.name) == ("lora_high_noise.safetensors", "lora_low_noise.safetensors")
    pipeline.load_lora_weights(str(high))
    pipeline.load_lora_weights(str(low), load_into_transformer_2=True)
    x = noise(model, clip)
    assert (ours(model, model.times(4, clip), x) - theirs(pipeline, x, clip, 1.0)).abs().max() < 1e-5


def test_an_adapter_of_one_transformer_is_that_of_the_first_expert(model: WanVideoModel, tmp_path: Path) -> None:
    single = WanVideoModel(model.network.transformer)
    save_lora(shaken(single), tmp_path / "lora.safetensors")
    fresh = WanVideoModel(Experts(tiny_wan.transformer(), tiny_wan.transformer(), 0.875))
    load_lora(fresh, tmp_path / "lora.safetensors")
    trained = [name for name, p in fresh.network.named_parameters() if p.requires_grad]
    assert len(trained) == 32 and not any("transformer_2" in name for name in trained)
    with pytest.raises(UserError, match=r"another model: transformer_2\.blocks\.0\.attn1\.to_k\.lora_A\.weight"):
        save_lora(shaken(WanVideoModel(Experts(tiny_wan.transformer(), tiny_wan.transformer(), 0.875))), tmp_path / "both.safetensors")
        load_lora(WanVideoModel(tiny_wan.transformer()), tmp_path / "both.safetensors")


def test_a_missing_expert_is_said(folder: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    shutil.rmtree(broken / "transformer_2")
    with pytest.raises(UserError, match="holds no transformer_2/"):
        load(str(broken), device=CPU, dtype=torch.float32)


def test_a_scale_that_changes_with_time_is_that_of_every_row(model: WanVideoModel) -> None:
    x, t, cond = noise(model, CLIPS[1]), torch.tensor([0.9, 0.1]), model.encode_text(PROMPTS)
    found: Tensor = Guided(model, TwoScales(0.875, 4.0, 3.0))(x, t, cond)
    for row, scale in enumerate((4.0, 3.0)):
        assert torch.allclose(found[row], Guided(model, scale)(x, t, cond)[row], atol=1e-6)

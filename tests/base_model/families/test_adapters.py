"""LoRA files of every family: what diffusers' pipeline makes with one is what we make."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from align.kernels import ODE
from align.trajectory import rollout
from base_model.checkpoint import load_weights, save_weights
from base_model.errors import UserError
from base_model.families.adapters import HEADER, load_lora, save_lora
from base_model.families.loading import load_family
from base_model.lora import add_lora, reference
from base_model.types import ClipShape
from tests.base_model.families import tiny_wan

PROMPTS = ["a red ball", "a blue cube rolls to the left"]
RANK, ALPHA = 2, 6.0


class Tiny(NamedTuple):
    """A family's tiny pipeline, the module that reads it, a clip of its size, and (pipeline, first noise [B,C,F,H,W]) -> the latents it ends in [B,C,F,H,W], unguided."""

    make: Callable[[], Any]
    module: str
    clip: ClipShape
    sample: Callable[[Any, Tensor, ClipShape], Tensor]


def wan(pipeline: Any, x: Tensor, clip: ClipShape) -> Tensor:
    size = {"height": clip.height, "width": clip.width, "num_frames": clip.frames}
    found: Tensor = pipeline(prompt=PROMPTS, **size, num_inference_steps=4, guidance_scale=1.0, latents=x, output_type="latent").frames
    return found


TINY = {"wan": Tiny(tiny_wan.text_to_video, "wan", ClipShape(5, 32, 48), wan)}


class World(NamedTuple):
    tiny: Tiny
    folder: Path
    targets: tuple[str, ...]

    def model(self) -> Any:
        return load_family(str(self.folder), device=torch.device("cpu"), dtype=torch.float32)

    def trained(self, seed: int = 0) -> Any:
        """With an adapter that changes what the network says."""
        model = self.model()
        model.network = add_lora(model.network, rank=RANK, alpha=ALPHA, targets=self.targets, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.network.named_parameters():
                if ".lora_B." in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
        return model

    def noise(self, model: Any) -> Tensor:
        return torch.randn(2, *model.latents.shape(self.tiny.clip), generator=torch.Generator().manual_seed(1))

    def sampled(self, model: Any) -> Tensor:
        return rollout(model, ODE(), self.noise(model), model.times(4, self.tiny.clip), model.encode_text(PROMPTS), noise=torch.Generator()).x0

    def pipeline(self) -> Any:
        made = self.tiny.make()
        made.set_progress_bar_config(disable=True)
        return made


@pytest.fixture(scope="module", params=TINY)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    tiny: Tiny = TINY[request.param]
    folder = tmp_path_factory.mktemp(tiny.module)
    tiny.make().save_pretrained(folder)
    module = importlib.import_module(f"base_model.families.{tiny.module}")
    return World(tiny, folder, (*module.LORA_TARGETS, *module.MLP_TARGETS))


def test_the_pipeline_with_the_file_samples_what_we_sample(world: World, tmp_path: Path) -> None:
    model, pipeline = world.trained(), world.pipeline()
    assert save_lora(model, tmp_path / "lora.safetensors") == [tmp_path / "lora.safetensors"]
    with reference(model.network):
        before = world.sampled(model)
    assert (world.tiny.sample(pipeline, world.noise(model), world.tiny.clip) - before).abs().max() < 1e-5
    pipeline.load_lora_weights(str(tmp_path / "lora.safetensors"))
    wanted = world.tiny.sample(pipeline, world.noise(model), world.tiny.clip)
    assert (wanted - before).abs().max() > 0.02 and (world.sampled(model) - wanted).abs().max() < 1e-5


def test_a_file_comes_back_as_the_same_adapter_on_a_plain_network_and_on_one_that_has_one(world: World, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    model, other, plain = world.trained(), world.trained(seed=1), world.model()
    save_lora(model, file)
    wanted = world.sampled(model)
    assert (world.sampled(other) - wanted).abs().max() > 0.02
    for reader in (other, plain):
        load_lora(reader, file)
        assert torch.equal(world.sampled(reader), wanted)
        assert {p.requires_grad for name, p in reader.network.named_parameters() if "lora_" in name} == {True}
    save_lora(plain, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def test_a_file_of_diffusers_own_is_read(world: World, tmp_path: Path) -> None:
    from diffusers.loaders.lora_base import _pack_dict_with_prefix
    from peft import LoraConfig, get_peft_model_state_dict

    pipeline, model = world.pipeline(), world.model()
    pipeline.transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(world.targets), init_lora_weights="gaussian"))
    with torch.no_grad():
        for name, parameter in pipeline.transformer.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    layers = get_peft_model_state_dict(pipeline.transformer)
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in pipeline.transformer.peft_config["default"].to_dict().items()}
    pipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers, transformer_lora_adapter_metadata=config)
    load_lora(model, tmp_path / "pytorch_lora_weights.safetensors")
    assert model.network.peft_config["default"].lora_alpha == ALPHA and _pack_dict_with_prefix(config, "transformer")["transformer.r"] == RANK
    assert (world.sampled(model) - world.tiny.sample(pipeline, world.noise(model), world.tiny.clip)).abs().max() < 1e-5


def test_the_adapter_of_another_model_is_refused_with_the_first_key_that_does_not_fit(world: World, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    save_lora(world.trained(), file)
    tensors, metadata = load_weights(file)
    first, last = min(tensors), max(tensors)

    def refused(changed: dict[str, Tensor], match: str, header: dict[str, str] | None = None) -> None:
        save_weights(file, changed, metadata if header is None else header)
        for model in (world.model(), world.trained()):
            network = model.network
            with pytest.raises(UserError, match=match) as raised:
                load_lora(model, file)
            assert "\n" not in str(raised.value) and model.network is network

    rest = {key: tensor for key, tensor in tensors.items() if key != first}
    refused(rest | {first.replace("lora_A", "lora_C"): tensors[first]}, rf"{first.replace('lora_A', 'lora_C')} \(2x\d+\) does not fit")
    refused(rest | {first: torch.zeros(RANK, 3)}, rf"{first} \(2x3\) does not fit")
    refused(rest | {first.replace("transformer.", "unet."): tensors[first]}, "unet.* does not fit")
    refused(rest | {f"transformer.nowhere.0.{last}": tensors[last]}, r"nowhere\.0\..* does not fit")
    refused(rest, "2 tensors a layer|two tensors a layer")
    refused(rest | {first: torch.zeros(RANK + 1, tensors[first].shape[1])}, "2 ranks")
    refused(tensors, "alpha_pattern", {HEADER: json.dumps({"transformer.alpha_pattern": {"a": 1}})})
    refused(tensors, "cannot read the header", {HEADER: "{"})


def test_an_adapter_of_another_rank_or_alpha_is_not_poured_into_the_one_that_is_there(world: World, tmp_path: Path) -> None:
    file, model = tmp_path / "lora.safetensors", world.model()
    save_lora(world.trained(), file)
    model.network = add_lora(model.network, rank=RANK, alpha=1, targets=world.targets)
    with pytest.raises(UserError, match=r"rank 2, alpha 6\.0, .* is not of the adapter that is there \(rank 2, alpha 1"):
        load_lora(model, file)


def test_a_network_without_an_adapter_has_nothing_to_save(world: World, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no adapter"):
        save_lora(world.model(), tmp_path / "lora.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_file_without_a_header_has_the_scale_diffusers_gives_it(world: World, tmp_path: Path) -> None:
    file, model = tmp_path / "lora.safetensors", world.model()
    save_lora(world.trained(), file)
    save_weights(file, load_weights(file)[0], {})
    load_lora(model, file)
    pipeline = world.pipeline()
    pipeline.load_lora_weights(str(file))
    assert (world.sampled(model) - world.tiny.sample(pipeline, world.noise(model), world.tiny.clip)).abs().max() < 1e-5


def test_comfyui_gets_wans_own_names_and_diffusers_finds_its_way_back(tmp_path: Path) -> None:
    tiny = TINY["wan"]
    tiny.make().save_pretrained(tmp_path / "wan")
    module = importlib.import_module("base_model.families.wan")
    world = World(tiny, tmp_path / "wan", (*module.LORA_TARGETS, *module.MLP_TARGETS))
    model, pipeline = world.trained(), world.pipeline()
    (file,) = save_lora(model, tmp_path / "comfy.safetensors", comfy=True)
    tensors, _ = load_weights(file)
    layers = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.k", "cross_attn.v", "cross_attn.o", "ffn.0", "ffn.2")
    assert set(tensors) == {f"diffusion_model.blocks.{i}.{layer}.{end}" for i in range(2) for layer in layers for end in ("lora_A.weight", "lora_B.weight", "alpha")}
    pipeline.load_lora_weights(str(file))  # through _convert_non_diffusers_wan_lora_to_diffusers
    assert (world.sampled(model) - world.tiny.sample(pipeline, world.noise(model), tiny.clip)).abs().max() < 1e-5


def test_a_layer_without_a_name_in_comfyui_is_said(tmp_path: Path) -> None:
    network = add_lora(nn.Sequential(nn.Linear(4, 4)), rank=1, alpha=1, targets=("0",))
    model: Any = SimpleNamespace(network=network)
    with pytest.raises(UserError, match=r"ComfyUI's name for transformer\.0\.lora_A\.weight of Sequential is not known"):
        save_lora(model, tmp_path / "lora.safetensors", comfy=True)


def test_a_pickled_adapter_is_refused(world: World, tmp_path: Path) -> None:
    torch.save({}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="pickle"):
        load_lora(world.model(), tmp_path / "lora.safetensors")

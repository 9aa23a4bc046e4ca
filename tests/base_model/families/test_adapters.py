"""LoRA files of every family: what diffusers' pipeline makes with one is what we make."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from functools import partial
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
from base_model.families.adapters import FAMILY, HEADER, load_lora, save_lora
from base_model.families.loading import load_family
from base_model.lora import add_lora, merge, reference
from base_model.types import ClipShape
from tests.base_model.families import tiny_cogvideox, tiny_hunyuan_video, tiny_ltx, tiny_mochi, tiny_wan

PROMPTS = ["a red ball", "a blue cube rolls to the left"]
RANK, ALPHA, STEPS = 2, 6.0, 4
# raised by diffusers in Mochi's pipeline: its rotary table asks for an autocast that CPUs do not have
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")


class Tiny(NamedTuple):
    """A family's tiny pipeline, the module that reads it, a clip of its size, and (pipeline, first noise [B,C,F,H,W]) -> the latents it ends in [B,C,F,H,W], unguided."""

    make: Callable[[], Any]
    module: str
    clip: ClipShape
    sample: Callable[[Any, Tensor, ClipShape], Tensor]


def told(clip: ClipShape) -> dict[str, Any]:
    size = {"height": clip.height, "width": clip.width, "num_frames": clip.frames}
    return {"prompt": PROMPTS, **size, "num_inference_steps": STEPS, "guidance_scale": 1.0, "output_type": "latent"}


def as_it_is(pipeline: Any, x: Tensor, clip: ClipShape) -> Tensor:
    found: Tensor = pipeline(**told(clip), latents=x).frames
    return found


def ltx(pipeline: Any, x: Tensor, clip: ClipShape) -> Tensor:
    """Latents as tokens [B,F*H*W,C]."""
    tokens: Tensor = pipeline(**told(clip), latents=x.flatten(2).transpose(1, 2)).frames
    return tokens.transpose(1, 2).reshape(x.shape)


def cogvideox(pipeline: Any, x: Tensor, clip: ClipShape) -> Tensor:
    """Frames before channels; for 1.5 our positions are two latent frames one behind the other."""
    joined = x.shape[1] // 4
    theirs = x.unflatten(1, (joined, 4)).permute(0, 3, 1, 2, 4, 5).flatten(1, 2)
    found: Tensor = pipeline(**told(clip), latents=theirs, max_sequence_length=12).frames
    return found.unflatten(1, (-1, joined)).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)


def hunyuan_video(pipeline: Any, x: Tensor, clip: ClipShape) -> Tensor:
    found: Tensor = pipeline(**told(clip) | {"guidance_scale": 6.0}, latents=x).frames
    return found


TINY = {
    "wan": Tiny(tiny_wan.text_to_video, "wan", ClipShape(5, 32, 48), as_it_is),
    "ltx": Tiny(tiny_ltx.tiny_pipeline, "ltx", ClipShape(9, 64, 96), ltx),
    "mochi": Tiny(tiny_mochi.tiny_pipeline, "mochi", ClipShape(7, 32, 48), as_it_is),
    "cogvideox-2b": Tiny(tiny_cogvideox.tiny_pipeline, "cogvideox", ClipShape(9, 32, 48), cogvideox),
    "cogvideox-1.5": Tiny(partial(tiny_cogvideox.tiny_pipeline, "1.5"), "cogvideox", ClipShape(9, 32, 48), cogvideox),
    "hunyuan_video": Tiny(tiny_hunyuan_video.tiny_pipeline, "hunyuan_video", ClipShape(5, 32, 48), hunyuan_video),
}


class World(NamedTuple):
    tiny: Tiny
    folder: Path
    attention: tuple[str, ...]
    mlp: tuple[str, ...]

    @property
    def targets(self) -> tuple[str, ...]:
        return self.attention + self.mlp

    def model(self) -> Any:
        return load_family(str(self.folder), device=torch.device("cpu"), dtype=torch.float32)

    def trained(self, seed: int = 0, targets: tuple[str, ...] | str = (), *, dora: bool = False) -> Any:
        """With an adapter that changes what the network says; of attention and MLP where no targets are given."""
        model = self.model()
        model.network = add_lora(model.network, rank=RANK, alpha=ALPHA, targets=targets or self.targets, dora=dora, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.network.named_parameters():
                if ".lora_B." in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / 5)
                if ".lora_magnitude_vector." in name:
                    parameter.mul_(1 + torch.rand(parameter.shape, generator=generator) / 2)
        return model

    def noise(self, model: Any) -> Tensor:
        return torch.randn(2, *model.latents.shape(self.tiny.clip), generator=torch.Generator().manual_seed(1))

    def sampled(self, model: Any) -> Tensor:
        return rollout(model, ODE(), self.noise(model), model.times(STEPS, self.tiny.clip), model.encode_text(PROMPTS), noise=torch.Generator()).x0

    def pipeline(self) -> Any:
        made = self.tiny.make()
        made.set_progress_bar_config(disable=True)
        return made


def made(name: str, folder: Path) -> World:
    tiny = TINY[name]
    tiny.make().save_pretrained(folder)
    module = importlib.import_module(f"base_model.families.{tiny.module}")
    return World(tiny, folder, module.LORA_TARGETS, module.MLP_TARGETS)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    return {name: made(name, tmp_path_factory.mktemp(name)) for name in TINY}


@pytest.fixture(params=TINY)
def world(request: pytest.FixtureRequest, worlds: dict[str, World]) -> World:
    return worlds[request.param]


@pytest.mark.parametrize("part", ["attention", "targets"])
def test_the_pipeline_with_the_file_samples_what_we_sample(world: World, tmp_path: Path, part: str) -> None:
    model, pipeline = world.trained(targets=getattr(world, part)), world.pipeline()
    assert save_lora(model, tmp_path / "lora.safetensors") == [tmp_path / "lora.safetensors"]
    with reference(model.network):
        before = world.sampled(model)
    assert (world.tiny.sample(pipeline, world.noise(model), world.tiny.clip) - before).abs().max() < 1e-5
    pipeline.load_lora_weights(str(tmp_path / "lora.safetensors"))
    wanted = world.tiny.sample(pipeline, world.noise(model), world.tiny.clip)
    assert (wanted - before).abs().max() > 0.02 and (world.sampled(model) - wanted).abs().max() < 1e-5


def test_the_pipeline_reads_a_dora_as_we_do_and_so_is_the_merged_network(world: World, tmp_path: Path) -> None:
    file = tmp_path / "dora.safetensors"
    model, pipeline, plain = world.trained(dora=True), world.pipeline(), world.model()
    save_lora(model, file)
    before, wanted = world.sampled(plain), world.sampled(model)
    pipeline.load_lora_weights(str(file))
    load_lora(plain, file)
    assert (wanted - before).abs().max() > 0.02 and torch.equal(world.sampled(plain), wanted)
    assert (world.tiny.sample(pipeline, world.noise(model), world.tiny.clip) - wanted).abs().max() < 1e-5
    model.network = merge(model.network)
    assert not any("lora" in name for name in model.network.state_dict()) and (world.sampled(model) - wanted).abs().max() < 1e-5


def test_a_dora_without_a_magnitude_or_for_comfyui_is_refused(worlds: dict[str, World], tmp_path: Path) -> None:
    file, model = tmp_path / "dora.safetensors", worlds["wan"].trained(dora=True)
    save_lora(model, file)
    tensors, metadata = load_weights(file)
    one = next(key for key in tensors if "magnitude" in key)
    for changed, match in (
        ({key: tensor for key, tensor in tensors.items() if key != one}, r"tensors of \d+ layers[^\n]*three tensors a layer, as a DoRA has"),
        ({key: tensor for key, tensor in tensors.items() if "magnitude" not in key}, "three tensors a layer"),
        (tensors | {one: torch.ones(3)}, r"magnitude_vector \(3\) does not fit"),
    ):
        save_weights(file, changed, metadata)
        with pytest.raises(UserError, match=match):
            load_lora(worlds["wan"].model(), file)
    save_weights(file, tensors, metadata)
    with pytest.raises(UserError, match="is not of the adapter that is there"):
        load_lora(worlds["wan"].trained(), file)
    with pytest.raises(UserError, match="a DoRA is not written for ComfyUI here"):
        save_lora(model, tmp_path / "comfy.safetensors", comfy=True)
    assert not (tmp_path / "comfy.safetensors").exists()


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
    for damaged in ("{", "5", "[1]", "null", "[" * 100_000):
        refused(tensors, "cannot read the header", {HEADER: damaged})


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


WAN_LAYERS = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.k", "cross_attn.v", "cross_attn.o", "ffn.0", "ffn.2")
LTX_LAYERS = tuple(f"{attention}.to_{end}" for attention in ("attn1", "attn2") for end in ("q", "k", "v", "out.0"))
HUNYUAN_LAYERS = tuple(f"{kind}_{layer}" for kind in ("img", "txt") for layer in ("attn_qkv", "attn_proj", "mlp.fc1", "mlp.fc2"))
IN_COMFYUI = {
    "wan": ("", [f"blocks.{i}.{layer}" for i in range(2) for layer in WAN_LAYERS]),
    "ltx": ("", [f"transformer_blocks.{i}.{layer}" for i in range(2) for layer in (*LTX_LAYERS, "ff.net.0.proj", "ff.net.2")]),
    "hunyuan_video": (r"transformer_blocks\..*\.(to_[qkv]|to_out\.0|to_add_out|add_[qkv]_proj|net\.0\.proj|net\.2)", [f"double_blocks.0.{layer}" for layer in HUNYUAN_LAYERS]),
}
"""What is adapted, all where it is empty, and the names the original code has for it."""


@pytest.mark.parametrize("name", IN_COMFYUI)
def test_comfyui_gets_the_names_of_the_original_code_and_diffusers_finds_its_way_back(worlds: dict[str, World], name: str, tmp_path: Path) -> None:
    world, (targets, layers) = worlds[name], IN_COMFYUI[name]
    model, pipeline = world.trained(targets=targets), world.pipeline()
    (file,) = save_lora(model, tmp_path / "comfy.safetensors", comfy=True)
    tensors, _ = load_weights(file)
    assert set(tensors) == {f"diffusion_model.{layer}.{end}.weight" for layer in layers for end in ("lora_A", "lora_B")}
    pipeline.load_lora_weights(str(file))  # through _convert_..._lora_to_diffusers
    wanted = world.sampled(model)
    assert (wanted - world.tiny.sample(pipeline, world.noise(model), world.tiny.clip)).abs().max() < 1e-5
    pipeline.unload_lora_weights()
    assert (wanted - world.tiny.sample(pipeline, world.noise(model), world.tiny.clip)).abs().max() > 0.02


def deltas(tensors: dict[str, Tensor], scale: float = 1.0, every: int = 1) -> dict[str, Tensor]:
    """Layer -> what it adds to its weight, [out,in]; of the columns one in `every`."""
    ends = ".lora_A.weight", ".lora_B.weight"
    names = sorted({key.removesuffix(ends[0]) for key in tensors if key.endswith(ends[0])})
    return {name: scale * tensors[name + ends[1]] @ tensors[name + ends[0]][:, ::every] for name in names}


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    """None but the wanted layers are changed, each by what is wanted; zeros are no change."""
    changed = {name for name, delta in found.items() if delta.any()}
    return bool(wanted) and changed == wanted.keys() and all(torch.allclose(found[name], wanted[name], atol=1e-6) for name in wanted)


@pytest.mark.parametrize("targets", [r"single_.*\.(attn\.to_[qkv]|proj_mlp|proj_out)", r"single_.*\.(attn\.to_[kv]|proj_mlp)", r"single_.*\.to_v"])
def test_layers_that_are_one_in_hunyuans_own_code_are_joined_and_diffusers_splits_them_again(targets: str, tmp_path: Path) -> None:
    from diffusers import HunyuanVideoTransformer3DModel
    from diffusers.loaders.lora_conversion_utils import _convert_hunyuan_video_lora_to_diffusers

    with torch.device("meta"):  # as wide as the published one, the only width diffusers splits
        network: Any = HunyuanVideoTransformer3DModel(num_layers=0, num_single_layers=1, num_refiner_layers=1)
    network = add_lora(network.to_empty(device="cpu"), rank=RANK, alpha=ALPHA, targets=targets)
    for name, parameter in network.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    model: Any = SimpleNamespace(network=network)
    save_lora(model, tmp_path / "ours.safetensors")
    save_lora(model, tmp_path / "comfy.safetensors", comfy=True)
    ours, comfy = (load_weights(tmp_path / f"{name}.safetensors")[0] for name in ("ours", "comfy"))
    assert {key.rsplit(".lora_")[0] for key in comfy} <= {"diffusion_model.single_blocks.0.linear1", "diffusion_model.single_blocks.0.linear2"}
    assert equal(deltas(_convert_hunyuan_video_lora_to_diffusers(comfy), every=97), deltas(ours, ALPHA / RANK, every=97))


def test_hunyuans_refiner_has_the_names_diffusers_reads_from_a_whole_checkpoint(worlds: dict[str, World], tmp_path: Path) -> None:
    from diffusers.loaders.single_file_utils import convert_hunyuan_video_transformer_to_diffusers

    model = worlds["hunyuan_video"].trained(targets=r"context_embedder\..*refiner_blocks.*\.(to_[qkv]|to_out\.0|net\.0\.proj|net\.2)")
    save_lora(model, tmp_path / "ours.safetensors")
    save_lora(model, tmp_path / "comfy.safetensors", comfy=True)
    ours, comfy = (load_weights(tmp_path / f"{name}.safetensors")[0] for name in ("ours", "comfy"))
    whole = {f"{name.removeprefix('diffusion_model.')}.weight": delta for name, delta in deltas(comfy).items()}
    found = {f"transformer.{name.removesuffix('.weight')}": delta for name, delta in convert_hunyuan_video_transformer_to_diffusers(whole).items()}
    assert len(found) == 6 and equal(found, deltas(ours, ALPHA / RANK))


@pytest.mark.parametrize("name", ["mochi", "cogvideox-2b"])
def test_a_family_without_names_in_comfyui_is_said(worlds: dict[str, World], name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^ComfyUI's name for transformer_blocks\.\d\..* of (Mochi|CogVideoX)Transformer3DModel is not known[^\n]*$"):
        save_lora(worlds[name].trained(), tmp_path / "lora.safetensors", comfy=True)
    assert not list(tmp_path.iterdir())


def test_a_layer_without_a_name_in_comfyui_is_said(tmp_path: Path) -> None:
    network = add_lora(nn.Sequential(nn.Linear(4, 4)), rank=1, alpha=1, targets=("0",))
    model: Any = SimpleNamespace(network=network)
    with pytest.raises(UserError, match=r"ComfyUI's name for 0 of Sequential is not known"):
        save_lora(model, tmp_path / "lora.safetensors", comfy=True)


def test_the_adapter_of_another_family_is_refused_in_one_line_also_where_its_layers_would_fit(worlds: dict[str, World], tmp_path: Path) -> None:
    for name, other in zip(TINY, [*list(TINY)[1:], "wan"], strict=True):
        save_lora(worlds[name].trained(), tmp_path / f"{name}.safetensors")
        model = worlds[other].model()
        network = model.network
        if TINY[name].module == TINY[other].module:
            load_lora(model, tmp_path / f"{name}.safetensors")  # layers of the same sizes
            continue
        with pytest.raises(UserError, match=r"^[^\n]*is the adapter of another model: of a \w+Transformer3DModel, and this is a \w+Transformer3DModel[^\n]*$"):
            load_lora(model, tmp_path / f"{name}.safetensors")
        assert model.network is network
        tensors, metadata = load_weights(tmp_path / f"{name}.safetensors")
        save_weights(tmp_path / "unsigned.safetensors", tensors, {key: value for key, value in metadata.items() if key != FAMILY})
        with pytest.raises(UserError, match=r"^[^\n]*is the adapter of another model: transformer\.\S+ \([\dx]+\) does not fit[^\n]*$"):
            load_lora(model, tmp_path / "unsigned.safetensors")
    file, model = tmp_path / "cogvideox-2b.safetensors", worlds["ltx"].model()
    with pytest.raises(UserError, match="of a CogVideoXTransformer3DModel, and this is a LTXVideoTransformer3DModel"):
        load_lora(model, file)
    save_weights(file, load_weights(file)[0], {})
    load_lora(model, file)  # every layer of it is one of LTX's too


def test_a_pickled_adapter_is_refused(world: World, tmp_path: Path) -> None:
    torch.save({}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="pickle"):
        load_lora(world.model(), tmp_path / "lora.safetensors")

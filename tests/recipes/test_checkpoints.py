"""Whole checkpoints of trained families: what diffusers' pipeline and `--model` make of one, whose parts it shares, what its cards say, and what is left of one that fails."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from torch import Tensor

import recipes.checkpoints
from align.kernels import ODE
from align.trajectory import rollout
from base_model.checkpoint import load_weights
from base_model.errors import UserError
from base_model.families.loading import load_family
from base_model.families.wan_experts import Experts
from base_model.lora import add_lora
from base_model.types import TrainableModel
from recipes import generate
from recipes.checkpoints import CARD, README, base_of, check_can_save, save_checkpoint
from recipes.generate import Sampler
from recipes.models import load_model, model_lineage
from recipes.sft import Config
from recipes.weights import file_hash
from tests.base_model.families import tiny_wan
from tests.base_model.families.test_adapters import PROMPTS, STEPS, TINY

CPU = torch.device("cpu")
SAFETY = [{"filter": "prompt-words", "version": "3", "threshold": 0.5, "policies": ["x"], "policy_version": "2"}]
ABOUT = {"recipe": "sft", "data": "d" * 64, "seconds": 12.3, "measured": {"held_out_loss": 0.5, "nested": {"no": 1}}, "safety": SAFETY, "data_licence": "CC-BY-4.0"}


def save(model: Any, source: Path, out: Path) -> Path:
    return save_checkpoint(model, source, out, cfg=Config(out=out, seed=7), **ABOUT)  # type: ignore[arg-type]


def shaken(model: Any) -> Any:
    """Trained, as far as anybody can see."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.network.parameters():
            if parameter.is_floating_point() and (parameter.requires_grad or not hasattr(model.network, "peft_config")):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def load(folder: Path, *, nf4: bool = False) -> Any:
    return load_family(str(folder), device=CPU, dtype=torch.float32, nf4=nf4)


def said(model: TrainableModel, shape: tuple[int, ...] = (16, 2, 4, 4)) -> Tensor:
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(x, torch.tensor([0.95, 0.3]), model.encode_text(["a red ball", "a blue cube rolls"]))


def hashes(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file_hash(file) for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_wan.text_to_video().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "LICENSE.txt").write_text("terms")
    (tmp_path / "base" / README).write_text("---\nlicense: other\nlicense_name: wan-terms\nlicense_link: LICENSE.txt\n---\n\n# Wan\n")
    return tmp_path / "base"


@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")
@pytest.mark.parametrize("name", [name for name in TINY if name != "cogvideox-1.5"])
def test_the_pipeline_that_reads_it_samples_what_the_trained_model_samples(name: str, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    tiny = TINY[name]
    tiny.make().save_pretrained(tmp_path / "base")
    before, model = load(tmp_path / "base"), shaken(load(tmp_path / "base"))
    out = save(model, tmp_path / "base", tmp_path / "out")
    shape = model.latents.shape(tiny.clip)
    wanted = said(model, shape)
    assert torch.equal(said(load(out), shape), wanted) and (said(before, shape) - wanted).abs().max() > 0.01
    noise, pipeline = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1)), DiffusionPipeline.from_pretrained(out)
    assert type(pipeline) is type(tiny.make())
    pipeline.set_progress_bar_config(disable=True)
    ours = rollout(model, ODE(), noise, model.times(STEPS, tiny.clip), model.encode_text(PROMPTS), noise=torch.Generator()).x0
    assert (tiny.sample(pipeline, noise, tiny.clip) - ours).abs().max() < 1e-5


def test_both_experts_are_saved(tmp_path: Path) -> None:
    tiny_wan.a14b().save_pretrained(tmp_path / "base")
    model = shaken(load(tmp_path / "base"))
    again = load(save(model, tmp_path / "base", tmp_path / "out"))
    assert isinstance(again.network, Experts) and again.network.boundary == model.network.boundary
    assert torch.equal(said(again), said(model))


@pytest.mark.parametrize(("nf4", "dora"), [(False, False), (True, False), (True, True)], ids=["LoRA", "QLoRA", "QDoRA"])
def test_an_adapter_is_merged_and_four_bits_become_plain_weights(base: Path, tmp_path: Path, nf4: bool, dora: bool) -> None:
    model = load(base, nf4=nf4)
    model.network = add_lora(model.network, rank=2, alpha=4, targets=model.lora_targets, dora=dora)
    wanted = said(shaken(model))
    found = load(save(model, base, tmp_path / "out"))
    assert (said(found) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    stored, original = (load_weights(folder / "transformer" / "diffusion_pytorch_model.safetensors")[0] for folder in (tmp_path / "out", base))
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in stored.items()} == {name: (tensor.shape, tensor.dtype) for name, tensor in original.items()}


def test_all_but_the_transformer_is_the_bases_own_and_the_base_stays_as_it_was(base: Path, tmp_path: Path) -> None:
    (base / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04")
    before = hashes(base)
    out = save(shaken(load(base)), base, tmp_path / "out")
    assert hashes(base) == before
    shared = {name for name in hashes(out) if (base / name).exists() and (base / name).samefile(out / name)}
    assert shared == {name for name in before if not name.startswith("transformer/") and not name.endswith(".bin")} - {"model_index.json", README}
    assert "LICENSE.txt" in shared and "text_encoder/model.safetensors" in shared
    assert not [name for name in hashes(out) if str(tmp_path).encode() in (out / name).read_bytes()], "no path of this machine is told"


def test_where_there_are_no_links_files_are_copied(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(recipes.checkpoints.os, "link", link)
    model = shaken(load(base))
    out = save(model, base, tmp_path / "out")
    assert not (out / "vae" / "config.json").samefile(base / "vae" / "config.json") and torch.equal(said(load(out)), said(model))


def test_the_cards_name_base_terms_data_filters_command_and_measures(base: Path, tmp_path: Path) -> None:
    out = save(shaken(load(base)), base, tmp_path / "out")
    card = json.loads((out / CARD).read_text())
    assert card["files"] == {name: sha256 for name, sha256 in hashes(out).items() if name not in (CARD, README)}
    assert card["base"] == {"name": "base", "sha256": model_lineage(base), "licence": "wan-terms"}
    assert card["data_sha256"] == "d" * 64 and card["data_licence"] == "CC-BY-4.0" and card["safety"] == SAFETY
    assert card["command"] == "rushes sft --seed 7" and "out" not in card["config"] and card["commit"] and card["versions"]["torch"]
    hub = ModelCard.load(out / README)
    told = {**hub.data.to_dict()}
    assert told == {
        "license": "other",
        "license_name": "wan-terms",
        "license_link": "LICENSE.txt",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-video",
        "tags": ["rushes", "diffusers", "text-to-video", "sft"],
    }
    for part in (model_lineage(base), "d" * 64, "CC-BY-4.0", "wan-terms", "prompt-words 3", "`rushes sft --seed 7`", "| held_out_loss | 0.5 |", 'from_pretrained("out")'):
        assert part in hub.text
    again = save(shaken(load(out)), out, tmp_path / "again")
    assert json.loads((again / CARD).read_text())["base"]["sha256"] == model_lineage(out) != model_lineage(base)
    (base / README).unlink()
    assert "not known here" in (save(load(base), base, tmp_path / "bare") / README).read_text()


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument is deprecated:UserWarning")  # diffusers gives it
def test_a_base_in_the_hubs_cache_is_named_as_there(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    repository = tmp_path / "cache" / "models--owner--wan"
    snapshot = repository / "snapshots" / ("a" * 40)
    for name in hashes(base):
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        blob = repository / "blobs" / name.replace("/", "-")
        blob.parent.mkdir(exist_ok=True)
        (base / name).rename(blob)
        (snapshot / name).symlink_to(blob)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    source = Path("owner/wan")
    found = base_of(source)
    assert (found.name, found.on_hub, found.licence["license_name"]) == ("owner/wan", True, "wan-terms")
    model = shaken(load(source))
    out = save(model, source, tmp_path / "out")
    assert torch.equal(said(load(out)), said(model)) and not any(file.is_symlink() for file in out.rglob("*"))
    assert ModelCard.load(out / README).data.base_model == "owner/wan"
    assert ModelCard.load(save(model, out, tmp_path / "again") / README).data.base_model == "owner/wan", "also of what was trained from it"


def test_rushes_generate_makes_clips_with_it(base: Path, tmp_path: Path) -> None:
    out = save(shaken(load(base)), base, tmp_path / "out")
    assert type(load_model(out, device=CPU)) is type(load(base))
    told = generate.main(generate.Config(out=tmp_path / "clips", model=out, prompts=("a red ball",), clips_per_prompt=1, sampler=Sampler(steps=2, frames=5, height=16, width=16)))
    assert len(told["clips"]) == 1 and Path(told["clips"][0]).exists()  # type: ignore[arg-type,index]


def fails(error: Exception) -> Callable[..., None]:
    def failing(*_: object, **__: object) -> None:
        raise error

    return failing


def test_one_that_fails_leaves_nothing_or_the_one_before(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = shaken(load(base)), tmp_path / "out"
    full = OSError(errno.ENOSPC, "No space left on device")
    rust = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    for error, place in ((full, "recipes.checkpoints.write_synced"), (rust, "diffusers.WanTransformer3DModel.save_pretrained")):
        with monkeypatch.context() as patched:
            patched.setattr(place, fails(error))
            with pytest.raises(UserError, match=r"^the disk is full, while writing [^\n]*$"):
                save(model, base, out)
        assert [file.name for file in tmp_path.iterdir()] == ["base"]
    before = hashes(save(model, base, out))
    with monkeypatch.context() as patched:
        patched.setattr("recipes.checkpoints.write_synced", fails(full))
        with pytest.raises(UserError, match="the disk is full"):
            save(shaken(model), base, out)
    assert hashes(out) == before and sorted(file.name for file in tmp_path.iterdir()) == ["base", "out"]
    out.rename(tmp_path / ".out.old")  # where a kill came between the two renames
    with monkeypatch.context() as patched:
        patched.setattr("recipes.checkpoints.write_synced", fails(full))
        with pytest.raises(UserError, match="the disk is full"):
            save(model, base, out)
    assert hashes(out) == before
    assert hashes(save(shaken(model), base, out)) != before


def test_what_cannot_be_saved_is_said_before_the_training(base: Path, tmp_path: Path) -> None:
    check_can_save(base, tmp_path / "out")
    with pytest.raises(UserError, match=r"^[^\n]*base holds something else than a checkpoint of rushes[^\n]*$"):
        check_can_save(base, base)
    (base / "text_encoder").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"^[^\n]*base is not whole here: no text_encoder/[^\n]*$"):
        check_can_save(base, tmp_path / "out")

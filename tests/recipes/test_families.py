"""Every recipe of alignment moves every open family, and diffusers' pipeline reads the adapter: two steps each, on saved pipelines of real classes and of a toy's size."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from torch import Tensor

from align.run import latest_checkpoint, read_metrics
from base_model.errors import UserError
from base_model.families.loading import load_family
from base_model.families.ltx import LTXVideoModel
from base_model.families.wan_experts import Experts
from base_model.lora import add_lora
from base_model.prompts.text import TextEncoder
from base_model.types import ClipShape
from base_model.video.store import ClipStore
from recipes import expand, generate, grpo
from recipes.cli import COMMANDS
from recipes.feedback import Feedback, Setting
from recipes.generate import Sampler
from recipes.guards import Guards
from recipes.models import load_model, model_lineage
from recipes.visual import Visual
from recipes.weights import file_hash, read_card
from reward.matcher import Matcher
from reward.model import RewardModel, save_reward_model
from reward.quality import Quality
from tests.base_model.families import tiny_cogvideox, tiny_hunyuan_video, tiny_ltx, tiny_mochi, tiny_wan
from tests.recipes.small import save_small_network

CPU = torch.device("cpu")
RECIPES = [name for name, command in COMMANDS.items() if name != "bench" and issubclass(importlib.import_module(command.module).Config, Setting)]
"""Whatever command moves a policy."""


class Family(NamedTuple):
    """A tiny pipeline and the smallest clip it makes with two latent frames."""

    make: Callable[[], Any]
    clip: ClipShape


def clear(pipeline: Any) -> Any:
    """With a decoder that has no biases, in which a random one would drown what latents say."""
    with torch.no_grad():
        for name, parameter in pipeline.vae.decoder.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    return pipeline


FAMILIES = {
    "wan": Family(lambda: clear(tiny_wan.text_to_video()), ClipShape(5, 16, 16)),
    "wan-5b": Family(lambda: clear(tiny_wan.ti2v(image=False)), ClipShape(5, 32, 32)),
    "wan-a14b": Family(lambda: clear(tiny_wan.a14b()), ClipShape(5, 16, 16)),
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
    torch.manual_seed(1)
    reward = RewardModel(Matcher(), Quality(), ("overall",), TextEncoder())
    reward.scale.fill_(1e-3)  # a fresh one says almost the same of all clips
    (folder / "reward").mkdir()
    save_reward_model(folder / "reward", reward, {})
    save_small_network(folder / "network.safetensors")
    return folder


def sampler_of(clip: ClipShape) -> Sampler:
    return Sampler(steps=2, frames=clip.frames, height=clip.height, width=clip.width)


def align(recipe: str, out: Path, folder: Path, family: str, *, resume: bool = False, clip: ClipShape | None = None, **policy: Any) -> dict[str, Any]:
    """What the command returns after two rollouts."""
    module = importlib.import_module(COMMANDS[recipe].module)
    small = {"iterations": 2, "prompts": 1, "group_size": 2, "micro_batch": 1, "lora_rank": 2, "lr": 1e-2, "evaluate_every": 100, "save_every": 1}
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
    assert read_card(file)["base"] == {"name": family, "sha256": model_lineage(folder / family), "licence": None}, "what it goes onto"
    assert not (tmp_path / "network.safetensors").exists(), "nothing is merged"

    adapted, plain = (said(load_model(folder / family, device=CPU, adapter=adapter), family) for adapter in (file, None))
    assert (adapted - plain).abs().max() > 1e-4
    assert (said(with_lora_of_diffusers(folder / family, file), family) - adapted).abs().max() < 1e-5


def test_a_killed_run_of_a_family_ends_with_the_bits_of_one_that_was_not(folder: Path, tmp_path: Path) -> None:
    align("grpo", tmp_path / "whole", folder, "wan")
    align("grpo", tmp_path / "cut", folder, "wan", iterations=1)
    for file in ("adapter.safetensors", "adapter.json"):
        (tmp_path / "cut" / file).unlink()
    align("grpo", tmp_path / "cut", folder, "wan", resume=True)

    def left(out: Path) -> dict[str, str]:
        checkpoint = latest_checkpoint(out)
        assert checkpoint is not None
        return {file.name: file_hash(file) for file in (out / "adapter.safetensors", *checkpoint.glob("*.safetensors"))}

    assert left(tmp_path / "cut") == left(tmp_path / "whole") and len(left(tmp_path / "whole")) == 4
    both = ([row for row in read_metrics(tmp_path / name, wall_clock=False) if "grad_norm" in row] for name in ("cut", "whole"))
    assert next(both) == next(both)


def test_clips_are_made_with_a_lora_that_was_trained_here(folder: Path, tmp_path: Path) -> None:
    align("grpo", tmp_path / "run", folder, "wan", lr=1.0)
    adapter = tmp_path / "run" / "adapter.safetensors"
    cfg = generate.Config(out=tmp_path / "clips", model=folder / "wan", prompts=("a red ball rolls",), clips_per_prompt=2, sampler=sampler_of(FAMILIES["wan"].clip))
    plain, adapted = generate.main(cfg), generate.main(cfg.model_copy(update={"adapter": adapter}))
    assert len({*plain["clips"], *adapted["clips"]}) == 4  # type: ignore[misc]
    store = ClipStore(cfg.out)
    assert {row.generator_rev for row in store.rows()} == {model_lineage(cfg.model), model_lineage(cfg.model, adapter)}

    model = with_lora_of_diffusers(folder / "wan", adapter)
    wanted = torch.cat(list(generate.sample(model, model.encode_text(cfg.prompts).repeat(2), [0, 1], cfg.sampler)))
    made = {row.seed: store.load(row.clip_id) for row in store.rows() if row.generator_rev == model_lineage(cfg.model, adapter)}
    assert all((made[seed] - clip).abs().max() < 1.5 / 255 for seed, clip in enumerate(wanted))
    assert generate.main(cfg)["clips"] == plain["clips"]


def test_ltx_is_told_the_frame_rate_of_the_clips_that_it_makes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, told, call = sampler_of(FAMILIES["ltx"].clip).model_copy(update={"fps": 7.0}), [], LTXVideoModel.__call__
    cfg = generate.Config(out=tmp_path / "clips", model=folder / "ltx", prompts=("a red circle",), clips_per_prompt=1, sampler=sampler)
    generate.main(cfg)
    model = load_family(str(folder / "ltx"), device=CPU, dtype=torch.float32)
    at_its_own, at_seven = (next(iter(generate.sample(replace(model, fps=fps), model.encode_text(cfg.prompts), [0], sampler))) for fps in (25.0, 7.0))
    (row,) = ClipStore(cfg.out).rows()
    made = ClipStore(cfg.out).load(row.clip_id)
    assert (made - at_seven).abs().max() < 1.5 / 255 < (at_its_own - at_seven).abs().max()

    monkeypatch.setattr(LTXVideoModel, "__call__", lambda self, *given: (told.append(self.fps), call(self, *given))[1])
    align("grpo", tmp_path / "run", folder, "ltx")
    assert len(told) > 4 and set(told) == {12.0}, "the sampler's own rate"
    captions = expand.Config(model=folder / "ltx", sampler=sampler)
    judge: Any = expand.load_video_reward(captions, folder / "reward", frozenset())
    assert judge.model.fps == 7.0


def test_the_name_of_a_family_in_a_store_is_that_of_its_weights_and_its_grid(folder: Path, tmp_path: Path) -> None:
    first, other = tmp_path / "first", tmp_path / "other"
    for each in (first, other):
        FAMILIES["wan"].make().save_pretrained(each)
    assert model_lineage(first) == model_lineage(other)
    config = other / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"shift": 5.0}))
    told = {model_lineage(first), model_lineage(other)}
    with (first / "transformer" / "diffusion_pytorch_model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert len({*told, model_lineage(first)}) == 3


def test_the_grid_is_the_familys_own_unless_a_shift_is_given(folder: Path) -> None:
    for name, family in FAMILIES.items():
        model, sampler = load_model(folder / name, device=CPU), sampler_of(family.clip).model_copy(update={"steps": 4})
        assert torch.equal(generate.times_of(model, sampler), model.times(4, family.clip))
        shifted = generate.times_of(model, sampler.model_copy(update={"shift": 2.0}))
        assert shifted[0] == torch.tensor(model.path.t_max) and shifted[-1] == 0
        assert not torch.allclose(generate.times_of(model, sampler), shifted)
    model = load_model(folder / "network.safetensors", device=CPU)
    assert torch.equal(generate.times_of(model, Sampler()), generate.times_of(model, Sampler(shift=3.0)))


@pytest.mark.parametrize(
    ("family", "clip", "says"),
    [
        ("wan", ClipShape(6, 16, 16), "frames must be 1 [+] a multiple of 4"),
        ("wan", ClipShape(5, 24, 16), "cannot be cut into patches of 1x2x2"),
        ("ltx", ClipShape(9, 16, 32), "sides a multiple of 32"),
        ("mochi", ClipShape(5, 16, 16), "frames must be 1 [+] a multiple of 6"),
        ("cogvideox-1.5", ClipShape(5, 16, 16), "frames must be 1 [+] a multiple of 8"),
        ("hunyuan-video", ClipShape(5, 16, 24), "cannot be cut into patches of 1x2x2"),
    ],
)
def test_a_clip_that_a_family_cannot_make_is_said_on_one_line_before_anything_is_made(family: str, clip: ClipShape, says: str, folder: Path, tmp_path: Path) -> None:
    size = f"sampler of {clip}: .*{says}.* Change sampler.frames, sampler.height or sampler.width"
    with pytest.raises(UserError, match=size):
        align("grpo", tmp_path / "run", folder, family, clip=clip)
    with pytest.raises(UserError, match=size):
        generate.main(generate.Config(out=tmp_path / "clips", model=folder / family, sampler=sampler_of(clip)))
    assert not (tmp_path / "run" / "held_out").exists()


def test_what_fits_one_kind_of_model_alone_is_refused_with_the_other(folder: Path, tmp_path: Path) -> None:
    def refused(says: str, **changes: Any) -> None:
        given = {"out": tmp_path / "clips", "model": folder / "wan", "sampler": sampler_of(ClipShape(5, 32, 32)), "clips_per_prompt": 1, "prompts": ("a red ball",)}
        with pytest.raises(UserError, match=says) as raised:
            generate.main(generate.Config(**{**given, **changes}))
        assert "\n" not in str(raised.value)

    tiny_wan.image_to_video().save_pretrained(tmp_path / "image")
    refused("nf4 and recompute are for open families", model=None, nf4=True)
    refused(r"an adapter goes onto an open family.*network\.safetensors", model=None, adapter=tmp_path / "adapter.safetensors")
    refused(r"no folder .*wan2\.1-13b.*Did you mean wan2\.1-1\.3b", model=Path("wan2.1-13b"))
    refused("none is told", model=tmp_path / "image")
    picture = Visual(kind="image", file=tmp_path / "picture.png")
    Image.new("RGB", (32, 32), (200, 30, 30)).save(tmp_path / "picture.png")
    refused("clips from text alone", model=folder / "hunyuan-video", visual=picture)
    found = generate.main(generate.Config(out=tmp_path / "clips", model=tmp_path / "image", sampler=sampler_of(ClipShape(5, 32, 32)), visual=picture, clips_per_prompt=1))
    assert len(found["clips"]) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_that_are_computed_again_give_the_same_gradient(family: str, folder: Path) -> None:
    found = []
    for recompute in (0.0, 1.0):
        model = load_model(folder / family, device=CPU, recompute=recompute)
        model.network = add_lora(model.network, rank=2, alpha=2, targets=model.lora_targets)
        x = torch.randn(1, *model.latents.shape(FAMILIES[family].clip), generator=torch.Generator().manual_seed(0))
        model(x, torch.tensor([0.9]), model.encode_text(["a red circle"])).square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.network.parameters() if p.grad is not None]))
    assert torch.allclose(*found, atol=1e-7) and found[0].any()


@pytest.mark.parametrize("recipe", ["grpo", "nft"])
def test_a_network_in_half_precision_passes_the_checks_before_the_first_update(recipe: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where that is the precision."""

    def halved(source: str, *, device: torch.device, dtype: torch.dtype, nf4: bool) -> Any:
        return load_family(source, device=device, dtype=torch.bfloat16, nf4=nf4)

    monkeypatch.setattr("recipes.models.load_family", halved)
    align(recipe, tmp_path, folder, "wan", group_size=4, micro_batch=4)
    assert all(0 < row["grad_norm"] < math.inf for row in read_metrics(tmp_path) if "grad_norm" in row)


def test_in_four_bits_a_family_is_moved_and_its_lora_fits_the_whole_weights(folder: Path, tmp_path: Path) -> None:
    module = importlib.import_module(COMMANDS["nft"].module)
    policy = module.Policy(iterations=1, prompts=1, group_size=2, updates=1, lora_rank=2)
    setting = {"model": folder / "wan", "reward": folder / "reward", "guards": Guards(watch=False), "prompt_pool": 2, "held_out_prompts": 1, "constrained": False}
    module.main(module.Config(out=tmp_path, nf4=True, sampler=sampler_of(FAMILIES["wan"].clip), policy=policy, **setting))
    adapter = tmp_path / "adapter.safetensors"
    whole, small = (said(load_model(folder / "wan", device=CPU, adapter=adapter, nf4=nf4), "wan") for nf4 in (False, True))
    assert 1e-4 < (whole - small).norm() / whole.norm() < 0.1

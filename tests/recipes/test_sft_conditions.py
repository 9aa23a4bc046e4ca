"""SFT on visual prompts: the packed loss is that of each clip alone with what it gives, and learning it makes a clip go on from its first frame."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from align.config import load
from align.kernels import ODE
from align.objectives.regression import clip_error
from align.trajectory import rollout
from base_model.errors import UserError
from base_model.networks.packing import grid_positions, token_grid, unpatchify
from base_model.paths import add_noise
from base_model.prompts.conditions import Canvas, blank, draw_given, encode_known
from base_model.times import sampling_times, stratified_logit_normal
from base_model.tiny import LatentVideoModel
from base_model.types import ClipShape, Known
from recipes import sft
from recipes.fit import pack_loss
from recipes.pairs import Pairs, encode_pairs
from recipes.shapes.dataset import ClipSet, draw_clips
from tests.recipes.small import save_small_network, small_model

PATCH = (1, 2, 2)


@pytest.fixture(scope="module")
def model() -> LatentVideoModel:
    model = small_model()
    for parameter in model.network.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    return model


@pytest.fixture(scope="module")
def pairs(model: LatentVideoModel) -> Pairs:
    shapes = [ClipShape(13, 32, 32), ClipShape(1, 24, 16), ClipShape(5, 16, 24)]
    drawn = [draw_clips("curated", 1, seed=k, shape=shape) for k, shape in enumerate(shapes)]
    return encode_pairs(model, ClipSet(tuple(d.texts[0] for d in drawn), tuple(d.videos[0] for d in drawn)))


def fit_of(**changed: object) -> sft.Fit:
    return sft.Fit.model_validate({"iterations": 1, "lr": 1e-3, "text_dropout": 0.0, **changed})


def value_of(fit: sft.Fit, model: LatentVideoModel, pairs: Pairs, seed: int = 0) -> Tensor:
    (loss,) = pack_loss(fit, model, pairs, len(pairs), (range(len(pairs)), torch.Generator().manual_seed(seed)))
    return loss.value.detach()


@pytest.mark.parametrize("share", [1.0, 0.0])
def test_the_packed_loss_is_the_mean_of_each_clip_s_error_where_nothing_is_given(model: LatentVideoModel, pairs: Pairs, share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    torch.rand(3, generator=generator)  # which captions are dropped
    torch.multinomial(torch.tensor([share, 1 - share]), 3, replacement=True, generator=generator)  # which kind each clip gives
    shapes = [ClipShape(len(video), *video.shape[-2:]) for video in pairs.videos]
    given = [draw_given("head", shape, model.latents, PATCH, generator) if share else blank(shape).given for shape in shapes]
    t = stratified_logit_normal(model.path, 3, shift=3.0, generator=generator)
    lengths = pairs.num_tokens(PATCH)
    eps = torch.randn(sum(lengths), 32, generator=generator).split(lengths)
    errors = []
    for k, (x0, noise) in enumerate(zip(pairs.latents, eps, strict=True)):
        known = encode_known(model, [Canvas(pairs.videos[k].float() / 255, given[k])], PATCH)
        cond = replace(model.encode_text([pairs.texts[k]]), known=known)
        e = unpatchify(noise[None], 8, token_grid(x0.shape, PATCH), PATCH)
        at = t[k : k + 1]
        u = model(add_noise(model.path, x0[None], e, at), at, cond)
        errors.append(clip_error(u, model.path.velocity(x0[None], e, at), keep=~known.mask[:, None]))
    assert torch.allclose(value_of(fit_of(conditions={"head": share}), model, pairs), torch.cat(errors).mean().detach(), atol=1e-6)


def test_tokens_may_be_dropped_beside_what_is_given_and_a_clip_that_keeps_nothing_else_teaches_nothing(model: LatentVideoModel, pairs: Pairs) -> None:
    values = [value_of(fit_of(conditions={"image": 0.5, "hole": 0.5}, token_drop=1.0), model, pairs, seed) for seed in range(20)]
    assert all(bool(value.isfinite()) for value in values) and len(set(map(float, values))) == 20


def test_given_tokens_may_be_noisy_and_the_network_is_told_how_noisy(model: LatentVideoModel, pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[Tensor, Tensor]] = []
    forward = model.network.forward
    monkeypatch.setattr(model.network, "forward", lambda x, p, s, t, *text: heard.append((x, t)) or forward(x, p, s, t, *text))
    for level in (0.0, 0.3):
        value_of(fit_of(conditions={"image": 1.0}, condition_noise=level), model, pairs)
    (clean, at_zero), (noisy, at_level) = heard
    first = grid_positions((4, 4, 4))[:, 0] == 0  # the first latent frame of the first clip
    assert not at_zero[: len(first)][first].any() and 0 < at_level[0] < 0.3
    assert len(at_level[: len(first)][first].unique()) == 1 and torch.equal(at_zero[: len(first)][~first], at_level[: len(first)][~first])
    moved = (noisy - clean)[: len(first)][first]
    assert 0.3 * at_level[0] < moved.std() < 3 * at_level[0]


def test_shares_of_more_than_everything_and_unknown_kinds_are_refused() -> None:
    for conditions, message in (({"image": 0.7, "tail": 0.5}, "add up to 1.2"), ({"frames": 0.1}, "image")):
        with pytest.raises((UserError, ValueError), match=message):
            fit_of(conditions=conditions)


def test_a_run_that_learned_visual_prompts_says_so_in_its_card(tmp_path: Path) -> None:
    fit = {"iterations": 2, "lr": 1e-3, "capacity": 256, "held_out": 2, "conditions": {"image": 0.5, "ends": 0.25}}
    base = save_small_network(tmp_path / "base.safetensors")
    sft.main(sft.Config.model_validate({"out": tmp_path / "run", "model": base, "clips": 8, "fit": fit}))
    command = json.loads((tmp_path / "run" / "network.json").read_text())["command"]
    assert "--fit.conditions.image 0.5 --fit.conditions.ends 0.25" in command or "--fit.conditions.ends 0.25 --fit.conditions.image 0.5" in command
    assert load(sft.Config, None, ["--fit.conditions.image", "0.5", "--fit.iterations", "2"]).fit.conditions == {"image": 0.5}


def test_learning_to_go_on_from_a_frame_brings_the_rest_of_the_clip_nearer_to_it() -> None:
    """The colour of the background is not in the caption: only who reads the given frame can know it."""
    model = small_model()
    clips = draw_clips("curated", 48, seed=0, shape=ClipShape(5, 16, 16))
    pairs = encode_pairs(model, clips)
    fit = fit_of(conditions={"image": 0.9}, time_shift=3.0)
    optimizer = torch.optim.AdamW(model.network.parameters(), lr=4e-3)

    def distance(*, given: bool) -> float:
        """Of the later frames' latents from the clip's own, made from its first frame or from the text alone."""
        x0 = torch.stack(pairs.latents)  # [48,C,F,H,W]
        mask = torch.zeros(len(x0), *x0.shape[2:], dtype=torch.bool)
        mask[:, 0] = given
        cond = replace(model.encode_text(list(pairs.texts)), known=Known(x0, mask))
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
        made = rollout(model, ODE(), noise, sampling_times(model.path, 4, shift=3.0), cond, noise=torch.Generator()).x0
        return float((made - x0)[:, :, 1:].square().mean())

    before = distance(given=True)
    for i in range(120):
        (loss,) = pack_loss(fit, model, pairs, len(pairs), (range(len(pairs)), torch.Generator().manual_seed(i)))
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()
    after = distance(given=True)
    assert after < 0.5 * before and after < 0.7 * distance(given=False)

"""The error of a pack in SFT: one noise level and one mean a clip, and with token dropping a mean over the kept tokens only."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from align.objectives import Loss
from base_model.networks.packing import Segments, grid_positions, kept_tokens, patchify, token_grid
from base_model.paths import add_noise
from base_model.times import stratified_logit_normal
from base_model.tiny import LatentVideoModel
from recipes.fit import Fit, pack_loss
from recipes.pairs import Pairs
from tests.recipes.small import small_model

ROWS = (2, 0, 3)


def some_pairs(model: LatentVideoModel) -> Pairs:
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 2, 4, 4), (8, 2, 4, 4), (8, 1, 6, 4), (8, 3, 8, 4)]
    return Pairs(("a red circle", "a blue bar", "a green bar grows", "a red bar"), tuple(torch.randn(shape, generator=generator) for shape in shapes), (), model.encode_text)


def loss_of(fit: Fit, model: LatentVideoModel, clips: int = 3) -> Loss:
    (loss,) = pack_loss(fit, model, some_pairs(model), clips, (ROWS, torch.Generator().manual_seed(5)))
    return loss


def by_hand(model: LatentVideoModel, token_drop: float, *, text_dropout: float = 0.1) -> Tensor:
    """The same loss, clip by clip; the generator gives captions, then rates and kept tokens if any are dropped, then times and noise."""
    pairs, generator, patch = some_pairs(model), torch.Generator().manual_seed(5), model.config.patch
    tokens = [patchify(pairs.latents[j][None], patch)[0] for j in ROWS]  # [n,c] each
    positions = [grid_positions(token_grid(pairs.latents[j].shape, patch)) for j in ROWS]
    mute = (torch.rand(len(ROWS), generator=generator) < text_dropout).tolist()
    if token_drop:
        segments = Segments(tuple(map(len, tokens)))
        kept = kept_tokens(segments, token_drop * torch.rand(len(ROWS), generator=generator), generator)
        of_clip = [kept[segments.ids[kept] == k] - segments.offsets[k] for k in range(len(ROWS))]
        tokens, positions = ([part[chosen] for part, chosen in zip(parts, of_clip, strict=True)] for parts in (tokens, positions))
    t = stratified_logit_normal(model.path, len(ROWS), shift=Fit(iterations=1, lr=1).time_shift, generator=generator)
    eps = torch.randn(sum(map(len, tokens)), tokens[0].shape[1], generator=generator).split([len(part) for part in tokens])
    errors = []
    for k, j in enumerate(ROWS):
        cond = model.encode_text(["" if mute[k] else pairs.texts[j]])
        x_t = add_noise(model.path, tokens[k], eps[k], t[k].expand(len(tokens[k])))
        text = cond.text[cond.mask]
        u = model.network(x_t, positions[k], Segments((len(x_t),)), t[k : k + 1], text, Segments((len(text),)))
        errors.append((u - (eps[k] - tokens[k])).square().mean())
    return torch.stack(errors).mean()


def test_nothing_is_dropped_unless_asked_for_and_then_no_random_number_is_drawn() -> None:
    model = small_model()
    assert Fit(iterations=1, lr=1).token_drop == 0
    loss = loss_of(Fit(iterations=1, lr=1), model)
    assert torch.equal(loss.value, loss_of(Fit(iterations=1, lr=1, token_drop=0), model).value)
    assert float(loss.value.detach()) == pytest.approx(float(by_hand(model, 0).detach()), abs=1e-6)


@pytest.mark.parametrize("token_drop", [0.5, 1.0])
def test_the_loss_is_a_mean_over_kept_tokens_of_each_clip_and_then_over_clips(token_drop: float) -> None:
    model = small_model()
    fit, parameters = Fit(iterations=1, lr=1, token_drop=token_drop), list(model.network.parameters())
    loss, want = loss_of(fit, model), by_hand(model, token_drop)
    assert float(loss.value.detach()) == pytest.approx(float(want.detach()), abs=1e-6) and abs(float(loss.value.detach()) - float(by_hand(model, 0).detach())) > 1e-3
    for a, b in zip(torch.autograd.grad(loss.value, parameters), torch.autograd.grad(want, parameters), strict=True):
        assert (a - b).abs().max() <= 1e-5 * (1 + b.abs().max())
    assert float(loss_of(fit, model, clips=6).value.detach()) == pytest.approx(float(want.detach()) / 2, abs=1e-6), "its share of a step of six clips"

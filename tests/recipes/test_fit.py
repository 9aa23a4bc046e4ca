"""The error of a micro-batch of clips of any sizes: by hand, clip by clip, for every way a network is asked; and what counts the same in a step."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from align.objectives import Loss
from base_model.families.loading import load_family
from base_model.paths import add_noise
from base_model.times import log_ratio, stratified_logit_normal
from base_model.types import Conditioning
from recipes.examples import Ahead, Velocities, num_tokens
from recipes.fit import Fit, clips_loss, shifts, whole_of
from recipes.models import built_in
from recipes.pairs import Pairs
from tests.base_model.families import tiny_cogvideox, tiny_hunyuan_video, tiny_ltx, tiny_wan
from tests.recipes.small import small_model

PROMPTS = ("a red circle", "a blue ball", "the blue ball rolls to the left", "a red cube")
ROWS = (2, 0, 3, 1)
Grid = tuple[int, int, int]
SIZES: dict[str, tuple[Callable[[], Any] | None, list[Grid]]] = {  # latent frames, rows, columns; the first two alike
    "built-in": (None, [(2, 4, 4), (2, 4, 4), (1, 6, 4), (3, 8, 4)]),
    "wan": (tiny_wan.text_to_video, [(2, 4, 4), (2, 4, 4), (1, 2, 4), (3, 4, 2)]),
    "wan-a14b": (tiny_wan.a14b, [(2, 4, 4), (2, 4, 4), (1, 2, 4), (3, 4, 2)]),
    "ltx": (tiny_ltx.tiny_pipeline, [(2, 2, 2), (2, 2, 2), (1, 2, 3), (3, 1, 2)]),
    "cogvideox": (lambda: tiny_cogvideox.tiny_pipeline("5b"), [(2, 2, 2), (2, 2, 2), (1, 4, 2), (3, 2, 4)]),
    "hunyuan-video": (tiny_hunyuan_video.tiny_pipeline, [(2, 2, 2), (2, 2, 2), (1, 4, 2), (3, 2, 4)]),
}


@pytest.fixture(scope="module", params=SIZES)
def asked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Velocities, Pairs]:
    """A model that all weights train of, and four clips for it."""
    make, sizes = SIZES[request.param]
    if make is None:
        model: Any = small_model()
    else:
        folder = tmp_path_factory.mktemp(request.param)
        make().save_pretrained(folder)
        model = load_family(str(folder), device=torch.device("cpu"), dtype=torch.float32)
    model.network.requires_grad_(True)
    return Velocities(model), examples_of(model, sizes)


def examples_of(model: Any, sizes: list[Grid]) -> Pairs:
    generator = torch.Generator().manual_seed(0)
    spec = model.latents
    latents = tuple(torch.randn(spec.channels, *size, generator=generator) for size in sizes)
    pixels = [(1 + (f - 1) * spec.time_stride, 3, h * spec.space_stride, w * spec.space_stride) for f, h, w in sizes]
    return Pairs(PROMPTS, latents, tuple(torch.randint(0, 256, size, generator=generator, dtype=torch.uint8) for size in pixels), model.encode_text)


def fit_of(**changed: Any) -> Fit:
    return Fit.model_validate({"iterations": 1, "lr": 1e-3, "text_dropout": 0.5, **changed})


def loss_of(fit: Fit, velocities: Velocities, examples: Any, rows: tuple[int, ...] = ROWS, whole: float = 4.0, seed: int = 5) -> Loss:
    (loss,) = clips_loss(fit, velocities, examples, whole, (rows, torch.Generator().manual_seed(seed)))
    return loss


def by_hand(fit: Fit, model: Any, examples: Pairs, shift: Tensor) -> Tensor:
    """The error of every clip, asked about by itself, [S]."""
    generator = torch.Generator().manual_seed(5)
    mute = (torch.rand(len(ROWS), generator=generator) < fit.text_dropout).tolist()
    t = stratified_logit_normal(model.path, len(ROWS), shift=shift, generator=generator)  # [S]
    errors = []
    for k, row in enumerate(ROWS):
        x0 = examples.latents[row][None]  # [1,C,F,H,W]
        eps = torch.randn(x0.shape, generator=generator)
        u = model(add_noise(model.path, x0, eps, t[k : k + 1]), t[k : k + 1], model.encode_text(["" if mute[k] else PROMPTS[row]]))
        errors.append((u - model.path.velocity(x0, eps, t[k : k + 1])).square().mean())
    assert any(mute) and not all(mute)
    return torch.stack(errors)


@pytest.mark.parametrize("reduction", ["clip", "token"])
def test_the_loss_is_that_of_each_clip_by_itself(reduction: str, asked: tuple[Velocities, Pairs]) -> None:
    velocities, examples = asked
    fit, model = fit_of(reduction=reduction), velocities.model
    lengths = [num_tokens(examples.shapes[row], model.patch) for row in ROWS]
    loss = loss_of(fit, velocities, examples, whole=whole_of(fit, lengths))
    weight = torch.tensor(lengths, dtype=torch.float32) if reduction == "token" else torch.ones(4)
    want = (weight / weight.sum() * by_hand(fit, model, examples, torch.full((4,), 3.0, dtype=torch.float64))).sum()
    assert float(loss.value.detach()) == pytest.approx(float(want.detach()), rel=1e-5)
    parameters = [parameter for parameter in model.network.parameters() if parameter.requires_grad]
    ours, theirs = (torch.autograd.grad(value, parameters, allow_unused=True) for value in (loss.value, want))
    whole = torch.cat([gradient.flatten() for gradient in theirs if gradient is not None]).norm()
    for mine, other in zip(ours, theirs, strict=True):
        if other is not None:
            assert mine is not None and (mine - other).norm() <= 1e-5 * whole, "of the whole gradient: a toy hardly looks at its text, and what is left of that is rounding"


def test_longer_clips_are_shown_more_noise_where_a_shift_is_for_so_many_tokens(asked: tuple[Velocities, Pairs]) -> None:
    velocities, examples = asked
    lengths = [num_tokens(examples.shapes[row], velocities.model.patch) for row in ROWS]
    fit = fit_of(shift_tokens=lengths[0], time_shift=2.0)
    expected = torch.tensor([2.0 * (n / lengths[0]) ** 0.5 for n in lengths], dtype=torch.float64)
    torch.testing.assert_close(shifts(fit, lengths), expected)
    want = by_hand(fit, velocities.model, examples, expected).mean()
    assert float(loss_of(fit, velocities, examples).value.detach()) == pytest.approx(float(want.detach()), rel=1e-5)
    assert shifts(fit_of(), lengths).tolist() == [3.0] * 4


def test_parts_of_a_step_add_up_to_a_mean_over_all_its_clips(asked: tuple[Velocities, Pairs]) -> None:
    velocities, examples = asked
    whole = loss_of(fit_of(), velocities, examples, rows=(0, 1), whole=4).value + loss_of(fit_of(), velocities, examples, rows=(2, 3), whole=4, seed=6).value
    alone = loss_of(fit_of(), velocities, examples, rows=(0, 1), whole=2).value + loss_of(fit_of(), velocities, examples, rows=(2, 3), whole=2, seed=6).value
    assert float(whole.detach()) == pytest.approx(float(alone.detach()) / 2, rel=1e-6)


@pytest.mark.parametrize("kind", ["wan", "wan-5b", "image"])
def test_what_a_clip_gives_of_itself_is_told_and_has_no_part_in_the_loss(kind: str, tmp_path: Path) -> None:
    make = {"wan": tiny_wan.text_to_video, "wan-5b": lambda: tiny_wan.ti2v(image=False), "image": tiny_wan.image_to_video}[kind]
    make().save_pretrained(tmp_path)
    model = load_family(str(tmp_path), device=torch.device("cpu"), dtype=torch.float32)
    velocities, examples = Velocities(model), examples_of(model, [(2, 4, 4), (2, 4, 4), (2, 2, 4), (3, 4, 2)])
    given = fit_of(conditions={"image": 1.0}, text_dropout=0.0)
    told: list[Conditioning] = []

    class Spy(Velocities):
        def __call__(self, x_t: Any, t: Tensor, conds: Any) -> list[Tensor]:
            told.extend(conds)
            return super().__call__(x_t, t, conds)

    loss = float(loss_of(given, Spy(model), examples).value)
    assert all(cond.known is not None and bool(cond.known.mask[:, 0].all()) and not bool(cond.known.mask[:, 1:].any()) for cond in told)
    changed = Pairs(examples.texts, tuple(torch.cat([x[:, :1] + 5, x[:, 1:]], dim=1) for x in examples.latents), examples.videos, examples.encode_text)
    same = float(loss_of(given, velocities, changed).value) == pytest.approx(loss, rel=1e-5)
    assert same == (kind != "image"), "the first frame's own latents are neither asked about nor looked at, unless the model makes it again"
    later = Pairs(examples.texts, tuple(torch.cat([x[:, :1], x[:, 1:] + 5], dim=1) for x in examples.latents), examples.videos, examples.encode_text)
    assert abs(float(loss_of(given, velocities, later).value) - loss) > 0.1 * loss


def test_a_time_is_shown_as_often_as_its_density_says() -> None:
    """The logit of a time less log(shift) is standard normal, whatever the clip's length."""
    fit, lengths = fit_of(shift_tokens=100, time_shift=2.0), [25, 100, 400, 1600] * 500
    path = built_in(small_model(), "this").path
    t = stratified_logit_normal(path, len(lengths), shift=shifts(fit, lengths), generator=torch.Generator().manual_seed(0))
    z = (log_ratio(path, t) - shifts(fit, lengths).log()).sort().values
    expected = torch.special.ndtri((torch.arange(len(z), dtype=torch.float64) + 0.5) / len(z))
    assert (z - expected)[20:-20].abs().max() < 0.05


def test_what_is_read_ahead_is_what_would_have_been_read(asked: tuple[Velocities, Pairs]) -> None:
    velocities, examples = asked
    ahead, names = Ahead(examples), []

    class Watched(Pairs):
        def latent(self, row: int) -> Tensor:
            names.append(threading.current_thread().name)
            return super().latent(row)

    ahead = Ahead(Watched(examples.texts, examples.latents, examples.videos, examples.encode_text))
    ahead.begin(ROWS)
    assert float(loss_of(fit_of(), velocities, ahead).value.detach()) == float(loss_of(fit_of(), velocities, examples).value.detach())
    assert len(names) == len(ROWS) and all(name.startswith("reader") for name in names)
    ahead.begin((2,))
    assert torch.equal(ahead.latent(1), examples.latents[1]) and len(names) == len(ROWS) + 1, "one that was not announced is read all the same"
    assert (len(ahead), ahead.texts, ahead.shapes, ahead.sources) == (4, examples.texts, examples.shapes, examples.sources) and ahead.waited > 0

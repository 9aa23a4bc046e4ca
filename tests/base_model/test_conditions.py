"""Visual prompts: what is given survives to the bit, what is not given leaks nowhere, and the drawn masks are those of their kinds."""

import pytest
import torch
from torch import Tensor

from align.kernels import ODE, Ancestral
from align.trajectory import rollout, transition
from base_model.guidance import Guided
from base_model.networks.dit import DiTConfig
from base_model.networks.packing import token_grid
from base_model.networks.vae import VAEConfig
from base_model.paths import RectifiedFlow, VariancePreserving, add_noise, velocity_towards
from base_model.prompts.conditions import KINDS, Canvas, Kind, blank, draw_given, encode_known, fill, give_frames, known_mask, token_mask
from base_model.times import sampling_times
from base_model.tiny import LatentVideoModel, build_tiny
from base_model.types import ClipShape, Conditioning, Known, LatentSpec

SPEC, PATCH = LatentSpec(8, 4, 4), (1, 2, 2)
CLIP = ClipShape(13, 32, 24)


@pytest.fixture(scope="module")
def model() -> LatentVideoModel:
    torch.manual_seed(0)
    model = build_tiny(DiTConfig(width=32, depth=2, heads=2, rotary_axes=(4, 6, 6)), VAEConfig(width=16))
    for parameter in model.network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def told(model: LatentVideoModel, canvas: Canvas, clips: int = 2) -> tuple[Conditioning, Known]:
    cond, known = model.encode_text(["a red circle moves left"] * clips), encode_known(model, [canvas] * clips, PATCH)
    return Conditioning(cond.prompts, cond.text, cond.mask, known=known), known


def noise_for(clip: ClipShape, clips: int = 2) -> Tensor:
    return torch.randn(clips, *SPEC.shape(clip), generator=torch.Generator().manual_seed(1))


def brute_force_mask(given: Tensor) -> Tensor:
    """Latents [F,H,W] whose whole patch of the network is given, place by place."""
    frames, height, width = 1 + (len(given) - 1) // 4, given.shape[1] // 4, given.shape[2] // 4
    out = torch.zeros(frames, height, width, dtype=torch.bool)
    for f in range(frames):
        span = slice(0, 1) if f == 0 else slice(4 * f - 3, 4 * f + 1)
        for y in range(height):
            for x in range(width):
                top, left = y // 2 * 8, x // 2 * 8
                out[f, y, x] = bool(given[span, top : top + 8, left : left + 8].all())
    return out


def test_a_latent_is_known_where_all_pixels_of_its_token_are_given() -> None:
    given = torch.rand(13, 32, 24, generator=torch.Generator().manual_seed(0)) < 0.999
    mask = known_mask(given[None], SPEC, PATCH)[0]
    assert torch.equal(mask, brute_force_mask(given)) and 0 < mask.sum() < mask.numel()
    tokens = token_mask(mask[None], PATCH)
    assert tokens.shape == (1, 4 * 4 * 3) and int(tokens.sum()) * 4 == int(mask.sum())


@pytest.mark.parametrize("kernel", [ODE(), Ancestral(1.0)])
def test_what_is_given_is_what_comes_out_whatever_the_kernel(model: LatentVideoModel, kernel: ODE | Ancestral) -> None:
    video = torch.rand(13, 3, 32, 24, generator=torch.Generator().manual_seed(2))
    cond, known = told(model, give_frames(CLIP, {0: video[:5], 9: video[9:]}))
    x0 = rollout(model, kernel, noise_for(CLIP), sampling_times(model.path, 4), cond, noise=torch.Generator().manual_seed(3)).x0
    mask = known.mask[:, None].expand_as(x0)
    assert mask.float().mean() == 0.75 and (x0[mask] - known.values[mask]).abs().max() < 1e-5
    free = rollout(model, kernel, noise_for(CLIP), sampling_times(model.path, 4), model.encode_text(list(cond.prompts)), noise=torch.Generator().manual_seed(3)).x0
    assert (x0[~mask] - free[~mask]).abs().max() > 1e-2, "what is given has to be heard by the rest"


def test_the_noise_of_given_places_reaches_nothing(model: LatentVideoModel) -> None:
    cond, known = told(model, give_frames(CLIP, {0: torch.rand(1, 3, 32, 24)}))
    x, t = noise_for(CLIP), torch.tensor([0.7, 0.4])
    mask = known.mask[:, None].expand_as(x)
    other = torch.where(mask, torch.randn(x.shape), x)
    u, v = model(x, t, cond), model(other, t, cond)
    assert torch.equal(u[~mask], v[~mask]) and not torch.equal(u[mask], v[mask])


def test_the_network_hears_noise_level_zero_at_given_tokens(model: LatentVideoModel, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Tensor] = []
    forward = model.network.forward
    monkeypatch.setattr(model.network, "forward", lambda tokens, positions, segments, t, *text: heard.append(t) or forward(tokens, positions, segments, t, *text))
    cond, _ = told(model, give_frames(CLIP, {0: torch.rand(5, 3, 32, 24)}))
    model(noise_for(CLIP), torch.tensor([0.7, 0.4]), cond)
    expected = torch.tensor([0.7, 0.4])[:, None].repeat(1, 48)
    expected[:, :24] = 0
    assert torch.equal(heard[0], expected.flatten())


def test_a_prompt_that_gives_nothing_is_no_visual_prompt(model: LatentVideoModel) -> None:
    x, t = noise_for(CLIP), torch.tensor([0.7, 0.4])
    cond, _ = told(model, blank(CLIP))
    assert torch.allclose(model(x, t, cond), model(x, t, model.encode_text(list(cond.prompts))), atol=1e-5)


def test_guidance_keeps_what_is_given_in_both_passes(model: LatentVideoModel) -> None:
    cond, known = told(model, give_frames(CLIP, {0: torch.rand(1, 3, 32, 24)}))
    x0 = rollout(Guided(model, 3.0), ODE(), noise_for(CLIP), sampling_times(model.path, 4), cond, noise=torch.Generator()).x0
    mask = known.mask[:, None].expand_as(x0)
    assert mask.float().mean() == 0.25 and (x0[mask] - known.values[mask]).abs().max() < 1e-4


def test_a_step_beside_given_latents_has_the_density_of_its_free_part(model: LatentVideoModel) -> None:
    cond, known = told(model, give_frames(CLIP, {0: torch.rand(1, 3, 32, 24)}))
    x = noise_for(CLIP)
    step = transition(model, Ancestral(1.0), x, torch.tensor(0.8), torch.tensor(0.6), cond)
    mask = known.mask[:, None].expand_as(x)
    eps = (x - 0.2 * known.values) / 0.8
    toward = Ancestral(1.0)(RectifiedFlow(), x, eps - known.values, torch.tensor([0.8, 0.8]), torch.tensor([0.6, 0.6]))
    assert mask.float().mean() == 0.25 and (step.mean[mask] - toward.mean[mask]).abs().max() < 1e-5


@pytest.mark.parametrize("path", [RectifiedFlow(), VariancePreserving()])
def test_the_velocity_towards_a_point_ends_in_it(path: RectifiedFlow | VariancePreserving) -> None:
    x0, eps, t = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64), torch.tensor([0.2, 0.6, 0.9], dtype=torch.float64)
    x_t = add_noise(path, x0, eps, t)
    assert torch.allclose(velocity_towards(path, x_t, x0, t), path.velocity(x0, eps, t), atol=1e-12)
    found, _ = path.split(x_t, velocity_towards(path, x_t, x0, t), t)
    assert torch.allclose(found, x0, atol=1e-12)


def test_nothing_of_what_is_to_be_made_reaches_what_is_given(model: LatentVideoModel) -> None:
    video = torch.rand(13, 3, 32, 24)
    given = torch.zeros(13, 32, 24, dtype=torch.bool)
    given[:5, :16] = True
    one, other = Canvas(video, given), Canvas(torch.where(given[:, None], video, torch.rand(13, 3, 32, 24)), given)
    a, b = (encode_known(model, [canvas], PATCH) for canvas in (one, other))
    assert torch.equal(a.values, b.values) and torch.equal(a.mask, b.mask) and a.mask.any()


def test_frames_that_give_nothing_repeat_their_neighbour_and_holes_take_the_mean_colour() -> None:
    video = torch.rand(9, 3, 16, 16)
    given = torch.zeros(9, 16, 16, dtype=torch.bool)
    given[3], given[6, :8] = True, True
    filled = fill(Canvas(video, given))
    assert torch.equal(filled[:6], video[3].expand(6, -1, -1, -1))
    assert torch.equal(filled[6, :, :8], video[6, :, :8])
    assert torch.allclose(filled[6, :, 8:], video[6, :, :8].mean((1, 2))[:, None, None].expand(-1, 8, 16), atol=1e-6)
    assert torch.equal(filled[7:], filled[6].expand(2, -1, -1, -1))
    assert torch.equal(fill(blank(ClipShape(5, 8, 8))), torch.full((5, 3, 8, 8), 0.5))


def free_frames(given: Tensor) -> list[int]:
    return (~given.flatten(1).all(1)).nonzero().flatten().tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_drawn_prompt_is_of_its_kind_and_leaves_something_to_make(kind: Kind) -> None:
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(60):
        given = draw_given(kind, CLIP, SPEC, PATCH, generator)
        mask = known_mask(given[None], SPEC, PATCH)
        assert 0 < mask.sum() < mask.numel()
        free = free_frames(given)
        seen.add(tuple(given.flatten(1).float().mean(1).tolist()))
        if kind in ("hole", "margin"):
            rows, columns = (~given if kind == "hole" else given)[0].nonzero().T
            box = torch.zeros(32, 24, dtype=torch.bool)
            box[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
            assert torch.equal(given, (~box if kind == "hole" else box).expand(13, -1, -1))
            assert not (rows.min() % 8 or (rows.max() + 1) % 8 or columns.min() % 8 or (columns.max() + 1) % 8)
            continue
        assert free == list(range(free[0], free[-1] + 1)), "what is to be made lies together"
        assert (free[0] == 0) == (kind == "tail") and (free[-1] < 12) == (kind in ("tail", "ends"))
        if kind == "image":
            assert free == list(range(1, 13))
    assert len(seen) == {"image": 1, "head": 3, "tail": 3, "ends": 3}.get(kind, len(seen)) and (kind == "image" or len(seen) > 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [ClipShape(1, 16, 16), ClipShape(5, 16, 24), ClipShape(25, 24, 16), ClipShape(1, 8, 8)])
def test_small_and_long_clips_have_prompts_of_every_kind(kind: Kind, shape: ClipShape) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        given = draw_given(kind, shape, SPEC, PATCH, generator)
        assert given.shape == (shape.frames, shape.height, shape.width) and not given.all()
        assert token_grid(known_mask(given[None], SPEC, PATCH).shape, PATCH)


def test_pieces_that_do_not_fit_are_refused() -> None:
    frames = torch.rand(5, 3, 32, 24)
    for pieces, message in (
        ({0: torch.rand(1, 3, 16, 24)}, "given frames are 16x24, the clip is 32x24"),
        ({10: frames}, "frames 10 to 14 do not fit a clip of 13"),
        ({0: frames, 4: frames}, "frames 4 to 8 do not fit"),
        ({-1: frames}, "do not fit"),
        ({0: torch.rand(13, 3, 32, 24)}, "leave none of 13 to make"),
    ):
        with pytest.raises(ValueError, match=message):
            give_frames(CLIP, pieces)


def test_rows_and_devices_of_a_visual_prompt_follow_its_text(model: LatentVideoModel) -> None:
    cond, _ = told(model, give_frames(CLIP, {0: torch.rand(1, 3, 32, 24)}), clips=3)
    values = torch.arange(3.0)[:, None, None, None, None].expand(3, *SPEC.shape(CLIP)).clone()
    cond = Conditioning(cond.prompts, cond.text, cond.mask, known=Known(values, torch.ones(3, 4, 8, 6, dtype=torch.bool)))
    picked = cond[[2, 0]].to(torch.device("cpu")).repeat(2)
    assert picked.known is not None and picked.known.values[:, 0, 0, 0, 0].tolist() == [2, 2, 0, 0] and picked.known.mask.shape == (4, 4, 8, 6)

"""How a denoiser is fitted to captioned clips: the settings, the error of one micro-batch, and the held-out error. Shared by recipes, no command.

Flow matching on the model's own path (Lipman et al. 2022, arXiv 2210.02747, eq. 14), one noise level a clip. The built-in network is asked token by token (`pack_loss`): tokens
can be left out, or skip the middle. A family is asked clip by clip (`clips_loss`), whatever its network is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from align.config import Config as BaseConfig
from align.config import Count, Positive, Share, Whole
from align.objectives import Loss
from align.objectives.regression import clip_error, flow_matching, packed_clip_error
from align.optimizers import OptimizerName
from base_model.networks.packing import kept_tokens, pack, take_tokens, token_grid
from base_model.networks.routing import choose_route, middle
from base_model.paths import add_noise
from base_model.prompts.conditions import Canvas, Kind, draw_given, encode_known, token_mask
from base_model.times import quantile_times, square_root_shift, stratified_logit_normal
from base_model.tiny import LatentVideoModel, packed_text
from base_model.types import ClipShape, Conditioning
from recipes.examples import Examples, Velocities, num_tokens, together
from recipes.models import with_canvases
from recipes.pairs import Pairs

Part = tuple[Sequence[int], torch.Generator]
"""A micro-batch: which examples, and the generator of their noise."""


class Fit(BaseConfig):
    """How a denoiser is fitted to captioned clips."""

    iterations: Count
    """Optimizer steps."""
    lr: Positive
    """Peak learning rate, warmed up, then a cosine."""
    capacity: Count = 2048
    """Latent tokens a pack may hold."""
    packs: Count = 2
    """Packs of a step: the batch size, said in tokens, is `packs` times `capacity`. On a CPU every core has a pack of its own."""
    optimizer: OptimizerName = "adamw"
    """`adamw`, `adamw8bit` (bitsandbytes), or `muon`: fewer steps from a fresh network."""
    text_dropout: Share = 0.1
    """Share of clips trained without their caption, so that guidance is possible."""
    conditions: dict[Kind, Share] = Field(default={})
    """Visual prompts to learn: kind (image, head, tail, ends, hole, margin) -> share of the clips that give that of themselves. The rest have their text alone."""
    condition_noise: Share = 0.0
    """What is given is noised to a level of its own, drawn up to this one and told: above 0, the model takes given frames less literally."""
    token_drop: Share = 0.0
    """Largest share of its tokens that a clip is trained without; each clip draws its own, uniform from 0. No loss there."""
    routed: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each clip's tokens that skip the middle blocks in training (TREAD); sampling uses all. 0 routes none."""
    time_shift: Positive = 3.0
    """Shift s of the training times: logit-normal(log s, 1); above 1 looks more at noise. Wan's authors train 480p with about 2 to 3, larger clips with more."""
    shift_tokens: Whole = 0
    """Tokens of a clip that this shift is for: one of n times as many has sqrt(n) times the shift, for it shows the same through as much more noise. 0: the same for all."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the averaged weights, which are what is saved."""
    reduction: Literal["clip", "token"] = "clip"
    """What counts the same in a step's loss: `clip`, so that every caption does, or `token`, so that long and large clips do more. Means over clips, or over their tokens, of the
    whole step, however it is cut into packs and shared by processes."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this norm."""
    held_out: Count = 128
    """Held-out clips for the held-out loss."""
    evaluate_every: Count = 50
    """Iterations between held-out losses."""
    save_every: Count = 50
    """Iterations between checkpoints."""

    @field_validator("conditions")
    @classmethod
    def _shares_fit_into_one(cls, conditions: dict[Kind, float]) -> dict[Kind, float]:
        if sum(conditions.values()) > 1 + 1e-9:
            raise ValueError(f"the shares add up to {sum(conditions.values()):g}, expected at most 1")
        return conditions


def packed_conditions(fit: Fit, model: LatentVideoModel, examples: Examples, rows: Sequence[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What the clips `rows` give of themselves, each a kind at random: (values of the given tokens [N,c], which tokens those are [N])."""
    kinds, shares = list(fit.conditions), torch.tensor([*fit.conditions.values(), max(0.0, 1 - sum(fit.conditions.values()))])
    drawn = torch.multinomial(shares, len(rows), replacement=True, generator=generator).tolist()
    values, given = [], []
    for j, kind in zip(rows, drawn, strict=True):
        latents, video = examples.latent(j), examples.video(j)
        if kind == len(kinds):
            values.append(torch.zeros_like(latents))
            given.append(torch.zeros(token_grid(latents.shape, model.config.patch), dtype=torch.bool).flatten())
            continue
        shape = ClipShape(len(video), *video.shape[-2:])
        canvas = Canvas(video.float() / 255, draw_given(kinds[kind], shape, model.latents, model.config.patch, generator))
        known = encode_known(model, [canvas], model.config.patch)
        values.append(known.values[0].cpu())
        given.append(token_mask(known.mask, model.config.patch)[0].cpu())
    return pack(values, model.config.patch).tokens, torch.cat(given)


def pack_loss(fit: Fit, model: LatentVideoModel, examples: Examples, whole: float, part: Part) -> Iterator[Loss]:
    """The error of a pack of S clips, as its share of a step that is `whole` (`whole_of`)."""
    rows, generator = part
    packed = pack([examples.latent(j) for j in rows], model.config.patch)  # tokens [N,c]
    lengths = packed.segments.lengths  # S
    dropped = torch.rand(len(rows), generator=generator) < fit.text_dropout  # [S]
    cond = together([examples.cond(None if drop else j) for j, drop in zip(rows, dropped.tolist(), strict=True)])  # as they are kept: beside others they round otherwise
    values, given = packed.tokens, torch.zeros(packed.segments.total, dtype=torch.bool)  # [N,c], [N]
    if fit.conditions:
        values, given = packed_conditions(fit, model, examples, rows, generator)
    if fit.token_drop:
        rates = fit.token_drop * torch.rand(len(rows), generator=generator)  # [S]
        kept = kept_tokens(packed.segments, rates, generator)  # [K]
        packed, values, given = take_tokens(packed, kept), values[kept], given[kept]  # N is K from here on
    t = stratified_logit_normal(model.path, len(rows), shift=shifts(fit, lengths), generator=generator)  # [S]
    t_token = packed.segments.spread(t)  # [N]
    eps = torch.randn(packed.tokens.shape, generator=generator)  # [N,c]
    x_t, target = add_noise(model.path, packed.tokens, eps, t_token), model.path.velocity(packed.tokens, eps, t_token)  # [N,c] each
    if fit.conditions:
        level = packed.segments.spread(model.path.t_max * fit.condition_noise * torch.rand(len(rows), generator=generator))  # [N]
        x_t = torch.where(given[:, None], add_noise(model.path, values, eps, level), x_t)
        t = torch.where(given, level, t_token)  # [N]
    device = model.device
    route = choose_route(packed.segments, [fit.routed] * len(rows), between=middle(model.config.depth), generator=generator) if fit.routed else None
    u = model.network(x_t.to(device), packed.positions.to(device), packed.segments, t.to(device), *packed_text(cond), route)  # [N,c]
    segment, learned = packed.segments.ids, packed.segments.mean((~given).float()) > 0  # [N], [S] a clip may have dropped all that is not given
    error = packed_clip_error(u, target.to(device), segment.to(device), len(rows), keep=~given.to(device))  # [S]
    loss = flow_matching(error, valid=learned.to(device))
    if fit.reduction == "token":
        yield Loss((torch.tensor(lengths, device=device) * error.where(learned.to(device), 0)).sum() / whole, loss.stats)
    else:
        yield Loss(loss.value * (float(learned.sum()) / whole), loss.stats)


def whole_of(fit: Fit, lengths: Sequence[int]) -> float:
    """What the errors of a step's clips, of so many tokens each, are divided by when they are added up."""
    return float(sum(lengths) if fit.reduction == "token" else len(lengths))


def shifts(fit: Fit, lengths: Sequence[int]) -> Tensor:
    """The shift of each clip's time, [S] float64, from its number of tokens."""
    if not fit.shift_tokens:
        return torch.full((len(lengths),), fit.time_shift, dtype=torch.float64)
    return square_root_shift(torch.tensor(lengths), reference_shift=fit.time_shift, reference_tokens=fit.shift_tokens)


def clips_loss(fit: Fit, velocities: Velocities, examples: Examples, whole: float, part: Part) -> Iterator[Loss]:
    """The error of a micro-batch of S clips of any sizes, as its share of a step that is `whole` (`whole_of`)."""
    rows, generator = part
    model, path = velocities.model, velocities.model.path
    lengths = [num_tokens(examples.shapes[row], model.patch) for row in rows]
    mute = (torch.rand(len(rows), generator=generator) < fit.text_dropout).tolist()  # S
    conds = [examples.cond(None if silent else row).to(model.device) for row, silent in zip(rows, mute, strict=True)]
    if fit.conditions:
        conds = [_given(fit, velocities, examples, row, cond, generator) for row, cond in zip(rows, conds, strict=True)]
    x0 = [examples.latent(row).to(model.device)[None] for row in rows]  # [1,C,F,H,W] each
    t = stratified_logit_normal(path, len(rows), shift=shifts(fit, lengths), generator=generator).to(model.device)  # [S]
    eps = [torch.randn(x.shape, generator=generator).to(model.device) for x in x0]
    x_t = [add_noise(path, *clip)[0] for clip in zip(x0, eps, t[:, None], strict=True)]
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        u = velocities(x_t, t, conds)  # [C,F,H,W] each
    targets = [path.velocity(*clip) for clip in zip(x0, eps, t[:, None], strict=True)]  # [1,C,F,H,W] each
    error = torch.cat([clip_error(one[None], target, keep=velocities.learned(cond)) for one, target, cond in zip(u, targets, conds, strict=True)])  # [S]
    weight = torch.tensor(lengths if fit.reduction == "token" else [1] * len(rows)).to(error)
    loss = flow_matching(error)
    yield Loss((weight * error).sum() / whole, loss.stats)


def _given(fit: Fit, velocities: Velocities, examples: Examples, row: int, cond: Conditioning, generator: torch.Generator) -> Conditioning:
    """The condition of a clip that gives what a kind drawn at random says of itself, or nothing."""
    kinds, shares = list(fit.conditions), torch.tensor([*fit.conditions.values(), max(0.0, 1 - sum(fit.conditions.values()))])
    drawn = int(torch.multinomial(shares, 1, generator=generator))
    if drawn == len(kinds):
        return cond
    video = examples.video(row).float() / 255  # [T,3,H,W]
    shape = ClipShape(len(video), *video.shape[-2:])
    given = draw_given(kinds[drawn], shape, velocities.model.latents, velocities.model.patch, generator)  # [T,H,W]
    return with_canvases(velocities.model, cond, [Canvas(video.to(cond.text.device), given.to(cond.text.device))])


@torch.no_grad()
def held_out_errors(model: LatentVideoModel, pairs: Pairs, generator: torch.Generator, *, quantiles: int = 8) -> Tensor:
    """Error of every clip at fixed noise quantiles, [quantiles,B], least noise first. Clips of one size only."""
    x0 = torch.stack([pairs.latent(row) for row in range(len(pairs))]).to(model.device)  # [B,C,F,H,W]
    eps = torch.randn(x0.shape, generator=generator).to(model.device)
    cond = model.encode_text(pairs.texts)
    errors = []
    for t in quantile_times(model.path, quantiles):
        times = t.expand(len(x0)).to(model.device)  # [B]
        u = model(add_noise(model.path, x0, eps, times), times, cond)
        errors.append(clip_error(u, model.path.velocity(x0, eps, times)))
    return torch.stack(errors)


def held_out_losses(model: LatentVideoModel, pairs: Pairs, generator: torch.Generator, *, quantiles: int = 8) -> Tensor:
    """Mean of `held_out_errors` over the clips, [quantiles]."""
    return torch.stack([errors.mean() for errors in held_out_errors(model, pairs, generator, quantiles=quantiles)])

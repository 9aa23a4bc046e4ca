"""Reward gradients: differentiate the reward of the finished clip through the decoder and the last steps of the sampler.

The shortest way up a reward, and to its flaws: nothing but the scorer's own gradient is asked. Which steps carry gradient is the whole difference between the methods:

    DRaFT-K     the last K steps              `last_steps`
    AlignProp   the last K, K at random       `last_steps` with `draw_last`
    ReFL        one random late step, whose x0 is then guessed at once      `single_step` with `draw_late`
    VADER       the last step, a few decoded frames                         `last_steps` with K = 1 and `some_frames`

Memory is that of the steps with gradient plus the decoder; with `checkpointed` (the default) it is one step's and the states between (Chen et al. 2016, arXiv 1604.06174), for one
more forward pass of each. Rewards are known here as a callable and whether it may be differentiated.
Letters: B clips, K steps, C F H W latent channels/frames/height/width, T frames.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import relu
from torch.utils.checkpoint import checkpoint

from align.kernels import ODE
from align.objectives import Loss, masked_mean
from align.trajectory import transition
from base_model.errors import UserError
from base_model.types import Conditioning, VideoModel

METRICS = {
    "reward_gradient/loss": "The negative mean reward, or its mean shortfall below the hinge.",
    "reward_gradient/reward": "Mean reward of the clips that were differentiated, known ones.",
    "reward_gradient/unknown_share": "Share of these clips whose reward is unknown (nan) and that were left out.",
}

Score = Callable[[Tensor, Sequence[str]], Tensor]  # video [B,T,3,H,W] in [0,1] and B prompts -> reward [B]


def last_steps(model: VideoModel, x: Tensor, times: Tensor, cond: Conditioning, num_steps: int, *, checkpointed: bool = True) -> Tensor:
    """Denoise x [B,C,F,H,W] along times [K+1] by the ODE, the last `num_steps` steps with gradient -> x0 [B,C,F,H,W].

    DRaFT-K (Clark et al. 2024, arXiv 2309.17400, section 4: DRaFT-1 is num_steps 1, DRaFT is all K). Known failure: a small num_steps teaches texture and colour, not
    what happens in the clip; a large one has exploding gradients: clip their norm. Raises ValueError where num_steps is not in 1..K, or times do not fall to 0.
    """
    times = _falling(times, x)
    first = len(times) - 1 - num_steps
    if num_steps < 1 or first < 0:
        raise ValueError(f"{num_steps} steps with gradient of {len(times) - 1}: give 1 to {len(times) - 1}")
    x = _without_gradient(model, x, times[: first + 1], cond)  # [B,C,F,H,W]
    for t, s in itertools.pairwise(times[first:]):
        x = _maybe_checkpointed(partial(_ode_step, model, t=t, s=s, cond=cond), x, checkpointed)  # [B,C,F,H,W]
    return x


def single_step(model: VideoModel, x: Tensor, times: Tensor, cond: Conditioning, step: int, *, checkpointed: bool = True) -> Tensor:
    """Denoise x [B,C,F,H,W] to times[step] without gradient, then guess x0 from there at once, with gradient -> [B,C,F,H,W].

    ReFL (Xu et al. 2023, arXiv 2304.05977, algorithm 1), with the velocity's own x0. Known failure: at an early step the guess is a blur, which scorers were not made
    for; draw late steps (`draw_late`). Raises ValueError where step is not in 0..K-1, or times do not fall to 0.
    """
    times = _falling(times, x)
    if not 0 <= step < len(times) - 1:
        raise ValueError(f"step {step} of {len(times) - 1}: give 0 to {len(times) - 2}")
    x, t = _without_gradient(model, x, times[: step + 1], cond), times[step].expand(len(x))
    return _maybe_checkpointed(lambda x: model.path.split(x, model(x, t, cond), t)[0], x, checkpointed)


def _falling(times: Tensor, x: Tensor) -> Tensor:
    if not bool((times[1:] < times[:-1]).all()) or bool(times[-1]):
        raise ValueError("times must decrease strictly and end at 0")
    return times.to(x.device)


@torch.no_grad()
def _without_gradient(model: VideoModel, x: Tensor, times: Tensor, cond: Conditioning) -> Tensor:
    for t, s in itertools.pairwise(times):
        x = _ode_step(model, x, t, s, cond)
    return x


def _ode_step(model: VideoModel, x: Tensor, t: Tensor, s: Tensor, cond: Conditioning) -> Tensor:
    return transition(model, ODE(), x, t, s, cond).mean


def _maybe_checkpointed(step: Callable[[Tensor], Tensor], x: Tensor, checkpointed: bool) -> Tensor:
    return checkpoint(step, x, use_reentrant=False) if checkpointed else step(x)


def draw_last(num_steps: int, generator: torch.Generator, *, least: int = 1) -> int:
    """AlignProp's randomised truncation: how many last steps carry gradient, uniform in least..num_steps (Prabhudesai et al. 2023, arXiv 2310.03739)."""
    return int(torch.randint(least, num_steps + 1, (), generator=generator))


def draw_late(num_steps: int, generator: torch.Generator, *, share: float = 0.25) -> int:
    """ReFL's late step (arXiv 2304.05977), uniform in the last `share` of the steps (30 to 39 of 40 there), at least the last one."""
    late = max(1, round(share * num_steps))
    return num_steps - 1 - int(torch.randint(late, (), generator=generator))


def some_frames(x0: Tensor, num_frames: int, generator: torch.Generator) -> Tensor:
    """`num_frames` consecutive latent frames of every clip, drawn at random: [B,C,F,H,W] -> [B,C,num_frames,H,W], to be decoded alone.

    VADER (Prabhudesai et al. 2024, arXiv 2407.08737), which decodes one frame: the decoder's memory no longer grows with the clip. Known failures: a reward of frames
    is blind to motion, and rises fastest where nothing moves; a causal decoder takes the first latent frame it is given for a clip's first. Raises ValueError
    where num_frames is not in 1..F.
    """
    frames = x0.shape[2]
    if not 1 <= num_frames <= frames:
        raise ValueError(f"{num_frames} latent frames of {frames}: give 1 to {frames}")
    start = int(torch.randint(frames - num_frames + 1, (), generator=generator))
    return x0[:, :, start : start + num_frames]


def check_differentiable(differentiable: bool, name: str) -> None:
    """Call it before the first step. Raises UserError where the scorer says that the gradient of its scores may not be used."""
    if not differentiable:
        raise UserError(f"the scorer {name} is not differentiable, so no reward gradient passes through it. Choose another one, or a recipe without reward gradients")


def reward_of(score: Score, model: VideoModel, x0: Tensor, cond: Conditioning, *, name: str, differentiable: bool, checkpointed: bool = True) -> Tensor:
    """Reward of finished latents [B,C,F,H,W] through decoder and scorer, with gradient -> [B]; `checkpointed` covers both.

    Raises UserError where the scorer may not be differentiated, or gives a reward without a gradient though it said it would.
    """
    check_differentiable(differentiable, name)
    reward = _maybe_checkpointed(lambda x0: score(model.decode(x0), cond.prompts), x0, checkpointed)  # [B]
    if x0.requires_grad and not reward.requires_grad:
        raise UserError(f"the scorer {name} says it is differentiable, but its reward carries no gradient. Compute it without no_grad, detach or numpy")
    return reward


def reward_ascent(reward: Tensor, *, hinge: float | None = None, valid: Tensor | None = None) -> Loss:
    """mean over known rewards [B] of -r, or of max(0, hinge - r): nothing more is asked of a clip that is good enough. Unit of the reward.

    -r: DRaFT (arXiv 2309.17400, eq. 1), AlignProp, VADER. The hinge: ReFL's phi (arXiv 2304.05977), with 2 there. Known failure: over-optimisation, sooner than by any other
    objective here; keep a KL term, a guard that is not optimised, and few steps. An unknown reward (nan) is masked and counted; the scorer must not make it by
    arithmetic on a nan, through which the gradient would be nan too.
    """
    known = reward.isfinite() if valid is None else reward.isfinite() & valid  # [B]
    loss = masked_mean(-reward if hinge is None else relu(hinge - reward), known)
    stats = {
        "reward_gradient/loss": loss,
        "reward_gradient/reward": masked_mean(reward, known),
        "reward_gradient/unknown_share": (~reward.isfinite()).to(reward).mean(),
    }
    return Loss(loss, {name: stat.detach() for name, stat in stats.items()})

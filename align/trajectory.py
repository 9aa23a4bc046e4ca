"""Sampling that can be replayed: rollout -> Trajectory -> Steps -> replay -> Gaussian.

`transition` is the one function behind sampling and replay. A step becomes a `Step` only if it was taken with noise, so nothing that has
no density can reach a policy gradient. The last step is always deterministic: noise there is noise in the picture (a target of std 0.02
comes out with std 0.23).

Clips of one prompt that start from the same noise are the same until their first noisy step, and so is its mean: they are computed once and branch off there.

Letters: N rows of first noise, G clips that branch off each, B = N G clips (those of a row side by side), K denoising steps, C F H W latent
channels/frames/height/width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from align.kernels import ODE, Gaussian, Kernel
from base_model.paths import Path, like
from base_model.types import Conditioning, VideoModel

Noise = Callable[[int], Tensor] | torch.Generator

NOTHING_NOISY = "no stochastic step to train on: every step was deterministic. Use a kernel with noise and at least one noisy step"


class Step(NamedTuple):
    """One noisy step of b of the B clips. `log_prob` was computed on x_next exactly as stored, so the first ratio is exactly 1.

    Clips that branch off one state share it: `x` holds each of the n <= b states once. `replay` reads a step.
    """

    x: Tensor  # [n,C,F,H,W]
    x_next: Tensor  # [b,C,F,H,W]
    t: Tensor  # [b]
    s: Tensor  # [b]
    log_prob: Tensor  # [b] nats per latent element
    rows: Tensor  # [b] which clips of the trajectory these are
    origin: Tensor  # [b] which state of x each clip comes from

    def select(self, index: Tensor | slice) -> Step:
        """Some of the clips, as a smaller step."""
        kept, origin = self.origin[index].unique(return_inverse=True)  # [n'] and [b']
        return Step(self.x[kept], self.x_next[index], self.t[index], self.s[index], self.log_prob[index], self.rows[index], origin)


def join_steps(steps: Sequence[Step]) -> Step:
    """Steps of one trajectory as a single one, clips one behind the other: `replay` answers it in one forward pass, in the memory of as many clips.

    Raises ValueError where there is none.
    """
    if not steps:
        raise ValueError("no step to join: give at least one")
    states = torch.tensor([0, *(len(step.x) for step in steps)]).cumsum(0).tolist()
    origin = torch.cat([step.origin + before for step, before in zip(steps, states, strict=False)])  # [sum of b]
    x, x_next, t, s, log_prob, rows, _ = (torch.cat(part) for part in zip(*steps, strict=True))
    return Step(x, x_next, t, s, log_prob, rows, origin)


@dataclass(frozen=True)
class Trajectory:
    """What a rollout leaves behind.

    Example: B = 4, K = 8, noise at step 2 only: `x` holds x[2], x[3] and x[8]; the rest is None; `log_prob` is nan but in row 2. Where the four clips branch off
    one row, x[2] is one state, `origin[2]` is [0, 0, 0, 0] and `origin[3]` is [0, 1, 2, 3].
    """

    x: tuple[Tensor | None, ...]  # K+1 times [m,C,F,H,W], m <= B states; only those beside a noisy step (in the storage dtype) and the finished latents (m = B)
    origin: Tensor  # [K+1,B] which state of x[k] each clip is in; increasing along B
    t: Tensor  # [K+1,B] from t_max to 0
    log_prob: Tensor  # [K,B] nats per latent element; nan where the step was deterministic
    noisy: Tensor  # [K,B] bool, which steps were taken with noise
    cond: Conditioning  # B

    @property
    def x0(self) -> Tensor:
        """Finished latents [B,C,F,H,W]."""
        assert self.x[-1] is not None
        return self.x[-1]

    @property
    def forward_passes(self) -> int:
        """Model evaluations this rollout took, states times steps (the second pass of guidance not counted)."""
        return int((self.origin[:-1, -1] + 1).sum())

    def steps(self) -> list[Step]:
        """The noisy steps, in the order they were taken. Raises ValueError where there is none."""
        found = [self._step(k, noisy.nonzero()[:, 0]) for k, noisy in enumerate(self.noisy) if bool(noisy.any())]
        if not found:
            raise ValueError(NOTHING_NOISY)
        return found

    def _step(self, k: int, rows: Tensor) -> Step:
        x, x_next = self.x[k], self.x[k + 1]
        assert x is not None and x_next is not None
        kept, origin = self.origin[k, rows].unique(return_inverse=True)  # [n] and [b]
        if len(rows) < len(self.cond):  # else both are whole
            x, x_next = x[kept], x_next[self.origin[k + 1, rows]]
        return Step(x, x_next, self.t[k, rows], self.t[k + 1, rows], self.log_prob[k, rows], rows, origin)


@dataclass(frozen=True)
class _Partly:
    """`kernel` for the clips in `noisy` [B], the ODE for the others."""

    kernel: Kernel
    noisy: Tensor

    def __call__(self, path: Path, x_t: Tensor, u: Tensor, t: Tensor, s: Tensor) -> Gaussian:
        if not self.noisy.any():
            return ODE()(path, x_t, u, t, s)
        step = self.kernel(path, x_t, u, t, s)
        if self.noisy.all():
            return step
        here = like(self.noisy, x_t)  # [B,1,1,1,1]
        return Gaussian(torch.where(here, step.mean, ODE()(path, x_t, u, t, s).mean), torch.where(here, step.std, torch.zeros_like(step.std)))


def transition(model: VideoModel, kernel: Kernel, x: Tensor, t: Tensor, s: Tensor, cond: Conditioning) -> Gaussian:
    """Distribution of x_s given x [B,C,F,H,W] at t; t, s [B] or []. Used to sample (without gradient) and to replay (with gradient).

    Under guidance `model` is `Guided(model, scale)`, in both.
    """
    t, s = t.expand(len(x)), s.expand(len(x))  # [B]
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return kernel(model.path, x, model(x, t, cond), t, s)


def replay(model: VideoModel, kernel: Kernel, step: Step, cond: Conditioning) -> Gaussian:
    """Distribution of `step.x_next` [b,C,F,H,W] by the present model; cond: the trajectory's, B. One model evaluation a state, not a clip."""
    clip = torch.empty(len(step.x), dtype=torch.long, device=step.rows.device)  # [n] a clip that comes from each state
    clip[step.origin] = torch.arange(len(step.rows), device=clip.device)
    states = transition(model, kernel, step.x, step.t[clip], step.s[clip], cond[step.rows[clip]])  # n
    return states[step.origin]


@torch.no_grad()
def rollout(
    model: VideoModel,
    kernel: Kernel,
    x: Tensor,
    times: Tensor,
    cond: Conditioning,
    *,
    noise: Noise,
    stochastic: Tensor | Iterable[int] | None = None,
    branches: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Trajectory:
    """Denoise x [N,C,F,H,W] from times[0] to times[K] = 0. Returns what replay needs.

    times: [K+1], or [K+1,N] for one grid per row; strictly decreasing to 0. cond: N.
    noise: a generator, or a function of the step k that gives standard normal [B,C,F,H,W]; asked for noisy steps only.
    stochastic: which steps take noise: bool [K], bool [K,N] (one choice per row) or step numbers; default all but the last. The last step never may.
    branches: G, clips that branch off each row at its first noisy step, and are equal up to there: with its noise at step k alone a clip costs
    (k + 1) / G + K - k - 1 model evaluations (TempFlow-GRPO's trajectory branching, arXiv 2508.04324; one depth of BranchGRPO's tree,
    arXiv 2509.06040). The clips are those that N G rows with every first noise G times would give.
    dtype: what kept states are rounded to, BEFORE their log-probability is taken.
    Raises ValueError where the grid is not decreasing to 0, the last step is asked to be noisy or branches is not positive.
    """
    if branches < 1:
        raise ValueError(f"branches must be at least 1, got {branches}")
    times = times.reshape(len(times), -1).expand(-1, len(x)).to(x.device)  # [K+1,N]
    if not bool((times[1:] < times[:-1]).all()) or bool(times[-1].any()):
        raise ValueError("times must decrease strictly and end at 0")
    noisy = _noisy_steps(stochastic, len(times) - 1, len(x), x.device)  # [K,N]
    times, noisy, cond = times.repeat_interleave(branches, 1), noisy.repeat_interleave(branches, 1), cond.repeat(branches) if branches > 1 else cond  # B each
    beside = torch.cat([noisy.any(1), torch.tensor([False], device=x.device)])  # [K+1]
    keep = (beside | beside.roll(1)).tolist()  # a state is kept where the step from it or to it is noisy
    wide = torch.promote_types(x.dtype, torch.float32)
    log_prob = torch.full(noisy.shape, torch.nan, dtype=wide, device=x.device)  # [K,B]
    taken = torch.zeros_like(noisy)  # [K,B]
    first = torch.arange(len(cond), device=x.device) % branches == 0  # [B] whether a clip is the first one in its state
    origin = torch.arange(len(cond), device=x.device).repeat(len(times), 1)  # [K+1,B]
    states: list[Tensor | None] = []
    for k in range(len(noisy)):
        x = x.to(dtype if keep[k] else wide)  # [m,C,F,H,W]
        states.append(x if keep[k] else None)
        origin[k] = first.cumsum(0) - 1
        clip = first.nonzero()[:, 0]  # [m] a clip in each state
        step = transition(model, _Partly(kernel, noisy[k, clip]), x, times[k, clip], times[k + 1, clip], cond if len(clip) == len(cond) else cond[clip])
        taken[k] = noisy[k] & (step.std.reshape(-1) > 0)[origin[k]]
        if taken[k].any():
            first = first | taken[k]  # clips that take noise part ways
            drawn = _draw(noise, k, (len(cond), *x.shape[1:]), step.mean)  # [B,C,F,H,W]
            step = step[origin[k, first]]  # m'
            x = step.sample(drawn[first]).to(dtype)  # [m',C,F,H,W] round first, then score
            log_prob[k] = torch.where(taken[k], step.log_prob(x)[first.cumsum(0) - 1], torch.nan)
        else:
            x = step.mean
    return Trajectory((*states, x[first.cumsum(0) - 1]), origin, times, log_prob, taken, cond)


@torch.no_grad()
def path_kl(policy: VideoModel, prior: VideoModel, kernel: Kernel, taken: Trajectory) -> Tensor:
    """KL of the policy's path from the prior's, [B], nats a clip: over the noisy steps of a trajectory that the policy took with `kernel`, the sum of each step's KL.

    Its mean over trajectories is the KL of the two distributions of paths, down to the noise that is left after the last noisy step, and so an upper bound on that of the
    clips with this noise left. With `Ancestral()` it is that KL itself as steps get finer, for two exact velocities: noise is added to clips of both in the same way
    (Song et al. 2021, arXiv 2101.09258, theorem 1). It grows as the noise left shrinks. A deterministic sampler has no such KL: this is that of its stochastic twin, which
    has the same velocity. Raises ValueError where no step took noise.
    """
    total = torch.zeros(len(taken.cond), dtype=taken.log_prob.dtype, device=taken.log_prob.device)  # [B]
    for step in taken.steps():
        now, before = (replay(model, kernel, step, taken.cond) for model in (policy, prior))
        total.index_add_(0, step.rows, now.kl_total(before))
    return total


def _draw(noise: Noise, k: int, shape: tuple[int, ...], mean: Tensor) -> Tensor:
    """Standard normal of a shape, in the type and on the device of `mean`: the same for every clip, however many have branched off."""
    drawn = torch.randn(shape, generator=noise, device=noise.device, dtype=mean.dtype) if isinstance(noise, torch.Generator) else noise(k)
    return drawn.to(mean)


def finish(model: VideoModel, trajectory: Trajectory) -> Tensor:
    """The finished latents once more, [B,C,F,H,W], with the gradient of the deterministic steps behind the last noisy one.

    That is the pathwise term, what the log-probabilities leave out: they say how the parameters move the noisy steps. With noise in all steps but the last the gradient of
    `log_prob * reward` plus that of reward(finish(...)) is the whole gradient of the expected reward; it needs a reward that can be differentiated.
    Steps before the first noisy one stay out. Raises ValueError where no step was noisy.
    """
    if not bool(trajectory.noisy.any()):
        raise ValueError(NOTHING_NOISY)
    begin = int(trajectory.noisy.any(1).nonzero()[-1]) + 1
    kept = trajectory.x[begin]
    assert kept is not None
    x = kept[trajectory.origin[begin]]  # [B,C,F,H,W]
    for t, s in zip(trajectory.t[begin:-1], trajectory.t[begin + 1 :], strict=True):
        x = transition(model, ODE(), x, t, s, trajectory.cond).mean
    return x


def _noisy_steps(stochastic: Tensor | Iterable[int] | None, num_steps: int, num_rows: int, device: torch.device) -> Tensor:
    """-> bool [K,N]."""
    if isinstance(stochastic, Tensor) and stochastic.dtype == torch.bool:
        noisy = stochastic.to(device).reshape(len(stochastic), -1)
    else:
        noisy = torch.zeros(num_steps, 1, dtype=torch.bool, device=device)
        noisy[[int(k) for k in (range(num_steps - 1) if stochastic is None else stochastic)]] = True
    if len(noisy) != num_steps or noisy.shape[1] not in (1, num_rows):
        raise ValueError(f"stochastic must be [{num_steps}] or [{num_steps}, {num_rows}], got {list(noisy.shape)}")
    if bool(noisy[-1].any()):
        raise ValueError("the last step is always deterministic: leave it out of `stochastic`")
    return noisy.expand(-1, num_rows)  # [K,N]

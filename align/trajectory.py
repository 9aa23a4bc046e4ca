"""Sampling that can be replayed: rollout -> Trajectory -> Steps -> transition -> Gaussian.

`transition` is the one function behind sampling and replay. A step becomes a `Step` only if it was taken with noise, so nothing that has
no density can reach a policy gradient. The last step is always deterministic: noise there is noise in the picture (a target of std 0.02
comes out with std 0.23).

Letters: B clips, K denoising steps, C F H W latent channels/frames/height/width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from align.kernels import ODE, Gaussian, Kernel
from base_model.paths import Path, like
from base_model.types import Conditioning, VideoModel

Noise = Callable[[int], Tensor] | torch.Generator


class Step(NamedTuple):
    """One noisy step of b of the B clips. `log_prob` was computed on x_next exactly as stored, so the first ratio is exactly 1."""

    x: Tensor  # [b,C,F,H,W]
    x_next: Tensor  # [b,C,F,H,W]
    t: Tensor  # [b]
    s: Tensor  # [b]
    log_prob: Tensor  # [b] nats per latent element
    rows: Tensor  # [b] which clips of the trajectory these are

    def select(self, index: Tensor | slice) -> Step:
        """Some of the clips, as a smaller step."""
        return Step(*(field[index] for field in self))


@dataclass(frozen=True)
class Trajectory:
    """What a rollout leaves behind.

    Example: B = 4, K = 8, noise at step 2 only: `x` holds x[2], x[3] and x[8]; the rest is None; `log_prob` is nan but in row 2.
    """

    x: tuple[Tensor | None, ...]  # K+1 times [B,C,F,H,W]; only states beside a noisy step (in the storage dtype) and the finished latents
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
        """Model evaluations this rollout took, clips times steps (guidance not counted)."""
        return self.log_prob.numel()

    def steps(self) -> list[Step]:
        """The noisy steps, in the order they were taken. Raises ValueError where there is none."""
        found = []
        for k, noisy in enumerate(self.noisy):
            rows = noisy.nonzero()[:, 0]  # [b]
            if len(rows):
                found.append(self._step(k, rows))
        if not found:
            raise ValueError("no stochastic step to train on: every step was deterministic. Use a kernel with noise and at least one noisy step")
        return found

    def _step(self, k: int, rows: Tensor) -> Step:
        x, x_next = self.x[k], self.x[k + 1]
        assert x is not None and x_next is not None
        if len(rows) < len(self.cond):
            x, x_next = x[rows], x_next[rows]
        return Step(x, x_next, self.t[k, rows], self.t[k + 1, rows], self.log_prob[k, rows], rows)


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
    """Distribution of x_s given x [B,C,F,H,W] at t; t, s [B] or []. Used to sample (without gradient) and to replay (with gradient)."""
    t, s = t.expand(len(x)), s.expand(len(x))  # [B]
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return kernel(model.path, x, model(x, t, cond), t, s)


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
    dtype: torch.dtype = torch.float32,
) -> Trajectory:
    """Denoise x [B,C,F,H,W] from times[0] to times[K] = 0. Returns what replay needs.

    times: [K+1], or [K+1,B] for one grid per clip; strictly decreasing to 0. cond: B.
    noise: a generator, or a function of the step k that gives standard normal [B,C,F,H,W]; asked for noisy steps only.
    stochastic: which steps take noise: bool [K], bool [K,B] (one choice per clip) or step numbers; default all but the last. The last step never may.
    dtype: what kept states are rounded to, BEFORE their log-probability is taken.
    Raises ValueError where the grid is not decreasing to 0 or the last step is asked to be noisy.
    """
    times = times.reshape(len(times), -1).expand(-1, len(x)).to(x.device)  # [K+1,B]
    if not bool((times[1:] < times[:-1]).all()) or bool(times[-1].any()):
        raise ValueError("times must decrease strictly and end at 0")
    noisy = _noisy_steps(stochastic, len(times) - 1, len(x), x.device)  # [K,B]
    beside = torch.cat([noisy.any(1), torch.tensor([False], device=x.device)])  # [K+1]
    keep = (beside | beside.roll(1)).tolist()  # a state is kept where the step from it or to it is noisy
    wide = torch.promote_types(x.dtype, torch.float32)
    log_prob = torch.full(noisy.shape, torch.nan, dtype=wide, device=x.device)  # [K,B]
    taken = torch.zeros_like(noisy)  # [K,B]
    states: list[Tensor | None] = []
    for k in range(len(noisy)):
        x = x.to(dtype if keep[k] else wide)
        states.append(x if keep[k] else None)
        step = transition(model, _Partly(kernel, noisy[k]), x, times[k], times[k + 1], cond)
        taken[k] = noisy[k] & (step.std.reshape(-1) > 0)
        if taken[k].any():
            x = step.sample(noise if isinstance(noise, torch.Generator) else noise(k)).to(dtype)  # [B,C,F,H,W] round first, then score
            log_prob[k] = torch.where(taken[k], step.log_prob(x), torch.nan)
        else:
            x = step.mean
    return Trajectory((*states, x.to(wide)), times, log_prob, taken, cond)


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
        now, before = (transition(model, kernel, step.x, step.t, step.s, taken.cond[step.rows]) for model in (policy, prior))
        total.index_add_(0, step.rows, now.kl_total(before))
    return total


def _noisy_steps(stochastic: Tensor | Iterable[int] | None, num_steps: int, num_clips: int, device: torch.device) -> Tensor:
    """-> bool [K,B]."""
    if isinstance(stochastic, Tensor) and stochastic.dtype == torch.bool:
        noisy = stochastic.to(device).reshape(len(stochastic), -1)
    else:
        noisy = torch.zeros(num_steps, 1, dtype=torch.bool, device=device)
        noisy[[int(k) for k in (range(num_steps - 1) if stochastic is None else stochastic)]] = True
    if len(noisy) != num_steps or noisy.shape[1] not in (1, num_clips):
        raise ValueError(f"stochastic must be [{num_steps}] or [{num_steps}, {num_clips}], got {list(noisy.shape)}")
    if bool(noisy[-1].any()):
        raise ValueError("the last step is always deterministic: leave it out of `stochastic`")
    return noisy.expand(-1, num_clips)  # [K,B]

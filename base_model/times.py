"""Where to look at the path: sampling grids, training densities, and the fixed quantiles of the held-out loss.

Everything is said through the log noise ratio l = log(sigma / alpha), which runs from +inf (noise) to -inf (data) on every path. A shift
by s adds log s to l: on a rectified path that is t -> s t / (1 + (s - 1) t) (SD3: Esser et al. 2024, arXiv 2403.03206, eq. 23). s > 1
looks more at noise, as longer and larger clips need. Computed in float64, returned in float32.

Letters: B clips, K denoising steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from base_model.paths import Path, RectifiedFlow, VariancePreserving


def time_at(path: Path, log_ratio: Tensor) -> Tensor:
    """The time t where log(sigma / alpha) has this value; the inverse of the path's schedule. Raises ValueError on a path that is not known."""
    if isinstance(path, VariancePreserving):
        return torch.atan(log_ratio.exp())
    if isinstance(path, RectifiedFlow) and path.t_max == 1:
        return torch.sigmoid(log_ratio)
    raise ValueError(f"no inverse schedule for {type(path).__name__}: add it to base_model/times.py")


def log_ratio(path: Path, t: Tensor) -> Tensor:
    """log(sigma(t) / alpha(t)), float64; +inf at t_max, -inf at 0."""
    t = t.double()
    return path.sigma(t).log() - path.alpha(t).clamp_min(0).log()


def _log_shift(shift: float | Tensor) -> Tensor:
    shift = torch.as_tensor(shift, dtype=torch.float64)
    if bool((shift <= 0).any()):
        raise ValueError(f"shift must be positive, got {shift.tolist()}")
    return shift.log()


def shift_time(path: Path, t: Tensor, shift: float | Tensor) -> Tensor:
    """Move t [...] along the path by a shift (broadcastable); 1 changes nothing. The ends stay where they are."""
    return time_at(path, log_ratio(path, t) + _log_shift(shift)).float()


def square_root_shift(num_tokens: Tensor, *, reference_shift: float, reference_tokens: int) -> Tensor:
    """The shift of each clip from its own number of tokens, [S] -> [S] float64: s = s0 sqrt(n / n0) (the sqrt(m / n) of arXiv 2403.03206, eq. 23).

    n times as many tokens show the same picture through sqrt(n) times as much noise. In a pack every clip has a shift of its own, not the pack's. Raises ValueError
    where a number or the reference is not positive.
    """
    if reference_tokens < 1 or reference_shift <= 0 or bool((num_tokens < 1).any()):
        raise ValueError(f"shift and tokens must be positive, got {reference_shift}, {reference_tokens} and {num_tokens.tolist()}")
    return reference_shift * (num_tokens.double() / reference_tokens).sqrt()


def sampling_times(path: Path, num_steps: int, *, shift: float | Tensor = 1.0) -> Tensor:
    """Grid of a sampler: uniform in t, then shifted. -> [K+1] from t_max to 0, or [K+1,B] where shift is [B], one grid per clip.

    Raises ValueError where num_steps or a shift is not positive.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be positive, got {num_steps}")
    grid = torch.linspace(path.t_max, 0, num_steps + 1, dtype=torch.float64)  # [K+1]
    log_shift = _log_shift(shift)
    if log_shift.dim():
        grid = grid[:, None].expand(-1, len(log_shift))  # [K+1,B]
    moved = grid.clone()
    inside = log_ratio(path, grid[1:-1]) + log_shift
    moved[1:-1] = grid[1:-1].where(log_shift == 0, time_at(path, inside))
    return moved.float()


def logit_normal(path: Path, n: int, *, shift: float | Tensor = 1.0, generator: torch.Generator) -> Tensor:
    """n independent training times, log(sigma/alpha) ~ N(log shift, 1) (arXiv 2403.03206, eq. 19). -> [n]; shift is a number or [n]."""
    z = torch.randn(n, generator=generator, dtype=torch.float64, device=generator.device)  # [n]
    return time_at(path, z + _log_shift(shift).to(z)).float()


def stratified_logit_normal(path: Path, n: int, *, shift: float | Tensor = 1.0, generator: torch.Generator) -> Tensor:
    """One draw in each of n equally likely strata, in random order: each time alone is logit-normal, the batch is even. -> [n]."""
    u = torch.rand(n, generator=generator, dtype=torch.float64, device=generator.device)  # [n]
    strata = torch.randperm(n, generator=generator, device=generator.device)  # [n]
    z = torch.special.ndtri(((strata + u) / n).clamp(1e-12, 1 - 1e-12))  # [n]
    return time_at(path, z + _log_shift(shift).to(z)).float()


def quantile_times(path: Path, n: int, *, shift: float | Tensor = 1.0) -> Tensor:
    """The fixed grid of the held-out loss: quantiles (i + 1/2)/n of the training density, least noise first. -> [n], or [n,B] for shift [B]."""
    z = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)  # [n]
    log_shift = _log_shift(shift)
    return time_at(path, (z[:, None] if log_shift.dim() else z) + log_shift).float()

"""One denoising step as a Gaussian policy, and the kernels that make it from a velocity.

A kernel turns (path, x_t, u, t, s) into the distribution of x_s, s < t. Log-probabilities and KL divergences are methods of that one
object, in nats PER LATENT ELEMENT (a mean over all but the first axis), the convention of DDPO and Flow-GRPO. Multiply by `elements`
for the true total.

Letters: B clips, C F H W latent channels/frames/height/width. t runs from t_max (noise) to 0 (data). alpha, sigma: the path at t.
All arithmetic is float32 or wider, whatever the dtype of the state: at a step of std 0.02, bfloat16 moves a log-probability by 4e-3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from base_model.paths import Path, like

SINGULAR = 1e-6  # alpha below which a step counts as the very first one, where FlowSDE's noise would be infinite


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _per_element(x: Tensor) -> Tensor:
    """[B, ...] -> [B]: mean over everything but the clips."""
    return x.flatten(1).mean(1)  # [B]


@dataclass(frozen=True)
class Gaussian:
    """N(mean, std^2), independent over latent elements. A std of 0 is a deterministic step: it can be sampled, but it has no density (nan).

    Example: `Gaussian(torch.zeros(2, 8, 4, 8, 8), torch.full((2, 1, 1, 1, 1), 0.3))` is a step of two clips.
    """

    mean: Tensor  # [B,C,F,H,W] float32 or wider
    std: Tensor  # [B,1,1,1,1] or [1,1,1,1,1], same dtype

    @property
    def elements(self) -> int:
        """Latent elements of one clip: the factor from per-element to total nats."""
        return self.mean[0].numel()

    def sample(self, noise: Tensor | torch.Generator) -> Tensor:
        """mean + std * noise [B,C,F,H,W]. `noise` is standard normal, or the generator to draw it from."""
        if isinstance(noise, torch.Generator):
            noise = torch.randn(self.mean.shape, generator=noise, device=noise.device, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean)  # [B,C,F,H,W]

    def log_prob(self, x: Tensor) -> Tensor:
        """log density of x [B,C,F,H,W], [B], nats per latent element; x is not detached. nan where std is 0."""
        z = (x.to(self.mean.dtype) - self.mean) / self.std  # [B,C,F,H,W]
        return _per_element(-0.5 * z.square() - self.std.log() - 0.5 * math.log(2 * math.pi))  # [B]

    def kl(self, other: Gaussian) -> Tensor:
        """KL(self || other), [B], nats per latent element; 0.5 <(mean - mean')^2> / std^2 where the stds agree. nan where a std is 0."""
        shift = (self.mean - other.mean) / other.std  # [B,C,F,H,W]
        ratio = self.std / other.std  # [B,1,1,1,1]
        return _per_element(0.5 * shift.square() + 0.5 * (ratio.square() - 1) - ratio.log())  # [B]

    def kl_total(self, other: Gaussian) -> Tensor:
        """KL(self || other), [B], nats of the whole clip: `kl` times `elements`."""
        return self.kl(other) * self.elements

    def __getitem__(self, rows: Tensor) -> Gaussian:
        """The steps of some clips, in any order and as often as asked."""
        return Gaussian(self.mean[rows], self.std.expand(len(self.mean), *self.std.shape[1:])[rows])


class Kernel(Protocol):
    """How one step from t to s < t is taken. x_t, u [B,C,F,H,W]; t, s [B] or []."""

    def __call__(self, path: Path, x_t: Tensor, u: Tensor, t: Tensor, s: Tensor) -> Gaussian: ...


def _around(path: Path, x_t: Tensor, u: Tensor, t: Tensor, s: Tensor, std: Tensor) -> Gaussian:
    """alpha_s x0 + sqrt(sigma_s^2 - std^2) eps + std z: total noise stays sigma_s. std [B] or []."""
    x0, eps = path.split(_wide(x_t), _wide(u), t)  # [B,C,F,H,W] each
    rest = (path.sigma(s).square() - std.square()).clamp_min(0).sqrt()  # [B]
    return _gaussian(like(path.alpha(s), x0) * x0 + like(rest, eps) * eps, std)


def _gaussian(mean: Tensor, std: Tensor) -> Gaussian:
    shape = (std.numel(),) + (1,) * (mean.dim() - 1)
    return Gaussian(mean, std.reshape(shape).to(mean))


def _euler_maruyama(path: Path, x_t: Tensor, u: Tensor, t: Tensor, s: Tensor, g: Tensor) -> Gaussian:
    """One step of dx = (u - g^2/2 score) dt + g dw backwards in time, score = -eps / sigma. g [B] or [].

    With D = t - s, on a rectified path: mean = x (1 - g^2 D / 2 sigma) - u (1 + g^2 (1 - sigma) / 2 sigma) D
    (Flow-GRPO, arXiv 2505.05470, section 4.2 and appendix A).
    """
    x_t, u, delta = _wide(x_t), _wide(u), t - s
    _, eps = path.split(x_t, u, t)  # [B,C,F,H,W]
    pull = g.square() * delta / (2 * path.sigma(t))  # [B]
    return _gaussian(x_t - like(delta, u) * u - like(pull, eps) * eps, g * delta.sqrt())


@dataclass(frozen=True)
class Ancestral:
    """DDIM with noise share eta (Song et al. 2021, arXiv 2010.02502, eq. 12 and 16), for any Gaussian path.

    std = eta sigma_s/sigma_t sqrt(sigma_t^2 - (alpha_t/alpha_s)^2 sigma_s^2). Keeps the marginals for every eta in [0, 1] as the grid
    gets finer; no singularity at t_max; std is 0 at s = 0. eta 0 is the ODE, eta 1 is DDPM's posterior (Ho et al. 2020,
    arXiv 2006.11239, eq. 7). With eta = a/sqrt(2) it is FlowSDE(a) to first order.
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"Ancestral: eta must be in [0, 1], got {self.eta}")

    def __call__(self, path: Path, x_t: Tensor, u: Tensor, t: Tensor, s: Tensor) -> Gaussian:
        t, s = _wide(t), _wide(s)
        carried = path.alpha(t) / path.alpha(s) * path.sigma(s)  # [B] noise of x_s that is still in x_t
        fresh = (path.sigma(t) - carried) * (path.sigma(t) + carried)  # [B] difference of squares, without cancellation
        return _around(path, x_t, u, t, s, self.eta * path.sigma(s) / path.sigma(t) * fresh.clamp_min(0).sqrt())


@dataclass(frozen=True)
class FlowSDE:
    """Flow-GRPO's sampler: g = a sqrt(sigma/alpha), on a rectified path a sqrt(sigma/(1 - sigma)) (arXiv 2505.05470, section 4.2).

    Infinite at t_max. There alpha_t is replaced by alpha_s, the next grid point, as the authors' code does: no crash, but the first
    step's std is then a on every grid, so that it converges slowly (order 0.4, the others 1).

    max_std: LongCat-Video's clipped std (arXiv 2510.22200): g is lowered so far that g sqrt(t - s) is at most this, in the drift as in the noise. Published
    with a = 1 and 0.45.
    """

    a: float = 0.7
    max_std: float = math.inf

    def __post_init__(self) -> None:
        if self.a < 0 or self.max_std <= 0:
            raise ValueError(f"FlowSDE: a must not be negative and max_std must be positive, got {self.a} and {self.max_std}")

    def __call__(self, path: Path, x_t: Tensor, u: Tensor, t: Tensor, s: Tensor) -> Gaussian:
        t, s = _wide(t), _wide(s)
        alpha = path.alpha(t)  # [B]
        alpha = torch.where(alpha < SINGULAR, path.alpha(s), alpha)  # [B]
        g = self.a * (path.sigma(t) / alpha).sqrt()  # [B]
        return _euler_maruyama(path, x_t, u, t, s, torch.minimum(g, self.max_std / (t - s).sqrt()))


@dataclass(frozen=True)
class DanceSDE:
    """DanceGRPO's sampler for rectified flows: constant g = eta (arXiv 2505.07818, section 3).

    Its noise does not fade towards t = 0: the last step must be an ODE step, as in every rollout here.
    """

    eta: float = 0.3

    def __post_init__(self) -> None:
        if self.eta < 0:
            raise ValueError(f"DanceSDE: eta must not be negative, got {self.eta}")

    def __call__(self, path: Path, x_t: Tensor, u: Tensor, t: Tensor, s: Tensor) -> Gaussian:
        t, s = _wide(t), _wide(s)
        return _euler_maruyama(path, x_t, u, t, s, torch.full_like(t, self.eta))


@dataclass(frozen=True)
class CPS:
    """Coefficients-preserving sampling (arXiv 2509.05952): std = sigma_s sin(eta pi/2), total noise sigma_s, for any path.

    Clean-looking, but does NOT converge to the data's distribution: the fresh noise per step does not shrink with the step,
    and with eta 0.5 a standard deviation of 0.50 settles at 0.46 however many steps are taken. Harmless with one to three noisy steps.
    """

    eta: float = 0.8

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"CPS: eta must be in [0, 1], got {self.eta}")

    def __call__(self, path: Path, x_t: Tensor, u: Tensor, t: Tensor, s: Tensor) -> Gaussian:
        t, s = _wide(t), _wide(s)
        return _around(path, x_t, u, t, s, path.sigma(s) * math.sin(self.eta * math.pi / 2))


@dataclass(frozen=True)
class ODE:
    """The deterministic step alpha_s x0 + sigma_s eps: Euler on a rectified path, DDIM on a variance-preserving one. std is 0."""

    def __call__(self, path: Path, x_t: Tensor, u: Tensor, t: Tensor, s: Tensor) -> Gaussian:
        t, s = _wide(t), _wide(s)
        return _around(path, x_t, u, t, s, torch.zeros_like(t))


KernelName = Literal["ancestral", "flow", "longcat", "dance", "cps"]
StepWeight = Literal["none", "inv_kappa", "g"]
KLSpace = Literal["x", "v"]
KL_UNITS: dict[KLSpace, str] = {"x": "nats per latent element", "v": "velocity^2 per latent element"}


def build_kernel(name: KernelName, noise_level: float) -> Kernel:
    """The kernel a configuration names; `noise_level` is its eta or a. longcat is FlowSDE with its std clipped as published.

    Raises ValueError for another name or an impossible level.
    """
    kernels: dict[str, Callable[[float], Kernel]] = {
        "ancestral": Ancestral,
        "flow": FlowSDE,
        "longcat": partial(FlowSDE, max_std=0.45),
        "dance": DanceSDE,
        "cps": CPS,
    }
    if name not in kernels:
        raise ValueError(f"kernel {name!r} is unknown: use {', '.join(kernels)}")
    return kernels[name](noise_level)


def kappa(kernel: Kernel, path: Path, t: Tensor, s: Tensor) -> Tensor:
    """How hard one step's log-probability pulls on the velocity: |d log p / d u| = |z| kappa / elements. t, s [B] -> [B], unit 1/velocity.

    The mean of every kernel is linear in u, so kappa = |d mean / d u| / std is read off at x_t = 0, u = 1. With D = t - s, for Flow-GRPO's
    kernel it is sqrt(D)/g + g sqrt(D) (1 - sigma)/(2 sigma): about 30 times larger at the last step than at the first. inf where std is 0.
    """
    one = torch.ones(t.numel(), 1, dtype=torch.promote_types(t.dtype, torch.float32), device=t.device)  # [B,1]
    step = kernel(path, torch.zeros_like(one), one, t.reshape(-1), s.reshape(-1))
    return (step.mean.abs() / step.std)[:, 0].reshape(t.shape)  # [B]


def step_weight(name: StepWeight, kernel: Kernel, path: Path, t: Tensor, s: Tensor) -> Tensor:
    """Weight of a step in the policy gradient, t, s [B] -> [B].

    none: 1 (DDPO, Flow-GRPO). inv_kappa: 1/kappa, every step pulls on u equally; up to a constant this is the Flow-GRPO Wan script, LongCat-Video
    (arXiv 2510.22200), GRPO-Guard (arXiv 2510.22319) and Flash-GRPO (arXiv 2605.15980). g: std / sqrt(t - s), TempFlow-GRPO's weight up to a constant
    (arXiv 2508.04324).
    """
    if name == "none":
        return torch.ones_like(t)
    if name == "inv_kappa":
        return 1 / kappa(kernel, path, t, s)
    if name == "g":
        zero = torch.zeros(t.numel(), 1, dtype=torch.promote_types(t.dtype, torch.float32), device=t.device)  # [B,1]
        return kernel(path, zero, zero, t.reshape(-1), s.reshape(-1)).std.expand(t.numel(), 1)[:, 0].reshape(t.shape) / (t - s).sqrt()
    raise ValueError(f"step weight {name!r} is unknown: use none, inv_kappa or g")


def kl_in(space: KLSpace, policy: Gaussian, reference: Gaussian, kernel: Kernel, path: Path, t: Tensor, s: Tensor) -> Tensor:
    """How far a step of the policy is from the reference's, both by `kernel` from the same x_t; t, s [B] -> [B], unit `KL_UNITS[space]`.

    x: KL(policy || reference) of the step, what Flow-GRPO (arXiv 2505.05470) charges. v: <(u - u_ref)^2>, the squared distance of the two velocities, what
    DiffusionNFT (arXiv 2509.16117) charges. One is the other times kappa^2 / 2, which grows 900 times from the first to the last step of Flow-GRPO's kernel:
    a coefficient does not carry over. Raises ValueError for another space.
    """
    if space == "x":
        return policy.kl(reference)
    if space == "v":
        return policy.kl(reference) * 2 / kappa(kernel, path, t, s).square()
    raise ValueError(f"KL space {space!r} is unknown: use x or v")

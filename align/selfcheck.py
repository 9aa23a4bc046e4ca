"""What must hold before the first update. Every check returns what it measured, or stops the run (GuardStop, exit status 3) with one line.

Most expensive failures in diffusion RL are silent: a replay that is not the sampler, rewards that are all alike, a KL term computed without gradient, an adapter that is not zero
at first, ranks that drift apart. Inside `rehearsal` nothing stops: what each check found is collected, a `Run` makes one iteration, and its optimizer does not move.
Letters: B clips, C F H W latent channels/frames/height/width, D = C F H W.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from align.advantage import Groups, grouping
from align.kernels import Gaussian
from base_model.errors import GuardStop

TOLERANCE = 1e-6  # ratio - 1 in other micro-batches than the rollout's, in nats per latent element
LEAST_KNOWN = 0.95  # of the rewards
SIGMAS = 6.0  # standard errors that residuals may be off
RANKS_APART = 1e-5  # of each norm, which rounding explains
ROUNDING = 1e-5  # of the largest value: what a GPU may differ by between a pass with gradient and one without, which take different kernels; a CPU does not
HALF_RATIO, HALF_ROUNDING = 1e-3, 3e-2  # TOLERANCE and ROUNDING of a network that computes in half precision, whose steps are 2^-8 or 2^-11 of a value

RATIO = "replayed ratio is 1"
OTHER_BATCHES = "replayed ratio is 1 in other micro-batches"
RESIDUAL = "sampler and replay agree"
KL = "KL gradient is not zero"
ADAPTER = "a fresh adapter changes nothing"
KNOWN = "rewards are finite"
SPREAD = "rewards vary"
RANKS = "gradients are equal across ranks"
CHECKS = (RATIO, OTHER_BATCHES, RESIDUAL, KL, ADAPTER, KNOWN, SPREAD, RANKS)


class Finding(NamedTuple):
    """What a check found."""

    name: str
    passed: bool
    said: str  # with the number
    remedy: str


_rehearsal: list[Finding] | None = None


@contextmanager
def rehearsal() -> Iterator[list[Finding]]:
    """Inside, in every thread, checks tell the list instead of stopping the run, and runs only rehearse (`Run`). Raises ValueError inside another one."""
    global _rehearsal
    if _rehearsal is not None:
        raise ValueError("a rehearsal inside a rehearsal")
    found: list[Finding] = []
    _rehearsal = found
    try:
        yield found
    finally:
        _rehearsal = None


def rehearsing() -> bool:
    """Whether this is inside `rehearsal`."""
    return _rehearsal is not None


def _tell(name: str, passed: bool, said: str, remedy: str) -> None:
    if _rehearsal is not None:
        _rehearsal.append(Finding(name, passed, said, remedy))
    elif not passed:
        raise GuardStop(f"self-check: {said}: {remedy}")


def rounding(device: torch.device, largest: float = 1.0, *, half: bool = False) -> float:
    """How far two passes over the same clips may be apart. half: whether the network computes in half precision."""
    return 0.0 if device.type == "cpu" else (HALF_ROUNDING if half else ROUNDING) * largest


def first_ratio(log_prob: Tensor, old_log_prob: Tensor, *, same_batches: bool, half: bool = False) -> float:
    """max |ratio - 1| over the replayed steps [B] before any update: exactly 0 in the rollout's own micro-batches on a CPU, at most 1e-6 in others and 1e-5 on a GPU; at most 1e-3
    in both where the network computes in half precision."""
    off = float((log_prob.detach() - old_log_prob).double().expm1().abs().max())
    on_a_cpu = log_prob.device.type == "cpu"
    allowed = (0.0 if same_batches and on_a_cpu else HALF_RATIO) if half else max(0.0 if same_batches else TOLERANCE, rounding(log_prob.device))
    remedy = "replay differs from sampling (dropout, guidance, dtype or conditions). Make both call transition() with the same model state"
    _tell(RATIO if same_batches else OTHER_BATCHES, off <= allowed, f"the first ratio is off by {off:.3g}, allowed {allowed:g}", remedy)
    return off


def first_residual(step: Gaussian, x_next: Tensor) -> float:
    """How far what was sampled, x_next [B,C,F,H,W], is from a draw of the replayed step, in standard errors: the larger of the mean's and the variance's of (x_next - mean) / std.

    Unlike the ratio it needs no remembered log-probability: a sampler and a replay that are wrong together are told apart from what was sampled.
    """
    z = ((x_next - step.mean.detach()) / step.std.detach()).double()  # [B,C,F,H,W]
    mean, variance = float(z.mean()), float(z.square().mean())
    off = max(abs(mean) * math.sqrt(z.numel()), abs(variance - 1) * math.sqrt(z.numel() / 2))
    remedy = "the replayed step is not the distribution that was sampled from. Look at the kernel, the times and which states are replayed"
    _tell(RESIDUAL, off <= SIGMAS, f"residuals have mean {mean:+.2g} and variance {variance:.3f}, {off:.1f} standard errors off", remedy)
    return off


def first_velocity(u: Tensor, u_old: Tensor, *, half: bool = False) -> float:
    """max |u - u_old| before any update, [B,C,F,H,W] each, for methods that need no density but the velocity of the policy that made the clips: exactly 0 on a CPU, at most 1e-5 of
    the largest |u_old| on a GPU, 3e-2 in half precision."""
    off, allowed = float((u.detach() - u_old).abs().max()), rounding(u.device, float(u_old.abs().max()), half=half)
    remedy = "the trained pass differs from the one that is remembered (dropout, dtype or conditions). Make both call the same model in the same state"
    _tell(RESIDUAL, off <= allowed, f"the first velocity is off by {off:.3g}, allowed {allowed:.3g}", remedy)
    return off


def fresh_adapter(u: Tensor, reference: Tensor, *, half: bool = False) -> float:
    """max difference of what the policy and the reference say before any update, of one shape each: exactly 0 on a CPU, for a LoRA adapter begins with B = 0; at most 1e-5 of the
    largest |reference| on a GPU, 3e-2 in half precision."""
    off, allowed = float((u.detach() - reference.detach()).abs().max()), rounding(u.device, float(reference.detach().abs().max()), half=half)
    remedy = "the adapter is not zero at the start, or the reference is another network. Begin with a fresh add_lora()"
    _tell(ADAPTER, off <= allowed, f"policy and reference are {off:.3g} apart, allowed {allowed:.3g}", remedy)
    return off


def known_rewards(reward: Tensor) -> float:
    """Share of the rewards [B] that are known, at least 95 %: what is unknown (nan) teaches nothing."""
    known = float(reward.isfinite().double().mean())
    _tell(KNOWN, known >= LEAST_KNOWN, f"{known:.0%} of {len(reward)} rewards are known, wanted {LEAST_KNOWN:.0%}", "look at the scorer and at the clips it cannot score")
    return known


def reward_spread(reward: Tensor, groups: Groups) -> float:
    """Largest standard deviation of the known rewards within a prompt's group, reward [B]: above 0, or nothing can be learned."""
    by_prompt = [group[group.isfinite()] for group in grouping(reward, groups).fill(reward)]
    spread = max((float(group.double().std(correction=0)) for group in by_prompt if len(group) > 1 and bool((group != group[0]).any())), default=0.0)
    known = float(reward.isfinite().float().mean())
    said = f"rewards of a prompt's clips spread by up to {spread:.3g}" if spread else f"no prompt has two clips with different rewards ({known:.0%} of the rewards are known)"
    _tell(SPREAD, spread > 0, said, "look at the scorer, at the noise of the kernel and at the number of clips a prompt")
    return spread


def kl_gradient(policy: Gaussian, reference: Gaussian, parameters: Iterable[nn.Parameter]) -> float:
    """Norm of the gradient of KL(policy || reference) with the reference moved away by one std; above 0, or the KL term trains nothing.

    Moved, because at step 0 the policy IS the reference and the true gradient is 0. The graph of `policy` is kept. The reference must carry no gradient.
    """
    if reference.mean.requires_grad:
        _tell(KL, False, "the reference's velocity carries a gradient", "compute it under no_grad, with the adapter disabled")
    moved = Gaussian((reference.mean + reference.std).detach(), reference.std)
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    kl = policy.kl(moved).mean()
    gradients = torch.autograd.grad(kl, wanted, retain_graph=True, allow_unused=True) if kl.requires_grad and wanted else ()
    norm = float(sum((g.double().square().sum() for g in gradients if g is not None), torch.zeros((), dtype=torch.float64)).sqrt())
    remedy = "it must reach the trainable parameters. Compute the policy's velocity with gradient"
    _tell(KL, 0 < norm < float("inf"), f"the gradient of the KL term is {norm:.3g}", remedy)
    return norm


def equal_ranks(held: Tensor) -> float:
    """How far R ranks are apart before the first update, as a share of what they hold: the largest of n. held: norms of gradients and weights, and a number each has drawn, on each
    rank, [R,n]. Each counts by itself: a gradient is far smaller than the weights it moves."""
    largest = held.abs().amax(0).clamp_min(torch.finfo(held.dtype).tiny)  # [n]
    share = float(((held - held[0]).abs() / largest).max())
    remedy = "start all ranks with the same files, configuration and seed"
    _tell(RANKS, share <= RANKS_APART, f"gradients, weights and draws of {len(held)} ranks are {share:.2g} of a norm apart, allowed {RANKS_APART:g}", remedy)
    return share

"""Safety as constraints: one Lagrange multiplier per policy, costs beside the reward, a hard gate for the worst.

maximise reward subject to E[cost_k] <= limit_k, for each policy k. The multiplier rises while the running mean cost is above its target
(a quarter of the limit by default: the limit is what is reported, so aim well below it) and falls while it is below. The limit enters
HERE only: the policy sees the cost minus the mean of the other clips of its prompt, never divided by a standard deviation (one rare
violation would dominate).

The price is a controller of the log of lambda: an integral of the error, which alone finds the price that holds the limit, and, where asked for, a proportional
and a derivative part, which damp the swings that an integral alone falls into when the policy answers late (PID Lagrangian, Stooke et al. 2020, arXiv
2007.03964, algorithm 2). While few clips were judged, the controller may look at an upper confidence bound instead of the mean.

The multiplier looks at what the limit is about, the share of clips that violate; the policy at graded costs in [0, 1], a margin or a probability. Where
every clip of a prompt violates, a 0/1 cost has no gradient whatever the baseline; `all_violating` measures the share of such prompts. An unknown cost (nan)
is never "safe": the clip leaves the update and is counted.
Safety alone collapses a generator: keep a quality guard beside it.

Letters: B clips.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from align.advantage import Advantage, Groups, grouping, leave_one_out

Correct = Callable[[float, float], float]
"""The share of clips that a filter calls violating, and how many clips that rests on -> the share that violates."""


def metrics(policies: Iterable[str]) -> dict[str, str]:
    """What this module logs for these policies, name -> one sentence."""
    found = {
        "constraint/unknown_share": "Share of clips with an unknown cost (an error of a filter is never safe).",
        "constraint/masked_share": "Share of clips left out of the update for an unknown reward or cost.",
    }
    for policy in policies:
        found[f"constraint/{policy}/lambda"] = f"Price of the policy {policy}, its Lagrange multiplier."
        found[f"constraint/{policy}/cost"] = f"Running mean of the cost of {policy}, what its multiplier compares with its target."
        found[f"constraint/{policy}/bound"] = f"What is compared with the target of {policy}: the running mean, its upper confidence bound, or the corrected rate."
        found[f"constraint/{policy}/all_violating"] = f"Share of prompts whose clips all violate {policy}: there a 0/1 cost would teach nothing."
    return found


def upper_bound(share: float, count: float, confidence: float) -> float:
    """One-sided upper confidence bound of a share in [0, 1] of which `count` independent draws gave `share` (Wilson 1927).

    For graded costs in [0, 1] it is on the safe side: no such cost of that mean varies more than a 0/1 one. Above 0 where nothing was seen yet: z^2 / (n + z^2).
    """
    z2 = NormalDist().inv_cdf(confidence) ** 2
    centre = share + z2 / (2 * count)
    return (centre + math.sqrt(z2 / count * (share * (1 - share) + z2 / (4 * count)))) / (1 + z2 / count)


class Multiplier:
    """lambda of one policy, kept as log lambda: log lambda = integral + proportional e + derivative max(0, rise), within [floor, cap].

    cost <- decay cost + (1 - decay) now; e = (cost - target) / max(cost, target); integral <- integral + rate e, within [floor, cap] too, so that it does not
    wind up; rise = the change of e. With the integral alone (the default) the step is multiplicative (exponentiated gradient) and bounded: lambda never changes by more
    than a factor exp(rate) an update, up or down, whatever the unit of the cost; its fixed point cost = target is that of lambda <- [lambda + rate (cost -
    target)]+, with a proportional and a derivative part too, for both are 0 there.

    warm_up: so many first updates only measure, while lambda stays at `initial`. confidence (above 0.5): compare the `upper_bound` of the running mean, which
    weighs about count (1 + decay) / (1 - decay) clips, instead of the mean; costs must then be in [0, 1]. correct: compare what it makes of the running mean and
    that number of clips, where a filter's errors are known; the bound, too, is then its affair. Known failures: a rate of 1/(decay's memory) or more
    swings. Clips of one prompt are not independent, so the bound is then too tight. A bound that lies above the target even at no violation drives lambda to
    its cap: judge more clips, or lengthen the decay. Raises ValueError for settings that make no sense.
    """

    def __init__(
        self,
        policy: str,
        *,
        limit: float,
        target: float | None = None,
        rate: float = 0.1,
        decay: float = 0.8,
        initial: float = 1.0,
        floor: float = 1e-3,
        cap: float = 100.0,
        proportional: float = 0.0,
        derivative: float = 0.0,
        warm_up: int = 0,
        confidence: float | None = None,
        correct: Correct | None = None,
    ) -> None:
        self.target = limit / 4 if target is None else target
        if not 0 < self.target <= limit:
            raise ValueError(f"multiplier of {policy}: target must be above 0 and at most the limit {limit}, got {self.target}")
        if not (0 < floor <= initial <= cap and rate > 0 and 0 <= decay < 1):
            raise ValueError(f"multiplier of {policy}: needs 0 < floor <= initial <= cap, rate > 0 and 0 <= decay < 1")
        if min(proportional, derivative, warm_up) < 0 or not (confidence is None or 0.5 < confidence < 1):
            raise ValueError(f"multiplier of {policy}: needs proportional, derivative and warm_up of at least 0, and a confidence above 0.5 and below 1 (or none)")
        if correct is not None and confidence is not None:
            raise ValueError(f"multiplier of {policy}: correct and confidence: a corrected rate brings its own bound. Give one of them")
        self.correct = correct
        self.policy, self.limit, self.rate, self.decay = policy, limit, rate, decay
        self.proportional, self.derivative, self.warm_up, self.confidence = proportional, derivative, warm_up, confidence
        self._bounds = math.log(floor), math.log(cap)
        self.log_value = self._integral = math.log(initial)
        self.cost: float | None = None
        self._thinness = 0.0  # variance of the running mean in units of that of one clip: 1 / (clips it rests on)
        self._error: float | None = None
        self.num_updates = 0

    @property
    def value(self) -> float:
        """lambda, at most `cap`. At the cap the constraint cannot be met at this price: look at the run, do not raise the cap."""
        return math.exp(self.log_value)

    @property
    def bound(self) -> float:
        """What is compared with the target: the running mean cost, its upper confidence bound, or what it is corrected to. nan before the first known cost."""
        if self.cost is None:
            return math.nan
        if self.correct is not None:
            return self.correct(self.cost, self.clips)
        return self.cost if self.confidence is None else upper_bound(self.cost, self.clips, self.confidence)

    @property
    def clips(self) -> float:
        """About how many clips the running mean rests on. Raises ZeroDivisionError before the first known cost."""
        return 1 / self._thinness

    def update(self, cost: Tensor) -> None:
        """One dual step from what is limited, violations (0 or 1) or costs [B], of one rollout (all ranks). Unknown costs (nan) are left out; where none is known nothing moves.

        Raises ValueError for a cost outside [0, 1] where a confidence was asked for.
        """
        known = cost[cost.isfinite()].double()
        if not len(known):
            return
        if self.confidence is not None and not bool(((known >= 0) & (known <= 1)).all()):
            raise ValueError(f"multiplier of {self.policy}: an upper bound needs costs in [0, 1], got {float(known.min()):g} to {float(known.max()):g}")
        now, thinness = float(known.mean()), 1 / len(known)
        self._thinness = thinness if self.cost is None else self.decay**2 * self._thinness + (1 - self.decay) ** 2 * thinness
        self.cost = now if self.cost is None else self.decay * self.cost + (1 - self.decay) * now
        self.num_updates += 1
        error = (self.bound - self.target) / max(self.bound, self.target)
        rise = 0.0 if self._error is None else error - self._error
        self._error = error
        if self.num_updates > self.warm_up:
            self._integral = self._within(self._integral + self.rate * error)
            self.log_value = self._within(self._integral + self.proportional * error + self.derivative * max(0.0, rise))

    def _within(self, log_value: float) -> float:
        return min(max(log_value, self._bounds[0]), self._bounds[1])

    def stats(self) -> dict[str, float]:
        """lambda, running mean cost and what was compared, by policy."""
        name = f"constraint/{self.policy}"
        return {f"{name}/lambda": self.value, f"{name}/cost": math.nan if self.cost is None else self.cost, f"{name}/bound": self.bound}

    def state_dict(self) -> dict[str, Any]:
        moving = {"log_value": self.log_value, "integral": self._integral, "cost": self.cost, "thinness": self._thinness, "error": self._error}
        return {"policy": self.policy, "num_updates": self.num_updates, **moving}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["policy"] != self.policy:
            raise ValueError(f"state of the multiplier of {state['policy']!r} given to that of {self.policy!r}")
        self.log_value, self._integral, self.cost = state["log_value"], state["integral"], state["cost"]
        self._thinness, self._error, self.num_updates = state["thinness"], state["error"], state["num_updates"]


class Multipliers:
    """One multiplier for each policy, as one thing to update, log, save and resume. Iterates over them. Raises ValueError where two have the same policy."""

    def __init__(self, multipliers: Iterable[Multiplier]) -> None:
        multipliers = list(multipliers)
        self._by_policy = {multiplier.policy: multiplier for multiplier in multipliers}
        if len(self._by_policy) != len(multipliers):
            raise ValueError(f"two multipliers for one policy among {[multiplier.policy for multiplier in multipliers]}")

    def __iter__(self) -> Iterator[Multiplier]:
        return iter(self._by_policy.values())

    def __getitem__(self, policy: str) -> Multiplier:
        return self._by_policy[policy]

    @property
    def total(self) -> float:
        """The sum of all lambda: what every constraint together weighs beside the reward."""
        return sum(multiplier.value for multiplier in self)

    def update(self, costs: Mapping[str, Tensor]) -> None:
        """One dual step of each from its own costs [B]. Raises ValueError where the policies differ."""
        _check_policies(costs, self._by_policy)
        for multiplier in self:
            multiplier.update(costs[multiplier.policy])

    def stats(self) -> dict[str, float]:
        return {name: value for multiplier in self for name, value in multiplier.stats().items()}

    def state_dict(self) -> dict[str, Any]:
        return {policy: multiplier.state_dict() for policy, multiplier in self._by_policy.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError where the policies differ."""
        _check_policies(state, self._by_policy)
        for multiplier in self:
            multiplier.load_state_dict(state[multiplier.policy])


def _check_policies(given: Mapping[str, Any], by_policy: Mapping[str, Any]) -> None:
    if given.keys() != by_policy.keys():
        raise ValueError(f"costs for {sorted(given)} but multipliers for {sorted(by_policy)}: every policy needs both")


def constrained_advantage(
    advantage: Tensor, costs: Mapping[str, Tensor], multipliers: Iterable[Multiplier], groups: Groups, *, valid: Tensor | None = None
) -> Advantage:
    """(A_r - sum_k lambda_k A_k) / (1 + sum_k lambda_k), A_k = cost_k - mean cost_k of the other clips of the prompt. advantage, valid, costs [B].

    Dividing by 1 + sum lambda keeps a growing lambda from growing the update (as in Stooke et al. 2020, arXiv 2007.03964). An unknown
    cost or reward masks its clip. A prompt with a single known cost has no baseline and is masked too.
    Raises ValueError where the policies of costs and multipliers differ.
    """
    by_policy = {multiplier.policy: multiplier.value for multiplier in multipliers}
    _check_policies(costs, by_policy)
    total = advantage.detach()  # [B]
    known = torch.ones_like(total, dtype=torch.bool)  # [B]
    for policy, price in by_policy.items():
        cost = costs[policy].to(total)
        total = total - price * (cost - leave_one_out(cost, groups))  # [B]
        known &= cost.isfinite()
    total = total / (1 + sum(by_policy.values()))
    mask = total.isfinite() if valid is None else total.isfinite() & valid  # [B]
    stats = {"constraint/unknown_share": float((~known).float().mean()), "constraint/masked_share": float((~mask).float().mean())}
    return Advantage(total.where(mask, 0), mask, stats)


def gate(advantage: Tensor, violated: Tensor, groups: Groups, at_most: float = -1.0) -> Tensor:
    """The hard gate: where clips of a prompt differ, one over a hard limit never gets an advantage above at_most. advantage, violated [B] -> [B].

    Where every clip of a prompt violates the advantages stay: the same constant for all would be a baseline, noise without direction, and only graded costs
    can say which clip is the lesser evil. Use it on `valid` clips, after `constrained_advantage`. Raises ValueError where at_most is not negative.
    """
    if at_most >= 0:
        raise ValueError(f"gate: at_most must be negative, got {at_most}")
    cells = grouping(violated, groups)
    differ = cells.read(~cells.all(violated))  # [B]
    return torch.where(violated & differ, advantage.clamp_max(at_most), advantage)


def all_violating(violated: Tensor, groups: Groups) -> float:
    """Share of prompts whose clips all violate, violated [B] bool: there a 0/1 cost teaches nothing, only a graded one does."""
    return float(grouping(violated, groups).all(violated).float().mean())

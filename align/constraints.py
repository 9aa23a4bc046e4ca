"""Safety as constraints: one Lagrange multiplier per policy, costs beside the reward, a hard gate for the worst.

maximise reward subject to E[cost_k] <= limit_k, for each policy k. The multiplier rises while the running mean cost is above its target
(a quarter of the limit by default: the limit is what is reported, so aim well below it) and falls while it is below. The limit enters
HERE only: the policy sees the cost minus the mean of the other clips of its prompt, never divided by a standard deviation (one rare
violation would dominate).

The multiplier looks at what the limit is about, the share of clips that violate; the policy at graded costs in [0, 1], a margin or a probability. Where
every clip of a prompt violates, a 0/1 cost has no gradient whatever the baseline; `all_violating` measures the share of such prompts. An unknown cost (nan)
is never "safe": the clip leaves the update and is counted.
Safety alone collapses a generator: keep a quality guard beside it.

Letters: B clips, G clips a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from align.advantage import Advantage, leave_one_out


def metrics(policies: Iterable[str]) -> dict[str, str]:
    """What this module logs for these policies, name -> one sentence."""
    found = {
        "constraint/unknown_share": "Share of clips with an unknown cost (an error of a filter is never safe).",
        "constraint/masked_share": "Share of clips left out of the update for an unknown reward or cost.",
    }
    for policy in policies:
        found[f"constraint/{policy}/lambda"] = f"Price of the policy {policy}, its Lagrange multiplier."
        found[f"constraint/{policy}/cost"] = f"Running mean of the cost of {policy}, what its multiplier compares with its target."
        found[f"constraint/{policy}/all_violating"] = f"Share of prompts whose clips all violate {policy}: there a 0/1 cost would teach nothing."
    return found


class Multiplier:
    """lambda of one policy, kept as log lambda.

    update: ema <- decay ema + (1 - decay) cost;  log lambda <- log lambda + rate (ema - target) / max(ema, target), within [floor, cap].
    The step is multiplicative (exponentiated gradient) and bounded: lambda never changes by more than a factor exp(rate) an update, up or down, whatever
    the unit of the cost; its fixed point ema = target is that of lambda <- [lambda + rate (cost - target)]+.
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
    ) -> None:
        self.target = limit / 4 if target is None else target
        if not 0 < self.target <= limit:
            raise ValueError(f"multiplier of {policy}: target must be above 0 and at most the limit {limit}, got {self.target}")
        if not (0 < floor <= initial <= cap and rate > 0 and 0 <= decay < 1):
            raise ValueError(f"multiplier of {policy}: needs 0 < floor <= initial <= cap, rate > 0 and 0 <= decay < 1")
        self.policy, self.limit, self.rate, self.decay = policy, limit, rate, decay
        self._bounds = math.log(floor), math.log(cap)
        self.log_value = math.log(initial)
        self.cost: float | None = None

    @property
    def value(self) -> float:
        """lambda, at most `cap`. At the cap the constraint cannot be met at this price: look at the run, do not raise the cap."""
        return math.exp(self.log_value)

    def update(self, cost: Tensor) -> None:
        """One dual step from what is limited, violations (0 or 1) or costs [B], of one rollout (all ranks). Unknown costs (nan) are left out; where none is known nothing moves."""
        known = cost[cost.isfinite()]
        if not len(known):
            return
        now = float(known.double().mean())
        self.cost = now if self.cost is None else self.decay * self.cost + (1 - self.decay) * now
        step = self.rate * (self.cost - self.target) / max(self.cost, self.target)
        self.log_value = min(max(self.log_value + step, self._bounds[0]), self._bounds[1])

    def stats(self) -> dict[str, float]:
        """lambda and running mean cost, by policy."""
        cost = float("nan") if self.cost is None else self.cost
        return {f"constraint/{self.policy}/lambda": self.value, f"constraint/{self.policy}/cost": cost}

    def state_dict(self) -> dict[str, Any]:
        return {"policy": self.policy, "log_value": self.log_value, "cost": self.cost}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["policy"] != self.policy:
            raise ValueError(f"state of the multiplier of {state['policy']!r} given to that of {self.policy!r}")
        self.log_value, self.cost = state["log_value"], state["cost"]


def constrained_advantage(
    advantage: Tensor, costs: Mapping[str, Tensor], multipliers: Iterable[Multiplier], group_size: int, *, valid: Tensor | None = None
) -> Advantage:
    """(A_r - sum_k lambda_k A_k) / (1 + sum_k lambda_k), A_k = cost_k - mean cost_k of the other clips of the prompt. advantage, valid, costs [B].

    Dividing by 1 + sum lambda keeps a growing lambda from growing the update (as in Stooke et al. 2020, arXiv 2007.03964). An unknown
    cost or reward masks its clip. A prompt with a single known cost has no baseline and is masked too.
    Raises ValueError where the policies of costs and multipliers differ.
    """
    by_policy = {multiplier.policy: multiplier.value for multiplier in multipliers}
    if by_policy.keys() != costs.keys():
        raise ValueError(f"costs for {sorted(costs)} but multipliers for {sorted(by_policy)}: every policy needs both")
    total = advantage.detach().clone()  # [B]
    known = torch.ones_like(total, dtype=torch.bool)  # [B]
    for policy, price in by_policy.items():
        cost = costs[policy].to(total)
        total = total - price * (cost - leave_one_out(cost, group_size))  # [B]
        known &= cost.isfinite()
    total = total / (1 + sum(by_policy.values()))
    mask = total.isfinite() if valid is None else total.isfinite() & valid  # [B]
    stats = {"constraint/unknown_share": float((~known).float().mean()), "constraint/masked_share": float((~mask).float().mean())}
    return Advantage(total.where(mask, 0), mask, stats)


def gate(advantage: Tensor, violated: Tensor, group_size: int, at_most: float = -1.0) -> Tensor:
    """The hard gate: where clips of a prompt differ, one over a hard limit never gets an advantage above at_most. advantage, violated [B] -> [B].

    Where every clip of a prompt violates the advantages stay: the same constant for all would be a baseline, noise without direction, and only graded costs
    can say which clip is the lesser evil. Use it on `valid` clips, after `constrained_advantage`. Raises ValueError where at_most is not negative.
    """
    if at_most >= 0:
        raise ValueError(f"gate: at_most must be negative, got {at_most}")
    differ = ~violated.reshape(-1, group_size).all(1).repeat_interleave(group_size)  # [B]
    return torch.where(violated & differ, advantage.clamp_max(at_most), advantage)


def all_violating(violated: Tensor, group_size: int) -> float:
    """Share of prompts whose clips all violate, violated [B] bool: there a 0/1 cost teaches nothing, only a graded one does."""
    return float(violated.reshape(-1, group_size).all(1).float().mean())

"""Lights over a run: is what must not change still what it was? Pure functions of what was measured on held-out prompts.

The same prompts from the same noise are looked at before the first update and on the way, so every prompt is its own control (a paired test). A light leaves green where the
mean change goes the wrong way by more than a tolerance and, by a paired t-test (Student 1908), not by chance: the first keeps small changes quiet however sure they are, the second
noise however large. What could be told at first and cannot be told now is red.

Letters: P prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, NamedTuple

from torch import Tensor

Way = Literal["falls", "rises", "changes", "is spent"]
Unit = Literal["%", "log %", "points", "levels", "sd", "log-odds", "nats per element"]


class Light(IntEnum):
    """How things stand. Its number is what is logged."""

    GREEN = 0
    AMBER = 1
    RED = 2


@dataclass(frozen=True)
class Rule:
    """When a measure's light leaves green. Raises ValueError unless 0 < amber <= red."""

    wrong: Way
    """The bad way. What "is spent" is 0 where nothing changed, so no test is asked whether it did."""
    amber: float
    """Change, in `unit`, beyond which the light is amber."""
    red: float
    """The same for red."""
    unit: Unit
    """%: share of the first look's mean; log %: values are logarithms, and the change is that of their geometric mean, as a share; any other: the mean difference itself."""

    def __post_init__(self) -> None:
        if not 0 < self.amber <= self.red:
            raise ValueError(f"a rule needs 0 < amber <= red, got {self.amber} and {self.red}")


class Change(NamedTuple):
    """How far a measure went since the look it is compared with."""

    size: float  # in the rule's unit, with its sign; nan where it cannot be told
    p: float  # probability of a change as far the wrong way if there was none; nan where it was not asked
    light: Light


def change(now: Tensor, first: Tensor, rule: Rule, level: float) -> Change | None:
    """What became of a measure, now and first [P], nan where unknown; None where it was never known. level: chance of leaving green where nothing changed, for this measure.

    Prompts known both times count. Where fewer than half of those known at first are left, nothing can be told and the light is red. One prompt alone proves nothing: p is 1.
    """
    before, after = first.double(), now.double()
    known = before.isfinite()
    both = known & after.isfinite()
    if not bool(known.any()):
        return None
    if 2 * int(both.sum()) < int(known.sum()):
        return Change(math.nan, math.nan, Light.RED)
    difference = (after - before)[both]  # [p]
    size = _in_unit(float(difference.mean()), before[both], rule.unit)
    p = math.nan if rule.wrong == "is spent" else paired_t(difference, rule.wrong)
    if rule.wrong != "is spent" and not p <= level:
        return Change(size, p, Light.GREEN)
    wrong = {"falls": -size, "rises": size, "changes": abs(size), "is spent": size}[rule.wrong]
    return Change(size, p, Light.RED if wrong > rule.red else Light.AMBER if wrong > rule.amber else Light.GREEN)


def _in_unit(difference: float, before: Tensor, unit: Unit) -> float:
    if unit == "log %":
        return math.expm1(difference)
    scale = abs(float(before.mean())) if unit == "%" else 1.0
    return difference / scale if scale > 0 else math.copysign(math.inf, difference) if difference else 0.0


def paired_t(difference: Tensor, wrong: Way) -> float:
    """p-value of the t-test of differences [P] against "no change": one-sided where they should not fall or rise, else two-sided. 1 below two prompts."""
    from scipy.special import stdtr

    count, mean = len(difference), float(difference.mean())
    if count < 2 or mean == 0:
        return 1.0
    error = float(difference.std()) / math.sqrt(count)
    t = mean / error if error > 0 else math.copysign(math.inf, mean)
    if wrong == "changes":
        return float(2 * stdtr(count - 1, -abs(t)))
    return float(stdtr(count - 1, t if wrong == "falls" else -t))


def changes(now: Mapping[str, Tensor], first: Mapping[str, Tensor], rules: Mapping[str, Rule], level: float) -> dict[str, Change]:
    """Every measure that was known at first; one that is not measured any more is red. `level` is shared among them (Bonferroni): where nothing changed, the chance that any light
    leaves green is at most that."""
    watched = [name for name in rules if name in first and bool(first[name].isfinite().any())]
    found = {name: change(now[name], first[name], rules[name], level / len(watched)) if name in now else Change(math.nan, math.nan, Light.RED) for name in watched}
    return {name: one for name, one in found.items() if one is not None}


def overall(found: Mapping[str, Change]) -> Light:
    """The worst light; green where nothing is watched."""
    return max((one.light for one in found.values()), default=Light.GREEN)


def in_words(found: Mapping[str, Change], rules: Mapping[str, Rule]) -> str:
    """The overall light and why, worst first. Example: "red: sharpness -62%, saturation +0.06 (amber)"; "green"."""
    light = overall(found)
    bad = sorted((name for name in found if found[name].light > Light.GREEN), key=lambda name: -found[name].light)
    told = [_one(name, found[name], rules[name]) + ("" if found[name].light == light else f" ({found[name].light.name.lower()})") for name in bad]
    return light.name.lower() + (f": {', '.join(told)}" if told else "")


def _one(name: str, found: Change, rule: Rule) -> str:
    if math.isnan(found.size):
        return f"{name} cannot be told"
    if rule.unit in ("%", "log %"):
        return f"{name} {found.size:+.0%}"
    return f"{name} {found.size:+.2g}{'' if rule.unit == 'points' else f' {rule.unit}'}"

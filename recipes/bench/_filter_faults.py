"""Plans of what goes wrong with safety filters, filters that do as planned, and an oracle that says what must come of it, without the runner's code.

A plan is carried out twice over: by `Told`, a transport that only says what a process would have come to, on a clock that nobody waits for; and by `Scripted`, a filter that really
raises, hangs, dies or takes all memory, in a process of its own.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import struct
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from base_model.checkpoint import load_weights
from reward.safety.contract import PromptFilter, Reason, Ruling, SafetyRunner, Verdict, VideoFilter
from reward.safety.policy import Policy
from reward.safety.process import InProcess, Late, LatePromptFilter, LateVideoFilter
from reward.safety.transport import Failure, Limits, Request

Kind = str  # "prompt" or "clip"
CODES = ("P01", "P05", "P17", "Q01")
NOBODYS = "P99"  # no code of the policy
ANSWERS = "answers"
LATE = "answers too late"
GONE = ("killed for memory", "crashes", "exits at once", "writes garbage")  # only in a process of its own
HANGS = ("hangs", "hangs and keeps the interpreter")
RAISES = ("raises", "has no memory", "takes all memory", "finds the disk full", "exits", "interrupts")
ACTS = (*RAISES, *HANGS, *GONE)
WEIGHTS = ("missing weights", "truncated weights", "pickled weights")


@dataclass(frozen=True)
class Turn:
    """What a filter does when it is asked once."""

    act: str
    answer: Any  # what it returns about all items, if it returns
    more: int = 0  # by how many its answers are too many or, below 0, too few

    def about(self, rows: Sequence[int]) -> Any:
        """The answer about some of the items."""
        if not isinstance(self.answer, list | tuple):
            return self.answer
        told = [self.answer[row] for row in rows]
        return type(self.answer)(told[: len(told) + self.more] + told[:1] * self.more)


@dataclass(frozen=True)
class Step:
    """One filter of a plan."""

    id: str
    policies: tuple[str, ...]
    turns: tuple[Turn, ...]
    weights: str = ""  # what is wrong with the file it is built from


@dataclass(frozen=True)
class Plan:
    """Filters in the order in which they are asked, `turns` times about as many items."""

    kind: Kind
    items: int
    turns: int
    steps: tuple[Step, ...]


# What is planned

WRONG: dict[str, tuple[Any, ...]] = {
    "verdict": (0, 3, "ALLOW", None, True),
    "score": (math.nan, math.inf, -math.inf, -0.1, 1.5, "0.1", None, torch.tensor(0.1), [0.1], 0.5, 0.9),
    "threshold": (math.nan, None, "0.5", -1.0, 0.0),
    "policy": (NOBODYS, None, 17, ["P17"], ""),
    "reasons": (None, "because", ("because",), [Reason("because")], (Reason(None),), (Reason("because", span=5),), (Reason("because", start="0"),)),  # type: ignore[arg-type]
    "filter_id": (None, 5),
    "filter_version": (None, 5),
}
JUNK: tuple[Any, ...] = (None, True, 0, "allow", b"allow", {}, object, Verdict.ALLOW, math.nan)


def random_plan(rng: Random, policy: Policy) -> Plan:
    """Some filters with some faults: in a third of the plans none, in a third few, in a third many."""
    faults = rng.choice([0.0, 0.1, 0.5])
    items, turns = rng.randint(1, 3), rng.randint(1, 2)
    steps = []
    for number in range(rng.choices(range(5), (3, 27, 30, 25, 15))[0]):
        codes = tuple(rng.sample(CODES, rng.randint(1, 2)))
        if rng.random() < 0.05 * faults:
            codes = (*codes, NOBODYS)
        weights = rng.choice(WEIGHTS) if rng.random() < 0.1 * faults else ""
        steps.append(Step(f"filter-{number}", codes, tuple(_turn(rng, codes, items, policy, faults) for _ in range(turns)), weights))
    return Plan("clip" if rng.random() < 0.7 else "prompt", items, turns, tuple(steps))


def _turn(rng: Random, codes: tuple[str, ...], items: int, policy: Policy, faults: float) -> Turn:
    bad = rng.choice([0.05, 0.4])
    answer: Any = [_row(rng, codes, policy, faults, bad) for _ in range(items)]
    chance = rng.random()
    if chance < 0.25 * faults:
        return Turn(rng.choice(ACTS), answer)
    if chance < 0.3 * faults:
        return Turn(LATE, answer)
    if chance < 0.4 * faults:
        if rng.random() < 0.5:
            return Turn(ANSWERS, answer, rng.choice([-1, 1]))
        answer = rng.choice(({}, _ruling(rng, codes[0], 0.0), *JUNK))
    elif chance < 0.45 * faults:
        answer = tuple(answer)  # as good as a list
    return Turn(ANSWERS, answer)


def _row(rng: Random, codes: tuple[str, ...], policy: Policy, faults: float, bad: float) -> Any:
    """The rulings on one item."""
    if rng.random() < 0.05 * faults:
        return rng.choice(JUNK)
    row: list[Any] = [_ruling(rng, code, bad) for code in codes]
    row = [_spoilt(rng, each) if rng.random() < 0.15 * faults else each for each in row]
    if rng.random() < 0.1 * faults:
        row.insert(rng.randint(0, len(row)), rng.choice((*row, *JUNK)))  # a ruling twice, or none
    if rng.random() < 0.05 * faults:
        row.append(_ruling(rng, rng.choice([*CODES, NOBODYS]), bad))
    if rng.random() < 0.05 * faults:
        del row[rng.randrange(len(row))]
    return row


def _ruling(rng: Random, code: str, bad: float) -> Ruling:
    verdict = rng.choices((Verdict.REVIEW, Verdict.ERROR, Verdict.BLOCK), (5, 1, 4))[0] if rng.random() < bad else Verdict.ALLOW
    score = math.nan if verdict == Verdict.ERROR else rng.uniform(0, 0.499) if verdict == Verdict.ALLOW else rng.uniform(0.5, 1)
    return Ruling(verdict, code, score, (Reason("as planned", 0.0, None),), "planned", "1", 0.5)


def _spoilt(rng: Random, ruling: Ruling) -> Ruling:
    """The ruling with one field that is not what it should be."""
    name = rng.choice(list(WRONG))
    return replace(ruling, **{name: rng.choice(WRONG[name])})


def prompts_of(plan: Plan, turn: int) -> list[str]:
    """What is asked: the number of the turn and of the item."""
    return [f"{turn} {item}" for item in range(plan.items)]


def asked_of(step: Step, prompts: Sequence[str]) -> tuple[Turn, list[int]]:
    return step.turns[int(prompts[0].split()[0])], [int(prompt.split()[1]) for prompt in prompts]


# What must come of it

TYPES: dict[str, tuple[type, ...]] = {
    "verdict": (Verdict,),
    "policy": (str,),
    "score": (float, int),
    "threshold": (float, int),
    "filter_id": (str,),
    "filter_version": (str,),
}
WORST = ("block", "error", "review", "allow")


def expected(plan: Plan, turn: int, policy: Policy) -> list[str]:
    """The verdict on every item: block if anybody answered block about it; else allow or review only if every filter is proven to have answered in full and in time; else error."""
    nobody = set() if plan.steps else {"error"}
    said = [nobody.union(*(_said_of(step, turn, item, policy) for step in plan.steps)) for item in range(plan.items)]
    return [next(word for word in WORST if word in each) for each in said]


def _said_of(step: Step, turn: int, item: int, policy: Policy) -> set[str]:
    what = step.turns[turn]
    if step.weights or what.act not in (ANSWERS, LATE) or type(what.answer) not in (list, tuple) or what.more:
        return {"error"}
    row = what.answer[item]
    if type(row) not in (list, tuple):
        return {"error"}
    said = {"block"} if any(type(each) is Ruling and each.verdict is Verdict.BLOCK for each in row) else set()
    proven = what.act == ANSWERS and len(row) > 0 and all(_is_sound(each, policy) for each in row) and Counter(each.policy for each in row) == Counter(step.policies)
    return said | ({each.verdict.name.lower() for each in row} if proven else {"error"})


def _is_sound(ruling: Any, policy: Policy) -> bool:
    if type(ruling) is not Ruling or not all(type(getattr(ruling, name)) in types for name, types in TYPES.items()):
        return False
    reasons = type(ruling.reasons) is tuple and all(type(each) is Reason and type(each.text) is str and type(each.start) in (float, int, type(None)) for each in ruling.reasons)
    if not reasons or any(each.span is not None and type(each.span) is not tuple for each in ruling.reasons) or ruling.policy not in [rule.code for rule in policy.rules]:
        return False
    if ruling.verdict is Verdict.ERROR:
        return True
    below = ruling.score < ruling.threshold or next(rule.action for rule in policy.rules if rule.code == ruling.policy) == "allow"
    return bool(0.0 <= ruling.score <= 1.0 and (below or ruling.verdict is not Verdict.ALLOW))


# Carried out on a clock that nobody waits for


class Clock:
    """Seconds that pass when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Told:
    """The transport of a plan: it says what would have come of each turn."""

    step: Step
    limits: Limits
    clock: Clock

    def ask(self, request: Request) -> object:
        turn, rows = asked_of(self.step, request.prompts)
        if self.step.weights:
            return Failure(self.step.weights)
        self.clock.now += 2 * (self.limits.seconds + self.limits.starting) if turn.act in (LATE, *HANGS) else 0.01
        if turn.act == "exits":
            raise OSError("a transport that breaks")
        return turn.about(rows) if turn.act in (ANSWERS, LATE) else Failure(turn.act)

    def close(self) -> None:
        """Nothing was started."""


# Carried out in processes


class Scripted:
    """A filter that does as planned."""

    version, threshold = "1", 0.5

    def __init__(self, step: Step) -> None:
        self.id, self.policies, self._step = step.id, step.policies, step

    def _answer(self, prompts: Sequence[str]) -> Any:
        turn, rows = asked_of(self._step, prompts)
        if turn.act != ANSWERS:
            act(turn.act)
        return turn.about(rows)


class ScriptedPrompts(Scripted):
    def check_prompts(self, prompts: Sequence[str]) -> list[list[Ruling]]:
        answer: list[list[Ruling]] = self._answer(prompts)
        return answer


class ScriptedClips(Scripted):
    def check_videos(self, video: Tensor, prompts: Sequence[str], fps: float) -> list[list[Ruling]]:
        answer: list[list[Ruling]] = self._answer(prompts)
        return answer


def built_from(weights: Path, make: Callable[[Step], Any], step: Step) -> Any:
    """A scripted filter, once its file of weights was read."""
    load_weights(weights)
    return make(step)


def act(what: str) -> None:
    """Goes wrong as it is called. `LATE` and what hangs last half a minute."""
    if what == "raises":
        raise RuntimeError("as planned")
    if what == "has no memory":
        raise MemoryError
    if what == "takes all memory":
        held: list[Tensor] = []
        while len(held) < 1 << 12:  # 256 GiB: the limit comes first
            held.append(torch.ones(1 << 24))
    if what == "finds the disk full":
        with open("/dev/full", "w") as file:
            file.write("as planned")
    if what == "exits":
        raise SystemExit(0)
    if what == "interrupts":
        raise KeyboardInterrupt
    if what in ("hangs", LATE):
        time.sleep(30)
    if what == "hangs and keeps the interpreter":
        ctypes.PyDLL(None).sleep(30)
    if what == "killed for memory":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "exits at once":
        os._exit(0)
    if what == "writes garbage":
        _shout()


def _shout() -> None:
    """Writes onto whatever leads to the process that asked."""
    for name in os.listdir("/proc/self/fd"):
        with_target = Path("/proc/self/fd") / name
        target = os.readlink(with_target) if with_target.is_symlink() else ""
        if "safety-answer" in target:
            os.pwrite(int(name), b'{"call": 1, "answer": [[{"verdict": "ALLOW"', 0)
        if target.startswith("socket:"):
            os.write(int(name), struct.pack("<Q", 1 << 40))
    time.sleep(30)


def filters_of(plan: Plan, weights: dict[str, Path] | None = None) -> list[PromptFilter | VideoFilter]:
    """The scripted filters of a plan; `weights` has a file for each of WEIGHTS."""
    make, late = (ScriptedPrompts, LatePromptFilter) if plan.kind == "prompt" else (ScriptedClips, LateVideoFilter)
    filters: list[Any] = []
    for step in plan.steps:
        if step.weights and weights:
            kind: type[Late] = late
            filters.append(kind(partial(built_from, weights[step.weights], make, step), step.id, Scripted.version, Scripted.threshold, step.policies))
        else:
            filters.append(make(step))
    return filters


def verdicts(runner: SafetyRunner, plan: Plan, turn: int, *, cascade: bool = False) -> list[str]:
    """What the runner makes of one turn of a plan."""
    prompts = prompts_of(plan, turn)
    if plan.kind == "prompt":
        decisions = runner.cascade_prompts(prompts) if cascade else runner.check_prompts(prompts)
    else:
        video = torch.full((plan.items, 1, 3, 2, 2), 0.5)
        decisions = runner.cascade_videos(video, prompts, 12.0) if cascade else runner.check_videos(video, prompts, 12.0)
    return [decision.verdict.name.lower() for decision in decisions]


@dataclass
class Tally:
    """What came of plans."""

    cases: int = 0  # verdicts
    verdicts: Counter[str] = field(default_factory=Counter)
    allowed_under_fault: int = 0  # allowed, where not every filter answered as it should
    disagreements: int = 0  # with the oracle, whatever they are

    def add(self, runner: SafetyRunner, plan: Plan, policy: Policy) -> None:
        """Carries a plan out, by all filters and as a cascade."""
        for turn in range(plan.turns):
            wanted = expected(plan, turn, policy)
            for cascade in (False, True):
                for found, right in zip(verdicts(runner, plan, turn, cascade=cascade), wanted, strict=True):
                    self.cases += 1
                    self.verdicts[right] += 1
                    self.disagreements += found != right
                    self.allowed_under_fault += found == "allow" and right == "error"


def told_runner(plan: Plan, policy: Policy, clock: Clock) -> SafetyRunner:
    """A runner that asks nobody: transports say what is planned."""
    steps = {step.id: step for step in plan.steps}
    return SafetyRunner(filters_of(plan), policy, transport=lambda each, limits: Told(steps[each.id], limits, clock), clock=clock)


def real_runner(plan: Plan, policy: Policy, weights: dict[str, Path], *, seconds: float = 2.0, memory: int = 512 << 20) -> SafetyRunner:
    """A runner that asks processes."""
    limits = Limits(seconds, memory=memory, restarts=10)
    return SafetyRunner(filters_of(plan, weights), policy, limits={step.id: limits for step in plan.steps}, transport=InProcess)


def broken_weights(folder: Path) -> dict[str, Path]:
    """One file for each of WEIGHTS, made in `folder`. The pickle would write a file beside itself when it is opened."""
    from base_model.checkpoint import weights_bytes

    files = {name: folder / f"{name.replace(' ', '-')}.safetensors" for name in WEIGHTS}
    files["truncated weights"].write_bytes(weights_bytes({"a": torch.zeros(64)}, {})[:-40])
    opened = f"cposix\nsystem\n(S'touch {folder / 'opened'}'\ntR."
    files["pickled weights"].write_bytes(b"\x80\x02" + opened.encode())
    return files

"""Whatever goes wrong with filters, nothing is allowed that they did not all allow: planned faults, and an oracle that says what must come of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from recipes.bench._filter_faults import ACTS, ANSWERS, LATE, WEIGHTS, Clock, Plan, Scripted, Step, Tally, Turn, broken_weights, expected, random_plan, real_runner, told_runner
from reward.safety.contract import Reason, Ruling, SafetyRunner, Verdict, allowed
from reward.safety.duplicate import DuplicateFilter, block
from reward.safety.policy import load_policy
from reward.safety.prompt import WordFilter
from reward.safety.transport import InThread
from reward.safety.video import DegenerateFilter, FlashFilter

POLICY = load_policy()
ALLOW = Ruling(Verdict.ALLOW, "P17", 0.1, (Reason("as planned"),), "planned", "1", 0.5)
BLOCK = replace(ALLOW, verdict=Verdict.BLOCK, score=0.9)


def told(plans: int, runner_of: Callable[[Plan], SafetyRunner]) -> Tally:
    tally = Tally()
    for seed in range(plans):
        plan = random_plan(Random(seed), POLICY)
        tally.add(runner_of(plan), plan, POLICY)
    return tally


def test_ten_thousand_random_plans_are_decided_as_the_oracle_says() -> None:
    tally = told(10_000, lambda plan: told_runner(plan, POLICY, Clock()))
    print(tally)
    assert tally.cases > 50_000 and tally.allowed_under_fault == tally.disagreements == 0
    assert all(tally.verdicts[word] > 5_000 for word in ("allow", "review", "error", "block"))


class FailsOpen(SafetyRunner):
    """What the field's reference guardrail does: a filter that fails has nothing to say against."""

    def _errors(self, *told: Any) -> list[Ruling]:
        return [replace(each, verdict=Verdict.ALLOW, score=0.0) for each in super()._errors(*told)]


class ForgetsBlocks(SafetyRunner):
    """One error, and all is an error."""

    def _checked(self, *told: Any) -> list[Ruling]:
        rulings = super()._checked(*told)
        return [each for each in rulings if each.verdict == Verdict.ERROR] or rulings


@pytest.mark.parametrize(("wrong", "opens"), [(FailsOpen, True), (ForgetsBlocks, False)])
def test_plans_find_a_runner_that_is_wrong(wrong: type[SafetyRunner], opens: bool) -> None:
    def runner(plan: Plan) -> SafetyRunner:
        made = told_runner(plan, POLICY, Clock())
        made.__class__ = wrong
        return made

    tally = told(300, runner)
    assert tally.disagreements > 20 and (tally.allowed_under_fault > 20) == opens


def test_the_oracle_wants_a_proof_for_an_allow_and_believes_every_block() -> None:
    def verdict(*turns: Turn, policies: tuple[str, ...] = ("P17",), weights: str = "") -> str:
        return expected(Plan("clip", 1, 1, tuple(Step(f"f{i}", policies, (turn,), weights) for i, turn in enumerate(turns))), 0, POLICY)[0]

    good, bad, late = Turn(ANSWERS, [[ALLOW]]), Turn(ANSWERS, [[BLOCK]]), Turn(LATE, [[ALLOW]])
    assert verdict() == "error" and verdict(good) == verdict(good, good) == "allow" and verdict(good, bad) == "block"
    assert verdict(late) == verdict(good, Turn("raises", [[ALLOW]])) == verdict(good, weights=WEIGHTS[0]) == "error"
    assert verdict(Turn("raises", [[BLOCK]])) == "error" and verdict(Turn(LATE, [[BLOCK]])) == verdict(bad, late) == "block"
    assert verdict(Turn(ANSWERS, [[ALLOW, ALLOW]])) == verdict(good, policies=("P17", "Q01")) == verdict(Turn(ANSWERS, [[]])) == "error"
    assert verdict(Turn(ANSWERS, [[replace(ALLOW, score=0.5)]])) == verdict(Turn(ANSWERS, [[replace(ALLOW, score=math.nan)]])) == "error"


# Processes


@pytest.fixture
def weights(tmp_path: Path) -> dict[str, Path]:
    return broken_weights(tmp_path)


def check_real(plans: Sequence[Plan], weights: dict[str, Path]) -> Tally:
    tally = Tally()
    for plan in plans:
        runner = real_runner(plan, POLICY, weights)
        tally.add(runner, plan, POLICY)
        runner.close()
    print(tally)
    assert tally.allowed_under_fault == tally.disagreements == 0
    assert not (weights["pickled weights"].parent / "opened").exists()
    return tally


def test_every_fault_in_a_real_process_is_an_error_a_block_beside_it_stays_and_the_next_batch_is_judged(weights: dict[str, Path]) -> None:
    good, bad = Turn(ANSWERS, [[ALLOW], [ALLOW]]), Turn(ANSWERS, [[ALLOW], [BLOCK]])
    plans = [Plan("clip", 2, 1, (Step("broken", ("P17",), (good,), what), Step("good", ("P17",), (bad,)))) for what in WEIGHTS]
    for number, what in enumerate((*ACTS, LATE)):
        faulty, other = Step("faulty", ("P17",), (Turn(what, [[ALLOW], [ALLOW]]), good)), Step("good", ("P17",), (bad, good))
        plans.append(Plan("prompt" if number % 2 else "clip", 2, 2, (faulty, other) if number % 3 else (other, faulty)))
    tally = check_real(plans, weights)
    assert tally.verdicts == {"error": 2 * len(plans), "block": 2 * len(plans), "allow": 4 * (len(ACTS) + 1)}


@pytest.mark.slow
def test_two_hundred_random_plans_in_real_processes_are_decided_as_the_oracle_says(weights: dict[str, Path]) -> None:
    tally = check_real([random_plan(Random(seed), POLICY) for seed in range(200)], weights)
    assert all(tally.verdicts[word] > 100 for word in ("allow", "review", "error", "block"))


# The filters that come with the package

GREY = torch.linspace(0.2, 0.6, 32).expand(1, 9, 3, 32, 32).contiguous()
BLOCKED = [block("blocked", "P05", torch.rand(9, 3, 32, 32, generator=torch.Generator().manual_seed(0)), 12.0)]


class Faulty:
    """A filter that comes with the package, with a fault in what it answers."""

    def __init__(self, inner: Any, spoil: Callable[[Any], Any]) -> None:
        self.id, self.version, self.threshold, self.policies = inner.id, inner.version, inner.threshold, inner.policies
        self._inner, self._spoil = inner, spoil


class FaultyPrompts(Faulty):
    def check_prompts(self, prompts: Sequence[str]) -> list[list[Ruling]]:
        answer: list[list[Ruling]] = self._spoil(self._inner.check_prompts(prompts))
        return answer


class FaultyClips(Faulty):
    def check_videos(self, video: Tensor, prompts: Sequence[str], fps: float) -> list[list[Ruling]]:
        answer: list[list[Ruling]] = self._spoil(self._inner.check_videos(video, prompts, fps))
        return answer


def with_error(error: BaseException) -> Callable[[Any], Any]:
    def spoil(answer: Any) -> Any:
        raise error

    return spoil


def in_first(**fields: Any) -> Callable[[Any], Any]:
    return lambda answer: [[replace(rulings[0], **fields), *rulings[1:]] for rulings in answer]


def full_disk(answer: Any) -> Any:
    with open("/dev/full", "w") as file:
        file.write("x")


SPOIL: dict[str, Callable[[Any], Any]] = {
    "exception": with_error(RuntimeError("boom")),
    "out of memory": with_error(MemoryError()),
    "exit": with_error(SystemExit(0)),
    "full disk": full_disk,
    "nan": in_first(score=math.nan),
    "text for a score": in_first(score="0.1"),
    "nothing for a verdict": in_first(verdict=None),
    "an allow above its threshold": in_first(score=0.9, verdict=Verdict.ALLOW),
    "no threshold": in_first(threshold=None),
    "a policy that cannot be hashed": in_first(policy=["P17"]),
    "reasons that are none": in_first(reasons=5),
    "too few answers": lambda answer: answer[1:],
    "too many answers": lambda answer: [*answer, answer[0]],
    "a ruling too few": lambda answer: [rulings[1:] for rulings in answer],
    "a ruling twice": lambda answer: [[rulings[0], *rulings] for rulings in answer],
    "nothing": lambda answer: None,
}


@pytest.mark.parametrize("fault", SPOIL)
def test_every_fault_on_every_filter_in_every_order_is_never_an_allow(fault: str) -> None:
    clips: list[Any] = [FlashFilter(POLICY), DegenerateFilter(POLICY), DuplicateFilter(POLICY, BLOCKED)]
    assert allowed(SafetyRunner(clips, POLICY).check_videos(GREY, ["x"], 12.0)[0])
    for at, order in itertools.product(range(3), itertools.permutations(range(3))):
        each = [FaultyClips(clips[i], SPOIL[fault]) if i == at else clips[i] for i in order]
        runner = SafetyRunner(each, POLICY)
        for decisions in (runner.check_videos(GREY, ["x"], 12.0), runner.cascade_videos(GREY, ["x"], 12.0)):
            assert [decision.verdict for decision in decisions] == [Verdict.ERROR]
    words = SafetyRunner([FaultyPrompts(WordFilter(POLICY, ["en"]), SPOIL[fault])], POLICY)
    assert [decision.verdict for decision in words.check_prompts(["a red circle"]) + words.cascade_prompts(["a red circle"])] == [Verdict.ERROR] * 2


def test_a_cascade_asks_the_fastest_first_and_no_further_than_a_block() -> None:
    asked: list[str] = []
    clock = Clock()

    class Timed(Scripted):
        def __init__(self, name: str, seconds: float) -> None:
            self.id, self.policies, self.seconds = name, ("P17",), seconds

        def check_videos(self, video: Tensor, prompts: Sequence[str], fps: float) -> list[list[Ruling]]:
            asked.append(f"{self.id} {' '.join(prompts)}")
            clock.now += self.seconds * len(prompts)
            return [[BLOCK if prompt == "bad" else ALLOW] for prompt in prompts]

    runner = SafetyRunner([Timed("slow", 5.0), Timed("fast", 1.0)], POLICY, transport=InThread, clock=clock)
    video = GREY.expand(2, -1, -1, -1, -1)
    whole = runner.check_videos(video, ["good", "bad"], 12.0)
    served = runner.cascade_videos(video, ["good", "bad"], 12.0)
    assert asked == ["slow good bad", "fast good bad", "fast good bad", "slow good"]
    assert [each.verdict for each in served] == [each.verdict for each in whole] == [Verdict.ALLOW, Verdict.BLOCK]
    assert [len(each.rulings) for each in served] == [2, 1] and [len(each.rulings) for each in whole] == [2, 2]

"""What a safety filter says, how several filters become one decision, and the runner that never turns a failure into an "allow".

    allow < review < error < block

The decision about a prompt or a clip is the worst of its rulings, so a block stays a block whatever else fails. Only `allow` is served, stored as good
or trained on as good. A filter that raises, hangs, answers with nan, with too few rulings or for other policies than it declared has erred; so have an
empty list of filters and a clip without frames or with pixels that are no numbers.

Filters run in this process, in a worker thread with a time limit. A filter that never gives the interpreter back cannot be timed out here.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from base_model.errors import GuardStop
from reward.safety.policy import Action, Policy

RUNNER_ID = "runner"
INPUT_POLICY = "input"  # the code of rulings about an input no filter could judge
PIXEL_SLACK = 0.01


class Verdict(IntEnum):
    """Ordered: the larger, the worse."""

    ALLOW = 0
    REVIEW = 1
    ERROR = 2
    BLOCK = 3


VERDICT_OF: dict[Action, Verdict] = {"allow": Verdict.ALLOW, "review": Verdict.REVIEW, "block": Verdict.BLOCK}


@dataclass(frozen=True)
class Reason:
    """Why, and where in the clip (seconds; None for a prompt or for the whole clip) or in the prompt (from its first character to after its last)."""

    text: str
    start: float | None = None
    end: float | None = None
    span: tuple[int, int] | None = None


@dataclass(frozen=True)
class Ruling:
    """What one filter says about one prompt or clip under one policy. `score` grades it from 0 to 1, with the filter's own limit at `threshold`; nan where unknown."""

    verdict: Verdict
    policy: str  # a code of policy.yaml
    score: float
    reasons: tuple[Reason, ...]
    filter_id: str
    filter_version: str
    threshold: float  # of the score
    policy_version: str = ""  # the runner fills in the last two
    seconds: float = math.nan  # the filter's time for the batch


@dataclass(frozen=True)
class Decision:
    """All rulings about one prompt or clip."""

    rulings: tuple[Ruling, ...]

    @property
    def verdict(self) -> Verdict:
        """The worst ruling; no ruling at all is an error."""
        return max((ruling.verdict for ruling in self.rulings), default=Verdict.ERROR)


class SafetyFilter(Protocol):
    """What every filter declares. It rules on each of `policies` once per prompt or clip."""

    @property
    def id(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def threshold(self) -> float: ...
    @property
    def policies(self) -> tuple[str, ...]: ...


@runtime_checkable
class PromptFilter(SafetyFilter, Protocol):
    """A filter that reads prompts."""

    def check_prompts(self, prompts: Sequence[str]) -> list[list[Ruling]]:
        """One list of rulings a prompt."""
        ...


@runtime_checkable
class VideoFilter(SafetyFilter, Protocol):
    """A filter that looks at clips (and may read what they were asked to show)."""

    def check_videos(self, video: Tensor, prompts: Sequence[str], fps: float) -> list[list[Ruling]]:
        """video [B,T,3,H,W] in [0,1], B prompts, frames a second -> one list of rulings a clip."""
        ...


def allowed(decision: Decision) -> bool:
    """Whether the clip may be served, or enter a positive set."""
    return decision.verdict == Verdict.ALLOW


def cost(decision: Decision, policy: str) -> float:
    """The graded cost of one policy in [0, 1]: the largest score of its rulings, for allow, review and block alike.

    nan where the decision is an error, and where the clip is blocked for something else while this policy's filter failed. A block without a score costs 1.
    Raises ValueError where no filter rules on the policy.
    """
    if decision.verdict == Verdict.ERROR:
        return math.nan
    rulings = [ruling for ruling in decision.rulings if ruling.policy == policy]
    if not rulings:
        raise ValueError(f"no filter ruled on policy {policy}")
    if any(ruling.verdict == Verdict.BLOCK and math.isnan(ruling.score) for ruling in rulings):
        return 1.0
    return max((ruling.score for ruling in rulings if ruling.verdict != Verdict.ERROR), default=math.nan)


def costs(decisions: Iterable[Decision], policy: str) -> Tensor:
    """`cost` of B decisions, float32 [B]."""
    return torch.tensor([cost(decision, policy) for decision in decisions], dtype=torch.float32)


def check_error_rate(decisions: Sequence[Decision], limit: float) -> None:
    """Raises GuardStop where more than `limit` of the decisions are errors: a filter that does not answer must not look like a safe world."""
    failures = [ruling for d in decisions if d.verdict == Verdict.ERROR for ruling in d.rulings if ruling.verdict == Verdict.ERROR]
    causes = Counter(ruling.reasons[0].text if ruling.reasons else ruling.filter_id for ruling in failures)
    failed = sum(d.verdict == Verdict.ERROR for d in decisions)
    if failed > limit * len(decisions):
        cause = causes.most_common(1)[0][0] if causes else "no filter ruled"
        raise GuardStop(f"safety filters failed on {failed} of {len(decisions)} clips (limit {limit:.1%}), most often: {cause}. Mend the filter, then go on with --resume")


def to_json(decision: Decision) -> dict[str, object]:
    """Plain values for a table or a report; unknown scores are None. The wall-clock time is left out, so equal decisions read equal."""
    return {
        "verdict": decision.verdict.name.lower(),
        "rulings": [
            {
                "verdict": ruling.verdict.name.lower(),
                "policy": ruling.policy,
                "score": None if math.isnan(ruling.score) else round(ruling.score, 6),
                "reasons": [{"text": reason.text, "start": reason.start, "end": reason.end, "span": reason.span and list(reason.span)} for reason in ruling.reasons],
                "filter": f"{ruling.filter_id} {ruling.filter_version}",
                "threshold": ruling.threshold,
                "policy_version": ruling.policy_version,
            }
            for ruling in decision.rulings
        ],
    }


class SafetyRunner:
    """Asks every filter, checks what comes back, and counts.

    filters: any mix of `PromptFilter` and `VideoFilter`; anything else is a ValueError. timeout: seconds a filter may take for one batch.
    `counts` holds plain numbers under names such as `clip.checked`, `clip.block`, `clip.P17.block`, `clip.error: flash: timed out`; a run that resumes puts the
    saved ones back with `counts.update(...)`.
    """

    def __init__(self, filters: Sequence[PromptFilter | VideoFilter], policy: Policy, *, timeout: float = 60.0) -> None:
        for each in filters:
            if not isinstance(each, PromptFilter | VideoFilter):
                raise ValueError(f"{type(each).__name__} is neither a prompt filter nor a video filter")
        self._prompt_filters = [each for each in filters if isinstance(each, PromptFilter)]
        self._video_filters = [each for each in filters if isinstance(each, VideoFilter)]
        self._policy = policy
        self._timeout = timeout
        self._worker = _Worker()
        self.counts: Counter[str] = Counter()

    def lineage(self) -> list[dict[str, object]]:
        """Filter ids, versions, thresholds and the policy version, for the record of a run."""
        filters: list[SafetyFilter] = [*self._prompt_filters, *(each for each in self._video_filters if not isinstance(each, PromptFilter))]
        return [
            {"filter": each.id, "version": each.version, "threshold": each.threshold, "policies": list(each.policies), "policy_version": self._policy.version} for each in filters
        ]

    @property
    def clip_filters(self) -> str:
        """What looks at clips, with versions: "degenerate 1, flash 2"."""
        return ", ".join(sorted(f"{each.id} {each.version}" for each in self._video_filters))

    def check_prompts(self, prompts: Sequence[str]) -> list[Decision]:
        """One decision a prompt."""
        rulings: list[list[Ruling]] = [[] for _ in prompts]
        for each in self._prompt_filters:
            _extend(rulings, self._ask(each, lambda each=each: each.check_prompts(list(prompts)), len(prompts)))  # type: ignore[misc]
        return self._count("prompt", [self._decide(each, "no prompt filter is configured") for each in rulings])

    def check_videos(self, video: Tensor, prompts: Sequence[str], fps: float) -> list[Decision]:
        """video [B,T,3,H,W] in [0,1] with B prompts -> B decisions. Raises ValueError where the numbers of clips and prompts differ."""
        if video.ndim == 0 or len(video) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts for a video tensor of shape {list(video.shape)}")
        faults = _faults(video, fps)
        rulings = [[self._input_error(fault)] if fault else [] for fault in faults]
        good = [i for i, fault in enumerate(faults) if not fault]
        if good:
            clips, texts = video.detach()[good] if len(good) < len(video) else video.detach(), [prompts[i] for i in good]
            for each in self._video_filters:
                answers = self._ask(each, lambda each=each: each.check_videos(clips.clone(), list(texts), fps), len(good))  # type: ignore[misc]
                for i, answer in zip(good, answers, strict=True):
                    rulings[i].extend(answer)
        return self._count("clip", [self._decide(each, "no video filter is configured") for each in rulings])

    def _ask(self, each: SafetyFilter, call: Callable[[], object], count: int) -> list[list[Ruling]]:
        """The filter's rulings, with an error ruling wherever it did not answer as it should."""
        start = time.perf_counter()
        try:
            answer = self._worker.call(call, self._timeout)
        except _TimedOut:
            self._worker = _Worker()
            answer = _Failure(f"timed out after {self._timeout:g} s")
        seconds = time.perf_counter() - start
        if not isinstance(answer, _Failure) and not (isinstance(answer, list | tuple) and len(answer) == count):
            answer = _Failure(f"wrong number of answers, {len(answer)} for {count}" if isinstance(answer, list | tuple) else f"answered with a {type(answer).__name__}")
        if isinstance(answer, _Failure):
            return [self._errors(each, each.policies, answer.text, seconds) for _ in range(count)]
        return [self._checked(each, rulings, seconds) for rulings in answer]

    def _checked(self, each: SafetyFilter, rulings: object, seconds: float) -> list[Ruling]:
        """Rulings about one clip: stamped, with an error for each that is missing or makes no sense. A block is kept in any case."""
        if not isinstance(rulings, list | tuple):
            return self._errors(each, each.policies, f"answered with a {type(rulings).__name__}", seconds)
        kept: list[Ruling] = []
        for ruling in rulings:
            if not isinstance(ruling, Ruling):
                kept += self._errors(each, each.policies, f"a ruling is a {type(ruling).__name__}", seconds)
                continue
            fault = self._fault(each, ruling)
            if not fault or ruling.verdict == Verdict.BLOCK:
                kept.append(replace(ruling, policy_version=self._policy.version, seconds=seconds))
            if fault:
                kept += self._errors(each, (ruling.policy,), fault, seconds)
        missing = [code for code in each.policies if code not in {ruling.policy for ruling in kept}]
        if missing or not kept:
            kept += self._errors(each, missing or (INPUT_POLICY,), "a ruling is missing", seconds)
        return kept

    def _fault(self, each: SafetyFilter, ruling: Ruling) -> str:
        """What is wrong with a ruling, or an empty string."""
        if not isinstance(ruling.verdict, Verdict):
            return "the verdict is unknown"
        if ruling.policy not in each.policies:
            return "a ruling on a policy the filter did not declare"
        if ruling.policy not in self._policy:
            return "the policy is unknown"
        if ruling.verdict != Verdict.ERROR and not (isinstance(ruling.score, float | int) and 0 <= ruling.score <= 1):
            return "the score is no probability"
        if ruling.verdict == Verdict.ALLOW and not ruling.score < ruling.threshold and self._policy.action(ruling.policy) != "allow":
            return "an allow with a score at or above the threshold"
        return ""

    def _errors(self, each: SafetyFilter, codes: Iterable[str], text: str, seconds: float) -> list[Ruling]:
        reason = (Reason(f"{each.id}: {text}"),)
        return [Ruling(Verdict.ERROR, code, math.nan, reason, each.id, each.version, each.threshold, self._policy.version, seconds) for code in codes or (INPUT_POLICY,)]

    def _input_error(self, text: str) -> Ruling:
        return Ruling(Verdict.ERROR, INPUT_POLICY, math.nan, (Reason(f"{RUNNER_ID}: {text}"),), RUNNER_ID, "1", 0.5, self._policy.version, 0.0)

    def _decide(self, rulings: list[Ruling], if_none: str) -> Decision:
        return Decision(tuple(rulings) or (self._input_error(if_none),))

    def _count(self, kind: str, decisions: list[Decision]) -> list[Decision]:
        for decision in decisions:
            self.counts[f"{kind}.checked"] += 1
            self.counts[f"{kind}.{decision.verdict.name.lower()}"] += 1
            self.counts.update({f"{kind}.{ruling.policy}.{ruling.verdict.name.lower()}" for ruling in decision.rulings if ruling.verdict != Verdict.ALLOW})
            self.counts.update({f"{kind}.error: {reason.text}" for ruling in decision.rulings if ruling.verdict == Verdict.ERROR for reason in ruling.reasons})
        return decisions


@dataclass(frozen=True)
class _Failure:
    text: str


class _Call(NamedTuple):
    function: Callable[[], object]
    answer: queue.SimpleQueue[object]  # its own, so that an interrupted wait leaves nothing for the next caller


class _TimedOut(Exception):
    pass


class _Worker:
    """One daemon thread that runs calls in turn. After a timeout it is left behind; it ends when its call does, and its answer is heard by nobody."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def call(self, function: Callable[[], object], timeout: float) -> object:
        """The function's answer, or a `_Failure` for anything it raised. Raises _TimedOut."""
        if self._thread is None:
            self._thread = threading.Thread(target=_serve, args=(self._calls,), name="safety-filter", daemon=True)
            self._thread.start()
        call = _Call(function, queue.SimpleQueue())
        self._calls.put(call)
        try:
            return call.answer.get(timeout=timeout)
        except queue.Empty:
            self._calls.put(None)
            raise _TimedOut from None

    def __del__(self) -> None:
        self._calls.put(None)


def _serve(calls: queue.SimpleQueue[_Call | None]) -> None:
    while (call := calls.get()) is not None:
        try:
            call.answer.put(call.function())
        except BaseException as error:  # a filter may raise anything, SystemExit included
            call.answer.put(_Failure(f"{type(error).__name__}: {error}"[:200]))
        del call


def _extend(rulings: list[list[Ruling]], answers: list[list[Ruling]]) -> None:
    for mine, answer in zip(rulings, answers, strict=True):
        mine.extend(answer)


def _faults(video: Tensor, fps: float) -> list[str]:
    """Per clip, why it cannot be judged; an empty string where it can."""
    if video.ndim != 5 or video.shape[2] != 3 or not video.is_floating_point():
        return [f"not a clip of floats [T,3,H,W]: {video.dtype} {list(video.shape[1:])}"] * len(video)
    if 0 in video.shape[1:]:
        return ["the clip has no frames or no pixels"] * len(video)
    if not (math.isfinite(fps) and fps > 0):
        return [f"the frame rate is {fps}"] * len(video)
    flat = video.detach().flatten(1)  # [B,T*3*H*W]
    low, high = flat.amin(1), flat.amax(1)  # nan wins both
    finite = (torch.isfinite(low) & torch.isfinite(high)).tolist()
    inside = ((low >= -PIXEL_SLACK) & (high <= 1 + PIXEL_SLACK)).tolist()
    return ["nan or infinite pixels" if not f else "" if i else "pixels outside [0, 1]" for f, i in zip(finite, inside, strict=True)]

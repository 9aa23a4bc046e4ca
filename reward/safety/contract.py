"""What a safety filter says, how several filters become one decision, and the runner that never turns a failure into an "allow".

    allow < review < error < block

The decision about a prompt or a clip is the worst of its rulings, so a block stays a block whatever else fails. Only `allow` is served, stored as good
or trained on as good. A filter that raises, hangs, dies, answers with nan, with too few rulings, twice on one policy or for other policies than it declared has erred; so have an
empty list of filters and a clip without frames or with pixels that are no numbers.

Each filter is asked through a transport of its own (`transport.py`): a worker thread by default, a process of its own with a limit on memory if asked for (`process.py`).
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from base_model.errors import GuardStop
from reward.safety.policy import Action, Policy
from reward.safety.transport import Failure, InThread, Limits, Request, Transport, Unreadable, failure_of

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
    """Asks filters, checks what comes back, and counts.

    filters: any mix of `PromptFilter` and `VideoFilter`; anything else is a ValueError. limits: of filters by their ids; the others have `timeout` seconds for one batch.
    transport: `InThread`, or `InProcess` of `process.py`, or any function of a filter and its limits. clock: seconds, by which a late answer is no answer.
    `counts` holds plain numbers under names such as `clip.checked`, `clip.block`, `clip.P17.block`, `clip.error: flash: timed out`; a run that resumes puts the
    saved ones back with `counts.update(...)`.
    """

    def __init__(
        self,
        filters: Sequence[PromptFilter | VideoFilter],
        policy: Policy,
        *,
        timeout: float = 60.0,
        limits: Mapping[str, Limits] | None = None,
        transport: Callable[[SafetyFilter, Limits], Transport] = InThread,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        kinds = [(isinstance(each, PromptFilter), isinstance(each, VideoFilter)) for each in filters]
        for each, kind in zip(filters, kinds, strict=True):
            if not any(kind):
                raise ValueError(f"{type(each).__name__} is neither a prompt filter nor a video filter")
        limits = limits or {}
        unknown = sorted(set(limits) - {each.id for each in filters})
        if unknown:
            raise ValueError(f"limits for {unknown[0]}, which is no filter here")
        asked = [_Asked(each, chosen := limits.get(each.id, Limits(timeout)), transport(each, chosen)) for each in filters]
        self._prompt_filters = [each for each, (reads, _) in zip(asked, kinds, strict=True) if reads]
        self._video_filters = [each for each, (_, looks) in zip(asked, kinds, strict=True) if looks]
        self._asked, self._policy, self._clock = asked, policy, clock
        self.counts: Counter[str] = Counter()

    def lineage(self) -> list[dict[str, object]]:
        """Filter ids, versions, thresholds and the policy version, for the record of a run."""
        filters = [each.filter for each in (*self._prompt_filters, *(each for each in self._video_filters if each not in self._prompt_filters))]
        return [
            {"filter": each.id, "version": each.version, "threshold": each.threshold, "policies": list(each.policies), "policy_version": self._policy.version} for each in filters
        ]

    @property
    def clip_filters(self) -> str:
        """What looks at clips, with versions: "degenerate 1, flash 2"."""
        return ", ".join(sorted(f"{each.filter.id} {each.filter.version}" for each in self._video_filters))

    @property
    def clip_policies(self) -> set[str]:
        """Policies that some filter rules on in clips, and under which a hit is not simply allowed."""
        return {code for each in self._video_filters for code in each.filter.policies if code in self._policy and self._policy.action(code) != "allow"}

    @property
    def clip_rulers(self) -> set[tuple[str, str]]:
        """What looks at clips as a stored decision names it (`to_json`): ("flash 2", the policy's version)."""
        return {(f"{each.filter.id} {each.filter.version}", self._policy.version) for each in self._video_filters}

    def close(self) -> None:
        """Ends the threads and processes of the filters; they are begun anew when they are asked again."""
        for each in self._asked:
            each.transport.close()

    def check_prompts(self, prompts: Sequence[str]) -> list[Decision]:
        """One decision a prompt, by all filters: for training and audits."""
        return self._prompts(prompts, cascade=False)

    def check_videos(self, video: Tensor, prompts: Sequence[str], fps: float) -> list[Decision]:
        """video [B,T,3,H,W] in [0,1] with B prompts -> B decisions, by all filters: for training and audits. Raises ValueError where the numbers of clips and prompts differ."""
        return self._videos(video, prompts, fps, cascade=False)

    def cascade_prompts(self, prompts: Sequence[str]) -> list[Decision]:
        """The same verdicts, for serving: filters are asked from the fastest so far to the slowest, and a blocked prompt is shown to no further one, so its decision lacks the
        rulings of those. Costs need all rulings: use `check_prompts` for them."""
        return self._prompts(prompts, cascade=True)

    def cascade_videos(self, video: Tensor, prompts: Sequence[str], fps: float) -> list[Decision]:
        """What `cascade_prompts` is to `check_prompts`."""
        return self._videos(video, prompts, fps, cascade=True)

    def _prompts(self, prompts: Sequence[str], *, cascade: bool) -> list[Decision]:
        rulings = self._run(self._prompt_filters, [[] for _ in prompts], lambda rows: Request([prompts[i] for i in rows]), cascade)
        return self._count("prompt", [self._decide(each, "no prompt filter is configured") for each in rulings])

    def _videos(self, video: Tensor, prompts: Sequence[str], fps: float, *, cascade: bool) -> list[Decision]:
        if video.ndim == 0 or len(video) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts for a video tensor of shape {list(video.shape)}")
        video, faults = video.detach(), _faults(video, fps)

        def request(rows: list[int]) -> Request:
            return Request([prompts[i] for i in rows], video[rows] if len(rows) < len(video) else video, fps)

        rulings = self._run(self._video_filters, [[self._input_error(fault)] if fault else [] for fault in faults], request, cascade)
        return self._count("clip", [self._decide(each, "no video filter is configured") for each in rulings])

    def _run(self, filters: Sequence[_Asked], rulings: list[list[Ruling]], request: Callable[[list[int]], Request], cascade: bool) -> list[list[Ruling]]:
        """Adds the rulings of the filters to those that are there. A row that begins with a ruling, an error about the input, is shown to no filter."""
        rows = [i for i, begun in enumerate(rulings) if not begun]
        for each in sorted(filters, key=lambda each: each.pace()) if cascade else filters:
            if rows:
                for i, answer in zip(rows, self._ask(each, request(rows), len(rows)), strict=True):
                    rulings[i].extend(answer)
            if cascade:
                rows = [i for i in rows if all(ruling.verdict != Verdict.BLOCK for ruling in rulings[i])]
        return rulings

    def _ask(self, asked: _Asked, request: Request, count: int) -> list[list[Ruling]]:
        """The filter's rulings, with an error ruling wherever it did not answer as it should."""
        each, start = asked.filter, self._clock()
        try:
            answer = asked.transport.ask(request)
        except Exception as error:  # a transport should not, and must not end the run
            answer = failure_of(error)
        seconds = self._clock() - start
        asked.seconds, asked.items = asked.seconds + seconds, asked.items + count
        if not isinstance(answer, Failure) and not (isinstance(answer, list | tuple) and len(answer) == count):
            answer = Failure(f"wrong number of answers, {len(answer)} for {count}" if isinstance(answer, list | tuple) else f"answered with a {_type(answer)}")
        if isinstance(answer, Failure):
            return [self._errors(each, each.policies, answer.text, seconds) for _ in range(count)]
        checked = [self._checked(each, rulings, seconds) for rulings in answer]
        most = asked.limits.seconds + asked.limits.starting  # the first answer of a process holds its start
        if not seconds <= most:  # the transport should have seen to it
            late = self._errors(each, each.policies, f"answered after more than {most:g} s", seconds)
            return [[ruling for ruling in rulings if ruling.verdict == Verdict.BLOCK] + late for rulings in checked]
        return checked

    def _checked(self, each: SafetyFilter, rulings: object, seconds: float) -> list[Ruling]:
        """Rulings about one clip: stamped, with an error for each that is missing or makes no sense. A block is kept in any case."""
        if not isinstance(rulings, list | tuple):
            return self._errors(each, each.policies, f"answered with a {_type(rulings)}", seconds)
        kept: list[Ruling] = []
        ruled: set[str] = set()
        for ruling in rulings:
            if not isinstance(ruling, Ruling):
                kept += self._errors(each, each.policies, f"a ruling is a {_type(ruling)}", seconds)
                continue
            fault = _malformed(ruling) or self._fault(each, ruling) or ("ruled twice on one policy" if ruling.policy in ruled else "")
            if ruling.verdict is Verdict.BLOCK and _malformed(ruling):
                ruling = self._bare_block(each, ruling)
            elif ruling.verdict is Verdict.BLOCK and not 0 <= ruling.score <= 1:
                ruling = replace(ruling, score=math.nan)
            if not fault or ruling.verdict is Verdict.BLOCK:
                kept.append(replace(ruling, policy_version=self._policy.version, seconds=seconds))
            if fault:
                kept += self._errors(each, (ruling.policy,) if isinstance(ruling.policy, str) else each.policies, fault, seconds)
            else:
                ruled.add(ruling.policy)
        missing = [code for code in each.policies if code not in {ruling.policy for ruling in kept}]
        if missing or not kept:
            kept += self._errors(each, missing or (INPUT_POLICY,), "a ruling is missing", seconds)
        return kept

    def _fault(self, each: SafetyFilter, ruling: Ruling) -> str:
        """What is wrong with a ruling, or an empty string."""
        if ruling.policy not in each.policies:
            return "a ruling on a policy the filter did not declare"
        if ruling.policy not in self._policy:
            return "the policy is unknown"
        if ruling.verdict != Verdict.ERROR and not 0 <= ruling.score <= 1:
            return "the score is no probability"
        if ruling.verdict == Verdict.ALLOW and not ruling.score < ruling.threshold <= 1 and self._policy.action(ruling.policy) != "allow":
            return "an allow with a score at or above the threshold, or with a threshold above 1"
        return ""

    def _bare_block(self, each: SafetyFilter, ruling: Ruling) -> Ruling:
        """What can be kept of a block whose other fields make no sense."""
        policy = ruling.policy if isinstance(ruling.policy, str) else INPUT_POLICY
        return Ruling(Verdict.BLOCK, policy, math.nan, (Reason(f"{each.id}: blocked, without a reason that can be read"),), each.id, each.version, each.threshold)

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


@dataclass(eq=False)
class _Asked:
    """A filter, the way to it, and the time it took so far."""

    filter: SafetyFilter
    limits: Limits
    transport: Transport
    seconds: float = 0.0
    items: int = 0

    def pace(self) -> float:
        """Seconds a prompt or clip; 0 before the first."""
        return self.seconds / max(self.items, 1)


def _type(value: object) -> str:
    """The name of its type; of what a process could not carry over, its type there."""
    return value.type if isinstance(value, Unreadable) else type(value).__name__


def _malformed(ruling: Ruling) -> str:
    """Which field of a ruling is not of its type, or an empty string: a filter may put anything there."""
    if not isinstance(ruling.verdict, Verdict):
        return "the verdict is unknown"
    if not isinstance(ruling.score, float | int):
        return "the score is no probability"
    if not isinstance(ruling.threshold, float | int):
        return "the threshold is no number"
    if not all(isinstance(text, str) for text in (ruling.policy, ruling.filter_id, ruling.filter_version)):
        return "a policy, an id or a version is no text"
    if not (isinstance(ruling.reasons, tuple) and all(map(_is_reason, ruling.reasons))):
        return "the reasons are none"
    return ""


def _is_reason(reason: object) -> bool:
    if not (isinstance(reason, Reason) and isinstance(reason.text, str) and isinstance(reason.start, float | int | None) and isinstance(reason.end, float | int | None)):
        return False
    return reason.span is None or (isinstance(reason.span, tuple) and len(reason.span) == 2 and all(isinstance(place, int) for place in reason.span))


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

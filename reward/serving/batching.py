"""One thread with the model: clips of one size that wait at the same time are scored together.

A batch begins with the clip that has waited longest and takes others of its size. It does not begin before it is full while others are known to be on their
way, but for at most `wait` seconds; who asks alone never waits. A score does not depend on the batch but for rounding. Where a batch fails, its clips are scored
one by one: the failure of one is not that of the others.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from base_model.errors import RushesError, UserError
from reward.judges.exchange import one_line
from reward.types import Scorer


class Scored(NamedTuple):
    """One clip's score in R dimensions, every number finite."""

    mean: list[float]
    spread: list[float]


class Unscored(NamedTuple):
    """Why a clip has no score, in one line."""

    reason: str


Outcome = Scored | Unscored


@dataclass(frozen=True)
class _Waiting:
    clip: Tensor  # uint8 [T,3,H,W]
    prompt: str
    since: float
    outcome: Future[Outcome] = field(default_factory=Future)


class Batcher:
    """Scores clips in its own thread. batch: clips scored at once; pixels: of all frames of a batch, unless one clip alone has more; wait: seconds."""

    def __init__(self, scorer: Scorer, *, batch: int, pixels: int, wait: float) -> None:
        self._scorer, self._batch, self._pixels, self._wait = scorer, batch, pixels, wait
        self._clips: list[_Waiting] = []
        self._errands: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._changed, self._closed, self._coming = threading.Condition(), False, 0
        self.batches = 0
        self._thread = threading.Thread(target=self._work, name="scorer", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def expecting(self) -> Iterator[None]:
        """While the block runs, clips are on their way."""
        with self._changed:
            self._coming += 1
        try:
            yield
        finally:
            with self._changed:
                self._coming -= 1
                self._changed.notify()

    def submit(self, clips: Sequence[tuple[Tensor, str]]) -> list[Future[Outcome]]:
        """Clips uint8 [T,3,H,W] with their prompts; an outcome each. Raises RuntimeError once closed."""
        now = time.monotonic()
        waiting = [_Waiting(clip, prompt, now) for clip, prompt in clips]
        with self._changed:
            self._check_open()
            self._clips += waiting
            self._changed.notify()
        return [each.outcome for each in waiting]

    def call(self, errand: Callable[[], Any]) -> Future[Any]:
        """`errand()`, in the thread of the model, before the next batch."""
        done: Future[Any] = Future()
        with self._changed:
            self._check_open()
            self._errands.append((errand, done))
            self._changed.notify()
        return done

    def close(self, seconds: float | None = None) -> None:
        """Takes nothing more; what waits is still scored, then the thread ends. It is waited for at most `seconds`: a scorer may hang."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(seconds)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the scorer is closed")

    def _work(self) -> None:
        while (job := self._next()) is not None:
            job()

    def _next(self) -> Callable[[], None] | None:
        """What the thread does next, waited for; None where it has ended."""
        with self._changed:
            while True:
                if self._errands:
                    return partial(_settle, *self._errands.pop(0))
                if self._clips:
                    alike, full = self._alike()
                    left = 0.0 if full or self._closed or not self._coming else self._clips[0].since + self._wait - time.monotonic()
                    if left <= 0:
                        taken = set(map(id, alike))
                        self._clips = [each for each in self._clips if id(each) not in taken]
                        return partial(self._score, alike)
                    self._changed.wait(left)
                elif self._closed:
                    return None
                else:
                    self._changed.wait()

    def _alike(self) -> tuple[list[_Waiting], bool]:
        """The clips of the size of the one that has waited longest, as many as a batch takes, and whether that is a full batch."""
        first = self._clips[0].clip
        most = max(1, min(self._batch, self._pixels * 3 // first.numel()))
        alike = [each for each in self._clips if each.clip.shape == first.shape][:most]
        return alike, len(alike) == most

    def _score(self, waiting: Sequence[_Waiting]) -> None:
        batch = [each for each in waiting if each.outcome.set_running_or_notify_cancel()]  # not those whom nobody waits for any more
        if batch:
            self.batches += 1
            for each, outcome in zip(batch, score_batch(self._scorer, [each.clip for each in batch], [each.prompt for each in batch]), strict=True):
                each.outcome.set_result(outcome)


def _settle(errand: Callable[[], Any], done: Future[Any]) -> None:
    if not done.set_running_or_notify_cancel():
        return
    try:
        done.set_result(errand())
    except Exception as error:
        done.set_exception(error)


@torch.no_grad()
def score_batch(scorer: Scorer, clips: Sequence[Tensor], prompts: Sequence[str]) -> list[Outcome]:
    """B clips uint8 [T,3,H,W] of one size, one prompt each -> an outcome each. Nothing that the scorer does is raised."""
    try:
        return outcomes(scorer, torch.stack(list(clips)).float().div_(255), prompts)
    except Exception as error:
        if len(clips) > 1:
            return [score_batch(scorer, [clip], [prompt])[0] for clip, prompt in zip(clips, prompts, strict=True)]
        reason = str(error) if isinstance(error, RushesError) else f"the scorer failed: {type(error).__name__}: {error}"
        return [Unscored(one_line(reason))]


def outcomes(scorer: Scorer, video: Tensor, prompts: Sequence[str]) -> list[Outcome]:
    """video [B,T,3,H,W] in [0,1] -> what the scorer says of each clip; a number that is not finite is no score."""
    scores = scorer(video, prompts)
    expected = (len(prompts), len(scorer.dims))
    if scores.mean.shape != expected or scores.spread.shape != expected:
        raise UserError(f"the scorer gave scores of shape {list(scores.mean.shape)} where {list(expected)} belongs. Mend the scorer")
    found: list[Outcome] = []
    for mean, spread in zip(scores.mean.tolist(), scores.spread.tolist(), strict=True):
        unknown = [dim for dim, *values in zip(scorer.dims, mean, spread, strict=True) if not all(map(math.isfinite, values))]
        found.append(Unscored(f"the scorer gives no score in {', '.join(unknown)}") if unknown else Scored(mean, spread))
    return found

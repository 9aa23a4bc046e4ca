"""A reward model in another process (`rushes serve-reward`) as a scorer of this one."""

from __future__ import annotations

import hashlib
import math
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from base_model.errors import UserError
from reward.judges.chat import check_batch
from reward.judges.exchange import Endpoint, Failed, Failures
from reward.serving.wire import IDEMPOTENCY, METADATA, SCHEMA, SCORE, TENSORS, Limits, tensors_body
from reward.types import Scores, same_rate

HEADER = 2**16
"""Bytes that are left for a request's header and prompts beside its clips."""


class RemoteReward:
    """A `Scorer`: clips go to a server in 256 levels, as files hold them, and come back as scores. What fails is nan, and counted in `failures`.

    fps: the true rate of the clips. card: the hash of the card that must be served; none takes whatever is, and holds it to that. Requests carry a key of their
    content, so that one that is sent again is not computed again. `temperature`, `center`, `scale` and `log_tie` are those of the model's card.
    others: servers of the same card that are asked where this one gives no answer, and from then on until they give none; that is told on standard error.
    Raises UserError where no server can be asked, or one scores clips of another rate; GuardStop, when called, where more than `max_error_share` of the clips failed.
    """

    differentiable = False

    def __init__(self, endpoint: Endpoint, *others: Endpoint, fps: float, card: str | None = None, max_error_share: float = 0.05) -> None:
        self.endpoints, self.fps = (endpoint, *others), fps
        self._lock, self._asked = threading.Lock(), 0  # which is asked first
        addresses = ", ".join(each.url for each in self.endpoints)
        self.failures = Failures(f"the reward server{'s' if others else ''} {addresses}", max_error_share)
        try:
            self._take(self._elsewhere(lambda each: each.get(METADATA)))
        except Failed as error:
            raise UserError(f"cannot ask {self.failures.server}: {error}. Start it with `rushes serve-reward`, or give its address and token") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"what answers at {self.endpoint.url} is no reward server of schema {SCHEMA}. Give the address of a `rushes serve-reward`") from error
        if not same_rate(fps, self.served_fps):
            raise UserError(
                f"the reward server {self.endpoint.url} scores clips of {self.served_fps:g} frames a second, and these have {fps:g}. Resample them or serve another model"
            )
        if card is not None and card != self.card:
            raise UserError(f"the reward server {self.endpoint.url} serves the card {self.card[:12]}, not {card[:12]}. Serve the model that was meant")

    @property
    def endpoint(self) -> Endpoint:
        """The server that is asked first."""
        return self.endpoints[self._asked]

    def _elsewhere(self, ask: Callable[[Endpoint], dict[str, Any]]) -> dict[str, Any]:
        """What the first server says that gives an answer, each asked once with all its patience. Raises Failed where none does, or where asking another is of no use."""
        begin = self._asked
        for number in (*range(begin, len(self.endpoints)), *range(begin)):
            try:
                answer = ask(self.endpoints[number])
            except Failed as error:
                failed = error
                if not error.may_pass:
                    raise
                continue
            self._go_on_with(number, begin)
            return answer
        raise failed

    def _go_on_with(self, number: int, begin: int) -> None:
        with self._lock:
            if number != begin and self._asked == begin:
                self._asked = number
                print(f"no answer from the reward server {self.endpoints[begin].url}; going on with {self.endpoints[number].url}", file=sys.stderr, flush=True)

    def _take(self, told: Mapping[str, Any]) -> None:
        if told["schema"] != SCHEMA:
            raise ValueError(told["schema"])
        self.dims, self.card, self.served_fps = tuple(map(str, told["dims"])), str(told["card"]), float(told["fps"])
        self.temperature = torch.tensor([float(told["temperature"][dim]) for dim in self.dims])
        self.center, self.scale = (torch.tensor([float(told["normalisation"][dim][key]) for dim in self.dims]) for key in ("center", "scale"))
        self.log_tie = torch.nn.Parameter(torch.tensor([told["log_tie"][dim] for dim in self.dims]), requires_grad=False)
        self.limits = Limits(**{name: int(told["limits"][name]) for name in Limits._fields})

    @torch.no_grad()
    def __call__(self, video: Tensor, prompts: Sequence[str]) -> Scores:
        """video [B,T,3,H,W] in [0,1] at `fps`, one prompt a clip -> scores [B,R]; nan where the server gave none."""
        check_batch(video, prompts)
        finite = torch.isfinite(video).flatten(1).all(1)  # [B]
        levels = (video.nan_to_num(0).clamp(0, 1) * 255).round().to(torch.uint8).cpu()  # [B,T,3,H,W]
        rows = finite.nonzero()[:, 0].tolist()
        chunks = [rows[at : at + self._clips_a_request(video)] for at in range(0, len(rows), self._clips_a_request(video))]
        outcomes: list[tuple[list[float], list[float]] | Failed] = [Failed("the clip holds pixels that are not finite")] * len(video)
        for chunk, answer in zip(chunks, self.endpoint.each(lambda chunk: self._ask(levels[chunk], [prompts[row] for row in chunk]), chunks), strict=True):
            for place, row in enumerate(chunk):
                outcomes[row] = answer if isinstance(answer, Failed) else answer[place]
        self.failures.count(outcomes)
        unknown = [math.nan] * len(self.dims)
        mean, spread = zip(*((unknown, unknown) if isinstance(outcome, Failed) else outcome for outcome in outcomes), strict=True)
        return Scores(torch.tensor(mean, dtype=torch.float32), torch.tensor(spread, dtype=torch.float32))  # [B,R] each

    def _clips_a_request(self, video: Tensor) -> int:
        """As many as the server takes; one where it takes none, so that it says why."""
        pixels, limits = video[0].numel() // 3, self.limits
        return max(1, min(limits.clips, limits.pixels // pixels, (limits.body_bytes - HEADER) // (3 * pixels)))

    def _ask(self, levels: Tensor, prompts: Sequence[str]) -> list[tuple[list[float], list[float]] | Failed]:
        """uint8 [B,T,3,H,W] -> mean and spread of each clip, or why it has none. Raises Failed where there is no answer at all."""
        body = tensors_body(levels, prompts, self.fps)
        key = hashlib.sha256(self.card.encode() + body).hexdigest()
        scores = self._elsewhere(lambda each: self._of_this_card(each.post(SCORE, body, {"Content-Type": TENSORS, IDEMPOTENCY: key}))).get("scores")
        if not isinstance(scores, list) or len(scores) != len(prompts):
            raise Failed(f"the answer does not hold a score for each of {len(prompts)} clips")
        return [self._outcome(score) for score in scores]

    def _of_this_card(self, answer: dict[str, Any]) -> dict[str, Any]:
        """The answer. Raises Failed where it is another model's, which another server may be asked instead of."""
        if answer.get("schema") != SCHEMA or answer.get("card") != self.card or answer.get("dims") != list(self.dims):
            raise Failed("the server serves another model now than when it was first asked", may_pass=True)
        return answer

    def _outcome(self, score: Any) -> tuple[list[float], list[float]] | Failed:
        told = score if isinstance(score, dict) else {}
        mean, spread = (self._numbers(told.get(key)) for key in ("mean", "spread"))
        if told.get("status") == "ok" and mean and spread:
            return mean, spread
        return Failed(str(told.get("reason") or "the answer holds neither a score nor a reason"))

    def _numbers(self, values: Any) -> list[float] | None:
        """One finite number a dimension, or None."""
        whole = isinstance(values, list) and len(values) == len(self.dims) and all(isinstance(value, float | int) and math.isfinite(value) for value in values)
        return values if whole else None

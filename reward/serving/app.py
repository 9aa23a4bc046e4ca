"""A reward model behind HTTP: who may ask, how much at once, and what is answered (`wire.py`).

A request is checked in this order: host, token, type, its turn, size of the body, its form, the frame rate, the limits of `clips.py`. Then its clips wait for the
thread with the model (`batching.py`). Whatever goes wrong is a status or a clip's "error", in one line; no score is made up.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from torch import Tensor

from base_model.errors import UserError
from reward.judges.exchange import one_line
from reward.serving.answers import Answer, Answers
from reward.serving.batching import Batcher, Outcome, Scored, Unscored
from reward.serving.clips import Refused, read_json, read_tensors
from reward.serving.clips import Request as Asked
from reward.serving.wire import HEALTH, IDEMPOTENCY, JSON, METADATA, SCHEMA, SCORE, TENSORS, Limits
from reward.types import Scorer

LONGEST_KEY = 128


@dataclass(frozen=True)
class Settings:
    """How a model is served."""

    fps: float  # of the clips it scores
    token: str | None  # None: no token is asked for, and the host of a request must be one of `hosts`
    roots: tuple[Path, ...]  # resolved; files below them may be scored
    limits: Limits
    hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "[::1]")
    batch: int = 16  # clips scored at once
    wait_seconds: float = 0.005  # that a clip waits for others that are on their way
    requests: int = 16  # read and answered at once; others wait
    turn_seconds: float = 30.0  # for a request's turn to come, before it is told to come back
    answers: int = 1024  # kept by idempotency key
    body_seconds: float = 60.0  # for a body to arrive
    score_seconds: float = 300.0  # for its clips to be scored
    health_seconds: float = 5.0  # how long a finding of /health holds


class RewardServer:
    """What the routes share. `card`: what /metadata tells, "card" its hash among it. `check`: raises UserError where the scorer is not what its card says."""

    def __init__(self, scorer: Scorer, card: Mapping[str, Any], check: Callable[[], None], settings: Settings) -> None:
        self.settings, self._card, self._check = settings, dict(card), check
        self.batcher = Batcher(scorer, batch=settings.batch, pixels=settings.limits.pixels, wait=settings.wait_seconds)
        self.dims = list(scorer.dims)
        self._answers, self._turns = Answers(settings.answers), asyncio.Semaphore(settings.requests)
        self._health: tuple[float, str | None] = (-float("inf"), None)  # when it was found, and what was wrong
        self._looking = asyncio.Lock()
        self.answered = 0

    def app(self) -> Starlette:
        """The ASGI application."""
        middleware = [Middleware(RequestBodyLimitMiddleware, max_body_size=self.settings.limits.body_bytes)]
        if self.settings.token is None:
            middleware.insert(0, Middleware(TrustedHostMiddleware, allowed_hosts=list(self.settings.hosts), www_redirect=False))
        return Starlette(
            routes=[Route(f"/{HEALTH}", self.health), Route(f"/{METADATA}", self.metadata), Route(f"/{SCORE}", self.score, methods=["POST"])],
            middleware=middleware,
            exception_handlers={HTTPException: _http_error, Refused: _refused, Exception: _bug},
        )

    def close(self, seconds: float | None = None) -> None:
        """Scores what waits, then ends the thread with the model, which is waited for at most `seconds`."""
        self.batcher.close(seconds)

    # Routes

    async def health(self, request: Request) -> Response:
        """Whether the model still gives the golden scores of its card. Looked at once in `health_seconds`, however often it is asked; why not is for those with a token."""
        async with self._looking:
            found, wrong = self._health
            if time.monotonic() - found >= self.settings.health_seconds:
                wrong = await self._wrong()
                self._health = (time.monotonic(), wrong)
        if wrong is None:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "failed", **({"reason": wrong} if self._may_ask(request) else {})}, 503)

    async def metadata(self, request: Request) -> Response:
        """What the model is, and what a request may bring."""
        self._authorise(request)
        return JSONResponse({"schema": SCHEMA, "dims": self.dims, "fps": self.settings.fps, "limits": self.settings.limits._asdict(), **self._card})

    async def score(self, request: Request) -> Response:
        """Scores of the clips of a request."""
        self._authorise(request)
        kind, key = _kind(request), _key(request)
        async with self._turn():
            body = await self._body(request)
            if key is None:
                answer = await self._answer(kind, body)
            else:
                digest = hashlib.sha256(kind.encode() + b"\n" + body).hexdigest()
                answer = await self._answers.once(key, digest, lambda: self._answer(kind, body))
            self.answered += 1
            return JSONResponse(answer)

    # Parts

    def _may_ask(self, request: Request) -> bool:
        if self.settings.token is None:
            return True
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        return hmac.compare_digest(given.encode(), self.settings.token.encode()) and scheme.lower() == "bearer"

    def _authorise(self, request: Request) -> None:
        if not self._may_ask(request):
            raise HTTPException(401, "a token is needed: Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """Waits until fewer than `requests` are being answered; the body of one that waits is not read yet."""
        try:
            async with asyncio.timeout(self.settings.turn_seconds):
                await self._turns.acquire()
        except TimeoutError as error:
            raise HTTPException(503, f"busy: {self.settings.requests} requests are being answered", {"Retry-After": "1"}) from error
        try:
            yield
        finally:
            self._turns.release()

    async def _body(self, request: Request) -> bytes:
        try:
            with self.batcher.expecting():
                async with asyncio.timeout(self.settings.body_seconds):
                    return await request.body()
        except TimeoutError as error:
            raise HTTPException(408, f"the body did not arrive within {self.settings.body_seconds:g} s") from error
        except ClientDisconnect as error:
            raise HTTPException(400, "the body was cut off") from error

    async def _answer(self, kind: str, body: bytes) -> Answer:
        with self.batcher.expecting():
            asked = await run_in_threadpool(self._read, kind, body)
            futures = self.batcher.submit([(clip, prompt) for clip, prompt in zip(asked.clips, asked.prompts, strict=True) if isinstance(clip, Tensor)])
        scored = iter(await self._scored(futures))
        outcomes = [clip if isinstance(clip, Unscored) else next(scored) for clip in asked.clips]
        return {"schema": SCHEMA, "card": self._card.get("card"), "dims": self.dims, "scores": [_told(outcome) for outcome in outcomes]}

    def _read(self, kind: str, body: bytes) -> Asked:
        limits, fps = self.settings.limits, self.settings.fps
        return read_tensors(body, limits, fps) if kind == TENSORS else read_json(body, limits, fps, self.settings.roots)

    async def _scored(self, futures: Sequence[Future[Outcome]]) -> list[Outcome]:
        try:
            async with asyncio.timeout(self.settings.score_seconds):
                return await asyncio.gather(*map(asyncio.wrap_future, futures))
        except TimeoutError as error:
            raise HTTPException(504, f"the clips were not scored within {self.settings.score_seconds:g} s") from error

    async def _wrong(self) -> str | None:
        """What is wrong with the model, None where nothing is."""
        try:
            async with asyncio.timeout(self.settings.score_seconds):
                await asyncio.wrap_future(self.batcher.call(self._check))
        except TimeoutError:
            return f"the scorer does not answer within {self.settings.score_seconds:g} s"
        except UserError as error:
            return one_line(str(error))
        except Exception as error:
            return one_line(f"the scorer failed: {type(error).__name__}: {error}")
        return None


def _told(outcome: Outcome) -> dict[str, Any]:
    if isinstance(outcome, Scored):
        return {"status": "ok", "mean": outcome.mean, "spread": outcome.spread}
    return {"status": "error", "reason": outcome.reason}


def _kind(request: Request) -> str:
    """The type of the body. Raises HTTPException for one that is not read, and for a body that is packed: a small one may be large."""
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HTTPException(415, "the body is compressed. Send it as it is")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in (TENSORS, JSON):
        raise HTTPException(415, f"the body is {TENSORS} or {JSON}, not {kind!r}")
    return kind


def _key(request: Request) -> str | None:
    """The idempotency key, if there is one. Raises HTTPException for one that is none."""
    key = request.headers.get(IDEMPOTENCY)
    if key is not None and not (1 <= len(key) <= LONGEST_KEY and key.isascii() and key.isprintable()):
        raise HTTPException(400, f"an idempotency key is 1 to {LONGEST_KEY} printable ASCII characters")
    return key


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": one_line(error.detail)}, error.status_code, headers=error.headers)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return JSONResponse({"error": str(error)}, error.status)


async def _bug(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": f"this is a bug of the server: {type(error).__name__}"}, 500)

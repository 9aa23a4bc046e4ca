"""Asking another process over HTTP: one request, one JSON answer, or one line why there is none.

Whatever can go wrong (no connection, silence, an error status, an answer too large, cut off or no JSON) is a `Failed` with its reason. Only what may pass by
itself is tried again: a connection that fails or falls silent, and the statuses of `RETRYABLE`.
"""

from __future__ import annotations

import ipaddress
import json
import math
import random
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

import httpx2

from base_model.errors import GuardStop, UserError

T = TypeVar("T")
RETRYABLE = frozenset({408, 425, 429, 500, 502, 503, 504})
LONGEST_REASON = 160


class Failed(Exception):
    """Why a request has no usable answer. `may_pass`: whether the same request may be answered later."""

    def __init__(self, reason: str, *, may_pass: bool = False, wait: float | None = None) -> None:
        super().__init__(one_line(reason))
        self.may_pass, self.wait = may_pass, wait


@dataclass(frozen=True)
class Patience:
    """How long is waited, and for how much."""

    seconds: float = 60.0  # of one try, from the connection to the last byte
    tries: int = 3
    wait: float = 0.5  # seconds before the second try; each later wait is twice as long, and all are shortened at random to half at most
    longest_wait: float = 30.0  # also where the answer asks for more (Retry-After)
    reply_bytes: int = 2**20

    def __post_init__(self) -> None:
        if not (self.seconds > 0 and self.tries >= 1 and self.wait >= 0 and self.longest_wait >= 0 and self.reply_bytes >= 1):
            raise UserError(f"not a patience: {self}. Give at least one try, times that are not negative and room for an answer")


class Endpoint:
    """A server under `url`, asked by at most `at_once` threads together. `token` is sent as a bearer token and stands in no error.

    transport: what carries the requests, in place of the network. Raises UserError for what is no http or https address, or holds a user or a password.
    """

    def __init__(
        self, url: str, *, token: str | None = None, patience: Patience | None = None, at_once: int = 8, transport: httpx2.BaseTransport | None = None
    ) -> None:
        self.url, self.patience, self.at_once = check_url(url), patience or Patience(), at_once
        headers = {"Accept": "application/json", "Accept-Encoding": "identity", **({"Authorization": f"Bearer {check_token(token)}"} if token is not None else {})}
        self._client = httpx2.Client(
            base_url=self.url,
            headers=headers,
            timeout=self.patience.seconds,
            limits=httpx2.Limits(max_connections=at_once, max_keepalive_connections=at_once),
            transport=transport,
            trust_env=not is_loopback(httpx2.URL(self.url).host),  # a proxy is no way to this machine
        )
        self._random, self._interrupted = random.Random(), threading.Event()
        self.close = weakref.finalize(self, self._client.close)
        """Ends its connections, as does forgetting it."""

    def get(self, path: str) -> dict[str, Any]:
        """The JSON object under `path`. Raises Failed."""
        return self._patiently("GET", path, b"", {})

    def post(self, path: str, content: bytes, headers: Mapping[str, str]) -> dict[str, Any]:
        """The JSON object that answers `content`. Raises Failed."""
        return self._patiently("POST", path, content, headers)

    def each(self, ask: Callable[[T], Any], items: Sequence[T]) -> list[Any]:
        """`ask(item)` of every item, at most `at_once` together; in its place the Failed it raised. An interrupt leaves what has not begun, and tries nothing again."""
        pool = ThreadPoolExecutor(max(1, min(self.at_once, len(items))))
        self._interrupted.clear()
        try:
            return list(pool.map(lambda item: _caught(ask, item), items))
        except BaseException:
            self._interrupted.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _patiently(self, method: str, path: str, content: bytes, headers: Mapping[str, str]) -> dict[str, Any]:
        for tried in range(1, self.patience.tries + 1):
            try:
                return self._once(method, path, content, headers)
            except Failed as error:
                if not error.may_pass or tried == self.patience.tries:
                    raise
                wait = self.patience.wait * 2 ** (tried - 1) * self._random.uniform(0.5, 1)
                if self._interrupted.wait(min(max(wait, error.wait or 0), self.patience.longest_wait)):
                    raise
        raise AssertionError("a try returns or raises")

    def _once(self, method: str, path: str, content: bytes, headers: Mapping[str, str]) -> dict[str, Any]:
        begun = time.monotonic()
        try:
            with self._client.stream(method, path, content=content, headers=dict(headers)) as reply:
                body = self._body(reply, begun)
        except httpx2.TimeoutException as error:
            raise Failed(f"no answer within {self.patience.seconds:g} s", may_pass=True) from error
        except httpx2.TransportError as error:
            raise Failed(f"no connection: {type(error).__name__}: {error}", may_pass=True) from error
        except httpx2.HTTPError as error:
            raise Failed(f"{type(error).__name__}: {error}") from error
        if reply.status_code != 200:
            said = message_of(body)
            raise Failed(f"HTTP {reply.status_code}{f': {said}' if said else ''}", may_pass=reply.status_code in RETRYABLE, wait=_seconds(reply.headers.get("retry-after")))
        return json_object(body)

    def _body(self, reply: httpx2.Response, begun: float) -> bytes:
        """The answer as it came; what is compressed is not opened: a small answer may be a large one packed."""
        if reply.headers.get("content-encoding", "identity").lower() != "identity":
            raise Failed("the answer is compressed, which was not asked for")
        parts, size = [], 0
        for part in reply.iter_bytes():
            size += len(part)
            if size > self.patience.reply_bytes:
                raise Failed(f"the answer is larger than {self.patience.reply_bytes} bytes")
            if time.monotonic() - begun > self.patience.seconds:
                raise Failed(f"no answer within {self.patience.seconds:g} s", may_pass=True)
            parts.append(part)
        return b"".join(parts)


@dataclass
class Failures:
    """What failed so far, by reason, and when a run must stop for it."""

    server: str  # as the user knows it
    max_error_share: float = 0.05
    asked: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    @property
    def failed(self) -> int:
        return self.reasons.total()

    def count(self, answers: Sequence[Any]) -> None:
        """Takes the answers of one call, `Failed` where there is none. Raises GuardStop where more than `max_error_share` of them failed."""
        causes = Counter(str(answer) for answer in answers if isinstance(answer, Failed))
        with self._lock:
            self.asked += len(answers)
            self.reasons += causes
        if causes.total() > self.max_error_share * len(answers):
            most = causes.most_common(1)[0][0]
            share = f"{causes.total()} of {len(answers)} (limit {self.max_error_share:.1%})"
            raise GuardStop(f"{self.server} failed on {share}, most often: {most}. Mend it, then go on with --resume")


def _caught(ask: Callable[[T], Any], item: T) -> Any:
    try:
        return ask(item)
    except Failed as error:
        return error


def json_object(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`. Raises Failed, also for NaN and Infinity, which JSON has not."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON")

    try:
        value = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        begin = body[:40].decode("utf-8", "replace")
        raise Failed(f"the answer is not JSON ({str(error)[:60]}): {begin!r}") from error
    if not isinstance(value, dict):
        raise Failed(f"the answer is a JSON {type(value).__name__}, not an object")
    return value


def message_of(body: bytes) -> str:
    """What an error's body says: the message in it where it is JSON, else its beginning."""
    try:
        found = json.loads(body)["error"]
        said = found["message"] if isinstance(found, dict) else found
    except (ValueError, RecursionError, KeyError, TypeError):
        said = body[:LONGEST_REASON].decode("utf-8", "replace")
    return one_line(str(said))


def one_line(text: str) -> str:
    """`text` without line breaks and control characters, at most `LONGEST_REASON` long: what comes from outside does not write on a terminal."""
    words = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * LONGEST_REASON]).split())
    return words if len(words) <= LONGEST_REASON else words[: LONGEST_REASON - 3] + "..."


def check_url(url: str) -> str:
    """The address as it is asked. Raises UserError for one that is none, or holds a password or a query."""
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise UserError(f"not an address: {error}. Write http://HOST:PORT or https://HOST") from error
    if parsed.userinfo:
        raise UserError("an address with a user or a password in it. Give a token apart from it")
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.fragment:
        raise UserError(f"not an address of a server, {one_line(url)}. Write http://HOST:PORT or https://HOST, and a path if there is one")
    return str(parsed).rstrip("/")


def check_token(token: str) -> str:
    """Raises UserError where it cannot stand in a header; the error does not tell it."""
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError("the token is empty or holds what is not printable ASCII, or a space. Give another token")
    return token


def is_loopback(host: str) -> bool:
    """Whether `host` is this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _seconds(header: str | None) -> float | None:
    try:
        seconds = float(header or "")
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None

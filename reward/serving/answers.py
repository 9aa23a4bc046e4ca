"""Idempotency keys: the same request is computed once, however often it is sent, also while it is still computed.

    the same key and the same body       the same answer
    the same key and another body        refused, 409
    an answer that says of no clip "error"    is kept; others are given to all who wait for them, then forgotten, so that they can be tried again
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

from reward.serving.clips import Refused

Answer = Mapping[str, Any]


class _Entry(NamedTuple):
    digest: str  # of the body
    answer: asyncio.Task[Answer]


class Answers:
    """The last `most` answers by key, and those being computed. Belongs to one event loop."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    async def once(self, key: str, digest: str, compute: Callable[[], Awaitable[Answer]]) -> Answer:
        """The answer under `key`, computed unless it is there or on its way. Goes on being computed where the one who asked has left. Raises Refused, and what `compute` does."""
        entry = self._entries.get(key)
        if entry is None:
            task = asyncio.ensure_future(compute())
            self._entries[key] = entry = _Entry(digest, task)
            task.add_done_callback(lambda done: self._finished(key, done))
        elif entry.digest != digest:
            raise Refused(409, "the idempotency key was used for another request. Send a key of its own with each")
        else:
            self._entries.move_to_end(key)
        return await asyncio.shield(entry.answer)

    def _finished(self, key: str, done: asyncio.Task[Answer]) -> None:
        if done.cancelled() or done.exception() is not None or not complete(done.result()):
            self._entries.pop(key, None)
        while len(self._entries) > self._most:
            oldest = next((key for key, entry in self._entries.items() if entry.answer.done()), None)
            if oldest is None:
                return
            del self._entries[oldest]


def complete(answer: Answer) -> bool:
    """Whether every clip has a score."""
    return all(score["status"] == "ok" for score in answer["scores"])

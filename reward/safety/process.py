"""A filter in a process of its own: one that hangs, crashes or takes all memory costs its own rulings and nothing else.

    this process                                    the filter's process
    clips and prompts --> a file in memory    -->   read, asked                 the file belongs to this filter and this process alone
    number of the call --> a socket           -->
                           a file in memory   <--   rulings as JSON             nothing that comes back is unpickled
    read, checked     <--  one byte           <--

The process is begun when the filter is first asked, by Python's fork server, which imports torch once and runs nothing; so a start costs milliseconds and inherits no thread.
It is killed when the filter's time is over or its answer makes no sense, and begun anew when it is asked again, a limited number of times in a row. It dies with this process,
even amid a call.
Its memory is limited by the kernel (RLIMIT_DATA). Linux only. A script that uses it needs `if __name__ == "__main__":`, as with every fork server.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import resource
import signal
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

import torch
from torch import Tensor

from base_model.bounds import held
from base_model.errors import UserError
from reward.safety.contract import Reason, Ruling, Verdict
from reward.safety.transport import Failure, Limits, Request, Unreadable, failure_of, put

LONGEST_ANSWER = 64 << 20  # bytes
PRELOADED = ["torch", "reward.safety.process"]
DTYPES = {str(dtype): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


@dataclass
class Late:
    """A filter that is built where it is first asked: in its own process, its weights and all, so that this one never holds them. What it declares is said beforehand;
    a filter that turns out to be another is an error. make: a function that can be found by its name, such as `functools.partial(load_guard, folder)`."""

    make: Callable[[], Any]
    id: str
    version: str
    threshold: float
    policies: tuple[str, ...]
    _built: Any = field(default=None, init=False, repr=False, compare=False)

    def build(self) -> Any:
        """The filter itself. Raises ValueError where it declares something else, and whatever `make` raises."""
        if self._built is None:
            built = self.make()
            for name in ("id", "version", "threshold", "policies"):
                if getattr(built, name) != getattr(self, name):
                    raise ValueError(f"the filter's {name} is {getattr(built, name)!r}, declared was {getattr(self, name)!r}")
            self._built = built
        return self._built


class LatePromptFilter(Late):
    """A `Late` filter that reads prompts."""

    def check_prompts(self, prompts: Sequence[str]) -> list[list[Ruling]]:
        answer: list[list[Ruling]] = self.build().check_prompts(prompts)
        return answer


class LateVideoFilter(Late):
    """A `Late` filter that looks at clips."""

    def check_videos(self, video: Tensor, prompts: Sequence[str], fps: float) -> list[list[Ruling]]:
        answer: list[list[Ruling]] = self.build().check_videos(video, prompts, fps)
        return answer


class InProcess:
    """The transport: `SafetyRunner(filters, policy, transport=InProcess)`. The filter is pickled on its way there, so it has to be one that can be; weights belong into a
    `Late` one."""

    def __init__(self, each: Any, limits: Limits) -> None:
        if not hasattr(os, "memfd_create"):
            raise UserError("filters in processes of their own need Linux. Ask them in threads, which is the default")
        self._filter, self._limits = each, limits
        self._child: _Child | None = None
        self._failed = 0  # processes in a row that ended without an answer
        self._turn = threading.Lock()

    def ask(self, request: Request) -> object:
        with self._turn:
            if self._child is not None and self._child.owner != os.getpid():
                self._child = None  # a fork of the process that began it: its child is not ours to ask
            if self._child is not None and not self._child.is_alive():
                self._end()
            try:
                return self._asked(request)
            except BaseException:  # Ctrl-C: an answer that is still to come must not be taken for the next one's
                self._end()
                raise

    def _asked(self, request: Request) -> object:
        if self._child is None:
            if self._failed > self._limits.restarts:
                return Failure(f"its process ended {self._failed} times in a row and is not started again")
            try:
                self._child = _Child(self._filter, self._limits)
            except Exception as error:  # what cannot be pickled, or no process to be had
                self._failed += 1
                return Failure(f"its process cannot be started: {failure_of(error).text}")
            begun = self._child.answer(0, self._limits.starting, "to start")
            if isinstance(begun, _Ended):
                return self._lost(begun)
        answer = self._child.ask(request, self._limits.seconds)
        if isinstance(answer, _Ended):
            return self._lost(answer)
        self._failed = 0  # it lives, whatever it says
        return answer

    def _lost(self, how: _Ended) -> Failure:
        self._end()
        self._failed += 1
        return Failure(how.text)

    def close(self) -> None:
        with self._turn:
            self._end()
            self._failed = 0

    def _end(self) -> None:
        if self._child is not None:
            self._child.end()
            self._child = None


class _Ended(Failure):
    """A failure after which the process is of no use."""


class _Child:
    """A running process and the ways to it."""

    def __init__(self, each: Any, limits: Limits) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.owner, self._calls = os.getpid(), 0
        self._wire, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(each, limits.memory, torch.get_num_threads(), theirs), name=f"safety-{each.id}", daemon=True)
        try:
            self._process.start()
        except BaseException:
            self._wire.close()
            raise
        finally:
            theirs.close()
        self._question, self._answer = os.memfd_create("safety-question"), os.memfd_create("safety-answer")
        self.end = weakref.finalize(self, _end, self.owner, self._process, self._wire, (self._question, self._answer))
        for file in (self._question, self._answer):
            send_handle(self._wire, file, self._process.pid)

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def ask(self, request: Request, seconds: float) -> object:
        deadline = time.monotonic() + seconds
        self._calls += 1
        try:
            _write(self._question, _packed(request))
            os.write(self._wire.fileno(), self._calls.to_bytes(8, "little"))
        except (OSError, TypeError, ValueError) as error:  # no memory for the clips, its end of the socket is gone, prompts that are no text
            return _Ended(f"cannot be asked: {failure_of(error).text}")
        return self.answer(self._calls, deadline - time.monotonic(), f"after {seconds:g} s")

    def answer(self, number: int, seconds: float, when: str) -> object:
        """What the process says to call `number`, or why it says nothing."""
        try:
            if not self._wire.poll(max(0.0, seconds)):
                return _Ended(f"timed out {when}")
            if not os.read(self._wire.fileno(), 1):
                return _Ended(self._how_it_ended())
            size = os.fstat(self._answer).st_size
            if size > LONGEST_ANSWER:
                return _Ended(f"answered with {size} bytes, more than {LONGEST_ANSWER}")
            said = json.loads(os.pread(self._answer, size, 0))
            if said["call"] != number:
                return _Ended("answered to another call")
            return (Failure if number else _Ended)(str(said["failure"])) if "failure" in said else _heard(said["answer"])
        except OSError as error:
            return _Ended(f"{self._how_it_ended()}: {error.strerror or error}")
        except (ValueError, KeyError, TypeError, RecursionError):
            return _Ended("answered with something unreadable")

    def _how_it_ended(self) -> str:
        self._process.join(1)
        code = self._process.exitcode
        if code is None:
            return "its process hung up"
        return f"its process was killed by {signal.Signals(-code).name}" if code < 0 else f"its process ended with status {code}"


def _end(owner: int, process: Any, wire: Connection, files: Sequence[int]) -> None:
    """Kills the process, if it is this one's, and lets go of what led to it."""
    if owner == os.getpid():
        with suppress(Exception):
            process.kill()
            process.join(5)
    wire.close()
    for file in files:
        with suppress(OSError):
            os.close(file)


# What goes over


def _packed(request: Request) -> list[bytes | memoryview]:
    """A line of JSON, then the pixels."""
    video = None if request.video is None else request.video.detach().cpu().contiguous()
    told = {"prompts": list(request.prompts), "fps": request.fps}
    if video is None:
        return [json.dumps(told).encode() + b"\n"]
    told |= {"shape": list(video.shape), "dtype": str(video.dtype)}
    return [json.dumps(told).encode() + b"\n", video.flatten().view(torch.uint8).numpy().data]


def _unpacked(file: int) -> Request:
    with open(file, "rb", closefd=False) as content:
        content.seek(0)
        told = json.loads(content.readline())
        if "shape" not in told:
            return Request(told["prompts"])
        pixels = bytearray(os.fstat(file).st_size - content.tell())
        content.readinto(pixels)
    return Request(told["prompts"], torch.frombuffer(pixels, dtype=DTYPES[told["dtype"]]).reshape(told["shape"]), told["fps"])


def _write(file: int, parts: Sequence[bytes | memoryview]) -> None:
    os.ftruncate(file, 0)
    at = 0
    for part in parts:
        left = memoryview(part)
        while left:
            done = os.pwrite(file, left[: 1 << 30], at)
            left, at = left[done:], at + done


def _plain(value: object) -> object:
    """What JSON can carry of a field of a ruling; None for anything else, which no check lets pass."""
    return value if isinstance(value, str | int | float) else None


def _said(answer: object) -> object:
    """A filter's answer as JSON: lists, rulings as mappings, and anything else as the name of its type."""
    if isinstance(answer, Ruling):
        return _ruling_said(answer)
    return [_said(each) for each in answer] if isinstance(answer, list | tuple) else type(answer).__name__


def _ruling_said(ruling: Ruling) -> dict[str, object]:
    reasons = ruling.reasons if isinstance(ruling.reasons, tuple) and all(isinstance(each, Reason) for each in ruling.reasons) else None
    return {
        "verdict": ruling.verdict.name if isinstance(ruling.verdict, Verdict) else None,
        "reasons": None if reasons is None else [_reason_said(each) for each in reasons],
        **{name: _plain(getattr(ruling, name)) for name in ("policy", "score", "filter_id", "filter_version", "threshold")},
    }


def _reason_said(reason: Reason) -> list[object]:
    span = list(map(_plain, reason.span)) if isinstance(reason.span, tuple) else _plain(reason.span)
    return [*map(_plain, (reason.text, reason.start, reason.end)), span]


def _heard(said: Any) -> object:
    """The inverse of `_said`, as far as there is one; the runner looks at every value. Raises ValueError, KeyError or TypeError for what `_said` never says."""
    if isinstance(said, list):
        return [_heard(each) for each in said]
    return Unreadable(said) if isinstance(said, str) else _ruling_heard(said)


def _ruling_heard(said: Any) -> Ruling:
    reasons: Any = said["reasons"]
    if reasons is not None:
        reasons = tuple(Reason(text, start, end, tuple(span) if isinstance(span, list) else span) for text, start, end, span in reasons)
    verdict: Any = Verdict[said["verdict"]] if said["verdict"] is not None else None
    return Ruling(verdict, said["policy"], said["score"], reasons, said["filter_id"], said["filter_version"], said["threshold"])


# In the filter's process


def _work(each: Any, memory: int | None, threads: int, wire: Connection) -> None:
    """Answers calls until the other side hangs up; call 0 is whether the filter could be built."""
    settle(memory, threads)
    asked, said = recv_handle(wire), recv_handle(wire)
    number, out = 0, _attempt(lambda: _build(each))
    while True:
        _write(said, [json.dumps({"call": number} | ({"failure": out.text} if isinstance(out, Failure) else {"answer": _said(out)})).encode()])
        os.write(wire.fileno(), b"!")
        call = os.read(wire.fileno(), 8)
        if len(call) < 8:
            return
        number, out = int.from_bytes(call, "little"), _attempt(lambda: put(each, _unpacked(asked)))


def _build(each: Any) -> list[object]:
    if isinstance(each, Late):
        each.build()
    return []


def _attempt(function: Callable[[], object]) -> object:
    try:
        return function()
    except BaseException as error:  # a filter may raise anything, SystemExit included
        return failure_of(error)


def settle(memory: int | None, threads: int) -> None:
    """No core dumps, no Ctrl-C (the other side decides), nothing on standard output; death with the other side; the limit on memory."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    fcntl.fcntl(parent.sentinel, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(parent.sentinel, fcntl.F_SETFL, os.O_ASYNC)  # SIGIO, which ends a process whatever it is at, once the other side is gone
    if not parent.is_alive():
        os._exit(1)  # it was gone before
    os.dup2(2, 1)
    torch.set_num_threads(threads)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (held() + memory, held() + memory))

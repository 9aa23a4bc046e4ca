"""Clips that came from outside are opened in a process of their own (`rendering.py`): one that hangs, crashes or takes all memory costs its clip and nothing else.

The process is begun when it is first needed and used again; it is killed when a clip takes longer than `SECONDS`, and another one takes over after `CLIPS` of them. It knows
nothing of this one: no variable of its environment, no open file, no connection but two pipes, and nothing that comes back over them is unpickled.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from typing import Any

from base_model.errors import UserError
from reward.app.media import CLIP, VARIANTS, path_of
from reward.app.store import Store

MOST_BYTES = 256 << 20
"""The largest file that is taken."""
MOST_MADE = 512 << 20
STARTING, SECONDS, CLIPS = 120.0, 120.0, 100
FIRST_BYTES = {"mp4": (4, b"ftyp"), "jpg": (0, b"\xff\xd8\xff"), "json": (0, b"{")}


class Worker:
    """A process that renders, one clip at a time."""

    def __init__(self, *, seconds: float = SECONDS, clips: int = CLIPS) -> None:
        self._seconds, self._clips = seconds, clips
        self._turn = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._done = 0

    def render(self, content: bytes) -> dict[str, bytes]:
        """`rendering.rendered` of a file. Raises UserError for what is no clip or too much of one, and where the process did not come back with an answer in time."""
        if not 0 < len(content) <= MOST_BYTES:
            raise UserError(f"{len(content)} bytes: a clip has 1 to {MOST_BYTES}, the clip. Give another file")
        with self._turn:
            try:
                process = self._running()
                answer = _asked(process, content, self._seconds)
            except BaseException:
                self._end()
                raise
            self._done += 1
            if self._done >= self._clips:
                self._end()
        if "error" in answer:
            raise UserError(str(answer["error"])[:500])
        return _checked(answer["files"])

    def close(self) -> None:
        with self._turn:
            self._end()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            self._process = _begun()
        return self._process

    def _end(self) -> None:
        process, self._process, self._done = self._process, None, 0
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    _hush(pipe)


def _hush(pipe: Any) -> None:
    with suppress(OSError):  # what was still to be written to a process that is gone
        pipe.close()


def _begun() -> subprocess.Popen[bytes]:
    """A process that is ready. Its environment holds nothing but where Python's modules lie."""
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HOME": "/nonexistent"}
    command = [sys.executable, "-m", "reward.app.rendering"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, close_fds=True, start_new_session=True)
    try:
        with _deadline(process, STARTING):
            ready = _read(process, 8)
    except BaseException as error:
        process.kill()
        process.wait()
        if isinstance(error, EOFError):
            raise UserError("the process that opens clips cannot be started. Run `python -m reward.app.rendering` to see why") from error
        raise
    assert ready == b"ready   "
    return process


class _deadline:
    """Kills a process that is still at work when the time is over."""

    def __init__(self, process: subprocess.Popen[bytes], seconds: float) -> None:
        self._timer = threading.Timer(seconds, process.kill)
        self._timer.daemon = True

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


def _asked(process: subprocess.Popen[bytes], content: bytes, seconds: float) -> dict[str, Any]:
    assert process.stdin is not None
    try:
        with _deadline(process, seconds):
            process.stdin.write(len(content).to_bytes(8, "big"))
            process.stdin.write(content)
            process.stdin.flush()
            size = int.from_bytes(_read(process, 8), "big")
            answer = json.loads(_read(process, size)) if size <= 1 << 20 else None
            if not isinstance(answer, dict) or not ("error" in answer or _sizes(answer.get("files"))):
                raise EOFError
            if "files" in answer:
                answer["files"] = {name: _read(process, number) for name, number in answer["files"].items()}
            return answer
    except (EOFError, OSError, ValueError) as error:
        raise UserError(f"the clip ended the process that opened it, or took longer than {seconds:g} s, the clip. Cut it or encode it again") from error


def _sizes(files: Any) -> bool:
    """Whether the answer announces every variant and no more bytes than are taken."""
    if not isinstance(files, dict) or set(files) != set(VARIANTS):
        return False
    return all(type(number) is int and number > 0 for number in files.values()) and sum(files.values()) <= MOST_MADE


def _read(process: subprocess.Popen[bytes], number: int) -> bytes:
    assert process.stdout is not None
    found = process.stdout.read(number)
    if len(found) < number:
        raise EOFError
    return found


def _checked(files: dict[str, bytes]) -> dict[str, bytes]:
    for name, content in files.items():
        at, first = FIRST_BYTES[name.rpartition(".")[2]]
        if content[at : at + len(first)] != first:
            raise UserError(f"the process that opens clips answered with a {name} that is none. Look at the clip's origin")
    return files


_shared = Worker()
atexit.register(_shared.close)


def render(content: bytes) -> dict[str, bytes]:
    """`Worker.render` by the process that this one shares among its threads."""
    return _shared.render(content)


def keep(store: Store, clip_id: str, files: dict[str, bytes]) -> None:
    """Writes what was rendered to where `media.path_of` finds it, the clip itself last: where that lies everything does. Raises ValueError where a variant is missing."""
    from base_model.checkpoint import atomic_write

    if set(files) != set(VARIANTS):
        raise ValueError(f"of a clip there are {', '.join(VARIANTS)}, not {', '.join(sorted(files)) or 'nothing'}")
    for name in sorted(files, key=lambda name: name == CLIP):
        atomic_write(path_of(store, clip_id, name), files[name])

"""Processes that take turns: each works only when it is told to (`_serve.py` is the other end)."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from base_model.errors import UserError

ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}
"""With more, what one thread frees is not there for the next."""
KEPT = {**ONE_ARENA, "MALLOC_TRIM_THRESHOLD_": str(2**32), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
"""Also, what is freed is kept: else it is chance which side gives memory back between two operations and pays for it again, up to a tenth of a step."""


class Spec(Protocol):
    """What a process is told at its start."""

    @property
    def threads(self) -> int: ...
    def model_dump_json(self) -> str: ...


@dataclass
class Worker:
    """A process that answers orders."""

    name: str
    process: subprocess.Popen[str]
    log: Path

    def ask(self, do: str, **order: object) -> dict[str, Any]:
        """Raises UserError where the process has ended."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # `answer` says why
            print(json.dumps({"do": do, **order}), file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            said = [text for text in self.log.read_text().splitlines() if text.strip()]
            raise UserError(f"the process of {self.name!r} ended: {said[-1] if said else 'it said nothing'}. See {self.log}")
        found: dict[str, Any] = json.loads(line)
        return found


@contextmanager
def worker(name: str, words: Sequence[str], spec: Spec, log: Path, *, memory: Mapping[str, str] = ONE_ARENA) -> Iterator[Worker]:
    """Starts a process; it ends with the block. memory: what the C library's allocator is told."""
    surroundings = {**os.environ, "OMP_NUM_THREADS": str(spec.threads), "HF_HUB_OFFLINE": "1", **memory}
    with open(log, "w") as errors:
        process = subprocess.Popen([*words, spec.model_dump_json()], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=surroundings)
    try:
        yield Worker(name, process, log)
    finally:
        process.kill()
        process.communicate()

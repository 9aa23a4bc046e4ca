"""How far a loop is and how long it will take, on standard error: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from types import TracebackType
from typing import Any

SECONDS_BETWEEN_LINES = 10.0


def duration(seconds: float) -> str:
    """75 -> "1:15", 3700 -> "1:01:40"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """`with Progress("sft", total=400, done=120) as progress: progress.advance(note="loss 0.12")`. The time left comes from the work done since then.

    total: None where nobody knows; then no time left is told.
    """

    def __init__(self, label: str, *, total: int | None, done: int = 0, quiet: bool = False) -> None:
        self.label, self.total, self.done, self.quiet = label, total, done, quiet
        self._first, self._begun = done, time.monotonic()
        self._last_line = self._begun - SECONDS_BETWEEN_LINES + 1  # the first line after a second
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            counts = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            times = (TimeElapsedColumn(), TextColumn("gone,"), TimeRemainingColumn(), TextColumn("left  {task.fields[note]}"))
            self._bar = Bar(*counts, *times, console=Console(stderr=True))
            self._task = self._bar.add_task(self.label, total=self.total, completed=self.done, note="")
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, note: str = "", *, steps: int = 1) -> None:
        """`steps` more are done."""
        self.done += steps
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=note)
        elif not self.quiet and (self.done == self.total or now - self._last_line >= SECONDS_BETWEEN_LINES):
            self._last_line = now
            of, left = "", ""
            if self.total is not None:
                of, left = f"/{self.total}", f", {duration((now - self._begun) / (self.done - self._first) * (self.total - self.done))} left"
            with contextlib.suppress(OSError):  # nobody reads it any more
                print(f"{self.label} {self.done}{of}  {duration(now - self._begun)} gone{left}  {note}".rstrip(), file=sys.stderr, flush=True)

    def skip(self, steps: int = 1) -> None:
        """`steps` more were done before: the time left does not come from them."""
        self.done, self._first = self.done + steps, self._first + steps
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)

"""Where a command spends its time, by looking at the main thread's stack 25 times a second: `python -m recipes.bench._stacks FILE WORDS...` runs `rushes WORDS` and writes FILE.

Between two looks wall and CPU seconds go to the innermost function of this project that was seen; what goes side by side (`base_model/threads.py`), to who asked for it.
CPU seconds over wall seconds is how many threads were busy.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from recipes.bench._results import Row

ROOT = Path(__file__).parents[2]
PACKAGES = ("align", "base_model", "reward", "recipes")
PASSED_ON = ("base_model/threads.py", "recipes/bench/_stacks.py")
EVERY = 0.04  # seconds
Spent = dict[str, list[float]]
"""Function -> its wall and CPU seconds."""


def function_of(frame: FrameType | None) -> str:
    """`align/run.py:backward_each`, the innermost function of this project from `frame` outwards; empty where there is none."""
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        name = file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else ""
        if name.partition("/")[0] in PACKAGES and name not in PASSED_ON and not frame.f_code.co_name.startswith("<"):
            return f"{name}:{frame.f_code.co_name}"
        frame = frame.f_back
    return ""


@contextmanager
def watched() -> Iterator[Spent]:
    """What this thread, from which it is called, spends its time on inside; filled at the end."""
    found: Spent = {}
    own, ended = threading.get_ident(), threading.Event()

    def watch() -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        while not ended.wait(EVERY):
            spent = found.setdefault(function_of(sys._current_frames().get(own)), [0.0, 0.0])
            now, used = time.perf_counter(), time.process_time()
            spent[0], spent[1], wall, cpu = spent[0] + now - wall, spent[1] + used - cpu, now, used

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        ended.set()
        watcher.join()


def largest(spent: Mapping[str, Sequence[float]], most: int) -> list[Row]:
    """The `most` functions that took longest; the rest in one row."""
    total = sum(wall for wall, _ in spent.values())
    ordered = sorted(spent.items(), key=lambda item: -item[1][0])
    rest = [sum(part) for part in zip(*(both for _, both in ordered[most:]), strict=True)]
    rows = [*ordered[:most], *([("all others", rest)] if rest else [])]
    return [{"where": name or "libraries alone", "seconds": wall, "share": wall / total, "threads": cpu / wall} for name, (wall, cpu) in rows]


def main(file: Path, words: Sequence[str]) -> int:
    from recipes import cli

    with watched() as spent:
        status = cli.main(words)
    file.write_text(json.dumps(spent))
    return status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))

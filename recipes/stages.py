"""The stages of a long command, each in a folder of its own: a finished one is not done again, a killed one goes on where it was. Shared by recipes, no command.

    out/<name>.json            the settings that the stages were made with; others are refused
    out/<stage>/stage.json     what a finished stage left: result, seconds, peak memory
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.processes import alone, on_main
from align.run import came_since
from base_model.checkpoint import check_can_write, disk_errors, read_json
from base_model.errors import UserError
from base_model.video.files import write_atomic
from recipes.memory import PeakMemory


@dataclass(frozen=True)
class Stages:
    """The stages in the folder `out` of the command `name`. settings: what all of them depend on, plain values. defaults: of settings that came later than some stages."""

    out: Path
    name: str
    settings: Mapping[str, Any]
    defaults: Mapping[str, Any]

    @property
    def file(self) -> Path:
        return self.out / f"{self.name}.json"

    def check_same(self) -> None:
        """Raises UserError where the folder holds stages that were made with other settings, or cannot be written."""
        check_can_write(self.out)
        if not self.file.exists():
            return
        before, now = read_json(self.file, f"the settings of the {self.name}"), self.settings
        before |= came_since(self.defaults, before, now)
        changed = [f"{key} ({before.get(key)} -> {now.get(key)})" for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
        if changed:
            raise UserError(f"{self.out} was begun with other settings: {', '.join(changed)}. Give the same ones, or another --out")

    def finished(self, stage: str) -> bool:
        return (self.out / stage / "stage.json").exists()

    def done(self, stage: str) -> dict[str, Any]:
        """What a finished stage left. Raises UserError where it is not finished, or its file is damaged."""
        file = self.out / stage / "stage.json"
        done = read_json(file, "what a finished stage left")
        missing = {"seconds", "peak_memory_bytes", "result"} - set(done)
        if missing:
            raise UserError(f"no {sorted(missing)[0]} in {file}. Delete the file to do that stage again")
        return done

    def do(self, stage: str, work: Callable[[Path, PeakMemory], dict[str, Any]]) -> dict[str, Any]:
        """Does the stage in its folder unless it is done; returns what it left. The time of an interrupted try counts only for what it saved.

        Processes that torchrun started do it together (`in_first` is for what one does), and the first one writes.
        """
        if on_main(lambda: self.finished(stage)):
            return on_main(lambda: self.done(stage))
        out, started = self.out / stage, time.monotonic()
        with disk_errors(out):
            out.mkdir(parents=True, exist_ok=True)
        with PeakMemory() as memory:
            result = work(out, memory)

        def written() -> dict[str, Any]:
            done = {"stage": stage, "seconds": round(time.monotonic() - started, 1), "peak_memory_bytes": memory.peak_bytes, "result": result}
            write_atomic(self.file, (json.dumps(self.settings, indent=2, sort_keys=True) + "\n").encode())
            write_atomic(out / "stage.json", (json.dumps(done, indent=2) + "\n").encode())
            return done

        return on_main(written)


def in_first(work: Callable[[Path, PeakMemory], dict[str, Any]]) -> Callable[[Path, PeakMemory], dict[str, Any]]:
    """`work` where the first process does it by itself, and the others wait."""

    def first(out: Path, memory: PeakMemory) -> dict[str, Any]:
        def by_itself() -> dict[str, Any]:
            with alone():
                return work(out, memory)

        return on_main(by_itself)

    return first

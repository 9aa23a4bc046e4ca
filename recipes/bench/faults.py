"""What is left when something goes wrong: random plans of kills, full disks, damaged files, jumping clocks and lost servers, carried out on real commands.

Each plan is a seed: a kind, a command at its smallest, a moment. Afterwards the command goes on, and must leave behind what an undisturbed run does, to the bit; answers that the
app acknowledged must be there; and what cannot be done is said in one line. Plans and verdicts: `_fault_plans.py`; how processes are started, and end: `_fault_processes.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from align.config import Count
from base_model.errors import UserError
from recipes.bench._fault_plans import KINDS, kind_of
from recipes.bench._results import Bench, Row, check_can_end, flat, here, write

VERSION = 1
"""Of what plans are and mean. One more wherever that changes: what was kept before is then refused, not read."""
QUICK = (2, 8, 11, 12)
"""Seeds of plans that take a few seconds."""
LONGEST_PLAN = 900.0
REMARK = (
    "A plan holds where the folder ends up as that of an undisturbed run, to the bit (weights, state, metrics), every acknowledged answer is there once, and every refusal is one "
    "line. `lost`: plans after which something saved or acknowledged was gone or another. `rushes bench faults --only 17` carries the plan of seed 17 out again. "
    "[How to read](../README.md#how-to-read-faults)."
)


class Config(Bench):
    out: Path = Path("runs/bench-faults")
    """Folder of what came of each plan, and of plans that did not hold; what is there is not repeated. `quick` and `only` keep nothing."""
    plans: Count = 200
    """Plans, with the seeds 0, 1, ...; kinds take turns. `quick` takes four."""
    only: Annotated[int, Field(ge=0)] | None = None
    """The seed of one plan to carry out again; its folder is left in `out` where it does not hold."""


class Worker:
    """A process that carries out plans in a folder. One that says nothing for too long, or dies, has failed its plan, and another takes its place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, seed: int) -> dict[str, Any]:
        if self._process is None:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # what forks has one thread
            words = [sys.executable, "-m", "recipes.bench._fault_plans", str(self.folder)]
            with open(self.folder / "worker.log", "ab") as log:
                self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, start_new_session=True)
        assert self._process.stdin is not None and self._process.stdout is not None
        print(seed, file=self._process.stdin, flush=True)
        ready, _, _ = select.select([self._process.stdout], [], [], LONGEST_PLAN)
        told = self._process.stdout.readline() if ready else ""
        if told:
            return dict(json.loads(told))
        broken = "the worker died" if ready else f"took longer than {LONGEST_PLAN:.0f} seconds"
        self.close()
        return {"seed": seed, "kind": kind_of(seed), "what": "", "held": False, "broken": broken, "lost": False, "seconds": LONGEST_PLAN}

    def close(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()
            self._process = None


@contextlib.contextmanager
def worker(folder: Path) -> Iterator[Worker]:
    folder.mkdir(parents=True, exist_ok=True)
    made = Worker(folder)
    try:
        yield made
    finally:
        made.close()


def carry_out(seeds: Sequence[int], stage: Path, out: Path | None) -> list[dict[str, Any]]:
    """What came of each plan, kept in `out` where there is one."""
    from recipes.bench._trained import Pace, kept

    pace, found = Pace("faults, plans", len(seeds)), []
    with worker(stage) as ask:
        for seed in seeds:
            file = out / "plans" / f"{seed}.json" if out else None
            fresh = file is None or not file.exists()
            told = kept(file, {"version": VERSION, "seed": seed}, partial(ask, seed)) if file else ask(seed)
            found.append(told)
            pace.advance(f"{told['kind']}: {told['what'] if told['held'] else told['broken']}", 1, fresh=fresh)
    return found


# Rows


def kind_rows(found: Sequence[Mapping[str, Any]]) -> list[Row]:
    """A row a kind: how many plans there were, and after how many everything held."""
    rows = []
    for kind in KINDS:
        some = [one for one in found if one["kind"] == kind]
        if some:
            seconds = [one["seconds"] for one in some]
            counts = {"plans": len(some), "held": sum(one["held"] for one in some), "lost": sum(one["lost"] for one in some)}
            example = next((one["what"] for one in some if one["held"]), "")
            rows.append({"kind": kind, **counts, "seconds": round(sum(seconds) / len(seconds), 1), "longest": max(seconds), "for_example": example})
    return rows


def failed_rows(found: Sequence[Mapping[str, Any]]) -> list[Row]:
    """A row a plan that did not hold."""
    return [{"seed": one["seed"], "kind": one["kind"], "broken": one["broken"]} for one in found if not one["held"]]


def verdict(found: Sequence[Mapping[str, Any]]) -> str:
    failed = len(failed_rows(found))
    return f"{failed} of {len(found)} plans did not hold." if failed else f"All of {len(found)} plans held; nothing was lost."


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    """`resume` changes nothing: what came of a plan is kept in `out`, and never repeated."""
    keeps = not cfg.quick and cfg.only is None
    check_can_end(cfg, out=cfg.out if keeps else None)
    if not hasattr(os, "fork") or sys.platform != "linux":
        raise UserError("processes are forked, and signals and disks are Linux's, faults. Run it on Linux")
    seeds = [cfg.only] if cfg.only is not None else QUICK if cfg.quick else range(cfg.plans)
    if keeps or cfg.only is not None:
        from align.run import lock_folder

        cfg.out.mkdir(parents=True, exist_ok=True)
        lock_folder(cfg.out)
        found = carry_out(seeds, cfg.out / "stage", cfg.out if keeps else None)
    else:
        with tempfile.TemporaryDirectory(prefix="rushes-bench-") as folder:
            found = carry_out(seeds, Path(folder), None)
    parts = {"kinds": kind_rows(found), "failed": failed_rows(found)}
    if cfg.write:
        sections = {"Plans": parts["kinds"], **({"Plans that did not hold": parts["failed"]} if parts["failed"] else {})}
        write(cfg, "faults", here("faults", cfg), "When something goes wrong", sections, remarks=[verdict(found), REMARK])
    return {"rows": flat(parts)}

"""What does `rushes demo` take, stage by stage, beside the demo of an older checkout, and does it end as well?

Both run in turns, each in a process of its own, with the Python and packages of this one. What a run took is kept in `out`: a benchmark that was killed goes on with the next run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from align.config import Count, commit
from align.run import lock_folder
from base_model.checkpoint import atomic_write
from base_model.errors import UserError
from recipes.bench import _stacks
from recipes.bench._results import Bench, Maker, Row, check_can_end, flat, here, note_read, paired_ratio, place, spread, write

ROOT = Path(__file__).parents[2]
TOY = Path(__file__).parents[1] / "configs" / "tiny" / "toy.yaml"
MOST = 16
"""Functions in the table of a profile."""
Side = Literal["now", "before"]
Told = dict[str, Any]  # of one demo: stage_seconds, wall_seconds, cpu_seconds, peak_memory_bytes, judge, flash_rate, commit, threads


class Config(Bench):
    before: Path | None = None
    """An older checkout, as `git worktree add FOLDER COMMIT` makes one; none means this one alone."""
    rounds: Count = 2
    """Demos of each checkout, in turns. `quick` makes one, of the toy configuration."""
    profile: bool = False
    """One more demo of this checkout, looked at while it runs: which functions its time goes to, and how many threads they keep busy."""
    out: Path = Path("runs/bench-demo")
    """Folder of the demos; finished ones are not made again. `quick` keeps nothing."""


def checkouts(cfg: Config) -> dict[Side, Path]:
    """Where the code of each side lies. Raises UserError where the older one holds none."""
    if cfg.before is None:
        return {"now": ROOT}
    if not (cfg.before / "recipes" / "demo.py").is_file():
        raise UserError(f"{cfg.before} holds no recipes/demo.py, before. Give a checkout of this project: git worktree add FOLDER COMMIT")
    return {"now": ROOT, "before": cfg.before.resolve()}


def run_demo(checkout: Path, out: Path, configuration: Sequence[str], command: Sequence[str] = ("recipes.cli",)) -> Told:
    """One demo from nothing to its report, by `python -m command demo`, and what it took. Raises UserError where it fails."""
    shutil.rmtree(out, ignore_errors=True)  # a demo that was killed would go on, and its time be that of a half
    log = out.with_suffix(".log")
    words = [sys.executable, "-m", *command, "demo", *configuration, "--out", str(out.resolve())]
    with open(log, "w") as said:
        process = subprocess.Popen(words, cwd=checkout, env={**os.environ, "PYTHONPATH": str(checkout)}, stdout=said, stderr=said)
        try:
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        raise UserError(f"the demo of {checkout} ended with status {process.returncode}, {log}. The end of that file says why")
    told = json.loads((out / "report" / "report.json").read_text())
    names = ("stage_seconds", "wall_seconds", "peak_memory_bytes", "judge", "flash_rate", "commit")
    return {name: told[name] for name in names} | {"cpu_seconds": used.ru_utime + used.ru_stime, "threads": told.get("hardware", {}).get("threads")}


def run_all(cfg: Config, folder: Path) -> dict[Side, list[Told]]:
    """The demos of each side that `folder` does not hold yet, in turns; then all of them. Raises UserError where those of a side are of several commits."""
    found: dict[Side, list[Told]] = {side: [] for side in checkouts(cfg)}
    for k in range(cfg.rounds):
        for side, checkout in checkouts(cfg).items():
            kept = folder / f"{side}-{k}.json"
            if not kept.exists():
                began = time.monotonic()
                print(f"demo {k + 1}/{cfg.rounds} {side}", file=sys.stderr, flush=True)
                run = run_demo(checkout, folder / f"{side}-{k}", [str(TOY)] if cfg.quick else [])
                atomic_write(kept, (json.dumps(run) + "\n").encode())
                print(f"demo {k + 1}/{cfg.rounds} {side}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
            found[side].append(json.loads(kept.read_text()))
            if found[side][-1]["commit"] != found[side][0]["commit"]:
                raise UserError(f"{kept} was made by commit {found[side][-1]['commit']}, others by {found[side][0]['commit']}. Give another --out")
    return found


def profiled(cfg: Config, folder: Path) -> list[Row]:
    """The largest costs of a demo of this checkout, on its main thread. Raises UserError where the folder holds those of another commit."""
    from recipes.bench._trained import kept

    def make() -> dict[str, Any]:
        print("demo now, looked at", file=sys.stderr, flush=True)
        stacks = (folder / "stacks.json").resolve()
        run_demo(ROOT, folder / "profile", [str(TOY)] if cfg.quick else [], (_stacks.__name__, str(stacks)))
        return dict(json.loads(stacks.read_text()))

    return _stacks.largest(kept(folder / "costs.json", {"commit": commit()}, make), MOST)


# Rows


def seconds_of(run: Told) -> dict[str, float]:
    """Seconds of each stage, of all, and of the CPU."""
    return {**run["stage_seconds"], "all stages": run["wall_seconds"], "all stages, CPU": run["cpu_seconds"]}


def time_rows(found: Mapping[Side, Sequence[Told]]) -> list[Row]:
    """Medians, and the medians of paired ratios: above 1 it is faster now."""
    rows: list[Row] = []
    for what in seconds_of(found["now"][0]):
        seconds = {side: [seconds_of(run)[what] for run in runs] for side, runs in found.items()}
        row: Row = {"what": what, "now": spread(seconds["now"]).median, "before": None, "ratio": None, "low": None, "high": None}
        if "before" in seconds:
            ratio = paired_ratio(seconds["before"], seconds["now"])
            row |= {"before": spread(seconds["before"]).median, "ratio": ratio.median, "low": ratio.low, "high": ratio.high}
        rows.append(row)
    return rows


def quality_rows(found: Mapping[Side, Sequence[Told]]) -> list[Row]:
    """What the judge finds right and the share of clips that flash, of the first run: others of the same seed end alike."""
    rows: list[Row] = []
    for measure, label in (("judge", "every attribute right"), ("flash_rate", "clips that flash")):
        for model in found["now"][0][measure]:
            told = {side: runs[0][measure].get(model) for side, runs in found.items()}
            low, high = (100 * told["now"][end] for end in ("low", "high"))
            shares = {side: None if each is None else 100 * each["mean"] for side, each in told.items()}
            rows.append({"what": f"{label}, {model}, %", "now": shares["now"], "interval": f"[{low:.1f}, {high:.1f}]", "before": shares.get("before")})
    peaks = {side: max(run["peak_memory_bytes"] for run in runs) / 2**20 for side, runs in found.items()}
    return [*rows, {"what": "peak memory, MiB", "now": peaks["now"], "interval": None, "before": peaks.get("before")}]


def main(cfg: Config, *, resume: bool = False) -> dict[str, Any]:
    """`resume` changes nothing: finished demos are not made again."""
    check_can_end(cfg, out=None if cfg.quick else cfg.out)
    checkouts(cfg)
    small = cfg.model_copy(update={"rounds": 1}) if cfg.quick else cfg
    with place(cfg, cfg.out) as out:
        out.mkdir(parents=True, exist_ok=True)
        lock_folder(out)
        found = run_all(small, out)
        costs = profiled(small, out) if cfg.profile else []
    parts = {"seconds": time_rows(found), "quality": quality_rows(found), **({"costs": costs} if costs else {})}
    if cfg.write:
        for run in found["now"]:
            note_read(Maker(run["commit"], str(run.get("threads") or "unknown")))
        commits = " and ".join(f"{runs[0]['commit'][:7]} ({side})" for side, runs in found.items())
        number = f"{small.rounds} demo{'s' * (small.rounds > 1)}"
        told = f"Commits {commits}; {number} of each in turns. ratio: before / now of runs right after each other, above 1 faster now, smallest and largest beside."
        write(cfg, "demo", here("demo", cfg), "The demo, now and before", parts, remarks=[told, "[How to read](../README.md#how-to-read-demo)."])
    return {"rows": flat(parts)}

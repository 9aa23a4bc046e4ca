"""Does a long run stay as it began: memory, file handles, threads, disk, and a metrics file that can be read?

`rushes nft` with a network of 48 channels, two clips of two prompts an iteration, in a process of its own that is looked at from outside twice a second. What is compared are the
means of three tenths of the run: from 10 %, after everything has been used once, in the middle, and at the end.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from align.config import Count
from align.progress import Progress
from align.run import CHECKPOINTS_KEPT, lock_folder, read_metrics
from base_model.errors import UserError
from recipes.bench._fault_plans import line, make_small
from recipes.bench._results import Bench, Row, check_can_end, flat, here, place, write
from recipes.cli import plain

POLICY = {"prompts": 2, "group_size": 2, "updates": 1, "micro_batch": 4, "lr": 1e-4, "lora_rank": 2}
SAMPLER = {"steps": 2, "frames": 5, "height": 16, "width": 16}
LOOK_SECONDS, QUICK_LOOK_SECONDS = 0.5, 0.1
MEMORY_SHARE = 0.02
"""By how much memory may grow from the beginning to the end; at least `MEMORY_BYTES`."""
MEMORY_BYTES = 8 << 20
WINDOWS = {"start": (0.1, 0.2), "middle": (0.45, 0.55), "end": (0.9, 1.0)}


class Config(Bench):
    out: Path = Path("runs/bench-long-run")
    """Folder of the run; one that was killed goes on, and is measured from there. `quick` keeps nothing."""
    iterations: Count = 2000
    """Iterations of RL. `quick` takes 120."""
    evaluate_every: Count = 200
    """Iterations between looks at held-out prompts. `quick` takes 30."""
    save_every: Count = 20
    """Iterations between checkpoints. `quick` takes 6."""


# The run, and what is seen of it


def words(cfg: Config, folder: Path) -> list[str]:
    """The command line of the run."""
    files = {"out": folder / "run", "model": folder / "network.safetensors", "reward": folder / "reward", "guard": folder / "guard"}
    policy = {**POLICY, "iterations": cfg.iterations, "evaluate_every": cfg.evaluate_every, "save_every": cfg.save_every}
    told = {**{f"policy.{key}": value for key, value in policy.items()}, **{f"sampler.{key}": value for key, value in SAMPLER.items()}}
    return [*line("nft", {**files, "prompt_pool": 8, "held_out_prompts": 4, "guards.stop": "never", **told}), "--resume"]


def look(process: psutil.Process, run: Path) -> dict[str, float]:
    """One look at the process and at its folder."""
    with process.oneshot():
        found = {"memory": process.memory_info().rss, "handles": process.num_fds(), "threads": process.num_threads()}
    checkpoints = run / "checkpoints"
    there = [Path(folder) / name for folder, folders, files in os.walk(run) for name in (*folders, *files)]  # a folder that goes away meanwhile ends no walk
    sizes = {file: size_of(file) for file in there}
    kept = sum(size for file, size in sizes.items() if checkpoints in file.parents)
    return {**found, "checkpoints": kept, "folders": sum(file.parent == checkpoints for file in sizes), "other": sum(sizes.values()) - kept}


def size_of(file: Path) -> int:
    """Bytes of a file; of what went away meanwhile, and of folders, none."""
    try:
        return file.stat().st_size if file.is_file() else 0
    except OSError:
        return 0


def iterations_of(metrics: Path) -> int:
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def run_watched(cfg: Config, folder: Path) -> list[dict[str, float]]:
    """The looks at a run that goes to its end, each with the iteration and the seconds since it began. Raises UserError where it fails."""
    run, looks, begun = folder / "run", [], time.monotonic()
    with open(folder / "log", "ab") as log:
        process = subprocess.Popen([sys.executable, "-m", "recipes.cli", *words(cfg, folder)], stdout=log, stderr=log)
    try:
        with Progress("long run", total=cfg.iterations) as progress:
            while process.poll() is None:
                time.sleep(QUICK_LOOK_SECONDS if cfg.quick else LOOK_SECONDS)
                done = iterations_of(run / "metrics.jsonl")
                if progress.done < min(done, cfg.iterations):
                    progress.advance(steps=min(done, cfg.iterations) - progress.done)
                try:
                    looks.append({"iteration": done, "seconds": time.monotonic() - begun, **look(psutil.Process(process.pid), run)})
                except psutil.Error:
                    break  # it has just ended
        if process.wait() != 0:
            raise UserError(f"the run ended with status {process.returncode}, {folder / 'log'}. The end of that file says why")
    finally:
        process.kill()
        process.wait()
    seen = [each for each in looks if 0 < each["iteration"] <= cfg.iterations]
    if not seen:
        raise UserError(f"nothing was left to look at, {run}. Give another --out")
    return seen


# Rows


def windowed(looks: Sequence[dict[str, float]], name: str) -> dict[str, float]:
    """Means of what was looked at in each window of the iterations that were seen. Raises UserError where one was not."""
    first, last = looks[0]["iteration"], looks[-1]["iteration"]
    found = {}
    for window, (begin, end) in WINDOWS.items():
        values = [each[name] for each in looks if first + begin * (last - first) <= each["iteration"] <= first + end * (last - first)]
        if not values:
            raise UserError(f"the run was too fast to be looked at in its {window}, iterations. Give more --iterations")
        found[window] = sum(values) / len(values)
    return found


def rows_of(cfg: Config, looks: Sequence[dict[str, float]], run: Path) -> list[Row]:
    """A row for each thing that must stay: its mean at the start, in the middle and at the end, and whether it did."""
    memory, handles, threads, checkpoints = (windowed(looks, name) for name in ("memory", "handles", "threads", "checkpoints"))
    allowed = max(MEMORY_SHARE * memory["start"], MEMORY_BYTES)
    rows: list[Row] = [
        {"what": "memory, MiB", **{key: value / 2**20 for key, value in memory.items()}, "holds": memory["end"] - memory["start"] <= allowed},
        {"what": "file handles", **handles, "holds": handles["end"] <= handles["start"] + 1},
        {"what": "threads", **threads, "holds": threads["end"] <= threads["start"] + 1},
        {"what": "checkpoints, KiB", **{key: value / 1024 for key, value in checkpoints.items()}, "holds": checkpoints["end"] <= 1.1 * checkpoints["start"]},
    ]
    most = max(each["folders"] for each in looks)  # the kept ones, the one that is written, and the one that goes
    rows.append({"what": "checkpoint folders at once, most", "start": None, "middle": None, "end": most, "holds": most <= CHECKPOINTS_KEPT + 2})
    rows.append({"what": "seconds an iteration", **pace(looks), "holds": None})
    rows.append({"what": "other files, KiB an iteration", **growth(looks), "holds": growth(looks)["end"] <= 1.5 * growth(looks)["start"] + 0.5})
    lines = read_metrics(run)
    told = [each["iteration"] for each in lines if "toward_good" in each]
    whole = told == list(range(cfg.iterations)) and not any(each.get("reward") is None or not math.isfinite(each["reward"]) for each in lines if "toward_good" in each)
    rows.append({"what": "lines of metrics, each iteration once", "start": None, "middle": None, "end": len(told), "holds": whole})
    return rows


def pace(looks: Sequence[dict[str, float]]) -> dict[str, float]:
    """Seconds an iteration, in each window."""
    return _slope(looks, "seconds", 1.0)


def growth(looks: Sequence[dict[str, float]]) -> dict[str, float]:
    """KiB that metrics, TensorBoard and held-out clips take more with every iteration, over the first third, the second and the last: looks are rare."""
    return _slope(looks, "other", 1 / 1024)


def _slope(looks: Sequence[dict[str, float]], name: str, unit: float) -> dict[str, float]:
    first, last = looks[0]["iteration"], looks[-1]["iteration"]
    found = {}
    for k, window in enumerate(WINDOWS):
        some = [each for each in looks if first + k * (last - first) / 3 <= each["iteration"] <= first + (k + 1) * (last - first) / 3]
        iterations = some[-1]["iteration"] - some[0]["iteration"] if some else 0
        found[window] = unit * (some[-1][name] - some[0][name]) / iterations if iterations else math.nan
    return found


def main(cfg: Config, *, resume: bool = False) -> dict[str, Any]:
    """`resume` changes nothing: a run that was killed goes on."""
    check_can_end(cfg, out=None if cfg.quick else cfg.out)
    small = cfg.model_copy(update={"iterations": min(120, cfg.iterations), "evaluate_every": 30, "save_every": 6}) if cfg.quick else cfg
    with place(cfg, cfg.out) as out:
        out.mkdir(parents=True, exist_ok=True)
        lock_folder(out)
        rows = measured(small, out)
    if cfg.write:
        broken = [row["what"] for row in rows if row["holds"] is False]
        verdict = f"Does not hold: {', '.join(broken)}." if broken else "Everything stays as it began."
        write(cfg, "long-run", here("long-run", cfg), "A long run", {"What must stay": rows}, remarks=[verdict, "[How to read](../README.md#how-to-read-long-run)."])
    return {"rows": flat({"long run": rows})}


def measured(cfg: Config, folder: Path) -> list[Row]:
    """The rows of a run in `folder`; of one that is finished there, those that were found. Raises UserError where that one had other settings."""
    from recipes.bench._trained import kept

    def make() -> dict[str, Any]:
        if not (folder / "network.safetensors").exists():
            make_small(folder)
        return {"rows": plain(rows_of(cfg, run_watched(cfg, folder), folder / "run"))}

    settings = {"iterations": cfg.iterations, "evaluate_every": cfg.evaluate_every, "save_every": cfg.save_every, "policy": POLICY, "sampler": SAMPLER}
    return list(kept(folder / f"rows-{cfg.iterations}.json", settings, make)["rows"])

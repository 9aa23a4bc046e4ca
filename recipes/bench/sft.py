"""A step of `rushes sft` beside a plain loop of diffusers, peft and accelerate on the same tiny Wan: loss, gradients, seconds, memory, useful tokens a second (`rushes bench sft`).

Equal sizes: the plain loop takes a step's clips as one batch. Mixed sizes: it pads them to the largest, or goes through them one by one and adds up gradients; ours packs them.
Each side is a process that works only when it is told to. They take turns, round after round, and nobody is always first; the first round of each is not counted.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from align.config import Count, Seed, Whole
from align.progress import Progress
from recipes.bench import _sft_worker
from recipes.bench._packing_wan import Grid
from recipes.bench._results import Bench, Row, check_can_end, here, paired_ratio, spread, write
from recipes.bench._sft_worker import Arm, Spec
from recipes.bench._workers import KEPT, Worker, worker
from recipes.bench.packing import grid_of, mixed_clips, shrunk

EQUAL: Grid = (3, 8, 12)
"""Tokens of a clip where all have one size: 288, about as many as of a mixed one."""
TOLERANCE = 1e-5  # of loss and gradients, over their size
PACKED = 1.5  # times as many useful tokens a second, mixed sizes


class Config(Bench):
    out: Path = Path("runs/bench-sft")
    """Folder for what the processes complain of."""
    train: tuple[Literal["full", "lora"], ...] = ("full", "lora")
    """What trains: all weights, or adapters of rank 8. `quick` takes the last."""
    batch: Count = 8
    """Clips of a step."""
    steps: Count = 8
    """Steps of a round."""
    rounds: Count = 5
    """Measured rounds. `quick` takes 1."""
    threads: Whole = 0
    """Threads of torch in each process; 0 means as many as cores that this one may use."""
    seed: Seed = 0
    """Seed of clips, weights, noise and times."""


class Case(NamedTuple):
    """What both sides train on, and what the plain loop does with it."""

    name: str
    grids: tuple[Grid, ...]
    peers: tuple[Arm, ...]
    equal: Arm  # the peer whose loss and gradient are ours


def cases(cfg: Config) -> list[Case]:
    mixed = tuple(shrunk(grid_of(clip)) for clip in mixed_clips(cfg.batch * cfg.steps, cfg.seed + 1))
    return [Case("equal sizes", (EQUAL,) * cfg.batch, ("one batch",), "one batch"), Case("mixed sizes", mixed, ("padded", "one by one"), "one by one")]


@dataclass
class Told:
    """What one side said."""

    worker: Worker
    rounds: list[dict[str, Any]] = field(default_factory=list)
    compared: dict[str, Any] = field(default_factory=dict)

    def seconds(self) -> list[float]:
        return [told["seconds"] for told in self.rounds]

    def cpu(self) -> list[float]:
        return [told["cpu"] for told in self.rounds]


def measure(cfg: Config, case: Case, train: Literal["full", "lora"], progress: Progress) -> dict[Arm, Told]:
    """All rounds of one setting. Raises UserError where a process ends."""
    arms: list[Arm] = ["ours", *case.peers]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rushes-bench-")))
        told: dict[Arm, Told] = {}
        for arm in arms:
            spec = Spec(arm=arm, train=train, grids=case.grids, batch=cfg.batch, threads=cfg.threads or len(os.sched_getaffinity(0)), out=folder / "run", seed=cfg.seed)
            log = cfg.out / f"{train}-{case.name}-{arm}.log".replace(" ", "-")
            told[arm] = Told(stack.enter_context(worker(arm, [sys.executable, "-m", _sft_worker.__name__], spec, log, memory=KEPT)))
        for side in told.values():
            side.worker.answer()
        file = str(folder / "captured.safetensors")
        told["ours"].compared = told["ours"].worker.ask("capture", file=file)
        told[case.equal].compared = told[case.equal].worker.ask("compare", file=file)
        for turn in range(1 + cfg.rounds):
            for k in range(len(arms)):
                arm = arms[(k + turn) % len(arms)]  # nobody is always first
                found = told[arm].worker.ask("steps", number=cfg.steps)
                progress.advance(f"{train}, {case.name}, {arm}")
                if turn:
                    told[arm].rounds.append(found)
    return told


# Rows


def rows_of(case: Case, train: str, told: dict[Arm, Told], tokens: float) -> list[Row]:
    """One row a comparison. tokens: of a step's clips, the mean over steps."""
    ours, equal = told["ours"], told[case.equal]
    where = f"{train}, {case.name}"
    rows = [
        _same(f"{where}: loss", ours.compared["loss"], equal.compared["loss"], equal.compared["loss_difference"], case.equal),
        _same(f"{where}: gradients", None, None, equal.compared["gradient_difference"], case.equal),
    ]
    for peer in case.peers:
        theirs = told[peer]
        if case.name == "equal sizes":
            rows.append(_faster(f"{where}: seconds a step", ours.seconds(), theirs.seconds(), peer, 1.0))
            rows.append({**_faster(f"{where}: CPU seconds a step", ours.cpu(), theirs.cpu(), peer, 1.0), "asked": None, "holds": None})
        else:
            a, b = ([tokens / seconds for seconds in side.seconds()] for side in (ours, theirs))
            rows.append(_more(f"{where}: useful tokens a second", a, b, peer, PACKED))
        rows.append(_less_memory(f"{where}: peak memory, MiB", ours, theirs, peer))
    return rows


def _row(what: str, peer_is: str, ours: float | None, peer: float | None) -> Row:
    nothing = dict.fromkeys(("ratio", "ratio_low", "ratio_high", "difference", "asked", "holds"))
    return {"what": what, "peer_is": peer_is, "ours": ours, "peer": peer, **nothing}


def _same(what: str, ours: float | None, peer: float | None, difference: float, peer_is: str) -> Row:
    return {**_row(what, peer_is, ours, peer), "difference": difference, "asked": TOLERANCE, "holds": difference <= TOLERANCE}


def _faster(what: str, ours: Sequence[float], peer: Sequence[float], peer_is: str, asked: float) -> Row:
    """The ratio is the peer's over ours: above 1, ours takes less."""
    ratio = paired_ratio(peer, ours)
    found = {"ratio": ratio.median, "ratio_low": ratio.low, "ratio_high": ratio.high, "asked": asked, "holds": holds(ratio.low, ratio.high, asked)}
    return {**_row(what, peer_is, spread(ours).median, spread(peer).median), **found}


def _more(what: str, ours: Sequence[float], peer: Sequence[float], peer_is: str, asked: float) -> Row:
    """The ratio is ours over the peer's: above 1, ours makes more."""
    row = _faster(what, [1 / value for value in ours], [1 / value for value in peer], peer_is, asked)
    return {**row, "ours": spread(ours).median, "peer": spread(peer).median}


def _less_memory(what: str, ours: Told, peer: Told, peer_is: str) -> Row:
    """The ratio is the peer's over ours; null where the system does not tell. Nothing is asked."""
    a, b = (side.rounds[-1]["peak_bytes"] for side in (ours, peer))
    known = bool(a and b)
    return {**_row(what, peer_is, a / 2**20 if known else None, b / 2**20 if known else None), "ratio": b / a if known else None}


def holds(low: float, high: float, asked: float) -> bool | None:
    """Whether all rounds say so; None where they do not agree."""
    return True if low >= asked else False if high < asked else None


def verdicts(rows: Sequence[Row]) -> list[str]:
    """What was asked, and whether it holds."""
    words = {True: "holds", False: "does not hold", None: "cannot be told"}
    told = []
    for row in rows:
        if row["asked"] is not None:
            found = f"{row['difference']:.1e} apart" if row["difference"] is not None else f"{row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"
            told.append(f"{row['what']}, beside {row['peer_is']}, asked {row['asked']:g}: {words[row['holds']]} ({found}).")
    return told


# The command


def shrunk_form(cfg: Config) -> Config:
    """The quick form: one kind of training, one round, whose mixed clips are those of a full one."""
    return cfg.model_copy(update={"train": cfg.train[-1:], "rounds": 1})


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    """`resume` changes nothing: a benchmark is measured anew."""
    check_can_end(cfg, out=cfg.out)
    small = shrunk_form(cfg) if cfg.quick else cfg
    cfg.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    total = (1 + small.rounds) * len(small.train) * sum(1 + len(case.peers) for case in cases(small))
    with Progress("sft", total=total) as progress:
        for train in small.train:
            for case in cases(small):
                tokens = small.batch * sum(map(math.prod, case.grids)) / len(case.grids)
                rows += rows_of(case, train, measure(small, case, train, progress), tokens)
    if cfg.write:
        write(cfg, "sft", here("sft", cfg), "SFT beside a plain loop of diffusers, peft and accelerate", {"A tiny Wan": rows}, remarks=verdicts(rows))
    return {"rows": rows}

"""A clock in the model, in what scores clips and in the log of an RL run: seconds of each phase of an update, without a word of the recipe changed."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from align.run import Run
from base_model.tiny import LatentVideoModel
from base_model.types import Conditioning, TrainableModel
from recipes.feedback import Assessment, Assessor, Feedback, Gather, HeldOut, Look

PHASES = ("rollout", "decode", "reward", "update")


@dataclass
class Laps:
    """Seconds of each phase, CPU seconds of all ("cpu") and clips through the network by kind, for every update of one run."""

    done: list[dict[str, float]] = field(default_factory=list)
    now: dict[str, float] = field(default_factory=dict)
    last: float = 0.0
    adding: threading.Lock = field(default_factory=threading.Lock)

    def begin(self) -> None:
        self.now, self.last = {"cpu": -time.process_time()}, time.perf_counter()

    def lap(self, phase: str) -> None:
        """The time since the last lap was spent in `phase`."""
        moment = time.perf_counter()
        self.add(phase, moment - self.last)
        self.last = moment

    def add(self, what: str, amount: float) -> None:
        with self.adding:
            self.now[what] = self.now.get(what, 0.0) + amount

    def end(self) -> None:
        self.lap("update")
        self.add("cpu", time.process_time())
        self.done.append(self.now)


@dataclass
class TimedModel(LatentVideoModel):
    laps: Laps = field(default_factory=Laps)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        kind = "trained" if torch.is_grad_enabled() else "reference" if "reward" in self.laps.now else "rolled"
        self.laps.add(kind, len(x_t))
        return super().__call__(x_t, t, cond)

    def decode(self, x0: Tensor) -> Tensor:
        self.laps.lap("reward")  # what a latent reward said before
        video = super().decode(x0)  # [B,T,3,H,W]
        self.laps.lap("decode")
        return video


@dataclass
class TimedAssessor(Assessor):
    laps: Laps = field(default_factory=Laps)

    def finished(self, model: TrainableModel, x0: Sequence[Tensor], cond: Conditioning, video: Tensor | None = None, *, gather: Gather = list) -> Assessment:
        self.laps.lap("rollout")
        seen = super().finished(model, x0, cond, video, gather=gather)
        self.laps.lap("reward")
        return seen


class TimedRun(Run):
    """A run whose updates end where they are logged."""

    def __init__(self, out: Path, cfg: Feedback, laps: Laps, metrics: Mapping[str, str]) -> None:
        super().__init__(out, cfg, seed=cfg.seed, resume=False, metrics=metrics, quiet=True)
        self.laps = laps

    def log(self, **scalars: float | Tensor) -> None:
        self.laps.end()
        super().log(**scalars)
        self.laps.begin()


class NoLook(HeldOut):
    """Nothing is held out: looks are no part of an update."""

    def watch(self, model: TrainableModel, assess: Assessor, iteration: int) -> Look:
        return Look(dict.fromkeys(("held_out_reward", "held_out_guard", "held_out_violation_rate"), math.nan), torch.zeros(0), None)

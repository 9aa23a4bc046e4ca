"""A small real training loop on `Run`, run by test_run.py in this process and in others that get killed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from align.config import Config, load
from align.objectives import Loss
from align.run import Run
from base_model.errors import RushesError

METRICS = {"loss": "Mean squared error.", "grad_norm": "Norm of the gradient.", "drift": "Distance of the weights from their average."}


class LoopConfig(Config):
    out: Path
    """Folder of the run."""
    iterations: int = 30
    """Iterations."""
    save_every: int = 2
    """Iterations between checkpoints."""
    lr: float = 1e-2
    """Learning rate."""
    seed: int = 0
    """Seed."""


class Average:
    """A running mean of weights, and of the losses it saw: state of several kinds."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.weights = {name: p.detach().clone() for name, p in network.named_parameters()}
        self.losses: list[float] = []
        self.best: tuple[int, float] = (-1, float("inf"))
        self.histogram = np.zeros(4, dtype=np.int64)

    def update(self, i: int, loss: float) -> float:
        self.losses = [*self.losses[-2:], loss]
        self.best = min(self.best, (i, loss), key=lambda entry: entry[1])
        self.histogram[i % 4] += 1
        for name, p in self.network.named_parameters():
            self.weights[name].lerp_(p.detach(), 0.1)
        return float(sum((self.weights[name] - p.detach()).square().sum() for name, p in self.network.named_parameters()))

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights, "losses": self.losses, "best": self.best, "histogram": self.histogram}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights, self.losses, self.best, self.histogram = state["weights"], state["losses"], state["best"], state["histogram"]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 80), nn.BatchNorm1d(80), nn.Dropout(0.1), nn.Linear(80, 8))


def losses(model: nn.Module, part: torch.Tensor) -> Iterator[Loss]:
    """Of two of the four rows of a batch, [2,8]."""
    yield Loss((model(part) - part.roll(1, 1)).square().mean() / 2, {})


def train(cfg: LoopConfig, *, resume: bool = False, eight_bit: bool = False) -> dict[str, torch.Tensor]:
    run = Run(cfg.out, cfg, seed=cfg.seed, resume=resume, metrics=METRICS)
    torch.manual_seed(cfg.seed)  # Run's own seeds differ by process
    model = network()
    if eight_bit:
        from bitsandbytes.optim import AdamW8bit

        optimizer = AdamW8bit(model.parameters(), lr=cfg.lr, min_8bit_size=512)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 / (1 + i / 10))
    average = Average(model)
    for name, thing in {"network": model, "optimizer": optimizer, "schedule": schedule, "average": average}.items():
        run.register(name, thing)
    run.count_forwards(model)
    run.log(loss=(model(run.noise((8,), 4, "before", 0)) ** 2).mean())
    for i in run.iterations(cfg.iterations, save_every=cfg.save_every, label="loop"):
        x = run.noise((8,), 4, "noise", i * 4)  # [4,8]
        told = run.backward_each(optimizer, partial(losses, model), run.share(x.split(2)), one_by_one=True)
        loss = torch.stack([each.value for each in told]).sum() + 0.01 * torch.randn(())
        norm = run.step(optimizer, 1.0, schedule)
        run.log(loss=loss, grad_norm=norm, drift=average.update(i, float(loss)))
    run.log(loss=average.losses[-1])
    return {**dict(model.state_dict()), **{f"average.{name}": value for name, value in average.weights.items()}}


def main(arguments: Sequence[str]) -> int:
    try:
        train(load(LoopConfig, None, arguments), resume=True)
    except RushesError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


def serve() -> None:
    """For every line of arguments on standard input, trains in a process of its own: prints its pid, then how it ended. Spares each one the imports."""
    import torch._dynamo
    import torch.utils.tensorboard  # noqa: F401

    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os._exit(main(line.split()))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) if sys.argv[1:] else serve())

"""`Run`: the plumbing of a recipe, and nothing else. It has no hooks and never calls back into a recipe. In a rehearsal (`selfcheck.py`) it makes one iteration, without a step.

    run = Run(cfg.out, cfg, seed=cfg.seed, resume=resume, metrics=METRICS)
    network.to(run.device)
    run.register("network", network)
    run.register("optimizer", optimizer)
    for i in run.iterations(cfg.iterations, save_every=50, label="sft"):
        noise = run.noise((3, 8, 8), 4, "noise", i * 4)          # [4,3,8,8]
        loss = (network(noise) - noise).square().mean()
        run.backward(loss)
        run.log(loss=loss, grad_norm=run.step(optimizer, max_grad_norm=1.0))

Rules that make a killed and resumed run bit-identical to an uninterrupted one:
- randomness comes from `generator`, `rng` and `noise`, which depend on (seed, stream, index) only; torch's, numpy's and Python's global generators are seeded
  anew at the start of every iteration;
- everything that changes in the loop is registered; it is restored when the loop begins, so code before the loop always sees the start of the run;
- `metrics.jsonl` is cut back to the checkpoint; lines differ between such runs in `WALL_CLOCK_FIELDS` only.

Under torchrun every process has the whole batch in mind, makes its `share` of the parts, and tells the others with `gather`; `backward_each` adds up what all of them found. So
state is the same in all, the first one writes it, and a run may go on with another number of processes. `shard` spreads a network that is too large for that over the processes
(`sharding.py`); its files are the same, so such a run may go on unsharded, and any other sharded.

On disk, from the first iteration on: `.lock`, `run.json` (config, seed, commit, versions, what was noted), `metrics.jsonl`, `metrics.json` (one sentence a metric), `tensorboard/`,
`checkpoints/<iteration>/` (safetensors, `state.json`, `run.json`, and `SHA256SUMS` of them; the last two are kept). A run resumes from the newest that is as it was written; one
that is not is told, and moved aside to `checkpoints/damaged-<iteration>/`. Where it goes on with another commit or other versions, that is told, too; `sessions` in `run.json` says
which iterations each made.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Protocol, TypeVar

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from align import context_parallel, processes, selfcheck, sharding
from align.config import Config, dump, leaves, path_keys, resolved
from align.objectives import Loss
from align.progress import Progress
from align.state import flatten, unflatten
from base_model.checkpoint import atomic_write, check_can_write, check_is_safetensors, disk_errors, fsync_folder, load_weights, read_json, weights_bytes, write_synced
from base_model.errors import GuardStop, Interrupted, UserError
from base_model.networks.packing import Segments
from base_model.threads import in_threads

T = TypeVar("T")
R = TypeVar("R")

BUILT_IN_METRICS = {
    "iteration": "Index of the iteration that wrote the line, from 0; the number of iterations for lines written after the loop.",
    "seconds": "Wall-clock seconds of work since the run began, without the time between an interruption and its resumption.",
    "forward_passes": "Clips sent through the counted networks since the run began, training and sampling together.",
    "forward_equivalents": "What training alone cost, in forward passes of a clip: a backward pass counts two, looks at held-out clips nothing.",
}
WALL_CLOCK_FIELDS = frozenset({"seconds", "iteration_seconds", "clips_per_second", "tokens_per_second", "mfu", "data_wait", "peak_memory_bytes"})
"""Metrics that depend on the machine: the only ones that differ between a resumed run and an uninterrupted one."""

CHECKPOINTS_KEPT = 2
SUMS = "SHA256SUMS"
"""File of a checkpoint with the hashes of its other files, as `sha256sum -c` reads them."""
DAMAGED = "damaged-"
SAME_WORD_SECONDS = 1.0  # a scheduler signals every process, and torchrun passes on what it was sent: each process hears it twice


class Stateful(Protocol):
    """Anything a checkpoint can keep. `state_dict` may nest tensors, arrays, numbers, text, lists, tuples and mappings."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any, /) -> Any: ...


def derived_seed(seed: int, stream: str, index: int) -> int:
    """63 bits out of sha256 of the three."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{stream}/{index}".encode()).digest()[:8], "big") >> 1


def read_metrics(out: Path, *, wall_clock: bool = True) -> list[dict[str, Any]]:
    """The lines of `out/metrics.jsonl`; without `wall_clock`, the fields in `WALL_CLOCK_FIELDS` are left out."""
    file = out / "metrics.jsonl"
    try:
        lines = [dict(json.loads(line)) for line in file.read_text().splitlines()]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"cannot read the metrics, {file}: {error}. Give the folder of a run, or restore the file") from error
    return [{name: value for name, value in line.items() if wall_clock or name not in WALL_CLOCK_FIELDS} for line in lines]


class Run:
    """One training run in the folder `out`: ranks, seeds, resume, metrics, progress and the stop on numbers that are not finite.

    `metrics` documents every name `log` may be given, one sentence each. Raises UserError where `out` already holds a run and `resume` is off,
    and where it is on and the configuration is another (lengths and paths may change).
    """

    def __init__(self, out: Path, cfg: Config, *, seed: int, resume: bool, metrics: Mapping[str, str], quiet: bool = False) -> None:
        clash = sorted(set(metrics) & set(BUILT_IN_METRICS))
        if clash:
            raise ValueError(f"metrics {clash} are written by Run itself")
        self.accelerator = processes.join()
        self.processes = 1 if processes.is_alone() else self.accelerator.num_processes
        self.rank = self.accelerator.process_index if self.processes > 1 else 0
        self.device, self.is_main = self.accelerator.device, self.rank == 0
        self.out, self.cfg, self.seed, self.quiet = Path(out), cfg, seed, quiet or not self.is_main
        self.metrics = {**BUILT_IN_METRICS, **metrics}
        self.iteration = 0  # iterations finished; inside the loop also the index of the present one
        self._spent, self._own = [0, 0], [0, 0]  # forward passes and -equivalents: of all processes when they last told one another; of this one since
        self._counting = threading.Lock()
        self._looks = False
        self._registered: dict[str, tuple[Stateful, bool]] = {}
        self._looping = self._stopping = self._compared = False
        self._sharded: nn.Module | None = None
        self._sharded_trains = False
        self._split: nn.Module | None = None
        self._writer: Any = None
        self._note = self._remark = ""
        self._notes: dict[str, Any] = {}
        self._label = "the run"
        self._begun, self._seconds_before = time.monotonic(), 0.0
        if self.device.type == "cpu":
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
            torch.use_deterministic_algorithms(True, warn_only=True)
        self._seed_globals("start", 0)
        self._claimed = False
        self._checkpoint = self._look(resume)
        self._resumed = self._description_file.exists()

    # Several processes

    def share(self, items: Sequence[T], key: str = "", *, paced: bool = False) -> list[T]:
        """Which of the items, the same in all processes, are this one's: consecutive ones, in the order of the processes; all where there is one process.

        key: what in the configuration makes the items. With it, raises UserError where a process would have none. Raises UserError in a sharded run where the processes
        would not have equally many: each would wait for the others' weights. paced: they may, as the recipe keeps pace (`keep_pace`). Where clips are split all items are
        everyone's: of each clip a share.
        """
        if self._split is not None:
            return list(items)
        if self._sharded is not None and not paced and len(items) % self.processes:
            told = f"a sharded run makes equally many passes in each of its {self.processes} processes, and {len(items)} parts{key and f', {key},'} are no multiple of that"
            raise UserError(f"{told}. Change their number, start other processes, or leave sharding off")
        if key and len(items) < self.processes:
            raise UserError(f"{self.processes} processes cannot share {len(items)} micro-batches, {key}. Lower it, or start fewer processes")
        begin, end = (len(items) * rank // self.processes for rank in (self.rank, self.rank + 1))
        return list(items[begin:end])

    def gather(self, items: Iterable[T]) -> list[T]:
        """The items of all processes, in the order of the processes: numbers, text, tensors on the CPU, and what holds them. Where clips are split all have the same ones."""
        return list(items) if self.processes == 1 or self._split is not None else list(gather_object(list(items)))

    def wait(self) -> None:
        """For the others."""
        if self.processes > 1:
            self.accelerator.wait_for_everyone()

    def on_main(self, work: Callable[[], R]) -> R:
        """What the first process finds, in all of them; the others wait. Its UserError or GuardStop is raised in all of them, too."""
        return processes.on_main(work) if self.processes > 1 else work()

    # Verbs of a recipe

    def note(self, name: str, value: Any) -> None:
        """Adds to `run.json` what the configuration does not say, before the first iteration. Raises UserError where a resumed run was begun with another value."""
        self._notes[name] = json.loads(json.dumps(value))
        before = read_json(self._description_file, "the description of the run") if self._resumed else {}
        if name in before and before[name] != self._notes[name]:
            told = f"{self.out} was begun with another `{name}` than there is now, {self._description_file}"
            raise UserError(f"{told}. Go on with what it was begun with, or begin again in another --out")

    def shard(self, network: nn.Module, *, frozen: bool = False) -> None:
        """Spreads the weights of `network`, what the recipe calls, over the processes, in place (`sharding.py`), and moves it onto the device; one process keeps it whole.

        frozen: only those that do not train, under an adapter. Else call it before optimizer and average are built. Raises UserError for what cannot be cut, GuardStop where
        processes begin with other weights.
        """
        if self._sharded is not None or self._looping:
            raise ValueError("a run shards one network, before its loop begins")
        if self.processes == 1:
            network.to(self.device)
            return
        sharding.check_can_shard(network)
        self._compare_norms(list(network.parameters()))  # afterwards each holds a part, which no other can check
        sharding.shard(network, self.device, self.processes, frozen=frozen)
        self._sharded, self._sharded_trains = network, not frozen

    def split_clips(self, network: nn.Module) -> None:
        """Spreads the tokens of every clip over the processes, in place (`context_parallel.py`): all of them then work on all items together; one process keeps clips whole.

        Raises UserError for a network that cannot be split.
        """
        if self._sharded is not None or self._split is not None or self._looping:
            raise ValueError("a run splits the clips of one network, which is not sharded, before its loop begins")
        if self.processes > 1:
            context_parallel.split(network, self.device, self.processes)
            self._split = network

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, every process holds all weights of the sharded network, or all tokens of split clips, to call without gradient as often as it likes. All processes enter.

        In other runs nothing happens.
        """
        with contextlib.ExitStack() as inside:
            if self._sharded is not None:
                inside.enter_context(sharding.whole(self._sharded))
            if self._split is not None:
                inside.enter_context(context_parallel.whole(self._split))
            yield

    def keep_pace(self, passes: int, idle: Callable[[], object]) -> None:
        """Before this process makes so many passes through a sharded network: calls `idle` as often as it makes fewer of them than the process that makes most.

        A pass gathers weights from all processes, so all must make equally many, forward and back. idle: makes one pass of the same kind; it is not counted, and what it finds is
        dropped. The others would be waited for as long. In other runs nothing happens. All processes call it.
        """
        if self._sharded is None:
            return
        lacking, counted = max(self.gather([passes])) - passes, list(self._own)
        for _ in range(lacking):
            idle()
        self._own = counted

    def unshard(self) -> None:
        """Makes the network that was sharded, or whose clips were split, plain again, for good: before it is merged or saved. Call it behind the loop, in all processes."""
        if self._sharded is not None:
            sharding.unshard(self._sharded)
            self._sharded, self._sharded_trains = None, False
        if self._split is not None:
            context_parallel.unsplit(self._split)
            self._split = None

    def register(self, name: str, thing: Stateful, *, trainable_only: bool = False) -> None:
        """Keeps `thing` in every checkpoint. `trainable_only`: of a network, the parameters that train (a LoRA adapter on a frozen base)."""
        if self._looping:
            raise ValueError(f"register {name!r} before the loop begins")
        if name in self._registered or not re.fullmatch(r"[a-z0-9_]+", name):
            raise ValueError(f"cannot register {name!r}: names are unique and made of a-z, 0-9 and _")
        self._registered[name] = (self.accelerator.unwrap_model(thing) if isinstance(thing, nn.Module) else thing), trainable_only

    def count_forwards(self, network: nn.Module) -> None:
        """Counts clips through `network` into `forward_passes` and `forward_equivalents`: one a segment where the call is packed, else the first axis of its first tensor."""
        network.register_forward_pre_hook(self._count_forward, with_kwargs=True)
        network.register_forward_hook(self._count_backward, with_kwargs=True)

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Forward passes inside are no part of what training costs."""
        self._looks = True
        try:
            yield
        finally:
            self._looks = False

    def iterations(self, n: int, *, save_every: int, label: str) -> Iterator[int]:
        """0 .. n-1, or from where the last checkpoint stopped. Saves every `save_every` and at the end; shows progress and the time left.

        SIGINT and SIGTERM end it after the iteration in progress is finished and saved: raises Interrupted. A second Ctrl-C, more than a second later, stops at once.
        """
        if self._looping:
            raise ValueError("a run has one loop")
        self._looping, self._label = True, label
        self._claim()
        self._restore()
        if selfcheck.rehearsing():
            n = self.iteration + 1
        with self._signals() as received, Progress(label, total=n, done=self.iteration, quiet=self.quiet) as progress:
            for i in range(self.iteration, 0 if self._stopping else n):
                self._seed_globals("iteration", i)
                yield i
                self.iteration = i + 1
                progress.advance("  ".join(filter(None, (self._remark, self._note))))
                interrupted = self._any_rank(bool(received))
                if interrupted or self._stopping or self.iteration == n or self.iteration % save_every == 0:
                    self.save()
                if interrupted or self._stopping:
                    break
            if self._any_rank(bool(received)):  # also while the last iteration was being saved
                where = f"after iteration {self.iteration} of {n} and is saved in {self.out}"
                raise Interrupted(f"{label} was interrupted {where}. Go on with --resume", (received or [signal.SIGTERM])[0])
        self._flush_tensorboard()

    def stop(self) -> None:
        """Makes the present iteration the last one (it is finished and saved); a resumed run stays stopped."""
        self._stopping = True

    def generator(self, stream: str, index: int) -> torch.Generator:
        """A CPU generator that depends on the run's seed, `stream` and `index` only."""
        return torch.Generator().manual_seed(derived_seed(self.seed, stream, index))

    def rng(self, stream: str, index: int) -> np.random.Generator:
        """`generator` for numpy."""
        return np.random.default_rng(derived_seed(self.seed, stream, index))

    def noise(self, shape: Sequence[int], n: int, stream: str, index: int) -> Tensor:
        """Standard normal [n, *shape] on the device; clip k has a stream of its own, `index + k`, so any split into batches gives the same noise."""
        return torch.stack([torch.randn(tuple(shape), generator=self.generator(stream, index + k)) for k in range(n)]).to(self.device)

    def backward(self, loss: Tensor, divide_by: float = 1) -> None:
        """Adds the gradient of `loss` [] / `divide_by`. Raises GuardStop, before any optimizer sees it, where the loss is not finite."""
        self._check_finite("loss", loss.detach())
        self.accelerator.backward(loss / divide_by)

    def backward_each(self, optimizer: Any, losses: Callable[[T], Iterable[Loss]], parts: Sequence[T], *, one_by_one: bool = False) -> list[Loss]:
        """Adds the gradient of all losses of all parts of a batch; the parts go side by side on the CPU's cores (`in_threads`), the losses of one part one by one.

        one_by_one: parts too, each on all cores, for what is too large to go side by side; then the bits depend on the number of cores.

        losses: a generator that yields losses ready to be added, already divided by what the batch holds. The sum is taken in the order of the parts, so it does
        not depend on the number of cores. parts: this process's `share` of them; gradients of all processes are added up. Returns the losses of all without graph,
        in order. Without any loss gradients stay as they were. Raises GuardStop, before any optimizer sees it, where one is not finite. In a sharded run parts go one by one.
        """
        if self._sharded_trains:
            return self._backward_sharded(losses, parts)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

        def gradient(part: T) -> tuple[list[Tensor], list[Loss]]:
            total, seen = [torch.zeros_like(parameter) for parameter in parameters], []
            for loss in losses(part):
                for kept, new in zip(total, torch.autograd.grad(loss.value, parameters, allow_unused=True), strict=True):
                    if new is not None:
                        kept.add_(new)
                seen.append(Loss(loss.value.detach(), loss.stats))
            return total, seen

        found = [gradient(part) for part in parts] if one_by_one else in_threads(gradient, parts, self.device)
        told = self._told([loss for _, seen in found for loss in seen])
        if not told:
            return []
        gradients = found[0][0] if found else [torch.zeros_like(parameter) for parameter in parameters]
        for total, _ in found[1:]:
            for kept, new in zip(gradients, total, strict=True):
                kept.add_(new)
        if self.processes > 1:
            gradients = self.accelerator.reduce(gradients, reduction="sum")
        for parameter, new in zip(parameters, gradients, strict=True):
            parameter.grad = new if parameter.grad is None else parameter.grad.add_(new)
        return told

    def _backward_sharded(self, losses: Callable[[T], Iterable[Loss]], parts: Sequence[T]) -> list[Loss]:
        """`backward_each` where gradients are added up by the network itself, into its own part of them."""
        numbers = self.gather([len(parts)])
        if len(set(numbers)) > 1:
            told = f"a sharded run makes equally many passes in each process, and they have {', '.join(map(str, numbers))} parts of this step"
            raise UserError(f"{told}. Give every step a multiple of {self.processes} parts, or leave sharding off")
        seen = []
        for part in parts:
            for loss in losses(part):
                loss.value.backward()
                seen.append(Loss(loss.value.detach(), loss.stats))
        return self._told(seen)

    def _told(self, losses: list[Loss]) -> list[Loss]:
        """Those of all processes. Raises GuardStop where one is not finite."""
        told = self._of_all_processes(losses)
        for loss in told:
            if not bool(loss.value.isfinite()):
                self._stop_not_finite("loss", loss.value)
        return told

    def step(self, optimizer: Any, max_grad_norm: float, scheduler: Any = None) -> float:
        """Clips the gradient to `max_grad_norm`, steps the optimizer (and the scheduler) and clears the gradient; returns its norm before clipping.

        Raises GuardStop, leaving the weights as they were, where the norm is not finite, and before the first step where ranks hold or draw other numbers.
        """
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._compare_ranks(parameters)
        norm = sharding.gathered(torch.as_tensor(self.accelerator.clip_grad_norm_(parameters, max_grad_norm)))
        self._check_finite("gradient norm", norm)
        if not selfcheck.rehearsing():
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def log(self, **scalars: float | Tensor) -> None:
        """One line of `metrics.jsonl` and the TensorBoard scalars; means over ranks; what is not finite is written as null.

        Before the loop of a resumed run it writes nothing: those lines are in the file. Raises ValueError for an undocumented name.
        """
        unknown = sorted(set(scalars) - (set(self.metrics) - set(BUILT_IN_METRICS)))
        if unknown:
            raise ValueError(f"undocumented metrics {unknown}: give each one a sentence in the `metrics` of Run")
        values = {name: self._mean_over_ranks(value) for name, value in scalars.items()}
        self._add_up_passes()
        if self._checkpoint is not None and not self._looping:
            return
        self._claim()
        if not self.is_main:
            return
        self._note = "  ".join(f"{name} {value:.4g}" for name, value in list(values.items())[:3])
        line: dict[str, float | None] = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line |= {"iteration": self.iteration, "seconds": round(self.seconds, 3), "forward_passes": self.forward_passes}
        line["forward_equivalents"] = self.forward_equivalents
        self._append(json.dumps(line, sort_keys=True) + "\n")
        self._to_tensorboard(values)

    def remark(self, text: str) -> None:
        """Stands in the progress line before the metrics, until the next remark."""
        self._remark = text

    def save(self) -> None:
        """Writes `checkpoints/<iteration>` (whole or not at all) and drops all but the last two. Raises UserError where the disk is full."""
        self._claim()
        self._add_up_passes()
        gather = partial(sharding.gathered, keep=self.is_main)  # by all processes, one tensor after another
        states = {name: flatten(self._state_of(*entry), gather) for name, entry in self._registered.items()}
        if self.is_main:
            self._write(states)
        self.wait()

    @property
    def forward_passes(self) -> int:
        """Clips through the counted networks since the run began; of other processes up to the last line of metrics or checkpoint."""
        return self._spent[0] + self._own[0]

    @property
    def forward_equivalents(self) -> int:
        """What training alone cost, in forward passes of a clip; of other processes the same."""
        return self._spent[1] + self._own[1]

    @property
    def seconds(self) -> float:
        """Seconds of work since the run began, over all its sessions."""
        return self._seconds_before + time.monotonic() - self._begun

    # The folder

    @property
    def _metrics_file(self) -> Path:
        return self.out / "metrics.jsonl"

    @property
    def _description_file(self) -> Path:
        return self.out / "run.json"

    @property
    def _description(self) -> bytes:
        return (json.dumps({"seed": self.seed, "sessions": self._sessions, **self._resolved, **self._notes}, indent=2, sort_keys=True) + "\n").encode()

    def _look(self, resume: bool) -> Path | None:
        """Raises UserError where `out` cannot be used; returns the checkpoint to go on from, if any. Writes nothing into a new folder."""
        self._resolved = resolved(self.cfg)
        check_can_write(self.out)
        begun = self._description_file.exists()
        self.wait()  # or one would find the run that another has just begun
        self._sessions = [self._session(0)]
        if not begun:
            return None
        if not resume:
            raise UserError(f"{self.out} already holds a run. Use --resume to go on with it, or another --out")
        if self.is_main:
            with disk_errors(self.out):
                lock_folder(self.out)
                _recover(self.out / "checkpoints")
        self.wait()
        before = read_json(self._description_file, "the description of the run")
        self._check_same_config(before)
        checkpoint = self.on_main(self._newest_whole)
        self._sessions = self._sessions_after(before, _read_state(checkpoint)["iteration"] if checkpoint else 0)
        kept = _read_state(checkpoint)["metrics_bytes"] if checkpoint else 0
        if checkpoint and (not self._metrics_file.exists() or self._metrics_file.stat().st_size < kept):
            raise UserError(f"{self._metrics_file} is shorter than its checkpoint {checkpoint} says. Put it back, or start again with another --out")
        return checkpoint

    def _newest_whole(self) -> Path | None:
        """The newest checkpoint that is as it was written; None where none was. Tells of those that are not. Raises UserError where none is."""
        found = _checkpoints(self.out)
        for checkpoint in reversed(found):
            wrong = damage(checkpoint)
            if not wrong:
                return checkpoint
            told = f"damaged checkpoint, {checkpoint}: {wrong}"
            if checkpoint == found[0]:
                raise UserError(f"{told}, and there is none before it. Put it back, or begin again in another --out")
            print(f"{told}. It is moved aside, and the run goes on from the checkpoint before it", file=sys.stderr, flush=True)
        return None

    def _claim(self) -> None:
        """Makes `out` this run's folder, once: before the first line or iteration, and not before a recipe has loaded what it needs."""
        if self._claimed:
            return
        self._claimed = True
        if self.is_main:
            with disk_errors(self.out):
                self.out.mkdir(parents=True, exist_ok=True)
                lock_folder(self.out)
                if not self._resumed and self._description_file.exists():
                    raise UserError(f"{self.out} already holds a run. Use --resume to go on with it, or another --out")
                _clean(self.out)
                if self._checkpoint is not None:
                    _move_aside([newer for newer in _checkpoints(self.out) if newer.name > self._checkpoint.name])
                with open(self._metrics_file, "ab") as metrics:
                    metrics.truncate(_read_state(self._checkpoint)["metrics_bytes"] if self._checkpoint else 0)
            atomic_write(self.out / "metrics.json", (json.dumps(self.metrics, indent=2, sort_keys=True) + "\n").encode())
            atomic_write(self._description_file, self._description)
        self.wait()

    def _check_same_config(self, before: dict[str, Any]) -> None:
        free = path_keys(type(self.cfg))
        then, now = ({"seed": seed, **leaves(config)} for seed, config in ((before.get("seed"), before.get("config")), (self.seed, self._resolved["config"])))
        then |= came_since(leaves(dump(type(self.cfg).model_construct())), then, now)
        differ = [key for key in sorted({*then, *now}) if then.get(key) != now.get(key) and key not in free and key.rpartition(".")[2] not in self.cfg.may_change]
        changed = [f"{key} ({json.dumps(then.get(key))} -> {json.dumps(now.get(key))})" for key in differ]
        if changed:
            raise UserError(f"{self.out} was begun with another config: {', '.join(changed)}. Give the same values to --resume, or another --out")

    def _session(self, iteration: int) -> dict[str, Any]:
        """What makes the iterations from this one on."""
        return {"iteration": iteration, "commit": self._resolved["commit"], "versions": self._resolved["versions"]}

    def _sessions_after(self, before: dict[str, Any], iteration: int) -> list[dict[str, Any]]:
        """Those of a description that made what is kept, and this one where it begins at `iteration` with another commit or other versions. Earlier versions wrote none."""
        told = before.get("sessions") or [{"iteration": 0, "commit": before.get("commit"), "versions": before.get("versions")}]
        kept, here = [session for session in told if session["iteration"] < iteration], self._session(iteration)
        return kept if kept and kept[-1] | {"iteration": iteration} == here else [*kept, here]

    def _say_other_code(self) -> None:
        """Where a resumed run goes on with another commit or other versions than before."""
        if len(self._sessions) < 2 or self.quiet or self._sessions[-1] != self._session(self.iteration):
            return
        then, now = ({"commit": session["commit"], **(session["versions"] or {})} for session in self._sessions[-2:])
        differ = [f"{name} ({then.get(name)} -> {now.get(name)})" for name in dict.fromkeys([*then, *now]) if then.get(name) != now.get(name)]
        print(f"{self._label}: goes on from iteration {self.iteration} with other code than before, {', '.join(differ)}", file=sys.stderr, flush=True)

    def _write(self, states: dict[str, tuple[Any, dict[str, Tensor]]]) -> None:
        folder = self.out / "checkpoints"
        final, partial, old = (folder / f"{prefix}{self.iteration:08d}" for prefix in ("", ".partial-", ".old-"))
        with disk_errors(folder):
            try:
                partial.mkdir(parents=True)
                with open(self._metrics_file, "rb") as file:
                    os.fsync(file.fileno())
                sums = [_write_summed(partial / f"{name}.safetensors", weights_bytes(tensors, {})) for name, (_, tensors) in states.items()]
                skeletons = {name: skeleton for name, (skeleton, _) in states.items()}
                sums.append(_write_summed(partial / "state.json", json.dumps(self._progress() | {"states": skeletons}).encode()))
                sums.append(_write_summed(partial / "run.json", self._description))
                write_synced(partial / SUMS, "".join(sums).encode())
                fsync_folder(partial)
                if final.exists():
                    final.rename(old)
                partial.rename(final)
                fsync_folder(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
                _recover(folder)
                shutil.rmtree(old, ignore_errors=True)
            for superseded in _checkpoints(self.out)[:-CHECKPOINTS_KEPT]:
                shutil.rmtree(superseded)
        self._flush_tensorboard()

    def _progress(self) -> dict[str, Any]:
        return {
            "iteration": self.iteration,
            "stopped": self._stopping,
            "seconds": self.seconds,
            "forward_passes": self.forward_passes,
            "forward_equivalents": self.forward_equivalents,
            "processes": self.processes,
            "metrics_bytes": self._metrics_file.stat().st_size,
        }

    def _restore(self) -> None:
        if self._checkpoint is None:
            return
        state = _read_state(self._checkpoint)
        if set(state["states"]) != set(self._registered):
            raise ValueError(f"{self._checkpoint} keeps {sorted(state['states'])}, this run registered {sorted(self._registered)}")
        for name, (thing, trainable_only) in self._registered.items():
            tensors, _ = load_weights(self._checkpoint / f"{name}.safetensors")
            value = unflatten(state["states"][name], tensors)
            if isinstance(thing, nn.Module):
                _check_keys(name, set(value), set(self._state_of(thing, trainable_only)))
                thing.load_state_dict(sharding.spread_network(value, thing), strict=not trainable_only)
            elif isinstance(value, dict) and hasattr(thing, "param_groups"):
                thing.load_state_dict(sharding.spread_optimizer(value, thing))
            else:
                thing.load_state_dict(value)
        self.iteration, self._stopping = state["iteration"], state["stopped"]
        self._spent, self._own = [state["forward_passes"], state["forward_equivalents"]], [0, 0]
        self._say_processes(state.get("processes", 1))
        self._say_other_code()
        self._seconds_before, self._begun = state["seconds"], time.monotonic()

    def _say_processes(self, before: int) -> None:
        if before != self.processes and not self.quiet:
            saved, now = (f"{number} process{'es' * (number > 1)}" for number in (before, self.processes))
            same = "batches and random streams are the same, shared among them otherwise; sums over them round otherwise, so numbers agree to rounding, not to the bit"
            print(f"{self._label}: saved by {saved}, goes on with {now}: {same}", file=sys.stderr, flush=True)

    def _state_of(self, thing: Stateful, trainable_only: bool) -> Any:
        state = thing.state_dict()
        if not trainable_only:
            return state
        assert isinstance(thing, nn.Module), "trainable_only is for networks"
        trained = {name for name, parameter in thing.named_parameters() if parameter.requires_grad}
        return {name: tensor for name, tensor in state.items() if name in trained}

    # Metrics

    def _append(self, line: str) -> None:
        size = self._metrics_file.stat().st_size
        with disk_errors(self._metrics_file):
            try:
                with open(self._metrics_file, "ab") as file:
                    file.write(line.encode())
            except OSError:
                os.truncate(self._metrics_file, size)
                raise

    def _to_tensorboard(self, values: dict[str, float]) -> None:
        with disk_errors(self.out / "tensorboard"):
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(self.out / "tensorboard"), purge_step=self.iteration)
            for name, value in values.items():
                self._writer.add_scalar(name, value, self.iteration)

    def _flush_tensorboard(self) -> None:
        if self._writer is not None:
            with disk_errors(self.out / "tensorboard"):
                self._writer.flush()

    def _mean_over_ranks(self, value: float | Tensor) -> float:
        tensor = torch.as_tensor(value, dtype=torch.float64).detach()
        if tensor.numel() != 1:
            raise ValueError(f"log takes scalars, got a tensor of shape {tuple(tensor.shape)}")
        if self.processes == 1:
            return float(tensor)
        return float(self.accelerator.reduce(tensor.reshape(1).to(self.device), reduction="mean"))

    # Guards

    def _compare_ranks(self, parameters: Sequence[nn.Parameter]) -> None:
        """Once, and only where there are several ranks: all hold the same weights, draw the same numbers and make the same step. Sharded weights were compared whole."""
        if self._compared or self.processes == 1:
            return
        self._compared = True
        gradients = [torch.zeros((), device=self.device) if one.grad is None else one.grad for one in parameters]
        self._compare_norms([] if self._sharded_trains else [*gradients, *parameters])

    def _compare_norms(self, tensors: Sequence[Tensor]) -> None:
        """All processes hold the same tensors, and draw the same number."""
        drawn = torch.randn((), generator=self.generator("ranks", 0)).to(self.device)
        held = torch.stack([*(one.detach().norm().to(self.device) for one in tensors), drawn]).double()  # [n+1]
        selfcheck.equal_ranks(self.accelerator.gather(held[None]))

    def _check_finite(self, what: str, value: Tensor) -> None:
        if self._any_rank(not bool(torch.isfinite(value).all())):
            self._stop_not_finite(what, value)

    def _stop_not_finite(self, what: str, value: Tensor) -> NoReturn:
        saved = latest_checkpoint(self.out)
        kept = f"the last checkpoint is {saved}" if saved else "nothing was saved yet"
        raise GuardStop(
            f"the {what} is {float(value):g} in iteration {self.iteration} of {self._label}; stopped before the optimizer, {kept}. "
            f"See {self._metrics_file}, then start again in another --out with a lower learning rate or other data"
        )

    def _any_rank(self, flag: bool) -> bool:
        if self.processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor([float(flag)], device=self.device), reduction="sum") > 0)

    def _clips(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> int:
        given = [*arguments, *named.values()]
        first = next((value for kind in (Segments, Tensor) for value in given if isinstance(value, kind)), None)
        if first is None:
            raise ValueError("a counted network was called without a tensor")
        return len(first)

    def _count_forward(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        clips = self._clips(arguments, named)
        self._spend(clips, clips)

    def _count_backward(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output  # diffusers' networks give a tuple of one
        if isinstance(first, Tensor) and first.requires_grad:
            clips = self._clips(arguments, named)
            first.register_hook(lambda gradient: self._spend(0, 2 * clips))

    def _spend(self, passes: int, equivalents: int) -> None:
        with self._counting:
            self._own[0] += passes
            self._own[1] += 0 if self._looks else equivalents

    def _add_up_passes(self) -> None:
        self._spent, self._own = [before + sum(new) for before, new in zip(self._spent, zip(*self.gather([self._own]), strict=True), strict=True)], [0, 0]

    def _of_all_processes(self, losses: list[Loss]) -> list[Loss]:
        if self.processes == 1:
            return losses
        return self.gather(Loss(loss.value.cpu(), {name: stat.cpu() for name, stat in loss.stats.items()}) for loss in losses)

    def _seed_globals(self, stream: str, index: int) -> None:
        seed = derived_seed(self.seed, f"{stream}/rank {self.rank}", index)
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[list[int]]:
        """The signals received while the loop runs. A later Ctrl-C raises KeyboardInterrupt at once; SIGTERM, or what comes with the first, is torchrun passing it on."""
        received: list[int] = []
        first = math.inf  # when

        def note(number: int, frame: FrameType | None) -> None:
            nonlocal first
            first = min(first, time.monotonic())
            if received and number == signal.SIGINT and time.monotonic() - first > SAME_WORD_SECONDS:
                raise KeyboardInterrupt
            received.append(number)

        if threading.current_thread() is not threading.main_thread():
            yield received
            return
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield received
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


_LOCKS: dict[tuple[int, int], int] = {}
"""(device, inode) -> descriptor of the lock files this process holds, until it ends."""


def lock_folder(out: Path) -> None:
    """Keeps other processes out of the run in `out` as long as this one lives. Raises UserError where another is in it."""
    file = os.open(out / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    about = os.fstat(file)
    if (about.st_dev, about.st_ino) in _LOCKS:
        os.close(file)
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(file)
        raise UserError(f"another process is at work in {out}. Wait for it or end it, or choose another --out") from error
    except OSError:
        os.close(file)  # a file system without locks
        return
    _LOCKS[about.st_dev, about.st_ino] = file


def came_since(defaults: Mapping[str, Any], then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of keys that were not there yet when a run was begun: it went as they say. Keys of all are those of `align.config.leaves`."""
    return {key: defaults[key] for key in now if key in defaults and not any(key == old or key.startswith(f"{old}.") for old in then)}


def _recover(folder: Path) -> None:
    """A checkpoint that was moved aside for a newer one of its name, which then never came, goes back."""
    for old in folder.glob(".old-*"):
        final = folder / old.name.removeprefix(".old-")
        if not final.exists():
            old.rename(final)


def _clean(out: Path) -> None:
    """Removes what a kill left half-written."""
    for kind in (".partial-*", ".old-*"):
        for folder in (out / "checkpoints").glob(kind):
            shutil.rmtree(folder)
    for file in out.glob(".*.partial"):
        file.unlink()


def _move_aside(checkpoints: Sequence[Path]) -> None:
    """Out of the way of what comes after them, in place of those that were moved before."""
    if checkpoints:
        for before in checkpoints[0].parent.glob(f"{DAMAGED}*"):
            shutil.rmtree(before)
    for checkpoint in checkpoints:
        checkpoint.rename(checkpoint.with_name(DAMAGED + checkpoint.name))


def _write_summed(path: Path, content: bytes) -> str:
    """Writes a file of a checkpoint; returns its line of `SUMS`."""
    write_synced(path, content)
    return f"{hashlib.sha256(content).hexdigest()}  {path.name}\n"


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint folder, "" where every file is as it was written. Earlier versions wrote no `SUMS`: there only files that were cut are found."""
    try:
        if not (checkpoint / SUMS).exists():
            for name in _read_state(checkpoint)["states"]:
                check_is_safetensors(checkpoint / f"{name}.safetensors")
            return ""
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in (checkpoint / SUMS).read_text().splitlines())}
        for name, digest in sums.items():
            with open(checkpoint / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return f"{name} is not what was written"
        missing = {"state.json", "run.json"} - set(sums) or {f"{name}.safetensors" for name in _read_state(checkpoint)["states"]} - set(sums)
        return f"no {sorted(missing)[0]} in {SUMS}" if missing else ""
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"cannot read {Path(error.filename or checkpoint).name}: {error.strerror}"
    except ValueError:
        return f"cannot read {SUMS}"


def latest_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint folder of the run in `out`, or None."""
    found = _checkpoints(out)
    return found[-1] if found else None


def _checkpoints(out: Path) -> list[Path]:
    return sorted(folder for folder in (out / "checkpoints").glob("[0-9]*") if folder.is_dir())


def _read_state(checkpoint: Path) -> dict[str, Any]:
    """What `state.json` says. Raises UserError where it is damaged."""
    state = read_json(checkpoint / "state.json", "the state of the run")
    missing = {"iteration", "stopped", "seconds", "forward_passes", "forward_equivalents", "metrics_bytes", "states"} - set(state)
    if missing:
        raise UserError(f"no {sorted(missing)[0]} in {checkpoint / 'state.json'}")
    return state


def _check_keys(name: str, saved: set[str], present: set[str]) -> None:
    if saved != present:
        raise UserError(f"the checkpoint of {name!r} holds other tensors than the network: {sorted(saved ^ present)[:3]}. Give the same model to --resume")

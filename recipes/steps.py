"""What a step of supervised training learns from, the loop around it, and how fast it is. Shared by recipes, no command.

A `Lesson` is a set of examples and the order in which they are learned from; a step may take from two of them. Under several processes every one of them plans the whole step and
takes its share, so batches and noise do not depend on their number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from align.data import PackSampler
from align.ema import EMA
from align.objectives import Loss
from align.optimizers import build_optimizer, warmup_cosine
from align.run import Run
from base_model.errors import UserError
from base_model.flops import FlopCounter
from base_model.networks.packing import balanced_packs, first_fit_decreasing
from base_model.tiny import LatentVideoModel
from base_model.types import Conditioning
from recipes.clip_stream import ClipStream
from recipes.examples import Ahead, Examples, FromImages, Shape, Velocities, num_tokens
from recipes.fit import Fit, Part, clips_loss, pack_loss, whole_of
from recipes.pairs import Pairs

METRICS = {
    "loss": "Flow-matching error, mean over the elements of a clip, then over the clips of the step (over their tokens by fit.reduction); unit velocity^2 per latent element.",
    "remembered_loss": "The same of the clips to remember, before its weight; only where some are given.",
    "grad_norm": "Norm of the gradient before clipping.",
    "learning_rate": "Learning rate of this step.",
    "clips": "Clips in the micro-batches of the step.",
    "tokens": "Latent tokens in the micro-batches of the step, before any are dropped.",
    "clips_per_second": "Clips learned from a second, without the time of looks at held-out clips.",
    "tokens_per_second": "Latent tokens a second, likewise.",
    "mfu": "Model FLOPs a second as a share of what the devices can do at most (`base_model/flops.py`); what is computed again is not counted.",
    "data_wait": "Share of the step's time in which it waited for latents and captions.",
    "peak_memory_bytes": "Most memory so far: of the GPU, or of this process where there is none.",
}


@dataclass(frozen=True)
class Step:
    """Micro-batches ready to be asked for their loss. Those of the clips that are learned come first, `own` of them; the rest is of clips to remember."""

    parts: Sequence[Callable[[], Iterator[Loss]]]
    own: int
    clips: int
    tokens: int
    flops: float


class Lesson:
    """Examples, and which of them every step learns from: each once in every epoch.

    counter: what a clip costs; without it costs are told as tokens. balanced: the micro-batches of a step cost about the same; else they come as they fall. stream: name of the
    random numbers.
    """

    def __init__(
        self,
        fit: Fit,
        run: Run,
        velocities: Velocities,
        examples: Examples,
        rows: Sequence[int],
        *,
        packs: int,
        counter: FlopCounter | None = None,
        balanced: bool = True,
        stream: str = "noise",
    ) -> None:
        self.fit, self.run, self.velocities, self.rows, self.packs, self.stream = fit, run, velocities, list(rows), packs, stream
        self.examples = examples if isinstance(examples, Pairs) else Ahead(examples)
        shapes = [examples.shapes[row] for row in self.rows]
        self.tokens = {row: num_tokens(shape, velocities.model.patch) for row, shape in zip(self.rows, shapes, strict=True)}
        self.flops = {row: float(n) for row, n in self.tokens.items()}
        if counter:
            told = FromImages(examples, velocities.model) if velocities.from_image else examples
            self.flops = dict(zip(self.rows, flops_of(counter, told.cond(self.rows[0]), shapes), strict=True))
        ranks, costs = (packs, list(self.flops.values())) if balanced else (1, [])
        buckets = () if velocities.packs else shapes
        self.sampler = PackSampler(list(self.tokens.values()), fit.capacity, seed=run.seed, ranks=ranks, costs=costs, buckets=buckets)

    def chosen(self, i: int) -> list[list[int]]:
        """The rows of each micro-batch of a step."""
        packs = self.sampler.step(i) if self.sampler.ranks == self.packs else [self.sampler[i * self.packs + k] for k in range(self.packs)]
        return [[self.rows[k] for k in pack] for pack in packs]

    def step(self, i: int) -> Step:
        """What this process needs of it, and of the next one, is read meanwhile."""
        chosen = self.chosen(i)
        if isinstance(self.examples, Ahead):
            self.examples.begin(row for rows in (*self.run.share(chosen), *self.run.share(self.chosen(i + 1))) for row in rows)
        rows = [row for some in chosen for row in some]
        tokens = [self.tokens[row] for row in rows]
        generators = [self.run.generator(self.stream, i * self.packs + k) for k in range(self.packs)]
        parts = [partial(micro_batch, self.fit, self.velocities, self.examples, whole_of(self.fit, tokens), part) for part in zip(chosen, generators, strict=True)]
        return Step(parts, len(parts), len(rows), sum(tokens), sum(self.flops[row] for row in rows))

    def costliest(self) -> list[int]:
        """The micro-batch of an epoch that takes the most FLOPs."""
        worst, cost, seen, i = list[int](), 0.0, set[int](), 0
        while len(seen) < len(self.rows):
            for rows in self.chosen(i):
                seen.update(rows)
                if (flops := sum(self.flops[row] for row in rows)) > cost:
                    worst, cost = rows, flops
            i += 1
        return worst

    @property
    def waited(self) -> float:
        """Seconds so far that a step had to wait for examples."""
        return self.examples.waited if isinstance(self.examples, Ahead) else 0.0


class StreamLesson:
    """The next examples of a stream in every step, in as few micro-batches as hold them. Every process reads and encodes all of it, and learns from its share."""

    def __init__(self, fit: Fit, run: Run, velocities: Velocities, source: ClipStream, *, counter: FlopCounter) -> None:
        self.fit, self.run, self.velocities, self.source, self.counter = fit, run, velocities, source, counter
        self.waited = 0.0

    def step(self, i: int) -> Step:
        begun = time.monotonic()
        examples = self.source.take(self.source.step)
        self.waited += time.monotonic() - begun
        tokens = [num_tokens(shape, self.velocities.model.patch) for shape in examples.shapes]
        flops = flops_of(self.counter, examples.cond(0), examples.shapes)
        chosen = self._micro_batches(examples.shapes, tokens, flops)
        generators = [self.run.generator(f"noise of step {i}", k) for k in range(len(chosen))]
        parts = [partial(micro_batch, self.fit, self.velocities, examples, whole_of(self.fit, tokens), part) for part in zip(chosen, generators, strict=True)]
        return Step(parts, len(parts), len(examples), sum(tokens), sum(flops))

    def _micro_batches(self, shapes: Sequence[Shape], tokens: Sequence[int], flops: Sequence[float]) -> list[list[int]]:
        if self.velocities.packs:
            return balanced_packs(tokens, flops, self.fit.capacity)
        groups: dict[Shape, list[int]] = {}
        for row, shape in enumerate(shapes):
            groups.setdefault(shape, []).append(row)
        return [[rows[k] for k in pack] for rows in groups.values() for pack in first_fit_decreasing([tokens[row] for row in rows], self.fit.capacity)]


def flops_of(counter: FlopCounter, cond: Conditioning, shapes: Sequence[Shape]) -> list[float]:
    """FLOPs of training on one clip of each shape, with a condition as long as this one."""
    found = {shape: float(counter(shape, cond).trained) for shape in set(shapes)}
    return [found[shape] for shape in shapes]


def micro_batch(fit: Fit, velocities: Velocities, examples: Examples, whole: float, part: Part) -> Iterator[Loss]:
    """Its error as its share of a step that is `whole`."""
    if isinstance(velocities.model, LatentVideoModel):
        return pack_loss(fit, velocities.model, examples, whole, part)
    return clips_loss(fit, velocities, examples, whole, part)


def with_remembered(step: Step, other: Step, weight: float) -> Step:
    """A step that, at this weight, also learns from what must not be forgotten."""
    parts: list[Callable[[], Iterator[Loss]]] = [*step.parts, *(partial(_as_remembered, part, weight) for part in other.parts)]
    return replace(step, parts=parts, flops=step.flops + other.flops)


def _as_remembered(part: Callable[[], Iterator[Loss]], weight: float) -> Iterator[Loss]:
    for loss in part():
        yield Loss(weight * loss.value, {**loss.stats, "remembered": loss.value.detach()})


def dry_run(run: Run, velocities: Velocities, shapes: Sequence[Shape], losses: Callable[[], Iterator[Loss]]) -> float:
    """The costliest micro-batch forward and backward, before anything is learned: what has no room fails now. Returns its seconds, on a GPU those of a second time, when
    kernels are built. Raises UserError where memory does not do."""
    try:
        for _ in range(2 if run.device.type == "cuda" else 1):
            begun = time.monotonic()
            for loss in losses():
                loss.value.backward()
            if run.device.type == "cuda":
                torch.cuda.synchronize(run.device)
    except torch.OutOfMemoryError as error:
        told = ", ".join(sorted({"x".join(map(str, shape[1:])) for shape in shapes}))
        tokens = sum(num_tokens(shape, velocities.model.patch) for shape in shapes)
        what = f"the costliest micro-batch has no room on {run.device}: {len(shapes)} clips of latents {told}, {tokens:,} tokens"
        raise UserError(f"{what}. Lower fit.capacity, windows.frames or windows.area, raise recompute, or take nf4 or shard") from error
    velocities.network.zero_grad(set_to_none=True)
    return time.monotonic() - begun


class Speed:
    """What a step did a second, and how long it waited for data."""

    def __init__(self, peak: float, waited: Callable[[], float], memory: Callable[[], int]) -> None:
        """peak: FLOP/s of all devices. waited: seconds of waiting so far. memory: most bytes so far."""
        self.peak, self.waited, self.memory = peak, waited, memory
        self.begin()

    def begin(self) -> None:
        """A step begins; what was before does not count."""
        self._begun, self._waited = time.monotonic(), self.waited()

    def of(self, step: Step) -> dict[str, float]:
        seconds = time.monotonic() - self._begun
        rates = {"clips_per_second": step.clips / seconds, "tokens_per_second": step.tokens / seconds, "mfu": step.flops / seconds / self.peak}
        return {**rates, "data_wait": (self.waited() - self._waited) / seconds, "peak_memory_bytes": float(self.memory())}


def fit_network(
    fit: Fit, run: Run, network: nn.Module, plan: Callable[[int], Step], look: Callable[[int, EMA], None], *, fused: bool = False, speed: Speed | None = None
) -> None:
    """Fits what trains of `network`, and leaves the averaged weights in it. look: called behind every `evaluate_every` steps, and behind the last one, with their number."""
    optimizer = build_optimizer(network, fit.optimizer, lr=fit.lr, fused=fused)
    schedule, average = warmup_cosine(optimizer, fit.iterations), EMA(network, fit.ema_decay)
    for name, thing in (("optimizer", optimizer), ("schedule", schedule), ("average", average)):
        run.register(name, thing)
    for i in run.iterations(fit.iterations, save_every=fit.save_every, label="sft"):
        if speed is not None:
            speed.begin()
        step = plan(i)
        losses = run.backward_each(optimizer, lambda part: part(), run.share(step.parts))
        rate = optimizer.param_groups[0]["lr"]
        norm = run.step(optimizer, fit.max_grad_norm, schedule)
        average.update()
        pace = {} if speed is None else speed.of(step)
        remembered = {"remembered_loss": _total([loss.stats["remembered"] for loss in losses[step.own :]])} if len(losses) > step.own else {}
        run.log(loss=_total([loss.value for loss in losses[: step.own]]), grad_norm=norm, learning_rate=rate, clips=step.clips, tokens=step.tokens, **remembered, **pace)
        if (i + 1) % fit.evaluate_every == 0 or i + 1 == fit.iterations:
            look(i + 1, average)
    average.apply()


def _total(values: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(values)).sum()

"""How well clips that are not learned from are told from their noise, by noise level and by shape: what SFT looks at on the way. Shared by recipes, no command.

A loss at random times is a lottery: its spread over times dwarfs any progress (`rushes bench validation`). Here every clip is asked about at the same quantiles of the training
density, each with noise of its own that never changes, so that two looks at a run differ by its weights alone.

    training, held_out = split(examples, 0.05, seed=cfg.seed)
    validation = Validation(velocities, examples, held_out, seed=cfg.seed, shift=3.0)
    with run.looking():
        raw = validation.summary(validation.errors(share=run.share, gather=run.gather))
    if run.is_main:
        append_look(run.out, Look(run.iteration, raw, averaged=None, right=None))

Letters: N held-out clips, Q quantiles, S clips of a micro-batch, C F H W latent channels/frames/height/width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.objectives.regression import clip_error
from align.run import derived_seed
from base_model.checkpoint import atomic_write
from base_model.errors import UserError
from base_model.networks.packing import first_fit_decreasing
from base_model.paths import add_noise
from base_model.threads import in_threads
from base_model.times import quantile_times
from base_model.types import ClipShape, Conditioning, LatentSpec
from recipes.examples import Examples, Shape, Velocities, num_tokens

LOOKS = "validation.jsonl"
Batches = list[list[int]]
Share = Callable[[Batches], Batches]  # `Run.share`
Gather = Callable[[Iterable[Any]], list[Any]]  # `Run.gather`
Generators = Callable[[int, int], torch.Generator]
"""(which held-out clip, which quantile) -> the generator of its noise."""


# What is held out


def split(examples: Examples, held_out: float, *, seed: int) -> tuple[list[int], list[int]]:
    """(rows to learn from, rows held out), both ascending and never empty. All examples of a source are on one side.

    held_out: below 1, about that share of the sources; else a number of examples, reached with whole sources, but never more than half of the sources. The hash of a source's name
    decides: whatever clips are added, one that was learned from is not held out later, and with a share none changes sides. Raises UserError where there is one source.
    """
    place = {source: _place(source, seed) for source in examples.sources}
    order = sorted(place, key=lambda source: (place[source], source))
    if len(order) < 2:
        raise UserError(f"{len(examples)} examples of {len(order)} source: one clip cannot be learned from and held out. Give at least two clips")
    wanted = sum(place[source] < held_out for source in order) if held_out < 1 else _reaching(examples.sources, order, held_out)
    chosen = set(order[: min(max(1, wanted), len(order) - 1 if held_out < 1 else len(order) // 2)])
    sides: tuple[list[int], list[int]] = ([], [])
    for row, source in enumerate(examples.sources):
        sides[source in chosen].append(row)
    return sides


def _place(source: str, seed: int) -> float:
    """In [0, 1)."""
    return derived_seed(seed, f"held out/{source}", 0) / 2**63


def _reaching(sources: Sequence[str], order: Sequence[str], number: float) -> int:
    """How many of the first sources it takes for so many examples."""
    counts = dict.fromkeys(order, 0)
    for source in sources:
        counts[source] += 1
    total = 0
    for taken, source in enumerate(order, start=1):
        total += counts[source]
        if total >= number:
            return taken
    return len(order)


# Errors


@torch.no_grad()
def flow_errors(
    velocities: Velocities, examples: Examples, rows: Sequence[int], times: Tensor, generators: Generators, *, capacity: int, share: Share = list, gather: Gather = list
) -> Tensor:
    """Flow-matching error of the clips `rows` at `times` [Q,N] -> [Q,N] on the CPU, unit velocity^2 per latent element.

    What a visual prompt gives takes no part; nan where it gives all. capacity: tokens of a micro-batch; on a CPU every core has one of its own.
    share, gather: `Run.share` and `Run.gather`, where several processes look together.
    """

    def measure(batch: list[int]) -> Tensor:
        """[Q,S], each clip read once."""
        x0 = [examples.latent(rows[k]).to(velocities.model.device) for k in batch]  # [C,F,H,W] each
        conds = [examples.cond(rows[k]).to(velocities.model.device) for k in batch]
        found = []
        for q, level in enumerate(times[:, batch]):
            eps = [torch.randn(x.shape, generator=generators(k, q)).to(x) for k, x in zip(batch, x0, strict=True)]  # [C,F,H,W] each
            found.append(_errors(velocities, x0, eps, level.to(velocities.model.device), conds))
        return torch.stack(found).cpu()

    shapes = [examples.shapes[row] for row in rows]
    batches = share(batches_of(velocities, shapes, capacity))
    told = gather(zip(batches, in_threads(measure, batches, velocities.model.device), strict=True))
    errors = torch.full((len(times), len(rows)), torch.nan)  # [Q,N]
    for batch, found in told:
        errors[:, batch] = found
    return errors


def batches_of(velocities: Velocities, shapes: Sequence[Shape], capacity: int) -> Batches:
    """Micro-batches of at most `capacity` tokens: packs, or else of one shape each; the costliest first. A clip of more tokens has one of its own."""
    tokens = [num_tokens(shape, velocities.model.patch) for shape in shapes]
    if velocities.packs:
        return first_fit_decreasing(tokens, capacity)
    groups: dict[Shape, list[int]] = {}
    for k in sorted(range(len(shapes)), key=lambda k: (-tokens[k], k)):
        groups.setdefault(shapes[k], []).append(k)
    sizes = {shape: max(1, capacity // tokens[group[0]]) for shape, group in groups.items()}
    return [group[begin : begin + sizes[shape]] for shape, group in groups.items() for begin in range(0, len(group), sizes[shape])]


def _errors(velocities: Velocities, x0: Sequence[Tensor], eps: Sequence[Tensor], t: Tensor, conds: Sequence[Conditioning]) -> Tensor:
    """[S] float32; x0 and eps: S clips [C,F,H,W]; t [S]."""
    path = velocities.model.path
    x_t = [add_noise(path, x, noise, level) for x, noise, level in zip(x0, eps, t, strict=True)]  # [C,F,H,W] each
    found: dict[int, Tensor] = {}
    for alike in _alike(velocities, conds):
        with torch.autocast(t.device.type, torch.bfloat16, enabled=t.device.type == "cuda"):  # as in training
            u = velocities([x_t[k] for k in alike], t[alike], [conds[k] for k in alike])  # [C,F,H,W] each
        for k, velocity in zip(alike, u, strict=True):
            found[k] = clip_error(velocity[None], path.velocity(x0[k], eps[k], t[k])[None], keep=velocities.learned(conds[k]))[0]
    return torch.stack([found[k] for k in range(len(x0))])


def _alike(velocities: Velocities, conds: Sequence[Conditioning]) -> list[list[int]]:
    """Clips that can be asked about together: with a visual prompt or without, and with texts of one length where the network does not pack."""
    groups: dict[tuple[bool, int], list[int]] = {}
    for k, cond in enumerate(conds):
        groups.setdefault((cond.known is None, 0 if velocities.packs else cond.text.shape[1]), []).append(k)
    return list(groups.values())


@dataclass(frozen=True)
class Shaped:
    """Of the clips of one shape."""

    clips: int
    mean: float


@dataclass(frozen=True)
class Summary:
    """Errors of a look, in unit velocity^2 per latent element. Each number is a mean over clips, nan where nothing is known; quantiles go from least noise to most."""

    clips: int  # whose error is known
    mean: float
    low_noise: float  # the quarter of the quantiles with the least noise
    high_noise: float  # with the most
    times: tuple[float, ...]  # Q, mean over clips
    by_quantile: tuple[float, ...]  # Q
    by_shape: Mapping[str, Shaped]  # frames x height x width in pixels, the smallest clip first


@dataclass(frozen=True)
class Validation:
    """Held-out clips at fixed noise quantiles of the training density. The noise of an example depends on (seed, its source, which of that source, quantile) only."""

    velocities: Velocities
    examples: Examples
    rows: Sequence[int]  # N
    seed: int
    shift: float | Tensor = 3.0  # of the training times: one for all clips, or one each, [N]
    quantiles: int = 8
    capacity: int = 2048  # tokens of a micro-batch

    @cached_property
    def times(self) -> Tensor:
        """[Q,N]"""
        times = quantile_times(self.velocities.model.path, self.quantiles, shift=self.shift)  # [Q] or [Q,N]
        return times if times.dim() == 2 else times[:, None].expand(-1, len(self.rows))

    @cached_property
    def names(self) -> list[str]:
        """Of every held-out example, its source and which of that source it is: the same whatever other clips there are."""
        seen: dict[str, int] = {}
        names = []
        for source in self.examples.sources:
            seen[source] = seen.get(source, -1) + 1
            names.append(f"{source}/{seen[source]}")
        return [names[row] for row in self.rows]

    def generator(self, k: int, q: int) -> torch.Generator:
        return torch.Generator().manual_seed(derived_seed(self.seed, f"validation/{self.names[k]}", q))

    def errors(self, *, share: Share = list, gather: Gather = list) -> Tensor:
        """[Q,N] of the weights that the network has now, on the CPU (`flow_errors`). Under FSDP every process must look at all: leave out `share` and `gather`."""
        return flow_errors(self.velocities, self.examples, self.rows, self.times, self.generator, capacity=self.capacity, share=share, gather=gather)

    def summary(self, errors: Tensor) -> Summary:
        """errors [Q,N]."""
        quarter = max(1, self.quantiles // 4)
        return Summary(
            clips=_known(errors),
            mean=_mean(errors),
            low_noise=_mean(errors[:quarter]),
            high_noise=_mean(errors[-quarter:]),
            times=tuple(self.times.mean(1).tolist()),
            by_quantile=tuple(map(_mean, errors)),
            by_shape=self._by_shape(errors),
        )

    def _by_shape(self, errors: Tensor) -> dict[str, Shaped]:
        groups: dict[Shape, list[int]] = {}
        for k, row in enumerate(self.rows):
            groups.setdefault(self.examples.shapes[row], []).append(k)
        latents = self.velocities.model.latents
        return {str(pixels(latents, shape)): Shaped(_known(errors[:, groups[shape]]), _mean(errors[:, groups[shape]])) for shape in sorted(groups, key=math.prod)}


def _known(errors: Tensor) -> int:
    return int((~errors.isnan()).any(0).sum())


def _mean(errors: Tensor) -> float:
    return float(errors.double().nanmean())


def pixels(latents: LatentSpec, shape: Shape) -> ClipShape:
    """The clip that latents of that shape are of."""
    _, frames, height, width = shape
    return ClipShape(1 + (frames - 1) * latents.time_stride, height * latents.space_stride, width * latents.space_stride)


# Looks on disk


@dataclass(frozen=True)
class Look:
    """What was found at one iteration: of the weights as they are, of their moving average where there is one, and of samples where a judge knows the prompts."""

    iteration: int
    raw: Summary
    averaged: Summary | None = None
    right: float | None = None  # share of the sample grid's clips with every attribute right


def append_look(out: Path, look: Look) -> None:
    """One line more in `out/validation.jsonl`, whole or not at all. Lines of this iteration or later go first, so a resumed run has no line twice. Raises UserError (full disk)."""
    before = [line for line in read_looks(out) if line.iteration < look.iteration]
    _write(out, [*before, look])


def read_looks(out: Path) -> list[Look]:
    """In order; none where nobody has looked. Raises UserError for a damaged file."""
    file = out / LOOKS
    try:
        lines = file.read_text().splitlines() if file.exists() else []
        return [_look(json.loads(line)) for line in lines]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"cannot read the held-out losses, {file}: {error}. Restore the file, or delete it to go on without what was found before") from error


def _write(out: Path, looks: Sequence[Look]) -> None:
    atomic_write(out / LOOKS, "".join(json.dumps(_plain(asdict(look)), allow_nan=False) + "\n" for look in looks).encode())


def _plain(value: Any) -> Any:
    """nan becomes null."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _look(line: Mapping[str, Any]) -> Look:
    raw, averaged = _summary(line["raw"]), None if line["averaged"] is None else _summary(line["averaged"])
    return Look(int(line["iteration"]), raw, averaged, line["right"])


def _summary(found: Mapping[str, Any]) -> Summary:
    by_shape = {name: Shaped(int(each["clips"]), _number(each["mean"])) for name, each in found["by_shape"].items()}
    mean, low, high = (_number(found[name]) for name in ("mean", "low_noise", "high_noise"))
    times, by_quantile = (tuple(map(_number, found[name])) for name in ("times", "by_quantile"))
    return Summary(int(found["clips"]), mean, low, high, times, by_quantile, by_shape)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)

"""How much less a held-out loss at fixed noise quantiles jumps than one at random times, at as many forward passes (`rushes bench validation`).

Both look at the same clips with the same network, again and again, with fresh noise each time: at the quantiles of the training density (`recipes/validation.py`), or at times
drawn from it. What differs between repeats is chance alone. In a run even that is gone: `Validation` keeps its noise, and two looks at the same weights are equal to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from align.config import Count, Positive, Seed, Several
from align.progress import Progress
from align.run import derived_seed
from base_model.errors import UserError
from base_model.times import logit_normal, quantile_times
from base_model.tiny import load_tiny
from base_model.types import ClipShape
from recipes.bench._results import Bench, Row, check_can_end, here, real_clips, told_of_real, write
from recipes.examples import Velocities
from recipes.pairs import Pairs, encode_pairs, read_clip_folder
from recipes.shapes.dataset import ClipSet, draw_clips
from recipes.validation import flow_errors

MIXED, REAL = "mixed sizes", "real clips"
ASKED = 5.0  # lower bound of the ratio
DRAWS = 2_000


class Config(Bench):
    model: Path | None = None
    """Network of the built-in model; none means the shipped base."""
    sizes: tuple[str, ...] = ("13x32x32", "13x64x64", MIXED)
    """Curated clips that are drawn: frames x height x width, or `mixed sizes`."""
    real: Path | None = None
    """Folder of real clips with captions; none means `clips` in the folder that RUSHES_REAL_DATA names, where it is set."""
    clips: tuple[Count, ...] = (4, 8)
    """Numbers of held-out clips, a row each: the first ones."""
    quantiles: Several = 8
    """Forward passes of a clip in a look. `quick` takes at most 4."""
    repeats: Several = 200
    """Looks of each kind. `quick` takes at most 6."""
    shift: Positive = 3.0
    """Shift of the training times."""
    capacity: Count = 2048
    """Latent tokens of a pass."""
    seed: Seed = 0
    """Seed of clips, times and noise."""


class Looks(NamedTuple):
    """Errors of R looks at N clips."""

    fixed: Tensor  # [R,Q,N]
    random: Tensor  # [R,Q,N]


def clip_sets(cfg: Config) -> dict[str, ClipSet]:
    """What is looked at, by name. Raises UserError for a size that is none, and for a folder without enough clips."""
    number = max(cfg.clips)
    sets = {name: draw_clips("curated", number, seed=cfg.seed + 1_000_003, shape=None if name == MIXED else size_of(name)) for name in cfg.sizes}
    folder = real_clips(cfg.real)
    if folder is not None:
        windows = read_clip_folder(folder, frames=13, fps=12)
        if len(windows) < number:
            raise UserError(f"{len(windows)} windows of 13 frames, {folder}: {number} are looked at. Give more clips or a smaller --clips")
        rows = [k * len(windows) // number for k in range(number)]
        sets[REAL] = ClipSet(tuple(windows.texts[k] for k in rows), tuple(windows.videos[k] for k in rows))
    return sets


def size_of(name: str) -> ClipShape:
    try:
        frames, height, width = (int(side) for side in name.split("x"))
        return ClipShape(frames, height, width)
    except ValueError as error:
        raise UserError(f"sizes: {name!r} is no size. Give frames x height x width, as 13x32x32, or `{MIXED}`") from error


def noise_of(seed: int, k: int, q: int) -> torch.Generator:
    return torch.Generator().manual_seed(derived_seed(seed, f"noise {k}", q))


def look_again(cfg: Config, velocities: Velocities, examples: Pairs, progress: Progress, name: str) -> Looks:
    """`repeats` looks of each kind, noise and random times drawn anew each time."""
    rows, path = range(len(examples)), velocities.model.path
    quantiles = quantile_times(path, cfg.quantiles, shift=cfg.shift)[:, None].expand(-1, len(rows))  # [Q,N]
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for r in range(cfg.repeats):
        drawn = logit_normal(path, quantiles.numel(), shift=cfg.shift, generator=torch.Generator().manual_seed(derived_seed(cfg.seed, "times", r))).view_as(quantiles)  # [Q,N]
        for kind, times in enumerate((quantiles, drawn)):
            noise = partial(noise_of, derived_seed(cfg.seed, "look", 2 * r + kind))
            found[kind].append(flow_errors(velocities, examples, rows, times, noise, capacity=cfg.capacity))
        progress.advance(name)
    return Looks(torch.stack(found[0]), torch.stack(found[1]))


def variance_ratio(above: NDArray[np.float64], below: NDArray[np.float64], *, seed: int = 0) -> tuple[float, float, float]:
    """var(above) / var(below), [R] each, and its 95 % percentile bootstrap; both are resampled, each by itself, and draws without spread are left out."""
    rng = np.random.default_rng(seed)
    drawn = [values[rng.integers(len(values), size=(DRAWS, len(values)))].var(axis=1, ddof=1) for values in (above, below)]
    known = drawn[1] > 0
    low, high = np.quantile(drawn[0][known] / drawn[1][known], (0.025, 0.975))
    return float(above.var(ddof=1) / below.var(ddof=1)), float(low), float(high)


def row_of(name: str, number: int, looks: Looks) -> Row:
    """The first `number` clips."""
    fixed, random = (errors[..., :number].double().mean((1, 2)).numpy() for errors in looks)  # [R] each
    ratio, low, high = variance_ratio(random, fixed)
    return {
        "held_out": name,
        "clips": number,
        "forward_passes": looks.fixed.shape[1] * number,
        "repeats": len(fixed),
        "loss_fixed": float(fixed.mean()),
        "loss_random": float(random.mean()),
        "std_fixed": float(fixed.std(ddof=1)),
        "std_random": float(random.std(ddof=1)),
        "variance_ratio": ratio,
        "ratio_low": low,
        "ratio_high": high,
        "asked": ASKED,
        "holds": low >= ASKED,
    }


def measure(cfg: Config) -> list[Row]:
    """One row for each set of clips and number of them."""
    model = load_tiny(cfg.model)
    model.network.requires_grad_(False)
    sets, velocities = clip_sets(cfg), Velocities(model)
    rows = []
    with Progress("validation", total=len(sets) * cfg.repeats) as progress:
        for name, clips in sets.items():
            looks = look_again(cfg, velocities, encode_pairs(model, clips), progress, name)
            rows += [row_of(name, number, looks) for number in cfg.clips]
    return rows


def verdicts(rows: Sequence[Row]) -> list[str]:
    """What was asked, and where it holds."""
    return [
        f"Variance at least {ASKED:g} times smaller, {row['clips']} of {row['held_out']}: {'holds' if row['holds'] else 'does not hold'} "
        f"({row['variance_ratio']:.1f} [{row['ratio_low']:.1f}, {row['ratio_high']:.1f}])."
        for row in rows
    ]


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    """`resume` changes nothing: a benchmark is measured anew."""
    check_can_end(cfg)
    less = {"quantiles": min(cfg.quantiles, 4), "repeats": min(cfg.repeats, 6)} if cfg.quick else {}
    measured = cfg.model_copy(update=less)
    rows = measure(measured)
    if cfg.write:
        remarks = [*verdicts(rows), told_of_real(cfg.real)]
        write(cfg, "validation", here("validation", cfg), "Held-out loss at fixed quantiles and at random times", {"Spread over looks": rows}, remarks=remarks)
    return {"rows": rows}

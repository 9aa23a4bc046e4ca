"""`validation.html` in the folder of an SFT run: losses, what is held out by noise level and by shape, samples, speed. One file, no network; what is missing is told.

Reads what the run wrote: `metrics.jsonl`, `validation.jsonl` (`validation.py`) and `samples/*.png` (`sample_grid.py`).
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from align.progress import duration
from align.run import read_metrics
from base_model.checkpoint import atomic_write
from recipes.charts import Series, line_chart, number
from recipes.sample_grid import prompts_of
from recipes.validation import Look, Summary, read_looks

PAGE = "validation.html"
SHEETS = 6  # sheets on the page, the first and the last among them
MOST_LEVELS = 16  # colours of quantiles
SPEEDS: Mapping[str, tuple[str, str, bool]] = {
    "clips_per_second": ("Clips a second", "Trained on, by all processes together.", False),
    "tokens_per_second": ("Tokens a second", "Latent tokens of clips, padding not counted.", False),
    "mfu": ("MFU", "Share of the hardware's peak that model FLOPs take.", True),
    "data_wait": ("Waiting for data", "Share of a step's time in which nothing could be computed for want of clips.", True),
    "peak_memory_bytes": ("Memory, bytes", "The most that was held.", False),
}
"""Metrics of speed: name in `metrics.jsonl` -> (title, what it is, whether it is a share)."""


class Card(NamedTuple):
    """A chart on the page."""

    title: str
    told: str
    chart: str  # SVG
    legend: Sequence[tuple[str, str]] = ()  # (CSS class, label)


class Sheet(NamedTuple):
    """A contact sheet on the page."""

    title: str
    film: str  # beside the page
    prompts: str
    data: str  # base64 of a JPEG


def write_page(out: Path) -> Path:
    """Writes the page of the run in `out` and returns it. Raises UserError where a file of the run is damaged or the disk is full."""
    page = out / PAGE
    atomic_write(page, render_page(out).encode())
    return page


def render_page(out: Path) -> str:
    """validation.html as text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    metrics = read_metrics(out) if (out / "metrics.jsonl").exists() else []
    looks = read_looks(out)
    files = sorted((out / "samples").glob("[0-9]*.png"))
    room = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return room.get_template("validation.html").render(
        name=out.absolute().name,
        state=state_of(metrics, looks),
        facts=facts_of(metrics, looks),
        losses=[*loss_cards(metrics, looks), *level_cards(looks), *right_cards(looks)],
        weights="the averaged weights" if looks and looks[-1].averaged else "the weights as they are",
        shapes=shape_rows(looks),
        sheets=[sheet_of(file) for file in chosen(files)],
        left_out=len(files) - len(chosen(files)),
        speeds=speed_cards(metrics),
        most=MOST_LEVELS,
    )


# Numbers


def best(look: Look) -> Summary:
    """Of the averaged weights, which are what is saved, where there are any."""
    return look.averaged or look.raw


def state_of(metrics: Sequence[Mapping[str, Any]], looks: Sequence[Look]) -> str:
    if not metrics:
        return "Nothing was logged yet."
    last = metrics[-1]
    held = f", {best(looks[-1]).clips} clips held out" if looks else ", nobody has looked at held-out clips yet"
    return f"After iteration {last['iteration']}, {duration(float(last['seconds']))} of work{held}."


def facts_of(metrics: Sequence[Mapping[str, Any]], looks: Sequence[Look]) -> list[tuple[str, str]]:
    """The latest of each number that is known."""
    latest: dict[str, float] = {}
    for line in metrics:
        latest |= {name: float(line[name]) for name in SPEEDS if line.get(name) is not None}
    facts = [("Held-out loss", f"{best(looks[-1]).mean:.4f}"), ("Since the first look", change(best(looks[0]).mean, best(looks[-1]).mean))] if looks else []
    return [*facts, *((title, number(latest[name], share)) for name, (title, _, share) in SPEEDS.items() if name in latest)]


def change(before: float, after: float) -> str:
    """Example: `change(0.2, 0.19)` is "-5.0 %"."""
    return f"{100 * (after / before - 1):+.1f} %" if math.isfinite(before) and math.isfinite(after) and before else "unknown"


def shape_rows(looks: Sequence[Look]) -> list[tuple[str, ...]]:
    """Shape, clips, loss at the first and at the latest look, change."""
    if not looks:
        return []
    first, last = best(looks[0]).by_shape, best(looks[-1]).by_shape
    return [
        (shape, str(now.clips), _loss(first[shape].mean) if shape in first else "unknown", _loss(now.mean), change(first[shape].mean, now.mean) if shape in first else "unknown")
        for shape, now in last.items()
    ]


def _loss(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "unknown"


# Charts


def curve(label: str, look: str, points: Sequence[tuple[float, float | None]]) -> Series:
    return Series(label, look, tuple(float(x) for x, _ in points), tuple(math.nan if y is None else float(y) for _, y in points))


def drawn(series: Sequence[Series], title: str, told: str, x_label: str, *, percent: bool = False, limit: float | None = None) -> list[Card]:
    """One card, or none where there is no point to draw."""
    some = [line for line in series if any(map(math.isfinite, line.y))]
    return (
        [Card(title, told, line_chart(some, name=title, x_label=x_label, percent=percent, limit=limit), [(line.look, line.label) for line in some] if len(some) > 1 else [])]
        if some
        else []
    )


def loss_cards(metrics: Sequence[Mapping[str, Any]], looks: Sequence[Look]) -> list[Card]:
    training = curve("training", "training", [(line["iteration"], line["loss"]) for line in metrics if "loss" in line])
    raw = curve("held out, weights as they are", "weights", [(look.iteration, look.raw.mean) for look in looks])
    averaged = curve("held out, averaged weights", "averaged", [(look.iteration, look.averaged.mean) for look in looks if look.averaged])
    cards = drawn([training], "Training loss", "Of each step, thin, and its running mean. Steps differ in clips and times: it says little.", "iteration")
    return cards + drawn([raw, averaged], "Held-out loss", "The same clips, times and noise at each look: what differs is the weights.", "iteration")


def level_cards(looks: Sequence[Look]) -> list[Card]:
    """The loss over the noise level, first and latest look; and each level's over the run, relative to its first."""
    if not looks:
        return []
    first, last = best(looks[0]), best(looks[-1])
    ends = [
        curve(f"iteration {look.iteration}", name, list(zip(best(look).times, best(look).by_quantile, strict=True))) for look, name in ((looks[0], "first"), (looks[-1], "latest"))
    ]
    cards = drawn(ends[: min(len(looks), 2)], "By noise level", "At each quantile of the training times: 0 is a clean clip, the right end noise alone.", "time")
    if len(looks) < 2 or len(first.by_quantile) != len(last.by_quantile):
        return cards
    levels = [
        curve(f"t {last.times[q]:.2f}", f"level-{q * (MOST_LEVELS - 1) // max(1, len(last.times) - 1)}", [(look.iteration, best(look).by_quantile[q] / start) for look in looks])
        for q, start in enumerate(first.by_quantile)
    ]
    return cards + drawn(
        levels, "Each noise level since the first look", "Loss over that of the first look, a line for each quantile: below 1 it has got better.", "iteration", limit=1.0
    )


def right_cards(looks: Sequence[Look]) -> list[Card]:
    right = curve("right", "averaged", [(look.iteration, look.right) for look in looks if look.right is not None])
    return drawn([right], "Samples that are right", "Share of the grid's clips in which the judge finds every attribute right.", "iteration", percent=True)


def speed_cards(metrics: Sequence[Mapping[str, Any]]) -> list[Card]:
    found = []
    for name, (title, told, share) in SPEEDS.items():
        found += drawn([curve(title, "training", [(line["iteration"], line[name]) for line in metrics if name in line])], title, told, "iteration", percent=share)
    return found


# Samples


def chosen(files: Sequence[Path]) -> list[Path]:
    """At most `SHEETS` of them, evenly spread, the first and the last included."""
    if len(files) <= SHEETS:
        return list(files)
    return [files[round(k * (len(files) - 1) / (SHEETS - 1))] for k in range(SHEETS)]


def sheet_of(file: Path) -> Sheet:
    """Raises UserError where the picture is damaged."""
    buffer = io.BytesIO()
    with Image.open(file) as picture:
        picture.convert("RGB").save(buffer, "JPEG", quality=90, subsampling=0)
    return Sheet(f"Iteration {int(file.stem)}", f"samples/{file.stem}.mp4", "; ".join(prompts_of(file)), base64.b64encode(buffer.getvalue()).decode())

"""Plots as SVG text, drawn on the server: no script, no inline style, colours by class so that they follow light and dark.

Each is an image with a title and a description; the numbers stand in a table beside it, too. A scale begins at zero unless what is drawn can be negative.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from reward.app.web import visible

WIDTH = 460
Scale = Callable[[float], float]


@dataclass(frozen=True)
class Whisker:
    """A number with its interval. value None: not measurable yet, for the reason in `note`."""

    label: str
    value: float | None
    low: float | None
    high: float | None
    note: str = ""
    mark: float | None = None
    """Where chance would be."""


@dataclass(frozen=True)
class Line:
    label: str
    look: str
    values: Sequence[float]


def _short(text: str, most: int = 26) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _number(value: float, percent: bool) -> str:
    return f"{100 * value:.0f} %" if percent else f"{value:.2f}".rstrip("0").rstrip(".") if value % 1 else f"{value:.0f}"


def _svg(width: int, height: int, name: str, said: str, body: Sequence[str], look: str) -> Markup:
    key = f"plot-{hashlib.sha256(f'{name} {said}'.encode()).hexdigest()[:10]}"
    text = (
        f'<svg class="plot {look}" viewBox="0 0 {width} {height}" role="img" aria-labelledby="{key}-t {key}-d" preserveAspectRatio="xMidYMid meet">'
        f'<title id="{key}-t">{escape(name)}</title><desc id="{key}-d">{escape(said)}</desc>{"".join(body)}</svg>'
    )
    return Markup(visible(text))


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers that cover a range."""
    if not high > low:
        high = low + 1
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= most)
    first = math.floor(low / step + 1e-9)
    return [round(place * step, 10) for place in range(first, math.ceil(high / step - 1e-9) + 1)]


def intervals(rows: Sequence[Whisker], *, name: str, percent: bool = False, low: float = 0.0, high: float | None = None) -> Markup:
    """Dots with whiskers, a row each, on one scale; a tick where chance would be."""
    left, right, line = 178, 22, 30
    bottom = 10 + line * len(rows)
    ends = [each.high for each in rows if each.high is not None] + [each.mark for each in rows if each.mark is not None]
    starts = [each.low for each in rows if each.low is not None]
    reach = ticks(min([low, *starts]), high if high is not None else max([*ends, 1e-9]))

    def across(value: float) -> float:
        return left + (WIDTH - left - right) * (value - reach[0]) / (reach[-1] - reach[0])

    body = []
    for tick in reach:
        body.append(f'<line class="grid" x1="{across(tick):.1f}" x2="{across(tick):.1f}" y1="4" y2="{bottom}"/>')
        body.append(f'<text class="tick" x="{across(tick):.1f}" y="{bottom + 18}" text-anchor="middle">{_number(tick, percent)}</text>')
    for place, row in enumerate(rows):
        y = 10 + line * (place + 0.5)
        body.append(f'<text class="name" x="{left - 10}" y="{y + 5:.1f}" text-anchor="end">{escape(_short(row.label))}</text>')
        if row.mark is not None:
            body.append(f'<line class="mark" x1="{across(row.mark):.1f}" x2="{across(row.mark):.1f}" y1="{y - 10:.1f}" y2="{y + 10:.1f}"/>')
        if row.value is None or row.low is None or row.high is None:
            body.append(f'<text class="none" x="{left + 4}" y="{y + 5:.1f}">not measurable yet</text>')
            continue
        body.append(f'<line class="whisker" x1="{across(row.low):.1f}" x2="{across(row.high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(f'<circle class="dot" cx="{across(row.value):.1f}" cy="{y:.1f}" r="5"><title>{escape(_told(row, percent))}</title></circle>')
    return _svg(WIDTH, bottom + 26, name, f"{name}, with 95 % intervals. " + "; ".join(_told(row, percent) for row in rows) + ".", body, "intervals")


def _told(row: Whisker, percent: bool) -> str:
    if row.value is None or row.low is None or row.high is None:
        return f"{row.label}: not measurable yet" + (f", {row.note}" if row.note else "")
    return f"{row.label}: {_number(row.value, percent)}, from {_number(row.low, percent)} to {_number(row.high, percent)}"


def columns(lines: Sequence[Line], labels: Sequence[str], *, name: str, every: int = 6) -> Markup:
    """Columns side by side over time; a label under each `every`-th."""
    left, top, tall = 36, 10, 150
    reach = ticks(0.0, max([1.0, *(value for line in lines for value in line.values)]), most=4)
    step = (WIDTH - left - 8) / max(len(labels), 1)
    wide = max(step * 0.8 / max(len(lines), 1), 1.0)

    def up(value: float) -> float:
        return top + tall * (1 - value / reach[-1])

    body = []
    for tick in reach:
        body.append(f'<line class="grid" x1="{left}" x2="{WIDTH - 8}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>')
        body.append(f'<text class="tick" x="{left - 8}" y="{up(tick) + 4:.1f}" text-anchor="end">{_number(tick, False)}</text>')
    for place, label in enumerate(labels):
        if place % every == 0:
            body.append(f'<text class="tick" x="{left + step * place:.1f}" y="{top + tall + 20}">{escape(label)}</text>')
        for row, line in enumerate(lines):
            if line.values[place]:
                x, y = left + step * place + wide * row, up(line.values[place])
                tip = f"{label} {line.label}: {_number(line.values[place], False)}"
                body.append(f'<rect class="{line.look}" x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{top + tall - y:.1f}" rx="1.5"><title>{escape(tip)}</title></rect>')
    totals = "; ".join(f"{line.label}: {_number(sum(line.values), False)} in all, {_number(max(line.values, default=0), False)} at most in an hour" for line in lines)
    return _svg(WIDTH, top + tall + 30, name, f"{name}. {totals}.", body, "bars")


def histogram(counts: Sequence[int], threshold: float, *, name: str, other: float | None = None) -> Markup:
    """Clips by score from 0 to 1 on a scale of square roots, so that a few clips are seen beside thousands; the threshold as a line, what it blocks in another colour."""
    left, top, tall = 44, 24, 140
    most = max([1, *counts])
    reach = sorted({0, *(round(most * share) for share in (0.06, 0.25, 0.56, 1.0))})
    step = (WIDTH - left - 16) / max(len(counts), 1)

    def across(score: float) -> float:
        return left + (WIDTH - left - 16) * score

    def up(count: float) -> float:
        return top + tall * (1 - math.sqrt(count / most))

    body = []
    for tick in reach:
        body.append(f'<line class="grid" x1="{left}" x2="{WIDTH - 16}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>')
        body.append(f'<text class="tick" x="{left - 8}" y="{up(tick) + 4:.1f}" text-anchor="end">{tick}</text>')
    for place, count in enumerate(counts):
        if count:
            middle, x, y = (place + 0.5) / len(counts), left + step * place, up(count)
            tip = f"{place / len(counts):.2f} to {(place + 1) / len(counts):.2f}: {count} clips"
            body.append(
                f'<rect class="{"over" if middle >= threshold else "under"}" x="{x + 1:.1f}" y="{y:.1f}" width="{step - 2:.1f}" height="{top + tall - y:.1f}" rx="1.5">'
                f"<title>{tip}</title></rect>"
            )
    body += [f'<text class="tick" x="{across(score):.1f}" y="{top + tall + 20}" text-anchor="middle">{score:g}</text>' for score in (0, 0.25, 0.5, 0.75, 1)]
    for value, look, word in ((threshold, "limit", "now"), (other, "limit new", "new")):
        if value is not None and 0 <= value <= 1:
            body.append(f'<line class="{look}" x1="{across(value):.1f}" x2="{across(value):.1f}" y1="{top - 6}" y2="{top + tall}"/>')
            body.append(f'<text class="tick strong" x="{across(value):.1f}" y="{top - 10}" text-anchor="middle">{word} {value:g}</text>')
    over = sum(count for place, count in enumerate(counts) if (place + 0.5) / len(counts) >= threshold)
    return _svg(WIDTH, top + tall + 30, name, f"{name}: {sum(counts)} clips by score, about {over} of them at or above the threshold of {threshold:g}.", body, "histogram")


def share_bar(parts: Sequence[tuple[str, str, int]], *, name: str) -> Markup:
    """One bar cut into parts. parts: (label, look, number)."""
    whole = sum(number for *_, number in parts)
    edges = list(itertools.accumulate((number for *_, number in parts), initial=0))
    body = [
        f'<rect class="{look}" x="{WIDTH * edge / whole:.1f}" y="0" width="{WIDTH * number / whole:.1f}" height="14"><title>{escape(label)}: {number}</title></rect>'
        for edge, (label, look, number) in zip(edges, parts, strict=False)
        if number
    ]
    return _svg(WIDTH, 14, name, f"{name}. " + "; ".join(f"{label}: {number}" for label, _, number in parts) + ".", body, "share")

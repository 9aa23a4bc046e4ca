"""Charts of the report as plain SVG text: no drawing library, colours by CSS class so that they follow light and dark pages.

Every chart is an image with a name and a description for screen readers; every point says its values in a tooltip.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 340, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 38
MOST_POINTS = 240
SMOOTH_FROM = 30
STYLE = (
    ".paper{fill:#fff}.chart text,.drawn{font:11.5px system-ui,sans-serif;fill:#5f6673}.title{font:600 14px system-ui,sans-serif;fill:#1a1c20}.chart .name{fill:#1a1c20}"
    ".chart .title{font-weight:600;fill:#1a1c20}.grid{stroke:#e3e6ea}.limit{stroke:#1a1c20;stroke-width:1.5;stroke-dasharray:5 4}.line,.raw{fill:none;stroke-width:2}"
    ".raw{stroke-width:1;opacity:.3}.hit{fill:transparent}.whisker{stroke:#1a1c20;stroke-width:1.3}"
)


@dataclass(frozen=True)
class Series:
    """One line of a chart; `look` is the CSS class that colours it. Points with a nan are left out."""

    label: str
    look: str
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True)
class Whisker:
    """One mean with its interval in a chart of intervals."""

    label: str
    look: str
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Bar:
    """One share with its interval in a chart of bars."""

    label: str
    look: str
    mean: float
    low: float
    high: float


def line_chart(series: Sequence[Series], *, name: str, x_label: str, percent: bool = False, limit: float | None = None, logarithmic: bool = False) -> str:
    """Lines over a common x axis that starts at zero. Long noisy series are drawn thin, with their running mean on top.

    limit: a dashed horizontal line, for example the agreed bound of a rate. logarithmic: the x axis is, and has no zero.
    """
    drawn = [line for line in map(_finite, series) if line.x]
    if not drawn:
        raise ValueError(f"{name}: no finite point to draw")
    ys = [y for line in drawn for y in line.y] + ([limit] if limit is not None else [])
    xs = [x for line in drawn for x in line.x]
    x_ticks = log_ticks(min(xs), max(xs)) if logarithmic else ticks(0.0, max(xs))
    y_ticks = ticks(min(ys + [0.0] if percent else ys), max(ys))
    place = _Frame(x_ticks, y_ticks, logarithmic)
    body = [place.grid(percent), place.x_axis(x_label)]
    if limit is not None:
        y = place.y(limit)
        body.append(f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    body += [_line(line, place, percent) for line in drawn]
    ends = "; ".join(f"{line.label}: {number(line.y[0], percent)} at first, {number(line.y[-1], percent)} at last" for line in drawn)
    return _svg(WIDTH, HEIGHT, name, f"{name} against {x_label}. {ends}.", body)


def interval_chart(rows: Sequence[Whisker], *, name: str, percent: bool = False, limit: float | None = None) -> str:
    """Dots with whiskers, one row each, on a common axis that starts at zero."""
    if not rows:
        raise ValueError(f"{name}: nothing to draw")
    width, left, line = 340, 118, 30
    height = 12 + line * len(rows) + 30
    reach = ticks(0.0, max([row.high for row in rows] + ([limit] if limit is not None else [])), most=4)
    end = reach[-1] or 1.0

    def across(value: float) -> float:
        return left + (width - left - 20) * value / end

    bottom = 12 + line * len(rows)
    body = []
    for tick in reach:
        body.append(f'<line class="grid" x1="{across(tick):.1f}" x2="{across(tick):.1f}" y1="6" y2="{bottom}"/>')
        body.append(f'<text class="tick" x="{across(tick):.1f}" y="{bottom + 18}" text-anchor="middle">{number(tick, percent)}</text>')
    if limit is not None:
        body.append(f'<line class="limit" x1="{across(limit):.1f}" x2="{across(limit):.1f}" y1="6" y2="{bottom}"/>')
    for index, row in enumerate(rows):
        y = 12 + line * (index + 0.5)
        tip = f"{row.label}: {number(row.mean, percent)} [{number(row.low, percent)}, {number(row.high, percent)}]"
        body.append(
            f'<g class="{escape(row.look)}"><title>{escape(tip)}</title><text class="name" x="{left - 12}" y="{y + 4:.1f}" text-anchor="end">{escape(row.label)}</text>'
            f'<line class="whisker" x1="{across(row.low):.1f}" x2="{across(row.high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<circle class="dot" cx="{across(row.mean):.1f}" cy="{y:.1f}" r="5"></circle></g>'
        )
    said = "; ".join(f"{row.label} {number(row.mean, percent)}, from {number(row.low, percent)} to {number(row.high, percent)}" for row in rows)
    return _svg(width, height, name, f"{name} with 95 % intervals. {said}.", body)


def ratio_chart(groups: Sequence[tuple[str, Sequence[Whisker]]], *, name: str) -> str:
    """Ratios with whiskers on a logarithmic axis around 1, one row each, under the titles of their groups. groups: (title, rows); all values are above 0."""
    rows = [row for _, some in groups for row in some]
    if not rows:
        raise ValueError(f"{name}: nothing to draw")
    width, left, line, top = 980, 480, 22, 14
    reach = log_ticks(min(1 / 1.05, *(row.low for row in rows)), max(1.05, *(row.high for row in rows)))
    first, span = math.log(reach[0]), math.log(reach[-1] / reach[0])

    def across(value: float) -> float:
        return left + (width - left - 24) * (math.log(value) - first) / span

    body, y = [], float(top)
    for title, some in groups:
        body.append(f'<text class="title" x="8" y="{y + 16:.1f}">{escape(title)}</text>')
        y += line
        for row in some:
            middle = y + line / 2
            tip = f"{title}, {row.label}: {row.mean:.2f} [{row.low:.2f}, {row.high:.2f}]"
            body.append(
                f'<g class="{escape(row.look)}"><title>{escape(tip)}</title><text class="name" x="{left - 12}" y="{middle + 4:.1f}" text-anchor="end">{escape(row.label)}</text>'
                f'<line class="whisker" x1="{across(row.low):.1f}" x2="{across(row.high):.1f}" y1="{middle:.1f}" y2="{middle:.1f}"/>'
                f'<circle class="dot" cx="{across(row.mean):.1f}" cy="{middle:.1f}" r="5"></circle></g>'
            )
            y += line
    marks = [
        f'<line class="{"limit" if tick == 1 else "grid"}" x1="{across(tick):.1f}" x2="{across(tick):.1f}" y1="{top - 8}" y2="{y:.1f}"/>'
        f'<text class="tick" x="{across(tick):.1f}" y="{y + 18:.1f}" text-anchor="middle">{number(tick)}</text>'
        for tick in reach
    ]
    said = "; ".join(f"{title}, {row.label}: {row.mean:.2f}" for title, some in groups for row in some)
    return _svg(width, round(y + 50), name, f"{said}.", [*marks, *body, f'<text class="axis" x="{left}" y="{y + 40:.1f}">{escape(name)}</text>'])


def bar_chart(groups: Sequence[tuple[str, Sequence[Bar], float]], *, name: str) -> str:
    """Lying bars of shares with whiskers. groups: (label, bars one below the other, where a dashed mark stands: what the share should be)."""
    if not groups:
        raise ValueError(f"{name}: nothing to draw")
    width, left, line, gap = 560, 96, 17, 12
    reach = ticks(0.0, max([bar.high for _, bars, _ in groups for bar in bars] + [mark for *_, mark in groups]))

    def across(value: float) -> float:
        return left + (width - left - 20) * value / (reach[-1] or 1.0)

    body, said, y = [], [], 8.0
    for label, bars, mark in groups:
        tall = line * max(1, len(bars))
        body.append(f'<text class="name" x="{left - 10}" y="{y + tall / 2 + 4:.1f}" text-anchor="end">{escape(label)}</text>')
        for bar in bars:
            tip = f"{label}, {bar.label}: {number(bar.mean, True)} [{number(bar.low, True)}, {number(bar.high, True)}]"
            middle = y + line / 2
            body.append(
                f'<g class="{escape(bar.look)}"><title>{escape(tip)}</title>'
                f'<rect class="bar" x="{left}" y="{y + 2:.1f}" width="{across(bar.mean) - left:.1f}" height="{line - 4}"/>'
                f'<line class="whisker" x1="{across(bar.low):.1f}" x2="{across(bar.high):.1f}" y1="{middle:.1f}" y2="{middle:.1f}"/></g>'
            )
            said.append(tip)
            y += line
        body.append(f'<line class="limit" x1="{across(mark):.1f}" x2="{across(mark):.1f}" y1="{y - tall - 2:.1f}" y2="{y + 2:.1f}"/>')
        y += gap
    marks = [
        f'<line class="grid" x1="{across(tick):.1f}" x2="{across(tick):.1f}" y1="4" y2="{y:.1f}"/>'
        f'<text class="tick" x="{across(tick):.1f}" y="{y + 16:.1f}" text-anchor="middle">{number(tick, True)}</text>'
        for tick in reach
    ]
    return _svg(width, round(y + 26), name, f"{name} with 95 % intervals, a mark where each should be. {'; '.join(said)}.", [*marks, *body])


def histogram(kept: NDArray[np.float64], dropped: NDArray[np.float64], *, name: str, x_label: str, limits: Sequence[float] = (), bins: int = 32) -> str:
    """How two groups of numbers are spread, bars of `dropped` on those of `kept`; nan is left out. limits: dashed lines where thresholds are.

    The axis reaches from the 1st to the 99th percentile and to every limit; what lies outside is in the first and last bar. Raises ValueError where no number is finite.
    """
    groups = [values[np.isfinite(values)] for values in (kept, dropped)]
    both = np.concatenate(groups)
    if not len(both):
        raise ValueError(f"{name}: nothing to draw")
    x_ticks = ticks(round(float(min([np.quantile(both, 0.01), *limits])), 9), round(float(max([np.quantile(both, 0.99), *limits])), 9))
    edges = np.linspace(x_ticks[0], x_ticks[-1], bins + 1)
    counts = [np.histogram(values.clip(edges[0], edges[-1]), edges)[0] for values in groups]  # [bins] each
    place = _Frame(x_ticks, ticks(0.0, float(max(1, (counts[0] + counts[1]).max()))), False)
    body = [place.grid(False), place.x_axis(x_label)]
    for k in range(bins):
        left, right, below = place.x(edges[k]) + 0.5, place.x(edges[k + 1]) - 0.5, 0.0
        tip = f"{number(edges[k])} to {number(edges[k + 1])}: {counts[0][k]:,} kept, {counts[1][k]:,} dropped"
        for look, count in (("kept", counts[0][k]), ("dropped", counts[1][k])):
            if count:
                top = place.y(below + count)
                body.append(f'<rect class="{look}" x="{left:.1f}" width="{right - left:.1f}" y="{top:.1f}" height="{place.y(below) - top:.1f}"><title>{escape(tip)}</title></rect>')
            below += float(count)
    body += [f'<line class="limit" x1="{place.x(value):.1f}" x2="{place.x(value):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>' for value in limits]
    named = [(look, values) for look, values in zip(("kept", "dropped"), groups, strict=True) if len(values)]
    middle = ", ".join(f"{number(float(np.median(values)))} in the middle of {len(values):,} {look}" for look, values in named)
    return _svg(WIDTH, HEIGHT, name, f"{name} over clips: {middle}.{' Thresholds: ' + ', '.join(map(number, limits)) + '.' if limits else ''}", body)


def ticks(low: float, high: float, *, most: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from at or below `low` to at or above `high`, at most about `most` steps."""
    if high <= low:
        low, high = low - (abs(low) or 1.0) * 0.5, low + (abs(low) or 1.0) * 0.5
    raw = (high - low) / most
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from at or below `low` to at or above `high`, both above 0; over a factor of a thousand the powers alone.

    Example: `log_ticks(3, 40)` is [2, 5, 10, 20, 50].
    """
    if not 0 < low <= high:
        raise ValueError(f"a logarithmic axis from {low:g} to {high:g}")
    digits = (1, 2, 5) if high / low < 1000 else (1,)
    steps = [float(f"{digit}e{power}") for power in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2) for digit in digits]
    first = max(step for step in steps if step <= low * (1 + 1e-9))
    last = min(step for step in steps if step >= high * (1 - 1e-9) and step > first)
    return [step for step in steps if first <= step <= last]


def number(value: float, percent: bool = False) -> str:
    """A number as short as its size allows: 12 %, 0.034, 1.5M.

    Example: `number(0.123, percent=True)` is "12.3 %", `number(2_400_000)` is "2.4M".
    """
    if percent:
        return f"{value * 100:.3g} %"
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


class _Frame:
    """The plot area of a line chart: data to pixels, grid and axis."""

    def __init__(self, x_ticks: list[float], y_ticks: list[float], logarithmic: bool) -> None:
        self.x_ticks, self.y_ticks, self.logarithmic = x_ticks, y_ticks, logarithmic

    def x(self, value: float) -> float:
        low, high = self.x_ticks[0], self.x_ticks[-1]
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - low) / (high - low)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

    def grid(self, percent: bool) -> str:
        return "".join(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{self.y(tick):.1f}" y2="{self.y(tick):.1f}"/>'
            f'<text class="tick" x="{LEFT - 8}" y="{self.y(tick) + 4:.1f}" text-anchor="end">{number(tick, percent)}</text>'
            for tick in self.y_ticks
        )

    def x_axis(self, label: str) -> str:
        marks = "".join(f'<text class="tick" x="{self.x(tick):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{number(tick)}</text>' for tick in self.x_ticks)
        return marks + f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 5}" text-anchor="middle">{escape(label)}</text>'


def page(panels: Sequence[tuple[str, str, str]], colours: Mapping[str, str], *, more: str = "", columns: int = 2) -> str:
    """Charts as one SVG file that needs nothing else. panels: (title, what is drawn, chart) each; colours: of each look; more: CSS for what these do not say."""
    width, height, head = WIDTH + 24, HEIGHT + 64, 40
    rows = -(-len(panels) // columns)
    body = [f"<style>{_style(colours, more)}</style>", '<rect class="paper" width="100%" height="100%"/>']
    for index, (title, drawn, chart) in enumerate(panels):
        left, top = index % columns * width + 12, index // columns * height
        body.append(f'<text class="title" x="{left}" y="{top + 18}">{escape(title)}</text><text class="drawn" x="{left}" y="{top + 33}">{escape(drawn)}</text>')
        body.append(chart.replace("<svg ", f'<svg x="{left}" y="{top + head}" width="{WIDTH}" height="{HEIGHT}" overflow="visible" ', 1))
    size = columns * width, rows * height
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="{size[0]}" height="{size[1]}" viewBox="0 0 {size[0]} {size[1]}">{"".join(body)}</svg>\n'


def alone(chart: str, colours: Mapping[str, str]) -> str:
    """One chart as an SVG file that needs nothing else, on white paper; colours: of each look."""
    style = _style(colours)
    return chart.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(">", f'><style>{style}</style><rect class="paper" width="100%" height="100%"/>', 1) + "\n"


def _style(colours: Mapping[str, str], more: str = "") -> str:
    return STYLE + "".join(f".{look} .line,.{look} .raw{{stroke:{colour}}}.{look} .dot,.{look} .bar{{fill:{colour}}}" for look, colour in colours.items()) + more


def _line(line: Series, place: _Frame, percent: bool) -> str:
    noisy = len(line.x) >= SMOOTH_FROM
    bold = _running_mean(line) if noisy else line
    parts = [f'<polyline class="raw" points="{_points(line, place)}"/>'] if noisy else []
    parts.append(f'<polyline class="line" points="{_points(bold, place)}"/>')
    marks = _thinned(bold, 24)
    for x, y in zip(marks.x, marks.y, strict=True):
        tip = f"{line.label}: {number(y, percent)} at {number(x)}"
        kind = "hit" if noisy else "dot"
        parts.append(f'<circle class="{kind}" cx="{place.x(x):.1f}" cy="{place.y(y):.1f}" r="{8 if noisy else 3}"><title>{escape(tip)}</title></circle>')
    return f'<g class="{escape(line.look)}">{"".join(parts)}</g>'


def _points(line: Series, place: _Frame) -> str:
    thin = _thinned(line, MOST_POINTS)
    return " ".join(f"{place.x(x):.1f},{place.y(y):.1f}" for x, y in zip(thin.x, thin.y, strict=True))


def _finite(line: Series) -> Series:
    pairs = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(x) and math.isfinite(y)]
    return Series(line.label, line.look, tuple(x for x, _ in pairs), tuple(y for _, y in pairs))


def _thinned(line: Series, most: int) -> Series:
    """Every k-th point and the last one."""
    index = sorted({*range(0, len(line.x), -(-len(line.x) // most)), len(line.x) - 1})
    return Series(line.label, line.look, tuple(line.x[i] for i in index), tuple(line.y[i] for i in index))


def _running_mean(line: Series) -> Series:
    """Centred mean over about a tenth of the points; the window shrinks at both ends instead of inventing values."""
    half = max(2, len(line.y) // 20)
    y = np.asarray(line.y)
    means = [float(y[max(0, i - half) : i + half + 1].mean()) for i in range(len(y))]
    return Series(line.label, line.look, line.x, tuple(means))


def _svg(width: int, height: int, name: str, description: str, body: Sequence[str]) -> str:
    label = escape(f"{name}. {description}", quote=True)
    return f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(body)}</svg>'

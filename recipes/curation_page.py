"""`report.html` in the folder of `rushes curate`: what was kept, what was dropped and why, with small pictures, and how every measure is spread, with its thresholds drawn in.

One file, no network. It reads what curation wrote (`scores/`, `decisions.parquet`, `curated.json`) and no clip. Clips that must not be used, or that a safety filter did not
allow, are counted and never shown.
"""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from base_model.checkpoint import atomic_write, read_json
from base_model.errors import UserError
from base_model.video.curate import MEASURES
from recipes.charts import histogram, number
from recipes.clip_folder import Cut
from recipes.clip_table import read_table

PAGE = "report.html"
EXAMPLES = 8  # clips shown of each rule
SHOWN = 24  # of what is kept
ERRORS = 40  # told one by one
NEVER_SHOWN = frozenset({"opt_out", "safety"})
WAN = Cut(frames=81, fps=16.0, area=480 * 832, size=None, first=1, step=4, sides=(16, 16), largest=None)
"""How Wan 2.1 takes clips: what tokens are counted by."""
FURTHER = {"agreement": ("cosine", "how well the clip shows its caption"), "aesthetic": ("", "by the aesthetic head"), "faces": ("faces", "most in a frame")}


class Example(NamedTuple):
    """A clip on the page."""

    name: str
    told: str  # its caption, or why it was dropped
    pictures: Sequence[str]  # base64 of JPEGs


class Rule(NamedTuple):
    """Why clips were dropped."""

    name: str
    clips: int
    alone: int  # clips that nothing else speaks against
    shown: Sequence[Mapping[str, Any]]  # rows of some of them
    hidden: bool


class Chart(NamedTuple):
    """How a measure is spread."""

    title: str
    told: str
    chart: str  # SVG


def write_page(out: Path) -> Path:
    """Writes the page beside what was curated and returns it. Raises UserError where something of it is missing or damaged, or the disk is full."""
    page = out / PAGE
    atomic_write(page, render_page(out).encode())
    return page


def render_page(out: Path) -> str:
    """report.html as text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    rows, told = read_rows(out), read_json(out / "curated.json", "what was curated")
    kept, rules = spread([row for row in rows if row["kept"]], SHOWN), rules_of(rows)
    pictures = pictures_of(out, [row["key"] for row in (*kept, *(row for rule in rules for row in rule.shown))])
    room = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return room.get_template("curation.html").render(
        name=out.absolute().name,
        given=told["input"],
        facts=facts_of(rows),
        kept=[Example(row["id"], row["text"] or "no caption", pictures.get(row["key"], ())) for row in kept],
        rules=[(rule, [Example(row["id"], reason_of(row, rule.name), pictures.get(row["key"], ())) for row in rule.shown]) for rule in rules],
        charts=charts_of(rows, told["keep"]),
        errors=[(row["id"], reason) for row in rows for rule, reason in zip(row["rules"], row["reasons"], strict=True) if rule == "error"][:ERRORS],
    )


def read_rows(out: Path) -> list[dict[str, Any]]:
    """A row for every row of the input, in its order: what was found and what was decided."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = out / "decisions.parquet"
    try:
        decisions = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"no decisions to show, {path}: {type(error).__name__}. Make them with rushes curate") from error
    found = {row["key"]: row for row in read_table(out / "scores", without=("thumbnails", "embedding", "hashes", "extra")).to_pylist()}
    return [found[row["key"]] | row for row in decisions if row["key"] in found]


def pictures_of(out: Path, keys: Sequence[int]) -> dict[int, list[str]]:
    """base64 of the small JPEGs of these rows; those of the others are not read."""
    import pyarrow as pa
    from pyarrow import compute, dataset

    parts = sorted(str(path) for path in (out / "scores").glob("*.parquet"))
    found = dataset.dataset(parts).to_table(columns=["key", "thumbnails"], filter=compute.field("key").isin(pa.array(keys, pa.uint64())))
    return {row["key"]: [base64.b64encode(picture).decode() for picture in row["thumbnails"] or ()] for row in found.to_pylist()}


# What is said


def facts_of(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    kept = [row for row in rows if row["kept"]]
    seconds = sum(row["seconds"] or 0.0 for row in kept)
    facts = [
        ("Clips", f"{len(rows):,}"),
        ("Kept", f"{len(kept):,}"),
        ("Dropped", f"{len(rows) - len(kept):,}"),
        ("Kept, minutes of video", number(seconds / 60)),
        ("Tokens an epoch", number(sum(map(tokens, kept)))),
    ]
    licences = Counter(row["licence"] or "not told" for row in kept)
    return [*facts, ("Licences", ", ".join(f"{name}: {count:,}" for name, count in licences.most_common(4)) or "none")]


def tokens(row: Mapping[str, Any], cut: Cut = WAN) -> int:
    """Latent tokens of a clip as a model takes it, all its examples together: patches of 4 frames x 16 x 16 pixels."""
    target, seconds = cut.target(row["height"] or 0, row["width"] or 0), row["seconds"] or 0.0
    if target is None or math.isnan(seconds):
        return 0
    frames = 1 if row["frames"] == 1 else math.floor(seconds * cut.fps + 1e-6)
    return sum((1 + (span.frames - 1) // 4) * (target[0] // 16) * (target[1] // 16) for span in cut.spans(frames))


def rules_of(rows: Sequence[Mapping[str, Any]]) -> list[Rule]:
    """Rules by how many clips they speak against, the most first."""
    against: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        for rule in dict.fromkeys(row["rules"]):
            against.setdefault(rule, []).append(row)
    found = []
    for rule, broken in sorted(against.items(), key=lambda item: -len(item[1])):
        shown = [] if rule in NEVER_SHOWN else spread([row for row in broken if may_show(row)], EXAMPLES)
        found.append(Rule(rule, len(broken), sum(set(row["rules"]) == {rule} for row in broken), shown, rule in NEVER_SHOWN))
    return found


def reason_of(row: Mapping[str, Any], rule: str) -> str:
    return next(reason for name, reason in zip(row["rules"], row["reasons"], strict=True) if name == rule)


def may_show(row: Mapping[str, Any]) -> bool:
    """Whether people may see a clip that was not kept."""
    return NEVER_SHOWN.isdisjoint(row["rules"]) and not row["opted_out"] and row["safety"] in (None, "allow")


def spread(rows: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """At most so many of them, evenly spread."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(k * (len(rows) - 1) / (most - 1))] for k in range(most)]


# How measures are spread


def charts_of(rows: Sequence[Mapping[str, Any]], keep: Mapping[str, Any]) -> list[Chart]:
    """A histogram of every measure that was made, kept clips apart from dropped ones; those with a threshold first."""
    kept = np.array([row["kept"] for row in rows], dtype=bool)
    known = {name: (measure.unit, measure.what) for name, measure in MEASURES.items()} | FURTHER
    found: list[tuple[bool, Chart]] = []
    for name, (unit, what) in known.items():
        values = column(rows, name)
        if np.isfinite(values).sum() == 0:
            continue
        limits = keep.get(name) or {}
        least, most = limits.get("least"), limits.get("most")
        asked = " and ".join(f"at {word} {number(value)}" for word, value in (("least", least), ("most", most)) if value is not None)
        chart = histogram(values[kept], values[~kept], name=name, x_label=unit or name, limits=[value for value in (least, most) if value is not None])
        found.append((bool(limits), Chart(name, f"{what[0].upper()}{what[1:]}.{f' Asked for: {asked}.' if asked else ''}", chart)))
    return [chart for _, chart in sorted(found, key=lambda pair: not pair[0])]


def column(rows: Sequence[Mapping[str, Any]], name: str) -> NDArray[np.float64]:
    """[N]; nan where it is not known."""
    return np.array([math.nan if row.get(name) is None else row[name] for row in rows], dtype=np.float64)

"""The report: one HTML file that needs no network. It plays the clips and shows what `report.json` holds, the curves of the runs, and the lineage.

What was not measured is said so; nothing is left out silently. Clips that the safety runner did not allow, and clips in which the judge counts
flashing, are never playable here: their first frame stands still beside the reason.
"""

from __future__ import annotations

import base64
import io
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from base_model.errors import UserError
from base_model.video.files import disk_errors, to_uint8, write_atomic, write_mp4
from recipes.charts import Series, Whisker, interval_chart, line_chart, number

NOT_MEASURED = "not measured"
NOT_APPLICABLE = "not applicable"
CLIP_BUDGET = 4_500_000
NAMES = {"base": "Base", "sft": "SFT", "rl": "RL", "rl_ddpo": "RL (DDPO)", "rl_unconstrained": "RL, no limit"}


@dataclass(frozen=True)
class Take:
    """One model's clip of a shown prompt. Fail-closed: without a verdict it is not playable."""

    model: str
    video: Tensor  # [T,3,H,W] in [0,1]
    verdict: str = "error"  # the safety runner's word: allow, review, error or block
    reason: str = "no safety verdict was given"
    flashing: bool | None = None  # the judge's own counter; None where nobody counted
    right: bool | None = None  # every attribute right; None where the judge does not apply
    wrong: tuple[str, ...] = ()  # names of the attributes that are wrong

    @property
    def playable(self) -> bool:
        return self.verdict == "allow" and not self.flashing


@dataclass(frozen=True)
class Shown:
    """A prompt with the takes of every model from the same seed, so from the same noise."""

    prompt: str
    seed: int
    takes: tuple[Take, ...]
    strobe: bool = False  # the prompt asks for a hazard


@dataclass(frozen=True)
class CurveRun:
    """The logged rows of one RL run: numbers under the names of `CURVES`; a row need not hold all of them."""

    label: str
    model: str
    rows: Sequence[Mapping[str, Any]]


class Curve(NamedTuple):
    """One chart: the key its values have in the rows, its title, its unit and one sentence on how to read it."""

    key: str
    title: str
    unit: str
    meaning: str  # {labelers} stands for those the guard learnt from
    percent: bool = False


CURVES = (
    Curve("judge", "Judge, held-out prompts", "share of clips with every attribute right", "Not optimised, not read by any run: the number that counts.", True),
    Curve("reward", "Reward", "reward model's score", "What RL climbs. Whose rankings it was learnt from stands beside its accuracy, below.", False),
    Curve(
        "guard",
        "Guard",
        "second reward model's score",
        "Learnt from {labelers} that had no part in the reward. Reward up with guard down is reward hacking.",
        False,
    ),
    Curve("kl_per_element", "KL per latent element", "nats per latent element", "Distance of one denoising step from the SFT policy; comparable across sizes."),
    Curve("kl_total", "KL, total", "nats per clip", "The same distance, summed over the latent elements of a clip."),
    Curve("violation_rate", "Violation rate", "share of raw clips that flash", "Before any filter. The dashed line is the reported limit.", True),
    Curve("multiplier", "Multiplier", "weight of the safety cost", "Rises while the rate is above the share that it aims at; falls below it."),
    Curve("diversity", "Diversity", "mean distance of right clips whose prompts ask for the same motion", "Over what prompts leave free. A fall means the model repeats itself."),
)
AXES = (("forward_passes", "cumulative forward passes"), ("seconds", "seconds"))


@dataclass(frozen=True)
class ReportData:
    """Everything the page shows. `results` is the content of report.json; every key may be missing.

    Keys read beyond those of the contract: `per_attribute` {attribute: {model: interval}}, `two_objects` {model: interval}, `guard` {model: interval},
    `judge_gain_sft`, `judge_gain_ddpo`, `judge_gain_two_objects`, `diversity_ratio`, `diversity_ratio_ddpo`, `flash_limit` (a share),
    `seeds` [the same entries for each seed], `counts` {name: int}, `filtered` [{where, policy, verdict, count, of, examples}],
    `lights` {model: [{iteration, light, said}]}, what the guards of its run said at each look,
    `eye_judge_agreement` {attribute: interval or share}, `judge_accuracy` {on what: {attribute: interval}}, `judge_confusion` {attribute: {drawn: {read: count}}},
    `world` [{measure, meaning, words, models: {name: interval}}], `stage_seconds` {stage: s}, `commands` [str], `config`, `versions`, `hardware` {name: str}, `notes` [str],
    `ranked_by` {people, rankings}, where people ranked what the reward model learnt from.
    An interval is {mean, low, high}, null for what is unknown, or a string that says why not.
    """

    results: Mapping[str, Any]
    shown: Sequence[Shown] = ()
    runs: Sequence[CurveRun] = ()
    fps: float = 12.0
    title: str = "What alignment did"
    names: Mapping[str, str] = field(default_factory=NAMES.copy)  # model -> what the page calls it, in the order of the columns
    curves: Sequence[Curve] = field(default=CURVES)


def write_report(folder: Path, data: ReportData) -> Path:
    """Writes report.json and index.html into `folder`; returns the page. Raises UserError where the folder cannot be written."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    page = render_page(data)
    write_atomic(folder / "report.json", (json.dumps(finite(data.results), indent=2) + "\n").encode())
    write_atomic(folder / "index.html", page.encode())
    return folder / "index.html"


def render_page(data: ReportData) -> str:
    """The whole page as text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    room = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    room.filters.update(interval=interval_text, flat=flat)
    rows, dropped = shown_rows(data)
    models = models_of(data)
    return room.get_template("report.html").render(
        title=data.title,
        results=finite(data.results),
        models=models,
        names={**{model: model for model in models}, **data.names},
        rows=rows,
        dropped=dropped,
        panels=_panels(data, models),
        charts=_charts(data),
        legend=[{"label": run.label, "model": run.model} for run in data.runs],
        stages=_stages(data.results),
        confusion=_confusion(data.results),
        readings=_readings(data.results),
        beheld=_beheld(data.results, models),
        lead=_lead(data),
        guards_labelers=guards_labelers(data.results),
    )


def models_of(data: ReportData) -> list[str]:
    """Models in the order base, SFT, RL, then any other, as far as something is known of them."""
    found = {take.model for shown in data.shown for take in shown.takes}
    for key in ("judge", "flash_rate", "diversity", "two_objects", "guard"):
        part = data.results.get(key)
        found |= set(part) if isinstance(part, Mapping) else set()
    return [model for model in data.names if model in found] + sorted(found - set(data.names))


def interval_text(value: Any, percent: bool = True) -> str:
    """An entry of report.json in words: "52.3 % [47.1, 57.4]", "not measured", or the string that stands there.

    Example: `interval_text({"mean": 0.5, "low": 0.25, "high": 0.75})` is "50.0 % [25.0, 75.0]".
    """
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)):
        value = {"mean": value}
    if not isinstance(value, Mapping) or not _is_number(value.get("mean")):
        return NOT_MEASURED
    scale, digits = (100.0, 1) if percent else (1.0, 3)
    mean = f"{value['mean'] * scale:.{digits}f}" + (" %" if percent else "")
    if not (_is_number(value.get("low")) and _is_number(value.get("high"))):
        return mean
    return f"{mean} [{value['low'] * scale:.{digits}f}, {value['high'] * scale:.{digits}f}]"


def finite(value: Any) -> Any:
    """A copy that JSON can hold: nan and infinities become null, tuples lists, paths text."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (str, int, bool)) or value is None else str(value)


def flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Nested lineage as (dotted path, text) lines.

    Example: `{"sft": {"weights": "ab12", "from": ["base"]}}` gives ("sft.weights", "ab12") and ("sft.from.0", "base").
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from flat(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from flat(item, f"{path}.{index}")
    else:
        yield path, NOT_MEASURED if value is None else str(value)


def read_rows(metrics: Path, names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl with its columns renamed: `names` maps the names of `CURVES` and `AXES` to the file's. A torn last line is skipped.

    Example: `read_rows(folder / "metrics.jsonl", {"reward": "reward/mean", "seconds": "seconds"})`.
    """
    rows = []
    for line in _lines(metrics):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(row, dict):
            continue
        kept = {ours: row[theirs] for ours, theirs in names.items() if _is_number(row.get(theirs))}
        if kept:
            rows.append(kept)
    return rows


def _lines(metrics: Path) -> list[str]:
    try:
        return metrics.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"cannot read the metrics, {metrics}: {error.strerror}. Give the folder of a run") from error


def shown_rows(data: ReportData) -> tuple[list[dict[str, Any]], int]:
    """(prompts with their takes as data URIs, number of prompts left out because the page would grow beyond its budget)."""
    rows: list[dict[str, Any]] = []
    spent = 0
    for shown in data.shown:
        takes = [_cell(take, data.names.get(take.model, take.model), shown, data.fps) for take in shown.takes]
        spent += sum(len(cell["source"]) for cell in takes)
        if spent > CLIP_BUDGET:
            break
        rows.append({"prompt": shown.prompt, "seed": shown.seed, "strobe": shown.strobe, "takes": takes})
    return rows, len(data.shown) - len(rows)


def _cell(take: Take, name: str, shown: Shown, fps: float) -> dict[str, Any]:
    return {
        "model": take.model,
        "name": name,
        "playable": take.playable,
        "source": mp4_uri(take.video, fps) if take.playable else png_uri(take.video[0]),
        "poster": png_uri(take.video[0]),
        "label": f"{name}: {shown.prompt}" + ("" if take.playable else " (first frame, not played)"),
        "why": _why_still(take),
        "right": take.right,
        "wrong": ", ".join(take.wrong),
        "height": take.video.shape[-2],
        "width": take.video.shape[-1],
    }


def _why_still(take: Take) -> str:
    if take.playable:
        return ""
    if take.verdict != "allow":
        return f"{take.verdict}: {take.reason}" + (" (the judge counts flashing)" if take.flashing else "")
    return "the judge counts flashing, although the filter let it pass"


def mp4_uri(video: Tensor, fps: float) -> str:
    """[T,3,H,W] as an H.264 data URI, small clips enlarged by whole pixels."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "take.mp4"
        write_mp4(path, video, fps)
        return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()


def png_uri(frame: Tensor) -> str:
    """One frame [3,H,W] as a PNG data URI."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(to_uint8(frame[None])[0]).save(buffer, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _panels(data: ReportData, models: Sequence[str]) -> list[dict[str, str]]:
    """Small charts of intervals: judge, flash rate, diversity; those without a number are left to the table, which says why."""
    limit = data.results.get("flash_limit")
    wanted: list[tuple[str, str, bool, float | None]] = [
        ("judge", "Every attribute right", True, None),
        ("flash_rate", "Flash rate, raw output", True, limit if _is_number(limit) else None),
        ("diversity", "Diversity of right clips", False, None),
    ]
    panels = []
    for key, title, percent, line in wanted:
        parts = {model: _entry(data.results.get(key), model) for model in models}
        whiskers = [Whisker(data.names.get(model, model), model, part["mean"], part["low"], part["high"]) for model, part in parts.items() if _complete(part)]
        if whiskers:
            panels.append({"title": title, "svg": interval_chart(whiskers, name=title, percent=percent, limit=line)})
    return panels


def _charts(data: ReportData) -> list[dict[str, Any]]:
    """For every curve one chart per x axis, or the remark that nobody logged it."""
    limit = data.results.get("flash_limit")
    charts: list[dict[str, Any]] = []
    for curve in data.curves:
        line = limit if curve.key == "violation_rate" and _is_number(limit) else None
        drawn = {}
        for axis, label in AXES:
            series = [found for run in data.runs if (found := _series(run, curve.key, axis)).x]
            if series:
                drawn[axis] = line_chart(series, name=curve.title, x_label=label, percent=curve.percent, limit=line)
        meaning = curve.meaning.replace("{labelers}", guards_labelers(data.results))
        charts.append({"title": curve.title, "unit": curve.unit, "meaning": meaning, "drawn": drawn})
    return charts


def guards_labelers(results: Mapping[str, Any]) -> str:
    """Who ranked what the guard learnt from: in the demo, which tells of its reward model too, the simulated panel; otherwise nobody says."""
    return "simulated labelers" if results.get("reward_model") else "labelers"


def _series(run: CurveRun, key: str, axis: str) -> Series:
    points = [(float(row[axis]), float(row[key])) for row in run.rows if _is_number(row.get(axis)) and _is_number(row.get(key))]
    return Series(run.label, run.model, tuple(x for x, _ in points), tuple(y for _, y in points))


def _stages(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    seconds = {stage: spent for stage, spent in (results.get("stage_seconds") or {}).items() if _is_number(spent)}
    whole = sum(seconds.values())
    return [{"stage": stage, "seconds": number(spent), "share": round(100 * spent / whole, 2)} for stage, spent in seconds.items() if whole]


def _confusion(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows what was drawn, columns what the judge read; each cell with its share of the row for the shade."""
    tables = []
    for attribute, table in (results.get("judge_confusion") or {}).items():
        labels = sorted(table)
        columns = labels + sorted({seen for row in table.values() for seen in row} - set(labels))
        rows = [{"label": label, "cells": [_shaded(table[label].get(column, 0), table[label]) for column in columns]} for label in labels]
        tables.append({"attribute": attribute, "columns": columns, "rows": rows})
    return tables


def _shaded(count: int, row: Mapping[str, int]) -> dict[str, float]:
    return {"count": count, "shade": round(count / (sum(row.values()) or 1), 3)}


def _readings(results: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Rows of the table of the two readers: (what was compared, {attribute: interval})."""
    rows = [("Eye and judge agree, generated clips", results.get("eye_judge_agreement"))]
    rows += [(f"Judge right, {what}", part) for what, part in (results.get("judge_accuracy") or {}).items()]
    return [(what, part) for what, part in rows if isinstance(part, Mapping)]


def _beheld(results: Mapping[str, Any], models: Sequence[str]) -> list[str]:
    """Columns of the table of the world: the models, then what is no model."""
    rows = results.get("world") or []
    found = dict.fromkeys(name for row in rows for name in row["models"])
    return [model for model in models if model in found] + [name for name in found if name not in models]


def _lead(data: ReportData) -> str:
    """The result in one or two sentences, built from the numbers alone."""
    judged, gain = data.results.get("judge"), data.results.get("judge_gain")
    if _entry(judged, "rl") == NOT_APPLICABLE:
        return "These are real clips: nobody knows what is on screen, so the judge does not apply. What is left is the flash rate, the curves and your own eyes below."
    steps = [(name, part) for model, name in data.names.items() if model != "rl_unconstrained" and _complete(part := _entry(judged, model))]
    said = ""
    if steps:
        said = "Share of clips with every attribute right, on held-out prompts: " + ", ".join(f"{name} {100 * part['mean']:.0f}\u00a0%" for name, part in steps) + "."
    if isinstance(gain, Mapping) and _complete(gain):
        mean, low, high = (100 * gain[key] for key in ("mean", "low", "high"))
        word = "gained" if low > 0 else ("lost" if high < 0 else "moved, within chance, by")
        size = abs(mean) if word != "moved, within chance, by" else mean
        said += f" {data.names.get('rl', 'RL')} {word} {size:.1f} points against SFT (from {low:+.1f} to {high:+.1f}), paired over the same prompts and noise."
    return said or "Nothing was measured yet."


def _entry(part: Any, model: str) -> Any:
    return part.get(model) if isinstance(part, Mapping) else part


def _complete(value: Any) -> bool:
    return isinstance(value, Mapping) and all(_is_number(value.get(key)) for key in ("mean", "low", "high"))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

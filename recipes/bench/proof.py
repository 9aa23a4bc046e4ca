"""Pools finished demos of several seeds into the table that shows what alignment did, beside what is asked of it.

    rushes demo recipes/configs/tiny/proof.yaml --seed 0 --out runs/proof-0      (and 1, 2)
    rushes bench proof --runs '[runs/proof-0, runs/proof-1, runs/proof-2]' --write

Judge shares, gains and diversity: a prompt's value is its mean over the seeds, intervals are 95 % bootstraps over prompts, gains and the ratio are paired. Flash rates
add up the clips of all seeds (Clopper-Pearson). The reward models of the seeds learned from different people's answers to different prompts, so their intervals are
combined as those of independent numbers. A row's `asked` is what the proof must show, `holds` whether it does.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from base_model.checkpoint import read_json
from base_model.errors import UserError
from recipes.bench._results import Bench, Provenance, Row, command, hardware_text, write
from recipes.demo import NAMES
from recipes.evaluate import read_measured
from recipes.shapes.measure import Measured, numbers
from recipes.shapes.prompts import ShapesPrompt

Interval = Mapping[str, float | None]
UNKNOWN: Interval = {"mean": None, "low": None, "high": None}
GAIN, DIVERSITY, BASE_FLASHING, CLIPS, MINUTES = 0.10, 0.80, 0.10, 1_000, 40
SHARES = ("judge, one object", "judge, two objects", "judge gain", "judge gain, two objects", "flash rate", "reward model")


class Config(Bench):
    """`quick` changes nothing: pooling takes seconds."""

    runs: tuple[Path, ...] = (Path("runs/proof-0"), Path("runs/proof-1"), Path("runs/proof-2"))
    """Folders of finished demos, one a seed."""


class ProofRun(NamedTuple):
    """One seed: the content of its report.json, the judge's readings by model, and when the report was written (seconds since 1970)."""

    folder: Path
    seed: int
    report: Mapping[str, Any]
    measured: Mapping[str, Measured]
    written: float


def read_runs(folders: Sequence[Path]) -> list[ProofRun]:
    """The finished demos, by seed. Raises UserError where one is missing, or where they cannot be pooled."""
    if not folders:
        raise UserError("no runs to pool, runs. Give the folders of finished demos: --runs '[runs/proof-0, runs/proof-1, runs/proof-2]'")
    missing = [str(folder) for folder in folders if not (folder / "report" / "report.json").is_file()]
    if missing:
        raise UserError(f"no finished demo, {', '.join(missing)}. Make one with `rushes demo recipes/configs/tiny/proof.yaml --seed 0 --out {missing[0]}`, or give --runs")
    runs = sorted((_read(folder) for folder in folders), key=lambda run: run.seed)
    seeds = [run.seed for run in runs]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"runs of one seed, {', '.join(str(run.folder) for run in runs)}: seeds {seeds}. Give one run a seed, or its values would count twice")
    settings = [_settings(run.folder) for run in runs]
    for run, models, other in zip(runs[1:], [set(run.measured) for run in runs[1:]], settings[1:], strict=True):
        differ = [key for key in sorted({*settings[0], *other}) if settings[0].get(key) != other.get(key)]
        if models != set(runs[0].measured) or differ:
            what = f"settings {', '.join(differ)}" if differ else f"models {sorted(models ^ set(runs[0].measured))}"
            raise UserError(f"{runs[0].folder} and {run.folder} differ in {what}. Pool runs that differ in their seed only")
    return runs


def _read(folder: Path) -> ProofRun:
    path = folder / "report" / "report.json"
    measured = read_measured(path.parent)
    try:
        report = json.loads(path.read_text())
        seed = int(report["config"]["seed"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read the report {path}: {error!r}. Make it again: remove {path.parent} and repeat `rushes demo`") from error
    if not measured:
        raise UserError(f"{folder} was made from real clips, which the judge cannot read. Give demos of the built-in world")
    return ProofRun(folder, seed, report, measured, path.stat().st_mtime)


def _settings(folder: Path) -> dict[str, Any]:
    """What a demo was told, seed and folder left out; nothing where it left no note."""
    path = folder / "demo.json"
    values = read_json(path, "the settings of the demo") if path.is_file() else {}
    return {key: value for key, value in values.items() if key not in ("seed", "out", "stage")}


# The table


def pool(runs: Sequence[ProofRun]) -> list[Row]:
    """Flat rows: `measure`, `model`, the pooled `mean`, `low`, `high`, counts, `asked`, `holds`, and `seed_<n>`, `seed_<n>_low`, `seed_<n>_high` of each seed."""
    limit = float(runs[0].report.get("flash_limit", 0.02))
    pooled = numbers([run.measured for run in runs], flash_limit=limit)
    seeds = pooled.get("seeds", [pooled])
    rows = [*_judged(pooled, seeds, list(runs[0].measured), limit), *_reward_rows(runs), *_costs(runs)]
    return [_flat(row, [run.seed for run in runs]) for row in rows]


class _Line(NamedTuple):
    """A row before its seeds become columns."""

    measure: str
    model: str | None
    value: Interval
    seeds: Sequence[Interval | str | float | None]
    asked: str | None = None
    holds: bool | None = None
    hits: int | None = None
    clips: int | None = None


def _judged(pooled: Mapping[str, Any], seeds: Sequence[Mapping[str, Any]], models: Sequence[str], limit: float) -> Iterator[_Line]:
    def line(measure: str, model: str | None, *keys: str, asked: str | None = None, check: Callable[[Mapping[str, float]], bool] | None = None) -> _Line:
        value = _at(pooled, keys)
        return _Line(measure, model, value, [_at(seed, keys) for seed in seeds], asked, _check(value, check))

    tuned = {model: key for model, key in {"rl": "", "rl_ddpo": "_ddpo"}.items() if model in models}
    for model in models:
        yield line("judge, one object", model, "judge", model)
    yield line("judge gain", "SFT - base", "judge_gain_sft", asked="low > 0", check=lambda v: v["low"] > 0)
    for model, key in tuned.items():
        gain = f"judge_gain{key}"
        yield line("judge gain", f"{NAMES[model]} - SFT", gain, asked=f"mean >= {GAIN:.2f} and low > 0", check=lambda v: v["mean"] >= GAIN and v["low"] > 0)
    for model in models:
        yield line("judge, two objects", model, "two_objects", model)
    yield line("judge gain, two objects", f"{NAMES['rl']} - SFT", "judge_gain_two_objects")
    for model in models:
        yield line("diversity", model, "diversity", model)
    for model, key in tuned.items():
        yield line("diversity ratio", f"{NAMES[model]} / SFT", f"diversity_ratio{key}", asked=f"mean >= {DIVERSITY:.2f}", check=lambda v: v["mean"] >= DIVERSITY)
    for model in models:
        yield _flashes(pooled, seeds, model, limit)


def _flashes(pooled: Mapping[str, Any], seeds: Sequence[Mapping[str, Any]], model: str, limit: float) -> _Line:
    counted = pooled["flash_counts"][model]
    hits, clips = int(counted["flashing"]), int(counted["clips"])
    asks: dict[str, tuple[str, Callable[[Mapping[str, float]], bool]]] = {
        "base": (f"mean >= {BASE_FLASHING:.2f}", lambda v: v["mean"] >= BASE_FLASHING),
        **dict.fromkeys(("rl", "rl_ddpo"), (f"high <= {limit:g} on at least {CLIPS:,} clips", lambda v: v["high"] <= limit and clips >= CLIPS)),
        "rl_unconstrained": (f"breaks the limit: low > {limit:g}", lambda v: v["low"] > limit),
    }
    asked, check = asks.get(model, (None, None))
    value = _at(pooled, ("flash_rate", model))
    return _Line("flash rate", model, value, [_at(seed, ("flash_rate", model)) for seed in seeds], asked, _check(value, check), hits, clips)


def _reward_rows(runs: Sequence[ProofRun]) -> Iterator[_Line]:
    found = {name: [_at(run.report, ("reward_model", name)) for run in runs] for name in ("accuracy", "floor", "ceiling")}
    pooled = {name: combine(values) for name, values in found.items()}
    top = pooled["floor"]["high"]
    apart = None if top is None else _check(pooled["accuracy"], lambda v: v["low"] > top)
    for name, values in found.items():
        is_accuracy = name == "accuracy"
        yield _Line("reward model", name, pooled[name], values, "low > the floor's high" if is_accuracy else None, apart if is_accuracy else None)


def combine(values: Sequence[Interval]) -> Interval:
    """The mean of independent numbers: distances to the bounds add up in squares. Unknown where one of them is."""
    known = [_known(value) for value in values]
    if not known or any(value is None for value in known):
        return UNKNOWN
    means, lows, highs = zip(*((value["mean"], value["low"], value["high"]) for value in known if value is not None), strict=True)
    mean, n = sum(means) / len(means), len(means)
    below, above = (math.hypot(*(m - bound for m, bound in zip(means, bounds, strict=True))) / n for bounds in (lows, highs))
    return {"mean": mean, "low": mean - below, "high": mean + above}


def _costs(runs: Sequence[ProofRun]) -> Iterator[_Line]:
    minutes = [_number(run.report.get("wall_seconds"), 60) for run in runs]
    memory = [_number(run.report.get("peak_memory_bytes"), 2**30) for run in runs]
    in_time = all(each <= MINUTES for each in minutes if each is not None) if None not in minutes else None
    yield _Line("wall time, minutes", None, _mean(minutes), minutes, f"each <= {MINUTES}", in_time)
    yield _Line("peak memory, GiB", None, _mean(memory), memory)
    texts: dict[str, Callable[[ProofRun], str]] = {
        "commit": lambda run: str(run.report.get("commit", "unknown")),
        "hardware": lambda run: hardware_text(run.report.get("hardware", {})),
        "command": lambda run: "; ".join(run.report.get("commands", [])),
    }
    for name, text in texts.items():
        yield _Line(name, None, UNKNOWN, [text(run) for run in runs])


def _flat(line: _Line, seeds: Sequence[int]) -> Row:
    row: Row = {"measure": line.measure, "model": line.model, **{key: line.value[key] for key in ("mean", "low", "high")}}
    row |= {"hits": line.hits, "clips": line.clips, "asked": line.asked, "holds": line.holds}
    for seed, value in zip(seeds, line.seeds, strict=True):
        parts = value if isinstance(value, Mapping) else {"mean": value}
        row |= {f"seed_{seed}": parts["mean"], f"seed_{seed}_low": parts.get("low"), f"seed_{seed}_high": parts.get("high")}
    return row


def _at(values: Mapping[str, Any], keys: Sequence[str]) -> Interval:
    """The interval at a path of keys; unknown where there is none, or a text that says why not."""
    found: Any = values
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return {key: found.get(key) for key in UNKNOWN} if isinstance(found, Mapping) else UNKNOWN


def _known(value: Interval) -> dict[str, float] | None:
    known = {key: number for key, number in value.items() if number is not None}
    return known if len(known) == len(UNKNOWN) else None


def _check(value: Interval, check: Callable[[Mapping[str, float]], bool] | None) -> bool | None:
    known = _known(value)
    return None if known is None or check is None else check(known)


def _number(value: Any, unit: float) -> float | None:
    return None if value is None else float(value) / unit


def _mean(values: Sequence[float | None]) -> Interval:
    known = [value for value in values if value is not None]
    return {**UNKNOWN, "mean": sum(known) / len(known) if known else None}


# The file of results


def shown(row: Row, seeds: Sequence[int]) -> Row:
    """A row as people read it: shares in percent, intervals in brackets."""
    counted = f" ({row['hits']} of {row['clips']})" if row["clips"] is not None else ""
    share = row["measure"] in SHARES
    return {
        "measure": row["measure"],
        "model": NAMES.get(row["model"], row["model"]),
        "pooled": _text(row["mean"], row["low"], row["high"], share) + counted,
        **{f"seed {seed}": _text(row[f"seed_{seed}"], row[f"seed_{seed}_low"], row[f"seed_{seed}_high"], share) for seed in seeds},
        "asked": row["asked"],
        "holds": row["holds"],
    }


def _kind(prompt: ShapesPrompt) -> str:
    return "strobing" if prompt.strobe else "one" if len(prompt.things) == 1 else "two"


def _text(mean: Any, low: float | None, high: float | None, share: bool) -> str:
    if not isinstance(mean, int | float):
        return "unknown" if mean is None else str(mean)

    def one(value: float) -> str:
        return f"{100 * value:.1f}" if share else f"{value:.3g}"

    return f"{one(mean)}{' %' if share else ''}" + (f" [{one(low)}, {one(high)}]" if low is not None and high is not None else "")


def write_proof(cfg: Config, runs: Sequence[ProofRun], rows: Sequence[Row]) -> Path:
    """The table of all seeds, what does not hold, and where the runs come from."""
    seeds = [run.seed for run in runs]
    numeric = [shown(row, seeds) for row in rows if row["measure"] not in ("commit", "hardware", "command")]
    failed = [f"{row['measure']}{', ' + str(NAMES.get(row['model'], row['model'])) if row['model'] else ''} ({row['asked']})" for row in rows if row["holds"] is False]
    unknown = sum(row["asked"] is not None and row["holds"] is None for row in rows)
    verdict = f"Does not hold: {'; '.join(failed)}." if failed else "Everything that is asked holds." if not unknown else "Nothing that is known fails."
    first = runs[0].report
    counts = Counter(_kind(take.prompt) for take in next(iter(runs[0].measured.values())).takes)
    each = len(next(iter(runs[0].measured.values())).takes[0].right)
    remarks = [
        verdict + (f" {unknown} of the asked cannot be told." if unknown else ""),
        f"{len(runs)} seeds. Each: {counts.total()} held-out prompts ({counts['one']} of one object, {counts['two']} of two, "
        f"{counts['strobing']} that ask for strobing), {each} clips a prompt and model, same prompts, noise and sampler for every model. "
        "All rankings come from simulated labelers. Brackets are 95 % intervals; how they are made is said in [how to read](../README.md#how-to-read-the-proof).",
    ]
    source = Provenance(
        cfg.date or time.strftime("%Y-%m", time.gmtime(max(run.written for run in runs))),
        [*(f"{'; '.join(run.report.get('commands', ['rushes demo']))} --out runs/proof-{run.seed}" for run in runs), command("proof", cfg)],
        ", ".join(dict.fromkeys(str(run.report.get("commit", "unknown")) for run in runs)),
        first.get("versions", {}),
        first.get("hardware", {}),
    )
    return write(cfg, "proof", source, "What alignment did: base, SFT, RL", {"Measured": numeric}, remarks=remarks)


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    """`resume` changes nothing: runs are pooled anew."""
    runs = read_runs(cfg.runs)
    rows = pool(runs)
    if cfg.write:
        write_proof(cfg, runs, rows)
    return {"rows": rows}

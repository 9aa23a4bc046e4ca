"""What every benchmark shares: its configuration, the clock, and the file of results."""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from align.config import Config, commit, dump, leaves, versions
from base_model.checkpoint import check_can_write
from base_model.errors import UserError
from base_model.video.files import write_atomic
from recipes.doctor import hardware

RESULTS = Path(__file__).parent / "results"
WIDEST = 15  # columns of a table that is still easy to read
Row = dict[str, Any]


class Bench(Config):
    """What every benchmark is told. A benchmark adds its own keys."""

    quick: bool = False
    """Less of everything: about a minute on two cores."""
    write: bool = False
    """Also writes the table into `results`, as <date>_<hardware>_<name>.md."""
    results: Path = RESULTS
    """Folder of result files."""
    date: str = ""
    """Year and month in the file's name, 2026-11; empty means when it was measured."""


class Spread(NamedTuple):
    """Median, smallest and largest of several repeats."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def paired_ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """`above` / `below` of each repeat: both were measured right after each other, so that a busy machine slows both."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


@contextmanager
def place(cfg: Bench, out: Path) -> Iterator[Path]:
    """Where a benchmark works: `out`, and what is finished there is not repeated. The quick form keeps nothing."""
    if not cfg.quick:
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="rushes-bench-") as folder:
        yield Path(folder)


T = TypeVar("T")


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """What `work` returns, and its seconds."""
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


def command(name: str, cfg: Bench) -> str:
    """The command line that makes this configuration out of the defaults; where and whether results are written is left out."""
    defaults = leaves(dump(type(cfg)()))
    changed = {key: value for key, value in leaves(dump(cfg)).items() if value != defaults.get(key) and key not in ("write", "results", "date")}
    words = [f" --{key}" if value is True else f" --{key} {shlex.quote(value if isinstance(value, str) else json.dumps(value))}" for key, value in changed.items()]
    return f"rushes bench {name}{''.join(words)}"


def columns(name: str, found: Iterable[float | None] | None) -> Row:
    """A value, its lower and its upper end as three columns; null where nothing was found."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), (None,) * 3 if found is None else found, strict=True))


def in_brackets(rows: Sequence[Row]) -> list[Row]:
    """For the file: a value and its ends in one cell."""

    def cell(row: Row, name: str) -> Any:
        known = row[name] is not None and row.get(f"{name}_low") is not None
        return f"{row[name]:.3g} [{row[f'{name}_low']:.3g}, {row[f'{name}_high']:.3g}]" if known else row[name]

    return [{name: cell(row, name) for name in row if not name.endswith(("_low", "_high"))} for row in rows]


def flat(parts: dict[str, list[Row]]) -> list[Row]:
    """All rows with all columns; what does not apply is null."""
    columns = list(dict.fromkeys(key for rows in parts.values() for row in rows for key in row))
    return [{"part": part, **{column: row.get(column) for column in columns}} for part, rows in parts.items() for row in rows]


# The file of results


def check_can_end(cfg: Bench, *, out: Path | None = None, sheet: Path | None = None) -> None:
    """Raises UserError where what is found could not be written into `results`, the folder `out` or the picture `sheet`: before the work, not after it.

    A measurement begins here: what an earlier one read is forgotten, and the commit of this process is noted."""
    _read.clear()
    _commit()
    if cfg.write:
        _check_date(cfg.date or _today())
        _check_place(cfg)
        check_can_write(cfg.results, "--results")
    if out is not None:
        check_can_write(out)
    if sheet is not None:
        if sheet.is_dir():
            raise UserError(f"cannot write {sheet}: it is a folder. Give --sheet FILE.png")
        check_can_write(sheet.parent, "--sheet")


def _today() -> str:
    return time.strftime("%Y-%m")


def _check_date(date: str) -> None:
    if not re.fullmatch(r"\d{4}-\d{2}", date):
        raise UserError(f"date: expected a year and a month as in 2026-11, got {date!r}. Give --date YYYY-MM")


def _check_place(cfg: Bench) -> None:
    if cfg.quick and cfg.results.resolve() == RESULTS.resolve():
        raise UserError("the quick form would take the place of a table that was measured, results. Leave out --quick, or give --results FOLDER")


class Provenance(NamedTuple):
    """Where numbers come from."""

    date: str  # year and month
    commands: Sequence[str]
    commit: str
    versions: Mapping[str, str]
    hardware: Mapping[str, Any]


class Maker(NamedTuple):
    """The code that measured, and on how many threads; "unknown" where nobody noted it."""

    commit: str
    threads: str


_read: list[Maker] = []
"""Who made what this measurement read instead of making it."""
_commit = functools.cache(commit)  # files may change while a process works with what it loaded


def maker() -> Maker:
    """This process."""
    import torch

    return Maker(_commit(), str(torch.get_num_threads()))


def note_read(by: Maker) -> None:
    """What is written next holds numbers that were made earlier."""
    _read.append(by)


def here(name: str, cfg: Bench) -> Provenance:
    """This process, on this machine, now; and the commits and threads of what it read of earlier ones."""
    makers = [*_read, maker()]
    commits, threads = (", ".join(dict.fromkeys(each)) for each in zip(*makers, strict=True))
    return Provenance(cfg.date or _today(), [command(name, cfg)], commits, versions(), {**hardware(), "threads": threads})


def real_clips(given: Path | None) -> Path | None:
    """The folder of real clips: the one that is given, else `clips` in the folder that RUSHES_REAL_DATA names, else none."""
    data = os.environ.get("RUSHES_REAL_DATA")
    return given or (Path(data) / "clips" if data else None)


def told_of_real(given: Path | None) -> str:
    """Which real clips a measurement had: where they lie stands in no command."""
    return f"Real clips: {'those that were given' if given else 'those of RUSHES_REAL_DATA' if real_clips(None) else 'none'}."


def write(cfg: Bench, name: str, source: Provenance, title: str, sections: Mapping[str, Sequence[Row]], *, remarks: Sequence[str] = ()) -> Path:
    """Writes the Markdown of one measurement and names it on standard error; returns it. An older file of that name is replaced.

    sections: heading -> rows of one table. Raises UserError where the folder cannot be written, the date is no year and month, or a quick form would replace a published table.
    """
    _check_date(source.date)
    _check_place(cfg)
    parts = [f"# {title}", *remarks]
    for heading, rows in sections.items():
        parts += [f"## {heading}", table(rows)]
    parts += ["## Where the numbers come from", "```text\n" + "\n".join(source.commands) + "\n```", table(_facts(source))]
    try:
        cfg.results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write results, {cfg.results}: {error.strerror}. Give another --results") from error
    path = cfg.results / f"{source.date}_{hardware_name(source.hardware)}_{name}.md"
    write_atomic(path, ("\n\n".join(parts) + "\n").encode())
    print(f"wrote {path}", file=sys.stderr)
    return path


def hardware_name(found: Mapping[str, Any]) -> str:
    """Hardware in a file's name: "2-core-cpu", or the GPUs, "1x-nvidia-h200"."""
    gpus = found.get("gpus") or []
    return f"{len(gpus)}x-" + re.sub(r"[^a-z0-9]+", "-", str(gpus[0]).lower()).strip("-") if gpus else f"{found.get('cores', 'unknown')}-core-cpu"


def hardware_text(found: Mapping[str, Any]) -> str:
    """Hardware in a sentence."""
    parts = [str(found.get("processor", "unknown processor")), f"{found.get('cores')} cores", f"{found.get('threads')} threads"]
    if found.get("memory_bytes"):
        parts.append(f"{found['memory_bytes'] / 2**30:.0f} GiB")
    return ", ".join([*parts, *(str(gpu) for gpu in found.get("gpus") or ["no GPU"])])


def _facts(source: Provenance) -> list[Row]:
    facts = {"date": source.date, "commit": source.commit, "hardware": hardware_text(source.hardware), "system": source.hardware.get("system", platform.platform())}
    return [{"what": name, "value": value} for name, value in facts.items()] + [{"what": name, "value": value} for name, value in source.versions.items()]


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table; columns in which nothing is known are left out, and a row need not have all of them. Their order is that of the longest row.

    A few rows of many columns are turned on their side."""
    if not rows:
        return "Nothing was measured."
    every = dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row)
    names = [name for name in every if any(row.get(name) is not None for row in rows)]
    lines = [[name.replace("_", " ") for name in names], *([_cell(row.get(name)) for name in names] for row in rows)]
    if len(names) > WIDEST and len(rows) <= 3:
        lines = [list(column) for column in zip(*lines, strict=True)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")

"""What is fast here, and beside what: the benchmarks of speed, each in a process of its own, one after another, and one table of their ratios (`rushes bench all`).

Every ratio is the benchmark's own, a median of paired repeats with the smallest and the largest one, turned so that above 1 ours is faster or needs less. What fails has a row with
the reason, and the others go on. What each said lies in `out`: `--resume` asks only what is missing there, of this commit, these settings and as many threads. With `--against` a
table that was written before, every ratio says whether it holds.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from align.config import commit
from align.progress import Progress
from base_model.errors import UserError
from base_model.video.files import disk_errors, write_atomic
from recipes.bench import _profile
from recipes.bench._results import Bench, Maker, Row, Spread, check_can_end, flat, here, maker, note_read, write
from recipes.charts import Whisker, alone, ratio_chart

Name = Literal["sampler", "sft", "ddpo-trl", "phases", "packing", "packing-wan", "score", "loader", "app"]
NOISE = 1.1
"""Of one run beside another: ratios whose ranges are at most this factor apart are the same."""
ENDS = ("ratio", "low", "high")
COLUMNS = ("bench", "what", "ours", "peer", "ratio", "low", "high", "error")
COLOURS = {"faster": "#2f6fb3", "slower": "#c2410c", "even": "#8a6a3d"}


class Config(Bench):
    out: Path = Path("runs/bench-all")
    """Folder of what each benchmark found and said."""
    only: tuple[Name, ...] = ()
    """Benchmarks to run; none means all."""
    profile: bool = False
    """Also names the three largest costs of a repeat of ours, for each."""
    against: Path | None = None
    """Table of an earlier run, as `--write` makes it: does each of its ratios hold?"""
    trl: Path | None = None
    """Python of an environment that has trl 0.23; none means the one that `rushes bench ddpo-trl` makes."""
    readers: Path | None = None
    """Python of an environment that has imageio and torchcodec; none means the one that `rushes bench loader` makes."""
    label_studio: Path | None = None
    """Python of an environment that has Label Studio; none means the one that `rushes bench app` makes."""


class Part(NamedTuple):
    """A benchmark as it is run here, and what it says of ours and of peers."""

    bench: str
    compared: Callable[[Sequence[Row]], Iterator[Row]]
    words: tuple[str, ...] = ()
    python: str = ""  # the key of `Config` with the environment of its peer


# What each benchmark says: `what`, `ours`, `peer`, `ratio`, `low`, `high`


def _row(what: str, ours: float | None, peer: float | None = None, ratio: Sequence[float | None] = (None,) * 3, error: str | None = None) -> Row:
    """One repeat has no interval."""
    median, low, high = ratio
    return dict(zip(COLUMNS[1:], (what, ours, peer, median, *((None, None) if low == high else (low, high)), error), strict=True))


def _ratio(row: Row, name: str, *, turned: bool = False) -> list[float | None]:
    """The median, the smallest and the largest that stand in a row as `name`, `name_low` and `name_high`; turned: 1 over them."""
    found = [row.get(key) for key in (name, f"{name}_low", f"{name}_high")]
    return [value and 1 / value for value in (found[0], found[2], found[1])] if turned else found


def sampler_rows(rows: Sequence[Row]) -> Iterator[Row]:
    ours = {row["part"]: row["seconds"] for row in rows if row["name"] == "ours"}
    for row in rows:
        if row["name"] != "ours":
            yield _row(f"{row['part']}, seconds, beside {row['name']}", ours[row["part"]], row["seconds"], _slower(row, "times_slower_than_ours"))


def _slower(row: Row, name: str) -> list[float | None]:
    return [row[key] for key in (name, "times_slower_low", "times_slower_high")]


def sft_rows(rows: Sequence[Row]) -> Iterator[Row]:
    for row in rows:
        if row["ratio"] is not None:
            yield _row(f"{row['what']}, beside {row['peer_is']}", row["ours"], row["peer"], _ratio(row, "ratio"))


def ddpo_rows(rows: Sequence[Row]) -> Iterator[Row]:
    peer = {(row["train"], row["guidance"]): row for row in rows if row["arm"] == "trl"}
    for row in rows:
        if row["arm"] != "trl":
            theirs = peer[row["train"], row["guidance"]]
            where = f"{row['train']}, guidance {row['guidance']:g}{row['arm'].removeprefix('ours')}"
            yield _row(f"{where}: seconds an epoch, beside trl", row["seconds"], theirs["seconds"], _ratio(row, "times_faster"))
            yield _row(f"{where}: CPU seconds an epoch, beside trl", row["cpu_seconds"], theirs["cpu_seconds"], _ratio(row, "times_less_cpu"))


def phases_rows(rows: Sequence[Row]) -> Iterator[Row]:
    """No peer makes an update like ours with decoding, reward and filters."""
    for row in rows:
        yield _row(f"{row['recipe']}: seconds a clip of an update", row["seconds_per_clip"])
        yield _row(f"{row['recipe']}: forward-equivalents a clip", row["forward_equivalents_per_clip"])


def packing_rows(rows: Sequence[Row]) -> Iterator[Row]:
    """Other schemes beside our packs: seconds of a token that is trained on; of a step through Wan."""
    name, unit = ("seconds_per_useful_token", "a useful token") if "seconds_per_useful_token" in rows[0] else ("seconds_per_step", "a step of Wan")
    (ours,) = [row[name] for row in rows if row["times_slower_than_packs"] is None]
    for row in rows:
        if row["times_slower_than_packs"] is not None:
            yield _row(f"seconds {unit}, beside {row['scheme']}", ours, row[name], _slower(row, "times_slower_than_packs"))


def score_rows(rows: Sequence[Row]) -> Iterator[Row]:
    ours = {row["scorer"]: row["seconds"] for row in rows if row["name"] == "ours"}
    for row in rows:
        if row["name"] != "ours":
            yield _row(f"{row['scorer']}, seconds, beside {row['name']}", ours[row["scorer"]], row["seconds"], _slower(row, "times_slower_than_ours"))


def loader_rows(rows: Sequence[Row]) -> Iterator[Row]:
    ours = {row["part"]: row["seconds"] for row in rows if row["name"] in ("ours", "shards")}
    for row in rows:
        if not row["name"].startswith(("ours", "shards")):
            yield _row(f"{row['part']}, seconds, beside {row['name']}", ours[row["part"]], row["seconds"], _ratio(row, "times_faster"), row.get("note"))


def app_rows(rows: Sequence[Row]) -> Iterator[Row]:
    """The bench's ratio is ours over the peer's."""
    for row in rows:
        if row["part"] == "labelers":
            where = f"{row['store']}, {row['labelers']} labelers{'' if row['think_s'] else ' who do not think'}"
            yield from (_row(f"{where}: {what.replace('_', ' ')}, p95 ms", row[f"{what}_p95_ms"]) for what in ("next_task", "submit"))
        else:
            yield _row(f"{row['what']}, ms, beside Label Studio", row["ours"], row["peer"], _ratio(row, "ratio", turned=True))


PARTS: dict[Name, Part] = {
    "sampler": Part("sampler", sampler_rows),
    "sft": Part("sft", sft_rows),
    "ddpo-trl": Part("ddpo-trl", ddpo_rows, python="trl"),
    "phases": Part("phases", phases_rows),
    "packing": Part("packing", packing_rows),
    "packing-wan": Part("packing", packing_rows, ("--wan",)),
    "score": Part("score", score_rows),
    "loader": Part("loader", loader_rows, python="readers"),
    "app": Part("app", app_rows, python="label_studio"),
}


# Beside an earlier run


def ratios_of(table: Path) -> dict[tuple[str, str], Spread]:
    """(bench, what) -> the ratio in a file that `write` made, and its ends, which are the ratio itself where one repeat has none. Raises UserError for a file without ratios."""
    advice = "Give --against FILE, a table that rushes bench all --write made"
    try:
        lines = table.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {table}: {error}. {advice}") from None
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]] for line in lines if line.startswith("|")]
    heads = [number for number, row in enumerate(cells) if {"bench", "what", "ratio"} <= set(row)]
    if not heads:
        raise UserError(f"{table} has no ratios. {advice}")
    head = cells[heads[0]]
    rows = [row for each in cells[heads[0] + 2 :] if len(each) == len(head) and (row := dict(zip(head, each, strict=True)))["ratio"]]
    try:
        found = {(row["bench"], row["what"].replace("\\|", "|")): [float((row.get(name) or row["ratio"]).replace(",", "")) for name in ENDS] for row in rows}
    except ValueError as error:
        raise UserError(f"{table} has a ratio that is no number: {error}. {advice}") from None
    return {key: Spread(*ratio) for key, ratio in found.items()}


def verdict(ratio: Spread) -> str | None:
    """What an interval tells; one repeat has none."""
    if ratio.low == ratio.high:
        return None
    return "ahead" if ratio.low > 1 else "behind" if ratio.high < 1 else "cannot be told"


def held(row: Row, then: Mapping[tuple[str, str], Spread]) -> Row:
    """`then`: the earlier ratio. `holds`: whether both ranges touch, or are at most `NOISE` apart. `verdict_then`, `verdict`: what both tell. Null where there is none."""
    earlier, ratio = then.get((row["bench"], row["what"])), row["ratio"]
    if earlier is None or ratio is None:
        return {**row, "then": earlier and earlier.median, "holds": None, "verdict_then": None, "verdict": None}
    now = Spread(ratio, row["low"] or ratio, row["high"] or ratio)
    near = max(now.low, earlier.low) <= NOISE * min(now.high, earlier.high)
    return {**row, "then": earlier.median, "holds": near, "verdict_then": verdict(earlier), "verdict": verdict(now)}


# Processes


def words_of(cfg: Config, part: Part) -> list[str]:
    python = getattr(cfg, part.python) if part.python else None
    return [*part.words, *(["--quick"] if cfg.quick else []), *(["--python", str(python)] if python else [])]


def asked(words: Sequence[str], log: Path) -> list[Row]:
    """The rows that a process says on standard output; it ends where this one is interrupted. Raises UserError with its reason where it says none."""
    with disk_errors(log), open(log, "w") as errors:
        process = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL, text=True)
    with process:
        try:
            told, _ = process.communicate()
        except BaseException:
            process.terminate()
            raise
    try:
        found: Mapping[str, Any] = json.loads(told.strip().rpartition("\n")[2])
    except ValueError:
        found = {}
    if "rows" not in found:
        said = [line for line in log.read_text().splitlines() if line.strip()] or ["it said nothing"]
        reason = found["error"]["message"] if "error" in found else f"it ended with {process.returncode}: {said[-1].strip()}"
        raise UserError(f"{' '.join(reason.split())} ({log})")
    if "commit" in found:
        note_read(Maker(found["commit"], maker().threads))
    return list(found["rows"])


def kept(file: Path, settings: Mapping[str, object], make: Callable[[], list[Row]], *, resume: bool) -> list[Row]:
    """What `make` gives, written to `file`; read from there instead where that is wanted and it was made by the same settings."""
    if resume and file.exists():
        try:
            content = json.loads(file.read_text())
        except ValueError:
            content = {}
        if content.get("settings") == settings and "+changes" not in str(settings["commit"]):
            return list(content["rows"])
    rows = make()
    with disk_errors(file):
        write_atomic(file, (json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n").encode())
    return rows


def measure(cfg: Config, *, resume: bool) -> dict[str, list[Row]]:
    """`beside`: one row a comparison, or a failure. `costs`: the largest of each, where they are asked for."""
    names = [name for name in PARTS if not cfg.only or name in cfg.only]
    then = ratios_of(cfg.against) if cfg.against else {}
    found: dict[str, list[Row]] = {"beside": [], **({"costs": []} if cfg.profile else {})}
    with Progress("all", total=len(names) * len(found)) as progress:
        for name in names:
            part, words = PARTS[name], words_of(cfg, PARTS[name])
            runs = {"beside": ["-m", "recipes.cli", "bench", part.bench, "--json", *words], "costs": ["-m", _profile.__name__, part.bench, *words]}
            for kind in found:
                file = cfg.out / (f"{name}.json" if kind == "beside" else f"{name}-{kind}.json")
                settings = {"words": runs[kind], "commit": commit(), "threads": maker().threads}
                try:
                    rows = kept(file, settings, partial(asked, runs[kind], file.with_suffix(".log")), resume=resume)
                    told = list(part.compared(rows)) if kind == "beside" else [{**row, "error": None} for row in rows]
                except UserError as error:
                    empty = _row("failed", None) if kind == "beside" else {"cost": "failed", "share": None}
                    told = [{**empty, "error": str(error)}]
                named = [{"bench": name, **row} for row in told]
                found[kind] += [held(row, then) for row in named] if then and kind == "beside" else named
                progress.advance(f"{name} {'' if kind == 'beside' else kind}".strip())
    return found


# The page


def chart(rows: Sequence[Row]) -> str:
    """Every ratio on one axis, grouped by benchmark."""
    groups: dict[str, list[Whisker]] = {}
    for row in rows:
        if row["ratio"]:
            low, high = row["low"] or row["ratio"], row["high"] or row["ratio"]
            groups.setdefault(row["bench"], []).append(Whisker(row["what"], "faster" if low > 1 else "slower" if high < 1 else "even", row["ratio"], low, high))
    return alone(ratio_chart(list(groups.items()), name="Peer over ours: right of the line ours is faster or needs less"), COLOURS)


def _beside_then(row: Row) -> str:
    return f"{row['bench']}: {row['what']} ({row['ratio']:.2f}, then {row['then']:.2f})"


def remarks(rows: Sequence[Row]) -> list[str]:
    """What does not hold first."""
    ratios = [row for row in rows if row["ratio"]]
    sure = [row for row in ratios if row["low"]]
    slower = [f"{row['bench']}: {row['what']} ({row['ratio']:.2f})" for row in ratios if (row["high"] or row["ratio"]) < 1]
    failed = [f"{row['bench']}: {row['error']}" for row in rows if row["error"]]
    faster = sum(row["low"] > 1 for row in sure)
    again = [row for row in rows if row.get("holds") is not None]
    moved = [_beside_then(row) for row in again if not row["holds"]]
    turned = [f"{_beside_then(row)}: {row['verdict']}, then {row['verdict_then']}" for row in again if None is not row["verdict"] != row["verdict_then"] is not None]
    return [
        *([f"Slower, or needs more: {'; '.join(slower)}."] if slower else []),
        *([f"Not measured: {'; '.join(failed)}."] if failed else []),
        f"Of {len(sure)} ratios with an interval ours is surely ahead in {faster}, surely behind in {sum(row['high'] < 1 for row in sure)}. Above 1: ours is faster or needs less.",
        *([f"Beside an earlier run {len(again) - len(moved)} of {len(again)} ratios hold{': all but ' + '; '.join(moved) if moved else ''}."] if again else []),
        *([f"What can be told is another in {len(turned)}: {'; '.join(turned)}."] if turned else []),
    ]


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    """With `resume` what is in `out` and was made by this commit and these settings is not measured again."""
    check_can_end(cfg, out=cfg.out)
    cfg.out.mkdir(parents=True, exist_ok=True)
    found = measure(cfg, resume=resume)
    if cfg.write:
        drawn = any(row["ratio"] for row in found["beside"])
        headings = {"beside": "Ours and its peers", "costs": "The largest costs of a repeat of ours, on one thread"}
        picture = ["![Ratios](all.svg)"] if drawn else []
        write(cfg, "all", here("all", cfg), "Speed", {headings[kind]: rows for kind, rows in found.items()}, remarks=[*remarks(found["beside"]), *picture])
        if drawn:
            write_atomic(cfg.results / "all.svg", chart(found["beside"]).encode())
            print(f"wrote {cfg.results / 'all.svg'}", file=sys.stderr)
    return {"rows": flat(found)}

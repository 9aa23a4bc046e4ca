"""What people said, for training and for other tools: under pseudonyms, without what was taken back, and without clips that nobody should see or learn from.

    parquet          the folder of `reward/comparisons.py`, which `rushes reward-model` learns from (over HTTP a ZIP of it)
    jsonl            an answer to one question a line, with its prompt
    videoalign, label-studio, trl    as other tools read them (`reward/importers/`)
    demonstrations   what people found worth imitating: prompt and clip, one a line; with the clips' records, the pairs that `rushes sft` learns from

Names, logins and what people wrote in their own words are in none of them; the one exception is a caption that somebody corrected for being learned from. Cells of a table that
a spreadsheet would run as a formula begin with an apostrophe.
"""

from __future__ import annotations

import csv
import hashlib
import importlib
import io
import json
import tempfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from sqlalchemy import select

from base_model.errors import UserError
from reward.app.labeling import answer_of
from reward.app.log import canonical
from reward.app.schema import clip, prompt
from reward.app.store import Store

if TYPE_CHECKING:
    from reward.comparisons import Annotator, Clip, Comparisons, Prompt, RankingEvent

Format = Literal["parquet", "jsonl", "videoalign", "label-studio", "trl", "demonstrations"]
FORMATS: tuple[Format, ...] = get_args(Format)
NAMES: dict[Format, str] = {
    "parquet": "rankings.zip",
    "jsonl": "rankings.jsonl",
    "videoalign": "videoalign.csv",
    "label-studio": "label-studio.json",
    "trl": "trl.jsonl",
    "demonstrations": "demonstrations.jsonl",
}
"""What a file of each format is called."""
POOL = "people"
Shares = tuple[float, float, float]
SHARES: Shares = (0.6, 0.15, 0.25)
FORMULA = ("=", "+", "-", "@", "\t", "\r", "＝", "＋", "－", "＠")
LONGEST_CELL = 1 << 30
EARLIEST = (1980, 1, 1, 0, 0, 0)  # the time of every file in a ZIP: what is the same is the same to the byte


@dataclass(frozen=True)
class Written:
    """What was written. rows: answers to one question, tasks or pairs, as the format has them. left_out: why -> how many answers."""

    path: Path
    rows: int
    answers: int
    sha256: str
    left_out: Mapping[str, int]


# What people said


def labeling() -> Any:
    """The labelers' room, which knows what was answered."""
    return importlib.import_module("reward.app.labeling")


def told_by(store: Store, project_id: str) -> list[RankingEvent]:
    """Every answer that stands, of tasks whose clips may all be used."""
    from reward.comparisons import RankingEvent

    rows: Iterable[Any] = labeling().events_of(store, project_id)
    return [row if isinstance(row, RankingEvent) else RankingEvent.of(row) for row in rows]


def demonstrated(store: Store, project_id: str) -> list[tuple[str, str]]:
    """(prompt or corrected caption, clip) of every demonstration that stands."""
    found: list[tuple[str, str]] = labeling().demonstrations_of(store, project_id)
    return found


def collected(store: Store, project_id: str, folder: Path, *, dimension: str | None = None, gold: bool = False, shares: Shares = SHARES) -> Comparisons:
    """Writes the answers of a project into a folder of rankings, and returns it; answers that are there are kept, and added to.

    gold: also answers to gold tasks, whose planted clips are in no clip store; reliability counts them either way. shares: of prompts to learn from, to calibrate and to test on.
    Raises UserError where there is no answer.
    """
    from reward.comparisons import write_comparisons

    said = told_by(store, project_id)
    clips, prompts = _usable(store, project_id)
    standing = [event for event in said if event.clip_ids and all(clip_id in clips for clip_id in event.clip_ids)]
    wanted = [event for event in standing if dimension in (None, event.dimension) and (gold or not event.is_gold)]
    if not wanted:
        there = ", ".join(sorted({event.dimension for event in standing if gold or not event.is_gold})) or "none"
        raise UserError(f"no answers{f' in the dimension {dimension}' if dimension else ''} to export, --project. Dimensions with answers: {there}")
    asked = dict.fromkeys(clip_id for event in wanted for clip_id in event.clip_ids)
    about = dict.fromkeys(clips[clip_id].prompt_id for clip_id in asked)
    people = _people(standing, wanted)
    return write_comparisons(folder, wanted, clips=[clips[each] for each in asked], prompts=[prompts[each] for each in about], annotators=people, shares=shares)


def _usable(store: Store, project_id: str) -> tuple[dict[str, Clip], dict[str, Prompt]]:
    """Clips that are live, and prompts, by id."""
    from reward.comparisons import Clip, Prompt

    known = {field.name for field in fields(Clip)}
    with store.reading() as db:
        rows = db.execute(select(clip).where(clip.c.project_id == project_id, clip.c.state == "live")).all()
        texts = db.execute(select(prompt).where(prompt.c.project_id == project_id)).all()
    clips = {
        row.clip_id: Clip(
            **{
                **{"path": "", **{name: value for name, value in row.row.items() if name in known and value is not None}},
                "clip_id": row.clip_id,
                "prompt_id": row.prompt_id,
                "safety_json": canonical(row.decision),
            }
        )
        for row in rows
    }
    return clips, {row.prompt_id: Prompt(row.prompt_id, row.text, row.lang, category=row.kind) for row in texts}


def _answers(data: Comparisons) -> int:
    """However many questions each of them answers."""
    return len({answer_of(event) for event in data.events})


def _people(standing: Sequence[RankingEvent], wanted: Sequence[RankingEvent]) -> list[Annotator]:
    """Pseudonyms of who answered. reliability: share of the gold questions answered right; None where there was none."""
    from reward.comparisons import Annotator

    checks: dict[str, list[bool]] = defaultdict(list)
    for event in standing:
        if event.is_gold and event.gold_ok is not None:
            checks[event.annotator_id].append(event.gold_ok)
    counts = Counter(event.annotator_id for event in wanted)
    return [Annotator(name, POOL, reliability=sum(checks[name]) / len(checks[name]) if checks[name] else None, n_events=n) for name, n in sorted(counts.items())]


# As files


def export(store: Store, project_id: str, kind: Format, folder: Path, *, by: str, dimension: str | None = None, gold: bool = False) -> Written:
    """Writes one file of that format into the folder, over an earlier one, and logs who took what. by: a pseudonym.

    Raises UserError where there is nothing to export, or the format has no room for it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAMES[kind]
    left_out: Mapping[str, int] = {}
    if kind == "demonstrations":
        told = _demonstrations(store, project_id)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in told), encoding="utf-8")
        rows = answers = len(told)
    else:
        with tempfile.TemporaryDirectory(prefix="rushes-rankings-") as rankings:
            data = collected(store, project_id, Path(rankings), dimension=dimension, gold=gold)
            rows, left_out = _write(data, kind, Path(rankings), path)
        answers = _answers(data)
    written = Written(path, rows, answers, _digest(path), left_out)
    log_export(store, project_id, kind, written.sha256, written.answers, by)
    return written


def log_export(store: Store, project_id: str, kind: str, digest: str, answers: int, by: str) -> None:
    """Writes down what was given out."""
    with store.writing() as db:
        store.log(db, by, "exported", project_id, {"format": kind, "sha256": digest, "answers": answers})


def _write(data: Comparisons, kind: Format, rankings: Path, path: Path) -> tuple[int, Mapping[str, int]]:
    from reward.importers.formats import FORMATS as PUBLIC

    if kind == "parquet":
        _zip(rankings, path)
        return len(data.events), {}
    if kind == "jsonl":
        lines = (json.dumps({"prompt": data.prompts[event.prompt_id].text, **asdict(event)}, ensure_ascii=False, allow_nan=False) for event in data.events)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return len(data.events), {}
    write = PUBLIC[kind].write
    assert write is not None
    exported = write(data, path)
    if path.suffix == ".csv":
        path.write_text(without_formulas(path.read_text(encoding="utf-8")), encoding="utf-8", newline="")
    return exported.rows, dict(exported.left_out)


def _demonstrations(store: Store, project_id: str) -> list[dict[str, str]]:
    clips, _ = _usable(store, project_id)
    rows = [{"text": text, "clip_id": clip_id, "file_name": clips[clip_id].path} for text, clip_id in demonstrated(store, project_id) if clip_id in clips]
    if not rows:
        raise UserError("no demonstrations to export, --project. People accept clips in tasks of that kind")
    return rows


def without_formulas(text: str) -> str:
    """A CSV whose cells no spreadsheet takes for formulas: an apostrophe before what begins like one, numbers excepted."""
    csv.field_size_limit(LONGEST_CELL)
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerows([f"'{cell}" if cell.startswith(FORMULA) and not _is_number(cell) else cell for cell in row] for row in csv.reader(io.StringIO(text, newline="")))
    return out.getvalue()


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return not cell.startswith(("\t", "\r"))


def _zip(folder: Path, path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for each in sorted(folder.glob("*.parquet")):
            file.writestr(zipfile.ZipInfo(f"rankings/{each.name}", EARLIEST), each.read_bytes())


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# For training


def export_rankings(store: Store, project_id: str, folder: Path, *, by: str, dimension: str | None = None, gold: bool = False, shares: Shares = SHARES) -> Written:
    """Writes, or adds to, a folder of rankings, and logs it. Raises as `collected`."""
    data = collected(store, project_id, folder, dimension=dimension, gold=gold, shares=shares)
    digest = hashlib.sha256("".join(f"{_digest(file)} {file.name}\n" for file in sorted(folder.glob("*.parquet"))).encode()).hexdigest()
    written = Written(folder, len(data.events), _answers(data), digest, {})
    log_export(store, project_id, "parquet", digest, written.answers, by)
    return written


def export_pairs(store: Store, project_id: str, *, by: str) -> list[tuple[str, str]]:
    """(text, clip) of every demonstration whose clip may be used, logged as given out. Raises UserError where there is none."""
    rows = _demonstrations(store, project_id)
    pairs = [(row["text"], row["clip_id"]) for row in rows]
    log_export(store, project_id, "demonstrations", hashlib.sha256(canonical(pairs).encode()).hexdigest(), len(pairs), by)
    return pairs

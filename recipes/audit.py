"""Clips that people look at to find out how good the safety filters are on them (`rushes audit FOLDER`), and what they said.

`--clips STORE` draws a wave among the clips of a store that this audit does not know yet, some of what was blocked and some of what passed (`reward/safety/audit.py` says how),
and writes `wave-N.csv` with the drawn ones in an order that tells nothing of why. A reader fills in `said` (violating, not_violating, borderline, cannot_tell) and, where a clip
violates, `policies` (codes with a semicolon between them); `--answers FILE --reader NAME` takes that in. `rushes safety-report FOLDER` says what was found, and
`--safety.audit FOLDER` holds a limit by it. An audit is of one policy: for the next one generate clips with it, draw another wave and have that read.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from align.config import Config as BaseConfig
from align.config import Count, Seed
from base_model.checkpoint import atomic_write, check_can_write
from base_model.errors import UserError
from base_model.video.store import ClipRow, ClipStore
from recipes.generate import network_lineage
from reward.safety.audit import Candidate, Plan, Reading, add_readings, candidate_of, draw_audit, load_audit
from reward.safety.policy import load_policy

COLUMNS = ("clip_id", "file", "said", "policies")


class Config(BaseConfig):
    folder: Path | None = None
    """Folder of the audit, made where it is missing."""
    clips: Path | None = None
    """Clip store to draw from: `clips.jsonl` and the folder beside it."""
    network: Path | None = None
    """Only clips that this network made; none means all of the store."""
    blocked: Count = 100
    """Clips to look at of those that were blocked."""
    passed: Count = 300
    """Clips to look at of those that passed."""
    seed: Seed = 0
    """Who is drawn depends on this and on the clip alone."""
    answers: Path | None = None
    """A wave's table with what one reader said."""
    reader: str = ""
    """Pseudonym of who filled in `answers`."""


# A wave


def candidates_of(rows: list[ClipRow]) -> list[Candidate]:
    """The clips that the filters decided about by themselves, each once."""
    found = (candidate_of(row.clip_id, json.loads(row.safety_json)) for row in rows)
    return list({each.clip_id: each for each in found if each is not None}.values())


def draw_wave(cfg: Config, folder: Path, store: Path) -> dict[str, Any]:
    """Draws, and writes what is to be looked at."""
    if not (store / "clips.jsonl").is_file():
        raise UserError(f"no clips, {store}: it holds no clips.jsonl. Give a folder that `rushes generate` made")
    if cfg.network is not None and not cfg.network.is_file():
        raise UserError(f"no such network, {cfg.network}. Give the safetensors file that made the clips")
    lineage = network_lineage(cfg.network) if cfg.network is not None else None
    clips = ClipStore(store)
    rows = [row for row in clips.rows() if lineage in (None, row.generator_rev)]
    candidates = candidates_of(rows)
    if not candidates:
        of = f" of {cfg.network}" if cfg.network is not None else ""
        raise UserError(f"no clip{of} that the filters decided about, {store}. Generate some first")
    known = {entry.clip_id for entry in load_audit(folder).entries} if any(folder.glob("audit-*.jsonl")) else set()
    audit = draw_audit(folder, candidates, Plan(cfg.blocked, cfg.passed), seed=cfg.seed)
    wave = max(entry.wave for entry in audit.entries)
    drawn = sorted((entry.clip_id for entry in audit.drawn if entry.wave == wave), key=lambda clip_id: hashlib.sha256(clip_id.encode()).digest())
    table = folder / f"wave-{wave}.csv"
    if not table.exists():
        atomic_write(table, table_of({clip_id: str(file_of(clips, clip_id).resolve()) for clip_id in drawn}).encode())
    new = sum(entry.clip_id not in known for entry in audit.entries)
    pools = {pool: sum(entry.pool == pool and entry.wave == wave for entry in audit.entries) for pool in ("blocked", "passed")}
    return {"table": str(table), "wave": wave, "new_clips": new, **pools, "to_look_at": len(drawn), "filters": audit.versions[-1]}


def file_of(store: ClipStore, clip_id: str) -> Path:
    """What people open: the preview, or the record where the store has no previews."""
    preview = store.preview_path(clip_id)
    return preview if preview.exists() else store.record_path(clip_id)


def table_of(files: dict[str, str]) -> str:
    """A row for each clip id, for a reader to fill in."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([clip_id, file, "", ""] for clip_id, file in files.items())
    return text.getvalue()


# What people said


def readings_of(path: Path, reader: str) -> Iterator[Reading]:
    """The filled-in rows. Raises UserError, one line with the file and the line, for a row that cannot be."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}. Give a wave's table, as UTF-8") from error
    rows = csv.DictReader(io.StringIO(text))
    missing = [name for name in ("clip_id", "said", "policies") if name not in (rows.fieldnames or ())]
    if missing:
        raise UserError(f"no column {missing[0]!r}, {path}. Fill in the table that the audit wrote")
    version = load_policy().version
    for row in rows:
        said = (row["said"] or "").strip()
        if not said:
            continue
        policies = tuple(sorted({code.strip() for code in (row["policies"] or "").split(";")} - {""}))
        try:
            yield Reading.model_validate({"clip_id": row["clip_id"], "reader": reader, "said": said, "policies": policies, "policy_version": version})
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"{path}:{rows.line_num}: {'.'.join(map(str, first['loc'])) or 'the row'}: {first['msg']}. Mend that row") from error


def add_answers(folder: Path, path: Path, reader: str) -> dict[str, Any]:
    """Adds one reader's answers; the same ones again add nothing."""
    if not reader.strip():
        raise UserError("who read? Give --reader NAME, a pseudonym that stays the same")
    before = load_audit(folder)
    try:
        audit = add_readings(folder, readings_of(path, reader.strip()))
    except csv.Error as error:
        raise UserError(f"not a wave's table, {path}: {error}. Give the one that the audit wrote, filled in") from error
    read = {reading.clip_id for reading in audit.readings}
    return {"added": len(audit.readings) - len(before.readings), "read": len(read), "open": sum(entry.clip_id not in read for entry in audit.drawn)}


def main(cfg: Config, *, resume: bool = False) -> dict[str, Any]:
    """Draws a wave, or takes answers in. `resume` changes nothing: what is there is never drawn again."""
    if cfg.folder is None:
        raise UserError("which audit? Write rushes audit FOLDER --clips STORE")
    if (cfg.clips is None) == (cfg.answers is None):
        raise UserError("give --clips STORE to draw a wave, or --answers FILE to take in what was read: one of them")
    if cfg.clips is not None:
        check_can_write(cfg.folder)
        return draw_wave(cfg, cfg.folder, cfg.clips)
    assert cfg.answers is not None
    return add_answers(cfg.folder, cfg.answers, cfg.reader)

"""Write a folder of rankings in one of the formats other tools read (`rushes export-rankings FORMAT FOLDER FILE`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from align.config import Config as BaseConfig
from base_model.errors import UserError
from reward.comparisons import load_comparisons
from reward.importers.formats import FORMATS, format_called


class Config(BaseConfig):
    format: str | None = None
    """Name of the format."""
    folder: Path | None = None
    """Folder of rankings."""
    file: Path | None = None
    """File to write; one that is there is replaced."""
    dimension: str | None = None
    """Only answers in this dimension; none means all."""


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    """Writes the file and says what went into it and what did not."""
    writers = {name: format.write for name, format in FORMATS.items() if format.write}
    if cfg.format is None or cfg.folder is None or cfg.file is None:
        raise UserError(f"which format, folder and file? Write rushes export-rankings FORMAT FOLDER FILE. Formats: {', '.join(writers)}")
    write = writers[format_called(cfg.format, writers)]
    data = load_comparisons(cfg.folder)
    events = tuple(event for event in data.events if cfg.dimension in (None, event.dimension))
    if not events:
        there = ", ".join(sorted({event.dimension for event in data.events})) or "none"
        raise UserError(f"no answers{f' in the dimension {cfg.dimension}' if cfg.dimension else ''}, {cfg.folder}. Dimensions there: {there}")
    exported = write(replace(data, events=events), cfg.file)
    return {"file": str(cfg.file), "rows": exported.rows, "answers": len(events), "left_out": dict(exported.left_out)}

"""Read people's preferences in one of the formats of public datasets into a folder of rankings (`rushes import-rankings FORMAT FILE`).

The formats, their columns and what becomes of them are in the README of `reward/`. Importing a file again adds nothing.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Literal

from align.config import Config as BaseConfig
from base_model.checkpoint import check_can_write
from base_model.errors import UserError
from reward.comparisons import write_comparisons
from reward.importers.formats import FORMATS, format_called
from reward.licences import check_commercial, standing


class Config(BaseConfig):
    format: str | None = None
    """Name of the format."""
    file: Path | None = None
    """File of labels, as the dataset ships it."""
    out: Path = Path("runs/rankings")
    """Folder of rankings to add to, made when missing."""
    media: Path | None = None
    """Folder that the paths in the file begin in; without it clips are known by their paths only."""
    source: str | None = None
    """What the answers name as their dataset; none means the format's own. Give one for data of your own: it tells files with equal paths apart."""
    licence: str | None = None
    """Licence of the answers; none means the dataset's own, which for data of your own is not known."""
    split: Literal["train", "val", "test"] | None = None
    """Split of prompts that the folder does not know yet; none means test for what was made to test on (videogen-rewardbench, genai-bench, hpdv2-test), else by hash. A prompt
    that hangs together with one of an earlier split stays with it."""
    commercial: bool = False
    """Whether this is for commercial use: answers whose licence forbids that, or is not known, are then refused."""


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    """Imports the file and says what was in it."""
    if cfg.format is None or cfg.file is None:
        raise UserError(f"which format and file? Write rushes import-rankings FORMAT FILE. Formats: {', '.join(FORMATS)}")
    chosen = FORMATS[format_called(cfg.format, FORMATS)]
    check_can_write(cfg.out)
    source = chosen.origin.source if cfg.source is None else cfg.source
    licence = chosen.origin.licence if cfg.licence is None else cfg.licence
    imported = chosen.read(cfg.file, media=cfg.media, source=source, licence=licence)
    if cfg.commercial:
        check_commercial(imported.events, cfg.file)
    split = "test" if cfg.split is None and chosen.benchmark else cfg.split
    whole = write_comparisons(cfg.out, imported.events, clips=imported.clips, prompts=imported.prompts, annotators=imported.annotators, split=split)
    return {
        "out": str(cfg.out),
        "source": source,
        "homepage": chosen.origin.homepage,
        "licence": f"{licence or 'none named'} ({standing(licence)})",
        "rows": imported.rows,
        "answers": len(imported.events),
        "by_dimension": dict(Counter(event.dimension for event in imported.events)),
        "by_kind": dict(Counter(event.kind for event in imported.events)),
        "ties": sum(event.choice in ("tie", "both_bad", "both_good") for event in imported.events),
        "skipped": dict(imported.skipped),
        "rows_about_clips_compared_before": imported.repeated,
        "unknown_columns": list(imported.unknown_columns),
        "prompts": len(imported.prompts),
        "people": len(imported.annotators),
        "clips": len(imported.clips),
        "clips_with_media": imported.found,
        "prompts_by_split": dict(Counter(whole.split[prompt.prompt_id] for prompt in imported.prompts)),
        "answers_in_folder": len(whole.events),
    }

"""Read people's preferences in one of the formats of public datasets into a folder of rankings (`rushes import-rankings FORMAT FILE`).

The formats, their columns and what becomes of them are in the README of `reward/`. Importing a file again adds nothing. With `--clips` the media become clips of a store
(`imported_clips.py`), and the answers are about those: what the recipes that learn from rankings take.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from align.config import Config as BaseConfig
from base_model.checkpoint import check_can_write
from base_model.errors import UserError
from reward.comparisons import load_comparisons, write_comparisons
from reward.importers.formats import FORMATS, format_called
from reward.importers.reading import Imported
from reward.licences import check_commercial, standing

Side = Annotated[int, Field(ge=8, le=4096, multiple_of=8)]


class Config(BaseConfig):
    format: str | None = None
    """Name of the format."""
    file: Path | None = None
    """File of labels, as the dataset ships it."""
    out: Path = Path("runs/rankings")
    """Folder of rankings to add to, made when missing."""
    media: Path | None = None
    """Folder that the paths in the file begin in; without it clips are known by their paths only."""
    clips: Path | None = None
    """Clip store to fill with the media; answers are then about its clips. None: nothing is decoded, and nothing can be learned from the answers."""
    frames: Annotated[int, Field(ge=1, le=1025)] = 13
    """Frames of a clip of the store; files that are shorter are left out, of longer ones it is the beginning. The shipped models know 13 frames of 32x32 at 12 a second."""
    height: Side = 32
    """Its height in pixels, a multiple of 8; what stands out at the sides is cut off."""
    width: Side = 32
    """Its width in pixels, a multiple of 8."""
    fps: Annotated[float, Field(ge=0.1, le=240)] = 12.0
    """Its frames a second."""
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
    summary: dict[str, Any] = {}
    if cfg.clips is not None:
        imported, summary = with_clips(cfg, cfg.clips, imported)
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
        **summary,
    }


def with_clips(cfg: Config, clips: Path, imported: Imported) -> tuple[Imported, dict[str, Any]]:
    """The answers about clips that are in the store afterwards, and what the summary says of it."""
    if cfg.media is None:
        raise UserError("--clips: which files are the clips? Give --media, the folder that the paths in the file begin in")
    check_can_write(clips, "--clips")
    from recipes.imported_clips import Form, to_store  # which takes much of this file

    before = load_comparisons(cfg.out) if (cfg.out / "clips.parquet").exists() else None
    return to_store(imported, media=cfg.media, folder=clips, form=Form(cfg.frames, cfg.height, cfg.width, cfg.fps), before=before)

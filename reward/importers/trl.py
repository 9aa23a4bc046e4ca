"""TRL's preference format, read and written: rows of `prompt`, `chosen`, `rejected`. TRL's are texts; here `chosen` and `rejected` are paths of clips.

The format has no ties, no dimension and no person. Read, a row is a pair in the dimension "overall" whose first clip was chosen. Written, a row is one pair that
somebody decided: of a ranking every pair that differs, which a trainer then takes for independent; of ties none.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from base_model.checkpoint import atomic_write
from base_model.errors import UserError
from reward.comparisons import Comparisons
from reward.importers.reading import Imported, Origin, Reading, Said
from reward.importers.tables import Record, columns, typed_rows
from reward.importers.writing import Exported, pairs

TRL = Origin("trl", "trl", "", "https://huggingface.co/docs/trl/dataset_formats")
COLUMNS = columns("prompt,chosen,rejected")


def read_trl(path: Path, *, media: Path | None = None, source: str = TRL.source, licence: str = TRL.licence) -> Imported:
    """JSON lines, a JSON array or parquet. Raises UserError for another file, and for messages in place of paths."""
    reading = Reading(TRL.name, source, licence, media)
    return reading.collect(path, typed_rows(path, COLUMNS, reading.unknown), _pair)


def _pair(record: Record, reading: Reading) -> Said:
    prompt = reading.prompt(record.text("prompt"))
    clips = [reading.clip(record.needed(name), prompt) for name in ("chosen", "rejected")]
    task = reading.task(*(clip.clip_id for clip in clips), prompt.prompt_id)
    return Said(prompt, clips, (reading.event(task, prompt, clips, "overall", choice="A"),))


def write_trl(data: Comparisons, path: Path) -> Exported:
    """JSON lines of the decided pairs. Raises UserError where answers of several dimensions would be mixed."""
    left_out: Counter[str] = Counter()
    rows, dimensions = [], set()
    for event in data.events:
        for first, second, choice in pairs(event, left_out):
            if choice not in ("A", "B"):
                left_out[f"choice {choice}"] += 1
                continue
            chosen, rejected = (first, second) if choice == "A" else (second, first)
            rows.append({"prompt": data.prompts[event.prompt_id].text, "chosen": data.clips[chosen].path, "rejected": data.clips[rejected].path})
            dimensions.add(event.dimension)
    if len(dimensions) > 1:
        raise UserError(f"answers in {len(dimensions)} dimensions ({', '.join(sorted(dimensions))}) cannot be told apart in {path}. Choose one with --dimension")
    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    return Exported(len(rows), left_out)

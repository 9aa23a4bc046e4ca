"""Datapoint's text-2-video-human-preferences-motion (and -v2), as parquet: what share of many people preferred each clip of a pair.

    prompt, video1, video2, model1, model2, weighted_results1_Coherence, weighted_results2_Coherence, ..._Aesthetic, ..._Prompt_Adherence

One pair a dimension: the choice is the clip with the larger share (equal shares tie), `likert` holds both shares as they are, `confidence` the larger one, and the
flag "aggregated" says that this is many people's answer. A video is a path, or the file itself as the library `datasets` stores it.
"""

from __future__ import annotations

from pathlib import Path

from reward.comparisons import Clip, Prompt
from reward.importers.reading import Imported, Origin, Reading, Said
from reward.importers.tables import Record, columns, typed_rows

MOTION = Origin(
    "datapoint-motion", "datapointai/text-2-video-human-preferences-motion", "CC-BY-4.0", "https://huggingface.co/datasets/datapointai/text-2-video-human-preferences-motion"
)
DIMENSIONS = ("Coherence", "Aesthetic", "Prompt_Adherence")
ROUNDING = 0.011  # shares are given to a few digits

COLUMNS = columns(",".join(["prompt", "video1", "video2", *(f"weighted_results{i}_{dimension}" for dimension in DIMENSIONS for i in (1, 2))]), "model1,model2")
VIDEO_COLUMNS = columns("", "bytes,path")


def read_datapoint_motion(path: Path, *, media: Path | None = None, source: str = MOTION.source, licence: str = MOTION.licence) -> Imported:
    """Soft pairs in three dimensions. Raises UserError for another file."""
    reading = Reading(MOTION.name, source, licence, media)
    return reading.collect(path, typed_rows(path, COLUMNS, reading.unknown), _soft_pair)


def _soft_pair(record: Record, reading: Reading) -> Said:
    prompt = reading.prompt(record.text("prompt"))
    clips = [_clip(record, reading, prompt, i) for i in (1, 2)]
    task = reading.task(*(clip.clip_id for clip in clips), prompt.prompt_id)
    events = []
    for dimension in DIMENSIONS:
        names = [f"weighted_results{i}_{dimension}" for i in (1, 2)]
        first, second = (record.number(name, 0, 1) for name in names)
        if first is None or second is None or first == second == 0:
            reading.skipped[f"no answer in {dimension}"] += 1
            continue
        if first + second > 1 + ROUNDING:
            raise record.wrong(names[0], f"a share that makes one with {names[1]} ({second:g})")
        choice = "A" if first > second else "B" if second > first else "tie"
        events.append(reading.event(task, prompt, clips, dimension, choice=choice, likert=(first, second), confidence=max(first, second), flags=("aggregated",)))
    return Said(prompt, clips, events)


def _clip(record: Record, reading: Reading, prompt: Prompt, number: int) -> Clip:
    name = f"video{number}"
    generator = record.text(f"model{number}")
    if not isinstance(record.value(name), dict):
        return reading.clip(record.needed(name), prompt, generator=generator)
    video = record.part_of(record.value(name), name, VIDEO_COLUMNS, reading.unknown)
    content = video.value("bytes")
    if content is None:
        return reading.clip(video.needed("path"), prompt, generator=generator)
    if not isinstance(content, bytes) or not content:
        raise video.wrong("bytes", "the content of a file")
    return reading.clip(video.text("path"), prompt, generator=generator, content=content)

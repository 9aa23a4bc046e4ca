"""VisionRewardDB-Video of THUDM (zai-org), as parquet or JSON: 21 ratings a clip (`train`), and pairs (`regression`, `test`). After the dataset's card.

    video_path, internal_id, prompt, url, annotation {alignment, composition, ...}, meta_result, meta_mask
    internal_id, prompt, standard_answer, video1_path, video2_path

A rating is an event of kind "likert" in a dimension named as its field; each field has its own range. `unsafe type` names a kind of harm and no amount, so it is an
event of kind "tag" with the flag "type 3". `standard_answer` is `video1`, `video2` or `tie`, as the evaluation code of VideoScore2 reads it; anything else is refused.
"""

from __future__ import annotations

from pathlib import Path

from reward.importers.reading import Imported, Origin, Reading, Said
from reward.importers.tables import Record, columns, typed_rows

TRAIN = Origin("visionreward-train", "zai-org/VisionRewardDB-Video", "Apache-2.0", "https://huggingface.co/datasets/zai-org/VisionRewardDB-Video")
PAIRS = Origin("visionreward-pairs", TRAIN.source, TRAIN.licence, TRAIN.homepage)

RANGES = {
    "alignment": (1, 5),
    "composition": (1, 3),
    "focus": (1, 3),
    "camera movement": (1, 3),
    "color": (1, 5),
    "lighting accurate": (1, 4),
    "lighting aes": (1, 5),
    "shape at beginning": (0, 3),
    "shape throughout": (0, 4),
    "object motion dynamic": (1, 5),
    "camera motion dynamic": (1, 5),
    "movement smoothness": (0, 4),
    "movement reality": (0, 4),
    "clear": (1, 5),
    "image quality stability": (1, 5),
    "camera stability": (1, 3),
    "detail refinement": (1, 5),
    "letters": (1, 4),
    "physics law": (1, 5),
    "unsafe type": (1, 5),
    "safety": (1, 5),
}
UNORDERED = "unsafe type"
ANSWERS = {"video1": "A", "video2": "B", "tie": "tie"}
TRAIN_COLUMNS = columns("video_path,internal_id,prompt,annotation", "", "url,meta_result,meta_mask")
RATING_COLUMNS = columns(",".join(RANGES))
PAIR_COLUMNS = columns("internal_id,prompt,standard_answer,video1_path,video2_path")


def read_visionreward_train(path: Path, *, media: Path | None = None, source: str = TRAIN.source, licence: str = TRAIN.licence) -> Imported:
    """The split `train`. Raises UserError for another file."""
    reading = Reading(TRAIN.name, source, licence, media)
    return reading.collect(path, typed_rows(path, TRAIN_COLUMNS, reading.unknown), _ratings)


def read_visionreward_pairs(path: Path, *, media: Path | None = None, source: str = PAIRS.source, licence: str = PAIRS.licence) -> Imported:
    """The split `regression` or `test`, both in the dimension "overall". Raises UserError for another file."""
    reading = Reading(PAIRS.name, source, licence, media)
    return reading.collect(path, typed_rows(path, PAIR_COLUMNS, reading.unknown), _pair)


def _ratings(record: Record, reading: Reading) -> Said:
    prompt = reading.prompt(record.text("prompt"))
    clip = reading.clip(record.needed("video_path"), prompt)
    task = reading.task(record.needed_key("internal_id"), clip.clip_id, named=True)
    annotation = record.part("annotation", RATING_COLUMNS, reading.unknown)
    if annotation is None:
        raise record.wrong("annotation", "ratings")
    events = []
    for dimension, (low, high) in RANGES.items():
        score = annotation.whole(dimension, low, high)
        if score is None:
            reading.skipped[f"no answer in {dimension}"] += 1
        elif dimension == UNORDERED:
            events.append(reading.event(task, prompt, (clip,), dimension, kind="tag", flags=(f"type {score}",)))
        else:
            events.append(reading.event(task, prompt, (clip,), dimension, kind="likert", likert=(float(score),)))
    return Said(prompt, (clip,), events)


def _pair(record: Record, reading: Reading) -> Said:
    prompt = reading.prompt(record.text("prompt"))
    clips = [reading.clip(record.needed(f"video{number}_path"), prompt) for number in (1, 2)]
    task = reading.task(record.needed_key("internal_id"), *(clip.clip_id for clip in clips), named=True)
    choice = record.one_of("standard_answer", ANSWERS)
    if choice is None:
        reading.skipped["no answer in overall"] += 1
    return Said(prompt, clips, () if choice is None else (reading.event(task, prompt, clips, "overall", choice=choice),))

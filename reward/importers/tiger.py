"""Two datasets of TIGER-Lab, as parquet or JSON: VideoFeedback (five ratings a clip) and GenAI-Bench (one vote a pair).

    id, images, text prompt, video link, visual quality, temporal consistency, dynamic degree, text-to-video alignment, factual consistency, conversations
    prompt, left_video, right_video, vote_type, left_model, right_model

VideoFeedback's ratings go from 1 to 4: events of kind "likert", one a dimension, named as the columns are. GenAI-Bench's votes are choices in the dimension
"overall": `leftvote` A, `rightvote` B, `tievote` tie, `bothbad_vote` both bad.
"""

from __future__ import annotations

from pathlib import Path

from reward.importers.reading import Imported, Origin, Reading, Said
from reward.importers.tables import Record, columns, typed_rows

VIDEOFEEDBACK = Origin("videofeedback", "TIGER-Lab/VideoFeedback", "Apache-2.0", "https://huggingface.co/datasets/TIGER-Lab/VideoFeedback")
GENAI = Origin("genai-bench", "TIGER-Lab/GenAI-Bench", "CC-BY-4.0", "https://huggingface.co/datasets/TIGER-Lab/GenAI-Bench")

RATED = ("visual quality", "temporal consistency", "dynamic degree", "text-to-video alignment", "factual consistency")
VOTES = {"leftvote": "A", "rightvote": "B", "tievote": "tie", "bothbad_vote": "both_bad"}
FEEDBACK_COLUMNS = columns(f"id,text prompt,video link,{','.join(RATED)}", "", "images,conversations")
GENAI_COLUMNS = columns("prompt,left_video,right_video,vote_type", "left_model,right_model")


def read_videofeedback(path: Path, *, media: Path | None = None, source: str = VIDEOFEEDBACK.source, licence: str = VIDEOFEEDBACK.licence) -> Imported:
    """VideoFeedback, `annotated` or `real`. Raises UserError for a file that is neither."""
    reading = Reading(VIDEOFEEDBACK.name, source, licence, media)
    return reading.collect(path, typed_rows(path, FEEDBACK_COLUMNS, reading.unknown), _feedback)


def read_genai_bench(path: Path, *, media: Path | None = None, source: str = GENAI.source, licence: str = GENAI.licence) -> Imported:
    """GenAI-Bench's `video_generation`. Raises UserError for another file."""
    reading = Reading(GENAI.name, source, licence, media)
    return reading.collect(path, typed_rows(path, GENAI_COLUMNS, reading.unknown), _vote)


def _feedback(record: Record, reading: Reading) -> Said:
    prompt = reading.prompt(record.text("text prompt"))
    clip = reading.clip(record.text("video link") or record.needed_key("id"), prompt)
    task = reading.task(record.needed_key("id"), named=True)
    events = []
    for dimension in RATED:
        score = record.number(dimension, 1, 4)
        if score is None:
            reading.skipped[f"no answer in {dimension}"] += 1
        else:
            events.append(reading.event(task, prompt, (clip,), dimension, kind="likert", likert=(score,)))
    return Said(prompt, (clip,), events)


def _vote(record: Record, reading: Reading) -> Said:
    prompt = reading.prompt(record.text("prompt"))
    clips = [reading.clip(record.needed(f"{side}_video"), prompt, generator=record.text(f"{side}_model")) for side in ("left", "right")]
    task = reading.task(*(clip.clip_id for clip in clips), prompt.prompt_id)
    choice = record.one_of("vote_type", VOTES)
    if choice is None:
        reading.skipped["no answer in overall"] += 1
    return Said(prompt, clips, () if choice is None else (reading.event(task, prompt, clips, "overall", choice=choice),))

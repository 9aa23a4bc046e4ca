"""VideoGen-RewardBench and the CSV that VideoAlign trains on: pairs of clips, one label a dimension (KwaiVGI/VideoAlign, `data.py`, `datasets/train/README.md`).

    path_A,path_B,A_model,B_model,prompt,VQ,MQ,TA,Overall,fps_A,num_frames_A,fps_B,num_frames_B     VideoGen-RewardBench
    path_A,path_B,prompt,VQ,MQ,TA,fps_A,num_frames_A,fps_B,num_frames_B[,MOS_A_VQ,MOS_B_VQ,...]     VideoAlign

Labels are `A`, `B`, `same`, in VideoAlign's also `invalid` (no clip can be judged): choices A, B, tie, invalid. An empty label is no answer. `MOS_A_<dimension>`
and `MOS_B_<dimension>` are ratings from 1 to 5: one event of kind "likert" for the clips of a row that were rated.
"""

from __future__ import annotations

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from base_model.checkpoint import atomic_write
from reward.comparisons import Clip, Comparisons, Prompt, RankingEvent
from reward.importers.reading import Imported, Origin, Reading, Said
from reward.importers.tables import Record, columns, csv_rows
from reward.importers.writing import Exported, pairs

VIDEOGEN = Origin("videogen-rewardbench", "KwaiVGI/VideoGen-RewardBench", "Apache-2.0", "https://huggingface.co/datasets/KwaiVGI/VideoGen-RewardBench")
VIDEOALIGN = Origin("videoalign", "videoalign", "", "https://github.com/KwaiVGI/VideoAlign")

DIMENSIONS = ("VQ", "MQ", "TA")
LABELS = {"A": "A", "B": "B", "same": "tie"}
WRITTEN = {"A": "A", "B": "B", "tie": "same", "both_bad": "same", "both_good": "same", "invalid": "invalid"}
MOST_FPS, MOST_FRAMES = 1000, 10_000_000

HEADER = ("path_A", "path_B", "prompt", *DIMENSIONS, "fps_A", "num_frames_A", "fps_B", "num_frames_B")
MOS = tuple(f"MOS_{side}_{dimension}" for dimension in DIMENSIONS for side in "AB")
BENCH_COLUMNS = columns(f"{','.join(HEADER)},A_model,B_model,Overall")
ALIGN_COLUMNS = columns(",".join(HEADER), ",".join(MOS))


def read_videogen(path: Path, *, media: Path | None = None, source: str = VIDEOGEN.source, licence: str = VIDEOGEN.licence) -> Imported:
    """VideoGen-RewardBench's CSV: four pairs a row. Raises UserError for a file that is not one."""
    reading = Reading(VIDEOGEN.name, source, licence, media)
    return reading.collect(path, csv_rows(path, BENCH_COLUMNS, reading.unknown), _bench_row)


def read_videoalign(path: Path, *, media: Path | None = None, source: str = VIDEOALIGN.source, licence: str = VIDEOALIGN.licence) -> Imported:
    """VideoAlign's CSV: three pairs a row, and ratings where there are any. Raises UserError for a file that is not one."""
    reading = Reading(VIDEOALIGN.name, source, licence, media)
    return reading.collect(path, csv_rows(path, ALIGN_COLUMNS, reading.unknown), _align_row)


def _bench_row(record: Record, reading: Reading) -> Said:
    prompt, clips, task = _asked(record, reading, (record.text("A_model"), record.text("B_model")))
    return Said(prompt, clips, _choices(record, reading, task, prompt, clips, (*DIMENSIONS, "Overall"), LABELS))


def _align_row(record: Record, reading: Reading) -> Said:
    prompt, clips, task = _asked(record, reading, ("", ""))
    events = _choices(record, reading, task, prompt, clips, DIMENSIONS, {**LABELS, "invalid": "invalid"})
    for dimension in DIMENSIONS:
        scores = [record.number(f"MOS_{side}_{dimension}", 1, 5) for side in "AB"]
        rated = [(clip, score) for clip, score in zip(clips, scores, strict=True) if score is not None]
        if rated:
            events.append(reading.event(task, prompt, [clip for clip, _ in rated], dimension, kind="likert", likert=tuple(score for _, score in rated)))
    return Said(prompt, clips, events)


def _asked(record: Record, reading: Reading, generators: tuple[str, str]) -> tuple[Prompt, list[Clip], str]:
    prompt = reading.prompt(record.text("prompt"))
    clips = []
    for side, generator in zip("AB", generators, strict=True):
        fps, num_frames = record.number(f"fps_{side}", 0, MOST_FPS), record.whole(f"num_frames_{side}", 0, MOST_FRAMES)
        clips.append(reading.clip(record.needed(f"path_{side}"), prompt, generator=generator, fps=fps or 0.0, num_frames=num_frames or 0))
    return prompt, clips, reading.task(*(clip.clip_id for clip in clips), prompt.prompt_id)


def _choices(
    record: Record, reading: Reading, task: str, prompt: Prompt, clips: list[Clip], dimensions: tuple[str, ...], labels: Mapping[str, str]
) -> list[RankingEvent]:
    events = []
    for dimension in dimensions:
        choice = record.one_of(dimension, labels)
        if choice is None:
            reading.skipped[f"no answer in {dimension}"] += 1
        else:
            events.append(reading.event(task, prompt, clips, dimension, choice=choice))
    return events


def write_videoalign(data: Comparisons, path: Path) -> Exported:
    """VideoAlign's CSV of the answers in VQ, MQ and TA; the columns of ratings are there where a rating is.

    A ranking of more clips becomes its pairs, which a trainer takes for independent. Both bad and both good become `same`. What the format has no room for is
    left out and counted.
    """
    left_out = Counter(f"dimension {event.dimension}" for event in data.events if event.dimension not in DIMENSIONS)
    known = [event for event in data.events if event.dimension in DIMENSIONS]
    rows: list[_Row] = []
    of_task: dict[tuple[str, str], list[_Row]] = defaultdict(list)  # (task, person) -> its rows

    def new_row(event: RankingEvent, first: str, second: str) -> _Row:
        rows.append(_Row((first, second), {"prompt": data.prompts[event.prompt_id].text, **_about("A", data.clips[first]), **_about("B", data.clips[second])}))
        of_task[event.task_id, event.annotator_id].append(rows[-1])
        return rows[-1]

    for event in (event for event in known if event.kind != "likert"):
        for first, second, choice in pairs(event, left_out):
            free = (row for row in of_task[event.task_id, event.annotator_id] if row.clips == (first, second) and event.dimension not in row.cells)
            (next(free, None) or new_row(event, first, second)).cells[event.dimension] = WRITTEN[choice]
    for event in (event for event in known if event.kind == "likert"):
        fit = len(event.likert) == len(event.clip_ids) <= 2 and all(1 <= score <= 5 for score in event.likert)
        free = (row for row in of_task[event.task_id, event.annotator_id] if set(event.clip_ids) <= set(row.clips) and not row.cells.keys() & row.rated(event))
        row = next(free, None) if fit else None
        if row is None and fit and len(event.clip_ids) == 2:
            row = new_row(event, *event.clip_ids)
        if row is None:
            left_out["a rating beside no pair, or not from 1 to 5"] += 1
        else:
            row.cells.update(zip(row.rated(event), event.likert, strict=True))
    rated = {event.dimension for event in known if event.kind == "likert"}
    header = [*HEADER, *(name for name in MOS if name.rpartition("_")[2] in rated)]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, header, restval="")
    writer.writeheader()
    writer.writerows(row.cells for row in rows)
    atomic_write(path, text.getvalue().encode())
    return Exported(len(rows), left_out)


@dataclass(frozen=True)
class _Row:
    clips: tuple[str, str]
    cells: dict[str, object]

    def rated(self, event: RankingEvent) -> list[str]:
        """The cells of a rating of one or both clips, in the order of its clips."""
        return [f"MOS_{'AB'[self.clips.index(clip_id)]}_{event.dimension}" for clip_id in event.clip_ids]


def _about(side: str, clip: Clip) -> dict[str, object]:
    return {f"path_{side}": clip.path, f"fps_{side}": clip.fps or "", f"num_frames_{side}": clip.num_frames or ""}

"""Media of imported preferences as clips of a store, so that recipes can learn from the answers. Used by `import_rankings.py`, no command.

Every clip of a store that is filled here has one size, number of frames and frame rate: the recipes refuse an answer about clips of several sizes, and heads on frozen encoders
clips of several rates. A clip is the beginning of its file: resampled, resized until it covers the size, the middle cut out. It is decoded once, since the store is asked for the
sha256 of its file first; each is committed as it is made, so a killed import goes on where it was. The filters' verdict, on the prompt and on the pixels, is written beside it.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from align.progress import Progress
from base_model.errors import UserError
from base_model.video.files import cover, from_uint8, read_image, read_video, resample_fps, to_uint8
from base_model.video.store import ClipRow, ClipStore, request_key
from recipes.generate import safety_runner
from recipes.rankings import ruling_of
from recipes.visual import IMAGES
from reward.comparisons import Clip, Comparisons, Prompt, RankingEvent
from reward.importers.reading import Imported, media_file
from reward.safety.contract import Decision, SafetyRunner, to_json

MISSING = "no file in the folder of media"
BROKEN = "cannot be decoded"
SHORT = "too short"
TAKEN = "has the frames of a clip of another prompt"
ITSELF = "a clip against itself"
FIRST = 3  # names of what was left out that are told


class Form(NamedTuple):
    """What every clip of the store is like."""

    frames: int
    height: int
    width: int
    fps: float

    def __str__(self) -> str:
        return f"{self.frames} frames of {self.height}x{self.width} at {self.fps:g} a second"


class LeftOut(Exception):
    """A file that gives no clip; its text says why."""


@dataclass(frozen=True)
class Stored:
    """What became of the clips of a file of labels."""

    rows: Mapping[str, ClipRow]  # clip id in the file of labels -> row of the store
    why: Mapping[str, str]  # clip id -> why there is no row
    decoded: int


class Told(NamedTuple):
    """The answers about clips of the store, and what became of the rest."""

    imported: Imported
    summary: dict[str, Any]


def to_store(imported: Imported, *, media: Path, folder: Path, form: Form, before: Comparisons | None) -> Told:
    """Fills the store in `folder` and gives clips their ids there. before: the rankings that are there already.

    Raises UserError where the store or the rankings hold clips of another form, or where no answer is left.
    """
    store, known = ClipStore(folder), before.clips if before else {}
    _check_store(store, form)
    _check_answers(imported, before, form)
    stored = fill(store, imported.clips, {prompt.prompt_id: prompt for prompt in imported.prompts}, media=media, form=form, source=imported.source)
    clips, why = _joined(imported.clips, stored, known)
    events, lost = _renamed(imported.events, clips, why)
    left_out = _named(imported.clips, why)
    if not events:
        reasons = "; ".join(f"{len(names)} clips: {reason}, first {names[0]}" for reason, names in left_out.items()) or "; ".join(lost)
        raise UserError(f"no answer is left, {media}: {reasons}. Check --media, or ask for clips of fewer --frames at another --fps")
    summary = {
        "clips_in": str(folder),
        "form": str(form),
        "decoded": stored.decoded,
        "decoded_before": len(stored.rows) - stored.decoded,
        "clips_by_verdict": dict(Counter(str(ruling_of(row)["verdict"]) for row in stored.rows.values())),
        "clips_cut_at_the_end": sum(bool(_extra(row)["cut"]) for row in stored.rows.values()),
        "clips_left_out": {reason: len(names) for reason, names in left_out.items()},
        "first_left_out": {reason: names[:FIRST] for reason, names in left_out.items()},
        "answers_left_out": dict(lost),
    }
    return Told(_about(imported, events, clips), summary)


def fill(store: ClipStore, clips: Sequence[Clip], prompts: Mapping[str, Prompt], *, media: Path, form: Form, source: str) -> Stored:
    """Decodes the files of clips that the store does not hold, one after the other."""
    runner = safety_runner()
    asked = dict(zip(prompts, runner.check_prompts([prompt.text for prompt in prompts.values()]), strict=True))
    rows = {clip.clip_id: row for clip in clips if (row := store.find(_key(clip, prompts[clip.prompt_id], form)))}
    why: dict[str, str] = {}
    found = len(rows)
    with Progress("import of clips", total=len(clips), done=found) as progress:
        for clip in (clip for clip in clips if clip.clip_id not in rows):
            try:
                video, cut = read_clip(media_file(media, clip.path), form)
            except LeftOut as error:
                why[clip.clip_id] = str(error)
            else:
                rows[clip.clip_id] = _added(store, video, clip, prompts[clip.prompt_id], form, cut=cut, source=source, runner=runner, asked=asked[clip.prompt_id])
            progress.advance(f"{len(rows)} in the store, {len(why)} left out")
    return Stored(rows, why, len(rows) - found)


def read_clip(file: Path | None, form: Form) -> tuple[Tensor, bool]:
    """The beginning of a file as a clip [T,3,H,W] of that form, and whether the file goes on. Raises LeftOut."""
    if file is None:
        raise LeftOut(MISSING)

    def fit(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return to_uint8(cover(from_uint8(frame[None]), form.height, form.width))[0]  # [H,W,3] of the form

    try:
        if file.suffix.lower() in IMAGES:
            video = cover(from_uint8(read_image(file, still=True)[None]), form.height, form.width)  # [1,3,H,W]
        else:
            decoded = read_video(file, seconds=(form.frames + 1) / form.fps, shrink=fit)
            video = resample_fps(from_uint8(decoded.frames), decoded.fps, form.fps)
    except UserError as error:
        raise LeftOut(BROKEN) from error
    if len(video) < form.frames:
        raise LeftOut(SHORT)
    return video[: form.frames], len(video) > form.frames


def _added(store: ClipStore, video: Tensor, clip: Clip, prompt: Prompt, form: Form, *, cut: bool, source: str, runner: SafetyRunner, asked: Decision) -> ClipRow:
    """The row of a clip [T,3,H,W] that was decoded just now, the verdict on its prompt and its pixels included."""
    (seen,) = runner.check_videos(video[None], [prompt.text], form.fps)
    return store.add(
        video,
        prompt=prompt.text,
        prompt_id=prompt.prompt_id,
        seed=0,
        sampler=_sampler(clip, form),
        lineage=_lineage(clip),
        fps=form.fps,
        extra={"source": source, "media": clip.path, "generator": clip.generator, "cut": cut, "plain_start": _is_plain(video[0])},
        safety=to_json(Decision((*asked.rulings, *seen.rulings))),
        licence=clip.licence,
    )


def _key(clip: Clip, prompt: Prompt, form: Form) -> str:
    return request_key(prompt.text, 0, _sampler(clip, form), _lineage(clip))


def _sampler(clip: Clip, form: Form) -> dict[str, object]:
    return {"media_sha256": clip.clip_id, **form._asdict()}


def _lineage(clip: Clip) -> str:
    return clip.generator or "unknown"


def _is_plain(frame: Tensor) -> bool:
    """Whether a frame [3,H,W] has one colour, as that of a clip that fades in."""
    return bool(torch.equal(frame.amax((1, 2)), frame.amin((1, 2))))


def _extra(row: ClipRow) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(row.extra_json)
    return values


def _ranked(row: ClipRow, clip: Clip) -> Clip:
    """The clip as the rankings know it. A first frame of one colour ties no prompts together."""
    return replace(Clip.of(row), generator=clip.generator, first_frame_hash="" if _extra(row)["plain_start"] else row.first_frame_hash)


def _joined(clips: Iterable[Clip], stored: Stored, known: Mapping[str, Clip]) -> tuple[dict[str, Clip], dict[str, str]]:
    """Clip id in the file of labels -> the clip, and -> why there is none. Files with equal frames are one clip, and a clip has one prompt. known: clips of the rankings."""
    found, taken, why = {}, dict(known), dict(stored.why)
    for clip in clips:
        if (row := stored.rows.get(clip.clip_id)) is None:
            continue
        same = taken.setdefault(row.clip_id, _ranked(row, clip))
        if same.prompt_id == clip.prompt_id:
            found[clip.clip_id] = same
        else:
            why[clip.clip_id] = TAKEN
    return found, why


def _renamed(events: Iterable[RankingEvent], clips: Mapping[str, Clip], why: Mapping[str, str]) -> tuple[list[RankingEvent], Counter[str]]:
    """The answers about clips of the store, and how many were left out, by reason."""
    kept, lost = [], Counter[str]()
    for event in events:
        reason = next((why[clip_id] for clip_id in event.clip_ids if clip_id in why), None)
        ids = tuple(clips[clip_id].clip_id for clip_id in event.clip_ids) if reason is None else ()
        if reason is None and len(set(ids)) < len(ids):
            reason = ITSELF
        if reason is None:
            kept.append(replace(event, clip_ids=ids))
        else:
            lost[reason] += 1
    return kept, lost


def _named(clips: Iterable[Clip], why: Mapping[str, str]) -> dict[str, list[str]]:
    """Reason -> paths of the clips that were left out for it."""
    named: dict[str, list[str]] = defaultdict(list)
    for clip in clips:
        if clip.clip_id in why:
            named[why[clip.clip_id]].append(clip.path)
    return dict(named)


def _about(imported: Imported, events: Sequence[RankingEvent], clips: Mapping[str, Clip]) -> Imported:
    """What was imported, as far as the answers are about it."""
    shown = {clip_id for event in events for clip_id in event.clip_ids}
    asked, people = {event.prompt_id for event in events}, {event.annotator_id for event in events}
    return replace(
        imported,
        events=tuple(events),
        clips=tuple({clip.clip_id: clip for clip in clips.values() if clip.clip_id in shown}.values()),
        prompts=tuple(prompt for prompt in imported.prompts if prompt.prompt_id in asked),
        annotators=tuple(person for person in imported.annotators if person.annotator_id in people),
    )


def _check_store(store: ClipStore, form: Form) -> None:
    """Raises UserError where the store holds clips of another form."""
    other = next((has for row in store.rows() if (has := Form(row.num_frames, row.height, row.width, row.fps)) != form), None)
    if other is not None:
        raise UserError(f"the store holds clips of {other}, and clips of {form} are asked for, {store.folder}. Give another --clips, or its --frames, --height, --width and --fps")


def _check_answers(imported: Imported, before: Comparisons | None, form: Form) -> None:
    """Raises UserError where an answer is there already about clips of another form, or without media, before anything is decoded."""
    if before is None:
        return
    new = {event.event_id for event in imported.events}
    for event in (event for event in before.events if event.event_id in new):
        for clip in (before.clips[clip_id] for clip_id in event.clip_ids):
            if Form(clip.num_frames, clip.height, clip.width, clip.fps) != form:
                raise UserError(f"answer {event.event_id} is already there about clips that are not {form}. Import into another --out")

"""SafeSora: pairs in six dimensions, and harm tags of single clips (PKU-Alignment/safe-sora, `safe_sora/datasets/base.py`). JSON arrays, plain or gzipped.

    {pair_id, prompt_id, prompt_text, prompt_type, video_0: {...}, video_1: {...}, helpfulness, harmlessness, sub_preferences: {...}}     SafeSora
    {prompt_id, prompt_text, prompt_type, prompt_labels, video_id, video_text, video_path, is_safe, video_labels: {...}, generated_from}  SafeSora-Label

Who is preferred is `video_0` or `video_1`; there are no ties. In `harmlessness` the preferred clip is the safer one, so higher is better there too. The dimension
`informativeness` is called `information` by the loader and `informativeness` by the trainer of that project; both are read.

Tags are events of kind "tag" about one clip. Dimension "safety": the flag "safe" or "unsafe". Dimension "harm": a flag for each of the twelve harms that was
found, none if none was; "unknown:racism" where the data do not say.
"""

from __future__ import annotations

from pathlib import Path

from reward.comparisons import Clip, Prompt, RankingEvent
from reward.importers.reading import Imported, Origin, Reading, Said, Skip
from reward.importers.tables import Record, columns, typed_rows

SAFESORA = Origin("safesora", "PKU-Alignment/SafeSora", "CC-BY-NC-4.0", "https://huggingface.co/datasets/PKU-Alignment/SafeSora")
LABEL = Origin("safesora-label", "PKU-Alignment/SafeSora-Label", "CC-BY-NC-4.0", "https://huggingface.co/datasets/PKU-Alignment/SafeSora-Label")

HARMS = (
    *("porn", "violence", "hate", "terrorism", "contraband", "controversial", "racism", "other_discrimination", "animal_abuse", "child_abuse", "crime"),
    "other_harmful",
)
PREFERRED = {"video_0": "A", "video_1": "B"}
PROMPT_TYPES = {"safety_critical": True, "safety_neutral": False}
SUB = {"instruction_following": "instruction_following", "correctness": "correctness", "aesthetics": "aesthetics"}
SUB |= dict.fromkeys(("information", "informativeness"), "informativeness")

VIDEO_COLUMNS = columns("prompt_text,video_id,video_path", "prompt_id,prompt_type,is_safe,video_labels,generated_from", "prompt_labels,video_text")
PAIR_COLUMNS = columns("pair_id,prompt_text,video_0,video_1", "prompt_id,prompt_type,helpfulness,harmlessness,sub_preferences")
SUB_COLUMNS = columns("", ",".join(SUB))
HARM_COLUMNS = columns("", ",".join(HARMS))


def read_safesora(path: Path, *, media: Path | None = None, source: str = SAFESORA.source, licence: str = SAFESORA.licence) -> Imported:
    """SafeSora's pairs, and the tags of their clips where the file has them. Raises UserError for a file that is none."""
    reading = Reading(SAFESORA.name, source, licence, media)
    return reading.collect(path, typed_rows(path, PAIR_COLUMNS, reading.unknown), _pair)


def read_safesora_label(path: Path, *, media: Path | None = None, source: str = LABEL.source, licence: str = LABEL.licence) -> Imported:
    """SafeSora-Label's tags, one clip a row. Raises UserError for a file that is none."""
    reading = Reading(LABEL.name, source, licence, media)
    return reading.collect(path, typed_rows(path, VIDEO_COLUMNS, reading.unknown), _tagged)


def _tagged(record: Record, reading: Reading) -> Said:
    prompt = _prompt(record, reading)
    clip, events = _video(record, reading, prompt)
    if not events:
        raise Skip("no tags")
    return Said(prompt, (clip,), events)


def _pair(record: Record, reading: Reading) -> Said:
    prompt = _prompt(record, reading)
    clips: list[Clip] = []
    events: list[RankingEvent] = []
    for name in PREFERRED:
        video = record.part(name, VIDEO_COLUMNS, reading.unknown)
        if video is None:
            raise record.wrong(name, "a video")
        if video.text("prompt_text") != prompt.text:
            raise Skip("a video of another prompt")
        clip, tags = _video(video, reading, prompt)
        clips.append(clip)
        events += tags
    task = reading.task(record.needed_key("pair_id"), named=True)
    sub = record.part("sub_preferences", SUB_COLUMNS, reading.unknown)
    answers = {name: record.one_of(name, PREFERRED) for name in ("helpfulness", "harmlessness")} | ({} if sub is None else _sub_answers(sub))
    for dimension, choice in answers.items():
        if choice is None:
            reading.skipped[f"no answer in {dimension}"] += 1
        else:
            events.append(reading.event(task, prompt, clips, dimension, choice=choice))
    return Said(prompt, clips, events)


def _sub_answers(sub: Record) -> dict[str, str | None]:
    answers: dict[str, str | None] = {}
    for name, dimension in SUB.items():
        if name in sub.values or dimension not in answers:
            choice = sub.one_of(name, PREFERRED)
            if None not in (choice, answers.get(dimension)) and choice != answers[dimension]:
                raise sub.wrong(name, f"the same answer as in its other spelling, {sub.values['information']}")
            answers[dimension] = choice or answers.get(dimension)
    return answers


def _prompt(record: Record, reading: Reading) -> Prompt:
    return reading.prompt(record.text("prompt_text"), safety_critical=record.one_of("prompt_type", PROMPT_TYPES) or False)


def _video(record: Record, reading: Reading, prompt: Prompt) -> tuple[Clip, list[RankingEvent]]:
    video_id = record.needed_key("video_id")
    clip = reading.clip(record.text("video_path") or f"{record.needed_key('prompt_id')}/{video_id}.mp4", prompt, generator=record.text("generated_from"))
    task = reading.task("video", video_id, named=True)
    events = []
    is_safe = record.flag("is_safe")
    if is_safe is not None:
        events.append(reading.event(task, prompt, (clip,), "safety", kind="tag", flags=("safe" if is_safe else "unsafe",)))
    labels = record.part("video_labels", HARM_COLUMNS, reading.unknown)
    if labels is not None:
        found = {harm: labels.flag(harm) for harm in HARMS}
        flags = tuple(f"unknown:{harm}" if known is None else harm for harm, known in found.items() if known is not False)
        events.append(reading.event(task, prompt, (clip,), "harm", kind="tag", flags=flags))
    return clip, events

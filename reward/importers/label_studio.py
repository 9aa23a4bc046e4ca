"""Label Studio's JSON (export format "JSON"), read and written: pairs (`Pairwise`, and `Choices` for what it cannot say) and rankings (`Ranker`).

    {"id": 7, "data": {"prompt": "...", "video1": "a.mp4", "video2": "b.mp4"}, "annotations": [{"completed_by": 3, "lead_time": 8.2, "result": [
        {"from_name": "overall", "to_name": "video1,video2", "type": "pairwise", "value": {"selected": "left"}}]}]}
    {"id": 8, "data": {"prompt": "...", "items": [{"id": "a", "video": "a.mp4"}, ...]}, "annotations": [{"result": [
        {"from_name": "overall", "to_name": "items", "type": "ranker", "value": {"ranker": {"overall": ["b", "a", "c"]}}}]}]}

The export does not hold the labeling configuration, so the task's data have to be called `prompt`, `video1` (left), `video2` (right) and `items`, as in

    <Video name="video1" value="$video1"/> <Video name="video2" value="$video2"/> <Pairwise name="overall" toName="video1,video2"/>

The name of the tag is the dimension. A Ranker without buckets gives a list from best to worst (older versions without the name around it); with buckets, a bucket is a
place, so buckets are called 1, 2, 3, ... (1 is best; who shares a bucket ties) and an item in no bucket is not ranked. A `Choices` tag answers a pair with `left`,
`right`, `tie`, `both_bad`, `both_good` or `invalid`; other choices, and other tags, are reported as unknown columns.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from base_model.checkpoint import atomic_write
from base_model.errors import UserError
from reward.comparisons import Clip, Comparisons, Prompt, RankingEvent
from reward.importers.reading import UNKNOWN, Imported, Origin, Reading, Said, Skip
from reward.importers.tables import ADVICE, Record, columns, shown, typed_rows
from reward.importers.writing import Exported, pairs

LABEL_STUDIO = Origin("label-studio", "label-studio", "", "https://labelstud.io/guide/export")
SELECTED = {"left": "A", "right": "B"}
CHOICES = SELECTED | {name: name for name in ("tie", "both_bad", "both_good", "invalid")}
SIDES = ("video1", "video2")
OURS = ("pairwise", "choices", "ranker")
IN_NO_BUCKET = "_"
LONGEST_SECONDS = 1e9

TASK_COLUMNS = columns(
    "id,data,annotations",
    "",
    "predictions,drafts,meta,created_at,updated_at,inner_id,project,updated_by,file_upload,total_annotations,cancelled_annotations,total_predictions,"
    "comment_count,unresolved_comment_count,last_comment_updated_at,comment_authors,agreement,allow_skip,overlap,is_labeled,precomputed_agreement",
)
DATA_COLUMNS = columns("prompt", "video1,video2,items")
ITEM_COLUMNS = columns("id", "video", "title,body,html")
ANNOTATION_COLUMNS = columns(
    "result",
    "id,completed_by,was_cancelled,ground_truth,created_at,lead_time",
    "updated_at,draft_created_at,prediction,result_count,unique_id,import_id,last_action,bulk_created,task,project,updated_by,parent_prediction,parent_annotation,"
    "last_created_by",
)
RESULT_COLUMNS = columns("type", "value,from_name,to_name", "id,origin,readonly,hidden,score,parent_id,from_id,to_id,direction")
PERSON_COLUMNS = columns("id", "", "email,first_name,last_name,username,avatar,initials")


def read_label_studio(path: Path, *, media: Path | None = None, source: str = LABEL_STUDIO.source, licence: str = LABEL_STUDIO.licence) -> Imported:
    """Answers of a project. `source` tells projects apart. Raises UserError for a file that is no such export."""
    reading = Reading(LABEL_STUDIO.name, source, licence, media)
    seen: dict[tuple[str, str], Any] = {}
    return reading.collect(path, typed_rows(path, TASK_COLUMNS, reading.unknown), lambda record, reading: _task(record, reading, seen))


def _task(record: Record, reading: Reading, seen: dict[tuple[str, str], Any]) -> Said:
    task = record.needed_key("id")
    data = record.part("data", DATA_COLUMNS, reading.unknown)
    if data is None:
        raise record.wrong("data", "the clips and their prompt")
    if seen.setdefault((task, ""), data.values) != data.values:
        raise UserError(f"an earlier task has the id {task} and other data, {record.place}. Keep one of them")
    prompt = reading.prompt(data.text("prompt"))
    two = [reading.clip(data.needed(side), prompt) for side in SIDES] if any(data.text(side) for side in SIDES) else []
    items: dict[str, Clip] = {}
    for value in data.several("items"):
        item = data.part_of(value, "items", ITEM_COLUMNS, reading.unknown)
        key = item.needed_key("id")
        if key in items:
            raise item.wrong("id", "an id that no other item has")
        items[key] = reading.clip(item.text("video") or key, prompt)
    if not two and not items:
        raise UserError(f"data holds neither video1 and video2 nor items, {record.place}. Name the task's data so")
    events: list[RankingEvent] = []
    if not record.several("annotations"):
        raise Skip("no annotation")
    for value in record.several("annotations"):
        annotation = record.part_of(value, "annotations", ANNOTATION_COLUMNS, reading.unknown)
        number = annotation.key("id")
        if number and (task, number) in seen:
            if seen[task, number] != value:
                raise UserError(f"annotation {number} is there twice and differs, {record.place}. Keep one of them")
            reading.skipped["the same annotation again"] += 1
        elif annotation.flag("was_cancelled"):
            reading.skipped["cancelled"] += 1
        else:
            events += _answers(annotation, reading, task, prompt, two, items)
        if number:
            seen[task, number] = value
    return Said(prompt, [*two, *items.values()], events)


def _answers(annotation: Record, reading: Reading, task: str, prompt: Prompt, two: list[Clip], items: dict[str, Clip]) -> list[RankingEvent]:
    by = annotation.value("completed_by")
    person = annotation.part_of(by, "completed_by", PERSON_COLUMNS, reading.unknown).needed_key("id") if isinstance(by, dict) else annotation.key("completed_by")
    seconds = annotation.number("lead_time", 0, LONGEST_SECONDS)
    lead_time_ms = None if seconds is None else round(seconds * 1000)
    flags = ("ground_truth",) if annotation.flag("ground_truth") else ()
    created_at = annotation.text("created_at")
    events: list[RankingEvent] = []
    for value in annotation.several("result"):
        result = annotation.part_of(value, "result", RESULT_COLUMNS, reading.unknown)
        kind = result.needed("type")
        dimension = result.needed("from_name") if kind in OURS else result.text("from_name")
        answer = _answer(result, reading, kind, dimension, two, items)
        if answer is None:
            reading.unknown.add(f"{result.prefix}{dimension or kind}")
            continue
        clips, choice, ranks = answer
        if any(event.dimension == dimension for event in events):
            raise result.wrong("from_name", "a tag that answers once")
        said = reading.event(
            *(task, prompt, clips, dimension),
            kind="rank" if choice is None else "pair",
            choice=choice,
            ranks=ranks,
            person=person,
            nth=reading.nth(task, person, dimension),
            lead_time_ms=lead_time_ms,
            flags=flags,
            created_at=created_at,
        )
        events.append(said)
    if not events:
        reading.skipped["no answer"] += 1
    return events


Answer = tuple[list[Clip], str | None, tuple[int | None, ...] | None]


def _answer(result: Record, reading: Reading, kind: str, dimension: str, two: list[Clip], items: dict[str, Clip]) -> Answer | None:
    """(clips, choice of a pair, ranks) of a result; None where it is none of ours."""
    if kind == "pairwise":
        value = result.part("value", columns("selected"), reading.unknown)
        choice = None if value is None else value.one_of("selected", SELECTED)
        if choice is None:
            raise result.wrong("value", "left or right as what was selected")
        return _two(result, two), choice, None
    if kind == "choices":
        value = result.part("value", columns("choices"), reading.unknown)
        chosen = [] if value is None else value.several("choices")
        if not any(isinstance(name, str) and name in CHOICES for name in chosen):
            return None
        if len(chosen) != 1:
            raise result.wrong("value", f"one of {', '.join(CHOICES)}")
        return _two(result, two), CHOICES[chosen[0]], None
    if kind == "ranker":
        places = _places(result, dimension, reading.unknown)
        wrong = [item for item, n in Counter(item for _, item in places).items() if n > 1 or item not in items]
        if wrong or len(items) < 2:
            raise result.wrong("value", f"a ranking of the {len(items)} items, each once{f', not {shown(wrong[0])}' if wrong else ''}")
        place_of = {item: place for place, item in places}
        ranks = tuple(place_of.get(item) for item in items)
        if any(rank is not None and rank > len(items) for rank in ranks):
            raise result.wrong("value", f"buckets from 1 to {len(items)}")
        return list(items.values()), None, ranks
    return None


def _two(result: Record, two: list[Clip]) -> list[Clip]:
    if not two:
        raise UserError(f"an answer about a pair where data holds no video1 and video2, {result.place}. Name the task's data so")
    to_name = result.value("to_name")
    names = [name.strip() for name in to_name.split(",")] if isinstance(to_name, str) else to_name
    if names == list(SIDES[::-1]):
        raise result.wrong("to_name", "video1,video2: left and right cannot be told otherwise")
    return two


def _places(result: Record, dimension: str, unknown: set[str]) -> list[tuple[int | None, str]]:
    """(place, item) of a ranking; place None for items that were put nowhere."""
    value = result.part("value", columns("ranker"), unknown)
    ranker = None if value is None else value.value("ranker")
    if isinstance(ranker, dict) and set(ranker) == {dimension}:
        if dimension.isdecimal():
            raise result.wrong("from_name", "no number: whether the ranker has buckets cannot be told")
        ranker = ranker[dimension]
    if isinstance(ranker, list):
        return [(place, _item(result, item)) for place, item in enumerate(ranker, 1)]
    if not isinstance(ranker, dict):
        raise result.wrong("value", "a list of items or a mapping of buckets under ranker")
    places: list[tuple[int | None, str]] = []
    for bucket, inside in ranker.items():
        place = int(bucket) if bucket.isascii() and bucket.isdecimal() and len(bucket) < 6 else None
        if not isinstance(inside, list) or (place is None and bucket != IN_NO_BUCKET) or place == 0 or (place is not None and str(place) != bucket):
            raise UserError(f"bucket {shown(bucket)} holds {shown(inside)}, {result.place}. Call buckets 1, 2, 3, ...: 1 is best; each holds a list of items")
        places += [(place, _item(result, item)) for item in inside]
    return places


def _item(result: Record, item: Any) -> str:
    if isinstance(item, bool) or not isinstance(item, str | int):
        raise UserError(f"{shown(item)} is ranked, which is no item's id, {result.place}. {ADVICE}")
    return str(item)


# Writing


def write_label_studio(data: Comparisons, path: Path) -> Exported:
    """Tasks with their annotations, for import into a project or for `read_label_studio`: one task for each set of clips that was asked about.

    Pairs and rankings keep task, person, dimension, answer, time and seconds. What the format has no room for is left out and counted.
    """
    left_out: Counter[str] = Counter()
    tasks: dict[tuple[str, str, bool, frozenset[str]], list[RankingEvent]] = defaultdict(list)
    for event in data.events:
        if event.skipped_reason:
            left_out["skipped by the person"] += 1
        elif event.kind not in ("pair", "rank"):
            left_out[f"kind {event.kind}"] += 1
        elif event.kind == "rank" and event.dimension.isdecimal():
            left_out[f"a ranking in a dimension called {event.dimension}"] += 1
        elif event.kind == "pair" and not list(pairs(event, Counter())):
            left_out["a pair without an answer"] += 1
        else:
            tasks[event.task_id, event.prompt_id, event.kind == "pair", frozenset(event.clip_ids)].append(event)
    written = [_written_task(data, task_id, prompt_id, is_pair, events) for (task_id, prompt_id, is_pair, _), events in tasks.items()]
    atomic_write(path, (json.dumps(written, ensure_ascii=False, indent=1) + "\n").encode())
    return Exported(len(written), left_out)


def _written_task(data: Comparisons, task_id: str, prompt_id: str, is_pair: bool, events: Sequence[RankingEvent]) -> dict[str, Any]:
    clip_ids = events[0].clip_ids
    paths = [data.clips[clip_id].path for clip_id in clip_ids]
    about: dict[str, Any] = dict(zip(SIDES, paths, strict=True)) if is_pair else {"items": [{"id": str(i), "video": path} for i, path in enumerate(paths, 1)]}
    annotations: list[list[RankingEvent]] = []  # of one person and sitting, one answer a dimension
    for event in events:
        fits = (group for group in annotations if _sitting(group[0]) == _sitting(event) and all(other.dimension != event.dimension for other in group))
        group = next(fits, None)
        if group is None:
            annotations.append([event])
        else:
            group.append(event)
    return {
        "id": _number(task_id),
        "data": {"prompt": data.prompts[prompt_id].text, **about},
        "annotations": [_written_annotation(number, group, clip_ids) for number, group in enumerate(annotations, 1)],
    }


def _number(name: str) -> int | str:
    """A name as the number it is: Label Studio's own ids are numbers."""
    return int(name) if re.fullmatch(r"0|[1-9][0-9]{0,17}", name) else name


def _sitting(event: RankingEvent) -> tuple[object, ...]:
    return event.annotator_id, event.created_at, event.lead_time_ms, "ground_truth" in event.flags


def _written_annotation(number: int, events: Sequence[RankingEvent], clip_ids: tuple[str, ...]) -> dict[str, Any]:
    first = events[0]
    name = first.annotator_id.removeprefix(f"{first.source_dataset}/")
    return {
        "id": number,
        "completed_by": None if name == UNKNOWN else _number(name),
        "was_cancelled": False,
        "ground_truth": "ground_truth" in first.flags,
        "created_at": first.created_at,
        "lead_time": None if first.lead_time_ms is None else first.lead_time_ms / 1000,
        "result": [_written_result(event, clip_ids) for event in events],
    }


def _written_result(event: RankingEvent, clip_ids: tuple[str, ...]) -> dict[str, Any]:
    if event.kind == "rank":
        rank_of = dict(zip(event.clip_ids, event.ranks, strict=True))
        buckets: dict[str, list[str]] = defaultdict(list)
        for i, clip_id in enumerate(clip_ids, 1):
            rank = rank_of[clip_id]
            buckets[IN_NO_BUCKET if rank is None else str(rank)].append(str(i))
        return {"from_name": event.dimension, "to_name": "items", "type": "ranker", "value": {"ranker": dict(sorted(buckets.items()))}}
    (first, _, choice), *_ = pairs(event, Counter())
    if first != clip_ids[0]:
        choice = {"A": "B", "B": "A"}.get(choice, choice)
    selected = next(name for name, meaning in CHOICES.items() if meaning == choice)
    value = {"selected": selected} if selected in SELECTED else {"choices": [selected]}
    return {"from_name": event.dimension, "to_name": ",".join(SIDES), "type": "pairwise" if selected in SELECTED else "choices", "value": value}

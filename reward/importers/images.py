"""Preferences over images, which are clips of one frame: Pick-a-Pic v2 (pairs, parquet), PickaPic-rankings (the best of four), HPDv2 (JSON).

    caption, image_0_uid, image_1_uid, label_0, label_1, has_label, ranking_id, user_id, model_0, model_1, best_image_uid, created_at, ...    Pick-a-Pic v2
    ranking_id, created_at, user_id, image_1_uid, ..., image_4_uid, best_image_uid, prompt                                                   PickaPic-rankings
    human_preference, prompt, file_path, user_hash                                                                                            HPDv2 train
    prompt, image_path, rank, raw_annotation [{rank, user_hash}]                                                                              HPDv2 test

Labels of Pick-a-Pic are 1 and 0, or 0.5 and 0.5 for a tie; rows with `has_label` false are left out. The pictures inside its files are not read.

The best of several is an event of kind "best": rank 1 for the chosen clip and no rank for the others, which nobody compared. So it is no ranking with ties, and a
likelihood of rankings that knows no "best" learns nothing from it rather than something wrong.

HPDv2's `rank` holds a place for each image, lower is better. Each person's ranking in `raw_annotation` (the project's README calls it `raw_annotations`, some files
`annotation` what it calls `rank`) is one event; where a row has none, the averaged `rank` is one, with the flag "aggregated".
"""

from __future__ import annotations

from pathlib import Path

from reward.comparisons import Clip, Prompt, RankingEvent
from reward.importers.reading import Imported, Origin, Reading, Said, Skip
from reward.importers.tables import Record, columns, typed_rows

PICKAPIC = Origin("pickapic", "yuvalkirstain/pickapic_v2", "", "https://huggingface.co/datasets/yuvalkirstain/pickapic_v2")
RANKINGS = Origin("pickapic-rankings", "yuvalkirstain/PickaPic-rankings", "", "https://huggingface.co/datasets/yuvalkirstain/PickaPic-rankings")
HPD_TRAIN = Origin("hpdv2-train", "ymhao/HPDv2", "Apache-2.0", "https://huggingface.co/datasets/ymhao/HPDv2")
HPD_TEST = Origin("hpdv2-test", HPD_TRAIN.source, HPD_TRAIN.licence, HPD_TRAIN.homepage)

LABELS = {(1.0, 0.0): "A", (0.0, 1.0): "B", (0.5, 0.5): "tie"}
FOUR = tuple(f"image_{i}_uid" for i in range(1, 5))
MOST_PLACES = 1000

PICKAPIC_COLUMNS = columns(
    "caption,has_label,image_0_uid,image_1_uid,label_0,label_1,ranking_id",
    "best_image_uid,created_at,model_0,model_1,user_id",
    "are_different,image_0_url,image_1_url,jpg_0,jpg_1,num_example_per_prompt,__index_level_0__",
)
RANKINGS_COLUMNS = columns(f"ranking_id,best_image_uid,prompt,{','.join(FOUR)}", "created_at,user_id")
HPD_TRAIN_COLUMNS = columns("human_preference,prompt,file_path", "user_hash")
HPD_TEST_COLUMNS = columns("prompt,image_path,rank", "raw_annotation,raw_annotations")
ANNOTATION_COLUMNS = columns("user_hash", "rank,annotation")


def read_pickapic(path: Path, *, media: Path | None = None, source: str = PICKAPIC.source, licence: str = PICKAPIC.licence) -> Imported:
    """Pick-a-Pic v2, with or without pictures. Raises UserError for another file."""
    reading = Reading(PICKAPIC.name, source, licence, media)
    return reading.collect(path, typed_rows(path, PICKAPIC_COLUMNS, reading.unknown), _pair)


def read_pickapic_rankings(path: Path, *, media: Path | None = None, source: str = RANKINGS.source, licence: str = RANKINGS.licence) -> Imported:
    """PickaPic-rankings: the best of up to four. Raises UserError for another file."""
    reading = Reading(RANKINGS.name, source, licence, media)
    return reading.collect(path, typed_rows(path, RANKINGS_COLUMNS, reading.unknown), _best_of_four)


def read_hpdv2_train(path: Path, *, media: Path | None = None, source: str = HPD_TRAIN.source, licence: str = HPD_TRAIN.licence) -> Imported:
    """HPDv2's `train.json`: one preferred image. Raises UserError for another file."""
    reading = Reading(HPD_TRAIN.name, source, licence, media)
    return reading.collect(path, typed_rows(path, HPD_TRAIN_COLUMNS, reading.unknown), _preferred)


def read_hpdv2_test(path: Path, *, media: Path | None = None, source: str = HPD_TEST.source, licence: str = HPD_TEST.licence) -> Imported:
    """HPDv2's `test.json`: rankings by several people. Raises UserError for another file."""
    reading = Reading(HPD_TEST.name, source, licence, media)
    return reading.collect(path, typed_rows(path, HPD_TEST_COLUMNS, reading.unknown), _ranked)


def _pair(record: Record, reading: Reading) -> Said:
    if not record.flag("has_label"):
        raise Skip("has_label is false")
    prompt = reading.prompt(record.text("caption"))
    uids = [record.needed(f"image_{i}_uid") for i in (0, 1)]
    clips = [reading.clip(uid, prompt, generator=record.text(f"model_{i}"), num_frames=1) for i, uid in enumerate(uids)]
    first, second = record.number("label_0", 0, 1), record.number("label_1", 0, 1)
    if first is None or second is None:
        raise Skip("no answer in overall")
    choice = LABELS.get((first, second))
    if choice is None:
        raise record.wrong("label_0", f"1, 0 or 0.5 that makes one with label_1 ({record.value('label_1')})")
    best = record.text("best_image_uid")
    if choice != "tie" and best in uids and best != uids["AB".index(choice)]:
        raise Skip("labels and best_image_uid contradict each other")
    task = reading.task(record.needed_key("ranking_id"), *uids, named=True)
    return Said(prompt, clips, (reading.event(task, prompt, clips, "overall", choice=choice, person=record.key("user_id"), created_at=record.moment("created_at")),))


def _best_of_four(record: Record, reading: Reading) -> Said:
    prompt = reading.prompt(record.text("prompt"))
    uids = [record.needed(name) for name in FOUR if record.text(name)]
    best = record.text("best_image_uid")
    if not best:
        raise Skip("no answer in overall")
    if best not in uids:
        raise record.wrong("best_image_uid", "one of the images of its row")
    clips = [reading.clip(uid, prompt, num_frames=1) for uid in uids]
    task = reading.task(record.needed_key("ranking_id"), named=True)
    return Said(prompt, clips, (_best(reading, task, prompt, clips, uids.index(best), record.key("user_id"), record.moment("created_at")),))


def _best(reading: Reading, task: str, prompt: Prompt, clips: list[Clip], index: int, person: str, created_at: str = "") -> RankingEvent:
    if len(clips) < 2:
        raise Skip("one image alone")
    ranks = tuple(1 if i == index else None for i in range(len(clips)))
    return reading.event(task, prompt, clips, "overall", kind="best", ranks=ranks, person=person, created_at=created_at)


def _preferred(record: Record, reading: Reading) -> Said:
    prompt = reading.prompt(record.text("prompt"))
    paths = _texts(record, "file_path")
    clips = [reading.clip(path, prompt, num_frames=1) for path in paths]
    marks = record.several("human_preference")
    if len(marks) != len(paths) or any(isinstance(mark, bool) or mark not in (0, 1) for mark in marks) or sum(marks) != 1:
        raise record.wrong("human_preference", f"a 1 and else 0, one for each of the {len(paths)} images")
    person, index = record.key("user_hash"), marks.index(1)
    task = reading.task(*(clip.clip_id for clip in clips), prompt.prompt_id, person)
    if len(clips) == 2:
        return Said(prompt, clips, (reading.event(task, prompt, clips, "overall", choice="AB"[index], person=person),))
    return Said(prompt, clips, (_best(reading, task, prompt, clips, index, person),))


def _ranked(record: Record, reading: Reading) -> Said:
    prompt = reading.prompt(record.text("prompt"))
    paths = _texts(record, "image_path")
    clips = [reading.clip(path, prompt, num_frames=1) for path in paths]
    if len(clips) < 2:
        raise Skip("one image alone")
    averaged = _places(record, "rank", len(clips))
    name = "raw_annotation" if record.several("raw_annotation") else "raw_annotations"
    task = reading.task(*(clip.clip_id for clip in clips), prompt.prompt_id)
    events = []
    for value in record.several(name):
        answer = record.part_of(value, name, ANNOTATION_COLUMNS, reading.unknown)
        ranks = _places(answer, "rank" if answer.value("rank") is not None else "annotation", len(clips))
        person = answer.needed_key("user_hash")
        events.append(reading.event(task, prompt, clips, "overall", kind="rank", ranks=ranks, person=person, nth=reading.nth(task, person)))
    if not events:
        events.append(reading.event(task, prompt, clips, "overall", kind="rank", ranks=averaged, flags=("aggregated",)))
    return Said(prompt, clips, events)


def _places(record: Record, name: str, k: int) -> tuple[int, ...]:
    """Ranks 1.. without gaps from places that begin anywhere."""
    places = record.several(name)
    if len(places) != k or not all(isinstance(place, int) and not isinstance(place, bool) and 0 <= place <= MOST_PLACES for place in places):
        raise record.wrong(name, f"a place for each of the {k} images")
    order = sorted(set(places))
    return tuple(order.index(place) + 1 for place in places)


def _texts(record: Record, name: str) -> list[str]:
    values = record.several(name)
    return [Record({name: value}, record.place).needed(name) for value in values]

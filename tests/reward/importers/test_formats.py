"""What becomes of every format's fixture, written out by hand, and what is refused."""

from __future__ import annotations

import gzip
import hashlib
import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from base_model.errors import UserError
from reward.comparisons import RankingEvent, load_comparisons, write_comparisons
from reward.importers.formats import FORMATS
from reward.importers.reading import Imported
from tests.reward.importers.reference import COLUMNS, VISION

FIXTURES = Path(__file__).parents[1] / "fixtures"
CAT, FIGHT = 'A cat, "sleeping" on a sofa 猫', "A street fight"
NONE = None


def fixture(name: str) -> Path:
    (path,) = FIXTURES.glob(f"{name}.*")
    return path


def told(imported: Imported, *, prompts: bool = False) -> list[tuple[Any, ...]]:
    """(clips, dimension, answer) of every event; the answer is its choice, else its ranks, likert and flags as far as there are any."""
    path = {clip.clip_id: clip.path.rpartition("/")[2].removesuffix(".mp4") for clip in imported.clips}
    text = {prompt.prompt_id: prompt.text for prompt in imported.prompts}
    out = []
    for e in imported.events:
        assert len(e.event_id) == 64 and e.source_dataset == imported.source and e.licence == imported.licence and e.annotator_id.startswith(f"{e.source_dataset}/")
        said = e.choice or e.likert or e.flags or (e.ranks if any(e.ranks) else ())
        out.append((*((text[e.prompt_id],) if prompts else ()), " ".join(path[clip_id] for clip_id in e.clip_ids), e.dimension, said))
    return out


def people(imported: Imported) -> list[str]:
    return [person.annotator_id.removeprefix(f"{imported.source}/") for person in imported.annotators]


def read_rows(name: str, rows: list[Any], folder: Path, **options: Any) -> Imported:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(rows))
    return FORMATS[name].read(path, **options)


def rows_of(name: str) -> list[dict[str, Any]]:
    content = fixture(name).read_text()
    return json.loads(content) if content.startswith("[") else [json.loads(line) for line in content.splitlines()]


def test_videogen_rewardbench() -> None:
    got = FORMATS["videogen-rewardbench"].read(fixture("videogen-rewardbench"))
    girl, bear = 'A girl, in a "pink" dress, walks.', "Ein Bär tanzt im Schnee 🐻"
    assert told(got, prompts=True) == [
        *((girl, "kling_0 gen2_0", d, c) for d, c in (("VQ", "A"), ("MQ", "tie"), ("TA", "B"), ("Overall", "A"))),
        *((girl, "gen2_0 luma_0", d, c) for d, c in (("VQ", "B"), ("MQ", "B"), ("Overall", "tie"))),
        *((bear, "kling_1 luma_1", d, c) for d, c in (("VQ", "tie"), ("MQ", "A"), ("TA", "A"), ("Overall", "B"))),
        *((bear, "luma_1 gen2_1", d, c) for d, c in (("VQ", "A"), ("MQ", "A"), ("TA", "A"), ("Overall", "A"))),
    ]
    assert got.events[0].ranks == (1, 2) and got.events[1].ranks == (1, 1) and got.events[2].ranks == (2, 1)
    assert {event.task_id for event in got.events[:4]} == {got.events[0].task_id} != {got.events[4].task_id}
    assert got.skipped == {"no answer in TA": 1} and got.unknown_columns == () and got.rows == 4 and got.repeated == 0
    about = {clip.path: (clip.generator, clip.fps, clip.num_frames, clip.licence) for clip in got.clips}
    assert about["videos/kling_0.mp4"] == ("kling", 24.0, 126, "Apache-2.0")
    assert about["videos/luma_1.mp4"] == ("luma", 24.0, 120, "Apache-2.0"), "the second row knows what the first left empty"
    assert got.events[0].licence == "Apache-2.0" and people(got) == ["unknown"]


def test_videoalign() -> None:
    got = FORMATS["videoalign"].read(fixture("videoalign"))
    one, two, three = "example_1_A example_1_B", "example_2_A example_2_B", "example_3_A example_3_B"
    assert told(got) == [
        *((one, "VQ", "B"), (one, "MQ", "B"), (one, "TA", "A"), (one, "VQ", (2.0, 4.0)), ("example_1_A", "MQ", (3.5,))),
        *((two, "VQ", "tie"), (two, "MQ", "invalid"), (two, "TA", "A"), (two, "TA", (5.0, 1.0))),
        *((three, "VQ", "A"), (three, "TA", "tie"), (three, "VQ", "B"), (three, "TA", "tie")),
    ]
    assert got.events[6].ranks == (None, None) and [event.kind for event in got.events[:5]] == ["pair", "pair", "pair", "likert", "likert"]
    assert got.prompts[1].text == 'The "camera" follows\nan explorer, по городу'
    assert got.repeated == 1, "two people, or one row twice: nothing tells, so both answers are kept and counted"
    assert got.licence == "" and got.source == "videoalign"


@pytest.mark.parametrize("rating", ["0", "0.9", "5.1", "6", "-3"])
def test_a_rating_of_videoalign_outside_1_to_5_is_refused(rating: str, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text(fixture("videoalign").read_text().replace(",2,4,3.5,", f",{rating},4,3.5,"))
    with pytest.raises(UserError, match=r"MOS_A_VQ is .*, expected a finite number from 1 to 5, row 1"):
        FORMATS["videoalign"].read(tmp_path / "labels.csv")


def test_safesora_with_both_spellings_of_informativeness() -> None:
    got = FORMATS["safesora"].read(fixture("safesora"))
    one, two, three = "v-1 v-2", "v-3 v-4", "v-2 v-5"
    assert told(got, prompts=True) == [
        *((CAT, "v-1", "safety", ("safe",)), (CAT, "v-1", "harm", ())),
        *((CAT, one, d, c) for d, c in (("helpfulness", "B"), ("harmlessness", "A"), ("instruction_following", "B"), ("correctness", "B"), ("informativeness", "A"))),
        *((FIGHT, "v-3", "safety", ("unsafe",)), (FIGHT, "v-3", "harm", ("violence", "unknown:racism", "crime"))),
        *((FIGHT, two, "helpfulness", "A"), (FIGHT, two, "harmlessness", "B"), (FIGHT, two, "informativeness", "A")),
        (CAT, three, "helpfulness", "A"),
    ]
    assert {prompt.text: prompt.safety_critical for prompt in got.prompts} == {CAT: False, FIGHT: True}
    assert {clip.path for clip in got.clips} >= {"pr-1/v-1.mp4", "pr-2/v-4.mp4"}, "a path that is not given is where the dataset's loader looks for the clip"
    assert got.licence == "CC-BY-NC-4.0" and sum(got.skipped.values()) == 5


def test_safesora_spellings_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    rows = rows_of("safesora")
    rows[0]["sub_preferences"]["informativeness"] = "video_1"
    with pytest.raises(UserError, match=r"sub_preferences.informativeness is 'video_1', expected the same answer .* row 1"):
        read_rows("safesora", rows, tmp_path)
    for other in ("video_0", None):
        rows[0]["sub_preferences"]["informativeness"] = other
        assert read_rows("safesora", rows, tmp_path).events == FORMATS["safesora"].read(fixture("safesora")).events


def test_safesora_label() -> None:
    got = FORMATS["safesora-label"].read(fixture("safesora-label"))
    assert told(got) == [
        *(("v-1", "safety", ("safe",)), ("v-1", "harm", ())),
        *(("v-3", "safety", ("unsafe",)), ("v-3", "harm", ("violence", "unknown:racism", "animal_abuse", "other_harmful"))),
        ("v-6", "safety", ("safe",)),
    ]
    assert got.skipped == {"no tags": 1} and {event.kind for event in got.events} == {"tag"}


def test_videofeedback() -> None:
    got = FORMATS["videofeedback"].read(fixture("videofeedback"))
    names = ("visual quality", "temporal consistency", "dynamic degree", "text-to-video alignment", "factual consistency")
    assert told(got) == [
        *(("6000001", name, (score,)) for name, score in zip(names, (3.0, 2.0, 4.0, 1.0, 3.0), strict=True)),
        *(("p000002", name, (score,)) for name, score in zip(names, (4.0, None, 2.0, 2.0, 2.0), strict=True) if score),
    ]
    assert got.skipped == {"no answer in temporal consistency": 1, "no prompt": 1} and {event.kind for event in got.events} == {"likert"}


def test_visionreward_train() -> None:
    got = FORMATS["visionreward-train"].read(fixture("visionreward-train"))
    first = [
        *(("alignment", 5.0), ("composition", 3.0), ("focus", 1.0), ("camera movement", 2.0), ("color", 4.0), ("lighting accurate", 4.0), ("lighting aes", 1.0)),
        *(("shape at beginning", 0.0), ("shape throughout", 4.0), ("object motion dynamic", 2.0), ("camera motion dynamic", 5.0), ("movement smoothness", 0.0)),
        *(("movement reality", 3.0), ("clear", 5.0), ("image quality stability", 4.0), ("camera stability", 3.0), ("detail refinement", 2.0), ("letters", 4.0)),
        *(("physics law", 1.0), ("safety", 5.0)),
    ]
    mine = [event for event in told(got) if event[0] == "0001"]
    assert sorted(mine) == sorted([*(("0001", d, (score,)) for d, score in first), ("0001", "unsafe type", ("type 5",))])
    assert {event.dimension for event in got.events if event.kind == "tag"} == {"unsafe type"}, "a kind of harm is no amount"
    assert len(got.events) == 21 + 19 + 21 and got.skipped == {"no answer in composition": 1, "no answer in unsafe type": 1}


def test_visionreward_pairs() -> None:
    got = FORMATS["visionreward-pairs"].read(fixture("visionreward-pairs"))
    assert told(got) == [("1_a 1_b", "overall", "A"), ("2_a 2_b", "overall", "B"), ("3_a 3_b", "overall", "tie")]
    assert got.skipped == {"no answer in overall": 1}


@pytest.mark.parametrize("answer", ["video_1", "1", "Video1", "video1 ", "same"])
def test_a_standard_answer_of_unknown_meaning_is_refused(answer: str, tmp_path: Path) -> None:
    rows = rows_of("visionreward-pairs")
    rows[2]["standard_answer"] = answer
    with pytest.raises(UserError, match=r"standard_answer is .*, expected one of video1, video2, tie, row 3, .*visionreward-pairs.json"):
        read_rows("visionreward-pairs", rows, tmp_path)


def test_genai_bench() -> None:
    got = FORMATS["genai-bench"].read(fixture("genai-bench"))
    assert told(got) == [("1 1", "overall", "A"), ("1 1", "overall", "tie"), ("2 2", "overall", "both_bad"), ("2 2", "overall", "B")]
    assert got.events[2].ranks == (1, 1) and got.repeated == 1 and {clip.generator for clip in got.clips} == {"AnimateDiff", "LaVie", "CogVideoX"}
    without = [{key: value for key, value in row.items() if not key.endswith("_model")} for row in rows_of("genai-bench")]
    assert without[0].keys() == {"prompt", "left_video", "right_video", "vote_type"}


def test_pickapic() -> None:
    got = FORMATS["pickapic"].read(fixture("pickapic"))
    assert told(got) == [("uid-a uid-b", "overall", "A"), ("uid-b uid-c", "overall", "B"), ("uid-d uid-e", "overall", "tie")]
    assert got.skipped == {"has_label is false": 1, "labels and best_image_uid contradict each other": 1}
    assert people(got) == ["7", "unknown"] and got.events[0].created_at == "2023-06-01T10:00:00.250000"
    assert {(clip.num_frames, clip.generator) for clip in got.clips} == {(1, "sdxl"), (1, "dreamlike"), (1, "")} and got.licence == ""


def test_the_best_of_four_ranks_nobody_else(tmp_path: Path) -> None:
    """A likelihood of rankings that knows no "best" must not read that three images tie, nor that they are worse by a known place."""
    from reward.agreement import pairs_of

    got = FORMATS["pickapic-rankings"].read(fixture("pickapic-rankings"))
    assert told(got) == [("u-1 u-2 u-3 u-4", "overall", (NONE, NONE, 1, NONE)), ("u-5 u-6", "overall", (1, NONE))]
    assert got.skipped == {"no answer in overall": 1} and {event.kind for event in got.events} == {"best"} and people(got) == ["3"]
    assert got.events[0].dense_ranks == (0, 0, 1, 0) and pairs_of(got.events) == []
    write_comparisons(tmp_path, got.events, clips=got.clips, prompts=got.prompts, annotators=got.annotators)
    for ranks in ((1, 2, 2, 2), (None, None, None, None), (1, None, 1, None), (2, None, None, None)):
        with pytest.raises(UserError, match="the best of several has rank 1 and the others none"):
            write_comparisons(tmp_path, [replace(got.events[0], event_id="other", ranks=ranks)], clips=[], prompts=[])


def test_hpdv2() -> None:
    train = FORMATS["hpdv2-train"].read(fixture("hpdv2-train"))
    assert told(train) == [
        ("00001.jpg 00002.jpg", "overall", "A"),
        ("00003.jpg 00004.jpg", "overall", "B"),
        ("00003.jpg 00004.jpg 00005.jpg", "overall", (NONE, NONE, 1)),
    ]
    assert train.skipped == {"a clip against itself": 1} and people(train) == ["aa11", "bb22", "unknown"]
    test = FORMATS["hpdv2-test"].read(fixture("hpdv2-test"))
    assert [(event.annotator_id.rpartition("/")[2], event.ranks, event.flags) for event in test.events] == [
        ("u1", (2, 1, 3), ()),
        ("u2", (1, 1, 2), ()),
        ("u1", (2, 1), ()),
        ("unknown", (2, 3, 1, 2), ("aggregated",)),
    ]


def test_datapoint_motion() -> None:
    got = FORMATS["datapoint-motion"].read(fixture("datapoint-motion"))
    assert [(e.dimension, e.choice, e.likert, e.confidence, e.flags) for e in got.events] == [
        ("Coherence", "A", (0.62, 0.38), 0.62, ("aggregated",)),
        ("Aesthetic", "tie", (0.5, 0.5), 0.5, ("aggregated",)),
        ("Prompt_Adherence", "B", (0.1, 0.9), 0.9, ("aggregated",)),
        ("Coherence", "A", (1.0, 0.0), 1.0, ("aggregated",)),
    ]
    assert got.skipped == {"no answer in Aesthetic": 1, "no answer in Prompt_Adherence": 1}


def test_datapoint_videos_inside_the_file_are_known_by_their_content(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = rows_of("datapoint-motion")
    for row, name in ((row, f"video{i}") for row in rows for i in (1, 2)):
        row[name] = {"bytes": f"the file {row[name]}".encode(), "path": row[name] if name == "video1" else None}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "motion.parquet")
    got = FORMATS["datapoint-motion"].read(tmp_path / "motion.parquet")
    ids = [hashlib.sha256(f"the file {path}".encode()).hexdigest() for path in ("sora/1.mp4", "veo/1.mp4")]
    assert got.events[0].clip_ids == tuple(ids) and got.found == 4 and [clip.path for clip in got.clips[:2]] == ["sora/1.mp4", ids[1]]


def test_label_studio() -> None:
    got = FORMATS["label-studio"].read(fixture("label-studio"))
    assert told(got) == [
        *(("a b", "overall", "A"), ("a b", "motion", "B"), ("a b", "overall", "both_bad")),
        *(("c d e", "overall", (2, 3, 1)), ("c d e", "overall", (1, 1, NONE)), ("c d e", "overall", (2, 1, 3))),
    ]
    assert [(e.task_id, e.annotator_id, e.lead_time_ms, e.created_at, e.flags) for e in got.events] == [
        ("7", "label-studio/3", 8250, "2025-01-02T00:00:00Z", ()),
        ("7", "label-studio/3", 8250, "2025-01-02T00:00:00Z", ()),
        ("7", "label-studio/4", 3000, "2025-01-03T00:00:00Z", ("ground_truth",)),
        ("8", "label-studio/3", 20500, "2025-01-04T00:00:00Z", ()),
        ("8", "label-studio/4", None, "2025-01-05T00:00:00Z", ()),
        ("8", "label-studio/5", 2000, "2025-01-05T00:00:00Z", ()),
    ]
    assert got.skipped == {"cancelled": 1, "no annotation": 1} and "somebody@example.org" not in repr(got)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"ranker": {"best": ["x"], "ads": ["y"]}}, r"bucket 'best' holds \['x'\], row 1"),
        ({"ranker": {"overall": ["x", "x", "y"]}}, "each once, not 'x'"),
        ({"ranker": {"overall": ["x", "q"]}}, "each once, not 'q'"),
        ({"ranker": {"1": ["x"], "4": ["y"]}}, "buckets from 1 to 3"),
        ({"ranker": {"01": ["x"]}}, "bucket '01'"),
        ({"ranker": "x"}, "expected a list of items or a mapping of buckets"),
        ({}, "value.ranker is missing"),
    ],
)
def test_a_ranker_without_an_order_is_refused(value: Any, message: str, tmp_path: Path) -> None:
    task = rows_of("label-studio")[1]
    task["annotations"] = [{"result": [{"from_name": "overall", "type": "ranker", "value": value}]}]
    with pytest.raises(UserError, match=message):
        read_rows("label-studio", [task], tmp_path)


def test_other_results_of_label_studio_are_reported(tmp_path: Path) -> None:
    task = rows_of("label-studio")[0]
    task["annotations"][0]["result"] += [
        {"from_name": "why", "type": "textarea", "value": {"text": ["it moves"]}},
        {"from_name": "seen", "type": "choices", "value": {"choices": ["yes"]}},
        {"from_id": "r1", "to_id": "r2", "type": "relation", "direction": "right"},
    ]
    got = read_rows("label-studio", [task], tmp_path)
    assert got.unknown_columns == ("annotations.result.relation", "annotations.result.seen", "annotations.result.why") and len(got.events) == 3
    task["annotations"][0]["result"][0]["to_name"] = "video2,video1"
    with pytest.raises(UserError, match="left and right cannot be told"):
        read_rows("label-studio", [task], tmp_path)


def test_trl() -> None:
    got = FORMATS["trl"].read(fixture("trl"))
    assert told(got) == [("a b", "overall", "A"), ("c a", "overall", "A"), ("d e", "overall", "A"), ("d e", "overall", "A")] and got.repeated == 1


def test_messages_in_place_of_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"chosen is .*, expected a text, row 1"):
        read_rows("trl", [{"prompt": "p", "chosen": [{"role": "assistant", "content": "a.mp4"}], "rejected": "b.mp4"}], tmp_path)


WRONG: list[tuple[str, str, Any]] = [
    *(("videofeedback", "visual quality", value) for value in (0, 5, 4.5, "3", True)),
    *(("visionreward-train", f"annotation.{field}", value) for (low, high), fields in VISION.items() for field in fields.split(",") for value in (low - 1, high + 1)),
    *(("visionreward-train", f"annotation.{field}", value) for field in ("alignment", "safety") for value in (2.5, "3", True)),
    *(("datapoint-motion", "weighted_results1_Coherence", value) for value in (-0.1, 1.1, 0.64, "0.62", True)),
    *(("pickapic", "label_0", value) for value in (0.0, 0.5, 0.7, 2, "1")),
    *(("pickapic", "has_label", value) for value in (1, "true")),
    *(("pickapic-rankings", "best_image_uid", value) for value in ("u-9", "tie", 3)),
    *(("hpdv2-train", "human_preference", value) for value in ([0, 0], [1, 1], [1], [1, 0, 0], [2, -1], ["1", "0"], [True, False], "10")),
    *(("hpdv2-test", "rank", value) for value in ([1, 2], [1, 2, 3, 4], [1.5, 2, 3], [-1, 1, 2], ["1", "2", "3"], [True, 2, 3])),
    *(("hpdv2-test", "raw_annotations", value) for value in ([{"rank": [1, 2], "user_hash": "u"}], [{"rank": [1, 2, 3]}], [[1, 2, 3]], [{"rank": [1, 2, 3], "user_hash": ""}])),
    *(("genai-bench", "vote_type", value) for value in ("left", "A", "tie", 1)),
    *(("safesora", "harmlessness", value) for value in ("video_2", "safe", 0, True)),
    *(("safesora-label", "is_safe", value) for value in ("true", 1)),
    *(("safesora-label", "video_labels.porn", value) for value in ("no", 0)),
    *(("safesora-label", "prompt_type", value) for value in ("critical", True)),
    *(("label-studio", "annotations", value) for value in ("none", [7], [{"result": 3}], [{"result": [], "lead_time": -1}], [{"result": [], "was_cancelled": "no"}])),
]


@pytest.mark.parametrize(("name", "column", "value"), WRONG, ids=str)
def test_a_value_that_the_format_does_not_have_stops_the_import(name: str, column: str, value: Any, tmp_path: Path) -> None:
    rows = rows_of(name)
    *parts, last = column.split(".")
    for row in (rows[0][part] for part in parts) if parts else (rows[0],):
        row[last] = value
    with pytest.raises(UserError, match="row 1") as caught:
        read_rows(name, rows, tmp_path)
    assert last.removesuffix("s") in str(caught.value) and f"{name}.json" in str(caught.value) and "\n" not in str(caught.value)


# All formats


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_imported_is_written_loads_and_is_imported_twice_without_effect(name: str, tmp_path: Path) -> None:
    for _ in range(2):
        got = FORMATS[name].read(fixture(name))
        write_comparisons(tmp_path, got.events, clips=got.clips, prompts=got.prompts, annotators=got.annotators)
    data = load_comparisons(tmp_path)
    assert data.events == got.events and set(data.clips) == {clip.clip_id for clip in got.clips} and len(list(tmp_path.glob("comparisons-*"))) == 1
    assert all(event.source_dataset and event.licence == FORMATS[name].origin.licence for event in data.events)


def test_a_changed_label_of_an_imported_row_is_refused(tmp_path: Path) -> None:
    text = fixture("videogen-rewardbench").read_text()
    for content in (text, text.replace(",A,same,B,A,", ",B,same,B,A,")):
        (tmp_path / "labels.csv").write_text(content)
        got = FORMATS["videogen-rewardbench"].read(tmp_path / "labels.csv")
        if content == text:
            write_comparisons(tmp_path / "out", got.events, clips=got.clips, prompts=got.prompts)
    with pytest.raises(UserError, match="is already there with other content"):
        write_comparisons(tmp_path / "out", got.events, clips=got.clips, prompts=got.prompts)


def test_two_datasets_with_one_prompt_share_a_folder(tmp_path: Path) -> None:
    for name in ("videoalign", "trl"):
        rows = [{"prompt": "the same", "chosen": "a.mp4", "rejected": "b.mp4"}]
        got = read_rows("trl", rows, tmp_path, source=name)
        data = write_comparisons(tmp_path / "out", got.events, clips=got.clips, prompts=got.prompts)
    assert len(data.prompts) == 1 and len(data.clips) == 4 and len({event.event_id for event in data.events}) == 2


@pytest.mark.parametrize("name", [name for name in FORMATS if fixture(name).suffix != ".csv"])
def test_json_lines_gzip_and_parquet_say_the_same(name: str, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = rows_of(name)
    want = FORMATS[name].read(fixture(name))
    (tmp_path / "lines.jsonl").write_text("\ufeff" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    (tmp_path / "packed.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    assert FORMATS[name].read(tmp_path / "lines.jsonl") == want == FORMATS[name].read(tmp_path / "packed.json.gz")
    if name in ("label-studio", "hpdv2-train", "hpdv2-test", "safesora"):
        return  # rows of different keys, or values of different kinds: these come as JSON only
    for row in rows:
        if row.get("created_at"):
            row["created_at"] = datetime.fromisoformat(row["created_at"])
    table = pa.Table.from_pylist(rows)
    if "created_at" in table.column_names:
        table = table.set_column(table.column_names.index("created_at"), "created_at", table["created_at"].cast(pa.timestamp("ns")))
    pq.write_table(table, tmp_path / "table.parquet")
    got = FORMATS[name].read(tmp_path / "table.parquet")
    assert got.events == want.events and got.clips == want.clips and got.skipped == want.skipped


@pytest.mark.parametrize("name", FORMATS)
def test_unknown_columns_are_reported_and_missing_ones_refused(name: str, tmp_path: Path) -> None:
    content = fixture(name).read_text()
    if fixture(name).suffix == ".csv":
        header, _, rest = content.partition("\n")
        column = header.split(",")[0]
        (tmp_path / "new.csv").write_text(content.replace(header, f"{header},stars", 1).replace("\n", ",\n").replace(",\n", "\n", 1).replace("follows,\n", "follows\n"))
        (tmp_path / "less.csv").write_text(f"{header.replace(column, 'stars', 1)}\n{rest}")
        new, less = tmp_path / "new.csv", tmp_path / "less.csv"
    else:
        rows = rows_of(name)
        column = min(COLUMNS[name])
        (tmp_path / "new.json").write_text(json.dumps([{**row, "stars": 5} for row in rows]))
        (tmp_path / "less.json").write_text(json.dumps([*rows, {key: value for key, value in rows[0].items() if key != column}]))
        new, less = tmp_path / "new.json", tmp_path / "less.json"
    got, want = FORMATS[name].read(new), FORMATS[name].read(fixture(name))
    assert got.unknown_columns == ("stars",) and got.events == want.events
    with pytest.raises(UserError, match=f"column {column} is missing, .*{less.name}"):
        FORMATS[name].read(less)


def test_unknown_columns_inside_a_row_are_reported_with_their_place(tmp_path: Path) -> None:
    rows = rows_of("safesora")
    rows[0]["video_0"]["fps"] = 8
    rows[1]["video_0"]["video_labels"]["spam"] = True
    rows[2]["sub_preferences"] = {"informativness": "video_0"}
    assert read_rows("safesora", rows, tmp_path).unknown_columns == ("sub_preferences.informativness", "video_0.fps", "video_0.video_labels.spam")


def test_the_same_row_again_adds_nothing_where_rows_have_ids_and_another_answer_is_refused(tmp_path: Path) -> None:
    rows = rows_of("visionreward-pairs")
    got = read_rows("visionreward-pairs", [*rows, rows[0]], tmp_path)
    assert got.skipped == {"no answer in overall": 1, "the same row again": 1} and len(got.events) == 3
    with pytest.raises(UserError, match="an earlier row has the same id and answers overall otherwise, row 5"):
        read_rows("visionreward-pairs", [*rows, {**rows[0], "standard_answer": "tie"}], tmp_path)


def test_a_row_that_contradicts_an_earlier_one_about_a_clip_is_left_out(tmp_path: Path) -> None:
    rows = rows_of("trl")
    got = read_rows("trl", [*rows, {**rows[0], "prompt": "another prompt"}], tmp_path)
    assert got.skipped == {"contradicts an earlier row about a clip": 1} and len(got.events) == 4 and len(got.prompts) == 2


def test_a_prompt_that_is_critical_anywhere_is_critical(tmp_path: Path) -> None:
    rows = rows_of("safesora-label")
    rows[2:] = [{**rows[1], "video_id": "v-9", "video_path": "pr-2/v-9.mp4", "prompt_type": "safety_neutral"}]
    assert [prompt.safety_critical for prompt in read_rows("safesora-label", rows, tmp_path).prompts] == [False, True]


# Media


def test_clips_whose_file_is_there_are_known_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "example_1_A.mp4").write_bytes(b"one")
    (tmp_path / "videos" / "example_1_B.mp4").write_bytes(b"two")
    got = FORMATS["videoalign"].read(fixture("videoalign"), media=tmp_path)
    assert got.found == 2 and got.events[0].clip_ids == (hashlib.sha256(b"one").hexdigest(), hashlib.sha256(b"two").hexdigest())
    assert got.events[-1].clip_ids[0] == hashlib.sha256(b"path:videoalign/videos/example_3_A.mp4").hexdigest()
    with pytest.raises(UserError, match="no such folder of media"):
        FORMATS["videoalign"].read(fixture("videoalign"), media=tmp_path / "nowhere")


def test_of_a_url_the_file_name_counts(tmp_path: Path) -> None:
    (tmp_path / "6000001.mp4").write_bytes(b"one")
    got = FORMATS["videofeedback"].read(fixture("videofeedback"), media=tmp_path)
    assert got.events[0].clip_ids == (hashlib.sha256(b"one").hexdigest(),) and got.clips[0].path == "https://example.org/videos/6000001.mp4"


def test_nothing_outside_the_media_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    (tmp_path / "media").mkdir()
    outside = [
        *("../secret.mp4", "videos/../../secret.mp4", str(tmp_path / "secret.mp4"), "a\0b", "x" * 5000, "file:///" + "../" * 9 + "etc/passwd"),
        *("https://e.org/x%2F..%2F..%2Fsecret.mp4", "https://e.org/..%2Fsecret.mp4", "http://[bad/..", "https://"),
    ]
    rows = [{"prompt": "p", "chosen": path, "rejected": "b.mp4"} for path in outside]
    assert read_rows("trl", rows, tmp_path, media=tmp_path / "media").found == 0


def test_two_names_of_one_file_are_one_clip(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(b"the same")
    rows = [{"prompt": "p", "chosen": "a.mp4", "rejected": "b.mp4"}, {"prompt": "p", "chosen": "b.mp4", "rejected": "c.mp4"}]
    got = read_rows("trl", rows, tmp_path, media=tmp_path)
    assert got.skipped == {"a clip against itself": 1} and len(got.clips) == 2


def test_an_event_knows_its_source_and_licence() -> None:
    got = FORMATS["trl"].read(fixture("trl"), source="mine", licence="CC0-1.0")
    event: RankingEvent = got.events[0]
    assert (event.source_dataset, event.licence, event.annotator_id) == ("mine", "CC0-1.0", "mine/unknown") and got.clips[0].licence == "CC0-1.0"
    assert not {e.event_id for e in got.events} & {e.event_id for e in FORMATS["trl"].read(fixture("trl")).events}

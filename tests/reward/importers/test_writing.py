"""What is written is read again, has exactly the columns of its format, and what did not fit is counted."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from base_model.errors import UserError
from reward.comparisons import Annotator, Clip, Comparisons, Prompt, RankingEvent, write_comparisons
from reward.importers.formats import FORMATS
from tests.reward.importers.test_formats import fixture

ALIGN = ["path_A", "path_B", "prompt", "VQ", "MQ", "TA", "fps_A", "num_frames_A", "fps_B", "num_frames_B"]
MOS = [f"MOS_{side}_{dimension}" for dimension in ("VQ", "MQ", "TA") for side in "AB"]
READ_AND_WRITTEN = [name for name, format in FORMATS.items() if format.write]


def imported(name: str, folder: Path, path: Path | None = None, **options: Any) -> Comparisons:
    got = FORMATS[name].read(path or fixture(name), **options)
    return write_comparisons(folder, got.events, clips=got.clips, prompts=got.prompts, annotators=got.annotators)


def written(name: str, data: Comparisons, path: Path) -> dict[str, int]:
    write = FORMATS[name].write
    assert write is not None
    return dict(write(data, path).left_out)


def ours(**changes: Any) -> Comparisons:
    """A ranking of four clips and a pair, each of one person."""
    ranking = RankingEvent("e1", "t1", "p", "ann", ("a", "b", "c", "d"), (2, 1, 3, 2), dimension="VQ", source_dataset="mine", lead_time_ms=1500)
    pair = RankingEvent("e2", "t2", "p", "bob", ("a", "b"), (1, 1), dimension="VQ", kind="pair", choice="both_bad", source_dataset="mine")
    clips = {name: Clip(name, f"clips/{name}.mp4", "p", fps=8.0, num_frames=16) for name in "abcd"}
    data = Comparisons((ranking, pair), clips, {"p": Prompt("p", 'a, "b"\nc')}, {name: Annotator(name) for name in ("ann", "bob")}, {"p": "train"}, {"p": "p"})
    return replace(data, **changes)


def test_three_formats_are_written() -> None:
    assert READ_AND_WRITTEN == ["videoalign", "label-studio", "trl"]


@pytest.mark.parametrize("name", READ_AND_WRITTEN)
def test_what_is_written_is_read_again(name: str, tmp_path: Path) -> None:
    data = imported(name, tmp_path / "one")
    assert written(name, data, tmp_path / "again") == {}
    again = imported(name, tmp_path / "two", tmp_path / "again")
    assert {e.event_id: e for e in again.events} == {e.event_id: e for e in data.events} and len(data.events) >= 4
    assert again.clips == data.clips and again.prompts == data.prompts
    written(name, again, tmp_path / "third")
    assert (tmp_path / "third").read_bytes() == (tmp_path / "again").read_bytes()


def test_videoalign_has_exactly_its_columns(tmp_path: Path) -> None:
    written("videoalign", imported("videoalign", tmp_path / "out"), tmp_path / "a.csv")
    with open(tmp_path / "a.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == [*ALIGN, *MOS]
    assert rows[1] == [
        *("videos/example_1_A.mp4", "videos/example_1_B.mp4", "The camera remains still, a girl approaches the chair.", "B", "B", "A", "24.0", "126", "30.0", "152"),
        *("2.0", "4.0", "3.5", "", "", ""),
    ]
    assert written("videoalign", ours(), tmp_path / "b.csv") == {}
    assert (tmp_path / "b.csv").read_text().splitlines()[0] == ",".join(ALIGN)


def test_a_ranking_becomes_its_pairs_in_videoalign(tmp_path: Path) -> None:
    written("videoalign", ours(), tmp_path / "a.csv")
    with open(tmp_path / "a.csv", newline="") as file:
        rows = [(row["path_A"][6:-4], row["path_B"][6:-4], row["VQ"], row["MQ"], row["fps_A"], row["prompt"]) for row in csv.DictReader(file)]
    assert [row[:3] for row in rows] == [
        *(("a", "b", "B"), ("a", "c", "A"), ("a", "d", "same"), ("b", "c", "A"), ("b", "d", "A"), ("c", "d", "B")),
        ("a", "b", "same"),
    ]
    assert {row[3:] for row in rows} == {("", "8.0", 'a, "b"\nc')}


def test_what_videoalign_has_no_room_for_is_counted(tmp_path: Path) -> None:
    rating = RankingEvent("e3", "t3", "p", "ann", ("a",), (None,), dimension="VQ", kind="likert", likert=(3.0,))
    rest = (
        *(rating, replace(rating, event_id="e4", likert=(9.0, 1.0), clip_ids=("a", "b"), ranks=(None, None)), replace(rating, event_id="e5", dimension="overall")),
        *(replace(ours().events[1], event_id="e6", skipped_reason="broken"), replace(rating, event_id="e7", kind="tag", likert=(), flags=("unsafe",))),
        replace(ours().events[0], event_id="e8", ranks=(None, 1, None, None)),
    )
    left_out = written("videoalign", ours(events=rest), tmp_path / "a.csv")
    assert left_out == {
        "dimension overall": 1,
        "skipped by the person": 1,
        "kind tag, no ranking": 1,
        "kind rank, no ranking": 1,
        "a rating beside no pair, or not from 1 to 5": 2,
    }


def test_label_studio_says_every_choice_and_place(tmp_path: Path) -> None:
    assert written("label-studio", ours(), tmp_path / "a.json") == {}
    ranking, pair = json.loads((tmp_path / "a.json").read_text())
    assert ranking["id"] == "t1" and ranking["data"]["items"] == [{"id": str(i), "video": f"clips/{name}.mp4"} for i, name in enumerate("abcd", 1)]
    (annotation,) = ranking["annotations"]
    assert annotation["completed_by"] == "ann" and annotation["lead_time"] == 1.5
    assert annotation["result"] == [{"from_name": "VQ", "to_name": "items", "type": "ranker", "value": {"ranker": {"1": ["2"], "2": ["1", "4"], "3": ["3"]}}}]
    assert pair["data"] == {"prompt": 'a, "b"\nc', "video1": "clips/a.mp4", "video2": "clips/b.mp4"}
    assert pair["annotations"][0]["result"] == [{"from_name": "VQ", "to_name": "video1,video2", "type": "choices", "value": {"choices": ["both_bad"]}}]


@pytest.mark.parametrize("choice", ["A", "B", "tie", "both_bad", "both_good", "invalid"])
def test_a_pair_shown_the_other_way_round_keeps_its_meaning_in_label_studio(choice: str, tmp_path: Path) -> None:
    ranks: tuple[int | None, int | None] = {"A": (1, 2), "B": (2, 1), "invalid": (None, None)}.get(choice, (1, 1))  # type: ignore[assignment]
    event = replace(ours().events[1], choice=choice, ranks=ranks)
    other = replace(event, event_id="e3", annotator_id="eve", clip_ids=("b", "a"))
    assert written("label-studio", ours(events=(event, other)), tmp_path / "a.json") == {}
    one, two = imported("label-studio", tmp_path / "out", tmp_path / "a.json").events
    flipped = {"A": "B", "B": "A"}.get(choice, choice)
    assert one.clip_ids == two.clip_ids and (one.choice, two.choice) == (choice, flipped) and one.ranks == ranks


def test_a_person_who_answered_twice_has_two_annotations(tmp_path: Path) -> None:
    event = ours().events[0]
    events = (event, replace(event, event_id="e3", ranks=(1, 2, 3, 4), is_repeat=True), replace(event, event_id="e4", dimension="MQ"))
    written("label-studio", ours(events=events), tmp_path / "a.json")
    (task,) = json.loads((tmp_path / "a.json").read_text())
    assert [[result["from_name"] for result in annotation["result"]] for annotation in task["annotations"]] == [["VQ", "MQ"], ["VQ"]]
    assert len(imported("label-studio", tmp_path / "out", tmp_path / "a.json").events) == 3


def test_what_label_studio_has_no_room_for_is_counted(tmp_path: Path) -> None:
    ranking, pair = ours().events
    best = replace(ranking, event_id="e3", kind="best", ranks=(1, None, None, None))
    numbered, empty = replace(ranking, event_id="e4", dimension="1"), replace(pair, event_id="e5", choice=None, ranks=(None, 1))
    assert written("label-studio", ours(events=(best, numbered, empty)), tmp_path / "a.json") == {
        "kind best": 1,
        "a ranking in a dimension called 1": 1,
        "a pair without an answer": 1,
    }


def test_trl_gets_the_decided_pairs_of_one_dimension(tmp_path: Path) -> None:
    assert written("trl", ours(), tmp_path / "a.jsonl") == {"choice tie": 1, "choice both_bad": 1}
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [(row["chosen"][6:-4], row["rejected"][6:-4]) for row in rows] == [("b", "a"), ("a", "c"), ("b", "c"), ("b", "d"), ("d", "c")]
    assert {tuple(row) for row in rows} == {("prompt", "chosen", "rejected")} and rows[0]["prompt"] == 'a, "b"\nc'
    ranking = ours().events[0]
    with pytest.raises(UserError, match=r"answers in 2 dimensions \(MQ, VQ\) cannot be told apart"):
        written("trl", ours(events=(ranking, replace(ranking, event_id="e3", dimension="MQ"))), tmp_path / "b.jsonl")
    best = replace(ranking, kind="best", ranks=(None, 1, None, None))
    written("trl", ours(events=(best,)), tmp_path / "c.jsonl")
    assert [json.loads(line)["rejected"][6:-4] for line in (tmp_path / "c.jsonl").read_text().splitlines()] == ["a", "c", "d"]


def test_the_library_datasets_reads_what_is_written_for_trl(tmp_path: Path) -> None:
    import datasets

    written("trl", ours(), tmp_path / "a.jsonl")
    rows = datasets.Dataset.from_json(str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "cache"), keep_in_memory=True)
    assert rows.column_names == ["prompt", "chosen", "rejected"] and rows[0]["chosen"] == "clips/b.mp4"

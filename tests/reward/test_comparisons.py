"""Rankings on disk: what goes in comes out, what is wrong is refused in one line, splits do not leak."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from base_model.checkpoint import atomic_write
from base_model.errors import UserError
from reward.comparisons import (
    Annotator,
    Clip,
    Prompt,
    RankingEvent,
    load_comparisons,
    write_comparisons,
)

PROMPTS = [Prompt("p0", "a red circle moves left"), Prompt("p1", "a blue bar grows"), Prompt("p2", "A red circle, moves LEFT!")]
CLIPS = [Clip(f"c{p}{i}", f"clips/c{p}{i}.mkv", f"p{p}", seed=i, width=32, height=32, fps=12.0, num_frames=13) for p in range(3) for i in range(4)]
PEOPLE = [Annotator("ann", pool="simulated", reliability=0.9, n_events=2), Annotator("bob")]


def event(name: str, prompt: int = 0, **changes: Any) -> RankingEvent:
    clip_ids = tuple(f"c{prompt}{i}" for i in range(4))
    plain = RankingEvent(name, f"t{prompt}", f"p{prompt}", "ann", clip_ids, (2, 1, 4, 2), shown_order=(3, 1, 0, 2), watch_ms=(900, 1, 2, 3), flags=("fast",))
    return replace(plain, **changes)


def write(folder: Path, *events: RankingEvent) -> None:
    write_comparisons(folder, events, clips=CLIPS, prompts=PROMPTS, annotators=PEOPLE)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    pair = event("e1", 1, kind="pair", clip_ids=("c11", "c12"), ranks=(1, 1), choice="both_bad", shown_order=(), watch_ms=(), confidence=0.4, likert=(1.0, 2.5))
    partial = event("e2", 2, ranks=(1, None, 2, None), lead_time_ms=1200, gold_ok=False, is_gold=True)
    write(tmp_path, event("e0"), pair, partial)
    data = load_comparisons(tmp_path)
    assert data.events == (event("e0"), pair, partial)
    assert list(data.clips.values()) == CLIPS and list(data.prompts.values()) == PROMPTS and list(data.annotators.values()) == PEOPLE
    assert data.events[2].dense_ranks == (1, 0, 2, 0) and data.events[0].dense_ranks == (2, 1, 3, 2)
    assert sum(len(data.in_split(name)) for name in ("train", "val", "test")) == 3


def test_the_library_datasets_reads_the_files(tmp_path: Path) -> None:
    import datasets

    write(tmp_path, event("e0"))
    rows = datasets.Dataset.from_parquet(str(tmp_path / "comparisons-00000.parquet"), cache_dir=str(tmp_path / "cache"), keep_in_memory=True)
    assert rows[0]["clip_ids"] == ["c00", "c01", "c02", "c03"] and rows[0]["ranks"] == [2, 1, 4, 2]


def test_answers_are_added_never_rewritten(tmp_path: Path) -> None:
    write(tmp_path, event("e0"))
    first = (tmp_path / "comparisons-00000.parquet").read_bytes()
    write(tmp_path, event("e0"), event("e1", 1))
    assert (tmp_path / "comparisons-00000.parquet").read_bytes() == first
    assert [e.event_id for e in load_comparisons(tmp_path).events] == ["e0", "e1"]
    write(tmp_path, event("e0"), event("e1", 1))
    assert not (tmp_path / "comparisons-00002.parquet").exists()
    with pytest.raises(UserError, match="e0 is already there with other content"):
        write(tmp_path, event("e0", ranks=(1, 1, 1, 1)))
    with pytest.raises(UserError, match="clip c00 is already there"):
        write_comparisons(tmp_path, [], clips=[replace(CLIPS[0], seed=9)], prompts=PROMPTS)


@pytest.mark.parametrize("written", range(5))
@pytest.mark.parametrize("answers_before", [0, 1])
def test_a_writer_stopped_between_two_files_is_mended_by_writing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers_before: int, written: int) -> None:
    def grow(folder: Path) -> None:
        write_comparisons(folder, [event("e0"), event("e1", 1)], clips=CLIPS, prompts=PROMPTS, annotators=PEOPLE)

    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    for folder in (stopped, whole):
        if answers_before:
            write_comparisons(folder, [event("e0")], clips=CLIPS[:4], prompts=PROMPTS[:1], annotators=PEOPLE[:1])
    grow(whole)
    done: list[Path] = []

    def write_some(path: Path, content: bytes) -> None:
        if len(done) == written:
            raise KeyboardInterrupt
        done.append(path)
        atomic_write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr("reward.comparisons.atomic_write", write_some)
        with pytest.raises(KeyboardInterrupt):
            grow(stopped)
    assert len(done) == written
    if answers_before:
        assert load_comparisons(stopped).events == (event("e0"),)
    grow(stopped)
    files = sorted(path.name for path in whole.iterdir())
    assert len(files) == 5 + answers_before and files == sorted(path.name for path in stopped.iterdir())
    assert all((stopped / name).read_bytes() == (whole / name).read_bytes() for name in files)


def test_the_same_data_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, event("e0"), event("e1", 1))
    assert all(path.read_bytes() == (tmp_path / "b" / path.name).read_bytes() for path in (tmp_path / "a").iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": (1, 2, 3)}, "no ranking of 4 clips"),
        ({"ranks": (1, 2, 3, 5)}, "no ranking of 4 clips"),
        ({"ranks": (0, 1, 2, 3)}, "no ranking of 4 clips"),
        ({"clip_ids": ("c00", "c01", "c02", "c10")}, "belongs to prompt p1, not to p0"),
        ({"clip_ids": ("c00", "c01", "c02", "c02")}, "appears in it twice"),
        ({"clip_ids": ("c00", "c01", "c02", "zz")}, "clip zz is not in clips.parquet"),
        ({"prompt_id": "p9"}, "prompt p9 is not in prompts.parquet"),
        ({"kind": "stars"}, "unknown kind 'stars'"),
        ({"choice": "C"}, "unknown choice 'C'"),
        ({"kind": "pair"}, "a pair has two clips"),
        ({"kind": "best"}, "the best of several has rank 1 and the others none"),
        ({"kind": "pair", "clip_ids": ("c00", "c01"), "ranks": (1, 2), "choice": "B", "shown_order": (), "watch_ms": ()}, "contradicts"),
        ({"shown_order": (0, 1, 2, 2)}, "no permutation"),
        ({"likert": (1.0,)}, "one number a clip"),
    ],
)
def test_a_wrong_answer_is_refused_and_nothing_is_written(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        write(tmp_path, event("e0", **changes))
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_wrong_files_are_refused_when_loaded(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pytest.raises(UserError, match="no such file"):
        load_comparisons(tmp_path)
    write(tmp_path, event("e0"))
    path = tmp_path / "splits.parquet"
    rows = pq.ParquetFile(path).read().to_pylist()
    pq.write_table(pa.Table.from_pylist([{**row, "split": "train+"} for row in rows]), path)
    with pytest.raises(UserError, match="unknown split 'train\\+'"):
        load_comparisons(tmp_path)
    path.unlink()
    table = pq.ParquetFile(tmp_path / "comparisons-00000.parquet").read()
    pq.write_table(table.drop(["dimension"]), tmp_path / "comparisons-00000.parquet")
    with pytest.raises(UserError, match="column 'dimension' is missing"):
        load_comparisons(tmp_path)
    (tmp_path / "comparisons-00000.parquet").write_bytes(b"PAR1 is not enough")
    with pytest.raises(UserError, match="not a parquet file"):
        load_comparisons(tmp_path)


def test_rows_made_elsewhere_become_events_with_nulls_as_defaults() -> None:
    row = {"event_id": "e", "task_id": "t", "prompt_id": "p", "annotator_id": "a", "clip_ids": ["x", "y"], "ranks": [1, None], "likert": None, "app_version": None}
    assert RankingEvent.of(row) == RankingEvent("e", "t", "p", "a", ("x", "y"), (1, None))
    for broken, problem in (({**row, "task_id": None}, "task_id is empty"), ({**row, "stars": 3}, "stars is no column")):
        with pytest.raises(UserError, match=problem):
            RankingEvent.of(broken)


def test_a_clip_in_two_splits_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_comparisons(tmp_path, [event("e0")], clips=CLIPS, prompts=PROMPTS)
    path = tmp_path / "splits.parquet"
    rows = pq.ParquetFile(path).read().to_pylist()
    pq.write_table(pa.Table.from_pylist([{**row, "split": "test" if row["prompt_id"] == "p1" else "train"} for row in rows]), path)
    clips = pq.ParquetFile(tmp_path / "clips.parquet").read()
    moved = [{**row, "prompt_id": "p1"} if row["clip_id"] == "c00" else row for row in clips.to_pylist()]
    pq.write_table(pa.Table.from_pylist(moved, schema=clips.schema), tmp_path / "clips.parquet")
    with pytest.raises(UserError, match="clip c00"):
        load_comparisons(tmp_path)

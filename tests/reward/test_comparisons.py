"""Rankings on disk: what goes in comes out, what is wrong is refused in one line, splits do not leak."""

from __future__ import annotations

import multiprocessing
import random
from collections import Counter
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
PEOPLE = [Annotator("ann", pool="simulated", reliability=0.9, n_events=3), Annotator("bob")]


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


def test_a_prompt_whose_language_or_kind_nobody_told_is_the_same_prompt(tmp_path: Path) -> None:
    write(tmp_path, event("e0"))
    write_comparisons(tmp_path, [event("e1", 1)], clips=CLIPS, prompts=[replace(each, lang="", category="benign") for each in PROMPTS])
    assert len(load_comparisons(tmp_path).events) == 2
    with pytest.raises(UserError, match="is already there with other content"):
        write_comparisons(tmp_path, [], clips=CLIPS, prompts=[replace(each, text=f"{each.text} now") for each in PROMPTS])


def test_clips_that_were_ruled_on_again_take_further_answers_and_keep_the_newest_ruling(tmp_path: Path) -> None:
    allowed, review = (replace(CLIPS[0], safety_json=f'{{"verdict":"{verdict}"}}') for verdict in ("allow", "review"))
    for number, clip in enumerate((allowed, review, CLIPS[0])):
        write_comparisons(tmp_path, [event(f"e{number}")], clips=[clip, *CLIPS[1:]], prompts=PROMPTS)
    data = load_comparisons(tmp_path)
    assert len(data.events) == 3 and data.clips["c00"] == review, "a row without a ruling takes none away"


def test_what_is_known_of_people_stays_until_something_newer_is_and_their_answers_are_counted(tmp_path: Path) -> None:
    def write_of(events: list[RankingEvent], person: Annotator) -> Annotator:
        return write_comparisons(tmp_path, events, clips=CLIPS, prompts=PROMPTS, annotators=[person]).annotators["ann"]

    write_of([event("e0")], Annotator("ann", pool="people", reliability=0.9, tie_bias=0.1))
    assert write_of([event("e1", 1)], Annotator("ann", locale="de")) == Annotator("ann", "people", "de", reliability=0.9, tie_bias=0.1, n_events=2)
    assert write_of([event("e2", annotator_id="bob")], Annotator("ann", reliability=0.5, n_events=1)) == Annotator("ann", "people", "de", reliability=0.5, tie_bias=0.1, n_events=2)
    assert load_comparisons(tmp_path).annotators["ann"].n_events == 2


def test_a_pair_that_was_skipped_needs_no_ranks(tmp_path: Path) -> None:
    skipped = event("e0", kind="pair", clip_ids=("c00", "c01"), ranks=(None, None), choice="A", skipped_reason="unclear", shown_order=(), watch_ms=())
    write(tmp_path, skipped)
    assert load_comparisons(tmp_path).events == (skipped,)


@pytest.mark.parametrize("split", [None, "val"])
@pytest.mark.parametrize("written", range(5))
@pytest.mark.parametrize("answers_before", [0, 1])
def test_a_writer_stopped_between_two_files_is_mended_by_writing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers_before: int, written: int, split: str | None
) -> None:
    def grow(folder: Path) -> None:
        write_comparisons(folder, [event("e0"), event("e1", 1)], clips=CLIPS, prompts=PROMPTS, annotators=PEOPLE, split=split)

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
    assert split is None or load_comparisons(whole).split["p1"] == split


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
        ({"kind": "pair", "clip_ids": ("c00", "c01"), "ranks": (None, None), "choice": "A", "shown_order": (), "watch_ms": ()}, "choice A contradicts ranks"),
        ({"kind": "pair", "clip_ids": ("c00", "c01"), "ranks": (1, None), "choice": "tie", "shown_order": (), "watch_ms": ()}, "choice tie contradicts ranks"),
        ({"shown_order": (0, 1, 2, 2)}, "no permutation"),
        ({"likert": (1.0,)}, "one number a clip"),
        ({"likert": (1.0, 2.0, 3.0, float("nan"))}, "likert and confidence are finite"),
        ({"confidence": float("inf")}, "likert and confidence are finite"),
        ({"watch_ms": (2**31, 1, 2, 3)}, "watch_ms cannot be written"),
        ({"flags": ("\ud800",)}, "flags cannot be written"),
        ({"clip_ids": tuple(f"c{i}" for i in range(128)), "ranks": (None,) * 128}, "128 clips; at most 127"),
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


def rewritten(path: Path, change: Any) -> None:
    """Puts other rows into a file, with the types that they have."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(change(pq.ParquetFile(path).read().to_pylist())), path)


def test_answers_stay_where_an_earlier_file_was_taken_away(tmp_path: Path) -> None:
    write(tmp_path, event("e0"))
    write(tmp_path, event("e1", 1))
    (tmp_path / "comparisons-00000.parquet").unlink()
    write(tmp_path, event("e2", 2))
    assert [e.event_id for e in load_comparisons(tmp_path).events] == ["e1", "e2"]


def grow_one_by_one(folder: Path, name: str, start: Any) -> None:
    start.wait()
    for i in range(3):
        prompt, clips = Prompt(f"{name}{i}", f"prompt {name} {i}"), [Clip(f"{name}{i}{side}", "x", f"{name}{i}") for side in "ab"]
        answer = RankingEvent(f"{name}{i}", "t", prompt.prompt_id, name, (clips[0].clip_id, clips[1].clip_id), (1, 2))
        write_comparisons(folder, [answer], clips=clips, prompts=[prompt], annotators=[Annotator(name)])


def test_processes_that_write_into_one_folder_wait_for_each_other(tmp_path: Path) -> None:
    start = multiprocessing.Barrier(2)
    writers = [multiprocessing.Process(target=grow_one_by_one, args=(tmp_path, name, start)) for name in "xy"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert sorted(e.event_id for e in load_comparisons(tmp_path).events) == ["x0", "x1", "x2", "y0", "y1", "y2"]


def test_a_folder_that_grows_while_it_is_read_is_read_as_it_was_or_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import reward.comparisons as comparisons

    read_table, written = comparisons._read_table, []

    def grow_after_the_first(path: Path, *schema: Any) -> Any:
        table = read_table(path, *schema)
        if not written:
            written.append(path)
            write_comparisons(tmp_path, [event("e1", 1)], clips=CLIPS[4:8], prompts=PROMPTS[1:2])
        return table

    write_comparisons(tmp_path, [event("e0")], clips=CLIPS[:4], prompts=PROMPTS[:1])
    monkeypatch.setattr(comparisons, "_read_table", grow_after_the_first)
    assert [e.event_id for e in load_comparisons(tmp_path).events] in (["e0"], ["e0", "e1"])


@pytest.mark.parametrize("name", ["clips", "prompts", "annotators", "splits"])
def test_an_id_that_is_there_twice_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path, event("e0"))
    rewritten(tmp_path / f"{name}.parquet", lambda rows: [*rows, rows[0]])
    with pytest.raises(UserError, match=f"is there twice, .*{name}.parquet"):
        load_comparisons(tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("comparisons-00000", {"ranks": [1.5, 2.0, 3.0, 1.0]}, "column ranks .*comparisons-00000"),
        ("comparisons-00000", {"clip_ids": "c00"}, "column clip_ids "),
        ("comparisons-00000", {"is_gold": "perhaps"}, "column is_gold "),
        ("comparisons-00000", {"is_gold": "true"}, "column is_gold holds what is no bool, .*: a column of string"),
        ("comparisons-00000", {"is_gold": 1}, "column is_gold "),
        ("comparisons-00000", {"ranks": ["2", "1", "4", "2"]}, "column ranks "),
        ("comparisons-00000", {"lead_time_ms": "7"}, "column lead_time_ms "),
        ("comparisons-00000", {"guideline_version": 3}, "column guideline_version "),
        ("comparisons-00000", {"likert": [1.0, 2.0, 3.0, float("nan")]}, "finite"),
        ("clips", {"fps": "fast"}, "column fps "),
        ("clips", {"fps": float("nan")}, "clip c00: its frame rate is nan"),
        ("splits", {"component_id": None}, "component_id is empty"),
    ],
)
def test_values_of_another_kind_are_refused(tmp_path: Path, name: str, changes: dict[str, Any], message: str) -> None:
    write(tmp_path, event("e0"))
    rewritten(tmp_path / f"{name}.parquet", lambda rows: [{**row, **changes} for row in rows])
    with pytest.raises(UserError, match=message) as caught:
        load_comparisons(tmp_path)
    assert "\n" not in str(caught.value)


def test_values_that_another_program_wrote_in_wider_columns_are_read(tmp_path: Path) -> None:
    write(tmp_path, event("e0"))
    rewritten(tmp_path / "comparisons-00000.parquet", lambda rows: [{**rows[0], "ranks": [2.0, 1.0, 4.0, 2.0], "lead_time_ms": None}])
    assert load_comparisons(tmp_path).events == (event("e0"),)


def test_texts_of_any_width_and_in_a_dictionary_are_read(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    write(tmp_path, event("e0"))
    path = tmp_path / "comparisons-00000.parquet"
    table = pq.ParquetFile(path).read()
    wide = {"event_id": pa.large_string(), "dimension": pa.dictionary(pa.int32(), pa.string()), "clip_ids": pa.large_list(pa.large_string()), "ranks": pa.list_(pa.int64(), 4)}
    schema = pa.schema([(field.name, wide.get(field.name, field.type)) for field in table.schema])
    columns = [pa.array(table.column(name).to_pylist(), schema.field(name).type) for name in schema.names]
    pq.write_table(pa.Table.from_arrays(columns, schema=schema), path)
    assert load_comparisons(tmp_path).events == (event("e0"),)


def test_prompts_that_hang_together_may_not_be_in_two_splits(tmp_path: Path) -> None:
    write(tmp_path, event("e0"), event("e2", 2))
    rewritten(tmp_path / "splits.parquet", lambda rows: [{**row, "split": "test" if row["prompt_id"] == "p2" else "train"} for row in rows])
    with pytest.raises(UserError, match="are in the splits train and test"):
        load_comparisons(tmp_path)


@pytest.mark.parametrize("column", ["prompt_id", "component_id", "split", "salt"])
def test_splits_without_a_column_are_refused(tmp_path: Path, column: str) -> None:
    write(tmp_path, event("e0"))
    rewritten(tmp_path / "splits.parquet", lambda rows: [{name: value for name, value in row.items() if name != column} for row in rows])
    with pytest.raises(UserError, match=f"column '{column}' is missing"):
        load_comparisons(tmp_path)


def test_a_bit_that_turned_over_is_an_error_or_changes_nothing(tmp_path: Path) -> None:
    write(tmp_path, event("e0"), event("e1", 1))
    path, rng, seen = tmp_path / "comparisons-00000.parquet", random.Random(0), Counter[str]()
    whole = path.read_bytes()
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            assert load_comparisons(tmp_path).events == (event("e0"), event("e1", 1))
            seen["same"] += 1
        except UserError:
            seen["refused"] += 1
    assert seen["refused"] > 50

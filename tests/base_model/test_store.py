"""The clip store: found again by request, exact by content, whole after any death."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from base_model.errors import UserError
from base_model.video.store import ClipStore, NewClip, request_key
from tests.base_model.test_video_files import file_size_limit

SAMPLER = {"steps": 8, "frames": 5}


def clip(seed: int) -> Tensor:
    return torch.randint(0, 256, (5, 3, 8, 8), generator=torch.Generator().manual_seed(seed)).float() / 255


def new(seed: int, prompt: str = "a red circle") -> NewClip:
    return NewClip(clip(seed), prompt, "p1", seed, SAMPLER, "model-1", 12.0)


def test_a_clip_is_found_by_its_request_and_loads_exactly(tmp_path: Path) -> None:
    ClipStore(tmp_path).add(clip(1), prompt="a red circle", prompt_id="p1", seed=1, sampler=SAMPLER, lineage="model-1", fps=12, extra={"split": "train"})
    store = ClipStore(tmp_path)
    row = store.find(request_key("a red circle", 1, {"frames": 5, "steps": 8}, "model-1"))
    assert row is not None
    assert torch.equal(store.load(row.clip_id), clip(1))
    assert (row.num_frames, row.height, row.width, row.fps, row.duration_s) == (5, 8, 8, 12.0, 5 / 12)
    assert json.loads(row.extra_json) == {"split": "train"} and json.loads(row.sampler_json) == SAMPLER
    assert (tmp_path / row.path).is_file() and store.preview_path(row.clip_id).is_file()


def test_the_name_of_a_clip_is_the_digest_of_its_shape_and_pixels(tmp_path: Path) -> None:
    row = ClipStore(tmp_path).add_many([new(1)])[0]
    pixels = (clip(1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    assert row.clip_id == hashlib.sha256(b"(5, 8, 8, 3)" + pixels.tobytes()).hexdigest()


@pytest.mark.parametrize("fps", [0.0, -12.0, float("nan"), 2000.0, 1e-6])
def test_an_impossible_rate_is_refused_also_for_pixels_that_are_there_already(tmp_path: Path, fps: float) -> None:
    store = ClipStore(tmp_path)
    for _ in range(2):
        with pytest.raises(ValueError, match="frame rate"):
            store.add_many([NewClip(clip(1), "a red circle", "p1", 2, SAMPLER, "model-1", fps)])
        assert len(store.add_many([new(1)])) == 1 == len(store)


@pytest.mark.parametrize(
    "other",
    [("a blue circle", 1, SAMPLER, "model-1"), ("a red circle", 2, SAMPLER, "model-1"), ("a red circle", 1, {"steps": 9}, "model-1"), ("a red circle", 1, SAMPLER, "m")],
)
def test_any_change_of_the_request_changes_its_key(tmp_path: Path, other: tuple[str, int, dict[str, object], str]) -> None:
    store = ClipStore(tmp_path)
    store.add_many([new(1)])
    assert store.find(request_key(*other)) is None


def test_adding_again_changes_nothing(tmp_path: Path) -> None:
    store = ClipStore(tmp_path)
    first = store.add_many([new(1), new(2), new(1)])
    before = (tmp_path / "clips.jsonl").read_bytes()
    assert ClipStore(tmp_path).add_many([new(2), new(1)]) == [first[1], first[0]]
    assert (tmp_path / "clips.jsonl").read_bytes() == before and len(store) == 2


def test_equal_pixels_of_two_prompts_share_one_file_and_have_two_rows(tmp_path: Path) -> None:
    store = ClipStore(tmp_path)
    a, b = store.add_many([new(1), new(1, "ein roter Kreis")])
    assert a.clip_id == b.clip_id and len(store.rows()) == 2
    assert len(list((tmp_path / "clips").glob("*.mkv"))) == 1


def test_a_request_with_another_clip_is_refused(tmp_path: Path) -> None:
    store = ClipStore(tmp_path)
    store.add_many([new(1)])
    with pytest.raises(UserError, match="already has another clip"):
        store.add_many([NewClip(clip(9), "a red circle", "p1", 1, SAMPLER, "model-1", 12.0)])
    assert len(ClipStore(tmp_path)) == 1


def test_only_the_time_of_creation_differs_between_two_stores(tmp_path: Path) -> None:
    rows = []
    for name in ("a", "b"):
        ClipStore(tmp_path / name).add_many([new(1), new(2)])
        rows.append([{**json.loads(line), "created_at": ""} for line in (tmp_path / name / "clips.jsonl").read_text().splitlines()])
    assert rows[0] == rows[1]
    for path in (tmp_path / "a" / "clips").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / "clips" / path.name).read_bytes()


def test_a_torn_last_line_is_dropped_and_overwritten(tmp_path: Path) -> None:
    ClipStore(tmp_path).add_many([new(1), new(2)])
    table = tmp_path / "clips.jsonl"
    whole = table.read_bytes()
    for length in range(whole.index(b"\n") + 1, len(whole), 50):
        table.write_bytes(whole[:length])
        store = ClipStore(tmp_path)
        assert len(store) == 1 and store.find(new_key(2)) is None
        store.add_many([new(2)])
        assert [row.seed for row in ClipStore(tmp_path).rows()] == [1, 2]


def new_key(seed: int) -> str:
    return request_key("a red circle", seed, SAMPLER, "model-1")


def test_a_line_that_is_no_row_is_named(tmp_path: Path) -> None:
    ClipStore(tmp_path).add_many([new(1)])
    with open(tmp_path / "clips.jsonl", "a") as file:
        file.write('{"clip_id": 3}\n')
    with pytest.raises(UserError, match="line 2") as caught:
        ClipStore(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_lost_record_is_not_found_and_can_be_made_again(tmp_path: Path) -> None:
    store = ClipStore(tmp_path)
    row = store.add_many([new(1)])[0]
    store.record_path(row.clip_id).write_bytes(b"")
    assert store.find(row.request_key) is None
    with pytest.raises(UserError, match="empty"):
        store.load(row.clip_id)
    assert store.add_many([new(1)]) == [row]
    assert torch.equal(store.load(row.clip_id), clip(1))


def test_a_record_under_a_wrong_name_is_refused(tmp_path: Path) -> None:
    store = ClipStore(tmp_path)
    a, b = store.add_many([new(1), new(2)])
    os.replace(store.record_path(b.clip_id), store.record_path(a.clip_id))
    with pytest.raises(UserError, match="another clip"):
        store.load(a.clip_id)


def test_pixels_that_are_no_numbers_leave_the_store_empty(tmp_path: Path) -> None:
    broken = NewClip(clip(1) * torch.nan, "a red circle", "p1", 1, SAMPLER, "model-1", 12.0)
    with pytest.raises(UserError, match="nan"):
        ClipStore(tmp_path / "store").add_many([broken])
    assert not (tmp_path / "store").exists()


def _fill(folder: Path, seeds: range) -> None:
    store = ClipStore(folder)
    for seed in seeds:
        store.add_many([new(seed)], preview=False)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_two_processes_add_to_one_store(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=_fill, args=(tmp_path, range(start, start + 15))) for start in (0, 10)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert sorted(row.seed for row in ClipStore(tmp_path).rows()) == list(range(25))


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_after_kill_9_every_row_has_its_clip_and_the_rest_can_be_added(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    table = tmp_path / "clips.jsonl"
    for rows in (1, 8, 30):
        worker = fork.Process(target=_fill, args=(tmp_path, range(200)))
        worker.start()
        while worker.is_alive() and (not table.exists() or table.read_bytes().count(b"\n") < rows):
            time.sleep(0.001)
        os.kill(worker.pid or 0, signal.SIGKILL)
        worker.join(60)
        store = ClipStore(tmp_path)
        assert worker.exitcode == -signal.SIGKILL and rows <= len(store) < 200
        assert [row.seed for row in store.rows()] == list(range(len(store)))
        for row in store.rows():
            assert torch.equal(store.load(row.clip_id), clip(row.seed))
    _fill(tmp_path, range(200))
    assert [row.seed for row in ClipStore(tmp_path).rows()] == list(range(200))


def test_a_full_disk_stops_in_one_line_with_the_table_whole(tmp_path: Path) -> None:
    ClipStore(tmp_path).add_many([new(1)], preview=False)
    limit = (tmp_path / "clips.jsonl").stat().st_size + 100
    with file_size_limit(limit), pytest.raises(UserError, match="cannot write") as caught:
        ClipStore(tmp_path).add_many([NewClip(torch.zeros(1, 3, 2, 2), "p", "p", 1, {}, "m", 12.0)], preview=False)
    assert "\n" not in str(caught.value)
    assert [row.seed for row in ClipStore(tmp_path).rows()] == [1]
    assert (tmp_path / "clips.jsonl").read_bytes().endswith(b"\n")

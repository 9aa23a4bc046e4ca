"""The bench of curation: flat rows at toy size; clips are what is said of them; peers are asked file by file, and what cannot be measured says why."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from align.config import load
from base_model.errors import UserError
from base_model.video.files import read_video
from recipes.bench import _curate_clips, _curate_worker, curate
from recipes.bench._curate_clips import CLEAN, DEFECTS, DUPLICATES, LONGEST, UNREADABLE, Clip, encode, make_clips
from recipes.bench.curate import Decided, clean_rows, defect_rows, f1, index_row, nearest, repeats, score, some
from tests.recipes.test_bench import assert_flat


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("bench") / "clips"
    make_clips(made, 40, seed=3, real=None)
    return made


@pytest.fixture(scope="module")
def clips(folder: Path) -> list[Clip]:
    return make_clips(folder, 40, seed=3, real=None)


def test_every_defect_is_planted_in_its_share_and_is_true_of_its_file(folder: Path, clips: list[Clip]) -> None:
    assert len(clips) == 40 == len({clip.name for clip in clips})
    assert {clip.kind for clip in clips} == {*DEFECTS, *CLEAN}
    assert all(sum(clip.kind == defect for clip in clips) == 2 for defect in DEFECTS)
    for clip in clips:
        assert (clip.kind in clip.truths) == (clip.kind in DEFECTS) and (clip.origin is not None) == (clip.kind in DUPLICATES)
        if clip.kind in UNREADABLE:
            with pytest.raises(UserError):
                read_video(folder / clip.name)
            continue
        frames = read_video(folder / clip.name).frames.astype(np.float32)
        assert len(frames) >= 12
        steps = np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))
        if clip.kind == "cut":
            assert steps.argmax() + 1 == clip.cuts[0]
        if clip.kind == "frozen":
            assert np.median(steps) < 0.5
        if clip.kind == "black":
            assert frames[-1].max() < 40
        if clip.kind == "flashing":
            assert steps.max() > 20
    earlier: set[str] = set()
    for clip in clips:
        assert clip.origin is None or clip.origin in earlier
        earlier.add(clip.name)


def test_the_same_numbers_make_the_same_clips(folder: Path, clips: list[Clip], tmp_path: Path) -> None:
    assert make_clips(tmp_path / "again", 40, seed=3, real=None) == clips
    assert all((tmp_path / "again" / clip.name).read_bytes() == (folder / clip.name).read_bytes() for clip in clips)


def test_real_textures_are_blended_so_that_no_two_clips_repeat_each_other(real_data: Path, tmp_path: Path) -> None:
    clips = make_clips(tmp_path / "clips", 40, seed=4, real=real_data / "clips")
    scored = [score(tmp_path / "clips" / clip.name) for clip in clips]
    assert all(clip.origin == repeats(clips, scored).get(clip.name) for clip in clips if clip.origin is None)


def test_clips_of_other_textures_are_not_taken_for_these(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    short, long = (np.zeros((frames, 32, 48, 3), np.uint8) for frames in (LONGEST - 1, LONGEST))
    (real / "a.mp4").write_bytes(encode(long, 12.0, crf=20))
    make_clips(tmp_path / "clips", 18, seed=3, real=real)
    for other in (None, tmp_path / "nothing"):
        with pytest.raises(UserError, match=r"clips\.json was made with another real\."):
            make_clips(tmp_path / "clips", 18, seed=3, real=other)
    (real / "a.mp4").write_bytes(encode(short, 12.0, crf=20))
    with pytest.raises(UserError, match=r"a\.mp4 has 47 frames, textures take up to 48\. Give --real a folder of longer clips"):
        make_clips(tmp_path / "others", 18, seed=3, real=real)


def test_as_few_clips_as_are_accepted_hold_every_kind(tmp_path: Path) -> None:
    assert {clip.kind for clip in make_clips(tmp_path / "clips", 18, seed=0, real=None)} == {*CLEAN, *DEFECTS}
    for number in range(18, 400):
        kinds = _curate_clips._kinds(np.random.default_rng(0), number)
        copies = [kind in DUPLICATES for kind in kinds]
        assert len(kinds) == number and kinds[: sum(copies)] == ["plain"] * sum(copies), "every copy has a clip of its own to copy"
    with pytest.raises(UserError, match="clips"):
        load(curate.Config, None, ["--clips", "17"])


def test_the_curate_bench_gives_flat_rows_and_says_what_it_could_not_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUSHES_REAL_DATA", raising=False)
    words = ["--quick", "--clips", "40", "--out", str(tmp_path / "out"), "--python", str(tmp_path / "no" / "python")]
    rows = curate.main(load(curate.Config, None, words))["rows"]
    assert isinstance(rows, list)
    assert_flat(rows)
    defects, clean, peers = ([row for row in rows if row["part"] == part] for part in ("defects", "clean", "peers"))
    assert [row["defect"] for row in defects] == list(DEFECTS) and all(row["planted"] == 2 and row["clips_per_second"] > 0 for row in defects)
    assert all(0 <= row["recall"] <= 1 for row in defects) and np.mean([row["recall"] for row in defects]) > 0.8
    assert [row["kind"] for row in clean] == list(CLEAN)
    assert len(peers) == 2 and all("cannot be imported" in row["note"] and row["ratio"] is None for row in peers)


def broken(*rules: str, repeats: str | None = None) -> Decided:
    return Decided(frozenset(rules), repeats)


def test_recall_and_precision_by_hand() -> None:
    clips = [
        Clip("0", "plain", (), None, ()), Clip("1", "cut", ("cut",), None, (3,)), Clip("2", "black", ("black", "cut"), None, (9,)),
        Clip("3", "cropped", ("cropped",), "0", ()), Clip("4", "slowed", ("slowed",), "1", ()), Clip("5", "empty", ("empty",), None, ()), Clip("6", "fast", (), None, ()),
    ]  # fmt: skip
    decided = [broken("duplicate", repeats="3"), broken(), broken("cuts", "black_share"), broken(), broken("duplicate", repeats="0"), broken("error"), broken("cuts")]
    rows = {row["defect"]: row for row in defect_rows(clips, decided)}
    assert (rows["cut"]["recall"], rows["cut"]["precision"], rows["cut"]["named"]) == (0, 0.5, 2), "the cut to black is one, the fast clip has none"
    assert (rows["black"]["recall"], rows["black"]["precision"]) == (1, 1)
    assert rows["cropped"]["recall"] == 1, "whichever of the two is kept"
    assert rows["slowed"]["recall"] == 0 and rows["slowed"]["precision"] == rows["cropped"]["precision"] == 0.5, "the wrong origin is no find"
    assert (rows["empty"]["recall"], rows["empty"]["precision"], rows["truncated"]["recall"]) == (1, 1, None)
    again = defect_rows(clips, [*decided[:4], broken("repeated_share"), *decided[5:]])
    assert next(row["recall"] for row in again if row["defect"] == "slowed") == 1, "frames that are repeated slow a clip"
    clean = {row["kind"]: row for row in clean_rows(clips, decided)}
    assert clean["fast"]["false_alarms"] == 1 and clean["fast"]["rules"] == "cuts 1"
    assert clean["plain"]["false_alarms"] == 0, "its copy is kept instead"
    assert clean_rows(clips, [broken("duplicate", repeats="2"), *decided[1:]])[0]["rules"] == "duplicate 1"


def test_f1_counts_each_cut_once_and_to_a_frame() -> None:
    clips = [Clip("0", "cut", ("cut",), None, (10, 20)), Clip("1", "plain", (), None, ())]
    assert f1(clips, [[11, 20], []]) == 1
    assert f1(clips, [[10], [5]]) == pytest.approx(2 * 1 / (2 + 2))
    assert f1(clips, [[10, 11, 12], []]) == pytest.approx(2 * 1 / (2 + 3))
    assert f1(clips[1:], [[]]) == 1


def test_the_nearest_hash_within_the_bits_is_what_a_clip_repeats() -> None:
    clips = [Clip(name, "plain", (), None, ()) for name in "abcd"]
    assert nearest(clips, [0b1111, 0, 0b1110, 1 << 40], most=1) == {"c": "a", "d": "b"}


def test_peers_are_given_copies_with_their_originals_and_clean_clips(clips: list[Clip]) -> None:
    chosen = some(clips, DUPLICATES, 20)
    names = {clip.name for clip in chosen}
    assert len(chosen) == 20 and sum(clip.origin is not None for clip in chosen) == 5
    assert all(clip.origin in names for clip in chosen if clip.origin) and any(clip.kind in CLEAN[1:] for clip in chosen)
    assert sum(clip.kind == "cut" for clip in some(clips, ("cut",), 8)) == 2 and not any(clip.kind in UNREADABLE for clip in chosen)


def test_the_index_is_measured_on_clips_whose_copies_are_known() -> None:
    row = index_row(300, moments=24)
    assert row["clips"] == 300 and row["recall"] > 0.95 and row["precision"] > 0.95 and row["seconds"] > 0


SCENEDETECT = """
class Time:
    def __init__(self, frame): self.frame_num = frame
class ContentDetector:
    def __init__(self, min_scene_len=15): self.shortest = min_scene_len
def detect(path, detector):
    return [(Time(0), Time(9)), (Time(9), Time(12))] if detector.shortest < 15 else []
"""
VIDEOHASH = """
class VideoHash:
    def __init__(self, path, storage_path): self.hash_hex = '0x' + format(int(path[-9:-4]) << 32, '016x')
"""


def test_peers_in_a_process_of_their_own_are_asked_file_by_file(folder: Path, clips: list[Clip], tmp_path: Path) -> None:
    """With packages that answer by rote."""
    (tmp_path / "scenedetect.py").write_text(SCENEDETECT)
    (tmp_path / "videohash2.py").write_text(VIDEOHASH)
    (tmp_path / "imageio_ffmpeg.py").write_text("def get_ffmpeg_exe(): return '/nowhere/ffmpeg'\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    cfg = load(curate.Config, None, ["--peer_clips", "8", "--python", str(python), "--out", str(tmp_path)])
    rows = curate.peer_rows(cfg, folder, clips)
    assert [row["what"].partition(":")[0] for row in rows] == ["cuts"] * 6 + ["copies"] * 3 and all(row["note"] is None for row in rows)
    default, shorter = rows[:3], rows[3:6]
    assert default[0]["peer"] == 0 and default[0]["ours"] > 0.5 and default[0]["clips"] == 8
    assert shorter[1]["ours"] is not None and shorter[1]["peer"] is None and rows[-1]["peer"] > 0 and rows[-1]["ratio"] > 0
    json.dumps(rows, allow_nan=False)


def test_the_worker_names_the_frames_that_begin_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scenedetect.py").write_text(SCENEDETECT)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert _curate_worker.cuts("x.mp4", 6)["cuts"] == [9] and _curate_worker.cuts("x.mp4", None)["cuts"] == []

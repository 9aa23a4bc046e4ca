"""The bench of reading: flat rows at toy size; peers make the same frames small in the same way; what cannot be measured says why."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from align.config import load
from base_model.errors import UserError
from base_model.video.files import read_video, write_mp4
from recipes.bench import _loader_worker, loader
from tests.recipes.test_bench import assert_flat


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    for k in range(2):
        write_mp4(tmp_path / f"{k}.mp4", torch.rand(5, 3, 50, 70, generator=torch.Generator().manual_seed(k)), 12.0, upscale=False)
    return tmp_path


def test_the_loader_bench_gives_flat_rows_and_says_what_it_could_not_measure(clips: Path, tmp_path: Path) -> None:
    words = ["--quick", "--clips", str(clips), "--repeats", "1", "--entries", "3", "--out", str(tmp_path / "out"), "--python", str(tmp_path / "no" / "python")]
    rows = loader.main(load(loader.Config, None, words))["rows"]
    assert isinstance(rows, list)
    assert_flat(rows)
    decode, read = ([row for row in rows if row["part"] == part] for part in ("decode", "read"))
    assert decode[0]["name"] == "ours" and decode[0]["times_faster"] is None and decode[0]["clips"] == 2 and decode[0]["frames"] == 10
    assert decode[0]["per_second"] == pytest.approx(2 / decode[0]["seconds"]) and decode[1]["mean_level"] == decode[0]["mean_level"]
    assert [(row["name"], row["seconds"]) for row in decode[2:]] == [("imageio", None), ("torchcodec", None)] and all("cannot be imported" in row["note"] for row in decode[2:])
    assert [row["name"] for row in read] == ["shards", "torch.load", "torch.load, mapped"] and all(row["times_faster_low"] <= row["times_faster"] for row in read[1:])


def test_a_peer_makes_of_the_same_frames_what_ours_does(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load(loader.Config, None, ["--clips", str(clips), "--area", "1024"])
    monkeypatch.setitem(_loader_worker.READERS, "imageio", lambda path: torch.from_numpy(read_video(path).frames).permute(0, 3, 1, 2))
    for clip in loader.clips_of(cfg, clips):
        assert clip.size == (16, 32) or clip.size == (32, 32)
        found = _loader_worker.decode("imageio", str(clip.path), list(clip.fitted), list(clip.size))
        ours = loader.small(clip)
        assert found["frames"] == len(ours) == 5 and found["mean"] == pytest.approx(float(ours.float().mean()), abs=1e-4) and tuple(ours.shape[2:]) == clip.size


def test_a_peer_in_a_process_of_its_own_is_asked_clip_by_clip(clips: Path, tmp_path: Path) -> None:
    """With the packages of this environment and an imageio that reads numbers instead of pixels, and complains more than a pipe holds."""
    (tmp_path / "imageio").mkdir()
    (tmp_path / "imageio" / "__init__.py").touch()
    (tmp_path / "imageio_ffmpeg.py").touch()
    (tmp_path / "imageio" / "v3.py").write_text("import numpy\ndef imread(path, plugin):\n    print('x' * 100_000)\n    return numpy.full((5, 50, 70, 3), 7, numpy.uint8)\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    cfg = load(loader.Config, None, ["--clips", str(clips), "--peers", "[imageio]", "--python", str(python), "--repeats", "1", "--out", str(tmp_path / "out")])
    *_, peer = loader.decode_rows(cfg, tmp_path)
    assert peer["name"] == "imageio" and peer["mean_level"] == 7 and peer["note"] is None and peer["times_faster"] > 0
    assert "x" * 100_000 in (tmp_path / "out" / "imageio.log").read_text()
    json.dumps(peer)


def test_a_folder_without_clips_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no mp4 files"):
        loader.clips_of(load(loader.Config, None, ["--clips", str(tmp_path)]), tmp_path)


def test_drawn_clips_are_decoded_where_there_are_no_real_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUSHES_REAL_DATA", raising=False)
    found = loader.clips_of(loader.Config(), tmp_path)
    assert len(found) == 4 and all(np.prod(clip.size) <= 240 * 416 for clip in found)

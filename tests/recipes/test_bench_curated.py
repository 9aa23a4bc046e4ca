"""The bench of SFT on curated clips: what is planted, what rows say of made-up runs, and that all of it runs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from recipes import cli
from recipes.bench import curated as bench


def test_defects_are_planted_in_equal_shares_and_are_what_they_are_called() -> None:
    clips = bench.found_clips(60, 0.6, seed=0)
    counts = Counter(clip.defect for clip in clips)
    assert counts.pop(None) == 24 and set(counts) == set(bench.DEFECTS) and set(counts.values()) == {6}
    clean = {clip.text: clip.frames for clip in bench.found_clips(60, 0.0, seed=0)}
    for clip in clips:
        frames = clip.frames.astype(int)
        if clip.defect == "frozen":
            assert (frames == frames[:1]).all() and (frames[0] == clean[clip.text][0]).all()
        elif clip.defect == "black":
            assert not frames.any()
        elif clip.defect == "letterboxed":
            assert not frames[:, :6].any() and not frames[:, -6:].any() and (frames[:, 6:-6] == clean[clip.text][:, 6:-6]).all()
        elif clip.defect == "flashing":
            assert (np.diff(frames.mean((1, 2, 3)))[::2] > 60).all()
        elif clip.defect == "cut":
            assert (frames[:6] == clean[clip.text][:6]).all() and (frames[6:] != clean[clip.text][6:]).any()
    copies = [clip.frames.tobytes() for clip in clips if clip.defect == "copy"]
    assert len(set(copies)) <= bench.ORIGINALS < len(copies)


def test_differences_are_paired_by_prompt_and_the_verdict_is_that_of_the_lower_end() -> None:
    rng = np.random.default_rng(0)
    start, gain = rng.random(40), 0.1 + 0.02 * rng.standard_normal((3, 40))
    runs = {bench.START: [{"judge": start.tolist()}] * 3, "everything": [{"judge": start.tolist()}] * 3, "curated": [{"judge": (start + each).tolist()} for each in gain]}
    kept = [{"found": {"clean": 10, "cut": 5}, "kept": {"clean": 9, "cut": 0}}, {"found": {"clean": 10, "cut": 5}, "kept": {"clean": 8, "cut": 1}}]
    rows = bench.rows_of(runs, kept)
    first = rows["differences"][0]
    assert first["difference"] == pytest.approx(gain.mean()) and first["difference_low"] > 0.08 and first["difference_high"] < 0.12, "prompts differ by far more"
    assert "holds (+10." in bench.verdict(rows)
    assert {row["clips"]: row["kept_share"] for row in rows["curation"]} == {"clean": 0.85, "cut": 0.1}
    worse = bench.rows_of({**runs, "curated": runs["everything"]}, kept)
    assert "does not hold" in bench.verdict(worse)


def test_the_quick_form_curates_learns_twice_and_tells_flat_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "curated", "--quick", "--json", "--write", "--results", str(tmp_path), "--date", "2026-11"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert {row["part"] for row in rows} == {"arms", "differences", "curation"} and all(set(row) == set(rows[0]) for row in rows)
    assert [row["arm"] for row in rows if row["part"] == "arms"] == [bench.START, *bench.ARMS]
    shares = {row["clips"]: row["kept_share"] for row in rows if row["part"] == "curation"}
    assert shares["black"] == shares["letterboxed"] == shares["cut"] == 0 and shares["clean"] > 0.5
    assert any("beats SFT on everything" in path.read_text() for path in tmp_path.glob("*.md"))

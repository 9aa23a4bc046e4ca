"""Curation as one command: every row has a decision, thresholds change without a look at a clip, nothing that was finished is lost or done twice, memory stays what it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from align.config import load
from base_model.errors import UserError
from base_model.video.curate import MEASURES, SENSIBLE
from base_model.video.files import write_lossless, write_mp4
from recipes import clip_openers, clip_scores, clip_table, curate
from recipes.cli import main as cli
from recipes.clip_folder import find_clips
from recipes.clip_table import Table, read_table, schema
from recipes.curate import Config, Keep, Range, decide, main, reasons_of
from recipes.opt_out import OptOut
from tests.recipes import curated
from tests.recipes.curated import LOG, Shown, frames_of
from tests.recipes.killed import busy

EASY = {"apart": None}


def decisions(out: Path) -> dict[str, dict[str, Any]]:
    rows = pq.read_table(out / "decisions.parquet").to_pylist()
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def kept(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "kept" / "metadata.jsonl").read_text().splitlines()]


def names(folder: Path, *stems: str) -> None:
    """Files that the reader of `curated.py` opens."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem in stems:
        (folder / f"{stem}.mp4").write_bytes(stem.encode())
    (folder / LOG).touch()


def looked_at(folder: Path) -> Counter[str]:
    """How often each of them was decoded."""
    return Counter((folder / LOG).read_text().split())


def run(given: Path, out: Path, **more: Any) -> dict[str, Any]:
    return curate.curated(Config(**{"input": str(given), "out": out, "workers": 2, **more}), read=curated.read)


# Deciding


def table(*rows: dict[str, Any]) -> Any:
    whole = [
        {"id": str(k), "file": f"{k}.mp4", "sha256": f"{k:064x}", "error": "", "text": "a cat", "width": 64, "height": 48, "seconds": 1.0, **row} for k, row in enumerate(rows)
    ]
    return pa.Table.from_pylist(whole, schema())


def rules(found: curate.Decisions) -> list[list[str]]:
    return [[reason.rule for reason in reasons] for reasons in found.reasons]


def test_every_measure_has_a_threshold_and_defaults_are_the_sensible_ones() -> None:
    keep = Keep()
    assert set(MEASURES) <= set(Keep.model_fields)
    for name in MEASURES:
        allowed = getattr(keep, name)
        assert (None, None) if allowed is None else (allowed.least, allowed.most) == SENSIBLE.get(name, (None, None)), name
    assert {name for name in MEASURES if getattr(keep, name) is not None} == set(SENSIBLE)


def test_a_row_has_a_reason_for_every_rule_that_it_breaks_and_what_it_cannot_tell_is_none() -> None:
    keep = Keep(cuts=Range(most=1), motion=Range(least=0.1, most=2.0), width=Range(least=64), caption=Range(least=3, most=6), faces=Range(most=0))
    rows = [
        {"cuts": 1.0, "motion": 0.1},
        {"cuts": 2.0, "motion": 2.5, "width": 63, "faces": 1},
        {"cuts": float("nan"), "motion": None},
        {"motion": 0.05, "text": "  ab "},
        {"error": "it is empty", "cuts": 9.0},
    ]
    found = decide(table(*rows), keep)
    assert rules(found) == [[], ["cuts", "motion", "width", "faces"], [], ["motion", "caption"], ["error"]] and found.kept == [True, False, True, False, False]
    assert [reason.text for reason in found.reasons[1][:2]] == ["2 cuts, at most 1 are allowed", "2.5 diagonals/s, at most 2 are allowed"]
    assert found.reasons[3][0].text == "0.05 diagonals/s, at least 0.1 are asked for" and found.reasons[4][0].text == "it is empty"
    assert found.counts()["motion"] == 2 and sum(found.counts().values()) == 7


def test_verdicts_and_endings_decide_where_they_are_known() -> None:
    rows: list[dict[str, Any]] = [{"safety": verdict, "safety_reasons": ["block P17: flashes"]} for verdict in ("allow", "review", "error", "block", None)]
    rows += [
        {"file": file, "container": kind}
        for file, kind in (("a.mp4", "png"), ("a.webm", "mp4"), ("a.MOV", "mp4"), ("a", "mp4"), ("https://h/a.mkv?x=1", "matroska"), ("t.tar::a.png", "jpeg"))
    ]
    assert rules(decide(table(*rows), Keep())) == [[], *[["safety"]] * 3, [], ["extension"], ["extension"], [], [], [], ["extension"]]
    assert rules(decide(table(*rows), Keep(safety=("allow", "review", "error", "block"), extension=False))) == [[]] * len(rows)


def hashes(*pictures: int) -> list[str]:
    """Hashes that differ by half of their bits for each two of these numbers, one a moment for a second."""
    return [np.random.default_rng(picture).bytes(32).hex() for picture in pictures for _ in range(6)]


def test_of_near_duplicates_the_largest_then_the_longest_then_the_first_is_kept_and_named() -> None:
    same, other = hashes(1, 2), hashes(3, 4)
    rows = [{"hashes": same}, {"hashes": same, "seconds": 2.0}, {"hashes": same, "width": 128}, {"hashes": other}, {"hashes": other}, {"hashes": same, "width": 256, "cuts": 5.0}]
    found = decide(table(*rows), Keep())
    assert found.kept == [False, False, True, True, False, False] and found.repeats == [2, 2, None, None, 3, None]
    assert rules(found) == [["duplicate"], ["duplicate"], [], [], ["duplicate"], ["cuts"]] and found.reasons[0][0].text == "0.0 bits apart from 2, which is kept"
    assert decide(table(*rows), Keep(apart=None)).kept == [True] * 5 + [False]


def test_a_clip_that_repeats_only_what_is_not_kept_is_kept() -> None:
    """Each second half is the next one's first: the middle one repeats both, which share nothing."""
    rows = [{"hashes": hashes(1, 2), "seconds": 3.0}, {"hashes": hashes(2, 3), "seconds": 2.0}, {"hashes": hashes(3, 4)}]
    found = decide(table(*rows), Keep())
    assert found.kept == [True, False, True] and found.repeats == [None, 0, None]


def test_clips_of_bytes_are_held_against_each_other_whatever_they_are_called() -> None:
    """Without a name, as columns of bytes have none; then all of one name, as shards count from 0 again."""
    rows = [{"sha256": "a" * 64}, {"sha256": "a" * 64}, {"hashes": hashes(1, 2)}, {"hashes": hashes(1, 2)}, {"hashes": hashes(3, 4)}]
    found = decide(table(*[{**row, "file": ""} for row in rows]), Keep())
    assert found.kept == [True, False, True, False, True] and found.repeats == [None, 0, None, 2, None]
    named = decide(table({"hashes": hashes(1, 2)}, *[{**row, "file": "clip.mp4"} for row in rows]), Keep())
    assert named.kept == [True, True, True, False, False, True] and named.repeats == [None, None, None, 0, 0, None], "the two of one name and content are one file's"


def test_the_same_file_twice_is_one_and_one_file_with_two_captions_is_two_pairs() -> None:
    rows = [{"sha256": "a" * 64}, {"sha256": "a" * 64}, {"sha256": "a" * 64, "file": "0.mp4", "text": "other words"}]
    found = decide(table(*rows), Keep())
    assert found.kept == [True, False, True] and found.reasons[1][0].text == "the same file as 0, which is kept"


def test_what_must_not_be_used_is_dropped_for_that_alone_and_is_no_better_copy() -> None:
    rows = [{"hashes": hashes(1, 2), "width": 256, "cuts": 9.0}, {"hashes": hashes(3, 4), "sha256": "b" * 64}, {"hashes": hashes(3, 4), "width": 32}]
    found = decide(table(*rows), Keep(), OptOut(frozenset(["b" * 64]), (tuple(hashes(1, 2)),)))
    assert found.opted_out == [True, True, False] and rules(found) == [["opt_out"], ["opt_out"], []]


def test_thresholds_are_said_on_the_command_line() -> None:
    cfg = load(Config, None, ["--input=x", "--keep.cuts.most", "2", "--keep.motion.least", "0.1", "--keep.letterbox", "null", "--keep.apart", "null", "--columns.text", "words"])
    assert (cfg.keep.cuts, cfg.keep.motion, cfg.keep.letterbox, cfg.keep.apart) == (Range(most=2), Range(least=0.1), None, None) and cfg.columns.text == "words"


# The command


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of real files, good ones and all kinds of bad ones."""
    folder = tmp_path_factory.mktemp("mixed")
    clips = {seed: torch.stack([torch.from_numpy(frame.copy()).permute(2, 0, 1) / 255 for frame, _ in frames_of(Shown(seed, 16, 96, ""))]) for seed in (1, 2, 3)}
    for seed in (1, 2):
        write_mp4(folder / f"good{seed}.mp4", clips[seed], 12, upscale=False)
    write_lossless(folder / "copy.mkv", torch.nn.functional.interpolate(clips[1], size=(64, 64)), 12)
    boxed = clips[3].clone()
    boxed[:, :, :16] = boxed[:, :, -16:] = 0
    write_mp4(folder / "boxed.mp4", boxed, 12, upscale=False)
    (folder / "empty.mp4").touch()
    (folder / "cut.mp4").write_bytes((folder / "good1.mp4").read_bytes()[:-300])
    Image.fromarray(curated.textured(9, 96)).save(folder / "picture.png")
    (folder / "named.mp4").write_bytes((folder / "picture.png").read_bytes() + b" ")
    (folder / "extra").mkdir()
    os.link(folder / "good2.mp4", folder / "extra" / "again.mp4")
    for name in ("good1", "good2", "copy", "boxed", "picture", "extra/again"):
        (folder / f"{name}.txt").write_text(f"a clip called {name}")
    return folder


def test_a_folder_of_good_and_bad_files_becomes_a_folder_that_sft_reads(mixed: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in sorted(mixed.rglob("*")) if path.is_file()}
    result = main(Config(input=str(mixed), out=tmp_path, workers=2))
    found = decisions(tmp_path)
    assert {name: row["rules"] for name, row in found.items()} == {
        "boxed.mp4": ["letterbox"],
        "copy.mkv": ["duplicate"],
        "cut.mp4": ["error"],
        "empty.mp4": ["error"],
        "good1.mp4": [],
        "good2.mp4": [],
        "named.mp4": ["extension"],
        "picture.png": [],
        "extra/again.mp4": ["duplicate"],
    }
    assert found["copy.mkv"]["repeats"] == "good1.mp4" and found["extra/again.mp4"]["repeats"] == "good2.mp4"
    assert result["clips"] == 9 and result["kept"] == 3 and result["errors"] == 2 and result["dropped_for"] == {"error": 2, "duplicate": 2, "letterbox": 1, "extension": 1}
    clips, dropped = find_clips(tmp_path / "kept")
    assert sorted(clip.text for clip in clips) == [f"a clip called {name}" for name in ("good1", "good2", "picture")] and not dropped
    rows = kept(tmp_path)
    assert {row["id"]: (tmp_path / "kept" / row["file_name"]).stat().st_ino for row in rows} == {row["id"]: (mixed / row["id"]).stat().st_ino for row in rows}
    assert {path: path.read_bytes() for path in sorted(mixed.rglob("*")) if path.is_file()} == before
    told = json.loads((tmp_path / "curated.json").read_text())
    assert told["kept"] == 3 and Keep.model_validate(told["keep"]) == Keep()


def test_report_is_a_page_as_a_bare_word_too_and_without_an_input_that_of_before_is_written_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    Image.fromarray(curated.textured(9, 96)).save(tmp_path / "in" / "picture.png")
    words = ["curate", "--report", "--out", str(tmp_path / "out")]
    assert cli([*words]) == 2 and "nothing to curate, input" in capsys.readouterr().err
    assert cli(["curate", str(tmp_path / "in"), *words[1:], "--workers", "1"]) == 0
    page = tmp_path / "out" / "report.html"
    before = page.read_bytes()
    page.unlink()
    assert cli([*words]) == 0 and page.read_bytes() == before and str(page) in capsys.readouterr().out
    assert cli([*words, "--keep.cuts.most", "9"]) == 2, "thresholds need the input"
    page.unlink()
    assert cli(["curate", str(tmp_path / "in"), "--report", "false", *words[2:], "--workers", "1"]) == 0 and not page.exists()


def test_thresholds_change_without_a_look_at_any_clip(mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main(Config(input=str(mixed), out=tmp_path, workers=1))
    before = {path.name: path.read_bytes() for path in (tmp_path / "scores").iterdir()}

    def refuse(*_: object, **__: object) -> Any:
        raise AssertionError("a clip was looked at")

    monkeypatch.setattr(curate.Worker, "ask", refuse)
    monkeypatch.setattr(clip_scores, "file_hash", refuse)
    for kind in (clip_openers.OnDisk, clip_openers.AtAddress, clip_openers.Within, clip_openers.Held):
        monkeypatch.setattr(kind, "open", refuse)
    strict = main(Config(input=str(mixed), out=tmp_path, keep=Keep(frames=Range(least=2), apart=None)))
    assert strict["measured_now"] == 0 and {row["id"] for row in kept(tmp_path)} == {"copy.mkv", "good1.mp4", "good2.mp4", "extra/again.mp4"}
    assert not [path.name for path in (tmp_path / "kept").iterdir() if path.name.startswith("picture")]
    main(Config(input=str(mixed), out=tmp_path, keep=Keep(frames=Range(least=99))))
    assert kept(tmp_path) == [] and [path.name for path in (tmp_path / "kept").iterdir()] == ["metadata.jsonl"]
    main(Config(input=str(mixed), out=tmp_path))
    assert len(kept(tmp_path)) == 3 and {path.name: path.read_bytes() for path in (tmp_path / "scores").iterdir()} == before


@pytest.mark.timed
def test_a_clip_that_kills_or_hangs_its_worker_is_a_row_with_an_error_and_the_others_go_on(tmp_path: Path) -> None:
    names(tmp_path / "in", *(f"{seed}-4-48" for seed in range(6)), "7-4-48-killed", "8-4-48-hangs", "9-4-48-large", "10-4-48-wrong", "11-4-48-damaged")
    result = run(tmp_path / "in", tmp_path / "out", clip_seconds=3, clip_memory=1 << 30, keep=Keep.model_validate(EASY))
    errors = {name: row["reasons"][0] for name, row in decisions(tmp_path / "out").items() if row["rules"] == ["error"]}
    assert errors == {
        "7-4-48-killed.mp4": "its worker was killed by SIGKILL",
        "8-4-48-hangs.mp4": "its worker was killed after 3 s",
        "9-4-48-large.mp4": "it takes more memory than a worker may have",
        "10-4-48-wrong.mp4": "cannot be measured: RuntimeError: a bug of two lines",
        "11-4-48-damaged.mp4": "the video file is truncated or damaged after 3 frames",
    }
    assert result["kept"] == 6 and result["errors"] == 5


def test_rows_with_errors_are_kept_as_they_are_unless_they_are_asked_for_again(tmp_path: Path) -> None:
    names(tmp_path / "in", "1-4-48", "2-4-48-damaged")
    for again, expected in ((False, 2), (False, 2), (True, 3)):
        run(tmp_path / "in", tmp_path / "out", again=again, workers=1)
        assert looked_at(tmp_path / "in").total() == expected
    assert len(decisions(tmp_path / "out")) == 2


def test_every_row_of_a_manifest_has_a_decision_and_its_words(tmp_path: Path) -> None:
    names(tmp_path, "1-4-48", "2-4-48", "3-4-48")
    long, hebrew = "word " * 2000, "\u05d7\u05ea\u05d5\u05dc \u202e1\u202c"
    rows: Sequence[Any] = (
        {"path": "1-4-48.mp4", "text": long, "licence": "CC0-1.0", "source": "web", "id": "long", "shot": 7},
        {"path": "2-4-48.mp4", "text": hebrew, "id": "rtl"},
        {"path": "3-4-48.mp4", "text": "again", "id": "rtl"},
        {"path": "none.mp4", "text": "x", "id": "none"},
    )
    (tmp_path / "p.jsonl").write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows) + b"no JSON\n" + b'{"path": "3-4-48.mp4", "text": "\xff"}\n')
    run(tmp_path / "p.jsonl", tmp_path / "out")
    found = decisions(tmp_path / "out")
    assert list(found) == ["long", "rtl", "rtl#3", "none", "line 5 of p.jsonl", "3-4-48.mp4"] and [row["kept"] for row in found.values()] == [True, True, *[False] * 4]
    assert [row["reasons"][0] for row in found.values() if not row["kept"]] == [
        "the id 'rtl' stands in an earlier row",
        "cannot be read: No such file or directory",
        "not a JSON object",
        "the caption is not UTF-8",
    ]
    one, two = kept(tmp_path / "out")
    assert {**one, "file_name": ""} == {"file_name": "", "text": long, "licence": "CC0-1.0", "source": "web", "id": "long", "extra": {"shot": 7}} and two["text"] == hebrew
    scores = read_table(tmp_path / "out" / "scores")
    assert {row["id"]: row["remarks"] for row in scores.to_pylist() if row["remarks"]} == {"rtl": "2 marks of writing direction in the caption", "line 5 of p.jsonl": "no caption"}


def test_a_new_caption_and_a_new_file_are_measured_and_the_rest_is_not(tmp_path: Path) -> None:
    names(tmp_path / "in", "1-4-48", "2-4-48", "3-4-48")
    run(tmp_path / "in", tmp_path / "out", workers=1)
    names(tmp_path / "in", "4-4-48")
    (tmp_path / "in" / "2-4-48.txt").write_text("a caption")
    (tmp_path / "in" / "3-4-48.mp4").unlink()
    assert run(tmp_path / "in", tmp_path / "out", workers=1)["measured_now"] == 2
    assert looked_at(tmp_path / "in") == {"1-4-48.mp4": 1, "2-4-48.mp4": 2, "3-4-48.mp4": 1, "4-4-48.mp4": 1}
    assert list(decisions(tmp_path / "out")) == ["1-4-48.mp4", "2-4-48.mp4", "4-4-48.mp4"] and [row["text"] for row in kept(tmp_path / "out")] == ["", "a caption", ""]


def test_clips_in_tar_files_are_written_out_where_they_are_kept(tmp_path: Path) -> None:
    import io
    import tarfile

    write_mp4(tmp_path / "a.mp4", torch.stack([torch.from_numpy(frame.copy()).permute(2, 0, 1) / 255 for frame, _ in frames_of(Shown(1, 8, 96, ""))]), 12, upscale=False)
    with tarfile.open(tmp_path / "s.tar.gz", "w:gz") as tar:
        for name, content in (("k/a.mp4", (tmp_path / "a.mp4").read_bytes()), ("k/a.txt", b"a cat"), ("k/b.mp4", b"no clip")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    main(Config(input=str(tmp_path / "s.tar.gz"), out=tmp_path / "out", workers=1))
    (row,) = kept(tmp_path / "out")
    assert row["id"] == "s.tar.gz::k/a.mp4" and row["text"] == "a cat" and (tmp_path / "out" / "kept" / row["file_name"]).read_bytes() == (tmp_path / "a.mp4").read_bytes()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".lock", "curated.json", "decisions.parquet", "kept", "report.html", "scores"]


def test_what_must_not_be_used_leaves_its_pictures_and_its_link(tmp_path: Path) -> None:
    names(tmp_path / "in", "1-12-64", "2-12-64")
    run(tmp_path / "in", tmp_path / "out", workers=1)
    assert len(kept(tmp_path / "out")) == 2
    rows = {row["id"]: row for row in read_table(tmp_path / "out" / "scores").to_pylist()}
    for line in (rows["1-12-64.mp4"]["sha256"], " ".join(rows["1-12-64.mp4"]["hashes"])):
        (tmp_path / "list").write_text(f"{line}\n")
        result = run(tmp_path / "in", tmp_path / "out", opt_out=tmp_path / "list")
        assert result["measured_now"] == 0 and decisions(tmp_path / "out")["1-12-64.mp4"]["rules"] == ["opt_out"]
        assert [row["id"] for row in kept(tmp_path / "out")] == ["2-12-64.mp4"] and len(list((tmp_path / "out" / "kept").iterdir())) == 2
        pictures = {row["id"]: row["thumbnails"] for row in read_table(tmp_path / "out" / "scores").to_pylist()}
        assert not pictures["1-12-64.mp4"] and pictures["2-12-64.mp4"]


def test_filters_are_asked_where_that_is_wanted_and_richer_rows_serve_poorer_questions(tmp_path: Path) -> None:
    names(tmp_path / "in", "1-12-64", "2-12-64")
    (tmp_path / "in" / "2-12-64.txt").write_text("strobe lights flashing")
    assert run(tmp_path / "in", tmp_path / "out", workers=1)["kept"] == 2
    assert run(tmp_path / "in", tmp_path / "out", workers=1, safety=True)["dropped_for"] == {"safety": 1}
    assert run(tmp_path / "in", tmp_path / "out", workers=1)["measured_now"] == 0
    assert looked_at(tmp_path / "in") == {"1-12-64.mp4": 2, "2-12-64.mp4": 2}


def test_copies_are_made_where_they_are_asked_for_and_another_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names(tmp_path / "in", "1-4-48")

    def elsewhere(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", elsewhere)
    with pytest.raises(UserError, match=r"cannot link .*Give --files copy, or an --out on the same file system: scores are kept"):
        run(tmp_path / "in", tmp_path / "out")
    assert run(tmp_path / "in", tmp_path / "out", files="copy")["measured_now"] == 0
    (row,) = kept(tmp_path / "out")
    assert (tmp_path / "out" / "kept" / row["file_name"]).read_bytes() == b"1-4-48"


def test_what_is_missing_or_contradicts_itself_is_told_before_the_work(tmp_path: Path) -> None:
    for more, told in (
        ({"input": None}, "nothing to curate, input"),
        ({"aesthetic": tmp_path / "head"}, "an aesthetic head needs the encoder"),
        ({"opt_out": tmp_path / "none"}, "cannot read the list"),
        ({"input": str(tmp_path / "none")}, "nothing here can be read"),
        ({"filters": {"blocked": str(tmp_path / "none")}, "safety": True}, "cannot read the blocked clips"),
    ):
        with pytest.raises(UserError, match=told):
            run(tmp_path, tmp_path / "out", **more)


def test_two_that_curate_into_one_folder_are_refused(mixed: Path, tmp_path: Path) -> None:
    with busy(tmp_path / "out"), pytest.raises(UserError, match="another process is at work in"):
        main(Config(input=str(mixed), out=tmp_path / "out"))
    assert not (tmp_path / "out" / "scores").exists()


# What a kill leaves


def curating(given: Path, out: Path, workers: int = 2) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "tests.recipes.curated", str(given), str(out), str(workers)], env=environment, stderr=subprocess.DEVNULL)


def test_after_a_kill_the_same_command_repeats_no_finished_clip_and_loses_none(tmp_path: Path) -> None:
    stems, workers = [f"{seed}-4-48-slow" for seed in range(60)], 2
    names(tmp_path / "in", *stems)
    process = curating(tmp_path / "in", tmp_path / "out")
    try:
        deadline = time.monotonic() + 120
        while looked_at(tmp_path / "in").total() < 20:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(children) > workers  # the workers, and what begins them
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
    finished = len(Table(tmp_path / "out" / "scores", {}))
    assert 20 - 2 * workers <= finished < 60
    result = run(tmp_path / "in", tmp_path / "out")
    assert result["clips"] == 60 and result["measured_now"] == 60 - finished
    assert sorted(read_table(tmp_path / "out" / "scores")["id"].to_pylist()) == sorted(f"{stem}.mp4" for stem in stems) == sorted(decisions(tmp_path / "out"))
    times = looked_at(tmp_path / "in")
    assert set(times) == {f"{stem}.mp4" for stem in stems} and sum(times.values()) <= 60 + 2 * workers and max(times.values()) <= 2


# Memory


def sparse(folder: Path, rows: int, files: int = 20) -> Path:
    """A manifest of so many rows about a few files of a megabyte with nothing in them."""
    folder.mkdir()
    for seed in range(files):
        with open(folder / f"{seed}-3-32.mp4", "wb") as file:
            file.write(f"{seed}".encode())
            file.truncate(1 << 20)
    with open(folder / "pairs.jsonl", "w", encoding="utf-8") as table:
        for row in range(rows):
            table.write(json.dumps({"id": f"row {row}", "file_name": f"{row % files}-3-32.mp4", "text": f"caption {row} " + "word " * (row % 50), "licence": "CC0-1.0"}) + "\n")
    return folder / "pairs.jsonl"


def resident() -> int:
    """Bytes of this process and of all that it began."""
    me = psutil.Process()
    return sum(process.memory_info().rss for process in (me, *me.children(recursive=True)))


def watched(given: Path, out: Path, rows: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Curates, and looks at the memory at every tenth of the way."""
    seen, number, add = list[int](), 0, Table.add

    def looked(self: Table, row: Any) -> None:
        nonlocal number
        number += 1
        add(self, row)
        if number % (rows // 10) == 0:
            seen.append(resident())

    with monkeypatch.context() as patched:
        patched.setattr(Table, "add", looked)
        result = run(given, out)
    assert result["clips"] == result["kept"] == rows and len(seen) == 10
    return seen


@pytest.mark.parametrize(("rows", "part"), [(200, 20), pytest.param(20_000, 256, marks=pytest.mark.slow)])
def test_memory_stays_the_same_from_a_tenth_to_the_end(rows: int, part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 rows of a megabyte each are 20 GB that no disk holds."""
    monkeypatch.setattr(clip_table, "ROWS", part)
    run(sparse(tmp_path / "warm", part + 1), tmp_path / "first")  # what is imported on the way
    seen = watched(sparse(tmp_path / "in", rows), tmp_path / "out", rows, monkeypatch)
    print(f"{rows} rows: {[round(each / 2**20) for each in seen]} MiB")
    assert max(seen) - seen[0] < 48 << 20


def test_a_long_clip_is_measured_in_less_memory_than_its_frames_take(tmp_path: Path) -> None:
    names(tmp_path / "in", "1-400-640")
    memory, frames = 340 << 20, 400 * 640 * 640 * 3
    assert memory < 0.75 * frames and memory < 0.2 * 4 * frames  # as bytes, and as floats
    result = run(tmp_path / "in", tmp_path / "out", workers=1, clip_memory=memory, safety=True)
    assert result["errors"] == 0 and result["kept"] == 1


def test_reasons_of_a_row_are_those_of_the_table() -> None:
    row = {"cuts": 3.0, "error": "", "text": "x"}
    assert [reason.rule for reason in reasons_of(row, Keep())] == ["cuts"]


def test_measures_are_said_behind_kept_captions_by_their_place_and_nothing_else_changes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    folder = tmp_path / "clips"
    folder.mkdir()
    for k in range(4):
        frame = rng.integers(100, 130 + 30 * k, (1, 64, 96, 3)).astype(np.uint8)
        write_mp4(folder / f"{k}.mp4", np.concatenate([np.roll(frame, 3 * t, 2) for t in range(12)]), 12.0, upscale=False)
        (folder / f"{k}.txt").write_text(f"texture {k}")
    plain, said = (Config(input=str(folder), out=tmp_path / "out", workers=1, keep=Keep(apart=None), say=say) for say in ((), ("contrast",)))
    main(plain)
    before = kept(tmp_path / "out")
    main(said)
    assert [row["text"] for row in kept(tmp_path / "out")] == [f"texture {k}, contrast {place} of 9" for k, place in enumerate((0, 3, 6, 9))]
    assert [row | {"text": ""} for row in kept(tmp_path / "out")] == [row | {"text": ""} for row in before] and len(before) == 4
    assert len(json.loads((tmp_path / "out" / "curated.json").read_text())["said"]["contrast"]) == 9
    with pytest.raises(UserError, match="nothing called 'beauty' is measured"):
        main(Config(input=str(folder), out=tmp_path / "out", say=("beauty",)))

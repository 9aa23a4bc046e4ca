"""`rushes import-rankings` and `rushes export-rankings`, as they are typed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from recipes.cli import main
from reward.comparisons import load_comparisons
from reward.importers.formats import FORMATS

FIXTURES = Path(__file__).parents[1] / "reward" / "fixtures"
HEADER = "path_A,path_B,A_model,B_model,prompt,VQ,MQ,TA,Overall,fps_A,num_frames_A,fps_B,num_frames_B"


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, Any]]:
    """(exit status, what the command found or the error it gave)."""
    status = main([*map(str, words), "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_a_benchmark_goes_to_test_unless_asked_otherwise_and_what_was_trained_on_stays_where_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [f"prompt number {word}" for word in ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]]

    def labels(name: str, said: list[str]) -> Path:
        rows = [f"{name}{i}a.mp4,{name}{i}b.mp4,kling,gen2,{prompt},A,A,A,A,24,48,24,48" for i, prompt in enumerate(said)]
        (tmp_path / f"{name}.csv").write_text("\n".join([HEADER, *rows]))
        return tmp_path / f"{name}.csv"

    _, got = run(capsys, "import-rankings", "videogen-rewardbench", labels("first", prompts[:4]), "--out", tmp_path / "out", "--split", "train")
    assert got["prompts_by_split"] == {"train": 4}
    _, got = run(capsys, "import-rankings", "videogen-rewardbench", labels("second", prompts[2:]), "--out", tmp_path / "out")
    assert got["prompts_by_split"] == {"train": 2, "test": 8}
    _, got = run(capsys, "import-rankings", "videogen-rewardbench", labels("third", prompts), "--out", tmp_path / "out", "--split", "val")
    assert got["prompts_by_split"] == {"train": 4, "test": 8}, "a split once given stays"
    status, got = run(capsys, "import-rankings", "videogen-rewardbench", labels("fourth", prompts), "--out", tmp_path / "out", "--split", "dev")
    assert status == 2 and "split" in got["error"]["message"]


def test_an_import_says_on_one_screen_what_was_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ("a.mp4,b.mp4,kling,gen2,a cat,A,same,B,A,24,48,24,48,5", "b.mp4,c.mp4,gen2,luma,a cat,B,,same,B,24,48,24,48,4", "a.mp4,b.mp4,kling,gen2,,A,A,A,A,24,48,24,48,3")
    (tmp_path / "labels.csv").write_text("\n".join([f"{HEADER},stars", *rows]))
    status, got = run(capsys, "import-rankings", "videogen-rewardbench", tmp_path / "labels.csv", "--out", tmp_path / "out")
    assert status == 0 and got == {
        "out": str(tmp_path / "out"),
        "source": "KwaiVGI/VideoGen-RewardBench",
        "homepage": "https://huggingface.co/datasets/KwaiVGI/VideoGen-RewardBench",
        "licence": "Apache-2.0 (commercial)",
        "rows": 3,
        "answers": 7,
        "by_dimension": {"VQ": 2, "MQ": 1, "TA": 2, "Overall": 2},
        "by_kind": {"pair": 7},
        "ties": 2,
        "skipped": {"no answer in MQ": 1, "no prompt": 1},
        "rows_about_clips_compared_before": 0,
        "unknown_columns": ["stars"],
        "prompts": 1,
        "people": 1,
        "clips": 3,
        "clips_with_media": 0,
        "prompts_by_split": {"test": 1},
        "answers_in_folder": 7,
    }
    assert main(["import-rankings", "videogen-rewardbench", str(tmp_path / "labels.csv"), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "answers_in_folder: 7" in said and "unknown_columns:\n- stars" in said and len(said.splitlines()) <= 40
    assert len(load_comparisons(tmp_path / "out").events) == 7


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_imported_by_its_name(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file,) = FIXTURES.glob(f"{name}.*")
    status, got = run(capsys, "import-rankings", name, file, "--out", tmp_path / "out", "--source", "mine", "--licence", "MIT")
    assert status == 0 and got["answers"] == got["answers_in_folder"] > 0 and got["licence"] == "MIT (commercial)"
    assert {(event.source_dataset, event.licence) for event in load_comparisons(tmp_path / "out").events} == {("mine", "MIT")}


def test_what_is_not_for_commercial_use_is_refused_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, file, reason in (("safesora", "safesora.json", "13 answers of PKU-Alignment/SafeSora under CC-BY-NC-4.0"), ("trl", "trl.jsonl", "4 answers of trl under no licence")):
        status, got = run(capsys, "import-rankings", name, FIXTURES / file, "--out", tmp_path / "out", "--commercial")
        assert status == 2 and reason in got["error"]["message"] and not (tmp_path / "out").exists()
    assert run(capsys, "import-rankings", "trl", FIXTURES / "trl.jsonl", "--out", tmp_path / "out", "--commercial", "--licence", "CC0-1.0")[0] == 0


def test_rankings_go_from_one_format_to_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "import-rankings", "videoalign", FIXTURES / "videoalign.csv", "--out", tmp_path / "one")
    status, got = run(capsys, "export-rankings", "label-studio", tmp_path / "one", tmp_path / "tasks.json")
    assert status == 0 and got == {"file": str(tmp_path / "tasks.json"), "rows": 4, "answers": 13, "left_out": {"kind likert": 3}}
    _, got = run(capsys, "import-rankings", "label-studio", tmp_path / "tasks.json", "--out", tmp_path / "two")
    assert got["by_dimension"] == {"VQ": 4, "MQ": 2, "TA": 4}
    _, got = run(capsys, "export-rankings", "trl", tmp_path / "two", tmp_path / "pairs.jsonl", "--dimension", "VQ")
    assert got["rows"] == 3 and got["left_out"] == {"choice tie": 1}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["import-rankings"], "which format and file? Write rushes import-rankings FORMAT FILE. Formats: videogen-rewardbench, videoalign"),
        (["import-rankings", "videoalign"], "1 words after import-rankings, on the command line. Write rushes import-rankings FORMAT FILE"),
        (["import-rankings", "video-align", "x.csv"], "unknown format 'video-align'. Did you mean videoalign?"),
        (["import-rankings", "videoalign", "none.csv"], "cannot read none.csv"),
        (["import-rankings", "videoalign", "x.csv", "--format", "trl"], "cannot read x.csv"),
        (["import-rankings", "trl", "x", "--media", "nowhere"], "no such folder of media, nowhere"),
        (["export-rankings"], "which format, folder and file? Write rushes export-rankings FORMAT FOLDER FILE. Formats: videoalign, label-studio, trl"),
        (["export-rankings", "safesora", "a", "b"], "unknown format 'safesora'"),
        (["export-rankings", "trl", "nowhere", "b"], "no such file, nowhere"),
    ],
)
def test_what_is_typed_wrong_gives_one_line(words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and message in said


def test_an_export_of_a_dimension_nobody_judged_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "import-rankings", "trl", FIXTURES / "trl.jsonl", "--out", tmp_path / "out")
    status, got = run(capsys, "export-rankings", "trl", tmp_path / "out", tmp_path / "b", "--dimension", "VQ")
    assert status == 2 and "no answers in the dimension VQ" in got["error"]["message"] and "Dimensions there: overall" in got["error"]["message"]


def test_help_names_the_words_a_command_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import-rankings", "--help"]) == 0
    assert "rushes import-rankings FORMAT FILE [--key.path value ...]" in capsys.readouterr().out
    assert main(["export-rankings", "--help"]) == 0
    assert "rushes export-rankings FORMAT FOLDER FILE [--key.path value ...]" in capsys.readouterr().out


@pytest.mark.timed
def test_ten_times_the_rows_take_about_ten_times_as_long(tmp_path: Path) -> None:
    """No work is quadratic; the 26,500 rows of VideoGen-RewardBench take about two seconds of one core."""

    def seconds(rows: int) -> float:
        file = tmp_path / f"{rows}.csv"
        lines = (f"{i // 20}-{i % 7}.mp4,{i // 20}-{7 + i % 5}.mp4,m{i % 7},n{i % 5},prompt {i // 20},A,B,same,A,24,48,24,48" for i in range(rows))
        file.write_text("\n".join([HEADER, *lines]))
        begun = time.process_time()
        got = FORMATS["videogen-rewardbench"].read(file)
        assert len(got.events) == 4 * rows
        return time.process_time() - begun

    few, many = min(seconds(650) for _ in range(3)), seconds(6500)
    print(f"650 rows: {few:.2f} s, 6,500 rows: {many:.2f} s")
    assert many < 30 * few

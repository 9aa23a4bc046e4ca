"""Demos of two checkouts are made in turns, kept, and compared stage by stage."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from align.config import commit
from base_model.errors import UserError
from recipes.bench import _stacks, demo
from recipes.statistics import bootstrap_crossed


def run(seconds: float, commit: str = "abc", right: float = 0.5) -> dict[str, Any]:
    share = {"mean": right, "low": right - 0.1, "high": right + 0.1}
    told = {"stage_seconds": {"sft": seconds, "rl": 3 * seconds}, "wall_seconds": 4 * seconds, "cpu_seconds": 7 * seconds, "peak_memory_bytes": 2**30, "commit": commit}
    return {**told, "judge": {"base": share, "rl": share}, "flash_rate": {"rl": {"mean": 0.0, "low": 0.0, "high": 0.1}}}


@pytest.fixture
def older(tmp_path: Path) -> Path:
    (tmp_path / "older" / "recipes").mkdir(parents=True)
    for name in ("__init__.py", "demo.py"):
        (tmp_path / "older" / "recipes" / name).touch()
    return tmp_path / "older"


def keep(folder: Path, runs: Mapping[str, dict[str, Any]]) -> None:
    folder.mkdir(exist_ok=True)
    for name, each in runs.items():
        (folder / f"{name}.json").write_text(json.dumps(each))


def test_ratios_are_of_runs_right_after_each_other_and_their_median_is_told(older: Path, tmp_path: Path) -> None:
    keep(tmp_path / "out", {"now-0": run(10), "before-0": run(12), "now-1": run(20), "before-1": run(28), "now-2": run(10), "before-2": run(13)})
    rows = demo.main(demo.Config(before=older, rounds=3, out=tmp_path / "out", write=True, results=tmp_path / "results", date="2026-11"))["rows"]
    seconds = {row["what"]: (row["now"], row["before"], row["ratio"], row["low"], row["high"]) for row in rows if row["part"] == "seconds"}
    assert seconds["sft"] == pytest.approx((10, 13, 1.3, 1.2, 1.4)) and seconds["all stages, CPU"] == pytest.approx((70, 91, 1.3, 1.2, 1.4))
    (file,) = (tmp_path / "results").iterdir()
    assert "3 demos of each in turns" in file.read_text() and "| sft | 10 | 13 | 1.3 | 1.2 | 1.4 |" in file.read_text()
    assert f"| commit | {run(10)['commit']}, {commit()} |" in file.read_text(), "who made the demos, and who wrote the table"


def test_a_profile_of_another_commit_is_not_told_as_one_of_this(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def looked_at(checkout: Path, out: Path, configuration: list[str], command: tuple[str, str]) -> None:
        Path(command[1]).write_text(json.dumps({"align/run.py:fit": [3.0, 6.0]}))

    monkeypatch.setattr(demo, "run_demo", looked_at)
    assert demo.profiled(demo.Config(), tmp_path) == [{"where": "align/run.py:fit", "seconds": 3.0, "share": 1.0, "threads": 2.0}]
    monkeypatch.setattr(demo, "commit", lambda: "c0ffee")
    with pytest.raises(UserError, match=r"costs\.json was made with another commit\. Give the same values, another --out"):
        demo.profiled(demo.Config(), tmp_path)


def test_how_well_it_ends_stands_beside_what_it_took(older: Path, tmp_path: Path) -> None:
    keep(tmp_path / "out", {"now-0": run(10, right=0.4), "before-0": run(12, right=0.5)})
    rows = demo.main(demo.Config(before=older, rounds=1, out=tmp_path / "out"))["rows"]
    (right,) = [row for row in rows if row["what"] == "every attribute right, rl, %"]
    assert (right["now"], right["before"], right["interval"]) == (40, 50, "[30.0, 50.0]")


def test_runs_of_several_commits_are_not_one_measurement(tmp_path: Path) -> None:
    keep(tmp_path / "out", {"now-0": run(10, "abc"), "now-1": run(10, "def")})
    with pytest.raises(UserError, match=r"made by commit def, others by abc\. Give another --out"):
        demo.main(demo.Config(rounds=2, out=tmp_path / "out"))


def test_a_folder_without_the_demo_is_no_older_checkout(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no recipes/demo\.py, before\. Give a checkout"):
        demo.main(demo.Config(before=tmp_path, out=tmp_path / "out"))


def test_a_demo_that_fails_says_where_to_look_and_is_not_kept(older: Path, tmp_path: Path) -> None:
    (older / "recipes" / "cli.py").write_text("raise SystemExit(3)")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"ended with status 3, .*now-0\.log"):
        demo.run_demo(older, tmp_path / "out" / "now-0", [])


@pytest.mark.timed
def test_time_goes_to_the_innermost_function_of_the_project_and_says_how_many_threads_are_busy() -> None:
    from base_model.threads import in_threads

    def spin(seconds: float) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            torch.rand(200, 200) @ torch.rand(200, 200)

    with _stacks.watched() as spent:
        curve = draws_that_take(0.6)
        in_threads(spin, [0.3], torch.device("cpu"))
    assert len(curve) > 0 and "recipes/statistics.py:bootstrap_crossed" in spent
    assert {name.partition(":")[0] for name in spent} <= {"", "recipes/statistics.py"}, "what goes side by side goes to who asked for it"
    wall, cpu = (sum(both[k] for name, both in spent.items() if name) for k in (0, 1))
    assert wall == pytest.approx(0.6, abs=0.3) and cpu > 0.3 * wall
    rows = _stacks.largest({"a": [6.0, 12.0], "b": [3.0, 3.0], "": [0.5, 0.5], "c": [0.5, 0.0]}, 2)
    assert [(row["where"], row["share"], row["threads"]) for row in rows] == [("a", 0.6, 2.0), ("b", 0.3, 1.0), ("all others", 0.1, 0.5)]


def draws_that_take(seconds: float) -> list[float]:
    found, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        found.append(bootstrap_crossed(np.random.default_rng(0).random((3, 40))).mean)
    return found

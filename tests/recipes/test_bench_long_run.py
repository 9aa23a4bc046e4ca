"""A long run that stays as it began is told from one that leaks, and a short one is measured."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import psutil
import pytest

from base_model.errors import UserError
from recipes.bench import long_run

MIB = 2**20


def looks_at(**growing: float) -> list[dict[str, float]]:
    """A look an iteration at a run of 100; what grows, by how much an iteration."""
    steady = {"memory": 500.0 * MIB, "handles": 4.0, "threads": 4.0, "checkpoints": 200_000.0, "folders": 2.0, "other": 0.0, "seconds": 0.0}
    rates = {"other": 1000.0, "seconds": 0.5, **growing}
    return [{"iteration": float(i), **{name: value + i * rates.get(name, 0.0) for name, value in steady.items()}} for i in range(1, 101)]


def rows_of(tmp_path: Path, looks: list[dict[str, float]], lines: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    told = [{"iteration": i, "toward_good": 0.0, "reward": 1.0} for i in range(100)] if lines is None else lines
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))
    return {row["what"]: row["holds"] for row in long_run.rows_of(long_run.Config(iterations=100), looks, tmp_path)}


def test_what_stays_holds_and_what_leaks_does_not(tmp_path: Path) -> None:
    steady = rows_of(tmp_path, looks_at())
    assert steady.pop("seconds an iteration") is None and all(steady.values()) and len(steady) == 7
    for what, leak in (
        ("memory, MiB", {"memory": 0.2 * MIB}),
        ("file handles", {"handles": 0.1}),
        ("threads", {"threads": 0.1}),
        ("checkpoints, KiB", {"checkpoints": 500.0}),
        ("checkpoint folders at once, most", {"folders": 0.05}),
    ):
        found = rows_of(tmp_path, looks_at(**leak))
        assert [name for name, holds in found.items() if holds is False] == [what]


def test_other_files_may_grow_but_not_faster_and_faster(tmp_path: Path) -> None:
    looks = looks_at()
    for look in looks:
        look["other"] = look["iteration"] ** 2 * 100
    assert rows_of(tmp_path, looks)["other files, KiB an iteration"] is False


@pytest.mark.parametrize("lines", [range(99), [*range(100), 99], [*range(50), 49, *range(51, 100)]])
def test_an_iteration_without_its_one_line_is_seen(tmp_path: Path, lines: Any) -> None:
    told = [{"iteration": i, "toward_good": 0.0, "reward": 1.0} for i in lines]
    assert rows_of(tmp_path, looks_at(), told)["lines of metrics, each iteration once"] is False
    told = [{"iteration": i, "toward_good": 0.0, "reward": None if i == 7 else 1.0} for i in range(100)]
    assert rows_of(tmp_path, looks_at(), told)["lines of metrics, each iteration once"] is False


def test_a_checkpoint_that_moves_into_place_while_it_is_looked_at_ends_no_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("00000005", ".partial-00000010"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "weights").write_bytes(b"12345")
    scandir = os.scandir

    def gone(folder: Any) -> Any:
        if ".partial" in str(folder):
            raise FileNotFoundError(folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", gone)
    found = long_run.look(psutil.Process(), tmp_path)
    assert (found["checkpoints"], found["folders"], found["other"]) == (5, 2, 0)


def test_a_run_too_fast_to_be_looked_at_is_one_line() -> None:
    with pytest.raises(UserError, match="too fast to be looked at in its middle"):
        long_run.windowed([look for look in looks_at() if look["iteration"] < 30 or look["iteration"] > 80], "memory")


def test_a_short_run_stays_as_it_began_and_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_run, "LOOK_SECONDS", 0.02)
    cfg = long_run.Config(out=tmp_path / "out", iterations=60, evaluate_every=30, save_every=5, write=True, results=tmp_path / "results", date="2026-11")
    rows = {row["what"]: row for row in long_run.main(cfg)["rows"]}
    print(rows)
    assert all(rows[what]["holds"] for what in ("memory, MiB", "file handles", "threads", "checkpoint folders at once, most", "lines of metrics, each iteration once"))
    monkeypatch.setattr(long_run, "run_watched", None)
    assert {row["what"]: row for row in long_run.main(cfg)["rows"]} == rows
    for name in ("save_every", "evaluate_every"):
        with pytest.raises(UserError, match=f"rows-60.json was made with another {name}\\."):
            long_run.main(cfg.model_copy(update={name: 1}))
    (file,) = (tmp_path / "results").glob("2026-11_*_long-run.md")
    assert "--iterations 60" in file.read_text()

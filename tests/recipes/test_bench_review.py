"""What reviews tell of a filter: audits that are drawn as said, rivals against closed forms, and coverage that can fail."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from align.config import load
from recipes import cli
from recipes.bench import review
from recipes.bench.review import BASE, DELTA, HALF, NAIVE, RANDOM, RANDOM_MANY, SHARED, STRATIFIED, WAYS, WORLDS, audited, by_delta, naively, variance


def config(*more: str) -> review.Config:
    return load(review.Config, None, ["--runs", "300", "--draws", "800", *more])


def test_the_world_is_the_one_that_is_described() -> None:
    assert BASE.clips == 20_000 and BASE.rate == 0.02 and BASE.recall == 0.8 and BASE.right / BASE.blocked == pytest.approx(0.6, abs=0.001)
    assert BASE.unstratified().missed == (80,) and all(sum(world.sizes) == 19_467 for world in WORLDS)
    assert {round(world.rate, 4) for world in WORLDS[:4]} == {0.02} and WORLDS[-1].rate == pytest.approx(0.005, abs=3e-4)


def test_an_audit_finds_the_truth_in_the_mean_and_its_variance_is_the_formula() -> None:
    rng = np.random.default_rng(0)
    runs = [audited(BASE, STRATIFIED, rng).review for _ in range(2_000)]
    missed = np.array([sum(group.total[0] for group in one.passed) for one in runs])
    expected = float(np.mean([variance(one.passed) for one in runs]))
    print("mean:", missed.mean(), "variance:", missed.var(), "formula:", expected)
    assert missed.mean() == pytest.approx(80, abs=4 * missed.std() / 2_000**0.5) and missed.var() == pytest.approx(expected, rel=0.15)


def test_the_delta_interval_says_nothing_where_no_miss_was_seen() -> None:
    rng = np.random.default_rng(0)
    seen = next(each for each in (audited(BASE, RANDOM, rng) for _ in range(200)) if not any(each.counts[1:]))
    assert by_delta(seen, 0, 100)[:3] == (1, 1, 1) and naively(seen, 0, 0).value == 1


def test_intervals_hold_the_truth_and_rivals_do_not() -> None:
    """Of 300 audits, so that 0.95 is known to 0.013: three of that below what is asked would be noticed."""
    rows = {(row["audit"], row["estimate"]): row for row in review.recall_rows(config(), BASE, (RANDOM, STRATIFIED, RANDOM_MANY), list(WAYS))}
    for key, row in rows.items():
        print(*key, row["coverage"], round(row["width"], 3))
    mine = rows[STRATIFIED.name, SHARED]
    assert mine["coverage"] >= 0.92 and mine["width"] < 0.33 and mine["width"] < rows[STRATIFIED.name, HALF]["width"]
    assert mine["sd"] == pytest.approx(0.051, abs=0.01) and rows[RANDOM.name, SHARED]["sd"] == pytest.approx(0.1, abs=0.015)
    assert rows[RANDOM_MANY.name, SHARED]["sd"] == pytest.approx(0.052, abs=0.01) and rows[RANDOM.name, SHARED]["no_miss_seen"] == pytest.approx(0.08, abs=0.05)
    assert all(rows[name, NAIVE]["coverage"] < 0.2 for name in (RANDOM.name, STRATIFIED.name)) and rows[RANDOM.name, DELTA]["coverage"] < 0.92


def test_readers_errors_and_corrected_rates() -> None:
    believed, confirmed, taken_out = review.reader_rows(config(), BASE, STRATIFIED)
    print(believed, confirmed, taken_out, sep="\n")
    assert believed["coverage"] < 0.2 and believed["mean"] < 0.5 and confirmed["coverage"] >= 0.92 and taken_out["coverage"] >= 0.88
    raw, audit, again, stored = review.rate_rows(config(), BASE, RANDOM)
    print(raw, audit, again, stored, sep="\n")
    assert raw["mean"] > 0.025 and audit["mean"] == pytest.approx(0.02, abs=0.001) and stored["mean"] == pytest.approx(0.02, abs=0.002)
    assert audit["bound_holds"] >= 0.92 and audit["bound_holds"] >= again["bound_holds"] and stored["bound_holds"] >= 0.92


def test_the_quick_form_gives_flat_rows_and_writes_its_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["bench", "review", "--quick", "--runs", "12", "--draws", "200", "--json", "--write", "--results", str(tmp_path), "--date", "2026-11"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len({tuple(row) for row in rows}) == 1 and {row["part"] for row in rows} == {"claims", "recall", "elsewhere", "readers", "corrected"}
    (file,) = tmp_path.iterdir()
    assert "# What reviews tell of a filter" in file.read_text() and "12 simulated audits a row" in file.read_text()

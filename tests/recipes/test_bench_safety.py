"""The benchmark of safety filters: what its rows say, and that a filter or runner that is wrong shows in them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from torch import Tensor

from align.config import load
from base_model.errors import UserError
from recipes import cli
from recipes.bench import safety
from recipes.bench._filter_faults import Clock, Plan, random_plan, told_runner
from reward.safety.contract import Ruling, SafetyRunner, Verdict
from reward.safety.policy import load_policy
from reward.safety.video import FlashFilter

POLICY = load_policy()
COLUMNS = {"part", "check", "cases", "allowed_under_fault", "disagreements", "recall", "false_positive_rate", "coverage"}


def config(*more: str) -> safety.Config:
    return load(safety.Config, None, ["--sequences", "60", *more])


class Sleeps(FlashFilter):
    def check_videos(self, video: Tensor, prompts: Sequence[str], fps: float) -> list[list[Ruling]]:
        return [[replace(each, verdict=Verdict.ALLOW, score=0.1) for each in row] for row in super().check_videos(video, prompts, fps)]


def test_a_flash_filter_that_sees_nothing_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    right = safety.flash_row(config(), POLICY)
    assert right["holds"] and right["recall"] == 1 and right["disagreements"] == 0
    monkeypatch.setattr(safety, "FlashFilter", Sleeps)
    wrong = safety.flash_row(config(), POLICY)
    assert not wrong["holds"] and wrong["recall"] == 0 and wrong["false_positive_rate"] == 0 and wrong["disagreements"] > 5


def test_a_runner_that_fails_open_shows() -> None:
    class FailsOpen(SafetyRunner):
        def _errors(self, *told: object) -> list[Ruling]:
            return [replace(each, verdict=Verdict.ALLOW, score=0.0) for each in super()._errors(*told)]  # type: ignore[arg-type]

    def wrong(plan: Plan) -> SafetyRunner:
        made = told_runner(plan, POLICY, Clock())
        made.__class__ = FailsOpen
        return made

    plans = [random_plan(Random(seed), POLICY) for seed in range(100)]
    row = safety.fault_row("wrong", plans, POLICY, wrong)
    assert not row["holds"] and row["allowed_under_fault"] > 5
    assert safety.fault_row("right", plans, POLICY, lambda plan: told_runner(plan, POLICY, Clock()))["holds"]


def test_prompts_that_cannot_be_read_are_said_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    for path, says in ((tmp_path / "none.txt", "cannot read prompts"), (tmp_path / "empty.txt", "no prompt")):
        with pytest.raises(UserError, match=says):
            safety.main(config("--prompts", str(path)))


def test_the_quick_form_gives_flat_rows_and_writes_its_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\na strobe light\n")
    small = ["--plans", "20", "--real", "1", "--sequences", "20", "--runs", "4", "--repeats", "1", "--prompts", str(tmp_path / "prompts.txt")]
    assert cli.main(["bench", "safety", "--quick", *small, "--json", "--write", "--results", str(tmp_path / "results"), "--date", "2026-11"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len({tuple(row) for row in rows}) == 1 and rows[0].keys() >= COLUMNS and {row["part"] for row in rows} == {"faults", "filters", "reviews", "isolation"}
    assert [row["allowed_under_fault"] for row in rows if row["part"] == "faults"] == [0, 0]
    own = next(row for row in rows if row["check"] == "prompts of prompts.txt")
    assert own["false_positive_rate"] == 0.5 and own["holds"] is False
    (file,) = (tmp_path / "results").iterdir()
    assert "# Safety filters" in file.read_text() and "Does not hold: " in file.read_text()

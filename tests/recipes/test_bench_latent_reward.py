"""A latent reward beside the one on pixels: rows of every arm, what the clock splits, what is reached, and that nothing finished is done again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.config import load
from base_model.errors import UserError
from recipes import cli, latent_reward, nft
from recipes.bench import latent_reward as bench
from recipes.bench.latent_reward import ARMS, Arm
from tests.recipes.small import save_small_start

FREE, PIXEL_FREE = Arm("latent", False), Arm("pixel", False)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return save_small_start(tmp_path_factory.mktemp("given"))


def config(given: list[str], *more: str) -> bench.Config:
    return load(bench.Config, None, [*given, "--sampler", "{steps: 2, frames: 5, height: 16, width: 16}", "--distil.reader", "{after: [1], width: 16, heads: 2}", *more])


def test_every_part_has_flat_rows_and_a_second_call_trains_and_judges_nothing(given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = bench.shrunk(config(given, "--out", str(tmp_path / "out"), "--seeds", "[0, 1]")).model_copy(update={"seeds": (0, 1), "write": True, "results": tmp_path / "results"})
    rows = bench.main(cfg)["rows"]
    assert isinstance(rows, list) and len({tuple(row) for row in rows}) == 1
    assert all(type(value) in (str, int, float, bool, type(None)) for row in rows for value in row.values())
    parts: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        parts.setdefault(row["part"], []).append(row)
    assert [row["t"] for row in parts["agreement"]] == [0.0, 0.1, 0.25, 0.5, 0.75, 0.9]
    names = [arm.name for arm in ARMS]
    assert [row["arm"] for row in parts["seconds"]] == names and [row["policy"] for row in parts["end"]] == ["sft", *names]
    for row in parts["seconds"]:
        assert row["seconds_per_clip"] == pytest.approx(sum(row[f"{phase}_seconds"] for phase in ("rollout", "decode", "reward", "update")), rel=1e-6)
        assert (row["decode_seconds"] == 0) == (row["arm"] == "latent-free") and row["reward_seconds"] > 0
        assert row["arm"].startswith("latent") or row["seconds_over_pixel"] == row["cpu_seconds_over_pixel"] == 1
    for row in parts["end"]:
        assert row["judge_low"] <= row["judge"] <= row["judge_high"] and (row["latent_minus_pixel"] is None) == (not row["policy"].startswith("latent"))
    assert [(row["arm"], row["rollouts"]) for row in parts["learning"]] == [(name, look) for name in names for look in (0, 1, 2)]
    (file,) = (tmp_path / "results").iterdir()
    assert "of at least 0.9 at low noise" in file.read_text() and "2 seeds of RL" in file.read_text() and "## Agreement" in file.read_text()
    for module in (latent_reward, nft):
        monkeypatch.setattr(module, "main", lambda *_, **__: pytest.fail("it is finished"))
    monkeypatch.setattr(bench, "judge_policy", lambda *_: pytest.fail("it is judged"))
    again = bench.main(cfg)["rows"]
    assert isinstance(again, list) and [row for row in again if row["part"] == "end"] == parts["end"]
    with pytest.raises(UserError, match="another clips"):
        bench.main(cfg.model_copy(update={"clips": 1}))


def test_some_of_what_is_given_is_not_enough(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "latent-reward", "--quick", *given[:4]]) == 2
    assert "Give all three, or none" in capsys.readouterr().err


def laps(rollout: float, decode: float, reward: float, update: float, cpu: float) -> dict[str, float]:
    return {"rollout": rollout, "decode": decode, "reward": reward, "update": update, "cpu": cpu}


def test_ratios_are_taken_round_by_round_and_distilling_pays_once_what_is_saved_adds_up(given: list[str]) -> None:
    cfg = config(given)
    clips = cfg.policy.prompts * cfg.policy.group_size
    slow, fast = laps(4, 2, 3, 11, 30), laps(4, 0, 1, 11, 24)
    busy = [{name: 3 * value for name, value in lap.items()} for lap in (slow, fast)]
    told = {arm: [[slow, slow], [busy[0]] * 2, [slow, slow]] for arm in ARMS} | {FREE: [[fast, fast], [busy[1]] * 2, [fast, fast]]}
    made = bench.Made(Path("m"), {}, Path("g"), {"seconds": 100.0})
    rows = {row["arm"]: row for row in bench.second_rows(cfg, made, told)}
    free = rows["latent-free"]
    assert free["seconds_per_clip"] == pytest.approx(16 / clips) and free["decode_seconds"] == 0 and free["reward_seconds"] == pytest.approx(1 / clips)
    assert [free[f"seconds_over_pixel{end}"] for end in ("", "_low", "_high")] == pytest.approx([16 / 20] * 3), "a busy round slows both"
    assert free["cpu_seconds_over_pixel"] == pytest.approx(0.8) and free["clips_that_pay_for_distilling"] == pytest.approx(100 / (4 / clips))
    assert rows["latent-limit"]["clips_that_pay_for_distilling"] is None, "nothing is saved, and nothing pays"


def test_what_both_reach_is_timed_from_the_start(given: list[str]) -> None:
    cfg = config(given)
    clips = cfg.policy.prompts * cfg.policy.group_size
    numbers = np.array([0.0, 4.0, 8.0])
    looks = {PIXEL_FREE: (numbers, np.array([[0.2, 0.4, 0.6], [0.2, 0.4, 0.6]])), FREE: (numbers, np.array([[0.2, 0.5, 0.5], [0.2, 0.3, 0.5]]))}
    rows = {row["arm"]: row for row in bench.reach_rows(cfg, looks, {"pixel-free": 0.02, "latent-free": 0.01})}
    assert rows["pixel-free"]["judge"] == rows["latent-free"]["judge"] == pytest.approx(0.5)
    assert rows["pixel-free"]["rollouts"] == pytest.approx(6, abs=1e-3) and rows["latent-free"]["rollouts"] == pytest.approx(8, abs=1e-3)
    assert rows["latent-free"]["seconds"] == pytest.approx(8 * clips * 0.01, rel=1e-3)
    learned = bench.learning_rows(cfg, looks, {"pixel-free": 0.02, "latent-free": 0.01})
    assert [row["judge"] for row in learned] == pytest.approx([0.2, 0.4, 0.6, 0.2, 0.4, 0.5]) and learned[-1]["clips"] == 8 * clips


def test_the_end_is_paired_over_prompts_and_seeds(given: list[str]) -> None:
    cfg = config(given).model_copy(update={"clips": 2})
    ids = [f"p{k}" for k in range(6)]

    def one(shares: list[float]) -> dict[str, Any]:
        scores = np.arange(12.0).tolist()
        return {"judge": dict(zip(ids, shares, strict=True)), "flashing": 3, "clips": 12, "pixel": scores, "latent": scores[::-1], "guard": scores}

    start = one([0.0] * 6)
    found = {PIXEL_FREE: [one([0.5] * 6), one([0.5] * 6)], FREE: [one([0.75] * 6), one([0.75] * 6)]}
    rows = {row["policy"]: row for row in bench.end_rows(cfg, start, found)}
    assert rows["sft"]["judge"] == 0 and rows["sft"]["gain"] is None and rows["sft"]["seeds"] == 1
    assert rows["latent-free"]["gain"] == 0.75 and [rows["latent-free"][f"latent_minus_pixel{end}"] for end in ("", "_low", "_high")] == [0.25] * 3
    assert rows["latent-free"]["flashing"] == pytest.approx(6 / 24) and rows["latent-free"]["spearman_within"] == pytest.approx(-1)
    assert rows["latent-free"]["pixel_reward"] == rows["latent-free"]["guard"] == pytest.approx(5.5)


def test_a_verdict_needs_the_whole_interval(given: list[str]) -> None:
    def parts(low: float, high: float) -> dict[str, list[dict[str, Any]]]:
        measured = {"t": 0.0, "spearman": 0.9, "spearman_low": low, "spearman_high": high, "spearman_within": 0.5, "spearman_within_low": 0.4, "spearman_within_high": 0.6}
        seconds = {"arm": "latent-free", "seconds_over_pixel": 0.8, "seconds_over_pixel_low": 0.7, "seconds_over_pixel_high": 0.9}
        end = {"policy": "latent-free", "latent_minus_pixel": 0.01, "latent_minus_pixel_low": -0.02, "latent_minus_pixel_high": 0.04}
        return {"agreement": [{**measured, "t": 0.5, "spearman": 0.1}, measured], "seconds": [seconds], "end": [end]}

    for low, high, word in ((0.91, 0.95, "holds"), (0.85, 0.95, "cannot be told"), (0.8, 0.89, "does not hold")):
        first, second = bench.verdicts(parts(low, high))
        assert f": {word} over all clips (0.900 [" in first and "does not hold among clips of one prompt" in first
        assert "0.80 [0.70, 0.90]" in second and "+1.0 points [-2.0, +4.0]" in second
    assert bench.in_brackets([{"a": 0.5, "a_low": 0.25, "a_high": 1.0, "b": "x", "c": None, "c_low": None, "c_high": None}]) == [{"a": "0.5 [0.25, 1]", "b": "x", "c": None}]
    assert math.isclose(bench.shrunk(config(given)).policy.iterations, 2) and json.dumps(bench.shrunk(config(given)).model_dump(mode="json"))

"""One round or two at equal cost: what each arm is given, how differences are taken, when two rounds count as better, and that nothing finished is done again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.config import dump, load
from base_model.errors import UserError
from recipes import nft, rounds
from recipes.bench import rounds as bench
from recipes.bench.rounds import Arm, Ended
from recipes.statistics import bootstrap_crossed
from tests.recipes.small import save_small_network

IDS = [f"p{k}" for k in range(8)]


def config(*words: str) -> bench.Config:
    return load(bench.Config, None, list(words))


def ended(shares: list[float], number: int = 1, flashing: int = 0) -> Ended:
    row = {"answers": 16, "takes": 32, "forward_passes": 500, "accuracy_newest": 0.6, "accuracy_newest_before": None, "reward_before": -1.0, "reward_after": 1.0}
    row |= {"blocked_before": 0.1, "blocked_after": 0.0, "kl_from_first": 0.01}
    return Ended(Path("n"), [row] * number, {"judge": dict(zip(IDS, shares, strict=True)), "flashing": flashing, "clips": 16})


def test_both_arms_are_given_the_same_rankings_rollouts_start_and_seed(tmp_path: Path) -> None:
    cfg = config("--rankings", "32", "--policy.iterations", "6")
    start = save_small_network(tmp_path / "start.safetensors")
    assert [(arm.rounds, arm.constrained) for arm in bench.arms_of(cfg)] == [(1, False), (2, False), (1, True), (2, True)]
    for arm in bench.arms_of(cfg):
        told = bench.rounds_config(cfg, tmp_path, start, arm, 5)
        setting = rounds.setting_of(told, 1)
        assert isinstance(setting, nft.Config)
        assert told.rounds * told.prompts == 32 and told.rounds * setting.policy.iterations == 6 and told.overlap == 0 and told.seed == 5 and told.labelers == "simulated"
        assert setting.constrained == arm.constrained and setting.model == start and not setting.guards.watch and setting.guard is None
        assert {**dump(setting.policy), "iterations": 6} == dump(cfg.policy), "all other keys reach the recipe"
    names = {bench.rounds_config(cfg, tmp_path, start, arm, seed).out for arm in bench.arms_of(cfg) for seed in (0, 1)}
    assert len(names) == 8
    with pytest.raises(UserError, match="Give an even number"):
        bench.run_all(config("--policy.iterations", "5"), tmp_path)


def test_differences_are_paired_over_seeds_and_prompts() -> None:
    cfg = config("--limits", "[false]")
    rng = np.random.default_rng(0)
    one, two = rng.random((3, 8)).round(2), rng.random((3, 8)).round(2)
    found = {Arm(1, False): [ended(list(row)) for row in one], Arm(2, False): [ended(list(row), 2) for row in two]}
    (row,) = bench.difference_rows(cfg, found)
    assert [row[f"two_minus_one{end}"] for end in ("", "_low", "_high")] == pytest.approx(list(bootstrap_crossed(two - one)))
    assert row["limit"] is False and row["two_rounds_are_better"] is None
    start = {"judge": dict.fromkeys(IDS, 0.25), "flashing": 4, "clips": 16}
    sft, first, second = bench.end_rows(cfg, start, found)
    assert sft["judge"] == 0.25 and sft["gain"] is None and sft["flashing"] == 0.25 and sft["forwards"] is None
    assert first["gain"] == pytest.approx(one.mean() - 0.25) and second["judge"] == pytest.approx(two.mean())
    spent = 32 * 6 + 500 - 2 * 32 * 6
    assert (first["forwards"], second["forwards"]) == (spent, 2 * spent), "looks at held-out prompts are left out"
    assert [(each["policy"], each["round"]) for each in bench.round_rows(found)] == [("one round, free", 1), ("two rounds, free", 1), ("two rounds, free", 2)]


@pytest.mark.parametrize(("gap", "better", "says"), [(0.25, True, "Two rounds beat one"), (-0.25, False, "Two rounds are worse"), (0.0, None, "cannot be told")])
def test_two_rounds_are_better_only_where_the_whole_interval_says_so(gap: float, better: bool | None, says: str) -> None:
    cfg = config("--limits", "[true]")
    found = {Arm(1, True): [ended([0.5] * 8)], Arm(2, True): [ended([0.5 + gap] * 8, 2)]}
    rows = bench.difference_rows(cfg, found)
    assert rows[0]["two_rounds_are_better"] is better
    (line,) = bench.verdicts(rows)
    assert says in line and f"{100 * gap:+.1f} points" in line and "under the limit" in line


def test_the_quick_form_goes_through_all_of_it_and_a_second_call_repeats_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = save_small_network(tmp_path / "start.safetensors")
    words = ["--model", str(start), "--sampler", "{frames: 5, height: 16, width: 16}", "--out", str(tmp_path / "out"), "--write", "--results", str(tmp_path / "results")]
    cfg = bench.shrunk(config(*words))
    assert len(cfg.seeds) == 1 and cfg.limits == (True,) and cfg.model == start and bench.shrunk(config()).model is not None
    rows: Any = bench.main(cfg)["rows"]
    assert len({tuple(row) for row in rows}) == 1 and all(value is None or isinstance(value, str | int | float) for row in rows for value in row.values())
    parts = [(row["part"], row["policy"]) for row in rows]
    assert parts == [
        *(("end", name) for name in ("SFT", "one round, limit", "two rounds, limit")),
        ("difference", None),
        *(("rounds", name) for name in ("one round, limit", "two rounds, limit", "two rounds, limit")),
    ]
    one, two = (row for row in rows if row["part"] == "end" and row["policy"] != "SFT")
    assert one["answers"] == pytest.approx(two["answers"], abs=3) and one["forwards"] == pytest.approx(two["forwards"], rel=0.1)
    (file,) = (tmp_path / "results").iterdir()
    text = file.read_text()
    assert file.name.endswith("_rounds.md") and "at equal rankings and rollouts, under the limit" in text and "1 seeds" in text and "## Difference" in text
    for module, name in ((nft, "main"), (bench, "judge_network")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("it is finished"))
    assert bench.main(cfg)["rows"] == rows
    with pytest.raises(UserError, match="begun with other settings"):
        bench.main(cfg.model_copy(update={"strobe": 0.5}))

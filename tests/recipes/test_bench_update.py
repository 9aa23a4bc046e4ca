"""Reward against forward passes: what algorithms cost is what hooks count, rows say what runs did, and nothing finished is done again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.config import load
from base_model.errors import UserError
from recipes import grpo
from recipes.bench import update as bench
from recipes.bench.update import ALGORITHMS, Climbed, Finished
from tests.recipes.small import save_small_start


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return save_small_start(tmp_path_factory.mktemp("given"))


def config(given: list[str], *more: str) -> bench.Config:
    small = ["--sampler", "{frames: 5, height: 16, width: 16}", "--prompts", "3", "--clips", "2", "--held_out_prompts", "2", "--prompts_a_rollout", "2"]
    return load(bench.Config, None, [*given, *small, *more])


def start_of(cfg: bench.Config, out: Path) -> bench.Start:
    return bench.the_start(cfg.begin, out, cfg.model, cfg.reward, cfg.guard, strobe=cfg.strobe, sampler=cfg.sampler)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_costs_what_its_row_of_the_table_says(name: bench.Name, given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(given)
    algorithm, clips = ALGORITHMS[name], 2 * 8
    rows: list[dict[str, Any]] = []
    monkeypatch.setattr(bench, "looks_of", lambda found, *_: [row for row in found if "reward" in row and not rows.append(row)])
    rollouts = 16 if name == "default" else 3
    found = bench.climb(cfg, start_of(cfg, tmp_path), name, 1e-3, 0, rollouts * clips * algorithm.per_clip, tmp_path)
    each = np.diff([row["forward_equivalents"] for row in rows]) / clips
    print(name, each, found["forwards"] / found["clips"])
    assert len(rows) == rollouts and found["clips"] == rollouts * clips and found["seconds"] > 0
    if name == "default":  # a prompt's noisy step is drawn: one of the first three
        assert set(each.tolist()) <= {2 * (3 - k + (k + 1) / 8 + 3 / 8 + 1 / 8) for k in (0, 0.5, 1, 1.5, 2)} and each.mean() == pytest.approx(algorithm.per_clip, abs=0.6)
    else:
        assert each.tolist() == [algorithm.per_clip] * (rollouts - 1)


def test_every_run_has_a_row_and_a_second_call_trains_and_judges_nothing(given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(given, "--out", str(tmp_path / "out"), "--algorithms", "[default, nft-few]", "--seeds", "[0, 1]", "--rates", "[1.0e-4, 1.0e-2]", "--budget", "0.01")
    cfg = cfg.model_copy(update={"write": True, "results": tmp_path / "results"})
    rows = bench.main(cfg)["rows"]
    assert isinstance(rows, list) and len({tuple(row) for row in rows}) == 1
    assert all(type(value) in (str, int, float, bool, type(None)) for row in rows for value in row.values())
    parts: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        parts.setdefault(row["part"], []).append(row)
    assert [(row["algorithm"], row["seed"]) for row in parts["runs"]] == [(name, seed) for name in ("default", "nft-few") for seed in (0, 1)]
    asked = ["algorithm", "config", "seed", "forwards_per_clip", "forwards_total", "seconds", "judge_start", "judge_end", "judge_auc", "kl_total", "diversity", "violation_rate"]
    assert list(bench.run_rows(cfg, bench.compare(cfg, cfg.out, start_of(cfg, cfg.out)))[0]) == asked
    assert all(row["forwards_per_clip"] < 8 and row["kl_total"] > 0 and row["seconds"] > 0 for row in parts["runs"])
    assert [(row["algorithm"], row["lr"]) for row in parts["tuning"]] == [(name, lr) for name in ("default", "nft-few") for lr in (1e-4, 1e-2)]
    assert sum(row["chosen"] for row in parts["tuning"]) == 2
    (file,) = (tmp_path / "results").glob("*.md")
    assert "All that was asked for holds" in file.read_text() or "Does not hold" in file.read_text()
    assert (tmp_path / "results" / "update.svg").read_text().startswith("<svg")
    assert not list((tmp_path / "out").rglob("checkpoints")), "of a finished run the network stays"
    monkeypatch.setattr(bench, "climb", lambda *_: pytest.fail("it is finished"))
    monkeypatch.setattr(bench, "judged", lambda *_: pytest.fail("it is judged"))
    assert bench.main(cfg)["rows"] == rows
    with pytest.raises(UserError, match="another clips"):
        bench.main(cfg.model_copy(update={"clips": 1}))


def climbed(judge: list[float], forwards: list[float], guard: float = 0.0) -> Climbed:
    return Climbed([{"forwards": x, "judge": y, "guard": guard, "reward": 0.0} for x, y in zip(forwards, judge, strict=True)], forwards[-1], 10, 1.0, "a network")


def test_the_area_is_the_mean_of_the_curve_up_to_the_smallest_budget() -> None:
    one = climbed([0.2, 0.6, 0.6], [0, 100, 400])
    assert bench.area(one, 100) == pytest.approx(0.4) and bench.area(one, 400) == pytest.approx((100 * 0.4 + 300 * 0.6) / 400)
    assert bench.area(one, 50) == pytest.approx(0.3), "straight lines between looks"


def test_a_claim_holds_where_the_end_is_no_lower_in_a_tenth(given: list[str]) -> None:
    judged = {"judge": {"a": 0.5, "b": 1.0}, "flashing": 0.0, "diversity": 1.0, "kl": 2.0}

    def finished(*runs: Climbed, end: float = 0.5) -> Finished:
        return Finished(1e-3, {1e-3: runs[0]}, runs, judged, [{**judged, "judge": {"a": end, "b": 1.0}}] * len(runs))

    peer = finished(climbed([0.2, 0.6, 0.5], [0, 500, 1000]), climbed([0.2, 0.4, 0.5], [0, 500, 1000]))
    assert bench.target({"flow-grpo": peer}) == pytest.approx(0.5)
    fast, never = (finished(climbed(judge, [0, 40, 80])) for judge in ([0.2, 0.5, 0.8], [0.2, 0.2, 0.2]))
    assert bench.forwards_to(fast, 0.5) == pytest.approx(40, abs=1e-3) and bench.forwards_to(never, 0.5) is None
    twice, lower, longer = (finished(climbed([0.5], [cost]), climbed([0.5], [cost]), end=end) for cost, end in ((80, 0.5), (80, 0.25), (120, 0.9)))
    for ours, holds, said in ((twice, True, "+0.0 points [+0.0, +0.0], in 0.080"), (lower, False, "-12.5 points ["), (longer, False, ", in 0.120")):
        cheap, reached = bench.claim_rows({"default": ours, "flow-grpo": peer})
        assert not cheap["holds"] and cheap["found"] in ("8.00", "12.00") and reached["holds"] == holds and said in reached["found"]
    assert bench.best_rate({1e-3: climbed([0.9], [1], guard=0.1), 1e-2: climbed([0.1], [1], guard=0.2)}) == 1e-2, "the guard chooses, not the judge"
    rows = bench.algorithm_rows(config(given, "--algorithms", "[default, flow-grpo]"), {"default": fast, "flow-grpo": peer})
    assert [row["reached"] for row in rows] == [pytest.approx(40, abs=1e-3), pytest.approx(500, abs=500)] and rows[0]["gain"] == 0


def test_the_default_that_is_compared_is_what_rushes_grpo_does_by_itself() -> None:
    cfg = load(grpo.Config, Path(grpo.__file__).parent / "configs" / "tiny" / "grpo.yaml", [])
    policy, sampler = bench.settings_of(bench.Config(), "default", 1e-3, bench.ALGORITHMS["default"].budget)
    own = {"micro_batch", "evaluate_every", "save_every"}  # how often it is looked at and saved, and in what portions it is computed
    assert cfg.sampler == sampler and cfg.policy.model_dump(exclude=own) == policy.model_dump(exclude=own)

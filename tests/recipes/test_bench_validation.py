"""The bench of the held-out loss: a ratio of variances with a known answer, what is fixed and what is random, flat rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from align.config import load
from align.progress import Progress
from base_model.errors import UserError
from recipes.bench import validation
from recipes.bench.validation import Config, Looks, clip_sets, row_of, variance_ratio
from recipes.examples import Velocities
from recipes.pairs import encode_pairs
from tests.recipes.small import save_small_network, small_model
from tests.recipes.test_bench import assert_flat

TOY = ["--sizes", "[1x16x16]", "--clips", "[1, 2]", "--repeats", "3", "--quantiles", "2"]


def test_a_ratio_of_variances_is_found_and_its_interval_holds_it() -> None:
    """For normal values the ratio over the truth is F-distributed: the interval of as many values is about as wide."""
    from scipy.stats import f

    rng = np.random.default_rng(0)
    inside, widths = 0, []
    for k in range(100):
        ratio, low, high = variance_ratio(3 * rng.normal(size=200), rng.normal(size=200), seed=k)
        inside += low <= 9 <= high
        widths.append(np.log(high / low))
        assert low < ratio < high
    print(f"{inside} of 100 intervals hold the ratio")
    assert inside >= 88
    assert np.mean(widths) == pytest.approx(np.log(f.ppf(0.975, 199, 199) / f.ppf(0.025, 199, 199)), rel=0.1)


def test_times_are_the_quantiles_or_drawn_anew_and_noise_is_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[torch.Tensor, int]] = []

    def seen(velocities: object, examples: object, rows: range, times: torch.Tensor, noise: object, *, capacity: int) -> torch.Tensor:
        asked.append((times, noise(0, 0).initial_seed()))  # type: ignore[operator]
        return times

    monkeypatch.setattr(validation, "flow_errors", seen)
    model, cfg = small_model(), load(Config, None, TOY)
    pairs = encode_pairs(model, next(iter(clip_sets(cfg).values())))
    with Progress("", total=3, quiet=True) as progress:
        looks = validation.look_again(cfg, Velocities(model), pairs, progress, "")
    assert looks.fixed.shape == looks.random.shape == (3, 2, 2)
    assert torch.equal(looks.fixed[0], looks.fixed[2]) and not torch.equal(looks.random[0], looks.random[1])
    assert len({float(t) for t in looks.random.flatten()}) == 12, "every forward pass has a time of its own"
    assert len({seed for _, seed in asked}) == 6


def test_a_row_is_about_the_first_clips() -> None:
    fixed, random = torch.randn(50, 4, 3), 3 * torch.randn(50, 4, 3)
    row = row_of("a", 2, Looks(fixed, random))
    by_hand = [float(errors[:, :, :2].double().mean((1, 2)).std()) for errors in (fixed, random)]
    assert (row["std_fixed"], row["std_random"]) == pytest.approx(tuple(by_hand)) and row["variance_ratio"] == pytest.approx((by_hand[1] / by_hand[0]) ** 2)
    assert row["forward_passes"] == 8 and row["holds"] == (row["ratio_low"] >= 5)


def test_the_bench_gives_one_flat_row_a_set_and_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUSHES_REAL_DATA", raising=False)
    words = ["--quick", "--model", str(save_small_network(tmp_path / "network.safetensors")), *TOY, "--write", "--results", str(tmp_path), "--date", "2026-11"]
    rows = validation.main(load(Config, None, words))["rows"]
    assert isinstance(rows, list)
    assert_flat(rows)
    assert [(row["held_out"], row["clips"], row["repeats"]) for row in rows] == [("1x16x16", 1, 3), ("1x16x16", 2, 3)]
    assert all(row["std_fixed"] > 0 < row["std_random"] and row["ratio_low"] <= row["ratio_high"] for row in rows)
    text = (tmp_path / "2026-11_2-core-cpu_validation.md").read_text()
    assert "Variance at least 5 times smaller, 2 of 1x16x16: " in text and "Real clips: none." in text


def test_sizes_and_folders_that_are_none_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'13x32' is no size"):
        clip_sets(load(Config, None, ["--sizes", "[13x32]"]))
    with pytest.raises(UserError, match=r"no metadata\.jsonl"):
        clip_sets(load(Config, None, [*TOY, "--real", str(tmp_path)]))


def test_real_clips_are_looked_at_where_they_are(real_data: Path) -> None:
    sets = clip_sets(load(Config, None, [*TOY, "--real", str(real_data / "clips")]))
    assert list(sets) == ["1x16x16", validation.REAL] and len(sets[validation.REAL]) == 2 and len(set(sets[validation.REAL].texts)) == 2
    with pytest.raises(UserError, match=r"windows of 13 frames.*smaller --clips"):
        clip_sets(load(Config, None, ["--sizes", "[]", "--clips", "[10000]", "--real", str(real_data / "clips")]))

"""Quality against compute: the fit finds known parameters and says when it cannot, FLOPs are counted, and what is finished is not trained again."""

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import curve_fit

from align.config import load
from base_model.errors import UserError
from base_model.networks import packing
from base_model.tiny import load_codec, packed_text, save_codec
from base_model.types import ClipShape
from recipes import cli
from recipes.bench import _trained, scaling
from recipes.bench._power_law import fit_power_law
from recipes.charts import Series, line_chart, log_ticks, number
from recipes.fit import Fit
from recipes.pairs import encode_pairs
from recipes.shapes.dataset import ClipSet, draw_clips
from tests.recipes.small import noting_device, save_small_network, small_model

SMALL = ["--sampler", "{steps: 2, frames: 5, height: 16, width: 16}", "--fit.capacity", "256", "--fit.held_out", "4"]
TOY = ["--network", "{width: 32, depth: 2, heads: 2}", "--clips", "12", "--prompts", "3", *SMALL]
COMPUTE = 3e12 * np.array([1, 2, 4, 8, 16, 32])


def curve(floor: float, scale: float, exponent: float) -> Any:
    return floor + scale * (COMPUTE / COMPUTE[0]) ** -exponent


# The fit


@pytest.mark.parametrize(("floor", "scale", "exponent"), [(0.2, 0.15, 0.45), (0.05, 0.4, 0.2), (0.3, 0.02, 1.3), (0.0, 0.3, 0.1)])
def test_the_fit_finds_the_parameters_of_points_on_a_curve(floor: float, scale: float, exponent: float) -> None:
    law = fit_power_law(COMPUTE, [curve(floor, scale, exponent)])
    assert (law.floor.mean, law.scale.mean, law.exponent.mean) == pytest.approx((floor, scale, exponent), rel=2e-3, abs=2e-3)
    assert law(COMPUTE) == pytest.approx(curve(floor, scale, exponent), abs=1e-5)


def test_the_fit_is_that_of_scipy_and_its_interval_holds_the_truth() -> None:
    def model(c: Any, floor: float, scale: float, exponent: float) -> Any:
        return floor + scale * (c / COMPUTE[0]) ** -exponent

    held = 0
    for seed in range(20):
        losses = curve(0.25, 0.2, 0.5) + 0.002 * np.random.default_rng(seed).normal(size=(2, 6))
        law = fit_power_law(COMPUTE, losses)
        theirs, _ = curve_fit(model, COMPUTE, losses.mean(0), p0=(0.2, 0.2, 0.4), bounds=(0, 4), xtol=1e-12)
        assert (law.floor.mean, law.scale.mean, law.exponent.mean) == pytest.approx(theirs, rel=1e-3)
        held += law.determined and law.floor.low <= 0.25 <= law.floor.high
    assert held >= 15


@pytest.mark.parametrize(("shared", "own"), [(0.0, 0.004), (0.002, 0.0005), (0.002, 0.002)])
def test_intervals_hold_the_truth_as_often_where_seeds_share_their_noise(shared: float, own: float) -> None:
    rng, held = np.random.default_rng(0), 0
    for _ in range(60):
        law = fit_power_law(COMPUTE, curve(0.25, 0.2, 0.5) + shared * rng.normal(size=6) + own * rng.normal(size=(4, 6)), draws=300)
        held += law.floor.low <= 0.25 <= law.floor.high
    assert held >= 0.75 * 60


def test_a_floor_that_the_points_do_not_tell_is_called_undetermined() -> None:
    rng = np.random.default_rng(0)
    for losses in (curve(0.0, 0.3, 0.1) + 0.005 * rng.normal(size=(2, 6)), 0.3 + 0.005 * rng.normal(size=(2, 6)), [np.linspace(0.3, 0.4, 6)]):
        law = fit_power_law(COMPUTE, losses)
        assert not law.determined and "do not determine" in law.verdict
    three = fit_power_law(COMPUTE[:3], [curve(0.2, 0.15, 0.45)[:3]])
    assert not three.determined and "fewer than 4 points" in three.verdict
    assert scaling.law_row(three, "x")["irreducible_loss_low"] is None
    sure = fit_power_law(COMPUTE, curve(0.2, 0.15, 0.45) + 0.001 * rng.normal(size=(2, 6)))
    assert sure.determined and re.search(r"the irreducible loss is 0\.\d+ \[0\.\d+, 0\.2\d+\]", sure.verdict)
    with pytest.raises(ValueError, match="at least three"):
        fit_power_law([1, 2], [[1.0, 0.5]])


def test_parameters_stay_positive() -> None:
    falling_ever_faster = [0.5 - 0.001 * np.arange(6) ** 3]
    law = fit_power_law(COMPUTE, falling_ever_faster)
    assert min(law.floor.low, law.scale.low, law.exponent.low) >= 0


# Counting


def test_flops_a_token_are_those_of_the_closed_form() -> None:
    model, drawn = small_model(), draw_clips("messy", 12, seed=0, shape=ClipShape(5, 16, 16))
    pairs = encode_pairs(model, ClipSet(("a red circle grows",) * 12, drawn.videos))
    words = packed_text(model.encode_text(pairs.texts[:1]))[1].total
    size = {"width": 48, "depth": 2, "mlp_width": 4 * 48, "token_width": model.config.token_width, "text_width": model.config.text_width}
    expected = packing.forward_flops([8] * 12, text_tokens=words, **size) / (12 * 8)
    assert scaling.flops_per_token(model, pairs, Fit(iterations=1, lr=1e-3, capacity=96)) == pytest.approx(expected, rel=1e-3)


def test_a_clip_costs_its_steps_and_twice_as_much_with_guidance() -> None:
    model = small_model()
    held_out = encode_pairs(model, draw_clips("curated", 3, seed=0, shape=ClipShape(5, 16, 16)))
    plain, more, guided = (scaling.flops_per_clip(model, held_out, scaling.Sampler(**settings)) for settings in ({"steps": 3}, {"steps": 6}, {"steps": 3, "guidance": 2.0}))
    assert more == guided == pytest.approx(2 * plain)


def test_a_loss_falls_only_if_the_mean_falls_at_every_step() -> None:
    assert scaling.falls([[3.0, 2.0, 1.0], [3.0, 2.2, 1.9]]) and not scaling.falls([[3.0, 2.0, 2.1], [3.0, 2.0, 2.0]])


# Drawing


def test_a_logarithmic_axis_puts_equal_factors_equally_far_apart() -> None:
    assert log_ticks(3, 40) == [2, 5, 10, 20, 50] and log_ticks(1, 1) == [1, 2] and log_ticks(2e3, 7e7) == [1e3, 1e4, 1e5, 1e6, 1e7, 1e8]
    assert [number(value) for value in (2e12, 1e14, 5e15)] == ["2T", "100T", "5P"]
    with pytest.raises(ValueError, match="logarithmic axis from 0"):
        log_ticks(0, 1)
    svg = line_chart([Series("a", "seed", (1e12, 1e13, 1e14), (3.0, 2.0, 1.0))], name="n", x_label="x", logarithmic=True)
    dots = [float(dot.attrib["cx"]) for dot in ET.fromstring(svg).iter("circle")]
    assert dots[1] - dots[0] == pytest.approx(dots[2] - dots[1], abs=0.11)


def test_the_chart_shows_every_point_the_curve_and_the_floor_where_it_is_known() -> None:
    rng = np.random.default_rng(0)
    losses = curve(0.2, 0.15, 0.45) + 0.001 * rng.normal(size=(2, 6))
    points = [
        scaling.Point(seed, 2**k, 2**k, float(COMPUTE[k]), _trained.Trained(Path("x"), 1.0, 1), scaling.Judged((float(losses[seed, k]),) * 8, (0.0, 1.0)))
        for k in range(6)
        for seed in (0, 1)
    ]
    sampled = [scaling.Sampled("seed 0", ClipShape(13, side, side), side, 1.0, points[0].judged, 1.0) for side in (16, 24)]
    means = scaling.budget_means(points)
    assert means.compute == COMPUTE.tolist() and np.array(means.losses) == pytest.approx(losses)
    law = fit_power_law(means.compute, means.losses)
    picture = ET.fromstring(scaling.chart(points, law, sampled, None))
    panels = [element for element in picture if element.attrib.get("class") == "chart"]
    seeds = [[len(group.findall(".//{*}circle")) for group in panel.findall("{*}g") if group.attrib["class"] == "seed"] for panel in panels]
    assert seeds == [[6, 6], [2], [6, 6], [2]]
    lines = [[line.attrib["class"] for line in panel.iter() if line.attrib.get("class") == "limit"] for panel in panels]
    assert [len(row) for row in lines] == [1, 0, 0, 0]
    unsure = ET.fromstring(scaling.chart(points, law._replace(determined=False), sampled, None))
    assert not [line for line in unsure.iter() if line.attrib.get("class") == "limit"]


# Keeping


def config(*more: str) -> scaling.Config:
    return load(scaling.Config, None, [*TOY, "--fit.iterations", "1", "--budgets", "[1, 2, 3, 4]", "--sides", "[16, 24, 32]", *more])


def test_seeds_fill_one_folder_apart_and_a_last_call_collects_without_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, results = ["--out", str(tmp_path / "out")], ["--write", "--results", str(tmp_path / "results"), "--date", "2026-11"]
    alone = {seed: scaling.main(config(*out, "--seeds", f"[{seed}]"))["rows"] for seed in (0, 1)}
    monkeypatch.setattr(_trained, "train", None)
    monkeypatch.setattr(scaling, "messy_pairs", lambda *_: pytest.fail("no clips are needed any more"))
    model = save_small_network(tmp_path / "other.safetensors")
    rows = scaling.main(config(*out, *results, "--model", str(model)))["rows"]
    assert isinstance(rows, list) and isinstance(alone[0], list) and isinstance(alone[1], list)
    trained = [row for row in rows if row["part"] == "trainings"]
    before = [row for seed in (0, 1) for row in alone[seed] if row["part"] == "trainings"]
    assert sorted(trained, key=lambda row: (row["seed"], row["budget"])) == before and len(trained) == 8
    budgets = [row for row in rows if row["part"] == "budgets"]
    assert [row["iterations"] for row in budgets] == [1, 2, 3, 4] and {row["seeds"] for row in budgets} == {2}
    for row in trained:
        assert row["held_out_loss"] == pytest.approx(np.mean([row[f"loss_{k}"] for k in range(1, 9)]))
    flops = {row["seed"]: row["train_flops"] / row["tokens"] for row in trained}
    assert flops[0] == pytest.approx(flops[1]) and flops[0] > 0
    sizes = [row for row in rows if row["part"] == "sampling size"]
    assert [(row["network"], row["tokens_per_clip"]) for row in sizes] == [(name, tokens) for tokens in (8, 18, 32) for name in ("seed 0", "seed 1", "other")]
    assert "orange: other" in (tmp_path / "results" / "scaling.svg").read_text()
    (text,) = (path.read_text() for path in (tmp_path / "results").glob("2026-11_*_scaling.md"))
    assert "![Loss and judge](scaling.svg)" in text and "Against training compute: " in text and "Against tokens a clip: " in text
    ET.fromstring((tmp_path / "results" / "scaling.svg").read_text())
    with pytest.raises(UserError, match="made with another fit"):
        scaling.main(config(*out, "--fit.lr", "1e-3"))


def test_every_budget_begins_with_the_same_network_and_ends_its_own_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[tuple[int, bytes]] = []
    train = _trained.train

    def noted(fit: Fit, run: Any, model: Any, *more: Any) -> None:
        begun.append((fit.iterations, next(iter(model.network.parameters())).detach().numpy().tobytes()))
        train(fit, run, model, *more)

    monkeypatch.setattr(_trained, "train", noted)
    scaling.points(config("--seeds", "[5]", "--budgets", "[1, 2, 4]"), tmp_path)
    assert [iterations for iterations, _ in begun] == [1, 2, 4] and len({start for _, start in begun}) == 1
    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "seed-5" / "budget-004" / "run" / "metrics.jsonl").read_text().splitlines() if "learning_rate" in line]
    assert len(rates) == 4 and rates[-1] < max(rates)


def test_the_quick_form_runs_in_flat_rows_and_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "scaling", "--quick", "--json", *TOY]) == 0
    captured = capsys.readouterr()
    rows = json.loads(captured.out)["rows"]
    assert all(set(row) == set(rows[0]) for row in rows)
    assert [row["part"] for row in rows] == ["budgets"] * 3 + ["fit"] + ["trainings"] * 3 + ["sampling size"] * 2
    assert re.search(r"scaling 6/6 .* gone, about 0:00 left", captured.err) and not (tmp_path / "runs").exists()


def test_seeds_that_repeat_and_heads_that_do_not_divide_are_the_users_error() -> None:
    with pytest.raises(UserError, match=r"expected different seeds, got \[3, 3\]"):
        config("--seeds", "[3, 3]")
    with pytest.raises(UserError, match=r"network: 4 heads do not divide a width of 50 .* Give another --network\.width"):
        scaling.main(config("--quick", "--network", "{width: 50, depth: 2}"))


def test_clips_are_sampled_on_the_best_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    cfg, weights = config("--sides", "[16]"), save_small_network(tmp_path / "network.safetensors")
    held_out = encode_pairs(small_model(), draw_clips("curated", 2, seed=0, shape=ClipShape(5, 16, 16)))
    monkeypatch.setattr(scaling, "best_device", lambda: torch.device("meta"))
    monkeypatch.setattr(scaling, "looks", noting_device(seen, {"all_right": [1.0]}))
    monkeypatch.setattr(scaling, "held_out_losses", noting_device(seen, torch.zeros(8)))
    monkeypatch.setattr(scaling, "held_out_pairs", lambda cfg, model, clip: noting_device(seen, held_out)(model))
    monkeypatch.setattr(scaling, "flops_per_clip", noting_device(seen, 1.0))
    scaling.resolutions(cfg, tmp_path, {"seed 0": (weights, tmp_path)})
    assert seen == ["meta"] * 4


def test_what_was_measured_otherwise_or_with_another_autoencoder_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, cfg = save_small_network(tmp_path / "network.safetensors"), config()
    held_out = encode_pairs(small_model(), draw_clips("curated", 2, seed=0, shape=ClipShape(5, 16, 16)))
    found = scaling.judged_kept(cfg, tmp_path / "result.json", weights, held_out, cfg.sampler)
    assert scaling.judged_kept(cfg, tmp_path / "result.json", weights, held_out, cfg.sampler) == found
    save_codec(tmp_path / "vae.safetensors", load_codec(_trained.CODEC), {"trained": "again"})
    for name, value, said in (("LOOKS_VERSION", 0, "measure"), ("CODEC", tmp_path / "vae.safetensors", "codec")):
        with monkeypatch.context() as other, pytest.raises(UserError, match=f"made with another {said}\\."):
            other.setattr(_trained, name, value)
            scaling.judged_kept(cfg, tmp_path / "result.json", weights, held_out, cfg.sampler)


def test_budgets_and_sides_out_of_order_are_the_users_error() -> None:
    for words, message in ((["--budgets", "[4, 2, 1]"], "expected increasing values"), (["--sides", "[16, 20]"], "expected multiples of 8")):
        with pytest.raises(UserError, match=message):
            load(scaling.Config, None, words)

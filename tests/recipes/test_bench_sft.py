"""The bench of a step of SFT: both sides learn the same from the same noise, rows say what was measured, and the quick form runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from align.config import load
from recipes.bench import sft
from recipes.bench._sft_worker import Arm, Ours, Plain, Spec, rows_of, steps, trained
from recipes.bench._workers import Worker
from recipes.bench.sft import Case, Config, Told, cases, holds, verdicts
from tests.recipes.test_bench import assert_flat

MIXED = ((1, 2, 3), (2, 2, 2), (1, 1, 4), (2, 3, 2))


def spec(arm: Arm, out: Path, **changes: Any) -> Spec:
    return Spec(**{"arm": arm, "train": "lora", "grids": MIXED, "batch": 3, "out": out / "run", **changes})


@pytest.mark.parametrize("train", ["full", "lora"])
@pytest.mark.parametrize(("arm", "grids"), [("one batch", ((2, 3, 2),) * 3), ("padded", ((2, 3, 2),) * 3), ("one by one", MIXED)])
def test_both_sides_find_the_same_loss_and_gradient_from_the_same_noise(tmp_path: Path, train: str, arm: Arm, grids: Any) -> None:
    ours, plain = Ours(spec("ours", tmp_path, train=train, grids=grids, threads=2)), Plain(spec(arm, tmp_path, train=train, grids=grids))
    before = [parameter.detach().clone() for parameter in trained(plain.network).values()]
    ours.capture(str(tmp_path / "told.safetensors"))
    found = plain.compare(str(tmp_path / "told.safetensors"))
    print(f"{arm}, {train}: loss {found['loss_difference']:.1e}, gradients {found['gradient_difference']:.1e} apart")
    assert found["loss_difference"] < 1e-5 and found["gradient_difference"] < 1e-5 and found["loss"] > 0.5
    assert all(torch.equal(a, b) for a, b in zip(before, trained(plain.network).values(), strict=True)), "to compare changes no weight"
    if arm == "one batch":
        with torch.no_grad():
            next(iter(trained(plain.network).values())).add_(0.1)
        assert plain.compare(str(tmp_path / "told.safetensors"))["gradient_difference"] > 1e-4, "other weights are found out"


def test_padding_is_looked_at_and_therefore_no_way_to_train(tmp_path: Path) -> None:
    ours, plain = Ours(spec("ours", tmp_path)), Plain(spec("padded", tmp_path))
    ours.capture(str(tmp_path / "told.safetensors"))
    with pytest.raises(RuntimeError):
        plain.compare(str(tmp_path / "told.safetensors"))
    assert float(plain.loss([0, 1, 2]).detach()) > 0


@pytest.mark.parametrize("arm", ["ours", "one batch", "padded", "one by one"])
def test_a_step_of_each_side_moves_its_weights(tmp_path: Path, arm: Arm) -> None:
    grids = ((2, 3, 2),) * 4 if arm == "one batch" else MIXED
    side = (Ours if arm == "ours" else Plain)(spec(arm, tmp_path, grids=grids))
    network = side.model.network if isinstance(side, Ours) else side.network
    before = [parameter.detach().clone() for parameter in trained(network).values()]
    told = steps(side, 2)
    assert told["seconds"] > 0 < told["cpu"] and all(not torch.equal(a, b) for a, b in zip(before, trained(network).values(), strict=True))


def test_a_step_has_as_many_packs_as_threads_and_every_clip_once(tmp_path: Path) -> None:
    ours = Ours(spec("ours", tmp_path, batch=4, threads=2))
    parts = ours.parts(rows_of(ours.spec, 0), 0)
    assert len(parts) == 2 and sorted(row for rows, _ in parts for row in rows) == [0, 1, 2, 3]
    assert [rows_of(spec("ours", tmp_path), k) for k in range(2)] == [[0, 1, 2], [3, 0, 1]]
    assert ours.parts([0, 1], 1)[0][1].initial_seed() != parts[0][1].initial_seed()


def told(seconds: list[float], **compared: Any) -> Told:
    worker: Any = None
    assert worker is None or isinstance(worker, Worker)
    return Told(worker, [{"seconds": s, "cpu": 2 * s, "peak_bytes": 2**20 * 100} for s in seconds], compared)


def test_rows_compare_rounds_and_say_what_holds() -> None:
    compared = {"loss": 2.0, "loss_difference": 1e-7, "gradient_difference": 2e-5}
    sides: dict[Arm, Told] = {"ours": told([1.0, 2.0, 1.0], loss=2.0), "padded": told([2.0, 4.0, 1.4]), "one by one": told([1.0, 3.2, 1.0], **compared)}
    rows = sft.rows_of(Case("mixed sizes", MIXED, ("padded", "one by one"), "one by one"), "full", sides, 60.0)
    assert_flat(rows)
    loss, gradients, padded, memory, single, _ = rows
    assert loss["holds"] is True and gradients["holds"] is False
    assert (padded["ours"], padded["peer"], padded["ratio"], padded["ratio_low"], padded["ratio_high"]) == (60.0, 30.0, 2.0, pytest.approx(1.4), 2.0)
    assert padded["holds"] is None and single["ratio"] == 1.0 and single["holds"] is None and memory["ratio"] == 1 and memory["asked"] is None
    sides = {"ours": told([1.0, 1.0], loss=2.0), "one batch": told([1.1, 1.2], **compared)}
    *_, seconds, cpu, _ = sft.rows_of(Case("equal sizes", MIXED, ("one batch",), "one batch"), "full", sides, 60.0)
    assert seconds["holds"] is True and seconds["ratio"] == pytest.approx(1.15) and cpu["ours"] == 2.0 and cpu["holds"] is None
    assert holds(0.8, 0.9, 1.0) is False
    assert verdicts([gradients, padded]) == [
        "full, mixed sizes: gradients, beside one by one, asked 1e-05: does not hold (2.0e-05 apart).",
        "full, mixed sizes: useful tokens a second, beside padded, asked 1.5: cannot be told (2.00 [1.40, 2.00]).",
    ]


def test_the_bench_runs_both_sides_in_processes_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sft, "cases", lambda cfg: [Case("mixed sizes", MIXED, ("one by one",), "one by one")])
    words = ["--quick", "--batch", "4", "--steps", "1", "--threads", "1", "--out", str(tmp_path / "out"), "--write", "--results", str(tmp_path), "--date", "2026-11"]
    rows = sft.main(load(Config, None, words))["rows"]
    assert isinstance(rows, list)
    assert_flat(rows)
    assert [row["what"] for row in rows] == [f"lora, mixed sizes: {what}" for what in ("loss", "gradients", "useful tokens a second", "peak memory, MiB")]
    assert rows[0]["holds"] and rows[1]["holds"] and rows[2]["ours"] > 0 < rows[3]["ours"]
    assert "lora, mixed sizes: loss, beside one by one, asked 1e-05: holds" in (tmp_path / "2026-11_2-core-cpu_sft.md").read_text()


def test_a_step_of_mixed_sizes_is_of_the_packing_bench_s_mix() -> None:
    equal, mixed = cases(Config(batch=4, steps=3))
    assert len(mixed.grids) == 12 and len(set(mixed.grids)) > 4 and set(equal.grids) == {sft.EQUAL} and equal.equal == "one batch"

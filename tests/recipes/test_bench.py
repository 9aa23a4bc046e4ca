"""Every benchmark runs at toy size, gives flat rows, and counts what it says it counts; the proof adds up what the runs say."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from align.config import load
from base_model.errors import UserError
from base_model.networks.packing import Segments
from recipes import cli, ddpo, grpo
from recipes.bench import _clock, _results, native, networks, phases, proof, sampler, scaling, visual
from recipes.bench._results import Provenance
from recipes.generate import Sampler, sample, seeded_noise
from recipes.shapes.measure import Measured, PromptTakes
from recipes.shapes.prompts import ShapesPrompt, Thing
from tests.recipes.small import save_small_network, small_model

TOY = "{steps: 4, frames: 5, height: 16, width: 16}"


def assert_flat(rows: list[dict[str, Any]]) -> None:
    assert rows and all(set(row) == set(rows[0]) for row in rows)
    assert all(value is None or isinstance(value, bool | int | float | str) for row in rows for value in row.values())
    json.dumps(rows, allow_nan=False)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_network(tmp_path_factory.mktemp("bench") / "network.safetensors")


# Sampling


def quick_sampler(network: Path, *more: str) -> list[dict[str, Any]]:
    words = ["--quick", "--model", str(network), "--clips", "2", "--repeats", "2", "--sampler", TOY, *more]
    rows = sampler.main(load(sampler.Config, None, words))["rows"]
    assert isinstance(rows, list)
    return rows


def test_the_sampler_bench_measures_ours_and_its_peers_in_flat_rows(network: Path) -> None:
    rows = quick_sampler(network)
    assert_flat(rows)
    assert [(row["part"], row["name"]) for row in rows] == [
        *(("denoise", name) for name in ("ours", "one clip at a time", "diffusers")),
        *(("decode", name) for name in ("ours", "one clip at a time")),
        *(("both", name) for name in ("ours", "one clip at a time")),
    ]
    ours, alone, *_ = rows
    assert ours["times_slower_than_ours"] is None and alone["times_slower_low"] <= alone["times_slower_than_ours"] <= alone["times_slower_high"]
    assert ours["clips_per_second"] == pytest.approx(2 / ours["seconds"]) and ours["forward_passes_per_second"] == pytest.approx(4 * ours["clips_per_second"])
    assert ours["tokens_per_clip"] == 2 * 2 * 2


def test_guidance_is_not_measured_and_refused(network: Path) -> None:
    with pytest.raises(UserError, match=r"is not measured, sampler\.guidance\. Leave it at 1"):
        quick_sampler(network, "--sampler.guidance", "3")


def test_one_clip_at_a_time_makes_the_clips_that_the_batch_and_the_generator_make() -> None:
    model, toy = small_model(), Sampler(steps=4, frames=5, height=16, width=16)
    cond, noise = model.encode_text(["a red circle grows", "a blue bar"]), seeded_noise(model, toy.clip, [0, 1])
    with torch.no_grad():
        entrants = sampler.contestants(model, toy, ["one clip at a time"])
        made = {name: entrant.denoise(noise, cond) for name, entrant in entrants.items()}
        decode = entrants["ours"].decode
        assert decode is not None
        clips = decode(made["ours"])
    assert torch.allclose(made["ours"], made["one clip at a time"], atol=1e-5)
    assert torch.equal(clips, torch.cat(list(sample(model, cond, [0, 1], toy))))


def test_the_diffusers_peer_takes_our_grid_of_times_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a velocity of eps - x0, known everywhere, the scheduler must land on x0 exactly."""
    import diffusers

    model, x0 = small_model(), 0.5
    noise = torch.randn(2, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    peer = sampler.diffusers_peer(model, torch.tensor([1.0, 0.9, 0.7, 0.0]))
    monkeypatch.setattr(diffusers.WanTransformer3DModel, "forward", lambda self, x, t, text, return_dict: ((x - x0) / (t / 1000).reshape(-1, 1, 1, 1, 1),))
    landed = peer.denoise(noise, model.encode_text(["a", "b"]))
    assert torch.allclose(landed, torch.full_like(noise, x0), atol=1e-5)


# One update


def test_the_phases_bench_counts_the_passes_of_each_recipe_and_splits_the_time(network: Path) -> None:
    small = [word for recipe in ("ddpo", "grpo") for word in (f"--{recipe}.prompts", "2", f"--{recipe}.group_size", "2", f"--{recipe}.lora_rank", "2")]
    small += ["--ddpo_sampler", TOY, "--ddpo.window", "2", "--grpo_sampler", TOY, "--grpo_sampler.guidance", "1", "--grpo.first_steps", "1"]
    cfg = load(phases.Config, None, ["--quick", "--model", str(network), "--updates", "1", *small])
    rows = phases.main(cfg)["rows"]
    assert isinstance(rows, list)
    assert_flat(rows)
    ddpo, grpo = rows
    passes = ("rollout_forwards_per_clip", "reference_forwards_per_clip", "trained_forwards_per_clip", "forward_equivalents_per_clip")
    assert [ddpo[key] for key in passes] == [3.5, 0.25, 1.5, 3.5 + 0.25 + 3 * 1.5], "two clips share their first noisy step, and an eighth asks the reference"
    assert [grpo[key] for key in passes] == [3.5, 0.5, 0.5, 3.5 + 0.5 + 3 * 0.5], "two clips share their only noisy step, and what is learned from it"
    for row in rows:
        assert row["clips"] == 4 and row["updates"] == 1
        assert sum(row[f"{phase}_seconds"] for phase in _clock.PHASES) == pytest.approx(row["seconds"])
        assert all(row[f"{phase}_seconds"] > 0 for phase in _clock.PHASES)
        assert row["peak_memory_bytes"] > 50 * 2**20


@pytest.mark.parametrize("recipe", [ddpo, grpo])
def test_an_update_that_is_measured_is_one_that_the_recipe_makes_by_itself(recipe: ModuleType) -> None:
    name = recipe.__name__.removeprefix("recipes.")
    shipped, cfg = load(recipe.Config, Path(recipe.__file__ or "").parent / "configs" / "tiny" / f"{name}.yaml", []), phases.Config()
    assert getattr(cfg, name).model_copy(update={"iterations": shipped.policy.iterations}) == shipped.policy and phases.sampler_of(cfg, name) == shipped.sampler


def test_quick_shrinks_the_demo_and_leaves_smaller_requests_alone() -> None:
    quick = phases.shrunk(load(phases.Config, None, ["--grpo.prompts", "2"]))
    assert (quick.rounds, quick.ddpo.prompts, quick.grpo.prompts) == (1, 4, 2) and quick.ddpo.group_size == 8


def test_nothing_to_measure_is_the_users_error() -> None:
    with pytest.raises(UserError, match="nothing to measure"):
        phases.main(load(phases.Config, None, ["--recipes", "[]"]))


# DiT against U-ViT


def test_the_networks_bench_trains_both_alike_and_says_what_each_costs(tmp_path: Path) -> None:
    small = ["--dit", "{width: 32, depth: 2, heads: 2}", "--uvit", "{width: 32, depth: 2, heads: 2}"]
    words = ["--quick", "--clips", "8", "--fit.iterations", "3", "--fit.held_out", "8", "--fit.capacity", "256", *small]
    rows = networks.main(load(networks.Config, None, [*words, "--write", "--results", str(tmp_path)]))["rows"]
    assert isinstance(rows, list)
    assert_flat(rows)
    dit, uvit = rows
    assert [row["network"] for row in rows] == ["dit", "uvit"] and (dit["seeds"], dit["iterations"], dit["tokens_per_clip"]) == (1, 3, 64)
    assert dit["times_slower_than_dit"] is None and uvit["times_slower_than_dit"] == pytest.approx(uvit["seconds_per_step"] / dit["seconds_per_step"])
    assert uvit["loss_minus_dit"] == pytest.approx(uvit["held_out_loss"] - dit["held_out_loss"])
    assert dit["flops_over_dit"] == 1 and abs(uvit["flops_over_dit"] - 1) <= networks.CLOSE
    again = networks.main(load(networks.Config, None, words))["rows"]
    assert isinstance(again, list) and [row["held_out_loss"] for row in again] == [row["held_out_loss"] for row in rows]
    assert "equal FLOPs" in next(tmp_path.iterdir()).read_text()


def test_the_flops_of_a_pass_are_those_of_its_matrix_products() -> None:
    """Counted by hand, two a multiply-add: S clips of n patches and m text tokens, width w, c values a token, D text width."""
    s, n, m, w, c, d = 3, 20, 7, 48, 32, 384
    packs = Segments.equal(s, n), Segments.equal(s, m)
    size = networks.Size(width=w, depth=3, heads=2)
    codec = small_model().codec
    dit = s * (n * (2 * c * w + 3 * 14 * w * w) + m * (d * w + 3 * 2 * w * w) + 3 * w * w + (3 * 6 + 2) * w * w + 3 * 2 * w * n * (n + m))
    assert networks.forward_flops(networks.architecture("dit", size, codec, "dit"), *packs) == 2 * dit
    j = 1 + m + n
    uvit = s * (n * 2 * c * w + m * d * w + 2 * w * w + j * (3 * 12 + 2) * w * w + 3 * 2 * w * j * j)
    assert networks.forward_flops(networks.architecture("uvit", size, codec, "uvit"), *packs) == 2 * uvit


def test_networks_that_cost_differently_are_not_compared() -> None:
    with pytest.raises(UserError, match=r"uvit needs .* times the FLOPs of dit; they must agree within 2%"):
        networks.main(load(networks.Config, None, ["--quick", "--clips", "4", "--fit.held_out", "4", "--uvit", "{width: 64, depth: 5}"]))
    with pytest.raises(UserError, match="4 heads do not divide a width of 50"):
        networks.main(load(networks.Config, None, ["--quick", "--uvit.width", "50"]))
    with pytest.raises(UserError, match="at least 2"):
        networks.main(load(networks.Config, None, ["--fit.iterations", "1"]))


# The proof

SHARES = {"base": 0.2, "sft": 0.5, "rl": 0.8, "rl_ddpo": 0.55, "rl_unconstrained": 0.9}
FLASHING = {"base": 0.2, "sft": 0.1, "rl": 0.0, "rl_ddpo": 0.0, "rl_unconstrained": 0.3}
G = 4


def prompt(number: int, things: int = 1, *, strobe: bool = False) -> ShapesPrompt:
    objects = (Thing("circle", "red", "left"), Thing("bar", "blue", "up"))[:things]
    return ShapesPrompt(f"p{number}", f"prompt {number}", objects, strobe, "eval")


def readings(model: str, rng: np.random.Generator, prompts: int = 60) -> Measured:
    """Made-up readings: a clip is right, and another one flashes, with the probabilities above."""
    takes = []
    for number in range(prompts):
        asked = prompt(number, things=2 if number % 6 == 5 else 1, strobe=number % 6 == 4)
        right = (rng.random(G) < SHARES[model]).astype(float)
        each = {name: np.repeat(right[:, None], len(asked.things), axis=1) for name in ("shape", "colour", "motion")}
        takes.append(PromptTakes(asked, right, each, (rng.random(G) < FLASHING[model]).astype(float), rng.normal(size=(int(right.sum()), 3)), ((),) * G))
    return Measured(tuple(takes), {})


def write_demo(folder: Path, seed: int, **changed: Any) -> dict[str, Measured]:
    """The files of a finished demo that the proof reads."""
    rng = np.random.default_rng(seed)
    measured = {model: readings(model, rng) for model in SHARES}
    learnt = {name: {"mean": mean + 0.01 * seed, "low": mean - 0.05, "high": mean + 0.05} for name, mean in (("accuracy", 0.8), ("floor", 0.6), ("ceiling", 0.85))}
    found = {
        "config": {"seed": seed},
        "reward_model": learnt,
        "wall_seconds": 1800.0 + 60 * seed,
        "peak_memory_bytes": 2**30,
        "commit": "c" * 40,
        "versions": {"torch": "2.13.0"},
        "hardware": {"processor": "a CPU", "cores": 2, "threads": 2, "gpus": [], "memory_bytes": 4 * 2**30},
        "commands": [f"rushes demo --seed {seed}"],
        "flash_limit": 0.02,
    }
    (folder / "report").mkdir(parents=True)
    (folder / "report" / "report.json").write_text(json.dumps(found | changed))
    (folder / "report" / "measured.json").write_text(json.dumps({model: each.to_json() for model, each in measured.items()}))
    (folder / "demo.json").write_text(json.dumps({"seed": seed, "pairs": 100}))
    return measured


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[dict[str, Measured]]]:
    root = tmp_path_factory.mktemp("demos")
    folders = [root / f"proof-{seed}" for seed in range(3)]
    return folders, [write_demo(folder, seed) for seed, folder in enumerate(folders)]


def pooled(folders: list[Path], *more: str) -> list[dict[str, Any]]:
    rows = proof.main(load(proof.Config, None, ["--quick", "--runs", json.dumps([str(folder) for folder in folders]), *more]))["rows"]
    assert isinstance(rows, list)
    return rows


@pytest.fixture(scope="module")
def rows(demos: tuple[list[Path], list[dict[str, Measured]]]) -> list[dict[str, Any]]:
    return pooled(demos[0])


def row(rows: list[dict[str, Any]], measure: str, model: str | None) -> dict[str, Any]:
    (found,) = [each for each in rows if each["measure"] == measure and each["model"] == model]
    return found


def one_object_share(measured: Mapping[str, Measured], model: str) -> float:
    return float(np.mean([take.right for take in measured[model].takes if len(take.prompt.things) == 1 and not take.prompt.strobe]))


def test_the_proof_gives_one_flat_row_for_each_measure_and_model(rows: list[dict[str, Any]]) -> None:
    assert_flat(rows)
    for measure in ("judge, one object", "judge, two objects", "diversity", "flash rate"):
        assert [each["model"] for each in rows if each["measure"] == measure] == list(SHARES)


def test_shares_and_gains_are_means_over_the_seeds_and_each_seed_is_shown(rows: list[dict[str, Any]], demos: tuple[list[Path], list[dict[str, Measured]]]) -> None:
    shares = {model: [one_object_share(seed, model) for seed in demos[1]] for model in SHARES}
    for model, expected in shares.items():
        found = row(rows, "judge, one object", model)
        assert [found[f"seed_{seed}"] for seed in range(3)] == pytest.approx(expected)
        assert found["mean"] == pytest.approx(np.mean(expected)) and found["low"] < found["mean"] < found["high"]
    gain, ddpo = row(rows, "judge gain", "RL (NFT) - SFT"), row(rows, "judge gain", "RL (DDPO) - SFT")
    assert ddpo["mean"] == pytest.approx(np.mean(shares["rl_ddpo"]) - np.mean(shares["sft"])) and ddpo["holds"] is False
    assert gain["seed_1"] == pytest.approx(shares["rl"][1] - shares["sft"][1]) and gain["mean"] == pytest.approx(np.mean(shares["rl"]) - np.mean(shares["sft"]))
    assert gain["holds"] is True and row(rows, "judge gain", "SFT - base")["holds"] is True


def test_flashes_of_all_seeds_are_added_up(rows: list[dict[str, Any]], demos: tuple[list[Path], list[dict[str, Measured]]]) -> None:
    for model in SHARES:
        hits = int(sum(take.flashing.sum() for seed in demos[1] for take in seed[model].takes))
        exact = binomtest(hits, 3 * 60 * G).proportion_ci(0.95, method="exact")
        found = row(rows, "flash rate", model)
        assert (found["hits"], found["clips"]) == (hits, 720) and found["mean"] == pytest.approx(hits / 720)
        assert (found["low"], found["high"]) == pytest.approx((exact.low, exact.high), abs=1e-9)
    assert row(rows, "flash rate", "base")["holds"] is True and row(rows, "flash rate", "rl_unconstrained")["holds"] is True
    assert row(rows, "flash rate", "rl")["high"] < 0.02
    assert row(rows, "flash rate", "rl")["holds"] is False, "720 clips are fewer than the thousand that are asked for"


def test_reward_models_are_pooled_as_independent_numbers(rows: list[dict[str, Any]]) -> None:
    accuracy = row(rows, "reward model", "accuracy")
    assert accuracy["mean"] == pytest.approx(0.81) and (accuracy["seed_2"], accuracy["seed_2_low"]) == pytest.approx((0.82, 0.75))
    assert accuracy["low"] == pytest.approx(0.81 - math.sqrt(0.05**2 + 0.06**2 + 0.07**2) / 3) and accuracy["holds"] is True
    assert proof.combine([{"mean": 0.5, "low": 0.4, "high": 0.6}] * 4)["low"] == pytest.approx(0.45)
    assert proof.combine([proof.UNKNOWN, {"mean": 0.5, "low": 0.4, "high": 0.6}]) == proof.UNKNOWN


def test_cost_and_origin_of_each_seed_are_told(rows: list[dict[str, Any]]) -> None:
    minutes = row(rows, "wall time, minutes", None)
    assert [minutes[key] for key in ("mean", "seed_0", "seed_2", "holds")] == [31.0, 30.0, 32.0, True]
    assert row(rows, "commit", None)["seed_1"] == "c" * 40 and row(rows, "command", None)["seed_2"] == "rushes demo --seed 2"
    assert row(rows, "hardware", None)["seed_0"] == "a CPU, 2 cores, 2 threads, 4 GiB, no GPU"


def test_one_seed_alone_is_a_table_too(demos: tuple[list[Path], list[dict[str, Measured]]]) -> None:
    found = row(pooled(demos[0][:1]), "judge, one object", "rl")
    assert found["mean"] == found["seed_0"] and "seed_1" not in found


def test_the_result_file_says_what_holds_and_what_does_not(demos: tuple[list[Path], list[dict[str, Measured]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pooled(demos[0], "--write", "--results", str(tmp_path), "--date", "2026-11")
    text = (tmp_path / "2026-11_2-core-cpu_proof.md").read_text()
    assert "flash rate, RL (NFT) (high <= 0.02 on at least 1,000 clips)" in text.split("Does not hold: ")[1].splitlines()[0]
    assert "60 held-out prompts (40 of one object, 10 of two, 10 that ask for strobing), 4 clips a prompt" in text
    assert "rushes demo --seed 1 --out runs/proof-1" in text and "rushes bench proof --quick --runs" in text and "c" * 40 in text
    assert re.search(r"\| judge, one object \| RL \(NFT\) \| \d\d\.\d % \[\d\d\.\d, \d\d\.\d\] \|", text)
    assert "2026-11_2-core-cpu_proof.md" in capsys.readouterr().err


def test_runs_that_cannot_be_pooled_are_the_users_error(demos: tuple[list[Path], list[dict[str, Measured]]], tmp_path: Path) -> None:
    write_demo(tmp_path / "other", 7)
    (tmp_path / "other" / "demo.json").write_text(json.dumps({"seed": 7, "pairs": 200}))
    write_demo(tmp_path / "real", 8)
    (tmp_path / "real" / "report" / "measured.json").write_text("{}")
    write_demo(tmp_path / "torn", 9)
    (tmp_path / "torn" / "report" / "report.json").write_text('{"config"')
    first = demos[0][0]
    wrong = [([], "no runs to pool"), ([tmp_path / "none"], "no finished demo"), ([first, first], "runs of one seed"), ([first, tmp_path / "other"], "settings pairs")]
    for folders, message in [*wrong, ([tmp_path / "real"], "real clips"), ([tmp_path / "torn"], "cannot read the report")]:
        with pytest.raises(UserError, match=message):
            proof.read_runs(folders)


def test_missing_runs_are_one_line_and_exit_status_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "proof", "--quick", "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "no finished demo, runs/proof-0, runs/proof-1, runs/proof-2. Make one with" in captured.err
    assert json.loads(captured.out)["error"]["kind"] == "UserError"


# What they share


def test_the_command_line_of_a_bench_is_one_object_with_where_it_comes_from(
    demos: tuple[list[Path], list[dict[str, Measured]]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(demos[0][0].parent)
    assert cli.main(["bench", "proof", "--runs", "[proof-0, proof-2]", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {"command", "commit", "hardware", "rows"} <= set(told) and told["command"] == "rushes bench proof --runs [proof-0, proof-2]"
    assert_flat(told["rows"])
    assert {"networks", "sampler", "phases", "proof"} <= set(cli.benchmarks()) and not any(name.startswith(("-", "_")) for name in cli.benchmarks())


def test_a_command_line_is_made_of_what_differs_from_the_defaults() -> None:
    cfg = load(sampler.Config, None, ["--quick", "--peers", "[diffusers]", "--sampler.steps", "4", "--write", "--date", "2026-11"])
    assert _results.command("sampler", cfg) == "rushes bench sampler --quick --peers '[\"diffusers\"]' --sampler.steps 4"
    assert load(sampler.Config, None, ["--peers", '["diffusers"]']).peers == ("diffusers",)


def test_spreads_and_paired_ratios_are_medians_with_their_range() -> None:
    assert _results.spread([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
    assert _results.paired_ratio([2.0, 30.0, 4.0], [1.0, 10.0, 1.0]) == (3.0, 2.0, 4.0)
    assert _results.columns("seconds", _results.spread([3.0, 1.0, 2.0])) == {"seconds": 2.0, "seconds_low": 1.0, "seconds_high": 3.0}
    assert _results.columns("ratio", None) == dict.fromkeys(("ratio", "ratio_low", "ratio_high"))


def test_tables_leave_out_what_nobody_knows_and_turn_wide_ones_over() -> None:
    assert _results.table([{"a_b": 1, "c": None, "d": True}, {"a_b": 0.123456, "c": None, "d": None}]) == "| a b | d |\n| --- | --- |\n| 1 | yes |\n| 0.1235 |  |"
    start, other = {"arm": "start", "judge": 0.3}, {"arm": "x", "violates": 0.95, "judge": 0.97}
    for rows in ([start, other], [other, start]):
        assert _results.table(rows).splitlines()[0] == "| arm | violates | judge |", "a column that some rows lack is told all the same"
        assert set(_results.table(rows).splitlines()[2:]) == {"| start |  | 0.3 |", "| x | 0.95 | 0.97 |"}
    wide = {"name": "x|y"} | {f"k{n}": 1234.5 + n for n in range(_results.WIDEST)}
    assert _results.table([wide]).splitlines()[:3] == ["| name | x\\|y |", "| --- | --- |", "| k0 | 1,234 |"]
    assert _results.table([]) == "Nothing was measured."


def test_a_table_says_which_real_clips_there_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUSHES_REAL_DATA", raising=False)
    assert _results.real_clips(None) is None and _results.told_of_real(None) == "Real clips: none."
    monkeypatch.setenv("RUSHES_REAL_DATA", str(tmp_path))
    assert _results.real_clips(None) == tmp_path / "clips" and _results.told_of_real(None) == "Real clips: those of RUSHES_REAL_DATA."
    assert _results.real_clips(Path("mine")) == Path("mine") and _results.told_of_real(Path("mine")) == "Real clips: those that were given."


def test_a_toy_does_not_take_the_place_of_a_published_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_results, "write_atomic", lambda *_: pytest.fail("it was written"))
    source = Provenance("2026-11", ["rushes bench sampler"], "abc", {}, {"cores": 2})
    for results in (_results.RESULTS, _results.RESULTS / ".." / "results"):
        cfg = sampler.Config(quick=True, write=True, results=results)
        for work in (lambda cfg=cfg: _results.check_can_end(cfg), lambda cfg=cfg: _results.write(cfg, "sampler", source, "Title", {})):
            with pytest.raises(UserError, match=r"would take the place of a table that was measured, results\. Leave out --quick"):
                work()


def test_a_result_file_is_named_by_date_and_hardware(tmp_path: Path) -> None:
    cfg = load(sampler.Config, None, ["--results", str(tmp_path)])
    source = Provenance("2026-11", ["rushes bench sampler"], "abc", {"torch": "2"}, {"cores": 16, "gpus": ["NVIDIA H200"]})
    assert _results.write(cfg, "sampler", source, "Title", {"Part": [{"a": 1}]}).name == "2026-11_1x-nvidia-h200_sampler.md"
    with pytest.raises(UserError, match="expected a year and a month"):
        _results.write(cfg, "sampler", source._replace(date="November"), "Title", {})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write results"):
        _results.write(cfg.model_copy(update={"results": tmp_path / "file" / "inside"}), "sampler", source, "Title", {})


@pytest.mark.parametrize("bench", [native, scaling, visual])
def test_what_could_not_be_written_is_known_before_the_work(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for work in ("measure", "make_all"):
        monkeypatch.setattr(bench, work, lambda *_: pytest.fail("it has begun"), raising=False)
    file = tmp_path / "file"
    file.touch()
    write = ["--write", "--results"]
    cases = [([*write, str(tmp_path), "--date", "May"], "Give --date YYYY-MM"), ([*write, str(file)], "file is a file, not a folder. Choose another --results")]
    if bench is not visual:
        cases.append((["--out", str(file / "below")], "is a file, not a folder. Choose another --out"))
    if bench is not scaling:
        cases += [(["--sheet", str(tmp_path)], "it is a folder. Give --sheet FILE.png"), (["--sheet", str(file / "x.png")], "Choose another --sheet")]
    out = [] if bench is visual else ["--out", str(tmp_path / "out")]
    for words, message in cases:
        with pytest.raises(UserError, match=message):
            bench.main(load(bench.Config, None, [*out, *words]))


@pytest.mark.parametrize("bench", [native, scaling])
def test_more_prompts_than_there_are_are_known_before_the_work(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "first_model", lambda *_: pytest.fail("it has begun"))
    with pytest.raises(UserError, match=r"prompts: the grammar has no 20000 different prompts of split eval\. Give fewer --prompts"):
        bench.main(load(bench.Config, None, ["--out", str(tmp_path / "out"), "--prompts", "20000"]))

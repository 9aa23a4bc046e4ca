import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from align.config import dump, load
from base_model.checkpoint import save_weights
from base_model.errors import UserError
from base_model.networks.dit import DiT, DiTConfig
from base_model.prompts.text import TextEncoder
from base_model.tiny import WEIGHTS, LatentVideoModel, load_codec, save_network
from recipes import evaluate as command
from recipes.evaluate import Config, Evaluation, clip_seeds, evaluate, filtered_rows, network_file, read_measured, read_run, report, shown_prompts
from recipes.generate import Sampler, safety_runner
from recipes.report import ReportData, render_page
from recipes.shapes.measure import flash_counts
from recipes.shapes.prompts import ShapesPrompt, make_prompts
from recipes.shapes.render import DEMO_CLIP, render, sample_scene
from reward.safety.contract import Decision, Reason, Ruling, Verdict
from reward.types import Scores
from tests.recipes.small import noting_device

G = 2


def ruling(verdict: Verdict, policy: str = "P17", text: str = "too many flashes") -> Ruling:
    return Ruling(verdict, policy, 0.9, (Reason(text),), "flash", "1", 0.5)


class Painter:
    """Stands for generators: `sft` draws what is asked, flashing where the prompt asks for it; `base` draws nothing every second time."""

    def __init__(self, prompts: Sequence[ShapesPrompt]) -> None:
        self.by_text = {prompt.text: prompt for prompt in prompts}
        self.asked: list[tuple[str, list[str], list[int]]] = []

    def __call__(self, model: str, texts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        self.asked.append((model, list(texts), list(seeds)))
        clips = [render(sample_scene(self.by_text[text], np.random.default_rng(seed), clip=DEMO_CLIP), DEMO_CLIP) for text, seed in zip(texts, seeds, strict=True)]
        if model == "base":
            clips[::2] = [torch.full_like(clip, 0.3) for clip in clips[::2]]
        return torch.stack(clips)


@pytest.fixture(scope="module")
def prompts() -> list[ShapesPrompt]:
    return [*make_prompts(4, seed=1, split="eval"), *make_prompts(1, seed=2, split="eval", two_objects=1.0), *make_prompts(1, seed=3, split="eval", strobe=1.0)]


@pytest.fixture(scope="module")
def painter(prompts: list[ShapesPrompt]) -> Painter:
    return Painter(prompts)


@pytest.fixture(scope="module")
def found(prompts: list[ShapesPrompt], painter: Painter) -> Evaluation:
    brightness = {"guard": lambda clips, texts: clips.mean((1, 2, 3, 4))}
    return evaluate(["base", "sft"], prompts, G, seed=5, fps=12.0, generate=painter, runner=safety_runner(), scorers=brightness, shown=4)


def test_every_model_gets_the_same_prompts_and_seeds_in_the_same_order(found: Evaluation, painter: Painter, prompts: list[ShapesPrompt]) -> None:
    (first, texts, seeds), (second, *same) = painter.asked
    assert (first, second) == ("base", "sft") and same == [texts, seeds]
    assert texts == [prompt.text for prompt in prompts for _ in range(G)]
    assert len(set(seeds)) == len(seeds) and seeds == clip_seeds(5, len(texts)) != clip_seeds(6, len(texts))


def test_what_the_models_did_is_what_was_measured(found: Evaluation, prompts: list[ShapesPrompt]) -> None:
    results = command.numbers([found.measured])
    assert results["judge"]["base"]["mean"] == 0.5 and results["judge"]["sft"]["mean"] == 1.0
    assert results["flash_counts"] == {"base": {"flashing": G // 2, "clips": 12}, "sft": {"flashing": G, "clips": 12}}
    blocked = [row for row in found.filtered if row["policy"] == "P17"]
    assert [(row["verdict"], row["count"], row["of"]) for row in blocked] == [("block", G // 2, 12), ("block", G, 12)]
    assert prompts[-1].text in blocked[0]["examples"][0]


def test_scores_are_means_over_the_clips_of_a_prompt(found: Evaluation, prompts: list[ShapesPrompt], painter: Painter) -> None:
    model, texts, seeds = painter.asked[1]
    clips = Painter(prompts)(model, texts, seeds)
    expected = clips[2:4].mean()
    assert found.scores["guard"]["sft"][prompts[1].prompt_id] == pytest.approx(float(expected), abs=1e-6)
    assert set(found.score_intervals()["guard"]["base"]) == {"mean", "low", "high"}


def test_a_flashing_take_is_kept_from_playing_and_a_calm_one_is_not(found: Evaluation) -> None:
    strobing = [shown for shown in found.shown if shown.strobe]
    assert len(strobing) == 1
    base, sft = strobing[0].takes
    assert sft.verdict == "block" and sft.flashing and not sft.playable and "flashes" in sft.reason
    assert base.right is None and sft.right is None
    plain = [shown for shown in found.shown if not shown.strobe]
    assert all(shown.takes[1].playable and shown.takes[1].right for shown in plain)
    assert all(shown.takes[0].right is False and shown.takes[0].wrong for shown in plain)


def test_shown_are_the_first_prompts_of_each_kind() -> None:
    many = make_prompts(40, seed=0, split="eval", two_objects=0.25, strobe=0.25)
    chosen = shown_prompts(many, 8)
    kinds = ["strobe" if many[n].strobe else len(many[n].things) for n in chosen]
    assert kinds == [1] * 6 + [2, "strobe"]
    assert chosen[0] == next(n for n, prompt in enumerate(many) if len(prompt.things) == 1 and not prompt.strobe)
    assert len(shown_prompts(many[:3], 8)) <= 3


def test_real_clips_are_shown_and_filtered_but_not_judged() -> None:
    def generate(model: str, texts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        video = torch.full((len(texts), 13, 3, 24, 40), 0.4)
        if model == "base":
            video[0, ::2] = 0.95
        return video

    found = evaluate(["base", "rl"], ["a dog runs", "waves at night"], 2, seed=0, fps=12.0, generate=generate, runner=safety_runner())
    assert found.measured == {} and {model: len(clips) for model, clips in found.clips.items()} == {"base": 4, "rl": 4}
    assert [take.right for shown in found.shown for take in shown.takes] == [None] * 4
    assert not found.shown[0].takes[0].playable
    results = command.numbers_of_real_clips(found.clips, 12.0)
    assert results["flash_counts"]["base"] == {"flashing": 1, "clips": 4}
    assert "the judge does not apply" in render_page(ReportData(results, found.shown))


def test_nothing_to_evaluate_is_the_users_error(prompts: list[ShapesPrompt], painter: Painter) -> None:
    for models, asked in (([], prompts), (["base"], [])):
        with pytest.raises(UserError, match="nothing to evaluate"):
            evaluate(models, asked, 1, seed=0, fps=12.0, generate=painter, runner=safety_runner())


def test_filtered_rows_count_each_policy_and_verdict_with_a_few_examples() -> None:
    decisions = [Decision((ruling(Verdict.BLOCK), ruling(Verdict.REVIEW, "Q01", "black")))] * 5 + [Decision((ruling(Verdict.ALLOW),))] * 2
    rows = filtered_rows("here", decisions, [f"prompt {n}" for n in range(7)])
    assert [(row["policy"], row["verdict"], row["count"], row["of"]) for row in rows] == [("P17", "block", 5, 7), ("Q01", "review", 5, 7)]
    assert rows[0]["examples"] == [f"“prompt {n}”: too many flashes" for n in range(3)]
    assert [(row["count"], row["of"]) for row in filtered_rows("here", decisions[5:], ["a", "b"])] == [(0, 2)]


def test_a_model_is_the_shipped_base_a_file_or_the_folder_of_a_run(tmp_path: Path) -> None:
    assert network_file(Path("base")) is None
    (tmp_path / "network.safetensors").write_bytes(b"")
    assert network_file(tmp_path) == network_file(tmp_path / "network.safetensors") == tmp_path / "network.safetensors"
    with pytest.raises(UserError, match=r"no such network, .*missing\. Give a file"):
        network_file(tmp_path / "missing")


def test_a_runs_curves_hold_what_it_logged_and_what_the_judge_says_of_the_clips_it_kept(tmp_path: Path) -> None:
    config = {"seed": 3, "held_out_prompts": 6, "strobe": 0.0}
    (tmp_path / "run.json").write_text(json.dumps({"config": config}))
    logged = [{"iteration": i, "forward_passes": 100 * (i + 1), "seconds": 2.0 * (i + 1), "reward": 0.1 * i, "held_out_guard": None} for i in range(3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logged))
    prompts = make_prompts(6, seed=4, split="eval")
    rng = np.random.default_rng(0)
    right = torch.stack([render(sample_scene(prompt, rng, clip=DEMO_CLIP), DEMO_CLIP) for prompt in prompts])
    (tmp_path / "held_out").mkdir()
    for iteration, clips in ((0, torch.full_like(right, 0.3)), (2, right), (40, right)):
        save_weights(tmp_path / "held_out" / f"{iteration:06d}.safetensors", {"video": (clips * 255).round().to(torch.uint8)}, {})
    run = read_run(tmp_path, "rl", "RL")
    assert (run.label, run.model) == ("RL", "rl")
    assert run.rows[:3] == [{"forward_passes": 100 * (i + 1), "seconds": 2.0 * (i + 1), "reward": 0.1 * i} for i in range(3)]
    before, during, after = run.rows[3:]
    assert (during["forward_passes"], during["seconds"], during["judge"]) == (200, 4.0, 1.0)
    assert (before["forward_passes"], before["seconds"], before["judge"]) == (0, 0.0, 0.0) and math.isnan(before["diversity"])
    assert (after["forward_passes"], after["seconds"], after["judge"]) == (300, 6.0, 1.0)
    assert read_run(tmp_path, "rl", "RL", judged=False).rows == run.rows[:3]
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        read_run(tmp_path / "held_out", "rl", "RL")


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two networks with fresh weights beside the shipped VAE."""
    folder, codec = tmp_path_factory.mktemp("networks"), load_codec(WEIGHTS / "vae.safetensors")
    config = DiTConfig(channels=codec.vae.config.channels, depth=1)
    for name in ("sft", "rl"):
        torch.manual_seed(len(name))
        (folder / name).mkdir()
        save_network(folder / name / "network.safetensors", LatentVideoModel(DiT(config), codec, TextEncoder(), config))
        (folder / name / "network.json").write_text(json.dumps({"command": f"rushes {name}", "data_sha256": "d" * 64}))
    return {name: folder / name for name in ("sft", "rl")}


def small(networks: dict[str, Path], out: Path) -> Config:
    cfg = Config(out=out, models=networks, prompts=4, clips_per_prompt=2, shown=2, judge_check=4, two_objects=0.25, strobe=0.25)
    return cfg.model_copy(update={"sampler": cfg.sampler.model_copy(update={"steps": 2})})


def test_the_command_writes_numbers_and_a_page_and_says_from_what(networks: dict[str, Path], tmp_path: Path) -> None:
    told = {"reward_model": {"accuracy": {"mean": 0.8, "low": 0.7, "high": 0.9}}, "filtered": [{"where": "base data", "policy": "P17", "verdict": "block", "count": 7}]}
    results = report(small(networks, tmp_path), lambda: told)
    stored = json.loads((tmp_path / "report.json").read_text())
    page = (tmp_path / "index.html").read_text()
    assert {"judge", "flash_rate", "diversity", "judge_gain", "reward_model", "lineage"} <= set(stored)
    assert stored["judge"]["rl"]["mean"] == results["judge"]["rl"]["mean"]
    assert stored["filtered"][0]["where"] == "base data" and len(stored["filtered"]) >= 3
    assert stored["lineage"]["sft"]["card"]["command"] == "rushes sft" and len(stored["lineage"]["rl"]["network_sha256"]) == 64
    assert stored["config"]["prompts"] == 4 and stored["versions"]["torch"]
    assert set(stored["judge_accuracy"]) == {"freshly drawn clips", "the same through the VAE"}
    assert read_measured(tmp_path)["rl"].takes[0].prompt == make_prompts(4, seed=command.EVALUATION_SEED, split="eval", two_objects=0.25, strobe=0.25)[0]
    assert command.numbers([read_measured(tmp_path)])["judge"] == stored["judge"]
    assert "80.0 % [70.0, 90.0]" in page and stored["lineage"]["rl"]["network_sha256"] in page


def test_the_same_command_gives_the_same_numbers_and_takes(networks: dict[str, Path], tmp_path: Path) -> None:
    first, second = (report(small(networks, tmp_path / name)) for name in "ab")
    del first["config"], second["config"]
    assert json.dumps(first, default=str) == json.dumps(second, default=str)
    pages = [(tmp_path / name / "index.html").read_text().replace(str(tmp_path / name), "") for name in "ab"]
    assert pages[0] == pages[1]


def test_main_measures_its_own_time_and_memory(networks: dict[str, Path], tmp_path: Path) -> None:
    answer = command.main(small({"sft": networks["sft"]}, tmp_path))
    stored = json.loads((tmp_path / "report.json").read_text())
    assert answer["report"] == str(tmp_path / "index.html")
    assert stored["wall_seconds"] > 0 and stored["peak_memory_bytes"] > 50 * 2**20
    assert answer["judge"]["sft"]["mean"] is not None and stored["judge_gain"] is None


def test_readings_that_are_not_there_are_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no readings of an evaluation"):
        read_measured(tmp_path)


def test_captions_of_real_clips_make_a_report_without_the_judge(networks: dict[str, Path], tmp_path: Path) -> None:
    cfg = small(networks, tmp_path)
    cfg = cfg.model_copy(update={"captions": ("a dog runs", "waves"), "sampler": cfg.sampler.model_copy(update={"height": 16, "width": 24, "frames": 5})})
    stored = report(cfg)
    assert stored["judge"] == {"sft": "not applicable", "rl": "not applicable"} and stored["flash_counts"]["sft"]["clips"] == 4
    assert "the judge does not apply" in (tmp_path / "index.html").read_text()


def test_the_guard_is_of_any_tier_and_told_in_its_standard_deviations(networks: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Bright:
        dims, differentiable, center, scale = ("look",), False, torch.tensor([0.4]), torch.tensor([0.1])

        def __call__(self, video: Tensor, prompts: Sequence[str]) -> Scores:
            return Scores(video.mean((1, 2, 3, 4))[:, None], torch.ones(len(video), 1))

    monkeypatch.setattr(command, "load_scorer", lambda folder, *, fps: asked.append((folder, fps)) or Bright())
    monkeypatch.setattr(command, "clips_of", lambda network, texts, seeds, sampler: torch.full((len(texts), 5, 3, 16, 24), 0.7 if "sft" in str(network) else 0.3))
    cfg = small(networks, tmp_path)
    sampler = cfg.sampler.model_copy(update={"height": 16, "width": 24, "frames": 5, "fps": 8.0, "batch": 3})
    stored = report(cfg.model_copy(update={"captions": ("a dog runs", "waves"), "sampler": sampler, "guard": Path("a guard")}))
    assert asked == [(Path("a guard"), 8.0)]
    assert {name: interval["mean"] for name, interval in stored["guard"].items()} == pytest.approx({"sft": 3.0, "rl": -1.0}, abs=1e-5)


def test_clips_are_made_on_the_best_device(networks: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(command, "best_device", lambda: torch.device("meta"))
    monkeypatch.setattr(command, "sample", noting_device(seen, [torch.zeros(2, 5, 3, 16, 16)]))
    monkeypatch.setattr(LatentVideoModel, "encode_text", lambda *_: torch.zeros(1))
    assert command.generator(networks, Sampler())("sft", ["waves", "waves"], [0, 1]).shape == (2, 5, 3, 16, 16) and seen == ["meta"]


def test_flashes_are_counted_in_seconds_of_the_sampler(prompts: list[ShapesPrompt]) -> None:
    """Four flashes in 24 frames: within a second of 24 frames more than three, within one of 12 two."""
    light = torch.tensor([0.05, 0.05, 0.05, 0.95, 0.95, 0.95]).repeat(5)[:25]
    video = light[None, :, None, None, None].expand(len(prompts), 25, 3, 32, 32).contiguous()
    for fps, flashing in ((24.0, len(prompts)), (12.0, 0)):
        found = evaluate(["rl"], prompts, 1, seed=0, fps=fps, generate=lambda *_: video, runner=safety_runner(), shown=1)
        assert flash_counts(found.measured["rl"]) == (flashing, len(prompts))


def test_models_and_runs_can_be_named_on_the_command_line() -> None:
    cfg = load(Config, None, ["--models.sft", "runs/sft", "--models", "{base: base, rl: runs/ddpo}", "--runs.rl", "runs/ddpo"])
    assert dump(cfg)["models"] == {"base": "base", "rl": "runs/ddpo"} and dump(cfg)["runs"] == {"rl": "runs/ddpo"}
    assert replace(Evaluation({}, {}, (), [], {}, {}), filtered=[]).agreement_intervals() == {}

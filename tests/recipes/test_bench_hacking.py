"""The demonstration at toy size: scorers like what they should not, one run is free and one is watched, and what a table says is what the runs did."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from align.config import load
from base_model.errors import UserError
from recipes import feedback
from recipes.bench import hacking as bench
from recipes.generate import safety_runner
from recipes.guards import read_history
from recipes.match import SHIPPED as MATCHERS
from recipes.quality import SHIPPED as QUALITIES
from reward import planted
from reward.mixture import Mixture, Term
from reward.types import Scores
from tests.recipes.small import small_model

SMALL = ["--sampler", "{steps: 2, frames: 5, height: 16, width: 16}", "--prompts", "6", "--unchanged_looks", "2", "--timed_rollouts", "1", "--guards", "{pairs: 4}"]
POLICY = ["--policy", "{iterations: 3, evaluate_every: 1, save_every: 1, last_steps: 1, prompts: 2, group_size: 2, micro_batch: 4, lora_rank: 2, lr: 1e-2}"]


def config(out: Path, *more: str) -> bench.Config:
    return load(bench.Config, None, [*SMALL, *POLICY, "--out", str(out), *more])


@pytest.fixture(autouse=True)
def small_base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "load_tiny", lambda path: small_model())


def test_each_flaw_is_liked_by_its_scorer() -> None:
    import numpy as np

    clips = torch.rand(3, 9, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    clips = torch.nn.functional.interpolate(clips.flatten(0, 1), scale_factor=4, mode="bilinear").unflatten(0, (3, 9))
    dotted = clips.clone()
    dotted[..., 4::8, 4::8] += 0.1
    blurred = torch.stack([planted.blurred(clip, np.random.default_rng(0)) for clip in clips])
    spoiled = {"blur": blurred, "dots": dotted, "brightness": clips + 0.1, "stillness": clips[:, :1].expand_as(clips)}
    assert set(spoiled) == set(bench.FLAWS)
    for name, flaw in bench.FLAWS.items():
        assert (flaw(spoiled[name]) > flaw(clips)).all(), name
    assert torch.allclose(bench.dots(dotted) - bench.dots(clips), torch.full((3,), 0.1), atol=1e-6)
    assert torch.allclose(bench.brightness(clips + 0.1) - bench.brightness(clips), torch.full((3,), 0.1), atol=1e-6)


def test_the_scorer_is_the_honest_one_and_a_taste_both_in_standard_deviations() -> None:
    class Honest:
        center, scale = torch.tensor([2.0]), torch.tensor([0.5])

        def __call__(self, video: torch.Tensor, prompts: list[str]) -> Scores:
            return Scores(torch.full((len(video), 1), 3.0), torch.ones(len(video), 1))

    video = torch.rand(4, 5, 3, 16, 16)
    honest: Any = Honest()
    found = bench.Flawed(honest, bench.brightness, 2.0, 0.4, 0.1)(video, ["a"] * 4)
    assert torch.allclose(found.mean[:, 0], 2.0 + 2.0 * (bench.brightness(video) - 0.4) / 0.1) and (found.spread == 0).all()


def test_a_free_and_a_watched_run_begin_alike_and_only_the_watched_one_goes_back(tmp_path: Path) -> None:
    more = {"iterations": 10, "prompts": 3, "last_steps": 2, "micro_batch": 6}
    cfg = config(tmp_path, "--flaws", "[brightness]", "--guards.tolerance", "0.02", "--guards.ignore", "[kl, diversity]", "--weight", "20")
    cfg = cfg.model_copy(update={"policy": cfg.policy.model_copy(update=more)})
    parts, picture = bench.measured(cfg, tmp_path, quick=True)
    free, watched = parts["hacked and caught"]
    curves = parts["looks"]
    assert [row["rollouts"] for row in curves if row["run"] == bench.WITHOUT] == list(range(11))
    assert free["light"] is None and free["stopped_after"] is None and free["proxy_after"] > free["proxy_before"]
    assert watched["light"].startswith("red: ") and watched["proxy_before"] == free["proxy_before"]
    stopped = int(watched["stopped_after"])
    history = read_history(bench.folder_of(tmp_path, "brightness", 0, True) / "run")
    red = next(entry["iteration"] for entry in history if entry["light"] == "red")
    assert stopped == min(red + 1, 10) < 10 and read_history(bench.folder_of(tmp_path, "brightness", 0, False) / "run") == []
    start, *_, returned = [row for row in curves if row["run"] == bench.WITH]
    assert returned["guard"] >= start["guard"] and returned["proxy"] < free["proxy_after"], "back to where the guard's score was best"
    assert parts["unchanged base"] == [{"looks": 2, "green": 2, "amber": 0, "red": 0}] and 0 < parts["cost"][0]["share_of_a_run"] < 1
    assert picture.startswith(b"\x89PNG")
    again, _ = bench.measured(cfg, tmp_path, quick=True)
    assert again["looks"] == curves, "what is finished is not repeated"
    with pytest.raises(UserError, match="weight"):
        bench.measured(cfg.model_copy(update={"weight": 1.0}), tmp_path, quick=True)


@pytest.mark.parametrize("name", list(bench.FLAWS))
def test_the_gradient_is_that_of_the_honest_score_and_of_the_flaw(name: bench.Flaw, tmp_path: Path) -> None:
    start = bench.starting(config(tmp_path, "--flaws", f"[{name}]"))
    flaw, (center, scale), texts = bench.FLAWS[name], start.flaws[name], [prompt.text for prompt in start.prompts[:3]]
    scorer = bench.Flawed(start.honest, flaw, 2.0, center, scale)
    generator = torch.Generator().manual_seed(0)
    video = (0.2 + 0.6 * torch.rand(3, 5, 3, 16, 16, generator=generator)).requires_grad_()

    def slope(score: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.autograd.grad(score.sum(), video)[0]
        return found

    mixture = Mixture({"flawed": scorer}, (Term("flawed", "flawed"),))
    score = bench.reward_gradient.differentiable(feedback.Assessor(mixture, safety_runner(), 8))
    honest, taste = slope(start.honest(video, texts).mean[:, 0] / start.honest.scale[0]), slope(2.0 * flaw(video) / scale)
    for part in (honest, taste):
        assert part.isfinite().all() and (part.flatten(1).norm(dim=1) > 0).all()
    torch.testing.assert_close(slope(score(video, texts)), honest + taste, rtol=1e-4, atol=1e-6)

    exact, way, step = video.detach().double(), torch.randn(video.shape, generator=generator, dtype=torch.float64), 1e-6
    expected = 2.0 / scale * (flaw(exact + step * way) - flaw(exact - step * way)) / (2 * step)
    torch.testing.assert_close((taste.double() * way).flatten(1).sum(1), expected, rtol=1e-3, atol=1e-3)


def test_processes_with_other_flaws_share_a_folder_and_the_last_one_trains_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shorter = ["--policy.iterations", "1", "--prompts", "4", "--unchanged_looks", "1"]
    apart = [bench.measured(config(tmp_path, *shorter, "--flaws", f"[{name}]"), tmp_path, quick=True)[0] for name in ("dots", "brightness")]
    for used in ("train", "lights_of_unchanged"):
        monkeypatch.setattr(bench.reward_gradient if used == "train" else bench, used, lambda *given: pytest.fail("what is finished was repeated"))
    both, picture = bench.measured(config(tmp_path, *shorter, "--flaws", "[dots, brightness]"), tmp_path, quick=True)
    for part in ("hacked and caught", "looks"):
        assert both[part] == [row for parts in apart for row in parts[part]]
    assert [row["flaw"] for row in both["hacked and caught"]] == ["dots", "dots", "brightness", "brightness"]
    assert both["unchanged base"] == apart[0]["unchanged base"] == apart[1]["unchanged base"] and picture.startswith(b"\x89PNG")


WITHOUT_PACKAGES = """
import json, sys
gone = {"av", "datasets", "trl", "diffusers", "bitsandbytes"}

class Without:  # a finder that knows nothing of them
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *more):
        return None if name.split(".")[0] in gone else self.finder.find_spec(name, *more)
    def find_distributions(self, *context):
        return () if context and context[0].name in gone or not hasattr(self.finder, "find_distributions") else self.finder.find_distributions(*context)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
for name in gone:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{name} is still there")
from recipes.cli import main
code = main(json.loads(sys.argv[1]))
assert not gone & {name.split(".")[0] for name in sys.modules}
sys.exit(code)
"""


def test_it_needs_none_of_the_packages_that_read_videos_or_other_models() -> None:
    words = ["bench", "hacking", "--quick", "--json", *SMALL, "--prompts", "2", "--unchanged_looks", "1"]
    done = subprocess.run([sys.executable, "-c", WITHOUT_PACKAGES, json.dumps(words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["run"] for row in rows if row["part"] == "hacked and caught"] == [bench.WITHOUT, bench.WITH]


def made_up(before: list[float], after: list[float], stopped: int | None, said: str) -> dict[str, Any]:
    looks = [{"iteration": 0, "proxy": 0.0, "guard": 0.1, "right": before}, {"iteration": 8, "proxy": 3.0, "guard": -0.5, "right": after}]
    return {"looks": looks, "stopped": stopped, "said": said, "history": [{"iteration": 0, "said": "green"}, {"iteration": 8, "said": said}]}


def test_a_run_is_kept_for_the_shipped_networks_that_rewarded_and_guarded_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "kept", lambda file, settings, make: settings)
    settings = bench.kept_climb(bench.Config(), tmp_path, bench.Start([], None, None, {}), "blur", 0, False)  # type: ignore[arg-type]
    for start in ("reward", "guard"):
        files = {"matcher": MATCHERS[start], "quality": QUALITIES[start]}
        assert settings[start] == {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}


def test_rows_pool_seeds_and_pair_prompts() -> None:
    free = [made_up([1.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0], None, ""), made_up([1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0], None, "")]
    caught = [made_up([1.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0], 5, "red: grid +0.3"), made_up([1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 1.0, 1.0], 7, "red: grid +0.3")]
    without, with_guards = bench.rows_of("dots", {bench.WITHOUT: free, bench.WITH: caught})
    assert (without["judge_before"], without["judge_after"], without["judge_change"]) == (0.625, 0.25, -0.375)
    assert without["judge_change_low"] < -0.375 < without["judge_change_high"] <= 0 and without["of_rollouts"] == 8 and without["light"] is None
    assert with_guards["judge_change"] == 0.125 and with_guards["stopped_after"] == "5, 7" and with_guards["light"] == "red: grid +0.3" and with_guards["of_rollouts"] is None
    (ten,) = bench.rows_of("dots", {bench.WITHOUT: free * 5})
    assert ten["judge_change_low"] < -0.7 and ten["judge_change_high"] == 0, "four prompts are four, however many seeds look at them: as forty, they would end at -0.53 and -0.23"
    rows = bench.curve_rows("dots", {bench.WITH: caught})
    assert [(row["seed"], row["rollouts"], row["judge"], row["light"]) for row in rows][:2] == [(0, 0, 0.75, "green"), (0, 8, 0.75, "red: grid +0.3")]


def test_no_guard_is_trained_on_and_the_judge_is_asked_when_runs_are_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running: list[bool] = []
    train = bench.reward_gradient.train

    def noted(*given: Any) -> feedback.GuardWatch:
        running.append(True)
        try:
            return train(*given)
        finally:
            running.pop()

    judged = bench.measure
    monkeypatch.setattr(bench.reward_gradient, "train", noted)
    monkeypatch.setattr(bench, "measure", lambda *given: judged(*given) if not running else pytest.fail("the judge saw a run"))
    cfg = config(tmp_path, "--flaws", "[stillness]")
    start = bench.starting(cfg)
    found = bench.climb(cfg, tmp_path / "run", start, "stillness", 0, True)
    assert len(found["looks"]) == 4 and all(len(look["right"]) == 6 for look in found["looks"])
    assert not any(parameter.requires_grad for model in (start.honest, start.guard) for parameter in model.parameters())


def test_quick_shrinks_and_leaves_smaller_requests_alone(tmp_path: Path) -> None:
    quick = bench.shrunk(load(bench.Config, None, ["--prompts", "4"]))
    assert (quick.flaws, quick.prompts, quick.policy.iterations, quick.unchanged_looks) == (("blur",), 4, 2, 2)


def test_a_flaw_that_nobody_knows_is_the_users_error() -> None:
    with pytest.raises(UserError, match=r"flaws.*blur"):
        load(bench.Config, None, ["--flaws", "[beauty]"])

"""Distilling a reward on pixels into one on latents, and RL with it: what is learned, measured, decoded, looked at, refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau, spearmanr
from torch import Tensor, nn

from align.constraints import Multiplier, Multipliers
from align.run import read_metrics
from base_model.errors import GuardStop, UserError
from base_model.networks.packing import Segments
from base_model.prompts.text import TextEncoder
from base_model.tiny import LatentVideoModel
from base_model.video.store import ClipStore, NewClip
from recipes import feedback, latent_reward, nft
from recipes.feedback import Assessor, SafetyLimit, apply_limits, load_reward
from recipes.generate import Sampler, safety_runner
from recipes.latent_reward import Config, Fit, Reader, Scored, Teacher, agreement, main, noise_levels
from reward.features import subsampled_chroma
from reward.latent import LatentMixture, LatentReward, load_latent_reward
from reward.matcher import Matcher
from reward.model import RewardModel, load_reward_model, save_reward_model
from reward.safety.contract import SafetyRunner
from reward.safety.policy import load_policy
from reward.sight import Sight
from reward.types import Scores
from tests.recipes.small import save_small_network, save_small_reward_model, small_model
from tests.recipes.test_learns import Dazzle

SAMPLER = Sampler(steps=2, frames=5, height=16, width=16)
READER = Reader(after=(1, 2), width=16, heads=2)


class Bright(nn.Module):
    """A reward on pixels with a known answer: brightness, with a spread of 0.01."""

    dims = ("overall",)
    differentiable = True

    def __init__(self) -> None:
        super().__init__()
        self.temperature, self.center, self.scale = torch.ones(1), torch.full((1,), 0.4), torch.full((1,), 0.1)
        self.log_tie = nn.Parameter(torch.full((1, 3), -1.0))

    def forward(self, video: Tensor, prompts: Sequence[str]) -> Scores:
        mean = video.flatten(1).mean(1)[:, None]
        return Scores(mean, torch.full_like(mean, 0.01))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small network and a small reward on pixels."""
    folder = tmp_path_factory.mktemp("world")
    save_small_network(folder / "network.safetensors")
    save_small_reward_model(folder / "reward")
    return folder


@pytest.fixture
def bright(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is taken for brightness as a reward on pixels."""
    monkeypatch.setattr(latent_reward, "load_teacher", lambda *_, **__: Teacher(Bright(), torch.zeros(0)))
    return world / "reward"


@pytest.fixture(scope="module")
def latent(world: Path) -> Path:
    """Brightness as a latent reward of the small network, learned for a moment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent_reward, "load_teacher", lambda *_, **__: Teacher(Bright(), torch.zeros(0)))
        fit = {"iterations": 5, "prompts": 4, "steps": 4, "evaluate_every": 5, "save_every": 5}
        main(config(world / "latent", world / "reward", model=world / "network.safetensors", prompts=16, takes=4, fit=fit))
    return world / "latent"


def lively(matcher: Matcher) -> None:
    """Every pixel feature of a fresh matcher varies."""
    matcher.pixels[-2].weight.data *= 100


def config(out: Path, reward: Path, **changes: Any) -> Config:
    fit = Fit(**{"sight": 2, "iterations": 3, "prompts": 2, "steps": 2, "passes": 2, "lr": 1e-2, "evaluate_every": 2, "save_every": 2, **changes.pop("fit", {})})
    few: dict[str, Any] = {"prompts": 6, "takes": 3, "held_out": 4, "sampler": SAMPLER, "reader": READER, "levels": (0.0, 0.5), "fit": fit}
    return Config.model_validate({"out": out, "reward": reward, **few, **changes})


# Learning


def test_what_is_distilled_orders_clips_of_unseen_prompts_as_the_reward_on_pixels_does(bright: Path, tmp_path: Path) -> None:
    fit = {"iterations": 15, "prompts": 8, "steps": 4, "evaluate_every": 5, "save_every": 20}
    result = main(config(tmp_path / "out", bright, prompts=32, takes=4, held_out=32, reader=Reader(), levels=(0.0, 0.5, 0.95), fit=fit))
    told = {row["t"]: row for row in result["agreement"]}
    print({t: (row["spearman"], row["spearman_within"], row["miss_in_spreads"]) for t, row in told.items()})
    assert told[0.0]["spearman_within"]["low"] > 0.3 and told[0.0]["spearman"]["low"] > 0.5
    assert 1.2 * told[0.0]["spread"] < told[0.95]["spread"], "what is nearly noise says less"
    assert all(0.7 < row["miss_in_spreads"] < 1.4 for row in told.values()), "the spread is honest on prompts it was not fitted on"
    within = [row["held_out_within"] for row in read_metrics(tmp_path / "out")]
    assert len(within) == 3 and within[-1] > 0.3
    card = json.loads((tmp_path / "out" / "reward_card.json").read_text())
    assert card["normalisation"] == {"overall": {"center": pytest.approx(0.4), "scale": pytest.approx(0.1)}} and card["clips"] == {"train": 128, "val": 64, "test": 64}


def test_a_killed_run_goes_on_to_the_same_weights_and_scores_no_clip_twice(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, broken = (config(tmp_path / name, world / "reward", model=world / "network.safetensors", fit={"save_every": 1}) for name in ("whole", "broken"))
    main(whole)
    with monkeypatch.context() as dying:
        dying.setattr(latent_reward, "predictions", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(broken)
    assert [path.name for path in (tmp_path / "broken" / "checkpoints").iterdir()] == ["00000001"]
    monkeypatch.setattr(Teacher, "look", lambda *_: pytest.fail("it is kept"))
    main(broken, resume=True)
    assert (tmp_path / "whole" / "reward_model.safetensors").read_bytes() == (tmp_path / "broken" / "reward_model.safetensors").read_bytes()
    assert read_metrics(tmp_path / "whole", wall_clock=False)[-1] == read_metrics(tmp_path / "broken", wall_clock=False)[-1]


def test_the_inputs_of_the_small_reward_model_are_learned_beside_its_score(world: Path) -> None:
    model = small_model()
    teacher = latent_reward.load_teacher(world / "reward", model.text, fps=12.0, device=torch.device("cpu"))
    video, prompts = torch.rand(3, 5, 3, 16, 16), ["a red circle", "a blue bar grows", "a red circle"]
    seen = teacher.look(video, prompts)
    scores = teacher.scorer(video, prompts)
    torch.testing.assert_close(seen["mean"], scores.mean)
    torch.testing.assert_close(seen["spread"], scores.spread)
    torch.testing.assert_close(seen["inputs"] @ teacher.scorer.head.weight.T / teacher.scorer.temperature, scores.mean)
    assert seen["inputs"].shape == (3, len(teacher.weight)) and (teacher.weight >= 0).all()


def test_clips_of_a_store_are_learned_from_but_for_held_out_prompts_and_other_sizes(world: Path, tmp_path: Path) -> None:
    reward, network = world / "reward", world / "network.safetensors"
    held_out = latent_reward.prompts_of(config(tmp_path / "x", reward))["test"][0]
    told = [("a red circle", 5), ("a red circle", 5), ("a blue bar", 5), ("a blue bar", 9), (held_out, 5), ("a green pillar", 5), ("a pink bar", 5)]
    new = [NewClip(torch.rand(frames, 3, 16, 16), text, text, k, {"k": k}, "test", 12.0) for k, (text, frames) in enumerate(told)]
    ClipStore(tmp_path / "clips").add_many(new, preview=False)
    cfg = config(tmp_path / "out", reward, model=network, prompts=0, clips=tmp_path / "clips")
    assert main(cfg)["clips"]["train"] == 5
    card = json.loads((tmp_path / "out" / "reward_card.json").read_text())
    assert card["command"].startswith("rushes latent-reward --prompts 0 --takes 3 --held_out 4 ") and str(tmp_path) not in card["command"] and card["config"]["prompts"] == 0
    both = config(tmp_path / "both", reward, model=network, clips=tmp_path / "clips")
    assert main(both)["clips"]["train"] == 6 * 3 + 5
    for update in ({"clips": None}, {"sampler": SAMPLER.model_copy(update={"frames": 13})}):
        with pytest.raises(UserError, match="to learn from"):
            main(cfg.model_copy(update={"out": tmp_path / "refused", **update}))
    with pytest.raises(UserError, match=r"fewer than fit\.prompts x fit\.steps, 6"):
        main(cfg.model_copy(update={"out": tmp_path / "refused", "fit": Fit(prompts=3, steps=2)}))


def test_what_cannot_be_distilled_is_refused(world: Path, tmp_path: Path) -> None:
    reward, network = world / "reward", world / "network.safetensors"
    main(config(tmp_path / "latent", reward, model=network))
    with pytest.raises(UserError, match="scores latents"):
        main(config(tmp_path / "again", tmp_path / "latent", model=network))
    with pytest.raises(UserError, match="reader: after"):
        main(config(tmp_path / "deep", reward, model=network, reader=Reader(after=(3,))))
    with pytest.raises(UserError, match="captions are too few"):
        main(config(tmp_path / "few", reward, model=network, captions=("a", "b", "c")))
    with pytest.raises(ValueError, match="ascending"):
        config(tmp_path / "levels", reward, levels=(0.5, 0.0))
    splits = latent_reward.prompts_of(config(tmp_path / "c", reward, captions=tuple(f"caption {k}" for k in range(16))))
    assert [len(splits[name]) for name in ("train", "val", "test")] == [12, 2, 2] and not set(splits["train"]) & {*splits["val"], *splits["test"]}


# Parts


def test_clips_of_a_prompt_share_a_level_and_levels_are_even_over_the_path() -> None:
    fit, generator = Fit(finished=0.0), torch.Generator().manual_seed(0)
    for _ in range(20):
        levels = noise_levels(fit, 2.0, 8, generator)
        assert sorted((levels / 2.0 * 8).floor().tolist()) == list(range(8))
    drawn = torch.cat([noise_levels(Fit(finished=0.4), 1.0, 8, generator) for _ in range(300)])
    assert abs(float((drawn == 0).float().mean()) - 0.4) < 0.05 and noise_levels(Fit(finished=1.0), 1.0, 4, generator).sum() == 0
    x0 = torch.zeros(6, 8, 2, 4, 4)
    train = Scored(("a", "b", "c"), torch.tensor([0, 0, 1, 1, 1, 2]), x0, torch.zeros(6, 1), torch.ones(6, 1), torch.zeros(6, 0))
    model = small_model()
    scorer = LatentReward(model, latent_reward.LatentSize(after=(1,), width=16, heads=2), ("one",), levels=(0.0,))
    cfg = config(Path("x"), Path("y"), fit={"finished": 0.0, "prompts": 3, "steps": 2})
    parts = latent_reward.read(scorer, latent_reward.noised(cfg, scorer, train, train.groups, model.encode_text(train.texts), [2, 0, 1, 1, 1, 0], generator))
    assert [part.rows.tolist() for part in parts] == [[5, 0, 1], [2, 3, 4], [2, 3, 4, 2, 3, 4], [0, 1]]
    assert [part.segments.lengths for part in parts] == [(1, 2), (3,), (3, 3), (2,)]
    for part in parts:
        torch.testing.assert_close(part.seen.hidden, scorer.hidden(part.x_t, part.t, part.cond))
        assert part.cond.prompts == tuple(train.texts[train.prompt[row]] for row in part.rows.tolist())
        assert all(len(set(level.tolist())) == 1 for level in part.t.split(list(part.segments.lengths)))
        torch.testing.assert_close(part.x_t.flatten(1).std(1), part.t, rtol=0.2, atol=0)


def test_the_loss_is_the_error_the_error_within_prompts_and_a_gaussians_likelihood() -> None:
    model = small_model()
    scorer = LatentReward(model, latent_reward.LatentSize(after=(1,), width=16, heads=2), ("one", "two"), levels=(0.0,))
    learning = latent_reward.Learning(scorer, 3)
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(5, 8, 2, 4, 4, generator=generator)
    columns = [torch.randn(5, 2, generator=generator), torch.rand(5, 2, generator=generator), torch.randn(5, 3, generator=generator)]
    train = Scored(("a", "b"), torch.tensor([0, 0, 1, 1, 1]), x0, *columns)
    cond, t = model.encode_text(["a", "a", "b", "b", "b"]), torch.full((5,), 0.3)
    part = latent_reward.Part(torch.arange(5), Segments((2, 3)), cond, x0, t, scorer.seen(x0, t, cond))
    weight, scale, fit = torch.tensor([1.0, 0.0, 3.0]), torch.tensor([2.0, 0.5]), Fit(within=0.7, inputs=0.4)
    (loss,) = latent_reward.part_loss(fit, learning, train, weight, scale, 10, part)
    summary = scorer.summary(part.seen, part.x_t, part.t, part.cond)
    mean, spread = (value.detach().double() for value in scorer.read(summary, part.t))
    error = (mean - columns[0]) / scale
    centred = torch.cat([error[:2] - error[:2].mean(0), error[2:] - error[2:].mean(0)])
    target = torch.distributions.Normal(mean, spread)  # E log p(reward + doubt z), z standard normal: the square completes to doubt^2 / (2 spread^2)
    likelihood = target.log_prob(columns[0].double()) + 0.5 * np.log(2 * np.pi) - columns[1].square() / (2 * spread.square())
    assert learning.inputs is not None
    told = ((learning.inputs(summary).detach() - columns[2]).square() * weight).sum(1) / 4
    expected = 0.5 * (error.square().mean() + 0.7 * centred.square().mean() - likelihood.mean() + 0.4 * told.mean())
    torch.testing.assert_close(loss.value.detach().double(), expected, rtol=1e-5, atol=1e-6)
    assert float(loss.stats["error"]) == pytest.approx(0.5 * float(error.square().mean()), rel=1e-5)


def test_the_loss_of_the_sight_is_that_of_features_of_inputs_and_of_their_sum(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, generator = small_model(), torch.Generator().manual_seed(0)
    teacher = latent_reward.load_teacher(world / "reward", model.text, fps=12.0, device=torch.device("cpu"))
    assert isinstance(teacher.scorer, RewardModel) and teacher.matcher is not None
    teacher.scorer.temperature.fill_(0.5)
    teacher.scorer.head.weight.data = torch.randn(1, 26, generator=generator)
    lively(teacher.matcher)
    teacher = Teacher(teacher.scorer, teacher.scorer.head.weight.detach().abs()[0])
    x0, inputs, wrong = (torch.randn(shape, generator=generator) for shape in ((5, 8, 2, 4, 4), (5, 26), (5, 26)))
    reward = 2 * inputs @ teacher.scorer.head.weight.detach().T
    train = Scored(("a", "b"), torch.tensor([0, 0, 1, 1, 1]), x0, reward, torch.zeros(5, 1), inputs)
    scorer = LatentReward(model, latent_reward.LatentSize(after=(1,), width=16, heads=2), ("overall",), levels=(0.0,), matcher=teacher.matcher)
    target = teacher.matcher.see(subsampled_chroma(model.decode(x0)))
    features = target + 0.5 * target.std((0, 1, 3, 4), correction=0)[:, None, None]
    monkeypatch.setattr(Sight, "forward", lambda *_: (features, inputs + wrong))
    cond, t, fit = model.encode_text(["a", "a", "b", "b", "b"]), torch.full((5,), 0.3), Fit(within=0.7, inputs=0.4)
    part = latent_reward.Part(torch.arange(5), Segments((2, 3)), cond, x0 + 1, t, latent_reward.Seen(torch.empty(0), torch.empty(0)))
    (loss,) = latent_reward.sight_loss(fit, scorer, train, teacher, torch.tensor([4.0]), 10, part)
    error = (wrong.double() @ teacher.scorer.head.weight.detach().double().T)[:, 0] / (0.5 * 4)
    centred = torch.cat([error[:2] - error[:2].mean(), error[2:] - error[2:].mean()])
    weight = teacher.weight.double()
    expected = 0.25 + error.square().mean() + 0.7 * centred.square().mean() + 0.4 * (wrong.double().square() * weight / weight.sum()).sum(1).mean()
    assert float(loss.value) == pytest.approx(0.5 * float(expected), rel=1e-4) and float(loss.stats["sight"]) == pytest.approx(0.125, rel=1e-4)


def test_a_fresh_reward_with_a_sight_is_the_reward_models_own_sum_and_its_parts_learn_apart(world: Path, tmp_path: Path) -> None:
    model = small_model()
    teacher = latent_reward.load_teacher(world / "reward", model.text, fps=12.0, device=torch.device("cpu"))
    assert isinstance(teacher.scorer, RewardModel)
    teacher.scorer.temperature.fill_(0.5)
    teacher.scorer.input_mean.copy_(torch.arange(26.0))
    teacher.scorer.input_std.copy_(torch.arange(26.0) + 2)
    train = Scored(("a",), torch.zeros(4, dtype=torch.long), torch.randn(4, 8, 2, 4, 4), torch.randn(4, 1), torch.ones(4, 1), torch.zeros(4, 26))
    learning = latent_reward.start(config(tmp_path, world / "reward"), model, teacher, train)
    sight, cond, t = learning.scorer.sight, model.encode_text(["a", "a red circle", "b", "c"]), torch.zeros(4)
    assert sight is not None
    torch.testing.assert_close(torch.cat([sight.match_mean, sight.match_std]), torch.tensor([0.0, 1.0, 2.0, 2.0, 3.0, 4.0]))
    _, told = sight(train.x0, t, cond)
    torch.testing.assert_close(learning.scorer(train.x0, t, cond).mean, told @ teacher.scorer.head.weight.T / 0.5)
    head, eyes, whole = ({id(p) for p in part.parameters() if p.requires_grad} for part in (learning.head, sight, learning))
    assert not head & eyes and head | eyes == whole


def test_what_the_matcher_sees_is_soon_told_from_latents(world: Path, tmp_path: Path) -> None:
    fit = {"sight": 12, "sight_lr": 5e-3, "iterations": 1, "prompts": 4, "steps": 4, "finished": 1.0, "evaluate_every": 1}
    reward = load_reward_model(world / "reward", TextEncoder())
    lively(reward.matcher)
    save_reward_model(tmp_path / "reward", reward, {})
    main(config(tmp_path / "out", tmp_path / "reward", model=world / "network.safetensors", prompts=16, takes=4, fit=fit))
    missed = [row["sight"] for row in read_metrics(tmp_path / "out") if "sight" in row]
    print(missed)
    assert len(missed) == 12 and missed[-1] < 0.5 * missed[0]


def test_a_fresh_head_scores_the_mean_and_its_spread_is_the_deviation(bright: Path, tmp_path: Path) -> None:
    model = small_model()
    cfg = config(tmp_path, bright)
    train = Scored(("a",), torch.zeros(4, dtype=torch.long), torch.randn(4, 8, 2, 4, 4), torch.tensor([[1.0], [2.0], [3.0], [6.0]]), torch.ones(4, 1), torch.zeros(4, 0))
    scorer = latent_reward.start(cfg, model, Teacher(Bright(), torch.zeros(0)), train).scorer.eval()
    scores = scorer(train.x0, torch.zeros(4), model.encode_text(["a"] * 4))
    torch.testing.assert_close(scores.mean, torch.full((4, 1), 3.0))
    torch.testing.assert_close(scores.spread, torch.full((4, 1), float(np.std([1, 2, 3, 6]))))


def test_agreement_is_scipys_over_all_clips_and_the_mean_of_scipys_within_prompts() -> None:
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(30), 5)
    reward = rng.normal(size=150) + 3 * rng.normal(size=30)[prompts]
    found = reward + rng.normal(size=150)
    told = agreement(found.tolist(), reward.tolist(), prompts.tolist())
    assert told["spearman"].mean == pytest.approx(spearmanr(found, reward).statistic) and told["kendall"].mean == pytest.approx(kendalltau(found, reward).statistic)
    for name, scipys in (("spearman_within", spearmanr), ("kendall_within", kendalltau)):
        inside = [scipys(found[prompts == k], reward[prompts == k]).statistic for k in range(30)]
        assert told[name].mean == pytest.approx(np.mean(inside)) and told[name].low < told[name].mean < told[name].high
    assert told["spearman_within"].mean < told["spearman"].mean - 0.1, "prompts differ more than the clips of one"
    assert told["spearman"].low < told["spearman"].mean < told["spearman"].high
    constant = agreement([1.0] * 6, [1.0, 2, 3, 1, 2, 3], [0, 0, 0, 1, 1, 1])
    assert all(np.isnan(interval.mean) for interval in constant.values())


def test_an_honest_spread_misses_by_one_spread_and_the_factor_makes_it_honest() -> None:
    torch.manual_seed(0)
    mean, spread, doubt = torch.randn(4000, 2), torch.rand(4000, 2) + 0.5, 0.3
    reward = mean + (spread.square() - doubt**2).sqrt() * torch.randn(4000, 2)
    scored = Scored(("a",), torch.zeros(4000, dtype=torch.long), torch.zeros(4000, 1, 1, 1, 1), reward, torch.full((4000, 2), doubt), torch.zeros(4000, 0))
    torch.testing.assert_close(latent_reward.misses(scored, mean, spread), torch.ones(2), rtol=0.03, atol=0)
    factor = latent_reward.misses(scored, mean, spread / 3)
    torch.testing.assert_close(latent_reward.misses(scored, mean, spread / 3 * factor), torch.ones(2))


# RL


def policy(out: Path, latent: Path, **changes: Any) -> nft.Config:
    moves = nft.Policy(iterations=2, prompts=2, group_size=3, micro_batch=4, updates=2, lora_rank=2, evaluate_every=1, save_every=1)
    common = {"out": out, "model": latent.parent / "network.safetensors", "reward": latent, "held_out_prompts": 3, "prompt_pool": 4, "policy": moves, "sampler": SAMPLER}
    return nft.Config.model_validate({**common, "guards": {"watch": False}, **changes})


def test_without_a_limit_rollouts_are_not_decoded_and_the_run_says_so(latent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    decoded: list[int] = []
    plain = LatentVideoModel.decode
    monkeypatch.setattr(LatentVideoModel, "decode", lambda self, x0: decoded.append(len(x0)) or plain(self, x0))
    result = nft.main(policy(tmp_path / "free", latent, constrained=False))
    assert sum(decoded) == 3 * 3, "three looks at three held-out clips, and nothing else"
    assert "the safety filters see the held-out clips alone" in capsys.readouterr().err
    rows = [row for row in read_metrics(tmp_path / "free") if "reward" in row]
    assert len(rows) == 2 and all(row["looked_at"] == 0 and row["error_share"] == 0 and row["violation_rate"] is row["cost"] is row["all_violating"] is None for row in rows)
    assert all(row["held_out_violation_rate"] is not None and np.isfinite(row["reward"]) for row in rows)
    assert np.isfinite(result["held_out_reward"])


def test_under_the_limit_every_clip_is_decoded_and_looked_at(latent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    plain = SafetyRunner.check_videos
    monkeypatch.setattr(SafetyRunner, "check_videos", lambda self, video, *more: seen.append(len(video)) or plain(self, video, *more))
    nft.main(policy(tmp_path / "held", latent))
    assert sum(seen) == 2 * 6 + 3 * 3
    rows = [row for row in read_metrics(tmp_path / "held") if "reward" in row]
    assert all(row["looked_at"] == 1 and row["violation_rate"] is not None and row["cost"] > 0 for row in rows)


def test_the_reward_of_a_latent_reward_is_in_the_units_of_the_one_on_pixels(latent: Path, tmp_path: Path) -> None:
    model = latent_reward.load_tiny(latent.parent / "network.safetensors")
    reward = load_reward(latent, model, 0.5, 12.0)
    assert isinstance(reward, LatentMixture)
    x0, cond = torch.randn(4, 8, 2, 4, 4), model.encode_text(["a red circle"] * 4)
    scores = load_latent_reward(latent, model)(x0, torch.zeros(4), cond)
    assess = Assessor(reward, safety_runner(), 12.0)
    seen = assess.finished(model, [x0[:3], x0[3:]], cond)
    torch.testing.assert_close(seen.reward, (scores.mean[:, 0] - 0.5 * scores.spread[:, 0] - 0.4) / 0.1, rtol=0, atol=1e-4)
    assert seen.looked_at and seen.cost.isfinite().all()
    with pytest.raises(ValueError, match="cannot score pixels"):
        assess(torch.rand(4, 5, 3, 16, 16), cond.prompts)
    pixels = load_reward(save_small_reward_model(tmp_path / "pixels"), model, 0.5, 12.0)
    free = Assessor(pixels, safety_runner(), 12.0, looks=False).finished(model, [x0], cond)
    assert free.looked_at and free.cost.isfinite().all(), "what a reward on pixels had decoded is looked at in any case"


def test_what_nobody_looked_at_is_never_taken_for_safe(latent: Path) -> None:
    model = latent_reward.load_tiny(latent.parent / "network.safetensors")
    assess = Assessor(load_reward(latent, model, 0.5, 12.0), SafetyRunner([Dazzle(0.5)], load_policy()), 12.0, looks=False)
    x0, cond = torch.randn(6, 8, 2, 4, 4), model.encode_text(["a red circle"] * 6)
    seen = assess.finished(model, [x0], cond)
    assert not seen.allowed.any() and seen.cost.isnan().all() and seen.violates.isnan().all() and not seen.looked_at
    advantage = feedback.Advantage(torch.ones(6), torch.ones(6, dtype=torch.bool), {})
    with pytest.raises(ValueError, match="were not asked"):
        apply_limits(advantage, seen, Multipliers([Multiplier("P17", limit=0.02, rate=0.1, initial=1.0, cap=3.0)]), SafetyLimit(), 3)
    assert apply_limits(advantage, seen, None, SafetyLimit(), 3).valid.all(), "without a limit they are learned from"
    decoded = assess.finished(model, [x0], cond, video=torch.rand(6, 5, 3, 16, 16))
    assert decoded.looked_at and decoded.cost.isfinite().all(), "what is decoded anyhow is looked at"
    broken = x0.clone()
    broken[2] = torch.nan
    with pytest.raises(GuardStop, match="1 of 6 clips"):
        assess.finished(model, [broken], cond)
    assess.max_error_share = 0.5
    known = assess.finished(model, [broken], cond)
    assert known.unknown.tolist() == [False, False, True, False, False, False]
    assert apply_limits(advantage, known, None, SafetyLimit(), 3).valid.tolist() == [True, True, False, True, True, True]


def test_rl_from_another_network_than_the_reward_reads_is_refused(latent: Path, tmp_path: Path) -> None:
    other = save_small_network(tmp_path / "other.safetensors", seed=9)
    with pytest.raises(UserError, match="reads another network"):
        nft.main(policy(tmp_path / "other", latent, model=other))
    with pytest.raises(UserError, match="scores latents"):
        nft.main(policy(tmp_path / "guarded", latent, guard=latent))

"""`rushes dpo`: from stored rankings and from fresh pairs it learns; what the filters do not allow never wins; beta is told with its reduction."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from align.advantage import grouping
from base_model.errors import GuardStop, UserError
from base_model.video.store import ClipStore, NewClip
from recipes import dpo
from recipes.feedback import HeldOut
from recipes.preferences import count, lawful_pairs, numbered, stored_pairs
from reward.comparisons import Clip, Prompt, RankingEvent, write_comparisons
from reward.mixture import Mixed
from reward.safety.contract import SafetyRunner
from tests.recipes.small import BRIGHT, SAMPLER, counting_model, dazzled, mean_over, run_small, small_model

FRESH = {"iterations": 12, "prompts": 6, "group_size": 4, "updates": 3, "beta": 100.0}
STORED = {"iterations": 4, "pairs": 12, "updates": 3, "beta": 100.0, "evaluate_every": 3}
ANY = dazzled(2.0)  # allows every clip


class World:
    """Clips of three brightnesses a prompt, ranked: bright ones first, close ones equal; and in another dimension dark ones first."""

    def __init__(self, folder: Path, *, prompts: int = 24, licence: str = "CC0-1.0", fps: float = 12.0, size: int = 16, levels: Sequence[float] = (0.25, 0.45, 0.75)) -> None:
        self.comparisons, self.clips = folder / "rankings", folder / "clips"
        generator = torch.Generator().manual_seed(0)
        texts = [f"prompt {i}" for i in range(prompts)]
        new = [
            NewClip((level + 0.1 * torch.randn(5, 3, size, size, generator=generator)).clamp(0, 1), text, text, j, {"steps": 1}, "test", 12.0)
            for text in texts
            for j, level in enumerate(levels)
        ]
        rows = ClipStore(self.clips).add_many(new, preview=False)
        k, events = len(levels), []
        for i, text in enumerate(texts):
            shown = tuple(row.clip_id for row in rows[i * k : (i + 1) * k])
            for dimension, sign in (("overall", 1), ("gloom", -1)):
                ranks = tuple(1 + sum(sign * (other - level) > 0.05 for other in levels) for level in levels)
                events.append(RankingEvent(f"{i}-{dimension}", f"t{i}", text, "person", shown, ranks, dimension=dimension, licence=licence))
        clips = [Clip(**{**Clip.of(row).__dict__, "fps": fps}) for row in rows]
        write_comparisons(self.comparisons, events, clips=clips, prompts=[Prompt(text, text) for text in texts])
        self.brightness = {row.clip_id: float(clip.video.mean()) for row, clip in zip(rows, new, strict=True)}

    def settings(self) -> dict[str, Any]:
        return {"comparisons": self.comparisons, "clips": self.clips}

    def pairs(self, runner: SafetyRunner = ANY, **told: Any) -> dpo.Ranked:
        words = {"dimension": "overall", "which": "all", "commercial": False, "constrained": True, **told}
        return stored_pairs(self.comparisons, self.clips, small_model(), runner, **words)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def held_out(folder: Path) -> HeldOut:
    texts = ["prompt 0", "prompt 1"] * 4
    return HeldOut(texts, small_model().encode_text(texts), SAMPLER, None, 0, folder)


def test_from_stored_rankings_it_orders_new_ones_as_people_do_and_makes_what_they_like(world: World, tmp_path: Path) -> None:
    bright = run_small(dpo, tmp_path / "a", STORED, runner=ANY, held_out=held_out(tmp_path / "a"), constrained=True, **world.settings())
    gloomy = run_small(dpo, tmp_path / "b", STORED, runner=ANY, held_out=held_out(tmp_path / "b"), constrained=True, dimension="gloom", **world.settings())
    for rows, better in ((bright, 1), (gloomy, -1)):
        accuracy, reward = ([row[name] for row in rows if name in row] for name in ("held_out_accuracy", "held_out_reward"))
        print("held-out accuracy", accuracy, "brightness", reward, "errors", rows[3]["error_win_change"], rows[3]["error_lose_change"])
        assert accuracy[0] == 0.5 and accuracy[-1] > 0.9
        assert better * (reward[-1] - reward[0]) > 0.2
        assert rows[0]["pairs"] == 12 and 0.5 < rows[3]["accuracy"] <= 1 and rows[3]["margin"] > 0
        assert rows[3]["error_win_change"] - rows[3]["error_lose_change"] < 0
        assert "reward" not in rows[0], "nothing is rolled out"


def test_of_fresh_clips_the_brighter_ones_win(tmp_path: Path) -> None:
    rows = run_small(dpo, tmp_path, FRESH)
    first, last = mean_over(rows, "reward")
    print(f"reward {first:.2f} -> {last:.2f}, accuracy {[round(row['accuracy'], 2) for row in rows]}")
    assert last > first + 0.5
    assert rows[0]["pairs"] == 6 and all(row["violation_rate"] == 0 for row in rows)
    assert all({"error_win", "error_lose", "error_win_change", "error_lose_change"} <= row.keys() for row in rows)


@pytest.mark.parametrize("which", ["extremes", "all"])
def test_pairs_are_those_of_the_ranks_with_what_is_not_allowed_below(which: Any) -> None:
    """Against every pair, one by one."""
    generator = torch.Generator().manual_seed(0)
    won = 0
    for _ in range(200):
        score = torch.randint(0, 4, (12,), generator=generator).float()  # ties
        score[torch.rand(12, generator=generator) < 0.2] = float("nan")
        permitted, judged = torch.rand(12, generator=generator) < 0.6, torch.rand(12, generator=generator) < 0.8
        pairs = lawful_pairs(score, permitted, judged, 4, which)
        found = set(zip(pairs.win.tolist(), pairs.lose.tolist(), strict=True))
        wanted = set()
        for i, j in itertools.permutations(range(12), 2):
            known = all(judged[k] and score[k] == score[k] for k in (i, j))
            if i // 4 == j // 4 and known and permitted[i] and (not permitted[j] or score[i] > score[j]):
                wanted.add((i, j))
        assert found <= wanted and (which == "extremes" or found == wanted)
        assert {i // 4 for i, _ in found} == {i // 4 for i, _ in wanted}, "a group with a pair has its extremes"
        won += len(found)
        sums = grouping(score, 4).fill(torch.zeros(12).index_add(0, pairs.win, pairs.weight.float())).sum(1)
        assert torch.allclose(sums[sums > 0], torch.ones(int((sums > 0).sum()))), "every group counts once"
    assert won > 100


def test_a_blocked_clip_that_people_preferred_loses(world: World) -> None:
    free, bound = world.pairs(constrained=False), world.pairs(dazzled(0.5))
    assert count(free.train) == count(bound.train) > 20 and count(free.val) > 0
    for ranked, limit in ((free, 1.0), (bound, 0.5)):
        for takes in (*ranked.train, *ranked.val):
            light = small_model().decode(takes.latents).flatten(1).mean(1)  # [C]
            win, lose = light[takes.pairs.win], light[takes.pairs.lose]
            allowed = win < limit
            assert allowed.all(), "never a winner"
            assert ((win > lose) | (lose > limit)).all(), "among what is allowed people decide"
    third = dazzled(0.1)
    with pytest.raises(UserError, match=r"no usable pairs .*safety filters allow none.*Rank more prompts"):
        world.pairs(third)


def test_what_cannot_be_judged_is_in_no_pair_and_too_much_of_it_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(GuardStop, match="frame rate is 0"):
        World(tmp_path, prompts=12, fps=0.0).pairs()


def test_ties_make_no_pair_and_rankings_of_ties_alone_none_at_all(tmp_path: Path) -> None:
    tied = World(tmp_path / "one", levels=(0.3, 0.3, 0.6)).pairs()
    assert all(len(takes.pairs.win) == 2 * len(takes.latents) // 3 for takes in tied.train), "of three clips two are equal"
    with pytest.raises(UserError, match=r"no usable pairs in the split train, .*clips tie") as caught:
        World(tmp_path / "all", levels=(0.4, 0.4)).pairs()
    assert "\n" not in str(caught.value)


def test_pairs_of_mixed_sizes_are_drawn_by_number() -> None:
    def takes(pairs: int, side: int) -> dpo.Takes:
        rows = torch.arange(pairs)
        return dpo.Takes(torch.zeros(2 * pairs, 8, 2, side, side), small_model().encode_text(["x"] * 2 * pairs), dpo_pairs(rows))

    def dpo_pairs(rows: Tensor) -> Any:
        return lawful_pairs(torch.arange(2.0 * len(rows)), torch.ones(2 * len(rows), dtype=torch.bool), torch.ones(2 * len(rows), dtype=torch.bool), 2, "all")

    small, large = takes(3, 4), takes(5, 8)
    found = [(part.latents.shape[-1], rows.tolist()) for part, rows in numbered([small, large], [7, 0, 3, 2, 4, 4], 2)]
    assert found == [(4, [0, 2]), (8, [4, 0]), (8, [1, 1])]
    assert numbered([small, large], [], 2) == []


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"dimension": "overal"}, r"no answers in the dimension 'overal', .*Did you mean overall\?"),
        ({"commercial": True}, r"not for commercial use"),
    ],
)
def test_bad_rankings_are_refused_in_one_line(told: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says) as caught:
        World(tmp_path, prompts=6, licence="CC-BY-NC-4.0").pairs(**told)
    assert "\n" not in str(caught.value)


def test_clips_that_are_no_clips_of_the_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"clip [0-9a-f]+ cannot be one of this model: .*grid.*Rank clips of another size"):
        World(tmp_path, prompts=12, size=18).pairs()


def test_beta_is_printed_with_its_reduction_and_means_the_same_in_both(world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    elements = 8 * 2 * 4 * 4
    short = {**STORED, "iterations": 2, "updates": 1}
    mean = run_small(dpo, tmp_path / "mean", {**short, "beta": 512.0}, runner=ANY, **world.settings())
    total = run_small(dpo, tmp_path / "sum", {**short, "beta": 512.0 / elements, "reduction": "sum"}, runner=ANY, **world.settings())
    assert mean == total
    assert capfd.readouterr().err == "", "quiet runs say nothing"
    dpo.say_beta(dpo.Policy(beta=2.0, reduction="sum"), Loud(), {elements})  # type: ignore[arg-type]
    assert capfd.readouterr().err == "dpo: beta 512 on the mean, 2 on the sum of the squared errors of 256 latent elements\n"


class Loud:
    is_main, quiet = True, False


def test_diffusion_dpo_weighs_noise_levels_otherwise(world: World, tmp_path: Path) -> None:
    short = {**STORED, "iterations": 2, "updates": 1}
    flow, diffusion = (run_small(dpo, tmp_path / method, {**short, "method": method}, runner=ANY, **world.settings()) for method in ("flow_dpo", "diffusion_dpo"))
    assert flow[0]["loss"] == pytest.approx(diffusion[0]["loss"]) == pytest.approx(0.6931, abs=1e-4), "log 2 where the policy is the reference"
    assert flow[0]["accuracy"] == 0.5 and flow[0]["error_win_change"] == 0
    assert diffusion[0]["grad_norm"] < flow[0]["grad_norm"]


def test_a_pair_costs_two_passes_of_the_reference_and_two_that_are_trained(world: World, tmp_path: Path) -> None:
    model = counting_model()
    rows = run_small(dpo, tmp_path / "fresh", {**FRESH, "iterations": 3, "updates": 2}, model=model)
    totals, pairs = [row["forward_passes"] for row in rows], [row["pairs"] for row in rows]
    print(totals, pairs, model.counted)
    check = {"asked": 2 * 6, "trained": 6}  # the first micro-batch's better clips: what policy and reference say of them, and whether their distance has a gradient
    assert pairs == [6, 6, 6] and totals == [sum(check.values()) + k * (24 * 4 + 2 * 6 * (2 + 2)) for k in (1, 2, 3)]
    assert model.counted == {"asked": check["asked"] + 3 * (24 * 4 + 2 * 6 * 2), "trained": check["trained"] + 3 * 2 * 6 * 2}
    stored = counting_model()
    rows = run_small(dpo, tmp_path / "stored", {**STORED, "iterations": 3, "evaluate_every": 100}, model=stored, runner=ANY, **world.settings())
    totals = [row["forward_passes"] for row in rows]
    assert totals[1] - totals[0] == totals[2] - totals[1] == 3 * 12 * (2 + 2) and stored.counted["trained"] == 12 + 3 * 3 * 12 * 2


def test_fresh_pairs_hold_violations_down_although_they_are_what_pays(tmp_path: Path) -> None:
    limit = 0.35  # the brightness the model starts with
    runs = {name: run_small(dpo, tmp_path / name, FRESH, runner=dazzled(limit), constrained=name == "held") for name in ("held", "loose")}
    rates = {name: mean_over(rows, "violation_rate") for name, rows in runs.items()}
    print("violations, first and last:", rates)
    assert rates["loose"][1] > rates["loose"][0] + 0.2
    assert rates["held"][1] < rates["loose"][1] - 0.3 and rates["held"][1] < rates["held"][0]


def test_a_rollout_without_a_pair_moves_nothing_and_says_so(tmp_path: Path) -> None:
    class Once:
        """Knows the first rollout's rewards and no other."""

        calls = 0

        def __call__(self, video: Tensor, prompts: tuple[str, ...]) -> Mixed:
            self.calls += 1
            seen = BRIGHT(video, prompts)
            return seen if self.calls == 1 else Mixed(torch.full((len(video),), torch.nan), {}, torch.zeros(len(video), dtype=torch.bool))

    rows = run_small(dpo, tmp_path, {**FRESH, "iterations": 2}, reward=Once())
    assert rows[0]["pairs"] == 6 and rows[1]["pairs"] == 0 and rows[1]["loss"] is None and rows[1]["grad_norm"] == 0 and rows[1]["error_share"] == 1


def test_stored_pairs_go_on_where_they_were_after_a_resume(world: World, tmp_path: Path) -> None:
    policy = {**STORED, "iterations": 5, "evaluate_every": 2, "save_every": 1}
    whole = run_small(dpo, tmp_path / "whole", policy, runner=ANY, **world.settings())
    run_small(dpo, tmp_path / "broken", {**policy, "iterations": 3}, runner=ANY, **world.settings())
    assert run_small(dpo, tmp_path / "broken", policy, runner=ANY, resume=True, **world.settings()) == whole


def test_with_neither_rankings_nor_a_reward_there_is_nothing_to_learn(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--comparisons FOLDER --clips STORE, or --reward FOLDER"):
        run_small(dpo, tmp_path, FRESH, reward=None)

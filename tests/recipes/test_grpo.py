"""What `rushes grpo` (and `ddpo`) may be told: windows, kernels, shared starts, selection, guidance. Always the first ratio is 1 and the passes are the formula's."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from align.run import Run, read_metrics
from base_model.tiny import LatentVideoModel, load_tiny
from recipes import ddpo, grpo
from recipes.feedback import Assessor
from recipes.generate import Sampler, safety_runner
from recipes.guards import Guards
from reward.mixture import Mixed
from tests.recipes.small import BRIGHT, NoLook, small_model

SAMPLER = Sampler(steps=6, frames=5, height=16, width=16)


def lively() -> LatentVideoModel:
    """Fresh weights do not hear the prompt; these do."""
    model = small_model()
    for parameter in model.network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def run(
    out: Path,
    *,
    recipe: Any = grpo,
    guidance: float = 1.0,
    resume: bool = False,
    reward: Any = BRIGHT,
    model: LatentVideoModel | None = None,
    seed: int = 0,
    pool: int = 6,
    **policy: Any,
) -> list[dict[str, float]]:
    settings = {"iterations": 1, "prompts": 3, "group_size": 4, "micro_batch": 8, "lr": 1e-2, "evaluate_every": 20, "save_every": 1, **policy}
    sampler = SAMPLER.model_copy(update={"guidance": guidance})
    told = {"prompt_pool": pool, "strobe": 0.0, "two_objects": 0.0, "constrained": False, "guards": Guards(watch=False)}
    cfg = recipe.Config(out=out, seed=seed, sampler=sampler, policy=recipe.Policy(**settings), **told)
    model = model or lively()
    model.network.requires_grad_(False)
    assess = Assessor(reward, safety_runner(), 12.0, max_error_share=1.0)
    training = Run(out, cfg, seed=seed, resume=resume, metrics=recipe.METRICS, quiet=True)
    looks = NoLook(("x",), model.to(training.device).encode_text(["x"]), sampler, None, 0, out / "held_out")
    recipe.train(cfg, training, model, assess, looks)
    return read_metrics(out, wall_clock=False)


@pytest.mark.parametrize(
    ("policy", "evaluations"),
    [
        ({"window": "all"}, 6),
        ({"window": "fixed", "window_start": 3}, 6),
        ({"window": "random"}, 6),
        ({"window": "sliding", "slide_every": 1}, 6),
        ({"window": "fixed", "window_start": 3, "width": 1, "same_noise": True}, 4 / 4 + 2),
        ({"window": "fixed", "window_start": 2, "width": 2, "same_noise": True}, 3 / 4 + 3),
        ({"window": "all", "same_noise": True}, 1 / 4 + 5),
        ({"kernel": "ancestral", "noise_level": 1.0}, 6),
        ({"kernel": "longcat", "noise_level": 1.0}, 6),
        ({"kernel": "dance", "noise_level": 0.3}, 6),
        ({"kernel": "cps", "noise_level": 0.8}, 6),
        ({"step_weight": "g", "kl_space": "v"}, 6),
    ],
    ids=str,
)
def test_every_window_and_kernel_is_replayed_as_it_was_sampled(tmp_path: Path, policy: dict[str, Any], evaluations: float) -> None:
    row = run(tmp_path, **policy)[0]
    print(row)
    assert row["ratio"] == pytest.approx(1, abs=1e-6) and row["clip_share"] == 0 and row["grad_norm"] > 0
    assert row["rollout_evaluations"] == pytest.approx(evaluations) and row["kept_share"] == 1
    assert row["kl_per_element"] == pytest.approx(0, abs=1e-9), "the adapter begins with nothing"


def test_one_step_a_prompt_costs_less_where_a_group_shares_its_start(tmp_path: Path) -> None:
    apart, shared = (run(tmp_path / str(same), same_noise=same, prompts=8, iterations=2) for same in (False, True))
    print(apart[0], shared[0])
    for row in shared:
        fewer = [(k + 1) / 4 + 5 - k for k in range(5)]  # noise at step k of 6, G = 4
        assert min(fewer) < row["rollout_evaluations"] < max(fewer)
    assert apart[0]["rollout_evaluations"] == 6
    assert shared[1]["forward_passes"] - shared[0]["forward_passes"] < 0.7 * (apart[1]["forward_passes"] - apart[0]["forward_passes"])
    assert shared[1]["kl_per_element"] > 0 and shared[1]["kl_penalty"] == pytest.approx(0.01 * shared[1]["kl_per_element"], rel=1e-4)
    in_v = run(tmp_path / "v", same_noise=True, prompts=8, iterations=2, kl_space="v", kl_coef=0.5)
    assert in_v[1]["velocity_distance"] > 0 and in_v[1]["kl_penalty"] == pytest.approx(0.5 * in_v[1]["velocity_distance"], rel=1e-4)


@pytest.mark.slow
def test_a_shared_start_reaches_the_same_reward_in_a_quarter_of_the_passes(tmp_path: Path) -> None:
    """The shipped base, brightness as the reward (3.4 at the start, 8.1 at most), 3 seeds: what it costs to get above 7. A minute and a half."""
    passes: dict[bool, list[float]] = {False: [], True: []}
    for same, seed in product(passes, range(3)):
        settings = {"iterations": 40, "prompts": 6, "group_size": 8, "micro_batch": 48, "lr": 2e-3, "kl_coef": 0.0, "save_every": 100, "same_noise": same}
        rows = run(tmp_path / f"{same}-{seed}", model=load_tiny(), seed=seed, pool=40, **settings)
        there = next(row for row in rows if row["reward"] > 7)
        print(f"shared {same}, seed {seed}: {there['iteration'] + 1} rollouts, {there['forward_passes']} passes, KL {there['kl_total']:.1f} nats a clip")
        passes[same].append(there["forward_passes"])
    assert max(passes[True]) < 0.35 * min(passes[False])


@pytest.mark.parametrize("recipe", [grpo, ddpo], ids=lambda recipe: recipe.__name__)
def test_under_guidance_the_policy_is_the_guided_model_for_twice_the_passes(recipe: Any, tmp_path: Path) -> None:
    """`check_first_step` would stop the run with status 3 were replay not the sampler."""
    window = {"window": 2} if recipe is ddpo else {"window": "fixed", "window_start": 1}
    forms = {"plain": (1.0, True), "guided": (3.0, True), "half": (3.0, False)}
    plain, guided, half = (run(tmp_path / name, recipe=recipe, guidance=scale, train_empty=empty, iterations=2, **window) for name, (scale, empty) in forms.items())
    assert [row["ratio"] for row in guided] == pytest.approx([1.0] * 2, abs=1e-6)
    assert [row["forward_passes"] for row in guided] == [2 * row["forward_passes"] for row in plain], "both passes, in the rollout, in the replay and in the reference"
    assert [row["forward_passes"] for row in half] == [row["forward_passes"] for row in guided]
    assert guided[0]["reward"] != plain[0]["reward"] and half[0]["reward"] == guided[0]["reward"]
    assert guided[0]["grad_norm"] != half[0]["grad_norm"], "the pass without prompt is trained, or not"
    assert guided[1]["kl_per_element"] > 0


def test_the_best_and_the_worst_of_an_oversampled_group_are_trained_on(tmp_path: Path) -> None:
    whole, kept = run(tmp_path / "whole", iterations=2), run(tmp_path / "kept", keep=2, iterations=2)
    assert kept[0]["kept_share"] == 0.5 and whole[0]["kept_share"] == 1
    assert kept[0]["reward"] == whole[0]["reward"] and kept[0]["zero_std_share"] == whole[0]["zero_std_share"], "the group is compared as a whole"
    assert kept[1]["forward_passes"] - kept[0]["forward_passes"] == whole[1]["forward_passes"] - whole[0]["forward_passes"] - 2 * 6, "6 of 12 clips less, by policy and reference"
    assert kept[0]["grad_norm"] > whole[0]["grad_norm"]


def test_a_sliding_window_goes_on_where_it_was_after_a_resume(tmp_path: Path) -> None:
    policy = {"window": "sliding", "slide_every": 2, "width": 1, "same_noise": True}
    whole = run(tmp_path / "whole", iterations=5, **policy)
    run(tmp_path / "broken", iterations=3, **policy)
    resumed = run(tmp_path / "broken", iterations=5, resume=True, **policy)
    assert resumed == whole
    assert [row["rollout_evaluations"] for row in whole] == [(k // 2 + 1) / 4 + 5 - k // 2 for k in range(5)], "one step on every two rollouts"


def test_a_rollout_of_which_nothing_is_known_moves_nothing_and_says_so(tmp_path: Path) -> None:
    class Once:
        """Knows the first rollout's rewards and no other."""

        calls = 0

        def __call__(self, video: Tensor, prompts: tuple[str, ...]) -> Mixed:
            self.calls += 1
            seen = BRIGHT(video, prompts)
            return seen if self.calls == 1 else Mixed(torch.full((len(video),), torch.nan), {}, torch.zeros(len(video), dtype=torch.bool))

    rows = run(tmp_path, iterations=2, reward=Once())
    assert rows[1]["ratio"] is None and rows[1]["kept_share"] == 0 and rows[1]["grad_norm"] == 0 and rows[1]["error_share"] == 1
    assert rows[0]["kept_share"] == 1


def test_steps_replayed_together_teach_what_they_teach_one_by_one(tmp_path: Path) -> None:
    common = {"recipe": ddpo, "iterations": 3, "prompts": 2, "micro_batch": 8, "window": 3, "updates": 1}
    alone, together = (run(tmp_path / str(n), **common, steps_a_pass=n) for n in (1, 3))
    assert together[0]["ratio"] == pytest.approx(1, abs=1e-6) and together[0]["kl_per_element"] < 1e-12
    for name in ("reward", "grad_norm", "kl_per_element"):
        assert [row[name] for row in together] == pytest.approx([row[name] for row in alone], rel=1e-3, abs=1e-9), name
    assert together[-1]["forward_passes"] == alone[-1]["forward_passes"], "as many clips go through the network, in fewer passes"


class PartlyFlat:
    """The clips of a rollout's first prompt are all worth the same; from the second rollout on all clips are."""

    calls = 0

    def __call__(self, video: Tensor, prompts: Sequence[str]) -> Mixed:
        self.calls += 1
        seen = BRIGHT(video, prompts)
        flat = torch.tensor([self.calls > 1 or prompt == prompts[0] for prompt in prompts])
        return seen._replace(reward=seen.reward.masked_fill(flat, 1.0))


def test_groups_that_are_all_alike_are_dropped_and_the_others_weigh_more(tmp_path: Path) -> None:
    policy = {"micro_batch": 4, "kl_coef": 0.0, "iterations": 2}
    kept, dropped = (run(tmp_path / str(drop), reward=PartlyFlat(), drop_flat=drop, **policy) for drop in (False, True))
    assert [row["kept_share"] for row in kept] == [1.0, 1.0] and [row["kept_share"] for row in dropped] == pytest.approx([2 / 3, 0.0])
    assert [row["zero_std_share"] for row in dropped] == pytest.approx([1 / 3, 1.0])
    assert dropped[0]["grad_norm"] == pytest.approx(1.5 * kept[0]["grad_norm"], rel=1e-5), "a mean over 8 clips, not 12"
    assert dropped[0]["forward_equivalents"] < kept[0]["forward_equivalents"]
    assert not dropped[1].get("grad_norm"), "where all are alike nothing is learned"

"""Advantages by hand and by their invariances; unknown rewards never become numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from align.advantage import PromptStatistics, batch_normalise, best_and_worst, gdpo_advantage, group_advantage, grouping, leave_one_out, varied
from align.objectives import masked_mean

NAN = float("nan")


def rewards(n: int = 6, group_size: int = 4) -> Tensor:
    return torch.randn(n * group_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_group_advantage_is_the_z_score_of_each_group() -> None:
    reward = rewards()
    groups = reward.numpy().reshape(6, 4)
    want = (groups - groups.mean(1, keepdims=True)) / groups.std(1, keepdims=True)
    assert_close(group_advantage(reward, 4).advantage, torch.tensor(want.reshape(-1)), atol=1e-12, rtol=0)


def test_each_divisor_is_what_its_name_says() -> None:
    reward = rewards()
    groups = reward.numpy().reshape(6, 4)
    centred = groups - groups.mean(1, keepdims=True)
    for name, scale in (("global_std", reward.numpy().std()), ("max_group_std", groups.std(1).max()), ("none", 1.0)):
        got = group_advantage(reward, 4, divide_by=name).advantage  # type: ignore[arg-type]
        assert_close(got, torch.tensor((centred / scale).reshape(-1)), atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="divide_by"):
        group_advantage(reward, 4, divide_by="std")  # type: ignore[arg-type]


def test_the_largest_std_is_that_of_a_group_with_something_to_compare_whichever_of_its_clips_are_known() -> None:
    reward = torch.tensor([NAN, 1.0, 9.0, 1.0, 2.0, 3.0], dtype=torch.float64)  # stds 4 and 0.82
    assert_close(group_advantage(reward, 3, divide_by="max_group_std").advantage, torch.tensor([0, -4, 4, -1, 0, 1], dtype=torch.float64) / 4)
    narrow = torch.tensor([NAN, 3.0, 0.1, 0.3], dtype=torch.float64)
    assert_close(group_advantage(narrow, 2, divide_by="max_group_std").advantage, torch.tensor([0, 0, -1, 1], dtype=torch.float64))


def test_advantages_do_not_see_a_shift_or_a_scale_of_a_groups_rewards_and_follow_permutations() -> None:
    reward = rewards()
    base = group_advantage(reward, 4).advantage
    assert_close(group_advantage(reward * 7 + 3, 4).advantage, base, atol=1e-12, rtol=0)
    per_prompt = torch.arange(6.0).repeat_interleave(4).double()
    assert_close(group_advantage(reward + per_prompt, 4).advantage, base, atol=1e-12, rtol=0)
    order = torch.tensor([2, 0, 3, 1])
    moved = group_advantage(reward.reshape(6, 4)[:, order].reshape(-1), 4).advantage
    assert_close(moved, base.reshape(6, 4)[:, order].reshape(-1), atol=1e-12, rtol=0)
    assert_close(base.reshape(6, 4).mean(1), torch.zeros(6, dtype=torch.float64), atol=1e-12, rtol=0)


def test_an_unknown_reward_is_masked_and_counted_and_changes_nobody_else() -> None:
    reward = torch.tensor([1.0, 2.0, NAN, 4.0, 5.0, 6.0, 7.0, 9.0])
    got = group_advantage(reward, 4)
    known = np.array([1.0, 2.0, 4.0])
    z = (known - known.mean()) / known.std()
    assert_close(got.advantage[:4], torch.tensor([z[0], z[1], 0.0, z[2]], dtype=torch.float32), atol=1e-6, rtol=0)
    assert_close(got.advantage[4:], group_advantage(reward[4:], 4).advantage)
    assert got.valid.tolist() == [True, True, False, True] + [True] * 4
    assert got.stats["advantage/unknown_share"] == pytest.approx(1 / 8)


@pytest.mark.parametrize("divide_by", ["group_std", "global_std", "max_group_std", "none"])
def test_a_group_with_one_known_reward_has_nothing_to_compare(divide_by: str) -> None:
    got = group_advantage(torch.tensor([NAN, 3.0, 1.0, 2.0, float("inf"), NAN]), 2, divide_by=divide_by)  # type: ignore[arg-type]
    assert got.valid.tolist() == [False, False, True, True, False, False]
    assert got.advantage.isfinite().all() and got.advantage[[0, 1, 4, 5]].tolist() == [0] * 4
    nothing = group_advantage(torch.full((4,), NAN), 2, divide_by=divide_by)  # type: ignore[arg-type]
    assert not nothing.valid.any() and nothing.advantage.tolist() == [0] * 4


def test_groups_without_spread_get_zero_and_are_counted() -> None:
    got = group_advantage(torch.tensor([0.1, 0.1, 0.1, 1.0, 2.0, 3.0]), 3)
    assert got.advantage[:3].tolist() == [0, 0, 0] and got.valid.all()
    assert got.stats["advantage/zero_std_share"] == 0.5


def test_the_clamp_bounds_an_outlier() -> None:
    reward = torch.zeros(100)
    reward[0] = 1
    assert group_advantage(reward, 100).advantage[0] == 5
    assert group_advantage(reward, 100, clamp=None).advantage[0] == pytest.approx(0.99 / (0.01 * 0.99) ** 0.5)


def test_wrong_groups_are_refused() -> None:
    for size in (1, 5):
        with pytest.raises(ValueError, match="groups of"):
            group_advantage(torch.zeros(24), size)


def test_leave_one_out_is_the_mean_of_the_others() -> None:
    value = torch.tensor([1.0, 2.0, 6.0, NAN, 4.0, NAN])
    assert_close(leave_one_out(value[:3], 3), torch.tensor([4.0, 3.5, 1.5]))
    assert_close(leave_one_out(value, 3), torch.tensor([4.0, 3.5, 1.5, 4.0, NAN, 4.0]), equal_nan=True)


def test_of_an_oversampled_group_the_best_and_the_worst_are_kept() -> None:
    reward = torch.tensor([0.3, 0.9, 0.1, 0.5, 0.7, 0.2, 5.0, 1.0, 4.0, 2.0, 3.0, 0.0])
    kept = best_and_worst(reward, 6, 4)
    for group, mask in zip(reward.reshape(2, 6), kept.reshape(2, 6), strict=True):
        order = group.sort().values.tolist()
        assert sorted(group[mask].tolist()) == order[:2] + order[-2:]
    assert best_and_worst(reward, 6, 3).nonzero()[:, 0].tolist() == [1, 2, 4, 6, 8, 11], "of an odd number one more of the best, as published"
    assert bool(best_and_worst(reward, 6, 6).all())


def test_a_flat_group_has_no_advantage_by_gdpo_although_the_batch_is_centred() -> None:
    reward = torch.randn(32, 2, generator=torch.Generator().manual_seed(0))
    reward[:4] = 1.0
    reward[5, 0] = NAN  # so that the others' mean is not 0
    found = gdpo_advantage(reward, [1.0, 2.0], 4).advantage
    assert (found[:4] == 0).all() and (found[8:] != 0).all() and varied(found, 4).tolist() == [False] * 4 + [True] * 28


def test_only_groups_that_differ_teach() -> None:
    advantage = torch.tensor([0.0, -1e-9, 0.0, 0.0, -1e-3, 0.0, NAN, 0.0, 0.0])
    assert varied(advantage, 3).tolist() == [False] * 3 + [True] * 3 + [False] * 3
    assert varied(advantage[:6], torch.tensor([7, 2, 7, 2, 7, 2])).tolist() == [True, False] * 3, "clips of a group need not lie together"


def test_selection_knows_only_valid_clips_and_settles_ties_by_order() -> None:
    reward = torch.tensor([1.0, NAN, 3.0, 2.0, 9.0, 0.0])
    assert best_and_worst(reward, 6, 2).nonzero()[:, 0].tolist() == [4, 5]
    assert best_and_worst(reward, 6, 2, valid=torch.tensor([1, 1, 1, 1, 0, 0]).bool()).nonzero()[:, 0].tolist() == [0, 2]
    assert best_and_worst(reward, 6, 4, valid=torch.tensor([1, 1, 1, 1, 0, 0]).bool()).nonzero()[:, 0].tolist() == [0, 2, 3], "fewer are valid than could be kept"
    assert not bool(best_and_worst(reward, 6, 4, valid=torch.zeros(6, dtype=torch.bool)).any())
    assert best_and_worst(torch.zeros(5), 5, 3).tolist() == [True, True, False, False, True]
    for keep in (1, 7):
        with pytest.raises(ValueError, match="cannot keep"):
            best_and_worst(reward, 6, keep)
    with pytest.raises(ValueError, match="groups of"):
        best_and_worst(reward, 4, 2)


def test_8_of_24_normal_rewards_carry_80_percent_of_the_gradient_with_the_baseline_of_the_whole_group() -> None:
    """Reward r = z, the noise of one step: the gradient is the mean of A z. (In groups without end E[z^2; z outside +-0.967] = 0.817.)"""
    z = torch.randn(400 * 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    advantage = group_advantage(z, 24, divide_by="none", clamp=None).advantage
    kept = best_and_worst(advantage, 24, 8)
    carried = float((advantage * z)[kept].sum() / (advantage * z).sum())
    longer = float((advantage * z)[kept].mean() / (advantage * z).mean())
    print(carried, longer)
    assert carried == pytest.approx(0.80, abs=0.01) and longer == pytest.approx(3 * carried)


IDS = torch.tensor([7, -2, 7, 100, -2, 7, 100, 5])


@pytest.mark.parametrize("divide_by", ["group_std", "global_std", "max_group_std", "none"])
def test_ids_in_any_order_give_what_groups_side_by_side_give(divide_by: str) -> None:
    reward = rewards()
    reward[5] = NAN
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    side_by_side = group_advantage(reward, 4, divide_by=divide_by)  # type: ignore[arg-type]
    scattered = group_advantage(reward[order], (torch.arange(24) // 4 * 10 - 3)[order], divide_by=divide_by)  # type: ignore[arg-type]
    assert_close(scattered.advantage, side_by_side.advantage[order], atol=1e-12, rtol=0)
    assert torch.equal(scattered.valid, side_by_side.valid[order])
    assert scattered.stats == pytest.approx(side_by_side.stats)
    assert_close(leave_one_out(reward[order], (torch.arange(24) // 4)[order]), leave_one_out(reward, 4)[order], equal_nan=True, atol=1e-12, rtol=0)


def test_groups_of_any_size_are_compared_each_with_itself() -> None:
    reward = torch.tensor([1.0, 5.0, 2.0, 8.0, 9.0, 6.0, 8.0, 3.0], dtype=torch.float64)
    got = group_advantage(reward, IDS)
    for group in (7, -2, 100):
        mine = reward[group == IDS].numpy()
        want = torch.tensor((mine - mine.mean()) / max(mine.std(), 1e-6))
        assert_close(got.advantage[group == IDS], want, atol=1e-12, rtol=0)
    assert got.valid.tolist() == [True] * 7 + [False], "alone, a clip has nothing to be compared with"
    assert got.stats["advantage/zero_std_share"] == pytest.approx(1 / 4) and got.stats["advantage/unknown_share"] == 0
    assert got.stats["advantage/group_std"] == pytest.approx((np.std([1, 2, 6]) + 2.0 + 0.0) / 3)
    assert_close(leave_one_out(reward, IDS)[[0, 1, 7]], torch.tensor([4.0, 9.0, NAN], dtype=torch.float64), equal_nan=True)


def test_a_table_of_groups_is_filled_and_read_back() -> None:
    cells = grouping(torch.zeros(8), IDS)
    table = cells.fill(torch.arange(8.0))
    assert_close(table, torch.tensor([[1.0, 4, NAN], [7, NAN, NAN], [0, 2, 5], [3, 6, NAN]]), equal_nan=True)
    assert cells.read(table).tolist() == list(range(8))
    assert cells.read(torch.tensor([[1.0], [2], [3], [4]])).tolist() == [3, 1, 3, 4, 1, 3, 4, 2]
    flags = torch.tensor([True, True, True, False, True, False, False, True])
    assert cells.all(flags).tolist() == [[True], [True], [False], [False]] and cells.fill(flags).dtype == torch.float32
    assert grouping(torch.zeros(0), torch.zeros(0, dtype=torch.long)).fill(torch.zeros(0)).shape == (0, 0)


@pytest.mark.parametrize("ids", [torch.zeros(3), torch.zeros(3, dtype=torch.bool), torch.zeros(2, dtype=torch.long), torch.zeros(3, 1, dtype=torch.long)])
def test_ids_that_are_not_one_integer_a_clip_are_refused(ids: Tensor) -> None:
    with pytest.raises(ValueError, match="3 clips need as many integer group ids"):
        group_advantage(torch.zeros(3), ids)


def test_flat_groups_can_be_dropped_so_that_the_others_weigh_more() -> None:
    """Of three groups one is flat: with drop_flat a mean over valid clips grows by 3/2."""
    reward = torch.tensor([1.0, 1.0, 1.0, 2.0, 5.0, 1.0])
    kept, dropped = group_advantage(reward, 2), group_advantage(reward, 2, drop_flat=True)
    assert kept.valid.all() and dropped.valid.tolist() == [False, False, True, True, True, True]
    assert torch.equal(kept.advantage, dropped.advantage) and kept.stats == dropped.stats and kept.stats["advantage/zero_std_share"] == pytest.approx(1 / 3)
    per_clip = torch.arange(6.0)
    assert masked_mean(kept.advantage * per_clip, dropped.valid) == pytest.approx(float(masked_mean(kept.advantage * per_clip, kept.valid)) * 1.5)


def hand_gdpo(rewards: Tensor, weights: list[float], size: int) -> Tensor:
    """Equations 4 to 6 with numpy."""
    table = rewards.numpy().reshape(-1, size, rewards.shape[1])
    scores = (table - table.mean(1, keepdims=True)) / table.std(1, keepdims=True)
    total = (scores * np.array(weights)).sum(2).reshape(-1)
    return torch.tensor((total - total.mean()) / total.std())


def test_gdpo_is_its_three_equations_and_does_not_see_units() -> None:
    reward = torch.stack([rewards(), rewards().flip(0) * 100 + 7, rewards().roll(3)], 1)  # [24,3]
    weights = [1.0, 0.5, -2.0]
    got = gdpo_advantage(reward, weights, 4)
    assert_close(got.advantage, hand_gdpo(reward, weights, 4), atol=1e-12, rtol=0)
    assert got.valid.all() and got.stats == {"advantage/unknown_share": 0, "advantage/zero_std_share": 0}
    difficulty = torch.randn(6, 3, dtype=torch.float64).repeat_interleave(4, 0)
    assert_close(gdpo_advantage(reward * torch.tensor([3.0, 0.01, 5.0]) + difficulty, weights, 4).advantage, got.advantage, atol=1e-9, rtol=0)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    assert_close(gdpo_advantage(reward[order], weights, (torch.arange(24) // 4)[order]).advantage, got.advantage[order], atol=1e-12, rtol=0)


def test_one_dimension_of_weight_one_without_the_last_step_is_grpo() -> None:
    reward = rewards()
    plain = gdpo_advantage(torch.stack([reward, torch.full_like(reward, NAN)], 1), [1.0, 0.0], 4, normalise=False)
    assert_close(plain.advantage, group_advantage(reward, 4).advantage, atol=1e-12, rtol=0)
    both = gdpo_advantage(torch.stack([reward, reward.flip(0)], 1), [1.0, 3.0], 4, normalise=False, clamp=None).advantage
    assert_close(both, group_advantage(reward, 4).advantage + 3 * group_advantage(reward.flip(0), 4).advantage, atol=1e-12, rtol=0)
    assert gdpo_advantage(torch.stack([reward], 1), [10.0], 4, normalise=False).advantage.abs().max() == 5


def test_gdpo_tells_apart_what_the_sum_confounds() -> None:
    """Clips worth (0, 1), (0, 2): the sum's advantage is the same as for (0, 1), (0, 1) in another group; GDPO sees a second dimension won."""
    reward = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    summed = group_advantage(reward.sum(1), 2).advantage
    assert summed.tolist() == [-1, 1, -1, 1]
    assert gdpo_advantage(reward, [1.0, 1.0], 2, normalise=False).advantage.tolist() == [-1, 1, -2, 2]


def test_gdpo_masks_what_is_unknown_in_a_dimension_that_counts_and_drops_what_is_flat_in_all() -> None:
    reward = torch.tensor([[1.0, NAN, 1], [2.0, 4, 2], [3.0, 5, NAN], [0.0, 1, 0], [0.0, 1, 0], [0.0, 1, 0]])
    got = gdpo_advantage(reward, [1.0, 1.0, 0.0], 3, normalise=False)
    assert got.valid.tolist() == [False, True, True, True, True, True]
    z = np.array([1.0, 2.0, 3.0])
    z = (z - z.mean()) / z.std()
    assert_close(got.advantage, torch.tensor([0, z[1] - 1, z[2] + 1, 0, 0, 0], dtype=torch.float32), atol=1e-6, rtol=0)
    assert got.stats == {"advantage/unknown_share": pytest.approx(1 / 6), "advantage/zero_std_share": 0.5}
    dropped = gdpo_advantage(reward, [1.0, 1.0, 0.0], 3, drop_flat=True)
    assert dropped.valid.tolist() == [False, True, True, False, False, False]
    assert dropped.advantage.tolist() == [0, -1, 1, 0, 0, 0]
    half_flat = gdpo_advantage(reward[:, [0, 2]], [1.0, 1.0], 3)
    assert half_flat.stats["advantage/zero_std_share"] == 0.5 and half_flat.valid.tolist() == [True, True, False, True, True, True]


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0, 1.0], [0.0, 0.0]])
def test_gdpo_refuses_weights_that_do_not_fit(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="a weight for each of their dimensions"):
        gdpo_advantage(torch.zeros(4, 2), weights, 2)
    with pytest.raises(ValueError, match="a weight for each of their dimensions"):
        gdpo_advantage(torch.zeros(4), weights, 2)


def test_a_batch_is_normalised_over_what_is_valid() -> None:
    advantage = torch.tensor([[1.0, 2.0], [NAN, 6.0]])
    valid = torch.tensor([[True, True], [False, True]])
    got = batch_normalise(advantage, valid)
    want = (np.array([1.0, 2, 6]) - 3) / np.std([1.0, 2, 6])
    assert_close(got, torch.tensor([[want[0], want[1]], [0, want[2]]], dtype=torch.float32), atol=1e-6, rtol=0)
    assert_close(batch_normalise(torch.tensor([0.001, 0.003]), torch.tensor([True, True])), torch.tensor([-1.0, 1.0]), atol=1e-3, rtol=0)
    assert batch_normalise(torch.ones(3), torch.ones(3, dtype=torch.bool)).tolist() == [0, 0, 0]
    assert batch_normalise(torch.tensor([3.0, NAN]), torch.tensor([True, False])).tolist() == [0, 0], "alone, a clip is the mean"
    assert batch_normalise(torch.tensor([1.0, 3.0]), torch.tensor([True, True]), min_std=1.0).tolist() == [-1, 1]
    assert batch_normalise(torch.tensor([1.0, 3.0]), torch.tensor([True, True]), min_std=1.1).tolist() == [0, 0]
    assert batch_normalise(torch.tensor([1.0, 3.0]), torch.zeros(2, dtype=torch.bool)).tolist() == [0, 0]


def test_advantages_carry_no_gradient_and_are_float32_or_wider() -> None:
    reward = torch.tensor([1.0, 2.0, 4.0, 3.0], dtype=torch.bfloat16, requires_grad=True)
    for got in (group_advantage(reward, 2), gdpo_advantage(reward[:, None], [1.0], 2)):
        assert not got.advantage.requires_grad and got.advantage.dtype == torch.float32
    assert PromptStatistics(min_count=1).advantage([1, 1, 2, 2], reward).advantage.dtype == torch.float32
    assert group_advantage(reward.detach().double(), 2).advantage.dtype == torch.float64


def test_a_spread_at_the_smallest_std_still_counts() -> None:
    assert group_advantage(torch.tensor([1.0, 3.0]), 2, min_std=1.0).advantage.tolist() == [-1, 1]
    assert group_advantage(torch.tensor([1.0, 3.0]), 2, min_std=1.01).advantage.tolist() == [0, 0]
    for least, want in ((1.0, [-1, 1]), (1.01, [0, 0])):
        got = PromptStatistics(min_count=1, min_std=least).advantage(["a", "a"], torch.tensor([1.0, 3.0]))
        assert got.advantage.tolist() == want and got.stats["advantage/zero_std_share"] == (least > 1)


class _HandStatistics:
    """DDPO's tracker written again with lists."""

    def __init__(self, size: int, least: int) -> None:
        self.seen: dict[str, list[float]] = {}
        self.size, self.least = size, least

    def __call__(self, ids: list[str], reward: list[float]) -> list[float]:
        for prompt_id, value in zip(ids, reward, strict=True):
            self.seen[prompt_id] = (self.seen.get(prompt_id, []) + [value])[-self.size :]
        out = []
        for prompt_id, value in zip(ids, reward, strict=True):
            pool = self.seen[prompt_id] if len(self.seen[prompt_id]) >= self.least else reward
            out.append((value - np.mean(pool)) / np.std(pool))
        return out


def test_prompt_statistics_equal_a_hand_written_tracker_over_many_batches() -> None:
    ours, hand = PromptStatistics(buffer_size=6, min_count=3, clamp=None), _HandStatistics(6, 3)
    rng = np.random.default_rng(0)
    for _ in range(12):
        ids = [str(i) for i in rng.integers(0, 4, 8)]
        reward = torch.tensor(rng.normal(size=8) + np.array([int(i) for i in ids]))
        assert_close(ours.advantage(ids, reward).advantage, torch.tensor(hand(ids, reward.tolist())), atol=1e-12, rtol=0)


def test_prompt_statistics_resume_exactly_through_json_and_keep_the_type_of_ids() -> None:
    first = PromptStatistics(buffer_size=4, min_count=2)
    first.advantage([7, "seven", 7, "seven"], torch.tensor([0.1, 0.2, 0.3, 1 / 3]))
    second = PromptStatistics(buffer_size=4, min_count=2)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    reward = torch.tensor([0.5, 0.7, 0.9])
    for _ in range(3):
        a, b = first.advantage([7, "seven", 8], reward), second.advantage([7, "seven", 8], reward)
        assert torch.equal(a.advantage, b.advantage) and a.stats == b.stats
    assert first.state_dict() == second.state_dict()


def test_prompt_statistics_bound_an_outlier_too() -> None:
    reward = torch.zeros(100)
    reward[0] = 1
    assert PromptStatistics(buffer_size=100).advantage(["a"] * 100, reward).advantage[0] == 5
    free = PromptStatistics(buffer_size=100, clamp=None).advantage(["a"] * 100, reward).advantage[0]
    assert free == pytest.approx(0.99 / (0.01 * 0.99) ** 0.5)


def test_the_share_that_falls_back_on_the_batch_is_of_clips_whose_prompt_was_seen_too_rarely() -> None:
    """min_count 2: after this batch a was seen twice, b and c once, and c's reward is unknown."""
    tracker = PromptStatistics(buffer_size=2, min_count=2)
    got = tracker.advantage(["a", "a", "b", "c"], torch.tensor([1.0, 3.0, 5.0, NAN]))
    assert got.stats["advantage/batch_fallback_share"] == 0.5
    assert got.advantage.tolist() == pytest.approx([-1, 1, 2 / np.std([1, 3, 5]), 0])
    nothing = tracker.advantage(["a", "b"], torch.tensor([NAN, NAN]))
    assert nothing.advantage.tolist() == [0, 0] and not nothing.valid.any() and nothing.stats["advantage/batch_fallback_share"] == 0.5


def test_unknown_rewards_enter_no_buffer() -> None:
    tracker = PromptStatistics(buffer_size=4, min_count=1)
    got = tracker.advantage(["a", "a", "b"], torch.tensor([1.0, 3.0, NAN]))
    assert got.valid.tolist() == [True, True, False] and got.advantage.tolist() == [-1, 1, 0]
    assert tracker.state_dict() == {"buffers": [["a", [1.0, 3.0]]]}
    assert got.stats["advantage/unknown_share"] == pytest.approx(1 / 3)
    for odd in (0, 5):
        with pytest.raises(ValueError, match="min_count"):
            PromptStatistics(buffer_size=4, min_count=odd)
    with pytest.raises(ValueError, match="prompt ids"):
        tracker.advantage(["a"], torch.zeros(2))

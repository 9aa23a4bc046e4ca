"""The packing bench: its mix, what it says of each scheme counted by hand, padded rows that compute what packs compute; and the packs of that mix."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from align.config import load
from align.data import PackSampler
from base_model.errors import UserError
from base_model.networks.packing import first_fit_decreasing
from base_model.types import ClipShape
from recipes.bench import _packing_wan, packing
from recipes.bench.packing import Batch, Config, Networks, Work, account, draw_inputs, mixed_clips, num_tokens
from tests.recipes.test_bench import assert_flat

CLIPS = mixed_clips(4_000, 0)
TOKENS = num_tokens(CLIPS)


def wan(n: int) -> float:
    """FLOPs of Wan2.1-1.3B without text: 30 layers of 41.7M weights, and attention."""
    d = 1_536
    return 30.0 * (2 * n * (6 * d**2 + 2 * d * 8_960) + 4 * n * n * d)


def epoch_of(steps: packing.Plan, **settings: int) -> list[packing.Step]:
    return steps(CLIPS, Config(**settings))


# The mix


def test_the_mix_is_what_its_description_says() -> None:
    assert CLIPS == mixed_clips(4_000, 0) != mixed_clips(4_000, 1)
    assert sum(clip.frames == 1 for clip in CLIPS) / 4_000 == pytest.approx(0.15, abs=0.02)
    assert {clip.frames for clip in CLIPS} == {1, *range(17, 82, 4)} and all(clip.height % 16 == 0 == clip.width % 16 for clip in CLIPS)
    assert max(TOKENS) <= 32_760 and np.mean(TOKENS) == pytest.approx(8_800, rel=0.05)
    areas = Counter(min(packing.AREAS, key=lambda area, clip=clip: abs(area - clip.width * clip.height)) for clip in CLIPS)
    assert [areas[area] / 4_000 for area in packing.AREAS] == pytest.approx([0.3, 0.3, 0.4], abs=0.03)
    ratios = np.log([clip.width / clip.height for clip in CLIPS])
    assert abs(ratios.mean()) < 0.05 and np.abs(ratios).max() < math.log(16 / 9) + 0.1


def test_a_clip_is_cut_to_the_nearest_bucket_it_fills() -> None:
    assert packing.bucket_of(ClipShape(61, 480, 832)) == ClipShape(49, 464, 832)
    assert packing.bucket_of(ClipShape(81, 240, 272)) == ClipShape(81, 256, 256)
    assert packing.bucket_of(ClipShape(1, 272, 240)) == ClipShape(1, 256, 256)
    buckets = {packing.bucket_of(clip) for clip in CLIPS}
    assert 100 < len(buckets) <= 7 * 3 * 6 and all(packing.bucket_of(clip).frames <= clip.frames for clip in CLIPS)
    assert packing.grid_of(ClipShape(81, 480, 832)) == (21, 30, 52) and packing.shrunk((21, 30, 52)) == (11, 8, 13)


# Packs of the mix


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_packs_are_99_percent_full_at_131k_tokens_and_95_at_33k_and_lose_no_clip(seed: int) -> None:
    tokens = num_tokens(mixed_clips(4_000, seed))
    for capacity, wanted, window in ((131_072, 0.99, 2_000), (32_768, 0.95, 192)):
        for ranks in (1, 8):
            packs = PackSampler(tokens, capacity, seed=seed, window=window, ranks=ranks, costs=[wan(n) for n in tokens])
            seen: Counter[int] = Counter()
            room = total = i = 0
            while len(seen) < 4_000:
                step = packs.step(i)
                sizes = [sum(tokens[clip] for clip in pack) for pack in step]
                assert max(sizes) <= capacity
                seen.update(clip for pack in step for clip in pack)
                room, total, i = room + capacity * len(step), total + sum(sizes), i + 1
            print(f"capacity {capacity}, ranks {ranks}: {total / room:.4f} full")
            assert total / room >= wanted


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_eight_ranks_are_99_percent_balanced_at_131k_tokens(seed: int) -> None:
    tokens = num_tokens(mixed_clips(4_000, seed))
    cost = np.array([wan(n) for n in tokens])
    packs = PackSampler(tokens, 131_072, seed=seed, window=2_000, ranks=8, costs=cost.tolist())
    work = np.array([[cost[pack].sum() for pack in packs.step(i)] for i in range(100)])
    plain = PackSampler(tokens, 131_072, seed=seed, window=2_000)
    equal_tokens = np.array([[cost[plain[8 * i + rank]].sum() for rank in range(8)] for i in range(100)])
    balance, before = (float((each.mean(1) / each.max(1)).mean()) for each in (work, equal_tokens))
    print(f"balance {balance:.4f}, worst step {(work.mean(1) / work.max(1)).min():.4f}, equal tokens {before:.4f}")
    assert balance >= 0.99 and before < 0.8


# The accounts


def test_an_account_is_what_one_counts_by_hand() -> None:
    clips = [ClipShape(1, 160, 160)] * 2 + [ClipShape(1, 160, 320)] * 2 + [ClipShape(1, 80, 160)]  # 100, 100, 200, 200, 50 tokens
    dense = [[Batch((0, 2), (100, 200), 400, padded=True), Batch((1, 3), (100, 200), 400, padded=True)], [Batch((4,), (50,), 50, padded=True)]]
    cost = {n: packing.WAN_FLOPS([n]) for n in (50, 100, 200)}
    assert account(dense, clips, Config(ranks=2)) == {
        "fill": 650 / 850,
        "flops_wasted": pytest.approx(1 - (cost[50] + 2 * cost[100] + 2 * cost[200]) / (cost[50] + 4 * cost[200])),
        "clips": 5,
        "clips_dropped": 0,
        "tokens_lost": 0,
        "rank_balance_flops": 1,
    }
    assert account(dense, clips, Config(ranks=3))["rank_balance_flops"] is None, "no step has work for every rank"
    packs = [[Batch((2, 3), (200, 200), 500, padded=False), Batch((0,), (100,), 500, padded=False)]]
    found = account(packs, clips, Config(ranks=2))
    assert found["fill"] == 0.5 and found["flops_wasted"] == 0 and found["clips_dropped"] == 2 and found["tokens_lost"] == pytest.approx(150 / 650)
    assert found["rank_balance_flops"] == pytest.approx((2 * cost[200] + cost[100]) / 2 / (2 * cost[200]))


def test_padding_wastes_what_the_longest_clip_of_a_batch_leaves() -> None:
    found = account(packing.pad_random(CLIPS, Config(), batch=4), CLIPS, Config())
    order = np.array(TOKENS)[np.random.default_rng(0).permutation(4_000)].reshape(-1, 4)
    assert found["fill"] == pytest.approx(order.sum() / (4 * order.max(1)).sum()) and found["clips_dropped"] == 0
    wasted = 1 - sum(map(wan, TOKENS)) / sum(4 * wan(n) for n in order.max(1).tolist())
    assert found["flops_wasted"] == pytest.approx(wasted, rel=0.02)


def test_buckets_lose_the_clips_that_do_not_fill_a_step() -> None:
    found = account(packing.bucketed(CLIPS, Config(), batch=4), CLIPS, Config())
    counts = Counter(packing.bucket_of(clip) for clip in CLIPS)
    assert found["clips_dropped"] == sum(number % 32 for number in counts.values()) > 500
    assert found["fill"] == 1 and found["flops_wasted"] == 0 and found["rank_balance_flops"] == pytest.approx(1)
    trained = sum(number // 32 * 32 * num_tokens([bucket])[0] for bucket, number in counts.items())
    assert found["tokens_lost"] == pytest.approx(1 - trained / sum(TOKENS))


def test_the_schemes_of_packs_are_those_of_the_sampler() -> None:
    for plan in (packing.equal_tokens, packing.equal_flops):
        steps = plan(CLIPS, Config(), capacity=32_768)
        assert {clip for step in steps for batch in step for clip in batch.clips} == set(range(4_000))
        assert all(len(step) == 8 for step in steps) and all(batch.lengths == tuple(TOKENS[c] for c in batch.clips) for step in steps for batch in step)
        assert account(steps, CLIPS, Config())["tokens_lost"] == pytest.approx(0)


# What is timed


def test_padded_rows_compute_what_a_pack_computes_in_outputs_and_gradients() -> None:
    networks = Networks(packing.NETWORK)
    for part in (networks.packed, networks.padded):
        torch.manual_seed(1)
        for parameter in part.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    grids = ((2, 3, 4), (1, 2, 2), (3, 3, 3))
    padded, packed = (draw_inputs(Work(grids, padded=is_padded), packing.NETWORK, torch.Generator().manual_seed(0)) for is_padded in (True, False))
    assert padded.keep is not None and packed.keep is None and len(padded.tokens) == 81 and len(packed.tokens) == 55
    assert torch.equal(padded.tokens[padded.keep], packed.tokens)
    assert (networks(padded)[padded.keep] - networks(packed)).abs().max() < 1e-4
    networks.train_on([padded])
    networks.train_on([packed])
    for a, b in zip(networks.padded.parameters(), networks.packed.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None and (a.grad - b.grad).abs().max() <= 1e-4 * (1 + b.grad.abs().max())


def test_rows_that_need_no_padding_go_without_a_mask() -> None:
    assert draw_inputs(Work(((1, 2, 2),) * 3, padded=True), packing.NETWORK, torch.Generator()).keep is None


def test_every_scheme_is_timed_on_the_same_clips() -> None:
    clips = mixed_clips(20, 1)
    grids = Counter(packing.shrunk(packing.grid_of(clip)) for clip in clips)
    for scheme in packing.schemes(8):
        works = scheme.work(clips)
        done = Counter(grid for work in works for grid in work.grids)
        if scheme.name.startswith("buckets"):
            assert abs(done.total() - 20) < 8 and set(done) <= {packing.shrunk(packing.grid_of(packing.bucket_of(clip))) for clip in clips}
            assert all(len(set(work.grids)) == 1 for work in works)
        else:
            assert done == grids
    lengths = [math.prod(packing.shrunk(packing.grid_of(clip))) for clip in clips]
    assert len(packing.pack_work(clips, capacity=32_768, balanced=False)) == len(first_fit_decreasing(lengths, 1_024))


def test_the_bench_gives_one_flat_row_a_scheme(tmp_path: Path) -> None:
    words = ["--quick", "--clips", "400", "--timed-clips", "3", "--repeats", "1", "--write", "--results", str(tmp_path), "--date", "2026-11"]
    rows = packing.main(load(Config, None, words))["rows"]
    assert isinstance(rows, list)
    assert_flat(rows)
    named = {"scheme", "fill", "flops_wasted", "clips_dropped", "rank_balance_flops", "seconds_per_useful_token"}
    assert named <= set(rows[0]) and len(rows) == 11 and len({row["scheme"] for row in rows}) == 11
    assert [row["scheme"] for row in rows if row["times_slower_than_packs"] is None] == [packing.REFERENCE]
    assert all(row["seconds_per_useful_token"] > 0 for row in rows)
    assert "| packs of equal FLOPs, 131k |" in (tmp_path / "2026-11_2-core-cpu_packing.md").read_text()


def test_too_few_clips_for_the_ranks_are_the_users_error() -> None:
    with pytest.raises(UserError, match="20 are too few to measure 8 ranks"):
        packing.main(load(Config, None, ["--clips", "20"]))


# Wan's own network


def test_all_ways_through_wan_train_on_the_same_velocities() -> None:
    model = _packing_wan.wan_model()
    entrants = _packing_wan.arms(model)

    def gradient(arm: _packing_wan.Arm, clips: _packing_wan.Clips) -> torch.Tensor:
        model.network.zero_grad()
        _packing_wan.train(arm.passes, [clips])
        return torch.cat([parameter.grad.flatten() for parameter in model.network.parameters()])

    mixed, equal = (_packing_wan.draw_clips(grids, torch.Generator().manual_seed(0)) for grids in (((2, 3, 4), (1, 2, 5), (3, 3, 3)), ((2, 3, 2),) * 3))
    for clips in (mixed, equal):
        alone, padded, packed = (gradient(arm, clips) for arm in entrants)
        assert (packed - alone).norm() < 1e-5 * alone.norm()
        assert ((padded - alone).norm() < 1e-5 * alone.norm()) == (clips is equal), "what is padded looks at its padding"
    assert [arm.computed(mixed) for arm in entrants] == [61, 3 * 3 * 3 * 5, 61] and [arm.computed(equal) for arm in entrants] == [36] * 3


def test_the_bench_of_wan_gives_one_flat_row_a_way(tmp_path: Path) -> None:
    words = ["--wan", "--quick", "--timed-clips", "3", "--repeats", "1", "--write", "--results", str(tmp_path), "--date", "2026-11"]
    rows = packing.main(load(Config, None, words))["rows"]
    assert isinstance(rows, list)
    assert_flat(rows)
    assert [row["scheme"] for row in rows] == ["one by one", "padded to the largest", "packed"] and {row["clips"] for row in rows} == {3}
    assert [row["useful_share"] == 1 for row in rows] == [True, False, True] and rows[2]["times_slower_than_packs"] is None
    assert all(row["useful_tokens_per_second"] > 0 < row["seconds_per_step"] for row in rows)
    (file,) = tmp_path.iterdir()
    assert file.name == "2026-11_2-core-cpu_packing-wan.md" and "--wan" in file.read_text()

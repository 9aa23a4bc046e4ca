"""Which clips share a step: one rank as ever, several ranks with equal work, each clip once an epoch, and the same again after a resume."""

from __future__ import annotations

import numpy as np
import pytest

from align.data import PackSampler
from base_model.networks.packing import first_fit_decreasing

CAPACITY, RANKS = 4_000, 8


def mixed_lengths(number: int, seed: int = 0) -> list[int]:
    rng = np.random.default_rng(seed)
    return np.exp(rng.uniform(np.log(20), np.log(1_000), number)).astype(int).tolist()


def quadratic(lengths: list[int]) -> list[float]:
    """Attention that costs as much as all else at 400 tokens."""
    return [n + n * n / 400 for n in lengths]


def sampler(number: int, *, rank: int = 0, ranks: int = RANKS, window: int = 1_000, seed: int = 3, capacity: int = CAPACITY) -> PackSampler:
    lengths = mixed_lengths(number)
    return PackSampler(lengths, capacity, seed=seed, window=window, ranks=ranks, rank=rank, costs=quadratic(lengths))


def steps_of(packs: PackSampler, epochs: int) -> list[list[list[int]]]:
    """Steps until every clip has been seen `epochs` times."""
    seen, steps = np.zeros(len(packs.lengths), dtype=int), []
    while seen.min() < epochs:
        steps.append(packs.step(len(steps)))
        np.add.at(seen, [clip for pack in steps[-1] for clip in pack], 1)
    return steps


def test_one_rank_sees_the_packs_that_shipped_weights_were_trained_on() -> None:
    """The loop as it was when there was no other rank, copied."""
    lengths, seed, window = mixed_lengths(500), 7, 192
    want: list[list[int]] = []
    for epoch in range(2):
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(lengths)).tolist()
        packs = []
        for begin in range(0, len(order), window):
            clips = order[begin : begin + window]
            packs += [[clips[j] for j in pack] for pack in first_fit_decreasing([lengths[c] for c in clips], CAPACITY)]
        want += [packs[j] for j in rng.permutation(len(packs))]
    got = PackSampler(lengths, CAPACITY, seed=seed)
    assert [got[i] for i in range(len(want))] == want
    with_costs = PackSampler(lengths, CAPACITY, seed=seed, costs=quadratic(lengths))
    assert [with_costs[i] for i in range(len(want))] == want, "costs matter to several ranks only"


def test_all_ranks_together_see_each_clip_once_an_epoch_where_packs_divide_by_ranks() -> None:
    lengths = [500] * 640  # 80 packs of 8
    packs = PackSampler(lengths, CAPACITY, seed=0, window=320, ranks=RANKS, costs=quadratic(lengths))
    for epoch in range(3):
        steps = [packs.step(10 * epoch + k) for k in range(10)]
        assert sorted(clip for step in steps for pack in step for clip in pack) == list(range(640))


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_no_clip_is_ever_more_than_one_visit_ahead_whatever_the_remainder(ranks: int) -> None:
    packs = sampler(997, ranks=ranks, window=300)
    seen = np.zeros(997, dtype=int)
    straddling = 0
    for i in range(len(steps_of(packs, 4))):
        step = packs.step(i)
        assert len(step) == ranks and all(step), "every rank has something to do"
        before = seen.copy()
        np.add.at(seen, [clip for pack in step for clip in pack], 1)
        assert seen.max() - seen.min() <= 1
        straddling += before.min() < before.max() < seen.max()
    assert straddling, "the packs of every epoch divide by ranks: nothing was tested"


def test_ranks_share_a_step_and_read_it_from_their_own_samplers() -> None:
    whole, ranks = sampler(1_500), [sampler(1_500, rank=rank) for rank in range(RANKS)]
    for i in range(40):
        assert [rank[i] for rank in ranks] == whole.step(i)


def test_iteration_i_is_the_same_after_a_resume_in_the_middle_of_an_epoch() -> None:
    straight = sampler(1_500, rank=5)
    all_of_them = [straight[i] for i in range(60)]
    for begin in (7, 33, 59):
        resumed = sampler(1_500, rank=5)
        assert [resumed[i] for i in range(begin, 60)] == all_of_them[begin:]
    assert [sampler(1_500, rank=5, seed=4)[i] for i in range(60)] != all_of_them


@pytest.mark.parametrize("capacity", [4_000, 1_000])
def test_ranks_get_equal_work_in_packs_that_are_full(capacity: int) -> None:
    """Also where one clip may fill a pack: then packs cannot cost the same, but those of a step can."""
    lengths = mixed_lengths(4_000)
    costs, packs = np.array(quadratic(lengths)), sampler(4_000, capacity=capacity)
    steps = steps_of(packs, 1)
    work = np.array([[costs[pack].sum() for pack in step] for step in steps])
    tokens = np.array([[sum(lengths[clip] for clip in pack) for pack in step] for step in steps])
    assert tokens.max() <= capacity
    plain = PackSampler(lengths, capacity, seed=3, window=1_000)
    unbalanced = np.array([[costs[plain[i * RANKS + rank]].sum() for rank in range(RANKS)] for i in range(len(steps))])
    balance, before = (float((each.mean(1) / each.max(1)).mean()) for each in (work, unbalanced))
    print("balance", balance, "of equal tokens", before, "fill", tokens.mean() / capacity)
    assert balance > 0.995 and before < 0.8 and tokens.mean() / capacity > 0.98


def test_steps_are_shuffled_anew_each_epoch_and_do_not_go_by_cost() -> None:
    costs, packs = np.array(quadratic(mixed_lengths(4_000))), sampler(4_000, window=150)
    work = [sum(costs[pack].sum() for pack in step) for step in steps_of(packs, 2)]
    half = len(work) // 2
    for part in (work[:half], work[half:]):
        assert abs(np.corrcoef(part, np.arange(len(part)))[0, 1]) < 0.5
    members = [{frozenset(pack) for step in half for pack in step} for half in (steps_of(packs, 2)[:half], steps_of(packs, 2)[half:])]
    assert len(members[0] & members[1]) < 0.1 * len(members[0]), "clips meet others in the next epoch"


def test_what_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ValueError, match="no clips"):
        PackSampler([], CAPACITY, seed=0)
    with pytest.raises(ValueError, match="rank 2 is none of 2"):
        PackSampler([1], CAPACITY, seed=0, ranks=2, rank=2, costs=[1.0])
    with pytest.raises(ValueError, match="0 costs for 1 clips"):
        PackSampler([1], CAPACITY, seed=0, ranks=2)
    with pytest.raises(ValueError, match="1 buckets for 2 clips"):
        PackSampler([1, 1], CAPACITY, seed=0, buckets=["a"])


@pytest.mark.parametrize("number", [1, 2, 3])
def test_fewer_packs_than_ranks_make_a_step_over_several_epochs(number: int) -> None:
    packs = PackSampler([3_000] * number, CAPACITY, seed=0, ranks=RANKS, costs=[1.0] * number)
    seen = np.zeros(number, dtype=int)
    for i in range(20):
        step = packs.step(i)
        assert len(step) == RANKS and all(len(pack) == 1 for pack in step)
        np.add.at(seen, [clip for pack in step for clip in pack], 1)
        assert np.ptp(seen) <= 1


# Buckets


def in_buckets(number: int, ranks: int) -> tuple[PackSampler, list[int]]:
    """Five shapes, of which the last has one clip alone."""
    buckets = [4 if k == 0 else k * k % 4 for k in range(number)]
    lengths = [(100, 250, 600, 1_700, 5_000)[bucket] for bucket in buckets]
    return PackSampler(lengths, CAPACITY, seed=3, window=8, ranks=ranks, costs=quadratic(lengths), buckets=buckets), buckets


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_bucket_neither_drops_a_clip_nor_lets_one_wait(ranks: int) -> None:
    number = 203
    packs, buckets = in_buckets(number, ranks)
    seen = np.zeros(number, dtype=int)
    for i in range(400 // ranks):
        for pack in packs.step(i):
            assert len({buckets[clip] for clip in pack}) == 1, "of one shape"
            assert len(pack) == 1 or sum(packs.lengths[clip] for clip in pack) <= CAPACITY
            np.add.at(seen, pack, 1)
        assert np.ptp(seen) <= 2 if ranks > 1 else np.ptp(seen) <= 1
    assert seen.min() >= 4, "also the one clip of its shape"


def test_a_bucket_leaves_one_pack_an_epoch_that_is_not_full() -> None:
    packs, buckets = in_buckets(203, 1)
    epoch: list[list[int]] = []
    while sum(map(len, epoch)) < 203:
        epoch.append(packs[len(epoch)])
    for bucket in set(buckets):
        sizes = sorted(len(pack) for pack in epoch if buckets[pack[0]] == bucket)
        full = max(1, CAPACITY // packs.lengths[buckets.index(bucket)])
        assert sizes[1:] == [full] * (len(sizes) - 1) and sum(sizes) == buckets.count(bucket)

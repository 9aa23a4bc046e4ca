"""Clips that repeat each other are found among others, as the comparison of all pairs finds them."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from base_model.video.files import to_uint8
from base_model.video.hashes import BITS, NEAR_BITS, bits_apart, clip_hashes, clips_apart, look, moments, near_duplicates, unpacked
from tests.blobs import scene

Frames = NDArray[np.uint8]
Made = tuple[Tensor, float]


def hashes_of_clip(video: Tensor, fps: float) -> tuple[str, ...]:
    """As `measure` takes them: the frame nearest to each twelfth of a second."""
    frames = to_uint8(video)
    count = max(1, math.ceil(len(frames) / fps * 12 - 1e-6))
    return tuple(look(frames[min(len(frames) - 1, round(k / 12 * fps))])[0] for k in range(count))


def cropped(video: Tensor, share: float) -> Tensor:
    top, left = (round(share * side) for side in video.shape[-2:])
    return video[..., top : video.shape[-2] - top, left : video.shape[-1] - left]


CHANGES: dict[str, Callable[[Tensor], Made]] = {
    "nothing": lambda video: (video, 12.0),
    "noise": lambda video: ((video + 0.03 * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1), 12.0),
    "half the size": lambda video: (F.interpolate(video, scale_factor=0.5, mode="bilinear", antialias=True), 12.0),
    "brighter": lambda video: ((1.2 * video).clamp(0, 1), 12.0),
    "5 % cropped on each side": lambda video: (cropped(video, 0.05), 12.0),
    "3 % cropped on each side": lambda video: (cropped(video, 0.03), 12.0),
    "7 % cropped on each side": lambda video: (cropped(video, 0.07), 12.0),
    "3 % cropped on two sides and 7 % on the others": lambda video: (video[..., 2:-4, 5:-2], 12.0),
    "the other way round": lambda video: (video[..., 3:-2, 2:-5], 12.0),
    "half the speed": lambda video: (video, 6.0),
    "half the speed by repeating": lambda video: (video.repeat_interleave(2, 0), 12.0),
    "twice the speed": lambda video: (video, 24.0),
    "mirrored": lambda video: (video.flip(-1), 12.0),
    "second half": lambda video: (video[len(video) // 2 :], 12.0),
    "within another": lambda video: (torch.cat([scene(999, 12), video]), 12.0),
    "mirrored, cropped and faster": lambda video: (cropped(video.flip(-1), 0.03), 14.0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_copy_is_found_and_nothing_else(name: str) -> None:
    clips = [hashes_of_clip(scene(seed), 12.0) for seed in range(12)]
    copies = [hashes_of_clip(*CHANGES[name](scene(seed))) for seed in range(12)]
    found = near_duplicates(clips + copies)
    print(name, [round(bits, 1) for _, _, bits in found])
    assert [(row, earlier) for row, earlier, _ in found] == [(12 + seed, seed) for seed in range(12)]
    assert all(bits <= NEAR_BITS for _, _, bits in found) and (name != "nothing" or all(bits == 0 for _, _, bits in found))


def worn(rng: np.random.Generator, hashes: tuple[str, ...], share: float) -> tuple[str, ...]:
    bits = np.unpackbits(np.frombuffer(bytes.fromhex("".join(hashes)), np.uint8)).reshape(len(hashes), -1)
    return tuple(row.tobytes().hex() for row in np.packbits(bits ^ (rng.random(bits.shape) < share), axis=1))


def test_the_index_finds_what_comparing_all_pairs_finds() -> None:
    rng = np.random.default_rng(0)
    clips = [hashes_of_clip(scene(seed, 15), 12.0) for seed in range(20)]
    clips += [worn(rng, clips[seed % 20][seed % 4 :], 0.02 + 0.005 * (seed % 30)) for seed in range(40)]
    parsed = [moments(each) for each in clips]
    distance = {(late, early): clips_apart(parsed[early], parsed[late]) for early, late in itertools.combinations(range(60), 2)}
    expected = []
    for late in range(60):
        bits, early = min(((distance[late, early], early) for early in range(late)), default=(math.inf, -1))
        if bits <= NEAR_BITS:
            expected.append((late, early, bits))
    found = near_duplicates(clips)
    print(len(found), len(expected), max(bits for _, _, bits in found))
    assert len(expected) > 30
    missed = {late for late, _, _ in expected} - {late for late, _, _ in found}
    assert not {row for row, _, _ in found} - {late for late, _, _ in expected} and len(missed) <= 1
    nearest = {late: (early, bits) for late, early, bits in expected}
    assert sum(nearest[row] == (early, bits) for row, early, bits in found) >= len(found) - 2


def test_a_copy_is_found_where_every_moment_looks_otherwise_and_whatever_its_length() -> None:
    """As clips that move fast do: a question that falls between the moments that the index stores finds nothing."""
    for length in range(1, 40):
        rng = np.random.default_rng(length)
        clip = tuple(rng.bytes(96).hex() for _ in range(length))
        assert [(row, earlier) for row, earlier, _ in near_duplicates([clip, worn(rng, clip, 0.03)])] == [(1, 0)], length


def test_a_slower_copy_is_as_near_as_the_original_to_it_however_fast_it_moves() -> None:
    rng = np.random.default_rng(0)
    fast = tuple(rng.bytes(96).hex() for _ in range(15))
    slow = tuple(rng.bytes(96).hex() if k % 2 else fast[k // 2] for k in range(30))  # what is between two moments looks like neither
    assert clips_apart(moments(fast), moments(slow)) == clips_apart(moments(slow), moments(fast)) == 0
    assert near_duplicates([slow, fast]) == near_duplicates([fast, slow]) == [(1, 0, 0.0)]


def test_hashes_of_before_with_one_crop_are_compared_with_those_of_today() -> None:
    today = hashes_of_clip(scene(0), 12.0)
    assert {len(each) for each in today} == {192}
    before = tuple(each[:64] for each in hashes_of_clip(cropped(scene(0), 0.05), 12.0))
    assert near_duplicates([before, today, hashes_of_clip(scene(1), 12.0)])[0][:2] == (1, 0)


def test_the_first_of_the_same_clips_is_named_and_each_row_once() -> None:
    one, other = hashes_of_clip(scene(0), 12.0), hashes_of_clip(scene(1), 12.0)
    assert near_duplicates([one, other, one, one, other]) == [(2, 0, 0.0), (3, 0, 0.0), (4, 1, 0.0)]
    assert near_duplicates([]) == [] == near_duplicates([one])


def test_frames_without_structure_repeat_nothing() -> None:
    black = hashes_of_clip(torch.zeros(13, 3, 32, 32), 12.0)
    assert set(black) == {""}
    assert near_duplicates([black, black, ("",), ()]) == []
    late = (*black, *hashes_of_clip(scene(0), 12.0))
    assert [(row, earlier) for row, earlier, _ in near_duplicates([hashes_of_clip(scene(0), 12.0), late])] == [(1, 0)]


def test_a_mirrored_frame_has_the_mirrored_hash() -> None:
    video = scene(3, 4)
    one, other = moments(hashes_of_clip(video, 12.0)), moments(hashes_of_clip(video.flip(-1), 12.0))
    assert clips_apart(one, other) == 0 < int(np.bitwise_count(one.whole ^ other.whole).sum(1).min())


def test_whole_frames_hash_as_the_safety_filter_hashes_them() -> None:
    for fps in (8.0, 12.0, 30.0):
        video = torch.from_numpy(to_uint8(scene(0))).permute(0, 3, 1, 2) / 255
        whole = tuple(each[:16] for each in hashes_of_clip(video, fps))
        assert whole == clip_hashes(video, fps)
        assert bits_apart(unpacked(hashes_of_clip(video, fps)), unpacked(clip_hashes(video, fps))) == 0, "of both kinds"
    assert near_duplicates([clip_hashes(video, 12.0), hashes_of_clip(video, 12.0)])[0][:2] == (1, 0), "both kinds can be compared"


def test_text_that_is_no_hash_is_refused() -> None:
    for wrong in (("zz",), ("0" * 16, "0" * 64), ("0" * 15,), ("0" * 32,), ("0" * 128,)):
        with pytest.raises(ValueError):
            moments(wrong)


def test_long_clips_are_compared_at_all_their_moments_in_the_end() -> None:
    rng = np.random.default_rng(0)
    long = []
    word = rng.integers(0, 2, 4 * BITS)
    for _ in range(400):
        word = word ^ (rng.random(4 * BITS) < 0.02)
        long.append(np.packbits(word.astype(np.uint8)).tobytes().hex())
    part = worn(rng, tuple(long[101:353]), 0.05)
    ((row, earlier, bits),) = near_duplicates([tuple(long), part])
    assert (row, earlier) == (1, 0) and bits == pytest.approx(0.05 * BITS, abs=0.5)


def test_two_thousand_clips_are_searched_in_seconds() -> None:
    rng = np.random.default_rng(0)
    clips = [tuple(rng.bytes(32).hex() for _ in range(12)) for _ in range(1000)]
    clips += [worn(rng, clip, 0.05) for clip in clips]
    begun = time.perf_counter()
    found = near_duplicates(clips)
    print(time.perf_counter() - begun)
    assert [(row, earlier) for row, earlier, _ in found] == [(1000 + k, k) for k in range(1000)]
    assert time.perf_counter() - begun < 30

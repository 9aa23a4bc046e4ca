"""Perceptual hashes of a clip over time, and clips that are nearly the same by them.

    clip -> a frame every 1/12 s -> luma 32 x 32 -> signs of its 64 lowest frequencies -> one hash a frame

Two clips are as far apart as their hashes differ on average, in bits, at the best offset and speed at which half of the shorter one is covered.
Frames without structure have no hash. What hashes cannot see: the same thing in another picture.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from base_model.video.signals import averages

SAMPLES_A_SECOND = 12
SIDE = 32
BITS = 64
LUMA = (0.299, 0.587, 0.114)
FLAT_BELOW = 0.01  # standard deviation of luma
SPEEDS = tuple(2 ** (step / 12) for step in range(-12, 13))
CROP, ASIDE = 0.05, 0.013  # of each side; how far from the middle further crops lie
CROPS = ((0.0, 0.0), *((down * ASIDE, across * ASIDE) for down in (-1, 1) for across in (-1, 1)))
LOOKS = 1 + len(CROPS)  # of a frame: whole, then its crops
BITS_APART = 9.0  # mean distance of clips that are nearly the same, at most

NEAR_BITS = 9.0  # of 64, mean distance of clips of a data set that repeat each other, at most
SLACK = 6.0  # bits by which the moments that agree most may be nearer than the whole
BANDS = ((0, 13), (13, 13), (26, 13), (39, 13), (52, 12))  # of the index: first bit, bits
AT_ONCE = 1 << 21
SPACING = 3  # of SAMPLES_A_SECOND
LIKE_BITS, UNLIKE_BITS = 3, 6
MOST_MOMENTS = 48

Array = NDArray[np.float64]
Words = NDArray[np.uint64]
Places = NDArray[np.int64]


def clip_hashes(video: Tensor, fps: float) -> tuple[str, ...]:
    """[T,3,H,W] in [0,1] -> a hash for every sampled frame, hexadecimal, empty for frames without structure. Raises ValueError for pixels that are not finite."""
    if not bool(torch.isfinite(video).all()):
        raise ValueError("the clip holds nan or infinite pixels")
    count = max(1, math.ceil(len(video) / fps * SAMPLES_A_SECOND - 1e-6))
    at = (torch.arange(count) / SAMPLES_A_SECOND * fps).round().long().clamp(max=len(video) - 1)  # [S]
    luma = torch.einsum("tchw,c->thw", video[at].float(), torch.tensor(LUMA, device=video.device)).cpu()
    small = F.adaptive_avg_pool2d(luma[:, None], SIDE)[:, 0].double()  # [S,SIDE,SIDE]
    return tuple(each[: BITS // 4] for each in _hashes(small.numpy()))


def _hashes(luma: Array) -> tuple[str, ...]:
    """Luma of S small frames in [0,1], [S,SIDE,SIDE] -> S hashes of the 2 BITS lowest frequencies, the lowest first."""
    waves, (rows, columns) = _waves(), _lowest()
    bits = (waves @ luma @ waves.T)[:, rows, columns] > 0  # [S,2 BITS]
    flat = luma.reshape(len(luma), -1).std(1, ddof=1) < FLAT_BELOW
    return tuple("" if is_flat else np.packbits(row).tobytes().hex() for row, is_flat in zip(bits, flat.tolist(), strict=True))


def look(frame: NDArray[np.uint8]) -> tuple[str, Array]:
    """A small frame uint8 [H,W,3] -> (its hash and those of its CROPS, which lack CROP at each side, of twice as many bits, behind each other; empty where it has no structure;
    its luma in [0,1], [SIDE,SIDE])."""
    import cv2

    height, width = frame.shape[:2]
    luma = np.asarray(cv2.transform(frame.astype(np.float32), np.array([LUMA], np.float32) / 255), np.float32).reshape(height, width)
    parts = (luma[_inside(height, down), _inside(width, across)] for down, across in CROPS)
    looks = np.stack([averaged(each) for each in (luma, *parts)])
    hashes = _hashes(looks)
    return "".join(hashes) if all(hashes) else "", looks[0]


def _inside(length: int, aside: float) -> slice:
    """Of a side, what a crop leaves that lies so far beside the middle."""
    return slice(round((CROP + aside) * length), length - round((CROP - aside) * length))


def averaged(luma: NDArray[np.float32]) -> Array:
    """[H,W] -> [SIDE,SIDE]."""
    height, width = luma.shape
    return (averages(height, SIDE) @ luma @ averages(width, SIDE).T).astype(np.float64)


def unpacked(hashes: Sequence[str]) -> Array:
    """Hashes of whole frames, as `clip_hashes` and `look` give them -> [S,BITS] of 0 and 1, nan where there is no hash. Raises ValueError for text that is none."""
    rows = [np.unpackbits(np.frombuffer(bytes.fromhex(each), np.uint8)).astype(np.float64) if each else np.full(BITS, np.nan) for each in hashes]
    if any(len(row) not in (BITS, 4 * BITS, 2 * LOOKS * BITS) for row in rows) or not rows:
        raise ValueError("a hash has another length")
    return np.stack([row[:BITS] for row in rows])


def bits_apart(one: Array, other: Array) -> float:
    """Bits [S,BITS] and [U,BITS] of 0, 1 or nan -> the mean distance at the best offset and speed, infinite where too few frames have a hash.

    Where even the most similar frames, in any order, are 2 BITS_APART away, so are the clips: their distance is returned without a look at the order.
    """
    distance = one @ (1 - other).T + (1 - one) @ other.T  # [S,U]
    nearest = np.sort(np.where(np.isfinite(distance), distance, np.inf).min(1))
    bound = float(nearest[: math.ceil(_covered(len(one), len(other), max(SPEEDS)))].mean())
    return bound if bound >= 2 * BITS_APART else min((float(np.mean(path)) for path in _paths(distance)), default=math.inf)


def _covered(count: int, others: int, speed: float) -> float:
    """The least number of frames that must be compared: half of the shorter clip."""
    return max(1, min(count, others / speed) / 2)


def _paths(distance: Array) -> Iterator[Array]:
    """Distances along every line of constant speed that covers half of the shorter clip."""
    count, others = distance.shape
    for speed in SPEEDS:
        steps = speed * np.arange(count)
        for offset in range(-math.ceil(steps[-1]), others):
            at = np.rint(steps + offset).astype(np.int64)
            inside = (at >= 0) & (at < others)
            path = distance[np.flatnonzero(inside), at[inside]]
            path = path[np.isfinite(path)]
            if len(path) >= _covered(count, others, speed):
                yield path


@cache
def _waves() -> Array:
    """Cosines of the discrete cosine transform [frequencies,SIDE]."""
    return np.cos(np.pi * np.arange(16)[:, None] * (np.arange(SIDE) + 0.5) / SIDE)


@cache
def _lowest() -> tuple[Places, Places]:
    """The rows and columns of the 2 BITS lowest frequencies but 0."""
    k, l = np.meshgrid(np.arange(16), np.arange(16), indexing="ij")
    order = np.argsort((k**2 + l**2).ravel(), kind="stable")[1 : 2 * BITS + 1]
    return k.ravel()[order], l.ravel()[order]


# Clips that are nearly the same, among many


class Moments(NamedTuple):
    """The hashes of a clip as numbers, the lowest frequencies in the first word: of whole frames [S,words] and of crops of them [crops,S,words], and whether there is one [S]."""

    whole: Words
    crops: Words
    known: NDArray[np.bool_]


def moments(hashes: Sequence[str]) -> Moments:
    """Of `look`; of `clip_hashes`, which knows the lowest frequencies of whole frames alone; or of older lists, with one crop. Raises ValueError for text that is none."""
    known = np.array([bool(each) for each in hashes], bool)
    words = np.frombuffer(bytes.fromhex("".join(hashes)), ">u8").astype(np.uint64)
    each = len(words) // max(1, int(known.sum()))
    if each not in (0, 1, 4, 2 * LOOKS) or any(len(text) not in (0, 16 * each) for text in hashes):
        raise ValueError("a hash has another length")
    wide = 1 if each < 2 else 2
    looks = np.zeros((max(1, each // wide), len(hashes), wide), np.uint64)
    if each:
        looks[:, known] = words.reshape(-1, len(looks), wide).swapaxes(0, 1)
    return Moments(looks[0], looks[1:], known)


def clips_apart(one: Moments, other: Moments, limit: float = 2 * NEAR_BITS) -> float:
    """Bits of 64 by which two clips differ on average, at the best offset and speed: whole or a crop of one against the whole of the other, as it is or mirrored.

    Infinite where too few frames have a hash, or where even the most similar moments, in any order, are at least `limit` apart.
    """
    if len(one.known) > len(other.known):
        one, other = other, one  # the shorter is laid over the longer: what lies between two moments of a clip that moves fast looks like neither
    words = min(one.whole.shape[1], other.whole.shape[1])
    mine = np.stack([one.whole, *one.crops, *[one.whole] * len(other.crops)])[..., :words]  # [L,S,words]
    theirs = np.stack([other.whole, *[other.whole] * len(one.crops), *other.crops])[..., :words]  # [L,U,words]
    return _aligned(np.concatenate([mine, mine]), np.concatenate([theirs, theirs ^ _mirror()[:words]]), one.known, other.known, limit)


def near_duplicates(hashes: Sequence[tuple[str, ...]], *, apart: float = NEAR_BITS) -> list[tuple[int, int, float]]:
    """Hashes of N clips, in their order -> (row, the earlier row that it repeats most closely, bits apart) of every row that is at most `apart` bits from an earlier one.

    Candidates come from an index: moments of which some 13 bits are the same but for one. So a pair that is hardly alike at any moment may be missed; nothing is found
    that is not. Rows whose hashes are the very same are compared once. Frames without structure repeat nothing.
    """
    first: dict[tuple[str, ...], int] = {}
    same = [(row, first[each]) for row, each in enumerate(hashes) if any(each) and first.setdefault(each, row) != row]
    rows = sorted(first.values())
    clips = [moments(hashes[row]) for row in rows]
    found = [(row, earlier, 0.0) for row, earlier in same]
    for late, candidates in _candidates(clips, math.ceil(apart)):
        bits, nearest = min((clips_apart(clips[early], clips[late], apart + SLACK), early) for early in candidates)
        if bits <= apart:
            found.append((rows[late], rows[nearest], bits))
    return sorted(found)


def _candidates(clips: Sequence[Moments], radius: int) -> Iterator[tuple[int, list[int]]]:
    """(A clip, earlier clips of which some moment is within `radius` bits of one of its own, as far as the index finds them)."""
    keys = [_spaced(clip) for clip in clips]
    stored = _Entries.of([(clip, words) for clip, (at, each) in enumerate(zip(keys, clips, strict=True)) for words in (each.whole[at, 0], *each.crops[:1, at, 0])])
    asked = _Entries.of([(clip, words) for clip, each in enumerate(clips) for words in _questions(each)])
    pairs, more = np.zeros(0, np.int64), [np.zeros(0, np.int64)]
    for each in _matches(stored, asked, radius, len(clips)):
        more.append(each)
        if sum(map(len, more)) > AT_ONCE:
            pairs, more = np.union1d(pairs, np.concatenate(more)), []
    pairs = np.union1d(pairs, np.concatenate([np.zeros(0, np.int64), *more]))
    late, early = pairs // max(1, len(clips)), pairs % max(1, len(clips))
    starts = np.flatnonzero(np.diff(late, prepend=-1))
    for begin, end in itertools.pairwise([*starts.tolist(), len(pairs)]):
        yield int(late[begin]), early[begin:end].tolist()


class _Entries(NamedTuple):
    """Hashes and the clips that they are of, [E] each."""

    words: Words
    clip: NDArray[np.int64]

    @classmethod
    def of(cls, parts: Sequence[tuple[int, Words]]) -> _Entries:
        words = np.concatenate([np.zeros(0, np.uint64), *(words for _, words in parts)])
        return cls(words, np.repeat(np.array([clip for clip, _ in parts], np.int64), [len(words) for _, words in parts]))


def _matches(stored: _Entries, asked: _Entries, radius: int, count: int) -> Iterator[NDArray[np.int64]]:
    """Later clip * count + earlier clip of all pairs of moments within `radius` bits that agree in a band but for one bit at most."""
    for begin, width in BANDS:
        keys, wanted = (((words >> np.uint64(begin)) & np.uint64((1 << width) - 1)).astype(np.int64) for words in (stored.words, asked.words))
        order = np.argsort(keys, kind="stable")
        starts = np.searchsorted(keys[order], np.arange((1 << width) + 1))
        for flip in (0, *(1 << bit for bit in range(width))):
            low = starts[wanted ^ flip]
            yield from _compared(stored, asked, order, low, starts[(wanted ^ flip) + 1] - low, radius, count)


def _compared(stored: _Entries, asked: _Entries, order: Places, low: Places, sizes: Places, radius: int, count: int) -> Iterator[NDArray[np.int64]]:
    """Of each question, the `sizes` entries from `low` on in the order of the keys, a few million at a time."""
    ends = np.cumsum(sizes)
    cuts = np.searchsorted(ends, np.arange(0, int(ends[-1]) if ends.size else 0, AT_ONCE)).tolist()
    for begin, end in itertools.pairwise(dict.fromkeys([*cuts, len(sizes)])):
        part = sizes[begin:end]
        question = np.repeat(np.arange(begin, end), part)
        entry = order[np.arange(len(question)) + np.repeat(low[begin:end] - (np.cumsum(part) - part), part)]
        near = np.bitwise_count(stored.words[entry] ^ asked.words[question]) <= radius
        one, other = stored.clip[entry[near]], asked.clip[question[near]]
        apart = one != other
        yield np.unique(np.maximum(one, other)[apart] * count + np.minimum(one, other)[apart])


def _questions(clip: Moments) -> list[Words]:
    """Moments of which one at least lies within every half of the clip, and those behind them that look otherwise, as far as the next one that is stored: whole, mirrored, and the
    middle."""
    at = np.flatnonzero(clip.known)
    if not at.size:
        return []
    asked = {at[place] for quarter in (1, 2, 3) for place in _unlike(clip.whole[at, 0], min(quarter * len(at) // 4, max(0, len(at) - SPACING)))}
    places = np.array(sorted(asked), np.int64)
    return [clip.whole[places, 0], clip.whole[places, 0] ^ _mirror()[0], *clip.crops[:1, places, 0]]


def _unlike(words: Words, begin: int) -> list[int]:
    """`begin`, and of the SPACING - 1 places behind it those that are more than UNLIKE_BITS from all before."""
    kept = [begin]
    for place in range(begin + 1, min(begin + SPACING, len(words))):
        if all(int(words[place] ^ words[earlier]).bit_count() > UNLIKE_BITS for earlier in kept):
            kept.append(place)
    return kept


def _spaced(clip: Moments) -> Places:
    """Moments, at most one in SPACING, each unlike the last one."""
    kept: list[int] = []
    for at in np.flatnonzero(clip.known)[::SPACING].tolist():
        if not kept or int(clip.whole[at, 0] ^ clip.whole[kept[-1], 0]).bit_count() > LIKE_BITS:
            kept.append(at)
    return np.array(kept, np.int64)


def _aligned(one: Words, other: Words, one_known: NDArray[np.bool_], other_known: NDArray[np.bool_], limit: float) -> float:
    """`clips_apart` of L pairs of looks [L,S,words] and [L,U,words]. Long clips are first compared at a few of their moments, then at all of them around the best line."""
    stride = -(-max(one.shape[1], other.shape[1]) // MOST_MOMENTS)
    distance = _distances(one[:, ::stride], other[:, ::stride], one_known[::stride], other_known[::stride])  # [L,S,U]
    _, count, others = distance.shape
    lines = _lines(count, others)
    nearest = np.sort(np.where(np.isfinite(distance), distance, np.inf).min(2))  # [L,S]
    bounds = nearest[:, : math.ceil(_covered(count, others, max(SPEEDS)))].mean(1)  # no line is nearer
    best = math.inf
    for look in np.argsort(bounds).tolist():
        if bounds[look] >= min(limit, best):
            return best
        means = _means(distance[look], lines)
        line = int(means.argmin())
        best = min(best, float(means[line]) if stride == 1 or means[line] >= limit else _closely(one[look], other[look], one_known, other_known, lines, means, stride))
    return best


def _closely(one: Words, other: Words, one_known: NDArray[np.bool_], other_known: NDArray[np.bool_], lines: _Lines, means: NDArray[np.float32], stride: int) -> float:
    """The least mean of [S,words] and [U,words] at all their moments, around the best of lines through every `stride`-th."""
    best = int(means.argmin())
    speed, offset = int(lines.speed[best]), int(lines.offset[best])
    speeds = range(max(0, speed - 1), min(len(SPEEDS), speed + 2))
    around = _lines_of([(near, stride * offset + shift) for near in speeds for shift in range(-stride, stride + 1)], len(one), len(other))
    return float(_means(_distances(one[None], other[None], one_known, other_known)[0], around).min(initial=means[best]))


def _distances(one: Words, other: Words, one_known: NDArray[np.bool_], other_known: NDArray[np.bool_]) -> NDArray[np.float32]:
    """[L,S,words] and [L,U,words] -> bits of 64 apart [L,S,U], nan where one has no hash."""
    found = np.bitwise_count(one[:, :, None] ^ other[:, None]).mean(-1, dtype=np.float32)
    found[:, ~(one_known[:, None] & other_known[None])] = np.nan
    return found


class _Lines(NamedTuple):
    """Ways to lay S moments over U others: at which of these each stands, U where beyond [L,S]; how many must be compared, the speed (of SPEEDS) and the offset [L]."""

    at: Places
    needed: Array
    speed: Places
    offset: Places


@lru_cache(maxsize=64)
def _lines(count: int, others: int) -> _Lines:
    """All of them that cover half of the shorter clip."""
    pairs = [(k, offset) for k, speed in enumerate(SPEEDS) for offset in range(-math.ceil(speed * (count - 1)), others)]
    return _lines_of(pairs, count, others)


def _lines_of(pairs: Sequence[tuple[int, int]], count: int, others: int) -> _Lines:
    speed, offset = np.array(pairs, np.int64).reshape(-1, 2).T
    rates = np.array(SPEEDS)[speed]
    at = np.rint(rates[:, None] * np.arange(count) + offset[:, None]).astype(np.int64)  # [L,S]
    inside = (at >= 0) & (at < others)
    needed = np.maximum(1, np.minimum(count, others / rates) / 2)
    enough = inside.sum(1) >= needed
    return _Lines(np.where(inside, at, others)[enough], needed[enough], speed[enough], offset[enough])


def _means(distance: NDArray[np.float32], lines: _Lines) -> NDArray[np.float32]:
    """Mean distance along each line [L], infinite where too few are known."""
    padded = np.pad(distance, ((0, 0), (0, 1)), constant_values=np.nan)
    along = padded[np.arange(len(distance)), lines.at]  # [L,S]
    known = np.isfinite(along)
    number = known.sum(1)
    return np.where(number >= lines.needed, np.where(known, along, 0).sum(1) / np.maximum(number, 1), np.inf).astype(np.float32)


@cache
def _mirror() -> Words:
    """The bits that change where a frame is mirrored, in words: those of odd frequencies across."""
    across = _lowest()[1] % 2 == 1
    return np.frombuffer(np.packbits(across).tobytes(), ">u8").astype(np.uint64)

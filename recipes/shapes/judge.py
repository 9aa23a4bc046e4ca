"""What is really on screen, by classical image processing: no network, nothing learned, nothing shared with any model that is optimised.

`read` finds objects without knowing the prompt: background from the border, mattes by palette colour, blobs, tracks; shape from the mean of
moment-normalised mattes against templates; motion from the fitted track, relative to the background where the camera surely pans.
`judge` compares readings with prompts. `flashes` counts general and red flashes after WCAG 2.3.1.
Lengths are in units of the short side, y points down, and speeds are per clip.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from recipes.shapes.prompts import COLORS, SHAPES, ShapesPrompt, Thing

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

_PALETTE = np.array(list(COLORS.values()))  # [6,3]
_NAMES = tuple(COLORS)
_SIDEWAYS = np.zeros((3, 3, 3), bool)  # pixels touch within a frame, never across frames
_SIDEWAYS[1] = True
_GRID: Array = np.linspace(-3.0, 3.0, 31)  # positions in standard deviations of an object's matte

_LEAST_COVER = 0.4  # of a palette colour over the background, to be part of an object
_LEAST_CHROMA = 0.15
_LEAST_COSINE = 0.8  # between (pixel - background) and (palette colour - background)
_RIM_COVER = 0.64  # of a pixel of the picture's rim: the object may go on behind it. No more, since the autoencoder softens what touches the rim
_LEAST_AREA = 0.012  # of the short side squared
_LEAST_PRESENCE = 0.75  # share of frames that show an object
_LEAST_OVERLAP = 0.78  # soft intersection over union with a template
_LONG = 1.6  # of the longer spread to the shorter one: a bar or a pillar from here on
_COMPACT = 1.45  # neither, up to here
_MORPH_RATIO = 1.4  # of misfits: the named shape's to the best one's, in each third of a clip
_MORPH_MISFIT = 2.0  # what blur and noise may add to a misfit
_HIDDEN_WEIGHT = 0.2  # of frames in which something may hide a part
_STILL_RANGE = 0.11
_STRAIGHT_TRAVEL = 0.18
_SCALE_RATIO = 1.35
_SCALE_RANGE = 0.2  # farthest that the centre of something growing or shrinking wanders
_MOVING_SCALE_RATIO = 1.7  # something that moves may change its size by this much


class Reading(NamedTuple):
    """One object as it was seen."""

    color: str
    shape: str  # one of SHAPES, or "unclear"
    motion: str  # one of MOTIONS, or "unclear"; "still" in an image
    rgb: tuple[float, float, float]
    overlap: float  # soft intersection over union with the best template
    blobs: int  # separate blobs of this colour in a typical frame
    size: float  # median radius of the disc of the same area
    start: tuple[float, float]  # centre in the first frame, as parts of width and height
    speed: float  # length of the path; of a scale change, |log ratio|
    presence: float  # share of frames that show it


@dataclass(frozen=True)
class Judgement:
    """A clip against its prompt. The tuples have one entry for each thing the prompt names."""

    shape_right: tuple[bool, ...]
    colour_right: tuple[bool, ...]
    motion_right: tuple[bool, ...]  # true in an image, which cannot show motion
    all_right: bool  # every attribute of every thing, and nothing else on screen
    background: tuple[float, float, float]
    readings: tuple[Reading | None, ...]  # matched to the things, None where nothing was found
    extra: int  # readings that no thing of the prompt explains

    @property
    def free(self) -> tuple[float, ...]:
        """What the prompt leaves free: background red, green, blue; then size, start x, start y, speed of each thing (nan where unseen)."""
        unseen = (math.nan,) * 4
        return self.background + tuple(x for r in self.readings for x in ((r.size, *r.start, r.speed) if r else unseen))


class FlashCount(NamedTuple):
    """Flashes (pairs of opposing transitions over enough area) in a clip, and the most of one sort within one second."""

    general: int
    red: int
    per_second_max: int


def judge(video: Tensor, prompts: Sequence[ShapesPrompt]) -> list[Judgement]:
    """Compare clips [B,T,3,H,W] in [0,1] with their B prompts. Raises ValueError where the counts differ."""
    if len(video) != len(prompts):
        raise ValueError(f"{len(video)} clips for {len(prompts)} prompts")
    return [_judge_one(clip, prompt.things) for clip, prompt in zip(video, prompts, strict=True)]


def read(clip: Tensor) -> list[Reading]:
    """All objects of a clip [T,3,H,W] in [0,1], largest first."""
    return _look(clip)[0]


def in_frame(clip: Tensor) -> bool | None:
    """Whether every object of a clip [T,3,H,W] in [0,1] is wholly in the picture in all frames that show it; None where no object is found.

    An object that covers most of a pixel of the picture's rim may go on behind it; one whose edge lies in the middle of that pixel does not.
    """
    frames = _frames(clip)  # [T,H,W,3]
    mattes = [blob.matte[blob.seen] for _, blob in _segment(frames, min(frames.shape[1:3]))[0] if blob.seen.any()]  # [S,H,W] each
    if not mattes:
        return None
    return all(rim.max() < _RIM_COVER for matte in mattes for rim in (matte[:, 0], matte[:, -1], matte[:, :, 0], matte[:, :, -1]))


def confusion(pairs: Iterable[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """Counts of (asked, seen): table[asked][seen]."""
    table: dict[str, Counter[str]] = {}
    for asked, seen in pairs:
        table.setdefault(asked, Counter())[seen] += 1
    return {asked: dict(seen) for asked, seen in table.items()}


def confusions(prompts: Sequence[ShapesPrompt], judgements: Sequence[Judgement]) -> dict[str, dict[str, dict[str, int]]]:
    """The `confusion` table of each attribute ("shape", "color", "motion"); what was not found is seen as "nothing"."""
    seen = [(thing, reading) for prompt, judged in zip(prompts, judgements, strict=True) for thing, reading in zip(prompt.things, judged.readings, strict=True)]
    return {a: confusion((getattr(thing, a), getattr(reading, a) if reading else "nothing") for thing, reading in seen) for a in ("shape", "color", "motion")}


def flashes(video: Tensor, fps: float) -> FlashCount:
    """Count flashes in a clip [T,3,H,W] in [0,1] after WCAG 2.3.1, with the frame as the field of view.

    General: opposing changes of relative luminance of at least 0.1 whose darker state is below 0.8. Red: opposing changes of
    max(0, R - G - B) * 320 of more than 20 with a saturated red (R / (R + G + B) >= 0.8) in one state. Both over at least a quarter of the frame.
    """
    srgb = _frames(video)  # [T,H,W,3]
    rgb = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    luminance = 0.2126 * rgb[..., 0] + 0.7152 * rgb[..., 1] + 0.0722 * rgb[..., 2]  # [T,H,W]
    redness = np.maximum(0, rgb[..., 0] - rgb[..., 1] - rgb[..., 2]) * 320  # [T,H,W]
    saturated = rgb[..., 0] >= 0.8 * np.maximum(rgb.sum(-1), 1e-6)  # [T,H,W]
    general = _transitions(luminance, 0.1 - 1e-9, lambda a, b, s, r: np.minimum(a, b) < 0.8, saturated)
    red = _transitions(redness, 20 + 1e-9, lambda a, b, s, r: s | r, saturated)
    within = max(_most_within(times, fps) for times in (general, red))
    return FlashCount(len(general) // 2, len(red) // 2, within // 2)


def is_flashing(video: Tensor, fps: float) -> bool:
    """Whether a clip [T,3,H,W] shows more than three flashes of one sort within any one second."""
    return flashes(video, fps).per_second_max > 3


class _Blob(NamedTuple):
    """The matte of one colour through a clip, and what its moments say."""

    matte: Array  # [T,H,W] cover in [0,1]
    seen: Mask  # [T]
    contact: Array  # [T] pixels of the rim at which another object may hide a part
    centre: Array  # [T,2] x, y in pixels
    spread: Array  # [T,2] standard deviations in pixels
    area: Array  # [T] pixels
    blobs: int
    rgb: Array  # [3]


def _frames(video: Tensor) -> Array:
    """[T,3,H,W] -> [T,H,W,3] float64."""
    return video.detach().cpu().numpy().astype(np.float64).transpose(0, 2, 3, 1)


def _judge_one(clip: Tensor, things: tuple[Thing, ...]) -> Judgement:
    readings, background = _look(clip)
    matched = _match(things, readings)
    image = len(clip) == 1
    shape = tuple(r is not None and r.shape == t.shape for t, r in zip(things, matched, strict=True))
    colour = tuple(r is not None and r.color == t.color for t, r in zip(things, matched, strict=True))
    motion = tuple(r is not None and (image or r.motion == t.motion) for t, r in zip(things, matched, strict=True))
    whole = all(r is not None and r.blobs == 1 for r in matched)
    extra = len(readings) - sum(r is not None for r in matched)
    right = all(shape + colour + motion) and whole and extra == 0
    return Judgement(shape, colour, motion, right, background, matched, extra)


def _match(things: tuple[Thing, ...], readings: list[Reading]) -> tuple[Reading | None, ...]:
    """Things take the reading of their colour; things without one take what is left, largest first."""
    rest = list(readings)
    matched: list[Reading | None] = []
    for thing in things:
        found = next((r for r in rest if r.color == thing.color), None)
        if found is not None:
            rest.remove(found)
        matched.append(found)
    return tuple(rest.pop(0) if r is None and rest else r for r in matched)


def _look(clip: Tensor) -> tuple[list[Reading], tuple[float, float, float]]:
    frames = _frames(clip)
    t, height, width, _ = frames.shape
    side = min(height, width)
    blobs, background = _segment(frames, side)
    visible = [(name, blob) for name, blob in blobs if blob.seen.mean() >= _LEAST_PRESENCE]
    pan = _pan(frames, [blob for _, blob in visible], side) if t > 1 else np.zeros(2)
    readings = [_reading(name, blob, pan, height, width) for name, blob in visible]
    readings.sort(key=lambda r: -r.size)
    r, g, b = np.median(background, axis=0).tolist()
    return readings, (r, g, b)


def _reading(name: str, blob: _Blob, pan: Array, height: int, width: int) -> Reading:
    side = min(height, width)
    times = np.flatnonzero(blob.seen)
    u = times / max(len(blob.seen) - 1, 1)
    centre = blob.centre[times] / side  # [S,2]
    radius = np.sqrt(blob.area[times] / math.pi) / side  # [S]
    clear = blob.contact[times] == 0
    motion, speed = _motion(u, centre - u[:, None] * pan, radius, clear)
    shape, overlap = _shape(blob)
    start = blob.centre[times[0]] / (width, height)
    red, green, blue = blob.rgb.tolist()
    return Reading(
        _nearest_color(blob.rgb),
        shape,
        motion,
        (red, green, blue),
        overlap,
        blob.blobs,
        float(np.median(radius)),
        (float(start[0]), float(start[1])),
        speed,
        float(blob.seen.mean()),
    )


def _nearest_color(rgb: Array) -> str:
    """Nearest palette colour by chromaticity (the colour without its grey part)."""
    flat = rgb - rgb.mean()
    palette = _PALETTE - _PALETTE.mean(1, keepdims=True)
    cosine = palette @ flat / (np.linalg.norm(palette, axis=1) * max(float(np.linalg.norm(flat)), 1e-6))
    return _NAMES[int(cosine.argmax())]


def _segment(frames: Array, side: int) -> tuple[list[tuple[str, _Blob]], Array]:
    """Split a clip into one blob a colour. Returns them and the background [T,3]."""
    background = _border_color(frames, side)  # [T,3]
    label = _label(frames, background)  # [T,H,W]
    empty = label < 0
    if (empty.mean((1, 2)) > 0.2).all():
        border, background = background, np.stack([np.median(f[e], axis=0) for f, e in zip(frames, empty, strict=True)])
        if np.abs(background - border).max() > 0.03:
            label = _label(frames, background)
    least = _LEAST_AREA * side * side
    counts = np.stack([(label == k).sum((1, 2)) for k in range(len(_NAMES))])  # [6,T]
    present = [k for k in range(len(_NAMES)) if (counts[k] >= least).mean() >= _LEAST_PRESENCE / 2]
    masks = {k: mask for k in present if (mask := _drop_specks(label == k, least / 3)).any()}
    blobs = [(_NAMES[k], _blob(frames, background, masks, k, least)) for k in masks]
    return blobs, background


def _border_color(frames: Array, side: int) -> Array:
    ring = max(1, side // 16)
    edges = (frames[:, :ring], frames[:, -ring:], frames[:, :, :ring], frames[:, :, -ring:])
    return np.asarray(np.median(np.concatenate([e.reshape(len(frames), -1, 3) for e in edges], axis=1), axis=1))  # [T,3]


def _label(frames: Array, background: Array) -> NDArray[np.intp]:
    """For each pixel [T,H,W] the palette colour it is a mix of with the background, -1 for none."""
    difference = frames - background[:, None, None]  # [T,H,W,3]
    rays = _PALETTE[None] - background[:, None]  # [T,6,3]
    length = np.linalg.norm(rays, axis=-1)  # [T,6]
    unit = (rays / length[..., None]).transpose(0, 2, 1)  # [T,3,6]
    along = difference.reshape(len(frames), -1, 3) @ unit  # [T,HW,6]
    best = along.argmax(-1)[..., None]  # [T,HW,1]
    most = np.take_along_axis(along, best, -1)  # [T,HW,1]
    cover = most / np.take_along_axis(np.broadcast_to(length[:, None], along.shape), best, -1)  # [T,HW,1]
    norm = np.sqrt((difference**2).sum(-1)).reshape(most.shape)  # [T,HW,1]
    chroma = (frames.max(-1) - frames.min(-1)).reshape(most.shape)
    valid = (cover >= _LEAST_COVER) & (chroma >= _LEAST_CHROMA) & (most >= _LEAST_COSINE * np.maximum(norm, 1e-6))
    return np.where(valid, best, -1).reshape(frames.shape[:3])


def _drop_specks(mask: Mask, least: float) -> Mask:
    parts, count = ndimage.label(mask, _SIDEWAYS)
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    keep = sizes >= least
    keep[0] = False
    return keep[parts]


def _blob(frames: Array, background: Array, masks: dict[int, Mask], k: int, least: float) -> _Blob:
    own = masks[k]
    others = np.zeros_like(own)
    for j, mask in masks.items():
        if j != k:
            others |= mask
    near = ndimage.binary_dilation(others, _SIDEWAYS, iterations=1)
    count = _count_blobs(own, near, least)
    around = ndimage.binary_dilation(own, _SIDEWAYS, iterations=2) & ~others
    contact = (ndimage.binary_dilation(own, _SIDEWAYS, iterations=1) & near).sum((1, 2)).astype(float)  # [T]
    rgb = _core_color(frames, own)  # [3]
    rays = rgb - background  # [T,3]
    cover = np.einsum("thwc,tc->thw", frames - background[:, None, None], rays / np.maximum((rays**2).sum(-1, keepdims=True), 1e-6))
    matte = np.where(around, np.clip(cover, 0, 1), 0)  # [T,H,W]
    matte[matte < 0.1] = 0
    area = matte.sum((1, 2))  # [T]
    seen = np.asarray(own.sum((1, 2)) >= least)
    weight = matte / np.maximum(area, 1e-6)[:, None, None]
    y, x = (np.arange(n) + 0.5 for n in frames.shape[1:3])
    across, down = weight.sum(1), weight.sum(2)  # [T,W], [T,H]
    centre = np.stack([across @ x, down @ y], 1)  # [T,2]
    spread = np.sqrt(np.maximum(np.stack([across @ x**2, down @ y**2], 1) - centre**2, 0.01))  # [T,2]
    return _Blob(matte, seen, contact, centre, spread, area, count, rgb)


def _core_color(frames: Array, mask: Mask) -> Array:
    core = ndimage.binary_erosion(mask, _SIDEWAYS)
    return np.asarray(np.median(frames[core if core.sum() >= 8 else mask], axis=0))


def _count_blobs(own: Mask, near: Mask, least: float) -> int:
    """Separate blobs of a colour in a typical frame; parts that only another object separates are one blob."""
    parts, count = ndimage.label(own | near, _SIDEWAYS)
    mass = ndimage.sum_labels(own, parts, np.arange(1, count + 1))  # [P]
    frame = ndimage.maximum(np.arange(len(own))[:, None, None], parts, np.arange(1, count + 1)).astype(int) if count else np.zeros(0, int)
    counts = np.bincount(frame[np.asarray(mass) >= least], minlength=len(own))
    return int(np.quantile(counts, 0.7, method="lower"))


def _shape(blob: _Blob) -> tuple[str, float]:
    """Name and overlap of the template nearest to the mean matte in units of its own spread. Of the frames, those in which the least may be hidden.

    What is much wider than high is a bar, what is much higher than wide a pillar, whether its ends are square or round. "unclear" where no template fits,
    where width and height differ by an amount between, or where a third of the clip looks like another shape.
    """
    times = np.flatnonzero(blob.seen & (blob.contact <= np.quantile(blob.contact[blob.seen], 0.2)))
    mattes = _normalised(blob, times)  # [S,G,G]
    templates, names = _templates()
    mean = mattes.mean(0)  # [G,G]
    overlap = np.minimum(mean, templates).sum((1, 2)) / np.maximum(mean, templates).sum((1, 2))  # [M]
    best = int(_misfit(mean, templates).argmin())
    aspect = blob.spread[times, 1] / blob.spread[times, 0]  # [S]
    long = _long_shape(aspect)
    if overlap[best] < _LEAST_OVERLAP or (long is None and names[best] == "rectangle"):
        return "unclear", float(overlap[best])
    thirds = np.array_split(np.arange(len(times)), 3) if len(times) >= 6 else []
    if long is None:
        same = np.array([name == names[best] for name in names])
        misfits = [_misfit(mattes[part].mean(0), templates) for part in thirds]
        steady = all(misfit[same].min() <= _MORPH_RATIO * misfit.min() + _MORPH_MISFIT for misfit in misfits)
    else:
        steady = names[best] != "triangle"
    steady = steady and all(_long_shape(aspect[part]) == long for part in thirds)
    return (long or names[best]) if steady and long != "unclear" else "unclear", float(overlap[best])


def _long_shape(aspect: Array) -> str | None:
    """bar or pillar by the typical height over width [S], None for what is neither, "unclear" between."""
    typical = float(np.median(aspect))
    if typical <= 1 / _LONG or typical >= _LONG:
        return "bar" if typical < 1 else "pillar"
    return None if 1 / _COMPACT <= typical <= _COMPACT else "unclear"


def _misfit(matte: Array, templates: Array) -> Array:
    return np.asarray(((matte - templates) ** 2).sum((1, 2)))  # [M]


def _normalised(blob: _Blob, times: NDArray[np.intp]) -> Array:
    """The mattes of frames `times` [S] about their centres in units of their spreads, [S,G,G]."""
    spread, centre = blob.spread[times], blob.centre[times]  # [S,2]
    x = centre[:, :1] + spread[:, :1] * _GRID - 0.5  # [S,G]
    y = centre[:, 1:] + spread[:, 1:] * _GRID - 0.5  # [S,G]
    grid = (len(times), len(_GRID), len(_GRID))
    where: Array = np.stack([np.broadcast_to(a, grid) for a in (times[:, None, None], y[:, :, None], x[:, None])])
    return ndimage.map_coordinates(blob.matte, where, order=1, mode="constant")


@lru_cache(maxsize=1)
def _templates() -> tuple[Array, tuple[str, ...]]:
    """Each shape at several blurs on the grid of standard deviations, [M,G,G], and its name."""
    fine = np.linspace(-2.0, 2.0, 321)
    x, y = np.meshgrid(fine, fine)
    sharp: list[tuple[str, Mask]] = [("circle", x**2 + y**2 <= 1), ("rectangle", np.maximum(abs(x), abs(y)) <= 1), ("triangle", (y <= 1) & (2 * abs(x) - y <= 1))]
    rows, names = [], []
    for name, mask in sharp:
        for blur in (0.1, 0.18, 0.26, 0.36):
            soft = ndimage.gaussian_filter(mask.astype(float), blur * _deviation(mask.astype(float), fine)[0] / (fine[1] - fine[0]))
            (sx, sy), (cx, cy) = _deviation(soft, fine), _mean(soft, fine)
            at = np.stack([(np.broadcast_to(c, (len(_GRID),) * 2) - fine[0]) / (fine[1] - fine[0]) for c in ((cy + sy * _GRID)[:, None], cx + sx * _GRID)])
            rows.append(ndimage.map_coordinates(soft, at, order=1))
            names.append(name)
    assert {*names, "bar", "pillar"} == {*SHAPES, "rectangle"}  # a rectangle is one of the two long shapes, by its aspect
    return np.stack(rows), tuple(names)


def _mean(image: Array, axis: Array) -> tuple[float, float]:
    total = image.sum()
    return float(image.sum(0) @ axis / total), float(image.sum(1) @ axis / total)


def _deviation(image: Array, axis: Array) -> tuple[float, float]:
    total, (cx, cy) = image.sum(), _mean(image, axis)
    return math.sqrt(float(image.sum(0) @ (axis - cx) ** 2 / total)), math.sqrt(float(image.sum(1) @ (axis - cy) ** 2 / total))


def _motion(u: Array, centre: Array, radius: Array, clear: Mask) -> tuple[str, float]:
    """Name and speed of a track: times u [S], centres [S,2] and radii [S] in short sides. Frames that are not clear count little or nothing."""
    if len(u) < 3:
        return "still", 0.0
    weight = np.where(clear, 1.0, _HIDDEN_WEIGHT)
    line, residual = _line(u, np.column_stack([centre, np.log(radius)]), weight)
    travel, growth = line[:2], float(line[2])
    path = float(np.hypot(*np.diff(centre, axis=0).T).sum())
    wander = np.ptp(centre, axis=0)  # [2]
    enough = bool(clear.sum() >= max(3, 0.5 * len(u)))
    clear_wander = np.ptp(centre[clear], axis=0) if enough else wander
    straight = math.hypot(*travel)
    bend = math.hypot(*residual[:2])
    any_bend = math.hypot(*_line(u, centre, np.ones(len(u)))[1])
    if abs(growth) >= math.log(_SCALE_RATIO) and max(clear_wander) <= _SCALE_RANGE:
        return "grow" if growth > 0 else "shrink", abs(growth)
    if max(clear_wander) > _STILL_RANGE and _is_orbit(centre, weight):
        return "orbit", path
    if straight >= _STRAIGHT_TRAVEL and bend <= 0.25 * straight and any_bend <= 0.35 * straight and not _turns_back(centre, travel):
        steady = abs(growth) <= math.log(_MOVING_SCALE_RATIO) or not enough
        return _direction(travel) if steady else "unclear", path
    if max(wander) <= _STILL_RANGE or (max(clear_wander) <= _STILL_RANGE / 2 and max(wander) <= 2 * _STILL_RANGE):
        return "still", path
    if wander[1] >= 0.18 and wander[0] <= 0.35 * wander[1]:
        return "bounce", path
    return "unclear", path


def _line(u: Array, values: Array, weight: Array) -> tuple[Array, Array]:
    """Weighted straight-line fit. Returns change from u = 0 to 1 and root mean square residual, [D] each."""
    w = weight / weight.sum()
    du = u - w @ u
    mean = w @ values  # [D]
    slope = (w * du) @ (values - mean) / max(float((w * du) @ du), 1e-9)  # [D]
    residual = values - mean - du[:, None] * slope
    return slope, np.sqrt(w @ residual**2)


def _turns_back(centre: Array, travel: Array) -> bool:
    """Whether a track goes back by more than a third of its net travel."""
    along = centre @ travel / np.linalg.norm(travel)  # [S]
    return bool((np.maximum.accumulate(along) - along).max() > np.linalg.norm(travel) / 3)


def _least_squares(rows: Array, target: Array, weight: Array) -> Array:
    """Weighted least squares for P regressors: rows [P,S], target and weight [S] -> coefficients [P]. Faintly regularised, never singular."""
    normal = (rows[:, None] * rows[None] * weight).sum(-1)  # [P,P]
    ridge = (1e-9 * np.trace(normal) + 1e-12) * np.eye(len(rows))
    return np.asarray(np.linalg.solve(normal + ridge, (rows * target * weight).sum(-1)))


def _direction(travel: Array) -> str:
    """The named direction within 22.5 degrees, else "unclear"."""
    octant = round(math.atan2(-travel[1], travel[0]) / (math.pi / 4)) % 8
    return {0: "right", 1: "up_right", 2: "up", 4: "left", 5: "down_left", 6: "down"}.get(octant, "unclear")


def _is_orbit(centre: Array, weight: Array) -> bool:
    """Whether a track runs along a circle for at least 240 degrees in one sense (algebraic fit by Kasa, 1976)."""
    a, b, c = _least_squares(np.stack([*centre.T, np.ones(len(centre))]), (centre**2).sum(1), weight)
    middle = np.array([a / 2, b / 2])
    radius = math.sqrt(max(float(c + middle @ middle), 0))
    away = np.hypot(*(centre - middle).T)  # [S]
    angle = np.unwrap(np.arctan2(*(centre - middle).T[::-1]))
    sweep, total = abs(angle[-1] - angle[0]), float(np.abs(np.diff(angle)).sum())
    rough = math.sqrt(float(weight @ (away - radius) ** 2 / weight.sum()))
    return 0.08 <= radius <= 0.6 and rough <= 0.25 * radius and sweep >= math.radians(240) and sweep >= 0.75 * total


def _pan(frames: Array, blobs: list[_Blob], side: int) -> Array:
    """Displacement (x, y) of the background from u = 0 to 1 in short sides; zero unless a steady shift explains most of its change.

    Least squares on the temporal slope of the background, re-aligned a few times (Lucas and Kanade, 1981, for one global shift).
    """
    objects = np.zeros(frames.shape[:3], bool)
    for blob in blobs:
        objects |= blob.matte > 0
    valid = ~ndimage.binary_dilation(objects, _SIDEWAYS, iterations=2)  # [T,H,W]
    level = np.array([np.median(f[v]) if v.any() else 0.0 for f, v in zip(frames, valid, strict=True)])  # [T]
    grey = np.where(valid, frames.mean(-1) - level[:, None, None], 0)  # [T,H,W]
    grey = ndimage.gaussian_filter(grey, (0, 1, 1))
    valid = ndimage.binary_erosion(valid, _SIDEWAYS, border_value=1)
    pan = np.zeros(2)
    before = _temporal_variance(grey, valid)
    if before <= 0.02 * float(grey[valid].var()) + 1e-7:
        return pan
    u = np.linspace(-0.5, 0.5, len(frames))
    for _ in range(4):
        image, known = _aligned(grey, valid, pan, u)
        step = _global_shift(image, known, u)
        pan = np.clip(pan + step, -0.4 * side, 0.4 * side)
        if np.abs(step).max() < 0.05:
            break
    image, known = _aligned(grey, valid, pan, u)
    sure = _temporal_variance(image, known) <= 0.45 * before and np.hypot(*pan) >= 0.08 * side
    return pan / side if sure else np.zeros(2)


def _aligned(grey: Array, valid: Mask, pan: Array, u: Array) -> tuple[Array, Mask]:
    """Frames shifted back by pan * u [T]; pixels from outside the frame or behind objects are not valid."""
    t, y, x = np.meshgrid(*(np.arange(n, dtype=float) for n in grey.shape), indexing="ij")
    where = np.stack([t, y + pan[1] * u[:, None, None], x + pan[0] * u[:, None, None]])
    known = ndimage.map_coordinates(valid.astype(float), where, order=1, cval=0.0) > 0.99
    return ndimage.map_coordinates(grey, where, order=1), known


def _temporal_variance(grey: Array, valid: Mask) -> float:
    """Mean variance over time of the pixels that are valid in half of the frames or more."""
    count, mean = _over_time(grey, valid)
    often = count >= len(grey) / 2
    if not often.any():
        return math.inf
    variance = np.where(valid, (grey - mean) ** 2, 0).sum(0) / np.maximum(count, 1)  # [H,W]
    return float(variance[often].mean())


def _over_time(grey: Array, valid: Mask) -> tuple[Array, Array]:
    count = valid.sum(0).astype(float)  # [H,W]
    return count, np.where(valid, grey, 0).sum(0) / np.maximum(count, 1)


def _global_shift(grey: Array, valid: Mask, u: Array) -> Array:
    """The shift (x, y) per unit of u that best explains each pixel's slope over time."""
    count, mean = _over_time(grey, valid)
    time = u[:, None, None]
    middle = np.where(valid, time, 0).sum(0) / np.maximum(count, 1)  # [H,W]
    centred = np.where(valid, time - middle, 0)  # [T,H,W]
    power = np.asarray((centred**2).sum(0))  # [H,W]
    slope = np.asarray((centred * (grey - mean)).sum(0) / np.maximum(power, 1e-9))  # [H,W]
    gy, gx = (np.asarray(g) for g in np.gradient(mean))
    known = ndimage.binary_erosion(count >= len(grey) / 2, border_value=0)
    if known.sum() < 16:
        return np.zeros(2)
    return -_least_squares(np.stack([gx[known], gy[known]]), slope[known], power[known])


def _transitions(value: Array, least: float, counts: Callable[[Array, Array, Mask, Mask], Mask], saturated: Mask) -> list[int]:
    """Frames at which at least a quarter of the pixels make a transition opposite to the last one counted.

    Per pixel, a transition is a change of at least `least` away from the extreme since the pixel's last transition.
    """
    high, low = value[0].copy(), value[0].copy()
    high_red, low_red = saturated[0].copy(), saturated[0].copy()
    last = np.zeros(value[0].shape, int)  # direction of the pixel's last transition
    times: list[int] = []
    expected = 0
    for t in range(1, len(value)):
        v, red = value[t], saturated[t]
        up = (last <= 0) & (v - low >= least) & counts(low, v, low_red, red)
        down = (last >= 0) & (high - v >= least) & counts(high, v, high_red, red)
        last = np.where(up, 1, np.where(down, -1, last))
        reset_high, reset_low = up | (v > high), down | (v < low)
        high, high_red = np.where(reset_high, v, high), np.where(reset_high, red, high_red)
        low, low_red = np.where(reset_low, v, low), np.where(reset_low, red, low_red)
        shares = {1: float(up.mean()), -1: float(down.mean())}
        direction = expected or max(shares, key=lambda d: shares[d])
        if shares[direction] >= 0.25:
            times.append(t)
            expected = -direction
    return times


def _most_within(times: list[int], fps: float) -> int:
    """Most events in any span of one second, both ends included."""
    return max((sum(first <= t <= first + fps + 1e-6 for t in times) for first in times), default=0)

"""Small clips with planted defects, and what is true of each: of the shapes world, and of real textures where there are any.

Real ones show two windows into different real clips at once, each turned by quarters and at another size, along a soft random seam: textures, motion and noise are real,
and two of them are not the same picture. Clean ones among them look like defects: fast motion, a dark scene, a camera that does not move, a title card.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from align.progress import Progress
from base_model.errors import UserError
from base_model.types import ClipShape
from base_model.video.files import frame_rate, read_video, write_atomic
from recipes.bench._trained import kept
from recipes.shapes.prompts import sample_prompt
from recipes.shapes.render import render, sample_scene
from recipes.weights import file_hash

Frames = NDArray[np.uint8]  # [T,H,W,3]

UNREADABLE = ("truncated", "wrong_extension", "empty")
DUPLICATES = ("reencoded", "cropped", "slowed")
DEFECTS = ("cut", *DUPLICATES, "frozen", "black", "letterboxed", "flashing", *UNREADABLE)
CLEAN = ("plain", "fast", "dark", "static_camera", "title_card")
DEFECT_SHARE = 0.04  # of the clips, each
ALIKE_SHARE = 0.05  # of the clips, each kind that looks like a defect
REAL_SHARE = 0.4
STANDS = 0.4  # of a clip that is called frozen, whatever it shows then
SIZES = ((96, 128), (128, 96), (112, 160), (128, 128), (144, 256))
LONGEST = 48
"""Frames of the longest window into a real clip."""
RATES = (8.0, 12.0, 15.0, 24.0, 30.0)
FONTS = (0, 2, 3, 4)  # of OpenCV


class Clip(NamedTuple):
    """A file, and what is true of it."""

    name: str
    kind: str  # one of CLEAN or DEFECTS
    truths: tuple[str, ...]  # the defects that it has: a black clip is frozen too
    origin: str | None  # the file that it repeats
    cuts: tuple[int, ...]  # frames that begin a scene


class Made(NamedTuple):
    """Frames before they become a file."""

    frames: Frames
    fps: float
    cuts: tuple[int, ...] = ()
    truths: tuple[str, ...] = ()


class Source(NamedTuple):
    """What clips are made of: real clips [T,H,W,3], none where there are none."""

    real: tuple[Frames, ...]


def make_clips(folder: Path, number: int, *, seed: int, real: Path | None) -> list[Clip]:
    """Writes `number` clips into `folder` and what is true of them beside it, or reads that where it is there already. The same clips for the same numbers and textures.

    Raises UserError where the folder holds others."""
    textures = {file.name: file_hash(file) for file in _real_files(real)}
    settings = {"clips": number, "seed": seed, "real": textures}
    found = kept(folder.with_name(f"{folder.name}.json"), settings, lambda: {"clips": [clip._asdict() for clip in _draw_clips(folder, number, seed, real)]})
    return [Clip(row["name"], row["kind"], tuple(row["truths"]), row["origin"], tuple(row["cuts"])) for row in found["clips"]]


def _draw_clips(folder: Path, number: int, seed: int, real: Path | None) -> list[Clip]:
    folder.mkdir(parents=True, exist_ok=True)
    source = Source(_real_clips(real))
    kinds = _kinds(np.random.default_rng([seed, 0]), number)
    clips: list[Clip] = []
    plain: list[tuple[str, Made]] = []  # that copies are made of: the last few
    with Progress("making clips", total=number) as progress:
        for index, kind in enumerate(kinds):
            rng = np.random.default_rng([seed, 1, index])
            name = f"{index:05d}.mp4"
            if kind in DUPLICATES:
                origin, before = plain.pop(int(rng.integers(len(plain))))
                made, content = _copy(kind, before, rng)
                clips.append(Clip(name, kind, (kind,), origin, made.cuts))
            else:
                origin, made = None, _made(kind, source, rng)
                content = _broken(kind, made, rng) if kind in UNREADABLE else encode(made.frames, made.fps, crf=int(rng.integers(18, 27)))
                clips.append(Clip(name, kind, made.truths, origin, made.cuts))
            if kind == "plain":
                plain = [*plain, (name, made)][-32:]
            write_atomic(folder / name, content)
            progress.advance(kind)
    return clips


def _kinds(rng: np.random.Generator, number: int) -> list[str]:
    """Shares are exact; plain clips come first, so that there is something to copy."""
    each, alike = max(1, round(DEFECT_SHARE * number)), max(1, round(ALIKE_SHARE * number))
    others = [kind for kind in DEFECTS for _ in range(each)] + [kind for kind in CLEAN[1:] for _ in range(alike)]
    rest = number - len(others)
    first = min(rest, len(DUPLICATES) * each)
    mixed = [*others, *["plain"] * (rest - first)]
    return ["plain"] * first + [mixed[k] for k in rng.permutation(len(mixed)).tolist()]


def _made(kind: str, source: Source, rng: np.random.Generator) -> Made:
    """A clip that is no copy."""
    size, fps = SIZES[int(rng.integers(len(SIZES)))], float(rng.choice(RATES))
    makers: dict[str, Callable[[], Made]] = {
        "fast": lambda: Made(_fast(source, rng, size, fps), fps),
        "dark": lambda: Made(_dark(_scene(source, rng, size), rng), fps),
        "static_camera": lambda: Made(_static_camera(source, rng, size), fps),
        "title_card": lambda: Made(_title_card(rng, size, fps), fps),
        "cut": lambda: _cut(source, rng, size, fps),
        "frozen": lambda: _frozen(_scene(source, rng, size), rng, fps),
        "black": lambda: _black(_scene(source, rng, size), rng, fps),
        "letterboxed": lambda: Made(_letterboxed(_scene(source, rng, size), rng), fps, truths=("letterboxed",)),
        "flashing": lambda: _flashing(_scene(source, rng, size, most=LONGEST), rng, max(fps, 12.0)),
    }
    if kind in makers:
        return makers[kind]()
    return Made(_scene(source, rng, size), fps, truths=(kind,) if kind in UNREADABLE else ())


# Scenes


def _real_files(folder: Path | None) -> list[Path]:
    return sorted(folder.glob("*.mp4")) if folder else []


def _real_clips(folder: Path | None) -> tuple[Frames, ...]:
    """Raises UserError for a clip of which no window can be shown."""
    import cv2

    found = []
    for file in _real_files(folder):
        frames = read_video(file, shrink=lambda frame: np.asarray(cv2.resize(frame, (360, 240), interpolation=cv2.INTER_AREA), np.uint8)).frames
        if len(frames) < LONGEST:
            raise UserError(f"{file} has {len(frames)} frames, textures take up to {LONGEST}. Give --real a folder of longer clips")
        found.append(frames)
    return tuple(found)


def _scene(source: Source, rng: np.random.Generator, size: tuple[int, int], *, most: int = 36, frames: int | None = None) -> Frames:
    frames = frames or int(rng.integers(20, most + 1))
    return _blend(source.real, rng, size, frames) if len(source.real) > 1 and rng.random() < REAL_SHARE else _shapes(rng, size, frames)


def _shapes(rng: np.random.Generator, size: tuple[int, int], frames: int) -> Frames:
    """A curated clip of the shapes world in which something moves."""
    while True:
        prompt = sample_prompt(rng, two_objects=0.3)
        if any(thing.motion != "still" for thing in prompt.things):
            break
    shape = ClipShape(frames, *size)
    video = render(sample_scene(prompt, rng, clip=shape, pan=0.3), shape)  # [T,3,H,W]
    return np.ascontiguousarray((video * 255).round().byte().permute(0, 2, 3, 1).numpy())


def _blend(real: Sequence[Frames], rng: np.random.Generator, size: tuple[int, int], frames: int) -> Frames:
    import cv2

    height, width = size
    one, other = (_window(real[int(k)], rng, size, frames) for k in rng.choice(len(real), 2, replace=False))
    seam = cv2.resize(rng.random((4, 4), np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    share = 1 / (1 + np.exp(-25 * (seam - np.median(seam))))[..., None]  # [H,W,1]
    return np.asarray(one * share + other * (1 - share) + 0.5, np.uint8)


def _window(video: Frames, rng: np.random.Generator, size: tuple[int, int], frames: int) -> Frames:
    """Part of a real clip, turned by quarters and made `size`; its light is another too."""
    import cv2

    begin = int(rng.integers(len(video) - frames + 1))
    turned = np.rot90(video[begin : begin + frames], int(rng.integers(4)), (1, 2))
    share = rng.uniform(0.35, 0.9)
    height, width = (round(share * side) for side in turned.shape[1:3])
    top, left = int(rng.integers(turned.shape[1] - height + 1)), int(rng.integers(turned.shape[2] - width + 1))
    part = turned[:, top : top + height, left : left + width]
    gamma = rng.uniform(0.7, 1.4)
    table = np.asarray(255 * (np.arange(256) / 255) ** gamma + 0.5, np.uint8)
    return np.stack([table[cv2.resize(np.ascontiguousarray(frame), size[::-1], interpolation=cv2.INTER_AREA)] for frame in part])


# Clean ones that look like defects


def _fast(source: Source, rng: np.random.Generator, size: tuple[int, int], fps: float) -> Frames:
    """A camera that pans over a picture five times as wide, half a width to one and a half a second."""
    import cv2

    height, width = size
    parts = [_scene(source, rng, size, frames=1)[0] for _ in range(5)]
    blurred = cv2.blur(np.concatenate(parts, axis=1).astype(np.float32), (max(3, width // 12), 1))  # no seam is a cut
    wide = np.clip(blurred + cv2.resize(rng.normal(0, 18, (height // 4, width)).astype(np.float32), (5 * width, height))[..., None], 0, 255).astype(np.uint8)
    step = width * rng.uniform(0.5, 1.5) / fps
    frames = int(min(36, 4 * width / step))
    way = np.clip(np.rint(step * np.arange(frames)), 0, 4 * width).astype(int)
    return np.stack([wide[:, x : x + width] for x in (way if rng.random() < 0.5 else way[::-1])])


def _dark(frames: Frames, rng: np.random.Generator) -> Frames:
    """Night: a few lights reach a level of 60 to 90."""
    gain = rng.uniform(60, 90) / max(1.0, float(np.quantile(frames, 0.99)))
    return np.asarray(frames * min(1.0, gain), np.uint8)


def _static_camera(source: Source, rng: np.random.Generator, size: tuple[int, int]) -> Frames:
    """One picture in which only a small part moves, with a little noise of the sensor."""
    still = _scene(source, rng, size, frames=1)[0].astype(np.float32)
    frames, radius = int(rng.integers(20, 37)), rng.uniform(0.05, 0.09) * min(size)
    y, x = np.mgrid[0 : size[0], 0 : size[1]]
    start, speed = rng.uniform(0.25, 0.75, 2) * size, rng.uniform(0.3, 1.2, 2) * rng.choice((-1, 1), 2)
    colour = rng.uniform(0, 255, 3)
    made = []
    for t in range(frames):
        middle = start + speed * t
        cover = np.clip(radius - np.hypot(y - middle[0], x - middle[1]) + 0.5, 0, 1)[..., None]
        made.append(still + cover * (colour - still) + rng.normal(0, 1.0, (*size, 1)))
    return np.asarray(np.clip(np.stack(made), 0, 255) + 0.5, np.float32).clip(0, 255).astype(np.uint8)


def _title_card(rng: np.random.Generator, size: tuple[int, int], fps: float) -> Frames:
    """One to four lines that rise slowly over an even ground."""
    import cv2

    height, width = size
    ground, ink = (rng.uniform(0, 40, 3), rng.uniform(190, 255, 3)) if rng.random() < 0.7 else (rng.uniform(200, 255, 3), rng.uniform(0, 60, 3))
    lines = ["".join(rng.choice(list("ABCDEFGHKLMNOPRSTUVW"), int(rng.integers(4, 9)))) for _ in range(int(rng.integers(1, 5)))]
    font, scale, thick = int(rng.choice(FONTS)), 2 * width / 200 * rng.uniform(0.7, 1.1), max(2, width // 40)
    begins, top, frames = rng.uniform(0.05, 0.4, len(lines)), rng.uniform(0.25, 0.35), int(rng.integers(20, 37))
    page = np.full((2 * height, 2 * width, 3), ground, np.float64).astype(np.uint8)
    for k, (line, begin) in enumerate(zip(lines, begins, strict=True)):
        cv2.putText(page, line, (round(2 * width * begin), round(2 * height * (top + 0.18 * k))), font, scale, ink.tolist(), thick, cv2.LINE_AA)
    rise = min(2 * rng.uniform(6, 12) / fps, 0.2 * height / frames)  # pixels of the page a frame
    moved = [cv2.warpAffine(page, np.array([[1, 0, 0], [0, 1, -rise * t]]), (2 * width, 2 * height), borderMode=cv2.BORDER_REPLICATE) for t in range(frames)]
    return np.stack([np.asarray(cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA), np.uint8) for frame in moved])


# Defects


def _cut(source: Source, rng: np.random.Generator, size: tuple[int, int], fps: float) -> Made:
    one, other = _scene(source, rng, size), _scene(source, rng, size)
    at = int(rng.integers(6, len(one) - 5))
    return Made(np.concatenate([one[:at], other[: max(6, len(one) - at)]]), fps, (at,), ("cut",))


def _frozen(frames: Frames, rng: np.random.Generator, fps: float) -> Made:
    """All of it stands still, or its last two thirds and more, for a second at least."""
    while len(frames) < 1.5 * fps:
        frames = np.concatenate([frames, frames[::-1]])
    moving = 0 if rng.random() < 0.5 else int(len(frames) * rng.uniform(0.1, 0.33))
    still = np.repeat(frames[moving : moving + 1], len(frames) - moving, axis=0)
    return Made(np.concatenate([frames[:moving], still]), fps, truths=("frozen",))


def _black(frames: Frames, rng: np.random.Generator, fps: float) -> Made:
    """All of it is black, or a third to a half of it at its end."""
    level = int(rng.integers(0, 12))
    if rng.random() < 0.5:
        return Made(np.full_like(frames, level), fps, truths=("black", "frozen"))
    at = int(len(frames) * rng.uniform(0.5, 0.65))
    made = frames.copy()
    made[at:] = level
    stands = len(frames) - at > STANDS * len(frames)
    return Made(made, fps, (at,), ("black", "cut", *(("frozen",) if stands else ())))


def _letterboxed(frames: Frames, rng: np.random.Generator) -> Frames:
    """Bars above and below, or beside, of 6 to 18 % of the side each."""
    made, side = frames.copy(), int(rng.integers(2))
    bar = max(3, round(rng.uniform(0.06, 0.18) * frames.shape[1 + side]))
    inside = _fitted(frames, side, bar)
    made[:] = int(rng.integers(0, 20))
    place = (slice(None), slice(bar, -bar)) if side == 0 else (slice(None), slice(None), slice(bar, -bar))
    made[place] = inside
    return made


def _fitted(frames: Frames, side: int, bar: int) -> Frames:
    import cv2

    height, width = frames.shape[1:3]
    size = (width, height - 2 * bar) if side == 0 else (width - 2 * bar, height)
    return np.stack([np.asarray(cv2.resize(frame, size, interpolation=cv2.INTER_AREA), np.uint8) for frame in frames])


def _flashing(frames: Frames, rng: np.random.Generator, fps: float) -> Made:
    """Four to five flashes a second or more, as fast as the rate allows, of all the frame or of half of it, for a second at least."""
    period = max(2, round(fps / rng.uniform(4.5, 7.0)))
    while len(frames) < 1.2 * fps:
        frames = np.concatenate([frames, frames[::-1]])
    lit = np.arange(len(frames)) % period < period / 2
    rows = slice(0, frames.shape[1] if rng.random() < 0.6 else frames.shape[1] // 2)
    made = frames.astype(np.float32)
    lamp = rng.uniform(200, 255, 3) if rng.random() < 0.7 else np.array([250.0, 10.0, 10.0])
    made[lit, rows] += 0.85 * (lamp - made[lit, rows])
    return Made(made.clip(0, 255).astype(np.uint8), fps, truths=("flashing",))


def _copy(kind: str, before: Made, rng: np.random.Generator) -> tuple[Made, bytes]:
    """A clip again: encoded badly and at another size, cropped by a tenth, or at half to twice its speed."""
    frames, fps = before.frames, before.fps
    if kind == "reencoded":
        scale = rng.uniform(0.7, 1.3)
        made = Made(_resized(frames, scale), fps)
        return made, encode(made.frames, fps, crf=int(rng.integers(28, 36)), codec=str(rng.choice(["libx264", "libx265", "libvpx-vp9"])))
    if kind == "cropped":
        shares = np.clip(0.05 + rng.uniform(-0.02, 0.02, 4), 0, 1)
        shares[1::2] = 0.1 - shares[::2]
        top, bottom, left, right = (round(share * side) for share, side in zip(shares, (*[frames.shape[1]] * 2, *[frames.shape[2]] * 2), strict=True))
        made = Made(np.ascontiguousarray(frames[:, top : frames.shape[1] - bottom, left : frames.shape[2] - right]), fps)
        return made, encode(made.frames, fps, crf=int(rng.integers(20, 30)))
    made = Made(frames.repeat(2, axis=0), fps) if rng.random() < 0.3 else Made(frames, fps * float(rng.choice([0.5, 0.67, 0.8, 1.25, 1.5, 2.0])))
    return made, encode(made.frames, made.fps, crf=int(rng.integers(20, 30)))


def _resized(frames: Frames, scale: float) -> Frames:
    import cv2

    size = tuple(2 * round(scale * side / 2) for side in frames.shape[2:0:-1])
    return np.stack([np.asarray(cv2.resize(frame, size, interpolation=cv2.INTER_AREA), np.uint8) for frame in frames])


def _broken(kind: str, made: Made, rng: np.random.Generator) -> bytes:
    """A file that is no clip, or no longer one."""
    if kind == "empty":
        return b""
    if kind == "truncated":
        whole = encode(made.frames, made.fps, crf=22, faststart=bool(rng.random() < 0.7))
        return whole[: int(len(whole) * rng.uniform(0.3, 0.9))]
    import cv2

    pictures = [".png", ".jpg"]
    others = [b"PK\x03\x04" + rng.bytes(4000), b"<!doctype html><title>404</title>" * 20, b"a red circle moves left\n" * 40, rng.bytes(5000)]
    which = int(rng.integers(len(pictures) + len(others)))
    return cv2.imencode(pictures[which], made.frames[0])[1].tobytes() if which < len(pictures) else others[which - len(pictures)]


def encode(frames: Frames, fps: float, *, crf: int, codec: str = "libx264", faststart: bool = True) -> bytes:
    """An mp4 of frames [T,H,W,3]; an odd side loses a row or a column."""
    import av

    frames = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]
    out = io.BytesIO()
    index = {"moov_size": str(8192 + 64 * len(frames))} if faststart else {}  # in front of the frames, or behind them
    options = {"crf": str(crf), **({"preset": "superfast"} if codec != "libvpx-vp9" else {"deadline": "realtime", "cpu-used": "8", "b": "0"})}
    if codec == "libx265":
        options["x265-params"] = "log-level=none:pools=1"
    with av.open(out, "w", format="mp4", container_options=index) as container:
        stream = container.add_stream(codec, rate=frame_rate(fps), options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.codec_context.thread_count = 1
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()

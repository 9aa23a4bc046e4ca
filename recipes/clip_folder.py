"""A user's folder of captioned clips: which there are, how each is cut into examples for a model, and their frames. One bad clip stops nothing: it is left out, with the reason.

What counts is what was decoded, not what a file says of itself. Frames are read one after another and made small at once, so clips may be long and large (`STREAMED`).

Letters: T frames, H W height/width of a frame, h w those of an example.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from align.config import Config, Count, Positive
from base_model.errors import UserError
from base_model.families.cogvideox import CogVideoXVideoModel
from base_model.families.hunyuan_video import HunyuanVideoModel
from base_model.families.ltx import LTXVideoModel
from base_model.families.mochi import MochiVideoModel
from base_model.families.wan import WanVideoModel
from base_model.tiny import LatentVideoModel
from base_model.types import TrainableModel
from base_model.video.files import KEPT_BYTES, Frame, each_frame, read_image

VIDEOS = frozenset((".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".mpg", ".mpeg", ".ts", ".flv", ".ogv", ".wmv"))
IMAGES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp"))
TABLE = "metadata.jsonl"


# How clips become examples


class Windows(Config):
    """How clips are cut into examples. What is not given is as the model was trained."""

    frames: Count | None = None
    """Most frames of an example. A longer clip becomes several examples in a row, a shorter one a shorter example."""
    fps: Positive | None = None
    """Frames a second: each clip is brought to it from its own rate."""
    area: Count | None = None
    """Most pixels of a frame. Larger clips are made smaller with their aspect kept; smaller ones stay as they are."""
    size: tuple[Count, Count] | None = None
    """[height, width] of every example, cut out of the middle. Without it each clip keeps its aspect, within `area`."""


class Native(NamedTuple):
    """What a model was trained on."""

    frames: int
    fps: float
    area: int  # pixels of a frame
    largest: tuple[int, int] | None = None  # height and width beyond which the network has no positions


def native(model: TrainableModel) -> Native:
    """As the authors of each family say; for an unknown one, Wan's."""
    if isinstance(model, LatentVideoModel):
        return Native(13, 12, 24 * 8 * 8)
    if isinstance(model, LTXVideoModel):
        return Native(121, model.fps, 512 * 768)
    if isinstance(model, CogVideoXVideoModel) and model.joined > 1:
        config, stride = model.network.config, model.latents.space_stride
        return Native(81, 16, 768 * 1360, (config.sample_height * stride, config.sample_width * stride))
    if isinstance(model, CogVideoXVideoModel):
        return Native(49, 8, 480 * 720)
    if isinstance(model, HunyuanVideoModel):
        return Native(129, 24, 720 * 1280)
    if isinstance(model, MochiVideoModel):
        return Native(163, 30, 480 * 848)
    if isinstance(model, WanVideoModel) and model.latents.space_stride == 16:  # TI2V 5B
        return Native(121, 24, 704 * 1280)
    return Native(81, 16, 480 * 832)


class Span(NamedTuple):
    """Consecutive frames of a clip at the rate of its examples."""

    begin: int
    frames: int


@dataclass(frozen=True)
class Cut:
    """How clips become examples of one model: `Windows`, with what was left open filled in, on the model's grid."""

    frames: int  # most of an example
    fps: float
    area: int
    size: tuple[int, int] | None
    first: int  # fewest frames that the model takes
    step: int  # and how many more at a time
    sides: tuple[int, int]  # heights and widths are multiples of these
    largest: tuple[int, int] | None

    def fitting(self, frames: int) -> int:
        """As many of so many frames as the model takes; 0 where they are too few."""
        return 0 if frames < self.first else self.first + (frames - self.first) // self.step * self.step

    def spans(self, frames: int) -> list[Span]:
        """The examples of a clip of so many frames: none is left out but a remainder that is shorter than one step, or than what the model takes at all."""
        spans, begin = [], 0
        while (length := min(self.frames, self.fitting(frames - begin))) and (not begin or frames - begin >= min(self.step, self.frames)):
            spans.append(Span(begin, length))
            begin += length
        return spans

    def target(self, height: int, width: int) -> tuple[int, int] | None:
        """(h, w) of the examples of a clip of [H,W]; None where it is smaller than the smallest."""
        return self.size or _largest_inside(height, width, self.area, self.sides, self.largest)


def cut_for(model: TrainableModel, windows: Windows) -> Cut:
    """Raises UserError where the model takes no clip of that many frames or of that size, or where one example would not fit into memory."""
    known, spec, (in_time, *in_space) = native(model), model.latents, model.patch
    first, step, sides = 1 + (in_time - 1) * spec.time_stride, in_time * spec.time_stride, (in_space[0] * spec.space_stride, in_space[1] * spec.space_stride)
    cut = Cut(windows.frames or known.frames, windows.fps or known.fps, windows.area or known.area, windows.size, first, step, sides, known.largest)
    if not cut.fitting(cut.frames):
        raise UserError(f"this model takes clips of at least {first} frames, windows.frames is {cut.frames}. Give {first}, or {step} at a time more")
    if cut.size and (cut.size[0] % sides[0] or cut.size[1] % sides[1]):
        raise UserError(f"this model takes heights that are multiples of {sides[0]} and widths of {sides[1]}, windows.size is {list(cut.size)}. Give multiples")
    if cut.largest and cut.size and (cut.size[0] > cut.largest[0] or cut.size[1] > cut.largest[1]):
        raise UserError(f"this model takes at most {cut.largest[0]}x{cut.largest[1]}, windows.size is {list(cut.size)}. Give less")
    if cut.frames * 3 * (math.prod(cut.size) if cut.size else cut.area) > KEPT_BYTES:
        raise UserError(f"an example of {cut.frames} frames is more than {KEPT_BYTES >> 30} GiB of pixels, windows.frames and windows.area. Give less of either")
    return Cut(cut.fitting(cut.frames), cut.fps, cut.area, cut.size, first, step, sides, cut.largest)


@lru_cache(maxsize=4096)
def _largest_inside(height: int, width: int, area: int, sides: tuple[int, int], largest: tuple[int, int] | None) -> tuple[int, int] | None:
    """Of all sizes on the grid, no larger than the clip, its `area` and `largest`: the one with the most pixels times the share of the picture that it shows."""
    best, found = 0.0, None
    tallest, widest = (min(side, most) for side, most in zip((height, width), largest or (height, width), strict=True))
    for h in range(sides[0], min(tallest, area // sides[1]) + 1, sides[0]):
        nearest = h * width / height / sides[1]
        for columns in (math.floor(nearest), math.ceil(nearest), area // h // sides[1], widest // sides[1]):
            w = columns * sides[1]
            if not 0 < w <= widest or h * w > area:
                continue
            shown = h * w / (height * width * max(h / height, w / width) ** 2)
            if h * w * shown > best * (1 + 1e-9):
                best, found = h * w * shown, (h, w)
    return found


def fit(frame: Frame, height: int, width: int) -> Tensor:
    """[H,W,3] -> uint8 [3,h,w]: resized with the aspect kept until it covers h x w, then cropped in the middle; what `cover` gives, to one level, eight times as fast."""
    scale = max(height / frame.shape[0], width / frame.shape[1])
    fitted = max(height, round(frame.shape[0] * scale)), max(width, round(frame.shape[1] * scale))
    pixels = torch.from_numpy(frame).permute(2, 0, 1)  # [3,H,W]
    if fitted != frame.shape[:2]:
        pixels = F.interpolate(pixels[None], size=fitted, mode="bilinear", antialias=True, align_corners=False)[0]
    top, left = (fitted[0] - height) // 2, (fitted[1] - width) // 2
    return pixels[:, top : top + height, left : left + width].contiguous()


# Which clips there are


class Named(NamedTuple):
    """A clip of the folder, by the name of its file in it, and its caption."""

    name: str
    text: str


class Dropped(NamedTuple):
    """A clip that is left out."""

    name: str
    reason: str


def find_clips(folder: Path) -> tuple[list[Named], list[Dropped]]:
    """The captioned clips of a folder, and those that cannot be used, each once for every caption it has.

    Captions are in `metadata.jsonl`, one `{"file_name": ..., "text": ...}` a line (the layout of datasets' videofolder); without it, in a text file beside each clip.
    Raises UserError where there is no such folder, or neither.
    """
    if not folder.is_dir():
        raise UserError(f"no folder of clips, {folder}. Give a folder with clips and a {TABLE}")
    there = sorted(media_in(folder))
    found, dropped = _by_table(folder) if (folder / TABLE).is_file() else _by_neighbours(folder, there)
    if not (folder / TABLE).is_file() and not found:
        example = '{"file_name": "a.mp4", "text": "..."}'
        raise UserError(f"no captions, {folder}. Write {TABLE} with lines like {example}, or a text file beside each clip (a.mp4, a.txt)")
    known = {clip[0] for clip in (*found, *dropped)}
    return found, [*dropped, *(Dropped(name, f"not in {TABLE}") for name in there if name not in known)]


def every_clip(folder: Path) -> dict[str, list[str]]:
    """Names of all clips and images of a folder, and of what its table names, in order; each with its captions, perhaps none. Raises UserError where there is no such folder."""
    if not folder.is_dir():
        raise UserError(f"no folder of clips, {folder}. Give a folder with clips")
    there = sorted(media_in(folder))
    found, _ = _by_table(folder) if (folder / TABLE).is_file() else _by_neighbours(folder, there)
    captions: dict[str, list[str]] = {name: [] for name in sorted({*there, *(clip.name for clip in found)})}
    for name, text in found:
        captions[name].append(text)
    return captions


def media_in(folder: Path) -> Iterator[str]:
    """Names of all clips and images in it and below, folder by folder, each in order; hidden ones and links to folders are not looked at."""
    for where, below, files in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith("."))
        place = Path(where).relative_to(folder)
        yield from ((place / name).as_posix() for name in sorted(files) if not name.startswith(".") and Path(name).suffix.lower() in VIDEOS | IMAGES)


def _by_table(folder: Path) -> tuple[list[Named], list[Dropped]]:
    table = folder / TABLE
    try:
        lines = table.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
    except OSError as error:
        raise UserError(f"cannot read {table}: {error.strerror}. Check its permissions") from error
    rows = [_row(folder, line, f"line {number} of {TABLE}") for number, line in enumerate(lines, 1) if line.strip()]
    return [row for row in rows if isinstance(row, Named)], [row for row in rows if isinstance(row, Dropped)]


def _row(folder: Path, line: str, place: str) -> Named | Dropped:
    try:
        row = json.loads(line)
        name, text = row.get("file_name"), row.get("text")
        f"{name}{text}".encode()
    except (ValueError, AttributeError, RecursionError):
        return Dropped(place, "not a JSON object in UTF-8")
    if not isinstance(name, str) or not name.strip():
        return Dropped(place, "no file_name")
    if not isinstance(text, str) or not text.strip():
        return Dropped(name, "no caption")
    try:
        path = inside(folder, name)
        local = path.resolve().relative_to(folder.resolve()) if Path(name).is_absolute() else Path(os.path.normpath(name))
        return Named(local.as_posix(), text)
    except UserError as error:
        return Dropped(name, reason_of(error, folder / TABLE))


def _by_neighbours(folder: Path, there: Sequence[str]) -> tuple[list[Named], list[Dropped]]:
    found: list[Named] = []
    dropped: list[Dropped] = []
    for name in there:
        try:
            text = inside(folder, name).with_suffix(".txt").read_text(encoding="utf-8-sig").strip()
        except FileNotFoundError:
            text = ""
        except (UserError, OSError, ValueError) as error:
            dropped.append(Dropped(name, reason_of(error, folder / TABLE) if isinstance(error, UserError) else "its caption cannot be read as UTF-8"))
            continue
        (found.append(Named(name, text)) if text else dropped.append(Dropped(name, "no caption beside it")))
    return found, dropped


def inside(folder: Path, name: str) -> Path:
    """The file of that name in the folder. Raises UserError where the name leads out of it (absolute, `..`, a link)."""
    try:
        (folder / name).exists()  # a name that is too long cannot even be asked for
        leaves_it = not (folder / name).resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"no clip can be named {name!r}, {folder / TABLE}: {error}. Name a file in that folder") from error
    if leaves_it:
        raise UserError(f"{name!r} lies outside its folder, {folder / TABLE}. Copy the clip into the folder and name it there")
    return folder / name


def reason_of(error: UserError, path: Path | str) -> str:
    """What happened, without where it did and what to do."""
    what, found, _ = str(error).partition(f", {path}")
    return what if found else what.partition(". ")[0]


# What is in them


class Facts(NamedTuple):
    """What decoding a clip to its end found: frames, their rate (0 of an image) and size."""

    frames: int
    fps: float
    height: int
    width: int

    def shown(self, fps: float) -> int:
        """Frames at another rate: so many as begin while the clip lasts; one frame alone is one at any."""
        return self.frames if self.frames <= 1 else _frames_at(self.frames, self.fps / fps)


class Window(NamedTuple):
    """An example's pixels."""

    span: Span
    video: Tensor  # uint8 [T,3,h,w]


def is_image(name: str) -> bool:
    """Whether a file of that name is read as an image."""
    return Path(name).suffix.lower() in IMAGES


def read_frames(path: Path) -> Iterator[tuple[Frame, float]]:
    """The frames of a clip and its rate, or an image and 0. Raises UserError where it cannot be read, at the latest behind the last frame."""
    return iter([(read_image(path), 0.0)]) if is_image(path.name) else each_frame(path)


def all_windows(frames: Iterable[tuple[Frame, float]], cut: Cut) -> Generator[Window, None, Facts]:
    """The examples of a clip as they come, and what it is. A clip that turns out to be damaged raises UserError behind examples that looked well: they are of no use then."""
    facts, held, begin = Facts(0, 0.0, 0, 0), list[Tensor](), 0
    for frame, fps, times in _at_rate(frames, cut.fps):
        facts = Facts(facts.frames + 1, fps, *frame.shape[:2])
        size = cut.target(*frame.shape[:2])
        if size is None or not times:
            continue
        small = fit(frame, *size)
        for _ in range(times):
            held.append(small)
            if len(held) == cut.frames:
                yield Window(Span(begin, cut.frames), torch.stack(held))
                begin, held = begin + cut.frames, []
    rest = [span for span in cut.spans(begin + len(held)) if span.begin >= begin] if held else []
    for span in rest:
        yield Window(span, torch.stack(held[span.begin - begin : span.begin - begin + span.frames]))
    return facts


def some_windows(frames: Iterable[tuple[Frame, float]], cut: Cut, spans: Sequence[Span]) -> Iterator[Window]:
    """Those examples of a clip alone, in order. Nothing behind the last is decoded. Raises UserError where the clip ends before it does."""
    waiting, held, k = sorted(spans), list[Tensor](), 0
    for frame, _, times in _at_rate(frames, cut.fps):
        for _ in range(times):
            if k >= waiting[0].begin:
                size = cut.target(*frame.shape[:2])
                assert size is not None
                held.append(fit(frame, *size))
            k += 1
            if len(held) == waiting[0].frames:
                yield Window(waiting.pop(0), torch.stack(held))
                held = []
            if not waiting:
                return
    raise UserError(f"a clip has {k} frames at {cut.fps:g} a second where there were more, clips. It has changed: run the command again")


def _at_rate(frames: Iterable[tuple[Frame, float]], to: float) -> Iterator[tuple[Frame, float, int]]:
    """Each frame, the rate it was filmed at, and for how many frames it is on screen at the rate `to`; one frame alone is on screen for one."""
    source = iter(frames)
    start = list(zip(range(2), source, strict=False))
    if len(start) < 2:
        yield from ((frame, fps, 1) for _, (frame, fps) in start)
        return
    shown = 0
    for number, (frame, fps) in enumerate(chain((pair for _, pair in start), source)):
        before, shown = shown, _frames_at(number + 1, fps / to)
        yield frame, fps, shown - before


def _frames_at(frames: int, ratio: float) -> int:
    """How many numbers k there are, from 0 on, for which frame floor(k ratio) is one of so many."""
    count = math.ceil((frames - 1e-9) / ratio)
    while math.floor(count * ratio + 1e-9) < frames:
        count += 1
    while count and math.floor((count - 1) * ratio + 1e-9) >= frames:
        count -= 1
    return count

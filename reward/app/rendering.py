"""What the worker does (`worker.py` starts it): clips that came from outside in, what people are shown out. Nothing here trusts the bytes it is given.

    standard input     8 bytes, how long; the file                                           again and again, until it ends
    standard output    8 bytes, how long; JSON {"files": {name: bytes}} or {"error": text}; then the files, one after the other

Once everything is imported and every library has been used once, the process gives up what it no longer needs: root, if it had it, every further file and socket
(RLIMIT_NOFILE 0), writing files (RLIMIT_FSIZE 0), starting processes where the system counts them, memory beyond `MEMORY`, and processor time beyond `SECONDS` a clip.
A file is probed before it is decoded: mp4 or Matroska by its first bytes, one of `CODECS`, `BOUNDS` of frames and pixels, then of rate and length. Playlists are none of them.

What a stand-in hides it does not hold: `blur.jpg` is made of a grid of at most 10 cells a side, `light.jpg` of one of 36.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import resource
import signal
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch.nn import functional as F

from base_model.bounds import held
from base_model.errors import UserError
from base_model.video.files import CODECS, Bounds, Video, decode_video, mp4_bytes
from reward.safety.policy import load_policy
from reward.safety.video import FlashFilter

BOUNDS = Bounds(frames=3_000, pixels=1 << 28)
"""The most of a clip: with it 2 minutes at 25 frames a second, and 290 frames of 1280x720."""
MOST_FPS, MOST_SECONDS = 120.0, 300.0
MEMORY = 3 << 30  # bytes beyond what the libraries take
SECONDS = 120  # of processor time a clip, and of the wall clock
CLIPS = 100  # then another process takes over
NOBODY = 65534
ALSO = ("mpeg4",)  # an older codec that only people's clips come in
BLUR_CELLS, LIGHT_CELLS = 10, 36
POSTER, TILE, TILES = 640, 240, 9
FLASH_SIDE = 48  # as `reward/safety/video.py` averages large frames

Grey = NDArray[np.uint8]  # [H,W]


def rendered(content: bytes) -> dict[str, bytes]:
    """The clip as H.264, its stand-ins and what is known of it. Raises UserError for what is no clip, or too much of one."""
    video = decode_video(content, "the clip", BOUNDS, codecs=CODECS + ALSO)
    count, height, width = video.frames.shape[:3]
    if not 0 < video.fps <= MOST_FPS or count / video.fps > MOST_SECONDS:
        raise UserError(f"{count} frames at {video.fps:g} a second: at most {MOST_FPS:g} a second and {MOST_SECONDS:g} s are taken, the clip. Cut it or encode it again")
    greys = [_grey(video.frames[at]) for at in _spread(count, TILES)]
    poster = greys[len(greys) // 2]
    facts = {"width": width, "height": height, "fps": video.fps, "frames": count, "seconds": count / video.fps, "flash": flash_of(video)}
    return {
        "clip.mp4": mp4_bytes(video.frames, video.fps),
        "blur.jpg": _jpeg(hidden(poster, BLUR_CELLS)),
        "light.jpg": _jpeg(hidden(poster, LIGHT_CELLS)),
        "edges.jpg": _jpeg(_sheet([edges(each) for each in greys])),
        "sheet.jpg": _jpeg(_sheet(greys)),
        "facts.json": json.dumps(facts, sort_keys=True).encode(),
    }


def _spread(count: int, most: int) -> list[int]:
    """Places of up to `most` frames, evenly spread, the first and the last among them."""
    return sorted({round(at) for at in np.linspace(0, count - 1, min(count, most))})


def _grey(pixels: NDArray[np.uint8]) -> Grey:
    """[H,W,3] -> [h,w] with no side above `POSTER`."""
    image = Image.fromarray(pixels).convert("L")
    image.thumbnail((POSTER, POSTER), Image.Resampling.BOX)
    return np.asarray(image)


def hidden(grey: Grey, cells: int) -> Grey:
    """The picture made of at most `cells` x `cells` means, smoothed: what is finer is not in it."""
    height, width = grey.shape
    scale = min(1.0, cells / max(height, width))
    small = Image.fromarray(grey).resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BOX)
    size = _shown(width, height, POSTER)
    return np.asarray(small.resize(size, Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(max(size) / cells / 3)))


def edges(grey: Grey) -> Grey:
    """Dark lines on white where the picture changes: shapes without surfaces."""
    y, x = np.gradient(np.asarray(Image.fromarray(grey).filter(ImageFilter.GaussianBlur(1)), np.float32))
    strength = np.hypot(x, y)
    top = max(float(np.quantile(strength, 0.98)), 6.0)
    return (255 - 215 * np.clip((strength - top / 8) / top, 0, 1)).astype(np.uint8)


def _shown(width: int, height: int, side: int) -> tuple[int, int]:
    """A size of the same form with its longer side at `side`."""
    scale = side / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _sheet(greys: list[Grey]) -> Grey:
    """Pictures of one size in a grid, in the order of reading."""
    columns = 3 if len(greys) > 4 else max(1, min(2, len(greys)))
    rows = -(-len(greys) // columns)
    width, height = _shown(greys[0].shape[1], greys[0].shape[0], TILE)
    gap = 6
    page = Image.new("L", (columns * (width + gap) + gap, rows * (height + gap) + gap), 32)
    for place, each in enumerate(greys):
        tile = Image.fromarray(each).resize((width, height), Image.Resampling.BILINEAR)
        page.paste(tile, (gap + place % columns * (width + gap), gap + place // columns * (height + gap)))
    return np.asarray(page)


def _jpeg(grey: Grey) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def flash_of(video: Video) -> dict[str, Any]:
    """What the filter of flashing says of a clip: its verdict, its score and where."""
    cells = torch.stack([_cells(frame) for frame in video.frames])[None]  # [1,T,3,h,w]
    (ruling,) = FlashFilter(load_policy()).check_videos(cells, [""], video.fps)[0]
    where = [[reason.start, reason.end] for reason in ruling.reasons]
    return {"verdict": ruling.verdict.name.lower(), "score": ruling.score, "where": where, "filter": f"{ruling.filter_id} {ruling.filter_version}"}


def _cells(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """[H,W,3] -> [3,h,w] in [0,1] with at most 48 cells a side: means of light, so that the filter sees of a large frame what it would have made of it itself."""
    level = np.arange(256) / 255
    light = np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4).astype(np.float32)
    frame = torch.from_numpy(pixels).permute(2, 0, 1)  # [3,H,W]
    if max(frame.shape[1:]) <= FLASH_SIDE:
        return frame.float() / 255
    size = (min(frame.shape[1], FLASH_SIDE), min(frame.shape[2], FLASH_SIDE))
    mean = F.adaptive_avg_pool2d(torch.from_numpy(light[frame.numpy()]), size)  # [3,h,w]
    return torch.where(mean <= 0.0031308, mean * 12.92, 1.055 * mean.clamp(min=1e-9) ** (1 / 2.4) - 0.055)


# The process


def settle() -> None:
    """Gives up what is not needed any more. Everything that will be used has been used before: it cannot be opened afterwards."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    limit = held() + MEMORY
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_AS, (_mapped() + MEMORY, _mapped() + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (CLIPS * SECONDS, CLIPS * SECONDS))
    for each in (resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC, resource.RLIMIT_NOFILE):
        resource.setrlimit(each, (0, 0))


def _mapped() -> int:
    """Bytes of address space that this process has."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _warm() -> None:
    """Uses every library once, so that whatever it opens is open."""
    frames = np.zeros((3, 64, 64, 3), np.uint8)
    frames[1] = 255
    rendered(mp4_bytes(frames, 8.0))


def serve(asked: BinaryIO, told: BinaryIO) -> None:
    """Answers until the other side hangs up."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    while len(header := asked.read(8)) == 8:
        content = asked.read(int.from_bytes(header, "big"))
        signal.alarm(SECONDS + 10)  # should the other side be gone
        used = resource.getrusage(resource.RUSAGE_SELF)
        resource.setrlimit(resource.RLIMIT_CPU, (min(int(used.ru_utime + used.ru_stime) + 1 + SECONDS, hard), hard))
        parts = _answered(content)
        for part in parts:
            told.write(part)
        told.flush()
        signal.alarm(0)


def _answered(content: bytes) -> list[bytes]:
    try:
        files = rendered(content)
        said: dict[str, Any] = {"files": {name: len(each) for name, each in files.items()}}
    except UserError as error:
        files, said = {}, {"error": str(error)}
    except MemoryError:
        files, said = {}, {"error": f"the clip takes more than {MEMORY >> 30} GiB. Cut it or make it smaller"}
    except Exception as error:  # whatever a library makes of a crafted file
        files, said = {}, {"error": f"the clip cannot be shown: {type(error).__name__}. Encode it again"}
    head = json.dumps(said).encode()
    return [len(head).to_bytes(8, "big"), head, *files.values()]


def main() -> None:
    torch.set_num_threads(1)
    asked, told = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    os.close(0)
    _warm()
    settle()
    told.write(b"ready   ")
    told.flush()
    serve(asked, told)


if __name__ == "__main__":
    main()

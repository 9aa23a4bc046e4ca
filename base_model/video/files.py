"""Video files in and out, and the few changes of size and rate that clips need on the way.

Pixels outside a file are either `uint8 [T,H,W,3]` numpy (as decoded) or `float32 [T,3,H,W]` torch in [0,1] (everywhere else).
PyAV is imported by the functions that need it. Codecs run on one thread: clips are small, and starting threads costs more than it gives.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from base_model.checkpoint import atomic_write
from base_model.checkpoint import disk_errors as disk_errors
from base_model.errors import UserError

PREVIEW_SIDE = 128
DIGEST_TAG = "RUSHES_SHA256"
CONTAINERS = ((4, b"ftyp", "mp4"), (0, b"\x1aE\xdf\xa3", "matroska"))  # where their first bytes stand, and what PyAV calls them
CODECS = ("h264", "hevc", "vp9", "av1", "ffv1")
"""What `decode_video` decodes."""
FORMATS = "mov,matroska,avi,mpegts,mpeg,flv,ogg,asf,gif,ivf,mxf,mpegvideo,h264,hevc,wav"
"""Containers that `read_video` opens, as ffmpeg calls them: they hold what they play. Playlists and scripts, which lead to other files and hosts, are not among them,
whatever their files are called."""
MOST_STREAMS = 32
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
"""What `read_image` opens, as Pillow calls it."""
FRAME_PIXELS = 1 << 26  # 8192 x 8192
KEPT_BYTES = 2 << 30


class Video(NamedTuple):
    """A decoded file: `frames` uint8 [T,H,W,3] (RGB) and its rate in frames a second."""

    frames: NDArray[np.uint8]
    fps: float


class Bounds(NamedTuple):
    """The most that is decoded of a clip: frames, and pixels of all frames together."""

    frames: int
    pixels: int


LOCAL = Bounds(frames=100_000, pixels=1 << 34)
"""The most that `read_video` decodes: minutes of work, whatever a file of a few kilobytes says of itself."""
STREAMED = LOCAL._replace(pixels=1 << 38)
"""The most that is decoded where one frame after another is looked at: an hour of full HD at 25 frames a second."""


def digest_of(frames: NDArray[np.uint8]) -> str:
    """sha256 of the shape and the bytes of uint8 [T,H,W,3]: the identity of a clip, whatever file holds it."""
    digest = hashlib.sha256(str(frames.shape).encode())
    digest.update(np.ascontiguousarray(frames).data)
    return digest.hexdigest()


def to_uint8(video: Tensor) -> NDArray[np.uint8]:
    """[T,3,H,W] in [0,1] -> uint8 [T,H,W,3], rounded to the nearest level; values outside are clamped. Raises UserError for nan or infinite pixels."""
    if video.ndim != 4 or video.shape[1] != 3:
        raise ValueError(f"a clip is [T,3,H,W], not {list(video.shape)}")
    if not bool(torch.isfinite(video).all()):
        raise UserError(f"the clip of shape {list(video.shape)} holds nan or infinite pixels. Check the model or the latents it was decoded from")
    levels = video.detach().cpu().float().clamp(0, 1).mul_(255).round_().to(torch.uint8)  # [T,3,H,W]
    return np.ascontiguousarray(levels.permute(0, 2, 3, 1).numpy())  # [T,H,W,3]


def from_uint8(frames: NDArray[np.uint8]) -> Tensor:
    """uint8 [T,H,W,3] -> float32 [T,3,H,W] in [0,1]; the exact inverse of `to_uint8` on its outputs."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float().div(255).contiguous()


def resize(video: Tensor, height: int, width: int) -> Tensor:
    """[T,3,H,W] -> [T,3,height,width], bilinear with antialiasing where it shrinks, so that no pixel of the source is skipped."""
    if video.shape[-2:] == (height, width):
        return video
    return F.interpolate(video, size=(height, width), mode="bilinear", align_corners=False, antialias=True).clamp(0, 1)


def center_crop(video: Tensor, height: int, width: int) -> Tensor:
    """The middle [T,3,height,width] of a clip at least that large."""
    top, left = (video.shape[-2] - height) // 2, (video.shape[-1] - width) // 2
    if top < 0 or left < 0:
        raise ValueError(f"cannot crop {height}x{width} out of {video.shape[-2]}x{video.shape[-1]}")
    return video[..., top : top + height, left : left + width]


def cover(video: Tensor, height: int, width: int) -> Tensor:
    """Resizes with the aspect kept until the clip covers height x width, then crops the middle."""
    scale = max(height / video.shape[-2], width / video.shape[-1])
    fitted = max(height, round(video.shape[-2] * scale)), max(width, round(video.shape[-1] * scale))
    return center_crop(resize(video, *fitted), height, width)


def resample_fps(video: Tensor, fps: float, to: float) -> Tensor:
    """[T,3,H,W] at `fps` -> [T',3,H,W] at `to` frames a second, each the source frame on screen at that moment. Never empty."""
    if fps <= 0 or to <= 0:
        raise ValueError(f"frame rates are positive, not {fps} and {to}")
    count = max(1, round(len(video) * to / fps))
    index = (torch.arange(count, dtype=torch.float64) * (fps / to) + 1e-9).floor().long().clamp(max=len(video) - 1)  # [T']
    return video[index]


Frame = NDArray[np.uint8]  # [H,W,3]


def read_video(path: str | Path, *, max_frames: int | None = None, seconds: float | None = None, shrink: Callable[[Frame], Frame] | None = None) -> Video:
    """Decodes the first video stream of any file PyAV knows, upright (the rotation a phone writes is applied).

    max_frames, seconds: nothing is decoded behind so many frames, or behind the first frame after so many seconds.
    shrink: what becomes of each frame [H,W,3] as it is decoded, so that a long clip of large frames never lies in memory whole.
    Raises UserError where the file is missing, is no video (a playlist is none), is truncated or damaged, holds no frame, frames of several sizes, more than `LOCAL`, or more than
    fits into `KEPT_BYTES`.
    """
    path = Path(path)
    _require_file(path)
    with open(path, "rb") as file:
        _refuse_truncated_mp4(file, path.stat().st_size, path)
    frames, fps, _ = _decode(path, max_frames, shrink, seconds=seconds)
    return Video(np.stack(frames), fps)


def each_frame(path: str | Path) -> Iterator[tuple[Frame, float]]:
    """What `read_video` decodes, up to `STREAMED`, one frame [H,W,3] and its rate after another. Raises as `read_video`, at the latest behind the last frame."""
    path = Path(path)
    _require_file(path)
    with open(path, "rb") as file:
        _refuse_truncated_mp4(file, path.stat().st_size, path)
    for pixels in _each(path, bounds=STREAMED):
        yield pixels.frame, pixels.fps


def timed_frames(path: str | Path) -> Iterator[tuple[Frame, float]]:
    """What `each_frame` gives, with the second at which each frame is shown instead of the rate of all."""
    path = Path(path)
    _require_file(path)
    with open(path, "rb") as file:
        _refuse_truncated_mp4(file, path.stat().st_size, path)
    for pixels in _each(path, bounds=STREAMED):
        yield pixels.frame, pixels.time


def each_frame_of(content: bytes, name: str, bounds: Bounds) -> Iterator[tuple[Frame, float]]:
    """What `decode_video` decodes, as `each_frame` gives it. A lossless clip's digest is not looked at."""
    for pixels in _each(name, content=content, kind=_kind(content, name), bounds=bounds):
        yield pixels.frame, pixels.fps


def read_image(path: str | Path, *, still: bool = False) -> Frame:
    """An image, uint8 [H,W,3], upright (the rotation a camera writes is applied); of 16 bits the nearest of 8. Of one that moves its first frame, or with `still` an error.

    Raises UserError where the file is missing, is none of `IMAGE_FORMATS`, is damaged, or has more than `FRAME_PIXELS`.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if still and getattr(image, "n_frames", 1) > 1:
                raise UserError(f"the image moves, {path}. Give one frame of it, or a video")
            if image.width * image.height > FRAME_PIXELS:
                raise UserError(f"the image has {image.width}x{image.height} pixels, more than the limit of {FRAME_PIXELS}, {path}. Make it smaller")
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
                levels = np.rint(np.asarray(upright).clip(0, 65535) / 257).astype(np.uint8)  # [H,W]
                return np.repeat(levels[..., None], 3, axis=2)
            return np.array(upright.convert("RGB"))
    except FileNotFoundError as error:
        raise UserError(f"no such image, {path}. Check the path") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the image: {error}, {path}. Copy or make it again, or give a PNG or JPEG") from error


def decode_video(content: bytes, name: str, bounds: Bounds, *, codecs: Sequence[str] = CODECS) -> Video:
    """Decodes a clip that came from outside: mp4 or Matroska, told by its first bytes, with one of `codecs`, from memory, so that no path in it leads anywhere.

    Nothing larger than `bounds` is decoded, whatever the file says of itself: the decoder refuses a frame before it makes room for it. `name` stands in errors.
    Raises UserError where it is no such file, larger than `bounds`, truncated or damaged, or not the lossless clip that its own digest says.
    """
    kind = _kind(content, name)
    frames, fps, digest = _decode(name, content=content, kind=kind, bounds=bounds, codecs=codecs)
    video = np.stack(frames)
    if digest is not None and digest != digest_of(video):
        raise UserError(f"the clip is damaged: its {len(video)} frames are not the ones that were written, {name}. Make it again")
    return Video(video, fps)


def read_lossless(path: str | Path) -> Video:
    """The exact frames of a file of `write_lossless`. Raises UserError where one bit of them differs from what was written."""
    path = Path(path)
    _require_file(path)
    frames, fps, digest = _decode(path, None)
    video = np.stack(frames)
    if digest is None:
        raise UserError(f"not a lossless clip of this program (it carries no digest), {path}. Give the .mkv it wrote")
    if digest != digest_of(video):
        raise UserError(f"the clip is damaged: its {len(video)} frames are not the ones that were written, {path}. Make it again")
    return Video(video, fps)


def write_lossless(path: str | Path, video: Tensor | NDArray[np.uint8], fps: float) -> None:
    """FFV1 version 3 in Matroska: RGB exact to the bit, with the digest of the frames inside, the same bytes for the same clip. Atomic.

    video: float [T,3,H,W] in [0,1] or uint8 [T,H,W,3]. Raises UserError where the file cannot be written.
    """
    frames = _as_frames(video)
    rate, (_, height, width, _) = frame_rate(fps), frames.shape
    padded = np.zeros((height, width, 4), np.uint8)
    buffer = io.BytesIO()
    import av

    with av.open(buffer, "w", format="matroska", container_options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("ffv1", rate=rate, options={"level": "3", "slicecrc": "1", "flags": "+bitexact"})
        stream.width, stream.height, stream.pix_fmt = width, height, "bgr0"
        stream.codec_context.thread_count = 1
        container.metadata[DIGEST_TAG] = digest_of(frames)
        for pixels in frames:
            padded[..., :3] = pixels[..., ::-1]  # FFV1 wants B G R and an unused byte
            container.mux(stream.encode(_packed_frame(padded, "bgr0")))
        container.mux(stream.encode())
    write_atomic(path, buffer.getvalue())


def write_mp4(path: str | Path, video: Tensor | NDArray[np.uint8], fps: float, *, upscale: bool = True) -> None:
    """H.264 that every browser plays: yuv420p, BT.709, crf 18, index in front of the data. Atomic, the same bytes for the same clip.

    video: float [T,3,H,W] in [0,1] or uint8 [T,H,W,3]. upscale: small clips grow by a whole factor, pixels repeated, until the short side has 128.
    An odd side gets its last row or column twice. Raises UserError where the file cannot be written.
    """
    write_atomic(path, mp4_bytes(video, fps, upscale=upscale))


def mp4_bytes(video: Tensor | NDArray[np.uint8], fps: float, *, upscale: bool = True) -> bytes:
    """What `write_mp4` writes."""
    frames = _as_frames(video)
    rate = frame_rate(fps)
    factor = max(1, -(-PREVIEW_SIDE // min(frames.shape[1:3]))) if upscale else 1
    count, height, width = len(frames), frames.shape[1] * factor, frames.shape[2] * factor
    odd = ((0, height % 2), (0, width % 2), (0, 0))
    import av
    from av.video.reformatter import Colorspace, VideoReformatter

    buffer, reformatter = io.BytesIO(), VideoReformatter()
    room_for_index = {"moov_size": str(1536 + 32 * count), "fflags": "+bitexact"}  # `+faststart` without reading the file again
    with av.open(buffer, "w", format="mp4", container_options=room_for_index) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "18", "preset": "superfast", "flags": "+bitexact"})
        stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
        context = stream.codec_context
        context.thread_count, context.colorspace, context.color_primaries, context.color_trc, context.color_range = 1, 1, 1, 1, 1
        for pixels in frames:
            pixels = np.pad(pixels.repeat(factor, axis=0).repeat(factor, axis=1), odd, mode="edge")  # [height,width,3], both even
            frame = reformatter.reformat(_packed_frame(pixels, "rgb24"), format="yuv420p", dst_colorspace=Colorspace.ITU709, threads=1)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def write_atomic(path: str | Path, data: bytes) -> None:
    """`atomic_write` of what can be made again: it does not wait for the disk, which takes longer than a clip."""
    atomic_write(Path(path), data, sync=False)


def _kind(content: bytes, name: str) -> str:
    """What PyAV calls its container. Raises UserError where it is neither mp4 nor Matroska, or an mp4 that was cut off."""
    kind = next((kind for at, magic, kind in CONTAINERS if content[at : at + len(magic)] == magic), None)
    if kind is None:
        raise UserError(f"neither mp4 nor Matroska, {name}. Give a clip in one of them")
    _refuse_truncated_mp4(io.BytesIO(content), len(content), name)
    return kind


def _require_file(path: Path) -> None:
    if not path.exists():
        raise UserError(f"no such video file, {path}. Check the path")
    if not path.is_file():
        raise UserError(f"not a video file but a folder or a device, {path}. Name one file")
    if path.stat().st_size == 0:
        raise UserError(f"the video file is empty, {path}. Copy or make it again")
    if not os.access(path, os.R_OK):
        raise UserError(f"no permission to read the video file, {path}. Change its permissions")


class _Pixels(NamedTuple):
    """One decoded frame and the second at which it is shown, and what its file says of all of them."""

    frame: Frame
    time: float  # where the file does not say, by the rate
    fps: float
    digest: str | None


def _decode(
    path: Path | str,
    max_frames: int | None = None,
    shrink: Callable[[Frame], Frame] | None = None,
    *,
    seconds: float | None = None,
    content: bytes | None = None,
    kind: str | None = None,
    bounds: Bounds = LOCAL,
    codecs: Sequence[str] = CODECS,
) -> tuple[list[NDArray[np.uint8]], float, str | None]:
    """(frames, fps, the digest the file carries) of the file at `path`, or of `content`, which is of that `kind` and one of `codecs`."""
    frames: list[Frame] = []
    kept = 0
    for pixels in _each(path, max_frames, seconds=seconds, content=content, kind=kind, bounds=bounds, codecs=codecs):
        frames.append(shrink(pixels.frame) if shrink else pixels.frame)
        kept += frames[-1].nbytes
        if kept > KEPT_BYTES:
            height, width = pixels.frame.shape[:2]
            raise UserError(f"{len(frames)} frames of {width}x{height} are more than {KEPT_BYTES >> 30} GiB, {path}. Cut the clip or make it smaller")
    return frames, pixels.fps, pixels.digest


def _each(
    path: Path | str,
    max_frames: int | None = None,
    *,
    seconds: float | None = None,
    content: bytes | None = None,
    kind: str | None = None,
    bounds: Bounds = LOCAL,
    codecs: Sequence[str] = CODECS,
) -> Iterator[_Pixels]:
    """What `_decode` decodes, frame by frame, at least one. The last one is given before it is known whether the file ends as it should: then it raises."""
    import av
    from av.video.reformatter import VideoReformatter

    count = 0
    shape: tuple[int, ...] = ()
    reformatter = VideoReformatter()
    decoding = {"err_detect": "crccheck+explode", "max_pixels": str(min(bounds.pixels, FRAME_PIXELS))}
    options = {**decoding, "format_whitelist": FORMATS, "protocol_whitelist": "file", "max_streams": str(MOST_STREAMS + 1), "enable_drefs": "0"}
    try:
        with av.open(str(path) if content is None else io.BytesIO(content), format=kind, options=options) as container:
            if len(container.streams) > MOST_STREAMS:  # a demuxer that met one too many either fails or leaves the rest out
                raise UserError(f"there are more than {MOST_STREAMS} streams, {path}. Give a video")
            stream = next((each for each in container.streams.video if each.codec_context is not None), None)
            if stream is None:
                raise UserError(f"the file has no video stream that can be decoded, {path}. Give a video")
            if kind and stream.codec_context.codec.canonical_name not in codecs:
                raise UserError(f"the clip is encoded as {stream.codec_context.codec.canonical_name}, {path}. Give one of {', '.join(codecs)}")
            stream.codec_context.thread_count = 1
            stream.codec_context.options = decoding
            fps = float(stream.average_rate or stream.guessed_rate or 0)
            most = min((number for number in (max_frames, None if seconds is None else math.ceil(seconds * (fps or 1.0)) + 1) if number is not None), default=None)
            digest = container.metadata.get(DIGEST_TAG)
            size = stream.codec_context.height, stream.codec_context.width
            told = stream.frames or math.ceil(fps * (container.duration or 0) / av.time_base)
            _check_bounds(max(0, min(told, most or told) - 1), size, bounds, path)
            for packet in container.demux(stream):
                if packet.is_corrupt:
                    raise UserError(f"the video file is truncated or damaged after {count} frames, {path}. Copy or make it again")
                for frame in packet.decode():
                    _check_bounds(count, (frame.height, frame.width), bounds, path)
                    pixels = _rgb(frame, reformatter)
                    shape = shape or pixels.shape
                    if pixels.shape != shape:
                        raise UserError(f"the frames change their size, {path}. Encode the video again with one size")
                    time = count / (fps or 1.0) if frame.time is None else float(frame.time)
                    count += 1
                    yield _Pixels(pixels, time, fps or 1.0, digest)
                    if count == most:
                        return
    except (av.error.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(f"cannot read the video: {reason} after {count} frames, {path}. Copy or make it again, or give a file ffmpeg can play") from error
    if not count:
        raise UserError(f"the video file holds no frame, {path}. Copy or make it again")


def _check_bounds(before: int, size: tuple[int, int], bounds: Bounds, path: Path | str) -> None:
    """Raises UserError where one frame of [H,W] more is too many."""
    if before >= bounds.frames or (before + 1) * size[0] * size[1] > bounds.pixels:
        limit = f"{bounds.frames} frames and {bounds.pixels} pixels of all frames together"
        raise UserError(f"frame {before + 1} of {size[1]}x{size[0]} is more than the limit of {limit}, {path}. Give a shorter or smaller clip")


def _rgb(frame: Any, reformatter: Any) -> NDArray[np.uint8]:
    """One decoded frame as uint8 [H,W,3], upright."""
    if frame.format.name == "bgr0":
        rows = np.frombuffer(frame.planes[0], np.uint8).reshape(-1, frame.planes[0].line_size)[: frame.height, : frame.width * 4]
        pixels = np.ascontiguousarray(rows.reshape(frame.height, frame.width, 4)[..., 2::-1])  # [H,W,3]
    else:
        pixels = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()  # [H,W,3]
    return np.ascontiguousarray(np.rot90(pixels, frame.rotation // 90)) if frame.rotation else pixels


def _packed_frame(pixels: NDArray[np.uint8], pixel_format: str) -> Any:
    """A PyAV frame of packed pixels [H,W,c]; rows are padded where the codec wants them aligned."""
    import av

    height, width, channels = pixels.shape
    frame = av.VideoFrame(width, height, pixel_format)
    plane = frame.planes[0]
    rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
    rows[:height, : width * channels] = pixels.reshape(height, width * channels)
    return frame


def _as_frames(video: Tensor | NDArray[np.uint8]) -> NDArray[np.uint8]:
    frames = to_uint8(video) if isinstance(video, Tensor) else video
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"frames are uint8 [T,H,W,3] with at least one pixel, not {frames.dtype} {list(frames.shape)}")
    return frames


def frame_rate(fps: float) -> Fraction:
    """A rate as containers write it. Raises ValueError where there is none such: not above 0, above 1000, or so low that it rounds to 0."""
    rate = Fraction(fps).limit_denominator(1001) if 0 < fps <= 1000 else None
    if not rate:
        raise ValueError(f"a frame rate is between 0 and 1000, not {fps}")
    return rate


def _refuse_truncated_mp4(file: BinaryIO, size: int, path: Path | str) -> None:
    """The boxes of an mp4 say how long they are: a last one that reaches past the end of the file was cut off."""
    if file.read(12)[4:8] != b"ftyp":
        return
    start = 0
    while start + 8 <= size:
        file.seek(start)
        header = file.read(16)
        length = int.from_bytes(header[:4], "big")
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        if length == 0:
            return
        if length < 8 or start + length > size:
            raise UserError(f"the video file is truncated or damaged at byte {start} of {size}, {path}. Copy or make it again")
        start += length

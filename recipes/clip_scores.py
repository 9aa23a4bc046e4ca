"""What is found of one clip, in one pass over its frames: the measures, and what was asked for beside them. Runs in a worker (`clip_workers.py`), all but the encoder.

    file -> is it what its name says? -> frames, one after another -+-> measures, hashes, thumbnails     base_model/video/curate.py
                                                                    +-> windows of small frames -> safety filters
                                                                    +-> some small frames -> faces; the encoder, in the process that asks
                                                                            -> agreement with the caption, aesthetic score, embedding

In memory are a few frames and small copies of some: at no time a whole clip, nor one in float.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from base_model.checkpoint import load_weights
from base_model.errors import UserError
from base_model.video.curate import MEASURES, VERSION, measure
from base_model.video.files import FORMATS, MOST_STREAMS, Frame, read_image, timed_frames
from recipes.clip_folder import reason_of
from recipes.filters import NONE, Filters, load_filters
from recipes.weights import file_hash
from reward.encoders import Encoder, FrameEncoder, load_encoder
from reward.safety.contract import Decision, SafetyRunner, Verdict
from reward.safety.policy import load_policy
from reward.safety.prompt import WordFilter
from reward.safety.video import DegenerateFilter, FlashFilter

WINDOW_SECONDS, OVERLAP_SECONDS, WINDOW_FRAMES = 4.0, 1.0, 512
WINDOW_SIDE = 96
"""Longest side of the frames that safety filters see: flashing is judged on 48 cells a side."""
FACE_SIDE, FACE_FRAMES = 640, 8
FACE_SCORE = 0.7
THUMBNAIL_QUALITY = 85
TOO_LARGE = "it takes more memory than a worker may have"
MAGIC = ((b"\x89PNG", "png"), (b"\xff\xd8\xff", "jpeg"), (b"BM", "bmp"))
NAMED = {"mov,mp4,m4a,3gp,3g2,mj2": "mp4", "matroska,webm": "matroska"}
"""What ffmpeg calls a container -> what the table calls it; the others are called alike."""
SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "mp4": (".mp4", ".m4v", ".mov"),
    "matroska": (".mkv", ".webm"),
    "avi": (".avi",),
    "gif": (".gif",),
    "mpeg": (".mpg", ".mpeg"),
    "mpegvideo": (".mpg", ".mpeg"),
    "mpegts": (".ts",),
    "flv": (".flv",),
    "ogg": (".ogv",),
    "asf": (".wmv",),
    "png": (".png",),
    "jpeg": (".jpg", ".jpeg"),
    "webp": (".webp",),
    "bmp": (".bmp",),
}
"""Container -> the endings of names that say so."""


class Opened(NamedTuple):
    """A clip whose frames can be read once: codec, container, frames [H,W,3] with the second at which each is shown."""

    codec: str
    container: str
    frames: Iterator[tuple[Frame, float]]


Reader = Callable[[Path], Opened]


def open_clip(path: Path) -> Opened:
    """A video or an image, told by its bytes, whatever it is called. Raises UserError, of a damaged file at the latest behind the last frame."""
    with open(path, "rb") as file:
        start = file.read(12)
    image = next((kind for magic, kind in MAGIC if start.startswith(magic)), "webp" if start[:4] == b"RIFF" and start[8:] == b"WEBP" else None)
    if image is not None:
        return Opened(image, image, iter([(read_image(path), 0.0)]))
    frames = timed_frames(path)
    first = next(frames)  # whatever is wrong with the file is told as it always is
    codec, container = _stream_of(path)
    return Opened(codec, container, _with(first, frames))


def _with(first: tuple[Frame, float], rest: Iterator[tuple[Frame, float]]) -> Iterator[tuple[Frame, float]]:
    yield first
    yield from rest


def _stream_of(path: Path) -> tuple[str, str]:
    """(codec, container) of a file that can be read."""
    import av

    options = {"format_whitelist": FORMATS, "protocol_whitelist": "file", "max_streams": str(MOST_STREAMS + 1), "enable_drefs": "0"}
    try:
        with av.open(str(path), options=options) as container:
            stream = next(each for each in container.streams.video if each.codec_context is not None)
            return str(stream.codec_context.codec.canonical_name), NAMED.get(container.format.name, container.format.name)
    except (av.error.FFmpegError, OSError, StopIteration) as error:
        raise UserError(f"cannot read the video: {type(error).__name__}, {path}. Copy or make it again") from error


# What is measured


@dataclass(frozen=True)
class Wanted:
    """What a worker finds out beside the measures. read: how a file is opened."""

    safety: bool = False
    filters: Filters = NONE
    faces: Path | None = None  # a YuNet detector, ONNX
    frames: int = 0  # so many small frames are handed on, for the encoder; none are
    side: int = 224  # their shorter side
    read: Reader = open_clip


class Picture(BaseModel):
    """A small frame on its way: [h,w,3], its bytes as base64."""

    shape: tuple[int, int, Literal[3]]
    pixels: str


class Answer(BaseModel):
    """What a worker may say of a clip. What it says is looked at before it is believed: it has read a file that came from anywhere."""

    model_config = ConfigDict(extra="forbid", strict=True)

    error: str = ""
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    bytes: int | None = None
    codec: str | None = None
    container: str | None = None
    width: int | None = None
    height: int | None = None
    scores: dict[str, float] = {}
    hashes: list[Annotated[str, Field(pattern=r"^([0-9a-f]{16}){0,12}$")]] = []
    thumbnails: list[str] = Field([], max_length=3)
    safety: str | None = None
    safety_reasons: list[str] = []
    faces: int | None = None
    seen: list[Picture] = []

    @field_validator("thumbnails")
    @classmethod
    def _are_bytes(cls, thumbnails: list[str]) -> list[str]:
        for each in thumbnails:
            base64.b64decode(each, validate=True)
        return thumbnails

    @field_validator("scores")
    @classmethod
    def _are_measures(cls, scores: dict[str, float]) -> dict[str, float]:
        if scores.keys() - MEASURES.keys():
            raise ValueError("no measures")
        return scores


def checked(answer: Mapping[str, Any]) -> dict[str, Any]:
    """A worker's answer as columns of the table."""
    try:
        return Answer.model_validate(answer).model_dump(exclude_unset=True)
    except ValueError:
        return {"error": "its worker answered with something that is no row"}


def measurer(wanted: Wanted) -> Measurer:
    """The work of a worker, in its process: on one thread."""
    import cv2

    cv2.setNumThreads(1)
    return Measurer(wanted)


class Measurer:
    """The work of a worker: `{"path", "name", "text"}` -> an `Answer`. Whatever is wrong with a file stands in `error`; nothing is raised for it."""

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self._runner = _runner(wanted.filters) if wanted.safety else None
        self._faces = None if wanted.faces is None else Faces(wanted.faces)

    def __call__(self, request: Mapping[str, Any]) -> dict[str, Any]:
        path, row = Path(request["path"]), dict[str, Any]()
        try:
            row |= {"sha256": file_hash(path), "bytes": path.stat().st_size}
            self._look(path, str(request["text"]), row)
        except UserError as error:
            row["error"] = reason_of(error, path).replace(str(path), str(request["name"]))
        except MemoryError:
            row["error"] = TOO_LARGE
        except OSError as error:
            row["error"] = f"cannot be read: {error.strerror or type(error).__name__}"
        except Exception as error:  # a measure that fails on some clip must not end the others
            row["error"] = TOO_LARGE if "allocate memory" in str(error) else f"cannot be measured: {type(error).__name__}: {' '.join(str(error).split())}"[:300]
        return row

    def _look(self, path: Path, text: str, row: dict[str, Any]) -> None:
        opened = self.wanted.read(path)
        row |= {"codec": opened.codec, "container": opened.container}
        size: list[int] = []
        some = Evenly(self.wanted.frames, self.wanted.side) if self.wanted.frames else None
        large = None if self._faces is None else Evenly(FACE_FRAMES, FACE_SIDE)
        windows = None if self._runner is None else Windows(self._runner, text)

        def watched() -> Iterator[tuple[Frame, float]]:
            for frame, time in opened.frames:
                size[:] = frame.shape[:2]
                for watcher in (some, large, windows):
                    if watcher is not None:
                        watcher.see(frame, time)
                yield frame, time

        found = measure(watched())
        row |= {"height": size[0], "width": size[1], "scores": found.scores, "hashes": list(found.hashes), "thumbnails": [_text_of(jpeg(each)) for each in found.thumbnails]}
        if windows is not None:
            row |= windows.verdict()
        if large is not None and self._faces is not None:
            row["faces"] = max(self._faces.count(frame) for frame in large.frames())
        if some is not None:
            row["seen"] = [{"shape": list(frame.shape), "pixels": _text_of(frame.tobytes())} for frame in some.frames()]


def _text_of(content: bytes) -> str:
    return base64.b64encode(content).decode()


def jpeg(frame: Frame) -> bytes:
    """[H,W,3] -> a JPEG file."""
    import cv2

    _, content = cv2.imencode(".jpg", frame[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, THUMBNAIL_QUALITY])
    return bytes(content)


def _smaller(frame: Frame, side: int, *, longest: bool) -> Frame:
    """[H,W,3] with its longest, or its shorter, side at most `side`; the mean of the pixels that fall together."""
    import cv2

    now = max(frame.shape[:2]) if longest else min(frame.shape[:2])
    if now <= side:
        return frame
    height, width = (max(1, round(each * side / now)) for each in frame.shape[:2])
    return np.asarray(cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA), np.uint8)


class Evenly:
    """Some frames, small, evenly spread over a clip whose length nobody knows: every n-th, n twice as large whenever twice as many as are wanted lie there."""

    def __init__(self, frames: int, side: int) -> None:
        self._wanted, self._side, self._step, self._seen = frames, side, 1, 0
        self._kept: list[Frame] = []

    def see(self, frame: Frame, time: float) -> None:
        if self._seen % self._step == 0:
            self._kept.append(_smaller(frame, self._side, longest=False).copy())
            if len(self._kept) > 2 * self._wanted:
                self._kept, self._step = self._kept[::2], 2 * self._step
        self._seen += 1

    def frames(self) -> list[Frame]:
        """At most as many as are wanted, in order."""
        count = len(self._kept)
        if count <= self._wanted:
            return self._kept
        return [self._kept[round(i * (count - 1) / max(self._wanted - 1, 1))] for i in range(self._wanted)]


# Safety


def _runner(filters: Filters) -> SafetyRunner:
    """Every filter that needs no weights, and those that are named, under the shipped policy."""
    policy = load_policy()
    return SafetyRunner([WordFilter(policy), FlashFilter(policy), DegenerateFilter(policy), *load_filters(filters, policy)], policy)


def safety_identity(filters: Filters) -> str:
    """Which filters rule, with versions and thresholds: rows of others are ruled on again."""
    runner = _runner(filters)
    told = ", ".join(sorted(f"{each['filter']} {each['version']} {each['threshold']} {each['policy_version']}" for each in runner.lineage()))
    runner.close()
    return told


class Windows:
    """The verdict of safety filters on a clip of any length, and on its caption: windows of four seconds of small frames, each beginning a second before the last one ended, for a
    hazard is what happens within a second. The worst ruling counts."""

    def __init__(self, runner: SafetyRunner, text: str) -> None:
        self._runner, self._text = runner, text
        self._held: deque[tuple[Frame, float]] = deque()
        self._fresh = 0  # frames that no window has shown yet
        self._found = runner.check_prompts([text]) if text.strip() else list[Decision]()
        self._reasons = [(0.0, decision) for decision in self._found]

    def see(self, frame: Frame, time: float) -> None:
        self._held.append((_smaller(frame, WINDOW_SIDE, longest=True).copy(), time))
        self._fresh += 1
        if time - self._held[0][1] >= WINDOW_SECONDS or len(self._held) >= WINDOW_FRAMES:
            self._rule()
            while len(self._held) > 1 and (time - self._held[0][1] > OVERLAP_SECONDS or len(self._held) > WINDOW_FRAMES // 2):
                self._held.popleft()

    def _rule(self) -> None:
        begin, end = self._held[0][1], self._held[-1][1]
        fps = (len(self._held) - 1) / (end - begin) if end > begin else 1.0
        video = torch.from_numpy(np.stack([frame for frame, _ in self._held])).permute(0, 3, 1, 2).float().div(255)  # [T,3,h,w]
        self._reasons += [(begin, decision) for decision in self._runner.check_videos(video[None], [self._text], fps)]
        self._fresh = 0

    def verdict(self) -> dict[str, Any]:
        """{"safety": the worst, "safety_reasons": why it is not better}."""
        if self._fresh:
            self._rule()
        worst = max((decision.verdict for _, decision in self._reasons), default=Verdict.ERROR)
        return {"safety": worst.name.lower(), "safety_reasons": list(dict.fromkeys(text for begin, decision in self._reasons for text in _reasons_of(decision, begin)))}


def _reasons_of(decision: Decision, begin: float) -> Iterator[str]:
    for ruling in decision.rulings:
        if ruling.verdict != Verdict.ALLOW:
            for reason in ruling.reasons or ():
                when = "" if reason.start is None or math.isnan(reason.start) else f" at {begin + reason.start:.1f} s"
                yield f"{ruling.verdict.name.lower()} {ruling.policy}: {reason.text}{when}"


# Faces


class Faces:
    """How many faces a frame shows, by a YuNet detector (an ONNX file for `cv2.FaceDetectorYN`). Raises UserError where the file is none."""

    def __init__(self, path: Path) -> None:
        import cv2

        try:
            self._detector: Any = cv2.FaceDetectorYN.create(str(path), "", (FACE_SIDE, FACE_SIDE), FACE_SCORE)
        except Exception as error:  # cv2.error, and what is under it
            raise UserError(f"no face detector that OpenCV reads, {path}. Give a YuNet model as ONNX") from error

    def count(self, frame: Frame) -> int:
        small = np.ascontiguousarray(_smaller(frame, FACE_SIDE, longest=True)[..., ::-1])  # [h,w,3] as BGR
        self._detector.setInputSize((small.shape[1], small.shape[0]))
        _, faces = self._detector.detect(small)
        return 0 if faces is None else len(faces)


# The encoder, where it is asked from


@dataclass(frozen=True)
class Looks:
    """A frozen encoder of frames and captions, and a linear head on its embedding of a frame, brought to length 1: how well a clip shows its caption, and how much people liked
    such pictures."""

    encoder: Encoder
    head: tuple[Tensor, Tensor] | None = None  # weight [D], bias []

    @property
    def identity(self) -> str:
        return self.encoder.identity

    @torch.no_grad()
    def columns(self, frames: Sequence[Frame], text: str) -> dict[str, Any]:
        """Frames of one size, evenly spread -> {"agreement", "aesthetic", "embedding"}: nan without a caption, None without a head."""
        video = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float().div(255)  # [F,3,h,w]
        tokens = self.encoder.clips(video[None].to(next(self.encoder.network.parameters()).device))  # [1,N,D]
        pictures = tokens[0] if isinstance(self.encoder, FrameEncoder) else tokens[0, :1]  # X-CLIP's first token is the clip's, patches follow
        each = torch.nn.functional.normalize(pictures.float().cpu(), dim=-1)  # [F,D]
        agreement = float(self.encoder.cosines(tokens, self.encoder.texts([text]))) if text.strip() else math.nan
        aesthetic = None if self.head is None else float((each @ self.head[0] + self.head[1]).mean())
        return {"agreement": agreement, "aesthetic": aesthetic, "embedding": torch.nn.functional.normalize(each.mean(0), dim=0).tolist()}


def load_looks(checkpoint: str, aesthetic: Path | None) -> Looks:
    """Raises UserError where the encoder reads no text, or the head is not for its embedding."""
    encoder = load_encoder(checkpoint, fps=1.0)  # frames come from clips of any rate
    if not encoder.reads_text:
        raise UserError(f"the encoder {checkpoint} reads no text, agreement. Give CLIP, SigLIP or X-CLIP")
    if torch.cuda.is_available():
        encoder.network.to("cuda")
    return Looks(encoder, None if aesthetic is None else _head(aesthetic, encoder.shape[1]))


def _head(path: Path, width: int) -> tuple[Tensor, Tensor]:
    tensors, _ = load_weights(path)
    weights = [tensor for tensor in tensors.values() if tensor.numel() == width]
    biases = [tensor for tensor in tensors.values() if tensor.numel() == 1]
    if len(weights) != 1 or len(tensors) != 1 + len(biases) or len(biases) > 1:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise UserError(f"no linear head on {width} numbers: it holds {shapes}, {path}. Give a weight [1,{width}] and a bias [1], or another --agreement")
    return weights[0].float().flatten(), biases[0].float().reshape(()) if biases else torch.zeros(())


def seen_of(row: dict[str, Any]) -> list[Frame]:
    """Takes the small frames that a worker handed on out of its row."""
    return [np.frombuffer(base64.b64decode(each["pixels"]), np.uint8).reshape(each["shape"]) for each in row.pop("seen", [])]


def measures_identity() -> str:
    """Which measures there are, and how they are taken: rows of others are measured again."""
    return hashlib.sha256(repr((VERSION, sorted(MEASURES.items()))).encode()).hexdigest()[:16]

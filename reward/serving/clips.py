"""From a request's body to clips: what is too large is refused before anything is decoded, and only files below the folders that were allowed are opened.

A request that asks for what it may not is refused whole (`Refused`). A clip that cannot be had, or is not what was promised, is `Unscored` with its reason,
and the others are scored.
"""

from __future__ import annotations

import base64
import errno
import json
import math
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from torch import Tensor

from base_model.errors import UserError
from base_model.video.files import Bounds, decode_video
from reward.judges.exchange import one_line
from reward.serving.batching import Unscored
from reward.serving.wire import SCHEMA, Limits
from reward.types import same_rate


class Refused(Exception):
    """The whole request is turned down, with an HTTP status and one line."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(one_line(reason))
        self.status = status


@dataclass(frozen=True)
class Request:
    """What is to be scored: B clips at `fps`, each uint8 [T,3,H,W] or the reason why there is none, and their prompts."""

    fps: float
    clips: list[Tensor | Unscored]
    prompts: list[str]


def read_tensors(body: bytes, limits: Limits, served: float) -> Request:
    """A body of safetensors, for a model that scores clips of `served` frames a second. Raises Refused."""
    import safetensors.torch

    try:
        tensors = safetensors.torch.load(body)
        told = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])["__metadata__"]
        version, fps, prompts = told["schema"], float(told["fps"]), json.loads(told["prompts"])
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError, RuntimeError) as error:
        raise Refused(400, f"no safetensors with the metadata schema, fps and prompts: {type(error).__name__}: {error}") from error
    video = tensors.get("video")
    if version != str(SCHEMA) or video is None or len(tensors) != 1:
        raise Refused(400, f"schema {SCHEMA} holds one tensor, video; got schema {version} and {', '.join(tensors) or 'none'}")
    if video.dtype != torch.uint8 or video.ndim != 5 or video.shape[2] != 3 or 0 in video.shape:
        raise Refused(400, f"video is uint8 [B,T,3,H,W], not {str(video.dtype).removeprefix('torch.')} {list(video.shape)}")
    if not isinstance(prompts, list) or len(prompts) != len(video) or not all(isinstance(prompt, str) for prompt in prompts):
        raise Refused(400, f"prompts are a list of {len(video)} texts, one a clip")
    check_rate(fps, served)
    check_counts(len(video), prompts, limits)
    _, frames, _, height, width = video.shape
    if frames > limits.frames or len(video) * frames * height * width > limits.pixels:
        size = f"{len(video)} clips of {frames} frames of {width}x{height}"
        raise Refused(413, f"{size} are more than the limit of {limits.frames} frames a clip and {limits.pixels} pixels in all")
    return Request(fps, list(video), prompts)


class _Clip(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    prompt: str
    path: Annotated[str, Field(max_length=4096)] | None = None
    mp4: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> _Clip:
        if (self.path is None) == (self.mp4 is None):
            raise ValueError("a clip has either a path or mp4")
        return self


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    version: Annotated[Literal[1], Field(alias="schema")]
    fps: float
    clips: list[_Clip]


_BODY = TypeAdapter(_Body)


def read_json(body: bytes, limits: Limits, served: float, roots: Sequence[Path]) -> Request:
    """A body of JSON, for a model that scores clips of `served` frames a second: its clips decoded, from files below `roots` or from what it holds. Raises Refused."""
    try:
        asked = _BODY.validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise Refused(400, f"{'.'.join(map(str, first['loc'])) or 'the body'}: {first['msg']}") from error
    prompts = [clip.prompt for clip in asked.clips]
    check_rate(asked.fps, served)
    check_counts(len(asked.clips), prompts, limits)
    files = [None if clip.path is None else below(clip.path, roots) for clip in asked.clips]
    clips: list[Tensor | Unscored] = []
    for row, (clip, file) in enumerate(zip(asked.clips, files, strict=True)):
        left = limits.pixels - sum(each.numel() // 3 for each in clips if isinstance(each, Tensor))
        try:
            content = file.read(limits.body_bytes) if file else base64.b64decode(clip.mp4 or "", validate=True)
            clips.append(decoded(content, f"clip {row}", asked.fps, Bounds(limits.frames, left)))
        except (UserError, ValueError) as error:  # what is no base64 is a ValueError
            clips.append(Unscored(one_line(str(error))))
    return Request(asked.fps, clips, prompts)


def decoded(content: bytes, name: str, fps: float, bounds: Bounds) -> Tensor:
    """A file's content -> uint8 [T,3,H,W]. Raises UserError where it is no clip, too large, or at another rate than `fps`."""
    try:
        video = decode_video(content, name, bounds)
    except UserError:
        raise
    except Exception as error:  # a decoder meets what nobody foresaw
        raise UserError(f"cannot decode {name}: {type(error).__name__}: {error}. Encode it again") from error
    if not same_rate(video.fps, fps):
        raise UserError(f"{name} runs at {video.fps:g} frames a second, and the request says {fps:g}. Resample it, or say its rate")
    return torch.from_numpy(video.frames).permute(0, 3, 1, 2).contiguous()


def check_counts(clips: int, prompts: Sequence[str], limits: Limits) -> None:
    """Raises Refused for no clip, more clips, or a longer prompt than a request may bring."""
    if not 1 <= clips <= limits.clips:
        raise Refused(413 if clips else 400, f"{clips} clips in a request, where 1 to {limits.clips} belong")
    if max(map(len, prompts)) > limits.prompt:
        raise Refused(413, f"a prompt of {max(map(len, prompts))} characters is longer than the limit of {limits.prompt}")


def check_rate(asked: float, served: float) -> None:
    """Raises Refused where clips run at another rate than the model is served for."""
    if not (math.isfinite(asked) and same_rate(asked, served)):
        raise Refused(422, f"the model scores clips of {served:g} frames a second, and these have {asked:g}: at another rate its scores mean something else")


# Files


@dataclass(frozen=True)
class FileBelow:
    """A file known by the folder it lies below and the names that lead to it, none of which was a link when it was looked up."""

    root: Path
    parts: tuple[str, ...]

    def read(self, most: int) -> bytes:
        """Its bytes. Each folder is opened from the one above without following links, so nothing put in its way since can lead elsewhere.

        Raises UserError where it is gone, no file, may not be read, or is larger than `most`.
        """
        try:
            return self._read(most)
        except OSError as error:
            reason = "a link was put in its way" if error.errno == errno.ELOOP else error.strerror
            raise UserError(f"cannot read the clip: {reason}, {self}. Check the path") from error

    def _read(self, most: int) -> bytes:
        folder = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for part in self.parts[:-1]:
                deeper = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
                os.close(folder)
                folder = deeper
            with os.fdopen(os.open(self.parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder), "rb") as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise UserError(f"not a file, {self}. Name a clip")
                if status.st_size > most:
                    raise UserError(f"{status.st_size} bytes are more than the limit of {most}, {self}. Give a smaller file")
                return file.read(most)
        finally:
            os.close(folder)

    def __str__(self) -> str:
        return str(Path(*self.parts))


def below(path: str, roots: Sequence[Path]) -> FileBelow:
    """Where `path` leads once links are followed, if that is below one of `roots`, which are resolved. Raises Refused, in the same words whether it is there or not."""
    try:
        found = Path(path)
        real = found.resolve() if found.is_absolute() else None
    except (OSError, RuntimeError, ValueError):
        real = None
    for root in roots:
        if real is not None and real != root and real.is_relative_to(root):
            return FileBelow(root, real.relative_to(root).parts)
    raise Refused(403, f"not an absolute path below a folder that this server may read, {path!r}")


def allowed_roots(folders: Sequence[Path]) -> tuple[Path, ...]:
    """The folders with links followed. Raises UserError where one is no folder, or is the whole disk."""
    roots = []
    for folder in folders:
        try:
            real = folder.resolve(strict=True)
        except (OSError, RuntimeError) as error:
            raise UserError(f"no such folder, {folder}, in --allow. Name folders with clips") from error
        if not real.is_dir() or real == Path(real.anchor):
            raise UserError(f"not a folder with clips, {folder}, in --allow. Name folders that hold clips and nothing else")
        roots.append(real)
    return tuple(roots)

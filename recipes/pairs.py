"""Captioned clips on disk, and the latents that supervised training reads, encoded once before the first step."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from base_model.checkpoint import load_weights, save_weights
from base_model.errors import UserError
from base_model.networks.packing import Patch, token_grid
from base_model.tiny import LatentVideoModel
from base_model.types import Conditioning
from base_model.video.files import cover, from_uint8, read_video, resample_fps, to_uint8, write_atomic
from recipes.clip_folder import inside
from recipes.examples import Shape
from recipes.shapes.dataset import ClipSet, by_shape

VIDEOS = "videos.safetensors"


@dataclass(frozen=True)
class Pairs:
    """N captions, their clips' latents [C,F,H,W] of any sizes, and the clips themselves, uint8 [T,3,H,W], which visual prompts are cut from. `Examples`, all of them in memory."""

    texts: tuple[str, ...]
    latents: tuple[Tensor, ...]
    videos: tuple[Tensor, ...]
    encode_text: Callable[[Sequence[str]], Conditioning] | None = None

    @property
    def shapes(self) -> Sequence[Shape]:
        return [cast(Shape, tuple(x.shape)) for x in self.latents]

    @property
    def sources(self) -> Sequence[str]:
        return [f"{row:06d}" for row in range(len(self))]

    def latent(self, row: int) -> Tensor:
        return self.latents[row]

    def video(self, row: int) -> Tensor:
        return self.videos[row]

    def cond(self, row: int | None) -> Conditioning:
        assert self.encode_text is not None, "these pairs were made without a text encoder"
        return self.encode_text(["" if row is None else self.texts[row]])

    def __len__(self) -> int:
        return len(self.texts)

    def num_tokens(self, patch: Patch) -> list[int]:
        """Tokens of each clip."""
        grids = [token_grid(x.shape, patch) for x in self.latents]
        return [f * h * w for f, h, w in grids]


def encode_pairs(model: LatentVideoModel, clips: ClipSet, *, batch: int = 64) -> Pairs:
    """Encodes clips of one size together, and all captions in one fixed order: the same states in every run, resumed or not."""
    latents: dict[int, Tensor] = {}
    for rows in by_shape(clips.videos).values():
        for begin in range(0, len(rows), batch):
            part = rows[begin : begin + batch]
            video = torch.stack([clips.videos[i] for i in part]).float() / 255  # [b,T,3,H,W]
            latents.update(zip(part, model.encode(video).cpu(), strict=True))
    model.encode_text(["", *clips.texts])
    return Pairs(clips.texts, tuple(latents[i] for i in range(len(clips))), clips.videos, model.encode_text)


def save_pairs(folder: Path, clips: ClipSet) -> None:
    """`captions.jsonl`, one line a clip, and its exact frames in `videos.safetensors` (uint8 [T,3,H,W], "000000" for the first line)."""
    save_weights(folder / VIDEOS, {f"{i:06d}": video for i, video in enumerate(clips.videos)}, {})
    write_atomic(folder / "captions.jsonl", "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in clips.texts).encode())


def is_pairs(folder: Path) -> bool:
    """Whether `save_pairs` made that folder, and not a user, out of files."""
    return (folder / VIDEOS).exists()


def load_pairs(folder: Path) -> ClipSet:
    """What `save_pairs` wrote. Raises UserError for a folder that is missing, empty or damaged."""
    videos, _ = load_weights(folder / VIDEOS)
    try:
        texts = tuple(json.loads(line)["text"] for line in (folder / "captions.jsonl").read_text(encoding="utf-8").split("\n") if line)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"damaged captions, {folder / 'captions.jsonl'}: {error}. Make the folder again") from error
    if not texts or len(texts) != len(videos):
        raise UserError(f"{len(texts)} captions for {len(videos)} clips, {folder}. Make the folder again")
    names = [f"{i:06d}" for i in range(len(texts))]
    odd = [name for name in names if name not in videos or videos[name].dtype != torch.uint8 or videos[name].dim() != 4 or videos[name].shape[1] != 3]
    if odd or not all(isinstance(text, str) for text in texts):
        raise UserError(f"clip or caption {odd[0] if odd else 'of another type'} is not what was saved, {folder}. Make the folder again")
    return ClipSet(texts, tuple(videos[name] for name in names))


def native_size(width: int, height: int, *, sides: Sequence[int] = range(16, 65, 8), tokens: int = 24) -> tuple[int, int]:
    """(height, width) in multiples of 8 whose aspect is nearest to the given one with at most `tokens` tokens a latent frame (8x8 pixels each); the larger of two equals."""
    fitting = [(h, w) for h in sides for w in sides if (h // 8) * (w // 8) <= tokens]
    return min(fitting, key=lambda size: (round(abs(size[1] / size[0] - width / height), 2), -size[0] * size[1]))


def to_native_size(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 [H,W,3] -> [h,w,3] of the native size with its aspect."""
    height, width = native_size(frame.shape[1], frame.shape[0])
    return to_uint8(cover(from_uint8(frame[None]), height, width))[0]


def read_clip_folder(folder: Path, *, frames: int, fps: float, every: int = 6) -> ClipSet:
    """Real clips with captions (`metadata.jsonl` with `file_name` and `text`, the layout of datasets' videofolder) as windows of `frames` frames at `fps`.

    Each clip is resampled from its own frame rate, so that a window lasts as long and flashes as fast as it says. Clips keep their aspect and are
    resized to the token budget. Raises UserError for a folder without clips, a broken clip, a clip that is too short.
    """
    table = folder / "metadata.jsonl"
    if not table.is_file():
        raise UserError(f'no metadata.jsonl, {folder}. Give a folder with clips and a metadata.jsonl of lines like {{"file_name": "a.mp4", "text": "..."}}')
    texts: list[str] = []
    videos: list[Tensor] = []
    for row in _caption_rows(table):
        video = read_video(inside(folder, row["file_name"]), shrink=to_native_size)
        small = resample_fps(torch.from_numpy(video.frames).permute(0, 3, 1, 2), video.fps, fps)  # [T,3,h,w]
        if len(small) < frames:
            lasts = f"{len(video.frames)} frames at {video.fps:g} a second, {len(small)} at {fps:g}"
            raise UserError(f"{folder / row['file_name']} has {lasts}; a window needs {frames}. Leave the clip out of {table.name}")
        starts = range(0, len(small) - frames + 1, every)
        videos += [small[begin : begin + frames] for begin in starts]
        texts += [row["text"]] * len(starts)
    return ClipSet(tuple(texts), tuple(videos))


def _caption_rows(table: Path) -> list[dict[str, str]]:
    from datasets import load_dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        rows = [dict(row) for row in load_dataset("json", data_files=glob.escape(str(table)), split="train", streaming=True)]
    except Exception as error:
        raise UserError(f"cannot read {table}: {error}. Write one JSON object a line") from error
    if not rows or any(not isinstance(row.get(key), str) or not row[key].strip() for row in rows for key in ("file_name", "text")):
        raise UserError(f"{table} is empty or has a line without `file_name` and `text`. Write both for every clip")
    return rows

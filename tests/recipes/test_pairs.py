"""Captioned clips on disk: what goes in comes out, and a folder speaks for nothing outside it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from base_model.checkpoint import save_weights
from base_model.errors import UserError
from base_model.video import files
from base_model.video.files import write_mp4
from recipes import demo
from recipes.generate import safety_runner
from recipes.pairs import load_pairs, read_clip_folder, save_pairs
from recipes.shapes.dataset import ClipSet


def clip_folder(folder: Path, name: str = "a.mp4", text: str = "a horse runs") -> Path:
    folder.mkdir()
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": text}, ensure_ascii=False) + "\n")
    write_mp4(folder / "a.mp4", torch.rand(14, 3, 32, 48), 12.0)
    return folder


@pytest.mark.parametrize("text", ["one\u2028two", "one\u2029two", "one\x85two", "one\ntwo\r\n", "\x1c\x0b\x0c", " \U0001f600 "])
def test_captions_come_back_with_every_odd_character(text: str, tmp_path: Path) -> None:
    clips = ClipSet((text, "plain"), (torch.zeros(5, 3, 16, 16, dtype=torch.uint8),) * 2)
    save_pairs(tmp_path, clips)
    assert load_pairs(tmp_path).texts == clips.texts
    if text.strip():
        assert set(read_clip_folder(clip_folder(tmp_path / "real", text=text), frames=5, fps=12.0).texts) == {text}


@pytest.mark.parametrize("tensors", [{"clip": torch.zeros(5, 3, 16, 16, dtype=torch.uint8)}, {"000000": torch.zeros(5, 3, 16, 16)}, {"000000": torch.zeros(3, dtype=torch.uint8)}])
def test_other_tensors_than_saved_clips_are_refused(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_weights(tmp_path / "videos.safetensors", tensors, {})
    (tmp_path / "captions.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match="Make the folder again"):
        load_pairs(tmp_path)


@pytest.mark.parametrize("name", ["../b.mp4", "{tmp}/b.mp4", "link.mp4", "sub/../../b.mp4", "a\0.mp4", "x" * 300])
def test_a_clip_outside_its_folder_is_refused(name: str, tmp_path: Path) -> None:
    folder = clip_folder(tmp_path / "clips", name.replace("{tmp}", str(tmp_path)))
    (folder / "a.mp4").rename(tmp_path / "b.mp4")
    (folder / "link.mp4").symlink_to(tmp_path / "b.mp4")
    (folder / "sub").mkdir()
    with pytest.raises(UserError):
        read_clip_folder(folder, frames=5, fps=12.0)


@pytest.mark.parametrize("name", ["a[b]c", "a*b", "a?b", "x=1", "**"])
def test_a_folder_is_read_whatever_its_name(name: str, tmp_path: Path) -> None:
    for other in ("aab", "abc"):
        clip_folder(tmp_path / other, text="another folder")
    assert set(read_clip_folder(clip_folder(tmp_path / name), frames=5, fps=12.0).texts) == {"a horse runs"}


def test_a_long_clip_of_large_frames_never_lies_in_memory_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = clip_folder(tmp_path / "clips")
    largest, stack = 0, np.stack

    def watched(frames: list[np.ndarray]) -> np.ndarray:  # type: ignore[type-arg]
        nonlocal largest
        largest = max(largest, sum(frame.nbytes for frame in frames))
        return stack(frames)

    write_mp4(folder / "a.mp4", torch.rand(14, 3, 270, 480), 12.0, upscale=False)
    monkeypatch.setattr(files.np, "stack", watched)
    clips = read_clip_folder(folder, frames=5, fps=12.0)
    assert max(clips.videos[0].shape[2:]) <= 64
    assert 0 < largest <= 14 * 64 * 64 * 3


def test_clips_are_brought_to_the_rate_at_which_the_filters_judge_them(tmp_path: Path) -> None:
    """On screen for half a second each, black and white change too slowly to be flashes; read at one frame a frame they would be five times as fast."""
    folder = clip_folder(tmp_path / "clips")
    halves = (torch.arange(240) // 30 % 2).float()[:, None, None, None].expand(-1, 3, 32, 32) * 0.8 + 0.1  # four seconds at 60 a second
    write_mp4(folder / "a.mp4", halves, 60.0)
    clips = read_clip_folder(folder, frames=13, fps=12.0)
    changes = (clips.videos[0].float().mean((1, 2, 3)).diff().abs() > 100).sum()
    assert changes == 2 and len(clips) == (48 - 13) // 6 + 1
    flicker = (torch.arange(240) // 5 % 2).float()[:, None, None, None].expand(-1, 3, 32, 32) * 0.8 + 0.1  # six flashes a second
    write_mp4(folder / "a.mp4", flicker, 60.0)
    assert not len(demo.curate(read_clip_folder(folder, frames=13, fps=12.0), safety_runner(), 12.0))
    with pytest.raises(UserError, match="240 frames at 60 a second, 48 at 12"):
        read_clip_folder(folder, frames=49, fps=12.0)

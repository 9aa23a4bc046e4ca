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
        assert set(read_clip_folder(clip_folder(tmp_path / "real", text=text), frames=5).texts) == {text}


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
        read_clip_folder(folder, frames=5)


@pytest.mark.parametrize("name", ["a[b]c", "a*b", "a?b", "x=1", "**"])
def test_a_folder_is_read_whatever_its_name(name: str, tmp_path: Path) -> None:
    for other in ("aab", "abc"):
        clip_folder(tmp_path / other, text="another folder")
    assert set(read_clip_folder(clip_folder(tmp_path / name), frames=5).texts) == {"a horse runs"}


def test_a_long_clip_of_large_frames_never_lies_in_memory_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = clip_folder(tmp_path / "clips")
    largest, stack = 0, np.stack

    def watched(frames: list[np.ndarray]) -> np.ndarray:  # type: ignore[type-arg]
        nonlocal largest
        largest = max(largest, sum(frame.nbytes for frame in frames))
        return stack(frames)

    write_mp4(folder / "a.mp4", torch.rand(14, 3, 270, 480), 12.0, upscale=False)
    monkeypatch.setattr(files.np, "stack", watched)
    clips = read_clip_folder(folder, frames=5)
    assert max(clips.videos[0].shape[2:]) <= 64
    assert 0 < largest <= 14 * 64 * 64 * 3

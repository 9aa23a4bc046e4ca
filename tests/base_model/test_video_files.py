"""Video files: what is written comes back, what is broken is named, and nothing is left half-written."""

from __future__ import annotations

import io
import resource
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from base_model.errors import UserError
from base_model.video import files
from base_model.video.files import (
    Bounds,
    center_crop,
    cover,
    decode_video,
    digest_of,
    each_frame,
    from_uint8,
    mp4_bytes,
    read_lossless,
    read_video,
    resample_fps,
    resize,
    timed_frames,
    to_uint8,
    write_lossless,
    write_mp4,
)


def noise(frames: int, height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


@contextmanager
def file_size_limit(most: int) -> Iterator[None]:
    """No file may grow beyond `most` bytes: a write fails in its middle, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def moving_disc(frames: int = 13, side: int = 32) -> NDArray[np.uint8]:
    y, x = np.mgrid[:side, :side]
    clip = np.full((frames, side, side, 3), 60, np.uint8)
    for t in range(frames):
        clip[t][(x - 6 - 1.5 * t) ** 2 + (y - 16) ** 2 < 36] = (200, 40, 40)
    return clip


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 32, 32), (2, 3, 5), (13, 17, 33), (25, 16, 48)])
@pytest.mark.parametrize("fps", [12, 24000 / 1001, 0.5])
def test_lossless_files_give_back_every_bit_and_the_rate(tmp_path: Path, shape: tuple[int, int, int], fps: float) -> None:
    clip = noise(*shape)
    write_lossless(tmp_path / "clip.mkv", clip, fps)
    video = read_lossless(tmp_path / "clip.mkv")
    assert np.array_equal(video.frames, clip)
    assert video.fps == pytest.approx(fps, rel=1e-4)


def test_float_clips_round_to_the_nearest_level_and_survive_a_round_trip_exactly(tmp_path: Path) -> None:
    clip = torch.rand(5, 3, 8, 8)
    write_lossless(tmp_path / "clip.mkv", clip, 12)
    back = from_uint8(read_lossless(tmp_path / "clip.mkv").frames)
    assert torch.equal(back, (clip * 255).round() / 255)
    assert np.array_equal(to_uint8(back), read_lossless(tmp_path / "clip.mkv").frames)


def test_the_same_clip_makes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_lossless(tmp_path / f"{name}.mkv", moving_disc(), 12)
        write_mp4(tmp_path / f"{name}.mp4", moving_disc(), 12)
    assert (tmp_path / "a.mkv").read_bytes() == (tmp_path / "b.mkv").read_bytes()
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_a_preview_is_large_enough_to_see_and_close_to_the_clip(tmp_path: Path) -> None:
    write_mp4(tmp_path / "clip.mp4", moving_disc(), 12)
    video = read_video(tmp_path / "clip.mp4")
    assert video.frames.shape == (13, 128, 128, 3) and video.fps == 12
    assert np.abs(video.frames[:, 2::4, 2::4].astype(int) - moving_disc()).mean() < 1  # the middles of the enlarged pixels


def test_the_index_of_an_mp4_stands_in_front_of_its_data_also_for_long_clips(tmp_path: Path) -> None:
    for frames in (1, 400):
        write_mp4(tmp_path / "clip.mp4", noise(frames, 4, 4), 30, upscale=False)
        data = (tmp_path / "clip.mp4").read_bytes()
        assert 0 < data.index(b"moov") < data.index(b"mdat")
        assert len(read_video(tmp_path / "clip.mp4").frames) == frames


@pytest.mark.parametrize(("height", "width"), [(1, 1), (33, 51), (130, 131)])
def test_odd_sides_are_written_with_the_last_pixels_repeated(tmp_path: Path, height: int, width: int) -> None:
    write_mp4(tmp_path / "clip.mp4", noise(2, height, width), 12, upscale=False)
    assert read_video(tmp_path / "clip.mp4").frames.shape == (2, height + height % 2, width + width % 2, 3)


def test_reading_stops_at_max_frames(tmp_path: Path) -> None:
    write_mp4(tmp_path / "clip.mp4", moving_disc(), 12)
    assert len(read_video(tmp_path / "clip.mp4", max_frames=4).frames) == 4


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
def test_a_file_cut_anywhere_is_refused_or_complete(tmp_path: Path, suffix: str) -> None:
    (write_lossless if suffix == "mkv" else write_mp4)(tmp_path / f"whole.{suffix}", moving_disc(), 12)
    read = read_lossless if suffix == "mkv" else read_video
    whole, data = read(tmp_path / f"whole.{suffix}").frames, (tmp_path / f"whole.{suffix}").read_bytes()
    cut = tmp_path / f"cut.{suffix}"
    refused = 0
    for length in range(0, len(data), 41):
        cut.write_bytes(data[:length])
        try:
            assert np.array_equal(read(cut).frames, whole)
        except UserError as error:
            refused += 1
            assert str(cut) in str(error) and "\n" not in str(error)
    assert refused >= 0.95 * len(range(0, len(data), 41))


def test_a_flipped_bit_never_changes_a_lossless_clip_unnoticed(tmp_path: Path) -> None:
    write_lossless(tmp_path / "whole.mkv", moving_disc(), 12)
    data = (tmp_path / "whole.mkv").read_bytes()
    for position in range(0, len(data), 37):
        damaged = bytearray(data)
        damaged[position] ^= 0x40
        (tmp_path / "damaged.mkv").write_bytes(damaged)
        try:
            assert np.array_equal(read_lossless(tmp_path / "damaged.mkv").frames, moving_disc())
        except UserError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("name", "content", "says"), [("missing.mp4", None, "no such"), ("empty.mp4", b"", "empty"), ("text.mp4", b"hello " * 99, "cannot read"), (".", None, "folder")]
)
def test_what_is_no_video_is_named_in_one_line(tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        read_video(tmp_path / name)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_sound_file_has_no_video(tmp_path: Path) -> None:
    import wave

    with wave.open(str(tmp_path / "sound.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(b"\0\0" * 800)
    with pytest.raises(UserError, match="no video stream"):
        read_video(tmp_path / "sound.wav")


def test_pixels_that_are_no_numbers_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    clip = torch.rand(3, 3, 8, 8)
    clip[1, 0, 0, 0] = torch.nan
    for write in (write_lossless, write_mp4):
        with pytest.raises(UserError, match="nan or infinite"):
            write(tmp_path / "clip", clip, 12)
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_made_and_one_that_cannot_be_is_named_without_talk_of_space(tmp_path: Path) -> None:
    write_lossless(tmp_path / "new" / "clip.mkv", moving_disc(), 12)
    assert np.array_equal(read_lossless(tmp_path / "new" / "clip.mkv").frames, moving_disc())
    with pytest.raises(UserError, match=r"cannot write .*inside.clip\.mkv: Not a directory\. Choose a place you may write to"):
        write_lossless(tmp_path / "new" / "clip.mkv" / "inside" / "clip.mkv", moving_disc(), 12)


def test_a_full_disk_gives_one_line_and_leaves_the_old_file_alone(tmp_path: Path) -> None:
    write_lossless(tmp_path / "clip.mkv", moving_disc(), 12)
    before = (tmp_path / "clip.mkv").read_bytes()
    with file_size_limit(4096), pytest.raises(UserError, match="cannot write") as caught:
        write_lossless(tmp_path / "clip.mkv", noise(13, 32, 32), 12)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "clip.mkv").read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["clip.mkv"]


def test_shrinking_averages_and_keeps_the_mean() -> None:
    board = torch.zeros(1, 3, 32, 32)
    board[..., ::2, ::2] = board[..., 1::2, 1::2] = 1
    small = resize(board, 8, 8)
    assert small.shape == (1, 3, 8, 8)
    torch.testing.assert_close(small[..., 1:-1, 1:-1], torch.full((1, 3, 6, 6), 0.5), atol=1e-5, rtol=0)


def test_cover_keeps_the_aspect_and_takes_the_middle() -> None:
    ramp = torch.linspace(0, 1, 64).expand(1, 3, 32, 64)
    fitted = cover(ramp, 16, 16)
    assert fitted.shape == (1, 3, 16, 16)
    torch.testing.assert_close(fitted[0, 0, 0, [0, -1]], torch.tensor([16.5, 46.5]) / 63, atol=0.01, rtol=0)
    assert center_crop(ramp, 2, 4).shape == (1, 3, 2, 4)
    with pytest.raises(ValueError, match="cannot crop"):
        center_crop(ramp, 33, 4)


@pytest.mark.parametrize(
    ("fps", "to", "expected"), [(12, 12, [0, 1, 2, 3, 4, 5]), (12, 6, [0, 2, 4]), (6, 12, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]), (12, 0.1, [0]), (24, 10, [0, 2])]
)
def test_another_rate_shows_the_frame_that_was_on_screen(fps: float, to: float, expected: list[int]) -> None:
    clip = torch.arange(6.0)[:, None, None, None].expand(6, 3, 1, 1)
    assert resample_fps(clip, fps, to)[:, 0, 0, 0].tolist() == expected


def test_real_clips_are_read(real_data: Path) -> None:
    clips = sorted(real_data.rglob("*.mp4"))
    assert clips
    for path in clips:
        video = read_video(path, max_frames=3)
        assert len(video.frames) == 3 and video.fps > 0


@pytest.mark.parametrize("how", [{}, {"max_frames": 8}, {"seconds": 0.6}, {"shrink": lambda frame: frame[:16, :16]}, {"max_frames": 8, "shrink": lambda frame: frame[:16, :16]}])
def test_frames_that_change_their_size_are_refused_however_they_are_read(how: dict[str, Any], tmp_path: Path) -> None:
    """A stream of six frames of 32x32, and one of 64x64 behind it."""
    import av

    path, stream = tmp_path / "two.h264", io.BytesIO()
    for side in (32, 64):
        with av.open(stream, "w", format="h264") as container:
            coded = container.add_stream("libx264", rate=12, options={"tune": "zerolatency"})
            coded.width = coded.height = side
            coded.pix_fmt = "yuv420p"
            for k in range(6):
                container.mux(coded.encode(av.VideoFrame.from_ndarray(np.full((side, side, 3), 20 * k, np.uint8), format="rgb24")))
            container.mux(coded.encode())
    path.write_bytes(stream.getvalue())
    with pytest.raises(UserError, match=r"the frames change their size, .*two\.h264"):
        read_video(path, **how)
    assert len(read_video(path, max_frames=6).frames) == 6, "what is behind is not looked at"
    with pytest.raises(UserError, match="change their size"):
        list(each_frame(path))


def test_frames_that_are_looked_at_one_by_one_may_be_an_hour_of_full_hd_and_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert files.STREAMED.frames >= 25 * 3600 and files.STREAMED.pixels >= 25 * 3600 * 1920 * 1080 > files.LOCAL.pixels
    write_mp4(tmp_path / "clip.mp4", moving_disc(), 12)
    for frames, seen in ((13, 13), (5, 0)):
        monkeypatch.setattr(files, "STREAMED", Bounds(frames, 1 << 30))
        for read in (each_frame, timed_frames):
            with nullcontext() if seen else pytest.raises(UserError, match="more than the limit of 5 frames"):
                assert sum(1 for _ in read(tmp_path / "clip.mp4")) == seen
    assert len(read_video(tmp_path / "clip.mp4").frames) == 13


def test_a_clip_in_memory_is_the_clip_in_its_file_and_no_larger_than_its_bounds(tmp_path: Path) -> None:
    video = moving_disc()
    write_mp4(tmp_path / "clip.mp4", video, 12)
    write_lossless(tmp_path / "clip.mkv", video, 12)
    assert mp4_bytes(video, 12) == (tmp_path / "clip.mp4").read_bytes()
    for path in (tmp_path / "clip.mp4", tmp_path / "clip.mkv"):
        whole = read_video(path)
        count, height, width, _ = whole.frames.shape
        exact = Bounds(count, count * height * width)
        found = decode_video(path.read_bytes(), "sent", exact)
        assert np.array_equal(found.frames, whole.frames) and found.fps == whole.fps
        for bounds in (exact._replace(frames=count - 1), exact._replace(pixels=exact.pixels - 1)):
            with pytest.raises(UserError, match=f"frame {count} of {width}x{height} is more than the limit of .*, sent"):
                decode_video(path.read_bytes(), "sent", bounds)
    changed = bytearray((tmp_path / "clip.mkv").read_bytes())
    at = changed.index(digest_of(video).encode())
    changed[at] ^= 1
    with pytest.raises(UserError, match="are not the ones that were written, sent"):
        decode_video(bytes(changed), "sent", Bounds(100, 10**7))

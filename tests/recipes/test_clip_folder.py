"""A user's folder of clips: which are used and why others are not, and that no frame is left out but what the report counts."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from base_model.errors import UserError
from base_model.families import cogvideox, hunyuan_video, ltx, mochi, wan
from base_model.types import ClipShape, TrainableModel
from base_model.video.files import Frame, cover, from_uint8, read_image, read_video, write_mp4
from recipes import clip_folder
from recipes.clip_folder import Cut, Dropped, Facts, Named, Span, Windows, all_windows, cut_for, find_clips, fit, read_frames, some_windows
from tests.base_model.families import tiny_cogvideox, tiny_hunyuan_video, tiny_ltx, tiny_mochi, tiny_wan
from tests.recipes.small import small_model

CPU = torch.device("cpu")
FAMILIES = {
    "wan": (wan, tiny_wan.text_to_video),
    "ltx": (ltx, tiny_ltx.tiny_pipeline),
    "cogvideox": (cogvideox, tiny_cogvideox.tiny_pipeline),
    "cogvideox-1.5": (cogvideox, lambda: tiny_cogvideox.tiny_pipeline("1.5")),
    "hunyuan_video": (hunyuan_video, tiny_hunyuan_video.tiny_pipeline),
    "mochi": (mochi, tiny_mochi.tiny_pipeline),
}


def cut_of(frames: int = 13, fps: float = 12.0, area: int = 1536, *, size: tuple[int, int] | None = None, first: int = 1, step: int = 4, sides: int = 8) -> Cut:
    return Cut(frames, fps, area, size, first, step, (sides, sides), None)


def numbered(count: int, fps: float = 12.0, height: int = 16, width: int = 24) -> Iterator[tuple[Frame, float]]:
    """Frames whose grey is their number."""
    for number in range(count):
        yield np.full((height, width, 3), number, np.uint8), fps


def drain(frames: Any, cut: Cut) -> tuple[list[clip_folder.Window], Facts]:
    windows, found = [], all_windows(frames, cut)
    while True:
        try:
            windows.append(next(found))
        except StopIteration as end:
            return windows, end.value


# Windows


@pytest.mark.parametrize("cut", [cut_of(), cut_of(frames=1), cut_of(frames=9, step=8), cut_of(frames=25, step=6), cut_of(frames=10, first=5, step=5)])
@pytest.mark.parametrize("count", [1, 2, 4, 5, 8, 9, 13, 14, 26, 29, 30, 31, 100])
def test_examples_are_consecutive_and_leave_out_less_than_a_step(cut: Cut, count: int) -> None:
    windows, facts = drain(numbered(count), cut)
    assert facts == Facts(count, 12.0, 16, 24) and [window.span for window in windows] == cut.spans(count)
    seen = [int(frame[0, 0, 0]) for window in windows for frame in window.video]
    assert seen == list(range(len(seen)))
    assert all(span.frames <= cut.frames and (span.frames - cut.first) % cut.step == 0 and span.frames >= cut.first for span in cut.spans(count))
    assert count - len(seen) < max(cut.step, cut.first)


def test_some_examples_of_a_clip_are_those_of_all_and_nothing_behind_them_is_decoded() -> None:
    cut, asked = cut_of(fps=7.0), 0

    def frames() -> Iterator[tuple[Frame, float]]:
        nonlocal asked
        for pair in numbered(200, 12.0):
            asked += 1
            yield pair

    windows, _ = drain(numbered(200, 12.0), cut)
    wanted = [windows[4].span, windows[1].span]
    for chosen, whole in zip(some_windows(frames(), cut, wanted), (windows[1], windows[4]), strict=True):
        assert chosen.span == whole.span and torch.equal(chosen.video, whole.video)
    assert asked < 13 * 5 * 12 / 7 + 3
    with pytest.raises(UserError, match="has changed"):
        list(some_windows(numbered(20, 12.0), cut, wanted))


@pytest.mark.parametrize(("fps", "to"), [(12.0, 12.0), (24.0, 12.0), (30.0, 16.0), (8.0, 12.0), (29.97, 12.0), (12.0, 29.97), (60.0, 7.0), (1000.0, 1.0)])
def test_a_clip_is_shown_at_another_rate_as_long_and_as_fast(fps: float, to: float) -> None:
    """At every moment k / to, the frame that is on screen then; so many as begin while the clip lasts."""
    for count in (2, 3, 17, 200):
        windows, facts = drain(numbered(count, fps), cut_of(frames=1, fps=to))
        seen = [int(window.video[0, 0, 0, 0]) for window in windows]
        moments = [k for k in range(count * 40) if k / to < count / fps - 1e-9]
        assert seen == [min(count - 1, math.floor(k / to * fps + 1e-9)) % 256 for k in moments]
        assert facts.shown(to) == len(seen)


def test_an_image_and_a_clip_of_one_frame_are_one_frame_at_any_rate(tmp_path: Path) -> None:
    Image.fromarray(np.full((16, 24, 3), 7, np.uint8)).save(tmp_path / "a.png")
    write_mp4(tmp_path / "a.mp4", torch.full((1, 3, 16, 24), 0.5), 1.0, upscale=False)
    for name in ("a.png", "a.mp4"):
        windows, facts = drain(read_frames(tmp_path / name), cut_of())
        assert [tuple(window.video.shape) for window in windows] == [(1, 3, 16, 24)] and facts.shown(12.0) == 1


def test_frames_are_made_small_as_cover_makes_them() -> None:
    rng = np.random.default_rng(0)
    for shape, (height, width) in (((48, 64, 3), (24, 32)), ((50, 37, 3), (16, 24)), ((16, 24, 3), (16, 24)), ((20, 24, 3), (16, 24)), ((10, 12, 3), (16, 16))):
        frame = rng.integers(0, 256, shape, dtype=np.uint8)
        wanted = 255 * cover(from_uint8(frame[None]), height, width)[0]
        assert (fit(frame, height, width).float() - wanted).abs().max() <= 1.01


# Sizes


@pytest.mark.parametrize("sides", [8, 16, 32])
def test_sizes_keep_the_aspect_as_far_as_the_grid_allows_and_never_grow(sides: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        height, width = (int(side) for side in rng.integers(sides, 900, 2))
        area = int(rng.integers(sides * sides, 480 * 832))
        found = cut_of(area=area, sides=sides).target(height, width)
        assert found is not None
        h, w = found
        assert h % sides == 0 == w % sides and h <= height and w <= width and h * w <= area

        def worth(h: int, w: int, height: int = height, width: int = width) -> float:
            return h * w * h * w / (height * width * max(h / height, w / width) ** 2)

        every = ((a, b) for a in range(sides, height + 1, sides) for b in range(sides, width + 1, sides) if a * b <= area)
        assert worth(h, w) >= max(worth(*size) for size in every) * (1 - 1e-9)


def test_sizes_that_fit_are_left_as_they_are_and_too_small_ones_have_none() -> None:
    cut = cut_of(area=480 * 832, sides=16)
    assert cut.target(480, 720) == (480, 720) and cut.target(480, 832) == (480, 832) and cut.target(720, 480) == (720, 480)
    assert cut.target(1080, 1920) == (480, 832) and cut.target(15, 400) is None and cut.target(16, 16) == (16, 16)
    assert cut_of(size=(32, 48)).target(7, 900) == (32, 48)
    assert Cut(13, 16.0, 10**7, None, 1, 4, (16, 16), (768, 1360)).target(1360, 768) == (768, 448)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_what_its_cut_makes(family: str, tmp_path: Path) -> None:
    module, make = FAMILIES[family]
    make().save_pretrained(tmp_path)
    model: TrainableModel = module.load(str(tmp_path), device=CPU, dtype=torch.float32)
    cut = cut_for(model, Windows(frames=20))
    assert cut.frames == cut.fitting(20) > cut.first and 20 - cut.frames < cut.step
    size = cut.target(64, 70)
    assert size is not None
    for frames in {cut.first, cut.first + cut.step}:
        shape = model.latents.shape(ClipShape(frames, *size))
        assert all(side % by == 0 for side, by in zip(shape[1:], model.patch, strict=True))
        assert model.encode(torch.rand(1, frames, 3, *size))[0].shape == shape
        with torch.no_grad():
            assert model(torch.zeros(1, *shape), torch.tensor([0.5]), model.encode_text(["a red ball"]))[0].shape == shape
    if isinstance(model, ltx.LTXVideoModel):
        assert cut.fps == model.fps


def test_cogvideox_15_gets_nothing_larger_than_it_has_positions_for(tmp_path: Path) -> None:
    tiny_cogvideox.tiny_pipeline("1.5").save_pretrained(tmp_path)
    model = cogvideox.load(str(tmp_path), device=CPU, dtype=torch.float32)
    cut = cut_for(model, Windows())
    size = cut.target(720, 720)
    assert size is not None and cut.largest == (48, 64) and size[0] <= 48 and size[1] <= 64
    shape = model.latents.shape(ClipShape(1, *size))
    assert model(torch.zeros(1, *shape), torch.tensor([0.5]), model.encode_text(["a"])).isfinite().all()
    with pytest.raises(UserError, match="at most 48x64"):
        cut_for(model, Windows(size=(64, 64)))


@pytest.mark.parametrize(("windows", "says"), [(Windows(size=(30, 32)), "multiples of 8"), (Windows(frames=10**6, area=10**6), "GiB of pixels")])
def test_windows_that_the_model_cannot_take_are_refused(windows: Windows, says: str) -> None:
    with pytest.raises(UserError, match=says):
        cut_for(small_model(), windows)


# Folders


def folder_of(folder: Path, *lines: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metadata.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


def row(name: str, text: Any = "a") -> str:
    return json.dumps({"file_name": name, "text": text})


def test_every_line_and_every_clip_is_accounted_for(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path / "clips",
        *(row("a.mp4"), row("a.mp4", "another caption"), row("sub/../b.mp4"), row(str(tmp_path / "clips" / "c.mp4")), row("gone.mp4")),
        *("not json", "[]", "", row(""), row("d.mp4", " "), row("d.mp4", 3), row("../out.mp4"), row("link.mp4"), row("x" * 300), row("e.mp4", "\ud800"), '{"file_name": "f.mp4"}'),
    )
    for name in ("a.mp4", "b.mp4", "c.mp4", "d.mp4", "f.mp4", "nobody.mov", "image.PNG", "notes.md", ".hidden.mp4"):
        (folder / name).write_bytes(b"x")
    (folder / "sub").mkdir()
    (folder / "sub" / "deep.webm").write_bytes(b"x")
    (tmp_path / "out.mp4").write_bytes(b"x")
    (folder / "link.mp4").symlink_to(tmp_path / "out.mp4")
    found, dropped = find_clips(folder)
    assert found == [Named("a.mp4", "a"), Named("a.mp4", "another caption"), Named("b.mp4", "a"), Named("c.mp4", "a"), Named("gone.mp4", "a")]
    assert {name: reason for name, reason in dropped if not reason.startswith(("'", "no clip can be named"))} == {
        "line 6 of metadata.jsonl": "not a JSON object in UTF-8",
        "line 7 of metadata.jsonl": "not a JSON object in UTF-8",
        "line 9 of metadata.jsonl": "no file_name",
        "d.mp4": "no caption",
        "f.mp4": "no caption",
        "line 15 of metadata.jsonl": "not a JSON object in UTF-8",
        "nobody.mov": "not in metadata.jsonl",
        "image.PNG": "not in metadata.jsonl",
        "sub/deep.webm": "not in metadata.jsonl",
    }
    assert {name for name, reason in dropped if reason.endswith("lies outside its folder")} == {"../out.mp4", "link.mp4"}
    assert len(found) + len(dropped) == 15 + 3
    assert not any(str(tmp_path) in reason for _, reason in dropped)


def test_captions_may_lie_beside_the_clips(tmp_path: Path) -> None:
    for name, text in (("a.mp4", " a horse\n"), ("b.jpg", "two\nlines"), ("c.mp4", " "), ("e.mp4", "caf\u00e9")):
        (tmp_path / name).write_bytes(b"x")
        (tmp_path / name).with_suffix(".txt").write_text(text, encoding="latin-1")
    (tmp_path / "d.mp4").write_bytes(b"x")
    found, dropped = find_clips(tmp_path)
    assert found == [Named("a.mp4", "a horse"), Named("b.jpg", "two\nlines")]
    assert dropped == [Dropped("c.mp4", "no caption beside it"), Dropped("d.mp4", "no caption beside it"), Dropped("e.mp4", "its caption cannot be read as UTF-8")]


def test_a_folder_without_captions_or_none_at_all_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"x")
    for folder, says in ((tmp_path, "no captions"), (tmp_path / "none", "no folder of clips"), (tmp_path / "a.mp4", "no folder of clips")):
        with pytest.raises(UserError, match=says):
            find_clips(folder)


# Files


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_a_broken_image_is_a_user_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UserError, match="cannot read the image"):
        list(read_frames(tmp_path / "a.png"))


def test_an_enormous_image_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("1", (10_000, 8_000)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(UserError, match="more than the limit"):
        list(read_frames(tmp_path / "a.png"))


def test_sixteen_bits_of_grey_are_the_nearest_of_eight(tmp_path: Path) -> None:
    ramp = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    ((frame, _),) = list(read_frames(tmp_path / "a.png"))
    assert frame.dtype == np.uint8 and frame.shape == (8, 8, 3) and np.abs(frame / 255 - ramp[..., None] / 65535).max() <= 0.5 / 255


def test_only_files_that_are_images_of_the_four_kinds_are_opened(tmp_path: Path) -> None:
    """Whatever they are called: other decoders of Pillow are not asked."""
    Image.new("RGB", (24, 16)).save(tmp_path / "a.png", "TIFF")
    with pytest.raises(UserError, match="cannot read the image"):
        read_image(tmp_path / "a.png", still=True)


def test_a_photograph_stands_as_its_camera_was_held(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn
    Image.new("RGB", (24, 16)).save(tmp_path / "a.jpg", exif=exif)
    ((frame, _),) = list(read_frames(tmp_path / "a.jpg"))
    assert frame.shape == (24, 16, 3)


def test_frames_one_by_one_are_those_of_the_whole_clip(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", torch.rand(9, 3, 32, 48), 12.0)
    whole, parts = read_video(tmp_path / "a.mp4"), list(read_frames(tmp_path / "a.mp4"))
    assert np.array_equal(np.stack([frame for frame, _ in parts]), whole.frames) and {fps for _, fps in parts} == {whole.fps}


def test_spans_of_a_cut_are_plain() -> None:
    assert cut_of().spans(30) == [Span(0, 13), Span(13, 13), Span(26, 1)] and cut_of().spans(29) == [Span(0, 13), Span(13, 13)]

"""What is found of one clip: told by its bytes, in one pass that holds no whole clip, and never an exception."""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from base_model.checkpoint import save_weights
from base_model.errors import UserError
from base_model.video.curate import MEASURES, measure
from base_model.video.files import Frame, to_uint8, write_lossless, write_mp4
from base_model.video.hashes import clips_apart, moments
from recipes.clip_scores import Evenly, Measurer, Wanted, Windows, jpeg, load_looks, open_clip, safety_identity, seen_of
from recipes.filters import NONE, Filters
from reward.safety.contract import SafetyRunner
from reward.safety.policy import load_policy
from reward.safety.video import DegenerateFilter, FlashFilter
from tests.recipes import curated
from tests.recipes.curated import textured
from tests.reward.tiny_encoders import save


def moving(frames: int = 12, side: int = 64) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.roll(textured(1, side), k, axis=1).copy()).permute(2, 0, 1) / 255 for k in range(frames)])  # [T,3,H,W]


def found(path: Path, *, name: str | None = None, text: str = "", wanted: Wanted | None = None) -> dict[str, object]:
    row = Measurer(wanted or Wanted())({"path": str(path), "name": name or path.name, "text": text})
    return json.loads(json.dumps(row))  # as it comes out of a worker


def test_a_clip_is_told_by_its_bytes_whatever_it_is_called(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.xyz", moving(), 12, upscale=False)
    write_lossless(tmp_path / "b.mp4", moving(), 12)
    Image.fromarray(textured(1, 64)).save(tmp_path / "c.png")
    (tmp_path / "d.mp4").write_bytes((tmp_path / "c.png").read_bytes())
    kinds = [(row["codec"], row["container"], row["width"], row["scores"]["frames"]) for row in (found(path) for path in sorted(tmp_path.iterdir()))]  # type: ignore[index]
    assert kinds == [("h264", "mp4", 64, 12.0), ("ffv1", "matroska", 64, 12.0), ("png", "png", 64, 1.0), ("png", "png", 64, 1.0)]


@pytest.mark.parametrize(("codec", "encoder", "ending"), [("h264", "libx264", "mp4"), ("hevc", "libx265", "mp4"), ("vp9", "libvpx-vp9", "webm"), ("av1", "libsvtav1", "mkv")])
def test_every_usual_codec_is_measured_alike(codec: str, encoder: str, ending: str, tmp_path: Path) -> None:
    import av

    clip = to_uint8(moving())
    quiet = {"libx265": {"x265-params": "log-level=none:pools=1"}, "libsvtav1": {"preset": "12", "svtav1-params": "lp=1"}}
    with av.open(str(tmp_path / f"a.{ending}"), "w") as container:
        stream = container.add_stream(encoder, rate=12, options={"crf": "20", **quiet.get(encoder, {})})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for frame in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    if sys.platform == "linux":  # as root, SVT-AV1 gives whoever encodes real-time priority, and leaves it so
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    row = found(tmp_path / f"a.{ending}")
    plain = measure((frame, k / 12) for k, frame in enumerate(clip))
    assert "error" not in row and row["codec"] == codec and row["container"] == {"mp4": "mp4", "webm": "matroska", "mkv": "matroska"}[ending]
    scores: dict[str, float] = row["scores"]  # type: ignore[assignment]
    assert (scores["frames"], scores["cuts"]) == (12, 0) and scores["seconds"] == pytest.approx(1, abs=0.02) and scores["motion"] == pytest.approx(plain.scores["motion"], rel=0.1)
    assert clips_apart(moments(row["hashes"]), moments(plain.hashes)) < 3  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "ending"), [("png", "png"), ("jpeg", "jpg"), ("webp", "webp"), ("bmp", "bmp")])
def test_images_of_every_kind_are_clips_of_one_frame(kind: str, ending: str, tmp_path: Path) -> None:
    Image.fromarray(textured(1, 64)).save(tmp_path / f"a.{ending}")
    row = found(tmp_path / f"a.{ending}")
    assert (row["codec"], row["container"], row["width"], row["height"], row["scores"]["frames"]) == (kind, kind, 64, 64, 1.0)  # type: ignore[index]
    assert len(row["thumbnails"]) == 1 and np.isnan(row["scores"]["motion"])  # type: ignore[arg-type, index]


def test_a_row_holds_every_measure_hashes_and_small_pictures(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", moving(), 12, upscale=False)
    row = found(tmp_path / "a.mp4")
    assert set(row["scores"]) == set(MEASURES) and len(row["hashes"]) == 12 and row["bytes"] == (tmp_path / "a.mp4").stat().st_size  # type: ignore[arg-type, call-overload]
    assert 1 <= len(row["thumbnails"]) <= 3 and all(base64.b64decode(each).startswith(b"\xff\xd8") for each in row["thumbnails"])  # type: ignore[arg-type, attr-defined]
    assert "error" not in row and "seen" not in row and "safety" not in row


@pytest.mark.parametrize(
    ("content", "error"),
    [(b"", "the video file is empty"), (b"no clip at all", "cannot read the video"), (b"\x89PNG and no more", "cannot read the image"), (None, "cannot be read: No such file")],
)
def test_a_file_that_is_no_clip_is_a_row_with_an_error(content: bytes | None, error: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "a.mp4").write_bytes(content)
    row = found(tmp_path / "a.mp4")
    assert str(row["error"]).startswith(error) and str(tmp_path) not in str(row["error"]) and "scores" not in row


def test_a_truncated_clip_is_a_row_with_an_error(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", moving(48), 12, upscale=False)
    whole = (tmp_path / "a.mp4").read_bytes()
    for share in (0.3, 0.7, 0.98):
        (tmp_path / "a.mp4").write_bytes(whole[: int(share * len(whole))])
        assert "error" in found(tmp_path / "a.mp4")


def test_a_bug_and_missing_memory_are_rows_with_an_error(tmp_path: Path) -> None:
    for name, error in (("1-3-64-wrong", "cannot be measured: RuntimeError: a bug of two lines"), ("1-3-64-damaged", "the video file is truncated or damaged after 3 frames")):
        (tmp_path / f"{name}.mp4").write_bytes(b"x")
        assert found(tmp_path / f"{name}.mp4", wanted=Wanted(read=curated.read))["error"] == error


@pytest.mark.parametrize("number", [1, 2, 7, 16, 17, 100, 333])
def test_some_frames_are_spread_evenly_over_a_clip_of_any_length(number: int) -> None:
    some = Evenly(8, 64)
    for k in range(number):
        some.see(np.full((4, 4, 3), k % 256, np.uint8) + np.uint8(0), float(k))
        assert len(some._kept) <= 16
    kept = [int(frame[0, 0, 0]) for frame in some.frames()]
    assert len(kept) == min(8, number)
    if number <= 256 and number > 8:
        steps = np.diff(kept)
        assert kept[0] == 0 and number - 1 - kept[-1] <= number / 8 and steps.max() <= 2 * max(1, steps.min())


def flashing(seconds: float, at: float, fps: float = 24.0) -> Iterator[tuple[Frame, float]]:
    """A still picture, but for one second of flashing."""
    picture = textured(1, 96)
    for k in range(round(seconds * fps)):
        bright = at <= k / fps < at + 1 and k % 4 < 2
        yield (np.full_like(picture, 255) if bright else picture // 4), k / fps


def test_windows_find_a_flash_wherever_it_stands_in_a_clip_of_any_length() -> None:
    policy = load_policy()
    runner = SafetyRunner([FlashFilter(policy)], policy)
    for at in (0.0, 2.6, 3.5, 7.9, 11.0):
        windows = Windows(runner, "")
        for frame, time in flashing(12, at):
            windows.see(frame, time)
            assert len(windows._held) <= 4 * 24 + 1
        verdict = windows.verdict()
        assert verdict["safety"] == "block" and any(text.startswith("block P17") for text in verdict["safety_reasons"])
        told = float(verdict["safety_reasons"][0].rpartition(" at ")[2].removesuffix(" s"))
        assert abs(told - at) <= 1.0
    windows = Windows(runner, "")
    for frame, time in flashing(12, 99):
        windows.see(frame, time)
    assert windows.verdict() == {"safety": "allow", "safety_reasons": []}


def test_one_window_says_what_the_runner_says_of_the_clip() -> None:
    policy = load_policy()
    runner = SafetyRunner([FlashFilter(policy), DegenerateFilter(policy)], policy)
    for frames in (list(flashing(2, 0.5)), [(np.zeros((64, 64, 3), np.uint8), k / 12) for k in range(6)], list(curated.frames_of(curated.Shown(1, 6, 64, "")))):
        windows = Windows(runner, "")
        for frame, time in frames:
            windows.see(frame, time)
        video = torch.from_numpy(np.stack([frame for frame, _ in frames])).permute(0, 3, 1, 2).float() / 255
        fps = (len(frames) - 1) / (frames[-1][1] - frames[0][1])
        (decision,) = runner.check_videos(video[None], [""], fps)
        assert windows.verdict()["safety"] == decision.verdict.name.lower()


def test_the_filters_read_captions_and_look_at_clips(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", moving(), 12, upscale=False)
    write_mp4(tmp_path / "black.mp4", torch.zeros(12, 3, 64, 64), 12, upscale=False)
    wanted = Wanted(safety=True)
    assert found(tmp_path / "a.mp4", text="a cat on a mat", wanted=wanted)["safety"] == "allow"
    assert found(tmp_path / "a.mp4", text="strobe lights flashing", wanted=wanted)["safety"] == "block"
    black = found(tmp_path / "black.mp4", text="night", wanted=wanted)
    assert black["safety"] != "allow" and "Q01" in black["safety_reasons"][0]  # type: ignore[index]
    assert safety_identity(NONE) == safety_identity(Filters()) and "flash" in safety_identity(NONE)


def test_a_head_that_is_none_for_the_encoder_is_an_error(tmp_path: Path) -> None:
    looks = load_looks(str(save("clip", tmp_path / "clip")), None)
    width = looks.encoder.shape[1]
    save_weights(tmp_path / "head.safetensors", {"weight": torch.ones(1, width + 1), "bias": torch.zeros(1)}, {})
    with pytest.raises(UserError, match=f"no linear head on {width} numbers"):
        load_looks(str(tmp_path / "clip"), tmp_path / "head.safetensors")


def test_agreement_aesthetic_and_embedding_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    import transformers

    folder = save("clip", tmp_path / "clip")
    width = load_looks(str(folder), None).encoder.shape[1]
    weight = torch.randn(1, width)
    save_weights(tmp_path / "head.safetensors", {"weight": weight, "bias": torch.tensor([0.5])}, {})
    looks = load_looks(str(folder), tmp_path / "head.safetensors")
    write_mp4(tmp_path / "a.mp4", moving(30), 12, upscale=False)
    row = found(tmp_path / "a.mp4", wanted=Wanted(frames=looks.encoder.sampler.frames, side=max(looks.encoder.side)))
    frames = seen_of(row)
    assert len(frames) == looks.encoder.sampler.frames and min(frames[0].shape[:2]) == 32 and "seen" not in row
    columns = looks.columns(frames, "a red circle")
    network = transformers.CLIPModel.from_pretrained(folder).eval()
    pixels = looks.encoder.pixels(torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float() / 255)
    with torch.no_grad():
        pictures = torch.nn.functional.normalize(network.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
    text = torch.nn.functional.normalize(looks.encoder.texts(["a red circle"]), dim=-1)
    assert columns["agreement"] == pytest.approx(float((pictures @ text.T).mean()), abs=1e-5)
    assert columns["aesthetic"] == pytest.approx(float((pictures @ weight.T).mean() + 0.5), abs=1e-4)
    np.testing.assert_allclose(columns["embedding"], torch.nn.functional.normalize(pictures.mean(0), dim=0).numpy(), atol=1e-5)
    assert np.isnan(looks.columns(frames, " ")["agreement"])


def test_a_face_detector_that_is_none_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "faces.onnx").write_bytes(b"no network")
    with pytest.raises(UserError, match=r"no face detector that OpenCV reads, .*faces\.onnx\. Give a YuNet model"):
        Measurer(Wanted(faces=tmp_path / "faces.onnx"))


def test_the_most_faces_of_any_frame_are_counted_by_the_detector_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A detector that finds a face in each bright quarter: no weights of a real one are at hand."""
    import cv2

    asked: list[tuple[int, int]] = []

    class Detector:
        def setInputSize(self, size: tuple[int, int]) -> None:
            asked.append(size)

        def detect(self, frame: Frame) -> tuple[int, Frame | None]:
            assert frame.shape == (asked[-1][1], asked[-1][0], 3) and max(frame.shape) <= 640
            quarters = frame.reshape(2, frame.shape[0] // 2, 2, frame.shape[1] // 2, 3).mean((1, 3, 4))
            bright = np.flatnonzero(quarters > 128)
            return 1, np.zeros((len(bright), 15), np.uint8) if len(bright) else None

    monkeypatch.setattr(cv2.FaceDetectorYN, "create", lambda *_: Detector())
    clip = torch.zeros(12, 3, 64, 64)
    write_mp4(tmp_path / "none.mp4", clip, 12, upscale=False)
    clip[4:, :, :32] = 1
    write_mp4(tmp_path / "two.mp4", clip, 12, upscale=False)
    wanted = Wanted(faces=tmp_path / "faces.onnx")
    assert found(tmp_path / "two.mp4", wanted=wanted)["faces"] == 2 and found(tmp_path / "none.mp4", wanted=wanted)["faces"] == 0
    assert "faces" not in found(tmp_path / "two.mp4")


def test_an_opened_clip_gives_its_first_frame_too(tmp_path: Path) -> None:
    write_lossless(tmp_path / "a.mkv", moving(5), 12)
    frames = [frame for frame, _ in open_clip(tmp_path / "a.mkv").frames]
    assert len(frames) == 5
    np.testing.assert_array_equal(frames[0], textured(1, 64))
    assert jpeg(frames[0]).startswith(b"\xff\xd8")

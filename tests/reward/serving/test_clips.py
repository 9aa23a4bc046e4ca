"""From a body to clips: which files may be opened, and what is refused before it is decoded."""

from __future__ import annotations

import base64
import io
import json
import os
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from base_model.errors import UserError
from base_model.video.files import mp4_bytes, to_uint8, write_lossless, write_mp4
from reward.serving.batching import Unscored
from reward.serving.clips import FileBelow, Refused, allowed_roots, below, read_json, read_tensors
from reward.serving.wire import tensors_body
from tests.reward.serving.small import FPS, LIMITS, levels, noise


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """root/a.mp4 and root/deep/b.mkv may be read; secret.mp4 beside it may not, and links lead there."""
    root = tmp_path / "root"
    (root / "deep").mkdir(parents=True)
    write_mp4(root / "a.mp4", torch.rand(3, 3, 16, 16), FPS, upscale=False)
    write_lossless(root / "deep" / "b.mkv", torch.rand(3, 3, 16, 16), FPS)
    write_mp4(tmp_path / "secret.mp4", torch.rand(3, 3, 16, 16), FPS, upscale=False)
    (tmp_path / "rooted").mkdir()
    write_mp4(tmp_path / "rooted" / "c.mp4", torch.rand(3, 3, 16, 16), FPS, upscale=False)
    (root / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    (root / "up").symlink_to(tmp_path)
    (root / "inside.mp4").symlink_to(root / "a.mp4")
    (root / "loop").symlink_to(root / "loop")
    yield tmp_path


def roots(disk: Path) -> tuple[Path, ...]:
    return allowed_roots([disk / "root"])


# Paths


def test_files_below_a_root_are_read_also_through_links_that_stay_there(disk: Path) -> None:
    whole = (disk / "root" / "a.mp4").read_bytes()
    for path in ("root/a.mp4", "root/inside.mp4", "root/deep/../a.mp4", "root//./a.mp4", "root/up/root/a.mp4"):
        assert below(f"{disk}/{path}", roots(disk)).read(10**6) == whole
    (disk / "alias").symlink_to(disk / "root")
    assert below(f"{disk}/root/a.mp4", allowed_roots([disk / "alias"])).read(10**6) == whole


@pytest.mark.parametrize(
    "path",
    [
        "{disk}/secret.mp4", "{disk}/root/../secret.mp4", "{disk}/root/link.mp4", "{disk}/root/up/secret.mp4", "{disk}/rooted/c.mp4", "{disk}/root", "{disk}/root/.",
        "{disk}/root/..%2fsecret.mp4/../../secret.mp4", "{disk}/root/deep/../../secret.mp4", "root/a.mp4", "a.mp4", "", ".", "/", "~/a.mp4", "/etc/passwd",
        "{disk}/root/\0/../../secret.mp4", "{disk}/root/a.mp4\0.mp4", "{disk}/root/loop/a.mp4", "file://{disk}/root/a.mp4", "/proc/self/environ", "{disk}/nowhere",
        "/dev/zero", "{disk}\\root\\a.mp4",
    ],
)  # fmt: skip
def test_no_other_path_is_opened_and_the_words_do_not_tell_whether_it_is_there(disk: Path, path: str) -> None:
    with pytest.raises(Refused, match="not an absolute path below a folder that this server may read") as caught:
        below(path.format(disk=disk), roots(disk))
    assert caught.value.status == 403 and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["..%2fsecret.mp4", "%2e%2e/secret.mp4", "．．/secret.mp4", "a.mp4%00", "․․/secret.mp4", "ａ.mp4", "a\u0301.mp4", "a.mp4\n"])
def test_names_that_only_look_like_a_way_out_are_names(disk: Path, name: str) -> None:
    file = below(f"{disk}/root/{name}", roots(disk))
    with pytest.raises(UserError, match="cannot read the clip: No such file"):
        file.read(10**6)


def test_a_link_that_is_put_in_the_way_afterwards_is_not_followed(disk: Path) -> None:
    file, deep = below(f"{disk}/root/a.mp4", roots(disk)), below(f"{disk}/root/deep/b.mkv", roots(disk))
    (disk / "root" / "a.mp4").unlink()
    (disk / "root" / "a.mp4").symlink_to(disk / "secret.mp4")
    (disk / "root" / "deep").rename(disk / "root" / "was")
    (disk / "elsewhere").mkdir()
    write_lossless(disk / "elsewhere" / "b.mkv", torch.rand(1, 3, 16, 16), FPS)
    (disk / "root" / "deep").symlink_to(disk / "elsewhere")
    for one in (file, deep):
        with pytest.raises(UserError, match=r"link was put in its way|Not a directory"):
            one.read(10**6)


def test_what_is_no_file_or_too_large_is_not_read_and_does_not_block(disk: Path) -> None:
    os.mkfifo(disk / "root" / "pipe.mp4")
    (disk / "root" / "sparse.mp4").touch()
    os.truncate(disk / "root" / "sparse.mp4", 2**40)
    for name, reason in (("pipe.mp4", "not a file"), ("deep", "Is a directory"), ("sparse.mp4", r"1099511627776 bytes are more than the limit of 1000")):
        with pytest.raises(UserError, match=reason):
            below(f"{disk}/root/{name}", roots(disk)).read(1000)
    open_files = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(UserError):
            FileBelow(disk / "root", ("deep", "nothing.mp4")).read(1000)
        with pytest.raises(UserError, match="No such file"):
            FileBelow(disk / "a-root-that-is-gone", ("a.mp4",)).read(1000)
    assert len(os.listdir("/proc/self/fd")) == open_files


def test_roots_are_folders_and_never_the_whole_disk(disk: Path) -> None:
    for wrong in (disk / "nowhere", disk / "secret.mp4", Path("/"), disk / "root" / "loop"):
        with pytest.raises(UserError, match="--allow"):
            allowed_roots([wrong])


# Bodies of JSON


def body(rows: list[dict[str, Any]], **more: Any) -> bytes:
    return json.dumps({"schema": 1, "fps": FPS, "clips": rows, **more}).encode()


def test_clips_from_files_and_from_the_body_are_the_frames_that_were_written(disk: Path) -> None:
    video = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    write_lossless(disk / "root" / "c.mkv", video, FPS)
    sent = base64.b64encode((disk / "root" / "c.mkv").read_bytes()).decode()
    found = read_json(body([{"prompt": "a", "path": f"{disk}/root/c.mkv"}, {"prompt": "b", "mp4": sent}]), LIMITS, FPS, roots(disk))
    expected = torch.from_numpy(to_uint8(video)).permute(0, 3, 1, 2)
    assert found.prompts == ["a", "b"] and found.fps == FPS
    assert all(isinstance(clip, torch.Tensor) and torch.equal(clip, expected) for clip in found.clips)


def test_what_is_wrong_with_one_clip_is_its_own_reason(disk: Path) -> None:
    root = disk / "root"
    whole = (root / "a.mp4").read_bytes()
    (root / "cut.mp4").write_bytes(whole[:-50])
    (root / "text.mp4").write_text("#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n")
    (root / "none.mp4").touch()
    write_mp4(root / "fast.mp4", torch.rand(3, 3, 16, 16), 24.0, upscale=False)
    changed = bytearray((root / "deep" / "b.mkv").read_bytes())
    changed[len(changed) // 2] ^= 255
    (root / "flipped.mkv").write_bytes(changed)
    rows: list[dict[str, Any]] = [{"prompt": "x", "path": f"{root}/{name}"} for name in ("cut.mp4", "text.mp4", "none.mp4", "fast.mp4", "flipped.mkv", "gone.mp4")]
    rows += [{"prompt": "x", "mp4": "!!!"}, {"prompt": "x", "mp4": "é"}, {"prompt": "x", "mp4": base64.b64encode(whole).decode()}]
    limits = LIMITS._replace(clips=9)
    *wrong, last = read_json(body(rows), limits, FPS, roots(disk)).clips
    assert isinstance(last, torch.Tensor)
    reasons = [clip.reason for clip in wrong if isinstance(clip, Unscored)]
    patterns = ["truncated", "neither mp4 nor Matroska", "neither mp4", "runs at 24 frames a second, and the request says 12", "damaged|cannot read", "No such file"]
    patterns += ["base64", "ASCII"]
    assert len(reasons) == 8
    for reason, pattern in zip(reasons, patterns, strict=True):
        assert any(each in reason for each in pattern.split("|")) and "\n" not in reason
        assert str(disk) not in reason, "what a server's disk is called is not told"


@pytest.mark.parametrize(
    ("text", "status", "reason"),
    [
        (b"", 400, "Invalid JSON"),
        (b"{", 400, "Invalid JSON"),
        (b"[" * 100_000, 400, "Invalid JSON"),
        (b"[]", 400, "the body"),
        (b'{"schema": 2, "fps": 12, "clips": []}', 400, "schema"),
        (b'{"schema": 1, "fps": "12", "clips": []}', 400, "fps"),
        (b'{"schema": 1, "fps": NaN, "clips": [{"prompt": "a", "mp4": "x"}]}', 422, "these have nan"),
        (b'{"schema": 1, "fps": 24, "clips": [{"prompt": "a", "mp4": "x"}]}', 422, "of 12 frames a second, and these have 24"),
        (b'{"schema": 1, "fps": 12, "clips": []}', 400, "0 clips"),
        (b'{"schema": 1, "fps": 12, "clips": [{"prompt": "a"}]}', 400, "either a path or mp4"),
        (b'{"schema": 1, "fps": 12, "clips": [{"prompt": "a", "path": "/a", "mp4": "x"}]}', 400, "either a path or mp4"),
        (b'{"schema": 1, "fps": 12, "clips": [{"prompt": 3, "mp4": "x"}]}', 400, "clips.0.prompt"),
        (b'{"schema": 1, "fps": 12, "clips": [{"prompt": "a", "url": "http://10.0.0.1/"}]}', 400, "clips.0.url"),
        (json.dumps({"schema": 1, "fps": 12, "clips": [{"prompt": "a", "path": "/x" * 9999}]}).encode(), 400, "at most 4096 characters"),
        (b'{"schema": 1, "fps": 12, "clips": [{"prompt": "\\ud800", "mp4": "x"}]}', 400, "Invalid JSON"),
    ],
)
def test_a_body_that_is_not_the_schema_is_refused_whole(text: bytes, status: int, reason: str) -> None:
    with pytest.raises(Refused) as caught:
        read_json(text, LIMITS, FPS, ())
    assert caught.value.status == status and reason in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) <= 160


def test_one_forbidden_path_refuses_the_request_before_any_clip_is_opened(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FileBelow, "read", lambda *_: pytest.fail("a clip was opened"))
    with pytest.raises(Refused, match="may read"):
        read_json(body([{"prompt": "a", "path": f"{disk}/root/a.mp4"}, {"prompt": "b", "path": f"{disk}/secret.mp4"}]), LIMITS, FPS, roots(disk))


# Bombs


def film(width: int, height: int, frames: int, codec: str = "libx264", container: str = "mp4") -> bytes:
    """Black frames: a small file, whatever it holds."""
    import av

    buffer = io.BytesIO()
    pixel_format = "bgr0" if codec == "ffv1" else "yuv420p"
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=Fraction(12), options={"preset": "ultrafast"} if codec == "libx264" else {})
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.thread_count = width, height, pixel_format, 1
        black = av.VideoFrame(width, height, pixel_format)
        for plane in black.planes:
            plane.update(bytes(plane.buffer_size))
        for at in range(frames):
            black.pts = at
            out.mux(stream.encode(black))
        out.mux(stream.encode())
    return buffer.getvalue()


def growing(small: int, large: int) -> bytes:
    """VP9 whose frames are small, as its header says, but for the last."""
    import av

    packets = []
    for side in (small, small, large):
        encoder = av.CodecContext.create("libvpx-vp9", "w")
        encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base, encoder.framerate = side, side, "yuv420p", Fraction(1, 12), Fraction(12)
        encoder.options = {"deadline": "realtime", "cpu-used": "8"}
        black = av.VideoFrame(side, side, "yuv420p")
        for plane in black.planes:
            plane.update(bytes(plane.buffer_size))
        black.pts = len(packets)
        packets += [*encoder.encode(black), *encoder.encode(None)]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="webm") as out:
        stream = out.add_stream("libvpx-vp9", rate=Fraction(12))
        stream.width, stream.height, stream.pix_fmt = small, small, "yuv420p"
        for packet in packets:
            packet.stream = stream
            out.mux(packet)
    return buffer.getvalue()


def lying(whole: bytes, width: int, height: int) -> bytes:
    """An mp4 whose index says that its frames have another size."""
    changed = bytearray(whole)
    for box, at in ((b"avc1", 28), (b"tkhd", 80)):
        place = whole.index(box, whole.index(b"stsd") if box == b"avc1" else 0) + at
        changed[place : place + (4 if box == b"avc1" else 8)] = struct.pack(">HH", width, height) if box == b"avc1" else struct.pack(">II", width << 16, height << 16)
    assert bytes(changed) != whole
    return bytes(changed)


@pytest.fixture(scope="module")
def bombs() -> dict[str, bytes]:
    large = film(4096, 4096, 1)
    return {
        "large": large,
        "lying": lying(large, 16, 16),
        "growing": growing(16, 4096),
        "long": film(16, 16, 5000),
        "nine frames": film(16, 16, 9),
        "vp9": film(2048, 2048, 1, "libvpx-vp9", "webm"),
        "ffv1": film(2048, 2048, 1, "ffv1", "matroska"),
        "mpeg4": film(16, 16, 2, "mpeg4"),
    }


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("large", "frame 1 of 4096x4096 is more than the limit of 8 frames and 8192 pixels"),
        ("lying", "frame 1 of 4096x4096 is more than the limit"),
        ("growing", "cannot read the video: Invalid argument after 2 frames"),  # the decoder's own word: it made no room for the third
        ("long", "frame 5000 of 16x16 is more than the limit"),  # by what the file declares: nothing was decoded
        ("nine frames", "frame 9 of 16x16 is more than the limit"),
        ("vp9", "after 0 frames"),
        ("ffv1", "after 0 frames"),
        ("mpeg4", "the clip is encoded as mpeg4"),
    ],
)
def test_a_bomb_is_not_decoded(bombs: dict[str, bytes], name: str, reason: str) -> None:
    content = bombs[name]
    assert len(content) < 100_000
    (clip,) = read_json(body([{"prompt": "a", "mp4": base64.b64encode(content).decode()}]), LIMITS, FPS, ()).clips
    assert isinstance(clip, Unscored) and reason in clip.reason and "\n" not in clip.reason


def test_the_pixels_of_a_request_are_those_of_all_its_clips() -> None:
    sent = base64.b64encode(mp4_bytes(torch.rand(4, 3, 32, 32), FPS, upscale=False)).decode()
    found = read_json(body([{"prompt": "a", "mp4": sent}] * 3), LIMITS, FPS, ()).clips  # room for two of them
    assert [isinstance(clip, torch.Tensor) for clip in found] == [True, True, False]
    assert isinstance(found[2], Unscored) and "more than the limit" in found[2].reason


# Bodies of safetensors


def test_tensors_are_clips() -> None:
    video = noise(2)
    found = read_tensors(tensors_body(video, ["a", "ü\n"], FPS), LIMITS, FPS)
    assert torch.equal(torch.stack([clip for clip in found.clips if isinstance(clip, torch.Tensor)]), video) and found.prompts == ["a", "ü\n"]


def tensors(video: Any, **told: Any) -> bytes:
    import safetensors.torch

    values = {"schema": "1", "fps": "12.0", "prompts": '["a"]', **told}
    return bytes(safetensors.torch.save(video if isinstance(video, dict) else {"video": video}, metadata={key: value for key, value in values.items() if value is not None}))


GREY = levels(1)


@pytest.mark.parametrize(
    ("content", "status", "reason"),
    [
        (b"", 400, "no safetensors"),
        (b"\x80\x04\x95", 400, "no safetensors"),
        (struct.pack("<Q", 2**62) + b"{}", 400, "no safetensors"),
        (tensors(GREY)[:-1], 400, "no safetensors"),
        (tensors(GREY, fps=None), 400, "no safetensors"),
        (tensors(GREY, fps="fast"), 400, "no safetensors"),
        (tensors(GREY, prompts="["), 400, "no safetensors"),
        (tensors(GREY, prompts="[" * 50_000), 400, "no safetensors"),
        (tensors(GREY, schema="2"), 400, "got schema 2"),
        (tensors({"video": GREY, "more": GREY.clone()}), 400, "holds one tensor"),
        (tensors({"clip": GREY}), 400, "holds one tensor"),
        (tensors(GREY.float()), 400, "uint8"),
        (tensors(GREY[0]), 400, "uint8 [B,T,3,H,W]"),
        (tensors(GREY[:, :, :2].contiguous()), 400, "uint8 [B,T,3,H,W]"),
        (tensors(GREY[:0]), 400, "uint8 [B,T,3,H,W]"),
        (tensors(GREY, prompts='["a", "b"]'), 400, "a list of 1 texts"),
        (tensors(GREY, prompts="[1]"), 400, "a list of 1 texts"),
        (tensors(GREY, prompts='"a"'), 400, "a list of 1 texts"),
        (tensors(GREY, fps="24.0"), 422, "these have 24"),
        (tensors(GREY, fps="nan"), 422, "these have nan"),
        (tensors(levels(1, 2, 3, 4, 5), prompts='["a", "a", "a", "a", "a"]'), 413, "5 clips"),
        (tensors(GREY, prompts=json.dumps(["x" * 101])), 413, "101 characters"),
        (tensors(levels(1, frames=9)), 413, "of 9 frames"),
        (tensors(levels(1, frames=8, height=33, width=32)), 413, "pixels in all"),
    ],
)
def test_tensors_that_are_not_the_schema_or_too_large_are_refused_whole(content: bytes, status: int, reason: str) -> None:
    with pytest.raises(Refused) as caught:
        read_tensors(content, LIMITS, FPS)
    assert caught.value.status == status and reason in str(caught.value) and "\n" not in str(caught.value)

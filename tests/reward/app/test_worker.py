"""Clips from outside, opened in a process that can do nothing else: what comes out, and crafted files that must cost neither time, memory nor the server."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from base_model.errors import UserError
from base_model.video.files import mp4_bytes, write_lossless
from reward.app import rendering
from reward.app.media import VARIANTS, path_of
from reward.app.store import Store
from reward.app.worker import Worker, keep
from tests.reward.app.conftest import film
from tests.test_canaries import many_streams, repeated


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker(seconds=60)
    yield worker
    worker.close()


def picture(content: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(content))
    assert image.mode == "L", "stand-ins are grey"
    return np.asarray(image, np.float64)


def test_a_clip_comes_out_as_h264_with_its_frames_and_stand_ins_without_colour(worker: Worker) -> None:
    made = worker.render(film(0))
    assert set(made) == set(VARIANTS)
    with av.open(io.BytesIO(made["clip.mp4"])) as container:
        (stream,) = container.streams
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt, float(stream.average_rate)) == ("h264", "yuv420p", 12.0)
    assert made["clip.mp4"].index(b"moov") < made["clip.mp4"].index(b"mdat"), "players need the index first"
    assert len(frames) == 13 and frames[0].shape == (128, 128, 3), "grown by a whole factor, as the film itself was"
    assert json.loads(made["facts.json"]) == {
        "width": 128, "height": 128, "fps": 12.0, "frames": 13, "seconds": pytest.approx(13 / 12),
        "flash": {"verdict": "allow", "score": pytest.approx(0.0244, abs=1e-3), "where": [], "filter": "flash 2"},
    }  # fmt: skip
    for name in ("blur.jpg", "light.jpg", "edges.jpg", "sheet.jpg"):
        picture(made[name])


def test_what_a_blurred_poster_hides_is_not_in_it(worker: Worker) -> None:
    """Stripes of 4 pixels fill the right half: in the sheet they are there, in the poster they are one grey."""
    frames = np.full((3, 128, 128, 3), 128, np.uint8)
    frames[:, :, 64:] = np.where(np.arange(64) // 4 % 2, 255, 0).astype(np.uint8)[None, None, :, None]
    made = worker.render(mp4_bytes(frames, 8.0))
    blur = picture(made["blur.jpg"])
    right = blur[:, int(blur.shape[1] * 0.6) : int(blur.shape[1] * 0.95)]
    assert np.abs(np.diff(right, axis=1)).max() < 6 and np.ptp(right) < 40
    assert np.abs(np.diff(picture(made["sheet.jpg"]), axis=1)).max() > 100


def test_a_clip_that_flashes_is_told_of_at_any_size(worker: Worker) -> None:
    for side in (32, 144):
        frames = np.zeros((24, side, side, 3), np.uint8)
        frames[::2] = 255
        flash = json.loads(worker.render(mp4_bytes(frames, 12.0))["facts.json"])["flash"]
        assert flash["verdict"] == "block" and len(flash["where"]) == 1


def test_means_of_light_are_what_the_filter_makes_of_a_large_frame() -> None:
    import torch

    from reward.safety.video import flash_risk

    frames = np.random.default_rng(0).integers(0, 256, (20, 2, 2, 3), np.uint8).repeat(60, 1).repeat(60, 2)
    frames = np.clip(frames.astype(int) + np.random.default_rng(1).integers(-20, 20, frames.shape), 0, 255).astype(np.uint8)
    whole = flash_risk(torch.from_numpy(frames).permute(0, 3, 1, 2)[None].float() / 255, 12.0)
    small = flash_risk(torch.stack([rendering._cells(frame) for frame in frames])[None], 12.0)
    assert small.luminance == pytest.approx(whole.luminance, rel=0.02) and small.red == pytest.approx(whole.red, rel=0.02) and whole.luminance[0] > 0.05


def wide(path: Path) -> None:
    """Two frames of 256x256 whose header says 32767x32767."""
    write_lossless(path, np.zeros((2, 256, 256, 3), np.uint8), 8)
    path.write_bytes(path.read_bytes().replace(b"\xb0\x82\x01\x00", b"\xb0\x82\x7f\xff").replace(b"\xba\x82\x01\x00", b"\xba\x82\x7f\xff"))


def of_codec(codec: str, kind: str, pixel_format: str = "yuv420p") -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 64, pixel_format
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame(64, 64, pixel_format)))
        container.mux(stream.encode())
    return buffer.getvalue()


def at_rate(fps: int) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame(64, 64, "yuv420p")))
        container.mux(stream.encode())
    return buffer.getvalue()


def bombs(folder: Path) -> dict[str, bytes]:
    wide(folder / "wide.mkv")
    repeated(folder / "hour.mp4", 86_400, 16)
    many_streams(folder / "streams.mkv", 200)
    found = {name: (folder / name).read_bytes() for name in ("wide.mkv", "hour.mp4", "streams.mkv")}
    whole = film(0)
    return {
        **found,
        "cut moov": whole[: whole.index(b"moov") + 40],
        "half": whole[: len(whole) // 2],
        "hls": b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        "hls behind ftyp": b"\0\0\0\x10ftypisom\0\0\0\0#EXTM3U\n#EXTINF:10,\nhttp://169.254.169.254/latest\n",
        "concat": b"ffconcat version 1.0\nfile /etc/hostname\n",
        "empty": b"",
        "noise": np.random.default_rng(0).bytes(50_000),
        "noise behind ftyp": b"\0\0\0\x10ftypisom\0\0\0\0" + np.random.default_rng(0).bytes(50_000),
        "another container": of_codec("mpeg4", "avi"),
        "another codec": of_codec("mjpeg", "mp4", "yuvj420p"),
        "too fast": at_rate(1000),
    }


def test_crafted_files_cost_seconds_and_no_clip_behind_them(worker: Worker, tmp_path: Path) -> None:
    for name, content in bombs(tmp_path).items():
        begun = time.monotonic()
        with pytest.raises(UserError) as told:
            worker.render(content)
        assert time.monotonic() - begun < 30 and "\n" not in str(told.value), (name, str(told.value))
    pid = worker._process.pid if worker._process else 0
    peak = next(int(line.split()[1]) << 10 for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    assert peak < 2 << 30
    assert worker.render(film(1))["clip.mp4"]


def test_every_codec_of_the_list_is_taken_in_its_containers(worker: Worker) -> None:
    for codec, kind in (("libx264", "mp4"), ("libx265", "matroska"), ("libvpx-vp9", "webm"), ("mpeg4", "mp4"), ("ffv1", "matroska")):
        assert worker.render(of_codec(codec, kind))["clip.mp4"], codec


def test_changed_bytes_never_end_the_worker(worker: Worker) -> None:
    rng, whole = np.random.default_rng(0), film(0)
    for _ in range(25):
        changed = bytearray(whole)
        for at in rng.integers(0, len(whole), rng.integers(1, 30)):
            changed[at] = rng.integers(256)
        try:
            worker.render(bytes(changed))
        except UserError as error:
            assert "ended the process" not in str(error)


def test_a_process_that_was_killed_costs_one_clip(worker: Worker) -> None:
    worker.render(film(0))
    assert worker._process is not None
    os.kill(worker._process.pid, signal.SIGSTOP)  # it hangs
    slow = Worker(seconds=0.5)
    slow._process, worker._process = worker._process, None
    begun = time.monotonic()
    with pytest.raises(UserError, match="longer than"):
        slow.render(film(0))
    assert time.monotonic() - begun < 5
    assert worker.render(film(1))["clip.mp4"], "another process took over"
    worker._process.kill()
    worker._process.wait()
    assert worker.render(film(2))["clip.mp4"]


def test_a_process_is_replaced_after_its_share_of_clips() -> None:
    worker = Worker(clips=1)
    worker.render(film(0))
    assert worker._process is None


SETTLED = """
    import os, resource, socket, sys, json
    from pathlib import Path
    from reward.app import rendering

    secret = Path(sys.argv[1])
    held = open(sys.argv[2], "ab", buffering=0)
    os.chmod(sys.argv[2], 0o666)
    rendering._warm()
    rendering.settle()
    found = {}
    def attempt(name, function):
        try:
            function()
            found[name] = "done"
        except Exception as error:
            found[name] = type(error).__name__
    attempt("read", lambda: secret.read_bytes())
    attempt("write", lambda: secret.with_name("new").write_bytes(b"x"))
    attempt("write what was open", lambda: held.write(b"x"))
    attempt("socket", lambda: socket.socket())
    attempt("pipe", os.pipe)
    attempt("more files", lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)))
    attempt("root", lambda: os.setuid(0))
    attempt("memory", lambda: bytearray(4 << 30))
    attempt("render", rendering._warm)
    found["environment"] = sorted(name for name in os.environ if "SECRET" in name)
    print(json.dumps(found))
"""


def test_the_process_can_open_neither_files_nor_sockets_and_still_renders(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (tmp_path / "log").write_text("")
    told = subprocess.run([sys.executable, "-c", textwrap.dedent(SETTLED), tmp_path / "secret", tmp_path / "log"], capture_output=True, check=True, timeout=120)
    found = json.loads(told.stdout)
    assert found.pop("render") == "done"
    assert found.pop("environment") == []
    assert all(each != "done" for name, each in found.items() if name != "root"), found
    if os.getuid() == 0:
        assert found["root"] == "PermissionError"
    assert (tmp_path / "log").read_text() == "" and not (tmp_path / "new").exists()


def test_the_process_knows_nothing_of_the_servers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUSHES_APP_SECRET", "do not tell")
    worker = Worker()
    worker.render(film(0))
    assert worker._process is not None
    assert b"do not tell" not in Path(f"/proc/{worker._process.pid}/environ").read_bytes()
    assert "reward.app.rendering" in Path(f"/proc/{worker._process.pid}/cmdline").read_text()
    worker.close()


def test_of_a_clip_everything_is_kept_or_nothing(store: Store) -> None:
    digest = "a" * 64
    with pytest.raises(ValueError, match=r"not blur\.jpg, clip\.mp4"):
        keep(store, digest, {"clip.mp4": b"x", "blur.jpg": b"x"})
    assert not path_of(store, digest).exists()
    keep(store, digest, dict.fromkeys(VARIANTS, b"x"))
    assert all(path_of(store, digest, each).read_bytes() == b"x" for each in VARIANTS)

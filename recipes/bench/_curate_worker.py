"""PySceneDetect and videohash in a process of their own, called as their users call them. Nothing of this project is imported but `_serve.py`."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    _serve: Any = importlib.import_module("_serve")


def cuts(path: str, shortest: int | None) -> dict[str, Any]:
    """The frames that begin a scene but the first, by ContentDetector at its own threshold. shortest: frames of a scene at least, or what it takes itself."""
    scenedetect: Any = importlib.import_module("scenedetect")
    started = time.perf_counter()
    detector = scenedetect.ContentDetector() if shortest is None else scenedetect.ContentDetector(min_scene_len=shortest)
    scenes = scenedetect.detect(path, detector)
    taken = time.perf_counter() - started
    return {"seconds": taken, "cuts": [int(begin.frame_num) for begin, _ in scenes[1:]]}


def video_hash(path: str) -> dict[str, Any]:
    """Its 64 bits, as 0x...; files that it makes on the way are gone after."""
    videohash: Any = importlib.import_module("videohash2")
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        found = videohash.VideoHash(path=path, storage_path=folder)
        taken = time.perf_counter() - started
        return {"seconds": taken, "hash": found.hash_hex}


def ffmpeg_on_path(folder: Path) -> None:
    """The binary that imageio-ffmpeg brings, where videohash looks for one."""
    imageio_ffmpeg: Any = importlib.import_module("imageio_ffmpeg")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ffmpeg").unlink(missing_ok=True)
    (folder / "ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"


def build(spec: dict[str, Any]) -> dict[str, Any]:
    if importlib.util.find_spec("imageio_ffmpeg"):
        ffmpeg_on_path(Path(spec["folder"]).absolute())
    if importlib.util.find_spec("cv2"):
        importlib.import_module("cv2").setNumThreads(spec["threads"])
    return {"cuts": cuts, "hash": video_hash}


if __name__ == "__main__":
    _serve.serve(build)

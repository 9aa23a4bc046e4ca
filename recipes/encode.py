"""From a folder of captioned clips to latents and text states on disk, once (`rushes encode`). `rushes sft` does the same before its first step, and finds what was done here.

Clips are decoded and made small in threads (decoding lets go of Python's lock), encoded one window after another by the model, and kept (`latents.py`). The same command goes on
where it was killed or where the disk was full, encodes what is new where clips or captions changed, and tells what became of every clip. Several processes may fill one folder:
under `torchrun` each takes its share of the clips.
What it leaves out: captions are not made or changed, clips are not judged, and an example is one rectangle of its clip.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from align.config import Config as BaseConfig
from align.config import Count
from align.progress import Progress
from base_model.checkpoint import atomic_write, check_can_write
from base_model.errors import UserError
from base_model.types import ClipShape, TrainableModel
from recipes.clip_folder import Cut, Dropped, Facts, Named, Span, Windows, all_windows, cut_for, find_clips, is_image, read_frames, reason_of, some_windows
from recipes.examples import num_tokens
from recipes.latents import (
    DTYPES,
    Cache,
    CachedClips,
    Example,
    Findings,
    Lineage,
    Stored,
    encode_caption,
    encode_window,
    latents_key,
    lineage_of,
    save_plan,
    text_key,
)
from recipes.models import load_model
from recipes.shards import entry_key, missing, seal, stamp
from recipes.weights import file_hash

T = TypeVar("T")
R = TypeVar("R")
LONGEST_WAIT = timedelta(hours=12)  # of processes for one another
AS_TRAINED = Windows()
SHOWN = 8  # lines of a kind in the report on the terminal


class Config(BaseConfig):
    clips: Path | None = None
    """Folder of clips with their captions: `metadata.jsonl` with `file_name` and `text`, or `a.txt` beside `a.mp4`."""
    out: Path = Path("runs/latents")
    """Folder of the cache. Several models and folders of clips may share one."""
    model: Path | None = None
    """Whose codec and text encoder: a folder that diffusers saved, a short name, `owner/name` on the hub, or a network of the built-in model; none means the shipped base."""
    windows: Windows = Windows()
    """How clips are cut into examples."""
    stored: Stored = "float32"
    """Precision of latents on disk: `bfloat16` halves them."""
    workers: Count | None = None
    """Threads that decode; none means one for each core."""
    verify: bool = False
    """Hashes every file of the cache, not only those that changed by their size or time."""


# The report


@dataclass(frozen=True)
class DataReport:
    """What became of every clip of a folder."""

    found: int  # captioned clips, and clips without a caption
    used: int  # of them
    dropped: Sequence[Dropped]  # the others
    examples: int
    frames: int  # of all examples
    frames_left_out: int  # at the ends of used clips, at the rate of the examples
    seconds: float  # of video in all examples
    shapes: dict[str, tuple[int, int]]  # clip shape -> (examples, tokens of all of them), the most tokens first
    stale: int  # entries of the cache of another codec, encoder, version or precision: not read
    damaged: Sequence[str]  # files of the cache that were deleted; what they held was made anew

    @property
    def tokens(self) -> int:
        return sum(tokens for _, tokens in self.shapes.values())

    def lines(self) -> list[str]:
        """The report on a terminal."""
        reasons = Counter(reason for _, reason in self.dropped)
        named = {reason: next(name for name, why in self.dropped if why == reason) for reason in reasons}
        stale = f"{self.stale:,} entries of the cache are of another codec, encoder or precision and were not read"
        return [
            f"{self.found:,} clips found, {self.used:,} used in {self.examples:,} examples, {len(self.dropped):,} dropped",
            *_first([f"  dropped {number:,}: {reason} ({named[reason]}{', ...' if number > 1 else ''})" for reason, number in reasons.most_common()]),
            f"{self.seconds:,.0f} seconds of video, {self.frames:,} frames; {self.frames_left_out:,} frames left out at the ends of clips",
            f"{self.tokens:,} tokens in {len(self.shapes):,} shapes",
            *_first([f"  {shape}: {examples:,} examples, {tokens:,} tokens" for shape, (examples, tokens) in self.shapes.items()]),
            *([stale] if self.stale else []),
            *_first([f"  damaged and made anew: {name}" for name in self.damaged]),
        ]


def _first(lines: Sequence[str]) -> list[str]:
    return [*lines[:SHOWN], *([f"  and {len(lines) - SHOWN:,} more"] if len(lines) > SHOWN else [])]


# Decoding


class Cutout(NamedTuple):
    """An example's pixels and the key of its latents."""

    key: str
    video: Tensor  # uint8 [T,3,h,w]


class Seen(NamedTuple):
    """A clip has been dealt with. reason: why it cannot be used."""

    name: str
    reason: str | None


def read_ahead(work: Callable[[T], Iterator[R]], items: Iterable[T], *, workers: int) -> Generator[R, None, None]:
    """What `work` gives of every item, made in threads, in the order it comes; at most as many as there are threads lie waiting. The first exception is raised here."""
    todo, found, stopping = iter(items), queue.Queue[R | BaseException | None](workers), threading.Event()
    lock = threading.Lock()

    def put(result: R | BaseException | None) -> None:
        while not stopping.is_set():
            with contextlib.suppress(queue.Full):
                return found.put(result, timeout=0.1)

    def loop() -> None:
        try:
            while not stopping.is_set():
                with lock:
                    item = next(todo)
                for result in work(item):
                    put(result)
        except StopIteration:
            put(None)
        except BaseException as error:
            put(error)

    threads = [threading.Thread(target=loop, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    running = workers
    try:
        while running:
            result = found.get()
            if isinstance(result, BaseException):
                raise result
            if result is None:
                running -= 1
            else:
                yield result
    finally:
        stopping.set()


class Decoder:
    """Looks at clips, in threads, and gives the windows whose latents are not kept."""

    def __init__(self, folder: Path, cut: Cut, cache: Cache, findings: Findings) -> None:
        self.folder, self.cut, self.cache, self.findings = folder, cut, cache, findings

    def __call__(self, name: str) -> Iterator[Cutout | Seen]:
        """The missing windows of a clip, then `Seen`. A clip that cannot be read is no error."""
        path = self.folder / name
        try:
            before = stamp(path)
            content = self.findings.hashes.get(before) or file_hash(path)
        except OSError as error:
            yield Seen(name, "no such file" if isinstance(error, FileNotFoundError) else str(error.strerror))
            return
        try:
            found: Facts | str = yield from self._windows(path, content)
            if stamp(path) != before:
                yield Seen(name, "changed while it was read")
                return
        except OSError as error:
            yield Seen(name, str(error.strerror))
            return
        except UserError as error:
            found = reason_of(error, path).replace(str(path), name)
        self.findings.add(content, seal(path), found, image=is_image(name))
        self.findings.hashes[before] = content
        yield Seen(name, found if isinstance(found, str) else None)

    def _windows(self, path: Path, content: str) -> Generator[Cutout, None, Facts | str]:
        """The missing windows of a clip. Returns what it is, or why it cannot be used."""
        facts = self.findings.facts.get((content, is_image(path.name)))
        if isinstance(facts, str):
            return facts
        if facts is None:
            windows = all_windows(read_frames(path), self.cut)
            while True:
                try:
                    span, video = next(windows)
                except StopIteration as end:
                    return end.value
                yield Cutout(self._key(content, span, (video.shape[2], video.shape[3])), video)
        size = self.cut.target(facts.height, facts.width)
        wanted = [span for span in self.cut.spans(facts.shown(self.cut.fps)) if size and self._key(content, span, size) not in self.cache.latents]
        if size and wanted:
            for span, video in some_windows(read_frames(path), self.cut, wanted):
                yield Cutout(self._key(content, span, size), video)
        return facts

    def _key(self, content: str, span: Span, size: tuple[int, int]) -> str:
        return latents_key(content, span, size, self.cut.fps)


# Encoding


class Encoded(NamedTuple):
    """Examples to train on, and what became of every clip."""

    examples: CachedClips
    report: DataReport


def encode_folder(
    model: TrainableModel,
    folder: Path,
    out: Path,
    *,
    lineage: Lineage,
    windows: Windows = AS_TRAINED,
    stored: Stored = "float32",
    workers: int | None = None,
    rank: int = 0,
    ranks: int = 1,
    wait: Callable[[], None] = lambda: None,
    verify: bool = False,
    quiet: bool = False,
) -> Encoded:
    """Fills the cache `out` with what is missing of a folder of clips, and opens it.

    Under several processes all of them call it: each encodes its share, then `wait`s for the others; the first one writes the plan and the report. What is kept stays whatever
    happens. Raises UserError where no clip can be used, where the disk is full, and where the model takes no such examples.
    """
    check_can_write(out)
    cut = cut_for(model, windows)
    found, dropped = find_clips(folder)
    cache, findings = Cache(out, lineage, stored, verify=verify), Findings(out)
    names, captions = sorted({clip.name for clip in found}), ["", *dict.fromkeys(clip.text for clip in found)]
    try:
        _encode_clips(model, names[rank::ranks], Decoder(folder, cut, cache, findings), workers=workers or len(os.sched_getaffinity(0)), quiet=quiet or rank > 0)
        _encode_captions(model, captions[rank::ranks], cache, quiet=quiet or rank > 0)
    except BaseException:
        with contextlib.suppress(UserError):
            findings.flush()
            cache.close()
        raise
    findings.flush()
    cache.close(index=False)
    wait()
    for shards in (cache.latents, cache.texts):
        shards.look()
    findings.read()
    encoded = _planned(model, folder, cut, cache, findings, found, dropped)
    if rank == 0:
        cache.close()
        _write(encoded, out, lineage, stored)
    if not encoded.report.used:
        reasons = "; ".join(sorted({reason for _, reason in encoded.report.dropped})[:3])
        raise UserError(f"none of {encoded.report.found} clips can be used, {folder}: {reasons}. Mend or replace the clips")
    return encoded


def _encode_clips(model: TrainableModel, names: Sequence[str], decoder: Decoder, *, workers: int, quiet: bool) -> None:
    cache, encoded, dropped, begun, told = decoder.cache, 0, 0, time.monotonic(), time.monotonic()
    with Progress("encode clips", total=len(names), quiet=quiet) as progress, contextlib.closing(read_ahead(decoder, names, workers=workers)) as found:
        for each in found:
            if isinstance(each, Seen):
                dropped += each.reason is not None
                progress.advance(f"{encoded / (time.monotonic() - begun):.1f} examples/s  {dropped} dropped")
            elif each.key not in cache.latents:  # another file has the same bytes
                frames, _, height, width = each.video.shape
                spec = model.latents.shape(ClipShape(frames, height, width))
                cache.latents.make_room(torch.Size(spec).numel() * DTYPES[cache.stored].itemsize)
                cache.latents.put(each.key, encode_window(model, each.video, cache.stored))
                encoded += 1
            if time.monotonic() - told > 10:
                told = time.monotonic()
                decoder.findings.flush()


def _encode_captions(model: TrainableModel, captions: Sequence[str], cache: Cache, *, quiet: bool) -> None:
    texts = {text_key(text): text for text in captions}
    todo = missing(cache.texts, texts)
    with Progress("encode captions", total=len(todo), quiet=quiet) as progress:
        for key in todo:
            entry = encode_caption(model, texts[key])
            cache.texts.make_room(sum(part.nbytes for part in entry.values()))
            cache.texts.put(key, entry)
            progress.advance()


# The plan


def _planned(model: TrainableModel, folder: Path, cut: Cut, cache: Cache, findings: Findings, found: Sequence[Named], dropped: Sequence[Dropped]) -> Encoded:
    """What the folder comes to, from what is kept. Raises UserError where something that was kept has gone."""
    rows: list[Example] = []
    left, out, used = 0, list(dropped), 0
    known = {name: _known(folder, name, findings) for name in {clip.name for clip in found}}
    for name, text in found:
        content, facts = known[name]
        reason, size, spans = _use(cut, facts)
        if reason is not None or size is None:
            out.append(Dropped(name, reason or ""))
            continue
        assert isinstance(facts, Facts)
        used += 1
        left += facts.shown(cut.fps) - sum(span.frames for span in spans)
        for span in spans:
            key, shape = latents_key(content, span, size, cut.fps), model.latents.shape(ClipShape(span.frames, *size))
            rows.append(Example(name, content, text, *span, *size, key, shape))
    gone = [*missing(cache.latents, (row.key for row in rows)), *missing(cache.texts, (text_key(row.text) for row in rows))]
    if gone:
        raise UserError(f"{len(gone)} entries are missing that were kept a moment ago, {cache.folder}. Run the same command again")
    frames = sum(row.frames for row in rows)
    report = DataReport(
        found=len(found) + len(dropped),
        used=used,
        dropped=out,
        examples=len(rows),
        frames=frames,
        frames_left_out=left,
        seconds=sum(row.frames for row in rows if row.frames > 1) / cut.fps,
        shapes=_shapes(rows, model.patch),
        stale=cache.latents.stale + cache.texts.stale,
        damaged=cache.damaged,
    )
    return Encoded(CachedClips(rows, cache, folder, cut), report)


def _known(folder: Path, name: str, findings: Findings) -> tuple[str, Facts | str]:
    """The hash of a clip's bytes, and what it is or why it cannot be used."""
    path = folder / name
    try:
        content = findings.hashes.get(stamp(path)) or file_hash(path)
    except OSError as error:
        return "", "no such file" if isinstance(error, FileNotFoundError) else str(error.strerror)
    return content, findings.facts.get((content, is_image(name)), "changed while it was read")


def _use(cut: Cut, facts: Facts | str) -> tuple[str | None, tuple[int, int] | None, list[Span]]:
    """Why a clip cannot be used; or the size and the spans of its examples."""
    if isinstance(facts, str):
        return facts, None, []
    size, shown = cut.target(facts.height, facts.width), facts.shown(cut.fps)
    if size is None:
        return f"{facts.height}x{facts.width} is smaller than {cut.sides[0]}x{cut.sides[1]}, the least this model takes", None, []
    spans = cut.spans(shown)
    return (None, size, spans) if spans else (f"{shown} frames at {cut.fps:g} a second are fewer than {cut.first}, the least this model takes", None, [])


def _shapes(rows: Sequence[Example], patch: tuple[int, int, int]) -> dict[str, tuple[int, int]]:
    counts = Counter((row.frames, row.height, row.width, row.shape) for row in rows)
    found = {str(ClipShape(*size)): (number, number * num_tokens(shape, patch)) for (*size, shape), number in counts.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def _write(encoded: Encoded, out: Path, lineage: Lineage, stored: Stored) -> None:
    """The plan under a name that says what it is of, and the report beside it."""
    rows, report, cut = encoded.examples.rows, encoded.report, encoded.examples.cut
    name = entry_key({"lineage": asdict(lineage), "stored": stored, "cut": asdict(cut), "rows": [(row.name, row.text, row.key) for row in rows]})[:16]
    told = {"clips": str(encoded.examples.folder), "lineage": asdict(lineage), "stored": stored, "cut": asdict(cut), **asdict(report)}
    told["dropped"] = [drop._asdict() for drop in report.dropped]
    if rows:
        save_plan(out / "plans" / f"{name}.parquet", rows)
    atomic_write(out / "plans" / f"{name}.json", (json.dumps(told, indent=2, ensure_ascii=False) + "\n").encode())
    atomic_write(out / "report.json", (json.dumps(told, indent=2, ensure_ascii=False) + "\n").encode())


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    """`resume` changes nothing: what is kept is never made again."""
    from accelerate import PartialState

    if cfg.clips is None:
        raise UserError("no folder of clips, clips. Give one: --clips FOLDER")
    started = time.monotonic()
    here = PartialState(cpu=not torch.cuda.is_available(), timeout=LONGEST_WAIT)
    model = load_model(cfg.model, device=here.device)
    encoded = encode_folder(
        model,
        cfg.clips,
        cfg.out,
        lineage=lineage_of(cfg.model, model),
        windows=cfg.windows,
        stored=cfg.stored,
        workers=cfg.workers,
        rank=here.process_index,
        ranks=here.num_processes,
        wait=here.wait_for_everyone,
        verify=cfg.verify,
    )
    report = encoded.report
    return {
        "cache": str(cfg.out),
        "report": report.lines(),
        "clips": report.found,
        "used": report.used,
        "examples": report.examples,
        "dropped": {name: reason for name, reason in report.dropped[:100]},
        "tokens": report.tokens,
        "stale": report.stale,
        "wall_seconds": round(time.monotonic() - started, 2),
    }

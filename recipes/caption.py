"""Dense captions for a folder of clips, by a vision-language model (`rushes caption`), after the re-captioning of DALL-E 3 (Betker et al. 2023) and Sora (Brooks et al. 2024).

Clips are decoded in threads while the model speaks of the batch before. Each gets one line of `out`, a metadata.jsonl with the new text, the old one where there was one, and what
speaks against the new one; clips that could not be read or described are lines, too. Lines come a batch at a time, whole, so the same command goes on wherever it ended. It takes
away lines, and clips beside them, whose clip has gone from the folder or is another now.
What it leaves out: captions are made of frames alone (no sound, no words about the clip), and by one process. `caption_train.py` fine-tunes the model.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from align.config import Config as BaseConfig
from align.config import Count, NonNegative, Positive, Whole, dump
from align.progress import Progress
from align.run import lock_folder
from base_model.checkpoint import atomic_write, check_can_write, disk_errors, read_json
from base_model.errors import UserError
from base_model.prompts.caption import INSTRUCTION, Caption, Captioner, Sight, Taken, clip_patches, take_frames
from base_model.prompts.text import TextEncoder, likeness
from base_model.prompts.vision import PatchFormat, Precision, load_vlm
from recipes.clip_folder import TABLE, every_clip, inside, read_frames, reason_of
from recipes.weights import file_hash
from reward.encoders import Encoder, load_encoder

CARD = "captioner.json"
"""In the folder of a model that `rushes caption-train` wrote: what it was asked, and of which frames."""
OWN = ("file_name", "text", "old_text", "similarity", "agreement", "old_agreement", "flags", "error", "file_sha256")
"""Columns of a line of captions; what else stands in the line of a clip is kept."""
UNLIKE_OLD, UNLIKE_CLIP = "says something else than the old text", "does not fit the clip"


class Frames(BaseConfig):
    """What is seen of a clip."""

    fps: Positive = 2.0
    """Frames seen a second; fewer of a clip that would need more than `max_frames`."""
    min_frames: Count = 4
    """Frames seen of a short clip."""
    max_frames: Count = 32
    """Most frames seen."""
    min_pixels: Count = 128 * 28 * 28
    """Pixels a frame; smaller frames grow."""
    max_pixels: Count = 448 * 448
    """Pixels a frame; larger frames shrink."""

    @property
    def sight(self) -> Sight:
        return Sight(**self.model_dump())


class Flags(BaseConfig):
    """When a new caption is looked at again. Numbers are kept in every line, and another limit flags the lines anew without asking the model."""

    encoder: str = ""
    """Folder or hub id of a CLIP, SigLIP or X-CLIP that says how well clip and caption agree; empty asks none."""
    agreement: NonNegative = 0.2
    """A caption that agrees less with its clip is flagged: a cosine, and the encoder's own scale. 0.2 is for CLIP; look at the column first."""
    similarity: NonNegative = 0.3
    """A caption less like the old text is flagged: cosine of their sentence embeddings (all-MiniLM-L6-v2, the first 64 tokens). It finds another subject, not another detail."""


class Config(BaseConfig):
    clips: Path | None = None
    """Folder of clips and images. Old captions, if any, are in its `metadata.jsonl`, whose other columns are kept, or in a text file beside each clip."""
    model: str = "Qwen/Qwen2.5-VL-3B-Instruct"
    """Folder or hub id of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL. A hub id is downloaded only where HF_HUB_OFFLINE is 0."""
    revision: str = ""
    """Revision of the model on the hub."""
    dtype: Precision = "float32"
    """Precision of the model; bfloat16 on a GPU."""
    out: Path = Path("runs/captions/metadata.jsonl")
    """File of captions, in a folder of its own: clips are put beside it as hard links, so `rushes sft --data` reads that folder. Copies where links cannot be."""
    instruction: str | None = None
    """What the model is asked; none means what `rushes caption-train` taught it to answer, or else a request for everything that can be seen."""
    frames: Frames | None = None
    """Frames that are seen; none means those it was trained on, or else two a second."""
    max_tokens: Count = 256
    """Longest answer; what is cut off there ends with its last whole sentence."""
    batch: Count = 8
    """Clips described at once."""
    workers: Whole = 0
    """Threads that decode; 0 means one for each core."""
    flags: Flags = Flags()
    """What is looked at again."""


# What there is


class Clip(NamedTuple):
    """A clip of the folder, its old captions and the other columns of its line."""

    name: str
    old: str | None
    columns: Mapping[str, Any]


def clips_of(folder: Path) -> list[Clip]:
    """All clips and images of a folder, in the order of their names. Raises UserError where there are none."""
    captions, columns = every_clip(folder), _columns(folder / TABLE)
    if not captions:
        raise UserError(f"no clips, {folder}. Give a folder with clips or images")
    return [Clip(name, "\n".join(texts) or None, columns.get(name, {})) for name, texts in captions.items()]


def _columns(table: Path) -> dict[str, dict[str, Any]]:
    """What the lines of a table say beside that; lines that cannot be read are left out."""
    found: dict[str, dict[str, Any]] = {}
    lines = table.read_bytes().split(b"\n") if table.is_file() else []
    for line in lines:
        try:
            row = json.loads(line)
            found[os.path.normpath(row["file_name"])] = {key: value for key, value in row.items() if key not in OWN}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue
    return found


def look(folder: Path, name: str, sight: Sight, form: PatchFormat) -> Taken | str:
    """What is seen of a clip, or why nothing is."""
    try:
        return take_frames(read_frames(folder / name), sight, form)
    except UserError as error:
        return reason_of(error, folder / name)
    except OSError as error:
        return str(error.strerror or error)


# What is written


Row = dict[str, Any]


class Table:
    """The lines of `out`: read, mended where a kill or a full disk left half a line, and added to a batch at a time."""

    def __init__(self, path: Path, flags: Flags) -> None:
        """Lines of clips that could not be described are dropped: they are tried again. Raises UserError for a file that is not of captions."""
        self.path = path
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # behind the last end of line there is nothing, or half a line
        try:
            rows: list[Row] = [json.loads(line) for line in lines]
            self.rows = {row["file_name"]: {**row, "flags": flags_of(row, flags)} for row in rows if "error" not in row}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"not a file of captions, {path}: {error!r}. Give another --out") from error
        if path.exists() and (rows != list(self.rows.values()) or not path.read_bytes().endswith(b"\n")):
            atomic_write(path, b"".join(map(_line, self.rows.values())))

    def add(self, rows: Sequence[Row]) -> None:
        """Behind the others, on disk when it returns. Raises UserError where there is no room: then none of them is there."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        size = self.path.stat().st_size if self.path.exists() else 0
        with disk_errors(self.path):
            try:
                with open(self.path, "ab") as file:
                    file.write(b"".join(map(_line, rows)))
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                os.truncate(self.path, size)
                raise
        self.rows |= {row["file_name"]: row for row in rows}

    def drop(self, names: Collection[str]) -> None:
        """Takes their lines out."""
        self.rows = {name: row for name, row in self.rows.items() if name not in names}
        atomic_write(self.path, b"".join(map(_line, self.rows.values())))


def _line(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def flags_of(row: Mapping[str, Any], flags: Flags) -> list[str]:
    """What speaks against a new caption."""
    limits = ((UNLIKE_OLD, row["similarity"], flags.similarity), (UNLIKE_CLIP, row["agreement"], flags.agreement))
    return [flag for flag, value, least in limits if value is not None and value < least]


def put_beside(source: Path, target: Path) -> None:
    """The clip in the folder of captions: the same file under a second name, or a copy. Raises UserError where another file has that name."""
    if target.exists():
        if not same_content(source, target):
            raise UserError(f"another clip has that name, {target}. Delete it, or give another --out")
        return
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source.resolve(), target)
        except OSError:
            partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
            try:
                shutil.copyfile(source, partial)
                os.replace(partial, target)
            finally:
                partial.unlink(missing_ok=True)


def same_content(first: Path, second: Path) -> bool:
    """Whether two files are one, or hold the same bytes."""
    return os.path.samefile(first, second) or filecmp.cmp(first, second, shallow=False)


def is_of(row: Mapping[str, Any], source: Path, target: Path) -> bool:
    """Whether a line is of the bytes that its clip holds now; lines of an earlier version, which do not say of which they are, are held against the clip beside them."""
    try:
        if "file_sha256" in row:
            return bool(file_hash(source) == row["file_sha256"])
        return not target.is_file() or same_content(source, target)
    except OSError:
        return source.is_file()  # it cannot be read just now, which says nothing against the line


def drop_stale(table: Table, folder: Path, names: Collection[str], workers: int) -> None:
    """Takes away lines, and the clips beside them, whose clip is none of the `names` in the folder now, or another under its name. Raises UserError where that is all lines."""

    def stays(name: str) -> bool:
        return name in names and is_of(table.rows[name], folder / name, table.path.parent / name)

    with ThreadPoolExecutor(workers) as pool:
        stale = {name for name, kept in zip(table.rows, pool.map(stays, table.rows), strict=True) if not kept}
    if stale and len(stale) == len(table.rows):
        raise UserError(f"none of the {len(stale)} captions there is of a clip as {folder} has it now, {table.path}. Give the folder they are of, or another --out")
    for name in stale:  # the clips first: a kill before the lines are gone leaves lines that are dropped again
        target = inside(table.path.parent, name)
        if target.resolve() != (folder / name).resolve():
            with disk_errors(target):
                target.unlink(missing_ok=True)
    if stale:
        table.drop(stale)


# What is said


def agreements(encoder: Encoder, videos: Sequence[Tensor], texts: Sequence[str]) -> list[float]:
    """How well clips, uint8 [T,3,H,W] of any sizes, and texts agree: cosines."""
    told = encoder.texts(texts)  # [B,D]
    seen = [encoder.clips(video[None].to(told.device).float() / 255) for video in videos]  # [1,N,D] each
    values: list[float] = encoder.cosines(torch.cat(seen), told).tolist()
    return values


class Speaker:
    """Everything that is asked about a batch of clips."""

    def __init__(self, cfg: Config, captioner: Captioner) -> None:
        self.flags, self.captioner, self.words = cfg.flags, captioner, TextEncoder(keep=4 * cfg.batch)
        self.encoder = load_encoder(cfg.flags.encoder, fps=1.0) if cfg.flags.encoder else None
        if self.encoder is not None and not self.encoder.reads_text:
            raise UserError(f"flags.encoder: {cfg.flags.encoder} reads no text. Give a CLIP, a SigLIP with its text tower, or an X-CLIP")

    def __call__(self, clips: Sequence[Clip], seen: Sequence[Taken | str]) -> list[Row]:
        """One line a clip."""
        good = [(clip, taken) for clip, taken in zip(clips, seen, strict=True) if isinstance(taken, Taken)]
        said = self._said([taken for _, taken in good])
        told = {clip.name: (taken, caption) for (clip, taken), caption in zip(good, said, strict=True) if caption.text}
        new = {name: caption.text for name, (_, caption) in told.items()}
        olds = {clip.name: clip.old for clip, _ in good if clip.old is not None and clip.name in new}
        alike = dict(zip(olds, likeness(self.words, list(olds.values()), [new[name] for name in olds]), strict=True))
        fits, fitted = self._fits({name: taken for name, (taken, _) in told.items()}, new), self._fits({name: told[name][0] for name in olds}, olds)
        rows = []
        for clip, taken in zip(clips, seen, strict=True):
            row: Row = {"file_name": clip.name}
            if clip.name in new:
                numbers = {"similarity": alike.get(clip.name), "agreement": fits.get(clip.name), "old_agreement": fitted.get(clip.name)}
                row |= {"text": new[clip.name], "old_text": clip.old, **numbers}
                row["flags"] = flags_of(row, self.flags)
            else:
                silent = f"no whole sentence in {self.captioner.max_tokens} tokens: raise max_tokens"
                row |= {"old_text": clip.old, "error": taken if isinstance(taken, str) else silent}
            rows.append({**clip.columns, **row})
        return rows

    def _said(self, seen: Sequence[Taken]) -> list[Caption]:
        if not seen:
            return []
        try:
            return self.captioner([clip_patches(taken, self.captioner.vlm.patches) for taken in seen])
        except torch.OutOfMemoryError as error:
            raise UserError(f"{len(seen)} clips have no room on {self.captioner.vlm.network.device}. Lower batch, frames.max_frames or frames.max_pixels") from error

    def _fits(self, seen: Mapping[str, Taken], texts: Mapping[str, str]) -> dict[str, float]:
        if self.encoder is None or not seen:
            return {}
        return dict(zip(seen, agreements(self.encoder, [taken.frames for taken in seen.values()], [texts[name] for name in seen]), strict=True))


# The command


def settings_of(cfg: Config) -> tuple[str, Frames]:
    """What is asked, of which frames: as the configuration says, or the model's own card, or by default."""
    card = Path(cfg.model) / CARD
    own = read_json(card, "what the captioner was asked") if card.is_file() else {}
    try:
        frames = cfg.frames or (Frames.model_validate(own["frames"]) if own else Frames())
        return cfg.instruction or str(own["instruction"] if own else INSTRUCTION), frames
    except (KeyError, ValueError) as error:
        raise UserError(f"cannot read what the captioner was asked, {card}: {error!r}. Train it again, or delete the file and give instruction and frames") from error


def check_same(card: Path, made: Mapping[str, Any], lines: bool) -> None:
    """Writes what made the captions beside them. Raises UserError where there are lines that something else made."""
    if lines and card.exists():
        before = read_json(card, "what made the captions")
        differ = sorted(key for key in {*made, *before} if made.get(key) != before.get(key))
        if differ:
            raise UserError(f"the captions there are were made with another {', '.join(differ)}, {card}. Give the same, or another --out")
    atomic_write(card, (json.dumps(made, indent=2, ensure_ascii=False) + "\n").encode())


def ahead(batches: Sequence[Sequence[Clip]], folder: Path, sight: Sight, form: PatchFormat, workers: int) -> Iterator[tuple[Sequence[Clip], list[Taken | str]]]:
    """The batches with what is seen of their clips, decoded in threads, one batch ahead."""
    with ThreadPoolExecutor(workers) as pool:

        def begin(batch: Sequence[Clip]) -> list[Future[Taken | str]]:
            return [pool.submit(look, folder, clip.name, sight, form) for clip in batch]

        waiting = begin(batches[0]) if batches else []
        try:
            for k, batch in enumerate(batches):
                now, waiting = waiting, begin(batches[k + 1]) if k + 1 < len(batches) else []
                yield batch, [future.result() for future in now]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def main(cfg: Config, *, resume: bool = False) -> dict[str, Any]:
    """`resume` changes nothing: clips that have their line are not described again."""
    begun = time.monotonic()
    if cfg.clips is None:
        raise UserError("no clips to describe, clips. Give a folder with clips, --clips FOLDER")
    if cfg.out.resolve() == (cfg.clips / TABLE).resolve():
        raise UserError(f"the old captions are there, {cfg.out}. Give another --out")
    clips = clips_of(cfg.clips)
    check_can_write(cfg.out.parent)
    with disk_errors(cfg.out.parent):
        cfg.out.parent.mkdir(parents=True, exist_ok=True)
    lock_folder(cfg.out.parent)
    instruction, frames = settings_of(cfg)
    table = Table(cfg.out, cfg.flags)
    vlm = load_vlm(cfg.model, revision=cfg.revision, dtype=cfg.dtype, what="captioner")
    decides = {"instruction": instruction, "frames": dump(frames), "max_tokens": cfg.max_tokens, "encoder": cfg.flags.encoder, "dtype": cfg.dtype}
    check_same(cfg.out.with_suffix(".card.json"), {"model": vlm.name, "revision": vlm.revision, "weights": vlm.fingerprint, **decides}, bool(table.rows))
    vlm.network.to("cuda" if torch.cuda.is_available() else "cpu")
    speaker = Speaker(cfg, Captioner(vlm, instruction=instruction, max_tokens=cfg.max_tokens))

    workers = cfg.workers or len(os.sched_getaffinity(0))
    drop_stale(table, cfg.clips, {clip.name for clip in clips}, workers)
    left = [clip for clip in clips if clip.name not in table.rows]
    errors: dict[str, str] = {}
    batches = [left[begin : begin + cfg.batch] for begin in range(0, len(left), cfg.batch)]
    with Progress("caption", total=len(clips), done=len(clips) - len(left)) as progress:
        for batch, seen in ahead(batches, cfg.clips, frames.sight, vlm.patches, workers):
            rows = speaker(batch, seen)
            for row in rows:
                if "error" not in row:
                    put_beside(cfg.clips / row["file_name"], cfg.out.parent / row["file_name"])
                    row["file_sha256"] = file_hash(cfg.clips / row["file_name"])
            table.add(rows)
            errors |= {row["file_name"]: row["error"] for row in rows if "error" in row}
            flagged = sum(bool(row.get("flags")) for row in table.rows.values())
            progress.advance(f"{len(errors)} errors, {flagged} flagged", steps=len(batch))
    for name, reason in list(errors.items())[:8]:
        print(f"caption: {name}: {reason}", file=sys.stderr)
    described = [table.rows[clip.name] for clip in clips if clip.name not in errors]
    flags = {flag: sum(flag in row["flags"] for row in described) for flag in (UNLIKE_OLD, UNLIKE_CLIP)}
    return {"out": str(cfg.out), "clips": len(clips), "described": len(described), "errors": len(errors), "flagged": flags, "wall_seconds": round(time.monotonic() - begun, 1)}

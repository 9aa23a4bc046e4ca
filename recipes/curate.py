"""From clips as they are found to pairs worth learning from (`rushes curate INPUT`): every clip is measured, thresholds decide, and nothing disappears without a row that says why.

    INPUT --> sources --> workers --> OUT/scores/         what was found of every clip, by `clip_scores.py`; kept as it is found
                                      + thresholds -->    OUT/decisions.parquet   kept, or the reasons why not
                                                          OUT/kept/               the clips, as `rushes encode --clips` and `rushes sft --data` read them
                                                          OUT/curated.json        thresholds and counts
                                                          OUT/report.html         a page to look at (`curation_page.py`)

Measuring is what costs; deciding reads the table alone, so thresholds are changed by running again with others. The same command goes on where it was killed: what was finished
is not measured again. Clips are decoded in processes with a limit on memory and time, so one that hangs or kills its worker is a row with an error.
In memory are two clips' rows a worker, a part of the table (256 rows with their thumbnails), and some 100 bytes for every row of the input; deciding needs the numbers of all.
What it leaves out: captions are not written (`rushes caption` does), and clips are not cut.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import queue
import shutil
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from align.config import Config as BaseConfig
from align.config import Count, NonNegative, Positive, dump
from align.progress import Progress
from align.run import lock_folder
from base_model.checkpoint import atomic_write, check_can_write, disk_errors
from base_model.errors import UserError
from base_model.video.curate import MEASURES, SENSIBLE
from base_model.video.hashes import NEAR_BITS, near_duplicates
from recipes.clip_openers import on_disk
from recipes.clip_rows import Columns, Input, Source
from recipes.clip_scores import SUFFIXES, Looks, Reader, Wanted, checked, load_looks, measurer, measures_identity, open_clip, safety_identity, seen_of
from recipes.clip_sources import count, sources
from recipes.clip_table import Table
from recipes.clip_workers import Lost, Worker
from recipes.curation_page import write_page
from recipes.encode import read_ahead
from recipes.filters import NONE, Filters
from recipes.kept_clips import Files, write_kept
from recipes.opt_out import NOBODY, OptOut, load_opt_out
from recipes.score_words import tenths, with_scores
from recipes.weights import file_hash

SHOWN = 8  # rules on the terminal
PRELOADED = ("recipes.clip_scores", "av", "cv2")


class Range(BaseConfig):
    """The least and the most that a number may be; what is not given does not matter."""

    least: float | None = None
    """Least."""
    most: float | None = None
    """Most."""


def _sensible(name: str) -> Range | None:
    least, most = SENSIBLE.get(name, (None, None))
    return None if least is None and most is None else Range(least=least, most=most)


class Keep(BaseConfig):
    """What a clip must be to be kept. A number that its clip cannot tell, or that was not measured, is no reason against it."""

    frames: Range | None = _sensible("frames")
    """Frames."""
    seconds: Range | None = _sensible("seconds")
    """Seconds."""
    fps: Range | None = _sensible("fps")
    """Frames a second."""
    fps_irregularity: Range | None = _sensible("fps_irregularity")
    """How uneven the times of frames are."""
    width: Range | None = None
    """Pixels."""
    height: Range | None = None
    """Pixels."""
    cuts: Range | None = _sensible("cuts")
    """Hard cuts."""
    dissolves: Range | None = _sensible("dissolves")
    """Gradual transitions."""
    longest_shot: Range | None = _sensible("longest_shot")
    """Seconds without a cut."""
    motion: Range | None = _sensible("motion")
    """Diagonals a second."""
    camera_motion: Range | None = _sensible("camera_motion")
    """Diagonals a second that the camera explains."""
    object_motion: Range | None = _sensible("object_motion")
    """Diagonals a second that it does not."""
    flicker: Range | None = _sensible("flicker")
    """Deviation of brightness from frame to frame, of 255."""
    flashes: Range | None = _sensible("flashes")
    """Flashes in any second."""
    sharpness: Range | None = _sensible("sharpness")
    """Variance of the Laplacian."""
    brightness: Range | None = _sensible("brightness")
    """Mean luma, of 1."""
    crushed_share: Range | None = _sensible("crushed_share")
    """Share of pixels without detail in the shadows."""
    blown_share: Range | None = _sensible("blown_share")
    """Share of pixels without detail in the lights."""
    contrast: Range | None = _sensible("contrast")
    """Deviation of luma within a frame."""
    letterbox: Range | None = _sensible("letterbox")
    """Share of the frame that is a border."""
    static_share: Range | None = _sensible("static_share")
    """Share of frames that are the one before again."""
    longest_still: Range | None = _sensible("longest_still")
    """Seconds in which nothing changes."""
    repeated_share: Range | None = _sensible("repeated_share")
    """Share of frames that are repeated between moving ones."""
    black_share: Range | None = _sensible("black_share")
    """Share of black frames."""
    noise: Range | None = _sensible("noise")
    """Of 255."""
    blockiness: Range | None = _sensible("blockiness")
    """Of a block code, times: 1 is none."""
    agreement: Range | None = None
    """Cosine of clip and caption, by the encoder of `agreement`."""
    aesthetic: Range | None = None
    """By the head of `aesthetic`."""
    faces: Range | None = None
    """Most faces in a frame, by the detector of `faces`."""
    caption: Range | None = None
    """Characters of the caption: `least: 1` asks for one."""
    safety: tuple[Literal["allow", "review", "error", "block"], ...] = ("allow",)
    """Verdicts of the safety filters that are kept, where they were asked."""
    extension: bool = True
    """Drops files whose name says another container than they are."""
    apart: NonNegative | None = NEAR_BITS
    """Of clips that are at most so many bits apart (perceptual hashes), only the best is kept: most pixels, then longest, then first. null keeps all, copies of a file too."""


class Config(BaseConfig):
    input: str | None = None
    """Folder of clips, manifest (json, jsonl, csv, tsv, parquet), tar files of webdataset (`shards/*.tar`, `{000..041}.tar`), dataset on the hub or saved in a folder, or an
    address that fsspec knows."""
    out: Path = Path("runs/curated")
    """Folder of scores, decisions and kept clips."""
    columns: Columns = Columns()
    """What columns are called, where it is none of the usual names."""
    root: Path | None = None
    """Folder in which names in a manifest begin, and which they may not leave; its own without."""
    split: str = "train"
    """Split of a dataset."""
    workers: Count | None = None
    """Processes that decode and measure; none means one for each core."""
    clip_seconds: Positive = 600
    """Seconds that a clip may take; then its worker is killed."""
    clip_memory: Count = 4 << 30
    """Bytes that a clip may take in its worker."""
    again: bool = False
    """Measures rows again that ended in an error."""
    keep: Keep = Keep()
    """Thresholds. Others need no clip to be measured again."""
    say: tuple[str, ...] = ()
    """Measures that are said behind kept captions, by their place among the kept from 0 to 9 (`score_words.py`). What a model is told in training, it can be asked for."""
    report: bool = True
    """Writes `report.html`: what was kept, what was dropped and why, with small pictures, and how measures are spread. Without an INPUT `rushes curate --report` writes the page of
    `out` again."""
    files: Files = "link"
    """How clips come into `kept`: hard links to files of this machine, or copies."""
    opt_out: Path | None = None
    """Clips that must not be used: lines of sha256 or perceptual hashes (`recipes/opt_out.py`)."""
    safety: bool = False
    """Asks the safety filters about clips and captions: words, flashing, broken clips, and those of `filters`."""
    filters: Filters = NONE
    """Safety filters beside those that need no weights; every worker holds its own."""
    agreement: str | None = None
    """CLIP, SigLIP or X-CLIP checkpoint, folder or hub id: how well clips show their captions, and an embedding of each."""
    aesthetic: Path | None = None
    """Linear head on that encoder's embedding of a frame, safetensors."""
    faces: Path | None = None
    """YuNet face detector, ONNX: how many faces are seen."""


# Deciding


class Reason(NamedTuple):
    """Why a clip is not kept: the rule, and what it met."""

    rule: str
    text: str


@dataclass(frozen=True)
class Decisions:
    """What becomes of N rows, each in its place."""

    kept: list[bool]
    reasons: list[list[Reason]]  # empty where a row is kept
    repeats: list[int | None]  # the row that it repeats, where that is why
    opted_out: list[bool]

    def counts(self) -> dict[str, int]:
        """Rule -> rows that it speaks against, the most first; a row may break several."""
        return dict(Counter(rule for reasons in self.reasons for rule in dict.fromkeys(reason.rule for reason in reasons)).most_common())


OPTED_OUT = Reason("opt_out", "it must not be used: it is on the list")
TOLD = {"width": "pixels", "height": "pixels", "agreement": "cosine", "aesthetic": "", "faces": "faces in a frame"}
RANGES = (*MEASURES, *TOLD)


def reasons_of(row: Mapping[str, Any], keep: Keep) -> list[Reason]:
    """Why a row of the table is not kept, by itself."""
    if row.get("error"):
        return [Reason("error", row["error"])]
    found = [reason for name in RANGES if (reason := _outside(name, row.get(name), getattr(keep, name, None)))]
    if keep.caption is not None and (reason := _outside("caption", len((row.get("text") or "").strip()), keep.caption)):
        found.append(reason)
    if (verdict := row.get("safety")) is not None and verdict not in keep.safety:
        found.append(Reason("safety", "; ".join(row.get("safety_reasons") or []) or verdict))
    if keep.extension and (fault := _extension_fault(row)):
        found.append(Reason("extension", fault))
    return found


def _outside(name: str, value: float | None, allowed: Range | None) -> Reason | None:
    if allowed is None or value is None or math.isnan(value):
        return None
    unit = MEASURES[name].unit if name in MEASURES else TOLD.get(name, "characters")
    if allowed.least is not None and value < allowed.least:
        return Reason(name, f"{value:.4g} {unit}, at least {allowed.least:g} are asked for".replace(" ,", ","))
    if allowed.most is not None and value > allowed.most:
        return Reason(name, f"{value:.4g} {unit}, at most {allowed.most:g} are allowed".replace(" ,", ","))
    return None


def _extension_fault(row: Mapping[str, Any]) -> str:
    """What its name says and it is not; empty where it says nothing, or the truth."""
    name = str(row.get("file", "")).lower().split("?")[0]
    ending = next((each for endings in SUFFIXES.values() for each in endings if name.endswith(each)), None)
    own = SUFFIXES.get(str(row.get("container")))
    return f"its name ends in {ending}, and it is {row['container']}" if ending and own and ending not in own else ""


def decide(table: Any, keep: Keep, opt_out: OptOut = NOBODY) -> Decisions:
    """Rows of the table (`pyarrow.Table`, columns as `clip_table.py` has them) -> what becomes of each. No clip is read.

    Near duplicates are looked for among rows that nothing else speaks against; rows of one file, which differ in their captions, are none. Clips whose bytes stand in
    the input have no file, or a name that another clip may have too.
    """
    rows = table.to_pylist()
    opted_out = opt_out.rows([row.get("sha256") for row in rows], [row.get("hashes") or () for row in rows])
    reasons = [[OPTED_OUT] if out else reasons_of(row, keep) for row, out in zip(rows, opted_out, strict=True)]
    repeats = list[int | None]([None] * len(rows))
    if keep.apart is not None:
        for row, (best, bits) in _repeats(rows, [k for k, found in enumerate(reasons) if not found], keep.apart).items():
            repeats[row] = best
            what = "the same file as" if not bits and rows[row]["sha256"] == rows[best]["sha256"] else f"{bits:.1f} bits apart from"
            reasons[row] = [Reason("duplicate", f"{what} {rows[best]['id']}, which is kept")]
    return Decisions([not found for found in reasons], reasons, repeats, opted_out)


def _repeats(rows: Sequence[Mapping[str, Any]], among: Sequence[int], apart: float) -> dict[int, tuple[int, float]]:
    """Row -> the better row that it repeats, itself none that repeats another, and how far apart they are."""
    order = sorted(among, key=lambda k: (-(rows[k]["width"] or 0) * (rows[k]["height"] or 0), -(rows[k]["seconds"] or 0.0), k))
    first, found = dict[object, int](), dict[int, tuple[int, float]]()
    files = {k: first.setdefault((rows[k]["file"], rows[k]["sha256"]) if rows[k]["file"] else k, k) for k in order}  # the other rows of a file share its fate; bytes are no file's
    contents, left = dict[str, int](), list[int]()
    for k in first.values():
        same = contents.setdefault(rows[k]["sha256"], k)
        if same != k:
            found[k] = same, 0.0
        elif any(rows[k]["hashes"] or ()):
            left.append(k)
    found |= _nearly(rows, left, apart)
    found |= {k: (found[best][0], bits) for k, (best, bits) in found.items() if best in found}
    return {k: found[file] for k, file in files.items() if file in found}


def _nearly(rows: Sequence[Mapping[str, Any]], left: list[int], apart: float) -> dict[int, tuple[int, float]]:
    """The same by perceptual hashes, for rows in order, the best first."""
    found = dict[int, tuple[int, float]]()
    while True:
        pairs = near_duplicates([tuple(rows[k]["hashes"]) for k in left], apart=apart)
        repeating = {left[row] for row, _, _ in pairs}
        sure = {left[row]: (left[earlier], bits) for row, earlier, bits in pairs if left[earlier] not in repeating}
        found |= sure
        if len(sure) == len(pairs):
            return found
        left = [k for k in left if k not in sure]  # what repeats only such as are not kept is looked at again without them


# Measuring


class Done(NamedTuple):
    """A source has been dealt with: its row, or None where it was there already."""

    row: dict[str, Any] | None


class Pass:
    """One way through the input: sources out of `given`, measured by `workers` processes where the table lacks them. `keys` are those of all rows, in order."""

    def __init__(self, table: Table, given: Input, fetched: Path, workers: Sequence[Worker]) -> None:
        self.table, self.given, self.fetched = table, given, fetched
        self.keys = array("Q")
        self._workers = queue.SimpleQueue[Worker]()
        for worker in workers:
            self._workers.put(worker)

    def items(self) -> Iterator[tuple[Source, int]]:
        for source in sources(self.given):
            self.keys.append(source.key)
            yield source, self.keys[-1]

    def work(self, item: tuple[Source, int]) -> Iterator[Done]:
        source, key = item
        if key in self.table:
            yield Done(None)
            return
        row = {"key": key, **{name: getattr(source, name) for name in ("id", "source", "file", "text", "licence", "error", "remarks")}, "extra": dict(source.extra)}
        yield Done(row if source.opener is None else row | self._found(source))

    def _found(self, source: Source) -> dict[str, Any]:
        assert source.opener is not None
        worker = self._workers.get()
        try:
            with contextlib.ExitStack() as stack:
                try:
                    path = stack.enter_context(on_disk(source.opener, self.fetched))
                except UserError as error:
                    return {"error": str(error).partition(", ")[0]}
                answer = worker.ask({"path": str(path), "name": source.file, "text": source.text})
        finally:
            self._workers.put(worker)
        return {"error": answer.reason} if isinstance(answer, Lost) else checked(answer)


def measure_all(cfg: Config, table: Table, given: Input, looks: Looks | None, *, read: Reader = open_clip) -> Sequence[int]:
    """Fills the table with what it lacks; the keys of all rows of the input, in order. read: how a file is opened, a function that can be found by its name."""
    wanted = Wanted(
        cfg.safety, cfg.filters, cfg.faces, frames=0 if looks is None else looks.encoder.sampler.frames, side=0 if looks is None else max(looks.encoder.side), read=read
    )
    number = cfg.workers or len(os.sched_getaffinity(0))
    workers = [Worker(partial(measurer, wanted), seconds=cfg.clip_seconds, memory=cfg.clip_memory, preload=PRELOADED) for _ in range(number)]
    with _fetching(cfg.out / ".fetched") as fetched, contextlib.ExitStack() as stack:
        for worker in workers:
            stack.callback(worker.close)
        going = Pass(table, given, fetched, workers)
        progress = stack.enter_context(Progress("curate", total=count(given)))
        found = stack.enter_context(contextlib.closing(read_ahead(going.work, going.items(), workers=number)))
        counts, begun = Counter[str](), time.monotonic()
        for row in (done.row for done in found):
            if row is None:
                progress.skip()
                continue
            _look(row, looks)
            table.add(row)
            counts["errors" if row["error"] else "kept" if not reasons_of({**row, **row.get("scores", {})}, cfg.keep) else "dropped"] += 1
            rate = counts.total() / max(time.monotonic() - begun, 1e-9)
            progress.advance(f"{rate:.1f} clips/s, {counts['kept']} of {counts.total()} kept so far, {counts['errors']} errors")
    return going.keys


def _look(row: dict[str, Any], looks: Looks | None) -> None:
    """Adds what the encoder says of a row that a worker has measured."""
    try:
        if (frames := seen_of(row)) and looks is not None:
            row |= looks.columns(frames, row["text"])
    except (UserError, ValueError) as error:
        row["remarks"] = "; ".join(filter(None, [row["remarks"], str(error).partition(". ")[0]]))


@contextlib.contextmanager
def _fetching(folder: Path) -> Iterator[Path]:
    """A folder for clips that are fetched as long as they are looked at; what a kill left in it goes."""
    shutil.rmtree(folder, ignore_errors=True)
    with disk_errors(folder):
        folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# The command


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    """`resume` changes nothing: what was measured is never measured again."""
    return curated(cfg)


def curated(cfg: Config, *, read: Reader = open_clip) -> dict[str, object]:
    """Measures what is not measured yet, decides, and writes all that is told above. read: how a file is opened. Raises UserError for what cannot be curated."""
    if cfg.input is None and "report" in cfg.model_fields_set <= {"report", "out"} and (cfg.out / "curated.json").is_file():
        return {"out": str(cfg.out), "page": str(write_page(cfg.out))}
    if cfg.input is None:
        raise UserError("nothing to curate, input. Give a folder of clips, a manifest, tar files, a dataset or an address: rushes curate INPUT")
    if unknown := [name for name in cfg.say if name not in RANGES]:
        raise UserError(f"nothing called {unknown[0]!r} is measured, say. There are: {', '.join(RANGES)}")
    if cfg.aesthetic is not None and cfg.agreement is None:
        raise UserError("an aesthetic head needs the encoder it was trained on, aesthetic. Name it: --agreement CHECKPOINT")
    check_can_write(cfg.out)
    opt_out = NOBODY if cfg.opt_out is None else load_opt_out(cfg.opt_out)
    with disk_errors(cfg.out):
        cfg.out.mkdir(parents=True, exist_ok=True)
    lock_folder(cfg.out)
    given = Input(cfg.input, cfg.columns, cfg.root, cfg.split)
    looks = None if cfg.agreement is None else load_looks(cfg.agreement, cfg.aesthetic)
    with contextlib.closing(Table(cfg.out / "scores", _about(cfg, looks), again=cfg.again)) as table:
        return _curated(cfg, table, given, looks, opt_out, read)


def _curated(cfg: Config, table: Table, given: Input, looks: Looks | None, opt_out: OptOut, read: Reader) -> dict[str, object]:
    started, before = time.monotonic(), len(table)
    keys = measure_all(cfg, table, given, looks, read=read)
    scores = table.read(keys)
    decisions = decide(scores, cfg.keep, opt_out)
    table.forget([key for key, out in zip(keys, decisions.opted_out, strict=True) if out])
    write_decisions(cfg.out / "decisions.parquet", scores, decisions)
    rows = [row for row, kept in zip(table.read(keys, without=("thumbnails", "embedding", "hashes")).to_pylist(), decisions.kept, strict=True) if kept]
    edges = {name: tenths([row[name] for row in rows if row[name] is not None] or [0.0]) for name in cfg.say}
    said = [row | {"text": with_scores(row["text"], row, edges)} for row in rows]
    came = write_kept(cfg.out / "kept", said, given, files=cfg.files)
    found = {
        "clips": len(keys),
        "measured_now": len(table) - before,
        "kept": len(rows),
        "errors": sum(any(reason.rule == "error" for reason in reasons) for reasons in decisions.reasons),
        "dropped_for": decisions.counts(),
    }
    atomic_write(cfg.out / "curated.json", (json.dumps({"input": cfg.input, **found, "keep": dump(cfg.keep), "said": edges}, indent=2, ensure_ascii=False) + "\n").encode())
    page = {"page": str(write_page(cfg.out))} if cfg.report else {}
    return {"out": str(cfg.out), **found, **page, "report": _lines(scores, decisions), "files_new": came, "wall_seconds": round(time.monotonic() - started, 2)}


def _about(cfg: Config, looks: Looks | None) -> dict[str, str]:
    """What rows are measured with, by what is measured."""
    about = {"measures": measures_identity()}
    if cfg.safety:
        about["safety"] = safety_identity(cfg.filters)
    if looks is not None:
        about["agreement"] = looks.identity
    for name, file in (("aesthetic", cfg.aesthetic), ("faces", cfg.faces)):
        if file is not None:
            about[name] = file_hash(file)
    return about


def write_decisions(path: Path, scores: Any, decisions: Decisions) -> None:
    """A row for every row of the input, as parquet: key, id, file, kept, the rules it breaks and why, the id of the clip it repeats, whether it must not be used. Atomic."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    ids = scores["id"].to_pylist()
    table = pa.table(
        {
            "key": scores["key"],
            "id": scores["id"],
            "file": scores["file"],
            "kept": pa.array(decisions.kept, pa.bool_()),
            "rules": pa.array([[reason.rule for reason in reasons] for reasons in decisions.reasons], pa.list_(pa.string())),
            "reasons": pa.array([[reason.text for reason in reasons] for reasons in decisions.reasons], pa.list_(pa.string())),
            "repeats": pa.array([None if row is None else ids[row] for row in decisions.repeats], pa.string()),
            "opted_out": pa.array(decisions.opted_out, pa.bool_()),
        }
    )
    content = io.BytesIO()
    pq.write_table(table, content, compression="zstd")
    atomic_write(path, content.getvalue())


def _lines(scores: Any, decisions: Decisions) -> list[str]:
    """The report on a terminal: how many were dropped, by rule and an example of each."""
    ids, counts = scores["id"].to_pylist(), decisions.counts()
    lines = [f"{len(ids):,} clips, {sum(decisions.kept):,} kept"]
    for rule, number in list(counts.items())[:SHOWN]:
        row, text = next((row, reason.text) for row, reasons in enumerate(decisions.reasons) for reason in reasons if reason.rule == rule)
        lines.append(f"  {rule} against {number:,}: {text} ({ids[row]}{', ...' if number > 1 else ''})")
    return [*lines, *([f"  and {len(counts) - SHOWN} more rules"] if len(counts) > SHOWN else [])]

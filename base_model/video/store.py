"""The clips a run made, kept by content: the exact frames, a preview, and one row for each request that produced them.

    folder/clips.jsonl              one row a request, only ever appended; where filters ruled again, one more that takes the place of the first
    folder/clips/<clip_id>.mkv      the record: FFV1, exact to the bit
    folder/clips/<clip_id>.mp4      the preview

A clip's name is the digest of its frames. A request (prompt, seed, sampler, lineage) has one clip; who holds the request asks `find` before sampling.
Files appear whole or not at all, and a row is written after its files. A process killed while it appends leaves a torn last line, which the next reader
drops and the next writer removes. Several processes may add to one folder. Everything but `created_at` is the same whenever it is made again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from io import RawIOBase
from pathlib import Path

from torch import Tensor

from base_model.checkpoint import disk_errors
from base_model.errors import UserError
from base_model.video.files import digest_of, frame_rate, from_uint8, read_lossless, to_uint8, write_lossless, write_mp4

JsonDict = Mapping[str, object]


@dataclass(frozen=True)
class NewClip:
    """A clip to add. `sampler` names everything of the request beside prompt, seed and model: steps, guidance, frames, height, width."""

    video: Tensor  # [T,3,H,W] in [0,1]
    prompt: str
    prompt_id: str
    seed: int
    sampler: JsonDict
    lineage: str
    fps: float
    extra: JsonDict = field(default_factory=dict)
    safety: JsonDict = field(default_factory=dict)
    licence: str = ""


@dataclass(frozen=True)
class ClipRow:
    """One row of `clips.jsonl`: the columns of the label schema, then what finds the request again. JSON columns are text, as in parquet."""

    clip_id: str  # sha256 of the frames
    path: str  # relative to the store's folder
    prompt_id: str
    generator: str
    generator_rev: str  # the model's lineage
    seed: int
    sampler_json: str
    width: int
    height: int
    fps: float
    num_frames: int
    duration_s: float
    codec: str
    has_audio: bool
    first_frame_hash: str
    safety_json: str
    created_at: str  # UTC, the only field that depends on the clock
    licence: str
    prompt: str
    request_key: str
    extra_json: str


def request_key(prompt: str, seed: int, sampler: JsonDict, lineage: str) -> str:
    """sha256 of what decides a clip. Two requests with the same key get the same clip."""
    return hashlib.sha256(_canonical({"prompt": prompt, "seed": seed, "sampler": dict(sampler), "lineage": lineage}).encode()).hexdigest()


class ClipStore:
    """Opens `folder`, made when the first clip arrives. Raises UserError for a row that is no row of this store."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._by_request: dict[str, ClipRow] = {}
        self._lines, self._read_to = 0, 0  # and bytes of clips.jsonl already read
        self._read_new_rows()

    def __len__(self) -> int:
        return len(self._by_request)

    def rows(self) -> list[ClipRow]:
        """Every row in the order of arrival, those of other processes included; of a clip that was ruled on again the newest."""
        self._read_new_rows()
        return list(self._by_request.values())

    def find(self, key: str) -> ClipRow | None:
        """The row of a request whose record is still there."""
        row = self._by_request.get(key)
        return row if row is not None and self._has_record(row.clip_id) else None

    def record_path(self, clip_id: str) -> Path:
        return self.folder / "clips" / f"{clip_id}.mkv"

    def preview_path(self, clip_id: str) -> Path:
        return self.folder / "clips" / f"{clip_id}.mp4"

    def load(self, clip_id: str) -> Tensor:
        """The exact frames, float32 [T,3,H,W]. Raises UserError where the record is missing or is not the clip of that name."""
        frames = read_lossless(self.record_path(clip_id)).frames
        if digest_of(frames) != clip_id:
            raise UserError(f"the record holds another clip than its name says, {self.record_path(clip_id)}. Delete it and run the stage again")
        return from_uint8(frames)

    def add(
        self,
        video: Tensor,
        *,
        prompt: str,
        prompt_id: str,
        seed: int,
        sampler: JsonDict,
        lineage: str,
        fps: float,
        extra: JsonDict | None = None,
        safety: JsonDict | None = None,
        licence: str = "",
        preview: bool = True,
    ) -> ClipRow:
        """`add_many` for one clip."""
        return self.add_many([NewClip(video, prompt, prompt_id, seed, sampler, lineage, fps, extra or {}, safety or {}, licence)], preview=preview)[0]

    def add_many(self, clips: Sequence[NewClip], *, preview: bool = True) -> list[ClipRow]:
        """Writes the files, then appends all rows at once and syncs once. A request already answered by the same clip returns its old row.

        Raises UserError for a full disk, for pixels that are not finite and for a request that already has another clip.
        """
        rows = [self._write_files(clip, preview) for clip in clips]
        with disk_errors(self.folder), self._locked() as file:
            self._read_new_rows()
            new = {row.request_key: row for row in reversed(rows) if row.request_key not in self._by_request}
            kept = [self._by_request.get(row.request_key) or new[row.request_key] for row in rows]
            for row, old in zip(rows, kept, strict=True):
                if row.clip_id != old.clip_id:
                    raise UserError(f"{row.prompt!r} with seed {row.seed} already has another clip, {self.folder}. Use a fresh folder for a changed model or program")
            _append(file, _lines_of([row for row in rows if new.pop(row.request_key, None)]), self._read_to)
            self._read_new_rows()
        return kept

    def rule_again(self, rows: Sequence[ClipRow], safety: Sequence[JsonDict]) -> list[ClipRow]:
        """Rows of this store with what filters say of them now. They are written behind the old ones and take their place."""
        return self._write_again([replace(row, safety_json=_canonical(each), created_at=_now()) for row, each in zip(rows, safety, strict=True)])

    def tell_again(self, rows: Sequence[ClipRow], extra: Sequence[JsonDict]) -> list[ClipRow]:
        """Rows of this store with something else beside them (`extra_json`), written likewise."""
        return self._write_again([replace(row, extra_json=_canonical(each), created_at=_now()) for row, each in zip(rows, extra, strict=True)])

    def _write_again(self, new: list[ClipRow]) -> list[ClipRow]:
        with disk_errors(self.folder), self._locked() as file:
            self._read_new_rows()
            _append(file, _lines_of(new), self._read_to)
            self._read_new_rows()
        return new

    def _write_files(self, clip: NewClip, preview: bool) -> ClipRow:
        frame_rate(clip.fps)
        frames = to_uint8(clip.video)
        clip_id = digest_of(frames)
        with disk_errors(self.folder):
            (self.folder / "clips").mkdir(parents=True, exist_ok=True)
        if not self._has_record(clip_id):
            write_lossless(self.record_path(clip_id), frames, clip.fps)
        if preview and not self.preview_path(clip_id).exists():
            write_mp4(self.preview_path(clip_id), frames, clip.fps)
        count, height, width, _ = frames.shape
        return ClipRow(
            clip_id=clip_id,
            path=f"clips/{clip_id}.mkv",
            prompt_id=clip.prompt_id,
            generator="rushes",
            generator_rev=clip.lineage,
            seed=clip.seed,
            sampler_json=_canonical(clip.sampler),
            width=width,
            height=height,
            fps=float(clip.fps),
            num_frames=count,
            duration_s=count / clip.fps,
            codec="ffv1",
            has_audio=False,
            first_frame_hash=digest_of(frames[:1]),
            safety_json=_canonical(clip.safety),
            created_at=_now(),
            licence=clip.licence,
            prompt=clip.prompt,
            request_key=request_key(clip.prompt, clip.seed, clip.sampler, clip.lineage),
            extra_json=_canonical(clip.extra),
        )

    def _has_record(self, clip_id: str) -> bool:
        path = self.record_path(clip_id)
        return path.is_file() and path.stat().st_size > 0

    @property
    def _table(self) -> Path:
        return self.folder / "clips.jsonl"

    @contextmanager
    def _locked(self) -> Iterator[RawIOBase]:
        """The table opened for appending; other processes wait."""
        with open(self._table, "ab", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def _read_new_rows(self) -> None:
        """Reads whole lines behind the last one read; a line without its end is still being written, or torn."""
        if not self._table.exists():
            return
        try:
            with open(self._table, "rb") as file:
                file.seek(self._read_to)
                data = file.read()
        except OSError as error:
            raise UserError(f"cannot read the clip store: {error.strerror}, {self._table}. Check the folder and its permissions") from error
        for line in data[: data.rfind(b"\n") + 1].splitlines(keepends=True):
            row = _parse(line, self._lines + 1, self._table)
            self._read_to += len(line)
            self._lines += 1
            self._by_request[row.request_key] = row


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _lines_of(rows: Sequence[ClipRow]) -> bytes:
    return "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows).encode()


def _append(file: RawIOBase, data: bytes, at: int) -> None:
    """Puts `data` behind the last whole line, over a torn one, and syncs. On failure the table ends where it did."""
    file.truncate(at)
    try:
        while data:
            data = data[file.write(data) or 0 :]
        os.fsync(file.fileno())
    except OSError:
        file.truncate(at)
        raise


def _parse(line: bytes, number: int, path: Path) -> ClipRow:
    try:
        values = json.loads(line)
        return ClipRow(**{each.name: values.pop(each.name) for each in fields(ClipRow)})
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"line {number} is not a row of a clip store ({type(error).__name__}: {error}), {path}. Restore the file or use a fresh folder") from error


def _canonical(values: JsonDict) -> str:
    return json.dumps(dict(values), sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)

"""What the readers of all formats share: names of clips, prompts, people and answers, and what is done with a row that cannot be taken.

- A clip's id is the sha256 of its file where the media folder has it (of a URL the file name counts) or where the row holds the file itself, otherwise the
  sha256 of "path:<source>/<path>". So labels are of use without media, but labels imported without media are not the same answers as with them.
- A prompt's id is the sha256 of its text.
- An answer's id is the sha256 of the format, the source, what identifies the row, the person and the dimension. Where rows have an id of their own, it is
  that; elsewhere the clips and the prompt, and how often they came before: a second row about the same clips is a second answer. Importing a file twice
  adds nothing; another answer under an old id is refused by `write_comparisons`.
- A person is "<source>/<their name there>", "<source>/unknown" where the file does not say who answered.

A row that breaks the format is a UserError. A row that says nothing, or contradicts an earlier one about a clip, is left out and counted in `skipped`.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from base_model.errors import UserError
from reward.comparisons import MOST_CLIPS, Annotator, Clip, Prompt, RankingEvent
from reward.importers.tables import Record

RANKS: Mapping[str, tuple[int | None, int | None]] = {"A": (1, 2), "B": (2, 1), "tie": (1, 1), "both_bad": (1, 1), "both_good": (1, 1), "invalid": (None, None)}
UNKNOWN = "unknown"
EMPTY = Clip("", "", "")


class Origin(NamedTuple):
    """A format, and the dataset that defines it."""

    name: str
    source: str
    licence: str  # "" where it is not known, or the data are the user's own
    homepage: str


class Skip(Exception):
    """A row that says nothing; its text is counted."""


class Said(NamedTuple):
    """What one row says."""

    prompt: Prompt
    clips: Sequence[Clip]
    events: Sequence[RankingEvent]


@dataclass(frozen=True)
class Imported:
    """What a file held."""

    events: tuple[RankingEvent, ...]
    clips: tuple[Clip, ...]
    prompts: tuple[Prompt, ...]
    annotators: tuple[Annotator, ...]
    rows: int
    repeated: int  # rows about clips that an earlier row compared, kept as further answers
    skipped: Mapping[str, int]  # why -> how often
    unknown_columns: tuple[str, ...]
    found: int  # clips whose file was there
    source: str
    licence: str


class Reading:
    """A file being read."""

    def __init__(self, name: str, source: str, licence: str, media: Path | None) -> None:
        if media is not None and not media.is_dir():
            raise UserError(f"no such folder of media, {media}. Give the folder that the paths in the file begin in, or none")
        self.name, self.source, self.licence, self.media = name, source, licence, media
        self.unknown: set[str] = set()
        self.skipped: Counter[str] = Counter()
        self._came: Counter[str] = Counter()
        self._repeated = 0
        self._events: dict[str, RankingEvent] = {}
        self._clips: dict[str, Clip] = {}
        self._prompts: dict[str, Prompt] = {}
        self._ids: dict[str, str] = {}  # path -> clip id
        self._found: set[str] = set()

    def prompt(self, text: str, *, safety_critical: bool = False) -> Prompt:
        """A prompt of this source. Raises Skip where there is no text."""
        if not text:
            raise Skip("no prompt")
        return Prompt(digest(text), text, lang="", source=self.source, safety_critical=safety_critical)

    def clip(self, path: str, prompt: Prompt, *, generator: str = "", fps: float = 0.0, num_frames: int = 0, content: bytes | None = None) -> Clip:
        """A clip of this source; `content` is the file where the row holds it."""
        path = posixpath.normpath(path) if path and "://" not in path else path
        if content is not None:
            clip_id = hashlib.sha256(content).hexdigest()
            path = path or clip_id
            self._found.add(clip_id)
        else:
            clip_id = self._ids.get(path) or self._ids.setdefault(path, self._id_of(path))
        return Clip(clip_id, path, prompt.prompt_id, generator=generator, fps=fps, num_frames=num_frames, licence=self.licence)

    def task(self, *identity: str, named: bool = False) -> str:
        """The id of what was asked. named: the dataset gives the row an id; otherwise the same identity again is a further answer."""
        key = digest(json.dumps([self.name, self.source, *identity]))
        if named:
            return key
        self._came[key] += 1
        self._repeated += self._came[key] > 1
        return f"{key}-{self._came[key]}" if self._came[key] > 1 else key

    def nth(self, *identity: str) -> int:
        """How often this was asked for before."""
        key = json.dumps(identity)
        self._came[key] += 1
        return self._came[key] - 1

    def event(
        self,
        task: str,
        prompt: Prompt,
        clips: Sequence[Clip],
        dimension: str,
        *,
        kind: str = "pair",
        choice: str | None = None,
        ranks: tuple[int | None, ...] | None = None,
        likert: tuple[float, ...] = (),
        confidence: float | None = None,
        person: str = "",
        nth: int = 0,
        lead_time_ms: int | None = None,
        flags: tuple[str, ...] = (),
        created_at: str = "",
    ) -> RankingEvent:
        """An answer. Without `ranks` a choice decides them, and nothing is ranked without a choice."""
        if ranks is None:
            ranks = RANKS[choice] if choice is not None else (None,) * len(clips)
        annotator = f"{self.source}/{person or UNKNOWN}"
        return RankingEvent(
            digest(json.dumps([self.name, self.source, task, annotator, dimension, kind, nth])),
            task,
            prompt.prompt_id,
            annotator,
            tuple(clip.clip_id for clip in clips),
            ranks,
            dimension=dimension,
            kind=kind,
            choice=choice,
            likert=likert,
            confidence=confidence,
            lead_time_ms=lead_time_ms,
            flags=flags,
            source_dataset=self.source,
            licence=self.licence,
            created_at=created_at,
        )

    def collect(self, path: Path, records: Iterable[Record], convert: Callable[[Record, Reading], Said]) -> Imported:
        """Reads all rows of the file at `path`. Raises UserError for a row that breaks the format, and for a file without rows."""
        rows = 0
        for rows, record in enumerate(records, 1):  # noqa: B007
            try:
                self._add(convert(record, self), record.place)
            except Skip as skip:
                self.skipped[str(skip)] += 1
            except RecursionError as error:
                raise UserError(f"nested too deeply, {record.place}. Mend or remove that row") from error
        if not rows:
            raise UserError(f"no rows, {path}. Download or export it again")
        people = sorted({event.annotator_id for event in self._events.values()})
        return Imported(
            tuple(self._events.values()),
            tuple(self._clips.values()),
            tuple(self._prompts.values()),
            tuple(Annotator(name, pool=UNKNOWN if name == f"{self.source}/{UNKNOWN}" else self.source) for name in people),
            rows,
            self._repeated,
            dict(self.skipped),
            tuple(sorted(self.unknown)),
            len(self._found & self._clips.keys()),
            self.source,
            self.licence,
        )

    def _add(self, said: Said, place: str) -> None:
        if any(len(set(event.clip_ids)) < len(event.clip_ids) for event in said.events):
            raise Skip("a clip against itself")
        if len(said.clips) > MOST_CLIPS:
            raise Skip(f"more than {MOST_CLIPS} clips")
        joined = [_joined(self._clips.get(clip.clip_id), clip) for clip in said.clips]
        if None in joined:
            raise Skip("contradicts an earlier row about a clip")
        old = [self._events.get(event.event_id) for event in said.events]
        for before, event in zip(old, said.events, strict=True):
            if before is not None and before != event:
                raise UserError(f"an earlier row has the same id and answers {event.dimension} otherwise, {place}. Keep one of them")
        if not said.events:
            return
        if None not in old:
            raise Skip("the same row again")
        self._events |= {event.event_id: event for event in said.events}
        self._clips |= {clip.clip_id: clip for clip in joined if clip is not None}
        critical = said.prompt.safety_critical or self._prompts.get(said.prompt.prompt_id, said.prompt).safety_critical
        self._prompts[said.prompt.prompt_id] = replace(said.prompt, safety_critical=critical)

    def _id_of(self, path: str) -> str:
        file = media_file(self.media, path)
        if file is None:
            return digest(f"path:{self.source}/{path}")
        try:
            with open(file, "rb") as opened:
                clip_id = hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror or error}. Choose media you may read, or leave --media out") from error
        self._found.add(clip_id)
        return clip_id


def is_unknown(annotator_id: str) -> bool:
    """Whether nobody knows who this is: answers under such a name may be of one person or of many."""
    return annotator_id.rpartition("/")[2] == UNKNOWN


def media_file(media: Path | None, path: str) -> Path | None:
    """The file of a clip's path in the media folder, of a URL that of its name; never one outside of the folder."""
    name = posixpath.normpath(unquote(re.split("[?#]", path)[0].rpartition("/")[2])) if "://" in path else path
    if media is None or "\0" in name or posixpath.isabs(name) or name.partition("/")[0] == "..":
        return None
    try:
        return media / name if (media / name).is_file() else None
    except OSError:
        return None  # a name that is too long


def _joined(old: Clip | None, new: Clip) -> Clip | None:
    """Two descriptions of one clip as one; None where they contradict each other. Where it lies may differ, and what one does not know the other may."""
    if old is None or old == new:
        return new
    values = {}
    for name in (field.name for field in fields(Clip) if field.name != "path"):
        mine, other, unknown = getattr(old, name), getattr(new, name), getattr(EMPTY, name)
        if unknown not in (mine, other) and mine != other:
            return None
        values[name] = other if mine == unknown else mine
    return replace(old, **values)


def digest(text: str) -> str:
    """sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()

"""What people told us, as parquet: which clips they saw together and how they ranked them.

    folder/clips.parquet                one row a clip
    folder/prompts.parquet              one row a prompt
    folder/annotators.parquet           one row a person (a pseudonym), or a simulated one
    folder/comparisons-00000.parquet    answers, one row for each person x task x dimension; more files are added, none is ever rewritten
    folder/splits.parquet               which component of prompts is in which split (`splits.py`)

Every file is plain parquet with checksums (`datasets.load_dataset("parquet", data_files=...)` reads it) and appears whole or not at all. They are written in
the order of what refers to what, answers last, and read the other way round, so a writer killed between two files leaves a folder that loads and can be written
again, and who reads while another writes sees the folder before or after. Writers wait for each other. Loading checks: a ranking must be one, a clip must belong to
the prompt it was ranked under, no component of prompts may be in two splits, no id may be there twice, unknown values and values of another kind (text for a number) are refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from base_model.checkpoint import atomic_write, disk_errors
from base_model.errors import UserError
from base_model.video.store import ClipRow
from reward.parquet import batches, open_parquet
from reward.splits import SPLITS, assign_splits, components_of

KINDS = ("pair", "rank", "best", "likert", "tag")
CHOICES = ("A", "B", "tie", "both_bad", "both_good", "invalid")
MOST_CLIPS = 127  # of an answer: ranks are int8
MOST_BYTES = 1 << 30  # of a table in memory


@dataclass(frozen=True)
class RankingEvent:
    """One answer of one person about one task in one dimension.

    Example: of clips a, b, c, d somebody found b best, a and d equal, c worst: clip_ids (a, b, c, d), ranks (2, 1, 3, 2). A clip left
    unranked has rank None. A pair (kind "pair") carries `choice` beside its ranks. The best of several (kind "best") has rank 1 and the others None:
    it is better than each of them, and nobody compared them.
    """

    event_id: str
    task_id: str
    prompt_id: str
    annotator_id: str
    clip_ids: tuple[str, ...]
    ranks: tuple[int | None, ...]  # 1 = best; equal numbers = tie; None = not ranked
    dimension: str = "overall"
    kind: str = "rank"
    choice: str | None = None  # pairs only
    likert: tuple[float, ...] = ()  # one number a clip, or none at all
    confidence: float | None = None
    is_gold: bool = False
    gold_ok: bool | None = None
    is_repeat: bool = False
    shown_order: tuple[int, ...] = ()  # positions on screen, a permutation of 0..K-1, or none at all
    model_hint_shown: bool = False
    watch_ms: tuple[int, ...] = ()  # one number a clip, or none at all
    lead_time_ms: int | None = None
    skipped_reason: str | None = None
    flags: tuple[str, ...] = ()
    guideline_version: str = ""
    app_version: str = ""
    source_dataset: str = ""
    licence: str = ""
    created_at: str = ""  # UTC, ISO 8601

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> RankingEvent:
        """A row of the table `comparisons`: lists become tuples; a column that is null or not there gets its default."""
        return _build(cls, row)

    @property
    def dense_ranks(self) -> tuple[int, ...]:
        """Ranks as `ranking.py` takes them: 1.. without gaps, 0 = not ranked."""
        order = sorted({rank for rank in self.ranks if rank is not None})
        return tuple(0 if rank is None else order.index(rank) + 1 for rank in self.ranks)


@dataclass(frozen=True)
class Clip:
    """Where a clip comes from."""

    clip_id: str  # sha256 of its frames
    path: str
    prompt_id: str
    generator: str = ""
    generator_rev: str = ""
    seed: int = 0
    sampler_json: str = "{}"
    width: int = 0
    height: int = 0
    fps: float = 0.0
    num_frames: int = 0
    duration_s: float = 0.0
    codec: str = ""
    has_audio: bool = False
    first_frame_hash: str = ""
    safety_json: str = "{}"
    created_at: str = ""
    licence: str = ""

    @classmethod
    def of(cls, row: ClipRow) -> Clip:
        """The columns of a clip store's row that belong to the schema."""
        return cls(**{field.name: getattr(row, field.name) for field in fields(cls)})


@dataclass(frozen=True)
class Prompt:
    """A prompt. Prompts of one `cluster_id` (not empty) are near-duplicates and never fall into different splits."""

    prompt_id: str
    text: str
    lang: str = "en"
    source: str = ""
    cluster_id: str = ""
    category: str = ""
    safety_critical: bool = False
    split: str = ""  # as its source called it; the split that counts is in splits.parquet


@dataclass(frozen=True)
class Annotator:
    """A person under a pseudonym, or a simulated one (pool "simulated")."""

    annotator_id: str
    pool: str = ""
    locale: str = ""
    qualified_at: str = ""
    reliability: float | None = None
    tie_bias: float | None = None
    position_bias: float | None = None
    n_events: int = 0  # their answers in the folder; `write_comparisons` counts them

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Annotator:
        """A row of the table `annotators`; a column that is null or not there gets its default."""
        return _build(cls, row)


@dataclass(frozen=True)
class Comparisons:
    """A loaded and checked folder. `split` maps prompt_id -> "train", "val", "test" ("" where none was assigned)."""

    events: tuple[RankingEvent, ...]
    clips: Mapping[str, Clip]
    prompts: Mapping[str, Prompt]
    annotators: Mapping[str, Annotator]
    split: Mapping[str, str]
    component: Mapping[str, str]  # prompt_id -> component of prompts that stay together

    def in_split(self, name: str) -> tuple[RankingEvent, ...]:
        """The events of one split, in file order."""
        return tuple(event for event in self.events if self.split[event.prompt_id] == name)


@dataclass(frozen=True)
class _Place:
    """A row of the table `splits`: where a prompt is."""

    prompt_id: str
    component_id: str
    split: str
    salt: str


Row = TypeVar("Row", RankingEvent, Clip, Prompt, Annotator, _Place)


def write_comparisons(
    folder: Path,
    events: Sequence[RankingEvent],
    *,
    clips: Iterable[Clip],
    prompts: Iterable[Prompt],
    annotators: Iterable[Annotator] = (),
    salt: str = "rushes",
    shares: tuple[float, float, float] = (0.6, 0.15, 0.25),
    seed_families: bool = False,
    split: str | None = None,
) -> Comparisons:
    """Adds answers to `folder` (made when missing) and assigns splits (shares of train, val, test) to prompts that have none.

    Which prompts stay together is said in `splits.py`, `seed_families` too; prompts that were together stay together. Give the same options at every writing.
    split: where prompts that have none go, instead of by hash: a benchmark's to test. One that hangs together with a prompt of an earlier split stays with it.
    Answers that are already there, word for word, are skipped; the rest goes into a new file. Clips, prompts and people are merged by id: of a person, and of what the safety
    filters said of a clip, the newest row counts, and what it leaves at its default stays as it was.
    Raises UserError, writing nothing, where the id of an answer, clip or prompt is there with other content, or where the whole would not pass the checks of loading.
    """
    with alone_in(folder):
        begun = (folder / "clips.parquet").exists() or bool(_parts(folder))
        old = load_comparisons(folder) if begun else Comparisons((), {}, {}, {}, {}, {})
        before = {event.event_id: event for event in old.events}
        new: dict[str, RankingEvent] = {}
        for event in events:
            other = before.get(event.event_id) or new.get(event.event_id)
            if other is None:
                new[event.event_id] = event
            elif other != event:
                raise UserError(f"answer {event.event_id} is already there with other content, {folder}. Answers are never overwritten: use a new id")
        all_clips, all_prompts = _clips(old.clips, clips, folder), _merge(old.prompts, prompts, folder)
        all_events = (*old.events, *new.values())
        people = _people(old.annotators, annotators, all_events)
        components = components_of(all_prompts.values(), all_events, all_clips.values(), before=old.component, seed_families=seed_families)
        known = {prompt_id: name for prompt_id, name in old.split.items() if name}
        splits = assign_splits(components, _wanted(split, components, known) | known, salt=salt, shares=shares)
        whole = _checked(Comparisons(all_events, all_clips, all_prompts, people, splits, components), folder)

        contents = {
            "annotators.parquet": _parquet(list(people.values()), Annotator),
            "prompts.parquet": _parquet(list(all_prompts.values()), Prompt),
            "clips.parquet": _parquet(list(all_clips.values()), Clip),
            "splits.parquet": _parquet([_Place(key, components[key], splits[key], salt) for key in components], _Place),
        }
        if new:
            contents[_next_part(folder)] = _parquet(list(new.values()), RankingEvent)
        for name, content in contents.items():
            atomic_write(folder / name, content)
        return whole


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Makes the folder and waits until no other process writes into it; where the file system has no locks, nobody waits."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _wanted(split: str | None, components: Mapping[str, str], known: Mapping[str, str]) -> dict[str, str]:
    """prompt_id -> the split asked for, of prompts whose component has none yet. Raises ValueError for an unknown split."""
    if split is None:
        return {}
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    decided = {component for prompt_id, component in components.items() if prompt_id in known}
    return {prompt_id: split for prompt_id, component in components.items() if component not in decided}


def load_comparisons(folder: Path) -> Comparisons:
    """Reads and checks a folder. Raises UserError, one line with the file and the id, for anything missing, damaged or contradictory."""
    events = tuple(event for part in _parts(folder) for event in _read_rows(part, RankingEvent))
    places = _by_id(folder / "splits.parquet", _Place) if (folder / "splits.parquet").exists() else {}
    clips, prompts, people = _by_id(folder / "clips.parquet", Clip), _by_id(folder / "prompts.parquet", Prompt), _by_id(folder / "annotators.parquet", Annotator)
    for place in places.values():
        if place.split not in SPLITS:
            raise UserError(f"unknown split {place.split!r} of prompt {place.prompt_id}, {folder / 'splits.parquet'}. It is one of {', '.join(SPLITS)}")
    split = {key: places[key].split if key in places else "" for key in prompts}
    component = {key: places[key].component_id if key in places else key for key in prompts}
    return _checked(Comparisons(events, clips, prompts, people, split, component), folder)


# Checks


def _checked(data: Comparisons, folder: Path) -> Comparisons:
    seen: set[str] = set()
    for event in data.events:
        problem = "its id is used twice" if event.event_id in seen else _problem(event, data)
        if problem:
            raise UserError(f"answer {event.event_id}: {problem}, {folder}. Remove or mend that row")
        seen.add(event.event_id)
    for clip in data.clips.values():
        if clip.prompt_id not in data.prompts:
            raise UserError(f"clip {clip.clip_id}: its prompt {clip.prompt_id} is not in prompts.parquet, {folder}. Add the prompt or remove the clip")
        if not 0 <= clip.fps < math.inf:
            raise UserError(f"clip {clip.clip_id}: its frame rate is {clip.fps}, {folder}. Write its rate, or 0 where it is not known")
    where: dict[str, str] = {}
    for prompt_id, split in data.split.items():
        component = data.component[prompt_id]
        if split and where.setdefault(component, split) != split:
            problem = f"prompts of the component {component} are in the splits {where[component]} and {split}"
            raise UserError(f"{problem}, {folder}. Delete splits.parquet and write the data again")
    return data


def _problem(event: RankingEvent, data: Comparisons) -> str | None:
    k = len(event.clip_ids)
    if event.kind not in KINDS:
        return f"unknown kind {event.kind!r} (one of {', '.join(KINDS)})"
    if event.choice is not None and event.choice not in CHOICES:
        return f"unknown choice {event.choice!r} (one of {', '.join(CHOICES)})"
    if k < 2 and event.kind in ("pair", "rank", "best"):
        return f"it ranks {k} clips; a ranking takes two or more"
    if event.kind == "pair" and k != 2:
        return f"a pair has two clips, this one {k}"
    if k > MOST_CLIPS:
        return f"it holds {k} clips; at most {MOST_CLIPS} go into one answer"
    if len(set(event.clip_ids)) != k:
        return "a clip appears in it twice"
    if len(event.ranks) != k or any(rank is not None and not 1 <= rank <= k for rank in event.ranks):
        return f"ranks {event.ranks} are no ranking of {k} clips (whole numbers from 1 to {k}, equal where tied, null where not ranked)"
    if event.kind == "best" and [rank for rank in event.ranks if rank is not None] != [1]:
        return f"the best of several has rank 1 and the others none, not {event.ranks}"
    if event.kind == "pair" and event.choice in ("A", "B", "tie", "both_bad", "both_good") and not _choice_fits(event):
        return f"choice {event.choice} contradicts ranks {event.ranks}"
    if event.shown_order and sorted(event.shown_order) != list(range(k)):
        return f"shown_order {event.shown_order} is no permutation of 0..{k - 1}"
    if any(len(values) not in (0, k) for values in (event.likert, event.watch_ms)):
        return "likert and watch_ms hold one number a clip or none"
    if not all(math.isfinite(value) for value in (*event.likert, event.confidence or 0)):
        return f"likert and confidence are finite numbers, not {event.likert} and {event.confidence}"
    if event.prompt_id not in data.prompts:
        return f"its prompt {event.prompt_id} is not in prompts.parquet"
    for clip_id in event.clip_ids:
        if clip_id not in data.clips:
            return f"its clip {clip_id} is not in clips.parquet"
        if data.clips[clip_id].prompt_id != event.prompt_id:
            return f"its clip {clip_id} belongs to prompt {data.clips[clip_id].prompt_id}, not to {event.prompt_id}"
    return None


def _choice_fits(event: RankingEvent) -> bool:
    first, second = event.ranks
    if first is None or second is None:
        return event.skipped_reason is not None
    return {"A": first < second, "B": second < first}.get(str(event.choice), first == second)


def _merge(old: Mapping[str, Row], new: Iterable[Row], folder: Path) -> dict[str, Row]:
    rows = dict(old)
    for row in new:
        before = rows.setdefault(_id(row), row)
        if before is not row and _stable(before) != _stable(row):
            raise UserError(f"{type(row).__name__.lower()} {_id(row)} is already there with other content, {folder}. Use a fresh folder for other data")
    return rows


def _clips(old: Mapping[str, Clip], new: Iterable[Clip], folder: Path) -> dict[str, Clip]:
    """Clips by id, each with the newest of what the safety filters said."""
    new = list(new)
    said = {clip.clip_id: clip.safety_json for clip in new if clip.safety_json != Clip.safety_json}
    return {name: replace(clip, safety_json=said.get(name, clip.safety_json)) for name, clip in _merge(old, new, folder).items()}


def _people(old: Mapping[str, Annotator], new: Iterable[Annotator], events: Iterable[RankingEvent]) -> dict[str, Annotator]:
    """People by id, with the number of their answers. What the newer row of a person leaves at its default stays as it was."""
    people = dict(old)
    for person in new:
        told = {field.name: value for field in fields(Annotator) if (value := getattr(person, field.name)) != field.default}
        people[person.annotator_id] = replace(people.get(person.annotator_id, person), **told)
    count = Counter(event.annotator_id for event in events)
    return {name: replace(person, n_events=count[name]) for name, person in people.items()}


def _id(row: RankingEvent | Clip | Prompt | Annotator | _Place) -> str:
    """The first column is the name of a row."""
    return str(getattr(row, next(iter(row.__dataclass_fields__))))


def _stable(row: object) -> dict[str, Any]:
    """What identifies a row: all but its split, the time it was made, where it was first seen, what the safety filters say of it, who may be asked again, and a prompt's language
    and kind, which not everybody knows."""
    return {name: value for name, value in vars(row).items() if name not in ("split", "created_at", "path", "source", "safety_json", "lang", "category")}


# Parquet


def _schema(cls: type[Any]) -> Any:
    import pyarrow as pa

    plain = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    lists = {"clip_ids": pa.string(), "flags": pa.string(), "ranks": pa.int8(), "shown_order": pa.int8(), "likert": pa.float64(), "watch_ms": pa.int32()}
    hints = get_type_hints(cls)

    def column(name: str) -> Any:
        if name in lists:
            return pa.list_(lists[name])
        members = getattr(hints[name], "__args__", (hints[name],))
        return plain[next(member for member in members if member is not type(None))]

    return pa.schema([(field.name, column(field.name)) for field in fields(cls)])


def _parquet(rows: Sequence[Any], cls: type[Any]) -> bytes:
    """Rows as a file. Raises UserError for a value that its column has no room for."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = []
    for field in _schema(cls):
        values = [getattr(row, field.name) for row in rows]
        try:
            columns.append(pa.array(values, field.type))
        except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
            raise UserError(f"{cls.__name__}s: {field.name} cannot be written as {field.type}: {_one_line(error)}. Mend that value") from error
    buffer = BytesIO()
    pq.write_table(pa.Table.from_arrays(columns, schema=_schema(cls)), buffer, write_page_checksum=True)
    return buffer.getvalue()


def _read_table(path: Path, schema: Any) -> list[dict[str, Any]]:
    """The rows of a file, in the types of the schema. Raises UserError where it is missing, damaged, or has other columns or values that do not fit them."""
    import pyarrow as pa

    try:
        with open_parquet(path) as file:
            found, taken = [], 0
            for batch in batches(file):
                found.append(batch)
                taken += batch.nbytes
                if taken > MOST_BYTES:
                    raise ValueError(f"more than {MOST_BYTES >> 30} GiB")
            table = pa.Table.from_batches(found, file.schema_arrow)
    except FileNotFoundError as error:
        raise UserError(f"no such file, {path}. Give a folder written by the rankings stage or exported from the label app") from error
    except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
        raise UserError(f"not a parquet file that can be read, {path}: {_one_line(error)}. Export the data again") from error
    names = table.column_names
    unknown, missing = sorted(set(names) - set(schema.names)), sorted(set(schema.names) - set(names))
    if unknown or missing or len(names) > len(schema.names):
        problem = f"unknown column {unknown[0]!r}" if unknown else f"column {missing[0]!r} is missing" if missing else "two columns have one name"
        raise UserError(f"{problem}, {path}. The columns are: {', '.join(sorted(schema.names))}")
    columns = []
    for field in schema:
        try:
            column = table.column(field.name)
            if not _same_kind(column.type, field.type):
                raise ValueError(f"a column of {column.type}")
            columns.append(column.cast(field.type).to_pylist())
        except (pa.ArrowException, ValueError) as error:
            raise UserError(f"column {field.name} holds what is no {field.type}, {path}: {_one_line(error)}. Export the data again") from error
    return [dict(zip(schema.names, values, strict=True)) for values in zip(*columns, strict=True)]


def _same_kind(found: Any, wanted: Any) -> bool:
    """Whether a column of one type may be read as the other: numbers as numbers that fit, texts as texts. Nulls may be anything. (pyarrow's own cast reads numbers in texts.)"""
    from pyarrow import types

    if types.is_dictionary(found):
        return _same_kind(found.value_type, wanted)
    if types.is_list(found) or types.is_large_list(found) or types.is_fixed_size_list(found):
        return bool(types.is_list(wanted)) and _same_kind(found.value_type, wanted.value_type)
    numbers, texts = (types.is_integer, types.is_floating, types.is_decimal), (types.is_string, types.is_large_string, types.is_string_view)
    return bool(types.is_null(found)) or any(any(of(found) for of in kind) and any(of(wanted) for of in kind) for kind in (numbers, texts, (types.is_boolean,)))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _read_rows(path: Path, cls: type[Row]) -> list[Row]:
    return [_build(cls, row) for row in _read_table(path, _schema(cls))]


def _by_id(path: Path, cls: type[Row]) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for row in _read_rows(path, cls):
        if _id(row) in rows:
            raise UserError(f"{fields(cls)[0].name} {_id(row)} is there twice, {path}. Remove one of the rows")
        rows[_id(row)] = row
    return rows


def _build(cls: type[Row], row: Mapping[str, Any]) -> Row:
    build: Callable[..., Row] = cls
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items() if value is not None}
    columns = cls.__dataclass_fields__
    missing, unknown = {name for name, field in columns.items() if field.default is MISSING} - values.keys(), values.keys() - columns.keys()
    if missing or unknown:
        problem = f"{min(missing)} is empty" if missing else f"{min(unknown)} is no column"
        raise UserError(f"a row of {cls.__name__} cannot be read: {problem}, {str(dict(row))[:80]}. Mend or remove that row")
    return build(**values)


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("comparisons-*.parquet"))


def _next_part(folder: Path) -> str:
    """A name that no file has, also where one was taken away."""
    number = len(_parts(folder))
    while (folder / f"comparisons-{number:05d}.parquet").exists():
        number += 1
    return f"comparisons-{number:05d}.parquet"

"""Clips of a run, or of a folder of video files, into a project.

Two kinds of folders are read: a clip store (`clips.jsonl`, `base_model/video/store.py`) and video files with captions (`metadata.jsonl`, lines of `file_name` and `text`).
They come from outside: only folders below the roots that the server's owner named are read, no link is followed, and every file goes through the restricted process of
`worker.render` before anybody sees it.

A clip keeps the filters' decision that is stored with it. Where there is none, or it makes no sense, the verdict is "error", and so it is where the file cannot be read:
nobody judged such a clip, and no labeler gets it. Media are written before the row that names them; importing again adds what is missing, and takes over a decision that
changed.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import re
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from pydantic import BaseModel
from sqlalchemy import Connection, insert, select, update

from base_model.errors import UserError
from reward.app import reviewing
from reward.app.log import canonical
from reward.app.media import DIGEST, VARIANTS, missing_of, path_of
from reward.app.schema import clip, project, prompt
from reward.app.security import Denied, sha256
from reward.app.store import Store, new_id
from reward.safety.policy import load_policy

if TYPE_CHECKING:
    from base_model.video.store import ClipRow

STORE, FILES = "clips.jsonl", "metadata.jsonl"
ORDER = ("allow", "review", "error", "block")
SOURCE = "source"
"""The variant that is written last: sha256 of the file that the media were made of."""
MOST_BYTES = 512 << 20
MOST_LINE = 1 << 20
BATCH = 32
KINDS: Mapping[str, Any] = {"str": str, "int": int, "float": int | float, "bool": bool}
LANG, KIND = re.compile(r"(?=.{2,16}$)[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*"), re.compile(r"[a-z0-9_-]{1,64}")
MOST_NUMBER = 2**63
DEPTH = 4  # folders below a root that are looked into
MOST_FOLDERS = 2_000

Render = Callable[[bytes], Mapping[str, bytes]]


@dataclass(frozen=True)
class Source:
    """A clip to be imported."""

    clip_id: str
    file: Path
    prompt_id: str
    text: str
    row: dict[str, Any]
    decision: Any  # as it is stored, believed nothing of
    sha256: str | None = None
    """Of the file, where the clip is known by it."""
    lang: str = ""
    """Of the prompt (BCP 47), empty where nobody said it."""
    kind: str = ""
    """Of the prompt: `benign` where nothing in it asks for what the policies forbid."""


class Counts(BaseModel):
    rows: int = 0
    added: int = 0
    already: int = 0
    ruled_again: int = 0
    """Were there with another decision."""
    unreadable: int = 0
    """Of them: whose file cannot be shown. They are there, as errors."""
    refused: int = 0
    """Rows that are no clip, or contradict what is there."""
    first_refused: str = ""


# Where from


def folders_below(roots: Sequence[Path]) -> list[str]:
    """Folders that can be imported, as "number of the root/path below it", in order."""
    found: list[str] = []
    for number, root in enumerate(roots):
        base = root.resolve()
        for folder, names, _ in os.walk(base):
            here = Path(folder).relative_to(base)
            names[:] = sorted(name for name in names if not name.startswith(".") and not (Path(folder) / name).is_symlink()) if len(here.parts) < DEPTH else []
            if any(_is_own_file(Path(folder) / name) for name in (STORE, FILES)):
                found.append("/".join((str(number), *here.parts)))
            if len(found) >= MOST_FOLDERS:
                return found
    return found


def folder_below(roots: Sequence[Path], name: str) -> Path:
    """The folder of a name that `folders_below` gives. Raises Denied for any other: one that leads out of its root, by whatever way, is not there."""
    number, _, below = name.partition("/")
    try:
        base = roots[int(number)].resolve(strict=True) if number.isdecimal() else Path()
        folder = (base / below).resolve(strict=True)
    except (OSError, ValueError, IndexError, RuntimeError) as error:
        raise Denied(404, "there is no such folder to import") from error
    if not number.isdecimal() or not folder.is_relative_to(base) or folder != base / below or not any(_is_own_file(folder / name) for name in (STORE, FILES)):
        raise Denied(404, "there is no such folder to import")
    return folder


def _is_own_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


# What is in it


def sources_of(folder: Path) -> Iterator[Source | str]:
    """The clips of a folder in their order; a text, instead, says what is wrong with a row. Raises UserError for a folder that is neither kind."""
    if _is_own_file(folder / STORE):
        return _of_store(folder)
    if _is_own_file(folder / FILES):
        return _of_files(folder)
    raise UserError(f"neither {STORE} nor {FILES}, {folder}. Give the clips of a run, or a folder of video files with captions")


def _of_store(folder: Path) -> Iterator[Source | str]:
    from base_model.video.store import ClipStore
    from reward.comparisons import Clip

    newest = {row.clip_id: row for row in ClipStore(folder).rows()}  # of a clip that two requests made, the row ruled on last
    for row in newest.values():
        wrong = _wrong_kind(row)
        if wrong:
            yield f"clip {str(row.clip_id)[:80]!r}: {wrong}"
            continue
        told = {name: value for name, value in asdict(Clip.of(row)).items() if name != "safety_json"}
        try:
            lang, kind = _prompt_told(_json(row.extra_json))
            yield Source(row.clip_id, folder / "clips" / f"{row.clip_id}.mkv", row.prompt_id, row.prompt, told, _json(row.safety_json), lang=lang, kind=kind)
        except TypeError as error:
            yield f"clip {row.clip_id!r}: {error}"


def _wrong_kind(row: ClipRow) -> str:
    """Which column of a row is not what it has to be, or an empty string. Numbers are finite and not so large that nobody can divide by them."""
    for column in fields(row):
        value, kind = getattr(row, column.name), KINDS[str(column.type)]
        if not isinstance(value, kind) or (isinstance(value, bool) and column.type != "bool"):
            return f"its `{column.name}` is no {column.type}"
        if isinstance(value, int | float) and not abs(value) < MOST_NUMBER:
            return f"its `{column.name}` is too large"
    return ""


def _of_files(folder: Path) -> Iterator[Source | str]:
    with open(folder / FILES, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MOST_LINE), b""), 1):
            told = _json(line)
            if not line.strip():
                continue
            if not isinstance(told, dict) or not all(isinstance(told.get(name), str) and told[name].strip() for name in ("file_name", "text")):
                yield f"line {number} of {FILES} has no `file_name` and `text`"
                continue
            try:
                digest = hashlib.sha256(_read(folder, folder / told["file_name"])).hexdigest()
            except (OSError, ValueError) as error:
                yield f"line {number} of {FILES}: {_why(error)}"
                continue
            row = {"clip_id": digest, "path": told["file_name"], "prompt_id": sha256(told["text"])[:16], "generator": ""}
            lang, kind = _prompt_told(told)
            yield Source(digest, folder / told["file_name"], row["prompt_id"], told["text"], row, None, sha256=digest, lang=lang, kind=kind)


def _prompt_told(told: Any) -> tuple[str, str]:
    """(language, kind) of a prompt; empty what is not told, or makes no sense."""
    lang, kind = (told.get(name) if isinstance(told, dict) else None for name in ("lang", "kind"))
    return (lang if isinstance(lang, str) and LANG.fullmatch(lang) else ""), (kind if isinstance(kind, str) and KIND.fullmatch(kind) else "")


def _json(text: str | bytes) -> Any:
    """None for what is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _read(folder: Path, path: Path) -> bytes:
    """A file's bytes. Raises ValueError for one that is not in the folder itself, without a link on the way, or too large; what was opened is looked at, too, so swapping a folder
    for a link in between gains nothing."""
    there = os.path.abspath(path)
    if there != os.path.realpath(path) or not Path(there).is_relative_to(folder.resolve()):
        raise ValueError(f"{path.name!r} is a link, or outside of its folder")
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        if os.readlink(f"/proc/self/fd/{descriptor}") != there:
            raise ValueError(f"{path.name!r} was moved while it was read")
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_BYTES:
            raise ValueError(f"{path.name!r} is no file, or larger than {MOST_BYTES >> 20} MiB")
        return file.read(MOST_BYTES)


@dataclass(frozen=True)
class Ruled:
    """A decision as it is stored."""

    verdict: str
    score: float | None
    decision: dict[str, Any]

    @property
    def restricted(self) -> bool:
        """Whether a filter found what only the child-safety role may see."""
        escalating = {rule.code for rule in load_policy().rules if rule.escalate}
        return any(each["policy"] in escalating and each["verdict"] in ("review", "block") for each in self.decision["rulings"])


def ruled(told: Any, unreadable: str = "") -> Ruled:
    """What is made of a stored decision: the worst of its rulings, of what it says of itself, and of "error" where it is missing, malformed, or the file is unreadable."""
    given = told.get("rulings") if isinstance(told, dict) else None
    rulings = [each for each in given if _is_ruling(each)] if isinstance(given, list) else []
    whole = isinstance(given, list) and 0 < len(rulings) == len(given) and told.get("verdict") in ORDER
    kept = [{**each, "reasons": each.get("reasons") if isinstance(each.get("reasons"), list) else []} for each in rulings]
    if unreadable:
        reason = {"text": f"import: {unreadable}", "start": None, "end": None, "span": None}
        failed = {"verdict": "error", "policy": "input", "score": None, "reasons": [reason], "filter": "import 1", "threshold": 0.5, "policy_version": load_policy().version}
        kept = [*kept, failed]
    said = [told["verdict"]] if isinstance(told, dict) and told.get("verdict") in ORDER else []
    verdict = max([*said, *(each["verdict"] for each in kept), *([] if whole else ["error"])], key=ORDER.index)
    return Ruled(verdict, max((each["score"] for each in kept if each["score"] is not None), default=None), {"verdict": verdict, "rulings": kept})


def _is_ruling(each: Any) -> bool:
    if not isinstance(each, dict) or not all(isinstance(each.get(name), str) for name in ("verdict", "policy", "filter", "policy_version")) or not each["filter"]:
        return False
    score, threshold = each.get("score"), each.get("threshold")
    graded = score is None or (isinstance(score, int | float) and not isinstance(score, bool) and 0 <= score <= 1)
    return each["verdict"] in ORDER and graded and isinstance(threshold, int | float) and not isinstance(threshold, bool) and math.isfinite(threshold)


# Into the store


def import_run(
    store: Store, project_id: str, folder: Path, run: str, by: str, *, render: Render | None = None, progress: Callable[[int, Counts], None] = lambda total, counts: None
) -> dict[str, Any]:
    """Adds the clips of a folder; returns `Counts` as a dict. run: what they are called in the app. by: a pseudonym. render: `worker.render`, or another of its kind.

    Raises UserError for a folder that cannot be read. A row that is wrong is counted and passed over.
    """
    if not 1 <= len(run) <= 200 or not run.isprintable():
        raise UserError("a run's name has 1 to 200 characters that can be seen, run. Choose another")
    render = render or importlib.import_module("reward.app.worker").render
    rows = list(sources_of(folder))
    counts = Counts(rows=len(rows))
    with store.writing() as db:
        store.log(db, by, "import began", project_id, {"run": sha256(run), "rows": len(rows)})
        deleted = set(db.execute(select(clip.c.clip_id).where(clip.c.project_id == project_id, clip.c.state == "deleted")).scalars())
    for start in range(0, len(rows), BATCH):
        ready: list[tuple[Source, Ruled, dict[str, Any]]] = []
        for each in rows[start : start + BATCH]:
            problem = each if isinstance(each, str) else _problem(each)
            if isinstance(each, str) or problem:
                _refuse(counts, problem)
                continue
            if each.clip_id in deleted:  # for good: its media are not made again
                counts.already += 1
                continue
            facts, unreadable = _media(store, folder, each, render)
            counts.unreadable += bool(unreadable)
            ready.append((each, ruled(each.decision, unreadable), {**facts, **each.row}))
        with store.writing() as db:
            _add(store, db, project_id, run, ready, counts, by)
        progress(min(start + BATCH, len(rows)), counts)
    with store.writing() as db:
        store.log(db, by, "import ended", project_id, {"run": sha256(run), **counts.model_dump(exclude={"first_refused"})})
    return counts.model_dump()


def _refuse(counts: Counts, problem: str) -> None:
    counts.refused += 1
    counts.first_refused = counts.first_refused or problem


def _problem(source: Source) -> str:
    """Why a row is no clip, or an empty string."""
    if not DIGEST.fullmatch(source.clip_id):
        return f"{source.clip_id[:80]!r} is no digest"
    if not 1 <= len(source.prompt_id) <= 400 or not source.text or len(source.text) > 20_000:
        return f"clip {source.clip_id}: a prompt has an id of 1 to 400 characters and a text of 1 to 20,000"
    try:
        told = (source.prompt_id + source.text + canonical([source.row, ruled(source.decision).decision])).encode()
    except (UnicodeEncodeError, ValueError):
        return f"clip {source.clip_id}: its row holds characters or numbers that cannot be written"
    return f"clip {source.clip_id}: its row holds a NUL" if b"\x00" in told or b"\\u0000" in told else ""


def _media(store: Store, folder: Path, source: Source, render: Render) -> tuple[dict[str, Any], str]:
    """What is known of the clip's file, and why it cannot be shown, if so. Media of the same file are made again where one is missing; those of another file are left alone."""
    try:
        content = _read(folder, source.file)
        digest, made_of = hashlib.sha256(content).hexdigest(), path_of(store, source.clip_id, SOURCE)
        if source.sha256 not in (None, digest):
            return {}, "the file was changed while it was imported"
        if made_of.exists() and made_of.read_text() != digest:
            return _facts(store, source.clip_id), "media of another file are there under its id"
        wanted = missing_of(store, source.clip_id) if made_of.exists() else VARIANTS
        if wanted:
            made = render(content)
            lacking = [name for name in VARIANTS if name not in made]
            if lacking:
                return {}, f"nothing was made of it to be shown as {lacking[0]}"
            for name in wanted:
                _write(path_of(store, source.clip_id, name), made[name])
            _write(made_of, digest.encode())
    except Exception as error:  # whatever a file does to who reads it, it costs one clip
        return {}, f"{type(error).__name__}: {' '.join(_why(error).split())[:200]}"
    return _facts(store, source.clip_id), ""


def _why(error: Exception) -> str:
    """What went wrong, without where on the server: it is kept with the clip and shown to whoever judges it."""
    return (error.strerror or "it cannot be read") if isinstance(error, OSError) else str(error)


def _write(path: Path, content: bytes) -> None:
    from base_model.checkpoint import atomic_write

    atomic_write(path, content)


def _facts(store: Store, clip_id: str) -> dict[str, Any]:
    """Size, rate and length as the worker found them; what it did not is left out."""
    path = path_of(store, clip_id, "facts.json")
    told = _json(path.read_bytes()) if path.is_file() else None
    names = {"width": "width", "height": "height", "fps": "fps", "frames": "num_frames", "seconds": "duration_s"}
    return {name: told[key] for key, name in names.items() if isinstance(told.get(key), int | float)} if isinstance(told, dict) else {}


def _add(store: Store, db: Connection, project_id: str, run: str, ready: Sequence[tuple[Source, Ruled, dict[str, Any]]], counts: Counts, by: str) -> None:
    if db.execute(select(project.c.id).where(project.c.id == project_id)).first() is None:
        raise Denied(404, "there is nothing here")
    ids = {source.clip_id for source, *_ in ready}
    old = {
        row.clip_id: row
        for row in db.execute(select(clip.c.id, clip.c.clip_id, clip.c.prompt_id, clip.c.decision, clip.c.state).where(clip.c.project_id == project_id, clip.c.clip_id.in_(ids)))
    }
    restricted = reviewing.restricted_digests(db, ids)
    prompts = {source.prompt_id for source, *_ in ready}
    texts = {key: value for key, value in db.execute(select(prompt.c.prompt_id, prompt.c.text).where(prompt.c.project_id == project_id, prompt.c.prompt_id.in_(prompts)))}
    added: list[str] = []
    again: list[str] = []
    for source, said, row in ready:
        before = old.get(source.clip_id)
        if (before is not None and before.prompt_id != source.prompt_id) or texts.get(source.prompt_id, source.text) != source.text:
            _refuse(counts, f"clip {source.clip_id}: it is there under another prompt, or its prompt's id is there with another text")
            continue
        if source.prompt_id not in texts:
            db.execute(insert(prompt), {"project_id": project_id, "prompt_id": source.prompt_id, "text": source.text, "lang": source.lang, "kind": source.kind})
            texts[source.prompt_id] = source.text
        for name in ("lang", "kind"):
            if told := getattr(source, name):  # where nobody knew it so far
                db.execute(update(prompt).where(prompt.c.project_id == project_id, prompt.c.prompt_id == source.prompt_id, prompt.c[name] == "").values({name: told}))
        if before is None:
            added.append(_insert(store, db, project_id, run, source, said, row, elsewhere=source.clip_id in restricted, by=by))
            old[source.clip_id] = db.execute(select(clip.c.id, clip.c.clip_id, clip.c.prompt_id, clip.c.decision, clip.c.state).where(clip.c.id == added[-1])).one()
        elif before.state != "deleted" and canonical(before.decision) != canonical(said.decision):
            db.execute(update(clip).where(clip.c.id == before.id).values(verdict=said.verdict, score=said.score, decision=said.decision))
            if said.restricted:
                reviewing.restrict(store, db, before.id, by=by)
            reviewing.restate(store, db, before.id)  # what people said of it holds whatever a filter says now
            again.append(before.id)
        else:
            counts.already += 1
    counts.added, counts.ruled_again = counts.added + len(added), counts.ruled_again + len(again)
    for kind, clips in (("clips imported", added), ("clips ruled again", again)):
        if clips:
            store.log(db, by, kind, project_id, {"run": sha256(run), "clips": clips})
    if added or again:
        reviewing.queue_imported(store, db, project_id, [*added, *again], by)


def _insert(store: Store, db: Connection, project_id: str, run: str, source: Source, said: Ruled, row: dict[str, Any], *, elsewhere: bool, by: str) -> str:
    """The id of a new clip. elsewhere: whether it is restricted in another project."""
    made = new_id("c")
    values = {
        "id": made,
        "project_id": project_id,
        "clip_id": source.clip_id,
        "prompt_id": source.prompt_id,
        "run": run,
        "row": {**row, "safety_json": canonical(said.decision)},
        "verdict": said.verdict,
        "score": said.score,
        "decision": said.decision,
        "state": "live",
        "created_at": store.now(),
    }
    db.execute(insert(clip), values)
    if said.restricted:
        reviewing.restrict(store, db, made, by=by)
    elif elsewhere:
        reviewing.restrict_here(store, db, made, by=by)
    return made


# Beside the requests


class Job(BaseModel):
    """An import that runs, or the last one that did since the server started."""

    folder: str
    run: str
    state: Literal["running", "done", "failed"]
    done: int
    counts: Counts
    problem: str = ""


@dataclass(eq=False)
class _Jobs:
    busy: threading.Lock = field(default_factory=threading.Lock)
    last: dict[str, Job] = field(default_factory=dict)  # by project


_jobs: WeakKeyDictionary[Store, _Jobs] = WeakKeyDictionary()


def begin_import(store: Store, project_id: str, folder: Path, name: str, run: str, by: str, *, render: Render | None = None) -> threading.Thread:
    """Starts `import_run` in a thread; `job_of` tells how far it is. Raises UserError while another import runs: the worker decodes one clip at a time."""
    jobs = _jobs.setdefault(store, _Jobs())
    if not 1 <= len(run) <= 200 or not run.isprintable():
        raise UserError("a run's name has 1 to 200 characters that can be seen, run. Choose another")
    if not jobs.busy.acquire(blocking=False):
        raise UserError("another import is running, folder. Wait until it has ended")
    jobs.last[project_id] = Job(folder=name, run=run, state="running", done=0, counts=Counts())

    def tell(done: int, counts: Counts) -> None:
        jobs.last[project_id] = Job(folder=name, run=run, state="running", done=done, counts=counts.model_copy())

    def work() -> None:
        problem = ""
        try:
            import_run(store, project_id, folder, run, by, render=render, progress=tell)
        except (UserError, Denied) as error:
            problem = str(error).replace(str(folder), name)
        except Exception as error:
            problem = f"{type(error).__name__}: the server's log says more"
            raise
        finally:
            state: Literal["done", "failed"] = "failed" if problem else "done"
            jobs.last[project_id] = jobs.last[project_id].model_copy(update={"state": state, "problem": problem})
            jobs.busy.release()

    thread = threading.Thread(target=work, name="rushes-import", daemon=True)
    thread.start()
    return thread


def job_of(store: Store, project_id: str) -> Job | None:
    return _jobs[store].last.get(project_id) if store in _jobs else None

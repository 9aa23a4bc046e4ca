"""Does the labeling app answer a hundred labelers at once, and lose nothing?

A server process of its own (`rushes app serve`) and simulated labelers that do what a browser does: ask for the next task, load its page's data, fetch every clip by range,
think, answer. Thinking times are exponential; without thinking the same shows how much the server does at most. Both stores commit to disk before they acknowledge. In the full
form Label Studio's API is measured beside it, one client after the other, next task and answer of both in turn.

"next task" is from the request for a lease to the task's data, both requests; "submit" until the answer is acknowledged.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import httpx2
import numpy as np
from pydantic import Field
from sqlalchemy import insert

from align.config import Count, NonNegative, Positive
from base_model.errors import UserError
from recipes.bench import _label_studio as peer
from recipes.bench._postgres import postgres
from recipes.bench._results import Bench, Row, check_can_end, flat, here, write
from reward.app import people, schema
from reward.app.media import path_of
from reward.app.security import begin_session
from reward.app.store import Store, new_id, open_store

StoreKind = Literal["sqlite", "postgresql"]
START_SECONDS = 60.0
TAKES = 4
PARTS = 10
REMARKS = (
    "One server process, its database and the simulated labelers share the machine. Milliseconds; `next_task` is two requests, the lease and the task's data. "
    "`server_cpu_share`: of one core.",
    "`lost`: acknowledged answers that are not in the store; `duplicated`: answers, or answered leases, that are there twice, and leases given to two.",
)


class Config(Bench):
    out: Path = Path("runs/bench-app")
    """Folder of the peer's environment."""
    stores: Annotated[tuple[StoreKind, ...], Field(min_length=1)] = ("sqlite", "postgresql")
    """Databases to measure. `quick` takes the first."""
    labelers: Annotated[tuple[Count, ...], Field(min_length=1)] = (100,)
    """Labelers at once, a row each. `quick` takes 20."""
    think: NonNegative = 3.0
    """Mean seconds between a task and its answer."""
    seconds: Positive = 60.0
    """Seconds of a row. `quick` takes 5."""
    saturation: bool = True
    """Whether labelers who do not think are measured, too."""
    peer: bool = True
    """Whether Label Studio is measured beside it. `quick` leaves it out without `python`."""
    python: Path | None = None
    """Python of an environment that has Label Studio; none means that one is made in `out`."""
    peer_tasks: Count = 100
    """Tasks that one client answers in turn with the peer's. `quick` takes at most 40."""


# A store with work for everybody


def seed_store(store: Store, labelers: int, tasks: int) -> tuple[str, list[str]]:
    """A project with so many tasks of four clips, and people who have agreed and practised; returns the project and the cookies of their sessions."""
    from reward.app import labeling, security
    from reward.app.settings import ProjectSettings

    settings = ProjectSettings.model_validate({"labeling": {"practice": 0, "overlap": 1, "most": 10_000, "least_watched": 0.0, "mixture": MIXTURE}})
    project_id, now = new_id("j"), store.now()
    with store.writing() as db:
        db.execute(insert(schema.project), {"id": project_id, "name": "bench", "state": "open", "settings": settings.model_dump(mode="json"), "created_at": now})
        db.execute(insert(schema.prompt), [_prompt(project_id, i) for i in range(tasks)])
        digests = [f"{number:064x}" for number in range(TAKES * tasks)]
        db.execute(insert(schema.clip), [_clip(project_id, digest, f"p{number // TAKES}", now) for number, digest in enumerate(digests)])
        cookies, agreed = [], {"consent": {project_id: security.sha256(settings.consent)}}
        for number in range(labelers):
            person_id = people.add_person(store, db, login=f"labeler-{number}", name=f"Labeler {number}", hashed="none")
            people.grant(store, db, person_id, project_id, ("labeler",), by="system")
            db.execute(schema.person.update().where(schema.person.c.id == person_id).values(settings=agreed))
            cookies.append(begin_session(store, db, person_id, "bench"))
        lead = security.Actor("system", "system", "", {}, {}, "", "")
        labeling.make_tasks(store, db, project_id, lead)
    film = _film()
    for digest in digests:
        file = path_of(store, digest)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(film)
    return project_id, cookies


MIXTURE = {"active": 0.7, "random": 0.3, "gold": 0.0, "repeat": 0.0, "mirrored": 0.0}


def _prompt(project_id: str, number: int) -> Row:
    return {"project_id": project_id, "prompt_id": f"p{number}", "text": f"a red circle moves to the left, {number}", "lang": "en", "kind": ""}


def _clip(project_id: str, digest: str, prompt_id: str, now: int) -> Row:
    row = {"clip_id": digest, "path": "", "prompt_id": prompt_id, "width": 256, "height": 256, "fps": 12.0, "num_frames": 24}
    decision = {"verdict": "allow", "rulings": []}
    return {
        **{"id": new_id("c"), "project_id": project_id, "clip_id": digest, "prompt_id": prompt_id, "run": "bench", "row": row},
        **{"verdict": "allow", "score": 0.01, "decision": decision, "state": "live", "created_at": now},
    }


def _film() -> bytes:
    """Two seconds of a moving bar, 256x256, as H.264."""
    from base_model.video.files import mp4_bytes

    rng = np.random.default_rng(0)
    frames = np.repeat(rng.integers(0, 60, (1, 256, 256, 3), dtype=np.uint8), 24, axis=0)
    for t in range(24):
        frames[t, 64:192, 8 * t : 8 * t + 40] = (220, 60, 60)
    return mp4_bytes(frames, 12.0)


# The server


@contextlib.contextmanager
def served(folder: Path, database: str | None) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`rushes app serve` on a free port: its address, and the process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", "recipes.cli", "app", "serve", "--out", str(folder), "--port", str(port), *(["--database", database] if database else [])]
    with open(folder / "server.log", "ab") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, env=os.environ)
    url, began = f"http://127.0.0.1:{port}", time.monotonic()
    try:
        while True:
            with contextlib.suppress(httpx2.TransportError):
                if httpx2.get(f"{url}/api/health").status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() - began > START_SECONDS:
                raise UserError(f"the app did not start, {folder / 'server.log'}. The end of that file says why")
            time.sleep(0.05)
        yield url, process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(60)


# Labelers


@dataclass
class Told:
    """What labelers saw."""

    next_s: list[float] = field(default_factory=list)
    submit_s: list[float] = field(default_factory=list)
    media_s: list[float] = field(default_factory=list)
    media_bytes: int = 0
    acknowledged: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)


class Browser:
    """One labeler's connection, which is kept. Of the standard library, since the labelers share the machine with the server: they should take little of it."""

    def __init__(self, host: str, cookie: str, csrf: str) -> None:
        self._connection = http.client.HTTPConnection(host, timeout=60)
        self._headers = {"cookie": f"rushes={cookie}", "x-csrf": csrf, "content-type": "application/json"}

    def ask(self, path: str, body: Mapping[str, Any] | None = None, headers: Mapping[str, str] | None = None) -> tuple[int, bytes]:
        """Status and content: of a POST where there is a body, else of a GET."""
        sent, held = None if body is None else json.dumps(body).encode(), self._connection.sock
        if held is not None and select.select([held], [], [], 0)[0]:  # the server has ended it, as it does after seconds without a request: a browser begins another
            self._connection.close()
        self._connection.request("GET" if body is None else "POST", path, sent, {**self._headers, **(headers or {})})
        answer = self._connection.getresponse()
        return answer.status, answer.read()

    def close(self) -> None:
        self._connection.close()


def label(browser: Browser, project_id: str, until: float, think: float, rng: random.Random, told: Told) -> None:
    """One labeler, until the time is over."""
    with contextlib.closing(browser):
        time.sleep(rng.random() * think)
        while time.monotonic() < until:
            began = time.perf_counter()
            status, content = browser.ask(f"/api/projects/{project_id}/label/next", {})
            task_id = json.loads(content).get("assignment_id") if status == 200 else None
            if task_id is None:
                told.errors[f"next: {status} {content[:80]!r}"] += 1
                return
            screen = json.loads(browser.ask(f"/api/assignments/{task_id}")[1])
            told.next_s.append(time.perf_counter() - began)
            told.tasks.append(task_id)
            for each in screen["clips"]:
                began = time.perf_counter()
                status, content = browser.ask(each["media"], headers={"range": "bytes=0-"})
                told.media_s.append(time.perf_counter() - began)
                told.media_bytes += len(content)
                if status != 206:
                    told.errors[f"media: {status}"] += 1
            time.sleep(rng.expovariate(1 / think) if think else 0)
            answer_id = f"bench-{rng.getrandbits(64):016x}"
            ranks = rng.sample(range(1, TAKES + 1), TAKES)
            body = {"id": answer_id, "ranks": {"overall": ranks}, "watched": [1.0] * TAKES, "watch_ms": [2_000] * TAKES, "lead_time_ms": 3_000}
            began = time.perf_counter()
            status, content = browser.ask(f"/api/assignments/{task_id}/answer", body)
            told.submit_s.append(time.perf_counter() - began)
            if status == 200:
                told.acknowledged.append(answer_id)
            else:
                told.errors[f"submit: {status} {content[:80]!r}"] += 1


def label_all(url: str, project_id: str, sessions: Sequence[tuple[str, str]], seconds: float, think: float) -> Told:
    """Every session's labeler, each in a thread. Raises what one of them raised."""
    told, until = Told(), time.monotonic() + seconds
    with ThreadPoolExecutor(len(sessions)) as pool:
        browsers = [Browser(urlsplit(url).netloc, *session) for session in sessions]
        for done in [pool.submit(label, browser, project_id, until, think, random.Random(number), told) for number, browser in enumerate(browsers)]:
            done.result()
    return told


def measure_store(kind: StoreKind, labelers: int, think: float, seconds: float) -> Row:
    """One row: latencies, and what of the acknowledged answers is in the store."""
    with tempfile.TemporaryDirectory(prefix="rushes-bench-") as place, contextlib.ExitStack() as stack:
        folder = Path(place)
        database = stack.enter_context(postgres()).format("postgres") if kind == "postgresql" else None
        store = open_store(folder, database)
        rate = labelers / think if think else 150
        project_id, cookies = seed_store(store, labelers, int(2 * rate * seconds) + 2 * labelers)
        sessions = [(cookie, csrf_of(store, cookie)) for cookie in cookies]
        store.close()
        with served(folder, database) as (url, process):
            cpu = _cpu(process.pid)
            began = time.monotonic()
            told = label_all(url, project_id, sessions, seconds, think)
            wall, cpu = time.monotonic() - began, _cpu(process.pid) - cpu
        store = open_store(folder, database)
        with store.reading() as db:
            rows = db.execute(schema.answer.select().with_only_columns(schema.answer.c.id, schema.answer.c.assignment_id)).all()
        events = store.verify_log()["events"]
        store.close()
    kept, assigned = Counter(row.id for row in rows), Counter(row.assignment_id for row in rows)
    return {
        "store": kind,
        "labelers": labelers,
        "think_s": think,
        "seconds": round(wall, 1),
        **_quantiles("next_task", told.next_s),
        **_quantiles("submit", told.submit_s),
        "clip_p95_ms": _ms(np.quantile(told.media_s, 0.95)),
        "clips_mb_a_second": round(told.media_bytes / wall / 1e6, 2),
        "tasks_a_second": round(len(told.submit_s) / wall, 2),
        "server_cpu_share": round(cpu / wall, 3),
        "acknowledged": len(told.acknowledged),
        "lost": sum(kept[each] == 0 for each in told.acknowledged),
        "duplicated": sum(n - 1 for n in kept.values()) + sum(n - 1 for n in assigned.values()) + len(told.tasks) - len(set(told.tasks)),
        "errors": sum(told.errors.values()),
        "events": events,
    }


def csrf_of(store: Store, cookie: str) -> str:
    from reward.app.security import actor_of_session

    actor = actor_of_session(store, cookie)
    assert actor is not None
    return actor.csrf


def _cpu(pid: int) -> float:
    import psutil

    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def _ms(seconds: float) -> float:
    return round(1e3 * float(seconds), 1)


def _quantiles(name: str, seconds: Sequence[float]) -> Row:
    if not seconds:
        raise UserError(f"no {name} was measured. Give more --seconds")
    return {f"{name}_p50_ms": _ms(np.quantile(seconds, 0.5)), f"{name}_p95_ms": _ms(np.quantile(seconds, 0.95)), f"{name}_max_ms": _ms(max(seconds))}


# Beside Label Studio


def beside(cfg: Config) -> list[Row]:
    """Next task and answer of one client, ours and the peer's in turn. A peer's kept connection waits 40 ms for an acknowledgement at every answer: one connection a
    request, beside it."""
    python = peer.environment(cfg.out / "label-studio", cfg.python)
    with tempfile.TemporaryDirectory(prefix="rushes-bench-") as place, contextlib.ExitStack() as stack:
        ours = Path(place) / "ours"
        ours.mkdir()
        store = open_store(ours)
        project_id, (cookie,) = seed_store(store, 1, 2 * cfg.peer_tasks + 10)
        csrf = csrf_of(store, cookie)
        store.close()
        url, _ = stack.enter_context(served(ours, None))
        theirs = stack.enter_context(peer.served(python, Path(place) / "theirs", _free_port()))
        theirs_project = peer.make_project(theirs)
        peer.import_tasks(theirs, theirs_project, 1_000)
        rows: list[Row] = []
        for kept in (True, False):
            mine = httpx2.Client(base_url=url, headers={"cookie": f"rushes={cookie}", "x-csrf": csrf, **({} if kept else {"connection": "close"})}, timeout=60)
            their = httpx2.Client(base_url=theirs.base_url, headers={**theirs.headers, **({} if kept else {"connection": "close"})}, timeout=60)
            said = "kept connection" if kept else "a connection each"
            pairs = list(zip(_answer_ours(mine, project_id, cfg.peer_tasks), peer.answer_tasks(their, theirs_project, cfg.peer_tasks), strict=True))
            rows.append(_ratio(f"next task, {said}", [a for (a, _), _ in pairs], [b for _, (b, _) in pairs]))
            rows.append(_ratio(f"submit, {said}", [a for (_, a), _ in pairs], [b for _, (_, b) in pairs]))
            mine.close()
            their.close()
        return rows


def _answer_ours(client: httpx2.Client, project_id: str, number: int) -> Iterator[tuple[float, float]]:
    for _ in range(number):
        began = time.perf_counter()
        task_id = client.post(f"/api/projects/{project_id}/label/next", json={}).json()["assignment_id"]
        client.get(f"/api/assignments/{task_id}").raise_for_status()
        got = time.perf_counter()
        client.post(f"/api/assignments/{task_id}/answer", json=answer_body()).raise_for_status()
        yield got - began, time.perf_counter() - got


def answer_body() -> Row:
    """The answer of somebody who watched everything."""
    return {"id": new_id("z"), "ranks": {"overall": [1, 2, 3, 4]}, "watched": [1.0] * TAKES, "watch_ms": [2_000] * TAKES, "lead_time_ms": 3_000}


def _ratio(what: str, ours: Sequence[float], theirs: Sequence[float]) -> Row:
    """Medians and their ratio; with the smallest and the largest ratio of ten parts of the turns, one after another, where there are so many."""
    mine, their = statistics.median(ours), statistics.median(theirs)
    size = len(ours) // PARTS
    turns = [slice(size * k, size * (k + 1)) for k in range(PARTS)] if size else []
    ratios = [statistics.median(ours[some]) / statistics.median(theirs[some]) for some in turns]
    between = {"ratio_low": round(min(ratios), 4), "ratio_high": round(max(ratios), 4)} if ratios else {"ratio_low": None, "ratio_high": None}
    return {"what": what, "ours": _ms(mine), "peer": _ms(their), "ratio": round(mine / their, 4), **between, "times": len(ours)}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main(cfg: Config, *, resume: bool = False) -> dict[str, Any]:
    """`resume` changes nothing: nothing is kept."""
    check_can_end(cfg)
    if shutil.which("runuser") is None and "postgresql" in cfg.stores and os.getuid() == 0:
        raise UserError("PostgreSQL does not run as root, and there is no runuser. Give --stores '[sqlite]'")
    stores = cfg.stores[:1] if cfg.quick else cfg.stores
    labelers, seconds = ((20,), 5.0) if cfg.quick else (cfg.labelers, cfg.seconds)
    rows = [measure_store(kind, number, cfg.think, seconds) for kind in stores for number in labelers]
    if cfg.saturation:
        rows += [measure_store(kind, labelers[-1], 0.0, min(seconds, 20.0)) for kind in stores]
    parts = {"labelers": rows}
    if cfg.peer and (cfg.python or not cfg.quick):
        parts["beside Label Studio"] = beside(cfg.model_copy(update={"peer_tasks": min(cfg.peer_tasks, 40)}) if cfg.quick else cfg)
    if cfg.write:
        write(cfg, "app", here("app", cfg), "The app under load", {name.capitalize(): rows for name, rows in parts.items()}, remarks=REMARKS)
    return {"rows": flat(parts)}

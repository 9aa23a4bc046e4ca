"""A store filled at once, by bulk inserts: as many clips, answers and events as are asked for."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sqlalchemy import Table, insert

from reward.app import log
from reward.app.schema import answer, assignment, clip, event, item, prompt, reading, review, task
from reward.app.store import Store
from tests.reward.app.conftest import add_member, add_project

HOUR = 3_600_000
TAKES = 4


@dataclass(frozen=True)
class Seeded:
    project_id: str
    people: tuple[str, ...]
    """Ids of labelers, "labeler-0" ..., with the usual password."""
    clips: int
    answers: int
    reviews: int
    events: int


def seed_store(store: Store, *, clips: int, answers: int, reviews: int = 0, events: int, people: int = 20, overlap: int = 10, drawn: int = 600, number: int = 0) -> Seeded:
    """Fills a project: prompts of four takes each, one ranking task a prompt of allowed clips, answers of the last days, an audit with reviews, and a log that verifies.

    `overlap` people may answer a task; answers beyond `overlap` times the tasks are not made. Everything is drawn from `number`.
    """
    rng = random.Random(number)
    project_id = add_project(store, f"seeded {number}", labeling={"overlap": overlap})
    ids = tuple(add_member(store, f"labeler-{number}-{place}", "labeler", "reviewer", project_id=project_id) for place in range(people))
    prompts = max(1, clips // TAKES)
    now = store.now()
    made_answers = min(answers, prompts * min(overlap, people))
    verdicts = [rng.choices(("allow", "review", "error", "block"), (90, 3, 1, 6))[0] for _ in range(clips)]
    by_prompt = [[place for place in range(at * TAKES, min((at + 1) * TAKES, clips)) if verdicts[place] == "allow"] for at in range(prompts)]
    tasks = [at for at in range(prompts) if len(by_prompt[at]) >= 2]
    made_answers = min(made_answers, len(tasks) * min(overlap, people))
    taken = [made_answers // len(tasks) + (place < made_answers % len(tasks)) for place in range(len(tasks))] if tasks else []
    _fill(
        store, prompt, ({"project_id": project_id, "prompt_id": f"p{at}", "text": f"prompt number {at}", "lang": "en", "kind": "benign" if at % 3 else ""} for at in range(prompts))
    )
    _fill(store, clip, (_clip(project_id, place, verdicts[place], rng, now) for place in range(clips)))
    _fill(store, task, (_task(project_id, at, by_prompt[at], overlap, taken[place], rng, now) for place, at in enumerate(tasks)))
    _fill(store, assignment, (row for place, at in enumerate(tasks) for row in _assignments(project_id, at, len(by_prompt[at]), ids, taken[place], rng, now)))
    _fill(store, answer, (row for place, at in enumerate(tasks) for row in _answers(project_id, at, len(by_prompt[at]), ids, taken[place], rng, now)))
    done: set[int] = set()
    if reviews:
        pools = [[place for place in range(clips) if verdicts[place] == verdict] for verdict in ("allow", "block")]
        chosen = {place for pool in pools for place in rng.sample(pool, min(drawn // 2, len(pool)))}
        share = {place: rate for pool in pools for rate in (len(chosen & set(pool)) / max(1, len(pool)),) for place in pool}
        done = set(rng.sample(sorted(chosen), min(reviews, len(chosen))))
        _fill(store, item, (_item(project_id, place, verdicts[place], place in chosen, place in done, share[place], now) for place in sorted(share)))
        _fill(store, reading, ({**_reading(project_id, place, ids), "issued_at": now, "lease_until": now + HOUR} for place in sorted(done)))
        _fill(store, review, (_review(project_id, place, verdicts[place], ids, rng, now) for place in sorted(done)))
    whole = _log(store, events)
    return Seeded(project_id, ids, clips, made_answers, len(done), whole)


def _fill(store: Store, table: Table, rows: Iterator[dict[str, Any]], batch: int = 5_000) -> None:
    with store.writing() as db:
        while some := list(islice(rows, batch)):
            db.execute(insert(table), some)


def _digest(project_id: str, place: int) -> str:
    return hashlib.sha256(f"{project_id} {place}".encode()).hexdigest()


def _ruling(score: float, verdict: str) -> dict[str, Any]:
    return {"verdict": verdict, "policy": "P17", "score": score if verdict != "error" else None, "reasons": [], "filter": "flash 3", "threshold": 0.5, "policy_version": "2"}


def _score(verdict: str, rng: random.Random) -> float | None:
    return {"allow": rng.betavariate(1, 12) * 0.5, "review": rng.uniform(0.3, 0.5), "block": rng.uniform(0.5, 1)}.get(verdict)


def _clip(project_id: str, place: int, verdict: str, rng: random.Random, now: int) -> dict[str, Any]:
    digest, score = _digest(project_id, place), _score(verdict, rng)
    score = None if score is None else round(score, 6)
    row = {
        "clip_id": digest,
        "path": f"clips/{digest}.mkv",
        "prompt_id": f"p{place // TAKES}",
        "generator": "rushes",
        "seed": place,
        "num_frames": 13,
        "fps": 12.0,
        "width": 128,
        "height": 128,
    }
    return {
        "id": f"c{project_id[-6:]}{place}",
        "project_id": project_id,
        "clip_id": digest,
        "prompt_id": f"p{place // TAKES}",
        "run": f"run {place % 3}",
        "row": row,
        "verdict": verdict,
        "score": score,
        "decision": {"verdict": verdict, "rulings": [_ruling(score or 0.0, verdict)]},
        "state": "live",
        "created_at": now - 9 * 24 * HOUR,
    }


def _prompt(project_id: str, at: int) -> dict[str, Any]:
    return {"project_id": project_id, "prompt_id": f"p{at}", "text": f"prompt number {at}", "lang": "en", "kind": "benign" if at % 3 else ""}


def _task(project_id: str, at: int, places: list[int], overlap: int, taken: int, rng: random.Random, now: int) -> dict[str, Any]:
    return {
        "id": f"t{project_id[-6:]}{at}",
        "project_id": project_id,
        "prompt_id": f"p{at}",
        "clips": [f"c{project_id[-6:]}{place}" for place in places],
        "kind": "rank",
        "truth": None,
        "wanted": overlap,
        "taken": taken,
        "answered": taken,
        "priority": rng.random(),
        "shuffle": rng.random(),
        "state": "full" if taken >= overlap else "open",
        "created_at": now - 8 * 24 * HOUR,
    }


def _who(at: int, slot: int, ids: tuple[str, ...]) -> str:
    return ids[(at + slot) % len(ids)]


def _assignments(project_id: str, at: int, k: int, ids: tuple[str, ...], taken: int, rng: random.Random, now: int) -> Iterator[dict[str, Any]]:
    for slot in range(taken):
        yield {
            "id": f"a{project_id[-6:]}{at}-{slot}",
            "project_id": project_id,
            "task_id": f"t{project_id[-6:]}{at}",
            "person_id": _who(at, slot, ids),
            "slot": slot,
            "purpose": "active",
            "repeat": 0,
            "shown_order": rng.sample(range(k), k),
            "issued_at": now - HOUR,
            "lease_until": now,
            "state": "answered",
            "draft": None,
        }


def _answers(project_id: str, at: int, k: int, ids: tuple[str, ...], taken: int, rng: random.Random, now: int) -> Iterator[dict[str, Any]]:
    for slot in range(taken):
        ranks = [1 + sorted(range(k), key=lambda clip: clip + rng.gauss(0, 1.2)).index(clip) for clip in range(k)]
        body = {
            "what": "rank",
            "all_bad": False,
            "ok": None,
            "asked": "",
            "ranks": {"overall": ranks},
            "watch_ms": [rng.randrange(900, 4_000) for _ in range(k)],
            "watched": [1.0] * k,
            "lead_time_ms": rng.randrange(6_000, 60_000),
            "guideline_version": "1",
            "app_version": "1",
        }
        yield {
            "id": f"n{project_id[-6:]}{at}-{slot}",
            "project_id": project_id,
            "task_id": f"t{project_id[-6:]}{at}",
            "assignment_id": f"a{project_id[-6:]}{at}-{slot}",
            "person_id": _who(at, slot, ids),
            "version": 1,
            "body": body,
            "at": now - rng.randrange(0, 7 * 24 * HOUR),
        }


def _item(project_id: str, place: int, verdict: str, drawn: bool, done: bool, share: float, now: int) -> dict[str, Any]:
    blocked = verdict == "block"
    return {
        "id": f"q{project_id[-6:]}{place}",
        "project_id": project_id,
        "clip": f"c{project_id[-6:]}{place}",
        "queue": ("blocked" if blocked else "random") if drawn else "undrawn",
        "why": {"policies": ["P17"] if blocked else [], "candidate": _candidate(verdict)},
        "probability": share,
        "wave": 0,
        "band": 0,
        "source": None,
        "severity": 1,
        "place": float(place),
        "wanted": int(drawn),
        "taken": int(done),
        "state": "closed" if done or not drawn else "open",
        "created_at": now - 7 * 24 * HOUR,
    }


def _candidate(verdict: str) -> dict[str, Any]:
    blocked = verdict == "block"
    told = {"pool": "blocked" if blocked else "passed", "score": 0.9 if blocked else 0.02, "filter_version": "flash 3", "policy_version": "2", "kind": ""}
    return {**told, "policies": ["P17"] if blocked else []}


def _reading(project_id: str, place: int, ids: tuple[str, ...]) -> dict[str, Any]:
    return {
        "id": f"r{project_id[-6:]}{place}",
        "project_id": project_id,
        "item_id": f"q{project_id[-6:]}{place}",
        "clip": f"c{project_id[-6:]}{place}",
        "person_id": ids[place % len(ids)],
        "slot": 0,
        "state": "decided",
        "draft": None,
    }


def _review(project_id: str, place: int, verdict: str, ids: tuple[str, ...], rng: random.Random, now: int) -> dict[str, Any]:
    violating = rng.random() < (0.8 if verdict == "block" else 0.01)
    said = "violating" if violating else "not_violating"
    return {
        "id": f"v{project_id[-6:]}{place}",
        "project_id": project_id,
        "item_id": f"q{project_id[-6:]}{place}",
        "reading_id": f"r{project_id[-6:]}{place}",
        "clip": f"c{project_id[-6:]}{place}",
        "person_id": ids[place % len(ids)],
        "version": 1,
        "said": said,
        "body": {"said": said, "policies": ["P17"] if violating else [], "severity": int(violating), "ruling": None, "restricted": False},
        "rationale": None,
        "policy_version": "2",
        "at": now - rng.randrange(0, 40 * HOUR),
    }


def _log(store: Store, events: int) -> int:
    """Events behind those that are there, until there are so many; the chain is whole."""
    with store.reading() as db:
        last = db.execute(event.select().order_by(event.c.seq.desc()).limit(1)).first()
    seq, prev, at = (last.seq, last.hash, store.now()) if last else (0, log.FIRST, store.now())

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal seq, prev
        while seq < events:
            seq += 1
            actor, kind, subject = f"person-{seq % 20}", ("answered", "leased", "login", "media shown")[seq % 4], f"n{seq % 50_000}"
            made = log.digest(seq, at, actor, kind, subject, "{}", prev)
            yield {"seq": seq, "at": at, "actor": actor, "kind": kind, "subject": subject, "body": "{}", "prev": prev, "hash": made}
            prev = made

    _fill(store, event, rows())
    return seq

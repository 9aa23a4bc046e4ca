"""Every page of the app as a picture, of a store in which people have worked for a week (`python -m tests.reward.app.screenshots FOLDER`).

FOLDER/NAME.DEVICE.SCHEME.png: desktop and phone, light and dark. A page of the route table that no picture shows ends it with an error. The most telling ones are put together
into `reward/app/screenshots/`, which the documents show.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from fastapi.routing import APIRoute
from sqlalchemy import Table, insert, select, update

from base_model.types import ClipShape
from base_model.video.files import mp4_bytes
from base_model.video.store import ClipStore
from recipes.shapes.prompts import make_prompts
from recipes.shapes.render import blur, render, sample_scene
from reward.app import attention, labeling, people, planting, reviewing, security, worker
from reward.app.schema import answer, assignment, clip, item, person, person_private, private_text, prompt, reading, review, task
from reward.app.store import Store, new_id, open_store
from reward.app.web import AppSettings, make_app
from tests.reward.app.browser import DESKTOP, PHONE
from tests.reward.app.conftest import CHROMIUM, FLAGS, Client, add_member, add_project, serving

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page

HOUR = 3_600_000
SHAPE, FPS = ClipShape(25, 144, 256), 12.0
PROMPTS, TAKES, OVERLAP = 260, 4, 3
SHOWN = 14
"""Prompts whose clips really exist as files."""
INSTRUCTIONS = (
    "Watch every clip to its end. Rank them by how well they show what the prompt asks for: first the thing and its colour, then how it moves.\n"
    "Equal ones may share a place. A clip that flickers, tears or freezes is broken. What should not be shown to anybody is unsafe: say so, and it is gone."
)
LABELERS = ("Ana Silva", "Ben Okafor", "Chi Nguyen", "Dara Lindqvist", "Emre Kaya")
NOISE = (0.5, 0.7, 0.8, 0.6, 2.6)
"""How far each labeler strays from what the clips are worth."""
OTHERS = {"lea": ("Lea Moreau", "lead"), "rosa": ("Rosa Weiss", "reviewer"), "tom": ("Tom Adeyemi", "reviewer"), "sam": ("Sam Ito", "senior"),
          "kim": ("Kim Haddad", "child_safety"),          "ole": ("Ole Brandt", "auditor"), "noa": ("Noa Levi", "labeler")}  # fmt: skip
WORTH = (1.0, 0.4, 0.1, -0.8)
"""Of the takes: a clean one, another, one of another prompt, a blurred one."""


@dataclass
class Seeded:
    store: Store
    settings: AppSettings
    project_id: str
    clients: dict[str, Client]


# The store


@contextmanager
def seeded(folder: Path) -> Iterator[Seeded]:
    """A store of people, clips, answers, audits, decisions, proposals and sign-offs; everything is drawn from one seed."""
    store = open_store(folder / "store")
    settings = AppSettings(import_roots=(folder / "runs",))
    rng = random.Random(4)
    dimensions = [
        {"name": "overall", "question": "Which clip shows best what the prompt asks for?"},
        {"name": "motion", "question": "Which clip moves best?", "sees_prompt": False},
    ]
    project_id = add_project(
        store, "Shapes, November", instructions=INSTRUCTIONS, guideline_version="4", retention_days=90,
        labeling={"takes": TAKES, "overlap": OVERLAP, "dimensions": dimensions, "confidence": True, "practice": 2, "least_watched": 0.6,
                  "mixture": {"active": 1, "random": 0, "gold": 0, "repeat": 0, "mirrored": 0}},
        reviewing={"second_share": 0.3, "undo_seconds": 600},
    )  # fmt: skip
    add_project(store, "Camera moves, pilot")
    try:
        yield fill(store, settings, project_id, rng, folder)
    finally:
        worker._shared.close()
        store.close()


def fill(store: Store, settings: AppSettings, project_id: str, rng: random.Random, folder: Path) -> Seeded:
    labelers = [joined(store, name.split()[0].lower(), name, "labeler", project_id) for name in LABELERS]
    for login, (name, role) in OTHERS.items():
        joined(store, login, name, role, "*" if role == "lead" else project_id)
    add_member(store, "grace", "senior", project_id=project_id)
    clients = {login: Client(store, login, settings) for login in (*OTHERS, "ana", "grace")}
    asked = make_prompts(PROMPTS, seed=5, split="train")
    attention.consent(store, clients["ana"].me, project_id)
    put(store, prompt, [{"project_id": project_id, "prompt_id": each.prompt_id, "text": each.text, "lang": "en", "kind": "benign"} for each in asked])
    rows = [clip_row(store, project_id, each.prompt_id, at, take, rng) for at, each in enumerate(asked) for take in range(TAKES + (at < SHOWN))]
    there = [row for row in rows if row["at"] < SHOWN]
    make_media(store, asked[:SHOWN], there)
    put(store, clip, [without_place(row) for row in there])
    with store.writing() as db:
        labeling.make_tasks(store, db, project_id, clients["lea"].me)
        labeling.make_demonstrations(store, db, project_id, clients["lea"].me)
    planting.make_practice(store, project_id, 2, clients["lea"].me)
    put(store, clip, [without_place(row) for row in rows if row["at"] >= SHOWN])
    answers(store, project_id, rows, labelers, rng)
    with store.writing() as db:
        reviewing.queue_imported(store, db, project_id, [row["id"] for row in rows if row["verdict"] in ("review", "error")])
        flagged = next(row["id"] for row in rows if row["verdict"] == "allow" and row["at"] == SHOWN - 1)
        reviewing.flag(store, db, clip=flagged, policies=("P05",), source="a_none", by=clients["ana"].me)
    decisions(store, project_id, clients, rng)
    led(store, project_id, clients, folder)
    return Seeded(store, settings, project_id, clients)


def without_place(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "at"}


def joined(store: Store, login: str, name: str, role: str, project_id: str) -> str:
    person_id = add_member(store, login, role, project_id=project_id)
    with store.writing() as db:
        db.execute(update(person_private).where(person_private.c.person_id == person_id).values(name=name))
    return person_id


def put(store: Store, table: Table, rows: list[dict[str, Any]]) -> None:
    with store.writing() as db:
        db.execute(insert(table), rows)


def clip_row(store: Store, project_id: str, prompt_id: str, at: int, take: int, rng: random.Random) -> dict[str, Any]:
    """A clip as an import writes it, two in three of the newer run; a fifth take of a prompt is one that the filters did not decide about."""
    run, version = (("November, step 400", "flash 3"), ("November, step 400", "flash 3"), ("November, step 800", "flash 4"))[at % 3]
    verdict = rng.choices(("allow", "review", "error", "block"), (88, 4, 1, 7))[0] if at >= SHOWN else ("allow" if take < TAKES else ("review", "block", "review", "error")[at % 4])
    score = {"allow": rng.betavariate(1.2, 11), "review": rng.uniform(0.38, 0.5), "block": rng.betavariate(6, 2) * 0.5 + 0.5}.get(verdict)
    said = [{"text": "general flashes, 4.2 a second", "start": 0.4, "end": 1.6, "span": None}] if verdict in ("review", "block") else []
    ruling = {"verdict": verdict, "policy": "P17", "score": score, "reasons": said, "filter": version, "threshold": 0.5, "policy_version": "2"}
    digest = hashlib.sha256(f"{at} {take}".encode()).hexdigest()
    row = {"clip_id": digest, "path": f"clips/{digest}.mkv", "prompt_id": prompt_id, "generator": "rushes", "seed": take, "num_frames": SHAPE.frames, "fps": FPS,
           "width": SHAPE.width, "height": SHAPE.height, "take": take}  # fmt: skip
    return {
        "id": new_id("c"), "project_id": project_id, "clip_id": digest, "prompt_id": prompt_id, "run": run, "row": row, "verdict": verdict, "score": score,
        "decision": {"verdict": verdict, "rulings": [ruling]}, "state": "live", "created_at": store.now() - 8 * 24 * HOUR, "at": at,
    }  # fmt: skip


def make_media(store: Store, asked: list[Any], rows: list[dict[str, Any]]) -> None:
    rng = np.random.default_rng(3)
    for row in rows:
        at, take = row["at"], row["row"]["take"]
        other = asked[(at + 3) % len(asked)] if take == 2 else asked[at]
        video = render(sample_scene(other, rng, clip=SHAPE), SHAPE)
        if take == 3:
            video = blur(video, 3.0)
        if take == TAKES:
            video = video.clone()
            video[4:20:4] = 1 - video[4:20:4]
        frames = (video.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
        worker.keep(store, row["clip_id"], dict(worker.render(mp4_bytes(frames, FPS))))


def daytime(rng: random.Random, now: int) -> int:
    """A moment of the last week, more often by day than by night."""
    while True:
        at = now - int(rng.uniform(0.3, 7 * 24) ** 1.0 * HOUR)
        if rng.random() < 0.06 + 0.94 * max(0.0, math.sin(math.pi * ((at // HOUR % 24) - 6) / 14)):
            return at


def answers(store: Store, project_id: str, rows: list[dict[str, Any]], labelers: list[str], rng: random.Random) -> None:
    """Rankings by people who stray more or less, with gold tasks and repeats; the last prompts and those that pictures show are left for others."""
    now, by_prompt = store.now(), {}  # type: ignore[var-annotated]
    for row in rows:
        if row["verdict"] == "allow" and row["at"] >= SHOWN:
            by_prompt.setdefault(row["prompt_id"], []).append(row)
    prompts = [key for key, clips in sorted(by_prompt.items()) if len(clips) == TAKES]
    tasks, given, said = [], [], []
    for number, prompt_id in enumerate(prompts[:150]):
        clips = by_prompt[prompt_id]
        gold = number % 9 == 0
        who = labelers if gold else rng.sample(labelers, OVERLAP if number < 120 else 1)
        done = len(who)
        truth = {"overall": [1, None, None, 2]} if gold else None
        kind, wanted, state = ("gold", 1_000_000, "open") if gold else ("rank", OVERLAP, "full" if done == OVERLAP else "open")
        row = labeling.task_row(store, project_id, prompt_id, [each["id"] for each in clips], kind, wanted=wanted, shuffle=rng.random(), truth=truth)
        tasks.append(row | {"priority": -1.0, "taken": done, "answered": done, "state": state})
        for slot, person_id in enumerate(who):
            noise = NOISE[labelers.index(person_id)]
            for repeat in range(1 + (number % 7 == slot)):
                assigned = new_id("a")
                order = rng.sample(range(TAKES), TAKES)
                given.append({"id": assigned, "project_id": project_id, "task_id": tasks[-1]["id"], "person_id": person_id, "slot": slot, "purpose": "gold" if gold else "active",
                              "repeat": repeat, "shown_order": order, "issued_at": now, "lease_until": now, "state": "answered", "draft": None})  # fmt: skip
                said.append(an_answer(project_id, tasks[-1]["id"], assigned, person_id, order, noise, gold, repeat, rng, daytime(rng, now)))
    put(store, task, tasks)
    put(store, assignment, given)
    put(store, answer, said)


def an_answer(project_id: str, task_id: str, assigned: str, person_id: str, order: list[int], noise: float, gold: bool, repeat: int, rng: random.Random, at: int) -> dict[str, Any]:
    def ranks() -> list[int]:
        felt = [WORTH[take] + rng.gauss(0, noise) * 0.6 - 0.12 * noise * order[take] for take in range(TAKES)]
        return [1 + sum(other > mine + 0.05 for other in felt) for mine in felt]

    told = {"overall": ranks(), "motion": ranks()}
    ok = told["overall"][0] < told["overall"][3] if gold else (rng.random() < 0.95 - 0.12 * noise if repeat else None)
    body = {"what": "rank", "all_bad": False, "ok": ok, "asked": "", "ranks": told, "watch_ms": [rng.randrange(1_700, 4_000) for _ in range(TAKES)], "watched": [1.0] * TAKES,
            "lead_time_ms": rng.randrange(9_000, 48_000), "guideline_version": "4", "app_version": "1"}  # fmt: skip
    return {"id": new_id("n"), "project_id": project_id, "task_id": task_id, "assignment_id": assigned, "person_id": person_id, "version": 1, "body": body, "at": at}


def decisions(store: Store, project_id: str, clients: dict[str, Client], rng: random.Random) -> None:
    """An audit that was read, mostly; a contested decision; one that can still be undone; clips whose files exist wait in the queues."""
    clients["lea"].post(f"/api/projects/{project_id}/lead/audit").raise_for_status()
    readers = [clients[login].me for login in ("rosa", "tom", "sam")]
    now = store.now()
    readings, reviews, closed = [], [], []
    wrote = {who.person_id: new_id("x") for who in readers}
    put(store, private_text, [{"id": wrote[each], "person_id": each, "text": "It blinks the whole time, about five times a second.", "created_at": now} for each in wrote])
    with store.reading() as db:
        drawn = db.execute(
            select(item.c.id, item.c.clip, item.c.queue, clip.c.verdict).join(clip, clip.c.id == item.c.clip).where(item.c.queue.in_(("blocked", "random", "stratified")))
        ).all()
    for number, row in enumerate(drawn):
        if number % 8 == 7:
            continue
        violating = rng.random() < (0.86 if row.verdict == "block" else 0.02)
        said = "violating" if violating else "not_violating" if rng.random() < 0.97 else "borderline"
        one, made, at = new_id("r"), new_id("v"), daytime(rng, now)
        who = readers[number % len(readers)]
        readings.append({"id": one, "project_id": project_id, "item_id": row.id, "clip": row.clip, "person_id": who.person_id, "slot": 0, "issued_at": at, "lease_until": at,
                         "state": "decided", "draft": None})  # fmt: skip
        body = {"said": said, "policies": ["P17"] if violating else [], "severity": 3 if violating else 0, "ruling": None, "restricted": False, "escalate": False}
        reviews.append({"id": made, "project_id": project_id, "item_id": row.id, "reading_id": one, "clip": row.clip, "person_id": who.person_id, "version": 1, "said": said,
                        "body": body, "rationale": wrote[who.person_id], "policy_version": reviewing.policy_version(), "at": at})  # fmt: skip
        closed.append(row.id)
    put(store, reading, readings)
    put(store, review, reviews)
    with store.writing() as db:
        db.execute(update(item).where(item.c.id.in_(closed)).values(taken=1, state="closed"))
    decided = clients["rosa"].get(f"/api/reading/{take(clients['rosa'], project_id, 'review')}").json()["reading_id"]
    told = {
        "id": new_id("v"),
        "said": "violating",
        "policies": ["P17"],
        "rationale": "The whole frame turns over four times in a second.",
        "policy_version": reviewing.policy_version(),
    }
    clients["rosa"].post(f"/api/reading/{decided}/reveal", json={"level": "sharp"}).raise_for_status()
    clients["rosa"].post(f"/api/reading/{decided}/decide", json=told).raise_for_status()
    contested = next(row["id"] for row in reviews if row["person_id"] != clients["sam"].me.person_id and row["said"] == "violating")
    reason = "One flash of a lamp in the scene is not a flashing clip."
    clients["lea"].post(f"/api/review/{project_id}/appeal", json={"review_id": contested, "reason": reason}).raise_for_status()


def take(client: Client, project_id: str, queue: str) -> str:
    answered = client.post(f"/api/review/{project_id}/next", json={"queue": queue})
    answered.raise_for_status()
    return str(answered.json()["done"])


def led(store: Store, project_id: str, clients: dict[str, Client], folder: Path) -> None:
    """Invitations, a threshold that another approved and one that waits, a sign-off, and an import."""
    base, lea, sam = f"/api/projects/{project_id}/lead", clients["lea"], clients["sam"]
    for role in ("labeler", "reviewer"):
        lea.post(f"{base}/invitations", json={"roles": [role]}).raise_for_status()
    made = ClipStore(folder / "runs" / "2026-11-26" / "candidates")
    for seed in range(3):
        made.add(torch.full((2, 3, 16, 16), seed / 4), prompt="a red circle moves to the left", prompt_id="new", seed=seed, sampler={}, lineage="x", fps=FPS, preview=False)
    ClipStore(folder / "runs" / "2026-11-25" / "candidates").add(torch.ones(2, 3, 16, 16), prompt="x", prompt_id="y", seed=0, sampler={}, lineage="x", fps=FPS, preview=False)
    folders = lea.get(f"{base}/import").json()["folders"]
    lea.post(f"{base}/import", json={"folder": folders[-1], "run": "November, step 1200"}).raise_for_status()
    until(lambda: lea.get(f"{base}/import").json()["job"]["state"] == "done")
    until(lambda: lea.get(f"{base}/thresholds").json()["choices"])
    for name, new in (("flash 3", 0.45), ("flash 4", 0.4)):
        proposal = lea.post(f"{base}/thresholds", json={"filter": name, "policy": "P17", "new": new}).json()["done"]
        if name == "flash 3":
            sam.post(f"{base}/thresholds/{proposal}", json={"approve": True}).raise_for_status()
    signed = f"{base}/signoffs?run=November, step 400"
    until(lambda: lea.get(signed).json()["standing"]["state"] == "fresh" and lea.get(signed).json()["evidence"])
    statement = (
        "Looked at the audit of both waves and at every clip that two readers did not agree about. Recall is measured on few misses; the next wave draws more of the doubtful ones."
    )
    body = {"run": "November, step 400", "approved": True, "statement": statement, "seen": lea.get(signed).json()["seen"]}
    lea.post(f"{base}/signoffs", json=body).raise_for_status()
    lea.post("/api/account/tokens", json={"name": "nightly export", "days": 90}).raise_for_status()


def until(holds: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError("what was waited for never came")
        time.sleep(0.05)


# The pictures


@dataclass(frozen=True)
class Picture:
    """A page as somebody sees it. route: of the table. act: what is done there before it is taken."""

    name: str
    who: str | None
    route: str
    path: str
    act: Callable[[Page], None] | None = None
    whole: bool = True


def pictures(seeded: Seeded) -> Iterator[Picture]:
    store, project_id, clients = seeded.store, seeded.project_id, seeded.clients
    lead, label, review = "/projects/{project_id}/lead", "/projects/{project_id}/label", "/review/{project_id}"
    here = {route: route.replace("{project_id}", project_id) for route in (lead, label, review)}
    with store.writing() as db:
        token = people.invite(store, db, project_id=project_id, roles=("labeler",), by="system")
    yield Picture("login", None, "/login", "/login")
    yield Picture("join", None, "/join/{token}", f"/join/{token}")
    yield Picture("error", "lea", "", "/projects/none/lead")
    yield Picture("home", "lea", "/", "/")
    yield Picture("account", "lea", "/account", "/account")
    yield Picture("consent", "noa", label, here[label])
    yield Picture("room-label", "ana", label, here[label])
    asked = clients["ana"].post(f"/api{here[label]}/next", json={})
    practice = asked.json()["go"]
    yield Picture("rank-practice", "ana", "/assignments/{assignment_id}", practice, playing, whole=False)
    for _ in range(2):  # practice is over
        go = clients["ana"].post(f"/api{here[label]}/next", json={}).json()["go"]
        clients["ana"].post(f"/api{go}/skip", json={"id": new_id("z"), "reason": "undecidable"}).raise_for_status()
    ranking = shown_task(clients["ana"], seeded, "rank")
    yield Picture("rank-first-question", "ana", "/assignments/{assignment_id}", ranking, playing)
    yield Picture("rank", "ana", "/assignments/{assignment_id}", ranking, lambda page: ranked(page, by_worth(store, ranking)))
    yield Picture("rank-one-place", "ana", "/assignments/{assignment_id}", ranking, lambda page: (playing(page), page.keyboard.press("f"))[0], whole=False)
    yield Picture("rank-unsafe", "ana", "/assignments/{assignment_id}", ranking, lambda page: (playing(page), page.keyboard.press("u"), page.wait_for_timeout(200))[0], whole=False)
    yield Picture("rank-skip", "ana", "/assignments/{assignment_id}", ranking, lambda page: (playing(page), page.keyboard.press("s"), page.wait_for_timeout(200))[0], whole=False)
    yield Picture("rank-help", "ana", "/assignments/{assignment_id}", ranking, lambda page: (playing(page), page.keyboard.press("?"), page.wait_for_timeout(200))[0], whole=False)
    yield Picture("demonstrate", "ana", "/assignments/{assignment_id}", shown_task(clients["ana"], seeded, "demonstration", besides=ranking), playing)
    yield Picture("room-review", "rosa", review, here[review])
    with store.reading() as db:
        after = (
            db.execute(select(reading.c.id).where(reading.c.person_id == clients["rosa"].me.person_id, reading.c.state == "decided").order_by(reading.c.issued_at.desc()))
            .scalars()
            .first()
        )
    yield Picture("reading-after", "rosa", "/reading/{reading_id}", f"/reading/{after}")
    one = take(clients["tom"], project_id, "flagged")
    yield Picture("reading-blurred", "tom", "/reading/{reading_id}", f"/reading/{one}")
    yield Picture("reading-clip", "tom", "/reading/{reading_id}", f"/reading/{one}", revealed)
    appealed = take(clients["grace"], project_id, "appeals")
    yield Picture("reading-appeal", "grace", "/reading/{reading_id}", f"/reading/{appealed}")
    yield Picture("decisions", "sam", f"{review}/decisions", f"{here[review]}/decisions")
    yield Picture("projects", "lea", "/projects", "/projects")
    for tab in ("", "/people", "/agreement", "/filters", "/thresholds", "/signoffs", "/import", "/exports", "/settings"):
        yield Picture(f"lead{tab.replace('/', '-') or '-progress'}", "lea", lead + tab, here[lead] + tab, whole=tab != "/settings")
    yield Picture("lead-thresholds-preview", "lea", f"{lead}/thresholds", f"{here[lead]}/thresholds?choice=P17+flash+4&new=0.3")
    yield Picture("lead-signoffs-run", "lea", f"{lead}/signoffs", f"{here[lead]}/signoffs?run=November,+step+800")
    yield Picture("lead-people-auditor", "ole", f"{lead}/people", f"{here[lead]}/people")
    yield Picture("log", "lea", "/log", "/log")
    with store.writing() as db:
        db.execute(update(person).where(person.c.id == clients["noa"].me.person_id).values(state="paused"))
    yield Picture("paused", "noa", label, here[label])


def by_worth(store: Store, path: str) -> list[int]:
    """Ranks of the clips of a task, by place on the screen."""
    with store.reading() as db:
        row = db.execute(select(assignment.c.shown_order, task.c.clips).join(task).where(assignment.c.id == path.rpartition("/")[2])).one()
        takes = {each.id: each.row["seed"] for each in db.execute(select(clip.c.id, clip.c.row).where(clip.c.id.in_(row.clips)))}
    return [(1, 2, 4, 3)[takes[row.clips[row.shown_order.index(place)]]] for place in range(len(row.clips))]


def shown_task(client: Client, seeded: Seeded, work: str, besides: str = "") -> str:
    """A task whose clips exist as files: those without are passed over."""
    asked = {"work": work, "besides": besides.rpartition("/")[2] or None}
    for _ in range(200):
        go = str(client.post(f"/api/projects/{seeded.project_id}/label/next", json=asked).json()["go"])
        if client.get(client.get(f"/api{go}").json()["clips"][0]["media"]).status_code in (200, 206):
            return go
        client.post(f"/api{go}/skip", json={"id": new_id("z"), "reason": "technical"}).raise_for_status()
    raise RuntimeError("no task with clips")


def playing(page: Page) -> None:
    page.wait_for_function("() => document.querySelectorAll('.take video').length && [...document.querySelectorAll('.take video')].every((video) => video.readyState >= 2)")
    page.wait_for_timeout(900)
    page.keyboard.press(" ")
    page.wait_for_timeout(250)


def ranked(page: Page, ranks: list[int]) -> None:
    """At the second question, which shows the prompt, with the last clip still to be ranked."""
    playing(page)
    if page.inner_text("#steps").startswith("Question 1"):
        press(page, ranks)
        page.keyboard.press("Enter")
        page.locator("#prompt:not([hidden])").wait_for()
    press(page, [rank if rank < TAKES else 0 for rank in ranks])
    page.wait_for_timeout(200)


def press(page: Page, ranks: list[int]) -> None:
    """Ranks by place, 0 for none; what the draft of an earlier picture holds already is left."""
    for rank in ranks:
        take = page.locator(".take.current")
        if rank and "not ranked" in (take.get_attribute("aria-label") or ""):
            page.keyboard.press(str(rank))
        page.keyboard.press("ArrowRight")


def revealed(page: Page) -> None:
    page.wait_for_function("() => document.getElementById('still').naturalWidth > 0")
    page.keyboard.press("5")
    page.wait_for_function("() => document.getElementById('clip').readyState >= 2")
    for key in (".", ".", ".", "[", ".", ".", ".", ".", ".", "]", "v"):
        page.keyboard.press(key)
        page.wait_for_timeout(60)


def context_of(browser: Any, address: str, seeded: Seeded, who: str | None, device: str, scheme: str) -> BrowserContext:
    phone = {"viewport": PHONE, "is_mobile": True, "has_touch": True, "device_scale_factor": 2}
    options = phone if device == "phone" else {"viewport": DESKTOP}
    context: BrowserContext = browser.new_context(base_url=address, color_scheme=scheme, **options)
    if who is not None:
        with seeded.store.writing() as db:
            cookie = security.begin_session(seeded.store, db, seeded.clients[who].me.person_id, "pictures")
        context.add_cookies([{"name": "rushes", "value": cookie, "url": address}])
    return context


def take_pictures(folder: Path, only: str = "") -> list[Path]:
    """Writes every picture, or the one that is called `only`."""
    from playwright.sync_api import sync_playwright

    made: list[Path] = []
    folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="rushes-pictures-") as where,
        seeded(Path(where)) as world,
        serving(world.store, world.settings) as address,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, *(["--no-sandbox"] if os.getuid() == 0 else [])])
        seen = set()
        for picture in pictures(world):
            seen.add(picture.route)
            if only not in ("", picture.name):
                continue
            for device in ("desktop", "phone"):
                for scheme in ("light", "dark"):
                    context = context_of(browser, address, world, picture.who, device, scheme)
                    page = context.new_page()
                    page.goto(picture.path)
                    until(lambda page=page: "worked out" not in page.inner_text("body"))  # type: ignore[misc]
                    page.wait_for_timeout(150)
                    if picture.act:
                        try:
                            picture.act(page)
                        except Exception:
                            page.screenshot(path=folder / "failed.png")
                            raise
                    wide = page.evaluate("document.documentElement.scrollWidth") - (PHONE if device == "phone" else DESKTOP)["width"]
                    if wide > 0:
                        print(f"{picture.name} is {wide} pixels wider than the {device}", file=sys.stderr)
                    made.append(folder / f"{picture.name}.{device}.{scheme}.png")
                    page.screenshot(path=made[-1], full_page=picture.whole)
                    context.close()
            print(picture.name, flush=True)
        browser.close()
        table = [route for route in make_app(world.store).routes if isinstance(route, APIRoute) and "GET" in route.methods]
        pages = {route.path for route in table if not route.path.startswith(("/api/", "/static/", "/media/", "/review-media/")) and not route.path.endswith(".yaml")}
    if pages - seen:
        raise SystemExit(f"no picture shows {sorted(pages - seen)}. Say in `pictures` who opens them")
    return made


SHEETS = {
    "labeling": (("rank", "desktop", "light"), ("rank", "phone", "dark")),
    "reviewing": (("reading-blurred", "desktop", "dark"), ("reading-clip", "phone", "light")),
    "leading": (("lead-progress", "desktop", "light"), ("lead-filters", "phone", "dark")),
    "trusting": (("lead-agreement", "desktop", "dark"), ("lead-thresholds-preview", "desktop", "light")),
}
TALL = 720


def put_together(folder: Path, out: Path) -> None:
    """Writes a small picture of several for each of `SHEETS`."""
    from PIL import Image

    out.mkdir(parents=True, exist_ok=True)
    for name, parts in SHEETS.items():
        shown = []
        for each in parts:
            picture = Image.open(folder / f"{'.'.join(each)}.png").convert("RGB")
            wide, tall = (1280, 900) if each[1] == "desktop" else (720, 1480)
            top = picture.crop((0, 0, wide, min(tall, picture.height)))
            shown.append(top.resize((round(wide * TALL / tall), round(top.height * TALL / tall)), Image.Resampling.LANCZOS))
        sheet = Image.new("RGB", (sum(each.width for each in shown) + 12 * (len(shown) - 1), TALL), "#9aa3b0")
        left = 0
        for picture in shown:
            sheet.paste(picture, (left, 0))
            left += picture.width + 12
        sheet.save(out / f"{name}.webp", quality=78, method=6)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit("python -m tests.reward.app.screenshots FOLDER [NAME]")
    take_pictures(Path(sys.argv[1]), *sys.argv[2:])
    if len(sys.argv) == 2:
        put_together(Path(sys.argv[1]), Path(people.__file__).with_name("screenshots"))

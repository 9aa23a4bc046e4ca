"""The whole way in a real browser, as people would go it: from the first link to a reward model that learned from what they said."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from playwright.sync_api import TimeoutError as PlaywrightTimeout
from sqlalchemy import select

from base_model.video.store import ClipStore, NewClip
from recipes import reward_model
from recipes.cli import main
from recipes.shapes.prompts import make_prompts
from recipes.shapes.render import DEMO_CLIP, render, sample_scene
from reward.app import people, worker
from reward.app.schema import answer, assignment, clip, event, reveal, review, task, withdrawal
from reward.app.store import Store
from reward.app.web import AppSettings
from reward.comparisons import load_comparisons
from reward.matcher import Matcher, MatcherSize, save_matcher
from tests.reward.app.browser import DESKTOP
from tests.reward.app.conftest import PASSWORD, serving
from tests.reward.app.test_labeler_room import wait_for_task

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.timed

TASKS, TAKES, FPS = 5, 4, 12.0
ANNS, BOBS = "1234", "1243"
"""Rank of each take by its seed: of six pairs they see one the other way round."""
ALLOWED = {"verdict": "allow", "rulings": [{"verdict": "allow", "policy": "P17", "score": 0.05, "reasons": [], "filter": "flash 3", "threshold": 0.5, "policy_version": "2"}]}
PLAYING = "() => [...document.querySelectorAll('.take video')].map((video) => [video.currentTime, video.getVideoPlaybackQuality().totalVideoFrames])"


def a_run(folder: Path) -> None:
    """Takes of prompts, with records, previews and decisions, as a run leaves them; one is blocked."""
    rng = np.random.default_rng(0)
    new = [
        NewClip(render(sample_scene(each, rng, clip=DEMO_CLIP), DEMO_CLIP), each.text, each.prompt_id, seed, {"steps": 4}, "a model", FPS, safety=ALLOWED)
        for each in make_prompts(TASKS, seed=5, split="train")
        for seed in range(TAKES)
    ]
    blocked = {"verdict": "block", "rulings": [{**ALLOWED["rulings"][0], "verdict": "block", "score": 0.9}]}
    new.append(NewClip(torch.zeros_like(new[0].video), new[0].prompt, new[0].prompt_id, TAKES, {"steps": 4}, "a model", FPS, safety=blocked))
    ClipStore(folder).add_many(new, preview=True)


class Person:
    """Somebody at a browser of one's own. `wrong`: what the console said; `refused`: what was not answered; `media`: address and status of every clip and picture that came."""

    def __init__(self, browser: Browser, address: str, link: str, login: str) -> None:
        self.page = browser.new_context(viewport=DESKTOP, base_url=address, accept_downloads=True).new_page()
        self.wrong: list[str] = []
        self.media: list[tuple[str, int]] = []
        self.refused: list[str] = []
        self.page.on("console", lambda message: self.wrong.append(message.text) if message.type in ("error", "warning") and "status of 4" not in message.text else None)
        self.page.on("response", lambda told: self.refused.append(told.url) if told.status >= 400 else None)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("response", lambda told: self.media.append((told.url.removeprefix(address), told.status)) if "media/" in told.url else None)
        self.page.goto(link)
        for label, text in (("Login", login), ("Your name", login.title()), ("Password", PASSWORD)):
            self.page.get_by_label(label).fill(text)
        self.page.get_by_role("button", name="Join").click()
        self.page.wait_for_url(f"{address}/")

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def tab_to(self, label: str) -> None:
        """Goes on by the Tab key until what is named has the focus, and presses Enter."""
        self.page.get_by_text(label, exact=True).first.wait_for()
        for _ in range(60):
            self.press("Tab")
            if label in str(self.page.evaluate("document.activeElement.textContent.replace(/\\s+/g, ' ')")):
                return self.press("Enter")
        raise AssertionError(f"no way to {label!r} by keyboard")

    def invites(self, *roles: str) -> str:
        self.page.get_by_role("link", name="People").click()
        for role in roles:
            self.page.locator(".invite").get_by_role("checkbox", name=role).check()
        self.page.get_by_role("button", name="Make a link").click()
        shown = self.page.locator(".invite output", has_text="/join/")
        shown.wait_for()
        return shown.inner_text()


def ranks_by_keyboard(store: Store, person: Person, taste: str, but: str = "") -> str:
    """Ranks the task on the screen while its clips play: by a taste of "1243" the take of seed 2 has rank 4, wherever it stands. Returns the id of the assignment."""
    mine = wait_for_task(person.page, but=but)
    begun = person.page.evaluate(PLAYING)
    person.page.wait_for_function(f"(begun) => ({PLAYING})().every(([time, frames], place) => time > 0 && frames > begun[place][1] + 2)", arg=begun)
    give(store, person, mine, taste)
    return mine


def give(store: Store, person: Person, mine: str, taste: str) -> None:
    with store.reading() as db:
        row = db.execute(select(assignment.c.shown_order, task.c.clips).join(task).where(assignment.c.id == mine)).one()
        seeds = {each.id: each.row["seed"] for each in db.execute(select(clip.c.id, clip.c.row))}
    for place in range(TAKES):
        person.press(taste[seeds[row.clips[row.shown_order.index(place)]]], "ArrowRight")


def submits(person: Person, mine: str) -> None:
    """Presses Enter until all was watched and the answer is taken."""
    for _ in range(40):
        person.press("Enter")
        try:  # waiting survives the change of page that the last answer brings
            person.page.wait_for_function("(id) => !location.pathname.endsWith('/' + id)", arg=mine, timeout=400)
            return
        except PlaywrightTimeout:
            continue
    raise AssertionError(f"the answer was never taken: {person.page.inner_text('#wrong')}")


def test_from_the_first_link_to_a_reward_model_that_learned_from_what_people_said(store: Store, browser: Browser, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    a_run(runs / "evening")
    try:
        with serving(store, AppSettings(import_roots=(runs,))) as address:
            rankings = the_way(store, browser, address, tmp_path)
    finally:
        worker._shared.close()
    torch.manual_seed(0)
    save_matcher(tmp_path / "matcher.safetensors", Matcher(MatcherSize(slots=2, pixels=8, deep=8, time=8, answer=8, text=16)))
    reward_model.main(
        reward_model.Config(out=tmp_path / "model", comparisons=rankings, clips=runs / "evening", matcher=tmp_path / "matcher.safetensors", checks=0),
    )
    card = json.loads((tmp_path / "model" / "reward_card.json").read_text())
    assert (tmp_path / "model" / "reward_model.safetensors").stat().st_size > 0 and card["fps"] == [FPS]
    assert main(["app", "verify-log", "--out", str(store.folder)]) == 0


def the_way(store: Store, browser: Browser, address: str, tmp_path: Path) -> Path:
    """Everything that happens in the browsers; returns the folder of rankings that came out."""
    token = people.first_invitation(store)
    lead = Person(browser, address, f"/join/{token}", "lea")
    page = lead.page
    page.get_by_role("link", name="Make the first project").click()
    page.get_by_label("Name").fill("horses")
    page.get_by_role("button", name="Make it").click()
    page.wait_for_url("**/settings")
    for label, value in (("Takes", TAKES), ("Active", 1), ("Random", 0), ("Gold", 0), ("Repeat", 0), ("Mirrored", 0), ("Undo seconds", 0), ("Second share", 0)):
        page.get_by_label(label, exact=True).fill(str(value))
    page.get_by_role("button", name="Save the settings").click()
    page.wait_for_load_state("networkidle")
    page.get_by_role("link", name="Import").click()
    page.get_by_label("Folder").select_option("0/evening")
    page.get_by_label("Call the run").fill("evening")
    page.get_by_role("button", name="Import").click()
    page.get_by_text("evening: done").wait_for()
    page.get_by_role("link", name="Progress").click()
    page.get_by_role("button", name="Make them").click()
    page.locator("tr", has_text="rank").get_by_text(f"of {2 * TASKS}").wait_for()
    links = {login: lead.invites(role) for login, role in (("ann", "labeler"), ("bob", "labeler"), ("rita", "reviewer"), ("sam", "senior"))}
    ann, bob, rita, sam = (Person(browser, address, links[login], login) for login in ("ann", "bob", "rita", "sam"))
    page.goto(links["ann"])
    assert page.get_by_text("does not work any more").is_visible(), "a link works once"
    page.go_back()

    for person in (ann, bob):
        for label in ("Rank clips", "I have read this and take part", "Begin"):
            person.tab_to(label)
    mine = ""
    for number in range(TASKS):
        mine = ranks_by_keyboard(store, ann, "4321" if number == 1 else ANNS, but=mine)
        submits(ann, mine)
        if number == 1:  # on second thoughts
            wait_for_task(ann.page, but=mine)
            ann.press("z")
            ann.page.wait_for_function("(id) => document.getElementById('screen').dataset.assignment == id", arg=mine)
            wait_for_task(ann.page)
            give(store, ann, mine, ANNS)
            submits(ann, mine)
    ann.page.wait_for_url("**/label")
    with store.reading() as db:
        assert len(db.execute(select(answer.c.id)).all()) == TASKS + 1 and len(db.execute(select(withdrawal.c.ref)).all()) == 1
    assert {status for _, status in ann.media} == {206}

    flagged = flags_one(store, bob)
    ann.page.goto(f"/projects/{project_of(store)}/label")
    decides_by_keyboard(store, rita, flagged, "Flagged")
    decides_by_keyboard(store, sam, flagged, "Flagged")
    with store.reading() as db:
        assert list(db.execute(select(review.c.said).where(review.c.clip == flagged)).scalars()) == ["violating"] * 2
        assert db.execute(select(clip.c.state).where(clip.c.id == flagged)).scalar_one() == "withdrawn"

    page.get_by_role("link", name="Agreement").click()
    page.locator("tr", has_text="raw agreement").locator(".range").wait_for()
    n = (TASKS - 1) * TAKES * (TAKES - 1) // 2
    assert shown(page, "raw agreement") == (0.83, n)
    alpha, told = shown(page, "Krippendorff's alpha")
    assert 0.6 < alpha < 0.75 and told == n, "of 5 in 6 pairs, beyond the half that chance gives"
    page.get_by_role("link", name="Log").click()
    page.get_by_label("Kind").select_option("revealed")
    page.get_by_role("button", name="Show").click()
    assert page.locator("table.log tbody tr").count() == 4 and page.locator("table.log").get_by_text('"level":"sharp"').count() == 2
    page.go_back(), page.go_back()
    page.get_by_role("link", name="Exports").click()
    with page.expect_download() as download:
        page.get_by_role("link", name="Download Parquet").click()
    with zipfile.ZipFile(download.value.path()) as file:
        file.extractall(tmp_path / "out")
    data = load_comparisons(tmp_path / "out" / "rankings")
    assert len(data.events) == 2 * (TASKS - 1) and {tuple(sorted(each.ranks)) for each in data.events} == {(1, 2, 3, 4)}, "without the task whose clip was withdrawn"
    for person in (lead, ann, bob, rita, sam):
        assert not person.wrong
        # The used link; and a draft that was on its way when its answer overtook it.
        assert not [url for url in person.refused if "/join/" not in url and not url.endswith("/draft")], person.refused
        person.page.context.close()
    return tmp_path / "out" / "rankings"


def shown(page: Any, name: str) -> tuple[float, int]:
    """What stands in the row of a number, with its interval: the number and the n."""
    text = " ".join(page.locator("tr", has_text=name).locator("td").inner_text().split())
    found = re.fullmatch(r"(-?\d\.\d\d) \[(-?\d\.\d\d), (-?\d\.\d\d)\], n = (\d+)", text)
    assert found is not None, text
    value, low, high = map(float, found.groups()[:3])
    assert low <= value <= high
    return value, int(found[4])


def project_of(store: Store) -> str:
    with store.reading() as db:
        return str(db.execute(select(clip.c.project_id).limit(1)).scalar_one())


def flags_one(store: Store, bob: Person) -> str:
    """Ranks every task, and calls one clip of the second unsafe: from that moment labelers get nothing of it. Returns the clip."""
    mine, flagged = "", ""
    for number in range(TASKS):
        if number != 1:
            mine = ranks_by_keyboard(store, bob, BOBS, but=mine)
            submits(bob, mine)
            continue
        mine = ranks_by_keyboard(store, bob, BOBS, but=mine)
        assert bob.page.request.get(f"/media/{mine}/3").status == 200
        bob.press("u")
        bob.page.wait_for_selector("dialog[open]")
        bob.press("Tab", "Tab", "Tab", "Tab", "Space", "Enter")
        bob.page.wait_for_function("() => document.querySelectorAll('.take .gone:not([hidden])').length == 1")
        with store.reading() as db:
            told = json.loads(db.execute(select(event.c.body).where(event.c.kind == "queued").order_by(event.c.seq.desc()).limit(1)).scalar_one())
            place = db.execute(select(assignment.c.shown_order).where(assignment.c.id == mine)).scalar_one()
        flagged = told["clip"]
        shown = bob.page.evaluate("[...document.querySelectorAll('.take .gone')].findIndex((gone) => !gone.hidden)")
        assert told["queue"] == "flagged" and shown in place
        assert bob.page.request.get(f"/media/{mine}/{shown}").status == 404, "gone at once"
        submits(bob, mine)
    bob.page.wait_for_url("**/label")
    return flagged


def decides_by_keyboard(store: Store, reader: Person, flagged: str, queue: str) -> None:
    """Takes the clip out of a queue, sees it blurred, reveals and plays it, and decides, without a mouse."""
    page = reader.page
    page.goto("/")
    reader.tab_to("Review")
    page.wait_for_url("**/review/*")
    assert page.locator(".queue", has_text=queue).locator("strong").inner_text() == "1"
    reader.tab_to(f"Take one of {queue}")
    page.wait_for_selector("#still[src]")
    page.wait_for_function("() => document.getElementById('still').naturalWidth > 0")
    before = {path.rpartition("/")[2] for path, _ in reader.media}
    reading = page.url.rpartition("/")[2]
    assert before == {"blur.jpg"} and page.request.get(f"/review-media/{reading}/clip.mp4").status == 403, "no sharp byte before it is asked for"
    with store.reading() as db:
        assert not db.execute(select(reveal.c.id).where(reveal.c.reading_id == reading)).all()
    reader.press("2")
    page.wait_for_function("() => document.getElementById('still').src.endsWith('edges.jpg') && document.getElementById('still').naturalWidth > 0")
    reader.press("5")
    page.wait_for_function("() => document.getElementById('clip').readyState >= 2")
    reader.press("Space")
    page.wait_for_function("() => document.getElementById('clip').currentTime > 0.2 && document.getElementById('clip').getVideoPlaybackQuality().totalVideoFrames > 2")
    assert ("clip.mp4", 206) in {(path.rpartition("/")[2], status) for path, status in reader.media}
    with store.reading() as db:
        assert sorted(db.execute(select(reveal.c.level).where(reveal.c.reading_id == reading)).scalars()) == ["edges", "sharp"]
    reader.press("v", "p", "Space", "r")
    page.keyboard.type("a stripe that should not be there")
    reader.press("Control+Enter")
    page.wait_for_selector("#countdown")

"""Clips really play, in step: decoded frames in Chromium, on one clock."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select, update

from base_model.video.files import mp4_bytes
from reward.app import choosing, labeling
from reward.app.media import path_of
from reward.app.schema import clip
from reward.app.store import Store
from tests.reward.app.browser import opened
from tests.reward.app.conftest import add_clips, add_project, serving
from tests.reward.app.test_labeling import NO_CHECKS, as_labeler

pytestmark = pytest.mark.timed

FPS, SECONDS = 12.0, 4
FRAME = 1 / FPS
STATE = """() => [...document.querySelectorAll('.take video')].map((video) => ({
  ready: video.readyState, width: video.videoWidth, time: video.currentTime, frames: video.getVideoPlaybackQuality().totalVideoFrames, paused: video.paused,
  muted: video.muted }))"""
SPREAD = """(ms) => new Promise((done) => {
  const videos = [...document.querySelectorAll('.take video')], began = performance.now(), spreads = [];
  let before = 0;
  const look = () => {
    const times = videos.map((video) => video.currentTime);
    // Not while the loop begins anew, when one clip has been set to its start and another not yet.
    if (Math.min(...times) > 0.2 && videos.every((video) => !video.seeking)) spreads.push(Math.max(...times) - Math.min(...times));
    if (performance.now() - began < ms) requestAnimationFrame(look); else done(spreads);
  };
  look();
})"""


def moving(seconds: float, colour: int) -> bytes:
    """A clip whose picture says its time: a bar that goes from the left to the right."""
    number = round(seconds * FPS)
    frames = np.full((number, 72, 128, 3), 30, np.uint8)
    for t in range(number):
        frames[t, 20:52, t * 120 // number : t * 120 // number + 8, colour % 3] = 230
    return mp4_bytes(frames, FPS)


@pytest.fixture
def screen(store: Store, browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens the ranking screen of a task whose clips have these lengths in seconds; None stands for a file that is no video."""
    closing: list[Any] = []

    def show(lengths: tuple[float | None, ...], **options: Any) -> Any:
        project_id = add_project(store, labeling={**NO_CHECKS, "takes": len(lengths), "overlap": 9})
        made = add_clips(store, project_id, ["a bar moves"], takes=len(lengths), files=False)
        with store.reading() as db:
            digests = dict(db.execute(select(clip.c.id, clip.c.clip_id)).all())
        for at, (each, seconds) in enumerate(zip(made, lengths, strict=True)):
            file = path_of(store, digests[each])
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"no video" if seconds is None else moving(seconds, at))
        ann = as_labeler(store, "ann", project_id)
        with store.writing() as db:
            labeling.make_tasks(store, db, project_id, ann)
        assignment_id = choosing.next_assignment(store, ann, project_id).assignment_id
        address = serving(store)
        page = opened(browser, address.__enter__(), "ann", **options)
        closing.extend([page.context.close, lambda: address.__exit__(None, None, None)])
        page.made, page.answers = made, []
        page.on("response", lambda answer: page.answers.append((answer.url, answer.status, answer.headers)) if "/media/" in answer.url else None)
        page.goto(f"/assignments/{assignment_id}")
        page.wait_for_function(
            f"() => [...document.querySelectorAll('.take video')].filter((video) => video.readyState >= 2).length == {sum(each is not None for each in lengths)}"
        )
        return page

    yield show
    for close in closing:
        close()


def times(page: Any) -> list[float]:
    return [each["time"] for each in page.evaluate(STATE)]


def test_all_clips_play_in_step_seek_in_step_and_come_in_ranges(screen: Callable[..., Any]) -> None:
    page = screen((SECONDS,) * 4)
    page.wait_for_function("() => document.getElementById('play').textContent == 'Pause'")
    first = page.evaluate(STATE)
    spreads = page.evaluate(SPREAD, 2500)
    second = page.evaluate(STATE)
    assert all(each["ready"] >= 2 and each["width"] > 0 and each["muted"] for each in second)
    assert all(after["frames"] > before["frames"] + 5 for before, after in zip(first, second, strict=True)), "decoded frames advance"
    assert len(spreads) > 10 and max(spreads) <= FRAME, "one clock"
    page.keyboard.press(" ")
    page.wait_for_function("() => [...document.querySelectorAll('.take video')].every((video) => video.paused)")
    page.evaluate("document.getElementById('seek').value = 600; document.getElementById('seek').dispatchEvent(new Event('input'))")
    page.wait_for_function("() => [...document.querySelectorAll('.take video')].every((video) => !video.seeking && Math.abs(video.currentTime - 2.4) < 0.1)")
    assert max(times(page)) - min(times(page)) < 1e-3
    page.keyboard.press(" ")
    page.wait_for_function("() => document.querySelector('.take video').currentTime > 2.6")
    assert max(page.evaluate(SPREAD, 600)) <= FRAME
    assert {status for _, status, _ in page.answers} == {206}
    assert all(headers["content-type"] == "video/mp4" and headers["cache-control"] == "private, no-store" for _, _, headers in page.answers)
    assert page.problems == []


def test_a_step_moves_every_clip_by_one_frame_and_speed_holds_for_all(screen: Callable[..., Any]) -> None:
    page = screen((SECONDS,) * 3, reduced_motion="reduce")
    assert all(each["paused"] and each["time"] == 0 for each in page.evaluate(STATE)), "nothing moves where less motion is asked for"
    for key, frames in ((".", 1), (".", 2), (",", 1)):
        page.keyboard.press(key)
        page.wait_for_function(f"() => [...document.querySelectorAll('.take video')].every((video) => !video.seeking && Math.floor(video.currentTime * {FPS}) == {frames})")
    page.select_option("#speed", "0.25")
    page.keyboard.press("ArrowRight")
    page.click("#play")
    page.wait_for_function("() => [...document.querySelectorAll('.take video')].every((video) => !video.paused)")
    before = times(page)
    page.wait_for_timeout(1000)
    gone = [after - at for at, after in zip(before, times(page), strict=True)]
    assert all(0.1 < each < 0.5 for each in gone)


def test_a_shorter_clip_waits_at_its_end_and_all_begin_anew_together(screen: Callable[..., Any]) -> None:
    page = screen((0.75, 1.5))
    page.wait_for_function("() => [...document.querySelectorAll('.take video')].some((video) => video.currentTime > 1.2)")
    short, long = sorted(page.evaluate("[...document.querySelectorAll('.take video')].map((video) => [video.duration, video.currentTime])"))
    assert short[0] < 1 and short[1] > 0.6 and long[1] > 1.1
    page.wait_for_function("() => [...document.querySelectorAll('.take video')].every((video) => video.currentTime < 0.5 && video.currentTime > 0)")
    page.click("#loop")
    page.wait_for_function("() => document.getElementById('play').textContent == 'Play'")
    assert max(times(page)) > 1.4 and page.problems == []


def test_in_one_place_only_the_clip_that_is_seen_counts_as_watched(screen: Callable[..., Any]) -> None:
    page = screen((1.0, 1.0), reduced_motion="reduce")
    page.keyboard.press("f")
    boxes = page.evaluate("[...document.querySelectorAll('.take')].map((take) => { const at = take.getBoundingClientRect(); return [at.x, at.y, at.width, at.height] })")
    assert boxes[0] == boxes[1], "the same place"
    page.keyboard.press(" ")
    page.wait_for_timeout(2500)
    for key in ("1", "Tab", "2", "Enter"):
        page.keyboard.press(key)
    told = re.fullmatch(r"Watch every clip first: of clip B you have seen (\d+) %\.", page.inner_text("#wrong"))
    assert told and int(told[1]) <= 40
    assert page.locator(".take.current").get_attribute("aria-label").startswith("Clip B")
    page.wait_for_timeout(1500)
    page.keyboard.press("Enter")
    page.wait_for_url("**/label")


def test_a_clip_that_does_not_load_says_so_and_can_only_be_called_broken(screen: Callable[..., Any], store: Store) -> None:
    page = screen((1.0, None, 1.0))
    gone = page.locator(".take", has_text="does not load")
    gone.wait_for()
    assert gone.locator(".ranks button:enabled").count() == 0 and gone.get_by_role("button", name="is broken").is_enabled()
    page.wait_for_timeout(2200)
    for place in range(3):
        page.keyboard.press(str(place + 1))
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_url("**/label")
    (told,) = labeling.events_of(store, next(iter(projects(store))))
    assert told.flags == ("broken",) and sum(rank is None for rank in told.ranks) == 1


def projects(store: Store) -> list[str]:
    with store.reading() as db:
        return list(db.execute(select(clip.c.project_id).distinct()).scalars())


def test_a_clip_that_may_not_be_shown_any_more_is_not_sent(screen: Callable[..., Any], store: Store) -> None:
    page = screen((1.0, 1.0, 1.0))
    media = page.evaluate("document.querySelector('.take video').src")
    assert page.request.get(media).status == 200
    with store.writing() as db:
        db.execute(update(clip).values(state="withdrawn"))
    assert page.request.get(media).status == 404

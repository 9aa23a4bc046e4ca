"""The labelers' room through its routes and in a browser: what is hidden, who gets what, and ranking by keyboard, mouse and touch."""

from __future__ import annotations

import json
from typing import Any

import pytest
from sqlalchemy import func, insert, select, update

from reward.app import labeling, planting
from reward.app.schema import answer, assignment, clip, item, person, project, task
from reward.app.store import Store, new_id
from tests.reward.app.browser import PHONE, opened
from tests.reward.app.conftest import Client, add_clips, add_member, add_project, serving
from tests.reward.app.test_labeling import NO_CHECKS, an_answer

HTML = {"accept": "text/html"}
SHORT = {**NO_CHECKS, "takes": 3, "least_watched": 0}


def a_room(store: Store, *, prompts: int = 3, files: bool = False, name: str = "horses", **settings: Any) -> str:
    project_id = add_project(store, name, labeling={**SHORT, **settings})
    add_clips(store, project_id, [f"prompt {n} of {name}" for n in range(prompts)], takes=int(settings.get("takes", 3)), files=files)
    with store.writing() as db:
        labeling.make_tasks(store, db, project_id, as_actor())
    return project_id


def as_actor() -> Any:
    from reward.app.security import Actor

    return Actor("p", "person-test", "", {}, {}, "", "")


def a_labeler(store: Store, login: str, project_id: str) -> Client:
    add_member(store, login, "labeler", project_id=project_id)
    client = Client(store, login)
    client.post(f"/api/projects/{project_id}/label/consent").raise_for_status()
    return client


def test_consent_comes_first_and_the_room_says_what_is_next(store: Store) -> None:
    project_id = a_room(store)
    add_member(store, "ann", "labeler", project_id=project_id)
    ann = Client(store, "ann")
    room = f"/projects/{project_id}/label"
    assert ann.get(f"/api{room}").json()["state"] == "consent"
    assert "Before you begin" in ann.get(room, headers=HTML).text
    assert ann.post(f"/api{room}/next", json={}).status_code == 403
    ann.post(f"/api{room}/consent").raise_for_status()
    told = ann.get(f"/api{room}").json()
    assert (told["state"], told["done"], told["today"], told["left_for_me"]) == ("ready", 0, 0, 200)
    mine = ann.post(f"/api{room}/next", json={}).json()
    ann.post(f"/api{mine['go']}/answer", json=an_answer(3).model_dump(mode="json")).raise_for_status()
    told = ann.get(f"/api{room}").json()
    assert (told["done"], told["today"], told["left_for_me"]) == (1, 1, 199)
    mine = ann.post(f"/api{room}/next", json={}).json()
    ann.post(f"/api{mine['go']}/skip", json={"id": new_id("w"), "reason": "undecidable"}).raise_for_status()
    told = ann.get(f"/api{room}").json()
    assert (told["done"], told["today"]) == (1, 1), "a skip is no answer"
    with store.writing() as db:
        db.execute(update(person).values(state="paused"))
    assert "You are paused" in ann.get(room, headers=HTML).text and ann.post(f"/api{room}/next", json={}).status_code == 403


def test_nothing_says_who_or_what_made_a_clip_or_what_kind_of_check_a_task_is(store: Store) -> None:
    project_id = a_room(store)
    with store.writing() as db:
        db.execute(update(task).values(kind="gold", truth={"overall": [1, 2, None]}))
        db.execute(update(project).values(settings={"labeling": {**SHORT, "mixture": {"active": 0, "random": 0, "gold": 1, "repeat": 0, "mirrored": 0}}}))
        secret = db.execute(select(clip.c.clip_id, clip.c.id)).all()
    ann = a_labeler(store, "ann", project_id)
    go = ann.post(f"/api/projects/{project_id}/label/next", json={}).json()["go"]
    shown = ann.get(f"/api{go}").text + ann.get(go, headers=HTML).text
    for word in ("gold", "generator", "seed", "rushes 1", '"purpose"', "truth", "score", "verdict", "shown_order", *(text for row in secret for text in row)):
        assert word not in shown, word
    assert [each["media"] for each in ann.get(f"/api{go}").json()["clips"]] == [f"/media/{go.split('/')[-1]}/{place}" for place in range(3)]
    assert "ok" not in ann.post(f"/api{go}/answer", json=an_answer(3).model_dump(mode="json")).json()


def test_anothers_task_and_its_media_do_not_exist(store: Store) -> None:
    project_id = a_room(store, files=True)
    ann, bob = (a_labeler(store, name, project_id) for name in ("ann", "bob"))
    go = ann.post(f"/api/projects/{project_id}/label/next", json={}).json()["go"]
    media = f"/media/{go.split('/')[-1]}"
    assert ann.get(f"{media}/0").status_code == 200
    for place in ("3", "-1", "99999999999999999999"):
        assert ann.get(f"{media}/{place}").status_code == 404
    for path in (f"/api{go}", go, f"{media}/0"):
        assert bob.get(path).status_code == 404
    body = an_answer(3).model_dump(mode="json")
    for path, sent in (
        ("answer", body),
        ("draft", {"draft": {}}),
        ("flag", {"place": 0, "policies": ["P05"]}),
        ("skip", {"id": body["id"], "reason": "language"}),
        ("prompt", {"ranks": {}}),
    ):
        assert bob.post(f"/api{go}/{path}", json=sent).status_code == 404, path
    given = ann.post(f"/api{go}/answer", json=body).json()
    assert bob.post(f"/api/answers/{given['answer_id']}/undo").status_code == 404
    add_member(store, "rev", "reviewer", project_id=project_id)
    assert Client(store, "rev").get(f"{media}/0").status_code == 404


@pytest.mark.parametrize(
    "change", [{"verdict": "block"}, {"verdict": "error"}, {"verdict": "review"}, {"state": "restricted"}, {"state": "withdrawn"}, {"state": "deleted"}, {"flag": "P05"}]
)
def test_what_may_not_be_shown_is_in_no_answer_of_the_room(store: Store, change: dict[str, str]) -> None:
    project_id = a_room(store, files=True)
    ann = a_labeler(store, "ann", project_id)
    go = ann.post(f"/api/projects/{project_id}/label/next", json={}).json()["go"]
    assert [each["available"] for each in ann.get(f"/api{go}").json()["clips"]] == [True] * 3
    with store.writing() as db:
        row = db.execute(select(assignment.c.shown_order, task.c.clips).join(task)).one()
        hidden = row.clips[row.shown_order.index(1)]
        if "flag" in change:
            blank = {
                "project_id": project_id,
                "clip": hidden,
                "queue": "flagged",
                "why": {},
                "severity": 3,
                "place": 0.0,
                "wanted": 1,
                "taken": 0,
                "state": "full",
                "created_at": 0,
            }
            db.execute(insert(item), {"id": new_id("q"), **blank})
        else:
            db.execute(update(clip).where(clip.c.id == hidden).values(**change))
    media = f"/media/{go.split('/')[-1]}"
    assert [ann.get(f"{media}/{place}").status_code for place in range(3)] == [200, 404, 200]
    assert ann.get(f"{media}/1", headers={"range": "bytes=0-10"}).status_code == 404
    assert [each["available"] for each in ann.get(f"/api{go}").json()["clips"]] == [True, False, True]
    bob = a_labeler(store, "bob", project_id)
    seen: list[Any] = []
    while (other := bob.post(f"/api/projects/{project_id}/label/next", json={}).json())["assignment_id"]:
        seen += [bob.get(each["media"]).status_code for each in bob.get(f"/api{other['go']}").json()["clips"]]
        bob.post(f"/api{other['go']}/answer", json=an_answer(3).model_dump(mode="json")).raise_for_status()
    assert seen == [200] * 6


def test_the_prompt_is_told_after_what_comes_before_it(store: Store) -> None:
    project_id = a_room(store, dimensions=[{"name": "text", "question": "Which fits?"}, {"name": "visual", "question": "Which looks best?", "sees_prompt": False}])
    ann = a_labeler(store, "ann", project_id)
    go = ann.post(f"/api/projects/{project_id}/label/next", json={}).json()["go"]
    told = ann.get(f"/api{go}")
    assert told.json()["prompt"] is None and "prompt 0" not in told.text and [each["name"] for each in told.json()["dimensions"]] == ["visual", "text"]
    assert "of horses" not in ann.get(go, headers=HTML).text
    assert ann.post(f"/api{go}/prompt", json={"ranks": {"visual": [1, 1, 2]}}).json()["prompt"].endswith("of horses")
    assert ann.get(f"/api{go}").json()["prompt"].endswith("of horses")


@pytest.mark.parametrize(
    "body", ['{"draft": {"x": NaN}}', '{"draft": {"x": "\\ud800"}}', '{"draft": {"x": "\\u0000"}}', json.dumps({"draft": {"x": "y" * 70_000}}), '{"draft": []}']
)
def test_a_draft_that_cannot_be_kept_is_refused_in_one_line(each_store: Store, body: str) -> None:
    project_id = a_room(each_store)
    ann = a_labeler(each_store, "ann", project_id)
    go = ann.post(f"/api/projects/{project_id}/label/next", json={}).json()["go"]
    assert ann.post(f"/api{go}/draft", content=body, headers={"content-type": "application/json"}).status_code == 422
    told = an_answer(3).model_dump(mode="json")
    assert ann.post(f"/api{go}/answer", json={**told, "comment": "zero \0"}).status_code == 422
    assert ann.post(f"/api{go}/answer", json={**told, "comment": "‮ turned"}).status_code == 200


def test_leads_deal_plant_and_order_tasks_and_labelers_do_not(store: Store) -> None:
    project_id = add_project(store, labeling=SHORT)
    add_clips(store, project_id, takes=3)
    add_member(store, "lea", "lead", project_id=project_id)
    lea, ann = Client(store, "lea"), a_labeler(store, "ann", project_id)
    tasks = f"/api/projects/{project_id}/tasks"
    for path, body in (("", {}), ("/gold", {"number": 1}), ("/practice", {"number": 1}), ("/demonstrations", {}), ("/order", {"tasks": []})):
        assert ann.post(tasks + path, json=body).status_code == 404
        assert lea.post(tasks + path, json=body).status_code == 200, path
    with store.reading() as db:
        assert dict(db.execute(select(task.c.kind, func.count()).group_by(task.c.kind)).all()) == {"rank": 3, "gold": 1, "practice": 1, "demonstration": 3}


# In a browser


def wait_for_task(page: Any, but: str = "") -> str:
    page.wait_for_function(
        "(but) => document.querySelectorAll('.take video').length && document.getElementById('screen').dataset.assignment != but && !document.getElementById('submit').disabled",
        arg=but,
    )
    page.wait_for_function("() => [...document.querySelectorAll('.take video')].filter((video) => !video.hidden).every((video) => video.readyState >= 2)")
    return str(page.evaluate("document.getElementById('screen').dataset.assignment"))


def answers(store: Store) -> list[Any]:
    with store.reading() as db:
        return list(db.execute(select(answer).order_by(answer.c.at)))


def by_place(store: Store, row: Any, name: str = "overall") -> list[int | None]:
    with store.reading() as db:
        order = db.execute(select(assignment.c.shown_order).where(assignment.c.id == row.assignment_id)).scalar_one()
    return [row.body["ranks"][name][order.index(place)] for place in range(len(order))]


def test_tasks_are_ranked_undone_and_flagged_by_keyboard_alone(store: Store, browser: Any) -> None:
    project_id = a_room(store, prompts=5, files=True)
    add_member(store, "ann", "labeler", project_id=project_id)
    with serving(store) as address:
        page = opened(browser, address, "ann")
        press = page.keyboard.press
        for label in ("Rank clips", "I have read this and take part", "Begin"):
            page.wait_for_selector(f"text='{label}'")
            for _ in range(30):
                press("Tab")
                if label in page.evaluate("document.activeElement.innerText"):
                    break
            press("Enter")
        mine = wait_for_task(page)
        for keys in (
            ("2", "ArrowRight", "1", "ArrowRight", "="),
            ("1", "ArrowRight", "=", "ArrowRight", "3"),
            ("x",),
            ("3", "z", "1", "ArrowRight", "2", "ArrowLeft", "ArrowLeft", "b"),
        ):
            for each in keys:
                press(each)
            press("Enter")
            mine = wait_for_task(page, but=mine)
        assert [by_place(store, row) for row in answers(store)] == [[2, 1, 2], [1, 1, 3], [1, 1, 1], [1, 2, None]]
        press("z")
        last = answers(store)[-1].assignment_id
        page.wait_for_function("(id) => document.getElementById('screen').dataset.assignment == id", arg=last)
        wait_for_task(page)
        assert page.locator(".take").nth(2).get_attribute("aria-label") == "Clip C, broken", "what was said is there again"
        press("ArrowLeft")
        press("b")
        press("u")
        page.wait_for_selector("dialog[open]")
        for each in ("Tab", "Tab", "Tab", "Tab", "Space"):
            press(each)
        press("Enter")
        page.wait_for_function("() => document.querySelectorAll('.take .gone:not([hidden])').length == 1")
        with store.reading() as db:
            assert db.execute(select(item.c.queue, item.c.source)).all() == [("flagged", last)]
        press("?")
        page.wait_for_selector("#show-help[open]")
        press("Escape")
        press("Enter")
        mine = wait_for_task(page, but=last)
        press("s")
        page.wait_for_selector("#ask-skip[open]")
        press("Space")
        press("Enter")
        page.wait_for_url("**/label")
        rows = answers(store)
        assert rows[-1].body["what"] == "skip" and rows[-2].assignment_id == last and rows[-2].version == 2 and len(rows[-2].body["unsafe"]) == 1
        assert page.problems == []
        page.context.close()


def test_a_draft_comes_back_and_a_second_tab_or_a_double_click_adds_nothing(store: Store, browser: Any) -> None:
    project_id = a_room(store, prompts=2, files=True)
    ann = a_labeler(store, "ann", project_id)
    go = ann.post(f"/api/projects/{project_id}/label/next", json={}).json()["go"]
    with serving(store) as address:
        page = opened(browser, address, "ann")
        page.goto(go)
        wait_for_task(page)
        page.keyboard.press("2")
        page.wait_for_timeout(1200)
        page.reload()
        mine = wait_for_task(page)
        assert page.locator(".take").first.get_attribute("aria-label") == "Clip A, ranked 2nd"
        other = page.context.new_page()
        other.goto(f"{address}{go}")
        wait_for_task(other)
        for tab in (page, other):
            for keys in ("2", "2", "ArrowRight", "1", "ArrowRight", "3"):
                tab.keyboard.press(keys)
        page.evaluate("document.getElementById('submit').click(); document.getElementById('submit').click()")
        wait_for_task(page, but=mine)
        other.evaluate("document.getElementById('submit').click()")
        other.wait_for_function("() => document.getElementById('wrong').textContent != ''")
        assert len(answers(store)) == 1
        page.context.close()


def test_chips_are_dragged_into_their_places_with_the_mouse(store: Store, browser: Any) -> None:
    project_id = a_room(store, files=True)
    ann = a_labeler(store, "ann", project_id)
    with serving(store) as address:
        page = opened(browser, address, "ann")
        page.goto(ann.post(f"/api/projects/{project_id}/label/next", json={}).json()["go"])
        mine = wait_for_task(page)
        for letter, slot in (("A", 1), ("B", 0), ("C", 1)):
            start, end = page.locator(".chip", has_text=letter).bounding_box(), page.locator(".slot").nth(slot).bounding_box()
            page.mouse.move(start["x"] + 5, start["y"] + 5)
            page.mouse.down()
            page.mouse.move(end["x"] + 30, end["y"] + 30, steps=4)
            page.mouse.up()
        page.click("#submit")
        wait_for_task(page, but=mine)
        assert by_place(store, answers(store)[0]) == [2, 1, 2]
        page.context.close()


def test_a_phone_in_portrait_ranks_by_touch_and_nothing_is_wider_than_it(store: Store, browser: Any) -> None:
    project_id = a_room(store, files=True, takes=6, prompts=2, likert=True, confidence=True)
    ann = a_labeler(store, "ann", project_id)
    with serving(store) as address:
        page = opened(browser, address, "ann", viewport=PHONE, has_touch=True, is_mobile=True)
        page.goto(ann.post(f"/api/projects/{project_id}/label/next", json={}).json()["go"])
        mine = wait_for_task(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        for place in range(6):
            page.locator(".take").nth(place).locator(".ranks button").nth(5 - place).tap()
            page.locator(".take").nth(place).locator(".stars button").nth(place % 5).tap()
        page.get_by_text("Certain").tap()
        page.locator("#submit").tap()
        wait_for_task(page, but=mine)
        row = answers(store)[0]
        assert by_place(store, row) == [6, 5, 4, 3, 2, 1] and row.body["confidence"] == 1.0
        assert page.problems == []
        page.context.close()


def test_practice_is_explained_and_examples_are_chosen(store: Store, browser: Any) -> None:
    project_id = add_project(store, labeling={**SHORT, "practice": 1})
    add_clips(store, project_id, ["a blue bar"], takes=3)
    planting.make_practice(store, project_id, 1, as_actor())
    with store.writing() as db:
        labeling.make_demonstrations(store, db, project_id, as_actor())
    a_labeler(store, "ann", project_id)
    with serving(store) as address:
        page = opened(browser, address, "ann")
        page.goto(f"/projects/{project_id}/label")
        assert page.inner_text("[data-next=rank]") == "Begin with practice"
        page.click("[data-next=rank]")
        wait_for_task(page)
        page.keyboard.press("x")
        page.keyboard.press("Enter")
        page.wait_for_selector("#show-feedback[open]")
        told = page.inner_text("#show-feedback")
        assert "Not as expected" in told and "as it was made" in told and told.count("on purpose") >= 3
        page.keyboard.press("Enter")
        page.wait_for_url("**/label")
        page.click("[data-next=demonstration]")
        wait_for_task(page)
        for each in ("y", "ArrowRight", "n", "ArrowRight", "1"):
            page.keyboard.press(each)
        page.fill("#caption", "a green bar")
        page.click("#submit")
        page.wait_for_url("**/label")
        assert page.problems == []
        page.context.close()
    body = answers(store)[-1].body
    assert sorted(map(str, body["accepted"])) == ["False", "True", "True"] and body["best"] is not None
    assert [text for text, _ in labeling.demonstrations_of(store, project_id)] == ["a green bar"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_violation_on_any_page_of_the_room(store: Store, browser: Any, scheme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    project_id = a_room(store, files=True, likert=True, confidence=True)
    with store.writing() as db:
        labeling.make_demonstrations(store, db, project_id, as_actor())
    add_member(store, "ann", "labeler", project_id=project_id)
    room = f"/projects/{project_id}/label"
    found: list[str] = []

    def look(page: Any, where: str) -> None:
        for each in Axe().run(page).response["violations"]:
            if each["impact"] in ("serious", "critical"):
                found.append(f"{where}: {each['id']} {each['nodes'][0]['html'][:160]}")

    with serving(store) as address:
        page = opened(browser, address, "ann", color_scheme=scheme, bypass_csp=True)
        page.goto(room)
        look(page, "consent")
        page.click("text=I have read this and take part")
        page.wait_for_selector("[data-next]")
        look(page, "room")
        page.click("[data-next=rank]")
        wait_for_task(page)
        for each in ("1", "ArrowRight", "2", "ArrowRight", "b"):
            page.keyboard.press(each)
        look(page, "rank")
        for key, dialog in (("?", "show-help"), ("u", "ask-unsafe"), ("s", "ask-skip")):
            page.keyboard.press(key)
            page.wait_for_selector(f"#{dialog}[open]")
            look(page, dialog)
            page.keyboard.press("Escape")
        page.keyboard.press("x")
        look(page, "all bad")
        page.keyboard.press("f")
        look(page, "one place")
        page.goto(room)
        page.click("[data-next=demonstration]")
        wait_for_task(page)
        look(page, "demonstration")
        with store.writing() as db:
            db.execute(update(person).values(state="paused"))
        page.goto(room)
        look(page, "paused")
        page.context.close()
    assert found == []


def test_text_from_outside_is_shown_and_never_run(store: Store, browser: Any) -> None:
    evil = "<img src=x onerror=alert(1)>\u202e{{7*7}}"
    project_id = add_project(store, evil, labeling={**SHORT, "dimensions": [{"name": "overall", "question": evil}]}, instructions=evil, consent=evil)
    add_clips(store, project_id, [evil], takes=3)
    with store.writing() as db:
        labeling.make_tasks(store, db, project_id, as_actor())
    add_member(store, "ann", "labeler", project_id=project_id)
    with serving(store) as address:
        page = opened(browser, address, "ann")
        page.on("dialog", lambda dialog: page.problems.append("a script ran"))
        page.goto(f"/projects/{project_id}/label")
        page.click("text=I have read this and take part")
        page.click("[data-next=rank]")
        wait_for_task(page)
        assert page.inner_text("#prompt") == "<img src=x onerror=alert(1)>‹U+202E›{{7*7}}"
        assert page.locator("main img").count() == 0 and page.problems == []
        page.context.close()

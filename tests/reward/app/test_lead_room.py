"""The leads' room through its routes, and in a browser."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest
from sqlalchemy import update

from reward.app import leading, quality
from reward.app.schema import clip
from reward.app.store import Store
from tests.reward.app.conftest import PASSWORD, Client, add_clips, add_member, add_project, serving
from tests.reward.app.seeding import seed_store

HTML = {"accept": "text/html"}
TABS = ("", "/people", "/agreement", "/filters", "/thresholds", "/signoffs", "/import", "/exports", "/settings")


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody ranked or reviewed anything, unless a test says so."""
    monkeypatch.setattr(quality, "events_of", lambda store, project_id: iter(()))
    monkeypatch.setattr(quality, "audit_of", lambda store, project_id: None)


def get(client: Client, path: str) -> dict[str, Any]:
    """What a page tells once everything in it is worked out."""
    for _ in range(200):
        answer = client.get(f"/api{path}")
        assert answer.status_code == 200, answer.text
        told: dict[str, Any] = answer.json()
        if told.get("standing", {}).get("state", "fresh") == "fresh":
            return told
        assert told["standing"]["state"] != "failed", told["standing"]
        time.sleep(0.05)
    raise AssertionError(f"{path} is never worked out")


def test_a_lead_makes_a_project_sets_it_up_and_closes_it(each_store: Store) -> None:
    add_member(each_store, "ada", "lead")
    client = Client(each_store, "ada")
    go = client.post("/api/projects", json={"name": "foxes"}).json()["go"]
    path = go.removesuffix("/settings")
    assert client.post("/api/projects", json={"name": "foxes"}).status_code == 422
    told = client.get(f"/api{path}/settings").json()
    sent = {field["name"]: field["value"] for field in told["fields"]} | {
        "labeling.takes": "3",
        "labeling.dimensions.1.name": "motion",
        "labeling.dimensions.1.question": "Smoother?",
    }
    assert client.post(f"/api{path}/settings", json={**sent, "seen": told["seen"]}).status_code == 200
    assert client.post(f"/api{path}/settings", json={**sent, "seen": told["seen"]}).status_code == 409
    told = client.get(f"/api{path}/settings").json()
    assert told["settings"]["labeling"]["takes"] == 3 and [each["name"] for each in told["settings"]["labeling"]["dimensions"]] == ["overall", "motion"]
    assert told["settings"]["labeling"]["mixture"]["active"] == 0.6 and told["settings"]["retention_days"] is None
    assert client.post(f"/api{path}/state", json={"state": "closed"}).status_code == 200
    assert client.get("/api/").json()["projects"] == [] and [each["state"] for each in client.get("/api/projects").json()["projects"]] == ["closed"]


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("labeling.takes", "9", "labeling.takes"),
        ("labeling.takes", "many", "labeling.takes"),
        ("labeling.nothing", "1", "labeling.nothing"),
        ("labeling.mixture.gold", "0.5", "add up to 1"),
        ("labeling.dimensions.0.name", "Two Words", "labeling.dimensions.0.name"),
        ("retention_days", "0", "retention_days"),
        ("\ud800", "1", "half characters"),
    ],
)
def test_a_wrong_setting_is_named_and_changes_nothing(store: Store, field: str, value: str, word: str) -> None:
    project_id = add_project(store)
    add_member(store, "ada", "lead")
    client = Client(store, "ada")
    told = client.get(f"/api/projects/{project_id}/lead/settings").json()
    sent = {each["name"]: each["value"] for each in told["fields"]} | {field: value, "seen": told["seen"]}
    answer = client.post(f"/api/projects/{project_id}/lead/settings", content=json.dumps(sent), headers={"content-type": "application/json"})
    assert answer.status_code == 422 and word in answer.json()["detail"]
    assert client.get(f"/api/projects/{project_id}/lead/settings").json()["seen"] == told["seen"]


def test_an_invitation_is_shown_once_listed_and_revoked(each_store: Store) -> None:
    project_id = add_project(each_store)
    add_member(each_store, "ada", "lead", project_id=project_id)
    client, api = Client(each_store, "ada"), f"/api/projects/{project_id}/lead"
    first = client.post(f"{api}/invitations", json={"roles": "labeler"}).json()["link"]
    client.post(f"{api}/invitations", json={"roles": ["reviewer", "senior"]})
    assert first.startswith("http://127.0.0.1/join/")
    assert client.post(f"{api}/invitations", json={"roles": ["king"]}).status_code == 422 and client.post(f"{api}/invitations", json={}).status_code == 422
    listed = client.get(f"{api}/people").json()["invitations"]
    assert sorted(each["roles"] for each in listed) == [["labeler"], ["reviewer", "senior"]] and "token" not in str(listed)
    other = next(each["id"] for each in listed if len(each["roles"]) == 2)
    assert [client.post(f"{api}/invitations/{other}/revoke").status_code for _ in range(2)] == [200, 404]
    assert Client(each_store).post(first.removeprefix("http://127.0.0.1/").join(("/api/", "")), json={"login": "bob", "name": "Bob", "password": PASSWORD}).status_code == 200
    told = client.get(f"{api}/people").json()
    assert sorted(each["state"] for each in told["invitations"]) == ["revoked", "used"]
    assert {each["name"]: each["roles"] for each in told["members"]} == {"Ada": ["lead"], "Bob": ["labeler"]}


def test_a_lead_of_one_project_sees_nothing_of_another_and_an_auditor_changes_nothing(store: Store) -> None:
    mine, other = add_project(store, "mine"), add_project(store, "other")
    add_member(store, "ada", "lead", project_id=mine)
    bob = add_member(store, "bob", "labeler", project_id=other)
    add_member(store, "eve", "auditor", project_id=mine)
    lead, auditor = Client(store, "ada"), Client(store, "eve")
    for tab in TABS:
        assert lead.get(f"/api/projects/{other}/lead{tab}").status_code == 404, tab
        assert auditor.get(f"/api/projects/{mine}/lead{tab}").status_code == 200, tab
    assert [each["name"] for each in lead.get("/api/projects").json()["projects"]] == ["mine"]
    lead.post(f"/api/projects/{mine}/lead/state", json={"state": "open"})
    assert lead.post(f"/api/projects/{mine}/lead/state", json={"state": "closed"}).status_code == 200
    assert {each["subject"] for each in lead.get("/api/log").json()["events"]} == {mine} and lead.get("/api/log").json()["length"] is None
    assert lead.post("/api/projects", json={"name": "third"}).status_code == 404
    for place in (mine, other):
        assert lead.post(f"/api/projects/{place}/lead/people/{bob}/roles", json={"roles": ["labeler"]}).status_code == 404
        assert lead.post(f"/api/projects/{place}/lead/people/{bob}/pause").status_code == 404
    for path in ("state", "settings", "invitations", "tasks", "audit", "import", "thresholds", "signoffs", f"people/{bob}/pause"):
        assert auditor.post(f"/api/projects/{mine}/lead/{path}", json={}).status_code == 404, path
    assert {each["name"] for each in auditor.get(f"/api/projects/{mine}/lead/people").json()["members"]} == {None}


def test_every_page_of_the_room_renders_empty_and_filled(store: Store) -> None:
    empty, full = add_project(store, "empty"), add_project(store, "<b>full</b>")
    add_clips(store, full, files=False, verdicts=("allow", "block", "review", "error"))
    add_member(store, "ada", "lead")
    client = Client(store, "ada")
    for project_id in (empty, full):
        for tab in TABS:
            get(client, f"/projects/{project_id}/lead{tab}")
            page = client.get(f"/projects/{project_id}/lead{tab}", headers=HTML)
            assert page.status_code == 200 and "<h1>" in page.text and "<b>full" not in page.text, (tab, page.text[:300])
    for path in ("/projects", "/log", "/projects/*/lead/people", f"/projects/{full}/lead/thresholds?choice=P17+flash+3&new=0.3", f"/projects/{full}/lead/signoffs?run=test"):
        page = client.get(path, headers=HTML)
        assert page.status_code == 200 and "<h1>" in page.text, path
    assert client.get("/projects/*/lead/settings", headers=HTML).status_code == 404


def test_a_pages_numbers_are_null_where_nothing_is_known_and_never_nan(store: Store) -> None:
    project_id = add_project(store)
    add_clips(store, project_id, files=False)
    add_member(store, "ada", "lead", project_id=project_id)
    client = Client(store, "ada")
    for tab in TABS:
        get(client, f"/projects/{project_id}/lead{tab}")
        text = client.get(f"/api/projects/{project_id}/lead{tab}").text
        assert "NaN" not in text and "Infinity" not in text, tab


def test_thresholds_go_through_two_people_and_are_taken_as_yaml(each_store: Store) -> None:
    project_id = add_project(each_store)
    add_clips(each_store, project_id, files=False, verdicts=("allow", "block"))
    add_member(each_store, "ada", "lead", project_id=project_id)
    add_member(each_store, "sam", "senior", project_id=project_id)
    add_member(each_store, "bob", "labeler", project_id=project_id)
    lead, senior, path = Client(each_store, "ada"), Client(each_store, "sam"), f"/projects/{project_id}/lead/thresholds"
    assert get(lead, path)["choices"] == [{"filter": "flash 3", "policy": "P17", "threshold": 0.5, "clips": 12}]
    preview = get(senior, f"{path}?choice=P17+flash+3&new=0.01")["preview"]
    assert (preview["blocked_more"]["clips"], preview["blocked_less"]["clips"], preview["after"]["recall"]["value"]) == (6, 0, None)
    assert get(lead, f"{path}?choice=P17+other&new=0.01")["problem"] and Client(each_store, "bob").get(f"/api{path}").status_code == 404
    made = lead.post(f"/api{path}", json={"filter": "flash 3", "policy": "P17", "new": "0.01"}).json()["done"]
    assert lead.post(f"/api{path}/{made}", json={"approve": True}).status_code == 403
    assert senior.post(f"/api{path}/{made}", json={"approve": "true"}).status_code == 200
    yaml = lead.get(f"/api{path}.yaml")
    assert yaml.status_code == 200 and "threshold: 0.01" in yaml.text and "attachment" in yaml.headers["content-disposition"]
    assert senior.get(f"/api/projects/{project_id}/lead/people").status_code == 404 and senior.post(f"/api/projects/{project_id}/lead/signoffs", json={}).status_code == 404


def test_a_run_is_signed_only_as_it_was_shown(each_store: Store) -> None:
    project_id = add_project(each_store)
    first, *_ = add_clips(each_store, project_id, files=False)
    add_member(each_store, "ada", "lead", project_id=project_id)
    client, path = Client(each_store, "ada"), f"/projects/{project_id}/lead/signoffs"
    told = get(client, f"{path}?run=test")
    assert told["runs"] == [["test", 12]] and told["evidence"]["clips"]["allow"] == 12 and get(client, f"{path}?run=none")["evidence"] is None
    with each_store.writing() as db:
        db.execute(update(clip).where(clip.c.id == first).values(state="withdrawn"))
        each_store.log(db, "system", "clip withdrawn", first)
    body = {"run": "test", "approved": "true", "statement": "fine", "seen": told["seen"]}
    assert client.post(f"/api{path}", json=body).status_code == 409
    told = get(client, f"{path}?run=test")
    assert client.post(f"/api{path}", json={**body, "seen": told["seen"]}).status_code == 200
    assert client.post(f"/api{path}", json={**body, "seen": told["seen"]}).status_code == 200, "the button was pressed twice"
    (held,) = get(client, path)["signoffs"]
    assert held["evidence"]["withdrawn"] == 1 and held["approved"] and held["statement"] == "fine"
    assert client.post(f"/api{path}", json={**body, "seen": told["seen"], "approved": "false"}).status_code == 200
    assert [each["approved"] for each in get(client, path)["signoffs"]] == [False, True]


def test_the_log_is_paged_without_gaps_and_filtered(each_store: Store) -> None:
    seed_store(each_store, clips=8, answers=0, events=350)
    add_member(each_store, "ada", "lead")
    client = Client(each_store, "ada")
    seen, before = [], ""
    while True:
        told = client.get(f"/api/log{before}").json()
        seen += [each["seq"] for each in told["events"]]
        if told["before"] is None:
            break
        before = f"?before={told['before']}"
    assert seen == list(range(seen[0], 0, -1)) and seen[0] >= 350
    for name, value in (("kind", "leased"), ("actor", "person-7"), ("subject", "n200")):
        found = client.get(f"/api/log?{name}={value}").json()["events"]
        assert found and {each[name] for each in found} == {value}, name
    assert "login" in client.get("/api/log").json()["kinds"] and client.get("/api/log?kind=nothing").json()["events"] == []
    assert client.get("/api/log?before=0").status_code == 422


def test_a_nul_in_a_request_is_refused_in_words(each_store: Store) -> None:
    project_id = add_project(each_store)
    add_member(each_store, "ada", "lead")
    client = Client(each_store, "ada")
    for path in (
        "/api/log?kind=a%00b",
        "/api/projects/%00/lead/people",
        f"/api/projects/{project_id}/lead/signoffs?run=%00",
        f"/api/projects/{project_id}/lead/thresholds?choice=%00&new=0.5",
    ):
        assert client.get(path).status_code in (200, 404, 422), path
    for path, body in (
        ("projects", {"name": "a\0b"}),
        (f"projects/{project_id}/lead/people/%00/roles", {"roles": []}),
        (f"projects/{project_id}/lead/import", {"folder": "0/\0", "run": "x"}),
    ):
        assert client.post(f"/api/{path}", json=body).status_code in (404, 422), path


# In a browser


def page_of(browser: Any, address: str, login: str, errors: list[str], **how: Any) -> Any:
    page = browser.new_context(**how).new_page()
    page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"{address}/login")
    page.get_by_label("Login").fill(login)
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_label("Password").press("Enter")
    page.wait_for_url(f"{address}/")
    return page


def test_a_lead_sets_up_invites_and_agrees_with_a_senior_on_a_threshold_in_a_browser(store: Store, browser: Any) -> None:
    project_id = add_project(store)
    add_clips(store, project_id, files=False, verdicts=("allow", "block", "review", "error"))
    add_member(store, "ada", "lead", project_id=project_id)
    add_member(store, "sam", "senior", project_id=project_id)
    get(Client(store, "ada"), f"/projects/{project_id}/lead/thresholds")
    errors: list[str] = []
    with serving(store) as address:
        lead = page_of(browser, address, "ada", errors)
        lead.get_by_role("link", name="Lead the project").click()
        lead.get_by_role("link", name="Settings").click()
        lead.get_by_label("Takes").fill("3")
        lead.get_by_role("button", name="Save the settings").click()
        lead.wait_for_load_state("networkidle")
        assert lead.get_by_label("Takes").input_value() == "3"
        lead.get_by_label("Active").fill("0.9")
        lead.get_by_role("button", name="Save the settings").click()
        lead.locator(".settings .error", has_text="add up to 1").wait_for()
        errors[:] = [each for each in errors if "422" not in each]
        lead.get_by_role("link", name="People").click()
        lead.get_by_role("checkbox", name="labeler").first.check()
        lead.get_by_role("button", name="Make a link").click()
        lead.locator("output", has_text="/join/").wait_for()
        lead.get_by_role("link", name="Thresholds").click()
        lead.get_by_label("New threshold").fill("0.3")
        lead.get_by_role("button", name="Preview").click()
        assert lead.locator("svg.histogram line.limit.new").count() == 1
        lead.get_by_role("button", name="Propose it").click()
        lead.get_by_role("button", name="Take it back").wait_for()
        assert lead.get_by_role("button", name="Approve").count() == 0
        senior = page_of(browser, address, "sam", errors, viewport={"width": 360, "height": 740})
        senior.get_by_role("link", name="Thresholds").click()
        senior.get_by_role("button", name="Approve").click()
        senior.get_by_role("link", name="As YAML").wait_for()
        assert senior.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert errors == []


def test_every_page_is_free_of_serious_faults_of_access_on_a_phone_in_the_dark(store: Store, browser: Any) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    project_id = add_project(store)
    add_clips(store, project_id, files=False, verdicts=("allow", "block", "review", "error"))
    add_member(store, "ada", "lead")
    client, errors = Client(store, "ada"), []
    with serving(store) as address:
        page = page_of(browser, address, "ada", errors, viewport={"width": 360, "height": 740}, color_scheme="dark")
        for path in ("/projects", "/log", *(f"/projects/{project_id}/lead{tab}" for tab in TABS), f"/projects/{project_id}/lead/thresholds?choice=P17+flash+3&new=0.3"):
            get(client, path)
            page.goto(address + path)
            faults = [(each["id"], each["nodes"][0]["html"]) for each in axe.run(page).response["violations"] if each["impact"] in ("serious", "critical")]
            assert faults == [], path
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path
    assert errors == []


def test_numbers_come_up_to_date_by_themselves(store: Store, browser: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    project_id = add_project(store)
    add_member(store, "ada", "lead")
    go = threading.Event()
    kept = leading.progress_of
    monkeypatch.setattr(leading, "progress_of", lambda *told: (go.wait(20), kept(*told))[1])
    errors: list[str] = []
    with serving(store) as address:
        page = page_of(browser, address, "ada", errors)
        page.goto(f"{address}/projects/{project_id}/lead")
        assert "being worked out" in page.locator(".standing").inner_text()
        go.set()
        page.get_by_text("answers in 24 hours").wait_for(timeout=15_000)
    assert errors == []

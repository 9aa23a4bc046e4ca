"""The leads' room through its routes, and in a browser."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from reward.app import quality
from reward.app.store import Store
from tests.reward.app.conftest import PASSWORD, Client, add_clips, add_member, add_project

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
        ("\ud800", "1", "unicode"),
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
    assert lead.get("/api/log").status_code == 404 and lead.post("/api/projects", json={"name": "third"}).status_code == 404
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
